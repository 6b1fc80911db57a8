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
import functools
import glob
import importlib.util
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, tqdm
from safetensors.torch import load_model, save_file
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

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
eval_interval = 200  # steps between evaluations
eval_batches = 20  # batches of batch_size, spread evenly over the validation split; 0: all of it
log_interval = 10  # steps between reports
save_interval = 200  # steps between checkpoints
patience = 0  # stop after so many evaluations without a better validation loss; 0: never
tracker = ""  # beside metrics.jsonl: "wandb" or "tensorboard"
# the machine
mixed_precision = "auto"  # bf16 where the hardware has it, else no; or "bf16", "fp16" (with adamw), "no"
compile = True  # torch.compile on CUDA: a minute at the start, then much faster; has no effect elsewhere
gradient_checkpointing = False  # compute activations again in the backward pass: slower, in less memory
deterministic = False  # bitwise repeatable on CUDA, at some cost in speed; a CPU is always
detect_anomaly = False  # stop at the first NaN in a gradient and show the operation that made it; slow
profile = False  # a trace of steps 6 to 8 for chrome://tracing, out_dir/trace_0.json

# What a resume may not change; of the data, the sizes. A setting of yours that shapes the model belongs here.
FIXED = "dataset tokenizer fold init_from adapter lora_rank optimizer beta1 beta2 weight_decay "
FIXED += "block_size n_layer n_head n_kv_head n_embd"


def check_settings():
    """End the program, before any data is touched, for values that cannot work."""
    part = re.fullmatch(r"(\d+)/(\d+)", fold or "1/2")
    scratch = init_from == "scratch"
    wrong = {
        f"{adapter=}: lora, p_tuning, or empty": adapter not in ("", "lora", "p_tuning"),
        f"{adapter=} needs a pretrained model, as --init_from=gpt2": adapter and scratch,
        f"{optimizer=}: muon or adamw": optimizer not in ("muon", "adamw"),
        f"{lr_schedule=}: wsd, cosine or constant": lr_schedule not in ("wsd", "cosine", "constant"),
        f"{mixed_precision=}: auto, bf16, fp16 or no": mixed_precision not in ("auto", "bf16", "fp16", "no"),
        f"{mixed_precision=} needs CUDA and optimizer='adamw'": mixed_precision == "fp16"
        and (optimizer == "muon" and scratch or not torch.cuda.is_available()),
        f"{fold=}: 2/5 is the second of five parts": not part or not 1 <= int(part[1]) <= int(part[2]) > 1,
        f"{val_fraction=}, {test_fraction=} leave nothing to train on": val_fraction + test_fraction >= 1,
        f"{n_embd=} must be a multiple of 2 x {n_head=}": n_embd % (2 * n_head),
        f"{n_head=} must be a multiple of {n_kv_head=}": n_head % (n_kv_head or n_head),
        f"{tokenizer=}: {init_from} has its own": not scratch and re.match("bytes|char|bpe:", tokenizer),
        "resume goes on with the run that overwrite deletes: choose one": resume and overwrite,
        f"{tracker=} is not installed": tracker and not importlib.util.find_spec(tracker),
    }
    for message in (message for message, is_wrong in wrong.items() if is_wrong):
        fail(message)


# ---- Model: RoPE, QK-norm, squared ReLU; no biases, no learned norms. In transformers it is "nanochat" ----


