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

# The process that launched this one. Note it before the slow imports, because it may die during them.
LAUNCHER_PID = os.getppid()

import bz2
import contextlib
import csv
import ctypes
import functools
import glob
import gzip
import hashlib
import importlib.metadata
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
from torch.utils.checkpoint import checkpoint as recompute  # computes activations again during backward
from torch.utils.data import DataLoader

# configure() applies config files and the command line to the settings below. settings() lists them. fail()
# ends the program with a message. `with named(setting, value):` does so if a library raises an error inside.
# sections() returns the text of sections of a script.
from configurator import configure, fail, named, sections, settings

# ---- Settings: change them here, in a config file, or by --name=value on the command line ----
# Settings are global variables in lowercase, which any function may read.

# the run
out_dir = "out/lm"  # the folder that everything is written to
resume = False  # continue from the checkpoint in out_dir, or start if there is no run
overwrite = False  # delete the run in out_dir and start a new one
seed = 1337  # random seed for the initial weights, the order of the data and dropout
# data
dataset = "python"  # Python's own code; or a file, folder, glob, URL, Hugging Face name[:config][@revision]
train_split = "train"  # name of the data's training split; some datasets call it train_sft
text_column = "text"  # column with the documents, if the data is a table; chats have a column "messages"
prompt_column = "prompt"  # column with prompts; with prompts or chats, only the answers count in the loss
completion_column = "completion"  # column with the answers to the prompts
tokenizer = ""  # "bytes", "char", "bpe:1024" (1,024 tokens), Hub name, folder; "": init_from's, else bpe:1024
val_fraction = 0.05  # part of the data for validation, unless it has a validation split; 0: none
test_fraction = 0.05  # part for the test at the end, unless the data has a test split; 0: none
fold = ""  # cross-validation: "2/5" validates on the second of five parts
num_workers = 0  # processes that load data; use 2 or more if a GPU waits for data
# model; with init_from, the model brings its own shape, and only block_size has an effect
init_from = "scratch"  # random weights; or a causal LM (like GPT) to fine-tune: Hub name, folder, earlier run
adapter = ""  # with init_from: "lora" or "p_tuning" trains only a few new weights; "": all weights
block_size = 256  # context length in tokens
dropout = 0.0  # fraction of activations set to 0 at random; try 0.1 if the same text is seen many times
n_layer = 3  # number of transformer blocks
n_head = 2  # number of attention heads
n_kv_head = 0  # heads for keys and values: 0 for n_head, or fewer for grouped-query attention
n_embd = 128  # width of the model; n_embd / n_head, the width of a head, must be even
# adapter
lora_rank = 16  # lora: size of the new weights; a higher rank can learn more and takes more memory
lora_alpha = 32.0  # lora: strength; what the new weights add is multiplied by lora_alpha / lora_rank
lora_targets = "all-linear"  # lora: layers that get new weights: all linear ones, or by name: q_proj,v_proj
virtual_tokens = 20  # p_tuning: number of learned vectors in front of every text
# batch and length
batch_size = 8  # rows of block_size tokens per optimizer step, over all processes
micro_batch_size = 0  # rows per forward pass; lower it to save memory; 0: batch_size / processes
max_steps = 2200  # number of optimizer steps; 0: only evaluate
epochs = 0.0  # if not 0, train for this many passes over the data, whatever max_steps is
# optimizer and learning rate
optimizer = "muon"  # "muon" (for the blocks' matrices; AdamW for the rest) or "adamw"; with init_from: adamw
learning_rate = 0.0  # peak learning rate; 0: a default for the optimizer (DEFAULT_LR in this script)
embed_lr = 0.3  # with muon: peak learning rate of the embeddings
head_lr = 0.004  # with muon: peak learning rate of the output layer, and of 1-D parameters if there are any
beta1 = 0.8  # AdamW's decay rate for the mean of the gradient
beta2 = 0.95  # AdamW's decay rate for the mean of the squared gradient
weight_decay = 0.03  # pulls the matrices in the blocks towards zero; with adamw, all matrices
qk_weight_decay = 0.2  # with muon: weight decay of the matrices of queries and keys
warmup_steps = 20  # steps in which the learning rate rises; with wsd and cosine, at most a tenth of the run
lr_schedule = "wsd"  # "wsd" (warm-up, stable, decay), "cosine" or "constant"
cooldown = 0.9  # wsd: the learning rate falls during this last fraction of the steps
min_lr = 0.02  # learning rate at the end, as a fraction of the peak
grad_clip = 1.0  # larger gradients are scaled down to this norm; 0: never
# evaluation, saving, reports
eval_interval = 250  # steps between evaluations; 0: only at the end
eval_batches = 20  # batches per evaluation, spread evenly over the validation split; 0: the whole split
log_interval = 10  # steps between reports; 0: only at the end
save_interval = 250  # steps between checkpoints; 0: only at the end
patience = 0  # stop early after this many evaluations without a better loss; 0: never
tracker = ""  # "wandb" or "tensorboard": log there, too; metrics.jsonl is always written
# the machine
mixed_precision = "auto"  # the best that the hardware has; or "bf16", "fp16", "no" (fp32)
compile = True  # torch.compile on CUDA (elsewhere ignored): a minute at the start, then much faster
gradient_checkpointing = False  # saves memory by computing activations twice; slower
deterministic = False  # bitwise repeatable runs, on a GPU too; slower
detect_anomaly = False  # stops at the first NaN in a gradient and shows where it came from; very slow
profile = False  # writes a trace of steps 6 to 8, when compilation is over, for chrome://tracing

DEFAULT_LR = {"muon": 0.03, "adamw": 0.001, "fine-tuning": 5e-5, "lora": 2e-4, "p_tuning": 0.001}
# In these settings, configure() replaces a ~ at the beginning by the home folder.
PATHS = ("out_dir", "dataset", "init_from", "tokenizer")
# Settings that a resumed run may not change. If you add a setting that shapes the model, add its name.
FIXED = """
    seed batch_size block_size tokenizer fold init_from adapter lora_rank lora_alpha lora_targets
    virtual_tokens n_layer n_head n_kv_head n_embd optimizer beta1 beta2 weight_decay
    qk_weight_decay eval_batches
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

MUST_BE_POSITIVE = "batch_size block_size n_layer n_head n_embd lora_rank lora_alpha virtual_tokens".split()
MUST_BE_BELOW_ONE = "dropout beta1 beta2 val_fraction test_fraction".split()
MUST_BE_AT_MOST_ONE = "cooldown min_lr".split()
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
            choices = ", ".join(map(repr, CHOICES[name]))
            fail(f"{name}={value!r} must be one of {choices}")
        if isinstance(value, str):
            continue  # the rest is about numbers
        if value < 0:
            fail(f"{name}={value} must not be negative")
        if value == 0 and name in MUST_BE_POSITIVE:
            fail(f"{name}={value} must be greater than 0")
        if value >= 1 and name in MUST_BE_BELOW_ONE:
            fail(f"{name}={value} must be below 1")
        if value > 1 and name in MUST_BE_AT_MOST_ONE:
            fail(f"{name}={value} must be at most 1")
    if seed >= 2**63:  # torch keeps seeds as 64-bit integers with a sign
        fail(f"{seed=} must be below 2**63")
    # Rotary embeddings rotate pairs of dimensions, so the width of a head must be even.
    if n_embd % (2 * n_head) != 0:
        fail(f"{n_embd=} must be a multiple of 2 x n_head = {2 * n_head}")
    if n_kv_head > 0 and n_head % n_kv_head != 0:
        fail(f"{n_head=} must be a multiple of {n_kv_head=}")
    if fold:
        k, _, n = fold.partition("/")
        is_valid = k.isdecimal() and n.isdecimal() and int(n) > 1 and 1 <= int(k) <= int(n)
        if not is_valid:
            fail(f"{fold=} must look like 2/5 (the second of five parts)")
    if adapter and init_from == "scratch":
        fail(f"{adapter=} needs a pretrained model, such as --init_from=gpt2")
    if init_from != "scratch" and re.fullmatch(r"bytes|char|bpe:\d{1,7}", tokenizer):
        fail(f"{tokenizer=} cannot be used: {init_from} has its own tokenizer")
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
        fail("dataset has no value: name a file, a folder, a URL or a dataset of the Hugging Face Hub")


# ---- Model: a decoder-only transformer with rotary positions, QK-norm and squared ReLU ----
# It has no biases and no learned norms. This is the architecture that transformers calls "nanochat", so that
# from_pretrained() can load what is saved here. In the comments on shapes, B is the number of rows, T that of
# tokens, C the width of the model, D that of a head, and V the size of the vocabulary.


def norm(x):
    """Return x divided by the root mean square of its last dimension (RMSNorm, arXiv:1910.07467)."""
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


def rotate(x, cos, sin):
    """Return x (..., T, D) with rotary position embeddings (Su et al. 2021, arXiv:2104.09864)."""
    x1, x2 = x.chunk(2, dim=-1)
    # Rotate by minus the angle, as nanochat does. Attention depends on differences of angles only.
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def attention(q, k, v, dropout_p):
    """Return causal attention: softmax(q k^T / sqrt(D)) v, in which no token sees a later one.

    q and the result: (B, n_head, T, D). k, v: (B, n_kv_head, S, D), where S is T plus the cached tokens.
    """
    T = q.size(2)
    # On a CPU, torch's kernel is slower for up to 512 tokens. This makes the default run 1.2 times as fast.
    if q.is_cpu and 1 < T <= 512:
        return cpu_attention(q, k, v, dropout_p)
    # Several tokens are a text from its beginning. A single one is the last, and may see all in the cache.
    is_causal = T > 1
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=True)


def cpu_attention(q, k, v, dropout_p):
    """Compute attention() step by step, for several tokens and without a cache."""
    B, n_head, T, D = q.shape
    # Heads that share keys and values form a group. Stack the queries of a group into one matrix.
    n_kv_head = k.size(1)
    group_size = n_head // n_kv_head
    grouped_q = q.reshape(B, n_kv_head, group_size * T, D)
    scores = (grouped_q / math.sqrt(D)) @ k.mT  # (B, n_kv_head, group_size * T, T)
    mask = torch.full((T, T), -1e9, dtype=q.dtype).triu(1)  # hides later tokens: exp(-1e9) is 0
    scores = scores + mask.repeat(group_size, 1)
    weights = scores.softmax(dim=-1, dtype=v.dtype)  # without dtype, autocast would return fp32
    y = F.dropout(weights, dropout_p) @ v
    return y.view(B, n_head, T, D)


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

    def forward(self, x, cos, sin, past=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        q = norm(rotate(q, cos, sin))  # QK-norm keeps the attention logits in bounds
        k = norm(rotate(k, cos, sin))
        if past is not None:  # a DynamicCache
            k, v = past.update(k, v, self.layer)  # keys and values of all tokens so far
        dropout_p = dropout if self.training else 0.0  # dropout is a setting
        y = attention(q, k, v, dropout_p)  # (B, n_head, T, D)
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
    """A transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, past=None):
        x = x + F.dropout(self.self_attn(norm(x), cos, sin, past), dropout, self.training)
        x = x + F.dropout(self.mlp(norm(x)), dropout, self.training)
        return x


