"""
The language-model trainer through its real command: the run directory is native to transformers, unless the model was
edited; the samples are those of transformers; the loop's promises on learning rate, skipping, stopping and reporting.
"""

import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, TINY, TINY_MODEL, last_state, rows, run, within

import train_lm


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    config = out.with_name("config.py")
    config.write_text(
        TINY_MODEL["train_lm.py"] + TINY + f"dataset = {str(text_file)!r}\nlearning_rate = 0.05\n"
    )
    stdout, _ = run("train_lm.py", config, f"--out_dir={out}")
    return out, stdout


def test_the_run_directory_is_a_model_of_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    out, stdout = trained
    assert "edited" not in stdout
    theirs, tok = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert theirs.config.model_type == "nanochat" and len(tok) == theirs.config.vocab_size == 257
    ours = train_lm.GPT(train_lm.Shape(**json.loads((out / "run.json").read_text())["model"])).eval()
    ours.load_state_dict(train_lm.load_file(out / "model.safetensors"))
    x = torch.tensor([tok("def __init__(self, prog)").input_ids])
    logits = ours(x)
    assert (logits - theirs(x).logits).abs().max() < 1e-4 and logits.std() > 0.1
    answer = pipeline("text-generation", model=str(out))("def ", max_new_tokens=5, do_sample=False)
    assert answer[0]["generated_text"].startswith("def ")


def test_a_large_model_is_sampled_in_bf16_where_run_and_hardware_are(tmp_path, tiny, monkeypatch):
    """Ten million weights and more; the logits are those of fp32 within bf16's 8 bits. Small ones stay in fp32."""
    import sample

    out = tmp_path / "run"
    how = (
        f"--out_dir={out}",
        "--n_layer=1",
        "--max_steps=1",
        "--overwrite=True",
        "--n_head=2",
        "--n_kv_head=1",
    )
    found = []
    for precision, can, width, dtype in (
        ("bf16", {}, 1024, torch.float32),
        ("bf16", {"amx_bf16": True}, 1024, torch.bfloat16),
        ("no", {"avx512_bf16": True}, 1024, torch.float32),
        ("bf16", {"avx512_bf16": True}, 64, torch.float32),
    ):
        within("train_lm.py", tiny, *how, f"--n_embd={width}", f"--mixed_precision={precision}")
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: can, raising=False)
        _, _, model = sample.load_run(out, out, "cpu")
        assert {p.dtype for p in model.parameters()} == {dtype}
        found.append(model)
    weights = found[0].state_dict()
    assert all(
        torch.equal(w, weights[name].bfloat16()) for name, w in found[1].state_dict().items() if w.ndim == 2
    )
    with torch.no_grad():
        fp32, bf16 = (model(torch.arange(32)[None]) for model in found[:2])
        assert (fp32 - bf16).abs().max() < 0.03 * fp32.abs().max()
    assert len(list(found[1].generate([[1, 2], [3]], 5, temperature=0))) == 5


def test_greedy_samples_equal_those_of_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = trained
    stdout, _ = within(
        "sample.py", f"--out_dir={out}", "--prompt=def ", "--temperature=0", "--max_new_tokens=24"
    )
    model, tok = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    x = tok("def ", return_tensors="pt")
    theirs = model.generate(**x, max_new_tokens=24, do_sample=False)[0]
    assert stdout == tok.decode(theirs, skip_special_tokens=True) + "\n"
    again, _ = within("sample.py", f"--out_dir={out}", "--prompt=def ", "--seed=3", "--num_samples=2")
    assert (
        again
        == within("sample.py", f"--out_dir={out}", "--prompt=def ", "--seed=3", "--num_samples=2")[0]
        != stdout
    )
    # of any folder that transformers can load, ours among them when run.json is taken away
    stock = out.with_name("stock")
    stock.mkdir()
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copy(out / name, stock)
    assert (
        stdout
        == within(
            "sample.py", f"--out_dir={stock}", "--prompt=def ", "--temperature=0", "--max_new_tokens=24"
        )[0]
    )


