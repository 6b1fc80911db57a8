"""
Train a diffusion model: one file with the model, the mathematics, the data and the loop.

    accelerate launch train_diffusion.py  # letters and digits, anywhere
    accelerate launch train_diffusion.py configs/cifar10.py --n_layer=8
    accelerate launch train_diffusion.py --dataset=photos/ --image_size=64 --out_dir=out/mine
    accelerate launch train_diffusion.py configs/zimage_lora.py  # a pretrained pipeline, by your pictures

Then `python sample.py --out_dir=out/diffusion` draws from it. Ctrl-C saves; --resume=True goes on.
"""

import os

PARENT = os.getppid()  # before the slow imports: a launcher may die during them

import contextlib
import ctypes
import difflib
import functools
import glob
import inspect
import io
import itertools
import json
import math
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import datasets
import numpy as np
import psutil
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, tqdm
from datasets.fingerprint import Hasher
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader

from configurator import configure, fail, named, settings

# ---- Settings: change them here, in a config file, or by --name=value ----
# the run
out_dir = "out/diffusion"  # everything that the run writes
resume = False  # go on from the checkpoint in out_dir, or start if there is none
overwrite = False  # delete the run in out_dir and start anew
seed = 1337  # of weights, order of the data, noise and times
# data
dataset = "glyphs"  # letters and digits; or a folder of pictures, a .parquet, or hub name:config@revision
image_column = "image"  # with the pictures, where data has columns
label_column = "label"  # with their classes, in a folder the subfolders; "": no classes
caption_column = "text"  # with the captions for init_from, in a folder .txt files or metadata.jsonl
caption = ""  # or one for all pictures
val_fraction = 0.05  # of the data, where it has no validation split of its own; 0: no validation
test_fraction = 0.05  # likewise, for the test split, which is evaluated once, at the end
image_size = 16  # pixels, in height and width; pictures are scaled and cropped
flip = False  # learn every picture mirrored too
num_workers = 0  # DataLoader processes: 2 or more where a GPU would wait for data
# model; with init_from, all of it is the pipeline's
init_from = "scratch"  # or a text-to-image pipeline of diffusers to go on from: hub name or folder
adapter = ""  # "lora": train a few new weights instead of those of init_from
vae = ""  # train in the latents of this AutoencoderKL (hub name or folder); "": in pixels
patch_size = 2  # side of a token in pixels or latents: smaller is better and slower
n_layer = 6  # transformer blocks
n_head = 2  # attention heads; size 64 is fastest
n_embd = 128  # width, a multiple of 4 and n_head
# adapter
lora_rank = 16  # of the product added to a frozen matrix
lora_alpha = 16.0  # the product is scaled by lora_alpha / lora_rank
lora_targets = ""  # names of layers, as to_q,to_v; "": all linear ones of the blocks, UNet: attention
# diffusion
label_dropout = 0.1  # how often class or caption is hidden, for guidance; 0: without
ema_decay = 0.999  # average the weights over 1 / (1 - this) steps; 0: do not
# drawing
sample_steps = 0  # from noise to picture; 0: 25, or the pipeline's own
guidance = -1.0  # exaggerate class or caption; 1: do not; -1: 2, or the pipeline's own
sample_prompts = ""  # with init_from, to draw, with | between; "": the first captions
# batch and length
batch_size = 64  # pictures per optimizer step, over all processes
micro_batch_size = 0  # pictures per process and forward pass, if memory is short; 0: all at once
max_steps = 700  # optimizer steps; 0: only evaluate
epochs = 0.0  # passes over the data, instead of max_steps
# optimizer and learning rate
optimizer = "muon"  # for the blocks, with AdamW for the rest; or "adamw", which init_from always takes
learning_rate = 0.0  # peak; 0: muon 0.02, adamw 0.001, with init_from 1e-5, lora 1e-4
adamw_lr = 0.005  # peak, of AdamW beside muon
beta1 = 0.8  # AdamW's memory of the gradient
beta2 = 0.95  # AdamW's memory of the squared gradient
weight_decay = 0.03  # of the matrices in the blocks; with adamw of all matrices
warmup_steps = 20  # steps to the peak of the learning rate
lr_schedule = "wsd"  # "wsd" (warm-up, stable, decay), "cosine" or "constant"
cooldown = 0.9  # the last part of the steps, in which wsd decays
min_lr = 0.02  # at the end, as a fraction of the peak
grad_clip = 1.0  # largest norm of the gradient; 0: unlimited
# evaluation, saving, reports
eval_interval = 350  # steps between evaluations; 0: at the end
eval_batches = 4  # of batch_size pictures, spread over the validation split; 0: all of it
log_interval = 10  # steps between reports; 0: at the end
save_interval = 350  # steps between checkpoints; 0: at the end
patience = 0  # stop after so many evaluations without a better loss; 0: never
tracker = ""  # "wandb" or "tensorboard", beside metrics.jsonl
# the machine
mixed_precision = "auto"  # bf16 where the hardware has it, else no; or "bf16", "fp16", "no"
compile = True  # torch.compile, on CUDA only: a minute at the start, then much faster
gradient_checkpointing = False  # less memory, but slower: activations are computed twice
deterministic = False  # bitwise repeatable on CUDA; slower
detect_anomaly = False  # stop at the first NaN in a gradient, and show its origin; slow
profile = False  # write a trace of steps 6 to 8 for chrome://tracing

# What a resume may not change; a setting of yours that shapes the model belongs here.
PATHS = ("out_dir", "dataset", "init_from", "vae")  # settings in which ~ means the home directory
FIXED = "dataset image_size vae init_from adapter optimizer patch_size n_layer n_head n_embd beta1 beta2 weight_decay"


def check_settings():
    """End the program, before any data is touched, for values that cannot work."""
    scratch = init_from == "scratch"
    wrong = {
        f"{adapter=}: lora, with --init_from=, or empty": adapter not in (("",) if scratch else ("", "lora")),
        f"{vae=}: the latents of init_from are the pipeline's": vae and not scratch,
        f"{n_embd=} must be a multiple of 4 and {n_head=}": n_embd % 4 or n_embd % n_head,
        f"{optimizer=}: muon or adamw": optimizer not in ("muon", "adamw"),
        f"{lr_schedule=}: wsd, cosine or constant": lr_schedule not in ("wsd", "cosine", "constant"),
        f"{mixed_precision=}: auto, bf16, fp16 or no": mixed_precision not in ("auto", "bf16", "fp16", "no"),
        "fp16 needs --optimizer=adamw": scratch and (mixed_precision, optimizer) == ("fp16", "muon"),
        "resume goes on with the run that overwrite deletes: choose one": resume and overwrite,
    }
    if mistakes := [message for message, is_wrong in wrong.items() if is_wrong]:
        fail(mistakes[0])


# ---- Model: a diffusion transformer (DiT: Peebles & Xie 2022, arXiv:2212.09748) ----


