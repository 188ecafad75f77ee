"""Characters <-> ids: nothing is lost, nothing is guessed, and no file that is read can run anything."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenizer as module
from tokenizer import CharTokenizer, load_tokenizer

MIRROR = os.environ.get("MINICHAT_MIRROR", "")
TINY = Path(MIRROR) / "tinyshakespeare.txt"


@given(st.text())
def test_round_trip(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == text
    array = tokenizer.encode_array(text)
    assert array.dtype == np.uint16 and array.tolist() == ids and tokenizer.decode(array) == text


@given(st.text())
def test_ids_are_nanogpts(text):
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}  # as nanoGPT's prepare.py numbers them
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.encode(text) == [stoi[c] for c in text]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (len(stoi), len(stoi) + 1, len(stoi) + 2)


@pytest.mark.skipif(not (MIRROR and TINY.is_file()), reason="MINICHAT_MIRROR is not a folder with tinyshakespeare.txt")
def test_ids_of_tiny_shakespeare():
    text = TINY.read_bytes().decode()
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.chars == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert tokenizer.encode("hii there") == [46, 47, 47, 1, 58, 46, 43, 56, 43]  # Karpathy's example
    assert tokenizer.decode(tokenizer.encode_array(text)) == text


def test_long_text_in_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    text = "Größe 🙂 und so weiter\r\n" * 5
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.chars == "".join(sorted(set(text)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match=rf"'§' \(U\+00A7\) at position {len(text)}"):
        tokenizer.encode(text + "§")


def test_special_tokens_are_ids_only():
    tokenizer = CharTokenizer.from_text("<|bos|> and <|eos|>")
    assert tokenizer.special_tokens == {"<|bos|>": tokenizer.bos, "<|eos|>": tokenizer.eos}
    assert max(tokenizer.encode("<|bos|>")) < tokenizer.bos  # a user's text cannot produce one
    ids = [tokenizer.bos, *tokenizer.encode("an"), tokenizer.eos]
    assert tokenizer.decode(ids) == "an"
    assert tokenizer.decode(ids, skip_special=False) == "<|bos|>an<|eos|>"


def test_unknown_character_is_named():
    tokenizer = CharTokenizer("abc\n")
    with pytest.raises(ValueError) as error:
        tokenizer.encode("abé")
    assert "'é' (U+00E9) at position 2" in str(error.value) and r"'abc\n'" in str(error.value)
    with pytest.raises(ValueError, match=r"U\+D800"):
        tokenizer.encode("\ud800")  # half a character, which utf-8 cannot write


@pytest.mark.parametrize(
    "ids, named", [([0, 5], "id 5 .position 1"), ([-1], "id -1"), ([0.5], "float"), ([[0]], "shape")]
)
def test_foreign_ids_are_named(ids, named):
    with pytest.raises(ValueError, match=named):
        CharTokenizer("abc").decode(ids)  # 0 to 4


def test_vocabulary_limits():
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x12000)]))
    assert CharTokenizer(everything[:65_534]).vocab_size == 65_536
    assert CharTokenizer(everything[:65_534]).encode_array(everything[65_533]).tolist() == [65_533]
    with pytest.raises(ValueError, match="65,535 distinct characters.*BPE"):
        CharTokenizer(everything[:65_535])
    for chars in ("aa", "\ud800"):
        with pytest.raises(ValueError):
            CharTokenizer(chars)


@given(st.text())
def test_json_round_trip(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("tokenizer")
    saved = CharTokenizer.from_text(text)
    saved.save(folder)
    for loaded in (load_tokenizer(folder), load_tokenizer(folder / "tokenizer.json")):
        assert (loaded.chars, loaded.special_tokens, loaded.sha256) == (saved.chars, saved.special_tokens, saved.sha256)
    assert hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() == saved.sha256
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]


GOOD = {"format": 1, "kind": "char", "chars": "abc", "specials": ["<|bos|>", "<|eos|>"]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b"\xff", b"[" * 100_000,
        *(json.dumps(GOOD | wrong).encode() for wrong in (
            {"format": 2}, {"kind": "other"}, {"chars": "aba"}, {"chars": ["a"]}, {"chars": "\ud800"}, {"chars": None},
            {"specials": [1]}, {"specials": {}}, {"specials": ["x", "x"]},
        )),
    ],
)  # fmt: skip
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(FileNotFoundError, match="tokenizer"):
            load_tokenizer(path)


def nanogpt_meta(chars):
    return {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}


def test_nanogpts_meta_pkl(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpt_meta("bca")))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("abc") == [2, 0, 1]  # its ids, also when they are not sorted
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (3, None, None)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256  # now from tokenizer.json


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_malicious_meta_pkl_is_refused_and_not_executed(tmp_path):
    target = tmp_path / "executed"
    raw = pickle.dumps(nanogpt_meta("abc") | {"extra": Malicious(target)})
    (tmp_path / "meta.pkl").write_bytes(raw)
    with pytest.raises(ValueError, match=r"meta\.pkl.*mkdir"):
        load_tokenizer(tmp_path)
    assert not target.exists()
    pickle.loads(raw)  # negative control: the trap does work
    assert target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not a pickle", pickle.dumps(nanogpt_meta("abc"))[:-9], pickle.dumps([1]),
        pickle.dumps({"itos": {1: "a"}}), pickle.dumps({"itos": {0: "ab"}}),
        pickle.dumps({"itos": {0: "a"}, "vocab_size": 2}),
    ],
)  # fmt: skip
def test_damaged_meta_pkl_is_named(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"meta\.pkl"):
        load_tokenizer(tmp_path)
