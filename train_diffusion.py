"""
Train a diffusion model: one file with the model, the mathematics, the data, the loop.

    accelerate launch train_diffusion.py                                # letters and digits, anywhere
    accelerate launch train_diffusion.py configs/cifar10.py --n_layer=8
    accelerate launch train_diffusion.py configs/my_pictures.py --dataset=photos/ --out_dir=out/mine
    accelerate launch train_diffusion.py configs/sd15_lora.py --dataset=photos/ # adapt Stable Diffusion

Then `python sample.py --out_dir=out/diffusion` draws from it. Ctrl-C saves; --resume=True goes on.
"""

import os

PARENT = os.getppid()  # before the slow imports, to notice a launcher that dies during them

import contextlib
import ctypes
import functools
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import platform
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from configurator import configure, fail, nearest, settings

# -----------------------------------------------------------------------------
# Settings: change them here, in a config file, or by --name=value. Legal values stand in brackets.
# -----------------------------------------------------------------------------
# the run
out_dir = "out/diffusion"  # everything that the run writes
resume = False  # True: go on from the newest checkpoint in out_dir, or start if there is none
overwrite = False  # True: delete the run in out_dir and start anew
seed = 1337  # of the first weights, the order of the pictures, noise and times
# data
dataset = "glyphs"  # "glyphs" (letters, digits), a folder of pictures, .parquet, a hub name:config@revision
image_column = "image"  # the column with the pictures, in .parquet and hub data
label_column = "label"  # the column with their classes, in a folder its subfolders; "": train without classes
caption_column = "text"  # with init_from: the column with captions, in a folder metadata.jsonl or .txt files
caption = ""  # or the one caption of all pictures
val_fraction = 0.05  # of the data, for the validation split if there is none of its own; 0: none (0..<1)
test_fraction = 0.05  # likewise for the test split, which is looked at once, at the end (0..<1)
fold = ""  # "2/5": validate on the second of five parts instead (cross-validation)
image_size = 16  # pixels, in height and width; the shorter side is scaled to it, the longer one cropped (1..)
crop = "center"  # random: another part of the longer side each time ("center" | "random")
flip = False  # mirror every other picture, where left and right are alike; letters would suffer
num_workers = 0  # DataLoader processes; 0 is fastest on a CPU, a few help a fast GPU
# model (with init_from, the next three lines alone: the others, and the objective, are that pipeline's)
init_from = "scratch"  # or a pipeline to go on from: Stable Diffusion 1, 2, XL, DDPM; a hub name, a folder
base_dtype = "auto"  # of its weights under an adapter; auto: bf16 on CUDA ("auto" | "fp32" | "bf16")
adapter = ""  # lora: train a few new weights, and leave those of init_from alone ("" | "lora")
vae = ""  # train in the latents of this AutoencoderKL of diffusers (hub name or folder); "": in pixels
patch_size = 2  # pixels, or latents, of a token in height and width: smaller is better and slower (1..)
n_layer = 6  # transformer blocks (1..)
n_head = 2  # attention heads; of size 64 they are fastest (1..)
n_embd = 128  # width; n_embd / n_head, the size of a head, must be a multiple of 4 (1..)
# adapter
lora_rank = 16  # of the two matrices whose product is added to a frozen one: how much can be learned (1..)
lora_alpha = 16.0  # the product counts lora_alpha / lora_rank times (1..)
lora_targets = "to_q,to_k,to_v,to_out.0"  # the layers of the UNet that get one, by the end of their names
# diffusion
objective = "flow"  # what the model predicts: velocity, noise, or a mix of both ("flow" | "eps" | "v")
time_mean = 0.0  # flow: mean of the logit of the times that are trained on; above 0: more noise (-9..9)
time_std = 1.0  # flow: its standard deviation; smaller: fewer times near 0 and 1
beta_schedule = "linear"  # eps and v: how fast the noise grows ("linear" | "cosine")
zero_snr = False  # v: the last time is noise alone, without a trace of the picture
min_snr = 0.0  # eps and v: weigh the times by min(signal to noise, this); 5 is usual; 0: do not weigh
label_dropout = 0.1  # how often class or caption is hidden: guidance needs to know pictures without (0..1)
ema_decay = 0.999  # an average of the weights over about 1 / (1 - this) steps is kept; 0: none (0..<1)
# pictures at evaluation, and the defaults of sample.py
sampler = ""  # "": heun, or dpm++ for eps, v ("" | "euler" | "heun" | "ddpm" | "ddim" | "dpm++" | "unipc")
sample_steps = 25  # steps from noise to picture; heun asks the model twice in each (1..1000)
guidance = 2.0  # exaggerate what is typical of class or caption; 1: draw from the model as it is
sample_prompts = ""  # with captions: what to draw, with | between them; "": the first captions of the data
fd_samples = 0  # pictures for the Fréchet distance at the end, some thousands; 0: none
fd_model = "facebook/dinov2-base"  # the vision model of transformers in whose features it is measured
# batch and length
batch_size = 64  # pictures per optimizer step, over all processes and micro-batches (1..)
micro_batch_size = 0  # pictures per process and forward pass, fewer if memory is short; 0: no accumulation
max_steps = 700  # optimizer steps; 0: only evaluate
epochs = 0.0  # passes over the data, instead of max_steps; 0: by max_steps
# optimizer and learning rate
optimizer = "muon"  # with AdamW for all but the blocks; with init_from always AdamW ("muon" | "adamw")
learning_rate = 0.0  # peak; 0: muon 0.02, adamw 0.001, with init_from 1e-5, lora 1e-4
adamw_lr = 0.005  # peak, of AdamW beside muon
beta1 = 0.8  # AdamW's memory of the gradient (0..<1)
beta2 = 0.95  # AdamW's memory of the squared gradient (0..<1)
weight_decay = 0.03  # of the matrices in the blocks; with adamw of all weights
warmup_steps = 20  # steps in which the learning rate rises to its peak
lr_schedule = "wsd"  # warm-up, stable, decay; or cosine; or constant ("wsd" | "cosine" | "constant")
cooldown = 0.9  # the last part of the steps, in which wsd decays (0..1)
min_lr = 0.02  # learning rate at the end, as a fraction of its peak (0..1)
grad_clip = 1.0  # largest norm of the gradient; 0: unlimited
# evaluation, saving, reports
eval_interval = 350  # steps (1..)
eval_batches = 4  # batches of batch_size, spread evenly over the validation split; 0: all of it
log_interval = 10  # steps (1..)
save_interval = 350  # steps between checkpoints (1..)
keep_checkpoints = 2  # how many stay on disk, the newest (1..)
keep = "best"  # the weights in out_dir: of the best validation loss or of the last step ("best" | "last")
patience = 0  # stop after so many evaluations without a better validation loss; 0: never
tracker = ""  # beside metrics.jsonl ("" | "wandb" | "tensorboard")
# the machine
mixed_precision = "auto"  # auto: bf16 where the hardware has it, else no ("auto" | "no" | "bf16" | "fp16")
compile = True  # torch.compile on CUDA: a minute at the start, then much faster; has no effect elsewhere
gradient_checkpointing = False  # compute activations again in the backward pass: slower, in far less memory
deterministic = False  # bitwise repeatable on CUDA, at some cost in speed; a CPU is always
detect_anomaly = False  # stop at the first NaN and name the operation that made it; slow
profile = False  # a trace and a table of three steps, in out_dir/profile


