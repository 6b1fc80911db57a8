"""
Stable Diffusion (eps, v, zero SNR), SDXL and DDPM pipelines, tiny ones from diffusers' own configs, through the real
commands: by LoRA and whole they train and go on bit for bit, nothing else changes, and the picture that diffusers
draws from the run directory is the trainer's own, bit for bit. The loss of a step is the one that diffusers' parts give;
weights of times and noise are diffusers'; captions come the same from every place; a caption draws its picture.
"""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import differences, forked, last_state, read_grid, rows, within
from PIL import Image, ImageOps
from safetensors.torch import load_file

import train_diffusion

PROMPTS = ["a red square", "a blue square"]
FAST = ("--image_size=16", "--batch_size=4", "--max_steps=20", "--eval_interval=10", "--save_interval=10")
FAST += ("--log_interval=5", "--warmup_steps=2", "--mixed_precision=no", "--val_fraction=0.2", "--keep=last")
FAST += (
    "--learning_rate=0.003",
    "--sample_steps=4",
    "--guidance=5",
    f"--sample_prompts={' | '.join(PROMPTS)}",
)
LORA = ("--adapter=lora", "--lora_rank=4", "--lora_alpha=16")
WIDE = (*LORA, "--lora_targets=to_q, to_k, to_v, to_out.0, proj_in, ff.net.2, conv1")
KINDS = {
    "eps": ("sd", {}),
    "v": ("sd", {"prediction_type": "v_prediction"}),
    "x0": ("sd", {"prediction_type": "sample"}),
    "sdxl": ("sdxl", {}),
}


