"""Conversations as rows: every form, every reason to refuse one, whole conversations with the right bits, and kills."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reading import packed
from test_tokenizer import BPE
from test_verify import edit

import chats
import common
import reading
import verify
from conversation import TEMPLATES, Format, Refused, Template, add_template
from data.common import shard_header
from sources import TINY
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MIRROR = os.environ.get("MINICHAT_MIRROR", "")
COMPLETE = {"train_000000.bin", "train_000000.learned", "train_000000.begins", "val_000000.bin", "val_000000.learned",
            "val_000000.begins", "tokenizer.json", "manifest.json"}
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX processes")


def talk(*contents, system=None):
    """Contents of user, assistant, user, ... -> messages"""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return messages


def made_up(count, seed=1):
    """Different conversations of one to three exchanges, some with a system message, special names, emoji."""
    draw = random.Random(seed)
    words = "the <|end|> cat 🙂 é <|user|> sat\n\n on a <|endoftext|> mat".split(" ")
    talks = []
    for i in range(count):
        contents = [f"{i}"]
        for _ in range(2 * draw.randrange(1, 4) - 1):
            contents.append(" ".join(draw.choices(words, k=draw.randrange(1, 9))))
        talks.append(talk(*contents, system="Be kind." if draw.random() < 0.3 else None))
    return talks


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def prepare(call_script, tmp_path):
    """prepare(input, ...) runs data/chat/prepare.py with a small BPE. -> (exit code, stdout, stderr)"""
    BPE.save(tmp_path / "bpe.json")

    def prepare(source=None, out="out", **settings):
        defaults = {"out_dir": tmp_path / out, "tokenizer": tmp_path / "bpe.json", "block_size": 256,
                    "val_fraction": 0.3}
        if source is not None:
            defaults["input"] = source
        words = [f"--{key}={value}" for key, value in (defaults | settings).items()]
        return call_script("data/chat/prepare.py", *words)

    return prepare


def manifest(folder):
    return json.loads((folder / "manifest.json").read_bytes())


def read_rows(folder, split):
    """The rows of a split, read by the description of the format alone. -> ids, learned, begins, each (rows, T)"""
    found = manifest(folder)
    columns = [[], [], []]
    for shard in found["splits"][split]["shards"]:
        count = shard["tokens"]
        raw = (folder / shard["file"]).read_bytes()
        assert raw[:1024] == shard_header(count) and len(raw) == 1024 + 2 * count
        columns[0].append(np.frombuffer(raw[1024:], dtype="<u2"))
        for column, kind in zip(columns[1:], ("learned", "begins"), strict=True):
            raw = (folder / shard[kind]["file"]).read_bytes()
            assert len(raw) == (count + 7) // 8
            bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little")
            assert not bits[count:].any()
            column.append(bits[:count].astype(bool))
    shape = found["rows"][split], found["rows"]["block_size"]
    return [np.concatenate(column).reshape(shape) for column in columns]


def conversations_of(folder, split):
    """Checks what every row must be. -> the conversations of a split, each (ids, learned), in their order."""
    tokenizer = load_tokenizer(folder)
    pieces = []
    ids, learned, begins = read_rows(folder, split)
    assert learned.any(axis=1).all() and not learned[:, 0].any() and begins[:, 0].all()
    for row in range(len(ids)):
        starts = np.flatnonzero(begins[row]).tolist()
        for i, (start, end) in enumerate(zip(starts, [*starts[1:], ids.shape[1]], strict=True)):
            if learned[row, start:end].any():
                pieces.append((ids[row, start:end].tolist(), learned[row, start:end].tolist()))
            else:  # padding, which is the last in a row
                assert i and i == len(starts) - 1 and set(ids[row, start:end].tolist()) == {tokenizer.eos or 0}
    return pieces


def talks_of(folder):
    """The conversations of a dataset as messages, in any order of them."""
    template = Template(load_tokenizer(folder))
    return [template.decode(ids) for split in ("train", "val") for ids, _ in conversations_of(folder, split)]


def in_order(talks):
    return sorted(talks, key=lambda messages: json.dumps(messages))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -----------------------------------------------------------------------------
# Forms and files

PAIRS = [(f"question {i} é", f"answer {i} 🙂") for i in range(6)]
FORMS = {
    "messages": lambda q, a: {"id": 1, "messages": talk(q, a)},
    "bare list": talk,
    "prompt and completion": lambda q, a: {"prompt": q, "completion": a},
    "lists of both": lambda q, a: {"prompt": talk(q), "completion": [{"role": "assistant", "content": a}]},
    "ShareGPT": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "ShareGPT with our roles": lambda q, a: {
        "conversations": [{"from": "user", "value": q}, {"from": "assistant", "value": a}]},
    "conversations with roles": lambda q, a: {"conversations": talk(q, a)},
    "Alpaca": lambda q, a: {"instruction": q, "output": a},
    "Alpaca without input": lambda q, a: {"instruction": q, "input": "", "output": a},
    "an object of lists": lambda q, a: {"messages": {"role": ["user", "assistant"], "content": [q, a]}},
    "parts": lambda q, a: {"messages": [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("user", q), ("assistant", a))]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_dataset(form, prepare, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [FORMS[form](*pair) for pair in PAIRS])
    code, _, errors = prepare(source)
    assert code == 0, errors
    assert in_order(talks_of(tmp_path / "out")) == in_order([talk(*pair) for pair in PAIRS])
    if form != "bare list":
        pq.write_table(pa.Table.from_pylist([FORMS[form](*pair) for pair in PAIRS]), tmp_path / "a.parquet")
        assert prepare(tmp_path / "a.parquet", out="table")[0] == 0
        assert manifest(tmp_path / "table")["splits"] == manifest(tmp_path / "out")["splits"]


def test_systems_and_inputs_of_the_forms(prepare, tmp_path):
    records = [
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "q"},
                           {"from": "gpt", "value": "a"}]},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": None, "prompt": "p", "completion": "c"},
    ]
    assert prepare(write_lines(tmp_path / "a.jsonl", records))[0] == 0
    wanted = [talk("q", "a", system="S"), talk("Add.\n\n1 2", "3"), talk("p", "c")]
    assert in_order(talks_of(tmp_path / "out")) == in_order(wanted)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", "folder"])
def test_packed_files_and_folders(ending, prepare, tmp_path):
    plain = write_lines(tmp_path / "a.jsonl", [talk(*pair) for pair in PAIRS])
    assert prepare(plain)[0] == 0
    if ending == "folder":
        source = tmp_path / "folder"
        source.mkdir()
        lines = plain.read_bytes().splitlines(keepends=True)
        (source / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines[:2]))
        packed(b"".join(lines[2:]), source / "b.jsonl.gz")
        (source / "c.md").write_text("no")
    else:
        source = tmp_path / f"a{ending}"
        packed(plain.read_bytes(), source)
    assert prepare(source, out="packed")[0] == 0
    assert manifest(tmp_path / "packed")["splits"] == manifest(tmp_path / "out")["splits"]


# -----------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("block_size", [128, 250])
def test_every_conversation_is_in_the_rows_once_as_the_template_encodes_it(template, block_size, prepare, tmp_path,
                                                                           monkeypatch):
    monkeypatch.setattr(common, "SHARD_TOKENS", 1000)  # rows that lie in two shards, and bits that end within a byte
    talks = made_up(60)
    code, said, errors = prepare(write_lines(tmp_path / "a.jsonl", talks), template=template, block_size=block_size)
    assert code == 0, errors
    made = Template(load_tokenizer(tmp_path / "out"))
    assert made.tokenizer.template == add_template(BPE, template).template
    encoded = {json.dumps(made.encode(messages)) for messages in talks if len(made.encode(messages)[0]) <= block_size}
    found = conversations_of(tmp_path / "out", "train") + conversations_of(tmp_path / "out", "val")
    written = [json.dumps(pair) for pair in found]
    documents = manifest(tmp_path / "out")["documents"]
    assert len(set(written)) == len(written) == documents["kept"]
    assert encoded <= set(written) and len(written) - len(encoded) == documents["cut"]
    assert documents["cut"] + sum(documents["dropped"].values()) == len(talks) - len(encoded)
    for ids, learned in found:  # those that were cut too
        assert (ids, learned) == made.encode(made.decode(ids))
    for split in ("train", "val"):
        assert documents["learned"][split] == int(read_rows(tmp_path / "out", split)[1].sum()) > 0
    assert len(manifest(tmp_path / "out")["splits"]["train"]["shards"]) > 1
    assert not list(verify.dataset_faults(tmp_path / "out"))
    assert f"rows of {block_size} tokens" in said and "next: python train.py --init_from=RUN" in said
    assert not (tmp_path / "out" / "scan").exists()


def test_a_second_run_changes_nothing(prepare, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", made_up(20))
    assert prepare(source)[0] == 0
    before = files(tmp_path / "out")
    assert before.keys() == COMPLETE
    with monkeypatch.context() as patch:
        patch.setattr(common.DatasetWriter, "put", None)  # nothing may be put in place
        code, said, _ = prepare(source)
    assert code == 0 and "already there, unchanged" in said
    damaged = bytearray(before["val_000000.learned"])
    damaged[0] ^= 2
    for spoil in (lambda path: path.unlink(), lambda path: path.write_bytes(damaged)):
        spoil(tmp_path / "out" / "val_000000.learned")
        assert prepare(source)[0] == 0 and files(tmp_path / "out") == before


def test_a_plain_dataset_removes_the_bits_and_has_none(prepare, call_script, tmp_path):
    assert prepare(write_lines(tmp_path / "a.jsonl", made_up(20)))[0] == 0
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 20)
    for out in ("out", "plain"):
        assert call_script("data/shakespeare_char/prepare.py", f"--input={tmp_path / 'text.txt'}",
                           f"--out_dir={tmp_path / out}")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "plain")
    assert "rows" not in manifest(tmp_path / "out") and len(files(tmp_path / "out")) == 4


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40))
def test_bits_do_not_depend_on_the_pieces_or_the_shards(sizes, shard):
    """Against np.packbits of each shard's bits at once."""
    import tempfile

    tokenizer = CharTokenizer("ab")
    total = sum(sizes) + (sum(sizes) < 2)
    draw = np.random.default_rng(total)
    columns = [draw.random(total) < 0.5 for _ in range(2)]
    ids = np.zeros(total, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "SHARD_TOKENS", shard)
        patch.setattr(os, "fsync", lambda handle: None)  # hundreds of small shards
        with common.DatasetWriter(folder, tokenizer, {"train": total}, block_size=1) as writer:
            at = 0
            for size in [*sizes, total - sum(sizes)]:
                writer.add("train", ids[at : at + size], *(column[at : at + size] for column in columns))
                at += size
            writer.finish({}, {}, {})
        for i, start in enumerate(range(0, total, shard)):
            for kind, column in zip(("learned", "begins"), columns, strict=True):
                wanted = np.packbits(column[start : start + shard], bitorder="little").tobytes()
                assert Path(folder, f"train_{i:06d}.{kind}").read_bytes() == wanted


