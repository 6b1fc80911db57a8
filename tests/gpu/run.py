"""
Everything that needs a GPU, in one command of under ten minutes, with one table at the end:

    python tests/gpu/run.py --shakespeare=input.txt [--cifar10=FOLDER] [--nanogpt=PATH]

A model of GPT-2's size on Python's own source (bf16, compiled: tokens/s, MFU, memory, recompilations), one of 0.94 B
parameters, how often a step waits for the GPU, GPT-2's size under FSDP2 (saved, resumed, loaded by transformers), LoRA
on a model of transformers of that size beside a plain loop with peft (tokens/s, memory), LoRA on pipelines of the true
shapes of Stable Diffusion 1.5 and XL beside the loop of diffusers' scripts (pictures/s, memory), nanoGPT's Shakespeare
setting, CIFAR-10 from a folder of its parquet files for two minutes (images/s, MFU, memory) beside the loop of
diffusers' unconditional example, a resumed run of each trainer against an unbroken one, and nanoGPT beside them where
its checkout is given.
Without a GPU it says so and exits with 1.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
TABLE = []


def note(what, value, unit=""):
    TABLE.append((what, value, unit))
    print(f"{what}: {value} {unit}", flush=True)


def train(out, *arguments, trainer="train_lm.py", launch=(), **env):
    """Run a trainer to its end -> (rows of metrics.jsonl, seconds, what it printed)."""
    began = time.monotonic()
    command = [sys.executable, *launch, str(ROOT / trainer), f"--out_dir={out}", *arguments]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return read_rows(out), time.monotonic() - began, done.stdout + done.stderr


def read_rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def gpt2(folder):
    """200 steps of 124 M parameters: speed over the last half, and what was compiled again after the first steps."""
    shape = [
        "--block_size=1024",
        "--n_layer=12",
        "--n_head=12",
        "--n_embd=768",
        "--batch_size=64",
        "--tokenizer=bpe:32768",
    ]
    shape += [
        "--micro_batch_size=32",
        "--max_steps=200",
        "--eval_interval=200",
        "--eval_batches=2",
        "--save_interval=200",
    ]
    rows, seconds, output = train(folder / "gpt2", *shape, "--test_fraction=0", TORCH_LOGS="recompiles")
    speed("GPT-2 124M", rows, "tokens_per_s")
    note("GPT-2 124M: recompilations", len(re.findall(r"Recompiling function", output)))
    note("GPT-2 124M: whole command", round(seconds), "s")
    note(
        "GPT-2 124M: validation loss after 200 steps",
        [row["val/loss"] for row in rows if "val/loss" in row][-1],
    )


def billion(folder):
    """60 steps of 0.94 B parameters, with every activation kept."""
    how = "--block_size=1024 --n_layer=16 --n_head=16 --n_embd=2048 --tokenizer=bpe:32768 --batch_size=32"
    how += " --micro_batch_size=16 --max_steps=60 --eval_interval=60 --eval_batches=1 --log_interval=2 --val_fraction=0"
    rows, seconds, _ = train(folder / "billion", *how.split(), "--save_interval=1000", "--test_fraction=0")
    speed("GPT 0.94 B", rows, "tokens_per_s")
    note("GPT 0.94 B: whole command", round(seconds), "s")


SYNCS = """
import runpy, sys, warnings, torch
sys.argv = sys.argv[1:]
from accelerate import Accelerator
begun, seen = Accelerator.prepare, []
def prepare(self, *parts, **options):
    torch.cuda.set_sync_debug_mode("warn")
    return begun(self, *parts, **options)
Accelerator.prepare = prepare
def show(message, category, filename, line, *more):
    if "synchroniz" in str(message):
        seen.append(f"{filename.rpartition('/')[2]}:{line}")
