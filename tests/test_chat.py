"""A talk in a terminal, as a user types it and sees it: over pipes, on a pseudo-terminal, in tmux."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import chat
import checkpoint
import infer
from conversation import Template, add_template, check_messages
from export import NoOptimizer
from inference.sampling import Sampling
from inference.terminal import Keyboard
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
CHARS = "\n\t \x1b\x07\x9b!\"',./?<|>[" + "".join(map(chr, range(97, 123))) + "0123456789HI\\"
PATIENCE = 300  # seconds for something to appear; only a failing test waits so long
WITH_CHARS = add_template(CharTokenizer(CHARS), "minichat")
WITH_BYTES = add_template(BPETokenizer([bytes([i]) for i in range(256)]), "minichat")


def ids_of(tokenizer, *parts):
    """Ids of texts, in which names of special tokens are these."""
    return tokenizer.encode("".join(parts), special=True)


def model_of(tokenizer, followers, block_size):
    """A model that knows one thing: which tokens follow a token. `followers`: id -> ids, each as likely as the others.

    The embedding of a token is an axis of its own, the blocks add nothing, and the head reads the axis.
    """
    torch.manual_seed(0)
    width = -(-tokenizer.vocab_size // 64) * 64
    model = GPT(GPTConfig(block_size=block_size, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=width,
                          tie_weights=False, zero_init=True))
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.copy_(torch.eye(width))
        for token, after in followers.items():
            model.lm_head.weight[after, token] = 30.0
    return model


def chain(tokenizer, *parts):
    """Followers of a model that always answers with this text: no token may occur twice in it."""
    ids = ids_of(tokenizer, "<|assistant|>", *parts)
    assert len(set(ids)) == len(ids)
    return {token: [after] for token, after in zip(ids, ids[1:], strict=False)}


def write_run(folder, tokenizer, followers, block_size=128):
    """The folder of a run with this model. -> its path"""
    model = model_of(WITH_CHARS if tokenizer is None else tokenizer, followers, block_size)
    state = {"step": 1, "val_loss": None, "model": vars(model.config), "config": {"dataset": ""}}
    checkpoint.save(folder, model, NoOptimizer(), state)
    if tokenizer:
        tokenizer.save(folder)
    return folder


def write_polite(folder):
    """A run that answers "Hi!". -> its path"""
    return write_run(folder, WITH_CHARS, chain(WITH_CHARS, "Hi!<|end|>"))


def write_endless(folder):
    """A run that answers "abababa" and so on, for tens of thousands of tokens. -> its path"""
    followers = chain(WITH_CHARS, "ab")
    followers[WITH_CHARS.encode("b")[0]] = WITH_CHARS.encode("a")
    return write_run(folder, WITH_CHARS, followers, block_size=30_000)


@pytest.fixture(scope="module")
def polite(tmp_path_factory):
    return write_polite(tmp_path_factory.mktemp("runs") / "polite")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return write_endless(tmp_path_factory.mktemp("runs") / "endless")


@pytest.fixture
def asked(monkeypatch):
    """What the engine was asked: (ids, Sampling) of each request."""
    requests = []
    submit = infer.Engine.submit

    def noted(self, ids, sampling):
        request = submit(self, ids, sampling)
        requests.append((ids, sampling))
        return request

    monkeypatch.setattr(infer.Engine, "submit", noted)
    return requests


@pytest.fixture
def talk_to(call_script):
    """talk_to(run, *keys, lines=b"...") -> (exit code, stdout, stderr after what was loaded)"""

    def talk_to(run, *keys, lines=b""):
        code, out, err = call_script("chat.py", f"--out_dir={run}", "--device=cpu", *keys, stdin=lines)
        return code, out, re.sub(r"\A.*: step 1, not evaluated\ncpu .*\n", "", err)

    return talk_to


def messages_of(*texts):
    """A talk that begins with the user's, from its texts."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def ids_for(*texts, system=""):
    return Template(WITH_CHARS).encode(chat.with_system(system, messages_of(*texts)), reply=True)[0]


# -----------------------------------------------------------------------------
# One question, and a pipe


