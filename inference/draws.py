"""
Draws the next token of many requests at once, on the device where their logits are.

The shapes depend on the number of rows alone, and nothing waits for a number on the host. So a draw can be captured in
a CUDA graph, or compiled, together with the pass of the model that gives the logits. Each request draws what Chooser
(sampling.py) would draw from its logits with the same random number, except for rounding.

A sort of the whole vocabulary would take longer than all the rest (10 ms for GPT-2's on one core). None is needed:
top_k and top_p keep the tokens above some probability, and bisection over the bits of that number finds it
(`least_kept`). Where each request keeps few tokens, these are chosen first, and only they are ranked
(`keep_candidates`).
"""

from typing import NamedTuple

import torch

MOST_CANDIDATES = 1024  # top_k up to here: choose so many tokens first, then filter those
LARGEST = torch.finfo(torch.float32).max
SMALLEST = torch.finfo(torch.float32).tiny
NO_NUMBERS = ("the model's logits are no numbers, so no token can be drawn: its weights are damaged, or too large for "
              "this dtype (dtype=float32 holds more)")
NEUTRAL = (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)  # temperature, top_k, top_p, min_p, the three penalties


class Variant(NamedTuple):
    """Which code a batch needs; a CUDA graph is captured for each.

    kind: greedy: the most likely tokens. plain: temperature. candidates: each row keeps at most `most` tokens, chosen
    first. nucleus: top_p and min_p of the whole vocabulary. filtered: top_k too. penalised: penalties or biases.
    """

    kind: str
    most: int = 0
    penalised: bool = False


def variant(samplings, vocab_size):
    """The Variant for a batch of requests with these Samplings: the cheapest that serves them all."""
    penalised = any(is_penalised(s) for s in samplings)
    drawn = [s for s in samplings if s.temperature > 0]
    if not drawn:
        return Variant("greedy", penalised=penalised)
    kept = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in drawn]
    if min(kept) == vocab_size and not any(s.top_p < 1 or s.min_p for s in drawn):
        return Variant("plain", penalised=penalised)
    if max(kept) <= MOST_CANDIDATES:
        most = max(64, 1 << (max(kept) - 1).bit_length())  # few sizes, so few graphs
        return Variant("candidates", min(most, vocab_size), penalised)
    return Variant("nucleus" if min(kept) == vocab_size else "filtered", penalised=penalised)


def is_penalised(sampling):
    s = sampling
    return bool(s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty or s.logit_bias)


class Draws:
    """The state of the draws of up to `rows` running requests, on `device`. A request keeps its row while it runs.

    Its tensors stay where they are, as CUDA graphs need it. `spare` is one more row, for batches that are padded: its
    draws are greedy, and mean nothing.
    """

    def __init__(self, rows, vocab_size, device):
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.spare = rows
        self.options = torch.tensor([NEUTRAL] * (rows + 1), device=device)
        self.uniform = torch.zeros(rows + 1, device=device)  # the random number of each row's next draw
        self.numbers = [0.0] * (rows + 1)  # the same on the host
        self.counts = None  # (rows + 1, vocab_size): how often the answer has each token
        self.seen = None    # which tokens the prompt or the answer has
        self.bias = None    # of each token

    def load(self, row, sampling, ids, prompt_tokens):
        """A request takes `row`. ids: its tokens so far, of which the first `prompt_tokens` are the prompt."""
        s = sampling
        temperature = min(max(s.temperature, SMALLEST), LARGEST) if s.temperature else 0.0
        repetition = min(max(s.repetition_penalty, SMALLEST), LARGEST)
        top_k = s.top_k if 0 < s.top_k < self.vocab_size else self.vocab_size
        options = (temperature, top_k, s.top_p, s.min_p, repetition, s.presence_penalty, s.frequency_penalty)
        self.options[row] = torch.tensor(options, dtype=torch.float32)
        if is_penalised(s):
            self.load_state(row, s, ids, prompt_tokens)
        elif self.bias is not None:
            self.bias[row].zero_()  # with neutral options nothing else matters

    def allocate(self):
        """Memory for penalties and biases, before the first draw that is penalised: 9 bytes for each row and token of
        the vocabulary. `load` calls it for the first request that needs it."""
        if self.counts is None:
            shape = (self.spare + 1, self.vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.bias = torch.zeros(shape, device=self.device)

    def load_state(self, row, sampling, ids, prompt_tokens):
        """What `row` needs for penalties and biases."""
        self.allocate()
        ids = torch.tensor(ids, dtype=torch.long)
        self.counts[row] = torch.bincount(ids[prompt_tokens:], minlength=self.vocab_size).int().to(self.device)
        self.seen[row] = (torch.bincount(ids, minlength=self.vocab_size) > 0).to(self.device)
        bias = torch.zeros(self.vocab_size)
        for token, number in sampling.logit_bias:
            bias[token] = number
        self.bias[row] = bias.to(self.device)

    def next_numbers(self, rows, choosers):
        """Before each draw: the next random numbers of the requests that take part, from their own generators."""
        for row, chooser in zip(rows, choosers, strict=True):
            self.numbers[row] = chooser.uniform()
        self.uniform.copy_(torch.tensor(self.numbers), non_blocking=True)

    def draw(self, logits, rows, variant):
        """The next tokens of the requests in `rows` (B,) int64, by logits (B, vocab_size) fp32. -> (B,) int64, on the
        device; -1 where the logits are no numbers. They count as said. `variant`: that of all these requests, or one
        that does more."""
        temperature, top_k, top_p, min_p, *penalties = self.options[rows].split(1, -1)  # (B, 1) each
        if variant.penalised:
            assert self.counts is not None, "allocate() comes first"
            logits = self.penalise(logits, rows, *penalties)
        ids = logits.argmax(-1)
        if variant.kind != "greedy":
            scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=SMALLEST)
            weights = torch.softmax(scaled, -1)
            if variant.kind == "candidates":
                weights = keep_candidates(weights, variant.most, top_k, top_p, min_p)
            if variant.kind == "filtered":
                weights = keep_top_k(weights, top_k)
            if variant.kind in ("filtered", "nucleus"):
                weights = keep_nucleus(weights, top_p, min_p)
            drawn = inverse_cdf(weights, self.uniform[rows])
            ids = torch.where(temperature[:, 0] == 0, ids, drawn)
        if variant.penalised:
            places = rows * self.vocab_size + ids.clamp(min=0)
            self.counts.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
            self.seen.view(-1).index_fill_(0, places, True)
        return ids

    def penalise(self, logits, rows, repetition, presence, frequency):
        """Logits (B, vocab_size) -> the same, after penalise and penalise_answer of sampling.py, and with the biases.
        """
        penalised = torch.where(logits > 0, logits / repetition, logits * repetition).clamp(max=LARGEST)
        logits = torch.where(self.seen[rows], penalised, logits)
        counts = self.counts[rows]
        logits = logits - presence * (counts > 0) - frequency * counts
        return logits + self.bias[rows]


