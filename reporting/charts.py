"""
The charts of the report's page, as plain data: {"id", "title", "unit", "traces": [...]}, which page.html draws.

A trace is a line: {"step": [...], "y": [...], "label"}, with the number of its run and how to draw it.
"""

import re
import statistics

from reporting.history import PARTS, duration, keys_of, over_layers, series, smooth_both_ways, smoothing

MOST_POINTS = 1200  # of a curve; a longer one keeps the least and the greatest value of each stretch
PART_NAMES = {"data_ms": "data", "forward_ms": "forward", "backward_ms": "backward", "pipeline_ms": "pipeline",
              "optim_ms": "optimizer"}
# field of a chart with a line for each run: title, unit, options
SHARED = {
    "grad_norm": ("Gradient norm", "before clipping", {"log": True}),
    "lr": ("Learning rate", "", {"zero": True, "format": "~g"}),
    "tok_per_s": ("Speed", "tokens per second", {"zero": True, "format": "~s"}),
    "mfu": ("MFU", "share of the peak FLOP/s", {"zero": True, "format": "~%"}),
    "mem_gb": ("Peak memory", "GB", {"zero": True}),
    "gpu_util": ("GPU utilisation", "share of time", {"zero": True, "format": "~%"}),
    "gpu_power_w": ("GPU power", "W", {"zero": True}),
}
# field that has a value for each layer: title, unit, (how layers combine where runs share a chart, its name), options
BY_LAYER = {
    "attn_entropy": ("Attention entropy", "nats", (statistics.mean, "mean of the layers"), {"zero": True}),
    "attn_logit_max": ("Largest attention logit", "scaled, before the softmax", (max, "largest of the layers"), {}),
    "act_rms": ("Activation scale", "RMS of the residual stream", (max, "largest of the layers"), {"zero": True}),
}
BY_GROUP = {"grad_norms": ("Gradient norms", "by group of parameters"),
            "update_ratio": ("Update to weight", "‖update‖ / ‖weight‖ by group")}
MEMORY = {"mem_gb": "peak", "rss_gb": "resident", "gpu_mem_gb": "GPU in use"}
SYMBOLS = {"warning": "▲", "spike": "◆", "nan": "✕", "rewind": "◀", "stop": "■"}  # events that curves mark


