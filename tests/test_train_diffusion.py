"""
Validates train_diffusion.py through its data and its real command: images of every kind and name give the
right pixels, classes, captions and splits; what a step sees is a function of (seed, step); a run that was
killed, stopped or divided is the unbroken one; latents are the autoencoder's, averages of weights as in
diffusers; samples can be drawn again; a step waits for the device once; edits train.
"""

import io
import json
import os
import shutil
import types
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM

import conftest
import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import check_out, forked, last_state, lost, read_grid, refusal, rows, within
from diffusers.training_utils import EMAModel
from PIL import Image, ImageCms
from pipelines import make_vae
from safetensors.torch import load_file
from test_train_lm import Waits

import train_diffusion as td

WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}
pytestmark = pytest.mark.usefixtures("defaults")


@pytest.fixture
def prepare(defaults, picture_folder, capsys):
    """prepare(name=value ...) -> what prepare_data returns with these settings, and its log"""

    def prepare(dataset=picture_folder, **values):
        vars(td).update(defaults | {"dataset": str(dataset), "image_size": 8} | values)
        return *td.prepare_data(Accelerator(cpu=True)), capsys.readouterr().out

    return prepare


def content(splits, data):
    """Return all images of all splits, sorted: [(bytes of the pixels, class)]."""
    x, cond = td.collate([row for split in splits.values() for row in split], data["shape"])
    pixels = ((x + 1) * 127.5).round().byte().numpy()
    return sorted((p.tobytes(), c) for p, c in zip(pixels, cond[:, 0].tolist()))


def named(split, names):
    """Return the sorted classes, or captions, of the images of a split."""
    return sorted(str([*names, None][number]) for number in split["cond"])


def write(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path)


def test_every_kind_of_image_becomes_the_same_pixels(tmp_path):
    """A dark left and a bright right half, in all modes, in 16 bits, turned by a camera."""
    td.image_size = 8
    gray = np.zeros((20, 30), np.uint8)
    gray[:, 15:] = 200
    image = Image.fromarray(gray).convert("RGB")
    kinds = {f"{mode}.tif": image.convert(mode) for mode in ("L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB")}
    kinds |= {f"image{suffix}": image for suffix in (".PNG", ".jpg", ".WebP", ".gif", ".bmp")}
    for kind, scale in ("<u2", 257.0), (">u2", 257.0):
        kinds[f"{kind} {scale}.tif"] = Image.fromarray((gray * scale).astype(kind))
    for name in ("turned.jpg", "turned.tif"):
        kinds[name] = image.transpose(Image.Transpose.ROTATE_90)
        kinds[name].getexif()[0x0112] = 6
    for name, image in kinds.items():
        image.save(tmp_path / name, exif=image.getexif())
        x = td.read_image({"bytes": None, "path": str(tmp_path / name)}).astype(int)
        assert x.shape == (3, 8, 8) and x[:, :, :3].max() < 20, name
        assert abs(x[:, :, 5:] - 200).max() < 20, name
        assert td.original_size({"bytes": None, "path": str(tmp_path / name)}) == (20, 30), name


def test_16_bits_have_a_known_white_and_what_has_none_is_left_out(tmp_path, capsys):
    """All of a PGM's 16 bits count, as those of a PNG, also if it uses few. Integers of 32 bits and floats do not."""
    td.image_size = 8
    gray = np.linspace(20000, 30000, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + gray.astype(">u2").tobytes())
    Image.fromarray(65535 - gray).save(tmp_path / "a.tif", tiffinfo={262: 0})  # white is 0
    for name in ("a.png", "a.pgm", "a.tif"):
        x = td.read_image({"bytes": None, "path": str(tmp_path / name)})
        assert np.abs(x[0] - gray / 257).max() < 6, name
    Image.fromarray(gray.astype("i4")).save(tmp_path / "b.tif")
    Image.fromarray(gray.astype("f4")).save(tmp_path / "c.tif")
    (tmp_path / "d.pfm").write_bytes(b"Pf\n8 8\n-1.0\n" + (gray[::-1] / 65535).astype("<f4").tobytes())
    for name in ("b.tif", "c.tif", "d.pfm"):
        assert td.read_image({"bytes": None, "path": str(tmp_path / name)}) is None
        assert "black and white are unknown" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_a_color_profile_and_transparency_are_seen(mode):
    """The profile is sRGB with red and green exchanged; what is transparent lies on white."""
    td.image_size = 8
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = srgb.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")

    def read(image, **options):
        image.save(file := io.BytesIO(), "png", **options)
        return td.read_image({"bytes": file.getvalue(), "path": None})[:, 4, 4].tolist()

    color = Image.new("RGB", (8, 8), (200, 50, 100))
    image = color.quantize() if mode == "P" else color.convert(mode)
    assert read(image, icc_profile=profile) == pytest.approx([50, 200, 100], abs=2)
    assert read(image, icc_profile=b"none") == [200, 50, 100]
    assert read(color.convert("L"), icc_profile=profile) == read(color.convert("L"))  # it does not fit
    # Where the image is opaque, its profile is used.
    for alpha, expected in (0, [255, 255, 255]), (255, [50, 200, 100]):
        color.putalpha(alpha)
        assert read(color, icc_profile=profile) == pytest.approx(expected, abs=2)
    damaged = b"Exif\0\0II*\0"
    assert read(image, exif=damaged) == [200, 50, 100]


