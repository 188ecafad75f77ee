"""
How fast a chat model answers and is fine-tuned: bench.py's `turns` and `sft`.

`turns`: the time to the first token of the second turn of a talk, for each length of history. The engine still has the
keys and values of the first turn (warm), or has forgotten them (cold).

`sft`: updates of full fine-tuning on the same model and conversations, by train.py and, where it is installed, by TRL's
SFTTrainer, which pads each conversation of a batch to the longest, or packs them into one long row with a mask. Tokens
of conversations a second, padding not counted.

All measurements take turns for several rounds, and a figure is the median of its rounds.
"""

import contextlib
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import form_of, in_processes, machine, new_folder, read_run, run_script, table, timed
from configurator import fail
from conversation import Template
from dataset import DataError, Tokens, find_dataset
from device import pick_device
from export import write_hugging_face
from infer import Engine, load
from inference.quantize import convert
from tokenizer import load_tokenizer

MESSAGE, ANSWER = 32, 16  # tokens of the second turn's message, and of the first turn's answer

# -----------------------------------------------------------------------------
# The second turn


@torch.no_grad()
def bench_turns(c):
    """-> a row for each model, form and length of history"""
    device = pick_device(c.device)[0]
    rows = []
    for folder in c.models or fail("--models=RUN names the models to time"):
        for form in c.forms:
            try:
                model = load(folder, device=device)[0]
            except (OSError, ValueError) as error:
                fail(error)
            needed = max(c.prompts) + MESSAGE + ANSWER + 1
            if model.config.block_size < needed:
                fail(f"--prompts={max(c.prompts)}: {folder} has a context of {model.config.block_size}, and the talk "
                     f"takes {needed} tokens")
            convert(model, *form_of(form, device))
            engine = Engine(model)
            for history in c.prompts:
                pairs = [second_turn(engine, history, i) for i in range(c.rounds)]
                cold, warm = (statistics.median(times) for times in zip(*pairs, strict=True))
                rows.append({"model": Path(folder).name, "form": form, "history": history, "message": MESSAGE,
                             "cold_ms": 1000 * cold, "warm_ms": 1000 * warm, "warm_share": warm / cold})
    print(f"{device} ({torch.get_num_threads()} threads); first token of the second turn, median of {c.rounds} rounds")
    table(rows, ["model", "form", "history", "message", "cold_ms", "warm_ms", "warm_share"])
    return {"machine": machine(), "device": str(device), "rows": rows}


