"""
Evaluate a checkpoint: loss over the fixed windows of a split, samples, tasks, long contexts.

    python eval.py --out_dir=out/shakespeare_char                          # loss, perplexity, bits per token and byte
    python eval.py prompts --out_dir=out/shakespeare_char                  # what it writes, as Markdown
    python eval.py choice --out_dir=RUN --task=hellaswag                   # multiple choice: the Hub's, or --data=FILE
    python eval.py lastword --out_dir=RUN --task=lambada                   # the last word of a passage
    python eval.py context --out_dir=RUN --lengths=256,1024 --rope_scaling=none,yarn    # loss by position
    python eval.py passkey --out_dir=RUN --lengths=256,1024                # a key hidden in a long text

The last line is one JSON object.
"""

import contextlib
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from checkpoint import run_of
from configurator import configure, fail
from dataset import open_datasets, open_tokens
from device import autocast, inference_kernels, memory_is_full, pick_device, pick_dtype
from files import finite, read_lines, sha256
from infer import Engine, load, stretch
from inference.quantize import convert
from inference.sampling import sampling_from
from inference.tasks import last_word, multiple_choice, open_items, passkey, score_tokens
from loader import fixed_batches

# -----------------------------------------------------------------------------
what = "loss"       # the first word: loss | prompts | choice | lastword | context | passkey
out_dir = "out"     # run folder, or one checkpoint's folder
ckpt = "latest"     # which checkpoint: latest | best | a step
dataset = ""        # name under data/, a folder, or a mix a:0.7,b:0.3; empty: what it was trained on
split = "val"       # train | val
block_size = 0      # tokens per window; 0: the model's
batch_size = 64     # windows at once, of the model's context; fewer of longer ones
eval_iters = 0      # batches of windows; 0: the whole split
device = "auto"     # auto | cpu | cuda | cuda:N | mps
dtype = "float32"   # float32 | bfloat16 | float16 | auto; fp32 compares between machines
quantize = ""       # int8: the weights as sample.py would have them; empty: as they are
seed = 1337         # of samples and of hidden keys

# prompts
prompts = "config/prompts.txt"  # a prompt in each line
out = ""                # the Markdown file; empty: samples_step_N.md in the run's folder
num_samples = 2         # of each prompt
max_new_tokens = 120    # tokens in each, the prompt not counted
temperature = 0.8       # below 1: bolder about what is likely; 0: greedy
top_k = 200             # draw among the k most likely tokens; 0: among all
top_p = 1.0             # draw among the fewest tokens with at least this probability; 1: among all

# choice and lastword
task = ""               # hellaswag | arc_easy | arc_challenge | piqa | winogrande, or lambada; empty: our own form
data = ""               # a file of JSON lines, in the form of the task; empty: from the Hub
limit = 0               # the first so many items; 0: all

# context and passkey, beyond the length trained at
rope_scaling: tuple[str, ...] = ()  # none | linear | ntk | yarn; empty: the model's, in context and passkey all of them
rope_factor = 0.0       # how many times the length first trained at; 0: in context and passkey as the length asks
lengths: tuple[int, ...] = ()  # tokens of context; empty: the model's, and with RoPE twice and four times that
bin_size = 0            # positions whose losses are averaged; 0: half the context trained at
plot = ""               # a .png of loss by position
depths = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the key lies: 0 is the beginning, 1 just before the question
sentence = "\nThe pass key is {key}.\n"  # what is hidden; what stands before the key is asked again
trials = 10             # keys for each length and depth
alternatives = 10       # keys to choose from, of which chance finds one in so many
# -----------------------------------------------------------------------------

SCALINGS = ("none", "linear", "ntk", "yarn")
SEVERAL = ("context", "passkey")  # take any number of them


