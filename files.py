"""
What several scripts do with files: read a text of lines, and hold a run's folder against a second writer.

It imports the standard library alone.
"""

import codecs
import contextlib
import errno
import json
import os
import platform
import re
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# -----------------------------------------------------------------------------
# Text


def decode_text(raw, name):
    """Bytes of a UTF-8 file -> str, without a byte order mark. Raises ValueError naming the file `name`, the first byte
    that is not UTF-8 and its place, or UTF-16 and UTF-32 where a byte order mark says so."""
    for encoding, marks in (("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
                            ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))):
        if raw.startswith(marks):
            raise ValueError(f"{name} is {encoding}, not UTF-8: convert it first, for example: "
                             f"iconv -f {encoding} -t UTF-8")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start:,}; convert it "
                         "first, for example: iconv -f ISO-8859-1 -t UTF-8") from None


def split_lines(text):
    """Lines of a text without their ends, which are LF, CRLF or CR. Form feeds, U+2028 and the like, at which
    str.splitlines cuts too, stay part of a line. The last line end ends a line and begins none."""
    lines = re.split("\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def read_lines(path):
    """The lines of a UTF-8 text file, as split_lines has them. Raises OSError, and ValueError as decode_text does."""
    return split_lines(decode_text(Path(path).read_bytes(), str(path)))


# -----------------------------------------------------------------------------
# One writer


class FolderLock:
    """Holds a folder for one process, by a lock on the file FOLDER/.lock that ends with the process, however it ends.

    The file says who holds it. One that a killed process left blocks nobody. Windows has no such lock: nothing is held.
    """

    def __init__(self, folder, warn=lambda message: None):
        """`warn` takes a line where the file system has no locks: nothing holds the folder then."""
        self.path, self.warn, self.file = Path(folder) / ".lock", warn, None

    def take(self, create=True):
        """Hold the folder, which exists, until the process ends. Without `create` a folder that nobody ever held stays
        as it is. Raises ValueError naming the process that holds it, OSError where the file cannot be written."""
        if self.file is None and (create or self.path.exists()):
            self.file = self.open()
        if self.file is not None and create:
            self.sign()

    def open(self):
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
                    holder = self.holder(file)
                    file.close()
                    raise ValueError(f"another process is training into {self.path.parent} ({holder}): wait for it to "
                                     "end, or give another --out_dir") from None
                self.warn(f"{self.path.parent} is on a file system without locks ({error.strerror}): nothing keeps a "
                          "second process from training into it")
                return file
            if self.names(file):
                return file
            file.close()  # the process that held it removed the file in between

    def names(self, file):
        """Whether this file is still the one in the folder."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def let_go(self):
        """Remove the file, and let others have the folder."""
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            if os.name != "nt" and self.names(self.file):  # Windows removes no open file
                self.path.unlink()
        self.file.close()
        self.file = None

    def sign(self):
        """Write down who holds the folder."""
        here = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.file.seek(0)
        self.file.truncate()
        self.file.write((json.dumps(here) + "\n").encode())

    @staticmethod
    def holder(file):
        try:
            who = json.loads(file.read())
            return f"process {who['pid']} on {who['host']}, since {who['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "it does not say which"