def test_a_checkpoint_speaks_too(trained, tmp_path):
    out, _ = trained
    (tmp_path / "prompt.txt").write_text("import ")
    newest = max((out / "checkpoints").glob("step_*"))
    how = ("--prompt=FILE:" + str(tmp_path / "prompt.txt"), "--max_new_tokens=9")
    stdout, _ = within("sample.py", f"--out_dir={newest}", *how)
    assert stdout.startswith("import ")


def test_metrics_summary_and_samples(trained):
    out, stdout = trained
    val, train, test = rows(out, "val/loss"), rows(out, "train/loss"), rows(out, "test/loss")
    assert [r["step"] for r in val] == [0, 10, 20, 30, 40]
    assert [r["step"] for r in train] == list(range(5, 45, 5))
    assert len(test) == 1 and test[0]["step"] == 40
    assert val[0]["val/loss"] == pytest.approx(math.log(257), rel=1e-5) and val[-1]["val/loss"] < 3.5
    facts = json.loads((out / "run.json").read_text())
    assert facts["summary"]["test/loss"] == test[0]["test/loss"]
    n = facts["data"]["splits"]["test"]
    bits = test[0]["test/loss"] / math.log(2) * n["tokens"] / n["bytes"]
    assert (
        test[0]["test/bits_per_byte"] == pytest.approx(bits)
        and f"test/loss: {test[0]['test/loss']}" in stdout
    )
    assert max(p.name for p in (out / "samples").iterdir()) == "step_00000040.txt"
    assert len(list((out / "checkpoints").iterdir())) == 2
    assert str(ROOT) not in (out / "run.json").read_text().replace(str(out), "")


def test_the_whole_split_is_evaluated(trained, monkeypatch, tmp_path):
    """test/loss is that of every token of the split given the block before it, with the kept weights."""
    out, _ = trained
    config = json.loads((out / "run.json").read_text())
    for name, value in config["settings"].items():
        monkeypatch.setattr(train_lm, name, value)
    folder, _ = train_lm.prepare_data()
    tokens = torch.from_numpy(train_lm.np.fromfile(folder / "test.bin", train_lm.np.uint16).astype("int64"))
    gpt = train_lm.GPT(train_lm.Shape(**config["model"])).eval()
    gpt.load_state_dict(train_lm.load_file(out / "model.safetensors"))
    loss = 0.0
    for i in range(0, len(tokens) - 1, 32):
        block = tokens[i : i + 33]
        loss += torch.nn.functional.cross_entropy(gpt(block[None, :-1])[0], block[1:], reduction="sum").item()
    assert rows(out, "test/loss")[0]["test/loss"] == pytest.approx(loss / (len(tokens) - 1), rel=1e-5)


def test_an_edit_that_only_long_texts_show_is_noticed(tmp_path, monkeypatch):
    """A window of 100 tokens of attention, where texts have 256."""
    attend, tok = train_lm.attend, type("Tokenizer", (), {"eos_token_id": 0})
    monkeypatch.setattr(train_lm, "out_dir", str(tmp_path))
    shape = train_lm.Shape(64, 256, 1, 2, 2, 32)

    def windowed(q, k, v, mask, dropout):
        i = torch.arange(q.size(2))
        return attend(q, k, v, (i <= i[:, None]) & (i > i[:, None] - 100), dropout)

    for change, native in ((windowed, False), (attend, True)):
        monkeypatch.setattr(train_lm, "attend", change)
        train_lm.write_config(shape, tok)
        assert ("model_type" in json.loads((tmp_path / "config.json").read_text())) == native


