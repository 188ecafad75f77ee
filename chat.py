"""
Talk with a model in a terminal.

    python chat.py --out_dir=out/chat_shakespeare
    python chat.py --out_dir=out/chat_shakespeare --prompt="Who is there?"
    cat questions.txt | python chat.py --out_dir=out/chat_shakespeare  # each line a message

The run's tokenizer has a chat template (conversation.py), which data/chat/prepare.py gave it. Each turn is one request
to the engine (infer.py) with the ids of the whole talk. Answers go to stdout, everything else to stderr.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from configurator import Settings, configure, fail
from conversation import TEMPLATES, Template, check_messages, template_of
from device import pick_device, pick_dtype
from files import decode_text, sha256, write_whole
from infer import Engine
from infer import load as load_run
from inference.calibration import convert_run
from inference.sampling import Sampling, sampling_from
from inference.terminal import Keyboard, complain, ends_in_one_line, is_terminal, note, show
from keys import nearest

# -----------------------------------------------------------------------------
out_dir = "out"             # run folder, or one checkpoint's folder
ckpt = "latest"             # which checkpoint: latest | best | a step
template = ""               # for a run whose tokenizer has no chat template: minichat | chatml | smollm2 | nanochat
system = ""                 # the system message, which comes first and always stays
prompt = ""                 # one question: print the answer and end; - reads it from stdin
load = ""                   # a talk that /save wrote, to continue
max_new_tokens = 512        # most tokens in an answer
temperature = 0.8           # below 1: bolder about what is likely; 0: greedy, always the most likely token
top_k = 200                 # draw among the k most likely tokens; 0: among all
top_p = 1.0                 # draw among the smallest set of tokens whose probability reaches top_p; 1: among all
min_p = 0.0                 # draw among tokens with at least this share of the largest probability; 0: among all
repetition_penalty = 1.0    # above 1: tokens that were there before become less likely
seed = 1337                 # of the answers, together with what was said; /retry takes the next one
device = "auto"             # auto | cpu | cuda | cuda:N | mps
dtype = "auto"              # auto | float32 | bfloat16 | float16
quantize = ""               # int8 | int4 | int4_64 | int4_128 | fp8: weights in fewer bits; empty: as dtype says
speculate = ""              # read ahead what is proposed: lookup (from the text), or a draft run's folder; empty: no
compile: bool | None = None  # torch.compile the step of a token; none: where that pays
rope_scaling = ""           # for a longer context than the model's: none | linear | ntk | yarn; empty: the model's
rope_factor = 1.0           # with rope_scaling: context as a multiple of the one first trained at
# -----------------------------------------------------------------------------

STEPS = 1000  # of a talk, roughly: a compiled step is read from disk, but nothing is compiled for it

HELP = """\
/system TEXT   set the system message and begin a new talk; without TEXT, show it
/clear         begin a new talk, with the same system message
/retry         another answer to the last message
/save FILE     write the talk to a file
/load FILE     continue a talk that was saved
/quit          end, as Ctrl-D does
A line that ends in \\ continues on the next one. A line \"\"\" begins and ends a message of several lines.
Ctrl-C stops an answer, and what was said so far stays; where you type, it clears the line."""


# -----------------------------------------------------------------------------
# A talk


@dataclass
class Talk:
    """What was said, and who answers."""

    engine: Engine
    template: Template
    sampling: Sampling
    keyboard: Keyboard
    system: str = ""
    turns: list = field(default_factory=list)  # the messages of user and assistant
    dropped: int = 0  # so many of the oldest are no longer read: the context has no room for them
    retries: int = 0  # answers to the last message before the present one

    @property
    def context(self):
        """Tokens that the model reads at most."""
        return self.engine.model.config.block_size

    def start(self, system, turns=()):
        """Become another talk. Raises ValueError, and stays as it was, for text that the template cannot encode."""
        turns = list(turns)
        self.template.encode([*with_system(system, turns), {"role": "user", "content": ""}])
        self.system = system
        self.turns = turns
        self.dropped = 0
        self.retries = 0


def with_system(system, turns):
    """The messages of a talk, the system's first if it has one."""
    if not system:
        return list(turns)
    return [{"role": "system", "content": system}, *turns]


