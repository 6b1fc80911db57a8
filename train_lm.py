"""
Train a language model: one file with the model, the data and the loop.

    accelerate launch train_lm.py                                       # on Python's own source, anywhere
    accelerate launch train_lm.py configs/shakespeare_char.py --n_layer=8
    accelerate launch train_lm.py --dataset=my_texts/ --tokenizer=bpe:4096 --out_dir=out/mine
    accelerate launch train_lm.py configs/lora_chat.py                  # a pretrained model, taught to chat

Then `python sample.py --out_dir=out/lm --prompt="def "` continues a text. Ctrl-C saves; --resume=True goes on.
"""

import os

PARENT = os.getppid()  # before the slow imports: a launcher may die during them

import contextlib
import ctypes
import glob
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProfileKwargs, broadcast_object_list, gather_object, tqdm
from safetensors.torch import load_model, save_file
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from configurator import configure, fail, named, nearest, settings

# ---- Settings: change them here, in a config file, or by --name=value ----
# the run
out_dir = "out/lm"  # everything that the run writes
resume = False  # True: go on from the checkpoint in out_dir, or start if there is none
overwrite = False  # True: delete the run in out_dir and start anew
seed = 1337  # of the first weights, the order of the data, and dropout
# data
dataset = "python"  # "python" (its own library), a file, folder, glob or URL, or a hub name:config@revision
train_split = "train"  # of a hub data set, where it has another name, as train_sft
text_column = "text"  # the column with the documents, in .jsonl, .parquet, .csv and hub data
prompt_column = "prompt"  # where there are prompts and completions, or messages, the answers are learned
completion_column = "completion"  # of the answers to prompts
tokenizer = ""  # "bytes", "char", "bpe:N" (N learned tokens), hub name, folder; "": init_from's, or bpe:1024
val_fraction = 0.05  # of the data, for the validation split if it has none of its own; 0: no validation
test_fraction = 0.05  # likewise for the test split, which is looked at once, at the end
fold = ""  # "2/5": validate on the second of five parts instead (cross-validation)
num_workers = 0  # DataLoader processes; 0 is fastest for small models, 2 or more where a GPU would wait
# model; with init_from, all but block_size and dropout are as that model has them
init_from = "scratch"  # or a causal language model to go on from: a hub name, a folder, a run of ours
adapter = ""  # train a few new weights and leave those of init_from alone: "lora" or "p_tuning"
block_size = 256  # context length in tokens
dropout = 0.0  # 0 for about one pass over the data, 0.1 to 0.2 where the same text comes by often
n_layer = 4  # transformer blocks
n_head = 2  # attention heads; of size 64 they are fastest
n_kv_head = 1  # heads of keys and values, fewer for grouped-query attention; 0: n_head
n_embd = 128  # width; n_embd / n_head, the size of a head, must be even
# adapter
lora_rank = 16  # of the two matrices whose product is added to a frozen one: how much can be learned
lora_alpha = 32.0  # the product counts lora_alpha / lora_rank times
lora_targets = "all-linear"  # the layers that get one: all but the head, or names, as q_proj,v_proj
virtual_tokens = 20  # p_tuning: how many learned vectors stand before every text
# batch and length
batch_size = 8  # rows of block_size tokens per optimizer step, over all processes and micro-batches
micro_batch_size = 0  # rows per process and forward pass, fewer if memory is short; 0: no accumulation
max_steps = 2000  # optimizer steps; 0: only evaluate
epochs = 0.0  # passes over the data, instead of max_steps; 0: by max_steps
# optimizer and learning rate
optimizer = "muon"  # with AdamW for embedding and head; or "adamw", which init_from always takes
learning_rate = 0.0  # peak; 0: muon 0.03, adamw 0.001, with init_from 5e-5, lora 2e-4, p_tuning 0.001
embed_lr = 0.3  # peak, of the embedding beside muon
head_lr = 0.004  # peak, of the head and of vectors beside muon
beta1 = 0.8  # AdamW's memory of the gradient
beta2 = 0.95  # AdamW's memory of the squared gradient
weight_decay = 0.03  # of the matrices in the blocks; with adamw of all matrices
warmup_steps = 20  # steps in which the learning rate rises to its peak
lr_schedule = "wsd"  # "wsd" (warm-up, stable, decay), "cosine" or "constant"
cooldown = 0.9  # the last part of the steps, in which wsd decays
min_lr = 0.02  # learning rate at the end, as a fraction of its peak
grad_clip = 1.0  # largest norm of the gradient; 0: unlimited
# evaluation, saving, reports
eval_interval = 200  # steps
eval_batches = 20  # batches of batch_size, spread evenly over the validation split; 0: all of it
log_interval = 10  # steps
save_interval = 200  # steps between checkpoints
patience = 0  # stop after so many evaluations without a better validation loss; 0: never
tracker = ""  # beside metrics.jsonl: "wandb" or "tensorboard"
# the machine
mixed_precision = "auto"  # bf16 where the hardware has it, else no; or "bf16", "fp16" (with adamw), "no"
compile = True  # torch.compile on CUDA: a minute at the start, then much faster; has no effect elsewhere
gradient_checkpointing = False  # compute activations again in the backward pass: slower, in less memory
deterministic = False  # bitwise repeatable on CUDA, at some cost in speed; a CPU is always
detect_anomaly = False  # stop at the first NaN in a gradient and show the operation that made it; slow
profile = False  # a trace of three steps for chrome://tracing, in out_dir/profile

# What a resume may not change. A setting of your own that shapes the model belongs here.
FIXED = "dataset train_split text_column prompt_column completion_column tokenizer val_fraction test_fraction"
FIXED += " fold init_from adapter lora_rank lora_targets virtual_tokens optimizer"
FIXED += " block_size n_layer n_head n_kv_head n_embd"
CHOICES = {"adapter": ("", "lora", "p_tuning"), "optimizer": ("muon", "adamw")}
CHOICES |= {"lr_schedule": ("wsd", "cosine", "constant"), "mixed_precision": ("auto", "bf16", "fp16", "no")}


def check_settings():
    """End the program, before any data is touched, for values that cannot work."""
    for name, legal in CHOICES.items():
        if globals()[name] not in legal:
            fail(f"{name}={globals()[name]!r} is none of {', '.join(map(repr, legal))}")
    part = re.fullmatch(r"(\d+)/(\d+)", fold)
    if fold and not (part and 1 <= int(part[1]) <= int(part[2]) > 1):
        fail(f"{fold=}: write --fold=2/5 for the second of five parts")
    if val_fraction + test_fraction >= 1:
        fail(f"{val_fraction=} and {test_fraction=} leave nothing to train on")
    if n_embd % (2 * n_head) or n_head % (n_kv_head or n_head):
        fail(f"{n_embd=} must be a multiple of 2 x {n_head=}, and that of {n_kv_head=}")
    if adapter and init_from == "scratch":
        fail(f"{adapter=} is for a pretrained model: name it, as in --init_from=gpt2")
    if resume and overwrite:
        fail("resume=True goes on with the run that overwrite=True deletes: choose one of them")
    muon = optimizer == "muon" and init_from == "scratch"
    if mixed_precision == "fp16" and (muon or not torch.cuda.is_available()):
        fail("mixed_precision='fp16' needs CUDA and optimizer='adamw': use bf16 or no")
    if tracker and not importlib.util.find_spec(tracker):
        fail(f"{tracker=} is not installed: pip install {tracker}")


# ---- Model: RoPE, QK-norm, squared ReLU; no biases, no learned norms. In transformers it is "nanochat" ----