# -----------------------------------------------------------------------------
# Packing


def best_fit(lengths, room):
    """The definition, by a search through all rows: the fullest row that takes the piece; of equals, any."""
    used = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, tokens in enumerate(used) if tokens + length <= room]
        if fitting:
            used[max(fitting, key=lambda i: used[i])] += length
        else:
            used.append(length)
    return sorted(used)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_packing_is_best_fit_decreasing(lengths, room):
    rows = chats.pack(lengths, room)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[piece] for piece in row) for row in rows) == best_fit(lengths, room)
    assert all(row == sorted(row) for row in rows) and rows == sorted(rows)


def test_padding_is_small_on_lengths_as_they_are():
    """Lengths of chats are close to a log-normal distribution. Control: in their order, rows are a fifth padding."""
    draw = np.random.default_rng(1)
    for median, room in ((300, 1024), (300, 2048), (60, 256)):
        lengths = np.clip(draw.lognormal(np.log(median), 0.8, 5000).astype(int), 10, room)
        rows = chats.pack(lengths, room)
        assert 1 - lengths.sum() / (len(rows) * room) < 0.05
        count = free = 0
        for length in lengths.tolist():
            count, free = (count, free - length) if length <= free else (count + 1, room - length)
        assert 1 - lengths.sum() / (count * room) > 0.1


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), min_size=2, max_size=12),
       st.integers(16, 24))
