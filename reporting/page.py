"""
One self-contained HTML page of runs: what differs, figures, curves, samples, environment. page.html is its form.

The curves go into the page as numbers by step, and are drawn there by plotly.js, which comes inlined from the package
plotly; so the page needs no network and no server, and adapts to its window and to light or dark.
"""

import json
import re
import statistics
from html import escape
from pathlib import Path

from configurator import read_keys
from reporting.history import (
    AXES,
    COLUMNS,
    PARTS,
    clock,
    differences,
    keys_of,
    over_layers,
    series,
    shown,
    smooth_both_ways,
    smoothing,
    summary,
)

ROOT = Path(__file__).resolve().parents[1]
MOST_POINTS = 1200  # of a curve; a longer one keeps the least and the greatest of each stretch
PART_NAMES = {"data_ms": "data", "forward_ms": "forward", "backward_ms": "backward", "pipeline_ms": "pipeline",
              "optim_ms": "optimizer"}
# field: title, unit, and how it is drawn, of those that all runs share a chart of
SHARED = {
    "grad_norm": ("Gradient norm", "before clipping", {"log": True}),
    "lr": ("Learning rate", "", {"zero": True, "format": "~g"}),
    "tok_per_s": ("Speed", "tokens per second", {"zero": True, "format": "~s"}),
    "mfu": ("MFU", "share of the peak FLOP/s", {"zero": True, "format": "~%"}),
    "mem_gb": ("Peak memory", "GB", {"zero": True}),
    "gpu_util": ("GPU utilisation", "share of time", {"zero": True, "format": "~%"}),
    "gpu_power_w": ("GPU power", "W", {"zero": True}),
}
# field: title, unit, what becomes of the layers where runs share a chart, and how it is drawn
BY_LAYER = {
    "attn_entropy": ("Attention entropy", "nats", (statistics.mean, "mean of the layers"), {"zero": True}),
    "attn_logit_max": ("Largest attention logit", "scaled, before the softmax", (max, "largest of the layers"), {}),
    "act_rms": ("Activation scale", "RMS of the residual stream", (max, "largest of the layers"), {"zero": True}),
}
BY_GROUP = {"grad_norms": ("Gradient norms", "by group of parameters"),
            "update_ratio": ("Update to weight", "‖update‖ / ‖weight‖ by group")}
MEMORY = {"mem_gb": "peak", "rss_gb": "resident", "gpu_mem_gb": "GPU in use"}
MACHINE = ("tok_per_s", "mfu", "mem_gb", "gpu_util", "gpu_power_w")  # of the charts that runs share
SYMBOLS = {"warning": "▲", "spike": "◆", "nan": "✕", "rewind": "◀", "stop": "■"}  # events that are marked in the curves


# -----------------------------------------------------------------------------
# Curves


