"""
Data: tokenizers give back the text they were given, also in pieces; each file is read once, whatever its name, and
is a text or a table by its suffix; splits are known by name, or have their share of the bytes; fields of a table
stay text; documents fill rows, each token the target of one; what is not used is counted; nothing is tokenized
again by a second start; the order of the rows is a function of (seed, step).
"""

import functools
import gzip
import http.server
import json
import os
import re
import string
import threading
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import check_out, run, within, writes_around

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


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "bpe:300"])
def test_tokens_decode_to_the_very_text(prepare, tmp_path, tokenizer):
    text = "the cat sat\n héllo wörld\r\n\tindented  twice  数学 🙂 <|endoftext|> end\n" * 9
    (tmp_path / "t.txt").write_text(text, newline="")
    tok, texts, _ = prepare(dataset=tmp_path / "t.txt", tokenizer=tokenizer, **WHOLE)
    assert texts["train"] == text.replace("\r\n", "\n") + tok.eos_token  # as Python reads lines


def test_a_vocabulary_is_learned_from_all_documents(prepare, tmp_path):
    """There are as many short documents as there would be pieces in a hundred million characters, and more."""
    common = json.dumps({"text": "abab"}) + "\n"
    rare = json.dumps({"text": "xyzw" * 20}) + "\n"
    (tmp_path / "t.jsonl").write_text(600 * common + rare)
    tok, _, _ = prepare(dataset=tmp_path / "t.jsonl", tokenizer="bpe:300", **WHOLE)
    assert len(tok("xyzw")["input_ids"]) == 1


@pytest.mark.parametrize("space", [" ", "\n", ""])
def test_a_long_text_gives_the_tokens_of_the_whole(prepare, monkeypatch, tmp_path, space):
    """It is tokenized in pieces. Without white space, a word may be cut, which gives other tokens of the same text."""
    monkeypatch.setattr(train_lm, "PIECE_SIZE", 100)
    words = np.random.default_rng(0).choice(["the", "cat", "é", "数学", "🙂", "a, b"], 2000)
    text = space.join(words)
    write(tmp_path / "t.txt", text)
    tok, texts, _ = prepare(dataset=tmp_path / "t.txt", tokenizer="bpe:300", **WHOLE)
    assert texts["train"] == text + tok.eos_token
    _, splits = train_lm.prepare_data()
    ids = torch.cat([splits["train"][0]["ids"][:1], *(row["ids"][1:] for row in splits["train"])])
    if space:
        assert ids.tolist() == [*tok(text).input_ids, tok.eos_token_id]


@pytest.mark.parametrize("sizes", [[30000] * 3, [int(50 * 1.008**i) for i in range(450)]], ids=len)
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


