"""
The small operations of a training step, each in one pass over memory on a CPU, forward and backward (fused.cpp):

    rms_norm(x, eps)                   RMSNorm without gain
    relu_squared(h)                    relu(h)^2
    split_heads(qkv, ...)              queries, keys and values: normalised, rotated, head by head
    causal_attention(q, k, v)          softmax(q k^T / sqrt(D)) v as two products of matrices
    softmax_gradient_(logits, ...)     cross-entropy and its gradient

PyTorch takes three to ten passes for each of them and its gradient. torch.compile fuses them too, but takes longer to
compile than a short run lasts. Where the kernels do not serve, `serves` is false, and model.py and attention.py compute
the same in PyTorch: on another device, in float16, without a gradient to come, within torch.compile, for a DTensor, or
without a C++ compiler. This file imports torch and native.py alone.
"""

import ctypes
import functools
from pathlib import Path

import torch

import native

SOURCE = Path(__file__).with_name("fused.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
MOST_CHANNELS = 256  # of a head: fused.cpp's MOST
MOST_KEYS = 512  # of causal_attention: fused.cpp's. For more tokens the T x T weights take too much memory

Pointer = ctypes.c_void_p
Int = ctypes.c_int64
Float = ctypes.c_double


class Heads(ctypes.Structure):
    """fused.cpp's Heads."""

    _fields_ = [("B", Int), ("T", Int), ("n_q", Int), ("n_kv", Int), ("D", Int), ("cosines", Pointer),
                ("sines", Pointer), ("eps", ctypes.c_float), ("normalised", Int)]


@functools.cache
def library():
    """fused.cpp, compiled, or None."""
    found = native.load(SOURCE)[0]
    if found is None:
        return None
    found.rms_norm.argtypes = [Pointer, Pointer, Pointer, Int, Int, Float, Int, Int, Int]
    found.rms_norm_backward.argtypes = [Pointer, Pointer, Pointer, Pointer, Int, Int, Int, Int, Int]
    found.relu_squared.argtypes = [Pointer, Pointer, Int, Int, Int]
    found.relu_squared_backward.argtypes = [Pointer, Pointer, Pointer, Int, Int, Int]
    found.split_heads.argtypes = [Pointer] * 6 + [Int, Int]
    found.split_heads_backward.argtypes = [Pointer] * 7 + [Int, Int]
    found.softmax_gradient.argtypes = [Pointer, Pointer, Pointer, Int, Int, Int, Float, Int, Int]
    found.causal_softmax.argtypes = [Pointer, Int, Int, Float, Int, Int]
    found.causal_softmax_backward.argtypes = [Pointer, Pointer, Int, Int, Float, Int, Int]
    return found


def trouble():
    """Why the kernels do not run here, in words; empty if they do."""
    return native.load(SOURCE)[1]


def serves(x):
    """Whether the kernels take this tensor here and now."""
    if x.device.type != "cpu" or x.dtype not in TYPES or not torch.is_grad_enabled() or not x.requires_grad:
        return False
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") not in TYPES:
        return False
    return library() is not None


def product_dtype(x):
    """The dtype in which the next matrix product takes its input: autocast's, or x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# -----------------------------------------------------------------------------


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, dtype):
        x = x.contiguous()
        n = x.size(-1)
        rows = x.numel() // n
        y = torch.empty_like(x, dtype=dtype)
        scale = torch.empty(rows)
        library().rms_norm(x.data_ptr(), y.data_ptr(), scale.data_ptr(), rows, n, eps, TYPES[x.dtype], TYPES[dtype],
                           torch.get_num_threads())
        ctx.save_for_backward(x, scale)
        return y

    @staticmethod
    def backward(ctx, g):
        x, scale = ctx.saved_tensors
        g = g.contiguous()
        gx = torch.empty_like(x)
        library().rms_norm_backward(g.data_ptr(), x.data_ptr(), scale.data_ptr(), gx.data_ptr(), len(scale), x.size(-1),
                                    TYPES[x.dtype], TYPES[g.dtype], torch.get_num_threads())
        return gx, None, None


def rms_norm(x, eps, dtype=None):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in `dtype` or that of the next product. (..., n) -> (..., n)
    """
    return RMSNorm.apply(x, eps, dtype or product_dtype(x))


# -----------------------------------------------------------------------------


class ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        h = h.contiguous()
        y = torch.empty_like(h)
        library().relu_squared(h.data_ptr(), y.data_ptr(), h.numel(), TYPES[h.dtype], torch.get_num_threads())
        ctx.save_for_backward(h)
        return y

    @staticmethod
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        g = g.to(h.dtype).contiguous()
        gh = torch.empty_like(h)
        library().relu_squared_backward(g.data_ptr(), h.data_ptr(), gh.data_ptr(), h.numel(), TYPES[h.dtype],
                                        torch.get_num_threads())
        return gh


def relu_squared(h):
    """relu(h)^2. (...) -> (...)"""
    return ReluSquared.apply(h)


# -----------------------------------------------------------------------------


class SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_q, n_kv, rope, eps, normalised):
        qkv = qkv.contiguous()
        B, T, width = qkv.shape
        D = width // (n_q + 2 * n_kv)
        ctx.rope = rope and [table.float().contiguous() for table in rope]
        cosines, sines = [table.data_ptr() for table in ctx.rope] if rope else (None, None)
        ctx.heads = Heads(B, T, n_q, n_kv, D, cosines, sines, eps, normalised)
        q = qkv.new_empty(B, n_q, T, D)
        k = qkv.new_empty(B, n_kv, T, D)
        v = qkv.new_empty(B, n_kv, T, D)
        scale = torch.empty(B * T * (n_q + n_kv) if normalised else 0)
        library().split_heads(ctypes.byref(ctx.heads), qkv.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
                              scale.data_ptr(), TYPES[qkv.dtype], torch.get_num_threads())
        ctx.save_for_backward(qkv if normalised else None, scale)  # the gradient of a rotation needs no values
        return q, k, v

    @staticmethod
    def backward(ctx, gq, gk, gv):
        qkv, scale = ctx.saved_tensors
        gq, gk, gv = gq.contiguous(), gk.contiguous(), gv.contiguous()
        heads = ctx.heads
        g = gq.new_empty(heads.B, heads.T, (heads.n_q + 2 * heads.n_kv) * heads.D)
        values = g if qkv is None else qkv
        library().split_heads_backward(ctypes.byref(heads), gq.data_ptr(), gk.data_ptr(), gv.data_ptr(),
                                       values.data_ptr(), scale.data_ptr(), g.data_ptr(), TYPES[g.dtype],
                                       torch.get_num_threads())
        return g, None, None, None, None, None


