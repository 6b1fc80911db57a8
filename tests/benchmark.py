"""
Ours and others', in turn on the same machine, on the same data; prints medians and ratios as Markdown tables.

    python tests/benchmark.py --parts=lm,equal --text=input.txt --nanogpt=PATH [--pairs=3]
    python tests/benchmark.py --parts=pictures --cifar10=FOLDER --diffusers=PATH --smalldiffusion=PATH

A peer is a checkout that lies anywhere; what it needs must be installed. Without --parts, all whose paths are
given:

  start     seconds from `accelerate launch`, without any cache, to the first step
  lm        nanoGPT's own command for laptops, and configs/shakespeare_char_cpu.py as it is and with few steps
  equal     nanoGPT's shape, batch and AdamW in both: tokens/s
  sampling  our generate(), as sample.py runs it, and that of transformers, from the same run directory
  old       another checkout of this project and this one: seconds to the first step, tokens/s, images/s
  bpb       bits per byte of runs on the Python files of an installed package, by transformers
  lora      LoRA at the true shape of Stable Diffusion 1.5 in our loop and in that of diffusers' script
  pictures  Fréchet distances on CIFAR-10 after as many minutes: of our DiT, with classes and without, of
            diffusers' example, of smalldiffusion's DiT; all have about 1.9 M parameters
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
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from configurator import configure

parts = ""  # with commas between them; "": all whose paths are given
pairs = 3  # how often each side is run
minutes = 5.0  # of training on CIFAR-10
text = ""  # tinyshakespeare's input.txt
cifar10 = ""  # a folder with the parquet files of its train and test splits, pictures in a column `image`
nanogpt = ""  # a checkout, as are the next two
diffusers = ""
smalldiffusion = ""
old = ""  # a checkout of this project
runs = ""  # run directories, with commas between them
package = "numpy"  # whose source is read for bits per byte


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


# ---- Language models ----
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


def start(folder):
    def first_step(trainer):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            command = f"-m accelerate.commands.launch --quiet {trainer} --out_dir={cache}/run --max_steps=1"
            return run(*command.split(), "--log_interval=1", until="step 1/1 train", HF_HOME=cache)[0]

    names = ("train_lm.py", "train_diffusion.py")
    sides = {"ours": lambda: [first_step(name) for name in names]}
    compare("From the launch, without caches, to the first step, s", names, sides)


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
    fp32 = partial(mine, f"{shape} --mixed_precision=no")
    sides = {"nanoGPT": theirs, "ours": partial(mine, shape), "ours, fp32": fp32}
    compare("nanoGPT's shape for laptops, batch and AdamW in both", ["tokens/s"], sides)


def last_clock(bar, output):
    """-> the seconds that a progress bar says at its end, as 1:02:03"""
    clock = re.findall(rf"{bar}[^\[\n\r]*\[([\d:]+)<", output)[-1]
    return sum(60**i * int(part) for i, part in enumerate(reversed(clock.split(":"))))


def per_second(n_tokens, generate):
    began = time.monotonic()
    list(generate())
    return [n_tokens / (time.monotonic() - began)]


def sampling(folder):
    from transformers import AutoModelForCausalLM

    import sample

    middle = " --n_layer=8 --n_embd=512 --n_head=8 --tokenizer=bpe:8192"
    large = " --n_layer=12 --n_embd=768 --n_head=12 --tokenizer=bpe:8192"
    for size, shape, n in ("1 M", "", 100), ("34 M", middle, 60), ("98 M", large, 30):
        ours(folder, f"train_lm.py --max_steps=2 --eval_batches=1 --test_fraction=0 --optimizer=adamw{shape}")
        sample.out_dir = str(folder)
        sample.load_run()
        trainer, model = sample.trainer, sample.model
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype)
        kwargs = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": True, "temperature": 0.8, "top_k": 0}
        for batch in (1, 8):
            ids = torch.randint(model.config.vocab_size, (1, 16)).repeat(batch, 1)
            theirs = partial(other.generate, ids, attention_mask=torch.ones_like(ids), **kwargs)
            generate = torch.inference_mode()(trainer.generate)
            model.generation_config.eos_token_id = None  # as min_new_tokens: no text ends early
            vocab_size = model.config.vocab_size
            mine = partial(generate, model, ids[0].tolist(), batch, n, vocab_size, temperature=0.8)
            sides = {"transformers' generate()": theirs, "ours": mine}
            sides = {name: partial(per_second, batch * n, side) for name, side in sides.items()}
            compare(f"Sampling, {size} parameters, {batch} at once", ["tokens/s"], sides)


@torch.inference_mode()
def bpb(folder):
    """In windows of the model's context: the first half is a lead-in, the second half is scored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"))
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)[: 10**6]
    print(f"\nBits per byte of {package}\n\n| | |\n| --- | ---: |")
    for name in runs.split(","):
        model, tok = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
        encoded = tok(source, add_special_tokens=False, return_offsets_mapping=True)
        ids, half = torch.tensor(encoded["input_ids"]), model.config.max_position_embeddings // 2
        nats, windows = 0.0, ids.unfold(0, 2 * half, half)  # (n, 2 * half)
        for some in windows.split(16):
            logits = model(some).logits[:, half - 1 : -1].flatten(0, 1).float()
            nats += float(F.cross_entropy(logits, some[:, half:].flatten(), reduction="sum"))
        starts = [begin for begin, _ in encoded["offset_mapping"]] + [len(source)]
        scored = source[starts[half] : starts[half * (len(windows) + 1)]]
        print(f"| {name} | {nats / math.log(2) / len(scored.encode()):.4f} |", flush=True)


