"""
Causal attention (`attend`), and which kernel computes it (`pick_attention`): PyTorch's SDPA, flash-attn where it is
installed, or plain matrix products.

With `keep_apart` the documents in one row do not see each other: by a mask, or by a kernel that skips other documents,
flash-attn's for documents of any length or PyTorch's FlexAttention. This file imports torch and fused.py, and
flash-attn if it is there.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import fused

try:  # optional kernels: pip install flash-attn (CUDA only)
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None

# -----------------------------------------------------------------------------
# Which kernel


def takes_flash(device, dtype, head_dim):
    """Whether flash attention, flash-attn's or SDPA's, runs on this device with this dtype and head size:
    https://github.com/Dao-AILab/flash-attention#nvidia-cuda-support"""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return head_dim <= 256 and head_dim % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)


def shares_heads(device, dtype, head_dim):
    """Whether SDPA takes fewer key heads than query heads without T x T weights. On CUDA only its flash kernel does,
    which takes no mask."""
    return device.type != "cuda" or takes_flash(device, dtype, head_dim)


def pick_attention(attn, device, dtype, T, head_dim, *, docs=False, dropout=0.0, compiling=False):
    """The kernel for config.attn on this device, in this dtype, for T tokens -> ("flash" | "sdpa" | "math", reason)

    With `docs`, documents in one row are kept apart. Then "varlen" (flash-attn on documents of any length, which is
    never compiled) takes the place of "flash", and there is "flex" (PyTorch's FlexAttention, which has to be compiled
    and has no dropout).
    """
    if docs and attn != "math":
        skips = attn != "sdpa" and takes_flash(device, dtype, head_dim)
        if skips and compiling and not dropout and head_dim >= 16:
            return "flex", "compiled, it skips other documents"
        if attn == "flash" and not compiling:
            return "varlen", "asked for"
        if skips and flash_attn_varlen_func is not None and not compiling:
            return "varlen", "flash-attn is installed, and skips other documents"
        if device.type == "cuda" or attn != "auto":
            return "sdpa", "with a mask that hides other documents"
    if attn != "auto":
        return attn, "asked for"
    if flash_attn_func is not None and takes_flash(device, dtype, head_dim):
        # from torch 2.11 on SDPA has its own kernels for Hopper
        release = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if release >= (2, 11) and torch.cuda.get_device_capability(device) == (9, 0):
            return "sdpa", "quicker on this GPU than flash-attn"
        return "flash", "flash-attn is installed"
    if dtype in (torch.float16, torch.bfloat16) and device.type == "cpu" and T <= 512:
        # for more tokens the T x T weights take too much memory
        return "math", "quicker than SDPA's CPU kernel in half precision"
    return "sdpa", "PyTorch picks the kernel"


# -----------------------------------------------------------------------------
# Documents


def positions_within(docs):
    """docs (B, T), numbers that rise in each row -> the position of each token in its document, int64 (B, T)"""
    docs = docs.contiguous()
    first = torch.searchsorted(docs, docs)  # the first place in the row with this number, or a higher one
    return torch.arange(docs.size(1), device=docs.device) - first


class Apart(NamedTuple):
    """What attention needs to keep documents apart: made once in a forward pass, and shared by all layers."""

    kind: str  # pick_attention's choice
    mask: Any = None  # sdpa, math: which keys a query sees, bool (B, 1, T, T); flex: the same as a BlockMask
    begins: torch.Tensor | None = None  # varlen: where documents begin in the B x T tokens, and their end, int32
    longest: int = 0  # varlen: tokens of the longest document


def keep_apart(docs, attn, dtype, head_dim, dropout, compiling):
    """docs (B, T), the number of the document that each token belongs to, rising in a row -> Apart"""
    T = docs.size(1)
    kind, _ = pick_attention(attn, docs.device, dtype, T, head_dim, docs=True, dropout=dropout, compiling=compiling)
    if kind == "varlen":
        first_tokens = (positions_within(docs).flatten() == 0).nonzero()[:, 0]
        begins = F.pad(first_tokens, (0, 1), value=docs.numel()).int()
        return Apart(kind, begins=begins, longest=int(begins.diff().max()))
    same = docs[:, :, None] == docs[:, None, :]  # (B, T, T)
    mask = same.tril()[:, None]
    return Apart(kind, to_block_mask(mask, docs) if kind == "flex" else mask)


