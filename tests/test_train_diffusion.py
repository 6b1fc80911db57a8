"""
The diffusion trainer through its real command and its data: every way to name pictures reads the same pixels, crops,
flips and order are functions of (seed, sample number), broken files are counted; eight pictures are learned by heart,
the average of the weights is its closed form, latents are the autoencoder's own, and sample.py draws what was asked.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import forked, read_grid, rows, within
from PIL import Image
from safetensors.torch import load_file

import train_diffusion


@pytest.fixture
def trainer():
    return "train_diffusion.py"


@pytest.fixture
def prepare(monkeypatch, picture_folder):
    """prepare(name=value ...) -> (facts, {split: Pictures}) of train_diffusion.prepare_data under these settings."""

    def prepared(autoencoder=None, **values):
        monkeypatch.undo()
        for name, value in ({"dataset": str(picture_folder), "image_size": 8} | values).items():
            assert hasattr(train_diffusion, name)
            monkeypatch.setattr(train_diffusion, name, str(value) if name == "dataset" else value)
        train_diffusion.read_metadata.cache_clear()
        folder, facts, _ = train_diffusion.prepare_data(autoencoder, "label")
        channels, size = facts["shape"]
        how = {"channels": channels, "size": size, "latent": autoencoder is not None, "seed": 1}
        flip = train_diffusion.flip
        return facts, {
            s: train_diffusion.Pictures(folder / f"{s}.bin", **how, flip=flip) for s in facts["splits"]
        }

    return prepared


def everything(splits):
    """All pictures of all splits in an order of their own: [(bytes of the pixels, class)]"""
    pairs = []
    for pictures in splits.values():
        x, y = pictures.read(range(len(pictures.labels)))
        pairs += [(((p + 1) * 127.5).round().byte().numpy().tobytes(), int(c)) for p, c in zip(x, y)]
    return sorted(pairs)


def test_every_way_to_name_pictures_reads_the_same(prepare, picture_folder, tmp_path):
    import datasets

    facts, splits = prepare()
    assert facts["classes"] == ["blue", "green", "red"] and facts["shape"] == [3, 8]
    assert {s: len(p.labels) for s, p in splits.items()} == {"train": 108, "validation": 6, "test": 6}
    files = sorted(picture_folder.rglob("*.png"))
    names = ["blue", "green", "red"]
    expected = [
        (np.asarray(Image.open(p)).transpose(2, 0, 1).tobytes(), names.index(p.parent.name)) for p in files
    ]
    assert everything(splits) == sorted(expected)

    table = {"image": [str(p) for p in files], "label": [names.index(p.parent.name) for p in files]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    made = datasets.Dataset.from_dict(table, features)
    made.save_to_disk(tmp_path / "on_disk")
    made.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    made.select(range(5)).to_parquet(tmp_path / "parquet" / "test-00000-of-00001.parquet")
    assert everything(prepare(dataset=tmp_path / "on_disk")[1]) == sorted(expected)
    facts, splits = prepare(dataset=tmp_path / "parquet")  # with a test split of its own
    assert everything({s: p for s, p in splits.items() if s != "test"}) == sorted(expected)
    assert len(splits["test"].labels) == 5

    texts = made.cast_column("label", datasets.Value("int64")).map(lambda row: {"kind": names[row["label"]]})
    texts.rename_column("image", "img").remove_columns("label").to_parquet(
        tmp_path / "strings" / "all.parquet"
    )
    other = prepare(dataset=tmp_path / "strings" / "all.parquet", image_column="img", label_column="kind")[1]
    assert everything(other) == sorted(expected)

    (tmp_path / "described").mkdir()
    lines = []
    for i, path in enumerate(files):
        shutil.copy(path, tmp_path / "described" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "label": path.parent.name}))
    (tmp_path / "described" / "metadata.jsonl").write_text("\n".join(lines))
    assert everything(prepare(dataset=tmp_path / "described")[1]) == sorted(expected)
    for i, path in enumerate(files):
        (tmp_path / "described" / f"{i}.txt").write_text(path.parent.name + "\n")
    assert everything(prepare(dataset=tmp_path / "described", label_column="text")[1]) == sorted(expected)
    facts, splits = prepare(dataset=tmp_path / "described", label_column="")
    assert facts["classes"] == [] and {c for _, c in everything(splits)} == {-1}

    for split, part in (("train", files[:100]), ("val", files[100:])):
        for path in part:
            (tmp_path / "split" / split / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "split" / split / path.parent.name)
    facts, splits = prepare(dataset=tmp_path / "split", test_fraction=0.0)
    assert facts["classes"] == names and everything(splits) == sorted(expected)
    assert {s: len(p.labels) for s, p in splits.items()} == {"train": 100, "validation": 20}


def test_a_picture_without_a_metadata_row_is_kept_and_a_row_without_picture_told(
    prepare, picture_folder, tmp_path, capsys
):
    for i, path in enumerate(sorted(picture_folder.rglob("*.png"))[:20]):
        shutil.copy(path, tmp_path / f"{i}.png")
    rows_ = [json.dumps({"file_name": f"{i}.png", "label": "ab"[i % 2]}) for i in (*range(10), 99)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows_))
    facts, splits = prepare(dataset=tmp_path)
    assert [c for _, c in everything(splits)].count(-1) == 10 and facts["classes"] == ["a", "b"]
    assert "1 rows name no picture, such as" in capsys.readouterr().out


def test_folds_cover_the_data(prepare, picture_folder):
    seen = []
    for part in (1, 2, 3):
        _, splits = prepare(fold=f"{part}/3", test_fraction=0.0)
        assert len(splits["validation"].labels) == 40 and len(splits["train"].labels) == 80
        seen += everything({"validation": splits["validation"]})
    assert len(set(seen)) == 120


def save_all_kinds(folder):
    """The same scene, left dark, right bright, in modes and files of every kind."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 15:] = 200
    colour = Image.fromarray(pixels)
    grey = colour.convert("L")
    kinds = {
        "l.png": grey,
        "rgb.jpg": colour,
        "p.gif": colour.convert("P"),
        "rgba.png": colour.convert("RGBA"),
    }
    kinds |= {
        "cmyk.jpg": colour.convert("CMYK"),
        "la.png": grey.convert("LA"),
        "rgb.webp": colour,
        "rgb.bmp": colour,
    }
    kinds["i16.png"] = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for name, image in kinds.items():
        image.save(folder / name)
    turned = colour.transpose(Image.Transpose.ROTATE_90)  # a camera held upright: stored turned, with a note
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "exif.jpg", exif=exif, quality=95)
    return list(kinds) + ["exif.jpg"]


