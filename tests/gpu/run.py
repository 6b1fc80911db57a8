"""
Check every claim that is made for GPUs, on one H100 or H200, in one command of at most nine minutes:

    python tests/gpu/run.py --table=gpu.md [--nanogpt=PATH] [--parts=speed,lora]
    python tests/gpu/run.py --dry=True --run_seconds=500 --minutes=20   # on a CPU, at tiny shapes, to find typos

  compile     default GPT and DiT, and a tiny LoRA: graph breaks, recompilations after the first evaluation
  resume      each trainer, stopped and resumed with --deterministic=True, beside an unbroken run
  fsdp2       the same with FSDP2, on one GPU or all; the weights are read by transformers
  fp16        the shape of GPT-2 in fp16 with AdamW, for a few steps
  speed       the shape of GPT-2 (124 M), and 1.1 B: tokens/s, MFU, memory; with --nanogpt also its train.py
  waits       how often ten steps wait for the GPU; the longest gap between two kernels
  sampling    our generate() and that of transformers on the same weights; images of a DiT
  lora        Stable Diffusion 1.5, SDXL and a part of Flux.1, in bf16 and with frozen_fp8

The first four run at the same time, the others one by one. The table is Markdown for the README. If a part
fails, the others still run, and the exit code is 1.
"""

import argparse
import gc
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from benchmark import ROOT, read_metrics, run
from pipelines import make_byte_tokenizer, make_pipeline

from configurator import configure

parts = ""  # with commas between them; "": all
table = ""  # a file that the table is written to, too
dry = False  # on a CPU, at tiny shapes
minutes = 9.0  # of all parts; a run that has not ended by then is killed, and no other one is begun
run_seconds = 200  # of a single run, on a GPU; two CPU cores need 500 with --dry=True
nanogpt = ""  # a checkout of nanoGPT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOLDER = Path(tempfile.gettempdir(), f"gpu_run_{os.getpid()}")
DATA = f"--dataset={FOLDER}/text.txt --test_fraction=0"
GPT2 = f"train_lm.py {DATA} --tokenizer={FOLDER} --block_size=1024 --n_layer=12 --n_head=12 --n_kv_head=12"
GPT2 += " --n_embd=768"
BILLION = f"train_lm.py configs/gpt_1b.py {DATA} --tokenizer={FOLDER}"
DEFAULTS = {
    "train_lm.py": f"train_lm.py {DATA}",
    "train_diffusion.py": "train_diffusion.py --test_fraction=0",
}
TINY = "--n_layer=2 --n_head=2 --n_embd=32 --batch_size=4 --micro_batch_size=2"
TINY_OF = {"train_lm.py": f"{TINY} --n_kv_head=2 --block_size=32"}
TINY_OF["train_diffusion.py"] = f"{TINY} --image_size=16 --sample_steps=1"
BEGAN = time.monotonic()
ROWS = []  # of the table: [part, what, value, aim]
FAILED = []  # the parts that failed
SMI = "nvidia-smi --format=csv,noheader --query-gpu="

# A config file for every run. It ends a run that hangs and says where, and lets the memory in a row of
# metrics.jsonl be the peak since the row before. It ends a run at last_step, without a checkpoint: that of a
# large model takes longer to write than the steps that are measured. The last line that is then printed is
# the load of the GPU.
HOOK = """
import faulthandler
import os
import torch
from accelerate import Accelerator as _Accelerator

def _log(self, values, step=None, **kwargs):
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if step == {last_step}:
        os.system("{SMI}utilization.gpu,memory.used,clocks.sm,power.draw")
        os._exit(0)

faulthandler.dump_traceback_later({seconds}, exit=True)
_Accelerator.log = _log
if {shows_waits} and torch.cuda.is_available():
    torch.cuda.set_sync_debug_mode("warn")
"""

# ---- Helpers ----


def pick(real, tiny):
    return tiny if dry else real