warnings.showwarning = show
warnings.simplefilter("always")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("SYNCS", len(seen), sorted({(seen.count(place), place) for place in seen})[-4:])
"""


def synchronizations(folder):
    """How often a step waits for the GPU: 20 steps more between two logs, all else equal."""
    how = [
        "--eval_interval=1000",
        "--save_interval=1000",
        "--test_fraction=0",
        "--val_fraction=0",
        "--compile=False",
    ]
    for trainer in ("train_lm.py", "train_diffusion.py"):
        counts = []
        for steps in (20, 40):
            command = [
                sys.executable,
                "-c",
                SYNCS,
                str(ROOT / trainer),
                f"--out_dir={folder / trainer}{steps}",
                *how,
            ]
            command += [f"--max_steps={steps}", "--log_interval=1000"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            found = re.search(r"SYNCS (\d+) (.*)", done.stdout)
            counts.append(int(found[1]) if found else 0)
        note(
            f"{trainer}: waits for the GPU in a step",
            (counts[1] - counts[0]) / 20,
            found[2] if found else done.stderr[-300:],
        )


def fsdp2(folder):
    """
    124 M parameters under FSDP2, on as many GPUs as there are, beside the same in one piece: speed, a resume against
    an unbroken run, and whether transformers finds in the run directory what was trained.
    """
    from transformers import AutoModelForCausalLM

    count = torch.cuda.device_count()
    launch = ["-m", "accelerate.commands.launch", f"--config_file={ROOT / 'configs/accelerate/fsdp2.yaml'}"]
    launch += [f"--num_processes={count}", "--main_process_port=0"]
    how = "--block_size=1024 --n_layer=12 --n_head=12 --n_embd=768 --tokenizer=bpe:32768 --max_steps=60"
    how += " --save_interval=30 --eval_interval=30 --eval_batches=2 --log_interval=1 --lr_schedule=constant"
    how += f" --val_fraction=0 --batch_size={16 * count}"
    how, plain = how.split(), ["--compile=False", "--deterministic=True"]
    losses = []
    for name, more, launched in (
        ("in one piece", plain, []),
        ("FSDP2", plain, launch),
        ("FSDP2 compiled", ["--max_steps=30"], launch),
    ):
        rows, _, _ = train(folder / name, *how, *more, launch=launched)
        rows = [row for row in rows if "tokens_per_s" in row]
        losses.append(rows[29]["train/loss"])
        for key, unit in (("tokens_per_s", "tokens/s"), ("memory_gb", "GB")):
            note(
                f"GPT-2 124M, {name}: {key} (median)",
                sorted(row[key] for row in rows[10:])[len(rows[10:]) // 2],
                unit,
            )
    note("GPT-2 124M: training loss of step 30 in one piece, under FSDP2, compiled", losses)
    train(folder / "broken", *how, *plain, "--max_steps=30", launch=launch)
    train(folder / "broken", *how, *plain, "--resume=True", launch=launch)
    states = [folder / name / "checkpoint.pt" for name in ("FSDP2", "broken")]
    a, b = (torch.load(path, weights_only=True, map_location="cpu")["model"] for path in states)
    note("FSDP2: resume bitwise equal", all(torch.equal(a[name], b[name]) for name in a))
    kept = AutoModelForCausalLM.from_pretrained(folder / "FSDP2").state_dict()
    note("FSDP2: transformers loads what was trained", all(torch.equal(kept[name], a[name]) for name in a))


PEER = """
import sys, time, torch, peft
from transformers import AutoModelForCausalLM
from accelerate import Accelerator
accelerator = Accelerator(mixed_precision="bf16")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
model, optimizer = accelerator.prepare(model, optimizer)
x = torch.randint(256, (16, 1024), device="cuda")
def step():
    accelerator.backward(model(input_ids=x, attention_mask=torch.ones_like(x), labels=x).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
[step() for _ in range(10)]; torch.cuda.synchronize(); t = time.time()
[step() for _ in range(50)]; torch.cuda.synchronize()
print("speed", 50 * 16 * 1024 / (time.time() - t), "memory", torch.cuda.max_memory_allocated() / 1e9)
"""


def lora(folder, text):
    """
    LoRA on GPT-2's size with random weights, on bytes, beside the loop of transformers' run_clm_no_trainer.py with
    peft, both not compiled; then compiled, and in little memory; and a resumed run against an unbroken one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    core = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tok.save_pretrained(folder / "base")
    GPT2LMHeadModel(GPT2Config(bos_token_id=256, eos_token_id=256)).save_pretrained(folder / "base")
    command = [sys.executable, "-c", PEER, str(folder / "base")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"speed ([\d.]+) memory ([\d.]+)", done.stdout)
    note(
        "LoRA 124M, plain loop with peft", round(float(found[1])) if found else done.stderr[-300:], "tokens/s"
    )
    note("LoRA 124M, plain loop with peft: memory", round(float(found[2]), 2) if found else "", "GB")
    how = [f"--init_from={folder / 'base'}", "--adapter=lora", f"--dataset={text}", "--block_size=1024"]
    how += [
        "--batch_size=16",
        "--max_steps=140",
        "--eval_interval=140",
        "--eval_batches=2",
        "--test_fraction=0",
    ]
    for name, more in (
        ("", ["--compile=False"]),
        (", compiled", []),
        (", checkpointing", ["--compile=False", "--gradient_checkpointing=True"]),
    ):
        rows, _, _ = train(folder / f"lora{name}", *how, *more, "--save_interval=140", "--log_interval=5")
        rows = [row for row in rows if "tokens_per_s" in row][10:]
        for key, unit in (("tokens_per_s", "tokens/s"), ("memory_gb", "GB")):
            note(
                f"LoRA 124M{name}: {key} (median)",
                round(sorted(r[key] for r in rows)[len(rows) // 2], 2),
                unit,
            )
    resume(folder, "train_lm.py", *how, "--compile=False", "--batch_size=4")


PEER_DIFFUSION = """
import sys, time, numpy, torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
folder, size, batch, checkpointing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
accelerator = Accelerator(mixed_precision="bf16")
pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
unet, vae, xl = pipe.unet, pipe.vae, hasattr(pipe, "text_encoder_2")
vae.to(torch.float32 if xl else torch.bfloat16)
for part in (unet, vae, pipe.text_encoder, *((pipe.text_encoder_2,) if xl else ())):
    part.requires_grad_(False)
targets = ["to_k", "to_q", "to_v", "to_out.0"]
unet.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=targets))
cast_training_params(unet, torch.float32)
if checkpointing:
    unet.enable_gradient_checkpointing()
trained = [p for p in unet.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)
scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
unet, optimizer = accelerator.prepare(unet.train(), optimizer)
pixels = torch.randn(batch, 3, size, size, device="cuda")
def step():
    with torch.no_grad():
        x = vae.encode(pixels.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
        out = pipe.encode_prompt(["a red square"] * batch, device="cuda", num_images_per_prompt=1,
                                 do_classifier_free_guidance=False)
    x = x.to(torch.bfloat16)
    noise, t = torch.randn_like(x), torch.randint(1000, (batch,), device="cuda")
    more = {}
    if xl:
        ids = torch.tensor([[size, size, 0, 0, size, size]] * batch, device="cuda", dtype=torch.bfloat16)
        more = {"added_cond_kwargs": {"text_embeds": out[2], "time_ids": ids}}
    answer = unet(scheduler.add_noise(x, noise, t), t, out[0], return_dict=False, **more)[0]
    accelerator.backward(F.mse_loss(answer.float(), noise.float()))
    accelerator.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
[step() for _ in range(5)]; torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); t = time.time()
[step() for _ in range(15)]; torch.cuda.synchronize()
print("speed", 15 * batch / (time.time() - t), "memory", torch.cuda.max_memory_allocated() / 1e9)
"""


def stable_diffusion(folder, kind, size, batch, checkpointing):
    """
    LoRA on a pipeline of the true shape with random weights, beside the loop of diffusers'
    train_text_to_image_lora(_sdxl).py, which encodes pictures and captions again in each step.
    """
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(ROOT / "tests"))
    from pipelines import make_pipeline

    base, pictures = make_pipeline(folder / kind, kind), folder / f"pictures {kind}"
    pictures.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    command = [sys.executable, "-c", PEER_DIFFUSION, str(base), str(size), str(batch), str(checkpointing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found, name = (
        re.search(r"speed ([\d.]+) memory ([\d.]+)", done.stdout),
        f"LoRA on {kind}, {size} x {size}",
    )
    note(f"{name}, loop of diffusers", float(found[1]) if found else done.stderr[-300:], "images/s")
    note(f"{name}, loop of diffusers: memory", float(found[2]) if found else "", "GB")
    config = "sdxl_lora.py" if "xl" in kind else "sd15_lora.py"
    how = [
        str(ROOT / "configs" / config),
        f"--init_from={base}",
        f"--dataset={pictures}",
        "--caption=a red square",
    ]
    how += [f"--image_size={size}", f"--batch_size={batch}", "--micro_batch_size=0", "--val_fraction=0"]
    how += [
        f"--gradient_checkpointing={checkpointing}",
        "--sample_steps=2",
        "--log_interval=1",
        "--max_steps=25",
    ]
    for which, compiled in (("", "False"), (", compiled", "True")):
        out = folder / f"{kind}{which}"
        more = [*how, "--eval_interval=25", "--save_interval=25", f"--compile={compiled}"]
        rows, seconds, _ = train(out, *more, trainer="train_diffusion.py")
        rows = [row for row in rows if "images_per_s" in row][10:]
        for key, unit in (("images_per_s", "images/s"), ("memory", "GB"), ("mfu", "of the peak")):
            note(
                f"{name}{which}: {key} (median)",
                sorted(row.get(key, 0) for row in rows)[len(rows) // 2],
                unit,
            )
        note(f"{name}{which}: whole command", round(seconds), "s")


def shakespeare(folder, text):
    rows, seconds, _ = train(
        folder / "shakespeare", str(ROOT / "configs/shakespeare_char.py"), f"--dataset={text}"
    )
    losses = [(row["val/loss"], row["time"]) for row in rows if "val/loss" in row]
    note("shakespeare_char: best validation loss (nanoGPT documents 1.4697)", min(losses)[0])
    reached = [when for loss, when in losses if loss <= 1.4697]
    note("shakespeare_char: seconds of training to 1.4697", reached[0] if reached else "not reached", "s")
    note("shakespeare_char: whole command", round(seconds), "s")


def speed(what, rows, per_second):
    """Medians over the rows after the first, in which the model was compiled."""
    rows = [row for row in rows if per_second in row][10:]
    for name, unit in ((per_second, "/s"), ("mfu", "of the peak"), ("memory_gb", "GB")):
        values = sorted(row.get(name, row.get("memory", 0)) for row in rows)
        note(f"{what}, bf16, compiled: {name} (median)", values[len(values) // 2], unit)


def cifar10(folder, data):
    """The shape of configs/cifar10.py for about two minutes; the last grid of pictures stays in the current folder."""
    how = [str(ROOT / "configs/cifar10.py"), f"--dataset={data}", "--image_column=image", "--fd_samples=0"]
    how += ["--max_steps=2000", "--save_interval=2000", "--eval_interval=1000"]
    rows, seconds, output = train(
        folder / "cifar10", *how, trainer="train_diffusion.py", TORCH_LOGS="recompiles"
    )
    speed("CIFAR-10, 57 M parameters", rows, "images_per_s")
    note("CIFAR-10: recompilations", len(re.findall(r"Recompiling function", output)))
    note(
        "CIFAR-10: validation loss after 2,000 steps",
        [row["val/loss"] for row in rows if "val/loss" in row][-1],
    )
    note("CIFAR-10: whole command", round(seconds), "s")
    grid = max((folder / "cifar10" / "samples").iterdir())
    Path("gpu_cifar10.png").write_bytes(grid.read_bytes())


UNCONDITIONAL = """
import time, torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
accelerator, scheduler = Accelerator(mixed_precision="bf16"), DDPMScheduler()
down = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
up = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
unet = UNet2DModel(32, block_out_channels=(128, 256, 256, 256), down_block_types=down, up_block_types=up)
ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
ema.to("cuda")
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
unet, optimizer = accelerator.prepare(unet, optimizer)
x = torch.randn(128, 3, 32, 32, device="cuda")
def step():
    noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device="cuda")
    loss = F.mse_loss(unet(scheduler.add_noise(x, noise, t), t).sample.float(), noise)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    ema.step(unet.parameters())
    loss.item()
[step() for _ in range(10)]; torch.cuda.synchronize(); t = time.time()
[step() for _ in range(50)]; torch.cuda.synchronize()
print("speed", 50 * len(x) / (time.time() - t), "parameters", sum(p.numel() for p in unet.parameters()))
"""


def unconditional():
    """The loop of diffusers' train_unconditional.py, its batches ready on the GPU, at the shape of DDPM's CIFAR-10 model."""
    done = subprocess.run([sys.executable, "-c", UNCONDITIONAL], capture_output=True, text=True, check=False)
    found = re.search(r"speed ([\d.]+) parameters (\d+)", done.stdout)
    name = (
        f"CIFAR-10, the loop of diffusers' example, {int(found[2]) / 1e6:.0f} M parameters"
        if found
        else "diffusers"
    )
    note(name, round(float(found[1])) if found else done.stderr[-300:], "images/s")


def resume(folder, trainer, *more):
    """Stopped at step 30 and resumed, under deterministic=True, compiled: equal weights and optimizers."""
    how = [*more, "--deterministic=True", "--test_fraction=0", "--lr_schedule=constant"]
    how += ["--max_steps=60", "--save_interval=30", "--eval_interval=30"]
    name = trainer + " with LoRA" * bool(more)
    unbroken, broken = folder / f"{name} unbroken", folder / f"{name} broken"
    train(unbroken, *how, trainer=trainer)
    train(broken, *how, "--max_steps=30", trainer=trainer)
    train(broken, *how, "--resume=True", trainer=trainer)
    place = "checkpoint.pt" if trainer == "train_lm.py" else "checkpoints/step_00000060/state.pt"
    states = [out / place for out in (unbroken, broken)]
    a, b = (torch.load(path, weights_only=True, map_location="cpu") for path in states)
    equal = all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    note(f"{name}: resume on CUDA, deterministic: weights bitwise equal", equal)


def nanogpt(folder, path, text):
    """Its Shakespeare run and its GPT-2 speed, on this machine in this hour."""
    data = Path(path, "data/shakespeare_char")
    (data / "input.txt").write_text(Path(text).read_text())
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    began = time.monotonic()
    command = [
        sys.executable,
        "train.py",
        "config/train_shakespeare_char.py",
        f"--out_dir={folder / 'nanogpt'}",
    ]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, check=False)
    losses = re.findall(r"val loss ([\d.]+)", done.stdout)
    note("nanoGPT shakespeare_char: best validation loss", min(losses, default=done.stderr[-300:]))
    note("nanoGPT shakespeare_char: whole command", round(time.monotonic() - began), "s")
    code = (
        "import torch, time; from model import GPT, GPTConfig; torch.set_float32_matmul_precision('high');"
        "m = GPT(GPTConfig(vocab_size=32768, bias=False, dropout=0.0)).cuda(); m = torch.compile(m);"
        "o = torch.optim.AdamW(m.parameters(), lr=6e-4, fused=True); x = torch.randint(32768, (32, 1024)).cuda();\n"
        "def step():\n"
        "    for _ in range(2):\n"
        "        with torch.autocast('cuda', torch.bfloat16): loss = m(x, x)[1]\n"
        "        loss.backward()\n"
        "    o.step(); o.zero_grad()\n"
        "[step() for _ in range(10)]; torch.cuda.synchronize(); t = time.time()\n"
        "[step() for _ in range(50)]; torch.cuda.synchronize(); print('speed', 50 * 64 * 1024 / (time.time() - t))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=False)
    speed = re.search(r"speed ([\d.]+)", done.stdout)
    note(
        "nanoGPT 124M, bf16, compiled, AdamW",
        round(float(speed[1])) if speed else done.stderr[-300:],
        "tokens/s",
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shakespeare", required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--cifar10", help="a folder with the parquet files of CIFAR-10")
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("NO GPU WAS FOUND: nothing of this was tested.", file=sys.stderr)
        raise SystemExit(1)
    note("GPU", torch.cuda.get_device_name())
    note("torch", torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        gpt2(folder)
        billion(folder)
        synchronizations(folder)
        fsdp2(folder)
        resume(folder, "train_lm.py")
        resume(folder, "train_diffusion.py")
        lora(folder, arguments.shakespeare)
        stable_diffusion(folder, "sd15", 512, 4, False)
        stable_diffusion(folder, "sdxl10", 1024, 1, True)
        if arguments.cifar10:
            cifar10(folder, arguments.cifar10)
            unconditional()
        shakespeare(folder, arguments.shakespeare)
        if arguments.nanogpt:
            nanogpt(folder, arguments.nanogpt, arguments.shakespeare)
    width = max(len(what) for what, _, _ in TABLE)
    print("\n" + "\n".join(f"{what:{width}}  {value} {unit}" for what, value, unit in TABLE))


if __name__ == "__main__":
    main()
