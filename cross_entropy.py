"""
The loss of a large vocabulary, without its logits.

In fp32 GPT-2's logits take 201 kB a token: 13 GB for 64 x 1,024 tokens, and their gradient takes as much again.
linear_cross_entropy takes the last hidden states and the table, and computes the loss together with both gradients. It
works on a few rows at a time: it computes their logits, turns these in place into their gradient, multiplies that with
the table and the hidden states, and overwrites it with the logits of the next rows. Nothing is computed twice. Only the
two gradients are kept for the backward pass, which scales them (Liger Kernel, Hsu et al. 2024, arXiv:2410.10989; Cut
Cross-Entropy, Wijmans et al. 2024, arXiv:2411.09009).

Autograd, torch.compile and DDP see one operator, so every layout of parallel.py computes the same thing. This file
imports torch and fused.py alone.
"""

import functools

import torch
from torch import Tensor

import fused

# How many logits are held at once, by type of device; twice as many of bfloat16 where a CPU's kernel (fused.py) needs
# no copy of them in fp32. A GPU's matrix products want a few thousand rows: 2,668 rows (with GPT-2's vocabulary) x 768
# are 126 tiles of 128 x 128, for the 132 multiprocessors of an H100. The GPU's number is computed, not measured.
PIECE = {"cpu": 2**25, "cuda": 2**27}


