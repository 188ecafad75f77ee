"""
Files of a user -> documents, in pieces of work that do not depend on who reads them.

| file | its documents |
|---|---|
| .txt .txt.gz .txt.zst | the text between two <|endoftext|>, without the line ends around it |
| .jsonl .jsonl.gz .jsonl.zst | one JSON object a line, its text under a key |
| .parquet | one a row, its text in a column of that name |

Text is UTF-8. A byte order mark at the beginning of a file is no part of it.

A corpus is a sorted list of such files (or the shards of a dataset of the Hugging Face Hub). Each is cut into chunks by
the offset at which a document begins: chunk i holds the documents that begin in [i * size, (i + 1) * size). So a chunk
has the same documents whoever reads it, and however often reading was interrupted. Reading can begin at any chunk of a
file that is not packed.
"""

import codecs
import contextlib
import gzip
import importlib
import itertools
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from configurator import fail
from files import decode_text
from tokenizer import END_OF_TEXT

BLOCK = 1 << 16  # bytes read at a time, and so the most that is lost where a packed file breaks off
MARK = END_OF_TEXT.encode()
# byte order marks; UTF-32's other one begins as UTF-16's does
FOREIGN = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
ENDINGS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


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
    # set while it is read
    done: int = 0  # bytes on disk that have been read
    chunks: int = 0  # how many it has
    fault: str | None = None  # why the rest of it could not be read

    @property
    def kind(self):
        """hub, parquet, txt or jsonl"""
        if self.path is None:
            return "hub"
        return "parquet" if self.ending == ".parquet" else self.ending.split(".")[1]

    @property
    def ending(self):
        name = self.path.name.lower()
        return next((ending for ending in ENDINGS if name.endswith(ending)), ".txt")

    @property
    def seekable(self):
        return self.path is not None and self.ending in (".txt", ".jsonl")


def find_files(folder, endings=ENDINGS):
    """Files under `folder` that end in one of `endings`, sorted by their path in it.

    Links are followed, and each folder is entered once. Raises OSError, also for a link that leads nowhere.
    """

    def stop(error):
        raise error

    folder = Path(folder)
    paths = []
    entered = set()
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=stop):
        if os.path.realpath(place) in entered:  # a link back up would never end
            subfolders.clear()
            continue
        entered.add(os.path.realpath(place))
        # which of two ways into a folder is used must not depend on the file system
        subfolders.sort()
        paths += [Path(place, name) for name in names if name.lower().endswith(endings)]
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def list_files(path, endings=ENDINGS):
    """The corpus at `path`, a file or folder. -> list of InputFile. Ends the script where there is none to read."""
    path = Path(path)
    if not path.is_dir():
        if not os.path.lexists(path):
            fail(f"--input={path}: there is no such file or folder")
        if not path.name.lower().endswith(endings):
            fail(f"--input={path}: a file of documents ends in one of {' '.join(endings)}")
        return [InputFile(path.name, path.stat().st_size, path)]
    files = []
    for file in find_files(path, endings):
        files.append(InputFile(file.relative_to(path).as_posix(), file.stat().st_size, file))
    if not files:
        fail(f"--input={path}: the folder has no file that ends in one of {' '.join(endings)}")
    return files


# -----------------------------------------------------------------------------
# Documents, one after another, as (offset, document): bytes, str, or the Reject that replaces it


def split_stream(stream, separator, limit, start=0):
    """Cut a binary stream at `separator`. Yields (offset, bytes), or a Reject in place of more than `limit` bytes.

    It never holds more than `limit` and a block, however long a piece is: it drops the beginning of such a piece.
    """
    rest = bytearray()  # what is read of the current piece, which begins at offset `at`
    at, dropped = start, 0  # `rest` itself begins at offset at + dropped
    overlap = len(separator) - 1  # a separator may begin in one block and end in the next
    while block := stream.read(BLOCK):
        # the first place where a separator may begin that was not there before
        new = max(0, len(rest) - overlap)
        rest += block
        if rest.find(separator, new) >= 0:
            *pieces, rest = rest.split(separator)
            for piece in pieces:
                yield at, Reject("too_long") if dropped or len(piece) > limit else bytes(piece)
                at += dropped + len(piece) + len(separator)
                dropped = 0
        if len(rest) > limit + overlap:  # too long even if it ends in the beginning of a separator
            dropped += len(rest) - overlap
            rest = rest[len(rest) - overlap :]
    if rest or dropped:
        yield at, Reject("too_long") if dropped or len(rest) > limit else bytes(rest)


