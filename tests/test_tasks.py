"""Log-likelihood tasks against what a loop over tokens, and a calculation by hand, come to."""

import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from inference import tasks
from inference.long_context import hide_key, key_characters, passkey
from inference.tasks import encode_pair, last_word, multiple_choice, open_items, score_items
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer

CHARS = CharTokenizer("abcé ")
BPE = BPETokenizer([*(bytes([i]) for i in range(256)), b"ab", b" a", b" ab", b"b.", "é".encode()])


class Stub(nn.Module):
    """A model whose logits after ids (B, T) are what `rule` says of each row."""

    def __init__(self, rule, vocab_size=7, block_size=64):
        super().__init__()
        self.rule, self.config = rule, GPTConfig(vocab_size=vocab_size, block_size=block_size, pos="rope")
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, idx):
        assert idx.size(1) <= self.config.block_size
        return torch.stack([self.rule(row) for row in idx]), None


CHANCES = torch.tensor([1 / 2, 1 / 4, 1 / 16, 1 / 16, 1 / 8, 1e-9, 1e-9])  # of a, b, c, é, space, bos, eos


@pytest.fixture(scope="module")
def urn():
    """Each token has its own chance, whatever was before."""
    return Stub(lambda row: CHANCES.log().expand(len(row), 7))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=12, vocab_size=BPE.vocab_size, n_layer=1, n_head=2, n_embd=16, pos="rope")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def question(context, *choices, answer=0):
    return {"context": context, "choices": list(choices), "answer": answer}


# -----------------------------------------------------------------------------
# By hand


def test_multiple_choice_by_hand(urn, tmp_path):
    """After "a" come " c", 1/8 * 1/16, and " aab", 1/8 * 1/2 * 1/2 * 1/4: equal, so the first is chosen; by character
    ln(1/128) / 1 = -4.85 against ln(1/128) / 3 = -1.62.
    " ab" is 1/64, " é" 1/128; by character -2.08 and -4.85, by byte -2.08 and -2.43.
    " éé" is 1/2048, " b" 1/32; by character -3.81 and -3.47, by byte -1.91 and -3.47."""
    path = write(tmp_path / "q.jsonl", question("a", "c", "aab", answer=1), question("a", "ab", "é"),
                 question("a", "éé", "b"))
    items = open_items("", path)
    found = [[math.exp(ll) for ll, _ in one] for one in score_items(urn, CHARS, items, 2)]
    assert found == [pytest.approx(p, rel=1e-5) for p in ([1 / 128, 1 / 128], [1 / 64, 1 / 128], [1 / 2048, 1 / 32])]
    result = multiple_choice(urn, CHARS, items, 2)
    assert result["items"] == 3
    assert [result[name] for name in ("acc", "acc_norm", "acc_bytes")] == [1 / 3, 2 / 3, 1.0]
    assert result["acc_stderr"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2)) and result["acc_bytes_stderr"] == 0


def test_last_word_by_hand(urn, tmp_path):
    """Greedy says a, always. " aa" is 1/8 * 1/4, and no space is ever the likeliest."""
    items = open_items("lambada", write(tmp_path / "w.jsonl", {"text": "b aa"}, {"text": "a ab "}), words=True)
    assert [item.pairs for item in items] == [[("b", " aa")], [("a", " ab")]]
    result = last_word(urn, CHARS, items, 8)
    assert result["acc"] == 0 and result["perplexity"] == pytest.approx(math.sqrt(32 * 64), rel=1e-5)
    echo = Stub(lambda row: nn.functional.one_hot((row + 1) % 5, 7).float())  # a b c é space a ...
    path = write(tmp_path / "w.jsonl", {"text": "é abc"}, {"text": "é abcé"}, {"text": "é aab"})
    result = last_word(echo, CHARS, open_items("", path, words=True), 2)
    assert result["acc"] == pytest.approx(2 / 3) and result["acc_stderr"] == pytest.approx(1 / 3)


