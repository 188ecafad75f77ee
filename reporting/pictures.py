"""Pictures of runs and of reference curves: each function draws on an Axes of matplotlib, or a whole PNG."""

import math
import os
from functools import partial
from itertools import accumulate, pairwise

from reporting import charts
from reporting.history import AXES, PARTS, keys_of, series, smooth_both_ways, smoothing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4A4F57")  # Okabe and Ito 2008
STYLES = ("-", "--", ":", "-.")
TITLES = {"grad_norm": "gradient norm", "lr": "learning rate", "tok_per_s": "tokens/s", "mfu": "MFU",
          "mem_gb": "peak memory, GB", "attn_entropy": "attention entropy, nats",
          "attn_logit_max": "largest attention logit", "act_rms": "activation RMS",
          "grad_norms": "gradient norm by group", "update_ratio": "‖update‖ / ‖weight‖"}
QUIET = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e5e1",
         "axes.edgecolor": "#9aa0a6"}


def style_of(i):
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)], "linewidth": 1.5}


# -----------------------------------------------------------------------------
# Runs


def plot_loss(ax, runs, x="step"):
    """Training loss, as logged (faint) and smoothed, and validation loss (dots) of each run."""
    for i, run in enumerate(runs):
        steps, losses = series(run, "loss")
        xs = series(run, "loss", x)[0]
        if not steps or not xs:
            continue
        style = style_of(i)
        ax.plot(xs, losses, **{**style, "linewidth": 0.8}, alpha=0.25)
        ax.plot(xs, smooth_both_ways(steps, losses, smoothing(run) / 2), **style, label=run.name)
        ax.plot(*series(run, "val_loss", x), "o", color=style["color"], markersize=4)
    ax.set(xlabel=AXES[x][0], ylabel="loss, nats per token")
    losses = []
    for run in runs:
        losses += series(run, "loss")[1] + series(run, "val_loss")[1]
    losses.sort()
    if len(losses) > 20:  # begin where the steep fall of the first steps is over
        top = losses[int(0.96 * len(losses))]
        margin = 0.04 * (top - losses[0])
        ax.set_ylim(losses[0] - margin, top + margin)


def plot_field(ax, runs, field, x="step", log=False, zero=False):
    """A number of each run, such as grad_norm. `zero`: the axis begins at zero."""
    for i, run in enumerate(runs):
        ax.plot(*series(run, field, x), **style_of(i), label=run.name)
    if zero:
        ax.set_ylim(bottom=0)
    ax.set(xlabel=AXES[x][0], title=TITLES.get(field, field), yscale="log" if log else "linear")


def plot_keys(ax, run, field, x="step", log=False):
    """A number of each layer or group of one run, such as attn_entropy: layers from dark to light."""
    import matplotlib

    layers = run.config.get("n_layer", 1)
    for key in keys_of(run, field):
        depth = charts.depth_of(key, layers).get("depth")
        if depth is not None:
            colour = matplotlib.colormaps["viridis"](0.9 * depth)
        else:
            colour = COLOURS[1 if key == "embed" else 3]
        ax.plot(*series(run, field, x, key), color=colour, linewidth=1.3, label=str(key))
    ax.set(xlabel=AXES[x][0], title=f"{TITLES.get(field, field)}\n{run.name}", yscale="log" if log else "linear")


def plot_parts(ax, run, x="step"):
    """Shares of a step's time."""
    records = [r for r in run.records if r.get(x) is not None and any(r.get(part) for part in PARTS)]
    parts = [part for part in PARTS if any(r.get(part) for r in records)]
    totals = [sum(r.get(part) or 0.0 for part in parts) for r in records]
    shares = []
    for part in parts:
        shares.append([(r.get(part) or 0.0) / total for r, total in zip(records, totals, strict=True)])
    ax.stackplot([r[x] for r in records], shares, labels=[charts.PART_NAMES[part] for part in parts], colors=COLOURS)
    ax.grid(False)
    ax.set(xlabel=AXES[x][0], title=f"where a step's time goes\n{run.name}", ylim=(0, 1))


def small_panels(runs, x):
    """[draw(ax), ...]: a panel for each field that the runs have; layers and parts of the last run alone."""
    panels = []
    for field in ("grad_norm", "lr", "tok_per_s", "mem_gb"):
        log = field == "grad_norm"
        if any(series(run, field, x)[0] for run in runs):
            panels.append(partial(plot_field, runs=runs, field=field, x=x, log=log, zero=not log))
    last = runs[-1]
    for field in (*charts.BY_LAYER, *charts.BY_GROUP):
        if keys_of(last, field):
            panels.append(partial(plot_keys, run=last, field=field, x=x, log=field in charts.BY_GROUP))
    if any(series(last, part)[0] for part in PARTS):
        panels.append(partial(plot_parts, run=last, x=x))
    return panels