def test_no_row_without_something_to_learn(shapes, block_size):
    """Whatever the conversations: too long, with an empty answer, without an answer."""
    import tempfile

    conversations = chats.Conversations(Template(add_template(BPE, "minichat")), block_size)
    for i, (question, answer, second) in enumerate(shapes):
        messages = talk(chr(65 + i) * question, " " * (answer % 3) or chr(65 + i) * answer)
        try:
            conversations.add(messages + (talk("q", "a") if second else [])[: answer % 4])
        except Refused as refusal:
            assert refusal.reason in ("no_answer", "too_long", "exact_duplicate")
    if len(conversations) < 2:
        return
    documents = {"kept": len(conversations)}
    with tempfile.TemporaryDirectory() as folder:
        chats.write_rows(Path(folder), conversations, conversations.held_out(0.3), {}, {}, documents)
        found = conversations_of(Path(folder), "train") + conversations_of(Path(folder), "val")
        assert len(found) == len(conversations) and not list(verify.dataset_faults(Path(folder)))


# -----------------------------------------------------------------------------
# What is held out


def test_the_split_is_the_hashs_and_a_duplicate_is_in_neither(prepare, tmp_path):
    talks = made_up(200)
    made = {}
    for name, some in (("few", talks[:100] + talks[:30]), ("all", talks)):
        assert prepare(write_lines(tmp_path / f"{name}.jsonl", some), out=name)[0] == 0
        made[name] = {split: {json.dumps(ids) for ids, _ in conversations_of(tmp_path / name, split)}
                      for split in ("train", "val")}
    assert manifest(tmp_path / "few")["documents"]["dropped"] == {"exact_duplicate": 30}
    for split in ("train", "val"):
        assert made["few"][split] < made["all"][split]
    assert not made["all"]["train"] & made["all"]["val"]
    assert 0.2 < len(made["all"]["val"]) / 200 < 0.4


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_a_small_set_has_a_row_in_each_split(val_fraction, prepare, tmp_path):
    assert prepare(write_lines(tmp_path / "a.jsonl", made_up(2)), val_fraction=val_fraction)[0] == 0
    assert [len(conversations_of(tmp_path / "out", split)) for split in ("train", "val")] == [1, 1]


# -----------------------------------------------------------------------------
# What cannot be used is counted by reason

