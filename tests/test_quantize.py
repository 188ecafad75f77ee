"""The forms that weights take for inference compute what the plain ones do, to their own precision."""

import copy

import pytest
import torch
import torch.nn as nn

from inference.quantize import Int8Linear, PackedLinear, can_pack, convert
from model import GPT, GPTConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=2, n_embd=64)).eval()


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


def test_a_row_of_zeros_is_no_division_by_zero():
    linear = nn.Linear(16, 16)
    linear.weight.data.zero_()
    assert torch.equal(Int8Linear(linear)(torch.ones(1, 16)), linear.bias[None])


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_every_linear_layer_is_converted_and_the_embedding_stays(model, quantize):
    plain = copy.deepcopy(model)
    idx = torch.randint(100, (1, 20))
    embedding = model.transformer.wte.weight.clone()
    convert(model, torch.float32, quantize)
    kinds = {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__}
    assert kinds == {"Int8Linear" if quantize else "PackedLinear" if can_pack(plain) else "Linear"}
    assert torch.equal(model.transformer.wte.weight, embedding)
    difference = (model(idx)[0] - plain(idx)[0]).abs().max()
    assert difference < (0.05 if quantize else 1e-5)


def test_another_word_is_refused(model):
    with pytest.raises(ValueError, match="quantize='int4' is not int8 or fp8"):
        convert(model, quantize="int4")
