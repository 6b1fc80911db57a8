"""
Bad input to train_lm.py: one line that names the remedy, exit code 2, no traceback, nothing overwritten; and
whatever file a stranger has made, none of its code runs.
"""

import json
import shutil

import pytest
import torch
from conftest import Hostile, refusal, run, within
from safetensors.torch import load_file, save_file

SAYS, ANSWERS = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
ROWS = {  # files of such rows
    "rows": {"body": "some text", "n": 1},
    "questions": {"messages": [SAYS]},
    "chats": {"messages": [SAYS, ANSWERS]},
    "answers": {"prompt": "a long question", "completion": "a short answer"},
    "numbers": {"prompt": "a question", "completion": 42},
}
BLIND = "{% for m in messages %}{{ m.content }}{% endfor %}!"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of every kind that cannot be trained on, and one that can: good.txt."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    (folder / "short.txt").write_text("too short")
    (folder / "good.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    for name, row in ROWS.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 50)
    (folder / "nothing").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.doc").write_text("years of work")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, pretrained):
    """Models that cannot be gone on from, and one that could be: lm."""
    import transformers

    folder, lm = tmp_path_factory.mktemp("models"), pretrained("qwen3", False)
    for name in ("lm", "headless", "young", "strict", "blind"):
        shutil.copytree(lm, folder / name)
    shape = {"vocab_size": 50, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
    transformers.T5Config(**shape).save_pretrained(folder / "t5")
    weights = load_file(lm / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "headless" / "model.safetensors", {"format": "pt"})
    (folder / "young" / "run.json").write_text("{")
    shutil.copytree(pretrained("qwen3", False, vocab_size=290), folder / "words")
    for name, template in ("strict", "{{ raise_exception('no system message') }}"), ("blind", BLIND):
        (folder / name / "chat_template.jinja").write_text(template)
    return folder


LORA, GOOD = ("--adapter=lora", "--block_size=32"), "--dataset={data}/good.txt"
CHATS = ("--dataset={data}/chats.jsonl", "--block_size=32")
REFUSED = [
    (["--n_embd=100", "--n_head=3"], "must be a multiple of 2 x n_head=3"),
    (["--n_kv_head=3", "--n_head=4", "--n_embd=64"], "must be a multiple of n_kv_head=3"),
    (["--optimizer=sgd"], "optimizer='sgd': muon or adamw"),
    (["--mixed_precision=fp16"], "needs CUDA and --optimizer=adamw"),
    (["--val_fraction=1"], "test_size=1.0"),
    (["--fold=6/5"], "2/5 is the second of five parts"),
    (["--resume=True", "--overwrite=True"], "choose one"),
    (["--batch_size=16", "--micro_batch_size=5"], "no multiple of 5 rows x 1 processes"),
    (["--dataset={data}/missing.txt"], "Couldn't find any data file"),
    (["--dataset={data}/nothing"], "doesn't contain any data files"),
    (["--dataset={data}/empty.txt"], "has nothing to learn from in its train split"),
    (["--dataset={data}/latin.txt"], "can't decode byte"),
    (["--dataset={data}/short.txt"], "train set will be empty"),
    (["--dataset={data}/rows.jsonl"], "--text_column= takes one of body"),
    (["--dataset={data}/rows.jsonl", "--text_column=n"], "no text in 'n'"),
    (["--dataset={data}/rows.jsonl", "--train_split=sft"], "takes one of train"),
    ([GOOD, "--out_dir={data}/foreign"], "holds thesis.doc: choose another"),
    ([GOOD, "--out_dir={data}/good.txt"], "out_dir="),
    ([GOOD, "--tokenizer={data}/nothing"], "tokenizer="),
    (["--adapter=lora"], "needs a pretrained model, as --init_from=gpt2"),
    (["--init_from={models}/t5"], "init_from="),
    (["--init_from={models}/headless"], "has no weights for lm_head.weight"),
    (["--init_from={models}/young"], "init_from="),
    (["--init_from={models}/lm", "--tokenizer=bytes"], "has its own"),
    (["--init_from={models}/lm", "--block_size=65"], "at most --block_size=64"),
    (["--init_from={models}/lm", "--adapter=p_tuning", "--block_size=50"], "at most --block_size=44"),
    (["--init_from={models}/words", GOOD, "--block_size=32"], "300 tokens, {models}/words knows 290"),
    (["--init_from={models}/lm", *LORA, "--lora_targets=qkv"], "qkv"),
    (["--dataset={data}/questions.jsonl"], "nothing to learn from"),
    (["--dataset={data}/answers.jsonl", "--block_size=8", "--tokenizer=bytes"], "nothing to learn from"),
    (["--dataset={data}/numbers.jsonl"], "cannot be used"),
    (["--init_from={models}/strict", *CHATS], "no system message"),
    (["--init_from={models}/blind", *CHATS], "does not put an answer behind"),
]


@pytest.fixture
def fill_in(tmp_path, data, models):
    """fill_in(arguments) -> they with what they leave out: a place to run, and good data"""

    def fill_in(arguments):
        where = [] if any("out_dir" in argument for argument in arguments) else [f"--out_dir={tmp_path}/run"]
        where += [] if any("dataset" in argument for argument in arguments) else [GOOD]
        return [argument.format(data=data, models=models) for argument in (*where, *arguments)]

    return fill_in


@pytest.mark.parametrize(
    "arguments, message", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_the_trainer_refuses(tmp_path, data, models, fill_in, arguments, message):
    before = {p: p.read_bytes() for p in (*data.rglob("*"), *models.rglob("*")) if p.is_file()}
    assert message.format(models=models) in refusal("train_lm.py", *fill_in(arguments))
    assert {p: p.read_bytes() for p in before} == before
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_command_refuses(fill_in):
    """One of them as a whole process."""
    arguments, message = REFUSED[0]
    _, err = run("train_lm.py", *fill_in(arguments), code=2)
    assert message in err and err.count("\n") == 1


HOSTILE = {
    "weights of a language model": ("pytorch_model.bin", ["--init_from={model}"]),
    "weights of an adapter": ("adapter_model.bin", ["--init_from={model}", *LORA]),
    "code of a language model": ("modeling_x.py", ["--init_from={model}"]),
    "code of a configuration": ("configuration_x.py", ["--init_from={model}"]),
    "code of a tokenizer": ("tokenization_x.py", ["--tokenizer={model}", "--max_steps=1"]),
    "a chat template": ("chat_template.jinja", ["--init_from={model}", *CHATS]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_models_run_no_code(tmp_path, models, fill_in, what):
    """Each kind of file that is loaded, with code in it that leaves a file."""
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
        part = {"m": "AutoModelForCausalLM", "c": "AutoConfig", "t": "AutoTokenizer"}[name[0]]
        file = model / ("tokenizer_config.json" if name[0] == "t" else "config.json")
        config = json.loads(file.read_text()) | {"model_type": "x"}
        code = f"{path.stem}.X"
        config["auto_map"] = {part: [code, code] if name[0] == "t" else code, "AutoConfig": code}
        config |= {"tokenizer_class": "X"} if name[0] == "t" else {}
        file.write_text(json.dumps(config))
    arguments = [argument.replace("{model}", str(model)) for argument in arguments]
    arguments = fill_in([*arguments, "--block_size=32"])
    if "tokenizer" in what:  # tokenizer.json is all that is taken from there
        within("train_lm.py", *arguments)
    else:
        refusal("train_lm.py", *arguments)
    assert not owned.exists()