class GPT(nn.Module):
    """The whole model, with the config and the parameter names of transformers' NanoChatForCausalLM."""

    _no_split_modules = ("Block",)  # for accelerate: FSDP2 shards and gathers the weights block by block

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.context = config.max_position_embeddings
        # The names of transformers: model.embed_tokens, model.layers and lm_head.
        embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model = nn.ModuleDict({"embed_tokens": embed_tokens, "layers": layers})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        D = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, D, 2) / D  # (D / 2,)
        frequencies = 1 / 10000**exponents
        angles = torch.outer(torch.arange(self.context), frequencies)  # (context, D / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Set the initial weights. Parameters that are not listed here keep the initialization of torch."""
        std = self.config.hidden_size**-0.5  # so that the output of a linear layer has the scale of its input
        for block in self.model.layers:
            # QK-norm removes the scale of queries and keys. But each step turns a small matrix by a larger
            # angle, and with that, the default run learns sooner to copy from its context.
            nn.init.normal_(block.self_attn.q_proj.weight, std=0.01 * std)
            nn.init.normal_(block.self_attn.k_proj.weight, std=0.01 * std)
            nn.init.normal_(block.self_attn.v_proj.weight, std=std)
            nn.init.zeros_(block.self_attn.o_proj.weight)  # so each block starts as the identity
            nn.init.normal_(block.mlp.fc1.weight, std=std)
            nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(self.lm_head.weight)  # so the loss starts at ln(vocab_size)
        # The embeddings start large. But if you tie them to the output layer (self.lm_head.weight =
        # self.model.embed_tokens.weight), they must start small, or the first logits would be huge.
        is_tied = self.lm_head.weight is self.model.embed_tokens.weight
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02 if is_tied else 1.0)

    def forward(self, idx, targets=None, loss_positions=None, cache=None):
        """Return the logits for the next tokens or, if targets are given, the sum of their losses.

        idx: token ids (B, T).
        targets: the token after each of them (B, T), or -100 where there is no loss.
        loss_positions: the indices in targets.flatten() that have a loss; None: take all.
        cache: a dictionary that keeps keys and values from call to call. It is empty at the first call; later
        ones pass only the new tokens as idx.
        The logits are (B, T, V) in fp32; with a cache (B, 1, V), those of the last token.
        """
        start = 0  # position of the first token
        past = None
        if cache is not None:
            past = cache.setdefault("past_key_values", transformers.DynamicCache())
            start = past.get_seq_length()

        x = self.model.embed_tokens(idx)  # (B, T, C)
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            # Keep the residual stream in half precision, too, which takes half the memory.
            x = x.to(torch.get_autocast_dtype(device_type))
        x = norm(x)  # nanochat also norms the embeddings
        x = F.dropout(x, dropout, self.training)
        cos = self.cos[start : start + idx.size(1)].to(x.dtype)  # (T, D / 2)
        sin = self.sin[start : start + idx.size(1)].to(x.dtype)
        for block in self.model.layers:
            if gradient_checkpointing and self.training:
                x = recompute(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, past)
        x = norm(x)

        if targets is None:
            if cache is not None:
                x = x[:, -1:]  # the next token depends on the last one's logits alone
            return self.logits(x)
        x = x.flatten(0, 1)  # (B * T, C)
        targets = targets.flatten()
        if loss_positions is not None:
            # Apply the output layer, which is the largest matrix, only where there is a loss.
            x = x[loss_positions]
            targets = targets[loss_positions]
        return F.cross_entropy(self.logits(x), targets, reduction="sum")

    def logits(self, x):
        """Return logits in fp32, softly capped at +-15 so that none runs away (Gemma 2, arXiv:2408.00118)."""
        logits = self.lm_head(x).float()
        return 15.0 * torch.tanh(logits / 15.0)


def count_ids(tok):
    """Return the largest id of a tokenizer plus one. Some ids may be unused, so len(tok) can be smaller."""
    return max(tok.get_vocab().values()) + 1


def make_gpt(tok):
    """Return a new GPT of the shape in the settings, for the vocabulary of a tokenizer."""
    vocab_size = count_ids(tok)
    # GPUs multiply matrices faster if their sizes are multiples of 64. The ids added here are never used. For
    # bytes or characters they would be a large part of the vocabulary, so none are added.
    if tokenizer not in ("bytes", "char"):
        vocab_size = 64 * math.ceil(vocab_size / 64)
    begin = tok.eos_token_id  # most tokenizers have one token that ends a text and begins the next
    if bos_prefix(tok):
        begin = tok.bos_token_id
    config = transformers.NanoChatConfig(
        vocab_size=vocab_size,
        max_position_embeddings=block_size,
        hidden_size=n_embd,
        intermediate_size=4 * n_embd,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        num_key_value_heads=n_kv_head or n_head,
        bos_token_id=begin,
        eos_token_id=tok.eos_token_id,
        pad_token_id=None,
        architectures=["NanoChatForCausalLM"],
    )
    torch.manual_seed(seed)  # the initial weights depend on the seed alone
    gpt = GPT(config)
    gpt.generation_config = transformers.GenerationConfig.from_model_config(config)
    return gpt


# ---- Data: files -> documents -> rows of block_size + 1 token ids -> splits ----

# The kinds of tables by the suffixes of their files. Any other suffix counts as text, if not in NOT_TEXT.
TABLE_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".jsonlines": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
NOT_TEXT = """
    7z arrow avi bin bmp doc docx epub exe gguf gif h5 ico jpeg jpg mp3 mp4 npy npz odt pdf pickle pkl png ppt
    pptx pt pth rar rtf safetensors so sqlite svg tar tgz tif tiff wav webp xls xlsx zip zst
""".split()
# Folders to leave out of Python's own source code: tests, long lookup tables, IDLE, installed packages.
NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "pydoc_data", "encodings"}
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
END = "<|endoftext|>"  # the end-of-text token of tokenizers that are learned here
# Number of characters that are read and tokenized at a time. Each needs about 100 bytes of memory.
PIECE_SIZE = 200_000


def kind_of(name):
    """Return the kind of a file by its suffix: one of TABLE_KINDS, "text", or None if it cannot be read."""
    path = Path(name.lower())
    if path.suffix in OPENERS:
        path = path.with_suffix("")
    if path.suffix[1:] in NOT_TEXT:
        return None
    return TABLE_KINDS.get(path.suffix, "text")


def split_of(path):
    """Return the split of a file: look for the name of a split in its folders, then in its own name.

    Some datasets of the Hub have further splits, in files such as test_sft-00000-of-00001.parquet.
    """
    folders = path.parts[:-1]
    file_name = path.name.split(".")[0]
    for name in (*folders, file_name):
        split_name = re.sub(SHARD_SUFFIX, "", name.lower())
        if split_name in SPLITS:
            return SPLITS[split_name]
        is_shard = re.search(r"-\d+-of-\d+", name)
        if is_shard and split_name.split("_")[0] in SPLITS:
            return split_name
    return "train"


def list_files(path, seen):
    """Yield the path itself if it is a file, or else all files below it that are not hidden.

    Links are followed. `seen` is the set of the real paths of folders so far: it makes sure that a folder
    with a link to itself is read once.
    """
    if path.is_file() or not path.exists():  # a link to nothing; the log will say that it is left out
        yield path
    elif path.is_dir():
        real_path = os.path.realpath(path)
        if real_path in seen:
            return
        seen.add(real_path)
        with named("dataset", dataset):
            children = sorted(path.iterdir())
        for child in children:
            is_skipped = dataset == "python" and child.name in NOT_LIBRARY
            if child.name[0] != "." and not is_skipped:
                yield from list_files(child, seen)


def open_text(path, newline=None):
    """Open a text file, which may be compressed.

    Bytes that are not UTF-8 raise no error here. They become placeholders (lone surrogates), which
    check_unicode() refuses.
    """
    opener = OPENERS.get(path.suffix.lower(), open)
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def is_text(path):
    """Return whether a file can be read and begins with UTF-8."""
    try:
        with open_text(path) as f:
            text = f.read(PIECE_SIZE)
            text.encode()  # raises for the lone surrogates of open_text()
    except Exception:  # whatever a damaged or unreadable file raises
        return False
    return "\0" not in text  # UTF-16 is full of these


def find_root():
    """Return the path that `dataset` names; for a glob pattern, the folder before the first wildcard."""
    if dataset == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    if os.path.exists(dataset):
        return Path(dataset)
    before_wildcard = re.split(r"[*?[]", dataset)[0]
    return Path(os.path.dirname(before_wildcard))


def list_dataset():
    """Return all files that `dataset` names, except those of this run."""
    own_folder = Path(out_dir).resolve()
    if dataset == "python" or os.path.exists(dataset):
        seen = {str(own_folder)}
        return list(list_files(find_root(), seen))
    # A glob pattern. The name of a dataset of the Hub also gets here; as a pattern it matches no files.
    names = sorted(glob.glob(dataset, recursive=True))
    paths = [Path(name) for name in names if os.path.isfile(name)]
    return [path for path in paths if not path.resolve().is_relative_to(own_folder)]


def find_files():
    """Return (kind, {split: paths}) of the files that `dataset` names, or ("hub", {}) if it names none."""
    if "://" in dataset:
        url = dataset.split("?")[0]  # without ?download=true
        kind = kind_of(url)
        if kind is None:
            fail(f"{dataset=} is not a supported file: name UTF-8 text, .jsonl, .csv or .parquet")
        with named("dataset", dataset):
            path = datasets.DownloadManager().download_and_extract(dataset)
        return kind, {"train": [Path(path)]}
    files = list_dataset()
    if not files and not os.path.isdir(dataset):
        log(f"there is no file or folder {dataset}: looking for it on the Hugging Face Hub")
        return "hub", {}
    if dataset == "python":
        files = [path for path in files if path.suffix == ".py"]

    # If there are tables, leave out the texts: a README.md often lies beside tables. If there are several
    # kinds of tables, take the kind of the largest file.
    kind = "text"
    present = [path for path in files if path.exists()]
    tables = [path for path in present if kind_of(path.name) in TABLE_KINDS.values()]
    if tables:
        largest = max(tables, key=os.path.getsize)
        kind = kind_of(largest.name)
    used = [path for path in present if kind_of(path.name) == kind]
    if kind == "text":
        used = [path for path in used if is_text(path)]
    if len(used) < len(files):
        left_out = sorted(set(files) - set(used))
        log(f"left out: {len(left_out)} files, such as {left_out[0]}: not {kind}, not UTF-8 or a broken link")
    if not used:
        fail(f"{dataset=} holds no file of a supported kind: UTF-8 text, .jsonl, .csv or .parquet")

    root = find_root()
    by_split = defaultdict(dict)  # {split: {real path: path}}, so that a file and links to it count once
    for path in used:
        split = split_of(path.relative_to(root))
        by_split[split].setdefault(os.path.realpath(path), path)
    paths = {split: list(by_real_path.values()) for split, by_real_path in by_split.items()}
    for split, files_of_split in paths.items():
        log(f"{split} files: {len(files_of_split)}, such as {files_of_split[0].name}")
    return kind, paths