def by_loop(model, tokenizer, context, continuation):
    """(Log-likelihood, whether greedy says it), one token after another; what does not fit is cut on the left"""
    before, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
    assert ids[: len(before)] == before
    first = max(0, len(ids) - model.config.block_size - 1)  # the start of what is read at all
    total, greedy = 0.0, True
    for at in range(len(before), len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[first:at]]))[0][0, -1].double()
        total += torch.log_softmax(logits, -1)[ids[at]].item()
        greedy &= int(logits.argmax()) == ids[at]
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("most", [2**26, 700])
def test_batches_change_nothing(model, tmp_path, batch_size, most, monkeypatch):
    """Contexts of unequal length, one past the block, cut on the left; and few logits at once."""
    monkeypatch.setattr(tasks, "MOST_LOGITS", most)
    asked = [question("ab ab", "ab", "a b c d", "é!"), question("b" * 30, "xyz", "q", answer=1),
             question("some words before", "a", "bcd efg", answer=1)]
    items = open_items("", write(tmp_path / "q.jsonl", *asked))
    found = score_items(model, BPE, items, batch_size)
    assert [len(one) for one in found] == [3, 2, 2]
    for row, one in zip(asked, found, strict=True):
        for choice, (ll, greedy) in zip(row["choices"], one, strict=True):
            expected = by_loop(model, BPE, row["context"], " " + choice)
            assert ll == pytest.approx(expected[0], rel=1e-5) and greedy == expected[1]
    result = multiple_choice(model, BPE, items, batch_size)
    best = [max(range(len(one)), key=lambda i: one[i][0]) for one in found]
    assert result["acc"] == sum(i == row["answer"] for i, row in zip(best, asked, strict=True)) / 3


# -----------------------------------------------------------------------------
# Where a context ends


def test_the_join_is_that_of_the_whole_text():
    ids = BPE.encode
    assert encode_pair(BPE, "x", " ab") == (ids("x") + [258], 1)
    assert encode_pair(BPE, "x ", "ab") == (ids("x") + [258], 1)  # the space goes with the word
    assert encode_pair(BPE, "x", "y") == (ids("xy"), 1)
    assert encode_pair(BPE, "x a", "b") == (ids("x") + [258], 1)  # a token across the border is scored
    assert encode_pair(BPE, "", "ab") == ([BPE.bos, 256], 1)
    assert encode_pair(BPE, "a", "b") == ([BPE.bos, 256], 1)
    assert encode_pair(CHARS, "ab ", "c") == ([0, 1, 4, 2], 2)
    with pytest.raises(ValueError, match="beginning of a text"):
        encode_pair(CharTokenizer("abc", ()), "", "a")


def test_one_space_is_put_between():
    assert tasks.join("a", "b") == " b" and tasks.join("a ", "b") == "b" and tasks.join("a", " b") == " b"
    assert tasks.join("a\n", "b") == "b" and tasks.join("", "b") == "b"


# -----------------------------------------------------------------------------
# Forms


ROWS = {
    "hellaswag": (
        {"activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
         "endings": ["is using wrap [step] to wrap skis.", "starts [title] Pull up  roofing."], "label": "1"},
        [("Roof shingle removal: A man is sitting on a roof. He", " is using wrap to wrap skis."),
         ("Roof shingle removal: A man is sitting on a roof. He", " starts. Pull up roofing.")], 1),
    "arc_easy": (
        {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
        [("Question: Which is hot?\nAnswer:", " ice"), ("Question: Which is hot?\nAnswer:", " fire")], 1),
    "piqa": (
        {"goal": "To cool tea,", "sol1": "wait.", "sol2": "boil it.", "label": 0},
        [("Question: To cool tea,\nAnswer:", " wait."), ("Question: To cool tea,\nAnswer:", " boil it.")], 0),
    "winogrande": (
        {"sentence": "The cup did not fit the box as _ was too small.", "option1": "the cup", "option2": "the box",
         "answer": "2"},
        [("The cup did not fit the box as the cup", " was too small."),
         ("The cup did not fit the box as the box", " was too small.")], 1),
    "lambada": ({"text": "One two,\nthree four"}, [("One two,\nthree", " four")], 0),
}
ROWS["arc_challenge"] = ROWS["arc_easy"]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_row_of_each_task_is_asked_as_lm_eval_does(task, tmp_path, monkeypatch):
    """From a file, and the same from the Hub, whose datasets are named."""
    row, pairs, answer = ROWS[task]
    words = task == "lambada"
    item, = open_items(task, write(tmp_path / "rows.jsonl", row), words)
    assert item.pairs == pairs and item.answer == answer and item.where.endswith("rows.jsonl:1")
    asked = []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
        load_dataset=lambda *args, split: asked.append((*args, split)) or [row] * 5))
    items = open_items(task, "", words, limit=3)
    assert [one.pairs for one in items] == [pairs] * 3 and items[2].where == f"{task} 2"
    assert asked == [tasks.TASKS[task][1:]]


