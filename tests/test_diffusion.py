"""
The mathematics of train_diffusion.py, against closed forms and diffusers' schedulers, for every prediction and sampler:
sampling with the exact model of a Gaussian mixture gives back its weights, means and variances, and converges with the
order of the method to the exact solution for a Gaussian; a tiny net learns the exact model; guidance is a line through
two predictions. The model sees all that it is told, on any device, and edits of it train.
"""

import math

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import check_out, last_state, read_grid, rows, within

import train_diffusion as td

pytestmark = pytest.mark.usefixtures("defaults")


@pytest.fixture(params=["flow", "v", "eps", "x0"])
def prediction(request):
    return request.param


@pytest.fixture(params=["ddim", "dpm++"])
def sampler(request, defaults):
    td.sampler = request.param
    return request.param


def schedule(prediction, t):
    """-> alpha and sigma"""
    angle = 0.99 * math.pi / 2 * t
    return (1 - t, t) if prediction == "flow" else (torch.cos(angle), torch.sin(angle))


class Mixture:
    """A mixture of Gaussians in the plane, as images (2, 1, 1), and the best possible model of it."""

    shape = (2, 1, 1)

    def __init__(
        self,
        prediction,
        weights=(0.2, 0.3, 0.5),
        means=((-1.5, 0), (1, 1.5), (1, -1.5)),
        stds=(0.2, 0.4, 0.3),
    ):
        self.prediction = prediction
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)  # of each component, in both directions

    def alpha_sigma(self, t):
        return td.alpha_sigma(self.prediction, t)

    def points(self, n, rng):
        k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        noise = torch.randn(n, 2, generator=rng, dtype=torch.float64)
        return (self.means[k] + self.stds[k, None] * noise).view(n, 2, 1, 1)

    def expected_x_0(self, x_t, alpha, sigma):
        """Return E[x_0 | x_t] (B, 2) for x_t (B, 2) at alpha and sigma (B, 1).

        Of component k, x_t ~ N(alpha m, alpha^2 s^2 + sigma^2), and E[x_0 | x_t, k] = m + alpha s^2 (x_t - alpha m) /
        that variance.
        """
        variance = (alpha * self.stds) ** 2 + sigma**2  # (B, k)
        away = x_t[:, None] - alpha[:, :, None] * self.means  # (B, k, 2)
        log_share = self.weights.log() - variance.log() - away.square().sum(dim=2) / (2 * variance)
        share = log_share.softmax(dim=1)
        gain = alpha * self.stds**2 / variance
        return (share[:, :, None] * (self.means + gain[:, :, None] * away)).sum(dim=1)

    def __call__(self, x_t, t, cond):
        alpha, sigma = schedule(self.prediction, t.double()[:, None])
        x = x_t.double().flatten(1)
        x_0 = self.expected_x_0(x, alpha, sigma)
        eps = (x - alpha * x_0) / sigma
        table = {"flow": eps - x_0, "v": alpha * eps - sigma * x_0, "eps": eps, "x0": x_0}
        return table[self.prediction].view(x_t.shape)


def sample(model, n, steps):
    return td.sample(model, torch.zeros(n).long(), range(n), steps, 1)


def test_sampling_gives_back_the_mixture(prediction, sampler):
    """Within four standard errors."""
    model = Mixture(prediction)
    n = 4000
    points = sample(model, n, steps=100).flatten(1)
    nearest = (points[:, None] - model.means).square().sum(dim=2).argmin(dim=1)
    for k, (weight, mean, std) in enumerate(zip(model.weights, model.means, model.stds)):
        mine = points[nearest == k]
        assert abs(len(mine) / n - weight) < 4 * math.sqrt(weight * (1 - weight) / n)
        assert (mine.mean(dim=0) - mean).abs().max() < 4 * std / math.sqrt(len(mine))
        assert (mine.var(dim=0) / std**2 - 1).abs().max() < 4 * math.sqrt(2 / len(mine))


def test_a_step_half_as_long_has_the_error_of_the_order(prediction, sampler):
    """For N(m, s^2) the exact solution keeps z = (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2).

    The second order has a little less than 4: near time 0, equal steps of time are unequal ones of log(alpha / sigma),
    which makes it h^2 log(1 / h).
    """
    mean, std = 0.7, 2.0
    model = Mixture(prediction, [1.0], [[mean, mean]], [std])
    alpha, sigma = schedule(prediction, torch.tensor(1.0, dtype=torch.float64))
    z = (td.noise_of(range(200), model.shape) - alpha * mean) / torch.sqrt((alpha * std) ** 2 + sigma**2)
    errors = [(sample(model, 200, steps) - (mean + std * z)).norm() for steps in (160, 320)]
    lowest, highest = (1.9, 2.1) if sampler == "ddim" else (3.2, 4.2)
    assert lowest < errors[0] / errors[1] < highest