def without_nulls(value):
    """Remove the None that Arrow adds to a field, because all dictionaries of a column get the same keys."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def parse_table(path, kind):
    """Yield the rows of a table, unchecked. All fields of a CSV are texts, even if they look like numbers."""
    if kind == "parquet":
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    elif kind in ("csv", "tsv"):
        csv.field_size_limit(2**31 - 1)  # characters; the default of 131,072 is too small
        delimiter = "," if kind == "csv" else "\t"
        with open_text(path, newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter, strict=True)
            header = rows.fieldnames or []  # it is None for an empty file
            names = [name for name in header if name]
            if len(names) > len(set(names)):
                fail(f"{dataset=}: {path} has several columns of the same name: rename them")
            yield from rows
    else:
        with open_text(path) as file:
            is_array = file.read(PIECE_SIZE).lstrip().startswith("[")
            file.seek(0)
            if is_array:
                yield from json.load(file)
                return
            for line in file:  # each line is a row
                if line.strip():
                    yield json.loads(line)


def read_table(path, kind):
    """Yield the rows of a table as dictionaries. If a row is damaged, end the program and say where."""
    where = f"{dataset=}: {path}, row"
    n = 1  # number of the next row
    try:
        for row in parse_table(path, kind):
            if not isinstance(row, dict):
                fail(f"{where} {n} must be a JSON object, not {row!r:.50}")
            if None in row:  # the name under which csv.DictReader puts the fields beyond those of the header
                fail(f"{where} {n} has more fields than the first line: quote fields that have commas")
            yield row
            n += 1
    except Exception as error:  # whatever parse_table() raises for a damaged file
        fail(f"{where} {n} cannot be read ({error}): correct it, or take the file out of the data")


def choose_columns(names):
    """Return {our name: name in the table} for the columns to train on. Log the names of the others."""
    chats = [name for name in ("messages", "conversations") if name in names]
    pair = {"prompt": prompt_column, "completion": completion_column}
    is_chosen = (prompt_column, completion_column) != ("prompt", "completion")
    has_pair = prompt_column in names and completion_column in names
    if text_column != "text":
        columns = {"text": text_column}
    elif is_chosen or (has_pair and not chats):
        columns = pair
    elif chats:
        # The columns "system" (a text) and "tools" (functions that the model may call) are optional.
        columns = {"messages": chats[0], "system": "system", "tools": "tools"}
    else:
        columns = {"text": text_column}
    optional = ("system", "tools")
    missing = [name for ours, name in columns.items() if ours not in optional and name not in names]
    if missing:
        fail(
            f"{dataset=} has the columns {', '.join(names)}, but not {', '.join(missing)}: choose one by"
            " --text_column=, or two by --prompt_column= and --completion_column=; a column with chats must"
            " be named messages"
        )
    used = [name for name in columns.values() if name in names]
    unused = [name for name in names if name not in used]
    message = f"columns: {', '.join(used)}"
    if unused:
        message += f"; not used: {', '.join(unused)}"
    log(message)
    return columns


def column_names(sources, kind):
    """Return the names of the columns of tables."""
    if kind == "hub":
        first = next(iter(sources.values()))
        return first.column_names
    names = []
    for path in itertools.chain.from_iterable(sources.values()):
        for row in itertools.islice(read_table(path, kind), 100):  # several, since rows may lack fields
            names += row
    names = list(dict.fromkeys(names))  # each name once
    if not names:
        fail(f"{dataset=} has no rows")
    return names


def load_from_hub():
    """Return {split: Dataset} of the Hub."""
    name, _, revision = dataset.partition("@")
    name, _, config = name.partition(":")
    with named("dataset", dataset):
        return dict(datasets.load_dataset(name, config or None, revision=revision or None))


def load_documents():
    """Return {split: documents}, in a random order that does not depend on the seed.

    A document is a dictionary with
        "path": the path of a text file, as bytes, because a file name need not be UTF-8,
        or "text",
        or "prompt" and "completion",
        or "messages" and "tools", both as JSON; a system message is the first of the messages.
    """
    kind, sources = find_files()  # {split: paths}
    if kind == "hub":
        sources = load_from_hub()
    if kind == "text":
        columns = {}
        features = {"path": datasets.Value("binary")}
    else:
        columns = choose_columns(column_names(sources, kind))
        features = dict.fromkeys(columns, datasets.Value("string"))

    documents = {}
    for split, source in sources.items():
        if next(read_documents(source, kind, columns), None) is None:
            fail(f"the {split} split of {dataset=} has no rows")
        key = [kind, columns, state_of(source)]
        # This calls read_documents(source, kind, columns), unless the rows are in the cache.
        rows = cached(key, features, read_documents, source, kind, columns)
        # Shuffle, because data for validation and test will be taken from the end.
        documents[split] = rows.shuffle(seed=0)
    return documents


def state_of(source):
    """Return a value that changes with the content of a source, for the key of cached()."""
    if isinstance(source, datasets.Dataset):
        return source._fingerprint
    # Every change of a file sets its ctime. The mtime can be older: unpacking an archive sets it back.
    return [(path, path.stat().st_size, path.stat().st_ctime_ns) for path in source]


def read_documents(source, kind, columns):
    """Yield the documents of a split. source: its paths, or its Dataset of the Hub."""
    if kind == "text":
        # Texts may be large, so store their paths only. read_pieces() reads the files.
        for path in source:
            yield {"path": os.fsencode(path)}
        return
    if kind == "hub":
        used = [name for name in columns.values() if name in source.column_names]
        rows = source.select_columns(used)
    else:
        rows = (row for path in source for row in read_table(path, kind))
    for row in rows:
        if kind in ("parquet", "hub"):
            row = {name: without_nulls(field) for name, field in row.items()}
        if "messages" in columns:
            messages = read_messages(row, columns["messages"])
            tools = row.get("tools")
            if isinstance(tools, str) and tools:
                with named("column", "tools"):  # it must be JSON
                    tools = json.loads(tools)
            tools = tools or None  # an empty list or text also means no tools
            # With str() for dates, which JSON does not have
            yield {"messages": json.dumps(messages, default=str), "tools": json.dumps(tools, default=str)}
        else:
            yield {name: as_text(row.get(column), column) for name, column in columns.items()}


def cached(key, features, generator, *args):
    """Return the rows of generator(*args) as a Dataset. It stays on disk until key or the code changes.

    The key must change with everything, except the code, that the rows depend on.
    """
    code = sections(__file__, "Data", "Answers")  # the text of the sections of this file that make rows
    state = repr([key, generator.__name__, code])
    fingerprint = hashlib.md5(state.encode()).hexdigest()
    # Use partial(), because from_generator() would divide the lists in its gen_kwargs into shards.
    make_rows = functools.partial(generator, *args)
    return datasets.Dataset.from_generator(make_rows, datasets.Features(features), fingerprint=fingerprint)


def as_text(value, column):
    """Return a field of a table as text, "" for None. OpenAI's [{"type": "text", "text": ...}] is joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return check_unicode(value, f"{value[:40]!r} in column {column!r}")
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) == len(value):  # there is nothing but text
            return "".join(texts)
    fail(f"{dataset=}: column {column!r} holds {value!r:.60}, which is not text: choose another column")


