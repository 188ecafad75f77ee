"""
Train a byte-level BPE tokenizer on a text of your own, and see what it gains.

    python data/tok_train.py --input=my_folder --vocab_size=4096 --out_dir=data/my_tokens
    python data/text/prepare.py --input=my_folder --tokenizer=data/my_tokens --out_dir=data/my_folder

The merges are found by the package `rustbpe` on the text but for its end, which is held out: there the tokenizer must
give back every character, and its bytes per token are compared with those of GPT-2's.
"""

import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # so that it runs from anywhere

import common  # noqa: E402, I001
from configurator import configure, fail  # noqa: E402
from reading import read_texts  # noqa: E402
from tokenizer import END_OF_TEXT, GPT2_PATTERN, MAX_VOCAB, BPETokenizer  # noqa: E402

# -----------------------------------------------------------------------------
input = ""              # a UTF-8 text file, or a folder of *.txt
out_dir = ""            # where tokenizer.json goes
vocab_size = 4096       # tokens in all: 256 bytes, merges, and the special tokens
specials = ("<|endoftext|>",)  # special tokens; the last one ends a document
pattern = ""            # regular expression that cuts a text before anything is merged; empty: GPT-2's
val_fraction = 0.1      # the share at the end of the text that is held out for the comparison
# -----------------------------------------------------------------------------


def learn(texts):
    """The tokens of `texts`, by id: the 256 bytes and then a merge each. -> list of bytes"""
    try:
        import rustbpe
    except ImportError:
        fail("training a tokenizer needs the package rustbpe: pip install rustbpe")
    trainer = rustbpe.Tokenizer()
    try:
        trainer.train_from_iterator(iter(texts), vocab_size - len(specials), pattern=pattern or GPT2_PATTERN)
    except ValueError as error:
        fail(f"--pattern={pattern}: {error}")
    return [bytes(piece) for piece, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]


def compare(tokenizer, text):
    """Print how many bytes of `text` a token stands for, here and with GPT-2's tokenizer where that can be had."""
    size = len(text.encode())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text, "byte-level BPE gives back every text"
    print(f"held out: {size:,} bytes in {len(ids):,} tokens, {size / len(ids):.3f} bytes per token; decoded, the same")
    try:
        gpt2, _ = common.gpt2_tokenizer()
    except common.SourceError as error:
        print("(GPT-2's ranks are not to be had here, so no comparison:", *error.tried, sep="\n  ", end=")\n")
        return
    count = len(gpt2.encode(text))
    print(f"GPT-2's {gpt2.vocab_size:,} tokens on the same text: {count:,}, {size / count:.3f} bytes per token")


def main():
    configure(globals())
    if not input or not out_dir:
        fail("--input and --out_dir are needed: the text to learn from, and where tokenizer.json goes")
    if not specials or len(set(specials)) != len(specials):
        fail(f"specials are distinct names, at least one to end a document, such as {END_OF_TEXT}")
    least = 256 + len(specials)
    if not least <= vocab_size <= MAX_VOCAB:
        fail(f"vocab_size={vocab_size} must lie between {least} (the bytes and special tokens) and {MAX_VOCAB}")

    texts, source, documents = read_texts(input)
    print(f"{input}: {documents['kept']:,} of {documents['read']:,} texts, {source['bytes']:,} bytes")
    text = "".join(texts)
    cut = int(len(text) * (1 - val_fraction))
    if not cut or cut == len(text):
        fail(f"{input} is too short to hold out a share of it")
    held_out, start = text[cut:], 0
    for i, part in enumerate(texts):  # each document to the trainer by itself: no merge spans two
        texts[i] = part[: max(0, cut - start)]
        start += len(part)
    try:
        tokenizer = BPETokenizer(learn(texts), pattern or GPT2_PATTERN, specials)
    except ValueError as error:
        fail(error)
    if tokenizer.vocab_size < vocab_size:
        print(f"NOTE: the text has no more to merge: {tokenizer.vocab_size:,} tokens instead of {vocab_size:,}")

    compare(tokenizer, held_out)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    print(f"written to {folder / 'tokenizer.json'} ({tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]})")
    words = ["python", "data/text/prepare.py", f"--input={input}", f"--tokenizer={folder}", "--out_dir=..."]
    print(f"next: {shlex.join(words)}")


if __name__ == "__main__":
    common.run(main)
