"""
Train a language model. This one file holds the model, the data loading and the training loop.

    accelerate launch train_lm.py                                          # on Python's own source code
    accelerate launch train_lm.py configs/shakespeare_char.py --n_layer=8  # a config, one setting changed
    accelerate launch train_lm.py --dataset=my_texts/ --out_dir=out/mine   # your own texts
    accelerate launch train_lm.py configs/lora_chat.py                     # fine-tune a pretrained model

Then `python sample.py --prompt="def "` continues a text. Ctrl-C saves a checkpoint, and the same command with
--resume=True goes on from it.
"""

import os

PARENT = os.getppid()  # the launcher, which may die during the slow imports; see catch_signals()

import bz2
import contextlib
import csv
import ctypes
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import re
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import datasets
import filelock
import numpy as np
import psutil
import pyarrow.compute
import pyarrow.parquet
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint import state_dict as dcp
from torch.utils.checkpoint import checkpoint as recompute  # the forward pass again, during backward
from torch.utils.data import DataLoader

from configurator import configure, fail, named, settings

# ---- Settings: change them here, in a config file, or by --name=value on the command line ----

# the run
out_dir = "out/lm"  # the folder that everything is written to
resume = False  # continue from the checkpoint in out_dir, or start if there is none
overwrite = False  # replace the run in out_dir by a new one
seed = 1337  # of the initial weights, the order of the data, and dropout
# data
dataset = "python"  # Python's own source code; or a file, folder, pattern, URL, or Hub name:config@revision
train_split = "train"  # name of the training split, such as train_sft
text_column = "text"  # column with the documents, if the data is a table
prompt_column = "prompt"  # column with prompts; the loss is on the answers only, in chats too
completion_column = "completion"  # column with the answers to the prompts
tokenizer = ""  # "bytes", "char", "bpe:N" (N tokens), Hub name or folder; "": init_from's own, or bpe:1024
val_fraction = 0.05  # part of the data for validation, unless it has a validation split; 0: none
test_fraction = 0.05  # part for the test at the end, unless the data has a test split; 0: none
fold = ""  # cross-validation: "2/5" validates on the second of five parts
num_workers = 0  # processes that load data; use 2 or more if a GPU waits for data
# model; with init_from, the model brings its own shape, and only block_size has an effect
init_from = "scratch"  # or a causal language model to fine-tune: Hub name, folder, or an earlier run's folder
adapter = ""  # with init_from: "lora" or "p_tuning" trains a few new weights and keeps the model as it is
block_size = 256  # context length in tokens
dropout = 0.0  # 0.1 to 0.2 helps against overfitting when the same text is seen many times
n_layer = 4  # number of transformer blocks
n_head = 2  # number of attention heads
n_kv_head = 1  # number of heads for keys and values (grouped-query attention); 0: n_head
n_embd = 128  # width of the model; n_embd / n_head, the width of a head, must be even
# adapter
lora_rank = 16  # rank of the matrices that are added to the frozen ones
lora_alpha = 32.0  # what is added is scaled by lora_alpha / lora_rank
lora_targets = "all-linear"  # or names of layers, such as q_proj,v_proj
virtual_tokens = 20  # p_tuning: number of learned vectors in front of every text
# batch and length
batch_size = 8  # rows of block_size tokens per optimizer step, over all processes
micro_batch_size = 0  # rows per process and forward pass, to save memory; 0: the whole batch at once
max_steps = 2000  # number of optimizer steps; 0: only evaluate
epochs = 0.0  # passes over the data, instead of max_steps; 0: max_steps counts
# optimizer and learning rate
optimizer = "muon"  # Muon for block matrices, AdamW for the rest; "adamw": AdamW only, as with init_from
learning_rate = 0.0  # peak learning rate; 0: chosen from DEFAULT_LR below
embed_lr = 0.3  # peak for embeddings, used with muon
head_lr = 0.004  # peak for the output layer (and for 1-D parameters that you add), used with muon
beta1 = 0.8  # AdamW's decay rate for the mean of the gradient
beta2 = 0.95  # AdamW's decay rate for the mean of the squared gradient
weight_decay = 0.03  # of the matrices in the blocks; with adamw, of all matrices
warmup_steps = 20  # steps until the learning rate reaches its peak
lr_schedule = "wsd"  # "wsd" (warm-up, stable, decay), "cosine" or "constant"
cooldown = 0.9  # part of the steps, at the end, in which wsd decays
min_lr = 0.02  # learning rate at the end, as a fraction of the peak
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping
# evaluation, saving, reports
eval_interval = 200  # steps between evaluations; 0: only at the end
eval_batches = 20  # batches per evaluation, spread evenly over the validation split; 0: the whole split
log_interval = 10  # steps between reports; 0: only at the end
save_interval = 200  # steps between checkpoints; 0: only at the end
patience = 0  # stop early after this many evaluations without a better loss; 0: never
tracker = ""  # "wandb" or "tensorboard": log there, too; metrics.jsonl is always written
# the machine
mixed_precision = "auto"  # the best that the hardware has; or "bf16", "fp16", "no" (fp32)
compile = True  # torch.compile: a minute at the start, then much faster; on CUDA only, where it pays off
gradient_checkpointing = False  # saves memory by computing activations twice; slower
deterministic = False  # makes runs on CUDA bitwise repeatable; slower
detect_anomaly = False  # stops at the first NaN in a gradient and shows where it came from; very slow
profile = False  # writes a trace of the sixth to eighth step, to be opened in chrome://tracing

DEFAULT_LR = {"muon": 0.03, "adamw": 0.001, "fine-tuning": 5e-5, "lora": 2e-4, "p_tuning": 0.001}
PATHS = ("out_dir", "dataset", "init_from", "tokenizer")  # settings in which configure() expands ~
# What a resumed run may not change. If you add a setting that shapes the model, add its name.
FIXED = "seed batch_size block_size tokenizer fold init_from adapter lora_rank lora_alpha lora_targets"
FIXED += " virtual_tokens n_layer n_head n_kv_head n_embd optimizer beta1 beta2 weight_decay"

# ---- Process helpers ----

RANK = int(os.environ.get("RANK", "0"))  # index of this process, set by the launcher
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # number of processes
MAIN = RANK == 0  # the process that writes files and reports
STOP = []  # signals that asked the run to save and exit
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # Windows has no SIGHUP


def log(message):
    """Print a message, in the main process only."""
    if not MAIN:
        return
    encoding = sys.stdout.encoding or "utf-8"  # print() raises for characters that a terminal cannot encode
    try:
        printable = message.encode(encoding, "backslashreplace").decode(encoding)
        print(printable, flush=True)
    except OSError:  # nobody reads the output any more (| head, a closed terminal): save and exit
        STOP.append(signal.SIGTERM)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # so that later prints succeed


def catch_signals():
    """Save and exit on Ctrl-C, SIGTERM, a closed terminal and, on Linux, if the launcher dies."""
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP, and so do we
            signal.signal(signum, lambda received, frame: STOP.append(received))
    # If `accelerate launch` is killed, the processes that it started would train on unnoticed. Accelerate
    # sets the first variable for one process and the second for several.
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # prctl(2): the signal that this process gets when its parent dies
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != PARENT:  # it died before this call
            STOP.append(signal.SIGTERM)


def ignore_signals(worker_id):
    """Let a DataLoader worker ignore signals, so that the training process can finish its step and save."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


# ---- Check the settings ----

MUST_BE_POSITIVE = "batch_size block_size n_layer n_head n_embd lora_rank lora_alpha virtual_tokens"
MUST_BE_BELOW_ONE = "dropout beta1 beta2 val_fraction test_fraction"
CHOICES = {
    "adapter": ("", "lora", "p_tuning"),
    "optimizer": ("muon", "adamw"),
    "lr_schedule": ("wsd", "cosine", "constant"),
    "mixed_precision": ("auto", "bf16", "fp16", "no"),
    "tracker": ("", "wandb", "tensorboard"),
}


def check_settings():
    """End the program for settings that cannot work, before any data is touched."""
    for name, value in settings(globals()).items():  # the variables at the top of this file
        if name in CHOICES and value not in CHOICES[name]:
            fail(f"{name}={value!r} must be one of {', '.join(map(repr, CHOICES[name]))}")
        if isinstance(value, str):
            continue  # the rest is about numbers
        if value < 0:
            fail(f"{name}={value} must not be negative")
        if value == 0 and name in MUST_BE_POSITIVE.split():
            fail(f"{name}={value} must be greater than 0")
        if value >= 1 and name in MUST_BE_BELOW_ONE.split():
            fail(f"{name}={value} must be below 1")
    if seed >= 2**63:  # torch.manual_seed() takes no more
        fail(f"{seed=} must be below 2**63")
    if n_embd % (2 * n_head) != 0:
        fail(f"{n_embd=} must be a multiple of 2 x n_head = {2 * n_head}")
    if n_head % (n_kv_head or n_head) != 0:
        fail(f"{n_head=} must be a multiple of {n_kv_head=}")
    part = re.fullmatch(r"(\d+)/(\d+)", fold)
    if fold and not (part and 1 <= int(part[1]) <= int(part[2]) and int(part[2]) > 1):
        fail(f"{fold=} must look like 2/5 (the second of five parts)")
    if adapter and init_from == "scratch":
        fail(f"{adapter=} needs a pretrained model, such as --init_from=gpt2")
    if init_from != "scratch" and re.fullmatch(r"bytes|char|bpe:\d+", tokenizer):
        fail(f"{tokenizer=} cannot be used: {init_from} has its own tokenizer")
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        fail(f"{mixed_precision=} needs a CUDA GPU")
    if mixed_precision == "fp16" and optimizer == "muon" and init_from == "scratch":
        fail(f"{mixed_precision=} needs --optimizer=adamw: Muon has no loss scaling")
    if tracker and importlib.util.find_spec(tracker) is None:
        fail(f"{tracker=} is not installed: pip install {tracker}")
    if resume and overwrite:
        fail("resume continues the run that overwrite would delete: choose one")
    if not dataset:
        fail("dataset is empty: name a file, a folder, a URL or a dataset of the Hub")


# ---- Model: a decoder-only transformer with rotary positions, QK-norm and squared ReLU ----
# It has no biases and no learned norms. transformers knows it as "nanochat", so its weights load there, too.


def norm(x):
    """Return x divided by the root mean square of its last dimension (RMSNorm, arXiv:1910.07467)."""
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


def rotate(x, cos, sin):
    """Return x (..., T, D) with rotary position embeddings (Su et al. 2021, arXiv:2104.09864)."""
    x1, x2 = x.chunk(2, dim=-1)
    # As in nanochat, each pair is rotated by minus the angle. For attention only differences count.
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def attention(q, k, v, p):
    """Return causal attention: softmax(q k^T / sqrt(D)) v, in which no token sees a later one.

    q and the result: (B, n_head, T, D). k, v: (B, n_kv_head, T or more, D). p: the dropout probability.
    """
    T = q.size(2)
    if q.is_cpu and 1 < T <= 512:
        return cpu_attention(q, k, v, p)  # makes the default run 1.2 times as fast
    # A single new token attends to all tokens before it, which are in the cache.
    is_causal = T > 1
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=is_causal, enable_gqa=True)


def cpu_attention(q, k, v, p):
    """Compute attention() step by step, which on a CPU is faster than torch's kernel for short texts."""
    B, n_head, T, D = q.shape
    # Stack the queries of the heads that share keys and values into one matrix.
    n_shared = n_head // k.size(1)
    q = q.reshape(B, -1, n_shared * T, D)  # (B, n_kv_head, n_shared * T, D)
    mask = torch.full((T, T), -1e9, dtype=q.dtype).triu(1)
    scores = (q / math.sqrt(D)) @ k.mT  # (B, n_kv_head, n_shared * T, T)
    scores = scores + mask.repeat(n_shared, 1)
    weights = scores.softmax(dim=-1, dtype=v.dtype)  # autocast alone would make it fp32
    return (F.dropout(weights, p) @ v).view(B, n_head, T, D)