def check_unicode(text, where):
    """Return the text. End the program if it was not UTF-8, that is, if it has lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fail(f"{dataset=}: {where} is not UTF-8 ({error}): convert it, or take it out")
    return text


def read_piece(file, where):
    """Return the next characters of a file."""
    with named("dataset", where):  # a compressed file may be damaged
        return file.read(PIECE_SIZE)


def open_document(document):
    """Open a document for reading. Return (file, its name in messages)."""
    if "path" in document:
        path = os.fsdecode(document["path"])
        return open_text(Path(path)), path
    if "messages" not in document:
        text = "".join(document.values())  # {"text"}, or {"prompt", "completion"}
        return io.StringIO(text), "a document"
    # This text of a chat is only used to learn a tokenizer. It looks like what PLAIN_CHAT_TEMPLATE writes.
    text = ""
    for message in json.loads(document["messages"]):
        text += f"{message['role']}: {message['content']}\n"
        if "tool_calls" in message:
            text += json.dumps(message["tool_calls"])
    if json.loads(document["tools"]):
        text += document["tools"]
    return io.StringIO(text), "a chat"


def read_pieces(documents):
    """Yield (piece, is_last) for the texts of documents; is_last marks the last piece of each document.

    A piece ends before white space, so that tokens are not cut: a token such as " word" begins with a space.
    """
    for document in documents:
        file, where = open_document(document)
        with file:
            # Hold one piece back until more is read, to know which one is the last.
            piece = read_piece(file, where)
            while more := read_piece(file, where):
                cut = max(piece.rfind("\n"), piece.rfind(" "))  # the last white space
                if cut < 1:  # there is none
                    cut = len(piece)
                yield check_unicode(piece[:cut], where), False
                piece = piece[cut:] + more
            yield check_unicode(piece, where), True


def bos_prefix(tok):
    """Return [<bos>] if the tokenizer writes it in front of every text (Gemma, Llama), else []."""
    if not tok("")["input_ids"]:
        return []  # nothing is written in front. (A tokenizer of characters may not know the "a" below.)
    first = tok("a")["input_ids"][:1]
    return first if first == [tok.bos_token_id] else []


def encode_texts(documents, tok):
    """Yield rows of block_size + 1 ids: the documents one after another, with an <eos> behind each.

    Every token is a target once, because a row begins with the last token of the row before. (The very first
    token is no target.) With a tokenizer that writes <bos>, every row begins with <bos> instead.

    The last row holds no ids but a note for the log. It is stored with the rows, so that every later start,
    which reads them from the cache, logs it again.
    """
    begin = bos_prefix(tok)
    overlap = 0 if begin else 1  # tokens that a row repeats from the row before
    n_dropped = 0
    ids = []
    pieces = read_pieces(documents)
    while batch := list(itertools.islice(pieces, 16)):  # a fast tokenizer encodes several texts in parallel
        texts = [text for text, _ in batch]
        with named("dataset", dataset):  # a character that is not in the vocabulary may raise an error
            # With split_special_tokens, the characters "<eos>" in a document are plain text, not the token.
            encoded = tok(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for (text, is_last), tokens in zip(batch, encoded):
            ids += tokens
            if text == "":  # an empty document
                n_dropped += 1
            elif is_last:
                ids.append(tok.eos_token_id)
        start = 0
        n_ids = block_size + overlap  # what a full row takes from the documents
        while len(ids) - start >= n_ids:
            yield {"ids": begin + ids[start : start + n_ids]}
            start += block_size
        ids = ids[start:]
    if len(ids) > overlap:  # the last row is shorter
        yield {"ids": begin + ids}
    yield {"note": f"{n_dropped} documents without text dropped" if n_dropped else ""}


def first_texts(documents, n_characters):
    """Yield the texts of documents, until they have n_characters."""
    n_read = 0
    for text, _ in read_pieces(documents):
        # Learning takes very long if there are long runs without white space (DNA, Japanese): divide them.
        yield re.sub(r"\S{1000}", r"\g<0> ", text)
        n_read += len(text)
        if n_read >= n_characters:
            return


def learn_tokenizer(name, splits):
    """Yield one row with a tokenizer as JSON. (It is a generator because cached() stores rows.)

    "char" learns the characters of all splits, "bpe:N" learns from the first 100 million characters of train,
    and "bytes" learns nothing.
    """
    if name == "char":
        letters = set()
        for documents in splits.values():
            for text, _ in read_pieces(documents):
                letters.update(text)
        vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
        core = Tokenizer(models.WordLevel(vocabulary))
        any_character = Regex(r"[\s\S]")  # also the end of a line, which "." would leave out
        core.pre_tokenizer = pre_tokenizers.Split(any_character, "isolated")
        core.decoder = decoders.Fuse()  # joins characters without spaces between them
    else:
        n_given = 256 + 1  # the bytes and END, which need no text
        n_tokens = n_given if name == "bytes" else int(name.removeprefix("bpe:"))
        texts = []
        if n_tokens > n_given:
            texts = first_texts(splits["train"], 100_000_000)
        core = ByteLevelBPETokenizer()
        core.train_from_iterator(texts, n_tokens, min_frequency=0, special_tokens=[END], show_progress=False)
    yield {"json": core.to_str()}


def load_tokenizer(splits):
    """Load a tokenizer of transformers, or learn one from the documents (bytes, char, bpe:N)."""
    name = tokenizer or ("bpe:1024" if init_from == "scratch" else init_from)
    if re.fullmatch(r"bytes|char|bpe:\d{1,7}", name):
        key = [name, [state_of(documents) for documents in splits.values()]]
        features = {"json": datasets.Value("string")}
        rows = cached(key, features, learn_tokenizer, name, splits)
        core = Tokenizer.from_str(rows[0]["json"])
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token=END, eos_token=END, pad_token=END
        )
    with named("tokenizer", name):
        tok = transformers.AutoTokenizer.from_pretrained(name)
    # transformers makes an empty tokenizer where files are missing.
    if set(tok.get_vocab()) <= set(tok.all_special_tokens):
        fail(f"the tokenizer of {name} has no vocabulary, because files are missing: download it again")
    if tok.eos_token_id is None:
        fail(f"the tokenizer of {name} has no end-of-text token: set eos_token in its tokenizer_config.json")
    if not tok.is_fast:
        fail(
            f"the tokenizer of {name} has no fast version (tokenizer.json) and is not supported: take another"
        )
    return tok


def split_off_end(rows, fraction):
    """Return (the rows without the last part, the last part)."""
    n = math.ceil(fraction * len(rows))
    if n == len(rows):
        fail(
            f"{dataset=} is too short to set a part aside: --val_fraction=0 --test_fraction=0 uses all of it"
        )
    parts = rows.train_test_split(n, shuffle=False)
    return parts["train"], parts["test"]


def choose_splits(found):
    """Return the splits that are wanted among those that were found, under their usual names."""
    if train_split not in found:
        fail(f"{dataset=} has no split {train_split!r}: --train_split= takes one of {', '.join(found)}")
    wanted = {"validation": val_fraction > 0 and not fold, "test": test_fraction > 0}
    splits = {"train": found.pop(train_split)}
    for name, documents in found.items():
        split = SPLITS.get(name)  # None for an unknown name
        if wanted.get(split) and split not in splits:
            splits[split] = documents
        else:
            log(f"not used: the split {name}")
    return splits


def tokenize(documents, tok, split):
    """Return the rows of a split. With prompts or chats they have labels, since only answers have a loss."""
    encode = encode_texts
    features = {"ids": datasets.List(datasets.Value("int32")), "note": datasets.Value("string")}
    columns = documents.column_names
    if "prompt" in columns or "messages" in columns:
        encode = encode_answers
        features["labels"] = features["ids"]
    key = [state_of(documents), block_size]  # if you add a setting that changes the rows, add it here
    key += [tok.backend_tokenizer.to_str(), tok.special_tokens_map, tok.chat_template]
    rows = cached(key, features, encode, documents, tok)
    n_rows = len(rows) - 1  # without the last one, which holds the note
    note = rows[n_rows]["note"]
    if note:
        log(f"{split}: {note}")
    if n_rows == 0:
        fail(
            f"the {split} split of {dataset=} has nothing to learn from: no text, or no answer that begins"
            f" within {block_size=} tokens"
        )
    rows = rows.select(range(n_rows)).remove_columns("note")
    return rows.with_format("torch")


def prepare_data():
    """Return (tokenizer, {split: rows}). A missing split is taken from the end of the training rows."""
    datasets.disable_progress_bars()
    found = load_documents()
    splits = choose_splits(found)
    tok = load_tokenizer(splits)
    if "messages" in splits["train"].column_names and not tok.chat_template:
        bos = "{{ bos_token }}" if bos_prefix(tok) else ""
        tok.chat_template = bos + PLAIN_CHAT_TEMPLATE  # see the section on answers
    for split, documents in splits.items():
        splits[split] = tokenize(documents, tok, split)

    if test_fraction and "test" not in splits:
        splits["train"], splits["test"] = split_off_end(splits["train"], test_fraction)
    if fold:  # part k of n contiguous parts is for validation
        k, n = map(int, fold.split("/"))
        if n > len(splits["train"]):
            fail(f"{fold=} has more parts than there are rows: {len(splits['train'])}")
        parts = [splits["train"].shard(n, i, contiguous=True) for i in range(n)]
        splits["validation"] = parts.pop(k - 1)
        splits["train"] = datasets.concatenate_datasets(parts)
    elif val_fraction and "validation" not in splits:
        splits["train"], splits["validation"] = split_off_end(splits["train"], val_fraction)
    if patience > 0 and "validation" not in splits:
        fail(f"{patience=} needs validation data: set --val_fraction=0.05")
    for split, rows in splits.items():
        log(f"{split}: {len(rows):,} rows of at most {block_size} tokens")
    return tok, splits


def collate(rows):
    """Return a batch (x, y, loss_positions) of rows.

    x: token ids (B, T), padded on the right.
    y: the token after each of them (B, T), or -100 where there is no loss.
    loss_positions: the indices in y.flatten() that have a loss; None for texts, where almost all have one.
    """
    column = "labels" if "labels" in rows[0] else "ids"
    inputs = [row["ids"][:-1] for row in rows]
    targets = [row[column][1:] for row in rows]
    x = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    y = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    loss_positions = None
    if column == "labels":
        loss_positions = torch.where(y.flatten() != -100)[0]
    return x, y, loss_positions


def batch_rows(lengths, first_step, last_step, micro_size, world, rank):
    """Yield the indices of the rows in each micro-batch of a process, for all steps before last_step.

    The rows of a step depend on seed and step only, so a resumed run gets the same ones, even if the
    number of processes or micro_batch_size has changed. An epoch is a permutation of the rows, in which rows
    of similar length share a batch, which saves padding.
    """
    batches_per_epoch = max(1, len(lengths) // batch_size)
    shuffled_epoch = None
    for step in range(first_step, last_step):
        epoch, index = divmod(step, batches_per_epoch)
        if epoch != shuffled_epoch:
            shuffled_epoch = epoch
            rng = np.random.default_rng([seed, epoch])
            rows = rng.permutation(len(lengths))
            # Take as many as fill whole batches. If there are too few for one, np.resize() repeats rows.
            rows = np.resize(rows, batches_per_epoch * batch_size)
            # Sort by length, with some noise, so that the same rows do not meet in every epoch.
            noisy_lengths = lengths[rows] * rng.uniform(0.9, 1.1, len(rows))
            rows = rows[np.argsort(noisy_lengths)]
            batches = rows.reshape(batches_per_epoch, batch_size)
            batches = rng.permutation(batches)
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

    queries_and_keys = []
    matrices = []
    embeddings = []
    vectors_and_head = []
    for name, p in model.named_parameters():
        # The output layer, and vectors such as biases. (The model has none, but you may add some.)
        if p.ndim != 2 or name == "lm_head.weight":
            vectors_and_head.append(p)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            queries_and_keys.append(p)
        elif name.startswith("model.layers."):
            matrices.append(p)
        else:
            embeddings.append(p)
    groups = [{"params": embeddings, "lr": embed_lr}]
    if vectors_and_head:
        groups.append({"params": vectors_and_head, "lr": head_lr})
    # A strong decay keeps the matrices of queries and keys small. As in init_weights(), they then turn by a
    # larger angle in each step, and the default run learns much sooner to copy from its context.
    block_groups = [{"params": matrices}]
    if queries_and_keys:
        block_groups.append({"params": queries_and_keys, "weight_decay": qk_weight_decay})
    muon = {"lr": lr, "weight_decay": weight_decay}
    if accelerator.is_fsdp2:  # FSDP2 shards each matrix, and only torch's own Muon gathers the shards
        return [torch.optim.Muon(block_groups, **muon), adamw(groups)]
    # Muon also works in bf16, but that is slow where the hardware does not have it.
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return [Muon(block_groups, dtype, **muon), adamw(groups)]


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


# ---- Checkpoints and the run directory ----

# What a run writes. A new run in the same folder removes these files of an old one, and no others.
RUN_FILES = """
    run.json metrics.jsonl checkpoint.pt best.pt config.json generation_config.json model.safetensors
    model-?????-of-?????.safetensors model.safetensors.index.json adapter_model.safetensors
    adapter_config.json tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja
    samples/step_????????.txt train_lm/events.out.* train_lm/*/events.out.* train_lm/*/hparams.yml
    *.pt.trace.json run.json.tmp *.pt.tmp
