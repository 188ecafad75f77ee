"""
Reports of runs: a summary in the terminal, one HTML page, a picture. Also: is a run as good as its baseline?

    python report.py out/a out/b                                    # the summary, always
    python report.py out/a out/b --html=report.html --png=report.png
    python report.py out/a --html=report.html --watch=10            # while it trains
    python report.py out/new --baseline=docs/reference/shakespeare_char_cpu.json   # or a run; exits 1 if it is worse
    python report.py out/seed1 ... out/seed5 --reference=docs/reference/mine.json  # makes such a file
    python report.py docs/reference/a.json docs/reference/b.json --png=loss.png    # their loss over time
    python report.py out/ablations/architecture/results.jsonl [--png=curves.png]   # an ablation's tables, as Markdown

In Python, `from report import plot_loss, read_runs` gives the same data and curves for a notebook.
"""

import math
import os
import sys
import time
from pathlib import Path

from configurator import Settings, configure, fail
from files import write_whole
from reporting import alarm, isoflop, page, tables
from reporting.history import (
    AXES,
    COLUMNS,
    differences,
    format_figure,
    read_runs,
    series,
    smooth_both_ways,
    smoothing,
    summary,
)
from reporting.pictures import (  # noqa: F401  for notebooks
    labels_of,
    loss_over_time,
    picture,
    plot_field,
    plot_keys,
    plot_loss,
    plot_parts,
)

# -----------------------------------------------------------------------------
runs: tuple[str, ...] = ()  # run folders, files of reference curves, or one results.jsonl of ablate.py, as bare words
html = ""                   # file for the page; empty: none
png = ""                    # file for a picture of the curves; empty: none
x = "step"                  # the picture's horizontal axis: step | tokens | flops | wall_s
labels: tuple[str, ...] = ()  # names of the reference curves in the picture; (): the names of their files
into = ""                   # a Markdown file to put an ablation's tables into, where it has a line for them
watch = 0.0                 # seconds between rewrites of the page, until the runs have ended; 0: write it once

# is it as good and as fast as it should be?
baseline = ""               # a file of reference curves, or a run folder, to compare each run with
loss_tolerance = 0.025      # against a single run: sqrt(2) * 2.58 standard deviations between seeds, which are up to
                            # 0.7 % of the loss of the shipped configurations (docs/results)
speed_tolerance = 0.03      # how much slower than the baseline raises no alarm
memory_tolerance = 0.05     # how much more memory than the baseline raises no alarm
reference = ""              # file to write these runs' reference curves to: at least 5 that differ in the seed
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# The terminal


def spark(values, width):
    """A line of at most `width` blocks, each the mean of a group of values.

    The highest tenth is cut off, or the fall of the first steps would leave no height for the rest.
    """
    size = max(1, math.ceil(len(values) / width))
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    means = [sum(group) / len(group) for group in groups]
    low = min(means)
    high = sorted(means)[int(0.9 * (len(means) - 1))]
    if high <= low:
        return "▄" * len(means)
    heights = [int(8 * (mean - low) / (high - low)) for mean in means]
    return "".join("▁▂▃▄▅▆▇█"[min(7, height)] for height in heights)


def text_columns(columns, width):
    """Lines of a text table with as many columns as `width` holds, at least the first. A column is (heading, cells)."""
    lines = [""] * (len(columns[0][1]) + 1)
    used = 0
    for i, (heading, cells) in enumerate(columns):
        texts = [heading, *cells]
        widest = max(map(len, texts))
        if i and used + widest + 2 > width:
            break
        used += widest + 2
        for k, text in enumerate(texts):
            lines[k] += text.ljust(widest) if i == 0 else "  " + text.rjust(widest)
    return lines


def print_summary(runs):
    """Print the settings that differ, the figures, and the losses as small curves."""
    width = os.get_terminal_size().columns if sys.stdout.isatty() else 120
    names = [run.name for run in runs]
    columns = [("", names)]
    for key, values in differences(runs).items():
        columns.append((key, ["–" if value is None else str(value) for value in values]))
    if len(columns) > 1:
        print("what differs")
        for line in text_columns(columns, width):
            print(f"  {line}")
        print()

    rows = [summary(run) for run in runs]
    columns = [("", names)]
    for key, (heading, _) in COLUMNS.items():
        if any(row[key] is not None for row in rows):
            columns.append((heading, [format_figure(key, row[key]) or "–" for row in rows]))
    print(*text_columns(columns, width), sep="\n")
    print()

    longest = max(map(len, names))
    for run in runs:
        steps, losses = series(run, "loss")
        if losses:
            curve = smooth_both_ways(steps, losses, smoothing(run) / 2)
            line = spark(curve, max(10, width - longest - 24))
            print(f"{run.name:{longest}}  loss {losses[0]:.3f} {line} {curve[-1]:.3f}")


def compare_all(c, runs, base):
    """{run's name: its findings against the baseline}, also printed."""
    findings = {}
    count = f"{base['n']} seeds" if base["n"] > 1 else "1 run"
    for run in runs:
        of_run = alarm.compare(run, base, c.loss_tolerance, c.speed_tolerance, c.memory_tolerance)
        worse = ", ".join(finding.field for finding in of_run if finding.worse)
        print(f"\n{run.name} against {base['name']}, {count}: {f'worse in {worse}' if worse else 'in band'}")
        for finding in of_run:
            mark = "WORSE" if finding.worse else ""
            print(f"  {mark:5} {finding.text}")
        findings[run.name] = of_run
    return findings


