"""
What the prepare scripts share: finding a source file, reading texts, writing a dataset folder.

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

    An OSError (no space, no permission, ...) is 2, Ctrl-C 130, SIGTERM 143: each after the writer has cleaned up.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command starts again", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        mend = "; free some and run the same command again" if error.errno == errno.ENOSPC else ""
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}{mend}")


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
# Texts of one's own


def text_files(folder):
    """The *.txt files under `folder`, sorted by their path in it. Links are followed, each folder is entered once."""
    folder, found, entered = Path(folder), [], set()

    def stop(error):
        raise error

    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=stop):
        if os.path.realpath(place) in entered:  # a link back up would never end
            subfolders.clear()
            continue
        entered.add(os.path.realpath(place))
        subfolders.sort()  # which of two ways into a folder is taken must not depend on the file system
        found += [Path(place, name) for name in names if name.lower().endswith(".txt")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read_text(path):
    """A UTF-8 file as it stands, line ends included, less a byte order mark. -> (str, its bytes)"""
    raw = Path(path).read_bytes()
    try:
        return raw.decode().removeprefix("\ufeff"), raw
    except UnicodeDecodeError as error:
        fail(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start:,}; convert it first, "
            "for example: iconv -f ISO-8859-1 -t UTF-8"
        )


def read_texts(path):
    """The text of a file, or of each *.txt file under a folder that is not empty.

    -> (list of str, the manifest's source, its documents)
    """
    path = Path(path)
    if not path.exists():
        fail(f"--input={path}: there is no such file or folder")
    paths = text_files(path) if path.is_dir() else [path]
    texts, digests, size, changed = [], [], 0, 0
    for file in paths:
        text, raw = read_text(file)
        digests.append(sha256(raw))
        size += len(raw)
        changed += raw.startswith(b"\xef\xbb\xbf")
        if text:
            texts.append(text)
    if not texts:
        fail(f"{path} has no text: {f'{len(paths)} *.txt files, all empty' if path.is_dir() else 'it is empty'}")
    source = {"name": os.path.basename(os.path.abspath(path)), "bytes": size, "sha256": digests[0]}
    if path.is_dir():  # the digest of what sha256sum would print: changes with any file's content, name or presence
        names = [file.relative_to(path).as_posix() for file in paths]
        listing = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
        source |= {"files": len(paths), "sha256": sha256(listing.encode("utf-8", "surrogateescape"))}
    dropped = {"empty": len(paths) - len(texts)}
    documents = {"read": len(paths), "kept": len(texts), "changed": changed, "dropped": dropped}
    return texts, source, documents


def join_documents(pieces, tokenizer):
    """The ids of each document, put together. A single document stays as it is; of several, each stands between the
    tokenizer's beginning and end, or has just the end behind it where they are the same. -> uint16 (N,)"""
    if len(pieces) == 1:
        return pieces[0]
    begin = np.uint16([tokenizer.bos] if tokenizer.bos != tokenizer.eos else [])
    end = np.uint16([tokenizer.eos])
    return np.concatenate([part for piece in pieces for part in (begin, piece, end)])


# -----------------------------------------------------------------------------
# Writing


def shard_header(n):
    """The first 1,024 bytes of a shard of n tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, n
    return header.tobytes()


def manifest_hash(folder):
    """sha256 of a dataset's manifest.json, its name in every result. Raises OSError where there is none."""
    return sha256((Path(folder) / "manifest.json").read_bytes())


def write_dataset(folder, splits, tokenizer, source, preprocessing, documents):
    """Make `folder` the dataset of `splits`: {"train": ids, "val": ids}, each uint16 (N,). -> whether anything changed

    The files depend on the arguments alone (no time, no path of this machine), so a dataset that is there already is
    recognised and left as it is. Else all of it is written beside and synced first: until then an earlier dataset stays
    whole, also when the disk is full or the process is killed. Then INCOMPLETE appears, the files are renamed, what is
    left of the earlier dataset goes, the manifest follows, and INCOMPLETE is removed.
    """
    folder = Path(folder)
    if tokenizer.vocab_size > 65_536:
        fail(f"a vocabulary of {tokenizer.vocab_size:,} does not fit into 16-bit tokens (65,536)")
    files, manifest = {"tokenizer.json": [tokenizer.to_json()]}, {"format": 1, "source": source, "splits": {}}
    for split, ids in splits.items():
        if len(ids) < 2:  # one to predict from, one to predict
            fail(f"the {split} split would have {len(ids)} of at least 2 tokens: use more text or another val_fraction")
        assert ids.dtype == np.uint16 and int(ids.max()) < tokenizer.vocab_size
        shards = []
        for i, start in enumerate(range(0, len(ids), SHARD_TOKENS)):
            tokens = np.ascontiguousarray(ids[start : start + SHARD_TOKENS], dtype="<u2")
            name, parts = f"{split}_{i:06d}.bin", [shard_header(len(tokens)), tokens.data]
            digest = hashlib.sha256(parts[0])
            digest.update(parts[1])
            shards.append({"file": name, "tokens": len(tokens), "sha256": digest.hexdigest()})
            files[name] = parts
        manifest["splits"][split] = {"tokens": len(ids), "shards": shards}
    manifest["tokenizer"] = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    manifest |= {"preprocessing": preprocessing, "documents": documents}
    files["manifest.json"] = [(json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()]

    if holds(folder, files):
        return False
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        try:
            replace_files(folder, files)
        except BaseException:  # Ctrl-C too: whatever ends this, nothing unfinished stays behind
            remove_unfinished(folder)
            if new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    return True


def holds(folder, files):
    """Whether `folder` is the complete dataset of `files` (name -> the parts of its content), and nothing else."""
    try:
        if (folder / "manifest.json").read_bytes() != files["manifest.json"][0]:  # nearly always the end of it
            return False
        same = all((folder / name).read_bytes() == b"".join(parts) for name, parts in files.items())
    except (FileNotFoundError, NotADirectoryError):
        return False
    return same and not (folder / INCOMPLETE).exists() and not other_shards(folder, files)


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


def replace_files(folder, files):
    """Put `files`, of which the manifest is the last, into `folder`."""
    note = b"A dataset is being put in place here, or that was interrupted: run its prepare.py again.\n"
    files = {INCOMPLETE: [note], **files}

    remove_unfinished(folder)  # of a process that was killed
    for name, parts in files.items():
        path = folder / (name + BESIDE)
        try:
            with open(path, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())  # a full disk may show only here
        except OSError as error:  # which does not name the file if it came from write()
            raise OSError(error.errno, error.strerror, str(path)) from None

    def put(name):
        os.replace(folder / (name + BESIDE), folder / name)

    # Here the earlier dataset ends. The syncs keep a power cut from reordering what follows.
    first, *rest, last = files
    put(first)
    sync_folder(folder)
    for name in rest:
        put(name)
    for path in other_shards(folder, files):
        os.unlink(path)
    put(last)
    sync_folder(folder)
    os.unlink(folder / INCOMPLETE)
    sync_folder(folder)


def sync_folder(folder):
    """Make renames last through a power cut. Windows has no such call."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
