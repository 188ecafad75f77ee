"""
Files of one's own -> texts, or documents in pieces of work that do not depend on who reads them.

| file | its documents |
|---|---|
| .txt .txt.gz .txt.zst | what stands between two <|endoftext|>, the line ends around it stripped |
| .jsonl .jsonl.gz .jsonl.zst | one JSON object a line, its text under a key |
| .parquet | a row each, its text in a column of that name |

Text is UTF-8. A byte order mark at the beginning of a file is no part of it.

A corpus is a sorted list of such files (or the shards of a dataset of the Hugging Face Hub). Each is cut into chunks by
the offset at which a document begins: chunk i holds those that begin in [i * size, (i + 1) * size). So a chunk is the
same documents whoever reads it and however often reading was interrupted. Of a plain file, any chunk is read alone.
"""

import codecs
import contextlib
import gzip
import itertools
import json
import os
import re
import shlex
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import file_sha256, sha256
from configurator import fail
from files import decode_text
from tokenizer import END_OF_TEXT

BLOCK = 1 << 16  # bytes read at a time, and so what is lost where a packed file breaks off
MARK = END_OF_TEXT.encode()
FOREIGN = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32's other begins as UTF-16's does
ENDINGS = tuple(f".{kind}{packed}" for kind in ("txt", "jsonl") for packed in ("", ".gz", ".zst")) + (".parquet",)


class Reject(Exception):
    """Why a document is not used: a word, under which it is counted."""


class Damaged(Exception):
    """Why the rest of a file cannot be read."""


@dataclass
class InputFile:
    """One file of a corpus, or one shard of a dataset of the Hub."""

    name: str  # its path in the folder, with /
    size: int = 0  # bytes on disk, 0: not known
    path: Path | None = None
    rows: object = None  # of a shard of the Hub: an iterable of dict
    # known when it has been read
    done: int = 0  # bytes on disk that are read
    chunks: int = 0  # how many it has
    fault: str | None = None  # why the rest of it could not be read

    @property
    def kind(self):
        return "hub" if self.path is None else "parquet" if self.ending == ".parquet" else self.ending.split(".")[1]

    @property
    def ending(self):
        return next((ending for ending in ENDINGS if self.path.name.lower().endswith(ending)), ".txt")

    @property
    def seekable(self):
        return self.path is not None and self.ending in (".txt", ".jsonl")


def find_files(folder, endings=ENDINGS):
    """Files under `folder` that end in one of `endings`, sorted by their path in it.

    Links are followed, each folder is entered once. Raises OSError, also for a link that leads nowhere.
    """
    folder, found, entered = Path(folder), [], set()

    def stop(error):
        raise error

    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=stop):
        if os.path.realpath(place) in entered:  # a link back up would never end
            subfolders.clear()
            continue
        entered.add(os.path.realpath(place))
        subfolders.sort()  # which of two ways into a folder is taken must not depend on the file system
        found += [Path(place, name) for name in names if name.lower().endswith(endings)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def list_files(path):
    """The corpus at `path`, a file or folder. -> list of InputFile. Ends the script where there is none to read."""
    path = Path(path)
    if not path.is_dir():
        if not os.path.lexists(path):
            fail(f"--input={path}: there is no such file or folder")
        if not path.name.lower().endswith(ENDINGS):
            fail(f"--input={path}: a file of documents ends in one of {' '.join(ENDINGS)}")
        return [InputFile(path.name, path.stat().st_size, path)]
    files = [InputFile(f.relative_to(path).as_posix(), f.stat().st_size, f) for f in find_files(path)]
    if not files:
        fail(f"--input={path}: the folder has no file that ends in one of {' '.join(ENDINGS)}")
    return files


# -----------------------------------------------------------------------------
# Documents, one after another, as (offset, bytes or str, or the Reject that stands for it)


def split_stream(stream, separator, limit, start=0):
    """Cut a binary stream at `separator`. Yields (offset, bytes); a Reject for what is longer than `limit` bytes, of
    which no more than that and a block is ever held."""
    rest, at, passed, keep = bytearray(), start, 0, len(separator) - 1  # `rest` begins at offset at + passed
    while block := stream.read(BLOCK):
        new = max(0, len(rest) - keep)  # where a separator may begin that was not there before
        rest += block
        if rest.find(separator, new) >= 0:
            *whole, rest = rest.split(separator)
            for piece in whole:
                yield at, Reject("too_long") if passed or len(piece) > limit else bytes(piece)
                at, passed = at + passed + len(piece) + len(separator), 0
        if len(rest) > limit + keep:  # not just the beginning of a separator
            passed, rest = passed + len(rest) - keep, rest[len(rest) - keep :]
    if rest or passed:
        yield at, Reject("too_long") if passed or len(rest) > limit else bytes(rest)


def stream_documents(file, limit, start=0):
    """Documents of a .txt or .jsonl, packed or not, the first perhaps the tail of one where `start` is not 0."""
    blank = b" \t\r\n" if file.kind == "jsonl" else b"\r\n"
    with open_binary(file) as (stream, packed):
        if start:
            stream.seek(start)
        for at, piece in split_stream(stream, b"\n" if file.kind == "jsonl" else MARK, limit, start):
            file.done = packed.tell()
            if not isinstance(piece, Reject):
                piece = (piece if at else piece.removeprefix(codecs.BOM_UTF8)).strip(blank)
            if piece:
                yield at, piece


def foreign_encoding(file, name="it"):
    """What is wrong with a text file that begins as UTF-16 or UTF-32 does, said of `name`; or None."""
    if file.kind not in ("txt", "jsonl"):
        return None
    with open_binary(file) as (stream, _):
        start = stream.read(4)
    try:
        decode_text(start if start.startswith(FOREIGN) else b"", name)
    except ValueError as error:
        return str(error)
    return None


@contextlib.contextmanager
def open_binary(file):
    """-> (the unpacked bytes of a file as a stream, the file itself)"""
    with open(file.path, "rb") as packed:
        if file.ending.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=packed)
        elif file.ending.endswith(".zst"):
            arrow = need("pyarrow")
            stream = arrow.CompressedInputStream(arrow.PythonFile(packed, "r"), "zstd")
        else:
            stream = packed
        yield stream, packed


