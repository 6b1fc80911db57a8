"""
Nothing is lost: a run that is killed at any moment, stopped by a signal, orphaned by its launcher, or moved to another
number of processes ends with the weights, optimizers and metrics of an unbroken one.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, differences, forked, last_state, rows, run, start, within
from safetensors.torch import load_file

TRAINERS = ("train_diffusion.py",)  # for train_lm.py see test_resume_lm.py
DRIFT = {"train_lm.py": 2e-3, "train_diffusion.py": 1e-2}  # rounding, grown over forty steps
LONG = ("--max_steps=240", "--eval_interval=40", "--save_interval=20", "--log_interval=10")


ONCE = pytest.mark.parametrize("trainer", TRAINERS)


@pytest.fixture(params=TRAINERS)
def trainer(request):
    return request.param


def equal_runs(a, b):
    assert not differences(last_state(a), last_state(b))
    assert rows(a) == rows(b)
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
    for path in (*a.glob("samples/*"), *a.glob("config.json")):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes(), path
    weights = [load_file(out / "model.safetensors") for out in (a, b)]
    assert not differences(*weights)


def wait_for_step(out, step, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with_step = (out / "metrics.jsonl").exists() and rows(out)
        if with_step and with_step[-1]["step"] >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} did not come: {process.communicate()}")


EPOCHS = ("--optimizer=adamw", "--batch_size=64", "--micro_batch_size=16")  # the data comes by several times
KILLED = [
    ("train_diffusion.py", ("--num_workers=2", "--flip=True", "--crop=random", "--objective=v", *EPOCHS))
]


@pytest.mark.parametrize("trainer, settings", KILLED, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_killed_again_and_again_is_the_same_as_unbroken(tmp_path, tiny, trainer, settings):
    """kill -9 at moments uniform over the wall time of the unbroken run, from the start of the process on."""
    began = time.monotonic()
    run(trainer, tiny, *LONG, *settings)
    wall = time.monotonic() - began
    unbroken, broken = tmp_path / "run", tmp_path / "broken"
    seed = random.SystemRandom().randrange(10**6)
    rng, moments = random.Random(seed), []
    print(f"seed of the moments: {seed}")
    again = (trainer, tiny, *LONG, *settings, f"--out_dir={broken}", "--resume=True")
    for _ in range(3):
        process = start(*again)
        moments.append(rng.uniform(0, wall))
        time.sleep(moments[-1])
        process.kill()
        process.communicate()
    run(*again)
    print(f"killed after {moments} of {wall} seconds")
    equal_runs(unbroken, broken)


@ONCE
def test_killed_in_the_middle_of_a_save(tmp_path, tiny, trainer):
    """A copy of the script dies between writing a checkpoint and naming it: the one before it counts."""
    plant = "        unfinished.rename(folder)\n        for old in"
    source = (ROOT / trainer).read_text()
    assert source.count(plant) == 1
    (tmp_path / "configurator.py").write_text((ROOT / "configurator.py").read_text())
    die = "        if progress['step'] == 30:\n            os.kill(os.getpid(), 9)\n"
    (tmp_path / trainer).write_text(source.replace(plant, die + plant))
    within(trainer, tiny, f"--out_dir={tmp_path / 'unbroken'}")
    run(tmp_path / trainer, tiny, code=-signal.SIGKILL)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {
        "step_00000010",
        "step_00000020",
        "unfinished",
    }
    within(trainer, tiny, "--resume=True")
    equal_runs(tmp_path / "unbroken", tmp_path / "run")


SIGNALS = [(TRAINERS[0], signal.SIGTERM), (TRAINERS[0], signal.SIGINT)]


@pytest.mark.parametrize("trainer, signum", SIGNALS)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, tiny, trainer, signum):
    within(trainer, tiny, *LONG, f"--out_dir={tmp_path / 'unbroken'}")
    process = start(trainer, tiny, *LONG)
    wait_for_step(tmp_path / "run", 50, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and "--resume=True" in out and "Traceback" not in err
    step = last_state(tmp_path / "run")["progress"]["step"]
    assert 50 <= step < 240 and f"stopped at step {step}" in out
    out, _ = within(trainer, tiny, *LONG, "--resume=True")
    assert f"resumed from {tmp_path / 'run'}/checkpoints/step_{step:08d}" in out
    equal_runs(tmp_path / "unbroken", tmp_path / "run")


def test_a_signal_in_the_evaluation_does_not_wait_for_its_end(tmp_path, tiny, trainer, text_file):
    (tmp_path / "long.txt").write_text(text_file.read_text() * 100)
    long = (
        [f"--dataset={tmp_path / 'long.txt'}"]
        if trainer == "train_lm.py"
        else ["--dataset=glyphs", "--image_size=64"]
    )
    long += ["--val_fraction=0.9", "--eval_batches=0", "--eval_interval=1000"]
    process = start(trainer, tiny, *long)
    while "length:" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)  # it evaluates for minutes now
    process.terminate()
    began = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 10 and "stopped at step 0" in out


@ONCE
def test_a_launcher_that_dies_leaves_no_orphan(tmp_path, tiny, trainer):
    """SIGTERM to a one-process `accelerate launch` ends the launcher alone; the trainer notices, saves and leaves."""
    launch = ("-m", "accelerate.commands.launch", "--num_processes", "1", trainer, tiny)
    process = start(*launch, "--max_steps=100000")
    wait_for_step(tmp_path / "run", 20, process)
    process.terminate()
    out, _ = process.communicate(timeout=60)  # returns when the trainer, too, has closed its end of the pipe
    assert "the same command with --resume=True goes on" in out
    assert last_state(tmp_path / "run")["progress"]["step"] >= 20


@ONCE
def test_accelerate_launch_passes_the_result_on(tmp_path, tiny, trainer):
    launch = ("-m", "accelerate.commands.launch", "--num_processes", "1", trainer, tiny)
    assert "test/loss" in run(*launch, "--max_steps=10")[0]
    _, err = run(*launch, "--max_steps=10", code=1)
    ours = next(
        line for line in err.splitlines() if line.startswith(f"{trainer}:")
    )  # above the launcher's own noise
    assert "holds a run already" in ours


@ONCE
def test_a_second_trainer_is_kept_out(tmp_path, tiny, trainer):
    process = start(trainer, tiny, "--max_steps=100000")
    wait_for_step(tmp_path / "run", 5, process)
    for way in ("--resume=True", "--overwrite=True", "--seed=2"):
        _, err = run(trainer, tiny, way, code=2)
        assert "another trainer is at work" in err and err.count("\n") == 1
    process.kill()
    process.communicate()
    within(trainer, tiny, "--resume=True", "--max_steps=10")  # a killed one leaves no lock behind


@ONCE
def test_broken_checkpoints_are_named_and_the_newest_complete_one_is_used(tmp_path, tiny, trainer):
    within(trainer, tiny, "--keep_checkpoints=3", f"--out_dir={tmp_path / 'unbroken'}")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "run")
    newest, older = (tmp_path / "run" / "checkpoints" / f"step_000000{n}" for n in (40, 30))
    os.truncate(newest / "state.pt", 1000)
    (older / "manifest.json").unlink()
    (tmp_path / "run" / "checkpoints" / "step_00000099").mkdir()
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step": 40, "tr')
    out, _ = within(trainer, tiny, "--keep_checkpoints=3", "--resume=True")
    for name in ("step_00000030", "step_00000040", "step_00000099"):
        assert f"{name} is no complete checkpoint" in out
    assert "resumed from" in out and "step_00000020" in out
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000099")
    equal_runs(tmp_path / "unbroken", tmp_path / "run")


@ONCE
def test_a_finished_run_goes_on_with_more_steps(tmp_path, tiny, trainer):
    """Under a constant learning rate, in three parts as in one."""
    how = ("--lr_schedule=constant",)
    within(trainer, tiny, *how, f"--out_dir={tmp_path / 'unbroken'}")
    for steps in (15, 40):
        out, _ = within(trainer, tiny, *how, f"--max_steps={steps}", "--resume=True")
    assert "resume: max_steps was 15, is 40" in out
    state = last_state(tmp_path / "run")
    assert not differences(last_state(tmp_path / "unbroken")["model"], state["model"])
    assert rows(tmp_path / "run", "train/loss") == rows(tmp_path / "unbroken", "train/loss")
    assert [r["step"] for r in rows(tmp_path / "run", "val/loss")] == [0, 10, 20, 30, 40]


@ONCE
def test_changed_settings_are_told_and_take_effect(tmp_path, tiny, trainer):
    within(trainer, tiny, "--max_steps=10")
    out, _ = within(trainer, tiny, "--max_steps=20", "--weight_decay=0.5", "--beta2=0.9", "--resume=True")
    assert "resume: max_steps was 10, is 20" in out and "resume: weight_decay was 0.1, is 0.5" in out
    groups = last_state(tmp_path / "run")["optimizers"]["param_groups"]
    assert groups[0]["weight_decay"] == 0.5 and not any(g["weight_decay"] for g in groups[1:])
    assert {g["betas"][1] for g in groups if "betas" in g} == {0.9}


# -----------------------------------------------------------------------------
# Several processes
# -----------------------------------------------------------------------------


def test_a_batch_cut_up_in_any_way_gives_the_same_losses(tmp_path, tiny, trainer):
    """1 process x 1 micro-batch and 2 x 2."""
    losses = {}
    for name, processes, micro in (("1x1", 1, 8), ("2x2", 2, 2)):
        out = tmp_path / name
        how = (f"--out_dir={out}", f"--micro_batch_size={micro}", "--mixed_precision=no")
        (within if processes == 1 else forked)(trainer, tiny, *how)
        losses[name] = [(r["step"], k, r[k]) for r in rows(out) for k in sorted(r) if k.endswith("/loss")]
    for (step, key, loss), (*same, other) in zip(losses["1x1"], losses["2x2"], strict=True):
        assert same == [step, key] and loss == pytest.approx(other, rel=1e-5 if step <= 5 else DRIFT[trainer])


NOISY = """
import os, sys, torch
sys.path.insert(0, {root!r})
import train_diffusion
from accelerate import Accelerator
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
torch.set_num_threads(1)
train_diffusion.batch_size, train_diffusion.min_snr = 8, 5.0
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
dit = train_diffusion.DiT(train_diffusion.Shape(8, 3, 2, 2, 2, 32, 5)).double()
for p in dit.parameters():
    torch.nn.init.normal_(p, std=0.1)
