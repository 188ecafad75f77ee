"""
One self-contained HTML page of runs: settings that differ, figures, curves, samples, environment.

page.html is its template. The curves go into the page as numbers by step. plotly.js draws them there; it comes inlined
from the package plotly, so the page needs no network and no server. It adapts to its window and to light or dark.
"""

import json
import re
from html import escape
from pathlib import Path

from configurator import read_keys
from reporting.charts import SYMBOLS, inner_charts, loss_chart, message, rounded, shared_charts
from reporting.history import AXES, COLUMNS, differences, format_figure, series, summary

ROOT = Path(__file__).resolve().parents[1]
MACHINE = ("tok_per_s", "mfu", "mem_gb", "gpu_util", "gpu_power_w")  # shared charts about the machine, not learning


# -----------------------------------------------------------------------------
# Words and tables


def table(head, rows):
    """A table; the first cell of a row is its heading. Cells are HTML."""
    heads = "".join(f"<th>{text}</th>" for text in head)
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td>{text}</td>" for text in others)
        body += f"<tr><th scope=row>{first}</th>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(value):
    if value is None:
        return '<span class="none">–</span>'
    return escape(value if isinstance(value, str) else repr(value))


def label(i, run):
    return f'<span data-hue="{i}"></span>{escape(run.name)}'


def section(title, body, subtitle=""):
    if subtitle:
        subtitle = f'<p class="sub">{subtitle}</p>'
    return f"<section><h2>{title}</h2>{subtitle}{body}</section>"


def settings_section(runs):
    """The settings in which runs differ; of a single run the settings that are not the defaults."""
    names = [label(i, run) for i, run in enumerate(runs)]
    if len(runs) == 1:
        defaults = {name: key.default for name, key in read_keys(ROOT / "train.py").items()}
        config = runs[0].config.items()
        own = {key: value for key, value in config if value != defaults.get(key) and key != "out_dir"}
        return section("Settings", keys_list(own), "Settings that differ from train.py's defaults.")
    rows = differences(runs)
    if not rows:
        return section("What differs", "", "Nothing: these runs have the same settings.")
    keys = [f'<span class="key">{escape(key)}</span>' for key in rows]
    columns = [[cell(value) for value in row] for row in rows.values()]
    if len(keys) <= 8:
        body = table(["", *keys], zip(names, *columns, strict=True))
    else:
        body = table(["", *names], [[key, *values] for key, values in zip(keys, columns, strict=True)])
    same = len(runs[0].config) - len(rows)
    return section("What differs", body, f"The other {same} settings are the same in all of these runs.")


def figures_section(runs):
    rows = [summary(run) for run in runs]
    columns = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    body = []
    for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
        body.append([label(i, run), *(cell(format_figure(key, row[key])) for key in columns)])
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
    items = "".join(f'<div><dt class="key">{escape(str(key))}</dt><dd class="key">{cell(value)}</dd></div>'
                    for key, value in values.items())
    return f'<dl class="keys">{items}</dl>'


def samples(run):
    events = [event for event in run.events if event.get("event") == "sample"]
    if not events:
        return ""
    vals = dict(zip(*series(run, "val_loss"), strict=True))
    cards = []
    for event in events:
        loss = f", validation loss {vals[event['step']]:.3f}" if event.get("step") in vals else ""
        text = escape(str(event.get("text", "")).strip())
        cards.append(f"<article><h3>step {event.get('step', 0):,}{loss}</h3><pre>{text}</pre></article>")
    return f'<h3 class="part">Samples through training</h3><div class="samples">{"".join(cards)}</div>'


def events_table(run):
    events = [event for event in run.events if event.get("event") != "sample"]
    rows = [[f"{event.get('step', 0):,}", escape(message(event)).replace("\n", " ")] for event in events]
    body = table(["step", "event"], rows).replace('class="scroll"', 'class="scroll words"')
    count = f"{len(events)}"
    if marked := sum(event.get("event") in SYMBOLS for event in events):
        count += f", {marked} of them marked in the curves"
    return f"<details><summary>Events ({count})</summary>{body}</details>"