def norm(x):
    """Each vector divided by its root mean square (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:  # where torch's own takes almost twice as long
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): turn pairs of channels, the further the later."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def attend(q, k, v, dropout):
    """
    softmax(q k^T / sqrt(D)) v, in which each token looks at itself and all before it; one alone looks at all.
    q (B, n_head, T, D), k and v (B, n_kv_head, T, D) -> (B, n_head, T, D)
    """
    T, gqa = q.size(2), k.size(1) < q.size(1)
    if q.device.type == "cpu" and v.dtype == torch.bfloat16 and 1 < T <= 512:
        # The same, written out: in bf16 on CPUs torch's kernel takes about four times as long on short texts.
        if gqa:
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, n_head, T, T)
        scores = scores + torch.full((T, T), -1e9, dtype=v.dtype).triu(1)  # nothing of later tokens
        return F.dropout(scores.softmax(dim=-1, dtype=v.dtype), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1, enable_gqa=gqa)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.dropout = config.hidden_size, config.attention_dropout
        self.n_head, self.n_kv_head = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = C // self.n_head
        self.q_proj = nn.Linear(C, self.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(C, self.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(C, self.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, C, bias=False)

    def forward(self, x, cos, sin, cache=None, start=0):
        B, T, C = x.shape  # D: head_dim
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, n_head, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))  # QK-norm bounds the attention logits
        if cache is not None:  # (2, B, n_kv_head, block_size, D) holds all keys and values so far
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[:, :, :, : start + T].to(q.dtype)  # (B, n_kv_head, start + T, D)
        y = attend(q, k, v, self.dropout * self.training)  # (B, n_head, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())  # squared ReLU: So et al. 2021, arXiv:2109.08668


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp, self.dropout = Attention(config), MLP(config), config.attention_dropout

    def forward(self, x, *attention):
        x = x + F.dropout(self.self_attn(norm(x), *attention), self.dropout, self.training)
        return x + F.dropout(self.mlp(norm(x)), self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer of the shape that a NanoChatConfig of transformers describes."""

    _no_split_modules = ("Block",)  # the parts in which FSDP2 gathers the weights, one after another

    def __init__(self, config):
        super().__init__()
        self.config, self.context = config, config.max_position_embeddings
        layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers})  # transformers' names
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        D = config.hidden_size // config.num_attention_heads  # the size of a head
        frequency = 1.0 / 10000.0 ** (torch.arange(0, D, 2).float() / D)
        angle = torch.outer(torch.arange(self.context).float(), frequency)  # (block_size, D / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def init_weights(self):
        """The first weights. What you add keeps those of its torch module, but for matrices in the blocks."""
        for block in self.model.layers:
            for weight in block.parameters():
                if weight.ndim == 2:
                    nn.init.normal_(weight, std=self.config.hidden_size**-0.5)
            nn.init.zeros_(block.self_attn.o_proj.weight)  # each block starts as the identity
            nn.init.zeros_(block.mlp.fc2.weight)
        if self.lm_head.weight is self.model.embed_tokens.weight:
            nn.init.normal_(self.lm_head.weight, std=0.02)  # tied: a table of zeros would learn nothing
        else:
            nn.init.zeros_(self.lm_head.weight)  # all tokens alike: the loss starts at ln(vocab_size)

    def forward(self, idx, targets=None, cache=None, start=0):
        """
        idx (B, T) -> logits (B, T, V) in fp32; with targets (B, T), the sum of their losses; -100 has none.
        With a cache, idx holds the tokens from position `start` on; the logits are the last one's, (B, 1, V).
        """
        x = norm(self.model.embed_tokens(idx))  # (B, T, C)
        if torch.is_autocast_enabled("cpu"):  # it has been measured there alone
            x = x.bfloat16()  # as the products are: what runs through the blocks takes half the memory
        x = F.dropout(x, self.config.attention_dropout, self.training)
        cos, sin = (t[start : start + idx.size(1)].to(x.dtype) for t in (self.cos, self.sin))  # (T, D / 2)
        for i, block in enumerate(self.model.layers):
            if gradient_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, None if cache is None else cache[i], start)
        x = norm(x if cache is None else x[:, -1:])
        logits = self.lm_head(x).float()  # (B, T, V)
        logits = 15.0 * torch.tanh(logits / 15.0)  # softcap (Gemma 2, arXiv:2408.00118): no logit runs away
        return logits if targets is None else sum_losses(logits, targets)

    def new_cache(self, n):
        """Room for the keys and values of n texts."""
        config, D = self.config, 2 * self.cos.size(1)
        sizes = (config.num_hidden_layers, 2, n, config.num_key_value_heads, self.context, D)
        return torch.zeros(sizes, dtype=self.lm_head.weight.dtype, device=self.cos.device)

    def flops_per_token(self):
        """Of a training step with full contexts (Chowdhery et al. 2022, arXiv:2204.02311)."""
        multiplied = sum(p.numel() for p in self.parameters()) - self.model.embed_tokens.weight.numel()
        return 6 * multiplied + 12 * self.config.num_hidden_layers * self.config.hidden_size * self.context


def make_gpt(vocab_size, end):
    """-> GPT of the shape that the settings say, with its first weights; end: the id of the end-of-text token."""
    from transformers import NanoChatConfig

    config = NanoChatConfig(
        vocab_size=vocab_size,
        max_position_embeddings=block_size,
        hidden_size=n_embd,
        intermediate_size=4 * n_embd,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        num_key_value_heads=n_kv_head or n_head,
        attention_dropout=dropout,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
        architectures=["NanoChatForCausalLM"],
        dtype="float32",
    )
    torch.manual_seed(seed)
    gpt = GPT(config)
    gpt.init_weights()
    return gpt


