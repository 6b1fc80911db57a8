"""
Fine-tuning through the real commands, on tiny models of transformers and on a run of ours: whole, by LoRA and by
P-tuning they train, go on bit for bit, load in transformers and peft with the logits they had, speak as those generate,
with a cache, also from a plain folder, and are merged; what is learned of chats is what transformers' own masks say,
whatever the template and the tokenizer write; the loss is that of transformers, also where it is computed in chunks.
"""

import json
import string
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from conftest import lost, rows, within, writes_around
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import train_lm

FAST = ("--eval_batches=2", "--mixed_precision=no", "--batch_size=8", "--block_size=32", "--warmup_steps=2")
FAST += ("--eval_interval=10", "--save_interval=10", "--log_interval=5", "--lr_schedule=constant")
KINDS = [("qwen3", ""), ("finished", ""), ("gpt2", "lora"), ("finished", "lora"), ("gpt2", "p_tuning")]


def load(folder, adapter):
    return (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(folder).eval()


@pytest.mark.parametrize("kind, adapter", KINDS)
def test_it_trains_goes_on_loads_speaks_and_merges(tmp_path, pretrained, finished, text_file, kind, adapter):
    base = finished if kind == "finished" else pretrained(kind)
    (tmp_path / "text.txt").write_text(text_file.read_text()[::-1])  # another language of the same letters
    how = (f"--init_from={base}", f"--adapter={adapter}", f"--dataset={tmp_path / 'text.txt'}", *FAST)
    how += ("--learning_rate=0.01", "--resume=True")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for steps, out in (20, unbroken), (10, broken), (20, broken):
        within("train_lm.py", *how, f"--max_steps={steps}", f"--out_dir={out}")
    assert not lost(unbroken, broken)
    val = [row["val/loss"] for row in rows(unbroken, "val/loss")]
    assert val[-1] < val[0] - 0.01

    model, tok = load(unbroken, adapter), AutoTokenizer.from_pretrained(unbroken)
    (tmp_path / "prompt.txt").write_text("def add")
    greedy = ("--temperature=0", "--max_new_tokens=8", "--num_samples=2")
    ids = model.generate(**tok("def add", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
    theirs = tok.decode(ids, skip_special_tokens=True).rstrip("\ufffd")  # half a character
    lengths = []

    def note(module, inputs, output):
        if hasattr(output, "last_hidden_state"):
            lengths.append(output.last_hidden_state.size(1))

    if kind != "finished":
        (unbroken / "run.json").unlink()  # a plain folder, as transformers and peft save it
    speak = (f"--out_dir={unbroken}", f"--prompt=FILE:{tmp_path}/prompt.txt", *greedy)
    with register_module_forward_hook(note):
        assert within("sample.py", *speak)[0] == 2 * (theirs + "\n")
    n_prompt = len(tok("def add").input_ids)
    if (kind, adapter) != ("finished", ""):
        assert lengths == [n_prompt + 20 * (adapter == "p_tuning"), *[1] * (len(ids) - n_prompt - 1)]
    merge = ("sample.py", f"--out_dir={unbroken}", f"--merge={tmp_path / 'merged'}")
    if adapter != "lora":
        assert "so there is nothing to merge" in within(*merge, code=2)[1]
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
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
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
R1 = (  # opens a thought in the prompt, and leaves the thoughts of all answers out, as DeepSeek-R1-Distill does
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
MISTRAL = (  # writes the system message into the last question, and nowhere once it is answered
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "How are you, and what can you do?"},
    {"role": "assistant", "content": "Fine, and much."},
]
WITH_TOOL = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "{weather}"},
    {"role": "tool", "content": "0 mm"},
    {"role": "assistant", "content": "No."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]
PARTS = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CONVERSATION]
SENDERS = ("human", "function_call", "observation", "gpt")
SHAREGPT = [{"from": name, "value": m["content"]} for name, m in zip(SENDERS, WITH_TOOL, strict=True)]
ROWS = {  # of a table, with the messages that they stand for
    "messages": ({"messages": CONVERSATION}, CONVERSATION),
    "one answer": ({"messages": CONVERSATION[1:3]}, CONVERSATION[1:3]),
    "parts": ({"messages": PARTS}, CONVERSATION),
    "system": ({"system": "Be brief.", "messages": CONVERSATION[1:]}, CONVERSATION),
    "tools": ({"messages": WITH_TOOL, "tools": TOOLS}, WITH_TOOL),
    "tools as JSON": ({"messages": WITH_TOOL, "tools": json.dumps(TOOLS)}, WITH_TOOL),
    "ShareGPT": ({"conversations": SHAREGPT}, WITH_TOOL),
}


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


@pytest.fixture(scope="module")
def chatty(pretrained):
    folder = pretrained("qwen3", True, "<|im_start|>", "<|im_end|>")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.mark.parametrize("kind", ROWS)
def test_the_assistants_tokens_are_those_that_transformers_marks(prepare, chatty, kind):
    data, chat = ROWS[kind]
    tok, (row,) = prepare([data], init_from=chatty)
    tools = TOOLS if "tools" in data else None
    marked = {"return_dict": True, "return_assistant_tokens_mask": True}
    theirs = tok.apply_chat_template(chat, tools=tools, **marked)
    assert row["ids"].tolist() == theirs["input_ids"]
    mask = np.array(theirs["assistant_masks"], dtype=bool)
    assert mask.any() and row["labels"].tolist() == np.where(mask, row["ids"], -100).tolist()


def test_a_template_that_rewrites_the_past_gives_a_row_for_each_answer(prepare, pretrained):
    tok, found = prepare([{"messages": CONVERSATION}], QWEN, init_from=pretrained("qwen3"))
    for row, end in zip(found, (3, 5), strict=True):
        shown = tok.apply_chat_template(CONVERSATION[: end - 1], tokenize=False, add_generation_prompt=True)
        answer = "<think></think>" + CONVERSATION[end - 1]["content"] + tok.eos_token + "\n"
        assert tok.decode(row["ids"]) == shown + answer and learned(tok, row) == answer


def test_two_answers_in_a_row_of_which_the_template_rewrites_the_first(prepare, pretrained):
    """As a tool call after a text. Each is learned once, from behind its own "assistant: "."""
    chat = [*CONVERSATION[:3], {"role": "assistant", "content": "{weather}"}]
    tok, found = prepare([{"messages": chat}], QWEN, init_from=pretrained("qwen3"))
    answers = [f"<think></think>{m['content']}{tok.eos_token}\n" for m in chat[2:]]
    assert [learned(tok, row) for row in found] == answers
    assert tok.decode(found[1]["ids"]) == tok.apply_chat_template(chat, tokenize=False)


def test_a_question_that_the_template_rewrites_once_it_is_answered_stays_as_it_was(prepare, pretrained):
    tok, found = prepare([{"messages": CONVERSATION}], MISTRAL, init_from=pretrained("qwen3"), block_size=128)
    for row, end in zip(found, (3, 5), strict=True):
        question = tok.apply_chat_template(CONVERSATION[: end - 1], tokenize=False)
        answer = f" {CONVERSATION[end - 1]['content']}{tok.eos_token}"
        assert "Be brief." in question and tok.decode(row["ids"]) == question + answer
        assert learned(tok, row) == answer


def test_a_question_may_be_a_part_of_the_opening_of_an_answer(prepare, pretrained):
    """The "hi" of <think>."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
    tok, (row,) = prepare([{"messages": chat}], R1, init_from=pretrained("qwen3"))
    assert learned(tok, row) == "Hello." + tok.eos_token


@pytest.mark.parametrize("change", [{"weight": 0}, {"content": " "}], ids=str)
def test_an_answer_with_a_weight_of_0_or_without_text_is_not_learned(prepare, chatty, change):
    chat = [dict(m) for m in CONVERSATION]
    chat[2] |= change
    tok, (row,) = prepare([{"messages": chat}], init_from=chatty)
    assert learned(tok, row) == "Fine, and much.<|im_end|>\n"
    assert ("Hi." in tok.decode(row["ids"])) == ("weight" in change)


def test_tool_calls_are_learned_by_a_base_without_a_template_and_from_parquet_without_nulls(
    prepare, pretrained, tmp_path
):
    """Arrow gives the arguments of all calls in a column the same keys. OpenAI writes them as JSON in a text."""
    arguments = [{"city": "Oslo"}, {"date": "today"}]
    chats = []
    for values in arguments:
        call = {"type": "function", "function": {"name": "weather", "arguments": values}}
        chats.append([WITH_TOOL[0], {"role": "assistant", "content": None, "tool_calls": [call]}])
    datasets.Dataset.from_dict({"messages": chats}).to_parquet(tmp_path / "calls.parquet")
    tok, from_lines = prepare(
        [{"messages": chat} for chat in chats], init_from=pretrained("qwen3"), block_size=256
    )
    found = sorted(learned(tok, row) for row in from_lines)
    for chat, values in zip(chats, arguments):
        chat[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(values)
    tok, from_texts = prepare(
        [{"messages": chat} for chat in chats], init_from=tok.name_or_path, block_size=256
    )
    assert sorted(learned(tok, row) for row in from_texts) == found
    for text, values in zip(found, arguments, strict=True):
        call = text.strip().removesuffix(tok.eos_token)
        assert json.loads(call)[0]["function"]["arguments"] == values
    train_lm.dataset = str(tmp_path / "calls.parquet")
    tok, splits = train_lm.prepare_data()
    assert sorted(learned(tok, row) for row in splits["train"]) == found


def test_a_base_with_settings_for_sampling_is_saved(tmp_path, pretrained, text_file):
    """transformers does not save such a generation config, as Llama 2 has it, but it reads it."""
    base = pretrained("llama")
    file = base / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 0, "temperature": 0.9, "top_p": 0.6}))
    how = (*FAST, f"--init_from={base}", f"--dataset={text_file}", f"--out_dir={tmp_path / 'run'}")
    within("train_lm.py", *how, "--max_steps=1")
    assert load(tmp_path / "run", "").generation_config.temperature == 0.9


def test_a_template_that_opens_a_thought_in_the_prompt_trains(prepare, pretrained):
    chat = [dict(m) for m in CONVERSATION]
    chat[2]["content"] = "<think>\nWell.\n</think>Hi."
    tok, (row,) = prepare([{"messages": chat}], R1, init_from=pretrained("qwen3"))
    assert tok.decode(row["ids"]) == tok.apply_chat_template(chat, tokenize=False)
    assert learned(tok, row) == f"Hi.{tok.eos_token}Fine, and much.{tok.eos_token}"


def test_messages_without_text_are_read_as_empty(prepare, chatty):
    """Fields that are null, or an empty text, as tables have them."""
    silent = [{"role": "user", "content": None, "name": None}, {"from": "gpt", "value": "", "id": "3"}]
    tok, (row,) = prepare([{"messages": [*silent, *CONVERSATION[1:3]]}], init_from=chatty)
    assert learned(tok, row) == CONVERSATION[2]["content"] + "<|im_end|>\n"


def test_an_answer_that_the_template_leaves_open_ends_with_an_eos(prepare, pretrained):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} | {% endfor %}"
    tok, (row,) = prepare([{"messages": CONVERSATION}], template, init_from=pretrained("qwen3"))
    assert tok.decode(row["ids"]) == tok.apply_chat_template(CONVERSATION, tokenize=False) + tok.eos_token
    assert learned(tok, row).endswith("Fine, and much. | " + tok.eos_token)


def test_a_column_that_the_first_row_lacks_is_used(prepare, chatty):
    chat = CONVERSATION[1:3]
    tok, found = prepare([{"messages": chat}, {"messages": chat, "system": "Be brief."}], init_from=chatty)
    assert ["Be brief." in tok.decode(row["ids"]) for row in found].count(True) == 1


@pytest.mark.parametrize("what", ["a plain template", "a template", "an answer that is cut"])
def test_a_run_knows_which_tokens_end_an_answer(tmp_path, pretrained, chatty, what):
    """A base without a template gets a plain one. What is left of an answer that is cut ends in no such token."""
    row, base, end = {"messages": CONVERSATION}, pretrained("qwen3", True, "<think>"), "<|endoftext|>"
    if what == "a template":
        base, end = chatty, "<|im_end|>"
    if what == "an answer that is cut":
        row = {"prompt": "Why?", "completion": "<think>" + "Hm. " * 50}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 40)
    how = (*FAST, "--max_steps=1", f"--dataset={tmp_path / 'rows.jsonl'}", f"--out_dir={tmp_path / 'run'}")
    within("train_lm.py", *how, "--block_size=64", f"--init_from={base}")
    tok = AutoTokenizer.from_pretrained(tmp_path / "run")
    ends = GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id
    assert set(np.atleast_1d(ends)) == {tok.eos_token_id, tok.convert_tokens_to_ids(end)}
    if "messages" in row:
        shown = tok.apply_chat_template(CONVERSATION, tokenize=False)
        assert shown.count("Hello?") == 1 and shown.rstrip().endswith("Fine, and much." + end)


@pytest.mark.parametrize("answer", [" It is.", "<|yes|>"])
@pytest.mark.parametrize("around", ["$A", "<s> $A", "$A <|endoftext|>"])
def test_a_prompt_and_its_answer_are_one_text_that_ends_once(prepare, pretrained, around, answer):
    """Also where the tokenizer writes tokens around each text by itself; what it writes in front is not learned."""
    base = pretrained("llama", True, "<s>", "<|yes|>")
    writes_around(base, around)
    tok, (row,) = prepare([{"prompt": "How many?", "completion": answer}], init_from=base)
    begin = [tok.bos_token_id] if "<s>" in around else []
    answer_ids = tok(answer, add_special_tokens=False).input_ids
    prompt_ids = begin + tok("How many?", add_special_tokens=False).input_ids
    assert row["ids"].tolist() == [*prompt_ids, *answer_ids, tok.eos_token_id]
    assert row["labels"].tolist() == [-100] * len(prompt_ids) + [*answer_ids, tok.eos_token_id]


def test_no_space_comes_in_between_a_prompt_and_its_answer(prepare, pretrained):
    """Though the tokenizer begins each text with one, as SentencePiece does."""
    folder = pretrained("qwen3")
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(["</s>", "\u2581", *string.printable])}, []))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
    tok, (row,) = prepare([{"prompt": "How many?", "completion": "It is."}], init_from=folder)
    assert row["ids"].tolist() == tok("How many?It is.</s>").input_ids


HEADS = {"qwen3": {}, "gemma2": {"final_logit_softcapping": 2.0}, "granite": {"logits_scaling": 4.0}}


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_in_chunks_is_that_of_all_positions(pretrained, monkeypatch, kind):
    """A model whose logits are scaled is not computed in chunks, which would be another loss."""
    base, is_plain = pretrained(kind, **HEADS[kind]), kind != "granite"
    monkeypatch.setattr(train_lm, "init_from", str(base))
    model = train_lm.load_model(str(base))
    train_lm.check_model(model)
    assert model.can_chunk_loss == is_plain
    model.eval()
    ids = torch.randint(300, (3, 33), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[:, :20] = -100
    theirs = load(base, "")
    expected = torch.nn.functional.cross_entropy(theirs(x).logits.mT, y, reduction="sum")
    expected.backward()
    logits = mock.Mock(wraps=model.logits)
    monkeypatch.setattr(model, "logits", logits)
    monkeypatch.setattr(model.config, "vocab_size", 2**23)  # chunks of four positions
    loss = model(x, y, (y.flatten() != -100).nonzero()[:, 0])
    assert [len(call.args[0]) for call in logits.mock_calls] == ([4] * 9 if is_plain else [])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    for ours, other in zip(model.lm.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours.grad, other.grad, atol=1e-4)


def test_lora_goes_to_the_layers_that_are_named(tmp_path, pretrained, text_file):
    """Rank 16 beside two layers of q_proj (32 x 32) and v_proj (32 x 16)."""
    how = (*FAST, f"--dataset={text_file}", f"--out_dir={tmp_path}/run", "--max_steps=0", "--adapter=lora")
    within("train_lm.py", *how, f"--init_from={pretrained('qwen3')}", "--lora_targets=q_proj, v_proj")
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["trained_parameters"] == 2 * 16 * (32 + 32 + 32 + 16)


def test_rows_that_are_too_long_or_teach_nothing(prepare, pretrained):
    pairs = [("a b c d e f g h", "xyz"), ("p " * 90, "xyz"), ("p", "x " * 90), ("p", ""), ("p", None)]
    data = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    tok, found = prepare(data, init_from=pretrained("gpt2"), block_size=20)
    texts = sorted(learned(tok, row) for row in found)
    assert texts[1] == "xyz<|endoftext|>" and set(texts[0]) == {"x", " "} and len(found) == 2
    assert max(len(row["ids"]) for row in found) == 21


def test_the_loss_is_that_of_the_answers_and_they_are_learned_by_heart(tmp_path, pretrained):
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
