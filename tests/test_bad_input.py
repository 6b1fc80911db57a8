"""
Bad input to train_lm.py: one line that names the remedy, exit code 2, no traceback, nothing written or changed;
--overwrite removes nothing but what an old run has written, and that only when the new one can start; a mistake in
an edit of the script keeps its traceback; and whatever file a stranger has made, none of its code runs.
"""

import gzip
import json
import random
import shutil
import traceback

import pytest
import torch
import transformers
from conftest import ROOT, Hostile, check_out, contents, refusal, run, within
from safetensors.torch import load_file, save_file

SAYS, ANSWERS = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
ROWS = {  # files of such rows
    "rows": {"body": "some text", "n": 1},
    "chats": {"messages": [SAYS, ANSWERS]},
    "told": {"messages": [SAYS, {"role": "narrator", "content": "he waits"}, ANSWERS]},
    "sentences": {"messages": "hello? hi!"},
    "counts": {"text": "some text", "messages": 12},
    "mute": {"messages": [{"role": "user", "text": "hello"}, {"role": "assistant", "text": "hi"}]},
    "toolbox": {"messages": [SAYS, ANSWERS], "tools": "hammer, saw"},
}
FILES = {
    "empty.txt": b"",
    "latin_later.txt": b"plain text " * 20000 + "déjà vu ".encode("latin-1"),
    "latin.csv": "text\ndéjà vu\n".encode("latin-1"),
    "short.txt": b"too short",
    "good.txt": b"the quick brown fox jumps over the lazy dog\n" * 500,
    "commas.csv": b"prompt,completion\nq one,a one\nq two,no, never\n",
    "line.jsonl": b'{"text": "one"}\n{"text": "two"}\n{"text": \n',
    "list.jsonl": b'{"text": "one"}\n["two"]\n',
    "cut.jsonl.gz": gzip.compress(b'{"text": "one"}\n' * 5000)[:60],
    "cut.parquet": b"PAR1 and no more",
    "cut.txt.gz": gzip.compress(random.Random(0).randbytes(150_000).hex().encode())[:-50_000],
    "twice.csv": b"text,text\none,two\n",
    "no_rows/train.jsonl": b'{"text": "one"}\n' * 50,
    "no_rows/test.jsonl": b"",
    "header.csv": b"text\n",
    "nothing/.hidden": b"",
    "foreign/thesis.doc": b"years of work",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    for name, row in ROWS.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 50)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, pretrained):
    """Models that cannot be gone on from, and one that could be: lm."""
    folder, lm = tmp_path_factory.mktemp("models"), pretrained("qwen3", False)
    for name in ("lm", "headless", "young", "strict", "mute", "endless"):
        shutil.copytree(lm, folder / name)
    shape = {"vocab_size": 50, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
    transformers.T5Config(**shape).save_pretrained(folder / "t5")
    weights = load_file(lm / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "headless" / "model.safetensors", {"format": "pt"})
    (folder / "young" / "run.json").write_text("{")
    shutil.copytree(pretrained("qwen3", False, vocab_size=290), folder / "words")
    shutil.copytree(pretrained("bert"), folder / "bert")
    (folder / "strict/chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    for path in (folder / "mute").glob("tokenizer*"):
        path.unlink()
    file = folder / "endless/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))
    return folder


NUMBERS = "batch_size=0 block_size=0 n_layer=0 n_head=0 n_embd=0 lora_rank=0 dropout=1 beta1=1 beta2=1.5"
NUMBERS += " val_fraction=1 test_fraction=1.5 seed=9223372036854775808 grad_clip=-1 learning_rate=-0.1"
NUMBERS += " max_steps=-1 warmup_steps=-1 num_workers=-1 optimizer=sgd lr_schedule=linear"
NUMBERS += " mixed_precision=fp8 tracker=wandbb adapter=qlora dataset= n_embd=102 fold=6/5 fold=one"
NUMBERS += " mixed_precision=fp16 adapter=lora cooldown=20 min_lr=1.5"

LORA, GOOD = ("--adapter=lora", "--block_size=32"), "--dataset={data}/good.txt"
CHATS = ("--dataset={data}/chats.jsonl", "--block_size=32")
REFUSED = [
    (["--n_kv_head=3", "--n_head=4", "--n_embd=64"], "must be a multiple of n_kv_head=3"),
    (["--resume=True", "--overwrite=True"], "use only one of them"),
    (["--patience=2", "--eval_interval=0"], "patience=2 needs evaluations"),
    (["--patience=2", "--val_fraction=0"], "patience=2 needs validation data"),
    (
        ["--batch_size=16", "--micro_batch_size=5"],
        "must be a multiple of micro_batch_size x processes = 5 x 1",
    ),
    # data
    (["--dataset={data}/missing.txt"], "Couldn't find any data file"),
    (["--dataset={data}/nothing"], "holds no file of a supported kind"),
    (["--dataset={data}/empty.txt"], "nothing to learn from: no text"),
    (["--dataset={data}/latin_later.txt"], "latin_later.txt is not UTF-8"),
    (["--dataset={data}/latin.csv"], "column 'text' is not UTF-8"),
    (["--dataset={data}/short.txt"], "too short to set a part aside"),
    (["--dataset={data}/commas.csv"], "commas.csv, row 2 has more fields than the first line"),
    (["--dataset={data}/line.jsonl"], "line.jsonl, row 3 cannot be read"),
    (["--dataset={data}/list.jsonl"], "list.jsonl, row 2 must be a JSON object"),
    (["--dataset={data}/cut.jsonl.gz"], "cut.jsonl.gz"),
    (["--dataset={data}/cut.parquet"], "cut.parquet"),
    (["--dataset={data}/rows.jsonl"], "has the columns body, n, but not text: choose one by --text_column="),
    (["--dataset={data}/rows.jsonl", "--text_column=n"], "column 'n' holds 1, which is not text"),
    (["--train_split=sft"], "--train_split= takes one of train"),
    (["--dataset={data}/told.jsonl"], "the role 'narrator' in column 'messages'"),
    (["--dataset={data}/sentences.jsonl"], "'messages'"),
    (["--dataset={data}/counts.jsonl"], "'messages' must hold lists of messages, not 12"),
    (["--dataset={data}/toolbox.jsonl"], "'tools'"),
    (["--dataset={data}/mute.jsonl"], "a message in column 'messages' has text, but no content"),
    (
        ["--dataset={data}/rows.jsonl", "--prompt_column=body", "--completion_column=m"],
        "has the columns body, n",
    ),
    (["--dataset={data}/cut.txt.gz"], "cut.txt.gz"),
    (["--dataset={data}/twice.csv"], "several columns of the same name"),
    (["--dataset={data}/no_rows"], "the test split of dataset='{data}/no_rows' has no rows"),
    (["--dataset={data}/header.csv"], "has no rows"),
    (["--fold=99/100"], "fold='99/100' has more parts than there are rows"),
    # the run directory
    ([GOOD, "--out_dir={data}/foreign"], "holds other files, such as thesis.doc"),
    ([GOOD, "--out_dir={data}/good.txt"], "out_dir="),
    ([GOOD, "--out_dir={root}"], "contains {root}"),
    ([GOOD, "--out_dir={data}", "--overwrite=True"], "contains {data}/good.txt"),
    (["--init_from={models}/lm", "--out_dir={models}/lm", "--overwrite=True"], "contains {models}/lm"),
    # models and tokenizers
    ([GOOD, "--tokenizer={data}/nothing"], "tokenizer="),
    (["--init_from={models}/t5"], "init_from="),
    (["--init_from={models}/bert", "--block_size=32"], "bert' is not a causal language model"),
    (["--init_from={models}/headless"], "has no weights for lm_head.weight"),
    (["--init_from={models}/young"], "init_from="),
    (["--init_from={models}/mute", "--block_size=32"], "tokenizer"),
    (["--init_from={models}/endless", "--block_size=32"], "has no end-of-text token"),
    (["--init_from={models}/lm", "--tokenizer=bytes"], "has its own tokenizer"),
    (["--init_from={models}/lm", "--block_size=65"], "at most --block_size=64"),
    (["--init_from={models}/lm", "--adapter=p_tuning", "--block_size=50"], "at most --block_size=44"),
    (["--init_from={models}/words", "--block_size=32"], "{models}/words has only 290 embeddings"),
    (["--init_from={models}/lm", *LORA, "--lora_targets=q_proj,qkv"], "has no layer 'qkv'"),
    (["--init_from={models}/strict", *CHATS], "no system message"),
]


@pytest.fixture
def fill_in(tmp_path, data, models):
    """fill_in(arguments) -> they with what they leave out: a place to run, and good data"""

    def fill_in(arguments):
        where = [] if any("out_dir" in argument for argument in arguments) else [f"--out_dir={tmp_path}/run"]
        where += [] if any("dataset" in argument for argument in arguments) else [GOOD]
        return [argument.format(data=data, models=models, root=ROOT) for argument in (*where, *arguments)]

    return fill_in


@pytest.mark.parametrize("setting", NUMBERS.split())
def test_settings_that_cannot_work_are_refused_before_the_data_is_read(tmp_path, setting):
    how = (f"--dataset={tmp_path}/nowhere", f"--out_dir={tmp_path}/run")
    message = refusal("train_lm.py", *how, f"--{setting}")
    assert message.startswith(f"train_lm.py: {setting.split('=')[0]}") and "nowhere" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_the_trainer_refuses(tmp_path, data, models, fill_in, arguments, message):
    before = contents(data, models)
    assert message.format(data=data, models=models, root=ROOT) in refusal("train_lm.py", *fill_in(arguments))
    assert contents(data, models, tmp_path) == before


def test_the_command_refuses(fill_in):
    """One of them as a whole process."""
    arguments, message = REFUSED[0]
    _, err = run("train_lm.py", *fill_in(arguments), code=2)
    assert message in err and err.count("\n") == 1


def test_overwrite_takes_nothing_but_an_old_run_and_that_late(tmp_path, tiny, data, models):
    """Late: when the new run has loaded its model and its data."""
    out = tmp_path / "run"
    within("train_lm.py", tiny, "--max_steps=10")
    mine = {out / name: name.encode() for name in ("notes.md", "plots/loss.svg", "samples/mine.txt", "my.pt")}
    for path, content in mine.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    before = contents(out)
    bad = ("--dropout=2", f"--dataset={data}/latin_later.txt", f"--init_from={models}/t5")
    for argument in (*bad, "--tokenizer=no/such"):
        refusal("train_lm.py", tiny, "--overwrite=True", argument)
        assert contents(out) == before
    within("train_lm.py", tiny, "--overwrite=True", "--max_steps=0", "--test_fraction=0")
    after = contents(out)
    assert {path: after.get(path) for path in mine} == mine
    assert not (out / "checkpoint.pt").exists() and not (out / "model.safetensors").exists()
    assert not list((out / "samples").glob("step_*"))


@pytest.mark.parametrize("function, name", [("encode_texts", "good.txt"), ("encode_answers", "chats.jsonl")])
def test_a_mistake_in_an_edit_keeps_its_traceback(tmp_path, tiny, data, function, name):
    head = f"def {function}(documents, tok):\n"
    script = check_out(tmp_path / "checkout", (head, f"{head}    [].no_such_method()\n"))
    with pytest.raises(Exception) as raised:
        within(script, tiny, f"--dataset={data}/{name}")
    shown = "".join(traceback.format_exception(raised.value))
    assert "no_such_method" in shown and f"in {function}" in shown


HOSTILE = {
    "weights of a language model": ("pytorch_model.bin", ["--init_from={model}"]),
    "weights of an adapter": ("adapter_model.bin", ["--init_from={model}", *LORA]),
    "code of a configuration": ("configuration_x.py", ["--init_from={model}"]),
    "code of a tokenizer": ("tokenization_x.py", ["--tokenizer={model}", "--max_steps=1"]),
    "a chat template": ("chat_template.jinja", ["--init_from={model}", *CHATS]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_models_run_no_code(tmp_path, models, fill_in, what):
    (name, arguments), model, owned = HOSTILE[what], tmp_path / "model", tmp_path / "owned"
    shutil.copytree(models / "lm", model)
    path = model / name
    if path.suffix == ".bin":
        (model / "model.safetensors").unlink()
        torch.save({"model": Hostile(owned)}, path)
        if "adapter" in name:
            adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
            adapter["base_model_name_or_path"] = str(models / "lm")
            (model / "adapter_config.json").write_text(json.dumps(adapter))
    elif path.suffix == ".jinja":
        path.write_text("{{ cycler.__init__.__globals__.os.system('touch " + str(owned) + "') }}")
    else:  # the way in which models of the hub bring code of their own
        path.write_text(f"open({str(owned)!r}, 'w')\nfrom transformers import *\n")
        file = model / ("tokenizer_config.json" if name[0] == "t" else "config.json")
        config = json.loads(file.read_text()) | {"model_type": "x"}
        code = f"{path.stem}.X"
        config["auto_map"] = {"AutoConfig": code}
        if name[0] == "t":
            config |= {
                "tokenizer_class": "X",
                "auto_map": {"AutoTokenizer": [code, code], "AutoConfig": code},
            }
        file.write_text(json.dumps(config))
    arguments = [argument.replace("{model}", str(model)) for argument in arguments]
    arguments = fill_in([*arguments, "--block_size=32"])
    if "tokenizer" in what:  # tokenizer.json is all that is taken from there
        within("train_lm.py", *arguments)
    else:
        refusal("train_lm.py", *arguments)
    assert not owned.exists()