# -----------------------------------------------------------------------------
# Filters and the draw, each over weights (B, vocab_size): probabilities, 0 for a token that was dropped


def keep_candidates(weights, most, top_k, top_p, min_p):
    """Keep the tokens that top_k, top_p and min_p (B, 1) keep, where no row keeps more than `most`."""
    ids = torch.arange(weights.size(1), device=weights.device)
    # the order of all keys: more likely first, on a tie the lower id. Bits of floats above 0 are ordered as integers
    keys = weights.view(torch.int32).long() << 32 | (2**31 - 1 - ids)
    ids = 2**31 - 1 - (keys.topk(most).values & (2**31 - 1))  # (B, most)
    place = torch.arange(most, device=weights.device)
    ranked = torch.where(place < top_k, weights.gather(1, ids), 0)
    keep = (ranked.cumsum(-1) - ranked < top_p * ranked.sum(-1, keepdim=True)) | (top_p == 1)
    keep &= ranked >= min_p * ranked[:, :1]
    keep |= place == 0
    return torch.zeros_like(weights).scatter(1, ids, torch.where(keep, ranked, 0))


def keep_top_k(weights, top_k):
    """Keep the top_k (B, 1) most likely tokens, exactly as many on ties, the lowest ids."""
    bits = weights.view(torch.int32)
    least = least_kept(bits, 1, top_k)
    room = top_k - (bits > least).sum(-1, keepdim=True)
    equal = bits == least
    return torch.where((bits > least) | equal & (equal.cumsum(-1) <= room), weights, 0)


def keep_nucleus(weights, top_p, min_p):
    """Keep the smallest set of tokens that reaches the share top_p (B, 1) of all weights, the lowest ids on ties; of
    these the tokens with at least the share min_p of the largest weight."""
    bits = weights.view(torch.int32)
    limit = torch.where(top_p < 1, top_p * weights.sum(-1, keepdim=True), torch.inf)
    least = least_kept(bits, weights, limit)
    above = torch.where(bits > least, weights, 0).sum(-1, keepdim=True)
    room = ((limit - above) / least.view(torch.float32)).ceil().clamp(min=1)  # equal tokens until the share is reached
    equal = bits == least
    keep = (bits > least) | equal & (equal.cumsum(-1) <= room)
    keep &= weights >= min_p * weights.amax(-1, keepdim=True)
    return torch.where(keep, weights, 0)


def least_kept(bits, measure, limit):
    """The bits of the smallest weight that is kept, (B, 1): that for which the `measure` of all larger weights (their
    sum or number) is below `limit` (B, 1). The largest weight is always kept. bits (B, vocab_size): of the weights.
    """
    high = bits.amax(-1, keepdim=True)
    low = torch.zeros_like(high)
    for _ in range(30):  # the bits of 1.0 are below 2**30
        middle = (low + high) >> 1
        enough = torch.where(bits > middle, measure, 0).sum(-1, keepdim=True) < limit
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle + 1)
    return high


def inverse_cdf(weights, uniform):
    """The first id whose cumulative weight exceeds the share `uniform` (B,) of all. -> (B,); -1 if none is a number."""
    vocab_size = weights.size(1)
    # sums in parallel are not always in order: a token without weight must not be the first by rounding
    cumulative = torch.where(weights > 0, weights.cumsum(-1, dtype=torch.float64), 0)
    least = uniform.double()[:, None] * cumulative.amax(-1, keepdim=True)
    ids = torch.arange(vocab_size, device=weights.device)
    drawn = torch.where(cumulative > least, ids, vocab_size).amin(-1)
    return torch.where(drawn == vocab_size, -1, drawn)
