"""
A model's weights as inference reads them: in half precision, in a layout that the CPU reads fast, or as integers of 8
or 4 bits, or floats of 8.

Decoding one token reads every weight once and computes little with it, so memory decides its speed: half the bytes take
half the time. On a CPU with a C++ compiler the weights lie in the tiles of our own kernel (inference/tiled.py). Without
a compiler oneDNN's layout and PyTorch's kernels take its place.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import float8
from device import native_bfloat16
from inference import kernels
from inference.int4 import Int4Linear
from inference.rounding import round_groups
from inference.tiled import TiledLinear


class PackedLinear(nn.Module):
    """nn.Linear on a CPU with its weight in oneDNN's own layout. (..., in) -> (..., out), in the weight's dtype."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)  # for one row

    @property
    def weight_bytes(self):
        """Bytes that a product reads."""
        return self.packed.numel() * self.packed.element_size()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """nn.Linear with its weight as int8 and a scale for each output channel. (..., in) -> (..., out), in x's dtype.

    The largest weight of a row is 127 times its scale; the others are rounded to the nearest step (absmax, as in
    Dettmers et al. 2022, arXiv:2208.07339, without their treatment of outliers). On a CPU it computes in bfloat16, for
    which PyTorch's kernel is written: in float32 it takes several times as long. On CUDA only torch.compile makes it
    fast: alone, the conversion of the weight is a pass over memory of its own.
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
        if x.is_cuda and x.dtype != torch.float16:  # float16 could not hold the sums before they are scaled
            return self.convert_and_scale(x)
        rows = x.reshape(-1, self.in_features)  # (N, in)
        if x.is_cuda or rows.size(0) > kernels.MOST_ROWS:
            weight = self.weight * self.scale.to(x.dtype)[:, None]
            return F.linear(x, weight.to(x.dtype), self.bias)
        rows = rows.to(torch.bfloat16)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def convert_and_scale(self, x):
        """A product of floats, scaled afterwards: a compiler reads the bytes and converts them on the way, so a step
        reads half of what bfloat16 takes (gpt-fast)."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Float8InferenceLinear(nn.Module):
    """nn.Linear with weight and input in e4m3 (float8.py). (..., in) -> (..., out), in autocast's dtype or x's.

    The weight has one scale. The input has the static `scale` of a calibration, or without one a dynamic scale for each
    row: then a token's result does not depend on the tokens beside it. On a CPU the weight is kept as fp32 with e4m3's
    values, so results are right but neither memory nor time is saved.
    """

    def __init__(self, linear, scale=None):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        weight, weight_scale = float8.to_float8(linear.weight.detach(), float8.E4M3)  # (out, in)
        if weight.device.type == "cpu":
            weight = float8.values(weight)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("scale", None if scale is None else weight_scale.new_tensor(scale))
        self.register_buffer("one", torch.ones_like(weight_scale))

    def forward(self, x):
        dtype = float8.product_dtype(x)
        rows = x.reshape(-1, self.in_features)  # (N, in)
        if rows.size(0) == 0:
            return x.new_empty(*x.shape[:-1], self.out_features, dtype=dtype)
        if self.scale is None:
            row_scales = float8.scale_for(rows.abs().amax(1, keepdim=True), float8.E4M3)  # (N, 1)
            rows = float8.cast(rows, row_scales, float8.E4M3)
            y = float8.product(rows, self.weight.t(), self.one, self.weight_scale, torch.float32, fast=True)
            y = (y * row_scales).to(dtype)
        else:
            rows = float8.cast(rows, self.scale, float8.E4M3)
            y = float8.product(rows, self.weight.t(), self.scale, self.weight_scale, dtype, fast=True)
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y.view(*x.shape[:-1], self.out_features)


