"""
From the runs of an ablation to rows, and from the rows of its results.jsonl to tables and learning curves.
reporting/significance.py decides which differences are bold.

Three losses. At equal tokens: the final loss, on the whole validation split in fp32. At equal compute and equal time:
read off the validation curve of the training run (some fixed windows, in the run's precision), interpolated along the
logarithm, at the largest budget that every run of the table reached. A run that reaches this budget before its end has
not lowered its learning rate all the way, so these two columns are hard on whatever costs more.
"""

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np

from files import read_lines
from reporting import isoflop
from reporting.history import read_records
from reporting.significance import LEVEL, compare

MARKS = ("start", "resume", "stop", "end")  # events of a run as a whole
AXES = {"tokens": "tokens", "flops": "FLOPs", "wall_s": "seconds of training"}


# -----------------------------------------------------------------------------
# From a run's folder to its row


def divergence(folder):
    """The reason for which train.py gave up a run: a loss that is not finite, or a guard's "stop". None if it did not.

    A stop by a signal is not a divergence.
    """
    marks = [event for event in read_records(folder / "events.jsonl") if event["event"] in MARKS]
    if not marks or marks[-1]["event"] != "stop":
        return None
    reason = marks[-1].get("reason", "SIG")
    return None if reason.startswith("SIG") else reason


def trend(values):
    """The median of a series' last quarter over the median of its second quarter; the first quarter is warm-up."""
    quarter = len(values) // 4
    early = statistics.median(values[quarter : 2 * quarter]) if quarter else 0
    return statistics.median(values[-quarter:]) / early if early else None


def ends_of(records, key, over_layers):
    """[first, last] value of a field that some records hold for each layer, combined over the layers.

    None where no record has it.
    """
    measured = [record[key] for record in records if record.get(key)]
    measured = [[value for value in layers if value is not None] for layers in measured]
    if not measured or not all(measured):
        return None
    return [over_layers(measured[0]), over_layers(measured[-1])]


def column(records, key):
    return [record[key] for record in records if record.get(key) is not None]


def environment_of(folder):
    """The part of a row that says which code, machine and precision made it."""
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    events = read_records(folder / "events.jsonl")
    resolved = [event["resolved"] for event in events if "resolved" in event][-1]
    return {
        "commit": env["commit"], "dirty": bool(env["dirty_diff"] or env["untracked"]),
        "environment_sha256": env["environment_sha256"], "cpu": env["cpu"], "device": env["device"],
        "threads": env["threads"], "torch": env["packages"]["torch"], "dtype": resolved["dtype"],
        "attn": resolved["attn"],
    }


def count_accidents(events):
    """{kind: how many} of spikes, NaNs and rewinds. A killed run logs the events after its last checkpoint twice."""
    distinct = set()
    for event in events:
        distinct.add((event["event"], event.get("step"), event.get("what"), event.get("data_step")))
    kinds = [kind for kind, *_ in distinct]
    return {kind: kinds.count(kind) for kind in ("spike", "nan", "rewind")}


