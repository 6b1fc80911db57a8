"""
The model, against transformers' own NanoChatForCausalLM, against itself without a cache and, in bf16, against fp32; the
sampling of tokens against closed forms; attention and Muon against torch's own; no tensor left on the CPU and no graph
break, which a GPU would meet first.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models
from torch._subclasses.fake_tensor import FakeTensorMode

import train_diffusion
import train_lm
from train_lm import generate

SHAPES = [(32, 2, 4, 4, 32), (32, 3, 4, 2, 32), (16, 1, 6, 1, 24)]
NAMES = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd")


def make(shape):
    """A GPT of this shape with random weights, as the settings would make it; token 0 ends a text."""
    core = Tokenizer(models.WordLevel({str(i): i for i in range(50)}))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lm, "tokenizer", "char")  # whose vocabulary is not padded
        for name, value in zip(NAMES, shape):
            patch.setattr(train_lm, name, value)
        gpt = train_lm.make_gpt(tok).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    return gpt


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape):
    gpt = make(shape)
    theirs = transformers.NanoChatForCausalLM(gpt.config)
    theirs.load_state_dict(gpt.state_dict())
    x, y = torch.randint(50, (2, 8, shape[0]))
    y[0, :5] = -100
    learned = (y.flatten() != -100).nonzero()[:, 0]
    assert (gpt(x) - theirs(x).logits).abs().max() < 1e-4
    expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten(), reduction="sum")
    expected.backward()
    for bf16, positions, tolerance in (False, None, 1e-4), (False, learned, 1e-4), (True, None, 0.05):
        gpt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = gpt(x, y, positions)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        for (name, ours), (_, other) in zip(gpt.named_parameters(), theirs.named_parameters(), strict=True):
            assert ours.grad.dtype == torch.float32
            assert (ours.grad - other.grad).norm() < tolerance * other.grad.norm(), name


@pytest.mark.parametrize("T", [1, 7, 512, 600])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_attention_is_that_of_torch(T, n_kv_head):
    """On a CPU, texts of 2 to 512 tokens take another way. Gradients too; bf16 is compared with fp32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, T, 8) for n in (4, n_kv_head, n_kv_head))

    def compute(attention, dtype=torch.float32, **options):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = attention(*inputs, **options)
        assert y.dtype == dtype
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    expected = compute(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    for dtype, tolerance in (torch.float32, 1e-5), (torch.bfloat16, 0.05):
        found = compute(train_lm.attention, dtype, dropout_p=0.0)
        for x, y in zip(found, expected):
            # For a single token, the gradients of q and k are 0, up to rounding.
            assert (x - y).abs().max() <= tolerance * y.abs().max() + 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_generation_equals_uncached(shape):
    """Token by token, past the end of the context too, where the text goes on from its last half."""
    gpt = make(shape)
    gpt.generation_config.eos_token_id = None
    text = [1, 2, 3, 4, 5]
    begin = 0
    for token in generate(gpt, text, 1, 3 * shape[0], 50, temperature=0):
        if len(text) - begin > shape[0]:
            begin = len(text) - shape[0] // 2
        expected = gpt(torch.tensor([text[begin:]]))[0, -1].argmax()
        assert token.item() == expected.item()
        text.append(token.item())
    assert len(text) == 5 + 3 * shape[0]


def test_several_texts_and_the_end_of_text():
    """One text ends at any of the model's ends; several go on until all have ended, and differ."""
    gpt = make(SHAPES[0])

    def continuations(n, ends, **options):
        gpt.generation_config.eos_token_id = ends
        return torch.stack(list(generate(gpt, [1], n, 30, 50, **options)), dim=1).tolist()

    free = continuations(1, None, temperature=0)[0]
    first = free.index(free[4])
    assert len(free) == 30
    assert continuations(1, free[4], temperature=0)[0] == free[: first + 1]
    assert continuations(1, [49, free[4]], temperature=0)[0] == free[: first + 1]
    rows = continuations(3, [7], seed=1)
    assert rows == continuations(3, [7], seed=1)
    assert len({tuple(row) for row in rows}) == 3
    assert len(rows[0]) == max(row.index(7) + 1 if 7 in row else 30 for row in rows)


class Dice(torch.nn.Linear):
    """A model that always says the same. The last two of its ids are padding, and the likeliest."""

    context = 1
    config = transformers.PretrainedConfig(vocab_size=6)
    generation_config = transformers.GenerationConfig()

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, idx, cache):
        probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 9.0, 8.0])
        return probabilities.log().expand(len(idx), 1, 6)