def norm(x):
    """Each vector divided by its root mean square (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:  # torch's kernel takes almost twice as long
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): turn pairs of channels, the further the later."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def attend(q, k, v, dropout):
    """softmax(q k^T / sqrt(D)) v, in which each token sees itself and all before it; a single one sees all.
    q (B, n_head, T, D), k and v (B, n_kv_head, T, D) -> (B, n_head, T, D)"""
    T, gqa = q.size(2), k.size(1) < q.size(1)
    if q.device.type == "cpu" and v.dtype == torch.bfloat16 and 1 < T <= 512:
        # The same, written out: torch's kernel in bf16 on CPUs takes about four times as long on short texts.
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, n_head, T, T)
        scores = scores + torch.full((T, T), -1e9, dtype=v.dtype).triu(1)  # nothing of later tokens
        return F.dropout(scores.softmax(dim=-1, dtype=v.dtype), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1, enable_gqa=gqa)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.dropout = config.hidden_size, config.attention_dropout
        self.head_dim = C // config.num_attention_heads
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape  # D: head_dim
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))  # QK-norm bounds the attention logits
        if cache is not None:  # {layer: keys and values of all tokens so far}
            if self in cache:
                k, v = torch.cat((cache[self][0], k), dim=2), torch.cat((cache[self][1], v), dim=2)
            cache[self] = k, v
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

    def forward(self, x, cos, sin, cache=None):
        x = x + F.dropout(self.self_attn(norm(x), cos, sin, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(norm(x)), self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer of the shape that transformers' NanoChatConfig describes, with its names."""

    _no_split_modules = ("Block",)  # the parts in which FSDP2 gathers the weights, one after another

    def __init__(self, config):
        super().__init__()
        self.config, self.context = config, config.max_position_embeddings
        layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        D = config.hidden_size // config.num_attention_heads  # the size of a head
        frequency = 1.0 / 10000.0 ** (torch.arange(0, D, 2).float() / D)
        angle = torch.outer(torch.arange(self.context).float(), frequency)  # (block_size, D / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        # The first weights. What you add keeps those of its torch module, but for matrices in the blocks.
        for weight in layers.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=config.hidden_size**-0.5)
        for block in layers:  # which starts as the identity
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
        tied = self.lm_head.weight is embedding.weight
        nn.init.normal_(self.lm_head.weight, std=0.02 * tied)  # 0: the loss starts at ln(vocab_size)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) -> logits (B, T, V) in fp32; with targets (B, T), the sum of their losses; -100 has none.
        With a cache (a dict, empty at first) idx follows what is in it; -> the logits of the last (B, 1, V)."""
        start = next(iter(cache.values()))[0].size(2) if cache else 0  # the position of the first token
        x = norm(self.model.embed_tokens(idx))  # (B, T, C)
        if torch.is_autocast_enabled("cpu"):  # elsewhere it was not measured
            x = x.bfloat16()  # what runs through the blocks takes half the memory
        x = F.dropout(x, self.config.attention_dropout, self.training)
        cos, sin = (t[start : start + idx.size(1)].to(x.dtype) for t in (self.cos, self.sin))  # (T, D / 2)
        for block in self.model.layers:
            if gradient_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache)
        logits = self.lm_head(norm(x if cache is None else x[:, -1:])).float()  # (B, T, V)
        logits = 15.0 * torch.tanh(logits / 15.0)  # softcap (Gemma 2, arXiv:2408.00118): no logit runs away
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def flops_per_token(self):
        """Of a training step with full contexts (Chowdhery et al. 2022, arXiv:2204.02311)."""
        multiplied = sum(p.numel() for p in self.parameters()) - self.model.embed_tokens.weight.numel()
        return 6 * multiplied + 12 * self.config.num_hidden_layers * self.config.hidden_size * self.context


def make_gpt(vocab_size, end):
    """-> GPT of the shape that the settings say; end: the id of the end-of-text token"""
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
    )
    torch.manual_seed(seed)
    return GPT(config)


@torch.inference_mode()
def generate(model, prompt, n, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0, eos=()):
    """Yield the next token, (n,), of each of n continuations of `prompt`, a list of ids, until all said an `eos`.
    temperature 0: the likeliest token. Text that outgrows the model's context goes on from its last half."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    idx = torch.tensor([prompt] * n, device=next(model.parameters()).device)
    rng, cache, ended = torch.Generator(idx.device).manual_seed(seed), {}, torch.zeros_like(idx[:, 0])
    for _ in range(max_new_tokens):
        if idx.size(1) > model.context:
            idx, cache = idx[:, -max(1, model.context // 2) :], {}
        logits = model(idx[:, -1:] if cache else idx, cache=cache)[:, -1].float().nan_to_num()  # (n, V)
        token = logits.argmax(dim=-1)  # (n,)
        if temperature > 0:
            logits = logits / temperature
            logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
            logits = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=rng)[:, 0]
        yield token
        ended |= sum(token == end for end in eos)
        if ended.all():
            return
        idx = torch.cat((idx, token[:, None]), dim=1)


# ---- Data: documents -> token ids -> rows of block_size + 1 ids -> splits, in the cache of `datasets` ----
KINDS = {".txt": "text", ".md": "text", ".py": "text", ".csv": "csv", ".parquet": "parquet"}
KINDS |= {".jsonl": "json", ".json": "json"}
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val"), "validation")
NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "pydoc_data", "encodings"}
END = "<|endoftext|>"


def find_files():
    """-> (builder of `datasets`, {split: paths}) of the files that `dataset` names; ("hub", {}) if there are none"""
    path = Path(sysconfig.get_paths()["stdlib"] if dataset == "python" else dataset).expanduser()
    if path.is_file() or "://" in dataset:
        return KINDS.get(path.suffix, "text"), {"train": [str(path) if path.is_file() else dataset]}
    suffixes, without = ([".py"], NOT_LIBRARY) if dataset == "python" else (KINDS, ())
    files, found, size, skipped = [], {}, dict.fromkeys(KINDS.values(), 0), []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name[0] != "." and name not in without]
        files += [Path(folder, name) for name in names if name[0] != "."]
    for file in sorted(files or map(Path, glob.glob(str(path), recursive=True))):
        if file.suffix not in suffixes or not file.is_file():
            continue
        kind = KINDS[file.suffix]
        try:
            _ = kind == "text" and file.read_bytes().decode()
        except UnicodeDecodeError:
            skipped.append(file)
            continue
        top = file.relative_to(path).parts[0] if path.is_dir() else ""
        names = top, re.sub(r"-\d+-of-\d+$", "", file.stem)  # a folder at the top, or the whole name
        split = next((SPLITS[name] for name in names if name in SPLITS), "train")
        found.setdefault(kind, {}).setdefault(split, []).append(str(file))
        size[kind] += file.stat().st_size
    if skipped:
        log(f"{len(skipped)} files are not UTF-8 text and are skipped, such as {skipped[0]}")
    if not found and (path.is_dir() or path.suffix in KINDS):
        fail(f"there is no file or folder {dataset!r} with {' '.join(KINDS)} in it")
    kind = max(size, key=size.get) if found else "hub"  # a folder of data may well hold a README.md
    log(f"dataset: {dataset}, {sum(map(len, found.get(kind, {}).values()))} files of kind {kind}")
    return kind, found.get(kind, {})


def load_documents():
    """-> {split: Dataset} as the data has them; train is shuffled"""
    import datasets

    datasets.disable_progress_bars()
    kind, files = find_files()
    with named("dataset", dataset):
        if kind == "hub":
            name, config, revision = re.fullmatch(r"([^:@]*):?([^@]*)@?(.*)", dataset).groups()
            found = datasets.load_dataset(name, config or None, revision=revision or None)
        else:
            kwargs = {"sample_by": "document", "encoding": "utf-8-sig"} if kind == "text" else {}
            found = datasets.load_dataset(kind, data_files=files, **kwargs)
    if train_split not in found:
        fail(f"{dataset=} has no split {train_split!r}: --train_split= takes one of {', '.join(found)}")
    wanted = {"validation": val_fraction and not fold, "test": test_fraction}
    splits = {SPLITS[split]: rows for split, rows in found.items() if wanted.get(SPLITS.get(split))}
    splits["train"] = found[train_split].shuffle(seed=0)
    if kind == "text":
        splits = {split: rows.map(cut_texts, batched=True, batch_size=10) for split, rows in splits.items()}
    return splits


