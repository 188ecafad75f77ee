"""
The first pass over a corpus: clean each document, and compute its hash, its MinHash signature and its tokens.

The results lie in the folder `scan` beside the shards, a file for each chunk, which is complete or not there. So a scan
that was killed resumes where it was, and several processes may share one.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import zipfile
from collections import Counter

import numpy as np

import cleaning
import dedup
from common import naming
from configurator import fail
from files import whole_file
from reading import Reject, read_chunks
from tokenizer import load_tokenizer

CHUNK = 1 << 23  # bytes of documents in one piece of work
CHANGES = ("utf8", "mojibake", "controls", "nfc")


def scan(work, files, c, share, shares, workers):
    """Scan the chunks of this share that are not there yet: whole files, or every `shares`-th chunk of few files.

    `work` is the folder for the results, `c` the settings of a prepare.py.
    """
    split_by_file = len(files) >= shares
    progress = Progress("scan", sum(file.size for file in files if file.size))
    limit = 6 * c.max_chars + (1 << 16)  # bytes of a line: JSON may spell a character in six
    with scanners(work, c, workers, progress.add) as submit:
        for number, file in enumerate(files):
            if split_by_file and number % shares != share:
                continue

            def wanted(chunk, number=number):
                in_share = split_by_file or (number + chunk) % shares == share
                return in_share and not chunk_path(work, number, chunk).exists()

            listing = work / f"{number:06d}.json"
            if listing.exists():
                count = json.loads(listing.read_bytes())["chunks"]
                if not any(map(wanted, range(count))):
                    continue
            for chunk, documents in read_chunks(file, wanted, CHUNK, c.text_key, limit):
                submit(number, chunk, documents, file.kind)
                progress.reach(sum(f.size for f in files[:number]) + file.done)
            if file.fault:
                warning = f"{file.name}: {file.fault}; what comes before is used"
                print(f"\nwarning: {warning}", file=sys.stderr)
            with write_result(listing) as out:
                out.write(json.dumps({"chunks": file.chunks, "fault": file.fault}).encode())
    progress.end()


# -----------------------------------------------------------------------------
# Processes


@contextlib.contextmanager
def scanners(work, c, workers, done):
    """Yields submit(number, chunk, documents, kind); `done` is called with what the scan of each chunk returns.

    At most twice as many chunks as workers are held at once. One worker is this process itself.
    """
    if workers == 1:
        limit_threads()
        tokenizer = load_tokenizer(work)
        yield lambda *chunk: done(scan_chunk(tokenizer, work, c, *chunk))
        return
    running = collections.deque()
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_worker)

    def submit(*chunk):
        if len(running) >= 2 * workers:
            done(running.popleft().result())
        running.append(pool.submit(scan_in_worker, work, c, *chunk))

    try:
        yield submit
        while running:
            done(running.popleft().result())
    except concurrent.futures.process.BrokenProcessPool:
        fail("a worker was killed, most often for memory: run the same command again with fewer "
             "--workers; nothing that was done is lost")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def limit_threads():
    """Keep rensa to one thread: there is a process for each core."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")


def start_worker():
    """Set up a process of the pool."""
    limit_threads()
    # Ctrl-C reaches all processes: the first one ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """End this process when its parent ends: a parent that is killed cannot tell its workers."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def scan_in_worker(work, c, *chunk):
    return scan_chunk(tokenizer_of_worker(work), work, c, *chunk)


@functools.cache
def tokenizer_of_worker(work):
    """The tokenizer of the corpus, loaded once in each process of the pool."""
    return load_tokenizer(work)


# -----------------------------------------------------------------------------
# A chunk


def scan_chunk(tokenizer, work, c, number, chunk, documents, kind):
    """Clean, hash and encode the documents of a chunk, and write the results. -> (documents, bytes) read"""
    stats = Counter()
    digests = []  # of every document, as it was read
    hashes, sizes, tokens, shingles = [], [], [], []  # of the documents that stay
    size = 0
    end = np.array([tokenizer.eos], dtype=np.uint16)
    for document in documents:
        if isinstance(document, bytes):
            raw = document
        else:
            raw = str(document).encode("utf-8", "surrogatepass")
        digests.append(hashlib.blake2b(raw, digest_size=16).digest())
        size += len(raw)
        changes = sum(stats[step] for step in CHANGES)
        try:
            if isinstance(document, Reject):
                raise document
            text = cleaning.clean(document, kind, c.text_key, c.min_chars, c.max_chars, stats)
            ids = encode(tokenizer, text)
        except Reject as reject:
            stats[f"dropped {reject}"] += 1
            continue
        encoded = text.encode()
        stats["changed"] += sum(stats[step] for step in CHANGES) > changes
        hashes.append(hashlib.blake2b(encoded, digest_size=16).digest())
        sizes.append((len(ids) + 1, len(encoded)))
        tokens += [ids, end]
        if c.dedup == "near":
            shingles.append(dedup.shingles(text))
    arrays = {
        "stats": np.frombuffer(json.dumps(stats).encode(), dtype=np.uint8),
        "read": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16),
        "hashes": np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2),
        # of each document: tokens, bytes of text
        "sizes": np.array(sizes, dtype=np.int64).reshape(-1, 2),
        "tokens": np.concatenate([*tokens, end[:0]]),
    }
    if c.dedup == "near":
        arrays["signatures"] = dedup.signatures(shingles, c.permutations)
    with write_result(chunk_path(work, number, chunk)) as file:
        np.savez(file, **arrays)
    return len(documents), size


