"""
What sample.py promises, through the real command: a terminal of few letters, and a reader that goes away; images are
those of their seeds and classes, whatever stands beside them; the page gives what the terminal gives, hostile requests
get one readable error each, and the server goes on; no code of a run is executed unless it is trusted; what a user gets
wrong is answered by one line. (Text is compared with that of transformers and peft in test_finetune.py.)
"""

import contextlib
import itertools
import json
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from conftest import ROOT, TINY, read_grid, run, start, within
from PIL import Image

import sample

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEXT = {"num_samples": 1, "max_new_tokens": 30, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 7}
PICTURES = {"negative_prompt": "", "class_label": "red", "num_samples": 3, "lora_scale": 1.0, "steps": 4}
PICTURES |= {"guidance": 2.0, "seed": 7}


def flags(values):
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, finished, picture_folder, pretrained):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("text", "torn", "weightless", "music"):
        shutil.copytree(finished, folder / name)
    (folder / "torn" / "model.safetensors").write_bytes(b"not weights")
    (folder / "weightless" / "model.safetensors").unlink()
    run = json.loads((folder / "music" / "run.json").read_text())
    (folder / "music" / "run.json").write_text(json.dumps(run | {"kind": "music"}))
    config = folder / "pictures.py"
    config.write_text(TINY["train_diffusion.py"])
    how = (f"--dataset={picture_folder}", f"--out_dir={folder / 'pictures'}", "--max_steps=10")
    within("train_diffusion.py", config, *how)
    shutil.copytree(pretrained("llama", max_position_embeddings=128), folder / "chat")
    (folder / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "empty.txt").write_text("")
    (folder / "nothing").mkdir()
    return folder


@contextlib.contextmanager
def served(tmp_path, folder, *arguments):
    """Yield (address, client) of the page of a run. SIGTERM ends it, also where SIGINT is ignored."""
    from gradio_client import Client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        how = (f"--out_dir={folder}", "--demo=True", f"--port={port}", *arguments)
        process = start("sample.py", *how, stderr=file)
        try:
            end = time.monotonic() + 200
            while "Running on local URL" not in log.read_text():
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            url = f"http://127.0.0.1:{port}/"
            yield url, Client(url, verbose=False, analytics_enabled=False)
        finally:
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and not out  # stdout is for text


def ask(client, prompt, **values):
    return client.predict(prompt, *values.values(), api_name="/generate")


def refusal(client, prompt, **values):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as error:
        ask(client, prompt, **values)
    message = str(error.value)
    assert 10 < len(message) < 600 and "Traceback" not in message and "upstream" not in message, message
    return message


def post(url, body):
    """What the server answers to the bytes of a request, in the end."""
    answer = httpx.post(f"{url}gradio_api/call/generate", content=body, timeout=60)
    if answer.status_code != 200:
        return f"error {answer.status_code}"
    return httpx.get(f"{url}gradio_api/call/generate/{answer.json()['event_id']}", timeout=60).text


def test_a_terminal_of_few_letters_and_a_reader_that_goes_away(runs):
    how = ("sample.py", f"--out_dir={runs / 'chat'}", "--prompt=~/h\u00e9llo")
    out, err = run(*how, "--max_new_tokens=1", PYTHONIOENCODING="ascii")
    assert out.startswith(r"~/h\xe9llo") and "Traceback" not in err
    process = start(*how, "--max_new_tokens=1000000")
    assert process.stdout.read(7) == "~/h\u00e9llo"
    process.stdout.close()
    assert process.wait(timeout=60) == 1 and "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_a_picture_depends_on_its_class_and_seed_alone(runs, tmp_path):
    grid = tmp_path / "grid.png"
    how = ("sample.py", "--steps=4", f"--out_dir={runs / 'pictures'}", f"--output={grid}")
    within(*how, "--num_samples=7")  # of three classes in turn
    drawn = read_grid(grid, 8, 7)
    within(*how, "--class_label=green", "--seed=1341")
    assert np.array_equal(read_grid(grid, 8, 1)[0], drawn[4])