def stream_documents(file, limit, start=0):
    """Documents of a .txt or .jsonl, packed or not. Where `start` is not 0 the first may be the tail of one."""
    separator, blank = (b"\n", b" \t\r\n") if file.kind == "jsonl" else (MARK, b"\r\n")
    with open_binary(file) as (stream, packed):
        if start:
            stream.seek(start)
        for at, piece in split_stream(stream, separator, limit, start):
            file.done = packed.tell()
            if not isinstance(piece, Reject):
                if at == 0:
                    piece = piece.removeprefix(codecs.BOM_UTF8)
                piece = piece.strip(blank)
            if piece:
                yield at, piece


def foreign_encoding(file, name="it"):
    """The error for a text file that begins as UTF-16 or UTF-32 does, which calls the file `name`; or None."""
    if file.kind not in ("txt", "jsonl"):
        return None
    with open_binary(file) as (stream, _):
        start = stream.read(4)
    if not start.startswith(FOREIGN):
        return None
    try:
        decode_text(start, name)
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
            names = ", ".join(opened.schema_arrow.names)
            raise Damaged(f"it has no column {text_key!r}, but {names}")
        at = 0
        for batch in opened.iter_batches(64, columns=[text_key], use_threads=False):
            for text in bytes_of(batch.column(0), arrow).to_pylist():
                document, length = accepted(text, bytes, limit)
                yield at, document
                at += length
            file.done += file.size * len(batch) // max(1, opened.metadata.num_rows)


def parquet_rows(file, columns, limit):
    """Rows of a parquet file, as dicts of those of `columns` that it has. A row of more than `limit` bytes is a Reject.
    """
    parquet = need("pyarrow.parquet")
    with parquet.ParquetFile(file.path) as opened:
        names = opened.schema_arrow.names
        there = [name for name in columns if name in names]
        if not there:
            raise Damaged(f"it has none of the columns {', '.join(columns)}, but {', '.join(names)}")
        for batch in opened.iter_batches(64, columns=there, use_threads=False):
            for i in range(len(batch)):
                row = batch.slice(i, 1)
                try:
                    yield Reject("too_long") if row.nbytes > limit else row.to_pylist()[0]
                except UnicodeDecodeError:
                    yield Reject("not_utf8")
            file.done += file.size * len(batch) // max(1, opened.metadata.num_rows)


def accepted(text, kind, limit):
    """The cell of a row -> (the text, or its Reject if it is not of this `kind` or too long; how far it moves the
    offset of the next row)."""
    if not isinstance(text, kind):
        return Reject("no_text"), 1
    if len(text) > limit:
        return Reject("too_long"), len(text)
    return text, len(text)


def bytes_of(column, arrow):
    """A column of text in any of Arrow's forms as bytes, UTF-8 or not; a column of anything else as it is."""
    if arrow.types.is_dictionary(column.type):
        return bytes_of(column.dictionary, arrow).take(column.indices)
    is_text = False
    for name in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view",
                 "fixed_size_binary"):
        test = getattr(arrow.types, f"is_{name}", None)  # older versions lack the views
        is_text = is_text or bool(test and test(column.type))
    return column.cast(arrow.large_binary()) if is_text else column


def hub_files(dataset, name, revision, plan, split="train"):
    """A split of a dataset of the Hugging Face Hub, streamed from its parquet files. None of its code runs.

    -> (list of InputFile, the manifest's source). The commit is the one in `plan`, the file of an unfinished run, or
    else the latest: what is read does not change between two attempts.
    """
    hub, datasets = need("huggingface_hub"), need("datasets")
    try:
        planned = json.loads(plan.read_bytes())["source"]
        if not revision and planned.get("name") == dataset and planned.get("configuration") == name:
            revision = planned["revision"]
    except (OSError, ValueError, KeyError):
        pass
    try:
        if not re.fullmatch("[0-9a-f]{40}", revision):
            revision = hub.HfApi().dataset_info(dataset, revision=revision or None).sha
        rows = datasets.load_dataset(
            dataset, name or None, split=split, streaming=True, revision=revision
        )
    except Exception as error:  # the network, the Hub and the library have no exception in common
        fail(f"the Hub's dataset {dataset} cannot be read here ({type(error).__name__}: {error}); "
             "with its files on this machine: --input=FOLDER")
    count = rows.num_shards
    shards = [InputFile(f"shard {i} of {count}", rows=rows.shard(count, i)) for i in range(count)]
    return shards, {"name": dataset, "configuration": name, "revision": revision}


