"""
Let a trained model speak, or draw.

    python sample.py --prompt="def "                                      # the run in out/lm
    python sample.py --out_dir=out/mine --prompt=FILE:start.txt --num_samples=3 --temperature=0.8
    python sample.py --out_dir=out/lora-chat --chat=True                  # a conversation in the terminal
    python sample.py --out_dir=out/lora-chat --merge=merged/              # model and adapter as one model
    python sample.py --out_dir=out/diffusion --class_label=7 --num_samples=16
    python sample.py --out_dir=out/sd15-lora --prompt="a sks dog in the snow" --guidance=7 --steps=25
    python sample.py --out_dir=out/lm --demo=True                         # any of these in a browser

A language model writes the prompt and its continuation to stdout, nothing else; any folder with a causal
language model of transformers, or an adapter of peft, works as well. A diffusion model writes a PNG: a grid.
"""

import ast
import contextlib
import functools
import html
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch

from configurator import configure, fail, named, nearest, settings

# -----------------------------------------------------------------------------
# Settings
# -----------------------------------------------------------------------------
out_dir = "out/lm"  # a run, one of its checkpoints, or a folder with a model of transformers
num_samples = 0  # texts or pictures, of each prompt; 0: one; a picture of each class, or 16 without any
seed = 1337  # the same seed, the same text or picture
trust_run_code = False  # run the model code that lies in out_dir: only for runs whose author you trust
# text
prompt = "\n"  # the text to go on from, or what to draw; FILE:x.txt: from a file, line by line to draw
max_new_tokens = 300  # length of each (1..)
temperature = 0.8  # 0: always the likeliest token; 1: as the model says; above: wilder
top_k = 0  # draw from so many of the likeliest tokens; 0: from all
top_p = 1.0  # draw from the likeliest tokens that make up this share of the probability (0..1)
chat = False  # answer line after line of stdin, by the chat template; a prompt is the first line
merge = ""  # a new folder: write the model with its LoRA adapter merged into it there, and say nothing
# pictures
negative_prompt = ""  # what the pictures are to be unlike
lora_scale = 1.0  # how much of the LoRA adapter is added: 0 draws as the base does
class_label = ""  # the name or number of a class; "": all of them
steps = 0  # from noise to picture; more are finer and slower; 0: as the run has it (0..1000)
guidance = 0.0  # how much to exaggerate what is typical of the class; 1: not at all; 0: as the run has it
sampler = ""  # euler, heun (flow), euler, ddpm, ddim, dpm++, unipc (eps, v); "": as the run has it
output = "sample.png"  # where the grid goes
# in a browser
demo = False  # open a page for this run, where the settings above stand as they are given here
port = 7860  # of the page on this machine (1..65535)
share = False  # give it a public address as well, by way of Gradio's servers, for all who know it


def say(message):
    print(message, file=sys.stderr, flush=True)


def reason(error):
    """The first line of what an error says, or if it says nothing, its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def comments():
    """{setting: its comment at the top of this file}"""
    return dict(re.findall(r"^([a-z]\w*) = .*?  # (.*)$", Path(__file__).read_text("utf-8"), re.MULTILINE))


def check_legal(name, value, comment):
    """A comment may end in legal values, as (1..) or (0..1); without, no number is negative."""
    if type(value) in (int, float):
        bounds = re.search(r"\((-?\d+)\.\.(\d*)\)$", comment)
        low, high = bounds.groups() if bounds else ("0", "")
        if not float(low) <= value <= float(high or "inf"):  # NaN neither
            fail(f"{name}={value} must be at least {low}" + (f" and at most {high}" if high else ""))


# what makes the weights of a run a model, by the kind of the run
MODEL_CODE = {"lm": {"GPT", "generate"}, "diffusion": {"DiT", "Process", "sample", "decode"}}
PRETRAINED_CODE = {"lm": {"generate"}, "diffusion": {"UNet", "Process", "sample", "decode", "add_lora"}}


def model_code(path, names):
    """
    The model in a training script, without comments and layout: equal code builds equal models. names: where it
    begins; all functions and classes of the script that these use belong to it.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            del node.body[0]
    code = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    reached, new = set(), names & code.keys()
    while new:
        reached |= new
        used = {node.id for name in new for node in ast.walk(code[name]) if isinstance(node, ast.Name)}
        new = (used & code.keys()) - reached - {"fail", "log"}
    return {name: ast.dump(code[name]) for name in reached}


