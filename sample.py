"""
Sample from a trained model: text, a chat or images, in the terminal or in a browser.

    python sample.py --prompt="def " --num_samples=3 --temperature=0.5           # the model in out/lm
    python sample.py --out_dir=out/lora-chat --chat=True
    python sample.py --out_dir=out/sd15-lora --prompt="a sks dog in the snow" --guidance=7
    python sample.py --demo=True --compare='out/*'              # a web page, with the losses of all runs

The model can be a run of train_lm.py or train_diffusion.py, any causal language model of transformers, or any
adapter of peft. Generated text goes to stdout, everything else to stderr.
"""

import contextlib
import glob
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path

import torch

from configurator import UserError, comments, configure, fail, named, sections, settings

# ---- Settings ----

out_dir = "out/lm"  # folder of a trained model, or the name of a language model on the Hugging Face Hub
base = ""  # base model of an adapter, if it is not where it was during training
num_samples = 0  # samples per prompt, or in all without prompts; 0: one per prompt or class, 16 without both
seed = 1337  # the same seed gives the same text or images
trust_run_code = False  # execute the copy of the training script in out_dir (only if you trust its author)
# text
prompt = "\n"  # prompt, or FILE:path to read it from a file (images: one prompt per line)
max_new_tokens = 300  # largest number of tokens to generate
temperature = 0.8  # 0: always the most likely token; 1: the model's own distribution; higher: more random
top_k = 0  # keep only the k most likely tokens (0: all)
top_p = 1.0  # nucleus sampling: keep the most likely tokens up to this total probability
chat = False  # chat, using the model's chat template, in the terminal (with --demo=True in the browser)
merge = ""  # merge the LoRA adapter into the model and save it to this new folder
# images
class_label = ""  # name of a class (default: all classes in turn)
negative_prompt = ""  # what the images should not show
lora_scale = 1.0  # strength of the LoRA adapter (0: the base model alone)
steps = 0  # steps from noise to image (0: sample_steps of the run)
guidance = -1.0  # strength of guidance (1: none; for Z-Image, 0: none; -1: the guidance of the run)
output = "sample.png"  # file for a grid of all images
# demo
demo = False  # open a web demo on http://127.0.0.1:<port>
compare = ""  # runs to plot in the demo, such as 'out/*' (default: this one)
port = 7860  # port of the web demo
share = False  # also give the demo a public address, through Gradio's servers

# In these settings, configure() replaces a ~ at the beginning by the home folder.
PATHS = ("out_dir", "base", "merge", "output", "compare")
# Smallest value, largest value and step of the demo's controls. The command line allows larger values.
RANGES = {
    "num_samples": (0, 64, 1),
    "seed": (0, 2**32, 1),
    "max_new_tokens": (1, 2000, 1),
    "temperature": (0, 3, 0.05),
    "top_k": (0, 1000, 1),
    "top_p": (0, 1, 0.01),
    "steps": (0, 250, 1),
    "guidance": (-1, 20, 0.1),
    "lora_scale": (-2, 2, 0.05),
}

# ---- Load a model ----

# load_run() sets these three, and all functions below use them.
trainer = None  # the training script of the model, imported as a module
model = None
tok = None  # the tokenizer; image models have none


def choose_script(run):
    """Return the path of the training script to load a run with; run is the content of its run.json.

    A run keeps a copy of its script. If the script beside this file has the same model, it is used instead,
    unless trust_run_code is set.
    """
    if run.get("kind") not in ("lm", "diffusion"):
        fail(f"{out_dir} was not made by train_lm.py or train_diffusion.py, but by {run.get('kind')!r}")
    script = Path(__file__).with_name(f"train_{run['kind']}.py")
    copy = Path(out_dir, script.name)
    is_pretrained = run["model"] in ("Pretrained", "Pipeline")  # a library defines the model, not the script
    if is_pretrained or not copy.exists():
        return script
    if trust_run_code:
        return copy
    titles = ("Model", "The mathematics")
    if sections(copy, *titles) != sections(script, *titles):
        fail(
            f"the model in {copy} differs from that in {script}: to execute {copy},"
            " add --trust_run_code=True, but only if you trust who wrote it"
        )
    return script


