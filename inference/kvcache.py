"""
The key-value cache of inference: where the keys and values of each request lie, and attention over them.

Keys and values of all requests lie in one pool, in blocks of a few tokens (PagedAttention, Kwon et al. 2023,
arXiv:2309.06180). Blocks knows which blocks are in use, a BlockTable lists the blocks of one request. For a step of the
engine (infer.py) the model gets one of two caches:

- StepCache: any number of tokens of each request. Attention runs for one request after another, without a copy where
  the blocks of a request are neighbours.
- DecodeCache: one token of each request. Attention runs for all of them at once, over a table of blocks, in shapes that
  do not depend on the requests. So the pass can be compiled (inference/compiled.py), and on CUDA a graph of it be
  replayed: inference/batch.py has the tensors for that, which are filled before each step.
"""

import hashlib
import importlib
import importlib.util
import itertools
from array import array
from collections import OrderedDict, deque
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attention import takes_flash
from inference import kernels

try:  # optional kernels: pip install flash-attn (CUDA only)
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

# -----------------------------------------------------------------------------
# The memory


def block_digest(parent, tokens):
    """The digest of a full block: it stands for its `tokens` and all before them. parent: that of the block before, or
    b"" for the first. -> bytes

    A block is shared by its digest alone, without a look at its tokens, so two texts must never have the same: one talk
    would continue another. Python's hash has 64 bits, and a user could choose prompts that collide. With 256 bits of
    BLAKE2b (RFC 7693) nobody can, and chance will not.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=32).digest()


def block_digests(tokens, size):
    """The digests of all full blocks of `size` tokens. -> list"""
    digests = []
    parent = b""
    for end in range(size, len(tokens) + 1, size):
        parent = block_digest(parent, tokens[end - size : end])
        digests.append(parent)
    return digests


class Blocks:
    """Which blocks of the pool are in use, and which tokens' keys and values they hold.

    A full block is known by its digest, so that a request whose tokens begin alike uses it too, instead of reading them
    again. Without a user it counts as free, but stays known until its room is needed: the least recently used goes
    first. A block goes before the one in front of it, as it cannot be found without that one.

    in_a_row: forget known blocks, if need be, so that a request gets neighbours. A pool that has been in use for a
    while is full of known blocks, and scattered ones are copied in each step of a CPU.
    """

    def __init__(self, count, in_a_row=False):
        self.in_a_row = in_a_row
        self.users = [0] * count  # requests that use each block
        self.free = count  # blocks without a user, known ones among them
        self.block_of = {}  # digest -> the block known by it
        self.digest_of = {}  # block -> its digest; None: in use since before `forget`, and never to be known
        self.idle = OrderedDict()  # the known blocks without a user, the least recently used first

    def allocate(self, count, after=None):
        """Reserve `count` blocks for one request. -> list

        Neighbours if possible, as a view then needs no copy: empty blocks, best those behind the request's block
        `after`, or else the row whose last use is longest ago. Without neighbours: empty blocks, then the least
        recently used.
        """
        assert count <= self.free, "more blocks asked for than are free"
        chosen = self.empty_neighbours(count, after)
        if chosen is None and self.in_a_row:
            chosen = self.oldest_neighbours(count)
        if chosen is None:
            empty = [i for i in range(len(self.users)) if self.is_empty(i)]
            chosen = sorted((empty + list(self.idle))[:count])
        for i in chosen:
            if i in self.idle:
                del self.idle[i]
                del self.block_of[self.digest_of.pop(i)]
            self.users[i] = 1
        self.free -= count
        return chosen

    def is_empty(self, block):
        """Whether a block has no user and is not known."""
        return not self.users[block] and block not in self.digest_of

    def empty_neighbours(self, count, after):
        """`count` empty blocks in a row: those behind `after` if they are empty, else the first such row, or None."""
        if after is not None and after + count < len(self.users):
            following = list(range(after + 1, after + 1 + count))
            if all(self.is_empty(i) for i in following):
                return following
        run = 0
        for i in range(len(self.users)):
            run = run + 1 if self.is_empty(i) else 0
            if run == count:
                return list(range(i + 1 - count, i + 1))
        return None

    def oldest_neighbours(self, count):
        """`count` blocks in a row without a user, known or not: the row whose last use is longest ago, or None."""
        last_use = dict.fromkeys(range(len(self.users)), -1)  # -1: of an empty block
        last_use.update((block, age) for age, block in enumerate(self.idle))
        best = None
        latest = deque()  # the blocks of the row that may decide: each was used after those behind it
        first = 0
        for i, users in enumerate(self.users):
            if users:
                first = i + 1
                latest.clear()
                continue
            while latest and last_use[latest[-1]] <= last_use[i]:
                latest.pop()
            latest.append(i)
            if latest[0] <= i - count:
                latest.popleft()
            if i + 1 - first >= count and (best is None or last_use[latest[0]] < best[0]):
                best = last_use[latest[0]], i
        return None if best is None else list(range(best[1] + 1 - count, best[1] + 1))

    def share(self, digests):
        """Use the blocks known by `digests`, up to the first that is not known. -> list"""
        shared = []
        for digest in digests:
            block = self.block_of.get(digest)
            if block is None:
                break
            if not self.users[block]:
                del self.idle[block]
                self.free -= 1
            self.users[block] += 1
            shared.append(block)
        return shared

    def publish(self, digest, block):
        """Let other requests share `block`, which is full and will not change. One block is known by each digest."""
        if digest not in self.block_of and block not in self.digest_of:
            self.block_of[digest] = block
            self.digest_of[block] = digest

    def release(self, blocks, digests=()):
        """A request no longer uses these blocks. `digests`: of its full blocks, which come first.

        The last block comes first, so each becomes idle before the one in front of it. Of two equal blocks only one is
        known. If this request has the other, it used the known one all the same; and if that is gone, its own is known.
        """
        for place in reversed(range(len(blocks))):
            block = blocks[place]
            if place < len(digests):
                self.publish(digests[place], block)
                known = self.block_of.get(digests[place])
                if known in self.idle:
                    self.idle.move_to_end(known)
            self.users[block] -= 1
            if self.users[block]:
                continue
            self.free += 1
            if self.digest_of.get(block):
                self.idle[block] = None
            else:
                self.digest_of.pop(block, None)

    def forget(self):
        """Know no block any more: to be called when the weights of the model change. Requests that run keep their
        blocks, which will not become known."""
        self.block_of.clear()
        self.idle.clear()
        self.digest_of = {block: None for block, users in enumerate(self.users) if users}


class BlockTable:
    """Where the keys and values of one request lie: token i is in slot(i) of the pool.

    blocks: its blocks in their order, each of `size` tokens. window: number of tokens to keep; later tokens overwrite
    the oldest, so the context slides.
    """

    def __init__(self, blocks, size, window):
        self.blocks = blocks
        self.size = size
        self.window = window
        self.neighbours = all(b == a + 1 for a, b in itertools.pairwise(blocks))
        self.slots = (torch.tensor(blocks)[:, None] * size + torch.arange(size)).flatten()
        self.row = torch.tensor(blocks, dtype=torch.int32)

    def write(self, row):
        """Write the blocks into a row of a table (n,): all of them, or as many as it has room for."""
        count = min(len(self.row), len(row))
        row[:count] = self.row[:count]

    def slot(self, position):
        position %= self.window
        return self.blocks[position // self.size] * self.size + position % self.size

    def view(self, count):
        """Index of the slots of the first `count` tokens (at most the whole window): a slice, or a tensor."""
        count = min(count, self.window)
        if self.neighbours:
            first = self.blocks[0] * self.size
            return slice(first, first + count)
        return self.slots[:count]


class Pool:
    """The keys and values of all requests: `count` blocks of `size` tokens in each layer.

    kernel: what reads keys and values through a table of blocks (paged_kernel).
    """

    def __init__(self, config, count, size, dtype, device, kernel=None):
        self.size = size
        self.dtype = dtype
        self.device = device
        self.kernel = kernel
        self.keys = [new_cache(config, count * size, dtype, device) for _ in range(config.n_layer)]
        self.values = [new_cache(config, count * size, dtype, device) for _ in range(config.n_layer)]
        self.graph_memory = None  # shared by the CUDA graphs of all passes

    def write(self, layer, slots, k, v):
        """Store k and v (1, N, n_kv, D) at `slots` (N,). -> keys and values of the layer, (slots, n_kv, D)"""
        keys = self.keys[layer]
        values = self.values[layer]
        keys.index_copy_(0, slots, k[0].to(self.dtype))
        values.index_copy_(0, slots, v[0].to(self.dtype))
        return keys, values


def new_cache(config, slots, dtype, device):
    """Keys or values of a layer: (slots, n_kv, D). On a CPU the rows of one head are neighbours, as it reads them."""
    if device.type == "cpu":
        return torch.zeros(config.kv_heads, slots, config.head_dim, dtype=dtype).transpose(0, 1)
    return torch.zeros(slots, config.kv_heads, config.head_dim, dtype=dtype, device=device)


def paged_kernel(device, dtype, head_dim):
    """What reads keys and values through a table of blocks here: flash-attn's kernel if it is installed; "cpu" for our
    own where there is a C++ compiler, "triton" on CUDA (inference/paged.py); or None: they are gathered."""
    if device.type == "cpu" and dtype in kernels.TYPES and kernels.available():
        return "cpu"
    if takes_flash(device, dtype, head_dim) and flash_attn_with_kvcache is not None:
        return flash_attn_with_kvcache
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        importlib.import_module("inference.paged")  # it defines the operator
        return "triton"
    return None


# -----------------------------------------------------------------------------
# What the model gets for one step


class Part(NamedTuple):
    """The tokens of one request in a step."""

    tokens: list  # ids
    first: int  # position of the first of them: as many are in the cache already
    table: BlockTable
    wanted: int  # after how many of the last of them the logits are wanted: mostly 1, or 0


class StepCache:
    """The cache for one step over `parts`, whose tokens lie in one row, one request after another."""

    def __init__(self, pool, rope, parts):
        """`rope`: the tables of rope_tables, or None with learned positions."""
        self.pool = pool
        self.parts = []  # of each part: (first row, rows, first position, index of its keys and values)
        self.rows = []  # of the logits that are wanted
        positions = []
        slots = []
        for tokens, first, table, wanted in parts:
            row = len(positions)
            end = first + len(tokens)
            positions += range(first, end)
            slots += [table.slot(position) for position in range(first, end)]
            view = table.view(end)
            if not table.neighbours:
                view = view.to(pool.device)
            self.parts.append((row, len(tokens), first, view))
            self.rows += range(len(positions) - wanted, len(positions))
        self.positions = torch.tensor(positions, device=pool.device)
        self.slots = torch.tensor(slots, device=pool.device)
        self.rope = rope_at(rope, self.positions)

    def attend(self, layer, q, k, v):
        """Store k and v (1, N, n_kv, D). softmax(q k^T / sqrt(D)) v for q (1, N, n_q, D), each request by itself."""
        keys, values = self.pool.write(layer, self.slots, k, v)
        rows = q[0].to(keys.dtype)
        outputs = [attend_one(rows[row : row + n], keys[view], values[view], first)
                   for row, n, first, view in self.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return y[None].to(q.dtype)


class DecodeCache(NamedTuple):
    """The cache for one token of each of B requests, as the model sees it: tensors alone, so that it can be traced."""

    keys: list  # of each layer, as in the pool
    values: list
    positions: torch.Tensor  # (B,) of the tokens
    slots: torch.Tensor  # (B,) where their keys and values go
    table: torch.Tensor  # (B, n) int32, the blocks of each request
    lengths: torch.Tensor  # (B,) int32, tokens that each request sees
    rope: tuple | None  # the rows of the rotary tables at these positions
    size: int  # tokens in a block
    kernel: object = None  # the pool's
    rows: slice = slice(None)  # the logits of all rows are wanted

    def attend(self, layer, q, k, v):
        """Like StepCache.attend, for all requests at once."""
        keys = self.keys[layer]  # (slots, n_kv, D)
        values = self.values[layer]
        if self.kernel == "cpu":
            y = torch.ops.minichat.attend(q[0], k[0], v[0], keys.transpose(0, 1), values.transpose(0, 1), self.slots,
                                          self.table, self.lengths, self.size)
            return y[None]
        keys.index_copy_(0, self.slots, k[0].to(keys.dtype))
        values.index_copy_(0, self.slots, v[0].to(values.dtype))
        keys = keys.unflatten(0, (-1, self.size))  # (blocks, size, n_kv, D)
        values = values.unflatten(0, (-1, self.size))
        y = attend_blocks(q[0].to(keys.dtype), keys, values, self.table, self.lengths, self.kernel)
        return y[None].to(q.dtype)


def rope_at(rope, positions):
    """The rows of the rotary tables at `positions` (N,): cosines and sines (N, 1, D). None with learned positions."""
    if rope is None:
        return None
    return tuple(table[positions][:, None] for table in rope)


# -----------------------------------------------------------------------------
# Attention


def attend_blocks(q, k, v, table, lengths, kernel=None):
    """Attention of q (B, n_q, D), one token of each request, over the first `lengths` (B,) tokens in the blocks that
    `table` (B, n) names; k and v (blocks, size, n_kv, D). -> (B, n_q, D)"""
    if kernel == "triton":
        return torch.ops.minichat.paged_attention(q, k, v, table, lengths)
    if kernel is not None:
        return kernel(q[:, None], k, v, cache_seqlens=lengths, block_table=table)[:, 0]
    k, v = (t[table].flatten(1, 2).transpose(1, 2) for t in (k, v))  # (B, n_kv, n * size, D)
    seen = torch.arange(k.size(2), device=q.device) < lengths[:, None]
    q = q.unflatten(1, (k.size(1), -1))  # (B, n_kv, group, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None]).flatten(1, 2)


def attend_one(q, k, v, first):
    """Attention of q (T, n_q, D), at positions first, first + 1, ..., over k and v (L, n_kv, D). -> (T, n_q, D)

    Query heads that share a key/value head become more rows of queries, so keys and values are never repeated.
    """
    T, n_q, D = q.shape
    group = n_q // k.size(1)
    k = k.transpose(0, 1)[None]  # (1, n_kv, L, D)
    v = v.transpose(0, 1)[None]
    if T == 1:
        return F.scaled_dot_product_attention(q.view(1, -1, group, D), k, v).view(1, n_q, D)
    q = q.view(T, -1, group, D).permute(1, 2, 0, 3).reshape(1, -1, group * T, D)
    causal = first == 0 and group == 1
    mask = None
    if not causal:
        mask = torch.ones(T, k.size(2), dtype=torch.bool, device=q.device).tril(first)
        mask = mask.repeat(group, 1)  # (group * T, L)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.view(n_q // group, group, T, D).permute(2, 0, 1, 3).reshape(T, n_q, D)
