"""
Attacks real runs of both trainers, and shows that nothing is lost:

    python tests/torture.py [--kills=100] [--modes="LoRA,DiT"] [--seed=0]

Each way to train runs once undisturbed, then under attack: kill -9 at random moments and in saves; Ctrl-C,
SIGTERM and the launcher's death within a step of seconds; one process, two, one again; a run directory
that is read-only. The same command goes on with --resume=True, and what comes out has to equal the
undisturbed run bit for bit: weights, optimizer, averages, metrics, samples; with another number of processes
the losses within 1e-5. Prints how often each attack was tried; exits with 1 if anything was lost.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from conftest import ROOT, lost, rows
from PIL import Image
from pipelines import make_byte_tokenizer, make_pipeline

from configurator import configure

kills = 100  # kill -9 in all
modes = ""  # the ways to train, with commas between them; "": all
seed = 0  # of the moments

COMMON = "--resume=True --max_steps=24 --save_interval=3 --eval_interval=6 --eval_batches=2 --log_interval=1"
COMMON += " --batch_size=4 --warmup_steps=3 --mixed_precision=no"
TEXT = "train_lm.py --block_size=32 --dataset=text.txt"
PICTURES = "train_diffusion.py --image_size=16 --sample_steps=2 --dataset=pictures"
MODES = {  # the ways to train, the longest first
    "Z-Image LoRA": PICTURES + " --init_from=pipeline_z_image --adapter=lora",
    "SD LoRA": PICTURES + " --init_from=pipeline_sd --adapter=lora",
    "DiT": PICTURES + " --n_layer=2 --n_embd=32 --n_head=2",
    "scratch LM": TEXT + " --tokenizer=bytes --n_layer=2 --n_embd=32",
    "LoRA": TEXT + " --init_from=llama --adapter=lora",
    "P-tuning": TEXT + " --init_from=llama --adapter=p_tuning",
    "fine-tuning": TEXT + " --init_from=llama",
}
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
SIGNALS = {  # who is sent what, one after another, in the middle of a step
    "Ctrl-C under accelerate launch": [("group", INT)],
    "Ctrl-C three times": [("group", INT)] * 3,
    "Ctrl-C, then SIGTERM to the launcher": [("group", INT), ("launcher", TERM)],
    "SIGTERM to the launcher": [("launcher", TERM)],
    "SIGTERM to the trainer, twice": [("trainer", TERM)] * 2,
    "kill -9 to the launcher": [("launcher", KILL)],
}
SLOW = ["--max_steps=3", "--batch_size=600", "--micro_batch_size=1"]  # steps of several seconds
PATIENCE = 180  # seconds until a process that does not end counts as hanging
GOES_ON = "--resume=True goes on"  # the last line of a run that was stopped
# root may write anywhere, unless it gives that up
PLAIN_USER = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] * (os.geteuid() == 0)
TRIED = Counter()  # {(way to train, attack): how often}
LOST = []  # the same pairs


def attempt(mode, what, attack, *arguments):
    """Try an attack, which asserts that nothing was lost; -> nothing was"""
    TRIED[mode.name, what] += 1
    try:
        attack(mode, *arguments)
    except AssertionError as error:
        LOST.append((mode.name, what))
        print(f"LOST: {mode.name}, {what}: {str(error)[-1500:]}", flush=True)
    return (mode.name, what) not in LOST


class Mode:
    """A way to train, in a folder of its own, with its undisturbed run."""

    def __init__(self, work, name, n_kills):
        self.work, self.name, self.kills = work, name, n_kills
        self.rng, self.folder = random.Random(f"{seed} {name}"), work / name.replace(" ", "_")
        self.folder.mkdir()

    def new_run(self):
        return Path(tempfile.mkdtemp(dir=self.folder))

    def run_undisturbed(self):
        began = time.monotonic()
        self.unbroken = self.finish()
        self.seconds, self.slow = time.monotonic() - began, self.finish(*SLOW)

    def start(self, out, *more, processes=0, before=()):
        """Start the real command in a group of its own; with processes by `accelerate launch`."""
        launch = f"-m accelerate.commands.launch --num_processes={processes} --num_machines=1"
        launch += " --main_process_port=0 --mixed_precision=no --dynamo_backend=no"
        launch += " --multi_gpu" if processes > 1 else " --cpu"
        how = f"{launch if processes else ''} {ROOT}/{MODES[self.name]} {COMMON} --out_dir={out}".split()
        command = [*before, sys.executable, *how, *more]
        with open(f"{out}.txt", "w") as f:
            options = {"stdout": f, "stderr": f, "start_new_session": True, "cwd": self.work}
            return subprocess.Popen(list(map(str, command)), **options)

    def processes(self, out):
        """All that work for a run, by their command lines."""
        option = f"--out_dir={out}"
        return [p for p in psutil.process_iter(["cmdline"]) if option in (p.info["cmdline"] or ())]

    def wait(self, process, out, moment, times):
        """Until metrics.jsonl has grown, or a file is being written, so many times; or the end."""
        end, before = time.monotonic() + PATIENCE, None
        while process.poll() is None and time.monotonic() < end and times:
            now = 0
            with contextlib.suppress(OSError):
                saving = any(name.endswith(".tmp") for name in os.listdir(out))
                now = saving if moment == "in a save" else (out / "metrics.jsonl").stat().st_size
            times -= bool(now) and now != before is not None
            before = now
            time.sleep(0.0005)

    def send(self, process, out, target, signum):
        trainer = max((p.pid for p in self.processes(out)), default=process.pid)  # the last one started
        with contextlib.suppress(ProcessLookupError):
            os.kill({"group": -process.pid, "launcher": process.pid, "trainer": trainer}[target], signum)

    def end(self, process, out):
        """Wait until nothing is left of a run -> (exit code, output)"""
        end = time.monotonic() + PATIENCE
        while left := self.processes(out):
            if time.monotonic() > end:
                for p in left:
                    p.kill()
                raise AssertionError("it hangs")
            time.sleep(0.1)
        return process.wait(), Path(f"{out}.txt").read_text()

    def finish(self, *more, out=None, **options):
        """A run to its end -> its folder"""
        out = out or self.new_run()
        code, output = self.end(self.start(out, *more, **options), out)
        assert code == 0, f"exit code {code}: {output}"
        return out

    def resume(self, out, unbroken, *more):
        """Go on to the end, and compare everything with the undisturbed run."""
        self.finish(*more, out=out)
        # A run that had ended before it was killed also knows the best loss of its last evaluation.
        found = [
            name
            for name in lost(unbroken, out)
            if name not in ("/progress/best", "/progress/evals_since_best")
        ]
        assert not found, f"differs: {found[:5]}"


def kill_and_resume(mode):
    """kill -9, and resume, and kill again, until the run is at its end."""
    out = mode.new_run()
    while mode.kills:
        process, moment = mode.start(out), mode.rng.choice(("at any time", "in training", "in a save"))
        if moment == "at any time":
            time.sleep(mode.rng.uniform(0, mode.seconds))
        else:
            mode.wait(process, out, moment, mode.rng.randint(1, 9))
            time.sleep(mode.rng.uniform(0, 0.03) * (moment == "in training"))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        mode.kills -= 1
        TRIED[mode.name, f"kill -9 {moment}"] += 1
    mode.resume(out, mode.unbroken)


def stop_by_signal(mode, signals):
    """In the middle of a step of several seconds."""
    out = mode.new_run()
    process = mode.start(out, *SLOW, processes=1)
    mode.wait(process, out, "in training", 1)  # the first evaluation is over
    time.sleep(mode.rng.uniform(0.2, 2))
    for target, signum in signals:
        mode.send(process, out, target, signum)
        time.sleep(mode.rng.uniform(0.05, 0.5))
    _, output = mode.end(process, out)
    assert GOES_ON in output, output
    mode.resume(out, mode.slow, *SLOW)


def change_processes(mode):
    """One process, then two (stopped by Ctrl-C), two (of which one is killed), one."""
    one, out = mode.finish(), mode.new_run()
    for n, target, signum in (1, "launcher", TERM), (2, "group", INT), (2, "trainer", KILL):
        process = mode.start(out, processes=n)
        mode.wait(process, out, "in training", mode.rng.randint(2, 5))
        mode.send(process, out, target, signum)
        code, output = mode.end(process, out)
        assert GOES_ON in output or target == "trainer" and code, f"{signum} to the {target}: {code} {output}"
    mode.finish(out=out)
    names = ("train/loss", "val/loss", "test/loss")
    a, b = ([row.get(name, 0) for row in rows(run) for name in names] for run in (one, out))
    assert len(a) == len(b) and np.allclose(a, b, rtol=0, atol=1e-5), f"{a[-9:]} {b[-9:]}"


def forbid_writing(mode):
    """In the middle of a run its directory cannot be written to any more."""
    out = mode.new_run()
    process = mode.start(out, before=PLAIN_USER)
    mode.wait(process, out, "in training", mode.rng.randint(6, 12))
    out.chmod(0o500)
    code, output = mode.end(process, out)
    out.chmod(0o700)
    assert code, f"it came to its end: {output}"
    mode.resume(out, mode.unbroken)


def make_data(work):
    """Write a text, pictures and tiny models to the folder `work`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    (work / "text.txt").write_text(Path(subprocess.__file__).read_text()[:60000])
    for i in range(60):
        path = work / "pictures" / ("red", "green", "blue")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 2 * i).save(path)
        path.with_suffix(".txt").write_text(f"a {path.parent.name} square")
    tok = make_byte_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **shape)).save_pretrained(work / "llama")
    tok.save_pretrained(work / "llama")
    for kind in ("sd", "z_image"):
        make_pipeline(work / f"pipeline_{kind}", kind)


def main():
    began, names = time.monotonic(), modes.split(",") if modes else list(MODES)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a job in the background ignore it
    os.environ.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as work:
        os.environ["HF_HOME"] = str(Path(work, "home"))
        make_data(Path(work))
        for name in names:
            mode = Mode(Path(work), name, -(-kills // len(names)))
            if not attempt(mode, "undisturbed", Mode.run_undisturbed):
                continue
            while mode.kills and attempt(mode, "killed runs, resumed: equal", kill_and_resume):
                pass  # the next run
            for what, signals in list(SIGNALS.items())[: 1 if "init_from" in MODES[name] else None]:
                attempt(mode, what, stop_by_signal, signals)
            attempt(mode, "1, 2, 1 processes: losses within 1e-5", change_processes)
            attempt(mode, "read-only run directory", forbid_writing)
    for (name, what), n in TRIED.items():
        print(f"{name}: {n} x {what}")
    print(f"{len(LOST)} lost, {(time.monotonic() - began) / 60:.0f} minutes")
    raise SystemExit(len(LOST) > 0)


if __name__ == "__main__":
    configure(globals())
    main()
