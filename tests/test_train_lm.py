"""
The language-model trainer through its real command: the run directory is native to transformers, unless the model was
edited; the commonest edits, alone and all at once, train, save, resume and speak; a step waits for the device once; the
learning rates follow their closed forms; early stopping, precision, the length of a run, trackers.
"""

import itertools
import json
import math
import traceback

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import check_out, differences, last_state, rows, within
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_diffusion
import train_lm


def test_the_run_directory_is_a_model_of_transformers(finished, monkeypatch):
    """test/loss is that of every token of the split given the block before it, computed by transformers."""
    run = json.loads((finished / "run.json").read_text())
    for name, value in run["settings"].items():
        monkeypatch.setattr(train_lm, name, value)
    tok, splits = train_lm.prepare_data()
    theirs = AutoModelForCausalLM.from_pretrained(finished)
    assert theirs.config.model_type == "nanochat"
    assert theirs.config.vocab_size == len(tok)
    loss = 0.0
    n = 0
    for row in splits["test"]:
        x = row["ids"][None]
        loss += F.cross_entropy(theirs(x[:, :-1]).logits[0], x[0, 1:], reduction="sum").item()
        n += x.shape[1] - 1
    test = rows(finished, "test/loss")[0]
    assert test["test/loss"] == pytest.approx(loss / n, rel=1e-5)
    assert run["summary"]["test/loss"] == test["test/loss"]
    # a character is a byte here, but for the end of text
    assert test["test/bits_per_byte"] == pytest.approx(loss / n / math.log(2), rel=0.01)
    val = rows(finished, "val/loss")
    train = rows(finished, "train/loss")
    assert [row["step"] for row in val] == [0, 10, 20, 30, 40]
    assert test["step"] == 40
    assert [row["step"] for row in train] == list(range(5, 45, 5))
    assert val[0]["val/loss"] == pytest.approx(math.log(len(tok)), rel=1e-5)  # a uniform guess
    assert val[-1]["val/loss"] < val[0]["val/loss"] - 1
    assert max(path.name for path in (finished / "samples").iterdir()) == "step_00000040.txt"


def test_generate_of_transformers_never_gives_padding(tmp_path, tiny):
    """Even where the padding of the vocabulary is the likeliest: generation_config.json suppresses it."""
    within("train_lm.py", tiny, "--tokenizer=bpe:300", "--max_steps=10")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    n_tokens = len(AutoTokenizer.from_pretrained(tmp_path / "run"))
    assert (n_tokens, model.config.vocab_size) == (300, 320)
    torch.nn.init.normal_(model.lm_head.weight[300:].data, std=100.0)
    ids = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 0}
    assert model.generate(ids, **options).max() < 300
    model.generation_config.suppress_tokens = None
    assert model.generate(ids, **options).max() >= 300


MLP = "        self.mlp = MLP(config)\n"
MLP_CALL = "        x = x + F.dropout(self.mlp(norm(x)), dropout, self.training)\n"
HEAD = "        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)\n"
EDITS = {
    "activation": [
        ("\nn_layer = ", '\nactivation = "gelu"  # or "relu"\nn_layer = '),
        ("F.relu(self.fc1(x)).square()", "getattr(F, activation)(self.fc1(x)).square()"),
    ],
    "second_mlp": [
        (MLP, MLP + "        self.mlp2 = MLP(config)\n"),
        (MLP_CALL, MLP_CALL + MLP_CALL.replace("self.mlp", "self.mlp2")),
    ],
    "gain": [
        (MLP, MLP + "        self.gain = nn.Parameter(torch.ones(config.hidden_size))\n"),
        ("self.mlp(norm(x))", "self.mlp(self.gain * norm(x))"),
    ],
    "positions": [
        (HEAD, HEAD + "        self.positions = nn.Embedding(block_size, config.hidden_size)\n"),
        ("embed_tokens(idx)", "embed_tokens(idx) + self.positions(start + torch.arange(idx.size(1)))"),
    ],
    "scalar": [
        (MLP, MLP + "        self.scale = nn.Parameter(torch.ones(()))\n"),
        ("self.mlp(norm(x))", "self.mlp(norm(x)) * self.scale"),
    ],
    "tied": [(HEAD, HEAD + "        self.lm_head.weight = self.model.embed_tokens.weight\n")],
    "biases": [("bias=False)", "bias=True)")],
}
EDITS["all"] = [edit for name, edits in EDITS.items() if name != "scalar" for edit in edits]