def computes_bfloat16():
    """Whether this CPU has instructions for bfloat16 that oneDNN uses."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_pack(model):
    """Whether oneDNN has a layout of its own for these weights on this machine."""
    weight = model.transformer.wte.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and computes_bfloat16()


def has_kernels(device, dtype):
    """Whether our own kernels for a CPU (inference/kernels.py) serve this device and dtype."""
    return device.type == "cpu" and dtype in kernels.TYPES and kernels.available()


INTEGERS = {"int8": (8, 32), "int4": (4, 32), "int4_64": (4, 64), "int4_128": (4, 128)}  # bits, weights with one scale
FORMS = (*INTEGERS, "fp8")


def convert(model, dtype=torch.float32, quantize="", calibration=None):
    """Change `model` into its form for inference, in place: weights in `dtype`, in a layout that a CPU reads fast, or
    with `quantize` in 8 or 4 bits. -> the model.

    quantize: int8; int4 in groups of 32, int4_64, int4_128, with a head of 8 bits; or fp8, except the head, with
    `calibration`, name of a layer -> the static scale of its input (inference/calibration.py). Raises ValueError for
    any other value, for a weight that cannot be rounded, and for a device that cannot multiply the form.
    """
    if quantize not in ("", *FORMS):
        raise ValueError(f"quantize={quantize!r} is not one of {', '.join(FORMS)}; empty: no quantisation")
    device = model.transformer.wte.weight.device
    if quantize == "fp8":
        float8.check_device(device)
    codes = {}
    for name, layer in model.named_modules() if quantize in INTEGERS else ():
        bits, group = INTEGERS[quantize]
        if layer is model.lm_head and not has_codes(layer, bits, group):
            bits, group = INTEGERS["int8"]
        if isinstance(layer, nn.Linear) and (bits == 4 or has_kernels(device, dtype)):
            # of the weights as they are, before dtype rounds them
            codes[name] = bits, grouped(layer, bits, group, name)
    model.to(dtype)
    model.quantize = quantize  # a draft model is read in the same form
    packs = can_pack(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        if quantize == "fp8" and float8.fits(layer) and layer is not model.lm_head:
            made = Float8InferenceLinear(layer, calibration.get(name) if calibration else None)
        elif name in codes:
            made = integer_layer(layer, *codes.pop(name))
        elif quantize in INTEGERS:
            made = Int8Linear(layer)
        elif has_kernels(device, dtype):
            made = TiledLinear.of_floats(layer)
        elif packs:
            made = PackedLinear(layer)
        else:
            continue
        model.set_submodule(name, made)
    return model


def integer_layer(linear, bits, codes):
    """The layer of grouped codes, for our own kernel where it runs, or else PyTorch's for 4 bits."""
    if not has_kernels(linear.weight.device, linear.weight.dtype):
        return Int4Linear(*codes, linear.bias, linear.in_features)
    products = torch.bfloat16 if native_bfloat16() else torch.float32
    return TiledLinear.of_codes(*codes, linear.bias, bits, linear.in_features, products)


def has_codes(linear, bits, group):
    """Whether a layer has codes from a .gguf or a calibration (Packed in rounding.py), of so many bits and groups."""
    packed = getattr(linear, "packed", None)
    return packed is not None and (packed.bits, packed.group) == (bits, group)


def grouped(linear, bits, group, name):
    """The (codes, scale, minimum) of a layer's weight: those of the .gguf that it was read from, if they have as many
    `bits` and the same `group`, or else rounded. Raises ValueError naming a weight that cannot be rounded."""
    if not has_codes(linear, bits, group):
        return round_groups(linear.weight, bits, group, name=f"{name}.weight")
    codes, *scales = linear.packed.read()
    rows = linear.out_features - len(codes)  # zeros that pad a table
    codes = F.pad(codes, (0, 0, 0, rows), value=2 ** (bits - 1)).to(linear.weight.device)
    scales = [p if p is None else F.pad(p, (0, 0, 0, rows)).to(linear.weight.device) for p in scales]
    return codes, *scales
