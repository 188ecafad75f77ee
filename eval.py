"""
Evaluate a checkpoint: loss over the fixed windows of a split, samples, tasks, long contexts, chat.

    python eval.py --out_dir=out/shakespeare_char                          # loss, perplexity, bits per token and byte
    python eval.py prompts --out_dir=out/shakespeare_char                  # samples of many prompts, as Markdown
    python eval.py choice --out_dir=RUN --task=hellaswag                   # multiple choice: the Hub's, or --data=FILE
    python eval.py lastword --out_dir=RUN --task=lambada                   # the last word of a passage
    python eval.py context --out_dir=RUN --lengths=256,1024 --rope_scaling=none,yarn    # loss by position
    python eval.py passkey --out_dir=RUN --lengths=256,1024                # a key hidden in a long text
    python eval.py chat --out_dir=RUN                                      # loss of held-out answers; do answers end?
    python eval.py chat --out_dir=RUN --task=puzzles                       # are answers right? Or --data=FILE
    python eval.py calibrate --out_dir=RUN                                 # static scales for --quantize=fp8
    python eval.py calibrate --out_dir=RUN --quantize=int4                 # codes by what layers read, for int4
    python eval.py letters --out_dir=RUN --task=mmlu                       # a chat model's choice, by its letter

The last line is one JSON object.
"""

import contextlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from checkpoint import run_of
from configurator import Settings, configure, fail
from conversation import Template
from dataset import open_datasets, open_tokens
from device import autocast, inference_kernels, memory_is_full, pick_device, pick_dtype
from files import finite, sha256, write_whole
from infer import Engine, load, stretch
from inference import calibration, chat_tasks
from inference.letters import by_letter, open_letters
from inference.long_context import SCALINGS, cases, draw_losses, loss_by_position, open_figure, passkey
from inference.quantize import convert
from inference.samples import code, draw_samples, markdown, read_prompts
from inference.sampling import sampling_from
from inference.tasks import last_word, multiple_choice, open_items
from loader import fixed_batches

# -----------------------------------------------------------------------------
what = "loss"       # loss | prompts | choice | lastword | context | passkey | chat | letters | calibrate
out_dir = "out"     # run folder, or one checkpoint's folder
ckpt = "latest"     # which checkpoint: latest | best | a step
dataset = ""        # name under data/, a folder, or a mix a:0.7,b:0.3; empty: what it was trained on
split = "val"       # train | val
block_size = 0      # tokens per window; 0: the model's
batch_size = 64     # windows in a batch; fewer if they are longer than the model's context
eval_iters = 0      # batches of windows; 0: the whole split, in calibrate 8 batches
device = "auto"     # auto | cpu | cuda | cuda:N | mps
dtype = "float32"   # float32 | bfloat16 | float16 | auto; float32 compares between machines
quantize = ""       # int8 | int4 | int4_64 | int4_128 | fp8, as in sample.py; empty: as they are, in calibrate fp8
noise = False       # calibrate: a negative control, scales that fit normal noise instead of the model's activations
seed = 1337         # for samples, answers, puzzles, hidden keys and noise

# prompts and chat
prompts = "config/prompts.txt"  # a prompt in each line
out = ""                # the Markdown file; empty: samples_step_N.md in the run's folder
num_samples = 2         # samples of each prompt
max_new_tokens = 120    # tokens in each sample or answer, not counting the prompt
temperature = 0.8       # below 1: bolder about what is likely; 0: greedy, always the most likely token
top_k = 200             # draw among the k most likely tokens; 0: among all
top_p = 1.0             # draw among the smallest set of tokens whose probability reaches top_p; 1: among all

# choice, lastword, letters and chat
task = ""               # hellaswag | arc_easy | arc_challenge | piqa | winogrande, or lambada; letters: arc_easy |
                        # arc_challenge | mmlu; chat: puzzles; empty: our own form
