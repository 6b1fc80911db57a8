"""
Several processes and machines: a model in parts (FSDP2) trains, saves, resumes and is evaluated as a whole one is, in
every mode; two machines train as one, and the second needs nothing of the run directory; a process that dies takes the
others along, and the run goes on; the configs of configs/accelerate say what they mean.
"""

import os
import signal
import time

import psutil
import pytest
import torch
import yaml
from conftest import ROOT, differences, forked, last_state, rows, run, start, within
from safetensors.torch import load_file

FSDP2 = yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
FSDP2 = {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(value) for name, value in FSDP2.items()}


def in_parts(trainer, *arguments):
    return forked(ROOT / "tests/fsdp2.py", ROOT / trainer, *arguments, **FSDP2)


def far(a, b):
    """The largest difference of two nested states, each tensor's as a fraction of its largest value."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((far(a[k], b[k]) for k in a), default=0)
    if isinstance(a, list):
        return max((far(x, y) for x, y in zip(a, b, strict=True)), default=0)
    if not isinstance(a, torch.Tensor):
        return 0
    assert type(a) is type(b) is torch.Tensor and a.shape == b.shape and a.dtype == b.dtype
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-3)).item()


# a buffer among the weights, and in its file other names than in memory
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"n_group": 1, "topk_group": 1}
MODES = [
    ("train_diffusion.py", "", "--optimizer=adamw"),
    ("train_diffusion.py", "sd", "--adapter=lora"),
    ("train_diffusion.py", "ddpm", "--adapter="),
]


@pytest.mark.parametrize("trainer, base, setting", MODES, ids=lambda x: x)
def test_a_model_in_parts_is_as_a_whole_one(tmp_path, tiny, trainer, base, setting, request):
    """Ten steps in parts and saved, ten more after a resume, against twenty in one piece: all that is kept, and drawn."""
    how = [tiny, setting, "--lr_schedule=constant", "--max_steps=20", "--eval_interval=10"]
    if base and trainer == "train_lm.py":
        options = {"tied": False, **EXPERTS} if "moe" in base else {}
        folder = request.getfixturevalue("pretrained")(base, **options)
        how += [f"--init_from={folder}", "--tokenizer=", "--virtual_tokens=4", "--learning_rate=0.003"]
        how += ["--val_fraction=0"] if "p_tuning" in setting else []  # kept at the end, and read at once
    elif base:
        folder, data = request.getfixturevalue("pipeline")(base), request.getfixturevalue("captioned")
        how += [f"--init_from={folder}", f"--dataset={data}", "--sampler=ddim", "--learning_rate=0.001"]
        pictures = request.getfixturevalue("picture_folder")
        how += ["--image_size=16"] if base == "sd" else [f"--dataset={pictures}"]
    within(trainer, *how, f"--out_dir={tmp_path / 'whole'}")
    in_parts(trainer, *how, "--max_steps=10")
    assert "resumed from" in in_parts(trainer, *how, "--resume=True")
    a, b = tmp_path / "whole", tmp_path / "run"
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
    near = 5e-3 if base == "ddpm" else 1e-3  # convolutions round in their own way for every size of batch
    kept = ["model", "progress"]  # of the moments, those of a bias whose gradient is zero are rounding alone
    kept += ["optimizers"] if base not in ("gpt2", "ddpm") else []
    states = [{name: last_state(path)[name] for name in kept} for path in (a, b)]
    assert far(*states) < near
    for path in a.rglob("*.safetensors"):
        assert far(load_file(path), load_file(b / path.relative_to(a))) < near
    ends = [[row for row in rows(path) if row["step"] in (0, 20) and "lr" not in row] for path in (a, b)]
    assert ends[0] and ends[1] == [pytest.approx(row, rel=1e-3) for row in ends[0]]  # the evaluations
    assert (a / "samples/step_00000000.txt").exists() or (a / "samples/step_00000000.png").exists()
    for path in a.glob("samples/*_00000000.*"):  # drawn from the same weights, in step
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes()


def test_a_fine_tuned_language_model_in_parts(tmp_path, tiny, pretrained):
    """LoRA trains as in one piece; P-tuning is refused, because peft runs its encoder to save it."""
    how = [
        tiny,
        f"--init_from={pretrained('qwen3')}",
        "--tokenizer=",
        "--max_steps=20",
        "--lr_schedule=constant",
    ]
    within("train_lm.py", *how, "--adapter=lora", f"--out_dir={tmp_path / 'whole'}")
    in_parts("train_lm.py", *how, "--adapter=lora")
    whole, parts = (rows(tmp_path / name, "val/loss") for name in ("whole", "run"))
    assert parts == [pytest.approx(row, rel=1e-4) for row in whole]
    assert (
        load_file(tmp_path / "run/adapter_model.safetensors").keys()
        == load_file(tmp_path / "whole/adapter_model.safetensors").keys()
    )
    launch = (ROOT / "tests/fsdp2.py", ROOT / "train_lm.py", *how, "--adapter=p_tuning")
    assert "p_tuning" in forked(*launch, code=2, **FSDP2)


def test_two_machines_train_as_one(tmp_path, tiny):
    """Two launchers over loopback, each with a folder of its own; the second resumes without the run directory."""
    port = 20000 + os.getpid() % 10000
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--num_processes=2",
        f"--main_process_port={port}",
    ]
    launch += [
        f"--config_file={ROOT / 'configs/accelerate/two_machines.yaml'}",
        "--main_process_ip=127.0.0.1",
    ]
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
