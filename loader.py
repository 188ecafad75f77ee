"""
Training batches: which tokens each step trains on, and the threads that read them.

A split is one stream of tokens over its shards (dataset.py). Epoch e cuts it into windows of block_size that do not
overlap, from an offset drawn from (seed, e). It visits each window once, in a permutation that is computed and never
stored. So the tokens of any step follow from its number alone, and resuming needs no state. The order is that of the
run, however many processes share it. A mix of datasets has one such order, in which the datasets take turns.

Conversations lie in rows of block_size tokens (data/chat/prepare.py). A row is a window of its own, and only some of
its tokens are learned.
"""

import hashlib
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dataset import DataError, Mix

POSITIONS_AT_ONCE = 4096  # windows that are computed together, at the cost of a few
ROWS_AT_ONCE = 256  # read small batches together, up to this many rows: Python's overhead delays the training step

# -----------------------------------------------------------------------------
# The order


def keyed(*parts):
    """A 64-bit hash of all parts, the same on every machine and in every version."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index, n, key, rounds=6):
    """Permute `index` (an array of ints in [0, n)) by the permutation of range(n) that `key` names. -> int64 array

    A Feistel network permutes a power of four that is at least n. A value that lands outside range(n) is permuted again
    until it lands inside (cycle walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Time and
    memory are constant at any n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    bits = np.uint64(half)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(keyed(key, r)) for r in range(rounds)]
    x = np.array(index, dtype=np.uint64, ndmin=1)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left = x[outside] >> bits
        right = x[outside] & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        x[outside] = (left << bits) | right
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


