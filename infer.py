"""
From a checkpoint to text: load it, choose the next token, stream.

    model, tokenizer, state, folder = load("out/shakespeare_char")
    decode = tokenizer.stream_decoder()
    for token in stream(model, tokenizer.encode("ROMEO:"), 200):
        print(decode(token), end="")
"""

import math
import sys
from pathlib import Path

import torch

from checkpoint import CheckpointError, find, load_model
from model import GPT, GPTConfig
from tokenizer import load_tokenizer


def load(out_dir, which="latest", device="cpu"):
    """A run's model in eval mode and fp32 on `device`, its tokenizer, the checkpoint's state and folder.

    `which` is latest, best or a step; a damaged latest is passed over, which is said on stderr. The tokenizer is None
    for a run on token ids alone. Raises CheckpointError naming what is missing or damaged.
    """
    folder, state = find(out_dir, which, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    run = folder.resolve().parent.parent if folder.resolve().parent.name == "ckpt" else folder
    try:
        tokenizer = load_tokenizer(next((f for f in (folder, run) if (Path(f) / "tokenizer.json").exists()), run))
    except FileNotFoundError:
        tokenizer = None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"the tokenizer of {run} cannot be read: {e}") from None
    try:
        model = GPT(GPTConfig(**{**state["model"], "attn": "auto"}))
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{folder} holds a model that this version does not know ({e})") from None
    load_model(model, folder)
    return model.to(device).eval(), tokenizer, state, folder


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (..., vocab_size) -> the distribution to draw from, fp32, same shape.

    temperature 0 puts everything on the most likely token (the lowest id on a tie). top_k keeps exactly k tokens, on
    ties too; top_p, of those, the fewest that have at least that share of the probability (Holtzman et al. 2020,
    arXiv:1904.09751).
    Raises ValueError naming a parameter that has no meaning.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or above, and finite")
    if not (isinstance(top_k, int) and top_k >= 0):
        raise ValueError(f"top_k={top_k} must be a whole number; 0: all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]; 1: all tokens")
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits - logits.max(-1, keepdim=True).values  # a low temperature must not make it infinite
    probs = torch.softmax(logits / temperature, -1)
    if (top_k and top_k < logits.size(-1)) or top_p < 1:
        ranked, ids = probs.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ranked[..., top_k:] = 0.0
        before = ranked.cumsum(-1) - ranked  # probability of all that are more likely
        ranked[before >= top_p * ranked.sum(-1, keepdim=True)] = 0.0
        probs = torch.zeros_like(probs).scatter_(-1, ids, ranked / ranked.sum(-1, keepdim=True))
    return probs


@torch.no_grad()
def stream(model, prompt, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, seed=0, eos=None):
    """Yield up to max_new_tokens token ids that follow `prompt` (at least one id), ending before `eos`.

    The same seed gives the same tokens. Past block_size the model sees the last block_size tokens.
    """
    if not prompt:
        raise ValueError("the prompt is empty: it needs at least one token, such as the tokenizer's bos")
    if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise ValueError(f"the prompt has a token outside the model's vocabulary of {model.config.vocab_size}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    ids = torch.tensor([prompt], dtype=torch.long, device=device)
    for _ in range(max_new_tokens):
        logits, _ = model(ids[:, -model.config.block_size :], last_only=True)
        probs = probabilities(logits[0, -1].cpu(), temperature, top_k, top_p)
        token = int(torch.multinomial(probs, 1, generator=generator))
        if token == eos:
            return
        yield token
        ids = torch.cat((ids, torch.tensor([[token]], device=device)), dim=1)
