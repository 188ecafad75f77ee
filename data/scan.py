"""
The first pass over a corpus: clean each document, and take its hash, its MinHash signature and its tokens.

What is found lies in the folder `scan` beside the shards, a file for each chunk, complete or not there. So a scan goes
on wherever it was killed, and several processes may share one.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np

import cleaning
import dedup
from common import BESIDE, naming
from configurator import fail
from reading import Reject, read_chunks
from tokenizer import load_tokenizer

CHUNK = 1 << 23  # bytes of documents in one piece of work
CHANGES = ("utf8", "mojibake", "controls", "nfc")


def scan(work, files, settings, share, shares, workers):
    """Scan this part's chunks that are not yet: whole files, or every `shares`-th chunk where files are fewer."""
    whole_files = len(files) >= shares
    progress = Progress("scan", sum(file.size for file in files if file.size))
    with scanners(work, settings, workers, progress.add) as submit:
        for number, file in enumerate(files):
            if whole_files and number % shares != share:
                continue

            def wanted(chunk, number=number):
                mine = whole_files or (number + chunk) % shares == share
                return mine and not chunk_path(work, number, chunk).exists()

            listing = work / f"{number:06d}.json"
            if listing.exists() and not any(map(wanted, range(json.loads(listing.read_bytes())["chunks"]))):
                continue
            limit = 6 * settings["max_chars"] + (1 << 16)  # bytes of a line: JSON may spell a character in six
            for chunk, documents in read_chunks(file, wanted, CHUNK, settings["text_key"], limit):
                submit(number, chunk, documents, file.kind)
                progress.reach(sum(f.size for f in files[:number]) + file.done)
            if file.fault:
                print(f"\nwarning: {file.name}: {file.fault}; what comes before is used", file=sys.stderr)
            text = json.dumps({"chunks": file.chunks, "fault": file.fault})
            replace(listing, lambda out, text=text: out.write(text.encode()))
    progress.end()


@contextlib.contextmanager
def scanners(work, settings, workers, done):
    """Yields submit(number, chunk, documents, kind); `done` is called with what each chunk's scan returns.

    Twice as many chunks as workers are held at once. One worker is this process itself.
    """
    if workers == 1:
        start_worker(work, settings)
        yield lambda *args: done(scan_chunk(*args))
        return
    running = collections.deque()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), start_worker, (work, settings, os.getpid())
    )

    def submit(*args):
        if len(running) >= 2 * workers:
            done(running.popleft().result())
        running.append(pool.submit(scan_chunk, *args))

    try:
        yield submit
        while running:
            done(running.popleft().result())
    except concurrent.futures.process.BrokenProcessPool:
        fail("a worker was killed, most often for memory: run the same command again with fewer --workers; "
             "nothing that was done is lost")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker(work, settings, parent=None):
    global worker
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # rensa's: there is a process for each core
    worker = Path(work), settings, load_tokenizer(work)
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A process that is killed cannot tell its workers."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def scan_chunk(number, chunk, documents, kind):
    """Clean, hash and encode the documents of a chunk, and keep what was found. -> (documents, bytes) read"""
    work, settings, tokenizer = worker
    stats, digests, hashes, sizes, tokens, sets = collections.Counter(), [], [], [], [], []
    size, end = 0, np.array([tokenizer.eos], dtype=np.uint16)
    for document in documents:
        raw = document if isinstance(document, bytes) else str(document).encode("utf-8", "surrogatepass")
        digests.append(hashlib.blake2b(raw, digest_size=16).digest())
        size += len(raw)
        before = sum(stats[step] for step in CHANGES)
        try:
            if isinstance(document, Reject):
                raise document
            text = cleaning.clean(document, kind, settings["text_key"], settings["min_chars"], settings["max_chars"],
                                  stats)
            ids = encode(tokenizer, text)
        except Reject as reject:
            stats[f"dropped {reject}"] += 1
            continue
        encoded = text.encode()
        stats["changed"] += sum(stats[step] for step in CHANGES) > before
        hashes.append(hashlib.blake2b(encoded, digest_size=16).digest())
        sizes.append((len(ids) + 1, len(encoded)))
        tokens += [ids, end]
        if settings["dedup"] == "near":
            sets.append(dedup.shingles(text))
    arrays = {
        "stats": np.frombuffer(json.dumps(stats).encode(), dtype=np.uint8),
        "read": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16),
        "hashes": np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2),
        "sizes": np.array(sizes, dtype=np.int64).reshape(-1, 2),  # of each document: tokens, bytes of text
        "tokens": np.concatenate([*tokens, end[:0]]),
    }
    if settings["dedup"] == "near":
        arrays["signatures"] = dedup.signatures(sets, settings["permutations"])
    replace(chunk_path(work, number, chunk), lambda file: np.savez(file, **arrays))
    return len(documents), size