def norm(x):
    """Divide each vector by its root mean square (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    if x.device.type == "cpu":  # torch's takes up to twice as long
        return x * (x.square().sum(dim=-1, keepdim=True) / x.size(-1) + 1e-6).rsqrt()
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def waves(x, lowest, n):
    """x (...) -> cosines and sines at n frequencies (..., 2 n) (Vaswani et al. 2017, arXiv:1706.03762)"""
    angle = x[..., None] * lowest ** (torch.arange(n, device=x.device) / n)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class Block(nn.Module):
    """Attention and an MLP; time and class scale, shift and gate both (adaLN-Zero: gates are 0 at first)."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.fc1 = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.fc2 = nn.Linear(4 * n_embd, n_embd, bias=False)
        self.modulation = nn.Linear(n_embd, 6 * n_embd)

    def attention(self, x):
        qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, C): every token attends to all
        q, k, v = (y.unflatten(2, (n_head, -1)).transpose(1, 2) for y in qkv)  # (B, n_head, T, D)
        q, k = norm(q), norm(k)  # this bounds the attention logits
        if x.device.type == "cpu" and x.size(1) <= 512:  # torch's takes up to three times as long
            y = (q / math.sqrt(q.size(-1)) @ k.mT).softmax(dim=-1, dtype=v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def mlp(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())  # squared ReLU: So et al. 2021, arXiv:2109.08668

    def forward(self, x, c):
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(norm(x) * (1 + scale1) + shift1)  # (B, T, C)
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """For pictures, or latents, of shape (channels, size, size); it knows its classes."""

    _no_split_modules = ("Block",)  # for FSDP2

    def __init__(self, shape, classes):
        super().__init__()
        (channels, size, _), C = shape, n_embd
        self.shape, self.class_names, self.none = shape, classes, len(classes)  # none: of no class
        self.prompts = [classes[i * len(classes) // 36] for i in range(36)] if classes else [""] * 36
        self.patch_in = nn.Linear(channels * patch_size**2, C)
        row = 2 * torch.arange(size // patch_size)  # 0.1 to 2 radians a token
        self.place = nn.Parameter(waves(torch.cartesian_prod(row, row), 0.05, C // 4).flatten(1))  # (T, C)
        self.time = nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C))
        self.classes = nn.Embedding(len(classes) + 1, C)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.modulation = nn.Linear(C, 2 * C)
        self.patch_out = nn.Linear(C, channels * patch_size**2)
        for weight in self.blocks.parameters():
            if weight.ndim == 2:
                nn.init.xavier_uniform_(weight)
        for layer in (*(block.modulation for block in self.blocks), self.modulation, self.patch_out):
            for weight in layer.parameters():
                nn.init.zeros_(weight)

    def forward(self, x, t, cond):
        """x (B, channels, size, size), times t (B,) in 0..1, classes cond (B,) -> the velocity, like x, in fp32"""
        patches = F.pixel_unshuffle(x, patch_size)  # (B, channels p p, H / p, W / p)
        x = self.patch_in(patches.flatten(2).mT) + self.place  # (B, T, C)
        c = F.silu(self.time(waves(1000 * t, 1e-4, 128)) + self.classes(cond))  # (B, C)
        for block in self.blocks:
            if gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        scale, shift = self.modulation(c)[:, None].chunk(2, dim=-1)  # (B, 1, C)
        x = self.patch_out(norm(x) * (1 + scale) + shift).float()  # (B, T, channels p p)
        return F.pixel_shuffle(x.mT.reshape(patches.shape), patch_size)

    def draw_times(self, n, rng):
        """-> random times (n,), few near 0 or 1 (Esser et al. 2024, arXiv:2403.03206)"""
        return torch.sigmoid(torch.randn(n, generator=rng, device=rng.device))

    def add_noise(self, x0, noise, t):
        """Flow matching (Liu et al. 2022, arXiv:2209.03003): a picture moves on a straight line, at one
        velocity, into noise. pictures, noise (B, ...), times (B,) -> x_t, and the velocity, to be predicted."""
        t = t.view(-1, *[1] * (x0.ndim - 1))
        return (1 - t) * x0 + t * noise, noise - x0


def sample(dit, cond, seeds, steps, guidance):
    """Follow the velocities from noise to pictures, by Heun's method. cond (B,): classes; a seed for each picture;
    guidance: Ho & Salimans 2022, arXiv:2207.12598. -> (B, *dit.shape)"""

    def predict(x, t):
        t = torch.full((len(cond),), t, device=cond.device)
        if guidance == 1:
            return dit(x, t, cond)
        conds = torch.cat((torch.full_like(cond, dit.none), cond))  # without and with the class
        without, out = dit(torch.cat((x, x)), torch.cat((t, t)), conds).chunk(2)
        return without + guidance * (out - without)

    x = noise_of(seeds, dit.shape).to(cond.device)
    for t, s in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        velocity = predict(x, t)
        velocity = (velocity + predict(x + (s - t) * velocity, s)) / 2  # the mean of both ends of the step
        x = x + (s - t) * velocity
    return x


def noise_of(seeds, shape):
    """-> noise (B, *shape), by the seeds alone, on any device"""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i in seeds])


# ---- Data: pictures -> pixels or latents -> splits, in the cache of `datasets` ----
PICTURES = ".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .jsonl .csv"  # metadata: captions
KINDS = {".parquet": "parquet"} | dict.fromkeys(PICTURES.split(), "imagefolder")
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val"), "validation")


def load_pictures():
    """-> DatasetDict of the splits that the data has and the settings want; train is shuffled"""
    datasets.disable_progress_bars()
    paths = {}  # of the files of each split
    files = {Path(name) for name in (dataset, *glob.glob(f"{glob.escape(dataset)}/**", recursive=True))}
    files = [path for path in files if path.suffix.lower() in KINDS and path.is_file()]  # none hidden
    kind = KINDS[max(files, key=os.path.getsize).suffix.lower()] if files else "hub"
    for file in sorted(file for file in files if KINDS[file.suffix.lower()] == kind):
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)  # of a part, as train-00000-of-00002.parquet
        names = *file.relative_to(dataset).parts[:-1], stem * (kind == "parquet")
        split = next((SPLITS[name] for name in names if name in SPLITS), "train")
        paths.setdefault(split, []).append(str(file))
    with named("dataset", dataset):
        if dataset == "glyphs":
            found = {"train": datasets.Dataset.from_generator(draw_glyphs, gen_kwargs={"size": image_size})}
        elif kind == "hub":
            name, config, revision = re.fullmatch(r"([^:@]*):?([^@]*)@?(.*)", dataset).groups()
            found = datasets.load_dataset(name, config or None, revision=revision or None)
        else:
            classes = {file.parent.name for file in files} - SPLITS.keys()
            kwargs = {"drop_labels": len(classes) < 2} if kind == "imagefolder" else {}
            found = datasets.load_dataset(kind, data_files=paths, **kwargs)
    if "train" not in found:
        fail(f"{dataset=} has no train split, but {', '.join(found)}")
    columns = found["train"].features
    if image_column not in columns:
        fail(f"{dataset=} has no {image_column=}: choose from {', '.join(columns)}")
    wanted = {"validation": val_fraction, "test": test_fraction}
    splits = {SPLITS[split]: rows for split, rows in found.items() if wanted.get(SPLITS.get(split))}
    splits = datasets.DatasetDict(splits, train=found["train"].shuffle(seed=0))
    with named("image_column", image_column):
        return splits.cast_column(image_column, datasets.Image(decode=False))


def choose_conditions(splits):
    """-> the column to learn from, "" for none, and {its values in all splits: names of classes, or captions}"""
    columns, scratch = splits["train"].features, init_from == "scratch"
    column = label_column if scratch else caption_column
    if not scratch and caption:
        return "", {caption: caption}
    if scratch and column not in columns:
        log(f"training without classes: no column {column!r} in {', '.join(columns)}")
        return "", {}
    if column not in columns:  # a .txt file beside a picture is its caption
        for split, rows in splits.items():
            texts = [Path(source["path"] or "?").with_suffix(".txt") for source in rows[image_column]]
            texts = [text.read_text().strip() if text.is_file() else "" for text in texts]
            splits[split] = rows.add_column(column, texts)
    elif isinstance(columns[column], datasets.ClassLabel):
        return column, dict(enumerate(columns[column].names))
    values = {v[0] if isinstance(v, list) else v for rows in splits.values() for v in rows[column][:]}
    if not scratch and not all(values):
        fail(f"{dataset=} lacks captions: add .txt files, --caption= or --caption_column=")
    return column, {value: str(value) for value in sorted(values - {None})}


def read_picture(source):
    """-> pixels (3, S, S), scaled and cropped; None for what is no picture"""
    try:
        with Image.open(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"]) as image:
            image = ImageOps.exif_transpose(image)  # cameras note what is up
        if image.mode[:4] == "I;16":  # else white
            image = image.convert("I").point(lambda v: v / 257)
        image = image.convert("RGBA")  # a transparent pixel has any colour
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return np.asarray(ImageOps.fit(image, (image_size, image_size))).transpose(2, 0, 1)
    except Exception as error:
        return log(f"left out: {(source or {}).get('path')} cannot be read: {error}")


def encode_pictures(batch, column, ids, to_latents):
    """Files -> bytes of pixels or latents in fp16, with flip mirrored too; numbers of classes or captions"""
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(read_picture, batch[image_column]))
    values, rows = batch[column] if column else [caption] * len(pictures), {"x": [], "cond": [], "grey": []}
    for pixels, value in [(p, value) for p, value in zip(pictures, values) if p is not None]:
        x = torch.from_numpy(np.stack([pixels, pixels[:, :, ::-1]][: 1 + flip]))  # (1 or 2, 3, S, S)
        x = to_latents(x / 127.5 - 1).half()
        value = value[0] if isinstance(value, list) else value  # of several the first
        rows["x"] += [view.tobytes() for view in x.cpu().numpy()]
        rows["cond"] += [ids.get(value, len(ids))] * len(x)
        rows["grey"] += [bool((x == x[:, :1]).all())] * len(x)
    return rows


def prepare_data(to_latents):
    """-> ({split: rows}, what run.json says of them, classes or captions); missing splits are cut from train"""
    with named("image_size", image_size):
        z = to_latents(torch.zeros(1, 3, image_size, image_size))  # tells autoencoders apart
    if init_from == "scratch" and z.size(3) % patch_size:
        fail(f"{image_size=}: a side of {z.size(3)} is no multiple of {patch_size=}")
    splits = load_pictures()
    column, names = choose_conditions(splits)
    made_of = [column, names, f"{z.norm():.4g}", init_from, image_column, caption, image_size, flip]
    made_of += map(inspect.getsource, (read_picture, encode_pictures, encode))  # an edit is noticed
    kwargs = {"column": column, "ids": {value: i for i, value in enumerate(names)}, "to_latents": to_latents}
    size = {"batch_size": 128, "writer_batch_size": 128, "remove_columns": splits["train"].column_names}
    for split, rows in splits.items():
        key = Hasher.hash([rows._fingerprint, *made_of])  # else `datasets` hashes all weights
        splits[split] = rows.map(encode_pictures, batched=True, new_fingerprint=key, fn_kwargs=kwargs, **size)
    with named("dataset", dataset):
        for split, fraction in ("test", test_fraction), ("validation", val_fraction):
            if fraction and split not in splits:
                parts = splits["train"].train_test_split(fraction, shuffle=False)
                splits |= {"train": parts["train"], split: parts["test"]}
    for split, rows in splits.items():
        if not len(rows):
            fail(f"{dataset=}: no picture of its {split} split can be read")
    shape = [1 if all(all(rows["grey"][:]) for rows in splits.values()) else z.shape[1], *z.shape[2:]]
    data = {"shape": shape, "classes": list(names.values()) if init_from == "scratch" else []}
    data["rows"] = {split: len(rows) for split, rows in splits.items()}
    log(f"data: {data['rows']}, {len(names)} classes or captions, each {data['shape']}")
    return splits, data, list(names.values())


def collate(rows, shape):
    """-> x (B, *shape), latents, or pixels in [-1, 1]; cond (B,), numbers of classes or captions"""
    x = torch.frombuffer(bytearray(b"".join(row["x"] for row in rows)), dtype=torch.float16).float()
    x = x.view(len(rows), -1)[:, : math.prod(shape)].view(-1, *shape)  # grey ones lose two channels
    return x, torch.tensor([row["cond"] for row in rows])


def batch_rows(n_rows, first_step, last_step, micro, world, rank):
    """Yield the rows of each micro-batch of this process. An epoch is a shuffle; all depends on (seed, step)."""
    n_batches = max(1, n_rows // batch_size)
    for step in range(first_step, last_step):
        epoch, i = divmod(step, n_batches)
        if i == 0 or step == first_step:
            rows = np.random.default_rng([seed, epoch]).permutation(n_rows)
            batches = np.resize(rows, (n_batches, batch_size))  # few rows repeat
        yield from batches[i].reshape(-1, world, micro)[:, rank].tolist()


def noise_batches(accelerator, model, micro_batches, step):
    """[(x, cond)] -> [(x_t, t, cond, target)]; random by seed, step and place in the global batch"""
    rng, noisy = torch.Generator(accelerator.device).manual_seed(hash((seed, step)) % 2**63), []
    noise = torch.randn(batch_size, *model.shape, generator=rng, device=rng.device)
    times = model.draw_times(batch_size, rng)
    dropped = torch.rand(batch_size, generator=rng, device=rng.device) < label_dropout
    mine = [v.unflatten(0, (len(micro_batches), WORLD, -1))[:, RANK] for v in (noise, times, dropped)]
    for (x0, cond), eps, t, drop in zip(micro_batches, *mine):
        x_t, target = model.add_noise(x0.to(rng.device), eps, t)
        noisy.append((x_t, t, cond.to(rng.device).masked_fill(drop, model.none), target))
    return noisy


# ---- Optimizers and learning rate ----


class Muon(torch.optim.Muon):
    """Momentum with orthogonal updates (Jordan 2024, kellerjordan.github.io/posts/muon): torch's, but for all matrices
    of a shape at once, so faster, and in any dtype."""

    def __init__(self, matrices, dtype, **kwargs):
        super().__init__(matrices, adjust_lr_fn="original", **kwargs)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
            for (rows, columns), same_shape in itertools.groupby(matrices, key=lambda p: p.shape):
                params = list(same_shape)
                for p in params:
                    self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
                grads, averages = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, averages, group["momentum"]))  # (n, rows, columns)
                x = (x.mT if rows > columns else x).to(self.dtype)
                x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
                for _ in range(5):  # Newton and Schulz: all singular values come near 1
                    gram = x @ x.mT
                    gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
                    x = torch.baddbmm(x, gram, x, beta=3.4445)
                updates = (x.mT if rows > columns else x).to(params[0].dtype).unbind()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model, accelerator):
    """Muon for the matrices in the blocks, AdamW for all else; or AdamW for all."""
    kwargs = {"betas": (beta1, beta2), "weight_decay": 0.0, "fused": True}
    if optimizer == "adamw" or init_from != "scratch":
        default = 0.001 if init_from == "scratch" else 1e-4 if adapter else 1e-5
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
        return [torch.optim.AdamW(groups, learning_rate or default, **kwargs)]
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if name.startswith("blocks.") and p.ndim == 2 else others).append(p)
    adamw = torch.optim.AdamW(others, adamw_lr, **kwargs)
    kwargs = {"lr": learning_rate or 0.02, "weight_decay": weight_decay, "momentum": 0.95}
    if accelerator.is_fsdp2:  # which cuts matrices into parts: torch's own puts them together
        return [torch.optim.Muon(matrices, adjust_lr_fn="original", **kwargs), adamw]
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return [Muon(matrices, dtype, **kwargs), adamw]


