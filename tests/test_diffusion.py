"""
Validates the mathematics of train_diffusion.py, against closed forms and diffusers' schedulers, for every
prediction and sampler: sampling with the exact model of a Gaussian mixture gives back its weights, means and
variances, and converges to the exact solution for a Gaussian with the order of the method; a tiny net learns
the exact model; guidance is a line through two predictions; the model sees what it is told, on any device.
"""

import functools
import math

import diffusers
import pytest
import torch
from accelerate import Accelerator

import train_diffusion as td

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
MEANS = torch.tensor([[-1.5, 0.0], [1.0, 1.5], [1.0, -1.5]], dtype=torch.float64)
STDS = torch.tensor([0.2, 0.4, 0.3], dtype=torch.float64)  # of each component, in both directions
pytestmark = pytest.mark.usefixtures("defaults")


@pytest.fixture(params=["flow", "v", "eps", "x0"])
def prediction(request):
    return request.param


@pytest.fixture(params=["ddim", "dpm++"])
def sampler(request, defaults):
    td.sampler = request.param
    return request.param


def schedule(prediction, t):
    """Return alpha and sigma."""
    angle = 0.99 * math.pi / 2 * t
    return (1 - t, t) if prediction == "flow" else (torch.cos(angle), torch.sin(angle))


def as_model(function, prediction, shape, no_class=0):
    """A function with what sampling asks a DiT for."""
    alpha_sigma = functools.partial(td.DiT.alpha_sigma, function)
    vars(function).update(prediction=prediction, shape=shape, no_class=no_class, alpha_sigma=alpha_sigma)
    return function


def points(n, rng):
    """Return n samples of the mixture, as images (n, 2, 1, 1)."""
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=rng)
    noise = torch.randn(n, 2, generator=rng, dtype=torch.float64)
    return (MEANS[k] + STDS[k, None] * noise).view(n, 2, 1, 1).float()


def exact(prediction, weights=WEIGHTS, means=MEANS, stds=STDS):
    """The best possible model of a mixture, from E[x_0 | x_t].

    Of component k, x_t ~ N(alpha m, variance) with variance = alpha^2 s^2 + sigma^2, and
    E[x_0 | x_t, k] = m + alpha s^2 (x_t - alpha m) / variance.
    """

    def model(x_t, t, cond):
        alpha, sigma = schedule(prediction, t.double()[:, None])
        x = x_t.double().flatten(1)
        variance = (alpha * stds) ** 2 + sigma**2  # (B, k)
        away = x[:, None] - alpha[:, :, None] * means  # (B, k, 2)
        log_share = weights.log() - variance.log() - away.square().sum(dim=2) / (2 * variance)
        share = log_share.softmax(dim=1)
        gain = alpha * stds**2 / variance
        x_0 = (share[:, :, None] * (means + gain[:, :, None] * away)).sum(dim=1)
        eps = (x - alpha * x_0) / sigma
        table = {"flow": eps - x_0, "v": alpha * eps - sigma * x_0, "eps": eps, "x0": x_0}
        return table[prediction].view(x_t.shape)

    return as_model(model, prediction, (2, 1, 1))


def sample(model, n, steps):
    return td.sample(model, torch.zeros(n).long(), range(n), steps, 1)


def test_sampling_gives_back_the_mixture(prediction, sampler):
    """Within four standard errors."""
    n = 4000
    x = sample(exact(prediction), n, steps=100).flatten(1)
    nearest = (x[:, None] - MEANS).square().sum(dim=2).argmin(dim=1)
    for k, (weight, mean, std) in enumerate(zip(WEIGHTS, MEANS, STDS)):
        mine = x[nearest == k]
        assert abs(len(mine) / n - weight) < 4 * math.sqrt(weight * (1 - weight) / n)
        assert (mine.mean(dim=0) - mean).abs().max() < 4 * std / math.sqrt(len(mine))
        assert (mine.var(dim=0) / std**2 - 1).abs().max() < 4 * math.sqrt(2 / len(mine))


