"""
Fine-tuning through the real commands, on tiny models of transformers and on a run of ours: whole, by LoRA and by P-tuning
they train, go on bit for bit, load in transformers and peft with the logits they had, speak and are merged. What is
learned from prompts, completions and conversations is what transformers' own masks and losses say it is.
"""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_MODEL, differences, forked, last_state, rows, run, start, within
from safetensors.torch import load_file, save_file
from test_resume import wait_for_step

import train_lm

FAST = ("--eval_batches=2", "--mixed_precision=no", "--batch_size=8", "--block_size=32", "--warmup_steps=2")
FAST += ("--max_steps=20", "--eval_interval=10", "--save_interval=10", "--log_interval=5", "--keep=last")
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


@pytest.fixture
def base(request, pretrained, ours):
    """The folder of the model that a test goes on from."""
    return {
        "qwen3": lambda: pretrained("qwen3", True, "<|im_start|>", "<|im_end|>"),
        "llama": lambda: pretrained("llama", False),
        "gpt2": lambda: pretrained("gpt2", True),
        "ours": lambda: ours,
    }[request.param]()


@pytest.fixture(scope="module")
def other_text(tmp_path_factory, text_file):
    """Another text than that of our own run."""
    path = tmp_path_factory.mktemp("other") / "text.txt"
    path.write_text(text_file.read_text().upper())
    return path


def load(folder, adapter):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    return (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(folder).eval()


def logits_of_checkpoint(out, adapter, x):
    """Of what the newest checkpoint holds, put on the base by its names."""
    settings = json.loads((out / "run.json").read_text())["settings"]
    state = last_state(out)["model"]
    if not any(name.startswith("lm.") for name in state):  # our own model
        gpt = train_lm.GPT(train_lm.Shape(**json.loads((out / "run.json").read_text())["model"])).eval()
        gpt.load_state_dict(state)
        return gpt(x)
    lm = train_lm.load_causal_lm(settings["init_from"], "fp32")
    if adapter:
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "virtual_tokens")
        lm = train_lm.add_adapter(lm, adapter, *(settings[name] for name in names))
    trained = {name for name, weight in lm.named_parameters(remove_duplicate=False) if weight.requires_grad}
    state = {name.removeprefix("lm."): weight for name, weight in state.items()}
    assert state.keys() == trained  # the adapter alone, or everything
    lm.load_state_dict(state, strict=False)
    return lm.eval()(input_ids=x).logits