class Order:
    """Position in the run -> first token of its window. With `rows` the windows are the rows of conversations."""

    def __init__(self, n_tokens, block_size, seed, rows=False):
        if n_tokens <= block_size and not rows:
            raise DataError(f"{n_tokens:,} tokens are too few for block_size={block_size}: at least block_size + 1")
        self.block_size = block_size
        self.seed = seed
        # as many windows as fit after any offset, so that every epoch has the same number
        self.windows = max(1, (n_tokens - block_size) // block_size)
        self.offsets = min(block_size, n_tokens - self.windows * block_size)
        if rows:
            self.windows = n_tokens // block_size
            self.offsets = 1

    def starts(self, positions):
        """First tokens of the windows at `positions`, an array of ints >= 0. -> int64 array of that length"""
        epochs, index = np.divmod(np.asarray(positions, dtype=np.int64), self.windows)
        starts = np.empty_like(index)
        for epoch in np.unique(epochs):
            offset = keyed(self.seed, int(epoch), "offset") % self.offsets
            here = epochs == epoch
            windows = permute(index[here], self.windows, f"{self.seed}/{int(epoch)}/order")
            starts[here] = offset + self.block_size * windows
        return starts


class MixedOrder:
    """Position in the run -> first token of its window in a Mix. Each dataset has its own Order; they take turns.

    The i-th dataset gets floor(p * weight) of the first p positions, or one more. So the turns spread as evenly as
    possible (Beatty's sequences: the first dataset against all others, then the second against the rest, ...).
    """

    def __init__(self, mix, block_size, seed):
        self.mix = mix
        self.orders = []
        for i, (tokens, _) in enumerate(mix.parts):
            try:
                self.orders.append(Order(len(tokens), block_size, f"{seed}/{i}", rows=bool(mix.row_size)))
            except DataError as error:
                raise DataError(f"{tokens.folder}: {error}") from None

    def starts(self, positions):
        """First tokens of the windows at `positions`, an array of ints >= 0. -> int64 array of that length"""
        positions = np.array(positions, dtype=np.int64)  # a copy, renumbered below for the remaining datasets
        starts = np.empty_like(positions)
        left = np.arange(len(positions))  # indices of the positions that no dataset has taken yet
        weight_left = Fraction(1)
        for i, ((_, weight), order) in enumerate(zip(self.mix.parts, self.orders, strict=True)):
            share = weight / weight_left
            at = positions[left]
            before = at * share.numerator // share.denominator  # earlier positions of this dataset
            own = (at + 1) * share.numerator // share.denominator > before
            starts[left[own]] = self.mix.bases[i] + order.starts(before[own])
            positions[left[~own]] -= before[~own]
            left = left[~own]
            weight_left -= weight
        return starts


# -----------------------------------------------------------------------------
# Batches


def data_step(step, skipped=()):
    """The number of the data that training step `step` uses: the step-th whole number, from 0 on, not in `skipped`."""
    for bad_step in sorted(skipped):
        if bad_step > step:
            break
        step += 1
    return step


class Batch(NamedTuple):
    """The tokens of one pass through a model.

    Gradients add up to the mean over all targets of an update if every micro-batch divides its summed loss by the same
    number, the mean number of targets in a micro-batch of the update (over micro-batches and ranks).
    """

    x: torch.Tensor  # token ids, int64 (B, T)
    y: torch.Tensor  # the targets, int64 (B, T); -1 where nothing is learned
    docs: torch.Tensor | None = None  # the number of the document each token belongs to, int64 (B, T), rising in a row
    divisor: torch.Tensor | None = None  # what the summed loss is divided by, 0-dim fp32; None: its own targets

    def to(self, device, non_blocking=False):
        """The same on `device`."""
        return Batch(*[None if tensor is None else tensor.to(device, non_blocking=non_blocking) for tensor in self])

    def pin_memory(self):
        """The same in page-locked memory."""
        return Batch(*[None if tensor is None else tensor.pin_memory() for tensor in self])

    def split(self, rows):
        """A list of Batches of `rows` rows each, with the same divisor."""
        xs = self.x.split(rows)
        docs = [None] * len(xs) if self.docs is None else self.docs.split(rows)
        return [Batch(*parts, self.divisor) for parts in zip(xs, self.y.split(rows), docs, strict=True)]

    def pad(self, length):
        """The same with rows of `length` tokens: behind its own each has zeros, in its last document, and no targets.
        """
        more = (0, length - self.x.size(1))
        x = F.pad(self.x, more)
        y = F.pad(self.y, more, value=-1)
        docs = None
        if self.docs is not None:
            docs = torch.cat((self.docs, self.docs[:, -1:].expand(-1, more[1])), dim=1)
        return Batch(x, y, docs, self.divisor)

    def cut(self, length):
        """The same with each row cut into rows of `length` tokens."""
        docs = None if self.docs is None else self.docs.reshape(-1, length)
        return Batch(self.x.reshape(-1, length), self.y.reshape(-1, length), docs, self.divisor)


def join_batches(batches):
    """Batches of the same update -> one Batch of all their rows, with their divisor."""
    docs = None if batches[0].docs is None else torch.cat([batch.docs for batch in batches])
    x = torch.cat([batch.x for batch in batches])
    y = torch.cat([batch.y for batch in batches])
    return Batch(x, y, docs, batches[0].divisor)


def read_batch(tokens, starts, block_size):
    """The windows of `tokens` that begin at `starts`. -> Batch, without a divisor"""
    if tokens.row_size:
        rows = tokens.read(starts, block_size).astype(np.int64)
        learned = tokens.read_bits("learned", starts, block_size)
        y = np.full_like(rows, -1)
        y[:, :-1] = np.where(learned[:, 1:], rows[:, 1:], -1)  # a row's last token predicts nothing
    else:
        windows = tokens.read(starts, block_size + 1)
        rows = windows[:, :-1].astype(np.int64)
        y = windows[:, 1:].astype(np.int64)
    docs = tokens.begins(starts, rows)
    if docs is not None:
        docs = torch.from_numpy(np.cumsum(docs, axis=1))
    return Batch(torch.from_numpy(rows), torch.from_numpy(y), docs)


class Loader:
    """Training batches in order, at least `prefetch` of them read ahead by background threads.

    Step s takes positions [d G, (d + 1) G) of the order, where G = batch_size * accumulation * world, and d is
    data_step(s, skipped). Micro-step m of rank r takes the rows of micro-batch m * world + r.

    next(loader) gives the Batch of one micro-step after another from first_step on, without end: int64 (batch_size,
    block_size). With `pin` they are in page-locked memory, from which a GPU copies while it computes. next raises the
    error of a thread.
    """

    def __init__(self, tokens, block_size, batch_size, *, accumulation=1, seed=0, rank=0, world=1,
                 first_step=0, prefetch=4, threads=1, pin=False, skipped=()):
        self.tokens = tokens
        if isinstance(tokens, Mix):
            self.order = MixedOrder(tokens, block_size, seed)
        else:
            self.order = Order(len(tokens), block_size, seed, rows=bool(tokens.row_size))
        self.block_size = block_size
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world = world
        self.pin = pin
        self.skipped = skipped
        self.starts_of_block = lru_cache(maxsize=8)(self.find_starts)
        self.divisor = lru_cache(maxsize=8)(self.find_divisor)
        steps = itertools.count(first_step)
        self.micro_steps = ((step, micro) for step in steps for micro in range(accumulation))
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self.group = max(1, ROWS_AT_ONCE // batch_size)  # batches that are read together
        groups_ahead = -(-max(1, prefetch) // self.group)  # rounded up
        self.ready = deque()  # batches that have been read
        self.ahead = deque(self.read_ahead() for _ in range(groups_ahead))  # futures of the next groups

    def positions(self, step, micro):
        """The positions of a micro-step's rows in the order. -> int64 (batch_size,)"""
        micro_batch = data_step(step, self.skipped) * self.accumulation + micro
        first = (micro_batch * self.world + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size)

    def find_starts(self, block):
        first = block * POSITIONS_AT_ONCE
        return self.order.starts(np.arange(first, first + POSITIONS_AT_ONCE))

    def starts(self, positions):
        """First tokens of the windows at rising `positions`. They are computed in blocks, which are cached."""
        first = positions[0] // POSITIONS_AT_ONCE
        last = positions[-1] // POSITIONS_AT_ONCE
        blocks = [self.starts_of_block(block) for block in range(first, last + 1)]
        return np.concatenate(blocks)[positions - first * POSITIONS_AT_ONCE]

    def batch(self, step, micro=0):
        """The batch of any micro-step, from its number alone."""
        return self.batches([(step, micro)])[0]

    def batches(self, micro_steps):
        """The batches of some (step, micro-step) in order, read together."""
        positions = [self.positions(step, micro) for step, micro in micro_steps]
        starts = self.starts(np.concatenate(positions))
        together = read_batch(self.tokens, starts, self.block_size)
        if self.pin:
            together = together.pin_memory()
        batches = together.split(self.batch_size)
        if self.tokens.row_size:
            divisors = [self.divisor(data_step(step, self.skipped)) for step, _ in micro_steps]
            batches = [batch._replace(divisor=divisor) for batch, divisor in zip(batches, divisors, strict=True)]
        return batches

    def find_divisor(self, step):
        """The mean number of targets in a micro-batch of data step `step`, over all micro-batches and ranks, fp32."""
        micro_batches = self.accumulation * self.world
        rows = micro_batches * self.batch_size
        starts = self.starts(np.arange(step * rows, (step + 1) * rows))
        learned = self.tokens.read_bits("learned", starts, self.block_size)[:, 1:]
        return torch.tensor(np.count_nonzero(learned) / micro_batches, dtype=torch.float32)

    def read_ahead(self):
        """Give a thread the next group to read. -> a future of its batches"""
        return self.pool.submit(self.batches, list(itertools.islice(self.micro_steps, self.group)))

    def __iter__(self):
        return self

    def __next__(self):
        if not self.ready:
            self.ready.extend(self.ahead[0].result())  # a failed future stays first: next raises its error again
            self.ahead.popleft()
            self.ahead.append(self.read_ahead())
        return self.ready.popleft()

    def close(self):
        """Stop the threads, after the group that each is reading."""
        self.pool.shutdown(wait=True, cancel_futures=True)


def evaluation_rows(block_size):
    """Windows in a batch of an evaluation: about 16,384 tokens."""
    return max(1, 16384 // block_size)


def fixed_batches(tokens, block_size, batch_size, limit=0):
    """The windows of a split for evaluation, in order from its first token, including a short last one.

    Yields Batches without a divisor, at most `limit` of them (0: the whole split). Each token after the first is a
    target once; targets past the end of the split are -1. Raises DataError if there is no target at all.
    """
    targets = len(tokens) - (0 if tokens.row_size else 1)
    if targets < 1:
        raise DataError(f"{tokens.folder}: the {tokens.split} split has {len(tokens)} tokens, at least 2 are needed")
    starts = np.arange(0, targets, block_size)
    for i in range(0, len(starts), batch_size):
        if limit and i >= limit * batch_size:
            return
        rows = starts[i : i + batch_size]
        full_rows = rows[rows + block_size <= targets]
        batch = read_batch(tokens, full_rows, block_size)
        if len(full_rows) < len(rows):  # the last window of the split is shorter
            tail = read_batch(tokens, rows[-1:], targets - int(rows[-1]))
            batch = join_batches([batch, tail.pad(block_size)])
        yield batch


def context_length(step, block_size, start, until):
    """Tokens of context at `step`: `start` at first, doubled in equal stages, and block_size from step `until` on.

    Short contexts early in the training are faster, and teach as much (Li et al. 2021, arXiv:2108.06084).
    """
    if not start or step >= until:
        return block_size
    doublings = (block_size // start).bit_length() - 1
    return start << int(doublings * step / until)