""".split()
PACKAGES = "torch transformers datasets accelerate peft".split()  # run.json has their versions
LOCKS = []  # open_run_dir() keeps the lock of out_dir here, so that it is held until this process ends


def write_file(name, content):
    """Write a .json or .pt file in out_dir atomically: a crash leaves the old file or the new one."""
    temporary = Path(out_dir, f"{name}.tmp")
    with open(temporary, "wb") as f:
        if name.endswith(".json"):
            f.write(json.dumps(content, indent=1).encode())
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
    for path in (os.getcwd(), init_from, dataset):
        exists = os.path.exists(path)  # init_from and dataset may be names of the Hub
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
    if run.get("kind") != "lm":
        fail(f"{out_dir=} holds a run of another script: choose another --out_dir")
    if not resume and not overwrite:
        fail(f"{out_dir=} holds a run: add --resume=True or --overwrite=True, or choose another --out_dir")
    if not resume:
        return None
    if "checkpoint.pt" not in files:
        has_weights = any(name.endswith((".safetensors", "best.pt")) for name in files)
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


def hash_rows(rows):
    """Return a hash of 100 rows and of the number of all. With it, a resumed run notices changed data."""
    chosen = rows.select(evenly_spread(100, len(rows)))
    content = repr([len(rows), chosen.with_format(None)[:]])
    return hashlib.md5(content.encode()).hexdigest()


def describe_run(model, splits, old_run):
    """Return the content of run.json. Refuse to resume old_run with other data."""
    n_parameters = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run = {
        "kind": "lm",
        "model": "GPT" if isinstance(model, GPT) else "Pretrained",
        "command": sys.argv,
        "settings": settings(globals()),
        "rows": {split: len(rows) for split, rows in splits.items()},
        "hashes": {split: hash_rows(rows) for split, rows in splits.items()},
        "parameters": n_parameters,
        "trained_parameters": n_trained,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if old_run:
        run["summary"] = old_run.get("summary", {})  # stays until this run writes its own at the end
        check_data(old_run.get("hashes", {}), run["hashes"])
        if run["model"] == "GPT":
            note_other_model(out_dir)
    log(f"model: {n_parameters:,} parameters, {n_trained:,} of them trained")
    return run


def check_data(before, now):
    """Refuse to resume a run if a split has changed. before, now: {split: hash}; one may lack a split."""
    for split, now_hash in now.items():
        if before.get(split, now_hash) != now_hash:
            fail(f"{out_dir=} holds a run with other {split} data than {dataset=}: choose another --out_dir")


def note_other_model(folder):
    """Log a note if the section "Model" of the script in a folder differs from that of this script."""
    copy = Path(folder, "train_lm.py")
    if copy.exists() and sections(copy, "Model") != sections(__file__, "Model"):
        log(f"note: the model in {copy} differs from the one in this script, and the latter is used")


def start_run(run, tok, is_new):
    """Write run.json, tokenizer and a copy of this script to out_dir; a new run first deletes an old one."""
    if is_new:
        for pattern in RUN_FILES:
            for path in Path(out_dir).glob(pattern):
                if path.is_file():
                    path.unlink()
    write_file("run.json", run)
    with contextlib.suppress(shutil.SameFileError):  # the script that runs may be the one in out_dir
        shutil.copy(__file__, Path(out_dir, "train_lm.py"))  # under this name, sample.py looks for it
    tok.save_pretrained(out_dir)


def from_main(value):
    """Return, in every process, the value that the main process has passed. Every process must call this."""
    return broadcast_object_list([value])[0]


def unwrap(model):
    """Return the model inside DistributedDataParallel, which has it as `module`, or the model itself."""
    return getattr(model, "module", model)


def gather(model, optimizers=(), with_frozen=False):
    """Return ({name: weight}, state of the optimizers), collected from all processes.

    Frozen weights are left out unless with_frozen. Every process must call this.
    """
    import torch.distributed.checkpoint.state_dict as dcp  # takes half a second, so not at every start

    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    options.ignore_frozen_params = not with_frozen
    weights, state = dcp.get_state_dict(model, optimizers, options=options)
    # dcp still returns some frozen weights, and tied weights under both of their names. Remove these.
    kept = {name for name, p in unwrap(model).named_parameters() if with_frozen or p.requires_grad}
    all_names = {name for name, _ in unwrap(model).named_parameters(remove_duplicate=False)}
    if adapter:  # leave out the buffers, too, which come with the frozen model
        all_names |= {name for name, _ in unwrap(model).named_buffers()}
    left_out = all_names - kept
    weights = {name: weight for name, weight in weights.items() if name not in left_out}
    return weights, state


def save_checkpoint(model, optimizers, scaler, progress, name):
    """Write a checkpoint to out_dir. With optimizers=[], as for best.pt, it cannot be used for a resume.

    scaler: that of fp16, or None.
    """
    weights, state = gather(model, optimizers)
    if MAIN:
        check_finite(unwrap(model), weights)
        content = {
            "model": weights,
            "optimizers": state,
            "scaler": scaler.state_dict() if scaler else {},
            "progress": progress,
        }
        write_file(name, content)


def check_finite(model, weights):
    """End the program rather than replace good weights by those with infinite numbers or NaN."""
    trained = [weights[name] for name, _ in model.named_parameters() if name in weights]
    if not all(weight.isfinite().all() for weight in trained):
        fail("the weights are not finite: lower learning_rate, and resume from the last checkpoint")


def load_checkpoint(model, optimizers, scaler, name):
    """Load a checkpoint into the model and the optimizers of every process. Return its progress."""
    import torch.distributed.checkpoint.state_dict as dcp

    state = {"model": {}, "optimizers": {}, "scaler": {}, "progress": {}}
    weights, _ = gather(model)  # for their shapes; all processes must call it
    if MAIN:  # only the main process reads the file; the others get its content below
        with named("checkpoint", f"{out_dir}/{name}"):
            state = torch.load(Path(out_dir, name), map_location="cpu", weights_only=True)
        saved_shapes = {key: p.shape for key, p in state["model"].items()}
        if saved_shapes != {key: p.shape for key, p in weights.items()}:
            fail(f"{out_dir}/{name} does not fit the model in this script: use the script that wrote it")
    # With strict=False, because frozen weights are not in the checkpoint.
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
    options.broadcast_from_rank0 = WORLD > 1
    dcp.set_model_state_dict(model, state["model"], options=options)
    if optimizers:
        dcp.set_optimizer_state_dict(model, optimizers, state["optimizers"], options=options)
    saved_scaler = from_main(state["scaler"])
    if scaler and saved_scaler:  # it is empty if the run was not in fp16 before
        scaler.load_state_dict(saved_scaler)
    return from_main(state["progress"])


def save_weights(model, weights):
    """Write the weights in the format of transformers or peft.

    Write them to a temporary folder first, so that no file in out_dir is ever half written.
    """
    folder = Path(out_dir, "weights.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # a run that was killed may have left it
    folder.mkdir()
    if isinstance(model, GPT):
        config = model.config.to_dict()
        if not is_native(model):
            # Rather than compute something else, transformers refuses to load a model of this type.
            config |= {"model_type": "edited", "architectures": ["GPT"]}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        # model.lm is the model of transformers or peft (see the section on fine-tuning). Without
        # save_embedding_layers=False, peft may ask the Hub whether the vocabulary has grown.
        weights = {name.removeprefix("lm."): weight for name, weight in weights.items()}
        # save_pretrained() refuses the generation configs of some published models. Give it an empty one, and
        # write the true one below.
        model.lm.generation_config = transformers.GenerationConfig()
        model.lm.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    model.generation_config.to_json_file(folder / "generation_config.json")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        path.replace(Path(out_dir, path.name))
    folder.rmdir()


@functools.cache
def is_native(gpt):
    """Return whether transformers computes the same as this GPT, which you may have edited.

    Both get random weights, because the zeros of init_weights() would hide a difference.
    """
    is_same = False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        ours = GPT(gpt.config).eval()
        theirs = transformers.NanoChatForCausalLM(gpt.config).eval()
        for p in ours.parameters():
            nn.init.normal_(p, std=0.1)
        idx = torch.randint(gpt.config.vocab_size, (1, min(1024, gpt.context)))
        with contextlib.suppress(RuntimeError):  # raised if names or shapes of weights differ
            theirs.load_state_dict(dict(ours.named_parameters()))
            is_same = torch.allclose(ours(idx), theirs(idx).logits, atol=1e-3)
    if not is_same:
        log("note: the model was edited, so transformers cannot load it; sample.py and --init_from can")
    return is_same


# ---- Evaluation ----


@torch.no_grad()
def evaluate(accelerator, model, tok, name, rows, micro_size, n_batches=0):
    """Return the loss per token of a split, and the bits per byte, which can be compared across tokenizers.

    name: "val" or "test", with which the names of the metrics begin.
    n_batches: how many batches of batch_size rows to take, spread evenly over the split; 0: all rows.
    """
    n_rows = len(rows)
    if n_batches > 0:
        n_rows = min(n_rows, n_batches * batch_size)
    mine = evenly_spread(n_rows, len(rows))[RANK::WORLD]  # the indices of this process
    rows_per_process = math.ceil(n_rows / WORLD)
    loss_sum = 0.0
    n_tokens = 0
    n_bytes = 0
    model.eval()
    for i in range(0, rows_per_process, micro_size):
        batch = mine[i : i + micro_size]
        # Fill the last batch with row 0, but without its loss. torch.compile would compile another size anew,
        # and FSDP2 needs every process in every forward pass.
        n_missing = micro_size - len(batch)
        indices = batch + [0] * n_missing
        x, y, loss_positions = collate([rows[j] for j in indices])
        y[len(batch) :] = -100  # a target of -100 has no loss, even at one of the loss_positions
        inputs = send_to_device((x, y, loss_positions), accelerator.device)
        with accelerator.autocast():
            loss = model(*inputs)
        loss_sum += loss.item()
        n_tokens += (y != -100).sum().item()
        targets = [row[row != -100] for row in y]
        texts = tok.batch_decode(targets, skip_special_tokens=True)
        n_bytes += len("".join(texts).encode("utf-8", "replace"))
    model.train()
    sums = gather_object([(loss_sum, n_tokens, n_bytes)])  # those of all processes
    loss_sum, n_tokens, n_bytes = np.sum(sums, axis=0).tolist()
    bits = loss_sum / math.log(2)
    return {f"{name}/loss": loss_sum / n_tokens, f"{name}/bits_per_byte": bits / max(1, n_bytes)}


def evaluate_and_keep_best(accelerator, model, tok, splits, micro_size, progress, report):
    """Report the validation loss, save the weights if they are the best so far, and write a sample."""
    has_validation = "validation" in splits
    is_best = not has_validation  # without a validation split, the last weights count as the best
    if has_validation:
        values = evaluate(accelerator, model, tok, "val", splits["validation"], micro_size, eval_batches)
        report(values)
        if not math.isfinite(values["val/loss"]):
            fail("the validation loss is not finite: lower learning_rate, or try --mixed_precision=no")
        is_best = values["val/loss"] <= progress["best"]
    if progress["step"] == 0:
        return  # before training there is nothing to save
    progress["evals_since_best"] += 1
    if is_best:
        progress["evals_since_best"] = 0
        if has_validation:
            progress["best"] = values["val/loss"]
        weights, _ = gather(model, with_frozen=not adapter)  # save an adapter without its frozen model
        if MAIN:
            check_finite(unwrap(model), weights)
            save_weights(unwrap(model), weights)
        if has_validation:  # for the test at the end, even if only a later --resume asks for it
            save_checkpoint(model, [], None, progress, "best.pt")
    rows = splits.get("validation", splits["train"])
    write_sample(model, tok, rows[0], progress["step"])


def write_sample(model, tok, row, step):
    """Write a sample: how the model goes on after the first 16 tokens of a row, or answers its prompt."""
    n_prompt = 16
    if "labels" in row:  # the prompt ends where the first label is
        has_loss = row["labels"] != -100
        n_prompt = has_loss.nonzero()[0].item()
    prompt = row["ids"][:n_prompt].tolist()
    model.eval()
    # Run without torch.compile, which would take a minute for each new length.
    with torch.compiler.set_stance("force_eager"):
        # For generate(), see the section on sampling.
        continuation = generate(
            unwrap(model),
            prompt,
            n_samples=1,
            max_new_tokens=200,
            vocab_size=count_ids(tok),
            temperature=0.8,
            seed=seed,
        )
        tokens = [token.item() for token in continuation]
    model.train()
    if MAIN:
        text = tok.decode(prompt + tokens)
        path = Path(out_dir, f"samples/step_{step:08d}.txt")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")


# Peak FLOPS in bf16 without sparsity, from NVIDIA's data sheets. Other GPUs report no mfu: add yours.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}


def speed(n_tokens, seconds, model):
    """Return the metrics tokens_per_s, memory_gb and mfu, after training on n_tokens for some seconds.

    mfu, the model FLOPs utilization, is the used part of the peak FLOPS (PaLM, arXiv:2204.02311, appendix B).
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
    tokens_per_s = n_tokens / seconds
    values = {"tokens_per_s": tokens_per_s, "memory_gb": memory / 1e9}
    peaks = [peak for name, peak in PEAK_FLOPS.items() if name in gpu]  # the first one counts: "H100 PCIe"
    if peaks and isinstance(model, GPT):
        # Forward and backward take 6 FLOPs per token and weight. Embeddings are not multiplied but looked up.
        # Attention takes 12 more per layer, channel and position.
        n_params = sum(p.numel() for p in model.parameters())
        n_multiplied = n_params - model.model.embed_tokens.weight.numel()
        attention_flops = 12 * len(model.model.layers) * model.config.hidden_size * block_size
        flops_per_token = 6 * n_multiplied + attention_flops
        values["mfu"] = tokens_per_s * flops_per_token / (peaks[0] * WORLD)
    return values