@pytest.mark.parametrize("adapter", ["", "lora", "p_tuning"], ids=["whole", "lora", "p_tuning"])
@pytest.mark.parametrize("base", ["qwen3", "llama", "gpt2", "ours"], indirect=True)
def test_it_trains_goes_on_loads_speaks_and_merges(tmp_path, base, other_text, adapter):
    from transformers import AutoTokenizer

    before = {p: p.read_bytes() for p in base.iterdir() if p.is_file()}
    how = (
        f"--init_from={base}",
        f"--adapter={adapter}",
        f"--dataset={other_text}",
        *FAST,
        "--lora_dropout=0.1",
    )
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    within("train_lm.py", *how, f"--out_dir={unbroken}", "--learning_rate=0.01")
    shutil.copytree(unbroken, broken)  # as if it had been killed in the second half
    shutil.rmtree(broken / "checkpoints" / "step_00000020")
    within("train_lm.py", *how, f"--out_dir={broken}", "--learning_rate=0.01", "--resume=True")
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert not differences(last_state(unbroken), last_state(broken)) and rows(unbroken) == rows(broken)
    assert not differences(load_file(unbroken / weights), load_file(broken / weights))
    assert {p: p.read_bytes() for p in before} == before

    val = rows(unbroken, "val/loss")
    assert val[-1]["val/loss"] < val[0]["base/loss"] - 0.01
    if adapter != "p_tuning":
        assert val[0]["base/loss"] == val[0]["val/loss"]
    facts = json.loads((unbroken / "run.json").read_text())
    assert facts["summary"]["base/loss"] == val[0]["base/loss"]
    assert (facts["trained_parameters"] < facts["parameters"] / 2) == bool(adapter)

    model, tok = load(unbroken, adapter), AutoTokenizer.from_pretrained(unbroken)
    x = torch.tensor([tok("def __init__(self, prog)").input_ids])
    logits = model(input_ids=x).logits
    assert (logits - logits_of_checkpoint(unbroken, adapter, x)).abs().max() < (
        1e-4 if base.name == "run" else 1e-6
    )

    x = tok("def add", return_tensors="pt")
    theirs = model.generate(**x, max_new_tokens=8, do_sample=False)[0]
    greedy = ("--prompt=def add", "--temperature=0", "--max_new_tokens=8")
    for folder in (unbroken, unbroken / "checkpoints" / "step_00000020"):
        stdout, _ = within("sample.py", f"--out_dir={folder}", *greedy)
        assert stdout == tok.decode(theirs, skip_special_tokens=True) + "\n"
    if adapter != "lora":
        _, err = within("sample.py", f"--out_dir={unbroken}", f"--merge={tmp_path / 'merged'}", code=2)
        assert "has no LoRA adapter that could be merged" in err
    else:
        within("sample.py", f"--out_dir={unbroken}", f"--merge={tmp_path / 'merged'}")
        merged = load(tmp_path / "merged", "")
        x = torch.randint(290, (2, 30), generator=torch.Generator().manual_seed(0))
        assert (merged(x).logits - model(input_ids=x).logits).abs().max() < 1e-5
        assert merged.config.tie_word_embeddings == model.config.tie_word_embeddings
        assert type(merged) is type(model.get_base_model())
        assert within("sample.py", f"--out_dir={tmp_path / 'merged'}", *greedy)[0] == stdout


@pytest.mark.parametrize("targets", ["q_proj,embed_tokens", "lm_head"])
def test_lora_on_one_of_two_tied_matrices_survives_a_merge(tmp_path, pretrained, text_file, targets):
    """What is added to the embedding is not for the head: the merged model holds two matrices."""
    base = pretrained("llama", True)
    how = (
        f"--init_from={base}",
        "--adapter=lora",
        f"--lora_targets={targets}",
        f"--dataset={text_file}",
        *FAST,
    )
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'run'}", "--learning_rate=0.05")
    within("sample.py", f"--out_dir={tmp_path / 'run'}", f"--merge={tmp_path / 'merged'}")
    model, merged = load(tmp_path / "run", "lora"), load(tmp_path / "merged", "")
    x = torch.arange(60).view(2, 30)
    assert (model(input_ids=x).logits - load(base, "")(x).logits).abs().max() > 0.1
    assert (merged(x).logits - model(input_ids=x).logits).abs().max() < 1e-5


def test_a_run_knows_its_base_again(tmp_path, pretrained, text_file):
    base, other, out = pretrained("llama"), pretrained("llama"), tmp_path / "run"
    how = (
        "train_lm.py",
        "--adapter=lora",
        f"--dataset={text_file}",
        *FAST,
        f"--out_dir={out}",
        "--max_steps=10",
    )
    within(*how, f"--init_from={base}")
    for arguments, message in (
        ((f"--init_from={base}", "--lora_rank=8"), "lora_rank was 16, is 8"),
        ((f"--init_from={base}", "--too_long=drop"), "too_long was 'cut', is 'drop'"),
        ((f"--init_from={base}", "--base_dtype=bf16"), "base_dtype was 'fp32', is 'bf16'"),
        ((f"--init_from={base}", "--adapter=p_tuning"), "adapter was 'lora', is 'p_tuning'"),
        ((f"--init_from={other}",), "cannot resume with another model or optimizer (init_from was"),
    ):
        assert message in within(*how, *arguments, "--resume=True", code=2)[1]
    within("sample.py", f"--out_dir={out}")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    _, err = within(*how, f"--init_from={base}", "--resume=True", code=2)
    assert "have changed since it began" in err
    for folder in (out, out / "checkpoints" / "step_00000010"):
        _, err = within("sample.py", f"--out_dir={folder}", code=2)
        assert "have changed since" in err and "Traceback" not in err
    shutil.rmtree(base)
    _, err = within("sample.py", f"--out_dir={out}", code=2)
    assert f"{base} is no causal language model" in err


