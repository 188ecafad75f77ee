"""
From logits to a token (`Chooser`, by `penalise`, `probabilities` and `inverse_cdf`), and where a text ends
(`StopText`). infer.py calls these. draws.py draws the same tokens for many requests at once, on their device.
"""

import math
import operator
from dataclasses import dataclass, fields

import torch

from inference.draws import NO_NUMBERS
from inference.prompts import is_id

MOST_TOP = 20  # most tokens whose log-probabilities are kept for each place, as in OpenAI's interface


@dataclass(frozen=True)
class Sampling:
    """How a request chooses its tokens, and when it ends. Raises ValueError naming a value that has no meaning."""

    max_new_tokens: int = 256
    temperature: float = 1.0         # 0: greedy, the most likely token (the lowest id on a tie)
    top_k: int = 0                   # draw among the k most likely tokens, exactly k on ties; 0: all
    top_p: float = 1.0               # nucleus sampling: the smallest set of tokens whose probability reaches top_p
    min_p: float = 0.0               # only tokens with at least this share of the largest probability
    repetition_penalty: float = 1.0  # above 1: tokens that were there before become less likely
    presence_penalty: float = 0.0    # is subtracted from the logits of tokens that the answer has; -2 to 2
    frequency_penalty: float = 0.0   # the same, times how often the answer has the token
    logit_bias: tuple = ()           # a dict of id -> number from -100 to 100, which is added to that token's logit
    seed: int = 0                    # of the request's own random numbers
    stop: tuple = ()                 # strings that end the text, and are not part of it
    stop_tokens: tuple = ()          # ids that end it
    ignore_eos: bool = False         # continue past the end of a document
    logprobs: bool = False           # keep the log-probability of each token, before temperature and the other options
    top_logprobs: int = 0            # keep it, and those of this many most likely tokens; at most 20
    prompt_logprobs: bool | int = False  # keep those of the prompt's tokens too; a number: and of as many most likely

    def __post_init__(self):
        if not (isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1):
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be a whole number of at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or above, and finite")
        if not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise ValueError(f"top_k={self.top_k} must be a whole number; 0: all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1: all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]; 0: all tokens")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1: none")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [-2, 2]; 0: none")
        object.__setattr__(self, "logit_bias", bias_pairs(self.logit_bias))  # a tuple cannot change, as a dict can
        if not (is_id(self.top_logprobs) and 0 <= self.top_logprobs <= MOST_TOP):
            raise ValueError(f"top_logprobs={self.top_logprobs} must be a whole number from 0 to {MOST_TOP}")
        if not (isinstance(self.prompt_logprobs, bool)
                or (is_id(self.prompt_logprobs) and 0 <= self.prompt_logprobs <= MOST_TOP)):
            raise ValueError(f"prompt_logprobs={self.prompt_logprobs} must be True, False or a whole number up to "
                             f"{MOST_TOP}")
        if not (isinstance(self.seed, int) and -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed={self.seed} must be a whole number of at most 64 bits")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={self.stop!r} must be a list of strings that are not empty")