GOOD = [{"messages": talk("hello", "world")}, {"messages": talk("one", "two", "three")}]
BAD = {
    "bad_json": ["{", '"\\', "[" * 50_000],
    "no_conversation": [{"text": "no"}, {}, 7, "text", {"prompt": "only"}, None],
    "no_messages": [[], {"messages": []}, {"messages": "text"}, {"conversations": 7}, {"messages": ["hi"]},
                    {"prompt": 7, "completion": "c"}, {"conversations": ["hi"]}, {"messages": {"role": [], "x": [1]}}],
    "unknown_role": [talk("q", "a") + [{"role": "tool", "content": "t"}], [{"content": "no role"}],
                     {"conversations": [{"from": "bing", "value": "v"}]}, {"conversations": [{"from": ["gpt"]}]}],
    "late_system": [talk("q") + talk("a", system="late")],
    "no_content": [[{"role": "user", "content": None}, {"role": "assistant", "content": "a"}], talk(7, "a")],
    "not_text": [[{"role": "user", "content": [{"type": "image", "image": "x"}]}, *talk("q", "a")[1:]]],
    "no_answer": [talk("q"), talk("q", ""), talk("q", " \n"), [{"role": "system", "content": "s"}]],
    "too_long": [talk("q" * 500, "a"), talk("q", "a" * 500), talk("q", "a" * 3000), "x" * 90_000],
    "exact_duplicate": [{"messages": talk("hello", "world"), "id": 9}],
}


@pytest.mark.parametrize("reason", BAD)
def test_each_reason_is_counted_and_the_first_is_shown(reason, prepare, tmp_path):
    lines = [json.dumps(record) for record in GOOD]
    lines += [record if reason == "bad_json" else json.dumps(record) for record in BAD[reason]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    code, said, errors = prepare(tmp_path / "a.jsonl", max_chars=2000)
    assert code == 0 and not errors, errors
    documents = manifest(tmp_path / "out")["documents"]
    assert documents["dropped"] == {reason: len(BAD[reason])}
    assert (documents["read"], documents["kept"]) == (2 + len(BAD[reason]), 2)
    assert f"dropped: {len(BAD[reason])} {reason}, first a.jsonl, record 3: " in said
    assert in_order(talks_of(tmp_path / "out")) == in_order([record["messages"] for record in GOOD])


def test_a_very_long_line_is_never_held(tmp_path):
    """One line of 200 MB, and a conversation after it."""
    import tracemalloc

    with open(tmp_path / "a.jsonl", "wb") as file:
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + json.dumps(talk("q", "a")).encode() + b"\n")
    conversations = chats.Conversations(Template(add_template(BPE, "minichat")), 64, max_chars=1000)
    tracemalloc.start()
    documents, examples = chats.read_conversations(reading.list_files(tmp_path / "a.jsonl"), conversations)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert documents["dropped"] == {"too_long": 1} and documents["kept"] == 1 and peak < 8 << 20


def test_two_turns_of_one_role_stay_or_are_joined_as_the_template_says(prepare, tmp_path):
    two = [{"role": "user", "content": "one"}, *talk("two", "three")]
    source = write_lines(tmp_path / "a.jsonl", [two, talk("q", "a")])
    assert prepare(source)[0] == 0 and two in talks_of(tmp_path / "out")
    assert prepare(source, template="nanochat")[0] == 0
    assert talk("one\n\ntwo", "three") in talks_of(tmp_path / "out")