def test_two_processes_learn_from_rows_what_one_does(tmp_path, pretrained):
    """LoRA under DDP, over rows of all lengths: the same losses as one process has, in micro-batches or not."""
    data = [{"prompt": "ab " * (i % 13), "completion": "x" * (1 + i % 7)} for i in range(90)]
    data = write_rows(tmp_path / "r.jsonl", data)
    how = ("train_lm.py", f"--init_from={pretrained('qwen3')}", "--adapter=lora", f"--dataset={data}", *FAST)
    curves = []
    for name, processes, micro in (("one", 1, 8), ("two", 2, 2)):
        out = tmp_path / name
        more = f"--out_dir={out}", f"--micro_batch_size={micro}", "--val_fraction=0.3"
        (within if processes == 1 else forked)(*how, *more)
        curves.append([row["train/loss"] for row in rows(out, "train/loss")])
        curves.append([row["val/loss"] for row in rows(out, "val/loss")])
    assert curves[2] == pytest.approx(curves[0], rel=1e-3) and curves[3] == pytest.approx(curves[1], rel=1e-3)


def test_a_signal_stops_lora_which_then_goes_on(tmp_path, pretrained, text_file):
    """The same in processes of their own, stopped by SIGTERM, at a step that no interval names."""
    how = (
        "train_lm.py",
        f"--init_from={pretrained('qwen3')}",
        "--adapter=lora",
        f"--dataset={text_file}",
        *FAST,
    )
    how += ("--max_steps=100", "--save_interval=100", "--eval_interval=100")
    within(*how, f"--out_dir={tmp_path / 'unbroken'}")
    process = start(*how, f"--out_dir={tmp_path / 'run'}")
    wait_for_step(tmp_path / "run", 10, process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    run(*how, f"--out_dir={tmp_path / 'run'}", "--resume=True")
    assert not differences(last_state(tmp_path / "unbroken"), last_state(tmp_path / "run"))
    assert rows(tmp_path / "unbroken") == rows(tmp_path / "run")


def test_our_own_model_goes_on_where_it_was(tmp_path, ours, text_file):
    """The first evaluation of the new run is the last of the old one; all weights and the tokenizer are taken over."""
    how = (f"--init_from={ours}", f"--dataset={text_file}", *FAST, "--eval_batches=4", "--block_size=64")
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'run'}", "--max_steps=0")
    assert rows(tmp_path / "run")[0]["base/loss"] == min(r["val/loss"] for r in rows(ours, "val/loss"))
    assert (ours / "tokenizer.json").read_bytes() == (tmp_path / "run" / "tokenizer.json").read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in (ours, tmp_path / "run")]
    assert not differences(*weights)


@pytest.mark.parametrize("adapter", ["", "lora"])
def test_precision_is_that_of_the_settings_not_of_the_file(tmp_path, pretrained, text_file, adapter):
    base = pretrained("llama", True, dtype="bfloat16")
    how = (f"--init_from={base}", f"--adapter={adapter}", f"--dataset={text_file}", *FAST, "--max_steps=2")
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'run'}")
    assert all(weight.dtype == torch.float32 for weight in last_state(tmp_path / "run")["model"].values())
    if adapter:  # above a bf16 model as well
        within("train_lm.py", *how, f"--out_dir={tmp_path / 'half'}", "--base_dtype=bf16")
        assert all(
            weight.dtype == torch.float32 for weight in last_state(tmp_path / "half")["model"].values()
        )
    else:
        within("train_lm.py", *how, f"--out_dir={tmp_path / 'half'}", "--base_dtype=bf16")
        assert all(w.dtype == torch.bfloat16 for w in last_state(tmp_path / "half")["model"].values())


# -----------------------------------------------------------------------------
# Rows with answers
# -----------------------------------------------------------------------------
PAIRS = [
    ("What is two and two?", "It is four."),
    ("Name a colour.", "Blue is a colour, and so is green, which some people like better."),
    ("Say nothing more than yes, and say it in one word, without any other word around it.", "yes"),
]