class Attention(nn.Module):
    """Causal self-attention, in which several heads can share keys and values (arXiv:2305.13245)."""

    def __init__(self, config, layer):
        super().__init__()
        C = config.hidden_size
        self.layer = layer  # index of this block, for the cache
        self.head_dim = C // config.num_attention_heads  # D
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        q = norm(rotate(q, cos, sin))  # QK-norm keeps the attention logits in bounds
        k = norm(rotate(k, cos, sin))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # keys and values of all tokens so far
        y = attention(q, k, v, dropout if self.training else 0.0)  # (B, n_head, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with a squared ReLU between them (So et al. 2021, arXiv:2109.08668)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())


class Block(nn.Module):
    """A transformer block: attention and an MLP, each on the normed input and added to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + F.dropout(self.self_attn(norm(x), cos, sin, cache), dropout, self.training)
        x = x + F.dropout(self.mlp(norm(x)), dropout, self.training)
        return x


class GPT(nn.Module):
    """The whole model, with the config and the parameter names of transformers' NanoChatForCausalLM."""

    # Read by accelerate: FSDP2 gathers the weights of one Block at a time.
    _no_split_modules = ("Block",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.context = config.max_position_embeddings
        embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model = nn.ModuleDict({"embed_tokens": embed_tokens, "layers": layers})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        D = config.hidden_size // config.num_attention_heads
        frequencies = 1 / 10000 ** (torch.arange(0, D, 2) / D)  # (D / 2,)
        angles = torch.outer(torch.arange(self.context), frequencies)  # (context, D / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Set the initial weights. Parameters that are not listed here keep the initialization of torch."""
        std = self.config.hidden_size**-0.5  # keeps the scale of the activations
        for block in self.model.layers:
            nn.init.normal_(block.self_attn.q_proj.weight, std=std)
            nn.init.normal_(block.self_attn.k_proj.weight, std=std)
            nn.init.normal_(block.self_attn.v_proj.weight, std=std)
            nn.init.zeros_(block.self_attn.o_proj.weight)  # so each block starts as the identity
            nn.init.normal_(block.mlp.fc1.weight, std=std)
            nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(self.lm_head.weight)  # so the loss starts at ln(vocab_size)
        is_tied = self.lm_head.weight is self.model.embed_tokens.weight  # only if you tie them
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02 if is_tied else 1.0)

    def forward(self, idx, targets=None, learned=None, cache=None):
        """Return the logits for the next tokens or, if targets are given, the sum of their losses.

        idx: token ids (B, T). targets: the token after each (B, T), -100 where there is no loss. learned: the
        indices in targets.flatten() that have a loss, or None to take all. cache: a dictionary, empty at
        first, which keeps keys and values from call to call, so that idx holds new tokens only. Logits: (B,
        T, V) in fp32; with a cache (B, 1, V), those of the last token.
        """
        start = 0  # position of the first token
        past = None
        if cache is not None:
            past = cache.setdefault("past_key_values", transformers.DynamicCache())
            start = past.get_seq_length()

        x = self.model.embed_tokens(idx)  # (B, T, C)
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            # Keep the residual stream in bf16 as well, which takes half the memory.
            x = x.to(torch.get_autocast_dtype(device_type))
        x = F.dropout(norm(x), dropout, self.training)
        cos = self.cos[start : start + idx.size(1)].to(x.dtype)  # (T, D / 2)
        sin = self.sin[start : start + idx.size(1)].to(x.dtype)
        for block in self.model.layers:
            if gradient_checkpointing and self.training:
                x = recompute(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, past)
        x = norm(x)

        if targets is None:
            return self.logits(x if cache is None else x[:, -1:])
        x = x.flatten(0, 1)  # (B * T, C)
        targets = targets.flatten()
        if learned is not None:
            x = x[learned]
            targets = targets[learned]
        return F.cross_entropy(self.logits(x), targets, reduction="sum")

    def logits(self, x):
        """Return logits in fp32, softly capped at +-15 so that none runs away (Gemma 2, arXiv:2408.00118)."""
        logits = self.lm_head(x).float()
        return 15.0 * torch.tanh(logits / 15.0)


def count_ids(tok):
    """Return the number of ids of a tokenizer; len(tok) would be too small if some are not in use."""
    return max(tok.get_vocab().values()) + 1


def make_gpt(tok):
    """Return a new GPT of the shape in the settings, for the vocabulary of a tokenizer."""
    vocab_size = count_ids(tok)
    if tokenizer not in ("bytes", "char"):
        # GPUs multiply matrices faster if their sizes are multiples of 64. The padding is never sampled.
        vocab_size = 64 * math.ceil(vocab_size / 64)
    config = transformers.NanoChatConfig(
        vocab_size=vocab_size,
        max_position_embeddings=block_size,
        hidden_size=n_embd,
        intermediate_size=4 * n_embd,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        num_key_value_heads=n_kv_head or n_head,
        bos_token_id=tok.eos_token_id,  # one token ends a text and begins the next
        eos_token_id=tok.eos_token_id,
        pad_token_id=None,
        architectures=["NanoChatForCausalLM"],
    )
    torch.manual_seed(seed)
    gpt = GPT(config)
    gpt.generation_config = transformers.GenerationConfig.from_model_config(config)
    return gpt


# ---- Data: files -> documents -> rows of block_size + 1 token ids -> splits ----