def parquet_documents(file, text_key, limit):
    """Rows of a parquet file; offsets count bytes of text."""
    arrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    with parquet.ParquetFile(file.path) as opened:
        if text_key not in opened.schema_arrow.names:
            raise Damaged(f"it has no column {text_key!r}, but {', '.join(opened.schema_arrow.names)}")
        at = 0
        for batch in opened.iter_batches(64, columns=[text_key], use_threads=False):
            for text in bytes_of(batch.column(0), arrow).to_pylist():
                known = isinstance(text, bytes)
                reject = Reject("too_long") if known and len(text) > limit else None if known else Reject("no_text")
                yield at, reject or text
                at += len(text) if known else 1
            file.done += file.size * len(batch) // max(1, opened.metadata.num_rows)


def bytes_of(column, arrow):
    """A column of text in any of Arrow's forms as bytes, UTF-8 or not; a column of anything else as it is."""
    if arrow.types.is_dictionary(column.type):
        return bytes_of(column.dictionary, arrow).take(column.indices)
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    known = [getattr(arrow.types, f"is_{name}", None) for name in names]  # the views are newer than the others
    return column.cast(arrow.large_binary()) if any(is_it and is_it(column.type) for is_it in known) else column


def hub_files(dataset, name, revision, plan):
    """A dataset of the Hugging Face Hub, streamed from its parquet files; no code of it is run.

    -> (list of InputFile, the manifest's source). The commit is that of `plan`, the file of an unfinished run, or the
    latest, so that what is read does not change in between.
    """
    hub, datasets = need("huggingface_hub"), need("datasets")
    try:
        held = json.loads(plan.read_bytes())["source"]
        if not revision and held.get("name") == dataset and held.get("configuration") == name:
            revision = held["revision"]
    except (OSError, ValueError, KeyError):
        pass
    try:
        if not re.fullmatch("[0-9a-f]{40}", revision):
            revision = hub.HfApi().dataset_info(dataset, revision=revision or None).sha
        rows = datasets.load_dataset(dataset, name or None, split="train", streaming=True, revision=revision)
    except Exception as error:  # the network's, the Hub's and the library's have no common one
        fail(f"the Hub's dataset {dataset} is not to be had here ({type(error).__name__}: {error}); "
             "with its files on this machine: --input=FOLDER")
    count = rows.num_shards
    shards = [InputFile(f"shard {i} of {count}", rows=rows.shard(count, i)) for i in range(count)]
    return shards, {"name": dataset, "configuration": name, "revision": revision}


