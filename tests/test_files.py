"""files.py: a file is complete at any moment; all scripts read the same lines; text that is not UTF-8 is one error."""

import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from files import clock_face, decode_text, file_sha256, finite, read_lines, sha256, split_lines, whole_file, write_whole

MARK = "\ufeff"


@given(st.lists(st.text(alphabet="ab \x0b\x0c\x1c\x1e\x85\u2028\u2029\ufeff"), min_size=1, max_size=6),
       st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_only_line_ends_end_a_line(tmp_path_factory, lines, end, last):
    """Other characters at which str.splitlines cuts are part of a line; a mark inside a text is a character."""
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
    """A prompt in a file gives the sample of the same --start: no mark before it, no line cut, blank lines kept."""
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
    for characters in ("to\x0cbe", "to\u2029be"):  # the tokenizer lacks one: so it was part of the line
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
    assert text.count("skipped: ") == 2 and "U+000C" in text and "U+2029" in text


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


# -----------------------------------------------------------------------------
# Whole files


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path, durable):
    path = tmp_path / "a.json"
    write_whole(path, "first", durable)
    with whole_file(path, durable) as file:
        file.write(b"sec")
        file.flush()
        assert path.read_text() == "first"
        file.write("ond é".encode())
    assert path.read_text(encoding="utf-8") == "second é"
    with pytest.raises(RuntimeError), whole_file(path, durable) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "second é" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = ("import os, signal, sys; from files import whole_file\n"
            "with whole_file(sys.argv[1]) as file:\n"
            "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert subprocess.run([sys.executable, "-c", code, path], cwd=root).returncode == -9
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_digest_is_sha256s_of_bytes_of_text_and_of_files(tmp_path):
    text = "äb" * 700_000  # more than one block
    expected = hashlib.sha256(text.encode()).hexdigest()
    path = tmp_path / "a"
    path.write_text(text, encoding="utf-8")
    assert sha256(text) == sha256(text.encode()) == file_sha256(path) == file_sha256(str(path)) == expected
    file = io.BytesIO(b"skipped" + text.encode())
    file.seek(7)
    assert file_sha256(file) == expected


def test_what_is_not_finite_becomes_null():
    value = {"a": math.nan, "b": [1, (2.5, -math.inf)], "c": {"d": math.inf}, "e": True, "f": "inf"}
    assert finite(value) == {"a": None, "b": [1, [2.5, None]], "c": {"d": None}, "e": True, "f": "inf"}
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == finite(value)


@pytest.mark.parametrize("seconds, face", [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3723, "1:02:03")])
def test_the_clock(seconds, face):
    assert clock_face(seconds) == face