def cut_texts(batch):
    """Texts -> pieces of 64 KB to 1 MB, cut between a word and a line break: a text of any size fits in memory."""
    pieces = [re.findall(r"[\s\S]{65536,999999}?\S(?=\n)|[\s\S]{1,999999}", text) for text in batch["text"]]
    last = [i == len(of_text) for of_text in pieces for i in range(1, len(of_text) + 1)]
    return {"text": list(itertools.chain(*pieces)), "last_piece": last}


def load_tokenizer(splits, columns):
    """-> a fast tokenizer of transformers; "bpe:N" learns from train, "char" has the characters of all splits"""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = os.path.expanduser(tokenizer or ("bpe:1024" if init_from == "scratch" else init_from))
    if resume and Path(out_dir, "tokenizer.json").exists():
        name = out_dir

    def texts(rows):
        return (" ".join(map(str, row.values())) for row in rows.select_columns(columns))

    if name == "char":
        characters = sorted(set().union(*itertools.chain(*map(texts, splits.values()))))
        core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    elif name == "bytes" or re.fullmatch(r"bpe:\d+", name):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a character for each of the 256 bytes
        core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "bytes")
        core.decoder = decoders.ByteLevel()
        if name != "bytes":
            kwargs = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
            trainer = trainers.BpeTrainer(vocab_size=int(name[4:]), **kwargs)
            core.train_from_iterator(texts(splits["train"]), trainer)
    else:
        with named("tokenizer", name):
            return AutoTokenizer.from_pretrained(name)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END, pad_token=END)


def encode_texts(batch, tok, columns):
    """Documents -> token ids. Behind each stands end-of-text, and what the tokenizer puts before the next one."""
    texts, core = [text or "" for text in batch[columns[0]]], tok.backend_tokenizer
    core.encode_special_tokens = True  # an end-of-text token spelled out in a document is just text
    encoded = core.encode_batch_fast(texts, add_special_tokens=False)
    core.encode_special_tokens = False
    last, end = batch.get("last_piece", [True] * len(texts)), [tok.eos_token_id, *tok("")["input_ids"][:1]]
    ids = [np.array(row.ids + end * ends, dtype=np.uint32) for row, ends in zip(encoded, last)]
    return {"ids": ids, "bytes": [len(text.encode()) for text in texts], "tokens": list(map(len, ids))}


def cut_rows(batch, T):
    """Token ids of documents, one after another -> rows of T + 1: the last id of a row is the first of the next."""
    ids = np.concatenate(batch["ids"])
    rows = [ids[i : i + T + 1] for i in range(0, len(ids) - 1, T)]
    return {"ids": rows, "length": list(map(len, rows))}


def cut_splits(splits):
    """Cut the splits that the data does not have from the rows of train, by position."""
    shares = {"validation": 0.0 if fold else val_fraction, "test": test_fraction}
    shares = [(split, share) for split, share in shares.items() if share and split not in splits]
    k, n = map(int, fold.split("/")) if fold else (0, 1)
    rest, rows = (1 - sum(share for _, share in shares)) / n, splits["train"]
    shares = [("validation" if i == k else "train", rest) for i in range(1, n + 1)] + shares
    ends = np.round(np.cumsum([share for _, share in shares]) * len(rows)).astype(int)
    ends = np.maximum(0, np.minimum(ends, len(rows) - np.arange(len(shares))[::-1]))  # of a few, one for each
    chosen = {split: [] for split, _ in shares}
    for (split, _), start, end in zip(shares, [0, *ends], ends):
        chosen[split].extend(range(start, end))
    return splits | {split: rows.select(indices) for split, indices in chosen.items()}


def prepare_data():
    """-> (tokenizer, {split: rows of token ids}, {split: {"rows": how many, "tokens_per_byte": in its source}})"""
    splits, sizes = load_documents(), {}
    columns = choose_columns(splits)  # of text, or of prompts and answers: see Fine-tuning
    encode, cut = (encode_texts, cut_rows) if columns == [text_column] else (encode_answers, cut_answers)
    tok = load_tokenizer(splits, columns)
    if encode is encode_answers:
        tok.chat_template = tok.chat_template or CHAT_TEMPLATE
    for split, rows in splits.items():
        if not len(rows):
            fail(f"{dataset=} has nothing in its {split} split")
        kwargs = {"remove_columns": rows.column_names, "fn_kwargs": {"tok": tok, "columns": columns}}
        with named("dataset", dataset):
            ids = rows.map(encode, batched=True, batch_size=100, **kwargs)
        ids.set_format("numpy")
        n_bytes, n_tokens = (int(np.sum(ids[name][:])) for name in ("bytes", "tokens"))
        sizes[split] = {"tokens_per_byte": n_tokens / max(1, n_bytes)}
        log(f"{split}: {len(rows):,} texts, {n_bytes / 1e6:.2f} MB, {n_tokens:,} tokens to learn")
        kwargs = {"remove_columns": ids.column_names, "fn_kwargs": {"T": block_size}}
        splits[split] = ids.map(cut, batched=True, **kwargs).with_format("torch")
    splits = cut_splits(splits)
    for split, rows in splits.items():
        sizes[split] = sizes.get(split, sizes["train"]) | {"rows": len(rows)}
        if not len(rows):
            fail(f"{dataset=} is too small for a {split} split: try --val_fraction=0 --test_fraction=0")
        log(f"{split}: {len(rows):,} rows of {block_size} tokens")
    return tok, splits, sizes