@pytest.fixture
def base(request, pipeline):
    kind, scheduler = KINDS[request.param]
    return pipeline(kind, **scheduler)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def draw_with_diffusers(pipe, prompts, seed=1337, negative=None):
    """What diffusers' own pipeline draws, with the settings of FAST."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    names = ("prompt_embeds", "negative_prompt_embeds")
    names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    # one by one: the last bits of what is encoded together depend on the company
    made = [pipe.encode_prompt(prompt, negative_prompt=negative, **how) for prompt in prompts]
    options = dict(zip(names, map(torch.cat, zip(*made))))
    options |= {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 5.0}
    rngs = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return [np.asarray(image) for image in pipe(generator=rngs, **options).images]


@pytest.mark.parametrize("adapter", [(), LORA, WIDE], ids=["whole", "lora", "wide"])
@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_it_trains_goes_on_and_draws_in_diffusers_what_it_drew(tmp_path, base, captioned, adapter):
    before = contents(base)
    how = (f"--init_from={base}", f"--dataset={captioned}", *FAST, *adapter)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    within("train_diffusion.py", *how, f"--out_dir={unbroken}")
    shutil.copytree(unbroken, broken)  # as if it had been killed in the second half
    shutil.rmtree(broken / "checkpoints" / "step_00000020")
    within("train_diffusion.py", *how, f"--out_dir={broken}", "--resume=True")
    assert not differences(last_state(unbroken), last_state(broken)) and rows(unbroken) == rows(broken)
    name = train_diffusion.LORA_FILE if adapter else train_diffusion.UNET_FILE
    assert not differences(load_file(unbroken / name), load_file(broken / name))
    losses = [row["val/loss"] for row in rows(unbroken, "val/loss")]
    assert losses[-1] < losses[0]

    # what is trained is all that changes
    assert contents(base) == before
    trained, weights = last_state(unbroken)["model"], load_file(base / train_diffusion.UNET_FILE)
    if adapter:
        assert trained and all("lora_" in name and w.dtype == torch.float32 for name, w in trained.items())
        pipe = diffusers.DiffusionPipeline.from_pretrained(base)
        untouched = draw_with_diffusers(pipe, PROMPTS * 2)
        pipe.load_lora_weights(unbroken)
    else:
        assert trained.keys() == {f"unet.{name}" for name in weights}
        frozen = [p for p in before if p.parts[0] in ("vae", "text_encoder", "text_encoder_2")]
        frozen = [p for p in frozen if p.suffix == ".safetensors"]
        assert len(frozen) > 1 and all(before[p] == (unbroken / p).read_bytes() for p in frozen)
        again = (*how, f"--init_from={unbroken}", "--max_steps=0", f"--out_dir={tmp_path / 'again'}")
        within("train_diffusion.py", *again)  # what met the test split is what was kept
        assert rows(tmp_path / "again", "test/loss")[0] == rows(unbroken, "test/loss")[0] | {"step": 0}
        pipe = diffusers.DiffusionPipeline.from_pretrained(unbroken)

    # the trainer's last grid, diffusers, kohya's file, sample.py, and a checkpoint, all draw the same
    drawn = draw_with_diffusers(pipe, PROMPTS * 2)
    assert np.array_equal(drawn, read_grid(unbroken / "samples" / "step_00000020.png", 16, 4))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    sample = ("--seed=1337", f"--prompt=FILE:{tmp_path / 'prompts.txt'}", "--num_samples=2")
    for folder in (unbroken, unbroken / "checkpoints" / "step_00000020"):
        within("sample.py", f"--out_dir={folder}", *sample, f"--output={tmp_path / 'a.png'}")
        assert np.array_equal(drawn, read_grid(tmp_path / "a.png", 16, 4))
    negative = draw_with_diffusers(pipe, PROMPTS[:1], negative="green")
    options = ("--negative_prompt=green", f"--output={tmp_path / 'b.png'}")
    within("sample.py", f"--out_dir={unbroken}", f"--prompt={PROMPTS[0]}", *options)
    assert np.array_equal(negative, read_grid(tmp_path / "b.png", 16, 1))
    assert not np.array_equal(negative[0], drawn[0])
    if adapter:
        pipe = diffusers.DiffusionPipeline.from_pretrained(base)
        pipe.load_lora_weights(unbroken, weight_name="kohya_lora.safetensors")
        assert np.array_equal(drawn, draw_with_diffusers(pipe, PROMPTS * 2))
        options = ("--lora_scale=0", f"--output={tmp_path / 'c.png'}")
        within("sample.py", f"--out_dir={unbroken}", *sample, *options)
        assert np.array_equal(untouched, read_grid(tmp_path / "c.png", 16, 4))
        assert not np.array_equal(untouched, drawn)


def reference_loss(base, folder, dropout, min_snr, seed=1337):
    """The loss of the first step on all twelve pictures, from diffusers' parts: scheduler, autoencoder, UNet."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    table = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rng = torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, 0]).generate_state(1, np.uint64)[0])
    )
    noise = torch.randn(12, 4, 8, 8, generator=rng)
    t = torch.randint(1000, (12,), generator=rng)
    hidden = torch.rand(12, generator=rng) < dropout
    losses = []
    for place, i in enumerate(np.random.default_rng([seed, 0]).permutation(12)):
        image = Image.open(folder / table[i]["file_name"])
        w, h = image.size
        image = ImageOps.fit(image, (16, 16), Image.Resampling.LANCZOS)
        x = pipe.image_processor.preprocess(image)
        with torch.no_grad():
            x = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
        x = x.half().float()  # as latents are kept
        with torch.no_grad():
            how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
            made = pipe.encode_prompt(table[i]["text"], **how)
            embeds, *pooled = made[1::2] if hidden[place] else made[::2]
        scale = 16 / min(h, w)  # the centre of the longer side is used
        top, left = round((h * scale - 16) / 2), round((w * scale - 16) / 2)
        ids = torch.tensor([[h, w, top, left, 16, 16]])
        more = {"added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": ids}} if pooled else {}
        at, eps = t[place : place + 1], noise[place : place + 1]
        with torch.no_grad():
            out = pipe.unet(scheduler.add_noise(x, eps, at), at, embeds, **more).sample
        kind = scheduler.config.prediction_type
        target = {"epsilon": eps, "sample": x, "v_prediction": scheduler.get_velocity(x, eps, at)}[kind]
        snr = diffusers.training_utils.compute_snr(scheduler, at)
        weight = snr.clamp(max=min_snr) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
        losses.append((out - target).square().mean() * (weight if min_snr else 1))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("min_snr", [0, 5])
