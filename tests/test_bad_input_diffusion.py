"""
Validates how train_diffusion.py, and sample.py for images, answer bad input: one line that names the setting,
the file or the column and the remedy, exit code 2, no traceback, nothing written or changed. What sample.py
refuses of any run is in test_sample.py.
"""

import json
import shutil

import datasets
import diffusers
import numpy as np
import pytest
from conftest import ROOT, TINY, contents, refusal, within
from PIL import Image
from safetensors.torch import load_file, save_file

NUMBERS = "batch_size=0 image_size=0 patch_size=0 n_layer=0 n_head=0 n_embd=0 lora_rank=0 lora_alpha=0"
NUMBERS += " ema_decay=1 beta1=1 beta2=1.5 val_fraction=1 test_fraction=1.5 label_dropout=1.1 guidance=-2"
NUMBERS += " seed=9223372036854775808 grad_clip=-1 max_steps=-1 num_workers=-1 sample_steps=-1 n_embd=102"
NUMBERS += " optimizer=sgd lr_schedule=linear mixed_precision=fp8 tracker=wandbb adapter=qlora prediction=x1"
NUMBERS += " sampler=euler dataset= adapter=lora frozen_fp8=True mixed_precision=fp16 cooldown=20 min_lr=1.5"

SD = "--init_from={data}/sd --image_size=16"
LORA = SD + " --adapter=lora --caption=x"
REFUSED = [
    ("--resume=True --overwrite=True", "use only one of them"),
    ("--caption=x", "need a pretrained pipeline"),
    ("--patience=2 --eval_interval=0", "patience=2 needs evaluations"),
    ("--patience=2 --val_fraction=0", "patience=2 needs validation data"),
    ("--image_size=15", "inputs are 15 wide, which is not a multiple of patch_size=2"),
    (
        "--batch_size=64 --micro_batch_size=5",
        "batch_size=64 must be a multiple of micro_batch_size x processes = 5 x 1",
    ),
    ("--vae={data}/nothing", "vae='{data}/nothing' cannot be used"),
    ("--vae={data}/small", "is of the kind AutoencoderTiny"),
    # data
    ("--dataset={data}/missing", "dataset='{data}/missing' cannot be used"),
    ("--dataset={data}/nothing", "holds no file of a supported kind"),
    ("--dataset={data}/empty.parquet", "empty.parquet' cannot be used"),
    ("--dataset={data}/broken", "no image of its train split can be read"),
    ("--dataset={data}/rows.parquet", "takes one of picture, price, label, author"),
    ("--dataset={data}/rows.parquet --image_column=price", "image_column='price' cannot be used"),
    ("--dataset={data}/rows.parquet --image_column=picture --label_column=author", "column 'author' holds"),
    ("--dataset={data}/lists.parquet", "image_column='image' holds lists: each row"),
    ("--dataset={data}/unnamed", "metadata.jsonl, row 1 has no file_name"),
    ("--dataset={data}/commas", "metadata.csv, row 1 has too many fields"),
    ("--dataset={data}/no_train", "has no split named train, only test"),
    ("--dataset={data}/one --test_fraction=0.5", "is too small to set a part aside"),
    (SD + " --dataset={data}/half", "lacks captions for 3 images"),
    (SD + " --dataset={data}/mute", "1.txt is empty"),
    (SD + " --dataset={data}/latin", "1.txt' cannot be used"),
    # the run directory
    ("--out_dir={data}/foreign", "holds other files, such as thesis.doc"),
    ("--out_dir={data}/foreign/thesis.doc", "out_dir="),
    ("--out_dir={root}", "contains {root}"),
    ("--out_dir={data} --dataset={data}/one --overwrite=True", "contains {data}/one"),
    ("--out_dir={data}/sd --overwrite=True " + SD, "contains {data}/sd"),
    # pipelines
    (SD + " --vae=x", "has its own autoencoder"),
    (
        LORA + " --image_size=15",
        "image_size=15 must be a multiple of 2, by which the pipeline or vae shrinks it",
    ),
    (LORA + " --image_size=18", "have to be divisible by 8"),
    (LORA + " --lora_targets=to_q,to_typo", "has no layer 'to_typo'"),
    (LORA + " --frozen_fp8=True", "saves memory only with"),
    (
        "--caption=x --init_from={data}/sd/unet/diffusion_pytorch_model.safetensors",
        "is a file: load it by diffusers",
    ),
    ("--caption=x --init_from={data}/adapter", "holds a LoRA adapter: name the pipeline"),
    ("--caption=x --init_from={data}/torn", "init_from='{data}/torn' cannot be used"),
    ("--caption=x --init_from={data}/StableDiffusionControlNetPipeline", "StableDiffusionControlNetPipeline"),
    ("--caption=x --init_from={data}/two", "only pipelines with one denoiser"),
    ("--caption=x --image_size=16 --init_from={data}/edm", "its EDMEulerScheduler is not supported"),
    ("--caption=x --adapter=lora --init_from={data}/PixArtSigmaPipeline", "takes no LoRA"),
]
OTHERS = ["DDPMPipeline", "StableDiffusionImg2ImgPipeline", "AnimateDiffPipeline", "Kandinsky3Pipeline"]
REFUSED += [(f"--caption=x --init_from={{data}}/{name}", "not a text-to-image pipeline") for name in OTHERS]
OTHERS += ["StableDiffusionControlNetPipeline", "PixArtSigmaPipeline"]
SAMPLES = [
    ("--out_dir={runs}/classes --prompt=x", "takes no prompt"),
    ("--out_dir={runs}/classes --output={runs}/x.jpg", "must be a .png in a folder that exists"),
    ("--out_dir={runs}/torn", "torn' cannot be used"),
    ("--out_dir={runs}/classes --base={data}/sd", "has an effect on adapters only"),
    ("--out_dir={runs}/classes --lora_scale=0.5", "has an effect on adapters only"),
    ("--out_dir={runs}/lora", "needs a --prompt"),
    ("--out_dir={runs}/lora --prompt=x --base={data}/nothing", "base='{data}/nothing' cannot be used"),
    ("--out_dir={runs}/lora --prompt=x --base={sdxl}", "but the run needs a StableDiffusionPipeline"),
    ("--out_dir={runs}/lora --prompt=x --base={sd2}", "base='{sd2}' cannot be used"),
    ("--out_dir={runs}/other --prompt=x", "lacks layers of the LoRA"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("data")
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    for name in ("one", "half", "mute", "latin", "commas", "unnamed", "no_train/test", "broken"):
        (folder / name).mkdir(parents=True)
        for i in range(1 if name == "one" else 4):
            image.save(folder / name / f"{i}.png")
    files = {"empty.parquet": b"", "nothing/.hidden": b"", "foreign/thesis.doc": b"years of work"}
    files |= {f"broken/{i}.png": b"none" for i in range(4)}
    files |= {"half/1.txt": b"black", "mute/1.txt": b"", "latin/1.txt": "noir, coupé".encode("latin-1")}
    files |= {"unnamed/metadata.jsonl": b'{"name": "1.png"}', "adapter/pytorch_lora_weights.safetensors": b""}
    files["commas/metadata.csv"] = b"file_name,label\n1.png,a,b\n"
    files["small/config.json"] = b'{"_class_name": "AutoencoderTiny", "in_channels": 3}'
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    table = {"picture": [str(folder / "one/0.png")] * 4, "price": [1.5] * 4, "label": [0, 1, 0, 1]}
    table["author"] = [{"name": "a"}] * 4
    table = datasets.Dataset.from_dict(table).cast_column("picture", datasets.Image())
    table.to_parquet(folder / "rows.parquet")
    datasets.Dataset.from_dict({"image": [[0] * 784] * 4}).to_parquet(folder / "lists.parquet")
    for name in ("sd", "torn"):
        shutil.copytree(pipeline("sd"), folder / name)
    (folder / "torn/unet/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    index = json.loads((folder / "sd/model_index.json").read_text())
    changes = {"two": {"unet_2": index["unet"]}, "edm": {"scheduler": ["diffusers", "EDMEulerScheduler"]}}
    changes |= {name: {"_class_name": name} for name in OTHERS}
    changes["Kandinsky3Pipeline"]["vae"] = [None, None]
    for name, change in changes.items():
        shutil.copytree(folder / "sd", folder / name)
        (folder / name / "model_index.json").write_text(json.dumps(index | change))
    diffusers.EDMEulerScheduler().save_pretrained(folder / "edm/scheduler")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data, picture_folder, captioned):
    """A run of a DiT and one of a LoRA, and copies with something amiss."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text(TINY["train_diffusion.py"] + "max_steps = 2\n")
    how = ("train_diffusion.py", folder / "tiny.py")
    within(*how, f"--dataset={picture_folder}", f"--out_dir={folder}/classes")
    lora = [argument.format(data=data) for argument in LORA.split()]
    within(*how, *lora, f"--dataset={captioned}", "--lora_rank=2", f"--out_dir={folder}/lora")
    shutil.copytree(folder / "classes", folder / "torn")
    (folder / "torn/model.safetensors").write_bytes(b"not weights")
    shutil.copytree(folder / "lora", folder / "other")
    file = folder / "other/pytorch_lora_weights.safetensors"
    # of a base with more blocks
    save_file({name.replace("up_blocks.0", "up_blocks.5"): x for name, x in load_file(file).items()}, file)
    return folder


@pytest.mark.parametrize("setting", NUMBERS.split())
def test_settings_that_cannot_work_are_refused_before_the_data_is_read(tmp_path, setting):
    how = (f"--dataset={tmp_path}/nowhere", f"--out_dir={tmp_path}/run")
    message = refusal("train_diffusion.py", *how, f"--{setting}")
    name, _, _ = setting.partition("=")
    assert message.startswith((f"train_diffusion.py: {name}", f"train_diffusion.py: --{name}"))
    assert "nowhere" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_the_trainer_refuses(tmp_path, tiny, data, arguments, message):
    before = contents(data)
    arguments = arguments.format(data=data, root=ROOT).split()
    assert message.format(data=data, root=ROOT) in refusal("train_diffusion.py", tiny, *arguments)
    assert contents(data) == before
    assert not contents(tmp_path / "run")


@pytest.mark.parametrize("arguments, message", SAMPLES)
def test_sample_refuses(tmp_path, data, runs, pipeline, arguments, message):
    names = {"data": data, "runs": runs, "sdxl": pipeline("sdxl"), "sd2": pipeline("sd2")}
    before = contents(runs)
    where = () if "--output" in arguments else (f"--output={tmp_path}/x.png",)
    assert message.format(**names) in refusal("sample.py", *where, *arguments.format(**names).split())
    assert contents(runs, tmp_path) == before
