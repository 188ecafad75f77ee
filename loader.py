"""
Shards -> batches, in an order that is a function of the position.

A split is one stream over its shards. Epoch e cuts it, from an offset drawn from (seed, e), into windows of
block_size that do not overlap, and visits each window once, in a permutation that is computed and never stored.
So any position of a run of any length is found at once, resuming needs no state, and the order belongs to the run,
not to the number of processes that share it. A mix of datasets is one such order: each position belongs to one of them.
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
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from tokenizer import load_tokenizer

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024  # llm.c's and modded-nanogpt's uint16 shards
MOST_FILES = 64  # shards that are open at once, of all datasets together; macOS allows a process 256 files
OTHERS = {  # how files begin that are no tokens, and would be read as tokens under nanoGPT's name
    b"\x93NUMPY": "a file of numpy.save; write it with ARRAY.astype('<u2').tofile(FILE)",
    b"version https://git-lfs": "a pointer of Git LFS; run git lfs pull",
    np.array(20240801, "<i4").tobytes(): "a shard of llm.c's for Llama 3, whose tokens have 32 bits, not 16",
    b"PAR1": "a Parquet file; run python data/text/prepare.py --input=FILE",
    b"ARROW1\0\0": "an Arrow file; write its text as .jsonl and run python data/text/prepare.py --input=FILE.jsonl",
    b"\x1f\x8b\x08": "compressed with gzip; run gunzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; run unzstd",
    b"PK\x03\x04": "a zip archive; run unzip",
}
AT_ONCE = 4096  # positions whose windows are found together, at the cost of a few alone
ROWS_AT_ONCE = 256  # of small batches, several are read at once: less Python runs beside the step, which waits for it


class DataError(ValueError):
    """A dataset that cannot be used; the message names the file and the mend."""


# -----------------------------------------------------------------------------
# Datasets: a folder of shards

# what lies in folders that are given as a dataset before they are one
SAVED = ("dataset_dict.json", "dataset_info.json", "*.arrow")  # what save_to_disk of the package datasets writes
TEXTS = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.txt")


def find_dataset(dataset):
    """The folder of `dataset`: a path, or a name under data/. Raises DataError when there is none to use."""
    root = Path(__file__).resolve().parent / "data"
    folders = [f for f in (Path(dataset), root / dataset) if f.is_dir()]
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
        if any(any(folder.glob(name)) for pattern in SAVED for name in (pattern, f"*/{pattern}")):
            part = "" if (folder / "state.json").exists() else "['train']"
            raise DataError(f"{folder} is what save_to_disk of the package datasets wrote, and holds no tokens: write "
                            f"it as Parquet, datasets.load_from_disk({str(folder)!r}){part}.to_parquet('FILE.parquet'),"
                            " and run python data/text/prepare.py --input=FILE.parquet --out_dir=FOLDER")
        if any(any(folder.glob(pattern)) for pattern in TEXTS):
            source = shlex.quote(f"--input={folder}")
            raise DataError(f"{folder} holds text and no tokens: run python data/text/prepare.py {source} "
                            "--out_dir=FOLDER, and give dataset=FOLDER")
    known = sorted(f.parent.name for f in root.glob("*/prepare.py"))
    raise DataError(f"no dataset {dataset!r}: dataset= takes a folder of .bin shards or one of {', '.join(known)}")


def parse_mix(dataset):
    """ "a:0.7,b:0.3" -> [("a", 7/10), ("b", 3/10)], weights as shares of 1; what names one dataset has weight 1."""
    parts = [re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", part.strip()) for part in str(dataset).split(",")]
    if not all(parts):
        if any(parts) and len(parts) > 1:
            raise DataError(f"dataset={dataset!r}: a mix gives each dataset a weight, as in a:0.7,b:0.3")
        return [(dataset, Fraction(1))]
    weights = [Fraction(part[2]) for part in parts]
    if min(weights) <= 0 or len({part[1] for part in parts}) < len(parts):
        raise DataError(f"dataset={dataset!r}: weights are above 0, and each dataset stands there once")
    return [(part[1], weight / sum(weights)) for part, weight in zip(parts, weights, strict=True)]


def open_datasets(dataset):
    """A dataset or a mix of some. -> ([(folder, weight), ...], the first one's manifest, sha256 that names the data)

    Raises DataError where there is none to use, or where they were made with different tokenizers.
    """
    found = [(find_dataset(name), weight) for name, weight in parse_mix(dataset)]
    manifests = [read_manifest(folder) for folder, _ in found]
    tokenizers = [tokenizer_of(folder, manifest) for (folder, _), (manifest, _) in zip(found, manifests, strict=True)]
    for (folder, _), tokenizer in zip(found, tokenizers, strict=True):
        if tokenizer != tokenizers[0]:
            raise DataError(f"{folder} was prepared with another tokenizer than {found[0][0]}: the same ids differ")
    names = [f"{digest}:{weight}" for (_, digest), (_, weight) in zip(manifests, found, strict=True)]
    return found, manifests[0][0], manifests[0][1] if len(found) == 1 else sha256(",".join(names).encode())


def tokenizer_of(folder, manifest):
    """What names the tokenizer of a dataset: its sha256, that of a meta.pkl which is no tokenizer, or None."""
    if "tokenizer" in manifest:
        return manifest["tokenizer"].get("sha256")
    try:
        return load_tokenizer(folder).sha256
    except FileNotFoundError:
        return None
    except ValueError:
        meta = folder / "meta.pkl"
        return sha256(meta.read_bytes()) if meta.exists() else None


def verify_shards(folder):
    """Raise DataError naming the first shard that is not, to the bit, what manifest.json says."""
    splits = read_manifest(folder)[0].get("splits")
    if splits is None:
        raise DataError(f"{folder} has no manifest.json to verify it by: leave verify_data off")
    for shard in (shard for split in splits.values() for shard in split["shards"]):
        digest = hashlib.sha256()
        with open(Path(folder) / shard["file"], "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        if digest.hexdigest() != shard["sha256"]:
            raise DataError(f"{Path(folder) / shard['file']} was changed after it was written: prepare it again")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def read_manifest(folder):
    """manifest.json as a dict, {} where a folder from elsewhere has none, and its sha256, which names the dataset."""
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


def find_shards(folder, split):
    """The files of a split, in order: SPLIT_000000.bin, ..., else nanoGPT's SPLIT.bin, else llm.c's and
    modded-nanogpt's NAME_SPLIT_000000.bin, ... or NAME_SPLIT.bin. Raises DataError where there is none, or where shards
    of several datasets lie side by side, of this split or of training and validation."""
    named, others = shards_by_name(folder, split), {}
    if (folder / "manifest.json").exists():  # the manifest says which shards are the dataset's
        named = {key: paths for key, paths in named.items() if key[0] is None} or named
    elif split in ("train", "val"):
        others = shards_by_name(folder, "val" if split == "train" else "train")
    if {(None, True), (None, False)} == named.keys():
        return named[None, True]
    if not named:
        raise DataError(f"{folder} has no {split} split: neither {split}_000000.bin nor {split}.bin nor "
                        f"NAME_{split}_000000.bin; prepare the dataset first")
    (name, _), paths = next(iter(named.items()))
    odd = list(named.values())[1:]
    if name not in {key[0] for key in others}:
        odd += others.values()
    if odd:
        raise DataError(f"{folder} has shards of several datasets, {paths[0].name} and {odd[0][0].name}: give each a "
                        "folder of its own")
    return paths


def shards_by_name(folder, split):
    """{(the name before SPLIT or None, whether numbers follow): files in order}"""
    pattern, named = re.compile(rf"(?:(.+)_)?{split}(_[0-9]+)?\.bin"), {}
    for path in sorted(folder.glob("*.bin")):
        if match := pattern.fullmatch(path.name):
            named.setdefault((match[1], bool(match[2])), []).append(path)
    return named


class OpenFiles:
    """Files that are open for reading, the least recently used of them closed first."""

    def __init__(self, most):
        self.most, self.files, self.lock = most, OrderedDict(), threading.RLock()

    def get(self, owner, path):
        """The open file `path` of `owner`, a number. Call it, and read, with the lock held."""
        file = self.files.pop((owner, path), None)
        if file is None:
            while len(self.files) >= self.most:
                self.files.popitem(last=False)[1].close()
            file = self._open(path)
        self.files[owner, path] = file
        return file

    def _open(self, path):
        while True:
            try:
                return open(path, "rb", buffering=0)
            except OSError as e:
                if e.errno != errno.EMFILE or not self.files:
                    raise
                self.most = max(1, len(self.files) - 1)  # the rest of the process needs more files than was thought
                self.files.popitem(last=False)[1].close()

    def close(self, owner):
        with self.lock:
            for key in [key for key in self.files if key[0] == owner]:
                self.files.pop(key).close()


def most_files():
    """MOST_FILES, or a quarter of the files that this process may open where that is less."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such module
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return MOST_FILES if soft == resource.RLIM_INFINITY else max(1, min(MOST_FILES, soft // 4))
    return MOST_FILES


OPEN, OWNERS = OpenFiles(most_files()), itertools.count()


class Tokens:
    """One split as one read-only stream of token ids over its shards. len() is the number of tokens.

    Reads what find_shards finds: shards with llm.c's header, and nanoGPT's SPLIT.bin with a header or without. Sizes
    are checked on opening; raises DataError naming the shard.
    """

    def __init__(self, folder, split, vocab_size=65536):
        self.folder, self.split, self.vocab_size = Path(folder), split, vocab_size
        self.owner = next(OWNERS)
        weakref.finalize(self, OPEN.close, self.owner)
        self.paths = find_shards(self.folder, split)
        plain = [self.folder / f"{split}.bin"]  # nanoGPT's name
        if self.paths != plain or self._header(plain[0])[0] == MAGIC:
            self.skip = HEADER_BYTES
            counts = [self._count(path) for path in self.paths]
        else:
            self.skip = 0
            start = self._header(plain[0]).tobytes()
            for magic, what in OTHERS.items():
                if start.startswith(magic):
                    raise DataError(f"{plain[0]} holds no tokens as nanoGPT writes them: it is {what}")
            size = self.paths[0].stat().st_size
            if size % 2:
                raise DataError(f"{self.paths[0]} is damaged: {size:,} bytes are no whole uint16; prepare it again")
            counts = [size // 2]
        self._check_manifest(counts)
        self.starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))  # first token of each shard

    def __len__(self):
        return int(self.starts[-1])

    @staticmethod
    def _header(path):
        with open(path, "rb") as f:
            return np.frombuffer(f.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")

    def _count(self, path):
        header = self._header(path)
        if header[0] != MAGIC or header[1] != VERSION:
            raise DataError(
                f"{path} is not a token shard (magic {header[0]}, version {header[1]}, not {MAGIC} and {VERSION}); "
                "prepare the dataset again, or remove the file"
            )
        count, size = int(header[2]), path.stat().st_size
        if size != HEADER_BYTES + 2 * count:
            raise DataError(
                f"{path} is damaged: {size:,} bytes where its header says {HEADER_BYTES + 2 * count:,}; "
                "prepare the dataset again"
            )
        return count

    def _check_manifest(self, counts):
        splits = read_manifest(self.folder)[0].get("splits")
        if splits is None:
            return
        promised = {s["file"]: s["tokens"] for s in splits.get(self.split, {}).get("shards", [])}
        found = {path.name: count for path, count in zip(self.paths, counts, strict=True)}
        for name in sorted(promised.keys() | found.keys()):
            if promised.get(name) != found.get(name):
                raise DataError(
                    f"{self.folder / name} has {found.get(name, 'no')} tokens, manifest.json says "
                    f"{promised.get(name, 'none')}: prepare the dataset again"
                )

    def read(self, starts, length):
        """Rows of `length` consecutive tokens from each of `starts`. -> uint16 (len(starts), length).

        Read, not mapped: pages of a mapping would pile up in this process's memory.
        """
        rows = np.empty((len(starts), length), dtype="<u2")
        shards = (np.searchsorted(self.starts, starts, side="right") - 1).tolist()
        with OPEN.lock:
            for row, start, shard in zip(rows, np.asarray(starts).tolist(), shards, strict=True):
                filled = 0
                while filled < length:
                    at, end = start + filled, int(self.starts[shard + 1])
                    part, file = row[filled : filled + end - at], OPEN.get(self.owner, self.paths[shard])
                    file.seek(self.skip + 2 * (at - int(self.starts[shard])))
                    if file.readinto(part.data) != part.nbytes:
                        raise DataError(f"{self.paths[shard]} became shorter: prepare the dataset again")
                    filled, shard = filled + len(part), shard + 1
        if rows.size and int(rows.max()) >= self.vocab_size:
            raise DataError(
                f"{self.folder}: the {self.split} split holds token {int(rows.max())}, but vocab_size is "
                f"{self.vocab_size}: set vocab_size above it, or prepare the dataset with this model's tokenizer"
            )
        return rows

    @property
    def parts(self):
        """[(itself, 1)]: what a Mix has several of."""
        return [(self, Fraction(1))]

    @lru_cache(maxsize=8)  # noqa: B019  a run has one or two, for as long as it lasts
    def sha256_of(self, count):
        """sha256 of the first `count` tokens as uint16, little-endian: names what an evaluation read."""
        digest = hashlib.sha256()
        for start in range(0, count, 1 << 20):
            digest.update(self.read([start], min(1 << 20, count - start)).astype("<u2").data)
        return digest.hexdigest()


class Mix:
    """A split of several datasets as one stream, one behind the other. `parts` is [(Tokens, weight), ...]."""

    def __init__(self, parts):
        self.parts = parts
        self.folder = ", ".join(str(tokens.folder) for tokens, _ in parts)
        self.bases = np.concatenate(([0], np.cumsum([len(tokens) for tokens, _ in parts], dtype=np.int64)))

    def __len__(self):
        return int(self.bases[-1])

    def read(self, starts, length):
        """Rows of `length` tokens from each of `starts`, within one dataset each. -> uint16 (len(starts), length)"""
        starts = np.asarray(starts, dtype=np.int64)
        rows, owner = np.empty((len(starts), length), np.uint16), np.searchsorted(self.bases, starts, side="right") - 1
        for i in np.unique(owner):
            rows[owner == i] = self.parts[i][0].read(starts[owner == i] - self.bases[i], length)
        return rows


def open_tokens(found, split, vocab_size):
    """The split of what open_datasets found. -> Tokens, or a Mix"""
    parts = [(Tokens(folder, split, vocab_size), weight) for folder, weight in found]
    return parts[0][0] if len(parts) == 1 else Mix(parts)


# -----------------------------------------------------------------------------
# The order


def keyed(*parts):
    """A 64-bit integer that depends on all parts, the same on every machine and version."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def permute(index, n, key, rounds=6):
    """Where `index` (any array of ints in [0, n)) goes in the permutation of range(n) named by `key`. -> int64 array.

    A Feistel network permutes a power of four that is at least n; what falls outside range(n) walks on until it is
    inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Constant time and memory at any n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = [np.uint64(keyed(key, r)) for r in range(rounds)]
    x = np.array(index, dtype=np.uint64, ndmin=1)
    todo = np.ones(x.shape, dtype=bool)
    while todo.any():
        left, right = x[todo] >> bits, x[todo] & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        x[todo] = (left << bits) | right
        todo = x >= np.uint64(n)
    return x.astype(np.int64)


class Order:
    """Position in the run -> first token of its window."""

    def __init__(self, n_tokens, block_size, seed):
        if n_tokens <= block_size:
            raise DataError(f"{n_tokens:,} tokens are too few for block_size={block_size}: at least block_size + 1")
        self.block_size, self.seed = block_size, seed
        # as many windows as fit after any offset, so that every epoch has the same number
        self.windows = max(1, (n_tokens - block_size) // block_size)
        self.offsets = min(block_size, n_tokens - self.windows * block_size)

    def starts(self, positions):
        """First tokens of the windows at `positions`, an array of ints >= 0. -> int64 array of that length."""
        epochs, index = np.divmod(np.asarray(positions, dtype=np.int64), self.windows)
        starts = np.empty_like(index)
        for epoch in np.unique(epochs):
            offset = keyed(self.seed, int(epoch), "offset") % self.offsets
            here = epochs == epoch
            starts[here] = offset + self.block_size * permute(
                index[here], self.windows, f"{self.seed}/{int(epoch)}/order"
            )
        return starts


class MixedOrder:
    """Position in the run -> first token of its window in a Mix: each dataset's own Order, taken in turns.

    Of any p positions the i-th dataset has floor(p * weight) or one more: the fractions spread as evenly as they can
    (Beatty's sequences, one dataset against the rest, then the next).
    """

    def __init__(self, mix, block_size, seed):
        self.mix, self.orders = mix, []
        for i, (tokens, _) in enumerate(mix.parts):
            try:
                self.orders.append(Order(len(tokens), block_size, f"{seed}/{i}"))
            except DataError as error:
                raise DataError(f"{tokens.folder}: {error}") from None

    def starts(self, positions):
        """First tokens of the windows at `positions`, an array of ints >= 0. -> int64 array of that length."""
        positions = np.array(positions, dtype=np.int64)  # a copy, which is changed
        starts, todo, rest = np.empty_like(positions), np.arange(len(positions)), Fraction(1)
        for i, ((_, weight), order) in enumerate(zip(self.mix.parts, self.orders, strict=True)):
            share, at = weight / rest, positions[todo]
            before = at * share.numerator // share.denominator  # of the positions before, how many are its own
            mine = (at + 1) * share.numerator // share.denominator > before
            starts[todo[mine]] = self.mix.bases[i] + order.starts(before[mine])
            positions[todo[~mine]] -= before[~mine]
            todo, rest = todo[~mine], rest - weight
        return starts


# -----------------------------------------------------------------------------
# Batches


def data_step(step, skipped=()):
    """The step-th whole number, from 0 on, that is not in `skipped`: whose data a training step takes."""
    for left_out in sorted(skipped):
        if left_out > step:
            break
        step += 1
    return step


def to_batch(rows):
    """uint16 (B, T + 1) -> inputs and targets, int64 tensors (B, T) each."""
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))


class Loader:
    """Training batches in order, at least `prefetch` of them read ahead by background threads.

    Step s takes positions [d G, (d + 1) G) of the order, G = batch_size * accumulation * world and d the data step of
    s, which is s unless some are `skipped`; micro-step m of rank r takes the rows of micro-batch m * world + r.
    Iterating gives (x, y), int64 (batch_size, block_size), micro-step after micro-step from first_step on, for ever;
    with `pin` in page-locked memory, from which a GPU copies while it computes. An error in a thread is raised where
    the batch is asked for.
    """

    def __init__(self, tokens, block_size, batch_size, *, accumulation=1, seed=0, rank=0, world=1, first_step=0,
                 prefetch=4, threads=1, pin=False, skipped=()):
        mixed = isinstance(tokens, Mix)
        self.tokens = tokens
        self.order = MixedOrder(tokens, block_size, seed) if mixed else Order(len(tokens), block_size, seed)
        self.block_size, self.batch_size, self.accumulation = block_size, batch_size, accumulation
        self.rank, self.world, self.pin, self.skipped = rank, world, pin, skipped
        self.block = lru_cache(maxsize=8)(lambda i: self.order.starts(np.arange(i * AT_ONCE, (i + 1) * AT_ONCE)))
        self.numbers = ((step, micro) for step in itertools.count(first_step) for micro in range(accumulation))
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self.group = max(1, ROWS_AT_ONCE // batch_size)  # batches read together
        self.ready = deque()
        self.ahead = deque(self.read_on() for _ in range(-(-max(1, prefetch) // self.group)))

    def positions(self, step, micro):
        micro_batch = data_step(step, self.skipped) * self.accumulation + micro
        first = (micro_batch * self.world + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size)

    def starts(self, positions):
        """What the order says, kept for the neighbours."""
        blocks = [self.block(i) for i in range(positions[0] // AT_ONCE, positions[-1] // AT_ONCE + 1)]
        return np.concatenate(blocks)[positions - positions[0] // AT_ONCE * AT_ONCE]

    def batch(self, step, micro=0):
        """The batch of any micro-step, from nothing but its number."""
        return self.batches([(step, micro)])[0]

    def batches(self, numbers):
        """The batches of some (step, micro-step) in order, read together."""
        starts = self.starts(np.concatenate([self.positions(*number) for number in numbers]))
        x, y = to_batch(self.tokens.read(starts, self.block_size + 1))
        if self.pin:
            x, y = x.pin_memory(), y.pin_memory()
        return list(zip(x.split(self.batch_size), y.split(self.batch_size), strict=True))

    def read_on(self):
        return self.pool.submit(self.batches, list(itertools.islice(self.numbers, self.group)))

    def __iter__(self):
        return self

    def __next__(self):
        if not self.ready:
            self.ready.extend(self.ahead[0].result())  # an error stays in front: whoever asks again is told again
            self.ahead.popleft()
            self.ahead.append(self.read_on())
        return self.ready.popleft()

    def close(self):
        self.pool.shutdown(wait=True, cancel_futures=True)


def fixed_batches(tokens, block_size, batch_size, limit=0):
    """The windows of a split in order from its first token, the tail included, for evaluation.

    Yields (x, y), int64 (B, block_size), at most `limit` of them (0: the whole split), each target of the split once;
    targets past the end of the split are -1. Raises DataError where there is no target at all.
    """
    targets = len(tokens) - 1
    if targets < 1:
        raise DataError(f"{tokens.folder}: the {tokens.split} split has {len(tokens)} tokens, at least 2 are needed")
    starts = np.arange(0, targets, block_size)
    for i in range(0, len(starts), batch_size):
        if limit and i >= limit * batch_size:
            return
        rows = starts[i : i + batch_size]
        whole = rows[rows + block_size <= targets]
        x, y = to_batch(tokens.read(whole, block_size + 1))
        if len(whole) < len(rows):  # the last window of the split
            tail_x, tail_y = to_batch(tokens.read(rows[-1:], len(tokens) - int(rows[-1])))
            pad = (0, block_size - tail_x.size(1))
            x = torch.cat((x, torch.nn.functional.pad(tail_x, pad)))
            y = torch.cat((y, torch.nn.functional.pad(tail_y, pad, value=-1)))
        yield x, y


def context_length(step, block_size, start, until):
    """Tokens of context at `step`: `start`, doubling in equal stages up to block_size, which it is from step `until`
    on. Short at first, where short is quicker and teaches as much (Li et al. 2021, arXiv:2108.06084)."""
    if not start or step >= until:
        return block_size
    doublings = (block_size // start).bit_length() - 1
    return start << int(doublings * step / until)