def test_a_page_of_text(runs, tmp_path):
    def alone(**values):
        how = (f"--out_dir={runs / 'text'}", "--prompt=def ", *flags(TEXT | values))
        return within("sample.py", *how)[0].removesuffix("\n")

    with served(tmp_path, runs / "text", f"--compare={runs}/*") as (url, client):
        assert ask(client, "def ", **TEXT | {"num_samples": 3}) == alone(num_samples=3)
        job = client.submit("def ", *(TEXT | {"max_new_tokens": 100}).values(), api_name="/generate")
        parts = [*job, job.result()]  # it grows
        assert len(parts) > 2 and all(b.startswith(a) for a, b in itertools.pairwise(parts))
        # what cannot be
        for name, value in zip(TEXT, itertools.cycle((None, 1e300, "many"))):
            refusal(client, "a", **TEXT | {name: value})
        refused = {"a" * 3_000_000: "at most 20,000", None: "prompt", "a" * 33: "at most 32"}
        for prompt, message in (refused | {"": "at least 1", "数": "prompt='数'"}).items():
            assert message in refusal(client, prompt, **TEXT)
        for body in (b"", b"{", b"[]", b'{"data": 3}', b'{"data": []}', b"\xff", b'{"data": ["\\ud800"]}'):
            assert "error" in post(url, body), body
        for number in (b"NaN", b"-Infinity", b"1e999"):
            assert "error" in post(url, b'{"data": ["a", 1, 30, %s, 0, 1, 7]}' % number), number
        # what is only strange; no file of the server is read
        for values in ({"temperature": 1e-40}, {"top_p": 0}, {"top_k": 1000}, {"seed": 2**32}):
            assert ask(client, "FILE:/etc/pass", **TEXT | values).startswith("FILE:/etc/pass"), values
        # many at once get what each gets alone
        with ThreadPoolExecutor(10) as pool:
            texts = list(pool.map(lambda i: ask(client, "def ", **TEXT | {"seed": i % 2}), range(10)))
        assert texts == [alone(seed=0), alone(seed=1)] * 5 and texts[0] != texts[1]
        # one that is cancelled holds up nobody
        job = client.submit("def ", *(TEXT | {"max_new_tokens": 2000}).values(), api_name="/generate")
        while not job.outputs():
            time.sleep(0.01)
        job.cancel()
        assert ask(client, "def ", **TEXT) == alone()
        port = int(url.rstrip("/").rsplit(":", 1)[1])
        with pytest.raises(OSError):  # another address of this machine
            socket.create_connection(("127.0.0.2", port), timeout=5)
        how = (f"--out_dir={runs / 'text'}", "--demo=True", f"--port={port}")
        assert f"port={port} cannot be used" in within("sample.py", *how, code=2)[1]


def test_a_chat_in_the_terminal_and_on_a_page(runs, tmp_path):
    values = {"max_new_tokens": 12, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 7}
    lines = ["Hello?", "And you?", "a b c d " * 100, "Oh."]  # of which one is too long
    how = (f"--out_dir={runs / 'chat'}", "--chat=True", *flags(values))
    out, err = within("sample.py", *how, f"--prompt={lines[0]}", stdin="\n".join([*lines[1:], ""]))
    assert "takes fewer than 128" in err
    with served(tmp_path, runs / "chat", "--chat=True") as (_, client):
        said = [ask(client, line, **values) for line in lines[:2]]
        for line in (
            lines[2],
            " \n",
        ):  # a warning, as an error would lock the box, and no part of the history
            assert ask(client, line, **values) is None
        said.append(ask(client, lines[3], **values))
        client.reset_session()
        assert ask(client, lines[0], **values) == said[0]  # each visitor has a conversation of his own
    assert "".join(f"{text}\n" for text in said) == out


def test_a_page_of_pictures(runs, tmp_path):
    grid, how = tmp_path / "grid.png", flags({**PICTURES, "out_dir": runs / "pictures"})
    within("sample.py", *how, f"--output={grid}")
    with served(tmp_path, runs / "pictures") as (_, client):
        drawn = [np.asarray(Image.open(row["image"])) for row in ask(client, "", **PICTURES)]
        assert np.array_equal(drawn, read_grid(grid, 8, 3))
        for name in ("class_label", "num_samples", "steps", "guidance", "seed"):
            for value in ("no such thing", 2**70):
                refusal(client, "", **PICTURES | {name: value})
        assert "takes no prompt" in refusal(client, "a cat", **PICTURES)
        assert len(ask(client, "", **PICTURES | {"num_samples": 17, "steps": 1})) == 17  # of two batches


