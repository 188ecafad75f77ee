"""FP8: casts that saturate, products equal to their fp32 reference, training from outside, inference."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import float8
from checkpoint import load_model_tensors, steps
from float8 import (
    E4M3,
    E5M2,
    Float8Linear,
    cast,
    check_device,
    convert_to_float8_training,
    in_columns,
    product,
    to_float8,
    values,
)
from inference.quantize import Float8InferenceLinear, convert
from model import GPT, GPTConfig

pytest_plugins = ["runs"]


def gpt(**changes):
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=100, n_layer=3, n_head=2, n_embd=32, bias=False)
    return GPT(GPTConfig(**{**sizes, **changes}))


# -----------------------------------------------------------------------------
# Casts


@pytest.mark.parametrize("dtype, most", [(E4M3, 448.0), (E5M2, 57344.0)])
def test_casts_saturate(dtype, most):
    x = torch.tensor([1.0, most, 1.2 * most, -5 * most, 1e30, torch.inf])
    expected = torch.tensor([1.0, most, most, -most, most, most])
    assert torch.equal(cast(x, torch.tensor(1.0), dtype).float(), expected)
    assert cast(torch.tensor([torch.nan]), torch.tensor(1.0), dtype).float().isnan().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 3e-38])
def test_the_largest_number_reaches_the_end_of_the_format(dtype, size):
    """At any size: a gradient of 1e-30 is as good as one of 1."""
    torch.manual_seed(0)
    x = torch.randn(64, 64) * size
    x8, scale = to_float8(x, dtype)
    assert x8.float().abs().max() == (torch.finfo(dtype).max if size > 1e-33 else x8.float().abs().max())
    bits = {E4M3: 4, E5M2: 3}[dtype]  # of precision
    big = x.abs() > x.abs().max() / 64  # not among the subnormal numbers
    if size > 1e-33:
        assert ((x8.float() * scale - x).abs() <= x.abs() * 2.0**-bits * 1.001)[big].all()
    assert (x8.float() * scale).isfinite().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_zeros_stay_zeros(dtype):
    x8, scale = to_float8(torch.zeros(16, 16), dtype)
    assert scale > 0 and torch.equal(x8.float(), torch.zeros(16, 16))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_visible(bad):
    layer = Float8Linear(32, 16)
    x = torch.ones(16, 32)
    x[3, 5] = bad
    y = layer(x)
    assert y.isnan().all()  # the loss, and so on_nan, sees it


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_values_are_torchs_for_every_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)
    torch.testing.assert_close(values(codes), codes.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values(codes.t()), codes.float().t(), rtol=0, atol=0, equal_nan=True)


# -----------------------------------------------------------------------------
# Products


def whole_numbers(*shape):
    """Numbers that e4m3 holds exactly and whose sums fp32 holds exactly: in any order, the sum has the same bits."""
    return torch.randint(-8, 9, shape).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [E4M3, E5M2])
def test_the_product_is_torchs_scaled_mm(first, dtype):
    """torch's emulation on a CPU sums in another order, so bits are compared where no order matters."""
    torch.manual_seed(0)
    a8 = whole_numbers(24, 48).to(first)
    b8 = in_columns(whole_numbers(48, 32).to(E4M3))
    for scale_a, scale_b in ((1.0, 1.0), (0.5, 0.25)):
        scales = torch.tensor(scale_a), torch.tensor(scale_b)
        assert torch.equal(product(a8, b8, *scales, dtype), torch._scaled_mm(a8, b8, *scales, out_dtype=dtype))
    a8, scale_a = to_float8(torch.randn(24, 48), first)
    b8, scale_b = to_float8(torch.randn(48, 32), E4M3)
    b8 = in_columns(b8)
    ours = product(a8, b8, scale_a, scale_b, torch.float32)
    theirs = torch._scaled_mm(a8, b8, scale_a, scale_b, out_dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def reference(x, weight, bias, grad):
    """Forward and backward in fp32, with the casts written out: 448 and 57344 are the largest numbers."""
    def rounded(t, dtype, most):
        scale = t.abs().max().float() / most
        return (t.float() / scale).clamp(-most, most).to(dtype).float(), scale

    x8, x_scale = rounded(x, E4M3, 448.0)
    w8, w_scale = rounded(weight, E4M3, 448.0)
    g8, g_scale = rounded(grad, E5M2, 57344.0)
    y = (x8 @ w8.T * (x_scale * w_scale)).to(grad.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    grad_x = (g8 @ w8 * (g_scale * w_scale)).to(x.dtype)
    grad_w = (g8.T.contiguous() @ x8 * (g_scale * x_scale)).to(weight.dtype)
    return y, grad_x, grad_w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_forward_and_gradients_have_the_bits_of_the_reference(dtype, bias, size):
    torch.manual_seed(0)
    layer = Float8Linear(48, 32, bias)
    x = torch.randn(4, 8, 48, requires_grad=True)
    grad = torch.randn(4, 8, 32).to(dtype) * size
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype and y.shape == (4, 8, 32)
    y.backward(grad)
    expected = reference(x.detach().view(32, 48), layer.weight.detach(), layer.bias, grad.view(32, 32))
    assert torch.equal(y.view(32, 32), expected[0])
    assert torch.equal(x.grad.view(32, 48), expected[1])
    assert torch.equal(layer.weight.grad, expected[2])
    plain = F.linear(x, layer.weight, layer.bias)
    assert 0 < (y.float() - plain).abs().max() < 0.15  # it is FP8, and only that


def test_rows_that_are_no_multiple_of_16_are_padded():
    torch.manual_seed(0)
    layer = Float8Linear(32, 16)
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    expected = reference(x.detach().view(10, 32), layer.weight.detach(), layer.bias, 2 * y.detach().view(10, 16))
    torch.testing.assert_close(y.view(10, 16), expected[0], rtol=0, atol=0)
    torch.testing.assert_close(x.grad.view(10, 32), expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, expected[2], rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_a_linear_layer():
    """Against float64 and no casts at all: within FP8's rounding, so no factor or sign is wrong."""
    torch.manual_seed(0)
    layer = Float8Linear(64, 64)
    x = torch.randn(128, 64, requires_grad=True)
    grad = torch.randn(128, 64)
    layer(x).backward(grad)
    wanted_w = grad.double().T @ x.detach().double()
    wanted_x = grad.double() @ layer.weight.detach().double()
    for got, wanted in ((layer.weight.grad, wanted_w), (x.grad, wanted_x)):
        assert (got - wanted).norm() / wanted.norm() < 0.08
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


# -----------------------------------------------------------------------------
# Surgery


def kinds(model):
    return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def test_the_blocks_are_converted_and_the_state_dict_is_the_same():
    model = gpt(bias=True)
    before = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    flops = model.train_flops(32)
    names = convert_to_float8_training(model)
    assert len(names) == 12 and kinds(model) == set(names) and "lm_head" not in names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items()) and len(after) == len(before)
    assert model.train_flops(32) == flops


def test_first_and_last_block_can_stay():
    model = gpt()
    names = convert_to_float8_training(model, ends=False)
    assert {name.split(".")[2] for name in names} == {"1"} and len(names) == 4


def test_layers_whose_sides_are_no_multiples_of_16_stay():
    names = convert_to_float8_training(gpt(mlp_width=100))
    assert names and not [name for name in names if "mlp" in name]
    with pytest.raises(ValueError, match="no linear layer has sides that are multiples of 16"):
        convert_to_float8_training(gpt(n_embd=40, mlp_width=100))
    with pytest.raises(ValueError, match="fp8_ends=true"):
        convert_to_float8_training(gpt(n_layer=2), ends=False)


@pytest.mark.parametrize("device, capability, match", [
    (torch.device("mps"), None, "not on mps"), (torch.device("cuda"), (8, 0), "has 8.0"),
    (torch.device("cuda"), (8, 9), None), (torch.device("cuda"), (10, 0), None), (torch.device("cpu"), None, None)])
def test_which_devices_have_fp8(monkeypatch, device, capability, match):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    if match is None:
        check_device(device)
    else:
        with pytest.raises(ValueError, match=match) as caught:
            check_device(device)
        assert "\n" not in str(caught.value)


def test_on_cuda_the_product_is_scaled_mm(monkeypatch):
    """The call that a GPU would get: layouts and sides as _scaled_mm wants them there."""
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.is_contiguous() and b.t().is_contiguous()
        assert a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0
        calls.append((a.dtype, b.dtype, use_fast_accum))
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(float8, "product", lambda a, b, scale_a, scale_b, dtype, fast=False: scaled_mm(
        a, b, scale_a, scale_b, dtype, fast))
    layer = Float8Linear(32, 48)
    layer(torch.randn(5, 32, requires_grad=True)).sum().backward()
    assert calls == [(E4M3, E4M3, True), (E5M2, E4M3, False), (E5M2, E4M3, False)]


# -----------------------------------------------------------------------------
# train.py


def test_a_run_in_fp8_trains_resumes_and_leaves_a_plain_checkpoint(tiny, tmp_path):
    folder = tmp_path / "whole"
    done = tiny(folder, fp8="true", max_iters=8)
    assert done.code == 0, done.err
    plain = tiny(tmp_path / "plain", max_iters=8)
    assert plain.code == 0, plain.err
    a, b = (load_model_tensors(max(steps(f).values())) for f in (folder, tmp_path / "plain"))
    assert {name: (t.shape, t.dtype) for name, t in a.items()} == {name: (t.shape, t.dtype) for name, t in b.items()}
    assert not all(torch.equal(a[name], b[name]) for name in a)  # it did compute in FP8
    assert max((a[name] - b[name]).abs().max() for name in a) < 0.1
    half = tmp_path / "half"
    assert tiny(half, fp8="true", max_iters=4, lr_decay_iters=8).code == 0
    done = tiny(half, fp8="true", max_iters=8, init_from="resume")
    assert done.code == 0, done.err
    c = load_model_tensors(max(steps(half).values()))
    assert all(torch.equal(a[name], c[name]) for name in a)


def test_tensor_parallelism_is_refused(tiny, tmp_path):
    done = tiny(tmp_path / "run", fp8="true", tp_size=2)
    assert done.code == 2 and done.err.count("\n") == 1 and "fp8 and tp_size=2" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict(), dict(zero_stage=3), dict(pp_size=2, n_layer=2)], ids=["ddp", "zero", "pp"])