def test_halves_of_characters_and_bytes_that_are_not_utf8_are_mended(prepare, tmp_path):
    lines = [b'[{"role": "user", "content": "a\\ud83d"}, {"role": "assistant", "content": "\\ud83d\\ude42"}]',
             b'[{"role": "user", "content": "a\xff"}, {"role": "assistant", "content": "c"}]',
             json.dumps(talk("q", "a")).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert prepare(tmp_path / "a.jsonl")[0] == 0
    assert manifest(tmp_path / "out")["documents"]["changed"] == 2
    wanted = [talk("a\ufffd", "🙂"), talk("a\ufffd", "c"), talk("q", "a")]
    assert in_order(talks_of(tmp_path / "out")) == in_order(wanted)


def test_rows_of_a_table_that_cannot_be_used_are_counted(prepare, tmp_path):
    prompts = pa.array([b"q", b"\xff", b"p", b"x" * 90_000]).view(pa.string())
    pq.write_table(pa.table({"prompt": prompts, "completion": ["a", "b", "c", "d"]}), tmp_path / "a.parquet")
    assert prepare(tmp_path / "a.parquet", max_chars=2000)[0] == 0
    assert manifest(tmp_path / "out")["documents"]["dropped"] == {"not_utf8": 1, "too_long": 1}
    assert in_order(talks_of(tmp_path / "out")) == in_order([talk("q", "a"), talk("p", "c")])


def test_too_long_is_cut_behind_the_last_answer_that_fits(prepare, tmp_path):
    long = talk("q", "a" * 50, "q", "b" * 50, "q", "c" * 200)
    late = talk("q", " ", "q", "a" * 300)  # what fits of it has only an empty answer
    assert prepare(write_lines(tmp_path / "a.jsonl", [long, late, talk("q", "a")]), block_size=128)[0] == 0
    assert in_order(talks_of(tmp_path / "out")) == in_order([long[:4], talk("q", "a")])
    documents = manifest(tmp_path / "out")["documents"]
    assert documents["cut"] == 1 and documents["dropped"] == {"too_long": 1}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_longest_beginning_fits_exactly(template):
    """With as many tokens as it needs it stays, with one fewer it loses a turn more."""
    made = Template(add_template(BPE, template))
    messages = talk("q", "a", "qq", "aa", "qqq", "aaa", "q" * 300, "a")
    size = len(made.encode(messages[:4])[0])
    for block_size, turns in ((size, 4), (size - 1, 2), (len(made.encode(messages[:6])[0]), 6)):
        conversations = chats.Conversations(made, block_size)
        conversations.add(messages)
        assert (conversations.ids.tolist(), [*map(bool, conversations.learned)]) == made.encode(messages[:turns])
        assert conversations.cut == 1


def test_characters_that_a_tokenizer_lacks_are_counted(prepare, tmp_path):
    CharTokenizer("abc").save(tmp_path / "char.json")
    source = write_lines(tmp_path / "a.jsonl", [talk("a", "b"), talk("a", "x"), talk("c", "c")])
    code, said, _ = prepare(source, tokenizer=tmp_path / "char.json")
    assert code == 0 and "1 no_token, first a.jsonl, record 2: cannot encode 'x' (U+0078)" in said
    assert manifest(tmp_path / "out")["documents"]["dropped"] == {"no_token": 1}
    source = write_lines(tmp_path / "b.jsonl", [talk("x", "x")])
    code, _, errors = prepare(source, tokenizer=tmp_path / "char.json", out="no")
    assert code == 2 and errors.count("\n") == 1 and "1 no_token" in errors and "'x'" in errors


def test_what_is_damaged_is_said_and_what_comes_before_is_used(prepare, tmp_path):
    packed(write_lines(tmp_path / "a.jsonl", made_up(4000)).read_bytes(), tmp_path / "a.jsonl.gz")
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) * 3 // 4])
    code, _, errors = prepare(tmp_path / "a.jsonl.gz")
    documents = manifest(tmp_path / "out")["documents"]
    assert code == 0 and "a.jsonl.gz" in errors and "what comes before is used" in errors
    assert 1000 < documents["kept"] < 4000 and list(documents["damaged_files"]) == ["a.jsonl.gz"]


# -----------------------------------------------------------------------------
# One clear line, nothing written


def no_end():
    fields = {"before": {"user": "u", "assistant": "a"}, "after": {"user": "\n", "assistant": "\n"}}
    return BPE.changed(template={**fields, "begin": "", "system": "", "join": None, "also": []})


def full(count):
    """A BPE of `count` tokens."""
    pieces = [bytes([i]) for i in range(256)]
    pairs = (bytes([a, b]) for a in range(256) for b in range(256))
    return BPETokenizer([*pieces, *(next(pairs) for _ in range(count - 257))])


