"""
Helpers for files: write them atomically, digest them, read text and lines, reserve a folder for one process, and print
without ever failing.

It imports only the standard library.
"""

import codecs
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# -----------------------------------------------------------------------------
# Atomic writing


@contextlib.contextmanager
def whole_file(path, durable=False):
    """Open a temporary file beside `path` for writing bytes, and rename it to `path` at the end. Raises OSError.

    A kill at any moment leaves the old file or the complete new one. An error leaves the old file and no temporary one.
    With `durable`, it waits until the disk holds the new file. The temporary name contains the process id, so several
    processes may write the same file.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with open(beside, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
        if durable:
            sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path, content, durable=False):
    """Write bytes, or text as UTF-8, to a file atomically, by whole_file. Raises OSError."""
    with whole_file(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path):
    """Wait until the disk holds a file, or the entries of a folder. Windows cannot open folders, and need not."""
    if os.name == "nt" and Path(path).is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -----------------------------------------------------------------------------
# Digests, JSON, the clock


def sha256(data):
    """The SHA-256 of bytes or of a text as UTF-8, in hex."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_sha256(file):
    """The SHA-256, in hex, of the file at a path, or of an open binary file from its position to its end."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return file_sha256(opened)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def finite(value):
    """`value` made fit for strict JSON: at any depth, inf and nan become None, and tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def clock_face(seconds):
    """Seconds as 4:05, or as 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


# -----------------------------------------------------------------------------
# Text


def decode_text(raw, name):
    """Bytes of a UTF-8 file -> str, without a byte order mark.

    Raises ValueError with the file's `name`, and with the first byte that is not UTF-8 and its offset, or the encoding
    that a byte order mark names.
    """
    utf32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
    utf16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    for encoding, marks in (("UTF-32", utf32), ("UTF-16", utf16)):  # UTF-32's mark begins like UTF-16's
        if raw.startswith(marks):
            raise ValueError(f"{name} is {encoding}, not UTF-8: convert it first, for example: "
                             f"iconv -f {encoding} -t UTF-8")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start:,}; convert it "
                         "first, for example: iconv -f ISO-8859-1 -t UTF-8") from None


def split_lines(text):
    """The lines of a text without their line ends: LF, CRLF or CR. A line end at the very end begins no new line.

    Unlike str.splitlines, it does not cut at form feeds, U+2028 and the like.
    """
    lines = re.split("\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def read_lines(path):
    """The lines of a UTF-8 text file, by split_lines. Raises OSError, and ValueError as decode_text does."""
    return split_lines(decode_text(Path(path).read_bytes(), str(path)))


# -----------------------------------------------------------------------------
# One writer


class FolderLock:
    """Reserves a folder for one process, with a lock on the file FOLDER/.lock.

    The system frees the lock when the process ends, even if it is killed, so a leftover file blocks nobody. The file
    names the process that holds the folder. Windows has no such lock, so there the class reserves nothing.
    """

    def __init__(self, folder, warn=lambda message: None):
        """`warn` is called with a line if the file system has no locks, so that nothing reserves the folder."""
        self.path = Path(folder) / ".lock"
        self.warn = warn
        self.file = None

    def take(self, create=True):
        """Reserves the folder, which must exist, until the process ends. Without `create`, a folder without a lock file
        is left as it is. Raises ValueError naming the process that holds it, OSError if the file cannot be written."""
        if self.file is None and (create or self.path.exists()):
            self.file = self.open_locked()
        if self.file is not None and create:
            self.write_holder()

    def open_locked(self):
        """The open lock file, locked by this process. Raises ValueError naming the process that holds the lock."""
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
                    holder = read_holder(file)
                    file.close()
                    raise ValueError(
                        f"another process is training into {self.path.parent} ({holder}): wait for it to end, "
                        "or give another --out_dir") from None
                self.warn(f"{self.path.parent} is on a file system without locks ({error.strerror}): "
                          "nothing keeps a second process from training into it")
                return file
            if self.is_in_folder(file):
                return file
            file.close()  # its holder removed it between our open and our lock: try again

    def is_in_folder(self, file):
        """Whether an open lock file is the one that the folder has now."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def let_go(self):
        """Removes the lock file, so that others can have the folder."""
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            if os.name != "nt" and self.is_in_folder(self.file):  # Windows cannot remove an open file
                self.path.unlink()
        self.file.close()
        self.file = None

    def write_holder(self):
        """Writes down which process holds the folder."""
        holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.file.seek(0)
        self.file.truncate()
        self.file.write((json.dumps(holder) + "\n").encode())


def read_holder(file):
    """The process that a lock file names, as part of a sentence."""
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it does not say which"


# -----------------------------------------------------------------------------
# Standard output and standard error


class LastingFile(io.FileIO):
    """A file descriptor to print to. It drops text that it cannot write, because the reader is gone, the disk is full
    or the terminal was closed. A run must not die because nobody is listening any more."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def keep_printing(product=False):
    """Makes stdout and stderr accept any text, as UTF-8, and never fail, even without a reader. With `product`, stdout
    is the output that a user asked for: it still fails when its reader is gone.

    This replaces sys.stdout and sys.stderr for the whole process: a print in a library must not fail either.
    """
    occupy_closed_descriptors()
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif not hasattr(stream, "reconfigure"):  # a notebook's
            continue
        elif os.name == "nt" or (product and name == "stdout") or not has_descriptor(stream, descriptor):
            stream.reconfigure(encoding="utf-8", errors="replace")  # a Windows code page cannot print every text
        elif not isinstance(getattr(stream.buffer, "raw", None), LastingFile):
            lasting = io.BufferedWriter(LastingFile(descriptor, "w", closefd=False))
            line_buffering = stream.line_buffering or name == "stderr"
            setattr(sys, name, io.TextIOWrapper(
                lasting, encoding="utf-8", errors="replace", line_buffering=line_buffering,
                write_through=stream.write_through))


def occupy_closed_descriptors():
    """Opens /dev/null as each of the descriptors 0, 1, 2 that is closed: the next file must not become stdout."""
    with contextlib.suppress(OSError):
        descriptor = os.open(os.devnull, os.O_RDWR)
        while descriptor <= 2:
            descriptor = os.open(os.devnull, os.O_RDWR)
        os.close(descriptor)


def close_stdout():
    """Nobody can read stdout any more: point it at /dev/null, so that the flush at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def has_descriptor(stream, descriptor):
    """Whether a stream prints to this file descriptor."""
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):  # a test's capture has none
        return False
