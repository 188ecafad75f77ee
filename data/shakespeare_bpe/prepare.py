"""
Tiny Shakespeare in a byte-level BPE of its own, trained on what is for training.

    python data/shakespeare_bpe/prepare.py

The text is looked for as data/shakespeare_char/prepare.py does, and kept as input.txt; data/tok_train.py learns the
tokenizer, for which it needs the package `rustbpe`.
"""

import subprocess
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
vocab_size = 1024   # tokens in all
# -----------------------------------------------------------------------------


def main():
    configure(globals())
    folder = Path(out_dir) if out_dir else HERE
    text, source = shakespeare()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "input.txt").write_bytes(text.encode())
    learn = [sys.executable, HERE.parent / "tok_train.py", f"--input={folder / 'input.txt'}", f"--out_dir={folder}",
             f"--vocab_size={vocab_size}"]
    if code := subprocess.run(learn).returncode:  # it has said why
        sys.exit(code)
    documents = {"read": 1, "kept": 1, "changed": 0, "dropped": {}}
    build(folder, [text], pick_tokenizer(str(folder), [text]), source, documents, 0.1)


if __name__ == "__main__":
    common.run(main)