# The kinds of tables by the suffixes of their files. All other files are text, or cannot be read.
TABLES = {".json": "json", ".jsonl": "json", ".jsonlines": "json", ".ndjson": "json"}
TABLES |= {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
NOT_TEXT = "7z arrow avi bin bmp doc docx epub exe gguf gif h5 ico jpeg jpg mp3 mp4 npy npz odt pdf pickle"
NOT_TEXT += " pkl png ppt pptx pt pth rar rtf safetensors so sqlite svg tar tgz tif tiff wav webp xls xlsx"
NOT_TEXT += " zip zst"
# Folders of Python's source code that are tests or tables.
NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "pydoc_data", "encodings"}
# The names that folders, files and splits of the Hub have for the three splits.
SPLITS = {"train": "train", "training": "train"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
END = "<|endoftext|>"  # of the tokenizers that are learned here
# Characters that are tokenized at a time. Each takes about 100 bytes of memory.
PIECE = 200_000


def kind_of(name):
    """Return the kind of a file by its suffix: one of TABLES, "text", or "" if it cannot be read."""
    path = Path(name.lower())
    if path.suffix in OPENERS:
        path = path.with_suffix("")
    if path.suffix[1:] in NOT_TEXT.split():
        return ""
    return TABLES.get(path.suffix, "text")


def split_of(path):
    """Return the split of a file. Look for its name in the folders of the path, then in the file's name."""
    for name in [*path.parts[:-1], path.name.split(".")[0]]:
        # Shard numbers and a hash may follow the name: test-00000-of-00001-a09b74b3ef9c3b56
        name = re.sub(r"([-_]\d+(-of-\d+)?)?(-[0-9a-f]{16})?$", "", name.lower())
        if name in SPLITS:
            return SPLITS[name]
    return "train"


def list_files(path, seen):
    """Yield the file, or the files below the folder, that are not hidden. seen: real paths of those before.

    Links are followed, but each file is yielded once, and a folder that holds a link to itself is read once.
    """
    real_path = os.path.realpath(path)
    if real_path in seen:
        return
    seen.add(real_path)
    if path.is_file():
        yield path
    elif path.is_dir():
        with named("dataset", dataset):
            children = sorted(path.iterdir())
        for child in children:
            is_skipped = dataset == "python" and child.name in NOT_LIBRARY
            if child.name[0] != "." and not is_skipped:
                yield from list_files(child, seen)


def open_text(path, newline=None):
    """Open a file of text, which may be compressed. Bytes that are not UTF-8 are kept as lone surrogates."""
    opener = OPENERS.get(path.suffix.lower(), open)
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def is_text(path):
    """Tell whether a file can be read and begins with UTF-8."""
    try:
        with open_text(path) as f:
            f.read(PIECE).encode()  # fails for lone surrogates
    except Exception:  # whatever a damaged or unreadable file raises
        return False
    return True


def find_files():
    """Return (kind, {split: paths}) for the files that `dataset` names, or ("hub", {}) if there are none."""
    if "://" in dataset:
        kind = kind_of(dataset.split("?")[0])
        if kind == "":
            fail(f"{dataset=} names a kind of file that cannot be read")
        with named("dataset", dataset):
            path = datasets.DownloadManager().download_and_extract(dataset)
        return kind, {"train": [Path(path)]}
    root = Path(sysconfig.get_paths()["stdlib"] if dataset == "python" else dataset)
    if root.exists():
        files = list(list_files(root, set()))
    else:
        # A pattern, or the name of a dataset of the Hub, which matches no files.
        names = sorted(glob.glob(dataset, recursive=True))
        files = [Path(name) for name in names if os.path.isfile(name)]
    if not files and not root.is_dir():
        return "hub", {}
    if dataset == "python":
        files = [path for path in files if path.suffix == ".py"]

    # Tables win over texts (a README.md is often beside them). Of several kinds, the largest table decides.
    kind = "text"
    tables = [path for path in files if kind_of(path.name) in TABLES.values()]
    if tables:
        kind = kind_of(max(tables, key=os.path.getsize).name)
    used = [path for path in files if kind_of(path.name) == kind]
    if kind == "text":
        used = [path for path in used if is_text(path)]
    if len(used) < len(files):
        left_out = sorted(set(files) - set(used))
        log(f"left out: {len(left_out)} files that are not {kind}, or not UTF-8, such as {left_out[0]}")
    if not used:
        fail(f"{dataset=} holds nothing that can be read: UTF-8 text, .jsonl, .csv or .parquet")

    paths = defaultdict(list)
    for path in used:
        split = split_of(path.relative_to(root)) if root.is_dir() else "train"
        paths[split].append(path)
    return kind, paths


def parse_table(path, kind):
    """Yield the rows of a table, unchecked. The fields of a CSV stay text, whatever they look like."""
    if kind == "parquet":
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    elif kind in ("csv", "tsv"):
        csv.field_size_limit(2**31 - 1)  # the default is too small for texts
        delimiter = "," if kind == "csv" else "\t"
        yield from csv.DictReader(open_text(path, newline=""), delimiter=delimiter, strict=True)
    elif open_text(path).read(PIECE).lstrip().startswith("["):  # the file is one array
        yield from json.load(open_text(path))
    else:
        for line in open_text(path):
            if line.strip():
                yield json.loads(line)


def read_table(path, kind):
    """Yield the rows of a table as dictionaries. If one is damaged, end the program and say where."""
    rows = parse_table(path, kind)
    for n in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            fail(f"{dataset=}: {path}, row {n} cannot be read ({error}): mend it or take it out")
        if not isinstance(row, dict):
            fail(f"{dataset=}: {path}, row {n} must have named fields, not be {row!r:.50}")
        # The csv module gives fields beyond those of the header the name None.
        if None in row:
            fail(f"{dataset=}: {path}, row {n} has more fields than the first line: quote fields with commas")
        yield row


def choose_columns(names):
    """Return {our name: their name} of the columns of a table that are learned from, and log the others."""
    chats = [name for name in ("messages", "conversations") if name in names]
    if text_column == "text" and chats:
        # Only some rows may have the last two.
        columns = {"messages": chats[0], "system": "system", "tools": "tools"}
    elif text_column == "text" and prompt_column in names and completion_column in names:
        columns = {"prompt": prompt_column, "completion": completion_column}
    elif text_column in names:
        columns = {"text": text_column}
    else:
        fail(f"{dataset=} has no column {text_column!r}: --text_column= takes one of {', '.join(names)}")
    used = [name for name in columns.values() if name in names]
    unused = [name for name in names if name not in used]
    log(f"columns: {', '.join(used)}" + (f"; not used: {', '.join(unused)}" if unused else ""))
    return columns


def load_documents():
    """Return {split: documents}, in a random order that is the same for every seed.

    A document is a dictionary with "path" (of a file of text), with "text", with "prompt" and "completion",
    or with "messages" and "tools" (as JSON; the messages begin with the system message, if there is one).
    """
    kind, sources = find_files()
    columns = {}
    features = {"path": datasets.Value("binary")}  # the name of a file may not be UTF-8
    if kind == "hub":
        name, config, revision = re.fullmatch(r"([^:@]*):?([^@]*)@?(.*)", dataset).groups()
        with named("dataset", dataset):
            sources = dict(datasets.load_dataset(name, config or None, revision=revision or None))
        columns = choose_columns(next(iter(sources.values())).column_names)
    elif kind != "text":
        # Rows may lack columns, so look at many. A dictionary keeps the order of the names.
        names = {}
        for path in itertools.chain(*sources.values()):
            for row in itertools.islice(read_table(path, kind), 100):
                names |= dict.fromkeys(row)
        columns = choose_columns(list(names))
    if columns:
        features = dict.fromkeys(columns, datasets.Value("string"))

    documents = {}
    for split, source in sources.items():
        key = [kind, columns]
        if kind == "hub":
            key.append(source._fingerprint)
        else:
            key += [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in source]
        rows = cached(key, features, read_documents, source, kind, columns)
        # Validation and test are cut off from the end, so shuffle.
        documents[split] = rows.shuffle(seed=0)
    return documents


def read_documents(source, kind, columns):
    """Yield the documents of a split. source: paths of files, or a Dataset of the Hub."""
    if kind == "text":
        for path in source:
            yield {"path": os.fsencode(path)}
        return
    if kind == "hub":
        rows = source.select_columns([name for name in columns.values() if name in source.column_names])
    else:
        rows = itertools.chain.from_iterable(read_table(path, kind) for path in source)
    for row in rows:
        if "messages" in columns:
            messages = read_messages(row, columns["messages"])
            tools = row.get("tools") or None
            if not isinstance(tools, str):
                tools = json.dumps(tools, default=str)  # str for dates, which JSON does not have
            yield {"messages": json.dumps(messages, default=str), "tools": tools}
        else:
            yield {name: as_text(row.get(column), column) for name, column in columns.items()}


def cached(key, features, generator, *args):
    """Return the rows of generator(*args) as a Dataset, from a cache if key and code are the same.

    A Dataset among the args is represented in the key by its _fingerprint, which stands for its content.
    """
    sections = Path(__file__).read_text(encoding="utf-8").split("\n# ---- ")
    code = [section for section in sections if section.startswith(("Data", "Answers"))]
    state = repr([key, generator.__name__, code])
    fingerprint = hashlib.md5(state.encode()).hexdigest()
    # With gen_kwargs instead, datasets would look for lists among the arguments and split them into shards.
    make_rows = functools.partial(generator, *args)
    return datasets.Dataset.from_generator(make_rows, datasets.Features(features), fingerprint=fingerprint)


def as_text(value, column):
    """Return a field of a table as text: "" for None, and the joined text of OpenAI's list of parts."""
    if value is None:
        return ""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
        if parts == value:
            return "".join(part["text"] for part in parts)
    if not isinstance(value, str):
        fail(f"{dataset=}: column {column!r} holds {value!r:.60}, which is not text")
    return check_unicode(value, f"column {column!r}")


def check_unicode(text, where):
    """Return the text, unless it holds lone surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fail(f"{dataset=}: {where} is not UTF-8 ({error}): convert it, or take it out")
    return text


def read_pieces(documents):
    """Yield (piece, is_last) of the texts of documents; is_last marks the last piece of each document."""
    for document in documents:
        where = "a document"
        if "path" in document:
            where = os.fsdecode(document["path"])
            file = open_text(Path(where))
        elif "messages" in document:
            # A tokenizer learns from what PLAIN_CHAT_TEMPLATE would write.
            messages = json.loads(document["messages"])
            file = io.StringIO("".join(f"{m['role']}: {m['content']}\n" for m in messages))
        else:
            file = io.StringIO("".join(document.values()))
        # Read one piece ahead, so that the last one is known.
        piece = file.read(PIECE)
        while more := file.read(PIECE):
            # Cut before white space, which is the beginning of the token of the word behind it.
            cut = max(piece.rfind("\n"), piece.rfind(" "))
            if cut < 1:
                cut = len(piece)
            yield check_unicode(piece[:cut], where), False
            piece = piece[cut:] + more
        yield check_unicode(piece, where), True


def begin_of_text(tok):
    """Return [<bos>] if the tokenizer writes it in front of every text (Gemma, Llama), else []."""
    # GPT-2 and Qwen write nothing. Neither does a tokenizer of characters, which may not know an "a".
    if not tok("")["input_ids"]:
        return []
    first = tok("a")["input_ids"][:1]
    return first if first == [tok.bos_token_id] else []


def encode_texts(documents, tok):
    """Yield rows of block_size + 1 ids: the documents one after another, with an <eos> behind each.

    Each token but the first is the target of one row. A row begins with <bos> where the tokenizer writes one,
    else with the last token of the row before. The last row has no ids, but a note for the log.
    """
    begin = begin_of_text(tok)
    overlap = 0 if begin else 1  # tokens that a row repeats from the row before
    n_dropped = 0
    ids = []
    pieces = read_pieces(documents)
    while batch := list(itertools.islice(pieces, 16)):
        texts = [text for text, _ in batch]
        # An "<eos>" that is spelled out in a document is text (split_special_tokens).
        encoded = tok(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for (text, is_end), tokens in zip(batch, encoded):
            ids += tokens
            if text == "":  # an empty document
                n_dropped += 1
            elif is_end:
                ids.append(tok.eos_token_id)
        n_full = (len(ids) - overlap) // block_size
        for start in range(0, n_full * block_size, block_size):
            yield {"ids": begin + ids[start : start + block_size + overlap]}
        ids = ids[n_full * block_size :]
    if len(ids) > overlap:
        yield {"ids": begin + ids}
    yield {"note": f"{n_dropped} dropped (empty)" if n_dropped else ""}


def learn_tokenizer(name, splits):
    """Yield a row with a tokenizer as JSON: "char" learns from all splits, "bpe:N" from 100 MB of train."""
    if name == "char":
        pieces = itertools.chain.from_iterable(map(read_pieces, splits.values()))
        letters = set()
        for text, _ in pieces:
            letters.update(text)
        vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
        core = Tokenizer(models.WordLevel(vocabulary))
        core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        core.decoder = decoders.Fuse()
    else:
        n_tokens = 257 if name == "bytes" else int(name.removeprefix("bpe:"))
        documents = splits["train"] if n_tokens > 257 else []  # END and the 256 bytes need no text
        pieces = itertools.islice(read_pieces(documents), 100_000_000 // PIECE)
        texts = (text for text, _ in pieces)
        core = ByteLevelBPETokenizer()
        core.train_from_iterator(texts, n_tokens, min_frequency=0, special_tokens=[END], show_progress=False)
    yield {"json": core.to_str()}


def load_tokenizer(splits):
    """Return a tokenizer of transformers, which is learned from the documents unless it is loaded."""
    name = tokenizer or ("bpe:1024" if init_from == "scratch" else init_from)
    if re.fullmatch(r"bytes|char|bpe:\d+", name):
        key = [name, *(documents._fingerprint for documents in splits.values())]
        row = cached(key, {"json": datasets.Value("string")}, learn_tokenizer, name, splits)[0]
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
        core = Tokenizer.from_str(row["json"])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    with named("tokenizer", name):
        tok = transformers.AutoTokenizer.from_pretrained(name)
    # transformers makes an empty tokenizer where files are missing.
    if not tok("a")["input_ids"]:
        fail(f"the tokenizer of {name} has no vocabulary: put its tokenizer.json into the folder")
    if tok.eos_token_id is None:
        fail(f"the tokenizer of {name} has no end-of-text token (eos_token)")
    if not tok.is_fast:
        fail(f"the tokenizer of {name} is not a fast one, which tells where in the text each token stands")
    return tok


def cut_off(rows, fraction):
    """Split off the last part of the rows. Return (rest, part)."""
    with named("dataset", dataset):
        parts = rows.train_test_split(fraction, shuffle=False)
    return parts["train"], parts["test"]


def prepare_data():
    """Return (tokenizer, {split: rows}). Missing splits are cut off from the end of the training rows."""
    datasets.disable_progress_bars()
    found = load_documents()
    if train_split not in found:
        fail(f"{dataset=} has no split {train_split!r}: --train_split= takes one of {', '.join(found)}")
    splits = {"train": found.pop(train_split)}
    wanted = {"validation": val_fraction and not fold, "test": test_fraction}
    for name, documents in found.items():
        split = SPLITS.get(name)
        if wanted.get(split) and split not in splits:
            splits[split] = documents
        else:
            log(f"not used: the split {name}")

    tok = load_tokenizer(splits)
    encode = encode_texts
    features = {"ids": datasets.List(datasets.Value("int32")), "note": datasets.Value("string")}
    columns = splits["train"].column_names
    if "prompt" in columns or "messages" in columns:
        encode = encode_answers
        features["labels"] = features["ids"]
    if "messages" in columns and not tok.chat_template:
        # See PLAIN_CHAT_TEMPLATE in the section on answers.
        tok.chat_template = ("{{ bos_token }}" if begin_of_text(tok) else "") + PLAIN_CHAT_TEMPLATE
    key = [block_size, tok.backend_tokenizer.to_str(), tok.special_tokens_map, tok.chat_template]
    for split, documents in splits.items():
        rows = cached([documents._fingerprint, *key], features, encode, documents, tok)
        n_rows = len(rows) - 1
        note = rows[n_rows]["note"]
        if note:
            log(f"{split}: {note}")
        if n_rows == 0:
            fail(f"{dataset=} has nothing to learn from in its {split} split")
        splits[split] = rows.select(range(n_rows)).remove_columns("note").with_format("torch")

    if test_fraction and "test" not in splits:
        splits["train"], splits["test"] = cut_off(splits["train"], test_fraction)
    if fold:
        k, n = map(int, fold.split("/"))
        parts = [splits["train"].shard(n, i, contiguous=True) for i in range(n)]
        splits["validation"] = parts.pop(k - 1)
        splits["train"] = datasets.concatenate_datasets(parts)
    elif val_fraction and "validation" not in splits:
        splits["train"], splits["validation"] = cut_off(splits["train"], val_fraction)
    for split, rows in splits.items():
        log(f"{split}: {len(rows):,} rows of at most {block_size} tokens")
    return tok, splits


def collate(rows):
    """Return a batch (x, y, learned) of rows.

    x: token ids (B, T), padded on the right. y: the token after each (B, T), -100 where there is no loss.
    learned: the positions in y.flatten() that have a loss, or None for rows of text, where almost all have.
    """
    inputs = [row["ids"][:-1] for row in rows]
    targets = [row.get("labels", row["ids"])[1:] for row in rows]
    x = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    y = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    learned = None
    if "labels" in rows[0]:
        learned = (y.flatten() != -100).nonzero()[:, 0]
    return x, y, learned


def batch_rows(lengths, first_step, last_step, micro_size, world, rank):
    """Yield the row numbers of each micro-batch of a process. They depend on (seed, step) alone.

    The rows of a step are the same for any number of processes and size of micro-batches. An epoch is a
    permutation in which rows of similar length share a batch, which saves padding.
    """
    n_batches = max(1, len(lengths) // batch_size)
    epoch = None
    for step in range(first_step, last_step):
        if step // n_batches != epoch:
            epoch = step // n_batches
            rng = np.random.default_rng([seed, epoch])
            rows = rng.permutation(len(lengths))
            # Drop an incomplete last batch, or repeat rows if there are too few for one batch.
            rows = np.resize(rows, n_batches * batch_size)
            # Let rows of similar length meet, but not the same ones in every epoch.
            noisy_lengths = lengths[rows] * rng.uniform(0.9, 1.1, len(rows))
            rows = rows[np.argsort(noisy_lengths)]
            batches = rng.permutation(rows.reshape(n_batches, batch_size))
        # (accumulation steps, processes, rows)
        micro_batches = batches[step % n_batches].reshape(-1, world, micro_size)
        yield from micro_batches[:, rank].tolist()


# ---- Optimizers and learning rate ----


def orthogonalize(x):
    """Bring all singular values of the matrices x (n, rows, columns) near 1 by five Newton-Schulz iterations.

    The method and its coefficients are Keller Jordan's (2024, kellerjordan.github.io/posts/muon).
    """
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:  # the smaller one of two possible Gram matrices takes less work
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # x <- a x + (b G + c G^2) x, where G = x x^T
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if is_tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon (momentum with orthogonalized updates), with all matrices of a shape in a batch."""

    def __init__(self, matrices, dtype, **kwargs):
        super().__init__(matrices, **kwargs)
        self.dtype = dtype  # of the Newton-Schulz iterations; torch's own are always in bf16

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
                # average <- momentum average + (1 - momentum) grad; with Nesterov, the same once more
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                directions = torch._foreach_lerp(grads, averages, group["momentum"])
                updates = orthogonalize(torch.stack(directions).to(self.dtype))  # (n, rows, columns)
                updates = updates.to(params[0].dtype).unbind()
                scale = max(1, rows / columns) ** 0.5  # larger steps for tall matrices, "original" in torch
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * scale)