def split_heads(qkv, n_q, n_kv, rope, eps, normalised):
    """qkv (B, T, (n_q + 2 n_kv) D) -> queries (B, T, n_q, D), keys and values (B, T, n_kv, D), in memory head by head

    With `normalised`, queries and keys are divided by their root mean square; `rope` (cosines, sines), each (T, 1, D)
    fp32, then rotates them as model.apply_rope does.
    """
    q, k, v = SplitHeads.apply(qkv, n_q, n_kv, rope, eps, normalised)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


# -----------------------------------------------------------------------------


class CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        T, D = q.shape[-2:]
        probabilities = torch.matmul(q, k.mT)  # scores (B, H, T, T)
        library().causal_softmax(probabilities.data_ptr(), probabilities.numel() // T**2, T, D**-0.5, TYPES[q.dtype],
                                 torch.get_num_threads())
        ctx.save_for_backward(q, k, v, probabilities)
        return torch.matmul(probabilities, v)

    @staticmethod
    def backward(ctx, g):
        q, k, v, probabilities = ctx.saved_tensors
        T, D = q.shape[-2:]
        g = g.contiguous()
        scores = torch.matmul(g, v.mT)
        library().causal_softmax_backward(scores.data_ptr(), probabilities.data_ptr(), scores.numel() // T**2, T,
                                          D**-0.5, TYPES[q.dtype], torch.get_num_threads())
        return torch.matmul(scores, k), torch.matmul(scores.mT, q), torch.matmul(probabilities.mT, g)


def causal_attention(q, k, v):
    """Causal softmax(q k^T / sqrt(D)) v of q, k, v (B, H, T, D) -> (B, H, T, D), in the dtype of the products"""
    dtype = product_dtype(q)
    return CausalAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype))


# -----------------------------------------------------------------------------


def has_softmax_gradient(logits):
    """Whether softmax_gradient_ takes these logits. cross_entropy.py asks within its operator, where no gradient is."""
    return logits.device.type == "cpu" and logits.dtype in TYPES and library() is not None


def softmax_gradient_(logits, targets, vocab_size, softcap):
    """Turn logits (N, padded vocabulary), in place, into the gradient of their summed loss. targets (N,), ids.
    -> the loss of each row, fp32 (N,)"""
    losses = torch.empty(len(logits))
    targets = targets.long().contiguous()
    library().softmax_gradient(logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), *logits.shape, vocab_size,
                               softcap, TYPES[logits.dtype], torch.get_num_threads())
    return losses
