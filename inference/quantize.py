"""
A model's weights as inference reads them: in half precision, in a layout that the CPU reads fast, or as 8-bit integers.

Decoding one token reads every weight once and computes little with it, so memory decides its speed: half the bytes take
half the time. On a CPU with a C++ compiler the weights lie in the tiles of our own kernel (inference/tiled.py), but for
bfloat16 on a CPU with AMX, which oneDNN uses. Without a compiler oneDNN's layout and PyTorch's kernels take their place.
"""

import itertools
import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F

from device import native_bfloat16
from inference import kernels
from inference.rounding import round_groups
from inference.tiled import MOST_ROWS, TiledLinear

PACKED = {}  # number -> a weight in oneDNN's layout, which torch.compile cannot take as an argument
NUMBERS = itertools.count()


class PackedLinear(nn.Module):
    """nn.Linear on a CPU with its weight in oneDNN's own layout. (..., in) -> (..., out), in the weight's dtype."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        number = next(NUMBERS)
        PACKED[number] = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)  # for one row
        weakref.finalize(self, PACKED.pop, number)
        # a tensor, so that a compiled step does not depend on the number
        self.register_buffer("number", torch.tensor(number), persistent=False)

    @property
    def packed(self):
        return PACKED[int(self.number)]

    @property
    def weight_bytes(self):
        """Bytes that a product reads."""
        return self.packed.numel() * self.packed.element_size()

    def forward(self, x):
        return torch.ops.minichat.packed_linear(x, self.number, self.bias, self.out_features)


def packed_linear(x, number, bias, outputs):
    return torch.ops.mkldnn._linear_pointwise(x, PACKED[int(number)], bias, "none", [], "")


OPERATORS = torch.library.Library("minichat", "FRAGMENT")
OPERATORS.define("packed_linear(Tensor x, Tensor number, Tensor? bias, int outputs) -> Tensor")
OPERATORS.impl("packed_linear", packed_linear, "CPU")


@torch.library.register_fake("minichat::packed_linear", lib=OPERATORS)
def packed_linear_shape(x, number, bias, outputs):
    return x.new_empty(*x.shape[:-1], outputs)


class Int8Linear(nn.Module):
    """nn.Linear with its weight as int8 and a scale for each output channel. (..., in) -> (..., out), in x's dtype.

    The largest weight of a row is 127 times its scale; the others are rounded to the nearest step (absmax, as in
    Dettmers et al. 2022, arXiv:2208.07339, without their treatment of outliers). It computes in bfloat16, for which
    PyTorch's kernel is written: in float32 it takes several times as long.
    """

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1).clamp(min=1e-12) / 127).to(torch.bfloat16)
        steps = (weight / scale.float()[:, None]).round().clamp(-127, 127)  # of the rounded scale
        self.register_buffer("weight", steps.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        rows = x.reshape(-1, self.in_features)  # (N, in)
        if len(rows) > MOST_ROWS:
            weight = self.weight * self.scale.to(x.dtype)[:, None]
            return F.linear(x, weight.to(x.dtype), self.bias)
        rows = rows.to(torch.bfloat16)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def computes_bfloat16():
    """Whether this CPU has instructions for bfloat16 that oneDNN uses."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_pack(model):
    """Whether oneDNN has a layout of its own for these weights on this machine."""
    weight = model.transformer.wte.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and computes_bfloat16()


def has_amx():
    """Whether this CPU multiplies tiles of bfloat16 numbers (AMX), which oneDNN uses."""
    is_supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private: a torch may lack it
    return computes_bfloat16() and is_supported is not None and is_supported()


def int8_linear(linear):
    """nn.Linear -> TiledLinear of 8 bits, in groups of 32 as in GGUF's q8_0"""
    codes, scale, minimum = round_groups(linear.weight.detach(), 8, 32)
    return tiled(linear, codes, scale, minimum, 8)


def tiled(linear, codes, scale, minimum, bits):
    products = torch.bfloat16 if native_bfloat16() else torch.float32
    return TiledLinear.of_codes(codes, scale, minimum, linear.bias, bits, linear.in_features, products)


def kind_of_layer(model, quantize):
    """The function that makes the layer for inference of an nn.Linear, or None: it stays as it is."""
    weight = model.transformer.wte.weight
    on_cpu = weight.device.type == "cpu" and weight.dtype in kernels.TYPES and kernels.available()
    if quantize == "int8":
        return int8_linear if on_cpu else Int8Linear
    if weight.dtype == torch.bfloat16 and has_amx():
        return PackedLinear
    if on_cpu:
        return TiledLinear.of_floats
    return PackedLinear if can_pack(model) else None


def convert(model, dtype=torch.float32, quantize=""):
    """Change `model` into its form for inference, in place: weights in `dtype`, linear layers packed on a CPU, or with
    quantize="int8" as 8-bit integers. -> the model. Raises ValueError for any other value of quantize."""
    if quantize not in ("", "int8"):
        raise ValueError(f"quantize={quantize!r} is not int8; empty: no quantisation")
    model.to(dtype)
    make_layer = kind_of_layer(model, quantize)
    if make_layer is None:
        return model
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, make_layer(child))
    return model
