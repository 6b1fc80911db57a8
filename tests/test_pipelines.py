"""
Validates the class Pipeline of train_diffusion.py on tiny random pipelines. The independent sides are a call
of the transformer or UNet by hand, and diffusers' own pipeline, scheduler and autoencoder. It answers as the
model called by hand; draws and decodes as diffusers does; is told of a hidden caption what guidance is;
trains at the times that the pipeline visits; learns; and diffusers draws the same with the saved adapter.
"""

import contextlib
import functools
import inspect
import json
import shutil
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pipelines import FAMILIES, draw

import train_diffusion as td

CAPTIONS = ["a red square", "a blue circle on white paper"]
CPU = torch.device("cpu")
# The random blocks of these two have little effect, so an adapter is tried on the layers around them, too.
MORE_LAYERS = {"sd3": "to_v,to_out.0,proj_out,net.2", "z_image": "to_v,to_out.0,linear,w2"}


def size_of(kind):
    return 32 if kind == "sana" else 16


@pytest.fixture
def load(pipeline, defaults, tmp_path):
    """load(kind, folder, captions, **settings) returns a Pipeline that is ready to be trained."""

    def load(kind, folder=None, captions=CAPTIONS, **settings):
        here = {"init_from": str(folder or pipeline(kind)), "out_dir": str(tmp_path), "mixed_precision": "no"}
        here |= {"image_size": size_of(kind), "lora_rank": 4, "sample_steps": 2}
        vars(td).update(defaults | here | settings)
        model = td.load_pipeline(CPU)
        model.prepare(captions, None)
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


