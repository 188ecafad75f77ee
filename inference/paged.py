"""
Attention of one token of each request over keys and values in blocks of a pool (PagedAttention, Kwon et al. 2023,
arXiv:2309.06180), as one Triton kernel: keys and values are read once, where they lie, instead of being gathered first.

A program has one key/value head of one request, and all query heads that share it. It passes over the tokens in pieces,
with the softmax kept up to date on the way (Milakov and Gimelshein 2018, arXiv:1805.02867; FlashAttention). A few
requests alone would leave most of a GPU idle, so the tokens of a long context are split between several programs, whose
results are then joined by their sums (Flash-Decoding, Dao et al. 2023).

attend_blocks in kvcache.py is the reference.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError("this kernel needs triton, which PyTorch for CUDA brings: pip install triton") from None

PIECE = 64      # tokens that a program reads at once; half of it in fp32, as shared memory is small
SHARE = 512     # a program has at least so many tokens of the longest context that the table allows
MOST_SHARES = 16


@triton.jit
def attend(q, keys, values, table, lengths, out, sums, scale, q_row, q_head, out_row, out_head, k_slot, k_head, v_slot,
           v_head, blocks, size, shares, group, dim, PIECE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr):
    """out (B, n_q, shares, D), fp32: the attention over each share of the tokens; sums (B, n_q, shares): the logarithm
    of the sum of its exponentials. GROUP, DIM: group and D as powers of two, of which the rest is masked."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    share = tl.program_id(2)
    length = tl.load(lengths + request)
    span = tl.cdiv(tl.cdiv(length, shares), PIECE) * PIECE
    first = share * span
    end = tl.minimum(first + span, length)

    rows = tl.arange(0, GROUP)
    columns = tl.arange(0, DIM)
    heads = head * group + rows  # the query heads that share the key/value head
    inside = (rows < group)[:, None] & (columns < dim)[None, :]
    query = tl.load(q + request * q_row + heads[:, None] * q_head + columns[None, :], mask=inside, other=0.0)
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    result = tl.zeros((GROUP, DIM), tl.float32)
    for start in range(first, end, PIECE):
        tokens = start + tl.arange(0, PIECE)
        seen = tokens < end
        block = tl.load(table + request * blocks + tokens // size, mask=seen, other=0)
        slot = block.to(tl.int64) * size + tokens % size
        read = seen[:, None] & (columns < dim)[None, :]
        k = tl.load(keys + slot[:, None] * k_slot + head * k_head + columns[None, :], mask=read, other=0.0)
        v = tl.load(values + slot[:, None] * v_slot + head * v_head + columns[None, :], mask=read, other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale  # (GROUP, PIECE), fp32
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)  # 0 for the first piece
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = new_largest
    total = tl.where(first < end, total, 1.0)  # a share without tokens: 0, of weight exp(-inf)
    place = request * out_row + heads * out_head + share * dim
    tl.store(out + place[:, None] + columns[None, :], result / total[:, None], mask=inside)
    tl.store(sums + (request * out_row + heads * out_head) // dim + share, largest + tl.log(total), mask=rows < group)


def paged_attention(q, keys, values, table, lengths):
    """Attention of q (B, n_q, D), one token of each request, over the first `lengths` (B,) int32 tokens (at least 1) in
    the blocks that `table` (B, n) int32 names; keys and values (blocks, size, n_kv, D) in q's dtype, of which any view
    will do whose rows are whole. -> (B, n_q, D)"""
    B, n_q, D = q.shape
    size, n_kv = keys.shape[1:3]
    group = n_q // n_kv
    for name, t in (("q", q), ("keys", keys), ("values", values)):
        assert t.stride(-1) == 1, f"the last dimension of {name} must lie together"
    for t in (keys, values):
        assert t.stride(0) == size * t.stride(1), "the slots of a block must follow those of the block before"
    shares = min(max(table.size(1) * size // SHARE, 1), MOST_SHARES)
    out = torch.empty(B, n_q, shares, D, dtype=torch.float32, device=q.device)
    sums = torch.empty(B, n_q, shares, dtype=torch.float32, device=q.device)
    rows, width = (max(16, 1 << (n - 1).bit_length()) for n in (group, D))  # tl.dot takes 16 and more
    attend[B, n_kv, shares](
        q, keys, values, table.contiguous(), lengths, out, sums, D**-0.5, q.stride(0), q.stride(1), out.stride(0),
        out.stride(1), keys.stride(1), keys.stride(2), values.stride(1), values.stride(2), table.size(1), size, shares,
        group, D, PIECE=PIECE // (q.element_size() // 2), GROUP=rows, DIM=width,
    )
    if shares == 1:
        return out[:, :, 0].to(q.dtype)
    return (torch.softmax(sums, -1)[..., None] * out).sum(2).to(q.dtype)


# An operator of PyTorch, so that a compiled step keeps it as it is
OPERATORS = torch.library.Library("minichat", "FRAGMENT")
OPERATORS.define("paged_attention(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor lengths) -> Tensor")
OPERATORS.impl("paged_attention", paged_attention, "CUDA")


@torch.library.register_fake("minichat::paged_attention", lib=OPERATORS)
def paged_attention_shape(q, keys, values, table, lengths):
    return q.new_empty(q.shape)
