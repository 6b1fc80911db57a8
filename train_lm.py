"""
Train a language model: one file with the model, the data and the loop.

    accelerate launch train_lm.py  # on Python's own source, anywhere
    accelerate launch train_lm.py configs/shakespeare_char.py --n_layer=8
    accelerate launch train_lm.py --dataset=my_texts/ --tokenizer=bpe:4096 --out_dir=out/mine
    accelerate launch train_lm.py configs/lora_chat.py  # a pretrained model, taught to chat

Then `python sample.py --prompt="def "` continues a text. Ctrl-C saves; --resume=True goes on.
"""

import os

PARENT = os.getppid()  # before the slow imports: a launcher may die during them

import contextlib
import ctypes
import functools
import itertools
import json
import math
import re
import shutil
import signal
import sys
import sysconfig
import time
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
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, tqdm
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader

from configurator import configure, fail, named, settings

# ---- Settings: change them here, in a config file, or by --name=value ----
# the run
out_dir = "out/lm"  # everything that the run writes
resume = False  # go on from the checkpoint in out_dir, or start if there is none
overwrite = False  # delete the run in out_dir and start anew
seed = 1337  # of weights, order of the data, dropout
# data
dataset = "python"  # "python" (its own library), a file, folder, glob, URL, or hub name:config@revision
train_split = "train"  # its name in a hub data set, as train_sft
text_column = "text"  # with the documents, where data has columns
prompt_column = "prompt"  # where there are prompts or messages, only the answers are learned
completion_column = "completion"  # of the answers to prompts
tokenizer = ""  # "bytes", "char", "bpe:N" (N tokens), hub name, folder; "": init_from's, or bpe:1024
val_fraction = 0.05  # of the data, where it has no validation split of its own; 0: no validation
test_fraction = 0.05  # likewise, for the test split, which is evaluated once, at the end
fold = ""  # "2/5": validate on the second of five parts
num_workers = 0  # DataLoader processes: 2 or more where a GPU would wait for data
# model; with init_from, only block_size counts, and dropout in a run of ours
init_from = "scratch"  # or a causal language model to go on from: hub name, folder, or run of ours
adapter = ""  # "lora" or "p_tuning": train a few new weights instead of those of init_from
block_size = 256  # context length in tokens
dropout = 0.0  # 0.1 to 0.2 for many passes over the same text
n_layer = 4  # transformer blocks
n_head = 2  # attention heads; size 64 is fastest
n_kv_head = 1  # heads of keys and values, fewer for grouped-query attention; 0: n_head
n_embd = 128  # width; n_embd / n_head, the size of a head, must be even
# adapter
lora_rank = 16  # of the product added to a frozen matrix
lora_alpha = 32.0  # the product is scaled by lora_alpha / lora_rank
lora_targets = "all-linear"  # or names of layers, as q_proj,v_proj
virtual_tokens = 20  # p_tuning: learned vectors before every text
# batch and length
batch_size = 8  # rows of block_size tokens per optimizer step, over all processes
micro_batch_size = 0  # rows per process and forward pass, if memory is short; 0: all at once
max_steps = 2000  # optimizer steps; 0: only evaluate
epochs = 0.0  # passes over the data, instead of max_steps
# optimizer and learning rate
optimizer = "muon"  # for matrices, with AdamW for the rest; or "adamw", which init_from always takes
learning_rate = 0.0  # peak; 0: muon 0.03, adamw 0.001, with init_from 5e-5, lora 2e-4, p_tuning 0.001
embed_lr = 0.3  # peak, of embeddings beside muon
head_lr = 0.004  # peak, of head and vectors beside muon
beta1 = 0.8  # AdamW's memory of the gradient
beta2 = 0.95  # AdamW's memory of the squared gradient
weight_decay = 0.03  # of the matrices in the blocks; with adamw of all matrices
warmup_steps = 20  # steps to the peak of the learning rate
lr_schedule = "wsd"  # "wsd" (warm-up, stable, decay), "cosine" or "constant"
cooldown = 0.9  # the last part of the steps, in which wsd decays
min_lr = 0.02  # at the end, as a fraction of the peak
grad_clip = 1.0  # largest norm of the gradient; 0: unlimited
# evaluation, saving, reports
eval_interval = 200  # steps between evaluations; 0: at the end
eval_batches = 20  # of batch_size rows, spread evenly over the validation split; 0: all of it
log_interval = 10  # steps between reports; 0: at the end
save_interval = 200  # steps between checkpoints; 0: at the end
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
FIXED = "dataset tokenizer fold init_from adapter block_size n_layer n_head n_kv_head n_embd"
FIXED += " optimizer beta1 beta2 weight_decay"


