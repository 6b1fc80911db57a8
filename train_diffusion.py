"""
Train a diffusion model. This one file holds the model, the mathematics, the data loading and the training
loop.

    accelerate launch train_diffusion.py                                   # on letters and digits
    accelerate launch train_diffusion.py configs/cifar10.py --n_layer=8    # a config, one setting changed
    accelerate launch train_diffusion.py --dataset=photos/ --image_size=64 --out_dir=out/mine
    accelerate launch train_diffusion.py configs/zimage_lora.py            # fine-tune a pretrained pipeline

Then `python sample.py --out_dir=out/diffusion` draws images. Ctrl-C saves a checkpoint, and the same command
with --resume=True goes on from it.
"""

import os

# The process that launched this one. Note it before the slow imports, because it may die during them.
LAUNCHER_PID = os.getppid()

import contextlib
import csv
import ctypes
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
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
import traceback
import warnings
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import datasets
import filelock
import numpy as np
import psutil
import pyarrow.compute
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast, broadcast_object_list, gather_object, send_to_device
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch.utils.checkpoint import checkpoint as recompute  # computes activations again during backward
from torch.utils.data import DataLoader

# configure() applies config files and the command line to the settings below. settings() lists them. fail()
# ends the program with a message. `with named(setting, value):` does so if a library raises an error inside.
# sections() returns the text of sections of a script.
from configurator import configure, fail, named, sections, settings

# ---- Settings: change them here, in a config file, or by --name=value on the command line ----
# Settings are global variables in lowercase, which any function may read.

# the run
out_dir = "out/diffusion"  # the folder that everything is written to
resume = False  # continue from the checkpoint in out_dir, or start if there is no run
overwrite = False  # delete the run in out_dir and start a new one
seed = 1337  # random seed for the initial weights, the order of the data, the noise and its levels
# data
dataset = "glyphs"  # letters and digits; or an image folder, .parquet, Hugging Face name[:config][@revision]
image_column = "image"  # column with the images, if the data is a table
label_column = "label"  # column with the class (in a folder, the subfolder is the class); "": no classes
caption_column = "text"  # with init_from: column with the captions (in a folder: .txt files beside images)
caption = ""  # with init_from: one caption for all images
val_fraction = 0.05  # part of the data for validation, unless it has a validation split; 0: none
test_fraction = 0.05  # part for the test at the end, unless the data has a test split; 0: none
image_size = 16  # height and width in pixels; larger and smaller images are scaled, and cropped to a square
flip = False  # learn from the mirror image of every image, too
num_workers = 0  # processes that load data; use 2 or more if a GPU waits for data
# model; with init_from, the pipeline brings its own
init_from = "scratch"  # random weights; or a text-to-image pipeline to fine-tune: Hub name or folder
adapter = ""  # with init_from: "lora" trains only a few new weights; "": all of the denoiser
vae = ""  # autoencoder that first compresses the images: Hub name or folder of an AutoencoderKL; "": none
patch_size = 2  # patch_size x patch_size pixels or latents are one token; smaller is better and slower
n_layer = 6  # number of transformer blocks
n_head = 2  # number of attention heads
n_embd = 128  # width of the model, a multiple of 4 and of n_head
# adapter
lora_rank = 16  # lora: size of the new weights; a higher rank can learn more and takes more memory
lora_alpha = 16.0  # lora: strength; what the new weights add is multiplied by lora_alpha / lora_rank
lora_targets = ""  # lora: layers that get new weights, such as to_q,to_v; "": all linear ones in the blocks
frozen_fp8 = False  # lora: store all other weights in 8 bits; saves memory if gradient_checkpointing is on
# diffusion
prediction = "flow"  # what the model predicts: "flow" (noise - image), "v", "eps" (noise) or "x0" (image)
label_dropout = 0.1  # fraction of the examples that are trained without class or caption; guidance needs this
ema_decay = 0.999  # a running average of the weights is evaluated and saved; this is its decay; 0: none
# sampling
sampler = "dpm++"  # turns noise into images: "dpm++" (more exact) or "ddim" (simpler; with flow, it is Euler)
sample_steps = 0  # steps from noise to image; 0: the default (25, or that of the pipeline)
guidance = -1.0  # strength of guidance; 1 is none (for Z-Image, 0); -1: the default (2, or the pipeline's)
sample_prompts = ""  # with init_from: what to draw at each evaluation, separated by |; "": the first captions
# batch and length
batch_size = 64  # images per optimizer step, over all processes
micro_batch_size = 0  # images per forward pass; lower it to save memory; 0: batch_size / processes
max_steps = 600  # number of optimizer steps; 0: only evaluate
epochs = 0.0  # if not 0, train for this many passes over the data, whatever max_steps is
# optimizer and learning rate
optimizer = "muon"  # "muon" (for the blocks' matrices; AdamW for the rest) or "adamw"; with init_from: adamw
learning_rate = 0.0  # peak learning rate; 0: a default for the optimizer (DEFAULT_LR in this script)
adamw_lr = 0.005  # with muon: peak learning rate of all parameters but the matrices in the blocks
beta1 = 0.8  # AdamW's decay rate for the mean of the gradient
beta2 = 0.95  # AdamW's decay rate for the mean of the squared gradient
weight_decay = 0.03  # pulls the matrices in the blocks towards zero; with adamw, all matrices
warmup_steps = 20  # steps in which the learning rate rises; with wsd and cosine, at most a tenth of the run
lr_schedule = "wsd"  # "wsd" (warm-up, stable, decay), "cosine" or "constant"
cooldown = 0.9  # wsd: the learning rate falls during this last fraction of the steps
min_lr = 0.02  # learning rate at the end, as a fraction of the peak
grad_clip = 1.0  # larger gradients are scaled down to this norm; 0: never
# evaluation, saving, reports
eval_interval = 300  # steps between evaluations; 0: only at the end
eval_batches = 4  # batches per evaluation, spread evenly over the validation split; 0: the whole split
log_interval = 10  # steps between reports; 0: only at the end
save_interval = 300  # steps between checkpoints; 0: only at the end
patience = 0  # stop early after this many evaluations without a better loss; 0: never
tracker = ""  # "wandb" or "tensorboard": log there, too; metrics.jsonl is always written
# the machine
mixed_precision = "auto"  # the best that the hardware has; or "bf16", "fp16", "no" (fp32)
compile = True  # torch.compile on CUDA (elsewhere ignored): a minute at the start, then much faster
gradient_checkpointing = False  # saves memory by computing activations twice; slower
deterministic = False  # bitwise repeatable runs, on a GPU too; slower
detect_anomaly = False  # stops at the first NaN in a gradient and shows where it came from; very slow
profile = False  # writes a trace of steps 6 to 8, when compilation is over, for chrome://tracing

DEFAULT_LR = {"muon": 0.02, "adamw": 0.001, "fine-tuning": 1e-5, "lora": 1e-4}
# In these settings, configure() replaces a ~ at the beginning by the home folder.
PATHS = ("out_dir", "dataset", "init_from", "vae")
# Settings that a resumed run may not change. If you add a setting that shapes the model, add its name.
FIXED = """
    seed batch_size image_size flip vae init_from adapter lora_rank lora_alpha lora_targets prediction
    patch_size n_layer n_head n_embd optimizer beta1 beta2 weight_decay eval_batches
""".split()

# ---- Process helpers ----

RANK = int(os.environ.get("RANK", "0"))  # index of this process, set by the launcher
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # number of processes
MAIN = RANK == 0  # the process that writes files and reports
RECEIVED = []  # the signals that were received; once there is one, the run saves and exits
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # Windows has no SIGHUP


def log(message):
    """Print a message, in the main process only."""
    if not MAIN:
        return
    # print() would raise for characters that the terminal cannot show. Escape them: é becomes \xe9.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # stdout may be closed, and None
    printable = message.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(printable, flush=True)
    except OSError:
        # Nobody reads the output any more (| head, a closed terminal). Save and exit. Until then, and when
        # Python flushes stdout at the end, the output goes to /dev/null.
        RECEIVED.append(signal.SIGTERM)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())


def catch_signals():
    """Save and exit on Ctrl-C, SIGTERM, a closed terminal and, on Linux, if the launcher dies."""
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP, and so do we
            signal.signal(signum, lambda received, frame: RECEIVED.append(received))
    # `accelerate launch` sets one of these variables.
    is_single = "ACCELERATE_MIXED_PRECISION" in os.environ
    is_one_of_several = "TORCHELASTIC_RUN_ID" in os.environ
    if (is_single or is_one_of_several) and sys.platform == "linux":
        stop_with_launcher()


def stop_with_launcher():
    """Ask Linux to send SIGTERM when the launcher dies. Otherwise this process would train on unnoticed."""
    PR_SET_PDEATHSIG = 1  # from prctl(2): choose the signal that this process gets when its parent dies
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != LAUNCHER_PID:  # the launcher died before this call
        RECEIVED.append(signal.SIGTERM)


def ignore_signals(worker_id):
    """Let a data worker ignore signals, so that the training process can finish its step and save.

    The DataLoader passes the number of the worker, which is not needed.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


# ---- Check the settings ----

MUST_BE_POSITIVE = "batch_size image_size patch_size n_layer n_head n_embd lora_rank lora_alpha".split()
MUST_BE_BELOW_ONE = "ema_decay beta1 beta2 val_fraction test_fraction".split()
MUST_BE_AT_MOST_ONE = "cooldown min_lr label_dropout".split()
CHOICES = {
    "adapter": ("", "lora"),
    "prediction": ("flow", "v", "eps", "x0"),
    "sampler": ("dpm++", "ddim"),
    "optimizer": ("muon", "adamw"),
    "lr_schedule": ("wsd", "cosine", "constant"),
    "mixed_precision": ("auto", "bf16", "fp16", "no"),
    "tracker": ("", "wandb", "tensorboard"),
}


def check_settings():
    """End the program for settings that cannot work, before any data is touched."""
    for name, value in settings(globals()).items():  # the variables at the top of this file
        if name in CHOICES and value not in CHOICES[name]:
            choices = ", ".join(map(repr, CHOICES[name]))
            fail(f"{name}={value!r} must be one of {choices}")
        if isinstance(value, str):
            continue  # the rest is about numbers
        if value < 0 and name != "guidance":
            fail(f"{name}={value} must not be negative")
        if value == 0 and name in MUST_BE_POSITIVE:
            fail(f"{name}={value} must be greater than 0")
        if value >= 1 and name in MUST_BE_BELOW_ONE:
            fail(f"{name}={value} must be below 1")
        if value > 1 and name in MUST_BE_AT_MOST_ONE:
            fail(f"{name}={value} must be at most 1")
    if guidance < 0 and guidance != -1:
        fail(f"{guidance=} must be at least 0, or -1 for the default")
    if seed >= 2**63:  # torch keeps seeds as 64-bit integers with a sign
        fail(f"{seed=} must be below 2**63")
    if n_embd % 4 != 0 or n_embd % n_head != 0:
        fail(f"{n_embd=} must be a multiple of 4 and of {n_head=}")
    if init_from == "scratch" and (adapter or caption):
        fail("--adapter and --caption need a pretrained pipeline: name one by --init_from=")
    if frozen_fp8 and not (adapter and gradient_checkpointing):
        fail(f"{frozen_fp8=} saves memory only with --adapter=lora and --gradient_checkpointing=True")
    if init_from != "scratch" and vae:
        fail(f"{vae=} cannot be used: {init_from} has its own autoencoder")
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        fail(f"{mixed_precision=} needs a CUDA GPU")
    if mixed_precision == "fp16" and optimizer == "muon" and init_from == "scratch":
        fail(f"{mixed_precision=} needs --optimizer=adamw: Muon does not support fp16's loss scaling")
    if tracker and importlib.util.find_spec(tracker) is None:
        fail(f"{tracker=} is not installed: pip install {tracker}")
    if patience > 0 and eval_interval == 0:
        fail(f"{patience=} needs evaluations during the run: set --eval_interval=250")
    if resume and overwrite:
        fail("--resume=True continues the run that --overwrite=True would delete: use only one of them")
    if not dataset:
        fail("dataset has no value: name a folder of images, a .parquet file or a dataset of the Hub")


# ---- Model: a diffusion transformer (DiT: Peebles & Xie 2022, arXiv:2212.09748) ----
# The image is cut into patches, which are the tokens. Every block is told the time and the class.


def norm(x):
    """Return x divided by the root mean square of its last dimension (RMSNorm, arXiv:1910.07467)."""
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


def sinusoidal_embedding(x, lowest, n):
    """Return the cosines and sines (..., 2 n) of x (...) at n frequencies, as in arXiv:1706.03762."""
    exponents = torch.arange(n, device=x.device) / n  # from 0 up to nearly 1
    frequencies = lowest**exponents  # from 1 down to nearly `lowest`
    angles = x[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def attention(q, k, v):
    """Return softmax(q k^T / sqrt(D)) v, in which every token sees all tokens. q, k, v: (B, n_head, T, D)."""
    if q.is_cpu and q.size(2) <= 512:
        return cpu_attention(q, k, v)  # makes the default run 1.3 times as fast
    return F.scaled_dot_product_attention(q, k, v)


def cpu_attention(q, k, v):
    """Compute attention() step by step, which on a CPU is faster than torch's kernel for few tokens."""
    q = q / math.sqrt(q.size(-1))
    scores = q @ k.mT  # (B, n_head, T, T)
    weights = scores.softmax(dim=-1, dtype=v.dtype)  # without dtype, autocast would return fp32
    return weights @ v