def make_optimizers(model, accelerator):
    """Return [Muon, AdamW] for a model from scratch, or [AdamW]. Each trained parameter is in one of them."""
    adamw = functools.partial(torch.optim.AdamW, betas=(beta1, beta2), weight_decay=0.0, fused=True)
    if optimizer == "adamw" or init_from != "scratch":
        if init_from == "scratch":
            kind = "adamw"
        else:
            kind = adapter or "fine-tuning"
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim >= 2]
        vectors = [p for p in trained if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
        return [adamw(groups, lr=learning_rate or DEFAULT_LR[kind])]

    matrices = []
    embeddings = []
    vectors_and_head = []
    for name, p in model.named_parameters():  # a tied head comes once, with the name of the embedding
        if p.ndim != 2 or name == "lm_head.weight":
            vectors_and_head.append(p)
        elif name.startswith("model.layers."):
            matrices.append(p)
        else:
            embeddings.append(p)
    groups = [{"params": embeddings, "lr": embed_lr}]
    if vectors_and_head:
        groups.append({"params": vectors_and_head, "lr": head_lr})
    muon = {
        "lr": learning_rate or DEFAULT_LR["muon"],
        "weight_decay": weight_decay,
        "adjust_lr_fn": "original",
    }
    if accelerator.is_fsdp2:  # it shards each matrix; torch.optim.Muon gathers the shards, ours does not
        return [torch.optim.Muon(matrices, **muon), adamw(groups)]
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return [Muon(matrices, dtype, **muon), adamw(groups)]


def lr_at(step, total_steps):
    """Return the learning rate at a step as a fraction of its peak: the smaller of warm-up and decay."""
    warmup = (step + 1) / (warmup_steps + 1)  # above 1 after the warm-up
    decay = 1.0
    if lr_schedule == "cosine":
        progress = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
        decay = 0.5 * (1 + math.cos(math.pi * min(1, progress)))
    elif lr_schedule == "wsd":
        decay = min(1.0, (total_steps - step) / max(1, cooldown * total_steps))
    return min(warmup, min_lr + (1 - min_lr) * decay)


# ---- Checkpoints and the run directory ----

# What a run writes. A new run in the same folder removes these files of an old one, and no others.
RUN_FILES = (
    "run.json metrics.jsonl checkpoint.pt best.pt config.json generation_config.json model*.safetensors"
)
RUN_FILES += " model.safetensors.index.json adapter_model.safetensors adapter_config.json chat_template.jinja"
RUN_FILES += " tokenizer.json tokenizer_config.json special_tokens_map.json vocab.* merges.txt *.model"
RUN_FILES += " samples/step_*.txt train_lm/events* *.pt.trace.json *.json.tmp *.pt.tmp"
LOCKS = []  # the lock of out_dir is here, and so held until this process ends


def write_file(name, content):
    """Write a .json or .pt file in out_dir atomically: a crash leaves the old file or the new one."""
    temporary = Path(out_dir, f"{name}.tmp")
    with open(temporary, "wb") as f:
        if name.endswith(".json"):
            f.write(json.dumps(content, indent=1).encode())
        else:
            torch.save(content, f)
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
    for path in (os.getcwd(), init_from, dataset):  # the last two may be Hub names
        if os.path.exists(path) and Path(path).resolve().is_relative_to(folder):
            fail(f"{out_dir=} is or holds {path}, which a run might delete: choose another --out_dir")
    if not MAIN:
        return None
    LOCKS.append(filelock.FileLock(Path(out_dir, "lock")))
    try:
        LOCKS[0].acquire(timeout=10)  # data workers keep the lock for some seconds after their run was killed
    except filelock.Timeout:
        fail(f"{out_dir=} is in use by another run: wait until it ends, or choose another --out_dir")
    files = {path.name for path in Path(out_dir).iterdir() if path.name != "lock" and path.suffix != ".tmp"}
    is_run = "run.json" in files
    if files and not is_run:
        fail(f"{out_dir=} holds other files, such as {min(files)}: choose another --out_dir")
    if is_run and not resume and not overwrite:
        fail(f"{out_dir=} holds a run: add --resume=True or --overwrite=True, or choose another --out_dir")
    if not (resume and is_run and "checkpoint.pt" in files):
        return None
    run = read_json("out_dir", out_dir, "run.json")
    for name in FIXED.split():
        check_fixed(name, run["settings"].get(name), globals()[name])
    return run


def check_fixed(name, before, now):
    """Refuse to resume a run if what must stay fixed has changed since it began."""
    if before != now:
        fail(f"{out_dir=} holds a run with {name}={before!r}: a resume cannot change it to {now!r}")


def start_run(model, tok, rows, old_run):
    """Write run.json, tokenizer and a copy of this script to out_dir; a new run first deletes an old one."""
    # A resume compares 100 rows, evenly spread, to notice other data.
    chosen = np.linspace(0, len(rows["train"]) - 1, 100).astype(int)
    ids = [rows["train"][int(i)]["ids"].tolist() for i in chosen]
    run = {
        "kind": "lm",
        "model": type(model).__name__.removeprefix("FSDP"),  # FSDP2 renames GPT to FSDPGPT
        "command": sys.argv,
        "settings": settings(globals()),
        "data": f"{len(rows['train'])} rows with the hash {hashlib.md5(repr(ids).encode()).hexdigest()}",
        "rows": {split: len(rows[split]) for split in rows},
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, datasets)},
    }
    if old_run:
        check_fixed("data", old_run["data"], run["data"])
    else:
        for pattern in RUN_FILES.split():
            for path in filter(Path.is_file, Path(out_dir).glob(pattern)):
                path.unlink()
    write_file("run.json", run)
    with contextlib.suppress(shutil.SameFileError):  # if it runs from there
        shutil.copy(__file__, out_dir)
    tok.save_pretrained(out_dir)
    log(f"model: {run['parameters']:,} parameters, {run['trained_parameters']:,} of them trained")
    return run