@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_the_loss_of_a_step_is_that_of_diffusers_parts(tmp_path, base, captioned, min_snr):
    how = (f"--init_from={base}", f"--dataset={captioned}", *FAST, "--val_fraction=0", "--test_fraction=0")
    how += (
        "--batch_size=12",
        "--max_steps=1",
        "--log_interval=1",
        "--label_dropout=0.4",
        f"--min_snr={min_snr}",
    )
    expected = reference_loss(base, captioned, 0.4, min_snr)
    for name, more in (("once", ()), ("in parts", ("--micro_batch_size=3",)), ("lora", LORA)):
        within("train_diffusion.py", *how, *more, f"--out_dir={tmp_path / name}")
        [row] = rows(tmp_path / name, "train/loss")
        assert row["train/loss"] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_weights_are_diffusers_own(pipeline, zero_snr):
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline("sd", prediction_type="v_prediction"))
    process = train_diffusion.process_of(pipe, zero_snr)
    config = dict(pipe.scheduler.config) | {"rescale_betas_zero_snr": zero_snr}
    scheduler = diffusers.DDPMScheduler.from_config(config)
    rng = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 1000, 4, 2, 2, generator=rng)
    k = torch.arange(1000)
    x_t, target = process.diffuse(x, eps, k / 1000)
    torch.testing.assert_close(x_t, scheduler.add_noise(x, eps, k), rtol=0, atol=1e-6)
    torch.testing.assert_close(target, scheduler.get_velocity(x, eps, k), rtol=0, atol=1e-6)
    snr = diffusers.training_utils.compute_snr(scheduler, k)
    weight = process.weight(k / 1000, 5.0)
    torch.testing.assert_close(weight, snr.clamp(max=5) / (snr + 1), rtol=1e-5, atol=0)
    assert (float(snr[-1]) == 0) == zero_snr and weight.isfinite().all()


def test_zero_snr_trains_and_draws(tmp_path, pipeline, captioned):
    base = pipeline("sd", prediction_type="v_prediction")
    how = (f"--init_from={base}", f"--dataset={captioned}", *FAST, "--zero_snr=True", "--min_snr=5")
    within("train_diffusion.py", *how, f"--out_dir={tmp_path / 'run'}")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run")  # with the scheduler of its training
    config = pipe.scheduler.config
    assert config.rescale_betas_zero_snr and config.timestep_spacing == "trailing"
    drawn = draw_with_diffusers(pipe, PROMPTS * 2)
    assert np.array_equal(drawn, read_grid(tmp_path / "run" / "samples" / "step_00000020.png", 16, 4))
    base = pipeline("sd")
    how = (f"--init_from={base}", f"--dataset={captioned}", *FAST, "--zero_snr=True")
    _, err = within("train_diffusion.py", *how, f"--out_dir={tmp_path / 'eps'}", code=2)
    assert "from noise alone, eps cannot tell the picture" in err


def test_a_pipeline_without_captions_is_trained_whole(tmp_path, pipeline, picture_folder):
    base, out = pipeline("ddpm"), tmp_path / "run"
    how = (f"--init_from={base}", f"--dataset={picture_folder}", *FAST, "--image_size=8", "--crop=center")
    within("train_diffusion.py", *how, f"--out_dir={out}")
    shutil.rmtree(out / "checkpoints" / "step_00000020")
    first = (out / train_diffusion.UNET_FILE).read_bytes()
    within("train_diffusion.py", *how, f"--out_dir={out}", "--resume=True")
    assert (out / train_diffusion.UNET_FILE).read_bytes() == first
    losses = [row["val/loss"] for row in rows(out, "val/loss")]
    assert losses[-1] < losses[0]
    # with bf16 attention is written out, in products of 8 bits
    within(
        "train_diffusion.py", *how, "--max_steps=0", "--mixed_precision=bf16", f"--out_dir={tmp_path / 'b'}"
    )
    [row] = rows(tmp_path / "b", "val/loss")
    assert row["val/loss"] == pytest.approx(losses[0], rel=0.003) and row["val/loss"] != losses[0]
    within("sample.py", f"--out_dir={out}", "--num_samples=4", "--steps=5", f"--output={tmp_path / 'a.png'}")
    assert len(read_grid(tmp_path / "a.png", 8, 4)) == 4
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "DDPMPipeline"
    # one step of the reverse process, from diffusers' own parts
    weights = load_file(out / train_diffusion.UNET_FILE)
    assert all(torch.equal(weight, pipe.unet.state_dict()[name]) for name, weight in weights.items())
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    model = train_diffusion.UNet(pipe, None, {})
    process = train_diffusion.process_of(pipe, False)
    rngs = [torch.Generator().manual_seed(i) for i in range(2)]
    y = train_diffusion.whole_pictures(torch.full((2,), -1), 8)
    ours = train_diffusion.sample(model.eval(), process, (3, 8, 8), y, rngs, steps=5)
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for k in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, k).sample, k, x).prev_sample
    assert torch.equal(ours, x)


