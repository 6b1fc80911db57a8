"""
Everything that needs a GPU, in one command of some twenty minutes, with one table at the end:

    python tests/gpu/run.py --shakespeare=input.txt [--cifar10=FOLDER] [--nanogpt=PATH] [--parts=lm,fsdp2]
    python tests/gpu/run.py --dry=True          # all of it on a CPU, at tiny sizes: the figures mean nothing

  lm          the shape of GPT-2 (124 M) in bf16, and in fp16 with AdamW; 0.94 B: tokens/s, MFU, memory
  waits       how often ten steps of each trainer wait for the GPU
  characters  configs/shakespeare_char.py to its end; nanoGPT's loop at the shape of GPT-2
  resume      each trainer, stopped and resumed under deterministic=True, against an unbroken run
  fsdp2       the shape of GPT-2 in one piece and in parts; resumed; read by transformers
  lora        pipelines of the shapes of Stable Diffusion 1.5, XL and 3 beside the loops of diffusers' scripts
  images      configs/cifar10.py for 2,000 steps beside the loop of diffusers' unconditional example
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from benchmark import ROOT, read_metrics, run
from pipelines import make_clip, make_pipeline, make_vae

from configurator import configure

shakespeare = ""  # tinyshakespeare's input.txt
cifar10 = ""  # a folder with the parquet files of CIFAR-10, pictures in a column `image`
nanogpt = ""  # a checkout
parts = ""  # with commas between them; "": all
dry = False  # on a CPU, at tiny sizes

GPT2 = " --block_size=1024 --tokenizer=bpe:32768 --n_layer=12 --n_head=12 --n_kv_head=12 --n_embd=768"
BILLION = " --block_size=1024 --tokenizer=bpe:32768 --n_layer=16 --n_head=16 --n_kv_head=16 --n_embd=2048"
TINY = " --n_layer=2 --n_head=2 --n_embd=32 --batch_size=4 --micro_batch_size=2"
TINY_LM = TINY + " --n_kv_head=2 --block_size=32 --tokenizer=bytes"
TINY_DIT = TINY + " --image_size=16 --sample_steps=1"
CUDA, TABLE = torch.cuda.is_available(), []


def pick(real, tiny):
    return tiny if dry else real


def note(what, *values):
    values = [f"{value:,.4g}" if isinstance(value, float) else str(value) for value in values]
    TABLE.append(f"| {what} | {' · '.join(values)} |")
    print(f"{what}: {' · '.join(values)}", flush=True)


def train(out, arguments, launch="", **env):
    """Run a trainer to its end -> rows of metrics.jsonl; notes the medians of the later half."""
    tiny = TINY_LM if "train_lm" in arguments else TINY_DIT * ("init_from" not in arguments)
    command = f"{launch} {arguments}{pick('', tiny)} --out_dir={out}"
    seconds, output = run(*command.split(), TORCH_LOGS="recompiles", **env)
    rows = [row for row in read_metrics(out) if "grad_norm" in row]
    for name in ("tokens_per_s", "images_per_s", "mfu", "memory_gb"):
        if name in rows[-1]:
            note(f"{out.name}: {name}", statistics.median(row[name] for row in rows[len(rows) // 2 :]))
    note(f"{out.name}: recompilations, seconds in all", output.count("Recompiling function"), seconds)
    return read_metrics(out)


def measure(what, step, rows, steps):
    """Note how many rows a second another's loop takes, and its memory."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for n in (max(1, steps // 4), steps):
        began = time.monotonic()
        for _ in range(n):
            step()
        if CUDA:
            torch.cuda.synchronize()
    seconds, memory = time.monotonic() - began, torch.cuda.max_memory_allocated() if CUDA else 0
    note(f"{what}, GB", rows * steps / seconds, memory / 1e9)


def learn(accelerator, loss, weights, optimizer):
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def lm(folder):
    how, n = "train_lm.py --eval_batches=2 --test_fraction=0 --batch_size=64 --max_steps=", pick(100, 12)
    train(folder / "GPT-2_124M", f"{how}{n} --micro_batch_size=32{GPT2}")
    more = f"{GPT2} --optimizer=adamw --mixed_precision={pick('fp16', 'no')}"
    train(folder / "GPT-2_fp16", f"{how}{n} --micro_batch_size=32{more}")
    train(folder / "GPT_0.94B", f"{how}{pick(30, 12)} --micro_batch_size=16{BILLION}")


def waits(folder):
    """Of ten steps more between two logs, all else equal."""
    watch = "import torch\nif torch.cuda.is_available():\n    torch.cuda.set_sync_debug_mode('warn')\n"
    (folder / "watch.py").write_text(watch)
    how = f"{folder}/watch.py --eval_interval=1000 --save_interval=1000 --log_interval=1000"
    how += " --test_fraction=0 --val_fraction=0 --compile=False"
    for trainer, tiny in ("train_lm.py", TINY_LM), ("train_diffusion.py", TINY_DIT):
        found = []
        for n in (10, 20):
            command = f"{trainer} {how}{pick('', tiny)} --max_steps={n} --out_dir={folder}/{trainer}{n}"
            _, output = run(*command.split(), PYTHONWARNINGS="always")
            found.append(Counter(re.findall(r"(\S+:\d+): UserWarning: called a synchroniz", output)))
        more = found[1] - found[0]
        note(f"{trainer}: waits for the GPU in ten steps", more.total(), more.most_common(4))