def test_all_modes_and_sizes_become_the_same_picture(prepare, tmp_path):
    names = save_all_kinds(tmp_path)
    facts, splits = prepare(dataset=tmp_path, label_column="", val_fraction=0.0, test_fraction=0.0)
    x, _ = splits["train"].read(range(len(names)))
    assert facts["shape"] == [3, 8] and x.shape == (10, 3, 8, 8)
    for name, picture in zip(sorted(names), x):
        assert picture[:, :, :3].max() < -0.85 and (picture[:, :, 5:] - 0.57).abs().max() < 0.15, name


def test_only_grey_pictures_make_a_grey_model_and_transparency_is_white(prepare, tmp_path):
    grey, clear = tmp_path / "grey", tmp_path / "clear"
    grey.mkdir()
    clear.mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 50 * i).save(grey / f"{i}.png")
        Image.new("RGBA", (8, 8), (0, 50 * i, 0, 0)).save(clear / f"{i}.png")
    how = {"label_column": "", "val_fraction": 0.0, "test_fraction": 0.0}
    facts, splits = prepare(dataset=grey, **how)
    x, _ = splits["train"].read([0, 3])
    assert facts["shape"] == [1, 8] and x.unique().tolist() == pytest.approx([-1, 150 / 127.5 - 1])
    assert (prepare(dataset=clear, **how)[1]["train"].read(range(4))[0] == 1).all()


def test_crops_and_mirrors(prepare, tmp_path):
    pixels = (
        np.linspace(0, 255, 24).astype(np.uint8)[None].repeat(8, 0)
    )  # 24 wide, 8 high: brighter to the right
    for i in range(6):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    how = {"dataset": tmp_path, "label_column": "", "val_fraction": 0.0, "test_fraction": 0.0}
    middle = torch.from_numpy(pixels[:, 8:16].copy()).float() / 127.5 - 1
    x, _ = prepare(**how)[1]["train"][range(60)]
    assert (x == middle).all()
    x, _ = prepare(**how, flip=True)[1]["train"][range(60)]
    mirrored = [bool((p == middle.flip(-1)).all()) for p in x]
    assert all(m or (p == middle).all() for m, p in zip(mirrored, x)) and 15 < sum(mirrored) < 45
    train = prepare(**how, crop="random")[1]["train"]
    x, _ = train[range(200)]
    places = {int(((p[0, 0, 0] + 1) * 127.5).round()) for p in x}
    assert places == set(pixels[0, :17].tolist())  # every place at which the crop can begin
    assert (train.read(range(6))[0] == middle).all()  # evaluation sees the middle


