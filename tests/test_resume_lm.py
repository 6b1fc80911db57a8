"""
Nothing is lost by train_lm.py: killed at a random moment, stopped by any signal, without a reader or a launcher, it goes
on to the weights, optimizers, metrics and samples of an unbroken run, also after its data has moved; what does not fit
is refused and left alone; before the first checkpoint nothing is believed; two runs never share a folder.
tests/torture.py does the same a hundred times.
"""

import json
import os
import random
import signal
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import conftest
import datasets
import filelock
import torch
from conftest import ROOT, contents, last_state, lost, refusal, rows, start, wait_for_step, within

import train_lm

GOES_ON = "stopped at step {}; the same command with --resume=True goes on\n"
LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes=1")
NOHUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_killed_and_stopped_in_every_way_is_unbroken(tmp_path, tiny):
    """kill -9 at a random moment; then, within a step, two signals; Ctrl-C; the death of the launcher, under nohup; a
    closed terminal; a reader that has gone. Data comes from workers, batches in parts."""
    out = tmp_path / "run"
    (tmp_path / "slow.py").write_text(conftest.PLANT % "time.sleep(0.3) or loss")
    how = (tiny, "--max_steps=120", "--log_interval=1", "--dropout=0.2", "--micro_batch_size=4")
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'unbroken'}")
    how = (ROOT / "train_lm.py", *how, "--num_workers=2", "--resume=True")
    process = start(*how)
    moment = random.uniform(0, 50)
    wait_for_step(out, moment, process)
    time.sleep(moment % 5 / 50)
    process.kill()
    process.wait()  # its data workers still hold the lock for some seconds

    def send_two(process):
        os.killpg(process.pid, SIGTERM)
        os.killpg(process.pid, SIGINT)

    def hang_up_and_kill(process):
        os.killpg(process.pid, SIGHUP)
        wait_for_step(out, step + 4, process)
        process.kill()

    step = rows(out)[-1]["step"]  # that of a checkpoint, or later
    for command, stop, expected_codes, n_steps in (
        ((), send_two, (128 + SIGTERM, 128 + SIGINT), 2),
        (LAUNCH, lambda process: os.killpg(process.pid, SIGINT), (-SIGINT,), 2),
        (("-c", NOHUP, *LAUNCH), hang_up_and_kill, (-signal.SIGKILL,), 4),
        ((), lambda process: process.send_signal(SIGHUP), (128 + SIGHUP,), 2),
        ((), lambda process: process.stdout.close(), (128 + SIGTERM,), 2),
    ):
        before = step
        slow = (*how, tmp_path / "slow.py", "--save_interval=0")
        process = start(*command, *slow, process_group=0)
        wait_for_step(out, before + 2, process)
        stop(process)
        # The launcher may end before the trainer, which then still has the other end of stdout.
        stdout = "" if process.stdout.closed else process.stdout.read()
        err = process.stderr.read()
        assert process.wait(timeout=60) in expected_codes
        step = last_state(out)["progress"]["step"]
        assert "Traceback" not in err or LAUNCH[0] in command  # the launcher's
        assert not stdout or stdout.endswith(GOES_ON.format(step))
        assert before + n_steps <= step <= before + n_steps + 2
    assert f"at step {step}" in within(*how)[0]
    assert not lost(tmp_path / "unbroken", out)


def test_what_does_not_fit_is_refused_and_left_alone(tmp_path, tiny):
    """A setting is compared before the data is touched: here there is none any more."""
    out = tmp_path / "run"
    within("train_lm.py", tiny, "--max_steps=10")
    before = contents(out)
    messages = {"--resume=False": "--overwrite=True", "--n_layer=3": "n_layer=2", "--seed=3": "seed=1337"}
    messages |= {"--beta2=0.9": "beta2=0.95", "--tokenizer=char": "tokenizer='bytes'"}
    for argument, message in (messages | {"--batch_size=4": "batch_size=8"}).items():
        how = (tiny, "--resume=True", f"--dataset={tmp_path / 'none.txt'}", argument)
        assert message in refusal("train_lm.py", *how)
        assert contents(out) == before
    with filelock.FileLock(out / "lock"):  # as another run would hold it; ours waits for ten seconds
        assert "is in use by another run" in refusal("train_lm.py", tiny, "--overwrite=True")
    assert contents(out) == before
    wider = ("intermediate_size=4 * n_embd", "intermediate_size=2 * n_embd")
    edited = conftest.check_out(tmp_path / "edited", wider)
    assert "does not fit the model" in refusal(edited, tiny, "--resume=True")
    assert contents(out) == before  # also the copy of the script, which fits the weights
    within("train_lm.py", tiny, "--max_steps=10", "--n_embd=64", f"--out_dir={tmp_path / 'other'}")
    torch.save({"model": conftest.Hostile(tmp_path / "owned")}, tmp_path / "hostile.pt")
    checkpoint = out / "checkpoint.pt"
    spoiled = [(tmp_path / name).read_bytes() for name in ("other/checkpoint.pt", "hostile.pt")]
    for content in (*spoiled, before[checkpoint][:1000]):
        checkpoint.write_bytes(content)
        assert str(checkpoint) in refusal("train_lm.py", tiny, "--resume=True")
        assert checkpoint.read_bytes() == content
    assert not (tmp_path / "owned").exists()


def test_a_run_goes_on_when_its_data_has_moved_but_not_with_other_data(tmp_path, tiny, text_file):
    """The other data has as many rows."""
    text = text_file.read_text()
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(text[:30000])
    (folder / "b.txt").write_text(text[30000:])
    how = (tiny, "--lr_schedule=constant", f"--dataset={folder}")
    within("train_lm.py", *how, "--max_steps=20", f"--out_dir={tmp_path / 'unbroken'}")
    within("train_lm.py", *how, "--max_steps=10")
    moved = folder.rename(tmp_path / "moved")
    how = (*how, "--max_steps=20", f"--dataset={moved}", "--resume=True")
    (moved / "b.txt").write_text(text[30000:].swapcase())
    assert "other train data" in refusal("train_lm.py", *how)
    (moved / "b.txt").write_text(text[30000:])
    within("train_lm.py", *how)
    assert not lost(tmp_path / "unbroken", tmp_path / "run")


def test_other_labels_of_the_same_ids_are_other_data():
    rows = [{"ids": [[1, 2, 3]], "labels": [labels]} for labels in ([-100, 2, 3], [-100, -100, 3])]
    hashes = {train_lm.hash_rows(datasets.Dataset.from_dict(table)) for table in (*rows, rows[0])}
    assert len(hashes) == 2


def test_before_the_first_checkpoint_nothing_is_believed(tmp_path, tiny):
    """Weights without a checkpoint are kept. A start that died, with older files: other settings give a fresh run."""
    out = tmp_path / "run"
    within("train_lm.py", tiny, "--max_steps=10", "--n_embd=64")
    (out / "checkpoint.pt").unlink()
    ended = json.loads((out / "run.json").read_text())
    assert "holds weights without a checkpoint" in within("train_lm.py", tiny, "--resume=True", code=2)[1]
    (out / "run.json").write_text(json.dumps(ended | {"summary": {}}))  # as a run that has not ended
    assert "holds weights without a checkpoint" in within("train_lm.py", tiny, "--resume=True", code=2)[1]
    for path in (*out.glob("*.safetensors"), *out.glob("best.pt")):
        path.unlink()
    (out / "run.json.tmp").write_text("{")
    (out / "notes.txt").write_text("mine")
    for name in ("adapter_config.json", "chat_template.jinja"):
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
