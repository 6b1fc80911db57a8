"""
The demo in a browser, as a real server with real clients: what it writes, answers and draws is what sample.py does in
the terminal; whatever it is sent gets an answer, one line that names the remedy, and it goes on; visitors do not
disturb each other; it can be stopped, listens to this machine alone, and shows the loss of a run that goes on.
"""

import contextlib
import itertools
import json
import signal
import socket
import time

import httpx
import numpy as np
import pytest
from conftest import start, within
from PIL import Image

TEXT = {"max_new_tokens": 30, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 7}
PICTURES = {"negative_prompt": "", "class_label": "", "num_samples": 3, "steps": 4}
PICTURES |= {"sampler": "heun", "guidance": 2.0, "seed": 7}
NUMBERS = [None, "", "many", -1, 1e300, 2**70, True, [3], {"a": 1}, -0.5]


@contextlib.contextmanager
def served(tmp_path, *arguments):
    """-> the address of `sample.py --demo=True` with these arguments; in the end Ctrl-C closes it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(tmp_path / "log.txt", "w+") as log:
        process = start("sample.py", *arguments, "--demo=True", f"--port={port}", stderr=log)
        try:
            until = time.monotonic() + 120
            while "demo: " not in (text := (tmp_path / "log.txt").read_text()):
                assert process.poll() is None and time.monotonic() < until, text
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
            assert '/sample.py"' not in (tmp_path / "log.txt").read_text()  # no traceback of ours
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def client():
    from gradio_client import Client

    return lambda url: Client(url, verbose=False, analytics_enabled=False)


def refusal(visitor, **values):
    """The one line that a visitor reads who asks for something that cannot be."""
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as error:
        visitor.predict(**values, api_name="/generate")
    message = str(error.value)
    assert 10 < len(message) < 400 and "\n" not in message and "Traceback" not in message, message
    return message


def press(visitor, name):
    """What a click on a button of this name does, which is no endpoint."""
    config = visitor.config
    button = next(part["id"] for part in config["components"] if part["props"].get("value") == name)
    events = [d["id"] for d in config["dependencies"] if [button, "click"] in map(list, d["targets"])]
    for event in events:
        inputs = next(d["inputs"] for d in config["dependencies"] if d["id"] == event)
        body = {"data": [None for _ in inputs], "fn_index": event, "session_hash": visitor.session_hash}
        way = "queue/join" if name == "New conversation" else "run/predict"  # at once, or in its turn
        httpx.post(f"{visitor.src}gradio_api/{way}", json=body).raise_for_status()


def posted(url, body):
    """What the server answers to a request of bytes, in the end."""
    answer = httpx.post(f"{url}gradio_api/call/generate", content=body)
    if answer.status_code != 200:
        return f"error {answer.status_code}"
    return httpx.get(f"{url}gradio_api/call/generate/{answer.json()['event_id']}", timeout=30).text


def spoken(folder, prompt, **how):
    how = [f"--{name}={value}" for name, value in (TEXT | how).items()]
    return within("sample.py", f"--out_dir={folder}", f"--prompt={prompt}", *how)[0].removesuffix("\n")


def test_text(tmp_path, tiny, client):
    within("train_lm.py", tiny)
    out = tmp_path / "run"
    good = spoken(out, "def ")
    with served(tmp_path, f"--out_dir={out}") as url:
        visitor = client(url)
        assert list(visitor.view_api(return_format="dict", print_info=False)["named_endpoints"]) == [
            "/generate"
        ]
        job = visitor.submit(prompt="def ", **TEXT, api_name="/generate")
        assert job.result() == good
        # it grows: what came first is the beginning of what came later
        job = visitor.submit(prompt="def ", **TEXT | {"max_new_tokens": 400}, api_name="/generate")
        parts = [*job, job.result()]
        assert len(parts) > 2 and all(b.startswith(a) for a, b in itertools.pairwise(parts))
        # what cannot be: of the wrong type, negative, huge, no number
        for name in TEXT:
            for value in NUMBERS:
                assert name in refusal(visitor, prompt="a", **TEXT | {name: value}), (name, value)
        for value in (None, 3, [1], {"text": "a"}, True):
            assert "prompt" in refusal(visitor, prompt=value, **TEXT)
        refusal(visitor, prompt="a", **TEXT | {"seed": [0] * 100_000})
        # the ends of what can be, and what is too near to one
        ends = ({"temperature": 0}, {"temperature": 1e-40}, {"temperature": 3}, {"top_p": 0}, {"top_k": 1000})
        for end in (*ends, {"seed": 2**32}, {"max_new_tokens": 1}):
            assert visitor.predict(prompt="a", **TEXT | end, api_name="/generate").startswith("a"), end
        assert "at most 32" in refusal(visitor, prompt="a" * 33, **TEXT)
        assert "at most 20,000" in refusal(visitor, prompt="a" * 3_000_000, **TEXT)
        # what is only strange, and no file of the server is read
        for prompt in ("FILE:/etc/passwd", "\0\x1b[31m", "\u202eæ你🙂", "<script>x</script>", "{}%s"):
            assert visitor.predict(prompt=prompt, **TEXT, api_name="/generate").startswith(prompt), prompt
        assert visitor.predict(prompt="", **TEXT, api_name="/generate").startswith("\n")
        # what no client sends
        for body in (
            b"",
            b"{",
            b"[]",
            b'{"data": 3}',
            b'{"data": []}',
            b'{"data": [1,2,3,4,5,6,7,8,9]}',
            b"\xff",
        ):
            assert "error" in posted(url, body), body
        for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
            assert "error" in posted(url, b'{"data": ["a", 30, %s, 0, 1, 7]}' % number), number
        assert "error" in posted(url, b'{"data": ["\\ud800", 30, 0, 0, 1, 7]}')  # half a character
        # four at once, each with a seed of its own, get what each would have got alone
        seeds = [1, 2, 3, 4]
        visitors = [client(url) for _ in seeds]
        jobs = [
            v.submit(prompt="def ", **TEXT | {"seed": s}, api_name="/generate")
            for v, s in zip(visitors, seeds)
        ]
        alone = [spoken(out, "def ", seed=s) for s in seeds]
        assert [job.result(timeout=60) for job in jobs] == alone and len(set(alone)) == 4
        # one that takes long is stopped, and the next is served at once; one that is cancelled holds up nobody
        long = {"prompt": "def ", **TEXT | {"max_new_tokens": 2000}, "api_name": "/generate"}
        for end in (lambda job: press(visitor, "Stop"), lambda job: job.cancel()):
            job = visitor.submit(**long)
            while not job.outputs():
                time.sleep(0.01)
            end(job)
            assert visitor.predict(prompt="def ", **TEXT, api_name="/generate") == good
            assert len(job.outputs()[-1]) < 2000
        port = int(url.rstrip("/").rsplit(":", 1)[1])
        with pytest.raises(OSError):  # another address of this machine
            socket.create_connection(("127.0.0.2", port), timeout=5)
        _, err = within("sample.py", f"--out_dir={out}", "--demo=True", f"--port={port}", code=2)
        assert f"port={port}" in err.splitlines()[-1]


def test_a_chat(tmp_path, pretrained, client):
    """Each visitor has a conversation of its own, and it goes as in the terminal, transformers' model too."""
    base = pretrained("llama", max_position_embeddings=128)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    how = TEXT | {"max_new_tokens": 12, "temperature": 0}
    flags = [f"--{name}={value}" for name, value in how.items()]
    say = [{"prompt": text, **how, "api_name": "/generate"} for text in ("Hello?", "And you?", "Oh.")]
    with served(tmp_path, f"--out_dir={base}", "--chat=True") as url:
        one, two = client(url), client(url)
        one.predict(**say[0])
        one.predict(**say[1])
        messages, _ = one.predict(**say[2])
        other, _ = two.predict(**say[1])
        assert [m["role"] for m in messages] == ["user", "assistant"] * 3 and len(other) == 2
        assert "say something" in refusal(two, prompt=" \n", **how)
        assert "fewer than 128" in refusal(two, prompt="a b c d " * 100, **how)
        job = one.submit(**say[0] | {"max_new_tokens": 100})
        while not job.outputs():
            time.sleep(0.01)
        press(one, "Stop")
        assert len(job.result()[0][-1]["content"][0]["text"].split()) < 60
        again, _ = two.predict(**say[0])
        assert [m["role"] for m in again] == ["user", "assistant"] * 2
        press(two, "New conversation")
        again, _ = two.predict(**say[1])
        assert again == other
    lines = "".join(s["prompt"] + "\n" for s in say)
    stdout, _ = within("sample.py", f"--out_dir={base}", "--chat=True", *flags, stdin=lines)
    answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
    assert [line.strip() for line in "\n".join(answers).splitlines()] == [
        x.strip() for x in stdout.splitlines()
    ]
    _, err = within("sample.py", f"--out_dir={base}", "--demo=True", "--max_new_tokens=5000", code=2)
    assert "max_new_tokens=5000" in err


