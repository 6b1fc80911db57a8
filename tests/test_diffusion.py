"""
The mathematics of train_diffusion.py, against closed forms and diffusers: on a Gaussian mixture whose velocity and
noise are known exactly, every sampler gives back weights, means and variances; a tiny net comes to the exact velocity;
targets and weights are those of diffusers' schedulers; the Fréchet distance is that of two Gaussians.
"""

import inspect
import math
import types

import numpy as np
import pytest
import torch

import train_diffusion
from train_diffusion import DiT, Process, make_scheduler, sample

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
MEANS = torch.tensor([[-1.5, 0.0], [1.0, 1.5], [1.0, -1.5]], dtype=torch.float64)
STDS = torch.tensor([0.2, 0.4, 0.3], dtype=torch.float64)  # of each component, in both directions


def draw_mixture(n, rng):
    """-> points as "pictures" (n, 2, 1, 1)"""
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=rng)
    points = MEANS[k] + STDS[k, None] * torch.randn(n, 2, generator=rng, dtype=torch.float64)
    return points[:, :, None, None].float(), k


def exact_answer(process):
    """
    The best possible model for the mixture, as model(x, t, y). Given x_t = alpha x_0 + sigma eps, component k has
    x_t ~ N(alpha m, alpha^2 s^2 + sigma^2), and E[x_0 | x_t, k] = m + alpha s^2 (x_t - alpha m) / that variance.
    """

    def answer(x, t, y):
        t = t.view(-1, 1, 1)
        alpha_bar = 0 if process.kind == "flow" else process.alpha_bar.double()[t.long()]
        alpha, sigma = (1 - t, t) if process.kind == "flow" else (alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        z = x.double()[:, None, :, 0, 0]  # (B, 1, 2)
        variance = alpha**2 * STDS[:, None] ** 2 + sigma**2  # (B, 3, 1)
        away = z - alpha * MEANS  # (B, 3, 2)
        likely = WEIGHTS.log() - variance.log()[..., 0] - away.square().sum(-1) / (2 * variance[..., 0])
        share = likely.softmax(dim=1)[..., None]  # (B, 3, 1)
        x_0 = (share * (MEANS + alpha * STDS[:, None] ** 2 * away / variance)).sum(1)  # (B, 2)
        eps = (share * sigma * away / variance).sum(1)
        alpha, sigma = alpha[:, 0], sigma[:, 0]
        out = {"flow": eps - x_0, "eps": eps, "v": alpha * eps - sigma * x_0}[process.kind]
        return out[:, :, None, None].float()

    return answer


def make_process(kind, zero_snr, monkeypatch):
    monkeypatch.setattr(train_diffusion, "objective", kind)
    monkeypatch.setattr(train_diffusion, "zero_snr", zero_snr)
    return Process(kind, kind != "flow" and make_scheduler("ddim").alphas_cumprod)


CASES = [(kind, name, False) for kind, names in train_diffusion.SAMPLERS.items() for name in names]
CASES += [("v", name, True) for name in ("dpm++", "unipc", "ddim")]


@pytest.mark.parametrize("kind, sampler, zero_snr", CASES)
def test_every_sampler_gives_back_the_mixture(kind, sampler, zero_snr, monkeypatch):
    process = make_process(kind, zero_snr, monkeypatch)
    n = 8000
    steps = {"heun": 100, "ddim": 500, "euler": 500}.get(sampler, 200)
    points = sample(
        exact_answer(process), process, (2, 1, 1), torch.zeros(n).long(), 0, range(n), steps, 1, sampler
    )
    points = points[:, :, 0, 0].double()
    nearest = (points[:, None] - MEANS).square().sum(-1).argmin(1)
    for k in range(3):
        mine = points[nearest == k]
        share, m = len(mine) / n, len(mine)
        assert abs(share - WEIGHTS[k]) < 4 * math.sqrt(WEIGHTS[k] * (1 - WEIGHTS[k]) / n)
        assert (mine.mean(0) - MEANS[k]).abs().max() < 4 * STDS[k] / math.sqrt(m)
        assert (mine.var(0) / STDS[k] ** 2 - 1).abs().max() < 4 * math.sqrt(2 / m)


def test_our_euler_is_that_of_diffusers_step_by_step():
    from diffusers import FlowMatchEulerDiscreteScheduler

    process, steps = Process("flow"), 20
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])  # set_timesteps(n) is no uniform grid
    answer, seen = exact_answer(process), []

    def spy(x, t, y):
        seen.append(x)
        return answer(x, t, y)

    y = torch.zeros(50).long()
    end = sample(spy, process, (2, 1, 1), y, 0, range(50), steps, 1, "euler")
    x = seen[0]
    for i, k in enumerate(scheduler.timesteps):
        assert torch.allclose(x, seen[i], atol=1e-5)
        x = scheduler.step(answer(x, k.repeat(50) / 1000, y), k, x).prev_sample
    assert torch.allclose(x, end, atol=1e-5) and len(seen) == steps