def answer(talk, turns, retries=0):
    """Draw and show the answer to the last of `turns`, which with it become the talk's. -> its Request

    Raises ValueError, before anything is shown or changed, if the message cannot be encoded or is too long.
    """
    most = talk.sampling.max_new_tokens
    spare = max(1, min(most, talk.context // 4))  # room that the answer has at least
    messages = with_system(talk.system, turns[talk.dropped :])
    ids, kept = talk.template.fit(messages, talk.context - spare)
    room = min(most, talk.context - len(ids))
    seed = answer_seed(talk.sampling.seed + retries, ids)
    sampling = replace(talk.sampling, max_new_tokens=room, seed=seed)
    request = talk.engine.submit(ids, sampling)
    said, times = draw(talk, request)

    message = {"role": "assistant", "content": said}
    if request.finish == "cancelled":
        message["stopped"] = True
    talk.turns = [*turns, message]
    talk.dropped += len(messages) - len(kept)
    talk.retries = retries
    note(", ".join(figures(talk, request, times) + remarks(talk, request, said)))
    return request


def answer_seed(seed, ids):
    """The seed of the answer to `ids`: the same talk gets the same answer, and another one other random numbers. With
    the same ones, a small model would begin most answers alike."""
    return int(sha256(f"{seed}/{ids}")[:15], 16)


def draw(talk, request):
    """Step until a request has finished, or Ctrl-C ends it, and show its text.

    -> (text, the clock at the start and at each token). The text ends with a whole character, even if the answer ends
    within one.
    """
    shown = 0  # characters
    times = [time.perf_counter()]
    while not request.finish:
        if talk.keyboard.pressed:
            talk.keyboard.pressed = False  # from here on, Ctrl-C is about the next message
            talk.engine.cancel(request)
            break
        before = len(request.tokens)
        talk.engine.step()
        if len(request.tokens) > before:
            times.append(time.perf_counter())
        if not request.finish:  # when it has finished, the text ends with U+FFFD for the rest of a character
            show(request.text[shown:])
            shown = len(request.text)
    decode = talk.template.tokenizer.stream_decoder()
    said = "".join(decode(token) for token in request.tokens)
    show(said[shown:] + "\n")
    return said, times


def figures(talk, request, times):
    """How many tokens, how fast, and how full the context is, as parts of a line."""
    start, *drawn = times
    parts = ["1 token" if len(drawn) == 1 else f"{len(drawn):,} tokens"]
    if len(drawn) > 1:
        parts.append(f"{(len(drawn) - 1) / (drawn[-1] - drawn[0]):.1f} tokens/s")
    if drawn:
        parts.append(f"the first after {drawn[0] - start:.2f} s")
    parts.append(f"context {len(request.ids):,} of {talk.context:,} tokens")
    return parts


def remarks(talk, request, said):
    """What is not as usual with an answer, as parts of a line."""
    parts = []
    if request.finish == "cancelled":
        parts.append("stopped")
    elif request.finish == "length" and len(request.tokens) < talk.sampling.max_new_tokens:
        parts.append("cut: the context is full")
    elif request.finish == "length":
        parts.append(f"cut at max_new_tokens={talk.sampling.max_new_tokens}")
    if not said.strip():
        parts.append("an empty answer")
    if talk.dropped:
        parts.append(f"the oldest turns were dropped ({talk.dropped} messages)")
    return parts


# -----------------------------------------------------------------------------
# Commands


def run_command(talk, text):
    """Do what a line with a command says. Raises ValueError, and the talk stays as it was."""
    command, *rest = text.split(maxsplit=1)
    rest = rest[0].strip() if rest else ""
    if command == "/system" and rest:
        talk.start(rest)
        note("a new talk, with this system message")
    elif command == "/system":
        note(talk.system or "there is no system message")
    elif command == "/clear":
        talk.start(talk.system)
        note("a new talk")
    elif command == "/retry":
        retry(talk)
    elif command in ("/save", "/load") and not rest:
        raise ValueError(f"{command} needs a file: {command} FILE")
    elif command == "/save":
        save_talk(talk, rest)
    elif command == "/load":
        load_talk(talk, rest)
    elif command == "/help":
        note(HELP)
    else:
        names = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
        mend = nearest(command, names) or "; /help lists the commands"
        raise ValueError(f'there is no command {command}{mend} (a message may begin with / within """)')


def retry(talk):
    """Another answer to the last message."""
    turns = list(talk.turns)
    retries = talk.retries
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()
        retries += 1
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("there is no message to answer again")
    answer(talk, turns, retries)


def save_talk(talk, path):
    """Write the talk as a line of JSON, which data/chat/prepare.py can read as well. Raises ValueError."""
    path = os.path.expanduser(path)
    messages = with_system(talk.system, talk.turns)
    if not messages:
        raise ValueError("there is nothing to save yet")
    try:
        if os.path.exists(path):
            read_talk(path)
    except ValueError as e:
        raise ValueError(f"{e}; it is not overwritten") from None
    record = {"messages": messages, "system": talk.system}
    try:
        write_whole(path, json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as e:
        raise ValueError(f"{path} cannot be written: {e.strerror or e}") from None
    note(f"{len(messages)} messages are in {path}")


def load_talk(talk, path):
    """Continue the talk in a file. Raises ValueError."""
    talk.start(*read_talk(path))
    note(f"{path}: a talk of {len(with_system(talk.system, talk.turns))} messages")


def read_talk(path):
    """A saved talk -> (system message, messages of user and assistant). Raises ValueError."""
    try:
        record = json.loads(decode_text(Path(os.path.expanduser(path)).read_bytes(), "it"))
        if not isinstance(record, dict):
            raise ValueError('expected an object with "messages"')
        messages = check_messages(record.get("messages"))
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not a saved talk: {e}") from None
    for message, original in zip(messages, record["messages"], strict=True):
        if original.get("stopped") is True:
            message["stopped"] = True
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    system = record.get("system")
    return system if isinstance(system, str) else "", messages


# -----------------------------------------------------------------------------
# The program


def load_all(c):
    """-> (Engine, Template). Prints the checkpoint and the device on stderr. Raises ValueError and OSError."""
    if c.template and c.template not in TEMPLATES:
        raise ValueError(f"--template={c.template} is not one of {', '.join(TEMPLATES)}")
    device, device_why = pick_device(c.device)
    dtype, dtype_why = pick_dtype(c.dtype, device)
    model, tokenizer, state, folder = load_run(c.out_dir, c.ckpt, device, c.rope_scaling, c.rope_factor)
    if tokenizer is None:
        raise ValueError(f"{c.out_dir} has no tokenizer.json, so there is nothing to talk with")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only "
                         f"{model.config.vocab_size:,}: it is another model's")
    template = template_of(tokenizer, c.template, c.out_dir)
    if template is None:
        raise ValueError(f"the tokenizer of {c.out_dir} has no chat template: fine-tune the run on conversations, "
                         "which data/chat/prepare.py prepares, or name the one that the model was trained with, "
                         f"--template={'|'.join(TEMPLATES)}")
    convert_run(model, dtype, c.quantize, c.out_dir, state)
    val_loss = f"val loss {state['val_loss']:.4f}" if state["val_loss"] is not None else "not evaluated"
    note(f"{folder}: step {state['step']}, {val_loss}")
    note(f"{device} ({device_why}), {str(dtype).removeprefix('torch.')} ({dtype_why})")
    engine = Engine(model, template.tokenizer, max_tokens=model.config.block_size, max_requests=1,
                    speculate=c.speculate)
    engine.try_to_compile(c.compile, STEPS, False, note)
    return engine, template


def question_of(c):
    """The text of --prompt. Raises ValueError."""
    text = c.prompt
    if text == "-":
        raw = sys.stdin.buffer.read() if sys.stdin else b""
        text = decode_text(raw, "standard input").removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise ValueError("it is empty")
    return text


def converse(talk):
    """Read messages and answer them until the end of the input. -> exit code"""
    interrupted = False  # the last thing typed was Ctrl-C
    while True:
        try:
            text, is_command = talk.keyboard.read_message()
        except EOFError:
            if is_terminal(sys.stdin):
                print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            if not is_terminal(sys.stdin):
                return 130
            print(file=sys.stderr)
            if interrupted and not talk.keyboard.begun:
                return 130
            interrupted = True
            note("Ctrl-C once more ends the talk")
            continue
        except ValueError as e:
            complain(e)
            continue
        interrupted = False
        if is_command and text.split()[0] == "/quit":
            return 0
        try:
            if is_command:
                run_command(talk, text)
            elif text.strip():
                answer(talk, [*talk.turns, {"role": "user", "content": text}])
        except ValueError as e:
            complain(e)


def main(c, given):
    """-> exit code"""
    if "prompt" in given and not c.prompt:
        fail("--prompt= is empty: an unset variable?")
    try:
        sampling = sampling_from(c)  # its errors come before the model is loaded
        engine, template = load_all(c)
        sampling = replace(sampling, stop_tokens=template.stops)
        talk = Talk(engine, template, sampling, Keyboard())
        talk.start(c.system)
        if c.load:
            load_talk(talk, c.load)
            talk.start(c.system or talk.system, talk.turns)
    except (ValueError, OSError) as e:  # CheckpointError is a ValueError
        fail(e)
    if c.prompt:
        try:
            question = question_of(c)
            with talk.keyboard.signals():
                request = answer(talk, [*talk.turns, {"role": "user", "content": question}])
        except ValueError as e:
            fail(f"--prompt: {e}")
        return 130 if request.finish == "cancelled" else 0
    if is_terminal(sys.stdin):
        note("/help lists the commands, Ctrl-D ends the talk")
    with talk.keyboard.signals():
        return converse(talk)


if __name__ == "__main__":
    given = set()
    c = Settings(configure(globals(), product=True, given=given))
    with ends_in_one_line("the answer", "--quantize=int8 takes less"):
        sys.exit(main(c, given))
