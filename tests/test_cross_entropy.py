"""The fused loss is the loss: value and gradients against float64, its memory, and how torch.compile sees it."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import run_and_get_code

from benchmarks.common import forget_peak
from cross_entropy import (
    PIECE,
    compiled,
    fused_logits_to_gradient_,
    linear_cross_entropy,
    logits_to_gradient_,
    loss_and_gradients,
    rows_at_once,
)
from device import memory_gb
from model import GPT, GPTConfig

N, C, VOCAB, PADDED = 100, 32, 1000, 1024
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
needs_clear_refs = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory cannot be reset")


def tensors(dtype=torch.float32, N=N):
    """Hidden states, a table and targets, of which every seventh is -1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    table = (torch.randn(PADDED, C, generator=generator) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (N,), generator=generator)
    targets[::7] = -1
    return x, table, targets


def whole(x, table, targets, softcap=0.0):
    """The summed loss by whole logits."""
    logits = (x @ table.T)[:, :VOCAB]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def with_gradients(loss, x, table):
    x.grad = table.grad = None
    (loss / 37).backward()
    return loss.detach(), x.grad, table.grad


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("rows", [1, 30, 64, 99, 100, 1000])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_loss_and_gradients_are_those_of_float64(softcap, rows):
    x, table, targets = tensors()
    piece = rows * PADDED * (2 if softcap else 1)
    assert rows_at_once(PADDED, "cpu", softcap, piece) == rows
    found = with_gradients(linear_cross_entropy(x, table, targets, VOCAB, softcap, piece=piece), x, table)
    x, table = x.detach().double().requires_grad_(), table.detach().double().requires_grad_()
    expected = with_gradients(whole(x, table, targets, softcap), x, table)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 1e-6
    assert (found[1][::7] == 0).all()  # nothing to predict there
    assert (found[2][VOCAB:] == 0).all()  # no tokens


@needs_compiler
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_compiled_it_is_the_same(softcap):
    x, table, targets = tensors()
    expected = with_gradients(linear_cross_entropy(x, table, targets, VOCAB, softcap, piece=30 * PADDED), x, table)

    def loss(x, table, targets):
        return linear_cross_entropy(x, table, targets, VOCAB, softcap, piece=30 * PADDED)

    def fused(x, table, targets):
        return linear_cross_entropy(x, table, targets, VOCAB, softcap, fuse=True, piece=30 * PADDED)

    ways = [torch.compile(loss, fullgraph=True), fused, torch.compile(fused, fullgraph=True)]
    for way in (way(x, table, targets) for way in ways):
        for one, other in zip(with_gradients(way, x, table), expected, strict=True):
            assert distance(one, other) < 1e-6


@pytest.mark.parametrize("fuse", [False, pytest.param(True, marks=needs_compiler)])
def test_under_autocast_products_are_in_bfloat16_and_the_rest_in_float32(fuse):
    x, table, targets = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, table, targets, VOCAB, fuse=fuse, piece=30 * PADDED)
    found = with_gradients(loss, x, table)
    assert {t.dtype for t in found} == {torch.float32}
    short = [t.detach().bfloat16().double().requires_grad_() for t in (x, table)]
    expected = with_gradients(whole(*short, targets), *short)
    assert distance(found[0], expected[0]) < 1e-3  # logits have 8 bits
    assert distance(found[1], expected[1]) < 1e-2
    assert distance(found[2], expected[2]) < 1e-2


def test_a_table_in_bfloat16_adds_its_pieces_in_float32():
    x, table, targets = tensors(torch.bfloat16)
    found = with_gradients(linear_cross_entropy(x, table, targets, VOCAB, piece=2 * PADDED), x, table)  # 50 pieces
    assert found[1].dtype == found[2].dtype == torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in (x, table)]
    expected = with_gradients(whole(*exact, targets), *exact)
    assert distance(found[2], expected[2]) < 3.5e-3  # rounded once; added up in bfloat16 it is 5.0e-3


def test_a_second_backward_pass_is_refused():
    """The first one scales the gradients in place: a second one would scale them again."""
    x, table, targets = tensors()
    loss = linear_cross_entropy(x, table, targets, VOCAB) / 37
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_loss_of_the_largest_logits_is_finite():
    x, table, targets = tensors()
    with torch.no_grad():
        table[:VOCAB] *= 1000
    found = with_gradients(linear_cross_entropy(x, table, targets, VOCAB), x, table)
    assert all(t.isfinite().all() for t in found)
    assert found[0] > 100 * N  # e^-100 is no float32


