"""
Before the first step: the machine, the data, the settings that follow from others, and what the run leaves behind.

Whatever the user can get wrong ends here or in origin.py, in one line, before anything is written.
"""

import math
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

import checkpoint
import plan
from configurator import fail
from dataset import open_datasets, open_tokens, verify_shards
from device import (
    SDPA,
    allocate_in_segments,
    autocast,
    free_memory,
    memory_is_full,
    pick_device,
    pick_dtype,
    use_sdpa,
    use_tf32,
)
from model import GPT, GPTConfig
from tokenizer import load_tokenizer, meta_vocab_size
from training import guard
from training.guard import ACTIONS
from training.monitor import announce, environment
from training.pipeline_parallel import SCHEDULES
from training.ranks import from_environment, own_device, rank
from training.track import TRACKERS, Tracker

CHOICES = {
    "optimizer": ("adamw", "muon"), "muon_dtype": ("float32", "bfloat16", "auto"),
    "lr_schedule": ("cosine", "linear", "wsd"), "zero_stage": (0, 1, 2, 3), "backend": ("nccl", "gloo"), "sdpa": SDPA,
    "checkpoint_format": ("plain", "sharded"), "pp_schedule": SCHEDULES, "on_nan": ACTIONS, "on_spike": ACTIONS,
    "tracker": TRACKERS, "activation_checkpointing": ("none", "selective", "full"),
}


@contextmanager
def one_line_errors():
    """Around the setup: a setting that cannot be had is the user's to mend. Later errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        fail(e)


@contextmanager
def full_memory_explained(c):
    """Ends the run in one line where memory is full: what took it, and which settings take less."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
        if full := memory_is_full(e):
            fail(f"{full}: {smaller(c)}")
        raise


def check_settings(c):
    """Ends the run for a setting that has no meaning."""
    plan.model_fields(dict(c))  # says which key is missing
    if c.decay_lr and not 0 <= c.min_lr <= c.learning_rate:
        fail(f"min_lr={c.min_lr} must lie between 0 and learning_rate={c.learning_rate}; or set decay_lr=false")
    for key, choices in CHOICES.items():
        if c[key] not in choices:
            named = ", ".join(str(choice) or "nothing" for choice in choices)
            fail(f"{key}={c[key]!r} is not one of {named}")


# -----------------------------------------------------------------------------
# The machine


@dataclass
class Machine:
    """The device of this process and the precision it computes in, each with the reason for the choice."""

    device: torch.device
    device_why: str
    dtype: torch.dtype
    dtype_why: str
    context: Any  # the context manager that forward passes run in: autocast

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")


def prepare_machine(c):
    """Pick device and precision, and set PyTorch up for them. -> Machine. Raises ValueError."""
    if c.threads:
        torch.set_num_threads(c.threads)
    device, device_why = pick_device(c.device)
    if device.type == "cuda":
        allocate_in_segments()
    device = own_device(c.device, device, c.backend)
    dtype, dtype_why = pick_dtype(c.dtype, device)
    machine = Machine(device, device_why, dtype, dtype_why, autocast(device, dtype))
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # the events that time a step are recorded there
    use_tf32(c.tf32, device)
    use_sdpa(c.sdpa, device)
    if c.attn == "flash" and (device.type != "cuda" or dtype == torch.float32):
        fail(f"attn='flash' needs a CUDA device and half precision, not {device.type} in {machine.dtype_name}")
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return machine


# -----------------------------------------------------------------------------
# The data


@dataclass
class Data:
    """A dataset, or a mix of several: its folders with their weights, what names it, and its two splits."""

    folders: list  # (folder, weight)
    sha256: str
    tokenizer: Any  # None where the dataset has token ids alone
    vocab_size: int
    train: Any = None  # dataset.Tokens, once open_splits has opened them
    val: Any = None

    @property
    def source(self):
        return ", ".join(str(folder) for folder, _ in self.folders)

    @property
    def unit(self):
        return "char" if self.tokenizer and self.tokenizer.kind == "char" else "token"


def open_data(dataset):
    """Find a dataset and its tokenizer. -> Data, without its splits. Raises DataError."""
    folders, manifest, sha256 = open_datasets(dataset)
    return Data(folders, sha256, *vocabulary(folders[0][0], manifest))


def vocabulary(source, manifest):
    """(tokenizer or None, vocab_size) of a dataset. One that says nothing is GPT-2's, as nanoGPT's datasets are; of
    nanoGPT's meta.pkl the vocab_size is enough. Raises ValueError for a tokenizer that cannot be read."""
    try:
        tokenizer = load_tokenizer(source)
    except FileNotFoundError:
        return None, manifest.get("tokenizer", {}).get("vocab_size", 50257)
    except ValueError as e:
        size = meta_vocab_size(source)
        if size is None:
            raise
        if rank() == 0:
            print(f"warning: {e}; the run trains on its {size:,} token ids and has no tokenizer", file=sys.stderr)
        return None, size
    return tokenizer, max(tokenizer.vocab_size, meta_vocab_size(source) or 0)


