"""
A model's weights as inference reads them: in half precision, prepacked for the CPU, as 8-bit integers or floats.

Decoding one token reads every weight once and computes little with it, so memory decides its speed: half the bytes take
half the time. On a CPU, oneDNN reads weights in its own layout about twice as fast.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import float8

MOST_ROWS = 64  # for more rows, as in a prompt, a product of floats is faster


class PackedLinear(nn.Module):
    """nn.Linear on a CPU with its weight in oneDNN's own layout. (..., in) -> (..., out), in the weight's dtype."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)  # for one row

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


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
        if not len(rows):
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


def convert(model, dtype=torch.float32, quantize="", calibration=None):
    """Change `model` into its form for inference, in place: weights in `dtype`, linear layers packed on a CPU, or with
    quantize="int8" or "fp8" in 8 bits. In fp8 the head stays, because its rounding does the most harm. `calibration`:
    for fp8, name of a layer -> the static scale of its input (inference/calibration.py). -> the model. Raises
    ValueError for any other value of quantize, and for fp8 on a device that cannot multiply it."""
    if quantize not in ("", "int8", "fp8"):
        raise ValueError(f"quantize={quantize!r} is not int8 or fp8; empty: no quantisation")
    if quantize == "fp8":
        float8.check_device(model.transformer.wte.weight.device)
    model.to(dtype)
    packs = can_pack(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if quantize == "int8":
            model.set_submodule(name, Int8Linear(module))
        elif quantize == "fp8" and float8.fits(module) and module is not model.lm_head:
            scale = calibration.get(name) if calibration else None
            model.set_submodule(name, Float8InferenceLinear(module, scale))
        elif packs:
            model.set_submodule(name, PackedLinear(module))
    return model
