"""
How fast one device trains GPT-2's sizes on random tokens, and what a training step takes in memory: bench.py's `gpu`.

First come the machine's two ceilings, the bandwidth of its memory and the speed of a large matrix product. Then a base
case (124M, compiled, fused loss, the middle batch, SDPA's own choice, AdamW) and variations of it, one thing at a time,
the most important first. A training step is train.py's: forward, backward, clipping, optimizer. A row is printed as
soon as it is measured, so a run that is cut loses nothing.

Eight rows compile: seven of 124M and one of 355M. Expected on an H100 with 16 CPU cores, not measured yet: 60 s for the
first, 30 s for each of the others of 124M, as Triton's kernels are cached by their source, 60 s for 355M; with what is
timed about 6 minutes. The piece sizes run on the model that the base case compiled. The optimizers compile nothing.
"""

import contextlib
import gc
import statistics
import time
from dataclasses import dataclass, replace

import torch

import cross_entropy
import plan
from benchmarks.common import forget_peak, machine, only_sdpa, table, wait_for
from configurator import fail
from device import autocast, memory_gb, memory_is_full, peak_flops, pick_device
from model import GPT, GPTConfig
from optim import Optimizers
from training.monitor import StepTimer

SHAPES = {  # name: (layers, heads, width, vocabulary, its batch as a share of the 124M's)
    "124m": (12, 12, 768, 50257, 1),
    "355m": (24, 16, 1024, 50257, 2),
    "774m": (36, 20, 1280, 50257, 4),
    "tiny": (2, 2, 32, 512, 1),
}
COLUMNS = ("row", "model", "batch", "compile_s", "step_ms", "tok_per_s", "mfu_%", "peak_gb", "plan_gb", "trouble")


@dataclass
class Case:
    """One row: what is measured."""
    row: str                # what it varies
    model: str
    batch: int              # sequences of a step
    compile: bool = True
    loss: str = "fused"     # fused | whole: all logits at once
    sdpa: str = "auto"


def cases(c):
    """The rows that train, the most important first. The batches are the 124M's."""
    first, *others = c.gpu_models
    middle = c.gpu_batches[len(c.gpu_batches) // 2]
    base = Case("base", first, batch_of(first, middle))
    yield base
    yield replace(base, row="eager", compile=False)
    yield replace(base, row="whole loss", loss="whole")
    for batch in c.gpu_batches:
        if batch != middle:
            yield replace(base, row=f"batch {batch_of(first, batch)}", batch=batch_of(first, batch))
    for name in others:
        yield replace(base, row=name, model=name, batch=batch_of(name, middle))
    for name in ("cudnn", "flash", "efficient"):
        yield replace(base, row=f"sdpa {name}", sdpa=name)


def batch_of(model, batch):
    """A larger model has a smaller batch."""
    return max(1, batch // SHAPES[model][-1])


def bench(c):
    """`c` holds bench.py's settings. -> the figures, as a dict"""
    unknown = [name for name in c.gpu_models if name not in SHAPES]
    if unknown or not c.gpu_models:
        fail(f"--gpu_models={','.join(c.gpu_models)}: it takes some of {', '.join(SHAPES)}")
    if not c.gpu_batches or not c.updates:
        fail("gpu_batches and updates need at least one batch and one update")
    where = pick_device(c.device)[0]
    if where.type == "cuda":
        torch.cuda.set_device(where)  # for the events that time the steps
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else machine()["cpu"]
    print(f"{name}, torch {torch.__version__}, bfloat16, {c.tokens} tokens a sequence; median of {c.updates} updates "
          f"after {c.warm_up}", flush=True)
    ceilings = machine_ceilings(where)
    rows = []
    for case in cases(c):
        rows += measured(case, c, where, pieces=case.row == "base")
    rows += optimizer_rows(c, where)
    print()
    table(rows, COLUMNS)
    return {"machine": machine(), "device": name, "torch": torch.__version__, "ceilings": ceilings, "rows": rows,
            "failed": [row["row"] for row in rows if row["trouble"] and not may_fail(row)]}


def may_fail(row):
    """A row may not fit the device's memory, and not every device has every kernel of SDPA."""
    return row["trouble"].startswith("out of memory") or row["row"].startswith("sdpa ")


# -----------------------------------------------------------------------------
# The machine


def machine_ceilings(where):
    """Bytes/s of a copy from device memory to device memory, and FLOP/s of a square product in bfloat16."""
    small = where.type == "cpu"
    source = torch.ones(2**24 if small else 2**28, device=where)  # 1 GiB on a GPU
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), where)
    copied = 2 * source.nbytes / copy_ms / 1e6  # each byte is read and written
    n = 512 if small else 8192
    a, b = (torch.randn(n, n, device=where, dtype=torch.bfloat16) for _ in range(2))
    product_ms = median_ms(lambda: a @ b, where)
    product = 2 * n**3 / product_ms / 1e9
    print(f"copy of {source.nbytes / 2**20:.0f} MiB: {copied:.0f} GB/s; product of {n} x {n} in bfloat16: "
          f"{product:.1f} TFLOP/s", flush=True)
    return {"copy_gb_per_s": copied, "product_tflop_per_s": product, "product_n": n}