def characters(folder):
    text, n = shakespeare or argparse.__file__, pick(2000, 12)
    how = f"train_lm.py configs/shakespeare_char.py --dataset={text} --max_steps={n}"
    rows = train(folder / "shakespeare_char", f"{how} --eval_interval={pick(250, 6)}")
    losses = [(row["val/loss"], row["time"]) for row in rows if "val/loss" in row]
    seconds = next((seconds for loss, seconds in losses if loss <= 1.4697), "never")  # nanoGPT documents it
    note("shakespeare_char: best validation loss, seconds to 1.4697", min(losses)[0], seconds)
    if not nanogpt:
        return
    sys.path.insert(0, nanogpt)
    from model import GPT, GPTConfig

    torch.set_float32_matmul_precision("high")
    device, (B, T) = "cuda" if CUDA else "cpu", pick((32, 1024), (2, 32))
    shape = pick({}, {"n_layer": 2, "n_head": 2, "n_embd": 32}) | {"block_size": T, "vocab_size": 32768}
    model, x = GPT(GPTConfig(bias=False, dropout=0.0, **shape)).to(device), torch.randint(32768, (B, T))
    if CUDA:
        model.compile()
    optimizer, x = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True), x.to(device)

    def step():
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16):
                loss = model(x, x)[1]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    measure("nanoGPT, 124 M, compiled, AdamW: tokens/s", step, 2 * B * T, pick(50, 4))


def stop_and_resume(folder, name, how, n, launch="", **env):
    """-> the folder of an unbroken run, which one that was stopped and resumed has to equal"""
    whole, broken = folder / name, folder / f"{name}_resumed"
    how += " --lr_schedule=constant --deterministic=True --resume=True"
    how += f" --eval_interval={n // 2} --save_interval={n // 2} --max_steps="
    for out, steps in (whole, n), (broken, n // 2), (broken, n):
        train(out, f"{how}{steps}", launch, **env)
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True)["model"] for out in (whole, broken))
    note(f"{name}: resumed bitwise equal, deterministic", all(torch.equal(a[name], b[name]) for name in a))
    return whole


def resume(folder):
    for trainer in ("train_lm.py", "train_diffusion.py"):
        stop_and_resume(folder, trainer, trainer, pick(60, 12))


def fsdp2(folder):
    world, n = pick(max(1, torch.cuda.device_count()), 2), pick(60, 12)
    launch = f"-m accelerate.commands.launch --config_file={ROOT}/configs/accelerate/fsdp2.yaml"
    launch += f" --main_process_port=0 --num_processes={world}" + pick("", f" {TESTS}/fsdp2.py")
    env = pick({}, {"ACCELERATE_USE_CPU": "true"})
    how = f"train_lm.py{GPT2} --batch_size={16 * world} --eval_batches=2 --log_interval=1"
    train(folder / "GPT-2_in_one_piece", f"{how} --max_steps={n} --lr_schedule=constant")
    train(folder / "GPT-2_FSDP2_compiled", f"{how} --max_steps={n} --lr_schedule=constant", launch, **env)
    out = stop_and_resume(folder, "GPT-2_FSDP2", f"{how} --compile=False", n, launch, **env)
    model = AutoModelForCausalLM.from_pretrained(out)
    note("GPT-2_FSDP2: parameters, as transformers reads them", model.num_parameters())


def make_sd3(folder):
    """A pipeline of the shape of Stable Diffusion 3 medium, without its T5, in bf16 with random weights"""
    heads, width = {"num_layers": 24, "num_attention_heads": 24}, {"caption_projection_dim": 1536}
    parts = {"transformer": diffusers.SD3Transformer2DModel(**heads, **width, pos_embed_max_size=192)}
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts["vae"] = make_vae(16, widths=(128, 256, 512, 512), scaling_factor=1.5305, shift_factor=0.0609)
    parts["tokenizer"], parts["text_encoder"] = make_clip(768, 12, 12)
    parts["tokenizer_2"], parts["text_encoder_2"] = make_clip(1280, 32, 20)
    pipe = diffusers.StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)
    pipe.to(torch.bfloat16).save_pretrained(folder)
    return folder


def lora_command(folder, kind, size, batch, checkpointing, steps):
    """-> a pipeline with random weights, our command that trains it"""
    base = make_sd3(folder / kind) if kind == "sd3" and not dry else make_pipeline(folder / kind, kind)
    images = folder / f"images_{kind}"
    images.mkdir()
    for i in range(8):
        Image.effect_noise((size, size), 50).convert("RGB").save(images / f"{i}.png")
    return (
        base,
        f"""train_diffusion.py --init_from={base} --adapter=lora --lora_targets=to_k,to_q,to_v,to_out.0
        --dataset={images} --caption=square --image_size={size} --batch_size={batch} --max_steps={steps}
        --log_interval=1 --val_fraction=0 --test_fraction=0 --eval_interval=1000 --save_interval=1000
        --sample_steps=1 --mixed_precision=bf16 --gradient_checkpointing={checkpointing}""",
    )


