"""
Measures the figures of the README: others' and ours, in turn on the same machine, on the same data. Prints medians
and ratios as Markdown tables.

    python tests/benchmark.py --parts=characters,equal --text=input.txt --nanogpt=PATH [--pairs=3] [--plot=FILE.png]

A peer is a checkout that lies anywhere; what it needs must be installed (--plot= needs matplotlib). The parts:

  characters  nanoGPT's own command for laptops, and configs/shakespeare_char_cpu.py as it is and with few steps
  equal       nanoGPT's shape, batch and AdamW in both: tokens/s
  old         the default runs of another checkout and of this one: seconds to the first step, tokens/s, images/s
  python      the default language models of both, on source code that they have not seen: bits per byte
  glyphs      the default image models of both: seconds, and how many samples show the class that they should
  lora        LoRA at the true shape of Stable Diffusion 1.5 in our loop and in that of diffusers' script
  sampling    sample.py, and generate() of transformers in fp32, with the run in --model=: tokens/s
"""

import importlib.util
import json
import math
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
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from configurator import configure

parts = "characters,equal,lora"  # with commas between them
pairs = 3  # how often each side is run
text = ""  # tinyshakespeare's input.txt
nanogpt = ""  # a checkout of nanoGPT
old = ""  # a checkout of this project
code = "pip"  # the installed package whose source is scored by the part python
model = "out/lm"  # for the part sampling: a run of train_lm.py
plot = ""  # for the part characters: a file for the losses over time


