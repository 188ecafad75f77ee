"""
Run folders as plain data, for reports, alarms and notebooks. Only the four files of training/monitor.py are read.

    runs = read_runs(["out/a", "out/b"])
    steps, losses = series(runs[0], "val_loss", x="tokens")
"""

import json
import math
import statistics
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

from files import clock_face
from loader import context_length
from model import GPT, GPTConfig

# field of a record: its name on an axis, its name in a choice of axes
AXES = {"step": ("step", "steps"), "tokens": ("tokens", "tokens"), "flops": ("training FLOPs", "FLOPs"),
        "wall_s": ("training time in seconds", "time")}
PARTS = ("data_ms", "forward_ms", "backward_ms", "pipeline_ms", "optim_ms")  # they add up to a step's time
COLUMNS = {  # key of a summary: heading, meaning
    "val_loss": ("val loss", "validation loss at the end"),
    "best": ("best", "lowest validation loss"),
    "bits": ("bits/token", "validation loss at the end in bits"),
    "loss": ("train loss", "training loss at the end, smoothed"),
    "steps": ("steps", "updates done"),
    "tokens": ("tokens", "tokens trained on"),
    "flops": ("FLOPs", "of training, without recomputation"),
    "time": ("time", "training time"),
    "tok_per_s": ("tokens/s", "median"),
    "mfu": ("MFU", "median"),
    "mem_gb": ("memory", "peak"),
    "params": ("parameters", "without padding"),
    "device": ("device", ""),
    "dtype": ("dtype", ""),
    "commit": ("commit", "with + it had changes on top"),
}


class History(NamedTuple):
    name: str
    path: Path
    config: dict
    env: dict
    records: list         # of metrics.jsonl, by step; "flops" (so far) is added where it is known
    events: list
    resolved: dict        # what "auto" became at the last start or resume
    ended: str            # "end", "stop", or "" while it runs or after a kill
    params: int | None    # None where config and events do not give the model's sizes


# -----------------------------------------------------------------------------
# Reading a folder


def read_records(path):
    """The records of a .jsonl file, [] where there is no file. A last line that is still being written is ignored.

    Raises ValueError naming the first line that is no record.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise ValueError(f"{path}:{number} is no record of a run") from None
    return records


def read_object(path):
    """The JSON object in a file. Raises ValueError where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} does not hold a JSON object") from None


def drop_undone(records):
    """Records by step. Where a run rewound, the records of the steps that it undid are dropped."""
    standing = []
    for record in records:
        while standing and standing[-1]["step"] >= record["step"]:
            standing.pop()
        standing.append(record)
    return standing


def model_of(config, resolved):
    """The model that was trained, without storage; None where its sizes are not known.

    A field that is newer than the run gets its default, which is how the older code behaved.
    """
    vocab_size = resolved.get("vocab_size") or config.get("vocab_size")
    sizes = ("block_size", "n_layer", "n_head", "n_embd")
    if not vocab_size or any(name not in config for name in sizes):
        return None
    known = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
    try:
        with torch.device("meta"):
            return GPT(GPTConfig(**{**known, "vocab_size": vocab_size, "attn": "auto"}))
    except (ValueError, TypeError):  # an old run of a form that today's model does not have
        return None


def add_flops(records, model, config, changed):
    """Add to each record the FLOPs of training so far (GPT.train_flops: no recomputation, no evaluation).

    `changed`: keys that a resume changed. The context grows by steps; if its schedule changed in the middle of the
    run, the lengths are not on record and nothing is added.
    """
    start = config.get("context_start", 0)
    block_size = config["block_size"]
    if not records or "tokens" not in records[-1]:
        return
    if start and changed & {"context_start", "context_iters", "max_iters"}:
        return
    growth_end = 0  # the first step whose context is block_size
    if start:
        growth_end = config["context_iters"] or config["max_iters"] // 2

    tokens_per_step = records[-1]["tokens"] / records[-1]["step"]
    flops_at = {block_size: model.train_flops(block_size)}  # context length -> FLOPs of a token
    total = 0.0
    done = 0  # steps counted so far
    for record in records:
        short_end = min(growth_end, record["step"])
        for step in range(done, short_end):
            length = context_length(step, block_size, start, growth_end)
            if length not in flops_at:
                flops_at[length] = model.train_flops(length)
            total += tokens_per_step * flops_at[length]
        full_steps = record["step"] - max(done, short_end)
        total += tokens_per_step * full_steps * flops_at[block_size]
        done = record["step"]
        record["flops"] = total