def lr_at(step, total_steps):
    """The learning rate as a fraction of its peak: the least of warm-up and decay."""
    decay = 1.0
    if lr_schedule == "cosine":
        done = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
        decay = 0.5 * (1 + math.cos(math.pi * min(1, done)))
    elif lr_schedule == "wsd":
        decay = min(1.0, (total_steps - step) / max(1, cooldown * total_steps))
    return min((step + 1) / (warmup_steps + 1), min_lr + (1 - min_lr) * decay)


class EMA:
    """An average of the weights over time, measured and saved, as it draws much better."""

    def __init__(self, module):
        self.weights = [p.detach() for p in module.parameters() if p.requires_grad]
        self.averages = [w.clone() for w in self.weights] if ema_decay else []

    def update(self, step):
        decay = min(ema_decay, (1 + step) / (10 + step))  # soon forgets the beginning
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    def swap(self):
        """Let the model have the average, or its own weights again."""
        for weight, average in zip(self.weights, self.averages):
            old = weight.clone()
            weight.copy_(average)
            average.copy_(old)


# ---- The run directory ----


def write_file(name, content):
    """Write bytes, a .json or a .pt; under its name there is always a complete file."""
    temporary = Path(out_dir, f"{name}{RANK}.tmp")
    content = json.dumps(content, indent=1).encode() if name.endswith(".json") else content
    with open(temporary, "wb") as f:
        f.write(content) if isinstance(content, bytes) else torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(Path(out_dir, name))


