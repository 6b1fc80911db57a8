"""What the tests share: the real commands, run on a CPU, offline, on tiny data and models that are made here."""

import argparse
import contextlib
import functools
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

import filelock
import numpy as np
import pytest
import torch
import tqdm
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", CUDA_VISIBLE_DEVICES="")

import datasets
import transformers
from accelerate.state import AcceleratorState
from pipelines import make_pipeline
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer, processors
from torch.distributed import TCPStore

import train_diffusion as td

# Config files of models and runs so small that a step takes some milliseconds.
COMMON = """
n_layer, n_embd, batch_size = 2, 32, 8
max_steps, warmup_steps, weight_decay = 40, 5, 0.1
eval_interval, save_interval, log_interval = 10, 10, 5
mixed_precision = "no"
"""
TINY = {
    "train_lm.py": COMMON
    + 'tokenizer = "bytes"\nblock_size, n_head, n_kv_head, eval_batches = 32, 4, 2, 4\n',
    "train_diffusion.py": COMMON + "image_size, n_head, sample_steps, eval_batches = 8, 2, 2, 2\n",
}

# A config file is Python: this one puts something in the place of the loss, by the step and the process.
PLANT = """
import os, time
from accelerate import Accelerator as _Accelerator
_backward, _steps, _rank = _Accelerator.backward, iter(range(1, 10**6)), os.environ.get("RANK", "0")
def _planted(self, loss, **kwargs):
    step = next(_steps)
    _backward(self, %s, **kwargs)
_Accelerator.backward = _planted
"""
BAD = PLANT % "loss * float('nan') if (_rank, step) in %s else loss"


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """A cache folder of our own, the same for all tests."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("home"))
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_HOME"], "datasets")
    one_core()
    torch.set_num_threads(1)
    os.environ.pop("HF_DATASETS_CACHE", None)
    # By default tqdm has a lock that processes share: a forked run that is killed while it holds the lock would keep
    # it from all later tests. And its thread might hold the lock in the moment of a fork.
    tqdm.tqdm.set_lock(threading.RLock())
    tqdm.tqdm.monitor_interval = 0


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:60000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """120 pictures of 8 x 8 in three classes: red, green and blue, each with a bright half and some noise."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(120):
        name, pixels = ("red", "green", "blue")[i % 3], rng.integers(0, 60, (8, 8, 3))
        pixels[:, : 4 + i % 2, i % 3] = 220
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03}.png")
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, text_file):
    """pretrained(kind, tied, *added tokens) -> a new folder with a tiny random model of transformers"""

    def pretrained(kind, tied=True, *added, **changes):
        folder = tmp_path_factory.mktemp("pretrained") / kind
        core = ByteLevelBPETokenizer()
        core.train(str(text_file), 300, special_tokens=["<|endoftext|>"], show_progress=False)
        kwargs = {"tokenizer_object": core._tokenizer, "eos_token": "<|endoftext|>"}
        tok = transformers.PreTrainedTokenizerFast(**kwargs)
        torch.manual_seed(0)
        shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"max_position_embeddings": 64, "tie_word_embeddings": tied, "bos_token_id": None}
        shape |= {"eos_token_id": 0, "pad_token_id": None, "initializer_range": 0.1}
        if kind != "gpt2":
            shape |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
        config = transformers.AutoConfig.for_model(kind, **shape | changes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if added:
            tok.add_special_tokens({"additional_special_tokens": list(added)})
            model.resize_token_embeddings(len(tok))
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
        return folder

    return pretrained


def writes_around(folder, single):
    """Let the tokenizer of a model write its special tokens around each text, as "<s> $A"."""
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = [token for token in single.split() if token != "$A"]
    ids = zip(tokens, tok.convert_tokens_to_ids(tokens), strict=True)
    core = tok.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids))
    bos = {"bos_token": "<s>"} if "<s>" in tokens else {}
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=tok.eos_token, **bos)
    tok.save_pretrained(folder)


