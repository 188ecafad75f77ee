"""
What several benchmarks share.

Running one of our scripts, the settings it would have, reading its run folder, calling a function in processes of its
own, the machine that a figure comes from, a stopwatch, peak memory, the kernels of scaled_dot_product_attention, and a
table.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch

from configurator import fail, read_file, read_keys
from device import DTYPES, use_sdpa
from files import read_lines
from training.monitor import cpu_name, git
from training.ranks import all_fail_together

ROOT = Path(__file__).resolve().parents[1]
# the parts of a training step, as metrics.jsonl names them
PARTS = ("data_ms", "forward_ms", "backward_ms", "optim_ms")

# -----------------------------------------------------------------------------
# Our own scripts


def new_folder(path):
    """The path of a folder that is not there yet. A benchmark never mixes its runs with older ones."""
    if Path(path).exists():
        fail(f"{path} exists: a benchmark starts from nothing; remove it or give another --out_dir")
    return Path(path)


def run_script(script, *args, ranks=1, required=True):
    """Run one of our scripts, under torchrun for more than one rank. Its output goes to stderr, indented.

    -> the last line of its output. A script that fails ends the benchmark; one that is not required gives a warning
    and None.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [ROOT / script, *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    line = ""
    for line in process.stdout:
        print("   ", line, end="", file=sys.stderr)
    if process.wait() == 0:
        return line
    failure = f"{script} {' '.join(args)} exited with {process.returncode}"
    if required:
        fail(failure)
    print(f"warning: {failure}", file=sys.stderr)
    return None


def train_settings(c):
    """The settings that train.py would have: its defaults, then the config, then c.overrides."""
    keys = read_keys(ROOT / "train.py")
    values = {name: key.default for name, key in keys.items()}
    values |= read_file(c.config, keys)
    for override in c.overrides:
        name, _, text = override.partition("=")
        if name not in keys:
            fail(f"--overrides: train.py has no key {name}")
        values[name] = keys[name].check(text, f"--overrides={override}", parse=True)
    return values


def read_run(folder):
    """-> (the records of a run's metrics.jsonl, the code, data and machine that they come from)"""
    records = [json.loads(line) for line in read_lines(folder / "metrics.jsonl")]
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    names = ("commit", "threads", "dataset_sha256", "environment_sha256", "cpu", "device")
    origin = {name: env[name] for name in names}
    origin["dirty"] = bool(env["dirty_diff"] or env["untracked"])
    origin["torch"] = env["packages"]["torch"]
    return records, origin


# -----------------------------------------------------------------------------
# Processes of their own


def in_processes(function, *args, ranks=1):
    """Call function(*args) in `ranks` new processes, which have the variables of torchrun. -> the results, by rank.

    The peak memory of a process never falls, so each case that is measured by it needs a fresh process. The function,
    its arguments and its result are pickled. Ends the benchmark when a process ends without a result.
    """
    spawn = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # a free one
    rank_of = {}  # by our end of the pipe
    for rank in range(ranks):
        ours, theirs = spawn.Pipe(duplex=False)
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = (theirs, variables, function, args)
        spawn.Process(target=send_result, args=arguments, daemon=True).start()
        theirs.close()  # so that the pipe ends when the child dies
        rank_of[ours] = rank
    results = {}
    while rank_of:
        for pipe in wait(list(rank_of)):
            rank = rank_of.pop(pipe)
            try:
                results[rank] = pipe.recv()
            except EOFError:
                fail(f"{function.__name__}: process {rank} of {ranks} ended without a result; "
                     "its error is above")
    return [results[rank] for rank in range(ranks)]


def send_result(pipe, variables, function, args):
    """A child of in_processes: call the function and send its result to the parent."""
    os.environ.update(variables)
    threads = torch.get_num_threads() // int(variables["WORLD_SIZE"])
    torch.set_num_threads(max(1, threads))
    with all_fail_together():
        pipe.send(function(*args))


# -----------------------------------------------------------------------------
# Measuring


def machine():
    """The code and the machine of a figure that does not come from a training run."""
    dirty = bool(git("status", "--porcelain"))
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": dirty,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }


def timed(call, device=None):
    """Seconds that `call` takes; on a device, until its kernels have run."""
    wait_for(device)
    began = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - began


def wait_for(device):
    """Wait until a CUDA device has run all kernels that were launched on it."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device):
    """Restart the measurement of peak memory, on CUDA and Linux (clear_refs in proc(5)). On other systems the peak
    still counts from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@contextlib.contextmanager
def only_sdpa(name, device):
    """Within it scaled_dot_product_attention has only the kernels that device.use_sdpa allows; the earlier choice
    returns afterwards. Raises ValueError as use_sdpa does."""
    cuda = torch.backends.cuda
    cudnn = cuda.cudnn_sdp_enabled()
    flash = cuda.flash_sdp_enabled()
    efficient = cuda.mem_efficient_sdp_enabled()
    math = cuda.math_sdp_enabled()
    use_sdpa(name, device)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(cudnn)
        cuda.enable_flash_sdp(flash)
        cuda.enable_mem_efficient_sdp(efficient)
        cuda.enable_math_sdp(math)


# -----------------------------------------------------------------------------
# A table


def table(rows, columns):
    """Print `rows` (dicts) as a Markdown table. None is printed as n/a."""
    lines = [list(columns)]
    for row in rows:
        lines.append([cell(row[column]) for column in columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # in Markdown a colon at the end aligns the column to the right
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    for line in lines:
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        print("| " + " | ".join(padded) + " |")


def cell(value):
    """A value as the table shows it."""
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def form_of(form, device):
    """-> (the dtype of everything that is not a weight, what convert's quantize takes)"""
    if form in DTYPES:
        return DTYPES[form], ""
    return torch.float32 if device.type == "cpu" else torch.bfloat16, form
