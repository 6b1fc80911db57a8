"""
Validates the class Pipeline of train_diffusion.py on tiny random pipelines. The independent sides are a call of the
transformer or UNet by hand, and diffusers' own pipeline, scheduler and autoencoder.

It answers as the model called by hand; draws and decodes as diffusers does; is told of a hidden caption what guidance
is; trains at the times that the pipeline visits; learns; and diffusers draws the same with the saved adapter.
"""

import inspect
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pipelines import FAMILIES

import train_diffusion as td

CAPTIONS = ["a red square", "a blue circle on white paper"]
CPU = torch.device("cpu")
# Random blocks of these two change little, so an adapter learns by the layers around them, too.
MORE_LAYERS = {"sd3": "to_v,to_out.0,proj_out,net.2", "z_image": "to_v,to_out.0,linear,w2"}


def size_of(kind):
    return 32 if kind == "sana" else 16


@pytest.fixture
def load(pipeline, defaults, tmp_path):
    """load(kind, folder, **settings) returns a Pipeline that is ready to be trained."""

    def load(kind, folder=None, **settings):
        here = {"init_from": str(folder or pipeline(kind)), "out_dir": str(tmp_path), "mixed_precision": "no"}
        here |= {"image_size": size_of(kind), "lora_rank": 4, "sample_steps": 2}
        vars(td).update(defaults | here | settings)
        model = td.load_pipeline(CPU)
        model.prepare(CAPTIONS, None)
        model.latents = model.encode(make_images(size_of(kind)))
        return model

    return load


@pytest.fixture
def changed(pipeline, tmp_path):
    """changed(kind, file, **changes) returns a copy of a pipeline with changes in a .json file."""

    def changed(kind, file, **changes):
        folder = tmp_path / "changed"
        shutil.copytree(pipeline(kind), folder)
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | changes))
        return folder

    return changed


def open_by_diffusers(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_images(size):
    rng = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, size, size, generator=rng) * 2 - 1


def conditions(model, *numbers):
    """Return what forward() is told of captions of these numbers: for SDXL also the original size."""
    sizes = [[30, 20], [16, 40]] if hasattr(model.pipe, "_get_add_time_ids") else [[], []]
    return [[number, *size] for number, size in zip(numbers, sizes, strict=True)]


def make_batch(model, seed=0):
    """Return latents of two images, noise, times, and the conditions of both captions."""
    rng = torch.Generator().manual_seed(seed)
    eps = torch.randn(model.latents.shape, generator=rng)
    t = torch.rand(2, generator=rng)
    if model.prediction != "flow":
        t = ((1000 * t).long() + 0.5) / 1000
    return model.latents, eps, t, conditions(model, 0, 1)


def by_hand(kind, pipe, x, t, caption, time_ids=None):
    """Return the answer of the model of a pipeline of diffusers to one x (1, ...) at a time (1,)."""
    encode = pipe.encode_prompt
    model = getattr(pipe, "transformer", None)
    if kind in ("sd", "sd2"):
        return pipe.unet(x, t, encode(caption, "cpu", 1, False)[0])[0]
    if kind == "sdxl":
        embeds, _, pooled, _ = encode(caption, do_classifier_free_guidance=False)
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
    embeds, mask, _, _ = encode(caption, do_classifier_free_guidance=False)
    if kind == "aura_flow":
        return model(x, encoder_hidden_states=embeds, timestep=t)[0]
    no_crop = {"resolution": None, "aspect_ratio": None}
    answer = model(x, embeds, t, added_cond_kwargs=no_crop, encoder_attention_mask=mask)[0]
    return answer.chunk(2, dim=1)[0]  # PixArt's also holds a variance


def drawn(model, **options):
    return torch.tensor(np.stack(td.draw(model, CAPTIONS, [3, 4], **options))).float()


def call(pipe, kind, **options):
    """Return the result of a pipeline of diffusers for an image of our size."""
    options |= {"height": size_of(kind), "width": size_of(kind)}
    if kind in ("sana", "pixart"):
        options["use_resolution_binning"] = False
    if kind == "qwen_image":
        options["negative_prompt"] = " "
    return pipe(**options)