def collate(rows):
    """Rows -> x, y (B, T), padded on the right: y is the token after each of x, -100 where none is learned."""
    x = nn.utils.rnn.pad_sequence([row["ids"] for row in rows], batch_first=True)
    y = [row["labels"] if "labels" in row else row["ids"] for row in rows]
    return x[:, :-1], nn.utils.rnn.pad_sequence(y, batch_first=True, padding_value=-100)[:, 1:]


def batch_rows(lengths, first_step, last_step, micro, world, rank):
    """Yield the rows of each micro-batch of this process. Each epoch is a shuffle in which rows of similar length
    share a batch. It depends on (seed, step) alone: a resume, more processes, smaller micro-batches see the same."""
    n_batches = max(1, len(lengths) // batch_size)
    for step in range(first_step, last_step):
        epoch, i = divmod(step, n_batches)
        if i == 0 or step == first_step:
            rng = np.random.default_rng([seed, epoch])
            rows = np.resize(rng.permutation(len(lengths)), n_batches * batch_size)  # few are repeated
            rows = rows[np.argsort(lengths[rows] * rng.uniform(0.9, 1.1, len(rows)))]
            batches = rng.permutation(rows.reshape(n_batches, batch_size))
        yield from batches[i].reshape(-1, world, micro)[:, rank].tolist()


# ---- Optimizers and learning rate ----


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon). It is
    torch.optim.Muon, but on all matrices of a shape at once, which keeps the processor busy, and in any dtype."""

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
    """Muon for the matrices in the blocks; AdamW for the rest: tables, the head, vectors. What somebody else has
    trained, most likely with AdamW, goes on with that. Each trained weight is in one group."""
    trained, muon = [p for p in model.parameters() if p.requires_grad], []
    if optimizer == "adamw" or init_from != "scratch":
        default = {"lora": 2e-4, "p_tuning": 1e-3}.get(adapter, 0.001 if init_from == "scratch" else 5e-5)
        groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay}]
        groups += [{"params": [p for p in trained if p.ndim <= 1]}]  # biases and gains do not decay
    else:
        default, head, blocks = 0.03, model.lm_head.weight, {id(p) for p in model.model.layers.parameters()}
        tied = head is model.model.embed_tokens.weight
        matrices = [p for p in trained if p.ndim == 2 and id(p) in blocks]
        tables = [p for p in trained if p.ndim == 2 and id(p) not in blocks and (tied or p is not head)]
        others = [p for p in trained if p.ndim != 2 or (p is head and not tied)]
        groups = [{"params": tables, "lr": embed_lr}, {"params": others, "lr": head_lr}]
        kwargs = {"lr": learning_rate or default, "weight_decay": weight_decay, "momentum": 0.95}
        if accelerator.is_fsdp2:  # which cuts matrices up among the processes: torch's own puts them together
            muon = [torch.optim.Muon(matrices, adjust_lr_fn="original", **kwargs)]
        else:
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            muon = [Muon(matrices, dtype, **kwargs)]
    groups = [group for group in groups if group["params"]]
    rest = {"betas": (beta1, beta2), "weight_decay": 0.0, "fused": True}
    return [*muon, torch.optim.AdamW(groups, learning_rate or default, **rest)]


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
def evaluate(accelerator, model, name, rows, size, micro, batches):
    """-> the loss of a split. batches: of batch_size rows, spread evenly over it; 0: all. Each process takes its
    share, in as many forward passes as the others."""
    n, world = min(len(rows), batches * batch_size or len(rows)), accelerator.num_processes
    mine = np.linspace(0, len(rows) - 1, n).astype(int)[accelerator.process_index :: world]
    loss, n_tokens = 0.0, 0
    model.eval()
    passes = range(0, math.ceil(n / world), micro)
    for i in tqdm(passes, desc=name, leave=False, disable=name != "test"):
        x, y = collate(rows.__getitems__(mine[i : i + micro].tolist() or [0]))
        y = y if i < len(mine) else torch.full_like(y, -100)  # a pass that only the others need
        n_tokens += int((y != -100).sum())
        with accelerator.autocast():
            loss += float(model(x.to(accelerator.device), y.to(accelerator.device)))
    model.train()
    loss, n_tokens = np.sum(gather_object([(loss, n_tokens)]), axis=0).tolist()
    bits = loss / n_tokens / math.log(2) * size["tokens_per_byte"]  # comparable across tokenizers
    return {f"{name}/loss": loss / n_tokens, f"{name}/bits_per_byte": bits}


@torch.compiler.set_stance("force_eager")  # each new length would be compiled anew
def write_sample(model, tok, row, step):
    """Let the model continue the beginning of a row: in all processes, as FSDP2 needs it."""
    n = int((row["labels"] != -100).int().argmax()) if "labels" in row else 16  # what stands before an answer
    prompt = row["ids"][:n].tolist()
    model.eval()
    new = [int(token) for token in generate(model, prompt, 1, 200, 0.8, seed=seed, eos=[tok.eos_token_id])]
    model.train()
    if MAIN:
        path = Path(out_dir, "samples", f"step_{step:08d}.txt")
        path.parent.mkdir(exist_ok=True)
        path.write_text(tok.decode(prompt + new), encoding="utf-8")


def evaluate_and_save(accelerator, model, splits, sizes, micro, progress):
    """-> the validation loss. The best weights so far, or the last without validation, go to the run directory."""
    values, untrained = {}, progress["step"] == 0
    better = not untrained
    if "validation" in splits:
        size = sizes["validation"]
        values = evaluate(accelerator, model, "val", splits["validation"], size, micro, eval_batches)
        better = values["val/loss"] < progress["best"] and not untrained
        progress["waited"] = 0 if better or untrained else progress["waited"] + 1
    if better:
        progress["best"] = values.get("val/loss", math.inf)
        save_weights(accelerator, model)
        if values and "test" in splits:
            save_state(accelerator, model, [], progress, Path(out_dir, "best.pt"))
    return values


# ---- The run directory: weights that transformers loads, a checkpoint that a resume continues bit for bit ----


def write_file(path, write):
    """Let `write(temporary)` make a file, then give it its name: what has the name is always complete."""
    temporary = path.with_suffix(".tmp")
    write(temporary)
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def gather(accelerator, model, frozen=False):
    """{name: weight} of what is trained, or of everything: in one piece, on the CPU, a tied one under one name."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=not frozen)
    weights = dcp.get_model_state_dict(model, options=options)
    module = accelerator.unwrap_model(model)
    once = {name for name, weight in module.named_parameters() if frozen or weight.requires_grad}
    others = {name for name, _ in module.named_parameters(remove_duplicate=False)} - once
    return {name: weight for name, weight in weights.items() if name not in others}


