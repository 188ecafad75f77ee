"""What several benchmarks share: the machine they ran on, a table, a stopwatch, the peak of memory, SDPA's kernels."""

import contextlib
import os
import time
from pathlib import Path

import torch

import device
from training.monitor import cpu_name, git


def machine():
    """What a figure that is no training run's depends on."""
    dirty = bool(git("status", "--porcelain"))
    return {"commit": git("rev-parse", "HEAD"), "dirty": dirty, "cpu": cpu_name(), "cores": os.cpu_count()}


def table(rows, columns):
    """Print `rows` (dicts) as a Markdown table; None is n/a."""
    lines = [list(columns), *([cell(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    for line in lines:
        print("| " + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + " |")


def cell(value):
    """A value as a table shows it."""
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def timed(call, where=None):
    """Seconds that `call` takes; on a device `where`, until its kernels have run."""
    wait_for(where)
    began = time.perf_counter()
    call()
    wait_for(where)
    return time.perf_counter() - began


def wait_for(where):
    """Until the kernels that a CUDA device was given have run."""
    if where is not None and where.type == "cuda":
        torch.cuda.synchronize(where)


def forget_peak(where):
    """Peak memory, of all that this process holds, counts from now on (proc(5), clear_refs); where it cannot, from the
    start of the process."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@contextlib.contextmanager
def only_sdpa(name, where):
    """Within it scaled_dot_product_attention has the kernels that device.use_sdpa leaves it; after it, those of before.
    Raises ValueError as that does."""
    cuda = torch.backends.cuda
    before = (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
              cuda.math_sdp_enabled())
    device.use_sdpa(name, where)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(before[0])
        cuda.enable_flash_sdp(before[1])
        cuda.enable_mem_efficient_sdp(before[2])
        cuda.enable_math_sdp(before[3])
