"""Puzzles: right answers, the same ones everywhere, and no question of one split in another."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset import Tokens
from inference.puzzles import KINDS, SPLITS, conversations, make_puzzle, puzzles, split_of
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MANY = 6_000


@pytest.fixture(scope="module")
def drawn():
    """{split: many of its puzzles}, with other seeds and difficulties for each."""
    options = {"train": {"seed": 1}, "val": {"seed": 1, "letters": 5}, "test": {"seed": 2, "letters": 4}}
    return {split: list(puzzles(MANY, split, **options[split])) for split in SPLITS}


def solve(kind, question):
    """The answer, from the words of the question alone."""
    words = question.rstrip("?.=").replace("= ?", "").replace(".", " ").replace(":", " ").split()
    if kind == "sum":
        return str(sum(int(word) for word in words if word.isdigit()))
    if kind == "count":
        word = words[-1]
        letter = next(word for word in words if len(word) == 1)
        return str(word.count(letter))
    last = words[-1]
    return {"spell": " ".join(last), "reverse": last[::-1], "copy": last}[kind]


# -----------------------------------------------------------------------------
# Questions and answers


def test_every_answer_is_right(drawn):
    for puzzle in drawn["train"]:
        assert puzzle.answer == solve(puzzle.kind, puzzle.question.rstrip(" ?=")), puzzle


def test_a_wrong_answer_would_be_seen(drawn):
    """Negative control of the test above."""
    for kind in KINDS:
        first, second = [puzzle for puzzle in drawn["train"] if puzzle.kind == kind][:2]
        assert first.answer != solve(kind, second.question.rstrip(" ?="))


def test_a_puzzle_follows_from_its_kind_seed_and_index():
    """The same in another process; others for another kind, seed or index. The figures of a run stand on that."""
    assert make_puzzle("reverse", seed=1, index=8)[1:] == ("Reverse ziap.", "paiz", "ziap")
    code = "from inference.puzzles import puzzles; print([p.question for p in puzzles(50, 'val', seed=3)])"
    here = str([puzzle.question for puzzle in puzzles(50, "val", seed=3)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == here, done.stderr
    assert [make_puzzle("sum", 3, i, "val") for i in range(10)] == list(puzzles(10, "val", 3, ("sum",)))
    assert list(puzzles(10, "val", 3)) != list(puzzles(10, "val", 4))


def test_kinds_take_turns_and_have_several_phrasings(drawn):
    assert [puzzle.kind for puzzle in drawn["test"][:6]] == [*KINDS, "sum"]
    for kind, (_, phrasings) in KINDS.items():
        assert len(phrasings) >= 3
        asked = [puzzle.question for puzzle in drawn["train"] if puzzle.kind == kind]
        for phrasing in phrasings:
            start = phrasing.split("{")[0]
            assert sum(question.startswith(start) for question in asked) > len(asked) / 5
    question, answer = next(conversations(1, "train", 0, ("copy",)))
    puzzle = make_puzzle("copy", 0, 0)
    assert question == {"role": "user", "content": puzzle.question}
    assert answer == {"role": "assistant", "content": puzzle.answer}


@pytest.mark.parametrize("digits, letters", [(2, 3), (3, 8)])
def test_difficulty_is_what_was_asked(digits, letters):
    for puzzle in puzzles(2000, "train", 0, digits=digits, letters=letters):
        if puzzle.kind == "sum":
            assert all(int(number) < 10**digits for number in puzzle.asks.split("/"))
        else:
            assert 3 <= len(puzzle.asks.split("/")[-1]) <= letters
    longest = max(len(p.asks) for p in puzzles(500, "train", 0, ("copy",), digits, letters))
    assert longest == letters


def test_counts_are_no_guess():
    """Each number from 0 to 3 is as frequent: who always says the same is right once in four times."""
    counted = np.unique([puzzle.answer for puzzle in puzzles(4000, "train", kinds=("count",))], return_counts=True)
    assert counted[0].tolist() == ["0", "1", "2", "3"]
    assert max(counted[1]) < 0.3 * 4000


# -----------------------------------------------------------------------------
# Held out


def test_no_question_of_one_split_is_in_another(drawn):
    """Whatever the words, the seed, the difficulty and how many were drawn."""
    asked = {split: {(puzzle.kind, puzzle.asks) for puzzle in drawn[split]} for split in SPLITS}
    questions = {split: {puzzle.question for puzzle in drawn[split]} for split in SPLITS}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not asked[a] & asked[b] and not questions[a] & questions[b]
    assert all(split_of(puzzle.kind, puzzle.asks) == split for split in SPLITS for puzzle in drawn[split])


def test_without_the_hash_questions_would_be_shared():
    """Negative control of the test above: of two samples with different seeds."""
    for kind in KINDS:
        samples = []
        for seed in (1, 2):
            samples.append({make_puzzle(kind, seed, i, letters=3).asks for i in range(2000)})
        assert samples[0] & samples[1], kind


def test_a_sum_and_its_turned_around_are_one_question(drawn):
    pairs = {split: set() for split in SPLITS}
    for split in SPLITS:
        for puzzle in drawn[split]:
            if puzzle.kind == "sum":
                numbers = tuple(sorted(int(word.strip("?.=")) for word in puzzle.question.split()
                                       if word.strip("?.=").isdigit()))
                pairs[split].add(numbers)
    assert not pairs["train"] & pairs["test"] and not pairs["train"] & pairs["val"]


def test_the_shares_of_the_splits():
    splits = [split_of("sum", f"{a}/{b}") for a in range(100) for b in range(a, 100)]
    for split, share in SPLITS.items():
        assert abs(splits.count(split) / len(splits) - share) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_enough_different_questions(kind):
    """Of 2-digit sums 90% of 5,050 are trained on, and all of them can be; of words nearly every one is another."""
    least = {"sum": 3900}.get(kind, 8800)
    asked = [puzzle.asks for puzzle in puzzles(10_000, "train", kinds=(kind,))]
    assert len(set(asked)) > least
    held_out = [puzzle.asks for puzzle in puzzles(200, "test", kinds=(kind,), distinct=True)]
    assert len(set(held_out)) == 200


def test_a_test_does_not_ask_twice(drawn):
    asked = [(puzzle.kind, puzzle.asks) for puzzle in puzzles(1000, "test", distinct=True)]
    assert len(set(asked)) == 1000
    assert len({(puzzle.kind, puzzle.asks) for puzzle in puzzles(1000, "test")}) < 1000


@pytest.mark.parametrize("options, named", [
    ({"split": "all"}, "split='all' is not one of train, val, test"),
    ({"kinds": ("sum", "chess")}, "each is one of sum"), ({"kinds": ()}, "each is one of sum"),
    ({"digits": 1}, "digits=1"),
    ({"letters": 2}, "letters=2"), ({"count": 3000, "kinds": ("sum",), "distinct": True}, "too few different sum"),
])
def test_options_without_a_meaning(options, named):
    with pytest.raises(ValueError, match=named):
        list(puzzles(**{"count": 1, "split": "test", **options}))


# -----------------------------------------------------------------------------
# data/puzzles/prepare.py


def texts_of(folder, split):
    """All text of a split, row after row."""
    tokens = Tokens(folder, split)
    return load_tokenizer(folder).decode(tokens.read([0], len(tokens))[0], skip_special=False)


def test_prepare_writes_the_puzzles_as_conversations(tmp_path, call_script):
    args = ["--count=300", "--held_out=40", "--block_size=64", f"--kinds={','.join(KINDS)}",
            f"--out_dir={tmp_path / 'a'}"]
    code, out, err = call_script("data/puzzles/prepare.py", *args)
    assert code == 0, err
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["rows"]["block_size"] == 64 and manifest["tokenizer"]["kind"] == "char"
    assert manifest["documents"]["read"] == 340 and f"{manifest['documents']['kept']} of them different" in out
    assert manifest["preprocessing"]["kinds"] == [*KINDS]
    train, val = texts_of(tmp_path / "a", "train"), texts_of(tmp_path / "a", "val")
    for puzzle in puzzles(300, "train"):
        assert f"<|user|>{puzzle.question}<|end|><|assistant|>{puzzle.answer}<|end|>" in train
        assert f"<|user|>{puzzle.question}<|end|>" not in val
    for puzzle in puzzles(40, "val"):
        assert f"<|user|>{puzzle.question}<|end|><|assistant|>{puzzle.answer}<|end|>" in val

    args[-1] = f"--out_dir={tmp_path / 'b'}"
    assert call_script("data/puzzles/prepare.py", *args)[0] == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("args, named", [
    (["--kinds=chess"], "kinds=chess"), (["--digits=1"], "digits"), (["--letters=2"], "letters"),
    (["--count=0"], "count"), (["--block_size=8"], "block_size"), (["--template=chess"], "template=chess"),
    (["--block_size=16"], "no puzzle of one split can be used"),
])
def test_prepare_names_a_wrong_setting(args, named, tmp_path, call_script):
    code, _, err = call_script("data/puzzles/prepare.py", "--count=5", "--held_out=5", *args, f"--out_dir={tmp_path}")
    assert code == 2 and named in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