def test_an_edited_model_is_not_called_native_and_still_speaks(tmp_path, tiny):
    """One line of the model is changed, as a researcher would; the copy of the checkout trains and samples."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("sample.py", "configurator.py"):
        shutil.copy(ROOT / name, checkout)
    source = (ROOT / "train_lm.py").read_text()
    assert source.count("F.relu(self.fc1(x)).square()") == 1
    (checkout / "train_lm.py").write_text(
        source.replace("F.relu(self.fc1(x)).square()", "F.gelu(self.fc1(x))")
    )
    stdout, _ = within(checkout / "train_lm.py", tiny, "--max_steps=10")
    assert "edited model: only sample.py loads this run" in stdout
    out = tmp_path / "run"
    assert "model_type" not in json.loads((out / "config.json").read_text())
    speak = (f"--out_dir={out}", "--prompt=def ", "--max_new_tokens=5")
    text, _ = within(checkout / "sample.py", *speak)
    assert text.startswith("def ")
    # a checkout with another model refuses to load it wrongly, and runs the copy only when it is told to
    _, err = within("sample.py", *speak, code=2)
    assert "--trust_run_code=True" in err and err.count("\n") == 1
    assert within("sample.py", *speak, "--trust_run_code=True")[0] == text


def test_learning_rates_follow_their_closed_forms(monkeypatch):
    for name, value in {"warmup_steps": 10, "cooldown": 0.5, "min_lr": 0.1}.items():
        monkeypatch.setattr(train_lm, name, value)
    expected = {
        "constant": lambda s: 1.0,
        "wsd": lambda s: 1.0 if s <= 50 else 0.1 + 0.9 * (100 - s) / 50,
        "cosine": lambda s: 0.1 + 0.45 * (1 + math.cos(math.pi * (s - 10) / 90)),
    }
    for name, f in expected.items():
        monkeypatch.setattr(train_lm, "lr_schedule", name)
        for step in range(101):
            warm = (step + 1) / 11
            assert train_lm.lr_at(step, 100) == pytest.approx(warm if step < 10 else f(step)), (name, step)


def test_early_stopping_keeps_the_best_weights(tmp_path, tiny):
    within(
        "train_lm.py",
        tiny,
        "--learning_rate=3",
        "--embed_lr=30",
        "--max_steps=400",
        "--patience=2",
        "--warmup_steps=0",
    )
    out = tmp_path / "run"
    val = [r["val/loss"] for r in rows(out, "val/loss")][1:]
    best = val.index(min(val))
    assert len(val) == best + 3 < 40
    stopped_at = 10 * len(val)
    assert last_state(out)["progress"]["step"] == stopped_at
    within("train_lm.py", tiny, "--learning_rate=3", "--embed_lr=30", "--max_steps=400", "--patience=2", "--warmup_steps=0",
        "--resume=True")  # fmt: skip
    assert [r["val/loss"] for r in rows(out, "val/loss")][1:] == val  # it stops again where it stopped


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_steps_that_are_not_finite_are_skipped_and_ten_end_the_run(tmp_path, tiny, optimizer):
    """A copy of the script in which the loss is NaN at some steps, or from step 15 on."""
    plant = "                    loss = model(*batch)\n"
    source = (ROOT / "train_lm.py").read_text()
    assert source.count(plant) == 1
    (tmp_path / "configurator.py").write_text((ROOT / "configurator.py").read_text())
    for steps, n, code in (("3 < step < 9", 5, 0), ("step >= 15", 10, 1)):
        bad = f"                    loss = loss * (math.nan if {steps} else 1)\n"
        (tmp_path / "train_lm.py").write_text(source.replace(plant, plant + bad))
        how = ("--overwrite=True", f"--optimizer={optimizer}")
        stdout, err = within(tmp_path / "train_lm.py", tiny, *how, code=code)
        assert sum(line.endswith("skipped") for line in stdout.splitlines()) == n
    assert "step_00000020" in err and "Traceback" not in err
    assert all(torch.isfinite(w).all() for w in last_state(tmp_path / "run")["model"].values())


@pytest.mark.parametrize(
    "plant, names",
    [("torch.log(x - x.detach() - 1)", "aten.log"), ("(x - x.detach()).abs().sqrt()", "SqrtBackward0")],
    ids=["forward", "backward"],
)
def test_detect_anomaly_names_the_operation(tmp_path, tiny, plant, names):
    source = (ROOT / "train_lm.py").read_text()
    line = "        x = norm(x if cache is None else x[:, -1:])\n"
    assert source.count(line) == 1
    (tmp_path / "train_lm.py").write_text(source.replace(line, line + f"        x = x + {plant}\n"))
    (tmp_path / "configurator.py").write_text((ROOT / "configurator.py").read_text())
    _, err = within(tmp_path / "train_lm.py", tiny, "--detect_anomaly=True", "--val_fraction=0", code=1)
    last = err.strip().splitlines()[-1]
    assert names in last and "step " in last and "Traceback (most recent call last)" not in last
    if names == "aten.log":
        assert "torch.log(x - x.detach() - 1)" in last


def test_profile_leaves_a_trace_and_a_table(tmp_path, tiny):
    within("train_lm.py", tiny, "--profile=True", "--max_steps=10")
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    assert any("scaled_dot_product" in event.get("name", "") for event in trace["traceEvents"])
    assert "aten::mm" in (tmp_path / "run" / "profile" / "table.txt").read_text()


def test_max_steps_0_only_evaluates_and_no_validation_split_works(tmp_path, tiny):
    within("train_lm.py", tiny, "--max_steps=0")
    assert len(rows(tmp_path / "run")) == 2
    within("train_lm.py", tiny, "--val_fraction=0", "--overwrite=True", "--max_steps=10")
    assert not rows(tmp_path / "run", "val/loss") and rows(tmp_path / "run", "test/loss")


def test_keep_last_keeps_the_last_weights(tmp_path, tiny):
    within("train_lm.py", tiny, "--keep=last", "--max_steps=20", "--epochs=0")
    weights, state = (
        train_lm.load_file(tmp_path / "run" / "model.safetensors"),
        last_state(tmp_path / "run")["model"],
    )
    assert weights.keys() == state.keys() and all(torch.equal(weights[k], state[k]) for k in weights)


def test_epochs_count_passes_over_the_data(tmp_path, tiny):
    within("train_lm.py", tiny, "--epochs=1.5", "--block_size=512", "--eval_interval=100")
    n = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["splits"]["train"]["tokens"]
    assert last_state(tmp_path / "run")["progress"]["step"] == math.ceil(1.5 * ((n - 512) // 512) / 8)


def test_trackers(tmp_path, tiny):
    """tensorboard gets the numbers of metrics.jsonl; wandb, offline, goes on under one id after a resume."""
    within("train_lm.py", tiny, "--tracker=tensorboard", "--max_steps=10")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next((tmp_path / "run").rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    logged = [(e.step, e.value) for e in accumulator.Scalars("val/loss")]
    assert logged == [
        (r["step"], pytest.approx(r["val/loss"], rel=1e-6)) for r in rows(tmp_path / "run", "val/loss")
    ]
    run("train_lm.py", tiny, "--tracker=wandb", "--max_steps=10", "--overwrite=True")
    run("train_lm.py", tiny, "--tracker=wandb", "--max_steps=20", "--resume=True")
    runs = [p.name.rsplit("-", 1)[1] for p in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and set(runs) == {last_state(tmp_path / "run")["progress"]["tracker_id"]}


def test_bf16_and_gradient_checkpointing_train_as_well(tmp_path, tiny):
    how = ("--mixed_precision=bf16", "--gradient_checkpointing=True", "--dropout=0.1", "--deterministic=True")
    within("train_lm.py", tiny, *how)
    assert rows(tmp_path / "run", "val/loss")[-1]["val/loss"] < 4.5
    assert all(
        w.dtype == torch.float32 for w in train_lm.load_file(tmp_path / "run" / "model.safetensors").values()
    )


def test_a_tracker_that_is_not_installed_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train_lm, "tracker", "tensorboard")
    monkeypatch.setattr(train_lm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train_lm.check_settings()
    assert stop.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err