class Attention(nn.Module):
    """Self-attention over all tokens of an image."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, n_head, -1).transpose(1, 2)  # (B, n_head, T, D)
        k = self.k_proj(x).view(B, T, n_head, -1).transpose(1, 2)  # (B, n_head, T, D)
        v = self.v_proj(x).view(B, T, n_head, -1).transpose(1, 2)  # (B, n_head, T, D)
        q = norm(q)  # QK-norm keeps the attention logits in bounds
        k = norm(k)
        y = attention(q, k, v)  # (B, n_head, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with a squared ReLU between them (So et al. 2021, arXiv:2109.08668)."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.fc2 = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())


class Block(nn.Module):
    """Attention and an MLP. The condition c scales and shifts their input and gates their output."""

    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.mlp = MLP()
        self.modulation = nn.Linear(n_embd, 6 * n_embd)  # adaLN-Zero: starts at zero, with all gates closed

    def forward(self, x, c):
        """Return x (B, T, C), changed under the condition c (B, C)."""
        modulation = self.modulation(c)[:, None]  # (B, 1, 6 C)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.self_attn(norm(x) * (1 + scale1) + shift1)
        x = x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)
        return x


class DiT(nn.Module):
    """The whole model, for images or latents of a shape (channels, size, size)."""

    def __init__(self, shape, class_names):
        super().__init__()
        channels, size, _ = shape
        n_side = size // patch_size  # patches in a row, and in a column
        self.shape = shape
        self.class_names = class_names  # for draw()
        self.no_class = len(class_names)  # index of one more embedding, used if the class is hidden
        self.prediction = prediction  # a Pipeline (see below) has this attribute, too, from its scheduler

        self.patch_in = nn.Linear(channels * patch_size**2, n_embd)
        # Position embeddings: sinusoids of rows and columns at first, then learned.
        grid = torch.cartesian_prod(torch.arange(n_side), torch.arange(n_side))  # (T, 2)
        # The frequencies are 2 down to 0.1 radians per patch: waves of 3 to 63 patches.
        sinusoids = sinusoidal_embedding(2 * grid, lowest=0.05, n=n_embd // 4)
        self.position = nn.Parameter(sinusoids.flatten(1))  # (T, C)
        self.time_mlp = nn.Sequential(nn.Linear(256, n_embd), nn.SiLU(), nn.Linear(n_embd, n_embd))
        self.class_embedding = nn.Embedding(len(class_names) + 1, n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.modulation = nn.Linear(n_embd, 2 * n_embd)
        self.patch_out = nn.Linear(n_embd, channels * patch_size**2)
        self.init_weights()

    def init_weights(self):
        """Set the initial weights. Parameters that are not listed here keep the initialization of torch."""
        for block in self.blocks:
            for p in block.parameters():
                if p.ndim == 2:
                    nn.init.xavier_uniform_(p)
        modulations = [block.modulation for block in self.blocks]  # at zero, each block is the identity
        for layer in [*modulations, self.modulation, self.patch_out]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, cond):
        """Return the prediction, in fp32 and of the shape of x.

        x: noisy images (B, channels, size, size). t: their times (B,), from 0 to 1. cond: the indices
        of their classes (B,).
        """
        patches = F.pixel_unshuffle(x, patch_size)  # (B, channels p p, size / p, size / p)
        x = self.patch_in(patches.flatten(2).mT) + self.position  # (B, T, C)
        t_embedding = sinusoidal_embedding(1000 * t, lowest=1e-4, n=128)  # times as in DDPM, 0 to 1000
        c = F.silu(self.time_mlp(t_embedding) + self.class_embedding(cond))  # (B, C)
        for block in self.blocks:
            if gradient_checkpointing and self.training:
                x = recompute(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        scale, shift = self.modulation(c)[:, None].chunk(2, dim=-1)  # (B, 1, C)
        x = self.patch_out(norm(x) * (1 + scale) + shift).float()  # (B, T, channels p p)
        x = x.mT.reshape(patches.shape)  # (B, channels p p, size / p, size / p)
        return F.pixel_shuffle(x, patch_size)

    def alpha_sigma(self, t):
        """Return alpha and sigma at times t."""
        return schedule(self.prediction, t)

    def sample_times(self, n, rng):
        """Return n random times for training, few of them near 0 or 1 (logit-normal, arXiv:2403.03206)."""
        return torch.sigmoid(torch.randn(n, generator=rng, device=rng.device))


# ---- The mathematics of diffusion ----
# Times t run from 0 (an image x_0) to 1 (noise eps from N(0, I)). The forward process is
#
#     x_t = alpha x_0 + sigma eps
#
#   prediction  alpha   sigma   what the model learns   x_0 recovered from it
#   flow        1 - t   t       eps - x_0               x_t - sigma prediction            arXiv:2209.03003
#   v           cos(a)  sin(a)  alpha eps - sigma x_0   alpha x_t - sigma prediction      arXiv:2202.00512
#   eps         cos(a)  sin(a)  eps                     (x_t - sigma prediction) / alpha  arXiv:2006.11239
#   x0          cos(a)  sin(a)  x_0                     prediction
#
# where a = 0.99 pi t / 2. The factor 0.99 keeps alpha above 0 at t = 1, because x_0 is divided by it if the
# prediction is eps. The loss is the mean squared error of the prediction. Pretrained pipelines have schedules
# of their own for alpha and sigma.


def schedule(prediction, t):
    """Return alpha and sigma at times t of any shape, by the table above."""
    if prediction == "flow":
        return 1 - t, t
    angle = 0.99 * math.pi / 2 * t
    return angle.cos(), angle.sin()


def add_noise(model, x_0, eps, t):
    """Return x_t at times t (B,), by the forward process, and the target: what the model learns from it."""
    alpha, sigma = model.alpha_sigma(t)
    alpha = expand_to(x_0, alpha)
    sigma = expand_to(x_0, sigma)
    x_t = alpha * x_0 + sigma * eps
    if model.prediction == "flow":
        return x_t, eps - x_0
    if model.prediction == "v":
        return x_t, alpha * eps - sigma * x_0
    if model.prediction == "eps":
        return x_t, eps
    return x_t, x_0


def expand_to(x, values):
    """Return values (B,) as (B, 1, 1, 1), or as (B, 1, 1) for the packed latents of some pipelines."""
    ones = [1] * (x.ndim - 1)
    return values.view(-1, *ones)


def predict_x_0(model, x_t, t, cond, scale):
    """Return the model's estimate of x_0, with classifier-free guidance of this scale (arXiv:2207.12598)."""
    times = t.expand(len(x_t))  # one time for the whole batch
    if scale == 1:
        output = model(x_t, times, cond)
    else:  # one call with a batch of twice the size
        no_class = torch.full_like(cond, model.no_class)
        outputs = model(torch.cat((x_t, x_t)), torch.cat((times, times)), torch.cat((cond, no_class)))
        output, unconditional = outputs.chunk(2)
        output = unconditional + scale * (output - unconditional)
    alpha, sigma = model.alpha_sigma(t)
    if model.prediction == "flow":
        return x_t - sigma * output
    if model.prediction == "v":
        return alpha * x_t - sigma * output
    if model.prediction == "eps":
        return (x_t - sigma * output) / alpha
    return output


@torch.no_grad()
def sample(model, cond, seeds, steps, scale):
    """Return images (B, *model.shape), going from noise at time 1 to time 0: the reverse process.

    "ddim" takes the estimates of x_0 and eps as constant through a step (Song et al. 2020, arXiv:2010.02502).
    "dpm++" is DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095): a straight line through the last two
    estimates of x_0, as a function of log(alpha / sigma), is evaluated in the middle of the step. Both call
    the model once a step.
    """
    times = torch.linspace(1, 0, steps + 1, device=cond.device)
    x = noise_of(seeds, model.shape).to(cond.device)
    before = None  # x_0 and h of the step before
    for i in range(steps):
        alpha, sigma = model.alpha_sigma(times[i])
        alpha_next, sigma_next = model.alpha_sigma(times[i + 1])
        h = torch.log(alpha_next / sigma_next) - torch.log(alpha / sigma)  # the length of the step
        x_0 = predict_x_0(model, x, times[i], cond, scale)
        estimate = x_0
        # There is no correction in the last step, where sigma_next = 0 makes h infinite. With flow, alpha = 0
        # makes h infinite in the first step, too. As h_before, it makes the correction of the second step 0.
        if sampler == "dpm++" and 0 < i < steps - 1:
            x_0_before, h_before = before
            estimate = x_0 + h / (2 * h_before) * (x_0 - x_0_before)
        eps = (x - alpha * estimate) / sigma
        x = alpha_next * estimate + sigma_next * eps
        before = (x_0, h)
    return x


def noise_of(seeds, shape):
    """Return noise (B, *shape), each sample by its own seed and the same on every device."""
    rngs = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return torch.stack([torch.randn(*shape, generator=rng) for rng in rngs])


# ---- Data: files or tables -> images, and their classes or captions ----

# The suffixes of files that Pillow can open, except documents
FORMATS = Image.registered_extensions()  # {suffix: format}
READABLE = {suffix for suffix, name in FORMATS.items() if name in Image.OPEN}
IMAGE_SUFFIXES = READABLE - {".pdf", ".eps", ".ps"}
# The splits that the names of folders, of files and of the Hub's splits stand for.
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# Shard numbers and a hash, which may follow such a name: test-00000-of-00001-a09b74b3ef9c3b56
SHARD_SUFFIX = r"([-_]\d+(-of-\d+)?)?(-[0-9a-f]{16})?$"


def list_files(path, seen):
    """Yield the path itself if it is a file, or else all files below it that are not hidden.

    Links are followed. `seen` is the set of the real paths of folders so far: it makes sure that a folder
    with a link to itself is read once.
    """
    if path.is_file() or not path.exists():  # a link to nothing; the log will say that it cannot be read
        yield path
    elif path.is_dir():
        real_path = os.path.realpath(path)
        if real_path in seen:
            return
        seen.add(real_path)
        with named("dataset", dataset):
            children = sorted(path.iterdir())
        for child in children:
            if child.name[0] != ".":
                yield from list_files(child, seen)


def find_root():
    """Return the path that `dataset` names; for a glob pattern, the folder before the first wildcard."""
    if os.path.exists(dataset):
        return Path(dataset)
    before_wildcard = re.split(r"[*?[]", dataset)[0]
    return Path(os.path.dirname(before_wildcard))


def list_dataset():
    """Return all files that `dataset` names, except those of this run."""
    own_folder = Path(out_dir).resolve()
    if os.path.exists(dataset):
        seen = {str(own_folder)}
        return list(list_files(find_root(), seen))
    # A glob pattern. The name of a dataset of the Hub also gets here; as a pattern it matches no files.
    names = sorted(glob.glob(dataset, recursive=True))
    paths = [Path(name) for name in names if os.path.isfile(name)]
    return [path for path in paths if not path.resolve().is_relative_to(own_folder)]


def find_files():
    """Return (kind, paths, descriptions) for the files that `dataset` names.

    kind: "image", "parquet", or "hub" if there are no such files. descriptions: captions (.txt), and the
    metadata files of Hugging Face's "imagefolder" format.
    """
    files = list_dataset()
    if not files and not os.path.isdir(dataset):
        log(f"there is no file or folder {dataset}: looking for it on the Hugging Face Hub")
        return "hub", [], []
    # Images beside .parquet files are left out: often, they are the screenshots of a README.md.
    kind = "parquet"
    tables = [path for path in files if path.suffix.lower() == ".parquet" and path.exists()]
    used = [path for path in tables if path.stem != "metadata"]
    descriptions = []
    if not used:
        kind = "image"
        used = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        metadata = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
        descriptions = [path for path in files if path.suffix == ".txt" or path.name in metadata]
    left_out = sorted(set(files) - set(used) - set(descriptions))
    if left_out:
        log(f"left out: {len(left_out)} files that are not {kind} files, such as {left_out[0]}")
    if not used:
        fail(f"{dataset=} holds no file of a supported kind: images or .parquet")
    return kind, used, descriptions


def split_of(names):
    """Return the split that one of the names stands for, and the index of that name; else ("train", -1).

    Some datasets of the Hub have further splits, in files such as test_small-00000-of-00001.parquet.
    """
    for i, name in enumerate(names):
        split_name = re.sub(SHARD_SUFFIX, "", name.lower())
        if split_name in SPLITS:
            return SPLITS[split_name], i
        is_shard = re.search(r"-\d+-of-\d+", name)
        if is_shard and split_name.split("_")[0] in SPLITS:
            return split_name, i
    return "train", -1


def load_images():
    """Return ({split: (images, texts)}, class names).

    images: a Dataset with a column "image", which has the "bytes" of each image or its "path". texts: for
    each image its class or caption, or None. class names: those of a column of the type ClassLabel, or [].
    """
    if dataset == "glyphs":
        features = {"image": datasets.Image(), "label": datasets.Value("string")}
        table = cached(image_size, features, draw_glyphs, image_size)
        return read_tables({"train": table})
    kind, paths, descriptions = find_files()
    if kind == "image":
        return read_folder(paths, descriptions), []
    if kind == "hub":
        name, _, revision = dataset.partition("@")
        name, _, config = name.partition(":")
        with named("dataset", dataset):
            tables = datasets.load_dataset(name, config or None, revision=revision or None)
        return read_tables(tables)
    by_split = defaultdict(list)
    for path in paths:
        split, _ = split_of([*folders_of(path), path.stem])
        by_split[split].append(glob.escape(str(path)))  # load_dataset() takes patterns
    with named("dataset", dataset):
        tables = datasets.load_dataset("parquet", data_files=dict(by_split))
    return read_tables(tables)


def folders_of(path):
    """Return the names of the folders between `dataset` and a file in it."""
    return path.relative_to(find_root()).parts[:-1]


def read_tables(tables):
    """Return ({split: (images, texts)}, class names) for {split: table}; see load_images()."""
    column = label_column if init_from == "scratch" else caption_column
    splits = {}
    class_names = []
    for split, table in tables.items():
        if isinstance(table.features.get(image_column), datasets.List | datasets.LargeList):
            fail(
                f"{dataset=}: {image_column=} holds lists: each row must be one image, as the bytes of a file"
            )
        if image_column not in table.features:
            fail(
                f"{dataset=} has no {image_column=}: --image_column= takes one of {', '.join(table.features)}"
            )
        texts = [caption or None] * len(table)
        if column in table.features and not caption:
            feature = table.features[column]
            if isinstance(feature, datasets.List | datasets.LargeList):
                feature = feature.feature  # the type of its elements
            if isinstance(feature, datasets.ClassLabel):
                class_names = feature.names
            texts = [as_text(field, column, class_names) for field in table[column][:]]
        unused = [name for name in table.features if name not in (image_column, column)]
        if unused:
            log(f"{split}: columns that are not used: {', '.join(unused)}")
        with named("image_column", image_column):
            images = table.select_columns(image_column).rename_columns({image_column: "image"})
            images = images.cast_column("image", datasets.Image(decode=False))
        splits[split] = (images, texts)
    return splits, class_names