def test_two_ranks_train_in_fp8(tiny, tmp_path, layout):
    """The weights' scales are those of the whole matrix on every rank. Batches are cut differently, so activations'
    scales differ: to FP8's rounding, not to fp32's."""
    settings = dict(fp8="true", max_iters=4, gradient_accumulation_steps=2, n_layer=2)
    one = tiny(tmp_path / "one", **settings)
    two = tiny(tmp_path / "two", ranks=2, **{**settings, **layout})
    assert one.code == two.code == 0, one.err + two.err
    a, b = (load_model_tensors(max(steps(tmp_path / f).values())) for f in ("one", "two"))
    assert max((a[name] - b[name]).abs().max() for name in a) < 5e-2


@pytest.mark.slow
def test_compiled_it_computes_the_same():
    from device import missing_for_compile
    if missing_for_compile(torch.device("cpu")):
        pytest.skip("no compiler here")
    torch.manual_seed(0)
    layer = Float8Linear(32, 48)
    x = torch.randn(16, 32, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    wanted = layer.weight.grad.clone()
    layer.weight.grad = None
    compiled = torch.compile(layer, dynamic=False)(x)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-5, atol=1e-5)


# -----------------------------------------------------------------------------
# Inference


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("scale", [None, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_has_the_bits_of_the_reference(rows, scale, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).to(dtype)
    x = torch.randn(rows, 32, dtype=dtype)
    weight = linear.weight.detach().float()
    w_scale = weight.abs().max() / 448
    w8 = (weight / w_scale).clamp(-448, 448).to(E4M3).float()
    if scale is None:
        x_scale = x.float().abs().amax(1, keepdim=True) / 448
        x8 = (x.float() / x_scale).clamp(-448, 448).to(E4M3).float()
        y = (x8 @ w8.T) * w_scale * x_scale
    else:
        x8 = (x.float() / scale).clamp(-448, 448).to(E4M3).float()
        y = (x8 @ w8.T) * (torch.tensor(scale) * w_scale)
    layer = Float8InferenceLinear(linear, scale)
    assert torch.equal(layer(x), y.to(dtype) + linear.bias)
    assert layer(x[None]).shape == (1, rows, 48) and layer(x[:0]).shape == (0, 48)


def test_a_tokens_result_does_not_depend_on_the_tokens_beside_it():
    torch.manual_seed(0)
    layer = Float8InferenceLinear(nn.Linear(32, 48))
    x = torch.randn(4, 32) * torch.tensor([1.0, 1e4, 1e-4, 0.0])[:, None]
    together = layer(x)
    for row in range(4):
        torch.testing.assert_close(layer(x[row : row + 1])[0], together[row], rtol=1e-6, atol=1e-6)


def test_convert_leaves_layers_that_do_not_fit():
    model = convert(gpt(mlp_width=100).eval(), torch.float32, "fp8", {"transformer.h.1.attn.c_proj": 0.5})
    found = {name: module for name, module in model.named_modules() if isinstance(module, Float8InferenceLinear)}
    assert len(found) == 6 and all(".attn." in name for name in found)
    static = {name: float(module.scale) for name, module in found.items() if module.scale is not None}
    assert static == {"transformer.h.1.attn.c_proj": 0.5}
    assert model(torch.randint(100, (1, 8)))[0].isfinite().all()
