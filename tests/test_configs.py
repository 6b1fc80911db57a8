"""
The commands at the head of every config do what they say, on a tiny model and tiny data in the place of the true ones:
the first trains, and goes on, the second samples from what it saved.
"""

import json
import re
import shlex

import pytest
from conftest import ROOT, within
from PIL import Image

SMALL = "--n_layer=1 --n_head=2 --n_embd=32 --batch_size=2 --micro_batch_size=1 --epochs=0 --max_steps=2"
SMALL += " --eval_interval=2 --eval_batches=1"
LM = f"{SMALL} --block_size=32"
DIFFUSION = f"{SMALL} --image_size=16 --sample_steps=2 --vae="
KINDS = {
    "sd15": "sd",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "flux": "flux",
    "zimage": "z_image",
    "qwen_image": "qwen_image",
}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def small(tmp_path, text_file, picture_folder, captioned, pretrained, pipeline):
    """small(config) -> the arguments that put tiny things in the place of its own"""

    def small(path):
        if kind := KINDS.get(path.stem.removesuffix("_lora")):
            return [*DIFFUSION.split(), f"--init_from={pipeline(kind)}", f"--dataset={captioned}"]
        if "train_diffusion.py" in path.read_text():
            return [*DIFFUSION.split(), f"--dataset={picture_folder}", "--image_column=image"]
        how, data = [*LM.split(), f"--dataset={text_file}"], tmp_path / "data.jsonl"
        if "init_from" not in path.read_text():
            return [*how, "--n_kv_head=1", "--tokenizer=bytes"]
        folder = pretrained("gpt2")
        (folder / "chat_template.jinja").write_text(CHAT)
        if "lora" in path.name:
            row = {"question": "2 + 2?", "answer": "4"} if "gsm8k" in path.name else None
            turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
            data.write_text(json.dumps(row or {"messages": turns}) + "\n")
            data.write_text(data.read_text() * 40)
            how.append(f"--dataset={data}")
        return [*how, f"--init_from={folder}"]

    return small


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_its_commands(small, tmp_path, path):
    text, out, picture = path.read_text(), f"--out_dir={tmp_path / 'run'}", tmp_path / "sample.png"
    how = [re.search(r"launch .*(train_\w+\.py)", text)[1], path, *small(path), out, "--resume=True"]
    assert within(*how)[0].endswith("done\n")
    assert "resumed from" in within(*how, "--max_steps=3")[0]
    if found := re.search(r"python (sample\.py .*)", text):
        more = ["--negative_prompt=blue"] * (path.stem.removesuffix("_lora") in KINDS)
        more += ["--class_label=red"] * ("--class_label" in found[1])  # ours are other classes
        more += [out, f"--output={picture}", "--max_new_tokens=8", "--num_samples=2"]
        said, _ = within(*shlex.split(found[1]), *more, stdin="Hello?\n")
        assert Image.open(picture).size == (32, 16) if "diffusion" in how[0] else len(said.strip()) > 1