# ---- Training ----


def start_accelerator():
    """Return an Accelerator for the best device there is, with precision, threads and processes set up."""
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    torch.autograd.set_detect_anomaly(detect_anomaly)
    torch.use_deterministic_algorithms(deterministic)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # with FSDP2, every process builds the whole model
    # accelerate passes broadcast_buffers to torch under a deprecated name. Hide the warning.
    warnings.filterwarnings("ignore", "`?broadcast_buffers")
    # The other processes wait while one tokenizes the data, which may take long.
    process_group = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # The buffers never change, so DDP need not broadcast them. It shares the memory of the gradients instead
    # of copying them.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
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
    if accelerator.is_fsdp2:
        set_up_fsdp2(accelerator)
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


def set_up_fsdp2(accelerator):
    """Let FSDP2 keep weights in fp32, gather them in bf16 (half the traffic) and reduce gradients in fp32."""
    options = {"cast_forward_inputs": False}  # autocast chooses the precision of inputs
    if accelerator.mixed_precision == "bf16":
        options |= {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(**options)
    accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    torch.set_autocast_cache_enabled(False)  # autocast would keep a bf16 copy of all weights


def prepare(accelerator, model, optimizers):
    """Compile the model, and wrap it and its optimizers for several processes. Return (model, optimizers)."""
    if compile and accelerator.device.type == "cuda":
        model.compile()
    model, *optimizers = accelerator.prepare(model, *optimizers)
    if accelerator.is_fsdp2:
        # Free gathered weights after every forward pass. Otherwise, the model would still use these copies
        # after a checkpoint has been loaded.
        model.set_reshard_after_forward(True)
    return model, optimizers


def gradient_sync(accelerator, model, is_last):
    """Return a context for a backward pass, in which DDP all-reduces the gradients only if is_last.

    FSDP2 reduces them in every backward pass, because unsharded gradients would not fit.
    """
    if is_last or accelerator.is_fsdp2:
        return contextlib.nullcontext()
    return accelerator.no_sync(model)


def clip_gradients(accelerator, model):
    """Scale the gradients down to a norm of grad_clip. Return the norm that they had."""
    max_norm = grad_clip or math.inf  # inf: only measure the norm
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    if accelerator.is_fsdp2:  # then the norm is a DTensor
        grad_norm = grad_norm.full_tensor()
    return grad_norm


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
    """Return (rows per process and forward pass, forward passes per optimizer step)."""
    micro_size = micro_batch_size or max(1, batch_size // WORLD)
    accumulation_steps = batch_size // (micro_size * WORLD)
    if accumulation_steps * micro_size * WORLD != batch_size:
        fail(f"{batch_size=} must be a multiple of micro_batch_size x processes = {micro_size} x {WORLD}")
    return micro_size, accumulation_steps


def count_steps(n_rows):
    """Return (steps per epoch, steps of the run) for n_rows training rows."""
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


def main():
    # ---- set up: device, batch, run directory ----
    check_settings()
    accelerator = start_accelerator()
    device = accelerator.device
    micro_size, accumulation_steps = divide_batch()
    old_run = open_run_dir()

    # ---- model and data ----
    if init_from != "scratch":  # before the data, so that a wrong name fails early
        model = load_pretrained(accelerator.mixed_precision)
    with accelerator.local_main_process_first():  # one process prepares the data, the others read its cache
        tok, splits = prepare_data()
    if init_from == "scratch":
        model = make_gpt(tok)
    check_ids(model, splits)  # every id must have an embedding in the model
    set_generation_config(model, tok, splits["train"])  # which tokens end a text
    optimizers = make_optimizers(model, accelerator)
    # Keep the peaks of the learning rates here: loading a checkpoint replaces the groups and their rates.
    peak_lrs = [group["lr"] for o in optimizers for group in o.param_groups]
    # Step the wrapped optimizers, which can skip a step in fp16. Save and load those inside them.
    model, wrapped_optimizers = prepare(accelerator, model, optimizers)

    # ---- start the run, or resume it ----
    progress = {"step": 0, "best": math.inf, "evals_since_best": 0, "seconds": 0.0, "metrics_bytes": 0}
    run = describe_run(unwrap(model), splits, old_run) if MAIN else None
    old_run = from_main(old_run)  # only the main process has read it
    if old_run:
        progress = load_checkpoint(model, optimizers, accelerator.scaler, "checkpoint.pt")
        # A run that has ended did one more evaluation after its last checkpoint. Only run.json has that loss.
        best_at_end = old_run.get("summary", {}).get("val/loss", math.inf)
        if best_at_end < progress["best"]:
            progress["best"] = best_at_end
            progress["evals_since_best"] = 0
        log(f"resumed from {out_dir}/checkpoint.pt at step {progress['step']}")
    if MAIN:
        start_run(run, tok, is_new=not old_run)
    step = progress["step"]
    groups = [group for o in optimizers for group in o.param_groups]
    steps_per_epoch, total_steps = count_steps(len(splits["train"]))

    # ---- logging ----
    start = time.monotonic() - progress["seconds"]
    metrics = open_metrics(progress["metrics_bytes"]) if MAIN else None
    with named("tracker", tracker):  # a login to wandb may fail; WANDB_MODE=offline needs none
        accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "train_lm"), settings(globals()))

    def report(values):  # at the current step
        if MAIN:
            row = {"step": step, "time": round(time.monotonic() - start, 3), **values}
            metrics.write(json.dumps(row).encode() + b"\n")
        accelerator.log(values, step=step)
        numbers = " ".join(f"{name} {value:.5g}" for name, value in values.items())
        log(f"step {step}/{total_steps} {numbers}")

    # ---- the loop ----
    catch_signals()
    lengths = pyarrow.compute.list_value_length(splits["train"].data["ids"]).to_numpy()  # of all rows
    loader = DataLoader(
        splits["train"],
        batch_sampler=batch_rows(lengths, step, total_steps, micro_size, WORLD, RANK),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",  # so that send_to_device() need not wait
    )
    batches = iter(loader)
    micro_batches = list(itertools.islice(batches, accumulation_steps))  # those of the next step
    profiler = start_profiler() if profile else None
    timer = time.monotonic()
    tokens_since = 0  # target tokens since the timer was set
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
            save_checkpoint(model, optimizers, accelerator.scaler, progress, "checkpoint.pt")
        if not is_stopped and (is_done or is_due(step, eval_interval)):
            evaluate_and_keep_best(accelerator, model, tok, splits, micro_size, progress, report)
            timer = time.monotonic()  # speed is measured between evaluations
            tokens_since = 0
        is_out_of_patience = patience > 0 and progress["evals_since_best"] >= patience
        if is_stopped or is_done or is_out_of_patience:
            break

        for group, peak_lr in zip(groups, peak_lrs):
            group["lr"] = peak_lr * lr_at(step, total_steps)
            if "momentum" in group:  # Muon: warm up the momentum from 0.85 to 0.95, as nanochat does
                group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)

        # The loss is a mean over the target tokens of all micro-batches in all processes: count them first.
        counts = [(y != -100).sum() for _, y, _ in micro_batches]
        n_targets = sum(counts).float()
        n_targets = accelerator.reduce(n_targets.to(device, non_blocking=True), "sum")
        loss = torch.zeros((), device=device)
        torch.manual_seed(hash((seed, step, RANK)))  # for dropout: a resumed run draws the same
        for i, batch in enumerate(micro_batches):
            batch = send_to_device(batch, device, non_blocking=True)
            is_last = i == accumulation_steps - 1
            with gradient_sync(accelerator, model, is_last):
                with accelerator.autocast():
                    micro_loss = model(*batch) / n_targets
                accelerator.backward(micro_loss * WORLD)  # DDP averages over processes, but we want the sum
            loss += micro_loss.detach()
        norm_before_clipping = clip_gradients(accelerator, model)
        # Load the next micro-batches while the GPU still computes.
        micro_batches = list(itertools.islice(batches, accumulation_steps))

        # Sum over the processes, so that all of them skip, stop or go on together.
        n_received = torch.full((), float(len(RECEIVED)), device=device)
        sums = accelerator.reduce(torch.stack([loss, n_received]), "sum")
        # Put all numbers into one tensor, so that the CPU waits for the GPU only here, once a step.
        numbers = torch.stack([*sums, norm_before_clipping, n_targets])
        train_loss, n_signals, grad_norm, n_tokens = numbers.tolist()
        is_stopped = n_signals > 0
        is_finite = math.isfinite(train_loss) and math.isfinite(grad_norm)
        for o in wrapped_optimizers:
            # In fp16, always call step(): the scaler leaves out what is not finite, and lowers its scale.
            if is_finite or accelerator.scaler:
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
                fail("ten steps in a row were not finite: lower learning_rate, or try --detect_anomaly=True")

        if is_due(step, log_interval) or step == total_steps:
            values = {"train/loss": train_loss, "grad_norm": grad_norm, "lr": groups[0]["lr"]}
            values |= speed(tokens_since, time.monotonic() - timer, unwrap(model))
            values["epoch"] = step / steps_per_epoch
            report(values)
            timer = time.monotonic()
            tokens_since = 0
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
                load_checkpoint(model, [], None, "best.pt")
            values = evaluate(accelerator, model, tok, "test", splits["test"], micro_size)
            report(values)
            summary |= values
        if MAIN:
            write_file("run.json", run | {"summary": summary})
    finish(accelerator, step, is_stopped)


# ---- Sampling ----