@pytest.mark.parametrize("zero_snr", [False, True])
def test_forward_process_targets_and_weights_are_those_of_diffusers(zero_snr, monkeypatch):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    monkeypatch.setattr(train_diffusion, "min_snr", 5.0)
    theirs = DDPMScheduler(rescale_betas_zero_snr=zero_snr)
    t, ours = torch.arange(1000), make_process("v", zero_snr, monkeypatch)
    x0, eps = torch.randn(2, 1000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t, target, weight = ours.add_noise(x0, eps, t)
    assert torch.allclose(x_t, theirs.add_noise(x0, eps, t), atol=1e-6)
    assert torch.allclose(target, theirs.get_velocity(x0, eps, t), atol=1e-6)
    snr = compute_snr(theirs, t)
    assert torch.allclose(weight, snr.clamp(max=5) / (snr + 1), rtol=1e-4)
    if not zero_snr:
        x_t, target, weight = make_process("eps", False, monkeypatch).add_noise(x0, eps, t)
        assert torch.equal(target, eps)
        assert torch.allclose(x_t, theirs.add_noise(x0, eps, t), atol=1e-6)
        assert torch.allclose(weight, snr.clamp(max=5) / snr, rtol=1e-4)


def test_a_tiny_net_comes_to_the_exact_velocity_at_all_times(monkeypatch):
    """Trained by the trainer's own noise, times and optimizers on points of the mixture."""
    from accelerate import Accelerator

    for name, value in {"batch_size": 512, "learning_rate": 0.01, "label_dropout": 0.0}.items():
        monkeypatch.setattr(train_diffusion, name, value)
    torch.manual_seed(0)
    accelerator, process, rng = Accelerator(cpu=True), Process("flow"), torch.Generator().manual_seed(0)
    dit = DiT(channels=2, size=1, patch_size=1, n_layer=3, n_head=1, n_embd=64, n_classes=0)
    optimizers = train_diffusion.make_optimizers(dit, accelerator)
    peaks = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    for step in range(600):
        for group, peak in peaks:
            group["lr"] = peak * train_diffusion.lr_at(step, 600)
        batch = [(draw_mixture(512, rng)[0], torch.zeros(512).long())]
        [(x, t, cond, target, _)] = train_diffusion.noise_batches(accelerator, process, batch, 0, step)
        (dit(x, t, cond) - target).square().mean().backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    answer = exact_answer(process)
    for low in np.arange(0, 1, 0.1):
        t = low + 0.1 * torch.rand(4000, generator=rng)
        x_0, _ = draw_mixture(4000, rng)
        x_t, _, _ = process.add_noise(x_0, torch.randn(x_0.shape, generator=rng), t)
        exact = answer(x_t, t, None)
        with torch.no_grad():
            error = (dit(x_t, t, torch.zeros(4000).long()) - exact).square().mean()
        assert error < 0.05 * exact.square().mean(), (
            f"times from {low:.1f}: {error / exact.square().mean():.3f}"
        )


def test_guidance_of_1_is_the_conditional_model_and_more_goes_on_in_its_direction():
    process, y, asked = Process("flow"), torch.tensor([0, 1, 1]), []

    def model(x, t, y):
        asked.append(y)
        return x * (y.view(-1, 1, 1, 1) + 2) * 0.1

    def drawn(guidance, model=model):
        return sample(model, process, (1, 2, 2), y, 5, range(3), 4, guidance, "heun")

    conditional = drawn(1.0)
    assert all(torch.equal(labels, y) for labels in asked)
    asked.clear()
    by_hand = drawn(3.0)
    assert all(labels.tolist() == [5, 5, 5, 0, 1, 1] for labels in asked)
    guided = drawn(
        1.0, lambda x, t, y: model(x, t, 0 * y + 5) + 3 * (model(x, t, y) - model(x, t, 0 * y + 5))
    )
    assert torch.allclose(by_hand, guided, atol=1e-6) and not torch.allclose(by_hand, conditional, atol=1e-2)


def test_a_picture_does_not_depend_on_its_company(monkeypatch):
    data = {"shape": [3, 8, 8], "classes": list("abcde")}
    for name, value in {"objective": "eps", "n_layer": 2, "n_embd": 32}.items():
        monkeypatch.setattr(train_diffusion, name, value)
    dit = train_diffusion.make_dit(data)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    kwargs = {"steps": 5, "sampler": "ddim"}
    many = train_diffusion.draw(dit, ["a", "b", "c", ""], range(10, 14), **kwargs)
    one = train_diffusion.draw(dit, ["c"], [12], **kwargs)
    many, one = (np.stack([np.asarray(picture).astype(int) for picture in p]) for p in (many, one))
    assert abs(many[2] - one[0]).max() <= 1 and abs(many[1] - many[2]).max() > 5


def test_the_model_starts_at_zero_and_sees_place_time_and_class(monkeypatch):
    torch.manual_seed(0)
    dit = DiT(size=8, channels=3, patch_size=2, n_layer=2, n_head=2, n_embd=32, n_classes=5)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([1, 4])
    assert (dit(x, t, y) == 0).all()
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    out = dit(x, t, y)
    assert out.shape == x.shape and torch.allclose(out[:1], dit(x[:1], t[:1], y[:1]), atol=1e-5)
    assert not torch.allclose(out, dit(x, t + 0.1, y), atol=1e-3)
    assert not torch.allclose(out, dit(x, t, y - 1), atol=1e-3)
    moved = dit(x.roll(2, dims=3), t, y).roll(
        -2, dims=3
    )  # by one patch: without positions, nothing would change
    assert not torch.allclose(out, moved, atol=1e-3)
    turned = dit(x.transpose(2, 3), t, y).transpose(2, 3)  # rows and columns are not the same
    assert not torch.allclose(out, turned, atol=1e-3)
    monkeypatch.setattr(train_diffusion, "gradient_checkpointing", True)
    assert torch.equal(dit.train()(x, t, y), out)


def test_patches_come_back_to_their_places():
    """With blocks that do nothing and identities around them, each patch comes back divided by its own size."""
    dit = DiT(size=6, channels=2, patch_size=2, n_layer=1, n_head=2, n_embd=8, n_classes=0)
    torch.nn.init.eye_(dit.patch_in.weight)
    torch.nn.init.zeros_(dit.patch_in.bias)
    torch.nn.init.eye_(dit.patch_out.weight)
    torch.nn.init.zeros_(dit.place)
    x = torch.randn(3, 2, 6, 6)
    root_mean_square = torch.nn.functional.avg_pool2d(x.square().mean(1, keepdim=True), 2).sqrt()
    expected = x / torch.nn.functional.interpolate(root_mean_square, scale_factor=2)
    assert torch.allclose(dit(x, torch.rand(3), torch.zeros(3).long()), expected, atol=1e-4)


def test_it_runs_on_any_device_without_graph_breaks():
    """On the meta device a tensor left on the CPU raises; a graph break would make torch.compile slow."""
    from torch._subclasses import FakeTensorMode

    dit = DiT(size=8, channels=3, patch_size=2, n_layer=1, n_head=2, n_embd=32, n_classes=5)
    args = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5])
    assert torch._dynamo.explain(dit)(*args).graph_break_count == 0
    with torch.device("meta"), FakeTensorMode():
        dit = DiT(size=8, channels=3, patch_size=2, n_layer=1, n_head=2, n_embd=32, n_classes=5)
        dit(torch.randn(2, 3, 8, 8), torch.rand(2), torch.zeros(2).long()).sum().backward()


