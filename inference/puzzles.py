"""
Puzzles: generated questions whose answers can be checked, as conversations.

    puzzle = make_puzzle("reverse", seed=1, index=8)   # the same one on every machine
    puzzle.question, puzzle.answer                      # "Reverse ziap.", "paiz"
    for messages in conversations(1000, "train"): ...   # what data/puzzles/prepare.py writes

A puzzle is a function of its kind, a seed and its index. Whether it is for training, validation or the test follows
from a hash of what it asks, whatever the words, the seed and the difficulty: no question of one split is in another.
12 + 34 and 34 + 12 ask the same. Answers are short and exact, and a character-level model of a million parameters can
learn them: the word stands at the end of the question, at a distance from its answer that the form alone decides.
"""

import hashlib
import itertools
import random
import string
from collections.abc import Callable
from typing import NamedTuple

SPLITS = {"train": 0.9, "val": 0.05, "test": 0.05}  # the share of all questions
SHORTEST = 3  # letters of a word
MOST_COUNTED = 3  # of the letter that is counted
MOST_REPEATS = 500  # one after another, before there seem to be no other questions
FEWEST_DIGITS = 2  # numbers of one digit make only a hundred sums: too few for a test of their own


class Puzzle(NamedTuple):
    kind: str
    question: str
    answer: str
    asks: str  # the same for all words that ask the same


class Kind(NamedTuple):
    draw: Callable  # (random numbers, digits, letters) -> (what the phrasings name, answer, what is asked)
    phrasings: tuple[str, ...]


# -----------------------------------------------------------------------------
# The kinds


def draw_word(rng, letters, alphabet=string.ascii_lowercase):
    """SHORTEST to `letters` characters of `alphabet`, each drawn by itself."""
    length = rng.randint(SHORTEST, letters)
    return "".join(rng.choice(alphabet) for _ in range(length))


def draw_sum(rng, digits, letters):
    a = rng.randrange(10**digits)
    b = rng.randrange(10**digits)
    return {"a": a, "b": b}, str(a + b), f"{min(a, b)}/{max(a, b)}"


def draw_spelling(rng, digits, letters):
    word = draw_word(rng, letters)
    return {"word": word}, " ".join(word), word


def draw_count(rng, digits, letters):
    """A letter that occurs 0 to MOST_COUNTED times, each number as often: in a random word it would mostly be 0."""
    letter = rng.choice(string.ascii_lowercase)
    others = string.ascii_lowercase.replace(letter, "")
    word = list(draw_word(rng, letters, others))
    times = rng.randint(0, min(MOST_COUNTED, len(word)))
    for place in rng.sample(range(len(word)), times):
        word[place] = letter
    word = "".join(word)
    return {"letter": letter, "word": word}, str(times), f"{letter}/{word}"


def draw_reversal(rng, digits, letters):
    word = draw_word(rng, letters)
    return {"word": word}, word[::-1], word


def draw_copy(rng, digits, letters):
    text = draw_word(rng, letters, string.ascii_lowercase + string.digits)
    return {"text": text}, text, text


KINDS = {
    "sum": Kind(draw_sum, ("What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b} = ?")),
    "spell": Kind(draw_spelling, ("Spell the word {word}.", "Spell {word}.", "How do you spell {word}?")),
    "count": Kind(draw_count, ("How many times does {letter} occur in {word}?", "Count the letter {letter} in {word}.",
                               "How often is {letter} in {word}?")),
    "reverse": Kind(draw_reversal, ("Reverse {word}.", "What is the reverse of {word}?",
                                    "From the last letter to the first: {word}.")),
    "copy": Kind(draw_copy, ("Copy {text}.", "Repeat {text}.", "Say this again: {text}.")),
}

# -----------------------------------------------------------------------------
# Splits


def split_of(kind, asks):
    """The split of a question: train, val or test, by a hash of what it asks."""
    digest = hashlib.blake2b(asks.encode(), key=kind.encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "little") / 2**64
    for split, size in SPLITS.items():
        share -= size
        if share < 0:
            return split
    return "test"  # the sum of the sizes is 1 except for rounding


def make_puzzle(kind, seed, index, split="train", digits=2, letters=6):
    """The `index`-th puzzle of a kind, seed and split. -> Puzzle

    digits: most digits of a number in a sum. letters: most letters of a word.
    """
    rng = random.Random(f"{kind}/{seed}/{index}")
    while True:  # until one is of this split
        names, answer, asks = KINDS[kind].draw(rng, digits, letters)
        if split_of(kind, asks) == split:
            question = rng.choice(KINDS[kind].phrasings).format(**names)
            return Puzzle(kind, question, answer, asks)


def check_options(split, kinds, digits, letters):
    """Raises ValueError for options that make_puzzle cannot use."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds={','.join(kinds)}: each is one of {', '.join(KINDS)}")
    if digits < FEWEST_DIGITS:
        raise ValueError(f"digits={digits} must be at least {FEWEST_DIGITS}: there are too few sums to hold some out")
    if letters < SHORTEST:
        raise ValueError(f"letters={letters} must be at least {SHORTEST}, the length of the shortest word")


def puzzles(count, split, seed=0, kinds=tuple(KINDS), digits=2, letters=6, distinct=False):
    """Yield `count` puzzles of a split, the kinds in turn; a kind that is named several times comes as often.
    `distinct`: no two ask the same. Raises ValueError for an option that has no meaning, or if there are too few
    different questions."""
    check_options(split, kinds, digits, letters)
    indices = {kind: itertools.count() for kind in kinds}
    seen = set()
    for kind in itertools.islice(itertools.cycle(kinds), count):
        for index in itertools.islice(indices[kind], MOST_REPEATS):
            puzzle = make_puzzle(kind, seed, index, split, digits, letters)
            if not distinct or (kind, puzzle.asks) not in seen:
                break
        else:
            raise ValueError(f"there are too few different {kind} puzzles of the {split} split to make {count:,} in "
                             "all: ask for fewer, or for more digits or letters")
        if distinct:
            seen.add((kind, puzzle.asks))
        yield puzzle


def conversations(count, split, seed=0, kinds=tuple(KINDS), digits=2, letters=6):
    """Yield `count` conversations, each a list of two messages: a question of the user and the assistant's answer."""
    for puzzle in puzzles(count, split, seed, kinds, digits, letters):
        yield [{"role": "user", "content": puzzle.question}, {"role": "assistant", "content": puzzle.answer}]
