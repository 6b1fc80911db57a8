"""
Data: tokenizers give back the text they were given; each split has its share of the bytes, of one text, three
books or many unlike files; folds are disjoint and complete; odd files and folders are understood; the order
of the rows is a function of (seed, step).
"""

import string

import numpy as np
import pytest
import torch

import train_lm

WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}


@pytest.fixture
def prepare(monkeypatch):
    """prepare(name=value ...) -> (tokenizer, {split: text}, {split: rows}) of train_lm.prepare_data"""

    def prepare(**values):
        for name, value in {"block_size": 64, "tokenizer": "bytes", **values}.items():
            monkeypatch.setattr(train_lm, name, value if isinstance(value, (int, float)) else str(value))
        tok, splits = train_lm.prepare_data()
        texts = {}
        for split, rows in splits.items():
            ids = torch.cat([rows[0]["ids"][:1], *(row["ids"][1:] for row in rows)])
            texts[split] = tok.decode(ids, clean_up_tokenization_spaces=False)
        return tok, texts, {split: len(rows) for split, rows in splits.items()}

    return prepare


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "bpe:300"])
def test_tokens_decode_to_the_very_text(prepare, tmp_path, tokenizer):
    text = "the cat sat\n héllo wörld\r\n\tindented  twice  数学 🙂 <|endoftext|> end\n" * 9
    (tmp_path / "t.txt").write_text(text, newline="")
    tok, texts, _ = prepare(dataset=tmp_path / "t.txt", tokenizer=tokenizer, **WHOLE)
    assert texts["train"] == text.replace("\r\n", "\n") + tok.eos_token  # as Python reads lines


@pytest.mark.parametrize("sizes", [[30000] * 3, [int(50 * 1.012**i) for i in range(450)]], ids=len)
def test_each_split_has_its_share_of_the_bytes(prepare, tmp_path, sizes):
    """A byte is a token here."""
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text((f"<{i}>" * size)[:size])
    for fold, validation in ("", 0.05), ("2/4", 0.2375):
        expected = {"train": 0.95 - validation, "validation": validation, "test": 0.05}
        _, _, found = prepare(dataset=tmp_path, fold=fold)
        total = sum(found.values())
        assert total == pytest.approx(sum(sizes) / 64, rel=0.02)
        assert {split: n / total for split, n in found.items()} == pytest.approx(expected, abs=0.01)


def test_one_text_is_cut_by_position_and_folds_cover_everything(prepare, tmp_path):
    text = "".join(np.random.default_rng(0).choice(list(string.ascii_letters), 5000))
    (tmp_path / "t.txt").write_text(text)
    how = {"dataset": tmp_path, "tokenizer": "char", "test_fraction": 0.1}
    _, whole, _ = prepare(**how, val_fraction=0.2)
    cut = [whole["train"], whole["validation"], whole["test"]]
    parts = [prepare(**how, fold=f"{k}/4")[1] for k in range(1, 5)]
    folds = [*(part["validation"] for part in parts), whole["test"]]
    for pieces in (cut, folds):  # each begins with the last token of the one before
        assert pieces[0] + "".join(piece[1:] for piece in pieces[1:]) == text + "<|endoftext|>"
    for part in parts:
        assert part["validation"][1:-1] not in part["train"] and part["test"] == whole["test"]


def test_odd_folders(prepare, tmp_path, capfd):
    """What is hidden, a directory called notes.md, test_results.txt, a file not in UTF-8; splits by name."""
    names = ["a.txt", "b.md", "test_results.txt", "e/f.txt"]
    for name in (*names, ".hidden.txt", ".git/c.txt", "val/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>" * 50)
    (tmp_path / "notes.md").mkdir()
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    _, texts, sizes = prepare(dataset=tmp_path, test_fraction=0.0)
    assert sizes.keys() == {"train", "validation"} and texts["validation"].startswith("<val/d.txt>")
    assert all(f"<{name}>" in texts["train"] for name in names)
    assert ".hidden" not in texts["train"] and ".git" not in texts["train"]
    assert f"not UTF-8 text: {tmp_path / 'latin.txt'}" in capfd.readouterr().out
    _, _, sizes = prepare(dataset=tmp_path, test_fraction=0.0, train_split="validation")
    assert sizes == {"train": 8, "validation": 1}  # not all in both


def test_every_way_to_name_data_reads_the_same_documents(prepare, tmp_path):
    from datasets import Dataset

    texts = [f"text number {i}, {'é' * i}\n" for i in range(12)]
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "folder" / f"{i:02}.md").write_text(text)
    data = Dataset.from_dict({"body": texts, "other": range(12)})
    data.to_json(tmp_path / "data.jsonl")
    data.to_json(tmp_path / "data.jsonl.gz", compression="gzip")
    data.to_parquet(tmp_path / "data.parquet")
    data.to_csv(tmp_path / "data.csv")
    for name in ("folder", "folder/*.md", "data.jsonl", "data.jsonl.gz", "data.parquet", "data.csv"):
        column = "body" if name[:4] == "data" else "text"
        tok, found, _ = prepare(dataset=tmp_path / name, text_column=column, **WHOLE)
        assert sorted(found["train"].split(tok.eos_token)[:-1]) == sorted(texts), name


def test_the_order_is_a_function_of_seed_and_step(monkeypatch):
    def batches(lengths, first, last, *cut):
        return list(train_lm.batch_rows(lengths, first, last, *cut))

    monkeypatch.setattr(train_lm, "batch_size", 8)
    lengths = np.random.default_rng(0).integers(5, 60, 83)
    whole = batches(lengths, 0, 30, 8, 1, 0)
    assert all(len(set(sum(whole[i : i + 10], []))) == 80 for i in (0, 10, 20)) and whole[:10] != whole[10:20]
    assert batches(lengths, 13, 30, 8, 1, 0) == whole[13:]
    for micro, processes in ((2, 1), (2, 2), (1, 8)):
        parts = [batches(lengths, 0, 30, micro, processes, rank) for rank in range(processes)]
        n = 8 // micro // processes
        for step in range(30):
            found = sum((sum(part[step * n : (step + 1) * n], []) for part in parts), [])
            assert sorted(found) == sorted(whole[step])
    padded = sum(lengths[batch].max() * 8 for batch in whole)
    assert sum(lengths[batch].sum() for batch in whole) > 0.8 * padded
    assert set(batches(lengths[:3], 0, 2, 8, 1, 0)[0]) == {0, 1, 2}  # few are repeated
