"""
Validates the whole command on tiny pipelines: LoRA on SDXL, Flux.1 and Z-Image, killed and gone on with, is the unbroken
run bit for bit, and diffusers' own pipeline draws from the run directory the run's last grid; two processes train as one.
"""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import differences, forked, last_state, read_grid, rows, run, start, wait_for_step, within
from safetensors.torch import load_file

LORA = [
    "--adapter=lora",
    "--lora_rank=4",
    "--lora_alpha=8",
    "--learning_rate=0.01",
    "--sampler=",
    "--flip=True",
]
LORA += ["--val_fraction=0", "--test_fraction=0", "--image_size=16", "--batch_size=4", "--micro_batch_size=2"]
LORA += ["--guidance=3", "--sample_prompts=a red square|a blue square"]


@pytest.fixture
def trainer():
    return "train_diffusion.py"


@pytest.fixture
def lora(tiny, pipeline, captioned):
    """lora(kind, *arguments) -> the arguments of a LoRA run of a tiny pipeline"""
    return lambda kind, *more: [tiny, *LORA, f"--init_from={pipeline(kind)}", f"--dataset={captioned}", *more]


@pytest.mark.parametrize("kind", ["sdxl", "flux", "z_image"])
def test_killed_and_drawn_by_diffusers(lora, pipeline, kind, tmp_path):
    arguments = lora(kind, "--max_steps=30")
    within("train_diffusion.py", *arguments, f"--out_dir={tmp_path / 'unbroken'}")
    process = start("train_diffusion.py", *arguments)
    wait_for_step(tmp_path / "run", 15, process)
    process.kill()
    process.communicate()
    run("train_diffusion.py", *arguments, "--resume=True")
    a, b = tmp_path / "unbroken", tmp_path / "run"
    assert not differences(last_state(a), last_state(b)) and rows(a) == rows(b)
    for path in a.glob("samples/*.png"):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes(), path
    for path in a.rglob("*.safetensors"):  # the order of the metadata in them is not fixed
        assert not differences(load_file(path), load_file(b / path.relative_to(a))), path
    adapters = [load_file(b / f"samples/step_{step:08d}.safetensors") for step in (10, 20, 30)]
    assert differences(adapters[0], adapters[1]) and not differences(
        adapters[2], load_file(b / "pytorch_lora_weights.safetensors")
    )

    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(
        "a red square", height=16, width=16, num_inference_steps=2, guidance_scale=3.0, output_type="np"
    )
    pipe.load_lora_weights(b)
    for i, tile in enumerate(read_grid(b / "samples/step_00000030.png", 16, 4)):
        drawn = pipe(
            ["a red square", "a blue square"][i % 2],
            height=16,
            width=16,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1337 + i),
        ).images[0]
        assert abs(np.asarray(drawn).astype(int) - tile).max() <= 1
    assert abs(plain.images[0] * 255 - read_grid(b / "samples/step_00000030.png", 16, 4)[0]).max() > 3
    if kind == "sdxl":
        kohya = load_file(b / "kohya_lora.safetensors")
        assert {float(v) for k, v in kohya.items() if k.endswith(".alpha")} == {8.0}


@pytest.mark.parametrize("kind", ["sd", "z_image"])
def test_two_processes_train_as_one(lora, kind, tmp_path):
    arguments = lora(kind, "--max_steps=10", "--lr_schedule=constant")
    within("train_diffusion.py", *arguments, f"--out_dir={tmp_path / 'one'}")
    forked("train_diffusion.py", *arguments)
    one, two = (rows(tmp_path / out, "train/loss") for out in ("one", "run"))
    assert [row["train/loss"] for row in two] == pytest.approx([row["train/loss"] for row in one], rel=1e-4)


def test_all_weights_are_a_pipeline_of_diffusers(lora, pipeline, tmp_path):
    arguments = lora("sd", "--adapter=", "--max_steps=20", "--learning_rate=0.001", "--val_fraction=0.2")
    within("train_diffusion.py", *arguments)
    made = json.loads((tmp_path / "run/run.json").read_text())
    assert made["model"] == "Pipeline" and made["trained_parameters"] == made["parameters"]
    assert len(rows(tmp_path / "run", "val/loss")) == 3
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run")
    old = diffusers.DiffusionPipeline.from_pretrained(pipeline("sd"))
    assert differences(pipe.unet.state_dict(), old.unet.state_dict())
    assert not differences(pipe.vae.state_dict(), old.vae.state_dict())
