"""
Text from a checkpoint, streamed as it is drawn.

    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
    echo "To be" | python sample.py --out_dir=out/shakespeare_char --start=-
    python sample.py --out_dir=out/shakespeare_char --interactive

All samples are drawn together (infer.py), and shown one after another.
"""

import os
import sys
import time
from pathlib import Path

from configurator import configure, fail
from device import can_compile, memory_is_full, pick_device, pick_dtype, what_failed
from files import decode_text, read_lines
from infer import Engine, check_prompt, load, stream
from inference.quantize import convert
from inference.sampling import StopText, sampling_from
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
init_from = "resume"        # nanoGPT's key; resume: the checkpoint in out_dir
out_dir = "out"             # run folder, or one checkpoint's folder
tokenizer = ""              # a file (tokenizer.json, gpt2.tiktoken) or folder, for a run without one; empty: the run's
ckpt = "latest"             # which checkpoint: latest | best | a step
start = "\n"                # the prompt; FILE:prompt.txt reads a file, - reads stdin; empty: the beginning of a
                            # document, which only data of several documents has taught; names of special tokens are
                            # plain text in it
special = False             # names of special tokens in a prompt, such as <|endoftext|>, are these tokens
prompts = ""                # a file with a prompt in each line, in place of start
interactive = False         # ask for prompts, one line each, until the end of the input
num_samples = 10            # samples to draw, of each prompt
max_new_tokens = 500        # tokens in each, the prompt not counted
temperature = 0.8           # below 1: bolder about what is likely; 0: greedy, always the most likely token
top_k = 200                 # draw among the k most likely tokens; 0: among all
top_p = 1.0                 # draw among the fewest tokens with at least this probability; 1: among all
min_p = 0.0                 # draw among tokens at least this share as likely as the likeliest; 0: among all
repetition_penalty = 1.0    # above 1: less of what was there before
stop: tuple[str, ...] = ()  # strings that end a sample, and are not shown
seed = 1337                 # of the first sample; the next ones take seed + 1, seed + 2, ...
device = "auto"             # auto | cpu | cuda | cuda:N | mps
dtype = "auto"              # auto | float32 | bfloat16 | float16
quantize = ""               # int8: weights as 8-bit integers; empty: as dtype says
rope_scaling = ""           # for a longer context than the model's: none | linear | ntk | yarn; empty: the model's
rope_factor = 1.0           # how many times as long
compile = False             # torch.compile the model
# -----------------------------------------------------------------------------

CUT = "---------------"  # after each sample
TOGETHER = 16  # samples drawn at once


