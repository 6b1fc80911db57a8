"""
Let a trained model speak, or draw.

    python sample.py --prompt="def "                                      # the run in out/lm
    python sample.py --out_dir=out/mine --prompt=FILE:start.txt --num_samples=3 --temperature=0.8
    python sample.py --out_dir=out/lm/checkpoints/step_00000400 --prompt="class " --seed=2
    python sample.py --out_dir=out/lora-chat --chat=True                  # a conversation in the terminal
    python sample.py --out_dir=out/lora-chat --merge=merged/              # model and adapter as one model
    python sample.py --out_dir=out/diffusion --class_label=7 --num_samples=16
    python sample.py --out_dir=out/sd15-lora --prompt="a sks dog in the snow" --guidance=7 --steps=25

A language model writes the prompt and its continuation to stdout, nothing else; any folder with a causal
language model of transformers, or an adapter of peft, works as well. A diffusion model writes a PNG: a grid.
"""

import ast
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import torch

from configurator import configure, fail, nearest, reason

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


def say(message):
    print(message, file=sys.stderr, flush=True)


# what makes the weights of a run a model, by the kind of the run
BOTH = {"Shape", "norm", "rotate", "attend", "Attention", "MLP", "Block"}
MODEL_CODE = {"lm": BOTH | {"GPT", "draw"}, "diffusion": BOTH | {"DiT", "Process", "sample", "decode"}}
PRETRAINED_CODE = {"lm": {"add_adapter"}, "diffusion": {"UNet", "Process", "sample", "decode", "add_lora"}}


def model_code(path, names):
    """The model in a training script, without comments and layout: equal code builds equal models."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            del node.body[0]
    return [ast.dump(node) for node in tree.body if getattr(node, "name", "") in names]


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


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds
        fail(f"{folder} holds no tokenizer: {reason(error)}")


def load_run(folder, run_dir, device):
    """-> (run.json, the training script as a module, the model with the weights of `folder`)"""
    from safetensors.torch import load_file

    try:
        run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        if run["kind"] not in MODEL_CODE:
            fail(f"{run_dir} holds a run of kind {run['kind']!r}, not of one of the trainers here")
        kept = ("state.pt", "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
        kept += ("pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors")
        if not any((folder / name).exists() for name in kept):
            found = sorted(run_dir.glob("checkpoints/step_*"))
            last = f"; try --out_dir={found[-1]}" if found else ""
            fail(f"{folder} has no weights yet: they are kept from the first evaluation on{last}")
        pretrained = "fingerprint" in run["model"]  # then its code is that of transformers
        names = (PRETRAINED_CODE if pretrained else MODEL_CODE)[run["kind"]]
        trainer, state = import_trainer(run_dir, run["kind"], names), None
        if (folder / "state.pt").exists():
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        if pretrained:
            model = (load_finetuned if run["kind"] == "lm" else load_unet)(run, trainer, folder, state)
        else:
            state = state or {"model": load_file(folder / "model.safetensors"), "progress": {}}
            shape = trainer.Shape(**run["model"])
            model = trainer.GPT(shape) if run["kind"] == "lm" else trainer.DiT(shape)
            model.load_state_dict(state["model"])
            take_average(model, state)
    except Exception as error:  # a broken or foreign file fails in many ways
        fail(f"{folder} cannot be loaded: {reason(error)}")
    large = sum(p.numel() for p in model.parameters()) > 10**7  # reading the weights takes most of the time
    if run["kind"] == "lm" and large and not merge and computes_in_bf16(run, device):
        model.bfloat16()
    return run, trainer, model.to(device).eval()


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


def load_finetuned(run, trainer, folder, state):
    """-> the model of transformers that a run has trained, from `folder` or a checkpoint's `state`."""
    kind, dtype, base = run["settings"]["adapter"], run["settings"]["base_dtype"], run["model"]["name"]
    if not kind and not state:
        return trainer.load_causal_lm(str(folder), dtype)
    lm = trainer.load_causal_lm(base, dtype)
    if trainer.fingerprint(lm) != run["model"]["fingerprint"]:
        fail(f"the weights of {base} have changed since {folder} was trained on them")
    if not state:
        from peft import PeftModel

        return PeftModel.from_pretrained(lm, folder)
    if kind:
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "virtual_tokens")
        lm = trainer.add_adapter(lm, kind, *(run["settings"][name] for name in names))
    weights = {name.removeprefix("lm."): weight for name, weight in state["model"].items()}
    unknown = lm.load_state_dict(weights, strict=False).unexpected_keys  # not there: what was not trained
    return lm if not unknown else fail(f"{folder} holds weights of another model: {unknown[0]}")