def test_each_file_is_read_once_whatever_its_name(prepare, tmp_path, capfd):
    """Names that look like patterns or are not UTF-8, links that lead back, a pipe; hidden files are not read."""
    folder = tmp_path / "[v1] books*"
    names = ["a.txt", "a*.txt", "a [b].txt", "{x,y}.md", "-dash", "100%.rst", "LOUD.TXT", "caf\udce9.txt"]
    for i, name in enumerate(names):
        write(folder / name, f"<{i}>")
    write(folder / "e/f::g#.tex", f"<{len(names)}>")
    for name in (".hidden.txt", ".git/c.txt"):
        write(folder / name, "<hidden>")
    (folder / "notes.md").mkdir()
    (folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    for name in ("loop", "again"):
        (folder / name).symlink_to(".")
    (folder / "same.txt").symlink_to("a.txt")
    (folder / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    tok, texts, _ = prepare(dataset=folder, **WHOLE)
    documents = texts["train"].split(tok.eos_token)[:-1]
    assert sorted(documents) == [f"<{i}>" for i in range(len(names) + 1)]
    out, _ = capfd.readouterr()
    assert "left out: 2 files" in out and "dangling.txt" in out  # and latin.txt


def test_a_pattern_leaves_out_the_samples_of_the_run_itself(prepare, tmp_path):
    write(tmp_path / "a.txt", "<a>")
    write(tmp_path / "run/samples/b.txt", "<b>")
    tok, texts, _ = prepare(dataset=tmp_path / "**/*.txt", out_dir=tmp_path / "run", **WHOLE)
    assert texts["train"] == "<a>" + tok.eos_token


def test_a_url_is_downloaded(tmp_path):
    """A text, and a compressed table, by a server on this machine."""
    write(tmp_path / "data/a.txt", "the quick brown fox\n" * 200)
    (tmp_path / "data/b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "the quick brown fox"}\n' * 200))
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "data")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever).start()
        for name in ("a.txt", "b.jsonl.gz"):
            url = f"--dataset=http://127.0.0.1:{server.server_port}/{name}"
            how = (url, f"--out_dir={tmp_path / name}.run", "--tokenizer=bytes", "--max_steps=0")
            run("train_lm.py", *how, HF_HUB_OFFLINE="0")
        server.shutdown()
    n_rows = [
        json.loads((tmp_path / f"{name}.run/run.json").read_text())["rows"]
        for name in ("a.txt", "b.jsonl.gz")
    ]
    assert n_rows[0] == n_rows[1]  # of as many bytes: the end of a line, or an <eos>


def test_the_run_directory_may_be_inside_the_data(tmp_path):
    write(tmp_path / "data/a.txt", "the quick brown fox\n" * 200)
    how = (f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'data/out'}", "--tokenizer=bytes")
    how += ("--max_steps=2", "--block_size=32", "--n_layer=1", "--n_embd=16", "--n_head=1", "--resume=True")
    for max_steps in (2, 4):
        within("train_lm.py", *how, f"--max_steps={max_steps}")


def test_a_folder_is_tables_or_texts_by_the_suffixes_in_it(prepare, tmp_path, capfd):
    """What cannot be read is not learned as text, a README.md beside a table neither; both are counted."""
    write(tmp_path / "texts/a.txt", "<a>" * 50)
    for name in ("paper.pdf", "weights.safetensors", "old.ZIP"):
        write(tmp_path / "texts" / name, "<binary>" * 50)
    _, texts, _ = prepare(dataset=tmp_path / "texts", **WHOLE)
    assert texts["train"] == "<a>" * 50 + "<|endoftext|>"
    assert "left out: 3 files" in capfd.readouterr().out
    write(tmp_path / "tables/README.md", "<a card>" * 500)
    write(tmp_path / "tables/a.jsonl", '{"text": "one"}\n')
    write(tmp_path / "tables/b.jsonl", '{"text": "two", "more": {"x": 1}}\n')
    _, texts, _ = prepare(dataset=tmp_path / "tables", **WHOLE)
    assert sorted(texts["train"].split("<|endoftext|>")) == ["", "one", "two"]
    out, _ = capfd.readouterr()
    assert "left out: 1 files" in out and "README.md" in out
    assert "columns: text; not used: more" in out


SPLITS = {  # by a folder at any depth, or else by the name of the file
    "train": ["train.txt", "en/Train/a.txt", "test_results.txt", "latest.txt", "contest/a.txt"],
    "validation": ["val/a.txt", "en/DEV/b.txt", "valid.txt", "validation-00001-of-00002.txt"],
    "test": ["Test/val.txt", "x/eval/a.txt", "test-00000-of-00001-a09b74b3ef9c3b56.txt", "testing_3.txt"],
}


def test_splits_are_known_by_name(prepare, tmp_path, capfd):
    for names in SPLITS.values():
        for name in names:
            write(tmp_path / "data" / name, f"<{name}>")
    tok, texts, sizes = prepare(dataset=tmp_path / "data", val_fraction=0.1, test_fraction=0.1)
    for split, names in SPLITS.items():
        assert sorted(texts[split].split(tok.eos_token)[:-1]) == sorted(f"<{name}>" for name in names)
    out, _ = capfd.readouterr()
    for split, n in sizes.items():
        assert f"{split}: {n} rows" in out
    _, _, of_pattern = prepare(dataset=tmp_path / "data/**/*.txt", val_fraction=0.1, test_fraction=0.1)
    assert of_pattern == sizes
    _, _, sizes = prepare(dataset=tmp_path / "data", train_split="validation", **WHOLE)
    assert list(sizes) == ["train"]  # no row is in two splits


def test_a_file_linked_to_another_split_is_in_both_and_further_splits_of_the_hub_are_their_own(
    prepare, tmp_path, capfd
):
    write(tmp_path / "a/train.txt", "<a>")
    (tmp_path / "a/val.txt").symlink_to("train.txt")
    _, texts, _ = prepare(dataset=tmp_path / "a", val_fraction=0.1, test_fraction=0.0)
    assert texts["train"] == texts["validation"] and texts["train"].startswith("<a>")
    for name in ("train_sft", "test_sft"):
        write(tmp_path / f"b/{name}-00000-of-00001.txt", f"<{name}>")
    _, texts, _ = prepare(dataset=tmp_path / "b", train_split="train_sft", **WHOLE)
    assert texts["train"].startswith("<train_sft>") and "test" not in texts["train"]
    assert "not used: the split test_sft" in capfd.readouterr().out


def test_every_way_to_name_data_reads_the_same_documents(prepare, tmp_path):
    fields = ["None", "NA", "null", "nan", "007", "1", "2024-01-01"]
    fields += ["a, b", 'say "yes"', "two\nlines", "é", "x\ty"]
    for i, text in enumerate(fields):
        write(tmp_path / f"folder/{i:02}.md", text)
    write(tmp_path / "folder/other.txt", "not of the pattern")
    table = pd.DataFrame({"body": fields, "other": range(len(fields))})
    lines = ("a.jsonl", "b.NDJSON", "c.jsonlines.XZ", "d.Jsonl.gz")
    for name in lines:
        table.to_json(tmp_path / name, orient="records", lines=True)
    table.to_json(tmp_path / "e.json", orient="records", indent=1)
    table.to_csv(tmp_path / "f.csv", encoding="utf-8-sig", lineterminator="\r\n")  # as Excel writes it
    table.to_csv(tmp_path / "g.TSV", sep="\t")
    table.to_csv(tmp_path / "h.csv.bz2")
    table.to_parquet(tmp_path / "i.Parquet")
    for name in ("folder/*.md", *lines, "e.json", "f.csv", "g.TSV", "h.csv.bz2", "i.Parquet"):
        column = "text" if name == "folder/*.md" else "body"
        tok, found, _ = prepare(dataset=tmp_path / name, text_column=column, **WHOLE)
        assert sorted(found["train"].split(tok.eos_token)[:-1]) == sorted(fields), name


@pytest.mark.parametrize("around", ["$A", "<s> $A", "$A <|endoftext|>"])
def test_documents_fill_rows_and_each_token_is_learned_once(tmp_path, prepare, pretrained, around):
    """Where the tokenizer writes a <bos>, each row begins with one; behind each document there is one <eos>."""
    base = pretrained("llama", True, "<s>")
    writes_around(base, around)
    documents = [f"a text of some words, number {i}" for i in range(60)]
    write(tmp_path / "t.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in documents))
    tok, _, _ = prepare(dataset=tmp_path / "t.jsonl", init_from=base, tokenizer="", block_size=32, **WHOLE)
    _, splits = train_lm.prepare_data()
    rows = [row["ids"].tolist() for row in splits["train"]]
    assert {len(row) for row in rows[:-1]} == {33} and len(rows[-1]) <= 33
    if "<s>" in around:
        assert {row[0] for row in rows} == {tok.bos_token_id}
        learned = sum([row[1:] for row in rows], [])
    else:
        learned = sum([row[1:] for row in rows], rows[0][:1])
    found = tok.decode(learned).split(tok.eos_token)
    assert found.pop() == "" and sorted(found) == sorted(documents)


def cache_files():
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}


@pytest.mark.parametrize("name", ["rows.jsonl", "texts"])
def test_a_second_start_tokenizes_nothing_and_says_the_same(tmp_path, prepare, capfd, name):
    """It also says what was dropped, without an answer or empty, and which answers had no room."""
    answers = ["", None, "long " * 40, "long " * 50, "long " * 60, *"abcdef"]
    rows = [{"prompt": f"{i}?", "completion": answer} for i, answer in enumerate(answers)]
    write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "texts/a.txt", "some text " * 50)
    write(tmp_path / "texts/empty.txt", "")
    prepare(dataset=tmp_path / name, **WHOLE)
    first, _ = capfd.readouterr()
    files = cache_files()
    prepare(dataset=tmp_path / name, **WHOLE)
    second, _ = capfd.readouterr()
    assert cache_files() == files and second == first
    note = "1 documents without text dropped"
    if name == "rows.jsonl":
        note = "2 documents without an answer dropped, 3 rows cut"
    assert re.search(f"^train: {note}", first, re.MULTILINE)
    prepare(dataset=tmp_path / name, block_size=63, **WHOLE)
    assert cache_files() != files


