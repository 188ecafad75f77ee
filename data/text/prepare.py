"""
Any text of your own, as byte-level BPE or characters.

    python data/text/prepare.py --input=my_book.txt --out_dir=data/my_book
    python data/text/prepare.py --input=my_folder --tokenizer=char --out_dir=data/my_folder

A single text is split as nanoGPT splits Shakespeare, by characters: the first 90% for training, the rest for
validation. Several, the files of a folder or the documents of a .jsonl or .parquet (.gz and .zst are unpacked), become
documents with the tokenizer's end behind each (<|endoftext|>; characters have a beginning, too), and the split is by
tokens. All of it is held in memory, and nothing is cleaned, but half a character in a .jsonl becomes U+FFFD: for a
large corpus there is data/openwebtext/prepare.py.
GPT-2's ranks are looked for in MINICHAT_MIRROR (a folder or a base URL), in the cache, at tiktoken's own address, and
last in the source package `openai-whisper`, which a Python package index has.
"""

import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]  # so that it runs from anywhere

import common  # noqa: E402, I001
from configurator import configure, fail  # noqa: E402
from reading import read_texts  # noqa: E402
from tokenizer import CharTokenizer, load_tokenizer  # noqa: E402

# -----------------------------------------------------------------------------
input = ""          # a UTF-8 text file, .jsonl or .parquet, or a folder of such files
out_dir = ""        # where the dataset goes; empty: the folder of this script
text_key = "text"   # where a document of a .jsonl or .parquet has its text
tokenizer = "gpt2"  # gpt2 | char | a file or folder of another dataset's or run's tokenizer
val_fraction = 0.1  # the share at the end of the text that is held out for validation
# -----------------------------------------------------------------------------


def pick_tokenizer(name, texts):
    """The tokenizer that `name` names: gpt2, char, or a file or folder. Ends the script where there is none."""
    try:
        if name == "gpt2":
            found, where = common.gpt2_tokenizer()
            print(f"GPT-2's tokenizer, from {where}")
            return found
        return CharTokenizer.from_text("".join(texts)) if name == "char" else load_tokenizer(name)
    except common.SourceError as error:
        fail(f"GPT-2's ranks are not to be had here ({'; '.join(error.tried)}): put {common.RANKS} into the folder or "
             "at the address that MINICHAT_MIRROR names, or take another tokenizer")
    except FileNotFoundError as error:
        fail(f"tokenizer={name} is neither gpt2 nor char: {error}")
    except ValueError as error:
        fail(error)


def unknown_in(texts, tokenizer):
    """Which of `texts`, if there are several, the tokenizer cannot encode, where in it, and why."""
    for i, text in enumerate(texts, 1):
        try:
            tokenizer.encode_array(text)
        except ValueError as error:
            return f"{f', document {i:,} of {len(texts):,} ({text[:40]!r})' if len(texts) > 1 else ''}: {error}"


def build(folder, texts, tokenizer, source, documents, val_fraction):
    """Encode `texts`, split them, and make `folder` the dataset of that. Prints what there is then."""
    if len(texts) > 1 and tokenizer.eos is None:
        fail("this tokenizer has no token for the end of a document, which several files need")
    cut = int(len(texts[0]) * (1 - val_fraction))
    parts = [texts[0][:cut], texts[0][cut:]] if len(texts) == 1 else texts
    try:
        pieces = [tokenizer.encode_array(part) for part in parts]
    except ValueError:
        fail(f"{source['name']}{unknown_in(texts, tokenizer)}")
    if len(texts) > 1:
        ids = common.join_documents(pieces, tokenizer)
        cut = int(len(ids) * (1 - val_fraction))
        pieces = [ids[:cut], ids[cut:]]

    splits = dict(zip(("train", "val"), pieces, strict=True))
    preprocessing = {"version": 1, "tokens": tokenizer.kind, "val_fraction": val_fraction}
    changed = common.write_dataset(folder, splits, tokenizer, source, preprocessing, documents)
    print(f"{len(pieces[0]):,} tokens for training, {len(pieces[1]):,} for validation, of {tokenizer.vocab_size:,}")
    state = "written to" if changed else "already there, unchanged:"
    print(f"{state} {folder} (dataset {common.manifest_hash(folder)[:12]})")
    print(f"next: {shlex.join(['python', 'train.py', f'--dataset={folder}'])} (and the sizes of a model, or a config "
          "file)")


def main():
    configure(globals())
    if not input:
        fail("--input is missing: a UTF-8 text file, a .jsonl or .parquet, or a folder of such files")
    texts, source, documents = read_texts(input, text_key)
    print(f"{input}: {documents['kept']:,} of {documents['read']:,} texts, {source['bytes']:,} bytes")
    chosen = pick_tokenizer(tokenizer, texts)
    build(Path(out_dir) if out_dir else HERE, texts, chosen, source, documents, val_fraction)


if __name__ == "__main__":
    common.run(main)
