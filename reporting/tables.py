"""
From the runs of an ablation to rows, and from the rows of its results.jsonl to statistics, tables and learning curves.

What counts as a difference. Each variant's mean over its seeds is compared with that of the variant it was run against,
by Welch's t-test (Welch 1947, Biometrika 34): variances are not taken to be equal, as one change may well make training
noisier than another. A column of m comparisons is one family, in which the chance that any of them is bold by luck is
at most 5%, by Holm's steps (Holm 1979, Scand. J. Statist. 6): the least p is held against 0.05 / m, the next against
0.05 / (m - 1), and so on up to the first that fails. The noise floor of a row is the difference that its step asks
for; only what is above it is bold. One seed alone has no noise floor, and is never bold.
Runs of one seed share the order of the data, but differences are not paired by seed: with three seeds a pair test has
two degrees of freedom in place of up to four, and what is shared makes Welch's test stricter, not laxer.

Three losses. At equal tokens: the final one, of the whole validation split in fp32. At equal compute and equal time:
read off the curves of the validation losses during training (some fixed windows, in the precision of the run), between
two of them along the logarithm, at the largest budget that every run of the table reached. A run that gets there before
its end has not lowered its learning rate all the way, so these two are hard on what costs more.
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reporting import isoflop

LEVEL = 0.05  # chance that anything in a column is bold by luck
MARKS = ("start", "resume", "stop", "end")  # events of a run as a whole
AXES = {"tokens": "tokens", "flops": "FLOPs", "wall_s": "seconds of training"}


# -----------------------------------------------------------------------------
# Student's t, Welch, Holm


def t_p(t, dof):
    """The two-sided p-value of Student's t."""
    from scipy.stats import t as student

    return float(2 * student.sf(abs(t), dof))


def t_critical(p, dof):
    """The t whose two-sided p-value is `p`."""
    from scipy.stats import t as student

    return float(student.isf(p / 2, dof))


class Comparison(NamedTuple):
    """Two means, each over at least two seeds. `floor` and `real` are those of a family; see compare."""

    difference: float  # of the means, b's less a's
    error: float       # its standard error
    dof: float         # degrees of freedom, by Welch and Satterthwaite
    p: float           # chance of as large a difference where there is none
    floor: float = math.inf  # the noise floor
    real: bool = False       # whether the difference is above it


def welch(a, b):
    """`b` against `a`, two lists of at least two numbers. -> Comparison, without floor

    Where neither varies at all there is nothing to measure a difference by: p is 1.
    """
    difference = statistics.fmean(b) - statistics.fmean(a)
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if va + vb == 0:
        return Comparison(difference, 0.0, len(a) + len(b) - 2, 1.0)
    dof = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    error = math.sqrt(va + vb)
    return Comparison(difference, error, dof, t_p(difference / error, dof))


def compare(values, reference, level=LEVEL):
    """Each variant against the reference, all together one family. `values`: variant -> losses of its seeds.

    -> variant -> Comparison; a variant of fewer than two values, or any where the reference has fewer, is left out.
    """
    enough = [name for name, losses in values.items() if name != reference and len(losses) > 1]
    if len(values.get(reference, ())) < 2:
        return {}
    found = {name: welch(values[reference], values[name]) for name in enough}
    done, holds, allowed = {}, True, level
    for i, (name, one) in enumerate(sorted(found.items(), key=lambda item: item[1].p)):
        if holds:  # Holm: after the first that fails none is real, and all are held against what it was
            allowed = level / (len(found) - i)
            holds = one.p <= allowed
        floor = t_critical(allowed, one.dof) * one.error if one.error else math.inf
        done[name] = one._replace(floor=floor, real=holds)
    return {name: done[name] for name in found}


# -----------------------------------------------------------------------------
# From a run's folder to its row


