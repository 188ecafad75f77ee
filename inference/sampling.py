"""
From logits to a token, and from tokens to a text that ends where it should.
"""

import math
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Sampling:
    """What a request wants. Raises ValueError naming a parameter that has no meaning."""

    max_new_tokens: int = 256
    temperature: float = 1.0         # 0: greedy, the most likely token (the lowest id on a tie)
    top_k: int = 0                   # draw among exactly so many, on ties too; 0: all
    top_p: float = 1.0               # of those the fewest with this share of the probability (Holtzman et al. 2020)
    min_p: float = 0.0               # of those the ones at least so likely as this share of the likeliest
    repetition_penalty: float = 1.0  # divides what speaks for tokens that were there before (CTRL, Keskar et al. 2019)
    seed: int = 0
    stop: tuple = ()                 # strings that end the text, and are not part of it
    stop_tokens: tuple = ()          # ids that do
    ignore_eos: bool = False         # go on past the end of a document
    logprobs: bool = False           # keep each token's log-probability, of the model's own distribution

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
    """Logits (..., vocab_size) -> the distributions to draw from, fp32, same shape, as Sampling describes them."""
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)  # says what is wrong
    if logits.dim() > 1:
        rows = [probabilities(row, temperature, top_k, top_p, min_p) for row in logits.flatten(0, -2)]
        return torch.stack(rows).view(logits.shape)
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    temperature = in_fp32(temperature)
    probs = torch.softmax((logits - logits.max()) / temperature, -1)  # a low temperature must not make it infinite
    if not (0 < top_k < len(probs) or top_p < 1 or min_p):
        return probs
    ids = most_likely(probs, top_k) if 0 < top_k < len(probs) else torch.arange(len(probs), device=probs.device)
    ranked, order = probs[ids].sort(descending=True, stable=True)
    keep = ranked >= min_p * ranked[0]
    keep &= ranked.cumsum(0) - ranked < top_p * ranked.sum()  # of the probability, what is more likely has less
    keep[0] = True  # also where top_p or its product is 0 in fp32
    kept = ids[order[keep]]
    return torch.zeros_like(probs).scatter_(0, kept, probs[kept] / probs[kept].sum())


def in_fp32(factor):
    """`factor`, above 0, as near as fp32 comes without 0 or inf, which would make a logit nan."""
    return min(max(factor, torch.finfo(torch.float32).tiny), torch.finfo(torch.float32).max)


def most_likely(probs, k):
    """The ids of the k largest, of equals the lowest ids, in ascending order. Sorting all of GPT-2's takes longer."""
    least = probs.topk(k).values[-1]
    above, equal = (probs > least).nonzero().squeeze(1), (probs == least).nonzero().squeeze(1)
    return torch.cat((above, equal[: k - len(above)])).sort().values


def penalise(logits, ids, penalty):
    """Logits (vocab_size,), those of the tokens in `ids` divided by `penalty`, or multiplied where negative."""
    if penalty == 1:
        return logits
    seen, penalty = torch.tensor(sorted(set(ids)), dtype=torch.long), in_fp32(penalty)
    penalised = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits.scatter(0, seen, penalised.clamp(max=torch.finfo(logits.dtype).max))


class StopText:
    """Cuts a stream of text before the first stop string: text that may begin one is held back."""

    def __init__(self, stops):
        self.stops, self.held, self.stopped = stops, "", False

    def __call__(self, text, last=False):
        """The text that is certain by now."""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped, keep = True, min(found)
        elif last or not self.stops:
            keep = len(self.held)
        else:
            longest = max(map(len, self.stops))
            keep = next((at for at in range(max(0, len(self.held) - longest + 1), len(self.held))
                         if any(stop.startswith(self.held[at:]) for stop in self.stops)), len(self.held))
        out, self.held = self.held[:keep], "" if self.stopped else self.held[keep:]
        return out


def sampling_from(settings):
    """Sampling of a script's settings: those of its fields that it has."""
    return Sampling(**{f.name: settings[f.name] for f in fields(Sampling) if f.name in settings})