def old_and_new(folder):
    def side(root, command):
        how = f"{command} --max_steps=100 --log_interval=1 --eval_interval=1000 --save_interval=1000"
        seconds, rows = ours(folder / "side", how, root, until="step 1/100 train")
        column = "tokens_per_s" if "train_lm" in command else "images_per_s"
        return seconds, statistics.median(row[column] for row in rows[25:] if column in row)

    mine = [OURS + text] * bool(text) + [DIT + cifar10] * bool(cifar10)
    for command in ("train_lm.py", "train_diffusion.py", *mine):
        sides = {"old": partial(side, old, command), "new": partial(side, ROOT, command)}
        compare(command, ["s to the first step", "tokens/s or images/s"], sides)


# ---- Diffusion ----
DIT = "train_diffusion.py configs/cifar10_cpu.py --image_column=image --dataset="


def lora(folder):
    from gpu.run import lora_command, lora_loop

    base, how = lora_command(folder, "sd15", 256, 4, False, 8)
    step = lora_loop(base, 256, 4, False)
    step()
    theirs = partial(per_second, 12, lambda: (step() for _ in range(3)))
    sides = {"the loop of diffusers' script": theirs}
    sides["ours"] = partial(speed, folder / "lora", how, "images_per_s")
    compare("LoRA at the shape of SD 1.5, 256 x 256, bf16", ["images/s"], sides)


def load_cifar(split):
    """-> a Dataset with the columns image and label"""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=f"{cifar10}/{split}*.parquet", split="train")
    return rows.rename_columns({"img": "image"} if "img" in rows.column_names else {})


def to_tensor(images):
    """-> (N, 3, 32, 32) in [-1, 1]"""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def train_classifier(x, y):
    """-> the 128 features of a small convolutional network, in which pictures are compared, as a function"""
    torch.manual_seed(0)
    layers = []
    for a, b in (3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128):
        layers += [nn.MaxPool2d(2)] * (3 < a < b)  # where it gets wider
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = 3 * len(x) // 128
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * min((step + 1) / 200, (steps - step) / steps)
        ids = torch.randint(len(x), (128,))
        F.cross_entropy(net(x[ids].flip(-1) if step % 2 else x[ids]), y[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()
    body = net[:-1].eval().requires_grad_(False)
    return lambda x: torch.cat([body(part) for part in x.float().split(500)]).double().numpy()


def diffusers_example(folder, n, epochs):
    """A UNet of 1.9 M parameters learns n pictures -> (its pipeline, seconds of the last epoch, of all)"""
    from diffusers import DDIMPipeline, UNet2DModel

    down, up = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    shape = {"down_block_types": down, "up_block_types": up, "block_out_channels": (40, 80, 80)}
    shape |= {"sample_size": 32, "layers_per_block": 1, "norm_num_groups": 8}
    UNet2DModel(**shape).save_pretrained(folder / "unet")
    (folder / f"{n}").mkdir(exist_ok=True)
    load_cifar("train").shuffle(seed=0).select(range(n)).to_parquet(folder / f"{n}/train.parquet")
    how = f"""{diffusers}/examples/unconditional_image_generation/train_unconditional.py
        --dataset_name={folder}/{n} --model_config_name_or_path={folder}/unet --output_dir={folder}/theirs
        --resolution=32 --center_crop --random_flip --use_ema --train_batch_size=64 --num_epochs={epochs}
        --lr_warmup_steps=50 --eval_batch_size=1 --ddpm_num_inference_steps=2 --overwrite_output_dir
        --save_images_epochs={epochs} --save_model_epochs={epochs} --checkpointing_steps=1000000"""
    seconds, output = run(*how.split())
    return DDIMPipeline.from_pretrained(folder / "theirs"), last_clock(r"Epoch \d+: 100%", output), seconds


def train_smalldiffusion(x, seconds):
    """Its DiT learns the pictures x -> 500 of its own (N, 3, 32, 32)"""
    sys.path.insert(0, f"{smalldiffusion}/src")
    from accelerate import Accelerator
    from smalldiffusion import DiT, ScheduleDDPM, samples, training_loop
    from torch_ema import ExponentialMovingAverage

    end, kwargs = time.monotonic() + seconds, {"accelerator": Accelerator(cpu=True)}
    schedule = ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
    model = DiT(in_dim=32, channels=3, patch_size=4, depth=6, head_dim=32, num_heads=4, mlp_ratio=4.0)
    ema = ExponentialMovingAverage(model.parameters(), decay=0.99)
    loader = torch.utils.data.DataLoader(torch.cat((x, x.flip(-1))), batch_size=64, shuffle=True)
    for _ in training_loop(loader, model, schedule, epochs=1000, lr=1e-3, **kwargs):
        ema.update()
        if time.monotonic() > end:
            break
    sigmas, kwargs = schedule.sample_sigmas(20), kwargs | {"gam": 1.6, "batchsize": 100}
    with ema.average_parameters():
        return torch.cat([list(samples(model, sigmas, **kwargs))[-1] for _ in range(5)]).clamp(-1, 1)


def frechet_distance(a, b):
    """Of Gaussians fitted to two sets of features (N, D) and (M, D): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
    (Heusel et al. 2017, arXiv:1706.08500). The trace of the root is the sum of the roots of the eigenvalues."""
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(min=0))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c1) + np.trace(c2) - 2 * roots.sum())


