"""
Sample from a trained model: text, a chat or pictures, in the terminal or in a browser.

    python sample.py --out_dir=out/lm --prompt="def " --num_samples=3 --temperature=0.5
    python sample.py --out_dir=out/lora-chat --chat=True               # a conversation, line by line
    python sample.py --out_dir=out/sd15-lora --prompt="a sks dog in the snow" --guidance=7
    python sample.py --demo=True --compare='out/*'                     # a page, with the losses of all runs

Text goes to stdout, all else to stderr. Any causal language model of transformers, or adapter of peft, will do.
"""

import ast
import contextlib
import glob
import importlib.util
import json
import os
import re
import sys
import threading
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream

from configurator import configure, fail, named

# ---- Settings ----
out_dir = "out/lm"  # the run
base = ""  # where the model under an adapter is now, if it has moved
num_samples = 0  # texts or pictures of each prompt; 0: one, or a picture of each class
seed = 1337  # the same seed, the same text or picture
trust_run_code = False  # run the training script in out_dir, if its model is not the one here
prompt = "\n"  # to be continued, or drawn; FILE:x.txt: from a file, pictures line by line
max_new_tokens = 300  # length of the continuation
temperature = 0.8  # 0: always the likeliest token; 1: as the model says; above: more random
top_k = 0  # sample from so many of the likeliest tokens; 0: from all
top_p = 1.0  # sample from the likeliest tokens with this share of the probability
chat = False  # answer line after line by the chat template
merge = ""  # a new folder: write the model there with its LoRA merged, instead of sampling
class_label = ""  # name or number of a class; "": all in turn
negative_prompt = ""  # what the pictures should not look like
lora_scale = 1.0  # strength of the LoRA; 0: the base alone
steps = 0  # from noise to picture; 0: as the run has it
guidance = -1.0  # towards the class or prompt; below 0: as the run has it
output = "sample.png"  # a grid of all pictures
demo = False  # serve a page on this machine instead
compare = ""  # runs whose losses the page shows, as 'out/*'; "": those of this one
port = 7860  # of the page
share = False  # give the page a public address too, through Gradio's servers

LIMITS = {"num_samples": (0, 64, 1), "max_new_tokens": (1, 2000, 1), "temperature": (0, 3, 0.05)}
LIMITS |= {"top_k": (0, 1000, 1), "top_p": (0, 1, 0.01), "seed": (0, 2**32, 1)}
LIMITS |= {"steps": (0, 250, 1), "guidance": (-1, 20, 0.1), "lora_scale": (-2, 2, 0.05)}


def model_code(path, run):
    """-> the code in a training script that the model of a run uses, without comments and docstrings"""
    statements = []  # (names that it defines or changes, names in it, code)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        parts = list(ast.walk(node))
        for part in parts:
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part):
                del part.body[0]
            if isinstance(part, ast.alias):  # one of the names in an import
                code = ast.dump(part) + getattr(node, "module", "")
                statements.append(({part.asname or part.name}, set(), code))
        used = {part.id for part in parts if isinstance(part, ast.Name)} - {"fail", "log", *run["settings"]}
        statements.append(({node.name} if hasattr(node, "name") else used, used, ast.dump(node)))
    reached = {run["model"]}
    for _ in statements:  # as often as one may lead to another
        found = [statement for statement in statements if statement[0] & reached]
        reached = reached.union(*(used for _, used, _ in found))
    return [code for _, _, code in found]


def load_run(folder):
    """-> (the training script as a module, the model, its tokenizer or None)"""
    run = {"kind": "lm", "model": "Pretrained", "settings": {}}  # where there is no run.json
    with named("out_dir", out_dir):
        if not any(folder.rglob("*.safetensors")):
            raise ValueError("there are no weights; a run saves them at its first evaluation after step 0")
        if (folder / "run.json").exists():
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        path = Path(__file__).with_name(f"train_{run['kind']}.py")
        copy = folder / path.name
        if copy.exists() and model_code(copy, run) != model_code(path, run):
            path = copy
            if not trust_run_code:
                fail(f"{copy} has another model: --trust_run_code=True runs it, if you trust its author")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        trainer = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(trainer)
        if run["kind"] == "diffusion":
            return trainer, trainer.load(folder, run, base), None
        model, tok = trainer.load(folder, run, base)
    gpu, cpu = torch.accelerator.is_available() and not merge, torch.cpu.get_capabilities()
    bf16 = torch.cuda.is_bf16_supported(False) if gpu else cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if bf16 and not merge and sum(p.numel() for p in model.parameters()) > 1e7:
        for p in model.parameters():  # reading them takes most of the time; positions stay in fp32
            p.data = p.data.bfloat16()
    return trainer, model.to(torch.accelerator.current_accelerator() if gpu else "cpu"), tok


