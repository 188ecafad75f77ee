"""
Text from a checkpoint, streamed as it is drawn.

    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
    echo "To be" | python sample.py --out_dir=out/shakespeare_char --start=-
    python sample.py --out_dir=out/shakespeare_char --interactive

All samples of a prompt are drawn together (infer.py, which draws tokens by inference/sampling.py), and shown one after
another.
"""

import sys
import time
from pathlib import Path

from configurator import Settings, configure, fail
from device import pick_device, pick_dtype
from files import decode_text, read_lines
from infer import Engine, check_prompt, encode_prompt, load, stream
from inference.calibration import convert_run
from inference.sampling import StopText, sampling_from
from inference.terminal import ends_in_one_line
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
init_from = "resume"        # nanoGPT's key; resume: the checkpoint in out_dir
out_dir = "out"             # run folder, or one checkpoint's folder
tokenizer = ""              # a file (tokenizer.json, gpt2.tiktoken) or folder, for a run without one; empty: the run's
ckpt = "latest"             # which checkpoint: latest | best | a step
start = "\n"                # the prompt; FILE:prompt.txt reads a file, - reads stdin; empty: the beginning of a
                            # document, which only data of several documents teaches
special = False             # read names of special tokens in a prompt, such as <|endoftext|>, as these tokens
prompts = ""                # a file with one prompt per line, instead of start
interactive = False         # ask for prompts, one line each, until the end of the input
num_samples = 10            # samples of each prompt
max_new_tokens = 500        # tokens in each sample, not counting the prompt
temperature = 0.8           # below 1: bolder about what is likely; 0: greedy, always the most likely token
top_k = 200                 # draw among the k most likely tokens; 0: among all
top_p = 1.0                 # draw among the smallest set of tokens whose probability reaches top_p; 1: among all
min_p = 0.0                 # draw among tokens with at least this share of the largest probability; 0: among all
repetition_penalty = 1.0    # above 1: tokens that were there before become less likely
stop: tuple[str, ...] = ()  # strings that end a sample, and are not shown
seed = 1337                 # seed of the first sample; the next ones take seed + 1, seed + 2, ...
device = "auto"             # auto | cpu | cuda | cuda:N | mps
dtype = "auto"              # auto | float32 | bfloat16 | float16
quantize = ""               # int8 | int4 | int4_64 | int4_128 | fp8: weights in fewer bits; empty: as dtype says
speculate = ""              # read ahead what is proposed: lookup (from the text), or a draft run's folder; empty: no
rope_scaling = ""           # for a longer context than the model's: none | linear | ntk | yarn; empty: the model's
rope_factor = 1.0           # with rope_scaling: context as a multiple of the one first trained at
compile: bool | None = None  # torch.compile the step of a token; none: where that pays
# -----------------------------------------------------------------------------

CUT = "---------------"  # printed after each sample
AT_ONCE = 16  # most samples drawn together