def as_text(field, column, class_names=()):
    """Return a field of a table as text, a class or a caption; None if it is empty."""
    if isinstance(field, list):  # if there are several, take the first
        field = field[0] if field else None
    if field is None or (isinstance(field, float) and math.isnan(field)):
        return None
    if class_names:
        if not -1 <= field < len(class_names):
            fail(f"{dataset=}: column {column!r} holds {field}, but it has {len(class_names)} class names")
        return None if field == -1 else class_names[field]  # -1: unlabeled
    if not isinstance(field, str | int | float):
        fail(f"{dataset=}: column {column!r} holds {repr(field)[:60]}, which is neither text nor a number")
    text = str(field).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold characters that are not Unicode
        fail(f"{dataset=}: {text[:40]!r} in column {column!r} is not UTF-8 ({error}): take it out")
    return text or None


def read_folder(paths, descriptions):
    """Return {split: (images, texts)} for the paths of images; see load_images().

    The class of cats/1.png, train/cats/1.png and train/cats/old/1.png is "cats". The caption of 1.png is in
    1.txt. With metadata files, only the images that they list are used, and their columns take precedence.
    """
    column = label_column if init_from == "scratch" else caption_column
    metadata = read_metadata([path for path in descriptions if path.suffix != ".txt"])
    has_metadata = len(metadata) > 0
    unused = sorted({name for row in metadata.values() for name in row} - {"file_name", column})
    if unused:
        log(f"columns that are not used: {', '.join(unused)}")
    found = defaultdict(list)  # {split: [(path, text)]}
    seen = set()
    n_left_out = 0
    for path in paths:
        row = metadata.pop(os.path.abspath(path), {})
        if has_metadata and not row:
            n_left_out += 1
            continue
        folders = folders_of(path)
        split, _ = split_of(folders)
        text = text_of_image(path, folders, row, column)
        # An image and links to it count once, but may be in several splits or classes.
        place = (split, text, os.path.realpath(path))
        if place not in seen:
            seen.add(place)
            found[split].append((path, text))
    if not found:
        fail(f"{dataset=}: the metadata file lists none of the images: file_name is relative to its folder")
    if n_left_out:
        log(f"left out: {n_left_out} images that are not in the metadata file")
    if metadata:  # the rows of the images that were found have been taken out
        log(f"{len(metadata)} images in the metadata file are not in {dataset}, such as {min(metadata)}")
    captions = {path for path in descriptions if path.suffix == ".txt"}
    if init_from != "scratch":
        captions -= {path.with_suffix(".txt") for path in paths}
    if captions:
        log(f"not used: {len(captions)} .txt files, such as {min(captions)}")
    return {split: to_columns(pairs) for split, pairs in found.items()}


def text_of_image(path, folders, row, column):
    """Return the class or the caption of an image file, or None.

    folders: those above it, see folders_of(). row: what a metadata file says of it, or {}.
    """
    if caption:
        return caption
    if column in row:
        return as_text(row[column], column)
    if init_from != "scratch":
        return read_caption(path.with_suffix(".txt"))
    if not column:
        return None
    _, index = split_of(folders)  # -1 if no folder names a split
    below = folders[index + 1 :]  # "cats" in train/cats/1.png
    above = folders[: max(0, index)]  # "cats" in cats/train/1.png
    candidates = [*below, *above]
    return candidates[0] if candidates else None


def to_columns(pairs):
    """Return (images, texts) for pairs of the path and the text of an image; see load_images()."""
    # Names of files may hold bytes that are not UTF-8, so they are stored as binary.
    file_columns = {"bytes": datasets.Value("binary"), "path": datasets.Value("binary")}
    files = [{"bytes": None, "path": os.fsencode(path)} for path, _ in pairs]
    images = datasets.Dataset.from_dict({"image": files}, datasets.Features({"image": file_columns}))
    return images, [text for _, text in pairs]


def read_caption(path):
    """Return the caption in a .txt file, or None if there is no such file."""
    if not path.exists():
        return None
    with named("caption", str(path)):
        text = path.read_text(encoding="utf-8-sig").strip()
    if not text:
        fail(f"the caption {path} is empty: write one, or remove the file")
    return text


def read_metadata(files):
    """Return {path of an image: its row} of metadata files, which have a column file_name."""
    metadata = {}
    n_repeated = 0
    for file in files:
        with named("dataset", str(file)):
            if file.suffix == ".parquet":
                rows = datasets.Dataset.from_parquet(glob.escape(str(file))).to_list()
            elif file.suffix == ".csv":
                with open(file, newline="", encoding="utf-8-sig") as f:
                    rows = list(csv.DictReader(f, strict=True, skipinitialspace=True))
            else:
                with open(file, encoding="utf-8-sig") as f:
                    rows = [json.loads(line) for line in f if line.strip()]
        if not rows:
            fail(f"{dataset=}: {file} has no rows: fill it, or remove it")
        for n, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                fail(f"{dataset=}: {file}, row {n} has no file_name")
            if None in row:  # DictReader puts surplus fields under the key None
                fail(f"{dataset=}: {file}, row {n} has too many fields: quote fields that have commas")
            path = os.path.abspath(file.parent / row["file_name"])
            if path in metadata:
                n_repeated += 1
            metadata[path] = row
    if n_repeated:
        log(f"{n_repeated} rows of the metadata file are not used: a later row is for the same image")
    return metadata


# ---- Pixels and latents: computed once, and kept in a cache ----

IMAGES_PER_FILE = 10_000
ROW = {
    "x": datasets.Value("binary"),  # pixels or latents in fp16; empty if the image cannot be read
    "index": datasets.Value("int32"),  # of the image
    # [original height, original width] for SDXL, which takes them as an input; [] for other models
    "size": datasets.List(datasets.Value("int32")),
    "is_gray": datasets.Value("bool"),
    "crc32": datasets.Value("int64"),  # checksum of the pixels, by which a resumed run recognizes its data
}


def read_image(source):
    """Return an image, scaled and cropped to a square, as pixels (3, S, S); None if it cannot be read.

    source: {"bytes": the content of its file, or None; "path": where it is}, or None.
    """
    try:
        image = open_image(source)
        image.load()  # reads all of the file
        if image.mode.startswith(("I", "F")):  # integers of 16 or 32 bits, or floats
            image = to_8_bits(image)
    except Exception as error:  # Pillow raises errors of many kinds
        where = os.fsdecode(source["path"] or "without a path") if source else "an empty field"
        log(f"left out: the image {where:.200}, which cannot be read ({error!s:.200})")
        return None
    with contextlib.suppress(Exception):  # damaged EXIF data
        image = ImageOps.exif_transpose(image)  # turn photos upright
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = to_srgb(image)
    if alpha:  # lay it on white
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    image = ImageOps.fit(image, (image_size, image_size))
    return np.asarray(image).transpose(2, 0, 1)


def open_image(source):
    """Open an image. Pillow reads only its header at first."""
    if source["bytes"]:
        return Image.open(io.BytesIO(source["bytes"]))
    return Image.open(os.fsdecode(source["path"]))


def to_8_bits(image):
    """Return a gray image of 16 bits in 8 bits. Pillow's own conversion would clip all values above 255."""
    is_pgm = image.mode == "I" and image.format == "PPM"  # which Pillow scales to 16 bits
    if not image.mode.startswith("I;16") and not is_pgm:
        raise ValueError(
            f"mode {image.mode}: save it in 8 or 16 bits, because its black and white are unknown"
        )
    white = 65535
    if image.format == "TIFF":
        BITS_PER_SAMPLE = 258  # the number of this tag
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0]
        white = 2**bits - 1
    values = np.asarray(image) / white
    PHOTOMETRIC_INTERPRETATION = 262  # another tag; its value 0 means that white is 0, as in X-rays
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        values = 1 - values
    scaled = Image.fromarray((255 * values).round().astype(np.uint8))
    # Keep the color profile and the orientation, but not a transparent value, which has 16 bits.
    scaled.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return scaled


def to_srgb(image):
    """Return an image in the color space sRGB, converted by its ICC profile if it has one."""
    profile = image.info.get("icc_profile")
    # Profiles exist for the modes L, RGB and CMYK only.
    if image.mode == "LA":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a profile that does not fit is ignored
            profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


def original_size(source):
    """Return the (height, width) of an image before it is scaled, from the header of its file."""
    image = open_image(source)
    width, height = image.size
    orientation = None
    with contextlib.suppress(Exception):  # damaged EXIF data
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    is_turned = orientation in (5, 6, 7, 8)  # the camera was held sideways
    if is_turned and image.format != "TIFF":  # Pillow turns TIFF files itself
        return width, height
    return height, width