def import_trainer(run_dir, kind, names):
    """-> the training script as a module: ours, or the run's own copy where that is trusted."""
    name = f"train_{kind}"
    copy, ours = run_dir / f"{name}.py", Path(__file__).with_name(f"{name}.py")
    if copy.exists() and not trust_run_code and model_code(copy, names) != model_code(ours, names):
        fail(
            f"the model in {copy} is not the one in {ours.name} here: --trust_run_code=True runs that file, "
            "if you trust its author"
        )
    path = copy if copy.exists() and trust_run_code else ours
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.log = say  # stdout is for what the model says
    return module


def read_prompt():
    text = prompt
    if prompt.startswith("FILE:"):
        try:
            text = Path(prompt[5:]).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            fail(f"cannot read the prompt from {prompt[5:]}: {error}")
    return text or fail('the prompt is empty: give it some text, as in --prompt="def "')


def load_run(folder, run_dir, device):
    """-> (run.json, the training script as a module, the model with the weights of `folder`, its tokenizer or None)"""
    with named("run", str(run_dir)):
        run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        if run["kind"] not in MODEL_CODE:
            raise ValueError(f"it is of kind {run['kind']!r}, not of one of the trainers here")
        kept = ("state.pt", "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
        kept += ("pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors")
        if not any((folder / name).exists() for name in kept):
            raise ValueError("it has no weights yet: they are kept from the first evaluation on")
        pretrained = run["model"] == "Pretrained" or "fingerprint" in run["model"]  # the code is a library's
        trainer = import_trainer(
            run_dir, run["kind"], (PRETRAINED_CODE if pretrained else MODEL_CODE)[run["kind"]]
        )
        if run["kind"] == "diffusion":
            return run, trainer, load_diffusion(run, trainer, folder).to(device).eval(), None
        model, tok = trainer.load(folder, run)
    large = sum(p.numel() for p in model.parameters()) > 10**7  # reading the weights takes most of the time
    if large and not merge and computes_in_bf16(run, device):
        model.bfloat16()
    return run, trainer, model.to(device), tok


def load_diffusion(run, trainer, folder):
    """-> the model that a run has trained, from `folder` or a checkpoint"""
    from safetensors.torch import load_file

    state = None
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if "fingerprint" in run["model"]:
        return load_unet(run, trainer, folder, state)
    state = state or {"model": load_file(folder / "model.safetensors"), "progress": {}}
    model = trainer.DiT(trainer.Shape(**run["model"]))
    model.load_state_dict(state["model"])
    take_average(model, state)
    return model


def take_average(model, state):
    """A diffusion model draws from the average of its weights, where its checkpoint has one."""
    if "ema" in state["progress"]:
        average = state["progress"]["ema"]["shadow_params"]
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        model.load_state_dict(dict(zip(names, average, strict=True)), strict=False)


def load_unet(run, trainer, folder, state):
    """-> the UNet that a run has trained, with its pipeline, from `folder` or a checkpoint's `state`."""
    trained, base = run["settings"], trainer.Base(**run["model"])
    whole = not trained["adapter"] and not state
    pipe = trainer.load_pipeline(str(folder) if whole else base.name, base.dtype)
    if not whole and trainer.fingerprint(pipe.unet) != base.fingerprint:
        fail(f"the weights of {base.name} have changed since {folder} was trained on them")
    if trained["adapter"]:
        trainer.add_lora(pipe.unet, *(trained[name] for name in ("lora_rank", "lora_alpha", "lora_targets")))
        pipe.unet.set_adapters(pipe.unet.active_adapters(), lora_scale)
    model = trainer.UNet(pipe, base, {})
    if not whole:
        weights = state["model"] if state else trainer.read_lora(folder)
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            fail(f"{folder} holds weights of another model: {unknown[0]}")
    if state:
        take_average(model, state)
    return model


def device_of(model):
    return next(model.parameters()).device.type


def computes_in_bf16(run, device):
    """Whether the run did, by its setting and the hardware, so that this is how it is to be sampled from."""
    if run["settings"].get("mixed_precision") not in ("auto", "bf16"):
        return False
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def load_plain(folder, device):
    """-> (a model of transformers in a folder that is no run of ours, or one under an adapter of peft; tokenizer)"""
    from transformers import AutoTokenizer

    import train_lm

    train_lm.log = say
    with named("model", str(folder)):
        model = train_lm.Pretrained(train_lm.load_lm(str(folder)))
        return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def continuation(model, tok, ids, seed, **how):
    """Yield the text that follows `ids` in pieces, a character of several tokens with the last of them."""
    from tokenizers.decoders import DecodeStream

    from train_lm import generate  # it is the run's own: import_trainer has compared or replaced it

    if how["temperature"] < 1e-3:  # dividing by it would overflow
        how["temperature"] = 0.0
    ends = getattr(getattr(model, "lm", None), "generation_config", None)
    ends = getattr(ends, "eos_token_id", None)
    ends = {tok.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    decoder = DecodeStream(skip_special_tokens=True)
    for token in generate(model, ids, 1, seed=seed, eos=sorted(ends), **how):
        yield decoder.step(tok.backend_tokenizer, int(token)) or ""


def print_text(pieces):
    """Print pieces of text as they come; -> all of it"""
    text = ""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        text += piece
    sys.stdout.write("\n")
    return text


def to_ids(tok, text, **options):
    try:
        return tok(text, **options)["input_ids"]
    except Exception as error:  # the tokenizers library raises no narrower one
        strange = sorted(set(text) - tok.get_vocab().keys())
        fail(f"the run's tokenizer cannot represent {strange} in the prompt ({error})")


def prompt_ids(model, tok, text):
    """-> the ids of a prompt, as many as the model can go on from"""
    ids = to_ids(tok, text)
    if not 1 <= len(ids) <= model.context:
        fail(f"the prompt has {len(ids)} tokens: it must have at least 1 and at most {model.context}")
    return ids


def speak(model, tok, how):
    """Print the prompt and each continuation of it."""
    ids = prompt_ids(model, tok, read_prompt())
    say(f"{out_dir} on {device_of(model)}, seed {seed}, temperature {temperature}")
    for i in range(num_samples or 1):
        sys.stdout.write(tok.decode(ids, skip_special_tokens=True))
        print_text(continuation(model, tok, ids, seed + i, **how))


def read_lines():
    """The lines of stdin; a terminal is asked for each."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def conversation_ids(model, tok, messages):
    """-> the ids of a conversation up to the next answer; `messages` loses a beginning that does not fit."""
    while True:
        try:
            text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise what it likes
            fail(f"the chat template of {out_dir} refuses this: {reason(error)}")
        ids = to_ids(tok, text, add_special_tokens=False)
        if len(ids) < model.context or len(messages) == 1:
            return ids
        del messages[:2]
        say("(the beginning of the conversation no longer fits, and is forgotten)")


def converse(model, tok, how):
    """Answer line after line; all that was said before, as far as it fits, is the prompt of an answer."""
    messages = []
    for line in itertools.chain([read_prompt()] if prompt.strip() else [], read_lines()):
        messages.append({"role": "user", "content": line})
        ids = conversation_ids(model, tok, messages)
        if len(ids) >= model.context:
            say(f"(these are {len(ids)} tokens; the model takes fewer than {model.context})")
            messages.pop()
            continue
        answer = print_text(continuation(model, tok, ids, seed + len(messages), **how))
        messages.append({"role": "assistant", "content": answer.strip()})


def merge_adapter(model, tok):
    """Write a model with its LoRA adapter merged into its weights: a plain model of transformers."""
    model = getattr(model, "lm", model)
    if not hasattr(model, "merge_and_unload") or model.active_peft_config.is_prompt_learning:
        fail(f"{out_dir} has no LoRA adapter that could be merged")
    if Path(merge).exists():
        fail(f"{merge=} exists already: name a new folder")
    base = model.float().get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    table, head = (getattr(module, "base_layer", module) for module in ends)
    if table.weight is head.weight and ends != (table, head):  # what is added to one is not for the other
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    try:
        model.merge_and_unload().save_pretrained(merge)
        tok.save_pretrained(merge)
    except OSError as error:
        fail(f"cannot write to {merge=}: {error.strerror or error}")
    say(f"merged: {merge}")


def find_class(label, classes):
    """The number of the class that a label names, or tells by number."""
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and len(label) < 10 and int(label) < len(classes):
        return int(label)
    if not classes:
        fail(f"class_label={label!r}: this model was trained without classes")
    near = nearest(label, classes)
    fail(
        f"class_label={label!r} is no class of this run: try {near}, or a number from 0 to {len(classes) - 1}"
    )


def draw(run, trainer, model, prompts, negative_prompt, class_label, num_samples, seed, at_most=2**31, **how):
    """
    Yield pictures (B, C, H, W) in [-1, 1], as many at once as the memory allows and at_most says: num_samples
    of each prompt, of a class, or of all classes in turn. how: steps, guidance, sampler
    """
    classes, process, trained = run["classes"], trainer.Process(**run["process"]), run["settings"]
    prompts, device = prompts or run.get("prompts", []), device_of(model)
    if prompts and "prompts" not in run or negative_prompt and not prompts:
        fail(f"{out_dir} draws without prompts: leave out prompt and negative_prompt")
    kinds = 1 if class_label else len(classes or prompts)
    n = num_samples * max(1, len(prompts)) or kinds or 16
    first = find_class(class_label, classes) if class_label else 0 if kinds else -1
    y = [first + i % max(1, kinds) for i in range(n)]
    scale = how["guidance"] = how["guidance"] or (trained["guidance"] if classes or prompts else 1.0)
    if scale != 1 and not prompts and not (classes and trained["label_dropout"]):
        lacks = "label_dropout=0, so it does not know pictures without a class" if classes else "no classes"
        fail(f"guidance={scale} cannot be had: this model was trained with {lacks}; use guidance=1")
    if negative_prompt and scale == 1:
        fail(f"{negative_prompt=} needs a guidance above 1, which leads away from it")
    how["sampler"] = how["sampler"] or trained["sampler"] or process.samplers[0]
    if how["sampler"] not in process.samplers:
        fits = " or ".join(process.samplers)
        fail(f"sampler={how['sampler']!r} does not fit this model ({process.objective}): use {fits}")
    how["steps"] = how["steps"] or trained["sample_steps"]
    say(f"{out_dir} on {device}, seed {seed}, {how}")
    decoder, y = trainer.load_autoencoder(trained["vae"]) if trained["vae"] else None, torch.tensor(y)
    if hasattr(model, "pipe"):
        y, decoder = trainer.whole_pictures(y, trained["image_size"]), getattr(model.pipe, "vae", None)
    if prompts:
        model.captions = trainer.encode_captions(model.pipe, prompts, device, negative_prompt or None)
    size = (model.shape.channels, model.shape.size, model.shape.size)
    if decoder is not None:
        decoder.to(device)
    at_once = trainer.pictures_at_once(trained["image_size"]) if hasattr(model, "pipe") else 64
    at_once = min(at_once, at_most)
    answer = torch.autocast(device, torch.bfloat16, enabled=computes_in_bf16(run, device))(model.forward)
    for i in range(0, n, at_once):
        some, seeds = y[i : i + at_once].to(device), range(seed + i, seed + min(n, i + at_once))
        yield trainer.draw_pictures(answer, process, size, some, seeds, decoder, at_once, **how)


def draw_grid(run, trainer, model, how):
    """Write a grid of pictures to `output`."""
    prompts = []
    if prompt.strip():
        lines = read_prompt().splitlines() if prompt.startswith("FILE:") else [prompt]
        prompts = [line.strip() for line in lines if line.strip()] or fail(f"{prompt[5:]} holds no prompt")
    if not output.endswith(".png") or not Path(output).parent.is_dir():  # before the work, not after it
        fail(f"{output=} must be a .png in a folder that exists")
    pictures = torch.cat([*draw(run, trainer, model, prompts, class_label=class_label, **how)])
    try:
        trainer.make_grid(pictures).save(output)
    except OSError as error:
        fail(f"cannot write the grid to {output=}: {error}")
    say(f"{len(pictures)} pictures: {output}")


# -----------------------------------------------------------------------------
# Demo in a browser
# -----------------------------------------------------------------------------


LIMITS = {  # least and most that a visitor may ask for, and the step of the slider
    "max_new_tokens": (1, 2000, 1),
    "temperature": (0, 3, 0.05),
    "top_k": (0, 1000, 1),
    "top_p": (0, 1, 0.01),
    "num_samples": (1, 64, 1),
    "steps": (1, 250, 1),
    "guidance": (1, 20, 0.1),
    "seed": (0, 2**32, 1),
}
LETTERS = 20_000  # of a prompt, at most
WAITING = 32  # visitors in the queue, at most
BUSY = threading.Lock()  # the model answers one after the other


def legal(name, value):
    """What a visitor sent, by a browser or a script, as a value of the setting `name`; fails if it is none."""
    default = globals()[name]
    if type(value) is float and type(default) is int and value.is_integer():
        value = int(value)
    value = float(value) if type(default) is float and type(value) is int and abs(value) < 2**63 else value
    if type(value) is not type(default) or (type(value) is float and not math.isfinite(value)):
        fail(f"{name} must be of type {type(default).__name__}, not {str(value)[:100]!r}")
    if name in LIMITS:
        check_legal(name, value, "({}..{})".format(*LIMITS[name]))
    elif len(value) > (most := LETTERS if name.endswith("prompt") else 200):
        fail(f"{name} has {len(value):,} characters: at most {most:,}")
    return value


@contextlib.contextmanager
def toasts():
    """Within, what would end the program is shown in the visitor's browser, and the server goes on."""
    import gradio as gr

    try:
        yield
    except SystemExit as end:
        # escaped: it quotes what was sent, and is shown as HTML
        message = html.escape(str(end.__cause__)[:300], quote=False)
        raise gr.Error(message, print_exception=False) from None


def control(name, value=None, **options):
    """The slider or box for a setting: its value, and what its comment at the top says of it."""
    import gradio as gr

    value = legal(name, globals()[name] if value is None else value)
    # neither the range, which the slider shows, nor what a 0 means, which it has not
    info = re.sub(r"(; 0: as the run has it)?( \(\S*\.\.\S*\))?$", "", comments()[name])
    options = {"label": name, "info": info, "min_width": 280} | options
    if name == "seed":
        return gr.Number(value, precision=0, **options)
    if name not in LIMITS:
        return gr.Textbox(value, **options)
    least, most, step = LIMITS[name]
    return gr.Slider(least, most, value, step=step, **options)


def grow(pieces, text=""):
    """Yield the text so far, some twenty times a second, and when it is whole."""
    shown = time.monotonic()
    for piece in pieces:
        text += piece
        if time.monotonic() - shown > 0.05:
            yield text
            shown = time.monotonic()
    yield text


def until_pressed(items, pressed):
    """Go through items until `pressed` holds something; one visitor at a time, also where another was cancelled."""
    with BUSY, contextlib.closing(items):
        for item in items:
            if pressed:
                break
            yield item
    pressed.clear()


def connect(box, start, stop, fn, inputs, outputs):
    """Let a button and Enter call fn, the endpoint of the page; its last argument is a list that Stop fills."""
    import gradio as gr

    pressed = gr.State([])  # of each visitor; Gradio's own way to stop, cancels=, shows an error now and then
    at_once = {"queue": False, "api_visibility": "private"}
    stop.click(lambda pressed: pressed.append(True), pressed, None, **at_once)
    started = gr.on([start.click, box.submit], lambda pressed: pressed.clear(), pressed, None, **at_once)
    # without preprocessing: legal() sees what came, whatever it is
    how = {"preprocess": False, "api_name": "generate", "concurrency_id": "model"}
    started.then(fn, [*inputs, pressed], outputs, **how)


def text_page(model, tok):
    """A prompt and its continuation, or with --chat=True a conversation."""
    import gradio as gr

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")

    def write(prompt, max_new_tokens, temperature, top_k, top_p, seed, messages, pressed):
        with toasts():
            values = (max_new_tokens, temperature, top_k, top_p, seed)
            how = {name: legal(name, value) for name, value in zip(names, values, strict=True)}
            text = legal("prompt", prompt)
            if not chat:
                text = text or "\n"
                ids = prompt_ids(model, tok, text)
                yield from grow(until_pressed(continuation(model, tok, ids, **how), pressed), text)
                return
            messages = [*messages, {"role": "user", "content": text.strip() or fail("say something first")}]
            ids = conversation_ids(model, tok, messages)
            if len(ids) >= model.context:
                fail(f"these are {len(ids)} tokens; the model takes fewer than {model.context}")
            how["seed"] += len(messages)
            for text in grow(until_pressed(continuation(model, tok, ids, **how), pressed)):
                so_far = [*messages, {"role": "assistant", "content": text.strip()}]
                # a plain string would lose its indentation
                shown = [m | {"content": {"type": "text", "text": m["content"]}} for m in so_far]
                yield shown, so_far, ""

    text, messages = "" if prompt == "\n" else read_prompt(), gr.State([])
    if chat:
        shown = gr.Chatbot(show_label=False, height=480, render_markdown=False, buttons=["copy", "copy_all"])
        box = gr.Textbox(text, show_label=False, placeholder="Say something", lines=1, max_lines=8)
    else:
        box = gr.Textbox(text, label="prompt", placeholder="The text to go on from", lines=3, max_lines=12)
        shown = gr.Textbox(label="text", lines=14, max_lines=24, buttons=["copy"])
    with gr.Row():
        start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
        again = gr.Button("New conversation", visible=chat)  # as the bin of the Chatbot
    with gr.Row():
        controls = [control(name) for name in names]
    outputs = [shown, messages, box] if chat else [shown]
    how = {"api_visibility": "private", "concurrency_id": "model"}  # after the answer that is being given
    forget = [again.click, shown.clear] if chat else [again.click]
    gr.on(forget, lambda: ([], []), None, [shown, messages], **how)
    connect(box, start, stop, write, [box, *controls, messages], outputs)


def picture_page(run, trainer, model):
    """Pictures of a class, by a prompt, or as they come."""
    import gradio as gr

    names = ("prompt", "negative_prompt", "class_label", "num_samples")
    names += ("steps", "sampler", "guidance", "seed")
    trained, classes, captioned = run["settings"], run["classes"], "prompts" in run
    samplers = list(trainer.Process(**run["process"]).samplers)
    guided = captioned or (classes and trained["label_dropout"])
    trainer.load_autoencoder = functools.cache(trainer.load_autoencoder)  # once, not for each visitor

    def paint(prompt, negative_prompt, class_label, num_samples, steps, sampler, guidance, seed, pressed):
        with toasts():
            values = (prompt, negative_prompt, class_label, num_samples, steps, sampler, guidance, seed)
            how = {name: legal(name, value) for name, value in zip(names, values, strict=True)}
            text = how.pop("prompt").strip() or (run["prompts"][0] if captioned else "")
            how["prompts"], drawn = [text] if text else [], []
            for pictures in until_pressed(draw(run, trainer, model, at_most=8, **how), pressed):
                drawn += [trainer.make_grid(picture[None]) for picture in pictures]
                yield drawn

    gallery = gr.Gallery(show_label=False, columns=6, height=480, object_fit="contain", format="png")
    with gr.Row():
        start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
    text = read_prompt() if prompt.strip() else run["prompts"][0] if captioned else ""
    box = control("prompt", text, visible=captioned, info="what to draw")
    negative = control("negative_prompt", visible=captioned)
    with gr.Row():
        value, info = class_label and classes[find_class(class_label, classes)], "what to draw"
        choices, how = [("of each", ""), *classes], {"visible": bool(classes), "min_width": 280}
        label = gr.Dropdown(choices, value=value, label="class_label", info=info, **how)
        count = control("num_samples", num_samples or 8, info="pictures, of the classes in turn if of each")
        # what the run has may be more than a visitor may ask for
        fine = control("steps", steps or min(trained["sample_steps"], LIMITS["steps"][1]))
        value, info = sampler or trained["sampler"] or samplers[0], "the way from noise to picture"
        by = gr.Dropdown(samplers, value=value, label="sampler", info=info, min_width=280)
        least, most, _ = LIMITS["guidance"]
        value = guidance or (min(max(trained["guidance"], least), most) if guided else 1.0)
        how_much, number = control("guidance", value, visible=bool(guided)), control("seed")
    inputs = [box, negative, label, count, fine, by, how_much, number]
    connect(box, start, stop, paint, inputs, gallery)


@functools.lru_cache(1)
def loss_curve(path, size):
    """-> train and validation loss by step, from a metrics.jsonl of that size: of each at most some 500 points"""
    import pandas as pd

    curves = {"train/loss": [], "val/loss": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the last line while it is written
            row = json.loads(line)
            for name, points in curves.items():
                if math.isfinite(row.get(name, math.nan)):
                    points.append((row["step"], row[name], name))
    thin = [points[i] for points in curves.values() for i in range(0, len(points), len(points) // 500 + 1)]
    return pd.DataFrame(thin, columns=["step", "loss", "curve"])


def open_demo(run_dir, build, *parts):
    """Serve a page until Ctrl-C: what `build` puts there, and beside it the run's loss and settings."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which would report itself
    direct = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    os.environ["no_proxy"] = f"{direct},127.0.0.1"  # Gradio looks at its own page first
    import gradio as gr

    about = [run_dir / name for name in ("run.json", "config.json", "adapter_config.json")]
    about = json.loads(next(path for path in about if path.exists()).read_text(encoding="utf-8"))
    metrics = run_dir / "metrics.jsonl"

    def curve():
        return loss_curve(metrics, metrics.stat().st_size)

    size = f", {about['parameters']:,} parameters" if "parameters" in about else ""
    with gr.Blocks(title=out_dir, delete_cache=(3600, 3600)) as page, gr.Row():
        with gr.Column(scale=3):
            gr.Markdown(f"### {out_dir}{size}")
            build(*parts)
        with gr.Column(scale=2):
            if metrics.exists():
                plot = gr.LinePlot(curve(), "step", "loss", color="curve", height=300)
                quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
                gr.Timer(5).tick(curve, None, plot, **quiet)
            with gr.Accordion("settings", open=False):
                gr.JSON(about.get("settings", about), show_label=False)
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # not from Google
    where = {"server_name": "127.0.0.1", "server_port": port, "share": share, "prevent_thread_lock": True}
    look = {"theme": plain, "footer_links": ["api"], "run_history": False, "ssr_mode": False}
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    try:
        _, local, public = page.launch(**where, **look, quiet=True, show_error=True, max_file_size=1)
    except OSError:
        fail(f"{port=} is taken: name another one")
    except Exception as error:  # of many kinds
        fail(f"the page cannot be served: {reason(error)}")
    say(f"demo: {public or local} (Ctrl-C ends it)")
    try:
        while True:
            time.sleep(1)
    finally:
        page.close(verbose=False)


def main():
    folder = Path(out_dir)
    if not folder.is_dir():
        fail(f"there is no run {out_dir!r}: train one, or name another --out_dir")
    run_dir = folder.parent.parent if (folder / "state.pt").exists() else folder
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    run = None
    if (run_dir / "run.json").exists():
        run, trainer, model, tok = load_run(folder, run_dir, device)
    elif (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        model, tok = load_plain(folder, device)
    else:
        fail(f"{out_dir} holds neither a run (run.json) nor a model of transformers (config.json)")
    if run and run["kind"] == "diffusion":
        if merge or chat:
            fail(f"{out_dir} holds a diffusion model: it draws, without --chat and --merge")
        if lora_scale != 1 and not run["settings"].get("adapter"):
            fail(f"{lora_scale=}: {out_dir} has no LoRA adapter, the whole model was trained")
        how = {"negative_prompt": negative_prompt, "num_samples": num_samples, "seed": seed}
        how |= {"steps": steps, "guidance": guidance, "sampler": sampler}
        parts = run, trainer, model
        return open_demo(run_dir, picture_page, *parts) if demo else draw_grid(*parts, how)
    if merge:
        return merge_adapter(model, tok)
    if chat and not tok.chat_template:
        fail(f"{out_dir} has no chat template: without --chat=True, it goes on from a --prompt")
    parts = model, tok
    if demo:
        return open_demo(run_dir, text_page, *parts)
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    (converse if chat else speak)(*parts, how)


if __name__ == "__main__":
    configure(globals())
    for setting, value in settings(globals()).items():
        check_legal(setting, value, comments().get(setting, ""))
    try:
        main()
    except KeyboardInterrupt:  # the way to leave a chat
        raise SystemExit(130) from None
