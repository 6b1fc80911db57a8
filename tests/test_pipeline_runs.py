"""
Validates the whole command on tiny pipelines: LoRA on Flux.1 and Qwen-Image, and all weights of SD 1, killed and
gone on with, are the unbroken run bit for bit, and diffusers' own pipeline draws from the run directory the run's last
grid; two processes, the second with a disk of its own, and a model in parts (FSDP2), train as one.
"""

import json
import multiprocessing
import time

import diffusers
import numpy as np
import pytest
import torch
from conftest import differences, forked, in_parts, lost, read_grid, rows, within
from pipelines import draw
from safetensors.torch import load_file

PROMPTS = ["a red square", "a blue square"]
HOW = ["--lora_rank=4", "--lora_alpha=8", "--flip=True", "--guidance=3", "--image_size=16"]
HOW += ["--val_fraction=0", "--test_fraction=0", "--batch_size=4", "--micro_batch_size=2"]
HOW += [f"--sample_prompts={'|'.join(PROMPTS)}", "--resume=True"]


@pytest.fixture
def command(tiny, trainer, pipeline, captioned):
    """command(kind, adapter) -> that of a fine-tune of a tiny pipeline"""

    def command(kind, adapter="lora"):
        rate = (f"--learning_rate={0.01 if adapter else 0.001}", f"--ema_decay={0 if adapter else 0.99}")
        how = (f"--init_from={pipeline(kind)}", f"--adapter={adapter}", f"--dataset={captioned}", *rate)
        return [trainer, tiny, *HOW, *how]

    return command


def kill_at(step, out, *command):
    """kill -9 to the command at this step: to a fork of this process, which saves it the imports"""
    process = multiprocessing.get_context("fork").Process(target=within, args=command)
    process.start()
    metrics = out / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.01)
    assert process.is_alive()
    process.kill()
    process.join()


@pytest.mark.parametrize("kind, adapter", [("flux", "lora"), ("qwen_image", "lora"), ("sd", "")])
def test_killed_and_drawn_by_diffusers(command, pipeline, kind, adapter, tmp_path):
    how, out = [*command(kind, adapter), "--max_steps=30"], tmp_path / "run"
    within(*how, f"--out_dir={tmp_path / 'unbroken'}")
    kill_at(15, out, *how)
    assert "resumed from" in within(*how)[0]
    assert not lost(tmp_path / "unbroken", out)

    old = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    new = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind) if adapter else out)
    if adapter:
        new.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
        adapters = [load_file(out / f"samples/step_{step:08}.safetensors") for step in (20, 30)]
        assert differences(*adapters)
    else:
        made = json.loads((out / "run.json").read_text())
        assert made["model"] == "Pipeline" and made["trained_parameters"] == made["parameters"]
        assert not differences(new.vae.state_dict(), old.vae.state_dict())
    kwargs = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}
    tiles = torch.tensor(np.stack(read_grid(out / "samples/step_00000030.png", 16, 4))).float()
    was, now = (draw(pipe, 2 * PROMPTS, range(1337, 1341), **kwargs) for pipe in (old, new))
    assert (now - tiles).abs().max() <= 1 and (was - tiles).abs().max() > 3


@pytest.mark.parametrize("kind", ["sd", "flux", "z_image"])
def test_two_processes_train_as_one(command, kind, tmp_path):
    """In parts, too, for a UNet and a transformer."""
    ways = {"one": within, "two": forked} | ({"parts": in_parts} if kind != "z_image" else {})
    for name, way in ways.items():
        how = [*command(kind), "--lr_schedule=constant", f"--out_dir={tmp_path / name}"]
        second = {"more": [f"--out_dir={tmp_path / 'second'}"]} if way == forked else {}
        for steps in (5, 10) if second else (10,):
            way(*how, f"--max_steps={steps}", **second)
    one, *others = ([row["train/loss"] for row in rows(tmp_path / name, "train/loss")] for name in ways)
    assert all(losses == pytest.approx(one, rel=1e-4) for losses in others)
    one, *others = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ways)
    for weights in others:
        assert weights.keys() == one.keys()
        assert all((weights[k] - one[k]).abs().max() < 1e-3 for k in one)