def from_main(value):
    """Return the value that the main process has, in all processes."""
    return broadcast_object_list([value])[0]


def unwrap(model):
    """Return the model inside DistributedDataParallel."""
    return getattr(model, "module", model)


def gather(model, optimizers=(), with_frozen=False):
    """Gather ({name: weight}, state of the optimizers) from all processes; frozen weights are optional."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    options.ignore_frozen_params = not with_frozen
    weights, state = dcp.get_state_dict(model, optimizers, options=options)
    # Leave out what is frozen, and the second names of tied weights.
    kept = {name for name, p in unwrap(model).named_parameters() if with_frozen or p.requires_grad}
    all_names = {name for name, _ in unwrap(model).named_parameters(remove_duplicate=False)}
    if adapter:  # the buffers of the frozen model stay as they are
        all_names |= {name for name, _ in unwrap(model).named_buffers()}
    left_out = all_names - kept
    return {name: weight for name, weight in weights.items() if name not in left_out}, state


def save_checkpoint(model, optimizers, progress, name):
    """Write a checkpoint. optimizers=[] leaves out what only a resume needs."""
    weights, state = gather(model, optimizers)
    if MAIN:
        write_file(name, {"model": weights, "optimizers": state, "progress": progress})


def load_checkpoint(model, optimizers, name):
    """Let the main process read a checkpoint, put it into the model of every process, return the progress."""
    state = {"model": {}, "optimizers": {}, "progress": {}}
    weights, _ = gather(model)  # every process must call this, though only the main one compares shapes
    if MAIN:
        with named("checkpoint", f"{out_dir}/{name}"):
            state = torch.load(Path(out_dir, name), map_location="cpu", weights_only=True)
        saved_shapes = {key: p.shape for key, p in state["model"].items()}
        if saved_shapes != {key: p.shape for key, p in weights.items()}:
            fail(f"{out_dir}/{name} does not fit this model: undo the edit, or choose another --out_dir")
    # Not strict, because the checkpoint has no frozen weights.
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
    options.broadcast_from_rank0 = WORLD > 1
    dcp.set_model_state_dict(model, state["model"], options=options)
    if optimizers:
        dcp.set_optimizer_state_dict(model, optimizers, state["optimizers"], options=options)
    return from_main(state["progress"])


def save_weights(model, weights):
    """Write the weights as transformers or peft does, first to a folder: no file is ever half written."""
    folder = Path(out_dir, "weights.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    if isinstance(model, GPT):
        config = model.config.to_dict()
        if not is_native(model):  # transformers must not load this: it would compute something else
            config |= {"model_type": "edited", "architectures": ["GPT"]}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        weights = {name.removeprefix("lm."): weight for name, weight in weights.items()}
        model.lm.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    model.generation_config.to_json_file(folder / "generation_config.json")
    for path in folder.iterdir():
        path.replace(Path(out_dir, path.name))
    folder.rmdir()


@functools.cache
def is_native(gpt):
    """Tell whether transformers computes the same, by random weights: with initial zeros any models agree."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        ours = GPT(gpt.config).eval()
        theirs = transformers.NanoChatForCausalLM(gpt.config).eval()
        for p in ours.parameters():
            nn.init.normal_(p, std=p.size(-1) ** -0.5)
        idx = torch.randint(gpt.config.vocab_size, (1, min(1024, gpt.context)))
        with contextlib.suppress(RuntimeError):  # weights of other names or shapes
            theirs.load_state_dict(dict(ours.named_parameters()))
            if torch.allclose(ours(idx), theirs(idx).logits, atol=1e-3):
                return True
    log("edited model: sample.py and init_from can load this run, transformers cannot")
    return False


# ---- Evaluation ----


@torch.no_grad()
def evaluate(accelerator, model, tok, name, rows, micro_size, n_batches=0):
    """Return the loss per token of a split, and the bits per byte, which can be compared across tokenizers.

    n_batches: how many batches of batch_size rows to take, spread evenly over the split; 0: all rows.
    """
    n_rows = len(rows)
    if n_batches > 0:
        n_rows = min(n_rows, n_batches * batch_size)
    chosen = np.linspace(0, len(rows) - 1, n_rows).astype(int)
    mine = chosen[RANK::WORLD].tolist()
    totals = np.zeros(3)  # loss, tokens, bytes
    model.eval()
    for i in range(0, math.ceil(n_rows / WORLD), micro_size):
        batch = mine[i : i + micro_size]
        x, y, learned = collate([rows[j] for j in batch or [0]])
        if not batch:
            # No rows are left for this process, but FSDP2 needs it in every forward pass.
            y = torch.full_like(y, -100)
        with accelerator.autocast():
            loss = model(*send_to_device((x, y, learned), accelerator.device))
        texts = tok.batch_decode([targets[targets != -100] for targets in y], skip_special_tokens=True)
        n_bytes = len("".join(texts).encode("utf-8", "replace"))
        totals += [loss.item(), (y != -100).sum().item(), n_bytes]
    model.train()
    loss, n_tokens, n_bytes = np.sum(gather_object([totals]), axis=0).tolist()
    bits = loss / math.log(2)
    return {f"{name}/loss": loss / n_tokens, f"{name}/bits_per_byte": bits / max(1, n_bytes)}