def import_script(path):
    """Import a training script from wherever it is, and return it as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # as the import statement does
    spec.loader.exec_module(module)
    return module


def load_run():
    """Load the model in out_dir, its tokenizer and its training script."""
    global trainer, model, tok
    run = {"kind": "lm", "model": "Pretrained", "settings": {}}  # if there is no run.json
    run_file = Path(out_dir, "run.json")
    if run_file.exists():
        with named("out_dir", out_dir):
            run = json.loads(run_file.read_text(encoding="utf-8"))
    has_weights = any(Path(out_dir).rglob("*.safetensors")) or any(Path(out_dir).glob("*.bin"))
    if Path(out_dir).is_dir() and not has_weights:
        fail(f"{out_dir} holds no weights: a run saves them at its first evaluation after step 0")

    trainer = import_script(choose_script(run))
    if run["kind"] == "diffusion":
        model = trainer.load(out_dir, run, base)
        return

    model, tok = trainer.load(out_dir, run, base)
    ends = trainer.end_tokens(model)
    eos = tok.eos_token_id
    if eos is not None and eos not in ends:  # not all models know the end token of their tokenizer
        model.generation_config.eos_token_id = [*ends, eos]
    if merge:  # stay on the CPU, which has the most memory, and in fp32, which rounds least
        return
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    trainer.mixed_precision = "auto"  # whatever the run was trained in, the hardware here decides
    is_large = sum(p.numel() for p in model.parameters()) > 10_000_000
    if is_large and trainer.choose_precision() == "bf16":
        # A large model spends most of its time reading its weights: halve them. Buffers, such as rotary
        # frequencies, stay in fp32.
        for p in model.parameters():
            if p.dtype == torch.float32:  # leaves quantized weights alone
                p.data = p.data.bfloat16()
    model.to(device)


# ---- Text ----
# These functions take parameters instead of reading the settings: each visitor of the demo chooses their own.


@torch.inference_mode()  # some 15 % faster than the no_grad of trainer.generate()
def generate_tokens(ids, n, **sampling):
    """Continue a prompt n times in parallel. After each token, yield the n continuations so far.

    ids and each continuation are lists of token ids.
    sampling: max_new_tokens, temperature, top_k, top_p and seed, as the settings have them.
    """
    continuations = [[] for _ in range(n)]
    has_ended = [False] * n
    ends = trainer.end_tokens(model)
    n_ids = trainer.count_ids(tok)  # the model may have more, as padding, which must not be sampled
    for tokens in trainer.generate(model, ids, n, vocab_size=n_ids, **sampling):  # tokens: (n,)
        for i, token in enumerate(tokens.tolist()):
            if token in ends:
                has_ended[i] = True
            if not has_ended[i]:
                continuations[i].append(token)
        yield continuations


def decode(ids):
    """Return the text of token ids, without an incomplete character at its end."""
    return tok.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def complete(prompt, num_samples, **sampling):
    """Yield the prompt with its first continuation, as it grows, and at last with all continuations."""
    with named("prompt", prompt[:100]):  # a tokenizer may not know a character
        ids = tok(prompt)["input_ids"]
    # Some tokenizers put an end token behind every text, but this one is to be continued.
    user_wrote_end = tok.eos_token is not None and prompt.endswith(tok.eos_token)
    if ids and ids[-1] == tok.eos_token_id and not user_wrote_end:
        ids.pop()
    if not 1 <= len(ids) <= model.context:
        fail(f"the prompt has {len(ids)} tokens: it must have at least 1 and at most {model.context}")
    for continuations in generate_tokens(ids, num_samples or 1, **sampling):
        yield decode(ids + continuations[0])
    yield "\n".join(decode(ids + continuation) for continuation in continuations)


def encode_chat(messages):
    """Return the token ids of a conversation. One that is too long loses its oldest questions and answers."""
    while messages:
        with named("out_dir", out_dir):  # the model's chat template may refuse the messages
            ids = tok.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        if len(ids) < model.context:  # there is room for at least one token of the answer
            return ids
        messages = messages[2:]
    fail(f"the message is too long: {len(ids)} tokens, but the model takes fewer than {model.context}")


def reply(messages, seed, **sampling):
    """Yield the growing answer to the last message. Each message is {"role": ..., "content": ...}."""
    if not messages[-1]["content"].strip():
        fail("the message is empty")
    ids = encode_chat(messages)
    seed += len(messages)  # a question that is repeated may get another answer
    for continuations in generate_tokens(ids, 1, seed=seed, **sampling):
        yield decode(continuations[0]).strip()


def print_text(texts, file):
    """Print a growing text, of which `texts` yields ever longer versions. Return the whole text."""
    shown = ""
    for text in texts:
        # Print what is new. While a character is incomplete, the text may become shorter for a moment.
        if len(text) > len(shown):
            print(text[len(shown) :], end="", file=file, flush=True)
            shown = text
    print(file=file)
    return shown


def typed_messages(first):
    """Yield the first message, unless it is empty, and then each line that is typed, until Ctrl-D."""
    if first.strip():
        yield first
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def chat_in_terminal(first, sampling, file):
    """Answer the first message, unless it is empty, and then each line that is typed."""
    messages = []
    for message in typed_messages(first):
        question = {"role": "user", "content": message}
        with contextlib.suppress(UserError):  # raised by fail(), which has printed the reason
            answer = print_text(reply([*messages, question], **sampling), file)
            messages += [question, {"role": "assistant", "content": answer}]


def untie_embeddings(lm):
    """Give the two embeddings of a model matrices of their own, if it has one for both and a LoRA on one.

    Otherwise, merging the LoRA would change both.
    """
    embedding = lm.get_input_embeddings()
    head = lm.get_output_embeddings()
    plain_embedding = getattr(embedding, "base_layer", embedding)  # without LoRA
    plain_head = getattr(head, "base_layer", head)
    has_lora = embedding is not plain_embedding or head is not plain_head
    if has_lora and plain_head.weight is plain_embedding.weight:
        plain_head.weight = torch.nn.Parameter(plain_head.weight.detach().clone())
        lm.config.tie_word_embeddings = False


def merge_lora():
    """Merge the LoRA adapter into the model and write it to the folder `merge`."""
    peft_model = getattr(model, "lm", None)  # only a pretrained model has one
    config = getattr(peft_model, "active_peft_config", None)
    if config is None or config.peft_type != "LORA":
        fail(f"{out_dir} is not a language model with a LoRA adapter, so there is nothing to merge")
    untie_embeddings(peft_model.get_base_model())
    with named("merge", merge):
        Path(merge).mkdir(parents=True)
        peft_model.merge_and_unload().save_pretrained(merge)
        tok.save_pretrained(merge)
    print(f"wrote {merge}")


# ---- Images ----

# In the demo, a request that was stopped still draws its batch to the end. The next one waits for that.
DRAWING = threading.Lock()
IMAGES_AT_ONCE = 16  # limits the memory


def draw(prompt, class_label, num_samples, seed, guidance, **sampling):
    """Draw images in batches. After each batch, yield all images so far.

    num_samples counts the images per prompt or, for a model of classes, in all.
    """
    conditions = [line for line in prompt.splitlines() if line.strip()]
    if hasattr(model, "class_names"):
        if conditions or sampling["negative_prompt"]:
            fail(f"{out_dir} takes no prompt: choose a class with --class_label")
        if class_label:
            conditions = [class_label]
        else:
            conditions = model.class_names or [""] * 16  # a model without classes draws 16 images
        n = num_samples or len(conditions)
    else:
        if not conditions or class_label:
            fail(f"{out_dir} needs a --prompt, and no --class_label")
        n = (num_samples or 1) * len(conditions)

    conditions = [conditions[i % len(conditions)] for i in range(n)]  # one for each image
    seeds = range(seed, seed + n)  # each image has its own, so that it is the same in any batch
    images = []
    for i in range(0, n, IMAGES_AT_ONCE):
        batch = slice(i, i + IMAGES_AT_ONCE)
        with DRAWING:
            images += trainer.draw(model, conditions[batch], seeds[batch], scale=guidance, **sampling)
        yield images


def save_images(**sampling):
    """Draw, and write a grid of all images to the file `output`."""
    if not output.endswith(".png") or not Path(output).parent.is_dir():
        fail(f"{output=} must be a .png in a folder that exists")
    images = list(draw(**sampling))[-1]  # the last list has all images
    grid = trainer.make_grid(images)
    with named("output", output):
        grid.save(output)
    print(f"wrote {output}")


# ---- Demo ----


def losses():
    """Return a table of the losses by step: of this run, or the validation losses of the runs to compare."""
    import pandas as pd

    names = ["val/loss"] if compare else ["train/loss", "val/loss"]
    pattern = compare or glob.escape(out_dir)  # out_dir is the name of one folder
    rows = []
    for file in sorted(glob.glob(f"{pattern}/metrics.jsonl")):
        lines = Path(file).read_text(encoding="utf-8").split("\n")
        for line in lines[:-1]:  # the last line may be half written
            values = json.loads(line)
            for name in names:
                curve = os.path.dirname(file) if compare else name
                rows.append((values["step"], values.get(name), curve))
    return pd.DataFrame(rows, columns=["step", "loss", "curve"]).dropna()


def reply_in_demo(message, history, **sampling):
    """Yield the answer so far to a message; history: the messages before it, as Gradio keeps them."""
    messages = []
    for turn in [*history, {"role": "user", "content": message}]:
        content = turn["content"]
        if isinstance(content, list):  # a browser sends a list of parts, a program a string
            content = "".join(part.get("text", "") for part in content)
        if messages and messages[-1]["role"] == turn["role"]:
            messages.pop()  # Gradio also keeps questions that were refused, which have no answer
        messages.append({"role": turn["role"], "content": content})
    yield from reply(messages, **sampling)


def make_control(name, value, is_visible):
    """Return a control for a setting of this name and initial value."""
    import gradio as gr

    options = {"label": name, "info": comments(__file__)[name], "value": value, "visible": is_visible}
    if name in RANGES:
        smallest, largest, step = RANGES[name]
        options |= {"minimum": smallest, "maximum": max(largest, value), "step": step}
        options["precision"] = 0 if step == 1 else 2  # decimal places
        if name == "seed":  # has too many values for a slider
            return gr.Number(**options)
        return gr.Slider(**options)
    if name == "class_label":
        # ("all", ""): the label "all" for the value ""
        choices = [("all", ""), *getattr(model, "class_names", [])]
        return gr.Dropdown(choices, **options)
    return gr.Textbox(**options)


def make_form(respond, controls):
    """Lay out the controls, a button that runs respond(), one that stops it, and what respond() yields."""
    import gradio as gr

    with gr.Row():
        with gr.Column():
            for control in controls:
                control.render()  # places it here in the layout
            start = gr.Button("Generate", variant="primary")
            stop = gr.Button("Stop")
        if tok is None:
            shown = gr.Gallery(label="images", format="png")
            progress = "full"
        else:
            shown = gr.Textbox(label="text", lines=20)
            progress = "hidden"  # "full" would still hide the text after Stop
    click = start.click(respond, controls, shown, api_name="generate", show_progress=progress)
    stop.click(None, cancels=click)


def serve(generate, values):
    """Serve a web page until Ctrl-C. generate yields what to show; values: {setting: its initial value}."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # do not report this to the makers of Gradio
    import gradio as gr

    # Hide the controls that mean nothing for this model. generate() still gets their values.
    if hasattr(model, "class_names"):
        unused = ["prompt", "negative_prompt"]
    else:
        unused = ["class_label"]
    if not trainer.adapter:
        unused.append("lora_scale")
    controls = [make_control(name, value, name not in unused) for name, value in values.items()]
    names = [*values]
    if chat:
        names = ["message", "history", *values]  # gr.ChatInterface passes these two first

    def respond(*arguments):
        """Yield what generate() yields for the values of the controls. Show mistakes of users on the page."""
        try:
            values = dict(zip(names, arguments))
            for name, value in values.items():
                if value is None:  # a number field that was cleared
                    fail(f"{name} must have a value")
                # A longer text would keep other visitors waiting.
                if isinstance(value, str) and len(value) > 20_000:
                    fail(f"{name} has {len(value)} characters: at most 20,000 are allowed")
            yield from generate(**values)
        except UserError as error:
            if not chat:
                raise gr.Error(error.message, print_exception=False)
            gr.Warning(error.message)  # an error would lock the text box of a chat

    with gr.Blocks(title=out_dir, delete_cache=(3600, 3600)) as page:  # images are deleted after an hour
        if chat:
            gr.ChatInterface(respond, additional_inputs=controls, api_name="generate")
        else:
            make_form(respond, controls)
        table = losses()
        plot = gr.LinePlot(table, "step", "loss", color="curve", visible=not table.empty)
        # Read the losses again every 10 seconds. With queue=False, this does not wait until samples are done.
        gr.Timer(10).tick(losses, outputs=plot, queue=False, show_progress="hidden", api_visibility="private")
    page.queue(max_size=32, api_open=False)  # programs must wait in the queue, too
    # The default theme would load fonts from Google.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with named("port", port):
        page.launch(server_name="127.0.0.1", server_port=port, share=share, show_error=True, theme=theme)


