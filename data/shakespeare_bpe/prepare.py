"""
Tiny Shakespeare in a byte-level BPE of its own, learned from the training part alone.

    python data/shakespeare_bpe/prepare.py

The text is looked for as data/shakespeare_char/prepare.py does, and kept as input.txt; data/tok_train.py learns the
tokenizer, for which it needs the package `rustbpe`.
"""

import subprocess
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
vocab_size = 1024   # tokens in all
# -----------------------------------------------------------------------------


def main(c):
    folder = Path(c.out_dir) if c.out_dir else HERE
    text, source = shakespeare()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "input.txt").write_bytes(text.encode())
    learn_tokenizer(folder, c.vocab_size)
    write_texts(folder, [text], pick_tokenizer(str(folder)), source, val_fraction=0.1)


def learn_tokenizer(folder, vocab_size):
    """Learn a tokenizer from input.txt, less its last tenth, which is held out here as well. Writes tokenizer.json."""
    command = [sys.executable, HERE.parent / "tok_train.py", f"--input={folder / 'input.txt'}"]
    command += [f"--out_dir={folder}", f"--vocab_size={vocab_size}"]
    code = subprocess.run(command).returncode
    if code:  # it has printed why
        sys.exit(code)


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
