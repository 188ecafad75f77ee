"""
What every prepare script shares: how it ends when something goes wrong, and how it writes a dataset folder.

A dataset is a folder with `train_000000.bin`, ..., `val_000000.bin`, ..., `tokenizer.json` and `manifest.json`. It
changes all at once: while its files are put in place the folder holds a file INCOMPLETE, and the loader refuses it.

A dataset of conversations is made of rows of equal length, and beside each shard lie two files with a bit for each of
its tokens (BITS), eight to a byte, the lowest bit first: `train_000000.learned`, `train_000000.begins`.

Each prepare.py puts the project's root and this folder on sys.path before it imports this file.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import numpy as np

from configurator import fail
from files import file_sha256, sync
from tokenizer import MAX_VOCAB

# the uint16 shards of llm.c and modded-nanogpt
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
SHARD_TOKENS = 100_000_000  # tokens per shard, as in llm.c
# a token is learned as a target; a conversation, or the padding of a row, begins at this token
BITS = ("learned", "begins")
INCOMPLETE = "INCOMPLETE"
BESIDE = ".writing"  # suffix of a file that is not finished


# -----------------------------------------------------------------------------
# How a script ends


def run(main, c):
    """Call `main(c)`. A failure that is not the program's fault becomes one line on stderr and an exit code.

    An OSError (no space, ...) gives 2, Ctrl-C 130, SIGTERM 143, SIGHUP 129, each after the writer has cleaned up.
    """
    before = end_on_signals()
    try:
        main(c)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        mend = "; free some and run the same command again" if error.errno == errno.ENOSPC else ""
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}{mend}")
    except MemoryError:
        fail("this machine's memory is full: give a part of the input, or prepare it with "
             "data/openwebtext/prepare.py")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # in a notebook the process lives on


def end_on_signals():
    """Let SIGTERM and SIGHUP end the script as an exception does, except in a thread. -> the earlier handlers"""
    if threading.current_thread() is not threading.main_thread():
        return {}
    signums = {signal.SIGTERM}
    # nohup has a process ignore SIGHUP, which must stay so
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signums.add(signal.SIGHUP)

    def end(signum, frame):
        sys.exit(128 + signum)

    return {signum: signal.signal(signum, end) for signum in signums}


# -----------------------------------------------------------------------------
# The files of a dataset


def join_documents(documents, tokenizer):
    """Concatenate the ids of all documents, each uint16 (n,). -> uint16 (N,)

    A single document stays as it is. Several are marked: each ends with the tokenizer's end token, and begins with its
    beginning token where the tokenizer has one of its own.
    """
    if len(documents) == 1:
        return documents[0]
    begin = np.uint16([tokenizer.bos])
    end = np.uint16([tokenizer.eos])
    parts = []
    for document in documents:
        if tokenizer.bos != tokenizer.eos:  # else the end of a document begins the next
            parts.append(begin)
        parts += [document, end]
    return np.concatenate(parts)


def shard_header(n):
    """The first 1,024 bytes of a shard of n tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, n
    return header.tobytes()


def manifest_hash(folder):
    """SHA-256 of a dataset's manifest.json, which names the dataset in every result. Raises OSError without one."""
    return file_sha256(Path(folder) / "manifest.json")


def other_shards(folder, files):
    """Shards in `folder`, and files of their bits, that are not among `files`: an earlier dataset left them."""
    name = re.compile(rf"(train|val)_\d{{6}}\.(bin|{'|'.join(BITS)})")
    return sorted(path for path in folder.glob("*") if name.fullmatch(path.name) and path.name not in files)


def dataset_key(folder):
    """The key of train.py for this dataset: by name if the folder lies under data/, else by path."""
    place = folder.resolve()
    in_data = place.parent == Path(__file__).resolve().parent
    return f"--dataset={place.name if in_data else folder}"


def print_dataset(folder, changed):
    """Print which dataset the folder holds now."""
    state = "written to" if changed else "already there, unchanged:"
    print(f"{state} {folder} (dataset {manifest_hash(folder)[:12]})")


# -----------------------------------------------------------------------------
# Writing


def write_dataset(folder, splits, tokenizer, source, preprocessing, documents):
    """Make `folder` the dataset of `splits`: {"train": ids, "val": ids}, each uint16 (N,). -> whether it changed"""
    totals = {split: len(ids) for split, ids in splits.items()}
    with DatasetWriter(folder, tokenizer, totals) as writer:
        for split, ids in splits.items():
            writer.add(split, ids)
        return writer.finish(source, preprocessing, documents)