def save_state(accelerator, model, optimizers, progress, path):
    """All that a resume needs in one file; without optimizers the trained weights alone."""
    state = {"model": gather(accelerator, model), "progress": progress}
    if optimizers:
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state["optimizers"] = dcp.get_optimizer_state_dict(model, optimizers, options=options)
    if MAIN:
        write_file(path, lambda temporary: torch.save(state, temporary))
    accelerator.wait_for_everyone()


def load_state(accelerator, model, optimizers, path):
    """Put back what save_state wrote; -> progress. The first process reads the file and tells the others."""
    state, expected = {"model": {}, "optimizers": {}, "progress": {}}, gather(accelerator, model).keys()
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
    options.broadcast_from_rank0 = accelerator.num_processes > 1
    with named("checkpoint", str(path)):
        if MAIN:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["model"].keys() != expected:
                raise ValueError("it holds the weights of another model")
        dcp.set_model_state_dict(model, state["model"], options=options)
        if optimizers:
            dcp.set_optimizer_state_dict(model, optimizers, state["optimizers"], options=options)
    return broadcast_object_list([state["progress"]])[0]


def save_weights(accelerator, model):
    """Make the run directory a model: its weights or those of its adapter, in the library's own format."""
    module, weights = accelerator.unwrap_model(model), gather(accelerator, model, frozen=not adapter)
    if MAIN and isinstance(module, GPT):
        write_config(module)
        write_file(Path(out_dir, "model.safetensors"), lambda p: save_file(weights, p, {"format": "pt"}))
    elif MAIN:
        save_pretrained(module, weights)
    accelerator.wait_for_everyone()


@functools.cache  # once is enough
def write_config(gpt):
    """config.json: it makes the run directory a model of transformers, if transformers computes what our GPT does.
    That is tried on random weights, because the zeros that training starts from would hide most of the model."""
    from transformers import NanoChatForCausalLM

    config = gpt.config.to_dict()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        ours, theirs = GPT(gpt.config).eval(), NanoChatForCausalLM(gpt.config).eval()
        for weight in ours.parameters():
            nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
        idx = torch.randint(gpt.config.vocab_size, (1, min(1024, gpt.context)))
        try:
            theirs.load_state_dict(dict(ours.named_parameters()))
            native = torch.allclose(ours(idx), theirs(idx).logits, atol=1e-3)
        except RuntimeError:  # other names, other sizes
            native = False
    if not native:
        config |= {"model_type": "edited", "architectures": ["GPT"]}  # which transformers refuses to load
        log("edited model: sample.py and init_from load this run, transformers does not")
    write_json(Path(out_dir, "config.json"), config)


def open_run_dir():
    """End the program if out_dir holds a run that this one would overwrite, or that it cannot go on with."""
    with named("out_dir", out_dir):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        files = {path.name for path in Path(out_dir).iterdir() if not path.name.endswith(".tmp")}
    if files and "run.json" not in files:
        fail(f"{out_dir} holds other files, such as {min(files)}: choose another --out_dir")
    if files and not (resume or overwrite):
        fail(f"{out_dir} holds a run: go on with --resume=True, or delete it by --overwrite=True")
    if files and resume:
        with named("run", out_dir):
            before = json.loads(Path(out_dir, "run.json").read_text(encoding="utf-8"))["settings"]
        for name, value in settings(globals()).items():
            if name in FIXED.split() and value != before.get(name):
                fail(f"cannot resume: {name} was {before.get(name)!r}, is {value!r}; try another --out_dir")


def write_run(model, tok, sizes):
    """-> run.json, written beside the tokenizer and the script as it is."""
    path, script = Path(out_dir), Path(__file__)
    if overwrite and (path / "run.json").exists():
        shutil.rmtree(path)
        path.mkdir()
    run = {
        "kind": "lm",
        "model": type(model).__name__,
        "settings": settings(globals()),
        "command": sys.argv,
        "commit": subprocess.getoutput("git rev-parse HEAD"),
        "versions": {name: version(name) for name in ("torch", "accelerate", "transformers", "peft")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "data": sizes,
    }
    write_json(path / "run.json", run)
    shutil.copyfile(script, path / script.name)
    tok.save_pretrained(path)
    log(f"model: {run['parameters']:,} parameters, {run['trained_parameters']:,} of them trained")
    return run


# ---- Starting and stopping ----
MAIN = os.environ.get("RANK", "0") == "0"  # the first process of all writes and speaks
log = functools.partial(print, flush=True) if MAIN else lambda message: None
STOP = []  # the signals that ask the run to stop
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}  # in bf16


