"""
What run folders say, as plain data, for reports, alarms and notebooks. Only the four files of training/monitor.py
are read.

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

from loader import context_length
from model import GPT, GPTConfig

AXES = {"step": ("step", "steps"), "tokens": ("tokens", "tokens"), "flops": ("training FLOPs", "FLOPs"),
        "wall_s": ("training time in seconds", "time")}  # a record's field: on an axis, in a choice of them
PARTS = ("data_ms", "forward_ms", "backward_ms", "pipeline_ms", "optim_ms")  # that add up to a step's time
COLUMNS = {  # of a table of summaries: heading, meaning
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
    resolved: dict        # what "auto" became, of the last start or resume
    ended: str            # "end", "stop", or "": running still, or killed
    params: int | None    # None where config and events do not say what the model was


def read_lines(path):
    """The records of a .jsonl file; a last line that is being written is left for the next time.

    Raises ValueError naming the line that is no record.
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


def in_order(records):
    """Records by step: where a run went back, those that it undid are dropped."""
    kept = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def model_of(config, resolved):
    """The model that was trained, without storage, or None where its sizes are not known. A field that is newer than
    the run has its default, which is what there was before."""
    vocab_size = resolved.get("vocab_size") or config.get("vocab_size")
    if not vocab_size or any(name not in config for name in ("block_size", "n_layer", "n_head", "n_embd")):
        return None
    known = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
    try:
        with torch.device("meta"):
            return GPT(GPTConfig(**{**known, "vocab_size": vocab_size, "attn": "auto"}))
    except (ValueError, TypeError):  # of another time: today's model has no such form
        return None


