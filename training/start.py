"""
Setting up a run: the machine, the data, the settings that follow from others, the run's folder.

train.py calls these functions in the order in which they stand here. A mistake of the user's ends the run here or in
origin.py, with one line, before anything is written.
"""

import gc
import math
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import checkpoint
import float8
import plan
from configurator import fail
from dataset import open_datasets, open_tokens, row_size_of, verify_shards
from device import (
    SDPA,
    allocate_in_segments,
    autocast,
    free_memory,
    keep_memory,
    memory_is_full,
    pick_device,
    pick_dtype,
    pick_threads,
    use_sdpa,
    use_tf32,
)
from loader import evaluation_rows
from model import GPT
from tokenizer import load_tokenizer, meta_vocab_size
from training import guard
from training.guard import ACTIONS
from training.monitor import announce, environment
from training.pipeline_parallel import SCHEDULES
from training.ranks import from_environment, own_device, rank
from training.track import TRACKERS, Tracker

CHOICES = {
    "optimizer": ("adamw", "muon"),
    "muon_dtype": ("float32", "bfloat16", "auto"),
    "lr_schedule": ("cosine", "linear", "wsd"),
    "zero_stage": (0, 1, 2, 3),
    "backend": ("nccl", "gloo"),
    "sdpa": SDPA,
    "checkpoint_format": ("plain", "sharded"),
    "pp_schedule": SCHEDULES,
    "on_nan": ACTIONS,
    "on_spike": ACTIONS,
    "tracker": TRACKERS,
    "activation_checkpointing": ("none", "selective", "full"),
}


@contextmanager
def one_line_errors():
    """Around the setup: an error here is one that the user can mend. Later errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        fail(e)


class FullMemory(MemoryError):
    """Memory is full. The message says what took it, and which settings take less."""


@contextmanager
def full_memory_explained(c):
    """Around a run: turns an error about full memory into FullMemory, with advice that fits the settings `c`."""
    try:
        yield
    except FullMemory:
        raise
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
        full = memory_is_full(e)
        if not full:
            raise
        raise FullMemory(f"{full}: {smaller(c)}") from e


def check_settings(c):
    """Ends the run for a setting that has no meaning."""
    plan.model_fields(dict(c))  # refuses a key that GPTConfig has and train.py does not
    if c.decay_lr and not 0 <= c.min_lr <= c.learning_rate:
        fail(f"min_lr={c.min_lr} must lie between 0 and learning_rate={c.learning_rate}; "
             "or set decay_lr=false")
    if c.fp8 and c.tp_size > 1:
        fail(f"fp8 and tp_size={c.tp_size}: tensor parallelism splits matrices that FP8 scales as a whole; set one of "
             "them back. DDP, ZeRO and pipelines work with fp8")
    for key, choices in CHOICES.items():
        if c[key] not in choices:
            named = ", ".join(str(choice) or "nothing" for choice in choices)
            fail(f"{key}={c[key]!r} is not one of {named}")


def free_last_run():
    """After a rewind: free the model and all that was compiled for it, before the run builds another one."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("default")
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# The machine


@dataclass
class Machine:
    """The device of this process and the precision it computes in, each with the reason for the choice."""

    device: torch.device
    device_why: str
    dtype: torch.dtype
    dtype_why: str
    threads_why: str  # of torch.get_num_threads()
    context: Any  # the context manager that forward passes run in: autocast

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")


def prepare_machine(c):
    """Pick device and precision, and set PyTorch up for them. -> Machine. Raises ValueError."""
    threads, threads_why = pick_threads(c.threads)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    device, device_why = pick_device(c.device)
    if device.type == "cuda":
        allocate_in_segments()
    if device.type == "cpu":
        keep_memory()
    device = own_device(c.device, device, c.backend)
    dtype, dtype_why = pick_dtype(c.dtype, device)
    machine = Machine(device, device_why, dtype, dtype_why, threads_why, autocast(device, dtype))
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # the events that time a step are recorded there
    use_tf32(c.tf32, device)
    use_sdpa(c.sdpa, device)
    if c.attn == "flash" and (device.type != "cuda" or dtype == torch.float32):
        fail("attn='flash' needs a CUDA device and half precision, "
             f"not {device.type} in {machine.dtype_name}")
    if c.fp8:
        float8.check_device(device)
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return machine