def write_rows(path, values):
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return path


def prepare(monkeypatch, **values):
    """-> (tokenizer, {split: Rows}) of train_lm under these settings."""
    from transformers import AutoTokenizer

    defaults = {"val_fraction": 0.0, "test_fraction": 0.0, "block_size": 60, "batch_size": 4}
    for name, value in (defaults | values).items():
        monkeypatch.setattr(train_lm, name, value if isinstance(value, (int, float)) else str(value))
    folder, facts = train_lm.prepare_data()
    return AutoTokenizer.from_pretrained(folder), train_lm.load_tokens(folder, facts), facts


def test_the_loss_is_that_of_the_answers_tokens(tmp_path, pretrained, monkeypatch):
    """By hand: each row alone, unpadded, with the loss of transformers over the answer and the end of the text."""
    base = pretrained("qwen3", max_position_embeddings=200)
    data = write_rows(tmp_path / "rows.jsonl", [{"question": q, "answer": a} for q, a in PAIRS])
    columns = {"prompt_column": "question", "completion_column": "answer"}
    tok, splits, facts = prepare(monkeypatch, init_from=base, dataset=data, block_size=200, **columns)
    lm = train_lm.load_causal_lm(str(base), "fp32").double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    total, n = 0.0, 0
    for question, answer in PAIRS:
        q, a = tok(question).input_ids, [*tok(answer).input_ids, tok.eos_token_id]
        labels = torch.tensor([[-100] * len(q) + a])
        total += lm(torch.tensor([q + a]), labels=labels).loss.item() * len(a)
        n += len(a)
    assert facts["splits"]["train"]["tokens"] == n
    model = train_lm.Pretrained(lm, None)
    batch = splits["train"][[0, 1, 2]]
    assert batch[0].shape[0] == 3 and model(*batch).item() == pytest.approx(
        total, rel=1e-12
    )  # padded together
    alone = sum(model(*splits["train"][[i]]).item() for i in range(3))
    assert alone == pytest.approx(total, rel=1e-12)
    assert model(*batch[:2]).item() == pytest.approx(total, rel=1e-12)  # the head applied everywhere
    assert model.can_keep and len(batch[2]) < batch[0].shape[1]
    # through the command, which tells the loss of the same rows before the first step
    columns = [f"--{name}={value}" for name, value in columns.items()]
    data = write_rows(tmp_path / "val.jsonl", [{"question": q, "answer": a} for q, a in PAIRS])
    shutil.copy(data, tmp_path / "train.jsonl")
    (tmp_path / "rows.jsonl").unlink()
    how = (f"--init_from={base}", f"--dataset={tmp_path}", *columns, "--block_size=200", "--max_steps=0")
    monkeypatch.undo()
    within("train_lm.py", *how, f"--out_dir={tmp_path / 'run'}", "--mixed_precision=no")
    assert rows(tmp_path / "run")[0]["base/loss"] == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("adapter", ["", "lora", "p_tuning"])
def test_accumulation_over_ragged_rows_gives_the_gradient_of_one_big_batch(
    tmp_path, pretrained, monkeypatch, adapter
):
    from accelerate import Accelerator

    words = ["abcdefgh" * 3 + "xyz" * i for i in range(8)]
    data = write_rows(
        tmp_path / "r.jsonl", [{"prompt": w[: 9 - i], "completion": w[9 - i :]} for i, w in enumerate(words)]
    )
    base = pretrained("gpt2")
    _, splits, _ = prepare(monkeypatch, init_from=base, dataset=data, batch_size=8)
    lm = train_lm.load_causal_lm(str(base), "fp32")
    if adapter:
        lm = train_lm.add_adapter(lm, adapter, 4, 8.0, 0.0, "all-linear", 3)
    model = train_lm.Pretrained(lm.double().train(), None)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for weight in lm.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    accelerator, results = Accelerator(cpu=True), []
    torch.set_default_dtype(torch.float64)
    for micro in (8, 2, 1):
        batches = [splits["train"][list(range(i, i + micro))] for i in range(0, 8, micro)]
        widths = {x.shape[1] for x, _, _ in batches}
        loss = train_lm.forward_backward(accelerator, model, batches, 0)
        results.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
        model.zero_grad()
    torch.set_default_dtype(torch.float32)
    assert len(widths) == 8  # each row as wide as it is
    for loss, gradients in results[1:]:
        assert abs(loss - results[0][0]) < 1e-9
        assert all((g - results[0][1][n]).abs().max() < 1e-9 for n, g in gradients.items())


