"""
The language-model trainer through its real command: the run directory is native to transformers, unless the model was
edited; the commonest edits train, save, resume and speak; the loop's promises on learning rate, skipping, stopping,
reporting.
"""

import itertools
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, TINY, TINY_MODEL, last_state, rows, run, within
from safetensors.torch import load_file

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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, stdout = trained
    assert "edited" not in stdout
    theirs, tok = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert theirs.config.model_type == "nanochat" and len(tok) == theirs.config.vocab_size == 257
    with pytest.MonkeyPatch.context() as patch:
        for name in train_lm.settings(vars(train_lm)):
            patch.setattr(train_lm, name, getattr(train_lm, name))  # which load() sets
        ours, _ = train_lm.load(out, json.loads((out / "run.json").read_text()))
    x = tok("def __init__(self, prog)", return_tensors="pt")
    logits = ours(x.input_ids)
    assert (logits - theirs(**x).logits).abs().max() < 1e-4 and logits.std() > 0.1
    greedy = ("--prompt=def ", "--temperature=0", "--max_new_tokens=24")
    stdout, _ = within("sample.py", f"--out_dir={out}", *greedy)
    x = tok("def ", return_tensors="pt")
    text = tok.decode(theirs.generate(**x, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)
    assert stdout == text + "\n"
    # of any folder that transformers can load, ours among them when run.json is taken away
    stock = out.with_name("stock")
    shutil.copytree(out, stock, dirs_exist_ok=True)
    (stock / "run.json").unlink()
    assert stdout == within("sample.py", f"--out_dir={stock}", *greedy)[0]


def test_samples_are_a_function_of_the_seed(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("import ")
    how = (f"--out_dir={trained[0]}", f"--prompt=FILE:{tmp_path / 'prompt.txt'}", "--num_samples=2")
    first, other = (within("sample.py", *how, f"--seed={seed}")[0] for seed in (3, 4))
    assert first == within("sample.py", *how, "--seed=3")[0] != other and first.startswith("import ")


def test_metrics_summary_and_samples(trained):
    out, stdout = trained
    val, train, test = rows(out, "val/loss"), rows(out, "train/loss"), rows(out, "test/loss")
    assert [r["step"] for r in val] == [0, 10, 20, 30, 40]
    assert [r["step"] for r in train] == list(range(5, 45, 5)) and [r["step"] for r in test] == [40]
    assert val[0]["val/loss"] == pytest.approx(math.log(257), rel=1e-5) and val[-1]["val/loss"] < 3.5
    facts = json.loads((out / "run.json").read_text())
    assert facts["summary"]["test/loss"] == test[0]["test/loss"]
    bits = test[0]["test/loss"] / math.log(2)  # a token is a byte, but for the end of text
    assert test[0]["test/bits_per_byte"] == pytest.approx(bits, rel=0.01)
    assert f"test/loss {test[0]['test/loss']:.4g}" in stdout
    assert max(p.name for p in (out / "samples").iterdir()) == "step_00000040.txt"
    assert str(ROOT) not in (out / "run.json").read_text().replace(str(out), "").replace(
        str(ROOT / "train_lm"), ""
    )


def test_the_whole_test_split_meets_the_kept_weights(trained, monkeypatch):
    """test/loss is that of every token of the split given the block before it, computed by transformers."""
    from transformers import AutoModelForCausalLM

    out, _ = trained
    for name, value in json.loads((out / "run.json").read_text())["settings"].items():
        monkeypatch.setattr(train_lm, name, value)
    _, splits = train_lm.prepare_data()
    theirs, loss, n = AutoModelForCausalLM.from_pretrained(out), 0.0, 0
    for row in splits["test"]:
        x = row["ids"][None]
        logits = theirs(x[:, :-1]).logits[0]
        loss += torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum").item()
        n += x.shape[1] - 1
    assert rows(out, "test/loss")[0]["test/loss"] == pytest.approx(loss / n, rel=1e-5)


BLOCK = "        self.self_attn, self.mlp = Attention(config), MLP(config)\n"
MLP_CALL = "        return x + F.dropout(self.mlp(norm(x)), dropout, self.training)\n"
EMBEDDING = "        x = norm(self.model.embed_tokens(idx))  # (B, T, C)\n"
HEAD = "        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)\n"
EDITS = {
    "biases": [("bias=False)", "bias=True)")],
    "gain": [
        (BLOCK, BLOCK + "        self.gain = nn.Parameter(torch.ones(config.hidden_size))\n"),
        (MLP_CALL, MLP_CALL.replace("self.mlp(norm(x))", "self.mlp(self.gain * norm(x))")),
    ],
    "positions": [
        (HEAD, HEAD + "        self.positions = nn.Embedding(block_size, config.hidden_size)\n"),
        (
            EMBEDDING,
            EMBEDDING.replace("(idx))", "(idx) + self.positions(torch.arange(start, start + idx.size(1))))"),
        ),
    ],
    "tied": [(HEAD, HEAD + "        self.lm_head.weight = self.model.embed_tokens.weight\n")],
    "activation": [
        (
            "n_layer = 4  # transformer blocks\n",
            'n_layer = 4  # transformer blocks\nactivation = "relu"  # or "gelu"\n',
        ),
        ("F.relu(self.fc1(x)).square()", "getattr(F, activation)(self.fc1(x)).square()"),
    ],
    "second_mlp": [
        (BLOCK, BLOCK + "        self.mlp2 = MLP(config)\n"),
        (MLP_CALL, MLP_CALL.replace("return x +", "x = x +") + "        return x + self.mlp2(norm(x))\n"),
    ],
}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_trains_saves_resumes_and_speaks(tmp_path, tiny, edit, optimizer):
    """In a copy of the files, as a researcher would: the loss falls clearly and every weight moves."""
    from transformers import AutoModelForCausalLM

    checkout, out = tmp_path / "checkout", tmp_path / "run"
    checkout.mkdir()
    for name in ("sample.py", "configurator.py"):
        shutil.copy(ROOT / name, checkout)
    source = (ROOT / "train_lm.py").read_text()
    for old, new in EDITS[edit]:
        assert old in source
        source = source.replace(old, new)
    (checkout / "train_lm.py").write_text(source)
    how = [tiny, f"--optimizer={optimizer}", "--test_fraction=0", "--lr_schedule=constant"]
    how += ["--activation=gelu"] if edit == "activation" else []
    stdout, _ = within(checkout / "train_lm.py", *how, "--max_steps=10")
    assert "edited model" in stdout
    before = last_state(out)["model"]
    within(checkout / "train_lm.py", *how, "--max_steps=60", "--resume=True")
    after = last_state(out)["model"]
    assert all(not torch.equal(before[name], after[name]) for name in after), edit
    losses = [row["val/loss"] for row in rows(out, "val/loss")]
    assert losses[0] < 6.5 and losses[-1] < losses[0] - 1.0, losses
    assert after.keys() == load_file(out / "model.safetensors").keys()
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(out)
    speak = (f"--out_dir={out}", "--prompt=def ", "--temperature=0", "--max_new_tokens=20")
    text, _ = within(checkout / "sample.py", *speak)
    assert text.startswith("def ")
    # a checkout with another model refuses to load it wrongly, and runs the copy only when it is told to
    _, err = within("sample.py", *speak, code=2)
    assert "--trust_run_code=True" in err.splitlines()[-1]
    assert within("sample.py", *speak, "--trust_run_code=True")[0] == text


def test_learning_rates_follow_their_closed_forms_and_never_jump(monkeypatch):
    def curve(schedule, n, **values):
        for name, value in {"lr_schedule": schedule, **values}.items():
            monkeypatch.setattr(train_lm, name, value)
        return [train_lm.lr_at(step, n) for step in range(n + 1)]

    how = {"warmup_steps": 10, "cooldown": 0.5, "min_lr": 0.1}
    expected = {
        "constant": lambda s: 1.0,
        "wsd": lambda s: 1.0 if s <= 50 else 0.1 + 0.9 * (100 - s) / 50,
        "cosine": lambda s: 0.1 + 0.45 * (1 + math.cos(math.pi * (s - 10) / 90)),
    }
    for name, f in expected.items():
        found = curve(name, 100, **how)
        assert found == pytest.approx([(s + 1) / 11 if s < 10 else f(s) for s in range(101)])
        for warmup in (0, 1, 20, 100, 290, 299, 300, 1000):
            for cooldown in (0.01, 0.3, 0.9, 1.0):
                found = curve(name, 300, warmup_steps=warmup, cooldown=cooldown, min_lr=0.0)
                largest = max(abs(b - a) for a, b in itertools.pairwise(found))
                assert (
                    largest
                    <= max(1 / (warmup + 1), 1 / (300 * cooldown), math.pi / 2 / max(1, 300 - warmup)) + 1e-9
                )


def test_early_stopping_keeps_the_best_weights(tmp_path, tiny):
    how = (tiny, "--learning_rate=3", "--embed_lr=30", "--max_steps=400", "--patience=2", "--warmup_steps=0")
    within("train_lm.py", *how)
    val = [r["val/loss"] for r in rows(tmp_path / "run", "val/loss")][1:]
    assert len(val) == val.index(min(val)) + 3 < 40
    within("train_lm.py", *how, "--resume=True")
    assert [r["val/loss"] for r in rows(tmp_path / "run", "val/loss")][1:] == val  # it stops where it stopped


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_steps_that_are_not_finite_are_skipped_and_ten_end_the_run(tmp_path, tiny, optimizer):
    """A copy of the script in which the loss is NaN at some steps, or from step 15 on."""
    plant = "                accelerator.backward("
    source = (ROOT / "train_lm.py").read_text()
    assert source.count(plant) == 1
    shutil.copy(ROOT / "configurator.py", tmp_path)
    for steps, n, code in (("3 < step < 9", 5, 0), ("step >= 15", 10, 1)):
        bad = f"                part = part * (math.nan if {steps} else 1)\n"
        (tmp_path / "train_lm.py").write_text(source.replace(plant, bad + plant))
        how = ("--overwrite=True", f"--optimizer={optimizer}")
        stdout, err = within(tmp_path / "train_lm.py", tiny, *how, code=code)
        assert sum(line.endswith("skipped") for line in stdout.splitlines()) == n
    assert "ten such steps in a row" in err and "Traceback" not in err
    assert all(torch.isfinite(w).all() for w in last_state(tmp_path / "run")["model"].values())


def test_profile_leaves_a_trace_and_anomaly_mode_names_the_operation(tmp_path, tiny):
    within("train_lm.py", tiny, "--profile=True", "--max_steps=10")
    assert "scaled_dot_product" in next((tmp_path / "run").glob("*.trace.json")).read_text()
    source, line = (ROOT / "train_lm.py").read_text(), "                x = block(x, cos, sin, cache)\n"
    assert source.count(line) == 1
    bad = "                x = x + (x - x.detach()).abs().sqrt()\n"
    (tmp_path / "train_lm.py").write_text(source.replace(line, line + bad))
    shutil.copy(ROOT / "configurator.py", tmp_path)
    _, err = run(tmp_path / "train_lm.py", tiny, "--detect_anomaly=True", "--overwrite=True", code=1)
    assert "SqrtBackward0" in err and "abs().sqrt()" in err


def test_max_steps_0_only_evaluates_and_no_validation_split_keeps_the_last_weights(tmp_path, tiny):
    within("train_lm.py", tiny, "--max_steps=0")
    assert len(rows(tmp_path / "run")) == 2
    within("train_lm.py", tiny, "--val_fraction=0", "--overwrite=True", "--max_steps=10")
    out = tmp_path / "run"
    assert not rows(out, "val/loss") and rows(out, "test/loss")
    weights, state = load_file(out / "model.safetensors"), last_state(out)["model"]
    assert weights.keys() == state.keys() and all(torch.equal(weights[k], state[k]) for k in weights)


def test_epochs_count_passes_over_the_data(tmp_path, tiny):
    within("train_lm.py", tiny, "--epochs=1.5", "--block_size=512", "--eval_interval=100")
    n = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]["train"]
    assert last_state(tmp_path / "run")["progress"]["step"] == math.ceil(1.5 * (n // 8))


def test_trackers(tmp_path, tiny, monkeypatch):
    """tensorboard gets the numbers of metrics.jsonl; wandb is told by its own variables where to go on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    within("train_lm.py", tiny, "--tracker=tensorboard", "--max_steps=10")
    events = next((tmp_path / "run").rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    logged = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in accumulator.Scalars("val/loss")]
    assert [(r["step"], r["val/loss"]) for r in rows(tmp_path / "run", "val/loss")] == logged
    for name, value in {"DIR": tmp_path, "RUN_ID": "mine", "RESUME": "allow", "PROJECT": "texts"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    run("train_lm.py", tiny, "--tracker=wandb", "--max_steps=10", "--overwrite=True")
    assert [p.name[-5:] for p in (tmp_path / "wandb").glob("offline-run-*")] == ["-mine"]


def test_bf16_and_gradient_checkpointing_train_as_well(tmp_path, tiny):
    how = ("--mixed_precision=bf16", "--gradient_checkpointing=True", "--dropout=0.1", "--deterministic=True")
    within("train_lm.py", tiny, *how)
    assert rows(tmp_path / "run", "val/loss")[-1]["val/loss"] < 4.5
    weights = load_file(tmp_path / "run" / "model.safetensors").values()
    assert all(weight.dtype == torch.float32 for weight in weights)