class DatasetWriter:
    """Writes a dataset's folder piece by piece; `finish` puts it in place all at once.

    `totals` says how many tokens each split will get. The files depend only on what is added (no time, no path of this
    machine), so a dataset that is there already is recognised and left alone. With `block_size` it is a dataset of rows
    of so many tokens, and each piece comes with its bits.

    Until `finish` every file has another name, so an earlier dataset stays whole even when the disk is full or the
    process is killed. `finish` syncs the new files, writes INCOMPLETE, renames them, removes shards that an earlier
    dataset left, puts the manifest in place, and removes INCOMPLETE. An exception, also Ctrl-C, leaves no unfinished
    file behind.
    """

    def __init__(self, folder, tokenizer, totals, block_size=0):
        self.folder = Path(folder)
        self.tokenizer = tokenizer
        self.totals = totals
        self.block_size = block_size
        assert not block_size or not any(total % block_size for total in totals.values()), "rows must be whole"
        if tokenizer.vocab_size > MAX_VOCAB:
            fail(f"a vocabulary of {tokenizer.vocab_size:,} does not fit into 16-bit tokens "
                 f"({MAX_VOCAB:,})")
        for split, total in totals.items():
            if total < 2:  # one to predict from, one to predict
                fail(f"the {split} split would have {total} of at least 2 tokens: more text or another "
                     "val_fraction")
        self.shards = {split: [] for split in totals}  # the manifest's entries
        self.open = {}  # split -> (the file of its last shard, its hash, tokens it still takes)
        self.bits = {}  # split -> the BitFiles of that shard, in the order of BITS
        self.names = []  # of all files, in the order in which they are put in place

    def __enter__(self):
        self.new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = only_writer(self.folder)
        self.lock.__enter__()
        remove_unfinished(self.folder)  # of a process that was killed
        return self

    def __exit__(self, kind, error, trace):
        for file, _, _ in self.open.values():
            file.close()
        for bits in itertools.chain(*self.bits.values()):
            bits.file.close()
        with contextlib.suppress(OSError):
            remove_unfinished(self.folder)
            if self.new and kind:
                self.folder.rmdir()
        self.lock.__exit__(kind, error, trace)

    def add(self, split, ids, learned=None, begins=None):
        """Append `ids`, uint16 (n,), to a split, and to a dataset of rows their bits, bool (n,) each."""
        assert ids.dtype == np.uint16
        assert not len(ids) or int(ids.max()) < self.tokenizer.vocab_size
        columns = [learned, begins] if self.block_size else []
        assert all(column.shape == ids.shape and column.dtype == bool for column in columns)
        ids = np.ascontiguousarray(ids, dtype="<u2")
        at = 0
        while at < len(ids):
            if split not in self.open:
                self.open_shard(split)
            count = min(self.open[split][2], len(ids) - at)
            for bits, column in zip(self.bits[split], columns, strict=True):
                bits.add(column[at : at + count])
            self.write(split, ids[at : at + count].data, count)
            at += count

    def open_shard(self, split):
        """Begin the next shard of a split."""
        done = sum(shard["tokens"] for shard in self.shards[split])
        tokens = min(SHARD_TOKENS, self.totals[split] - done)
        assert tokens > 0, f"more tokens than were announced for {split}"
        name = f"{split}_{len(self.shards[split]):06d}.bin"
        self.shards[split].append({"file": name, "tokens": tokens})
        self.open[split] = self.create(name), hashlib.sha256(), tokens
        self.bits[split] = []
        for kind in BITS if self.block_size else ():
            self.bits[split].append(BitFile(self.create(f"{name.removesuffix('bin')}{kind}")))
        self.write(split, shard_header(tokens))

    def write(self, split, data, tokens=0):
        """Append bytes, which hold `tokens` tokens, to the open shard of a split. A full shard is closed."""
        file, digest, left = self.open[split]
        with naming(file.name):
            file.write(data)
            if left == tokens:
                self.close(file)
        digest.update(data)
        self.open[split] = file, digest, left - tokens
        if left == tokens:
            shard = self.shards[split][-1]
            shard["sha256"] = digest.hexdigest()
            for kind, bits in zip(BITS, self.bits.pop(split), strict=False):  # none in a plain dataset
                name = f"{shard['file'].removesuffix('bin')}{kind}"
                shard[kind] = {"file": name, "sha256": bits.finish(self.close)}
            del self.open[split]

    def create(self, name):
        self.names.append(name)
        return open(self.folder / (name + BESIDE), "wb")

    @staticmethod
    def close(file):
        file.flush()
        os.fsync(file.fileno())  # a full disk may show only here
        file.close()

    def finish(self, source, preprocessing, documents):
        """Put everything in place. -> whether anything changed"""
        assert not self.open, "fewer tokens than were announced"
        contents = {
            INCOMPLETE: b"A dataset is being put in place here, or that was interrupted: "
                        b"run its prepare.py again.\n",
            "tokenizer.json": self.tokenizer.to_json(),
            "manifest.json": self.manifest(source, preprocessing, documents),
        }
        if self.is_there(contents):
            return False
        for name, content in contents.items():
            with naming(self.folder / (name + BESIDE)), self.create(name) as file:
                file.write(content)
                self.close(file)

        # Here the earlier dataset ends. The syncs keep a power cut from reordering the steps.
        self.put(INCOMPLETE)
        sync(self.folder)
        for name in self.names:
            if name not in (INCOMPLETE, "manifest.json"):
                self.put(name)
        for path in other_shards(self.folder, self.names):
            os.unlink(path)
        self.put("manifest.json")
        sync(self.folder)
        os.unlink(self.folder / INCOMPLETE)
        sync(self.folder)
        return True

    def manifest(self, source, preprocessing, documents):
        """The bytes of manifest.json."""
        splits = {}
        for split, shards in self.shards.items():
            splits[split] = {"tokens": self.totals[split], "shards": shards}
        fields = {
            "format": 1,
            "source": source,
            "splits": splits,
            "tokenizer": {
                "kind": self.tokenizer.kind,
                "vocab_size": self.tokenizer.vocab_size,
                "sha256": self.tokenizer.sha256,
            },
            "preprocessing": preprocessing,
            "documents": documents,
        }
        if self.block_size:
            rows = {split: total // self.block_size for split, total in self.totals.items()}
            fields["rows"] = {"block_size": self.block_size, **rows}
        return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()

    def put(self, name):
        os.replace(self.folder / (name + BESIDE), self.folder / name)

    def is_there(self, contents):
        """Whether the folder holds this very dataset, complete, and no other shards."""
        try:
            for name in ("manifest.json", "tokenizer.json"):  # the manifest nearly always tells
                if (self.folder / name).read_bytes() != contents[name]:
                    return False
            for shard in itertools.chain(*self.shards.values()):
                for entry in (shard, *(shard[kind] for kind in BITS if kind in shard)):
                    if file_sha256(self.folder / entry["file"]) != entry["sha256"]:
                        return False
        except (FileNotFoundError, NotADirectoryError):
            return False
        return not (self.folder / INCOMPLETE).exists() and not other_shards(self.folder, self.names)


class BitFile:
    """A file of one bit a token, written piece by piece: np.packbits of all of them, the lowest bit first."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()
        self.rest = np.zeros(0, dtype=bool)  # bits that do not fill a byte yet

    def add(self, bits):
        """Append bool (n,)."""
        bits = np.concatenate([self.rest, bits])
        whole = len(bits) // 8 * 8
        self.write(bits[:whole])
        self.rest = bits[whole:]

    def write(self, bits):
        data = np.packbits(bits, bitorder="little").tobytes()
        with naming(self.file.name):
            self.file.write(data)
        self.digest.update(data)

    def finish(self, close):
        """Write the last bits and call `close` on the file. -> the SHA-256 of the file"""
        self.write(self.rest)
        with naming(self.file.name):
            close(self.file)
        return self.digest.hexdigest()


@contextlib.contextmanager
def naming(path):
    """Let an OSError inside name `path`: the ones that come from write() name no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def only_writer(folder):
    """Hold the folder against a second prepare.py, by a lock that ends with the process and leaves no file."""
    if os.name == "nt":  # no such lock there
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing {folder}: wait for it to end")
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def remove_unfinished(folder):
    for path in folder.glob(f"*{BESIDE}"):
        os.unlink(path)