def hub_documents(file, text_key, limit):
    """Rows of a shard of the Hub; offsets count characters of text."""
    at, rows = 0, iter(file.rows)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network's; none of it says that the corpus ends here
            fail(f"{file.name}: the Hub broke off ({type(error).__name__}: {error}): run the same command again, "
                 "which goes on from here")
        text = row.get(text_key)
        known = isinstance(text, str)
        yield at, text if known and len(text) <= limit else Reject("too_long" if known else "no_text")
        at += len(text) if known else 1


def read_documents(file, text_key, limit):
    """All documents of a file, as (offset, document). Raises Damaged where the rest cannot be read.

    A line of JSON comes as it stands: taking the text out of it is work for many processes (cleaning.text_of).
    """
    errors = [EOFError, zlib.error, gzip.BadGzipFile]
    if file.ending == ".parquet" if file.path else False:
        errors += [need("pyarrow").ArrowException, OSError]
    elif file.path and file.ending.endswith(".zst"):
        errors += [OSError]
    try:
        if file.kind == "hub":
            yield from hub_documents(file, text_key, limit)
        elif file.kind == "parquet":
            yield from parquet_documents(file, text_key, limit)
        elif fault := foreign_encoding(file):
            raise Damaged(fault)
        else:
            yield from stream_documents(file, limit)
    except (PermissionError, FileNotFoundError):
        raise
    except tuple(errors) as error:
        raise Damaged(str(error).strip().partition("\n")[0]) from None