def test_samples_are_a_function_of_seed_and_number(prepare):
    _, splits = prepare(flip=True, crop="random")
    train, again = splits["train"], prepare(flip=True, crop="random")[1]["train"]
    n = len(train.labels)
    x, y = train[list(range(3 * n))]
    for numbers in ([5, 200, 7], [n - 1, n, 2 * n + 3]):
        other_x, other_y = again[numbers]
        assert torch.equal(other_x, x[numbers]) and torch.equal(other_y, y[numbers])
    for epoch in range(3):  # each goes through all of the data
        part = sorted(y[epoch * n : (epoch + 1) * n].tolist())
        assert part == sorted(train.labels.tolist())
    assert not torch.equal(y[:n], y[n : 2 * n])


def test_unreadable_pictures_are_counted_and_more_than_a_few_stop_the_run(
    prepare, picture_folder, tmp_path, capsys
):
    for i in range(2):
        shutil.copytree(picture_folder, tmp_path / "many" / str(i))
    (tmp_path / "many" / "0" / "red" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "many" / "1" / "red" / "cut.png").write_bytes(
        next(picture_folder.rglob("*.png")).read_bytes()[:-40]
    )
    _, splits = prepare(dataset=tmp_path / "many")
    assert sum(len(p.labels) for p in splits.values()) == 240
    assert "2 cannot be read, such as" in capsys.readouterr().out
    (tmp_path / "many" / "1" / "red" / "none.jpg").write_bytes(b"")
    with pytest.raises(SystemExit):
        prepare(dataset=tmp_path / "many")
    assert "3 of 243 pictures cannot be read, such as" in capsys.readouterr().err


