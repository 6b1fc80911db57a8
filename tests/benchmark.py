"""
Ours and others', in turn on the same machine, on the same data; prints medians and ratios as Markdown tables.

    python tests/benchmark.py --text=input.txt --nanogpt=PATH --cifar10=FOLDER --diffusers=PATH --smalldiffusion=PATH
        [--transformers=PATH] [--parts=lm,equal] [--pairs=3] [--minutes=5]

A peer is a checkout that lies anywhere; what it needs must be installed. text: tinyshakespeare; cifar10: a folder with
the parquet files of its train and test splits. transformers: its examples/ are run with what is installed; where there
is a src/ as well, it is the peer in sampling. The parts, each run where its peers are given:

  start     seconds of --help, and from `accelerate launch train_lm.py` without any cache to its first step
  lm        nanoGPT's own command for laptops, next to configs/shakespeare_char_cpu.py as it is, and with few steps
  equal     nanoGPT's shape, batch and AdamW in both: tokens/s, peak memory
  finetune  the same Llama, whole, in our loop and in transformers' example without a Trainer: tokens/s, peak memory
  sampling  tokens/s of our generate() and of transformers', from the same weights
  unet      the same UNet2DModel in our loop and in diffusers' unconditional example: images/s, peak memory
  pictures  from scratch, on CIFAR-10, as many minutes for all: Fréchet distances of our DiT, with and without classes,
            of diffusers' example and of smalldiffusion's DiT; all have about 1.9 M parameters

The kernel's count of the most memory that a process had is its peak memory. A GPU has parts of its own: gpu/run.py.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
LAPTOP = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
LAPTOP += (
    " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"  # of nanoGPT's README
)
# in these steps ours comes to nanoGPT's last loss: small batches and large steps are best for so few
EARLY = (
    "--max_steps=180 --eval_interval=180 --eval_batches=40 --batch_size=8 --block_size=128 --warmup_steps=5"
)
EARLY += " --learning_rate=0.05 --head_lr=0.01"
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
# a wheel of torchvision that was built for CUDA runs beside a CPU torch, once these operators have been declared
DECLARE = """
import runpy, sys, torch
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run(*command, cwd=ROOT, until=None, **env):
    """-> (seconds, what it printed, GB of memory at its peak); `until`: the pattern in a line that ends the clock."""
    began, text, seconds = time.monotonic(), "", None
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(list(map(str, command)), cwd=cwd, env=os.environ | env, **options)
    for line in process.stdout:
        text += line
        if until and seconds is None and re.search(until, line):
            seconds = time.monotonic() - began
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}\n{text[-4000:]}")
    return seconds or time.monotonic() - began, text, usage.ru_maxrss / 1e6


def seconds_of(clock):
    """What a bar says, as 1:02:03 -> seconds"""
    return sum(60**i * int(part) for i, part in enumerate(reversed(clock.split(":"))))


def ours(out, *arguments, trainer="train_lm.py"):
    """A whole command -> (seconds, rows of metrics.jsonl, GB of memory at its peak)"""
    last = [f"--out_dir={out}", "--overwrite=True"]  # a config has its own
    seconds, _, memory = run(sys.executable, trainer, *arguments, *last)
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return seconds, rows, memory


