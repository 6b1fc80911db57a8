"""
The mathematics of train_diffusion.py, against closed forms: on a Gaussian mixture whose velocity is known exactly,
drawing gives back weights, means and variances, and a tiny net comes to the exact velocity; guidance is a line through
two answers. The model depends on all that it is told, and edits of it train.
"""

import inspect
import math
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import train_diffusion as td

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
MEANS = torch.tensor([[-1.5, 0.0], [1.0, 1.5], [1.0, -1.5]], dtype=torch.float64)
STDS = torch.tensor([0.2, 0.4, 0.3], dtype=torch.float64)  # of each component, in both directions
pytestmark = pytest.mark.usefixtures("defaults")


def draw_mixture(n, rng):
    """-> points as "pictures" (n, 2, 1, 1)"""
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=rng)
    points = MEANS[k] + STDS[k, None] * torch.randn(n, 2, generator=rng, dtype=torch.float64)
    return points[:, :, None, None].float()


def exact_velocity(x, t, y):
    """
    The best possible model for the mixture. Given x_t = (1 - t) x_0 + t eps, component k has x_t ~ N(alpha m,
    alpha^2 s^2 + t^2) with alpha = 1 - t, and E[x_0 | x_t, k] = m + alpha s^2 (x_t - alpha m) / that variance.
    """
    t = t.view(-1, 1, 1)
    alpha = 1 - t
    variance = alpha**2 * STDS[:, None] ** 2 + t**2  # (B, 3, 1)
    away = x.double()[:, None, :, 0, 0] - alpha * MEANS  # (B, 3, 2)
    likely = WEIGHTS.log() - variance.log()[..., 0] - away.square().sum(-1) / (2 * variance[..., 0])
    share = likely.softmax(dim=1)[..., None]  # (B, 3, 1)
    x_0 = (share * (MEANS + alpha * STDS[:, None] ** 2 * away / variance)).sum(1)  # (B, 2)
    eps = (share * t * away / variance).sum(1)
    return (eps - x_0)[:, :, None, None].float()


def as_dit(model, shape, none):
    """A function with what sample() asks a DiT for"""
    model.shape, model.none = shape, none
    return model


def make_dit(shape, n_classes, n_layer=2, n_head=2, n_embd=32, module=td):
    vars(module).update(patch_size=min(2, shape[1]), n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    return module.DiT(shape, [str(i) for i in range(n_classes)])


def test_drawing_gives_back_the_mixture():
    n = 4000
    points = td.sample(as_dit(exact_velocity, (2, 1, 1), 0), torch.zeros(n).long(), range(n), 50, 1)
    points = points[:, :, 0, 0].double()
    nearest = (points[:, None] - MEANS).square().sum(-1).argmin(1)
    for k in range(3):
        mine = points[nearest == k]
        share, m = len(mine) / n, len(mine)
        assert abs(share - WEIGHTS[k]) < 4 * math.sqrt(WEIGHTS[k] * (1 - WEIGHTS[k]) / n)
        assert (mine.mean(0) - MEANS[k]).abs().max() < 4 * STDS[k] / math.sqrt(m)
        assert (mine.var(0) / STDS[k] ** 2 - 1).abs().max() < 4 * math.sqrt(2 / m)


def test_a_tiny_net_comes_to_the_exact_velocity_at_all_times():
    """Trained by the trainer's own noise, times and optimizers on points of the mixture."""
    B, steps = 512, 400
    vars(td).update(batch_size=B, learning_rate=0.02, label_dropout=0.0)
    torch.manual_seed(0)
    accelerator, rng = Accelerator(cpu=True), torch.Generator().manual_seed(0)
    dit = make_dit((2, 1, 1), 0, n_layer=1, n_head=1, n_embd=64)
    optimizers = td.make_optimizers(dit, accelerator)
    peaks = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    for step in range(steps):
        for group, peak in peaks:
            group["lr"] = peak * td.lr_at(step, steps)
        batch = [(draw_mixture(B, rng), torch.zeros(B).long())]
        [(x, t, cond, target)] = td.noise_batches(accelerator, dit, batch, step)
        (dit(x, t, cond) - target).square().mean().backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    for low in np.arange(0, 1, 0.1):
        t, x_0 = low + 0.1 * torch.rand(4000, generator=rng), draw_mixture(4000, rng)
        x_t, _ = dit.add_noise(x_0, torch.randn(x_0.shape, generator=rng), t)
        exact = exact_velocity(x_t, t, None)
        with torch.no_grad():
            error = (dit(x_t, t, torch.zeros(4000).long()) - exact).square().mean() / exact.square().mean()
        assert error < 0.1, f"times from {low:.1f}: {error:.3f}"


def test_guidance_of_1_is_the_conditional_model_and_more_goes_on_in_its_direction():
    y, asked = torch.tensor([0, 1, 1]), []

    def model(x, t, y):
        asked.append(y.tolist())
        return x * (y.view(-1, 1, 1, 1) + 2) * 0.1

    def by_hand(x, t, y):  # without the class the factor is 0.7
        return 0.7 * x + 3 * (model(x, t, y) - 0.7 * x)

    def drawn(guidance, model=model):
        return td.sample(as_dit(model, (1, 2, 2), 5), y, range(3), 4, guidance)

    assert not torch.allclose(drawn(1.0), drawn(3.0), atol=1e-2)
    assert asked == 8 * [[0, 1, 1]] + 8 * [[5, 5, 5, 0, 1, 1]]
    assert torch.allclose(drawn(3.0), drawn(1.0, by_hand), atol=1e-6)


def awake(dit):
    """At first the answer is zero, and blocks do nothing; here all weights are random."""
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return dit


def test_the_model_starts_at_zero_and_sees_place_time_and_class():
    torch.manual_seed(0)
    dit, x, t, y = (
        make_dit((3, 8, 8), 5),
        torch.randn(2, 3, 8, 8),
        torch.tensor([0.2, 0.8]),
        torch.tensor([1, 4]),
    )
    assert (dit(x, t, y) == 0).all()
    out = awake(dit)(x, t, y)
    assert out.shape == x.shape and torch.allclose(out[:1], dit(x[:1], t[:1], y[:1]), atol=1e-5)
    others = [dit(x, t + 0.1, y), dit(x, t, y - 1)]
    others.append(dit(x.roll(2, dims=3), t, y).roll(-2, dims=3))  # by a patch: without places, the same
    others.append(dit(x.mT, t, y).mT)  # rows and columns are not the same
    assert not any(torch.allclose(out, other, atol=1e-3) for other in others)
    td.gradient_checkpointing = True
    assert torch.equal(dit.train()(x, t, y), out)


def test_it_runs_on_any_device_without_graph_breaks():
    """On the meta device a tensor left on the CPU raises; a graph break would make torch.compile slow."""
    from torch._subclasses import FakeTensorMode

    args = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5])
    assert torch._dynamo.explain(make_dit((3, 8, 8), 5))(*args).graph_break_count == 0
    with torch.device("meta"), FakeTensorMode():
        x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.zeros(2).long()
        make_dit((3, 8, 8), 5)(x, t, y).sum().backward()