def encode_images(images, indices, to_latents, wants_size):
    """Yield a row (see ROW) for each of images[indices] and, with flip, one for its mirror image.

    An image that cannot be read gets a row without pixels, so that the cache remembers it. to_latents: a
    function from images (B, 3, S, S) in [-1, 1] to what the model is trained on. wants_size: whether to store
    the original size.
    """
    pixels_at_once = 2**18  # for example, 1,024 images of 16 x 16; limits the memory of the autoencoder
    n_at_once = max(1, pixels_at_once // image_size**2)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), n_at_once):
            batch = indices[start : start + n_at_once]
            sources = [images[i]["image"] for i in batch]
            views = []  # (index, original size, pixels) of the images and of their mirror images
            for i, source, pixels in zip(batch, sources, pool.map(read_image, sources)):
                if pixels is None:
                    yield {"x": b"", "index": i, "size": [], "is_gray": True, "crc32": 0}
                    continue
                size = original_size(source) if wants_size else []
                views.append((i, size, pixels))
                if flip:
                    views.append((i, size, pixels[:, :, ::-1]))
            if not views:
                continue
            pixels_of_views = np.stack([pixels for _, _, pixels in views])
            x = torch.from_numpy(pixels_of_views) / 127.5 - 1  # from -1 to 1
            latents = to_latents(x).half().cpu()
            for (i, size, pixels), z in zip(views, latents):
                is_gray = bool((pixels == pixels[:1]).all())  # are all channels equal?
                crc32 = zlib.crc32(pixels.tobytes())
                yield {"x": z.numpy().tobytes(), "index": i, "size": size, "is_gray": is_gray, "crc32": crc32}


@torch.no_grad()
def encode(autoencoder, x):
    """Return images x (B, 3, H, W), from -1 to 1, as latents (B, c, h, w) with a variance of about 1."""
    x = x.to(autoencoder.device)
    if is_for_videos(autoencoder):
        x = x[:, :, None]  # an image is one frame
    z = autoencoder.encode(x, return_dict=False)[0]
    if not isinstance(z, torch.Tensor):  # most autoencoders return a distribution
        z = z.mode()
    if is_for_videos(autoencoder):
        z = z.squeeze(2)
    mean, std = latent_statistics(autoencoder)
    return (z - mean) / std


def is_for_videos(autoencoder):
    """Tell whether an autoencoder takes videos (B, 3, frames, H, W), such as that of Qwen-Image."""
    return "z_dim" in autoencoder.config  # only theirs have it


def latent_statistics(autoencoder):
    """Return the mean and standard deviation of latents, each (1, c, 1, 1) or (1, 1, 1, 1)."""
    config = autoencoder.config
    mean = [config.get("shift_factor") or 0.0]  # diffusers: (z - shift_factor) * scaling_factor
    std = [1 / (config.get("scaling_factor") or 1.0)]
    if config.get("latents_mean"):  # they differ by channel
        mean = config["latents_mean"]
        std = config["latents_std"]
    mean = torch.tensor(mean, device=autoencoder.device).view(1, -1, 1, 1)
    std = torch.tensor(std, device=autoencoder.device).view(1, -1, 1, 1)
    return mean, std


@functools.cache
def load_vae(name, device):
    """Load an AutoencoderKL in fp32, because some of them make black images in fp16."""
    import diffusers

    with named("vae", name):
        config = diffusers.AutoencoderKL.load_config(name)
    kind = config.get("_class_name")
    if kind != "AutoencoderKL" or config.get("in_channels", 3) != 3:
        fail(f"{vae=} is of the kind {kind}: take an AutoencoderKL for color images")
    with named("vae", name):
        return diffusers.AutoencoderKL.from_pretrained(name).float().eval().to(device)


def draw_glyphs(size):
    """Yield 256 images of every letter and digit, white on black, each a little different."""
    rng = np.random.default_rng(0)  # for size, position, thickness and angle
    large = 4 * size  # reduced at the end, which smooths the edges
    for character in 256 * "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        font = ImageFont.load_default(large * rng.uniform(0.9, 1.15))
        center = tuple(large * rng.uniform(0.43, 0.57, 2))
        stroke_width = int(large * rng.uniform(0, 0.06))
        image = Image.new("L", (large, large))
        ImageDraw.Draw(image).text(center, character, 255, font, anchor="mm", stroke_width=stroke_width)
        image = image.rotate(rng.uniform(-10, 10), Image.BILINEAR).reduce(4)
        file = io.BytesIO()
        image.save(file, "png")
        yield {"image": {"bytes": file.getvalue(), "path": None}, "label": character}


def cached(key, features, generator, *args):
    """Return the rows of generator(*args) as a Dataset, from a cache if key and code are the same."""
    code = sections(__file__, "Pixels")  # the text of the section of this file that makes rows
    state = repr([key, generator.__name__, code])
    fingerprint = hashlib.md5(state.encode()).hexdigest()
    # Use partial(), because from_generator() would divide the lists in its gen_kwargs into shards.
    make_rows = functools.partial(generator, *args)
    return datasets.Dataset.from_generator(make_rows, datasets.Features(features), fingerprint=fingerprint)


def state_of_files(table):
    """Return (path, size, time of change, readability) for each file in the column "image" of a table.

    This is used to notice changed files. Rows that hold the bytes of their image are skipped.
    """
    paths = []
    for chunk in table.data.column("image").chunks:  # Arrow's columns leave the bytes unread
        has_path = chunk.field("bytes").is_null()
        paths += chunk.field("path").filter(has_path).drop_null().to_pylist()
    state = []
    for path in filter(os.path.exists, paths):
        stat = os.stat(path)
        # Every change of a file sets its ctime. The mtime can be older: unpacking an archive sets it back.
        state.append((path, stat.st_size, stat.st_ctime_ns, os.access(path, os.R_OK)))
    return state


def encode_split(accelerator, split, images, to_latents, wants_size, key):
    """Return the rows (see ROW) of all images of a split that can be read.

    The processes share the work: each encodes some of the parts, then all load all parts from the cache.
    """
    # _fingerprint is the hash that datasets has for a table.
    state = repr([key, images._fingerprint, state_of_files(images)])
    state = hashlib.md5(state.encode()).hexdigest()
    indices = range(len(images))
    parts = [indices[i : i + IMAGES_PER_FILE] for i in range(0, len(images), IMAGES_PER_FILE)]

    @functools.cache  # the second loop uses again what this process has encoded in the first
    def encode_part(part):
        return cached([state, part], ROW, encode_images, images, part, to_latents, wants_size)

    for part in parts[RANK::WORLD]:
        encode_part(part)
    accelerator.wait_for_everyone()
    rows = datasets.concatenate_datasets([encode_part(part) for part in parts])
    n_bytes = pyarrow.compute.binary_length(rows.data["x"]).to_numpy()  # known without reading the pixels
    is_readable = n_bytes > 0
    n_left_out = np.count_nonzero(~is_readable)
    if n_left_out == len(images):
        fail(f"{dataset=}: no image of its {split} split can be read")
    if n_left_out:
        log(f"{split}: {n_left_out} of {len(images)} images are left out because they cannot be read")
        rows = rows.select(np.flatnonzero(is_readable))
    return rows


def checksums(module):
    """Return numbers that tell a module from others: for each of its weights, the sum of some values."""
    sums = []
    for weight in module.state_dict().values():
        first = weight.flatten()[:1000]
        sums.append(first.double().sum().item())
    return sums


# ---- Splits and batches ----


def split_off_end(rows, fraction):
    """Return (the rows without the last part, the last part). An image and its mirror image stay together."""
    n_views = 2 if flip else 1
    n_images = len(rows) // n_views
    n = n_views * math.ceil(fraction * n_images)
    if n == len(rows):
        fail(
            f"{dataset=} is too small to set a part aside: --val_fraction=0 --test_fraction=0 uses all of it"
        )
    parts = rows.train_test_split(n, shuffle=False)
    return parts["train"], parts["test"]


def choose_splits(found):
    """Return the splits that are wanted among those that were found, under their usual names."""
    if "train" not in found:
        fail(f"{dataset=} has no split named train, only {', '.join(found)}: save one as .parquet and use it")
    wanted = {"validation": val_fraction > 0, "test": test_fraction > 0}
    splits = {"train": found.pop("train")}
    for name, images in found.items():
        split = SPLITS.get(name.lower())  # None for an unknown name
        if wanted.get(split) and split not in splits:
            splits[split] = images
        else:
            log(f"not used: the split {name}")
    return splits


def choose_names(splits, class_names):
    """Return all class names or, with init_from, all captions. The model gets indices into this list."""
    texts = []
    for _, texts_of_split in splits.values():
        texts += texts_of_split
    if init_from != "scratch" and None in texts:
        n = texts.count(None)
        fail(f"{dataset=} lacks captions for {n} images: add .txt files, --caption= or --caption_column=")
    names = class_names or sorted({*texts} - {None})
    if init_from == "scratch" and len(names) < 2:
        log("training without classes: fewer than two were found")
        return []
    if None in texts:
        log(f"{texts.count(None)} of {len(texts)} images have no class")
    return names


def choose_encoder(pipeline, device):
    """Return (autoencoder or None, function from images in [-1, 1] to what the model is trained on)."""
    if pipeline is not None:
        return pipeline.pipe.vae, pipeline.encode
    if vae:
        autoencoder = load_vae(vae, device)
        return autoencoder, functools.partial(encode, autoencoder)
    return None, nn.Identity()


def latent_shape(pipeline, autoencoder, to_latents):
    """Return the shape of what the model is trained on. Refuse an image_size that does not fit."""
    factor = 1  # by which latents are smaller than images
    if pipeline is not None:
        factor = pipeline.factor
    elif vae:
        factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if image_size % factor != 0:
        fail(f"{image_size=} must be a multiple of {factor}, by which the pipeline or vae shrinks it")
    gray = torch.zeros(1, 3, image_size, image_size)
    shape = to_latents(gray).shape[1:]
    if pipeline is None and shape[-1] % patch_size != 0:
        fail(f"with {image_size=}, inputs are {shape[-1]} wide, which is not a multiple of {patch_size=}")
    return shape


def prepare_data(accelerator, pipeline=None):
    """Return ({split: rows}, data, captions).

    data: the shape of what the model is trained on, the names of its classes, and the number of rows. A
    missing validation or test split is taken from the end of the training rows.
    """
    datasets.disable_progress_bars()
    with accelerator.local_main_process_first():  # one process per machine downloads, for all of them
        found, class_names = load_images()
    splits = choose_splits(found)
    names = choose_names(splits, class_names)
    index_of = {name: i for i, name in enumerate(names)}

    autoencoder, to_latents = choose_encoder(pipeline, accelerator.device)
    wants_size = pipeline is not None and pipeline.wants_size
    key = [image_size, flip, wants_size]
    if autoencoder is not None:
        key += [str(autoencoder.config), checksums(autoencoder)]
    shape = latent_shape(pipeline, autoencoder, to_latents)

    for split, (images, texts) in splits.items():
        if split == "train":
            # Validation and test may be cut off from the end, so shuffle. The order does not depend on the
            # seed, so that all runs set the same images aside.
            order = np.random.default_rng(0).permutation(len(texts)).tolist()
            images = images.select(order)
            texts = [texts[i] for i in order]
        rows = encode_split(accelerator, split, images, to_latents, wants_size, key)
        no_class = len(names)
        texts_of_rows = [texts[i] for i in rows["index"][:]]
        cond = [index_of.get(text, no_class) for text in texts_of_rows]
        splits[split] = rows.add_column("cond", cond)
    are_gray = [all(rows["is_gray"][:]) for rows in splits.values()]
    if all(are_gray) and autoencoder is None:
        shape = (1, *shape[1:])  # one of the three equal channels is enough

    for split, fraction in [("test", test_fraction), ("validation", val_fraction)]:
        if fraction and split not in splits:
            splits["train"], splits[split] = split_off_end(splits["train"], fraction)
    if patience > 0 and "validation" not in splits:
        fail(f"{patience=} needs validation data: set --val_fraction=0.05")
    data = {"shape": list(shape), "classes": names if init_from == "scratch" else []}
    data["rows"] = {split: len(rows) for split, rows in splits.items()}
    kind = "classes" if init_from == "scratch" else "captions"
    log(f"data: {data['rows']} images of shape {data['shape']}, {len(names)} {kind}")
    return splits, data, names


def collate(rows, shape):
    """Return a batch (x, cond) of rows.

    x: pixels in [-1, 1], or latents (B, *shape). cond: the indices of classes or captions (B, 1), or for SDXL
    (B, 3) with the original height and width.
    """
    data = b"".join(row["x"] for row in rows)
    x = torch.frombuffer(bytearray(data), dtype=torch.float16).float()
    x = x.view(len(rows), -1)
    x = x[:, : math.prod(shape)]  # gray images are stored with three channels: take the first
    cond = torch.tensor([[row["cond"], *row["size"]] for row in rows])
    return x.reshape(-1, *shape), cond


def batch_rows(n_rows, first_step, last_step, micro_size, world, rank):
    """Yield the indices of the rows in each micro-batch of a process, for all steps before last_step.

    The rows of a step depend on seed and step only, so a resumed run gets the same ones, also with another
    number of processes or size of micro-batches. An epoch is a permutation of the rows.
    """
    batches_per_epoch = max(1, n_rows // batch_size)
    shuffled_epoch = None
    for step in range(first_step, last_step):
        epoch, index = divmod(step, batches_per_epoch)
        if epoch != shuffled_epoch:
            shuffled_epoch = epoch
            rows = np.random.default_rng([seed, epoch]).permutation(n_rows)
            # Take as many as fill whole batches. If there are too few for one, np.resize() repeats rows.
            rows = np.resize(rows, batches_per_epoch * batch_size)
            batches = rows.reshape(batches_per_epoch, batch_size)
        # The axes of micro_batches are the accumulation step, the process and the row.
        micro_batches = batches[index].reshape(-1, world, micro_size)
        mine = micro_batches[:, rank]
        yield from mine.tolist()


# ---- Optimizers and learning rate ----


def orthogonalize(x):
    """Bring all singular values of the matrices x (n, rows, columns) near 1 by five Newton-Schulz iterations.

    The method and its coefficients are Keller Jordan's (2024, kellerjordan.github.io/posts/muon).
    """
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:  # transpose x, because the Gram matrix x x^T is then smaller
        x = x.mT
    # The iteration needs singular values of at most 1. None is larger than the norm of its matrix.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.775, 2.0315
    for _ in range(5):  # x <- a x + (b gram + c gram gram) x
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Muon):
    """Momentum with orthogonalized updates, computed for all matrices of one shape at once.

    torch.optim.Muon computes the same, but one matrix after another.
    """

    def __init__(self, matrices, dtype, **kwargs):
        super().__init__(matrices, **kwargs)
        self.dtype = dtype  # precision of orthogonalize(); torch's own Muon always computes it in bf16

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, columns), params in by_shape.items():
                grads = [p.grad for p in params]
                averages = []
                for p in params:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    averages.append(self.state[p]["momentum_buffer"])
                # The _foreach functions compute the formula beside them for all tensors of a list at once.
                m = group["momentum"]
                torch._foreach_lerp_(averages, grads, 1 - m)  # average <- m average + (1 - m) grad
                # Nesterov's momentum mixes the gradient in once more.
                directions = torch._foreach_lerp(grads, averages, m)  # (1 - m) grad + m average
                updates = orthogonalize(torch.stack(directions).to(self.dtype))  # (n, rows, columns)
                updates = updates.to(params[0].dtype).unbind()
                # Tall matrices take larger steps, as in torch.optim.Muon.
                scale = max(1, rows / columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * scale)


def make_optimizers(model, accelerator):
    """Return [Muon, AdamW], or [AdamW] if it trains all. Each trained parameter is in one of them."""
    # By default, weights do not decay. A group of parameters can set its own weight_decay.
    adamw = functools.partial(torch.optim.AdamW, betas=(beta1, beta2), weight_decay=0.0, fused=True)
    kind = optimizer  # a key of DEFAULT_LR
    if init_from != "scratch":
        kind = adapter or "fine-tuning"
    lr = learning_rate or DEFAULT_LR[kind]
    if kind != "muon":
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim >= 2]
        vectors = [p for p in trained if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
        return [adamw(groups, lr=lr)]

    matrices = []
    others = []
    for name, p in model.named_parameters():
        if p.ndim == 2 and name.startswith("blocks."):
            matrices.append(p)
        else:
            others.append(p)
    muon = {"lr": lr, "weight_decay": weight_decay}
    # Muon also works in bf16, but that is slow where the hardware does not have it.
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return [Muon(matrices, dtype, **muon), adamw(others, lr=adamw_lr)]


def lr_at(step, total_steps):
    """Return the learning rate at a step as a fraction of its peak: it rises, then follows lr_schedule."""
    n_warmup = warmup_steps
    if lr_schedule != "constant":
        n_warmup = min(n_warmup, total_steps // 10)  # in a short run, a tenth of the steps
    warmup = (step + 1) / (n_warmup + 1)  # above 1 after the warm-up
    decay = 1.0
    if lr_schedule == "cosine":
        progress = (step - n_warmup) / max(1, total_steps - n_warmup)
        progress = min(1.0, max(0.0, progress))
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    elif lr_schedule == "wsd":
        cooldown_steps = max(1, cooldown * total_steps)
        decay = min(1.0, (total_steps - step) / cooldown_steps)
    after_warmup = min_lr + (1 - min_lr) * decay
    return min(warmup, after_warmup)


class EMA:
    """The exponential moving average of the trained weights, with which images become much better."""

    def __init__(self, model):
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.weights = trained if ema_decay else {}
        self.averages = {name: weight.clone() for name, weight in self.weights.items()}

    def update(self, step):
        """Move the averages towards the weights."""
        # The decay is small at first, to forget the random initial weights.
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*self.averages.values()], [*self.weights.values()], 1 - decay)

    def swap(self):
        """Exchange the weights and the averages; a second call undoes it."""
        for name, weight in self.weights.items():
            kept = weight.clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(kept)


# ---- Checkpoints and the run directory ----

# What a run writes. A new run in the same folder removes these files of an old one, and no others.
RUN_FILES = """
    run.json metrics.jsonl checkpoint.pt best.pt model.safetensors pytorch_lora_weights.safetensors
    kohya_lora.safetensors model_index.json samples/step_????????.png
    samples/step_????????.safetensors
    train_diffusion/events.out.* train_diffusion/*/events.out.*
    train_diffusion/*/hparams.yml *.pt.trace.json run.json.tmp *.pt.tmp
    *.safetensors.tmp lora.tmp
""".split()
PIPELINE_PARTS = """
    vae unet transformer scheduler feature_extractor text_encoder text_encoder_2 text_encoder_3 text_encoder_4
    tokenizer tokenizer_2 tokenizer_3 tokenizer_4
""".split()
PART_FILES = "*config.json *model*.safetensors* *token*.json vocab.* merges.txt *.model *.jinja".split()
RUN_FILES += [f"{part}/{file}" for part in PIPELINE_PARTS for file in PART_FILES]
PACKAGES = "torch transformers datasets accelerate peft diffusers".split()  # run.json has their versions
LOCKS = []  # open_run_dir() keeps the lock of out_dir here, so that it is held until this process ends