def test_a_changed_picture_is_noticed(prepare, tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    how = {"dataset": tmp_path, "label_column": "", "val_fraction": 0.0, "test_fraction": 0.0}
    first, _ = prepare(**how)
    assert prepare(**how)[0] == first
    Image.new("RGB", (8, 8), (0, 0, 200)).save(tmp_path / "2.png")
    assert prepare(**how)[0]["fingerprint"] != first["fingerprint"]


# -----------------------------------------------------------------------------
# Whole runs
# -----------------------------------------------------------------------------


def test_eight_pictures_are_learned_by_heart_and_come_back(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "eight"
    originals = rng.integers(0, 256, (8, 4, 4, 3)).repeat(2, 1).repeat(2, 2).astype(np.uint8)
    for i, pixels in enumerate(originals):
        (folder / f"number {i}").mkdir(parents=True)
        Image.fromarray(pixels).save(folder / f"number {i}" / "picture.png")
    how = ["--image_size=8", "--patch_size=2", "--n_layer=2", "--n_embd=64", "--n_head=2", "--batch_size=64"]
    how += [
        "--val_fraction=0",
        "--test_fraction=0",
        "--max_steps=400",
        "--eval_interval=400",
        "--save_interval=400",
    ]
    within("train_diffusion.py", f"--dataset={folder}", f"--out_dir={tmp_path / 'run'}", *how)
    grid = tmp_path / "grid.png"
    within("sample.py", f"--out_dir={tmp_path / 'run'}", f"--output={grid}", "--guidance=1", "--steps=50")
    for i, drawn in enumerate(read_grid(grid, 8, 8)):
        distance = np.abs(originals.astype(float) - drawn).mean(axis=(1, 2, 3))
        assert distance.argmin() == i and distance[i] < 12, f"{i}: {distance}"


def test_the_average_of_the_weights_is_its_closed_form(tmp_path, tiny):
    """diffusers' EMAModel has decay min(ema_decay, (1 + s) / (10 + s)), s = 0, 1 ..., and begins with step 1."""
    out = tmp_path / "run"
    within(
        "train_diffusion.py",
        tiny,
        "--max_steps=12",
        "--save_interval=1",
        "--keep_checkpoints=99",
        "--ema_decay=0.3",
    )
    states = [torch.load(p / "state.pt", weights_only=True) for p in sorted((out / "checkpoints").iterdir())]
    names = list(states[0]["model"])
    average = states[0]["model"]
    for s, state in enumerate(states[1:], 1):
        decay = min(0.3, (1 + s) / (10 + s))
        average = {n: decay * average[n] + (1 - decay) * state["model"][n] for n in names}
    kept = dict(zip(names, states[-1]["progress"]["ema"]["shadow_params"], strict=True))
    assert all(torch.allclose(kept[n], average[n], atol=1e-6) for n in names)
    assert any(not torch.equal(kept[n], states[-1]["model"][n]) for n in names)
    within("train_diffusion.py", tiny, "--max_steps=12", "--resume=True", "--keep=last", "--ema_decay=0.3")
    saved = load_file(out / "model.safetensors")  # of the best evaluation, which was the last
    assert [r["step"] for r in rows(out, "val/loss")] == [0, 10, 12]
    best = min(rows(out, "val/loss")[1:], key=lambda r: r["val/loss"])["step"]
    at = states[best - 1]["progress"]["ema"]["shadow_params"]
    assert all(torch.equal(saved[n], w) for n, w in zip(names, at))


def test_the_run_directory_and_the_rows(tmp_path, tiny):
    out = tmp_path / "run"
    within("train_diffusion.py", tiny, "--tracker=tensorboard")
    made = json.loads((out / "run.json").read_text())
    assert made["kind"] == "diffusion" and made["classes"] == ["blue", "green", "red"]
    assert made["data"]["splits"]["train"]["pictures"] == 108
    weights = load_file(out / "model.safetensors")
    assert made["parameters"] == sum(w.numel() for w in weights.values())
    assert {p.name for p in (out / "samples").iterdir()} == {f"step_{n:08d}.png" for n in (0, 10, 20, 30, 40)}
    evaluated = rows(out, "val/loss")
    assert [r["step"] for r in evaluated] == [0, 10, 20, 30, 40] and evaluated[-1]["val/loss"] < evaluated[0][
        "val/loss"
    ]
    for row in evaluated:
        quarters = [v for k, v in row.items() if k.startswith("val/loss/")]
        assert len(quarters) == 4 and np.mean(quarters) == pytest.approx(row["val/loss"])
    trained = rows(out, "train/loss")
    assert {"lr", "grad_norm", "epoch"} <= trained[0].keys() and "test/loss" in rows(out)[-1]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(next(out.rglob("events.out.tfevents*")).parent), size_guidance={"images": 0}
    ).Reload()
    assert len(events.Images("samples")) == 5 and len(events.Scalars("val/loss")) == 5


def test_two_evaluations_of_the_same_weights_are_equal_whatever_the_seed_of_training(tmp_path, tiny):
    within("train_diffusion.py", tiny, "--max_steps=10")
    before = rows(tmp_path / "run", "val/loss")[-1]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000010"
    assert checkpoint.exists()
    within("train_diffusion.py", tiny, "--max_steps=10", "--resume=True", "--seed=5", "--micro_batch_size=4")
    after = rows(tmp_path / "run", "val/loss")[-1]
    assert after["val/loss"] == pytest.approx(before["val/loss"], rel=1e-6)


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_every_objective_trains_and_every_sampler_draws(tmp_path, tiny, objective):
    more = ["--zero_snr=True"] if objective == "v" else ["--beta_schedule=cosine"]
    within("train_diffusion.py", tiny, f"--objective={objective}", "--sampler=", "--min_snr=5", *more)
    losses = [r["val/loss"] for r in rows(tmp_path / "run", "val/loss")]
    assert losses[-1] < 0.9 * losses[0]
    run_json = json.loads((tmp_path / "run" / "run.json").read_text())
    dit = train_diffusion.DiT(train_diffusion.Shape(**run_json["model"])).eval()
    dit.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    process = train_diffusion.Process(**run_json["process"])
    for sampler in process.samplers:
        how = {"steps": 10, "guidance": 2.0, "sampler": sampler}
        x = train_diffusion.draw_pictures(dit, process, (3, 8, 8), torch.arange(3), range(3), **how)
        assert x.isfinite().all() and x.std() > 0.2, sampler
    grid = tmp_path / "grid.png"
    within("sample.py", f"--out_dir={tmp_path / 'run'}", "--sampler=unipc", f"--output={grid}", "--steps=10")
    assert len(np.unique(np.concatenate(read_grid(grid, 8, 3)))) > 50


def test_drawing_by_class_seed_and_checkpoint(tmp_path, tiny):
    out = tmp_path / "run"
    within("train_diffusion.py", tiny, "--max_steps=200", "--eval_interval=100", "--save_interval=100")
    how = ("--steps=10", "--num_samples=5")

    def drawn(*arguments, n=5):
        within("sample.py", f"--out_dir={out}", f"--output={tmp_path / 'grid.png'}", *arguments)
        return read_grid(tmp_path / "grid.png", 8, n)

    red, green, blue = (drawn(f"--class_label={name}", *how) for name in ("red", "green", "blue"))
    for channel, pictures in enumerate((red, green, blue)):
        assert np.mean(pictures, axis=(0, 1, 2)).argmax() == channel
    again = drawn(
        "--class_label=2", *how, "--seed=1338"
    )  # red, by number, each picture from the seed of the next
    assert np.array_equal(again[:4], red[1:]) and not np.array_equal(red[0], red[1])
    best = min(rows(out, "val/loss")[1:], key=lambda r: r["val/loss"])["step"]
    checkpoint = out / "checkpoints" / f"step_{best:08d}"  # its averaged weights are those that were kept
    kept = drawn(*how)
    within("sample.py", f"--out_dir={checkpoint}", f"--output={tmp_path / 'grid.png'}", *how)
    assert np.array_equal(read_grid(tmp_path / "grid.png", 8, 5), kept)


@pytest.fixture
def small_vae(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    options = {
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.7,
    }
    AutoencoderKL(**blocks, **options, shift_factor=0.1).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_latents_are_the_autoencoders_own_and_come_back_as_pictures(
    tmp_path, tiny, small_vae, prepare, picture_folder
):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(small_vae).eval()
    autoencoder = train_diffusion.load_autoencoder(str(small_vae))
    facts, splits = prepare(autoencoder, vae=str(small_vae), flip=True, val_fraction=0.0, test_fraction=0.0)
    assert facts["shape"] == [4, 4]
    x, _ = splits["train"].read(range(120))
    files = sorted(picture_folder.rglob("*.png"))
    pictures = torch.stack(
        [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) / 127.5 - 1 for p in files]
    )
    with torch.no_grad():
        z, mirrored = ((theirs.encode(p).latent_dist.mean - 0.1) * 0.7 for p in (pictures, pictures.flip(-1)))
        decoded = theirs.decode(z / 0.7 + 0.1).sample
        assert torch.allclose(train_diffusion.decode(autoencoder, z), decoded, atol=1e-5)
    assert torch.allclose(x, z, atol=2e-3)  # kept in 16 bits
    x, _ = splits["train"][range(120)]
    order = splits["train"].order
    as_is = [torch.allclose(a, z[i], atol=2e-3) for a, i in zip(x, order)]
    assert all(k or torch.allclose(a, mirrored[i], atol=2e-3) for k, a, i in zip(as_is, x, order))
    assert 30 < sum(as_is) < 90

    within("train_diffusion.py", tiny, f"--vae={small_vae}", "--max_steps=10")
    assert Image.open(tmp_path / "run" / "samples" / "step_00000010.png").size == (48, 48)
    within("sample.py", f"--out_dir={tmp_path / 'run'}", f"--output={tmp_path / 'grid.png'}")
    assert Image.open(tmp_path / "grid.png").size == (16, 16)
    _, err = within(
        "train_diffusion.py", tiny, f"--vae={small_vae}", "--image_size=10", "--overwrite=True", code=2
    )
    assert "use 8 or 12" in err and err.count("\n") == 1


def test_the_frechet_distance_at_the_end(tmp_path, tiny):
    """By a small DINOv2: that of the trained model is far below that of the untrained one."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    how = ("--fd_samples=60", f"--fd_model={tmp_path / 'dino'}", "--test_fraction=0.5", "--sample_steps=10")
    distances = []
    for steps in (0, 200):
        out = tmp_path / str(steps)
        within(
            "train_diffusion.py",
            tiny,
            *how,
            f"--max_steps={steps}",
            "--eval_interval=200",
            f"--out_dir={out}",
        )
        distances.append(rows(out)[-1]["test/frechet_distance"])
        assert json.loads((out / "run.json").read_text())["summary"]["test/frechet_distance"] == distances[-1]
    assert distances[1] < 0.5 * distances[0]
    out = tmp_path / "two"
    forked("train_diffusion.py", tiny, *how, "--max_steps=0", f"--out_dir={out}")
    assert rows(out)[-1]["test/frechet_distance"] == pytest.approx(distances[0], rel=1e-3)


def test_cached_pictures_are_used_again_and_made_again_after_a_kill(prepare):
    _, splits = prepare()
    folder = splits["train"].path.parent
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    prepare()
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps
    (folder / "facts.json").unlink()  # as a kill would leave it: the last file is missing
    (folder / "train.bin").write_bytes(b"half")
    prepare()
    assert (folder / "train.bin").stat().st_size == 108 * 8 * 8 * 3