def median_ms(call, where, updates=10, warm_up=3):
    """Milliseconds of `call`, the median of `updates` after `warm_up`: by events on a GPU, which wait for nothing."""
    for _ in range(warm_up):
        call()
    timer = StepTimer(where)
    wait_for(where)
    timer.start()
    for i in range(updates):
        call()
        timer.mark(str(i))
    return statistics.median(timer.read().values())


# -----------------------------------------------------------------------------
# Training steps


class Training:
    """A model on random tokens, its optimizer, and one step of both."""

    def __init__(self, case, c, where, optimizer="adamw", muon_dtype=torch.bfloat16):
        self.case, self.where = case, where
        torch.manual_seed(0)
        attn = "auto" if case.sdpa == "auto" else "sdpa"  # else flash-attn, where it is installed, goes before
        self.model = GPT(config_of(case.model, c.tokens, attn)).to(where)
        self.forward = torch.compile(self.model, dynamic=False) if case.compile else self.model
        self.optimizer = Optimizers(self.model, optimizer=optimizer, learning_rate=1e-4, weight_decay=0.1,
                                    muon_dtype=muon_dtype)
        shape = (case.batch, c.tokens)
        self.x, self.y = (torch.randint(self.model.config.vocab_size, shape, device=where) for _ in range(2))
        self.context = autocast(where, torch.bfloat16)

    def gradients(self):
        with self.context():
            _, loss = self.forward(self.x, self.y, loss_only=self.case.loss == "fused")
        loss.backward()

    def step(self):
        self.gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def config_of(model, tokens, attn="auto"):
    layers, heads, width, vocabulary, _ = SHAPES[model]
    return GPTConfig(block_size=tokens, n_layer=layers, n_head=heads, n_embd=width, vocab_size=vocabulary, bias=False,
                     attn=attn)


def measured(case, c, where, pieces=False):
    """The row of a case; with `pieces` also those of the fused loss's piece sizes, on the same compiled model."""
    rows, trouble = [], None
    try:
        with only_sdpa(case.sdpa, where):
            rows = training_rows(case, c, where, c.gpu_pieces if pieces else ())
    except (RuntimeError, ValueError, MemoryError) as e:  # OutOfMemoryError is a RuntimeError
        trouble = reason(e)
    if trouble:  # here, where the error and all that it holds is gone
        rows = [shown({**empty_row(case), "trouble": trouble})]
    free_memory()
    return rows


def reason(error):
    """Why there is no figure, in one line."""
    if memory_is_full(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]


def free_memory():
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def training_rows(case, c, where, pieces):
    training = Training(case, c, where)
    began = time.perf_counter()
    training.step()
    wait_for(where)
    first_s = time.perf_counter() - began
    rows = [steps_row(case, c, training, first_s if case.compile else None)]
    for piece in pieces:  # the loss reads it at each call, so nothing compiles again
        with piece_of(where.type, piece):
            rows.append(steps_row(replace(case, row=f"piece 2**{piece.bit_length() - 1}"), c, training, None))
    return rows


@contextlib.contextmanager
def piece_of(kind, piece):
    """The fused loss holds `piece` logits at once."""
    before = cross_entropy.PIECE[kind]
    cross_entropy.PIECE[kind] = piece
    try:
        yield
    finally:
        cross_entropy.PIECE[kind] = before


def steps_row(case, c, training, compile_s):
    """Some steps, timed. compile_s: seconds of the first step, which compiles."""
    where, model = training.where, training.model
    forget_peak(where)
    ms = median_ms(training.step, where, c.updates, c.warm_up)
    speed = 1000 * case.batch * c.tokens / ms
    peak = peak_flops(where, torch.bfloat16)
    used = memory_gb(where)
    planned = plan.step_memory(plan.costs_of(model), case.batch, torch.bfloat16, cuda=where.type == "cuda")["total"]
    row = {**empty_row(case), "compile_s": compile_s, "step_ms": ms, "tok_per_s": round(speed)}
    row["mfu_%"] = 100 * speed * model.train_flops(c.tokens) / peak if peak else None
    row["peak_gb"], row["plan_gb"] = used, planned / 1e9
    return shown(row)


def empty_row(case):
    known = {"row": case.row, "model": case.model, "batch": case.batch, "trouble": ""}
    return {**dict.fromkeys(COLUMNS), **known}


def shown(row):
    """Print a row at once. -> the row"""
    parts = [f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
             for key, value in row.items() if value not in (None, "")]
    print("  ".join(parts), flush=True)
    return row


# -----------------------------------------------------------------------------
# The optimizer alone


def optimizer_rows(c, where):
    """One step of AdamW and of Muon, by the dtype that it computes in, on the gradients of one small batch."""
    rows = []
    for name, kind, dtype in (("adamw", "adamw", torch.float32), ("muon bfloat16", "muon", torch.bfloat16),
                              ("muon float32", "muon", torch.float32)):
        case = Case(f"{name} alone", c.gpu_models[0], 1, compile=False)
        trouble = ms = None
        try:
            training = Training(case, c, where, kind, dtype)
            training.gradients()
            ms = median_ms(training.optimizer.step, where, c.updates, c.warm_up)
        except (RuntimeError, ValueError, MemoryError) as e:
            trouble = reason(e)
        training = None
        rows.append(shown({**empty_row(case), "step_ms": ms, "trouble": trouble or ""}))
        free_memory()
    return rows