def test_an_edit_of_the_data_the_code_or_the_eos_is_not_missed(tmp_path, prepare, tiny, pretrained):
    write(tmp_path / "texts/a.txt", "first " * 20)
    write(tmp_path / "texts/b.txt", "second " * 20)
    _, texts, _ = prepare(dataset=tmp_path / "texts", **WHOLE)
    assert texts["train"].count("second") == 20
    write(tmp_path / "texts/b.txt", "third " * 20)
    _, texts, _ = prepare(dataset=tmp_path / "texts", **WHOLE)
    assert texts["train"].count("third") == 20 and "second" not in texts["train"]
    head = "def encode_texts(documents, tok):\n"
    how = (tiny, f"--dataset={tmp_path / 'texts'}", "--max_steps=0", "--val_fraction=0", "--test_fraction=0")
    script = check_out(tmp_path / "checkout", (head, f"{head}    documents = documents.select([0])\n"))
    before, _ = within("train_lm.py", *how)
    after, _ = within(script, *how, f"--out_dir={tmp_path / 'edited'}")
    assert "train: 8 rows" in before and "train: 4 rows" in after
    base = pretrained("gpt2", True, "<|end|>")
    how = {"dataset": tmp_path / "texts", "init_from": base, "tokenizer": "", **WHOLE}
    tok, texts, _ = prepare(**how)
    assert tok.eos_token == "<|endoftext|>" and texts["train"].endswith("<|endoftext|>")
    config = json.loads((base / "tokenizer_config.json").read_text())
    write(base / "tokenizer_config.json", json.dumps(config | {"eos_token": "<|end|>"}))
    tok, texts, _ = prepare(**how)
    assert tok.eos_token == "<|end|>" and texts["train"].endswith("<|end|>")


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
    monkeypatch.setattr(train_lm, "seed", 7)
    assert batches(lengths, 0, 30, 8, 1, 0) != whole