def check_out(folder, *edits, trainer="train_lm.py"):
    """A copy of the files in a new folder, edited as a researcher would; -> its trainer"""
    folder.mkdir()
    source = (ROOT / trainer).read_text(encoding="utf-8")
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    for name in ("sample.py", "configurator.py"):
        shutil.copy(ROOT / name, folder)
    (folder / trainer).write_text(source, encoding="utf-8")
    return folder / trainer


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """pipeline(kind) -> the folder of a tiny pipeline of diffusers, made once"""

    @functools.cache
    def pipeline(kind="sd"):
        return make_pipeline(tmp_path_factory.mktemp("pipeline") / kind, kind)

    return pipeline


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """Twelve pictures of several sizes with captions, "a red square" and so on, in metadata.jsonl."""
    folder, rng, table = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0), []
    for i in range(12):
        colour, pixels = ("red", "green", "blue")[i % 3], rng.integers(0, 60, (16 + i, 28 - i, 3))
        pixels[4:12, 4:12, i % 3] = 220
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
        table.append({"file_name": f"{i:02}.png", "text": f"a {colour} square"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    return folder


@pytest.fixture
def trainer(request):
    return "train_diffusion.py" if re.search("diffusion|pipe", request.module.__name__) else "train_lm.py"


@pytest.fixture
def defaults():
    """The settings of train_diffusion.py, which are these again after each test."""
    before = td.settings(vars(td))
    yield before
    vars(td).update(before)


@pytest.fixture
def tiny(tmp_path, trainer, text_file, picture_folder):
    """A config file for a tiny run of the trainer in tmp_path / "run"."""
    path, data = tmp_path / "tiny.py", text_file if trainer == "train_lm.py" else picture_folder
    path.write_text(f"{TINY[trainer]}out_dir = {str(tmp_path / 'run')!r}\ndataset = {str(data)!r}\n")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text_file):
    """The run of a tiny language model of characters, at its end."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = out.with_name("config.py")
    config.write_text(TINY["train_lm.py"] + "tokenizer = 'char'\nlearning_rate = 0.05\n")
    within("train_lm.py", config, f"--dataset={text_file}", f"--out_dir={out}")
    return out


def one_core():
    """Each test worker has a core of its own: threads that share one wait for each other for minutes."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


def prepare_child():
    one_core()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a suite in the background inherits as ignored


def start(*arguments, processes=1, cwd=ROOT, stderr=subprocess.PIPE, process_group=None, **env):
    """A real command, running; processes: by `accelerate launch`; process_group=0: in one of its own."""
    launch = "-m accelerate.commands.launch --quiet --multi_gpu --num_machines=1 --mixed_precision=no"
    launch += f" --dynamo_backend=no --main_process_port=0 --num_processes={processes}"
    if processes > 1:
        arguments, env = [*launch.split(), *arguments], env | {"ACCELERATE_USE_CPU": "true"}
    pipe = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True, "preexec_fn": prepare_child}
    command, env = [sys.executable, *map(str, arguments)], os.environ | env
    return subprocess.Popen(command, cwd=cwd, env=env, process_group=process_group, **pipe)