@pytest.mark.parametrize("base", ["eps", "sdxl"], indirect=True)
def test_a_bf16_base_takes_an_fp32_adapter(tmp_path, base, captioned):
    out, grids = tmp_path / "run", {}
    how = (f"--init_from={base}", f"--dataset={captioned}", *FAST, *LORA, "--gradient_checkpointing=True")
    for name, more in (
        ("bf16", ("--base_dtype=bf16",)),
        ("both", ("--base_dtype=bf16", "--mixed_precision=bf16")),
    ):
        within("train_diffusion.py", *how, *more, f"--out_dir={out / name}")
        losses = [row["val/loss"] for row in rows(out / name, "val/loss")]
        assert losses[-1] < losses[0]
        assert all(
            w.dtype == torch.float32 for w in load_file(out / name / train_diffusion.LORA_FILE).values()
        )
        within("sample.py", f"--out_dir={out / name}", "--num_samples=2", f"--output={tmp_path / 'a.png'}")
        grids[name] = np.array(read_grid(tmp_path / "a.png", 16, 4), int)
        if name == "bf16":
            drawn = read_grid(out / name / "samples" / "step_00000020.png", 16, 4)
            assert np.array_equal(grids[name], drawn)
    within("train_diffusion.py", *how, f"--out_dir={out / 'fp32'}")
    within("sample.py", f"--out_dir={out / 'fp32'}", "--num_samples=2", f"--output={tmp_path / 'a.png'}")
    exact = np.array(read_grid(tmp_path / "a.png", 16, 4), int)
    assert all(0 < np.abs(grid - exact).mean() < 5 for grid in grids.values())  # of 255


def test_two_processes_take_the_same_steps_as_one(tmp_path, pipeline, captioned):
    how = (f"--init_from={pipeline('sdxl')}", f"--dataset={captioned}", *FAST, *LORA, "--max_steps=6")
    how += ("--log_interval=1", "--gradient_checkpointing=True")
    within("train_diffusion.py", *how, f"--out_dir={tmp_path / 'one'}")
    forked("train_diffusion.py", *how, f"--out_dir={tmp_path / 'two'}")
    one, two = (rows(tmp_path / name, "train/loss") for name in ("one", "two"))
    assert [row["train/loss"] for row in two] == pytest.approx([row["train/loss"] for row in one], rel=1e-5)
    one, two = (load_file(tmp_path / name / train_diffusion.LORA_FILE) for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)


