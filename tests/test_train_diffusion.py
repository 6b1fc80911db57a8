"""
Validates train_diffusion.py by its real command and its data: all ways to name pictures give the same pixels, what a
step sees depends on (seed, step) alone, eight pictures are learned by heart; a run that was killed, stopped, cut up among
processes or in parts by FSDP2 is the unbroken one; latents are the autoencoder's; load() and draw() give the run's grid.
"""

import functools
import json
import os
import shutil
import signal
import types

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, differences, forked, last_state, read_grid, rows, run, start, wait_for_step, within
from PIL import Image
from safetensors.torch import load_file

import train_diffusion as td

FSDP2 = yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
FSDP2 = {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(value) for name, value in FSDP2.items()}
ALL = {"val_fraction": 0.0, "test_fraction": 0.0}


@pytest.fixture
def trainer():
    return "train_diffusion.py"


@pytest.fixture
def prepare(monkeypatch, picture_folder):
    """prepare(name=value ...) -> what prepare_data returns under these settings"""

    def prepare(autoencoder=None, **values):
        monkeypatch.undo()
        for name, value in ({"dataset": picture_folder, "image_size": 8} | values).items():
            assert hasattr(td, name)
            monkeypatch.setattr(td, name, str(value) if name == "dataset" else value)
        return td.prepare_data(autoencoder and functools.partial(td.encode, autoencoder), autoencoder)

    return prepare


def everything(splits, data):
    """All pictures in an order of their own: [(bytes of the pixels, class)]"""
    pairs = []
    for split in splits.values():
        x, cond = td.collate(split.__getitems__(list(range(len(split)))), data["shape"])
        pixels = ((x + 1) * 127.5).round().byte().numpy()
        pairs += [(p.tobytes(), int(c)) for p, c in zip(pixels, cond)]
    return sorted(pairs)


# ---- Pictures ----


def test_every_way_to_name_pictures_reads_the_same(prepare, picture_folder, tmp_path):
    import datasets

    names, files = ["blue", "green", "red"], sorted(picture_folder.rglob("*.png"))
    pixels = [np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in files]
    expected = sorted((p, names.index(path.parent.name)) for p, path in zip(pixels, files))
    splits, data, found = prepare()
    assert data == {"rows": {"train": 108, "validation": 6, "test": 6}, "shape": [3, 8, 8], "classes": names}
    assert found == names and everything(splits, data) == expected

    table = {"image": [str(path) for path in files], "label": [path.parent.name for path in files]}
    strings = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    strings.rename_columns({"image": "img", "label": "kind"}).to_parquet(tmp_path / "strings.parquet")
    columns = {"image_column": "img", "label_column": "kind"}
    assert everything(*prepare(dataset=tmp_path / "strings.parquet", **columns)[:2]) == expected
    numbers = strings.cast_column("label", datasets.ClassLabel(names=names))
    numbers.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    numbers.select(range(5)).to_parquet(tmp_path / "parquet" / "test-00000-of-00001.parquet")
    splits, data, _ = prepare(dataset=tmp_path / "parquet")  # with a test split of its own
    assert len(splits.pop("test")) == 5 and everything(splits, data) == expected

    for split, some in (("train", files[:100]), ("val", files[100:])):
        for path in some:
            target = tmp_path / "split" / split / path.parent.name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    splits, data, _ = prepare(dataset=tmp_path / "split", test_fraction=0.0)
    assert data["rows"] == {"validation": 20, "train": 100} and everything(splits, data) == expected


def test_pictures_without_classes(prepare, tmp_path, capsys):
    for split in ("train", "test"):  # the names of splits are no classes
        (tmp_path / split).mkdir()
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / split / f"{i}.PNG")
    splits, data, names = prepare(dataset=tmp_path, val_fraction=0.0)
    assert names == [] and data["rows"] == {"test": 6, "train": 6}
    assert "training without classes" in capsys.readouterr().out
    assert {c for _, c in everything(splits, data)} == {0}  # the number of no class


