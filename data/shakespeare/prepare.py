"""
Tiny Shakespeare in GPT-2's tokens: 301,966 for training and 36,059 for validation, as in nanoGPT.

    python data/shakespeare/prepare.py

To add a dataset of your own, copy this file to data/NAME/prepare.py, change steps 1, 2 and 3 in main(), and remove the
import of `shakespeare`. Then `python data/NAME/prepare.py` writes the dataset, and `python train.py --dataset=NAME`
trains on it. A text that is already in a file needs no script: use data/text/prepare.py --input=FILE. A corpus that
does not fit into memory is for data/openwebtext/prepare.py.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # the project and data/

import common  # noqa: E402, I001
from configurator import Settings, configure  # noqa: E402
from sources import shakespeare  # noqa: E402
from texts import pick_tokenizer, write_texts  # noqa: E402

# -----------------------------------------------------------------------------
out_dir = ""        # where the dataset goes; empty: the folder of this script
# -----------------------------------------------------------------------------


def main(c):
    folder = Path(c.out_dir) if c.out_dir else HERE

    # 1. The texts, a list of str. A single text is split in two; several texts become documents.
    #    `source` names them in the manifest: {"name": "my_book"} is enough.
    text, source = shakespeare()
    texts = [text]

    # 2. The tokenizer: "gpt2", "char", or the folder of one that data/tok_train.py made.
    tokenizer = pick_tokenizer("gpt2", texts)

    # 3. The share at the end that is held out for validation.
    write_texts(folder, texts, tokenizer, source, val_fraction=0.1)


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
