"""
Validates that mistakes of a user of train_diffusion.py end in one line that quotes the value and names a remedy, with
exit code 2, before anything is trained; and that a resume that does not fit is refused.
"""

import json
import shutil

import numpy as np
import pytest
from conftest import within
from PIL import Image

SD = "--init_from={data}/sd --image_size=16"
REFUSED = [
    ("--n_embd=100 --n_head=3", "must be a multiple of 4 and n_head=3"),
    ("--image_size=15", "image_size=15: a side of 15 is no multiple of patch_size=2"),
    ("--lr_schedule=linear", "wsd, cosine or constant"),
    ("--batch_size=64 --micro_batch_size=5", "batch_size=64 is no multiple of 5 pictures x 1 processes"),
    ("--vae={data}/nothing", "vae='{data}/nothing' cannot be used"),
    ("--dataset={data}/missing", "dataset='{data}/missing' cannot be used"),
    ("--dataset={data}/empty.parquet", "empty.parquet' cannot be used"),
    ("--dataset={data}/no_pictures", "no picture of its train split can be read"),
    ("--dataset={data}/rows.parquet", "choose from picture, price, label"),
    ("--dataset={data}/rows.parquet --image_column=price", "image_column='price' cannot be used"),
    ("--dataset={data}/one --test_fraction=0.5", "dataset='{data}/one' cannot be used"),
    ("--out_dir={data}/foreign", "holds thesis.doc"),
    ("--adapter=lora", "lora, with --init_from="),
    (SD + " --vae=x", "the latents of init_from are the pipeline's"),
    (SD + " --image_size=15 --caption=x", "have to be divisible by 8"),
    (SD + " --lora_targets=to_w --adapter=lora", "lora_targets='to_w' cannot be used"),
    (SD + " --dataset={data}/half", "lacks captions"),
    ("--init_from={data}/torn --caption=x", "init_from='{data}/torn' cannot be used"),
    ("--init_from={data}/blind", "a DDPMPipeline must have captions"),
    ("--init_from={data}/two", "one denoiser"),
    ("--init_from={data}/edm", "no EDM scheduler"),
    ("--init_from={data}/pixart --adapter=lora", "a PixArtSigmaPipeline takes no LoRA"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, pipeline):
    import datasets

    folder = tmp_path_factory.mktemp("data")
    for name in ("nothing", "no_pictures", "one", "half", "foreign", "blind", "two", "edm", "pixart"):
        (folder / name).mkdir()
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "foreign/thesis.doc").write_text("years of work")
    picture = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    picture.save(folder / "one/1.png")
    for i in range(4):
        picture.save(folder / f"half/{i}.png")
        (folder / f"no_pictures/{i}.png").write_bytes(b"none")
    (folder / "half/1.txt").write_text("black")
    table = {"picture": [str(folder / "one/1.png")] * 4, "price": [1.5] * 4, "label": [0, 1, 0, 1]}
    table = datasets.Dataset.from_dict(table).cast_column("picture", datasets.Image())
    table.to_parquet(folder / "rows.parquet")
    for name in ("sd", "torn"):
        shutil.copytree(pipeline("sd"), folder / name)
    (folder / "torn/unet/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    index = json.loads((folder / "sd/model_index.json").read_text())
    changes = {"blind": {"_class_name": "DDPMPipeline"}, "two": {"unet_2": index["unet"]}}
    changes["edm"] = {"scheduler": ["diffusers", "EDMEulerScheduler"]}
    changes["pixart"] = {"_class_name": "PixArtSigmaPipeline"}
    for name, change in changes.items():
        (folder / name / "model_index.json").write_text(json.dumps(index | change))
    return folder


def refusal(*arguments):
    """-> the last line of what the command says, behind the progress bars of libraries"""
    _, err = within("train_diffusion.py", *arguments, code=2)
    last = err.rstrip().splitlines()[-1].strip()
    assert last.startswith("train_diffusion.py: ") and "Traceback" not in err
    return last


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_one_line_and_exit_code_2(tmp_path, tiny, data, arguments, message):
    assert message.format(data=data) in refusal(tiny, *arguments.format(data=data).split())
    assert not list((tmp_path / "run").glob("*.pt"))


def test_resumes_that_do_not_fit(tmp_path, tiny, picture_folder):
    within("train_diffusion.py", tiny, "--max_steps=10")
    before = json.loads((tmp_path / "run/run.json").read_text())
    assert "--resume=True or --overwrite=True" in refusal(tiny)
    for argument, message in [
        ("--n_layer=3", "'n_layer': 2"),
        (f"--dataset={picture_folder}/red", "choose another --out_dir"),
        ("--optimizer=adamw", "'optimizer': 'muon'"),
    ]:
        assert message in refusal(tiny, "--resume=True", argument)
    assert json.loads((tmp_path / "run/run.json").read_text()) == before
    (tmp_path / "run/checkpoint.pt").write_bytes(b"no checkpoint")
    assert "checkpoint='" in refusal(tiny, "--resume=True")
    within("train_diffusion.py", tiny, "--overwrite=True", "--max_steps=10")