def speed(rows, name):
    """The median of a column, after the first steps."""
    values = [row[name] for row in rows if name in row]
    return statistics.median(values[len(values) // 4 :])


def table(title, columns, rows):
    """rows: {name: [a list of numbers for each column]}; prints their medians, and ratios to the first row's."""
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    base = next(iter(rows.values()))
    for name, measured in rows.items():
        cells = []
        for values, others in zip(measured, base):
            ratios = [value / other for value, other in zip(values, others)] if measured is not base else []
            ratio = f" (x {statistics.median(ratios):.2f})" if ratios else ""
            cells.append(f"{statistics.median(values):,.4g}{ratio}" if values else "")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def collect(pairs, sides):
    """Run the sides {name: function} in turn; each gives a number for each column -> {name: [numbers of a column]}."""
    found = {name: [] for name in sides}
    for _ in range(pairs):
        for name, side in sides.items():
            found[name].append(side())
    return {name: [list(column) for column in zip(*results)] for name, results in found.items()}


def run_nanogpt(path, out, *more):
    """nanoGPT's own command -> (seconds, ms of each step, {step: estimate of the validation loss}, GB)"""
    command = ["train.py", "config/train_shakespeare_char.py", *LAPTOP.split(), f"--out_dir={out}", *more]
    seconds, text, memory = run(sys.executable, *command, cwd=path)
    times = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", text)]
    losses = re.findall(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", text)
    return seconds, times, {int(step): float(loss) for step, loss in losses}, memory


def nanogpt(path, out, *more):
    """-> (seconds, its last estimate of the validation loss, tokens/s, GB)"""
    seconds, times, losses, memory = run_nanogpt(path, out, *more)
    return seconds, list(losses.values())[-1], 12 * 64 / statistics.median(times[20:]) * 1e3, memory


def prepare_nanogpt(path, text):
    data = Path(path, "data/shakespeare_char")
    (data / "input.txt").write_bytes(Path(text).read_bytes())
    run(sys.executable, "prepare.py", cwd=data)


def start(args, folder):
    def first_step():
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            how = ["--max_steps=1", "--log_interval=1", "--test_fraction=0", f"--out_dir={folder / 'start'}"]
            how += ["--overwrite=True"]
            return run(*LAUNCH, "train_lm.py", *how, until="step 1/1 train", HF_HOME=cache)[0]

    helps = [
        [run(sys.executable, f"{name}.py", "--help")[0] for name in ("train_lm", "train_diffusion", "sample")]
        for _ in range(args.pairs)
    ]
    table("--help", ["train_lm.py, s", "train_diffusion.py, s", "sample.py, s"], {"ours": list(zip(*helps))})
    table(
        "From the launch, without caches, to the first step",
        ["s"],
        {"ours": [[first_step() for _ in range(args.pairs)]]},
    )


def lm(args, folder):
    command = [*LAUNCH, "train_lm.py", "configs/shakespeare_char_cpu.py", f"--dataset={args.text}"]
    command += [f"--out_dir={folder / 'lm'}", "--overwrite=True"]

    def whole():
        seconds, text, _ = run(*command)
        return seconds, float(re.findall(r"val/loss ([\d.]+)", text)[-1])

    def early():
        """Until the loss is known; what follows, weights and test, is not counted."""
        seconds, text, _ = run(*command, *EARLY.split(), until=r"step (\d+)/\1 val/loss")
        return seconds, float(re.findall(r"val/loss ([\d.]+)", text)[-1])

    prepare_nanogpt(args.nanogpt, args.text)
    run(*command, "--max_steps=1", "--eval_batches=1")  # our tokens are ready as well
    sides = {
        "nanoGPT": lambda: nanogpt(args.nanogpt, folder / "nanogpt")[:2],
        "ours": whole,
        "ours, early": early,
    }
    table("Shakespeare by characters, whole commands", ["s", "validation loss"], collect(args.pairs, sides))


def equal(args, folder):
    prepare_nanogpt(args.nanogpt, args.text)
    shape = [
        "--block_size=64",
        "--batch_size=12",
        "--n_layer=4",
        "--n_head=4",
        "--n_embd=128",
        "--tokenizer=char",
    ]
    shape += [
        "--optimizer=adamw",
        "--max_steps=400",
        "--eval_interval=400",
        "--eval_batches=20",
        "--test_fraction=0",
    ]

    def ours_equal(*more):
        _, rows, memory = ours(
            folder / "equal", f"--dataset={args.text}", *shape, "--val_fraction=0.1", *more
        )
        return speed(rows, "tokens_per_s"), memory

    sides = {
        "nanoGPT": lambda: nanogpt(
            args.nanogpt, folder / "nanogpt", "--max_iters=400", "--eval_interval=400"
        )[2:]
    }
    sides |= {"ours": ours_equal, "ours, fp32": lambda: ours_equal("--mixed_precision=no")}
    table(
        "nanoGPT's shape for laptops, batch and AdamW in both",
        ["tokens/s", "GB at the peak"],
        collect(args.pairs, sides),
    )


def finetune(args, folder):
    script = Path(args.transformers, "examples/pytorch/language-modeling/run_clm_no_trainer.py")
    if not script.exists():
        print(f"\nfinetune: not run, there is no {script}", flush=True)
        return
    n, batch, T = 200, 16, 128  # less than an epoch, after which theirs evaluates
    ours(folder / "base", f"--dataset={args.text}", "--max_steps=1", "--eval_batches=1")  # for its tokenizer
    code = """
        import sys
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        tok = AutoTokenizer.from_pretrained(sys.argv[1])
        size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **size))
        lm.save_pretrained(sys.argv[2])
        tok.save_pretrained(sys.argv[2])
        print("parameters", lm.num_parameters())
    """
    _, text, _ = run(sys.executable, "-c", textwrap.dedent(code), folder / "base", folder / "llama")
    parameters = int(re.search(r"parameters (\d+)", text)[1])

    def theirs(precision):
        how = [f"--model_name_or_path={folder / 'llama'}", f"--train_file={args.text}", f"--block_size={T}"]
        how += [f"--max_train_steps={n}", f"--per_device_train_batch_size={batch}"]
        how += [f"--output_dir={folder / 'theirs'}"]
        env = {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_USE_CPU": "true"}
        _, text, memory = run(sys.executable, script, *how, **env)
        return n * batch * T / seconds_of(re.search(rf"{n}/{n} \[([\d:]+)<", text)[1]), memory

    def mine(precision):
        how = [f"--init_from={folder / 'llama'}", f"--dataset={args.text}", f"--batch_size={batch}"]
        how += [f"--block_size={T}", f"--max_steps={n}", "--eval_interval=1000", "--eval_batches=1"]
        how += ["--test_fraction=0"]
        _, rows, memory = ours(folder / "finetune", *how, f"--mixed_precision={precision}")
        # the mean of all steps, as theirs
        return statistics.harmonic_mean(row["tokens_per_s"] for row in rows if "tokens_per_s" in row), memory

    title = f"The same Llama ({parameters / 1e6:.1f} M parameters), {batch} blocks of {T} tokens a step"
    for name, precision in PRECISIONS.items():
        sides = {"transformers' example": partial(theirs, precision), "ours": partial(mine, precision)}
        table(f"{title}, {name}", ["tokens/s", "GB at the peak"], collect(args.pairs, sides))


def sampling(args, folder):
    code = """
        import sys, time, torch
        sys.path.insert(0, ".")
        import sample
        from transformers import AutoModelForCausalLM
        _, trainer, model, _ = sample.load_run(*2 * (sample.Path(sys.argv[1]),), "cpu")
        theirs = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        torch.manual_seed(0)
        prompt, n = torch.randint(model.config.vocab_size, (int(sys.argv[2]), 16)), int(sys.argv[3])
        how = {"max_new_tokens": n, "temperature": 0.8}
        @torch.no_grad()
        def by_them():
            mask = torch.ones_like(prompt)
            theirs.generate(input_ids=prompt, attention_mask=mask, min_new_tokens=n, do_sample=True, top_k=0, **how)
        def by_us():
            for token in trainer.generate(model, prompt[0].tolist(), len(prompt), **how):
                pass
        sides = {"theirs": by_them, "ours": by_us}
        for side in sides.values():
            side()
        for _ in range(int(sys.argv[4])):
            for name, side in sides.items():
                began = time.time()
                side()
                print(name, len(prompt) * n / (time.time() - began))
    """
    sizes = {"the defaults, 1.0 M parameters": ([], 100)}
    sizes["8 layers of 512 channels, 34 M"] = (
        ["--n_layer=8", "--n_embd=512", "--n_head=8", "--tokenizer=bpe:8192"],
        60,
    )
    sizes["12 layers of 768 channels, 98 M"] = (
        ["--n_layer=12", "--n_embd=768", "--n_head=12", "--tokenizer=bpe:8192"],
        30,
    )
    path = [f"{args.transformers}/src"] if args.transformers else []
    for name, (shape, n) in sizes.items():
        ours(
            folder / "sampling",
            *shape,
            "--max_steps=2",
            "--eval_batches=1",
            "--test_fraction=0",
            "--optimizer=adamw",
        )
        for batch in (1, 8):
            command = [sys.executable, "-c", textwrap.dedent(code), folder / "sampling", batch, n, args.pairs]
            _, text, _ = run(*command, PYTHONPATH=os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]))
            found = {
                side: [[float(x) for x in re.findall(rf"^{side} ([\d.]+)", text, re.MULTILINE)]]
                for side in ("theirs", "ours")
            }
            names = {"transformers' generate()": found["theirs"], "ours": found["ours"]}
            table(f"Sampling, {name}, {batch} at once", ["tokens/s"], names)


def load_cifar(args, split):
    """-> a Dataset with the columns image and label"""
    import datasets

    files = [str(path) for path in sorted(Path(args.cifar10).glob(f"{split}*.parquet"))]
    rows = datasets.load_dataset("parquet", data_files={split: files})[split]
    return rows.rename_columns({"img": "image"} if "img" in rows.column_names else {})


def write_pictures(args, folder, n):
    """n pictures of the train split as a data set for the peers -> its folder"""
    rows = load_cifar(args, "train").select_columns(["image"])
    (folder / "train").mkdir(parents=True, exist_ok=True)
    rows.shuffle(seed=0).select(range(n)).to_parquet(folder / "train" / "train.parquet")
    return folder / "train"


def write_unet(folder, channels):
    """A DDPM pipeline of random weights in `folder`, its UNet2DModel in folder/unet -> how many parameters it has"""
    import diffusers
    import torch

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 8}
    blocks |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "block_out_channels": channels}
    unet = diffusers.UNet2DModel(sample_size=32, layers_per_block=1, **blocks)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return sum(p.numel() for p in unet.parameters())


