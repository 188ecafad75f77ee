"""
How fast train.py trains: bench.py's `train`, `scaling` and `monitor`.

`train` runs train.py on a config once per seed, each in a fresh folder, then eval.py on the whole validation split in
fp32. It reports the loss, the training time and the parts of a step, with mean and standard deviation over the seeds.

`scaling` takes a few updates for each micro-batch size, context length and number of processes. It measures speed,
peak memory and the parts of a step. The speed of a process is compared with the speed of a process in the run with the
fewest, at a global batch that stays the same (strong scaling) and at one that grows with the processes (weak scaling).

`monitor` trains with the config's logging and probes and without any, in turns, and reports what they add to a step.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.common import PARTS, ROOT, machine, new_folder, read_run, run_script, table
from configurator import fail
from training.monitor import git


def typical(records):
    """The medians of a step's time, its parts and its speed, as a dict. A figure that no record has is None:
    communication, for example, is measured only at evaluations, and never in a single process."""
    medians = {}
    for name in ("step_ms", *PARTS, "comm_ms", "tok_per_s", "mfu"):
        values = [record[name] for record in records if record.get(name) is not None]
        medians[name] = statistics.median(values) if values else None
    return medians


# -----------------------------------------------------------------------------
# train


def bench_train(c):
    """-> mean, standard deviation, minimum and maximum over the seeds, and the figures of each run."""
    if not c.seeds:
        fail("--seeds is empty: it takes the seed of each run, such as --seeds=1,2,3")
    rows = [train_once(c, seed) for seed in c.seeds]
    print(f"{c.config}: {rows[0]['steps']:,} steps, {rows[0]['device']} ({rows[0]['cpu']}), "
          f"commit {git('rev-parse', 'HEAD')}")
    columns = ("seed", "val_loss", "train_s", "step_ms", *PARTS, "tok_per_s")
    print("  ".join(f"{column:>11}" for column in columns))
    for row in rows:
        cells = []
        for column in columns:
            value = row[column]
            cells.append(f"{value:>11.4f}" if isinstance(value, float) else f"{value:>11}")
        print("  ".join(cells))
    summary = {}
    for column in ("val_loss", "train_s", "step_ms"):
        summary[column] = spread_of([row[column] for row in rows])
        print("{}: mean {mean:.4f}, standard deviation {stdev:.4f}, {min:.4f} to {max:.4f}".format(
            column, **summary[column]))
    return {**summary, "runs": rows}


def train_once(c, seed):
    """One training run and its evaluation: its figures as a dict."""
    folder = new_folder(Path(c.out_dir) / f"{Path(c.config).stem}_seed{seed}")
    keys = [f"--seed={seed}", f"--out_dir={folder}"]
    keys += [f"--{override}" for override in c.overrides]
    run_script("train.py", c.config, *keys, ranks=c.processes)
    evaluated = json.loads(run_script("eval.py", f"--out_dir={folder}"))
    records, origin = read_run(folder)
    last = records[-1]
    return {
        "seed": seed,
        "val_loss": evaluated["loss"],
        "train_s": last["wall_s"],  # with compilation, without evaluation and saving
        **typical(records),
        "mem_gb": last["mem_gb"],
        "steps": last["step"],
        **origin,
    }


def spread_of(values):
    """The mean of some values, and how far they lie apart."""
    stdev = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "stdev": stdev, "min": min(values), "max": max(values)}


# -----------------------------------------------------------------------------
# scaling


class Case(NamedTuple):
    """One point of the grid."""
    batch_size: int     # sequences of a micro-batch
    length: int         # tokens of context
    processes: int
    micro_batches: int  # of a step, of all processes together


def bench_scaling(c):
    """-> where the figures come from, a row for each case, and the cases that did not run, such as too large ones."""
    if not (c.batches and c.lengths and c.worlds):
        fail("batches, lengths and worlds need at least one number each")
    if c.warm_up + c.updates < 2:
        fail("warm_up and updates must be two together: "
             "the last update's memory has the evaluation in it")
    cases = scaling_cases(c)
    records = {case: [] for case in cases}
    peaks = {case: [] for case in cases}
    origins = []
    for turn in range(c.rounds):
        for case in cases:
            name = "b{}_t{}_p{}_m{}".format(*case)
            folder = new_folder(Path(c.out_dir) / f"{Path(c.config).stem}_{name}_{turn}")
            # the smallest case must run; a larger one may not fit the memory
            measured = run_few(c, case, folder, required=not origins)
            if measured is not None:
                timed_records, peak_mb, origin = measured
                records[case].append(timed_records)
                peaks[case].append(peak_mb)
                origins.append(origin)
    rows = []
    for case in records:
        if len(records[case]) == c.rounds:
            rows.append(scaling_row(case, records[case], peaks[case]))
    most = math.lcm(*c.worlds)
    add_efficiency(rows, "strong_%", lambda row: row["micro_batches"] == most)
    add_efficiency(rows, "weak_%", lambda row: row["micro_batches"] == row["processes"])
    print("{}: median of {} x {} updates after {}, {device} ({cpu}), {threads} threads a process; "
          "micro_batches: of a step, of all processes together; strong and weak: speed of a process "
          "in % of the speed with the fewest processes".format(
              c.config, c.rounds, c.updates, c.warm_up, **origins[0]))
    table(rows, ("length", "batch", "processes", "micro_batches", "tok_per_s", "mfu_%", "peak_mb",
                 "step_ms", "data_ms", "forward_ms", "backward_ms", "comm_ms", "optim_ms",
                 "strong_%", "weak_%"))
    missing = [case for case in records if len(records[case]) < c.rounds]
    return {"runs": origins, "rows": rows, "missing": missing}


def scaling_cases(c):
    """All cases. Each number of processes gets two sizes of a step, in micro-batches: the least common multiple of all
    numbers (strong scaling), and one for each process (weak scaling)."""
    most = math.lcm(*c.worlds)
    sizes = set()
    for processes in c.worlds:
        sizes |= {(processes, most), (processes, processes)}
    cases = []
    for length in c.lengths:
        for batch_size in c.batches:
            cases += [Case(batch_size, length, *size) for size in sorted(sizes)]
    return cases


def run_few(c, case, folder, required):
    """A few updates of train.py. -> (the records after the warm-up, peak memory in MB, their origin), or None where
    they failed and are not required."""
    steps = c.warm_up + c.updates
    grid = {
        "batch_size": case.batch_size,
        "block_size": case.length,
        "gradient_accumulation_steps": case.micro_batches,
        "tokens_per_step": 0,
        "context_start": 0,
        "max_iters": steps,
        "log_interval": 1,
        "eval_interval": steps,
        "eval_iters": 1,
        "save_interval": 0,
        "save_minutes": 0,
        "sample_tokens": 0,
        "measure_comm": True,
        "out_dir": folder,
    }
    for override in c.overrides:
        if override.partition("=")[0] in grid:
            fail(f"--overrides={override}: scaling sets this key itself")
    # a process stands for a GPU, so it has as many threads alone as beside others
    threads = max(1, (os.cpu_count() or 1) // max(c.worlds))
    keys = [f"--threads={threads}"]
    keys += [f"--{override}" for override in c.overrides]
    keys += [f"--{name}={value}" for name, value in grid.items()]
    if run_script("train.py", c.config, *keys, ranks=case.processes, required=required) is None:
        return None
    records, origin = read_run(folder)
    shutil.rmtree(folder / "ckpt")  # hundreds of megabytes in each run
    peak_gb = records[-2]["mem_gb"]  # rank 0's; the last record's has the evaluation in it
    peak_mb = None if peak_gb is None else 1000 * peak_gb
    return records[c.warm_up:], peak_mb, origin


def scaling_row(case, rounds, peaks):
    """The row of a case from the records and the peak memory of each round."""
    row = {"length": case.length, "batch": case.batch_size, "processes": case.processes,
           "micro_batches": case.micro_batches, **typical(list(chain(*rounds)))}
    row["peak_mb"] = max((peak for peak in peaks if peak is not None), default=None)
    row["mfu_%"] = None if row["mfu"] is None else 100 * row["mfu"]
    return row


def add_efficiency(rows, column, is_compared):
    """Add a column: the speed of a process in % of its speed with the fewest processes, at the same length and batch.

    A row that is not compared gets None. Rows with fewer processes come first.
    """
    fewest = {}  # speed of a process by length and batch
    for row in rows:
        row[column] = None
        if is_compared(row):
            speed = row["tok_per_s"] / row["processes"]
            base = fewest.setdefault((row["length"], row["batch"]), speed)
            row[column] = 100 * row["tok_per_s"] / row["processes"] / base


# -----------------------------------------------------------------------------
# monitor

# train.py, which prints the times of all optimizer steps at its end. Between two of them lies one whole step.
TRAIN_AND_TIME = """
import json, runpy, sys, time
sys.path.insert(0, sys.argv[1])
import optim
times = []
step = optim.Optimizers.step
def timed_step(self):
    times.append(time.perf_counter())
    return step(self)