def lines_of(path):
    """The records of a .jsonl file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def divergence(folder):
    """Why a run was given up, as train.py says it (a loss that is not finite, or a guard's "stop"); None where it was
    not: a signal gives nothing up."""
    marks = [event for event in lines_of(folder / "events.jsonl") if event["event"] in MARKS]
    reason = marks[-1].get("reason", "SIG") if marks and marks[-1]["event"] == "stop" else "SIG"
    return None if reason.startswith("SIG") else reason


def trend(values):
    """How a series moves: the median of its last quarter over that of its second one, the first being warm-up."""
    quarter = len(values) // 4
    early = statistics.median(values[quarter : 2 * quarter]) if quarter else 0
    return statistics.median(values[-quarter:]) / early if early else None


def ends_of(records, key, over_layers):
    """[first, last] of what is measured now and then for each layer, over the layers; None where it never is."""
    found = [record[key] for record in records if record.get(key)]
    found = [[value for value in layers if value is not None] for layers in found]
    return [over_layers(layers) for layers in (found[0], found[-1])] if found and all(found) else None


def figures(folder):
    """What a run folder tells of a run, the losses of train.py's own evaluations included."""
    records, env = lines_of(folder / "metrics.jsonl"), json.loads((folder / "env.json").read_text(encoding="utf-8"))
    events = lines_of(folder / "events.jsonl")
    resolved = [event["resolved"] for event in events if "resolved" in event][-1]
    curve = [record for record in records if record.get("val_loss") is not None]
    best = min(curve, key=lambda record: record["val_loss"], default={})

    def column(key, of=records):
        return [record[key] for record in of if record.get(key) is not None]

    losses, norms, speeds, memory = map(column, ("loss", "grad_norm", "tok_per_s", "mem_gb"))
    tail = losses[-max(1, len(losses) // 10) :]
    # a run that was killed tells again what it had told after its last checkpoint
    told = {(event["event"], event.get("step"), event.get("what"), event.get("data_step")) for event in events}
    count = {kind: sum(event[0] == kind for event in told) for kind in ("spike", "nan", "rewind")}
    return {
        "commit": env["commit"], "dirty": bool(env["dirty_diff"] or env["untracked"]),
        "environment_sha256": env["environment_sha256"], "cpu": env["cpu"], "device": env["device"],
        "threads": env["threads"], "torch": env["packages"]["torch"], "dtype": resolved["dtype"],
        "attn": resolved["attn"],
        "tokens": records[-1]["tokens"] if records else 0, "wall_s": records[-1]["wall_s"] if records else 0.0,
        "val_loss": None, "best": best.get("val_loss"), "best_tokens": best.get("tokens"),
        "curve": {key: column(key, curve) for key in ("tokens", "val_loss", "wall_s")},
        "curve_val_tokens": curve[-1]["val_tokens"] if curve else None,
        "train_loss": statistics.fmean(tail) if tail else None,
        "tok_per_s": statistics.median(speeds) if speeds else None, "mem_gb": max(memory, default=None),
        "grad_norm": statistics.median(norms) if norms else None, "grad_norm_max": max(norms, default=None),
        "grad_norm_trend": trend(norms),
        "attn_entropy": ends_of(records, "attn_entropy", statistics.fmean),
        "attn_logit_max": ends_of(records, "attn_logit_max", max),
        "act_rms": ends_of(records, "act_rms", max),
        "spikes": count["spike"], "nans": count["nan"], "rewinds": count["rewind"],
    }


# -----------------------------------------------------------------------------
# Rows


def read_rows(path):
    """The rows of a results.jsonl. Raises ValueError naming what is wrong with it."""
    rows = []
    for i, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({**row, "variant": row["variant"], "seed": row["seed"], "diverged": row["diverged"]})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{i} is no row of ablate.py's") from None
    if not rows:
        raise ValueError(f"{path} holds no rows yet")
    return rows


def by_variant(rows):
    """variant -> its rows, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    return found


def curve(row, by="tokens"):
    """The validation losses of a run against tokens, FLOPs or seconds. -> (x, loss), two arrays of the same length

    Both are empty for FLOPs where they are not known.
    """
    points = row["curve"]
    loss = np.array(points["val_loss"], dtype=float)
    if by == "flops":
        each = row.get("flops_per_token")
        x = np.array(points["tokens"], dtype=float) * each if each else np.empty(0)
    else:
        x = np.array(points[by], dtype=float)
    return x, loss[: len(x)]


def loss_at(row, by, budget):
    """The loss of a run's curve where it had spent `budget`, or None where that lies outside of it."""
    x, loss = curve(row, by)
    if budget is None or row["diverged"] or not len(x) or not x[0] <= budget <= x[-1] * (1 + 1e-9):
        return None
    return float(np.interp(math.log(budget), np.log(x), loss))


def shared_budget(rows, by):
    """The most that every run which did not diverge has spent; None where a curve is missing."""
    ends = [curve(row, by)[0] for row in rows if not row["diverged"]]
    return float(min(x[-1] for x in ends)) if ends and all(map(len, ends)) else None


def mean_of(rows, key):
    """The mean over seeds of a number, or of each in a list; None where no row has it."""
    found = [row[key] for row in rows if row.get(key) is not None]
    if not found:
        return None
    return [statistics.fmean(x) for x in zip(*found, strict=True)] if isinstance(found[0], list) else \
        statistics.fmean(found)


def pooled_spread(values):
    """The standard deviation from seed to seed, pooled over the variants; None where none has two seeds."""
    several = [losses for losses in values.values() if len(losses) > 1]
    if not several:
        return None
    freedom = sum(len(losses) - 1 for losses in several)
    return math.sqrt(sum(statistics.variance(losses) * (len(losses) - 1) for losses in several) / freedom)


# -----------------------------------------------------------------------------
# Markdown


def table(header, body):
    """A Markdown table, without the columns in which nothing stands."""
    keep = [i for i in range(len(header)) if i == 0 or any(row[i] for row in body)]
    lines = [[row[i] for i in keep] for row in (header, ["---"] + ["--:"] * (len(header) - 1), *body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value, form, unit=""):
    return "" if value is None else f"{value:{form}}{unit}"


def mean_cell(losses, total):
    """1.5012 ± 0.0031 (3); of one seed without a spread; and how many of all did not get there."""
    if not losses:
        return f"none of {total}"
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{spread} ({len(losses)}{f' of {total}' if len(losses) < total else ''})"


def difference_cell(one):
    """-0.0512 ± 0.0022 (0.0105): difference, standard error, noise floor; the first bold where it is above the last."""
    if one is None:
        return ""
    mark = "**" if one.real else ""
    floor = f"{one.floor:.4f}" if math.isfinite(one.floor) else "unknown"
    return f"{mark}{one.difference:+.4f}{mark} ± {one.error:.4f} ({floor})"


def losses_of(groups, by=None, budget=None):
    """variant -> losses of its seeds: the final ones, or those of the curves at a budget. What diverged has none, and
    a variant of which any run diverged is no candidate for bold: its means are those of the survivors."""
    return {name: [loss for row in runs
                   if (loss := loss_at(row, by, budget) if by else row["val_loss"]) is not None and not row["diverged"]]
            for name, runs in groups.items()}


def quality(groups, reference):
    """Losses at equal tokens, compute and time, each with its difference from the reference. -> Markdown"""
    rows = [row for runs in groups.values() for row in runs]
    budgets = {by: shared_budget(rows, by) for by in ("flops", "wall_s")}
    columns = {"equal tokens": losses_of(groups)}
    for by, unit in (("flops", "FLOPs"), ("wall_s", "s")):
        if budgets[by]:
            columns[f"at {budgets[by]:.3g} {unit}"] = losses_of(groups, by, budgets[by])
    header = ["variant"] + [head for name in columns for head in (name, "difference ± SE (noise floor)")]
    compared = {}
    for title, values in columns.items():
        whole = {name: losses for name, losses in values.items() if not any(row["diverged"] for row in groups[name])}
        compared[title] = compare(whole, reference)
    body = []
    for name, runs in groups.items():
        cells = [name]
        for title, values in columns.items():
            cells += [mean_cell(values[name], len(runs)), difference_cell(compared[title].get(name))]
        body.append(cells)
    spread = pooled_spread(columns["equal tokens"])
    noise = f"Seed to seed, the final loss has a standard deviation of {spread:.4f} (pooled).\n\n" if spread else ""
    return noise + table(header, body)


def cost(groups):
    """Parameters, speed and memory. -> Markdown"""
    header = ["variant", "parameters", "FLOPs/token", "tokens", "tokens/s", "training, s", "peak memory, GB",
              "KV cache, bytes/token"]
    keys = [("params", ",.0f"), ("flops_per_token", ",.0f"), ("tokens", ",.0f"), ("tok_per_s", ",.0f"),
            ("wall_s", ".1f"), ("mem_gb", ".2f"), ("kv_bytes_per_token", ",.0f")]
    return table(header, [[name, *(shown(mean_of(runs, key), form) for key, form in keys)]
                          for name, runs in groups.items()])


def health(groups):
    """Gradient norm, attention and accidents. -> Markdown"""
    header = ["variant", "train loss, end", "grad norm, median", "largest", "late / early", "attention entropy, nats",
              "largest attention logit", "spikes", "NaN", "rewinds", "diverged"]
    body = []
    for name, runs in groups.items():
        cells = [name, *(shown(mean_of(runs, key), form) for key, form in
                         (("train_loss", ".4f"), ("grad_norm", ".2f"), ("grad_norm_max", ".2f"),
                          ("grad_norm_trend", ".2f")))]
        for key in ("attn_entropy", "attn_logit_max"):
            ends = mean_of(runs, key)
            cells.append(" → ".join(f"{end:.2f}" for end in ends) if ends else "")
        cells += [str(sum(row.get(key, 0) for row in runs)) for key in ("spikes", "nans", "rewinds")]
        body.append([*cells, f"{sum(row['diverged'] for row in runs)} of {len(runs)}"])
    return table(header, body)


def origins(rows):
    """What each variant's rows come from, by the first digits of the hashes. -> Markdown"""
    keys = {"commit": "commit", "code": "code_sha256", "settings": "config_sha256", "data": "dataset_sha256",
            "validation tokens": "val_sha256", "environment": "environment_sha256"}
    body = []
    for name, runs in by_variant(rows).items():
        cells = [name, ", ".join(str(row["seed"]) for row in runs)]
        for key in keys.values():
            found = {str(row[key])[:10] + "*" * (key == "commit" and bool(row.get("dirty")))
                     for row in runs if row.get(key)}
            cells.append(", ".join(sorted(found)))
        body.append(cells)
    machines = sorted({f"{row.get('device')} ({row.get('cpu')}), threads: {row.get('threads')}, {row.get('dtype')}, "
                       f"torch {row.get('torch')}" for row in rows})
    # settings are to differ, and a commit may touch other files; what names the code that trains must not
    mixed = [name for name, key in keys.items() if name not in ("commit", "settings")
             and len({row.get(key) for row in rows if not row["diverged"]}) > 1]
    warning = f"\n\n**The rows differ in {', '.join(mixed)}: they may not be comparable.**" if mixed else ""
    changed = "; \\* with uncommitted changes" if any(row.get("dirty") for row in rows) else ""
    return table(["variant", "seeds", *keys], body) + f"\n\nOn {'; '.join(machines)}{changed}.{warning}"


def references(rows):
    """The variants that others are run against, in the order of the rows; the first one where none is named."""
    named = {row.get("against") for row in rows}
    return [name for name in by_variant(rows) if name in named] or [rows[0]["variant"]]


def of_reference(rows, name):
    """The rows of a reference and of what was run against it; all where nothing was."""
    found = [row for row in rows if row["variant"] == name or row.get("against") == name]
    return found if len(by_variant(found)) > 1 else rows


def markdown(rows, reference=None):
    """All tables of an experiment, for each reference or for one: its own row and those run against it."""
    parts = []
    for name in [reference] if reference else references(rows):
        groups = by_variant(of_reference(rows, name))
        groups = {name: groups.get(name, []), **groups}  # the reference first
        parts += [f"## Against {name}", quality(groups, name), "### Cost", cost(groups), "### Health", health(groups)]
    rule = (f"Losses are means over seeds ± their standard deviation (number of seeds), in nats per token. Bold: above "
            f"the noise floor of its row, by Welch's t-test with Holm's correction over the column, at {LEVEL:.0%}. At "
            "equal tokens: the whole validation split in fp32, at the end. At equal compute and time: read off the "
            "validation curves, where what costs more has not yet lowered its learning rate as far.")
    if scaling := isoflop.markdown(rows):
        parts = ["## Best size by compute", scaling, *parts]
    return "\n\n".join([rule, *parts, "## Where the rows come from", origins(rows)])


def report_of(path):
    """The tables of a results.jsonl as Markdown. Raises OSError or ValueError."""
    path = Path(path)
    name = path.resolve().parent.name if path.stem == "results" else path.stem
    return f"# Ablation: {name}\n\n{markdown(read_rows(path))}\n"


def put_into(text, path):
    """The Markdown `text` with the tables of the results at `path` between its two lines for them, one level down:

        <!-- python report.py PATH -->
        <!-- end -->

    Raises ValueError where it has no such lines, and what report_of raises.
    """
    begin, end = f"<!-- python report.py {path} -->\n", "<!-- end -->"
    before, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"no lines {begin.strip()} and {end} to put the tables between")
    tables = re.sub(r"^#", "##", report_of(path), flags=re.M)
    return before + begin + "\n" + tables + "\n" + rest[rest.index(end) :]


# -----------------------------------------------------------------------------
# Curves


def learning_curves(ax, rows, by="tokens"):
    """Each variant's mean validation loss with a band of ± one standard deviation over its seeds, on matplotlib axes.

    `by`: tokens, flops or wall_s. Runs are compared where all of a variant's are, between two losses along the
    logarithm; what diverged is left out.
    """
    for name, runs in by_variant(rows).items():
        curves = [curve(row, by) for row in runs if not row["diverged"]]
        curves = [(x, loss) for x, loss in curves if len(x) > 1]
        if not curves:
            continue
        grid = np.geomspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
        losses = np.array([np.interp(np.log(grid), np.log(x), loss) for x, loss in curves])
        mean = losses.mean(0)
        (line,) = ax.plot(grid, mean, label=f"{name} ({len(curves)})")
        if len(curves) > 1:
            spread = losses.std(0, ddof=1)
            ax.fill_between(grid, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set_xlabel(AXES[by])
    ax.set_ylabel("validation loss, nats per token")
    ax.legend()
