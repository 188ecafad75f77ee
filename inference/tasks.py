"""
Log-likelihood tasks: multiple choice, and the last word of a passage.

Both ask one question: how likely is a continuation after a context? The items come from a file of JSON lines or from
the Hub, in the task's form on the Hub or in ours:

    {"context": "The sky is", "choices": ["blue", "made of wood"], "answer": 0}      # multiple choice
    {"text": "They sat down at the table, for dinner was on the table"}              # last word

Scores are computed as in lm-eval (EleutherAI's lm-evaluation-harness, 0.4), so they compare with published scores.
"""

import contextlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from files import read_lines

MOST_LOGITS = 2**26  # held at once, in fp32


class Item(NamedTuple):
    where: str  # for errors: the file and line, or the task and row
    pairs: list  # (context, continuation) of each choice
    answer: int  # index of the right choice
    choices: list  # the texts whose lengths count, without the space that joins them to the context


# -----------------------------------------------------------------------------
# The form of each task: a row -> (pairs, answer, choices) of an Item


def join(context, text):
    """`text` as it continues `context`: after a space, unless there is one already or the context is empty."""
    if not context or context[-1].isspace() or text[0].isspace():
        return text
    return f" {text}"


def choices(context, texts, answer):
    """Several texts after one context."""
    if len(texts) < 2:
        raise ValueError
    return [(context, join(context, text)) for text in texts], answer, texts


def own_form(row):
    """context, choices and answer, as in the example above."""
    context, texts, answer = row["context"], row["choices"], row["answer"]
    if not isinstance(context, str) or not isinstance(texts, list) or isinstance(answer, bool):
        raise TypeError
    return choices(context, texts, answer)


