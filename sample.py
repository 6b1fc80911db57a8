"""
Let a trained model speak.

    python sample.py --prompt="def "                                      # the run in out/lm
    python sample.py --out_dir=out/mine --prompt=FILE:start.txt --num_samples=3 --temperature=0.8
    python sample.py --out_dir=out/lm/checkpoints/step_00000400 --prompt="class " --seed=2

stdout holds the prompt and its continuation, nothing else. Any folder with a causal language model of
transformers works as well.
"""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import torch

from configurator import configure, fail

# -----------------------------------------------------------------------------
# Settings
# -----------------------------------------------------------------------------
out_dir = "out/lm"  # a run, one of its checkpoints, or a folder with a model of transformers
prompt = "\n"  # the text to go on from; FILE:x.txt reads it from a file
num_samples = 1  # continuations, one after the other (1..)
max_new_tokens = 300  # length of each (1..)
temperature = 0.8  # 0: always the likeliest token; 1: as the model says; above: wilder
top_k = 0  # draw from so many of the likeliest tokens; 0: from all
top_p = 1.0  # draw from the likeliest tokens that make up this share of the probability (0..1)
seed = 1337  # the same seed, the same text
trust_run_code = False  # run the model code that lies in out_dir: only for runs whose author you trust


def say(message):
    print(message, file=sys.stderr, flush=True)


def model_code(path):
    """The model in a training script, without comments and layout: equal code builds equal models."""
    names = {"Shape", "norm", "rotate", "Attention", "MLP", "Block", "GPT", "draw"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            del node.body[0]
    return [ast.dump(node) for node in tree.body if getattr(node, "name", "") in names]


def import_trainer(run_dir):
    """-> the training script as a module: ours, or the run's own copy where that is trusted."""
    copy, ours = run_dir / "train_lm.py", Path(__file__).with_name("train_lm.py")
    if copy.exists() and not trust_run_code and model_code(copy) != model_code(ours):
        fail(
            f"the model in {copy} is not the one in {ours.name} here: --trust_run_code=True runs that file, "
            "if you trust its author"
        )
    path = copy if copy.exists() and trust_run_code else ours
    spec = importlib.util.spec_from_file_location("train_lm", path)
    sys.modules["train_lm"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_prompt():
    text = prompt
    if prompt.startswith("FILE:"):
        try:
            text = Path(prompt[5:]).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            fail(f"cannot read the prompt from {prompt[5:]}: {error}")
    return text or fail('the prompt is empty: give it some text to go on from, as in --prompt="def "')


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds
        fail(f"{folder} holds no tokenizer: {str(error).splitlines()[0]}")


def load_run(folder, run_dir, device):
    """-> (model, its context length) of a run of train_lm.py, with the weights of `folder`."""
    from safetensors.torch import load_file

    try:
        run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        if run["kind"] != "lm":
            fail(f"{run_dir} holds a run of kind {run['kind']!r}, not of train_lm.py")
        if (folder / "state.pt").exists():
            weights = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)["model"]
        elif (folder / "model.safetensors").exists():
            weights = load_file(folder / "model.safetensors")
        else:
            found = sorted(run_dir.glob("checkpoints/step_*"))
            last = f"; try --out_dir={found[-1]}" if found else ""
            fail(f"{folder} has no weights yet: they are kept from the first evaluation on{last}")
        trainer = import_trainer(run_dir)
        model = trainer.GPT(trainer.Shape(**run["model"]))
        model.load_state_dict(weights)
    except Exception as error:  # a broken or foreign file fails in many ways
        fail(f"{folder} cannot be loaded: {str(error).splitlines()[0]}")
    return model.to(device).eval(), run["model"]["block_size"]


def stream(tok, ids):
    """Print tokens as text while they come; a character of several tokens waits for the last of them."""
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=True)
    for i in ids:
        sys.stdout.write(decoder.step(tok.backend_tokenizer, i) or "")
        sys.stdout.flush()


def speak(model, tok, ids, limit, device):
    """Print each continuation of `ids`, by our own generate() or by that of transformers."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for i in range(num_samples):
        sys.stdout.write(tok.decode(ids, skip_special_tokens=True))
        if limit:
            rng = torch.Generator(device).manual_seed(seed + i)
            tokens = model.generate([ids], max_new_tokens, eos=tok.eos_token_id, rng=rng, **options)
            stream(tok, (int(token) for token in tokens))
            sys.stdout.write("\n")
        else:
            from transformers import TextStreamer

            torch.manual_seed(seed + i)
            how = options if temperature else {"temperature": None, "top_k": None, "top_p": None}
            x = torch.tensor([ids], device=device)
            streamer = TextStreamer(tok, skip_prompt=True, skip_special_tokens=True)
            how = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens, "streamer": streamer} | how
            model.generate(x, attention_mask=torch.ones_like(x), **how)


def main():
    folder = Path(out_dir)
    if not folder.is_dir():
        fail(f"there is no run {out_dir!r}: train one, or name another --out_dir")
    run_dir = folder.parent.parent if (folder / "state.pt").exists() else folder
    text = read_prompt()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    is_run = (run_dir / "run.json").exists()
    if not is_run and not (folder / "config.json").exists():
        fail(f"{out_dir} holds neither a run (run.json) nor a model of transformers (config.json)")
    tok = load_tokenizer(run_dir)
    if is_run:
        model, limit = load_run(folder, run_dir, device)
    else:
        from transformers import AutoModelForCausalLM

        try:
            model, limit = AutoModelForCausalLM.from_pretrained(folder).to(device).eval(), 0
        except Exception as error:  # of many kinds
            fail(f"{out_dir} holds no causal language model: {str(error).splitlines()[0]}")
    try:
        ids = tok(text, add_special_tokens=not is_run)["input_ids"]
    except Exception as error:  # the tokenizers library raises no narrower one
        strange = sorted(set(text) - tok.get_vocab().keys())
        fail(f"the run's tokenizer cannot represent {strange} in the prompt ({error})")
    room = limit or getattr(model.config, "max_position_embeddings", 0) or len(ids)
    if not ids or len(ids) > room:
        fail(f"the prompt has {len(ids)} tokens: it must have at least 1 and at most {room}")
    say(f"{out_dir} on {device}, seed {seed}, temperature {temperature}")
    speak(model, tok, ids, limit, device)


if __name__ == "__main__":
    configure(globals())
    main()