@pytest.mark.parametrize("edit, optimizer", [*((edit, "muon") for edit in EDITS), ("all", "adamw")])
def test_an_edit_trains_saves_resumes_and_speaks(tmp_path, tiny, edit, optimizer):
    """The loss falls clearly, every weight moves, transformers does not take the run for its own."""
    trainer = check_out(tmp_path / "checkout", *EDITS[edit])
    out = tmp_path / "run"
    how = f"--optimizer={optimizer} --test_fraction=0 --lr_schedule=constant --eval_interval=30".split()
    stdout, _ = within(trainer, tiny, *how, "--max_steps=10")
    assert "the model was edited" in stdout
    before = last_state(out)["model"]
    within(trainer, tiny, *how, "--max_steps=60", "--resume=True")
    after = last_state(out)["model"]
    for name in after:
        assert not torch.equal(before[name], after[name]), name
    losses = [row["val/loss"] for row in rows(out, "val/loss")]
    assert losses[0] < 6.5
    assert losses[-1] < losses[0] - 1.0
    assert after.keys() == load_file(out / "model.safetensors").keys()
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(out)
    speak = (f"--out_dir={out}", "--prompt=def ", "--temperature=0", "--max_new_tokens=20")
    text, _ = within(trainer.with_name("sample.py"), *speak)
    assert text.startswith("def ")
    assert len(text) > 5
    if edit == "activation":  # which fits the original by its shapes
        renamed = trainer.rename(trainer.with_name("my_trainer.py"))
        within(renamed, tiny, *how, "--max_steps=5", "--overwrite=True")
        assert "--trust_run_code=True" in within("sample.py", *speak, code=2)[1]
        stdout, _ = within("train_lm.py", tiny, *how, "--max_steps=10", "--resume=True")
        assert "differs from the one in this script" in stdout


