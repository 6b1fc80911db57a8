"""
Fine-tuning through the real commands, on tiny models of transformers and on a run of ours: whole, by LoRA and
by P-tuning they train, go on bit for bit, load in transformers and peft with the logits they had, speak and
are merged; what is learned of chats is what transformers' own masks say.
"""

import json
import string

import numpy as np
import pytest
import torch
from conftest import differences, last_state, rows, within
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import train_lm

FAST = ("--eval_batches=2", "--mixed_precision=no", "--batch_size=8", "--block_size=32", "--warmup_steps=2")
FAST += ("--eval_interval=10", "--save_interval=10", "--log_interval=5", "--lr_schedule=constant")
KINDS = [("qwen3", ""), ("finished", ""), ("gpt2", "lora"), ("finished", "lora"), ("gpt2", "p_tuning")]


def load(folder, adapter):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    return (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(folder).eval()


@pytest.mark.parametrize("kind, adapter", KINDS)
def test_it_trains_goes_on_loads_speaks_and_merges(tmp_path, pretrained, finished, text_file, kind, adapter):
    from transformers import AutoTokenizer

    base = finished if kind == "finished" else pretrained(kind)
    (tmp_path / "text.txt").write_text(text_file.read_text()[::-1])  # another language of the same letters
    how = (f"--init_from={base}", f"--adapter={adapter}", f"--dataset={tmp_path / 'text.txt'}", *FAST)
    how += ("--learning_rate=0.01", "--resume=True")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for steps, out in (20, unbroken), (10, broken), (20, broken):
        within("train_lm.py", *how, f"--max_steps={steps}", f"--out_dir={out}")
    states = [last_state(out) for out in (unbroken, broken)]
    assert not differences(states[0]["model"], states[1]["model"])
    assert not differences(states[0]["optimizers"], states[1]["optimizers"])
    assert rows(unbroken, "train/loss") == rows(broken, "train/loss")
    val = [row["val/loss"] for row in rows(unbroken, "val/loss")]
    assert val[-1] < val[0] - 0.01

    model, tok = load(unbroken, adapter), AutoTokenizer.from_pretrained(unbroken)
    greedy = ("--prompt=def add", "--temperature=0", "--max_new_tokens=8")
    ids = model.generate(**tok("def add", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
    theirs = tok.decode(ids, skip_special_tokens=True).rstrip("\ufffd")  # half a character
    assert within("sample.py", f"--out_dir={unbroken}", *greedy)[0] == theirs + "\n"
    merge = ("sample.py", f"--out_dir={unbroken}", f"--merge={tmp_path / 'merged'}")
    if adapter != "lora":
        assert "has no LoRA adapter that could be merged" in within(*merge, code=2)[1]
        return
    within(*merge)
    ids = torch.randint(len(tok), (2, 30))
    assert (load(tmp_path / "merged", "")(ids).logits - model(input_ids=ids).logits).abs().max() < 1e-5
    # an adapter is a place to start from
    more = tmp_path / "more"
    within("train_lm.py", *how, f"--init_from={unbroken}", "--max_steps=10", f"--out_dir={more}")
    assert rows(more)[0]["val/loss"] == pytest.approx(val[-1], rel=1e-5)
    keys = [load_file(out / "adapter_model.safetensors").keys() for out in (unbroken, more)]
    assert keys[0] == keys[1]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (  # writes the last answer with its thoughts, and those before without, as Qwen3 does
    "{% for m in messages %}{{ m.role }}: "
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "How are you, and what can you do?"},
    {"role": "assistant", "content": "Fine, and much."},
]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(rows of data, name=value ...) -> (tokenizer, rows of train) of train_lm.prepare_data"""

    def prepare(data, template="", **values):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        values |= {"val_fraction": 0.0, "test_fraction": 0.0, "dataset": str(path)}
        if template:
            (values["init_from"] / "chat_template.jinja").write_text(template)
        for name, value in (values | {"init_from": str(values["init_from"])}).items():
            monkeypatch.setattr(train_lm, name, value)
        tok, splits = train_lm.prepare_data()
        return tok, list(splits["train"])

    return prepare


def learned(tok, row):
    return tok.decode(row["labels"][row["labels"] != -100])


def test_the_assistants_tokens_are_those_that_transformers_marks(prepare, pretrained):
    base = pretrained("qwen3", True, "<|im_start|>", "<|im_end|>")
    chats = [CONVERSATION, CONVERSATION[1:3]]
    tok, found = prepare([{"messages": chat} for chat in chats], CHATML, init_from=base)
    names = {"user": "human", "assistant": "gpt", "system": "system"}  # of ShareGPT
    shared = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in chats]
    _, same = prepare([{"conversations": chat} for chat in shared], init_from=base)
    for chat, row, other in zip(chats, found, same, strict=True):
        theirs = tok.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert row["ids"].tolist() == other["ids"].tolist() == [*theirs["input_ids"], tok.eos_token_id]
        mask = np.array([*theirs["assistant_masks"], 1], dtype=bool)
        assert row["labels"].tolist() == np.where(mask, row["ids"], -100).tolist()


def test_a_template_that_rewrites_the_past_gives_a_row_for_each_answer(prepare, pretrained):
    tok, found = prepare([{"messages": CONVERSATION}], QWEN, init_from=pretrained("qwen3"))
    for row, end in zip(found, (3, 5), strict=True):
        shown = tok.apply_chat_template(CONVERSATION[: end - 1], tokenize=False, add_generation_prompt=True)
        answer = "<think></think>" + CONVERSATION[end - 1]["content"] + tok.eos_token + "\n"
        assert tok.decode(row["ids"]) == shown + answer and learned(tok, row) == answer


def test_no_space_comes_in_where_a_sentencepiece_tokenizer_would_begin_a_text_with_one(prepare, pretrained):
    base = pretrained("qwen3")
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(["</s>", "\u2581", *string.printable])}, []))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tok.save_pretrained(base)
    _, (row,) = prepare([{"prompt": "How many?", "completion": "It is."}], init_from=base)
    assert row["ids"].tolist() == tok("How many?It is.</s>").input_ids


def test_rows_that_are_too_long_or_teach_nothing(prepare, pretrained):
    pairs = [("a b c d e f g h", "xyz"), ("p " * 90, "xyz"), ("p", "x " * 90), ("p", ""), ("p", None)]
    data = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    tok, found = prepare(data, init_from=pretrained("gpt2"), block_size=20)
    texts = sorted(learned(tok, row) for row in found)
    assert texts[1] == "xyz<|endoftext|>" and set(texts[0]) == {"x", " "} and len(found) == 2
    assert max(len(row["ids"]) for row in found) == 21


def test_the_loss_is_that_of_the_answers_and_they_are_learned_by_heart(tmp_path, pretrained):
    from transformers import AutoTokenizer

    answers = ["red", "forty-two", "the sea\nand the land", "é à ü"]
    for name in ("train", "val"):
        data = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    base, out = pretrained("qwen3"), tmp_path / "run"
    how = [*FAST, f"--dataset={tmp_path}", "--prompt_column=question", "--completion_column=answer"]
    how += ["--test_fraction=0", "--eval_batches=0", "--eval_interval=75", "--max_steps=150"]
    within("train_lm.py", *how, f"--init_from={base}", f"--out_dir={out}", "--learning_rate=0.02")
    lm, tok, total, n = load(base, ""), AutoTokenizer.from_pretrained(base), 0.0, 0
    for i, answer in enumerate(answers):
        q, a = tok(f"{i}?").input_ids, [*tok(answer).input_ids, tok.eos_token_id]
        total += lm(torch.tensor([q + a]), labels=torch.tensor([[-100] * len(q) + a])).loss.item() * len(a)
        n += len(a)
    assert rows(out, "val/loss")[0]["val/loss"] == pytest.approx(total / n, rel=1e-5)
    for i, answer in enumerate(answers):
        stdout, _ = within("sample.py", f"--out_dir={out}", f"--prompt={i}?", "--temperature=0")
        assert stdout == f"{i}?{answer}\n"  # and it stops there