def note(part, what, value, aim="", is_met=None):
    """Print a row and add it to the table. is_met: if given, whether the value meets the aim."""
    if is_met is not None:
        aim += ": pass" if is_met else ": FAIL"
    if is_met is False:
        FAILED.append(part)
    row = [str(cell).replace("|", "/") for cell in (part, what, value, aim)]
    ROWS.append(row)
    print(f"[{time.monotonic() - BEGAN:.0f} s]", " - ".join(row), flush=True)


def attempt(part, function, *args):
    """Call a function. If it fails, say so in the table and go on."""
    try:
        function(*args)
    except (Exception, SystemExit) as error:  # run() raises SystemExit
        traceback.print_exc()
        FAILED.append(part)
        last_line = str(error).strip().rpartition("\n")[2]
        note(part, f"{part.upper()}: FAILED: {type(error).__name__}: {last_line[:200]}", "")
    write_table()  # now, because this process may be killed later


def in_parallel(*functions):
    """Call functions at the same time, and raise the first error."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda function: function(), functions))


def train(name, arguments, launch="", is_resumed=False, last_step=-1, shows_waits=False):
    """Run a trainer in the folder `name`. Return the rows of its metrics.jsonl, and what it printed.

    A run that several parts look at is made once. last_step: end at this step, which must be logged.
    """
    out = FOLDER / name
    printed = FOLDER / f"{name}.log"
    if is_resumed or not out.exists():
        seconds = min(run_seconds, int(60 * minutes - (time.monotonic() - BEGAN)))
        if seconds < 20:
            raise TimeoutError(f"{name} was not run: the time is up")
        hook = FOLDER / f"{name}_hook.py"
        hook.write_text(HOOK.format(SMI=SMI, last_step=last_step, seconds=seconds, shows_waits=shows_waits))
        script, *rest = arguments.split()
        if dry and "--init_from" not in arguments:
            rest += TINY_OF[script].split()
        env = {"TORCH_LOGS": "graph_breaks,recompiles"}
        if shows_waits:
            env["PYTHONWARNINGS"] = "always"
        if launch and dry:
            env["ACCELERATE_USE_CPU"] = "true"
        _, output = run(*launch.split(), script, hook, *rest, f"--out_dir={out}", **env)
        printed.write_text(output)
    if not printed.exists():
        raise RuntimeError(f"the run {name} has failed before")
    return read_metrics(out), printed.read_text()


def note_run(part, what, rows, output="", aim=""):
    """Note the medians of the later half of the steps of a run, and the load of the GPU."""
    steps = [row for row in rows if "grad_norm" in row]
    values = {name: statistics.median(row[name] for row in steps[len(steps) // 2 :]) for name in steps[-1]}
    found = []
    for name, unit in (("tokens_per_s", "tokens/s"), ("images_per_s", "images/s")):
        if name in values:
            found.append(f"{values[name]:,.4g} {unit}")
    if "mfu" in values:
        found.append(f"{values['mfu']:.1%} MFU")
    found.append(f"{values['memory_gb']:.1f} GB ({steps[0]['memory_gb']:.1f} GB at the start)")
    if output:
        found.append("nvidia-smi: " + output.strip().rpartition("\n")[2])
    note(part, what, ", ".join(found), aim)


def note_calls(part, what, function, n_calls, n_each, unit):
    """Note the speed of a function, each call of which makes n_each units, and its memory."""
    function()  # a first call, which is not measured
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    for _ in range(n_calls):
        function()
    memory = 0
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated()
    rate = n_calls * n_each / (time.monotonic() - began)
    note(part, what, f"{rate:,.4g} {unit}/s, {memory / 1e9:.1f} GB")


# ---- The parts that run at the same time ----


def check_compile():
    functions = [*(partial(check_default, script) for script in DEFAULTS), check_tiny_lora]
    in_parallel(*(partial(attempt, "compile", function) for function in functions))


def check_default(script):
    note_compilations("compile", f"default model of {script}", run_default(script), first_step=10)


def run_default(script):
    """Run a trainer with its default model and three evaluations. Return what it printed."""
    # With 10 % of the data, all batches of an evaluation are full.
    arguments = f"{DEFAULTS[script]} --max_steps=40 --eval_interval=20 --save_interval=0 --val_fraction=0.1"
    _, output = train(f"default_{script}", arguments, shows_waits=True)
    return output


def check_tiny_lora():
    _, command = lora_command(FOLDER / "tiny", "flux", 16, 2, True, 4)
    _, output = train("tiny_lora", command)
    note_compilations("compile", "LoRA on a tiny Flux", output, first_step=1)


def note_compilations(part, what, output, first_step):
    """Note what a run has said about compilation. first_step: the first step that was logged."""
    breaks = len(re.findall(r"Graph break (?:\(user stack suppressed.*\) )?in user code", output))
    _, _, later = output.partition(f"step {first_step}/")
    again = later.count("Recompiling function")
    what = f"{what}: graph breaks, recompilations after the first evaluation"
    note(part, what, f"{breaks}, {again}", "0, 0", breaks == again == 0)


def check_resume():
    calls = [(stop_and_resume, "resume", script, DEFAULTS[script]) for script in DEFAULTS]
    in_parallel(*(partial(attempt, "resume", *call) for call in calls))


def stop_and_resume(part, name, arguments, launch=""):
    """Check that a run which is stopped after 6 of 12 steps and resumed equals an unbroken one.

    No evaluation is due at step 6, so the two compile their graphs in another order.
    """
    arguments += " --deterministic=True --resume=True --lr_schedule=constant --log_interval=1"
    arguments += " --eval_interval=4 --save_interval=6 --max_steps="
    unbroken = partial(train, name, f"{arguments}12", launch)
    stopped = partial(train, f"{name}_stopped", f"{arguments}6", launch)
    in_parallel(unbroken, stopped)
    train(f"{name}_stopped", f"{arguments}12", launch, is_resumed=True)
    files = [FOLDER / folder / "checkpoint.pt" for folder in (name, f"{name}_stopped")]
    a, b = [torch.load(file, weights_only=True)["model"] for file in files]
    n_equal = sum(torch.equal(a[key], b[key]) for key in a)
    what = f"{name}, stopped and resumed: weights that equal those of an unbroken run bitwise"
    note(part, what, f"{n_equal} of {len(a)}", "all", n_equal == len(a))


def check_fsdp2():
    world = pick(max(1, torch.cuda.device_count()), 2)
    launch = f"-m accelerate.commands.launch --config_file={ROOT}/configs/accelerate/fsdp2.yaml"
    launch += f" --main_process_port=0 --num_processes={world}" + pick("", f" {TESTS}/fsdp2.py")
    name = f"fsdp2_on_{world}"
    arguments = f"{GPT2} --n_layer=4 --batch_size={4 * world} --micro_batch_size=2 --eval_batches=2"
    stop_and_resume("fsdp2", name, arguments, launch)
    n_saved = json.loads((FOLDER / name / "run.json").read_text())["parameters"]
    n_read = AutoModelForCausalLM.from_pretrained(FOLDER / name).num_parameters()
    note("fsdp2", "parameters that transformers reads", n_read, str(n_saved), n_read == n_saved)


def check_fp16():
    arguments = f"{GPT2} --batch_size=16 --micro_batch_size=8 --optimizer=adamw --compile=False"
    arguments += f" --mixed_precision={pick('fp16', 'no')} --val_fraction=0 --warmup_steps=5 --log_interval=1"
    rows, output = train("fp16", arguments, last_step=20)
    first, last = rows[0]["train/loss"], rows[-1]["train/loss"]
    value = f"{first:.2f} to {last:.2f}, {output.count('not finite')} steps skipped"
    note("fp16", "124 M, fp16, AdamW, 20 steps: train/loss", value, "falls", last < first)
    stop_and_resume("fp16", "fp16_resume", f"{arguments} --n_layer=2")  # with the state of the scaler


# ---- Speed and waits ----


def run_gpt2():
    """Run the shape of GPT-2 for 40 steps, with a trace of the steps 6 to 8."""
    arguments = f"{GPT2} --batch_size=64 --micro_batch_size=32 --eval_batches=1 --eval_interval=20"
    arguments += " --save_interval=0 --log_interval=5 --profile=True"
    return train("gpt2", arguments, last_step=40)


def check_speed():
    rows, output = run_gpt2()
    what = "124 M (GPT-2's shape, block 1024), bf16, Muon, 2 x 32 rows"
    note_run("speed", what, rows, output, "50 % MFU")
    note_compilations("speed", "124 M", output, first_step=5)
    if nanogpt:
        attempt("speed", run_nanogpt)
    arguments = f"{BILLION} --batch_size=32 --micro_batch_size=8 --val_fraction=0 --log_interval=2"
    what = "1.1 B (18 layers, width 2048, block 2048), bf16, AdamW, 4 x 8 rows"
    note_run("speed", what, *train("billion", arguments, last_step=16), "55 % MFU")


def run_nanogpt():
    """Run nanoGPT's own train.py on random tokens. Its defaults are the shape of GPT-2, bf16 and AdamW."""
    data = FOLDER / "random"
    data.mkdir()
    for split in ("train", "val"):
        np.random.randint(50257, size=2_000_000).astype(np.uint16).tofile(data / f"{split}.bin")
    command = f"train.py --dataset={data} --out_dir={data} --batch_size=32 --gradient_accumulation_steps=2"
    command += " --max_iters=40 --eval_iters=1 --log_interval=1"
    if dry:
        command += " --device=cpu --dtype=float32 --compile=False --n_layer=1 --n_embd=48 --block_size=16"
    _, output = run(*command.split(), cwd=nanogpt)
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", output)]
    rate = 2 * 32 * 1024 * 1000 / statistics.median(times[20:])
    note("speed", "nanoGPT's train.py at the same shape and batch, compiled, AdamW", f"{rate:,.4g} tokens/s")


