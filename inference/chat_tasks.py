"""
Answers of a chat model: whether they end by themselves, and whether they are right.

    template = Template(tokenizer)
    questions = puzzle_questions(200)                          # or held_out(...), or read_questions("FILE.jsonl")
    prompts = make_prompts(template, questions, model.config.block_size, sampling.max_new_tokens)
    answers = draw_answers(engine, prompts, sampling)
    result = figures(questions, answers)

A file has a conversation a line, {"messages": [{"role": "user", "content": "..."}, ...]}, or the bare list of messages
(nanochat's form). If its last message is the assistant's, that is the answer to check: a model's answer is exact if
both are equal without the white space around them, and contains it if it occurs in the model's answer.
"""

import json
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from conversation import check_messages
from files import sha256
from inference.puzzles import KINDS, puzzles
from inference.tasks import json_lines, share

CACHE_STEP = 256  # tokens: every block of an engine's cache has as many, or a part of it


class Question(NamedTuple):
    where: str  # for errors: the file and line, or the row of a dataset
    messages: list  # up to the message that is to be answered
    answer: str | None = None  # the right one, if it is known
    kind: str = ""  # figures are also given for each kind


class Prompt(NamedTuple):
    ids: list  # with the beginning of an answer
    room: int  # tokens that an answer may have


class Answer(NamedTuple):
    text: str
    tokens: int  # without the token that ends it
    ended: bool  # by itself, not because it was as long as it may be


# -----------------------------------------------------------------------------
# Questions


def puzzle_questions(count, seed=0, kinds=tuple(KINDS), digits=2, letters=6):
    """`count` different puzzles of the split that no training sees, the kinds in turn. Raises ValueError."""
    questions = []
    for puzzle in puzzles(count, "test", seed, kinds, digits, letters, distinct=True):
        messages = [{"role": "user", "content": puzzle.question}]
        questions.append(Question(f"puzzle {len(questions) + 1}", messages, puzzle.answer, puzzle.kind))
    return questions


def read_questions(path, limit=0):
    """The first `limit` (0: all) conversations of a file. Raises OSError, and ValueError naming a line of another form.
    """
    questions = []
    for where, row in json_lines(path):
        try:
            questions.append(as_question(where, row))
        except ValueError as error:
            raise ValueError(f"{where} is no conversation: {error}") from None
        if len(questions) == limit:
            break
    if not questions:
        raise ValueError(f"{path} has no conversations")
    return questions


def as_question(where, row):
    """A conversation, which ends with the user's message or with the right answer to it. -> Question. Raises ValueError
    """
    messages = check_messages(row.get("messages") if isinstance(row, dict) else row)
    answer = None
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"].strip()
        if not answer:
            raise ValueError("the answer, its last message, is empty")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("there is no user's message to answer")
    return Question(where, messages, answer)


def held_out(tokens, template, limit=0):
    """The beginnings of the first `limit` (0: all) conversations in a split of a chat dataset, each up to its first
    user's message. -> list of Question. Raises ValueError for a dataset without conversations."""
    questions = []
    parts = [part for part, _ in tokens.parts if part.row_size]
    if not parts:
        raise ValueError(f"{tokens.folder} has no conversations: --dataset names a chat dataset, --data=FILE.jsonl a "
                         "file of conversations, --task=puzzles asks generated questions")
    for part in parts:
        for start in range(0, len(part), part.row_size):
            for ids in conversations_of(part, start):
                messages = beginning(template.decode(ids))
                if messages:
                    questions.append(Question(f"{part.folder}, token {start}", messages))
            if limit and len(questions) >= limit:
                return questions[:limit]
    if not questions:
        raise ValueError(f"{tokens.folder}: no conversation of the {tokens.split} split begins with a user's message")
    return questions


def conversations_of(tokens, start):
    """Yield the ids of each conversation in the row that begins at token `start`; padding has nothing learned."""
    size = tokens.row_size
    row = tokens.read([start], size)[0].tolist()
    learned = tokens.read_bits("learned", [start], size)[0]
    begins = np.flatnonzero(tokens.read_bits("begins", [start], size)[0]).tolist()
    for first, end in zip(begins, [*begins[1:], size], strict=True):
        if learned[first:end].any():
            yield row[first:end]