def sum_losses(logits, targets):
    """(B, T, V), (B, T) -> the sum of the losses of all targets that are not -100."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def sample_token(logits, temperature, top_k, top_p, rng):
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


@torch.inference_mode()
def generate(model, prompt, n, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0, eos=()):
    """
    Yield the next token of each of n continuations of `prompt` (a list of ids), (n,), until all said an `eos`.
    temperature 0: the likeliest token. Text that outgrows the model's context goes on from its last half.
    """
    device = next(model.parameters()).device
    idx, eos = torch.tensor([prompt] * n, device=device), torch.tensor(eos, dtype=torch.int64, device=device)
    rng, ended = torch.Generator(device).manual_seed(seed), torch.zeros(n, dtype=torch.bool, device=device)
    cache, start = model.new_cache(n), 0
    for _ in range(max_new_tokens):
        if idx.size(1) > model.context:
            idx, cache, start = idx[:, -max(1, model.context // 2) :], model.new_cache(n), 0
        logits = model(idx[:, start:], cache=cache, start=start)[:, -1]  # (n, V)
        start = idx.size(1) if cache is not None else 0
        token = sample_token(logits.float(), temperature, top_k, top_p, rng)  # (n,)
        token = torch.where(ended, idx[:, -1], token)  # who has said it repeats it
        ended |= torch.isin(token, eos)
        yield token
        if len(eos) and ended.all():
            return
        idx = torch.cat((idx, token[:, None]), dim=1)


# ---- Data: documents -> splits -> token ids -> rows of block_size + 1 ids, all in the cache of `datasets` ----
KINDS = {".txt": "text", ".md": "text", ".py": "text", ".csv": "csv", ".parquet": "parquet"}
KINDS |= {".jsonl": "json", ".json": "json"}
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val"), "validation")
NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages"}
NOT_LIBRARY |= {"pydoc_data", "encodings"}  # generated; tables
# Long texts are cut between a word and a line break, where hardly a token reaches across.
PIECE = re.compile(r"[\s\S]{65536,1000000}?\S(?=\n)|[\s\S]{1,1000000}")
END = "<|endoftext|>"


def find_files():
    """-> (kind, {split: [path]}) of the files that `dataset` names; ("hub", {}) for the name of a hub data set."""
    path = Path(sysconfig.get_paths()["stdlib"] if dataset == "python" else dataset).expanduser()
    if re.match("https?://", dataset):
        from datasets import DownloadManager

        with named("dataset", dataset):
            path = Path(DownloadManager().download(dataset))
    if path.is_file():
        return KINDS.get(Path(dataset).suffix.lower(), "text"), {"train": [path]}
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return "saved", {}
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    kinds, splits, skip = {}, {}, NOT_LIBRARY if dataset == "python" else ()
    for p in sorted(found):
        parts = p.relative_to(path).parts if path.is_dir() else p.parts[-1:]
        hidden = any(name[0] == "." or name in skip for name in parts)
        if p.suffix.lower() in ((".py",) if skip else KINDS) and p.is_file() and not hidden:
            names = parts[0], re.sub(r"-\d+-of-\d+$", "", p.stem)  # a folder at the top, or the whole name
            splits.setdefault(next((SPLITS[name] for name in names if name in SPLITS), "train"), []).append(p)
            kinds[KINDS[p.suffix.lower()]] = p
    if len(kinds) > 1:
        fail(f"{dataset=} mixes {' and '.join(kinds)} files: choose some, as in --dataset='folder/*.csv'")
    if not kinds and (path.is_dir() or path.suffix in KINDS or re.match(r"[./~]|.*[*?\[]|(.*/){2}", dataset)):
        fail(f"there is no file or folder {dataset!r} with {' '.join(KINDS)} in it")
    return next(iter(kinds), "hub"), splits


def is_text(path):
    try:
        return path.read_bytes().decode() is not None
    except UnicodeDecodeError:
        return False


def read_text(parts, column):
    """Yield the text between two bytes of each file, in pieces; `last` where a document ends."""
    for path, start, end, size, _ in parts:
        text = Path(path).read_bytes()[start:end].decode(errors="ignore").removeprefix("\ufeff")
        pieces = PIECE.findall(text) or [""]
        for i, piece in enumerate(pieces, 1):
            yield {column: piece, "last": end == size and i == len(pieces)}


def deal(sizes, shares):
    """
    Lay documents in a shuffled row and cut it by position, so that each split has its share of the whole, however
    few or unlike the documents are. shares: [(split, share)] -> {split: [(document, where it begins, ends)]}
    """
    order = np.random.default_rng(0).permutation(len(sizes))
    edges = np.concatenate(([0], np.cumsum(np.array(sizes)[order])))  # where documents begin and end
    ends = np.cumsum([share for _, share in shares])
    bounds = [0, *np.floor(ends[:-1] / ends[-1] * edges[-1]).astype(int), edges[-1]]
    for i in range(len(shares) - 1, 0, -1):
        bounds[i] = min(bounds[i], bounds[i + 1] - 1)  # of a few rows, at least one for each split
    if bounds[1] < 1:
        fail(f"{dataset=} is too small for {len(shares)} splits: try --val_fraction=0 --test_fraction=0")
    dealt = {split: [] for split, _ in shares}
    for (split, _), a, b in zip(shares, bounds, bounds[1:]):
        for i in range(np.searchsorted(edges, a, "right") - 1, np.searchsorted(edges, b, "left")):
            part = max(a - edges[i], 0), min(b, edges[i + 1]) - edges[i]
            dealt[split].append((int(order[i]), *map(int, part)))
    return dealt


def load_documents():
    """{split: Dataset}: train and, where wanted, validation and test: those that the data has, or cut from train."""
    import datasets

    datasets.disable_progress_bars()
    kind, found = find_files()
    with named("dataset", dataset):
        if kind == "saved":
            found = datasets.load_from_disk(os.path.expanduser(dataset))
        elif kind == "hub":
            name, config, revision = re.fullmatch(r"([^:@]*):?([^@]*)@?(.*)", dataset).groups()
            found = datasets.load_dataset(name, config or None, revision=revision or None)
        elif kind != "text":
            names = {split: [str(path) for path in paths] for split, paths in found.items()}
            found = datasets.load_dataset(kind, data_files=names)
    found = found if isinstance(found, dict) else {"train": found}
    if train_split not in found:
        fail(f"{dataset=} has no split {train_split!r}: --train_split= takes one of {', '.join(found)}")
    found = {SPLITS[s]: rows for s, rows in found.items() if s in SPLITS} | {"train": found[train_split]}
    wanted = {"validation": 0.0 if fold else val_fraction, "test": test_fraction}
    own = {split: found[split] for split, share in wanted.items() if share and split in found}
    missing = [(split, share) for split, share in wanted.items() if share and split not in found]
    k, n = map(int, fold.split("/")) if fold else (0, 1)
    rest = (1 - sum(share for _, share in missing)) / n
    shares = [("validation" if i == k else "train", rest) for i in range(1, n + 1)] + missing
    if kind == "text":
        return cut_texts(found["train"], own, shares)
    rows, dealt = found["train"], deal([1] * len(found["train"]), shares)
    return {split: rows.select(sorted(i for i, _, _ in part)) for split, part in dealt.items()} | own


def cut_texts(train, own, shares):
    """Text files -> {split: Dataset}: the files of train cut by `shares`, those that are splits already as they are."""
    import datasets

    files = {path for paths in (train, *own.values()) for path in paths}
    bad = {path for path in files if not is_text(path)}
    if bad:
        log(f"{len(bad)} of {len(files)} files are not UTF-8 text and are skipped, such as {min(bad)}")
        if bad == files:
            fail(f"{min(bad)} is not UTF-8 text: convert it, as with iconv -f latin1 -t utf-8")
    # the time of change is for the cache of `datasets`: a changed file is read again
    stats = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    parts = {split: [(p, 0, stats[p][0]) for p in paths if p not in bad] for split, paths in own.items()}
    train = [path for path in train if path not in bad]
    for split, dealt in deal([stats[path][0] for path in train], shares).items():
        parts[split] = [(train[i], start, end) for i, start, end in dealt]
    for split, some in parts.items():
        how = {"parts": [(str(p), a, b, *stats[p]) for p, a, b in some], "column": text_column}
        parts[split] = datasets.Dataset.from_generator(read_text, gen_kwargs=how)
    return parts


def load_tokenizer(texts):
    """-> a fast tokenizer of transformers. texts: {split: texts}; bpe learns from those of the train split alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = os.path.expanduser(tokenizer or ("bpe:1024" if init_from == "scratch" else init_from))
    if resume and Path(out_dir, "tokenizer.json").exists():
        name = out_dir
    learned = re.fullmatch(r"bpe:(\d+)", name)
    if name not in ("bytes", "char") and not learned:
        with named("tokenizer", name):
            return AutoTokenizer.from_pretrained(name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each of the 256 bytes
    if name == "char":
        characters = sorted(set().union(*itertools.chain(*texts.values())))
        core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    else:
        core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(learned))
        core.decoder = decoders.ByteLevel()
    if learned:
        how = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
        core.train_from_iterator(texts["train"], trainers.BpeTrainer(vocab_size=int(learned[1]), **how))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END, pad_token=END)


def begin_of_text(tok):
    """The ids that a model with this tokenizer is used to seeing before a text: none, or one."""
    return [tok.bos_token_id] if tok("")["input_ids"][:1] == [tok.bos_token_id] else []


def encode_texts(batch, tok, columns):
    """Documents -> token ids. Behind each stands end-of-text, and what the next one begins with."""
    texts, core, end = [text or "" for text in batch[columns[0]]], tok.backend_tokenizer, [tok.eos_token_id]
    core.encode_special_tokens = True  # an end-of-text token spelled out in a document is just text
    with named("tokenizer", tok.name_or_path or tokenizer):
        encoded = core.encode_batch_fast(texts, add_special_tokens=False)
    core.encode_special_tokens = False
    last, end = batch.get("last", [True] * len(texts)), end + begin_of_text(tok)
    ids = [np.array(row.ids + end * z, dtype=np.uint32) for row, z in zip(encoded, last)]
    n_bytes = [len(text.encode()) for text in texts]
    return {"ids": ids, "documents": last, "bytes": n_bytes, "tokens": [len(row) for row in ids]}


def cut_rows(batch, T):
    """Token ids of documents, one after another -> rows of T + 1: the last id of a row is the first of the next."""
    ids = np.concatenate(batch["ids"])
    rows = [ids[i : i + T + 1] for i in range(0, len(ids) - 1, T)]
    return {"ids": rows, "length": list(map(len, rows))}