def test_every_way_to_name_images_reads_the_same(prepare, picture_folder, tmp_path):
    names = ["blue", "green", "red"]
    files = sorted(picture_folder.rglob("*.png"))
    pixels = [np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in files]
    expected = sorted((p, names.index(path.parent.name)) for p, path in zip(pixels, files))
    splits, data, found, _ = prepare()
    assert data["rows"] == {"train": 108, "validation": 6, "test": 6} and data["shape"] == [3, 8, 8]
    assert data["classes"] == found == names and content(splits, data) == expected
    splits, data, _, log = prepare(f"{picture_folder}/*/*.png", label_column="")
    assert content(splits, data) == [(p, 0) for p, _ in expected] and "training without classes" in log
    columns = {"image_column": "img", "label_column": "kind"}
    table = {"img": [*map(str, files)], "kind": [path.parent.name for path in files], "n": range(120)}
    strings = datasets.Dataset.from_dict(table).cast_column("img", datasets.Image())
    numbers = strings.cast_column("kind", datasets.ClassLabel(names=names))
    strings.to_parquet(tmp_path / "strings.parquet")
    numbers.to_parquet(tmp_path / "both/train-00000-of-00001.parquet")
    numbers.select(range(5)).to_parquet(tmp_path / "both/test-00000-of-00001.parquet")
    write(tmp_path / "both/screenshot.png")
    splits, data, _, log = prepare(tmp_path / "strings.parquet", **columns)
    assert content(splits, data) == expected and "not used: n" in log
    splits, data, _, log = prepare(tmp_path / "both", **columns)
    assert len(splits.pop("test")) == 5 and content(splits, data) == expected and "left out: 1 files" in log


def test_splits_and_classes_are_folders(prepare, tmp_path):
    """An image's own name is no split and no pattern; hidden files are not read; each file is read once."""
    files = ["train/cat/test.png", "train/cat/s1/a.png", "Training/[dog]/b*.PNG", "more/val/cat/c.png"]
    for name in (*files, "eval_2/[dog]/d::e.png", ".hidden/cat/a.png", "train/cat/.thumb.png"):
        write(tmp_path / "far" / name)
    (tmp_path / "data [1]").symlink_to(tmp_path / "far")
    for pattern in ("far/**/*", "data [1]"):
        splits, data, names, _ = prepare(tmp_path / pattern)
        found = {split: named(part, names) for split, part in splits.items()}
        assert found == {"train": ["[dog]", "cat", "cat"], "validation": ["cat"], "test": ["[dog]"]}
        assert data["shape"] == [1, 8, 8]  # all are gray
        if pattern == "far/**/*":  # this one would go round the loop
            (tmp_path / "far/train/loop").symlink_to(tmp_path / "far")


