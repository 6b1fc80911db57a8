"""
Validates that the commands at the head of every config do what they say, on a tiny model and tiny data in the
place of the true ones: the first trains, and goes on, the second samples from what it saved.
"""

import json
import re
import shlex

import pytest
from conftest import ROOT, within
from PIL import Image

SMALL = "--n_layer=1 --n_head=2 --n_embd=32 --batch_size=2 --micro_batch_size=1 --epochs=0 --max_steps=2"
SMALL += " --eval_interval=2 --eval_batches=1 --resume=True"
DIFFUSION = "--image_size=16 --sample_steps=2 --image_column=image --vae="
KINDS = {"sd15_lora": "sd", "sdxl_lora": "sdxl", "sd3_lora": "sd3", "flux_lora": "flux"}
KINDS |= {"zimage_lora": "z_image", "qwen_image_lora": "qwen_image"}
TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
ROWS = {"lora_chat": {"messages": TURNS}, "lora_gsm8k": {"question": "2 + 2?", "answer": "4"}}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_its_commands(path, tmp_path, text_file, picture_folder, captioned, pretrained, pipeline):
    text, name, picture = path.read_text(), path.stem, tmp_path / "sample.png"
    trainer, out = re.search(r"launch .*(train_\w+\.py)", text)[1], f"--out_dir={tmp_path / 'run'}"
    if trainer == "train_lm.py":
        how, data = ["--block_size=32", f"--dataset={text_file}"], tmp_path / "data.jsonl"
        if "init_from" in text:
            how.append(f"--init_from={(folder := pretrained('gpt2'))}")
            (folder / "chat_template.jinja").write_text(CHAT)
        else:
            how += ["--n_kv_head=1", "--tokenizer=bytes"]
        if name in ROWS:
            data.write_text(40 * (json.dumps(ROWS[name]) + "\n"))
            how.append(f"--dataset={data}")
    else:
        how = [*DIFFUSION.split(), f"--dataset={picture_folder}"]
        if name in KINDS:
            how += [f"--dataset={captioned}", f"--init_from={pipeline(KINDS[name])}"]
    how = [trainer, path, *SMALL.split(), *how, out]
    assert within(*how)[0].endswith("done\n")
    assert "resumed from" in within(*how, "--max_steps=3")[0]
    if found := re.search(r"python (sample\.py .*)", text):
        more = ["--negative_prompt=blue"] * (name in KINDS and name != "flux_lora")
        more += ["--class_label=red"] * ("--class_label" in found[1])  # ours are other classes
        more += [out, f"--output={picture}", "--max_new_tokens=8", "--num_samples=2"]
        said, _ = within(*shlex.split(found[1]), *more, stdin="Hello?\n")
        assert len(said.strip()) > 1 if trainer == "train_lm.py" else Image.open(picture).size == (32, 16)