@pytest.mark.parametrize("line, named", [
    ("{", ":2 is not JSON"), ("[1]", ":2 is not of the form"), (json.dumps(question("a", "b")), ":2"),
    (json.dumps(question("a", "b", "c", answer=2)), ":2"), (json.dumps(question("a", "b", "c", answer="0")), ":2"),
    (json.dumps(question("a", "b", "c", answer=True)), ":2"), (json.dumps(question("a", "b", " ")), ":2"),
    (json.dumps(question("a", "b", 3)), ":2"), (json.dumps(question(None, "b", "c")), ":2"),
    (json.dumps(question("a", "b", "c", answer=-1)), ":2"),
])
def test_a_line_that_cannot_be_asked_is_named(line, named, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(question("a", "b", "c")) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="q.jsonl") as error:
        open_items("", str(path))
    assert named in str(error.value)


def test_what_cannot_be_scored_is_named(model, tmp_path, monkeypatch):
    path = write(tmp_path / "q.jsonl", question("a", "b", "c"), question("a", "b", "x" * 12))
    assert score_items(model, BPE, open_items("", path, limit=1), 8)
    for tokenizer, named in ((BPE, "q.jsonl:2: 13 tokens"), (CHARS, "q.jsonl:2: cannot encode 'x'")):
        with pytest.raises(ValueError, match=named):
            score_items(model, tokenizer, open_items("", path), 8)
    empty, latin = tmp_path / "empty.jsonl", tmp_path / "latin.jsonl"
    empty.write_bytes(b"\n"), latin.write_bytes(b'{"text": "\xe9"}')
    for asked, named in (((("nonsense", "")), "hellaswag"), (("", ""), "--data"), (("", "gone.jsonl"), "gone.jsonl"),
                         (("lambada", path), "not one of"), (("", str(empty)), "has no items"),
                         (("", str(latin)), "UTF-8")):
        with pytest.raises(ValueError, match=named):
            open_items(*asked)
    with pytest.raises(ValueError, match="not one of lambada"):
        open_items("piqa", "", words=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install"):
        open_items("piqa", "")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, split: 1 / 0))
    with pytest.raises(ValueError, match="baber/piqa cannot be loaded.*ZeroDivisionError"):
        open_items("piqa", "")


# -----------------------------------------------------------------------------
# A hidden key


LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz .\nTK")
HIDE = {"sentence": "\nThe key is {key}.\n", "trials": 20, "alternatives": 5, "seed": 1, "batch_size": 8}


class Text:
    """A stream of tokens that has no key in it."""

    def __len__(self):
        return 500

    def read(self, starts, length):
        words = np.array(LETTERS.encode("and so they went on. " * 50))
        return np.stack([words[start : start + length] for start in starts])


def copies(row):
    """What followed the last time that the four tokens before were the same: an induction head."""
    logits = torch.zeros(len(row), LETTERS.vocab_size)
    ids = row.tolist()
    for at in range(4, len(ids)):
        seen = [i for i in range(3, at) if ids[i - 3 : i + 1] == ids[at - 3 : at + 1]]
        if seen:
            logits[at, ids[seen[-1] + 1]] = 9.0
    return logits


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_model_that_copies_finds_every_key(depth):
    oracle = Stub(copies, LETTERS.vocab_size, 128)
    found = passkey(oracle, LETTERS, Text(), 128, depth, **{**HIDE, "trials": 5})
    assert found["exact"] == found["chosen"] == 1.0