# ---- Text ----
@torch.inference_mode()  # faster than no_grad, which generate() has for FSDP2
def continuations(ids, n, **sampling):
    """Yield n continuations of the tokens `ids` so far, after each new token."""
    eos = (model.lm.generation_config if hasattr(model, "lm") else model.config).eos_token_id
    eos = {tok.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    texts, ended, streams = [""] * n, [False] * n, [DecodeStream(ids, True) for _ in range(n)]
    for tokens in trainer.generate(model, ids, n, eos=sorted(eos), **sampling):
        for i, token in enumerate(tokens.tolist()):
            ended[i] |= token in eos
            if not ended[i]:  # a character of several tokens comes with its last
                try:
                    texts[i] += streams[i].step(tok.backend_tokenizer, token) or ""
                except Exception:  # the bytes so far are no character
                    streams[i] = DecodeStream([token], True)
        yield texts


def speak(prompt, num_samples, **sampling):
    """Yield the prompt with its continuation so far, in the end with all num_samples of them."""
    with named("prompt", prompt[:100]):  # a tokenizer may not know its letters
        ids = tok(prompt)["input_ids"]
    if not 1 <= len(ids) <= model.context:
        fail(f"the prompt has {len(ids)} tokens: it must have at least 1 and at most {model.context}")
    start = tok.decode(ids, skip_special_tokens=True)
    for texts in continuations(ids, num_samples or 1, **sampling):
        yield start + texts[0]
    yield "\n".join(start + text for text in texts)


def reply(message, history, seed, **sampling):
    """Yield the answer to a message so far; history: the messages before it, as Gradio has them."""
    limit, messages = model.context, [{"role": "user", "content": message.strip() or fail("no message")}]
    for m in reversed(history):  # without questions that had no answer
        if m["role"] != messages[0]["role"]:
            text = m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]
            messages.insert(0, {"role": m["role"], "content": text})
    with named("chat template", out_dir):  # a conversation that is too long loses its beginning
        while len(ids := tok.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]) >= limit:
            messages = messages[2:] or fail(f"{len(ids)} tokens: the model takes fewer than {limit}")
    for texts in continuations(ids, 1, seed=seed + len(history), **sampling):
        yield texts[0].strip()


def print_text(texts, file):
    text = ""  # it grows
    for longer in texts:
        print(longer[len(text) :], end="", file=file, flush=True)
        text = longer
    print(file=file)
    return text


def merge_lora():
    lm = getattr(model, "lm", None)
    if not hasattr(lm, "merge_and_unload") or lm.active_peft_config.is_prompt_learning:
        fail(f"{out_dir} has no LoRA adapter that could be merged")
    whole = lm.float().get_base_model()
    ends = whole.get_input_embeddings(), whole.get_output_embeddings()
    embedding, head = (getattr(module, "base_layer", module) for module in ends)
    if embedding.weight is head.weight and ends != (embedding, head):  # what is added to one is not for both
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        whole.config.tie_word_embeddings = False
    with named("merge", merge):
        Path(merge).mkdir(parents=True)  # a new one
        lm.merge_and_unload().save_pretrained(merge)
        tok.save_pretrained(merge)


# ---- Pictures ----
LOCK = threading.Lock()  # Stop lets a call of draw() end by itself: the next one waits


def draw(prompt, class_label, num_samples, seed, **kwargs):
    """Yield the pictures so far: num_samples of each line of the prompt, or of the classes in turn."""
    prompts, classes = [*filter(str.strip, prompt.splitlines())], getattr(model, "class_names", [])
    if bool(prompts) == hasattr(model, "class_names"):
        fail(f"{out_dir} draws without a prompt" if prompts else f"{out_dir} needs a prompt")
    if class_label not in classes and class_label in map(str, range(len(classes))):
        class_label = classes[int(class_label)]
    conditions = prompts or [class_label] * bool(class_label) or classes or [""] * 16
    n, pictures = num_samples * max(1, len(prompts)) or len(conditions), []
    chosen, seeds = [conditions[i % len(conditions)] for i in range(n)], range(seed, seed + n)
    for i in range(0, n, 16):
        with LOCK:
            pictures += trainer.draw(model, chosen[i : i + 16], seeds[i : i + 16], **kwargs)
        yield pictures


# ---- Page ----
def losses():
    """-> the losses of the run by step; of runs to compare, their validation losses"""
    import pandas as pd

    points, files = [], sorted(glob.glob(f"{compare or out_dir}/metrics.jsonl"))
    for file in map(Path, files):
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be half written
        for name in ["val/loss"] if compare else ["train/loss", "val/loss"]:
            label = str(file.parent) if compare else name
            points += [(row["step"], row[name], label) for row in map(json.loads, lines) if name in row]
    return pd.DataFrame(points, columns=["step", "loss", "run"]).dropna()


