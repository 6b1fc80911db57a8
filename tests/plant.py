"""
python tests/plant.py PLACE:VALUE:RANK:STEPS TRAINER ARGUMENTS: a trainer in which something goes wrong. In the process of
that rank, at those steps, a NaN or an Inf stands in the data, the loss or a gradient. At the end it says whether all
processes have the same weights.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

place, value, rank, steps = sys.argv[1].split(":")
steps = set(map(int, steps.split(","))) if os.environ.get("RANK", "0") == rank else set()
sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
backward, clip, end = Accelerator.backward, Accelerator.clip_grad_norm_, Accelerator.end_training
every, weights, step = torch.utils.data.DataLoader.__iter__, [], -1


def bad_backward(self, loss, **options):
    global step  # one backward pass is one step: there is no accumulation
    step += 1
    backward(self, loss * float(value) if place == "loss" and step in steps else loss, **options)


def bad_clip(self, parameters, *arguments, **options):
    weights[:] = parameters
    if place == "gradient" and step in steps:  # after the processes have added up theirs
        next(weight for weight in weights if weight.grad is not None).grad.view(-1)[0] = float(value)
    return clip(self, weights, *arguments, **options)


def bad_batches(self):
    for i, batch in enumerate(every(self)):
        if place == "data" and i in steps:
            batch[0][(0,) * batch[0].ndim] = float(value)
        yield batch


def tell_and_end(self):
    total = sum(weight.detach().double().sum() for weight in weights)
    same = len(set(self.gather(total[None]).tolist())) == 1
    self.print(
        "all processes have the same weights" if same else "the weights of the processes differ", flush=True
    )
    end(self)


Accelerator.backward, Accelerator.clip_grad_norm_, Accelerator.end_training = (
    bad_backward,
    bad_clip,
    tell_and_end,
)
torch.utils.data.DataLoader.__iter__ = bad_batches
runpy.run_path(sys.argv[0], run_name="__main__")