def test_metadata_and_captions(prepare, captioned, tmp_path, capsys):
    how = {"init_from": "a pipeline", "dataset": tmp_path / "folder"} | WHOLE
    path = shutil.copytree(captioned, tmp_path / "folder") / "metadata.jsonl"
    table = datasets.Dataset.from_json(str(path))
    lists = table.map(lambda row: {"text": [row["text"], "another"]})  # of which the first counts
    for suffix, save in (".jsonl", table.to_json), (".jsonl", lists.to_json), (".csv", table.to_csv):
        path.unlink()
        save(path := path.with_suffix(suffix))
        splits, _, names, _ = prepare(**how)
        assert named(splits["train"], names) == sorted(table["text"])
    path.write_text("file_name, label,by\n00.png,NA\n01.png,7,me\n02.png,\n03.png,None\nno.png,a\n")
    splits, _, names, log = prepare(**how | {"init_from": "scratch"})
    assert named(splits["train"], names) == ["7", "NA", "None", "None"] and names == ["7", "NA", "None"]
    assert "left out: 8 images" in log and "1 images in the metadata file are not in " in log
    assert "columns that are not used: by" in log
    path.unlink()
    assert prepare(**how, caption="a square")[2] == ["a square"]
    with pytest.raises(SystemExit):
        prepare(**how)
    assert "lacks captions for 12 images" in capsys.readouterr().err
    for path in (tmp_path / "folder").glob("*.png"):
        path.with_suffix(".txt").write_text(f"picture {path.stem}\n", encoding="utf-8-sig")
    shutil.copy(tmp_path / "folder/00.png", tmp_path / "folder/00.webp")  # has the same caption file
    assert sorted(prepare(**how)[2]) == [f"picture {i:02}" for i in range(12)]
    assert "not used: 12 .txt files" in prepare(**how | {"init_from": "scratch"})[3]


def test_a_changed_image_is_read_anew_and_unreadable_ones_are_counted(prepare, tmp_path):
    """At the second start too. The changed one has the same name and size."""
    for i in range(4):
        write(tmp_path / f"{i}.bmp", i)
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "3.bmp").read_bytes()[:60])
    (tmp_path / "empty.jpg").write_bytes(b"")
    starts = [("", [0, 1, 2, 3])] * 2 + [("3.bmp", [0, 1, 2, 77]), ("empty.jpg", [0, 1, 2, 77, 77])]
    for changed, levels in starts:
        if changed:
            write(tmp_path / changed, 77)
        splits, data, _, log = prepare(tmp_path, **WHOLE)
        assert [p[0] for p, _ in content(splits, data)] == levels
        assert f"train: {6 - len(levels)} of 6 images are left out because they cannot be read" in log


def test_a_mirror_image_is_in_the_split_of_its_image(prepare):
    whole, data, _, _ = prepare(**WHOLE)
    splits, found, _, _ = prepare(flip=True, val_fraction=0.07, test_fraction=0.11)
    assert found["rows"] == {"train": 196, "validation": 16, "test": 28}
    for split in splits.values():
        x = td.collate(list(split), data["shape"])[0]
        assert torch.equal(x[1::2], x[::2].flip(-1))
    kept = {name: split.select(range(0, len(split), 2)) for name, split in splits.items()}
    assert content(kept, data) == content(whole, data)