def picture(runs, path, x="step"):
    """The curves of these runs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = small_panels(runs, x)
    rows = math.ceil(len(panels) / 3)
    style = {**QUIET, "font.size": 9, "axes.grid.axis": "y", "axes.titlesize": 10, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12, 4.6 + 2.7 * rows), layout="constrained")
        grid = figure.add_gridspec(rows + 1, 3, height_ratios=[1.7] + [1] * rows)
        ax = figure.add_subplot(grid[0, :])
        plot_loss(ax, runs, x)
        ax.legend(frameon=False, ncols=max(1, min(4, len(runs))))
        for i, draw in enumerate(panels):
            ax = figure.add_subplot(grid[1 + i // 3, i % 3])
            draw(ax)
            labels = ax.get_legend_handles_labels()[1]
            if draw.func is not plot_field and len(labels) < 9:
                ax.legend(frameon=True, framealpha=0.8, fontsize=7, ncols=2)
        figure.savefig(path, dpi=144)
        plt.close(figure)


# -----------------------------------------------------------------------------
# Reference curves


def seconds_at(reference):
    """{step: seconds of training until then}, from the tokens between the steps and the mean tokens/s at each."""
    speed = reference["curves"]["tok_per_s"]
    tokens = [b - a for a, b in pairwise([0, *speed["tokens"]])]
    durations = [count / per_s for count, per_s in zip(tokens, speed["mean"], strict=True)]
    return dict(zip(speed["step"], accumulate(durations), strict=True))


def plot_reference(ax, reference, colour):
    """A reference's training loss over time, with a band from its best seed to its worst, and its validation losses."""
    seconds = seconds_at(reference)
    loss = reference["curves"]["loss"]
    xs = [seconds[step] for step in loss["step"]]
    ax.fill_between(xs, loss["min"], loss["max"], color=colour, alpha=0.2, linewidth=0)
    ax.plot(xs, loss["mean"], color=colour, linewidth=2.5)
    val = reference["curves"]["val_loss"]
    ax.plot([seconds[step] for step in val["step"]], val["mean"], "o", color=colour, markersize=9)


def label_end(ax, reference, others, colour, label):
    """Write the label, the last validation loss and its time beside the end of a curve: below it where one of `others`
    passes on its right."""
    step = reference["curves"]["val_loss"]["step"][-1]
    end = seconds_at(reference)[step]
    loss = reference["curves"]["val_loss"]["mean"][-1]
    crossed = False
    for other in others:
        seconds = seconds_at(other)
        curve = other["curves"]["loss"]
        for other_step, other_loss in zip(curve["step"], curve["mean"], strict=True):
            right = end < seconds[other_step] < 6 * end
            crossed |= right and abs(other_loss - loss) < 0.25
    place = {"xytext": (14, 0), "ha": "left", "va": "center"}
    if crossed:
        place = {"xytext": (8, -28), "ha": "right", "va": "top"}
    ax.annotate(f"{label}\n{loss:.2f} after {end:.0f} s", (end, loss), textcoords="offset points", color=colour,
                fontsize=17, fontweight="bold", linespacing=1.3, **place)


def loss_over_time(references, labels, path):
    """Reference curves in one panel, as a PNG of 1200 x 600: loss over seconds of training."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    with rc_context({**QUIET, "font.size": 16}):
        figure = Figure(figsize=(12, 6), dpi=100, facecolor="white", layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # inches
        ax = figure.add_subplot()
        for i, (reference, label) in enumerate(zip(references, labels, strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            plot_reference(ax, reference, colour)
            label_end(ax, reference, references[:i] + references[i + 1 :], colour, label)
        ax.set(xscale="log", xlabel="seconds of training (log scale)", ylabel="loss, nats per token")
        ax.set_title("lines: training loss, over all seeds; dots: validation loss", fontsize=14, color="#5f6368",
                     loc="right")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
        figure.savefig(path)


def labels_of(names):
    """Names of references as labels: without what all begin with, up to an underscore, and without underscores."""
    common = os.path.commonprefix(list(names)) if len(names) > 1 else ""
    shared = len(common[: common.rfind("_") + 1])
    return [name[shared:].replace("_", " ") for name in names]