def diffusers_example(args, pictures, unet, out, batch, epochs, *more):
    """Their example -> (seconds of each epoch, seconds of all, GB)"""
    script = Path(args.diffusers, "examples/unconditional_image_generation/train_unconditional.py")
    how = f"--dataset_name={pictures} --model_config_name_or_path={unet} --resolution=32 --center_crop --random_flip"
    how += (
        f" --train_batch_size={batch} --num_epochs={epochs} --use_ema --output_dir={out} --eval_batch_size=1"
    )
    how += f" --ddpm_num_inference_steps=2 --checkpointing_steps=1000000 --save_images_epochs={epochs}"
    how += f" --save_model_epochs={epochs} --overwrite_output_dir"
    code = DECLARE + "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    seconds, text, memory = run(sys.executable, "-c", code, script, *how.split(), *more)
    # the bar of an epoch is drawn again and again: the last one counts
    clocks = dict(re.findall(r"Epoch (\d+): 100%[^\[]*\[([\d:]+)<", text)).values()
    return [seconds_of(clock) for clock in clocks], seconds, memory


def unet(args, folder):
    n, batch = 4096, 64  # as their clock has whole seconds
    pictures = write_pictures(args, folder / "unet_pictures", n)
    parameters = write_unet(folder / "ddpm", (32, 64, 64))
    how = [
        f"--init_from={folder / 'ddpm'}",
        f"--dataset={pictures}",
        "--val_fraction=0",
        "--test_fraction=0",
        "--image_size=32",
    ]
    how += [
        "--flip=True",
        f"--batch_size={batch}",
        f"--max_steps={2 * n // batch}",
        "--eval_interval=1000",
        "--learning_rate=1e-4",
    ]
    how += ["--sample_steps=1", "--sampler=ddpm", "--log_interval=4", "--ema_decay=0.9999"]

    def mine(precision):
        _, rows, memory = ours(
            folder / "unet", *how, f"--mixed_precision={precision}", trainer="train_diffusion.py"
        )
        return speed(rows, "images_per_s"), memory

    def theirs(precision):
        passes, _, memory = diffusers_example(
            args,
            pictures,
            folder / "ddpm/unet",
            folder / "theirs",
            batch,
            2,
            f"--mixed_precision={precision}",
        )
        return n / passes[-1], memory

    title = f"The same UNet2DModel ({parameters / 1e6:.2f} M parameters), {batch} pictures of 32 x 32 a step"
    for name, precision in PRECISIONS.items():
        sides = {"diffusers' example": partial(theirs, precision), "ours": partial(mine, precision)}
        table(f"{title}, {name}", ["images/s", "GB at the peak"], collect(args.pairs, sides))


