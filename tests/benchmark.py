"""
Measures the figures of the README: ours and others', in turn on the same machine, on the same data. Prints medians
and ratios as Markdown tables.

    python tests/benchmark.py --parts=lm,equal --text=input.txt --nanogpt=PATH [--pairs=3]

A peer is a checkout that lies anywhere; what it needs must be installed. The parts:

  lm     nanoGPT's own command for laptops, and configs/shakespeare_char_cpu.py as it is and with few steps
  equal  nanoGPT's shape, batch and AdamW in both: tokens/s
  old    the default runs of another checkout and of this one: seconds to the first step, tokens/s, images/s
  lora   LoRA at the true shape of Stable Diffusion 1.5 in our loop and in that of diffusers' script
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from configurator import configure

parts = "lm,equal,lora"  # with commas between them
pairs = 3  # how often each side is run
text = ""  # tinyshakespeare's input.txt
nanogpt = ""  # a checkout
old = ""  # a checkout of this project


def run(*command, cwd=ROOT, until=None, **env):
    """-> (seconds, what it printed); `until`: the pattern in a line that ends the clock."""
    began, output, seconds = time.monotonic(), "", None
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, cwd=cwd, env=os.environ | env, **pipe)
    for line in process.stdout:
        output += line
        if until and not seconds and re.search(until, line):
            seconds = time.monotonic() - began
    if process.wait():
        raise SystemExit(f"{' '.join(command)}\n{output[-4000:]}")
    return seconds or time.monotonic() - began, output


def read_metrics(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def ours(out, arguments, root=ROOT, **options):
    """A trainer and its arguments -> (seconds, rows of metrics.jsonl)"""
    command = [*arguments.split(), f"--out_dir={out}", "--overwrite=True"]  # a config has its own
    return run(*command, cwd=root, **options)[0], read_metrics(out)


def speed(out, arguments, name):
    """A trainer and its arguments -> [the median of a column of metrics.jsonl after the first steps]"""
    values = [row[name] for row in ours(out, arguments)[1] if name in row]
    return [statistics.median(values[len(values) // 4 :])]


def compare(title, columns, sides):
    """Run the sides {name: function} in turn; each returns a number a column. Ratios are to the first."""
    table = np.array([[side() for side in sides.values()] for _ in range(pairs)])  # (pairs, sides, columns)
    medians, ratios = np.median(table, axis=0), np.median(table / table[:, :1], axis=0)
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for name, *row in zip(sides, medians, ratios):
        cells = [f"{value:,.4g} (x {ratio:.3g})" for value, ratio in zip(*row)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


NANOGPT = """train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
    --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
    --lr_decay_iters=2000 --dropout=0.0"""  # all of it from nanoGPT's README
OURS = "-m accelerate.commands.launch --quiet train_lm.py configs/shakespeare_char_cpu.py --dataset="
# in these steps ours comes to nanoGPT's last loss: small batches and large steps are best for so few
EARLY = " --max_steps=180 --eval_interval=180 --eval_batches=40 --batch_size=8 --block_size=128"
EARLY += " --warmup_steps=5 --learning_rate=0.05 --head_lr=0.01"


def run_nanogpt(folder, *more):
    """nanoGPT's own command -> (seconds, ms of each step, {step: estimate of the validation loss})"""
    data = Path(nanogpt, "data/shakespeare_char")
    (data / "input.txt").write_bytes(Path(text).read_bytes())
    run("prepare.py", cwd=data)
    seconds, output = run(*NANOGPT.split(), f"--out_dir={folder}/nanogpt", *more, cwd=nanogpt)
    times = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", output)]
    losses = re.findall(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", output)
    return seconds, times, {int(step): float(loss) for step, loss in losses}


def lm(folder):
    def theirs():
        seconds, _, losses = run_nanogpt(folder)
        return seconds, list(losses.values())[-1]

    def mine(more, until=None):
        seconds, rows = ours(folder / "lm", OURS + text + more, until=until)
        return seconds, [row["val/loss"] for row in rows if "val/loss" in row][-1]

    mine(" --max_steps=1 --eval_batches=1")  # our tokens are ready as well
    sides = {"nanoGPT": theirs, "ours": partial(mine, "")}
    # the early one until its loss is known: what follows is not counted
    sides["ours, early"] = partial(mine, EARLY, r"step (\d+)/\1 val/loss")
    compare("Shakespeare by characters, whole commands", ["s", "validation loss"], sides)


def equal(folder):
    shape = f"train_lm.py --dataset={text} --tokenizer=char --block_size=64 --batch_size=12 --n_layer=4"
    shape += " --n_head=4 --n_kv_head=4 --n_embd=128 --optimizer=adamw --max_steps=400 --eval_interval=400"

    def theirs():
        _, times, _ = run_nanogpt(folder, "--max_iters=400", "--eval_interval=400")
        return [12 * 64 / statistics.median(times[20:]) * 1e3]

    mine = partial(speed, folder / "equal", name="tokens_per_s")
    sides = {"nanoGPT": theirs, "ours": partial(mine, shape)}
    sides["ours, fp32"] = partial(mine, f"{shape} --mixed_precision=no")
    compare("nanoGPT's shape for laptops, batch and AdamW in both", ["tokens/s"], sides)


def old_and_new(folder):
    def side(root, command):
        how = f"{command} --max_steps=100 --log_interval=1 --eval_interval=1000 --save_interval=1000"
        seconds, rows = ours(folder / "side", how, root, until="step 1/100 train")
        column = "tokens_per_s" if "train_lm" in command else "images_per_s"
        return seconds, statistics.median(row[column] for row in rows[25:] if column in row)

    for command in ("train_lm.py", "train_diffusion.py"):
        sides = {"old": partial(side, old, command), "new": partial(side, ROOT, command)}
        compare(command, ["s to the first step", "tokens/s or images/s"], sides)


def lora(folder):
    from gpu.run import lora_command, lora_loop

    base, how = lora_command(folder, "sd15", 256, 4, False, 8)
    step = lora_loop(base, 256, 4, False)
    step()

    def theirs():
        began = time.monotonic()
        for _ in range(3):
            step()
        return [3 * 4 / (time.monotonic() - began)]

    mine = partial(speed, folder / "lora", how, "images_per_s")
    sides = {"the loop of diffusers' script": theirs, "ours": mine}
    compare("LoRA at the shape of SD 1.5, 256 x 256, bf16", ["images/s"], sides)


def main():
    functions = {"lm": lm, "equal": equal, "old": old_and_new, "lora": lora}
    for name in parts.split(","):
        with tempfile.TemporaryDirectory() as folder:
            functions[name](Path(folder))


if __name__ == "__main__":
    configure(globals())
    main()
