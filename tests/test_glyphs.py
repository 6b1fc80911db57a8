"""
Validates the first thing that a newcomer sees: with the default data, optimizer and schedule,
train_diffusion.py draws letters and digits that a classifier reads as the class asked for: all 108 images of a
run of the defaults, and here, with a smaller model and fewer steps, at least 80 in a hundred.
"""

import json

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import within

import train_diffusion as td


def train_reader():
    """Return a classifier that has learned from the default data and reads the rest of it well."""
    splits, data, _ = td.prepare_data(Accelerator(cpu=True))
    x, y = td.collate(list(splits["train"]), data["shape"])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    net.extend([nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()])
    net.extend([nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 36)])
    optimizer = torch.optim.AdamW(net.parameters())
    n_steps = 150
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / n_steps)
        batch = torch.randint(len(x), (128,))
        F.cross_entropy(net(x[batch]), y[batch, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    x, y = td.collate(list(splits["test"]), data["shape"])
    assert accuracy(net, x, y[:, 0]) > 0.97
    return net


def accuracy(net, x, y):
    return (net(x).argmax(dim=1) == y).float().mean().item()


def read_run(out):
    """Return the share of 108 images drawn by a run that are read as the class asked for."""
    before = td.settings(vars(td))
    net = train_reader()
    model = td.load(out, json.loads((out / "run.json").read_text()))
    drawn = td.draw(model, model.class_names * 3, range(108))
    vars(td).update(before)
    x = torch.from_numpy(np.stack(drawn))[:, None] / 127.5 - 1
    return accuracy(net, x, torch.arange(108) % 36)


def test_what_a_short_run_draws_can_be_read(tmp_path):
    how = "--max_steps=300 --batch_size=32 --n_layer=2 --patch_size=4 --sample_steps=8"
    within("train_diffusion.py", *how.split(), f"--out_dir={tmp_path}")
    assert read_run(tmp_path) >= 0.8