# The commonest edits of the model: old text, new text, ...
BLOCK, TABLE, END = "self.o_proj =", "self.classes =", "self.modulation = nn.Linear(C, 2 * C)"
EDITS = {
    "biases": ["n_embd, n_embd, bias=False", "n_embd, n_embd, bias=True"],
    "gates": ["(n_embd, 4 * n_embd", "(n_embd, 8 * n_embd", "F.relu(self", "F.glu(self"],
    "gain": [BLOCK, f"self.gain = nn.Parameter(torch.ones(n_embd)); {BLOCK}"],
    "convolution": [BLOCK, f"self.mix = nn.Conv1d(n_embd, n_embd, 3, padding=1); {BLOCK}"],
    "table": [TABLE, f"self.quarter = nn.Embedding(4, C); {TABLE}"],
    "shared": [END, f"self.blocks[1].fc1 = self.blocks[0].fc1; {END}"],
}
EDITS["gain"] += ["mlp(norm(x)", "mlp(self.gain * norm(x)"]
EDITS["convolution"] += ["return self.fc2(", "return self.mix(x.mT).mT + self.fc2("]
EDITS["table"] += ["+ self.classes(cond)", "+ self.classes(cond) + self.quarter((3.99 * t).long())"]


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_the_model_train(edit):
    """Each weight is in one group of one optimizer and moves, and the loss falls."""
    code = inspect.getsource(td)
    for old, new in zip(EDITS[edit][::2], EDITS[edit][1::2]):
        assert old in code
        code = code.replace(old, new)
    edited = types.ModuleType("edited")
    edited.__file__ = td.__file__
    exec(compile(code, "edited.py", "exec"), edited.__dict__)
    torch.manual_seed(0)
    dit = make_dit((1, 8, 8), 3, n_head=1, module=edited)
    optimizers = edited.make_optimizers(dit, Accelerator(cpu=True))
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, dit.parameters()))
    before, losses = {name: p.detach().clone() for name, p in dit.named_parameters()}, []
    x, t, cond = torch.randn(16, 1, 8, 8), torch.rand(16), torch.arange(16) % 4
    for _ in range(60):
        loss = (dit(x, t, cond) - x).square().mean()
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not [name for name, p in dit.named_parameters() if torch.equal(p, before[name])]