def linear_cross_entropy(x, table, targets, vocab_size, softcap=0.0, fuse=None, piece=0):
    """Cross-entropy of the logits x table^T against targets, summed, in nats -> a scalar, fp32.

    x (N, C) hidden states; table (padded vocabulary, C), whose rows from `vocab_size` on only pad it; targets (N,) ids,
    -1 where there is nothing to predict. With softcap the logits are softcap * tanh(logits / softcap). Matrix products
    are computed in autocast's dtype, otherwise in x's; the softmax, the sum and the table's gradient in fp32.

    fuse: compile the operations between the products; None: only within torch.compile on CUDA (PyTorch's own softmax is
    faster on a CPU). piece: how many logits are held at once; 0: as PIECE says.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    gradients = torch.is_grad_enabled() and (x.requires_grad or table.requires_grad)
    if fuse is None:
        fuse = kind == "cuda" and torch.compiler.is_compiling()
    return loss_and_gradients(x, table, targets, vocab_size, softcap, dtype, gradients, fuse, piece)[0]


def rows_at_once(padded_vocab_size, kind, softcap=0.0, piece=0, dtype=torch.float32):
    """How many rows of logits are held at once on a device of this type."""
    piece = piece or PIECE.get(kind, PIECE["cpu"])
    rows = piece // padded_vocab_size
    if kind == "cpu" and dtype == torch.bfloat16 and fused.library() is not None:
        rows = rows * 2
    if softcap:
        rows = rows // 2  # the slope of the soft-cap takes as much memory again
    return max(1, rows)


@torch.library.custom_op("minichat::linear_cross_entropy", mutates_args=())
def loss_and_gradients(x: Tensor, table: Tensor, targets: Tensor, vocab_size: int, softcap: float, dtype: torch.dtype,
                       gradients: bool, fuse: bool, piece: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> (summed loss, gradient of x (N, C), gradient of the table). Without `gradients` the last two are empty.
    `dtype`: of the matrix products."""
    turn_into_gradient = compiled() if fuse else logits_to_gradient_
    with torch.autocast(x.device.type, enabled=False):
        weight = table.to(dtype)
        pieces = -(-len(x) // rows_at_once(len(table), x.device.type, softcap, piece, dtype))
        rows = -(-len(x) // pieces)  # of each piece; the last one may have fewer
        buffer = torch.empty(rows, len(table), dtype=dtype, device=x.device)
        loss = torch.zeros((), dtype=at_least_fp32(dtype), device=x.device)
        grad_x = x.new_empty(0)
        grad_table = table.new_empty(0)
        if gradients:
            grad_x = torch.empty_like(x)
            grad_table = torch.empty_like(table, dtype=at_least_fp32(table.dtype))
        for first in range(0, len(x), rows):
            xs = x[first : first + rows].to(dtype)  # (rows, C)
            ts = targets[first : first + rows]  # (rows,)
            counts = ts != -1
            logits = torch.mm(xs, weight.T, out=buffer[: len(xs)])  # (rows, padded vocabulary)
            loss += turn_into_gradient(logits, ts.clamp(min=0), counts, vocab_size, softcap)
            if gradients:  # by now the buffer holds the gradient of these logits
                counts = counts[:, None].to(dtype)
                grad_x[first : first + rows] = (logits @ weight) * counts
                add_product(grad_table, logits.T, xs * counts, begin=first == 0)
    return loss, grad_x, grad_table.to(table.dtype)


@loss_and_gradients.register_fake
def _(x, table, targets, vocab_size, softcap, dtype, gradients, fuse, piece):
    """Shapes and dtypes of the results: torch.compile asks for no more."""
    loss = x.new_empty((), dtype=at_least_fp32(dtype))
    if not gradients:
        return loss, x.new_empty(0), table.new_empty(0)
    return loss, torch.empty_like(x), torch.empty_like(table)


def save_gradients(ctx, inputs, output):
    _, grad_x, grad_table = output
    ctx.mark_non_differentiable(grad_x, grad_table)
    ctx.save_for_backward(grad_x, grad_table)


def scale_gradients(ctx, grad, *_):
    """The backward pass; `grad` is the gradient of the summed loss, a scalar. It scales in place, because the table's
    gradient is as large as the table. Where torch.compile traces this, it plans the memory itself."""
    grad_x, grad_table = ctx.saved_tensors
    if torch.compiler.is_compiling():
        scaled = grad_x * grad, grad_table * grad
    else:
        scaled = grad_x.mul_(grad), grad_table.mul_(grad)
    return *scaled, *[None] * 7  # the other seven arguments have no gradient


loss_and_gradients.register_autograd(scale_gradients, setup_context=save_gradients)


def logits_to_gradient_(logits, targets, counts, vocab_size, softcap):
    """Turn logits (N, padded vocabulary), in place, into the gradient of their summed loss, softmax - one-hot. -> loss

    targets (N,) are token ids. Rows whose `counts` (N,) is false add nothing to the loss; the caller drops their
    gradient.
    """
    if fused.has_softmax_gradient(logits):
        losses = fused.softmax_gradient_(logits, targets, vocab_size, softcap)
        return torch.where(counts, losses, 0.0).sum()
    work = logits.to(at_least_fp32(logits.dtype))  # fp32 logits: the same tensor
    at_target = torch.arange(len(work), device=work.device), targets
    if softcap:
        work.div_(softcap).tanh_()
        slope = work.square().neg_().add_(1)  # of tanh: 1 - tanh^2
        work.mul_(softcap)
    work[:, vocab_size:] = float("-inf")
    torch.log_softmax(work, -1, out=work)  # in place: the kernel reads each element before it writes it
    log_probability = work[at_target]  # (N,)
    loss = -torch.where(counts, log_probability, 0.0).sum()
    work.exp_()
    work[at_target] = torch.expm1(log_probability)  # probability - 1
    if softcap:
        work.mul_(slope)
    logits.copy_(work)
    return loss


def fused_logits_to_gradient_(logits, targets, counts, vocab_size, softcap):
    """The same for torch.compile, which makes one kernel of it: it has only sums over rows, and reads no element by
    index that the kernel may have overwritten."""
    z = logits.to(at_least_fp32(logits.dtype))
    if softcap:
        tanh = torch.tanh(z / softcap)
        z = softcap * tanh
    column = torch.arange(logits.size(1), device=logits.device)
    z = torch.where(column < vocab_size, z, float("-inf"))
    one_hot = column == targets[:, None]
    log_sum = torch.logsumexp(z, -1, keepdim=True)  # (N, 1)
    log_probability = torch.where(one_hot, z, 0.0).sum(-1) - log_sum[:, 0]
    loss = -torch.where(counts, log_probability, 0.0).sum()
    gradient = torch.exp(z - log_sum) - one_hot.to(z.dtype)
    if softcap:
        gradient = gradient * (1 - tanh * tanh)
    logits.copy_(gradient)
    return loss


def add_product(total, a, b, begin):
    """total += a b, in fp32 or wider; for the first piece (`begin`) total = a b."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0.0 if begin else 1.0, out=total)
    elif begin:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def at_least_fp32(dtype):
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def compiled():
    """fused_logits_to_gradient_ as one kernel, for any number of rows."""
    fused = torch.compile(fused_logits_to_gradient_)

    def run(logits, targets, counts, vocab_size, softcap):
        for tensor in (logits, targets, counts):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fused(logits, targets, counts, vocab_size, softcap)

    return run
