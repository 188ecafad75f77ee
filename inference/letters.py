"""
Multiple choice of chat models: which letter begins the answer?

The question with its lettered options is a user's message; the model chooses the letter that is the most likely right
after the beginning of the assistant's answer. The words of the question are nanochat's (tasks/common.py, render_mc), so
figures compare: the letter stands behind its option, without a space, and so is the very token that is asked for. MMLU
was first scored by the letters' probabilities (Hendrycks et al. 2021, arXiv:2009.03300). Letters are A, B, C, ..., also
for the rows of ARC that number their options.

Items have their form on the Hub or inference/tasks.py's own one, context, choices and answer, with 2 to 10 choices.
"""

import contextlib

import torch

from inference.tasks import MOST_LOGITS, TASKS, index_of_best, log_likelihoods, open_rows, read_items, share

LETTERS = "ABCDEFGHIJ"


# -----------------------------------------------------------------------------
# The form of each task


def ask(question, options, answer):
    """-> (pairs of the user's message and each letter, answer, options) of an Item"""
    if not isinstance(question, str) or not 2 <= len(options) <= len(LETTERS) or isinstance(answer, bool):
        raise ValueError
    lines = [f"Multiple Choice question: {question}"]
    for letter, option in zip(LETTERS, options, strict=False):
        lines.append(f"- {option}={letter}")
    message = "\n".join([*lines, "", "Respond only with the letter of the correct answer."])
    return [(message, letter) for letter in LETTERS[: len(options)]], answer, options


def own_form(row):
    """context, choices and answer, as in inference/tasks.py."""
    if not isinstance(row["choices"], list):
        raise TypeError
    return ask(row["context"], row["choices"], row["answer"])


def arc(row):
    """Clark et al. 2018, arXiv:1803.05457"""
    answer = list(row["choices"]["label"]).index(row["answerKey"])
    return ask(row["question"], list(row["choices"]["text"]), answer)


def mmlu(row):
    """Hendrycks et al. 2021, arXiv:2009.03300: question, choices, answer (an index), subject."""
    return ask(row["question"], list(row["choices"]), row["answer"])


LETTER_TASKS = {  # name: (form of a row, dataset on the Hub, its configuration, its split)
    "arc_easy": (arc, *TASKS["arc_easy"][1:]),
    "arc_challenge": (arc, *TASKS["arc_challenge"][1:]),
    "mmlu": (mmlu, "cais/mmlu", "all", "test"),
}


def open_letters(task, data, limit=0):
    """Items of the file `data` or, if it is empty, of the Hub. Their form is that of `task`; if it is empty, ours.
    Raises ValueError."""
    rows = open_rows(LETTER_TASKS, task, data)
    form = LETTER_TASKS[task][0] if task else own_form
    return read_items(form, rows, task or data, limit)


# -----------------------------------------------------------------------------
# How likely each letter is


def by_letter(model, template, items, batch_size, context=contextlib.nullcontext):
    """The share of items whose right letter is the most likely; on a tie the first one counts as chosen.

    -> {"items", "acc", "acc_stderr", "chance": what guessing gives, "cut": items longer than the model's context, whose
    beginning the model does not read}. Raises ValueError naming an item that the tokenizer cannot encode.
    """
    prompts = []
    choices = []
    for item in items:
        try:
            message = {"role": "user", "content": item.pairs[0][0]}
            prompts.append(template.encode([message], reply=True)[0])
            choices.append([template.tokenizer.encode(letter) for _, letter in item.pairs])
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from None
    right = []
    for item, scores in zip(items, letter_scores(model, prompts, choices, batch_size, context), strict=True):
        right.append(index_of_best(scores) == item.answer)
    chance = sum(1 / len(item.pairs) for item in items) / len(items)
    cut = sum(len(ids) > model.config.block_size for ids in prompts)
    return {"items": len(items), **share("acc", right), "chance": chance, "cut": cut}


def letter_scores(model, prompts, choices, batch_size, context=contextlib.nullcontext):
    """Log-likelihoods of the choices after each prompt. prompts: lists of ids; choices: for each prompt a list of
    choices, which are lists of ids. -> a list of floats for each prompt"""
    if all(len(ids) == 1 for options in choices for ids in options):
        return first_token_scores(model, prompts, choices, batch_size, context)
    encoded = []
    for prompt, options in zip(prompts, choices, strict=True):
        encoded += [(prompt + ids, len(ids)) for ids in options]
    scores = iter(log_likelihoods(model, encoded, batch_size, context))
    return [[next(scores)[0] for _ in options] for options in choices]


@torch.no_grad()
def first_token_scores(model, prompts, choices, batch_size, context=contextlib.nullcontext):
    """letter_scores where each choice is one token: all choices of a prompt are read from the same logits."""
    device = next(model.parameters()).device
    most = model.config.block_size
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    scores = [None] * len(prompts)
    while order:
        longest = min(len(prompts[order[0]]), most)
        rows = max(1, min(batch_size, MOST_LOGITS // (longest * model.config.vocab_size)))
        batch, order = order[:rows], order[rows:]
        x = torch.zeros(len(batch), longest, dtype=torch.long)  # padded on the right, where no earlier token sees it
        for row, i in zip(x, batch, strict=True):
            ids = prompts[i][-most:]
            row[: len(ids)] = torch.tensor(ids)
        with context():
            logits = model(x.to(device))[0]  # (rows, longest, vocab_size)
        for row, i in zip(logits, batch, strict=True):
            last = row[min(len(prompts[i]), most) - 1].float().cpu().double().log_softmax(-1)
            scores[i] = [last[ids[0]].item() for ids in choices[i]]
    return scores
