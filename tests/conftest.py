"""What the tests share: they run the real commands, on a CPU, offline, on tiny data that they make themselves."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", CUDA_VISIBLE_DEVICES="")

# Models and runs so small that a step takes some milliseconds.
TINY_MODEL = {
    "train_lm.py": """
tokenizer = "bytes"
block_size = 32
n_head = 4
n_kv_head = 2
eval_batches = 4
""",
    "train_diffusion.py": """
image_size = 8
n_head = 2
sample_steps = 2
sampler = "euler"
eval_batches = 2
""",
}
TINY = """
n_layer = 2
n_embd = 32
batch_size = 8
max_steps = 40
warmup_steps = 5
weight_decay = 0.1
eval_interval = 10
log_interval = 5
save_interval = 10
mixed_precision = "no"
"""


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """A cache folder of our own, the same for all tests."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("home"))
    import torch

    torch.set_num_threads(1)  # as one_core() below says
    os.environ.pop("HF_DATASETS_CACHE", None)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:60000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """120 pictures of 8 x 8 in three classes: red, green and blue, each with a bright half and some noise."""
    import numpy as np
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(120):
        name, pixels = ("red", "green", "blue")[i % 3], rng.integers(0, 60, (8, 8, 3))
        pixels[:, : 4 + i % 2, i % 3] = 220
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03}.png")
    return folder


@pytest.fixture
def trainer():
    return "train_lm.py"


@pytest.fixture
def tiny(tmp_path, trainer, text_file, picture_folder):
    """A config file for a tiny run of the trainer in tmp_path / "run"."""
    path, data = tmp_path / "tiny.py", text_file if trainer == "train_lm.py" else picture_folder
    where = f"out_dir = {str(tmp_path / 'run')!r}\ndataset = {str(data)!r}\n"
    path.write_text(TINY_MODEL[trainer] + TINY + where)
    return path


def command(*arguments, processes=1):
    if processes == 1:
        return [sys.executable, *map(str, arguments)]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--multi_gpu",
        "--num_machines",
        "1",
    ]
    launch += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launch, "--main_process_port", "0", *map(str, arguments)]


def one_core():
    """Each test worker has a core of its own: threads that wait for each other on a shared one take minutes."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


def start(*arguments, processes=1, cwd=ROOT, **env):
    """A real command, running."""
    env = os.environ | ({"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}) | env
    env = {name: value for name, value in env.items() if value is not None}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": one_core}
    return subprocess.Popen(command(*arguments, processes=processes), cwd=cwd, env=env, **pipe)


def run(*arguments, code=0, seconds=300, **options):
    """A real command, run to its end; -> its stdout and stderr."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def rows(run_dir, *names):
    """metrics.jsonl without what depends on the clock; with names, only the rows that have them."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timing = ("time", "tokens_per_s", "images_per_s", "memory")
    rows = [{k: v for k, v in row.items() if k not in timing} for row in rows]
    return [row for row in rows if not names or set(names) & row.keys()]


def last_state(run_dir):
    import torch

    newest = max((run_dir / "checkpoints").glob("step_*"))
    return torch.load(newest / "state.pt", weights_only=True)


def differences(a, b, path=""):
    """Where two nested states differ, bit for bit; the times in them apart."""
    import torch

    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - {"seconds", "metrics_bytes", "tracker_id"}
        return [d for k in sorted(keys) for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


def read_grid(path, size, n):
    """The pictures in a grid: rows of ceil(sqrt(n)), no padding."""
    import numpy as np
    from PIL import Image

    grid, columns = np.asarray(Image.open(path)), int(np.ceil(np.sqrt(n)))
    assert grid.shape[:2] == (int(np.ceil(n / columns)) * size, columns * size)
    places = [divmod(i, columns) for i in range(n)]
    return [grid[r * size : (r + 1) * size, c * size : (c + 1) * size] for r, c in places]