def check_settings():
    """End the program, before any data is touched, for values that cannot work."""
    scratch, part = init_from == "scratch", re.fullmatch(r"(\d+)/(\d+)", fold or "1/2")
    wrong = {
        f"{adapter=}: lora, p_tuning, or empty": adapter not in ("", "lora", "p_tuning"),
        f"{adapter=} needs a pretrained model, as --init_from=gpt2": adapter and scratch,
        f"{optimizer=}: muon or adamw": optimizer not in ("muon", "adamw"),
        f"{lr_schedule=}: wsd, cosine or constant": lr_schedule not in ("wsd", "cosine", "constant"),
        f"{mixed_precision=}: auto, bf16, fp16 or no": mixed_precision not in ("auto", "bf16", "fp16", "no"),
        f"{mixed_precision=} needs CUDA and --optimizer=adamw": mixed_precision == "fp16"
        and (not torch.cuda.is_available() or (scratch and optimizer == "muon")),
        f"{fold=}: 2/5 is the second of five parts": not part or not 1 <= int(part[1]) <= int(part[2]) > 1,
        f"{n_embd=} must be a multiple of 2 x {n_head=}": n_embd % (2 * n_head),
        f"{n_head=} must be a multiple of {n_kv_head=}": n_head % (n_kv_head or n_head),
        f"{tokenizer=}: {init_from} has its own": not scratch and re.match("bytes|char|bpe:", tokenizer),
        "resume goes on with the run that overwrite deletes: choose one": resume and overwrite,
    }
    if mistakes := [message for message, is_wrong in wrong.items() if is_wrong]:
        fail(mistakes[0])


# ---- Model: RoPE, QK-norm, squared ReLU; no biases, no learned norms. In transformers it is "nanochat" ----


