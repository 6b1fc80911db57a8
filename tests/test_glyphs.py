"""
The first thing that a newcomer sees: the default data, model and optimizer of train_diffusion.py give letters and
digits that a classifier reads as the class asked for. The classifier has only seen freshly drawn ones. Tokens of 4 x 4
pixels instead of 2 x 2 make it a test of a minute; `read_run` measures any run just so.
"""

import json

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import run
from PIL import Image

import train_diffusion as td
from train_diffusion import CHARACTERS, draw_glyph


def draw_fresh(n, seed):
    rng, y = np.random.default_rng(seed), torch.arange(n) % len(CHARACTERS)
    return torch.stack([to_input(draw_glyph(CHARACTERS[i], 16, rng)) for i in y]), y


def to_input(picture):
    return (
        torch.from_numpy(np.array(Image.fromarray(np.array(picture)).convert("L")))[None].float() / 127.5 - 1
    )


def train_reader():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    net.extend([nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()])
    net.extend([nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, len(CHARACTERS))])
    (x, y), n = draw_fresh(7200, seed=1), 500
    optimizer = torch.optim.AdamW(net.parameters())
    for i in range(n):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - i / n)
        batch = torch.randint(len(x), (128,))
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


@torch.no_grad()
def accuracy(net, x, y):
    return (net(x).argmax(1) == y).float().mean().item()


def read_run(out):
    """-> the share of 216 pictures of a run that are read as the class asked for"""
    net = train_reader()
    assert accuracy(net, *draw_fresh(360, seed=2)) > 0.99  # it can read
    before = td.settings(vars(td))
    model = td.load(out, json.loads((out / "run.json").read_text()))
    drawn = td.draw(model, [CHARACTERS[i % len(CHARACTERS)] for i in range(216)], range(216))
    vars(td).update(before)
    return accuracy(
        net, torch.stack([to_input(picture) for picture in drawn]), torch.arange(216) % len(CHARACTERS)
    )


def test_what_the_default_run_draws_can_be_read(tmp_path):
    steps = ("--max_steps=500", "--eval_interval=500", "--save_interval=500")
    run(
        "train_diffusion.py",
        f"--out_dir={tmp_path}",
        "--patch_size=4",
        "--sampler=euler",
        *steps,
        seconds=900,
    )
    assert read_run(tmp_path) >= 0.95
