"""
Validates the pipelines of train_diffusion.py, each on a tiny random one: what the model answers against a call of
its transformer or UNet by hand, drawing and adapters against diffusers' own pipeline, latents against its
autoencoder, and that two pictures are learned.
"""

import inspect

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pipelines import FAMILIES, draw

import train_diffusion as td

CAPTIONS = ["a red square", "a blue circle on white paper"]
LAYERS = {"sd3": "to_v,to_out.0,proj_out,net.2", "z_image": "to_v,to_out.0,linear,w2"}  # for an adapter


def size(kind):
    return 32 if kind == "sana" else 16


@pytest.fixture
def load(pipeline, defaults, tmp_path):
    """load(kind, **settings) -> a Pipeline that is ready to be trained"""

    def load(kind, **settings):
        here = {"init_from": str(pipeline(kind)), "out_dir": str(tmp_path), "image_size": size(kind)}
        vars(td).update(defaults | here | {"lora_rank": 4, "sample_steps": 2} | settings)
        model = td.load_pipeline("no", "cpu")
        model.prepare(CAPTIONS, None)
        model.latents = model.encode(pictures(size(kind)))
        return model

    return load


def pictures(S):
    return torch.rand(2, 3, S, S, generator=torch.Generator().manual_seed(1)) * 2 - 1


def batch(model, seed=0):
    """-> clean latents of two pictures, noise, times, and the numbers of both captions"""
    x, rng = model.latents, torch.Generator().manual_seed(seed)
    noise, t = torch.randn(x.shape, generator=rng), torch.rand(2, generator=rng)
    return x, noise, t if model.is_flow else (1000 * t).long() / 1000 + 5e-4, torch.arange(2)


def by_hand(kind, pipe, x, t, caption):
    """What the model of a pipeline of diffusers answers to one x (1, ...) at a time (1,)"""
    encode, model = pipe.encode_prompt, getattr(pipe, "transformer", None)
    if kind in ("sd", "sd2"):
        return pipe.unet(x, t, encode(caption, "cpu", 1, False)[0])[0]
    if kind == "sdxl":
        embeds, _, pooled, _ = encode(caption, do_classifier_free_guidance=False)
        more = {"text_embeds": pooled, "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]])}
        return pipe.unet(x, t, embeds, added_cond_kwargs=more)[0]
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
    no_crop = {"resolution": None, "aspect_ratio": None}
    answer = model(x, embeds, t, added_cond_kwargs=no_crop, encoder_attention_mask=mask)[0]
    return answer.chunk(2, dim=1)[0]  # PixArt's also holds a variance


def train(model, steps, lr):
    """-> the loss at fixed noise and times, after and before; it ends when it is halved"""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)

    def loss(seed):
        x, noise, t, cond = batch(model, seed)
        x_t, target = model.add_noise(x, noise, t)
        return F.mse_loss(model(x_t, t, cond), target)

    @torch.no_grad()
    def evaluate():
        return sum(loss(seed).item() for seed in range(1000, 1008)) / 8

    before = after = evaluate()
    for step in range(steps):
        loss(step).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # as DDP needs it
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19 and (after := evaluate()) < before / 2:
            break
    return after, before


def drawn(model, **options):
    return torch.tensor(np.stack(td.draw(model, CAPTIONS, [3, 4], **options))).float()


def drawn_by_diffusers(pipe, kind):
    kwargs = {"num_inference_steps": 2, "height": size(kind), "width": size(kind)}
    kwargs |= {"use_resolution_binning": False} if kind in ("sana", "pixart") else {}
    kwargs |= {"negative_prompt": " "} if kind == "qwen_image" else {}
    return draw(pipe, CAPTIONS, [3, 4], **kwargs)


@pytest.mark.parametrize("kind", FAMILIES)
def test_answer(load, pipeline, kind):
    """Two captions at two times in one batch: as the model itself, called by hand for each; pictures likewise."""
    model, pipe = load(kind), diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
    x, noise, t, cond = batch(model)
    with torch.no_grad():
        answer = model(x, t, cond)
        times = t if model.is_flow else (1000 * t).long()
        for *one, expected in zip(x.split(1), times.split(1), CAPTIONS, answer):
            assert (by_hand(kind, pipe, *one)[0] - expected).abs().max() <= 1e-5
    if not model.is_flow:
        scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        x_t, target = model.add_noise(x, noise, t)
        assert torch.allclose(x_t, scheduler.add_noise(x, noise, times))
        velocity = scheduler.get_velocity(x, noise, times)
        assert torch.allclose(target, velocity if kind == "sd2" else noise, atol=1e-6)
    assert (drawn(model) - drawn_by_diffusers(pipe, kind)).abs().max() <= 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_latents(load, kind):
    """What a pipeline makes of our latents is what its autoencoder makes of its own."""
    model, x = load(kind), pictures(size(kind))[:1]
    z = model.latents[:1]

    def step(output, *_, **__):
        return (z.flatten(2).mT if z.ndim > output.ndim else z,) * 2  # Flux.2 packs them itself

    model.still.step, model.still.times = step, torch.tensor([0.5 if model.is_flow else 500])
    kwargs = {"prompt": CAPTIONS[:1], "latents": z, "output_type": "pt"}
    with torch.no_grad():
        seen = model.run(model.still, **model.unguided, **kwargs)
        expected = model.pipe.vae(x[:, :, None] if kind == "qwen_image" else x).sample
    assert (seen - (expected.view(seen.shape) / 2 + 0.5).clamp(0, 1)).abs().max() <= 1e-3


@pytest.mark.parametrize("kind", sorted({*FAMILIES} - LAYERS.keys()))
def test_learn(load, kind):
    """Two pictures, each with its caption, by all weights; two families do so by their adapters."""
    model = load(kind)
    after, before = train(model, steps=300, lr=4e-3)
    assert after < before / 2


@pytest.mark.parametrize("kind", FAMILIES[:-1])
def test_adapter(load, pipeline, kind, tmp_path):
    """An adapter learns, of two families until the loss is halved; diffusers draws with it what the run draws."""
    rank = 16 if kind in LAYERS else 4
    lora = {"lora_rank": rank, "lora_alpha": 3.0 * rank, "lora_targets": LAYERS.get(kind, "")}
    model = load(kind, adapter="lora", **lora)
    after, before = train(model, steps=300 if kind in LAYERS else 20, lr=1e-2)
    assert after < before / (2 if kind in LAYERS else 1)
    td.save_pipeline(model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    expected = drawn(model)
    assert (drawn(model, lora_scale=0.0) - expected).abs().max() > 2
    assert torch.equal(drawn(model), expected)  # the strength of one picture is not that of the next
    assert (drawn(td.load_pipeline("no", "cpu", tmp_path)) - expected).abs().max() <= 1  # as in sample.py
    names = ["pytorch_lora_weights.safetensors"] + ["kohya_lora.safetensors"] * hasattr(model.pipe, "unet")
    for name in names:
        pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline(kind))
        pipe.load_lora_weights(tmp_path, weight_name=name)
        assert (drawn_by_diffusers(pipe, kind) - expected).abs().max() <= 1, name


def test_compile(load):
    model = load("sana", adapter="lora")
    x, _, t, cond = batch(model)
    expected = model(x, t, cond)
    model.compile(backend="aot_eager")
    assert torch.equal(model(x, t, cond), expected)
