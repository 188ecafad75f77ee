"""
The loss of a large vocabulary, without its logits.

In fp32 GPT-2's logits take 201 kB a token: 13 GB for 64 x 1,024 tokens, and their gradient as much again. Here the last
hidden states and the table go in, and the loss comes out together with both gradients. For some rows at a time the
logits are made, turned into their own gradient in the same memory, multiplied, and overwritten by those of the next
rows. Nothing is computed twice. Only the two gradients are kept for the backward pass, which scales them (Liger Kernel,
Hsu et al. 2024, arXiv:2410.10989; Cut Cross-Entropy, Wijmans et al. 2024, arXiv:2411.09009).

It is one operator to autograd, to torch.compile and to DDP, so every layout of parallel.py computes the same thing.
It imports torch alone.
"""

import functools

import torch
from torch import Tensor

# Logits that are held at once, by type of device. A CPU gains nothing by more. A GPU's products want some thousand
# rows: 2,668 (GPT-2's vocabulary) x 768 are 126 tiles of 128 x 128, for the 132 multiprocessors of an H100. Not
# measured on one.
PIECE = {"cpu": 2**25, "cuda": 2**27}


def linear_cross_entropy(x, table, targets, vocab_size, softcap=0.0, fuse=None, piece=0):
    """Cross-entropy of the logits x table^T against targets, summed, in nats.

    x (N, C) hidden states; table (padded vocabulary, C), whose rows from `vocab_size` on are no tokens; targets (N,)
    ids, -1 where there is nothing to predict. With softcap the logits are softcap * tanh(logits / softcap). Products
    are made in autocast's dtype, or else x's; the softmax, the sum and the table's gradient in fp32.

    fuse: whether the operations between the products are compiled; none: within torch.compile on CUDA (a CPU is
    quicker with PyTorch's own softmax). piece: logits held at once; 0: PIECE's. -> a scalar, fp32
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    gradients = torch.is_grad_enabled() and (x.requires_grad or table.requires_grad)
    if fuse is None:
        fuse = kind == "cuda" and torch.compiler.is_compiling()
    return loss_and_gradients(x, table, targets, vocab_size, softcap, dtype, gradients, fuse, piece)[0]


def rows_at_once(padded_vocab_size, kind, softcap=0.0, piece=0):
    """Rows whose logits are held at once on a device of this type. A soft-cap's slope takes as much room again."""
    piece = piece or PIECE.get(kind, PIECE["cpu"])
    return max(1, piece // padded_vocab_size // (2 if softcap else 1))


@torch.library.custom_op("minichat::linear_cross_entropy", mutates_args=())
def loss_and_gradients(x: Tensor, table: Tensor, targets: Tensor, vocab_size: int, softcap: float, dtype: torch.dtype,
                       gradients: bool, fuse: bool, piece: int) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, its gradient with respect to x (N, C), and that with respect to the table (empty ones without
    `gradients`). `dtype` is that of the products."""
    turn_into_gradient = compiled() if fuse else logits_to_gradient_
    with torch.autocast(x.device.type, enabled=False):
        weight = table.to(dtype)
        pieces = -(-len(x) // rows_at_once(len(table), x.device.type, softcap, piece))
        rows = -(-len(x) // pieces)  # in each piece; the last one may have fewer
        buffer = torch.empty(rows, len(table), dtype=dtype, device=x.device)
        loss = torch.zeros((), dtype=at_least_fp32(dtype), device=x.device)
        grad_x = torch.empty_like(x) if gradients else x.new_empty(0)
        grad_table = torch.empty_like(table, dtype=at_least_fp32(table.dtype)) if gradients else table.new_empty(0)
        for first in range(0, len(x), rows):
            xs, ts = x[first : first + rows].to(dtype), targets[first : first + rows]
            counts = ts != -1
            logits = torch.mm(xs, weight.T, out=buffer[: len(xs)])  # (rows, padded vocabulary)
            loss += turn_into_gradient(logits, ts.clamp(min=0), counts, vocab_size, softcap)
            if gradients:
                counts = counts[:, None].to(dtype)
                grad_x[first : first + rows] = (logits @ weight) * counts
                add_product(grad_table, logits.T, xs * counts, begin=first == 0)
    return loss, grad_x, grad_table.to(table.dtype)


@loss_and_gradients.register_fake
def _(x, table, targets, vocab_size, softcap, dtype, gradients, fuse, piece):
    grad_x, grad_table = (torch.empty_like(t) if gradients else t.new_empty(0) for t in (x, table))
    return x.new_empty((), dtype=at_least_fp32(dtype)), grad_x, grad_table


def save_gradients(ctx, inputs, output):
    _, grad_x, grad_table = output
    ctx.mark_non_differentiable(grad_x, grad_table)
    ctx.save_for_backward(grad_x, grad_table)


def scale_gradients(ctx, grad, *_):
    """`grad` is that of the summed loss, a scalar. In place, as the table's gradient is as large as the table; where
    torch.compile traces this, it plans the memory."""
    grad_x, grad_table = ctx.saved_tensors
    if torch.compiler.is_compiling():
        scaled = grad_x * grad, grad_table * grad
    else:
        scaled = grad_x.mul_(grad), grad_table.mul_(grad)
    return *scaled, *[None] * 7


loss_and_gradients.register_autograd(scale_gradients, setup_context=save_gradients)


def logits_to_gradient_(logits, targets, counts, vocab_size, softcap):
    """Logits (N, padded vocabulary) become, in place, the gradient of the summed loss: softmax - one-hot. -> the loss

    targets (N,) are token ids; of a row that does not count (N,) the loss is 0, and the caller drops its gradient.
    """
    work = logits.to(at_least_fp32(logits.dtype))  # in fp32 the same tensor
    at_target = torch.arange(len(work), device=work.device), targets
    if softcap:
        work.div_(softcap).tanh_()
        slope = work.square().neg_().add_(1)  # of tanh
        work.mul_(softcap)
    work[:, vocab_size:] = float("-inf")
    torch.log_softmax(work, -1, out=work)  # the kernel reads an element before it writes that element
    log_probability = work[at_target]  # (N,)
    loss = -torch.where(counts, log_probability, 0.0).sum()
    work.exp_()
    work[at_target] = torch.expm1(log_probability)  # probability - 1
    if softcap:
        work.mul_(slope)
    logits.copy_(work)
    return loss


def fused_logits_to_gradient_(logits, targets, counts, vocab_size, softcap):
    """The same for torch.compile, which makes one kernel of it: only sums over a row, and no element is looked up that
    the kernel may have overwritten."""
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
    """total += a b; for the first piece (`begin`) total = a b. The total is in fp32 or wider."""
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