def read_prompts():
    """The prompts that `start` or `prompts` name. Raises ValueError for what cannot be read as UTF-8 text."""
    name = f"--prompts={prompts}" if prompts else f"--start={start}"
    try:
        if prompts:
            lines = read_lines(prompts)
        elif start == "-":
            lines = [decode_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n")]
        else:
            lines = [decode_text(Path(start[5:]).read_bytes(), start[5:]) if start.startswith("FILE:") else start]
    except (OSError, ValueError) as e:
        raise ValueError(f"{name} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not lines:
        raise ValueError(f"{name} has no line")
    return lines


def encode(tokenizer, text):
    if not text and tokenizer.bos is None:
        raise ValueError("the prompt is empty, and this run's tokenizer has no token for the beginning of a text")
    return tokenizer.encode(text, special=special) if text else [tokenizer.bos]


def encode_prompt(tokenizer, text):
    """Ids of a prompt of the command line. Raises ValueError naming the key."""
    try:
        return encode(tokenizer, text)
    except ValueError as e:
        raise ValueError(f"--{'prompts' if prompts else 'start'}: {e}") from None


def default_prompt(tokenizer):
    """The prompt that nobody gave: a line end, or where the vocabulary has none its first character."""
    try:
        tokenizer.encode(start)
    except ValueError:
        first = tokenizer.chars[0]
        print(f"the vocabulary has no {start!r}, so samples start from {first!r}: --start= takes another",
              file=sys.stderr)
        return first
    return start


def plain(model, tokenizer, text, want, count):
    """Samples of a model whose positions end with its context: past it, all of the context is read for each token."""
    drawn = 0
    for i in range(count):
        print(text, end="", flush=True)
        decode, until = tokenizer.stream_decoder(), StopText(want.stop)
        for token in stream(model, encode(tokenizer, text), want.max_new_tokens, temperature=want.temperature,
                            top_k=want.top_k, top_p=want.top_p, min_p=want.min_p, seed=want.seed + i,
                            repetition_penalty=want.repetition_penalty, eos=tokenizer.eos):
            print(until(decode(token)), end="", flush=True)
            drawn += 1
            if until.stopped:
                break
        print("" if until.stopped else until(decode(None), last=True), CUT, sep="\n", flush=True)
    return drawn


def draw(engine, text, want, count):
    """`count` samples that follow `text`, drawn together, shown in order. -> tokens drawn"""
    prompt, requests = encode(engine.tokenizer, text), []
    for i in range(count):
        requests.append(engine.submit(prompt, want, seed=want.seed + i))
    for request in requests:
        print(text, end="", flush=True)
        shown = 0
        while True:
            print(request.text[shown:], end="", flush=True)
            shown = len(request.text)
            if request.finish:
                break
            engine.step()
        print("", CUT, sep="\n", flush=True)
    return sum(len(request.tokens) for request in requests)


def main(settings, given):
    if init_from != "resume":
        fail(f"--init_from={init_from}: sample.py reads a run of this project; name its folder with --out_dir; of "
             "a model from elsewhere (gpt2, a ckpt.pt of nanoGPT's) export.py makes one")
    try:
        where, device_why = pick_device(device)
        precision, dtype_why = pick_dtype(dtype, where)
        want = sampling_from(settings)  # what is wrong with it is said first
        model, words, state, folder = load(out_dir, ckpt, where, rope_scaling, rope_factor)
        words = load_tokenizer(tokenizer) if tokenizer else words
        if words is None:
            raise ValueError(f"{out_dir} has no tokenizer, so its tokens cannot be turned into text: --tokenizer=FILE "
                             "names one, such as gpt2.tiktoken for GPT-2's, or put tokenizer.json into that folder")
        if words.vocab_size > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {words.vocab_size:,} tokens, the model only "
                             f"{model.config.vocab_size:,}: it is another model's")
        texts = [] if interactive else read_prompts()
        if texts == [start] and "start" not in given:
            texts = [default_prompt(words)]
        encoded = [encode_prompt(words, text) for text in texts]
        for prompt in encoded:
            check_prompt(prompt, model.config)
        convert(model, precision, quantize)
    except (ValueError, OSError) as e:  # CheckpointError is a ValueError
        fail(e)
    val_loss = f"val loss {state['val_loss']:.4f}" if state["val_loss"] is not None else "not evaluated"
    print(f"{folder}: step {state['step']}, {val_loss}", file=sys.stderr)
    print(f"{where} ({device_why}), {str(precision).removeprefix('torch.')} ({dtype_why})", file=sys.stderr)

    window = model.config.block_size
    slide = model.config.pos == "rope"
    room = min(num_samples, TOGETHER) * (window + 16)
    engine = Engine(model, words, slide=slide, max_tokens=room, max_requests=TOGETHER)
    if compile:
        trouble = can_compile(where) or compile_trouble(engine, [0])
        if trouble:
            print(f"warning: torch.compile does not work here ({trouble}); running uncompiled", file=sys.stderr)

    drawn, clock = 0, time.perf_counter()
    while texts or interactive:
        if interactive:
            print("> ", end="", flush=True, file=sys.stderr)
            line = sys.stdin.buffer.readline().decode("utf-8", "replace")  # whatever the locale says
            if not line:
                break
            texts = [line.removesuffix("\n").removesuffix("\r")]
        text = texts.pop(0)
        try:
            prompt = encode(words, text)
            too_long = len(prompt) > window or len(prompt) + max_new_tokens - 1 > window and not slide
            drawn += plain(model, words, text, want, num_samples) if too_long else \
                draw(engine, text, want, num_samples)
        except ValueError as e:
            if not interactive:
                fail(e)
            print(f"error: {e}", file=sys.stderr)
    print(f"{drawn / (time.perf_counter() - clock):.1f} tokens/s", file=sys.stderr)


def compile_trouble(engine, prompt):
    """Compile the model in place and draw two tokens; why that failed, with the model as it was, or None."""
    engine.model.compile(dynamic=True)
    try:
        engine.generate(prompt, max_new_tokens=2)
    except Exception as e:
        engine.model._compiled_call_impl = None  # what Module.compile sets
        return what_failed(e)
    return None


if __name__ == "__main__":
    given = set()
    settings = configure(globals(), product=True, given=given)
    try:
        main(settings, given)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit finds no fault
    except OSError as e:  # a full disk under it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(f"the samples cannot be written: {e.strerror or e}")
    except (MemoryError, RuntimeError) as e:
        if full := memory_is_full(e):
            fail(f"{full}: fewer --num_samples, or --quantize=int8, take less")
        raise
