"""
Text from a checkpoint, streamed as it is drawn.

    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
    echo "To be" | python sample.py --out_dir=out/shakespeare_char --start=-
"""

import os
import sys
import time
from pathlib import Path

import torch

from configurator import configure, fail
from device import autocast, can_compile, pick_device, pick_dtype
from infer import load, probabilities, stream

# -----------------------------------------------------------------------------
init_from = "resume"        # nanoGPT's key; resume: the checkpoint in out_dir
out_dir = "out"             # run folder, or one checkpoint's folder
ckpt = "latest"             # which checkpoint: latest | best | a step
start = "\n"                # the prompt; FILE:prompt.txt reads a file, - reads stdin; empty: the beginning of a
                            # document, which only data of several documents has taught
num_samples = 10            # samples to draw
max_new_tokens = 500        # tokens in each, the prompt not counted
temperature = 0.8           # below 1: bolder about what is likely; 0: greedy, always the most likely token
top_k = 200                 # draw among the k most likely tokens; 0: among all
top_p = 1.0                 # draw among the fewest tokens with at least this probability; 1: among all
seed = 1337                 # of the first sample; the next ones take seed + 1, seed + 2, ...
device = "auto"             # auto | cpu | cuda | cuda:N | mps
dtype = "auto"              # auto | float32 | bfloat16 | float16
compile = False             # torch.compile the model
# -----------------------------------------------------------------------------


def read_prompt():
    """The prompt that `start` names. Raises ValueError for what cannot be read as UTF-8 text."""
    try:
        if start == "-":
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        if start.startswith("FILE:"):
            return Path(start[5:]).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"--start={start} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    return start


def compile_trouble(model, prompt, context):
    """Compile `model` in place and draw one token; why that failed, with the model as it was, or None."""
    model.compile(dynamic=True)
    try:
        with context():
            next(stream(model, prompt, 1))
    except Exception as e:
        model._compiled_call_impl = None  # what Module.compile sets
        return str(e).strip().partition("\n")[0] or type(e).__name__
    return None


def main():
    if init_from != "resume":
        fail(f"--init_from={init_from}: sample.py reads a run of this project; name its folder with --out_dir")
    if num_samples < 1 or max_new_tokens < 1:
        fail("num_samples and max_new_tokens must be at least 1")
    try:
        where, device_why = pick_device(device)
        precision, dtype_why = pick_dtype(dtype, where)
        context = autocast(where, precision)
        probabilities(torch.zeros(1), temperature, top_k, top_p)  # what is wrong with these is said first
        model, tokenizer, state, folder = load(out_dir, ckpt, where)
        text = read_prompt()
        if tokenizer is None:
            raise ValueError(f"{out_dir} has no tokenizer, so its tokens cannot be turned into text")
        if not text and tokenizer.bos is None:
            raise ValueError("start is empty, and this run's tokenizer has no token for the beginning of a text")
        prompt = tokenizer.encode(text) if text else [tokenizer.bos]
    except (ValueError, OSError) as e:  # CheckpointError is a ValueError
        fail(e)
    val_loss = f"val loss {state['val_loss']:.4f}" if state["val_loss"] is not None else "not evaluated"
    print(f"{folder}: step {state['step']}, {val_loss}", file=sys.stderr)
    print(f"{where} ({device_why}), {str(precision).removeprefix('torch.')} ({dtype_why})", file=sys.stderr)
    if compile and (trouble := can_compile(where) or compile_trouble(model, prompt, context)):
        print(f"warning: torch.compile does not work here ({trouble}); running uncompiled", file=sys.stderr)

    drawn, clock = 0, time.perf_counter()
    for i in range(num_samples):
        print(text, end="", flush=True)
        decode = tokenizer.stream_decoder()
        tokens = stream(model, prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                        seed=seed + i, eos=tokenizer.eos)
        try:
            with context():
                for token in tokens:
                    print(decode(token), end="", flush=True)
                    drawn += 1
        except ValueError as e:
            fail(e)
        print(decode(None), "---------------", sep="\n", flush=True)
    print(f"{drawn / (time.perf_counter() - clock):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    configure(globals())
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit finds no fault