@pytest.mark.parametrize("trainer", ["train_diffusion.py"])
def test_pictures(tmp_path, tiny, client):
    within("train_diffusion.py", tiny)
    out, grid = tmp_path / "run", tmp_path / "grid.png"
    flags = [f"--{name}={value}" for name, value in (PICTURES | {"class_label": "red"}).items()]
    within("sample.py", f"--out_dir={out}", f"--output={grid}", *flags)
    tiles = np.asarray(Image.open(grid))
    tiles = [tiles[y : y + 8, x : x + 8] for y, x in ((0, 0), (0, 8), (8, 0))]
    with served(tmp_path, f"--out_dir={out}") as url:
        visitor = client(url)

        def drawn(**how):
            found = visitor.predict(prompt="", **PICTURES | how, api_name="/generate")
            return [np.asarray(Image.open(row["image"])) for row in found]

        assert np.array_equal(drawn(class_label="red"), tiles)
        for name in ("num_samples", "steps", "guidance", "seed"):
            for value in NUMBERS[::3]:
                assert name in refusal(visitor, prompt="", **PICTURES | {name: value}), (name, value)
        for name in ("class_label", "sampler", "negative_prompt"):
            for value in (None, 3, ["red"], "<b>no such thing</b>", "x" * 200, "9" * 200, "x" * 100_000):
                message = refusal(visitor, prompt="", **PICTURES | {name: value})
                assert name in message and "<b>" not in message
        job = visitor.submit(prompt="", **PICTURES | {"num_samples": 64, "steps": 60}, api_name="/generate")
        while not job.outputs():
            time.sleep(0.01)
        press(visitor, "Stop")
        assert 0 < len(job.result()) < 64
        assert "without prompts" in refusal(visitor, prompt="a cat", **PICTURES)
        assert np.array_equal(drawn(class_label="red"), tiles) and len(drawn(num_samples=64)) == 64


