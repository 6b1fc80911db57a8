"""
Bad input through the real commands: one line that names the remedy, a non-zero exit, no traceback, nothing overwritten.
"""

import json
import pickle
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import TINY, TINY_MODEL, run, within
from PIL import Image
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
    (["--mixed_precision=fp16", "--optimizer=adamw"], "needs CUDA"),
    (["--val_fraction=0.6", "--test_fraction=0.4"], "leave nothing to train on"),
    (["--fold=6/5"], "2/5 is the second of five parts"),
    (["--resume=True", "--overwrite=True"], "choose one"),
    (["--batch_size=16", "--micro_batch_size=5"], "no multiple of 5 rows x 1 processes"),
    (["--tracker=mlflow"], "tracker='mlflow' is not installed"),
    (["--dataset={data}/missing.txt"], "no file or folder"),
    (["--dataset={data}/*.md"], "no file or folder"),
    (["--dataset={data}/nothing"], "no file or folder"),
    (["--dataset={data}/empty.txt"], "has nothing in its train split"),
    (["--dataset={data}/latin.txt"], "can't decode byte"),
    (["--dataset={data}/short.txt"], "too small"),
    (["--dataset={data}/rows.jsonl"], "--text_column=body"),
    (["--dataset={data}/rows.jsonl", "--text_column=n"], "no text column 'n'"),
    (["--dataset={data}/rows.jsonl", "--train_split=sft"], "takes one of train"),
    (["--dataset={data}/broken.jsonl"], "cannot be used"),
    ([GOOD, "--out_dir={data}/foreign"], "holds other files, such as thesis.doc"),
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
    (["--dataset={data}/questions.jsonl"], "too small"),
    (["--dataset={data}/empty_chats.jsonl"], "dataset="),
    (["--dataset={data}/answers.jsonl", "--block_size=8", "--tokenizer=bytes"], "too small"),
    (["--dataset={data}/numbers.jsonl"], "cannot be used"),
    (["--dataset={data}/chats.jsonl", "--init_from={models}/strict", *SHORT], "no system message"),
    (["--dataset={data}/chats.jsonl", "--init_from={models}/blind", *SHORT], "does not put an answer behind"),
]


