"""
Fine-tuning through the real commands, on tiny models of transformers and on a run of ours: whole, by LoRA and by P-tuning
they train, go on bit for bit, load in transformers and peft with the logits they had, speak and are merged; what is
learned of chats is what transformers' own masks say.
"""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_MODEL, differences, last_state, rows, within
from safetensors.torch import load_file

import train_lm

FAST = ("--eval_batches=2", "--mixed_precision=no", "--batch_size=8", "--block_size=32", "--warmup_steps=2")
FAST += ("--eval_interval=10", "--save_interval=10", "--log_interval=5", "--lr_schedule=constant")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory, text_file):
    """A finished tiny run of ours."""
    out = tmp_path_factory.mktemp("ours") / "run"
    config = out.with_name("config.py")
    config.write_text(TINY_MODEL["train_lm.py"] + TINY + f"dataset = {str(text_file)!r}\n")
    within("train_lm.py", config, f"--out_dir={out}", "--tokenizer=bpe:300", "--block_size=64")
    return out


def load(folder, adapter):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    return (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(folder).eval()


@pytest.mark.parametrize("adapter", ["", "lora", "p_tuning"], ids=["whole", "lora", "p_tuning"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "ours"])
def test_it_trains_goes_on_loads_speaks_and_merges(tmp_path, pretrained, ours, text_file, kind, adapter):
    from transformers import AutoTokenizer

    base = ours if kind == "ours" else pretrained(kind)
    (tmp_path / "text.txt").write_text(text_file.read_text().upper())
    how = (f"--init_from={base}", f"--adapter={adapter}", f"--dataset={tmp_path / 'text.txt'}", *FAST)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    within("train_lm.py", *how, "--learning_rate=0.01", "--max_steps=20", f"--out_dir={unbroken}")
    for steps in (10, 20):
        within(
            "train_lm.py",
            *how,
            "--learning_rate=0.01",
            f"--max_steps={steps}",
            f"--out_dir={broken}",
            "--resume=True",
        )
    assert not differences(last_state(unbroken)["model"], last_state(broken)["model"])
    assert not differences(last_state(unbroken)["optimizers"], last_state(broken)["optimizers"])
    assert rows(unbroken, "train/loss") == rows(broken, "train/loss")
    val = [row["val/loss"] for row in rows(unbroken, "val/loss")]
    assert val[-1] < val[0] - 0.01
    model, tok = load(unbroken, adapter), AutoTokenizer.from_pretrained(unbroken)
    greedy = ("--prompt=def add", "--temperature=0", "--max_new_tokens=8")
    x = tok("def add", return_tensors="pt")
    theirs = tok.decode(model.generate(**x, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert (
        within("sample.py", f"--out_dir={unbroken}", *greedy)[0] == theirs.rstrip("\ufffd") + "\n"
    )  # half a character
    merge = ("sample.py", f"--out_dir={unbroken}", f"--merge={tmp_path / 'merged'}")
    if adapter != "lora":
        assert "has no LoRA adapter that could be merged" in within(*merge, code=2)[1]
        return
    within(*merge)
    ids = torch.randint(290, (2, 30), generator=torch.Generator().manual_seed(0))
    assert (load(tmp_path / "merged", "")(ids).logits - model(input_ids=ids).logits).abs().max() < 1e-5
    # an adapter is a place to start from
    more = [*how[1:], f"--init_from={unbroken}", "--max_steps=10", f"--out_dir={tmp_path / 'more'}"]
    within("train_lm.py", *more)
    assert rows(tmp_path / "more")[0]["val/loss"] == pytest.approx(val[-1], rel=1e-5)
    assert (
        load_file(unbroken / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "more" / "adapter_model.safetensors").keys()
    )


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "How are you, and what can you do?"},
    {"role": "assistant", "content": "Fine, and much."},
]


def prepare(monkeypatch, path, data, **values):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    defaults = {"val_fraction": 0.0, "test_fraction": 0.0, "block_size": 200, "dataset": path}
    for name, value in (defaults | values).items():
        monkeypatch.setattr(train_lm, name, value if isinstance(value, (int, float)) else str(value))
    tok, splits = train_lm.prepare_data()
    return tok, list(splits["train"])


def test_the_assistants_tokens_are_those_that_transformers_marks(tmp_path, pretrained, monkeypatch):
    base = pretrained("qwen3", True, "<|im_start|>", "<|im_end|>")
    (base / "chat_template.jinja").write_text(CHATML)
    chats = [CONVERSATION, CONVERSATION[1:3]]
    tok, found = prepare(
        monkeypatch, tmp_path / "c.jsonl", [{"messages": chat} for chat in chats], init_from=base
    )
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]} for chat in chats
    ]
    _, same = prepare(monkeypatch, tmp_path / "s.jsonl", shared, init_from=base)
    for chat, row, other in zip(chats, found, same, strict=True):
        marks = {"return_dict": True, "return_assistant_tokens_mask": True}
        theirs = tok.apply_chat_template(chat, **marks)
        assert row["ids"].tolist() == other["ids"].tolist() == [*theirs["input_ids"], tok.eos_token_id]
        learned = np.array([*theirs["assistant_masks"], 1], dtype=bool)
        assert row["labels"].tolist() == np.where(learned, row["ids"], -100).tolist()


