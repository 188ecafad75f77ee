"""
Conversations -> a dataset of rows: read any of the usual forms, encode by a template, pack whole conversations.

| a record: a line of .jsonl, a row of .parquet or of the Hub | |
|---|---|
| `{"messages": [{"role": "user", "content": "Hi"}, ...]}` | OpenAI's, and most of the Hub |
| `[{"role": "user", "content": "Hi"}, ...]` | nanochat's: a line is the bare list |
| `{"conversations": [{"from": "human", "value": "Hi"}, ...]}` | ShareGPT's; gpt answers |
| `{"prompt": "Hi", "completion": "Hello!"}` | two texts, or two lists of messages, as TRL has them |
| `{"instruction": "Add", "input": "1 2", "output": "3"}` | Alpaca's (Taori et al. 2023); input may be missing |

Reading is streamed, and the encoded conversations are held in memory until they are written: 3 bytes a token, and about
300 a conversation. The rows depend on nothing but the conversations in their order, the tokenizer and the settings.

data/chat/prepare.py and data/shakespeare_chat/prepare.py show how a prepare.py uses this.
"""

import hashlib
import json
import sys
from array import array
from bisect import bisect_left, insort
from collections import Counter

import numpy as np

from cleaning import repair_utf8
from common import DatasetWriter, print_dataset
from configurator import fail
from conversation import TEMPLATES, Refused, Template, add_template, check_messages
from reading import Damaged, Reject, read_records
from scan import Progress
from tokenizer import MAX_VOCAB

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output")
FORMS = ('{"messages": [{"role", "content"}, ...]}, a bare list of such messages, {"conversations": '
         '[{"from", "value"}, ...]}, {"prompt", "completion"} or {"instruction", "output"}')
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for the roles
LARGEST_ROW = 1 << 20  # tokens
BLOCK = 1 << 20  # tokens of the rows that are built in memory before they are written


# -----------------------------------------------------------------------------
# Records -> messages


def messages_of(record):
    """A record in any of the forms -> its messages, for check_messages. Raises Refused for a record in none."""
    if isinstance(record, list):
        return record
    record = record if isinstance(record, dict) else {}

    def has(*names):
        return all(record.get(name) is not None for name in names)

    if has("messages"):
        return as_messages(record["messages"], None)
    if has("conversations"):
        return [from_sharegpt(message) for message in as_messages(record["conversations"], None)]
    if has("prompt", "completion"):
        return as_messages(record["prompt"], "user") + as_messages(record["completion"], "assistant")
    if has("instruction", "output"):
        question = record["instruction"]
        if isinstance(question, str) and isinstance(record.get("input"), str) and record["input"].strip():
            question += "\n\n" + record["input"]
        return as_messages(question, "user") + as_messages(record["output"], "assistant")
    keys = ", ".join(map(repr, list(record)[:10])) or "no keys"
    raise Refused("no_conversation", f"it has {keys}, so it is none of {FORMS}")


def as_messages(value, role):
    """A list of messages as it is, or a text as one message of this `role`; None: it must be a list. Raises Refused.

    The library `datasets` gives some lists of objects as an object of lists, which is turned round here.
    """
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) == 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise Refused("no_messages", f"a conversation is a list of messages, not {type(value).__name__}")
    return value


def from_sharegpt(message):
    """A message with `from` and `value` -> one with role and content. One that has a role stays as it is."""
    if not isinstance(message, dict) or message.get("role") is not None:
        return message
    speaker = message.get("from")
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": message.get("value")}


# -----------------------------------------------------------------------------
# Messages -> ids