def norm(x):
    """Divide each vector by its root mean square (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    if x.device.type == "cpu":  # torch's takes up to twice as long
        return x * (x.square().sum(dim=-1, keepdim=True) / x.size(-1) + 1e-6).rsqrt()
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def attend(q, k, v, dropout):
    """Causal attention: q (B, n_head, T, D), k and v (B, n_kv_head, T, D) -> softmax(q k^T / sqrt(D)) v, as q"""
    (B, H, T, D), K = q.shape, k.size(1)
    grouped = q.reshape(B, K, -1, D)  # heads that share keys and values are one with more queries
    if T == 1:  # the last token attends to all
        return F.scaled_dot_product_attention(grouped, k, v, dropout_p=dropout).reshape_as(q)
    if q.device.type == "cpu" and T <= 512:  # torch's kernel takes up to four times as long on short texts
        later = torch.full((T, T), -1e9, dtype=q.dtype).triu(1).repeat(H // K, 1)
        weights = (grouped / math.sqrt(D) @ k.mT + later).softmax(dim=-1, dtype=v.dtype)
        return (F.dropout(weights, dropout) @ v).view_as(q)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=K < H)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.head_dim = D = C // config.num_attention_heads
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape  # D: head_dim
        qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in qkv)  # (B, heads, T, D)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))  # QK-norm bounds the attention logits
        if cache is not None:  # {layer: keys and values of all tokens so far}
            if self in cache:
                k, v = torch.cat((cache[self][0], k), dim=2), torch.cat((cache[self][1], v), dim=2)
            cache[self] = k, v
        y = attend(q, k, v, dropout * self.training)  # (B, n_head, T, D)
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
        self.self_attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + F.dropout(self.self_attn(norm(x), cos, sin, cache), dropout, self.training)
        return x + F.dropout(self.mlp(norm(x)), dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer, with the config and the names of transformers' NanoChatForCausalLM."""

    _no_split_modules = ("Block",)  # the parts in which FSDP2 gathers weights

    def __init__(self, config):
        super().__init__()
        self.config, self.context = config, config.max_position_embeddings
        layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        D = config.hidden_size // config.num_attention_heads  # the size of a head
        angle = torch.outer(torch.arange(self.context), 1 / 10000 ** (torch.arange(0, D, 2) / D))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        # matrices in the blocks and the head: here; all else by torch
        for weight in layers.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=config.hidden_size**-0.5)
        for block in layers:  # each starts as the identity
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
        tied = self.lm_head.weight is embedding.weight
        nn.init.normal_(self.lm_head.weight, std=0.02 * tied)  # 0: the loss starts at ln(vocab_size)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) -> logits (B, T, V) in fp32; with targets (B, T), the sum of their losses; -100 has none.
        With a cache (a dict, empty at first) idx follows what is in it; -> the logits of the last (B, 1, V)."""
        start = next(iter(cache.values()))[0].size(2) if cache else 0  # the position of the first token
        x = norm(self.model.embed_tokens(idx))  # (B, T, C)
        if torch.is_autocast_enabled("cpu"):  # elsewhere not measured
            x = x.bfloat16()  # half the memory in the blocks
        x = F.dropout(x, dropout, self.training)
        cos, sin = (t[start : start + idx.size(1)].to(x.dtype) for t in (self.cos, self.sin))  # (T, D / 2)
        for block in self.model.layers:
            if gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache)
        logits = self.lm_head(norm(x if cache is None else x[:, -1:])).float()  # (B, T, V)
        logits = 15.0 * torch.tanh(logits / 15.0)  # softcap (Gemma 2, arXiv:2408.00118): no logit runs away
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def make_gpt(vocab_size, end):
    """-> GPT of the shape that the settings say; end: the id of the end-of-text token"""
    config = transformers.NanoChatConfig(
        vocab_size=vocab_size,
        max_position_embeddings=block_size,
        hidden_size=n_embd,
        intermediate_size=4 * n_embd,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        num_key_value_heads=n_kv_head or n_head,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
        architectures=["NanoChatForCausalLM"],
    )
    torch.manual_seed(seed)
    return GPT(config)


# ---- Data: documents -> rows of block_size + 1 token ids -> splits, all in the cache of `datasets` ----
KINDS = {".txt": "text", ".md": "text", ".py": "text", ".csv": "csv", ".parquet": "parquet"}
KINDS |= {".jsonl": "json", ".json": "json"}
SPLITS = {"test": "test"} | dict.fromkeys(("validation", "valid", "val"), "validation")
NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "pydoc_data", "encodings"}
END = "<|endoftext|>"


def load_documents():
    """-> DatasetDict with the splits that the data has and the settings want; train is shuffled"""
    datasets.disable_progress_bars()
    root = Path(sysconfig.get_paths()["stdlib"] if dataset == "python" else dataset)
    without = NOT_LIBRARY if dataset == "python" else ()
    kind, files, paths = "hub", [], {}  # paths: of the files of each split
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = (name for name in folders if name[0] != "." and name not in without)
        files += [Path(folder, name) for name in names if name[0] != "." and Path(name).suffix in KINDS]
    if root.is_file() or "*" in dataset or "://" in dataset:
        kind, paths = KINDS.get(Path(re.sub(r"\.gz|\?.*", "", dataset)).suffix, "text"), {"train": dataset}
    elif files:
        kind = KINDS[max(files, key=os.path.getsize).suffix]  # not a README.md
    for file in sorted(file for file in files if KINDS[file.suffix] == kind):
        try:
            _ = kind == "text" and file.read_bytes().decode()
        except UnicodeDecodeError:
            log(f"skipped, as it is not UTF-8 text: {file}")
            continue
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)  # of a part, as train-00000-of-00002.parquet
        split = SPLITS.get(file.relative_to(root).parts[0]) or SPLITS.get(stem) or "train"
        paths.setdefault(split, []).append(str(file))
    with named("dataset", dataset):
        if kind == "hub":
            name, config, revision = re.fullmatch(r"([^:@]*):?([^@]*)@?(.*)", dataset).groups()
            found = datasets.load_dataset(name, config or None, revision=revision or None)
        else:
            kwargs = {"sample_by": "document", "encoding": "utf-8-sig"} if kind == "text" else {}
            found = datasets.load_dataset(kind, data_files=paths, **kwargs)
    if train_split not in found:
        fail(f"{dataset=} has no split {train_split!r}: --train_split= takes one of {', '.join(found)}")
    wanted = {"validation": val_fraction and not fold, "test": test_fraction}
    splits = datasets.DatasetDict(train=found.pop(train_split).shuffle(seed=0))
    splits |= {SPLITS[split]: rows for split, rows in found.items() if wanted.get(SPLITS.get(split))}
    return splits.map(cut_texts, batched=True, batch_size=10) if kind == "text" else splits


def cut_texts(batch):
    """Texts -> pieces of 64 KB to 1 MB that end before a line break, so that a text of any size fits in memory."""
    pieces = [re.findall(r"[\s\S]{65536,999999}?\S(?=\n)|[\s\S]{1,999999}", text) for text in batch["text"]]
    last = [i == len(of_text) for of_text in pieces for i in range(1, len(of_text) + 1)]
    return {"text": list(itertools.chain(*pieces)), "last_piece": last}


def learn_tokens(rows, n_tokens):
    """Yield a tokenizer of bytes and frequent pairs, as JSON, which `datasets` keeps."""
    core, texts = ByteLevelBPETokenizer(), (" ".join(map(str, row.values())) for row in rows)
    core.train_from_iterator(texts, n_tokens, min_frequency=0, special_tokens=[END], show_progress=False)
    yield {"json": core.to_str()}


def load_tokenizer(splits):
    """-> a fast tokenizer of transformers; "bpe:N" learns from train, "char" has the characters of all splits"""
    name = tokenizer or ("bpe:1024" if init_from == "scratch" else init_from)
    if name == "char":
        texts = (str(x) for rows in splits.values() for row in rows for x in row.values())
        core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(sorted(set().union(*texts)))}))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    elif learned := re.fullmatch(r"bytes|bpe:(\d+)", name):
        args = {"rows": splits["train"] if learned[1] else (), "n_tokens": int(learned[1] or 257)}
        core = Tokenizer.from_str(datasets.Dataset.from_generator(learn_tokens, gen_kwargs=args)[0]["json"])
    else:
        with named("tokenizer", name):
            return transformers.AutoTokenizer.from_pretrained(name)
    kwargs = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **kwargs)


def encode_texts(batch, tok, columns):
    """Documents -> rows of block_size + 1 token ids, each begins with the last of the one before"""
    core, end = tok.backend_tokenizer, [tok.eos_token_id, *tok("")["input_ids"][:1]]  # and the next <bos>
    core.encode_special_tokens = True  # spelled out in a document, they are just text
    encoded = core.encode_batch_fast([text or "" for text in batch[columns[0]]], add_special_tokens=False)
    last = batch.get("last_piece", [True] * len(encoded))
    ids = np.concatenate([np.array(text.ids + end * ends, np.uint32) for text, ends in zip(encoded, last)])
    rows = [ids[i : i + block_size + 1] for i in range(0, len(ids) - 1, block_size)]
    return {"ids": rows, "length": list(map(len, rows))}


def prepare_data():
    """-> (tokenizer, {split: rows of token ids}). Splits that the data does not have are cut from the end of train."""
    splits = load_documents()
    columns = choose_columns(splits["train"].features)
    tok = load_tokenizer(splits.select_columns(columns))
    encode = encode_texts if columns == [text_column] else encode_answers
    kwargs = {"remove_columns": splits["train"].column_names, "fn_kwargs": {"tok": tok, "columns": columns}}
    with named("dataset", dataset):
        splits = dict(splits.map(encode, batched=True, batch_size=100, **kwargs).with_format("torch"))
        if test_fraction and "test" not in splits:
            splits |= splits["train"].train_test_split(test_fraction, shuffle=False)
        if fold:
            k, n = map(int, fold.split("/"))
            parts = [splits["train"].shard(n, i, contiguous=True) for i in range(n)]
            splits |= {"validation": parts.pop(k - 1), "train": datasets.concatenate_datasets(parts)}
        elif val_fraction and "validation" not in splits:
            parts = splits["train"].train_test_split(val_fraction, shuffle=False)
            splits |= {"validation": parts["test"], "train": parts["train"]}
    for split, rows in splits.items():
        if not len(rows):
            fail(f"{dataset=} has nothing to learn from in its {split} split")
        log(f"{split}: {len(rows):,} rows of {block_size} tokens")
    return tok, splits


def collate(rows):
    """Rows -> x, y (B, T), padded on the right: y is the token after each of x, -100 where none is learned."""
    x = nn.utils.rnn.pad_sequence([row["ids"] for row in rows], True)
    y = nn.utils.rnn.pad_sequence([row.get("labels", row["ids"]) for row in rows], True, -100)
    return x[:, :-1], y[:, 1:]


def batch_rows(lengths, first_step, last_step, micro, world, rank):
    """Yield the rows of each micro-batch of this process. An epoch is a shuffle in which rows of similar length share
    a batch. It depends on (seed, step) alone, whatever the number of processes or the size of micro-batches."""
    n_batches = max(1, len(lengths) // batch_size)
    for step in range(first_step, last_step):
        epoch, i = divmod(step, n_batches)
        if i == 0 or step == first_step:
            rng = np.random.default_rng([seed, epoch])
            rows = np.resize(rng.permutation(len(lengths)), n_batches * batch_size)  # few rows repeat
            rows = rows[np.argsort(lengths[rows] * rng.uniform(0.9, 1.1, len(rows)))]
            batches = rng.permutation(rows.reshape(n_batches, batch_size))
        yield from batches[i].reshape(-1, world, micro)[:, rank].tolist()


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
    """Muon for the matrices in the blocks, AdamW for tables, the head and vectors; or AdamW for all."""
    kwargs = {"betas": (beta1, beta2), "weight_decay": 0.0, "fused": True}
    if optimizer == "adamw" or init_from != "scratch":
        default = {"lora": 2e-4, "p_tuning": 1e-3}.get(adapter, 0.001 if init_from == "scratch" else 5e-5)
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
        return [torch.optim.AdamW(groups, learning_rate or default, **kwargs)]
    matrices, tables, others = [], [], []
    for name, p in model.named_parameters():  # a tied head is a table: it has the name of the embedding
        in_blocks, is_head = name.startswith("model.layers."), name == "lm_head.weight"
        (others if p.ndim != 2 or is_head else matrices if in_blocks else tables).append(p)
    groups = [{"params": ps, "lr": lr} for ps, lr in ((tables, embed_lr), (others, head_lr)) if ps]
    adamw = torch.optim.AdamW(groups, **kwargs)
    kwargs = {"lr": learning_rate or 0.03, "weight_decay": weight_decay, "momentum": 0.95}
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


# ---- The run directory ----


def write_file(name, content):
    """Write a .json or a .pt; under its name there is always a complete file."""
    temporary = Path(out_dir, f"{name}{RANK}.tmp")
    with open(temporary, "wb") as f:
        f.write(json.dumps(content, indent=1).encode()) if name[-5:] == ".json" else torch.save(content, f)
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


def save_state(accelerator, model, optimizers, progress, name):
    """Write all that a resume needs, or without optimizers the trained weights."""
    weights, optimizer_state = gather(accelerator, model, optimizers)
    if MAIN:
        write_file(name, {"model": weights, "optimizers": optimizer_state, "progress": progress})


def load_state(accelerator, model, optimizers, name, fixed):
    """Put back what save_state wrote, read by the first process; -> progress"""
    state, expected = {"model": {}, "optimizers": {}, "progress": {}}, gather(accelerator, model)[0].keys()
    options = dcp.StateDictOptions(True, cpu_offload=True, strict=False, broadcast_from_rank0=WORLD > 1)
    with named("checkpoint", f"{out_dir}/{name}"):
        if MAIN:
            state = torch.load(Path(out_dir, name), map_location="cpu", weights_only=True)
            if changed := dict(state["progress"]["fixed"].items() - fixed.items()):
                raise ValueError(f"it was made with {changed}: choose another --out_dir")
            if state["model"].keys() != expected:
                raise ValueError("it holds the weights of another model")
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


def write_run(model, tok, splits):
    """-> the content of run.json, written beside the tokenizer and the script as it is"""
    if overwrite:
        shutil.rmtree(out_dir)
        Path(out_dir).mkdir()
    run = {"kind": "lm", "model": type(model).__name__.removeprefix("FSDP"), "command": sys.argv}
    run["versions"] = {package.__name__: package.__version__ for package in (torch, transformers, datasets)}
    run["parameters"] = sum(p.numel() for p in model.parameters())
    run["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run |= {"settings": settings(globals()), "rows": {split: len(rows) for split, rows in splits.items()}}
    write_file("run.json", run)
    shutil.copy(__file__, out_dir)
    tok.save_pretrained(out_dir)
    log(f"model: {run['parameters']:,} parameters, {run['trained_parameters']:,} of them trained")
    return run


# ---- Starting, evaluating, training, stopping ----
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
MAIN = RANK == 0  # the first of all processes writes and reports
log = functools.partial(print, flush=True) if MAIN else lambda message: None
STOP = []  # the signals that ask the run to stop
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}  # bf16


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
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # the others wait while one tokenizes
    kwargs = {"log_with": tracker or None, "project_dir": out_dir, "kwargs_handlers": [patient]}
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, **kwargs)
    if accelerator.is_fsdp2:  # weights remain in fp32; autocast computes in bf16
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
def evaluate(accelerator, model, tok, split, rows, micro, batches):
    """-> the loss of a split per token, and per byte, comparable across tokenizers. batches: how many, spread evenly;
    0: all. The processes make equally many passes."""
    n = min(len(rows), batches * batch_size or len(rows))
    mine = np.linspace(0, len(rows) - 1, n).astype(int)[RANK::WORLD]
    loss, n_tokens, n_bytes = 0.0, 0, 0
    model.eval()
    for i in tqdm(range(0, math.ceil(n / WORLD), micro), desc=split, leave=False, disable=split != "test"):
        x, y = collate(rows.__getitems__(mine[i : i + micro].tolist() or [0]))
        y = y if i < len(mine) else torch.full_like(y, -100)  # a pass that only the others need
        with accelerator.autocast():
            loss += float(model(x.to(accelerator.device), y.to(accelerator.device)))
        n_tokens += int((y != -100).sum())
        texts = tok.backend_tokenizer.decode_batch([row[row != -100].tolist() for row in y])
        n_bytes += len("".join(texts).encode())
    loss, n_tokens, n_bytes = np.sum(gather_object([(loss, n_tokens, n_bytes)]), axis=0).tolist()
    return {f"{split}/loss": loss / n_tokens, f"{split}/bits_per_byte": loss / n_bytes / math.log(2)}


def evaluate_and_save(accelerator, model, tok, splits, micro, progress, report):
    """Report the validation loss, keep the best weights (without validation the last), write a sample."""
    loss, module = -math.inf, accelerator.unwrap_model(model).eval()
    rows = splits.get("validation", splits["train"])
    if "validation" in splits:
        report(values := evaluate(accelerator, model, tok, "val", rows, micro, eval_batches))
        loss = values["val/loss"]
    progress["waited"] += progress["step"] > 0
    if progress["step"] and loss <= progress["best"]:
        progress |= {"best": loss, "waited": 0}
        weights, _ = gather(accelerator, model, frozen=not adapter)
        if MAIN:
            save_weights(module, weights)
        if "test" in splits:
            save_state(accelerator, model, [], progress, "best.pt")
    n = int((rows[0]["labels"] != -100).int().argmax()) if "labels" in rows[0] else 16  # up to an answer
    prompt = rows[0]["ids"][:n].tolist()  # all processes speak, for FSDP2
    with torch.compiler.set_stance("force_eager"):  # compiled, each new length takes a minute
        new = generate(module, prompt, 1, 200, 0.8, seed=seed, eos=[tok.eos_token_id])
        text = tok.decode(prompt + [int(token) for token in new])
    model.train()
    if MAIN:
        Path(out_dir, "samples").mkdir(exist_ok=True)
        Path(out_dir, f"samples/step_{progress['step']:08d}.txt").write_text(text, encoding="utf-8")


def speed(tokens_per_s, model):
    """-> tokens/s, memory, and mfu: the share of the GPUs' peak FLOPS (Chowdhery et al. 2022, arXiv:2204.02311)"""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
    values = {"tokens_per_s": tokens_per_s, "memory_gb": memory / 1e9}
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    if peak and isinstance(model, GPT):
        multiplied = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
        flops = 6 * multiplied + 12 * len(model.model.layers) * model.config.hidden_size * block_size
        values["mfu"] = tokens_per_s * flops / peak / WORLD
    return values


