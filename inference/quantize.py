"""
A model's weights as inference reads them: in half precision, prepacked for the CPU, or as 8-bit integers.

Decoding one token reads every weight once and computes little with it, so memory decides its speed: half the bytes take
half the time. On a CPU, oneDNN reads weights in its own layout about twice as fast.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

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


def convert(model, dtype=torch.float32, quantize=""):
    """Change `model` into its form for inference, in place: weights in `dtype`, linear layers packed on a CPU, or with
    quantize="int8" as 8-bit integers. -> the model. Raises ValueError for any other value of quantize."""
    if quantize not in ("", "int8"):
        raise ValueError(f"quantize={quantize!r} is not int8; empty: no quantisation")
    model.to(dtype)
    model.quantize = quantize  # a draft model is read in the same form
    if quantize:
        kind = Int8Linear
    elif can_pack(model):
        kind = PackedLinear
    else:
        return model
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child))
    return model
