"""
Nothing is lost by train_lm.py: a run that is killed at any moment, stopped by any signals, orphaned by its launcher, or
moved to another number of processes ends with the weights, optimizers and metrics of an unbroken one.
"""

import os
import random
import shutil
import signal
import time

import pytest
from conftest import ROOT, differences, forked, in_parts, last_state, rows, run, start, wait_for_step, within
from safetensors.torch import load_file

LONG = ("--max_steps=240", "--eval_interval=40", "--save_interval=20", "--log_interval=10")
LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes", "1")


def equal_runs(a, b):
    assert not differences(last_state(a), last_state(b)) and rows(a) == rows(b)
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
    for path in (*a.glob("samples/*"), *a.glob("config.json")):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes(), path
    for path in a.glob("*.safetensors"):
        assert not differences(load_file(path), load_file(b / path.name))


@pytest.mark.parametrize("mode", ["scratch", "whole", "lora", "p_tuning"])
def test_killed_again_and_again_is_the_same_as_unbroken(tmp_path, tiny, pretrained, mode):
    """kill -9 at moments uniform over the wall time of the unbroken run; the data comes by several times."""
    how = [tiny, *LONG, "--dropout=0.2", "--batch_size=64", "--micro_batch_size=16", "--num_workers=2"]
    if mode != "scratch":
        adapter = "" if mode == "whole" else mode
        how = [
            tiny,
            *LONG,
            "--max_steps=80",
            f"--init_from={pretrained('gpt2')}",
            f"--adapter={adapter}",
            "--tokenizer=",
        ]
    began = time.monotonic()
    run("train_lm.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    wall, seed = time.monotonic() - began, random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")
    rng = random.Random(seed)
    for _ in range(3 if mode == "scratch" else 1):
        process = start("train_lm.py", *how, "--resume=True")
        time.sleep(rng.uniform(0.3 * wall, wall))
        process.kill()
        process.communicate()
    run("train_lm.py", *how, "--resume=True")
    equal_runs(tmp_path / "unbroken", tmp_path / "run")


@pytest.fixture
def slow(tmp_path):
    """A copy of train_lm.py whose steps take seconds."""
    plant = "        # one optimizer step by the mean loss"
    source = (ROOT / "train_lm.py").read_text()
    assert source.count(plant) == 1
    (tmp_path / "train_lm.py").write_text(source.replace(plant, "        time.sleep(1.5)\n" + plant))
    shutil.copy(ROOT / "configurator.py", tmp_path)
    return tmp_path / "train_lm.py"


@pytest.mark.parametrize("attempt", range(3))
def test_ctrl_c_under_the_launcher_saves(tmp_path, tiny, slow, attempt):
    """SIGINT to the whole process group, as a terminal sends it, once or several times, with slow steps."""
    process = start(*LAUNCH, slow, tiny, "--log_interval=1", process_group=0)
    wait_for_step(tmp_path / "run", 2, process)
    for _ in range(attempt + 1):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2 * attempt)
    out, _ = process.communicate(timeout=60)  # returns when the trainer, too, has closed its end of the pipe
    step = last_state(tmp_path / "run")["progress"]["step"]
    assert step >= 2
    assert (
        out.strip().splitlines()[-1] == f"stopped at step {step}; the same command with --resume=True goes on"
    )