@torch.no_grad()
def evaluate(model, tokens, block_size, batch_size, eval_iters=0, context=contextlib.nullcontext, rank=0, ranks=1,
             collect=lambda sums: [sums], tokenizer=None, compiled=None):
    """Mean cross-entropy of `model` over the fixed windows of `tokens`, in nats per token.

    Each window is read from its start, so its first tokens have little context: losses compare at equal block_size.
    Of a mix of datasets, each is evaluated by itself and the losses are weighted as the mix is. Of several `ranks`,
    each takes every so many-th batch, and `collect` gives all of them the sums of all: added in the order of the
    batches, so that the result is one rank's. `compiled` is the model compiled, for batches of the full size: a smaller
    one, at the end of the tokens, would be compiled for itself alone.
    -> {"loss", "perplexity", "bits" (per token), "tokens" (predicted), "tokens_sha256"}: losses compare where the last
    two, which say what was read, are equal. With a tokenizer also "characters" and "bytes" of what was predicted, and
    "bits_per_character" and "bits_per_byte", which compare between tokenizers where these are equal.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, tokens_read, digests, sizes, rates = 0.0, 0, [], np.zeros(2, np.int64), np.zeros(2)
    full = None  # shape of the first batch; at the end of the tokens some are smaller
    for part, weight in tokens.parts:
        sums, count = [], 0
        batches = fixed_batches(part, block_size, batch_size, eval_iters)
        while together := list(itertools.islice(batches, ranks)):
            x, y = together[min(rank, len(together) - 1)]  # all take part in a sharded model's pass
            n = int((y != -1).sum())
            full = full or together[0][0].shape
            forward = model if compiled is None or x.shape != full else compiled
            with context():
                _, mean = forward(x.to(device), y.to(device), loss_only=True)
            # a sum over tokens: a mean of means would weigh the tail's tokens more
            sums.append(mean.item() * n if rank < len(together) else 0.0)
            count += sum(int((y != -1).sum()) for _, y in together)
        total = 0.0
        for in_turn in zip(*collect(sums), strict=True):
            for one in in_turn:
                total += one
        loss += float(weight) * total / count
        tokens_read += count
        digests.append(part.sha256_of(count + 1))  # the windows lie one behind the other from the first token on
        if tokenizer:
            size = text_size(tokenizer, part, 1, count + 1)
            sizes += size
            rates += float(weight) * total / math.log(2) / np.maximum(size, 1)
    model.train(was_training)
    digest = digests[0] if len(digests) == 1 else sha256("".join(digests).encode())
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits": loss / math.log(2), "tokens": tokens_read,
              "tokens_sha256": digest}
    if tokenizer and sizes.all():
        result |= {"bits_per_character": float(rates[0]), "bits_per_byte": float(rates[1]),
                   "characters": int(sizes[0]), "bytes": int(sizes[1])}
    return result


def text_size(tokenizer, tokens, first, end, piece=1 << 20):
    """Characters and UTF-8 bytes of the text of tokens first .. end - 1 of a stream. -> int64 (2,)

    A character of several tokens counts where its first byte is, so that all counts are those of the decoded text;
    special tokens have no text. Read a `piece` at a time, so that a split of any length takes no more memory.
    """
    sizes = np.zeros((max(tokens.vocab_size, len(tokenizer.pieces)), 2), np.int64)
    for i, text in enumerate(tokenizer.pieces):
        sizes[i] = sum(byte & 0xC0 != 0x80 for byte in text), len(text)
    total = np.zeros(2, np.int64)
    for start in range(first, end, piece):
        total += sizes[tokens.read([start], min(piece, end - start))[0]].sum(0)
    return total


def open_split(model, tokenizer, state, folder):
    """-> (the split's tokens, sha256 that names the dataset). Raises ValueError where they are not this model's."""
    found, manifest, dataset_sha256 = open_datasets(dataset or state["config"]["dataset"])
    tokens = open_tokens(found, split, model.config.vocab_size)
    if tokenizer and manifest.get("tokenizer", {}).get("sha256", tokenizer.sha256) != tokenizer.sha256:
        raise ValueError(f"{found[0][0]} was prepared with another tokenizer than {folder} was trained with: their ids "
                         "differ")
    return tokens, dataset_sha256


def whole_split(model, tokenizer, state, folder, context):
    """`evaluate` from the command line."""
    tokens, dataset_sha256 = open_split(model, tokenizer, state, folder)
    if not 0 <= block_size <= model.config.block_size:
        raise ValueError(f"--block_size={block_size}: the model sees at most {model.config.block_size} tokens")
    result = evaluate(model, tokens, block_size or model.config.block_size, batch_size, eval_iters, context,
                      tokenizer=tokenizer)
    print(f"{folder} on {result['tokens']:,} tokens of {tokens.folder}, split {split}:")
    bits = {"character": result.get("bits_per_character"), "byte": result.get("bits_per_byte")}
    if not tokenizer or tokenizer.kind != "char":
        bits = {"token": result["bits"], **bits}
    print(f"loss {result['loss']:.4f}  perplexity {result['perplexity']:.3f}"
          + "".join(f"  bits per {unit} {value:.4f}" for unit, value in bits.items() if value is not None))
    return {**result, "split": split, "dataset_sha256": dataset_sha256}


# -----------------------------------------------------------------------------
# Samples


def code(text, fence=False):
    """`text` as Markdown code, within a line or as a block, whatever backticks it has (CommonMark 0.31, 4.5, 6.1)."""
    marks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    if fence:
        marks = marks.rjust(3, "`")
        return f"{marks}text\n{text}\n{marks}"
    pad = " " if text[:1] in "` " or text[-1:] in "` " else ""
    return f"{marks}{pad}{text}{pad}{marks}"


def read_prompts():
    path = Path(prompts) if Path(prompts).exists() else Path(__file__).resolve().parent / prompts
    try:
        lines = [line for line in read_lines(path) if line.strip()]
    except (OSError, ValueError) as e:
        raise ValueError(f"--prompts={prompts} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not lines:
        raise ValueError(f"--prompts={prompts} has no line")
    return lines


def write_samples(model, tokenizer, state, folder, context):
    """Samples of every prompt, each with a seed of its own, into a Markdown file."""
    want, lines = sampling_from(settings), read_prompts()
    run = run_of(folder)
    target = Path(out) if out else run / f"samples_step_{state['step']}.md"
    engine = Engine(model, tokenizer, slide=model.config.pos == "rope")
    parts, written, skipped = [], 0, {}
    for line in lines:
        try:
            prompt = tokenizer.encode(line)
            room = max_new_tokens if engine.slide else model.config.block_size + 1 - len(prompt)
            each = [engine.submit(prompt, want, max_new_tokens=min(max_new_tokens, max(room, 1)), seed=seed + i)
                    for i in range(num_samples)]
        except ValueError as error:  # characters that the tokenizer lacks; or it is longer than the context
            skipped[line] = str(error).partition(": this tokenizer knows")[0]
            continue
        while not all(request.finish for request in each):
            engine.step()
        parts += [f"## {code(line)}", *(code(line + request.text, fence=True) for request in each)]
        written += num_samples
    val_loss = f", validation loss {state['val_loss']:.4f}" if state["val_loss"] is not None else ""
    head = [f"# Samples of step {state['step']}", "\n".join([
        f"- checkpoint: {code(str(folder))}{val_loss}; sha256 of its weights "
        f"{code(state['files'].get('model.safetensors', 'in parts')[:16])}",
        f"- temperature {temperature:g}, top_k {top_k}, top_p {top_p:g}, at most {max_new_tokens} new tokens",
        f"- seeds {seed} to {seed + num_samples - 1}, the same for each prompt; {engine.device}, "
        f"{str(engine.dtype).removeprefix('torch.')}"
        + (f", {quantize}" if quantize else ""),
        *(f"- left out: {code(line)}, as it {code(why)}" for line, why in skipped.items()),
    ])]
    beside = target.with_name(target.name + ".writing")
    beside.write_text("\n\n".join(head + parts) + "\n", encoding="utf-8")
    os.replace(beside, target)
    print(f"{written} samples of {len(lines) - len(skipped)} prompts are in {target}"
          + (f"; {len(skipped)} left out" if skipped else ""))
    return {"file": str(target), "samples": written, "left_out": list(skipped)}


# -----------------------------------------------------------------------------
# Tasks


def score_task(model, tokenizer, state, folder, context):
    """Multiple choice, or last words."""
    words = what == "lastword"
    items = open_items(task, data, words, limit)
    result = (last_word if words else multiple_choice)(model, tokenizer, items, batch_size, context)
    asked = json.dumps([(item.pairs, item.answer) for item in items], ensure_ascii=False)
    print(f"{folder} on {len(items):,} items of {data or task}:")
    print("  ".join(f"{name} {value:.4f}" + (f" ± {result[f'{name}_stderr']:.4f}" if len(items) > 1 else "")
                    if f"{name}_stderr" in result else f"{name} {value:.3f}"
                    for name, value in result.items() if name != "items" and not name.endswith("_stderr")))
    return {**result, "task": task or data, "items_sha256": sha256(asked.encode())}


# -----------------------------------------------------------------------------
# Long contexts


def contexts(model, tokens):
    """What to try: each of `lengths`, and past the context of the model each of `rope_scaling`.
    -> [(length, scaling, factor, which is 0 for learned positions), ...]. Raises ValueError for what cannot be."""
    c = model.config
    asked = lengths or [c.block_size * n for n in ((1, 2, 4) if c.pos == "rope" else (1,))]
    if len(tokens) <= max(asked):
        raise ValueError(f"{tokens.folder}: {len(tokens):,} tokens are too few for --lengths={max(asked)}")
    first = c.block_size / c.rope_factor  # what it was trained at before any stretching
    if c.pos != "rope" and max(asked) > first:
        raise ValueError(f"--lengths={max(asked)} needs a model with pos='rope': this one's positions are learned, and "
                         f"end with block_size={c.block_size}")
    if rope_factor and max(asked) > rope_factor * first:
        raise ValueError(f"--rope_factor={rope_factor:g} makes a context of {rope_factor * first:g}: "
                         f"--lengths={max(asked)} is more")
    found = []
    for length in asked:
        if length <= c.block_size and not rope_factor:
            found.append((length, c.rope_scaling, c.rope_factor if c.pos == "rope" else 0))
        else:
            found += [(length, scaling, rope_factor or length / first) for scaling in rope_scaling or SCALINGS]
    return found


def loss_by_position(model, tokens, length, rows, context):
    """Summed loss of the targets after 1, 2, ... tokens of context over the fixed windows of `length`, `rows` at once,
    and how many there are. -> two of (length,), fp64"""
    where, total, count = next(model.parameters()).device, torch.zeros(length).double(), torch.zeros(length).double()
    for x, y in fixed_batches(tokens, length, rows, eval_iters):
        total += score_tokens(model, x.to(where), y.to(where), context)[0].cpu().double().sum(0)
        count += (y != -1).sum(0)
    return total, count


def long_context(model, tokenizer, state, folder, context):
    """Loss by position, of the same targets for all lengths if eval_iters is 0."""
    if plot:
        figure = open_figure()
    tokens, dataset_sha256 = open_split(model, tokenizer, state, folder)
    if len(tokens.parts) > 1:
        raise ValueError("eval.py context reads one dataset: name it with --dataset")
    tried = contexts(model, tokens)
    trained, own, rows = model.config, model.config.block_size, []
    width = bin_size or max(1, own // 2)
    print(f"{folder} on {tokens.folder}, split {split}; context {own}; loss by position, in bins of {width}:")
    for length, scaling, factor in tried:
        if factor:
            stretch(model, trained, scaling, factor)
        total, count = loss_by_position(model, tokens, length, max(1, batch_size * own // length), context)
        edges = [*range(0, length, width), length]
        bins = [(total[a:b].sum() / count[a:b].sum()).item() for a, b in itertools.pairwise(edges)]
        rows.append({"length": length, "rope_scaling": scaling, "rope_factor": model.config.rope_factor,
                     "loss": (total.sum() / count.sum()).item(), "tokens": int(count.sum()), "bins": bins})
        print(f"{length:>7} {scaling:<6} {rows[-1]['loss']:8.4f} |", *(f"{loss:.4f}" for loss in bins), flush=True)
    if plot:
        draw(figure, rows, own, width)
    return {"rows": rows, "bin": width, "split": split, "dataset_sha256": dataset_sha256}


def open_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs the package matplotlib: pip install -e '.[report]' -c constraints.txt") from None
    if not Path(plot).parent.is_dir():
        raise ValueError(f"--plot={plot}: there is no folder {Path(plot).parent}")
    return Figure(figsize=(8, 5), layout="constrained")


def draw(figure, rows, own, width):
    """A line for each row, in its scaling's colour and its length's dashes, and a mark at the model's own context."""
    axes, each = figure.add_subplot(), sorted({row["length"] for row in rows})
    for row in rows:
        middles = [min(at + width / 2, (at + row["length"]) / 2) for at in range(0, row["length"], width)]
        dashes = (":", "--", "-.", "-")[max(-4, each.index(row["length"]) - len(each))]
        axes.plot(middles, row["bins"], color=f"C{SCALINGS.index(row['rope_scaling'])}", linestyle=dashes, marker="o",
                  markersize=3, label=f"{row['length']} {row['rope_scaling']}")
    axes.axvline(own, color="grey", linewidth=0.8, label="context trained at")
    axes.set(xlabel="tokens of context", ylabel="loss, nats per token", title=f"{out_dir}, split {split}")
    axes.legend(fontsize="small")
    figure.savefig(plot, dpi=150)


def hidden_key(model, tokenizer, state, folder, context):
    """Whether the model finds a key that is hidden in text of the split, at each depth of each length."""
    tokens, dataset_sha256 = open_split(model, tokenizer, state, folder)
    filler, trained, rows = tokens.parts[0][0], model.config, []
    tried = contexts(model, filler)
    print(f"{folder}: a key hidden in {tokens.folder}, split {split}; found exactly / chosen among {alternatives}, "
          f"of {trials}\n length scaling " + " ".join(f"depth {depth:<5g}" for depth in depths))
    for length, scaling, factor in tried:
        if factor:
            stretch(model, trained, scaling, factor)
        cells = []
        for depth in depths:
            found = passkey(model, tokenizer, filler, length, depth, sentence=sentence, trials=trials,
                            alternatives=alternatives, seed=seed, batch_size=batch_size, context=context)
            rows.append({"length": length, "rope_scaling": scaling, "depth": depth, **found})
            cells.append(f"{found['exact']:4.0%} / {found['chosen']:4.0%}")
        print(f"{length:>7} {scaling:<6}  " + " ".join(cells), flush=True)
    return {"rows": rows, "trials": trials, "chance": 1 / alternatives, "seed": seed, "split": split,
            "dataset_sha256": dataset_sha256}


# -----------------------------------------------------------------------------


VERBS = {"loss": whole_split, "prompts": write_samples, "choice": score_task, "lastword": score_task,
         "context": long_context, "passkey": hidden_key}


def check_settings():
    """Ends the run for a setting that has no meaning."""
    if split not in ("train", "val"):
        fail(f"split={split!r} is not one of train, val")
    if unknown := [name for name in rope_scaling if name not in SCALINGS]:
        fail(f"rope_scaling={unknown[0]!r} is not one of {', '.join(SCALINGS)}")
    if 0 < rope_factor < 1:
        fail(f"rope_factor={rope_factor} must be at least 1, or 0: as the length asks")
    if what not in SEVERAL and (len(rope_scaling) > 1 or bool(rope_scaling) != bool(rope_factor)):
        fail(f"eval.py {what} takes one rope_scaling with its rope_factor, as --rope_scaling=yarn --rope_factor=4")
    if sentence.count("{key}") != 1 or not sentence.partition("{key}")[0].strip():
        fail(f"sentence={sentence!r} must have {{key}} once, and some words before it")


def main():
    check_settings()
    try:
        where = pick_device(device)[0]
        precision = pick_dtype(dtype, where)[0]
        stretch_to = (*rope_scaling, rope_factor) if rope_scaling and what not in SEVERAL else ()
        model, tokenizer, state, folder = load(out_dir, ckpt, where, *stretch_to)
        if tokenizer is None and what not in ("loss", "context"):
            raise ValueError(f"{out_dir} has no tokenizer, so no text can be turned into its tokens")
        if quantize or what == "prompts":
            convert(model, precision if what == "prompts" else torch.float32, quantize)
        with inference_kernels(where):
            result = VERBS[what](model, tokenizer, state, folder, autocast(where, precision))
    except (ValueError, OSError) as e:  # CheckpointError and DataError are ValueErrors
        fail(e)
    except (MemoryError, RuntimeError) as e:
        if full := memory_is_full(e):
            fail(f"{full}: a smaller --batch_size or --block_size takes less")
        raise
    print(json.dumps({**finite(result), "step": state["step"]}))


if __name__ == "__main__":
    settings = configure(globals(), verb="what", verbs=tuple(VERBS))
    main()