def check_waits():
    for script in DEFAULTS:
        attempt("waits", check_synchronizations, script)
    attempt("waits", check_gaps)


def check_synchronizations(script):
    # The steps 11 to 20 are between these two lines. The evaluation comes after the second one.
    _, _, later = run_default(script).partition("step 10/40 ")
    ten_steps, _, _ = later.partition("step 20/40 ")
    found = Counter(re.findall(r"([^\s/]+:\d+): UserWarning: called a synchroniz", ten_steps))
    what = f"{script}: how often the CPU waits for the GPU in ten steps"
    note("waits", what, f"{found.total()} {found.most_common(3)}", "10", found.total() <= 10)


def check_gaps():
    """Look for gaps between kernels in the trace of the steps 6 to 8.

    The queue of the GPU is empty where a trace begins, so look from the first optimizer step on.
    """
    run_gpt2()
    (trace,) = (FOLDER / "gpt2").glob("*.pt.trace.json")
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    kinds = pick(("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op",))
    begin = min(e["ts"] for e in events if e.get("name", "").startswith("Optimizer.step"))
    kernels = [e for e in events if e.get("cat") in kinds and e["ts"] > begin]
    kernels.sort(key=lambda e: e["ts"])
    gaps = []  # [(µs, kernel before, kernel after)]
    end = kernels[0]["ts"]  # of all kernels so far
    for before, after in itertools.pairwise(kernels):
        end = max(end, before["ts"] + before["dur"])
        gaps.append((max(0, after["ts"] - end), before["name"][:40], after["name"][:40]))
    longest, before, after = max(gaps)
    idle = sum(gap for gap, _, _ in gaps) / (end - kernels[0]["ts"])
    value = f"{longest:.0f} µs (from {before} to {after}); idle {idle:.1%} of the time"
    # On a CPU, the check would mean nothing.
    is_met = pick(longest <= 100, None)
    note("waits", "124 M, traced steps: longest gap between GPU kernels", value, "100 µs", is_met)


