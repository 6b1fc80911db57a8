"""
Nothing is lost by train_lm.py: killed at a random moment, stopped by any signal, without a reader or a launcher, it goes
on to the weights, optimizers, metrics and samples of an unbroken run, also after its data has moved; what does not fit
is refused and left alone; before the first checkpoint nothing is believed; two runs never share a folder.
tests/torture.py does the same a hundred times.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import filelock
import torch
from conftest import PLANT, ROOT, Hostile, last_state, lost, refusal, start, wait_for_step, within

GOES_ON = "stopped at step {}; the same command with --resume=True goes on\n"
LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes=1")
NOHUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start_and_stop(out, step, stop, *command):
    """Start a command, stop it after a step; -> (exit code, step of the checkpoint)"""
    process = start(*command, process_group=0)
    wait_for_step(out, step, process)
    stop(process)
    # The launcher may end before the trainer, which then still has the other end of stdout.
    stdout = "" if process.stdout.closed else process.stdout.read()
    err = process.stderr.read()
    code = process.wait(timeout=60)
    saved = last_state(out)["progress"]["step"]
    assert "Traceback" not in err or command[0] == "-m"  # the launcher's
    assert not stdout or stdout.endswith(GOES_ON.format(saved))
    return code, saved


def test_killed_and_stopped_is_unbroken(tmp_path, tiny):
    """kill -9 at a random moment, later two signals to all; data comes from workers, batches in parts."""
    out = tmp_path / "run"
    how = [tiny, "--max_steps=120", "--eval_interval=40", "--dropout=0.2", "--micro_batch_size=4"]
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    how += ["--num_workers=2", "--resume=True"]
    process = start("train_lm.py", *how)
    moment = random.uniform(0, 50)
    wait_for_step(out, moment, process)
    time.sleep(moment % 5 / 50)
    process.kill()
    process.wait()  # its data workers still hold the lock for some seconds

    def stop(process):
        os.killpg(process.pid, SIGTERM)
        os.killpg(process.pid, SIGINT)

    code, step = start_and_stop(out, 75, stop, "train_lm.py", *how)
    assert code in (128 + SIGTERM, 128 + SIGINT)
    assert 75 <= step < 120
    assert f"at step {step}" in within("train_lm.py", *how)[0]
    assert not lost(tmp_path / "unbroken", out)


def test_every_way_to_stop_saves_within_a_step(tmp_path, tiny):
    """Ctrl-C; the death of the launcher, under nohup; a closed terminal; a reader that has gone."""
    out = tmp_path / "run"
    how = [tiny, "--max_steps=60", "--log_interval=1", "--eval_interval=0", "--save_interval=0"]
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    (tmp_path / "slow.py").write_text(PLANT % "time.sleep(0.3) or loss")
    how = [ROOT / "train_lm.py", *how, "--resume=True"]

    def hang_up_and_kill(process):
        os.killpg(process.pid, SIGHUP)
        wait_for_step(out, step + 4, process)
        process.kill()

    step = 0
    for command, stop, expected_code, n_steps in (
        (LAUNCH, lambda process: os.killpg(process.pid, SIGINT), -SIGINT, 2),
        (("-c", NOHUP, *LAUNCH), hang_up_and_kill, -signal.SIGKILL, 4),
        ((), lambda process: process.send_signal(SIGHUP), 128 + SIGHUP, 2),
        ((), lambda process: process.stdout.close(), 128 + SIGTERM, 2),
    ):
        before = step
        code, step = start_and_stop(out, before + 2, stop, *command, *how, tmp_path / "slow.py")
        assert code == expected_code
        assert before + n_steps <= step <= before + n_steps + 2
    within(*how)
    assert not lost(tmp_path / "unbroken", out)


def test_what_does_not_fit_is_refused_and_left_alone(tmp_path, tiny):
    """A setting is compared before the data is touched: here there is none any more."""
    out = tmp_path / "run"
    within("train_lm.py", tiny, "--max_steps=10")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "other.txt").write_text("other words " * 4000)
    resume = ["--resume=True", f"--dataset={tmp_path / 'none.txt'}"]
    for arguments, message in (
        ([], "--overwrite=True"),
        ([*resume, "--n_layer=3"], "n_layer=2"),
        ([*resume, "--seed=3"], "seed=1337"),
        ([*resume, "--batch_size=4"], "batch_size=8"),
        ([*resume, "--beta2=0.9"], "beta2=0.95"),
        ([*resume, "--tokenizer=char"], "tokenizer='bytes'"),
        (["--resume=True", f"--dataset={tmp_path / 'other.txt'}"], "data=["),
        (["--overwrite=True", "--n_head=3"], "must be a multiple"),
        (["--overwrite=True", f"--dataset={tmp_path / 'none.txt'}"], "dataset="),
    ):
        assert message in refusal("train_lm.py", tiny, *arguments)
        assert {path: path.read_bytes() for path in before} == before
    other = tmp_path / "other"
    owned = tmp_path / "owned"
    within("train_lm.py", tiny, "--max_steps=10", "--n_embd=64", f"--out_dir={other}")
    checkpoint = out / "checkpoint.pt"
    for spoil in (
        lambda: shutil.copy(other / "checkpoint.pt", out),
        lambda: checkpoint.write_bytes(before[checkpoint][:1000]),
        lambda: torch.save({"model": Hostile(owned)}, checkpoint),
    ):
        spoil()
        spoiled = checkpoint.read_bytes()
        assert f"{out}/checkpoint.pt" in refusal("train_lm.py", tiny, "--resume=True")
        assert checkpoint.read_bytes() == spoiled
        assert not owned.exists()


def test_a_run_goes_on_when_its_data_has_moved_but_not_with_other_data(tmp_path, tiny, text_file):
    """The other data has as many rows."""
    text = text_file.read_text()
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(text[:30000])
    (folder / "b.txt").write_text(text[30000:])
    constant = (tiny, "--lr_schedule=constant")
    within(
        "train_lm.py",
        *constant,
        "--max_steps=20",
        f"--dataset={folder}",
        f"--out_dir={tmp_path / 'unbroken'}",
    )
    within("train_lm.py", *constant, "--max_steps=10", f"--dataset={folder}")
    moved = folder.rename(tmp_path / "moved")
    how = (*constant, "--max_steps=20", f"--dataset={moved}", "--resume=True")
    (moved / "b.txt").write_text(text[30000:].swapcase())
    assert "data=[" in refusal("train_lm.py", *how)
    (moved / "b.txt").write_text(text[30000:])
    within("train_lm.py", *how)
    assert not lost(tmp_path / "unbroken", tmp_path / "run")


def test_before_the_first_checkpoint_nothing_is_believed(tmp_path, tiny):
    """A start that died, with weights and an adapter of an older run: other settings give a fresh run."""
    out = tmp_path / "run"
    within("train_lm.py", tiny, "--max_steps=10", "--n_embd=64")
    (out / "checkpoint.pt").unlink()
    (out / "run.json.tmp").write_text("{")
    (out / "notes.txt").write_text("mine")
    for name in ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"):
        (out / name).write_text("stale")
    how = (tiny, "--resume=True", "--n_layer=1", "--seed=5")
    within("train_lm.py", *how, "--max_steps=0")
    assert not list(out.glob("*.safetensors"))
    within("train_lm.py", *how, "--max_steps=10")
    fresh = tmp_path / "fresh"
    within("train_lm.py", *how, "--max_steps=10", f"--out_dir={fresh}")
    assert not lost(fresh, out)
    names = {path.relative_to(out) for path in out.rglob("*")}
    assert names == {path.relative_to(fresh) for path in fresh.rglob("*")} | {Path("notes.txt")}


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, tiny):
    """The lock of the first run is held by this test. The second waits for ten seconds."""
    out = tmp_path / "run"
    within("train_lm.py", tiny, "--max_steps=10")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with filelock.FileLock(out / "lock"):
        assert "is in use by another run" in refusal("train_lm.py", tiny, "--overwrite=True")
    assert {path: path.read_bytes() for path in before} == before
    within("train_lm.py", tiny, "--max_steps=20", "--resume=True")
