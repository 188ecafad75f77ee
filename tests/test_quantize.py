"""The forms that weights take for inference compute what the plain ones do, to their own precision."""

import copy

import pytest
import torch
import torch.nn as nn

from inference import kernels
from inference.int4 import Int4Linear
from inference.quantize import INTEGERS, Int8Linear, PackedLinear, can_pack, convert
from inference.rounding import round_groups, ungroup
from inference.tiled import TiledLinear
from model import GPT, GPTConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=2, n_embd=64)).eval()


def skip_without_kernels():
    if not kernels.available():
        pytest.skip(kernels.trouble())


@pytest.mark.parametrize("rows", [1, 3, 16, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_is_linear(rows, bias):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(rows)
    linear = nn.Linear(96, 160, bias)
    x = torch.randn(rows, 96)
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)
    assert PackedLinear(linear)(x[None]).shape == (1, rows, 160)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_linear_with_rounded_weights(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 160).to(dtype)
    quantized = Int8Linear(linear)
    weight = quantized.weight.float() * quantized.scale.float()[:, None]
    assert (weight - linear.weight.float()).abs().amax(1).le(linear.weight.float().abs().amax(1) / 127 * 0.8).all()
    x = torch.randn(5, 96, dtype=dtype)
    expected = x.float() @ weight.T + linear.bias.float()
    torch.testing.assert_close(quantized(x).float(), expected, rtol=2e-2, atol=3e-2)
    assert quantized.weight.element_size() == 1 and quantized(x[None]).shape == (1, 5, 160)
    on_cuda = quantized.convert_and_scale(x[None])
    torch.testing.assert_close(on_cuda[0].float(), expected, rtol=2e-2, atol=3e-2)
    assert on_cuda.dtype == dtype and on_cuda.shape == (1, 5, 160)


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA."""

    is_cuda = True


@pytest.mark.parametrize("dtype, converted", [(torch.bfloat16, 1), (torch.float32, 1), (torch.float16, 0)])
def test_on_cuda_int8_is_converted_and_then_scaled(dtype, converted, monkeypatch):
    """Never the kernel for CPUs. In float16 the sums of codes could be infinite, so the weights are scaled first."""
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(96, 160, dtype=dtype))
    weight = layer.weight.float() * layer.scale.float()[:, None]
    calls = []
    original = Int8Linear.convert_and_scale
    monkeypatch.setattr(Int8Linear, "convert_and_scale", lambda *args: calls.append(1) or original(*args))
    monkeypatch.setattr(torch, "_weight_int8pack_mm", None)
    size = 1000.0 if dtype == torch.float16 else 1.0
    for rows in (1, 100):
        x = torch.randn(rows, 96, dtype=dtype) * size
        y = layer(x.as_subclass(OnCuda)).as_subclass(torch.Tensor)
        expected = x.float() @ weight.T + layer.bias.float()
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=3e-2 * size)
    assert len(calls) == 2 * converted


def test_a_row_of_zeros_is_no_division_by_zero():
    linear = nn.Linear(16, 16)
    linear.weight.data.zero_()
    assert torch.equal(Int8Linear(linear)(torch.ones(1, 16)), linear.bias[None])


@pytest.mark.parametrize("rows", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("lowest", [False, True])
def test_int4_is_linear_with_rounded_weights(rows, group, lowest):
    """Also outputs and inputs that the kernels' tiles do not divide."""
    torch.manual_seed(rows)
    linear = nn.Linear(200, 40)
    codes, scale, minimum = round_groups(linear.weight, 4, group)
    if lowest:
        minimum = torch.randn(scale.shape).half() * 0.1
    quantized = Int4Linear(codes, scale, minimum, linear.bias, 200)
    weight = ungroup(codes, scale, minimum, 4)[:, :200]
    assert torch.equal(quantized.weight(), weight)
    x = torch.randn(rows, 200)
    expected = nn.functional.linear(x, weight, linear.bias)
    # 8 bits of bfloat16 in activations, scales and minima
    torch.testing.assert_close(quantized(x), expected, rtol=2**-7, atol=expected.abs().max().item() * 2**-6)
    assert quantized(x[None]).shape == (1, rows, 40)


def test_int4_takes_a_byte_for_each_weight():
    linear = nn.Linear(256, 64)
    quantized = Int4Linear(*round_groups(linear.weight, 4, 64), linear.bias)
    sizes = {name: p.numel() * p.element_size() for name, p in quantized.state_dict().items()}
    assert sizes["packed"] == sizes["nibbles"] == 256 * 64 // 2 and sum(sizes.values()) < 1.2 * 256 * 64


# Without our own kernels
KINDS = {"": {"PackedLinear"}, "int8": {"Int8Linear"}, "int4": {"Int4Linear", "Int8Linear"},
         "int4_64": {"Int4Linear", "Int8Linear"}, "int4_128": {"Int4Linear", "Int8Linear"}}
GROUPS = {"int4": 32, "int4_64": 64, "int4_128": 128}


def check_conversion(model, quantize):
    """-> the names of the layers' classes"""
    plain = copy.deepcopy(model)
    idx = torch.randint(100, (1, 20))
    embedding = model.transformer.wte.weight.clone()
    convert(model, torch.float32, quantize)
    assert torch.equal(model.transformer.wte.weight, embedding) and model.quantize == quantize
    for rows in (20, 1):
        difference = (model(idx[:, :rows])[0] - plain(idx[:, :rows])[0]).abs().max()
        assert difference < (0.2 if "int4" in quantize else 0.05 if quantize else 1e-5)
    if "int4" in quantize:
        assert model.transformer.h[1].mlp.c_fc.group == GROUPS[quantize]
    return {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__}


@pytest.mark.parametrize("quantize", KINDS)
def test_every_linear_layer_is_converted_and_the_embedding_stays(model, quantize):
    skip_without_kernels()
    assert check_conversion(model, quantize) == {"TiledLinear"}
    if quantize:  # the head's rounding does the most harm
        assert (model.lm_head.bits, model.lm_head.group) == (8, 32)
        assert model.transformer.h[0].attn.c_attn.bits == (8 if quantize == "int8" else 4)


@pytest.mark.parametrize("quantize", KINDS)
def test_without_kernels_the_layers_are_those_of_pytorch(no_kernels, model, quantize):
    packs = can_pack(model)
    assert check_conversion(model, quantize) == (KINDS[quantize] if quantize or packs else {"Linear"})


def test_a_dtype_that_the_kernels_do_not_know_is_left_to_pytorch(model):
    convert(model, torch.float16)
    assert not any(isinstance(m, TiledLinear) for m in model.modules())


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_weights_are_rounded_as_they_are(model, quantize):
    """The weights before dtype rounds them; they need no more than the kernel's rounding to bfloat16."""
    skip_without_kernels()
    layer = model.transformer.h[0].mlp.c_fc
    rounded = ungroup(*round_groups(layer.weight, *INTEGERS[quantize]), INTEGERS[quantize][0])
    convert(model, torch.bfloat16, quantize)
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight(torch.float32), rounded)
    assert model(torch.zeros(1, 4, dtype=torch.long))[0].dtype == torch.bfloat16


def test_without_kernels_int4_rounds_the_weights_as_they_are(no_kernels, model):
    codes, _, _ = round_groups(model.transformer.h[0].mlp.c_fc.weight, 4, 32)
    convert(model, torch.bfloat16, "int4")
    assert torch.equal(model.transformer.h[0].mlp.c_fc.nibbles, codes[:, ::2] | codes[:, 1::2] << 4)
    assert model(torch.zeros(1, 4, dtype=torch.long))[0].dtype == torch.bfloat16


def test_a_weight_that_is_not_a_number_is_named(model):
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"transformer.h.1.mlp.c_fc.weight holds numbers that are not finite"):
        convert(model, quantize="int4")


def test_another_word_is_refused(model):
    with pytest.raises(ValueError, match="quantize='int3' is not one of int8, int4"):
        convert(model, quantize="int3")
