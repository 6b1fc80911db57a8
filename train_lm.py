"""
Train a language model: one file with the model, the data, the loop.

    accelerate launch train_lm.py                                       # on Python's own source, anywhere
    accelerate launch train_lm.py configs/shakespeare_char.py --n_layer=8
    accelerate launch train_lm.py --dataset=my_texts/ --tokenizer=bpe:4096 --out_dir=out/mine
    accelerate launch train_lm.py configs/lora_chat.py                  # a pretrained model, taught to chat

Then `python sample.py --out_dir=out/lm --prompt="def "` speaks from it. Ctrl-C saves; --resume=True goes on.
"""

import os

PARENT = os.getppid()  # before the slow imports, to notice a launcher that dies during them

import contextlib
import ctypes
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import urllib.error
import urllib.request
import uuid
import warnings
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
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from configurator import configure, fail, nearest, reason, settings

# -----------------------------------------------------------------------------
# Settings: change them here, in a config file, or by --name=value. Legal values stand in brackets.
# -----------------------------------------------------------------------------
# the run
out_dir = "out/lm"  # everything that the run writes
resume = False  # True: go on from the newest checkpoint in out_dir, or start if there is none
overwrite = False  # True: delete the run in out_dir and start anew
seed = 1337  # of the first weights, the order of the data, and dropout
# data
dataset = "python"  # "python" (its own library), a file, folder, glob or URL, or a hub name:config@revision
text_column = "text"  # the column with the documents, in .jsonl, .parquet, .csv and hub data
prompt_column = "prompt"  # where this column and the next are found, answers to prompts are learned
completion_column = "completion"  # the answers
messages_column = "messages"  # or conversations, of {"role", "content"}: what the assistant says is learned
too_long = "cut"  # prompts and conversations beyond block_size are cut on the left ("cut" | "drop")
tokenizer = ""  # "bytes", "char", "bpe:N" (N learned tokens), hub name, folder; "": init_from's, or bpe:1024
val_fraction = 0.05  # of the data, for the validation split if there is none of its own; 0: none (0..<1)
test_fraction = 0.05  # likewise for the test split, which is looked at once, at the end (0..<1)
fold = ""  # "2/5": validate on the second of five parts instead (cross-validation)
num_workers = 0  # DataLoader processes; 0 is fastest for local files, a few help on network disks
# model (with init_from, the next five lines alone: the others are as that model has them)
init_from = "scratch"  # or a causal language model to go on from: a hub name, a folder, a run of ours
base_dtype = "fp32"  # of init_from's weights; bf16 in half the memory, under an adapter ("fp32" | "bf16")
adapter = ""  # train a few new weights, and leave those of init_from alone ("" | "lora" | "p_tuning")
block_size = 128  # context length in tokens (1..)
dropout = 0.0  # 0 for about one pass over the data, 0.1 to 0.2 where the same text comes by often (0..<1)
n_layer = 4  # transformer blocks (1..)
n_head = 2  # attention heads; of size 64 they are fastest (1..)
n_kv_head = 0  # heads of keys and values, fewer for grouped-query attention; 0: n_head
n_embd = 128  # width; n_embd / n_head, the size of a head, must be even (1..)
# adapter
lora_rank = 16  # of the two matrices whose product is added to a frozen one: how much can be learned (1..)
lora_alpha = 32.0  # the product counts lora_alpha / lora_rank times (1..)
lora_dropout = 0.0  # before the product (0..<1)
lora_targets = "all-linear"  # the layers that get one: all but the head, or names of layers, as q_proj,v_proj
virtual_tokens = 20  # p_tuning: how many learned vectors stand before every text (1..)
# batch and length
batch_size = 16  # blocks per optimizer step, over all processes and micro-batches (1..)
micro_batch_size = 0  # blocks per process and forward pass, fewer if memory is short; 0: no accumulation
max_steps = 1400  # optimizer steps; 0: only evaluate
epochs = 0.0  # passes over the data, instead of max_steps; 0: by max_steps
# optimizer and learning rate
optimizer = "muon"  # with AdamW for embedding and head; with init_from always AdamW ("muon" | "adamw")
learning_rate = 0.0  # peak; 0: muon 0.02, adamw 0.001, with init_from 5e-5, lora 2e-4, p_tuning 0.001
embed_lr = 0.3  # peak, of the embedding beside muon
head_lr = 0.004  # peak, of the head beside muon
beta1 = 0.8  # AdamW's memory of the gradient (0..<1)
beta2 = 0.95  # AdamW's memory of the squared gradient (0..<1)
weight_decay = 0.03  # of the matrices in the blocks; with adamw of all matrices
warmup_steps = 20  # steps in which the learning rate rises to its peak
lr_schedule = "wsd"  # warm-up, stable, decay; or cosine; or constant ("wsd" | "cosine" | "constant")
cooldown = 0.9  # the last part of the steps, in which wsd decays (0..1)
min_lr = 0.02  # learning rate at the end, as a fraction of its peak (0..1)
grad_clip = 1.0  # largest norm of the gradient; 0: unlimited
# evaluation, saving, reports
eval_interval = 200  # steps (1..)
eval_batches = 20  # batches of batch_size, spread evenly over the validation split; 0: all of it
log_interval = 10  # steps (1..)
save_interval = 200  # steps between checkpoints (1..)
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


def check_settings():
    """End the program, before any data is touched, for values that cannot work together."""
    which = re.fullmatch(r"(\d+)/(\d+)", fold)
    if fold and not (which and 1 <= int(which[1]) <= int(which[2]) > 1):
        fail(f"{fold=}: write --fold=2/5 for the second of five parts")
    if val_fraction + test_fraction >= 1:
        fail(f"{val_fraction=} and {test_fraction=} leave nothing to train on")
    if init_from == "scratch" and (adapter or base_dtype != "fp32"):
        fail(f"{adapter=} and {base_dtype=} are for a pretrained model: name it, as in --init_from=gpt2")
    if init_from != "scratch" and Path(init_from).expanduser().resolve() == Path(out_dir).resolve():
        fail(f"{init_from=} is out_dir: go on with that run by --resume=True, or choose another --out_dir")
    if init_from != "scratch" and OWN_TOKENIZER.fullmatch(tokenizer):
        fail(f"{tokenizer=} is not what {init_from} was trained with: leave it out")
    size = re.fullmatch(r"bpe:(\d+)", tokenizer)
    if tokenizer.startswith("bpe") and not (size and 257 <= int(size[1]) < 1_000_000):
        fail(f"{tokenizer=}: write it like bpe:1024, with at least 257 tokens (256 bytes, end of text)")
    if n_embd % (2 * n_head):
        fail(f"{n_embd=} must be a multiple of 2 x {n_head=}: every head has the same, even size")
    if n_kv_head and n_head % n_kv_head:
        fail(f"{n_head=} must be a multiple of {n_kv_head=}")
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
# Model: RoPE, QK-norm, squared ReLU, no biases, no learned norms. In transformers it is "nanochat", and the
# parameters have the names that they have there, so that a run directory loads as it is.
# -----------------------------------------------------------------------------


