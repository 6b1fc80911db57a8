"""
Validates train_diffusion.py by its real command and its data: all ways to name pictures give the same pixels; what a
step sees depends on (seed, step) alone; a run that was killed, stopped, cut up among processes or in parts by FSDP2 is
the unbroken one; latents are the autoencoder's; load() and draw() give the run's last grid.
"""

import json
import os
import shutil
import signal
import types

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import forked, in_parts, last_state, lost, read_grid, rows, start, wait_for_step, within
from PIL import Image
from pipelines import make_vae
from safetensors.torch import load_file

import train_diffusion as td

ALL = {"val_fraction": 0.0, "test_fraction": 0.0}
pytestmark = pytest.mark.usefixtures("defaults")


@pytest.fixture
def prepare(defaults, picture_folder):
    """prepare(name=value ...) -> what prepare_data returns under the defaults and these settings"""

    def prepare(dataset=picture_folder, **values):
        vars(td).update(defaults | {"dataset": str(dataset), "image_size": 8} | values)
        return td.prepare_data(td.encode)

    return prepare


def everything(splits, data):
    """All pictures in an order of their own: [(bytes of the pixels, class)]"""
    pairs = []
    for split in splits.values():
        x, cond = td.collate(list(split), data["shape"])
        pixels = ((x + 1) * 127.5).round().byte().numpy()
        pairs += [(p.tobytes(), int(c)) for p, c in zip(pixels, cond)]
    return sorted(pairs)


# ---- Pictures ----


def test_every_way_to_name_pictures_reads_the_same(prepare, picture_folder, tmp_path):
    names, files = ["blue", "green", "red"], sorted(picture_folder.rglob("*.png"))
    pixels = [np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in files]
    expected = sorted((p, names.index(path.parent.name)) for p, path in zip(pixels, files))
    splits, data, found = prepare()
    assert data == {"rows": {"train": 108, "validation": 6, "test": 6}, "shape": [3, 8, 8], "classes": names}
    assert found == names and everything(splits, data) == expected

    table = {"img": [str(path) for path in files], "kind": [path.parent.name for path in files]}
    strings = datasets.Dataset.from_dict(table).cast_column("img", datasets.Image())
    strings.to_parquet(tmp_path / "strings.parquet")
    columns = {"image_column": "img", "label_column": "kind"}
    assert everything(*prepare(dataset=tmp_path / "strings.parquet", **columns)[:2]) == expected
    numbers = strings.cast_column("kind", datasets.ClassLabel(names=names))
    numbers.to_parquet(tmp_path / "parquet/train-00000-of-00001.parquet")
    numbers.select(range(5)).to_parquet(tmp_path / "parquet/test-00000-of-00001.parquet")
    splits, data, _ = prepare(dataset=tmp_path / "parquet", **columns)  # with a test split of its own
    assert len(splits.pop("test")) == 5 and everything(splits, data) == expected


def test_pictures_without_classes_and_a_changed_one(prepare, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(tmp_path / "far")
    for split in ("train", "val"):  # the names of splits are no classes
        (tmp_path / "far" / split).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 50 * i).save(tmp_path / "far" / split / f"{i}.PNG")
    splits, data, names = prepare(dataset=tmp_path / "data", test_fraction=0.0)
    assert names == [] and data["shape"] == [1, 8, 8] and data["rows"] == {"validation": 3, "train": 3}
    assert "training without classes" in capsys.readouterr().out
    assert {c for _, c in everything(splits, data)} == {0}  # the number of no class
    Image.new("L", (8, 8), 77).save(tmp_path / "far/train/2.PNG")
    seen = everything(*prepare(dataset=tmp_path / "data", test_fraction=0.0)[:2])
    assert [p[0] for p, _ in seen] == [0, 0, 50, 50, 77, 100]


def test_what_is_no_picture_is_left_out_and_named(prepare, picture_folder, tmp_path, capsys):
    shutil.copytree(picture_folder, tmp_path / "data")
    good = next(picture_folder.rglob("*.png")).read_bytes()
    bad = {"broken.png": b"no picture", "cut.png": good[:-40], "empty.jpg": b""}
    (tmp_path / "data/.trash").mkdir()
    for name, content in (bad | {"._1.png": good, "../.trash/2.png": good}).items():  # as a Mac leaves them
        (tmp_path / "data/red" / name).write_bytes(content)
    splits, data, _ = prepare(dataset=tmp_path / "data", **ALL)
    out = capsys.readouterr().out
    assert out.count("left out: ") == 3 and all(name in out for name in bad)
    assert everything(splits, data) == everything(*prepare(**ALL)[:2])