def computes_in_bf16(run, device):
    """Whether the run did, by its setting and the hardware, so that this is how it is to be sampled from."""
    if run["settings"].get("mixed_precision") not in ("auto", "bf16"):
        return False
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def load_plain(folder, device):
    """-> a model of transformers in a folder that is no run of ours, or one under an adapter of peft."""
    try:
        if (folder / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM as Auto
        else:
            from transformers import AutoModelForCausalLM as Auto
        from transformers import logging

        logging.disable_progress_bar()
        return Auto.from_pretrained(folder).to(device).eval()
    except Exception as error:  # of many kinds
        fail(f"{out_dir} holds no causal language model: {reason(error)}")


def positions(model):
    """How many tokens a text can have; 0: no limit. A prompt of p_tuning takes some of them."""
    if not hasattr(model, "config"):
        return model.shape.block_size
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    return limit and limit - getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)


def stream(tok, ids):
    """Print ids as text while they come, a character of several with the last of them; -> the ids"""
    from tokenizers.decoders import DecodeStream

    decoder, said = DecodeStream(skip_special_tokens=True), []
    for i in ids:
        said.append(i)
        sys.stdout.write(decoder.step(tok.backend_tokenizer, i) or "")
        sys.stdout.flush()
    sys.stdout.write("\n")
    return said


def go_on(model, tok, ids, limit, device, seed):
    """Print what follows `ids`, by our own generate() or by that of transformers; -> its ids."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if not hasattr(model, "config"):
        rng = torch.Generator(device).manual_seed(seed)
        tokens = model.generate([ids], max_new_tokens, eos=tok.eos_token_id, rng=rng, **options)
        return stream(tok, (int(token) for token in tokens))
    from transformers import TextStreamer

    torch.manual_seed(seed)
    ends = model.generation_config.eos_token_id
    ends = {tok.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    how = options if temperature else {"temperature": None, "top_k": None, "top_p": None}
    how |= {"do_sample": temperature > 0, "eos_token_id": sorted(ends), "pad_token_id": min(ends)}
    how["max_new_tokens"] = min(max_new_tokens, limit - len(ids)) if limit else max_new_tokens
    x = torch.tensor([ids], device=device)
    streamer = TextStreamer(tok, skip_prompt=True, skip_special_tokens=True)
    new = model.generate(input_ids=x, attention_mask=torch.ones_like(x), streamer=streamer, **how)
    return new[0, len(ids) :].tolist()


def to_ids(tok, text, **options):
    try:
        return tok(text, **options)["input_ids"]
    except Exception as error:  # the tokenizers library raises no narrower one
        strange = sorted(set(text) - tok.get_vocab().keys())
        fail(f"the run's tokenizer cannot represent {strange} in the prompt ({error})")


def speak(model, tok, limit, device):
    """Print the prompt and each continuation of it."""
    ids = to_ids(tok, read_prompt())
    # our own generate() slides on where a text outgrows the model
    room = (limit if not hasattr(model, "config") else limit - 1) if limit else len(ids)
    if not ids or len(ids) > room:
        fail(f"the prompt has {len(ids)} tokens: it must have at least 1 and at most {room}")
    say(f"{out_dir} on {device}, seed {seed}, temperature {temperature}")
    for i in range(num_samples or 1):
        sys.stdout.write(tok.decode(ids, skip_special_tokens=True))
        go_on(model, tok, ids, limit, device, seed + i)


def read_lines():
    """The lines of stdin; a terminal is asked for each."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def converse(model, tok, limit, device):
    """Answer line after line; all that was said before, as far as it fits, is the prompt of an answer."""
    if not tok.chat_template:
        fail(f"{out_dir} has no chat template: without --chat=True, it goes on from a --prompt")
    messages = []
    for line in itertools.chain([read_prompt()] if prompt.strip() else [], read_lines()):
        messages.append({"role": "user", "content": line})
        while True:
            try:
                text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template may raise what it likes
                fail(f"the chat template of {out_dir} refuses this: {reason(error)}")
            ids = to_ids(tok, text, add_special_tokens=False)
            if not limit or len(ids) < limit or len(messages) == 1:
                break
            del messages[:2]
            say("(the beginning of the conversation no longer fits, and is forgotten)")
        if limit and len(ids) >= limit:
            say(f"(these are {len(ids)} tokens; the model takes fewer than {limit})")
            messages.pop()
            continue
        new = go_on(model, tok, ids, limit, device, seed + len(messages))
        messages.append({"role": "assistant", "content": tok.decode(new, skip_special_tokens=True).strip()})


def merge_adapter(model, tok):
    """Write a model with its LoRA adapter merged into its weights: a plain model of transformers."""
    if not hasattr(model, "merge_and_unload"):
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