def write_file(name, content):
    """Write a file in out_dir atomically: a crash leaves the old file or the new one."""
    temporary = Path(out_dir, f"{name}.tmp")
    with open(temporary, "wb") as f:
        if name.endswith(".json"):
            f.write(json.dumps(content, indent=1).encode())
        elif name.endswith(".safetensors"):
            f.write(safetensors.torch.save(content))
        else:
            torch.save(content, f)
        # The content must be on the disk before it takes the place of the old file.
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(Path(out_dir, name))


def read_json(setting, folder, name):
    """Return the content of a .json file in the folder that a setting names."""
    with named(setting, folder):
        return json.loads(Path(folder, name).read_text(encoding="utf-8"))


def open_run_dir():
    """Make, check and lock out_dir. Return the content of run.json if there is a run to resume, else None."""
    with named("out_dir", out_dir):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    folder = Path(out_dir).resolve()
    for path in (os.getcwd(), init_from, vae, dataset):
        exists = os.path.exists(path)  # the last three may be names of the Hub
        if exists and Path(path).resolve().is_relative_to(folder):
            fail(f"{out_dir=} contains {path}, which a run could delete: choose another --out_dir")
    if not os.access(out_dir, os.W_OK):
        fail(f"{out_dir=} is read-only: choose another --out_dir")
    if not MAIN:
        return None
    LOCKS.append(filelock.FileLock(Path(out_dir, "lock")))
    try:
        LOCKS[0].acquire(timeout=10)  # the data workers of a killed run hold the lock for some more seconds
    except filelock.Timeout:
        fail(f"{out_dir=} is in use by another run: wait until it ends, or choose another --out_dir")
    # These files were left by an earlier run, or by somebody else.
    files = {path.name for path in Path(out_dir).iterdir() if path.name != "lock" and path.suffix != ".tmp"}
    if not files:
        return None
    if "run.json" not in files:
        fail(f"{out_dir=} holds other files, such as {min(files)}: choose another --out_dir")
    run = read_json("out_dir", out_dir, "run.json")
    if run.get("kind") != "diffusion":
        fail(f"{out_dir=} holds a run of another script: choose another --out_dir")
    if not resume and not overwrite:
        fail(f"{out_dir=} holds a run: add --resume=True or --overwrite=True, or choose another --out_dir")
    if not resume:
        return None
    if "checkpoint.pt" not in files:
        has_weights = any(name.endswith((".safetensors", "best.pt")) for name in files)
        # The weights of a whole pipeline are in a folder that also exists at the start. Look for samples.
        has_weights |= any(
            path.stem > "step_00000000" for path in Path(out_dir, "samples").glob("step_*.png")
        )
        if has_weights:
            fail(
                f"{out_dir=} holds weights without a checkpoint: choose --overwrite=True or another --out_dir"
            )
        log("there is no checkpoint to resume from: the run starts from the beginning")
        return None
    now = settings(globals())
    for name in FIXED:
        check_fixed(name, run["settings"].get(name), now[name])
    return run


def check_fixed(name, before, now):
    """Refuse to resume a run if what must stay fixed has changed since it began."""
    if before != now:
        fail(f"{out_dir=} holds a run with {name}={before!r}, which --resume cannot change to {now!r}")


def evenly_spread(n, n_rows):
    """Return the indices of n rows that are spread evenly over n_rows."""
    return np.linspace(0, n_rows - 1, n).astype(int).tolist()


def hash_rows(rows, names, classes):
    """Return a hash of 100 rows, of the number of all, and of the classes. names: all classes, or captions.

    With it, a resumed run notices changed data.
    """
    chosen = rows.select(evenly_spread(100, len(rows)))
    names = [*names, None]  # None: no class
    texts = [names[i] for i in chosen["cond"][:]]
    content = repr([len(rows), chosen["crc32"][:], texts, classes])
    return hashlib.md5(content.encode()).hexdigest()