def make_batch(model, seed=0):
    """Return latents of two images, noise, times, and the conditions of both captions."""
    rng = torch.Generator().manual_seed(seed)
    eps = torch.randn(model.latents.shape, generator=rng)
    t = torch.rand(2, generator=rng)
    if model.prediction != "flow":
        t = ((1000 * t).long() + 0.5) / 1000
    if hasattr(model.pipe, "_get_add_time_ids"):
        return model.latents, eps, t, [[0, 30, 20], [1, 16, 40]]  # SDXL is told the original sizes
    return model.latents, eps, t, [[0], [1]]


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
    return draw(functools.partial(call, pipe, kind), CAPTIONS, [3, 4], num_inference_steps=2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_answer_is_that_of_the_model_called_by_hand(load, pipeline, kind):
    """Two captions at two times, together where the family can; and images as diffusers draws them."""
    model = load(kind)
    pipe = open_by_diffusers(pipeline(kind))
    # Captions of Qwen-Image have other lengths. AuraFlow takes one time a call.
    assert model.takes_batches == (kind not in ("qwen_image", "aura_flow"))
    x, _, t, cond = make_batch(model)
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
        for number in (0, len(CAPTIONS)):  # the number behind the last caption stands for none
            model(x[:1], t[:1], [[number, *cond[0][1:]]])
    pipe = open_by_diffusers(pipeline(kind))
    theirs = record(getattr(pipe, model.name), "encoder_hidden_states", 2)
    call(pipe, kind, prompt=CAPTIONS[0], num_inference_steps=1, guidance_scale=3.0)
    parts = [part for tensor in theirs for part in tensor.split(1)]
    assert len(parts) == 2
    for told in ours:
        assert sum(part.shape == told.shape and torch.allclose(part, told) for part in parts) == 1


def test_a_hidden_caption_of_sdxl_is_zero_if_its_pipeline_says_so(load, changed):
    other = changed("sdxl", "model_index.json", force_zeros_for_empty_prompt=False)
    for folder, is_zero in (None, True), (other, False):
        model = load("sdxl", folder)
        embeds, _, pooled, _ = model.outputs[-1][0]
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
    times = torch.stack([time.flatten()[0] for time in times]).unique_consecutive()  # guidance calls it twice
    return getattr(pipe.scheduler, "sigmas", None), times


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_is_at_the_times_that_the_pipeline_visits(load, changed, name):
    kind, changes = SCHEDULES[name]
    folder = changed(kind, "scheduler/scheduler_config.json", **changes)
    model = load(kind, folder, sample_steps=8)
    pipe = open_by_diffusers(folder)
    sigmas, times = visited(pipe, kind)
    n = changes.get("num_train_timesteps", 1000)
    x_0, eps, _, cond = make_batch(model)
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    if model.prediction == "flow":
        t = sigmas[2:4]
        even, _ = visited(open_by_diffusers(folder), kind, **NO_SHIFT)
        assert (model.shift(even) - sigmas)[:8].abs().max() < 0.02 < (even - sigmas).abs().max()
        logits = torch.distributions.Normal(0.0, 1.0).icdf(quantiles)
        quantiles_of_times = model.shift(logits.sigmoid())  # of a logit-normal number, shifted
        scale = t.view(-1, *[1] * (x_0.ndim - 1))
        noisy = x_0.lerp(eps, scale)
        expected = eps - x_0
    else:
        numbers = times[2:4].long()
        t = (numbers + 0.5) / n
        quantiles_of_times = quantiles
        scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        noisy = scheduler.add_noise(x_0, eps, numbers)
        velocity = scheduler.get_velocity(x_0, eps, numbers)
        targets = {"epsilon": eps, "v_prediction": velocity, "sample": x_0}
        expected = targets[scheduler.config.prediction_type]
    x_t, target = td.add_noise(model, x_0, eps, t)
    assert torch.allclose(x_t, noisy, atol=1e-6)
    assert torch.allclose(target, expected, atol=1e-6)
    told = record(model.denoiser, "timestep", 1)
    with torch.no_grad():
        model(x_t[:1], t[:1], cond[:1])
    assert told[0].item() == pytest.approx(times[2].item(), rel=2e-3)  # Sana rounds it down
    drawn_times = model.sample_times(20000, torch.Generator().manual_seed(0))
    assert (drawn_times.quantile(quantiles) - quantiles_of_times).abs().max() < 0.015


def train(model, steps, lr):
    """Return the loss at fixed noise and times after and before. It ends when the loss is below 0.6 of that."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)

    def loss(seed):
        x_0, eps, t, cond = make_batch(model, seed)
        x_t, target = td.add_noise(model, x_0, eps, t)
        return F.mse_loss(model(x_t, t, cond), target)

    @torch.no_grad()
    def evaluate():
        return sum(loss(seed).item() for seed in range(1000, 1008)) / 8

    before = evaluate()
    after = before
    for step in range(1, steps + 1):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            after = evaluate()
            if after < 0.6 * before:
                break
    return after, before


@pytest.mark.parametrize("kind", FAMILIES)
def test_two_images_are_learned_by_all_weights(load, kind):
    after, before = train(load(kind), steps=200, lr=4e-3 if kind == "z_image" else 1e-2)
    assert after < 0.6 * before


@pytest.mark.parametrize("kind", FAMILIES[:-1])
def test_diffusers_draws_with_the_adapter_what_the_run_draws(load, pipeline, kind, tmp_path):
    """With the names of diffusers and, of a UNet, of kohya. The strength of a drawing is its own only."""
    lora = {"lora_rank": 16, "lora_alpha": 48.0, "lora_targets": MORE_LAYERS.get(kind, "")}
    model = load(kind, adapter="lora", **lora)
    after, before = train(model, steps=20, lr=1e-2)
    assert after < before
    model.save_weights({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    expected = drawn(model)
    without = drawn(model, lora_scale=0.0)
    assert (without - expected).abs().max() > 2
    assert torch.equal(drawn(model), expected)
    run = {"pipeline": type(model.pipe).__name__}
    assert (drawn(td.load_trained_pipeline(tmp_path, run, "", CPU)) - expected).abs().max() <= 1
    names = ["pytorch_lora_weights.safetensors"]
    if model.name == "unet":
        names.append("kohya_lora.safetensors")
    for name in names:
        pipe = open_by_diffusers(pipeline(kind))
        pipe.load_lora_weights(tmp_path, weight_name=name)
        assert (drawn_by_diffusers(pipe, kind) - expected).abs().max() <= 1, name
    pipe.unload_lora_weights()
    assert (drawn_by_diffusers(pipe, kind) - without).abs().max() <= 1


@pytest.mark.parametrize("kind, precision", [("sd", "bf16"), ("sd", "no"), ("flux", "bf16")])
def test_frozen_fp8_is_a_model_of_rounded_frozen_weights(load, kind, precision):
    """With activations computed twice. Loss and gradients are equal, and so are the stored weights."""
    dtype = td.DTYPES[precision]
    settings = {"adapter": "lora", "mixed_precision": precision, "gradient_checkpointing": True}
    models = {frozen_fp8: load(kind, frozen_fp8=frozen_fp8, **settings) for frozen_fp8 in (False, True)}
    stored = {name: p for name, p in models[True].named_parameters() if p.dtype == torch.float8_e4m3fn}
    weights = dict(models[False].named_parameters())
    frozen = [p for p in weights.values() if not p.requires_grad]
    share = 0.25 if kind == "sd" else 0.7  # convolutions stay as they are
    assert sum(p.numel() for p in stored.values()) > share * sum(p.numel() for p in frozen)
    for name in stored:
        weights[name].data = weights[name].data.to(torch.float8_e4m3fn).to(dtype)
    results = {}
    for frozen_fp8, model in models.items():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        for seed in range(2):  # in the first step the gradients of half of the matrices are 0
            optimizer.zero_grad()
            x_0, eps, t, cond = make_batch(models[False], seed)
            x_t, target = td.add_noise(model, x_0, eps, t)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = F.mse_loss(model(x_t, t, cond), target)
            loss.backward()
            optimizer.step()
        results[frozen_fp8] = [loss.detach(), *[p.grad for p in trained]]
    assert all(p.grad.abs().max() > 0 and p.dtype == torch.float32 for p in trained)
    assert all(torch.equal(a, b) for a, b in zip(results[False], results[True], strict=True))
    assert all(p.dtype == torch.float8_e4m3fn for p in stored.values())
    assert all(torch.equal(p.to(dtype), weights[name]) for name, p in stored.items())


def test_compile(load):
    model = load("pixart")
    x, _, t, cond = make_batch(model)
    expected = model(x, t, cond)
    model.compile(backend="aot_eager")
    assert torch.equal(model(x, t, cond), expected)


def test_sdxl_gets_the_original_size_of_each_image(load, captioned, tmp_path):
    """Also of one that a camera noted as turned by 90 degrees."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 24)).save(tmp_path / "turned.jpg", exif=exif)
    files = [captioned / "00.png", tmp_path / "turned.jpg"]
    sources = [{"image": {"bytes": None, "path": str(file)}} for file in files]
    model = load("sdxl")
    rows = [row | {"cond": 0} for row in td.encode_images(sources, range(2), model.encode, wants_size=True)]
    x, cond = td.collate(rows, model.latents.shape[1:])
    told = record(model.denoiser, "added_cond_kwargs")
    with torch.no_grad():
        model(x, torch.tensor([0.5, 0.5]), cond.tolist())
    assert told[0]["time_ids"].tolist() == [[16, 28, 0, 6, 16, 16], [40, 24, 5, 0, 16, 16]]


def test_captions_are_encoded_once(load, pipeline, monkeypatch, tmp_path):
    """A second start reads them from a cache. Other captions or another text encoder are not mixed up."""
    encode_prompt = diffusers.StableDiffusionPipeline.encode_prompt
    counted = mock.create_autospec(encode_prompt, side_effect=encode_prompt)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "encode_prompt", counted)
    load("sd", captions=["a dog", "a cat"])
    assert counted.called
    counted.reset_mock()
    load("sd", captions=["a dog", "a cat"])
    assert not counted.called
    pipe = open_by_diffusers(pipeline("sd"))
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.neg_()
    pipe.save_pretrained(tmp_path / "other")
    for folder, captions in (tmp_path / "other", ["a dog", "a cat"]), (pipeline("sd"), ["a dog", "a cow"]):
        model = load("sd", folder, captions)
        pipe = open_by_diffusers(folder)
        for caption, outputs in zip(captions, model.outputs):
            assert torch.allclose(outputs[0][0], pipe.encode_prompt(caption, "cpu", 1, False)[0], atol=1e-6)


@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
def test_a_pipeline_that_is_stored_in_half_precision_loads(load, pipeline, tmp_path, shard_size):
    pipe = open_by_diffusers(pipeline("sd")).to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size=shard_size)
    weights = load("sd", tmp_path / "half").denoiser.state_dict()
    assert all(torch.equal(weight, weights[name].half()) for name, weight in pipe.unet.state_dict().items())


def test_a_pipeline_that_calls_its_denoiser_twice_a_step_is_refused(load, monkeypatch, capsys):
    once = inspect.unwrap(diffusers.StableDiffusionPipeline.__call__)

    def twice(*args, **kwargs):
        with contextlib.suppress(td.ModelOutput):
            once(*args, **kwargs)
        return once(*args, **kwargs)

    twice.__signature__ = inspect.signature(once)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", twice)
    with pytest.raises(SystemExit):
        load("sd", captions=["a cow", "a sheep"])  # in no cache, where encode_prompt() was called once
    assert "calls its denoiser 2 times a step" in capsys.readouterr().err