@torch.no_grad()
def generate(
    model, prompt, n_samples, max_new_tokens, vocab_size, temperature=1.0, top_k=0, top_p=1.0, seed=0
):
    """Generate n_samples continuations of a prompt, which is a list of ids.

    Yield their next tokens (n_samples,) at each step, until all have ended.
    vocab_size: the number of ids of the tokenizer. Further ids of the model are padding and never drawn.
    temperature: 0 takes the most likely token.
    """
    if max(prompt) >= model.config.vocab_size:  # a tokenizer can have more tokens than the model
        fail("the prompt has a token that the model does not have: leave it out")
    device = next(model.parameters()).device
    idx = torch.tensor([prompt] * n_samples, device=device)  # (n_samples, T)
    rng = torch.Generator().manual_seed(seed)
    ends = torch.tensor(end_tokens(model))
    has_ended = torch.zeros(n_samples, dtype=torch.bool)
    cache = {}
    for _ in range(max_new_tokens):
        if idx.size(1) > model.context:
            # Keep half a context of the text, so that the cache is filled anew only now and then.
            n_kept = max(1, model.context // 2)
            idx = idx[:, -n_kept:]
            cache = {}
        new = idx[:, -1:] if cache else idx  # once there is a cache, only the last token is new
        logits = model(new, cache=cache)  # (n_samples, 1, V)
        logits = logits[:, -1, :vocab_size].float().cpu()  # on every device, a seed gives the same tokens
        if logits.isnan().any():
            fail("the output of the model is not finite: train it with a lower learning_rate")
        if temperature < 1e-3:  # dividing by it could overflow
            token = logits.argmax(dim=-1)
        else:
            logits = logits / temperature
            # The first argument of these functions, the ids so far, is not used.
            if top_k:
                logits = transformers.TopKLogitsWarper(top_k)(None, logits)
            if top_p < 1:
                logits = transformers.TopPLogitsWarper(top_p)(None, logits)
            probabilities = logits.softmax(dim=-1)
            token = torch.multinomial(probabilities, 1, generator=rng)[:, 0]
        yield token
        has_ended |= torch.isin(token, ends)
        if has_ended.all():
            return
        idx = torch.cat((idx, token[:, None].to(idx.device)), dim=1)


def end_tokens(model):
    """Return the ids that end a text."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def end_of_answer(tok, special):
    """Return the first special token that the chat template writes behind an answer, as a list, or []."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with contextlib.suppress(Exception):  # a template may refuse a chat of only these two messages
        text = tok.apply_chat_template(messages, tokenize=False)
        tail = text.rpartition("!")[2]  # what follows the answer
        ids = tok(tail, add_special_tokens=False)["input_ids"]
        return [i for i in ids if i in special][:1]
    return []


def set_generation_config(model, tok, rows):
    """Set which tokens end a text and which ids are padding, for generate() and for transformers."""
    ends = {tok.eos_token_id, *end_tokens(model)}
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    has_answers = "labels" in rows.column_names
    if has_answers and tok.chat_template:
        ends.update(end_of_answer(tok, special))
    in_data = special.intersection(rows[0]["ids"].tolist())  # take the first row as an example
    if has_answers and adapter and in_data:
        names = " ".join(tok.convert_ids_to_tokens(sorted(in_data)))
        log(f"note: the adapter trains no embeddings: the model should already know the tokens {names}")
    model.generation_config.eos_token_id = sorted(ends)
    if isinstance(model, GPT) and count_ids(tok) < model.config.vocab_size:
        # Keep generate() of transformers from drawing the padding.
        model.generation_config.suppress_tokens = list(range(count_ids(tok), model.config.vocab_size))


def load(folder, run, base=""):
    """Return (model, tokenizer) of a run, or of any causal language model of transformers.

    run: the content of its run.json. base: where the model under an adapter is now, if it has moved.
    """
    globals().update(run["settings"])  # as if they had been given on the command line
    is_adapter = Path(folder, "adapter_config.json").exists()
    if base and not is_adapter:
        fail(f"{base=} has an effect on adapters only, and {folder} holds none")
    model = load_model(str(folder), base=base, setting="out_dir").eval()
    setting = "out_dir"
    source = str(folder)
    if is_adapter and not any(Path(folder).glob("tokenizer*")):  # peft alone saves none
        setting = "base"
        source = model.lm.name_or_path
    with named(setting, source):
        return model, transformers.AutoTokenizer.from_pretrained(source)


# ---- Answers: only with data that has prompts or chats ----

# Names of roles in the data, and the roles that they stand for. The last four are those of ShareGPT.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
# A chat template for tokenizers that have none. It writes, for example:
# user: Hello?
# assistant: Hi.<eos>
PLAIN_CHAT_TEMPLATE = """\
{%- if tools %}{{ 'tools: ' + (tools | tojson) + '\\n' }}{% endif %}
{%- for m in messages %}
    {{- m['role'] + ': ' + m['content'] }}
    {%- if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}
    {%- if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def read_messages(row, column):
    """Return the messages in a row of a table as chat templates expect them, with a role and a content."""
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": as_text(row["system"], "system")})
    chat = row.get(column) or []
    if not isinstance(chat, list) or not all(isinstance(fields, dict) for fields in chat):
        fail(f"{dataset=}: column {column!r} must hold lists of messages, not {chat!r:.60}")
    for fields in chat:
        # A table has None for fields that are missing. ShareGPT calls role and content "from" and "value".
        message = {name: value for name, value in fields.items() if value is not None}
        role = message.pop("from", None) or message.get("role")
        content = message.pop("value", None) or message.get("content")
        others = message.keys() - {"role", "weight", "name", "tool_call_id", "tool_calls"}
        if others and not fields.keys() & {"content", "value", "tool_calls"}:
            fail(
                f"{dataset=}: a message in column {column!r} has {', '.join(sorted(others))}, but no content"
            )
        if str(role) not in ROLES:
            fail(f"{dataset=}: the role {role!r} in column {column!r} is not one of {', '.join(ROLES)}")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            fail(f"{dataset=}: tool_calls in column {column!r} must be a list of objects, not {calls!r:.60}")
        for call in calls:
            function = call.get("function") or call
            if isinstance(function.get("arguments"), str):
                # OpenAI writes the arguments as JSON. Most chat templates expect the object in it.
                with named("arguments of a tool call", function["arguments"][:60]):
                    function["arguments"] = json.loads(function["arguments"] or "{}")
        messages.append({**message, "role": ROLES[role], "content": as_text(content, column)})
    return messages


def find_answer_start(text, prompt, answered):
    """Return the position at which an answer begins in the text that ends with it.

    text: the chat up to and including the answer before, or "". prompt: the chat up to this answer. answered:
    the chat up to and including this answer.
    """
    if prompt.startswith(text) and not answered.startswith(text):
        # If two answers follow each other, Qwen3's template rewrites the first one, and prompt and answered
        # differ from there on. Look for the opening of the second one, such as "<|im_start|>assistant".
        opening = prompt[len(text) :]
        if not opening or opening not in answered:
            fail(f"{dataset=} has two answers in a row, which the chat template does not support: join them")
        return answered.rindex(opening) + len(opening)
    # The answer starts where the two texts part. This need not be the end of the prompt: that of DeepSeek-R1
    # ends with a "<think>", which is not in the text with the answer.
    common = os.path.commonprefix([prompt, answered])  # works with all strings, not only paths
    return len(common)


def keep_question(asked, answered, question):
    """Return the chat up to a question as it was asked, followed by its answer.

    This is for templates that rewrite a question once it is answered: that of Mistral writes the system
    message into the last question only. asked, answered: the chat without and with the answer.
    """
    ending = asked[asked.rindex(question) :]  # the question and what follows it
    if ending not in answered:
        fail(
            f"{dataset=}: the chat template changes the question {question[:40]!r} when an answer follows:"
            " use a tokenizer with another chat template"
        )
    answer = answered[answered.rindex(ending) + len(ending) :]
    return asked + answer


def texts_with_answers(document, tok):
    """Yield (text, spans) for a document: spans are the (start, end) positions of the answers in the text.

    Some chat templates rewrite earlier turns of a chat: Qwen3's leaves out their thoughts. Such a chat gives
    several texts. Each ends with an answer that is not rewritten yet.
    """
    if "prompt" in document:
        text = document["prompt"] + document["completion"]
        yield text, [(len(document["prompt"]), len(text))]
        return
    messages = json.loads(document["messages"])
    tools = json.loads(document["tools"])

    def render(n, **options):
        """Return the first n messages as the template writes them."""
        with named("chat", document["messages"][:80]):  # the template may refuse them
            return tok.apply_chat_template(messages[:n], tools=tools, tokenize=False, **options)

    text = ""
    spans = []
    for i, message in enumerate(messages):
        # An assistant message that opens a chat answers nothing, so it has no loss. In OpenAI's format, a
        # message with a weight of 0 has none either.
        is_answer = message["role"] == "assistant" and i > 0 and message.get("weight") != 0
        is_empty = not message["content"].strip() and not message.get("tool_calls")
        if is_answer and not is_empty:
            prompt = render(i, add_generation_prompt=True)
            answered = render(i + 1)
            start = find_answer_start(text, prompt, answered)
            before = messages[i - 1]
            question = before["content"].strip()
            if before["role"] != "assistant" and question and question in prompt[start:]:
                # A short question may be in the opening of the answer by chance, such as "hi" in "<think>".
                # Look in the chat without that opening, too.
                asked = render(i)
                if question in asked[start:]:
                    answered = keep_question(asked, answered, question)
                    start = find_answer_start("", prompt, answered)
            is_continued = prompt.startswith(text) and answered.startswith(text)
            if not is_continued:  # the template has rewritten earlier turns
                yield text, spans
                spans = []
            spans.append((start, len(answered)))
            text = answered
    yield text, spans


def encode_answers(documents, tok):
    """Yield rows {"ids", "labels"}. The labels are the ids of the answers, and -100 elsewhere.

    Rows of more than block_size + 1 ids are cut, and those without an answer are dropped. The last row holds
    a note, as in encode_texts().
    """
    is_chat = "messages" in documents.column_names
    begin = [] if is_chat else bos_prefix(tok)  # a chat template writes <bos> itself
    end_texts = [tok.eos_token]
    if is_chat:  # any special token counts as an end, because templates use various ones
        end_texts += [token.content for token in tok.added_tokens_decoder.values() if token.special]
    n_dropped = 0
    n_cut = 0
    for document in documents:
        n_rows = 0
        for text, spans in texts_with_answers(document, tok):
            with named("dataset", dataset):  # a character that is not in the vocabulary may raise an error
                encoding = tok(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = begin + encoding["input_ids"]
            labels = [-100] * len(begin)
            token_ends = [end for _, end in encoding["offset_mapping"]]
            for token, end in zip(encoding["input_ids"], token_ends):
                # A token that ends in an answer belongs to it, even if it begins in the space before.
                is_in_answer = any(first < end <= last for first, last in spans)
                labels.append(token if is_in_answer else -100)
            if all(label == -100 for label in labels):
                continue
            # The model must learn to stop: if no end follows the last answer, add one.
            if not text.rstrip().endswith(tuple(end_texts)):
                ids.append(tok.eos_token_id)
                labels.append(tok.eos_token_id)
            # The first token of a row is never a target. If it belongs to an answer, put an <eos> before it.
            if labels[0] != -100:
                ids.insert(0, tok.eos_token_id)
                labels.insert(0, -100)
            if len(ids) > block_size + 1:
                n_cut += 1
            ids = ids[: block_size + 1]
            labels = labels[: block_size + 1]
            if any(label != -100 for label in labels):  # the answers may have been cut off
                n_rows += 1
                yield {"ids": ids, "labels": labels}
        if n_rows == 0:
            n_dropped += 1
    note = ""
    if n_dropped or n_cut:
        note = f"{n_dropped} documents without an answer dropped, {n_cut} rows cut at {block_size=}"
    yield {"note": note}


# ---- Fine-tuning: only with init_from ----


class SumOfLosses(torch.autograd.Function):
    """Cross-entropy, summed over positions and computed in chunks, so that not all logits exist at once.

    forward() also computes the gradients of each chunk, so that it need not keep the logits for backward().
    If the vocabulary is large, they would take most of the memory.
    """

    @staticmethod
    def forward(ctx, hidden, targets, logits_of, chunk_size, *weights):
        """Return the sum of the losses for hidden (n, C) and targets (n,).

        logits_of: a function from hidden states to logits. weights: the trained parameters that it uses.
        """
        wants_grad = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden.device)
        hidden_grads = []
        weight_grads = [torch.zeros_like(weight) for weight in weights]
        for h, y in zip(hidden.split(chunk_size), targets.split(chunk_size)):
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
        hidden_grad, *weight_grads = [grad * saved for saved in ctx.saved_tensors]
        return hidden_grad, None, None, None, *weight_grads  # one for each argument of forward()


class Pretrained(nn.Module):
    """A causal language model of transformers or peft with the interface of GPT."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.config = lm.config.get_text_config()  # that of the text part, if the model also takes images
        self.generation_config = lm.generation_config
        self._no_split_modules = lm._no_split_modules  # for FSDP2, as in GPT
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        adapter_config = getattr(lm, "active_peft_config", None)
        self.n_virtual = getattr(adapter_config, "num_virtual_tokens", 0)  # of p_tuning
        n_positions = getattr(self.config, "max_position_embeddings", None)
        self.context = (n_positions or 2**31) - self.n_virtual  # some models have no limit
        # check_model() turns this on if logits(hidden_states(idx)) are the logits of the model.
        self.can_chunk_loss = False

    def forward(self, idx, targets=None, loss_positions=None, cache=None):
        """Return what GPT.forward() returns. If the model has no cache, the dictionary stays empty."""
        T = idx.size(1)
        # No attention mask is needed: padding stands on the right, and no token looks to the right.
        if cache is not None:
            lm = self.lm
            # Once the cache has the virtual tokens, peft must not add them again.
            if cache and self.n_virtual:
                lm = self.lm.base_model
            out = lm(input_ids=idx, use_cache=True, **cache)  # passes past_key_values, if there are any
            if out.get("past_key_values") is not None:
                cache["past_key_values"] = out.past_key_values
            return out.logits[:, -1:].float()
        if targets is None:
            out = self.lm(input_ids=idx, use_cache=False)
            return out.logits[:, -T:].float()  # without those of virtual tokens
        targets = targets.flatten()
        if not self.can_chunk_loss:
            logits = self(idx).flatten(0, 1)  # (B * T, V)
            return F.cross_entropy(logits, targets, reduction="sum")

        hidden = self.hidden_states(idx).flatten(0, 1)  # (B * T, C)
        if loss_positions is not None:
            hidden = hidden[loss_positions]
            targets = targets[loss_positions]
        head = self.lm.get_output_embeddings()
        trained = []
        if torch.is_grad_enabled():  # not in an evaluation
            trained = [p for p in head.parameters() if p.requires_grad]
        # The logits of a chunk take 128 MB, with 4 bytes each.
        chunk_size = max(1, 128 * 2**20 // (4 * self.config.vocab_size))
        return SumOfLosses.apply(hidden, targets, self.logits, chunk_size, *trained)

    def hidden_states(self, idx):
        """Return the hidden states in front of the output layer (B, T, C)."""
        # Ask for the logits of no position, which skips the output layer. (0 would stand for all positions.)
        no_positions = idx.new_empty(0)
        out = self.lm(input_ids=idx, use_cache=False, output_hidden_states=True, logits_to_keep=no_positions)
        return out.hidden_states[-1][:, -idx.size(1) :]  # without those of virtual tokens

    def logits(self, hidden):
        """Return logits in fp32, with the soft cap of Gemma 2."""
        logits = self.lm.get_output_embeddings()(hidden).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def check_model(model):
    """Refuse a model in which a token sees later ones. Set can_chunk_loss."""
    model.eval()
    idx = torch.arange(8, device=model.lm.device)[None]  # eight tokens, whichever they are (1, 8)
    logits = model(idx)  # (1, 8, V)
    # Rounding errors are far smaller than this tolerance, and the effect of a later token is far larger.
    tolerance = torch.finfo(model.lm.dtype).eps ** 0.5 * logits.abs().max()
    change = (model(idx[:, :4]) - logits[:, :4]).abs().max()  # the effect of leaving out the last four
    if change > tolerance:
        fail(f"{init_from=} is not a causal language model: its tokens attend to later ones, as in BERT")
    # These errors mean that a model has no output layer, or does not take the arguments of hidden_states().
    with contextlib.suppress(TypeError, AttributeError):
        difference = (model.logits(model.hidden_states(idx)) - logits).abs().max()
        model.can_chunk_loss = (difference < 0.01 * tolerance).item()
    model.train()


def load_model(name, dtype=torch.float32, base="", setting="init_from"):
    """Return the GPT of an earlier run, or else a Pretrained; an adapter comes with its base model.

    base: where the base model is now, if it has moved. setting: the setting that names the model.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    is_gpt = False
    # peft cannot wrap our GPT. With an adapter, load its weights as transformers' NanoChat instead.
    if not adapter and Path(name, "run.json").exists():
        is_gpt = read_json(setting, name, "run.json")["model"] == "GPT"
    if is_gpt:
        with named(setting, name):
            config = transformers.NanoChatConfig.from_json_file(Path(name, "config.json"))
        note_other_model(name)
        gpt = GPT(config)  # outside of named(): a mistake in an edited GPT must show its traceback
        with named(setting, name):
            gpt.generation_config = transformers.GenerationConfig.from_pretrained(name)
            safetensors.torch.load_model(gpt, Path(name, "model.safetensors"))
        return gpt
    if not Path(name).exists():
        log(f"there is no folder {name}: looking for it on the Hugging Face Hub")
    if not Path(name, "adapter_config.json").exists():
        return Pretrained(load_causal_lm(name, dtype, setting))

    import peft

    with named(setting, name):
        config = peft.PeftConfig.from_pretrained(name)
    is_trained_further = adapter == "lora"
    config.inference_mode = not is_trained_further  # in this mode, peft freezes an adapter
    if base:
        config.base_model_name_or_path = base
    # sample.py has a setting for the base model. For training, adapter_config.json names it.
    base_setting = "base" if setting == "out_dir" else "base_model_name_or_path"
    lm = load_causal_lm(config.base_model_name_or_path, dtype, base_setting)
    with named(setting, name):
        if Path(name, "generation_config.json").exists():  # of an earlier run
            lm.generation_config = transformers.GenerationConfig.from_pretrained(name)
        lm = peft.get_peft_model(lm, config)
        keys = lm.load_adapter(name, "default")
    wrong_keys = keys.missing_keys + keys.unexpected_keys
    if any("lora_" in key for key in wrong_keys):  # keys of the base model are always missing in the file
        fail(
            f"{setting}={name!r} is an adapter for another model than {lm.name_or_path}:"
            " correct base_model_name_or_path in its adapter_config.json (for sample.py: use --base=)"
        )
    return Pretrained(lm)


def load_causal_lm(name, dtype, setting):
    """Return a causal language model of transformers."""
    with named(setting, name):
        lm, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"]:
        fail(f"{setting}={name!r} has no weights for {min(info['missing_keys'])}: download or save it again")
    return lm


def load_pretrained(precision):
    """Return the model that init_from names, with the adapter that is asked for.

    LoRA: Hu et al. 2021 (arXiv:2106.09685). P-tuning, learned vectors in front of every text: Liu et al. 2021
    (arXiv:2103.10385).
    """
    dtype = torch.float32
    if adapter:  # the weights are frozen: store them in the precision of training, which saves memory
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
        dtype = dtypes[precision]
    model = load_model(init_from, dtype)
    is_adapter = isinstance(model, Pretrained) and hasattr(model.lm, "peft_config")
    is_lora = is_adapter and model.lm.active_peft_config.peft_type == "LORA"
    if is_adapter and not is_lora:
        fail(f"{init_from=} is an adapter that cannot be trained further: only LoRA can")
    if is_lora and adapter != "lora":
        fail(
            f"{init_from=} is an adapter: train it further with --adapter=lora,"
            f" or first merge it: python sample.py --out_dir={init_from} --merge=FOLDER"
        )
    if is_lora:
        log("the LoRA keeps its own rank, alpha and targets")
    if adapter and not is_adapter:
        import peft

        if adapter == "lora":
            targets = find_targets(model.lm)
            config = peft.LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=targets)
        else:
            width = model.lm.get_input_embeddings().weight.size(1)
            config = peft.PromptEncoderConfig(
                num_virtual_tokens=virtual_tokens, token_dim=width, encoder_hidden_size=width
            )
        config.task_type = "CAUSAL_LM"
        torch.manual_seed(seed)  # for the initial weights of the adapter
        with named("adapter", adapter):
            model = Pretrained(peft.get_peft_model(model.lm, config))
    if isinstance(model, Pretrained):
        check_model(model)
    if block_size > model.context:
        fail(f"{block_size=} is too long for {init_from}: at most --block_size={model.context}")
    return model.train()


def find_targets(lm):
    """Return lora_targets in the form that peft takes. End the program if a name is not that of a layer."""
    if lora_targets == "all-linear":
        return lora_targets
    targets = [name.strip() for name in lora_targets.split(",")]
    names = [f".{name}" for name, _ in lm.named_modules()]  # with dots: proj is not in q_proj
    for target in targets:
        # A target may be the end of a name: q_proj names model.layers.0.self_attn.q_proj and others.
        if not any(name.endswith(f".{target}") for name in names):
            fail(f"{lora_targets=}: {init_from} has no layer {target!r}: the default takes all linear layers")
    return targets


def check_ids(model, splits):
    """End the program if the data has ids beyond the vocabulary of the model."""
    if init_from == "scratch":
        return  # the model was made for this tokenizer
    for rows in splits.values():
        ids = pyarrow.compute.list_flatten(rows.data["ids"])
        largest = pyarrow.compute.max(ids).as_py()
        if largest >= model.config.vocab_size:
            n_ids = model.config.vocab_size
            fail(
                f"{init_from} has only {n_ids} embeddings, but its tokenizer gives a token in {dataset=}"
                f" the id {largest}: use the tokenizer that belongs to the model"
            )


if __name__ == "__main__":
    configure(globals())
    main()