def need(package):
    """An optional package, or the end with how to get it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f"this needs the package {package.partition('.')[0]}: pip install -c constraints.txt '.[data]'")


# -----------------------------------------------------------------------------
# Chunks


def read_chunks(file, wanted, size, text_key, limit):
    """Yields (i, the documents of chunk i) for each i with wanted(i), a chunk without documents included.

    Afterwards file.chunks and file.fault are known.
    """
    if file.seekable and (fault := foreign_encoding(file)):
        file.chunks, file.fault = 1, fault
        if wanted(0):
            yield 0, []
        return
    if file.seekable:
        file.chunks, back = max(1, -(-file.size // size)), len(MARK) if file.kind == "txt" else 1
        for i in filter(wanted, range(file.chunks)):
            # from a separator's length before: then the first piece is never one that begins here
            documents = stream_documents(file, limit, max(0, i * size - back))
            documents = itertools.takewhile(lambda pair, end=(i + 1) * size: pair[0] < end, documents)
            yield i, [document for at, document in documents if at >= i * size]
        return

    chunk, held = 0, []
    try:
        for at, document in read_documents(file, text_key, limit):
            while at >= (chunk + 1) * size:
                if wanted(chunk):
                    yield chunk, held
                chunk, held = chunk + 1, []
            if wanted(chunk):
                held.append(document)
    except Damaged as error:
        file.fault = str(error)
    if wanted(chunk):
        yield chunk, held
    file.chunks = chunk + 1


# -----------------------------------------------------------------------------
# Texts in memory


def read_text(path):
    """A UTF-8 file as it stands, line ends included, less a byte order mark. -> (str, its bytes)"""
    raw = Path(path).read_bytes()
    try:
        return decode_text(raw, str(path)), raw
    except ValueError as error:
        fail(error)


def read_texts(path, text_key="text"):
    """The text of a file, or of each file under a folder that list_files knows: of a .jsonl or .parquet, each document.

    A text stands as it is, not cut at <|endoftext|>. A document without text is counted and passed over. Half a
    character, as JSON may spell one, becomes U+FFFD, with a warning, and its document counts as changed.
    -> (list of str, the manifest's source, its documents)
    """
    path = Path(path)
    if not path.exists():
        fail(f"--input={path}: there is no such file or folder")
    if path.is_file():
        refuse_tables(path)
    paths = find_files(path) if path.is_dir() else [path]
    texts, digests, size, read, changed, dropped = [], [], 0, 0, 0, Counter(empty=0)
    for file in (InputFile(p.name, p.stat().st_size, p) for p in paths):
        if file.ending == ".txt":
            text, raw = read_text(file.path)
            digests.append(sha256(raw))
            changed += raw.startswith(b"\xef\xbb\xbf")
            found = [text]
        else:
            with open(file.path, "rb") as raw:
                digests.append(file_sha256(raw))
            found = list(strict_texts(file, text_key))
            halves = [i for i, text in enumerate(found) if not isinstance(text, Reject) and not encodable(text)]
            for i in halves:
                found[i] = mend_halves(found[i])
            changed += len(halves)
            if halves:
                print(f"warning: {file.path}: half a character (a lone surrogate) became U+FFFD in {len(halves):,} of "
                      f"{len(found):,} documents, first in document {halves[0] + 1:,}", file=sys.stderr)
        size += file.size
        read += len(found)
        texts += [text for text in found if text and not isinstance(text, Reject)]
        dropped.update(str(text) if isinstance(text, Reject) else "empty" for text in found if not text or
                       isinstance(text, Reject))
    if not texts:
        held = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        fail(f"{path} has no text: {f'of {len(paths)} files, {held}' if path.is_dir() or read > 1 else 'it is empty'}")
    source = {"name": os.path.basename(os.path.abspath(path)), "bytes": size, "sha256": (digests or [""])[0]}
    if path.is_dir():  # the digest of what sha256sum would print: changes with any file's content, name or presence
        names = [file.relative_to(path).as_posix() for file in paths]
        listing = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
        source |= {"files": len(paths), "sha256": sha256(listing.encode("utf-8", "surrogateescape"))}
    documents = {"read": read, "kept": len(texts), "changed": changed, "dropped": dict(dropped)}
    return texts, source, documents


def refuse_tables(path):
    """End the script where a file is JSON or a table: read as text, a model would learn its syntax."""
    packed = next((end for end in (".gz", ".zst") if path.name.lower().endswith(end)), "")
    kind = Path(path.name[: len(path.name) - len(packed)]).suffix.lower()
    if kind in (".ndjson", ".jsonlines"):
        fail(f"--input={path}: name it .jsonl{packed}, so that it is read as one JSON object a line")
    if kind not in (".json", ".csv", ".tsv"):
        return
    name = str(path)[: len(str(path)) - len(packed)]
    file = f'open({json.dumps(name, ensure_ascii=False)}, encoding="utf-8-sig", newline="")'
    tabs = ", delimiter=chr(9)" * (kind == ".tsv")
    rows = f"json.load({file})" if kind == ".json" else f"csv.DictReader({file}{tabs})"
    code = f'import csv, json; [print(json.dumps({{"text": row["text"]}})) for row in {rows}]'
    how = f"python -c {shlex.quote(code)} > {shlex.quote(name[: -len(kind)] + '.jsonl')}"
    known = "; if each line is a JSON object already, name it .jsonl" * (kind == ".json")
    fail(f"--input={path}: of a {kind} file a model would learn the syntax; make a .jsonl of it, the text under a key"
         f"{', once it is unpacked' * bool(packed)}: {how}{known}")


def encodable(text):
    """Whether a str has no half of a character, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mend_halves(text):
    """A str with U+FFFD for each half of a character; two halves that belong together become the character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def strict_texts(file, text_key):
    """The texts of a packed file, a .jsonl or a .parquet, as str or Reject. Ends the script where it is damaged."""
    number = 0
    try:
        if fault := foreign_encoding(file, str(file.path)):
            fail(fault)
        if file.kind == "txt":
            with open_binary(file) as (stream, _):
                yield decode_text(stream.read(), str(file.path))
            return
        for number, (_, document) in enumerate(read_documents(file, text_key, sys.maxsize), 1):  # noqa: B007
            try:
                if isinstance(document, Reject):
                    raise document
                text = document.decode()
                yield json_text(text, text_key) if file.kind == "jsonl" else text
            except Reject as reject:
                yield reject
    except UnicodeDecodeError as error:
        fail(f"{file.path}, document {number:,}, is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
             f"{error.start:,} in it")
    except ValueError as error:
        fail(error)
    except (Damaged, EOFError, zlib.error, OSError) as error:
        fail(f"{file.path} is damaged: {error}")


def json_text(line, text_key):
    """The text of a JSON object. Raises Reject."""
    try:
        record = json.loads(line, strict=False)
    except (ValueError, RecursionError):
        raise Reject("bad_json") from None
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise Reject("no_text")
    return text
