"""
Attack real runs of train_diffusion.py in every mode, and show that nothing is lost:

    python tests/torture.py [--kills=20] [--modes="LoRA,SD LoRA"] [--seed=0]

Every mode runs once undisturbed, then again under attack: kill -9 at random instants and in the middle of saves, SIGTERM
to the trainer, its launcher and their process group at every stage, a disk that fills up or may not be written to,
checkpoints that are cut, half removed or another run's, a metrics file cut in a line, a second trainer on the same run,
data that changed, one of two processes killed, NaN and Inf planted in pictures, losses and gradients. Each time the same
command with --resume=True goes on, and what comes out has to be equal to the undisturbed run, bit for bit: weights,
optimizer, average, metrics. (What was skipped for a NaN cannot be equal; such a run has to end, and two processes have
to skip alike.) Two modes run at a time, each on a core of its own. Prints a table; exits with 1 if anything was lost.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from conftest import ROOT, TINY, TINY_MODEL, differences, last_state, rows
from PIL import Image
from pipelines import make_pipeline

STEPS = 24
HOW = [f"--max_steps={STEPS}", "--save_interval=3", "--eval_interval=6", "--log_interval=1", "--keep=last"]
PATIENCE = 120  # seconds until a process that does not end counts as hanging
TABLE, LOCK = {}, threading.Lock()


def count(mode, what, ok=True, note=""):
    """A line of the table: how often something was tried, and how often it went wrong."""
    with LOCK:
        tried, wrong = TABLE.get((mode, what), (0, 0))
        TABLE[mode, what] = (tried + 1, wrong + (not ok))
    if not ok:
        print(f"WRONG: {mode}, {what}: {note}", flush=True)


class Mode:
    """One way to train: its command, the core it has, its undisturbed run."""

    def __init__(self, name, work, trainer, *arguments):
        self.name, self.trainer, self.arguments = name, trainer, arguments
        self.folder = work / name.replace(" ", "_")
        self.config = self.folder / "tiny.py"
        self.folder.mkdir()
        self.config.write_text(TINY_MODEL[trainer] + TINY)
        self.unbroken = self.folder / "unbroken"

    def command(self, out, *more):
        where = [str(ROOT / self.trainer), str(self.config), *self.arguments, *HOW, f"--out_dir={out}"]
        return [*where, "--resume=True", *more]

    def start(self, out, *more, launcher=False, processes=1, before=(), plant="", output="output", **env):
        """
        The real command in a process group of its own. before: what goes before it, as prlimit. plant: what
        goes wrong inside it (see plant.py).
        """
        start = ["taskset", "--cpu-list", str(self.core)] if shutil.which("taskset") else []
        launch = ["-m", "accelerate.commands.launch", "--quiet", "--num_machines=1", "--main_process_port=0"]
        launch += ["--mixed_precision=no", "--dynamo_backend=no", f"--num_processes={processes}"]
        launch += ["--cpu"] if processes == 1 else ["--multi_gpu"]
        launch = launch if launcher or processes > 1 else []
        planted = [str(ROOT / "tests/plant.py"), plant] if plant else []
        env |= {"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}
        command = [*start, *before, sys.executable, *launch, *planted, *self.command(out, *more)]
        with open(self.folder / f"{output}.txt", "w") as file:
            streams = {"stdout": file, "stderr": file, "start_new_session": True}
            return subprocess.Popen(command, env=os.environ | env, **streams)

    def finish(self, process, what, output="output"):
        """Wait for a process -> its exit code and output; a hang is noted, and killed."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            count(self.name, what, False, "it hangs")
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        return code, (self.folder / f"{output}.txt").read_text()

    def alive(self, out):
        """The processes that still work for a run."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if f"--out_dir={out}" in (process.info["cmdline"] or []):
                found.append(process)
        return found

    def no_orphans(self, out, what, seconds=15):
        began = time.monotonic()
        while self.alive(out) and time.monotonic() - began < seconds:
            time.sleep(0.1)
        left = self.alive(out)
        count(self.name, "no process left over", not left, f"{what} left {len(left)} processes")
        for process in left:
            process.kill()

    def go_on(self, out, what, *more, unbroken=None, **how):
        """Resume to the end, and compare with the undisturbed run."""
        code, output = self.finish(self.start(out, *more, **how), what)
        if code:
            return count(self.name, what, False, f"resume: exit code {code}: {output[-300:]}")
        self.compare(out, what, unbroken or self.unbroken)

    def compare(self, out, what, unbroken):
        lost = differences(last_state(unbroken), last_state(out))
        lost += ["metrics"] if rows(unbroken) != rows(out) else []
        lost += [path.name for path in self.weights(unbroken) if not self.same_weights(path, out / path.name)]
        count(self.name, what, not lost, f"differs: {lost[:3]}")

    def refused(self, out, what, message, *more, code=2, **how):
        """The command ends in one clear line."""
        ended, output = self.finish(self.start(out, *more, **how), what, how.get("output", "output"))
        good = ended == code and message in output and "Traceback" not in output
        count(self.name, f"{what}: one clear line", good, f"{ended} {output[-400:]}")

    def weights(self, out):
        return sorted(out.glob("*.safetensors"))

    def same_weights(self, a, b):
        from safetensors.torch import load_file

        return b.exists() and not differences(load_file(a), load_file(b))


def newest(out):
    """The step of the newest whole checkpoint, 0 if there is none."""
    steps = [0]
    for folder in out.glob("checkpoints/step_*"):
        with contextlib.suppress(OSError, ValueError):
            sizes = json.loads((folder / "manifest.json").read_text())
            if all((folder / name).stat().st_size == size for name, size in sizes.items()):
                steps.append(int(folder.name[5:]))
    return max(steps)


def seen(out):
    """What can be seen of a run from outside, for an attack to be timed by."""
    state = {"saving": (out / "checkpoints" / "unfinished").exists()}
    with contextlib.suppress(OSError):
        state["replacing"] = any(name.endswith(".tmp") for name in os.listdir(out))
        state["rows"] = (out / "metrics.jsonl").stat().st_size
        state["samples"] = len(os.listdir(out / "samples"))
    return state


def wait_for(process, out, event, times, seconds):
    """Until an event has been seen so many times, or the process has ended, or time is over; -> was it seen?"""
    began, before = time.monotonic(), seen(out)
    while process.poll() is None and time.monotonic() - began < seconds:
        now = seen(out)
        if now.get(event) and now.get(event) != before.get(event):
            times -= 1
            if times <= 0:
                return True
        before = now
        time.sleep(0.0003)
    return False


def kill_at_random(mode, kills, rng):
    """kill -9, again and again, and --resume=True each time, until the run is at its end; then another run."""
    done, turn = 0, 0
    began = time.monotonic()
    mode.finish(mode.start(mode.folder / "timed"), "undisturbed")
    whole = time.monotonic() - began
    while done < kills:
        out, turn, reached = mode.folder / f"killed_{turn}", turn + 1, 0
        while done < kills:
            process = mode.start(out)
            event = rng.choice(["time", "saving", "saving", "replacing", "rows", "samples"])
            if event == "time":
                wait_for(process, out, "", 1, rng.uniform(0, whole))
            else:
                wait_for(process, out, event, rng.randint(1, 6), PATIENCE)
            if process.poll() is not None:
                code, output = mode.finish(process, "kill -9")
                count(mode.name, "runs between kills", code == 0, f"exit code {code}: {output[-300:]}")
                break
            process.kill()
            process.wait()
            done += 1
            count(mode.name, f"kill -9 at {event}")
            now = newest(out)
            count(
                mode.name, "checkpoints kept", now >= reached, f"step {reached} is gone, {now} is the newest"
            )
            reached = max(now, reached)
        mode.no_orphans(out, "kill -9")
        mode.go_on(out, "killed runs equal to the unbroken")


TARGETS = ("trainer", "launcher", "group")
STAGES = {
    "start-up": ("", 0.5),
    "training": ("rows", 4),
    "evaluation": ("rows", 7),
    "sampling": ("samples", 2),
}
STAGES |= {"saving": ("saving", 3), "replacing": ("replacing", 2), "imports": ("", 2.5)}


def stop_by_signal(mode, rng):
    """SIGTERM to the trainer, the launcher and the group, at each stage: it ends in time, and nothing is lost."""
    for i, (stage, (event, times)) in enumerate(STAGES.items()):
        for target in TARGETS if "scratch" in mode.name else [TARGETS[i % 3]]:
            out = mode.folder / f"stopped_{stage}_{target}"
            process = mode.start(out, launcher=target != "trainer")
            wait_for(process, out, event, times if event else 1, PATIENCE if event else times)
            if process.poll() is None:
                (os.killpg if target == "group" else os.kill)(process.pid, signal.SIGTERM)
            code, output = mode.finish(process, f"SIGTERM to the {target}")
            # the launcher has exit codes of its own
            good = code in (0, 143, -signal.SIGTERM) or (target != "trainer" and code == 1)
            quiet = target != "trainer" or "Traceback" not in output
            count(mode.name, f"SIGTERM to the {target}", good and quiet, f"{stage}: {code} {output[-300:]}")
            mode.no_orphans(out, f"SIGTERM to the {target}")
            if target == TARGETS[i % 3]:  # a resume costs as much as a run
                mode.go_on(out, "stopped runs equal to the unbroken")
            shutil.rmtree(out, ignore_errors=True)


def fill_the_disk(mode, rng):
    """No file may grow beyond a limit, as on a full disk: in a checkpoint, in the weights, in the cache."""
    state = max((mode.unbroken / "checkpoints").glob("step_*")) / "state.pt"
    parts = (0.2, 0.9) if "scratch" in mode.name else (0.5,)
    sizes = [state.stat().st_size, *(path.stat().st_size for path in mode.weights(mode.unbroken))]
    for limit in sorted({max(4096, int(size * part)) for size in sizes for part in parts}):
        out = mode.folder / "full"
        shutil.rmtree(out, ignore_errors=True)
        process = mode.start(out)
        wait_for(process, out, "saving", rng.randint(1, 5), PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        code, output = mode.finish(process, "full disk")
        line = output.strip().splitlines()[-1] if output.strip() else ""
        clear = code == 2 and "Traceback" not in output and "--resume=True goes on" in line
        note = f"limit {limit}: {code} {output[-400:]}"
        count(mode.name, "full disk: one clear line", clear, note)
        mode.no_orphans(out, "a full disk")
        mode.go_on(out, "full disk, then room: equal")
    full = {"before": ("prlimit", "--fsize=2048"), "HF_HOME": str(mode.folder / "home")}
    code, output = mode.finish(mode.start(mode.folder / "cache", **full), "full disk in the cache")
    clear = code == 2 and "Traceback" not in output
    count(mode.name, "full disk in the cache", clear, f"{code} {output[-400:]}")


# root may write anywhere, unless it is told not to
PLAIN = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)


def forbid_writing(mode, rng):
    """The place of the run, or in the middle of it that of its checkpoints, becomes read-only."""
    before = PLAIN if os.geteuid() == 0 else ()
    place = mode.folder / "place"
    place.mkdir()
    place.chmod(0o500)
    mode.refused(place / "run", "read-only place", "cannot write", before=before)
    place.chmod(0o700)
    out = mode.folder / "readonly"
    process = mode.start(out, before=before)
    wait_for(process, out, "saving", rng.randint(1, 4), PATIENCE)
    (out / "checkpoints").chmod(0o500)
    code, output = mode.finish(process, "read-only checkpoints")
    clear = code == 2 and "Traceback" not in output and "cannot write" in output
    count(mode.name, "read-only checkpoints: one clear line", clear, f"{code} {output[-400:]}")
    (out / "checkpoints").chmod(0o700)
    mode.go_on(out, "read-only, then not: equal")


def run_twice(mode, rng):
    """A second trainer on the run of one at work; one on the run of another kind of model."""
    out = mode.folder / "twice"
    process = mode.start(out)
    wait_for(process, out, "rows", 2, PATIENCE)
    process.send_signal(signal.SIGSTOP)  # it would be done before the second has begun
    mode.refused(out, "second trainer", "another trainer is at work", output="second")
    process.send_signal(signal.SIGCONT)
    code, output = mode.finish(process, "second trainer")
    count(mode.name, "first of two trainers ends well", code == 0, f"{code} {output[-300:]}")
    mode.compare(out, "first of two trainers: equal", mode.unbroken)


def change_data(mode, rng):
    """The data set is another one when a killed run goes on; then it is the old one again."""
    what, out = "data changed under a resume", mode.folder / "changed"
    source = Path(next(a for a in reversed(mode.arguments) if a.startswith("--dataset="))[10:])
    copy = mode.folder / f"data{source.suffix}"
    (shutil.copyfile if source.is_file() else shutil.copytree)(source, copy)
    process = mode.start(out, f"--dataset={copy}")
    wait_for(process, out, "saving", 3, PATIENCE)
    process.kill()
    process.wait()
    file = copy if copy.is_file() else min(copy.rglob("*.png"))
    old = file.read_bytes()
    file.write_bytes(old + b"a new end" if copy.is_file() else max(copy.rglob("*.png")).read_bytes())
    mode.refused(out, what, "cannot resume on other data", f"--dataset={copy}")
    file.write_bytes(old)
    mode.go_on(out, f"{what}, then back: equal", f"--dataset={copy}")


def kill_one_of_two(mode, rng):
    """kill -9 to one of two processes: both end, and with two again the run ends as one of two that lived."""
    what, two = "one of two processes killed", mode.folder / "two"
    code, output = mode.finish(mode.start(two, processes=2), what)
    count(mode.name, "two processes", code == 0, f"{code} {output[-400:]}")
    out = mode.folder / "one_of_two"
    process = mode.start(out, processes=2)
    wait_for(process, out, "saving", rng.randint(2, 5), PATIENCE)
    trainers = [p for p in mode.alive(out) if "accelerate.commands.launch" not in p.cmdline()]
    rng.choice(sorted(trainers, key=lambda p: p.pid)).kill()
    code, output = mode.finish(process, what)
    count(mode.name, what, code != 0, f"{code} {output[-300:]}")
    mode.no_orphans(out, what)
    mode.go_on(out, f"{what}: equal", unbroken=two, processes=2)


def plant(mode, rng):
    """
    NaN and Inf in pictures, losses and gradients: a few are skipped and counted, ten in a
    row end the run and name its last checkpoint; in one of two processes, both skip, and stay equal.
    """
    places = ["loss:nan", "loss:inf", "gradient:nan", "gradient:inf"]
    places += ["data:nan", "data:inf"]
    for place in places:
        out = mode.folder / place.replace(":", "_")
        code, output = mode.finish(mode.start(out, plant=f"{place}:0:5,6,11"), f"{place} planted")
        skipped = code == 0 and last_state(out)["progress"]["skipped"] == 3
        finite = all(weight.isfinite().all() for weight in last_state(out)["model"].values())
        count(
            mode.name, "NaN, Inf: skipped and counted", skipped and finite, f"{place} {code} {output[-300:]}"
        )
    out, steps = mode.folder / "lost", ",".join(map(str, range(7, STEPS)))
    message = "the last good checkpoint is"
    mode.refused(out, "NaN ten times in a row", message, code=1, plant=f"loss:nan:0:{steps}")
    code, output = mode.finish(mode.start(out), "after ten NaN")
    count(mode.name, "NaN ten times: goes on without them", code == 0, f"{code} {output[-300:]}")
    for place in ("loss:nan", "gradient:inf"):
        out = mode.folder / f"two_{place.replace(':', '_')}"
        code, output = mode.finish(
            mode.start(out, processes=2, plant=f"{place}:1:5,6"), f"{place} in one of two"
        )
        good = code == 0 and last_state(out)["progress"]["skipped"] == 2 and "the same weights" in output
        count(mode.name, "NaN, Inf in one of two processes", good, f"{place} {code} {output[-300:]}")


def damage(mode, rng):
    """The newest checkpoint cut, half removed, or another run's; metrics.jsonl cut in a line."""

    def cut(folder):
        with open(folder / "state.pt", "rb+") as f:
            f.truncate(f.seek(0, 2) // 2)

    attacks = {
        "newest checkpoint cut": lambda out, last: cut(last),
        "newest checkpoint half removed": lambda out, last: (last / "state.pt").unlink(),
        "newest checkpoint without manifest": lambda out, last: (last / "manifest.json").unlink(),
        "newest checkpoint another run's": lambda out, last: None,
        "a save left unfinished": lambda out, last: shutil.copytree(last, last.with_name("unfinished")),
        "metrics.jsonl cut in a line": lambda out, last: os.truncate(
            out / "metrics.jsonl", (out / "metrics.jsonl").stat().st_size - 7
        ),
    }
    for what, attack in attacks.items():
        out = mode.folder / "damaged"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(mode.unbroken, out)
        shutil.rmtree(max((out / "checkpoints").glob("step_*")))  # so that there is something left to do
        mode.finish(mode.start(out, "--save_interval=1"), what)
        attack(out, max((out / "checkpoints").glob("step_*")))
        if what == "newest checkpoint another run's":
            foreign = out / "checkpoints" / "step_00000099"
            shutil.copytree(max((mode.foreign / "checkpoints").glob("step_*")), foreign)
            mode.refused(out, what, "is of another run")
            shutil.rmtree(foreign)
        mode.go_on(out, what)


def make_data(work):
    """Pictures and captioned pictures of our own; a pipeline; -> the modes"""
    rng = np.random.default_rng(0)
    for i in range(60):
        colour, pixels = ("red", "green", "blue")[i % 3], rng.integers(0, 60, (16, 16, 3))
        pixels[4:12, 4:12, i % 3] = 220
        for path in (work / "classes" / colour / f"{i}.png", work / "captioned" / f"{i}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        (work / "captioned" / f"{i}.txt").write_text(f"a {colour} square")
    pipeline = make_pipeline(work / "sd", "sd")
    base = Mode("base", work, "train_diffusion.py", "--dataset=glyphs", "--image_size=16")
    base.core = 0
    code, output = base.finish(base.start(base.unbroken, "--max_steps=3"), "base")
    if code:
        raise SystemExit(output)
    Mode.foreign = base.unbroken
    pictures = ("--image_size=16", "--sample_steps=2", "--batch_size=4")
    sd = (f"--init_from={pipeline}", f"--dataset={work / 'captioned'}", "--sampler=ddim", *pictures)
    return [  # the longest first
        Mode("SD LoRA", work, "train_diffusion.py", *sd, "--adapter=lora"),
        Mode("scratch diffusion", work, "train_diffusion.py", f"--dataset={work / 'classes'}", *pictures),
    ]


def attack(mode, cores, arguments):
    mode.core = cores.pop()
    rng = random.Random(f"{arguments.seed} {mode.name}")
    code, output = mode.finish(mode.start(mode.unbroken), "undisturbed")
    if code:
        count(mode.name, "undisturbed", False, output[-1000:])
    else:
        kill_at_random(mode, arguments.kills, rng)
        stop_by_signal(mode, rng)
        fill_the_disk(mode, rng)
        damage(mode, rng)
        forbid_writing(mode, rng)
        run_twice(mode, rng)
        change_data(mode, rng)
        kill_one_of_two(mode, rng)
        plant(mode, rng)
    cores.append(mode.core)
    print(f"{mode.name}: done", flush=True)


def print_table(modes):
    """In Markdown: how often each was tried in each mode; what went wrong is said."""
    print(f"\n| | {' | '.join(modes)} |\n|{' --- |' * (len(modes) + 1)}")
    for what in dict.fromkeys(what for _, what in TABLE):
        cells = [TABLE.get((mode, what), (0, 0)) for mode in modes]
        cells = [f"{tried}" + f", {wrong} WRONG" * (wrong > 0) if tried else "" for tried, wrong in cells]
        print(f"| {what} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="kill -9 in each mode")
    parser.add_argument("--modes", help="with commas between them; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = parser.parse_args()
    began = time.monotonic()
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as work:
        os.environ["HF_HOME"] = str(Path(work, "home"))
        modes = make_data(Path(work))
        chosen = arguments.modes.split(",") if arguments.modes else [mode.name for mode in modes]
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        cores = cores[:2] if len(cores) > 1 else cores * 2
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(attack, mode, cores, arguments) for mode in modes if mode.name in chosen]
            for job in jobs:
                job.result()
    kills = sum(tried for (_, what), (tried, _) in TABLE.items() if what.startswith("kill -9 at"))
    wrong = sum(wrong for _, wrong in TABLE.values())
    print_table(chosen)
    print(f"\n{kills} kills, {wrong} wrong, {(time.monotonic() - began) / 60:.0f} minutes")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