def test_gradient_checkpointing_changes_memory_alone(pretrained, monkeypatch):
    results = []
    for on in (False, True):
        monkeypatch.setattr(train_lm, "init_from", str(pretrained("qwen3")))
        monkeypatch.setattr(train_lm, "adapter", "lora")
        monkeypatch.setattr(train_lm, "block_size", 32)
        monkeypatch.setattr(train_lm, "gradient_checkpointing", on)
        model = train_lm.load_base()
        model.lm.base_model.requires_grad_(True)
        assert model.lm.is_gradient_checkpointing == on
        x = torch.arange(64).view(2, 32)
        model(x, x).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_eight_rows_are_learned_by_heart(tmp_path, pretrained):
    answers = [
        "red",
        "a blue whale",
        "forty-two",
        "no",
        "the sea\nand the land",
        "x = 1",
        "é à ü",
        "often, but not always",
    ]
    data = write_rows(
        tmp_path / "r.jsonl", [{"prompt": f"{i}?", "completion": a} for i, a in enumerate(answers)]
    )
    fractions = ("--val_fraction=0", "--test_fraction=0")
    how = (f"--init_from={pretrained('qwen3')}", f"--dataset={data}", *fractions, *FAST, "--max_steps=150")
    stdout, _ = within(
        "train_lm.py", *how, f"--out_dir={tmp_path / 'run'}", "--learning_rate=0.02", "--save_interval=150"
    )
    assert "8 rows" in stdout
    for i, answer in enumerate(answers):
        stdout, _ = within("sample.py", f"--out_dir={tmp_path / 'run'}", f"--prompt={i}?", "--temperature=0")
        assert stdout == f"{i}?{answer}\n"  # and it stops there


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "How are you, and what can you do?"},
    {"role": "assistant", "content": "Fine, and much."},
]


def learned_text(tok, rows, number=0):
    _, y, _ = rows.read([number])
    return tok.decode(y[0][y[0] != -100])


def test_the_assistants_tokens_are_those_that_transformers_marks(tmp_path, pretrained, monkeypatch):
    base = pretrained("qwen3", True, "<|im_start|>", "<|im_end|>")
    (base / "chat_template.jinja").write_text(CHATML)
    data = write_rows(tmp_path / "c.jsonl", [{"messages": CONVERSATION}, {"messages": CONVERSATION[1:3]}])
    tok, splits, _ = prepare(monkeypatch, init_from=base, dataset=data, block_size=200)
    for number, messages in enumerate((CONVERSATION, CONVERSATION[1:3])):
        marks = {"return_dict": True, "return_assistant_tokens_mask": True}
        theirs = tok.apply_chat_template(messages, **marks)
        x, y, _ = splits["train"].read([number])
        assert x[0].tolist() == theirs["input_ids"]  # all of them, since the last is only predicted
        learned = np.array(theirs["assistant_masks"], dtype=bool)
        # this template has no end-of-text token: one is learned at the end, or the model would never stop
        assert y[0][-1] == tok.eos_token_id
        assert y[0][:-1].tolist() == np.where(learned, theirs["input_ids"], -100)[1:].tolist()


