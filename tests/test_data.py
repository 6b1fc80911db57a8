"""
Data: tokenizers give back the text they were given; splits are disjoint, complete and nanoGPT's where the text is cut;
every way to name data reads the same documents; the order of the samples is a function of (seed, sample number).
"""

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train_lm

WORDS = [
    "the cat sat on the mat\n",
    "héllo wörld\r\n\tindented  twice  ",
    "数学 🙂 <|endoftext|> end",
    "x" * 300,
]


@pytest.fixture
def prepare(monkeypatch):
    """prepare(name=value ...) -> (folder, facts, {split: tokens}) of train_lm.prepare_data under these settings."""

    def prepare(**values):
        for name, value in {"block_size": 4, "tokenizer": "bytes", **values}.items():
            monkeypatch.setattr(train_lm, name, str(value) if isinstance(value, Path) else value)
        folder, facts = train_lm.prepare_data()
        dtype = np.uint16 if facts["vocab_size"] <= 65536 else np.uint32
        return (
            folder,
            facts,
            {split: np.fromfile(folder / f"{split}.bin", dtype) for split in facts["splits"]},
        )

    return prepare


def decoded(folder, tokens):
    """The documents in a stream of tokens."""
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    assert tokens[-1] == tok.eos_token_id
    ends = np.flatnonzero(tokens == tok.eos_token_id)
    parts = np.split(tokens, ends + 1)[:-1]
    return [tok.decode(part[:-1].tolist(), clean_up_tokenization_spaces=False) for part in parts]


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "bpe:300"])
def test_tokens_decode_to_the_very_text(prepare, tmp_path, tokenizer):
    texts = [word * n for n in (1, 2, 3) for word in WORDS]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder, facts, tokens = prepare(dataset=tmp_path / "t.jsonl", tokenizer=tokenizer, test_fraction=0.3)
    assert sorted(sum((decoded(folder, part) for part in tokens.values()), [])) == sorted(texts)
    numbers = facts["splits"].values()
    assert sum(n["documents"] for n in numbers) == len(texts)
    assert sum(n["bytes"] for n in numbers) == sum(len(text.encode()) for text in texts)
    assert sum(n["tokens"] for n in numbers) == sum(map(len, tokens.values()))