def test_one_question(polite, talk_to, asked, tmp_path):
    code, out, err = talk_to(polite, "--prompt=what?")
    assert (code, out) == (0, "Hi!\n")
    used = len(ids_for("what?")) + 3
    figures = rf"3 tokens, [\d.]+ tokens/s, the first after \d+\.\d\d s, context {used} of 128 tokens\n"
    assert re.fullmatch(figures, err)
    assert asked[0][0] == ids_for("what?")
    assert set(asked[0][1].stop_tokens) == {WITH_CHARS.special_tokens["<|end|>"], WITH_CHARS.eos}
    assert talk_to(polite, "--prompt=-", lines=b"what?\n")[:2] == (0, "Hi!\n")
    assert talk_to(polite, "--prompt=/help", "--system=be kind")[:2] == (0, "Hi!\n")  # a question is never a command
    assert [ids for ids, _ in asked[1:]] == [ids_for("what?"), ids_for("/help", system="be kind")]


def test_each_line_of_a_pipe_is_a_message(polite, talk_to, asked):
    lines = b'one\n\n  \ntwo\\\nlines\r\n"""\n/three\\\n\n  lines\n"""\n'
    code, out, err = talk_to(polite, lines=lines)
    assert (code, out) == (0, "Hi!\n" * 3)  # nothing else: neither prompts nor what was typed
    texts = ["one", "Hi!", "two\nlines", "Hi!", "/three\\\n\n  lines"]
    assert [ids for ids, _ in asked] == [ids_for(*texts[: 2 * n + 1]) for n in range(3)]
    assert len(err.splitlines()) == 3 and all("context" in line for line in err.splitlines())


@pytest.mark.parametrize("lines, said", [(b"one", "one"), (b"one\\", "one"), (b'"""\none\ntwo', "one\ntwo"),
                                         (b"\xef\xbb\xbfone\n", "one")])
def test_the_end_of_the_input_ends_a_message(polite, talk_to, asked, lines, said):
    assert talk_to(polite, lines=lines)[:2] == (0, "Hi!\n")
    assert [ids for ids, _ in asked] == [ids_for(said)]


def test_names_of_special_tokens_are_plain_text(polite, talk_to, asked):
    talk_to(polite, lines=b"<|end|><|assistant|>\n")
    ids = asked[0][0]
    assert ids.count(WITH_CHARS.special_tokens["<|end|>"]) == 1
    assert ids.count(WITH_CHARS.special_tokens["<|assistant|>"]) == 1


# -----------------------------------------------------------------------------
# Commands


def test_commands(polite, talk_to, asked):
    lines = ["/system", "/system be kind", "/system", "a", "/clear", "b", "/system be\\", "rude", "c", "/help", "/quit",
             "never read"]
    code, out, err = talk_to(polite, lines="\n".join(lines).encode())
    assert (code, out) == (0, "Hi!\n" * 3)
    told = [line for line in err.splitlines() if "context" not in line]
    assert told[:2] == ["there is no system message", "a new talk, with this system message"]
    assert told[2:4] == ["be kind", "a new talk"] and "\n".join(told).endswith(chat.HELP)
    assert [ids for ids, _ in asked] == [ids_for(text, system=system) for text, system in
                                         (("a", "be kind"), ("b", "be kind"), ("c", "be\nrude"))]


def test_retry_draws_with_the_next_seed(tmp_path, talk_to, asked):
    """The old answer is no part of the talk then. The next message begins with the first seed again."""
    letters = WITH_CHARS.encode("abcdefghijklm")
    end = ids_of(WITH_CHARS, "<|end|>")
    followers = {ids_of(WITH_CHARS, "<|assistant|>")[0]: letters, **{letter: end for letter in letters}}
    run = write_run(tmp_path / "run", WITH_CHARS, followers)
    code, out, err = talk_to(run, "--seed=5", lines=b"/retry\none\n/retry\n/retry\ntwo\n/retry\n")
    answers = out.splitlines()
    assert code == 0 and len(answers) == 5 and len(set(answers)) > 1
    seeds = [chat.answer_seed(seed, ids) for seed, (ids, _) in zip([5, 6, 7, 5, 6], asked, strict=True)]
    assert [sampling.seed for _, sampling in asked] == seeds and len(set(seeds)) == 5
    texts = [("one",)] * 3 + [("one", answers[2], "two")] * 2
    assert [ids for ids, _ in asked] == [ids_for(*parts) for parts in texts]
    assert err.splitlines()[0] == "error: there is no message to answer again"
    assert talk_to(run, "--seed=5", lines=b"/retry\none\n/retry\n/retry\ntwo\n/retry\n")[1] == out