def main():
    check_settings()
    accelerator = start_accelerator()
    device = accelerator.device
    micro = micro_batch_size or max(1, batch_size // WORLD)  # rows of a forward pass
    accumulation = batch_size // (micro * WORLD)  # forward passes of a step
    if accumulation * micro * WORLD != batch_size:
        fail(f"{batch_size=} is no multiple of {micro} rows x {WORLD} processes")
    open_run_dir()

    # first: a wrong name costs no tokenizing
    model = load_pretrained(accelerator.mixed_precision) if init_from != "scratch" else None
    with accelerator.local_main_process_first():  # the others read what the first has cached
        tok, splits = prepare_data()
    model = model or make_gpt(1 + max(tok.get_vocab().values()), tok.eos_token_id)  # some have gaps
    if tok.vocab_size > model.config.vocab_size:
        fail(f"the tokenizer has {tok.vocab_size} tokens, {init_from} knows {model.config.vocab_size}")
    optimizers = make_optimizers(model, accelerator)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    if compile and device.type == "cuda":
        model.compile()
    model, *prepared = accelerator.prepare(model, *optimizers)
    module = accelerator.unwrap_model(model)
    if accelerator.is_fsdp2:
        model.set_reshard_after_forward(True)  # weights gathered for each use are never stale

    fixed = {name: globals()[name] for name in FIXED.split()} | {"rows": len(splits["train"])}
    progress = {"step": 0, "best": math.inf, "waited": 0, "seconds": 0.0, "metrics_bytes": 0, "fixed": fixed}
    if broadcast_object_list([resume and Path(out_dir, "checkpoint.pt").exists()])[0]:
        progress = load_state(accelerator, model, optimizers, "checkpoint.pt", fixed)
        log(f"resumed from {out_dir}/checkpoint.pt at step {progress['step']}")
    step = progress["step"]
    groups = [group for o in optimizers for group in o.param_groups]  # loading made new ones
    n_batches = max(1, len(splits["train"]) // batch_size)
    total_steps = math.ceil(epochs * n_batches) if epochs else max_steps
    if MAIN:
        run = write_run(module, tok, splits)
        metrics = open(Path(out_dir, "metrics.jsonl"), "ab", buffering=0)  # noqa: SIM115
        metrics.seek(metrics.truncate(progress["metrics_bytes"]))  # the rest is done again
    with named("tracker", tracker):  # without a login: WANDB_MODE=offline
        accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "train_lm"), settings(globals()))

    def report(values):
        if MAIN:
            row = {"step": step, "time": round(time.monotonic() - start, 3), **values}
            metrics.write(json.dumps(row).encode() + b"\n")
        accelerator.log(values, step=step)
        log(f"step {step}/{total_steps} " + " ".join(f"{name} {value:.5g}" for name, value in values.items()))

    catch_signals()  # before the workers, which Ctrl-C must not end
    order = batch_rows(splits["train"]["length"][:].numpy(), step, total_steps, micro, WORLD, RANK)
    loader = DataLoader(splits["train"], batch_sampler=order, collate_fn=collate, num_workers=num_workers)
    batches, start = iter(loader), time.monotonic() - progress["seconds"]
    profiler = torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(out_dir))
    since, tokens_since, skipped = time.monotonic(), 0, 0
    while True:
        # save, then evaluate: a run that goes on from here does both again
        if STOP:
            accelerator.set_trigger()
        stop, done = accelerator.check_trigger(), step >= total_steps
        if step and (stop or done or step % (save_interval or math.inf) == 0):
            progress["seconds"] = time.monotonic() - start
            progress["metrics_bytes"] = metrics.tell() if MAIN else 0
            save_state(accelerator, model, optimizers, progress, "checkpoint.pt")
        if not stop and (done or step % (eval_interval or math.inf) == 0):
            evaluate_and_save(accelerator, model, tok, splits, micro, progress, report)
            since, tokens_since = time.monotonic(), 0  # speed is measured between evaluations
        if stop or done or 0 < patience <= progress["waited"]:
            break

        # one step by the mean loss over all tokens of the global batch
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * lr_at(step, total_steps)
            if "momentum" in group:  # of muon: shorter while gradients turn quickly
                group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)
        micro_batches = [next(batches) for _ in range(accumulation)]
        n_tokens = torch.tensor(sum(int((y != -100).sum()) for _, y in micro_batches), device=device)
        n_tokens, loss = accelerator.reduce(n_tokens, "sum"), 0.0
        torch.manual_seed(hash((seed, step, RANK)))  # for dropout
        for i, (x, y) in enumerate(micro_batches):
            # gradients travel once a step; FSDP2 has no room for them until then
            sync = i == accumulation - 1 or accelerator.is_fsdp2
            with contextlib.nullcontext() if sync else accelerator.no_sync(model):
                with accelerator.autocast():
                    part = model(x.to(device), y.to(device)) / n_tokens  # of the mean
                accelerator.backward(part * WORLD)  # DDP and FSDP2 take the mean over processes
            loss += part.detach()
        grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
        loss = float(accelerator.reduce(loss, "sum"))
        finite = math.isfinite(loss + grad_norm)  # in one process as in all
        for optimizer in prepared:
            if finite or accelerator.scaler:  # fp16's scaler skips it itself, and lowers its scale
                optimizer.step()
            optimizer.zero_grad()
        progress["step"] = step = step + 1
        tokens_since, skipped = tokens_since + int(n_tokens), 0 if finite else skipped + 1
        if skipped:
            log(f"step {step}: the loss or the gradient is not finite: skipped")
        if skipped == 10:
            raise SystemExit("ten such steps in a row: lower learning_rate, or try --detect_anomaly=True")
        if step % (log_interval or math.inf) == 0 or step == total_steps:
            values = {"train/loss": loss, "grad_norm": grad_norm, "lr": groups[0]["lr"]}
            values |= speed(tokens_since / (time.monotonic() - since), module)
            report(values | {"epoch": step / n_batches})
            since, tokens_since = time.monotonic(), 0
        if profile and step in (5, 8):
            profiler.start() if step == 5 else profiler.stop()

    # the end: the test loss of the best weights
    summary = {"steps": step, "minutes": (time.monotonic() - start) / 60}
    summary |= {"val/loss": progress["best"]} if math.isfinite(progress["best"]) else {}
    if "test" in splits and not stop:
        if math.isfinite(progress["best"]):
            load_state(accelerator, model, [], "best.pt", fixed)
        report(values := evaluate(accelerator, model, tok, "test", splits["test"], micro, 0))
        summary |= values
    if MAIN and not stop:
        write_file("run.json", run | {"summary": summary})
    finish(accelerator, step, stop)


