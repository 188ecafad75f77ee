"""Text <-> ids: nothing is lost, nothing is guessed, and no file that is read can run anything."""

import base64
import collections
import hashlib
import json
import os
import pickle
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tokenizer as module
from tokenizer import END_OF_TEXT, GPT2_PATTERN, BPETokenizer, CharTokenizer, load_tokenizer, meta_vocab_size

MIRROR = os.environ.get("MINICHAT_MIRROR", "")
TINY = Path(MIRROR) / "tinyshakespeare.txt"
RANKS = Path(MIRROR) / "gpt2.tiktoken"
needs_ranks = pytest.mark.skipif(not (MIRROR and RANKS.is_file()), reason="MINICHAT_MIRROR is not a folder with ranks")

# the 256 bytes, then merges in their order
PIECES = [*(bytes([i]) for i in range(256)), b"th", b"the", b" the", " 🙂".encode(), "é".encode()]
BPE = BPETokenizer(PIECES)


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
            {"format": 2}, {"kind": "other"}, {"kind": "bpe"},
            {"chars": "aba"}, {"chars": ["a"]}, {"chars": "\ud800"}, {"chars": None},
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
        pickle.dumps({"itos": {0: "a", 1: "b"}, "vocab_size": 1}),
    ],
)  # fmt: skip
def test_damaged_meta_pkl_is_named(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"meta\.pkl"):
        load_tokenizer(tmp_path)


# -----------------------------------------------------------------------------
# Byte-level BPE


@given(st.text())
def test_bpe_round_trip(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text and BPE.encode_array(text).dtype == np.uint16
    assert b"".join(PIECES[i] for i in ids) == text.encode()


def test_bpe_merges_in_the_order_of_the_ids():
    assert BPE.encode("the the") == [257, 258]
    assert BPE.encode("thé") == [256, 260]
    assert BPE.encode("hthe") == [ord("h"), 257]
    assert (BPE.vocab_size, BPE.bos, BPE.eos, BPE.special_tokens) == (262, 261, 261, {END_OF_TEXT: 261})


def test_special_tokens_in_a_text_are_text():
    ids = BPE.encode(END_OF_TEXT)
    assert BPE.eos not in ids and BPE.decode(ids) == END_OF_TEXT
    assert BPE.decode([*BPE.encode("a"), BPE.eos]) == "a"
    assert BPE.decode([BPE.eos], skip_special=False) == END_OF_TEXT


@pytest.mark.parametrize("tokenizer", [BPE, CharTokenizer.from_text("a🙂é\n the")], ids=["bpe", "char"])
@given(data=st.data())
def test_streaming_gives_whole_characters(tokenizer, data):
    text = data.draw(st.text(alphabet="a🙂é\n the"))
    decode = tokenizer.stream_decoder()
    shown = ""
    for i in [*tokenizer.encode(text), tokenizer.eos]:
        shown += decode(i)
        assert text.startswith(shown)  # so never a replacement character
    assert shown + decode(None) == text


def test_streaming_shows_what_is_broken_at_the_end():
    ids = BPE.encode("a😀")[:-1]
    decode = BPE.stream_decoder()
    assert [decode(i) for i in ids] == ["a", "", "", ""] and decode(None) == "\ufffd"
    assert BPE.decode(ids) == "a\ufffd"
    with pytest.raises(ValueError, match="no token has id 262"):
        BPE.decode([262])


def test_half_a_character_has_no_bytes():
    with pytest.raises(ValueError, match=r"U\+D83D at position 2"):
        BPE.encode("ab\ud83d")


def test_bpe_is_saved_and_read(tmp_path):
    BPE.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.pieces, loaded.pattern, loaded.special_tokens) == (PIECES, GPT2_PATTERN, BPE.special_tokens)
    assert hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest() == loaded.sha256 == BPE.sha256
    lines = [base64.b64encode(piece) + b" %d" % i for i, piece in enumerate(PIECES)]
    (tmp_path / "own.tiktoken").write_bytes(b"\n".join(lines))
    assert load_tokenizer(tmp_path / "own.tiktoken").sha256 == BPE.sha256
    for wrong in (lines[:255], lines[::-1], [b"x 0"], [b"eA== 0 1"], [*lines, lines[0].split()[0] + b" 261"]):
        (tmp_path / "own.tiktoken").write_bytes(b"\n".join(wrong))
        with pytest.raises(ValueError, match="own.tiktoken"):
            load_tokenizer(tmp_path / "own.tiktoken")


