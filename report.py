"""
Runs as people look at them: a summary in the terminal, one HTML page, a picture; and whether a run is as it should be.

    python report.py out/a out/b                                    # the summary, always
    python report.py out/a out/b --html=report.html --png=report.png
    python report.py out/a --html=report.html --watch=10            # while it trains
    python report.py out/new --baseline=docs/reference/shakespeare_char_cpu.json   # or a run; exits 1 if it is worse
    python report.py out/seed1 ... out/seed5 --reference=docs/reference/mine.json  # makes such a file
    python report.py out/ablations/architecture/results.jsonl [--png=curves.png]   # an ablation's tables, as Markdown

In Python, `from report import plot_loss, read_runs` gives the same data and curves for a notebook.
"""

import math
import os
import sys
import time
from pathlib import Path

from configurator import configure, fail
from reporting import alarm, isoflop, page, tables
from reporting.history import (
    AXES,
    COLUMNS,
    PARTS,
    differences,
    keys_of,
    read_runs,
    series,
    shown,
    smooth_both_ways,
    smoothing,
    summary,
)

# -----------------------------------------------------------------------------
runs: tuple[str, ...] = ()  # run folders, or one results.jsonl of ablate.py's, as bare words
html = ""                   # file for the page; empty: none
png = ""                    # file for a picture of the curves; empty: none
x = "step"                  # the picture's horizontal axis: step | tokens | flops | wall_s
into = ""                   # a Markdown file to put an ablation's tables into, where it has a line for them
watch = 0.0                 # seconds after which the page is made anew, until the runs have ended; 0: made once

# is it as it should be?
baseline = ""               # a file of reference curves, or a run folder, to compare each run with
loss_tolerance = 0.025      # against a single run: sqrt(2) * 2.58 standard deviations between seeds, which are up to
                            # 0.7 % of the loss of the shipped configurations (docs/results)
speed_tolerance = 0.03      # how much slower than the baseline is no alarm
memory_tolerance = 0.05     # how much more memory than the baseline is no alarm
reference = ""              # file to write these runs' reference curves to: at least 5 that differ in the seed
# -----------------------------------------------------------------------------

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4A4F57")  # Okabe and Ito 2008
STYLES = ("-", "--", ":", "-.")
TITLES = {"grad_norm": "gradient norm", "lr": "learning rate", "tok_per_s": "tokens/s", "mfu": "MFU",
          "mem_gb": "peak memory, GB", "attn_entropy": "attention entropy, nats",
          "attn_logit_max": "largest attention logit", "act_rms": "activation RMS",
          "grad_norms": "gradient norm by group", "update_ratio": "‖update‖ / ‖weight‖"}


# -----------------------------------------------------------------------------
# The terminal


def spark(values, width):
    """A line of blocks, each the mean of so many values; what is above nine tenths of the values is cut off, so that a
    fall at first leaves some height for the rest."""
    size = max(1, math.ceil(len(values) / width))
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), sorted(means)[int(0.9 * (len(means) - 1))]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (mean - low) / (high - low)))] if high > low else "▄" for mean in means)


def columns_of(rows, width):
    """As many columns of text as the width takes, the first of them always; a column is (heading, cells)."""
    lines, used = [""] * (len(rows[0][1]) + 1), 0
    for i, (heading, cells) in enumerate(rows):
        wide = max(map(len, (heading, *cells)))
        if i and used + wide + 2 > width:
            break
        used += wide + 2
        for k, text in enumerate((heading, *cells)):
            lines[k] += text.ljust(wide) if i == 0 else "  " + text.rjust(wide)
    return lines


def tell(found):
    """Print what differs, the figures, and the losses as small curves."""
    width = os.get_terminal_size().columns if sys.stdout.isatty() else 120
    names, rows = [run.name for run in found], [summary(run) for run in found]
    different = differences(found)
    if different:
        print("what differs")
        cells = [(key, ["–" if value is None else str(value) for value in row]) for key, row in different.items()]
        print(*(f"  {line}" for line in columns_of([("", names), *cells], width)), sep="\n")
        print()
    cells = [(COLUMNS[key][0], [shown(key, row[key]) or "–" for row in rows])
             for key in COLUMNS if any(row[key] is not None for row in rows)]
    print(*columns_of([("", names), *cells], width), sep="\n")
    print()
    longest = max(map(len, names))
    for run in found:
        steps, losses = series(run, "loss")
        if losses:
            curve = smooth_both_ways(steps, losses, smoothing(run) / 2)
            line = spark(curve, max(10, width - longest - 24))
            print(f"{run.name:{longest}}  loss {losses[0]:.3f} {line} {curve[-1]:.3f}")


