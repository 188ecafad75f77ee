"""
A model's weights as inference reads them: in half precision, prepacked for the CPU, or as integers of 8
or 4 bits.

Decoding one token reads every weight once and computes little with it, so memory decides its speed: half the bytes take
half the time. On a CPU, oneDNN reads weights in its own layout about twice as fast.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from inference.int4 import Int4Linear
from inference.rounding import round_groups

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


def computes_bfloat16():
    """Whether this CPU has instructions for bfloat16 that oneDNN uses."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_pack(model):
    """Whether oneDNN has a layout of its own for these weights on this machine."""
    weight = model.transformer.wte.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and computes_bfloat16()


INT4 = {"int4": 32, "int4_64": 64, "int4_128": 128}  # the weights that share a scale


def convert(model, dtype=torch.float32, quantize="", calibration=None):
    """Change `model` into its form for inference, in place: weights in `dtype`, linear layers packed on a CPU, or with
    `quantize` as integers: int8, or int4 in groups of 32, int4_64, int4_128. -> the model. Raises ValueError for any
    other value of quantize."""
    if quantize not in ("", "int8", *INT4):
        raise ValueError(f"quantize={quantize!r} is not one of int8, {', '.join(INT4)}; empty: no quantisation")
    codes = {}
    if quantize in INT4:  # of the weights as they are, before dtype rounds them
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                codes[layer] = grouped(layer, 4, INT4[quantize], name)
    model.to(dtype)
    if not quantize and not can_pack(model):
        return model
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, nn.Linear):
                continue
            if child in codes:
                layer = Int4Linear(*codes.pop(child), child.bias, child.in_features)
            else:
                layer = Int8Linear(child) if quantize else PackedLinear(child)
            setattr(parent, name, layer)
    return model


def grouped(linear, bits, group, name):
    """The (codes, scale, minimum) of a layer's weight: those of the .gguf that it was read from, if they have as many
    `bits` and the same `group`, or else rounded. Raises ValueError naming a weight that cannot be rounded."""
    packed = getattr(linear, "packed", None)  # foreign/pretrained.py: with_codes
    if not packed or (packed.bits, packed.group) != (bits, group):
        return round_groups(linear.weight, bits, group, name=f"{name}.weight")
    codes, *scales = packed.read()
    rows = linear.out_features - len(codes)  # zeros that pad a table
    codes = F.pad(codes, (0, 0, 0, rows), value=2 ** (bits - 1)).to(linear.weight.device)
    scales = [p if p is None else F.pad(p, (0, 0, 0, rows)).to(linear.weight.device) for p in scales]
    return codes, *scales