def serve(fn, values):
    """Serve a page for fn until Ctrl-C; values: {its arguments: where their controls start}"""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which would report itself
    import gradio as gr

    def generate(*arguments):
        try:
            for name, value in zip(values, arguments):
                if repr(value) in ("None", "nan") or isinstance(value, str) and len(value) > 20_000:
                    fail(f"{name} must have a value, of at most 20,000 letters")
            yield from fn(**dict(zip(values, arguments)))
        except SystemExit as end:  # fail() ends a command, but not the server
            if chat:  # whose box an error would lock
                return gr.Warning(str(end.__cause__))
            raise gr.Error(str(end.__cause__), print_exception=False) from None

    comments = dict(re.findall(r"^(\w+) = .*?  # (.*)$", Path(__file__).read_text("utf-8"), re.MULTILINE))
    controls, classes = [], getattr(model, "class_names", None)
    hidden = ["class_label"] if classes is None else ["prompt", "negative_prompt", "lora_scale"]
    for name, value in values.items():
        look = {"label": name, "info": comments.get(name), "value": value, "visible": name not in hidden}
        if name in LIMITS:
            least, most, step = LIMITS[name]
            look |= {"minimum": least, "maximum": max(most, value), "step": step}
            controls.append((gr.Number if name == "seed" else gr.Slider)(precision=2 * (step < 1), **look))
        elif name == "class_label":
            controls.append(gr.Dropdown([("all", ""), *(classes or [])], **look))
        else:
            controls.append(gr.Textbox(**look))
    with gr.Blocks(title=out_dir, delete_cache=(3600, 3600)) as page:
        if chat:
            gr.ChatInterface(generate, additional_inputs=controls[2:], api_name="generate")
        else:
            with gr.Row():
                with gr.Column():
                    for control in controls:
                        control.render()
                    start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
                out = gr.Textbox(label="text", lines=20) if tok else gr.Gallery(label="samples", format="png")
            progress = "hidden" if tok else "full"  # else text that was stopped may be covered by "Error"
            click = start.click(generate, controls, out, api_name="generate", show_progress=progress)
            stop.click(None, cancels=click)
        plot = gr.LinePlot(points := losses(), "step", "loss", color="run", visible=not points.empty)
        gr.Timer(10).tick(losses, None, plot, queue=False, show_progress="hidden", api_visibility="private")
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from Google
    where = {"server_name": "127.0.0.1", "server_port": port, "share": share, "show_error": True}
    with named("port", port):
        page.queue(max_size=32, api_open=False).launch(theme=theme, **where)


def main():
    global prompt, trainer, model, tok
    for name, (least, _, _) in LIMITS.items():
        if globals()[name] < least:
            fail(f"{name}={globals()[name]} must be at least {least}")
    if prompt.startswith("FILE:"):
        with named("prompt", prompt):
            prompt = Path(prompt[5:]).expanduser().read_text(encoding="utf-8")
    stdout, sys.stdout = sys.stdout, sys.stderr  # it is for the text alone
    trainer, model, tok = load_run(Path(out_dir))
    if chat and not getattr(tok, "chat_template", None):
        fail(f"{out_dir} has no chat template")
    fn, names = draw, "prompt negative_prompt class_label num_samples lora_scale steps guidance seed"
    if tok:
        fn, names = speak, "prompt num_samples max_new_tokens temperature top_k top_p seed"
    values = {name: globals()[name] for name in names.split()}
    if chat:
        del values["prompt"], values["num_samples"]
        fn, values = reply, {"message": prompt.strip(), "history": [], **values}
    if merge:
        merge_lora()
    elif demo or compare:
        serve(fn, values)
    elif chat:
        while True:
            values["message"] = values["message"] or input("> ")
            with contextlib.suppress(SystemExit):  # fail() has said why; the conversation goes on
                answer = print_text(reply(**values), stdout)
                for role, text in ("user", values["message"]), ("assistant", answer):
                    values["history"].append({"role": role, "content": text})
            values["message"] = ""
    elif tok:
        print_text(speak(**values), stdout)
    elif not output.endswith(".png") or not Path(output).parent.is_dir():  # before the work, not after it
        fail(f"{output=} must be a .png in a folder that exists")
    else:
        trainer.make_grid([*draw(**values)][-1]).save(output)


if __name__ == "__main__":
    configure(globals())
    with contextlib.suppress(KeyboardInterrupt, EOFError):  # the ends of a chat
        main()