def figures(folder):
    """All that a row takes from a run folder, including the validation losses during training."""
    records = read_records(folder / "metrics.jsonl")
    evaluated = [record for record in records if record.get("val_loss") is not None]
    best = min(evaluated, key=lambda record: record["val_loss"], default={})
    losses = column(records, "loss")
    norms = column(records, "grad_norm")
    speeds = column(records, "tok_per_s")
    tail = losses[-max(1, len(losses) // 10) :]
    accidents = count_accidents(read_records(folder / "events.jsonl"))
    return {
        **environment_of(folder),
        "tokens": records[-1]["tokens"] if records else 0, "wall_s": records[-1]["wall_s"] if records else 0.0,
        "val_loss": None, "best": best.get("val_loss"), "best_tokens": best.get("tokens"),
        "curve": {key: column(evaluated, key) for key in ("tokens", "val_loss", "wall_s")},
        "curve_val_tokens": evaluated[-1]["val_tokens"] if evaluated else None,
        "train_loss": statistics.fmean(tail) if tail else None,
        "tok_per_s": statistics.median(speeds) if speeds else None,
        "mem_gb": max(column(records, "mem_gb"), default=None),
        "grad_norm": statistics.median(norms) if norms else None, "grad_norm_max": max(norms, default=None),
        "grad_norm_trend": trend(norms),
        "attn_entropy": ends_of(records, "attn_entropy", statistics.fmean),
        "attn_logit_max": ends_of(records, "attn_logit_max", max),
        "act_rms": ends_of(records, "act_rms", max),
        "spikes": accidents["spike"], "nans": accidents["nan"], "rewinds": accidents["rewind"],
    }


# -----------------------------------------------------------------------------
# Rows


def read_rows(path):
    """The rows of a results.jsonl. Raises ValueError naming what is wrong with it."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            rows.append({**row, "variant": row["variant"], "seed": row["seed"], "diverged": row["diverged"]})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number} is no row of ablate.py's") from None
    if not rows:
        raise ValueError(f"{path} holds no rows yet")
    return rows


def by_variant(rows):
    """variant -> its rows, in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return groups


def curve(row, by="tokens"):
    """The validation losses of a run against tokens, FLOPs or seconds. -> (x, loss), two arrays of the same length

    Both are empty for FLOPs where the FLOPs of a token are not known.
    """
    points = row["curve"]
    loss = np.array(points["val_loss"], dtype=float)
    if by != "flops":
        x = np.array(points[by], dtype=float)
    elif row.get("flops_per_token"):
        x = np.array(points["tokens"], dtype=float) * row["flops_per_token"]
    else:
        x = np.empty(0)
    return x, loss[: len(x)]


def loss_at(row, by, budget):
    """The loss of a run's curve where it had spent `budget`; None where the curve does not reach it."""
    x, loss = curve(row, by)
    if budget is None or row["diverged"] or not len(x):
        return None
    if not x[0] <= budget <= x[-1] * (1 + 1e-9):
        return None
    return float(np.interp(math.log(budget), np.log(x), loss))


def shared_budget(rows, by):
    """The most that every run which did not diverge has spent; None where a curve is missing."""
    ends = [curve(row, by)[0] for row in rows if not row["diverged"]]
    return float(min(x[-1] for x in ends)) if ends and all(map(len, ends)) else None


def mean_of(rows, key):
    """The mean over seeds of a number, or of each number of a list; None where no row has it."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return None
    if isinstance(values[0], list):
        return [statistics.fmean(numbers) for numbers in zip(*values, strict=True)]
    return statistics.fmean(values)


def pooled_spread(values):
    """The standard deviation from seed to seed, pooled over the variants; None where none has two seeds."""
    several = [losses for losses in values.values() if len(losses) > 1]
    if not several:
        return None
    freedom = sum(len(losses) - 1 for losses in several)
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
    return math.sqrt(squares / freedom)


# -----------------------------------------------------------------------------
# Markdown


def table(header, body):
    """A Markdown table without its empty columns."""
    columns = [i for i in range(len(header)) if i == 0 or any(row[i] for row in body)]
    rule = ["---"] + ["--:"] * (len(header) - 1)
    lines = []
    for row in (header, rule, *body):
        lines.append("| " + " | ".join(row[i] for i in columns) + " |")
    return "\n".join(lines)


def format_or_blank(value, form):
    return "" if value is None else f"{value:{form}}"


def mean_cell(losses, total):
    """1.5012 ± 0.0031 (3): mean, standard deviation, seeds. One seed has no spread; (2 of 3): the others failed."""
    if not losses:
        return f"none of {total}"
    text = f"{statistics.fmean(losses):.4f}"
    if len(losses) > 1:
        text += f" ± {statistics.stdev(losses):.4f}"
    count = f"{len(losses)} of {total}" if len(losses) < total else f"{len(losses)}"
    return f"{text} ({count})"


def difference_cell(comparison):
    """-0.0512 ± 0.0022 (0.0105): difference, standard error, noise floor. The difference is bold above the floor."""
    if comparison is None:
        return ""
    mark = "**" if comparison.real else ""
    floor = f"{comparison.floor:.4f}" if math.isfinite(comparison.floor) else "unknown"
    return f"{mark}{comparison.difference:+.4f}{mark} ± {comparison.error:.4f} ({floor})"


def losses_of(groups, by=None, budget=None):
    """variant -> losses of its seeds: the final losses, or with `by` the losses on the curves at a budget.

    Runs that diverged have none.
    """
    losses = {name: [] for name in groups}
    for name, runs in groups.items():
        for row in runs:
            loss = loss_at(row, by, budget) if by else row["val_loss"]
            if loss is not None and not row["diverged"]:
                losses[name].append(loss)
    return losses


def quality(groups, reference):
    """Losses at equal tokens, compute and time, each with its difference from the reference. -> Markdown"""
    rows = [row for runs in groups.values() for row in runs]
    columns = {"equal tokens": losses_of(groups)}
    for by, unit in (("flops", "FLOPs"), ("wall_s", "s")):
        if budget := shared_budget(rows, by):
            columns[f"at {budget:.3g} {unit}"] = losses_of(groups, by, budget)
    # a variant that lost a run to divergence is no candidate for bold: its mean is that of the survivors
    intact = [name for name, runs in groups.items() if not any(row["diverged"] for row in runs)]
    header = ["variant"]
    body = {name: [name] for name in groups}
    for title, losses in columns.items():
        header += [title, "difference ± SE (noise floor)"]
        compared = compare({name: losses[name] for name in intact}, reference)
        for name, runs in groups.items():
            body[name] += [mean_cell(losses[name], len(runs)), difference_cell(compared.get(name))]
    markdown = table(header, list(body.values()))
    if spread := pooled_spread(columns["equal tokens"]):
        return f"Seed to seed, the final loss has a standard deviation of {spread:.4f} (pooled).\n\n{markdown}"
    return markdown


def cost(groups):
    """Parameters, speed and memory. -> Markdown"""
    header = ["variant", "parameters", "FLOPs/token", "tokens", "tokens/s", "training, s", "peak memory, GB",
              "KV cache, bytes/token"]
    keys = [("params", ",.0f"), ("flops_per_token", ",.0f"), ("tokens", ",.0f"), ("tok_per_s", ",.0f"),
            ("wall_s", ".1f"), ("mem_gb", ".2f"), ("kv_bytes_per_token", ",.0f")]
    body = []
    for name, runs in groups.items():
        body.append([name, *(format_or_blank(mean_of(runs, key), form) for key, form in keys)])
    return table(header, body)


def health(groups):
    """Gradient norm, attention and accidents. -> Markdown"""
    header = ["variant", "train loss, end", "grad norm, median", "largest", "late / early", "attention entropy, nats",
              "largest attention logit", "spikes", "NaN", "rewinds", "diverged"]
    keys = [("train_loss", ".4f"), ("grad_norm", ".2f"), ("grad_norm_max", ".2f"), ("grad_norm_trend", ".2f")]
    body = []
    for name, runs in groups.items():
        cells = [name, *(format_or_blank(mean_of(runs, key), form) for key, form in keys)]
        for key in ("attn_entropy", "attn_logit_max"):
            ends = mean_of(runs, key)
            cells.append(" → ".join(f"{end:.2f}" for end in ends) if ends else "")
        cells += [str(sum(row.get(key, 0) for row in runs)) for key in ("spikes", "nans", "rewinds")]
        cells.append(f"{sum(row['diverged'] for row in runs)} of {len(runs)}")
        body.append(cells)
    return table(header, body)


def origins(rows):
    """Where each variant's rows come from, by the first digits of the hashes. -> Markdown"""
    keys = {"commit": "commit", "code": "code_sha256", "settings": "config_sha256", "data": "dataset_sha256",
            "validation tokens": "val_sha256", "environment": "environment_sha256"}
    body = []
    for name, runs in by_variant(rows).items():
        cells = [name, ", ".join(str(row["seed"]) for row in runs)]
        for key in keys.values():
            values = set()
            for row in runs:
                dirty = "*" if key == "commit" and row.get("dirty") else ""
                if row.get(key):
                    values.add(str(row[key])[:10] + dirty)
            cells.append(", ".join(sorted(values)))
        body.append(cells)
    machines = set()
    for row in rows:
        machines.add(f"{row.get('device')} ({row.get('cpu')}), threads: {row.get('threads')}, "
                     f"{row.get('dtype')}, torch {row.get('torch')}")
    # settings are meant to differ, and a commit may touch other files; the hash of the training code must not differ
    mixed = []
    for name, key in keys.items():
        values = {row.get(key) for row in rows if not row["diverged"]}
        if name not in ("commit", "settings") and len(values) > 1:
            mixed.append(name)
    text = table(["variant", "seeds", *keys], body) + f"\n\nOn {'; '.join(sorted(machines))}"
    if any(row.get("dirty") for row in rows):
        text += "; \\* with uncommitted changes"
    text += "."
    if mixed:
        text += f"\n\n**The rows differ in {', '.join(mixed)}: they may not be comparable.**"
    return text


def references(rows):
    """The variants that others are run against, in the order of the rows; the first variant where none is named."""
    named = {row.get("against") for row in rows}
    return [name for name in by_variant(rows) if name in named] or [rows[0]["variant"]]


def of_reference(rows, name):
    """The rows of a reference and of the variants run against it; all rows where there are no such variants."""
    related = [row for row in rows if row["variant"] == name or row.get("against") == name]
    return related if len(by_variant(related)) > 1 else rows


def markdown(rows, reference=None):
    """All tables of an experiment: for each reference, or for one, its own row and the variants run against it."""
    rule = (f"Losses are means over seeds ± their standard deviation (number of seeds), in nats per token. Bold: above "
            f"the noise floor of its row, by Welch's t-test with Holm's correction over the column, at {LEVEL:.0%}. At "
            "equal tokens: the whole validation split in fp32, at the end. At equal compute and time: read off the "
            "validation curves, where what costs more has not yet lowered its learning rate as far.")
    parts = [rule]
    if scaling := isoflop.markdown(rows):
        parts += ["## Best size by compute", scaling]
    for name in [reference] if reference else references(rows):
        groups = by_variant(of_reference(rows, name))
        groups = {name: groups.get(name, []), **groups}  # the reference first
        parts += [f"## Against {name}", quality(groups, name), "### Cost", cost(groups), "### Health", health(groups)]
    return "\n\n".join([*parts, "## Where the rows come from", origins(rows)])


def report_of(path):
    """The tables of a results.jsonl as Markdown. Raises OSError or ValueError."""
    path = Path(path)
    name = path.resolve().parent.name if path.stem == "results" else path.stem
    return f"# Ablation: {name}\n\n{markdown(read_rows(path))}\n"


def put_into(text, path):
    """The Markdown `text` with the tables of the results at `path` between these two lines, one heading level down:

        <!-- python report.py PATH -->
        <!-- end -->

    Raises ValueError where it has no such lines, and as report_of does.
    """
    begin = f"<!-- python report.py {path} -->\n"
    end = "<!-- end -->"
    before, marker, rest = text.partition(begin)
    if not marker or end not in rest:
        raise ValueError(f"no lines {begin.strip()} and {end} to put the tables between")
    tables = re.sub(r"^#", "##", report_of(path), flags=re.M)
    return before + begin + "\n" + tables + "\n" + rest[rest.index(end) :]


# -----------------------------------------------------------------------------
# Curves


def learning_curves(ax, rows, by="tokens"):
    """Each variant's mean validation loss with a band of ± one standard deviation over its seeds, on matplotlib axes.

    `by`: tokens, flops or wall_s. A curve covers the range that all runs of its variant share, interpolated along the
    logarithm. Runs that diverged are ignored.
    """
    for name, runs in by_variant(rows).items():
        curves = [curve(row, by) for row in runs if not row["diverged"]]
        curves = [(x, loss) for x, loss in curves if len(x) > 1]
        if not curves:
            continue
        grid = np.geomspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
        losses = np.array([np.interp(np.log(grid), np.log(x), loss) for x, loss in curves])  # (runs, 200)
        mean = losses.mean(0)
        (line,) = ax.plot(grid, mean, label=f"{name} ({len(curves)})")
        if len(curves) > 1:
            spread = losses.std(0, ddof=1)
            ax.fill_between(grid, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set_xlabel(AXES[by])
    ax.set_ylabel("validation loss, nats per token")
    ax.legend()
