"""Each step of cleaning: what it repairs and counts, and that it leaves good text alone."""

import json
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cleaning
from cleaning import clean, fix_mojibake, normalize, repair_utf8, strip_controls, text_of
from reading import Reject

GOOD = [
    "plain ASCII\twith a tab\n", "“quotes” and ‘ligatures’: ﬁ ﬂ", "ｆｕｌｌ ｗｉｄｔｈ", "&lt;html&gt; &amp;amp;",
    "Ça déjà naïve œuvre «passé»", "Größe – „Straße“", "Привет, мир", "文字コード", "ไทย", "שלום", "São Paulo Â", "🙂",
]


@pytest.mark.parametrize("text", GOOD)
def test_good_text_is_never_rewritten(text):
    stats = Counter()
    assert clean(text.encode(), "txt", "text", 0, 1000, stats) == text and not +stats


@pytest.mark.parametrize(
    "broken, mended",
    [
        ("Ã©tÃ©", "été"), ("schÃ¶n und GrÃ¶ÃŸe", "schön und Größe"), ("â€œquotedâ€\x9d", "“quoted”"), ("ðŸ™‚", "🙂"),
        ("it&#39;s âœ” fine &amp; good", "it&#39;s ✔ fine &amp; good"),
    ],
)
def test_mojibake_is_put_right_and_nothing_else_in_the_text(broken, mended):
    stats = Counter()
    assert fix_mojibake(f"ﬁrst “line”\n{broken}\n", stats) == f"ﬁrst “line”\n{mended}\n"
    assert stats == {"mojibake": 1}


def test_what_is_no_utf8_is_replaced_and_counted():
    stats = Counter()
    assert repair_utf8(b"caf\xe9 au lait", stats) == "caf\ufffd au lait"
    assert repair_utf8("half \ud83d of one", stats) == "half \ufffd of one"
    assert repair_utf8("two halves \ud83d\ude42", stats) == "two halves 🙂"
    assert stats == {"utf8": 3}


def test_controls():
    stats = Counter()
    text = "\ufeffa\r\nb\rc\x00\x07d\x7fe\x85f\tg\u200bh\ufeffi"
    assert strip_controls(text, stats) == "a\nb\ncdef\tg\u200bh\ufeffi" and stats == {"controls": 1}


def test_nfc():
    stats = Counter()
    assert normalize("e\u0301", stats) == "é" and stats == {"nfc": 1}


MARKS = "aéü\u0301\u0316\u0323\u0327\u0344\u0345\u0f71\u0f72\u0f73\u0f81\u05b8\U0001d165한가\u1161"


@given(st.text(alphabet=MARKS, max_size=30), st.integers(150, 400))
def test_long_runs_of_accents_are_put_in_order_first(marks, times):
    """The result is Unicode's; what Python gets to sort is sorted."""
    for text in (marks * times, "a" + "\u0f81\u0316" * times, "e" + "\u0301\u0323\u0f73" * times + marks):
        stats = Counter()
        assert normalize(text, stats) == unicodedata.normalize("NFC", text)
        assert stats["nfc"] == (normalize(text, Counter()) != text)
    assert cleaning.FOUR.search(text[::32])
    ordered = cleaning.ACCENTS.sub(cleaning.in_order, text)
    run = [unicodedata.combining(c) for c in ordered[1 : times * 3]]
    assert run == sorted(run)


@given(st.text())
def test_what_is_clean_stays_as_it_is(text):
    """Cleaning twice is cleaning once, and leaves text that can be encoded, in NFC, without control characters."""
    once = clean(text.encode("utf-8", "surrogatepass"), "txt", "text", 0, 10**6, Counter())
    stats = Counter()
    assert once.encode().decode() == once and unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\t\n" for c in once)
    twice = clean(once.encode(), "txt", "text", 0, 10**6, stats)
    # Each time one of two byte order marks is removed. Characters that a control character separated may now look
    # like mojibake.
    if not once.startswith("\ufeff") and not stats["mojibake"]:
        assert twice == once and not stats["controls"] + stats["nfc"]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"not json", "bad_json"), (b'{"text": "cut o', "bad_json"), (b"[" * 100_000, "bad_json"),
        (b'{"body": "x"}', "no_text"), (b'{"text": null}', "no_text"), (b'{"text": ["x"]}', "no_text"),
        (b'"text"', "no_text"), (b'{"text": "x"}', "too_short"), (json.dumps({"text": "x" * 99}).encode(), "too_long"),
    ],
)
def test_what_is_refused_has_a_name(line, reason):
    with pytest.raises(Reject, match=f"^{reason}$"):
        clean(line, "jsonl", "text", 2, 50, Counter())


def test_the_key_and_the_spellings_of_json():
    stats = Counter()
    line = b'{"body": "\\u00e9\\ud83d\\ude42 caf\xe9 \t", "text": "x"}'
    assert text_of(line, "jsonl", "body", stats) == "é🙂 caf\ufffd \t"
    assert stats == {"utf8": 1}