data = ""               # a file of JSON lines in the form of the task, for chat of conversations; empty: from the Hub
limit = 0               # score only the first items, up to this many; 0: all, in chat 200 conversations, 1000 puzzles
kinds = ("sum", "spell", "count", "reverse", "copy")  # of puzzles
digits = 2              # most digits of a number in a sum
letters = 6             # most letters of a word

# context and passkey, beyond the length trained at
rope_scaling: tuple[str, ...] = ()  # none | linear | ntk | yarn; empty: the model's, or all in context and passkey
rope_factor = 0.0       # context as a multiple of the one first trained at; 0: as the length needs
lengths: tuple[int, ...] = ()  # tokens of context; empty: the model's, and with RoPE also twice and four times that
bin_size = 0            # positions whose losses are averaged; 0: half the model's context
plot = ""               # draw the loss by position into this .png
depths = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the key is hidden: 0 at the beginning, 1 just before the question
sentence = "\nThe pass key is {key}.\n"  # hidden in the text; the part before the key is the question
trials = 10             # keys for each length and depth
alternatives = 10       # keys to choose from; chance picks the right one once in this many trials
# -----------------------------------------------------------------------------

SEVERAL = ("context", "passkey")  # these verbs take any number of rope_scaling


@torch.no_grad()
def evaluate(model, tokens, block_size, batch_size, eval_iters=0, context=contextlib.nullcontext, rank=0, ranks=1,
             collect=lambda sums: [sums], tokenizer=None, compiled=None):
    """Mean cross-entropy of `model` over the fixed windows of `tokens`, in nats per token, or per learned token of rows
    of conversations.

    Each window is read from its start, so its first tokens have little context: losses compare at equal block_size.
    Each dataset of a mix is evaluated by itself, and the losses are weighted with the weights of the mix. With several
    `ranks` the batches go to them in turn, and `collect` gathers their sums on every rank. The sums are added in the
    order of the batches, so the result is the same as on one rank. `compiled` is the compiled model, for batches of the
    full size; a smaller batch, at the end of the tokens, would need another compilation.

    -> {"loss", "perplexity", "bits" (per token), "tokens" (predicted), "tokens_sha256"}. Losses compare if the last two
    are equal: the same tokens were read. With a tokenizer also "characters" and "bytes" of the predicted text, and
    "bits_per_character" and "bits_per_byte", which compare between tokenizers on the same text.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss = 0.0
    tokens_read = 0
    digests = []
    sizes = np.zeros(2, np.int64)  # characters and bytes
    rates = np.zeros(2)  # bits per character and per byte
    for part, weight in tokens.parts:
        batches = fixed_batches(part, block_size, batch_size, eval_iters)
        sums, count, windows = batch_sums(model, batches, device, context, rank, ranks, compiled)
        total = 0.0
        for group_sums in zip(*collect(sums), strict=True):  # of all ranks
            for group_sum in group_sums:
                total += group_sum
        loss += float(weight) * total / count
        tokens_read += count
        # the windows follow one another from the first token on
        end = windows * block_size if part.row_size else count + 1
        digests.append(part.sha256_of(end))
        if tokenizer:
            size = text_size(tokenizer, part, 1, end)
            sizes += size
            rates += float(weight) * total / math.log(2) / np.maximum(size, 1)
    model.train(was_training)
    result = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits": loss / math.log(2),
        "tokens": tokens_read,
        "tokens_sha256": digests[0] if len(digests) == 1 else sha256("".join(digests)),
    }
    if tokenizer and sizes.all():
        result |= {"bits_per_character": float(rates[0]), "bits_per_byte": float(rates[1]),
                   "characters": int(sizes[0]), "bytes": int(sizes[1])}
    return result


def batch_sums(model, batches, device, context, rank, ranks, compiled):
    """This rank's batches, in turn with the other ranks. -> (their summed losses, one a batch; targets and windows of
    all ranks)"""
    sums = []
    count = windows = 0
    full_shape = None  # of the first batch; at the end of the tokens batches are smaller
    while group := list(itertools.islice(batches, ranks)):
        batch = group[min(rank, len(group) - 1)]  # every rank runs: a sharded model's forward pass needs all
        n = int((batch.y != -1).sum())
        full_shape = full_shape or group[0].x.shape
        forward = model if compiled is None or batch.x.shape != full_shape else compiled
        batch = batch.to(device)
        with context():
            _, mean = forward(batch.x, batch.y, docs=batch.docs, loss_only=True)
        # a sum over tokens: a mean of means would weight the tokens of the last batch more
        sums.append(mean.item() * n if rank < len(group) else 0.0)
        count += sum(int((batch.y != -1).sum()) for batch in group)
        windows += sum(len(batch.x) for batch in group)
    return sums, count, windows


def text_size(tokenizer, tokens, first, end, piece=1 << 20):
    """Characters and UTF-8 bytes of the text of tokens first .. end - 1 of a stream. -> int64 (2,)

    A character of several tokens counts where its first byte is, so the sum is that of the decoded text. Special tokens
    have no text. Of conversations, the learned tokens count. The stream is read a `piece` at a time, so that a long
    split takes no more memory.
    """
    sizes = np.zeros((max(tokens.vocab_size, len(tokenizer.pieces)), 2), np.int64)  # of each token id
    for i, text in enumerate(tokenizer.pieces):
        sizes[i] = sum(byte & 0xC0 != 0x80 for byte in text), len(text)
    total = np.zeros(2, np.int64)
    for start in range(first, end, piece):
        ids = tokens.read([start], min(piece, end - start))[0]
        if tokens.row_size:
            ids = ids[tokens.read_bits("learned", [start], len(ids))[0]]
        total += sizes[ids].sum(0)
    return total


def open_split(c, model, tokenizer, state, folder):
    """-> (tokens of the split, sha256 that names the dataset). Raises ValueError for tokens of another model."""
    datasets, manifest, dataset_sha256 = open_datasets(c.dataset or state["config"]["dataset"])
    doc_mask = state["config"].get("doc_mask")  # as the run was trained
    bos = tokenizer.bos if tokenizer else None
    tokens = open_tokens(datasets, c.split, model.config.vocab_size, doc_mask, bos)
    if tokenizer and manifest.get("tokenizer", {}).get("sha256", tokenizer.sha256) != tokenizer.sha256:
        raise ValueError(f"{datasets[0][0]} was prepared with another tokenizer than {folder} was trained with: their "
                         "ids differ")
    return tokens, dataset_sha256


def window_size(c, model, tokens):
    """The tokens of a window. Raises ValueError for a block_size that the model or the dataset does not have."""
    if not 0 <= c.block_size <= model.config.block_size:
        raise ValueError(f"--block_size={c.block_size}: the model sees at most {model.config.block_size} tokens")
    block_size = c.block_size or tokens.row_size or model.config.block_size
    if tokens.row_size not in (0, block_size):
        raise ValueError(f"--block_size={block_size}: {tokens.folder} has rows of {tokens.row_size} tokens")
    return block_size


# -----------------------------------------------------------------------------
# The verbs: each prints its results, and returns them for the last line


def whole_split(c, model, tokenizer, state, folder, context):
    """The loss over the whole split."""
    tokens, dataset_sha256 = open_split(c, model, tokenizer, state, folder)
    block_size = window_size(c, model, tokens)
    result = evaluate(model, tokens, block_size, c.batch_size, c.eval_iters, context, tokenizer=tokenizer)
    print(f"{folder} on {result['tokens']:,} tokens of {tokens.folder}, split {c.split}:")
    figures = [f"loss {result['loss']:.4f}", f"perplexity {result['perplexity']:.3f}"]
    if not tokenizer or tokenizer.kind != "char":  # a character's token is the character
        figures.append(f"bits per token {result['bits']:.4f}")
    for unit in ("character", "byte"):
        if f"bits_per_{unit}" in result:
            figures.append(f"bits per {unit} {result[f'bits_per_{unit}']:.4f}")
    print("  ".join(figures))
    return {**result, "split": c.split, "dataset_sha256": dataset_sha256}


def write_samples(c, model, tokenizer, state, folder, context):
    """Samples of every prompt in a Markdown file."""
    sampling = sampling_from(c)
    prompts = read_prompts(c.prompts)
    target = Path(c.out) if c.out else run_of(folder) / f"samples_step_{state['step']}.md"
    engine = Engine(model, tokenizer, slide=model.config.pos == "rope")
    samples, skipped = draw_samples(engine, prompts, sampling, c.num_samples)

    val_loss = f", validation loss {state['val_loss']:.4f}" if state["val_loss"] is not None else ""
    weights = code(state["files"].get("model.safetensors", "in parts")[:16])
    precision = str(engine.dtype).removeprefix("torch.")
    if c.quantize:
        precision += f", {c.quantize}"
    facts = [
        f"checkpoint: {code(str(folder))}{val_loss}; sha256 of its weights {weights}",
        f"temperature {c.temperature:g}, top_k {c.top_k}, top_p {c.top_p:g}, at most {c.max_new_tokens} new tokens",
        f"seeds {c.seed} to {c.seed + c.num_samples - 1}, the same for each prompt; {engine.device}, {precision}",
    ]
    facts += [f"skipped: {code(prompt)}, because of: {code(why)}" for prompt, why in skipped.items()]
    write_whole(target, markdown(f"Samples of step {state['step']}", facts, samples))

    count = len(samples) * c.num_samples
    also = f"; {len(skipped)} skipped" if skipped else ""
    print(f"{count} samples of {len(samples)} prompts are in {target}{also}")
    return {"file": str(target), "samples": count, "left_out": list(skipped)}


def score_task(c, model, tokenizer, state, folder, context):
    """Multiple choice by text or by letter, or last words."""
    if c.what == "letters":
        template = Template(tokenizer)
        items = open_letters(c.task, c.data, c.limit)
        result = by_letter(model, template, items, c.batch_size, context)
    else:
        words = c.what == "lastword"
        items = open_items(c.task, c.data, words, c.limit)
        score = last_word if words else multiple_choice
        result = score(model, tokenizer, items, c.batch_size, context)
    print(f"{folder} on {len(items):,} items of {c.data or c.task}:")
    figures = []
    for name, value in result.items():
        if name == "items" or name.endswith("_stderr"):
            continue
        if isinstance(value, int):
            figures.append(f"{name} {value:,}")
        elif f"{name}_stderr" not in result:
            figures.append(f"{name} {value:.3f}")
        elif len(items) == 1:
            figures.append(f"{name} {value:.4f}")
        else:
            figures.append(f"{name} {value:.4f} ± {result[f'{name}_stderr']:.4f}")
    print("  ".join(figures))
    questions = json.dumps([(item.pairs, item.answer) for item in items], ensure_ascii=False)
    return {**result, "task": c.task or c.data, "items_sha256": sha256(questions)}


def chat(c, model, tokenizer, state, folder, context):
    """Answers to conversations: do they end by themselves, are they right? And the loss of held-out answers."""
    template = Template(tokenizer)
    sampling = replace(sampling_from(c), stop_tokens=template.stops)
    questions, source = open_questions(c, model, tokenizer, template, state, folder)
    result = {}
    if not (c.task or c.data):
        result = whole_split(c, model, tokenizer, state, folder, context)
    drawn = f"drawn at temperature {c.temperature:g}"
    if any(question.answer is not None for question in questions):  # answers to check are the likeliest ones
        sampling = replace(sampling, temperature=0.0)
        drawn = "greedy"

    prompts = chat_tasks.make_prompts(template, questions, model.config.block_size, c.max_new_tokens)
    if not c.quantize:
        convert(model, pick_dtype(c.dtype, next(model.parameters()).device)[0])
    cache = chat_tasks.cache_size(prompts, c.batch_size)
    engine = Engine(model, tokenizer, max_tokens=cache, max_requests=c.batch_size)
    answers = chat_tasks.draw_answers(engine, prompts, sampling)
    result |= chat_tasks.figures(questions, answers)
    print(f"{folder}: answers to {len(questions):,} {source}, {drawn}:")
    print(*chat_tasks.table(result), sep="\n")
    return {**result, "temperature": sampling.temperature, "seed": c.seed, "task": c.task or c.data,
            "items_sha256": chat_tasks.questions_sha256(questions)}


def open_questions(c, model, tokenizer, template, state, folder):
    """-> (the Questions of eval.py chat, what they are in words). Raises ValueError."""
    if c.task and c.data:
        raise ValueError(f"--task={c.task} asks generated questions, --data={c.data} those of a file: give one of them")
    if c.task == "puzzles":
        questions = chat_tasks.puzzle_questions(c.limit or 1000, c.seed, c.kinds, c.digits, c.letters)
        return questions, "puzzles that no training has seen"
    if c.task:
        raise ValueError(f"task={c.task!r} is no task of eval.py chat: it has puzzles, and --data=FILE.jsonl takes "
                         "conversations of your own")
    if c.data:
        return chat_tasks.read_questions(c.data, c.limit), f"conversations of {c.data}"
    tokens, _ = open_split(c, model, tokenizer, state, folder)
    questions = chat_tasks.held_out(tokens, template, c.limit or 200)
    return questions, f"conversations of {tokens.folder}, split {c.split}"


def long_context(c, model, tokenizer, state, folder, context):
    """Loss by position. With eval_iters=0 all lengths have the same targets."""
    figure = open_figure(c.plot) if c.plot else None
    tokens, dataset_sha256 = open_split(c, model, tokenizer, state, folder)
    if len(tokens.parts) > 1:
        raise ValueError("eval.py context reads one dataset: name it with --dataset")
    trained = model.config
    todo = cases(trained, tokens, c.lengths, c.rope_scaling, c.rope_factor)
    width = c.bin_size or max(1, trained.block_size // 2)
    print(f"{folder} on {tokens.folder}, split {c.split}; context {trained.block_size}; loss by position, in bins of "
          f"{width}:")
    rows = []
    for length, scaling, factor in todo:
        if factor:
            stretch(model, trained, scaling, factor)
        windows = max(1, c.batch_size * trained.block_size // length)
        total, count = loss_by_position(model, tokens, length, windows, c.eval_iters, context)
        edges = [*range(0, length, width), length]
        bins = [(total[a:b].sum() / count[a:b].sum()).item() for a, b in itertools.pairwise(edges)]
        loss = (total.sum() / count.sum()).item()
        rows.append({"length": length, "rope_scaling": scaling, "rope_factor": model.config.rope_factor,
                     "loss": loss, "tokens": int(count.sum()), "bins": bins})
        print(f"{length:>7} {scaling:<6} {loss:8.4f} |", *(f"{bin_loss:.4f}" for bin_loss in bins), flush=True)
    if figure:
        draw_losses(figure, rows, width, trained.block_size, f"{c.out_dir}, split {c.split}", c.plot)
    return {"rows": rows, "bin": width, "split": c.split, "dataset_sha256": dataset_sha256}


def hidden_key(c, model, tokenizer, state, folder, context):
    """Whether the model finds a key that is hidden in text of the split, at each depth of each length."""
    tokens, dataset_sha256 = open_split(c, model, tokenizer, state, folder)
    filler = tokens.parts[0][0]  # of a mix the first dataset
    trained = model.config
    todo = cases(trained, filler, c.lengths, c.rope_scaling, c.rope_factor)
    print(f"{folder}: a key hidden in {tokens.folder}, split {c.split}; found exactly / chosen among {c.alternatives}, "
          f"of {c.trials}")
    print(" length scaling", *(f"depth {depth:<5g}" for depth in c.depths))
    rows = []
    for length, scaling, factor in todo:
        if factor:
            stretch(model, trained, scaling, factor)
        cells = []
        for depth in c.depths:
            shares = passkey(model, tokenizer, filler, length, depth, sentence=c.sentence, trials=c.trials,
                             alternatives=c.alternatives, seed=c.seed, batch_size=c.batch_size, context=context)
            rows.append({"length": length, "rope_scaling": scaling, "depth": depth, **shares})
            cells.append(f"{shares['exact']:4.0%} / {shares['chosen']:4.0%}")
        print(f"{length:>7} {scaling:<6} ", *cells, flush=True)
    return {"rows": rows, "trials": c.trials, "chance": 1 / c.alternatives, "seed": c.seed, "split": c.split,
            "dataset_sha256": dataset_sha256}


def calibrate(c, model, tokenizer, state, folder, context):
    """Static scales for FP8, or codes of 4 bits, written beside the weights."""
    form = c.quantize or "fp8"
    calibration.check(form, c.split, c.noise)
    tokens, dataset_sha256 = open_split(c, model, tokenizer, state, folder)
    size, most = window_size(c, model, tokens), c.eval_iters or 8
    about = {"dataset": str(tokens.folder), "dataset_sha256": dataset_sha256, "split": c.split}
    if form == "fp8":
        batches = calibration.windows(tokens, size, c.batch_size, most)
        return calibration.make_scales(model, batches, context, folder, state, about, c.seed if c.noise else None)
    training, _ = open_split(c.changed(split="train"), model, tokenizer, state, folder)
    batches = calibration.windows(training, size, c.batch_size, most)

    def loss(rounded):
        return evaluate(rounded, tokens, size, c.batch_size, most, context)["loss"]

    return calibration.make_codes(model, form, batches, context, folder, state, {**about, "split": "train"}, loss)


VERBS = {"loss": whole_split, "prompts": write_samples, "choice": score_task, "lastword": score_task,
         "context": long_context, "passkey": hidden_key, "chat": chat, "letters": score_task,
         "calibrate": calibrate}

# -----------------------------------------------------------------------------


def check_settings(c):
    """Ends the run for settings that have no meaning."""
    if c.split not in ("train", "val"):
        fail(f"split={c.split!r} is not one of train, val")
    if unknown := [name for name in c.rope_scaling if name not in SCALINGS]:
        fail(f"rope_scaling={unknown[0]!r} is not one of {', '.join(SCALINGS)}")
    if 0 < c.rope_factor < 1:
        fail(f"rope_factor={c.rope_factor} must be at least 1, or 0: as the length needs")
    if c.what not in SEVERAL and (len(c.rope_scaling) > 1 or bool(c.rope_scaling) != bool(c.rope_factor)):
        fail(f"eval.py {c.what} takes one rope_scaling with its rope_factor, as --rope_scaling=yarn --rope_factor=4")
    if c.sentence.count("{key}") != 1 or not c.sentence.partition("{key}")[0].strip():
        fail(f"sentence={c.sentence!r} must have {{key}} once, and some words before it")


def main(c):
    check_settings(c)
    try:
        device, _ = pick_device(c.device)
        dtype, _ = pick_dtype(c.dtype, device)
        scaling = ""
        if c.rope_scaling and c.what not in SEVERAL:
            scaling = c.rope_scaling[0]
        model, tokenizer, state, folder = load(c.out_dir, c.ckpt, device, scaling, c.rope_factor)
        if tokenizer is None and c.what not in ("loss", "context", "calibrate"):
            raise ValueError(f"{c.out_dir} has no tokenizer, so no text can be turned into its tokens")
        if c.what == "prompts" or c.quantize and c.what != "calibrate":
            weights = dtype if c.what == "prompts" else torch.float32
            calibration.convert_run(model, weights, c.quantize, c.out_dir, state)
        with inference_kernels(device):
            result = VERBS[c.what](c, model, tokenizer, state, folder, autocast(device, dtype))
    except (ValueError, OSError) as e:  # CheckpointError and DataError are ValueErrors
        fail(e)
    except (MemoryError, RuntimeError) as e:
        if full := memory_is_full(e):
            fail(f"{full}: a smaller --batch_size or --block_size takes less")
        raise
    print(json.dumps({**finite(result), "step": state["step"]}))


if __name__ == "__main__":
    c = Settings(configure(globals(), verb="what", verbs=tuple(VERBS)))
    main(c)
