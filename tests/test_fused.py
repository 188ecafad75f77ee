"""The fused operations of a CPU's training step are PyTorch's: values and gradients, at odd sizes, with any threads."""

import contextlib
import ctypes
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fused  # noqa: E402
from attention import attend  # noqa: E402
from model import GPT, GPTConfig, apply_rope  # noqa: E402
from parallel import checkpoint_activations  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-5
either_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


@pytest.fixture(autouse=True)
def library():
    if fused.library() is None:
        pytest.skip("no C++ compiler")


def randoms(*shapes, dtype=FP32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


def results(operation, inputs, backward=True, layout=torch.clone):
    """-> the outputs of operation(*inputs) and the gradients of the inputs, for random gradients of the outputs.
    layout(tensor): a copy of what goes in."""
    inputs = [layout(t).requires_grad_() for t in inputs]
    outputs = operation(*inputs)
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    if not backward:
        return [y.detach() for y in outputs]
    grads = randoms(*[y.shape for y in outputs], dtype=BF16, seed=1)  # the same numbers in each dtype
    torch.autograd.backward(outputs, [layout(g.to(y.dtype)) for g, y in zip(grads, outputs, strict=True)])
    return [y.detach() for y in outputs] + [t.grad for t in inputs]


def distance(a, b):
    """Length of the difference, relative to that of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check(operation, reference, inputs):
    """In fp32 1e-6 from the exact result, or where large scores lose digits, within twice PyTorch's own distance. In
    bfloat16 no further from it than PyTorch."""
    ours = results(operation, inputs)
    exact = results(reference, [t.double() for t in inputs])
    theirs = results(reference, inputs)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype == inputs[0].dtype and a.shape == c.shape
        if a.dtype == FP32:
            assert distance(a, c) < max(1e-6, 2 * distance(b, c))
        else:  # one rounding each: whose halves are the luckier ones is chance
            assert distance(a, c) <= 1.02 * distance(b, c) + 1e-12


# -----------------------------------------------------------------------------
# The operations, and PyTorch's


def rms_norm(x):
    return fused.rms_norm(x, EPS)


def plain_rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def plain_relu_squared(h):
    return F.relu(h).square()


def rotation(T, D):
    """Cosines and signed sines (T, 1, D) in fp32, as GPT.rope has them."""
    angle = torch.outer(torch.arange(T), torch.logspace(0, -2, D // 2))
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def plain_split_heads(qkv, n_q, n_kv, rope, eps, normalised):
    q, k, v = qkv.unflatten(-1, (n_q + 2 * n_kv, -1)).split((n_q, n_kv, n_kv), dim=2)
    if normalised:
        q, k = (F.rms_norm(x, x.shape[-1:], eps=eps) for x in (q, k))
    if rope:
        q, k = (apply_rope(x, *rope) for x in (q, k))
    return q, k, v


def plain_attention(q, k, v):
    T, D = q.shape[-2:]
    scores = (q @ k.mT) * D**-0.5
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


def plain_softmax_gradient(logits, targets, vocab_size, softcap):
    """In fp64 -> (losses, the gradient of their sum)"""
    logits = logits.double().requires_grad_()
    z = logits[:, :vocab_size]
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


# -----------------------------------------------------------------------------
# Values and gradients


@either_dtype
@pytest.mark.parametrize("shape", [(4, 2), (3, 5, 6), (1, 1, 16), (2, 3, 17), (7, 100), (2, 768)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # the first is as small as eps
def test_rms_norm(dtype, shape, scale):
    check(rms_norm, plain_rms_norm, randoms(shape, dtype=dtype, scale=scale))


def test_rms_norm_under_autocast_is_rounded_once_for_the_next_product():
    (x,) = randoms((3, 5, 40))
    exact = results(plain_rms_norm, [x.double()])
    with torch.autocast("cpu", BF16):
        y, gradient = results(rms_norm, [x])
    assert y.dtype == BF16 and torch.equal(y, results(rms_norm, [x])[0].to(BF16))
    assert gradient.dtype == FP32 and distance(gradient, exact[1]) < 1e-6
    with torch.autocast("cpu", BF16):
        y, gradient = results(lambda x: fused.rms_norm(x, EPS, FP32), [x])
    assert y.dtype == FP32 and distance(y, exact[0]) < 1e-6


@either_dtype
@pytest.mark.parametrize("shape", [(5,), (3, 5, 7), (2, 64)], ids=str)
def test_relu_squared(dtype, shape):
    check(fused.relu_squared, plain_relu_squared, randoms(shape, dtype=dtype))


@either_dtype
@pytest.mark.parametrize("n_q, n_kv, D", [(1, 1, 6), (4, 4, 16), (4, 2, 6), (3, 1, 34), (2, 2, fused.MOST_CHANNELS)])
@pytest.mark.parametrize("B, T", [(2, 7), (3, 1)])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_split_heads(dtype, n_q, n_kv, D, B, T, rotated, normalised):
    rope = rotation(T, D) if rotated else None
    arguments = n_q, n_kv, rope, EPS, normalised
    inputs = randoms((B, T, (n_q + 2 * n_kv) * D), dtype=dtype)
    check(lambda x: fused.split_heads(x, *arguments), lambda x: plain_split_heads(x, *arguments), inputs)


@either_dtype
@pytest.mark.parametrize("B, H, T, D", [(1, 1, 1, 6), (8, 2, 5, 6), (2, 3, 33, 16), (1, 2, 100, 40)])
@pytest.mark.parametrize("scale", [1.0, 8.0])  # with the second, weights below the smallest fp32
def test_causal_attention(dtype, B, H, T, D, scale):
    if T == 1:  # softmax of one score: the queries' and keys' gradients are 0
        q, k, v = randoms(*[(B, H, T, D)] * 3, dtype=dtype)
        y, gq, gk, gv = results(fused.causal_attention, [q, k, v])
        assert torch.equal(y, v) and not gq.any() and not gk.any()
        return
    check(fused.causal_attention, plain_attention, randoms(*[(B, H, T, D)] * 3, dtype=dtype, scale=scale))


def test_attention_with_the_most_keys():
    shape = (1, 1, fused.MOST_KEYS, 8)
    check(fused.causal_attention, plain_attention, randoms(*[shape] * 3))


def test_attention_under_autocast_takes_fp32():
    q, k, v = randoms(*[(2, 2, 9, 16)] * 3)
    with torch.autocast("cpu", BF16):
        outputs = results(fused.causal_attention, [q, k, v])
    rounded = results(fused.causal_attention, [q.to(BF16), k.to(BF16), v.to(BF16)])
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(outputs, rounded, strict=True))


def test_no_later_key_or_value_changes_an_output_or_a_gradient():
    """Exactly: its weight is 0, not small."""
    inputs = randoms(*[(2, 2, 20, 8)] * 3)
    before = fused.causal_attention(*(t.requires_grad_() for t in inputs))
    gradients = torch.autograd.grad(before[:, :, :11].sum(), inputs)
    others = [t.detach().clone() for t in inputs]
    for t in others:
        t[:, :, 11:] += 5
    after = fused.causal_attention(*(t.requires_grad_() for t in others))
    changed = torch.autograd.grad(after[:, :, :11].sum(), others)
    assert torch.equal(after[:, :, :11], before[:, :, :11])
    assert (after[:, :, 11:] != before[:, :, 11:]).any(-1).all()
    for a, b in zip(changed, gradients, strict=True):
        assert torch.equal(a[:, :, :11], b[:, :, :11]) and not a[:, :, 11:].any()


@either_dtype
@pytest.mark.parametrize("vocab_size, padded", [(50, 64), (64, 64), (1024, 1024), (1025, 1088), (2100, 2112)])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_softmax_gradient(dtype, vocab_size, padded, softcap, scale):
    """The padding counts for nothing, whatever it holds, and has no gradient."""
    (logits,) = randoms((6, padded), dtype=dtype, scale=scale)
    logits[:, vocab_size:] = torch.nan
    targets = torch.tensor([0, vocab_size - 1, 7, 31, 32, 3])
    logits[1, vocab_size - 1] = logits[1, :vocab_size].max()
    losses, gradient = plain_softmax_gradient(logits, targets, vocab_size, softcap)
    found = logits.clone()
    found_losses = fused.softmax_gradient_(found, targets, vocab_size, softcap)
    assert found_losses.dtype == FP32
    torch.testing.assert_close(found_losses.double(), losses, rtol=1e-6, atol=2e-6)
    assert not found[:, vocab_size:].any()
    torch.testing.assert_close(found[:, :vocab_size].double(), gradient[:, :vocab_size],
                               rtol=2.0**-8 if dtype == BF16 else 1e-4, atol=1e-6)


@either_dtype
@pytest.mark.parametrize("ahead", [8.0, 12.0])
def test_a_target_that_is_nearly_certain_keeps_the_digits_of_its_gradient(dtype, ahead):
    """probability - 1 is 1e-4 or less: rounding the probability first would lose all of it in bfloat16."""
    logits = torch.zeros(1, 64, dtype=dtype)
    logits[0, 5] = ahead
    exact = plain_softmax_gradient(logits, torch.tensor([5]), 60, 0.0)[1][0, 5].item()
    fused.softmax_gradient_(logits, torch.tensor([5]), 60, 0.0)
    assert -0.03 < exact < 0 and logits[0, 5].item() == pytest.approx(exact, rel=2.0**-8 if dtype == BF16 else 1e-3)


# -----------------------------------------------------------------------------
# Threads, strides, numbers that are none

HEADS = (3, 1, rotation(9, 6), EPS, True)
CASES = {  # name: (operation, PyTorch's, shapes of the inputs)
    "rms_norm": (rms_norm, plain_rms_norm, [(5, 9, 40)]),
    "relu_squared": (fused.relu_squared, plain_relu_squared, [(5, 9, 40)]),
    "split_heads": (lambda x: fused.split_heads(x, *HEADS), lambda x: plain_split_heads(x, *HEADS), [(2, 9, 30)]),
    "causal_attention": (fused.causal_attention, plain_attention, [(2, 3, 9, 16)] * 3),
}
each_operation = pytest.mark.parametrize("name", CASES)


@either_dtype
@each_operation
def test_another_number_of_threads_gives_the_same_bits(name, dtype, monkeypatch):
    operation, _, shapes = CASES[name]
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)  # what our loops ask for
        found.append(results(operation, randoms(*shapes, dtype=dtype)))
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_another_number_of_threads_gives_the_same_loss(monkeypatch):
    (logits,) = randoms((7, 2112))
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        gradient = logits.clone()
        found.append((fused.softmax_gradient_(gradient, torch.arange(7), 2100, 15.0), gradient))
    assert all(map(torch.equal, found[1], found[0])) and all(map(torch.equal, found[2], found[0]))


def scattered(t):
    """The same numbers, but not one after another in memory."""
    return torch.stack((t, t), -1)[..., 0]


@either_dtype
@each_operation
def test_numbers_that_lie_apart_in_memory_are_read_as_they_are(name, dtype):
    """Inputs and gradients."""
    operation, _, shapes = CASES[name]
    inputs = randoms(*shapes, dtype=dtype)
    assert not scattered(inputs[0]).is_contiguous()
    found = results(operation, inputs, layout=scattered)
    assert all(map(torch.equal, found, results(operation, inputs)))


@either_dtype
@each_operation
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_comes_out_where_pytorch_has_it(name, dtype, bad):
    """Else nobody would learn that the model broke."""
    operation, plain, shapes = CASES[name]
    inputs = randoms(*shapes, dtype=dtype)
    inputs[0].view(-1)[47] = bad
    forward_only = name == "causal_attention" and bad != torch.nan  # 0 times infinity: ours has 1e-38 for some 0
    ours, theirs = (results(f, inputs, backward=not forward_only) for f in (operation, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5 if dtype == FP32 else 0.05, atol=0.05)
        assert torch.equal(a.isfinite(), b.isfinite())


@either_dtype
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 3, 1040])  # 3 is the target
def test_a_loss_of_what_is_no_number(dtype, softcap, bad, place):
    (logits,) = randoms((3, 1088), dtype=dtype)
    logits[1, place] = bad
    targets = torch.tensor([3, 3, 3])
    losses, gradient = plain_softmax_gradient(logits, targets, 1050, softcap)
    found = logits.clone()
    found_losses = fused.softmax_gradient_(found, targets, 1050, softcap)
    torch.testing.assert_close(found_losses.double(), losses, equal_nan=True, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.double(), gradient, equal_nan=True, rtol=2.0**-8, atol=1e-6)


# -----------------------------------------------------------------------------
# Where the kernels serve


class Tagged(torch.Tensor):
    """A tensor of another class, as a DTensor is one."""


def test_where_they_do_not_serve(monkeypatch):
    x = torch.ones(4, requires_grad=True)
    assert fused.serves(x) and fused.serves(torch.ones(4, dtype=BF16, requires_grad=True))
    assert not fused.serves(torch.ones(4))  # no gradient to come
    with torch.no_grad():
        assert not fused.serves(x)
    for dtype in (torch.float16, torch.float64):
        assert not fused.serves(torch.ones(4, dtype=dtype, requires_grad=True))
    with torch.autocast("cpu", torch.float16):
        assert not fused.serves(x)
    assert not fused.serves(torch.ones(4, device="meta", requires_grad=True))
    assert not fused.serves(torch.ones(4).as_subclass(Tagged).requires_grad_())
    with FakeTensorMode():
        assert not fused.serves(torch.ones(4, requires_grad=True))
    monkeypatch.setattr(fused, "library", lambda: None)
    assert not fused.serves(x) and not fused.has_softmax_gradient(torch.ones(4, 4))


def test_torch_compile_fuses_on_its_own():
    @torch.compile(backend="eager", fullgraph=True)
    def served(x):
        return x * 2 if fused.serves(x) else x * 3

    x = torch.ones(4, requires_grad=True)
    assert fused.serves(x) and torch.equal(served(x), torch.full((4,), 3.0))


def test_attention_with_a_mask_dropout_or_shared_heads_is_pytorchs(monkeypatch):
    monkeypatch.setattr(fused.CausalAttention, "apply", lambda *heads: pytest.fail("the kernel has none of these"))
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in randoms(*[(1, 4, 9, 8)] * 3))
    attend(q, k, v, "math", dropout=0.5)
    attend(q, k[:, :, :2], v[:, :, :2], "math")
    long = [t.transpose(1, 2).requires_grad_() for t in randoms(*[(1, 1, fused.MOST_KEYS + 1, 2)] * 3)]
    attend(*long, "math")


def test_the_structure_is_that_of_the_source():
    """Eight bytes each, one of them a float and four bytes of padding, in the order of fused.cpp's."""
    source = fused.SOURCE.read_text(encoding="utf-8")
    body = source.partition("struct Heads {")[2].partition("};")[0]
    names = [name.split()[-1].lstrip("*") for line in body.split(";") if line.strip() for name in line.split(",")]
    assert names == [name for name, _ in fused.Heads._fields_]
    assert ctypes.sizeof(fused.Heads) == 8 * len(names)
    assert f"MOST = {fused.MOST_CHANNELS};" in source
    most = int(source.partition("constexpr int MOST_KEYS = ")[2].partition(";")[0])
    assert fused.MOST_KEYS <= most


# -----------------------------------------------------------------------------
# A whole model

STACK = dict(pos="rope", norm="rmsnorm_nogain", norm_embed=True, qk_norm="rms", activation="relu2", tie_weights=False,
             bias=False)
MODELS = {"stack": STACK, "GPT-2": {}, "grouped": {**STACK, "n_kv_head": 2, "logit_softcap": 15.0}}
USED = {"stack": {"RMSNorm", "ReluSquared", "SplitHeads", "CausalAttention"},
        "GPT-2": {"SplitHeads", "CausalAttention"}, "grouped": {"RMSNorm", "ReluSquared", "SplitHeads"}}


def build(name):
    torch.manual_seed(0)
    config = GPTConfig(block_size=17, vocab_size=83, n_layer=2, n_head=4, n_embd=24, attn="math", **MODELS[name])
    return GPT(config)


def autocast(dtype):
    return torch.autocast("cpu", BF16) if dtype == BF16 else contextlib.nullcontext()


def trained(name, dtype, steps=4):
    """-> the losses of a few steps of plain gradient descent, and all weights in one vector"""
    model = build(name)
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for step in range(steps):
        idx = torch.randint(83, (3, 18), generator=torch.Generator().manual_seed(step))
        with autocast(dtype):
            loss = model(idx[:, :-1], idx[:, 1:], loss_only=True)[1]
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_without_the_kernels(name, monkeypatch):
    """In fp32 to its rounding. In bfloat16 its weights end as near to those of fp32 as PyTorch's operations leave them,
    within a quarter: both are rounding."""
    used = set()
    for operation in (fused.RMSNorm, fused.ReluSquared, fused.SplitHeads, fused.CausalAttention):
        apply = operation.apply
        monkeypatch.setattr(operation, "apply", lambda *args, a=apply, o=operation: used.add(o.__name__) or a(*args))
    ours = {dtype: trained(name, dtype) for dtype in (FP32, BF16)}
    assert used == USED[name]
    monkeypatch.setattr(fused, "library", lambda: None)
    theirs = {dtype: trained(name, dtype) for dtype in (FP32, BF16)}
    start = torch.cat([p.detach().flatten() for p in build(name).parameters()])
    moved = theirs[FP32][1] - start
    assert ours[FP32][0] == pytest.approx(theirs[FP32][0], rel=1e-6)
    assert (ours[FP32][1] - theirs[FP32][1]).norm() < 1e-5 * moved.norm()
    errors = [(run[BF16][1] - theirs[FP32][1]).norm() / moved.norm() for run in (ours, theirs)]
    assert errors[0] < 1.25 * errors[1] < 0.1
    assert ours[BF16][0] == pytest.approx(theirs[FP32][0], rel=5e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_residual_stream_stays_fp32_under_autocast(name):
    model = build(name)
    streams = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, inputs, output: streams.extend((inputs[0], output)))
    idx = torch.zeros(2, 5, dtype=torch.long)
    with autocast(BF16):
        model(idx, idx, loss_only=True)
    assert {x.dtype for x in streams} == {FP32}


@either_dtype
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(kind, dtype):
    gradients = []
    for recompute in (False, True):
        model = build("stack")
        if recompute:
            checkpoint_activations(model, kind)
        idx = torch.randint(83, (3, 18), generator=torch.Generator().manual_seed(0))
        with autocast(dtype):
            loss = model(idx[:, :-1], idx[:, 1:], loss_only=True)[1]
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