def test_all_modes_and_sizes_become_the_same_picture(tmp_path):
    """The same scene, left dark, right bright, in modes and files of every kind."""
    td.image_size = 8
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 15:] = 200
    colour, exif = Image.fromarray(pixels), Image.Exif()
    grey, exif[0x0112] = colour.convert("L"), 6  # a camera held upright: stored turned, with a note
    kinds = {"l.png": grey, "rgb.jpg": colour, "p.gif": colour.convert("P"), "rgb.webp": colour}
    kinds |= {"a.png": colour.convert("RGBA"), "cmyk.jpg": colour.convert("CMYK")}
    kinds |= {"la.png": grey.convert("LA"), "exif.jpg": colour.transpose(Image.Transpose.ROTATE_90)}
    kinds["16.png"] = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for name, image in kinds.items():
        image.save(tmp_path / name, **({"exif": exif, "quality": 95} if name == "exif.jpg" else {}))
        x = td.read_picture({"bytes": None, "path": str(tmp_path / name)})
        assert x[:, :, :3].max() < 20 and abs(x[:, :, 5:].astype(int) - 200).max() < 20, name
    Image.new("RGBA", (8, 8), (0, 50, 0, 0)).save(tmp_path / "clear.png")  # what is transparent lies on white
    assert (td.read_picture({"bytes": (tmp_path / "clear.png").read_bytes(), "path": None}) == 255).all()


def test_captions_of_a_folder(prepare, captioned, tmp_path, capsys):
    captions = {"init_from": "a pipeline", "dataset": tmp_path / "folder"}
    path = shutil.copytree(captioned, tmp_path / "folder") / "metadata.jsonl"
    table = datasets.Dataset.from_json(str(path))
    lists = table.map(lambda row: {"text": [row["text"], "another"]})  # of which the first counts
    for suffix, write in (".jsonl", table.to_json), (".jsonl", lists.to_json), (".csv", table.to_csv):
        path.unlink()
        write(path := path.with_suffix(suffix))
        assert prepare(**captions)[2] == ["a blue square", "a green square", "a red square"]
    path.unlink()
    with pytest.raises(SystemExit):
        prepare(**captions)
    assert "add .txt files, --caption= or --caption_column=" in capsys.readouterr().err
    for path in (tmp_path / "folder").glob("*.png"):
        path.with_suffix(".txt").write_text(f"picture {path.stem}\n")
    assert sorted(prepare(**captions)[2]) == [f"picture {i:02}" for i in range(12)]


def test_what_a_step_sees_depends_on_seed_and_step_alone():
    td.batch_size = 12
    whole = list(td.batch_rows(100, 0, 20, 12, 1, 0))
    for world, micro in ((2, 3), (3, 2)):
        order = [list(td.batch_rows(100, 0, 20, micro, world, rank)) for rank in range(world)]
        n = 12 // (world * micro)
        steps = [[r for i in range(n) for rank in order for r in rank[step * n + i]] for step in range(20)]
        assert steps == whole
    assert list(td.batch_rows(100, 7, 20, 12, 1, 0)) == whole[7:]  # a resume
    epochs = [set(sum(whole[i : i + 8], [])) for i in (0, 8)]
    assert len(epochs[0]) == 96 and epochs[0] != epochs[1]
    accelerator, x, cond = Accelerator(cpu=True), torch.randn(12, 3, 4, 4), torch.arange(12)
    dit = td.DiT((3, 4, 4), [""] * 99)
    one = td.noise_batches(accelerator, dit, [(x, cond)], 5)[0]
    cut = [(x[i : i + 4], cond[i : i + 4]) for i in (0, 4, 8)]
    cut = td.noise_batches(accelerator, dit, cut, 5)
    assert all(torch.equal(torch.cat(parts), full) for parts, full in zip(zip(*cut), one))


# ---- Runs ----


def test_the_run_directory(tmp_path, tiny):
    out = tmp_path / "run"
    within("train_diffusion.py", tiny)
    made = json.loads((out / "run.json").read_text())
    assert made["kind"] == "diffusion" and made["model"] == "DiT"
    assert made["data"]["classes"] == ["blue", "green", "red"] and made["data"]["rows"]["train"] == 108
    assert made["summary"]["steps"] == 40 and "test/loss" in made["summary"]
    assert made["parameters"] == sum(w.numel() for w in load_file(out / "model.safetensors").values())
    evaluated = rows(out, "val/loss")
    assert [row["step"] for row in evaluated] == [0, 10, 20, 30, 40]
    assert evaluated[-1]["val/loss"] < evaluated[0]["val/loss"]
    for row in evaluated:
        quarters = [value for name, value in row.items() if name.startswith("val/loss/")]
        assert len(quarters) == 4 and np.mean(quarters) == pytest.approx(row["val/loss"])
    assert {"lr", "grad_norm", "epoch", "train/loss"} <= rows(out, "train/loss")[0].keys()
    model = td.load(out, made)
    drawn = td.draw(model, model.prompts, range(1337, 1373))
    grid = read_grid(out / "samples/step_00000040.png", 8, 36)
    assert all((np.asarray(picture) == tile).all() for picture, tile in zip(drawn, grid))


