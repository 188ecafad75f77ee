"""
A linear layer with 4-bit weights, multiplied by PyTorch's own kernels.

The kernels compute in bfloat16, and the scales are rounded to it. The layout that a kernel reads differs between
machines. Where a C++ compiler is there, inference/tiled.py has a faster kernel for a CPU.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from inference.kernels import MOST_ROWS
from inference.rounding import ungroup

INNER_TILES = 8  # of 16 inputs: what a CUDA kernel reads at once, as in gpt-fast


class Int4Linear(nn.Module):
    """nn.Linear of 4-bit `codes` uint8 (out, K), K at least in_features, with `scale` and `minimum` (or None) float16
    (out, K / group). (..., in) -> (..., out), in x's dtype.

    The weight is kept twice: as the kernel's `packed`, and two codes a byte for products of many rows.
    Raises ValueError for a device that has no such kernel.
    """

    def __init__(self, codes, scale, minimum, bias=None, in_features=None):
        super().__init__()
        self.in_features = in_features or codes.size(1)
        self.out_features = len(codes)
        self.group = codes.size(1) // scale.size(1)
        if codes.device.type not in ("cpu", "cuda"):
            raise ValueError(f"int4 runs on CPUs and NVIDIA GPUs, not on {codes.device.type}: take int8 here")
        cuda = codes.device.type == "cuda"
        if cuda and torch.cuda.get_device_capability(codes.device) < (8, 0):
            raise ValueError("int4 needs a GPU of compute capability 8.0 or higher (Ampere): take int8 here")
        self.register_buffer("nibbles", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)
        # the kernels' weight is (code - 8) * scale + zero
        zero = torch.zeros_like(scale, dtype=torch.float32)
        if minimum is not None:
            zero = minimum.float() + 8 * scale.float()
        pairs = torch.stack((scale.float(), zero), -1).to(torch.bfloat16)  # (out, K / group, 2)
        outputs, inputs = (8, 16 * INNER_TILES) if cuda else (16, self.group)  # their sizes are multiples of these
        self.width = codes.size(1) + -codes.size(1) % inputs
        codes = F.pad(codes, (0, self.width - codes.size(1), 0, -len(codes) % outputs), value=8)
        pairs = F.pad(pairs, (0, 0, 0, self.width // self.group - pairs.size(1), 0, len(codes) - len(pairs)))
        self.register_buffer("packed", pack(codes))
        self.register_buffer("pairs", pairs.transpose(0, 1).contiguous())  # (K / group, out, 2)
        self.bias = bias

    def forward(self, x):
        rows = x.reshape(-1, self.in_features)  # (N, in)
        if rows.size(0) > MOST_ROWS:
            return F.linear(x, self.weight().to(x.dtype), self.bias)
        rows = F.pad(rows.to(torch.bfloat16), (0, self.width - self.in_features))
        if x.device.type == "cuda":
            y = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group, self.pairs)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.pairs)
        y = y[:, : self.out_features].to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def weight(self):
        """The rounded weight, float32 (out, in)."""
        codes = torch.stack((self.nibbles & 15, self.nibbles >> 4), -1).flatten(1)
        return ungroup(codes, self.scale, self.minimum, 4)[:, : self.in_features]


def pack(codes):
    """Codes uint8 (N, K) in the layout of the device's kernel."""
    if codes.device.type == "cuda":  # the first of two neighbours in the high half of a byte
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