@pytest.mark.parametrize("target", ["trainer", "launcher"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, tiny, target, signum):
    launch = LAUNCH if target == "launcher" else ()
    process = start(*launch, "train_lm.py", tiny, *LONG, "--max_steps=100000")
    wait_for_step(tmp_path / "run", 50, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert target == "launcher" or (process.returncode == 128 + signum and "Traceback" not in err)
    step = last_state(tmp_path / "run")["progress"]["step"]
    assert step >= 50 and f"stopped at step {step}; the same command with --resume=True goes on" in out
    if target == "trainer":
        how = (tiny, *LONG, f"--max_steps={step + 20}", "--lr_schedule=constant")
        assert f"at step {step}" in within("train_lm.py", *how, "--resume=True")[0]


def test_stopped_by_a_signal_and_resumed_is_unbroken(tmp_path, tiny):
    within("train_lm.py", tiny, *LONG, f"--out_dir={tmp_path / 'unbroken'}")
    process = start("train_lm.py", tiny, *LONG)
    wait_for_step(tmp_path / "run", 50, process)
    process.terminate()
    process.communicate(timeout=60)
    within("train_lm.py", tiny, *LONG, "--resume=True")
    equal_runs(tmp_path / "unbroken", tmp_path / "run")


def test_a_finished_run_goes_on_with_more_steps(tmp_path, tiny):
    how = (tiny, "--lr_schedule=constant")
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    for steps in (15, 40):
        within("train_lm.py", *how, f"--max_steps={steps}", "--resume=True")
    assert not differences(last_state(tmp_path / "unbroken")["model"], last_state(tmp_path / "run")["model"])
    assert rows(tmp_path / "run", "train/loss") == rows(tmp_path / "unbroken", "train/loss")


def test_a_batch_cut_up_in_any_way_gives_the_same_losses(tmp_path, tiny):
    """1 process x 1 micro-batch and 2 x 2, and a run that moves from two processes to one and back."""
    how = (tiny, "--mixed_precision=no", "--lr_schedule=constant", "--optimizer=adamw")
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'one'}")
    forked("train_lm.py", *how, "--micro_batch_size=2", f"--out_dir={tmp_path / 'two'}")
    for steps, processes in ((12, 2), (25, 1), (40, 2)):
        go_on = within if processes == 1 else forked
        go_on("train_lm.py", *how, "--micro_batch_size=2", f"--max_steps={steps}", "--resume=True")
    one, two, moved = (
        {r["step"]: r["train/loss"] for r in rows(tmp_path / name, "train/loss") if r["step"] % 5 == 0}
        for name in ("one", "two", "run")
    )
    assert one == pytest.approx(two, rel=1e-5) and one == pytest.approx(moved, rel=1e-5)


def test_what_does_not_fit_is_refused_and_nothing_is_overwritten(tmp_path, tiny):
    out = tmp_path / "run"
    within("train_lm.py", tiny, "--max_steps=10")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (tmp_path / "other.txt").write_text("other words " * 4000)
    for arguments, message in (
        ([], "--overwrite=True"),
        (["--resume=True", "--n_layer=3"], "made with {'n_layer': 2}"),
        (["--resume=True", "--optimizer=adamw"], "made with {'optimizer': 'muon'}"),
        (["--resume=True", f"--dataset={tmp_path / 'other.txt'}"], "made with {"),
        (["--overwrite=True", "--n_head=3"], "must be a multiple"),
        (["--overwrite=True", f"--dataset={tmp_path / 'none.txt'}"], "dataset="),
        (["--resume=True", "--overwrite=True"], "choose one"),
    ):
        _, err = within("train_lm.py", tiny, *arguments, code=2)
        assert message in err.splitlines()[-1] and "Traceback" not in err, err
        assert {p: p.read_bytes() for p in before} == before
    within("train_lm.py", tiny, "--max_steps=10", "--n_embd=64", f"--out_dir={tmp_path / 'other'}")
    shutil.copy(tmp_path / "other" / "checkpoint.pt", out)
    _, err = within("train_lm.py", tiny, "--resume=True", code=2)
    assert "checkpoint=" in err and err.count("\n") == 1
    (out / "checkpoint.pt").write_bytes(before[out / "checkpoint.pt"][:1000])
    _, err = within("train_lm.py", tiny, "--resume=True", code=2)
    assert "checkpoint=" in err and "Traceback" not in err


def test_fsdp2_trains_and_resumes_with_muon_and_adamw(tmp_path, tiny):
    """In parts, over two gloo processes, with torch's own Muon: the losses of the whole model, and a bitwise resume."""
    for optimizer in ("muon", "adamw"):
        how = [tiny, "--lr_schedule=constant", f"--optimizer={optimizer}", "--max_steps=20"]
        outs = {name: tmp_path / f"{optimizer}_{name}" for name in ("whole", "unbroken", "broken")}
        within("train_lm.py", *how, f"--out_dir={outs['whole']}")
        in_parts("train_lm.py", *how, f"--out_dir={outs['unbroken']}")
        in_parts("train_lm.py", *how, "--max_steps=10", f"--out_dir={outs['broken']}")
        in_parts("train_lm.py", *how, "--resume=True", f"--out_dir={outs['broken']}")
        assert not differences(last_state(outs["unbroken"]), last_state(outs["broken"]))
        whole, parts = (
            [r["val/loss"] for r in rows(outs[name], "val/loss")] for name in ("whole", "unbroken")
        )
        assert parts == pytest.approx(
            whole, rel=1e-2 if optimizer == "muon" else 1e-4
        )  # torch's computes in bf16
        if optimizer == "adamw":  # what was saved in parts goes on in one piece
            within("train_lm.py", *how, "--resume=True", "--max_steps=25", f"--out_dir={outs['unbroken']}")
