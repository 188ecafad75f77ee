"""
Train a byte-level BPE tokenizer on a text of your own, and see what it gains.

    python data/tok_train.py --input=my_folder --vocab_size=4096 --out_dir=data/my_tokens
    python data/text/prepare.py --input=my_folder --tokenizer=data/my_tokens --out_dir=data/my_folder

The package `rustbpe` learns the merges from the text, except its end, which is held out. There the tokenizer must give
back every character, and its bytes per token are compared with GPT-2's.
"""

import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # so that it runs from anywhere

import common  # noqa: E402, I001
from configurator import Settings, configure, fail  # noqa: E402
from sources import SourceError, gpt2_tokenizer  # noqa: E402
from texts import print_texts, read_texts  # noqa: E402
from tokenizer import END_OF_TEXT, GPT2_PATTERN, MAX_VOCAB, BPETokenizer  # noqa: E402

# -----------------------------------------------------------------------------
input = ""              # a UTF-8 text file, or a folder of *.txt
out_dir = ""            # where tokenizer.json goes
vocab_size = 4096       # tokens in all: 256 bytes, merges, and the special tokens
specials = ("<|endoftext|>",)  # special tokens; the last one ends a document
pattern = ""            # regular expression that cuts a text before anything is merged; empty: GPT-2's
val_fraction = 0.1      # the share at the end of the text that is held out for the comparison
# -----------------------------------------------------------------------------


def main(c):
    check_settings(c)
    texts, source, documents = read_texts(c.input)
    print_texts(c.input, source, documents)
    texts, held_out = hold_out(texts, c)
    pattern = c.pattern or GPT2_PATTERN
    try:
        pieces = learn(texts, c.vocab_size - len(c.specials), pattern)
        tokenizer = BPETokenizer(pieces, pattern, c.specials)
    except ValueError as error:
        fail(error)
    if tokenizer.vocab_size < c.vocab_size:
        print(f"NOTE: the text has no more to merge: {tokenizer.vocab_size:,} tokens "
              f"instead of {c.vocab_size:,}")

    compare(tokenizer, held_out)
    folder = Path(c.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    print(f"written to {folder / 'tokenizer.json'} ({tokenizer.vocab_size:,} tokens, "
          f"sha256 {tokenizer.sha256[:12]})")
    words = ["python", "data/text/prepare.py", f"--input={c.input}", f"--tokenizer={folder}"]
    print(f"next: {shlex.join([*words, '--out_dir=...'])}")


def check_settings(c):
    """End the script where a setting is missing or out of range."""
    if not c.input or not c.out_dir:
        fail("--input and --out_dir are needed: the text to learn from, and where tokenizer.json "
             "goes")
    if not c.specials or len(set(c.specials)) != len(c.specials):
        fail(f"specials are distinct names, at least one to end a document, such as {END_OF_TEXT}")
    least = 256 + len(c.specials)
    if not least <= c.vocab_size <= MAX_VOCAB:
        fail(f"vocab_size={c.vocab_size} must lie between {least} (the bytes and special tokens) "
             f"and {MAX_VOCAB}")


def hold_out(texts, c):
    """Cut the share at the end of all texts off. -> (what is left of each text, the end as one str)"""
    text = "".join(texts)
    cut = int(len(text) * (1 - c.val_fraction))
    if not cut or cut == len(text):
        fail(f"{c.input} is too short to hold out a share of it")
    beginnings = []  # the trainer gets each document by itself: no merge spans two
    start = 0
    for document in texts:
        beginnings.append(document[: max(0, cut - start)])
        start += len(document)
    return beginnings, text[cut:]


def learn(texts, size, pattern):
    """Learn `size` tokens from `texts`: the 256 bytes, and then a merge each. -> list of bytes, by id"""
    try:
        import rustbpe
    except ImportError:
        fail("training a tokenizer needs the package rustbpe: pip install rustbpe")
    trainer = rustbpe.Tokenizer()
    try:
        trainer.train_from_iterator(iter(texts), size, pattern=pattern)
    except ValueError as error:
        fail(f"--pattern={pattern}: {error}")
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])  # (piece, id)
    return [bytes(piece) for piece, _ in ranks]


def compare(tokenizer, text):
    """Print how many bytes of `text` a token stands for, here and with GPT-2's tokenizer where that can be found."""
    size = len(text.encode())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text, "byte-level BPE gives back every text"
    print(f"held out: {size:,} bytes in {len(ids):,} tokens, {size / len(ids):.3f} bytes per token; "
          "decoded, the same")
    try:
        gpt2, _ = gpt2_tokenizer()
    except SourceError as error:
        lines = ["(GPT-2's ranks cannot be found here, so no comparison:", *error.tried]
        print("\n  ".join(lines) + ")")
        return
    count = len(gpt2.encode(text))
    print(f"GPT-2's {gpt2.vocab_size:,} tokens on the same text: {count:,}, "
          f"{size / count:.3f} bytes per token")


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