def test_pictures_by_their_captions(tmp_path, pipeline, captioned, client):
    """A page for prompts: what it draws is what the terminal draws; a file of the server is a prompt like any."""
    how = (f"--init_from={pipeline('sd')}", f"--dataset={captioned}", "--adapter=lora", "--image_size=16")
    how += (
        "--batch_size=4",
        "--max_steps=2",
        "--eval_interval=2",
        "--mixed_precision=no",
        "--sample_steps=4",
    )
    within("train_diffusion.py", *how, f"--out_dir={tmp_path / 'run'}")
    sizes, grid = {"steps": 4, "num_samples": 2, "guidance": 5.0, "seed": 7}, tmp_path / "grid.png"
    flags = [f"--{name}={value}" for name, value in (sizes | {"negative_prompt": "green"}).items()]
    within("sample.py", f"--out_dir={tmp_path / 'run'}", "--prompt=a red square", f"--output={grid}", *flags)
    tiles = np.hsplit(np.asarray(Image.open(grid)), 2)
    with served(tmp_path, f"--out_dir={tmp_path / 'run'}", "--prompt=a blue square") as url:
        visitor = client(url)

        def drawn(prompt, **more):
            values = PICTURES | sizes | {"prompt": prompt, "sampler": "dpm++"} | more
            return [
                np.asarray(Image.open(row["image"]))
                for row in visitor.predict(**values, api_name="/generate")
            ]

        assert np.array_equal(drawn("a red square", negative_prompt="green"), tiles)
        assert not np.array_equal(drawn("a red square"), tiles)
        for prompt in ("", "FILE:/etc/passwd", "\u202eæ你🙂" * 500):
            assert len(drawn(prompt)) == 2
        values = PICTURES | sizes | {"sampler": "dpm++"}
        assert "20,000" in refusal(visitor, prompt="x" * 20_001, **values)
        assert "heun" in refusal(visitor, prompt="x", **values | {"sampler": "heun"})
        assert "above 1" in refusal(visitor, prompt="x", **values | {"guidance": 1, "negative_prompt": "y"})


def test_the_curve_of_a_run_that_goes_on(tmp_path):
    import sample

    path, rows = tmp_path / "metrics.jsonl", [{"step": 0, "val/loss": 5.0}]
    rows += [{"step": step, "train/loss": 1 / step} for step in range(1, 4001)]
    rows += [{"step": 4001, "train/loss": float("nan")}, {"step": 4002, "val/loss": 2.0}]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4003, "train/lo')
    curve = sample.loss_curve(path, path.stat().st_size)
    train, val = (curve[curve["curve"] == name] for name in ("train/loss", "val/loss"))
    assert list(zip(val["step"], val["loss"])) == [(0, 5.0), (4002, 2.0)]
    assert 250 <= len(train) <= 500 and np.array_equal(train["loss"], 1 / train["step"])