def gather(accelerator, model, optimizers=(), frozen=False):
    """-> ({name: weight} of what is trained, or with frozen=True of all, a tied one once; the optimizers' state)"""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=not frozen)
    weights, state = dcp.get_state_dict(model, optimizers, options=options)
    module = accelerator.unwrap_model(model)
    once = {name for name, weight in module.named_parameters() if frozen or weight.requires_grad}
    others = {name for name, _ in module.named_parameters(remove_duplicate=False)} - once
    return {name: weight for name, weight in weights.items() if name not in others}, state


def save_state(accelerator, model, optimizers, progress, name, ema=None):
    """Write all that a resume needs, or without optimizers the trained weights."""
    state = {"progress": progress}
    if ema:
        ema.swap()  # on a CPU, gather returns the weights themselves
        state["ema"] = {name: weight.clone() for name, weight in gather(accelerator, model)[0].items()}
        ema.swap()
    state["model"], state["optimizers"] = gather(accelerator, model, optimizers)
    if MAIN:
        write_file(name, state)


def load_state(accelerator, model, optimizers, name, fixed, ema=None):
    """Put back what save_state wrote, read by the first process; -> progress"""
    expected = gather(accelerator, model)[0].keys()
    state = {"model": {}, "ema": {}, "optimizers": {}, "progress": {}}
    options = dcp.StateDictOptions(True, cpu_offload=True, strict=False, broadcast_from_rank0=WORLD > 1)
    with named("checkpoint", f"{out_dir}/{name}"):
        if MAIN:
            state = torch.load(Path(out_dir, name), map_location="cpu", weights_only=True)
            if changed := dict(state["progress"]["fixed"].items() - fixed.items()):
                raise ValueError(f"it was made with {changed}: choose another --out_dir")
            if state["model"].keys() != expected:
                raise ValueError("it holds the weights of another model")
        if ema:
            dcp.set_model_state_dict(model, state["ema"], options=options)
            ema.swap()  # now the average has them
        dcp.set_model_state_dict(model, state["model"], options=options)
        if optimizers:
            dcp.set_optimizer_state_dict(model, optimizers, state["optimizers"], options=options)
    return broadcast_object_list([state["progress"]])[0]


def open_run_dir():
    """End the program if out_dir holds other files, or a run that is not to be resumed or overwritten."""
    with named("out_dir", out_dir):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        files = {path.name for path in Path(out_dir).iterdir() if path.suffix != ".tmp"}
    if MAIN and files and ("run.json" not in files or not (resume or overwrite)):
        fail(f"{out_dir} holds {min(files)}: choose another, or for a run --resume=True or --overwrite=True")