# ---- Main ----


def check_settings():
    """End the program for numbers that are too small or, in the case of seed, too large."""
    values = settings(globals())
    for name, (smallest, _, _) in RANGES.items():
        if values[name] < smallest:
            fail(f"{name}={values[name]} must be at least {smallest}")
    if -1 < guidance < 0:
        fail(f"{guidance=} must be at least 0, or -1 for the guidance of the run")
    if seed >= 2**63:  # torch.manual_seed() takes no more
        fail(f"{seed=} must be below 2**63")


def main():
    check_settings()
    text = prompt
    if prompt.startswith("FILE:"):
        with named("prompt", prompt):
            text = Path(prompt.removeprefix("FILE:")).expanduser().read_text(encoding="utf-8")
    stdout = sys.stdout
    sys.stdout = sys.stderr  # libraries print notices; with "> file", the file gets only the text
    if hasattr(stdout, "reconfigure"):  # not if a program has replaced it
        stdout.reconfigure(errors="backslashreplace")  # a terminal may not know all characters

    load_run()
    if chat and not getattr(tok, "chat_template", None):
        fail(f"{out_dir} is not a chat model: its tokenizer has no chat template")

    # The settings that the samples depend on. In the demo, each of them has a control.
    if tok is None:
        generate = draw
        names = "prompt negative_prompt class_label num_samples lora_scale steps guidance seed"
    elif chat:
        generate = reply_in_demo
        names = "max_new_tokens temperature top_k top_p seed"
    else:
        generate = complete
        names = "prompt num_samples max_new_tokens temperature top_k top_p seed"
    now = settings(globals()) | {"prompt": text}
    values = {name: now[name] for name in names.split()}

    if merge:
        merge_lora()
    elif demo or compare:
        serve(generate, values)
    elif chat:
        chat_in_terminal(text, values, stdout)
    elif tok is None:
        save_images(**values)
    else:
        print_text(complete(**values), stdout)


if __name__ == "__main__":
    configure(globals())
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # the code of programs that Ctrl-C has ended
    except BrokenPipeError:  # nobody reads stdout any more (| head)
        os._exit(1)  # at once: a usual exit would flush stdout and fail again