def evaluate_and_keep_best(accelerator, model, tok, splits, micro_size, progress, report):
    """Report the validation loss, keep the best weights (without validation, the last) and write a sample."""
    loss = -math.inf  # without a validation split, the last weights count as the best
    if "validation" in splits:
        values = evaluate(accelerator, model, tok, "val", splits["validation"], micro_size, eval_batches)
        report(values)
        loss = values["val/loss"]
    if progress["step"] > 0:
        progress["evals_since_best"] += 1
        if loss <= progress["best"]:
            progress["best"] = loss
            progress["evals_since_best"] = 0
            weights, _ = gather(model, with_frozen=not adapter)  # of an adapter, only its own weights
            if MAIN:
                save_weights(unwrap(model), weights)
            if "test" in splits:  # the test at the end loads the best weights
                save_checkpoint(model, [], progress, "best.pt")
        write_sample(model, tok, splits.get("validation", splits["train"])[0], progress["step"])


def write_sample(model, tok, row, step):
    """Write how the model continues the first 16 tokens of a row or, in a chat, what precedes its answer."""
    n = 16
    if "labels" in row:
        n = (row["labels"] != -100).nonzero()[0].item()
    prompt = row["ids"][:n].tolist()
    model.eval()
    # Each new length would be compiled, for a minute.
    with torch.compiler.set_stance("force_eager"):
        continued = generate(unwrap(model), prompt, 1, 200, count_ids(tok), temperature=0.8, seed=seed)
        tokens = [token.item() for token in continued]
    model.train()
    if MAIN:
        Path(out_dir, "samples").mkdir(exist_ok=True)
        text = tok.decode(prompt + tokens)
        Path(out_dir, f"samples/step_{step:08d}.txt").write_text(text, encoding="utf-8", errors="replace")


# In bf16 without sparsity, by NVIDIA's data sheets. Other GPUs get no mfu.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def speed(tokens_per_s, model):
    """Return tokens/s, memory in GB, and mfu, the used part of the GPUs' peak FLOPS (arXiv:2204.02311)."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
    values = {"tokens_per_s": tokens_per_s, "memory_gb": memory / 1e9}
    for name, peak in PEAK_FLOPS.items():
        if name in gpu and isinstance(model, GPT):
            n_params = sum(p.numel() for p in model.parameters())
            n_multiplied = n_params - model.model.embed_tokens.weight.numel()  # embeddings are looked up
            attention_flops = 12 * len(model.model.layers) * model.config.hidden_size * block_size
            flops_per_token = 6 * n_multiplied + attention_flops  # forward and backward
            values["mfu"] = tokens_per_s * flops_per_token / (peak * WORLD)
    return values


# ---- Training ----


def start_accelerator():
    """Return an Accelerator for the best device there is, with precision, threads and processes set up."""
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    torch.autograd.set_detect_anomaly(detect_anomaly)
    torch.use_deterministic_algorithms(deterministic)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # every process builds the whole model first
    warnings.filterwarnings("ignore", "`?broadcast_buffers")  # accelerate passes it by a deprecated name
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=choose_precision(),
        log_with=tracker or None,
        project_dir=out_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=1)),  # the others wait while one process tokenizes
            # Our only buffers are tables that never change. A view saves a copy of all gradients.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if accelerator.num_processes != WORLD:
        fail(f"the {WORLD} processes are not connected: to train on CPUs, set ACCELERATE_USE_CPU=true")
    if accelerator.is_fsdp2:
        set_up_fsdp2(accelerator)
    if on_cpu:  # `accelerate launch` leaves each process one thread; take a share of the cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        if init_from == "scratch":  # pretrained models are large and need the memory
            keep_freed_memory()
        log("warning: no GPU was found; a CPU is fast enough for small models only")
    log(f"device: {accelerator.device.type} x {WORLD}, precision: {accelerator.mixed_precision}")
    return accelerator


def keep_freed_memory():
    """Let Linux keep the memory that a step frees for the next step: trains 1.15 times as fast on a CPU."""
    if sys.platform == "linux":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)


def choose_precision():
    """Return the precision of matrix products: bf16 where the hardware has it."""
    if mixed_precision != "auto":
        return mixed_precision
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        # Older GPUs (T4, V100) have fp16 only, which needs loss scaling, which our Muon lacks.
        return "no" if init_from == "scratch" else "fp16"
    cpu = torch.cpu.get_capabilities()
    has_bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return "bf16" if has_bf16 and not torch.accelerator.is_available() else "no"


def set_up_fsdp2(accelerator):
    """Configure FSDP2: weights in fp32, all-gather in bf16 (half the traffic), gradient reduction in fp32."""
    policy = {"cast_forward_inputs": False}  # the tables of cos and sin stay in fp32
    if accelerator.mixed_precision == "bf16":
        policy |= {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(**policy)
    accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    torch.set_autocast_cache_enabled(False)  # autocast would keep a bf16 copy of all weights


def prepare(accelerator, model, optimizers):
    """Wrap the model and its optimizers for several processes or precisions. Return (model, optimizers)."""
    model, *optimizers = accelerator.prepare(model, *optimizers)
    if accelerator.is_fsdp2:
        # Else weights that were gathered before a checkpoint was loaded would be used after it.
        model.set_reshard_after_forward(True)
    return model, optimizers


def finish(accelerator, step, is_stopped):
    """End this process when all processes have come here."""
    code = 0
    if is_stopped:
        log(f"stopped at step {step}; the same command with --resume=True goes on")
        signum = STOP[0] if STOP else signal.SIGTERM  # another process may have got the signal
        code = 128 + signum  # as shells report it
    else:
        log("done")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if WORLD > 1:  # skip Python's cleanup, during which gloo's threads may crash
        os._exit(code)
    sys.exit(code)


def is_due(step, interval):
    """Tell whether something that is done every `interval` steps is due; with 0 it never is."""
    return interval > 0 and step % interval == 0


def main():
    # ---- set up: device, batch, run directory ----
    check_settings()
    accelerator = start_accelerator()
    device = accelerator.device
    micro_size = micro_batch_size or max(1, batch_size // WORLD)  # rows per process and forward pass
    accumulation_steps = batch_size // (micro_size * WORLD)  # forward passes per optimizer step
    if accumulation_steps * micro_size * WORLD != batch_size:
        fail(f"{batch_size=} must be a multiple of {micro_size} rows x {WORLD} processes")
    old_run = open_run_dir()

    # ---- model and data; a pretrained model first: a wrong name fails before the data is tokenized ----
    model = load_pretrained(accelerator.mixed_precision) if init_from != "scratch" else None
    with accelerator.local_main_process_first():  # the other processes read what it has cached
        tok, splits = prepare_data()
    if model is None:
        model = make_gpt(tok)
    check_ids(model, splits)
    set_generation_config(model, tok, splits["train"])
    optimizers = make_optimizers(model, accelerator)
    peak_lrs = [group["lr"] for o in optimizers for group in o.param_groups]
    if compile and device.type == "cuda":
        model.compile()
    model, wrapped_optimizers = prepare(accelerator, model, optimizers)

    # ---- start the run, or resume it ----
    progress = {"step": 0, "best": math.inf, "evals_since_best": 0, "seconds": 0.0, "metrics_bytes": 0}
    if MAIN:
        run = start_run(unwrap(model), tok, splits, old_run)
    is_resumed = from_main(old_run is not None)
    if is_resumed:
        progress = load_checkpoint(model, optimizers, "checkpoint.pt")
        log(f"resumed from {out_dir}/checkpoint.pt at step {progress['step']}")
    step = progress["step"]
    groups = [group for o in optimizers for group in o.param_groups]  # new lists after loading a checkpoint
    steps_per_epoch = max(1, len(splits["train"]) // batch_size)
    total_steps = math.ceil(epochs * steps_per_epoch) if epochs else max_steps

    # ---- logging ----
    start = time.monotonic() - progress["seconds"]
    if MAIN:
        metrics = open(Path(out_dir, "metrics.jsonl"), "ab", buffering=0)  # noqa: SIM115
        metrics.truncate(progress["metrics_bytes"])  # the steps after the checkpoint will be done again
        metrics.seek(0, os.SEEK_END)
    with named("tracker", tracker):  # to use wandb without a login, set WANDB_MODE=offline
        accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "train_lm"), settings(globals()))

    def report(values):
        if MAIN:
            row = {"step": step, "time": round(time.monotonic() - start, 3), **values}
            metrics.write(json.dumps(row).encode() + b"\n")
        accelerator.log(values, step=step)
        numbers = " ".join(f"{name} {value:.5g}" for name, value in values.items())
        log(f"step {step}/{total_steps} {numbers}")

    # ---- the loop ----
    catch_signals()
    lengths = pyarrow.compute.list_value_length(splits["train"].data["ids"]).to_numpy()
    loader = DataLoader(
        splits["train"],
        batch_sampler=batch_rows(lengths, step, total_steps, micro_size, WORLD, RANK),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    micro_batches = list(itertools.islice(batches, accumulation_steps))  # always loaded one step ahead
    first_step = step
    profiler = torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(out_dir))
    timer = time.monotonic()
    tokens_since = 0  # tokens trained on since the timer was set
    n_skipped = 0  # steps in a row
    stop = False
    while True:
        # Each pass does what is due after `step` steps, and then one more step.
        done = step >= total_steps

        # Save before evaluating, so that a run resumed from here evaluates again.
        if step > 0 and (stop or done or is_due(step, save_interval)):
            progress["seconds"] = time.monotonic() - start
            progress["metrics_bytes"] = metrics.tell() if MAIN else 0
            save_checkpoint(model, optimizers, progress, "checkpoint.pt")
        if not stop and (done or is_due(step, eval_interval)):
            evaluate_and_keep_best(accelerator, model, tok, splits, micro_size, progress, report)
            timer = time.monotonic()  # speed is measured between evaluations
            tokens_since = 0
        is_out_of_patience = patience > 0 and progress["evals_since_best"] >= patience
        if stop or done or is_out_of_patience:
            break

        for group, peak_lr in zip(groups, peak_lrs):
            group["lr"] = peak_lr * lr_at(step, total_steps)
            if "momentum" in group:  # Muon: warm up the momentum from 0.85 to 0.95, as nanochat does
                group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)

        # The loss is the mean over the target tokens of the batch in all processes, so count them first.
        n_tokens = sum((y != -100).sum() for _, y, _ in micro_batches).float()  # still on the CPU
        n_tokens = accelerator.reduce(n_tokens.to(device, non_blocking=True), "sum")
        loss = torch.zeros((), device=device)
        torch.manual_seed(hash((seed, step, RANK)))  # a resumed run draws the same dropout
        for i, batch in enumerate(micro_batches):
            # DDP needs to all-reduce gradients only after the last micro-batch. FSDP2 reduces them every
            # time, because unsharded gradients would not fit.
            sync = i == accumulation_steps - 1 or accelerator.is_fsdp2
            accumulate = contextlib.nullcontext() if sync else accelerator.no_sync(model)
            with accumulate:
                with accelerator.autocast():
                    micro_loss = model(*send_to_device(batch, device, non_blocking=True)) / n_tokens
                accelerator.backward(micro_loss * WORLD)  # DDP takes the mean over processes, we want the sum
            loss += micro_loss.detach()
        max_norm = grad_clip or math.inf  # with infinity, the norm is only measured
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        if accelerator.is_fsdp2:
            grad_norm = grad_norm.full_tensor()
        # Load the next batch while the GPU computes.
        micro_batches = list(itertools.islice(batches, accumulation_steps))

        # This is the only place in a step where the CPU waits for the GPU. Every process gets the same
        # numbers, so that all of them skip, stop or go on together.
        n_stop = torch.tensor(float(len(STOP))).to(device, non_blocking=True)
        sums = accelerator.reduce(torch.stack([loss, n_stop]), "sum")  # over the processes
        loss, n_stop, grad_norm, n_tokens = torch.stack([*sums, grad_norm, n_tokens]).tolist()
        stop = n_stop > 0
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        for o in wrapped_optimizers:
            if is_finite or accelerator.scaler:  # in fp16, the scaler skips the step and lowers its scale
                o.step()
            o.zero_grad()
        step += 1
        progress["step"] = step
        tokens_since += n_tokens
        if is_finite:
            n_skipped = 0
        else:
            n_skipped += 1
            log(f"step {step}: the loss or the gradient is not finite: skipped")
            if n_skipped == 10:
                sys.exit("ten such steps in a row: lower learning_rate, or look with --detect_anomaly=True")

        if is_due(step, log_interval) or step == total_steps:
            values = {"train/loss": loss, "grad_norm": grad_norm, "lr": groups[0]["lr"]}
            values |= speed(tokens_since / (time.monotonic() - timer), unwrap(model))
            values["epoch"] = step / steps_per_epoch
            report(values)
            timer = time.monotonic()
            tokens_since = 0
        if profile and step == first_step + 5:
            profiler.start()
        elif profile and step == first_step + 8:
            profiler.stop()

    # ---- the end: the test loss of the best weights, and a summary in run.json ----
    if not stop:
        summary = {"steps": step, "minutes": (time.monotonic() - start) / 60}
        has_best = math.isfinite(progress["best"])  # without a validation split, the last weights are tested
        if has_best:
            summary["val/loss"] = progress["best"]
        if "test" in splits:
            if has_best:
                load_checkpoint(model, [], "best.pt")
            values = evaluate(accelerator, model, tok, "test", splits["test"], micro_size)
            report(values)
            summary |= values
        if MAIN:
            write_file("run.json", run | {"summary": summary})
    finish(accelerator, step, stop)


# ---- Sampling ----


@torch.no_grad()
def generate(model, prompt, n, max_new_tokens, vocab_size, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """Continue a prompt, a list of ids, n times. At each step, yield the n next tokens, until all have ended.

    vocab_size: the number of ids that the tokenizer knows; the model may have more, as padding. temperature
    0: the most likely token. A text that outgrows the model's context goes on from its last half.
    """
    idx = torch.tensor([prompt] * n, device=next(model.parameters()).device)  # (n, T)
    rng = torch.Generator().manual_seed(seed)
    has_ended = torch.zeros(n, dtype=torch.bool)
    cache = {}
    for _ in range(max_new_tokens):
        if idx.size(1) > model.context:
            idx = idx[:, -max(1, model.context // 2) :]
            cache = {}
        new = idx[:, -1:] if cache else idx  # the cache has all but the last token
        logits = model(new, cache=cache)  # (n, 1 or T, V)
        logits = logits[:, -1, :vocab_size].float().cpu()
        if temperature < 1e-3:
            token = logits.argmax(dim=-1)
        else:
            logits = logits / temperature
            if top_k:
                logits = transformers.TopKLogitsWarper(top_k)(None, logits)
            if top_p < 1:
                logits = transformers.TopPLogitsWarper(top_p)(None, logits)
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=rng)[:, 0]
        yield token
        has_ended |= torch.isin(token, torch.tensor(end_tokens(model)))
        if has_ended.all():
            return
        idx = torch.cat((idx, token[:, None].to(idx.device)), dim=1)


def end_tokens(model):
    """Return the ids that end a text."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def set_generation_config(model, tok, rows):
    """Set which tokens end a text and which ids are padding, for generate() and for transformers."""
    ends = {tok.eos_token_id, *end_tokens(model)}
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    has_answers = "labels" in rows.column_names
    if has_answers and tok.chat_template:
        # A chat template may end answers with a token of its own. Look what it writes behind one.
        with contextlib.suppress(Exception):  # a template may demand more than these two messages
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            _, _, tail = tok.apply_chat_template(messages, tokenize=False).rpartition("!")
            found = [i for i in tok(tail, add_special_tokens=False)["input_ids"] if i in special]
            ends.update(found[:1])
    untrained = special.intersection(rows[0]["ids"].tolist())
    if has_answers and adapter and untrained:
        names = " ".join(tok.convert_ids_to_tokens(sorted(untrained)))
        log(f"note: the adapter leaves the embeddings of these special tokens as they are: {names}")
    model.generation_config.eos_token_id = sorted(ends)
    if isinstance(model, GPT) and count_ids(tok) < model.config.vocab_size:
        model.generation_config.suppress_tokens = list(range(count_ids(tok), model.config.vocab_size))