def test_the_rows_of_a_step_are_a_function_of_seed_and_step():
    td.batch_size = 12
    whole = list(td.batch_rows(100, 0, 20, 12, 1, 0))
    for world, n in (1, 3), (2, 2), (4, 1):
        parts = [td.batch_rows(100, 0, 20, 12 // n // world, world, rank) for rank in range(world)]
        joined = [sum(micro_batches, []) for micro_batches in zip(*parts)]
        assert [sum(joined[i : i + n], []) for i in range(0, 20 * n, n)] == whole
    assert list(td.batch_rows(100, 7, 20, 12, 1, 0)) == whole[7:]  # a resume
    epochs = [{*sum(whole[i : i + 8], [])} for i in (0, 8)]
    assert len(epochs[0]) == len(epochs[1]) == 96 and whole[:8] != whole[8:16]
    assert {*next(td.batch_rows(5, 0, 1, 12, 1, 0))} == {*range(5)}  # few are repeated


def test_noise_and_times_are_a_function_of_seed_and_step(monkeypatch):
    """Times are logit-normal, and a tenth of the classes is hidden: within four standard errors."""
    td.batch_size = 1200
    dit = td.DiT((3, 4, 4), [""] * 99)
    x_0, cond = torch.randn(1200, 3, 4, 4), torch.arange(1200)[:, None] % 99

    def make(step, world=1, rank=0, n=1):
        monkeypatch.setattr(td, "WORLD", world)
        monkeypatch.setattr(td, "RANK", rank)
        micro_batches = [*zip(x_0.chunk(n * world), cond.clone().chunk(n * world))]
        return td.make_noisy_batches(dit, micro_batches[rank::world], step, torch.device("cpu"))

    [whole] = make(5)
    parts = sum(zip(make(5, 2, 0, 3), make(5, 2, 1, 3)), ())
    assert all(torch.equal(torch.cat(cut), one) for cut, one in zip(zip(*parts), whole))
    assert not (whole[1] == make(6)[0][1]).any()
    t = whole[1].logit()
    assert abs(t.mean()) < 0.12 and abs(t.std() - 1) < 0.09
    assert abs((whole[2] == 99).float().mean() - 0.1) < 0.035


def test_the_average_of_the_weights_is_that_of_diffusers():
    td.ema_decay = 0.3  # both have less in the first steps
    layer = torch.nn.Linear(3, 3)
    ours = td.EMA(layer)
    theirs = EMAModel(layer.parameters(), decay=0.3)
    theirs.optimization_step = 1
    for step in range(1, 12):
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        ours.update(step)
        theirs.step(layer.parameters())
        averages = zip(ours.averages.values(), theirs.shadow_params)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in averages)


@pytest.mark.parametrize("kind, added", [("bf16", ""), ("no", ""), ("no", "; loss.item()")])
def test_a_step_waits_for_the_device_once(tmp_path, tiny, monkeypatch, kind, added):
    """From the first backward pass to the last; a wait that is added to the loop is seen."""
    line = "loss += micro_loss.detach()"
    trainer = check_out(tmp_path / "checkout", (line, line + added), trainer="train_diffusion.py")
    never = [f"--{name}_interval=0" for name in ("eval", "save", "log")]
    with Waits(monkeypatch) as waits:
        within(trainer, tiny, *never, f"--mixed_precision={kind}", "--max_steps=8")
    steps = " ".join(waits.found).partition("backward")[2].rpartition(" backward")[0]
    assert (steps == " tolist backward" * 6 + " tolist") == (added == ""), steps


def test_the_run_directory(tmp_path, tiny):
    """At step 0 the prediction is 0, so the loss of flow, E(eps - x_0)^2, is the same at all times."""
    out = tmp_path / "run"
    within("train_diffusion.py", tiny)
    made = json.loads((out / "run.json").read_text())
    assert (made["kind"], made["model"], made["summary"]["steps"]) == ("diffusion", "DiT", 40)
    assert made["parameters"] == sum(w.numel() for w in load_file(out / "model.safetensors").values())
    assert made["summary"]["test/loss"] == rows(out, "test/loss")[0]["test/loss"]
    assert {"step", "lr", "grad_norm", "epoch", "train/loss"} == rows(out, "train/loss")[0].keys()
    evaluated = rows(out, "val/loss")
    assert [row["step"] for row in evaluated] == [0, 10, 20, 30, 40]
    assert evaluated[-1]["val/loss"] < evaluated[0]["val/loss"]
    for row in evaluated:
        quarters = [value for name, value in row.items() if name.startswith("val/loss/")]
        assert len(quarters) == 4 and np.mean(quarters) == pytest.approx(row["val/loss"])
        assert (max(quarters) < min(quarters) + 1e-5) == (row["step"] == 0)
    model = td.load(out, made)
    drawn = td.draw(model, td.sample_conditions(model), range(1337, 1373))
    assert np.array_equal(drawn, read_grid(out / "samples/step_00000040.png", 8, 36))


def test_latents_are_those_of_the_autoencoder(prepare, tmp_path, tiny, monkeypatch):
    theirs = make_vae(4, scaling_factor=0.7, shift_factor=0.1).eval()
    theirs.save_pretrained(tmp_path / "vae")
    pixels, data, _, _ = prepare(flip=True, **WHOLE)
    x = td.collate(list(pixels["train"]), data["shape"])[0]
    latents, data, _, _ = prepare(flip=True, vae=str(tmp_path / "vae"), **WHOLE)
    z = td.collate(list(latents["train"]), data["shape"])[0]
    with torch.no_grad():
        expected = (theirs.encode(x).latent_dist.mode() - 0.1) * 0.7
        decoded = theirs.decode(expected / 0.7 + 0.1).sample.clamp(-1, 1)
    assert data["shape"] == [4, 4, 4] and torch.allclose(z, expected, atol=2e-3)
    monkeypatch.setattr(td, "sample", lambda *_: expected)
    model = types.SimpleNamespace(class_names=[], parameters=lambda: iter([x]))
    drawn = torch.tensor(np.stack(td.draw(model, [""], [0])))
    assert (drawn - (decoded.permute(0, 2, 3, 1) + 1) * 127.5).abs().max() < 0.51
    within("train_diffusion.py", tiny, f"--vae={tmp_path / 'vae'}", "--max_steps=10")
    assert Image.open(tmp_path / "run/samples/step_00000010.png").size == (48, 48)


LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes=1")
STOPS = [
    ((), lambda process: process.kill(), -SIGKILL),
    (LAUNCH, lambda process: os.killpg(process.pid, SIGINT), -SIGINT),
    ((), lambda process: process.send_signal(SIGHUP), 128 + SIGHUP),
    ((), lambda process: process.stdout.close(), 128 + SIGTERM),
]


def test_killed_and_stopped_is_the_same_as_unbroken(tmp_path, tiny):
    """kill -9; then Ctrl-C to the launcher and the trainer, a closed terminal, a reader that has gone."""
    out = tmp_path / "run"
    (tmp_path / "slow.py").write_text(conftest.PLANT % "time.sleep(0.05) or loss")
    how = (tiny, "--max_steps=80", "--log_interval=1", "--flip=True", "--micro_batch_size=4")
    within("train_diffusion.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    how = (conftest.ROOT / "train_diffusion.py", *how, "--num_workers=1", "--resume=True")
    step = 12
    for command, stop, code in STOPS:
        process = conftest.start(*command, *how, tmp_path / "slow.py", process_group=0)
        conftest.wait_for_step(out, step, process)
        stop(process)
        process.stderr.read()
        assert process.wait(timeout=60) == code
        saved = last_state(out)["progress"]["step"]
        assert saved >= step or code == -SIGKILL
        step = rows(out)[-1]["step"] + 3
    assert f"at step {saved}\n" in within(*how)[0] and 20 < saved < 80
    assert not lost(tmp_path / "unbroken", out)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_processes_train_as_one_and_each_goes_on_with_the_others_run(tmp_path, tiny, optimizer):
    one = tmp_path / "one"
    run = tmp_path / "run"
    how = ["train_diffusion.py", tiny, f"--optimizer={optimizer}", "--lr_schedule=constant"]
    how += ["--max_steps=30", "--micro_batch_size=2", "--resume=True"]
    within(*how, f"--out_dir={one}")
    forked(*how, "--max_steps=10")
    within(*how, "--max_steps=20")
    forked(*how, "--max_steps=30")
    for name in ("train/loss", "val/loss", "test/loss"):
        expected = {row["step"]: row[name] for row in rows(one, name)}
        assert {row["step"]: row[name] for row in rows(run, name)} == pytest.approx(expected, rel=1e-3)
    for name in ("ema", "model"):
        expected, weights = (last_state(out)[name] for out in (one, run))
        assert expected.keys() == weights.keys()
        for key, weight in expected.items():
            assert (weight - weights[key]).abs().max() < 1e-3 * weight.abs().max().clamp(min=1e-2), key
    assert {path.name for path in one.rglob("*")} == {path.name for path in run.rglob("*")}


def test_a_nan_in_one_process_is_skipped_by_both_and_ten_end_the_run(tmp_path, tiny):
    for name, steps in ("two", (6, 7)), ("ten", range(3, 13)):
        (tmp_path / f"{name}.py").write_text(conftest.BAD % [("1", step) for step in steps])
    how = ("train_diffusion.py", tiny, "--save_interval=5", "--resume=True")
    assert forked(*how, tmp_path / "two.py", "--max_steps=20").count("not finite: skipped") == 2
    assert "ten steps in a row were not finite" in forked(*how, tmp_path / "ten.py", code=2)
    assert all(weight.isfinite().all() for weight in last_state(tmp_path / "run")["model"].values())


def test_a_longer_run_keeps_the_best_weights_of_the_one_that_it_goes_on_from(tmp_path, tiny):
    """Also if the averages of the weights are only turned on now, and if the weights get worse from here on."""
    run = tmp_path / "run"
    within("train_diffusion.py", tiny, "--max_steps=10", "--ema_decay=0")
    weights = (run / "model.safetensors").read_bytes()
    best = json.loads((run / "run.json").read_text())["summary"]["val/loss"]
    worse = ("--adamw_lr=10", "--lr_schedule=constant", "--resume=True", "--ema_decay=0.9")
    within("train_diffusion.py", tiny, "--max_steps=20", *worse)
    assert rows(run, "val/loss")[-1]["val/loss"] > best
    assert json.loads((run / "run.json").read_text())["summary"]["val/loss"] == best
    assert (run / "model.safetensors").read_bytes() == weights


CHANGES = ["seed=7", "batch_size=4", "image_size=16", "flip=True", "vae=x", "init_from=x", "lora_rank=8"]
CHANGES += ["prediction=v", "patch_size=4", "n_layer=3", "optimizer=adamw", "beta1=0.5", "weight_decay=0.5"]


def test_what_a_resume_may_not_change_is_refused_and_left_alone(tmp_path, tiny, picture_folder):
    """Before the data is touched: there is none any more. Then other data of as many images, bad checkpoints."""
    within("train_diffusion.py", tiny, "--max_steps=10")
    before = conftest.contents(tmp_path / "run")
    assert "--resume=True or --overwrite=True" in refusal("train_diffusion.py", tiny)
    for change in CHANGES:
        how = (tiny, "--resume=True", "--dataset=nothing", f"--{change}")
        assert f" with {change.split('=')[0]}=" in refusal("train_diffusion.py", *how)
    data = shutil.copytree(picture_folder, tmp_path / "data")
    shutil.copy(data / "red/000.png", data / "red/003.png")
    assert "other train data" in refusal("train_diffusion.py", tiny, "--resume=True", f"--dataset={data}")
    assert conftest.contents(tmp_path / "run") == before
    within("train_diffusion.py", tiny, "--max_steps=10", "--n_layer=1", f"--out_dir={tmp_path / 'other'}")
    checkpoint = tmp_path / "run/checkpoint.pt"
    for content in (b"none", (tmp_path / "other/checkpoint.pt").read_bytes()):
        checkpoint.write_bytes(content)
        assert str(checkpoint) in refusal("train_diffusion.py", tiny, "--resume=True")
        assert checkpoint.read_bytes() == content
    within("train_diffusion.py", tiny, "--max_steps=0", "--overwrite=True")


MLP, TABLE = "self.mlp = MLP()", "nn.Embedding(len(class_names) + 1, n_embd)"
EDITS = {  # the commonest: old and new text
    "biases": [("n_embd, n_embd, bias=False", "n_embd, n_embd, bias=True")],
    "gates": [("nn.Linear(4 * n_embd", "nn.Linear(2 * n_embd"), ("F.relu(self", "F.glu(self")],
    "gain": [(MLP, "self.mlp = nn.Sequential(nn.RMSNorm(n_embd), MLP())")],
    "convolution": [(MLP, "self.mlp = nn.Sequential(MLP(), nn.Conv1d(16, 16, 3, padding=1))")],
    "table": [(TABLE, f"nn.Sequential({TABLE}, nn.Linear(n_embd, n_embd))")],
    "shared": [("ModuleList(Block() for _ in range(n_layer))", "ModuleList([Block()] * n_layer)")],
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_trains_resumes_and_draws(tmp_path, tiny, edit):
    """The loss falls, each weight moves, and sample.py of the edited files draws one of the samples again."""
    trainer = check_out(tmp_path / "checkout", *EDITS[edit], trainer="train_diffusion.py")
    out = tmp_path / "run"
    how = (tiny, "--lr_schedule=constant", "--val_fraction=0", "--log_interval=1")
    within(trainer, *how, "--max_steps=10")
    before = last_state(out)["model"]
    within(trainer, *how, "--max_steps=60", "--resume=True")
    assert not [name for name, w in last_state(out)["model"].items() if torch.equal(before[name], w)]
    losses = [row["train/loss"] for row in rows(out, "train/loss")]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    how = (f"--out_dir={out}", f"--output={tmp_path / 'a.png'}", "--class_label=green", f"--seed={1337 + 18}")
    within(trainer.with_name("sample.py"), *how)
    grid = read_grid(out / "samples/step_00000060.png", 8, 36)
    assert np.array_equal(read_grid(tmp_path / "a.png", 8, 1)[0], grid[18])
