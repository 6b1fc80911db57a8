"""
Validates the whole command on tiny pipelines. A run that is killed and resumed is the unbroken run, bit for
bit: LoRA on Flux.1, SD 3 and Qwen-Image, and all weights of SD 1. diffusers' own pipeline draws from the run
directory the last grid of the run. Two processes train as one; each may have a disk of its own until they resume.
"""

import json
import multiprocessing
import time

import diffusers
import numpy as np
import pytest
import torch
from conftest import differences, forked, last_state, lost, read_grid, rows, within
from pipelines import draw
from safetensors.torch import load_file

PROMPTS = ["a red square", "a blue square"]
HOW = ["--lora_rank=4", "--lora_alpha=8", "--flip=True", "--guidance=3", "--image_size=16"]
HOW += ["--val_fraction=0", "--test_fraction=0", "--batch_size=4", "--micro_batch_size=2"]
HOW += [f"--sample_prompts={'|'.join(PROMPTS)}", "--resume=True"]


@pytest.fixture
def command(tiny, trainer, pipeline, captioned):
    """command(kind, adapter) returns the command of a fine-tuning run on a tiny pipeline."""

    def command(kind, adapter="lora"):
        how = [f"--init_from={pipeline(kind)}", f"--adapter={adapter}", f"--dataset={captioned}"]
        how += ["--learning_rate=0.02", "--ema_decay=0"] if adapter else ["--learning_rate=0.001"]
        return [trainer, tiny, *HOW, *how]

    return command


def kill_at(step, out, *command):
    """Run the command in a fork of this process, which saves it the imports, and kill it at this step."""
    process = multiprocessing.get_context("fork").Process(target=within, args=command)
    process.start()
    metrics = out / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.01)
    assert process.is_alive()
    process.kill()
    process.join()


@pytest.mark.parametrize("kind", ["flux", "qwen_image", "sd3", "sd"])
def test_killed_and_resumed_is_unbroken_and_diffusers_draws_it(command, pipeline, kind, tmp_path):
    adapter = "" if kind == "sd" else "lora"
    how = [*command(kind, adapter), "--max_steps=20"]
    unbroken = tmp_path / "unbroken"
    out = tmp_path / "run"
    within(*how, f"--out_dir={unbroken}")
    kill_at(15, out, *how)
    assert "resumed from" in within(*how)[0]
    assert not lost(unbroken, out)
    state = last_state(out)
    [adamw] = state["optimizers"]
    trained = [name for name in state["model"] if "lora" in name or not adapter]
    # The last block of Qwen-Image has layers without effect on the output, which AdamW never touches.
    assert (len(adamw["state"]) == len(trained)) == (kind != "qwen_image")

    old = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    new = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind) if adapter else out)
    if adapter:
        new.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
        adapters = [load_file(out / f"samples/step_{step:08}.safetensors") for step in (10, 20)]
        assert differences(*adapters)
    else:
        made = json.loads((out / "run.json").read_text())
        assert made["model"] == "Pipeline"
        assert made["trained_parameters"] == made["parameters"]
        assert not differences(new.vae.state_dict(), old.vae.state_dict())
    kwargs = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}
    if kind == "qwen_image":
        kwargs |= {"true_cfg_scale": 3.0, "negative_prompt": " "}
    grid = torch.tensor(np.stack(read_grid(out / "samples/step_00000020.png", 16, 4))).float()
    assert (draw(new, 2 * PROMPTS, range(1337, 1341), **kwargs) - grid).abs().max() <= 1
    assert (draw(old, 2 * PROMPTS, range(1337, 1341), **kwargs) - grid).abs().max() > 2


@pytest.mark.parametrize("kind", ["sd", "flux", "qwen_image"])
def test_two_processes_train_as_one(command, kind, tmp_path):
    """For a UNet and transformers. The two stop and go on after three steps."""
    how = [*command(kind), "--lr_schedule=constant", "--log_interval=1"]
    one = tmp_path / "one"
    two = tmp_path / "two"
    second = f"--out_dir={tmp_path / 'second'}"
    within(*how, "--max_steps=6", f"--out_dir={one}")
    forked(*how, "--max_steps=3", f"--out_dir={two}", more=[second])
    forked(*how, "--max_steps=6", f"--out_dir={two}")
    losses = [[row["train/loss"] for row in rows(out, "train/loss")] for out in (one, two)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = [load_file(out / "pytorch_lora_weights.safetensors") for out in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[1][key] - weights[0][key]).abs().max() < 1e-3 for key in weights[0])