def bias_pairs(logit_bias):
    """A dict of token id -> number, or its pairs -> a tuple of pairs. Raises ValueError."""
    try:
        biases = dict(logit_bias)
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias={logit_bias!r:.80} must be a dict of token id -> number") from None
    for token, bias in biases.items():
        if not is_id(token):
            raise ValueError(f"logit_bias: {token!r:.80} is no token id, which is a whole number")
        if not (isinstance(bias, (int, float)) and -100 <= bias <= 100):
            raise ValueError(f"logit_bias: {bias!r:.80} for token {token} must be a number in [-100, 100]")
    return tuple((operator.index(token), float(bias)) for token, bias in biases.items())


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Logits (..., vocab_size) -> the distributions to draw from, fp32, same shape, as Sampling describes them.

    top_p (Holtzman et al. 2020, arXiv:1904.09751) and min_p apply to the tokens that top_k leaves.
    """
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)  # raises for values without a meaning
    if logits.dim() > 1:
        rows = [probabilities(row, temperature, top_k, top_p, min_p) for row in logits.flatten(0, -2)]
        return torch.stack(rows).view(logits.shape)
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    temperature = in_fp32(temperature)
    probs = torch.softmax((logits - logits.max()) / temperature, -1)  # less the maximum: nothing becomes infinite
    cut = 0 < top_k < len(probs)
    if not (cut or top_p < 1 or min_p):
        return probs
    if cut:
        ids = most_likely(probs, top_k)
        total = probs[ids].sum()
    else:
        # all tokens below this share together do not make up 1 - top_p: without them the sort is short (as in llama2.c)
        unlikely = probs < (1 - top_p) / (2 * len(probs))
        ids = (~unlikely & (probs >= min_p * probs.max())).nonzero().squeeze(1)
        total = probs.sum()
    ranked, order = probs[ids].sort(descending=True, stable=True)
    keep = ranked >= min_p * ranked[:1]
    if top_p < 1:
        keep &= ranked.cumsum(0) - ranked < top_p * total  # the more likely tokens do not reach top_p yet
    keep[:1] = True  # even if top_p or the product is 0 in fp32
    ids = ids[order[keep]]
    return torch.zeros_like(probs).scatter_(0, ids, probs[ids] / probs[ids].sum())


def in_fp32(factor):
    """The positive fp32 number nearest to `factor` that is finite: 0 and inf would make a logit nan."""
    return min(max(factor, torch.finfo(torch.float32).tiny), torch.finfo(torch.float32).max)


def most_likely(probs, k):
    """The ids of the k largest in ascending order, on a tie the lowest ids. Faster than a sort of all tokens."""
    least = probs.topk(k).values[-1]
    above = (probs > least).nonzero().squeeze(1)
    equal = (probs == least).nonzero().squeeze(1)
    return torch.cat((above, equal[: k - len(above)])).sort().values


def penalise(logits, ids, penalty):
    """Logits (vocab_size,) -> the same, but the tokens in `ids` become less likely: `penalty` divides a positive logit
    and multiplies a negative one (CTRL, Keskar et al. 2019, arXiv:1909.05858)."""
    if penalty == 1:
        return logits
    seen = torch.tensor(sorted(set(ids)), dtype=torch.long)
    penalty = in_fp32(penalty)
    penalised = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits.scatter(0, seen, penalised.clamp(max=torch.finfo(logits.dtype).max))


def penalise_answer(logits, counts, presence, frequency):
    """Logits (vocab_size,) -> the same, less `presence` for each token that the answer has, and less `frequency` for
    each time it has it. counts (vocab_size,): how often. As OpenAI's interface defines them: the prompt never counts.
    """
    return logits - presence * (counts > 0) - frequency * counts


def top_tokens(logprobs, count):
    """The `count` most likely tokens of logprobs (vocab_size,), the lowest ids on a tie. -> [(id, logprob), ...]"""
    ids = most_likely(logprobs, min(count, len(logprobs)))
    ranked, order = logprobs[ids].sort(descending=True, stable=True)
    return list(zip(ids[order].tolist(), ranked.tolist(), strict=True))


def inverse_cdf(probs, u):
    """The token that the number u in [0, 1) draws from probs (vocab_size,): the first id, in the order of ids, whose
    cumulative probability exceeds u. Raises ValueError for probabilities that are no numbers.

    One number decides, so whoever has the same probabilities and the same u draws the same token: the device
    (draws.py), or a second pass over a text that was guessed. It is faster than torch.multinomial, which draws a number
    for each token of the vocabulary.
    """
    cumulative = probs.cumsum(0, dtype=torch.float64)
    total = float(cumulative[-1])  # 1, except for rounding
    if not total > 0:
        raise ValueError(NO_NUMBERS)
    return int(torch.searchsorted(cumulative, u * total, right=True))


class Chooser:
    """Chooses the tokens of one answer, as its Sampling says. Raises ValueError if that names a token which the model
    does not have, and later for logits that are no numbers."""

    def __init__(self, sampling, vocab_size):
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)  # on the CPU: the same draws on every device
        self.counts = None  # how often the answer has each token
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(vocab_size)
        self.bias = None  # of each token
        if sampling.logit_bias:
            self.bias = torch.zeros(vocab_size)
        for token, bias in sampling.logit_bias:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias names token {token}, outside the model's vocabulary of {vocab_size}")
            self.bias[token] = bias

    def __call__(self, logits, ids):
        """The token that follows all of `ids`, by logits (vocab_size,), fp32 on the CPU. It counts as said."""
        s = self.sampling
        logits = penalise(logits, ids, s.repetition_penalty)
        if self.counts is not None:
            logits = penalise_answer(logits, self.counts, s.presence_penalty, s.frequency_penalty)
        if self.bias is not None:
            logits = logits + self.bias
        if s.temperature == 0:
            token = int(logits.argmax())
        else:
            token = inverse_cdf(probabilities(logits, s.temperature, s.top_k, s.top_p, s.min_p), self.uniform())
        self.count(token)
        return token

    def uniform(self):
        """The next of the answer's random numbers, which draws its next token: in [0, 1), fp32. A greedy answer has
        none: 0, and its generator stays as it is."""
        if self.sampling.temperature == 0:
            return 0.0
        return float(torch.rand(1, generator=self.generator))

    def count(self, token):
        """The answer has one more `token`: to be called for a token that was drawn elsewhere, as by draws.py."""
        if self.counts is not None:
            self.counts[token] += 1


class StopText:
    """Cuts a stream of text before the first stop string. It holds back text that may begin one."""

    def __init__(self, stops):
        self.stops = stops
        self.held = ""
        self.stopped = False

    def __call__(self, text, last=False):
        """More text of the stream -> the text that is certain by now; with `last`, all of it."""
        self.held += text
        starts = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if starts:
            certain = self.held[: min(starts)]
            self.held = ""
            self.stopped = True
            return certain
        end = len(self.held) if last else self.first_possible_start()
        certain, self.held = self.held[:end], self.held[end:]
        return certain

    def first_possible_start(self):
        """The first place where a stop string may begin that is not complete yet."""
        longest = max(map(len, self.stops), default=0)
        for start in range(max(0, len(self.held) - longest + 1), len(self.held)):
            if any(stop.startswith(self.held[start:]) for stop in self.stops):
                return start
        return len(self.held)


def sampling_from(c):
    """The Sampling of a script's settings `c`. A field without a setting keeps its default."""
    return Sampling(**{f.name: c[f.name] for f in fields(Sampling) if f.name in c.keys()})