def read_prompts(c):
    """The prompts that `start` or `prompts` name. Raises ValueError for a source that cannot be read as UTF-8 text."""
    key = f"--prompts={c.prompts}" if c.prompts else f"--start={c.start}"
    try:
        if c.prompts:
            lines = read_lines(c.prompts)
        elif c.start == "-":
            lines = [decode_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n")]
        elif c.start.startswith("FILE:"):
            path = c.start.removeprefix("FILE:")
            lines = [decode_text(Path(path).read_bytes(), path)]
        else:
            lines = [c.start]
    except (OSError, ValueError) as e:
        raise ValueError(f"{key} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not lines:
        raise ValueError(f"{key} has no line")
    return lines


def default_prompt(c, tokenizer):
    """The prompt if nobody gave one: a line end, or the first character of a vocabulary without line ends."""
    try:
        tokenizer.encode(c.start)
    except ValueError:
        first = tokenizer.chars[0]
        print(f"the vocabulary has no {c.start!r}, so samples start from {first!r}: --start= takes another",
              file=sys.stderr)
        return first
    return c.start



def check_prompts(c, model, tokenizer, texts):
    """Raises ValueError for a prompt of the command line that the tokenizer cannot encode or the model cannot read."""
    key = "prompts" if c.prompts else "start"
    for text in texts:
        try:
            ids = encode_prompt(tokenizer, text, c.special)
        except ValueError as e:
            raise ValueError(f"--{key}: {e}") from None
        check_prompt(ids, model.config)


def draw_together(c, engine, text, sampling):
    """All samples of the prompt `text`, drawn together, shown in order. -> tokens drawn"""
    ids = encode_prompt(engine.tokenizer, text, c.special)
    requests = [engine.submit(ids, sampling, seed=sampling.seed + i) for i in range(c.num_samples)]
    for request in requests:
        print(text, end="", flush=True)
        shown = 0  # characters
        while True:
            print(request.text[shown:], end="", flush=True)
            shown = len(request.text)
            if request.finish:
                break
            engine.step()
        print("", CUT, sep="\n", flush=True)
    return sum(len(request.tokens) for request in requests)


def draw_past_context(c, model, tokenizer, text, sampling):
    """Like draw_together, for samples that outgrow the learned positions of a model: stream reads the context again for
    each token. -> tokens drawn"""
    ids = encode_prompt(tokenizer, text, c.special)
    drawn = 0
    for i in range(c.num_samples):
        print(text, end="", flush=True)
        decode = tokenizer.stream_decoder()
        until = StopText(sampling.stop)
        tokens = stream(model, ids, sampling.max_new_tokens, temperature=sampling.temperature,
                        top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
                        repetition_penalty=sampling.repetition_penalty, seed=sampling.seed + i, eos=tokenizer.eos)
        for token in tokens:
            print(until(decode(token)), end="", flush=True)
            drawn += 1
            if until.stopped:
                break
        rest = "" if until.stopped else until(decode(None), last=True)
        print(rest, CUT, sep="\n", flush=True)
    return drawn


def next_prompts(c, texts):
    """Yield the prompts of the command line, or with `interactive` each line that the user types."""
    if not c.interactive:
        yield from texts
        return
    while True:
        print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.buffer.readline().decode("utf-8", "replace")  # UTF-8 whatever the locale says
        if not line:
            return
        yield line.removesuffix("\n").removesuffix("\r")


def load_all(c, given):
    """-> (model in its form for inference, tokenizer, prompts of the command line). `given`: keys that the user set.
    Prints the checkpoint and the device on stderr. Raises ValueError and OSError."""
    device, device_why = pick_device(c.device)
    dtype, dtype_why = pick_dtype(c.dtype, device)
    sampling_from(c)  # its errors come before the model is loaded
    model, tokenizer, state, folder = load(c.out_dir, c.ckpt, device, c.rope_scaling, c.rope_factor)
    if c.tokenizer:
        tokenizer = load_tokenizer(c.tokenizer)
    if tokenizer is None:
        raise ValueError(f"{c.out_dir} has no tokenizer, so its tokens cannot be turned into text: --tokenizer=FILE "
                         "names one, such as gpt2.tiktoken for GPT-2's, or put tokenizer.json into that folder")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only "
                         f"{model.config.vocab_size:,}: it is another model's")
    texts = [] if c.interactive else read_prompts(c)
    if texts == [c.start] and "start" not in given:
        texts = [default_prompt(c, tokenizer)]
    check_prompts(c, model, tokenizer, texts)
    convert_run(model, dtype, c.quantize, c.out_dir, state)
    val_loss = f"val loss {state['val_loss']:.4f}" if state["val_loss"] is not None else "not evaluated"
    print(f"{folder}: step {state['step']}, {val_loss}", file=sys.stderr)
    print(f"{device} ({device_why}), {str(dtype).removeprefix('torch.')} ({dtype_why})", file=sys.stderr)
    return model, tokenizer, texts


def main(c, given):
    if c.init_from != "resume":
        fail(f"--init_from={c.init_from}: sample.py reads a run of this project; name its folder with --out_dir. "
             "export.py makes such a run from another model (gpt2, a ckpt.pt of nanoGPT's)")
    try:
        model, tokenizer, texts = load_all(c, given)
    except (ValueError, OSError) as e:  # CheckpointError is a ValueError
        fail(e)
    sampling = sampling_from(c)
    window = model.config.block_size
    slide = model.config.pos == "rope"
    room = min(c.num_samples, AT_ONCE) * (window + 16)
    try:
        engine = Engine(model, tokenizer, slide=slide, max_tokens=room, max_requests=AT_ONCE, speculate=c.speculate)
    except (ValueError, OSError) as e:  # of the draft run
        fail(e)
    steps = c.max_new_tokens * -(-c.num_samples // AT_ONCE)
    engine.try_to_compile(c.compile, steps, c.num_samples > 1, lambda line: print(line, file=sys.stderr))

    drawn = 0
    clock = time.perf_counter()
    for text in next_prompts(c, texts):
        try:
            length = len(encode_prompt(tokenizer, text, c.special))
            if length > window or (length + c.max_new_tokens - 1 > window and not slide):
                drawn += draw_past_context(c, model, tokenizer, text, sampling)
            else:
                drawn += draw_together(c, engine, text, sampling)
        except ValueError as e:
            if not c.interactive:
                fail(e)
            print(f"error: {e}", file=sys.stderr)
    print(f"{drawn / (time.perf_counter() - clock):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    given = set()
    c = Settings(configure(globals(), product=True, given=given))
    with ends_in_one_line("the samples", "fewer --num_samples, or --quantize=int8, take less"):
        main(c, given)
