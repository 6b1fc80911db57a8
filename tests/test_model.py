"""
The model, against transformers' own NanoChatForCausalLM and against itself without a cache: logits, loss, gradients,
generation, and the sampling of tokens against closed forms; attention on a CPU in bf16 against torch's own, and Muon
against torch's own.
"""

import pytest
import torch
import torch.nn.functional as F

import train_diffusion
import train_lm
from train_lm import GPT, Shape, draw

SHAPES = [Shape(50, 32, 2, 4, 4, 32), Shape(50, 32, 3, 4, 2, 32), Shape(70, 16, 1, 6, 1, 24)]


def random_gpt(shape):
    torch.manual_seed(0)
    gpt = GPT(shape).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    return gpt


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(train_lm, "out_dir", str(tmp_path))
    gpt = random_gpt(shape)
    train_lm.write_config(shape, type("Tokenizer", (), {"eos_token_id": 0}))
    train_lm.save_file(gpt.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    x, y = torch.randint(shape.vocab_size, (2, 3, shape.block_size))
    y[0, :5] = -100
    assert (gpt(x) - theirs(x).logits).abs().max() < 1e-4
    gpt(x, y).backward()
    torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten(), reduction="sum").backward()
    for (name, ours), (_, other) in zip(gpt.named_parameters(), theirs.named_parameters()):
        assert torch.allclose(ours.grad, other.grad, atol=1e-3, rtol=1e-3), name


def test_every_change_of_the_model_makes_it_not_native():
    from transformers import NanoChatConfig

    shape = SHAPES[0]
    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "pad_token_id": None,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = NanoChatConfig(**fields, num_attention_heads=4, max_position_embeddings=32, rope_parameters=rope)
    assert train_lm.is_native(shape, config)
    for change in ({"final_logit_softcapping": 30.0}, {"hidden_act": "gelu"}, {"num_key_value_heads": 2}):
        changed = NanoChatConfig(**{**config.to_dict(), **change})
        assert not train_lm.is_native(shape, changed), change


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_generation_equals_uncached(shape):
    """Token by token, past the end of the context too, where the text goes on from its last half."""
    gpt = random_gpt(shape)
    prompt = [1, 2, 3, 4, 5]
    cached = [int(t) for t in gpt.generate([prompt], 3 * shape.block_size, temperature=0)]
    text, begin = list(prompt), 0
    for token in cached:
        if len(text) - begin > shape.block_size:
            begin = len(text) - shape.block_size // 2
        assert token == int(gpt(torch.tensor([text[begin:]]))[0, -1].argmax())
        text.append(token)


def test_prompts_of_different_lengths_do_not_touch_each_other():
    gpt = random_gpt(SHAPES[1])
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [8, 8, 8]]
    together = torch.stack(list(gpt.generate(prompts, 40, temperature=0)), dim=1).tolist()
    alone = [[int(t) for t in gpt.generate([p], 40, temperature=0)] for p in prompts[:1]]
    assert together[0] == alone[0]
    for prompt, tokens in zip(
        prompts, together
    ):  # the context of the shorter ones is the same until it is cut
        until = 32 - max(map(len, prompts))
        assert tokens[:until] == [int(t) for t in gpt.generate([prompt], until, temperature=0)]


def test_generation_stops_at_the_end_of_text():
    gpt = random_gpt(SHAPES[0])
    free = [int(t) for t in gpt.generate([[1]], 30, temperature=0)]
    end = free[4]
    first = free.index(end)
    assert [int(t) for t in gpt.generate([[1]], 30, temperature=0, eos=end)] == free[: first + 1]
    rows = torch.stack(list(gpt.generate([[1], [2]], 30, temperature=0, eos=end)), dim=1).tolist()
    assert set(rows[0][first:]) == {end}