SD = ("--caption=a square", "--val_fraction=0", "--test_fraction=0")
DIFFUSION = [
    (["--n_embd=100", "--n_head=3"], "must be a multiple of 4 x n_head=3"),
    (["--objective=noise"], "none of 'flow', 'eps', 'v'"),
    (["--guidence=3"], "did you mean guidance"),
    (["config/cifar10.py"], "No such file"),
    (["--image_size=15"], "use 14 or 16"),
    (["--image_size=1"], "use 2"),
    (["--sampler=ddim"], "use heun or euler"),
    (["--sampler=heun", "--objective=v"], "use dpm++ or"),
    (["--min_snr=5"], "flow has time_mean and time_std"),
    (["--zero_snr=True", "--objective=eps"], "needs objective='v'"),
    (["--label_dropout=0"], "needs label_dropout above 0"),
    (["--time_mean=-10"], "at least -9"),
    (["--vae={data}/nothing"], "is no AutoencoderKL"),
    (["--vae={data}/nothing", "--crop=random"], "use crop='center'"),
    (["--resume=True", "--overwrite=True"], "choose one"),
    (["--micro_batch_size=5"], "use 60 or 65"),
    (["--dataset={data}/missing"], "no file or folder"),
    (["--dataset={data}/missing.png"], "no file or folder"),
    (["--dataset={data}/nothing"], "holds no .png"),
    (["--dataset={data}/empty.parquet"], "cannot load"),
    (
        ["--dataset={data}/no_pictures", "--label_column="],
        "8 of 8 pictures cannot be read, such as {data}/no",
    ),
    (["--dataset={data}/flat"], "no column 'label'"),
    (["--dataset={data}/flat"], "--label_column= to train without classes"),
    (["--dataset={data}/rows.parquet"], "--image_column=picture"),
    (["--dataset={data}/rows.parquet", "--image_column=picture"], "--label_column=lable"),
    (
        ["--dataset={data}/rows.parquet", "--image_column=picture", "--label_column=price"],
        "no classes: name another",
    ),
    (
        ["--dataset={data}/rows.parquet", "--image_column=picture", "--label_column=caption"],
        "no classes: name another",
    ),
    (["--dataset={data}/rows.parquet", "--image_column=price", "--label_column="], "holds no pictures"),
    (["--dataset={data}/flat", "--label_column=", "--test_fraction=0.5"], "1 pictures are too few"),
    (["--dataset={data}/described"], "cannot load"),
    (["--out_dir={data}/foreign"], "holds other files, such as thesis.doc"),
    (["--adapter=lora"], "are for a pretrained pipeline: name it by --init_from="),
    (["--init_from={models}/sd", "--out_dir={models}/sd"], "go on with that run by --resume=True"),
    (["--init_from={models}/sd", "--base_dtype=bf16"], "what is trained is in fp32"),
    (["--sample_prompts=a cat"], "is for pipelines with captions"),
    (["--init_from={models}/told", "--image_size=8"], "is told classes"),
    (["--init_from={models}/sd", "--vae=x"], "{models}/sd has its own"),
    (["--init_from={models}/sd", "--crop=random"], "use crop='center'"),
    (["--init_from={models}/none"], "is no pipeline of diffusers"),
    (["--init_from={models}/gpt2"], "is no pipeline of diffusers"),
    (["--init_from={models}/torn", *SD], "is no pipeline of diffusers"),
    (
        ["--init_from={models}/inpaint", *SD],
        "what can be trained is StableDiffusionPipeline, StableDiffusionXL",
    ),
    (["--init_from={models}/flow", *SD], "a FlowMatchEulerDiscreteScheduler: only those with 1000 betas"),
    (["--init_from={models}/nine", *SD], "takes 9 channels and gives 4"),
    (["--init_from={models}/sd", *SD, "--image_size=15"], "use 14 or 16"),
    (["--init_from={models}/sd", *SD, "--sampler=heun"], "use dpm++ or unipc"),
    (
        ["--init_from={models}/sd", *SD, "--lora_targets=to_q,to_w", "--adapter=lora"],
        "no layer 'to_w'; it has conv",
    ),
    (["--init_from={models}/sd", *SD, "--lora_rank=0", "--adapter=lora"], "lora_rank=0 must be at least 1"),
    (["--init_from={models}/sd", "--dataset={data}/flat"], "has no column 'text'"),
    (["--init_from={models}/sd", "--dataset={data}/flat"], "--caption=TEXT for one caption for all"),
    (["--init_from={models}/sd", "--dataset={data}/half"], "2 of 4 pictures have none, such as"),
    (["--init_from={models}/sd", *SD, "--dataset={data}/no_pictures"], "8 of 8 pictures cannot be read"),
    (["--init_from={models}/ddpm", *SD, "--image_size=16"], "--image_size=8"),
    (["--init_from={models}/ddpm", "--image_size=8", "--adapter=lora"], "train {models}/ddpm whole"),
]
REFUSED = [("train_lm.py", *case) for case in LM] + [("train_diffusion.py", *case) for case in DIFFUSION]


