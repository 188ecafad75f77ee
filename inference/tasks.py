"""
Log-likelihood tasks: multiple choice, the last word of a passage, a key hidden in a long text.

All are one question: how likely is a continuation after a context? What is asked comes from a file of JSON lines or
from the Hub, in the form that the task has there or in our own:

    {"context": "The sky is", "choices": ["blue", "made of wood"], "answer": 0}      # multiple choice
    {"text": "They sat down at the table, for dinner was on the table"}              # last word

What is computed is what lm-eval (EleutherAI's lm-evaluation-harness, 0.4) computes, so that figures compare.
"""

import contextlib
import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from files import read_lines

MOST_LOGITS = 2**26  # held at once, in fp32


class Item(NamedTuple):
    where: str  # for errors: the file and line, or the task and row
    pairs: list  # (context, continuation), of which one is right
    answer: int  # which
    choices: list  # the texts whose lengths count, without the space that joins them


# -----------------------------------------------------------------------------
# What is asked


def join(context, text):
    """`text` as it continues `context`: after a space, unless there is one, or nothing before it."""
    return text if not context or context[-1].isspace() or text[0].isspace() else f" {text}"


def choices(context, texts, answer):
    """-> (pairs, answer, choices) of an Item"""
    if len(texts) < 2:
        raise ValueError
    return [(context, join(context, text)) for text in texts], answer, texts


def own(row):
    context, texts, answer = row["context"], row["choices"], row["answer"]
    if not isinstance(context, str) or not isinstance(texts, list) or isinstance(answer, bool):
        raise TypeError
    return choices(context, texts, answer)