def beginning(messages):
    """Messages up to the first user's message; [] if the assistant's comes before it."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            break
        if message["role"] == "user":
            return messages[: i + 1]
    return []


def questions_sha256(questions):
    """Names the questions: figures compare if it is equal."""
    asked = [(question.messages, question.answer) for question in questions]
    return sha256(json.dumps(asked, ensure_ascii=False))


# -----------------------------------------------------------------------------
# Answers


def make_prompts(template, questions, block_size, max_new_tokens):
    """A Prompt for each question, or None where the context of `block_size` has no room for it.

    An answer gets max_new_tokens, if need be without the oldest turns of a conversation. A last message that is too
    long for that leaves the answer less. Raises ValueError naming a question that the tokenizer cannot encode.
    """
    prompts = []
    for question in questions:
        try:
            template.encode(question.messages, reply=True)
        except ValueError as error:
            raise ValueError(f"{question.where}: {error}") from None
        prompt = None
        for room in (block_size + 1 - max_new_tokens, block_size):  # the last token of an answer is never read
            try:
                ids, _ = template.fit(question.messages, room)
            except ValueError:  # too long
                continue
            prompt = Prompt(ids, min(max_new_tokens, block_size + 1 - len(ids)))
            break
        prompts.append(prompt)
    if not any(prompts):
        raise ValueError(f"every question is longer than the model's context of {block_size} tokens")
    return prompts


def cache_size(prompts, requests):
    """Tokens that an engine's cache must hold for as many `requests` at once as there are, or may be."""
    longest = max(len(prompt.ids) + prompt.room for prompt in prompts if prompt)
    at_once = min(requests, sum(prompt is not None for prompt in prompts))
    return at_once * -(-longest // CACHE_STEP) * CACHE_STEP


def draw_answers(engine, prompts, sampling):
    """The Answer to each prompt, None to None. All are drawn together; the i-th has the seed of `sampling` plus i."""
    asked = [i for i, prompt in enumerate(prompts) if prompt]
    samplings = []
    for i in asked:
        samplings.append(replace(sampling, max_new_tokens=prompts[i].room, seed=sampling.seed + i))
    answers = [None] * len(prompts)
    requests = engine.generate([prompts[i].ids for i in asked], samplings)
    for i, request in zip(asked, requests, strict=True):
        answers[i] = Answer(request.text, len(request.tokens), request.finish != "length")
    return answers


# -----------------------------------------------------------------------------
# Figures


def figures(questions, answers):
    """What came of the questions: {"items", "too_long" (not asked), "ended", "mean_tokens"} and, where right answers
    are known, {"exact", "contains"} and for puzzles "kinds". Shares have a standard error. A question that was too long
    counts as answered wrongly."""
    given = [answer for answer in answers if answer]
    result = {"items": len(questions), "too_long": len(answers) - len(given),
              **share("ended", [answer.ended for answer in given]),
              "mean_tokens": sum(answer.tokens for answer in given) / len(given)}
    known = [pair for pair in zip(questions, answers, strict=True) if pair[0].answer is not None]
    if not known:
        return result
    result["checked"] = len(known)
    result |= share("exact", [is_exact(*pair) for pair in known])
    result |= share("contains", [contains(*pair) for pair in known])
    kinds = {}
    for kind in dict.fromkeys(question.kind for question, _ in known if question.kind):
        right = [is_exact(*pair) for pair in known if pair[0].kind == kind]
        kinds[kind] = {"items": len(right), **share("exact", right)}
    return {**result, "kinds": kinds} if kinds else result


def is_exact(question, answer):
    return answer is not None and answer.text.strip() == question.answer.strip()


def contains(question, answer):
    return answer is not None and question.answer.strip() in answer.text


def table(result):
    """The lines that show `figures` to people."""
    lines = [f"{'ended by themselves':<20}{percent(result, 'ended')}   mean length {result['mean_tokens']:.1f} tokens"]
    for kind, row in result.get("kinds", {}).items():
        lines.append(f"{kind:<20}{percent(row, 'exact')}   exact, of {row['items']:,}")
    if "exact" in result:
        lines.append(f"{'exact':<20}{percent(result, 'exact')}   of {result['checked']:,}")
        lines.append(f"{'contain the answer':<20}{percent(result, 'contains')}")
    if result["too_long"]:
        lines.append(f"{'too long to ask':<20}{result['too_long']:,}")
    return lines


def percent(result, name):
    """A share and its standard error in percent, in columns."""
    error = result[f"{name}_stderr"]
    end = "" if error is None else f" ± {100 * error:4.1f}%"
    return f"{100 * result[name]:6.1f}%{end}"