def test_what_is_no_picture_is_left_out_and_named(prepare, picture_folder, tmp_path, capsys):
    shutil.copytree(picture_folder, tmp_path / "data")
    good = next(picture_folder.rglob("*.png")).read_bytes()
    (tmp_path / "data/red/._1.png").write_bytes(b"as a Mac leaves it")
    (tmp_path / "data/.trash").mkdir()
    (tmp_path / "data/.trash/2.png").write_bytes(good)
    (tmp_path / "data/red/notes.md").mkdir()
    (tmp_path / "data/red/broken.png").write_bytes(b"no picture")
    (tmp_path / "data/red/cut.png").write_bytes(good[:-40])
    (tmp_path / "data/red/empty.jpg").write_bytes(b"")
    splits, data, _ = prepare(dataset=tmp_path / "data", **ALL)
    out = capsys.readouterr().out
    assert len(splits["train"]) == 120 and out.count("left out: ") == 3
    assert all(name in out for name in ("broken.png", "cut.png", "empty.jpg"))
    assert everything(splits, data) == everything(*prepare(**ALL)[:2])


def test_all_modes_and_sizes_become_the_same_picture(monkeypatch, tmp_path):
    """The same scene, left dark, right bright, in modes and files of every kind."""
    monkeypatch.setattr(td, "image_size", 8)
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 15:] = 200
    colour, exif = Image.fromarray(pixels), Image.Exif()
    grey, exif[0x0112] = colour.convert("L"), 6  # a camera held upright: stored turned, with a note
    kinds = {"l.png": grey, "rgb.jpg": colour, "p.gif": colour.convert("P"), "rgb.webp": colour}
    kinds |= {
        "a.png": colour.convert("RGBA"),
        "cmyk.jpg": colour.convert("CMYK"),
        "la.png": grey.convert("LA"),
    }
    kinds["i16.png"] = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    kinds["exif.jpg"] = colour.transpose(Image.Transpose.ROTATE_90)
    for name, image in kinds.items():
        image.save(tmp_path / name, **({"exif": exif, "quality": 95} if name == "exif.jpg" else {}))
        x = td.read_picture({"bytes": None, "path": str(tmp_path / name)})
        assert x[:, :, :3].max() < 20 and abs(x[:, :, 5:].astype(int) - 200).max() < 20, name
    clear = Image.new("RGBA", (8, 8), (0, 50, 0, 0))
    clear.save(tmp_path / "clear.png")  # what is transparent lies on white
    assert (td.read_picture({"bytes": (tmp_path / "clear.png").read_bytes(), "path": None}) == 255).all()


def test_a_changed_picture_is_noticed(prepare, tmp_path):
    for i in range(4):
        Image.new("L", (8, 8), 50 * i).save(tmp_path / f"{i}.png")
    assert prepare(dataset=tmp_path, **ALL)[1]["shape"] == [1, 8, 8]
    assert sorted({p[0] for p, _ in everything(*prepare(dataset=tmp_path, **ALL)[:2])}) == [0, 50, 100, 150]
    Image.new("L", (8, 8), 77).save(tmp_path / "2.png")
    assert sorted({p[0] for p, _ in everything(*prepare(dataset=tmp_path, **ALL)[:2])}) == [0, 50, 77, 150]


def test_captions_of_a_folder(prepare, captioned, tmp_path, capsys):
    captions = {"init_from": "a pipeline", "image_size": 8}
    assert prepare(dataset=captioned, **captions)[2] == ["a blue square", "a green square", "a red square"]
    shutil.copytree(captioned, tmp_path / "folder")
    (tmp_path / "folder/metadata.jsonl").unlink()
    for name, value in (captions | {"dataset": str(tmp_path / "folder")}).items():
        setattr(td, name, value)  # undone by the fixture's monkeypatch
    with pytest.raises(SystemExit):
        td.choose_conditions(td.load_pictures())
    assert ".txt files beside them" in capsys.readouterr().err
    for path in (tmp_path / "folder").glob("*.png"):
        path.with_suffix(".txt").write_text(f"picture {path.stem}\n")
    column, names = td.choose_conditions(td.load_pictures())
    assert column == "text" and sorted(names.values()) == [f"picture {i:02}" for i in range(12)]