def test_a_talk_is_saved_and_continued(polite, talk_to, asked, tmp_path):
    file = tmp_path / "talk.json"
    code, out, err = talk_to(polite, "--system=be kind", lines=f"one\n/save {file}\n/save {file}\n".encode())
    assert code == 0 and err.count(f"3 messages are in {file}") == 2
    (line,) = file.read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert record == {"messages": [{"role": "system", "content": "be kind"}, *messages_of("one", "Hi!")],
                      "system": "be kind"}
    assert check_messages(record["messages"]) == record["messages"]

    asked.clear()
    code, out, err = talk_to(polite, lines=f"gone\n/load {file}\ntwo\n/system\n".encode())
    assert code == 0 and f"{file}: a talk of 3 messages\n" in err and err.endswith("be kind\n")
    assert talk_to(polite, f"--load={file}", "--prompt=two")[0] == 0
    assert talk_to(polite, f"--load={file}", "--system=be rude", "--prompt=two")[0] == 0
    systems = ("be kind", "be kind", "be rude")
    assert [ids for ids, _ in asked[1:]] == [ids_for("one", "Hi!", "two", system=system) for system in systems]


def test_a_stopped_answer_stays_marked(polite, talk_to, tmp_path):
    """Over loading and saving. The system message may also stand beside the messages alone."""
    messages = messages_of("one", "Hi")
    messages[1]["stopped"] = True
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({"messages": messages, "system": "be kind"}), encoding="utf-8")
    assert talk_to(polite, lines=f"/load {file}\n/save {file}\n".encode())[0] == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["messages"] == [{"role": "system", "content": "be kind"}, *messages]