def add_flops(records, model, config, changed):
    """Add to each record the FLOPs of training so far (GPT.train_flops: no recomputation, no evaluation)."""
    start, T = config.get("context_start", 0), config["block_size"]
    schedule = {"context_start", "context_iters", "max_iters"}
    if not records or "tokens" not in records[-1] or start and schedule & changed:
        return  # a schedule that changed in the middle of the run is not on record
    per_step = records[-1]["tokens"] / records[-1]["step"]
    until = (config["context_iters"] or config["max_iters"] // 2) if start else 0
    total, by_length, step = 0.0, {}, 0
    for record in records:
        for at in range(step, min(until, record["step"])):
            length = context_length(at, T, start, until)
            if length not in by_length:
                by_length[length] = model.train_flops(length)
            total += per_step * by_length[length]
        total += per_step * (record["step"] - max(step, min(until, record["step"]))) * model.train_flops(T)
        step = record["step"]
        record["flops"] = total


def read_run(path):
    """A run folder as a History, named as its folder. Raises ValueError in one line where there is nothing to read."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no run folder {path}")
    for name in ("config.json", "env.json", "metrics.jsonl"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is no run folder: it holds no {name}")
    config, env = read_object(path / "config.json"), read_object(path / "env.json")
    records, events = read_lines(path / "metrics.jsonl"), read_lines(path / "events.jsonl")
    if not all(isinstance(record.get("step"), int) and record["step"] > 0 for record in records):
        raise ValueError(f"{path / 'metrics.jsonl'} holds a record without a step")
    records = in_order(records)
    if not records:
        raise ValueError(f"{path / 'metrics.jsonl'} is empty: the run has logged no step yet")
    begun = [event for event in events if event.get("event") in ("start", "resume")]
    resolved = begun[-1].get("resolved", {}) if begun else {}
    last = events[-1].get("event") if events else ""
    model = model_of(config, resolved)
    if model:
        add_flops(records, model, config, {key for event in begun for key in event.get("changed", {})})
    return History(path.resolve().name, path, config, env, records, events, resolved,
                   last if last in ("end", "stop") else "", model.num_params() if model else None)


def read_runs(paths):
    """History of each run folder; names that are the same are told apart by the folders above."""
    runs = [read_run(path) for path in paths]
    places = [run.path.resolve().parts for run in runs]
    if len(set(places)) < len(places):
        raise ValueError("the same run folder is given twice")
    depth = 1
    while len({place[-depth:] for place in places}) < len(places):
        depth += 1
    same = {run.name for run in runs if [r.name for r in runs].count(run.name) > 1}
    return [run._replace(name="/".join(place[-depth:])) if run.name in same else run
            for run, place in zip(runs, places, strict=True)]


def value_of(record, field, key=None):
    """A record's number, or that of one layer or group `key` of it; None where it has none."""
    value = record.get(field)
    if key is not None and isinstance(value, (list, dict)):
        value = value.get(key) if isinstance(value, dict) else value[key] if key < len(value) else None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def series(run, field, x="step", key=None):
    """(xs, ys) of the records that have both; `key` is a layer or a group where the field holds several."""
    points = [(record.get(x), value_of(record, field, key)) for record in run.records]
    points = [(a, b) for a, b in points if a is not None and b is not None]
    return [a for a, _ in points], [b for _, b in points]


def keys_of(run, field):
    """The layers (numbers) or groups (names) that a field holds, in the order of the records."""
    keys = {}
    for record in run.records:
        value = record.get(field)
        keys |= dict.fromkeys(value if isinstance(value, dict) else range(len(value or [])))
    return list(keys)


def over_layers(run, field, how, x="step"):
    """(xs, ys) with one figure of all layers: how(list) -> number."""
    points = [(r.get(x), [v for v in r.get(field) or [] if v is not None]) for r in run.records]
    points = [(a, how(values)) for a, values in points if a is not None and values]
    return [a for a, _ in points], [b for _, b in points]


def smooth(steps, values, steps_back):
    """Exponential moving average with a time constant in steps, so that records may lie as close as they like.

    Divided by the sum of its weights, as Adam's moments are (Kingma and Ba 2014, arXiv:1412.6980): it starts unbiased.
    """
    out, mean, weight, before = [], 0.0, 0.0, steps[0] - 1 if steps else 0
    for step, value in zip(steps, values, strict=True):
        keep = math.exp(-(step - before) / steps_back) if steps_back else 0.0
        mean, weight, before = keep * mean + (1 - keep) * value, keep * weight + 1 - keep, step
        out.append(mean / weight)
    return out


def smooth_both_ways(steps, values, steps_back):
    """Exponential averages from either end together, so that a fall is followed without lag: for the eye, as a point
    depends on what comes after it."""
    if not steps or not steps_back:
        return list(values)
    forth = smooth(steps, values, steps_back)
    back = smooth([-step for step in steps[::-1]], values[::-1], steps_back)[::-1]
    seen = [[1 - math.exp(-(abs(step - end) + 1) / steps_back) for step in steps] for end in (steps[0], steps[-1])]
    return [(a * u + b * v) / (u + v) for a, b, u, v in zip(forth, back, *seen, strict=True)]


def smoothing(run, share=0.02):
    """Time constant in steps for this run's loss: a share of the run, but no less than two records."""
    steps = [record["step"] for record in run.records]
    between = statistics.median(b - a for a, b in zip([0, *steps], steps, strict=False))
    return max(share * max(steps[-1], run.config.get("max_iters", 0)), 2 * between)


def differences(runs):
    """{key: [its value in each run]} of the settings in which runs differ; None where a run does not have the key."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "out_dir")
    rows = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def median(values):
    return statistics.median(values) if values else None


def step_parts(run):
    """{part: median ms of a step} of those parts that were measured."""
    found = {part: series(run, part)[1] for part in PARTS}
    return {part: statistics.median(values) for part, values in found.items() if values}


def summary(run):
    """The figures of a run that stand in a table; None where it does not have one."""
    steps, losses = series(run, "loss")
    vals = list(zip(*series(run, "val_loss"), strict=True))
    best = min(vals, key=lambda point: point[1], default=(None, None))
    last = run.records[-1]
    return {
        "params": run.params,
        "steps": last["step"],
        "tokens": last.get("tokens"),
        "flops": last.get("flops"),
        "time": last.get("wall_s"),
        "loss": smooth(steps, losses, smoothing(run))[-1] if losses else None,
        "val_loss": vals[-1][1] if vals else None,
        "best": best[1],
        "best_step": best[0],
        "bits": vals[-1][1] / math.log(2) if vals else None,
        "tok_per_s": median(series(run, "tok_per_s")[1]),
        "mfu": median(series(run, "mfu")[1]),
        "mem_gb": max(series(run, "mem_gb")[1], default=None),
        "device": run.env.get("device") if run.env.get("device") not in (None, "cpu") else run.env.get("cpu"),
        "dtype": run.resolved.get("dtype"),
        "commit": (run.env.get("commit") or "")[:9] + "+" * bool(run.env.get("dirty_diff")) or None,
    }


def short(value):
    """A number with three digits and k, M, G, T, P or E."""
    for scale, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{sign}" if value < 1000 * scale else f"{value / scale:.0f}{sign}"
    return f"{value:.3g}"


def clock(seconds):
    """Seconds as 5.3 s, 4:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"


def shown(key, value):
    """A figure of a summary as a table has it, or None."""
    if value is None or isinstance(value, str):
        return value
    if key in ("val_loss", "best", "loss", "bits"):
        return f"{value:.4f}"
    if key == "time":
        return clock(value)
    if key == "mem_gb":
        return f"{value:.2f} GB"
    return f"{value:.1%}" if key == "mfu" else f"{value:,}" if key == "steps" else short(value)