MISTAKES = {
    "nothing asked": ({}, "give --input"),
    "both": ({"input": "good.jsonl", "hub": "x"}, "give --input"),
    "missing": ({"input": "none.jsonl"}, "there is no such file or folder"),
    "another kind": ({"input": "text.txt"}, "ends in one of .jsonl"),
    "a list": ({"input": "list.json"}, "make a .jsonl of it"),
    "texts": ({"input": "texts.jsonl"}, '2 no_conversation (first texts.jsonl, record 1: it has \'text\', so'),
    "columns": ({"input": "texts.parquet"}, "it has none of the columns messages,"),
    "empty": ({"input": "empty.jsonl"}, "has no conversation: it is empty"),
    "one": ({"input": "one.jsonl"}, "one conversation that can be used: a dataset needs two"),
    "UTF-16": ({"input": "utf16.jsonl"}, "UTF-16, not UTF-8"),
    "damaged": ({"input": "damaged.parquet"}, "damaged.parquet"),
    "tokenizer": ({"input": "good.jsonl", "tokenizer": "none"}, "tokenizer=none is neither"),
    "char": ({"input": "good.jsonl", "tokenizer": "char"}, "tokenizer=char: name the folder"),
    "template": ({"input": "good.jsonl", "template": "llama"}, "template=llama is not one of minichat, chatml"),
    "no end": ({"input": "good.jsonl", "tokenizer": "no_end.json"}, "no_end.json: the chat template has no end"),
    "no room": ({"input": "good.jsonl", "tokenizer": "full.json"}, "has no room for the template's tokens: 65,540 in"),
    "no characters left": ({"input": "good.jsonl", "tokenizer": "chars.json"}, "too many"),
    "a small row": ({"input": "good.jsonl", "block_size": 8}, "from 16 to"),
    "a fraction": ({"input": "good.jsonl", "val_fraction": 1}, "val_fraction="),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    write_lines(folder / "good.jsonl", made_up(3))
    write_lines(folder / "one.jsonl", made_up(1))
    write_lines(folder / "texts.jsonl", [{"text": "a"}, {"text": "b"}])
    pq.write_table(pa.table({"text": ["a", "b"]}), folder / "texts.parquet")
    (folder / "damaged.parquet").write_bytes(b"PAR1")
    (folder / "empty.jsonl").write_bytes(b"\n\n")
    (folder / "text.txt").write_text("text")
    (folder / "list.json").write_text(json.dumps(made_up(3)))
    (folder / "utf16.jsonl").write_bytes("[]".encode("utf-16"))
    no_end().save(folder / "no_end.json")
    full(65_536).save(folder / "full.json")
    CharTokenizer("".join(map(chr, range(0xE000, 0xE000 + 6000))) + "".join(map(chr, range(0x10000, 0x10000 + 59_533)))
                  ).save(folder / "chars.json")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_nothing_is_written(mistake, prepare, wrong, tmp_path, monkeypatch):
    settings, named = MISTAKES[mistake]
    monkeypatch.chdir(wrong)
    code, _, errors = prepare(**settings)
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and named in errors, errors
    assert not (tmp_path / "out").exists()


def test_the_command_for_a_list_works(prepare, wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(made_up(3)).encode())
    errors = prepare("a b.json")[2]
    command = errors.partition("a conversation a line: ")[2].strip().replace("python ", f"{sys.executable} ", 1)
    if os.name != "nt":
        subprocess.run(command, shell=True, check=True)
        assert prepare("a b.jsonl")[0] == 0
        assert in_order(talks_of(tmp_path / "out")) == in_order(made_up(3))


def test_the_last_tokenizer_that_has_room(prepare, tmp_path):
    full(65_532).save(tmp_path / "fits.json")
    assert prepare(write_lines(tmp_path / "a.jsonl", made_up(3)), tokenizer=tmp_path / "fits.json")[0] == 0
    assert manifest(tmp_path / "out")["tokenizer"]["vocab_size"] == 65_536


def test_the_tokenizers_own_template_is_used(prepare, tmp_path):
    chatml = add_template(BPE, "chatml")
    chatml.save(tmp_path / "chatml.json")
    source = write_lines(tmp_path / "a.jsonl", made_up(5))
    assert prepare(source, tokenizer=tmp_path / "chatml.json")[0] == 0
    assert load_tokenizer(tmp_path / "out").to_json() == chatml.to_json()
    own = add_template(BPE, Format({"user": "<|q|>", "assistant": "<|a|>"}, {"user": "", "assistant": "<|z|>"}))
    own.save(tmp_path / "own.json")
    assert prepare(source, tokenizer=tmp_path / "own.json")[0] == 0
    assert load_tokenizer(tmp_path / "out").to_json() == own.to_json()


def test_a_runs_folder_is_named_in_the_next_command(prepare, tmp_path):
    run = tmp_path / "run"
    (run / "ckpt").mkdir(parents=True)
    BPE.save(run)
    said = prepare(write_lines(tmp_path / "a.jsonl", made_up(5)), tokenizer=run)[1]
    assert f"next: python train.py --init_from={run} --dataset={tmp_path / 'out'}\n" in said


# -----------------------------------------------------------------------------
# Kills

KILLER = """
import os, runpy, shutil, signal, sys
root, base, old, new, tokenizer, step = sys.argv[1:]
sys.path[:0] = [root, os.path.join(root, "data")]
import chats, common, tiktoken  # once, before the forks
from tokenizer import load_tokenizer
load_tokenizer(tokenizer)

def child(k, folder):
    count = 0
    def deadly(call):
        def wrapper(*arguments, **keywords):
            nonlocal count
            if count == k:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*arguments, **keywords)
        return wrapper
    os.fsync = lambda handle: None  # a kill loses nothing that the system has
    for name in ("mkdir", "open", "fsync", "replace", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    for kind in (common.DatasetWriter, common.BitFile) if old == "none" else ():
        kind.write = deadly(kind.write)
    sys.argv = ["prepare.py", f"--input={new}", f"--out_dir={folder}", f"--tokenizer={tokenizer}", "--block_size=128"]
    runpy.run_path(os.path.join(root, "data", "chat", "prepare.py"), run_name="__main__")

common.SHARD_TOKENS = 1400
k, status = 0, 1
while status != 0:
    folder = os.path.join(base, str(k))
    if old != "none":
        shutil.copytree(old, folder)
    pid = os.fork()
    if pid == 0:
        child(k, folder)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), status
    k += int(step)
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False])
def test_killed_before_each_change_of_the_disk(fresh, prepare, tmp_path, monkeypatch):
    """SIGKILL leaves the earlier dataset, the new one, or INCOMPLETE; the same command then writes the same bytes."""
    monkeypatch.setattr(common, "SHARD_TOKENS", 1400)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    wanted = {}
    for name, count in (("old", 50), ("new", 25)):
        source = write_lines(tmp_path / f"{name}.jsonl", made_up(count, seed=count))
        assert prepare(source, out=name, block_size=128, val_fraction=0.05)[0] == 0
        wanted[name] = files(tmp_path / name)
    assert len(wanted["old"]) > len(wanted["new"]) > len(COMPLETE)
    base = tmp_path / "base"
    base.mkdir()
    step = 2 if fresh else 1
    arguments = [ROOT, base, "none" if fresh else tmp_path / "old", source, tmp_path / "bpe.json", step]
    done = subprocess.run([sys.executable, "-c", KILLER, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = []
    for i in range(len(list(base.iterdir())) + fresh):  # the first kill leaves no folder
        folder = base / str(i * step)
        left = files(folder) if folder.exists() else {}
        found = {name: raw for name, raw in left.items() if not name.endswith(".writing")}
        seen.append(next((name for name in wanted if found == wanted[name]), "incomplete" if found else "nothing"))
        assert seen[-1] != "incomplete" or "INCOMPLETE" in found
        if i % 3 == 0 or seen[-1] == "incomplete":
            assert prepare(source, out=folder, block_size=128, val_fraction=0.05)[0] == 0
            assert files(folder) == wanted["new"]
    stages = ["nothing" if fresh else "old", "incomplete", "new"]
    assert list(dict.fromkeys(seen)) == stages and seen == sorted(seen, key=stages.index) and len(seen) > 20


# -----------------------------------------------------------------------------
# The Hub


@pytest.mark.slow
def test_the_hub_is_streamed_and_an_unfinished_run_keeps_its_commit(prepare, tmp_path, monkeypatch):
    """Against the library's own stream of local parquet files, which is the Hub's except for the network."""
    import datasets
    import huggingface_hub

    talks = made_up(40)
    rows = [{"messages": messages, "source": "x"} for messages in talks]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "h.parquet")
    commits, asked, load = ["a" * 40, "b" * 40], [], datasets.load_dataset
    breaks = [True, False]

    def local(name, configuration, split, streaming, revision):
        asked.append((name, configuration, split, revision))
        rows = load("parquet", data_files={split: [str(tmp_path / "h.parquet")]}, split=split, streaming=streaming)
        if breaks.pop(0):
            monkeypatch.setattr(type(rows), "shard", lambda self, count, i: broken())
        return rows

    def broken():
        yield {"messages": talks[0]}
        raise ConnectionError("timed\nout")

    class Hub:
        def dataset_info(self, name, revision=None):
            return type("Info", (), {"sha": commits.pop(0)})

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    settings = {"hub": "some/chats", "hub_name": "small", "hub_split": "train_sft"}
    with monkeypatch.context():
        shard = datasets.IterableDataset.shard
        code, _, errors = prepare(**settings)
        monkeypatch.setattr(datasets.IterableDataset, "shard", shard)
    assert code == 2 and errors.count("\n") == 1 and errors.rstrip().endswith("run the same command again")
    code, _, errors = prepare(**settings)
    assert code == 0, errors
    assert asked == [("some/chats", "small", "train_sft", "a" * 40)] * 2
    assert files(tmp_path / "out").keys() == COMPLETE
    assert manifest(tmp_path / "out")["source"] == {
        "name": "some/chats", "configuration": "small", "revision": "a" * 40, "split": "train_sft"}
    assert prepare(write_lines(tmp_path / "a.jsonl", talks), out="file")[0] == 0
    assert manifest(tmp_path / "out")["splits"] == manifest(tmp_path / "file")["splits"]


# -----------------------------------------------------------------------------
# verify.py


def flip(folder, name):
    path = folder / name
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def clear(folder, kind, position):
    """Set a bit of train to 0 and its digest to the new one."""
    path = folder / f"train_000000.{kind}"
    raw = bytearray(path.read_bytes())
    raw[position // 8] &= ~(1 << position % 8)
    path.write_bytes(raw)
    digest = common.file_sha256(path)
    edit(folder, lambda m: m["splits"]["train"]["shards"][0][kind].update(sha256=digest))


CHANGES = {
    "flipped bit": (lambda f: flip(f, "val_000000.learned"), "val_000000.learned was changed after it was written"),
    "truncated": (lambda f: os.truncate(f / "train_000000.begins", 5), "train_000000.begins has 5 bytes, not the"),
    "missing": (lambda f: (f / "train_000000.learned").unlink(), "train_000000.learned is missing"),
    "another": (lambda f: (f / "train_000003.begins").touch(), "train_000003.begins is in no manifest"),
    "rows": (lambda f: edit(f, lambda m: m["rows"].update(train=1)), "which are not 1 rows of 256"),
    "learned": (lambda f: edit(f, lambda m: m["documents"]["learned"].update(val=1)), "the manifest says 1"),
    "kept": (lambda f: edit(f, lambda m: m["documents"].update(kept=7)), "conversations, the manifest says 7"),
    "row start": (lambda f: clear(f, "begins", 256), "1 rows of train have nothing to learn, or learn their first"),
    "no bits": (lambda f: edit(f, lambda m: m["splits"]["val"]["shards"][0].pop("begins")), "is not a manifest"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_verify_names_each_change(change, prepare, tmp_path):
    assert prepare(write_lines(tmp_path / "a.jsonl", made_up(40)))[0] == 0
    assert not list(verify.dataset_faults(tmp_path / "out"))
    spoil, named = CHANGES[change]
    spoil(tmp_path / "out")
    faults = list(verify.dataset_faults(tmp_path / "out"))
    assert any(named in fault for fault in faults), faults


# -----------------------------------------------------------------------------
# Shakespeare

PLAY = """ANNA:
Who comes?

BEN:
A friend.

ANNA:
What friend?

BEN:
Ben.

BEN:
Twice, the same speaker answers nobody.

First Citizen:
{long}
ANNA:
A short one.

CARL:

ANNA:
Nobody said a word before.

BEN:
But you did.
"""


@pytest.fixture
def play(call_script, tmp_path):
    long = "".join(f"This is line {i} of a long speech{',.'[i % 2]}\n" for i in range(12))
    text = PLAY.format(long=long) + "\n" + "".join(f"ANNA:\nOne more {i}?\n\nBEN:\nYes, {i}.\n\n" for i in range(8))
    (tmp_path / "play.txt").write_text(text)

    def play(**settings):
        keys = {"input": tmp_path / "play.txt", "out_dir": tmp_path / "out", "longest": 100, **settings}
        return call_script("data/shakespeare_chat/prepare.py", *(f"--{key}={value}" for key, value in keys.items()))

    return play


def test_speeches_become_talks(play, tmp_path):
    code, _, errors = play()
    assert code == 0, errors
    text = (tmp_path / "play.txt").read_text()
    talks = talks_of(tmp_path / "out")
    assert talk("Who comes?", "A friend.", "What friend?", "Ben.", system="BEN") in talks
    assert talk("A friend.", "What friend?", system="ANNA") in talks
    answers = [(t[0]["content"], m["content"]) for t in talks for m in t if m["role"] == "assistant"]
    assert len(set(answers)) == len(answers)
    assert ("BEN", "Twice, the same speaker answers nobody.") not in answers
    assert ("ANNA", "Nobody said a word before.") not in answers and ("BEN", "But you did.") in answers
    assert all(content in text for t in talks for content in (message["content"] for message in t))
    first = next(answer for name, answer in answers if name == "First Citizen")
    assert first.startswith("This is line 0") and first.endswith(".") and len(first) > 60
    question = next(t[1]["content"] for t in talks if t[2]["content"] == "A short one.")
    assert question.endswith("This is line 11 of a long speech.") and question.startswith("This is line")
    assert manifest(tmp_path / "out")["documents"]["cut"] == 2
    assert not list(verify.dataset_faults(tmp_path / "out"))
    wanted = add_template(CharTokenizer.from_text(text), "minichat")
    assert load_tokenizer(tmp_path / "out").to_json() == wanted.to_json()


def test_no_talk_crosses_the_border(play, tmp_path):
    text = (tmp_path / "play.txt").read_text()
    for val_fraction in (0.1, 0.12, 0.14, 0.16):
        assert play(val_fraction=val_fraction)[0] == 0
        border = int(len(text) * (1 - val_fraction))
        template = Template(load_tokenizer(tmp_path / "out"))
        for split, part in (("train", text[:border]), ("val", text[border:])):
            for ids, _ in conversations_of(tmp_path / "out", split):
                assert all(message["content"] in part for message in template.decode(ids)[1:])


def test_a_text_without_speeches_is_named(play, tmp_path):
    (tmp_path / "play.txt").write_text("To be or not to be.\n" * 50)
    code, _, errors = play()
    assert code == 2 and errors.count("\n") == 1 and 'below a line "NAME:"' in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path(MIRROR, TINY).is_file(), reason=f"MINICHAT_MIRROR has no {TINY}")
def test_tiny_shakespeare(call_script, tmp_path):
    code, said, errors = call_script("data/shakespeare_chat/prepare.py", f"--out_dir={tmp_path / 'out'}")
    assert code == 0, errors
    text = Path(MIRROR, TINY).read_text(encoding="utf-8")
    made = load_tokenizer(tmp_path / "out")
    base = CharTokenizer.from_text(text)
    assert made.chars == base.chars and list(made.special_tokens)[:2] == list(base.special_tokens)
    documents = manifest(tmp_path / "out")["documents"]
    assert documents["speeches"] == 7222 and documents["kept"] == 5725
    assert not list(verify.dataset_faults(tmp_path / "out"))
    ids, learned, _ = read_rows(tmp_path / "out", "val")
    assert ids.shape == (479, 256) and 0.35 < learned.mean() < 0.45
    for talk in talks_of(tmp_path / "out"):
        assert all(len(message["content"]) <= 100 for message in talk)
