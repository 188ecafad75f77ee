"""
What the prepare scripts share: finding a source file, GPT-2's tokenizer, writing a dataset folder.

A dataset is a folder with `train_000000.bin`, ..., `val_000000.bin`, ..., `tokenizer.json` and `manifest.json`. It is
written as one act: while the files of one are being put in place the folder holds a file INCOMPLETE, and the loader
refuses it. What the user can mend ends the script with one line on stderr and exit code 2.

Each prepare.py puts the project's root and this folder on sys.path before it imports this file.
"""

import contextlib
import errno
import hashlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from configurator import fail
from tokenizer import BPETokenizer

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256  # llm.c's and modded-nanogpt's uint16 shards
SHARD_TOKENS = 100_000_000  # tokens per shard, as in llm.c
INCOMPLETE = "INCOMPLETE"
BESIDE = ".writing"  # suffix of a file that is not finished


def run(main):
    """Call `main()`; what goes wrong outside of the program becomes one line on stderr and an exit code.

    An OSError (no space, ...) is 2, Ctrl-C 130, SIGTERM 143, SIGHUP 129: each after the writer has cleaned up.
    """
    before = end_on_signals()
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        mend = "; free some and run the same command again" if error.errno == errno.ENOSPC else ""
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}{mend}")
    except MemoryError:
        fail("this machine's memory is full: give a part of the input, or prepare it with data/openwebtext/prepare.py")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # in a notebook the process lives on


def end_on_signals():
    """Have SIGTERM and SIGHUP end the script as an exception does, except in a thread. -> the handlers of before"""
    if threading.current_thread() is not threading.main_thread():
        return {}
    signums = {signal.SIGTERM}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        signums.add(signal.SIGHUP)
    return {signum: signal.signal(signum, lambda got, frame: sys.exit(128 + got)) for signum in signums}


# -----------------------------------------------------------------------------
# Finding a source: MINICHAT_MIRROR, the cache, the network. Nothing is used whose sha256 is not the pinned one.


