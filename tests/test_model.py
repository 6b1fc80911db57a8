"""
The model, against transformers' own NanoChatForCausalLM, against itself without a cache and, in bf16, against
itself in fp32; the sampling of tokens against closed forms; Muon against torch's own; no tensor left on the
CPU and no graph break, which a GPU would meet first.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import train_diffusion
import train_lm
from train_lm import generate

SHAPES = [(32, 2, 4, 4, 32), (32, 3, 4, 2, 32), (16, 1, 6, 1, 24)]


def make(shape, vocab=50, end=0):
    """A GPT of this shape with random weights, as the settings would make it."""
    names = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(names, shape):
            patch.setattr(train_lm, name, value)
        gpt = train_lm.make_gpt(vocab, end).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    return gpt


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape):
    """In fp32 closely, in bf16 as far as its 8 bits go."""
    from transformers import NanoChatForCausalLM

    gpt = make(shape)
    theirs = NanoChatForCausalLM(gpt.config)
    theirs.load_state_dict(gpt.state_dict())
    x, y = torch.randint(50, (2, 8, shape[0]))
    y[0, :5] = -100
    assert (gpt(x) - theirs(x).logits).abs().max() < 1e-4
    expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten(), reduction="sum")
    expected.backward()
    for bf16, tolerance in (False, 1e-4), (True, 0.05):
        gpt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = gpt(x, y)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        for (name, ours), (_, other) in zip(gpt.named_parameters(), theirs.named_parameters(), strict=True):
            assert ours.grad.dtype == torch.float32
            assert (ours.grad - other.grad).norm() < tolerance * other.grad.norm(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_generation_equals_uncached(shape):
    """Token by token, past the end of the context too, where the text goes on from its last half."""
    gpt = make(shape)
    text, begin = [1, 2, 3, 4, 5], 0
    for token in generate(gpt, text, 1, 3 * shape[0], temperature=0):
        if len(text) - begin > shape[0]:
            begin = len(text) - shape[0] // 2
        assert int(token) == int(gpt(torch.tensor([text[begin:]]))[0, -1].argmax())
        text.append(int(token))


def test_several_texts_and_the_end_of_text():
    gpt = make(SHAPES[0])
    free = [int(t) for t in generate(gpt, [1], 1, 30, temperature=0)]
    first = free.index(free[4])
    assert [int(t) for t in generate(gpt, [1], 1, 30, temperature=0, eos=[free[4]])] == free[: first + 1]
    rows, again = (torch.stack(list(generate(gpt, [1], 3, 30, seed=1, eos=[7])), dim=1) for _ in "ab")
    assert torch.equal(rows, again) and len({tuple(row) for row in rows.tolist()}) == 3


def test_sampling_follows_the_cut_distribution():
    class Dice(torch.nn.Linear):
        context = 1

        def forward(self, idx, cache):
            return torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(len(idx), 1, 4)

    def close(expected, temperature=1.0, top_k=0, top_p=1.0):
        tokens = next(generate(Dice(1, 1), [0], 20000, 1, temperature, top_k, top_p))
        found = torch.bincount(tokens, minlength=4) / len(tokens)
        return (found - torch.tensor(expected)).abs().max() < 0.015  # four standard errors

    assert close([0.5, 0.3, 0.15, 0.05])
    assert close([0.625, 0.375, 0, 0], top_k=2)
    assert close([0.625, 0.375, 0, 0], top_p=0.8)
    assert close([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], top_p=0.81)
    assert close([0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365], temperature=0.5)
    assert close([1.0, 0, 0, 0], temperature=0)


def test_attention_of_pictures_in_bf16_is_that_of_torch():
    torch.manual_seed(0)
    block, x = train_diffusion.Block(), torch.randn(2, 48, train_diffusion.n_embd)
    theirs = block.attention(x)
    ours = block.bfloat16().attention(x.bfloat16())
    assert (ours.float() - theirs).abs().max() < 0.03 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_that_of_torch(dtype):
    """In bf16, which torch's always is, bit for bit; in fp32 as close as bf16 is. Momentum, rate change."""
    torch.manual_seed(0)
    shapes = [(24, 24), (24, 96), (96, 24), (24, 24), (12, 24), (24, 96)]
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [x.clone() for x in ours]
    a = train_lm.Muon(ours, dtype, lr=0.02, weight_decay=0.1, momentum=0.95)
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


def test_gradient_checkpointing_and_dropout(monkeypatch):
    gpt, grads = make(SHAPES[1]).train(), []
    monkeypatch.setattr(train_lm, "dropout", 0.2)
    x, y = torch.randint(50, (2, 3, 32))
    for checkpointing in (False, True):
        monkeypatch.setattr(train_lm, "gradient_checkpointing", checkpointing)
        gpt.zero_grad()
        torch.manual_seed(1)
        gpt(x, y).backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert not torch.equal(gpt(x), gpt(x)) and torch.equal(gpt.eval()(x), gpt(x))


def test_no_tensor_is_left_on_the_cpu():
    """Forward, backward and a step with a cache, on a device that refuses to meet tensors of another."""
    with FakeTensorMode(), torch.device("meta"):
        gpt = make(SHAPES[1]).train()
        x = torch.zeros(2, 32, dtype=torch.int64)
        gpt(x, x).backward()
        gpt.eval()(x[:, :8], cache=(cache := {}))
        assert gpt(x[:, 8:9], cache=cache).shape == (2, 1, 50)


def test_a_cached_step_takes_the_transposed_output_of_cudas_fp32_kernel(monkeypatch):
    kernel, (q, k, v) = F.scaled_dot_product_attention, torch.randn(3, 1, 6, 5, 8)
    expected = train_lm.attend(q[:, :, -1:], k[:, :2], v[:, :2], 0.0)
    other = lambda *args, **kwargs: kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    assert torch.equal(train_lm.attend(q[:, :, -1:], k[:, :2], v[:, :2], 0.0), expected)


def test_a_training_step_has_no_graph_break():
    x = torch.zeros(2, 32, dtype=torch.int64)
    found = torch._dynamo.explain(make(SHAPES[1]).train())(x, x)
    assert found.graph_break_count == 0 and found.graph_count == 1