def test_a_step_half_as_long_has_the_error_of_the_order(prediction, sampler):
    """For N(m, s^2), the exact solution keeps z = (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2).

    The second order gives less than 4: near time 0, steps differ in log(alpha / sigma): it is h^2 log(1 / h).
    """
    m, s = 0.7, torch.tensor([2.0])
    alpha, sigma = schedule(prediction, torch.ones(1).double())
    z = (td.noise_of(range(200), (2, 1, 1)) - alpha * m) / torch.sqrt((alpha * s) ** 2 + sigma**2)
    model = exact(prediction, torch.ones(1), torch.full((1, 2), m), s)
    errors = [(sample(model, 200, steps) - (m + s * z)).norm() for steps in (160, 320)]
    lowest, highest = (1.9, 2.1) if sampler == "ddim" else (3.2, 4.2)
    assert lowest < errors[0] / errors[1] < highest


def test_no_noise_is_left_at_the_end(prediction, sampler):
    """All images are one point: any number of steps ends there."""
    model = exact(prediction, torch.ones(1), MEANS[:1], torch.zeros(1))
    for steps in (1, 2, 3, 10):
        assert (sample(model, 50, steps).flatten(1) - MEANS[0]).abs().max() < 1e-5


def test_noise_and_targets_are_those_of_diffusers(prediction):
    t = torch.arange(50, dtype=torch.float64) / 50
    x_0, eps = torch.randn(2, 50, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t, target = td.add_noise(exact(prediction), x_0, eps, t)
    if prediction == "flow":
        theirs = diffusers.FlowMatchEulerDiscreteScheduler()
        theirs.set_timesteps(sigmas=t.tolist())
        assert torch.allclose(x_t, theirs.scale_noise(x_0, theirs.timesteps, eps))
        assert torch.allclose(x_t - t.view(-1, 1, 1, 1) * target, x_0)  # Euler's step to time 0
        return
    theirs = diffusers.DDPMScheduler(num_train_timesteps=50)
    theirs.alphas_cumprod = schedule(prediction, t)[0] ** 2
    expected = {"v": theirs.get_velocity(x_0, eps, torch.arange(50)), "eps": eps, "x0": x_0}
    assert torch.allclose(x_t, theirs.add_noise(x_0, eps, torch.arange(50)), atol=1e-6)
    assert torch.allclose(target, expected[prediction], atol=1e-6)


def diffusers_scheduler(prediction, sampler, alpha, sigma):
    """Return a scheduler that goes through these alphas and sigmas, from noise to time 0."""
    steps = len(alpha) - 1
    kind = {"flow": "flow_prediction", "v": "v_prediction", "eps": "epsilon", "x0": "sample"}[prediction]
    if sampler == "dpm++":
        options = {"use_flow_sigmas": prediction == "flow", "final_sigmas_type": "zero"}
        theirs = diffusers.DPMSolverMultistepScheduler(solver_order=2, prediction_type=kind, **options)
        theirs.set_timesteps(steps)
        theirs.sigmas = sigma if prediction == "flow" else sigma / alpha
    elif prediction == "flow":
        theirs = diffusers.FlowMatchEulerDiscreteScheduler()
        theirs.set_timesteps(sigmas=sigma[:-1].tolist())
    else:
        theirs = diffusers.DDIMScheduler(steps + 1, clip_sample=False, prediction_type=kind)
        theirs.set_timesteps(steps)
        theirs.timesteps = torch.arange(steps, 0, -1)
        theirs.alphas_cumprod = alpha.flip(0) ** 2
    return theirs


def test_samplers_are_those_of_diffusers(prediction, sampler):
    model = exact(prediction)
    for steps in (2, 3, 12):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        theirs = diffusers_scheduler(prediction, sampler, *schedule(prediction, times))
        x = td.noise_of(range(50), model.shape).double()
        for t, timestep in zip(times, theirs.timesteps):
            x = theirs.step(model(x, t.expand(50), None), timestep, x).prev_sample
        assert torch.allclose(sample(model, 50, steps), x, atol=2e-4)
    td.sampler = "dpm++" if sampler == "ddim" else "ddim"
    assert not torch.allclose(sample(model, 50, steps), x, atol=1e-2)


def test_guidance_goes_on_from_no_class_through_the_class(prediction):
    """The prediction is x_t times 0.1 for class 0, times 0.2 for class 1 and times 0.4 for no class."""
    factors = torch.tensor([0.1, 0.2, 0.4])
    asked = []

    def drawn(scale, classes=(0, 1, 1), scale_of_model=1.0):
        def model(x_t, t, cond):
            asked.append(sorted(cond.tolist()))
            return (0.4 + scale_of_model * (factors[cond] - 0.4)).view(-1, 1, 1, 1) * x_t

        return td.sample(as_model(model, prediction, (1, 2, 2), 2), torch.tensor(classes), range(3), 4, scale)

    assert not torch.allclose(drawn(1.0), drawn(3.0), rtol=0.1)
    assert asked == 4 * [[0, 1, 1]] + 4 * [[0, 1, 1, 2, 2, 2]]
    assert torch.allclose(drawn(3.0), drawn(1.0, scale_of_model=3.0), rtol=1e-4)
    assert torch.allclose(drawn(0.0), drawn(1.0, classes=(2, 2, 2)), rtol=1e-4)


def make_dit(shape, n_classes, n_layer=2, n_head=2, n_embd=32):
    vars(td).update(patch_size=min(2, shape[1]), n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    return td.DiT(shape, [str(i) for i in range(n_classes)])


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_a_tiny_net_learns_the_exact_model_at_all_times(kind):
    """By the trainer's own noise, times and optimizers, from points of the mixture."""
    B, n_steps = 256, 300
    vars(td).update(batch_size=B, label_dropout=0.0, prediction=kind)
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    dit = make_dit((2, 1, 1), 0, n_layer=1, n_head=1, n_embd=64)
    optimizers = td.make_optimizers(dit, Accelerator(cpu=True))
    peaks = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    for step in range(n_steps):
        for group, peak in peaks:
            group["lr"] = peak * td.lr_at(step, n_steps)
        batch = (points(B, rng), torch.zeros(B, 1).long())
        [(x_t, t, cond, target)] = td.make_noisy_batches(dit, [batch], step, torch.device("cpu"))
        (dit(x_t, t, cond) - target).square().mean().backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    for low in torch.arange(0, 1, 0.1):
        t = low + 0.1 * torch.rand(4000, generator=rng)
        x_t, target = td.add_noise(dit, points(4000, rng), torch.randn(4000, 2, 1, 1, generator=rng), t)
        error = dit(x_t, t, torch.zeros(4000).long()).detach() - exact(kind)(x_t, t, None)
        assert error.square().mean() < 0.08 * target.square().mean(), f"times from {low:.1f}"


def test_the_model_starts_at_zero_and_sees_place_time_and_class():
    torch.manual_seed(0)
    dit = make_dit((3, 8, 8), 5)
    x, t, cond = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([1, 4])
    assert (dit(x, t, cond) == 0).all()
    for p in dit.parameters():  # at first, blocks do nothing
        torch.nn.init.normal_(p, std=0.1)
    out = dit(x, t, cond)
    assert torch.allclose(out[:1], dit(x[:1], t[:1], cond[:1]), atol=1e-5)
    others = {"time": dit(x, t + 0.1, cond), "class": dit(x, t, cond - 1)}
    others["place"] = dit(x.roll(2, dims=3), t, cond).roll(-2, dims=3)  # by a patch
    others["rows and columns"] = dit(x.mT, t, cond).mT
    for name, other in others.items():
        assert (out - other).abs().max() > 1e-2, name
    td.gradient_checkpointing = True
    assert torch.equal(dit.train()(x, t, cond), out)


def test_it_runs_on_any_device_without_graph_breaks():
    """On the meta device a tensor left on the CPU raises; a graph break would make torch.compile slow."""
    from torch._subclasses import FakeTensorMode

    inputs = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5])
    for td.gradient_checkpointing in (False, True):
        torch._dynamo.reset()
        assert torch._dynamo.explain(make_dit((3, 8, 8), 5))(*inputs).graph_count == 1
    with torch.device("meta"), FakeTensorMode():
        dit = make_dit((3, 8, 8), 5)
        x_t, target = td.add_noise(dit, *torch.randn(2, 2, 3, 8, 8), torch.rand(2))
        (dit(x_t, torch.rand(2), torch.zeros(2).long()) - target).sum().backward()