class SourceError(Exception):
    """No place has the file. `tried` holds one line for each."""

    def __init__(self, tried):
        super().__init__("\n".join(tried))
        self.tried = tried


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def cache_folder():
    """Where downloads are kept: $XDG_CACHE_HOME/minichat, ~/.cache/minichat, on Windows LOCALAPPDATA."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    places = [base, os.path.expanduser("~/.cache"), tempfile.gettempdir()]  # ~ stays as it is for a user without a home
    return Path(next(filter(os.path.isabs, places))) / "minichat"


def find_source(name, digest, download, address):
    """The file `name` whose sha256 is `digest`, and in words where it was found. -> (bytes, str)

    Looked for in MINICHAT_MIRROR (a folder or a base URL), the cache, and last by `download()`, which returns bytes or
    raises OSError; `address` says in words where that looks. A download is kept in the cache. Raises SourceError when
    no place has it. A file of another content in the mirror is the end: whoever set it up means it to be used.
    """
    tried = []
    if mirror := os.environ.get("MINICHAT_MIRROR"):
        is_url = re.match(r"[a-z][a-z0-9+.-]+://", mirror)
        place = f"{mirror.rstrip('/')}/{name}" if is_url else str(Path(mirror) / name)
        try:
            data = download_url(place) if is_url else Path(place).read_bytes()
        except OSError as error:
            tried.append(f"MINICHAT_MIRROR: {place}: {reason(error)}")
        else:
            if sha256(data) != digest:
                fail(f"{place} (MINICHAT_MIRROR) has sha256 {sha256(data)}, not {digest}: replace or remove it")
            return data, place

    cached = cache_folder() / name
    try:
        data = cached.read_bytes()
    except OSError as error:
        tried.append(f"the cache: {cached}: {reason(error)}")
    else:
        if sha256(data) == digest:
            return data, str(cached)
        tried.append(f"the cache: {cached}: damaged (another sha256); a new download replaces it")

    print(f"Fetching {name} from {address} ...", flush=True)
    try:
        data = download()
    except OSError as error:
        raise SourceError([*tried, f"{address}: {reason(error)}"]) from None
    if sha256(data) != digest:  # a login page of the network, as often as not
        raise SourceError([*tried, f"{address}: another file, of {len(data):,} bytes and sha256 {sha256(data)}"])
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:  # a name of its own: ranks may download at once
            Path(folder, name).write_bytes(data)
            os.replace(Path(folder, name), cached)
    except OSError as error:
        print(f"(not kept in the cache: {cached}: {reason(error)})")
    return data, address


def reason(error):
    """An error in a few words, without its number and path."""
    cause = getattr(error, "reason", error)  # where urllib keeps it
    return str(getattr(cause, "strerror", None) or cause)


def download_url(url, timeout=10, retries=1):
    """The bytes at `url`. Raises OSError (urllib's errors are such) after `retries` more attempts."""
    request = urllib.request.Request(url, headers={"User-Agent": "minichat"})
    for attempt in range(retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:  # an answer: asking again changes nothing
            raise OSError(f"HTTP {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:  # the latter: cut off, or not a URL
            if attempt == retries:
                raise OSError(reason(error)) from None


# A source package's metadata comes from its build backend: `pip download` would run the package's setup.py to learn its
# dependencies, of which we want none. This module, found on PYTHONPATH in setuptools' place, answers instead.
BACKEND = """\
import pathlib, sys
__legacy__ = sys.modules[__name__]  # the attribute that pip asks for where a package has no pyproject.toml
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "{name}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name
"""


def download_package(name, version, digest):
    """The source archive of a Python package, as bytes, through pip, so with its index, proxy and certificates.

    None of the package's code runs: pip compares `digest` before it opens the archive (--require-hashes), and asks
    BACKEND for the metadata. Works with pip 19.3 to 26.3. Raises OSError with pip's reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        backend = BACKEND.format(name=name.replace("-", "_"), version=version)  # as a dist-info folder spells a name
        (folder / "setuptools").mkdir()
        (folder / "setuptools" / "__init__.py").touch()
        (folder / "setuptools" / "build_meta.py").write_text(backend)
        (folder / "requirements.txt").write_text(f"{name}=={version} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", f"--no-binary={name}", "--no-build-isolation", "--use-pep517", "--retries=1"]
        command += ["--require-hashes", f"--requirement={folder / 'requirements.txt'}", f"--dest={folder / 'got'}"]
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
        archives = sorted((folder / "got").glob("*"))
        if done.returncode != 0 or not archives:
            lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines() or ["no reason given"]
            errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
            raise OSError(f"pip: {(errors or lines)[-1]}")
        return archives[0].read_bytes()


# -----------------------------------------------------------------------------
# GPT-2's tokenizer

RANKS = "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"  # where tiktoken takes them from
RANKS_PACKAGE = ("openai-whisper", "20250625", "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96")


def gpt2_tokenizer():
    """GPT-2's byte-level BPE, its ranks looked for as find_source does. -> (BPETokenizer, where they were found)"""
    address = f"{RANKS_URL} or the package {RANKS_PACKAGE[0]}"
    ranks, where = find_source(RANKS, RANKS_SHA256, download_ranks, address)
    return BPETokenizer.from_ranks(ranks), where


def download_ranks():
    """The file from its own address, or else out of a package that has it. -> bytes; raises OSError."""
    try:
        data = download_url(RANKS_URL)
        if sha256(data) == RANKS_SHA256:
            return data
        why = "another file"
    except OSError as error:
        why = reason(error)
    package, version, _ = RANKS_PACKAGE
    print(f"{RANKS_URL}: {why}; trying the source package {package} {version} ...", flush=True)
    with tarfile.open(fileobj=io.BytesIO(download_package(*RANKS_PACKAGE)), mode="r:gz") as tar:
        return next(tar.extractfile(m).read() for m in tar if m.name.endswith(f"/whisper/assets/{RANKS}"))


# -----------------------------------------------------------------------------
# Writing


def join_documents(pieces, tokenizer):
    """The ids of each document, put together. A single document stays as it is; of several, each stands between the
    tokenizer's beginning and end, or has just the end behind it where they are the same. -> uint16 (N,)"""
    if len(pieces) == 1:
        return pieces[0]
    begin = np.uint16([tokenizer.bos] if tokenizer.bos != tokenizer.eos else [])
    end = np.uint16([tokenizer.eos])
    return np.concatenate([part for piece in pieces for part in (begin, piece, end)])


def shard_header(n):
    """The first 1,024 bytes of a shard of n tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, n
    return header.tobytes()


def manifest_hash(folder):
    """sha256 of a dataset's manifest.json, its name in every result. Raises OSError where there is none."""
    return sha256((Path(folder) / "manifest.json").read_bytes())


def write_dataset(folder, splits, tokenizer, source, preprocessing, documents):
    """Make `folder` the dataset of `splits`: {"train": ids, "val": ids}, each uint16 (N,). -> whether it changed"""
    with DatasetWriter(folder, tokenizer, {split: len(ids) for split, ids in splits.items()}) as writer:
        for split, ids in splits.items():
            writer.add(split, ids)
        return writer.finish(source, preprocessing, documents)


class DatasetWriter:
    """A dataset's folder, written piece by piece, and put in place as one act by `finish`.

    `totals` says how many tokens each split will get. The files depend on what is added alone (no time, no path of this
    machine), so a dataset that is there already is recognised and left as it is. Until `finish`, all of it is written
    beside: an earlier dataset stays whole, also when the disk is full or the process is killed. Then everything is
    synced, INCOMPLETE appears, the files are renamed, what is left of the earlier dataset goes, the manifest follows,
    and INCOMPLETE is removed. Left by an exception, also Ctrl-C, nothing unfinished stays behind.
    """

    def __init__(self, folder, tokenizer, totals):
        self.folder, self.tokenizer, self.totals = Path(folder), tokenizer, totals
        if tokenizer.vocab_size > 65_536:
            fail(f"a vocabulary of {tokenizer.vocab_size:,} does not fit into 16-bit tokens (65,536)")
        for split, total in totals.items():
            if total < 2:  # one to predict from, one to predict
                fail(f"the {split} split would have {total} of at least 2 tokens: more text or another val_fraction")
        self.shards = {split: [] for split in totals}  # of each: the manifest's entries
        self.open = {}  # split -> file, its hash, tokens it still takes
        self.names = []

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
        with contextlib.suppress(OSError):
            remove_unfinished(self.folder)
            if self.new and kind:
                self.folder.rmdir()
        self.lock.__exit__(kind, error, trace)

    def add(self, split, ids):
        """Append `ids`, uint16 (n,), to a split."""
        assert ids.dtype == np.uint16 and (not len(ids) or int(ids.max()) < self.tokenizer.vocab_size)
        ids = np.ascontiguousarray(ids, dtype="<u2")
        while len(ids):
            if split not in self.open:
                done = sum(shard["tokens"] for shard in self.shards[split])
                tokens = min(SHARD_TOKENS, self.totals[split] - done)
                assert tokens > 0, f"more tokens than were announced for {split}"
                name = f"{split}_{len(self.shards[split]):06d}.bin"
                self.shards[split].append({"file": name, "tokens": tokens})
                self.open[split] = self.create(name), hashlib.sha256(), tokens
                self.write(split, shard_header(tokens))
            left = self.open[split][2]
            self.write(split, ids[:left].data, min(left, len(ids)))
            ids = ids[left:]

    def write(self, split, data, tokens=0):
        file, digest, left = self.open[split]
        with naming(file.name):
            file.write(data)
            if left == tokens:
                self.close(file)
        digest.update(data)
        self.open[split] = file, digest, left - tokens
        if left == tokens:
            self.shards[split][-1]["sha256"] = digest.hexdigest()
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
        kind = {"kind": self.tokenizer.kind, "vocab_size": self.tokenizer.vocab_size, "sha256": self.tokenizer.sha256}
        splits = {split: {"tokens": self.totals[split], "shards": shards} for split, shards in self.shards.items()}
        manifest = {"format": 1, "source": source, "splits": splits, "tokenizer": kind}
        manifest |= {"preprocessing": preprocessing, "documents": documents}
        texts = {
            INCOMPLETE: b"A dataset is being put in place here, or that was interrupted: run its prepare.py again.\n",
            "tokenizer.json": self.tokenizer.to_json(),
            "manifest.json": (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode(),
        }
        if self.holds(texts):
            return False
        for name, text in texts.items():
            with naming(self.folder / (name + BESIDE)), self.create(name) as file:
                file.write(text)
                self.close(file)

        # Here the earlier dataset ends. The syncs keep a power cut from reordering what follows.
        self.put(INCOMPLETE)
        sync_folder(self.folder)
        for name in self.names:
            if name not in (INCOMPLETE, "manifest.json"):
                self.put(name)
        for path in other_shards(self.folder, self.names):
            os.unlink(path)
        self.put("manifest.json")
        sync_folder(self.folder)
        os.unlink(self.folder / INCOMPLETE)
        sync_folder(self.folder)
        return True

    def put(self, name):
        os.replace(self.folder / (name + BESIDE), self.folder / name)

    def holds(self, texts):
        """Whether the folder is this dataset, complete, and nothing else."""
        try:
            for name in ("manifest.json", "tokenizer.json"):  # the manifest: nearly always the end of it
                if (self.folder / name).read_bytes() != texts[name]:
                    return False
            for shard in (shard for shards in self.shards.values() for shard in shards):
                with open(self.folder / shard["file"], "rb") as file:
                    if file_sha256(file) != shard["sha256"]:
                        return False
        except (FileNotFoundError, NotADirectoryError):
            return False
        return not (self.folder / INCOMPLETE).exists() and not other_shards(self.folder, self.names)


@contextlib.contextmanager
def naming(path):
    """An OSError in here names `path`, which one that comes from write() does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def file_sha256(file):
    """sha256 of an open file, read piece by piece."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def other_shards(folder, files):
    """Shards in `folder` that are not among `files`: those of an earlier, larger dataset."""
    shards = (path for path in folder.glob("*.bin") if re.fullmatch(r"(train|val)_\d{6}\.bin", path.name))
    return sorted(path for path in shards if path.name not in files)


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


def sync_folder(folder):
    """Make renames last through a power cut. Windows has no such call."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