def prepare_data():
    """-> (tokenizer, {split: rows of token ids}, {split: numbers of documents, bytes, tokens, rows})"""
    splits, sizes = load_documents(), {}
    columns = choose_columns(splits)  # the one with text; or those of prompts and answers: see Fine-tuning
    encode, cut = (encode_texts, cut_rows) if columns == [text_column] else (encode_answers, cut_answers)
    tok = load_tokenizer({split: all_texts(rows, columns) for split, rows in splits.items()})
    if encode is encode_answers and not tok.chat_template:
        tok.chat_template = "{{ bos_token }}" * len(begin_of_text(tok)) + CHAT_TEMPLATE
    for split, rows in splits.items():
        how = {"batched": True, "batch_size": 100, "remove_columns": rows.column_names}
        ids = rows.map(encode, fn_kwargs={"tok": tok, "columns": columns}, **how).with_format("numpy")
        n = sizes[split] = {name: int(np.sum(ids[name][:])) for name in ("documents", "bytes", "tokens")}
        how = {"batched": True, "remove_columns": ids.column_names, "fn_kwargs": {"T": block_size}}
        splits[split] = ids.map(cut, **how).with_format("torch")
        n["rows"] = len(splits[split])
        numbers = f"{n['documents']:,} documents, {n['bytes'] / 1e6:.2f} MB, {n['tokens']:,} tokens to learn"
        log(f"{split}: {numbers}, in {n['rows']:,} rows of at most {block_size} tokens")
        if not n["rows"]:
            fail(f"{dataset=} has nothing to learn in its {split} split: more data, or a larger block_size")
    return tok, splits, sizes


def collate(rows):
    """Rows -> x, y (B, T), padded on the right: y is the token after each of x, -100 where none is learned."""
    x = nn.utils.rnn.pad_sequence([row["ids"] for row in rows], batch_first=True)
    y = [row["labels"] if "labels" in row else row["ids"] for row in rows]
    return x[:, :-1], nn.utils.rnn.pad_sequence(y, batch_first=True, padding_value=-100)[:, 1:]


def batch_rows(lengths, first_step, last_step, micro, processes, rank):
    """
    Yield the rows of each micro-batch of this process. Each epoch is a shuffle in which rows of similar length
    share a batch. It is a function of (seed, step): a resume, more processes, smaller micro-batches see the same.
    """
    n_batches = max(1, len(lengths) // batch_size)
    for step in range(first_step, last_step):
        epoch, i = divmod(step, n_batches)
        if i == 0 or step == first_step:
            rng = np.random.default_rng([seed, epoch])
            rows = np.resize(rng.permutation(len(lengths)), n_batches * batch_size)  # few are repeated
            rows = rows[np.argsort(lengths[rows] * rng.uniform(0.9, 1.1, len(rows)))]
            batches = rng.permutation(rows.reshape(n_batches, batch_size))
        yield from batches[i].reshape(-1, processes, micro)[:, rank].tolist()


# ---- Optimizers and learning rate ----


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update of a matrix is made orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon). It
    computes what torch.optim.Muon does, but on all matrices of a shape at once, as many small products keep no
    processor busy, and in the given dtype, as few CPUs have bf16.
    """

    def __init__(self, matrices, dtype, **defaults):
        super().__init__(matrices, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
            for (rows, columns), alike in itertools.groupby(matrices, key=lambda p: p.shape):
                alike = list(alike)
                for p in alike:
                    self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
                grads, averages = [p.grad for p in alike], [self.state[p]["momentum_buffer"] for p in alike]
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, averages, group["momentum"]))  # (n, rows, columns)
                x = (x.mT if rows > columns else x).to(self.dtype)
                x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
                for _ in range(5):  # Newton and Schulz: all singular values come near 1
                    gram = x @ x.mT
                    gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
                    x = torch.baddbmm(x, gram, x, beta=3.4445)
                updates = (x.mT if rows > columns else x).to(alike[0].dtype).unbind()
                torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(alike, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model, accelerator):
    """
    Muon for the matrices in the blocks; AdamW for the rest: embedding and other tables, the head, vectors. What
    somebody else has trained, most likely with AdamW, goes on with that. Each trained weight is in one group.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = partial(torch.optim.AdamW, betas=(beta1, beta2), weight_decay=0.0, fused=True)
    if optimizer == "adamw" or init_from != "scratch":
        default = {"lora": 2e-4, "p_tuning": 1e-3}.get(adapter, 0.001 if init_from == "scratch" else 5e-5)
        groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay}]
        groups += [{"params": [p for p in trained if p.ndim <= 1]}]  # biases and gains do not decay
        return [adamw([group for group in groups if group["params"]], learning_rate or default)]
    blocks, head = {id(p) for p in model.model.layers.parameters()}, model.lm_head.weight
    tied = head is model.model.embed_tokens.weight
    matrices = [p for p in trained if p.ndim == 2 and id(p) in blocks]
    tables = [p for p in trained if p.ndim == 2 and id(p) not in blocks and (tied or p is not head)]
    others = [p for p in trained if id(p) not in {id(p) for p in matrices + tables}]
    groups = [{"params": tables, "lr": embed_lr}, {"params": others, "lr": head_lr}]
    how = {"lr": learning_rate or 0.03, "weight_decay": weight_decay, "momentum": 0.95}
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    muon = partial(Muon, dtype=dtype)
    if accelerator.is_fsdp2:  # which cuts matrices up among the processes: torch's own puts them together
        muon = partial(torch.optim.Muon, adjust_lr_fn="original")
    return [muon(matrices, **how), adamw([group for group in groups if group["params"]])]


def lr_at(step, total_steps):
    """The learning rate of a step as a fraction of its peak: the least of warm-up and decay, so it never jumps."""
    decay = 1.0
    if lr_schedule == "cosine":
        done = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
        decay = 0.5 * (1 + math.cos(math.pi * min(1, done)))
    elif lr_schedule == "wsd":
        decay = min(1.0, (total_steps - step) / max(1, cooldown * total_steps))
    return min((step + 1) / (warmup_steps + 1), min_lr + (1 - min_lr) * decay)


# ---- Evaluation ----


@torch.no_grad()
def evaluate(accelerator, model, name, rows, n, micro, batches):
    """
    -> the loss of a split in three units. n: how many tokens and bytes it has. batches: of batch_size rows, spread
    evenly over the split; 0: all of it. Each process takes its share, in as many forward passes as the others.
    """
    chosen = np.arange(len(rows))
    if 0 < batches * batch_size < len(rows):
        chosen = np.linspace(0, len(rows) - 1, batches * batch_size).astype(int)
    mine, losses, n_tokens = chosen[accelerator.process_index :: accelerator.num_processes], [], 0
    model.eval()
    passes = range(0, math.ceil(len(chosen) / accelerator.num_processes), micro)
    for i in tqdm(passes, desc=name, leave=False, disable=None if name == "test" else True):
        x, y = collate(rows.__getitems__(mine[i : i + micro].tolist() or [0]))
        y = y if i < len(mine) else torch.full_like(y, -100)  # a pass that only the others need
        n_tokens += int((y != -100).sum())
        with accelerator.autocast():
            losses.append(model(x.to(accelerator.device), y.to(accelerator.device)))
    model.train()
    shares = gather_object([(torch.stack(losses).cpu().double().sum().item(), n_tokens)])
    loss = sum(loss for loss, _ in shares) / sum(count for _, count in shares)
    bits = loss / math.log(2) * n["tokens"] / n["bytes"]  # per byte of text: comparable across tokenizers
    return {
        f"{name}/loss": loss,
        f"{name}/perplexity": math.exp(min(loss, 700)),
        f"{name}/bits_per_byte": bits,
    }


@torch.compiler.set_stance("force_eager")  # each new length would be compiled anew
def write_sample(model, tok, row, step):
    """Let the model continue the beginning of a row, from a fixed seed: all processes in step, as FSDP2 needs it."""
    n = int((row["labels"] != -100).int().argmax()) if "labels" in row else 16  # what stands before an answer
    prompt = row["ids"][:n].tolist()
    model.eval()
    new = [int(token) for token in generate(model, prompt, 1, 200, 0.8, seed=seed, eos=[tok.eos_token_id])]
    model.train()
    if is_main():
        path = Path(out_dir, "samples", f"step_{step:08d}.txt")
        path.parent.mkdir(exist_ok=True)
        path.write_text(tok.decode(prompt + new), encoding="utf-8")