def test_folds_cover_the_data(prepare):
    seen = []
    for part in (1, 2, 3):
        splits, data, _ = prepare(fold=f"{part}/3", test_fraction=0.0)
        assert data["rows"] == {"train": 80, "validation": 40}
        seen += everything({"validation": splits["validation"]}, data)
    assert len(set(seen)) == 120


def test_what_a_step_sees_depends_on_seed_and_step_alone(monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(td, "batch_size", 12)
    orders = {}
    for world, micro in ((1, 12), (2, 3), (3, 2)):
        order = [list(td.batch_rows(100, 0, 20, micro, world, rank)) for rank in range(world)]
        n = 12 // (world * micro)
        steps = [[r for i in range(n) for rank in order for r in rank[step * n + i]] for step in range(20)]
        assert orders.setdefault("all", steps) == steps
    assert list(td.batch_rows(100, 7, 20, 12, 1, 0)) == orders["all"][7:]  # a resume
    epoch = sum(orders["all"][:8], [])
    assert len(set(epoch)) == 96 and set(epoch) != set(sum(orders["all"][8:16], []))
    accelerator, x, cond = Accelerator(cpu=True), torch.randn(12, 3, 4, 4), torch.arange(12)
    one = td.noise_batches(accelerator, td.Process("flow"), [(x, cond)], 99, 5)[0]
    cut = [(x[i : i + 4], cond[i : i + 4].clone()) for i in (0, 4, 8)]
    cut = td.noise_batches(accelerator, td.Process("flow"), cut, 99, 5)
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*cut), one))


# ---- Runs ----


def test_eight_pictures_are_learned_by_heart_and_come_back(tmp_path, monkeypatch):
    rng, folder = np.random.default_rng(0), tmp_path / "eight"
    originals = rng.integers(0, 256, (8, 4, 4, 3)).repeat(2, 1).repeat(2, 2).astype(np.uint8)
    for i, pixels in enumerate(originals):
        (folder / f"number {i}").mkdir(parents=True)
        Image.fromarray(pixels).save(folder / f"number {i}" / "picture.png")
    shape = ["--image_size=8", "--n_layer=2", "--n_embd=64", "--val_fraction=0", "--test_fraction=0"]
    steps = ["--max_steps=400", "--eval_interval=400", "--save_interval=400"]
    within("train_diffusion.py", f"--dataset={folder}", f"--out_dir={tmp_path / 'run'}", *shape, *steps)
    for name, value in td.settings(vars(td)).items():
        monkeypatch.setattr(td, name, value)  # load() changes them
    model = td.load(tmp_path / "run", json.loads((tmp_path / "run/run.json").read_text()))
    drawn = td.draw(model, model.class_names, range(8), steps=50, guidance=1.0)
    for i, picture in enumerate(drawn):
        distance = np.abs(originals.astype(float) - np.asarray(picture)).mean(axis=(1, 2, 3))
        assert distance.argmin() == i and distance[i] < 12, f"{i}: {distance}"


def test_the_run_directory(tmp_path, tiny, monkeypatch):
    out = tmp_path / "run"
    within("train_diffusion.py", tiny)
    made = json.loads((out / "run.json").read_text())
    assert made["kind"] == "diffusion" and made["model"] == "DiT"
    assert made["data"]["classes"] == ["blue", "green", "red"] and made["data"]["rows"]["train"] == 108
    assert made["summary"]["steps"] == 40 and "test/loss" in made["summary"]
    weights, state = load_file(out / "model.safetensors"), last_state(out)
    assert made["parameters"] == sum(w.numel() for w in weights.values())
    evaluated = rows(out, "val/loss")
    assert [row["step"] for row in evaluated] == [0, 10, 20, 30, 40]
    assert evaluated[-1]["val/loss"] < evaluated[0]["val/loss"]
    for row in evaluated:
        quarters = [value for name, value in row.items() if name.startswith("val/loss/")]
        assert len(quarters) == 4 and np.mean(quarters) == pytest.approx(row["val/loss"])
    assert {"lr", "grad_norm", "epoch", "train/loss"} <= rows(out, "train/loss")[0].keys()
    if min(evaluated, key=lambda row: row["val/loss"])["step"] == 40:  # the average is what is kept
        assert not differences(weights, state["ema"]) and differences(weights, state["model"])
    for name, value in td.settings(vars(td)).items():
        monkeypatch.setattr(td, name, value)
    model = td.load(out, made)
    drawn = td.draw(model, [model.class_names[i % 3] for i in range(36)], range(1337, 1373))
    grid = read_grid(out / "samples/step_00000040.png", 8, 36)
    assert all((np.asarray(picture) == tile).all() for picture, tile in zip(drawn, grid))