@dataclass
class Shape:
    """What it takes to build the model again."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    dropout: float = 0.0


def norm(x):
    """Each vector divided by its root mean square (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return F.rms_norm(x, (x.size(-1),), eps=1e-6)
    # The same, written out: in bf16 on CPUs, torch's own and its gradient take almost twice as long.
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): turn pairs of channels, the further the later."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def attend(q, k, v, mask, dropout):
    """
    softmax(q k^T / sqrt(D)) v, in which each token looks at itself and all before it, or at what `mask` says.
    q (B, n_head, T, D), k and v (B, n_kv_head, S, D), mask (B, 1, T, S) -> (B, n_head, T, D)
    """
    T, S = q.size(2), k.size(2)
    if q.device.type != "cpu" or v.dtype != torch.bfloat16 or T == 1 or S > 512:
        causal, gqa = mask is None and T > 1, k.size(1) < q.size(1)  # one new token looks at all
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=gqa)
    # The same, written out: in bf16 on CPUs, torch's own kernel takes about four times as long on short texts, if
    # not for one token; and here each length that is new costs a few milliseconds at first.
    if k.size(1) < q.size(1):
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, n_head, T, S)
    mask = torch.ones(T, S, dtype=torch.bool).tril() if mask is None else mask
    scores = scores + torch.where(mask, 0.0, -1e9).to(v.dtype)
    return F.dropout(scores.softmax(dim=-1, dtype=v.dtype), dropout) @ v


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = shape.n_head, shape.n_kv_head, shape.dropout
        self.head_dim = shape.n_embd // shape.n_head
        self.q_proj = nn.Linear(shape.n_embd, self.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, shape.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None, start=0, mask=None):
        B, T, C = x.shape  # D: head_dim
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, n_head, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))  # QK-norm bounds the attention logits
        if cache is not None:  # (2, B, n_kv_head, block_size, D) holds all keys and values so far
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[:, :, :, : start + T].to(q.dtype)  # (B, n_kv_head, start + T, D)
        y = attend(q, k, v, mask, self.dropout * self.training)  # (B, n_head, T, D)
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
        self.self_attn, self.mlp, self.dropout = Attention(shape), MLP(shape), shape.dropout

    def forward(self, x, *attention):
        x = x + F.dropout(self.self_attn(norm(x), *attention), self.dropout, self.training)
        return x + F.dropout(self.mlp(norm(x)), self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer of the given Shape."""

    _no_split_modules = ("Block",)  # the parts in which FSDP2 gathers the weights, one after another

    def __init__(self, shape):
        super().__init__()
        self.shape, self.gradient_checkpointing = shape, False
        layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        embedding = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers})
        self.lm_head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        for block in layers:
            for matrix in block.parameters():
                nn.init.normal_(matrix, std=shape.n_embd**-0.5)
            nn.init.zeros_(block.self_attn.o_proj.weight)  # each block starts as the identity
            nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(self.lm_head.weight)  # all tokens alike: the loss starts at ln(vocab_size)
        head_dim = shape.n_embd // shape.n_head
        frequency = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angle = torch.outer(torch.arange(shape.block_size).float(), frequency)  # (block_size, D / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, idx, targets=None, kept=None, cache=None, start=0, mask=None):
        """
        idx (B, T) -> logits (B, T, V) in fp32; with targets (B, T), the sum of their losses; -100 has none.
        kept (K,): the positions where some row has a target, if not all: the head is applied there alone.
        With a cache, idx holds the tokens from position `start` on; the logits are the last one's, (B, 1, V).
        """
        x = norm(self.model.embed_tokens(idx))  # (B, T, C)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()  # as the products are: what runs through the blocks takes half the memory
        x = F.dropout(x, self.shape.dropout, self.training)
        cos, sin = (t[start : start + idx.size(1)].to(x.dtype) for t in (self.cos, self.sin))  # (T, D / 2)
        for i, block in enumerate(self.model.layers):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, None if cache is None else cache[i], start, mask)
        x = norm(x if cache is None else x[:, -1:])
        if kept is not None:
            x, targets = x[:, kept], targets[:, kept]  # (B, K, C), (B, K)
        logits = self.lm_head(x).float()  # (B, T, V)
        logits = 15.0 * torch.tanh(logits / 15.0)  # softcap (Gemma 2, arXiv:2408.00118): no logit runs away
        return logits if targets is None else sum_losses(logits, targets)

    def flops_per_token(self, T):
        """Of a training step with contexts of T tokens (Chowdhery et al. 2022, arXiv:2204.02311)."""
        n_multiplied = sum(p.numel() for p in self.parameters()) - self.model.embed_tokens.weight.numel()
        return 6 * n_multiplied + 12 * self.shape.n_layer * self.shape.n_embd * T

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, rng=None):
        """
        Yield the next token of each prompt (lists of ids), (B,), until max_new_tokens or all said `eos`.
        temperature 0: the likeliest token. Text that outgrows block_size goes on from its last half.
        """
        shape, device, width = self.shape, self.cos.device, max(map(len, prompts))
        pad = torch.tensor([width - len(p) for p in prompts], device=device)  # (B,), on the left
        idx = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
        sizes = (shape.n_layer, 2, len(prompts), shape.n_kv_head, shape.block_size)
        sizes += (shape.n_embd // shape.n_head,)
        cache = torch.zeros(sizes, dtype=self.lm_head.weight.dtype, device=device)
        cached, ended = 0, torch.zeros_like(pad, dtype=torch.bool)
        for _ in range(max_new_tokens):
            if width > shape.block_size:
                drop = width - max(1, shape.block_size // 2)
                idx, pad, width, cached = idx[:, drop:], (pad - drop).clamp(min=0), width - drop, 0
            mask = None
            if len(set(map(len, prompts))) > 1:  # look at nothing that comes later, and not at the padding
                key = torch.arange(width, device=device)
                mask = (key <= key[cached:, None]) & (key >= pad[:, None, None, None])  # (B, 1, T, start + T)
            logits = self(idx[:, cached:], cache=cache, start=cached, mask=mask)[:, -1]  # (B, V)
            token = draw(logits, temperature, top_k, top_p, rng)  # (B,)
            if eos is not None:
                token = token.masked_fill(ended, eos)
                ended = ended | (token == eos)
            yield token
            if ended.all():
                return
            idx, cached, width = torch.cat((idx, token[:, None]), dim=1), width, width + 1


def sum_losses(logits, targets):
    """(B, T, V), (B, T) -> the sum of the losses of all targets that are not -100."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def draw(logits, temperature, top_k, top_p, rng):
    """(B, V) -> (B,): one of the top_k, within the likeliest mass top_p (Holtzman et al. 2019)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.nan_to_num() / temperature  # a broken model babbles, and does not end the run
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the token that crosses the line stays in
        outside[:, 0] = False  # and the likeliest always
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    mass = logits.softmax(dim=-1).cumsum(dim=-1)
    u = 1 - torch.rand(len(mass), 1, generator=rng, device=mass.device)  # in (0, 1], so that no 0 is drawn
    return torch.searchsorted(mass, u * mass[:, -1:])[:, 0]  # multinomial() throws dice for every token: slow


# -----------------------------------------------------------------------------
# Pretrained models: any causal language model of transformers, whole or under an adapter of peft
# -----------------------------------------------------------------------------
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Base:
    """The pretrained model of a run: enough to find it again, and to see that it is still the same."""

    name: str
    fingerprint: str  # of its weights
    block_size: int  # how many positions it has; 0: no limit
    vocab_size: int


class Pretrained(nn.Module):
    """A causal language model of transformers, perhaps with an adapter, that trains as GPT does."""

    def __init__(self, lm, base):
        super().__init__()
        self.lm, self.shape = lm, base
        prompt = getattr(lm, "active_peft_config", None)
        self.n_virtual = getattr(prompt, "num_virtual_tokens", 0)
        plain = lm.get_base_model() if prompt else lm
        # the parts in which FSDP2 gathers the weights, one after another
        kinds = {type(part).__name__ for part in plain.modules()}
        self._no_split_modules = sorted(kinds.intersection(plain._no_split_modules or ()))
        self.can_keep = "logits_to_keep" in inspect.signature(plain.forward).parameters

    def forward(self, idx, targets, kept=None):
        """idx, targets (B, T) -> the sum of the losses; kept (K,): the positions with targets, if not all."""
        options = {}
        if kept is not None and self.can_keep:
            options, targets = {"logits_to_keep": kept + self.n_virtual}, targets[:, kept]
        # Padding stands on the right, where no token looks: without a mask, the fast kernels can be used.
        logits = self.lm(input_ids=idx, use_cache=False, **options).logits  # (B, T or K, V)
        if logits.size(1) > targets.size(1):  # nothing is asked of the learned prompt
            logits = logits[:, -targets.size(1) :]
        return sum_losses(logits.float(), targets)

    def generate(self, **options):
        return self.lm.generate(**options)

    def flops_per_token(self, T):
        """As that of GPT; a weight that is not trained takes no gradient, a third of the work."""
        config, table = self.lm.config.get_text_config(), self.lm.get_input_embeddings().weight
        tied = self.lm.get_output_embeddings().weight is table
        multiplied = [p for p in self.parameters() if tied or p is not table]
        flops = sum(p.numel() * (6 if p.requires_grad else 4) for p in multiplied)
        return flops + 12 * config.num_hidden_layers * config.hidden_size * T


def is_causal(lm):
    """Whether the logits stay when a later token changes: those of BERT, which loads as well, do not."""
    with torch.no_grad():
        a, b = lm(input_ids=torch.tensor([[0] * 8, [0] * 7 + [1]])).logits[:, :-1].float()
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def load_causal_lm(name, dtype, dropout=0.0):
    """-> a causal language model of transformers from a folder or the hub, whatever dtype it was saved in."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # what peft and transformers say to each other
    for message in ("Position ids are not supported", "`(is_)?gradient_checkpointing"):
        warnings.filterwarnings("ignore", message)
    try:
        Path(name).exists() or reach_hub()
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
        rates = [k for k, v in config.items() if re.search("dropout|pdrop", k) and type(v) in (int, float)]
        options = {"dtype": DTYPES[dtype], "trust_remote_code": False, "output_loading_info": True}
        lm, found = AutoModelForCausalLM.from_pretrained(name, **options, **dict.fromkeys(rates, dropout))
    except Exception as error:  # of many kinds
        fail(f"{name} is no causal language model, in a folder or on the hub: {reason(error)}")
    if found["missing_keys"]:
        lacking = ", ".join(sorted(found["missing_keys"])[:3])
        fail(f"{name} is no causal language model: it has no weights for {lacking}")
    if not is_causal(lm.eval()):
        fail(f"{name} is no causal language model: its tokens look at those after them")
    return lm


def fingerprint(model):
    """-> a hash of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def add_adapter(lm, kind, rank, alpha, dropout, targets, n_virtual):
    """
    Freeze a model and put an adapter on it: "lora" (Hu et al. 2021, arXiv:2106.09685) adds a product of two
    small matrices to those of its layers; "p_tuning" (Liu et al. 2021, arXiv:2103.10385) learns vectors that
    stand before every text like a prompt, as the output of a small network.
    """
    import peft

    names = targets if targets == "all-linear" else targets.split(",")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft to itself
        if kind == "lora":
            can = {n for n, m in lm.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)}
            can = {n for n in can if lm.get_submodule(n).weight.ndim == 2}
            for name in names if isinstance(names, list) else []:
                if not any(n == name or n.endswith(f".{name}") for n in can):
                    known = sorted({n.rpartition(".")[2] for n in can})
                    fail(f"lora_targets: the model has no layer {name!r}; it has {', '.join(known)}")
            how = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": names}
            config = peft.LoraConfig(task_type="CAUSAL_LM", **how)
        else:
            width = lm.get_input_embeddings().embedding_dim
            how = {"num_virtual_tokens": n_virtual, "encoder_hidden_size": width}
            config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", **how)
        try:
            lm = peft.get_peft_model(lm, config)
        except ValueError as error:
            fail(f"adapter={kind!r} does not fit this model: {error}")
    for weight in lm.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data  # also above a bf16 model
    return lm


def load_base():
    """-> what init_from names: the GPT of a run of ours or a Pretrained, with the adapter asked for."""
    path = Path(init_from).expanduser()
    if not path.exists() and (init_from[0] in "./~" or init_from.count("/") > 1):
        fail(f"there is no folder {init_from!r}")
    if (path / "adapter_config.json").exists():
        merged = f"python sample.py --out_dir={init_from} --merge=FOLDER"
        fail(f"{init_from} holds an adapter, not a whole model: make one of it first, by {merged}")
    try:
        old = (
            json.loads((path / "run.json").read_text(encoding="utf-8"))
            if (path / "run.json").exists()
            else None
        )
        ours = old and "n_layer" in old["model"] and not adapter
        if ours:
            model = GPT(Shape(**old["model"] | {"dropout": dropout}))
            model.load_state_dict(load_file(path / "model.safetensors"))
    except Exception as error:  # a foreign file fails in many ways
        fail(f"{init_from=} is no run that can be loaded: {reason(error)}")
    if ours and base_dtype != "fp32":
        fail(f"{base_dtype=} is for models of transformers, and for runs of ours under an adapter")
    if not ours:
        lm = load_causal_lm(str(path.resolve()) if path.exists() else init_from, base_dtype, dropout)
        positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or 0
        base = Base(lm.name_or_path, fingerprint(lm), positions, lm.get_input_embeddings().num_embeddings)
        if adapter:
            torch.manual_seed(seed)
            lm = add_adapter(lm, adapter, lora_rank, lora_alpha, lora_dropout, lora_targets, virtual_tokens)
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        model = Pretrained(lm.train(), base)
    room = model.shape.block_size - (virtual_tokens if adapter == "p_tuning" else 0)
    if model.shape.block_size and block_size > room:
        n = f"{model.shape.block_size} positions of {init_from}, of which an adapter may take some"
        fail(f"{block_size=} is beyond the {n}: at most --block_size={room}")
    return model


# -----------------------------------------------------------------------------
# Data: documents -> splits -> one flat file of tokens per split, kept in the cache folder of `datasets`.
# Rows with answers have two more: which tokens are learned, and where each row begins.
# -----------------------------------------------------------------------------
END = "<|endoftext|>"
ROLES = {"system", "developer", "user", "assistant", "tool"}
CHAT_TEMPLATE = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}\
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant:{% endif %}"""  # for tokenizers that have none
OWN_TOKENIZER = re.compile(r"bytes|char|bpe:\d+")
KINDS = {".txt": "text", ".md": "text", ".py": "text", ".csv": "csv", ".parquet": "parquet"}
KINDS |= {".jsonl": "json", ".json": "json"}
OWN_KIND = "text"  # the kind that read_files reads; the others are for `datasets`
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val"), "validation")
NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages"}
NOT_LIBRARY |= {"pydoc_data", "encodings"}  # generated; tables
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


def read_text(path):
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig") if b"\0" not in raw else fail(f"{path} is a binary file, not text")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text (byte {error.start}): convert it, as with iconv -f latin1 -t utf-8")


