"""
The first thing that a newcomer sees: the default data, objective and optimizer of train_diffusion.py give letters and
digits that a classifier reads as the class asked for. A run of the defaults is read so in 95 of 100 cases, by
`read_run`; a smaller model on a fifth as many pictures, here, in 90.
"""

import json

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import within

import train_diffusion as td


def train_reader():
    """-> a classifier that has learned from the default data and reads what it has not seen of it"""
    splits, _, _ = td.prepare_data(td.encode)
    (x, y), unseen = (td.collate(list(splits[name]), (3, 16, 16)) for name in ("train", "test"))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    net.extend([nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()])
    net.extend([nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 36)])
    optimizer, n = torch.optim.AdamW(net.parameters()), 150
    for i in range(n):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - i / n)
        batch = torch.randint(len(x), (128,))
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(net, *unseen) > 0.97
    return net


def accuracy(net, x, y):
    return (net(x).argmax(1) == y).float().mean().item()


def read_run(out):
    """-> the share of 108 pictures of a run that are read as the class asked for"""
    before, net = td.settings(vars(td)), train_reader()
    model = td.load(out, json.loads((out / "run.json").read_text()))
    drawn = td.draw(model, model.class_names * 3, range(108))
    vars(td).update(before)
    x = torch.from_numpy(np.stack([picture.convert("RGB") for picture in drawn]))
    x = x.permute(0, 3, 1, 2) / 127.5 - 1
    return accuracy(net, x, torch.arange(108) % 36)


def test_what_a_short_run_draws_can_be_read(tmp_path):
    how = "--max_steps=300 --batch_size=32 --n_layer=2 --patch_size=4 --sample_steps=8"
    within("train_diffusion.py", *how.split(), f"--out_dir={tmp_path}")
    assert read_run(tmp_path) >= 0.8
