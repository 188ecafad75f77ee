"""
Datasets: find the shards of a folder, check them, and read their tokens as one stream.

    folder = find_dataset("shakespeare_char")          # a name under data/, or a path
    tokens = Tokens(folder, "train")                   # a split, over all its shards
    tokens.read([0, 5000], 64)                         # uint16 (2, 64): 64 tokens from each of these positions

    folders, manifest, sha256 = open_datasets("a:0.7,b:0.3")   # one dataset, or a mix of several
    tokens = open_tokens(folders, "train", vocab_size)         # -> Tokens, or a Mix

Shards are files in the format of llm.c and modded-nanogpt, or nanoGPT's without a header. A dataset of conversations
(data/chat/prepare.py) has rows of `row_size` tokens and, beside each shard, two files of one bit a token: whether the
token is learned, and whether a conversation begins there.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import re
import shlex
import threading
import weakref
from collections import OrderedDict
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np

from files import file_sha256, sha256
from tokenizer import load_tokenizer

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024  # llm.c's and modded-nanogpt's uint16 shards
BITS = ("learned", "begins")  # endings of the files of one bit a token, and their names in the manifest
MOST_FILES = 64  # shards that are open at once, of all datasets together; macOS allows a process 256 files
# First bytes of files that are not tokens, though a file may have nanoGPT's name for tokens
NOT_TOKENS = {
    b"\x93NUMPY": "a file of numpy.save; write it with ARRAY.astype('<u2').tofile(FILE)",
    b"version https://git-lfs": "a pointer of Git LFS; run git lfs pull",
    np.array(20240801, "<i4").tobytes(): "a shard of llm.c's for Llama 3, whose tokens have 32 bits, not 16",
    b"PAR1": "a Parquet file; run python data/text/prepare.py --input=FILE",
    b"ARROW1\0\0": "an Arrow file; write its text as .jsonl and run python data/text/prepare.py --input=FILE.jsonl",
    b"\x1f\x8b\x08": "compressed with gzip; run gunzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; run unzstd",
    b"PK\x03\x04": "a zip archive; run unzip",
}
# Files in a folder that somebody gives as a dataset before preparing it
SAVED = ("dataset_dict.json", "dataset_info.json", "*.arrow")  # written by save_to_disk of the package datasets
TEXTS = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.txt")


class DataError(ValueError):
    """A dataset that cannot be used. The message names the file, and says what to do."""


# -----------------------------------------------------------------------------
# Folders, mixes, manifests


def find_dataset(dataset):
    """The folder of `dataset`: a path, or a name under data/. Raises DataError if there is no usable one."""
    root = Path(__file__).resolve().parent / "data"
    folders = [folder for folder in (Path(dataset), root / dataset) if folder.is_dir()]
    for folder in folders:
        if (folder / "INCOMPLETE").exists():
            raise DataError(f"{folder} was left half-written: run its prepare.py again")
        if any(folder.glob("*.bin")):
            return folder
    for folder in folders:
        if (folder / "prepare.py").exists():
            raise DataError(f"dataset {dataset!r} is not prepared yet: run python "
                            f"{shlex.quote(str(folder / 'prepare.py'))}")
    for folder in folders:
        refuse_unprepared(folder)
    known = ", ".join(sorted(path.parent.name for path in root.glob("*/prepare.py")))
    raise DataError(f"no dataset {dataset!r}: dataset= takes a folder of .bin shards or one of {known}")


def refuse_unprepared(folder):
    """Raise DataError for a folder of text or of the package datasets, and say how to prepare it."""
    saved = [*SAVED, *(f"*/{pattern}" for pattern in SAVED)]  # a folder for each split, perhaps
    if any(any(folder.glob(pattern)) for pattern in saved):
        split = "" if (folder / "state.json").exists() else "['train']"
        raise DataError(f"{folder} is what save_to_disk of the package datasets wrote, and holds no tokens: write "
                        f"it as Parquet, datasets.load_from_disk({str(folder)!r}){split}.to_parquet('FILE.parquet'),"
                        " and run python data/text/prepare.py --input=FILE.parquet --out_dir=FOLDER")
    if any(any(folder.glob(pattern)) for pattern in TEXTS):
        source = shlex.quote(f"--input={folder}")
        raise DataError(f"{folder} holds text and no tokens: run python data/text/prepare.py {source} "
                        "--out_dir=FOLDER, and give dataset=FOLDER")


def parse_mix(dataset):
    """ "a:0.7,b:0.3" -> [("a", 7/10), ("b", 3/10)], weights as shares of 1. A single dataset has weight 1."""
    parts = [re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", part.strip()) for part in str(dataset).split(",")]
    if not all(parts):
        if any(parts) and len(parts) > 1:
            raise DataError(f"dataset={dataset!r}: a mix gives each dataset a weight, as in a:0.7,b:0.3")
        return [(dataset, Fraction(1))]
    names = [part[1] for part in parts]
    weights = [Fraction(part[2]) for part in parts]
    if min(weights) <= 0 or len(set(names)) < len(names):
        raise DataError(f"dataset={dataset!r}: weights must be above 0, and no dataset may be named twice")
    return [(name, weight / sum(weights)) for name, weight in zip(names, weights, strict=True)]


def open_datasets(dataset):
    """A dataset, or a mix of several. -> ([(folder, weight), ...], the first one's manifest, sha256 naming the data)

    Raises DataError if one cannot be used, or if they were prepared with different tokenizers.
    """
    folders = [(find_dataset(name), weight) for name, weight in parse_mix(dataset)]
    manifests = [read_manifest(folder) for folder, _ in folders]
    first_manifest, first_sha256 = manifests[0]
    first_tokenizer = tokenizer_sha256(folders[0][0], first_manifest)
    for (folder, _), (manifest, _) in zip(folders[1:], manifests[1:], strict=True):
        if tokenizer_sha256(folder, manifest) != first_tokenizer:
            raise DataError(f"{folder} was prepared with another tokenizer than {folders[0][0]}: "
                            "the same ids differ")
    if len(folders) == 1:
        return folders, first_manifest, first_sha256
    names = []
    for (_, digest), (_, weight) in zip(manifests, folders, strict=True):
        names.append(f"{digest}:{weight}")
    return folders, first_manifest, sha256(",".join(names))


def tokenizer_sha256(folder, manifest):
    """The sha256 of a dataset's tokenizer, or of a meta.pkl that is no tokenizer. None without either."""
    if "tokenizer" in manifest:
        return manifest["tokenizer"].get("sha256")
    try:
        return load_tokenizer(folder).sha256
    except FileNotFoundError:
        return None
    except ValueError:
        meta = folder / "meta.pkl"
        return file_sha256(meta) if meta.exists() else None


def read_manifest(folder):
    """-> (manifest.json as a dict, its sha256, which names the dataset); ({}, None) if the folder has no manifest."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return {}, None
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
    except ValueError as e:
        raise DataError(f"{path} is not JSON ({e}): prepare the dataset again") from None
    if not isinstance(manifest, dict):
        raise DataError(f"{path} is not a manifest: prepare the dataset again")
    return manifest, sha256(raw)


def verify_shards(folder):
    """Raise DataError naming the first shard whose sha256 is not that in manifest.json."""
    splits = read_manifest(folder)[0].get("splits")
    if splits is None:
        raise DataError(f"{folder} has no manifest.json to verify it by: leave verify_data off")
    for split in splits.values():
        for shard in split["shards"]:
            for entry in (shard, *(shard[name] for name in BITS if name in shard)):
                path = Path(folder) / entry["file"]
                if file_sha256(path) != entry["sha256"]:
                    raise DataError(f"{path} was changed after it was written: prepare it again")


# -----------------------------------------------------------------------------
# Shards


def find_shards(folder, split):
    """The files of a split, in order: SPLIT_000000.bin, ..., else nanoGPT's SPLIT.bin, else llm.c's and
    modded-nanogpt's NAME_SPLIT_000000.bin, ... or NAME_SPLIT.bin.

    Raises DataError if there is none, or if the folder has shards of several datasets, be it in this split or in
    training and validation.
    """
    named = shards_by_name(folder, split)
    other_split = {}
    if (folder / "manifest.json").exists():  # it says which shards belong to the dataset
        named = {key: paths for key, paths in named.items() if key[0] is None} or named
    elif split in ("train", "val"):
        other_split = shards_by_name(folder, "val" if split == "train" else "train")
    if named.keys() == {(None, True), (None, False)}:
        return named[None, True]
    if not named:
        raise DataError(f"{folder} has no {split} split: neither {split}_000000.bin nor {split}.bin nor "
                        f"NAME_{split}_000000.bin; prepare the dataset first")
    (name, _), paths = next(iter(named.items()))
    foreign = list(named.values())[1:]
    if name not in {key[0] for key in other_split}:
        foreign += other_split.values()
    if foreign:
        raise DataError(f"{folder} has shards of several datasets, {paths[0].name} and {foreign[0][0].name}: give "
                        "each a folder of its own")
    return paths


def shards_by_name(folder, split):
    """{(the name before SPLIT or None, whether a number follows SPLIT): files in order}"""
    pattern = re.compile(rf"(?:(.+)_)?{split}(_[0-9]+)?\.bin")
    named = {}
    for path in sorted(folder.glob("*.bin")):
        if match := pattern.fullmatch(path.name):
            key = (match[1], match[2] is not None)
            named.setdefault(key, []).append(path)
    return named


def read_header(path):
    """The first 256 int32 of a file, which are a shard's header. A shorter file is filled up with zeros."""
    with open(path, "rb") as file:
        return np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")


def count_tokens(path):
    """The number of tokens of a shard with a header. Raises DataError if the header or the file's size is wrong."""
    header = read_header(path)
    if header[0] != MAGIC or header[1] != VERSION:
        raise DataError(
            f"{path} is not a token shard (magic {header[0]}, version {header[1]}, not {MAGIC} and {VERSION}); "
            "prepare the dataset again, or remove the file"
        )
    count = int(header[2])
    size = path.stat().st_size
    if size != HEADER_BYTES + 2 * count:
        raise DataError(
            f"{path} is damaged: {size:,} bytes where its header says {HEADER_BYTES + 2 * count:,}; "
            "prepare the dataset again"
        )
    return count


def count_plain_tokens(path):
    """The number of tokens of nanoGPT's file without a header. Raises DataError if it is damaged, or another kind."""
    start = read_header(path).tobytes()
    for magic, kind in NOT_TOKENS.items():
        if start.startswith(magic):
            raise DataError(f"{path} holds no tokens as nanoGPT writes them: it is {kind}")
    size = path.stat().st_size
    if size % 2:
        raise DataError(f"{path} is damaged: {size:,} bytes are not a whole number of uint16; prepare it again")
    return size // 2


def check_manifest(folder, split, counts):
    """Raise DataError if manifest.json has other shards or other token counts than `counts`, {file: tokens}."""
    splits = read_manifest(folder)[0].get("splits")
    if splits is None:
        return
    promised = {shard["file"]: shard["tokens"] for shard in splits.get(split, {}).get("shards", [])}
    for name in sorted(promised.keys() | counts.keys()):
        if promised.get(name) != counts.get(name):
            raise DataError(
                f"{folder / name} has {counts.get(name, 'no')} tokens, manifest.json says "
                f"{promised.get(name, 'none')}: prepare the dataset again"
            )


class OpenFiles:
    """Files that are open for reading. The least recently used is closed first."""

    def __init__(self, most):
        self.most = most
        self.files = OrderedDict()
        self.lock = threading.RLock()

    def get(self, owner, path):
        """The open file `path` of `owner`, a number. Hold the lock for the call and while reading."""
        file = self.files.pop((owner, path), None)
        if file is None:
            while len(self.files) >= self.most:
                self.close_oldest()
            file = self.open(path)
        self.files[owner, path] = file
        return file

    def open(self, path):
        while True:
            try:
                return open(path, "rb", buffering=0)
            except OSError as e:
                if e.errno != errno.EMFILE or not self.files:
                    raise
                self.most = max(1, len(self.files) - 1)  # the rest of the process needs more files than expected
                self.close_oldest()

    def close_oldest(self):
        _, file = self.files.popitem(last=False)
        file.close()

    def close(self, owner):
        with self.lock:
            for key in [key for key in self.files if key[0] == owner]:
                self.files.pop(key).close()


def most_files():
    """MOST_FILES, or a quarter of the files that this process may open, if that is less."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such module
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft != resource.RLIM_INFINITY:
            return max(1, min(MOST_FILES, soft // 4))
    return MOST_FILES


OPEN = OpenFiles(most_files())  # shared by all Tokens of the process
OWNERS = itertools.count()

# -----------------------------------------------------------------------------
# Tokens


class Tokens:
    """One split as one read-only stream of token ids over its shards. len() is the number of tokens.

    Reads the files that find_shards finds: shards with llm.c's header, and nanoGPT's SPLIT.bin with a header or
    without. Sizes are checked on opening; raises DataError naming the shard. `row_size` is the tokens of a row of
    conversations, 0 for a plain stream. `doc_mask`: whether the documents in a row are told apart (`begins`), in a
    plain stream by the id `bos`, which begins each; None: conversations are.
    """

    row_size = 0
    doc_mask = False

    def __init__(self, folder, split, vocab_size=65536, doc_mask=None, bos=None):
        self.folder = Path(folder)
        self.split = split
        self.vocab_size = vocab_size
        self.bos = bos
        self.owner = next(OWNERS)
        weakref.finalize(self, OPEN.close, self.owner)
        self.paths = find_shards(self.folder, split)
        nanogpt = self.folder / f"{split}.bin"
        if self.paths == [nanogpt] and read_header(nanogpt)[0] != MAGIC:
            self.skip = 0  # bytes before the first token of a file
            counts = [count_plain_tokens(nanogpt)]
        else:
            self.skip = HEADER_BYTES
            counts = [count_tokens(path) for path in self.paths]
        names = [path.name for path in self.paths]
        check_manifest(self.folder, split, dict(zip(names, counts, strict=True)))
        self.starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))  # first token of each shard
        self.row_size = row_size_of(self.folder)
        self.doc_mask = bool(self.row_size) if doc_mask is None else doc_mask
        if self.row_size:
            self.check_rows(counts)

    def check_rows(self, counts):
        """Raise DataError if the tokens are not whole rows, or if a shard's files of bits are not whole."""
        if len(self) % self.row_size:
            raise DataError(f"{self.folder}: the {self.split} split has {len(self):,} tokens, which are not whole rows "
                            f"of {self.row_size}: prepare it again")
        for path, count in zip(self.paths, counts, strict=True):
            for name in BITS:
                bits = path.with_suffix(f".{name}")
                size = bits.stat().st_size if bits.exists() else 0
                if size != -(-count // 8):
                    raise DataError(f"{bits} has {size:,} bytes where {count:,} tokens have {-(-count // 8):,}: "
                                    "prepare the dataset again")

    def __len__(self):
        return int(self.starts[-1])

    def spans(self, starts, length):
        """Where `length` tokens from each of `starts` lie, which may span several shards. Yields (row, place in the
        row, shard, place in the shard, number of tokens)."""
        shards = (np.searchsorted(self.starts, starts, side="right") - 1).tolist()
        for row, (start, shard) in enumerate(zip(np.asarray(starts).tolist(), shards, strict=True)):
            filled = 0
            while filled < length:
                at = start + filled
                count = min(length - filled, int(self.starts[shard + 1]) - at)
                yield row, filled, shard, at - int(self.starts[shard]), count
                filled += count
                shard += 1

    def read(self, starts, length):
        """`length` consecutive tokens from each of `starts`. -> uint16 (len(starts), length)

        It reads the files instead of mapping them: the pages of a mapping would pile up in this process's memory.
        """
        rows = np.empty((len(starts), length), dtype="<u2")
        with OPEN.lock:
            for row, filled, shard, at, count in self.spans(starts, length):
                part = rows[row, filled : filled + count]
                file = OPEN.get(self.owner, self.paths[shard])
                file.seek(self.skip + 2 * at)
                if file.readinto(part.data) != part.nbytes:
                    raise DataError(f"{self.paths[shard]} became shorter: prepare the dataset again")
        if rows.size and int(rows.max()) >= self.vocab_size:
            raise DataError(
                f"{self.folder}: the {self.split} split holds token {int(rows.max())}, but vocab_size is "
                f"{self.vocab_size}: set vocab_size above it, or prepare the dataset with this model's tokenizer"
            )
        return rows

    def read_bits(self, name, starts, length):
        """The bits "learned" or "begins" of the tokens that `read` gives. -> bool (len(starts), length)"""
        rows = np.empty((len(starts), length), dtype=bool)
        with OPEN.lock:
            for row, filled, shard, at, count in self.spans(starts, length):
                path = self.paths[shard].with_suffix(f".{name}")
                file = OPEN.get(self.owner, path)
                file.seek(at // 8)
                raw = file.read(-(-(at + count) // 8) - at // 8)
                bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[at % 8 :]
                if len(bits) < count:
                    raise DataError(f"{path} became shorter: prepare the dataset again")
                rows[row, filled : filled + count] = bits[:count]
        return rows

    def begins(self, starts, tokens):
        """Whether a document begins at each of `tokens` (n, length), read from `starts`. -> bool (n, length), or None
        if documents are not told apart"""
        if not self.doc_mask:
            return None
        if self.row_size:
            return self.read_bits("begins", starts, tokens.shape[1])
        return tokens == self.bos

    @property
    def parts(self):
        """[(itself, 1)], as the `parts` of a Mix."""
        return [(self, Fraction(1))]

    @lru_cache(maxsize=8)  # noqa: B019  the cache keeps Tokens alive, but a run has only one or two
    def sha256_of(self, count):
        """sha256 of the first `count` tokens as little-endian uint16, each piece of conversations followed by a byte a
        token for what is learned. It names the tokens of an evaluation."""
        digest = hashlib.sha256()
        for start in range(0, count, 1 << 20):
            length = min(1 << 20, count - start)
            digest.update(self.read([start], length).astype("<u2").data)
            if self.row_size:
                digest.update(self.read_bits("learned", [start], length).data)
        return digest.hexdigest()


class Mix:
    """A split of several datasets as one stream, one after another. `parts` is [(Tokens, weight), ...]."""

    def __init__(self, parts):
        self.parts = parts
        self.folder = ", ".join(str(tokens.folder) for tokens, _ in parts)
        self.row_size = parts[0][0].row_size
        self.doc_mask = parts[0][0].doc_mask
        for tokens, _ in parts:
            if tokens.row_size != self.row_size:
                raise DataError(f"{tokens.folder} has {describe_rows(tokens)}, {parts[0][0].folder} "
                                f"{describe_rows(parts[0][0])}: the datasets of a mix must have rows of one size")
        lengths = [len(tokens) for tokens, _ in parts]
        self.bases = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))  # first token of each dataset

    def __len__(self):
        return int(self.bases[-1])

    def by_part(self, starts):
        """Yields (Tokens, which of `starts` are its, their places in it)."""
        starts = np.asarray(starts, dtype=np.int64)
        owners = np.searchsorted(self.bases, starts, side="right") - 1  # the dataset of each row
        for i in np.unique(owners):
            own = owners == i
            yield self.parts[i][0], own, starts[own] - self.bases[i]

    def read(self, starts, length):
        """`length` tokens from each of `starts`; a row lies in one dataset. -> uint16 (len(starts), length)"""
        rows = np.empty((len(starts), length), np.uint16)
        for tokens, own, places in self.by_part(starts):
            rows[own] = tokens.read(places, length)
        return rows

    def read_bits(self, name, starts, length):
        """Tokens.read_bits of each row."""
        rows = np.empty((len(starts), length), bool)
        for tokens, own, places in self.by_part(starts):
            rows[own] = tokens.read_bits(name, places, length)
        return rows

    def begins(self, starts, tokens):
        """Tokens.begins of each row."""
        if not self.doc_mask:
            return None
        rows = np.empty(tokens.shape, bool)
        for part, own, places in self.by_part(starts):
            rows[own] = part.begins(places, tokens[own])
        return rows


def describe_rows(tokens):
    return f"rows of {tokens.row_size} tokens" if tokens.row_size else "no rows, but one stream of tokens"


def row_size_of(folder):
    """Tokens in a row of a dataset of conversations; 0 for a plain stream. Raises DataError."""
    rows = read_manifest(folder)[0].get("rows")
    if rows is None:
        return 0
    size = rows.get("block_size") if isinstance(rows, dict) else None
    if not isinstance(size, int) or size < 2:
        raise DataError(f"{Path(folder) / 'manifest.json'} does not say how long a row is: prepare the dataset again")
    return size


def open_tokens(folders, split, vocab_size, doc_mask=None, bos=None):
    """A split of the datasets [(folder, weight), ...] that open_datasets gives. -> Tokens, or a Mix. `doc_mask` and
    `bos` are those of Tokens."""
    parts = [(Tokens(folder, split, vocab_size, doc_mask, bos), weight) for folder, weight in folders]
    return parts[0][0] if len(parts) == 1 else Mix(parts)