# -----------------------------------------------------------------------------
# Pictures: each draws on an Axes of matplotlib


def style_of(i):
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)], "linewidth": 1.5}


def plot_loss(ax, runs, x="step"):
    """Training loss, smoothed over what was logged, and validation loss (dots) of each run."""
    for i, run in enumerate(runs):
        steps, losses = series(run, "loss")
        if x != "step" and not series(run, "loss", x)[0] or not steps:
            continue
        at = series(run, "loss", x)[0]
        ax.plot(at, losses, **{**style_of(i), "linewidth": 0.8}, alpha=0.25)
        ax.plot(at, smooth_both_ways(steps, losses, smoothing(run) / 2), **style_of(i), label=run.name)
        ax.plot(*series(run, "val_loss", x), "o", color=style_of(i)["color"], markersize=4)
    ax.set(xlabel=AXES[x][0], ylabel="loss, nats per token")
    seen = sorted(loss for run in runs for loss in series(run, "loss")[1] + series(run, "val_loss")[1])
    if len(seen) > 20:  # begin where the fall from the first steps is over
        top = seen[int(0.96 * len(seen))]
        ax.set_ylim(seen[0] - 0.04 * (top - seen[0]), top + 0.04 * (top - seen[0]))


def plot_field(ax, runs, field, x="step", log=False, zero=False):
    """One figure of each run, such as grad_norm; `zero` is where the axis begins."""
    for i, run in enumerate(runs):
        ax.plot(*series(run, field, x), **style_of(i), label=run.name)
    if zero:
        ax.set_ylim(bottom=0)
    ax.set(xlabel=AXES[x][0], title=TITLES.get(field, field), yscale="log" if log else "linear")


def plot_keys(ax, run, field, x="step", log=False):
    """A figure of each layer or group of one run, such as attn_entropy: layers from dark to light."""
    import matplotlib

    layers = run.config.get("n_layer", 1)
    for key in keys_of(run, field):
        depth = page.depth_of(key, layers).get("depth")
        by_depth = matplotlib.colormaps["viridis"](0.9 * (depth or 0))
        colour = COLOURS[1 if key == "embed" else 3] if depth is None else by_depth
        ax.plot(*series(run, field, x, key), color=colour, linewidth=1.3, label=str(key))
    ax.set(xlabel=AXES[x][0], title=f"{TITLES.get(field, field)}\n{run.name}", yscale="log" if log else "linear")


def plot_parts(ax, run, x="step"):
    """Shares of a step's time."""
    records = [r for r in run.records if r.get(x) is not None and any(r.get(part) for part in PARTS)]
    parts = [part for part in PARTS if any(r.get(part) for r in records)]
    totals = [sum(r.get(part) or 0.0 for part in parts) for r in records]
    shares = [[(r.get(part) or 0.0) / total for r, total in zip(records, totals, strict=True)] for part in parts]
    ax.stackplot([r[x] for r in records], shares, labels=[page.PART_NAMES[part] for part in parts], colors=COLOURS)
    ax.grid(False)
    ax.set(xlabel=AXES[x][0], title=f"where a step's time goes\n{run.name}", ylim=(0, 1))


def picture(runs, path, x="step"):
    """The curves of these runs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def has(field):
        return any(series(run, field, x)[0] or keys_of(run, field) for run in runs)

    small = [(field, lambda ax, f=field: plot_field(ax, runs, f, x, log=f == "grad_norm", zero=f != "grad_norm"))
             for field in ("grad_norm", "lr", "tok_per_s", "mem_gb") if has(field)]
    last = runs[-1]
    small += [(field, lambda ax, f=field: plot_keys(ax, last, f, x, log=f in page.BY_GROUP))
              for field in (*page.BY_LAYER, *page.BY_GROUP) if keys_of(last, field)]
    if any(series(last, part)[0] for part in PARTS):
        small.append(("parts", lambda ax: plot_parts(ax, last, x)))
    rows = math.ceil(len(small) / 3)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "axes.grid.axis": "y", "grid.color": "#e5e5e1", "axes.edgecolor": "#9aa0a6", "axes.titlesize": 10,
             "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12, 4.6 + 2.7 * rows), layout="constrained")
        grid = figure.add_gridspec(rows + 1, 3, height_ratios=[1.7] + [1] * rows)
        ax = figure.add_subplot(grid[0, :])
        plot_loss(ax, runs, x)
        ax.legend(frameon=False, ncols=max(1, min(4, len(runs))))
        for i, (field, draw) in enumerate(small):
            ax = figure.add_subplot(grid[1 + i // 3, i % 3])
            draw(ax)
            if field in ("parts", *page.BY_LAYER, *page.BY_GROUP) and len(ax.get_legend_handles_labels()[1]) < 9:
                ax.legend(frameon=True, framealpha=0.8, fontsize=7, ncols=2)
        figure.savefig(path, dpi=144)
        plt.close(figure)


# -----------------------------------------------------------------------------
# The whole


def write(path, text):
    """Into a file, which is there whole at any moment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def compare_all(found, base):
    """{run's name: findings} against the baseline, printed."""
    findings = {}
    for run in found:
        findings[run.name] = alarm.compare(run, base, loss_tolerance, speed_tolerance, memory_tolerance)
        worse = [one for one in findings[run.name] if one.worse]
        print(f"\n{run.name} against {base['name']}, {base['n']} {'seeds' if base['n'] > 1 else 'run'}: "
              + (f"worse in {', '.join(one.what for one in worse)}" if worse else "in band"))
        for one in findings[run.name]:
            print(f"  {'WORSE ' if one.worse else '      '}{one.text}")
    return findings


