"""Files to documents: every format gives the same documents, in chunks that do not depend on how they are read."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reading
from reading import MARK, Damaged, Reject, find_files, list_files, read_chunks, read_documents, split_stream
from texts import read_texts

TEXTS = ["first\nof two lines", "second – ünïcode 文字", "<|endoftext", "x" * 300, "last"]
LIMIT = 200
posix = pytest.mark.skipif(os.name == "nt", reason="needs a shell of POSIX")


def packed(data, path):
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(data)
        return
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_corpus(folder, texts, ending):
    """`texts` as one file of a format. -> its path"""
    path = folder / f"corpus{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), path, row_group_size=2)
    elif ending.startswith(".txt"):
        packed((MARK + b"\n").join(text.encode() + b"\n" for text in texts), path)
    else:
        packed("".join(json.dumps({"id": 0, "text": text}) + "\n" for text in texts).encode(), path)
    return path


def texts_of(documents):
    """Documents as texts, rejected ones as their reason."""
    decoded = [d if isinstance(d, (str, Reject)) else d.decode() for d in documents]
    return [str(d) if isinstance(d, Reject) else json.loads(d)["text"] if d.startswith("{") else d for d in decoded]


@pytest.mark.parametrize("ending", reading.ENDINGS)
def test_every_format_gives_the_same_documents(ending, tmp_path):
    file = list_files(write_corpus(tmp_path, TEXTS, ending))[0]
    found = texts_of(document for _, document in read_documents(file, "text", LIMIT))
    assert found == [*TEXTS[:3], "too_long", "last"]


@pytest.mark.parametrize("ending", reading.ENDINGS)
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_chunks_hold_each_document_once_whatever_is_wanted(ending, size, tmp_path):
    path = write_corpus(tmp_path, TEXTS * 3, ending)
    whole = [document for _, document in read_documents(list_files(path)[0], "text", LIMIT)]
    file = list_files(path)[0]
    chunks = dict(read_chunks(file, lambda i: True, size, "text", LIMIT))
    assert list(chunks) == list(range(file.chunks)) and file.fault is None
    assert texts_of(d for documents in chunks.values() for d in documents) == texts_of(whole)
    some = dict(read_chunks(list_files(path)[0], lambda i: i % 3 == 1, size, "text", LIMIT))
    assert {i: texts_of(d) for i, d in some.items()} == {i: texts_of(d) for i, d in chunks.items() if i % 3 == 1}


@given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=8), st.integers(1, 9))
def test_a_stream_is_cut_where_it_should_be(pieces, block):
    """Against bytes.split, at any block size."""
    for separator in (b"\n", MARK):
        data, limit = separator.join(pieces), 12
        expected, at = [], 0
        for piece in data.split(separator):
            expected.append((at, "too_long" if len(piece) > limit else piece))
            at += len(piece) + len(separator)
        if expected[-1][1] == b"":
            expected.pop()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "BLOCK", block)
            found = [(at, str(p) if isinstance(p, Reject) else p)
                     for at, p in split_stream(io.BytesIO(data), separator, limit)]
        assert found == expected


def test_a_line_of_hundreds_of_megabytes_is_never_held():
    class Endless:
        left = 200

        def read(self, size):
            self.left -= 1
            return b"x" * size if self.left > 0 else b"\nshort\n" if self.left == 0 else b""

    import tracemalloc

    tracemalloc.start()
    found = [piece for _, piece in split_stream(Endless(), b"\n", 4 << 20)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(found[0]) == "too_long" and found[1] == b"short"
    assert peak < 32 << 20  # of 199 MiB


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "not one"])
def test_what_is_damaged_is_said_and_what_comes_before_is_used(ending, damage, tmp_path):
    texts = [os.urandom(2000).hex() for _ in range(500)]
    path = write_corpus(tmp_path, texts, ending)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "truncated" else b"something else" * 9)
    with pytest.raises(Damaged):
        list(read_documents(list_files(path)[0], "text", 10**6))
    file = list_files(path)[0]
    found = [d for _, documents in read_chunks(file, lambda i: True, 10**5, "text", 10**6) for d in documents]
    assert file.fault and file.chunks >= 1
    if damage == "truncated" and ending != ".parquet":  # a .parquet has its index at the end
        assert len(found) > 50 and texts_of(found[:50]) == texts[:50]


def test_parquet_without_the_column_names_those_it_has(tmp_path):
    file = list_files(write_corpus(tmp_path, TEXTS, ".parquet"))[0]
    with pytest.raises(Damaged, match="no column 'body', but text, id"):
        list(read_documents(file, "body", LIMIT))


def test_rows_that_are_no_text(tmp_path):
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "x.parquet")
    documents = read_documents(list_files(tmp_path / "x.parquet")[0], "text", LIMIT)
    assert texts_of(d for _, d in documents) == ["a", "no_text", "b"]
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "y.parquet")
    documents = read_documents(list_files(tmp_path / "y.parquet")[0], "text", LIMIT)
    assert texts_of(d for _, d in documents) == ["no_text", "no_text"]


def test_a_folder_is_read_in_the_order_of_its_paths_and_links_are_followed(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "1"}\n')
    (folder / "b" / "c.txt").write_text("2")
    (folder / "notes.md").write_text("not a document")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.txt").write_text("3")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "loop").symlink_to(folder)
    assert [file.name for file in list_files(folder)] == ["a.jsonl", "b/c.txt", "link/d.txt"]
    (folder / "self.txt").symlink_to(folder / "self.txt")
    with pytest.raises(OSError, match="self.txt"):
        list_files(folder)
    assert len(find_files(folder, (".md",))) == 1


@pytest.mark.parametrize("name, named", [("none", "no such file"), ("x.pdf", "ends in one of"), ("empty", "no file")])
def test_nothing_to_read_is_one_line(name, named, tmp_path, capsys):
    (tmp_path / "x.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as end:
        list_files(tmp_path / name)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and named in line and name in line


@pytest.mark.parametrize("ending", [ending for ending in reading.ENDINGS if ending != ".parquet"])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_mark_of_byte_order_is_no_part_of_the_first_document(ending, size, tmp_path):
    """At the beginning of a file; elsewhere it is a character."""
    texts = ["\ufeffinside", "\ufeffsecond", "third"] if ending.startswith(".jsonl") else ["first", "\ufeffsecond"]
    path = write_corpus(tmp_path, texts, ending)
    plain = write_corpus(tmp_path, texts, ending.partition(".gz")[0].partition(".zst")[0]).read_bytes()
    packed(b"\xef\xbb\xbf" + plain, path)
    for documents in ([d for _, d in read_documents(list_files(path)[0], "text", LIMIT)],
                      [d for _, many in read_chunks(list_files(path)[0], lambda i: True, size, "text", LIMIT)
                       for d in many]):
        assert texts_of(documents) == texts
    found, _, counts = read_texts(path)
    whole = "".join(f"<|endoftext|>\n{text}\n" for text in texts).removeprefix("<|endoftext|>\n")
    assert found == ([whole] if ending.startswith(".txt") else texts) and counts["read"] == len(found)


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".jsonl", ".jsonl.zst"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_another_encoding_is_named(ending, encoding, tmp_path, capsys):
    path = tmp_path / f"x{ending}"
    raw = '\ufeff{"text": "a"}\n{"text": "b"}\n'.removeprefix("\ufeff" * (encoding in ("utf-16", "utf-32")))
    packed(raw.encode(encoding), path)
    name = encoding[:6].upper()
    with pytest.raises(Damaged, match=f"it is {name}"):
        list(read_documents(list_files(path)[0], "text", LIMIT))
    file = list_files(path)[0]
    assert [d for _, documents in read_chunks(file, lambda i: True, 4, "text", LIMIT) for d in documents] == []
    assert file.fault.startswith(f"it is {name}") and file.chunks == 1
    with pytest.raises(SystemExit):
        read_texts(path)
    line = capsys.readouterr().err
    assert f"{path} is {name}, not UTF-8" in line and line.count("\n") == 1


FORMS = {
    "category": lambda: pa.array(TEXTS).dictionary_encode(),
    "small category": lambda: pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int8()), pa.array(TEXTS)),
    "large category": lambda: pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "large_string": lambda: pa.array(TEXTS, pa.large_string()),
    "string_view": lambda: pa.array(TEXTS, pa.string_view()),
    "binary": lambda: pa.array([text.encode() for text in TEXTS], pa.binary()),
    "large_binary": lambda: pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    "binary_view": lambda: pa.array([text.encode() for text in TEXTS], pa.binary_view()),
}


@pytest.mark.parametrize("form", FORMS)
def test_text_in_any_form_of_a_parquet_column(form, tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": FORMS[form]()}), path, row_group_size=2)
    found = [d for _, d in read_documents(list_files(path)[0], "text", LIMIT)]
    assert texts_of(found) == [*TEXTS[:3], "too_long", "last"]
    assert read_texts(path)[0] == TEXTS


def test_a_column_in_memory_may_have_forms_that_no_file_has():
    views = pa.DictionaryArray.from_arrays(pa.array([1, None, 0]), pa.array(["a", "é"], pa.string_view()))
    assert reading.bytes_of(views, pa).to_pylist() == ["é".encode(), None, b"a"]
    numbers = pa.array([3, None, 3]).dictionary_encode()
    assert reading.bytes_of(numbers, pa).to_pylist() == [3, None, 3]


def test_half_a_character_is_replaced_counted_and_said(tmp_path, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = ['{"text": "a"}', r'{"text": "b \udfff c"}', r'{"text": "\ud83d\ude42"}', r'{"text": "\ud83d"}']
    (folder / "x.jsonl").write_text("\n".join(lines))
    (folder / "y.txt").write_text("z")
    texts, _, documents = read_texts(folder)
    assert texts == ["a", "b \ufffd c", "🙂", "\ufffd", "z"] and documents["changed"] == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "x.jsonl" in line and "in 2 of 4 documents, first in document 2" in line


@pytest.mark.parametrize("name, raw, texts", [
    ("my notes.csv", "id,text\n1,\"two\nlines\"\n2,ünï\n", ["two\nlines", "ünï"]),
    ("it's.tsv", "text\tid\nun, deux\t1\n", ["un, deux"]),
    ("a.JSON", '\ufeff[{"text": "one", "id": 1}, {"text": "two"}]', ["one", "two"]),
])  # fmt: skip
@posix
def test_tables_are_refused_with_what_makes_texts_of_them(name, raw, texts, tmp_path, capsys, monkeypatch):
    """The command in the error is run, and the file that it makes is read."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(raw, encoding="utf-8")
    for path in (name, f"{name}.gz"):
        packed(raw.encode(), Path(path))
        with pytest.raises(SystemExit) as end:
            read_texts(path)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and path in line and ".jsonl" in line
    command = line[line.index("python -c"):].strip().partition("; if each line")[0]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert read_texts(Path(name).stem + ".jsonl")[0] == texts


def test_another_name_of_jsonl_is_named(tmp_path, capsys):
    (tmp_path / "x.ndjson").write_text('{"text": "a"}')
    with pytest.raises(SystemExit):
        read_texts(tmp_path / "x.ndjson")
    assert "name it .jsonl" in capsys.readouterr().err
    for name in ("page.html", "notes.md", "README"):  # anything else may be text
        (tmp_path / name).write_text("<p>")
        assert read_texts(tmp_path / name)[0] == ["<p>"]