def test_the_average_of_the_weights_is_that_of_diffusers():
    from diffusers.training_utils import EMAModel

    td.ema_decay = 0.3  # both have less in the first steps: (1 + step) / (10 + step)
    layer, rng = torch.nn.Linear(3, 3), torch.Generator().manual_seed(0)
    ours, theirs = td.EMA(layer), EMAModel(layer.parameters(), decay=0.3)
    theirs.optimization_step = 1
    for step in range(1, 12):
        for p in layer.parameters():
            p.detach().copy_(torch.randn(p.shape, generator=rng))
        ours.update(step)
        theirs.step(layer.parameters())
    ours.swap()
    assert all(torch.allclose(p, a, atol=1e-6) for p, a in zip(layer.parameters(), theirs.shadow_params))


def test_latents_are_the_autoencoders_and_mirrored_pictures_have_their_own(
    prepare, tmp_path, tiny, monkeypatch
):
    torch.manual_seed(0)
    theirs = make_vae(4, scaling_factor=0.7, shift_factor=0.1).eval()
    theirs.save_pretrained(tmp_path / "vae")
    pixels, data, _ = prepare(flip=True, **ALL)
    x = td.collate(list(pixels["train"]), data["shape"])[0]
    assert len(x) == 240 and torch.equal(x[1::2], x[::2].flip(-1))
    latents, data, _ = prepare(flip=True, vae=str(tmp_path / "vae"), **ALL)
    z = td.collate(list(latents["train"]), data["shape"])[0]
    assert data["shape"] == [4, 4, 4]
    with torch.no_grad():
        expected = (theirs.encode(x).latent_dist.mode() - 0.1) * 0.7
        decoded = theirs.decode(expected / 0.7 + 0.1).sample.clamp(-1, 1)
    assert torch.allclose(z, expected, atol=2e-3)
    monkeypatch.setattr(td, "sample", lambda *_: expected)
    drawn = td.draw(types.SimpleNamespace(class_names=[], place=x), [""], [0])
    drawn = torch.tensor(np.stack(drawn))
    assert (drawn - (decoded.permute(0, 2, 3, 1) + 1) * 127.5).abs().max() < 0.51
    within("train_diffusion.py", tiny, f"--vae={tmp_path / 'vae'}", "--max_steps=10")
    assert Image.open(tmp_path / "run/samples/step_00000010.png").size == (48, 48)


def test_killed_and_stopped_is_the_same_as_unbroken(tmp_path, tiny):
    """kill -9, then a Ctrl-C to the launcher and the trainer."""
    how, out = [tiny, "--max_steps=120", "--eval_interval=40", "--flip=True"], tmp_path / "run"
    how += ["--micro_batch_size=4", "--num_workers=1"]
    within("train_diffusion.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    how.append("--resume=True")
    process = start("train_diffusion.py", *how)
    wait_for_step(out, 25, process)
    process.kill()
    process.wait()
    launch = ("-m", "accelerate.commands.launch", "--num_processes=1", "train_diffusion.py")
    process = start(*launch, *how, process_group=0)
    wait_for_step(out, 75, process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    step = last_state(out)["progress"]["step"]
    assert 75 <= step < 120 and "the same command with --resume=True goes on" in said
    assert f"at step {step}" in within("train_diffusion.py", *how)[0]
    assert not lost(tmp_path / "unbroken", out)


@pytest.mark.parametrize("optimizer, two", [("muon", forked), ("adamw", in_parts)], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_each_goes_on_with_the_others_run(tmp_path, tiny, optimizer, two):
    how = ["train_diffusion.py", tiny, f"--optimizer={optimizer}", "--lr_schedule=constant"]
    how += ["--max_steps=30", "--micro_batch_size=2", "--resume=True"]
    within(*how, f"--out_dir={tmp_path / 'one'}")
    elsewhere = {"more": [f"--out_dir={tmp_path / 'second'}"]} if two == forked else {}
    for steps, way, more in ((10, two, elsewhere), (20, within, {}), (30, two, elsewhere)):
        way(*how, f"--max_steps={steps}", **more)
    one, run = tmp_path / "one", tmp_path / "run"
    for name in ("train/loss", "val/loss", "test/loss"):
        expected = {row["step"]: row[name] for row in rows(one, name)}
        assert {row["step"]: row[name] for row in rows(run, name)} == pytest.approx(expected, rel=1e-3)
    for name in ("ema", "model"):
        expected, weights = (last_state(out)[name] for out in (one, run))
        assert expected.keys() == weights.keys()
        for key, weight in expected.items():
            assert (weight - weights[key]).abs().max() < 1e-3 * weight.abs().max().clamp(min=1e-2), key
    assert {path.name for path in one.rglob("*")} == {path.name for path in run.rglob("*")}
