"""
Matrix products in FP8: training with Float8Linear, and the same products for inference (inference/quantize.py).

Each product takes two matrices of 8-bit floats, each with one fp32 scale, and sums in fp32 (torch._scaled_mm). Weights
and activations are e4m3 (4 bits of exponent, 3 of mantissa, up to 448), gradients e5m2, which reaches further (57344)
and is coarser (Micikevicius et al. 2022, arXiv:2209.05433). A tensor's scale is its largest magnitude divided by that
of the format, computed again for each product (tensorwise dynamic scaling, as in torchao.float8 and nanochat). A cast
saturates: torch's own gives infinity or NaN for what is too large, by format and version.

A GPU needs compute capability 8.9 (Ada, Hopper, Blackwell). On a CPU the same values are multiplied in fp32: as exact,
and slower than no FP8. torch has such an emulation too, a thousand times slower still; the tests compare with it.

`convert_to_float8_training` is surgery from outside: parameters keep names, dtype and optimizer, checkpoints stay as
they are. Measured figures are in docs/measured.md.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

E4M3 = torch.float8_e4m3fn  # weights and activations
E5M2 = torch.float8_e5m2    # gradients
UNIT = 16                   # _scaled_mm takes matrices whose sides are multiples of it
LEAST = (8, 9)              # compute capability of the first GPUs that multiply FP8


def check_device(device):
    """Raises ValueError if FP8 cannot be multiplied on this device."""
    if device.type == "cpu":
        return
    mend = "leave fp8 out there, or --device=cpu emulates it"
    if device.type != "cuda" or torch.version.hip:
        kind = "AMD GPUs" if torch.version.hip else device.type
        raise ValueError(f"fp8 runs on NVIDIA GPUs and, emulated, on a CPU, not on {kind}: {mend}")
    capability = torch.cuda.get_device_capability(device)
    if tuple(capability) < LEAST:
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), and "
                         f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: {mend}")


# -----------------------------------------------------------------------------
# Casts and products


def largest(dtype):
    """The largest finite number of a format."""
    return torch.finfo(dtype).max


def scale_for(amax, dtype):
    """Largest magnitude, a tensor -> the scale, fp32, that brings it to the largest number of `dtype`. That of zeros
    is the smallest normal number, so nothing is divided by zero."""
    return (amax.float() / largest(dtype)).clamp(min=torch.finfo(torch.float32).tiny)


def cast(x, scale, dtype):
    """x / scale as FP8, saturated. NaN stays NaN; infinity becomes the largest number unless the scale is infinite."""
    most = largest(dtype)
    return (x.float() / scale).clamp(-most, most).to(dtype)


def to_float8(x, dtype):
    """-> (x as FP8, its dynamic scale, 0-dim fp32). An infinity or a NaN in x makes every number of a product with it
    NaN, so that the guards see it (training/guard.py)."""
    scale = scale_for(x.detach().abs().amax(), dtype)
    return cast(x, scale, dtype), scale


TABLES = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float() for dtype in (E4M3, E5M2)}


def values(x8):
    """FP8 on a CPU -> the same numbers in fp32; fp32 stays. torch's own conversion takes five times as long."""
    if x8.dtype == torch.float32:
        return x8
    codes = x8.contiguous().view(torch.uint8).flatten().int()
    return TABLES[x8.dtype].index_select(0, codes).view(x8.shape)


def product(a8, b8, scale_a, scale_b, dtype, fast=False):
    """FP8 matrices a8 (N, K) and b8 (K, M), times their scales -> (N, M) in `dtype`, summed in fp32.

    On a GPU a8 lies in rows and b8 in columns (in_columns), and K and M are multiples of 16. fast: with fewer bits in
    the sums on Hopper, as torchao and nanochat do it in the forward pass. On a CPU either may be fp32 already.
    """
    if a8.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # it would round the sums to its dtype before they are scaled
            return (torch.mm(values(a8), values(b8)) * (scale_a * scale_b)).to(dtype)
    return torch._scaled_mm(a8, b8, scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)


def in_columns(x8):
    """The same matrix with its columns contiguous."""
    return x8.t().contiguous().t()


def fits(linear):
    """Whether both sides of a layer's weight are multiples of 16."""
    return linear.in_features % UNIT == 0 and linear.out_features % UNIT == 0


def product_dtype(x):
    """The dtype that a linear layer's result has: autocast's within autocast, otherwise x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# -----------------------------------------------------------------------------
# Training


class Float8Product(torch.autograd.Function):
    """x (N, K) and weight (M, K) -> x weight^T (N, M) in `dtype`; N, K and M are multiples of 16. For the backward pass
    it keeps x in FP8, a byte a number, and the weight itself, which ZeRO may free in between."""

    @staticmethod
    def forward(ctx, x, weight, dtype):
        x8, x_scale = to_float8(x, E4M3)
        weight8, weight_scale = to_float8(weight, E4M3)
        ctx.save_for_backward(x8, x_scale, weight, weight_scale)
        ctx.x_dtype = x.dtype
        return product(x8, weight8.t(), x_scale, weight_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):
        x8, x_scale, weight, weight_scale = ctx.saved_tensors
        grad8, grad_scale = to_float8(grad, E5M2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight8 = cast(weight, weight_scale, E4M3)  # again: cheaper than a copy that waits
            grad_x = product(grad8, in_columns(weight8), grad_scale, weight_scale, ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = product(grad8.t().contiguous(), in_columns(x8), grad_scale, x_scale, weight.dtype)
        return grad_x, grad_weight, None


class Float8Linear(nn.Linear):
    """nn.Linear whose three products, one forward and two backward, are in FP8. Its weight keeps its dtype and is cast
    for each. (..., in) -> (..., out), in autocast's dtype within autocast, otherwise in x's."""

    def forward(self, x):
        rows = x.reshape(-1, self.in_features)  # (N, in)
        count = len(rows)
        if count % UNIT:  # rows of zeros change neither a scale nor a gradient
            rows = F.pad(rows, (0, 0, 0, -count % UNIT))
        y = Float8Product.apply(rows, self.weight, product_dtype(x))[:count]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


def float8_layers(model, ends=True):
    """The linear layers of a GPT's blocks that can be in FP8: name -> layer. ends=False: without those of the first and
    the last block, whose rounding does the most harm. The head is not among them: its loss is a product of its own
    (cross_entropy.py), and it decides the logits."""
    layers = {}
    count = len(model.transformer.h)
    for name, module in model.named_modules():
        _, is_in_block, place = name.partition("transformer.h.")
        if not is_in_block or not isinstance(module, nn.Linear) or not fits(module):
            continue
        if ends or 0 < int(place.partition(".")[0]) < count - 1:
            layers[name] = module
    return layers


def convert_to_float8_training(model, ends=True):
    """Replace the layers of `float8_layers` by Float8Linear, in place, with the same parameters. Do it before the model
    is placed on ranks and compiled. -> their names. Raises ValueError if there is none."""
    layers = float8_layers(model, ends)
    if not layers:
        why = f"no linear layer has sides that are multiples of {UNIT}"
        if not ends:
            why += ", or only the first and the last block have some: fp8_ends=true takes these too"
        raise ValueError(f"fp8: {why}")
    for name, linear in layers.items():
        with torch.device("meta"):
            float8 = Float8Linear(linear.in_features, linear.out_features, linear.bias is not None)
        float8.weight = linear.weight
        float8.bias = linear.bias
        float8.train(linear.training)
        model.set_submodule(name, float8)
    return list(layers)