def pictures(folder):
    import train_diffusion

    n, budget, train = 500, 60 * minutes, load_cifar("train")
    x = to_tensor(train["image"])
    features = train_classifier(x, torch.tensor(train["label"]))
    real = features(to_tensor(load_cifar("test")["image"]))
    print(f"\nCIFAR-10, {n} pictures against the test split\n\n| | Fréchet distance | minutes |")
    print("| --- | ---: | ---: |")

    def judge(name, x, seconds=0.0):
        distance = frechet_distance(real, features(x))
        print(f"| {name} | {distance:.2f} | {seconds / 60:.1f} |", flush=True)

    judge("pictures of the train split", to_tensor(train.shuffle(seed=0)[:n]["image"]))
    if diffusers:  # an epoch of as many pictures as it gets through in the given time
        _, epoch, whole = diffusers_example(folder, 1024, 2)
        many = min(len(train), int((budget - (whole - 2 * epoch)) * 1024 / epoch))
        pipe, _, seconds = diffusers_example(folder, many, 1)
        drawn = [image for _ in range(n // 100) for image in pipe(100).images]
        judge(f"diffusers' example, {many:,} pictures, 50 DDIM steps", to_tensor(drawn), seconds)
    if smalldiffusion:
        judge("smalldiffusion's DiT, its 20 steps", train_smalldiffusion(x, budget), budget)
    # a short run tells our speed, the next take the given time
    out, how = folder / "ours", f"{DIT}{cifar10} --test_fraction=0"
    seconds, rows = ours(out, f"{how} --max_steps=60 --eval_interval=60")
    per_step = 64 / statistics.median(row["images_per_s"] for row in rows if "images_per_s" in row)
    steps = max(60, int(0.95 * (budget - (seconds - 60 * per_step)) / per_step))
    how += f" --max_steps={steps} --eval_interval={steps} --save_interval={steps}"
    for name, more, guidance in ("with classes", "", 2.0), ("without classes", " --label_column=", 1.0):
        seconds, _ = ours(out, how + more)
        model = train_diffusion.load(out, json.loads((out / "run.json").read_text()))
        chosen = [*(model.class_names or [""])] * n
        drawn = train_diffusion.draw(model, chosen[:n], range(n), steps=25, guidance=guidance)
        judge(f"ours {name}, {steps * 64:,} pictures, 25 steps", to_tensor(drawn), seconds)


PARTS = {"start": start, "lm": lm, "equal": equal, "sampling": sampling, "bpb": bpb}
PARTS |= {"old": old_and_new, "lora": lora, "pictures": pictures}
NEEDS = {"lm": "text nanogpt", "equal": "text nanogpt", "bpb": "runs"}
NEEDS |= {"old": "old", "pictures": "cifar10"}


def main():
    for name in parts.split(",") if parts else PARTS:
        if all(globals()[path] for path in NEEDS.get(name, "").split()):
            with tempfile.TemporaryDirectory() as folder:
                PARTS[name](Path(folder))


if __name__ == "__main__":
    configure(globals())
    main()
