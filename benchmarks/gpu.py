"""
How fast one device trains GPT-2's sizes on random tokens, and the peak memory of a step: bench.py's `gpu`.

It first measures the machine's two ceilings: the bandwidth of its memory and the speed of a large matrix product. Then
come a base case (124M, compiled, fused loss, the middle batch, SDPA's own choice, AdamW) and variations of it, one
thing at a time, the most important first. A step is train.py's: forward, backward, clipping, optimizer. Beside its
peak memory stands what plan.py says. Each row is printed as soon as it is measured, so an interrupted run loses none.

Eight rows compile: seven of 124M and one of 355M. Expected on an H100 with 16 CPU cores, not measured yet: 60 s for the
first row, 30 s for each other row of 124M, because Triton's kernels are cached by their source, and 60 s for 355M; with
the timed steps about 6 minutes. The piece sizes run on the model that the base case compiled, and the optimizers
compile nothing.
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
COLUMNS = ("row", "model", "batch", "compile_s", "step_ms", "tok_per_s", "mfu_%",
           "peak_gb", "plan_gb", "trouble")


@dataclass
class Case:
    """What one row measures."""
    row: str                # its name: the thing that it varies
    model: str              # a key of SHAPES
    batch: int              # sequences of a step
    compile: bool = True
    loss: str = "fused"     # fused | whole (all logits at once)
    sdpa: str = "auto"


def cases(c):
    """The cases that train, the most important first. gpu_batches are those of 124M."""
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
    """The batch of a model, smaller for a larger model."""
    return max(1, batch // SHAPES[model][-1])


def bench_gpu(c):
    """-> the machine's ceilings, all rows, and the names of the rows that failed."""
    unknown = [name for name in c.gpu_models if name not in SHAPES]
    if unknown or not c.gpu_models:
        fail(f"--gpu_models={','.join(c.gpu_models)}: it takes some of {', '.join(SHAPES)}")
    if not c.gpu_batches or not c.updates:
        fail("gpu_batches and updates need at least one batch and one update")
    device = pick_device(c.device)[0]
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for the events that time the steps
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["cpu"]
    print(f"{name}, torch {torch.__version__}, bfloat16, {c.tokens} tokens a sequence; "
          f"median of {c.updates} updates after {c.warm_up}", flush=True)
    ceilings = machine_ceilings(device)
    rows = []
    for case in cases(c):
        rows += case_rows(case, c, device, pieces=case.row == "base")
    rows += optimizer_rows(c, device)
    print()
    table(rows, COLUMNS)
    failed = [row["row"] for row in rows if row["trouble"] and not may_fail(row)]
    return {
        "machine": machine(),
        "device": name,
        "torch": torch.__version__,
        "ceilings": ceilings,
        "rows": rows,
        "failed": failed,
    }


def may_fail(row):
    """Whether the device explains a row's failure: too little memory, or it lacks a kernel of SDPA."""
    return row["trouble"].startswith("out of memory") or row["row"].startswith("sdpa ")


# -----------------------------------------------------------------------------
# The machine


def machine_ceilings(device):
    """-> the speed of a copy within the device's memory, in GB/s, and of a square product in bfloat16, in TFLOP/s."""
    small = device.type == "cpu"
    source = torch.ones(2**24 if small else 2**28, device=device)  # 1 GiB on a GPU
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device)
    copied = 2 * source.nbytes / copy_ms / 1e6  # each byte is read and written
    n = 512 if small else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    product_ms = median_ms(lambda: a @ b, device)
    product = 2 * n**3 / product_ms / 1e9
    print(f"copy of {source.nbytes / 2**20:.0f} MiB: {copied:.0f} GB/s; "
          f"product of {n} x {n} in bfloat16: {product:.1f} TFLOP/s", flush=True)
    return {"copy_gb_per_s": copied, "product_tflop_per_s": product, "product_n": n}


def median_ms(call, device, updates=10, warm_up=3):
    """Milliseconds of `call`, the median of `updates` calls after `warm_up` others. On a GPU events take the time, so
    that nothing waits between the calls."""
    for _ in range(warm_up):
        call()
    timer = StepTimer(device)
    wait_for(device)
    timer.start()
    for i in range(updates):
        call()
        timer.mark(str(i))
    return statistics.median(timer.read().values())


# -----------------------------------------------------------------------------
# Training steps