def make(found, base, findings, again):
    """The files that were asked for."""
    made = time.strftime("made %Y-%m-%d %H:%M")
    if html:
        bands = alarm.bands(base, loss_tolerance) if base else ()
        write(html, page.render(found, base["name"] if base else "", findings, bands, watch * again, made))
    if png:
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        picture(found, png, x)


def ablation(path):
    """Print the tables of ablate.py's results, or put them into a file, and draw the learning curves, or of a study of
    sizes and budgets the isoFLOP curves."""
    need("scipy")
    if into:
        write(into, tables.put_into(Path(into).read_text(encoding="utf-8"), path))
        print(f"written to {into}")
    else:
        print(tables.report_of(path))
    if png:
        from matplotlib.figure import Figure

        rows, by = tables.read_rows(path), {"step": "tokens"}.get(x, x)
        names = tables.references(rows)
        if isoflop.budgets(rows):
            figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=110)
            isoflop.draw(figure.subplots(1, 2), rows)
            return figure.savefig(png)
        figure = Figure(figsize=(10, 6 * len(names)), layout="constrained", dpi=110)
        for name, ax in zip(names, figure.subplots(len(names), squeeze=False).flat, strict=True):
            tables.learning_curves(ax, tables.of_reference(rows, name), by)
        figure.savefig(png)


def need(package):
    try:
        __import__(package)
    except ImportError:
        fail(f"this needs the package {package}: pip install -e '.[report]' -c constraints.txt")


def going(found):
    return any(not run.ended for run in found)


def follow():
    """Make the page anew while any of the runs goes on."""
    print(f"{html} is made anew every {watch:g} seconds; Ctrl-C ends that", flush=True)
    while True:
        time.sleep(watch)
        found = read_runs(runs)
        make(found, None, None, going(found))
        if not going(found):
            print("the runs have ended")
            return


def main():
    if not runs:
        fail("whose report? python report.py out/RUN ... [--html=FILE]")
    if x not in AXES:
        fail(f"x={x!r} is not one of {', '.join(AXES)}")
    if watch and not (html or png):
        fail("watch is a number of seconds, and goes with --html or --png, which it makes anew")
    if watch and (baseline or reference):
        fail("watch does not go with baseline or reference, which take a run as it is")
    if html:
        need("plotly")
    if png:
        need("matplotlib")
    try:
        if into and not runs[0].endswith(".jsonl"):
            fail("into is for the tables of an ablation: python report.py RESULTS.jsonl --into=FILE.md")
        if runs[0].endswith(".jsonl"):
            if len(runs) > 1 or html or watch or baseline or reference:
                fail("the results of an ablation are read by themselves, with no other key than into, png and x")
            ablation(runs[0])
            return 0
        found = read_runs(runs)
        tell(found)
        base = alarm.read_baseline(baseline) if baseline else None
        findings = compare_all(found, base) if base else None
        make(found, base, findings, going(found))
        if reference:
            made = alarm.write_reference(found, reference)
            print(f"{reference}: {made['n']} seeds, {len(made['curves']['loss']['step'])} steps")
        for path in filter(None, (html, png)):
            print(f"written to {path}")
        if watch and going(found):
            follow()
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError) as error:
        fail(error)
    return int(any(one.worse for found in (findings or {}).values() for one in found))


if __name__ == "__main__":
    configure(globals(), paths="runs")
    sys.exit(main())
