"""
Raw documents -> clean text, in named steps. Each step counts the documents that it changed or refused.

| changed | |
|---|---|
| `utf8` | bytes that are not UTF-8, and halves of characters, became U+FFFD |
| `mojibake` | text that had been decoded with the wrong encoding was repaired |
| `controls` | line ends became line feeds, and other control characters were removed |
| `nfc` | characters were composed (Unicode's normalization form C) |

Refused: `bad_json`, `no_text` (no string under the key), `too_short`, `too_long`. Good text is never rewritten.
"""

import re
import unicodedata

from reading import Reject, json_text, mend_halves

# The first byte of a character in UTF-8 and another one, as Latin-1 or Windows-1252 would show them: "Ã©" for "é"
MOJIBAKE = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039"
    "\u0152\u017d\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]"
)
CONTROLS = re.compile("\r\n?|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|^\ufeff")
# Accents: Python's normalization sorts a run of them in quadratic time. Three Tibetan signs decompose into some.
ACCENT = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.combining(c))
ACCENT += "\u0f73\u0f75\u0f81"
ACCENTS = re.compile(f"[{ACCENT}]{{32,}}")
FOUR = re.compile(f"[{ACCENT}]{{4}}")
ASCII_CONTROLS = bytes({*range(32), 127} - {ord("\t"), ord("\n")})


def text_of(document, kind, text_key, stats):
    """The text of a document as reading.py yields it: for a .jsonl a line of JSON, else the text itself. -> str"""
    text = repair_utf8(document, stats)
    return repair_utf8(json_text(text, text_key), stats) if kind == "jsonl" else text


def repair_utf8(text, stats):
    """bytes or str -> str that can be encoded. Bytes that are not UTF-8, and half a character, become U+FFFD."""
    try:
        if isinstance(text, bytes):
            return text.decode()
        text.encode()  # a lone surrogate, as JSON may spell one, fails here
        return text
    except UnicodeDecodeError:
        stats["utf8"] += 1
        return text.decode(errors="replace")
    except UnicodeEncodeError:
        stats["utf8"] += 1
        return mend_halves(text)


def fix_mojibake(text, stats):
    """Give lines where MOJIBAKE is found to ftfy (Speer 2019), which changes them only where the result is likelier.

    Only its repairs of encodings are used: quotes, ligatures, widths and HTML stay as they were written.
    """
    if text.isascii() or not MOJIBAKE.search(text):
        return text
    import ftfy

    lines = text.split("\n")
    for i, line in enumerate(lines):
        if MOJIBAKE.search(line):
            lines[i] = ftfy.fix_encoding(line)
    fixed = "\n".join(lines)
    stats["mojibake"] += fixed != text
    return fixed


def strip_controls(text, stats):
    """Make line ends \\n, and remove a byte order mark and all control characters except the tab."""
    # A look at the bytes is ten times as fast as the expression, and mostly suffices.
    raw = text.encode()
    no_ascii_control = len(raw.translate(None, ASCII_CONTROLS)) == len(raw)
    if no_ascii_control and b"\xc2" not in raw and text[:1] != "\ufeff":
        return text
    fixed, count = CONTROLS.subn(lambda match: "\n" if match.group()[0] == "\r" else "", text)
    stats["controls"] += count > 0
    return fixed


def normalize(text, stats):
    """Unicode normalization form C."""
    if text.isascii():
        return text
    # A run of 128 accents has four among every 32nd character. To look at every one would take longer than all else.
    ordered = ACCENTS.sub(in_order, text) if FOUR.search(text[::32]) else text
    if ordered == text and unicodedata.is_normalized("NFC", text):
        return text
    stats["nfc"] += 1
    return unicodedata.normalize("NFC", ordered)


def in_order(accents):
    """A match of ACCENTS decomposed, in canonical order."""
    decomposed = "".join(unicodedata.normalize("NFD", accent) for accent in accents.group())
    return "".join(sorted(decomposed, key=unicodedata.combining))


def check_length(text, min_chars, max_chars):
    if len(text) < min_chars:
        raise Reject("too_short")
    if len(text) > max_chars:
        raise Reject("too_long")
    return text


def clean(document, kind, text_key, min_chars, max_chars, stats):
    """All steps in turn. -> str. Raises Reject; counts in `stats`, a Counter."""
    text = text_of(document, kind, text_key, stats)
    for step in (fix_mojibake, strip_controls, normalize):
        text = step(text, stats)
    return check_length(text, min_chars, max_chars)
