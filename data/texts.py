"""
Texts that fit into memory: read them, pick a tokenizer, and make a dataset of them. data/shakespeare/prepare.py shows
how a prepare.py uses this.

A corpus that does not fit goes through pipeline.py instead.
"""

import codecs
import json
import os
import shlex
import sys
import zlib
from collections import Counter
from pathlib import Path

from common import dataset_key, join_documents, print_dataset, write_dataset
from configurator import fail
from files import decode_text, file_sha256, sha256
from reading import (
    Damaged,
    InputFile,
    Reject,
    find_files,
    foreign_encoding,
    json_text,
    mend_halves,
    open_binary,
    read_documents,
)
from sources import RANKS, SourceError, gpt2_tokenizer
from tokenizer import MAX_VOCAB, CharTokenizer, load_tokenizer

# -----------------------------------------------------------------------------
# Reading


def read_texts(path, text_key="text"):
    """The text of a file, or of each file under a folder. Of a .jsonl or .parquet, each document is a text.

    A .txt stays as it is and is not cut at <|endoftext|>. A document without text is counted and skipped. Half a
    character, which JSON can spell, becomes U+FFFD with a warning, and its document counts as changed.
    -> (list of str, the manifest's source, its documents). Ends the script where there is no text.
    """
    path = Path(path)
    if not path.exists():
        fail(f"--input={path}: there is no such file or folder")
    if path.is_file():
        refuse_tables(path)
    paths = find_files(path) if path.is_dir() else [path]
    texts = []
    digests = []  # of each file
    size = read = changed = 0
    dropped = Counter(empty=0)
    for file in (InputFile(p.name, p.stat().st_size, p) for p in paths):
        documents, digest, mended = read_file_texts(file, text_key)
        digests.append(digest)
        size += file.size
        read += len(documents)
        changed += mended
        for document in documents:
            if isinstance(document, Reject):
                dropped[str(document)] += 1
            elif not document:
                dropped["empty"] += 1
            else:
                texts.append(document)
    if not texts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        several = path.is_dir() or read > 1
        why = f"of {len(paths)} files, {reasons}" if several else "it is empty"
        fail(f"{path} has no text: {why}")
    source = {"name": os.path.basename(os.path.abspath(path)), "bytes": size, "sha256": digests[0]}
    if path.is_dir():
        source |= {"files": len(paths), "sha256": listing_sha256(path, paths, digests)}
    counts = {"read": read, "kept": len(texts), "changed": changed, "dropped": dict(dropped)}
    return texts, source, counts


def read_file_texts(file, text_key):
    """-> (the texts of one file as a list of str or Reject, the file's SHA-256, how many of them were changed)"""
    if file.ending == ".txt":
        raw = file.path.read_bytes()
        try:
            text = decode_text(raw, str(file.path))
        except ValueError as error:
            fail(error)
        has_mark = raw.startswith(codecs.BOM_UTF8)  # which is no part of the text
        return [text], sha256(raw), int(has_mark)
    digest = file_sha256(file.path)
    texts = list(strict_texts(file, text_key))
    halves = []  # numbers of the documents that hold half a character
    for i, text in enumerate(texts):
        if not isinstance(text, Reject) and not encodable(text):
            texts[i] = mend_halves(text)
            halves.append(i)
    if halves:
        print(f"warning: {file.path}: half a character (a lone surrogate) became U+FFFD "
              f"in {len(halves):,} of {len(texts):,} documents, first in document {halves[0] + 1:,}",
              file=sys.stderr)
    return texts, digest, len(halves)


def print_texts(path, source, documents):
    """Print how many texts read_texts returned, and how large they are."""
    print(f"{path}: {documents['kept']:,} of {documents['read']:,} texts, {source['bytes']:,} bytes")