# ---- Sampling ----


def check_sampling():
    run_gpt2()
    import sample
    import train_diffusion

    sample.out_dir = str(FOLDER / "gpt2")
    sample.load_run()
    ids = sample.tok("def ")["input_ids"]
    dtype = next(sample.model.parameters()).dtype
    theirs = AutoModelForCausalLM.from_pretrained(sample.out_dir, dtype=dtype).to(DEVICE)
    n_new = pick(200, 20)
    options = {"max_new_tokens": n_new, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def ours(n):
        return list(sample.generate_tokens(ids, n, seed=0, **options))

    def transformers(n):
        prompts = torch.tensor([ids] * n, device=DEVICE)
        mask = torch.ones_like(prompts)
        more = {"attention_mask": mask, "do_sample": True, "min_new_tokens": n_new, "pad_token_id": 0}
        return theirs.generate(prompts, **more, **options)

    for n, generate in itertools.product((1, 16), (ours, transformers)):
        what = f"124 M, {n} texts at once, generate() of {generate.__name__}"
        note_calls("sampling", what, partial(generate, n), 1, n * n_new, "tokens")

    shape = pick({"n_layer": 12, "n_head": 12, "n_embd": 768}, {"n_layer": 2, "n_head": 2, "n_embd": 32})
    vars(train_diffusion).update(shape)
    dit = train_diffusion.DiT((3, 32, 32), ["cat"]).to(DEVICE).eval()
    draw = partial(train_diffusion.draw, dit, ["cat"] * 64, range(64), pick(25, 2), 2.0)
    what = "DiT-B/2 (130 M), 32 x 32, 25 steps with guidance, 64 images at once"
    note_calls("sampling", what, draw, 1, 64, "images")


# ---- LoRA ----

FLUX = "Flux.1 of true width with 2 of its 19 double blocks and 4 of its 38 single ones"
# Kind of pipeline, also for a dry run; name; image size; images per step. The loop of diffusers is for sd15.
LORA = [
    ("flux_part", "flux", FLUX, 512, 1),
    ("sdxl10", "sdxl", "SDXL", 1024, 1),
    ("sd15", "sd", "Stable Diffusion 1.5", 512, 4),
]


def lora_command(folder, kind, size, batch, checkpointing, steps):
    """Return a pipeline with random weights, which is made once, and our command that trains it."""
    base = Path(folder, kind)
    if not base.exists():
        make_pipeline(base, kind, DEVICE, torch.bfloat16)
    images = Path(folder, f"images_{kind}")
    images.mkdir(parents=True, exist_ok=True)
    for i in range(8):
        Image.effect_noise((size, size), 50).convert("RGB").save(images / f"{i}.png")
    command = f"""train_diffusion.py --init_from={base} --adapter=lora --lora_targets=to_k,to_q,to_v,to_out.0
        --dataset={images} --caption=square --image_size={size} --batch_size={batch} --max_steps={steps}
        --log_interval=1 --val_fraction=0 --test_fraction=0 --eval_interval=0 --save_interval=0
        --sample_steps=1 --mixed_precision=bf16 --gradient_checkpointing={checkpointing}"""
    return base, command


def lora_loop(base, size, batch, checkpointing):
    """Return a step of diffusers' train_text_to_image_lora.py, for Stable Diffusion 1.5."""
    accelerator = Accelerator(mixed_precision="bf16")
    device = accelerator.device
    scheduler = diffusers.DDPMScheduler()
    pipe = diffusers.DiffusionPipeline.from_pretrained(base, dtype=torch.bfloat16).to(device)
    model = pipe.unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=16, target_modules=targets, init_lora_weights="gaussian", lora_alpha=16))
    cast_training_params(model, torch.float32)
    if checkpointing:
        model.enable_gradient_checkpointing()
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model.train(), torch.optim.AdamW(trained, lr=1e-4))
    pixels = torch.randn(batch, 3, size, size, device=device, dtype=torch.bfloat16)

    def step():
        with torch.no_grad():
            x = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
            texts, _ = pipe.encode_prompt(["a square"] * batch, device, 1, do_classifier_free_guidance=False)
        noise = torch.randn_like(x)
        t = torch.randint(1000, (batch,), device=device)
        output = model(scheduler.add_noise(x, noise, t), t, texts, return_dict=False)[0]
        learn(accelerator, F.mse_loss(output.float(), noise.float()), trained, optimizer)

    return step


