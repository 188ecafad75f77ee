"""
Weights as small integers: 4 or 8 bits each, and a scale for every group of neighbours in a row.

    codes, scale, minimum = round_groups(weight, bits=4, group=32)
    weight = ungroup(codes, scale, minimum, bits=4)

A matrix (N, K) is cut along K into groups of G weights. The weights are (codes - 8) * scale with 4 bits, (codes - 128)
* scale with 8, or codes * scale + minimum if each group has a minimum. In groups of 32 these are the numbers of
llama.cpp's q4_0, q8_0 and q4_1. Where K is no multiple of G, the last group is filled with zeros.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

GROUPS = (32, 64, 128)
PIECE = 1 << 13  # groups that are rounded at once: what one candidate needs stays in the CPU's cache
TINY = 2.0**-24  # the smallest float16 above zero

# Scales that are tried with 4 bits: the largest weight of a group (by size, with its sign) becomes this step. -8 is
# llama.cpp's q4_0; steps below it clip the largest weight, so that the others are rounded more finely.
STEPS = (-8.0, -8.5, -9.0, -7.0)


class Packed(NamedTuple):
    """A matrix that was rounded elsewhere: in a .gguf, or by inference/gptq.py. read() -> (codes, scale, minimum)."""

    bits: int
    group: int
    read: Callable


def round_groups(weight, bits, group, importance=None, name="the weight"):
    """A matrix (N, K) of floats -> (codes, scale, minimum): uint8 (N, K), float16 (N, K / group), and None, as the
    groups are symmetric. K is rounded up to a multiple of `group`.

    With 4 bits each group gets the scale of least squared error among several, with 8 bits the largest weight becomes
    127 steps. The codes are chosen for the scale as float16 has it. Weights that were read from a q4_0, q4_1 or q8_0
    file keep every value: only those of q4_1 have a minimum. importance (K,): how much the error at each input counts
    with 4 bits, such as the mean square of the layer's activations; None: all alike. Raises ValueError, with the `name`
    of the weight, if a number is not finite or beyond float16.
    """
    if bits not in (4, 8) or group not in GROUPS:
        raise ValueError(f"{bits} bits in groups of {group}: there are 4 and 8 bits, in groups of 32, 64 or 128")
    check_finite(weight, name)
    rows = pad_inputs(weight.detach().float(), group)
    groups = rows.view(-1, group)
    if bits == 4 and (grid := grid_of(groups, name)):
        return tuple(part.view(len(rows), -1) for part in grid)
    counts = None
    if importance is not None:
        counts = pad_inputs(importance.float()[None], group).view(-1, group)  # of the groups of one row
    half = 2 ** (bits - 1)
    codes, scales = [], []
    for first, piece in zip(range(0, len(groups), PIECE), groups.split(PIECE), strict=True):
        if bits == 8:
            scale = to_half(piece.abs().amax(1) / 127, name)
        else:
            own = None
            if counts is not None:
                own = counts[torch.arange(first, first + len(piece), device=rows.device) % len(counts)]
            scale = best_scale(piece, own, name)
        scales.append(scale)
        codes.append((to_steps(piece, scale.float()[:, None], -half, half - 1) + half).to(torch.uint8))
    return torch.cat(codes).view_as(rows), torch.cat(scales).view(len(rows), -1), None


def check_finite(weight, name):
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} holds numbers that are not finite, and cannot be rounded")


def grid_of(groups, name):
    """(codes, scale, minimum) of 4-bit `groups` (P, G) that hold them exactly, as groups from a q4_1 file do, or None.
    """
    parts = []
    for piece in groups.split(PIECE):
        low, high = piece.aminmax(dim=1)
        scale = to_half((high - low) / 15, name)
        minimum = low.to(torch.float16)
        codes = to_steps(piece - minimum.float()[:, None], scale.float()[:, None], 0, 15).to(torch.uint8)
        if not torch.equal(ungroup(codes, scale[:, None], minimum[:, None], 4), piece):
            return None  # most often at the first piece
        parts.append((codes, scale, minimum))
    codes, scale, minimum = (torch.cat(part) for part in zip(*parts, strict=True))
    return (codes, scale, minimum) if scale.any() else None


def best_scale(groups, counts, name):
    """The float16 scale (P,) of least squared error, weighted by `counts` or None, for 4-bit codes of `groups` (P, G).

    For given codes the best scale is a projection, sum(w * g * q) / sum(w * q * q), and it lowers the error by
    sum(w * g * q)^2 / sum(w * q * q): the candidate that lowers it most is taken.
    """
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))  # (P, 1), with its sign
    best = torch.zeros_like(largest[:, 0])
    most = torch.zeros_like(best)
    for step in STEPS:
        steps = to_steps(groups, largest / step, -8, 7)
        weighed = steps if counts is None else steps * counts
        product = (weighed * groups).sum(1)
        square = (weighed * steps).sum(1)
        gain = product.square() / square  # not a number for zeros
        better = gain > most
        most = torch.where(better, gain, most)
        best = torch.where(better, product / square, best)
    # the gain of the smallest weights is zero in float32
    best = torch.where(best == 0, largest[:, 0] / STEPS[0], best)
    return to_half(best, name)


def to_steps(groups, scale, first, last):
    """The nearest whole multiples of `scale` from `first` to `last`, as floats. A scale of zero gives zeros."""
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (groups * inverse).round_().clamp_(first, last)


def to_half(scale, name):
    """Scales in float16, without a step from a number to zero or infinity."""
    small = (scale != 0) & (scale.abs() < TINY)
    half = torch.where(small, TINY * scale.sign(), scale).to(torch.float16)
    if torch.isinf(half).any():
        raise ValueError(f"{name} holds numbers that are too large for scales in float16")
    return half


def pad_inputs(rows, multiple):
    """Rows (N, K) with zeros behind them, so that K is a multiple."""
    return torch.nn.functional.pad(rows, (0, -rows.size(-1) % multiple))


def ungroup(codes, scale, minimum, bits):
    """Codes uint8 (N, K), scale and minimum float16 (N, K / G) -> the weight, float32 (N, K)."""
    steps = codes.view(*scale.shape, -1).float()  # (N, K / G, G)
    if minimum is None:
        weight = (steps - 2 ** (bits - 1)) * scale.float()[..., None]
    else:
        weight = steps * scale.float()[..., None] + minimum.float()[..., None]
    return weight.view(codes.shape)