@pytest.fixture(scope="module")
def pipelines(models, pipeline):
    """A pipeline of each kind in the folder of models, and what is wrong in some way."""
    sd = pipeline("sd")
    for name in ("sd", "torn", "inpaint", "flow", "nine"):
        shutil.copytree(sd, models / name)
    shutil.copytree(pipeline("ddpm"), models / "ddpm")
    shutil.copytree(models / "lm", models / "gpt2")
    (models / "torn" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    index = (sd / "model_index.json").read_text()
    (models / "inpaint" / "model_index.json").write_text(
        index.replace("StableDiffusion", "StableDiffusionInpaint")
    )
    (models / "flow" / "model_index.json").write_text(index.replace("PNDM", "FlowMatchEulerDiscrete"))
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(models / "flow" / "scheduler")
    shutil.copytree(models / "ddpm", models / "told")
    shape = dict(diffusers.UNet2DModel.load_config(models / "told" / "unet")) | {"num_class_embeds": 3}
    diffusers.UNet2DModel.from_config(shape).save_pretrained(models / "told" / "unet")
    shape = dict(diffusers.UNet2DConditionModel.load_config(sd / "unet")) | {"in_channels": 9}
    diffusers.UNet2DConditionModel.from_config(shape).save_pretrained(models / "nine" / "unet")


@pytest.fixture
def pictures(data):
    """Pictures, and what only looks like pictures."""
    import datasets

    picture = Image.new("RGB", (16, 16), "red")
    (data / "flat").mkdir()
    picture.save(data / "flat" / "one.png")
    (data / "no_pictures").mkdir()
    for name in "abcdefgh":
        (data / "no_pictures" / f"{name}.png").write_text("a picture of a pipe")
    (data / "half").mkdir()
    for name in "abcd":
        picture.save(data / "half" / f"{name}.png")
    for name in "ac":
        (data / "half" / f"{name}.txt").write_text("red")
    (data / "described").mkdir()
    picture.save(data / "described" / "one.png")
    (data / "described" / "metadata.jsonl").write_text('{"file_name": "one.png", "label":\n')
    (data / "empty.parquet").write_bytes(b"")
    rows = {"picture": [picture] * 400, "lable": [1, 2] * 200, "price": [0.5] * 400}
    rows["caption"] = [f"red, number {i}" for i in range(400)]
    datasets.Dataset.from_dict(rows).to_parquet(data / "rows.parquet")


def fill_in(tmp_path, data, models, trainer, arguments):
    """The arguments with what they leave out: a place to run, and data that could be trained on."""
    where = [] if any("out_dir" in a for a in arguments) else [f"--out_dir={tmp_path / 'run'}"]
    good = f"--dataset={data / ('good.txt' if trainer == 'train_lm.py' else 'flat')}"
    default = [] if any("dataset" in a for a in arguments) else [good]
    return [*where, *default, *(argument.format(data=data, models=models) for argument in arguments)]


@pytest.mark.parametrize(
    "trainer, arguments, message", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else x[:12]
)
def test_the_trainer_refuses(tmp_path, data, pictures, models, pipelines, trainer, arguments, message):
    before = {p: p.read_bytes() for p in (*data.rglob("*"), *models.rglob("*")) if p.is_file()}
    out, err = within(trainer, *fill_in(tmp_path, data, models, trainer, arguments), code=2)
    assert message.format(data=data, models=models) in refused(out, err), err
    assert {p: p.read_bytes() for p in before} == before
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("trainer, arguments, message", REFUSED[::20], ids=lambda x: "")
def test_the_command_refuses(tmp_path, data, pictures, models, pipelines, trainer, arguments, message):
    """Some of the same, as a whole process."""
    out, err = run(trainer, *fill_in(tmp_path, data, models, trainer, arguments), code=2)
    assert message.format(data=data, models=models) in refused(out, err), err


@pytest.fixture
def finished(tmp_path, tiny):
    within("train_lm.py", tiny, "--max_steps=10", "--tokenizer=char")
    return tmp_path / "run"


SAMPLER = [
    ("text", ["--prompt="], "prompt is empty"),
    ("text", ["--prompt=FILE:{data}/empty.txt"], "prompt is empty"),
    ("text", ["--prompt=FILE:{data}/none.txt"], "cannot read the prompt"),
    ("text", ["--prompt=FILE:{data}/latin.txt"], "cannot read the prompt"),
    ("text", ["--prompt=" + "x" * 33], "at most 32"),
    ("text", ["--prompt=数学"], "cannot represent ['学', '数']"),
    ("text", ["--temperature=-1"], "at least 0"),
    ("text", ["--temperature=hot"], "of type float"),
    ("text", ["--top_p=1.5"], "at most 1"),
    ("text", ["--max_new_tokens=0"], "at least 1"),
    ("text", ["--num_samples=-1"], "at least 0"),
    ("text", ["--promt=a"], "did you mean prompt"),
    ("text", ["--prompt", "a"], "write --name=value"),
    ("text", ["--out_dir={runs}/nowhere"], "there is no run"),
    ("text", ["--out_dir={runs}"], "neither a run"),
    ("text", ["--out_dir={runs}/text/samples"], "neither a run"),
    ("text", ["--merge={data}/merged"], ""),
    ("text", ["--chat=True"], ""),
    ("torn", [], "cannot be used"),
    ("weightless", [], "has no weights yet"),
    ("music", [], "kind 'music'"),
    ("unreadable", [], "cannot be used"),
    ("pictures", ["--class_label=rad"], "try red, or a number from 0 to 2"),
    ("pictures", ["--class_label=3"], "from 0 to 2"),
    ("pictures", ["--sampler=ddim"], "use heun or euler"),
    ("pictures", ["--steps=1001"], "at most 1000"),
    ("pictures", ["--output={data}/nowhere/grid.png"], "must be a .png in a folder that exists"),
    ("pictures", ["--output={data}/grid.xyz"], "must be a .png"),
    ("pictures", ["--prompt=a cat"], ""),
    ("pictures", ["--negative_prompt=a cat"], ""),
    ("classless", ["--guidance=2"], "no classes; use guidance=1"),
    ("classless", ["--class_label=red"], "without classes"),
    ("unhidden", ["--guidance=2"], "label_dropout=0"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_file, picture_folder):
    """A finished run of each kind, and some that are spoiled."""
    folder = tmp_path_factory.mktemp("runs")
    for trainer, name, *how in (
        ("train_lm.py", "text", f"--dataset={text_file}", "--tokenizer=char", "--max_steps=10"),
        ("train_diffusion.py", "pictures", "--max_steps=1"),
        ("train_diffusion.py", "classless", "--max_steps=1", "--label_column="),
        ("train_diffusion.py", "unhidden", "--max_steps=1", "--label_dropout=0", "--guidance=1"),
    ):
        config = folder.with_name(f"{name}.py")
        config.write_text(TINY_MODEL[trainer] + TINY)
        within(trainer, config, f"--dataset={picture_folder}", *how, f"--out_dir={folder / name}")
    for name in ("torn", "weightless", "music", "unreadable"):
        shutil.copytree(folder / "text", folder / name)
    (folder / "torn" / "model.safetensors").write_bytes(b"not weights")
    (folder / "weightless" / "model.safetensors").unlink()
    facts = json.loads((folder / "music" / "run.json").read_text())
    (folder / "music" / "run.json").write_text(json.dumps(facts | {"kind": "music"}))
    (folder / "unreadable" / "run.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    "name, arguments, message", SAMPLER, ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_the_sampler_refuses(runs, data, name, arguments, message):
    arguments = [argument.format(data=data, runs=runs) for argument in arguments]
    out, err = within("sample.py", f"--out_dir={runs / name}", *arguments, code=2)
    assert message in refused("", err.splitlines()[-1] + "\n") and "Traceback" not in out + err, err
    assert not (data / "merged").exists()


@pytest.mark.parametrize("trainer", ["train_diffusion.py"])
def test_resumes_of_a_diffusion_run_that_do_not_fit(tmp_path, tiny, trainer, pictures, data):
    within(trainer, tiny, "--max_steps=1")
    for argument, message in (
        ("--objective=v", "objective was 'flow', is 'v'"),
        ("--image_size=16", "image_size was 8, is 16"),
        (f"--dataset={data / 'flat'}", "cannot resume on other data"),
    ):
        more = ["--sampler="] if "=v" in argument else []
        more += ["--label_column=", "--val_fraction=0", "--test_fraction=0"] if "flat" in argument else []
        out, err = within(trainer, tiny, "--max_steps=2", "--resume=True", argument, *more, code=2)
        assert message in refused(out, err), err


# -----------------------------------------------------------------------------
# What a stranger has made: each kind of file that is loaded, with code in it
# -----------------------------------------------------------------------------


class Hostile:
    """Unpickled, it leaves a file named `owned`."""

    def __init__(self, owned):
        self.owned = str(owned)

    def __reduce__(self):
        return Path.touch, (Path(self.owned),)


def hostile_checkpoint(tmp_path, finished, owned, save):
    checkpoint = finished / "checkpoints" / "step_00000010"
    save(checkpoint / "state.pt")
    size = (checkpoint / "state.pt").stat().st_size
    (checkpoint / "manifest.json").write_text(json.dumps({"state.pt": size}))
    return checkpoint


def zipped(owned):
    return lambda path: torch.save({"model": Hostile(owned)}, path, pickle_module=pickle)


def pickled(owned):
    return lambda path: path.write_bytes(pickle.dumps({"model": Hostile(owned)}))


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
    "weights of a language model": ("lm", "pytorch_model.bin", ["--init_from={model}"]),
    "code of a language model": ("lm", "modeling_x.py", ["--init_from={model}"]),
    "code of a configuration": ("lm", "configuration_x.py", ["--init_from={model}"]),
    "code of a tokenizer": ("lm", "tokenization_x.py", ["--tokenizer={model}"]),
    "a chat template": ("lm", "chat_template.jinja", ["--init_from={model}", "--dataset={data}/chats.jsonl"]),
    "weights of a UNet": ("sd", "unet/diffusion_pytorch_model.bin", ["--init_from={model}", *SD]),
    "code of a UNet": ("sd", "unet/my_unet.py", ["--init_from={model}", *SD]),
    "code of a pipeline": ("sd", "pipeline.py", ["--init_from={model}", *SD]),
    "weights of a text encoder": ("sd", "text_encoder/pytorch_model.bin", ["--init_from={model}", *SD]),
    "weights of a VAE": ("sd", "vae/diffusion_pytorch_model.bin", ["--vae={model}/vae"]),
    "weights of a vision model": ("lm", "pytorch_model.bin", ["--fd_model={model}", "--fd_samples=1"]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_models_run_no_code(tmp_path, data, pictures, models, pipelines, what):
    kind, name, arguments = HOSTILE[what]
    model, owned = tmp_path / "model", tmp_path / "owned"
    shutil.copytree(models / kind, model)
    path = model / name
    if path.suffix == ".bin":
        for old in path.parent.glob("*.safetensors"):
            old.unlink()
        zipped(owned)(path)
    elif path.suffix == ".jinja":
        path.write_text("{{ cycler.__init__.__globals__.os.system('touch " + str(owned) + "') }}")
    else:
        path.write_text(CODE.format(owned=str(owned)))
        if kind == "lm":  # the way in which models of the hub bring code of their own
            part = {"m": "AutoModelForCausalLM", "c": "AutoConfig", "t": "AutoTokenizer"}[name[0]]
            file = model / ("tokenizer_config.json" if name[0] == "t" else "config.json")
            config = json.loads(file.read_text()) | {"model_type": "x"}
            code = f"{path.stem}.X"
            config["auto_map"] = {part: [code, code] if name[0] == "t" else code, "AutoConfig": code}
            config |= {"tokenizer_class": "X"} if name[0] == "t" else {}
            file.write_text(json.dumps(config))
        else:
            index = json.loads((model / "model_index.json").read_text())
            index |= {"unet": ["my_unet", "X"]} if "unet" in name else {"_class_name": ["pipeline", "X"]}
            (model / "model_index.json").write_text(json.dumps(index))
    lm = kind == "lm" and "vision" not in what
    trainer = "train_lm.py" if lm else "train_diffusion.py"
    where = fill_in(tmp_path, data, {}, trainer, [])
    where += ["--block_size=32" if lm else "--image_size=16", "--max_steps=1"]
    arguments = [argument.format(model=model, data=data) for argument in arguments]
    code = 0 if "tokenizer" in what else 2  # tokenizer.json is all that is taken from there
    out, err = within(trainer, *where, *arguments, code=code)
    assert code == 0 or refused(out, err)
    if lm and code:
        chat = ["--chat=True"] if "chat" in what else []
        refused(*within("sample.py", f"--out_dir={model}", *chat, code=2, stdin="hi\n"))
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