def load(folder, run, base=""):
    """Return (model, tokenizer) of a run, or of any causal language model of transformers.

    run: the content of its run.json. base: where the model under an adapter is now, if it has moved.
    """
    globals().update(run["settings"])  # the functions below read the settings of the run as globals
    model = load_model(str(folder), base=base, setting="out_dir").eval()
    with named("out_dir", str(folder)):
        return model, transformers.AutoTokenizer.from_pretrained(folder)


# ---- Answers: only with data that has prompts or chats ----

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
# The names in ShareGPT's files.
ROLES |= {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
# For a tokenizer without a chat template: lines of "role: content", with an <eos> behind each answer.
PLAIN_CHAT_TEMPLATE = """\
{%- if tools %}{{ 'tools: ' + (tools | tojson) + '\\n' }}{% endif %}
{%- for m in messages %}
    {{- m['role'] + ': ' + m['content'] }}
    {%- if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def read_messages(row, column):
    """Return the messages in a row of a table as chat templates expect them, with a role and a content."""
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": as_text(row["system"], "system")})
    for fields in row.get(column) or []:
        if not isinstance(fields, dict):
            fail(f"{dataset=}: column {column!r} must hold lists of messages, not {row[column]!r:.60}")
        message = {name: value for name, value in fields.items() if value is not None}
        role = message.pop("from", None) or message.get("role")  # ShareGPT has from and value
        content = message.pop("value", None) or message.get("content")
        if role not in ROLES:
            fail(f"{dataset=}: the role {role!r} in column {column!r} is not one of {', '.join(ROLES)}")
        messages.append({**message, "role": ROLES[role], "content": as_text(content, column)})
    return messages


def answers_of(document, tok):
    """Yield (text, spans) for a document; spans are the (start, end) of its answers, in characters.

    A chat template may write earlier turns in another way than the last one (Qwen3 leaves out their
    thoughts). In that case, each such answer gets its own text, which ends with it.
    """
    if "prompt" in document:
        text = document["prompt"] + document["completion"]
        yield text, [(len(document["prompt"]), len(text))]
        return
    messages = json.loads(document["messages"])
    text = ""
    spans = []
    for i, message in enumerate(messages):
        # An answer to nothing is not learned.
        if message["role"] == "assistant" and i > 0:
            with named("dataset", dataset):
                tools = json.loads(document["tools"])
                render = functools.partial(tok.apply_chat_template, tools=tools, tokenize=False)
                prompt = render(messages[:i], add_generation_prompt=True)
                answered = render(messages[: i + 1])
            # Where the template has rewritten earlier turns, finish the text and begin a new one.
            if not prompt.startswith(text):
                yield text, spans
                spans = []
            # DeepSeek-R1's prompt ends with "<think>", which the message lacks: look where the two part.
            start = len(os.path.commonprefix([prompt, answered]))
            spans.append((start, len(answered)))
            text = answered
    yield text, spans


def encode_answers(documents, tok):
    """Yield rows of ids and labels: the ids of what is learned, and -100 elsewhere.

    Rows of more than block_size + 1 ids are cut; those with nothing to learn are dropped. The last row has no
    ids, but a note for the log.
    """
    is_chat = "messages" in documents.column_names
    begin = [] if is_chat else begin_of_text(tok)  # a chat template writes <bos> itself
    ends = [tok.eos_token]
    if is_chat:
        ends += [token.content for token in tok.added_tokens_decoder.values() if token.special]
    n_dropped = 0
    n_cut = 0
    for document in documents:
        n_rows = 0
        for text, spans in answers_of(document, tok):
            encoding = tok(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = begin + encoding["input_ids"]
            labels = [-100] * len(begin)
            for token, (_, end) in zip(encoding["input_ids"], encoding["offset_mapping"]):
                is_learned = any(first < end <= last for first, last in spans)  # it ends within an answer
                labels.append(token if is_learned else -100)
            if max(labels, default=-100) < 0:
                continue
            # Without an end behind the last answer, the model would never stop.
            if not text.rstrip().endswith(tuple(ends)):
                ids.append(tok.eos_token_id)
                labels.append(tok.eos_token_id)
            # The first token of a row is never a target, so put an <eos> before one that is learned.
            if labels[0] >= 0:
                ids.insert(0, tok.eos_token_id)
                labels.insert(0, -100)
            if len(ids) > block_size + 1:
                n_cut += 1
            ids = ids[: block_size + 1]
            labels = labels[: block_size + 1]
            if max(labels) >= 0:
                n_rows += 1
                yield {"ids": ids, "labels": labels}
        if n_rows == 0:
            n_dropped += 1
    note = f"{n_dropped} dropped (without an answer), {n_cut} cut at {block_size=}"
    yield {"note": note if n_dropped or n_cut else ""}


# ---- Fine-tuning: only with init_from ----


class Pretrained(nn.Module):
    """A causal language model of transformers or peft with the interface of GPT."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.config = lm.config.get_text_config()
        self.generation_config = lm.generation_config
        self._no_split_modules = lm._no_split_modules
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        adapter_config = getattr(lm, "active_peft_config", None)
        self.n_virtual = getattr(adapter_config, "num_virtual_tokens", 0)  # of p_tuning
        positions = getattr(self.config, "max_position_embeddings", None) or 2**31
        self.context = positions - self.n_virtual
        # True if logits(hidden_states(idx)) are the logits of the model; check_model() finds out.
        self.has_plain_head = False

    def forward(self, idx, targets=None, learned=None, cache=None):
        """Do as GPT.forward() does. The cache stays empty if the model has none."""
        T = idx.size(1)
        # No mask is needed: padding is on the right, where causal attention does not look.
        if cache is not None:
            lm = self.lm
            # Once the cache has the virtual tokens, peft must not add them again.
            if cache and self.n_virtual:
                lm = self.lm.base_model
            out = lm(input_ids=idx, use_cache=True, **cache)
            if out.get("past_key_values") is not None:
                cache["past_key_values"] = out.past_key_values
            return out.logits[:, -T:]
        if targets is None:
            return self.lm(input_ids=idx, use_cache=False).logits[:, -T:].float()  # without virtual tokens
        if not self.has_plain_head:
            return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten(), reduction="sum")

        hidden = self.hidden_states(idx).flatten(0, 1)  # (B * T, C)
        targets = targets.flatten()
        if learned is not None:
            hidden = hidden[learned]
            targets = targets[learned]
        trained = [p for p in self.lm.get_output_embeddings().parameters() if p.requires_grad]
        # The number of positions whose logits take 128 MB in fp32.
        size = max(1, 128 * 2**20 // (4 * self.config.vocab_size))
        return SumOfLosses.apply(hidden, targets, self.logits, size, *trained)

    def hidden_states(self, idx):
        """Return the hidden states in front of the output layer (B, T, C)."""
        # Ask for the logits of no position, which skips the output layer.
        no_logits = idx.new_empty(0)
        out = self.lm(input_ids=idx, use_cache=False, output_hidden_states=True, logits_to_keep=no_logits)
        return out.hidden_states[-1][:, -idx.size(1) :]

    def logits(self, hidden):
        """Return logits in fp32, with the soft cap of Gemma 2."""
        logits = self.lm.get_output_embeddings()(hidden).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


class SumOfLosses(torch.autograd.Function):
    """The sum of the losses of many positions, computed for some positions at a time.

    The gradient is computed along with it: the logits of all positions, kept for a backward pass, would take
    most of the memory where the vocabulary is large.
    """

    @staticmethod
    def forward(ctx, hidden, targets, logits_of, size, *weights):
        """Return the sum for hidden (n, C) and targets (n,), `size` positions at a time.

        logits_of: a function from hidden states to logits. weights: the trained parameters that it uses.
        """
        wants_grad = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden.device)
        hidden_grads = []
        weight_grads = [torch.zeros_like(weight) for weight in weights]
        for h, y in zip(hidden.split(size), targets.split(size)):
            h = h.detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                loss = F.cross_entropy(logits_of(h), y, reduction="sum")
            total += loss.detach()
            if wants_grad:
                h_grad, *grads = torch.autograd.grad(loss, (h, *weights))
                hidden_grads.append(h_grad)
                for weight_grad, grad in zip(weight_grads, grads):
                    weight_grad += grad
        if wants_grad:
            ctx.save_for_backward(torch.cat(hidden_grads), *weight_grads)
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, *weight_grads = (grad * saved for saved in ctx.saved_tensors)
        return hidden_grad, None, None, None, *weight_grads