def open_splits(c, data, vocab_size, layout):
    """Open the training and validation tokens of `data`. Ends the run where they do not fit the settings."""
    tokenizer = data.tokenizer
    if tokenizer and vocab_size < data.vocab_size:
        fail(f"vocab_size={c.vocab_size} is too small for {data.source}, which has {data.vocab_size} token ids; "
             "0 takes that")
    if tokenizer and c.sample_tokens:
        check_sample_start(c, tokenizer)
    if c.verify_data:
        for folder, _ in data.folders:
            verify_shards(folder)
    data.train = open_tokens(data.folders, "train", vocab_size)
    data.val = open_tokens(data.folders, "val", vocab_size)
    if len(data.val) < 2:
        fail(f"{data.source}: {len(data.val)} validation tokens are too few: at least 2")
    layout.on_rank0(lambda: check_validation(c, data.val))


def check_sample_start(c, tokenizer):
    """Ends the run where sample_start is no prompt."""
    try:
        prompt = tokenizer.encode(c.sample_start)
    except ValueError as e:
        fail(f"sample_start={c.sample_start!r}: {e}")
    if not prompt:
        fail("sample_start is empty: a sample needs at least one character to start from")


def check_validation(c, val_tokens):
    """Read the tokens of an evaluation before the first step. Raises DataError for damaged ones."""
    for part, _ in val_tokens.parts:
        targets = len(part) - 1
        if c.eval_iters:
            targets = min(targets, c.eval_iters * max(1, 16384 // c.block_size) * c.block_size)
        part.sha256_of(targets + 1)  # kept: the evaluation asks for the same digest


# -----------------------------------------------------------------------------
# Settings that follow from others


def make_model_config(c, data):
    sizes = {f.name: c[f.name] for f in fields(GPTConfig)}
    return GPTConfig(**{**sizes, "vocab_size": c.vocab_size or data.vocab_size})


@dataclass
class Budget:
    """How an update is cut into micro-batches (over all ranks), and the memory of a step, in bytes."""

    micro_batches: int
    step_bytes: float  # plan.py's estimate
    free_bytes: float  # None where it is not known


def settle_batch(c, origin, model_config, layout, machine):
    """Settle the micro-batch and the accumulation. -> (c with its batch_size, Budget). Ends the run where no batch
    fits the settings."""
    with torch.device("meta"):
        costs = plan.costs_of(GPT(model_config))
    free = free_memory(machine.device, from_environment("LOCAL_WORLD_SIZE", 1))
    grid = plan.Layout(layout.dp, layout.zero, c.tp_size, c.pp_size, c.activation_checkpointing)

    def step_bytes(batch_size, accumulation):
        cuda = machine.device.type == "cuda"
        return plan.step_memory(costs, batch_size, machine.dtype, 0, grid, accumulation, cuda)["total"]

    if not c.batch_size and origin.resumes:  # the same micro-batches give the same bits
        c = c.changed(batch_size=origin.state["batch_size"],
                      gradient_accumulation_steps=origin.state["gradient_accumulation_steps"])
    elif not c.batch_size:
        c = c.changed(batch_size=largest_batch(c, step_bytes, free, layout), gradient_accumulation_steps=None)
    micro_batches = micro_batches_of(c)
    accumulation = layout.accumulation_of(micro_batches)
    return c, Budget(micro_batches, step_bytes(c.batch_size, accumulation), free)


def largest_batch(c, step_bytes, free, layout):
    """The largest micro-batch that divides tokens_per_step and leaves plan.py's reserve of the `free` bytes.
    step_bytes(batch_size, accumulation) are the bytes a step takes. Ends the run where nothing fits."""
    sequences, rest = divmod(c.tokens_per_step, c.block_size)
    if rest or not sequences or not free:
        mend = f"set it, for example to {8 * c.block_size}" if free else "here nothing says how much memory is free"
        fail(f"batch_size=0 takes what fits, of tokens_per_step, a multiple of block_size; {mend}")
    largest, least_bytes = 0, math.inf
    for batch_size in plan.divisors(sequences):
        with suppress(ValueError):  # the ranks cannot share so few micro-batches
            needed = step_bytes(batch_size, layout.accumulation_of(sequences // batch_size))
            least_bytes = min(least_bytes, needed)
            if needed <= free * (1 - plan.reserve):
                largest = max(largest, batch_size)
    largest = -layout.agree(-largest)[0]  # every rank has room for the smallest of them
    if not largest:
        fail(f"batch_size=0: a step takes at least {least_bytes / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free: "
             f"{smaller(c)}")
    return largest


def smaller(c):
    """Advice where a step takes too much memory."""
    advice = "--activation_checkpointing=full takes less, and with more processes --zero_stage=3"
    pieces = next((n for n in range(2, c.batch_size + 1) if c.batch_size % n == 0), 1)
    if pieces == 1:
        return advice
    flags = f"--batch_size={c.batch_size // pieces}"
    if not c.tokens_per_step:
        flags += f" --gradient_accumulation_steps={pieces * (c.gradient_accumulation_steps or 1)}"
    return f"{flags} is the same update in smaller pieces; {advice}"


def micro_batches_of(c):
    """Micro-batches of an update over all ranks, from gradient_accumulation_steps or tokens_per_step. Ends the run
    where they disagree, or where the context does not double to its length."""
    doublings = [c.block_size >> n for n in range(c.block_size.bit_length()) if c.block_size % (1 << n) == 0]
    if c.context_start and c.context_start not in doublings:
        fail(f"context_start={c.context_start} does not double to block_size={c.block_size}")
    if not c.tokens_per_step:
        return c.gradient_accumulation_steps or 1
    micro = c.batch_size * c.block_size
    count, rest = divmod(c.tokens_per_step, micro)
    if rest or not count:
        below = max(1, count)
        fail(f"tokens_per_step={c.tokens_per_step} is not a multiple of batch_size x block_size = {c.batch_size} x "
             f"{c.block_size} = {micro}; {below * micro} and {(below + 1) * micro} are")
    if c.gradient_accumulation_steps not in (None, count):
        fail(f"tokens_per_step={c.tokens_per_step} takes {count} micro-steps, but gradient_accumulation_steps="
             f"{c.gradient_accumulation_steps}; leave one of them out")
    return count


def first_state(c, origin, model_config, budget, data, layout, machine):
    """The state of a run as state.json holds it, before its first step."""
    return {
        "step": 0, "wall_s": 0.0, "metrics_bytes": 0, "scaler": None, "skipped": origin.skipped,
        "model": asdict(model_config), "config": dict(c), "seed": c.seed, "dataset_sha256": data.sha256,
        "train_tokens": len(data.train), "batch_size": c.batch_size,
        "gradient_accumulation_steps": budget.micro_batches, "optimizer": c.optimizer,
        "threads": torch.get_num_threads(), "ranks": layout.world, "dtype": machine.dtype_name,
    }


# -----------------------------------------------------------------------------
# What the run leaves behind


def hold_folder(c, lock, resumed):
    """Keep other processes from training into out_dir, which is made where it is not there."""
    os.makedirs(c.out_dir, exist_ok=True)
    lock.take()
    if not resumed and (steps := checkpoint.steps(c.out_dir)):
        fail(f"another process has trained into {c.out_dir} meanwhile (step {max(steps)}): resume it with "
             "--init_from=resume, or begin in another --out_dir")


def open_run(c, run, lock, layout, origin, data, machine):
    """Open the run's folder on rank 0: take its lock, write what the run is, and cut its logs to the checkpoint."""
    def open_files():
        run.open(dict(c), environment(machine.device, data.sha256), run.state["metrics_bytes"])

    layout.on_rank0(lambda: hold_folder(c, lock, origin.resumes))
    layout.on_rank0(open_files)
    layout.on_rank0(lambda: guard.keep_skipped(c.out_dir, origin.skipped))
    if data.tokenizer:
        layout.on_rank0(lambda: run.keep("tokenizer.json", data.tokenizer.to_json()))


def announce_run(c, run, origin, changed, budget, measure):
    """Say what the run is, on the screen and in its events; warn of what may go wrong; start the tracker."""
    layout, machine, model_config = measure.layout, measure.machine, measure.layout.model.config
    attention = announce(c, run, budget, measure, model_config)
    run.event("resume" if origin.resumes else "start", step=run.state["step"], changed=changed, resolved={
        "device": str(machine.device), "dtype": machine.dtype_name, "attn": attention,
        "threads": torch.get_num_threads(), "vocab_size": model_config.vocab_size,
        "gradient_accumulation_steps": budget.micro_batches, "ranks": layout.world,
    })
    if budget.free_bytes and budget.step_bytes > budget.free_bytes:
        run.warn(f"a step takes about {budget.step_bytes / 1e9:.2g} GB, and {budget.free_bytes / 1e9:.2g} GB are "
                 f"free: {smaller(c)}")
    if changed:
        run.warn(f"resumed with other settings than it was saved with: {changed}")
    tracker = c.tracker or ("wandb" if c.wandb_log else "")
    if layout.rank:
        tracker = ""
    run.tracker = Tracker(tracker, run.dir, dict(c), c.wandb_project, c.wandb_run_name, run.state["step"], run.warn)
    if run.tracker.where:
        run.say(f"tracker     {run.tracker.where}")