def catch_signals():
    """Note Ctrl-C, SIGTERM and, on Linux, the death of the launcher. Any number of them is one wish to stop."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, frame: STOP.append(signum))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
        if os.getppid() != PARENT:  # it is dead already
            STOP.append(signal.SIGTERM)


def start_accelerator():
    """-> an Accelerator on the best device there is, with precision and threads set."""
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if on_cpu:  # what only emulates it is slower in it
        bf16 = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
    precision = ("bf16" if bf16 else "no") if mixed_precision == "auto" else mixed_precision
    torch.set_float32_matmul_precision("high")  # TF32: fp32 matrices much faster, with 10 bits of mantissa
    torch.autograd.set_detect_anomaly(detect_anomaly)
    torch.use_deterministic_algorithms(deterministic)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which that needs
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # all make the model, each keeps a part of it
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # the others wait while one tokenizes
    kwargs = {"log_with": tracker or None, "project_dir": out_dir, "kwargs_handlers": [patient]}
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, **kwargs)
    if accelerator.is_fsdp2:  # the weights remain in fp32; autocast computes in bf16, as elsewhere
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if adapter == "p_tuning" or precision == "fp16":
            fail("FSDP2 goes neither with adapter='p_tuning' nor with mixed_precision='fp16'")
    if on_cpu:  # `accelerate launch` leaves a process one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if on_cpu and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # keep what a step frees (M_MMAP_MAX, M_TRIM_THRESHOLD): new pages would cost a quarter of its time
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)
    log(f"device: {accelerator.device.type} x {accelerator.num_processes}, precision {precision}")
    if accelerator.device.type != "cuda":
        log("warning: no CUDA GPU was found; small models train well without one, large ones take very long")
    return accelerator


def speed(tokens_per_s, model):
    """-> tokens/s, the share of the GPUs' peak that this is, GB of memory."""
    gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
    memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
    values = {"tokens_per_s": tokens_per_s, "memory_gb": memory / 1e9}
    peak = next((flops for name, flops in PEAK_FLOPS.items() if gpu and name in gpu), 0)
    if peak and isinstance(model, GPT):
        values["mfu"] = tokens_per_s * model.flops_per_token() / peak / int(os.environ.get("WORLD_SIZE", "1"))
    return values


# ---- Training ----


def main():
    check_settings()
    accelerator = start_accelerator()
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    micro = micro_batch_size or max(1, batch_size // world)  # rows of a forward pass
    accumulation = batch_size // (micro * world)  # forward passes of a step
    if accumulation * micro * world != batch_size:
        fail(f"{batch_size=} is no multiple of {micro} rows x {world} processes")
    if MAIN:
        open_run_dir()

    # a pretrained model comes first, so that a wrong name costs no tokenizing
    model = load_pretrained(accelerator.mixed_precision) if init_from != "scratch" else None
    with accelerator.local_main_process_first():  # the others read what the first one has cached
        tok, splits, sizes = prepare_data()
    vocab_size = 1 + max(tok.get_vocab().values())  # some tokenizers have gaps
    model = model or make_gpt(vocab_size, tok.eos_token_id)
    if vocab_size > model.config.vocab_size:
        fail(f"the tokenizer has {vocab_size} tokens, {init_from} knows {model.config.vocab_size}")
    optimizers = make_optimizers(model, accelerator)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    if compile and device.type == "cuda":
        model.compile()
    model, *prepared = accelerator.prepare(model, *optimizers)
    module = accelerator.unwrap_model(model)
    if accelerator.is_fsdp2:
        model.set_reshard_after_forward(True)  # weights that are gathered anew for each use are never stale

    # the state of the run
    path, train = Path(out_dir), splits["train"]
    progress = {"step": 0, "best": math.inf, "waited": 0, "seconds": 0.0, "metrics_bytes": 0, "sizes": sizes}
    if broadcast_object_list([resume and (path / "checkpoint.pt").exists()])[0]:
        progress = load_state(accelerator, model, optimizers, path / "checkpoint.pt")
        log(f"resumed from {path / 'checkpoint.pt'} at step {progress['step']}")
    if progress["sizes"] != sizes:
        fail(f"cannot resume: {dataset=} is not as it was; choose another --out_dir")
    step = saved = progress["step"]
    groups = [group for o in optimizers for group in o.param_groups]  # load_state makes new ones
    n_batches = max(1, len(train) // batch_size)
    total_steps = math.ceil(epochs * n_batches) if epochs else max_steps
    log(f"batches of {batch_size} rows = {world} processes x {accumulation} micro-batches x {micro}")
    log(f"{total_steps} steps, {total_steps / n_batches:.2f} epochs; learning rates {peaks}")
    if MAIN:
        run = write_run(module, tok, sizes)
        # what was written after the checkpoint is computed again
        metrics = open(path / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
        metrics.truncate(progress["metrics_bytes"])
    with named("tracker", tracker):  # without a login: WANDB_MODE=offline
        accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "train_lm"), settings(globals()))

    def report(values):
        """A row of metrics.jsonl and of the tracker, and a line on the terminal."""
        if MAIN:
            row = {"step": step, "time": round(time.monotonic() - start, 3), **values}
            metrics.write(json.dumps(row).encode() + b"\n")
        accelerator.log(values, step=step)
        log(f"step {step}/{total_steps} " + " ".join(f"{name} {value:.4g}" for name, value in values.items()))

    catch_signals()  # before the workers of the DataLoader, which a Ctrl-C must not end either
    order = batch_rows(train["length"][:].numpy(), step, total_steps, micro, world, rank)
    batches = iter(DataLoader(train, batch_sampler=order, collate_fn=collate, num_workers=num_workers))
    start, since = time.monotonic() - progress["seconds"], time.monotonic()
    tokens_since, not_finite, profiler = 0, 0, torch.profiler.profile()
    while True:
        # save, stop, evaluate, in this order: a run that goes on from here evaluates again
        if STOP:
            accelerator.set_trigger()
        stop, done = accelerator.check_trigger(), step >= total_steps
        if step > saved and (stop or done or step % save_interval == 0):
            progress["seconds"] = time.monotonic() - start
            progress["metrics_bytes"] = metrics.tell() if MAIN else 0
            save_state(accelerator, model, optimizers, progress, path / "checkpoint.pt")
            saved = step
        if stop:
            break
        if done or step % eval_interval == 0:
            if values := evaluate_and_save(accelerator, model, splits, sizes, micro, progress):
                report(values)
            write_sample(module, tok, splits.get("validation", train)[0], step)
            since, tokens_since = time.monotonic(), 0  # speed is measured between evaluations
        if done or 0 < patience <= progress["waited"]:
            break

        # one optimizer step by the mean loss over all tokens of the global batch
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * lr_at(step, total_steps)
            if "momentum" in group:  # Muon's memory is short while gradients still turn quickly
                group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)
        micro_batches = [next(batches) for _ in range(accumulation)]
        n_tokens = torch.tensor(sum(int((y != -100).sum()) for _, y in micro_batches), device=device)
        n_tokens, loss = accelerator.reduce(n_tokens, "sum"), 0.0
        torch.manual_seed(hash((seed, step, rank)))  # for dropout
        for i, (x, y) in enumerate(micro_batches):
            # gradients travel between processes once a step; FSDP2 has no room for them until then
            last = i == accumulation - 1 or accelerator.is_fsdp2
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                with accelerator.autocast():
                    part = model(x.to(device), y.to(device)) / n_tokens  # of the mean
                accelerator.backward(part * world)  # DDP and FSDP2 take the mean over processes
            loss += part.detach()
        grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
        loss = float(accelerator.reduce(loss, "sum"))
        finite = math.isfinite(loss + grad_norm)  # in one process as in all
        for optimizer in prepared:
            if finite or accelerator.scaler:  # the scaler of fp16 skips the step itself, and lowers its scale
                optimizer.step()
            optimizer.zero_grad()
        progress["step"] = step = step + 1
        tokens_since, not_finite = tokens_since + int(n_tokens), 0 if finite else not_finite + 1
        if not_finite:
            log(f"step {step}: the loss or the gradient is not finite: skipped")
        if not_finite == 10:
            raise SystemExit("ten such steps in a row: lower learning_rate, or try --detect_anomaly=True")
        if step % log_interval == 0 or step == total_steps:
            values = {"train/loss": loss, "grad_norm": grad_norm, "lr": groups[0]["lr"]}
            values["epoch"] = step / n_batches
            report(values | speed(tokens_since / (time.monotonic() - since), module))
            since, tokens_since = time.monotonic(), 0
        if profile and step == 5:
            profiler.start()
        if profile and step == 8:
            profiler.stop()
            profiler.export_chrome_trace(f"{out_dir}/trace_{rank}.json")

    # the end: the best weights meet the test split
    summary = {"steps": step, "minutes": (time.monotonic() - start) / 60, "val/loss": progress["best"]}
    if "test" in splits and not stop:
        if progress["best"] < math.inf:
            load_state(accelerator, model, [], path / "best.pt")
        test = evaluate(accelerator, model, "test", splits["test"], sizes["test"], micro, 0)
        report(test)
        summary |= test
    if MAIN and not stop:
        write_json(path / "run.json", run | {"summary": summary})
    log(f"stopped at step {step}; the same command with --resume=True goes on" if stop else "done")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    code = 128 + (STOP or [signal.SIGTERM])[0] if stop else 0
    if world > 1:  # gloo's threads may abort a process that ends in the usual way
        os._exit(code)
    raise SystemExit(code)