def listing_sha256(folder, paths, digests):
    """SHA-256 of what sha256sum would print for these files: any file's content, name or presence changes it."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    listing = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    return sha256(listing.encode("utf-8", "surrogateescape"))


def strict_texts(file, text_key):
    """Yields the texts of a packed file, a .jsonl or a .parquet, as str or Reject. Ends the script where it is damaged.

    A large corpus is cleaned instead (cleaning.py): there one bad document of a million stops nothing.
    """
    number = 0
    try:
        if fault := foreign_encoding(file, str(file.path)):
            fail(fault)
        if file.kind == "txt":
            with open_binary(file) as (stream, _):
                yield decode_text(stream.read(), str(file.path))
            return
        for _, document in read_documents(file, text_key, sys.maxsize):
            number += 1
            try:
                if isinstance(document, Reject):
                    raise document
                text = document.decode()
                yield json_text(text, text_key) if file.kind == "jsonl" else text
            except Reject as reject:
                yield reject
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        fail(f"{file.path}, document {number:,}, is not UTF-8: byte 0x{byte:02x} at offset "
             f"{error.start:,} in it")
    except ValueError as error:
        fail(error)
    except (Damaged, EOFError, zlib.error, OSError) as error:
        fail(f"{file.path} is damaged: {error}")


def encodable(text):
    """Whether a str has no half of a character, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_tables(path):
    """End the script where a file is JSON or a table: read as text, a model would learn its syntax."""
    packed = next((end for end in (".gz", ".zst") if path.name.lower().endswith(end)), "")
    kind = Path(path.name[: len(path.name) - len(packed)]).suffix.lower()
    if kind in (".ndjson", ".jsonlines"):
        fail(f"--input={path}: name it .jsonl{packed}, so that it is read as one JSON object "
             "a line")
    if kind not in (".json", ".csv", ".tsv"):
        return

    # The error names a command that makes a .jsonl of the file.
    name = str(path)[: len(str(path)) - len(packed)]
    file = f'open({json.dumps(name, ensure_ascii=False)}, encoding="utf-8-sig", newline="")'
    rows = {
        ".json": f"json.load({file})",
        ".csv": f"csv.DictReader({file})",
        ".tsv": f"csv.DictReader({file}, delimiter=chr(9))",
    }[kind]
    code = f'import csv, json; [print(json.dumps({{"text": row["text"]}})) for row in {rows}]'
    how = f"python -c {shlex.quote(code)} > {shlex.quote(name[: -len(kind)] + '.jsonl')}"
    first = ", once it is unpacked" if packed else ""
    known = "; if each line is a JSON object already, name it .jsonl" if kind == ".json" else ""
    fail(f"--input={path}: of a {kind} file a model would learn the syntax; make a .jsonl of it, "
         f"the text under a key{first}: {how}{known}")


# -----------------------------------------------------------------------------
# Making the dataset


def pick_tokenizer(name, texts=()):
    """The tokenizer that `name` names: gpt2, char (of the characters in `texts`), or the file or folder of one.

    Ends the script where there is none.
    """
    try:
        if name == "gpt2":
            tokenizer, where = gpt2_tokenizer()
            print(f"GPT-2's tokenizer, from {where}")
            return tokenizer
        if name == "char":
            return CharTokenizer.from_text("".join(texts))
        tokenizer = load_tokenizer(name)
        if tokenizer.vocab_size > MAX_VOCAB:
            fail(f"tokenizer={name}: a vocabulary of {tokenizer.vocab_size:,} does not fit into 16-bit tokens "
                 f"({MAX_VOCAB:,})")
        return tokenizer
    except SourceError as error:
        fail(f"GPT-2's ranks cannot be found here ({'; '.join(error.tried)}): put {RANKS} into the "
             "folder or at the address that MINICHAT_MIRROR names, or choose another tokenizer")
    except FileNotFoundError as error:
        fail(f"tokenizer={name} is neither gpt2 nor char: {error}")
    except ValueError as error:
        fail(error)


def write_texts(folder, texts, tokenizer, source, val_fraction=0.1, documents=None):
    """Make `folder` the dataset of `texts`, a list of str, and print what it holds then.

    A single text is split by characters, as nanoGPT splits Shakespeare: the last `val_fraction` is for validation.
    Several texts become documents, each with the tokenizer's end token behind it, and the split is by tokens.
    `source` names the texts in the manifest: a dict with at least "name". `documents` holds the manifest's counts;
    without it all texts count as kept.
    """
    count = len(texts)
    documents = documents or {"read": count, "kept": count, "changed": 0, "dropped": {}}
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - val_fraction))
        train, val = encode_texts([texts[0][:cut], texts[0][cut:]], texts, tokenizer, source)
    else:
        if tokenizer.eos is None:
            fail("this tokenizer has no token for the end of a document, which several files need")
        ids = join_documents(encode_texts(texts, texts, tokenizer, source), tokenizer)
        cut = int(len(ids) * (1 - val_fraction))
        train, val = ids[:cut], ids[cut:]

    preprocessing = {"version": 1, "tokens": tokenizer.kind, "val_fraction": val_fraction}
    splits = {"train": train, "val": val}
    changed = write_dataset(folder, splits, tokenizer, source, preprocessing, documents)
    print(f"{len(train):,} tokens for training, {len(val):,} for validation, "
          f"from a vocabulary of {tokenizer.vocab_size:,}")
    print_dataset(folder, changed)
    command = shlex.join(["python", "train.py", dataset_key(folder)])
    print(f"next: {command} (and the sizes of a model, or a config file)")


def encode_texts(parts, texts, tokenizer, source):
    """Ids of each of `parts`, which are cut from `texts`. Ends the script and names the text that has no ids."""
    try:
        return [tokenizer.encode_array(part) for part in parts]
    except ValueError:
        fail(f"{source['name']}{unknown_in(texts, tokenizer)}")


def unknown_in(texts, tokenizer):
    """Which of `texts`, if there are several, the tokenizer cannot encode, where in it, and why."""
    for i, text in enumerate(texts, 1):
        try:
            tokenizer.encode_array(text)
        except ValueError as error:
            document = f", document {i:,} of {len(texts):,} ({text[:40]!r})"
            return f"{document if len(texts) > 1 else ''}: {error}"