def drawn_by_diffusers(pipe, kind):
    images = []
    for seed, prompt in enumerate(CAPTIONS, start=3):
        rng = torch.Generator().manual_seed(seed)
        images += call(pipe, kind, prompt=prompt, generator=rng, num_inference_steps=2).images
    return torch.tensor(np.stack(images)).float()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_answer_is_that_of_the_model_called_by_hand(load, pipeline, kind):
    """Two captions at two times, together where the family can; and images as diffusers draws them."""
    model = load(kind)
    pipe = open_by_diffusers(pipeline(kind))
    # Captions of Qwen-Image have other lengths. AuraFlow takes one time a call.
    assert model.takes_batches == (kind not in ("qwen_image", "aura_flow"))
    x, eps, t, cond = make_batch(model)
    times = t if model.prediction == "flow" else (1000 * t).long()
    # original size, crop, size: 20 pixels become 16, so 30 become 24, of which 4 are cut at the top
    time_ids = torch.tensor([[30, 20, 4, 0, 16, 16], [16, 40, 0, 12, 16, 16]])
    with torch.no_grad():
        answer = model(x, t, cond)
        for i in range(2):
            one = slice(i, i + 1)
            expected = by_hand(kind, pipe, x[one], times[one], CAPTIONS[i], time_ids[one])
            assert (answer[one] - expected).abs().max() <= 1e-5
    assert (drawn(model) - drawn_by_diffusers(pipe, kind)).abs().max() <= 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_pipeline_decodes_our_latents_as_its_autoencoder_does(load, pipeline, kind):
    """The pipeline is diffusers' own, with a scheduler that hands our latents on in place of its result."""
    model = load(kind)
    pipe = open_by_diffusers(pipeline(kind))
    x = make_images(size_of(kind))[:1]
    z = model.latents[:1]
    scheduler = td.OneStepScheduler(pipe.scheduler.config)
    scheduler.times = torch.tensor(500)

    def step(output, *args, **kwargs):
        result = z.flatten(2).mT if z.ndim > output.ndim else z  # Flux.2 packs them itself
        return result, result

    scheduler.step = step
    pipe.__dict__["scheduler"] = scheduler
    options = {"latents": z, "num_inference_steps": 1, "output_type": "pt", "guidance_scale": 0.0}
    seen = call(pipe, kind, prompt=CAPTIONS[0], **options).images
    with torch.no_grad():
        expected = pipe.vae(x[:, :, None] if kind == "qwen_image" else x).sample
    assert (seen - (expected.view(seen.shape) / 2 + 0.5).clamp(0, 1)).abs().max() <= 1e-3


def record(model, name, position=None):
    """Return a list that gets the input of this name at each call of a model."""
    inputs = []

    def hook(module, args, kwargs):
        inputs.append(kwargs[name] if name in kwargs else args[position])

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return inputs


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "sana", "pixart", "aura_flow", "qwen_image", "flux2"])
def test_a_hidden_caption_is_what_guidance_calls_unconditional(load, pipeline, kind):
    """Of what a guided pipeline tells its model, one part is of the prompt, and the other of no caption."""
    model = load(kind)
    ours = record(model.denoiser, "encoder_hidden_states", 2)
    x, _, t, cond = make_batch(model)
    with torch.no_grad():
        for number in (0, model.none):
            model(x[:1], t[:1], [[number, *cond[0][1:]]])
    pipe = open_by_diffusers(pipeline(kind))
    theirs = record(getattr(pipe, model.name), "encoder_hidden_states", 2)
    call(pipe, kind, prompt=CAPTIONS[0], num_inference_steps=1, guidance_scale=3.0)
    parts = [part for tensor in theirs for part in tensor.split(1)]
    assert len(parts) == 2 * len(ours) // 2
    for hidden in (False, True):
        assert sum(part.shape == ours[hidden].shape and torch.allclose(part, ours[hidden]) for part in parts) == 1


def test_a_hidden_caption_of_sdxl_is_zero_if_its_pipeline_says_so(load, changed):
    for folder, is_zero in (None, True), (changed("sdxl", "model_index.json", force_zeros_for_empty_prompt=False), False):
        model = load("sdxl", folder)
        embeds, _, pooled, _ = model.outputs[model.none][0]
        assert (embeds.abs().max() == 0) == (pooled.abs().max() == 0) == is_zero


SCHEDULES = {  # the pipeline and changes in the config of its scheduler
    "static shift": ("sd3", {}),
    "static shift, 500 training steps": ("sd3", {"num_train_timesteps": 500}),
    "flow_shift of DPMSolver": ("sana", {}),
    "shift by size, exponential": ("flux", {}),
    "shift by size, linear": ("qwen_image", {"time_shift_type": "linear"}),
    "shift by size and steps": ("flux2", {}),
    "epsilon": ("sd", {}),
    "epsilon, 500 training steps": ("sdxl", {"num_train_timesteps": 500}),
    "v": ("sd2", {}),
    "sample": ("sdxl", {"prediction_type": "sample"}),
}
NO_SHIFT = {"shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False}


def visited(pipe, kind, **changes):
    """Return the sigmas that a pipeline visits in 8 steps, and the times that it tells its model."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    times = record(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, "timestep", 1)
    call(pipe, kind, prompt=CAPTIONS[0], num_inference_steps=8, guidance_scale=0.0, output_type="latent")
    return getattr(pipe.scheduler, "sigmas", None), torch.stack([time.flatten()[0] for time in times])


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_is_at_the_times_that_the_pipeline_visits(load, changed, name):
    kind, changes = SCHEDULES[name]
    folder = changed(kind, "scheduler/scheduler_config.json", **changes)
    model = load(kind, folder, sample_steps=8)
    sigmas, times = visited(open_by_diffusers(folder), kind)
    drawn = model.sample_times(20000, torch.Generator().manual_seed(0))
    n = model.n_times
    if model.prediction == "flow":
        assert n == changes.get("num_train_timesteps", 1000)
        even, _ = visited(open_by_diffusers(folder), kind, **NO_SHIFT)
        t = sigmas[:8]
        assert (model.shift(even) - sigmas)[:8].abs().max() < 0.01
        assert (even - sigmas).abs().max() > 0.05
        # a logit-normal time has the quantiles of a normal number under the sigmoid
        normal = torch.tensor([-1.2816, 0.0, 1.2816]).sigmoid()
        quantiles = drawn.quantile(torch.tensor([0.1, 0.5, 0.9]))
        known = torch.cat((torch.ones(1), sigmas)).flip(0)