@pytest.mark.parametrize(
    "expected, options",
    [
        ([0.5, 0.3, 0.15, 0.05], {}),
        ([0.625, 0.375, 0, 0], {"top_k": 2}),
        ([0.625, 0.375, 0, 0], {"top_p": 0.8}),
        ([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], {"top_p": 0.81}),
        ([0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365], {"temperature": 0.5}),
        ([1.0, 0, 0, 0], {"temperature": 0}),
    ],
)
def test_sampling_follows_the_cut_distribution_and_never_gives_padding(expected, options):
    tokens = next(generate(Dice(), [0], 20000, 1, 4, **options))
    counts = torch.bincount(tokens, minlength=4)
    assert len(counts) == 4
    assert (counts / 20000 - torch.tensor(expected)).abs().max() < 0.015  # four standard errors
    with pytest.raises(SystemExit):  # a prompt with an id that the model does not have
        next(generate(Dice(), [6], 1, 1, 4))


@pytest.mark.parametrize("T", [48, 512, 600])
def test_attention_of_images_is_that_of_torch(T):
    """On a CPU, images of up to 512 tokens take another way. Gradients too; bf16 is compared with fp32."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, T, 8)

    def compute(attention, dtype=torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = attention(*inputs)
        assert y.dtype == dtype
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    expected = compute(F.scaled_dot_product_attention)
    for dtype, tolerance in (torch.float32, 1e-5), (torch.bfloat16, 0.05):
        found = compute(train_diffusion.attention, dtype)
        for x, y in zip(found, expected):
            # For a single token, the gradients of q and k are 0, up to rounding.
            assert (x - y).abs().max() <= tolerance * y.abs().max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_that_of_torch(dtype):
    """In bf16, which torch's always is, bit for bit; in fp32 as close as bf16 is. Momentum and rate change."""
    torch.manual_seed(0)
    shapes = [(24, 24), (24, 96), (96, 24), (24, 24), (12, 24), (24, 96)]
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [x.clone() for x in ours]
    optimizers = [
        train_lm.Muon(ours, dtype, lr=0.02, weight_decay=0.1, momentum=0.95),
        torch.optim.Muon(theirs, 0.02, weight_decay=0.1, momentum=0.95),
    ]
    for step in range(5):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn(x.shape)
            y.grad = x.grad.clone()
        if step == 2:  # one has no gradient for once
            ours[4].grad = None
            theirs[4].grad = None
        for optimizer in optimizers:
            optimizer.param_groups[0].update(momentum=0.85 + 0.02 * step, lr=0.02 + 0.01 * step)
            optimizer.step()
    tolerance = 0 if dtype == torch.bfloat16 else 5e-3
    assert all((x - y).abs().max() <= tolerance for x, y in zip(ours, theirs))


def test_gradient_checkpointing_and_dropout(monkeypatch):
    gpt = make(SHAPES[1]).train()
    monkeypatch.setattr(train_lm, "dropout", 0.2)
    x, y = torch.randint(50, (2, 3, 32))
    grads = []
    for checkpointing in (False, True):
        monkeypatch.setattr(train_lm, "gradient_checkpointing", checkpointing)
        gpt.zero_grad()
        torch.manual_seed(1)
        gpt(x, y).backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert not torch.equal(gpt(x), gpt(x))
    gpt.eval()
    assert torch.equal(gpt(x), gpt(x))


def test_no_tensor_is_left_on_the_cpu(monkeypatch):
    """Forward, backward and a step with a cache, on a device that refuses to meet tensors of another."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # it does not know "meta"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        gpt = make(SHAPES[1]).train()
        x = torch.zeros(2, 32, dtype=torch.int64)
        gpt(x, x).backward()
        gpt(x, x, torch.arange(64)).backward()
        gpt.eval()
        cache = {}
        gpt(x[:, :8], cache=cache)
        assert gpt(x[:, 8:9], cache=cache).shape == (2, 1, 50)


def test_a_training_step_has_no_graph_break(monkeypatch):
    """Neither by the attention of short texts on a CPU, nor by torch's own, nor by checkpointing."""
    for checkpointing, T in (False, 32), (False, 600), (True, 32):
        monkeypatch.setattr(train_lm, "gradient_checkpointing", checkpointing)
        torch._dynamo.reset()
        x = torch.zeros(1, T, dtype=torch.int64)
        learned = torch.arange(T)
        found = torch._dynamo.explain(make((600, 2, 2, 1, 16)).train())(x, x, learned)
        assert found.graph_count == 1