@pytest.mark.parametrize(
    "wrong", [{"pieces": ["x"]}, {"pieces": "x"}, {"pieces": None}, {"pattern": "("}, {"pattern": 1}, {"specials": [1]}]
)
def test_damaged_bpe_is_named(tmp_path, wrong):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(BPE.to_json()) | wrong))
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(path)


def test_what_is_no_bpe_vocabulary():
    with pytest.raises(ValueError, match="byte 0x00 is not among"):
        BPETokenizer(PIECES[1:])
    with pytest.raises(ValueError, match="distinct"):
        BPETokenizer([*PIECES, b"th"])
    large = BPETokenizer([*PIECES, *(b"%06d" % i for i in range(65_536 - len(PIECES)))])
    assert large.encode_array("000001").dtype == np.uint32  # shards hold uint16, so data/common.py refuses it


@needs_ranks
def test_ids_are_gpt2s():
    tokenizer = load_tokenizer(RANKS)
    assert (tokenizer.vocab_size, tokenizer.eos) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]  # as GPT-2's own encoder.py gives them
    text = TINY.read_bytes().decode()
    cut = int(len(text) * 0.9)
    lengths = [len(tokenizer.encode(part)) for part in (text[:cut], text[cut:])]
    assert lengths == [301_966, 36_059]  # nanoGPT, data/shakespeare/readme.md
    assert tokenizer.decode(tokenizer.encode_array(text)) == text


@needs_ranks
def test_ids_are_those_of_tiktokens_gpt2():
    """The same text in many languages, through tiktoken's own definition of GPT-2's pattern."""
    import tiktoken
    from tiktoken_ext import openai_public

    ours = load_tokenizer(RANKS)
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks={p: i for i, p in enumerate(ours.pieces)},
        special_tokens={END_OF_TEXT: 50256},
    )  # fmt: skip
    text = "It's 1984,\t\tand I'll\n\n  see: Größe, 日本語, עברית, 🙂👍🏽  \r\n x\u00a0y  "
    assert ours.encode(text) == theirs.encode_ordinary(text)


@needs_ranks
def test_long_runs_of_white_space_are_encoded(monkeypatch):
    """tiktoken's expressions exhaust their stack near a million; cut there, the ids are those of shorter runs."""
    import tokenizer as module

    ours = load_tokenizer(RANKS)
    for text in ("a" + " " * 1_100_000 + "word", "\n \t" * 400_000, "x\n" + "\u3000" * 1_200_000 + " y  "):
        assert ours.decode(ours.encode(text)) == text
    monkeypatch.setattr(module, "SPACE", re.compile(module.SPACE.pattern.replace(str(module.LONGEST_SPACE), "5")))
    monkeypatch.setattr(module, "LONGEST_SPACE", 5)
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choices("    \n\t\x1c\u00a0aé1!'s", k=rng.randint(0, 30)))
        assert ours.encode(text) == ours._bpe.encode_ordinary(text), repr(text)


@needs_ranks
@pytest.mark.parametrize("text", [
    "x" + " " * 399_999 + "y", "\u3000" * 390_000 + "end", "\t" * 150_000 + "a" + "\n" * 300_000, "a \n" * 200_000,
], ids=["blanks", "wide blanks", "tabs", "short runs"])  # fmt: skip
def test_white_space_is_looked_at_once(text):
    """The number of places where a run may begin is that of the runs, so no run is counted from its middle."""
    begins = re.compile(module.SPACE.pattern.replace(f"{{{module.LONGEST_SPACE},}}", ""))
    assert len(begins.findall(text)) == len(re.findall(r"\s+", text))
    ours = load_tokenizer(RANKS)
    assert ours.decode(ours.encode_array(text)) == text


PLACES = st.text(alphabet=" \n\t\x1c\x85\u3000aé1²!'sltd_@{~文。、あ한한\u0301🙂\u200d", max_size=40)


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer(RANKS)


@needs_ranks
@given(text=st.one_of(PLACES, st.text(max_size=40)))
@example(text="we'll see: it's a1b2 'tis.'ll")
def test_pieces_of_a_long_text_have_the_ids_of_the_whole(gpt2, text):
    for tokenizer in (gpt2, BPE):
        whole = tokenizer._bpe.encode_ordinary(text)
        with pytest.MonkeyPatch.context() as patch:
            for size in (1, 2, 7):
                patch.setattr(module, "PIECE", size)
                assert tokenizer.encode(text) == whole


@given(text=PLACES)
def test_a_text_is_whole_for_a_pattern_of_ones_own(text):
    """Where another pattern cuts is not known, so a text is one piece."""
    own = BPETokenizer(PIECES, pattern=r"[a-z]+\s+[a-z]+|\s|\S")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 1)
        assert own.encode(text) == own._bpe.encode_ordinary(text)