# ---- Sampling, and models as other programs read them ----


@torch.no_grad()
def generate(model, prompt, n, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0, eos=()):
    """Yield the next token, (n,), of n continuations of `prompt`, a list of ids, until each has had an `eos`.
    temperature < 0.001: the likeliest token. Text that outgrows the model's context goes on from its last half."""
    idx = torch.tensor([prompt] * n, device=next(model.parameters()).device)
    rng, cache, ended = torch.Generator().manual_seed(seed), {}, torch.zeros_like(idx[:, 0])
    for _ in range(max_new_tokens):
        if idx.size(1) > model.context:
            idx, cache = idx[:, -max(1, model.context // 2) :], {}
        logits = model(idx[:, -1:] if cache else idx, cache=cache)[:, -1].float().nan_to_num()  # (n, V)
        token = logits.argmax(dim=-1)  # (n,)
        if temperature > 1e-3:
            logits = logits / temperature
            logits = transformers.TopKLogitsWarper(top_k)(None, logits) if top_k else logits
            logits = transformers.TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
            total = logits.softmax(dim=-1).cpu().cumsum(dim=-1)  # torch.multinomial is slow on CPUs
            random = 1 - torch.rand(n, 1, generator=rng)  # in (0, 1], on any device the same
            token = torch.searchsorted(total, total[:, -1:] * random)[:, 0].to(idx.device)
        yield token
        ended |= sum(token == end for end in eos)
        if ended.all():
            return
        idx = torch.cat((idx, token[:, None]), dim=1)


def save_weights(model, weights):
    """Make the run directory a model of transformers or peft; each file is written elsewhere first."""
    folder = Path(out_dir, "model.tmp")
    folder.mkdir(exist_ok=True)
    if isinstance(model, GPT):
        config = model.config.to_dict()
        if not is_native(model):  # a name that transformers refuses
            config |= {"model_type": "edited", "architectures": ["GPT"]}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        weights = {name.removeprefix("lm."): weight for name, weight in weights.items()}
        model.lm.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    for path in folder.iterdir():
        path.replace(Path(out_dir, path.name))
    folder.rmdir()


@functools.cache
def is_native(gpt):
    """Does transformers compute the same? Tried on random weights: zeros hide a difference."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        ours, theirs = GPT(gpt.config).eval(), transformers.NanoChatForCausalLM(gpt.config).eval()
        for weight in ours.parameters():
            nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
        idx = torch.randint(gpt.config.vocab_size, (1, min(1024, gpt.context)))
        with contextlib.suppress(RuntimeError):  # other names, other sizes
            theirs.load_state_dict(dict(ours.named_parameters()))
            if torch.allclose(ours(idx), theirs(idx).logits, atol=1e-3):
                return True
    return log("edited model: sample.py and init_from load this run, transformers does not")


def load(folder, run, base=""):
    """-> (model, tokenizer) of a run directory; run: its run.json; base: where the model under an adapter is now"""
    globals().update(run["settings"])
    return load_model(str(folder), base=base).eval(), transformers.AutoTokenizer.from_pretrained(folder)


# ---- Fine-tuning: only with init_from, or with data that holds answers ----


class Pretrained(nn.Module):
    """A causal language model of transformers or peft with the interface of GPT."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.config, self._no_split_modules = lm, lm.config.get_text_config(), lm._no_split_modules
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.n_virtual = getattr(getattr(lm, "active_peft_config", None), "num_virtual_tokens", 0)  # p_tuning
        self.context = (getattr(self.config, "max_position_embeddings", None) or 2**31) - self.n_virtual

    def forward(self, idx, targets=None, cache=None):
        """As GPT.forward; a cache remains empty where the model has none or, in p_tuning, begins each call anew."""
        use_cache = cache is not None and not self.n_virtual
        # padding is on the right, where no token sees it: no mask is needed
        out = self.lm(input_ids=idx, use_cache=use_cache, **(cache or {}))
        if use_cache and out.get("past_key_values") is not None:
            cache["past_key_values"] = out.past_key_values
        logits = out.logits[:, -idx.size(1) :]  # (B, T, V); those of the virtual tokens stand before
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def load_model(name, dtype=torch.float32, base=""):
    """-> the GPT of a run of ours, or else a Pretrained; an adapter comes with its base, which is now in `base`"""
    run = Path(name, "run.json")
    if not adapter and run.exists() and json.loads(run.read_text())["model"] == "GPT":
        gpt = GPT(transformers.NanoChatConfig.from_json_file(Path(name, "config.json")))
        safetensors.torch.load_model(gpt, Path(name, "model.safetensors"))
        return gpt
    import peft

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if Path(name, "adapter_config.json").exists():
        lm = load_model(base or peft.PeftConfig.from_pretrained(name).base_model_name_or_path, dtype).lm
        return Pretrained(peft.PeftModel.from_pretrained(lm, name, is_trainable=adapter == "lora"))
    lm, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{name} has no weights for {min(info['missing_keys'])}")
    return Pretrained(lm)


def load_pretrained(precision):
    """-> what init_from names, with the adapter asked for, whose base is in the precision of training. LoRA: Hu et al.
    2021, arXiv:2106.09685; P-tuning, vectors that stand before every text: Liu et al. 2021, arXiv:2103.10385"""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(adapter and precision, torch.float32)
    with named("init_from", init_from):
        model = load_model(init_from, dtype)
        if hasattr(getattr(model, "lm", None), "peft_config") and adapter != "lora":
            raise ValueError("it is an adapter: --adapter=lora goes on with a LoRA, but not with others")
        if adapter and not hasattr(model.lm, "peft_config"):
            import peft

            torch.manual_seed(seed)
            targets = lora_targets if lora_targets == "all-linear" else lora_targets.split(",")
            lora = peft.LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=targets)
            size = {"num_virtual_tokens": virtual_tokens, "encoder_hidden_size": model.config.hidden_size}
            config = lora if adapter == "lora" else peft.PromptEncoderConfig(**size)
            config.task_type = "CAUSAL_LM"
            model = Pretrained(peft.get_peft_model(model.lm, config))
    if block_size > model.context:
        fail(f"{block_size=} is beyond the positions of {init_from}: at most --block_size={model.context}")
    return model.train()


def choose_columns(features):
    """-> the columns with messages, with prompts and completions, or [text_column]"""
    for columns in ["messages"], ["conversations"], [prompt_column, completion_column]:
        if features.keys() >= set(columns) and text_column == "text":
            log(f"learning the answers in {' and '.join(columns)}")
            return columns
    texts = [name for name in features if "string" in getattr(features[name], "dtype", "")]
    if text_column not in texts:
        fail(f"{dataset=} has no text in {text_column!r}: --text_column= takes one of {', '.join(texts)}")
    return [text_column]


def cut_conversation(tok, rows):
    """Messages -> lists of (text, is it learned): what the chat template adds to the prompt for an answer is.
    Where it writes earlier turns in another way than the last (Qwen3 without thoughts), an answer begins a new list."""
    found, text, messages = [], None, []
    names = {"from": "role", "value": "content", "human": "user", "gpt": "assistant"}  # of ShareGPT
    for row in rows or []:
        row = {names.get(key, key): value for key, value in row.items() if value is not None}
        messages.append({"content": "", **row, "role": names.get(row["role"], row["role"])})
        if messages[-1]["role"] != "assistant" or len(messages) == 1:
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
    """Rows with answers -> token ids, and labels: the same where they are learned, else -100. What is longer than
    block_size + 1 is cut off; rows with nothing to learn are dropped."""
    found, out = [], {"ids": [], "labels": [], "length": []}
    for row in zip(*(batch[name] for name in columns)):
        if len(columns) == 1:
            found += cut_conversation(tok, row[0])
        elif row[1]:
            found.append([(row[0] or tok.eos_token, False), (row[1], True)])
    for pieces in found:
        if not pieces[-1][0].rstrip().endswith(tok.eos_token):  # or it would never stop
            pieces.append((tok.eos_token, True))
        ids, labels = [], []
        for text, learned in pieces:
            n, room = min(1, len(ids)), block_size + 1 - len(ids)  # after an <eos>, Llama's adds no space
            begin = len(columns) > 1 and not ids  # a chat template writes <bos> itself
            part = tok(n * tok.eos_token + text, add_special_tokens=begin)["input_ids"][n:][:room]
            ids, labels = ids + part, labels + (part if learned else [-100] * len(part))
        if max(labels) >= 0:
            for name, value in zip(out, (ids, labels, len(ids))):
                out[name].append(value)
    return out


if __name__ == "__main__":
    configure(globals())
    main()
