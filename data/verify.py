"""
Check that a dataset is what its manifest says: each shard's size, sha256 and token range, the tokenizer, the documents.

    python data/verify.py data/shakespeare_char data/my_book

Prints one line for each fault; the exit code is 2 where there is one.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # so that it runs from anywhere

import common  # noqa: E402, I001
from configurator import Settings, configure, fail  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

# -----------------------------------------------------------------------------
folders: tuple[str, ...] = ()  # the datasets' folders, or give them as bare words
# -----------------------------------------------------------------------------

HEADER_BYTES = 4 * common.HEADER_INTS
CHUNK = 1 << 24  # tokens read at a time


def main(c):
    if not c.folders:
        fail("which dataset? python data/verify.py DIR ...")
    broken = 0
    for folder in map(Path, c.folders):
        lines = list(dataset_faults(folder))
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        if lines:
            broken += 1
        else:
            print(f"{folder}: as its manifest says (dataset {common.manifest_hash(folder)[:12]})")
    raise SystemExit(2 if broken else 0)


def dataset_faults(folder):
    """Yields a line for each thing in `folder` that is not as manifest.json says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        splits = dict(manifest["splits"])
        tokenizer_sha256 = manifest["tokenizer"]["sha256"]
        shards = {}
        for split in splits:
            entries = splits[split]["shards"]
            shards[split] = [(shard["file"], shard["tokens"], shard["sha256"]) for shard in entries]
        kept = manifest["documents"]["kept"]
    except (FileNotFoundError, NotADirectoryError):
        yield f"{folder} has no manifest.json: it is not a dataset that a prepare.py made"
        return
    except (ValueError, KeyError, TypeError) as error:
        yield f"{folder / 'manifest.json'} is not a manifest ({type(error).__name__}: {error})"
        return
    if (folder / common.INCOMPLETE).exists():
        yield f"{folder} was left half-written: run its prepare.py again"
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if tokenizer.sha256 != tokenizer_sha256:
        path = folder / "tokenizer.json"
        yield f"{path} is another tokenizer than the shards were made with (sha256 differs)"

    ends = 0  # of documents, in all shards
    broken = 0
    names = set()
    for split, files in shards.items():
        total = sum(tokens for _, tokens, _ in files)
        promised = splits[split]["tokens"]
        if total != promised:
            yield f"{folder}: the shards of {split} have {total:,} tokens together, not {promised:,}"
        for name, tokens, digest in files:
            names.add(name)
            fault, shard_ends = shard_fault(folder / name, tokens, digest, tokenizer)
            ends += shard_ends
            if fault:
                broken += 1
                yield fault
    for path in common.other_shards(folder, names):
        yield f"{path} is in no manifest"
    expected = kept if kept > 1 else 0  # a single document has no token at its end
    if not broken and ends != expected:
        yield f"{folder} has {ends:,} ends of documents, the manifest says {kept:,} documents"


def shard_fault(path, tokens, digest, tokenizer):
    """What is wrong with one shard, or None, and how many ends of documents it has. -> (str or None, int)"""
    if not path.is_file():
        return f"{path} is missing", 0
    size = path.stat().st_size
    promised = HEADER_BYTES + 2 * tokens
    if size != promised:
        return f"{path} has {size:,} bytes, not the {promised:,} of {tokens:,} tokens", 0
    sha = hashlib.sha256()
    highest = ends = 0
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        sha.update(header)
        while raw := file.read(2 * CHUNK):
            sha.update(raw)
            ids = np.frombuffer(raw, dtype="<u2")
            highest = max(highest, int(ids.max()))
            if tokenizer.eos is not None:
                ends += int((ids == tokenizer.eos).sum())
    if header != common.shard_header(tokens):
        return f"{path} is not a token shard of {tokens:,} tokens: its header says otherwise", ends
    if sha.hexdigest() != digest:
        return f"{path} was changed after it was written (sha256 differs)", ends
    if highest >= tokenizer.vocab_size:
        return f"{path} holds token {highest}, the vocabulary has {tokenizer.vocab_size:,}", ends
    return None, ends


if __name__ == "__main__":
    c = Settings(configure(globals(), paths="folders"))
    common.run(main, c)