optim.Optimizers.step = timed_step
sys.argv = sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(times))
"""


def bench_monitor(c):
    """Time the same steps with the config's logging and probes, and without any. A step's time is its shortest round.

    -> a row for each way, and the share of time that logging and probes add
    """
    ways = {"without": ("--log_interval=1000000000", "--probe_interval=0"), "as configured": ()}
    times = {way: [] for way in ways}
    for turn in range(c.rounds):
        order = list(ways)
        if turn % 2 == 0:  # no way is always the first, which may find a colder machine
            order.reverse()
        for way in order:
            folder = Path(c.out_dir) / f"monitor_{way.split()[0]}_{turn}"
            times[way].append(step_times(c, folder, *ways[way]))
    least = {way: np.min(times[way], axis=0) for way in ways}
    rows = []
    for way, seconds in least.items():
        rows.append({
            "way": way,
            "steps": len(seconds) + 1,
            "mean_ms": 1000 * float(seconds.mean()),
            "median_ms": 1000 * float(np.median(seconds)),
            "longest_ms": 1000 * float(seconds.max()),
            "rounds_ms": [1000 * float(one_round.mean()) for one_round in times[way]],
        })
    share = float(least["as configured"].sum() / least["without"].sum() - 1)
    print(f"{c.config}, {torch.get_num_threads()} threads: milliseconds from step to step, "
          f"the least of {c.rounds} rounds")
    table(rows, ("way", "steps", "mean_ms", "median_ms", "longest_ms"))
    print(f"logging and probes take {share:.2%} of a step")
    return {"machine": machine(), "rows": rows, "share": share}


def step_times(c, folder, *keys):
    """Seconds from each step to the next in a run of train.py that evaluates and saves only at its end."""
    overrides = [f"--{override}" for override in c.overrides]
    at_the_end = ["--eval_interval=1000000000", "--eval_iters=1"]
    at_the_end += ["--save_interval=0", "--save_minutes=0"]
    keys = [*overrides, *at_the_end, f"--out_dir={new_folder(folder)}", *keys]
    command = [sys.executable, "-c", TRAIN_AND_TIME, ROOT, ROOT / "train.py", c.config, *keys]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        fail(f"train.py {' '.join(keys)} exited with {done.returncode}")
    times = json.loads(done.stdout.splitlines()[-1])
    return np.diff(times)
