"""
Two thousand short English conversations, to fine-tune a chat model in minutes: the ChatterBot corpus (Cox and others,
BSD licence), questions and answers on trivia, technical support, programming, and small talk.

    python data/smollm2/fetch.py
    python data/chatterbot/prepare.py
    python train.py config/chat_smollm2.py

They lie in a Python package, chatterbot-corpus, so Python's package index is all that is needed. The package is not
installed, and none of its code runs.
"""

import io
import sys
import zipfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # the project and data/

import chats  # noqa: E402, I001
import common  # noqa: E402
from configurator import Settings, configure, fail  # noqa: E402
from conversation import Refused, Template  # noqa: E402
from files import sha256  # noqa: E402
from reading import need  # noqa: E402
from sources import fetch_wheel  # noqa: E402
from texts import pick_tokenizer  # noqa: E402

# -----------------------------------------------------------------------------
out_dir = ""        # where the dataset goes; empty: the folder of this script
tokenizer = "out/smollm2"  # the folder of the run that will be trained
template = ""       # minichat | chatml | smollm2 | nanochat; empty: the tokenizer's own, or else minichat
language = "english"  # another folder of the corpus: german, french, japanese, ...
block_size = 256    # tokens of a row
val_fraction = 0.1  # share of the conversations that is held out, chosen by their hashes
# -----------------------------------------------------------------------------

PACKAGE, VERSION = "chatterbot-corpus", "1.3.3"
WHEEL = f"chatterbot_corpus-{VERSION}-py2.py3-none-any.whl"
WHEEL_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"


def main(c):
    folder = Path(c.out_dir) if c.out_dir else HERE
    if not 16 <= c.block_size <= chats.LARGEST_ROW:
        fail(f"block_size={c.block_size}: a row has from 16 to {chats.LARGEST_ROW:,} tokens")
    tokenizer = chats.chat_tokenizer(pick_tokenizer(c.tokenizer), c.tokenizer, c.template)
    wheel, where = fetch_wheel(PACKAGE, VERSION, WHEEL, WHEEL_SHA256)
    print(f"the ChatterBot corpus {VERSION}, from {where}")
    talks = read_talks(wheel, c.language)

    conversations = chats.Conversations(Template(tokenizer), c.block_size)
    dropped = Counter()
    for talk in talks:
        try:
            conversations.add(talk)
        except Refused as refusal:
            dropped[refusal.reason] += 1
    documents = {"read": len(talks), "kept": len(conversations), "changed": 0, "cut": conversations.cut,
                 "dropped": dict(dropped)}
    source = {"name": WHEEL, "bytes": len(wheel), "sha256": sha256(wheel)}
    preprocessing = {"version": 1, "tokens": "conversations", "block_size": c.block_size, "language": c.language,
                     "val_fraction": c.val_fraction}
    held_out = conversations.held_out(c.val_fraction)
    changed, counts = chats.write_rows(folder, conversations, held_out, source, preprocessing, documents)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items())) or "none"
    print(f"{len(talks):,} conversations read, {len(conversations):,} kept; dropped: {reasons}")
    chats.print_rows(folder, conversations, counts, changed)
    print("next: python train.py config/chat_smollm2.py")


def read_talks(wheel, language):
    """The conversations of a language: lists of messages, in which user and assistant alternate, in the order of the
    files' names. Ends the script for a language that the corpus does not have."""
    yaml = need("yaml")
    talks = []
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = [Path(name) for name in archive.namelist() if name.endswith(".yml")]
        chosen = sorted(name for name in names if name.parent.name == language)
        if not chosen:
            known = ", ".join(sorted({name.parent.name for name in names}))
            fail(f"language={language} is not one of {known}")
        for name in chosen:
            # BaseLoader runs no code and leaves every text a text: otherwise "Yes" would become True
            fields = yaml.load(archive.read(name.as_posix()), Loader=yaml.BaseLoader)
            for lines in fields.get("conversations", []):
                talks.append(messages_of(lines))
    return talks


def messages_of(lines):
    """The lines of a talk -> messages. The first speaker is the user, the second one the assistant."""
    messages = []
    for i, line in enumerate(lines):
        role = "assistant" if i % 2 else "user"
        messages.append({"role": role, "content": line})
    return messages


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
