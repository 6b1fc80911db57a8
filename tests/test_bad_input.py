"""
Bad input to train_lm.py: one line that names the remedy, exit code 2, no traceback, nothing overwritten; and whatever
file a stranger has made, none of its code runs.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run, within
from safetensors.torch import load_file, save_file


def refused(stdout, err):
    assert "Traceback" not in err and "Traceback" not in stdout, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture
def data(tmp_path):
    """Files of every kind that cannot be trained on."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\x00\x01\x02" * 100)
    (folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    (folder / "short.txt").write_text("too short")
    (folder / "rows.jsonl").write_text('{"body": "some text", "n": 1}\n' * 50)
    (folder / "broken.jsonl").write_text('{"text": "some text"}\n{"text": \n')
    (folder / "good.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    says = {"role": "user", "content": "hello"}
    answers = {"role": "assistant", "content": "hi"}
    for name, row in {
        "roles": {"messages": [says, answers | {"role": "bot"}]},
        "gpt": {"messages": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
        "strings": {"messages": "hello"},
        "questions": {"messages": [says]},
        "empty_chats": {"messages": []},
        "chats": {"messages": [says, answers]},
        "answers": {"prompt": "a long question", "completion": "a short answer"},
        "numbers": {"prompt": "a question", "completion": 42},
    }.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * (4 if name == "answers" else 50))
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").write_text("text")
    (folder / "mixed" / "b.jsonl").write_text('{"text": "text"}\n')
    (folder / "nothing").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.doc").write_text("years of work")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, pretrained):
    """Models that cannot be gone on from, and one that could be: lm."""
    import transformers

    folder, lm = tmp_path_factory.mktemp("models"), pretrained("qwen3", False)
    for name in ("lm", "headless", "young", "adapted", "strict", "blind"):
        shutil.copytree(lm, folder / name)
    transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1).save_pretrained(
        folder / "t5"
    )
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=300, **shape))
    bert.save_pretrained(folder / "bert")
    weights = load_file(lm / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "headless" / "model.safetensors", {"format": "pt"})
    (folder / "young" / "run.json").write_text("{")
    (folder / "adapted" / "adapter_config.json").write_text("{}")
    shutil.copytree(pretrained("qwen3", False, vocab_size=290), folder / "words")
    shutil.copytree(pretrained("qwen3", False, "<|im_start|>", "<|im_end|>"), folder / "more")
    (folder / "strict" / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    (folder / "blind" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}!"
    )
    return folder


SHORT, LORA = ("--block_size=32",), ("--adapter=lora", "--block_size=32")
GOOD = "--dataset={data}/good.txt"
LM = [
    (["--n_embd=100", "--n_head=3"], "must be a multiple of 2 x n_head=3"),
    (["--n_kv_head=3", "--n_head=4", "--n_embd=64"], "must be a multiple of n_kv_head=3"),
    (["--optimizer=sgd"], "optimizer='sgd': muon or adamw"),
    (["--lerning_rate=1"], "did you mean learning_rate"),
    (["--n_layer", "8"], "write --name=value"),
    (["config/shakespeare_char.py"], "No such file"),
    (["--mixed_precision=fp16"], "needs CUDA and --optimizer=adamw"),
    (["--val_fraction=1"], "test_size=1.0"),
    (["--fold=6/5"], "2/5 is the second of five parts"),
    (["--resume=True", "--overwrite=True"], "choose one"),
    (["--batch_size=16", "--micro_batch_size=5"], "no multiple of 5 rows x 1 processes"),
    (["--dataset={data}/missing.txt"], "Couldn't find any data file"),
    (["--dataset={data}/*.md"], "cannot be used"),
    (["--dataset={data}/nothing"], "doesn't contain any data files"),
    (["--dataset={data}/empty.txt"], "has nothing to learn from in its train split"),
    (["--dataset={data}/latin.txt"], "can't decode byte"),
    (["--dataset={data}/short.txt"], "train set will be empty"),
    (["--dataset={data}/rows.jsonl"], "--text_column= takes one of body"),
    (["--dataset={data}/rows.jsonl", "--text_column=n"], "no text in 'n'"),
    (["--dataset={data}/rows.jsonl", "--train_split=sft"], "takes one of train"),
    (["--dataset={data}/broken.jsonl"], "cannot be used"),
    ([GOOD, "--out_dir={data}/foreign"], "holds thesis.doc: choose another"),
    ([GOOD, "--out_dir={data}/good.txt"], "out_dir="),
    ([GOOD, "--tokenizer={data}/nothing"], "tokenizer="),
    (["--adapter=lora"], "needs a pretrained model, as --init_from=gpt2"),
    (["--init_from={models}/none"], "init_from="),
    (["--init_from={data}/nothing"], "init_from="),
    (["--init_from={models}/t5"], "init_from="),
    (["--init_from={models}/headless"], "has no weights for lm_head.weight"),
    (["--init_from={models}/adapted", *LORA], "init_from="),
    (["--init_from={models}/young"], "init_from="),
    (["--init_from={models}/lm", "--tokenizer=bytes"], "has its own"),
    (["--init_from={models}/lm", "--block_size=65"], "at most --block_size=64"),
    (["--init_from={models}/lm", "--adapter=p_tuning", "--block_size=50"], "at most --block_size=44"),
    (["--init_from={models}/words", GOOD, *SHORT], "has 300 tokens, {models}/words knows 290"),
    (
        ["--init_from={models}/lm", GOOD, "--tokenizer={models}/more", *SHORT],
        "302 tokens, {models}/lm knows 300",
    ),
    (["--init_from={models}/lm", *LORA, "--lora_targets=qkv"], "qkv"),
    (["--dataset={data}/strings.jsonl"], "dataset="),
    (["--dataset={data}/questions.jsonl"], "nothing to learn from"),
    (["--dataset={data}/empty_chats.jsonl"], "nothing to learn from"),
    (["--dataset={data}/answers.jsonl", "--block_size=8", "--tokenizer=bytes"], "nothing to learn from"),
    (["--dataset={data}/numbers.jsonl"], "cannot be used"),
    (["--dataset={data}/chats.jsonl", "--init_from={models}/strict", *SHORT], "no system message"),
    (["--dataset={data}/chats.jsonl", "--init_from={models}/blind", *SHORT], "does not put an answer behind"),
]