# ---- Fine-tuning: only with init_from, or with data that holds answers ----


class Pretrained(nn.Module):
    """A causal language model of transformers, perhaps under an adapter of peft, with the interface of GPT."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.config = lm, lm.config.get_text_config()
        self.n_virtual = getattr(getattr(lm, "active_peft_config", None), "num_virtual_tokens", 0)  # p_tuning
        self.context = (getattr(self.config, "max_position_embeddings", None) or 2**31) - self.n_virtual
        self._no_split_modules = lm._no_split_modules

    def forward(self, idx, targets=None, cache=None):
        """As GPT.forward; a cache remains empty where the model has none or, in p_tuning, begins each call anew."""
        use_cache = cache is not None and not self.n_virtual
        # Padding stands on the right, where no token looks: without a mask, the fast kernels can be used.
        out = self.lm(input_ids=idx, use_cache=use_cache, **(cache or {}))
        if use_cache and out.get("past_key_values") is not None:
            cache["past_key_values"] = out.past_key_values
        logits = out.logits[:, -idx.size(1) :]  # (B, T, V); those of the virtual tokens stand before
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def load_gpt(folder):
    """-> GPT with the weights of a run of ours"""
    from transformers import NanoChatConfig

    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    gpt = GPT(NanoChatConfig.from_dict(config | {"model_type": "nanochat", "attention_dropout": dropout}))
    load_model(gpt, Path(folder, "model.safetensors"))
    return gpt


def load_lm(name, dtype=torch.float32):
    """-> a causal language model of transformers, from a folder or the hub; an adapter comes with its base"""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = os.path.expanduser(name)
    if not Path(name, "adapter_config.json").exists():
        load = transformers.AutoModelForCausalLM.from_pretrained
        lm, info = load(name, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{name} has no weights for {min(info['missing_keys'])}")
        return lm
    config = peft.PeftConfig.from_pretrained(name)
    lm = load_lm(config.base_model_name_or_path, dtype)
    return peft.PeftModel.from_pretrained(lm, name, is_trainable=config.peft_type == "LORA")


def load(folder, run):
    """-> (model, tokenizer) of a run directory, ready to sample; run: its run.json, whose settings are taken over"""
    from transformers import AutoTokenizer

    globals().update(run["settings"])
    model = load_gpt(folder) if run["model"] == "GPT" else Pretrained(load_lm(str(folder)))
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def add_adapter(lm):
    """Freeze a model and put an adapter on it: "lora" (Hu et al. 2021, arXiv:2106.09685) adds a product of two
    small matrices to those of its layers; "p_tuning" (Liu et al. 2021, arXiv:2103.10385) learns vectors that
    stand before every text like a prompt, as the output of a small network."""
    from peft import LoraConfig, PromptEncoderConfig, get_peft_model

    if adapter == "lora":
        names = lora_targets if lora_targets == "all-linear" else lora_targets.split(",")
        config = LoraConfig(task_type="CAUSAL_LM", r=lora_rank, lora_alpha=lora_alpha, target_modules=names)
    else:
        config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)
        config.encoder_hidden_size = lm.get_input_embeddings().embedding_dim
    torch.manual_seed(seed)
    return get_peft_model(lm, config)


def load_pretrained(precision):
    """-> what init_from names: the GPT of a run of ours, or a Pretrained with the adapter asked for"""
    with named("init_from", init_from):
        path = Path(init_from, "run.json").expanduser()
        if not adapter and path.exists() and json.loads(path.read_text(encoding="utf-8"))["model"] == "GPT":
            model = load_gpt(path.parent)
        else:
            # under an adapter the frozen weights are in the precision of training
            dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16} if adapter else {}
            lm = load_lm(init_from, dtypes.get(precision, torch.float32))
            if hasattr(lm, "peft_config") and adapter != "lora":
                raise ValueError("it is an adapter: --adapter=lora goes on with one of LoRA, no other can")
            if adapter and not hasattr(lm, "peft_config"):
                lm = add_adapter(lm)
            if gradient_checkpointing:
                lm.gradient_checkpointing_enable({"use_reentrant": False})
            for weight in lm.parameters():
                weight.data = weight.data.float() if weight.requires_grad else weight.data
            model = Pretrained(lm.train())
    if block_size > model.context:
        fail(f"{block_size=} is beyond the positions of {init_from}: at most --block_size={model.context}")
    return model


def save_pretrained(model, weights):
    """Write a Pretrained as transformers or peft does, but elsewhere first."""
    state = {name.removeprefix("lm."): weight for name, weight in weights.items()}
    kwargs = {"save_embedding_layers": False} if adapter else {}
    with tempfile.TemporaryDirectory(dir=out_dir, suffix=".tmp") as folder:
        model.lm.save_pretrained(folder, state_dict=state, **kwargs)
        for path in Path(folder).iterdir():
            os.replace(path, Path(out_dir, path.name))


# Rows with answers: prompts and completions, or chats. Only the answers are learned.
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant:{% endif %}"""  # for tokenizers that have none