@hypothesis_settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1))
@pytest.mark.parametrize("name", ["bytes", "bpe:280"])
def test_byte_tokenizers_represent_any_text(name, text):
    from datasets import Dataset

    text_to_learn_from = Dataset.from_dict({"text": ["some text to learn from " * 9]})
    tok = train_lm.make_tokenizer(name, {"train": (text_to_learn_from, np.arange(1))})
    tok.backend_tokenizer.encode_special_tokens = True
    text = text.encode(errors="ignore").decode()
    assert tok.decode(tok(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_cutting_long_texts_for_the_threads_changes_no_token(prepare, tmp_path, monkeypatch):
    text = "".join(f"def f{i}(x):\n\n    return x + {i}  # {'é' * (i % 7)}\n\n\n" for i in range(9000))
    (tmp_path / "long.txt").write_text(text)
    folder, _, tokens = prepare(
        dataset=tmp_path / "long.txt", tokenizer="bpe:400", val_fraction=0.0, test_fraction=0.0
    )
    from tokenizers import Tokenizer

    whole = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert len(text) > 3 * 65536 and tokens["train"][:-1].tolist() == whole


def test_bpe_learns_from_the_train_split_alone(prepare, tmp_path):
    for split, word in (("train", "banana "), ("val", "quixotic "), ("test", "quixotic ")):
        (tmp_path / f"{split}.txt").write_text(word * 200)
    folder, _, tokens = prepare(dataset=tmp_path, tokenizer="bpe:270")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("banana" in token for token in vocabulary) and not any("qui" in token for token in vocabulary)
    assert decoded(folder, tokens["validation"]) == decoded(folder, tokens["test"]) == ["quixotic " * 200]


def test_one_text_is_cut_by_position_as_nanogpt_does(prepare, tmp_path):
    text = "".join(np.random.default_rng(0).choice(list(string.ascii_letters), 10007))
    (tmp_path / "t.txt").write_text(text)
    folder, _, tokens = prepare(
        dataset=tmp_path / "t.txt", tokenizer="char", val_fraction=0.1, test_fraction=0.0
    )
    assert decoded(folder, tokens["train"]) == [text[: int(0.9 * len(text))]]
    assert decoded(folder, tokens["validation"]) == [text[int(0.9 * len(text)) :]]


@pytest.mark.parametrize("n_documents", [1, 3, 40])
def test_folds_are_disjoint_and_cover_everything(prepare, tmp_path, n_documents):
    for i in range(n_documents):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} " * (3 + i % 5) * (100 // n_documents))
    parts, tests = [], []
    for k in range(1, 5):
        folder, _, tokens = prepare(dataset=tmp_path, fold=f"{k}/4", test_fraction=0.1)
        texts = {split: decoded(folder, part) for split, part in tokens.items()}
        parts.append(texts["validation"])
        tests.append(texts["test"])
        everything = "".join(sorted("".join(sum(texts.values(), []))))
        assert everything == "".join(sorted("".join(p.read_text() for p in tmp_path.glob("*.txt"))))
        if n_documents == 40:  # whole documents, each in one split
            assert len(set(sum(texts.values(), []))) == sum(map(len, texts.values())) or n_documents < 40
    assert all(test == tests[0] for test in tests)
    characters = "".join(sorted("".join(sum(parts + tests[:1], []))))
    assert characters == everything  # the parts and the test split are all there is, and nothing is in two


def test_splits_do_not_depend_on_the_seed_nor_on_other_files_names(prepare, tmp_path):
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"<{i}>" * 40)
    _, before, _ = prepare(dataset=tmp_path, val_fraction=0.2, seed=1)
    _, after, _ = prepare(dataset=tmp_path, val_fraction=0.2, seed=2)
    assert before == after
    size = before["splits"]["validation"]["bytes"] / sum(n["bytes"] for n in before["splits"].values())
    assert 0.19 < size < 0.24


def test_every_way_to_name_data_reads_the_same_documents(prepare, tmp_path):
    from datasets import Dataset, DatasetDict

    texts = [f"text number {i}, {'é' * i}\n" for i in range(12)]
    forms = {name: tmp_path / name for name in ("folder", "jsonl", "parquet", "csv", "saved", "splits")}
    for path in forms.values():
        path.mkdir()
    for i, text in enumerate(texts):
        (forms["folder"] / f"{i}.md").write_text(text, newline="")
    data = Dataset.from_dict({"body": texts, "other": range(12)})
    data.to_json(forms["jsonl"] / "data.jsonl")
    data.to_parquet(forms["parquet"] / "data.parquet")
    data.to_csv(forms["csv"] / "data.csv")
    data.save_to_disk(forms["saved"] / "x")
    DatasetDict(
        train=data.select(range(8)), validation=data.select([8, 9]), test=data.select([10, 11])
    ).save_to_disk(forms["splits"] / "x")
    names = {"glob": f"{forms['folder']}/*.md", "folder": forms["folder"], "saved": forms["saved"] / "x"}
    names |= {kind: forms[kind] / f"data.{kind}" for kind in ("jsonl", "parquet", "csv")}
    for name in names.values():
        folder, _, tokens = prepare(dataset=name, text_column="body", test_fraction=0.2, val_fraction=0.2)
        assert sorted(sum((decoded(folder, part) for part in tokens.values()), [])) == sorted(texts), name
    for i, text in enumerate(texts):  # splits by folder
        split = tmp_path / "by_folder" / ("train" if i < 8 else "val" if i < 10 else "test")
        split.mkdir(parents=True, exist_ok=True)
        (split / f"{i:02}.md").write_text(text, newline="")
    folder, _, tokens = prepare(dataset=tmp_path / "by_folder")
    assert decoded(folder, tokens["test"]) == texts[10:] and decoded(folder, tokens["train"]) == texts[:8]
    folder, _, tokens = prepare(dataset=forms["splits"] / "x", text_column="body")
    assert decoded(folder, tokens["test"]) == texts[10:] and decoded(folder, tokens["train"]) == texts[:8]