def execute(*command, cwd=ROOT, until=None, **env):
    """Run a Python command. Return (seconds, [(seconds, line) of its output]).

    until: a pattern. The first line that matches it stops the clock.
    """
    began = time.monotonic()
    command = [sys.executable, "-u", *map(str, command)]
    process = subprocess.Popen(
        command, cwd=cwd, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    seconds = None
    for line in process.stdout:
        now = time.monotonic() - began
        lines.append((now, line))
        if until and seconds is None and re.search(until, line):
            seconds = now
    if process.wait() != 0:
        output = "".join(line for _, line in lines)
        raise SystemExit(f"{' '.join(command)}\n{output[-4000:]}")
    return seconds or time.monotonic() - began, lines


def run(*command, **options):
    """Run a Python command. Return (seconds, its output)."""
    seconds, lines = execute(*command, **options)
    return seconds, "".join(line for _, line in lines)


def read_metrics(out):
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def train(out, arguments, root=ROOT, **options):
    """Run a trainer. Return (seconds, rows of metrics.jsonl)."""
    # The folder comes last, because a config has its own.
    command = [*arguments.split(), f"--out_dir={out}", "--overwrite=True"]
    seconds, _ = execute(*command, cwd=root, **options)
    return seconds, read_metrics(out)


def speed(out, arguments, name):
    """Run a trainer. Return [the median of a column of metrics.jsonl after the first quarter]."""
    _, rows = train(out, arguments)
    values = [row[name] for row in rows if name in row]
    return [statistics.median(values[len(values) // 4 :])]


def compare(title, columns, sides):
    """Run the sides, {name: function}, in turn, and print a table. Each function returns a number per column.

    Ratios are to the first side, pair by pair.
    """
    table = np.array([[side() for side in sides.values()] for _ in range(pairs)])  # (pairs, sides, columns)
    medians = np.median(table, axis=0)
    ratios = np.median(table / table[:, :1], axis=0)
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for name, *row in zip(sides, medians, ratios):
        cells = [f"{value:,.4g} (x {ratio:.3g})" for value, ratio in zip(*row)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


# ---- Beside nanoGPT ----

# All of it is from nanoGPT's README.
NANOGPT = """train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
    --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
    --lr_decay_iters=2000 --dropout=0.0"""
OURS = "-m accelerate.commands.launch --quiet train_lm.py configs/shakespeare_char_cpu.py --dataset="
# With these settings, ours reaches nanoGPT's last loss. Small batches and high rates are best for so few steps.
EARLY = """ --max_steps=180 --eval_interval=180 --eval_batches=40 --batch_size=8 --block_size=128
    --warmup_steps=5 --learning_rate=0.05 --head_lr=0.01"""


def run_nanogpt(folder, *more):
    """Run nanoGPT's own command. Return (seconds, ms of each step, [(seconds, validation loss)])."""
    data = Path(nanogpt, "data/shakespeare_char")
    (data / "input.txt").write_bytes(Path(text).read_bytes())
    execute("prepare.py", cwd=data)
    seconds, lines = execute(*NANOGPT.split(), f"--out_dir={folder}/nanogpt", *more, cwd=nanogpt)
    times = []
    losses = []
    for second, line in lines:
        if found := re.search(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", line):
            times.append(float(found[1]))
        if found := re.search(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
            losses.append((second, float(found[1])))
    return seconds, times, losses


def characters(folder):
    def theirs():
        seconds, _, losses = run_nanogpt(folder)
        return seconds, losses[-1][1]

    def mine(more, until=None):
        seconds, rows = train(folder / "lm", OURS + text + more, until=until)
        return seconds, [row["val/loss"] for row in rows if "val/loss" in row][-1]

    mine(" --max_steps=1 --eval_batches=1")  # now our tokens are in the cache, as nanoGPT's are
    sides = {"nanoGPT": theirs, "ours": partial(mine, "")}
    # Stop the clock of the early run when its loss is known.
    sides["ours, early"] = partial(mine, EARLY, r"step (\d+)/\1 val/loss")
    compare("Shakespeare by characters, whole commands", ["s", "validation loss"], sides)
    if plot:
        plot_losses(folder)


def plot_losses(folder):
    """Run nanoGPT's command and ours with more evaluations, and draw their validation losses over time."""
    import matplotlib.pyplot as plt

    _, _, theirs = run_nanogpt(folder, "--eval_interval=200")
    more = " --eval_interval=103 --eval_batches=20"
    _, lines = execute(*f"{OURS}{text}{more} --out_dir={folder}/plot".split())
    ours = []
    for second, line in lines:
        if found := re.search(r"val/loss ([\d.]+)", line):
            ours.append((second, float(found[1])))
    plt.figure(figsize=(7, 3.5))
    plt.plot(*zip(*theirs), "o-", color="tab:gray", label="nanoGPT's command for laptops")
    plt.plot(*zip(*ours), "o-", color="tab:blue", label="configs/shakespeare_char_cpu.py")
    plt.xlabel("seconds since the command, on two CPU cores")
    plt.ylabel("validation loss")
    plt.ylim(1.4, 2.6)
    plt.grid(alpha=0.3)
    plt.legend(frameon=False)
    plt.tight_layout()
    plt.savefig(plot, dpi=110)


def equal(folder):
    shape = f"""train_lm.py --dataset={text} --tokenizer=char --block_size=64 --batch_size=12 --n_layer=4
        --n_head=4 --n_kv_head=4 --n_embd=128 --optimizer=adamw --max_steps=400 --eval_interval=400"""

    def theirs():
        _, times, _ = run_nanogpt(folder, "--max_iters=400", "--eval_interval=400")
        return [12 * 64 / statistics.median(times[20:]) * 1e3]

    mine = partial(speed, folder / "equal", name="tokens_per_s")
    sides = {"nanoGPT": theirs, "ours": partial(mine, shape)}
    sides["ours, fp32"] = partial(mine, f"{shape} --mixed_precision=no")
    compare("nanoGPT's shape for laptops, batch and AdamW in both", ["tokens/s"], sides)


# ---- Beside an older version of this project ----


def old_and_new(folder):
    def side(root, command):
        how = f"{command} --max_steps=100 --log_interval=1 --eval_interval=1000 --save_interval=1000"
        seconds, rows = train(folder / "side", how, root, until="step 1/100 train")
        column = "tokens_per_s" if "train_lm" in command else "images_per_s"
        return seconds, statistics.median(row[column] for row in rows[25:] if column in row)

    for command in ("train_lm.py", "train_diffusion.py"):
        sides = {"old": partial(side, old, command), "new": partial(side, ROOT, command)}
        compare(command, ["s to the first step", "tokens/s or images/s"], sides)


def score(out):
    """Return the bits per byte of a model, as transformers computes it, on the source of the package `code`.

    Windows of 256 tokens overlap by half. Only their second halves count, so each token has a lead-in.
    """
    import transformers

    tok = transformers.AutoTokenizer.from_pretrained(out)
    lm = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    package = Path(importlib.util.find_spec(code).origin).parent
    files = sorted(package.rglob("*.py"))
    np.random.default_rng(0).shuffle(files)
    texts = [path.read_text(encoding="utf-8") for path in files]
    source = tok.eos_token.join(texts)[:600_000]
    ids = torch.tensor(tok(source)["input_ids"])
    bits = 0.0
    n_bytes = 0
    for batch in ids.unfold(0, 257, 128).split(16):
        with torch.no_grad():
            logits = lm(batch[:, :-1]).logits[:, 128:]
        targets = batch[:, 129:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        bits += loss.item() / math.log(2)
        n_bytes += sum(len(text.encode()) for text in tok.batch_decode(targets, skip_special_tokens=True))
    return bits / n_bytes


def python(folder):
    def side(root, seeds):
        seconds, _ = train(folder / "side", f"train_lm.py --seed={next(seeds)}", root)
        return seconds, score(folder / "side")

    sides = {"old": partial(side, old, iter(range(pairs))), "new": partial(side, ROOT, iter(range(pairs)))}
    compare(f"The default run, scored on {code}", ["s", "bits per byte"], sides)


def glyphs(folder):
    from test_glyphs import read_run

    def side(root):
        seconds, _ = train(folder / "side", "train_diffusion.py", root)
        return [seconds]

    compare("The default run on glyphs", ["s"], {"old": partial(side, old), "new": partial(side, ROOT)})
    print(f"A classifier reads {read_run(folder / 'side'):.1%} of the new run's samples as their class.")


# ---- Beside diffusers and transformers ----


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


def sampling(folder):
    import transformers

    import sample

    sample.out_dir = model
    sample.load_run()
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt = sample.tok("def ")["input_ids"]
    n = 200

    def theirs():
        began = time.monotonic()
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": True}
        reference.generate(torch.tensor([prompt]), **options)
        return [n / (time.monotonic() - began)]

    def mine():
        began = time.monotonic()
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
        tokens = sample.generate_tokens(prompt, 1, max_new_tokens=n, **settings)
        count = len(list(tokens))
        return [count / (time.monotonic() - began)]

    theirs()
    mine()
    compare(f"Sampling from {model}", ["tokens/s"], {"transformers": theirs, "sample.py": mine})


def main():
    functions = {
        function.__name__: function for function in (characters, equal, python, glyphs, lora, sampling)
    }
    functions["old"] = old_and_new
    for name in parts.split(","):
        with tempfile.TemporaryDirectory() as folder:
            functions[name](Path(folder))


if __name__ == "__main__":
    configure(globals())
    main()
