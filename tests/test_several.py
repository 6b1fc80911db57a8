"""
Several processes and machines: a batch that is cut up in any way, a run that moves from two processes to one and on to
two machines, and a model in parts (FSDP2) train as in one piece; a NaN in one process is skipped by all; a process that
dies takes the others along, and the run goes on; the configs of configs/accelerate say what they mean.
"""

import json
import os

import psutil
import pytest
from accelerate.commands.config import load_config_from_file
from conftest import BAD, ROOT, differences, forked, in_parts, last_state, rows, start, wait_for_step, within
from safetensors.torch import load_file


def losses(out):
    return [row.get("val/loss") or row["train/loss"] for row in rows(out, "train/loss", "val/loss")]


def test_a_run_moves_from_two_processes_to_one_and_on_to_two_machines(tmp_path, tiny):
    """Micro-batches of two rows and of eight. The second machine needs nothing of the run directory."""
    how = (ROOT / "train_lm.py", tiny, "--lr_schedule=constant", "--optimizer=adamw", "--resume=True")
    machines = [tmp_path / "first", tmp_path / "second"]
    run = f"--out_dir={machines[0] / 'run'}"
    within(*how, "--max_steps=30", f"--out_dir={tmp_path / 'one'}")
    forked(*how, "--max_steps=10", "--micro_batch_size=2", run)
    within(*how, "--max_steps=20", run)
    launch = f"--num_processes=2 --config_file={ROOT}/configs/accelerate/two_machines.yaml --quiet"
    launch += f" --main_process_ip=127.0.0.1 --main_process_port={20000 + os.getpid() % 10000}"
    command = ["-m", "accelerate.commands.launch", *launch.split()]
    both = []
    for i, path in enumerate(machines):
        path.mkdir(exist_ok=True)
        env = {"cwd": path, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        arguments = (f"--machine_rank={i}", *how, "--max_steps=30", "--out_dir=run")
        both.append(start(*command, *arguments, **env))
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    assert not list(machines[1].rglob("*.pt"))
    assert not (machines[1] / "run/run.json").exists()
    one = losses(tmp_path / "one")
    assert len(one) == 10
    assert losses(machines[0] / "run") == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("kind, tolerance", [("GPT", 1e-2), ("Pretrained", 1e-4)])
def test_a_model_in_parts_is_as_one_in_one_piece(tmp_path, tiny, pretrained, kind, tolerance):
    """A resume is bit for bit. Muon is that of torch, in bf16; a LoRA in parts goes on in one piece."""
    how = [tiny, "--lr_schedule=constant", "--max_steps=10", "--eval_interval=10", "--n_layer=1"]
    if kind == "Pretrained":
        how += [f"--init_from={pretrained('qwen3')}", "--tokenizer=", "--adapter=lora", "--val_fraction=0"]
    whole, unbroken, out = tmp_path / "whole", tmp_path / "unbroken", tmp_path / "run"
    within("train_lm.py", *how, f"--out_dir={whole}")
    in_parts("train_lm.py", *how, f"--out_dir={unbroken}")
    for steps in (5, 10):
        in_parts("train_lm.py", *how, f"--max_steps={steps}", "--resume=True")
    # The progress differs: the second also knows the best loss of the run that ended after 5 steps.
    for name in ("model", "optimizers"):
        assert not differences(last_state(unbroken)[name], last_state(out)[name])
    assert losses(unbroken) == pytest.approx(losses(whole), rel=tolerance)
    assert json.loads((out / "run.json").read_text())["model"] == kind  # for sample.py
    names = [load_file(next(run.glob("*model.safetensors"))).keys() for run in (whole, out)]
    assert names[0] == names[1]
    if kind == "Pretrained":
        within("train_lm.py", *how, "--max_steps=15", "--resume=True")


def test_a_nan_in_one_process_is_skipped_by_both_and_ten_end_the_run(tmp_path, tiny):
    for name, steps in ("two", (6, 7)), ("ten", range(3, 13)):
        (tmp_path / f"{name}.py").write_text(BAD % [("1", step) for step in steps])
    how = ("train_lm.py", tiny, "--save_interval=5", "--resume=True")
    assert forked(*how, tmp_path / "two.py", "--max_steps=20").count("not finite: skipped") == 2
    out = forked(*how, tmp_path / "ten.py", code=2)
    assert out.count("skipped") == 10
    assert "ten steps in a row were not finite" in out
    assert "Traceback" not in out
    assert all(weight.isfinite().all() for weight in last_state(tmp_path / "run")["model"].values())
    within(*how)
    assert rows(tmp_path / "run", "val/loss")[-1]["val/loss"] < 4


def test_a_process_that_dies_takes_the_others_along(tmp_path, tiny):
    """kill -9 to one of two: the launcher ends within seconds and leaves none; the same command goes on."""
    process = start("train_lm.py", tiny, "--max_steps=100000", processes=2)
    wait_for_step(tmp_path / "run", 11, process)  # after the first checkpoint
    trainers = [p for p in psutil.Process(process.pid).children() if "train_lm.py" in " ".join(p.cmdline())]
    assert len(trainers) == 2
    trainers[1].kill()
    process.communicate(timeout=60)
    assert process.returncode == 1
    _, alive = psutil.wait_procs(trainers, timeout=10)
    assert not alive
    steps = last_state(tmp_path / "run")["progress"]["step"] + 10
    assert "resumed from" in forked("train_lm.py", tiny, f"--max_steps={steps}", "--resume=True")


def test_the_launch_configs():
    found = {p.stem: load_config_from_file(str(p)) for p in (ROOT / "configs/accelerate").glob("*.yaml")}
    kinds = {name: (c.distributed_type.value, c.num_machines) for name, c in found.items()}
    assert kinds == {"ddp": ("MULTI_GPU", 1), "fsdp2": ("FSDP", 1), "two_machines": ("MULTI_GPU", 2)}
    assert found["fsdp2"].fsdp_config["fsdp_version"] == 2