def find_class(classes):
    """The number of the class that class_label names, or tells by number."""
    if class_label in classes:
        return classes.index(class_label)
    if class_label.isdecimal() and int(class_label) < len(classes):
        return int(class_label)
    if not classes:
        fail(f"{class_label=}: this model was trained without classes")
    near = nearest(class_label, classes)
    fail(f"{class_label=} is no class of this run: try {near}, or a number from 0 to {len(classes) - 1}")


def read_prompts(run):
    """What to draw: the prompt, each line of a file of them, or what the run has drawn at its evaluations."""
    if not prompt.strip():
        return run["prompts"]
    lines = read_prompt().splitlines() if prompt.startswith("FILE:") else [prompt]
    return [line.strip() for line in lines if line.strip()] or fail(f"{prompt[5:]} holds no prompt")


def draw(run, trainer, model, device):
    """Write a grid of pictures to `output`."""
    classes, process, trained = run["classes"], trainer.Process(**run["process"]), run["settings"]
    if merge or chat:
        fail(f"{out_dir} holds a diffusion model: it draws, without --chat and --merge")
    if lora_scale != 1 and not trained.get("adapter"):
        fail(f"{lora_scale=}: {out_dir} has no LoRA adapter, the whole model was trained")
    prompts = read_prompts(run) if "prompts" in run else []
    if not prompts and (prompt.strip() or negative_prompt):
        fail(f"{out_dir} draws without prompts: leave out --prompt and --negative_prompt")
    kinds = 1 if class_label else len(classes or prompts)
    n = num_samples * max(1, len(prompts)) or kinds or 16
    y = [find_class(classes)] * n if class_label else [i % kinds if kinds else -1 for i in range(n)]
    scale = guidance or (trained["guidance"] if classes or prompts else 1.0)
    if scale != 1 and not prompts and not (classes and trained["label_dropout"]):
        lacks = "label_dropout=0, so it does not know pictures without a class" if classes else "no classes"
        fail(f"{guidance=} cannot be had: this model was trained with {lacks}; use --guidance=1")
    if negative_prompt and scale == 1:
        fail(f"{negative_prompt=} needs a guidance above 1, which leads away from it")
    if sampler and sampler not in process.samplers:
        fail(f"{sampler=} does not fit this model ({process.objective}): use {' or '.join(process.samplers)}")
    if not output.endswith(".png") or not Path(output).parent.is_dir():  # before the work, not after it
        fail(f"{output=} must be a .png in a folder that exists")
    autoencoder, y = trainer.load_autoencoder(trained["vae"]) if trained["vae"] else None, torch.tensor(y)
    if hasattr(model, "pipe"):
        y, autoencoder = trainer.whole_pictures(y, trained["image_size"]), getattr(model.pipe, "vae", None)
    if prompts:
        model.captions = trainer.encode_captions(model.pipe, prompts, device, negative_prompt or None)
    if autoencoder is not None:
        autoencoder.to(device)
    size = (model.shape.channels, model.shape.size, model.shape.size)
    how = {"steps": steps or trained["sample_steps"], "guidance": scale}
    how["sampler"] = sampler or trained["sampler"] or process.samplers[0]
    say(f"{out_dir} on {device}, seed {seed}, {how}")
    how["at_once"] = trainer.pictures_at_once(trained["image_size"]) if hasattr(model, "pipe") else 64
    seeds = range(seed, seed + n)
    answer = torch.autocast(device, torch.bfloat16, enabled=computes_in_bf16(run, device))(model.forward)
    pictures = trainer.draw_pictures(answer, process, size, y.to(device), seeds, autoencoder, **how)
    try:
        trainer.make_grid(pictures).save(output)
    except OSError as error:
        fail(f"cannot write the grid to {output=}: {error}")
    say(f"{n} pictures: {output}")


def main():
    folder = Path(out_dir)
    if not folder.is_dir():
        fail(f"there is no run {out_dir!r}: train one, or name another --out_dir")
    run_dir = folder.parent.parent if (folder / "state.pt").exists() else folder
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if (run_dir / "run.json").exists():
        run, trainer, model = load_run(folder, run_dir, device)
        if run["kind"] == "diffusion":
            return draw(run, trainer, model, device)
    elif (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        model = load_plain(folder, device)
    else:
        fail(f"{out_dir} holds neither a run (run.json) nor a model of transformers (config.json)")
    tok, limit = load_tokenizer(run_dir), positions(model)
    if merge:
        return merge_adapter(model, tok)
    (converse if chat else speak)(model, tok, limit, device)


if __name__ == "__main__":
    configure(globals())
    try:
        main()
    except KeyboardInterrupt:  # the way to leave a chat
        raise SystemExit(130) from None
