"""
A linear layer whose weights lie in the order in which a CPU's kernel reads them (kernels.cpp): in fp32, in bfloat16, or
as codes of 8 or 4 bits with a scale for each group of weights.

Weights of 8 and 4 bits are cut along the inputs into groups of 32, 64 or 128. A weight is code * scale + minimum, or
(code - middle) * scale if there is no minimum, which is the arithmetic of GGUF's q8_0, q4_0 and q4_1 (ggml). A product
with few rows rounds the activations to 8 bits too, in groups of 32, as llama.cpp does. A product with many rows, as in
a prompt, is one of floats.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from inference import kernels

TILE = 16  # outputs of a tile


class TiledLinear(nn.Module):
    """nn.Linear on a CPU that has a C++ compiler. (..., inputs) -> (..., outputs), in x's dtype, fp32 or bfloat16.

    bits: 32, 16 (bfloat16), 8 or 4. codes: the weights in tiles of 16 outputs: (tiles, inputs, 16) floats, pairs or
    fours of inputs side by side where a code has fewer bits. scales, minimum: half precision (tiles, groups, 16).
    products: the dtype of a product with many rows.
    """

    def __init__(self, codes, scales, minimum, bias, outputs, inputs, bits, group, products):
        super().__init__()
        self.in_features = inputs
        self.out_features = outputs
        self.bits = bits
        self.group = group
        self.products = products
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("minimum", minimum)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    @classmethod
    def of_floats(cls, linear):
        """From an nn.Linear in fp32 or bfloat16."""
        weight = linear.weight.detach()
        bits = 8 * weight.element_size()
        outputs, inputs = weight.shape
        tiles = in_tiles(weight, inputs % 2 if bits == 16 else 0)  # (tiles, 16, inputs)
        if bits == 16:
            tiles = tiles.unflatten(2, (-1, 2))  # two inputs side by side
        codes = tiles.transpose(1, 2).contiguous()
        return cls(codes, None, None, linear.bias, outputs, inputs, bits, 1, weight.dtype)

    @classmethod
    def of_codes(cls, codes, scale, minimum, bias, bits, inputs, products=torch.float32):
        """From codes uint8 (outputs, inputs or more), scale and minimum (or None) float16 (outputs, groups); `inputs`
        of the codes' columns count, the rest pads the last group."""
        outputs, width = codes.shape
        group = width // scale.size(1)
        fours = in_tiles(codes).unflatten(2, (-1, 4))  # (tiles, 16, width / 4, 4)
        if bits == 4:  # a byte has a code of these four inputs in its low half, and of the next four in its high half
            fours = fours[:, :, 0::2] | fours[:, :, 1::2] << 4
        tiles = fours.transpose(1, 2).contiguous()
        scales = in_tiles(scale).transpose(1, 2).contiguous()
        if minimum is not None:
            minimum = in_tiles(minimum).transpose(1, 2).contiguous()
        return cls(tiles, scales, minimum, bias, outputs, inputs, bits, group, products)

    def weight(self, dtype):
        """The weights as floats, (outputs, inputs)."""
        return kernels.unpack(self.codes, self.scales, self.minimum, self.out_features, self.in_features, self.bits,
                              self.group, dtype)

    def forward(self, x):
        rows = x.reshape(-1, self.in_features)  # (N, inputs)
        if rows.size(0) > kernels.MOST_ROWS and not (self.bits < 32 and kernels.has_amx()):
            y = F.linear(rows.to(self.products), self.weight(self.products)).to(x.dtype)
            if self.bias is not None:
                y += self.bias.to(x.dtype)
        else:
            y = torch.ops.minichat.linear(rows, self.codes, self.scales, self.minimum, self.bias, self.out_features,
                                          self.bits, self.group)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight_bytes(self):
        """Bytes that a product reads."""
        tensors = [t for t in (self.codes, self.scales, self.minimum) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


def in_tiles(matrix, pad_columns=0):
    """(outputs, columns) -> (tiles, 16, columns), with rows and columns of zeros at the ends where they do not fit."""
    outputs, _ = matrix.shape
    padded = F.pad(matrix, (0, pad_columns, 0, -outputs % TILE))
    return padded.unflatten(0, (-1, TILE))