def test_no_noise_is_left_at_the_end(prediction, sampler):
    """All images are one point: any number of steps ends there."""
    model = Mixture(prediction, [1.0], [[0.3, -0.6]], [0.0])
    for steps in (1, 2, 3, 10):
        assert (sample(model, 50, steps).flatten(1) - model.means).abs().max() < 1e-5


def test_noise_and_targets_are_those_of_diffusers(prediction):
    t = torch.arange(50, dtype=torch.float64) / 50
    x_0, eps = torch.randn(2, 50, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t, target = td.add_noise(Mixture(prediction), x_0, eps, t)
    if prediction == "flow":
        theirs = diffusers.FlowMatchEulerDiscreteScheduler()
        theirs.set_timesteps(sigmas=t.tolist())
        assert torch.allclose(x_t, theirs.scale_noise(x_0, theirs.timesteps, eps))
        assert torch.allclose(x_t - t.view(-1, 1, 1, 1) * target, x_0)  # Euler's step to time 0
        return
    theirs = diffusers.DDPMScheduler(num_train_timesteps=50)
    alpha, _ = schedule(prediction, t)
    theirs.alphas_cumprod = alpha**2
    expected = {"v": theirs.get_velocity(x_0, eps, torch.arange(50)), "eps": eps, "x0": x_0}
    assert torch.allclose(x_t, theirs.add_noise(x_0, eps, torch.arange(50)), atol=1e-6)
    assert torch.allclose(target, expected[prediction], atol=1e-6)


def diffusers_scheduler(prediction, sampler, alpha, sigma):
    """-> one that goes through these alphas and sigmas, from noise to time 0"""
    steps = len(alpha) - 1
    kind = {"flow": "flow_prediction", "v": "v_prediction", "eps": "epsilon", "x0": "sample"}[prediction]
    if sampler == "dpm++":
        options = {"use_flow_sigmas": prediction == "flow", "final_sigmas_type": "zero"}
        scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=2, prediction_type=kind, **options)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = sigma if prediction == "flow" else sigma / alpha
    elif prediction == "flow":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=sigma[:-1].tolist())
    else:
        options = {"num_train_timesteps": steps + 1, "clip_sample": False}
        scheduler = diffusers.DDIMScheduler(prediction_type=kind, **options)
        scheduler.set_timesteps(steps)
        scheduler.timesteps = torch.arange(steps, 0, -1)
        scheduler.alphas_cumprod = alpha.flip(0) ** 2
    return scheduler


def test_samplers_are_those_of_diffusers(prediction, sampler):
    model = Mixture(prediction)
    for steps in (2, 3, 12):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        scheduler = diffusers_scheduler(prediction, sampler, *schedule(prediction, times))
        x = td.noise_of(range(50), model.shape).double()
        for t, timestep in zip(times, scheduler.timesteps):
            x = scheduler.step(model(x, t.expand(50), None), timestep, x).prev_sample
        assert torch.allclose(sample(model, 50, steps), x, atol=2e-4)
    td.sampler = "dpm++" if sampler == "ddim" else "ddim"
    assert not torch.allclose(sample(model, 50, steps), x, atol=1e-2)


class Line:
    """A model that predicts x_t times 0.1 for class 0, 0.2 for class 1 and 0.4 for no class."""

    shape = (1, 2, 2)
    none = 2
    prediction = "flow"
    factors = torch.tensor([0.1, 0.2, 0.4])

    def __init__(self, scale=1.0):
        self.scale = scale  # of a guidance of its own
        self.asked = []

    def alpha_sigma(self, t):
        return 1 - t, t

    def __call__(self, x, t, cond):
        self.asked.append(sorted(cond.tolist()))
        factor = 0.4 + self.scale * (self.factors[cond] - 0.4)
        return factor.view(-1, 1, 1, 1) * x


def test_guidance_goes_on_from_no_class_through_the_class():
    def drawn(model, scale, classes=(0, 1, 1)):
        return td.sample(model, torch.tensor(classes), range(3), 4, scale)

    alone = Line()
    guided = Line()
    assert not torch.allclose(drawn(alone, 1.0), drawn(guided, 3.0), atol=1e-2)
    assert alone.asked == 4 * [[0, 1, 1]] and guided.asked == 4 * [[0, 1, 1, 2, 2, 2]]
    assert torch.allclose(drawn(Line(), 3.0), drawn(Line(scale=3.0), 1.0), atol=1e-6)
    assert torch.allclose(drawn(Line(), 0.0), drawn(Line(), 1.0, (2, 2, 2)), atol=1e-6)