def test_what_fails_is_one_line_and_the_talk_stays(polite, talk_to, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine", encoding="utf-8")
    Path("list.json").write_text("[1]", encoding="utf-8")
    Path("late.json").write_text('{"messages": [{"role": "user", "content": "é"}]}', encoding="utf-8")
    Path("deep.json").write_text("[" * 100_000, encoding="utf-8")
    Path("folder").mkdir()
    faults = {
        "/sav talk.json": "did you mean /save?", "/usr/bin": "no command /usr/bin", "/": "no command /",
        "/save": "/save FILE", "/load": "/load FILE", "/load none.json": "none.json", "/load folder": "folder",
        "/load notes.txt": "notes.txt is not a saved talk", "/load list.json": '"messages"',
        "/load late.json": "'é'", "/load deep.json": "deep.json", "/save notes.txt": "notes.txt",
        "/save folder": "folder", "/save none/talk.json": "none", "/system é": "'é'", "bé": "'é'",
        "x" * 300: "shorten it", "/save ~no-one/talk.json": "~no-one", "/load ~no-one": "~no-one",
        f"/save {'x' * 300}": "too long", "/load a\0b": "null",
    }
    for fault, named in faults.items():
        asked.clear()
        code, out, err = talk_to(polite, lines=f"one\n{fault}\ntwo\n".encode())
        assert (code, out) == (0, "Hi!\n" * 2), fault
        (error,) = [line for line in err.splitlines() if "context" not in line or line.startswith("error")]
        assert error.startswith("error: ") and named in error, fault
        assert [ids for ids, _ in asked] == [ids_for("one"), ids_for("one", "Hi!", "two")], fault
    assert Path("notes.txt").read_text(encoding="utf-8") == "mine"
    assert sorted(os.listdir()) == ["deep.json", "folder", "late.json", "list.json", "notes.txt"]
    code, out, err = talk_to(polite, lines=b'one\n\xff\n"""\ntwo\n\xe9\n"""\nthree\n/save none\n')
    assert out == "Hi!\n" * 2 and err.count("error: the message is not UTF-8") == 2
    assert json.loads(Path("none").read_text(encoding="utf-8"))["messages"] == messages_of("one", "Hi!", "three", "Hi!")


# -----------------------------------------------------------------------------
# Answers that are not as usual


def test_an_answer_that_is_cut_says_so(endless, talk_to, tmp_path):
    code, out, err = talk_to(endless, "--max_new_tokens=5", "--prompt=go")
    assert (code, out) == (0, "ababa\n") and err.endswith("cut at max_new_tokens=5\n")
    followers = chain(WITH_CHARS, "a")
    followers[WITH_CHARS.encode("a")[0]] = WITH_CHARS.encode("a")
    run = write_run(tmp_path / "run", WITH_CHARS, followers, block_size=32)
    code, out, err = talk_to(run, "--prompt=go")
    assert code == 0 and re.fullmatch("a+\n", out)
    assert err.endswith("context 32 of 32 tokens, cut: the context is full\n")


def test_an_empty_answer(talk_to, tmp_path):
    run = write_run(tmp_path / "run", WITH_CHARS, chain(WITH_CHARS, "<|end|>"))
    code, out, err = talk_to(run, lines=b"one\ntwo\n")
    assert (code, out) == (0, "\n\n")
    assert [line.startswith("0 tokens, context ") and line.endswith(", an empty answer") for line in err.splitlines()] \
        == [True, True]


def test_special_tokens_within_an_answer_are_not_shown(talk_to, tmp_path):
    run = write_run(tmp_path / "run", WITH_CHARS, chain(WITH_CHARS, "a<|user|>b<|system|>c<|bos|><|end|>"))
    assert talk_to(run, "--prompt=go")[1] == "abc\n"


def test_the_oldest_turns_are_dropped_and_that_is_said(polite, talk_to, asked, tmp_path):
    lines = [f"message {i}" for i in range(12)]
    file = tmp_path / "talk.json"
    code, out, err = talk_to(polite, "--system=be kind", "--max_new_tokens=20",
                             lines="\n".join([*lines, f"/save {file}", "/clear", "again"]).encode())
    assert (code, out) == (0, "Hi!\n" * 13)
    template = Template(WITH_CHARS)
    dropped = []
    for i, (ids, sampling) in enumerate(asked[:12]):
        assert len(ids) + sampling.max_new_tokens <= 128 and sampling.max_new_tokens == 20
        system, *kept = template.decode(ids)[:-1]  # behind them is the answer that begins
        assert system["content"] == "be kind" and kept[0]["role"] == "user" and kept[-1]["content"] == lines[i]
        dropped.append(2 * i + 1 - len(kept))
    assert dropped == sorted(dropped) and dropped[0] == 0 and dropped[-1] > 10
    figures = [line for line in err.splitlines() if "context" in line]
    said = [re.search(r"the oldest turns were dropped \((\d+) messages\)", line) for line in figures]
    assert [int(match[1]) if match else 0 for match in said] == [*dropped, 0]
    assert len(json.loads(file.read_text(encoding="utf-8"))["messages"]) == 25  # all of them


def test_the_answer_keeps_a_quarter_of_the_context(polite, talk_to, asked):
    for most, room in ((512, 96), (8, 120)):
        longest = room - len(ids_for(""))
        code, out, err = talk_to(polite, f"--max_new_tokens={most}", lines=f"{'x' * (longest + 1)}\n{'x' * longest}\n"
                                 .encode())
        assert out == "Hi!\n" and "error: the last message takes" in err
        assert len(asked[-1][0]) == room


@pytest.mark.parametrize("most, shown", [(1, ""), (2, "é"), (3, "é"), (4, "é"), (5, "é€"), (6, "é€")])
def test_never_half_a_character(most, shown, talk_to, tmp_path):
    """An answer of é, € and the first byte of another, cut after each byte."""
    raw = "é€".encode() + b"\xf0"
    ids = [WITH_BYTES.special_tokens["<|assistant|>"], *raw]
    followers = {token: [after] for token, after in zip(ids, [*ids[1:], WITH_BYTES.special_tokens["<|end|>"]],
                                                        strict=True)}
    run = write_run(tmp_path / "run", WITH_BYTES, followers, block_size=64)
    assert talk_to(run, f"--max_new_tokens={most}", "--prompt=go")[:2] == (0, shown + "\n")


@pytest.fixture(scope="module")
def byte_engine():
    return infer.Engine(model_of(WITH_BYTES, {}, 256), WITH_BYTES, max_tokens=256)


class Screen(io.StringIO):
    def isatty(self):
        return True


@given(st.lists(st.one_of(st.sampled_from([i for i in range(256) if i != ord("<")]),
                          st.sampled_from(sorted(WITH_BYTES.special_tokens.values()))), max_size=40), st.booleans())
def test_whatever_the_model_says_is_whole_text_without_special_tokens(byte_engine, said, on_a_terminal):
    """Bytes and special tokens in any order: what is shown is UTF-8, and on a terminal nothing that it obeys."""
    template = Template(WITH_BYTES)
    coming = iter([*said, template.end])

    def forward(parts):
        logits = torch.zeros(1, 1, WITH_BYTES.vocab_size)
        logits[0, 0, next(coming)] = 1
        return logits

    screen = Screen() if on_a_terminal else io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", io.StringIO())
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(byte_engine, "forward", forward)
        sampling = Sampling(max_new_tokens=100, temperature=0, stop_tokens=template.stops)
        talk = chat.Talk(byte_engine, template, sampling, Keyboard())
        request = chat.answer(talk, messages_of("go"))
        template.encode(talk.turns)  # what was said can be read in the next turn
    ends = [i for i, token in enumerate(said) if token in template.stops]
    drawn = said[: ends[0]] if ends else said
    assert request.tokens == drawn
    text = screen.getvalue()
    text.encode("utf-8")
    assert not any(name in text for name in WITH_BYTES.special_tokens)
    whole = "".join(map(WITH_BYTES.stream_decoder(), drawn))
    assert talk.turns[-1]["content"] == whole
    kept = [c for c in whole if not on_a_terminal or c in "\n\t" or c.isprintable() or ord(c) > 0x9F]
    assert text == "".join(kept) + "\n"


# -----------------------------------------------------------------------------
# What cannot begin


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    """Folders with runs that cannot be talked with, and files."""
    folder = tmp_path_factory.mktemp("unusable")
    write_run(folder / "plain", CharTokenizer(CHARS), {})
    write_run(folder / "bare", None, {})
    write_run(folder / "other", WITH_CHARS, {})
    CharTokenizer(CHARS + "".join(map(chr, range(0x400, 0x480)))).save(folder / "other")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    return folder


@pytest.mark.parametrize("run, key, named", [
    ("plain", "--prompt=a", "data/chat/prepare.py"), ("plain", "--template=minichat", "<|user|>"),
    ("plain", "--template=mini", "minichat"), ("bare", "--prompt=a", "tokenizer"), ("other", "--prompt=a", "model"),
    ("polite", "--template=minichat", "already"), ("polite", "--prompt=", "--prompt="),
    ("polite", "--prompt=-", "--prompt"), ("polite", "--prompt=é", "'é'"), ("polite", "--system=é", "'é'"),
    ("polite", f"--prompt={'x' * 300}", "shorten"),
    ("polite", "--load=none.json", "none.json"), ("polite", "--load=notes.txt", "notes.txt"),
    ("polite", "--temperature=-1", "temperature=-1"), ("polite", "--rope_scaling=yarn", "rope"),
    ("polite", "--rope_factor=0.5", "rope_factor"), ("polite", "--ckpt=7", "7"), ("polite", "--quantize=int3", "int3"),
    ("none", "--prompt=a", "none"),
])
def test_what_cannot_begin_is_one_line(run, key, named, unusable, polite, talk_to, monkeypatch):
    monkeypatch.chdir(unusable)
    code, out, err = talk_to(polite if run == "polite" else run, key)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: ") and named in err


def test_a_template_for_a_run_without_one(talk_to, tmp_path, asked):
    """The special tokens are there, and only the tokenizer does not say how they are used."""
    run = write_run(tmp_path / "run", WITH_CHARS.changed(template=None), chain(WITH_CHARS, "Hi!<|end|>"))
    assert talk_to(run, "--template=minichat", "--prompt=what?")[:2] == (0, "Hi!\n")
    assert asked[0][0] == ids_for("what?")


# -----------------------------------------------------------------------------
# Processes: signals, and a reader that has enough


@pytest.fixture
def start():
    """start(run, *keys, **options of Popen) starts chat.py, which the end of the test kills."""
    started = []

    def start(run, *keys, **options):
        command = [sys.executable, str(ROOT / "chat.py"), f"--out_dir={run}", "--device=cpu", *keys]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        environment.pop("NO_COLOR", None)
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        started.append(subprocess.Popen(command, env=environment, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


LONG = "--max_new_tokens=29000"


@pytest.mark.slow
def test_interrupts_and_the_end(endless, start):
    """Over a pipe: SIGINT stops an answer and not the program, and ends it while it waits. SIGTERM always ends it."""
    waits, ends = start(endless, LONG), start(endless, LONG)
    for process in (waits, ends):
        process.stdin.write(b"go\n")
        process.stdin.flush()
        assert process.stdout.read(4) == b"abab"
    waits.send_signal(signal.SIGINT)
    ends.send_signal(signal.SIGTERM)
    said = waits.stdout.readline().decode()
    assert re.fullmatch("[ab]+\n", said) and len(said) < 29_000
    for line in iter(waits.stderr.readline, b""):
        if b"stopped" in line:
            break
    for _ in range(PATIENCE // 5):  # Python sees a signal that comes just before it waits only with the next one
        waits.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            waits.wait(5)
            break
    assert waits.returncode == 130 and ends.wait(PATIENCE) == 128 + signal.SIGTERM
    assert b"Traceback" not in waits.stderr.read() + ends.stderr.read()


def test_a_reader_that_has_enough(endless, start):
    process = start(endless, LONG, "--prompt=go")
    assert process.stdout.read(4) == b"abab"
    process.stdout.close()
    assert process.wait(PATIENCE) == 0
    err = process.stderr.read()
    assert len(err.splitlines()) == 2 and b"not evaluated" in err  # only what was loaded


# -----------------------------------------------------------------------------
# Terminals


@pytest.fixture
def colourful(tmp_path):
    """A run whose answer would colour a terminal, ring its bell, and set its title."""
    return write_run(tmp_path / "run", WITH_CHARS, chain(WITH_CHARS, "\x1b[31m\x07\ta\x9b2b\nc<|end|>"))


def read_until(descriptor, end):
    """Bytes from a pseudo-terminal, until they end with `end`."""
    raw = b""
    while end not in raw:
        raw += os.read(descriptor, 1)
    return raw


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_the_terminal_is_as_before_at_the_end(polite, start):
    """SIGTERM ends a talk that waits for a message, where readline has switched off the terminal's echo."""
    import termios

    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    process = start(polite, stdin=slave, stdout=slave)
    read_until(master, b"> ")
    assert termios.tcgetattr(slave) != before
    for _ in range(PATIENCE):  # Python sees a signal that comes just before readline waits only with the next one
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
            break
    assert process.returncode == 128 + signal.SIGTERM
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_terminal_never_gets_control_characters(colourful, start, talk_to):
    """Byte for byte, on a pseudo-terminal; a pipe gets the text as it is."""
    assert talk_to(colourful, "--prompt=go")[1] == "\x1b[31m\x07\ta\x9b2b\nc\n"
    master, slave = os.openpty()
    process = start(colourful, stdin=slave, stdout=slave)
    os.close(slave)
    read_until(master, b"> ")
    os.write(master, b"go\n")
    assert read_until(master, b"> ").endswith(b"[31m\ta2b\r\nc\r\n\x1b[?2004h> ")  # the last: pasted text is marked
    os.write(master, b"\x04")  # Ctrl-D
    assert process.wait(PATIENCE) == 0
    assert b"\x1b" not in process.stderr.read()  # a pipe: no colours
    os.close(master)


class Pane:
    """chat.py in a pane of tmux, on a server of its own."""

    def __init__(self, folder, command):
        self.tmux = ["tmux", "-S", str(folder / "tmux"), "-f", os.devnull]
        self.run("new-session", "-d", "-x", "100", "-y", "50", "-s", "chat", command)

    def run(self, *words):
        done = subprocess.run([*self.tmux, *words], capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    def keys(self, *names):
        self.run("send-keys", "-t", "chat", *names)

    def type(self, text):
        self.run("send-keys", "-t", "chat", "-l", text)
        self.keys("Enter")

    def paste(self, text):
        """As a terminal pastes: between marks, if the program has asked for them."""
        self.run("set-buffer", text)
        self.run("paste-buffer", "-p", "-t", "chat")

    def text(self):
        lines = self.run("capture-pane", "-p", "-J", "-S", "-", "-t", "chat").rstrip().splitlines()
        return "\n".join(line.rstrip() for line in lines)

    def wait(self, pattern):
        """Poll until the pane shows it. -> the pane's text"""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, text := self.text()):
            assert time.monotonic() < end, f"never seen: {pattern}\n{text}"
            time.sleep(0.02)
        return text


@pytest.fixture
def pane(tmp_path):
    """pane(run, *keys) -> a Pane in which chat.py waits for a message; the shell prints its exit code at the end."""
    panes = []

    def open_pane(run, *keys):
        command = [sys.executable, str(ROOT / "chat.py"), f"--out_dir={run}", "--device=cpu", *keys]
        shell = f"cd '{tmp_path}'; OMP_NUM_THREADS=1 {' '.join(command)}; echo \"it ended with $?\"; cat"
        panes.append(Pane(tmp_path, shell))
        panes[-1].wait(r"Ctrl-D ends the talk\n>$")
        return panes[-1]

    yield open_pane
    for opened in panes:
        opened.run("kill-server")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_a_talk_in_a_real_terminal(endless, pane, tmp_path):
    screen = pane(endless, LONG, "--seed=1")
    screen.type("/help")
    screen.wait(r"/retry +another answer(.*\n)+>$")

    screen.type("go on")
    screen.wait(r"> go on\nabab")
    screen.keys("C-c")
    screen.wait(r"(?s)\n[ab]+(\^C)?[ab]*\n[\d,]+ tokens, .* of 30,000 tokens, stopped\n>$")

    screen.paste("two lines\nwith \\\\ and\n/clear")  # one message: it is not sent before Enter
    screen.wait(r"two lines\nwith.*\n/clear$")
    screen.keys("Enter")
    screen.wait(r"(?s)/clear\nabab")
    screen.keys("C-c")
    screen.wait(r"(?s)/clear\n.*stopped\n>$")

    screen.keys("Up", "Up", "BSpace", "BSpace", "BSpace")  # "go on" from the history, edited
    screen.wait(r"> go$")
    screen.keys("C-c")  # clears the line
    screen.wait(r"> go(\^C)?\nCtrl-C once more ends the talk\n>$")
    screen.type("/save talk.json")
    screen.wait(r"4 messages are in talk.json\n>$")

    screen.type('"""')
    screen.wait(r"\n\.\.\.$")
    screen.type("abandoned")
    screen.keys("C-c")
    screen.wait(r"abandoned\n\.\.\.\s*(\^C)?\s*\nCtrl-C once more ends the talk\n>$")
    screen.keys("C-c")
    screen.wait(r"it ended with 130")

    turns = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert turns[0]["content"] == "go on" and turns[2]["content"] == "two lines\nwith \\\\ and\n/clear"
    for turn in turns[1::2]:
        assert re.fullmatch("a[ab]+", turn["content"]) and turn["stopped"] is True