def test_without_a_gradient_none_is_made():
    x, table, targets = tensors()
    expected = linear_cross_entropy(x, table, targets, VOCAB)
    with torch.no_grad():
        found = linear_cross_entropy(x, table, targets, VOCAB)
    assert torch.equal(found, expected) and not found.requires_grad
    _, grad_x, grad_table = loss_and_gradients(x, table, targets, VOCAB, 0.0, torch.float32, False, False, 0)
    assert grad_x.numel() == grad_table.numel() == 0


def test_log_softmax_in_place_is_log_softmax():
    """Which PyTorch does not promise."""
    x = torch.randn(50, 50304) * 10
    expected = F.log_softmax(x, -1)
    torch.log_softmax(x, -1, out=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_says_the_same(dtype, softcap, compile):
    """Whatever is read of the logits is read before it is overwritten."""
    logits = (torch.randn(100, PADDED) * 5).to(dtype)
    targets, counts = torch.randint(VOCAB, (100,)), torch.rand(100) > 0.2
    ours, theirs = logits.clone(), logits.clone()
    expected = logits_to_gradient_(ours, targets, counts, VOCAB, softcap)
    found = (compiled() if compile else fused_logits_to_gradient_)(theirs, targets, counts, VOCAB, softcap)
    assert distance(found, expected) < 1e-6
    assert distance(theirs, ours) < (1e-6 if dtype == torch.float32 else 1e-4)


def test_pytorch_finds_no_fault_in_the_operator():
    x, table, targets = tensors()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(loss_and_gradients, (x, table, targets, VOCAB, 3.0, torch.float32, True, False, 0),
                          test_utils=tests)


# -----------------------------------------------------------------------------
# Memory


@needs_clear_refs
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [True, False])
def test_it_holds_less_than_two_pieces(dtype, softcap, kernels, request):
    """GPT-2's vocabulary, as many rows as fill four pieces; the table is narrow, so the logits are all there is."""
    if not kernels:
        request.getfixturevalue("no_kernels")
    rows = 4 * rows_at_once(50304, "cpu")
    table = torch.randn(50304, 8, requires_grad=True)
    x, targets = torch.randn(rows, 8, requires_grad=True), torch.randint(50257, (rows,))

    def peak_mb(call):
        torch.zeros(8, 50304) @ table  # the threads and their memory are there
        forget_peak(torch.device("cpu"))
        before = memory_gb(torch.device("cpu"))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            call()
        return 1000 * (memory_gb(torch.device("cpu")) - before)

    piece = 4 * PIECE["cpu"] / 1e6  # in fp32
    fused = peak_mb(lambda: linear_cross_entropy(x, table, targets, 50257, softcap).backward())
    assert fused < 2 * piece
    by_whole_logits = peak_mb(lambda: F.cross_entropy((x @ table.T).float(), targets).backward())
    assert by_whole_logits > 4 * piece  # the control


# -----------------------------------------------------------------------------
# As torch.compile sees it


def nodes_of(function, *args):
    """Nodes of the forward and backward graphs that torch.compile hands to its backend, and the number of graphs."""
    found = []

    def count(graph_module, example_inputs):
        found.append(len(graph_module.graph.nodes))
        return make_boxed_func(graph_module.forward)

    torch._dynamo.reset()
    torch.compile(function, backend=aot_autograd(fw_compiler=count), fullgraph=True)(*args).backward()
    return found


def test_the_compiled_graph_does_not_grow_with_the_pieces():
    def loss(x, table, targets):
        return linear_cross_entropy(x, table, targets, VOCAB, 3.0, piece=2 * 8 * PADDED)

    one, many = (nodes_of(loss, *tensors(N=n)) for n in (8, 8000))  # 1,000 pieces
    assert one == many
    assert len(one) == 2 and sum(one) < 30


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_softmax_writes_over_the_logits(dtype):
    """In the code that Inductor makes no other tensor is as large as the logits."""
    torch._dynamo.reset()
    logits, targets = torch.randn(40, PADDED).to(dtype), torch.randint(VOCAB, (40,))
    _, codes = run_and_get_code(compiled.__wrapped__(), logits, targets, targets >= 0, VOCAB, 0.0)
    allocated = re.findall(r"= empty_strided_cpu\(\((.*?)\), \(", "".join(codes))
    assert len(codes) == 1 and allocated  # such as a number for each row
    assert not [shape for shape in allocated if str(PADDED) in shape]


def test_a_model_with_its_loss_is_one_graph():
    torch._dynamo.reset()
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16))
    idx = torch.randint(50, (2, 16))
    counter = CompileCounter()
    torch.compile(model, backend=counter, fullgraph=True)(idx, idx, loss_only=True)
    assert counter.frame_count == 1