def learn(accelerator, loss, weights, optimizer):
    """Take the step of an optimizer as the scripts of diffusers do."""
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def prepare_lora():
    """Make the pipelines, while the first parts run."""
    for real, tiny, _, size, batch in LORA:
        lora_command(FOLDER, pick(real, tiny), pick(size, 16), batch, False, 1)
        free_memory()


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()


def check_lora():
    for real, tiny, name, size, batch in LORA:
        free_memory()
        kind = pick(real, tiny)
        checkpointing = real != "sd15"
        base, command = lora_command(FOLDER, kind, pick(size, 16), batch, checkpointing, 12)
        command += " --compile=False"  # compiling such models takes minutes
        what = f"{name}, {size} x {size}, batch {batch}, not compiled"
        how = "bf16, checkpointing" if checkpointing else "bf16"
        attempt("lora", run_lora, f"{what}, {how}", f"lora_{kind}", command)
        command += " --gradient_checkpointing=True --frozen_fp8=True"
        attempt("lora", run_lora, f"{what}, frozen_fp8, checkpointing", f"lora_{kind}_fp8", command)
    step = lora_loop(base, pick(size, 16), batch, False)
    what = f"{what}, bf16: the loop of diffusers' script"
    note_calls("lora", what, step, pick(10, 2), batch, "images")


