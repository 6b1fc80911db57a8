"""
Validates the pipelines of train_diffusion.py, each on a tiny random one: what the model answers against a call of
its transformer or UNet by hand, drawing and adapters against diffusers' own pipeline, and that two pictures are learned.
"""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pipelines import FAMILIES
from safetensors.torch import load_file

import train_diffusion as trainer

CAPTIONS = ["a red square", "a blue circle on white paper"]
NO_CROP = {"resolution": None, "aspect_ratio": None}


@pytest.fixture
def load(pipeline, tmp_path, monkeypatch):
    """load(kind, **settings) -> a Pipeline that is ready to be trained"""

    def load(kind, precision="no", prepared=True, **settings):
        defaults = {"init_from": str(pipeline(kind)), "out_dir": str(tmp_path), "image_size": size(kind)}
        for name, value in (defaults | {"lora_rank": 4, "sample_steps": 2} | settings).items():
            monkeypatch.setattr(trainer, name, value)
        model = trainer.load_pipeline(precision, "cpu")
        if prepared:
            model.prepare(CAPTIONS, None)
        return model

    return load


def size(kind):
    return 32 if kind == "sana" else 16


def batch(model, kind, seed=0):
    """-> clean latents of two pictures, noise, times, and the conditions of both"""
    rng, S = torch.Generator().manual_seed(seed), size(kind)
    x = model.encode(torch.rand(2, 3, S, S, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    noise, t = torch.randn(x.shape, generator=rng), torch.rand(2, generator=rng)
    cond = torch.tensor([0, 1])
    return x, noise, t if (model.process.kind == "flow") else (1000 * t).long(), cond


def loss(model, process, x, noise, t, cond):
    t_ = t.view(-1, *[1] * (x.ndim - 1))
    if model.process.kind == "flow":
        return F.mse_loss(model((1 - t_) * x + t_ * noise, t, cond), noise - x)
    a, b = process.alpha_bar[t_].sqrt(), (1 - process.alpha_bar[t_]).sqrt()
    return F.mse_loss(
        model(a * x + b * noise, t, cond), noise if process.kind == "eps" else a * noise - b * x
    )


def by_hand(kind, pipe, x, t, caption, sizes):
    """What the model of a pipeline of diffusers answers to one x (1, ...) at a time (1,)"""
    encode, model = pipe.encode_prompt, getattr(pipe, "transformer", None)
    if kind in ("sd", "sd2"):
        return pipe.unet(x, t, encode(caption, "cpu", 1, False)[0])[0]
    if kind == "sdxl":
        embeds, _, pooled, _ = encode(caption, do_classifier_free_guidance=False)
        time_ids = torch.tensor([[16, 16, 0, 0, 16, 16]])
        return pipe.unet(x, t, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids})[0]
    if kind == "sd3":
        embeds, _, pooled, _ = encode(caption, None, None, do_classifier_free_guidance=False)
        return model(x, embeds, pooled, 1000 * t)[0]
    if kind == "flux":
        embeds, pooled, txt_ids = encode(caption, None)
        img_ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
        return model(x, embeds, pooled, t, img_ids, txt_ids, torch.ones(1))[0]
    if kind == "flux2":
        embeds, txt_ids = encode(caption)
        img_ids = pipe._prepare_latent_ids(x)
        return model(x.flatten(2).mT, embeds, t, img_ids, txt_ids)[0].mT.reshape(x.shape)
    if kind == "z_image":
        embeds = encode(caption, do_classifier_free_guidance=False)[0]
        return -model([x[0][:, None]], 1 - t, embeds)[0][0][None, :, 0]
    if kind == "qwen_image":
        embeds, mask = encode(caption)
        return model(x, embeds, mask, t, img_shapes=[[(1, 4, 4)]])[0]
    if kind == "sana":
        instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = encode(caption, False, complex_human_instruction=instruction)
        return model(x, embeds, 1000 * t, encoder_attention_mask=mask)[0]
    embeds, mask, _, _ = encode(caption, False)
    answer = model(x, embeds, t, added_cond_kwargs=NO_CROP, encoder_attention_mask=mask)[0]
    return answer.chunk(2, dim=1)[0]  # PixArt's also holds a variance


def train(model, kind, steps, lr):
    """-> the loss at fixed noise and times before and after"""
    process, fixed = model.process, [batch(model, kind, seed=1000 + i) for i in range(8)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)

    @torch.no_grad()
    def evaluate():
        return sum(loss(model, process, *part).item() for part in fixed) / len(fixed)

    before = after = evaluate()
    for step in range(steps):
        loss(model, process, *batch(model, kind, seed=step)).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # as DDP needs it
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19 and (after := evaluate()) < before / 2:
            break
    return before, after


def trained(model):
    return {
        name: p.detach() for name, p in model.named_parameters() if p.requires_grad or not trainer.adapter
    }


def pixels(pictures):
    return torch.tensor(np.stack(pictures)).float()


@pytest.mark.parametrize("kind", FAMILIES)
def test_answer(load, pipeline, kind):
    """Two captions at two times in one batch: as the model itself, called by hand for each."""
    model, pipe = load(kind), diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    x, _, t, cond = batch(model, kind)
    with torch.no_grad():
        answer = model(x, t, cond)
        for i, caption in enumerate(CAPTIONS):
            expected = by_hand(kind, pipe, x[i : i + 1], t[i : i + 1], caption, None)
            assert (answer[i] - expected[0]).abs().max() <= 1e-5
    drawn = trainer.draw(model, CAPTIONS, [3, 4])  # and its pictures are the pipeline's own
    kwargs = {"num_inference_steps": 2, "height": size(kind), "width": size(kind)}
    kwargs |= {"use_resolution_binning": False} if kind in ("sana", "pixart") else {}
    kwargs |= {"negative_prompt": " "} if kind == "qwen_image" else {}
    for caption, seed, picture in zip(CAPTIONS, (3, 4), drawn):
        expected = pipe(prompt=caption, generator=torch.Generator().manual_seed(seed), **kwargs).images
        assert (pixels([picture]) - pixels(expected)).abs().max() <= 1


ADAPTERS = [("sd3", "to_v,to_out.0,proj_out,net.2"), ("z_image", "to_v,to_out.0,linear,w2")]


@pytest.mark.parametrize(("kind", "targets"), [*((kind, "") for kind in FAMILIES), *ADAPTERS])
def test_learn(load, kind, targets):
    """Two pictures, each with its caption: the whole model, or an adapter of these layers."""
    model = load(kind, adapter="lora" if targets else "", lora_rank=16, lora_targets=targets)
    before, after = train(model, kind, steps=300, lr=1e-2 if targets else 4e-3)
    assert after < before / 2


@pytest.mark.parametrize("kind", FAMILIES[:-1])
def test_adapter(load, pipeline, kind, tmp_path):
    """An adapter learns; diffusers, and the loader of sample.py, draw with it what the run draws."""
    model = load(kind, adapter="lora", lora_alpha=12.0)
    before, after = train(model, kind, steps=20, lr=1e-2)
    assert after < before
    trainer.save_pipeline(model, trained(model))
    expected = pixels(trainer.draw(model, CAPTIONS, [3, 4]))
    untrained = pixels(trainer.draw(model, CAPTIONS, [3, 4], lora_scale=0.0))
    assert (expected - untrained).abs().max() > 2
    loaded = trainer.load_pipeline("no", "cpu", tmp_path)
    assert (pixels(trainer.draw(loaded, CAPTIONS, [3, 4])) - expected).abs().max() <= 1
    if kind in ("sd", "sdxl"):  # the other format, with alpha, by diffusers' converter
        trainer.adapter = ""  # undone by the fixture's monkeypatch
        pipe = trainer.load_pipeline("no", "cpu", pipeline(kind))
        pipe.pipe.load_lora_weights(load_file(tmp_path / "kohya_lora.safetensors"))
        assert (pixels(trainer.draw(pipe, CAPTIONS, [3, 4])) - expected).abs().max() <= 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_latents(load, kind, monkeypatch):
    """What a pipeline makes of our latents is what its autoencoder makes of its own."""
    model, S = load(kind), size(kind)
    pixels = torch.rand(1, 3, S, S, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = model.encode(pixels)

    def step(output, *_, **__):
        return (z.flatten(2).mT if z.ndim > output.ndim else z,) * 2  # Flux.2 packs them itself

    model.still.step = step
    model.still.times = torch.tensor([0.5 if (model.process.kind == "flow") else 500])
    kwargs = {"prompt": CAPTIONS[:1], "latents": z, "output_type": "pt"}
    with torch.no_grad():
        drawn = model.run(model.still, **model.unguided, **kwargs)
        expected = model.pipe.vae(pixels[:, :, None] if kind == "qwen_image" else pixels).sample
    assert (drawn - (expected.view(drawn.shape) / 2 + 0.5).clamp(0, 1)).abs().max() <= 1e-3


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_loss(load, pipeline, kind):
    """The loss of a step is the one that diffusers' parts give."""
    model, pipe = load(kind), diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    x, noise, t, cond = batch(model, kind)
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        noisy = scheduler.add_noise(x, noise, t)
        parts = zip(noisy.split(1), t.split(1), CAPTIONS, CAPTIONS)
        expected = F.mse_loss(torch.cat([by_hand(kind, pipe, *part) for part in parts]), noise)
        assert abs(loss(model, model.process, x, noise, t, cond) - expected) <= 1e-5


def test_whole(load, tmp_path):
    """A whole fine-tune is a pipeline of diffusers; a second start reads the captions, without text encoders."""
    model = load("z_image", precision="bf16")
    assert model.dtype == torch.float32 and model.pipe.text_encoder is None
    train(model, "z_image", steps=5, lr=1e-2)
    trainer.save_pipeline(model, trained(model))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    kwargs = {
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "generator": torch.Generator().manual_seed(3),
    }
    expected = pixels(pipe(prompt=CAPTIONS[0], **kwargs).images)
    assert (pixels(trainer.draw(model, CAPTIONS[:1], [3])) - expected).abs().max() <= 1
    again = load("z_image", prepared=False)
    again.pipe.text_encoder = None
    again.prepare(CAPTIONS, None)
    untouched = diffusers.DiffusionPipeline.from_pretrained(tmp_path).transformer.state_dict()
    assert all(torch.equal(untouched[name], weight) for name, weight in model.denoiser.state_dict().items())


def test_compile(load):
    model = load("sana", adapter="lora")
    x, _, t, cond = batch(model, "sana")
    expected = model(x, t, cond)
    model.compile(backend="aot_eager")
    assert torch.equal(model(x, t, cond), expected)


def test_refused(load, pipeline, tmp_path, capsys):
    """One line that says why."""

    def refused(words, **settings):
        with pytest.raises(SystemExit, match="2"):
            load("sd2", **settings)
        assert words in capsys.readouterr().err.splitlines()[-1]

    refused("have to be divisible by 8", image_size=12)
    refused("lora_targets='nonsense' cannot be used", adapter="lora", lora_targets="nonsense")
    refused("init_from='nowhere' cannot be used", init_from="nowhere")
    refused("a PixArtSigmaPipeline takes no LoRA", adapter="lora", init_from=str(pipeline("pixart")))
    index = json.loads((pipeline("sd2") / "model_index.json").read_text())
    for words, change in (
        ("a DDPMPipeline must have captions", {"_class_name": "DDPMPipeline"}),
        ("one denoiser", {"unet_2": index["unet"]}),
        ("no EDM scheduler", {"scheduler": ["diffusers", "EDMEulerScheduler"]}),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        refused(words, init_from=str(tmp_path))