def describe_run(model, splits, data, captions, old_run):
    """Return the content of run.json. Refuse to resume old_run with other data."""
    n_parameters = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run = {
        "kind": "diffusion",
        "model": "DiT" if init_from == "scratch" else "Pipeline",
        "command": sys.argv,
        "settings": settings(globals()),
        "data": data,
        "hashes": {split: hash_rows(rows, captions, data["classes"]) for split, rows in splits.items()},
        "parameters": n_parameters,
        "trained_parameters": n_trained,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if init_from != "scratch":
        run["pipeline"] = type(model.pipe).__name__
    if old_run:
        run["summary"] = old_run.get("summary", {})  # stays until this run writes its own at the end
        check_data(old_run.get("hashes", {}), run["hashes"])
        if run["model"] == "DiT":
            note_other_model(out_dir)
    log(f"model: {n_parameters:,} parameters, {n_trained:,} of them trained")
    return run


def check_data(before, now):
    """Refuse to resume a run if a split has changed. before, now: {split: hash}; one may lack a split."""
    for split, now_hash in now.items():
        if before.get(split, now_hash) != now_hash:
            fail(f"{out_dir=} holds a run with other {split} data than {dataset=}: choose another --out_dir")


def note_other_model(folder):
    """Log a note if the script in a folder differs from this one in the model or its mathematics."""
    copy = Path(folder, "train_diffusion.py")
    titles = ("Model", "The mathematics")
    if copy.exists() and sections(copy, *titles) != sections(__file__, *titles):
        log(f"note: the model in {copy} differs from the one in this script, and the latter is used")


def start_run(run, model, is_new):
    """Write run.json and a copy of this script to out_dir; a new run first deletes an old one."""
    if is_new:
        for pattern in RUN_FILES:
            for path in Path(out_dir).glob(pattern):
                if path.is_file():
                    path.unlink()
    write_file("run.json", run)
    if init_from != "scratch" and not adapter and is_new:
        model.save_pipeline()  # the parts that are not trained are written once, here
    with contextlib.suppress(shutil.SameFileError):  # the script that runs may be the one in out_dir
        shutil.copy(__file__, Path(out_dir, "train_diffusion.py"))  # under this name, sample.py looks for it


def from_main(value):
    """Return, in every process, the value that the main process has passed. Every process must call this."""
    return broadcast_object_list([value])[0]


def unwrap(model):
    """Return the model inside DistributedDataParallel, which has it as `module`, or the model itself."""
    return getattr(model, "module", model)


def weights_of(model):
    """Return {name: tensor} for all weights and buffers or, with an adapter, for its weights alone."""
    kept = [name for name, p in model.named_parameters() if p.requires_grad or not adapter]
    if not adapter:
        kept += [name for name, _ in model.named_buffers()]
    state = model.state_dict()  # lists tied weights twice, and leaves out buffers that are not to be saved
    return {name: state[name] for name in kept if name in state}


def save_checkpoint(model, optimizers, scaler, ema, progress):
    """Write checkpoint.pt, from which a run can be resumed. scaler: that of fp16, or None."""
    if MAIN:
        weights = weights_of(model)
        check_finite(model, weights)
        content = {
            "model": weights,
            "ema": ema.averages,
            "optimizers": [o.state_dict() for o in optimizers],
            "scaler": scaler.state_dict() if scaler else {},
            "progress": progress,
        }
        write_file("checkpoint.pt", content)


def check_finite(model, weights):
    """End the program rather than replace good weights by those with infinite numbers or NaN."""
    trained = [weights[name] for name, _ in model.named_parameters() if name in weights]
    if not all(weight.isfinite().all() for weight in trained):
        fail("the weights are not finite: lower learning_rate, and resume from the last checkpoint")


def read_checkpoint(name):
    """Return the content of a .pt file in out_dir."""
    with named("checkpoint", f"{out_dir}/{name}"):
        return torch.load(Path(out_dir, name), map_location="cpu", weights_only=True)


def load_checkpoint(model, optimizers, scaler, ema):
    """Load checkpoint.pt in every process. Return the progress of the run."""
    state = read_checkpoint("checkpoint.pt")
    saved_shapes = {name: p.shape for name, p in state["model"].items()}
    if saved_shapes != {name: p.shape for name, p in weights_of(model).items()}:
        fail(f"{out_dir}/checkpoint.pt does not fit the model in this script: use the script that wrote it")
    model.load_state_dict(state["model"], strict=False)  # frozen weights are not in the checkpoint
    for o, optimizer_state in zip(optimizers, state["optimizers"]):
        o.load_state_dict(optimizer_state)
    if scaler and state["scaler"]:  # it is empty if the run was not in fp16 before
        scaler.load_state_dict(state["scaler"])
    averages = state["ema"] or state["model"]  # if ema_decay was 0 before, there are no averages
    for name, average in ema.averages.items():
        average.copy_(averages[name])
    return state["progress"]


def save_best(model, has_validation):
    """Write the weights for drawing and, with a validation split, best.pt for load_best()."""
    weights = weights_of(model)
    check_finite(model, weights)
    if init_from == "scratch":
        write_file("model.safetensors", weights)
    else:
        model.save_weights(weights)
    if has_validation:  # for the test at the end, even if only a later --resume asks for it
        write_file("best.pt", weights)


def load_best(model):
    """Load best.pt into the model of every process."""
    if MAIN:
        model.load_state_dict(read_checkpoint("best.pt"), strict=False)  # frozen weights are not in it
    broadcast(weights_of(model))  # in place


# ---- Evaluation ----


@torch.no_grad()
def evaluate(accelerator, model, name, rows, micro_size, n_batches=0):
    """Return the mean loss of a split, over all times and for each quarter of them.

    The times are spread evenly from 0 to 1, but the training loss is a mean over the times of sample_times(),
    so the two differ. Each image has the same noise and times in every evaluation. n_batches: how many
    batches of batch_size images to take, spread evenly over the split; 0: all images.
    """
    n_rows = len(rows)
    if n_batches > 0:
        n_rows = min(n_rows, n_batches * batch_size)
    chosen = evenly_spread(n_rows, len(rows))
    mine = chosen[RANK::WORLD]
    losses = np.zeros(4)  # sums over images, one for each quarter
    model.eval()
    for i in range(0, len(mine), micro_size):
        batch = mine[i : i + micro_size]
        # Fill the last batch with row 0, whose loss is not counted. torch.compile would compile another size.
        n_missing = micro_size - len(batch)
        indices = batch + [0] * n_missing
        x_0, cond = collate([rows[j] for j in indices], unwrap(model).shape)
        x_0, cond = to_device(x_0, cond, accelerator.device)
        eps = noise_of(indices, x_0.shape[1:]).to(x_0.device)
        golden_ratio = 0.618034  # its multiples modulo 1 are spread evenly
        offset = (torch.tensor(indices, device=x_0.device) * golden_ratio) % 1
        for quarter in range(4):
            t = (quarter + offset) / 4
            x_t, target = add_noise(unwrap(model), x_0, eps, t)
            with accelerator.autocast():
                errors = (model(x_t, t, cond) - target).square()
            loss_per_image = errors.flatten(1).mean(dim=1)
            losses[quarter] += loss_per_image[: len(batch)].sum().item()
    model.train()
    losses_of_processes = gather_object([losses])
    losses = np.sum(losses_of_processes, axis=0) / n_rows
    values = {f"{name}/loss": losses.mean().item()}
    for times, loss in zip(("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"), losses.tolist()):
        values[f"{name}/loss/{times}"] = loss
    return values


def evaluate_and_keep_best(accelerator, model, ema, splits, micro_size, progress, report):
    """Evaluate, save the weights if they are the best so far, and draw samples."""
    has_validation = "validation" in splits
    is_best = not has_validation  # without a validation split, the last weights count as the best
    ema.swap()
    if has_validation:
        values = evaluate(accelerator, model, "val", splits["validation"], micro_size, eval_batches)
        report(values)
        if not math.isfinite(values["val/loss"]):
            fail("the validation loss is not finite: lower learning_rate, or try --mixed_precision=no")
        is_best = values["val/loss"] <= progress["best"]
    if progress["step"] > 0:  # before training there is nothing to save
        progress["evals_since_best"] += 1
        if is_best:
            progress["evals_since_best"] = 0
            if has_validation:
                progress["best"] = values["val/loss"]
            if MAIN:
                save_best(unwrap(model), has_validation)
    if MAIN:
        draw_samples(unwrap(model), progress["step"])
    if MAIN and adapter and progress["step"] > 0 and not has_validation:
        # Keep every adapter beside its samples, so that the best can be chosen by eye.
        kept = Path(out_dir, f"samples/step_{progress['step']:08d}.safetensors")
        shutil.copy(Path(out_dir, "pytorch_lora_weights.safetensors"), kept)
    ema.swap()


def draw_samples(model, step):
    """Save a grid of samples, always from the same noise."""
    model.eval()
    conditions = sample_conditions(model)
    seeds = range(seed, seed + len(conditions))
    with torch.compiler.set_stance("force_eager"):  # compiling for this batch size would take a minute
        images = draw(model, conditions, seeds)
    model.train()
    Path(out_dir, "samples").mkdir(exist_ok=True)
    make_grid(images).save(Path(out_dir, f"samples/step_{step:08d}.png"))


def sample_conditions(model):
    """Return the prompts, or 36 class names evenly spread, for the samples during training."""
    if init_from != "scratch":
        return model.prompts
    names = model.class_names or [""]
    return [names[i * len(names) // 36] for i in range(36)]


# ---- Training ----


def start_accelerator():
    """Return an Accelerator for the best device there is, with precision, threads and processes set up."""
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    torch.autograd.set_detect_anomaly(detect_anomaly)
    torch.use_deterministic_algorithms(deterministic)
    # accelerate passes broadcast_buffers to torch under a deprecated name. Hide the warning.
    warnings.filterwarnings("ignore", "`?broadcast_buffers")
    # The other processes wait while one downloads the data or encodes captions, which may take long.
    process_group = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # The buffers never change, so DDP need not broadcast them. It shares the memory of the gradients instead
    # of copying them. Some pipelines have weights without any effect on the output.
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=init_from != "scratch"
    )
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=choose_precision(),
        log_with=tracker or None,
        project_dir=out_dir,
        kwargs_handlers=[process_group, ddp],
    )
    if accelerator.num_processes != WORLD:
        fail(
            f"accelerate did not connect the {WORLD} processes:"
            " on CPUs, set the environment variable ACCELERATE_USE_CPU=true"
        )
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        fail(f"{accelerator.distributed_type.value} is not supported: use configs/accelerate/ddp.yaml")
    if on_cpu:
        # `accelerate launch` gives each process one thread. Take this process's share of the cores instead.
        n_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, count_cores() // n_local_processes))
        if init_from == "scratch":  # pretrained models are large and need the memory
            keep_freed_memory()
        log("warning: no GPU was found; a CPU is fast enough for small models only")
    log(f"device: {accelerator.device.type} x {WORLD}, precision: {accelerator.mixed_precision}")
    return accelerator


def count_cores():
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def keep_freed_memory():
    """Keep freed memory for the next step instead of returning it to Linux: 1.15 times as fast on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD = -1  # from glibc's malloc.h, like the next one
        M_MMAP_MAX = -4
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # return memory only above 2 GB
        libc.mallopt(M_MMAP_MAX, 0)  # and do not ask for large pieces one by one


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def choose_precision():
    """Return the precision of matrix products: bf16 where the hardware has it."""
    if mixed_precision != "auto":
        return mixed_precision
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        # T4 and V100 have no bf16. Their fp16 needs loss scaling, which Muon does not support.
        return "no" if init_from == "scratch" else "fp16"
    if torch.accelerator.is_available():  # for example, an Apple GPU
        return "no"
    cpu = torch.cpu.get_capabilities()  # the instructions that multiply in bf16 have these two names
    has_bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return "bf16" if has_bf16 else "no"


def open_metrics(n_bytes):
    """Open metrics.jsonl to append, cut back to n_bytes. A resumed run writes the rest of it again."""
    metrics = open(Path(out_dir, "metrics.jsonl"), "ab", buffering=0)  # noqa: SIM115 (it stays open)
    size = metrics.tell()  # 0 if the file is new
    metrics.truncate(min(n_bytes, size))
    metrics.seek(0, os.SEEK_END)
    return metrics


def finish(accelerator, step, is_stopped):
    """Log how the run ended, wait for the other processes, and end this one."""
    code = 0
    if is_stopped:
        log(f"stopped at step {step}; the same command with --resume=True goes on")
        signum = RECEIVED[0] if RECEIVED else signal.SIGTERM  # another process may have received the signal
        code = 128 + signum  # the exit code that shells use for a signal
    else:
        log("done")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if WORLD > 1:  # exit without Python's cleanup, during which gloo's threads may crash
        os._exit(code)
    sys.exit(code)


def divide_batch():
    """Return (images per process and forward pass, forward passes per optimizer step)."""
    micro_size = micro_batch_size or max(1, batch_size // WORLD)
    accumulation_steps = batch_size // (micro_size * WORLD)
    if accumulation_steps * micro_size * WORLD != batch_size:
        fail(f"{batch_size=} must be a multiple of micro_batch_size x processes = {micro_size} x {WORLD}")
    return micro_size, accumulation_steps


def count_steps(n_rows):
    """Return (steps per epoch, steps of the run) for n_rows training images."""
    steps_per_epoch = max(1, n_rows // batch_size)
    if not epochs:
        return steps_per_epoch, max_steps
    total_steps = math.ceil(epochs * steps_per_epoch)
    log(f"{epochs=} makes {total_steps} steps, and max_steps is not used")
    return steps_per_epoch, total_steps


def is_due(step, interval):
    """Return whether step is a multiple of interval. An interval of 0 means never."""
    return interval > 0 and step % interval == 0


def start_profiler():
    """Return a profiler that writes a trace of steps 6 to 8, when compilation is over."""
    schedule = torch.profiler.schedule(wait=4, warmup=1, active=3, repeat=1)
    handler = torch.profiler.tensorboard_trace_handler(out_dir)
    profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=handler)
    profiler.start()
    return profiler


def make_noisy_batches(model, micro_batches, step, device):
    """Add noise: return [(x_t, t, cond, target)] for the micro-batches [(x_0, cond)] of a step.

    Every process draws noise, times and dropped conditions for the whole global batch from (seed, step) and
    takes its own part, so that a run does not depend on the number of processes.
    """
    step_seed = hash((seed, step)) % 2**63  # manual_seed() takes 63 bits
    rng = torch.Generator(device).manual_seed(step_seed)
    eps = torch.randn(batch_size, *model.shape, generator=rng, device=device)
    times = model.sample_times(batch_size, rng)
    cpu_rng = torch.Generator().manual_seed(step_seed)
    is_dropped = torch.rand(batch_size, generator=cpu_rng) < label_dropout  # on the CPU, where cond is

    def part_of(x):
        """Return this process's part of a global batch: (accumulation steps, images, ...)."""
        x = x.unflatten(0, (len(micro_batches), WORLD, -1))  # accumulation step, process, image
        return x[:, RANK]

    eps = part_of(eps)
    times = part_of(times)
    is_dropped = part_of(is_dropped)
    noisy_batches = []
    for i, (x_0, cond) in enumerate(micro_batches):
        # Guidance needs a model that has also learned images without their class or caption (column 0).
        dropped = is_dropped[i]
        cond[dropped, 0] = model.no_class
        x_0, cond = to_device(x_0, cond, device)
        x_t, target = add_noise(model, x_0, eps[i], times[i])
        noisy_batches.append((x_t, times[i], cond, target))
    return noisy_batches


def to_device(x, cond, device):
    """Move a batch to the device. cond becomes class indices (B,) or, for a Pipeline, a list of its rows."""
    x = x.to(device, non_blocking=True)
    if init_from != "scratch":
        return x, cond.tolist()  # it looks the captions up on the CPU
    return x, cond[:, 0].to(device, non_blocking=True)


def make_model(accelerator):
    """Return (model, splits, data, captions); see prepare_data()."""
    if init_from == "scratch":
        splits, data, captions = prepare_data(accelerator)
        torch.manual_seed(seed)
        return DiT(data["shape"], data["classes"]), splits, data, captions
    model = load_pipeline(accelerator.device)  # before the data, so that a wrong name fails early
    splits, data, captions = prepare_data(accelerator, model)
    with accelerator.local_main_process_first():  # one process per machine encodes the captions
        model.prepare(captions, data["shape"])
    return model, splits, data, captions


def speed(n_images, seconds):
    """Return the metrics images_per_s and memory_gb, after training on n_images for some seconds."""
    memory = psutil.Process().memory_info().rss
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    return {"images_per_s": n_images / seconds, "memory_gb": memory / 1e9}


def main():
    # ---- set up: device, batch, run directory ----
    check_settings()
    accelerator = start_accelerator()
    device = accelerator.device
    micro_size, accumulation_steps = divide_batch()
    old_run = open_run_dir()

    # ---- model and data ----
    model, splits, data, captions = make_model(accelerator)
    run = describe_run(model, splits, data, captions, old_run) if MAIN else None
    model.to(device)
    optimizers = make_optimizers(model, accelerator)
    # Keep the peaks of the learning rates here: loading a checkpoint replaces the groups and their rates.
    peak_lrs = [group["lr"] for o in optimizers for group in o.param_groups]
    if compile and device.type == "cuda" and not frozen_fp8:  # its casts cannot be compiled
        model.compile()
    # Step the wrapped optimizers, which can skip a step in fp16. Save and load those inside them.
    model, *wrapped_optimizers = accelerator.prepare(model, *optimizers)
    ema = EMA(unwrap(model))

    # ---- start the run, or resume it ----
    progress = {"step": 0, "best": math.inf, "evals_since_best": 0, "seconds": 0.0, "metrics_bytes": 0}
    old_run = from_main(old_run)  # only the main process has read it
    if old_run:
        progress = load_checkpoint(unwrap(model), optimizers, accelerator.scaler, ema)
        # A run that has ended did one more evaluation after its last checkpoint. Only run.json has that loss.
        best_at_end = old_run.get("summary", {}).get("val/loss", math.inf)
        if best_at_end < progress["best"]:
            progress["best"] = best_at_end
            progress["evals_since_best"] = 0
        log(f"resumed from {out_dir}/checkpoint.pt at step {progress['step']}")
    if MAIN:
        start_run(run, unwrap(model), is_new=not old_run)
    step = progress["step"]
    groups = [group for o in optimizers for group in o.param_groups]
    steps_per_epoch, total_steps = count_steps(len(splits["train"]))

    # ---- logging ----
    start = time.monotonic() - progress["seconds"]
    metrics = open_metrics(progress["metrics_bytes"]) if MAIN else None
    with named("tracker", tracker):  # a login to wandb may fail; WANDB_MODE=offline needs none
        accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "train_diffusion"), settings(globals()))

    def report(values):  # at the current step
        if MAIN:
            row = {"step": step, "time": round(time.monotonic() - start, 3), **values}
            metrics.write(json.dumps(row).encode() + b"\n")
        accelerator.log(values, step=step)
        numbers = " ".join(f"{name} {value:.5g}" for name, value in values.items())
        log(f"step {step}/{total_steps} {numbers}")

    # ---- the loop ----
    catch_signals()
    loader = DataLoader(
        splits["train"],
        batch_sampler=batch_rows(len(splits["train"]), step, total_steps, micro_size, WORLD, RANK),
        collate_fn=functools.partial(collate, shape=data["shape"]),
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",  # so that to_device() need not wait
    )
    batches = iter(loader)
    micro_batches = list(itertools.islice(batches, accumulation_steps))  # those of the next step
    profiler = start_profiler() if profile else None
    timer = time.monotonic()
    steps_since = 0  # steps since the timer was set
    n_skipped = 0  # skipped steps in a row
    is_stopped = False  # by a signal
    while True:
        # Here, `step` steps are done. Save and evaluate (also at step 0) if that is due, then take one step.
        is_done = step >= total_steps
        # Save before evaluating. If the evaluation is interrupted, a resumed run does it again.
        may_end_early = patience > 0 and is_due(step, eval_interval)
        may_be_last = is_stopped or is_done or may_end_early
        if step > 0 and (may_be_last or is_due(step, save_interval)):
            progress["seconds"] = time.monotonic() - start
            progress["metrics_bytes"] = metrics.tell() if MAIN else 0  # a resume cuts the file back to this
            save_checkpoint(unwrap(model), optimizers, accelerator.scaler, ema, progress)
        if not is_stopped and (is_done or is_due(step, eval_interval)):
            evaluate_and_keep_best(accelerator, model, ema, splits, micro_size, progress, report)
            timer = time.monotonic()  # speed is measured between evaluations
            steps_since = 0
        is_out_of_patience = patience > 0 and progress["evals_since_best"] >= patience
        if is_stopped or is_done or is_out_of_patience:
            break

        for group, peak_lr in zip(groups, peak_lrs):
            group["lr"] = peak_lr * lr_at(step, total_steps)
            if "momentum" in group:  # Muon: warm up the momentum from 0.85 to 0.95, as nanochat does
                group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)

        noisy_batches = make_noisy_batches(unwrap(model), micro_batches, step, device)
        loss = torch.zeros((), device=device)
        torch.manual_seed(hash((seed, step, RANK)))  # for the dropout that some pipelines have
        for i, (x_t, t, cond, target) in enumerate(noisy_batches):
            is_last = i == accumulation_steps - 1
            # DDP averages the gradients over the processes, but only in the last backward pass of a step.
            sync = contextlib.nullcontext() if is_last else accelerator.no_sync(model)
            with sync:
                with accelerator.autocast():
                    output = model(x_t, t, cond)
                    micro_loss = F.mse_loss(output, target) / accumulation_steps
                accelerator.backward(micro_loss)
            loss += micro_loss.detach()
        max_norm = grad_clip or math.inf  # inf: only measure the norm
        norm_before_clipping = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        # Load the next micro-batches while the GPU still computes.
        micro_batches = list(itertools.islice(batches, accumulation_steps))

        # Sum over the processes, so that all of them skip, stop or go on together.
        n_received = torch.full((), float(len(RECEIVED)), device=device)
        sums = accelerator.reduce(torch.stack([loss / WORLD, n_received]), "sum")
        # Put all numbers into one tensor, so that the CPU waits for the GPU only here, once a step.
        numbers = torch.stack([*sums, norm_before_clipping])
        train_loss, n_signals, grad_norm = numbers.tolist()
        is_stopped = n_signals > 0
        is_finite = math.isfinite(train_loss) and math.isfinite(grad_norm)
        for o in wrapped_optimizers:
            # In fp16, always call step(): the scaler leaves out what is not finite, and lowers its scale.
            if is_finite or accelerator.scaler:
                o.step()
            o.zero_grad()
        if is_finite and ema_decay:
            ema.update(step)
        step += 1
        progress["step"] = step
        steps_since += 1
        if is_finite:
            n_skipped = 0
        else:
            n_skipped += 1
            log(f"step {step}: the loss or the gradient is not finite: skipped")
            if n_skipped == 10:
                fail("ten steps in a row were not finite: lower learning_rate, or try --detect_anomaly=True")

        if is_due(step, log_interval) or step == total_steps:
            values = {"train/loss": train_loss, "grad_norm": grad_norm, "lr": groups[0]["lr"]}
            values |= speed(steps_since * batch_size, time.monotonic() - timer)
            values["epoch"] = step / steps_per_epoch
            report(values)
            timer = time.monotonic()
            steps_since = 0
        if profiler:
            profiler.step()

    # ---- at the end: test the best weights, and write a summary to run.json ----
    if profiler:
        profiler.stop()
    if not is_stopped:
        summary = {"steps": step, "minutes": (time.monotonic() - start) / 60}
        has_best = "validation" in splits and math.isfinite(progress["best"])
        if has_best:
            summary["val/loss"] = progress["best"]
        if "test" in splits:
            if has_best:
                load_best(unwrap(model))
            else:
                ema.swap()  # the averages of the last weights
            values = evaluate(accelerator, model, "test", splits["test"], micro_size)
            report(values)
            summary |= values
        if MAIN:
            write_file("run.json", run | {"summary": summary})
    finish(accelerator, step, is_stopped)


# ---- Sampling ----