def encode(tokenizer, text):
    try:
        return tokenizer.encode_array(text)
    except ValueError:  # a tokenizer of characters that does not know one
        raise Reject("not_in_vocabulary") from None


class Progress:
    """How far a pass is, how fast, and how long it will take: one line, rewritten on a terminal, else every 30 s."""

    def __init__(self, name, total):
        self.name = name
        self.total = total  # bytes on disk; 0: not known
        self.at = 0  # bytes on disk that have been read
        self.first = None  # bytes on disk that an earlier run had done
        self.documents = self.bytes = 0  # done by this run
        self.started = self.shown = time.monotonic()

    def reach(self, at):
        if self.first is None:
            self.first = at
        self.at = at

    def add(self, counts):
        documents, size = counts
        self.documents += documents
        self.bytes += size
        now = time.monotonic()
        if now - self.shown >= (0.5 if sys.stdout.isatty() else 30):
            self.shown = now
            print(self.line(now), end="\r" if sys.stdout.isatty() else "\n", flush=True)

    def line(self, now):
        elapsed = max(now - self.started, 1e-9)
        size = self.bytes / 1e6
        line = f"{self.name}: {self.documents:,} documents, {size:,.0f} MB"
        line += f", {size / elapsed:.1f} MB/s"
        moved = self.at - (self.first or 0)
        if self.total and moved > 0:
            left = int((self.total - self.at) * elapsed / moved)
            hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
            line += f", {self.at / self.total:.0%}, {hours}:{minutes:02d}:{seconds:02d} left"
        return f"{line:78}"

    def end(self):
        self.total = 0
        print(self.line(time.monotonic()).rstrip(), flush=True)


# -----------------------------------------------------------------------------
# The files of a scan


def chunk_path(work, number, chunk):
    return work / f"{number:06d}_{chunk:06d}.npz"


@contextlib.contextmanager
def write_result(path):
    """Open a file of the scan for writing: it is there complete and synced, or not at all. An OSError names it."""
    with naming(path), whole_file(path, durable=True) as file:
        yield file


def all_chunks(work, files):
    """Paths of every chunk, in the order of the corpus. Ends the script where one has not been scanned."""
    paths = []
    for number, file in enumerate(files):
        listing = work / f"{number:06d}.json"
        count = json.loads(listing.read_bytes())["chunks"] if listing.exists() else 0
        chunks = [chunk_path(work, number, chunk) for chunk in range(count)]
        if not chunks or not all(path.exists() for path in chunks):
            fail(f"{file.name} is not wholly scanned: run the parts that did not finish again, "
                 "then --merge")
        paths += chunks
    return paths


def load_chunk(path, *names):
    """Arrays of a chunk. Ends the script where its file is damaged."""
    try:
        with np.load(path) as chunk:
            return [chunk[name] for name in names]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        path.unlink(missing_ok=True)
        fail(f"{path} was damaged ({error}) and is removed: run the same command again, "
             "which scans it again")


def chunk_arrays(chunks, *names):
    """Yields (number of the first document, array, ...) of each chunk."""
    start = 0
    for path in chunks:
        arrays = load_chunk(path, *names)
        yield start, *arrays
        start += len(arrays[0])


def statistics(chunks, work, files):
    """-> (the manifest's documents without the duplicates, SHA-256 of the digests of all documents read)"""
    stats = Counter()
    read = 0
    digest = hashlib.sha256()
    for path in chunks:
        chunk_stats, digests = load_chunk(path, "stats", "read")
        stats.update(json.loads(chunk_stats.tobytes()))
        read += len(digests)
        digest.update(digests.tobytes())
    dropped = {}
    for key in sorted(stats):
        if key.startswith("dropped "):
            dropped[key.removeprefix("dropped ")] = stats[key]
    damaged = {}
    for number, file in enumerate(files):
        fault = json.loads((work / f"{number:06d}.json").read_bytes())["fault"]
        if fault:
            damaged[file.name] = fault
    documents = {
        "read": read,
        "changed": stats["changed"],
        "changes": {step: stats[step] for step in CHANGES},
        "dropped": dropped,
        "damaged_files": damaged,
    }
    return documents, digest.hexdigest()