QWEN = (  # writes the last answer with its thoughts, and those before without, as Qwen3 does
    "{% for m in messages %}{{ m.role }}: {% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_rewrites_the_past_gives_a_row_for_each_answer(tmp_path, pretrained, monkeypatch):
    base = pretrained("qwen3")
    (base / "chat_template.jinja").write_text(QWEN)
    data = write_rows(tmp_path / "c.jsonl", [{"messages": CONVERSATION}])
    tok, splits, _ = prepare(monkeypatch, init_from=base, dataset=data, block_size=200)
    assert len(splits["train"]) == 2
    for number, end in ((0, 3), (1, 5)):
        x, _, _ = splits["train"].read([number])
        shown = tok.apply_chat_template(CONVERSATION[: end - 1], tokenize=False, add_generation_prompt=True)
        answer = "<think></think>" + CONVERSATION[end - 1]["content"] + tok.eos_token
        assert tok.decode(x[0]) == shown + answer and learned_text(tok, splits["train"], number) == answer


def test_a_tokenizer_without_a_template_gets_one_and_chats(tmp_path, pretrained):
    """Learned by heart, a conversation of two turns is had again, history included; the answer's end is known."""
    data = write_rows(tmp_path / "c.jsonl", [{"messages": CONVERSATION[1:]}])
    fractions = ("--val_fraction=0", "--test_fraction=0", "--batch_size=1", "--block_size=100")
    base = pretrained("llama", max_position_embeddings=128)
    how = (f"--init_from={base}", f"--dataset={data}", *FAST, *fractions, "--max_steps=150")
    within(
        "train_lm.py", *how, f"--out_dir={tmp_path / 'run'}", "--learning_rate=0.01", "--save_interval=150"
    )
    lines = "".join(m["content"] + "\n" for m in CONVERSATION[1:] if m["role"] == "user")
    chat = ("sample.py", f"--out_dir={tmp_path / 'run'}", "--chat=True", "--temperature=0")
    stdout, _ = within(*chat, stdin=lines)
    assert [line.strip() for line in stdout.splitlines()] == ["Hi.", "Fine, and much."]
    stdout, err = within(*chat, stdin=lines * 4)  # more than fits
    assert "no longer fits" in err and len(stdout.splitlines()) == 8


def test_special_tokens_of_the_tokenizer_count(tmp_path, pretrained, monkeypatch):
    """Two tokenizers that differ in them alone share no cache; a chat begins as a text does; a text may spell them."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    base = pretrained("llama", True, "<s>")
    tok = AutoTokenizer.from_pretrained(base, bos_token="<s>")
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.bos_token_id)])
    tok.backend_tokenizer.post_processor = begin
    tok.save_pretrained(base)
    pair = {"prompt": "one", "completion": "two<|endoftext|>three"}
    data = write_rows(tmp_path / "r.jsonl", [pair])
    _, splits, _ = prepare(monkeypatch, init_from=base, dataset=data)
    x, _, _ = splits["train"].read([0])
    assert tok.decode(x[0]) == "<s>onetwo<|endoftext|>three"
    assert learned_text(tok, splits["train"]) == "two<|endoftext|>three<|endoftext|>"
    chat = write_rows(tmp_path / "c.jsonl", [{"messages": CONVERSATION[1:3]}])
    _, splits, _ = prepare(monkeypatch, init_from=base, dataset=chat)
    assert tok.decode(splits["train"].read([0])[0][0]).startswith("<s>user: Hello?")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "!"}))
    _, splits, _ = prepare(monkeypatch, init_from=base, dataset=data)
    assert learned_text(tok, splits["train"]) == "two<|endoftext|>three!"


def test_silence_is_not_learned(tmp_path, pretrained, monkeypatch):
    silent = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " "}]
    data = write_rows(tmp_path / "c.jsonl", [{"messages": CONVERSATION[1:3]}, {"messages": silent}])
    _, splits, facts = prepare(monkeypatch, init_from=pretrained("qwen3"), dataset=data)
    assert len(splits["train"]) == facts["splits"]["train"]["without_answer"] == 1


def test_an_edited_script_leaves_a_model_of_transformers_what_it_is(tmp_path, pretrained, text_file):
    how = (
        f"--init_from={pretrained('qwen3')}",
        f"--dataset={text_file}",
        *FAST,
        f"--out_dir={tmp_path / 'run'}",
    )
    within("train_lm.py", *how, "--keep=best", "--max_steps=10")
    (tmp_path / "train_lm.py").write_text((ROOT / "train_lm.py").read_text() + "# a comment\n")
    worse = (
        "--learning_rate=9",
        "--max_steps=20",
        "--resume=True",
        "--keep=best",
    )  # no weights are kept again
    within(tmp_path / "train_lm.py", *how, *worse)
    load(tmp_path / "run", "")


def test_rows_that_are_too_long_or_teach_nothing_are_counted(tmp_path, pretrained, monkeypatch):
    base = pretrained("gpt2")
    pairs = [("a b c d e f g h", "xyz"), ("p " * 90, "xyz"), ("p", "x " * 90), ("p", ""), ("p", None)]
    data = write_rows(tmp_path / "r.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    for too_long, cut, dropped in (("cut", 1, 1), ("drop", 0, 2)):
        tok, splits, facts = prepare(
            monkeypatch, init_from=base, dataset=data, too_long=too_long, block_size=20
        )
        n = facts["splits"]["train"]
        assert (n["documents"], n["without_answer"]) == (5, 2)
        assert (n["too_long_cut"], n["too_long_dropped"]) == (cut, dropped)
        assert len(splits["train"]) == 3 - dropped
        for number in range(len(splits["train"])):
            x, _, _ = splits["train"].read([number])
            assert x.shape[1] <= 20 and learned_text(tok, splits["train"], number) == "xyz<|endoftext|>"
            assert (
                x[0][0] == tok(pairs[number][0]).input_ids[0]
            )  # the begin-of-text token of those that have one


def test_pieces_are_tokenized_as_a_chat_will_see_them(pretrained):
    """As one text where no token reaches over a seam, else piece by piece: never with a token of both."""
    from transformers import AutoTokenizer

    core = AutoTokenizer.from_pretrained(pretrained("gpt2")).backend_tokenizer
    for pieces in (["def ", "add(self)"], ["def", "ault"], ["é", "à ü"], ["", "x"], ["in", "\n", " the end"]):
        encoded = core.encode("".join(pieces), add_special_tokens=False)
        parts = train_lm.encode_row(core, encoded, [(piece, True) for piece in pieces])
        assert [core.decode(part) for part in parts] == pieces
        if parts[0] == core.encode(pieces[0]).ids and sum(parts, []) == encoded.ids:
            continue
        assert parts == [core.encode(piece).ids for piece in pieces]


@pytest.mark.parametrize("n, B", [(8, 8), (37, 8), (5, 8), (64, 4), (700, 2)])
def test_the_order_of_rows_is_a_function_of_seed_and_number(tmp_path, n, B):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 60, n)
    starts = np.cumsum(lengths) - lengths
    np.save(tmp_path / "train.rows.npy", np.stack([starts, lengths, np.full(n, 2)], axis=1))
    np.arange(lengths.sum(), dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.ones(lengths.sum(), dtype=np.uint8).tofile(tmp_path / "train.learned")

    def make(seed):
        return train_lm.Rows(tmp_path / "train.bin", np.uint16, 60, seed, B, True)

    data, again = make(3), make(3)
    epochs = [data.find(list(range(e * n, (e + 1) * n))) for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n <= B or epochs[0] != epochs[1]
    for numbers in ([3], [n + 2, n - 1, 2 * n], [0]):  # whatever was asked before, across epochs too
        assert again.find(numbers) == [epochs[i // n][i % n] for i in numbers]
    assert n <= B or make(4).find(list(range(n))) != epochs[0]
    ends = [lengths[epoch[-B:]].mean() for epoch in epochs]
    assert n < 64 or min(ends) < 55  # no epoch has to end on its longest rows
    padded = dealt = 0
    everything = list(itertools.chain(*epochs))
    for i in range(0, 3 * n - B, B):  # the batches of the steps, those across epochs too
        batch = lengths[everything[i : i + B]]
        padded += batch.max() * B
        dealt += batch.sum()
    assert n < 64 or dealt / padded > 0.85  # of what the model sees, little is padding
    assert data.count(list(range(n))) == (lengths - 1).sum()