@torch.no_grad()
def check_model(model):
    """Refuse a model in which a token sees later ones; find out whether Pretrained.logits() fits it."""
    model.eval()
    idx = torch.arange(8, device=model.lm.device)[None]
    logits = model(idx)  # (1, 8, V)
    tolerance = torch.finfo(model.lm.dtype).eps ** 0.5 * logits.abs().max()  # far above rounding errors
    if (model(idx[:, :4]) - logits[:, :4]).abs().max() > tolerance:
        fail(f"{init_from=} is not a causal language model: its tokens see later ones")
    # Some models have no output layer, or do not take the arguments of hidden_states().
    with contextlib.suppress(TypeError, AttributeError):
        difference = (model.logits(model.hidden_states(idx)) - logits).abs().max()
        model.has_plain_head = (difference < 0.01 * tolerance).item()
    model.train()


def load_model(name, dtype=torch.float32, base="", setting="init_from"):
    """Return the GPT of an earlier run, or else a Pretrained; an adapter comes with its base model.

    base: where the base model is now, if it has moved. setting: the setting that names the model.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    is_run = Path(name, "run.json").exists()
    if is_run and not adapter and read_json(setting, name, "run.json")["model"] == "GPT":
        with named(setting, name):
            config = transformers.NanoChatConfig.from_json_file(Path(name, "config.json"))
        gpt = GPT(config)
        with named(setting, name):
            gpt.generation_config = transformers.GenerationConfig.from_pretrained(name)
            safetensors.torch.load_model(gpt, Path(name, "model.safetensors"))
        return gpt
    if not Path(name, "adapter_config.json").exists():
        return Pretrained(load_causal_lm(name, dtype, setting))

    import peft

    with named(setting, name):
        config = peft.PeftConfig.from_pretrained(name)
    config.inference_mode = adapter != "lora"
    if base:
        config.base_model_name_or_path = base
    lm = load_causal_lm(config.base_model_name_or_path, dtype, setting)
    with named(setting, name):
        if Path(name, "generation_config.json").exists():  # of an earlier run
            lm.generation_config = transformers.GenerationConfig.from_pretrained(name)
        lm = peft.get_peft_model(lm, config)
        keys = lm.load_adapter(name, "default")
    if any("lora_" in key for key in keys.missing_keys + keys.unexpected_keys):
        fail(f"{setting}={name!r} is an adapter of another model than {lm.name_or_path}")
    return Pretrained(lm)


def load_causal_lm(name, dtype, setting):
    """Return a causal language model of transformers."""
    with named(setting, name):
        lm, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"]:
        fail(f"{setting}={name!r} has no weights for {min(info['missing_keys'])}")
    return lm


def load_pretrained(precision):
    """Return the model that init_from names, with the adapter that is asked for.

    Under an adapter, the frozen weights are in the precision of training. LoRA: Hu et al. 2021
    (arXiv:2106.09685). P-tuning, learned vectors in front of every text: Liu et al. 2021 (arXiv:2103.10385).
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    model = load_model(init_from, dtypes[precision] if adapter else torch.float32)
    is_adapter = isinstance(model, Pretrained) and hasattr(model.lm, "peft_config")
    if is_adapter and adapter != "lora":
        fail(f"{init_from=} is an adapter: add --adapter=lora, or merge it first by sample.py --merge=FOLDER")
    if adapter and not is_adapter:
        import peft

        if adapter == "lora":
            targets = find_targets(model.lm)
            config = peft.LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=targets)
        else:
            size = model.config.hidden_size
            config = peft.PromptEncoderConfig(num_virtual_tokens=virtual_tokens, encoder_hidden_size=size)
        config.task_type = "CAUSAL_LM"
        torch.manual_seed(seed)
        with named("adapter", adapter):
            model = Pretrained(peft.get_peft_model(model.lm, config))
    if isinstance(model, Pretrained):
        check_model(model)
    if block_size > model.context:
        fail(f"{block_size=} is beyond the positions of {init_from}: at most --block_size={model.context}")
    return model.train()


def find_targets(lm):
    """Return lora_targets as peft takes them. Each name must be that of a layer."""
    if lora_targets == "all-linear":
        return lora_targets
    targets = [name.strip() for name in lora_targets.split(",")]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in lm.named_modules()):
            fail(f"{lora_targets=}: {init_from} has no layer {target!r}; names do not mix with all-linear")
    return targets


def check_ids(model, splits):
    """End the program if the data has ids beyond the vocabulary of the model."""
    # From scratch, the model was made for the tokenizer, so there is no need to read all ids at each start.
    if init_from == "scratch":
        return
    for rows in splits.values():
        ids = pyarrow.compute.list_flatten(rows.data["ids"])
        largest = pyarrow.compute.max(ids).as_py()
        if largest >= model.config.vocab_size:
            fail(f"{dataset=} has the token {largest}, but {init_from} knows only {model.config.vocab_size}")


if __name__ == "__main__":
    configure(globals())
    main()