def encode(tokenizer, text):
    try:
        return tokenizer.encode_array(text)
    except ValueError:  # a tokenizer of characters that does not know one
        raise Reject("not_in_vocabulary") from None


class Progress:
    """How far a pass is, how fast and how long still: a line that is renewed on a terminal, one in 30 s elsewhere."""

    def __init__(self, name, total):
        self.name, self.total, self.at, self.first = name, total, 0, None
        self.documents = self.bytes = 0
        self.started = self.shown = time.monotonic()

    def reach(self, at):
        self.first = at if self.first is None else self.first  # what an earlier run had done
        self.at = at

    def add(self, found):
        self.documents, self.bytes = self.documents + found[0], self.bytes + found[1]
        now = time.monotonic()
        if now - self.shown >= (0.5 if sys.stdout.isatty() else 30):
            self.shown = now
            print(self.line(now), end="\r" if sys.stdout.isatty() else "\n", flush=True)

    def line(self, now):
        took = max(now - self.started, 1e-9)
        size = self.bytes / 1e6
        line = f"{self.name}: {self.documents:,} documents, {size:,.0f} MB, {size / took:.1f} MB/s"
        moved = self.at - (self.first or 0)
        if self.total and moved > 0:
            left = int((self.total - self.at) * took / moved)
            line += f", {self.at / self.total:.0%}, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        return f"{line:78}"

    def end(self):
        self.total = 0
        print(self.line(time.monotonic()).rstrip(), flush=True)


# -----------------------------------------------------------------------------
# Its files


def chunk_path(work, number, chunk):
    return work / f"{number:06d}_{chunk:06d}.npz"


def replace(path, write):
    """Make the file `path` by write(file): complete, synced, or not there. The name beside is this process's own."""
    beside = path.with_name(f"{path.name}.{os.getpid()}{BESIDE}")
    try:
        with naming(path), open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def all_chunks(work, files):
    """Paths of every chunk, in the order of the corpus. Ends the script where one has not been scanned."""
    paths = []
    for number, file in enumerate(files):
        listing = work / f"{number:06d}.json"
        count = json.loads(listing.read_bytes())["chunks"] if listing.exists() else 0
        here = [chunk_path(work, number, chunk) for chunk in range(count)]
        if not here or not all(path.exists() for path in here):
            fail(f"{file.name} is not wholly scanned: run the parts that did not finish again, then --merge")
        paths += here
    return paths


def load(path, *names):
    """Arrays of a chunk."""
    try:
        with np.load(path) as chunk:
            return [chunk[name] for name in names]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        path.unlink(missing_ok=True)
        fail(f"{path} was damaged ({error}) and is removed: run the same command again, which scans it anew")


def statistics(chunks, work, files):
    """-> (the manifest's documents without the fate of duplicates, sha256 of the digests of all documents read)"""
    stats, read, digest = collections.Counter(), 0, hashlib.sha256()
    for path in chunks:
        found, digests = load(path, "stats", "read")
        stats.update(json.loads(found.tobytes()))
        read += len(digests)
        digest.update(digests.tobytes())
    faults = {file.name: json.loads((work / f"{i:06d}.json").read_bytes())["fault"] for i, file in enumerate(files)}
    dropped = {key.partition(" ")[2]: stats[key] for key in sorted(stats) if key.startswith("dropped ")}
    documents = {"read": read, "changed": stats["changed"], "changes": {step: stats[step] for step in CHANGES}}
    documents |= {"dropped": dropped, "damaged_files": {name: why for name, why in faults.items() if why}}
    return documents, digest.hexdigest()


def each(chunks, *names):
    """Yields (number of the first document, array, ...) of each chunk."""
    start = 0
    for path in chunks:
        arrays = load(path, *names)
        yield start, *arrays
        start += len(arrays[0])