def thin(xs, ys, most=MOST_POINTS):
    """At most `most` points, the least and the greatest of each stretch, so that no spike is lost (M4: Jugel et al.
    2014, VLDB 7(10), keeps the ends of a stretch, too)."""
    if len(xs) <= most:
        return xs, ys
    kept, stretch = {0, len(xs) - 1}, 2 * len(xs) / (most - 2)
    for i in range((most - 2) // 2):
        inside = range(int(i * stretch), min(len(xs), int((i + 1) * stretch)))
        kept |= {min(inside, key=ys.__getitem__), max(inside, key=ys.__getitem__)}
    return [xs[i] for i in sorted(kept)], [ys[i] for i in sorted(kept)]


def rounded(values):
    return [float(f"{value:.6g}") for value in values]


def trace(xs, ys, label="", **how):
    xs, ys = thin(xs, ys)
    return {"step": xs, "y": rounded(ys), "label": label, **how}


def message(event):
    """An event in words."""
    kind, number = event.get("event", ""), (int, float)
    rest = {key: value for key, value in event.items() if key not in ("event", "time", "step", "resolved")}
    if kind == "warning":
        return f"warning: {rest.get('message', '')}"
    if kind in ("spike", "nan", "rewind"):
        z = f", z {rest['z']:.3g}" if isinstance(rest.get("z"), number) else ""
        value = f" {rest['value']:.4g}" if isinstance(rest.get("value"), number) else " not finite"
        back = f": back to step {rest['to']:,}" if isinstance(rest.get("to"), int) else ""
        without = ", ".join(map(str, rest.get("skipped") or []))
        without = f", without the data of step {without}" if without else ""
        return f"{kind}: {rest.get('what', '')}{value}{z}{back}{without}"
    if "wall_s" in rest:
        rest = {"after": clock(rest["wall_s"])}
    return " ".join([kind, *(f"{key} {value}" for key, value in rest.items() if value not in ({}, None))])


def marks(run, i, field):
    """Events as points on the curve of `field`."""
    xs, ys = series(run, field)
    events = [e for e in run.events if e.get("event") in SYMBOLS and isinstance(e.get("step"), int) and e["step"] > 0]
    if not xs or not events:
        return []
    near = [min(range(len(xs)), key=lambda k: abs(xs[k] - event["step"])) for event in events]
    return [{"run": i, "role": "mark", "label": "", "step": [event["step"] for event in events],
             "y": [ys[k] for k in near], "kinds": [event["event"] for event in events],
             "text": [f"{run.name}, step {event['step']:,}: {message(event)}"[:300] for event in events]}]


def loss_chart(runs, bands):
    raw, lines, dots = [], [], []
    for i, run in enumerate(runs):
        steps, losses = series(run, "loss")
        if steps:
            raw.append(trace(steps, losses, run=i, role="raw"))
            lines.append(trace(steps, smooth_both_ways(steps, losses, smoothing(run) / 2), "training", run=i))
        steps, vals = series(run, "val_loss")
        if steps:
            dots.append(trace(steps, vals, "validation", run=i, role="dots"))
    shades = [{"step": steps, "y": rounded(low + high[::-1]), "role": "band", "label": ""}
              for steps, low, high in bands]
    lines += [mark for i, run in enumerate(runs) for mark in marks(run, i, "loss")]
    chart = {"id": "loss", "title": "Loss", "unit": "nats per token", "wide": True,
             "traces": shades + raw + lines + dots}
    seen = [y for one in raw + dots for y in one["y"]]
    if len(seen) > 20:  # begin where the fall from the first steps is over
        top, low = sorted(seen)[int(0.96 * len(seen))], min(seen)
        chart["range"] = [low - 0.04 * (top - low), top + 0.04 * (top - low)]
    return chart


def shared_charts(runs):
    """Charts with a line for each run."""
    for field, (title, unit, how) in SHARED.items():
        traces = [trace(*series(run, field), run=i) for i, run in enumerate(runs) if series(run, field)[0]]
        if field == "grad_norm":
            traces += [mark for i, run in enumerate(runs) for mark in marks(run, i, field)]
        yield {"id": field, "title": title, "unit": unit, "traces": traces, **how}
    for field, (title, unit, (combine, which), how) in BY_LAYER.items():
        found = [over_layers(run, field, combine) for run in runs]
        traces = [trace(*points, run=i) for i, points in enumerate(found) if points[0]]
        yield {"id": field, "title": title, "unit": f"{unit}, {which}", "traces": traces, **how}


def depth_of(key, layers):
    """Where in the model a layer (a number) or group ("layer_3") is, 0 to 1; nothing for the embedding and the head."""
    number = key if isinstance(key, int) else int(key[6:]) if re.fullmatch(r"layer_\d+", str(key)) else None
    return {} if number is None else {"depth": number / max(1, layers - 1)}


def inner_charts(run, i):
    """Charts of a single run."""
    layers = run.config.get("n_layer", 1)
    yield parts_chart(run, i)
    for field, (title, unit, how) in {**{f: (t, u, how) for f, (t, u, _, how) in BY_LAYER.items()},
                                      **{f: (*titles, {"log": True}) for f, titles in BY_GROUP.items()}}.items():
        keys, traces = keys_of(run, field), []
        for key in keys:
            steps, values = series(run, field, key=key)
            hue = {"hue": {"embed": 1}.get(key, 3)}
            label = f"layer {key}" if isinstance(key, int) else str(key).replace("_", " ")
            if steps:
                traces.append(trace(steps, values, label, run=i, **(depth_of(key, layers) or hue)))
        yield {"id": f"{field}-{i}", "title": title, "unit": unit, "traces": traces, "of": i, **how}
    found = {label: series(run, field) for field, label in MEMORY.items()}
    traces = [trace(*points, label, run=i, hue=k) for k, (label, points) in enumerate(found.items()) if points[0]]
    yield {"id": f"memory-{i}", "title": "Memory", "unit": "GB", "traces": traces, "of": i, "zero": True}
    yield {"id": f"comm-{i}", "title": "Communication", "unit": "ms of a step that nothing hides", "of": i,
           "traces": [trace(*series(run, "comm_ms"), "exposed", run=i)], "zero": True}


def parts_chart(run, i, stretches=80):
    """Shares of a step's time, as means of stretches of records."""
    records = [r for r in run.records if any(isinstance(r.get(part), (int, float)) for part in PARTS)]
    size = max(1, -(-len(records) // stretches))
    groups = [records[k : k + size] for k in range(0, len(records), size)]
    traces = []
    for k, part in enumerate(PARTS):
        ms = [statistics.mean(r.get(part) or 0.0 for r in group) for group in groups]
        total = [statistics.mean(sum(r.get(p) or 0.0 for p in PARTS) for r in group) for group in groups]
        if any(ms):
            shares = [a / max(b, 1e-9) for a, b in zip(ms, total, strict=True)]
            traces.append({"step": [group[-1]["step"] for group in groups], "y": rounded(shares), "run": i, "hue": k,
                           "label": PART_NAMES[part], "role": "stack",
                           "text": [f"{a:.3g} ms, {share:.0%}" for a, share in zip(ms, shares, strict=True)]})
    return {"id": f"parts-{i}", "title": "Where a step's time goes", "unit": "", "traces": traces, "of": i,
            "range": [0, 1], "format": "~%"}


# -----------------------------------------------------------------------------
# Words and tables


def table(head, rows):
    """A table; the first cell of a row is its heading. Cells are HTML."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
                   for first, *rest in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(value):
    return '<span class="none">–</span>' if value is None else escape(value if isinstance(value, str) else repr(value))


def label(i, run):
    return f'<span data-hue="{i}"></span>{escape(run.name)}'


def section(title, body, sub=""):
    sub = f'<p class="sub">{sub}</p>' if sub else ""
    return f"<section><h2>{title}</h2>{sub}{body}</section>"


def what_differs(runs):
    names = [label(i, run) for i, run in enumerate(runs)]
    if len(runs) == 1:
        usual = {name: key.default for name, key in read_keys(ROOT / "train.py").items()}
        own = {key: value for key, value in runs[0].config.items() if value != usual.get(key) and key != "out_dir"}
        return section("Settings", keys_list(own), "Those that are not train.py's defaults.")
    rows = differences(runs)
    if not rows:
        return section("What differs", "", "Nothing: these runs have the same settings.")
    keys = [f'<span class="key">{escape(key)}</span>' for key in rows]
    columns = [[cell(value) for value in row] for row in rows.values()]
    if len(keys) <= 8:
        body = table(["", *keys], [[name, *values] for name, *values in zip(names, *columns, strict=True)])
    else:
        body = table(["", *names], [[key, *values] for key, values in zip(keys, columns, strict=True)])
    same = len(runs[0].config) - len(rows)
    return section("What differs", body, f"The other {same} settings are the same in all of these runs.")


def figures(runs):
    rows = [summary(run) for run in runs]
    columns = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    body = [[label(i, run), *(cell(shown(key, row[key])) for key in columns)]
            for i, (run, row) in enumerate(zip(runs, rows, strict=True))]
    heads = [f'<span title="{escape(COLUMNS[key][1])}">{escape(COLUMNS[key][0])}</span>' for key in columns]
    return section("Figures", table(["", *heads], body),
                   "Losses in nats per token, the training loss smoothed; speed and MFU are medians; "
                   "a commit with + had changes on top.")


def chart_html(chart):
    wide = ' class="wide"' if chart.get("wide") else ""
    legend = '<div class="legend"></div>' if "of" in chart else ""
    title, unit = escape(chart["title"]), escape(chart["unit"])
    return (f'<figure{wide}><figcaption><b>{title}</b><span class="unit">{unit}</span></figcaption>{legend}'
            f'<div class="plot" id="{chart["id"]}" role="img" aria-label="{title}"></div></figure>')


def keys_list(values):
    items = "".join(f'<div><dt class="key">{escape(str(k))}</dt><dd class="key">{cell(v)}</dd></div>'
                    for k, v in values.items())
    return f'<dl class="keys">{items}</dl>'


def samples(run):
    found = [event for event in run.events if event.get("event") == "sample"]
    vals = dict(zip(*series(run, "val_loss"), strict=True))
    if not found:
        return ""
    cards = []
    for event in found:
        loss = f", validation loss {vals[event['step']]:.3f}" if event.get("step") in vals else ""
        cards.append(f"<article><h3>step {event.get('step', 0):,}{loss}</h3>"
                     f"<pre>{escape(str(event.get('text', '')).strip())}</pre></article>")
    return f'<h3 class="part">Samples through training</h3><div class="samples">{"".join(cards)}</div>'


def events_table(run):
    found = [event for event in run.events if event.get("event") != "sample"]
    rows = [[f"{event.get('step', 0):,}", escape(message(event)).replace("\n", " ")] for event in found]
    noisy = sum(event.get("event") in SYMBOLS for event in found)
    body = table(["step", "event"], rows).replace('class="scroll"', 'class="scroll words"')
    marked = f", {noisy} of them marked in the curves" if noisy else ""
    return f"<details><summary>Events ({len(found)}{marked})</summary>{body}</details>"


def environment(run):
    plain = {key: value for key, value in run.env.items() if key not in ("packages", "dirty_diff", "untracked")}
    plain |= {f"resolved {key}": value for key, value in run.resolved.items()}
    plain["packages"] = ", ".join(f"{name} {version}" for name, version in (run.env.get("packages") or {}).items())
    items = "".join(f'<dt>{escape(key)}</dt><dd class="key">{cell(value)}</dd>' for key, value in plain.items())
    diff = run.env.get("dirty_diff") or ""
    diff = f"<p>Changes on top of the commit:</p><pre class=diff>{escape(diff)}</pre>" if diff else ""
    return (f"<details><summary>Environment</summary><dl>{items}</dl>{diff}</details>"
            f"<details><summary>All settings</summary>{keys_list(run.config)}</details>")


def inside(runs, charts):
    """What concerns one run at a time, behind a choice of the run."""
    options = "".join(f"<option>{escape(run.name)}</option>" for run in runs)
    choice = f'<select aria-label="run">{options}</select>' if len(runs) > 1 else ""
    parts = []
    for i, run in enumerate(runs):
        mine = "".join(chart_html(chart) for chart in charts if chart.get("of") == i)
        parts.append(f'<div data-of="{escape(run.name)}"><div class="grid">{mine}</div>{samples(run)}'
                     f'<h3 class="part">Record</h3>{events_table(run)}{environment(run)}</div>')
    deep = any("depth" in one for chart in charts for one in chart["traces"])
    sub = '<p class="sub">Layers grow lighter with their depth.</p>' if deep else ""
    return f'<section><div class="head"><h2>Inside {"one run" if choice else "the run"}</h2>{choice}</div>{sub}' \
           f'{"".join(parts)}</section>'


def against(name, findings):
    """What the comparison with the baseline `name` found: {run's name: findings}."""
    body = ""
    for run, found in findings.items():
        words = [{True: "worse", False: "fine", None: "left out"}[one.worse] for one in found]
        items = "".join(f'<li class="{word}"><b>{word}</b>{escape(one.text)}</li>'
                        for word, one in zip(words, found, strict=True))
        items = f'<ul class="findings">{items}</ul>'
        worse = ", ".join(one.what for one in found if one.worse)
        body += items if len(findings) == 1 else \
            f'<details{" open" * bool(worse)}><summary>{escape(run)}: {f"worse in {worse}" if worse else "in band"}' \
            f'</summary>{items}</details>'
    note = "Grey in the chart of the loss: its bands. reporting/alarm.py has the rule."
    return section(f"Against {escape(name)}", body, note)


def controls(runs, charts):
    chips = "".join(f'<button data-run="{escape(run.name)}" title="show or hide">{label(i, run)}</button>'
                    for i, run in enumerate(runs))
    known = [axis for axis in AXES if any(axis in run.records[-1] for run in runs)]
    axes = "".join(f'<button data-axis="{axis}">{AXES[axis][1]}</button>' for axis in known)
    return (f'<nav class="bar" aria-label="runs and axis"><div><div class="chips">{chips}</div>'
            f'<div class="switch" role="group" aria-label="horizontal axis">{axes}</div></div></nav>')


def curves(charts):
    """The charts that runs share: of learning, and of the machine."""
    marked = {kind for chart in charts for one in chart["traces"] for kind in one.get("kinds", ())}
    sub = "Training loss smoothed, as logged (faint), validation loss (dots). Drag to zoom, double-click to return."
    sub += f" {', '.join(f'{SYMBOLS[kind]} {kind}' for kind in SYMBOLS if kind in marked)}." if marked else ""
    shared = [chart for chart in charts if "of" not in chart]
    learning, working = ([chart_html(c) for c in shared if (c["id"] in MACHINE) == of] for of in (False, True))
    return section("Curves", f'<p class="hint" id="without"></p><div class="grid">{"".join(learning)}</div>', sub) + \
        (section("Machine", f'<div class="grid">{"".join(working)}</div>') if working else "")


def render(runs, baseline="", findings=None, bands=(), watch=0.0, made="", more=""):
    """The page as text. `findings` {run's name: alarm's findings} against what is called `baseline`, whose `bands`
    are (steps, low, high); `more` is HTML of further sections; `watch` makes the page look for a newer self every so
    many seconds; `made` says when."""
    from plotly.offline import get_plotlyjs

    charts = [loss_chart(runs, bands), *shared_charts(runs)]
    charts += [chart for i, run in enumerate(runs) for chart in inner_charts(run, i)]
    charts = [chart for chart in charts if any(one["step"] for one in chart["traces"])]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    going = [run for run in runs if not run.ended]
    state = "".join(f'<span class="state">{escape(run.name)}: step {run.records[-1]["step"]:,} of '
                    f'{run.config.get("max_iters", 0):,}</span>' for run in going) if watch else ""
    datasets = ", ".join(dict.fromkeys(Path(str(run.config.get("dataset", ""))).name for run in runs))
    body = "".join([
        f'<header><div class="brand">minichat · training report</div><h1>{escape(title)}</h1>'
        f'<p class="sub">{escape(datasets)} · {escape(made)}{state}</p>',
        what_differs(runs), figures(runs), against(baseline, findings) if findings else "", more, "</header>",
        controls(runs, charts), "<main>", curves(charts), inside(runs, charts),
        "<footer>Made by report.py from the run folders. Nothing here is loaded from elsewhere.</footer></main>",
    ])
    axes = [{axis: thin_axis(run, axis) for axis in AXES if axis in run.records[-1]} for run in runs]
    data = {"runs": [{"name": run.name, "axes": by} for run, by in zip(runs, axes, strict=True)], "charts": charts,
            "axes": {axis: True for by in axes for axis in by}, "watch": watch}
    parts = {"title": escape(title), "body": body, "plotly": get_plotlyjs(),
             "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")}
    form = (ROOT / "reporting" / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], form)


def thin_axis(run, axis, most=2000):
    """A run's tokens, FLOPs or time at so many of its records, the last among them."""
    every = -(-len(run.records) // most)
    records = run.records[::-1][::every][::-1]
    return rounded(record.get(axis) or 0.0 for record in records) if axis != "step" else [r["step"] for r in records]