def hub_documents(file, text_key, limit):
    """Texts of a shard of the Hub; offsets count characters of text."""
    at = 0
    for row in hub_rows(file, ", which resumes from here"):
        text = row.get(text_key)
        document, length = accepted(text, str, limit)
        yield at, document
        at += length


def hub_rows(file, resumes=""):
    """Rows of a shard of the Hub, as dicts. `resumes` ends the line that is printed where the Hub breaks off."""
    rows = iter(file.rows)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of the network: it does not mean that the corpus ends here
            fail(f"{file.name}: the Hub broke off ({type(error).__name__}: {error}): "
                 f"run the same command again{resumes}")
        yield row


def read_documents(file, text_key, limit):
    """All documents of a file, as (offset, document). Raises Damaged where the rest cannot be read.

    A line of JSON comes as it stands: extracting its text is work for many processes (cleaning.text_of).
    """
    with damage_named(file):
        if file.kind == "hub":
            yield from hub_documents(file, text_key, limit)
        elif file.kind == "parquet":
            yield from parquet_documents(file, text_key, limit)
        elif fault := foreign_encoding(file):
            raise Damaged(fault)
        else:
            yield from stream_documents(file, limit)


def read_records(file, columns, limit):
    """All records of a .jsonl, a .parquet or a shard of the Hub: a line as bytes, a row as a dict of those of `columns`
    that it has, or the Reject that replaces it. Raises Damaged where the rest cannot be read."""
    with damage_named(file):
        if file.kind == "hub":
            yield from hub_rows(file)
        elif file.kind == "parquet":
            yield from parquet_rows(file, columns, limit)
        elif fault := foreign_encoding(file):
            raise Damaged(fault)
        else:
            for _, line in stream_documents(file, limit):
                yield line


@contextlib.contextmanager
def damage_named(file):
    """Raise Damaged for the errors inside that mean that the rest of a file cannot be read."""
    errors = [EOFError, zlib.error, gzip.BadGzipFile]
    if file.kind == "parquet":
        errors += [need("pyarrow").ArrowException, OSError]
    elif file.path and file.ending.endswith(".zst"):
        errors += [OSError]
    try:
        yield
    except (PermissionError, FileNotFoundError):
        raise
    except tuple(errors) as error:
        raise Damaged(str(error).strip().partition("\n")[0]) from None


def need(package):
    """Import an optional package, or end the script with how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        fail(f"this needs the package {name}: pip install -c constraints.txt '.[data]'")


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


def mend_halves(text):
    """A str with U+FFFD for each half of a character; two halves that belong together become the character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# -----------------------------------------------------------------------------
# Chunks


def read_chunks(file, wanted, size, text_key, limit):
    """Yields (i, the documents of chunk i) for each i with wanted(i), a chunk without documents included.

    Afterwards file.chunks and file.fault are known.
    """
    if file.seekable and (fault := foreign_encoding(file)):
        file.chunks = 1
        file.fault = fault
        if wanted(0):
            yield 0, []
    elif file.seekable:
        yield from seek_chunks(file, wanted, size, limit)
    else:
        yield from stream_chunks(file, wanted, size, text_key, limit)


def seek_chunks(file, wanted, size, limit):
    """The chunks of a file that is not packed: each is read by itself."""
    file.chunks = max(1, -(-file.size // size))
    back = len(MARK) if file.kind == "txt" else 1
    for i in filter(wanted, range(file.chunks)):
        start, end = i * size, (i + 1) * size
        # Begin a separator's length earlier: then the first piece is never a document that begins in this chunk.
        documents = stream_documents(file, limit, max(0, start - back))
        documents = itertools.takewhile(lambda pair, end=end: pair[0] < end, documents)
        yield i, [document for at, document in documents if at >= start]


def stream_chunks(file, wanted, size, text_key, limit):
    """The chunks of a file that can only be read from its beginning."""
    chunk = 0
    documents = []  # of this chunk
    try:
        for at, document in read_documents(file, text_key, limit):
            while at >= (chunk + 1) * size:
                if wanted(chunk):
                    yield chunk, documents
                chunk += 1
                documents = []
            if wanted(chunk):
                documents.append(document)
    except Damaged as error:
        file.fault = str(error)
    if wanted(chunk):
        yield chunk, documents
    file.chunks = chunk + 1
