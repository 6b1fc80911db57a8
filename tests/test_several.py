"""
Several processes and machines: LoRA in parts (FSDP2) trains as in one piece; two machines train as one, and the second
needs nothing of the run directory; a NaN in one process is skipped by all; a process that dies takes the others along,
and the run goes on; the configs of configs/accelerate say what they mean.
"""

import os
import signal
import time

import psutil
import pytest
from conftest import ROOT, differences, forked, in_parts, last_state, rows, run, start, within
from safetensors.torch import load_file


def test_a_fine_tuned_language_model_in_parts(tmp_path, tiny, pretrained):
    how = [tiny, f"--init_from={pretrained('qwen3')}", "--tokenizer=", "--max_steps=20", "--adapter=lora"]
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'whole'}")
    in_parts("train_lm.py", *how)
    whole, parts = (rows(tmp_path / name, "val/loss") for name in ("whole", "run"))
    assert parts == [pytest.approx(row, rel=1e-4) for row in whole]
    names = [load_file(tmp_path / run / "adapter_model.safetensors").keys() for run in ("whole", "run")]
    assert names[0] == names[1]


def test_two_machines_train_as_one(tmp_path, tiny):
    """Two launchers over loopback, each with a folder of its own; the second resumes without the run directory."""
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes=2"]
    launch += [
        f"--config_file={ROOT / 'configs/accelerate/two_machines.yaml'}",
        "--main_process_ip=127.0.0.1",
    ]
    launch += [f"--main_process_port={20000 + os.getpid() % 10000}"]
    machines = [tmp_path / "first", tmp_path / "second"]
    for path in machines:
        path.mkdir()
    for steps in (20, 40):
        command = [
            ROOT / "train_lm.py",
            tiny,
            "--lr_schedule=constant",
            f"--max_steps={steps}",
            "--resume=True",
        ]
        environment = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        both = [
            start(*launch, f"--machine_rank={i}", *command, "--out_dir=run", cwd=path, **environment)
            for i, path in enumerate(machines)
        ]
        for process in both:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err
    assert not list(machines[1].rglob("*.pt")) and not (machines[1] / "run/run.json").exists()
    forked("train_lm.py", tiny, "--lr_schedule=constant")
    assert not differences(last_state(machines[0] / "run"), last_state(tmp_path / "run"))
    assert rows(machines[0] / "run")[-1] == rows(tmp_path / "run")[-1]


def test_a_nan_in_one_process_is_skipped_by_both(tmp_path, tiny):
    out = forked(ROOT / "tests/plant.py", "loss:inf:1:5,6", ROOT / "train_lm.py", tiny, "--max_steps=20")
    assert out.count("not finite: skipped") == 2 and "all processes have the same weights" in out


def test_a_process_that_dies_takes_the_others_along(tmp_path, tiny):
    """kill -9 to one of two: the launcher ends within seconds and leaves none; the same command goes on."""
    process = start("train_lm.py", tiny, "--max_steps=100000", processes=2)
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < end:
        time.sleep(0.05)
    trainers = [p for p in psutil.Process(process.pid).children() if "train_lm.py" in " ".join(p.cmdline())]
    assert len(trainers) == 2
    os.kill(trainers[1].pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1 and not psutil.wait_procs(trainers, timeout=10)[1]
    steps = last_state(tmp_path / "run")["progress"]["step"] + 10
    out, _ = run("train_lm.py", tiny, f"--max_steps={steps}", "--resume=True", processes=2)
    assert "resumed from" in out


def test_the_launch_configs(tmp_path):
    """Accelerate reads each of configs/accelerate, and takes from it what the file's name says."""
    from accelerate.commands.config import load_config_from_file

    found = {p.stem: load_config_from_file(str(p)) for p in (ROOT / "configs/accelerate").glob("*.yaml")}
    assert found.keys() == {"ddp", "fsdp2", "two_machines"}
    kinds = {name: (str(c.distributed_type.value), c.num_machines) for name, c in found.items()}
    assert kinds == {"ddp": ("MULTI_GPU", 1), "fsdp2": ("FSDP", 1), "two_machines": ("MULTI_GPU", 2)}
    assert found["fsdp2"].fsdp_config["fsdp_version"] == 2
