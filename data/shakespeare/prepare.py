"""
Tiny Shakespeare in GPT-2's tokens: 301,966 for training and 36,059 for validation, as in nanoGPT.

    python data/shakespeare/prepare.py

The text is looked for as data/shakespeare_char/prepare.py does, GPT-2's ranks as data/text/prepare.py does.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]  # so that it runs from anywhere

import common  # noqa: E402, I001
from configurator import configure  # noqa: E402
from shakespeare_char.prepare import shakespeare  # noqa: E402
from text.prepare import build, pick_tokenizer  # noqa: E402

# -----------------------------------------------------------------------------
out_dir = ""        # where the dataset goes; empty: the folder of this script
# -----------------------------------------------------------------------------


def main():
    configure(globals())
    text, source = shakespeare()
    documents = {"read": 1, "kept": 1, "changed": 0, "dropped": {}}
    build(Path(out_dir) if out_dir else HERE, [text], pick_tokenizer("gpt2", [text]), source, documents, 0.1)


if __name__ == "__main__":
    common.run(main)