class Conversations:
    """Encoded conversations, each at most `block_size` tokens long, in the order in which they were added."""

    def __init__(self, template, block_size, max_chars=sys.maxsize):
        self.template = template
        self.block_size = block_size
        self.max_chars = max_chars
        self.ids = array("H")  # of all conversations, one after another
        self.learned = bytearray()  # for each of them 1 or 0
        self.ends = array("q", [0])  # conversation i is ids[ends[i] : ends[i + 1]]
        self.hashes = array("Q")  # of each, 64 bits
        self.seen = set()  # digests of 128 bits
        self.cut = 0  # how many were too long and lost their last turns

    def __len__(self):
        return len(self.hashes)

    def add_record(self, record):
        """Add the conversation of a record: bytes of JSON, a list or a dict. -> whether its text had to be mended.
        Raises Refused, or Reject."""
        changes = Counter()
        if isinstance(record, Reject):
            raise record
        if isinstance(record, bytes):
            try:
                record = json.loads(repair_utf8(record, changes), strict=False)
            except (ValueError, RecursionError):
                raise Reject("bad_json") from None
        messages = check_messages(messages_of(record))
        for message in messages:
            message["content"] = repair_utf8(message["content"], changes)
        self.add(messages)
        return bool(changes)

    def add(self, messages):
        """Encode a conversation. One that is too long is cut behind the last answer that fits. Raises Refused."""
        if sum(len(message["content"]) for message in messages) > self.max_chars:
            raise Refused("too_long", f"it has more than {self.max_chars:,} characters (max_chars)")
        messages = self.template.normalise(messages)
        if not has_answer(messages):
            raise Refused("no_answer", "no message of the assistant's has a text to learn")
        try:
            ids, learned = self.template.encode(messages)
        except Refused:
            raise
        except ValueError as error:
            raise Refused("no_token", str(error)) from None
        count = len(messages)
        if len(ids) > self.block_size:
            messages, length = self.beginning_that_fits(messages, ids, learned)
            ids, learned = ids[:length], learned[:length]
        text = json.dumps([[message["role"], message["content"]] for message in messages])
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in self.seen:
            raise Refused("exact_duplicate", "the same conversation came before")
        assert not learned[0], "a template's message begins with a token that tells the role"

        self.seen.add(digest)
        self.hashes.append(int.from_bytes(digest[:8], "little"))
        self.ids.extend(ids)
        self.learned += bytes(learned)
        self.ends.append(len(self.ids))
        self.cut += len(messages) < count

    def beginning_that_fits(self, messages, ids, learned):
        """-> (messages up to the last answer whose end fits into block_size, how many of `ids` they take). Raises
        Refused if no answer with a text fits."""
        template = self.template
        tail = len(template.after["assistant"]) - template.end_places["assistant"] - 1  # tokens behind the end
        length = answers = 0
        for at in range(self.block_size - tail):
            if learned[at] and ids[at] == template.end:
                length = at + 1 + tail
                answers += 1
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: places[answers - 1] + 1] if answers else []
        if not has_answer(messages):
            raise Refused("too_long", f"its first answer ends beyond {self.block_size:,} tokens (block_size)")
        return messages, length

    def lengths(self):
        """Tokens of each conversation. -> int64 (n,)"""
        return np.diff(np.frombuffer(self.ends, dtype=np.int64))

    def held_out(self, val_fraction):
        """Which conversations are for validation: those with a hash in the lowest val_fraction. -> bool (n,)

        Each split gets at least one: in a small set, the last or the first conversation, whatever its hash.
        """
        val = np.frombuffer(self.hashes, dtype=np.uint64) < np.uint64(int(val_fraction * 2**64))
        if not val.any():
            val[-1] = True
        elif val.all():
            val[0] = False
        return val


def has_answer(messages):
    """Whether an assistant's message has more than white space."""
    return any(message["role"] == "assistant" and message["content"].strip() for message in messages)


def chat_tokenizer(tokenizer, name, template):
    """`tokenizer` with the `template` of that name; empty: with its own, or else minichat's. `name` is how the user
    calls the tokenizer. Ends the script where the two do not fit together."""
    if template and template not in TEMPLATES:
        fail(f"template={template} is not one of {', '.join(TEMPLATES)}")
    try:
        if template or tokenizer.template is None:
            tokenizer = add_template(tokenizer, template or "minichat")
        Template(tokenizer)
    except ValueError as error:
        fail(f"tokenizer={name}: {error}")
    if tokenizer.vocab_size > MAX_VOCAB:
        fail(f"tokenizer={name} has no room for the template's tokens: {tokenizer.vocab_size:,} in all do not fit into "
             f"16 bits ({MAX_VOCAB:,}); choose a smaller tokenizer")
    return tokenizer


# -----------------------------------------------------------------------------
# Reading


def read_conversations(files, conversations):
    """Read all records of `files` (InputFile), and add them to `conversations`.

    -> (the manifest's documents, {reason: the first record dropped for it, in words}). What comes after a damaged place
    in a file is not read.
    """
    read = changed = 0
    dropped = Counter()
    examples = {}
    damaged = {}
    limit = 6 * conversations.max_chars + (1 << 16)  # bytes of a line: JSON may spell a character in six
    progress = Progress("read", sum(file.size for file in files))
    for number, file in enumerate(files):
        before = sum(earlier.size for earlier in files[:number])
        records = 0
        try:
            for record in read_records(file, COLUMNS, limit):
                records += 1
                try:
                    changed += conversations.add_record(record)
                except (Refused, Reject) as refusal:
                    reason = getattr(refusal, "reason", str(refusal))
                    dropped[reason] += 1
                    place = f"{file.name}, record {records:,}"
                    examples.setdefault(reason, f"{place}: {str(refusal)[:200]}")
                progress.reach(before + file.done)
                progress.add((1, len(record) if isinstance(record, bytes) else 0))
        except Damaged as damage:
            damaged[file.name] = str(damage)
        read += records
    progress.end()
    documents = {
        "read": read,
        "kept": len(conversations),
        "changed": changed,
        "cut": conversations.cut,
        "dropped": dict(sorted(dropped.items())),
        "damaged_files": damaged,
    }
    return documents, examples