def read_files(paths, root):
    """Text files below `root` -> a Dataset with a document for each, and its name."""
    import datasets

    rows = {text_column: [read_text(path) for path in paths]}
    return datasets.Dataset.from_dict(rows | {"name": [path.relative_to(root).as_posix() for path in paths]})


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


def load_library():
    """-> a Dataset with the source of Python's own library, which is on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    tops = [p for p in root.iterdir() if p.name not in NOT_LIBRARY]  # site-packages alone takes a second
    paths = sorted(p for top in tops for p in (top, *top.rglob("*.py")) if p.suffix == ".py")
    paths = [p for p in paths if not NOT_LIBRARY & set(p.relative_to(root).parts)]
    paths = [p for p in paths if not p.name.startswith("_sysconfigdata")]  # differs between machines
    return read_files(paths, root)


def load_documents():
    """
    {split: Dataset}: train and, where the data has them, validation and test. Their columns: "messages", or
    "prompt" and "completion", or "text", whichever is found first.
    """
    loaded = {"train": load_library()} if dataset == "python" else load_splits()
    have = set.intersection(*(set(rows.column_names) for rows in loaded.values()))
    kinds = [{messages_column: "messages"}, {prompt_column: "prompt", completion_column: "completion"}]
    kinds += [{text_column: "text"}]
    kinds.sort(key=lambda kind: all(column == name for column, name in kind.items()))  # those asked for first
    columns = next((kind for kind in kinds if kind.keys() <= have), kinds[-1])
    if "text" not in columns.values():
        log(f"columns: {' and '.join(columns)}")
    for column, name in columns.items():
        feature = loaded["train"].features.get(column)
        if name != "messages" and "string" not in getattr(feature, "dtype", ""):
            near = nearest(column, sorted(have))
            fail(f"{dataset=} has no text column {column!r}: try --{name}_column={near} ({sorted(have)})")
    keep = {column: columns.get(column, column) for column in [*columns, *({"name"} & have - columns.keys())]}
    renamed = {column: name for column, name in keep.items() if column != name}
    return {split: rows.select_columns(list(keep)).rename_columns(renamed) for split, rows in loaded.items()}


def split_documents(documents):
    """{split: Dataset} -> {split: (Dataset, ids)}: a function of data and fractions, not of the seed."""
    import datasets
    import pyarrow.compute as pc

    own, sections = plan_splits(documents)
    own = {split: (documents[split], np.arange(len(documents[split]))) for split in own}
    pool = documents["train"]
    if len(pool) < len(sections) and "text" not in pool.column_names:
        few = f"{dataset=} has {len(pool)} rows for {len(sections)} splits"
        fail(f"{few}: more rows, or --val_fraction=0 --test_fraction=0")
    if len(pool) < len(sections):  # too few documents to deal out: cut the text by position
        text = "".join(text or "" for text in pool["text"])
        ends = np.cumsum([size for _, size in sections])[:-1]  # where each section but the last ends, of 1
        cuts = [0, *(int(end * len(text)) for end in ends), len(text)]
        pool = datasets.Dataset.from_dict({"text": [text[a:b] for a, b in itertools.pairwise(cuts)]})
        order, cuts = np.arange(len(pool)), range(len(sections) + 1)
    else:  # deal out by size, at least one to each section, ordered by a hash of the name or number
        names = map(str, pool["name"] if "name" in pool.column_names else range(len(pool)))
        order = np.argsort([int(hashlib.sha256(name.encode()).hexdigest()[:15], 16) for name in names])
        sections = sections[1:] + sections[:1]
        ends = np.cumsum([size for _, size in sections])[:-1]
        sizes = np.arange(1, len(pool) + 1)  # of rows, each counts as much
        if "text" in pool.column_names:
            sizes = np.cumsum(pc.binary_length(pool.data.column("text")).fill_null(0).to_numpy()[order])
        cuts = [0, *np.searchsorted(sizes, ends * sizes[-1]) + 1, len(pool)]
        for i in range(1, len(sections)):
            cuts[i] = min(max(cuts[i], cuts[i - 1] + 1), len(pool) - len(sections) + i)
    dealt = {split: [] for split, _ in sections}
    for (split, _), (a, b) in zip(sections, itertools.pairwise(cuts)):
        dealt[split].append(order[a:b])
    return own | {split: (pool, np.sort(np.concatenate(ids))) for split, ids in dealt.items()}


def read_batches(rows, ids, size=256):
    """The rows with these ids, in lists that keep the tokenizer's threads busy."""
    for i in range(0, len(ids), size):
        batch = rows[ids[i : i + size].tolist()]
        batch = [dict(zip(batch, values)) for values in zip(*batch.values())]
        for number, row in zip(ids[i : i + size], batch if "messages" in batch[0] else []):
            try:  # a column of `datasets` gives every message the keys that any of them has
                row["messages"] = [
                    {k: v for k, v in m.items() if v is not None} for m in row["messages"] or []
                ]
            except (TypeError, AttributeError):
                fail(
                    f"{dataset=}, row {number}: {messages_column} is no list of messages: {row['messages']!r}"
                )
            for message in row["messages"]:
                if message.get("role") not in ROLES or not isinstance(message.setdefault("content", ""), str):
                    need = f"a message needs a role ({', '.join(sorted(ROLES))}) and a text as content"
                    fail(f"{dataset=}, row {number}: {need}, not {message}")
        yield batch