def run(*arguments, code=0, seconds=300, **options):
    """A real command, run to its end; -> its stdout and stderr."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def execute(script, arguments, out, err):
    """What a new process would do, in this one, which has made its imports already; -> the exit code."""
    AcceleratorState._reset_state(True)  # a process has one, a new one none
    os.chdir(ROOT)
    locks = []

    def make_lock(*args, make=filelock.FileLock, **kwargs):
        locks.append(make(*args, **kwargs))
        return locks[-1]

    argv = mock.patch.object(sys, "argv", [str(script), *map(str, arguments)])
    making = mock.patch.object(filelock, "FileLock", make_lock)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), argv, making:
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=err)
            return 1 if isinstance(end.code, str) else end.code or 0
        finally:
            for lock in locks:  # the end of a process releases them
                lock.release(force=True)
    return 0


def within(script, *arguments, code=0, stdin=""):
    """Run a command as run() does, but in this process, which saves the seconds of its imports."""
    out, err, where = io.StringIO(), io.StringIO(), os.getcwd()
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    trainers = {name: module for name, module in sys.modules.items() if name.startswith("train_")}
    try:
        with mock.patch.object(sys, "stdin", io.StringIO(stdin)):
            ended = execute(script, arguments, out, err)
    finally:
        os.chdir(where)
        sys.modules.update(trainers)  # sample.py imports its own
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert ended == code, f"exit code {ended}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def refusal(script, *arguments):
    """Return the one line by which a command refuses its arguments."""
    out, err = within(script, *arguments, code=2)
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in out + err, err
    return lines[0]


def forked(script, *arguments, code=0, more=(), **env):
    """Run a command in two forks of this process, the second with `more` arguments. Return what the first printed."""
    # as under the launcher, the meeting place outlives whichever process ends first
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "ACCELERATE_USE_CPU": "true"}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = []
    with tempfile.TemporaryFile("w+") as first, tempfile.TemporaryFile("w+") as second:
        for rank, file in enumerate((first, second)):
            children.append(os.fork())
            if children[-1]:
                continue
            ended = 99
            try:
                os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
                ended = execute(script, [*arguments, *(more * rank)], file, file)
            except BaseException:
                traceback.print_exc(file=file)
            finally:
                file.flush()
                os._exit(ended)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        texts = [file.seek(0) or file.read() for file in (first, second)]
    assert ended == [code, code], f"exit codes {ended}\n{texts[0]}\n{texts[1]}"
    return texts[0]


def in_parts(trainer, *arguments):
    """Run a command as forked() does, with FSDP2 as configs/accelerate/fsdp2.yaml has it."""
    config = yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    env = {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(value) for name, value in config.items()}
    return forked(ROOT / "tests/fsdp2.py", ROOT / trainer, *arguments, **env)


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = Path(path)

    def __reduce__(self):
        return Path.touch, (self.path,)


def contents(*folders):
    """Return {file: its content}, without the lock that a run takes."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name != "lock"}


def wait_for_step(out, step, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        found = (out / "metrics.jsonl").exists() and rows(out)
        if found and found[-1]["step"] >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} did not come: {process.communicate()}")


def rows(run_dir, *names):
    """metrics.jsonl without what depends on the clock; with names, only the rows that have them."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timing = ("time", "tokens_per_s", "images_per_s", "memory_gb")
    rows = [{k: v for k, v in row.items() if k not in timing} for row in rows]
    return [row for row in rows if not names or set(names) & row.keys()]


def last_state(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def differences(a, b, path=""):
    """Where two nested states differ, bit for bit; the times in them apart."""
    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - {"seconds", "metrics_bytes"}
        return [d for k in sorted(keys) for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


def lost(unbroken, out):
    """Return what differs, bit for bit, between an unbroken run and another: state, metrics, weights, samples."""
    found = differences(last_state(unbroken), last_state(out))
    found += ["metrics.jsonl"] * (rows(unbroken) != rows(out))
    load = {".safetensors": load_file, ".png": Path.read_bytes, ".txt": Path.read_bytes}
    for path in unbroken.rglob("*"):
        other, read = out / path.relative_to(unbroken), load.get(path.suffix, lambda path: None)
        if not other.exists() or differences(read(path), read(other)):
            found.append(path.name)
    return found


def read_grid(path, size, n):
    """The pictures in a grid: rows of ceil(sqrt(n)), no padding."""
    grid, columns = np.asarray(Image.open(path)), int(np.ceil(np.sqrt(n)))
    assert grid.shape[:2] == (int(np.ceil(n / columns)) * size, columns * size)
    places = [divmod(i, columns) for i in range(n)]
    return [grid[r * size : (r + 1) * size, c * size : (c + 1) * size] for r, c in places]