def to_block_mask(mask, docs, size=128):
    """Which keys a query sees, bool (B, 1, T, T), from docs (B, T) -> the same as FlexAttention's BlockMask, in blocks
    of size x size: those without such a key are skipped, and only those with some are looked at key by key.

    PyTorch's create_block_mask makes the same, but torch 2.9 does not compile it with a function like `sees`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def sees(b, h, query, key):
        return (key <= query) & (docs[b, key] == docs[b, query])

    def listed(blocks):
        """bool (B, 1, n, n) -> for each row of blocks how many are chosen, and which: their numbers come first"""
        return blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()

    T = docs.size(1)
    n = -(-T // size)
    tiles = F.pad(mask, (0, n * size - T, 0, n * size - T)).view(-1, 1, n, size, n, size)
    some, every = tiles.any(5).any(3), tiles.all(5).all(3)  # (B, 1, n, n)
    return BlockMask.from_kv_blocks(*listed(some & ~every), *listed(every), BLOCK_SIZE=size, mask_mod=sees,
                                    seq_lengths=(T, T))


# -----------------------------------------------------------------------------
# Attention


def attend(q, k, v, attn="auto", dropout=0.0, apart=None):
    """Causal softmax(q k^T / sqrt(D)) v. q (B, T, n_q, D), k and v (B, T, n_kv, D) -> (B, T, n_q, D).

    With `apart` (from keep_apart) a query sees the keys of its own document only.
    """
    if apart is None:
        apart = Apart(pick_attention(attn, q.device, q.dtype, q.size(1), q.size(-1))[0])
    kind, mask = apart.kind, apart.mask
    if kind == "flash":
        return flash_attn_func(q, k, v, dropout_p=dropout, causal=True,
                               deterministic=torch.are_deterministic_algorithms_enabled())
    if kind == "varlen":
        return attend_varlen(q, k, v, apart, dropout)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    if kind == "flex":
        return attend_flex(q, k, v, mask).transpose(1, 2)
    plain = mask is None and not dropout and q.shape == k.shape and q.size(2) <= fused.MOST_KEYS
    if kind == "math" and plain and fused.serves(q):
        return fused.causal_attention(q, k, v).transpose(1, 2)
    group = q.size(1) // k.size(1)  # query heads that share one key/value head
    masked_on_gpu = mask is not None and q.device.type == "cuda"
    if kind == "math" or (group > 1 and (masked_on_gpu or not shares_heads(q.device, q.dtype, q.size(-1)))):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if kind == "math":
        T = q.size(2)
        hidden = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device)
        hidden = hidden.triu(1) if mask is None else torch.where(mask, 0.0, hidden)
        scores = (q * q.size(-1) ** -0.5) @ k.mT + hidden  # (B, n_q, T, T)
        y = F.dropout(scores.softmax(-1), dropout) @ v
    else:
        gqa = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                           enable_gqa=gqa)
    return y.transpose(1, 2)


def attend_varlen(q, k, v, apart, dropout):
    """attend with flash-attn, which takes the documents of all rows one after another."""
    y = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),  # (B * T, heads, D)
        apart.begins, apart.begins, apart.longest, apart.longest, dropout_p=dropout, causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return y.view(q.shape)


def attend_flex(q, k, v, mask):
    """attend with FlexAttention (Dong et al. 2024, arXiv:2412.05496), which compiles to one kernel that skips blocks
    that `mask`, a BlockMask, hides. q (B, n_q, T, D) -> (B, n_q, T, D)

    pick_attention takes it on CUDA only. Compiled on a CPU, torch 2.13 reads keys and values wrongly that are views of
    a larger tensor, as these are."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
