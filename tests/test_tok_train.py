"""A tokenizer trained here: any size, the same each time, nothing lost, and a true figure for what it gains."""

import os
import random
import re
import shlex

import pytest
from test_tokenizer import RANKS, needs_ranks

from tokenizer import load_tokenizer

SYLLABLES = ("ta", "ki", "mon", "é", "sel", "th", "or", "🙂", "vu", "st")
CHOOSE = random.Random(1)
TEXT = " ".join("".join(CHOOSE.choices(SYLLABLES, k=CHOOSE.randint(1, 3))) for _ in range(3000))


@pytest.fixture
def learn(run_script, tmp_path):
    """learn(**settings) runs data/tok_train.py, which can reach nothing but a mirror. -> CompletedProcess"""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    nothing = {"https_proxy": "http://127.0.0.1:9", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    nothing |= {"LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME": str(tmp_path), "MINICHAT_MIRROR": ""}

    def learn(env=None, **settings):
        words = {"input": path, "out_dir": tmp_path / "made", "vocab_size": 300, **settings}
        return run_script("data/tok_train.py", *(f"--{k}={v}" for k, v in words.items()), **nothing | (env or {}))

    return learn


def test_it_is_a_tokenizer(learn, tmp_path):
    for folder, size in (("a", 300), ("b", 300), ("c", 257)):
        done = learn(out_dir=tmp_path / folder, vocab_size=size)
        assert done.returncode == 0 and "no comparison" in done.stdout, done.stderr
        tokenizer = load_tokenizer(tmp_path / folder)
        assert tokenizer.vocab_size == size and tokenizer.eos == size - 1
        held_out = TEXT[int(len(TEXT) * 0.9):]
        ids = tokenizer.encode(held_out)
        assert tokenizer.decode(ids) == held_out
        assert f"{len(held_out.encode()) / len(ids):.3f} bytes per token" in done.stdout
    a, b, c = (load_tokenizer(tmp_path / name) for name in "abc")
    assert a.sha256 == b.sha256
    assert len(a.encode(TEXT)) < len(c.encode(TEXT)) / 2 and a.pieces[:256] == c.pieces


def test_special_tokens_and_pattern(learn, tmp_path):
    done = learn(specials="<|user|>,<|end|>", pattern=r"\S+|\s+")
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(tmp_path / "made")
    assert tokenizer.special_tokens == {"<|user|>": 298, "<|end|>": 299} and tokenizer.eos == 299
    assert tokenizer.pattern == r"\S+|\s+" and not any(b" " in piece for piece in tokenizer.pieces if len(piece) > 1)


def test_a_text_with_nothing_more_to_merge(learn, tmp_path):
    done = learn(vocab_size=50_000)
    assert done.returncode == 0 and "no more to merge" in done.stdout
    assert 300 < load_tokenizer(tmp_path / "made").vocab_size < 50_000


@needs_ranks
def test_gpt2_on_the_same_text(learn):
    done = learn(env={"MINICHAT_MIRROR": str(RANKS.parent)})
    held_out = TEXT[int(len(TEXT) * 0.9):]
    count = len(load_tokenizer(RANKS).encode(held_out))
    assert re.search(rf"50,257 tokens on the same text: {count:,}, {len(held_out.encode()) / count:.3f} ", done.stdout)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"input": ""}, "--input= is empty"),
        ({"vocab_size": 256}, "must lie between 257"),
        ({"vocab_size": 65537}, "and 65536"),
        ({"specials": "()"}, "at least one"),
        ({"specials": "a,a"}, "distinct names"),
        ({"pattern": "("}, "--pattern=("),
        ({"val_fraction": 0}, "val_fraction="),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(settings, named, learn, tmp_path):
    done = learn(**settings)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["two words", "it's"])
def test_the_next_command_can_be_pasted(learn, tmp_path, name):
    text = tmp_path / f"{name}.txt"
    text.write_text(TEXT, encoding="utf-8")
    done = learn(input=text, out_dir=tmp_path / name, vocab_size=260)
    words = shlex.split(done.stdout.strip().rpartition("next: ")[2])
    assert words[2:4] == [f"--input={text}", f"--tokenizer={tmp_path / name}"], done.stderr