def hellaswag(row):
    """Zellers et al. 2019, arXiv:1905.07830; the marks of WikiHow's pages are taken out."""

    def clean(text):
        lines = [line.rpartition("]") for line in text.strip().replace(" [title]", ". ").split("\n")]
        kept = [re.sub(r"\[.*?\]", "", head + mark) + tail for head, mark, tail in lines]  # "[" * 1e6: linear so
        return "\n".join(kept).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choices(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


def arc(row):
    """Clark et al. 2018, arXiv:1803.05457"""
    found = row["choices"]
    return choices(f"Question: {row['question']}\nAnswer:", list(found["text"]), found["label"].index(row["answerKey"]))


def piqa(row):
    """Bisk et al. 2020, arXiv:1911.11641"""
    return choices(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def winogrande(row):
    """Sakaguchi et al. 2020, arXiv:1907.10641: what follows the gap is the same, what stands before it differs."""
    before, _, after = row["sentence"].partition("_")
    after = after.strip()
    contexts = [before + row["option1"], before + row["option2"]]
    return [(context, join(context, after)) for context in contexts], int(row["answer"]) - 1, [after, after]


def lambada(row):
    """Paperno et al. 2016, arXiv:1606.06031: the last word of a passage, which takes all of it to guess."""
    context, space, word = re.fullmatch(r"(.*\S)(\s+)(\S+)\s*", row["text"], re.S).groups()
    return [(context, space + word)], 0, [word]


TASKS = {  # name: (how a row is read, the Hub's dataset, its configuration, the split)
    "hellaswag": (hellaswag, "Rowan/hellaswag", None, "validation"),
    "arc_easy": (arc, "allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": (arc, "allenai/ai2_arc", "ARC-Challenge", "test"),
    "piqa": (piqa, "baber/piqa", None, "validation"),
    "winogrande": (winogrande, "allenai/winogrande", "winogrande_xl", "validation"),
    "lambada": (lambada, "EleutherAI/lambada_openai", "default", "test"),
}


def read_items(read, rows, name, limit=0):
    """The first `limit` (0: all) rows as Items. Raises ValueError naming the row that is none."""
    items = []
    for where, row in itertools.islice(rows, limit or None):
        try:
            pairs, answer, texts = read(row)
            right = isinstance(answer, int) and 0 <= answer < len(pairs)
            if not right or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise ValueError(f"{where} is not of the form of {name} (inference/tasks.py shows it)") from None
        items.append(Item(where, pairs, answer, texts))
    if not items:
        raise ValueError(f"there is nothing in {name}")
    return items


def json_lines(path):
    """Yield (file and line, what it holds). Raises ValueError naming the line that is no JSON, OSError."""
    for n, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{path}:{n} is not JSON ({error})") from None
        if line.strip():
            yield f"{path}:{n}", row


def hub_rows(task):
    """Yield (task and row, what it holds) of a dataset of the Hub. Raises ValueError where it cannot be had."""
    _, name, configuration, split = TASKS[task]
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("tasks of the Hub need the package datasets: pip install -e '.[data]' -c constraints.txt; "
                         "or --data=FILE.jsonl, with the rows as the task has them") from None
    try:
        rows = load_dataset(name, configuration, split=split)
    except Exception as error:  # no network, no such dataset: none has a class in common
        raise ValueError(f"{name} cannot be had from the Hub ({type(error).__name__}: {error}); "
                         "--data=FILE.jsonl takes its rows from a file") from None
    yield from ((f"{task} {n}", row) for n, row in enumerate(rows))


def open_items(task, data, words=False, limit=0):
    """Items of the file `data`, or else of the Hub, in the form of `task`, or else our own; `words`: of last words."""
    known = [name for name in TASKS if (name == "lambada") == words]
    if task not in ("", *known):
        raise ValueError(f"task={task!r} is not one of {', '.join(known)}")
    if not task and not data:
        raise ValueError(f"what to score? --data=FILE.jsonl, or --task, one of {', '.join(known)}")
    if data and not Path(data).is_file():
        raise ValueError(f"there is no file {data}")
    rows = json_lines(data) if data else hub_rows(task)
    return read_items(TASKS[task][0] if task else lambada if words else own, rows, task or data, limit)


# -----------------------------------------------------------------------------
# How likely it is


def encode_pair(tokenizer, context, continuation):
    """Ids of a context with what continues it, and how many of them are the continuation's.

    Both are encoded together, as the model has seen texts: " word" is one token, so white space at the end of the
    context counts to the continuation. What counts begins where the ids are no longer those of the context alone, so
    that a token across the border is scored, not taken as given. Before the very first token there is the tokenizer's
    bos. Raises ValueError where it has none.
    """
    kept = context.rstrip()
    alone, ids = tokenizer.encode(kept), tokenizer.encode(context + continuation)
    shared = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
    if shared:
        return ids, len(ids) - shared
    if tokenizer.bos is None:
        raise ValueError("the context is empty, and the tokenizer has no token for the beginning of a text")
    return [tokenizer.bos, *ids], len(ids)


@torch.no_grad()
def score_tokens(model, x, y, context=contextlib.nullcontext):
    """Of each target the loss in nats (0 where it is -1), and whether it is the likeliest token. x and y (B, T)
    -> fp32 and bool (B, T)"""
    losses, likeliest = [], []
    rows = max(1, MOST_LOGITS // (x.size(1) * model.config.vocab_size))
    for xs, ys in zip(x.split(rows), y.split(rows), strict=True):
        with context():
            logits = model(xs)[0].float()  # (rows, T, vocab_size)
        each = F.cross_entropy(logits.flatten(0, 1), ys.flatten(), ignore_index=-1, reduction="none")
        losses.append(each.view_as(ys))
        likeliest.append(logits.argmax(-1) == ys)
    return torch.cat(losses), torch.cat(likeliest)


def log_likelihoods(model, encoded, batch_size, context=contextlib.nullcontext):
    """(log-likelihood of the last n of `ids`, whether each is the likeliest) for each (ids, n) of `encoded`.

    Ids past block_size + 1 are cut on the left: the last is not read, only predicted. Rows of a batch are of nearly one
    length; they are filled up on the right, where nothing before looks.
    """
    device, most = next(model.parameters()).device, model.config.block_size
    assert all(n <= most for _, n in encoded), "more to score than the context holds"
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    found = [None] * len(encoded)
    for start in range(0, len(order), batch_size):
        batch = [(i, encoded[i][0][-most - 1 :], encoded[i][1]) for i in order[start : start + batch_size]]
        x = torch.zeros(len(batch), max(len(ids) for _, ids, _ in batch) - 1, dtype=torch.long)
        y = torch.full_like(x, -1)
        for row, (_, ids, n) in enumerate(batch):
            x[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            y[row, len(ids) - 1 - n : len(ids) - 1] = torch.tensor(ids[-n:])
        losses, likeliest = score_tokens(model, x.to(device), y.to(device), context)
        sums = losses.cpu().double().sum(1)
        hits = (likeliest | (y.to(device) == -1)).all(1)
        for (i, _, _), loss, hit in zip(batch, sums.tolist(), hits.tolist(), strict=True):
            found[i] = (-loss, hit)
    return found


def score_items(model, tokenizer, items, batch_size, context=contextlib.nullcontext):
    """log_likelihoods of the pairs of each item, a list for each. Raises ValueError naming the item."""
    encoded, most = [], model.config.block_size
    for item in items:
        try:
            encoded.append([encode_pair(tokenizer, *pair) for pair in item.pairs])
            if too_long := next((n for _, n in encoded[-1] if n > most), 0):
                raise ValueError(f"{too_long} tokens to choose are more than the context of {most}")
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from None
    found = iter(log_likelihoods(model, [pair for pairs in encoded for pair in pairs], batch_size, context))
    return [list(itertools.islice(found, len(item.pairs))) for item in items]


# -----------------------------------------------------------------------------
# Figures


def share(name, right):
    """{name: the share that is right, name_stderr: its standard error}"""
    p, n = sum(right) / len(right), len(right)
    return {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}


def first_of_the_best(scores):
    return scores.index(max(scores))


def multiple_choice(model, tokenizer, items, batch_size, context=contextlib.nullcontext):
    """The share of items whose right choice is the likeliest: as a whole (acc), for each of its characters (acc_norm)
    and for each of its UTF-8 bytes (acc_bytes). Long choices are less likely than short ones, so acc favours the short.
    The names are lm-eval's; characters are bytes in ASCII. Of equals the first is chosen."""
    lengths = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
    right = {name: [] for name in lengths}
    for item, scored in zip(items, score_items(model, tokenizer, items, batch_size, context), strict=True):
        for name, length in lengths.items():
            each = [ll / length(text) for (ll, _), text in zip(scored, item.choices, strict=True)]
            right[name].append(first_of_the_best(each) == item.answer)
    return {"items": len(items), **{k: v for name in right for k, v in share(name, right[name]).items()}}


def last_word(model, tokenizer, items, batch_size, context=contextlib.nullcontext):
    """The share of items whose last word is what greedy decoding says, all its tokens, and exp of the mean of its
    negative log-likelihoods: perplexity of a word, not of a token."""
    scored = [one for one, in score_items(model, tokenizer, items, batch_size, context)]
    mean = sum(ll for ll, _ in scored) / len(scored)
    return {"items": len(items), **share("acc", [hit for _, hit in scored]), "perplexity": math.exp(min(-mean, 700))}


# -----------------------------------------------------------------------------
# A key hidden in a long text (Mohtashami & Jaggi 2023, arXiv:2305.16300)


def key_characters(tokenizer):
    """What keys are made of: digits, or the letters a to z of which a tokenizer has at least two."""

    def known(character):
        try:
            return bool(tokenizer.encode(character))
        except ValueError:
            return False

    for alphabet in ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        found = "".join(filter(known, alphabet))
        if len(found) == len(alphabet) or len(found) > 1 and alphabet[0].isalpha():
            return found
    raise ValueError("the tokenizer has neither the digits nor two letters, of which a key could be made")


def hide_key(tokenizer, filler, sentence, keys, depth):
    """The ids of a text that hides the first of `keys` and asks for it, ending in each of `keys`. -> [(ids, n), ...]

    filler: ids, of which as many are taken as leave len(filler) in all, without the last token, which is predicted.
    sentence: as "The pass key is {key}." It stands at `depth` (0: first, 1: last), and its beginning again at the end.
    """
    before, _, after = sentence.partition("{key}")
    hidden = tokenizer.encode(before + keys[0] + after)
    asked = [encode_pair(tokenizer, before, key) for key in keys]
    room = len(filler) + 1 - len(hidden) - max(len(ids) for ids, _ in asked)
    if room < 0:
        raise ValueError(f"{len(filler)} tokens are too few to hide {before + keys[0] + after!r} in and ask for it: "
                         f"at least {len(filler) - room}")
    at = round(depth * room)
    return [([*filler[:at], *hidden, *filler[at:room], *ids], n) for ids, n in asked]


def passkey(model, tokenizer, tokens, length, depth, *, sentence, trials, alternatives, seed, batch_size,
            context=contextlib.nullcontext):
    """How often a key hidden at `depth` in `length` tokens of the stream `tokens` is found, in `trials`: "exact",
    greedy decoding says it; "chosen", it is the likeliest of `alternatives` keys, where chance finds one in so many."""
    alphabet, exact, chosen = key_characters(tokenizer), [], []
    for trial in range(trials):
        rng = random.Random(f"{seed}/{length}/{depth}/{trial}")
        keys = []
        while len(keys) < alternatives:
            key = "".join(rng.choice(alphabet) for _ in range(5))
            keys += [key] * (key not in keys)
        filler = tokens.read([rng.randrange(len(tokens) - length + 1)], length)[0].tolist()
        scored = log_likelihoods(model, hide_key(tokenizer, filler, sentence, keys, depth), batch_size, context)
        exact.append(scored[0][1])
        chosen.append(first_of_the_best([ll for ll, _ in scored]) == 0)
    return {**share("exact", exact), **share("chosen", chosen)}