def write_run(model, data):
    """-> the content of run.json, written beside the script as it is"""
    run = {"kind": "diffusion", "model": type(model).__name__.removeprefix("FSDP"), "command": sys.argv}
    run |= {"settings": settings(globals()), "data": data}
    run["versions"] = {package.__name__: package.__version__ for package in (torch, transformers, datasets)}
    run["parameters"] = sum(p.numel() for p in model.parameters())
    run["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    write_file("run.json", run)
    shutil.copy(__file__, out_dir)
    log(f"model: {run['parameters']:,} parameters, {run['trained_parameters']:,} of them trained")
    return run


# ---- Starting, evaluating, training, stopping ----
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
MAIN = RANK == 0  # the first of all processes writes and reports
log = functools.partial(print, flush=True) if MAIN else lambda message: None
STOP = []  # the signals that ask the run to stop


def catch_signals():
    """Note Ctrl-C, SIGTERM, on Linux the launcher's death: one wish to stop, of which workers may die."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda s, _: STOP.append(s) or signal.signal(signal.SIGCHLD, signal.SIG_DFL))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
        if os.getppid() != PARENT:  # it is dead already
            STOP.append(signal.SIGTERM)


def finish(accelerator, step, stop):
    """End this process when all are here."""
    log(f"stopped at step {step}; the same command with --resume=True goes on" if stop else "done")
    code = 128 + (STOP or [signal.SIGTERM])[0] if stop else 0
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if WORLD > 1:  # gloo's threads may abort a process that ends in the usual way
        os._exit(code)
    raise SystemExit(code)


def start_accelerator():
    """-> an Accelerator on the best device there is, with precision and threads set."""
    on_cpu, cpu = not torch.accelerator.is_available(), torch.cpu.get_capabilities()
    bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16") if on_cpu else torch.cuda.is_bf16_supported(False)
    precision = ("bf16" if bf16 else "no") if mixed_precision == "auto" else mixed_precision
    torch.set_float32_matmul_precision("high")  # TF32: much faster
    torch.autograd.set_detect_anomaly(detect_anomaly)
    torch.use_deterministic_algorithms(deterministic)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each makes the model, and keeps a part
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # the others wait while one reads pictures
    kwargs = {"log_with": tracker or None, "project_dir": out_dir, "kwargs_handlers": [patient]}
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, **kwargs)
    if accelerator.is_fsdp2:  # weights stay in fp32, autocast computes in bf16
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        torch.set_autocast_cache_enabled(False)  # which would keep all weights in bf16
    if on_cpu:  # `accelerate launch` leaves a process one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        log("warning: no GPU was found, which is fine for small models only")
    if on_cpu and sys.platform == "linux":
        libc = ctypes.CDLL(None)  # keep what a step frees: new pages cost a quarter
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    log(f"device: {accelerator.device.type} x {WORLD}, precision {precision}")
    return accelerator


@torch.no_grad()
def evaluate(accelerator, model, split, rows, micro, batches):
    """-> the loss of a split, in all and by quarter of the times; each picture has its own noise. batches: how
    many, spread evenly; 0: all"""
    n, device, losses = min(len(rows), batches * batch_size or len(rows)), accelerator.device, np.zeros(4)
    mine = np.linspace(0, len(rows) - 1, n).astype(int)[RANK::WORLD]
    module = accelerator.unwrap_model(model).eval()
    for i in range(0, math.ceil(n / WORLD), micro):
        numbers = mine[i : i + micro].tolist() or [0]
        x0, cond = (value.to(device) for value in collate(rows.__getitems__(numbers), module.shape))
        noise = noise_of(numbers, module.shape).to(device)
        within = torch.tensor(numbers, device=device) * 0.618034 % 1  # fills a quarter evenly
        for quarter in range(4):
            t = (quarter + within) / 4
            x_t, target = module.add_noise(x0, noise, t)
            with accelerator.autocast():
                loss = F.mse_loss(model(x_t, t, cond), target)
            losses[quarter] += float(loss) * len(mine[i : i + micro])  # 0 where only others need a pass
    losses = (np.sum(gather_object([losses]), axis=0) / n).tolist()
    by_time = {f"{split}/loss/{i / 4:g}-{(i + 1) / 4:g}": loss for i, loss in enumerate(losses)}
    return {f"{split}/loss": sum(losses) / 4, **by_time}


def evaluate_and_save(accelerator, model, ema, splits, micro, progress, report):
    """Report the validation loss, keep the best weights (without it the last), draw pictures."""
    loss, module, step = -math.inf, accelerator.unwrap_model(model).eval(), progress["step"]
    ema.swap()
    if "validation" in splits:
        report(values := evaluate(accelerator, model, "val", splits["validation"], micro, eval_batches))
        loss = values["val/loss"]
    progress["waited"] += step > 0
    if step and loss <= progress["best"]:
        progress |= {"best": loss, "waited": 0}
        weights, _ = gather(accelerator, model, frozen=not adapter)
        if MAIN and init_from == "scratch":
            write_file("model.safetensors", safetensors.torch.save(weights))
        elif MAIN:
            save_pipeline(module, weights)
        if "test" in splits:
            save_state(accelerator, model, [], progress, "best.pt")
    # all draw, for FSDP2; compiled, each new size of batch takes a minute
    autocast = accelerator.autocast if init_from == "scratch" else contextlib.nullcontext
    with autocast(), torch.compiler.set_stance("force_eager"):
        pictures = draw(module, module.prompts, range(seed, seed + len(module.prompts)))
    ema.swap()
    module.train()
    if MAIN:
        path = Path(out_dir, f"samples/step_{step:08d}.png")
        path.parent.mkdir(exist_ok=True)
        make_grid(pictures).save(path)
        if adapter and step and loss == -math.inf:  # to choose the best by eye
            shutil.copy(Path(out_dir, "pytorch_lora_weights.safetensors"), path.with_suffix(".safetensors"))


def make_model(accelerator):
    """-> (model, {split: rows}, what run.json says of them)"""
    model, to_latents = None, encode
    if init_from != "scratch":  # first: a wrong name costs no reading
        model = load_pipeline(accelerator.mixed_precision, accelerator.device.type)
        to_latents = model.encode
    with accelerator.local_main_process_first():  # the others read what the first has cached
        splits, data, names = prepare_data(to_latents)
        if MAIN and overwrite:
            shutil.rmtree(out_dir)
            Path(out_dir).mkdir()
        if MAIN and not Path(out_dir, "run.json").exists():  # now it is a run
            write_file("run.json", {"kind": "diffusion"})
        if model:
            model.prepare(names, data["shape"])  # encodes the captions
    torch.manual_seed(seed)
    return model or DiT(data["shape"], names), splits, data


def main():
    check_settings()
    accelerator = start_accelerator()
    gpu, micro = torch.cuda.is_available(), micro_batch_size or max(1, batch_size // WORLD)
    accumulation = batch_size // (micro * WORLD)  # forward passes of a step, each of `micro` pictures
    if accumulation * micro * WORLD != batch_size:
        fail(f"{batch_size=} is no multiple of {micro} pictures x {WORLD} processes")
    open_run_dir()
    model, splits, data = make_model(accelerator)
    optimizers = make_optimizers(model, accelerator)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    if compile and gpu:
        model.compile()
    model, *prepared = accelerator.prepare(model, *optimizers)
    module = accelerator.unwrap_model(model)
    if accelerator.is_fsdp2:
        model.set_reshard_after_forward(True)  # gathered weights must not outlive a swap of EMA
        model._get_fsdp_state()._lazy_init()  # an inner part may draw before the first step

    ema = EMA(module)
    fixed = {name: globals()[name] for name in FIXED.split()} | {"rows": len(splits["train"])}
    progress = {"step": 0, "best": math.inf, "waited": 0, "seconds": 0.0, "metrics_bytes": 0, "fixed": fixed}
    if broadcast_object_list([resume and Path(out_dir, "checkpoint.pt").exists()])[0]:
        progress = load_state(accelerator, model, optimizers, "checkpoint.pt", fixed, ema)
        log(f"resumed from {out_dir}/checkpoint.pt at step {progress['step']}")
    step = progress["step"]
    groups = [group for o in optimizers for group in o.param_groups]  # load_state makes new ones
    n_batches = max(1, len(splits["train"]) // batch_size)
    total_steps = math.ceil(epochs * n_batches) if epochs else max_steps
    if MAIN:
        run = write_run(module, data)
        metrics = open(Path(out_dir, "metrics.jsonl"), "ab", buffering=0)  # noqa: SIM115
        metrics.seek(metrics.truncate(progress["metrics_bytes"]))  # the rest is done again
    with named("tracker", tracker):  # without a login: WANDB_MODE=offline
        accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "train_diffusion"), settings(globals()))

    def report(values):
        if MAIN:
            row = {"step": step, "time": round(time.monotonic() - start, 3), **values}
            metrics.write(json.dumps(row).encode() + b"\n")
        accelerator.log(values, step=step)
        log(f"step {step}/{total_steps} " + " ".join(f"{name} {value:.5g}" for name, value in values.items()))

    catch_signals()  # before the workers, which Ctrl-C must not end
    order = batch_rows(len(splits["train"]), step, total_steps, micro, WORLD, RANK)
    read = functools.partial(collate, shape=module.shape)
    loader = DataLoader(splits["train"], batch_sampler=order, collate_fn=read, num_workers=num_workers)
    batches, start = iter(loader), time.monotonic() - progress["seconds"]
    profiler = torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(out_dir))
    since, step_since, skipped = time.monotonic(), step, 0
    while True:
        # save, then evaluate: a run that goes on from here does both again
        if STOP:
            accelerator.set_trigger()
        stop, done = accelerator.check_trigger(), step >= total_steps
        if step and (stop or done or step % (save_interval or math.inf) == 0):
            progress["seconds"] = time.monotonic() - start
            progress["metrics_bytes"] = metrics.tell() if MAIN else 0
            save_state(accelerator, model, optimizers, progress, "checkpoint.pt", ema)
        if not stop and (done or step % (eval_interval or math.inf) == 0):
            evaluate_and_save(accelerator, model, ema, splits, micro, progress, report)
            since, step_since = time.monotonic(), step  # speed is measured between evaluations
        if stop or done or 0 < patience <= progress["waited"]:
            break

        # one step by the mean loss over all pictures of the global batch
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * lr_at(step, total_steps)
            if "momentum" in group:  # of muon: shorter while gradients turn quickly
                group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)
        micro_batches = [next(batches) for _ in range(accumulation)]
        micro_batches = noise_batches(accelerator, module, micro_batches, step)
        torch.manual_seed(hash((seed, step, RANK)))  # for a pipeline's dropout
        loss = 0.0
        for i, (x, t, cond, target) in enumerate(micro_batches):
            sync = i == accumulation - 1 or accelerator.is_fsdp2  # which has no room for whole gradients
            with contextlib.nullcontext() if sync else accelerator.no_sync(model):
                with accelerator.autocast():
                    part = F.mse_loss(model(x, t, cond), target) * micro / batch_size  # of the mean
                accelerator.backward(part * WORLD)  # DDP and FSDP2 take the mean over processes
            loss += part.detach()
        grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
        loss = float(accelerator.reduce(loss, "sum"))
        finite = math.isfinite(loss + grad_norm)  # in one process as in all
        for optimizer in prepared:
            if finite or accelerator.scaler:  # fp16's scaler skips it itself, and lowers its scale
                optimizer.step()
            optimizer.zero_grad()
        if finite and ema_decay:
            ema.update(step)
        progress["step"] = step = step + 1
        skipped = 0 if finite else skipped + 1
        if skipped:
            log(f"step {step}: the loss or the gradient is not finite: skipped")
        if skipped == 10:
            raise SystemExit("ten such steps in a row: lower learning_rate, or try --detect_anomaly=True")
        if step % (log_interval or math.inf) == 0 or step == total_steps:
            values = {"train/loss": loss, "grad_norm": grad_norm, "lr": groups[0]["lr"]}
            values["images_per_s"] = (step - step_since) * batch_size / (time.monotonic() - since)
            memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
            report(values | {"memory_gb": memory / 1e9, "epoch": step / n_batches})
            since, step_since = time.monotonic(), step
        if profile and step in (5, 8):
            profiler.start() if step == 5 else profiler.stop()

    # the end: the test loss of the best weights
    summary = {"steps": step, "minutes": (time.monotonic() - start) / 60}
    summary |= {"val/loss": progress["best"]} if math.isfinite(progress["best"]) else {}
    ema.swap()
    if "test" in splits and not stop:
        if math.isfinite(progress["best"]):
            load_state(accelerator, model, [], "best.pt", fixed)
        report(values := evaluate(accelerator, model, "test", splits["test"], micro, 0))
        summary |= values
    if MAIN and not stop:
        write_file("run.json", run | {"summary": summary})
    finish(accelerator, step, stop)


# ---- Drawing, latents, the default data ----


def load(folder, run, base=""):
    """-> the model of a run, ready to draw; run: its run.json; base: where the pipeline under an adapter is"""
    globals().update(run["settings"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if init_from != "scratch":
        return load_pipeline("bf16" * torch.cuda.is_bf16_supported(False), device, folder, base)
    dit = DiT(run["data"]["shape"], run["data"]["classes"])
    safetensors.torch.load_model(dit, Path(folder, "model.safetensors"))
    return dit.to(device).eval()


@torch.no_grad()
def draw(model, conditions, seeds, steps=0, guidance=-1.0, negative_prompt="", lora_scale=1.0):
    """-> a PIL image for each seed and condition: a prompt, or the name of a class, "" of none"""
    steps, guidance = steps or sample_steps, guidance if guidance >= 0 else globals()["guidance"]
    if init_from != "scratch":
        return model.draw(conditions, seeds, steps, guidance, negative_prompt, lora_scale)
    names = [*model.class_names, ""]
    for name in set(conditions).difference(names):
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        fail(f"there is no class {name!r}; did you mean {nearest!r}?")
    guidance = 1.0 if len(names) == 1 or not label_dropout else guidance if guidance >= 0 else 2.0
    cond = torch.tensor([names.index(name) for name in conditions], device=model.place.device)
    x = sample(model, cond, seeds, steps or 25, guidance)
    if vae:  # in fp32; one by one for memory
        autoencoder = load_vae(vae).to(x.device)
        x = x / autoencoder.config.scaling_factor + (autoencoder.config.shift_factor or 0.0)
        with torch.autocast(x.device.type, enabled=False):
            x = torch.cat([autoencoder.decode(z).sample for z in x.split(1)])
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(pixels.squeeze()) for pixels in x]


def make_grid(pictures):
    """PIL images of one size -> one image of all, in ceil(sqrt(n)) columns"""
    pixels, columns = [np.asarray(picture) for picture in pictures], math.ceil(math.sqrt(len(pictures)))
    pixels += [np.zeros_like(pixels[0])] * (-len(pixels) % columns)
    return Image.fromarray(np.vstack([np.hstack(row) for row in zip(*[iter(pixels)] * columns)]))


@functools.cache
def load_vae(vae):
    """-> the AutoencoderKL of that name, in fp32, as some make black pictures in less"""
    from diffusers import AutoencoderKL

    with named("vae", vae):
        return AutoencoderKL.from_pretrained(vae).float().eval().to(PartialState().device)


@torch.no_grad()
def encode(x, autoencoder=None):
    """pictures (B, 3, H, W) in [-1, 1] -> latents (B, c, h, w) with a variance of about 1"""
    if not (autoencoder or vae):
        return x
    autoencoder = autoencoder or load_vae(vae)
    config, x = autoencoder.config, x.to(autoencoder.device)
    encoded = autoencoder.encode(x[:, :, None] if "z_dim" in config else x)  # a frame, for a video's
    z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
    std = config.get("latents_std") or [1 / (config.get("scaling_factor") or 1.0)]
    mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (mean, std))
    return (z.view(*z.shape[:2], *z.shape[-2:]) - mean) / std


def draw_glyphs(size):
    """Yield 256 pictures of every character, white on black, each a little different."""
    rng, big = np.random.default_rng(0), 4 * size  # reduced at the end: smooth edges
    for character in 256 * "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        image, font = Image.new("L", (big, big)), ImageFont.load_default(big * rng.uniform(0.9, 1.15))
        place, bold = tuple(big * rng.uniform(0.43, 0.57, 2)), int(big * rng.uniform(0, 0.06))
        ImageDraw.Draw(image).text(place, character, 255, font, "mm", stroke_width=bold)
        image = image.rotate(rng.uniform(-10, 10), Image.BILINEAR).reduce(4)
        image.save(file := io.BytesIO(), "png")
        yield {"image": {"bytes": file.getvalue(), "path": None}, "label": character}


# ---- Fine-tuning: only with init_from ----
# A pipeline's own call is the forward function of its model: run for one step, it hands the model's output to
# the scheduler, which here stands still. Signs, units of time, packing, positions and all else that a family
# does its own way are the pipeline's business.


class StillScheduler:
    """One step, a time for each picture; StopIteration carries the model's output out of the call."""

    order, init_noise_sigma, times = 1, 1.0, None

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None, **_):
        if self.times is None:
            raise StopIteration  # only captions were wanted
        self.timesteps = self.sigmas = [self.times]  # (B,)

    def scale_model_input(self, sample=None, *_):
        return sample

    def step(self, model_output, *_, **__):
        raise StopIteration(model_output)

    set_begin_index = scale_model_input