def lora_loop(base, size, batch, checkpointing):
    """-> a step of train_text_to_image_lora(_sdxl).py or train_dreambooth_lora_sd3.py, without a cache"""
    accelerator, scheduler = Accelerator(mixed_precision="bf16"), diffusers.DDPMScheduler()
    device = accelerator.device
    pipe = diffusers.DiffusionPipeline.from_pretrained(base, dtype=torch.bfloat16).to(device)
    flow, xl, vae = hasattr(pipe, "transformer"), "XL" in type(pipe).__name__, pipe.vae
    model = (pipe.transformer if flow else pipe.unet).requires_grad_(False)
    vae.to(torch.float32 if xl or flow else torch.bfloat16)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=16, target_modules=targets, init_lora_weights="gaussian", lora_alpha=16))
    cast_training_params(model, torch.float32)
    if checkpointing:
        model.enable_gradient_checkpointing()
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model.train(), torch.optim.AdamW(trained, lr=1e-4))
    pixels = torch.randn(batch, 3, size, size, device=device, dtype=vae.dtype)
    kwargs = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    kwargs |= {"prompt_2": None, "prompt_3": None} if flow else {}

    def step():
        with torch.no_grad():
            x = vae.encode(pixels).latent_dist.sample().bfloat16() * vae.config.scaling_factor
            texts = pipe.encode_prompt(prompt=["a red square"] * batch, **kwargs)
        noise, t, more = torch.randn_like(x), torch.randint(1000, (batch,), device=device), {}
        x_t, target = scheduler.add_noise(x, noise, t), noise
        if flow:
            x_t, target = x + (t / 1000)[:, None, None, None].bfloat16() * (noise - x), noise - x
            more = {"pooled_projections": texts[2]}
        if xl:
            ids = torch.tensor([[size, size, 0, 0, size, size]] * batch, device=device, dtype=x.dtype)
            more = {"added_cond_kwargs": {"text_embeds": texts[2], "time_ids": ids}}
        output = model(x_t, timestep=t, encoder_hidden_states=texts[0], return_dict=False, **more)[0]
        learn(accelerator, F.mse_loss(output.float(), target.float()), trained, optimizer)

    return step


def lora(folder):
    kinds = pick(("sd15", "sdxl10", "sd3"), ("sd", "sdxl", "sd3"))
    for kind, size, batch in zip(kinds, pick((512, 1024, 1024), (16, 16, 16)), (4, 1, 1)):
        steps, checkpointing = pick(20, 4), batch == 1
        base, command = lora_command(folder, kind, size, batch, checkpointing, steps)
        step = lora_loop(base, size, batch, checkpointing)
        measure(f"LoRA on {kind}, the loop of diffusers' script: images/s", step, batch, steps)
        del step
        torch.cuda.empty_cache()
        train(folder / f"LoRA_on_{kind}", command)


def images(folder):
    how = f"train_diffusion.py configs/cifar10.py --dataset={cifar10 or 'glyphs'} --image_column=image"
    how += f" --max_steps={pick(2000, 12)} --eval_interval={pick(1000, 6)}"
    train(folder / "CIFAR-10", how)
    # the loop of train_unconditional.py, its batches ready, at the shape of DDPM's model for CIFAR-10
    accelerator, scheduler, C = Accelerator(mixed_precision="bf16"), diffusers.DDPMScheduler(), pick(128, 32)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
    model = diffusers.UNet2DModel(32, block_out_channels=(C, 2 * C, 2 * C, 2 * C), **blocks)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    ema.to(accelerator.device)
    x = torch.randn(pick(128, 4), 3, 32, 32, device=accelerator.device)

    def step():
        noise, t = torch.randn_like(x), torch.randint(1000, (len(x),), device=x.device)
        output = model(scheduler.add_noise(x, noise, t), t).sample
        learn(accelerator, F.mse_loss(output.float(), noise), model.parameters(), optimizer)
        ema.step(model.parameters())

    measure("CIFAR-10, the loop of diffusers' example, 36 M: images/s", step, len(x), pick(50, 4))


def main():
    if not (dry or CUDA):
        raise SystemExit("NO GPU WAS FOUND: nothing of this was tested; --dry=True tries it on a CPU")
    note("GPU, torch", torch.cuda.get_device_name() if CUDA else "none", torch.__version__)
    for part in (lm, waits, characters, resume, fsdp2, lora, images):
        if part.__name__ in (parts or part.__name__).split(","):
            with tempfile.TemporaryDirectory() as folder:
                part(Path(folder))
    print("\n| | |\n| --- | ---: |\n" + "\n".join(TABLE))


if __name__ == "__main__":
    configure(globals())
    main()