def read_run(path):
    """A run folder as a History, named as its folder. Raises ValueError in one line where there is nothing to read."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no run folder {path}")
    for name in ("config.json", "env.json", "metrics.jsonl"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is no run folder: it holds no {name}")
    config = read_object(path / "config.json")
    env = read_object(path / "env.json")
    records = read_records(path / "metrics.jsonl")
    events = read_records(path / "events.jsonl")
    if not all(isinstance(record.get("step"), int) and record["step"] > 0 for record in records):
        raise ValueError(f"{path / 'metrics.jsonl'} holds a record without a step")
    records = drop_undone(records)
    if not records:
        raise ValueError(f"{path / 'metrics.jsonl'} is empty: the run has logged no step yet")

    starts = [event for event in events if event.get("event") in ("start", "resume")]
    resolved = starts[-1].get("resolved", {}) if starts else {}
    last_event = events[-1].get("event") if events else ""
    ended = last_event if last_event in ("end", "stop") else ""
    model = model_of(config, resolved)
    params = None
    if model:
        params = model.num_params()
        changed = {key for event in starts for key in event.get("changed", {})}
        add_flops(records, model, config, changed)
    return History(path.resolve().name, path, config, env, records, events, resolved, ended, params)


def read_runs(paths):
    """The History of each run folder. Runs of the same name also get the names of parent folders, until they differ.

    Raises ValueError where a folder is given twice, and as read_run does.
    """
    runs = [read_run(path) for path in paths]
    places = [run.path.resolve().parts for run in runs]
    if len(set(places)) < len(places):
        raise ValueError("the same run folder is given twice")
    depth = 1
    while len({place[-depth:] for place in places}) < len(places):
        depth += 1
    names = [run.name for run in runs]
    for i, place in enumerate(places):
        if names.count(names[i]) > 1:
            runs[i] = runs[i]._replace(name="/".join(place[-depth:]))
    return runs


# -----------------------------------------------------------------------------
# Series


def value_of(record, field, key=None):
    """A record's number, or with `key` that of one layer or group; None where there is none."""
    value = record.get(field)
    if key is not None and isinstance(value, dict):
        value = value.get(key)
    elif key is not None and isinstance(value, list):
        value = value[key] if key < len(value) else None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def series(run, field, x="step", key=None):
    """(xs, ys) of the records that have both. `key` is a layer or a group where the field holds several."""
    xs, ys = [], []
    for record in run.records:
        value = value_of(record, field, key)
        if record.get(x) is not None and value is not None:
            xs.append(record[x])
            ys.append(value)
    return xs, ys


def keys_of(run, field):
    """The layers (numbers) or groups (names) that a field holds, in the order of the records."""
    keys = {}
    for record in run.records:
        value = record.get(field)
        keys |= dict.fromkeys(value if isinstance(value, dict) else range(len(value or [])))
    return list(keys)


def over_layers(run, field, combine, x="step"):
    """(xs, ys) with one number for all layers: combine(list) -> number."""
    xs, ys = [], []
    for record in run.records:
        values = [value for value in record.get(field) or [] if value is not None]
        if record.get(x) is not None and values:
            xs.append(record[x])
            ys.append(combine(values))
    return xs, ys