class Training:
    """A model with its optimizer, trained on one batch of random tokens."""

    def __init__(self, case, c, device, optimizer="adamw", muon_dtype=torch.bfloat16):
        self.case = case
        self.device = device
        torch.manual_seed(0)
        # with auto, flash-attn would come before SDPA's kernels if it is installed
        attn = "auto" if case.sdpa == "auto" else "sdpa"
        self.model = GPT(config_of(case.model, c.tokens, attn)).to(device)
        self.forward = torch.compile(self.model, dynamic=False) if case.compile else self.model
        self.optimizer = Optimizers(self.model, optimizer=optimizer, learning_rate=1e-4,
                                    weight_decay=0.1, muon_dtype=muon_dtype)
        vocab_size = self.model.config.vocab_size
        self.x = torch.randint(vocab_size, (case.batch, c.tokens), device=device)  # (B, T)
        self.y = torch.randint(vocab_size, (case.batch, c.tokens), device=device)
        self.context = autocast(device, torch.bfloat16)

    def gradients(self):
        """Forward and backward."""
        with self.context():
            _, loss = self.forward(self.x, self.y, loss_only=self.case.loss == "fused")
        loss.backward()

    def step(self):
        """One update."""
        self.gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def config_of(model, tokens, attn="auto"):
    layers, heads, width, vocabulary, _ = SHAPES[model]
    return GPTConfig(block_size=tokens, n_layer=layers, n_head=heads, n_embd=width,
                     vocab_size=vocabulary, bias=False, attn=attn)


def case_rows(case, c, device, pieces=False):
    """The row of a case, printed; with `pieces` also the rows of the fused loss's piece sizes, on the same model."""
    rows = []
    trouble = None
    try:
        with only_sdpa(case.sdpa, device):
            rows = training_rows(case, c, device, c.gpu_pieces if pieces else ())
    except (RuntimeError, ValueError, MemoryError) as e:  # OutOfMemoryError is a RuntimeError
        trouble = reason(e)
    if trouble:  # outside of `except`, so that the error holds no tensors any more
        rows = [show_row({**empty_row(case), "trouble": trouble})]
    free_memory()
    return rows


def reason(error):
    """Why there is no figure, in one line."""
    if memory_is_full(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]


def free_memory():
    """Give back the memory of the last row, so that the next one has all of it."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def training_rows(case, c, device, pieces):
    """The row of a case, then one for each piece size."""
    training = Training(case, c, device)
    began = time.perf_counter()
    training.step()
    wait_for(device)
    first_s = time.perf_counter() - began
    rows = [steps_row(case, c, training, first_s if case.compile else None)]
    for piece in pieces:  # the loss reads the size at each call, so nothing compiles again
        with piece_of(device.type, piece):
            piece_case = replace(case, row=f"piece 2**{piece.bit_length() - 1}")
            rows.append(steps_row(piece_case, c, training, None))
    return rows


@contextlib.contextmanager
def piece_of(kind, piece):
    """Within it the fused loss holds `piece` logits at once on this kind of device."""
    before = cross_entropy.PIECE[kind]
    cross_entropy.PIECE[kind] = piece
    try:
        yield
    finally:
        cross_entropy.PIECE[kind] = before


def steps_row(case, c, training, compile_s):
    """c.updates steps, timed, after c.warm_up others. compile_s: seconds of the first step, which compiles."""
    device = training.device
    model = training.model
    forget_peak(device)
    ms = median_ms(training.step, device, c.updates, c.warm_up)
    speed = 1000 * case.batch * c.tokens / ms
    flops = peak_flops(device, torch.bfloat16)
    peak_gb = memory_gb(device)
    planned = plan.step_memory(plan.costs_of(model), case.batch, torch.bfloat16,
                               cuda=device.type == "cuda")
    row = {**empty_row(case), "compile_s": compile_s, "step_ms": ms, "tok_per_s": round(speed)}
    row["mfu_%"] = 100 * speed * model.train_flops(c.tokens) / flops if flops else None
    row["peak_gb"] = peak_gb
    row["plan_gb"] = planned["total"] / 1e9
    return show_row(row)


def empty_row(case):
    """The row of a case without any figure."""
    known = {"row": case.row, "model": case.model, "batch": case.batch, "trouble": ""}
    return {**dict.fromkeys(COLUMNS), **known}


def show_row(row):
    """Print a row as soon as it is measured. -> the row"""
    parts = []
    for key, value in row.items():
        if value not in (None, ""):
            parts.append(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}")
    print("  ".join(parts), flush=True)
    return row


# -----------------------------------------------------------------------------
# The optimizer alone


def optimizer_rows(c, device):
    """A row for one step of AdamW and of Muon in each dtype that Muon computes in, on the gradients of one sequence."""
    rows = []
    choices = (("adamw", "adamw", torch.float32), ("muon bfloat16", "muon", torch.bfloat16),
               ("muon float32", "muon", torch.float32))
    for name, optimizer, muon_dtype in choices:
        case = Case(f"{name} alone", c.gpu_models[0], 1, compile=False)
        trouble = ""
        ms = None
        try:
            training = Training(case, c, device, optimizer, muon_dtype)
            training.gradients()
            ms = median_ms(training.optimizer.step, device, c.updates, c.warm_up)
        except (RuntimeError, ValueError, MemoryError) as e:
            trouble = reason(e)
        training = None  # frees its memory
        rows.append(show_row({**empty_row(case), "step_ms": ms, "trouble": trouble}))
        free_memory()
    return rows