def join(parts):
    """What encode_prompt returns for each caption alone -> for all at once."""
    if isinstance(parts[0], tuple):
        return tuple(map(join, zip(*parts)))
    if isinstance(parts[0], list):
        return list(itertools.chain(*parts))
    # a tensor without a batch axis (Flux's text_ids) or None is the same for all
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) and len(parts[0]) == 1 else parts[0]


class Pipeline(nn.Module):
    """A text-to-image pipeline that trains like DiT: its parameters are those of the transformer or UNet."""

    def __init__(self, pipe, name, device):
        super().__init__()
        self.pipe, self.name, self.denoiser, kind = pipe, name, getattr(pipe, name), type(pipe)
        self.dtype, self.device = self.denoiser.dtype, torch.device(device)
        self.compile = self.denoiser.compile  # in place
        self.scheduler, self.still, self.is_batched = pipe.scheduler, StillScheduler(), False
        self.still.config = config = pipe.scheduler.config
        self.is_flow = "FlowMatch" in type(self.scheduler).__name__ or "flow" in config.prediction_type
        # what FSDP2 gathers at a time; drawing calls the denoiser itself
        parts = *(self.denoiser._no_split_modules or ()), type(self.denoiser).__name__
        self._no_split_modules = {type(m).__name__ for m in self.modules()}.intersection(parts)
        self.call = inspect.unwrap(kind.__call__)  # without its @torch.no_grad()
        self.keywords = inspect.signature(self.call).parameters
        pipe._guidance_scale = 1.0  # none, but for Z-Image, where 0 is none
        scale = 0.0 if getattr(pipe, "do_classifier_free_guidance", False) else 1.0
        self.unguided = {"guidance_scale": scale, "true_cfg_scale": 1.0, "num_inference_steps": 1}
        pipe.set_progress_bar_config(disable=True)
        pipe.__class__ = type(kind.__name__, (kind,), {"_execution_device": self.device})
        # in fp32: some pipelines hand it latents in the denoiser's precision
        decode = pipe.vae.to(device).decode
        pipe.vae.decode = lambda z, *args, **kwargs: decode(z.to(pipe.vae.dtype), *args, **kwargs)

    def run(self, scheduler, **kwargs):
        """The pipeline's call -> what it returns, or the model's output if the scheduler ends it"""
        self.pipe.__dict__["scheduler"] = scheduler  # model_index.json keeps its own
        kwargs |= {"height": image_size, "width": image_size, "return_dict": False}
        kwargs |= {"use_resolution_binning": False, "use_pe": False}  # no other size, no other prompt
        try:
            return self.call(self.pipe, **{k: v for k, v in kwargs.items() if k in self.keywords})[0]
        except StopIteration as reached:
            return reached.value

    def forward(self, x, t, cond):
        """noisy latents x (B, ...), times t (B,) in 0..1, numbers of captions cond (B,) -> like x, in fp32"""
        if len(x) > 1 and not self.is_batched:
            return torch.cat([self.forward(*one) for one in zip(x.split(1), t.split(1), cond.split(1))])
        self.still.times = 1000 * t if self.is_flow else (1000 * t).floor()
        kwargs = self.unguided | {"latents": x.to(self.dtype), "output_type": "latent"}
        output = self.run(self.still, prompt=[self.captions[i] for i in cond.tolist()], **kwargs)
        return (output if output.ndim == x.ndim else output.mT.reshape(x.shape)).float()  # Flux.2's is packed

    def draw_times(self, n, rng):
        if not self.is_flow:
            return (torch.randint(1000, (n,), generator=rng, device=rng.device) + 0.5) / 1000
        t, config = DiT.draw_times(self, n, rng), self.still.config
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        t = shift * t / (1 + (shift - 1) * t)  # noisier for large pictures
        return (1000 * t).to(self.dtype).float() / 1000  # as a pipeline in bf16 rounds it

    def add_noise(self, x0, noise, t):
        """As DiT's, or x_t = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, of which eps is predicted (Ho et al. 2020,
        arXiv:2006.11239), or v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv:2202.00512)."""
        if self.is_flow:
            return DiT.add_noise(self, x0, noise, t)
        alpha_bar = self.scheduler.alphas_cumprod.to(t.device)[(1000 * t).long()]
        alpha_bar = alpha_bar.view(-1, *[1] * (x0.ndim - 1))
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        is_eps = self.still.config.prediction_type == "epsilon"
        return alpha * x0 + sigma * noise, noise if is_eps else alpha * noise - sigma * x0

    @torch.no_grad()
    def encode(self, pixels):
        """pictures (B, 3, H, W) in [-1, 1] -> latents as the denoiser takes them"""
        pipe, z = self.pipe, encode(pixels, self.pipe.vae)
        if hasattr(pipe, "_patchify_latents"):  # Flux.2
            bn, eps = pipe.vae.bn, pipe.vae.config.batch_norm_eps
            return F.batch_norm(pipe._patchify_latents(z), bn.running_mean, bn.running_var, eps=eps)
        return pipe._pack_latents(z, *z.shape) if hasattr(pipe, "_pack_latents") else z

    @torch.no_grad()
    def encode_prompt(self, *args, **kwargs):
        """The pipeline's own, but what it returns for a caption is kept in out_dir/captions."""
        own, parts = type(self.pipe).encode_prompt, []
        bound = inspect.signature(own).bind(self.pipe, *args, **kwargs)
        for caption in bound.arguments["prompt"]:
            bound.arguments["prompt"] = [caption]
            file = f"captions/{Hasher.hash(f'{bound.args[1:]} {bound.kwargs} {self.dtype}')}.pt"
            if not Path(out_dir, file).exists():
                write_file(file, own(*bound.args, **bound.kwargs))
            parts.append(torch.load(Path(out_dir, file), map_location=self.device.type, mmap=True))
        return join(parts)

    def prepare(self, captions, shape):
        """Encode captions, the last of which is "", of dropped ones, and prompts; the text encoders leave memory."""
        if not adapter and not Path(out_dir, "model_index.json").exists():
            self.pipe.save_pretrained(out_dir, max_shard_size="1TB")  # one file
        Path(out_dir, "captions").mkdir(exist_ok=True)
        self.shape, self.captions, self.none = shape, [*captions, ""], len(captions)
        prompts = [text.strip() for text in sample_prompts.split("|") if text.strip()] or captions[:4]
        self.prompts = (prompts * 4)[: max(4, len(prompts))]
        self.pipe.encode_prompt = self.encode_prompt
        encoders = [k for k, v in self.pipe.components.items() if v and k.startswith("text_encoder")]
        with named("init_from", init_from):
            for name in encoders:
                getattr(self.pipe, name).to(self.device)
            for text in tqdm(self.captions, "captions", leave=False, disable=not sys.stderr.isatty()):
                self.run(self.still, prompt=[text], **self.unguided)
            for text in prompts:
                self.run(self.still, prompt=[text], **self.drawing_kwargs(sample_steps, guidance))
            for name in encoders:
                setattr(self.pipe, name, None)
            self.to(self.device)
            self.probe(captions.index(max(captions, key=len)), len(captions))

    def probe(self, *numbers):
        """Refuse what cannot be trained; freeze what has no gradient (DDP would wait); see if a call takes two."""
        S, calls, is_same = image_size, [], False
        z = self.encode(torch.arange(6.0 * S * S).sin().view(2, 3, S, S))
        cond = torch.tensor(numbers, device=z.device)
        t = self.draw_times(2, torch.Generator(z.device).manual_seed(0))
        hook = self.denoiser.register_forward_hook(lambda *_: calls.append(1))
        alone = self(z, t, cond)
        hook.remove()
        if len(calls) != 2:
            raise ValueError(f"its model is called {len(calls) / 2:g} times a step, not once")
        alone.square().mean().backward()
        for weight in self.parameters():
            weight.requires_grad_(weight.grad is not None)
            weight.grad = None
        self.is_batched = True  # not so where captions differ in length, or a call takes one time
        with torch.no_grad(), contextlib.suppress(Exception):
            both, swapped = self(z, t, cond), self(z, t, cond.flip(0))
            is_same = bool((both - alone).norm() < 0.1 * (swapped - alone).norm())
        self.is_batched = is_same
        log("pictures pass " + ("together" if is_same else "one by one"))

    def drawing_kwargs(self, steps, scale, negative=""):
        kwargs = {"num_inference_steps": steps or -1, "guidance_scale": scale, "negative_prompt": negative}
        if getattr(self.keywords.get("true_cfg_scale"), "default", 0) > 1:  # Qwen-Image, which needs both
            kwargs |= {"true_cfg_scale": scale, "negative_prompt": negative or " "}
        return {name: value for name, value in kwargs.items() if value not in ("", -1)}

    def draw(self, prompts, seeds, steps, scale, negative, lora_scale):
        """-> a PIL image for each prompt and seed, one a call"""
        for layer in self.denoiser.modules():  # set_adapters would unfreeze
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", lora_scale)
        kwargs, pictures = self.drawing_kwargs(steps, scale, negative and [negative]), []
        for prompt, number in zip(prompts, seeds):
            rng = torch.Generator().manual_seed(number)  # the same noise on any device
            pictures += self.run(self.scheduler, prompt=[prompt], generator=rng, **kwargs)
        return pictures


