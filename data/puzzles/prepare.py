"""
Puzzles as conversations: sums, spelling, counting letters, reversing, copying. inference/puzzles.py makes them.

    python data/puzzles/prepare.py

    user       What is the reverse of joylu?
    assistant  ulyoj

Generated questions have one right answer, so they show whether a chat model was taught anything: train on these rows,
from scratch or from a base model, and `eval.py chat --task=puzzles` asks questions that no training has seen. By
default the tokens are the characters of ASCII, with the template "minichat".
"""

import shlex
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]  # the project and data/

import chats  # noqa: E402, I001
import common  # noqa: E402
import numpy as np  # noqa: E402
from configurator import Settings, configure, fail  # noqa: E402
from conversation import Refused, Template  # noqa: E402
from inference.puzzles import conversations as generate  # noqa: E402
from texts import pick_tokenizer  # noqa: E402
from tokenizer import CharTokenizer  # noqa: E402

# -----------------------------------------------------------------------------
count = 100_000     # puzzles to train on; the same question in the same words is taken once
held_out = 2_000    # puzzles for validation, which ask nothing that is trained on
kinds = ("sum", "spell", "count", "reverse", "count", "copy", "count")  # in turn; counting is the hardest to learn
digits = 2          # most digits of a number in a sum
letters = 6         # most letters of a word
block_size = 128    # tokens of a row: the context that the model is trained with
tokenizer = ""      # gpt2 | the folder of a run or dataset, or a file, with a tokenizer; empty: characters of ASCII
template = ""       # how conversations are written: minichat | chatml | smollm2 | nanochat; empty: the tokenizer's
out_dir = ""        # where the dataset goes; empty: the folder of this script
seed = 0            # another one draws other puzzles
# -----------------------------------------------------------------------------

SPLITS = {"train": "count", "val": "held_out"}  # and the setting that says how many


def main(c):
    if not 16 <= c.block_size <= chats.LARGEST_ROW:
        fail(f"block_size={c.block_size}: a row has from 16 to {chats.LARGEST_ROW:,} tokens")
    folder = Path(c.out_dir) if c.out_dir else HERE
    tokenizer = pick_tokenizer(c.tokenizer) if c.tokenizer else ascii_characters()
    tokenizer = chats.chat_tokenizer(tokenizer, c.tokenizer or "ASCII", c.template)
    conversations = chats.Conversations(Template(tokenizer), c.block_size)
    try:
        held_out, dropped, examples = add_puzzles(c, conversations)
    except ValueError as error:  # of a setting
        fail(error)
    if held_out.all() or not held_out.any():
        fail(f"no puzzle of one split can be used: {'; '.join(examples.values())}")

    documents = {"read": c.count + c.held_out, "kept": len(conversations), "changed": 0, "cut": conversations.cut,
                 "dropped": dict(sorted(dropped.items()))}
    preprocessing = {"version": 1, "tokens": "puzzles", "block_size": c.block_size, "kinds": list(c.kinds)}
    for name in ("count", "held_out", "digits", "letters", "seed"):
        preprocessing[name] = c[name]
    source = {"name": "puzzles", "generated": "inference/puzzles.py"}
    changed, counts = chats.write_rows(folder, conversations, held_out, source, preprocessing, documents)
    print(f"{c.count + c.held_out:,} puzzles, {len(conversations):,} of them different")
    chats.print_rows(folder, conversations, counts, changed)
    words = ["python", "train.py", "config/puzzles.py"]
    if folder.resolve() != HERE:  # the config file names the folder of this script
        words.append(common.dataset_key(folder))
    print(f"next: {shlex.join(words)}")


def ascii_characters():
    """The tokenizer of what ASCII prints, and of the newline."""
    return CharTokenizer("\n" + "".join(map(chr, range(ord(" "), ord("~") + 1))))


def add_puzzles(c, conversations):
    """Add the puzzles of both splits. -> (which conversations are held out, bool (n,); {reason: how many were dropped};
    {reason: the first of them}). Raises ValueError for settings that have no meaning."""
    held_out = []
    dropped = Counter()
    examples = {}
    for split, setting in SPLITS.items():
        for messages in generate(c[setting], split, c.seed, c.kinds, c.digits, c.letters):
            try:
                conversations.add(messages)
            except Refused as refusal:  # mostly the same question in the same words
                dropped[refusal.reason] += 1
                examples.setdefault(refusal.reason, f"{messages[0]['content']!r}: {refusal}")
            else:
                held_out.append(split == "val")
    return np.array(held_out, dtype=bool), dropped, examples


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