# The commonest edits: biases, a gain in a block, a new table, two layers that share a weight.
EDITS = {
    "biases": [("n_embd, n_embd, bias=False", "n_embd, n_embd, bias=True")],
    "gain": [
        ("self.n_head =", "self.gain = nn.Parameter(torch.ones(n_embd))\n        self.n_head ="),
        ("self.mlp(norm(x) *", "self.mlp(self.gain * norm(x) *"),
    ],
    "table": [
        ("        self.classes =", "        self.quarters = nn.Embedding(4, C)\n        self.classes ="),
        ("+ self.classes(cond)", "+ self.classes(cond) + self.quarters((3.99 * t).long())"),
    ],
    "shared": [
        (
            "        nn.init.normal_(self.classes",
            "        self.patch_out.weight = nn.Parameter(self.patch_in.weight.T.clone())\n        nn.init.normal_(self.classes",
        )
    ],
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_the_model_train(edit):
    """Each weight is in one group of one optimizer and moves, and the loss falls."""
    from accelerate import Accelerator

    code = inspect.getsource(train_diffusion)
    for old, new in EDITS[edit]:
        assert old in code
        code = code.replace(old, new)
    edited = types.ModuleType("edited")
    edited.__file__ = train_diffusion.__file__
    exec(compile(code, "edited.py", "exec"), edited.__dict__)
    torch.manual_seed(0)
    dit = edited.DiT(channels=1, size=8, patch_size=2, n_layer=2, n_head=1, n_embd=32, n_classes=3)
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
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert not [name for name, p in dit.named_parameters() if torch.equal(p, before[name])]


def test_the_frechet_distance_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)

    def exactly(mean, covariance, n=500):
        """Points with exactly this mean and covariance."""
        z = rng.standard_normal((n, len(mean)))
        z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
        return mean + z @ np.linalg.cholesky(covariance).T

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values) @ vectors.T

    a, b = rng.standard_normal((2, 6, 6))
    c1, c2, m1, m2 = a @ a.T + np.eye(6), b @ b.T + np.eye(6), np.zeros(6), np.arange(6) / 6
    cross = root(root(c1) @ c2 @ root(c1))
    closed = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * cross)
    assert train_diffusion.frechet_distance(exactly(m1, c1), exactly(m2, c2)) == pytest.approx(
        closed, rel=1e-9
    )
    same = exactly(m1, c1)
    assert train_diffusion.frechet_distance(same, same) == pytest.approx(0, abs=1e-6)