def test_a_model_that_knows_nothing_finds_them_by_chance():
    """Of 20 tries with 5 keys each 4 are expected, 3 standard deviations away is 9."""
    generator = torch.Generator().manual_seed(0)
    random = Stub(lambda row: torch.randn(len(row), LETTERS.vocab_size, generator=generator), LETTERS.vocab_size, 128)
    found = passkey(random, LETTERS, Text(), 128, 0.5, **HIDE)
    assert found["exact"] == 0.0 and 0.0 < found["chosen"] <= 0.45
    assert passkey(Stub(copies, LETTERS.vocab_size, 128), LETTERS, Text(), 128, 0.5, **HIDE)["chosen"] == 1.0


def test_where_a_key_is_hidden():
    filler = LETTERS.encode("x" * 60)
    for depth, begins, ends in ((0.0, "\nThe key is abcde.\nx", "x\nThe key is "), (1.0, "x", "x\nThe key is abcde.\n"
                                                                                  "\nThe key is ")):
        hidden = hide_key(LETTERS, filler, HIDE["sentence"], ["abcde", "vwxyz"], depth)
        texts = [LETTERS.decode(ids) for ids, _ in hidden]
        assert [len(ids) for ids, _ in hidden] == [61, 61]  # 60 are read, the last one is predicted
        assert [n for _, n in hidden] == [6, 6]  # with the space
        assert [text[-5:] for text in texts] == ["abcde", "vwxyz"]
        assert all(text.startswith(begins) and text[:-5].endswith(ends) for text in texts)
        assert all(text.count("abcde.") == 1 for text in texts)
    with pytest.raises(ValueError, match="at least 35"):
        hide_key(LETTERS, filler[:34], HIDE["sentence"], ["abcde"], 0.0)
    assert len(hide_key(LETTERS, filler[:35], HIDE["sentence"], ["abcde"], 0.0)[0][0]) == 36


def test_keys_are_made_of_what_a_tokenizer_has():
    assert key_characters(BPE) == "0123456789" and key_characters(LETTERS) == "abcdefghijklmnopqrstuvwxyz"
    assert key_characters(CharTokenizer("0123xyz")) == "xyz"
    with pytest.raises(ValueError, match="two letters"):
        key_characters(CharTokenizer("0123x"))


def test_marks_of_wikihow_are_taken_out_in_linear_time(monkeypatch):
    """As Zellers' expression takes them out; none is searched where no closing bracket follows."""
    row = {"activity_label": "[header] Tea", "ctx_a": "a [x] b [c", "ctx_b": "d", "label": "0"}
    endings = ["[step] Pour [[it]] out", "a [b\nc] d [e", "x] [y] [", "[" * 100_000, "[" * 100_000 + "\n[b]]"]
    expected = [re.sub(r"\[.*?\]", "", text).replace("  ", " ") for text in endings[:3]]
    searched, sub = [], re.sub
    monkeypatch.setattr(tasks.re, "sub", lambda p, to, text: searched.append(text) or sub(p, to, text))
    texts = [pair[1].strip() for pair in tasks.hellaswag({**row, "endings": endings})[0]]
    assert all(not text or text.endswith("]") for text in searched)
    assert texts == [*(text.strip() for text in expected), "[" * 100_000, "[" * 100_000 + "\n]"]


def test_items_are_lines_without_a_mark(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [json.dumps(question(*words), ensure_ascii=False) for words in (("a\u2028b", "c", "d"), "def")]
    text = "\ufeff" + "\r\n\r\n".join(rows)
    path.write_bytes(text.encode())
    assert [item.pairs[0][0].strip() for item in open_items("", str(path))] == ["a\u2028b", "d"]
    path.write_bytes(text[1:].encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16"):
        list(open_items("", str(path)))