@pytest.mark.parametrize("data", ["--val_fraction=0.05", "--val_fraction=0"])
@pytest.mark.parametrize("often", ["--eval_interval=1", "--save_interval=1"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, tiny, data, often):
    within("train_lm.py", tiny, data, "--max_steps=10")
    how = (tiny, data, often, "--max_steps=40", "--resume=True", "--learning_rate=1e38")
    assert "lower learning_rate" in within("train_lm.py", *how, code=2)[1]
    for weights in last_state(tmp_path / "run")["model"], load_file(tmp_path / "run/model.safetensors"):
        assert all(weight.isfinite().all() for weight in weights.values())


class Waits(TorchDispatchMode):
    """Notes backward passes, and what makes the CPU wait for a GPU's results, whoever calls it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        for owner, name in (
            *((torch.Tensor, name) for name in ("tolist", "numpy", "cpu", "__array__")),
            (Accelerator, "backward"),
        ):
            monkeypatch.setattr(owner, name, self.noting(name, getattr(owner, name)))

    def note(self, name):
        callers = {frame.f_code.co_name for frame, _ in traceback.walk_stack(None)}
        # DataLoader's rows are on the CPU; transformers waits once a forward pass, unless it is compiled.
        if callers.isdisjoint(("_next_data", "find_packed_sequence_indices")):
            self.found.append(name)

    def noting(self, name, function):
        def noted(*args, **kwargs):
            self.note(name)
            return function(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        # item(), float(), bool() and int() of a tensor, and an index that is a mask
        if operation.name() in ("aten::_local_scalar_dense", "aten::nonzero"):
            self.note(operation.name())
        return operation(*args, **(kwargs or {}))


WAITS = ("; loss.item()", "; bool(loss)", "; loss.cpu()", "; loss[loss > 0]")
CASES = [("fp32", ""), ("bf16", ""), ("lora", ""), *(("fp32", wait) for wait in WAITS)]


@pytest.mark.parametrize("kind, added", CASES)
def test_a_step_waits_for_the_device_once(tmp_path, tiny, pretrained, monkeypatch, kind, added):
    """All that is noted from the first backward pass to the last; a wait that is added to the loop is seen."""
    line = "loss += micro_loss.detach()"
    trainer = check_out(tmp_path / "checkout", (line, line + added))
    how = ["--eval_interval=0", "--save_interval=0", "--log_interval=0"]
    if kind == "lora":
        how += [f"--init_from={pretrained('qwen3')}", "--tokenizer=", "--adapter=lora"]
    if kind == "bf16":
        how += ["--mixed_precision=bf16"]
    with Waits(monkeypatch) as waits:
        within(trainer, tiny, *how, "--max_steps=8")
    last = len(waits.found) - waits.found[::-1].index("backward")
    steps = waits.found[waits.found.index("backward") : last]
    expected = ["backward", "tolist"] * 7 + ["backward"]
    assert (steps == expected) == (added == ""), steps


@pytest.mark.parametrize("trainer", [train_lm, train_diffusion])
def test_learning_rates_follow_their_closed_forms_and_never_jump(monkeypatch, trainer):
    def curve(n, **values):
        for name, value in values.items():
            monkeypatch.setattr(trainer, name, value)
        return [trainer.lr_at(step, n) for step in range(n + 1)]

    expected = {
        "constant": lambda s: 1.0,
        "wsd": lambda s: 1.0 if s <= 50 else 0.1 + 0.9 * (100 - s) / 50,
        "cosine": lambda s: 0.1 + 0.45 * (1 + math.cos(math.pi * (s - 10) / 90)),
    }
    for name, f in expected.items():
        found = curve(100, lr_schedule=name, warmup_steps=10, cooldown=0.5, min_lr=0.1)
        assert found == pytest.approx([(s + 1) / 11 if s < 10 else f(s) for s in range(101)])
        for warmup, cooldown in itertools.product((0, 1, 20, 100, 299, 300, 1000), (0.01, 0.3, 1.0)):
            found = curve(300, warmup_steps=warmup, cooldown=cooldown, min_lr=0.0)
            n = warmup if name == "constant" else min(warmup, 30)  # a tenth of a short run
            steepest = max(1 / (n + 1), 1 / (300 * cooldown), math.pi / 2 / max(1, 300 - n))
            assert max(abs(b - a) for a, b in itertools.pairwise(found)) <= steepest + 1e-9


def test_early_stopping_keeps_the_best_weights(tmp_path, tiny):
    def val_losses():
        return [row["val/loss"] for row in rows(tmp_path / "run", "val/loss")][1:]

    noisy = ("--learning_rate=3", "--embed_lr=30", "--lr_schedule=constant", "--warmup_steps=0")
    how = (tiny, *noisy, "--max_steps=400", "--patience=2", "--save_interval=0")
    within("train_lm.py", *how)
    val = val_losses()
    assert len(val) < 40
    assert len(val) == val.index(min(val)) + 3
    progress = last_state(tmp_path / "run")["progress"]
    assert progress.keys() == {"step", "best", "evals_since_best", "seconds", "metrics_bytes"}
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert best["progress"]["best"] == min(val)
    assert not differences(load_file(tmp_path / "run/model.safetensors"), best["model"])
    within("train_lm.py", *how, "--resume=True")  # it stops where it stopped
    assert val_losses() == val


def test_anomaly_mode_names_the_operation(tmp_path, tiny):
    line = "                x = block(x, cos, sin, past)\n"
    bad = line + "                x = x + (x - x.detach()).abs().sqrt()\n"
    trainer = check_out(tmp_path / "checkout", (line, bad))
    warned = pytest.warns(UserWarning, match=r"abs\(\)\.sqrt\(\)")
    with warned, pytest.raises(RuntimeError, match="SqrtBackw"):
        within(trainer, tiny, "--detect_anomaly=True")
    torch.autograd.set_detect_anomaly(False)


def test_bf16_and_gradient_checkpointing_train_as_well_and_profile_leaves_a_trace(tmp_path, tiny):
    how = ("--mixed_precision=bf16", "--gradient_checkpointing=True", "--dropout=0.1", "--deterministic=True")
    within("train_lm.py", tiny, *how, "--profile=True")
    assert rows(tmp_path / "run", "val/loss")[-1]["val/loss"] < 4.5
    weights = load_file(tmp_path / "run" / "model.safetensors").values()
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert "aten::bmm" in next((tmp_path / "run").glob("*.trace.json")).read_text()


def test_the_length_of_a_run(tmp_path, tiny):
    """max_steps=0 only evaluates; epochs are passes over the data; without validation the last weights."""
    out = tmp_path / "run"
    within("train_lm.py", tiny, "--max_steps=0")
    assert len(rows(out)) == 2
    never = ("--eval_interval=0", "--save_interval=0", "--log_interval=0", "--val_fraction=0")
    within("train_lm.py", tiny, "--epochs=1.5", "--block_size=256", "--overwrite=True", *never)
    n = json.loads((out / "run.json").read_text())["rows"]["train"]
    state = last_state(out)
    assert state["progress"]["step"] == math.ceil(1.5 * (n // 8))
    assert not rows(out, "val/loss")
    assert rows(out, "test/loss")
    assert not differences(load_file(out / "model.safetensors"), state["model"])


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
    own = [tmp_path / "run" / name for name in ("model_of_monday.safetensors", "spm.model", "vocab.csv")]
    for path in own:
        path.write_text("the user's")
    within("train_lm.py", tiny, "--tracker=wandb", "--max_steps=10", "--overwrite=True")
    assert all(path.exists() for path in own)
    assert [p.name[-5:] for p in (tmp_path / "wandb").glob("offline-run-*")] == ["-mine"]