def test_the_average_of_the_weights_is_its_closed_form(monkeypatch):
    """diffusers' EMAModel has the decay min(ema_decay, (1 + s) / (10 + s)), and begins with step 1."""
    from diffusers.training_utils import EMAModel

    monkeypatch.setattr(td, "ema_decay", 0.3)
    layer, rng = torch.nn.Linear(3, 3), torch.Generator().manual_seed(0)
    ours, theirs = td.EMA(layer), EMAModel(layer.parameters(), decay=0.3)
    theirs.optimization_step = 1
    for step in range(1, 12):
        for p in layer.parameters():
            p.data = torch.randn(p.shape, generator=rng)
        ours.weights = [p.detach() for p in layer.parameters()]
        ours.update(step)
        theirs.step(layer.parameters())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.averages, theirs.shadow_params))
    before = [p.clone() for p in layer.parameters()]
    ours.swap()
    assert all(torch.allclose(p, a, atol=1e-6) for p, a in zip(layer.parameters(), theirs.shadow_params))
    ours.swap()
    assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before))


@pytest.fixture(scope="session")
def small_vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    AutoencoderKL(**blocks, **shape, scaling_factor=0.7, shift_factor=0.1).save_pretrained(folder)
    return folder


def test_latents_are_the_autoencoders_and_mirrored_pictures_have_their_own(
    prepare, small_vae, tmp_path, tiny
):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(small_vae)
    pixels, data, _ = prepare(flip=True, **ALL)
    x, _ = td.collate(pixels["train"].__getitems__(list(range(20))), data["shape"])
    assert len(pixels["train"]) == 240 and torch.equal(x[1::2], x[::2].flip(-1))
    latents, data, _ = prepare(theirs, flip=True, vae=str(small_vae), **ALL)
    z, _ = td.collate(latents["train"].__getitems__(list(range(20))), data["shape"])
    assert data["shape"] == [4, 4, 4]
    with torch.no_grad():
        expected = (theirs.encode(x).latent_dist.mode() - 0.1) * 0.7
        assert torch.allclose(z, expected, atol=2e-3)
        decoded = theirs.decode(expected / 0.7 + 0.1).sample
    drawn = np.stack(td.to_pictures(types.SimpleNamespace(vae=[theirs]), expected))
    assert np.abs(drawn - (decoded.clamp(-1, 1).permute(0, 2, 3, 1).numpy() + 1) * 127.5).max() < 0.51
    within("train_diffusion.py", tiny, f"--vae={small_vae}", "--max_steps=10")
    assert Image.open(tmp_path / "run/samples/step_00000010.png").size == (48, 48)