def test_the_losses_on_the_page(tmp_path, monkeypatch):
    rows = '{"step": 0, "val/loss": 5.0}\n{"step": 1, "train/loss": 4.0}\n{"step": 2, "train/loss": NaN}\n'
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(rows + '{"step": 3, "train/lo')
    monkeypatch.setattr(sample, "out_dir", f"{tmp_path}/a")
    assert sorted(sample.losses().values.tolist()) == [[0, 5.0, "val/loss"], [1, 4.0, "train/loss"]]
    monkeypatch.setattr(sample, "compare", f"{tmp_path}/*")
    assert sample.losses().values.tolist() == [[0, 5.0, f"{tmp_path}/a"], [0, 5.0, f"{tmp_path}/b"]]


EDITS = [  # and whether the section of the model stays the same
    ("def lr_at(", "def lr_of(", True),
    ("n_layer = 3", "n_layer = 5", True),  # a setting, which is the run's
    ("import torch.nn as nn", "import other as nn", True),
    ("relu(self.fc1(x))", "gelu(self.fc1(x))", False),
    ("def make_gpt(", "GPT.forward = Block.forward\ndef make_gpt(", False),
    ("# ---- Model", "# ---- Another", False),
    ("class DiT(nn.Module):", "class DiT(nn.Module):  # of train_diffusion.py", False),
]


@pytest.mark.parametrize("old, new, is_same", EDITS)
def test_what_belongs_to_a_model(tmp_path, old, new, is_same):
    script = ROOT / ("train_diffusion.py" if "DiT" in old else "train_lm.py")
    source = script.read_text(encoding="utf-8")
    assert source.count(old) == 1
    (tmp_path / "edited.py").write_text(source.replace(old, new), encoding="utf-8")
    texts = [sample.sections(path, "Model", "The mathematics") for path in (tmp_path / "edited.py", script)]
    assert (texts[0] == texts[1]) == is_same


def test_the_script_of_a_run_runs_only_when_trusted(runs, tmp_path):
    run, owned = tmp_path / "run", tmp_path / "owned"
    shutil.copytree(runs / "text", run)
    harmless = f"open({str(owned)!r}, 'w')\n" + (ROOT / "train_lm.py").read_text()
    (run / "train_lm.py").write_text(harmless)
    how = (f"--out_dir={run}", "--max_new_tokens=1", "--prompt=a")
    within("sample.py", *how)
    (run / "train_lm.py").write_text(harmless.replace("relu(", "gelu("))
    assert "--trust_run_code=True" in within("sample.py", *how, code=2)[1].splitlines()[-1]
    assert not owned.exists()
    within("sample.py", *how, "--trust_run_code=True")
    assert owned.exists()
    # beside a model of transformers, whose code is a library's, none is run
    shutil.copytree(runs / "chat", run, dirs_exist_ok=True)
    (run / "run.json").write_text('{"kind": "lm", "model": "Pretrained", "settings": {}}')
    (run / "train_lm.py").write_text("raise SystemExit(99)")
    within("sample.py", *how, "--trust_run_code=True")


REFUSED = [
    ("text", "--prompt=FILE:{runs}/empty.txt", "at least 1"),
    ("text", "--prompt=FILE:{runs}/none.txt", "No such file"),
    ("text", "--temperature=-1", "at least 0"),
    ("text", f"--seed={2**63}", f"seed={2**63} must be below"),
    ("text", "--chat=True", "is not a chat model"),
    ("pictures", "--merge={runs}/merged", "nothing to merge"),
    ("nothing", "--seed=1", "holds no weights"),
    ("torn", "--seed=1", "cannot be used"),
    ("weightless", "--seed=1", "no weights"),
    ("music", "--seed=1", "music"),
    ("pictures", "--class_label=1", "class_label='1' is not a class: choose from blue, green, red"),
    ("pictures", "--output={runs}/nowhere/grid.png", "must be a .png in a folder that exists"),
]


@pytest.mark.parametrize("name, argument, message", REFUSED)
def test_refusals(runs, name, argument, message):
    out, err = within("sample.py", f"--out_dir={runs / name}", argument.format(runs=runs), code=2)
    assert message in err.splitlines()[-1] and "Traceback" not in err and not out
