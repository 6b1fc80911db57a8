"""
Validates that mistakes of a user of train_diffusion.py end in one line that quotes the value and names a remedy, with
exit code 2, before anything is trained; and that a resume that does not fit is refused.
"""

import json
import re

import numpy as np
import pytest
from conftest import within
from PIL import Image

SD = "--image_size=16"
REFUSED = [
    (["--n_embd=100", "--n_head=3"], "must be a multiple of n_head=3"),
    (["--objective=noise"], "flow, eps or v"),
    (["--guidence=3"], "did you mean guidance"),
    (["config/cifar10.py"], "config='config/cifar10.py' cannot be used"),
    (["--image_size=15"], "must be a multiple of patch_size=2"),
    (["--sampler=ddim"], "flow is reversed by heun or euler"),
    (["--sampler=heun", "--objective=v"], "v is reversed by dpm++ or"),
    (["--zero_snr=True", "--objective=eps", "--sampler="], "needs objective='v'"),
    (["--zero_snr=True", "--objective=v", "--sampler=", "--min_snr=5"], "and min_snr=0"),
    (["--label_dropout=0", "--guidance=2"], "needs label_dropout above 0"),
    (["--fold=6/5"], "2/5 is the second of five parts"),
    (["--resume=True", "--overwrite=True"], "choose one"),
    (["--batch_size=64", "--micro_batch_size=5"], "batch_size=64 is no multiple of 5 pictures x 1 processes"),
    (["--vae={data}/nothing"], "vae='{data}/nothing' cannot be used"),
    (["--dataset={data}/missing"], "dataset='{data}/missing' cannot be used"),
    (["--dataset={data}/nothing"], "dataset='{data}/nothing' cannot be used"),
    (["--dataset={data}/empty.parquet"], "empty.parquet' cannot be used"),
    (["--dataset={data}/no_pictures"], "no picture of its train split can be read"),
    (["--dataset={data}/rows.parquet"], "takes one of ['picture']"),
    (["--dataset={data}/rows.parquet", "--image_column=price"], "image_column='price' cannot be used"),
    (["--dataset={data}/one", "--test_fraction=0.5"], "dataset='{data}/one' cannot be used"),
    (["--out_dir={data}/foreign"], "holds thesis.doc"),
    (["--adapter=lora"], "lora, with --init_from="),
    (["--adapter=dora", "--init_from={data}/sd"], "lora, with"),
    (["--init_from={data}/sd", "--vae=x"], "scratch only"),
    (["--init_from={data}/none"], "init_from='{data}/none' cannot be used"),
    (["--init_from={data}/torn", SD], "init_from='{data}/torn' cannot be used"),
    (["--init_from={data}/sd", "--image_size=15", "--caption=x"], "cannot be used"),
    (["--init_from={data}/sd", SD, "--lora_targets=to_w", "--adapter=lora"], "lora_targets='to_w' cannot be"),
    (["--init_from={data}/sd", SD, "--dataset={data}/one"], "pictures without a caption"),
    (["--init_from={data}/sd", SD, "--dataset={data}/half"], "pictures without a caption"),
]


@pytest.fixture
def trainer():
    return "train_diffusion.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory, pipeline):
    import shutil

    import datasets

    folder = tmp_path_factory.mktemp("data")
    for name in ("nothing", "no_pictures", "one", "half", "foreign"):
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
    return folder


@pytest.mark.parametrize(
    "arguments, message", REFUSED, ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_one_line_and_exit_code_2(tmp_path, tiny, data, arguments, message):
    _, err = within("train_diffusion.py", tiny, *(a.format(data=data) for a in arguments), code=2)
    last = re.split("[\n\r]", err.rstrip("\n"))[-1].strip()  # behind a progress bar
    assert (
        last.startswith("train_diffusion.py: ")
        and message.format(data=data) in last
        and "Traceback" not in err
    )
    assert not list((tmp_path / "run").glob("*.pt"))


def test_resumes_that_do_not_fit(tmp_path, tiny, picture_folder):
    within("train_diffusion.py", tiny, "--max_steps=10")
    before = json.loads((tmp_path / "run/run.json").read_text())
    for arguments, message in [
        ([], "--resume=True or --overwrite=True"),
        (["--resume=True", "--n_layer=3"], "'n_layer': 2"),
        (["--resume=True", f"--dataset={picture_folder}/red"], "choose another --out_dir"),
        (["--resume=True", "--objective=v", "--sampler="], "'objective': 'flow'"),
    ]:
        _, err = within("train_diffusion.py", tiny, *arguments, code=2)
        assert message in err.rstrip("\n").rsplit("\n", 1)[-1]
    assert json.loads((tmp_path / "run/run.json").read_text()) == before
    (tmp_path / "run/checkpoint.pt").write_bytes(b"no checkpoint")
    _, err = within("train_diffusion.py", tiny, "--resume=True", code=2)
    assert "checkpoint='" in err and "cannot be used" in err
    within("train_diffusion.py", tiny, "--overwrite=True", "--max_steps=10")