QWEN = (  # writes the last answer with its thoughts, and those before without, as Qwen3 does
    "{% for m in messages %}{{ m.role }}: {% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_rewrites_the_past_gives_a_row_for_each_answer(tmp_path, pretrained, monkeypatch):
    base = pretrained("qwen3")
    (base / "chat_template.jinja").write_text(QWEN)
    tok, found = prepare(monkeypatch, tmp_path / "c.jsonl", [{"messages": CONVERSATION}], init_from=base)
    for row, end in zip(found, (3, 5), strict=True):
        shown = tok.apply_chat_template(CONVERSATION[: end - 1], tokenize=False, add_generation_prompt=True)
        answer = "<think></think>" + CONVERSATION[end - 1]["content"] + tok.eos_token + "\n"
        assert tok.decode(row["ids"]) == shown + answer
        assert tok.decode(row["labels"][row["labels"] != -100]) == answer


def test_rows_that_are_too_long_or_teach_nothing(tmp_path, pretrained, monkeypatch):
    pairs = [("a b c d e f g h", "xyz"), ("p " * 90, "xyz"), ("p", "x " * 90), ("p", ""), ("p", None)]
    data = [{"prompt": p, "completion": c} for p, c in pairs]
    tok, found = prepare(monkeypatch, tmp_path / "r.jsonl", data, init_from=pretrained("gpt2"), block_size=20)
    learned = sorted(tok.decode(row["labels"][row["labels"] != -100]) for row in found)
    assert learned[1] == "xyz<|endoftext|>" and set(learned[0]) == {"x", " "} and len(found) == 2
    assert max(len(row["ids"]) for row in found) == 21


def test_the_loss_is_that_of_the_answers_and_they_are_learned_by_heart(tmp_path, pretrained):
    answers = ["red", "a blue whale", "forty-two", "no", "the sea\nand the land", "x = 1", "é à ü", "often"]
    for name in ("train", "val"):
        data = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    base, out = pretrained("qwen3"), tmp_path / "run"
    how = (
        f"--init_from={base}",
        f"--dataset={tmp_path}",
        "--test_fraction=0",
        "--prompt_column=question",
        "--completion_column=answer",
        *FAST,
        "--eval_batches=0",
    )
    within(
        "train_lm.py",
        *how,
        f"--out_dir={out}",
        "--learning_rate=0.02",
        "--max_steps=150",
        "--eval_interval=75",
    )
    lm, total, n = train_lm.load_model(str(base)).lm, 0.0, 0
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(base)
    for i, answer in enumerate(answers):
        q, a = tok(f"{i}?").input_ids, [*tok(answer).input_ids, tok.eos_token_id]
        total += lm(torch.tensor([q + a]), labels=torch.tensor([[-100] * len(q) + a])).loss.item() * len(a)
        n += len(a)
    assert rows(out, "val/loss")[0]["val/loss"] == pytest.approx(total / n, rel=1e-5)
    for i, answer in enumerate(answers):
        stdout, _ = within("sample.py", f"--out_dir={out}", f"--prompt={i}?", "--temperature=0")
        assert stdout == f"{i}?{answer}\n"  # and it stops there
