"""
Check that a dataset is what its manifest says: each shard's size, sha256 and token range, the tokenizer, the documents,
and of a dataset of rows the files of bits beside the shards.

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
from files import file_sha256  # noqa: E402
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
        rows = Rows(manifest) if "rows" in manifest else None
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
    if rows:
        names |= rows.names
        yield from rows.faults(folder, kept)
    for path in common.other_shards(folder, names):
        yield f"{path} is in no manifest"
    expected = kept if kept > 1 else 0  # a single document has no token at its end
    if not broken and not rows and ends != expected:
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


# -----------------------------------------------------------------------------
# Rows


class Rows:
    """What the manifest of a dataset of rows says about them. Raises KeyError or TypeError for another manifest."""

    def __init__(self, manifest):
        self.size = int(manifest["rows"]["block_size"])
        self.splits = {}  # split -> (tokens, rows, tokens that are learned, files of bits)
        self.names = set()
        for split, fields in manifest["splits"].items():
            files = []
            for shard in fields["shards"]:
                files += [(shard["tokens"], kind, shard[kind]["file"], shard[kind]["sha256"]) for kind in common.BITS]
            self.names |= {name for _, _, name, _ in files}
            learned = manifest["documents"]["learned"][split]
            self.splits[split] = fields["tokens"], manifest["rows"][split], learned, files

    def faults(self, folder, kept):
        """Yields a line for each file of bits that is not as promised, or else for what the bits say that cannot be."""
        broken = conversations = 0
        for _, _, _, files in self.splits.values():
            for tokens, _, name, digest in files:
                fault = bits_fault(folder / name, tokens, digest)
                if fault:
                    broken += 1
                    yield fault
        if broken:
            return
        for split, (tokens, count, promised, files) in self.splits.items():
            if tokens != count * self.size or not count:
                yield f"{folder}: {split} has {tokens:,} tokens, which are not {count:,} rows of {self.size:,}"
                return
            total = wrong = 0
            for learned, begins in self.bits(folder, files):
                total += int(learned.sum())
                wrong += int((~learned.any(axis=1) | learned[:, 0] | ~begins[:, 0]).sum())
                # padding has nothing to learn, a conversation has
                starts = np.flatnonzero(begins)
                conversations += int(np.logical_or.reduceat(learned.ravel(), starts).sum()) if len(starts) else 0
            if wrong:
                yield (f"{folder}: {wrong:,} rows of {split} have nothing to learn, or learn their first token, or "
                       "begin within a conversation")
            if total != promised:
                yield f"{folder}: {split} has {total:,} tokens to learn, the manifest says {promised:,}"
        if conversations != kept:
            yield f"{folder} has {conversations:,} conversations, the manifest says {kept:,}"

    def bits(self, folder, files):
        """Yields (learned, begins) of some rows at a time, bool (rows, size) each. A row may lie in several shards."""
        rest = {kind: np.zeros(0, dtype=bool) for kind in common.BITS}
        per_shard = len(common.BITS)
        for i in range(0, len(files), per_shard):
            for start in range(0, files[i][0], CHUNK):
                for tokens, kind, name, _ in files[i : i + per_shard]:
                    raw = np.fromfile(folder / name, dtype=np.uint8, count=CHUNK // 8, offset=start // 8)
                    count = min(CHUNK, tokens - start)
                    bits = np.unpackbits(raw, count=count, bitorder="little").astype(bool)
                    rest[kind] = np.concatenate([rest[kind], bits])
                whole = len(rest["learned"]) // self.size * self.size
                yield [rest[kind][:whole].reshape(-1, self.size) for kind in common.BITS]
                rest = {kind: bits[whole:] for kind, bits in rest.items()}


def bits_fault(path, tokens, digest):
    """What is wrong with a file of bits, or None."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    promised = -(-tokens // 8)
    if size != promised:
        return f"{path} has {size:,} bytes, not the {promised:,} of {tokens:,} bits"
    if file_sha256(path) != digest:
        return f"{path} was changed after it was written (sha256 differs)"
    return None


if __name__ == "__main__":
    c = Settings(configure(globals(), paths="folders"))
    common.run(main, c)