def evaluate_and_keep(accelerator, model, splits, sizes, micro, progress, done):
    """-> the validation loss, which is noted in `progress`; the best weights so far go to the run directory."""
    how = splits["validation"], sizes["validation"], micro, eval_batches
    values = evaluate(accelerator, model, "val", *how)
    better = values["val/loss"] < progress["best"] and (progress["step"] > 0 or done)
    progress["waited"] = 0 if better else progress["waited"] + (progress["step"] > 0)
    if better:
        progress["best"] = values["val/loss"]
        save_weights(accelerator, model)
        if "test" in splits:
            save_state(accelerator, model, [], progress, Path(out_dir, "best.pt"))
    return values


# ---- The run directory: weights that transformers loads, a checkpoint that a resume continues bit for bit ----
STATE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def write_file(path, write):
    """Let `write(temporary)` make a file, then give it its name: what has the name is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def gather(accelerator, model, frozen=False):
    """{name: weight} of what is trained, or of everything: in one piece, on the CPU, a tied one under one name."""
    weights = dcp.get_model_state_dict(model, options=replace(STATE, ignore_frozen_params=not frozen))
    gpt = accelerator.unwrap_model(model)
    once = {name for name, weight in gpt.named_parameters() if frozen or weight.requires_grad}
    others = {name for name, _ in gpt.named_parameters(remove_duplicate=False)} - once
    return {name: weight for name, weight in weights.items() if name not in others}


def save_state(accelerator, model, optimizers, progress, path):
    """All that a resume needs in one file; without optimizers the trained weights alone."""
    state = {"model": gather(accelerator, model), "progress": progress}
    if optimizers:
        state["optimizers"] = dcp.get_optimizer_state_dict(model, optimizers, options=STATE)
    if accelerator.scaler:
        state["scaler"] = accelerator.scaler.state_dict()
    if is_main():
        write_file(path, lambda temporary: torch.save(state, temporary))
    accelerator.wait_for_everyone()


def load_state(accelerator, model, optimizers, path):
    """
    Put back what save_state wrote, but with today's settings of the optimizers; -> progress. The main process
    reads the file and tells the others, who may be on a machine that does not have it.
    """
    state, expected = {"model": {}, "optimizers": {}, "progress": {}}, gather(accelerator, model).keys()
    today = [{k: v for k, v in g.items() if k != "params"} for o in optimizers for g in o.param_groups]
    options = replace(STATE, strict=False, broadcast_from_rank0=accelerator.num_processes > 1)
    with named("checkpoint", str(path)):
        if is_main():
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["model"].keys() != expected:
                raise ValueError("it holds the weights of another model")
        dcp.set_model_state_dict(model, state["model"], options=options)
        if optimizers:
            dcp.set_optimizer_state_dict(model, optimizers, state["optimizers"], options=options)
            for group, values in zip((g for o in optimizers for g in o.param_groups), today):
                group.update(values)
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(broadcast_object_list([state.get("scaler")])[0])
    return broadcast_object_list([state["progress"]])[0]


def save_weights(accelerator, model):
    """Make the run directory a model: its weights or those of its adapter, in the library's own format."""
    gpt, weights = accelerator.unwrap_model(model), gather(accelerator, model, frozen=not adapter)
    if is_main() and isinstance(gpt, GPT):
        if not Path(out_dir, "config.json").exists():
            write_config(gpt)
        path = Path(out_dir, "model.safetensors")
        write_file(path, lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    elif is_main():
        save_pretrained(gpt, weights)
    accelerator.wait_for_everyone()


def write_config(gpt):
    """
    config.json: it makes the run directory a model of transformers, if transformers computes what our GPT does.
    That is tried on random weights, because the zeros that training starts from would hide most of the model.
    """
    from transformers import NanoChatForCausalLM

    config = gpt.config.to_dict()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        ours, theirs = GPT(gpt.config).eval(), NanoChatForCausalLM(gpt.config).eval()
        for weight in ours.parameters():
            nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
        idx = torch.randint(gpt.config.vocab_size, (1, min(1024, gpt.context)))
        names = [dict(model.named_parameters()).keys() for model in (ours, theirs)]  # a tied weight has one
        try:
            theirs.load_state_dict(ours.state_dict())
            native = names[0] == names[1] and torch.allclose(ours(idx), theirs(idx).logits, atol=1e-3)
        except RuntimeError:  # other names, other sizes
            native = False
    if not native:
        config |= {"model_type": "edited", "architectures": ["GPT"]}  # which transformers refuses to load
        log("edited model: sample.py and init_from load this run, transformers does not")
    write_json(Path(out_dir, "config.json"), config)


def claim_run_dir():
    """End the program if out_dir holds a run that this one would overwrite, or other files."""
    with named("out_dir", out_dir):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        others = [p.name for p in Path(out_dir).iterdir() if p.suffix != ".tmp"]
    if "run.json" in others and not (resume or overwrite):
        ways = "--resume=True goes on with it, --overwrite=True deletes it, another --out_dir leaves it alone"
        fail(f"{out_dir} holds a run already: {ways}")
    if others and "run.json" not in others:
        fail(f"{out_dir} holds other files, such as {min(others)}: choose another --out_dir")


def start_run(accelerator, model, tok, sizes):
    """Write down what this run is; on a resume, compare. -> run.json, whether there is a checkpoint to go on from"""
    path, git = Path(out_dir), ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = git if shutil.which("git") else ["echo"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy")
    run = {"kind": "lm", "model": type(model).__name__, "settings": settings(globals()), "command": sys.argv}
    run |= {"commit": commit, "versions": {name: importlib.metadata.version(name) for name in versions}}
    run |= {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision, "data": sizes}
    run |= {"device": device_name(accelerator), "parameters": sum(p.numel() for p in model.parameters())}
    run["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if (path / "run.json").exists() and not overwrite:
        with named("run", str(path / "run.json")):
            old = json.loads((path / "run.json").read_text(encoding="utf-8"))
            before = old["settings"]
        now = run["settings"].items()
        differ = {k: f"{k} was {before.get(k)!r}, is {v!r}" for k, v in now if before.get(k) != v}
        if fixed := "; ".join(differ[name] for name in FIXED.split() if name in differ):
            fail(f"cannot resume: {fixed}; choose another --out_dir")
        if (old["kind"], old["data"]) != ("lm", sizes):
            fail(f"cannot resume: {out_dir} is of another trainer or of other data; choose another --out_dir")
        for name in sorted(differ.keys() - {"resume", "overwrite"}):
            log(f"resume: {differ[name]}")
    elif overwrite:
        shutil.rmtree(path)
        path.mkdir()
    write_json(path / "run.json", run)
    script = path / Path(__file__).name
    if script.exists() and script.read_bytes() != Path(__file__).read_bytes():
        (path / "config.json").unlink(missing_ok=True)  # to be made again, for the model as it is now
    shutil.copyfile(__file__, script)
    tok.save_pretrained(path)
    return run, (path / "checkpoint.pt").exists()


# ---- Starting, stopping, reporting ----
STOP = {"signal": 0, "at_once": True}  # at_once: until the loop looks at the signal
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}  # in bf16


def is_main():
    return os.environ.get("RANK", "0") == "0"


def log(message):
    if is_main():
        print(message, flush=True)


def on_signal(signum, frame):
    """Only note it: the loop looks once a step, and any number of signals is one wish to stop."""
    STOP["signal"] = int(signum)
    if STOP["at_once"]:
        raise SystemExit(128 + signum)  # there is nothing to save before the first step


def catch_signals():
    """Ctrl-C, SIGTERM and, on Linux, the death of the launcher, which may end without a word to the trainer."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
        if os.getppid() != PARENT:  # it died during the imports
            raise SystemExit(128 + signal.SIGTERM)


def has_bf16():
    """Whether the hardware computes in bf16; what only emulates it is slower in it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return not torch.backends.mps.is_available() and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def device_name(accelerator):
    kind = accelerator.device.type
    return torch.cuda.get_device_name() if kind == "cuda" else f"{kind}, {torch.get_num_threads()} threads"


def start_accelerator():
    """-> an Accelerator on the best device there is, with precision and threads set."""
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = ("bf16" if has_bf16() else "no") if mixed_precision == "auto" else mixed_precision
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what `deterministic` needs
    torch.use_deterministic_algorithms(deterministic)
    torch.autograd.set_detect_anomaly(detect_anomaly)
    torch.set_float32_matmul_precision("high")  # TF32: fp32 matrices much faster, with 10 bits of mantissa
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # all make the model, each keeps a part of it
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # the others wait while one tokenizes
    options = {"log_with": tracker or None, "project_dir": out_dir, "kwargs_handlers": [patient]}
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, **options)
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        fail("the processes do not find each other: on CPUs, set ACCELERATE_USE_CPU=true in the environment")
    if accelerator.is_fsdp2:  # autocast computes in bf16, as ever
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if precision == "fp16" or adapter == "p_tuning":
            fail("FSDP2 goes neither with mixed_precision='fp16' nor with adapter='p_tuning'")
    elif accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        fail(f"{accelerator.distributed_type.value} is not supported: see configs/accelerate for what is")
    if on_cpu:  # `accelerate launch` leaves a process one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)
        if (
            mallopt
        ):  # malloc is to keep what a step frees: asking for zeroed pages costs a quarter of its time
            mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    log(f"device: {device_name(accelerator)} (x {accelerator.num_processes}), precision {precision}")
    if accelerator.device.type != "cuda":
        log("warning: no CUDA GPU was found; small models train well without one, large ones take very long")
    return accelerator


def divide_batch(processes):
    """-> (rows of a forward pass, forward passes of a step) of each process."""
    micro = micro_batch_size or max(1, batch_size // processes)
    if batch_size % (micro * processes):
        fail(f"{batch_size=} is no multiple of {micro} rows x {processes} processes")
    return micro, batch_size // (micro * processes)


def open_metrics(size):
    """metrics.jsonl without what is past the checkpoint (byte `size`)."""
    path = Path(out_dir, "metrics.jsonl")
    path.write_bytes(path.read_bytes()[:size] if path.exists() else b"")
    return open(path, "ab", buffering=0)  # a row is on its way at once


def start_tracker(accelerator, run_id):
    how = {"wandb": {"id": run_id, "resume": "allow", "dir": out_dir, "name": Path(out_dir).name}}
    project = os.environ.get("WANDB_PROJECT", Path(__file__).stem)
    with named("tracker", tracker):  # without a login: WANDB_MODE=offline
        accelerator.init_trackers(project, settings(globals()), how if tracker == "wandb" else {})


def compile_in_place(accelerator, model):
    """torch.compile, with names that stay; under FSDP2 block by block, as it gathers the weights."""
    parts = [part for part in model.modules() if type(part).__name__ in model._no_split_modules]
    for part in parts if accelerator.is_fsdp2 and parts else [model]:
        part.compile()


def count_skipped(progress, finite):
    """A step or two may go wrong; after ten in a row the run ends."""
    progress["skipped"] += not finite
    progress["skipped_in_a_row"] = 0 if finite else progress["skipped_in_a_row"] + 1
    if not finite:
        log(f"step {progress['step']}: the loss or the gradient is not finite: skipped")
    if progress["skipped_in_a_row"] == 10:
        raise SystemExit(
            "ten steps in a row were not finite: lower learning_rate, or try --detect_anomaly=True"
        )


def speed(tokens_per_s, flops):
    """-> tokens/s, the share of the GPUs' peak that this is, GB of memory at the peak."""
    gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
    peak = next((f for name, f in PEAK_FLOPS.items() if gpu and name in gpu), 0)
    peak *= int(os.environ.get("WORLD_SIZE", "1"))
    memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
    values = {"tokens_per_s": tokens_per_s, "memory_gb": memory / 1e9}
    return values | ({"mfu": tokens_per_s * flops / peak} if peak and flops else {})


# ---- Training ----


def main():
    check_settings()
    catch_signals()
    accelerator = start_accelerator()
    micro, accumulation = divide_batch(accelerator.num_processes)
    if is_main():
        claim_run_dir()

    # data and model; a pretrained one first, so that a wrong name costs no tokenizing
    model = load_pretrained(accelerator.mixed_precision) if init_from != "scratch" else None
    with accelerator.local_main_process_first():  # the others read what the first one has cached
        tok, splits, sizes = prepare_data()
    vocab_size = 1 + max(tok.get_vocab().values())  # some tokenizers have gaps
    model = make_gpt(vocab_size, tok.eos_token_id) if model is None else model
    if vocab_size > model.config.vocab_size:
        fail(
            f"the tokenizer has {vocab_size} tokens, {init_from} knows {model.config.vocab_size}: use its own"
        )
    optimizers = make_optimizers(model, accelerator)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    flops = model.flops_per_token() if isinstance(model, GPT) else 0
    run, found = broadcast_object_list([start_run(accelerator, model, tok, sizes) if is_main() else None])[0]
    if compile and accelerator.device.type == "cuda" and not detect_anomaly:
        compile_in_place(accelerator, model)
    model, *steppers = accelerator.prepare(model, *optimizers)
    if accelerator.is_fsdp2:
        model.set_reshard_after_forward(True)  # weights that are gathered anew for each use are never stale

    # the run
    path, train = Path(out_dir), splits["train"]
    progress = {"step": 0, "best": math.inf, "waited": 0, "skipped": 0, "skipped_in_a_row": 0, "seconds": 0.0}
    progress |= {"metrics_bytes": 0, "tracker_id": f"{time.time_ns():x}"}
    if found:
        progress = load_state(accelerator, model, optimizers, path / "checkpoint.pt")
        log(f"resumed from {path / 'checkpoint.pt'} at step {progress['step']}")
    progress = broadcast_object_list([progress])[0]
    metrics = open_metrics(progress["metrics_bytes"]) if is_main() else None
    start_tracker(accelerator, progress["tracker_id"])
    n_batches = max(1, len(train) // batch_size)
    total_steps = math.ceil(epochs * n_batches) if epochs else max_steps
    parts = f"{accelerator.num_processes} processes x {accumulation} micro-batches x {micro}"
    log(
        f"model: {run['parameters']:,} parameters, {run['trained_parameters']:,} trained; learning rates {peaks}"
    )
    log(
        f"length: {total_steps} steps, {total_steps / n_batches:.2f} epochs; batch: {batch_size} rows = {parts}"
    )

    device, saved, clock = accelerator.device, progress["step"], time.monotonic() - progress["seconds"]
    place = micro, accelerator.num_processes, accelerator.process_index
    rows = batch_rows(np.array(train["length"]), saved, total_steps, *place)
    how = {"num_workers": num_workers, "pin_memory": device.type == "cuda", "generator": torch.Generator()}
    STOP["at_once"] = False  # before the workers, who inherit it: a Ctrl-C must not end them
    batches = iter(torch.utils.data.DataLoader(train, batch_sampler=rows, collate_fn=collate, **how))
    groups = [group for o in optimizers for group in o.param_groups]  # after load_state, which makes new ones

    def report(values):
        """A row of metrics.jsonl and of the tracker, and a line on the terminal."""
        if is_main():
            row = {"step": progress["step"], "time": round(time.monotonic() - clock, 3), **values}
            metrics.write(json.dumps(row).encode() + b"\n")
        accelerator.log(values, step=progress["step"])
        log(f"step {progress['step']}/{total_steps} " + " ".join(f"{k} {v:.4g}" for k, v in values.items()))

    since, n_since = time.monotonic(), 0
    traced = {"wait": 2, "warmup": 2, "active": 3, "repeat": 1}  # steps
    traced = ProfileKwargs(schedule_option=traced, output_trace_dir=f"{out_dir}/profile")
    with accelerator.profile(traced) if profile else contextlib.nullcontext() as profiler:
        while True:
            # save, stop, evaluate, in this order: a run that goes on from here evaluates again
            if STOP["signal"]:
                accelerator.set_trigger()
            step, stop = progress["step"], accelerator.check_trigger()
            done = step >= total_steps
            if (stop or done or step % save_interval == 0) and step > saved:
                if "validation" not in splits:
                    save_weights(accelerator, model)
                progress["seconds"] = time.monotonic() - clock
                progress["metrics_bytes"] = metrics.tell() if is_main() else 0
                save_state(accelerator, model, optimizers, progress, path / "checkpoint.pt")
                saved = step
            if stop:
                break
            if done or step % eval_interval == 0:
                if "validation" in splits:
                    report(evaluate_and_keep(accelerator, model, splits, sizes, micro, progress, done))
                write_sample(accelerator.unwrap_model(model), tok, splits.get("validation", train)[0], step)
                since, n_since = time.monotonic(), 0  # speed is measured between evaluations
            if done or 0 < patience <= progress["waited"]:
                break

            # one optimizer step by the mean loss over all tokens of the global batch
            for group, peak in zip(groups, peaks):
                group["lr"] = peak * lr_at(step, total_steps)
                if "momentum" in group:  # Muon's memory is short while gradients still turn quickly
                    group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)
            micro_batches = [next(batches) for _ in range(accumulation)]
            n_tokens = torch.tensor(sum(int((y != -100).sum()) for _, y in micro_batches), device=device)
            n_tokens, total = accelerator.reduce(n_tokens, "sum"), 0.0
            torch.manual_seed(hash((seed, step, accelerator.process_index)))  # for dropout
            for i, (x, y) in enumerate(micro_batches):
                # gradients travel between processes once a step; FSDP2 has no room for them until then
                last = i == accumulation - 1 or accelerator.is_fsdp2
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    with accelerator.autocast():
                        loss = model(x.to(device), y.to(device)) / n_tokens  # the sum over its tokens
                    accelerator.backward(loss * accelerator.num_processes)  # DDP and FSDP2 take the mean
                total += loss.detach()
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
            # what is not finite in one process is so in all; and this is the one wait for the GPU in a step
            grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # of FSDP2
            both = torch.stack((total, grad_norm / accelerator.num_processes))
            loss, grad_norm = accelerator.reduce(both, "sum").tolist()
            # the scaler of fp16 must be asked: it skips such steps itself and adapts its scale
            finite = math.isfinite(loss) and (math.isfinite(grad_norm) or accelerator.scaler is not None)
            for stepper in steppers:
                if finite or accelerator.scaler:
                    stepper.step()
                stepper.zero_grad()
            progress["step"] = step = step + 1
            count_skipped(progress, finite)
            n_since += int(n_tokens)
            if step % log_interval == 0 or step == total_steps:
                values = {"train/loss": loss, "lr": groups[0]["lr"], "grad_norm": grad_norm}
                values |= speed(n_since / (time.monotonic() - since), flops)
                report(values | {"epoch": step / n_batches})
                since, n_since = time.monotonic(), 0
            if profile:
                profiler.step()

    # the end: the best weights meet the test split
    summary = {"steps": step, "skipped": progress["skipped"], "minutes": (time.monotonic() - clock) / 60}
    if progress["best"] < math.inf:
        summary["val/loss"] = progress["best"]
    if not stop and "test" in splits:
        if progress["best"] < math.inf:
            load_state(accelerator, model, [], path / "best.pt")
        report(test := evaluate(accelerator, model, "test", splits["test"], sizes["test"], micro, 0))
        summary |= test
    if stop:
        log(f"stopped at step {step}; the same command with --resume=True goes on")
    elif is_main():
        log("\n".join(f"{name}: {value}" for name, value in summary.items()))
        write_json(path / "run.json", run | {"summary": summary})
    accelerator.wait_for_everyone()
    accelerator.end_training()
    code = 128 + (STOP["signal"] or signal.SIGTERM) if stop else 0
    if accelerator.num_processes > 1:  # gloo's threads may abort a process that ends in the usual way
        os._exit(code)
    raise SystemExit(code)


# ---- Fine-tuning: only with init_from, or with data that holds answers ----


class Pretrained(nn.Module):
    """A causal language model of transformers, perhaps under an adapter of peft, that trains and samples as GPT does."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.n_virtual = getattr(getattr(lm, "active_peft_config", None), "num_virtual_tokens", 0)  # p_tuning
        self.config = lm.config.get_text_config()
        self.context = (getattr(self.config, "max_position_embeddings", None) or 2**31) - self.n_virtual
        kinds = {type(part).__name__ for part in lm.modules()}
        self._no_split_modules = sorted(kinds & set(self.base()._no_split_modules or ()))
        self.has_cache = "past_key_values" in inspect.signature(self.base().forward).parameters

    def base(self):
        """The model of transformers itself; the matrices of LoRA are in its layers."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def forward(self, idx, targets=None, cache=None, start=0):
        """As GPT.forward; in `cache`, a dict, stands what transformers keeps from call to call."""
        inputs, past = {"input_ids": idx}, {} if cache is None else {"past_key_values": cache.get("past")}
        if self.n_virtual and start == 0:  # the learned prompt stands before the text
            x = self.base().get_input_embeddings()(idx)  # (B, T, C)
            inputs = {"inputs_embeds": torch.cat((self.lm.get_prompt(len(idx)).to(x.dtype), x), dim=1)}
        # Padding stands on the right, where no token looks: without a mask, the fast kernels can be used.
        out = self.base()(**inputs, **past, use_cache=cache is not None)
        if cache is not None:
            cache["past"] = out.past_key_values
        logits = out.logits[:, -idx.size(1) :]  # (B, T, V)
        return logits if targets is None else sum_losses(logits.float(), targets)

    def new_cache(self, n):
        return {} if self.has_cache else None


def load_lm(name, dtype=torch.float32, trainable=False, base=""):
    """-> a causal language model of transformers, from a folder or the hub; an adapter comes with the model below it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(name).expanduser()
    if (path / "adapter_config.json").exists():
        from peft import PeftConfig, PeftModel

        with named("adapter", name):
            base = base or PeftConfig.from_pretrained(path).base_model_name_or_path
            return PeftModel.from_pretrained(load_lm(base, dtype), path, is_trainable=trainable)
    with named("model", name):
        name = str(path) if path.exists() else name
        load = transformers.AutoModelForCausalLM.from_pretrained
        lm, info = load(name, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"it has no weights for {min(info['missing_keys'])}")
    return lm


def load_gpt(folder):
    """-> GPT with the weights of a run of ours."""
    from transformers import NanoChatConfig

    with named("run", str(folder)):
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        gpt = GPT(NanoChatConfig.from_dict(config | {"model_type": "nanochat", "attention_dropout": dropout}))
        load_model(gpt, Path(folder, "model.safetensors"))
    return gpt


def load(folder, run, base=""):
    """
    -> (model, tokenizer) of a run directory, ready to sample. run: what its run.json says; its settings are set in
    this module first, so that the model is built as it was trained. base: where the model below an adapter is now.
    """
    from transformers import AutoTokenizer

    globals().update(run["settings"])
    model = load_gpt(folder) if run["model"] == "GPT" else Pretrained(load_lm(str(folder), base=base))
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def add_adapter(lm):
    """
    Freeze a model and put an adapter on it: "lora" (Hu et al. 2021, arXiv:2106.09685) adds a product of two
    small matrices to those of its layers; "p_tuning" (Liu et al. 2021, arXiv:2103.10385) learns vectors that
    stand before every text like a prompt, as the output of a small network.
    """
    import peft

    if adapter == "lora":
        names = lora_targets if lora_targets == "all-linear" else lora_targets.split(",")
        known = {name.rpartition(".")[2] for name, part in lm.named_modules() if hasattr(part, "weight")}
        if missing := set(names) - known if names != "all-linear" else ():
            fail(f"lora_targets: the model has no layer {min(missing)!r}; it has {', '.join(sorted(known))}")
        config = peft.LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=names)
    else:
        width = lm.get_input_embeddings().embedding_dim
        config = peft.PromptEncoderConfig(num_virtual_tokens=virtual_tokens, encoder_hidden_size=width)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(seed)
    return peft.get_peft_model(lm, config)


def load_pretrained(precision):
    """-> what init_from names: the GPT of a run of ours, or a Pretrained with the adapter asked for."""
    path = Path(init_from).expanduser()
    if not path.exists() and (init_from[:1] in ("", ".", "/", "~") or init_from.count("/") > 1):
        fail(f"there is no folder {init_from!r}")
    if path.resolve() == Path(out_dir).resolve():
        fail(f"{init_from=} is out_dir: go on with that run by --resume=True, or choose another --out_dir")
    if re.match("(bytes|char|bpe:.*)$", tokenizer):
        fail(f"{tokenizer=} is not what {init_from} was trained with: leave it out")
    with named("init_from", init_from):
        run = json.loads((path / "run.json").read_text()) if (path / "run.json").exists() else {}
    if run.get("model") == "GPT" and not adapter:
        model = load_gpt(path)
    else:
        # under an adapter the frozen weights are in the precision of training
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16} if adapter else {}
        lm = load_lm(init_from, dtypes.get(precision, torch.float32), trainable=True)
        if hasattr(lm, "peft_config") and adapter != "lora":
            fail(f"{init_from} holds an adapter: --adapter=lora goes on with it")
        for part in lm.modules():
            if isinstance(part, nn.Dropout):
                part.p = dropout
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm = add_adapter(lm) if adapter and not hasattr(lm, "peft_config") else lm
        for weight in lm.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
        model = Pretrained(lm.train())
    if block_size > model.context:
        fail(f"{block_size=} is beyond the positions of {init_from}: at most --block_size={model.context}")
    return model


def save_pretrained(model, weights):
    """Write a Pretrained as transformers or peft does, file by file under another name first."""
    folder = Path(out_dir, "unfinished.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    how = {"save_embedding_layers": False} if adapter else {}
    state = {name.removeprefix("lm."): weight for name, weight in weights.items()}
    model.lm.save_pretrained(folder, state_dict=state, **how)
    for path in folder.iterdir():
        if path.suffix != ".md":  # a model card without content
            write_file(Path(out_dir, path.name), path.rename)
    shutil.rmtree(folder)


# Rows with answers: prompts and completions, or chats. Only the answers are learned.
PAIRS = (("question", "answer"), ("instruction", "output"))  # other names of prompt and completion
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
ROLES |= {"developer": "developer", "tool": "tool"}
CHAT_TEMPLATE = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}\
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant:{% endif %}"""  # for tokenizers that have none


def choose_columns(splits):
    """-> the columns to learn from: [text_column], a prompt's and its completion's, or that of a chat's messages."""
    have = set.intersection(*(set(rows.column_names) for rows in splits.values()))
    texts = {name for name in have if "string" in getattr(splits["train"].features[name], "dtype", "")}
    if text_column != "text" and text_column in texts:
        return [text_column]
    for columns in (("messages",), ("conversations",), (prompt_column, completion_column), *PAIRS):
        if have.issuperset(columns) and (len(columns) == 1 or texts.issuperset(columns)):
            log(f"learning the answers in {' and '.join(columns)}")
            return list(columns)
    if text_column not in texts:
        advice = f": try --text_column={nearest(text_column, texts)}" if texts else ""
        fail(f"{dataset=} has no text column {text_column!r}{advice} ({', '.join(sorted(have))})")
    return [text_column]


def conversation(row, columns):
    """A row -> messages of "role" and "content", whatever names they have there."""
    messages = []
    for message in row[columns[0]] or []:
        if not isinstance(message, dict):
            fail(f"{dataset=}: {columns[0]} is no list of messages: {row[columns[0]]!r}")
        message = {key: value for key, value in message.items() if value is not None}
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value", ""))
        if role not in ROLES or not isinstance(content, str):
            fail(f"{dataset=}: a message needs a role ({', '.join(ROLES)}) and a text, not {message}")
        messages.append(message | {"role": ROLES[role], "content": content})
    return messages


def prompt_and_completion(row, columns):
    """Alpaca's rows have a part of the prompt in a column of its own."""
    return "\n\n".join(text for text in (row[columns[0]], row.get("input")) if text), row[columns[1]] or ""


def all_texts(rows, columns):
    """Yield what rows say, for a tokenizer to learn from."""
    for row in rows:
        if columns == [text_column]:
            yield row[text_column] or ""
        elif len(columns) == 2:
            yield from prompt_and_completion(row, columns)
        else:
            yield from (f"{m['role']}: {m['content']}\n" for m in conversation(row, columns))


def cut_conversation(tok, messages):
    """
    A conversation -> lists of (text, whether it is learned). Learned is what the chat template adds to the prompt
    for an answer, so training sees what a chat will show. Where a template writes an earlier turn in another way
    than the last one (Qwen3 leaves out its thoughts), the next answer begins a new list.
    """
    found, text = [], None
    for i, message in enumerate(messages):
        says = message["content"].strip() or "tool_calls" in message
        if message["role"] != "assistant" or i == 0 or not says:
            continue
        with named("chat template", tok.name_or_path or "plain"):
            before = tok.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            after = tok.apply_chat_template(messages[: i + 1], tokenize=False)
        if not after.startswith(before):
            fail(f"the chat template cannot tell the assistant's words: no prompt begins {after[:200]!r}")
        if text is None or not before.startswith(text):
            found, text = [*found, []], ""
        found[-1] += [(before[len(text) :], False), (after[len(before) :], True)]
        text = after
    return found


def encode_answers(batch, tok, columns):
    """Rows with answers -> token ids, and labels: the same where it is learned, else -100; an end is learned too."""
    out = {"ids": [], "labels": [], "documents": [], "bytes": [], "tokens": []}
    for values in zip(*batch.values()):
        row, begin = dict(zip(batch, values)), []
        if len(columns) == 1:
            found = cut_conversation(tok, conversation(row, columns))  # a template has its own begin
        else:
            prompt, completion = prompt_and_completion(row, columns)
            found, begin = [[(prompt, False), (completion, True)]] if completion else [], begin_of_text(tok)
        for n, pieces in enumerate(found or [[]]):  # of a row without an answer, one without tokens
            ids, labels = [*begin], [-100] * len(begin)
            for text, learned in pieces:
                with named("tokenizer", tok.name_or_path or tokenizer):
                    piece = tok(text, add_special_tokens=False)["input_ids"]
                if learned and not ids:
                    ids, labels = [tok.eos_token_id], [-100]  # nothing comes from nothing
                ids, labels = ids + piece, labels + (piece if learned else [-100] * len(piece))
            if pieces and not text.rstrip().endswith(tok.eos_token):  # or the model would never stop
                ids, labels = [*ids, tok.eos_token_id], [*labels, tok.eos_token_id]
            n_bytes = sum(len(text.encode()) for text, learned in pieces if learned)
            row_of = ids, labels, int(n == 0), n_bytes, sum(label != -100 for label in labels)
            for name, value in zip(out, row_of):
                out[name].append(value)
    return out


def cut_answers(batch, T):
    """Rows beyond T + 1 tokens lose some on the left of their last answer; if that does not fit, the row goes."""
    out = {"ids": [], "labels": [], "length": []}
    for ids, labels in zip(batch["ids"], batch["labels"]):
        learned, over = np.flatnonzero(labels != -100), max(0, len(ids) - T - 1)
        begins = learned[np.diff(learned, prepend=-2) > 1]  # of each answer
        if len(begins) and begins[-1] > over:
            ids = np.concatenate((ids[:1], ids[over + 1 :]))  # a begin-of-text token stays
            for name, value in (("ids", ids), ("labels", labels[over:]), ("length", len(ids))):
                out[name].append(value)
    return out


if __name__ == "__main__":
    configure(globals())
    main()