SMALLDIFFUSION = """
import sys, time
sys.path.insert(0, sys.argv[1])
import datasets, torch
from accelerate import Accelerator
from torch_ema import ExponentialMovingAverage
from smalldiffusion import DiT, ScheduleDDPM, img_train_transform, samples, training_loop
pictures, seconds, out, n = sys.argv[2], float(sys.argv[3]), sys.argv[4], int(sys.argv[5])
rows = datasets.load_dataset("parquet", data_files=pictures + "/train.parquet")["train"]
rows = rows.with_transform(lambda batch: {"x": [img_train_transform(image.convert("RGB")) for image in batch["image"]]})
class Pictures(torch.utils.data.Dataset):
    def __len__(self): return len(rows)
    def __getitem__(self, i): return rows[i]["x"]
torch.manual_seed(0)
accelerator, schedule = Accelerator(cpu=True), ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
model = DiT(in_dim=32, channels=3, patch_size=4, depth=6, head_dim=32, num_heads=4, mlp_ratio=4.0)
print("parameters", sum(p.numel() for p in model.parameters() if p.requires_grad))
ema = ExponentialMovingAverage(model.parameters(), decay=0.99)
loader = torch.utils.data.DataLoader(Pictures(), batch_size=64, shuffle=True)
for i, step in enumerate(training_loop(loader, model, schedule, epochs=1000, lr=1e-3, accelerator=accelerator)):
    if i: ema.update()
    if time.time() - float(sys.argv[6]) > seconds: break
print("pictures", 64 * i)
with ema.average_parameters():
    drawn = torch.cat([list(samples(model, schedule.sample_sigmas(20), gam=1.6, batchsize=100, accelerator=accelerator))[-1] for _ in range(n // 100)])
torch.save(drawn.clamp(-1, 1), out)
"""


