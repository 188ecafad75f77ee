"""Lines of a text: the same ones for every script that reads them, and one line for what is not UTF-8."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from files import decode_text, read_lines, split_lines

MARK = "\ufeff"


@given(st.lists(st.text(alphabet="ab \x0b\x0c\x1c\x1e\x85\u2028\u2029\ufeff"), min_size=1, max_size=6),
       st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_only_line_ends_end_a_line(tmp_path_factory, lines, end, last):
    """Whatever str.splitlines takes for an end, too; a mark inside a text is a character."""
    text = end.join(lines) + end * last
    expected = lines if last or lines[-1] else lines[:-1]
    assert split_lines(text) == expected
    path = tmp_path_factory.mktemp("lines") / "x.txt"
    path.write_bytes((MARK + text).encode())
    assert read_lines(path) == expected


@pytest.mark.parametrize("raw, named", [
    ("a".encode("utf-16"), "x is UTF-16"), ("é\n".encode("utf-32"), "x is UTF-32"), (b"\xfe\xff\0a", "x is UTF-16"),
    (b"ab\xe9c", r"x is not UTF-8: byte 0xe9 at offset 2"), (b"\xef\xbb\xbf\xff", "byte 0xff at offset 3"),
])  # fmt: skip
def test_another_encoding_is_named(raw, named):
    with pytest.raises(ValueError, match=named):
        decode_text(raw, "x")


def test_prompts_of_sample_are_lines(tiny_run, tmp_path, call_script):
    """Each prompt is what its line is by itself: no mark before the first, none cut in two, blank ones kept."""
    usual = [f"--out_dir={tiny_run}", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    code, alone, err = call_script("sample.py", *usual, "--start=be")
    assert code == 0, err
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfbe\r\n\r\nbe")
    code, out, err = call_script("sample.py", *usual, f"--prompts={tmp_path / 'p.txt'}")
    blank = call_script("sample.py", *usual, "--start=")[1]
    assert code == 0 and out == alone + blank + alone, err
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfbe")
    assert call_script("sample.py", *usual, f"--start=FILE:{tmp_path / 'one.txt'}")[1] == alone
    assert call_script("sample.py", *usual, "--start=-", stdin=b"\xef\xbb\xbfbe\n")[1] == alone
    for characters in ("to\x0cbe", "to\u2029be"):  # the tokenizer lacks one: so it has come as part of the line
        (tmp_path / "p.txt").write_text(characters, encoding="utf-8")
        code, _, err = call_script("sample.py", *usual, f"--prompts={tmp_path / 'p.txt'}")
        assert code == 2 and f"U+{ord(characters[2]):04X}) at position 2" in err


def test_prompts_of_eval_are_lines(tiny_run, tmp_path, call_script):
    path, out = tmp_path / "p.txt", tmp_path / "samples.md"
    path.write_bytes("\ufeffbe\n \nto\x0cbe\nto\u2029be\n".encode())
    words = [f"--out_dir={tiny_run}", f"--prompts={path}", f"--out={out}", "--num_samples=1", "--max_new_tokens=3"]
    code, _, err = call_script("eval.py", "prompts", *words)
    assert code == 0, err
    text = out.read_text(encoding="utf-8")
    assert re.findall("^## .*", text, re.M) == ["## `be`"]
    assert text.count("left out: ") == 2 and "U+000C" in text and "U+2029" in text


@pytest.mark.parametrize("raw, named", [("be".encode("utf-16"), "is UTF-16, not UTF-8"), (b"b\xff", "offset 1")])
def test_prompts_in_another_encoding_are_one_line(raw, named, tiny_run, tmp_path, call_script):
    path = tmp_path / "p.txt"
    path.write_bytes(raw)
    run = f"--out_dir={tiny_run}"
    for words in (["sample.py", run, f"--prompts={path}"], ["sample.py", run, f"--start=FILE:{path}"],
                  ["eval.py", "prompts", run, f"--prompts={path}"]):
        code, _, err = call_script(*words)
        assert code == 2 and err.count("\n") == 1 and named in err and "p.txt" in err, err
    code, _, err = call_script("sample.py", run, "--start=-", stdin=raw)
    assert code == 2 and err.count("\n") == 1 and named in err and "standard input" in err
