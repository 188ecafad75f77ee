"""
From logits to a token (`penalise`, then `probabilities`), and where a text ends (`StopText`). infer.py calls these.
"""

import math
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Sampling:
    """How a request chooses its tokens, and when it ends. Raises ValueError naming a value that has no meaning."""

    max_new_tokens: int = 256
    temperature: float = 1.0         # 0: greedy, the most likely token (the lowest id on a tie)
    top_k: int = 0                   # draw among the k most likely tokens, exactly k on ties; 0: all
    top_p: float = 1.0               # nucleus sampling: the smallest set of tokens whose probability reaches top_p
    min_p: float = 0.0               # only tokens with at least this share of the largest probability
    repetition_penalty: float = 1.0  # above 1: tokens that were there before become less likely
    seed: int = 0                    # of the request's own random numbers
    stop: tuple = ()                 # strings that end the text, and are not part of it
    stop_tokens: tuple = ()          # ids that end it
    ignore_eos: bool = False         # continue past the end of a document
    logprobs: bool = False           # keep the log-probability of each token, before temperature and the other options

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
        if not (isinstance(self.seed, int) and -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed={self.seed} must be a whole number of at most 64 bits")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={self.stop!r} must be a list of strings that are not empty")


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
    ids = most_likely(probs, top_k) if cut else torch.arange(len(probs), device=probs.device)
    ranked, order = probs[ids].sort(descending=True, stable=True)
    keep = ranked >= min_p * ranked[0]
    keep &= ranked.cumsum(0) - ranked < top_p * ranked.sum()  # the more likely tokens do not reach top_p yet
    keep[0] = True  # even if top_p or the product is 0 in fp32
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