def thin(xs, ys, most=MOST_POINTS):
    """At most `most` points: the least and the greatest of each stretch, so that no spike is lost.

    After M4 (Jugel et al. 2014, VLDB 7(10)), which also keeps the ends of each stretch.
    """
    if len(xs) <= most:
        return xs, ys
    indices = {0, len(xs) - 1}
    stretch = 2 * len(xs) / (most - 2)
    for i in range((most - 2) // 2):
        inside = range(int(i * stretch), min(len(xs), int((i + 1) * stretch)))
        indices |= {min(inside, key=ys.__getitem__), max(inside, key=ys.__getitem__)}
    return [xs[i] for i in sorted(indices)], [ys[i] for i in sorted(indices)]


def rounded(values):
    return [float(f"{value:.6g}") for value in values]


def trace(xs, ys, label="", **options):
    """A line of a chart as page.html reads it."""
    xs, ys = thin(xs, ys)
    return {"step": xs, "y": rounded(ys), "label": label, **options}


def message(event):
    """An event in words."""
    kind = event.get("event", "")
    elsewhere = ("event", "time", "step", "resolved")
    details = {key: value for key, value in event.items() if key not in elsewhere}
    if kind == "warning":
        return f"warning: {details.get('message', '')}"
    if kind in ("spike", "nan", "rewind"):
        return f"{kind}: {accident(details)}"
    if "wall_s" in details:
        details = {"after": duration(details["wall_s"])}
    words = [f"{key} {value}" for key, value in details.items() if value not in ({}, None)]
    return " ".join([kind, *words])


def accident(details):
    """A spike, NaN or rewind in words: "loss 9, z 8.5: back to step 4, without the data of step 6"."""
    text = details.get("what", "")
    if isinstance(details.get("value"), (int, float)):
        text += f" {details['value']:.4g}"
    else:
        text += " not finite"
    if isinstance(details.get("z"), (int, float)):
        text += f", z {details['z']:.3g}"
    if isinstance(details.get("to"), int):
        text += f": back to step {details['to']:,}"
    if skipped := ", ".join(map(str, details.get("skipped") or [])):
        text += f", without the data of step {skipped}"
    return text


def marks(run, i, field):
    """The events of run number i as points on its curve of `field`: [one trace], or [] without events or curve."""
    xs, ys = series(run, field)
    events = []
    for event in run.events:
        step = event.get("step")
        if event.get("event") in SYMBOLS and isinstance(step, int) and step > 0:
            events.append(event)
    if not xs or not events:
        return []
    nearest = [min(range(len(xs)), key=lambda k: abs(xs[k] - event["step"])) for event in events]
    return [{
        "run": i, "role": "mark", "label": "",
        "step": [event["step"] for event in events],
        "y": [ys[k] for k in nearest],
        "kinds": [event["event"] for event in events],
        "text": [f"{run.name}, step {event['step']:,}: {message(event)}"[:300] for event in events],
    }]


def loss_chart(runs, bands):
    raw, lines, dots, mark_traces = [], [], [], []
    for i, run in enumerate(runs):
        steps, losses = series(run, "loss")
        if steps:
            smoothed = smooth_both_ways(steps, losses, smoothing(run) / 2)
            raw.append(trace(steps, losses, run=i, role="raw"))
            lines.append(trace(steps, smoothed, "training", run=i))
        steps, vals = series(run, "val_loss")
        if steps:
            dots.append(trace(steps, vals, "validation", run=i, role="dots"))
        mark_traces += marks(run, i, "loss")
    shades = [{"step": steps, "y": rounded(low + high[::-1]), "role": "band", "label": ""}
              for steps, low, high in bands]
    chart = {"id": "loss", "title": "Loss", "unit": "nats per token", "wide": True,
             "traces": shades + raw + lines + mark_traces + dots}
    values = sorted(y for line in raw + dots for y in line["y"])
    if len(values) > 20:  # begin where the steep fall of the first steps is over
        top = values[int(0.96 * len(values))]
        margin = 0.04 * (top - values[0])
        chart["range"] = [values[0] - margin, top + margin]
    return chart


def shared_charts(runs):
    """Charts with a line for each run."""
    for field, (title, unit, options) in SHARED.items():
        points = [series(run, field) for run in runs]
        traces = [trace(*xy, run=i) for i, xy in enumerate(points) if xy[0]]
        if field == "grad_norm":
            for i, run in enumerate(runs):
                traces += marks(run, i, field)
        yield {"id": field, "title": title, "unit": unit, "traces": traces, **options}
    for field, (title, unit, (combine, name), options) in BY_LAYER.items():
        points = [over_layers(run, field, combine) for run in runs]
        traces = [trace(*xy, run=i) for i, xy in enumerate(points) if xy[0]]
        yield {"id": field, "title": title, "unit": f"{unit}, {name}", "traces": traces, **options}


def depth_of(key, layers):
    """{"depth": 0 to 1}, where in the model a layer (a number) or group ("layer_3") is; {} for embedding and head."""
    if isinstance(key, int):
        number = key
    elif re.fullmatch(r"layer_\d+", str(key)):
        number = int(key.removeprefix("layer_"))
    else:
        return {}
    return {"depth": number / max(1, layers - 1)}


def inner_charts(run, i):
    """Charts of run number i alone."""
    yield parts_chart(run, i)
    for field, (title, unit, _, options) in BY_LAYER.items():
        yield {"id": f"{field}-{i}", "title": title, "unit": unit, "of": i,
               "traces": key_traces(run, i, field), **options}
    for field, (title, unit) in BY_GROUP.items():
        yield {"id": f"{field}-{i}", "title": title, "unit": unit, "of": i,
               "traces": key_traces(run, i, field), "log": True}
    traces = []
    for hue, (field, label) in enumerate(MEMORY.items()):
        steps, values = series(run, field)
        if steps:
            traces.append(trace(steps, values, label, run=i, hue=hue))
    yield {"id": f"memory-{i}", "title": "Memory", "unit": "GB", "traces": traces, "of": i, "zero": True}
    yield {"id": f"comm-{i}", "title": "Communication", "unit": "ms of a step that nothing hides", "of": i,
           "traces": [trace(*series(run, "comm_ms"), "exposed", run=i)], "zero": True}


def key_traces(run, i, field):
    """A line for each layer or group of a field."""
    traces = []
    for key in keys_of(run, field):
        steps, values = series(run, field, key=key)
        label = f"layer {key}" if isinstance(key, int) else str(key).replace("_", " ")
        colour = depth_of(key, run.config.get("n_layer", 1))
        if not colour:
            colour = {"hue": 1 if key == "embed" else 3}
        if steps:
            traces.append(trace(steps, values, label, run=i, **colour))
    return traces


def parts_chart(run, i, stretches=80):
    """Shares of a step's time, as means of stretches of records."""
    def has_part(record):
        return any(isinstance(record.get(part), (int, float)) for part in PARTS)

    records = [record for record in run.records if has_part(record)]
    size = max(1, -(-len(records) // stretches))
    groups = [records[k : k + size] for k in range(0, len(records), size)]
    totals = []
    for group in groups:
        sums = [sum(record.get(part) or 0.0 for part in PARTS) for record in group]
        totals.append(statistics.mean(sums))
    traces = []
    for k, part in enumerate(PARTS):
        ms = [statistics.mean(record.get(part) or 0.0 for record in group) for group in groups]
        if any(ms):
            shares = [a / max(b, 1e-9) for a, b in zip(ms, totals, strict=True)]
            traces.append({"step": [group[-1]["step"] for group in groups], "y": rounded(shares), "run": i, "hue": k,
                           "label": PART_NAMES[part], "role": "stack",
                           "text": [f"{a:.3g} ms, {share:.0%}" for a, share in zip(ms, shares, strict=True)]})
    return {"id": f"parts-{i}", "title": "Where a step's time goes", "unit": "", "traces": traces, "of": i,
            "range": [0, 1], "format": "~%"}