def choose_columns(splits):
    """-> the columns to learn from: [text_column], a prompt's and its completion's, or that of a chat's messages."""
    have = set.intersection(*(set(rows.column_names) for rows in splits.values()))
    texts = {name for name in have if "string" in getattr(splits["train"].features[name], "dtype", "")}
    if text_column == "text" or text_column not in texts:
        for columns in ["messages"], ["conversations"], [prompt_column, completion_column]:
            if have.issuperset(columns):
                log(f"learning the answers in {' and '.join(columns)}")
                return columns
    if text_column not in texts:
        advice = f"try --text_column={nearest(text_column, texts)}" if texts else "it has no text"
        fail(f"{dataset=} has no text column {text_column!r}: {advice} ({', '.join(sorted(have))})")
    return [text_column]


def cut_conversation(tok, rows):
    """Messages -> lists of (text, whether it is learned). Learned is what the chat template adds to the prompt for an
    answer, so training sees what a chat will show. Where a template writes an earlier turn in another way than the
    last one (Qwen3 leaves out its thoughts), the next answer begins a new list."""
    found, text, messages = [], None, []
    for row in rows or []:
        row = {key: value for key, value in row.items() if value is not None}
        role, content = row.get("role") or row.get("from"), row.get("content") or row.get("value") or ""
        messages.append(row | {"role": ROLES.get(role, role), "content": content})
        if messages[-1]["role"] != "assistant" or len(messages) == 1 or not (content or "tool_calls" in row):
            continue
        before = tok.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        after = tok.apply_chat_template(messages, tokenize=False)
        if not after.startswith(before):
            raise ValueError(f"the chat template does not put an answer behind its prompt: {after[:200]!r}")
        if text is None or not before.startswith(text):
            found, text = [*found, []], ""
        found[-1] += [(before[len(text) :], False), (after[len(before) :], True)]
        text = after
    return found


def encode_answers(batch, tok, columns):
    """Rows with answers -> token ids, and labels: the same where it is learned, else -100; an end is learned too."""
    out = {"ids": [], "labels": [], "bytes": [], "tokens": []}
    for row in zip(*(batch[name] for name in columns)):
        if len(columns) == 1:
            found = cut_conversation(tok, row[0])
        else:  # a prompt and its completion; what is learned needs something before it
            prompt = tok.decode(tok("")["input_ids"][:1]) + (row[0] or "") or tok.eos_token
            found = [[(prompt, False), (row[1], True)]] if row[1] else []
        for pieces in found or [[]]:  # of a row without an answer, one without tokens
            out["bytes"].append(sum(len(text.encode()) for text, learned in pieces if learned))
            if pieces and not pieces[-1][0].rstrip().endswith(tok.eos_token):  # or the model would never stop
                pieces.append((tok.eos_token, True))
            ids, labels = [], []
            for text, learned in pieces:
                part = tok(text, add_special_tokens=False)["input_ids"]
                ids, labels = ids + part, labels + (part if learned else [-100] * len(part))
            out["ids"].append(ids)
            out["labels"].append(labels)
            out["tokens"].append(sum(label != -100 for label in labels))
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