def test_captions_come_the_same_from_every_place(tmp_path, pipeline, captioned):
    import datasets

    table = [json.loads(line) for line in (captioned / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "sidecars").mkdir()
    for row in table:
        shutil.copy(captioned / row["file_name"], tmp_path / "sidecars")
        (tmp_path / "sidecars" / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    features = datasets.Features({"image": datasets.Image(), "said": datasets.Value("string")})
    columns = {
        "image": [str(captioned / row["file_name"]) for row in table],
        "said": [r["text"] for r in table],
    }
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "pictures.parquet")
    how = (f"--init_from={pipeline('sdxl')}", *FAST, "--max_steps=2", "--log_interval=1", "--flip=True")
    places = {
        "metadata": (f"--dataset={captioned}",),
        "sidecars": (f"--dataset={tmp_path / 'sidecars'}",),
        "column": (f"--dataset={tmp_path / 'pictures.parquet'}", "--caption_column=said"),
    }
    for name, place in places.items():
        within("train_diffusion.py", *how, *place, f"--out_dir={tmp_path / 'of' / name}")
        assert rows(tmp_path / "of" / name) == rows(tmp_path / "of" / "metadata")
    one = (*how, *places["sidecars"], "--caption=a square", f"--out_dir={tmp_path / 'of' / 'one'}")
    within("train_diffusion.py", *one)
    assert rows(tmp_path / "of" / "one") != rows(tmp_path / "of" / "metadata")
    (tmp_path / "sidecars" / "03.txt").write_text("\n")
    (tmp_path / "sidecars" / "05.txt").unlink()
    _, err = within("train_diffusion.py", *how, *places["sidecars"], f"--out_dir={tmp_path / 'x'}", code=2)
    assert "2 of 12 pictures have none, such as" in err and "03.png" in err and "--caption=TEXT" in err


def test_two_captioned_pictures_are_learned_and_each_caption_draws_its_own(tmp_path, pipeline):
    """The autoencoder has random weights too, so what is drawn is compared with what it makes of the pictures."""
    base, folder, out = pipeline("sd", prediction_type="v_prediction"), tmp_path / "two", tmp_path / "run"
    folder.mkdir()
    captions = {"dark": "night over the sea", "light": "a field of snow"}
    for name, level in (("dark", 20), ("light", 235)):
        pixels = np.full((16, 16, 3), level, np.uint8)
        pixels[4:12, 4:12] = 128
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(captions[name])
    how = (f"--init_from={base}", f"--dataset={folder}", *FAST, "--val_fraction=0", "--test_fraction=0")
    how += ("--max_steps=400", "--eval_interval=400", "--batch_size=8", "--ema_decay=0", "--weight_decay=0")
    within("train_diffusion.py", *how, "--learning_rate=0.005", f"--out_dir={out}")
    autoencoder = train_diffusion.load_autoencoder(str(base / "vae"))
    known = {}
    for name in captions:
        x = torch.from_numpy(np.array(Image.open(folder / f"{name}.png"))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            known[name] = train_diffusion.decode(autoencoder, train_diffusion.encode(autoencoder, x))
    apart = (known["dark"] - known["light"]).square().mean()
    for name, caption in captions.items():
        options = ("--guidance=1", "--steps=20", "--num_samples=4", f"--output={tmp_path / 'a.png'}")
        within("sample.py", f"--out_dir={out}", f"--prompt={caption}", *options)
        for tile in read_grid(tmp_path / "a.png", 16, 4):
            x = torch.from_numpy(tile.copy()).permute(2, 0, 1)[None] / 127.5 - 1
            errors = {other: (x - known[other].clamp(-1, 1)).square().mean() for other in known}
            assert all(
                error < 0.15 * apart if other == name else error > 0.5 * apart
                for other, error in errors.items()
            )


def test_only_the_same_base_goes_on_and_is_drawn_from(tmp_path, pipeline, captioned):
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(pipeline("sd"), base)
    how = (f"--init_from={base}", f"--dataset={captioned}", *FAST, *LORA, f"--out_dir={out}")
    within("train_diffusion.py", *how)
    for changed, message in (
        ("--lora_rank=8", "lora_rank was 4, is 8"),
        ("--caption=a square", "cannot resume on other data"),
        ("--adapter=", "adapter was 'lora', is ''"),
    ):
        _, err = within("train_diffusion.py", *how, changed, "--resume=True", code=2)
        assert message in err
    shutil.copy(pipeline("sd", beta_end=0.02) / train_diffusion.UNET_FILE, base / train_diffusion.UNET_FILE)
    within("train_diffusion.py", *how, "--resume=True")  # the same weights in another file
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    torch.nn.init.normal_(unet.conv_in.weight)
    unet.save_pretrained(base / "unet")
    _, err = within("train_diffusion.py", *how, "--resume=True", code=2)
    assert "have changed since it began" in err
    _, err = within("sample.py", f"--out_dir={out}", code=2)
    assert "have changed since" in err