def load(folder, run, base=""):
    """Return the model of a run, ready to draw.

    run: the content of its run.json. base: the pipeline that a LoRA was trained on, if it is elsewhere now.
    """
    globals().update(run["settings"])  # as if they had been given on the command line
    if base and not adapter:
        fail(f"{base=} has an effect on adapters only, and {folder} holds none")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    if init_from != "scratch":
        return load_trained_pipeline(folder, run, base, device)
    model = DiT(run["data"]["shape"], run["data"]["classes"])
    with named("out_dir", str(folder)):
        safetensors.torch.load_model(model, Path(folder, "model.safetensors"))
    return model.to(device).eval()


@torch.no_grad()
def draw(model, conditions, seeds, steps=0, scale=-1.0, negative_prompt="", lora_scale=1.0):
    """Return a PIL image for each seed and condition: a prompt, or the name of a class ("": no class).

    steps=0 and scale=-1 stand for the settings of the run.
    """
    if lora_scale != 1 and not adapter:
        fail(f"{lora_scale=} has an effect on adapters only, and this run has none")
    steps = steps or sample_steps
    if scale < 0:
        scale = guidance
    device = next(model.parameters()).device
    dtype = DTYPES[choose_precision()]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if init_from != "scratch":
        with autocast:
            return model.draw(conditions, seeds, steps, scale, negative_prompt, lora_scale)
    names = [*model.class_names, ""]
    for name in conditions:
        if name not in names:
            fail(f"class_label={name!r} is not a class: choose from {', '.join(model.class_names)}")
    if len(names) == 1 or label_dropout == 0:
        if scale > 1:
            log("guidance is off: it needs a model that was trained with classes and a label_dropout above 0")
        scale = 1.0
    elif scale < 0:
        scale = 2.0
    cond = torch.tensor([names.index(name) for name in conditions], device=device)
    with autocast:
        x = sample(model, cond, seeds, steps or 25, scale)
    if vae:
        autoencoder = load_vae(vae, device)
        mean, std = latent_statistics(autoencoder)
        z = x * std + mean
        x = torch.cat([autoencoder.decode(one).sample for one in z.split(1)])  # one by one, to save memory
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    arrays = x.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 1 or 3)
    return [Image.fromarray(array.squeeze()) for array in arrays]


def make_grid(images):
    """Return one image that shows all images, which are of the same size, in ceil(sqrt(n)) columns."""
    n_columns = math.ceil(math.sqrt(len(images)))
    n_rows = math.ceil(len(images) / n_columns)
    width, height = images[0].size
    grid = Image.new(images[0].mode, (n_columns * width, n_rows * height))
    for i, image in enumerate(images):
        row, column = divmod(i, n_columns)
        grid.paste(image, (column * width, row * height))
    return grid


# ---- Fine-tuning: only with init_from ----
# Training needs the output of the denoiser for noisy latents. A pipeline hands that output to its scheduler.
# So we call the pipeline for one step, with a scheduler that ends the call by an exception, ModelOutput,
# which carries the output. In this way, the pipeline itself does what each family of models does in its own
# way: signs, units of time, packing of latents into tokens, position ids, additional conditions.


class ModelOutput(Exception):
    """Carries the output of the denoiser out of a pipeline's call, before the pipeline decodes it."""

    def __init__(self, output=None):
        super().__init__()
        self.output = output


class OneStepScheduler:
    """Takes the place of a pipeline's scheduler, and ends the call with the output of the denoiser."""

    order = 1  # pipelines read this attribute of a scheduler, and the next one
    init_noise_sigma = 1.0

    def __init__(self, config):
        self.config = config
        self.times = None  # (B,) in the unit of the pipeline; None: end the call once the prompt is encoded
        self.mu = None  # the shift of times for this resolution, which some pipelines pass in

    def set_timesteps(
        self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None, **kwargs
    ):
        if timesteps is not None and sigmas is not None:  # CogView4
            fail(f"{init_from=} has both timesteps and noise levels, which is not supported: take another")
        self.mu = mu
        if self.times is None:
            raise ModelOutput
        self.timesteps = [self.times]
        self.sigmas = [self.times]  # read by some pipelines instead

    def set_begin_index(self, index=0):
        pass

    def scale_model_input(self, sample, *args, **kwargs):
        return sample

    def step(self, model_output, *args, **kwargs):
        raise ModelOutput(model_output)


class TimeIds:
    """Stands in for SDXL's "time ids" (B, 6), which have a row for each image.

    A row has the original height and width, the top and left of the crop, and the height and width of now.
    """

    def __init__(self, sizes, dtype):
        rows = []
        for height, width in sizes:
            scale = image_size / min(height, width)
            top = round(height * scale - image_size) // 2
            left = round(width * scale - image_size) // 2
            rows.append([height, width, top, left, image_size, image_size])
        self.rows = torch.tensor(rows, dtype=dtype)

    def to(self, device):
        self.rows = self.rows.to(device)
        return self

    def repeat(self, *counts):
        """Return all rows, where SDXL expects to repeat a single one for the whole batch."""
        return self.rows


def join(outputs):
    """Concatenate outputs of encode_prompt() for single captions into one output for the batch."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(join(parts) for parts in zip(*outputs))
    if isinstance(first, list):
        return list(itertools.chain(*outputs))
    if isinstance(first, torch.Tensor) and len(first) == 1:
        return torch.cat(outputs)
    return first  # None, or a tensor without a batch axis (Flux's text_ids), which is the same for all


def tensor_shapes(output):
    """Return the shapes of the tensors in an output of encode_prompt(), and None for its lists."""
    if isinstance(output, tuple):
        return [tensor_shapes(part) for part in output]
    return getattr(output, "shape", None)


def unconditional_part(output, guided):
    """Put the unconditional embeddings in the places of the conditional ones in an output of encode_prompt().

    For example, output = (c, None, pooled_c, None) is made without guidance, and guided = (c, u, pooled_c,
    pooled_u) with it. The result is (u, None, pooled_u, None).
    """
    if not isinstance(output, tuple):
        return output
    is_empty = [part is None or part == [] for part in output]
    unconditional = [part for part, empty in zip(guided, is_empty) if empty and part is not None]
    parts = []
    for part, empty in zip(output, is_empty):
        # Bria also returns ids, which have other axes and stay. For Flux, there is nothing to put in.
        if unconditional and not empty and axes(unconditional[0]) == axes(part):
            part = unconditional.pop(0)
        parts.append(part)
    return tuple(parts)


def axes(part):
    """Return the number of axes of a tensor, or None for a list."""
    return getattr(part, "ndim", None)


class Pipeline(nn.Module):
    """A text-to-image pipeline of diffusers with the interface of DiT. Its parameters are the denoiser's."""

    def __init__(self, pipe, name, dtype, device):
        super().__init__()
        self.pipe = pipe
        self.name = name  # of the denoiser: "transformer" or "unet"
        self.denoiser = getattr(pipe, name)
        self.dtype = dtype
        self.device = device
        self.compile = self.denoiser.compile  # compiles the denoiser only

        self.scheduler = pipe.scheduler
        config = self.scheduler.config
        names = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
        self.prediction = names.get(config.get("prediction_type"))
        if "FlowMatch" in type(self.scheduler).__name__:
            self.prediction = "flow"
        self.n_times = config.get("num_train_timesteps", 1000)
        alphas_cumprod = getattr(self.scheduler, "alphas_cumprod", None)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.one_step = OneStepScheduler(config)

        self.call = inspect.unwrap(type(pipe).__call__)  # without its @torch.no_grad(): we need gradients
        self.keywords = inspect.signature(self.call).parameters
        # The autoencoder divides the size of images, and some pipelines pack 2 x 2 latents into one token.
        processor = getattr(pipe, "image_processor", None)
        self.factor = processor.config.vae_scale_factor if processor else 1
        self.wants_size = hasattr(pipe, "_get_add_time_ids")  # SDXL is told the original size of each image
        self.takes_batches = False  # until probe() has shown that a batch gives what its images give alone
        # What encode_prompt() returned, call by call, for each caption and for each prompt of a sample
        self.outputs = []
        self.prompt_outputs = {}
        # Most pipelines turn guidance off at a scale of 1, Z-Image at 0. Try if it is still on at 1.
        pipe._guidance_scale = 1.0
        scale = 0.0 if getattr(pipe, "do_classifier_free_guidance", False) else 1.0
        n_steps = sample_steps or self.keywords["num_inference_steps"].default  # Flux.2 shifts times by it
        self.unguided = {"guidance_scale": scale, "true_cfg_scale": 1.0, "num_inference_steps": n_steps}
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.to(device)
        decode = pipe.vae.decode

        def decode_in_fp32(z, *args, **kwargs):
            """Decode latents. Some pipelines pass them in the precision of the denoiser."""
            with torch.autocast(device.type, enabled=False):
                return decode(z.to(pipe.vae.dtype), *args, **kwargs)

        pipe.vae.decode = decode_in_fp32

    def run(self, scheduler, **kwargs):
        """Call the pipeline. Return its result, or the output of the denoiser if OneStepScheduler ends it."""
        vars(self.pipe)["scheduler"] = scheduler  # setattr() would also write it to model_index.json
        kwargs |= {"height": image_size, "width": image_size, "return_dict": False}
        # Keep the size, and do not rewrite the prompt.
        kwargs |= {"use_resolution_binning": False, "use_pe": False}
        kwargs = {name: value for name, value in kwargs.items() if name in self.keywords}
        try:
            return self.call(self.pipe, **kwargs)[0]
        except ModelOutput as end:
            return end.output

    # ---- the interface of DiT ----

    def forward(self, x, t, cond):
        """Return the prediction, in fp32 and of the shape of x.

        x: noisy latents (B, ...). t: their times (B,), from 0 to 1. cond: a list per image with the index of
        its caption and, for SDXL, its original height and width.
        """
        if len(x) > 1 and not self.takes_batches:
            outputs = []
            for x_1, t_1, cond_1 in zip(x.split(1), t.split(1), cond):
                outputs.append(self(x_1, t_1, [cond_1]))
            return torch.cat(outputs)
        # A pipeline with several kinds of text encoders calls encode_prompt() several times.
        outputs_by_image = [self.outputs[row[0]] for row in cond]
        outputs_by_call = [join(outputs) for outputs in zip(*outputs_by_image)]  # transposed: [call][image]
        self.replay(outputs_by_call)
        if self.wants_size:
            sizes = [row[1:] for row in cond]
            self.pipe._get_add_time_ids = lambda *args, dtype, **kwargs: TimeIds(sizes, dtype)
        if self.prediction == "flow":
            self.one_step.times = self.n_times * t
        else:
            self.one_step.times = self.timestep(t)
        prompts = [self.captions[row[0]] for row in cond]
        kwargs = {"latents": x.to(self.dtype), "output_type": "latent", **self.unguided}
        output = self.run(self.one_step, prompt=prompts, **kwargs)
        if output.ndim != x.ndim:  # Flux.2 leaves it packed: (B, T, C)
            output = output.mT.reshape(x.shape)
        return output.float()

    def replay(self, outputs):
        """Let encode_prompt() return these outputs, one in each call, without text encoders."""
        remaining = iter(outputs)

        def encode_prompt(*args, **kwargs):
            return send_to_device(next(remaining), self.device, non_blocking=True)

        self.pipe.encode_prompt = encode_prompt

    def timestep(self, t):
        """Return times t as integer steps of the scheduler."""
        return (self.n_times * t).long().clamp(max=self.n_times - 1)

    def alpha_sigma(self, t):
        """Return alpha and sigma at times t: those of flow, or the scheduler's own."""
        if self.prediction == "flow":
            return schedule("flow", t)
        alpha_squared = self.alphas_cumprod[self.timestep(t)]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def sample_times(self, n, rng):
        """Return n random times. For flow they are logit-normal and shifted, else uniform over the steps."""
        if self.prediction == "flow":
            t = torch.sigmoid(torch.randn(n, generator=rng, device=rng.device))
            t = self.shift(t)
            # Some pipelines cast times to the precision of the denoiser. Round them in the same way.
            return (self.n_times * t).to(self.dtype).float() / self.n_times
        steps = torch.randint(self.n_times, (n,), generator=rng, device=rng.device)
        return (steps + 0.5) / self.n_times  # in the middle, so that timestep() returns just these steps

    def shift(self, t):
        """Shift times as the pipeline does when it draws: larger images need more noise."""
        config = self.one_step.config
        if config.get("use_dynamic_shifting"):
            mu = self.one_step.mu  # set by the call of the pipeline in probe()
            return self.scheduler.time_shift(mu, 1.0, t)
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        return shift * t / (1 + (shift - 1) * t)

    # ---- latents and captions ----

    @torch.no_grad()
    def encode(self, x):
        """Return images x (B, 3, H, W), from -1 to 1, as latents in the form that the denoiser takes."""
        pipe = self.pipe
        z = encode(pipe.vae, x)
        if hasattr(pipe, "_patchify_latents"):  # Flux.2 normalizes latents by a batch norm of its autoencoder
            bn = pipe.vae.bn
            z = pipe._patchify_latents(z)
            return F.batch_norm(z, bn.running_mean, bn.running_var, eps=pipe.vae.config.batch_norm_eps)
        if hasattr(pipe, "_pack_latents"):  # Flux, Qwen-Image
            return pipe._pack_latents(z, *z.shape)
        return z

    def record_prompt(self, prompt, **kwargs):
        """Run the pipeline up to its denoiser, and return what each call of its encode_prompt() returned."""
        outputs = []

        def record(*args, **kwargs):
            output = type(self.pipe).encode_prompt(self.pipe, *args, **kwargs)
            outputs.append(send_to_device(output, "cpu"))
            return output

        self.pipe.encode_prompt = record
        self.one_step.times = None  # end before the denoiser
        self.run(self.one_step, prompt=prompt, **kwargs)
        if not outputs:
            fail(f"{init_from=}: {type(self.pipe).__name__} encodes captions in a way that is not supported")
        return outputs

    def encode_unconditional(self):
        """Return outputs of encode_prompt() for a dropped caption: the pipeline's unconditional ones."""
        outputs = self.record_prompt("", **self.unguided)
        guidance_on = self.drawing_options(steps=1, scale=2.0)
        guided = self.record_prompt("", **guidance_on)
        if len(guided) == 2 * len(outputs):  # further calls have encoded the negative prompt
            return guided[len(outputs) :]
        return [unconditional_part(output, other) for output, other in zip(outputs, guided)]

    @torch.no_grad()
    def prepare(self, captions, shape):
        """Encode captions and prompts, free the text encoders, and move to the device."""
        self.shape = shape
        self.captions = [*captions, ""]
        self.no_class = len(captions)  # the index of a dropped caption
        prompts = [text.strip() for text in sample_prompts.split("|") if text.strip()] or captions[:4]
        self.prompts = (prompts * 4)[: max(4, len(prompts))]  # repeated, if there are fewer than four
        log_cut_captions(self.pipe, self.keywords, captions)
        parts = self.pipe.components.items()
        self.encoders = {name: part for name, part in parts if part and name.startswith("text_encoder")}
        self.encode_captions(captions, prompts)
        for name, encoder in self.encoders.items():
            vars(self.pipe)[name] = None  # setattr() would also change what model_index.json says
            encoder.cpu()
        if adapter or not MAIN:  # only save_pipeline() needs them again
            self.encoders.clear()
        self.to(self.device)
        self.probe()

    def encode_captions(self, captions, prompts):
        """Set self.outputs and self.prompt_outputs, from a cache if nothing has changed."""
        options = self.drawing_options(sample_steps, guidance)
        config = {name: value for name, value in self.pipe.config.items() if name[0] != "_"}
        key = [type(self.pipe).__name__, config, image_size, captions, prompts, options, self.dtype]
        key += [checksums(encoder) for encoder in self.encoders.values()]
        name = f"captions-{hashlib.md5(repr(key).encode()).hexdigest()}.pt"
        file = Path(datasets.config.HF_DATASETS_CACHE, name)
        if not file.exists():
            for encoder in self.encoders.values():
                encoder.to(self.device)
            with named(
                "init_from or image_size", init_from
            ):  # the pipeline checks the image size, among other things
                self.record_prompt("", **self.unguided)
            outputs = [self.record_prompt(text, **self.unguided) for text in captions]
            outputs.append(self.encode_unconditional())
            prompt_outputs = {text: self.record_prompt(text, **options) for text in prompts}
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")  # another run may write the same file
            torch.save((outputs, prompt_outputs), temporary)
            temporary.replace(file)
        # Captions of Flux take 4 MB each, so they stay in the file, mapped into memory.
        self.outputs, self.prompt_outputs = torch.load(file, map_location="cpu", mmap=True, weights_only=True)

    def probe(self):
        """Find out if the pipeline takes a batch. Refuse one that calls its denoiser twice a step."""
        rng = torch.Generator().manual_seed(0)
        x = self.encode(torch.randn(2, 3, image_size, image_size, generator=rng))
        t = torch.tensor([0.3, 0.6], device=self.device)
        longest = self.captions.index(max(self.captions, key=len))
        size = [image_size, image_size] if self.wants_size else []
        cond = [[longest, *size], [self.no_class, *size]]
        calls = []
        hook = self.denoiser.register_forward_hook(lambda *args: calls.append(1))
        try:
            alone = self(x, t, cond)  # one by one
        except Exception:
            traceback.print_exc()  # for those who have edited this class
            fail(f"{init_from=} cannot be trained in this way, because of the error above")
        hook.remove()
        if len(calls) != 2:
            fail(f"{init_from=} calls its denoiser {len(calls) / 2:g} times a step: only once is supported")
        if self.one_step.config.get("use_dynamic_shifting") and self.one_step.mu is None:
            fail(f"{init_from=} does not tell its scheduler how to shift the times, so it cannot be trained")
        shapes = [[tensor_shapes(output) for output in outputs] for outputs in self.outputs]
        if all(other == shapes[0] for other in shapes):
            self.takes_batches = True
            # Batches work if they give nearly the same output as the images one by one: the error must be far
            # below the effect of swapped captions. A pipeline that takes a single time raises an error.
            is_same = False
            with contextlib.suppress(Exception):
                error = (self(x, t, cond) - alone).norm()
                difference = (self(x, t, cond[::-1]) - alone).norm()
                is_same = (error < 0.1 * difference).item()
            self.takes_batches = is_same
        log(
            "the pipeline computes the images of a batch "
            + ("together" if self.takes_batches else "one by one")
        )

    # ---- sampling and saving ----

    def drawing_options(self, steps, scale, negative_prompt=""):
        """Return the keyword arguments for drawing; the pipeline has defaults for steps=0 and scale=-1."""
        options = {}
        if steps > 0:
            options["num_inference_steps"] = steps
        true_cfg_scale = self.keywords.get("true_cfg_scale")
        # Qwen-Image calls its guidance true_cfg_scale. Its guidance_scale is something else.
        has_true_cfg = true_cfg_scale is not None and true_cfg_scale.default > 1
        if negative_prompt:
            takes_it = "negative_prompt" in self.keywords and (has_true_cfg or true_cfg_scale is None)
            if not takes_it:
                fail(f"a {type(self.pipe).__name__} takes no negative prompt")
            options["negative_prompt"] = negative_prompt
        elif has_true_cfg:
            options["negative_prompt"] = " "  # without one, it would draw without guidance
        if scale >= 0:
            options["guidance_scale"] = scale
            if has_true_cfg:
                options["true_cfg_scale"] = scale
        return options

    def draw(self, prompts, seeds, steps, scale, negative_prompt, lora_scale):
        """Return a PIL image for each prompt and seed, drawn by the pipeline with its own scheduler."""
        # Set the strength of the LoRA layer by layer: the pipeline's set_adapters() would unfreeze weights.
        for layer in self.denoiser.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", lora_scale)
        vars(self.pipe).pop("_get_add_time_ids", None)  # undo what forward() does for SDXL
        options = self.drawing_options(steps, scale, negative_prompt)
        images = []
        for prompt, image_seed in zip(prompts, seeds):
            if self.prompt_outputs:  # in training, when the text encoders are gone
                self.replay(self.prompt_outputs[prompt])
            rng = torch.Generator().manual_seed(image_seed)  # the same noise on every device
            images += self.run(self.scheduler, prompt=prompt, generator=rng, **options)
        return images

    def save_pipeline(self):
        """Write the whole pipeline to out_dir, with the text encoders that prepare() has taken out."""
        for name, encoder in self.encoders.items():
            vars(self.pipe)[name] = encoder
        vars(self.pipe)["scheduler"] = self.scheduler
        self.pipe.save_pretrained(out_dir, max_shard_size="1TB")  # one file for each part
        for name in self.encoders:
            vars(self.pipe)[name] = None
        self.encoders.clear()

    def save_weights(self, weights):
        """Write weights {name: tensor}, of the adapter or of the denoiser, to out_dir as diffusers does."""
        weights = {name.removeprefix("denoiser."): weight.contiguous() for name, weight in weights.items()}
        if not adapter:
            write_file(f"{self.name}/diffusion_pytorch_model.safetensors", weights)
            return
        from diffusers.utils import convert_state_dict_to_kohya
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(self.denoiser, weights)
        config = self.denoiser.peft_config["default"].to_dict()  # has lora_alpha
        kwargs = {f"{self.name}_lora_layers": weights}
        kwargs[f"{self.name}_lora_adapter_metadata"] = config
        self.pipe.save_lora_weights(out_dir, weight_name="lora.tmp", **kwargs)
        Path(out_dir, "lora.tmp").chmod(0o644)  # safetensors writes files that only their owner can read
        Path(out_dir, "lora.tmp").replace(Path(out_dir, "pytorch_lora_weights.safetensors"))
        if self.name == "unet":  # once more, under the names that ComfyUI knows
            kohya = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in weights.items()})
            # The conversion takes the rank for alpha.
            alphas = {name: torch.tensor(lora_alpha) for name in kohya if name.endswith(".alpha")}
            write_file("kohya_lora.safetensors", kohya | alphas)