x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
micro = {micro}
per_process = 8 // accelerator.num_processes
mine = range(accelerator.process_index * per_process, (accelerator.process_index + 1) * per_process, micro)
model = accelerator.prepare(dit)
batches = [(x[i : i + micro], y[i : i + micro]) for i in mine]
batches = train_diffusion.add_noise(accelerator, train_diffusion.Process("v"), batches, step=3)
loss = train_diffusion.forward_backward(accelerator, model, batches, 3)
loss = accelerator.reduce(loss, "sum")
if accelerator.is_main_process:
    torch.save((loss, {{n: p.grad for n, p in dit.named_parameters()}}), {path!r})
accelerator.wait_for_everyone()
os._exit(0)
"""


@pytest.mark.parametrize("code", [NOISY], ids=["diffusion"])
def test_a_batch_cut_up_in_any_way_gives_the_gradient_of_one_big_batch(tmp_path, code):
    """In fp64; with noise, times and weights."""
    results = []
    for name, processes, micro in (("one", 1, 8), ("four", 1, 2), ("two", 2, 2)):
        script = tmp_path / f"{name}.py"
        script.write_text(code.format(root=str(ROOT), micro=micro, path=str(tmp_path / name)))
        run(script) if processes == 1 else forked(script)
        results.append(torch.load(tmp_path / name))
    for loss, gradients in results[1:]:
        assert abs(loss - results[0][0]) < 1e-12
        for name, gradient in gradients.items():
            assert (gradient - results[0][1][name]).abs().max() < 1e-12, name


def test_a_run_moves_between_one_process_and_two(tmp_path, tiny, trainer):
    """Stopped on two processes, it goes on with one, and back: same order of the data, same curve."""
    how = ("--micro_batch_size=2", "--mixed_precision=no", "--lr_schedule=constant")
    within(trainer, tiny, *how, f"--out_dir={tmp_path / 'unbroken'}")
    moves = ((12, 2), (25, 1), (40, 2)) if trainer == "train_lm.py" else ((20, 2), (40, 1))
    for steps, processes in moves:
        go_on = within if processes == 1 else forked
        go_on(trainer, tiny, *how, f"--max_steps={steps}", "--resume=True")
    a, b = (rows(tmp_path / name, "train/loss") for name in ("unbroken", "run"))
    assert [r["step"] for r in a] == [r["step"] for r in b if r["step"] % 5 == 0]
    for row, other in zip(a, (r for r in b if r["step"] % 5 == 0)):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=DRIFT[trainer])


def test_two_processes_stop_together(tmp_path, tiny, trainer):
    process = start(trainer, tiny, "--max_steps=100000", processes=2)
    wait_for_step(tmp_path / "run", 20, process)
    process.terminate()  # torch's launcher passes it on to both
    out, err = process.communicate(timeout=60)
    assert "the same command with --resume=True goes on" in out, err
    assert last_state(tmp_path / "run")["progress"]["step"] >= 20


def test_a_disk_that_fills_up_ends_in_one_line_and_loses_nothing(tmp_path, tiny, trainer):
    """No file may grow beyond half a checkpoint in the last ten steps."""
    import resource

    unbroken, broken = tmp_path / "run", tmp_path / "broken"
    within(trainer, tiny)
    shutil.copytree(unbroken, broken)
    shutil.rmtree(broken / "checkpoints" / "step_00000040")
    before = last_state(broken)
    size = (broken / "checkpoints" / "step_00000030" / "state.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        _, err = within(trainer, tiny, f"--out_dir={broken}", "--resume=True", code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = [line for line in err.splitlines() if "cannot write" in line]
    assert len(lines) == 1 and "--resume=True goes on" in lines[0] and "Traceback" not in err
    assert not differences(before, last_state(broken)) and not list(broken.rglob("*.tmp"))
    within(trainer, tiny, f"--out_dir={broken}", "--resume=True")
    equal_runs(unbroken, broken)


def test_killed_right_after_its_last_checkpoint_it_has_its_last_weights(tmp_path, tiny, trainer):
    """With keep="last": what goes on from a checkpoint has nothing left to train, and so nothing to write."""
    within(trainer, tiny, "--keep=last", f"--out_dir={tmp_path / 'unbroken'}")
    rename = Path.rename

    def rename_and_die(path, target):
        rename(path, target)
        if Path(target).name == "step_00000040":
            raise SystemExit(137)

    with mock.patch.object(Path, "rename", rename_and_die):
        within(trainer, tiny, "--keep=last", code=137)
    within(trainer, tiny, "--keep=last", "--resume=True")
    equal_runs(tmp_path / "unbroken", tmp_path / "run")


@ONCE
def test_a_run_killed_while_it_wrote_its_first_file_goes_on(tmp_path, tiny, trainer):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.tmp").write_text('{"kind": "lm", "sett')
    _, err = within(trainer, tiny, code=2)
    assert "holds a run already" in err
    within(trainer, tiny, "--resume=True", "--max_steps=10")
    assert rows(tmp_path / "run")[-1]["step"] == 10 and not list((tmp_path / "run").glob("*.tmp"))