def test_draw_follows_the_cut_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**how):
        how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
        return torch.bincount(draw(logits, rng=generator, **how), minlength=4) / len(logits)

    def close(a, b):
        return (a - torch.tensor(b)).abs().max() < 0.015  # four standard errors

    assert close(frequencies(), [0.5, 0.3, 0.15, 0.05])
    assert close(frequencies(top_k=2), [0.625, 0.375, 0, 0])
    assert close(frequencies(top_p=0.8), [0.625, 0.375, 0, 0])
    assert close(frequencies(top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert close(frequencies(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])
    assert close(frequencies(temperature=0), [1, 0, 0, 0])


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_in_bf16_is_that_of_torch(masked):
    """Values and gradients, with fewer heads of keys, next to torch's kernel in fp32, within bf16's 8 bits."""
    torch.manual_seed(0)
    shapes = ((2, 4, 48, 16), (2, 2, 48, 16), (2, 2, 48, 16))
    q, k, v, g = (torch.randn(shape).bfloat16() for shape in (*shapes, shapes[0]))
    key = torch.arange(48)  # the second row has eight tokens of padding on the left, which see nothing
    mask = (key <= key[:, None]) & (key >= torch.tensor([0, 8])[:, None, None, None]) if masked else None
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        y = train_lm.attend(*inputs, mask, 0.0)
        y = y[:, :, 8:]
        assert y.dtype == dtype
        y.backward(g[:, :, 8:].to(dtype))
        results.append([y, *(t.grad for t in inputs)])
    for ours, torchs in zip(*results):
        assert (ours.float() - torchs).abs().max() < 0.02 * torchs.abs().max()
    if not masked:
        theirs = F.scaled_dot_product_attention(
            *(t.float() for t in (q, k, v)), is_causal=True, enable_gqa=True
        )
        assert torch.equal(results[1][0], theirs[:, :, 8:])
        plain = train_diffusion.attend(q[:, :2], k, v)
        theirs = F.scaled_dot_product_attention(*(t.float() for t in (q[:, :2], k, v)))
        assert (plain.float() - theirs).abs().max() < 0.02 * theirs.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_on_a_cpu_loss_and_gradients_are_those_of_fp32(shape):
    """Within 5 %; and what runs through the blocks is in bf16, as are the norms."""
    gpt, dtypes = random_gpt(shape), set()
    for block in gpt.model.layers:
        block.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    x, y = torch.randint(shape.vocab_size, (2, 8, shape.block_size))
    results = []
    for bf16 in (False, True):
        gpt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = gpt(x, y)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    for exact, rough in zip(*results):
        assert rough.dtype == torch.float32
        assert (exact - rough).norm() < 0.05 * exact.norm()
    assert dtypes == {torch.float32, torch.bfloat16}
    vectors = torch.randn(40, 16).bfloat16()
    theirs = F.rms_norm(vectors.float(), (16,), eps=1e-6)
    assert train_lm.norm(vectors).dtype == torch.bfloat16
    assert (train_lm.norm(vectors) - theirs).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_that_of_torch(dtype):
    """In bf16, which torch's always is, bit for bit; in fp32 as close as bf16 is. Momentum and rate change."""
    torch.manual_seed(0)
    shapes = [(24, 24), (24, 96), (96, 24), (24, 24), (12, 24), (24, 96)]
    ours, theirs = (
        [torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in shapes] for _ in "ab"
    )
    a = train_lm.Muon(ours, 0.02, weight_decay=0.1, momentum=0.95, dtype=dtype)
    b = torch.optim.Muon(theirs, 0.02, weight_decay=0.1, momentum=0.95)
    for step in range(5):
        for optimizer in (a, b):
            optimizer.param_groups[0].update(momentum=0.85 + 0.02 * step, lr=0.02 + 0.01 * step)
        for x, y in zip(ours, theirs):
            x.grad = torch.randn(x.shape)
            y.grad = x.grad.clone()
        ours[4].grad = theirs[4].grad = None if step == 2 else ours[4].grad  # one has none for once
        a.step(), b.step()
    for x, y in zip(ours, theirs):
        assert torch.equal(x, y) if dtype == torch.bfloat16 else torch.allclose(x, y, atol=5e-3)


def test_gradient_checkpointing_changes_nothing():
    shape = Shape(50, 32, 2, 4, 2, 32, dropout=0.2)
    x, y = torch.randint(50, (2, 3, 32))
    grads = []
    for checkpointing in (False, True):
        gpt = random_gpt(shape).train()
        gpt.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        gpt(x, y).backward()
        grads.append([p.grad for p in gpt.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_dropout_is_off_in_evaluation_and_on_in_training():
    gpt = random_gpt(Shape(50, 32, 2, 4, 4, 32, dropout=0.5))
    x = torch.randint(50, (1, 32))
    assert torch.equal(gpt(x), gpt(x))
    gpt.train()
    assert not torch.equal(gpt(x), gpt(x))


def test_the_first_loss_is_that_of_a_uniform_guess():
    x, y = torch.randint(50, (2, 3, 32))
    assert GPT(SHAPES[0])(x, y).item() == pytest.approx(96 * torch.tensor(50.0).log().item(), rel=1e-6)