def smooth(steps, values, steps_back):
    """Exponential moving average. Its time constant is in steps, so it does not depend on how often a run logs.

    Divided by the sum of its weights, as Adam's moments are (Kingma and Ba 2014, arXiv:1412.6980): it starts unbiased.
    """
    smoothed = []
    mean = weight = 0.0
    before = steps[0] - 1 if steps else 0
    for step, value in zip(steps, values, strict=True):
        keep = math.exp(-(step - before) / steps_back) if steps_back else 0.0
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + 1 - keep
        before = step
        smoothed.append(mean / weight)
    return smoothed


def smooth_both_ways(steps, values, steps_back):
    """The averages from both ends combined, which follow a falling loss without lag.

    For plots only: each point depends on later ones.
    """
    if not steps or not steps_back:
        return list(values)
    forward = smooth(steps, values, steps_back)
    backward = smooth([-step for step in steps[::-1]], values[::-1], steps_back)[::-1]
    combined = []
    for step, a, b in zip(steps, forward, backward, strict=True):
        # an average counts by how much of its weight it has seen
        seen_before = 1 - math.exp(-(abs(step - steps[0]) + 1) / steps_back)
        seen_after = 1 - math.exp(-(abs(step - steps[-1]) + 1) / steps_back)
        combined.append((a * seen_before + b * seen_after) / (seen_before + seen_after))
    return combined


def smoothing(run, share=0.02):
    """Time constant in steps for this run's loss: a share of the run, but at least two records."""
    steps = [record["step"] for record in run.records]
    spacing = statistics.median(b - a for a, b in zip([0, *steps], steps, strict=False))
    return max(share * max(steps[-1], run.config.get("max_iters", 0)), 2 * spacing)


# -----------------------------------------------------------------------------
# Summaries


def differences(runs):
    """{key: [its value in each run]} of the settings in which runs differ; None where a run does not have the key."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "out_dir")
    rows = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def median_or_none(values):
    return statistics.median(values) if values else None


def commit_of(env):
    """The first digits of the commit, with a + where there were changes on top; None where it is not known."""
    commit = (env.get("commit") or "")[:9]
    if env.get("dirty_diff"):
        commit += "+"
    return commit or None


def summary(run):
    """The figures of a run by COLUMNS' keys, and best_step; None where the run does not have one."""
    steps, losses = series(run, "loss")
    vals = list(zip(*series(run, "val_loss"), strict=True))
    best_step, best = min(vals, key=lambda point: point[1], default=(None, None))
    last = run.records[-1]
    device = run.env.get("device")
    if device in (None, "cpu"):
        device = run.env.get("cpu")
    return {
        "params": run.params,
        "steps": last["step"],
        "tokens": last.get("tokens"),
        "flops": last.get("flops"),
        "time": last.get("wall_s"),
        "loss": smooth(steps, losses, smoothing(run))[-1] if losses else None,
        "val_loss": vals[-1][1] if vals else None,
        "best": best,
        "best_step": best_step,
        "bits": vals[-1][1] / math.log(2) if vals else None,
        "tok_per_s": median_or_none(series(run, "tok_per_s")[1]),
        "mfu": median_or_none(series(run, "mfu")[1]),
        "mem_gb": max(series(run, "mem_gb")[1], default=None),
        "device": device,
        "dtype": run.resolved.get("dtype"),
        "commit": commit_of(run.env),
    }


def short_number(value):
    """A number with three digits and k, M, G, T, P or E."""
    for scale, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            digits = ".3g" if value < 1000 * scale else ".0f"
            return f"{value / scale:{digits}}{sign}"
    return f"{value:.3g}"


def duration(seconds):
    """Seconds as 5.3 s, 4:05 or 1:02:03."""
    return f"{seconds:.1f} s" if seconds < 60 else clock_face(seconds)


def format_figure(key, value):
    """A figure of a summary as it stands in a table, or None."""
    if value is None or isinstance(value, str):
        return value
    if key in ("val_loss", "best", "loss", "bits"):
        return f"{value:.4f}"
    if key == "time":
        return duration(value)
    if key == "mem_gb":
        return f"{value:.2f} GB"
    if key == "mfu":
        return f"{value:.1%}"
    return f"{value:,}" if key == "steps" else short_number(value)
