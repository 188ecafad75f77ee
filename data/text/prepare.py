"""
Any text of your own, as byte-level BPE or characters.

    python data/text/prepare.py --input=my_book.txt --out_dir=data/my_book
    python data/text/prepare.py --input=my_folder --tokenizer=char --out_dir=data/my_folder

A single text is split by characters, as nanoGPT splits Shakespeare: the first 90% for training, the rest for
validation. Several texts (the files of a folder, or the documents of a .jsonl or .parquet; .gz and .zst are unpacked)
become documents, each followed by the tokenizer's end token (<|endoftext|>; characters have a beginning token as well),
and the split is by tokens. All of it is held in memory. Nothing is cleaned, except that half a character in a .jsonl
becomes U+FFFD. A large corpus is for data/openwebtext/prepare.py.

GPT-2's ranks are looked for in MINICHAT_MIRROR (a folder or a base URL), in the cache, at tiktoken's own address, and
last in the source package `openai-whisper`, which a Python package index has.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # the project and data/

import common  # noqa: E402, I001
from configurator import Settings, configure, fail  # noqa: E402
from texts import pick_tokenizer, print_texts, read_texts, write_texts  # noqa: E402

# -----------------------------------------------------------------------------
input = ""          # a UTF-8 text file, .jsonl or .parquet, or a folder of such files
out_dir = ""        # where the dataset goes; empty: the folder of this script
text_key = "text"   # key or column of a .jsonl or .parquet that holds the text of a document
tokenizer = "gpt2"  # gpt2 | char | a file or folder of another dataset's or run's tokenizer
val_fraction = 0.1  # the share at the end of the text that is held out for validation
# -----------------------------------------------------------------------------


def main(c):
    if not c.input:
        fail("--input is missing: a UTF-8 text file, a .jsonl or .parquet, or a folder of such files")
    texts, source, documents = read_texts(c.input, c.text_key)
    print_texts(c.input, source, documents)
    folder = Path(c.out_dir) if c.out_dir else HERE
    tokenizer = pick_tokenizer(c.tokenizer, texts)
    write_texts(folder, texts, tokenizer, source, c.val_fraction, documents)


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