def second_turn(engine, history, seed):
    """-> seconds to the first token of a second turn with a forgotten first turn, and with a known one"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(engine.model.config.vocab_size, (history + MESSAGE,), generator=generator).tolist()
    first = engine.generate(ids[: history - ANSWER], max_new_tokens=ANSWER, temperature=0, ignore_eos=True)
    second = first.ids + ids[history:]
    warm = first_token(engine, second)
    engine.blocks.forget()
    return first_token(engine, second), warm


def first_token(engine, ids):
    request = engine.submit(ids, max_new_tokens=1, temperature=0)

    def until_done():
        while not request.finish:
            engine.step()

    return timed(until_done)


# -----------------------------------------------------------------------------
# Fine-tuning


def bench_sft(c):
    """-> a row for each form and trainer"""
    folder = (c.models or fail("--models=RUN names the model to fine-tune"))[0]
    root = new_folder(c.out_dir)
    talks = read_talks(c.dataset, folder)
    tokens = sum(len(ids) for _, ids in talks)
    trainers = {"minichat": ours}
    if importlib.util.find_spec("trl"):
        trainers |= {"TRL, padded": padded, "TRL, packed": packed}
    speeds = {}
    for i in range(c.rounds):
        for form in c.forms:
            for name, trainer in trainers.items():
                speed = trainer(c, folder, root / f"{len(speeds)}_{i}", talks, form)
                speeds.setdefault((form, name), []).append(speed)
                print(f"    {form} {name}: {speed:.0f} tokens/s", file=sys.stderr)
    shutil.rmtree(root, ignore_errors=True)
    rows = []
    for (form, name), rounds in speeds.items():
        rows.append({"form": form, "trainer": name, "tok_per_s": statistics.median(rounds),
                     "slowest": min(rounds), "fastest": max(rounds)})
    print(f"{Path(folder).name} on {len(talks):,} conversations of {tokens:,} tokens, {torch.get_num_threads()} "
          f"threads; updates of about {c.tokens} tokens, median of {c.rounds} rounds of {c.updates} updates")
    table(rows, ["form", "trainer", "tok_per_s", "slowest", "fastest"])
    return {"machine": machine(), "conversations": len(talks), "conversation_tokens": tokens, "rows": rows}


def read_talks(dataset, folder):
    """The training conversations of a dataset. -> list of (messages, ids)"""
    try:
        path = find_dataset(dataset)
        template = Template(load_tokenizer(path))
        split = Tokens(path, "train")
    except (DataError, ValueError, OSError) as error:
        fail(error)
    if not split.row_size:
        fail(f"--dataset={dataset} has no conversations: data/chat/prepare.py makes some")
    talks = []
    for start in range(0, len(split), split.row_size):
        ids = split.read([start], split.row_size)[0].tolist()
        begins = split.read_bits("begins", [start], split.row_size)[0].nonzero()[0].tolist()
        for first, end in zip(begins, [*begins[1:], split.row_size], strict=True):
            with contextlib.suppress(ValueError):  # padding
                talks.append((template.decode(ids[first:end]), ids[first:end]))
    return talks


def ours(c, folder, out_dir, talks, form):
    """Tokens a second of train.py. The padding of the rows, a few percent, does not count."""
    path = find_dataset(c.dataset)
    split = Tokens(path, "train")
    rows = max(1, c.tokens // split.row_size)
    run_script("train.py", f"--init_from={folder}", f"--dataset={path}", f"--out_dir={out_dir}", f"--dtype={form}",
               f"--batch_size={rows}", f"--max_iters={c.updates + c.warm_up}", "--learning_rate=1e-5", "--min_lr=0",
               "--warmup_iters=1", "--eval_interval=1000000", "--eval_iters=1", "--probe_interval=0",
               f"--device={c.device}", "--save_minutes=0")
    records, _ = read_run(out_dir)
    step_s = statistics.median(record["step_ms"] for record in records[c.warm_up :]) / 1000
    shutil.rmtree(out_dir)
    filled = sum(len(ids) for _, ids in talks) / len(split)
    return rows * split.row_size * filled / step_s


def padded(c, folder, out_dir, talks, form):
    return in_processes(trl_speed, folder, str(out_dir), talks, form, c.tokens, c.updates, c.warm_up, 0)[0]


def packed(c, folder, out_dir, talks, form):
    row_size = Tokens(find_dataset(c.dataset), "train").row_size
    return in_processes(trl_speed, folder, str(out_dir), talks, form, c.tokens, c.updates, c.warm_up, row_size)[0]


def trl_speed(folder, out_dir, talks, form, tokens, updates, warm_up, row_size):
    """Tokens a second of TRL's SFTTrainer on the same model, in a process of its own. row_size: of packed rows; 0: each
    conversation is padded to the longest of its batch."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)  # of in_processes: with them the trainer would wrap the model for many processes
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        ends = []

        def on_step_end(self, *args, **options):
            self.ends.append(time.perf_counter())

    mean = sum(len(ids) for _, ids in talks) / len(talks)
    rows = tokens // row_size if row_size else round(tokens / mean)
    with tempfile.TemporaryDirectory() as hugging_face:
        target = Path(hugging_face) / "model"
        model, tokenizer, _, _ = load(folder)
        with contextlib.redirect_stdout(sys.stderr):
            write_hugging_face(model, tokenizer, target)
        settings = SFTConfig(
            out_dir, per_device_train_batch_size=rows, max_steps=updates + warm_up, learning_rate=1e-5,
            assistant_only_loss=True, packing=bool(row_size), max_length=row_size or 256, bf16=form == "bfloat16",
            use_cpu=True, report_to=[], save_strategy="no", logging_steps=1000, gradient_checkpointing=False,
        )
        clock = Clock()
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(target), settings, callbacks=[clock],
            train_dataset=Dataset.from_list([{"messages": messages} for messages, _ in talks]),
            processing_class=AutoTokenizer.from_pretrained(target),
        )
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    steps_s = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][warm_up - 1 :]
    filled = sum(len(ids) for _, ids in talks) / (len(trainer.train_dataset) * row_size) if row_size else 1.0
    per_update = rows * row_size * filled if row_size else rows * mean
    return per_update / statistics.median(steps_s)