def hellaswag(row):
    """Zellers et al. 2019, arXiv:1905.07830, without the marks of WikiHow's pages, as "[step]"."""

    def clean(text):
        lines = []
        for line in text.strip().replace(" [title]", ". ").split("\n"):
            # search only up to the last "]": a line of many "[" would take quadratic time
            head, mark, tail = line.rpartition("]")
            lines.append(re.sub(r"\[.*?\]", "", head + mark) + tail)
        return "\n".join(lines).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choices(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


def arc(row):
    """Clark et al. 2018, arXiv:1803.05457"""
    texts = list(row["choices"]["text"])
    answer = row["choices"]["label"].index(row["answerKey"])
    return choices(f"Question: {row['question']}\nAnswer:", texts, answer)


def piqa(row):
    """Bisk et al. 2020, arXiv:1911.11641"""
    return choices(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def winogrande(row):
    """Sakaguchi et al. 2020, arXiv:1907.10641: each option fills the gap, and the text after the gap is scored."""
    before, _, after = row["sentence"].partition("_")
    after = after.strip()
    contexts = [before + row["option1"], before + row["option2"]]
    pairs = [(context, join(context, after)) for context in contexts]
    return pairs, int(row["answer"]) - 1, [after, after]


def lambada(row):
    """Paperno et al. 2016, arXiv:1606.06031: the last word of a passage, which only the whole passage tells."""
    context, space, word = re.fullmatch(r"(.*\S)(\s+)(\S+)\s*", row["text"], re.S).groups()
    return [(context, space + word)], 0, [word]


TASKS = {  # name: (form of a row, dataset on the Hub, its configuration, its split)
    "hellaswag": (hellaswag, "Rowan/hellaswag", None, "validation"),
    "arc_easy": (arc, "allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": (arc, "allenai/ai2_arc", "ARC-Challenge", "test"),
    "piqa": (piqa, "baber/piqa", None, "validation"),
    "winogrande": (winogrande, "allenai/winogrande", "winogrande_xl", "validation"),
    "lambada": (lambada, "EleutherAI/lambada_openai", "default", "test"),
}


# -----------------------------------------------------------------------------
# Reading items


def read_items(form, rows, name, limit=0):
    """The first `limit` (0: all) of `rows`, pairs of (where, row), as Items. Raises ValueError naming a row of another
    form."""
    items = []
    for where, row in itertools.islice(rows, limit or None):
        try:
            item = Item(where, *form(row))
            has_answer = isinstance(item.answer, int) and 0 <= item.answer < len(item.pairs)
            if not has_answer or not all(isinstance(text, str) and text.strip() for text in item.choices):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            shown = form.__module__.replace(".", "/")
            raise ValueError(f"{where} is not of the form of {name} ({shown}.py shows it)") from None
        items.append(item)
    if not items:
        raise ValueError(f"{name} has no items")
    return items


def json_lines(path):
    """Yield (file and line number, value) of each line that is not blank. Raises OSError, and ValueError naming a line
    that is not JSON."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error})") from None
        yield f"{path}:{number}", row


def hub_rows(task, name, configuration, split):
    """Yield (task and row number, row) of a dataset on the Hub. Raises ValueError if it cannot be loaded."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("tasks of the Hub need the package datasets: pip install -e '.[data]' -c constraints.txt; "
                         "or --data=FILE.jsonl, with rows in the form of the task") from None
    try:
        rows = load_dataset(name, configuration, split=split)
    except Exception as error:  # no network, no such dataset: their errors share no class
        raise ValueError(f"{name} cannot be loaded from the Hub ({type(error).__name__}: {error}); "
                         "--data=FILE.jsonl takes its rows from a file") from None
    for number, row in enumerate(rows):
        yield f"{task} {number}", row


def open_rows(tasks, task, data):
    """(where, row) of each row of the file `data` or, if it is empty, of the Hub's dataset for `task`, one of `tasks`.
    Raises ValueError."""
    if task and task not in tasks:
        raise ValueError(f"task={task!r} is not one of {', '.join(tasks)}")
    if not task and not data:
        raise ValueError(f"what to score? --data=FILE.jsonl, or --task, one of {', '.join(tasks)}")
    if data and not Path(data).is_file():
        raise ValueError(f"there is no file {data}")
    return json_lines(data) if data else hub_rows(task, *tasks[task][1:])


def open_items(task, data, words=False, limit=0):
    """Items of the file `data` or, if it is empty, of the Hub. Their form is that of `task`; if it is empty, ours.
    `words`: last words instead of multiple choice. Raises ValueError."""
    known = {name: fields for name, fields in TASKS.items() if (name == "lambada") == words}
    rows = open_rows(known, task, data)
    if task:
        form = TASKS[task][0]
    else:
        form = lambada if words else own_form
    return read_items(form, rows, task or data, limit)


# -----------------------------------------------------------------------------
# How likely a continuation is


def encode_pair(tokenizer, context, continuation):
    """-> (ids of a context and its continuation, how many of them are the continuation's)

    Both are encoded together, as in training: " word" is one token, so white space at the end of the context belongs to
    the continuation. The continuation begins where the ids differ from the ids of the context alone, so a token across
    the border is scored. If that is the first token, the tokenizer's bos goes before it; ValueError if there is none.
    """
    alone = tokenizer.encode(context.rstrip())
    ids = tokenizer.encode(context + continuation)
    shared = 0
    while shared < min(len(alone), len(ids)) and alone[shared] == ids[shared]:
        shared += 1
    if shared:
        return ids, len(ids) - shared
    if tokenizer.bos is None:
        raise ValueError("the context is empty, and the tokenizer has no token for the beginning of a text")
    return [tokenizer.bos, *ids], len(ids)


@torch.no_grad()
def score_tokens(model, x, y, context=contextlib.nullcontext):
    """For each target its loss in nats (0 where it is -1), and whether it is the most likely token. x and y (B, T)
    -> fp32 and bool (B, T)"""
    losses = []
    likeliest = []
    rows = max(1, MOST_LOGITS // (x.size(1) * model.config.vocab_size))
    for xs, ys in zip(x.split(rows), y.split(rows), strict=True):
        with context():
            logits = model(xs)[0].float()  # (rows, T, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1), ys.flatten(), ignore_index=-1, reduction="none")
        losses.append(loss.view_as(ys))
        likeliest.append(logits.argmax(-1) == ys)
    return torch.cat(losses), torch.cat(likeliest)


def log_likelihoods(model, encoded, batch_size, context=contextlib.nullcontext):
    """(Log-likelihood of the last n of `ids`, whether each of them is the most likely) for each (ids, n) of `encoded`.

    Of more than block_size + 1 ids the first are cut; the last one is only predicted, not read. The rows of a batch
    have nearly the same length. They are padded on the right, where no earlier token sees it.
    """
    device = next(model.parameters()).device
    most = model.config.block_size
    assert all(n <= most for _, n in encoded), "more to score than the context holds"
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    scores = [None] * len(encoded)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [encoded[i][0][-most - 1 :] for i in batch]
        x = torch.zeros(len(batch), max(map(len, rows)) - 1, dtype=torch.long)
        y = torch.full_like(x, -1)
        for row, (i, ids) in enumerate(zip(batch, rows, strict=True)):
            n = encoded[i][1]
            end = len(ids) - 1
            x[row, :end] = torch.tensor(ids[:-1])
            y[row, end - n : end] = torch.tensor(ids[-n:])
        losses, likeliest = score_tokens(model, x.to(device), y.to(device), context)
        sums = losses.cpu().double().sum(1)
        greedy = (likeliest | (y.to(device) == -1)).all(1)
        for i, loss, hit in zip(batch, sums.tolist(), greedy.tolist(), strict=True):
            scores[i] = (-loss, hit)
    return scores


def score_items(model, tokenizer, items, batch_size, context=contextlib.nullcontext):
    """log_likelihoods of the pairs of each item, one list per item. Raises ValueError naming the item."""
    most = model.config.block_size
    encoded = []
    for item in items:
        try:
            for pair in item.pairs:
                encoded.append(encode_pair(tokenizer, *pair))
            for _, n in encoded[-len(item.pairs) :]:
                if n > most:
                    raise ValueError(f"{n} tokens to choose are more than the context of {most}")
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from None
    scores = iter(log_likelihoods(model, encoded, batch_size, context))
    return [list(itertools.islice(scores, len(item.pairs))) for item in items]


# -----------------------------------------------------------------------------
# Figures


def share(name, right):
    """{name: the share of `right` that is true, name_stderr: its standard error}"""
    n = len(right)
    p = sum(right) / n
    return {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}


def index_of_best(scores):
    """The index of the highest score, on a tie the first."""
    return scores.index(max(scores))


def multiple_choice(model, tokenizer, items, batch_size, context=contextlib.nullcontext):
    """The share of items whose right choice is the most likely: as a whole (acc), per character (acc_norm) and per
    UTF-8 byte (acc_bytes). Long choices are less likely than short ones, so acc favours the short ones. The names are
    lm-eval's, whose characters are bytes for ASCII. On a tie the first choice counts as chosen."""
    lengths = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
    scored = score_items(model, tokenizer, items, batch_size, context)
    result = {"items": len(items)}
    for name, length in lengths.items():
        right = []
        for item, scores in zip(items, scored, strict=True):
            per_unit = []
            for (log_likelihood, _), text in zip(scores, item.choices, strict=True):
                per_unit.append(log_likelihood / length(text))
            right.append(index_of_best(per_unit) == item.answer)
        result |= share(name, right)
    return result


def last_word(model, tokenizer, items, batch_size, context=contextlib.nullcontext):
    """The share of items whose last word, with all its tokens, is what greedy decoding gives; and the perplexity of a
    word, not of a token: exp of the mean negative log-likelihood of the words."""
    scored = [scores[0] for scores in score_items(model, tokenizer, items, batch_size, context)]
    mean = sum(ll for ll, _ in scored) / len(scored)
    right = share("acc", [hit for _, hit in scored])
    return {"items": len(items), **right, "perplexity": math.exp(min(-mean, 700))}