def environment(run):
    values = {key: value for key, value in run.env.items() if key not in ("packages", "dirty_diff", "untracked")}
    values |= {f"resolved {key}": value for key, value in run.resolved.items()}
    packages = run.env.get("packages") or {}
    values["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    items = "".join(f'<dt>{escape(key)}</dt><dd class="key">{cell(value)}</dd>' for key, value in values.items())
    diff = run.env.get("dirty_diff") or ""
    if diff:
        diff = f"<p>Changes on top of the commit:</p><pre class=diff>{escape(diff)}</pre>"
    return (f"<details><summary>Environment</summary><dl>{items}</dl>{diff}</details>"
            f"<details><summary>All settings</summary>{keys_list(run.config)}</details>")


def inside(runs, charts):
    """The part about one run at a time, with a menu of the runs."""
    title = "Inside the run"
    menu = ""
    if len(runs) > 1:
        title = "Inside one run"
        options = "".join(f"<option>{escape(run.name)}</option>" for run in runs)
        menu = f'<select aria-label="run">{options}</select>'
    parts = []
    for i, run in enumerate(runs):
        grid = "".join(chart_html(chart) for chart in charts if chart.get("of") == i)
        parts.append(f'<div data-of="{escape(run.name)}"><div class="grid">{grid}</div>{samples(run)}'
                     f'<h3 class="part">Record</h3>{events_table(run)}{environment(run)}</div>')
    subtitle = ""
    if any("depth" in line for chart in charts for line in chart["traces"]):
        subtitle = '<p class="sub">Layers grow lighter with their depth.</p>'
    return f'<section><div class="head"><h2>{title}</h2>{menu}</div>{subtitle}{"".join(parts)}</section>'


def comparison(name, findings):
    """The result of the comparison with the baseline `name`: {run's name: its findings}."""
    body = ""
    for run, of_run in findings.items():
        items = ""
        for finding in of_run:
            word = {True: "worse", False: "fine", None: "skipped"}[finding.worse]
            items += f'<li class="{word}"><b>{word}</b>{escape(finding.text)}</li>'
        items = f'<ul class="findings">{items}</ul>'
        worse = ", ".join(finding.field for finding in of_run if finding.worse)
        if len(findings) == 1:
            body += items
        elif worse:
            body += f"<details open><summary>{escape(run)}: worse in {worse}</summary>{items}</details>"
        else:
            body += f"<details><summary>{escape(run)}: in band</summary>{items}</details>"
    note = "The chart of the loss has the bands in grey. reporting/alarm.py has the rule."
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
    text = "Training loss smoothed, as logged (faint), validation loss (dots). Drag to zoom, double-click to return."
    marked = set()
    for chart in charts:
        for line in chart["traces"]:
            marked |= set(line.get("kinds", ()))
    if marked:
        text += f" {', '.join(f'{SYMBOLS[kind]} {kind}' for kind in SYMBOLS if kind in marked)}."
    shared = [chart for chart in charts if "of" not in chart]
    learning = "".join(chart_html(chart) for chart in shared if chart["id"] not in MACHINE)
    working = "".join(chart_html(chart) for chart in shared if chart["id"] in MACHINE)
    sections = section("Curves", f'<p class="hint" id="without"></p><div class="grid">{learning}</div>', text)
    if working:
        sections += section("Machine", f'<div class="grid">{working}</div>')
    return sections


# -----------------------------------------------------------------------------
# The page


def render(runs, baseline="", findings=None, bands=(), watch=0.0, made=""):
    """The page as text.

    `findings`: {run's name: alarm's findings} against the baseline of that name, whose `bands` are (steps, low, high).
    `watch`: seconds after which the page looks for a newer version of itself. `made`: when it was made.
    """
    from plotly.offline import get_plotlyjs

    charts = [loss_chart(runs, bands), *shared_charts(runs)]
    for i, run in enumerate(runs):
        charts += inner_charts(run, i)
    charts = [chart for chart in charts if any(line["step"] for line in chart["traces"])]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = "".join([
        header(runs, title, made, watch), settings_section(runs), figures_section(runs),
        comparison(baseline, findings) if findings else "", "</header>",
        controls(runs, charts), "<main>", curves(charts), inside(runs, charts),
        "<footer>Made by report.py from the run folders. Nothing here is loaded from elsewhere.</footer></main>",
    ])
    axes = []
    for run in runs:
        axes.append({axis: thin_axis(run, axis) for axis in AXES if axis in run.records[-1]})
    data = {"runs": [{"name": run.name, "axes": by} for run, by in zip(runs, axes, strict=True)], "charts": charts,
            "axes": {axis: True for by in axes for axis in by}, "watch": watch}
    parts = {"title": escape(title), "body": body, "plotly": get_plotlyjs(),
             "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")}
    template = (ROOT / "reporting" / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def header(runs, title, made, watch):
    """The top of the page, whose header element is still open; while watching, how far each run is."""
    states = ""
    for run in runs:
        if watch and not run.ended:
            states += (f'<span class="state">{escape(run.name)}: step {run.records[-1]["step"]:,} of '
                       f'{run.config.get("max_iters", 0):,}</span>')
    datasets = ", ".join(dict.fromkeys(Path(str(run.config.get("dataset", ""))).name for run in runs))
    return (f'<header><div class="brand">minichat · training report</div><h1>{escape(title)}</h1>'
            f'<p class="sub">{escape(datasets)} · {escape(made)}{states}</p>')


def thin_axis(run, axis, most=2000):
    """A run's steps, tokens, FLOPs or time at no more than `most` of its records, including the last."""
    every = -(-len(run.records) // most)
    records = run.records[::-1][::every][::-1]
    if axis == "step":
        return [record["step"] for record in records]
    return rounded(record.get(axis) or 0.0 for record in records)
