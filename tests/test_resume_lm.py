"""
Nothing is lost by train_lm.py: killed at a random moment, stopped by any signals, orphaned by its launcher,
it goes on to the weights, optimizers, metrics and samples of an unbroken run; what does not fit is refused
and left alone. tests/torture.py does the same a hundred times.
"""

import os
import random
import shutil
import signal
import time

import torch
from conftest import ROOT, SLOW, Hostile, last_state, lost, refusal, start, wait_for_step, within

GOES_ON = "stopped at step {}; the same command with --resume=True goes on\n"


def test_killed_and_stopped_is_unbroken(tmp_path, tiny):
    """kill -9 at a random moment, later two signals to all; data comes from workers, batches in parts."""
    how = [tiny, "--max_steps=120", "--eval_interval=40", "--dropout=0.2", "--micro_batch_size=4"]
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    how += ["--num_workers=2", "--resume=True"]
    process, moment = start("train_lm.py", *how), random.uniform(0, 50)
    wait_for_step(tmp_path / "run", moment, process)
    time.sleep(moment % 5 / 50)
    process.kill()
    process.wait()
    process = start("train_lm.py", *how, process_group=0)
    wait_for_step(tmp_path / "run", 75, process)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    step = last_state(tmp_path / "run")["progress"]["step"]
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT) and "Traceback" not in err
    assert 75 <= step < 120 and out.endswith(GOES_ON.format(step))
    assert f"at step {step}" in within("train_lm.py", *how)[0]
    assert not lost(tmp_path / "unbroken", tmp_path / "run")


def test_ctrl_c_and_the_death_of_the_launcher_save(tmp_path, tiny):
    """In a step of a second: SIGINT to the whole group, as of a terminal; kill -9 to the launcher alone."""
    how, out = [tiny, "--max_steps=5", "--log_interval=1"], tmp_path / "run"
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    (tmp_path / "slow.py").write_text(SLOW)
    launch, how = ("-m", "accelerate.commands.launch", "--num_processes=1"), [*how, "--resume=True"]
    for before, stop in (1, lambda p: os.killpg(p.pid, signal.SIGINT)), (3, lambda p: p.kill()):
        process = start(*launch, ROOT / "train_lm.py", *how, tmp_path / "slow.py", process_group=0)
        wait_for_step(out, before, process)
        stop(process)
        stdout, _ = process.communicate(timeout=60)  # returns when the trainer, too, has closed its end
        step = last_state(out)["progress"]["step"]
        assert before <= step <= before + 1 and stdout.endswith(GOES_ON.format(step))
    within("train_lm.py", *how)
    assert not lost(tmp_path / "unbroken", out)


def test_what_does_not_fit_is_refused_and_left_alone(tmp_path, tiny):
    out, other, owned = tmp_path / "run", tmp_path / "other", tmp_path / "owned"
    within("train_lm.py", tiny, "--max_steps=10")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "other.txt").write_text("other words " * 4000)
    for arguments, message in (
        ([], "--overwrite=True"),
        (["--resume=True", "--n_layer=3"], "made with {'n_layer': 2}"),
        (["--resume=True", f"--dataset={tmp_path / 'other.txt'}"], "made with {"),
        (["--overwrite=True", "--n_head=3"], "must be a multiple"),
        (["--overwrite=True", f"--dataset={tmp_path / 'none.txt'}"], "dataset="),
    ):
        assert message in refusal("train_lm.py", tiny, *arguments)
        assert {path: path.read_bytes() for path in before} == before
    within("train_lm.py", tiny, "--max_steps=10", "--n_embd=64", f"--out_dir={other}")
    checkpoint = out / "checkpoint.pt"
    for spoil in (
        lambda: shutil.copy(other / "checkpoint.pt", out),
        lambda: checkpoint.write_bytes(before[checkpoint][:1000]),
        lambda: torch.save({"model": Hostile(owned)}, checkpoint),
    ):
        spoil()
        spoiled = checkpoint.read_bytes()
        assert "checkpoint=" in refusal("train_lm.py", tiny, "--resume=True")
        assert checkpoint.read_bytes() == spoiled and not owned.exists()