def text_of(row):
    """All that a row says, for a tokenizer to learn from."""
    if "messages" in row:
        return "".join(f"{message['role']}: {message['content']}\n" for message in row["messages"])
    return "".join(row[column] or "" for column in ("text", "prompt", "completion") if column in row)


def make_tokenizer(name, splits):
    """-> a fast tokenizer of transformers. Only bpe learns from text, and it sees the train split alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not OWN_TOKENIZER.fullmatch(name):
        try:
            Path(name).exists() or reach_hub()
            tok = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # of many kinds
            fail(f"{name!r} is no tokenizer, in a folder or on the hub: {reason(error)}")
        if not tok.is_fast or tok.eos_token_id is None:
            fail(f"the tokenizer {name!r} must be a fast one with an end-of-text token")
        return tok
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each of the 256 bytes
    if name == "char":
        batches = itertools.chain.from_iterable(read_batches(*split) for split in splits.values())
        vocabulary = sorted(set().union(*(text_of(row) for rows in batches for row in rows)))
        core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    else:
        core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "bytes")
        core.decoder = decoders.ByteLevel()
    if name.startswith("bpe:"):
        options = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
        trainer = trainers.BpeTrainer(vocab_size=int(name[4:]), **options)
        texts = (text_of(row) for rows in read_batches(*splits["train"]) for row in rows)
        core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END, pad_token=END)


def vocab_size(tok):
    """One more than the largest id: some tokenizers have gaps."""
    return 1 + max(tok.get_vocab().values())


def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 65536 else np.uint32


def to_ids(encode_batch, texts):
    try:
        return encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # the library raises no narrower one
        fail(f"the tokenizer cannot represent all of the text ({error}): try --tokenizer=bytes")


def begin_of_text(tok):
    """The ids that a model with this tokenizer is used to seeing before a text: none, or one."""
    return [tok.bos_token_id] if tok("")["input_ids"][:1] == [tok.bos_token_id] else []


def tokenize(tok, rows, ids, path, digest):
    """Write the tokens of a split to `path`, an end-of-text token behind each document; -> its numbers."""
    core, begin, count = tok.backend_tokenizer, begin_of_text(tok), np.zeros(3, dtype=int)
    dtype = token_dtype(vocab_size(tok))
    core.encode_special_tokens = True  # an end-of-text token spelled out in a document is just text
    # Our own tokenizers never join a line break to what is before it: the threads share long texts there.
    own = tok.name_or_path == ""  # it was not loaded from anywhere
    piece = re.compile(r"[\s\S]{65536,}?\S(?=\n)|[\s\S]+" if own else r"[\s\S]+")
    with open(path, "wb") as f:
        batches = read_batches(rows, ids)
        for batch in tqdm(batches, "tokenizing", -(-len(ids) // 256), disable=None, leave=False):
            texts = [row["text"] for row in batch if row["text"]]
            pieces = [piece.findall(text) for text in texts]
            encoded = iter(to_ids(core.encode_batch_fast, [p for ps in pieces for p in ps]))
            for text, parts in zip(texts, pieces):
                tokens = itertools.chain(begin, *(next(encoded).ids for _ in parts), [tok.eos_token_id])
                tokens = np.fromiter(tokens, dtype)
                digest.update(tokens)
                tokens.tofile(f)
                count += (1, len(text.encode()), len(tokens))
    core.encode_special_tokens = False
    return dict(zip(("documents", "bytes", "tokens"), count.tolist()))


def cut_conversation(tok, messages):
    """
    A conversation -> rows, each a list of (text, whether it is learned): the assistant's turns are. Such a
    turn is what the chat template adds to the prompt for it, so training sees what a chat will show. Some
    templates write an earlier turn in another way than the last one (Qwen3 leaves out its thoughts); then
    each answer becomes a row of its own, with what a chat would show before it.
    """

    def render(n, **options):
        try:
            return tok.apply_chat_template(messages[:n], tokenize=False, **options)
        except Exception as error:  # a template may raise what it likes
            fail(f"the chat template of the tokenizer refuses {messages[:n]}: {reason(error)}")

    rows, whole, text, fits = [], [], "", True
    for i, message in enumerate(messages):
        said = message["content"].strip() or "tool_calls" in message
        if message["role"] == "assistant" and said and i > 0:  # an opening word answers nothing
            before, after = render(i, add_generation_prompt=True), render(i + 1)
            if not after.startswith(before):
                how = "an answered conversation does not begin with the prompt for the answer"
                fail(f"the chat template cannot tell the assistant's words: {how} ({after[:200]!r})")
            fits = fits and before.startswith(text)
            rows.append([(before, False), (after[len(before) :], True)])
            whole += [(before[len(text) :], False), (after[len(before) :], True)]
            text = after
    return [whole] if fits and rows else rows


def encode_row(core, encoded, pieces):
    """-> [ids of each piece]: those of the whole text, unless a token would reach over a seam."""
    ends, cuts = [end for _, end in encoded.offsets], np.cumsum([len(text) for text, _ in pieces])
    if np.isin(cuts, [0, *ends]).all():
        parts = np.split(np.array(encoded.ids, dtype=int), np.searchsorted(ends, cuts[:-1], "right"))
        return [part.tolist() for part in parts]
    return [part.ids for part in to_ids(core.encode_batch, [text for text, _ in pieces])]


def label_row(tok, parts, pieces, begin):
    """-> the tokens of a row, of each whether it is learned, and where the last answer begins."""
    eos, tokens, learned = tok.eos_token_id, [*begin], [False] * len(begin)
    for part, (text, learn) in zip(parts, pieces):
        if learn:
            tokens, learned = tokens or [eos], learned or [False]  # nothing comes from nothing
            answer = len(tokens)
        # the end-of-text token of an answer is learned as well, a line break that a template adds is not
        ended = eos in part and text.rstrip().endswith(tok.eos_token)
        n = len(part) - part[::-1].index(eos) if ended else len(part)
        tokens += part
        learned += [learn] * n + [False] * (len(part) - n)
    if not ended:  # a model that has not learned to stop never does
        tokens, learned = [*tokens, eos], [*learned, True]
    return tokens, learned, answer


def tokenize_rows(tok, rows, ids, path, digest):
    """
    As tokenize(), for rows with answers: beside `path`, .learned says of each token whether it is learned,
    and .rows.npy where each row starts, its length and the place of its last answer. -> the split's numbers;
    bytes and tokens are those that are learned.
    """
    core, chats = tok.backend_tokenizer, "messages" in rows.column_names
    begin = [] if chats else begin_of_text(tok)  # a chat template has a begin of its own
    count, table, start, dtype = np.zeros(5, dtype=int), [], 0, token_dtype(vocab_size(tok))
    with open(path, "wb") as f, open(path.with_suffix(".learned"), "wb") as g:
        batches = read_batches(rows, ids)
        for batch in tqdm(batches, "tokenizing", -(-len(ids) // 256), disable=None, leave=False):
            found = []  # rows of pieces: (text, whether it is learned)
            for row in batch:
                if chats:
                    cut = cut_conversation(tok, row["messages"])
                else:
                    cut = [[(row["prompt"] or "", False), (row["completion"] or "", True)]]
                cut = [pieces for pieces in cut if any(text for text, learn in pieces if learn)]
                found += cut
                count += (1, not cut, 0, 0, 0)
            texts = ["".join(text for text, _ in pieces) for pieces in found]
            for encoded, pieces in zip(to_ids(core.encode_batch, texts), found):
                tokens, learned, answer = label_row(tok, encode_row(core, encoded, pieces), pieces, begin)
                table.append((start, len(tokens), answer))
                start += len(tokens)
                n_bytes = sum(len(text.encode()) for text, learn in pieces if learn)
                count += (0, 0, n_bytes, sum(learned), len(tokens))
                for values, file in ((np.array(tokens, dtype), f), (np.array(learned, np.uint8), g)):
                    digest.update(values)
                    values.tofile(file)
    np.save(path.with_suffix(".rows.npy"), np.array(table, dtype=np.int64).reshape(-1, 3))
    return dict(zip(("documents", "without_answer", "bytes", "tokens", "all_tokens"), count.tolist()))


def prepare_data():
    """-> (folder, facts): the folder with {split}.bin and the tokenizer, made once for the same data."""
    documents, name = load_documents(), tokenizer or ("bpe:1024" if init_from == "scratch" else init_from)
    name = os.path.expanduser(name)
    files = [
        p
        for p in sorted(Path(name).glob("*"))
        if re.match(r"tokeniz|special_tok|vocab|merges|.*jinja$", p.name)
    ]
    known = [hashlib.sha256(p.read_bytes()).hexdigest() for p in files] or name
    key = [*(rows._fingerprint for rows in documents.values()), val_fraction, test_fraction, fold, known]
    folder = CACHE / hashlib.sha256(json.dumps([*key, CHAT_TEMPLATE]).encode()).hexdigest()[:24]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # one process makes it, the others wait
            if not (folder / "facts.json").exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left
                folder.mkdir()
                splits, digest = split_documents(documents), hashlib.sha256()
                tok = make_tokenizer(name, splits)
                columns = documents["train"].column_names
                if "messages" in columns and not tok.chat_template:
                    tok.chat_template = "{{ bos_token }}" * len(begin_of_text(tok)) + CHAT_TEMPLATE
                write = tokenize if "text" in columns else tokenize_rows
                counts = {s: write(tok, *splits[s], folder / f"{s}.bin", digest) for s in sorted(splits)}
                tok.save_pretrained(folder)
                first = next(
                    (row for rows in read_batches(*splits["train"]) for row in rows if text_of(row)), {}
                )
                facts = {"splits": counts, "vocab_size": vocab_size(tok), "fingerprint": digest.hexdigest()}
                # the last file: where it is, all are
                write_json(folder / "facts.json", facts | {"begin": text_of(first)[:60]})
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"cannot write the tokens to {folder}: {error.strerror}; HF_HOME names another place for them")
    log(f"data: {dataset}, which begins {facts['begin']!r}")
    log(f"  tokenizer {name}, {facts['vocab_size']:,} tokens")
    for split, n in facts["splits"].items():
        if "all_tokens" in n:
            size = f"{n['all_tokens']:>13,} tokens, {n['tokens']:,} of them learned"
            log(f"  {split:10} {n['documents']:>9,} rows {size}; {n['without_answer']:,} rows have no answer")
            continue
        if n["tokens"] <= (block_size if split == "train" else 1):
            fail(f"the {split} split has only {n['tokens']} tokens: more text, or a smaller block_size")
        size = f"{n['documents']:>9,} documents {n['bytes'] / 1e6:>9.2f} MB {n['tokens']:>13,} tokens"
        log(f"  {split:10} {size}, {n['bytes'] / n['tokens']:.2f} bytes each")
    return folder, facts


def same_everywhere(facts, shape):
    """End the program if the machines of a run do not have the same data and pretrained weights."""
    if len(set(gather_object([(facts["fingerprint"], getattr(shape, "fingerprint", ""))]))) > 1:
        fail(f"{dataset=} or {init_from=} is not the same on all machines: copy it from one to the others")


class Tokens(torch.utils.data.Dataset):
    """
    A split of text as the samples of a run. Each epoch cuts the text into blocks of T tokens from a fresh
    offset and goes through them in a fresh order, both functions of (seed, epoch). So sample i of all is a
    function of (seed, i): a resume, other processes or micro-batches cannot change what a step sees.
    """

    def __init__(self, path, dtype, T, seed):
        self.path, self.dtype, self.T, self.seed = path, dtype, T, seed
        self.n_tokens = os.path.getsize(path) // np.dtype(dtype).itemsize
        self.n_blocks = max(1, (self.n_tokens - T) // T)  # whole blocks in an epoch, whatever the offset
        self.end = self.n_tokens  # a block from here on is empty
        self.epoch = self.tokens = None  # opened by the process that reads: a memory map does not travel

    def __len__(self):
        return self.n_blocks

    def __getitem__(self, samples):
        """samples: a list of sample numbers -> (x, y), both (len(samples), T)"""
        starts = []
        for epoch, block in (divmod(i, self.n_blocks) for i in samples):
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.offset = rng.integers(min(self.T, self.n_tokens - self.n_blocks * self.T))
                self.order, self.epoch = rng.permutation(self.n_blocks), epoch
            starts.append(self.offset + self.order[block] * self.T)
        return self.read(starts)

    def read(self, starts):
        """-> (x, y), both (len(starts), T): y holds the token after each of x, -100 where the text ended."""
        self.tokens = np.memmap(self.path, self.dtype, mode="r") if self.tokens is None else self.tokens
        rows = np.full((len(starts), self.T + 1), -100, dtype=np.int64)
        for row, start in zip(rows, starts):
            piece = self.tokens[start : start + self.T + 1]
            row[: len(piece)] = piece
        rows = torch.from_numpy(rows)
        return rows[:, :-1].clamp(min=0), rows[:, 1:].contiguous()

    def in_order(self):
        """The starts of all blocks, for an evaluation."""
        return np.arange(0, self.n_tokens - 1, self.T)

    def count(self, samples):
        """How many tokens these samples hold."""
        return len(samples) * self.T

    def prompt(self):
        """The first tokens, for a sample of what the model makes of them."""
        return self.read([0])[0][0, :16].tolist()


class Rows(torch.utils.data.Dataset):
    """
    A split of rows with answers as the samples of a run; a row longer than T + 1 tokens is cut on the left of
    its last answer, or dropped. Each epoch is shuffled; within pools of 64 batches rows are then sorted by
    length, so that little is padded, and the batches are dealt out in a fresh order. All this is a function
    of (seed, epoch), and so, as in Tokens, sample i of all is one of (seed, i).
    """

    def __init__(self, path, dtype, T, seed, batch_size, cut):
        self.path, self.dtype, self.seed, self.batch_size = path, dtype, seed, batch_size
        self.start, length, answer = np.load(path.with_suffix(".rows.npy")).T
        long = length > T + 1
        lost = long & ((answer < length - T) | (not cut))  # the last answer is to be learned whole
        self.dropped, self.cut = int(lost.sum()), int((long & ~lost).sum())
        self.start, length, answer = self.start[~lost], length[~lost], answer[~lost]
        self.skip = np.maximum(length - (T + 1), 0)
        self.length, self.answer = length - self.skip, answer - self.skip
        self.end = len(self)  # a row from here on is empty
        self.epoch = self.tokens = None

    def __len__(self):
        return len(self.start)

    def __getitem__(self, samples):
        """samples: a list of sample numbers -> (x, y, kept), as of read()"""
        return self.read(self.find(samples))

    def find(self, samples):
        """The rows that have these sample numbers."""
        rows = []
        for epoch, i in (divmod(i, len(self)) for i in samples):
            if epoch != self.epoch:
                self.order, self.epoch = self.shuffle(epoch), epoch
            rows.append(self.order[i])
        return rows

    def shuffle(self, epoch):
        """The rows in the order of an epoch."""
        rng, n, B = np.random.default_rng([self.seed, epoch]), len(self), self.batch_size
        first = min(n, -epoch * n % B)  # so many rows fill the batch that the epoch before has begun
        last = (n - first) % B  # and so many begin the one that the next epoch fills
        head, middle, tail = np.split(rng.permutation(n), [first, n - last])
        for i in range(0, len(middle), 64 * B):
            pool = middle[i : i + 64 * B]
            middle[i : i + 64 * B] = pool[np.argsort(self.length[pool], kind="stable")]
        return np.concatenate([head, rng.permutation(middle.reshape(-1, B)).ravel(), tail])

    def read(self, rows):
        """
        -> x, y (len(rows), T), padded on the right to the longest row: y holds the token after each of x
        where that is to be learned, else -100; kept (K,): the positions where any row has something to learn.
        """
        if self.tokens is None:
            self.tokens = np.memmap(self.path, self.dtype, mode="r")
            self.learned = np.memmap(self.path.with_suffix(".learned"), np.uint8, mode="r")
        longest = max((self.length[row] for row in rows if row < self.end), default=2)
        x, y = np.zeros((len(rows), longest), dtype=np.int64), np.full((len(rows), longest), -100)
        for i, row in enumerate(rows):
            if row < self.end:
                n, a = self.length[row], self.start[row] + self.skip[row]
                x[i, :n] = self.tokens[a : a + n]
                x[i, 0] = self.tokens[self.start[row]]  # of a cut row too: a begin-of-text token stays
                y[i, :n] = np.where(self.learned[a : a + n], x[i, :n], -100)
        x, y = torch.from_numpy(x[:, :-1]).contiguous(), torch.from_numpy(y[:, 1:]).contiguous()
        return x, y, (y != -100).any(dim=0).nonzero()[:, 0]

    def in_order(self):
        """All rows, for an evaluation: the longest first, so that memory runs out at once or not at all."""
        return np.argsort(-self.length, kind="stable")

    def count(self, samples):
        """How many tokens these samples hold, without padding."""
        return int((self.length[self.find(samples)] - 1).sum())

    def prompt(self):
        """What stands before the last answer of the first row."""
        return self.read([0])[0][0, : self.answer[0]].tolist()


def load_tokens(folder, facts):
    """{split: Tokens or Rows}: the splits that prepare_data wrote."""
    splits, dtype = {}, token_dtype(facts["vocab_size"])
    for split, n in facts["splits"].items():
        path = folder / f"{split}.bin"
        if "all_tokens" not in n:
            splits[split] = Tokens(path, dtype, block_size, seed)
            continue
        rows = splits[split] = Rows(path, dtype, block_size, seed, batch_size, too_long == "cut")
        n |= {"too_long_cut": rows.cut, "too_long_dropped": rows.dropped}
        if rows.cut or rows.dropped:
            log(f"  {split:10} {rows.cut:,} rows are too long and were cut, {rows.dropped:,} dropped")
        if not len(rows):
            fail(f"the {split} split has no row with an answer that fits in {block_size=}")
    return splits


def sample_numbers(first_step, last_step, micro, accumulation, rank):
    """The samples of each micro-batch of this process: rank 0 has the first slice of the batch, and so on."""
    for step in range(first_step, last_step):
        for i in range(accumulation):
            first = step * batch_size + (rank * accumulation + i) * micro
            yield list(range(first, first + micro))


# -----------------------------------------------------------------------------
# Optimizers and learning rate
# -----------------------------------------------------------------------------


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


def make_optimizers(gpt, precision):
    """
    Muon (Jordan 2024, kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal; that is for
    the matrices in the blocks. Embedding and head are tables of vectors, and AdamW's. What somebody else has
    trained, most likely with AdamW, goes on with that.
    """
    if optimizer == "adamw" or init_from != "scratch":
        default = {"lora": 2e-4, "p_tuning": 1e-3}.get(adapter, 0.001 if init_from == "scratch" else 5e-5)
        trained = [p for p in gpt.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay}]
        groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]  # biases, norms
        groups = [group for group in groups if group["params"]]
        return [torch.optim.AdamW(groups, learning_rate or default, betas=(beta1, beta2), fused=True)]
    tables = [{"params": gpt.model.embed_tokens.parameters(), "lr": embed_lr}]
    tables += [{"params": gpt.lm_head.parameters(), "lr": head_lr}]
    matrices = gpt.model.layers.parameters()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    muon = Muon(matrices, learning_rate or 0.02, weight_decay, momentum=0.95, dtype=dtype)
    return [muon, torch.optim.AdamW(tables, betas=(beta1, beta2), weight_decay=0.0, fused=True)]


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


def forward_backward(accelerator, model, micro_batches, step):
    """
    Add up the gradient of the mean loss over all valid tokens of the global batch; -> this process's share of
    it. Each backward pass divides by the number of tokens in all processes and micro-batches. So the gradient
    does not depend on how the batch is cut up, as it would if the mean losses of micro-batches were added up.
    """
    n_valid = sum(int((y != -100).sum()) for _, y, *_ in micro_batches)
    n_valid = torch.tensor(n_valid, device=accelerator.device)
    n_valid = accelerator.reduce(n_valid, "sum").clamp(min=1)
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(micro_batches):
        batch = [t.to(accelerator.device, non_blocking=True) for t in batch]
        key = np.random.SeedSequence([seed, step, accelerator.process_index, i])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))  # for dropout
        # gradients travel between processes once a step; with FSDP2 they would fill the memory until then
        now = i == len(micro_batches) - 1 or accelerator.is_fsdp2
        with contextlib.nullcontext() if now else accelerator.no_sync(model):
            try:
                with accelerator.autocast(), NaNFinder() if detect_anomaly else contextlib.nullcontext():
                    loss = model(*batch)
                # DDP and FSDP2 take the mean over processes
                accelerator.backward(loss * accelerator.num_processes / n_valid)
            except (FloatingPointError, RuntimeError) as error:  # by NaNFinder, or by torch's anomaly mode
                if not detect_anomaly or "nan" not in str(error).lower():
                    raise
                raise SystemExit(f"step {step}: {error}") from None
        total += loss.detach()
    return total / n_valid


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


def evaluate(accelerator, model, name, data, n, micro, batches):
    """
    -> the loss of a split in three units, or None when a signal asks to stop. Every process takes its share.
    n: how many tokens and bytes the split has. batches: of batch_size samples, spread evenly; 0: all of it.
    """
    samples = data.in_order()
    if 0 < batches * batch_size < len(samples):
        samples = samples[np.linspace(0, len(samples) - 1, batches * batch_size).astype(int)]
    at_once = micro * accelerator.num_processes
    # empty ones, so that all processes have as many
    samples = np.append(samples, np.full(-len(samples) % at_once, data.end))
    losses, n_valid = [], 0
    model.eval()
    for i in range(accelerator.process_index * micro, len(samples), at_once):
        if stop_requested(accelerator):
            break
        batch = data.read(samples[i : i + micro])
        n_valid += int((batch[1] != -100).sum())
        with torch.no_grad(), accelerator.autocast():
            losses.append(model(*(t.to(accelerator.device) for t in batch)))
    model.train()
    if len(losses) * at_once < len(samples):
        return None
    shares = gather_object([(torch.stack(losses).cpu().double().sum().item(), n_valid)])
    loss = sum(loss for loss, _ in shares) / sum(n for _, n in shares)
    bits = loss / math.log(2) * n["tokens"] / n["bytes"]  # per byte of text: comparable across tokenizers
    perplexity = math.exp(min(loss, 700))
    return {f"{name}/loss": loss, f"{name}/perplexity": perplexity, f"{name}/bits_per_byte": bits}


def add_base_loss(accelerator, model, gpt, values, *how):
    """The first evaluation's values, with base/loss: that of the model, which is still what it was."""
    before = values
    if adapter == "p_tuning":  # it is, but for a prompt of random vectors
        gpt.n_virtual = 0
        with gpt.lm.disable_adapter():
            before = evaluate(accelerator, model, "val", *how)
        gpt.n_virtual = virtual_tokens
    return before and values | {"base/loss": before["val/loss"]}


@torch.no_grad()
def write_sample(accelerator, gpt, tok, prompt, step):
    """
    Let the model continue `prompt` (token ids) from a fixed seed, in samples/step_N.txt. All processes do
    so in step: with FSDP2 each has a part of the weights.
    """
    gpt.eval()
    device = accelerator.device
    if isinstance(gpt, Pretrained):
        torch.manual_seed(seed)  # every step sets its own
        room = gpt.shape.block_size - gpt.n_virtual - len(prompt) if gpt.shape.block_size else 200
        how = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
        how["max_new_tokens"] = min(200, max(1, room))
        x = torch.tensor([prompt], device=device)
        how |= {"attention_mask": torch.ones_like(x), "synced_gpus": accelerator.num_processes > 1}
        new = gpt.generate(input_ids=x, **how)[0, len(prompt) :].tolist()
    else:
        rng = torch.Generator(device).manual_seed(seed)
        new = [int(token) for token in gpt.generate([prompt], 200, temperature=0.8, rng=rng)]
        new = new[: new.index(tok.eos_token_id) + 1] if tok.eos_token_id in new else new
    gpt.train()
    if accelerator.is_main_process:
        path = Path(out_dir, "samples", f"step_{step:08d}.txt")
        path.write_text(tok.decode(prompt + new), encoding="utf-8")


# -----------------------------------------------------------------------------
# The run directory: weights that transformers loads, checkpoints that a resume continues bit for bit
# -----------------------------------------------------------------------------
KIND = "lm"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy")
STATE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
DATA_SETTINGS = {"dataset", "tokenizer", "val_fraction", "test_fraction", "fold"}
DATA_SETTINGS |= {"text_column", "prompt_column", "completion_column", "messages_column"}
MODEL_SETTINGS = {
    "block_size",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "optimizer",
    "init_from",
    "base_dtype",
}
MODEL_SETTINGS |= {"adapter", "lora_rank", "lora_alpha", "lora_targets", "virtual_tokens", "too_long"}


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


def is_native(shape, config):
    """
    Whether transformers computes with `config` what our GPT computes: compared on random weights, because the
    zeros that training starts from would hide most of the model.
    """
    from transformers import NanoChatForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        ours, theirs = GPT(shape).eval(), NanoChatForCausalLM(config).eval()
        for weight in ours.parameters():
            nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
        idx = torch.randint(shape.vocab_size, (1, min(1024, shape.block_size)))
        try:
            theirs.load_state_dict(ours.state_dict())
            return torch.allclose(ours(idx), theirs(idx).logits, atol=1e-3)
        except RuntimeError:  # other names, other sizes
            return False


def write_config(shape, tok):
    """config.json and generation_config.json: they make the run directory a model of transformers."""
    from transformers import NanoChatConfig

    # every field of it: the defaults are another model's
    fields = {"vocab_size": shape.vocab_size, "max_position_embeddings": shape.block_size, "dtype": "float32"}
    fields |= {"hidden_size": shape.n_embd, "intermediate_size": 4 * shape.n_embd}
    fields |= {"num_attention_heads": shape.n_head, "num_key_value_heads": shape.n_kv_head}
    fields |= {"num_hidden_layers": shape.n_layer, "attention_bias": False}
    fields |= {"attention_dropout": shape.dropout, "hidden_act": "relu2", "rms_norm_eps": 1e-6}
    fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    fields |= {"final_logit_softcapping": 15.0}
    fields |= {"tie_word_embeddings": False, "pad_token_id": None, "architectures": ["NanoChatForCausalLM"]}
    ends = {"bos_token_id": tok.eos_token_id, "eos_token_id": tok.eos_token_id}
    config = NanoChatConfig(**fields, **ends)
    written = config.to_dict()
    if not is_native(shape, config):
        del written["model_type"], written["architectures"]
        log("edited model: only sample.py loads this run")
    write_json(Path(out_dir, "config.json"), written)
    write_json(Path(out_dir, "generation_config.json"), ends | {"pad_token_id": tok.eos_token_id})


def save_weights(accelerator, model, tok):
    """Make the run directory a model: its weights, or those of its adapter, and what describes them."""
    weights, gpt = dcp.get_model_state_dict(model, options=STATE), accelerator.unwrap_model(model)
    if not adapter:
        frozen = frozen_weights(accelerator, model).items()
        weights |= {name: whole(weight.detach()).cpu() for name, weight in frozen}
    in_parts = adapter == "p_tuning" and accelerator.is_fsdp2
    if in_parts:
        gpt.unshard()  # its prompt is about to be computed
    if accelerator.is_main_process and isinstance(gpt, Pretrained):
        unfinished = Path(out_dir, "unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        one, all_names = (gpt.named_parameters(remove_duplicate=only) for only in (True, False))
        others = dict(all_names).keys() - dict(one).keys()  # second names of a weight, as of a tied head
        state = {name.removeprefix("lm."): w for name, w in weights.items() if name not in others}
        how = {"save_embedding_layers": False} if adapter else {}
        gpt.lm.save_pretrained(unfinished, state_dict=state, **how)
        for path in sorted(unfinished.iterdir()):
            if path.suffix != ".md":  # a model card without content
                write_file(Path(out_dir, path.name), lambda temporary, path=path: path.rename(temporary))
        shutil.rmtree(unfinished)
    elif accelerator.is_main_process:
        if not Path(out_dir, "config.json").exists():
            write_config(gpt.shape, tok)
        path = Path(out_dir, "model.safetensors")
        write_file(path, lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    if in_parts:
        gpt.reshard()
    accelerator.wait_for_everyone()


def load_weights(accelerator, model):
    """Put back what save_weights has kept, to meet the test split."""
    gpt, weights = accelerator.unwrap_model(model), {}
    if accelerator.is_main_process and isinstance(gpt, GPT):
        weights = load_file(Path(out_dir, "model.safetensors"))
    elif accelerator.is_main_process and adapter:
        weights = load_file(Path(out_dir, "adapter_model.safetensors"))
        # peft leaves its own name for the adapter out of those of the matrices
        weights = {re.sub("(lora_(embedding_)?[AB])", r"\1.default", name): w for name, w in weights.items()}
    elif accelerator.is_main_process:  # transformers may have other names in files than in memory
        weights = type(gpt.lm).from_pretrained(out_dir, dtype=gpt.lm.dtype).state_dict()
    if adapter == "p_tuning":  # its prompt was kept, not what had made it
        gpt.lm.active_peft_config.inference_mode = True
        names = {"prompt_embeddings": "prompt_encoder.default.embedding.weight"}
        weights = {names[name]: weight for name, weight in weights.items()}
    if isinstance(gpt, Pretrained):
        weights = {f"lm.{name}": weight for name, weight in weights.items()}
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


def keep_script(gpt, tok):
    """The script as it runs, and the tokenizer, beside run.json."""
    script = Path(out_dir, "train_lm.py")
    if isinstance(gpt, GPT) and script.exists() and script.read_bytes() != Path(__file__).read_bytes():
        Path(out_dir, "config.json").unlink(missing_ok=True)  # to be made again, for the model as it is now
    shutil.copyfile(__file__, script)
    tok.save_pretrained(out_dir)


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

    # data and model; a pretrained one first, so that a wrong name costs no tokenizing
    gpt = load_base() if init_from != "scratch" else None
    folder, facts = prepare_data()
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    if gpt is not None and facts["vocab_size"] > gpt.shape.vocab_size:
        sizes = f"{facts['vocab_size']} tokens, {init_from} knows {gpt.shape.vocab_size}"
        fail(f"the tokenizer has {sizes}: take the model's own, or call its resize_token_embeddings() first")
    splits = load_tokens(folder, facts)
    train = splits["train"]
    total_steps = math.ceil(epochs * len(train) / batch_size) if epochs else max_steps
    torch.manual_seed(seed)
    if gpt is None:
        gpt = GPT(
            Shape(facts["vocab_size"], block_size, n_layer, n_head, n_kv_head or n_head, n_embd, dropout)
        )
    gpt.gradient_checkpointing = gradient_checkpointing  # a Pretrained has its own
    same_everywhere(facts, gpt.shape)
    optimizers = make_optimizers(gpt, accelerator.mixed_precision)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    peak_flops = accelerator.num_processes * next((f for name, f in PEAK_FLOPS.items() if name in gpu), 0)
    if compile and device == "cuda" and not detect_anomaly:
        blocks = [part for part in gpt.modules() if type(part).__name__ in gpt._no_split_modules]
        torch._dynamo.config.recompile_limit = 64  # blocks of many widths share their code
        for part in blocks if accelerator.is_fsdp2 and blocks else [gpt]:
            part.compile()  # in place: the parameters keep their names
    model, *steppers = accelerator.prepare(gpt, *optimizers)
    if accelerator.is_fsdp2:
        model.set_reshard_after_forward(True)  # weights that are gathered anew for each use are never stale
        if isinstance(gpt, Pretrained):
            register_fsdp_forward_method(gpt, "generate")

    # the run
    run = describe_run(accelerator, gpt, facts)
    found = broadcast_object_list([start_run(run) if on_main else None])[0]
    if on_main:
        keep_script(gpt, tok)
    progress = {"step": 0, "best": math.inf, "waited": 0, "skipped": 0, "skipped_in_a_row": 0, "seconds": 0.0}
    progress |= {"metrics_bytes": 0, "tracker_id": uuid.uuid4().hex[:8]}
    if found:
        progress = load_checkpoint(accelerator, model, optimizers, found)
    progress = broadcast_object_list([progress])[0]
    metrics = open_metrics(progress["metrics_bytes"]) if on_main else None
    if tracker:
        start_tracker(accelerator, progress["tracker_id"])
    rates = f"peak learning rates {', '.join(f'{p:g}' for p in peaks)}"
    name = "model" if init_from == "scratch" else f"model: {init_from} {adapter}".rstrip()
    log(f"{name}: {run['parameters']:,} parameters, {run['trained_parameters']:,} trained; {rates}")
    parts = f"{accelerator.num_processes} processes x {accumulation} micro-batches x {micro}"
    log(f"batch: {batch_size} samples of up to {block_size} tokens = {parts}")
    log(f"length: {total_steps} steps, {total_steps * batch_size / len(train):.2f} epochs")

    saved, clock = progress["step"], time.monotonic() - progress["seconds"]
    numbers = sample_numbers(saved, total_steps, micro, accumulation, accelerator.process_index)
    options = {"num_workers": num_workers, "pin_memory": device == "cuda", "generator": torch.Generator()}
    batches = iter(torch.utils.data.DataLoader(train, batch_size=None, sampler=numbers, **options))
    groups = [group for o in optimizers for group in o.param_groups]
    prompt = splits.get("validation", train).prompt()
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
                # first these: a run that goes on from the checkpoint has nothing more to write
                if keep == "last" or "validation" not in splits:
                    save_weights(accelerator, model, tok)
                progress["seconds"] = time.monotonic() - clock
                progress["metrics_bytes"] = metrics.tell() if metrics else 0
                save_checkpoint(accelerator, model, optimizers, progress)
                saved = step
            if stop:
                break
            if eval_due and "validation" in splits:
                how = (splits["validation"], facts["splits"]["validation"], micro, eval_batches)
                values = evaluate(accelerator, model, "val", *how)
                if values and step == 0 and init_from != "scratch":
                    values = add_base_loss(accelerator, model, gpt, values, *how)
                if values is None:  # a signal came: save, then leave
                    continue
                report(values)
                progress |= {"base": values["base/loss"]} if "base/loss" in values else {}
                # nobody wants the weights of step 0
                better = values["val/loss"] < progress["best"] and (step > 0 or done)
                progress["waited"] = 0 if better else progress["waited"] + (step > 0)
                progress["best"] = values["val/loss"] if better else progress["best"]
                if better and keep == "best":
                    save_weights(accelerator, model, tok)
            if eval_due:
                with torch.compiler.set_stance("force_eager"):  # each new length would be compiled anew
                    write_sample(accelerator, gpt, tok, prompt, step)
            if done or 0 < patience <= progress["waited"]:
                break
            if eval_due or step == saved:
                since, n_tokens = time.monotonic(), 0  # speed is measured between evaluations

            set_learning_rates(groups, peaks, step, total_steps)
            micro_batches = [next(batches) for _ in range(accumulation)]
            loss, grad_norm, finite = train_step(accelerator, model, steppers, micro_batches, step)
            n_tokens += train.count(range(step * batch_size, (step + 1) * batch_size))
            progress["step"] = step = step + 1
            count_skipped(progress, finite, saved)
            if step % log_interval == 0 or step == total_steps:
                speed = n_tokens / (time.monotonic() - since)
                since, n_tokens = time.monotonic(), 0
                memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
                values = {"train/loss": loss, "lr": groups[0]["lr"], "grad_norm": grad_norm}
                values |= {"tokens_per_s": speed, "epoch": step * batch_size / len(train)}
                values |= {"mfu": speed * gpt.flops_per_token(block_size) / peak_flops} if peak_flops else {}
                report(values | {"memory": memory / 1e9})
            bar.update()
            if profiler:
                profiler.step()
    bar.close()

    # the end
    if not stop:
        if progress["best"] == math.inf or step == 0:  # no weights have been kept
            save_weights(accelerator, model, tok)
        if on_main and isinstance(gpt, GPT) and not Path(out_dir, "config.json").exists():
            write_config(gpt.shape, tok)
        load_weights(accelerator, model)
    summary = {"steps": step, "skipped": progress["skipped"], "minutes": (time.monotonic() - clock) / 60}
    summary |= {"val/loss": progress["best"]} if progress["best"] < math.inf else {}
    summary |= {"base/loss": progress["base"]} if "base" in progress else {}  # of the model before training
    if not stop and "test" in splits:
        values = evaluate(accelerator, model, "test", splits["test"], facts["splits"]["test"], micro, 0)
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
    try:
        main()
    except Exception as error:
        if not re.search(CANNOT_WRITE, str(error)):
            raise
        fail(f"cannot write ({reason(error)}); what was saved is whole, and --resume=True goes on with it")