def run_lora(what, name, command):
    note_run("lora", what, *train(name, command, last_step=10))


# ---- The order of the parts, and the table ----

TOGETHER = {"compile": check_compile, "resume": check_resume, "fsdp2": check_fsdp2, "fp16": check_fp16}
ALONE = {"speed": check_speed, "waits": check_waits, "sampling": check_sampling, "lora": check_lora}
PARTS = TOGETHER | ALONE


def write_table():
    """Return the table, sorted by parts, and write it to the file `table`."""
    order = ["machine", *PARTS]
    rows = [["part", "what", "value", "aim"], ["---"] * 4]
    rows += sorted(ROWS, key=lambda row: order.index(row[0]))
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if table:
        Path(table).write_text(text + "\n", "utf-8")
    return text


def main():
    if DEVICE == "cpu" and not dry:
        sys.exit("NO GPU WAS FOUND: nothing was tested; --dry=True tries it on a CPU")
    chosen = parts.split(",") if parts else list(PARTS)
    if not set(chosen) <= PARTS.keys():
        sys.exit(f"--parts= takes some of {','.join(PARTS)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{FOLDER}/cache"}
    FOLDER.mkdir()
    try:
        (FOLDER / "text.txt").write_text(Path(argparse.__file__).read_text("utf-8") * pick(20, 1), "utf-8")
        make_byte_tokenizer(50000).save_pretrained(FOLDER)  # with as many tokens as GPT-2's
        gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "DRY RUN ON A CPU: no figure counts"
        note("machine", "GPU, torch", f"{gpu}, {torch.__version__}")
        fields = "name,driver_version,power.limit,clocks.sm,clocks.max.sm,memory.used"
        found = subprocess.run(f"{SMI}{fields}", shell=True, check=False, capture_output=True, text=True)
        note("machine", f"nvidia-smi: {fields}", found.stdout.strip() or "nvidia-smi is missing")
        jobs = [partial(attempt, part, TOGETHER[part]) for part in chosen if part in TOGETHER]
        if "lora" in chosen:
            jobs.append(partial(attempt, "lora", prepare_lora))
        if jobs:
            in_parallel(*jobs)
        for part in chosen:
            if part not in TOGETHER:
                attempt(part, PARTS[part])
        note("machine", "minutes in all", f"{(time.monotonic() - BEGAN) / 60:.1f}")
    finally:
        print("\n" + write_table(), flush=True)
        shutil.rmtree(FOLDER, ignore_errors=True)
    sys.exit(1 if FAILED else 0)


if __name__ == "__main__":
    configure(globals())
    main()
