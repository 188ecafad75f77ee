"""
Long contexts: the loss by position, and a key hidden in a long text.

A model uses a long context if its loss keeps falling with the position, and if it finds a sentence far back ("passkey
retrieval", Mohtashami & Jaggi 2023, arXiv:2305.16300). Both are measured for lengths beyond the one trained at, with
every way to stretch rotary positions. eval.py's verbs `context` and `passkey` print the tables.
"""

import contextlib
import random
from pathlib import Path
from typing import NamedTuple

import torch

from inference.tasks import encode_pair, index_of_best, log_likelihoods, score_tokens, share
from loader import fixed_batches

SCALINGS = ("none", "linear", "ntk", "yarn")


class Case(NamedTuple):
    """One row of a table."""

    length: int  # tokens of context
    scaling: str
    factor: float  # of infer.stretch; 0: learned positions, which do not stretch


def cases(config, tokens, lengths=(), scalings=(), factor=0.0):
    """The cases to measure: each length, and beyond the model's context each scaling. -> list of Case

    lengths: by default the model's context, and with RoPE also twice and four times that. scalings: by default all.
    factor: one for all; 0: as each length needs. Raises ValueError for a case that this model or these tokens exclude.
    """
    if not lengths:
        multiples = (1, 2, 4) if config.pos == "rope" else (1,)
        lengths = [config.block_size * n for n in multiples]
    longest = max(lengths)
    if len(tokens) <= longest:
        raise ValueError(f"{tokens.folder}: {len(tokens):,} tokens are too few for --lengths={longest}")
    trained = config.block_size / config.rope_factor  # the context first trained at, before any stretching
    if config.pos != "rope" and longest > trained:
        raise ValueError(f"--lengths={longest} needs a model with pos='rope': this one's positions are learned, and "
                         f"end with block_size={config.block_size}")
    if factor and longest > factor * trained:
        raise ValueError(f"--rope_factor={factor:g} makes a context of {factor * trained:g}: "
                         f"--lengths={longest} is more")
    result = []
    for length in lengths:
        if length <= config.block_size and not factor:
            result.append(Case(length, config.rope_scaling, config.rope_factor if config.pos == "rope" else 0))
            continue
        for scaling in scalings or SCALINGS:
            result.append(Case(length, scaling, factor or length / trained))
    return result


# -----------------------------------------------------------------------------
# The loss by position


def loss_by_position(model, tokens, length, rows, limit=0, context=contextlib.nullcontext):
    """Losses of the targets after 1, 2, ... tokens of context, over fixed windows of `length` tokens, `rows` at a time,
    at most `limit` batches (0: all). -> (summed losses, number of targets), both (length,), fp64"""
    device = next(model.parameters()).device
    total = torch.zeros(length, dtype=torch.float64)
    count = torch.zeros(length, dtype=torch.float64)
    for x, y, *_ in fixed_batches(tokens, length, rows, limit):
        losses, _ = score_tokens(model, x.to(device), y.to(device), context)
        total += losses.cpu().double().sum(0)
        count += (y != -1).sum(0)
    return total, count


def open_figure(plot):
    """An empty figure for draw_losses. Raises ValueError early if it cannot be drawn or saved."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs the package matplotlib: pip install -e '.[report]' -c constraints.txt") from None
    if not Path(plot).parent.is_dir():
        raise ValueError(f"--plot={plot}: there is no folder {Path(plot).parent}")
    return Figure(figsize=(8, 5), layout="constrained")


def draw_losses(figure, rows, width, trained, title, plot):
    """Draw a line for each of `rows`, in the colour of its scaling and with the dashes of its length, and a mark at the
    context `trained` at. `width`: positions in a bin."""
    axes = figure.add_subplot()
    lengths = sorted({row["length"] for row in rows})
    styles = (":", "--", "-.", "-")  # the longest is solid, all below the fourth are dotted
    for row in rows:
        length = row["length"]
        middles = [min(start + width / 2, (start + length) / 2) for start in range(0, length, width)]
        style = styles[max(-4, lengths.index(length) - len(lengths))]
        axes.plot(middles, row["bins"], color=f"C{SCALINGS.index(row['rope_scaling'])}", linestyle=style, marker="o",
                  markersize=3, label=f"{length} {row['rope_scaling']}")
    axes.axvline(trained, color="grey", linewidth=0.8, label="context trained at")
    axes.set(xlabel="tokens of context", ylabel="loss, nats per token", title=title)
    axes.legend(fontsize="small")
    figure.savefig(plot, dpi=150)


# -----------------------------------------------------------------------------
# A hidden key


def key_characters(tokenizer):
    """The characters of a key: the ten digits, or else the letters that the tokenizer knows, at least two. Raises
    ValueError if it knows neither."""

    def known(character):
        try:
            return bool(tokenizer.encode(character))
        except ValueError:
            return False

    for alphabet in ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        characters = "".join(filter(known, alphabet))
        if characters == alphabet or (alphabet[0].isalpha() and len(characters) >= 2):
            return characters
    raise ValueError("the tokenizer has neither the digits nor two letters to make a key of")


def random_keys(characters, count, rng):
    """`count` different keys of five characters."""
    keys = []
    while len(keys) < count:
        key = "".join(rng.choice(characters) for _ in range(5))
        if key not in keys:
            keys.append(key)
    return keys


def hide_key(tokenizer, filler, sentence, keys, depth):
    """A text that hides the first of `keys` and asks for it, followed by each of `keys`. -> [(ids, n), ...], where the
    last n ids are the key

    filler: ids around the hidden sentence; the text is as long, not counting its last token, which is only predicted.
    sentence: "The pass key is {key}.", say. It stands at `depth` (0: first, 1: last); its beginning ends the text.
    """
    before, _, after = sentence.partition("{key}")
    hidden = tokenizer.encode(before + keys[0] + after)
    asked = [encode_pair(tokenizer, before, key) for key in keys]
    room = len(filler) + 1 - len(hidden) - max(len(ids) for ids, _ in asked)  # for filler
    if room < 0:
        raise ValueError(f"{len(filler)} tokens are too few to hide {before + keys[0] + after!r} in and ask for it: "
                         f"at least {len(filler) - room}")
    start = round(depth * room)
    return [([*filler[:start], *hidden, *filler[start:room], *ids], n) for ids, n in asked]


def passkey(model, tokenizer, tokens, length, depth, *, sentence, trials, alternatives, seed, batch_size,
            context=contextlib.nullcontext):
    """How often the model finds a key that is hidden at `depth` in `length` tokens of the stream `tokens`.

    -> {"exact": share of `trials` in which greedy decoding gives the key, "chosen": share in which it is the most
    likely of `alternatives` keys; chance gives 1 / alternatives}, each with its standard error.
    """
    characters = key_characters(tokenizer)
    exact = []
    chosen = []
    for trial in range(trials):
        rng = random.Random(f"{seed}/{length}/{depth}/{trial}")
        keys = random_keys(characters, alternatives, rng)
        start = rng.randrange(len(tokens) - length + 1)
        filler = tokens.read([start], length)[0].tolist()
        scores = log_likelihoods(model, hide_key(tokenizer, filler, sentence, keys, depth), batch_size, context)
        exact.append(scores[0][1])
        chosen.append(index_of_best([ll for ll, _ in scores]) == 0)
    return {**share("exact", exact), **share("chosen", chosen)}