def read_split(args, split):
    """-> pictures (N, 3, 32, 32) in [-1, 1], labels (N,)"""
    import numpy as np
    import torch

    rows = load_cifar(args, split)
    pictures = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(rows["label"])


def train_classifier(x, y):
    """-> a small convolutional network whose last layer but one, of 128 channels, is what pictures are compared in"""
    import torch
    import torch.nn as nn

    def layer(channels, out):
        return nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )

    torch.manual_seed(0)
    pooled = [
        layer(3, 32),
        layer(32, 32),
        nn.MaxPool2d(2),
        layer(32, 64),
        layer(64, 64),
        nn.MaxPool2d(2),
        layer(64, 128),
    ]
    eyes = nn.Sequential(*pooled, layer(128, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head, steps = nn.Linear(128, 10), 3 * len(x) // 128
    optimizer = torch.optim.SGD(
        [*eyes.parameters(), *head.parameters()], 0.1, 0.9, weight_decay=5e-4, nesterov=True
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min((step + 1) / 200, (steps - step) / steps)
        ids = torch.randint(len(x), (128,))
        batch = x[ids].flip(-1) if step % 2 else x[ids]
        nn.functional.cross_entropy(head(eyes(batch)), y[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return eyes.eval(), head


def pictures(args, folder):
    import torch

    sys.path.insert(0, str(ROOT))
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    import sample
    import train_diffusion

    n, budget = 500, 60 * args.minutes
    train, test = read_split(args, "train"), read_split(args, "test")
    eyes, head = train_classifier(*train)

    @torch.no_grad()
    def see(x):
        return torch.cat([eyes(part) for part in x.split(500)]).double().numpy()

    with torch.no_grad():
        right = (head(torch.from_numpy(see(test[0])).float()).argmax(1) == test[1]).float().mean()
    real, rows = see(test[0]), {}
    print(f"the classifier reads {right:.1%} of the test pictures", flush=True)

    def judge(name, drawn, minutes, seconds):
        distance = train_diffusion.frechet_distance(real, see(drawn[:n].float()))
        rows[name] = [[distance], [minutes] if minutes else [], [n / seconds] if seconds else []]
        print(name, rows[name], flush=True)

    some = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[:n]
    judge("real pictures of the train split", train[0][some], 0, 0)
    # diffusers' example: an epoch of as many pictures as it gets through in the given time
    parameters = write_unet(folder / "ddpm", (40, 80, 80))
    few = write_pictures(args, folder / "few", 1024)
    (seconds, _), whole, _ = diffusers_example(args, few, folder / "ddpm/unet", folder / "theirs", 64, 2)
    many = min(len(train[0]), int((budget - (whole - 2 * seconds)) * 1024 / seconds))
    once = write_pictures(args, folder / "once", many)
    _, seconds, _ = diffusers_example(
        args, once, folder / "ddpm/unet", folder / "theirs", 64, 1, "--lr_warmup_steps=50"
    )
    network, began = UNet2DModel.from_pretrained(folder / "theirs", subfolder="unet").eval(), time.time()
    scheduler = DDIMScheduler.from_config(DDPMPipeline.from_pretrained(folder / "theirs").scheduler.config)
    scheduler.set_timesteps(50)
    drawn, rng = [], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(n // 100):
            x = torch.randn(100, 3, 32, 32, generator=rng)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t).sample, t, x).prev_sample
            drawn.append(x.clamp(-1, 1))
    name = f"diffusers' example, {parameters / 1e6:.2f} M, {many:,} pictures, 50 DDIM steps"
    judge(name, torch.cat(drawn), seconds / 60, time.time() - began)
    # smalldiffusion's DiT
    full, began = write_pictures(args, folder / "full", len(train[0])), time.time()
    arguments = [Path(args.smalldiffusion, "src"), full, budget, folder / "small.pt", n, began]
    total, text, _ = run(sys.executable, "-c", DECLARE + SMALLDIFFUSION, *arguments)
    count, parameters = (int(re.search(rf"{what} (\d+)", text)[1]) for what in ("pictures", "parameters"))
    name = f"smalldiffusion's DiT, {parameters / 1e6:.2f} M, {count:,} pictures, its 20 steps"
    judge(name, torch.load(folder / "small.pt"), args.minutes, total - budget)
    # ours: a short run tells its speed, the next takes the given time
    how = ["configs/cifar10_cpu.py", f"--dataset={args.cifar10}", "--image_column=image", "--test_fraction=0"]
    seconds, found, _ = ours(
        folder / "ours", *how, "--max_steps=60", "--eval_interval=60", trainer="train_diffusion.py"
    )
    per_step = 64 / speed(found, "images_per_s")
    steps = int(0.95 * (budget - (seconds - 60 * per_step)) / per_step)
    for kind, more, guidance in (("with classes", [], 2.0), ("without classes", ["--label_column="], 1.0)):
        more = [*more, f"--max_steps={steps}", f"--eval_interval={steps}", f"--save_interval={steps}"]
        seconds, _, _ = ours(folder / "ours", *how, *more, trainer="train_diffusion.py")
        info, trainer, model, _ = sample.load_run(folder / "ours", folder / "ours", "cpu")
        y = torch.arange(n) % 10 if guidance > 1 else torch.full((n,), -1)
        process, began = trainer.Process(**info["process"]), time.time()
        options = {"steps": 25, "guidance": guidance, "sampler": "heun", "at_once": 100}
        drawn = trainer.draw_pictures(model, process, (3, 32, 32), y, range(n), **options)
        name = f"ours {kind}, {info['parameters'] / 1e6:.2f} M, {steps * 64:,} pictures, 25 Heun steps"
        judge(name, drawn, seconds / 60, time.time() - began)
    title = f"CIFAR-10, {args.minutes:g} minutes from command to weights; {n:,} drawn pictures against the test split"
    table(title, ["Fréchet distance", "minutes", "pictures/s drawn"], rows)


PARTS = {"start": (start, []), "lm": (lm, ["text", "nanogpt"]), "equal": (equal, ["text", "nanogpt"])}
PARTS |= {"finetune": (finetune, ["text", "transformers"]), "sampling": (sampling, [])}
PARTS |= {"unet": (unet, ["cifar10", "diffusers"])}
PARTS |= {"pictures": (pictures, ["cifar10", "diffusers", "smalldiffusion"])}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("text", "nanogpt", "transformers", "cifar10", "diffusers", "smalldiffusion"):
        parser.add_argument(f"--{name}", type=lambda path: str(Path(path).resolve(strict=True)))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts.split(","):
            part, needs = PARTS[name]
            lacking = [f"--{need}" for need in needs if not getattr(args, need)]
            if lacking:
                print(f"\n{name}: not run, it needs {' '.join(lacking)}", flush=True)
                continue
            part(args, Path(folder))


if __name__ == "__main__":
    main()