def make_dit(shape, n_classes, n_layer=2, n_head=2, n_embd=32):
    vars(td).update(patch_size=min(2, shape[1]), n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    return td.DiT(shape, [str(i) for i in range(n_classes)])


def test_how_strong_guidance_is(monkeypatch):
    scales = []
    monkeypatch.setattr(td, "sample", lambda *args: scales.append(args[-1]) or torch.zeros(1, 1, 8, 8))
    # label_dropout and guidance of the run, number of classes, what is asked for
    for td.label_dropout, td.guidance, n_classes, scale in (
        (0.1, -1.0, 3, -1.0),  # the default: 2
        (0.1, 4.0, 3, -1.0),
        (0.1, 4.0, 3, 0.0),
        (0.1, 4.0, 0, 3.0),  # no classes: 1
        (0.0, 4.0, 3, 3.0),  # it never learned to do without them: 1
    ):
        td.draw(make_dit((1, 8, 8), n_classes), [""], [0], scale=scale)
    assert scales == [2.0, 4.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_a_tiny_net_learns_the_exact_model_at_all_times(kind):
    """By the trainer's own noise, times and optimizers, from points of the mixture."""
    B, n_steps = 256, 300
    vars(td).update(batch_size=B, label_dropout=0.0, prediction=kind)
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    exact = Mixture(kind)
    dit = make_dit(exact.shape, 0, n_layer=1, n_head=1, n_embd=64)
    optimizers = td.make_optimizers(dit, Accelerator(cpu=True))
    peaks = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    for step in range(n_steps):
        for group, peak in peaks:
            group["lr"] = peak * td.lr_at(step, n_steps)
        batch = (exact.points(B, rng).float(), torch.zeros(B, 1).long())
        [(x_t, t, cond, target)] = td.make_noisy_batches(dit, [batch], step, torch.device("cpu"))
        (dit(x_t, t, cond) - target).square().mean().backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    for low in np.arange(0, 1, 0.1):
        t = low + 0.1 * torch.rand(4000, generator=rng)
        x_0 = exact.points(4000, rng).float()
        x_t, target = td.add_noise(dit, x_0, torch.randn(x_0.shape, generator=rng), t)
        with torch.no_grad():
            error = dit(x_t, t, torch.zeros(4000).long()) - exact(x_t, t, None)
        print(f"{low:.1f} {error.square().mean():.4f} {target.square().mean():.3f}")
        assert error.square().mean() < 0.08 * target.square().mean(), f"times from {low:.1f}"


def test_the_model_starts_at_zero_and_sees_place_time_and_class():
    torch.manual_seed(0)
    dit = make_dit((3, 8, 8), 5)
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([0.2, 0.8])
    cond = torch.tensor([1, 4])
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
        x = torch.randn(2, 3, 8, 8)
        x_t, target = td.add_noise(dit, x, x, torch.rand(2))
        (dit(x_t, torch.rand(2), torch.zeros(2).long()) - target).sum().backward()


MLP = "        self.mlp = MLP()\n"
TABLE = "        self.classes = nn.Embedding(len(class_names) + 1, n_embd)\n"
BLOCKS = "        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))\n"
EDITS = {  # the commonest: old text, new text, ...
    "biases": ["n_embd, n_embd, bias=False", "n_embd, n_embd, bias=True"],
    "gates": ["(n_embd, 4 * n_embd", "(n_embd, 8 * n_embd", "F.relu(self", "F.glu(self"],
    "gain": [MLP, MLP + "        self.gain = nn.Parameter(torch.ones(n_embd))\n"],
    "convolution": [MLP, MLP + "        self.mix = nn.Conv1d(n_embd, n_embd, 3, padding=1)\n"],
    "table": [TABLE, TABLE + "        self.quarter = nn.Embedding(4, n_embd)\n"],
    "shared": [BLOCKS, BLOCKS + "        self.blocks[1].mlp = self.blocks[0].mlp\n"],
}
EDITS["gain"] += ["mlp(norm(x)", "mlp(self.gain * norm(x)"]
EDITS["convolution"] += ["gate1 * self.self_attn(", "gate1 * self.mix(x.mT).mT + gate1 * self.self_attn("]
EDITS["table"] += ["+ self.classes(cond)", "+ self.classes(cond) + self.quarter((3.99 * t).long())"]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_trains_resumes_and_draws(tmp_path, tiny, edit):
    """The loss falls, each weight moves, and sample.py of the edited files draws the last samples again."""
    edits = zip(EDITS[edit][::2], EDITS[edit][1::2])
    trainer = check_out(tmp_path / "checkout", *edits, trainer="train_diffusion.py")
    out = tmp_path / "run"
    how = (tiny, "--lr_schedule=constant", "--val_fraction=0", "--log_interval=1")
    within(trainer, *how, "--max_steps=10")
    before = last_state(out)["model"]
    within(trainer, *how, "--max_steps=60", "--resume=True")
    after = last_state(out)["model"]
    assert not [name for name in after if torch.equal(before[name], after[name])]
    losses = [row["train/loss"] for row in rows(out, "train/loss")]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    grid = tmp_path / "grid.png"
    how = ("--class_label=green", f"--seed={1337 + 18}")  # the nineteenth of the samples
    within(trainer.with_name("sample.py"), f"--out_dir={out}", f"--output={grid}", *how)
    assert np.array_equal(read_grid(grid, 8, 1)[0], read_grid(out / "samples/step_00000060.png", 8, 36)[18])
