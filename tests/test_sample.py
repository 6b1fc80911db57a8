"""
sample.py through the real command: text is what transformers generates, pictures are those of their seeds whatever
stands beside them, the page gives what the terminal gives, hostile requests get one readable error each and the server
goes on, no code of a run is executed unless trusted, and what a user gets wrong is answered by one line.
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
from conftest import ROOT, TINY, TINY_MODEL, read_grid, start, within
from PIL import Image

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEXT = {"num_samples": 1, "max_new_tokens": 30, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 7}
PICTURES = {"negative_prompt": "", "class_label": "red", "num_samples": 3, "lora_scale": 1.0, "steps": 4}
PICTURES |= {"guidance": 2.0, "sampler": "", "seed": 7}


def flags(values):
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_file, picture_folder, pretrained):
    """A run of each kind, a chat model of transformers, and runs that are spoiled."""
    folder = tmp_path_factory.mktemp("runs")
    for trainer, name, data, *arguments in (
        ("train_lm.py", "text", text_file, "--tokenizer=char"),
        ("train_diffusion.py", "pictures", picture_folder),
    ):
        (folder / f"{name}.py").write_text(TINY_MODEL[trainer] + TINY + "max_steps = 10\n")
        within(trainer, folder / f"{name}.py", f"--dataset={data}", *arguments, f"--out_dir={folder / name}")
    shutil.copytree(pretrained("llama", max_position_embeddings=128), folder / "chat")
    (folder / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("torn", "weightless", "music"):
        shutil.copytree(folder / "text", folder / name)
    (folder / "torn" / "model.safetensors").write_bytes(b"not weights")
    (folder / "weightless" / "model.safetensors").unlink()
    run = json.loads((folder / "music" / "run.json").read_text())
    (folder / "music" / "run.json").write_text(json.dumps(run | {"kind": "music"}))
    (folder / "empty.txt").write_text("")
    return folder


@contextlib.contextmanager
def served(tmp_path, folder, *arguments):
    """-> the address of the page of a run; SIGTERM ends it, also where SIGINT is ignored."""
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
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and not out  # stdout is for text


def connect(url):
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False)


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


def test_text_is_what_transformers_generates(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("text", "chat"):
        model, tok = (kind.from_pretrained(runs / name) for kind in (AutoModelForCausalLM, AutoTokenizer))
        ids = model.generate(**tok("def ", return_tensors="pt"), max_new_tokens=20, do_sample=False)[0]
        theirs = tok.decode(ids, skip_special_tokens=True).rstrip("\ufffd") + "\n"  # half a character
        greedy = flags({"prompt": "def ", "temperature": 0, "max_new_tokens": 20, "num_samples": 2})
        assert within("sample.py", f"--out_dir={runs / name}", *greedy)[0] == 2 * theirs


def test_text_is_a_function_of_the_seed(runs, tmp_path):
    (tmp_path / "prompt.txt").write_text("import ")
    how = (f"--out_dir={runs / 'text'}", f"--prompt=FILE:{tmp_path / 'prompt.txt'}", "--num_samples=2")
    first, other = (within("sample.py", *how, f"--seed={seed}")[0] for seed in (3, 4))
    assert first == within("sample.py", *how, "--seed=3")[0] != other and first.startswith("import ")


def test_a_picture_depends_on_its_class_and_seed_alone(runs, tmp_path):
    grid, how = tmp_path / "grid.png", ("--steps=4", f"--out_dir={runs / 'pictures'}")
    within("sample.py", *how, "--num_samples=7", f"--output={grid}")  # of three classes in turn
    drawn = read_grid(grid, 8, 7)
    within("sample.py", *how, "--class_label=1", "--seed=1341", f"--output={grid}")
    assert np.array_equal(read_grid(grid, 8, 1)[0], drawn[4])
    within("sample.py", *how, "--class_label=green", "--seed=1341", f"--output={grid}")
    assert np.array_equal(read_grid(grid, 8, 1)[0], drawn[4])


def test_a_page_of_text(runs, tmp_path):
    def alone(**values):
        how = (f"--out_dir={runs / 'text'}", "--prompt=def ", *flags(TEXT | values))
        return within("sample.py", *how)[0].removesuffix("\n")

    with served(tmp_path, runs / "text", f"--compare={runs}/*") as url:
        client = connect(url)
        assert ask(client, "def ", **TEXT) == alone()
        assert ask(client, "def ", **TEXT | {"num_samples": 3}) == alone(num_samples=3)
        job = client.submit("def ", *(TEXT | {"max_new_tokens": 300}).values(), api_name="/generate")
        parts = [*job, job.result()]  # it grows
        assert len(parts) > 2 and all(b.startswith(a) for a, b in itertools.pairwise(parts))
        # what cannot be
        for name in TEXT:
            for value in (None, -1, 1e300, 2**70, "many", [3], {"a": 1}):
                refusal(client, "a", **TEXT | {name: value})
        assert "at most 20,000" in refusal(client, "a" * 3_000_000, **TEXT)
        assert "prompt" in refusal(client, None, **TEXT)
        assert "at most 32" in refusal(client, "a" * 33, **TEXT)
        assert "at least 1" in refusal(client, "", **TEXT)
        assert "prompt='数'" in refusal(client, "数", **TEXT)
        for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
            for place in range(6):
                body = [b"1", b"30", b"0", b"0", b"1", b"7"]
                body[place] = number
                answer = post(url, b'{"data": ["a", %s]}' % b", ".join(body))
                assert "error" in answer or "complete" in answer, (number, place, answer)
        for body in (b"", b"{", b"[]", b'{"data": 3}', b'{"data": []}', b"\xff", b'{"data": ["\\ud800"]}'):
            assert "error" in post(url, body), body
        # what is only strange; no file of the server is read
        for values in ({"temperature": 1e-40}, {"top_p": 0}, {"top_k": 1000}, {"seed": 2**32}):
            assert ask(client, "FILE:/etc/pass", **TEXT | values).startswith("FILE:/etc/pass"), values
        # twenty at once get what each gets alone
        with ThreadPoolExecutor(20) as pool:
            texts = list(pool.map(lambda i: ask(connect(url), "def ", **TEXT | {"seed": i % 2}), range(20)))
        assert texts == [alone(seed=0), alone(seed=1)] * 10
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
    with served(tmp_path, runs / "chat", "--chat=True") as url:
        one, two = connect(url), connect(url)
        said = [ask(one, line, **values) for line in (lines[0], lines[1])]
        assert "takes fewer than 128" in refusal(one, lines[2], **values)
        assert "is empty" in refusal(one, " \n", **values)
        said.append(ask(one, lines[3], **values))
        assert ask(two, lines[0], **values) == said[0]  # each visitor has a conversation of his own
    assert "".join(f"{text}\n" for text in said) == out


def test_a_page_of_pictures(runs, tmp_path):
    grid, how = tmp_path / "grid.png", flags({**PICTURES, "out_dir": runs / "pictures"})
    within("sample.py", *how, f"--output={grid}")
    with served(tmp_path, runs / "pictures") as url:
        client = connect(url)
        drawn = [np.asarray(Image.open(row["image"])) for row in ask(client, "", **PICTURES)]
        assert np.array_equal(drawn, read_grid(grid, 8, 3))
        for name in ("class_label", "num_samples", "steps", "guidance", "seed"):
            for value in (None, "no such thing", 2**70, ["red"]):
                refusal(client, "", **PICTURES | {name: value})
        assert "without a prompt" in refusal(client, "a cat", **PICTURES)
        assert len(ask(client, "", **PICTURES | {"num_samples": 64})) == 64


def test_the_losses_on_the_page(tmp_path, monkeypatch):
    import sample

    rows = [
        {"step": 0, "val/loss": 5.0},
        {"step": 1, "train/loss": 4.0},
        {"step": 2, "train/loss": float("nan")},
    ]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [*map(json.dumps, rows), '{"step": 3, "train/lo']
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sample, "out_dir", str(tmp_path / "a"))
    assert sample.losses().values.tolist() == [[1, 4.0, "train/loss"], [0, 5.0, "val/loss"]]
    monkeypatch.setattr(sample, "compare", f"{tmp_path}/*")
    assert sample.losses().values.tolist() == [[0, 5.0, str(tmp_path / "a")], [0, 5.0, str(tmp_path / "b")]]


SCRIPT = '''
import torch.nn as nn
SCALE = 2.0
width = 3
def twice(x): return SCALE * x
class GPT(nn.Module):
    """A model."""
    def forward(self, x): return twice(x) * width
def train(): return GPT()
'''


@pytest.mark.parametrize(
    "old, new, same",
    [
        ('"""A model."""', "# a comment", True),
        ("return GPT()", "return 3", True),
        ("width = 3", "width = 4", True),  # a setting, which is the run's
        ("twice(x) *", "twice(x) +", False),
        ("SCALE * x", "SCALE / x", False),
        ("SCALE = 2.0", "SCALE = 3.0", False),
        ("import torch.nn as", "import other.nn as", False),
        ("def train", "GPT.forward = nn.ReLU.forward\ndef train", False),
    ],
)
def test_what_belongs_to_a_model(tmp_path, old, new, same):
    import sample

    run = {"model": "GPT", "settings": {"width": 3}}
    codes = []
    for name, text in (("a.py", SCRIPT), ("b.py", SCRIPT.replace(old, new))):
        (tmp_path / name).write_text(text)
        codes.append(sample.model_code(tmp_path / name, run))
    assert (codes[0] == codes[1]) == same


def test_the_script_of_a_run_runs_only_when_trusted(runs, tmp_path):
    run, owned = tmp_path / "run", tmp_path / "owned"
    shutil.copytree(runs / "text", run)
    harmless = (ROOT / "train_lm.py").read_text() + "\n# an edit elsewhere\nOTHER = 1\n"
    (run / "train_lm.py").write_text(f"open({str(owned)!r}, 'w')\n" + harmless)
    how = (f"--out_dir={run}", "--max_new_tokens=1", "--prompt=a")
    within("sample.py", *how)
    (run / "train_lm.py").write_text(f"open({str(owned)!r}, 'w')\n" + harmless.replace("relu(", "gelu("))
    assert "--trust_run_code=True" in within("sample.py", *how, code=2)[1].splitlines()[-1]
    assert not owned.exists()
    within("sample.py", *how, "--trust_run_code=True")
    assert owned.exists()


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("text", ["--prompt="], "at least 1"),
        ("text", ["--prompt=FILE:{runs}/empty.txt"], "at least 1"),
        ("text", ["--prompt=FILE:{runs}/none.txt"], "No such file"),
        ("text", ["--prompt=" + "x" * 33], "at most 32"),
        ("text", ["--prompt=数学"], "prompt='数学' cannot be used"),
        ("text", ["--temperature=-1"], "at least 0"),
        ("text", ["--max_new_tokens=0"], "at least 1"),
        ("text", ["--merge={runs}/merged"], "no LoRA adapter"),
        ("text", ["--chat=True"], "no chat template"),
        ("nowhere", [], "no weights"),
        ("torn", [], "cannot be used"),
        ("weightless", [], "no weights"),
        ("music", [], "music"),
        ("pictures", ["--class_label=rad"], "did you mean 'red'"),
        ("pictures", ["--class_label=3"], "no class '3'"),
        ("pictures", ["--output={runs}/nowhere/grid.png"], "must be a .png in a folder that exists"),
        ("pictures", ["--prompt=a cat"], "without a prompt"),
        ("pictures", ["--chat=True"], "no chat template"),
    ],
)
def test_refusals(runs, name, arguments, message):
    arguments = [argument.format(runs=runs) for argument in arguments]
    out, err = within("sample.py", f"--out_dir={runs / name}", *arguments, code=2)
    assert message in err.splitlines()[-1] and "Traceback" not in err and not out
