"""
The mathematics of train_diffusion.py, against closed forms and diffusers: on a Gaussian mixture whose velocity and
noise are known exactly, every sampler gives back weights, means and variances; a tiny net comes to the exact velocity;
targets and weights are those of diffusers' schedulers; the Fréchet distance is that of two Gaussians.
"""

import math

import numpy as np
import pytest
import torch

import train_diffusion
from train_diffusion import DiT, Process, Shape, sample

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
        alpha, sigma = (value.double().view(-1, 1, 1) for value in process.alpha_sigma(t))
        z = x.double()[:, None, :, 0, 0]  # (B, 1, 2)
        variance = alpha**2 * STDS[:, None] ** 2 + sigma**2  # (B, 3, 1)
        away = z - alpha * MEANS  # (B, 3, 2)
        likely = WEIGHTS.log() - variance.log()[..., 0] - away.square().sum(-1) / (2 * variance[..., 0])
        share = likely.softmax(dim=1)[..., None]  # (B, 3, 1)
        x_0 = (share * (MEANS + alpha * STDS[:, None] ** 2 * away / variance)).sum(1)  # (B, 2)
        eps = (share * sigma * away / variance).sum(1)
        alpha, sigma = alpha[:, 0], sigma[:, 0]
        out = {"flow": eps - x_0, "eps": eps, "v": alpha * eps - sigma * x_0}[process.objective]
        return out[:, :, None, None].float()

    return answer


PROCESSES = [Process("flow"), Process("eps"), Process("eps", "cosine"), Process("v"), Process("v", "cosine")]
PROCESSES += [Process("v", "linear", zero_snr=True)]


@pytest.mark.parametrize("process, sampler", [(p, s) for p in PROCESSES for s in p.samplers], ids=str)
def test_every_sampler_gives_back_the_mixture(process, sampler):
    n, rng = 8000, torch.Generator().manual_seed(1)
    steps = {"heun": 100, "ddpm": 1000, "ddim": 500, "euler": 500}.get(sampler, 200)
    y = torch.full((n,), -1)
    points = sample(exact_answer(process), process, (2, 1, 1), y, rng, steps=steps, sampler=sampler)
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

    y = torch.full((50,), -1)
    end = sample(spy, process, (2, 1, 1), y, torch.Generator().manual_seed(0), steps=steps, sampler="euler")
    x = seen[0]
    for i, k in enumerate(scheduler.timesteps):
        assert torch.allclose(x, seen[i], atol=1e-5)
        x = scheduler.step(answer(x, k.repeat(50) / 1000, y), k, x).prev_sample
    assert torch.allclose(x, end, atol=1e-5) and len(seen) == steps