def test_the_frechet_distance_at_the_end(tmp_path, tiny):
    """By a small DINOv2: that of the trained model is far below that of the untrained one; two processes agree."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    Dinov2Model(Dinov2Config(**shape, image_size=28)).save_pretrained(tmp_path / "dino")
    fd = ["--fd_samples=60", f"--fd_model={tmp_path / 'dino'}", "--test_fraction=0.5", "--sample_steps=10"]
    distances = []
    for steps in (0, 200):
        out = tmp_path / str(steps)
        within(
            "train_diffusion.py", tiny, *fd, f"--max_steps={steps}", "--eval_interval=200", f"--out_dir={out}"
        )
        distances.append(rows(out)[-1]["test/frechet_distance"])
    assert distances[1] < 0.5 * distances[0]
    forked("train_diffusion.py", tiny, *fd, "--max_steps=0", f"--out_dir={tmp_path / 'two'}")
    assert rows(tmp_path / "two")[-1]["test/frechet_distance"] == pytest.approx(distances[0], rel=1e-3)


# ---- Stopping, going on, several processes ----
LONG = ["--max_steps=240", "--eval_interval=40", "--save_interval=20", "--flip=True", "--micro_batch_size=4"]


def equal_runs(a, b):
    assert not differences(last_state(a), last_state(b)) and rows(a) == rows(b)
    assert not differences(*(load_file(out / "model.safetensors") for out in (a, b)))
    assert {path.name for path in a.rglob("*")} == {path.name for path in b.rglob("*")}
    for path in a.glob("samples/*"):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes(), path


@pytest.mark.parametrize("objective", ["flow", "v"])
def test_killed_twice_is_the_same_as_unbroken(tmp_path, tiny, objective):
    how = [tiny, *LONG, f"--objective={objective}", "--num_workers=1"]
    how += ["--sampler=", "--optimizer=adamw"] if objective == "v" else []
    within("train_diffusion.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    for step in (30, 110):
        process = start("train_diffusion.py", *how, "--resume=True")
        wait_for_step(tmp_path / "run", step, process)
        process.kill()
        process.communicate()
    run("train_diffusion.py", *how, "--resume=True")
    equal_runs(tmp_path / "unbroken", tmp_path / "run")


def test_ctrl_c_to_launcher_and_trainer_saves(tmp_path, tiny):
    within("train_diffusion.py", tiny, *LONG, f"--out_dir={tmp_path / 'unbroken'}")
    launch = ("-m", "accelerate.commands.launch", "--num_processes", "1", "train_diffusion.py", tiny, *LONG)
    process = start(*launch, process_group=0)
    wait_for_step(tmp_path / "run", 50, process)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "the same command with --resume=True goes on" in out
    step = last_state(tmp_path / "run")["progress"]["step"]
    assert 50 <= step < 240
    out, _ = within("train_diffusion.py", tiny, *LONG, "--resume=True")
    assert f"at step {step}" in out
    equal_runs(tmp_path / "unbroken", tmp_path / "run")


def test_two_processes_train_as_one_and_each_goes_on_with_the_others_run(tmp_path, tiny):
    how = [tiny, "--micro_batch_size=2", "--lr_schedule=constant"]
    within("train_diffusion.py", *how, f"--out_dir={tmp_path / 'one'}")
    forked("train_diffusion.py", *how, "--max_steps=15")
    within("train_diffusion.py", *how, "--max_steps=25", "--resume=True")
    forked("train_diffusion.py", *how, "--resume=True")
    for name in ("train/loss", "val/loss"):
        one, two = ({row["step"]: row[name] for row in rows(tmp_path / r, name)} for r in ("one", "run"))
        assert two == pytest.approx({step: one[step] for step in two if step in one} | two, rel=1e-4)
        assert all(two[step] == pytest.approx(one[step], rel=1e-3) for step in one)


def test_a_model_in_parts_is_as_one_in_one_piece(tmp_path, tiny):
    how = [tiny, "--optimizer=adamw", "--lr_schedule=constant", "--max_steps=20"]
    within("train_diffusion.py", *how, f"--out_dir={tmp_path / 'one'}")
    fsdp = (ROOT / "tests/fsdp2.py", ROOT / "train_diffusion.py", *how)
    forked(*fsdp, "--max_steps=10", **FSDP2)
    assert "resumed from" in forked(*fsdp, "--resume=True", **FSDP2)
    for name in ("ema", "model"):
        one, parts = (last_state(tmp_path / out)[name] for out in ("one", "run"))
        assert one.keys() == parts.keys()
        assert all((one[k] - parts[k]).abs().max() < 1e-3 * one[k].abs().max().clamp(min=1e-2) for k in one)
    files = [{path.name for path in (tmp_path / out).rglob("*")} for out in ("one", "run")]
    assert files[0] == files[1]
    one, parts = (rows(tmp_path / out)[-1]["test/loss"] for out in ("one", "run"))
    assert parts == pytest.approx(one, rel=1e-4)