def test_the_same_data_is_tokenized_once_and_other_data_again(prepare, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("abcdefgh" * 50)
    first, facts, _ = prepare(dataset=tmp_path / "t.txt")
    monkeypatch.setattr(train_lm, "tokenize", lambda *_: pytest.fail("tokenized again"))
    assert prepare(dataset=tmp_path / "t.txt")[:2] == (first, facts)
    monkeypatch.undo()
    (tmp_path / "t.txt").write_text("abcdefgi" * 50)
    second, changed, _ = prepare(dataset=tmp_path / "t.txt")
    assert second != first and changed["fingerprint"] != facts["fingerprint"]


def test_vocabularies_beyond_16_bits_keep_their_ids(prepare, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70000)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path / "tok")
    (tmp_path / "t.txt").write_text("w69999 w5 w65536 w65535 " * 10)
    _, _, tokens = prepare(
        dataset=tmp_path / "t.txt", tokenizer=str(tmp_path / "tok"), val_fraction=0.0, test_fraction=0.0
    )
    assert tokens["train"][:4].tolist() == [69999, 5, 65536, 65535] and tokens["train"][-1] == 70000


def test_samples_are_a_function_of_seed_and_number(tmp_path):
    T, N = 8, 203
    np.arange(N, dtype=np.uint16).tofile(tmp_path / "train.bin")
    train = train_lm.Tokens(tmp_path / "train.bin", np.uint16, T, seed=3)
    n = train.n_blocks
    epochs = [train[list(range(e * n, (e + 1) * n))] for e in range(3)]
    for x, y in epochs:
        assert torch.equal(x[:, 1:], y[:, :-1]) and (y[:, -1] == x[:, -1] + 1).all()
        starts = x[:, 0].sort().values
        assert (starts.diff() == T).all()  # a grid: each block once, none overlaps
    assert len({int(x[:, 0].min()) for x, _ in epochs}) > 1  # of another offset each epoch
    again = train_lm.Tokens(tmp_path / "train.bin", np.uint16, T, seed=3)
    for numbers in ([5], [n + 2, n - 1, 2 * n], [0]):  # whatever was asked before, across epochs too
        x, _ = again[numbers]
        assert torch.equal(x, torch.cat([epochs[i // n][0][i % n : i % n + 1] for i in numbers]))
    other, _ = train_lm.Tokens(tmp_path / "train.bin", np.uint16, T, seed=4)[list(range(n))]
    assert not torch.equal(other, epochs[0][0])


@pytest.mark.parametrize("N", [9, 10, 15, 16, 17, 24, 25])
def test_a_short_text_still_gives_whole_blocks(tmp_path, N):
    np.arange(N, dtype=np.uint16).tofile(tmp_path / "train.bin")
    x, y = train_lm.Tokens(tmp_path / "train.bin", np.uint16, 8, seed=0)[list(range(40))]
    assert (y == x + 1).all() and x.max() < N and y.min() > 0


def test_each_process_takes_its_slice_of_the_same_batch(monkeypatch):
    monkeypatch.setattr(train_lm, "batch_size", 8)
    for processes, micro in ((1, 8), (1, 2), (2, 2), (4, 2), (8, 1)):
        accumulation = 8 // (micro * processes)
        slices = [list(train_lm.sample_numbers(3, 5, micro, accumulation, rank)) for rank in range(processes)]
        for step in (0, 1):
            own = [sum(s[step * accumulation : (step + 1) * accumulation], []) for s in slices]
            assert sum(own, []) == list(range(24 + 8 * step, 32 + 8 * step))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_what_the_main_one_reads(tmp_path, method):
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "train.bin")
    train = train_lm.Tokens(tmp_path / "train.bin", np.uint16, 8, seed=0)
    numbers = [list(range(i, i + 4)) for i in range(0, 200, 4)]
    options = {"batch_size": None, "sampler": numbers, "generator": torch.Generator()}
    here = list(torch.utils.data.DataLoader(train, **options))
    there = torch.utils.data.DataLoader(train, num_workers=2, multiprocessing_context=method, **options)
    for (x, y), (u, v) in zip(here, there, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