def use_float8(c, model):
    """With fp8, let the blocks' linear layers multiply in FP8, before the model is placed. Raises ValueError."""
    if c.fp8:
        float8.convert_to_float8_training(model, c.fp8_ends)


# -----------------------------------------------------------------------------
# The data


@dataclass
class Data:
    """A dataset, or a mix of several, and its two splits."""

    folders: list  # (folder, weight)
    sha256: str  # names the dataset
    tokenizer: Any  # None for a dataset of bare token ids
    vocab_size: int
    row_size: int  # tokens in a row of conversations; 0: a plain stream of tokens
    train: Any = None  # dataset.Tokens, opened by open_splits
    val: Any = None

    @property
    def source(self):
        return ", ".join(str(folder) for folder, _ in self.folders)

    @property
    def unit(self):
        if self.row_size:
            return "learned token"
        return "char" if self.tokenizer and self.tokenizer.kind == "char" else "token"


def open_data(dataset):
    """Find a dataset and its tokenizer. -> Data, without its splits. Raises DataError."""
    folders, manifest, sha256 = open_datasets(dataset)
    return Data(folders, sha256, *vocabulary(folders[0][0], manifest), row_size_of(folders[0][0]))


def vocabulary(source, manifest):
    """(tokenizer or None, vocab_size) of a dataset. Raises ValueError for a tokenizer that cannot be read.

    A dataset without a tokenizer has GPT-2's token ids, as nanoGPT's datasets do. A meta.pkl of nanoGPT's that is no
    tokenizer can still give the vocab_size.
    """
    try:
        tokenizer = load_tokenizer(source)
    except FileNotFoundError:
        return None, manifest.get("tokenizer", {}).get("vocab_size", 50257)
    except ValueError as e:
        size = meta_vocab_size(source)
        if size is None:
            raise
        if rank() == 0:
            message = f"{e}; the run trains on its {size:,} token ids and has no tokenizer"
            print(f"warning: {message}", file=sys.stderr)
        return None, size
    return tokenizer, max(tokenizer.vocab_size, meta_vocab_size(source) or 0)


def open_splits(c, data, vocab_size, layout):
    """Open the training and validation tokens of `data`. Ends the run if they do not fit the settings."""
    tokenizer = data.tokenizer
    if tokenizer and vocab_size < data.vocab_size:
        fail(f"vocab_size={c.vocab_size} is too small for {data.source}, "
             f"which has {data.vocab_size} token ids; 0 takes that")
    if tokenizer and c.sample_tokens:
        check_sample_start(c, tokenizer)
    if c.verify_data:
        for folder, _ in data.folders:
            verify_shards(folder)
    bos = tokenizer.bos if tokenizer else None
    if c.doc_mask and not data.row_size and bos is None:
        fail(f"doc_mask: {data.source} has no token that begins a document, so its documents cannot be told apart")
    data.train = open_tokens(data.folders, "train", vocab_size, c.doc_mask, bos)
    data.val = open_tokens(data.folders, "val", vocab_size, c.doc_mask, bos)
    if len(data.val) < 2:
        fail(f"{data.source}: {len(data.val)} validation tokens are too few: at least 2")
    layout.on_rank0(lambda: check_validation(c, data.val))


def check_sample_start(c, tokenizer):
    """Ends the run if a sample cannot start from sample_start."""
    try:
        prompt = tokenizer.encode(c.sample_start)
    except ValueError as e:
        fail(f"sample_start={c.sample_start!r}: {e}")
    if not prompt:
        fail("sample_start is empty: a sample needs at least one character to start from")


def check_validation(c, val_tokens):
    """Read the tokens of an evaluation once, so that damaged data is found before the first step. Raises DataError."""
    for part, _ in val_tokens.parts:
        targets = len(part) - (0 if part.row_size else 1)
        if c.eval_iters:
            targets = min(targets, c.eval_iters * evaluation_rows(c.block_size) * c.block_size)
        # cached, for the evaluation needs the same digest
        part.sha256_of(targets if part.row_size else targets + 1)


# -----------------------------------------------------------------------------
# Settings that follow from others