# -----------------------------------------------------------------------------
# Files


def write_files(c, runs, base=None, findings=None):
    """Write the page and the picture that c asks for."""
    if c.html:
        made = time.strftime("made %Y-%m-%d %H:%M")
        name = base["name"] if base else ""
        bands = alarm.bands(base, c.loss_tolerance) if base else ()
        watch = c.watch if any_running(runs) else 0.0
        Path(c.html).parent.mkdir(parents=True, exist_ok=True)
        write_whole(c.html, page.render(runs, name, findings, bands, watch, made))
    if c.png:
        Path(c.png).parent.mkdir(parents=True, exist_ok=True)
        picture(runs, c.png, c.x)


def any_running(runs):
    return any(not run.ended for run in runs)


def follow(c):
    """Rewrite the files as long as any of the runs is running."""
    print(f"{c.html or c.png} is rewritten every {c.watch:g} seconds; Ctrl-C ends that", flush=True)
    running = True
    while running:
        time.sleep(c.watch)
        runs = read_runs(c.runs)
        write_files(c, runs)
        running = any_running(runs)
    print("the runs have ended")


def require(package):
    try:
        __import__(package)
    except ImportError:
        fail(f"this needs the package {package}: pip install -e '.[report]' -c constraints.txt")


# -----------------------------------------------------------------------------
# One report for each kind of input


def report_ablation(c):
    """Print the tables of ablate.py's results, or put them into a file.

    With png, draw the learning curves, or the isoFLOP curves of a study of sizes and budgets.
    """
    if len(c.runs) > 1 or c.html or c.watch or c.baseline or c.reference or c.labels:
        fail("give the results of an ablation alone, with no other keys than into, png and x")
    require("scipy")
    path = c.runs[0]
    if c.into:
        write_whole(c.into, tables.put_into(Path(c.into).read_text(encoding="utf-8"), path))
        print(f"written to {c.into}")
    else:
        print(tables.report_of(path))
    if c.png:
        draw_ablation(tables.read_rows(path), c.png, c.x)


def draw_ablation(rows, path, x):
    from matplotlib.figure import Figure

    if isoflop.budgets(rows):
        figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=110)
        isoflop.draw(figure.subplots(1, 2), rows)
    else:
        names = tables.references(rows)
        figure = Figure(figsize=(10, 6 * len(names)), layout="constrained", dpi=110)
        for name, ax in zip(names, figure.subplots(len(names), squeeze=False).flat, strict=True):
            by = "tokens" if x == "step" else x
            tables.learning_curves(ax, tables.of_reference(rows, name), by)
    figure.savefig(path)


def report_references(c):
    """Draw the loss of reference curves over time."""
    if not all(path.endswith(".json") for path in c.runs):
        fail("give either files of reference curves (.json) or run folders, not both")
    if not c.png or c.html or c.watch or c.baseline or c.reference or c.into:
        fail("files of reference curves make a picture: --png=FILE, with no other key than labels")
    if c.labels and len(c.labels) != len(c.runs):
        fail(f"labels has {len(c.labels)} names for {len(c.runs)} files of reference curves")
    references = [alarm.read_baseline(path) for path in c.runs]
    labels = c.labels or labels_of([reference["name"] for reference in references])
    Path(c.png).parent.mkdir(parents=True, exist_ok=True)
    loss_over_time(references, labels, c.png)
    print(f"written to {c.png}")


def report_runs(c):
    """Summary, files and comparison of run folders. -> the exit code: 1 where a run is worse than the baseline"""
    if c.into:
        fail("into is for the tables of an ablation: python report.py RESULTS.jsonl --into=FILE.md")
    if c.labels:
        fail("labels is for files of reference curves; a run has the name of its folder")
    runs = read_runs(c.runs)
    print_summary(runs)
    base = alarm.read_baseline(c.baseline) if c.baseline else None
    findings = compare_all(c, runs, base) if base else {}
    write_files(c, runs, base, findings)
    if c.reference:
        made = alarm.write_reference(runs, c.reference)
        print(f"{c.reference}: {made['n']} seeds, {len(made['curves']['loss']['step'])} steps")
    for path in (c.html, c.png):
        if path:
            print(f"written to {path}")
    if c.watch and any_running(runs):
        follow(c)
    return int(any(finding.worse for of_run in findings.values() for finding in of_run))


def check_settings(c):
    if not c.runs:
        fail("whose report? python report.py out/RUN ... [--html=FILE]")
    if c.x not in AXES:
        fail(f"x={c.x!r} is not one of {', '.join(AXES)}")
    if c.watch and not (c.html or c.png):
        fail("watch is a number of seconds, and needs --html or --png, which it rewrites")
    if c.watch and (c.baseline or c.reference):
        fail("watch does not go with baseline or reference, which read a run once")
    if c.html:
        require("plotly")
    if c.png:
        require("matplotlib")


def main(c):
    """-> the exit code"""
    check_settings(c)
    try:
        if c.runs[0].endswith(".jsonl"):
            report_ablation(c)
        elif any(path.endswith(".json") for path in c.runs):
            report_references(c)
        else:
            return report_runs(c)
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError) as error:
        fail(error)
    return 0


if __name__ == "__main__":
    c = Settings(configure(globals(), paths="runs"))
    sys.exit(main(c))