@pytest.mark.parametrize("text", ["to be or not ", "3,141x59\n", "一文字。"])
def test_a_signal_waits_for_a_piece_and_not_for_the_text(text, monkeypatch):
    """The signal comes in the first piece, and the second is never begun."""
    tokenizer, begun = BPETokenizer(PIECES), []

    class Watched:
        def encode_to_numpy(self, piece, **how):
            begun.append(piece)
            signal.raise_signal(signal.SIGTERM)
            return BPE._bpe.encode_to_numpy(piece, **how)

    def stop(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(tokenizer, "_bpe", Watched())
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenizer.encode_array(text * 10_000)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(begun) == 1 and len(begun[0]) < 1100


def test_special_tokens_in_a_text_on_request():
    specials = ("<|x|>", "<|x|>y", "<|endoftext|>")
    bpe = BPETokenizer(PIECES, specials=specials)
    ids = bpe.encode("a<|x|>yb<|endoftext|><|x|>", special=True)
    assert ids == [*bpe.encode("a"), 262, *bpe.encode("b"), 263, 261]
    assert bpe.decode(ids, skip_special=False) == "a<|x|>yb<|endoftext|><|x|>"
    assert not {261, 262, 263} & set(bpe.encode("a<|x|>yb<|endoftext|>"))
    chars = CharTokenizer("ab<|>eos")
    assert chars.encode("a<|eos|>b", special=True) == [0, chars.eos, 1] and len(chars.encode("a<|eos|>b")) == 9


# -----------------------------------------------------------------------------
# Of nanoGPT's meta.pkl the size is enough


@pytest.mark.parametrize("meta, size, text", [
    ({"vocab_size": 80, "itos": dict(enumerate("abc"))}, 80, "cab"),  # padded
    ({"vocab_size": np.int32(3), "itos": {np.int64(i): c for i, c in enumerate("abc")}}, 3, "cab"),
    ({"vocab_size": np.uint16(3), "itos": list("abc")}, 3, "cab"),
    ({"itos": {0: "the", 1: "cat"}}, 2, None),  # words
    ({"vocab_size": 512, "kinds": {"pitch": [1, 2]}}, 512, None),  # music, say: no itos at all
], ids=["padded", "numpy keys", "a list", "words", "size alone"])
def test_what_nanogpt_needs_of_meta_pkl(meta, size, text, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert meta_vocab_size(tmp_path) == size
    if text is None:
        with pytest.raises(ValueError, match="meta.pkl"):
            load_tokenizer(tmp_path)
    else:
        assert load_tokenizer(tmp_path).encode(text) == [2, 0, 1]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("chars", [
    collections.OrderedDict(enumerate("abc")), collections.Counter({0: "a", 1: "b", 2: "c"}),
    collections.defaultdict(str, enumerate("abc")), {i: np.str_(c) for i, c in enumerate("abc")},
], ids=["OrderedDict", "Counter", "defaultdict", "numpy strings"])
def test_plain_values_in_other_clothes(chars, protocol, tmp_path):
    meta = {"vocab_size": np.int64(3), "itos": chars}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    assert meta_vocab_size(tmp_path) == 3 and load_tokenizer(tmp_path).encode("cab") == [2, 0, 1]


@pytest.mark.parametrize("calls", [b"cos\nmkdir\n", b"cbuiltins\neval\n", b"c_codecs\nlookup\n",
                                   b"c__builtin__\nexec\n"])
def test_a_pickle_calls_nothing_but_the_readers_own(calls, tmp_path):
    target = tmp_path / "executed"
    (tmp_path / "meta.pkl").write_bytes(b"(dS'vocab_size'\nI3\nsS'x'\n" + calls + f"(V{target}\ntRs.".encode())
    with pytest.raises(ValueError, match="gets to call nothing"):
        load_tokenizer(tmp_path)
    assert meta_vocab_size(tmp_path) is None and not target.exists()


@pytest.mark.parametrize("value", [np.float64(2.5), np.dtype("f8"), np.arange(3), print])
def test_numpys_other_objects_stay_refused(value, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": value, "itos": {0: "a"}}))
    assert meta_vocab_size(tmp_path) is None
    with pytest.raises(ValueError, match="meta.pkl"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("version", ["0.9.0", "0.12.0"])
def test_a_tiktoken_that_hangs_is_refused(version, monkeypatch):
    monkeypatch.setattr("tiktoken.__version__", version)
    with pytest.raises(ValueError, match=rf"tiktoken {version} .*tiktoken>=0.13"):
        BPETokenizer([bytes([i]) for i in range(256)])