def adopt_rows(c, given, data):
    """With conversations, block_size is the size of their rows. -> c with it. Ends the run if the user set another one.
    `given` names the settings that the user set."""
    if not data.row_size:
        return c
    if "block_size" in given and c.block_size != data.row_size:
        fail(f"block_size={c.block_size}, but {data.source} has rows of {data.row_size} tokens: leave block_size out, "
             f"or prepare the conversations again with --block_size={c.block_size}")
    return c.changed(block_size=data.row_size)


@dataclass
class Budget:
    """How an update is cut into micro-batches, and the memory that a step takes."""

    micro_batches: int  # over all ranks
    step_bytes: float  # plan.py's estimate
    free_bytes: float  # None if nothing says how much is free


def settle_batch(c, origin, model_config, layout, machine):
    """Settle batch_size and the number of micro-batches. -> (c with its batch_size, Budget)

    Ends the run if the settings contradict each other, or if no batch fits into memory.
    """
    with torch.device("meta"):
        costs = plan.costs_of(GPT(replace(model_config, block_size=c.block_size)))
    free = free_memory(machine.device, from_environment("LOCAL_WORLD_SIZE", 1))
    grid = plan.Grid(layout.dp, layout.zero, c.tp_size, c.pp_size, c.activation_checkpointing)

    def step_bytes(batch_size, accumulation):
        cuda = machine.device.type == "cuda"
        memory = plan.step_memory(costs, batch_size, machine.dtype, 0, grid, accumulation, cuda)
        return memory["total"]

    if not c.batch_size and origin.resumes:  # the same micro-batches give the same bits
        c = c.changed(batch_size=origin.state["batch_size"],
                      gradient_accumulation_steps=origin.state["gradient_accumulation_steps"])
    elif not c.batch_size:
        batch_size = largest_batch(c, step_bytes, free, layout)
        c = c.changed(batch_size=batch_size, gradient_accumulation_steps=None)
    micro_batches = micro_batches_of(c)
    accumulation = layout.share_micro_batches(micro_batches)
    return c, Budget(micro_batches, step_bytes(c.batch_size, accumulation), free)


