"""
Tiny Shakespeare's speeches as talks, in characters: for a small model that has read data/shakespeare_char.

    python data/shakespeare_chat/prepare.py

    system     ROMEO                         who answers
    user       O, wilt thou leave me so ...  the speech before
    assistant  The exchange of thy love's    the answer

Where two speakers alternate, a talk has as many of their exchanges as fit into a row. Every speech that follows another
speaker's is an answer once. A long speech is cut at the end of a line: of an answer the beginning stays, and of a
speech that is answered the end. So an answer leaves room in the context, and the model learns to come to an end.

The tokens are those of data/shakespeare_char, so a model trained there knows them, and the template "minichat" adds its
own. As there, the last tenth of the text is held out: no talk crosses that border. The text is looked for as there, and
may be replaced by other plays as there.
"""

import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]  # the project and data/

import chats  # noqa: E402, I001
import common  # noqa: E402
import numpy as np  # noqa: E402
from configurator import Settings, configure, fail  # noqa: E402
from conversation import Refused, Template  # noqa: E402
from sources import shakespeare  # noqa: E402
from texts import read_texts  # noqa: E402
from tokenizer import CharTokenizer  # noqa: E402

# -----------------------------------------------------------------------------
input = ""        # a text of your own, each speech below a NAME: and above an empty line; empty: Tiny Shakespeare
out_dir = ""      # where the dataset goes; empty: the folder of this script
longest = 100     # characters of a speech at most
block_size = 256  # tokens of a row, which here are characters: the context that the model is trained with
val_fraction = 0.1  # the share at the end of the text that is held out, as in data/shakespeare_char
# -----------------------------------------------------------------------------

NAME = re.compile(r"[A-Z][^\n:.]{0,39}[:.]")  # the line above a speech; the plays that may replace the text have a dot


@dataclass
class Speech:
    name: str
    text: str
    start: int  # where it begins in the text of the play
    end: int


def main(c):
    folder = Path(c.out_dir) if c.out_dir else HERE
    if not 64 <= c.block_size <= chats.LARGEST_ROW:
        fail(f"block_size={c.block_size}: a row has from 64 to {chats.LARGEST_ROW:,} tokens")
    text, source = read_play(c.input) if c.input else shakespeare()
    tokenizer = chats.chat_tokenizer(CharTokenizer.from_text(text), "char", "minichat")
    speeches = list(find_speeches(text))
    border = int(len(text) * (1 - c.val_fraction))
    conversations = chats.Conversations(Template(tokenizer), c.block_size)
    documents = {"read": 0, "kept": 0, "changed": 0, "cut": 0, "dropped": Counter(), "speeches": len(speeches)}
    counts = []  # conversations of each split
    for part in ([s for s in speeches if s.end <= border], [s for s in speeches if s.start >= border]):
        before = len(conversations)
        for messages, is_cut in find_talks(part, conversations.template, c.block_size, c.longest):
            documents["read"] += 1
            try:
                conversations.add(messages)
                documents["cut"] += is_cut
            except Refused as refusal:
                documents["dropped"][refusal.reason] += 1
        counts.append(len(conversations) - before)
    if not all(counts):
        fail(f"{source['name']}: in {len(speeches):,} speeches there are {counts[0]:,} talks to learn from and "
             f'{counts[1]:,} to hold out: a speech stands below a line "NAME:" and above an empty line')
    documents["kept"] = len(conversations)
    held_out = np.repeat([False, True], counts)
    preprocessing = {"version": 1, "tokens": "conversations", "block_size": c.block_size, "longest": c.longest,
                     "val_fraction": c.val_fraction}
    changed, rows = chats.write_rows(folder, conversations, held_out, source, preprocessing, documents)

    print(f"{len(speeches):,} speeches; {documents['kept']:,} talks, {documents['cut']:,} of them with a speech cut at "
          f"the end of a line; dropped: {documents['dropped']['exact_duplicate']:,} that came before")
    chats.print_rows(folder, conversations, rows, changed)
    print(f"next: {next_command(folder)}")


def read_play(path):
    """-> (the text of a file, the manifest's source)"""
    texts, source, _ = read_texts(path)
    if len(texts) > 1:
        fail(f"--input={path}: give one text file")
    return texts[0], source


def find_speeches(text):
    """Yields the speeches of a play, each below a line with the speaker's name. Some have no text."""
    start = 0
    for block in text.split("\n\n"):
        head, _, body = block.strip("\n").partition("\n")
        if NAME.fullmatch(head):
            yield Speech(head[:-1], body.strip(), start, start + len(block))
        start += len(block) + len("\n\n")


def find_talks(speeches, template, block_size, longest):
    """Yields (messages, whether a speech had to be cut), so that each speech that answers another speaker's is an
    answer in one talk. A talk has as many exchanges of the same two speakers as fit into block_size."""

    def answers(i):
        """Whether speech i answers the one before."""
        if not 0 < i < len(speeches):
            return False
        question, answer = speeches[i - 1 : i + 1]
        return bool(question.text and answer.text) and question.name != answer.name

    def shortened(i, room):
        """Speech i and the one that it answers, each of at most `room` characters; one of them is empty if no line of
        it fits."""
        return ending(speeches[i - 1].text, room), beginning(speeches[i].text, room)

    def is_cut(i, pair):
        return pair != (speeches[i - 1].text, speeches[i].text)

    done = set()  # numbers of the speeches that have been an answer
    for i in range(1, len(speeches)):
        if i in done or not answers(i):
            continue
        names = speeches[i - 1].name, speeches[i].name
        messages = [{"role": "system", "content": names[1]}]
        room = block_size - size(messages + exchange("", ""), template)
        pair = shortened(i, min(longest, room // 2))
        if not all(pair):
            continue
        messages += exchange(*pair)
        cut = is_cut(i, pair)
        k = i + 2
        while answers(k) and names == (speeches[k - 1].name, speeches[k].name):
            pair = shortened(k, longest)
            longer = messages + exchange(*pair)
            if not all(pair) or size(longer, template) > block_size:
                break
            messages = longer
            cut = cut or is_cut(k, pair)
            done.add(k)
            k += 2
        yield messages, cut


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def size(messages, template):
    """How many tokens a talk takes."""
    return len(template.encode(messages)[0])


def beginning(text, most):
    """The first lines of a text, at most `most` characters, if possible up to the end of a sentence; "" if its first
    line is longer."""
    if len(text) <= most:
        return text
    ends = [match.start() for match in re.finditer("\n", text) if match.start() <= most]
    sentences = [end for end in ends if text[end - 1] in ".!?"]
    return text[: (sentences or ends or [0])[-1]]


def ending(text, most):
    """The last lines of a text, at most `most` characters; "" if its last line is longer."""
    if len(text) <= most:
        return text
    starts = [match.end() for match in re.finditer("\n", text) if len(text) - match.end() <= most]
    return text[starts[0] :] if starts else ""


def next_command(folder):
    """What to type next."""
    words = ["python", "train.py", "config/chat_shakespeare.py"]
    if folder.resolve() != HERE:  # the config file names the folder of this script
        words.append(common.dataset_key(folder))
    return f"{shlex.join(words)} (it starts from out/shakespeare_char_demo; --init_from=RUN names another model)"


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