def load_pipeline(precision, device, folder="", base=""):
    """-> init_from, ready to train, in fp32, or under an adapter in the precision of training; or the run in `folder`,
    ready to draw. LoRA: Hu et al. 2021, arXiv:2106.09685"""
    import diffusers
    import peft

    source = folder if folder and not adapter else base or init_from
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16} if adapter or folder else {}
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    with named("init_from", source):
        config = diffusers.DiffusionPipeline.load_config(source)
        kind = getattr(diffusers, config["_class_name"])
        names = [name for name in config if name.startswith(("transformer", "unet")) and config[name][0]]
        if len(names) != 1 or not hasattr(kind, "encode_prompt") or "EDM" in config["scheduler"][1]:
            raise ValueError(f"a {kind.__name__} must have captions, one denoiser, and no EDM scheduler")
        if adapter and not hasattr(kind, "save_lora_weights"):
            raise ValueError(f"a {kind.__name__} takes no LoRA")
        dtypes = {"vae": torch.float32, "default": dtypes.get(precision, torch.float32)}
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtypes, safety_checker=None)
        model = Pipeline(pipe, names[0], device)
        if folder and adapter:
            pipe.load_lora_weights(folder, "default", weight_name="pytorch_lora_weights.safetensors")
    if folder:
        pipe.to(device)
        return model.eval()
    if adapter:
        pattern = r"\.attn\d\." if names[0] == "unet" else r"\.\d+\."  # or blocks, which have numbers
        linear = [name for name, m in model.denoiser.named_modules() if isinstance(m, nn.Linear)]
        targets = lora_targets.split(",") if lora_targets else [n for n in linear if re.search(pattern, n)]
        lora = {"r": lora_rank, "lora_alpha": lora_alpha, "init_lora_weights": "gaussian"}
        torch.manual_seed(seed)
        with named("lora_targets", lora_targets):
            model.denoiser.add_adapter(peft.LoraConfig(target_modules=targets, **lora))
        diffusers.training_utils.cast_training_params(model, torch.float32)
    if gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    return model.train()


def save_pipeline(model, weights):
    """Write weights {name: tensor} of adapter or denoiser to out_dir as diffusers does."""
    weights = {name.removeprefix("denoiser."): weight.contiguous() for name, weight in weights.items()}
    if not adapter:
        file = f"{model.name}/diffusion_pytorch_model.safetensors"
        return write_file(file, safetensors.torch.save(weights))
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model.denoiser, weights)
    config = model.denoiser.peft_config["default"].to_dict()  # with alpha
    kwargs = {f"{model.name}_lora_layers": weights, f"{model.name}_lora_adapter_metadata": config}
    model.pipe.save_lora_weights(out_dir, weight_name="lora.tmp", **kwargs)
    Path(out_dir, "lora.tmp").replace(Path(out_dir, "pytorch_lora_weights.safetensors"))
    if model.name == "unet":  # for ComfyUI
        kohya = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in weights.items()})
        alphas = {name: torch.tensor(float(lora_alpha)) for name in kohya if name.endswith(".alpha")}
        write_file("kohya_lora.safetensors", safetensors.torch.save(kohya | alphas))


if __name__ == "__main__":
    configure(globals())
    main()