def largest_batch(c, step_bytes, free, layout):
    """The largest batch_size that divides tokens_per_step and leaves plan.py's reserve of the `free` bytes.

    step_bytes(batch_size, accumulation) estimates the bytes of a step. Ends the run if no batch_size fits.
    """
    sequences, rest = divmod(c.tokens_per_step, c.block_size)
    if rest or not sequences or not free:
        mend = "but nothing says how much memory is free here"
        if free:
            mend = f"set it, for example to {8 * c.block_size}"
        fail("batch_size=0 takes the largest batch that fits into memory and divides tokens_per_step, "
             f"a multiple of block_size; {mend}")
    largest, least_bytes = 0, math.inf
    for batch_size in plan.divisors(sequences):
        with suppress(ValueError):  # too few micro-batches for the ranks
            needed = step_bytes(batch_size, layout.share_micro_batches(sequences // batch_size))
            least_bytes = min(least_bytes, needed)
            if needed <= free * (1 - plan.reserve):
                largest = max(largest, batch_size)
    largest = -layout.agree(-largest)[0]  # the smallest over the ranks: every rank has room for it
    if not largest:
        fail(f"batch_size=0: a step takes at least {least_bytes / 1e9:.2g} GB, "
             f"and {free / 1e9:.2g} GB are free: {smaller(c)}")
    return largest


def smaller(c):
    """Advice for a step that takes too much memory."""
    advice = "--activation_checkpointing=full takes less, and with more processes --zero_stage=3"
    pieces = next((n for n in range(2, c.batch_size + 1) if c.batch_size % n == 0), 1)
    if pieces == 1:
        return advice
    flags = f"--batch_size={c.batch_size // pieces}"
    if not c.tokens_per_step:
        flags += f" --gradient_accumulation_steps={pieces * (c.gradient_accumulation_steps or 1)}"
    return f"{flags} is the same update in smaller pieces; {advice}"


def micro_batches_of(c):
    """Micro-batches of an update over all ranks, from gradient_accumulation_steps or tokens_per_step. Ends the run if
    these disagree, or if context_start does not double to block_size."""
    ratio, rest = divmod(c.block_size, c.context_start or c.block_size)
    if rest or ratio & (ratio - 1):  # not a power of two
        fail(f"context_start={c.context_start} does not double to block_size={c.block_size}")
    if not c.tokens_per_step:
        return c.gradient_accumulation_steps or 1
    micro = c.batch_size * c.block_size
    count, rest = divmod(c.tokens_per_step, micro)
    if rest or not count:
        below = max(1, count)
        fail(f"tokens_per_step={c.tokens_per_step} is not a multiple of batch_size x block_size = "
             f"{c.batch_size} x {c.block_size} = {micro}; {below * micro} and {(below + 1) * micro} are")
    if c.gradient_accumulation_steps not in (None, count):
        fail(f"tokens_per_step={c.tokens_per_step} takes {count} micro-steps, but "
             f"gradient_accumulation_steps={c.gradient_accumulation_steps}; leave one of them out")
    return count


def first_state(c, origin, model_config, budget, data, layout, machine):
    """The state of a run before its first step: the fields that state.json will hold."""
    return {
        "step": 0, "wall_s": 0.0, "metrics_bytes": 0, "scaler": None, "skipped": origin.skipped,
        "model": asdict(model_config), "config": dict(c), "seed": c.seed, "optimizer": c.optimizer,
        "dataset_sha256": data.sha256, "train_tokens": len(data.train),
        "batch_size": c.batch_size, "gradient_accumulation_steps": budget.micro_batches,
        "threads": torch.get_num_threads(), "ranks": layout.world, "dtype": machine.dtype_name,
    }


# -----------------------------------------------------------------------------
# The run's folder and its first lines


def hold_folder(c, lock, resumed):
    """Make out_dir if needed, and keep other processes from training into it."""
    os.makedirs(c.out_dir, exist_ok=True)
    lock.take()
    if not resumed and (steps := checkpoint.steps(c.out_dir)):
        fail(f"another process has trained into {c.out_dir} meanwhile (step {max(steps)}): "
             "resume it with --init_from=resume, or begin in another --out_dir")


def open_run(c, run, lock, layout, origin, data, machine):
    """Open the run's folder on rank 0: lock it, write config and environment, cut the logs to the checkpoint."""
    def open_files():
        run.open(dict(c), environment(machine.device, data.sha256), run.state["metrics_bytes"])

    layout.on_rank0(lambda: hold_folder(c, lock, origin.resumes))
    layout.on_rank0(open_files)
    layout.on_rank0(lambda: guard.keep_skipped(c.out_dir, origin.skipped))
    if data.tokenizer:
        layout.on_rank0(lambda: run.keep("tokenizer.json", data.tokenizer.to_json()))


def announce_run(c, run, origin, changed, budget, measure):
    """Say what the run is, on the screen and in its events, and warn of what may go wrong."""
    layout, machine, model_config = measure.layout, measure.machine, measure.layout.model.config
    attention = announce(c, run, budget, measure, model_config)
    resolved = {
        "device": str(machine.device), "dtype": machine.dtype_name, "attn": attention,
        "threads": torch.get_num_threads(), "vocab_size": model_config.vocab_size,
        "gradient_accumulation_steps": budget.micro_batches, "ranks": layout.world,
    }
    kind = "resume" if origin.resumes else "start"
    run.event(kind, step=run.state["step"], changed=changed, resolved=resolved)
    if budget.free_bytes and budget.step_bytes > budget.free_bytes:
        run.warn(f"a step takes about {budget.step_bytes / 1e9:.2g} GB, "
                 f"and {budget.free_bytes / 1e9:.2g} GB are free: {smaller(c)}")
    if changed:
        run.warn(f"resumed with other settings than it was saved with: {changed}")


def start_tracker(c, run):
    """Start the tracker that the settings name, in the process that writes."""
    kind = c.tracker or ("wandb" if c.wandb_log else "")
    if not run.writes:
        kind = ""
    step = run.state["step"]
    run.tracker = Tracker(kind, run.dir, dict(c), c.wandb_project, c.wandb_run_name, step, run.warn)
    if run.tracker.where:
        run.say(f"tracker     {run.tracker.where}")