def check_enough(name, documents, examples):
    """End the script where fewer than two conversations are left: one to learn from, one to hold out."""
    if documents["kept"] > 1:
        return
    if documents["kept"]:
        fail(f"{name} has one conversation that can be used: a dataset needs two, one to learn from and one to hold "
             "out")
    faults = [f"{file}: {fault}" for file, fault in documents["damaged_files"].items()]
    if not documents["read"]:
        fail(f"{name} has no conversation: {'; '.join(faults) or 'it is empty'}")
    reasons = []
    for reason, count in documents["dropped"].items():
        reasons.append(f"{count:,} {reason} (first {examples[reason]})")
    fail(f"{name} has no conversation that can be used: of {documents['read']:,} records {', '.join(reasons)}; "
         f"{''.join(f'{fault}; ' for fault in faults)}a record is {FORMS}")


# -----------------------------------------------------------------------------
# Packing and writing


def pack(lengths, room):
    """Pack pieces whole into rows of `room` tokens: the longest piece first, each into the fullest row that still takes
    it (best-fit decreasing; Ding et al. 2024, arXiv:2404.10830).

    lengths: of each piece, from 1 to `room`. -> list of rows, each a list of rising piece numbers, in the order of
    their first pieces. There are at most `room` different free spaces, so a piece's row is found in O(log room) steps.
    """
    rows = []
    open_rows = {}  # free tokens -> numbers of the rows that have so many
    spaces = []  # its keys, rising
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(spaces, length)
        if at == len(spaces):  # none has room
            row, space = len(rows), room
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(piece)
        space -= length
        if space and space not in open_rows:
            open_rows[space] = []
            insort(spaces, space)
        if space:
            open_rows[space].append(row)
    for row in rows:
        row.sort()
    rows.sort()
    return rows


def write_rows(folder, conversations, held_out, source, preprocessing, documents):
    """Make `folder` the dataset of the conversations, packed into rows; `held_out`, bool (n,), says which are for
    validation. -> (whether anything changed, {split: Counter of rows, tokens, learned and padding})"""
    block_size = conversations.block_size
    tokenizer = conversations.template.tokenizer
    lengths = conversations.lengths()
    rows = {}
    for split, chosen in (("train", ~held_out), ("val", held_out)):
        numbers = np.flatnonzero(chosen)
        rows[split] = [numbers[row] for row in pack(lengths[numbers], block_size)]
    totals = {split: len(rows[split]) * block_size for split in rows}
    counts = {}
    rows_at_once = max(1, BLOCK // block_size)
    with DatasetWriter(folder, tokenizer, totals, block_size) as writer:
        for split in rows:
            counts[split] = Counter(rows=len(rows[split]), tokens=totals[split])
            for start in range(0, len(rows[split]), rows_at_once):
                ids, learned, begins, padding = fill_rows(rows[split][start : start + rows_at_once], conversations)
                assert learned.any(axis=1).all(), "a row has nothing to learn"
                writer.add(split, ids.ravel(), learned.ravel(), begins.ravel())
                counts[split].update(learned=int(learned.sum()), padding=padding)
        learned = {split: counts[split]["learned"] for split in counts}
        changed = writer.finish(source, preprocessing, documents | {"learned": learned})
    return changed, counts


def fill_rows(rows, conversations):
    """The numbers of each row's conversations -> ids uint16, learned bool, begins bool, each (rows, block_size), and
    how many tokens are padding."""
    shape = len(rows), conversations.block_size
    ids = np.full(shape, conversations.template.tokenizer.eos or 0, dtype=np.uint16)
    learned, begins = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    all_ids = np.frombuffer(conversations.ids, dtype=np.uint16)
    all_learned = np.frombuffer(conversations.learned, dtype=np.uint8)
    padding = 0
    for row, numbers in enumerate(rows):
        at = 0
        for number in numbers.tolist():
            start, end = conversations.ends[number], conversations.ends[number + 1]
            place = slice(at, at + end - start)
            ids[row, place] = all_ids[start:end]
            learned[row, place] = all_learned[start:end]
            begins[row, at] = True
            at += end - start
        if at < conversations.block_size:
            begins[row, at] = True
        padding += conversations.block_size - at
    return ids, learned, begins, padding


def print_documents(documents, examples):
    """Print what was read, and what was dropped and why."""
    for name, fault in documents["damaged_files"].items():
        print(f"warning: {name}: {fault}; what comes before is used", file=sys.stderr)
    print(f"{documents['read']:,} conversations read, {documents['kept']:,} kept, of these {documents['cut']:,} cut at "
          f"the end of a turn and {documents['changed']:,} with text that was mended")
    for reason, count in documents["dropped"].items():
        print(f"  dropped: {count:,} {reason}, first {examples[reason]}")


def print_rows(folder, conversations, counts, changed):
    """Print what the dataset holds."""
    for split, count in counts.items():
        learned, padding = (count[kind] / count["tokens"] for kind in ("learned", "padding"))
        print(f"{split}: {count['rows']:,} rows of {conversations.block_size:,} tokens, {learned:.1%} of them learned, "
              f"{padding:.1%} padding")
    print_dataset(folder, changed)