@pytest.mark.parametrize("betas, zero_snr", [("linear", False), ("cosine", False), ("linear", True)])
def test_forward_process_targets_and_weights_are_those_of_diffusers(betas, zero_snr):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    name = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[betas]
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_snr)
    k = torch.arange(1000)
    x_0, eps = torch.randn(2, 1000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t, v = Process("v", betas, zero_snr).diffuse(x_0, eps, k / 1000)
    assert torch.allclose(x_t, theirs.add_noise(x_0, eps, k), atol=1e-6)
    assert torch.allclose(v, theirs.get_velocity(x_0, eps, k), atol=1e-6)
    snr = compute_snr(theirs, k)
    weight = Process("v", betas, zero_snr).weight(k / 1000, 5.0)
    assert torch.allclose(weight, snr.clamp(max=5) / (snr + 1), rtol=1e-4) and weight.isfinite().all()
    if not zero_snr:
        x_t, target = Process("eps", betas).diffuse(x_0, eps, k / 1000)
        assert torch.equal(target, eps) and torch.allclose(x_t, theirs.add_noise(x_0, eps, k), atol=1e-6)
        weight = Process("eps", betas).weight(k / 1000, 5.0)
        assert torch.allclose(weight, torch.minimum(snr, torch.tensor(5.0)) / snr, rtol=1e-4)


def test_a_tiny_net_comes_to_the_exact_velocity_at_all_times(monkeypatch):
    """Trained by the trainer's own noise, gradient and optimizers on points of the mixture."""
    from accelerate import Accelerator

    for name, value in {
        "batch_size": 512,
        "min_snr": 0.0,
        "learning_rate": 0.01,
        "label_dropout": 0.0,
    }.items():
        monkeypatch.setattr(train_diffusion, name, value)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator, process, rng = Accelerator(cpu=True), Process("flow"), torch.Generator().manual_seed(0)
    dit = DiT(Shape(size=1, channels=2, patch_size=1, n_layer=3, n_head=1, n_embd=64, n_classes=0))
    optimizers = train_diffusion.make_optimizers(dit, "no")
    model, *steppers = accelerator.prepare(dit, *optimizers)
    groups = [group for o in optimizers for group in o.param_groups]
    peaks = [group["lr"] for group in groups]
    for step in range(600):
        train_diffusion.set_learning_rates(groups, peaks, step, 600)
        batch = [(draw_mixture(512, rng)[0], torch.full((512,), -1))]
        batch = train_diffusion.add_noise(accelerator, process, batch, step)
        train_diffusion.train_step(accelerator, model, steppers, batch, step)
    answer = exact_answer(process)
    for low in np.arange(0, 1, 0.1):
        t = low + 0.1 * torch.rand(4000, generator=rng)
        x_0, _ = draw_mixture(4000, rng)
        x_t, _ = process.diffuse(x_0, torch.randn(x_0.shape, generator=rng), t)
        exact = answer(x_t, t, None)
        with torch.no_grad():
            error = (dit(x_t, t, torch.full((4000,), -1)) - exact).square().mean()
        assert error < 0.05 * exact.square().mean(), (
            f"times from {low:.1f}: {error / exact.square().mean():.3f}"
        )


def test_guidance_of_1_is_the_conditional_model_and_more_goes_on_in_its_direction():
    process, y, asked = Process("flow"), torch.tensor([0, 1, 1]), []

    def model(x, t, y):
        asked.append(y)
        return x * (y.view(-1, 1, 1, 1) + 2) * 0.1

    def drawn(guidance, model=model):
        rngs = [torch.Generator().manual_seed(i) for i in range(3)]
        return sample(model, process, (1, 2, 2), y, rngs, steps=4, guidance=guidance)

    conditional = drawn(1.0)
    assert all(torch.equal(labels, y) for labels in asked)
    asked.clear()
    by_hand = drawn(3.0)
    assert all(labels.tolist() == [-1, -1, -1, 0, 1, 1] for labels in asked)
    guided = drawn(
        1.0, lambda x, t, y: model(x, t, 0 * y - 1) + 3 * (model(x, t, y) - model(x, t, 0 * y - 1))
    )
    assert torch.allclose(by_hand, guided, atol=1e-6) and not torch.allclose(by_hand, conditional, atol=1e-2)


def test_a_picture_does_not_depend_on_its_company():
    torch.manual_seed(0)
    dit, process = DiT(Shape(8, 3, 2, 2, 2, 32, 5)), Process("eps")
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    how = {"steps": 5, "guidance": 2.0, "sampler": "ddpm"}  # ddpm draws noise on its way, too
    many = train_diffusion.draw_pictures(dit, process, (3, 8, 8), torch.arange(4), range(10, 14), **how)
    one = train_diffusion.draw_pictures(dit, process, (3, 8, 8), torch.tensor([2]), [12], **how)
    assert torch.allclose(many[2], one[0], atol=1e-5) and not torch.allclose(many[1], many[2], atol=1e-2)


# -----------------------------------------------------------------------------
# The model
# -----------------------------------------------------------------------------


def test_the_model_starts_at_zero_and_sees_place_time_and_class():
    torch.manual_seed(0)
    dit = DiT(Shape(size=8, channels=3, patch_size=2, n_layer=2, n_head=2, n_embd=32, n_classes=5))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([1, 4])
    assert (dit(x, t, y) == 0).all()
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    out = dit(x, t, y)
    assert out.shape == x.shape and torch.allclose(out[:1], dit(x[:1], t[:1], y[:1]), atol=1e-5)
    assert not torch.allclose(out, dit(x, t + 0.1, y), atol=1e-3)
    assert not torch.allclose(out, dit(x, t, y - 1), atol=1e-3)
    assert torch.equal(
        dit(x, t, torch.tensor([-1, -1])), dit(x, t, torch.tensor([5, 5]))
    )  # hidden: the last row
    moved = dit(x.roll(2, dims=3), t, y).roll(
        -2, dims=3
    )  # by one patch: without positions, nothing would change
    assert not torch.allclose(out, moved, atol=1e-3)
    turned = dit(x.transpose(2, 3), t, y).transpose(2, 3)  # rows and columns are not the same
    assert not torch.allclose(out, turned, atol=1e-3)
    dit.gradient_checkpointing = True
    assert torch.equal(dit.train()(x, t, y), out)


def test_patches_come_back_to_their_places():
    """With blocks that do nothing and identities around them, each patch comes back divided by its own size."""
    dit = DiT(Shape(size=6, channels=2, patch_size=2, n_layer=1, n_head=2, n_embd=8, n_classes=0))
    torch.nn.init.eye_(dit.patch_in.weight)
    torch.nn.init.zeros_(dit.patch_in.bias)
    torch.nn.init.eye_(dit.patch_out.weight)
    torch.nn.init.zeros_(dit.place)
    x = torch.randn(3, 2, 6, 6)
    root_mean_square = torch.nn.functional.avg_pool2d(x.square().mean(1, keepdim=True), 2).sqrt()
    expected = x / torch.nn.functional.interpolate(root_mean_square, scale_factor=2)
    assert torch.allclose(dit(x, torch.rand(3), torch.full((3,), -1)), expected, atol=1e-4)


def test_rotary_attention_depends_on_distances_in_both_directions():
    dit = DiT(Shape(size=4, channels=1, patch_size=1, n_layer=1, n_head=1, n_embd=16, n_classes=0))
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    turned = [train_diffusion.rotate(v.expand(16, 16), dit.cos, dit.sin) for v in (q, k)]
    scores = (turned[0] @ turned[1].T).view(
        4, 4, 4, 4
    )  # (row, column) of the query, (row, column) of the key
    assert torch.allclose(
        scores[0, 0, 1, 2], scores[2, 1, 3, 3], atol=1e-5
    )  # one row and two columns further
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1], atol=1e-3)
    assert torch.allclose(scores[1, 1, 1, 1], q @ k, atol=1e-5)


# -----------------------------------------------------------------------------
# Fréchet distance
# -----------------------------------------------------------------------------


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