def log_cut_captions(pipe, keywords, captions):
    """Log how many captions are longer than what the text encoders read."""
    for name, tokenizer in pipe.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        limit = tokenizer.model_max_length
        # T5 and later tokenizers have no real limit; there, the pipeline's max_sequence_length is the limit.
        if limit > 1000 and "max_sequence_length" in keywords:
            limit = keywords["max_sequence_length"].default
        n_cut = sum(len(tokenizer(text)["input_ids"]) > limit for text in captions)
        if n_cut:
            log(f"{n_cut} of {len(captions)} captions are cut to {limit} tokens, the most that {name} takes")


def open_pipeline(name, dtype, device, setting):
    """Load the pipeline that a setting names. Refuse those that cannot be trained in this way."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not Path(name).exists():
        log(f"there is no folder {name}: looking for it on the Hugging Face Hub")
    if os.path.isfile(name):
        fail(
            f"{setting}={name!r} is a file: load it by diffusers' from_single_file(), and save it as a folder"
        )
    is_lora = Path(name, "pytorch_lora_weights.safetensors").exists()
    if is_lora and not Path(name, "model_index.json").exists():
        fail(f"{setting}={name!r} holds a LoRA adapter: name the pipeline that it was made for")
    with named(setting, name):
        config = diffusers.DiffusionPipeline.load_config(name)  # {part: [library, class]}, and more
        kind = getattr(diffusers, config["_class_name"])
    keywords = inspect.signature(kind.__call__).parameters.keys()
    changes_images = "strength" in keywords or "mask_image" in keywords  # image-to-image, inpainting
    takes_text = "prompt" in keywords and "latents" in keywords
    makes_images = "num_frames" not in keywords and bool((config.get("vae") or [None])[0])
    if changes_images or not takes_text or not makes_images:
        fail(f"{setting}={name!r} is a {kind.__name__}, not a text-to-image pipeline")
    denoisers = [part for part in config if part.startswith(("transformer", "unet")) and config[part][0]]
    if len(denoisers) != 1 or not hasattr(kind, "encode_prompt"):
        fail(f"{setting}={name!r}: only pipelines with one denoiser and a text encoder are supported")
    if adapter and not hasattr(kind, "save_lora_weights"):
        fail(f"{setting}={name!r}: a {kind.__name__} takes no LoRA: leave out --adapter")
    files = list(Path(name).glob("*/*.safetensors"))
    is_half = len(files) > 0 and all(".fp16" in file.name for file in files)  # it has the variant fp16 only
    with named(setting, name):
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            name,
            dtype={"vae": torch.float32, "default": dtype},  # some autoencoders overflow in 16 bits
            variant="fp16" if is_half else None,
            safety_checker=None,
        )
    model = Pipeline(pipe, denoisers[0], dtype, device)
    has_schedule = model.prediction == "flow" or model.alphas_cumprod is not None
    if model.prediction is None or not has_schedule:
        fail(f"{setting}={name!r}: its {type(pipe.scheduler).__name__} is not supported")
    return model


def load_pipeline(device):
    """Return the pipeline in init_from, ready to train. LoRA: Hu et al. 2021 (arXiv:2106.09685)."""
    frozen_dtype = DTYPES[choose_precision()]
    dtype = frozen_dtype if adapter else torch.float32
    model = open_pipeline(init_from, dtype, device, "init_from")
    denoiser = model.denoiser
    if adapter:
        import diffusers
        import peft

        config = peft.LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha,
            target_modules=find_targets(model),
            init_lora_weights="gaussian",
        )
        torch.manual_seed(seed)
        with named("lora_targets", lora_targets):
            denoiser.add_adapter(config)
        diffusers.training_utils.cast_training_params(denoiser, torch.float32)
    if frozen_fp8:  # after add_adapter(), which would put the adapter in 8 bits, too
        # After the forward pass, a weight is in 8 bits again. The backward pass of a convolution needs it.
        convolutions = (nn.Conv1d, nn.Conv2d)
        denoiser.enable_layerwise_casting(
            torch.float8_e4m3fn, frozen_dtype, skip_modules_classes=convolutions
        )
        # Autocast casts the inputs of these layers, which peft does not. Samples and probe() need it, too.
        has_half = frozen_dtype != torch.float32
        autocast = torch.autocast(device.type, frozen_dtype, enabled=has_half)
        denoiser.forward = autocast(denoiser.forward)
        # DDP cannot send weights in 8 bits to the other processes, which have loaded them anyway.
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    if gradient_checkpointing:
        # With frozen_fp8, weights change their dtype between two uses, which the default check would reject.
        denoiser.enable_gradient_checkpointing(
            functools.partial(recompute, use_reentrant=False, determinism_check="none", early_stop=False)
        )
    return model.train()


def find_targets(model):
    """Return the names of the layers that get a LoRA. Each name in lora_targets must be that of a layer."""
    layers = {name: m for name, m in model.denoiser.named_modules() if name}
    if not lora_targets:
        # In a transformer, the layers in numbered blocks; in a UNet, those in attn1 and attn2.
        pattern = r"\.attn\d\." if model.name == "unet" else r"\.\d+\."
        return [name for name, m in layers.items() if isinstance(m, nn.Linear) and re.search(pattern, name)]
    targets = [name.strip() for name in lora_targets.split(",")]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):  # with dots: to_q is not in into_q
            fail(f"{lora_targets=}: {init_from} has no layer {target!r}: the default takes all in the blocks")
    return targets


def load_trained_pipeline(folder, run, base, device):
    """Load the pipeline of a run for drawing; base as in load()."""
    if not adapter:
        setting = "out_dir"
        source = str(folder)
    elif base:
        setting = "base"
        source = base
    else:
        setting = "init_from"
        source = init_from
    model = open_pipeline(source, DTYPES[choose_precision()], device, setting)
    if type(model.pipe).__name__ != run["pipeline"]:
        fail(f"{setting}={source!r} is a {type(model.pipe).__name__}, but the run needs a {run['pipeline']}")
    if adapter:
        file = Path(folder, "pytorch_lora_weights.safetensors")
        with named(setting, source):
            model.pipe.load_lora_weights(folder, adapter_name="default", weight_name=file.name)
            stored = safetensors.torch.load_file(file)
        from peft import get_peft_model_state_dict

        expected = get_peft_model_state_dict(model.denoiser)
        if {f"{model.name}.{key}" for key in expected} != stored.keys():
            fail(f"{setting}={source!r} lacks layers of the LoRA in {folder}: name the right one by --base=")
    model.pipe.to(device)
    return model.eval()


if __name__ == "__main__":
    configure(globals())
    main()