def fill_in(tmp_path, data, models, arguments):
    """The arguments with what they leave out: a place to run, and data that could be trained on."""
    where = [] if any("out_dir" in a for a in arguments) else [f"--out_dir={tmp_path / 'run'}"]
    where += [] if any("dataset" in a for a in arguments) else [GOOD.format(data=data)]
    return [*where, *(argument.format(data=data, models=models) for argument in arguments)]


@pytest.mark.parametrize("arguments, message", LM, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_the_trainer_refuses(tmp_path, data, models, arguments, message):
    before = {p: p.read_bytes() for p in (*data.rglob("*"), *models.rglob("*")) if p.is_file()}
    out, err = within("train_lm.py", *fill_in(tmp_path, data, models, arguments), code=2)
    assert message.format(data=data, models=models) in refused(out, err), err
    assert {p: p.read_bytes() for p in before} == before
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_command_refuses(tmp_path, data, models):
    """One of them as a whole process."""
    arguments, message = LM[0]
    assert message in refused(*run("train_lm.py", *fill_in(tmp_path, data, models, arguments), code=2))


@pytest.fixture
def finished(tmp_path, tiny):
    within("train_lm.py", tiny, "--max_steps=10", "--tokenizer=char")
    return tmp_path / "run"


# What a stranger has made: each kind of file that is loaded, with code in it


class Hostile:
    """Unpickled, it leaves a file named `owned`."""

    def __init__(self, owned):
        self.owned = str(owned)

    def __reduce__(self):
        return Path.touch, (Path(self.owned),)


def zipped(owned):
    return lambda path: torch.save({"model": Hostile(owned)}, path, pickle_module=pickle)


def test_a_hostile_checkpoint_runs_no_code(tmp_path, tiny, finished):
    owned = tmp_path / "owned"
    zipped(owned)(finished / "checkpoint.pt")
    refused(*within("train_lm.py", tiny, "--tokenizer=char", "--resume=True", code=2))
    assert not owned.exists()


def test_the_script_of_a_run_runs_only_when_trusted(tmp_path, finished):
    owned = tmp_path / "owned"
    script = finished / "train_lm.py"
    script.write_text(f"open({str(owned)!r}, 'w')\n" + script.read_text().replace("relu(", "gelu("))
    assert "--trust_run_code=True" in refused(*within("sample.py", f"--out_dir={finished}", code=2))
    assert not owned.exists()
    within("sample.py", f"--out_dir={finished}", "--trust_run_code=True", "--max_new_tokens=1")
    assert owned.exists()


CODE = "open({owned!r}, 'w')\nfrom transformers import *\n"
HOSTILE = {
    "weights of a language model": ("pytorch_model.bin", ["--init_from={model}"]),
    "code of a language model": ("modeling_x.py", ["--init_from={model}"]),
    "code of a configuration": ("configuration_x.py", ["--init_from={model}"]),
    "code of a tokenizer": ("tokenization_x.py", ["--tokenizer={model}"]),
    "a chat template": ("chat_template.jinja", ["--init_from={model}", "--dataset={data}/chats.jsonl"]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_models_run_no_code(tmp_path, data, models, what):
    (name, arguments), model, owned = HOSTILE[what], tmp_path / "model", tmp_path / "owned"
    shutil.copytree(models / "lm", model)
    path = model / name
    if path.suffix == ".bin":
        for old in path.parent.glob("*.safetensors"):
            old.unlink()
        zipped(owned)(path)
    elif path.suffix == ".jinja":
        path.write_text("{{ cycler.__init__.__globals__.os.system('touch " + str(owned) + "') }}")
    else:  # the way in which models of the hub bring code of their own
        path.write_text(CODE.format(owned=str(owned)))
        part = {"m": "AutoModelForCausalLM", "c": "AutoConfig", "t": "AutoTokenizer"}[name[0]]
        file = model / ("tokenizer_config.json" if name[0] == "t" else "config.json")
        config = json.loads(file.read_text()) | {"model_type": "x"}
        code = f"{path.stem}.X"
        config["auto_map"] = {part: [code, code] if name[0] == "t" else code, "AutoConfig": code}
        config |= {"tokenizer_class": "X"} if name[0] == "t" else {}
        file.write_text(json.dumps(config))
    where = [f"--out_dir={tmp_path / 'run'}", "--block_size=32", "--max_steps=1"]
    where += [] if "chat" in what else [GOOD.format(data=data)]
    arguments = [argument.format(model=model, data=data) for argument in arguments]
    code = 0 if "tokenizer" in what else 2  # tokenizer.json is all that is taken from there
    out, err = within("train_lm.py", *where, *arguments, code=code)
    assert code == 0 or refused(out, err)
    assert not owned.exists()


def test_a_hostile_adapter_runs_no_code(tmp_path, models):
    model, owned = tmp_path / "model", tmp_path / "owned"
    model.mkdir()
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(
        json.dumps(adapter | {"base_model_name_or_path": str(models / "lm")})
    )
    zipped(owned)(model / "adapter_model.bin")
    for path in (models / "lm").glob("tokenizer*"):
        shutil.copy(path, model)
    refused(*within("sample.py", f"--out_dir={model}", code=2))
    assert not owned.exists()