def check_image_size(unit):
    """unit: how many pixels a token, or a latent, has in height and width"""
    if image_size % unit:
        near = " or ".join(str(n) for n in (image_size // unit * unit, (image_size // unit + 1) * unit) if n)
        fail(f"{image_size=} must be a multiple of {unit}, the smallest unit that the model sees: use {near}")


def check_process(process):
    """End the program if the settings do not fit the forward and reverse process."""
    if sampler and sampler not in process.samplers:
        kind = f"objective={process.objective!r} with zero_snr={process.zero_snr}"
        fail(f"{sampler=} does not fit {kind}: use {' or '.join(process.samplers)}")
    if min_snr and process.objective == "flow":
        fail(f"{min_snr=} weighs the times of eps and v; flow has time_mean and time_std for that")
    if process.zero_snr and process.objective != "v":
        fail(f"zero_snr needs objective='v': from noise alone, {process.objective} cannot tell the picture")


def reason(error):
    """The first line of what an error says, or if it says nothing, its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_legal():
    """A setting's comment may end in legal values, as (1..), (0..<1) or ("a" | "b"); else no number is negative."""
    with open(__file__, encoding="utf-8") as f:
        notes = dict(re.findall(r"^([a-z]\w*) = .*?  # (.*)$", f.read(), re.MULTILINE))
    for name, value in settings(globals()).items():
        if choices := re.search(r'\(("[^"]*"(?: \| "[^"]*")+)\)$', notes.get(name, "")):
            choices = re.findall(r'"([^"]*)"', choices[1])
            if value not in choices:
                fail(f"{name}={value!r} is none of {', '.join(map(repr, choices))}")
        if type(value) in (int, float):
            bounds = re.search(r"\((-?\d+)\.\.(<?)(\d*)\)$", notes.get(name, ""))
            low, below, high = bounds.groups() if bounds else ("0", "", "")
            if value < float(low) or (high and (value > float(high) or (below and value == float(high)))):
                bound = f" and {'below' if below else 'at most'} {high}" if high else ""
                fail(f"{name}={value} must be at least {low}{bound}")


def check_settings():
    """End the program, before any data is touched, for values that cannot work together."""
    which = re.fullmatch(r"(\d+)/(\d+)", fold)
    if fold and not (which and 1 <= int(which[1]) <= int(which[2]) > 1):
        fail(f"{fold=}: write --fold=2/5 for the second of five parts")
    if val_fraction + test_fraction >= 1:
        fail(f"{val_fraction=} and {test_fraction=} leave nothing to train on")
    if not vae:
        check_image_size(patch_size)
    if init_from == "scratch" and (adapter or base_dtype != "auto"):
        fail(f"{adapter=} and {base_dtype=} are for a pretrained pipeline: name it by --init_from=")
    if base_dtype == "bf16" and not adapter:
        fail(f"{base_dtype=} is for the frozen weights under an adapter: what is trained is in fp32")
    if init_from != "scratch" and Path(init_from).expanduser().resolve() == Path(out_dir).resolve():
        fail(f"{init_from=} is out_dir: go on with that run by --resume=True, or choose another --out_dir")
    if init_from != "scratch" and vae:
        fail(f"{vae=} is for models from scratch: {init_from} has its own")
    if init_from == "scratch" and sample_prompts:
        fail(f"{sample_prompts=} is for pipelines with captions: name one by --init_from=")
    if vae and crop == "random":
        fail(f"{crop=} and {vae=}: latents are made once, of one crop; use crop='center'")
    if n_embd % (4 * n_head):
        fail(f"{n_embd=} must be a multiple of 4 x {n_head=}: half of a head's channel pairs turn by row")
    if init_from == "scratch":
        check_process(Process(objective, beta_schedule, zero_snr))
    if init_from == "scratch" and label_column and guidance != 1 and not label_dropout:
        fail(f"{guidance=} needs label_dropout above 0: it compares pictures with and without a class")
    if resume and overwrite:
        fail("resume=True goes on with the run that overwrite=True deletes: choose one of them")
    if patience and keep == "last":
        fail(f"{patience=} stops long after the best weights, which keep='last' drops: use keep='best'")
    if mixed_precision == "fp16" and (
        (optimizer == "muon" and init_from == "scratch") or not torch.cuda.is_available()
    ):
        fail("mixed_precision='fp16' needs CUDA and optimizer='adamw': use bf16 or no")
    if tracker and not importlib.util.find_spec(tracker):
        fail(f"{tracker=} is not installed: pip install {tracker}")


# -----------------------------------------------------------------------------
# Model: a diffusion transformer (DiT: Peebles & Xie 2022, arXiv:2212.09748) with rotary positions, QK-norm,
# squared ReLU, and norms without weights
# -----------------------------------------------------------------------------


@dataclass
class Shape:
    """What it takes to build the model again."""

    size: int  # height and width of what the model sees: pixels or latents
    channels: int
    patch_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_classes: int  # 0: pictures without classes


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): turn pairs of channels, the further the later."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def attend(q, k, v):
    """softmax(q k^T / sqrt(D)) v, each (B, n_head, T, D)"""
    if q.device.type != "cpu" or v.dtype != torch.bfloat16 or q.size(2) > 512:
        return F.scaled_dot_product_attention(q, k, v)
    # The same, written out: in bf16 on CPUs, torch's own kernel takes about four times as long on few tokens.
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, n_head, T, T)
    return scores.softmax(dim=-1, dtype=v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.n_head, self.head_dim = shape.n_head, shape.n_embd // shape.n_head
        self.q_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.k_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.v_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.o_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape  # T: tokens of a picture; D: head_dim
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, n_head, T, D)
        k = self.k_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, n_head, T, D)
        v = self.v_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, n_head, T, D)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))  # QK-norm bounds the attention logits
        y = attend(q, k, v)  # (B, n_head, T, D): every token sees every other
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.fc1 = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=False)
        self.fc2 = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())  # squared ReLU: So et al. 2021, arXiv:2109.08668


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.attn, self.mlp = Attention(shape), MLP(shape)
        self.modulation = nn.Linear(shape.n_embd, 6 * shape.n_embd)

    def forward(self, x, c, cos, sin):
        # adaLN-Zero: time and class scale, shift and gate; the gates are 0 at first, the block an identity
        parts = self.modulation(c)[:, None].chunk(6, dim=-1)  # (B, 1, C) each
        scale1, shift1, gate1, scale2, shift2, gate2 = parts
        x = x + gate1 * self.attn(norm(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer of the given Shape."""

    _no_split_modules = ("Block",)  # the parts in which FSDP2 gathers the weights, one after another

    def __init__(self, shape):
        super().__init__()
        self.shape, self.gradient_checkpointing = shape, False
        C, patch = shape.n_embd, shape.channels * shape.patch_size**2
        self.patch_in = nn.Linear(patch, C)
        self.time = nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C))
        self.classes = nn.Embedding(shape.n_classes + 1, C)  # the last stands for "no class"
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.modulation = nn.Linear(C, 2 * C)
        self.patch_out = nn.Linear(C, patch)
        nn.init.normal_(self.classes.weight, std=0.02)
        for block in self.blocks:
            for layer in (*block.attn.children(), *block.mlp.children()):
                nn.init.xavier_uniform_(layer.weight)
        for layer in (*(block.modulation for block in self.blocks), self.modulation, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        D, side = C // shape.n_head, shape.size // shape.patch_size
        self.place = nn.Parameter(0.02 * torch.randn(side * side, C))  # where in the picture a token is
        frequency = 1.0 / 100.0 ** (torch.arange(0, D, 4).float() / D)  # (D / 4,)
        turn = torch.outer(torch.arange(side).float(), frequency)  # (side, D / 4)
        by_row, by_column = turn.repeat_interleave(side, dim=0), turn.repeat(side, 1)  # (T, D / 4)
        angle = torch.cat((by_row, by_column), dim=-1)  # (T, D / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("time_frequency", 1000.0 * 1e-4 ** (torch.arange(128) / 128), persistent=False)

    def forward(self, x, t, y):
        """x (B, channels, size, size), times t (B,) in 0..1, classes y (B,), -1: none -> like x, fp32"""
        B, channels, H, W = x.shape
        p = self.shape.patch_size
        x = x.view(B, channels, H // p, p, W // p, p)
        x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H / p, W / p, p, p, channels)
        x = self.patch_in(x.reshape(B, (H // p) * (W // p), p * p * channels)) + self.place  # (B, T, C)
        wave = t[:, None] * self.time_frequency  # (B, 128)
        y = torch.where(y < 0, self.shape.n_classes, y)
        c = self.time(torch.cat((wave.cos(), wave.sin()), dim=-1)) + self.classes(y)  # (B, C)
        c = F.silu(c)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, c, self.cos, self.sin, use_reentrant=False)
            else:
                x = block(x, c, self.cos, self.sin)
        scale, shift = self.modulation(c)[:, None].chunk(2, dim=-1)  # (B, 1, C)
        x = self.patch_out(norm(x) * (1 + scale) + shift).float()  # (B, T, p p channels)
        x = x.view(B, H // p, W // p, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, channels, H, W)


# -----------------------------------------------------------------------------
# Forward and reverse process. At time t in 0..1 picture x_0 is x_t = alpha_t x_0 + sigma_t eps, eps ~ N(0, I)
#   flow  alpha = 1 - t, sigma = t, target eps - x_0: straight lines (Liu et al. 2022, arXiv:2209.03003),
#         times from a logit-normal distribution (Esser et al. 2024, arXiv:2403.03206)
#   eps   alpha^2 = the product of all 1 - beta so far, alpha^2 + sigma^2 = 1, target eps (Ho et al. 2020,
#         arXiv:2006.11239; cosine: Nichol & Dhariwal 2021, arXiv:2102.09672)
#   v     the same path, target alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv:2202.00512)
#   x0    the same path, target x_0: only pipelines of others have it
# -----------------------------------------------------------------------------
N_TIMES = 1000  # eps and v know the times 0, 1/1000 ... 999/1000


@dataclass
class Process:
    """What the forward process is: enough to reverse it."""

    objective: str = "flow"
    beta_schedule: str = "linear"
    zero_snr: bool = False
    config: dict | None = None  # of the scheduler that a pipeline has, instead of beta_schedule

    @property
    def samplers(self):
        """What reverses it, the default first. Euler's steps are in sigma / alpha, infinite at zero SNR."""
        if self.objective == "flow":
            return ("heun", "euler")
        return ("dpm++", "unipc", "ddim", "ddpm", *(() if self.zero_snr else ("euler",)))

    def scheduler(self, name="ddpm"):
        """The process as diffusers has it, for a sampler of the given name."""
        import diffusers

        kinds = {"ddpm": "DDPM", "ddim": "DDIM", "dpm++": "DPMSolverMultistep", "unipc": "UniPCMultistep"}
        kind = getattr(diffusers, kinds.get(name, "EulerDiscrete") + "Scheduler")
        options = {"clip_sample": False} if name in ("ddpm", "ddim") else {}
        if self.config:
            return kind.from_config(self.config, **options)
        betas = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[self.beta_schedule]
        options |= {"beta_schedule": betas, "rescale_betas_zero_snr": self.zero_snr}
        options |= {"prediction_type": {"eps": "epsilon", "v": "v_prediction"}[self.objective]}
        return kind(N_TIMES, timestep_spacing="trailing", **options)

    def alpha_sigma(self, t):
        """times (B,) -> alpha_t, sigma_t, both (B, 1, 1, 1)"""
        t = t.view(-1, 1, 1, 1)
        if self.objective == "flow":
            return 1 - t, t
        if not hasattr(self, "alpha_squared"):
            self.alpha_squared = self.scheduler().alphas_cumprod
        alpha_squared = self.alpha_squared.to(t.device)[(t * N_TIMES).round().long()]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def diffuse(self, x_0, eps, t):
        """pictures and noise (B, C, H, W), times (B,) -> x_t, and what the model is to answer to it"""
        alpha, sigma = self.alpha_sigma(t)
        targets = {"flow": eps - x_0, "eps": eps, "v": alpha * eps - sigma * x_0, "x0": x_0}
        return alpha * x_0 + sigma * eps, targets[self.objective]

    def weight(self, t, min_snr):
        """(B,) -> (B,): how much each time counts; min-SNR: Hang et al. 2023, arXiv:2303.09556"""
        if not min_snr:
            return torch.ones_like(t)
        alpha, sigma = self.alpha_sigma(t)
        snr = (alpha / sigma).square().flatten()
        return snr.clamp(max=min_snr) / {"eps": snr, "v": snr + 1, "x0": 1}[self.objective]


def hide(y, hidden):
    """conditions (B,), or (B, 7) in UNet -> the same with -1, no class or caption, where hidden (B,) or ()"""
    y = y.clone()
    y.view(len(y), -1)[:, 0].masked_fill_(hidden, -1)
    return y


@torch.no_grad()
def sample(model, process, size, y, rngs, steps=25, guidance=1.0, sampler="", clip=False):
    """
    Draw pictures: start from noise and follow the model's answers back to time 0.
    model: (x_t, t, y) -> answer, as DiT; size: (C, H, W); y: classes (B,), on the model's device, -1: none,
    or what UNet takes;
    rngs: a CPU generator for each picture, so that company does not change it; clip: the data is in [-1, 1].
    guidance: Ho & Salimans 2022, arXiv:2207.12598. -> (B, C, H, W)
    """
    from diffusers.utils.torch_utils import randn_tensor

    def answer(x, t):
        t = torch.full((len(y),), t, device=y.device)
        if guidance == 1:
            out = model(x, t, y)
        else:  # without and with the class, in one batch
            nothing = hide(y, torch.tensor(True, device=y.device))
            both = model(torch.cat((x, x)), torch.cat((t, t)), torch.cat((nothing, y)))
            without, with_class = both.chunk(2)
            out = without + guidance * (with_class - without)
        if clip and process.objective != "flow":  # where the signal is weak, errors of eps are large in x_0
            alpha, sigma = process.alpha_sigma(t)
            guess = {"eps": (x - sigma * out) / alpha, "v": alpha * x - sigma * out, "x0": out}
            x_0 = guess[process.objective].clamp(-1, 1)
            eps = (x - alpha * x_0) / sigma
            out = {"eps": eps, "v": alpha * eps - sigma * x_0, "x0": x_0}[process.objective]
        return out

    sampler = sampler or process.samplers[0]
    x = randn_tensor((len(y), *size), generator=rngs, device=y.device)
    if process.objective == "flow":
        for t, s in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
            velocity = answer(x, t)
            if sampler == "heun":  # the mean of the velocities at both ends of the step
                velocity = (velocity + answer(x + (s - t) * velocity, s)) / 2
            x = x + (s - t) * velocity
        return x
    scheduler = process.scheduler(sampler)
    scheduler.set_timesteps(steps, device=y.device)
    x = x * scheduler.init_noise_sigma
    for k in scheduler.timesteps:
        out = answer(scheduler.scale_model_input(x, k), float(k) / N_TIMES)
        x = scheduler.step(out, k, x, **({"generator": rngs} if sampler == "ddpm" else {})).prev_sample
    return x


def draw_pictures(model, process, size, y, seeds, autoencoder=None, at_once=64, **options):
    """Like `sample`, one seed for each picture -> pictures in [-1, 1], decoded where they are latents."""
    pictures = []
    for i in range(0, len(y), at_once):
        rngs = [torch.Generator().manual_seed(int(s)) for s in seeds[i : i + at_once]]
        x = sample(model, process, size, y[i : i + at_once], rngs, clip=autoencoder is None, **options)
        pictures.append(x if autoencoder is None else decode(autoencoder, x))
    return torch.cat(pictures).clamp(-1, 1)


def make_grid(x):
    """pictures (B, C, H, W) in [-1, 1] -> one picture of them all, in rows of ceil(sqrt(B))"""
    B, C, H, W = x.shape
    columns = math.ceil(math.sqrt(B))
    grid = Image.new("RGB" if C == 3 else "L", (columns * W, math.ceil(B / columns) * H))
    for i, tile in enumerate(((x.float() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
        grid.paste(Image.fromarray(tile if C == 3 else tile[:, :, 0]), (i % columns * W, i // columns * H))
    return grid


# -----------------------------------------------------------------------------
# Pipelines of diffusers: Stable Diffusion by the captions of the pictures, DDPM without any
# -----------------------------------------------------------------------------


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Base:
    """The pipeline of a run: enough to find it again, and to see that it is still the same."""

    name: str
    fingerprint: str  # of the UNet's weights, in dtype
    dtype: str
    size: int  # height and width of what the UNet sees: pixels or latents
    channels: int


class UNet(nn.Module):
    """
    The UNet of a pipeline, perhaps with an adapter, that trains as DiT does.
    captions: {its name for them: what the text encoders make of each (N + 1, ...), and last of no caption}
    """

    def __init__(self, pipe, base, captions):
        super().__init__()
        self.pipe, self.unet, self.shape, self.captions = pipe, pipe.unet, base, captions
        # the parts in which FSDP2 gathers the weights, one after another
        kinds = {type(part).__name__ for part in pipe.unet.modules()}
        self._no_split_modules = sorted(kinds.intersection(pipe.unet._no_split_modules or ()))

    def compile(self):
        self.unet.compile()  # without the captions, which are looked up on the CPU

    def forward(self, x, t, y, captions=None):
        """
        x (B, channels, size, size), times t (B,) in 0..1, y (B, 7): the number of a caption, -1: none, then
        what SDXL is told: size of the whole picture, corner and size of the crop, height first
        -> like x, fp32
        """
        k = t * N_TIMES
        k = torch.where((k - k.round()).abs() < 1e-3, k.round(), k)  # 0.981 is not exact in fp32, 981 is
        rows = y[:, 0].cpu()
        dtype = self.unet.conv_in.weight.dtype
        known = {name: table[rows].to(x.device, dtype) for name, table in (captions or self.captions).items()}
        if "text_embeds" in known:
            known["added_cond_kwargs"] = {"text_embeds": known.pop("text_embeds"), "time_ids": y[:, 1:]}
        return self.unet(x.to(dtype), k, **known, return_dict=False)[0].float()


def pictures_at_once(side):
    """How many pictures of side x side a pipeline draws together: 8 of 512 pixels, 2 of 1024."""
    return max(1, 2**21 // side**2)


def whole_pictures(captions, side):
    """numbers of captions (B,) -> y (B, 7) of UNet, for pictures of side x side, nothing cut off"""
    sizes = torch.tensor([side, side, 0, 0, side, side]).expand(len(captions), 6)
    return torch.column_stack((captions, sizes))


def load_pipeline(name, dtype):
    """-> a pipeline of diffusers from a folder or the hub, its UNet in dtype, all else in fp32."""
    import diffusers
    import transformers

    for library in (diffusers.utils, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    known = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "DDPMPipeline", "DDIMPipeline")
    try:
        Path(name).exists() or reach_hub()
        with warnings.catch_warnings(action="ignore"):  # about how diffusers itself calls the hub
            kind = diffusers.DiffusionPipeline.load_config(name)["_class_name"]
            if kind in known:  # else many gigabytes would be loaded in vain
                dtypes = {"unet": DTYPES[dtype], "default": torch.float32}
                pipe = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=dtypes)
    except Exception as error:  # of many kinds
        fail(f"{name} is no pipeline of diffusers, in a folder or on the hub: {reason(error)}")
    if kind not in known:
        fail(f"{name} is a {kind}; what can be trained is {', '.join(known)}")
    scheduler, unet, vae = pipe.scheduler.config, pipe.unet.config, getattr(pipe, "vae", None)
    if "beta_schedule" not in scheduler or scheduler.num_train_timesteps != N_TIMES:
        fail(f"{name} has a {type(pipe.scheduler).__name__}: only those with {N_TIMES} betas are supported")
    channels = vae.config.latent_channels if vae else unet.in_channels
    if not unet.in_channels == unet.out_channels == channels:
        takes = f"takes {unet.in_channels} channels and gives {unet.out_channels}"
        fail(f"the UNet of {name} {takes}, not {channels}: it is made for something else")
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        fail(f"the UNet of {name} is told classes, which is not supported")
    return pipe


def process_of(pipe, rescale):
    """The forward process of a pipeline's scheduler; rescale: make its signal-to-noise ratio end in 0."""
    known = pipe.scheduler.config
    absent = known.get("_use_default_values", ())  # what its file does not say each sampler has its own way
    config = {name: value for name, value in known.items() if name[0] != "_" and name not in absent}
    config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if rescale else {}
    kinds = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    zero = bool(config.get("rescale_betas_zero_snr"))
    return Process(kinds[known.prediction_type], known.beta_schedule, zero, config)


def fingerprint(model):
    """-> a hash of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def add_lora(unet, rank, alpha, targets):
    """
    Freeze a UNet, and add to the matrices of its layers a product of two small ones, in fp32 (Hu et al. 2021,
    arXiv:2106.09685). targets: the ends of the names of those layers, with commas between them.
    """
    from peft import LoraConfig

    can = [name for name, part in unet.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    targets = [target.strip() for target in targets.split(",")]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in can):
            known = sorted({re.search(r"\w+(\.\d+)?$", name)[0] for name in can})
            fail(f"lora_targets: the UNet has no layer {target!r}; it has {', '.join(known)}")
    unet.requires_grad_(False)
    how = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    unet.add_adapter(LoraConfig(init_lora_weights="gaussian", **how))
    for weight in unet.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data  # also above a bf16 model


def text_encoders(pipe):
    return [part for name, part in pipe.components.items() if part and name.startswith("text_encoder")]


@torch.no_grad()
def encode_captions(pipe, captions, device, negative=None, at_once=1):
    """
    captions -> {the UNet's name for it: what the text encoders make of each (N + 1, ...)}, the last of them
    of `negative`, or what the pipeline has for no caption. Two tables for SDXL: (N + 1, 77, C), (N + 1, P).
    at_once: many are faster, but then the last bits depend on the others.
    """
    long = [c for c in captions if len(pipe.tokenizer(c).input_ids) > pipe.tokenizer.model_max_length]
    if long:
        log(f"{len(long)} captions are too long, and will be cut, such as {long[0]!r}")
    for encoder in text_encoders(pipe):
        encoder.to(device)
    options, parts = {"device": device, "num_images_per_prompt": 1}, []
    for i in tqdm(range(0, len(captions), at_once), "encoding captions", disable=None, leave=False):
        made = pipe.encode_prompt(captions[i : i + at_once], do_classifier_free_guidance=False, **options)
        parts.append([table.cpu() for table in made[::2]])  # every other is of the negative prompt
    made = pipe.encode_prompt("", do_classifier_free_guidance=True, negative_prompt=negative, **options)
    parts.append([table.cpu() for table in made[1::2]])
    for encoder in text_encoders(pipe):
        encoder.to("cpu")
    return dict(zip(("encoder_hidden_states", "text_embeds"), map(torch.cat, zip(*parts))))


# -----------------------------------------------------------------------------
# Data: pictures -> splits -> one flat file of pixels or latents per split, in the cache folder of `datasets`
# -----------------------------------------------------------------------------
CHARACTERS = string.digits + string.ascii_uppercase
KINDS = dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "picture")
KINDS |= {".parquet": "parquet"}
OWN_KIND = "picture"  # the kind that read_files reads; the others are for `datasets`
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val"), "validation")
HOME = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
CACHE = Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(HOME, "datasets")), Path(__file__).stem)


def reach_hub():
    """The hub's libraries retry for most of a minute; told to be offline, they use their cache or fail."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(hub, timeout=5).close()
    except (OSError, ValueError) as error:
        if not isinstance(error, urllib.error.HTTPError):  # which is an answer
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = True
            log(f"{hub} does not answer: trying the local cache")


def find_files():
    """The files that `dataset` names by path, folder, glob or URL; None where it can only be a hub name."""
    path = Path(dataset).expanduser()
    if re.match(r"https?://", dataset):
        path = CACHE / hashlib.sha256(dataset.encode()).hexdigest()[:16] / dataset.rsplit("/", 1)[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            torch.hub.download_url_to_file(dataset, str(path), progress=False)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS)
    if any(c in dataset for c in "*?["):
        return sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    name = re.split("[:@]", dataset)[0]
    looks_local = path.suffix.lower() in KINDS or name[:1] in ("", ".", "/", "~") or name.count("/") > 1
    if looks_local and not path.exists():
        fail(f"there is no file or folder {dataset!r}")
    return [path] if path.exists() else reach_hub()


def name_split(path, root):
    """The split that a file's name or folder tells: train.txt, val/a.png, test-00000-of-00008.parquet."""
    names = (re.sub(r"-\d+-of-\d+$", "", path.stem), *path.relative_to(root).parts[:-1])
    return next((SPLITS[name] for name in names if name in SPLITS), None)


@functools.cache
def read_metadata(root):
    """{path: its row} of every metadata.jsonl below root; the rows have a file_name beside other columns."""
    rows = {}
    for path in sorted(root.rglob("metadata.jsonl")):
        for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            rows[path.parent / row.pop("file_name")] = row
    missing = [path for path in rows if not path.exists()]
    if missing:
        log(f"metadata.jsonl: {len(missing)} rows name no picture, such as {missing[0]}")
    return rows


def read_files(paths, root):
    """
    Pictures below `root` -> a Dataset. The column "label" is the name of their folder; metadata.jsonl adds
    columns, and so does a .txt file beside a picture, named "text".
    """
    import datasets

    folders, rows = [path.relative_to(root).parts[:-1] for path in paths], []
    of_split = all(folder and folder[0] in SPLITS for folder in folders)  # train/cat/1.png
    for path, folder in zip(paths, folders):
        stat, sidecar = path.stat(), path.with_suffix(".txt")
        row = {image_column: str(path), "label": "/".join(folder[of_split:]) or None}
        row |= {"stamp": f"{stat.st_size} {stat.st_mtime_ns}"}  # so that a changed picture is noticed
        row |= {"text": sidecar.read_text(encoding="utf-8").strip()} if sidecar.exists() else {}
        rows.append(row | read_metadata(root).get(path, {}))
    columns = dict.fromkeys(column for row in rows for column in row if row[column] is not None)
    return datasets.Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})


def load_splits():
    """{split: Dataset}: what `dataset` names, in the splits that it has itself."""
    splits, loaded = {}, {}
    try:
        files = find_files()
        import datasets  # which looks once, now, whether the hub was found to be out of reach

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        folder = Path(dataset).expanduser()
        if files is None:
            name, config, revision = re.fullmatch(r"([^:@]*):?([^@]*)@?(.*)", dataset).groups()
            loaded = datasets.load_dataset(name, config or None, revision=revision or None)
        elif any(Path(folder, name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
            loaded = datasets.load_from_disk(folder)
        else:
            kinds = sorted({KINDS.get(path.suffix.lower(), OWN_KIND) for path in files})
            if len(kinds) != 1:
                found = f"mixes {' and '.join(kinds)} files" if kinds else f"holds no {' '.join(KINDS)} file"
                fail(f"{dataset=} {found}: choose some, as in --dataset='folder/*{min(KINDS)}'")
            root = folder if folder.is_dir() else Path(os.path.commonpath([path.parent for path in files]))
            names = [name_split(path, root) for path in files]
            for path, split in zip(files, names):
                splits.setdefault(split if all(names) else "train", []).append(path)
            if kinds == [OWN_KIND]:
                loaded = {split: read_files(paths, root) for split, paths in splits.items()}
            else:
                paths = {split: [str(path) for path in splits[split]] for split in splits}
                loaded = datasets.load_dataset(kinds[0], data_files=paths)
    except Exception as error:  # of many kinds: by file format, by what the disk, the hub or the network says
        fail(f"cannot load {dataset=}: {reason(error.__cause__ or error)}")
    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
    loaded = {SPLITS[split]: rows for split, rows in loaded.items() if split in SPLITS}
    return loaded if "train" in loaded else fail(f"{dataset=} has no train split")


def plan_splits(found):
    """
    found: the splits that the data has itself -> those of them that stay as they are, and into which sections
    the train split is cut: [(split, share of it)], in order of position.
    """
    share = {"validation": 0.0 if fold else val_fraction, "test": test_fraction}
    own = [split for split in found if share.get(split)]
    v, t = (0.0 if split in own else fraction for split, fraction in share.items())
    part, parts = map(int, fold.split("/")) if fold else (0, 1)
    sections = [("validation" if i + 1 == part else "train", (1 - v - t) / parts) for i in range(parts)]
    return own, [(split, size) for split, size in [*sections, ("validation", v), ("test", t)] if size]


def draw_glyph(character, size, rng):
    """A letter or digit in white on black, at a random size, boldness, place and angle."""
    big = 4 * size  # drawn larger, then reduced: smooth edges
    image, font = Image.new("L", (big, big)), ImageFont.load_default(big * rng.uniform(0.9, 1.15))
    place = tuple((0.5 + rng.uniform(-0.07, 0.07, 2)) * big)
    style = {"fill": 255, "font": font, "anchor": "mm", "stroke_width": int(big * rng.uniform(0, 0.06))}
    ImageDraw.Draw(image).text(place, character, **style)
    return image.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR).reduce(4)


def draw_glyphs(each=256):
    """-> a Dataset with `each` pictures of every character."""
    import datasets

    rng, labels = np.random.default_rng(0), list(range(len(CHARACTERS))) * each
    glyphs = [draw_glyph(CHARACTERS[label], image_size, rng) for label in labels]
    features = {image_column: datasets.Image(), "label": datasets.ClassLabel(names=list(CHARACTERS))}
    return datasets.Dataset.from_dict({image_column: glyphs, "label": labels}, datasets.Features(features))


def load_pictures(use):
    """
    use: what is told to the model, "label", "caption" or "" -> {split: (Dataset of undecoded pictures, their
    classes (N,), -1: none)}, names of the classes. Each caption is a class of its own.
    """
    import datasets

    loaded = {"train": draw_glyphs()} if dataset == "glyphs" else load_splits()
    pictures, values = {}, {}
    told = {"": "", "label": label_column, "caption": "" if caption else caption_column}[use]
    for split, rows in loaded.items():
        kinds = {"image": (image_column, datasets.Image)}
        kinds[use] = (told, datasets.ClassLabel if use == "label" else datasets.Value)
        for which, (column, kind) in kinds.items():
            if column and column not in rows.column_names:
                likely = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
                near = nearest(column, likely or rows.column_names)
                none = {"label": ", or --label_column= to train without classes"}
                none["caption"] = ", or --caption=TEXT for one caption for all"
                found = f"has no column {column!r} in its {split} split, but {rows.column_names}"
                fail(f"{dataset=} {found}: try --{which}_column={near}{none.get(which, '')}")
        try:
            undecoded = datasets.Image(decode=False)
            pictures[split] = rows.select_columns([image_column]).cast_column(image_column, undecoded)
        except Exception as error:  # of pyarrow, by what the column holds
            fail(f"{image_column=} of {dataset=} holds no pictures: {reason(error)}")
        values[split] = list(rows[told]) if told else [caption or None] * len(rows)
    feature = loaded["train"].features.get(told)
    every = [value for column in values.values() for value in column]
    names, number = [], {}
    if use == "caption":
        for split, column in values.items():
            lacking = [i for i, v in enumerate(column) if not (isinstance(v, str) and v.strip())]
            if lacking:
                example = pictures[split][lacking[0]][image_column]["path"] or f"row {lacking[0]}"
                which = f"{len(lacking)} of {len(column)} pictures have none, such as {example}"
                fail(
                    f"captions are taken from {told!r}; {which}: write them, or one for all by --caption=TEXT"
                )
        names = list(dict.fromkeys(every))
        number = {name: i for i, name in enumerate(names)}
    elif isinstance(feature, datasets.ClassLabel):
        names, number = feature.names, {i: i for i in range(len(feature.names))}
    elif told:
        every = [value for value in every if value is not None]
        names = sorted(set(every)) if {type(value) for value in every} in ({str}, {int}, {bool}) else every
        if len(names) > max(100, len(every) / 2) or not names:  # a caption, a size, a box
            fail(f"{label_column=} holds {every[:1]}, no classes: name another, or --label_column= for none")
        number = {name: i for i, name in enumerate(names)}
    labels = {split: np.array([number.get(v, -1) for v in column], int) for split, column in values.items()}
    return {split: (pictures[split], labels[split]) for split in loaded}, [str(name) for name in names]


def split_pictures(pictures):
    """{split: (Dataset, classes)} -> {split: (Dataset, classes, ids)}: not a function of the seed."""
    own, sections = plan_splits(pictures)
    rows, labels = pictures["train"]
    if len(rows) < len(sections):
        fail(f"{len(rows)} pictures are too few: --val_fraction=0 --test_fraction=0 trains on all of them")
    order = np.random.default_rng(0).permutation(len(rows))
    cuts = [0, *(np.cumsum([size for _, size in sections]) * len(rows)).round().astype(int)]
    for i in range(1, len(sections)):  # each section has one picture at least
        cuts[i] = min(max(cuts[i], cuts[i - 1] + 1), len(rows) - len(sections) + i)
    dealt = {split: [] for split, _ in sections}
    for (split, _), (a, b) in zip(sections, itertools.pairwise(cuts)):
        dealt[split].append(order[a:b])
    splits = {split: (*pictures[split], np.arange(len(pictures[split][0]))) for split in own}
    return splits | {split: (rows, labels, np.sort(np.concatenate(ids))) for split, ids in dealt.items()}


def decode_picture(source):
    """
    {"bytes", "path"} -> pixels (h, w, 3), whether they have colour, and [height, width, top, left]: how large
    the whole picture was, and where, once scaled, the centre is cut out. None for what is no picture.
    """
    try:
        with Image.open(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"]) as image:
            image = ImageOps.exif_transpose(image)  # cameras note which side is up
        if image.mode.startswith("I"):  # grey of 16 bits
            image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
        colour = image.mode not in ("1", "L", "LA")
        if image.has_transparency_data:  # what is behind it may be any colour
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        w, h = image.size
        corner = [round((n * image_size / min(h, w) - image_size) / 2) for n in (h, w)]
        fit = ImageOps.fit if crop == "center" else ImageOps.cover
        image = fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.LANCZOS)
        return np.asarray(image), colour, [h, w, *corner]
    except Exception:  # PIL raises many kinds for broken files
        return None


def write_split(rows, labels, ids, path, digest, autoencoder):
    """Write pixels or latents to `path` and, in an .npz, where each picture begins; -> numbers."""
    shapes, kept, broken, sizes, has_colour = [], [], [], [], False
    with open(path, "wb") as f, ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in tqdm(range(0, len(ids), 256), "reading pictures", disable=None, leave=False):
            some = ids[first : first + 256].tolist()
            sources = rows[some][image_column]
            decoded = dict(zip(some, pool.map(decode_picture, sources)))
            missing = [source for i, source in zip(some, sources) if decoded[i] is None]
            broken += [(source or {}).get("path") or "one without a name" for source in missing]
            decoded = {i: picture for i, picture in decoded.items() if picture is not None}
            kept += decoded
            has_colour |= any(colour for _, colour, _ in decoded.values())
            sizes += [size for _, _, size in decoded.values()]
            arrays = [pixels for pixels, _, _ in decoded.values()]
            if autoencoder is not None:
                arrays = list(encode_all(autoencoder, arrays))
            for array in arrays:
                shapes.append(array.shape)
                digest.update(array.tobytes())
                f.write(array.tobytes())
    labels = labels[np.array(kept, dtype=int)]
    if init_from != "scratch":  # SDXL is told the sizes too
        crops = np.full((len(kept), 2), image_size)
        labels = np.column_stack((labels, np.array(sizes, dtype=int).reshape(-1, 4), crops))
    digest.update(labels.tobytes())
    starts = np.append(0, np.cumsum([math.prod(shape) for shape in shapes], dtype=np.int64))
    np.savez(path.with_suffix(".npz"), starts=starts, shapes=np.array(shapes), labels=labels)
    small = sum(min(h, w) < image_size for h, w, _, _ in sizes)
    counts = {"pictures": len(kept), "enlarged": small, "unreadable": len(broken), "such_as": broken[:1]}
    return counts | {"colour": has_colour}


def load_autoencoder(name):
    """-> the AutoencoderKL of diffusers of that name, in fp32: in less, some make black pictures."""
    from diffusers import AutoencoderKL

    try:
        Path(name).exists() or reach_hub()
        with warnings.catch_warnings(action="ignore"):  # about how diffusers itself calls the hub
            return AutoencoderKL.from_pretrained(name, torch_dtype=torch.float32)
    except Exception as error:  # of many kinds
        fail(f"vae={name!r} is no AutoencoderKL, in a folder or on the hub: {reason(error)}")


@torch.no_grad()
def encode(autoencoder, x):
    """pictures (B, 3, H, W) in [-1, 1] -> latents (B, c, h, w) with a variance of about 1"""
    config = autoencoder.config
    return (autoencoder.encode(x).latent_dist.mode() - (config.shift_factor or 0.0)) * config.scaling_factor


def reduction(autoencoder):
    """How many pixels a latent has in height and width: it halves them between its blocks."""
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


@torch.no_grad()
def decode(autoencoder, z):
    """latents (B, c, h, w) -> pictures (B, 3, H, W), a megapixel at a time: they take much more memory"""
    config = autoencoder.config
    z = z / config.scaling_factor + (config.shift_factor or 0.0)
    n = max(1, 2**20 // (reduction(autoencoder) ** 2 * z[0, 0].numel()))
    return torch.cat([autoencoder.decode(some).sample for some in z.split(n)])


def encode_all(autoencoder, arrays):
    """pictures (h, w, 3) -> latents of each, as it is and mirrored (2, c, h, w); without flip (1, c, h, w)"""
    n = max(1, 2**20 // image_size**2)  # a megapixel at a time
    for i in range(0, len(arrays), n):
        x = torch.from_numpy(np.stack(arrays[i : i + n])).permute(0, 3, 1, 2).to(autoencoder.device)
        x = x / 127.5 - 1  # (n, 3, H, W)
        views = [encode(autoencoder, v) for v in ((x, x.flip(-1)) if flip else (x,))]
        yield from torch.stack(views, dim=1).cpu().numpy().astype(np.float16)


def prepare_data(autoencoder, use):
    """
    use: as for load_pictures -> (folder, facts, captions): the folder with {split}.bin and {split}.npz, made
    once for the same data.
    """
    pictures, classes = load_pictures(use)
    key = [rows._fingerprint for rows, _ in pictures.values()]
    key += [image_column, label_column, image_size, crop, val_fraction, test_fraction, fold]
    key += [use, caption_column, caption, init_from != "scratch"]
    if autoencoder is not None:
        config = autoencoder.config
        key += [fingerprint(autoencoder), config.scaling_factor, config.shift_factor, flip]
    folder = CACHE / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # one process makes it, the others wait
            if not (folder / "facts.json").exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left
                folder.mkdir()
                splits, digest = split_pictures(pictures), hashlib.sha256()
                counts = {
                    split: write_split(*splits[split], folder / f"{split}.bin", digest, autoencoder)
                    for split in sorted(splits)
                }
                shape = [3 if any(n["colour"] for n in counts.values()) else 1, image_size]
                if autoencoder is not None:
                    shape = [autoencoder.config.latent_channels, image_size // reduction(autoencoder)]
                digest.update(json.dumps(classes).encode())
                facts = {"splits": counts, "classes": [] if use == "caption" else classes, "shape": shape}
                facts["fingerprint"] = digest.hexdigest()
                # the last file: where it is, all are
                write_json(folder / "facts.json", facts)
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"cannot write the pictures to {folder}: {error.strerror}; HF_HOME names another place for them")
    kinds = f"{len(classes)} {'captions' if use == 'caption' else 'classes'}"
    log(f"data: {dataset}, {kinds}: {' '.join(classes[:10])[:80]}{' ...' * (len(classes) > 10)}")
    for split, n in facts["splits"].items():
        log(f"  {split:10} {n['pictures']:>9,} pictures")
    broken, small, total = (
        sum(n[which] for n in facts["splits"].values()) for which in ("unreadable", "enlarged", "pictures")
    )
    if broken:
        example = next(name for n in facts["splits"].values() for name in n["such_as"])
        if broken > 0.01 * (total + broken):
            advice = "remove or replace them"
            fail(f"{broken} of {total + broken} pictures cannot be read, such as {example}: {advice}")
        log(f"  {broken} cannot be read, such as {example}: skipped")
    if small:
        log(f"  {small} are smaller than {image_size=} and were enlarged, which blurs them")
    return folder, facts, classes if use == "caption" else []


def prepare_captions(pipe, captions, folder, device):
    """-> what encode_captions makes of the captions of the data, in the precision of the UNet; made once."""
    key = [captions, [fingerprint(encoder) for encoder in text_encoders(pipe)], str(pipe.unet.dtype)]
    key += [pipe.tokenizer(captions).input_ids, pipe.config.get("force_zeros_for_empty_prompt")]
    path = folder / f"captions_{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            tables = encode_captions(pipe, captions, device, at_once=32)
            tables = {name: table.to(pipe.unet.dtype) for name, table in tables.items()}
            write_file(path, lambda temporary: save_file(tables, temporary))
    return load_file(path)


def same_everywhere(facts, shape):
    """End the program if the machines of a run do not have the same data and pretrained weights."""
    if len(set(gather_object([(facts["fingerprint"], getattr(shape, "fingerprint", ""))]))) > 1:
        fail(f"{dataset=} or {init_from=} is not the same on all machines: copy it from one to the others")


class Pictures(torch.utils.data.Dataset):
    """
    A split as the samples of a run. Each epoch goes through it in a fresh order, a function of (seed, epoch);
    place of the crop and mirroring are functions of (seed, sample number). So sample i of all is a function
    of (seed, i): a resume, other processes or micro-batches cannot change what a step sees.
    """

    def __init__(self, path, size, channels, latent, seed, flip):
        self.path, self.size, self.channels, self.latent = path, size, channels, latent
        self.seed, self.flip = seed, flip
        index = np.load(path.with_suffix(".npz"))
        self.starts, self.shapes, self.labels = index["starts"], index["shapes"], index["labels"]
        self.epoch = self.values = None  # opened by the process that reads: a memory map does not travel

    def read(self, ids, rngs=None):
        """
        numbers of pictures -> x (B, channels, size, size), pixels in [-1, 1] or latents, and classes (B,).
        Without rngs, one for each, the middle of a picture and as it is.
        """
        if self.values is None:
            self.values = np.memmap(self.path, np.float16 if self.latent else np.uint8, mode="r")
        xs, S = [], self.size
        for i, rng in zip(ids, rngs or [None] * len(ids)):
            x = self.values[self.starts[i] : self.starts[i + 1]].reshape(self.shapes[i])
            mirror = rng is not None and self.flip and rng.random() < 0.5
            if self.latent:
                xs.append(x[int(mirror)])
            else:
                room = np.array(x.shape[:2]) - S
                top, left = room // 2 if rng is None else rng.integers(room + 1)
                x = x[top : top + S, left : left + S, : self.channels]
                xs.append((x[:, ::-1] if mirror else x).transpose(2, 0, 1))
        x = torch.from_numpy(np.stack(xs)).float()
        return x if self.latent else x / 127.5 - 1, torch.from_numpy(self.labels[ids])

    def __getitem__(self, samples):
        """samples: a list of sample numbers -> as `read`"""
        ids, rngs = [], []
        for n in samples:
            epoch, i = divmod(n, len(self.labels))
            if epoch != self.epoch:
                self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.labels))
                self.epoch = epoch
            ids.append(self.order[i])
            rngs.append(np.random.default_rng([self.seed, 0, n]))
        return self.read(ids, rngs)


def sample_numbers(first_step, last_step, micro, accumulation, rank):
    """The samples of each micro-batch of this process: rank 0 has the first slice of the batch, and so on."""
    for step in range(first_step, last_step):
        for i in range(accumulation):
            first = step * batch_size + (rank * accumulation + i) * micro
            yield list(range(first, first + micro))


# -----------------------------------------------------------------------------
# Optimizers and learning rate
# -----------------------------------------------------------------------------


def trained_weights(model):
    """Those of this process: with FSDP2 it has a part of each."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update of a matrix is made orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon). It
    computes what torch.optim.Muon does, but on all matrices of a shape at once, as many small products keep no
    processor busy; in the given dtype, as few CPUs have bf16; and with FSDP2 each process takes some matrices.
    """

    def __init__(self, matrices, lr, weight_decay, momentum, dtype):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
            for (rows, columns), alike in itertools.groupby(matrices, key=lambda p: p.shape):
                alike = list(alike)
                grads = [p.grad for p in alike]
                for p in alike:
                    self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
                averages = [self.state[p]["momentum_buffer"] for p in alike]
                torch._foreach_lerp_(averages, grads, 1 - momentum)
                updates = torch.stack(torch._foreach_lerp(grads, averages, momentum))  # (n, rows, columns)
                updates = self.orthogonalize(updates).to(alike[0].dtype).unbind()
                torch._foreach_mul_(alike, 1 - lr * group["weight_decay"])
                torch._foreach_add_(alike, updates, alpha=-lr * max(1, rows / columns) ** 0.5)

    def orthogonalize(self, updates):
        """(n, rows, columns) -> the same with all singular values near 1, by Newton and Schulz's iteration."""
        if isinstance(updates, DTensor):  # instead of a part of each matrix, a process gets some whole ones
            mine = self.orthogonalize(updates.redistribute(placements=[Shard(0)]).to_local())
            whole_size = {"shape": updates.shape, "stride": updates.stride()}
            mine = DTensor.from_local(mine, updates.device_mesh, [Shard(0)], **whole_size)
            return mine.redistribute(placements=updates.placements)
        tall = updates.size(-2) > updates.size(-1)
        x = (updates.mT if tall else updates).to(self.dtype)
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
        return x.mT if tall else x


def make_optimizers(dit, precision):
    """
    Muon (Jordan 2024, kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal; that is for
    the matrices in the blocks. All else is AdamW's, and so is what somebody else has trained.
    """
    if optimizer == "adamw" or init_from != "scratch":
        default = 0.001 if init_from == "scratch" else 1e-4 if adapter else 1e-5
        options = {"betas": (beta1, beta2), "weight_decay": weight_decay, "fused": True}
        return [torch.optim.AdamW(trained_weights(dit), learning_rate or default, **options)]
    matrices = [p for p in dit.blocks.parameters() if p.ndim == 2]
    rest = [p for p in dit.parameters() if all(p is not matrix for matrix in matrices)]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    muon = Muon(matrices, learning_rate or 0.02, weight_decay, momentum=0.95, dtype=dtype)
    return [muon, torch.optim.AdamW(rest, adamw_lr, betas=(beta1, beta2), weight_decay=0.0, fused=True)]


def lr_at(step, total_steps):
    """The learning rate of a step as a fraction of its peak."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if lr_schedule == "cosine":
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    left = (total_steps - step) / max(1, cooldown * total_steps)  # above 1 before the decay begins
    return min_lr + (1 - min_lr) * min(1.0, left) if lr_schedule == "wsd" else 1.0


def set_learning_rates(groups, peaks, step, total_steps):
    for group, peak in zip(groups, peaks):
        group["lr"] = peak * lr_at(step, total_steps)
        if "momentum" in group:  # Muon's memory is short while gradients still turn quickly
            group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)


@contextlib.contextmanager
def averaged(ema, net):
    """Let the model have the average of its weights for a while, to be looked at, drawn from, or saved."""
    weights = trained_weights(net)
    if ema:
        ema.store(weights)
        ema.copy_to(weights)
    net.eval()
    yield
    net.train()
    if ema:
        ema.restore(weights)


# -----------------------------------------------------------------------------
# The gradient of a step, and the evaluation
# -----------------------------------------------------------------------------


class NaNFinder(TorchDispatchMode):
    """Looks at the result of every operation; raises FloatingPointError at the first that made a NaN."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and "empty" not in str(func) and t.isnan().any():
                frame = [f for f in traceback.extract_stack()[:-1] if f.filename == __file__][-1]
                raise FloatingPointError(f"{func} made a NaN in line {frame.lineno}: {frame.line}")
        return result


def add_noise(accelerator, process, micro_batches, step):
    """
    [(pictures, classes)] -> [(x_t, times, classes, target, weights)] of this process. Noise, times and hidden
    classes are drawn for the whole global batch and cut up, so they are functions of (seed, step, position).
    """
    device, size = accelerator.device, micro_batches[0][0].shape[1:]
    key = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    rng = torch.Generator(device).manual_seed(int(key))
    eps = torch.randn(batch_size, *size, generator=rng, device=device)
    if process.objective == "flow":
        t = torch.sigmoid(time_mean + time_std * torch.randn(batch_size, generator=rng, device=device))
    else:
        t = torch.randint(N_TIMES, (batch_size,), generator=rng, device=device) / N_TIMES
    hidden = torch.rand(batch_size, generator=rng, device=device) < label_dropout
    noisy, at = [], accelerator.process_index * sum(len(y) for _, y in micro_batches)
    for x_0, y in micro_batches:
        x_0, y = x_0.to(device, non_blocking=True), y.to(device, non_blocking=True)
        part = slice(at, at + len(y))
        x_t, target = process.diffuse(x_0, eps[part], t[part])
        noisy.append((x_t, t[part], hide(y, hidden[part]), target, process.weight(t[part], min_snr)))
        at += len(y)
    return noisy


def forward_backward(accelerator, model, micro_batches, step):
    """
    Add up the gradient of the mean loss over all pictures of the global batch; -> this process's share of it.
    Each backward pass divides by batch_size, so the gradient does not depend on how the batch is cut up.
    """
    total = torch.zeros((), device=accelerator.device)
    for i, (x_t, t, y, target, weight) in enumerate(micro_batches):
        key = np.random.SeedSequence([seed, step, accelerator.process_index, i])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))  # for dropout, which some UNets have
        # gradients travel between processes once a step; with FSDP2 they would fill the memory until then
        now = i == len(micro_batches) - 1 or accelerator.is_fsdp2
        with contextlib.nullcontext() if now else accelerator.no_sync(model):
            try:
                with accelerator.autocast(), NaNFinder() if detect_anomaly else contextlib.nullcontext():
                    loss = (weight * (model(x_t, t, y) - target).square().mean(dim=(1, 2, 3))).sum()
                # DDP and FSDP2 take the mean over processes
                accelerator.backward(loss * accelerator.num_processes / batch_size)
            except (FloatingPointError, RuntimeError) as error:  # by NaNFinder, or by torch's anomaly mode
                if not detect_anomaly or "nan" not in str(error).lower():
                    raise
                raise SystemExit(f"step {step}: {error}") from None
        total += loss.detach()
    return total / batch_size


def whole(tensor):
    """In one piece: FSDP2 cuts weights up among the processes, and so all that is computed from them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_step(accelerator, model, steppers, micro_batches, step):
    """Gradient, clipping, update; -> loss, gradient norm, finite? If they are not, nothing is updated."""
    loss = forward_backward(accelerator, model, micro_batches, step)
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    both = torch.stack((loss, whole(grad_norm).to(loss.device) / accelerator.num_processes))
    # what is not finite in one process is so in all; and this is the one wait for the GPU in a step
    loss, grad_norm = accelerator.reduce(both, "sum").tolist()
    scaler = accelerator.scaler  # that of fp16 must be asked: it skips such steps itself and adapts its scale
    finite = math.isfinite(loss) and (math.isfinite(grad_norm) or scaler is not None)
    for stepper in steppers:
        if finite or scaler:
            stepper.step()
        stepper.zero_grad()
    return loss, grad_norm, finite


def count_skipped(progress, finite, saved):
    """A step or two may go wrong; after ten in a row the run ends."""
    progress["skipped"] += not finite
    progress["skipped_in_a_row"] = 0 if finite else progress["skipped_in_a_row"] + 1
    if not finite:
        log(f"step {progress['step']}: the loss or the gradient is not finite: skipped")
    if progress["skipped_in_a_row"] == 10:
        good = f"{out_dir}/checkpoints/step_{saved:08d}" if saved else "none yet"
        advice = "lower learning_rate, or find the operation with --detect_anomaly=True"
        raise SystemExit(f"ten steps in a row were not finite; the last good checkpoint is {good}; {advice}")


def spread(accelerator, n, count, micro):
    """
    `count` of n pictures, spread evenly (0: all), in portions for this process: (ids, whether each counts).
    All have `micro` pictures and all processes have as many: the last are filled up with what does not count.
    """
    ids = np.linspace(0, n - 1, count).astype(int) if 0 < count < n else np.arange(n)
    at_once = micro * accelerator.num_processes
    ids = np.append(ids, np.full(-len(ids) % at_once, -1))
    for i in range(accelerator.process_index * micro, len(ids), at_once):
        yield ids[i : i + micro].clip(min=0), ids[i : i + micro] >= 0


def evaluate(accelerator, model, process, name, pictures, micro, batches):
    """
    -> the loss of a split, unweighted and over all times alike, in total and by quarter of the times; None
    when a signal asks to stop. Noise and time within the quarter belong to a picture and never change, so two
    evaluations differ by the model alone. batches: of batch_size pictures, spread evenly; 0: all.
    """
    device = accelerator.device
    losses, n_valid = torch.zeros(4, device=device), 0
    for ids, valid in spread(accelerator, len(pictures.labels), batches * batch_size, micro):
        if stop_requested(accelerator):
            return None
        x_0, y = (values.to(device) for values in pictures.read(ids))
        rngs = [torch.Generator().manual_seed(int(i)) for i in ids]
        eps = torch.stack([torch.randn(x_0.shape[1:], generator=rng) for rng in rngs]).to(device)
        within = torch.from_numpy(ids * 0.618034 % 1).float().to(device)  # fills the quarter evenly
        for quarter in range(4):
            t = ((quarter + within) / 4 * N_TIMES).floor() / N_TIMES
            x_t, target = process.diffuse(x_0, eps, t)
            with torch.no_grad(), accelerator.autocast():
                loss = (model(x_t, t, y) - target).square().mean(dim=(1, 2, 3))
            losses[quarter] += loss[torch.from_numpy(valid)].sum()
        n_valid += int(valid.sum())
    shares = gather_object([(losses.cpu().double().numpy(), n_valid)])
    quarters = sum(loss for loss, _ in shares) / sum(n for _, n in shares)
    by_time = {f"{name}/loss/{i / 4:g}-{(i + 1) / 4:g}": float(loss) for i, loss in enumerate(quarters)}
    return {f"{name}/loss": float(quarters.mean())} | by_time


@torch.no_grad()
def features(network, x):
    """pictures (B, C, H, W) in [-1, 1] -> what a vision model of transformers sees in them, (B, D)"""
    side = min(224, network.config.image_size)
    x = F.interpolate(x.expand(-1, 3, -1, -1), size=(side, side), mode="bicubic", antialias=True) / 2 + 0.5
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=x.device)  # of ImageNet
    return network(pixel_values=(x - mean[:, None, None]) / std[:, None, None]).pooler_output


def frechet_distance(a, b):
    """
    Of Gaussians fitted to two sets of features (N, D) and (M, D): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
    (Heusel et al. 2017, arXiv:1706.08500). The trace of the root is the sum of the roots of the eigenvalues.
    """
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(min=0))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c1) + np.trace(c2) - 2 * roots.sum())


def load_vision_model():
    from transformers import AutoModel

    try:
        Path(fd_model).exists() or reach_hub()
        return AutoModel.from_pretrained(fd_model, dtype=torch.float32).eval()
    except Exception as error:  # of many kinds
        fail(f"{fd_model=} is no vision model, in a folder or on the hub: {reason(error)}")


def measure_fd(accelerator, draw, network, name, pictures, autoencoder, micro):
    """Fréchet distance between a split and as many drawn pictures of the same classes; None on a signal."""
    network.to(accelerator.device)
    real, drawn = [], []
    for ids, valid in spread(accelerator, len(pictures.labels), fd_samples, micro):
        if stop_requested(accelerator):
            return None
        x, y = (values.to(accelerator.device) for values in pictures.read(ids))
        x = x if autoencoder is None else decode(autoencoder, x)
        real.append(features(network, x)[valid].double().cpu().numpy())
        drawn.append(features(network, draw(y=y, seeds=seed + ids))[valid].double().cpu().numpy())
    shares = gather_object([(np.concatenate(real), np.concatenate(drawn))])
    real, drawn = (np.concatenate(parts) for parts in zip(*shares))
    return {f"{name}/frechet_distance": frechet_distance(real, drawn)}


def write_sample(accelerator, draw, y, step):
    """
    Draw a picture of each of y from fixed noise, in samples/step_N.png and the tracker. All processes do
    so in step: with FSDP2 each has a part of the weights.
    """
    grid = make_grid(draw(y=y.to(accelerator.device), seeds=seed + np.arange(len(y))))
    if accelerator.is_main_process:
        grid.save(Path(out_dir, "samples", f"step_{step:08d}.png"))
    for log_to in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker == "tensorboard" else {}
        log_to.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=step, **options)


# -----------------------------------------------------------------------------
# The run directory: weights for sample.py, checkpoints that a resume continues bit for bit
# -----------------------------------------------------------------------------
KIND = "diffusion"
PACKAGES = ("torch", "transformers", "accelerate", "diffusers", "peft", "datasets", "numpy")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"
STATE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
DATA_SETTINGS = {"dataset", "image_column", "label_column", "val_fraction", "test_fraction", "fold"}
DATA_SETTINGS |= {"image_size", "crop", "vae", "caption_column", "caption"}
MODEL_SETTINGS = {"patch_size", "n_layer", "n_head", "n_embd", "optimizer"}
MODEL_SETTINGS |= {"objective", "beta_schedule", "zero_snr"}
MODEL_SETTINGS |= {"init_from", "base_dtype", "adapter", "lora_rank", "lora_alpha", "lora_targets"}


def write_file(path, write):
    """Let `write(temporary)` make a file, then give it its name: what has the name is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half a file, on a full disk


def write_json(path, value):
    write_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def complete_checkpoints():
    """The checkpoints that are whole by their manifest of sizes, oldest first; others are named."""
    complete = []
    for folder in sorted(Path(out_dir, "checkpoints").glob("step_*")):
        try:
            sizes = json.loads((folder / "manifest.json").read_text())
            if any((folder / name).stat().st_size != size for name, size in sizes.items()):
                raise ValueError("cut off")
            complete.append(folder)
        except (OSError, ValueError, AttributeError):
            log(f"{folder} is no complete checkpoint: it is left alone")
    return complete


def frozen_weights(accelerator, model):
    """{name: weight} of all that is not trained, under each of its names where there are several."""
    named = accelerator.unwrap_model(model).named_parameters(remove_duplicate=False)
    return {name: weight for name, weight in named if not weight.requires_grad}


def save_checkpoint(accelerator, model, optimizers, progress):
    """checkpoints/step_N appears whole or not at all: written under another name, synced, then renamed."""
    weights, moments = dcp.get_state_dict(model, optimizers, options=STATE)
    frozen = frozen_weights(accelerator, model)
    weights = {name: weight for name, weight in weights.items() if name not in frozen}
    if accelerator.is_main_process:
        folder = Path(out_dir, "checkpoints", f"step_{progress['step']:08d}")
        unfinished = folder.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        state = {"model": weights, "optimizers": moments, "progress": progress}
        state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else {}
        write_file(unfinished / "state.pt", lambda path: torch.save(state, path))
        write_json(unfinished / "manifest.json", {"state.pt": (unfinished / "state.pt").stat().st_size})
        shutil.rmtree(folder, ignore_errors=True)  # a broken one of this name
        unfinished.rename(folder)
        for old in complete_checkpoints()[:-keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def told_by_main(accelerator):
    """How to load what only the main process has read; strict=False: what is frozen is not there."""
    return replace(STATE, strict=False, broadcast_from_rank0=accelerator.num_processes > 1)


def load_checkpoint(accelerator, model, optimizers, folder):
    """
    Put back what save_checkpoint wrote, but with the optimizers' settings of today; -> progress. The main
    process reads the file and tells the others, who may be on a machine that does not have it.
    """
    groups = [group for o in optimizers for group in o.param_groups]
    today = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    state = {"model": {}, "optimizers": {}, "scaler": {}, "progress": {}}
    try:
        if accelerator.is_main_process:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            names = accelerator.unwrap_model(model).state_dict().keys()
            if names - frozen_weights(accelerator, model).keys() != state["model"].keys():
                raise ValueError("its weights have other names")
        how = {"options": told_by_main(accelerator)}
        dcp.set_model_state_dict(model, state["model"], **how)
        dcp.set_optimizer_state_dict(model, optimizers, state["optimizers"], **how)
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(broadcast_object_list([state["scaler"]])[0])
    except Exception as error:  # a foreign file fails in many ways
        fail(f"{folder} is of another run ({reason(error)}): remove it to use an older one")
    for group, values in zip((group for o in optimizers for group in o.param_groups), today):
        group.update(values)
    log(f"resumed from {folder}")
    return state["progress"]


def save_weights(accelerator, model):
    """The weights that sample.py draws from; those of a pipeline with the names that diffusers gives them."""
    weights, net = dcp.get_model_state_dict(model, options=STATE), accelerator.unwrap_model(model)
    if not adapter:  # some kinds of embedding are not trained
        frozen = frozen_weights(accelerator, model).items()
        weights |= {name: whole(weight.detach()).cpu() for name, weight in frozen}
    if accelerator.is_main_process and isinstance(net, DiT):
        path = Path(out_dir, "model.safetensors")
        write_file(path, lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    elif accelerator.is_main_process:
        weights = {name.removeprefix("unet."): weight for name, weight in weights.items()}
        if adapter:
            save_lora(net, weights)
        else:
            path = Path(out_dir, UNET_FILE)
            write_file(path, lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    accelerator.wait_for_everyone()


def save_lora(net, weights):
    """Twice: with the names and the alpha that diffusers reads, and with those of kohya and ComfyUI."""
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    weights, config = get_peft_model_state_dict(net.unet, weights), net.unet.peft_config["default"]
    unfinished = Path(out_dir, "unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    how = {"unet_lora_adapter_metadata": config.to_dict()}
    net.pipe.save_lora_weights(unfinished, unet_lora_layers=weights, **how)
    kohya = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in weights.items()})
    for name in [name for name in kohya if name.endswith(".alpha")]:
        kohya[name] = torch.tensor(float(config.lora_alpha))  # where diffusers writes the rank
    save_file(kohya, unfinished / KOHYA_FILE)
    for name in (KOHYA_FILE, LORA_FILE):
        write_file(Path(out_dir, name), lambda temporary, name=name: (unfinished / name).rename(temporary))
    unfinished.rmdir()


def read_lora(folder):
    """-> what save_lora has written, with the names that it has in UNet, which peft leaves its own out of."""
    weights = load_file(Path(folder, LORA_FILE))
    return {re.sub("(lora_[AB])", r"\1.default", name): weight for name, weight in weights.items()}


def save_frozen(pipe, process):
    """What of a pipeline is not trained, once: with its weights, out_dir is a whole pipeline."""
    for name, part in pipe.components.items():
        if name != "unet" and hasattr(part, "save_pretrained"):
            part.save_pretrained(Path(out_dir, name))
    # diffusers writes down what its file left open, but other samplers have other defaults
    scheduler = {"_class_name": type(pipe.scheduler).__name__} | process.config
    write_json(Path(out_dir, "scheduler", "scheduler_config.json"), scheduler)
    pipe.unet.save_config(Path(out_dir, "unet"))
    pipe.save_config(out_dir)  # model_index.json


def load_weights(accelerator, model):
    """Put back what save_weights has kept, to meet the test split."""
    if not accelerator.is_main_process:
        weights = {}
    elif adapter:
        weights = read_lora(out_dir)
    elif isinstance(accelerator.unwrap_model(model), UNet):
        weights = {f"unet.{name}": weight for name, weight in load_file(Path(out_dir, UNET_FILE)).items()}
    else:
        weights = load_file(Path(out_dir, "model.safetensors"))
    dcp.set_model_state_dict(model, weights, options=told_by_main(accelerator))


def claim_run_dir():
    """Make out_dir ours, or end the program: it may hold a run, other files, or another trainer at work."""
    path, lock = Path(out_dir), FileLock(Path(out_dir, "lock"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)  # until this process ends, in whatever way
        others = {p.name for p in path.iterdir()} - {"lock"}
    except Timeout:
        fail(f"another trainer is at work in {out_dir}: choose another --out_dir")
    except OSError as error:
        fail(f"cannot write to {out_dir=}: {error.strerror}")
    if others and not others & {"run.json", "run.json.tmp", "checkpoints"}:
        fail(f"{out_dir} holds other files, such as {min(others)}: choose another --out_dir")
    if others and not (resume or overwrite):
        ways = "--resume=True goes on with it, --overwrite=True deletes it, another --out_dir leaves it alone"
        fail(f"{out_dir} holds a run already: {ways}")
    return lock


def describe_run(accelerator, model, facts):
    """What run.json says: enough to know later what was run; no environment variables, no host name."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = git if shutil.which("git") else ["echo"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    run = {"kind": KIND, "settings": settings(globals()), "command": sys.argv, "commit": commit}
    run["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    run |= {"device": device, "processes": accelerator.num_processes, "threads": torch.get_num_threads()}
    run["data"] = {"splits": facts["splits"], "fingerprint": facts["fingerprint"]}
    weights = list(model.parameters())
    run |= {"model": asdict(model.shape), "parameters": sum(p.numel() for p in weights)}
    return run | {"trained_parameters": sum(p.numel() for p in weights if p.requires_grad)}


def start_run(run):
    """Write down what this run is; on a resume, compare. -> the checkpoint to go on from, or None."""
    path = Path(out_dir)
    for old in [p for p in path.iterdir() if p.name != "lock"] if overwrite else []:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    checkpoints = complete_checkpoints()
    if checkpoints:
        try:
            old = json.loads((path / "run.json").read_text(encoding="utf-8"))
            before, kind, fingerprint = old["settings"], old["kind"], old["data"]["fingerprint"]
            base = old["model"].get("fingerprint")
        except (OSError, ValueError, LookupError, TypeError) as error:
            fail(f"{path / 'run.json'} cannot be read ({error!r}), and no checkpoint goes on without it")
        now = run["settings"].items()
        differ = {k: f"{k} was {before.get(k)!r}, is {v!r}" for k, v in now if before.get(k) != v}
        data = "; ".join(differ[k] for k in sorted(DATA_SETTINGS & differ.keys()))
        model = "; ".join(differ[k] for k in sorted(MODEL_SETTINGS & differ.keys()))
        if kind != run["kind"]:
            fail(f"{out_dir} holds a {kind} run: choose another --out_dir")
        if fingerprint != run["data"]["fingerprint"]:
            fail(
                f"cannot resume on other data ({data or 'its files have changed'}): choose another --out_dir"
            )
        if model:
            fail(f"cannot resume with another model or optimizer ({model}): choose another --out_dir")
        if base != run["model"].get("fingerprint"):
            fail(f"cannot resume: weights or dtype of {init_from} have changed since it began")
        for name in sorted(differ.keys() - {"resume", "overwrite"}):
            log(f"resume: {differ[name]}")
    write_json(path / "run.json", run)
    (path / "samples").mkdir(exist_ok=True)
    return checkpoints[-1] if checkpoints else None


def open_metrics(size):
    """metrics.jsonl without what is past the checkpoint (byte `size`), or half a row."""
    path = Path(out_dir, "metrics.jsonl")
    rows = path.read_bytes()[:size] if path.exists() else b""
    path.write_bytes(rows[: rows.rfind(b"\n") + 1])
    return open(path, "ab", buffering=0)  # a row is on its way at once


# -----------------------------------------------------------------------------
# Starting, stopping, reporting
# -----------------------------------------------------------------------------
STOP = {"signal": 0, "time": 0.0, "polled": False}  # polled: from the first step on, the loop looks at it
LAUNCHED = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
PEAK_FLOPS |= {"4090": 165e12}  # in bf16, by part of the GPU's name; the first that fits


# what Python, torch and safetensors say of a disk that is full, or gone, or not ours
CANNOT_WRITE = "No space left|File too large|quota exceeded|Read-only|Permission denied|Input/output error"
CANNOT_WRITE += "|inline_container"


def log(message):
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)
        sys.stdout.flush()


def on_signal(signum, frame):
    """SIGTERM or SIGINT: the loop saves and leaves. A second one kills (launchers may send it twice)."""
    if not STOP["polled"]:
        log(f"stopped by signal {signum} before the first step: there is nothing to save")
        raise SystemExit(128 + signum)
    if STOP["signal"] and time.monotonic() - STOP["time"] > 1:
        os._exit(128 + signum)
    STOP.update(signal=int(signum), time=time.monotonic())


def watch_launcher():
    """A one-process `accelerate launch` dies of SIGTERM without passing it on: its death counts as one."""
    while os.getppid() == PARENT:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM) if STOP["polled"] else os._exit(128 + signal.SIGTERM)


def stop_requested(accelerator):
    """The signal that some process got, or 0: all agree on it, so that none waits for another in vain."""
    if accelerator.num_processes == 1:
        return STOP["signal"]
    return int(accelerator.gather(torch.tensor([STOP["signal"]], device=accelerator.device)).max())


def start_accelerator():
    """-> an Accelerator on the best device there is, with precision, threads and tracker set."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if cuda or mps:
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = ("bf16" if bf16 else "no") if mixed_precision == "auto" else mixed_precision
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what `deterministic` needs
    torch.use_deterministic_algorithms(deterministic)
    torch.autograd.set_detect_anomaly(detect_anomaly)
    torch.set_float32_matmul_precision("high")  # TF32: fp32 matrices much faster, with 10 bits of mantissa
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # all make the model, each keeps a part of it
    # one process may read a large checkpoint while the others wait
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    options = {"log_with": tracker or None, "project_dir": out_dir, "kwargs_handlers": [patient]}
    accelerator = Accelerator(cpu=not (cuda or mps), mixed_precision=precision, **options)
    accelerator.gradient_accumulation_steps = 1  # forward_backward accumulates, whatever the environment says
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        fail("the processes do not find each other: on CPUs, set ACCELERATE_USE_CPU=true in the environment")
    accelerator.wait_for_everyone()  # none is to give up below while another still looks for it
    if accelerator.is_fsdp2:  # weights and gradients travel as they are; autocast computes in bf16, as ever
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if accelerator.mixed_precision == "fp16":
            fail("mixed_precision='fp16' does not go with FSDP2: use bf16 or no")
        if detect_anomaly:
            fail("detect_anomaly looks into memory that FSDP2 has not filled yet: look for it without FSDP2")
        if accelerator.state.fsdp_plugin.activation_checkpointing:
            fail("fsdp_activation_checkpointing renames the weights: use gradient_checkpointing=True instead")
    elif accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        fail(f"{accelerator.distributed_type.value} is not supported: see configs/accelerate for what is")
    kind = accelerator.device.type
    if kind == "cpu":  # `accelerate launch` leaves a process one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        if platform.libc_ver()[0] == "glibc":  # malloc is to keep what a step frees: asking the system for
            mallopt = ctypes.CDLL(None).mallopt  # zeroed pages at each step costs a quarter of its time
            mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{kind}, {torch.get_num_threads()} threads"
    log(f"device: {name} (x {accelerator.num_processes}), precision {accelerator.mixed_precision}")
    if kind != "cuda":
        log("warning: no CUDA GPU was found; small models train well without one, large ones take very long")
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not accelerator.is_fsdp2:
            log("warning: Accelerate has FSDP for GPUs alone; here each process holds the whole model")
    return accelerator


def start_tracker(accelerator, run_id):
    wandb = {"id": run_id, "resume": "allow", "dir": out_dir, "name": Path(out_dir).name}
    try:
        options = {"wandb": wandb} if tracker == "wandb" else {}
        accelerator.init_trackers(Path(__file__).stem, settings(globals()), options)
    except Exception as error:  # no login, no network
        fail(f"{tracker=} did not start ({error}): WANDB_MODE=offline in the environment keeps it local")


def divide_batch(processes):
    """-> (samples of a forward pass, forward passes of a step) of each process."""
    micro = micro_batch_size or max(1, batch_size // processes)
    unit = micro * processes
    if batch_size % unit:
        near = " or ".join(str(n) for n in (batch_size // unit * unit, (batch_size // unit + 1) * unit) if n)
        fail(f"{batch_size=} is no multiple of {micro} samples x {processes} processes: use {near}")
    return micro, batch_size // unit


def make_profiler():
    """torch.profiler over three steps: a trace for chrome://tracing, and a table of the costliest calls."""

    def report(profiler):
        folder = Path(out_dir, "profile")
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (folder / "table.txt").write_text(profiler.key_averages().table(sort_by=by, row_limit=40))
        log(f"profile of three steps: {folder}")

    schedule = torch.profiler.schedule(wait=2, warmup=2, active=3, repeat=1)
    profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=report)
    on_main = os.environ.get("RANK", "0") == "0"
    return profiler if profile and on_main else contextlib.nullcontext()


# -----------------------------------------------------------------------------
# Training
# -----------------------------------------------------------------------------


def main():
    check_settings()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    if LAUNCHED:
        threading.Thread(target=watch_launcher, daemon=True).start()
    accelerator = start_accelerator()
    micro, accumulation = divide_batch(accelerator.num_processes)
    on_main, device = accelerator.is_main_process, accelerator.device.type
    lock = claim_run_dir() if on_main else None  # noqa: F841

    # data
    pipe = autoencoder = None
    if init_from != "scratch":
        auto = "bf16" if adapter and device == "cuda" and accelerator.mixed_precision == "bf16" else "fp32"
        dtype = auto if base_dtype == "auto" else base_dtype
        path = Path(init_from).expanduser()
        name = str(path.resolve()) if path.exists() else init_from
        pipe = load_pipeline(name, dtype)
        autoencoder = getattr(pipe, "vae", None)
    elif vae:
        autoencoder = load_autoencoder(vae)
    if autoencoder is not None:
        autoencoder.to(accelerator.device)
        check_image_size(reduction(autoencoder) * (1 if pipe else patch_size))
        if crop == "random":
            fail(f"{crop=}: latents are made once, of one crop; use crop='center'")
    elif pipe and image_size != pipe.unet.config.sample_size:
        fail(f"{image_size=}: the pictures of {init_from} have --image_size={pipe.unet.config.sample_size}")
    if adapter and autoencoder is None:
        fail(f"{adapter=} is for Stable Diffusion, by its captions: train {init_from} whole, --adapter=")
    process = process_of(pipe, zero_snr) if pipe else Process(objective, beta_schedule, zero_snr)
    check_process(process)
    if pipe and zero_snr:  # DDIM knows it, other schedulers may not
        pipe.scheduler = process.scheduler("ddim")
        log("zero_snr: what draws from this run needs rescale_betas_zero_snr and trailing timesteps")
    use = "label" if not pipe else "caption" if autoencoder is not None else ""
    folder, facts, captions = prepare_data(autoencoder, use)
    vision_model = load_vision_model() if fd_samples else None  # now, so that a wrong name costs no training
    n_classes, (channels, size) = len(facts["classes"]), facts["shape"]
    if pipe and channels > pipe.unet.config.in_channels:
        fail(f"{init_from} draws in grey, the pictures have colour: make them grey first")
    channels = pipe.unet.config.in_channels if pipe else channels  # grey pictures can be drawn in colour
    options = {
        "channels": channels,
        "size": size,
        "latent": autoencoder is not None,
        "seed": seed,
        "flip": flip,
    }
    splits = {split: Pictures(folder / f"{split}.bin", **options) for split in facts["splits"]}
    train = splits["train"]
    total_steps = math.ceil(epochs * len(train.labels) / batch_size) if epochs else max_steps

    # model and optimizers
    torch.manual_seed(seed)
    if pipe:
        prompts = [prompt.strip() for prompt in sample_prompts.split("|") if prompt.strip()] or captions[:4]
        table = prepare_captions(pipe, captions, folder, accelerator.device) if captions else {}
        shown = encode_captions(pipe, prompts, accelerator.device) if captions else {}
        net = UNet(pipe, Base(name, fingerprint(pipe.unet), dtype, size, channels), table)
        if adapter:
            add_lora(pipe.unet, lora_rank, lora_alpha, lora_targets)
        if gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        small = size <= 32 and not captions and not gradient_checkpointing
        if small and device == "cpu" and accelerator.mixed_precision == "bf16":
            from diffusers.models.attention_processor import AttnProcessor

            for part in pipe.unet.modules():
                if hasattr(part, "set_processor"):  # attention written out, as in attend(): it takes memory
                    part.set_processor(AttnProcessor())
        net.train()
    else:
        net = DiT(Shape(size, channels, patch_size, n_layer, n_head, n_embd, n_classes))
        net.gradient_checkpointing = gradient_checkpointing
    same_everywhere(facts, net.shape)
    optimizers = make_optimizers(net, accelerator.mixed_precision)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    peak_flops = accelerator.num_processes * next((f for name, f in PEAK_FLOPS.items() if name in gpu), 0)
    if peak_flops:  # the counter knows matrix products alone, so attention has to be made of them here
        x, y = (values.to(device) for values in train.read(np.zeros(1, int)))
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            net.to(device)(x, torch.zeros(1, device=device), y)
        # the backward pass takes twice the forward's, and once where the weights are frozen
        flops_per_picture = (2 if adapter else 3) * counter.get_total_flops()
    if compile and device == "cuda" and not detect_anomaly:
        blocks = [part for part in net.modules() if type(part).__name__ in net._no_split_modules]
        torch._dynamo.config.recompile_limit = 64  # blocks of many widths share their code
        for part in blocks if accelerator.is_fsdp2 and blocks else [net]:
            part.compile()  # in place: the parameters keep their names
    model, *steppers = accelerator.prepare(net, *optimizers)
    if accelerator.is_fsdp2:
        model.set_reshard_after_forward(True)  # weights that are gathered anew for each use are never stale

    # the run
    run = describe_run(accelerator, net, facts) | {"process": asdict(process), "classes": facts["classes"]}
    run |= {"prompts": prompts} if captions else {}
    found = broadcast_object_list([start_run(run) if on_main else None])[0]
    progress = {"step": 0, "best": math.inf, "waited": 0, "skipped": 0, "skipped_in_a_row": 0, "seconds": 0.0}
    progress |= {"metrics_bytes": 0, "tracker_id": uuid.uuid4().hex[:8]}
    if found:
        progress = load_checkpoint(accelerator, model, optimizers, found)
    from diffusers.training_utils import EMAModel

    average = progress.pop("ema", {})
    kept = average.pop("shadow_params", [])  # of the main process, which tells the others through the model
    progress, average = broadcast_object_list([progress, average])
    names = [name for name, weight in net.named_parameters() if weight.requires_grad]
    ema = EMAModel(trained_weights(net), decay=ema_decay, foreach=True) if ema_decay else None
    if ema and average:
        own = trained_weights(net)
        ema.store(own)
        dcp.set_model_state_dict(model, dict(zip(names, kept)), options=told_by_main(accelerator))
        ema.load_state_dict(average | {"decay": ema_decay, "shadow_params": [w.detach() for w in own]})
        ema.restore(own)
    if on_main and pipe and not (adapter or found):
        save_frozen(pipe, process)
    if captions:  # the text encoders have done their work
        pipe.text_encoder = pipe.text_encoder_2 = None
    if on_main:
        shutil.copyfile(__file__, Path(out_dir, Path(__file__).name))
    metrics = open_metrics(progress["metrics_bytes"]) if on_main else None
    if tracker:
        start_tracker(accelerator, progress["tracker_id"])
    rates = f"peak learning rates {', '.join(f'{p:g}' for p in peaks)}"
    name = "model" if init_from == "scratch" else f"model: {init_from} {adapter}".rstrip()
    log(f"{name}: {run['parameters']:,} parameters, {run['trained_parameters']:,} trained; {rates}")
    parts = f"{accelerator.num_processes} processes x {accumulation} micro-batches x {micro}"
    log(f"batch: {batch_size} pictures of {size} x {size} x {channels} = {parts}")
    log(f"length: {total_steps} steps, {total_steps * batch_size / len(train.labels):.2f} epochs")

    saved, clock = progress["step"], time.monotonic() - progress["seconds"]
    numbers = sample_numbers(saved, total_steps, micro, accumulation, accelerator.process_index)
    options = {"num_workers": num_workers, "pin_memory": device == "cuda", "generator": torch.Generator()}
    batches = iter(torch.utils.data.DataLoader(train, batch_size=None, sampler=numbers, **options))
    groups = [group for o in optimizers for group in o.param_groups]
    how = {"steps": sample_steps, "guidance": guidance if n_classes or captions else 1.0, "sampler": sampler}
    how |= {"autoencoder": autoencoder, "at_once": pictures_at_once(image_size) if pipe else 64}

    @torch.compiler.set_stance("force_eager")  # another size of batch would be compiled anew
    def answer(*noisy, **options):
        with accelerator.autocast():
            return net(*noisy, **options)

    space = process, (channels, size, size)
    draw = draw_samples = functools.partial(draw_pictures, answer, *space, **how)
    if captions:
        drawn = torch.arange(max(4, len(prompts))) % len(prompts)
        tell = functools.partial(answer, captions=shown)
        draw_samples = functools.partial(draw_pictures, tell, *space, **how)
    elif n_classes:
        drawn = (
            torch.arange(36) % n_classes if n_classes <= 36 else torch.linspace(0, n_classes - 1, 36).long()
        )
    else:
        drawn = torch.full((16 if pipe else 36,), -1)
    drawn = whole_pictures(drawn, image_size) if pipe else drawn
    bar = tqdm(total=total_steps, initial=saved, disable=None if on_main else True, dynamic_ncols=True)

    def report(values):
        """A row of metrics.jsonl and of the tracker, and a line on the terminal."""
        step = progress["step"]
        if on_main:
            row = {"step": step, "time": round(time.monotonic() - clock, 3), **values}
            metrics.write(json.dumps(row).encode() + b"\n")
        if tracker:
            accelerator.log(values, step=step)
        line = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if "train/loss" not in values or bar.disable:
            log(f"step {step}/{total_steps} {line}")
        else:
            bar.set_postfix_str(line)

    gc.freeze()  # what has been made so far stays: no search through it for garbage, for the length of a step
    STOP["polled"] = True
    with make_profiler() as profiler:
        while True:
            step = progress["step"]
            done, stop = step >= total_steps, stop_requested(accelerator)
            eval_due = done or step % eval_interval == 0
            if (done or stop or step % save_interval == 0 or (patience and eval_due)) and step > saved:
                with averaged(ema, net):
                    # first these: a run that goes on from the checkpoint has nothing more to write
                    if keep == "last" or "validation" not in splits:
                        save_weights(accelerator, model)
                    if ema:
                        average = dcp.get_model_state_dict(model, options=STATE)
                        weights = [average[name].clone() for name in names] if on_main else []
                        progress["ema"] = ema.state_dict() | {"shadow_params": weights}
                progress["seconds"] = time.monotonic() - clock
                progress["metrics_bytes"] = metrics.tell() if metrics else 0
                save_checkpoint(accelerator, model, optimizers, progress)
                saved = step
            if stop:
                break
            if eval_due:
                with averaged(ema, net):
                    if "validation" in splits:
                        values = evaluate(
                            accelerator, model, process, "val", splits["validation"], micro, eval_batches
                        )
                        if values is None:  # a signal came: save, then leave
                            continue
                        report(values)
                        # nobody wants the weights of step 0
                        better = values["val/loss"] < progress["best"] and (step > 0 or done)
                        progress["waited"] = 0 if better else progress["waited"] + (step > 0)
                        progress["best"] = values["val/loss"] if better else progress["best"]
                        if better and keep == "best":
                            save_weights(accelerator, model)
                    write_sample(accelerator, draw_samples, drawn, step)
            if done or 0 < patience <= progress["waited"]:
                break
            if eval_due or step == saved:
                window = time.monotonic(), step  # speed is measured between evaluations

            set_learning_rates(groups, peaks, step, total_steps)
            micro_batches = [next(batches) for _ in range(accumulation)]
            micro_batches = add_noise(accelerator, process, micro_batches, step)
            loss, grad_norm, finite = train_step(accelerator, model, steppers, micro_batches, step)
            if finite and ema:
                ema.step(trained_weights(net))
            progress["step"] = step = step + 1
            count_skipped(progress, finite, saved)
            if step % log_interval == 0 or step == total_steps:
                speed = (step - window[1]) * batch_size / (time.monotonic() - window[0])
                window = time.monotonic(), step
                memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
                values = {"train/loss": loss, "lr": groups[0]["lr"], "grad_norm": grad_norm}
                values |= {"images_per_s": speed, "epoch": step * batch_size / len(train.labels)}
                values |= {"mfu": speed * flops_per_picture / peak_flops} if peak_flops else {}
                report(values | {"memory": memory / 1e9})
            bar.update()
            if profiler:
                profiler.step()
    bar.close()

    # the end
    if not stop:
        if progress["best"] == math.inf or step == 0:  # no weights have been kept
            with averaged(ema, net):
                save_weights(accelerator, model)
        load_weights(accelerator, model)
        net.eval()
    summary = {"steps": step, "skipped": progress["skipped"], "minutes": (time.monotonic() - clock) / 60}
    summary |= {"val/loss": progress["best"]} if progress["best"] < math.inf else {}
    if not stop and "test" in splits:
        values = evaluate(accelerator, model, process, "test", splits["test"], micro, 0)
        stop = stop_requested(accelerator)
        if not stop:
            report(values)
            summary |= values
    if not stop and fd_samples:
        name = next(split for split in ("test", "validation", "train") if split in splits)
        values = measure_fd(accelerator, draw, vision_model, name, splits[name], autoencoder, micro)
        stop = stop_requested(accelerator)
        if not stop:
            report(values)
            summary |= values
    if stop:
        log(f"stopped at step {step}; the same command with --resume=True goes on")
    else:
        for name, value in summary.items():
            log(f"{name}: {value}")
        if on_main:
            write_json(Path(out_dir, "run.json"), run | {"summary": summary})
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.num_processes > 1:  # gloo's threads may abort a process that ends in the usual way
        os._exit(128 + stop if stop else 0)
    raise SystemExit(128 + stop if stop else 0)


if __name__ == "__main__":
    configure(globals())
    check_legal()
    try:
        main()
    except Exception as error:
        if not re.search(CANNOT_WRITE, str(error)):
            raise
        fail(f"cannot write ({reason(error)}); what was saved is whole, and --resume=True goes on with it")
