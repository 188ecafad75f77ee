"""
Is a run as good and as fast as it should be? Reference curves with bands, and the comparison with them or another run.

The rule. A reference is n >= 5 runs that differ in the seed. At each logged step, one more run of the same kind lies
within mean ± t(n-1, 0.995) * s * sqrt(1 + 1/n) with probability 0.99: the prediction interval for a single future
observation (Hahn and Meeker 1991, Statistical Intervals, section 4.7), of the training loss smoothed over steps and of
the validation loss. Against a single run, which does not tell how seeds differ, the band is a share of its loss instead
(--loss_tolerance), and for the training loss the noise of its batches on top, by the differences of its records.

Many looks. A curve is looked at many times, so that some excursion is to be expected of a good run. The alarm is raised
when the last validation loss is above its band, or the training loss for a tenth of its looks, and no less than three,
one behind the other; what is shorter is mentioned. Below the band is never an alarm.
"""

import json
import math
import statistics
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from configurator import read_keys
from model import GPTConfig
from reporting.history import median, read_object, read_run, series, smooth, smoothing
from reporting.tables import t_critical

ROOT = Path(__file__).resolve().parents[1]
FORMAT = "minichat reference 1"
LEAST = 5            # seeds of a reference
INSIDE = 0.99        # of the runs are expected within the band, at one look
SUSTAINED = 0.1      # share of a curve's looks that are an alarm
TOO_NOISY = 0.3      # spread of speed or memory, as the reach of a band, above which it is not compared
ROUNDING = 1e-3      # share of the loss within which any two machines may differ, where all seeds agree

# What else than the model's shape and the dataset decides what is learned; all other keys are where and how it runs
MATTERS = (
    "init_from", "batch_size", "gradient_accumulation_steps", "context_start", "context_iters", "optimizer",
    "learning_rate", "muon_learning_rate", "muon_momentum", "weight_decay", "beta1", "beta2", "grad_clip", "decay_lr",
    "lr_schedule", "warmup_iters", "lr_decay_iters", "min_lr", "wsd_decay_frac", "skip_batches",
)
MACHINE = ("system", "cpu", "device", "threads", "cuda")  # of env.json: speed compares where these are equal,
RESOLVED = ("device", "dtype", "ranks")                   # and these of the start


class Finding(NamedTuple):
    what: str
    worse: bool | None  # None: it could not be compared
    text: str


# -----------------------------------------------------------------------------
# Statistics


def reach(n):
    """How many standard deviations of n runs the band goes to either side of their mean."""
    return t_critical(1 - INSIDE, n - 1) * math.sqrt(1 + 1 / n)


def half_widths(curve, n, tolerance):
    """Of the band at each step; of a single run `tolerance` as a share of the loss, and the noise of both's batches."""
    if n == 1:
        z = statistics.NormalDist().inv_cdf((1 + INSIDE) / 2)
        return [math.hypot(tolerance * mean, z * math.sqrt(2) * std)
                for mean, std in zip(curve["mean"], curve["std"], strict=True)]
    wide = reach(n)
    return [max(wide * std, ROUNDING * mean) for mean, std in zip(curve["mean"], curve["std"], strict=True)]


def batch_noise(steps, losses, steps_back):
    """Standard deviation of the smoothed loss that is due to its batches alone.

    That of single records is estimated by their successive differences, which a slow fall hardly moves (von Neumann
    et al. 1941), by their median, which a fast one at first does not; an exponential average that keeps a share k then
    has sqrt((1 - k) / (1 + k)) of it.
    """
    if len(losses) < 3:
        return 0.0
    apart = statistics.median(abs(b - a) for a, b in zip(losses, losses[1:], strict=False))
    keep = math.exp(-(steps[-1] - steps[0]) / (len(steps) - 1) / steps_back)
    return apart / statistics.NormalDist().inv_cdf(0.75) / math.sqrt(2) * math.sqrt((1 - keep) / (1 + keep))


# -----------------------------------------------------------------------------
# The reference


def effective(config, resolved):
    """The settings that decide what is learned, as they come out: {key: value}. A key that is newer than the run has
    its default, which is what there was before."""
    config = {**{name: key.default for name, key in read_keys(ROOT / "train.py").items()}, **config}
    shape = {f.name: config[f.name] for f in fields(GPTConfig) if f.name != "attn" and f.name in config}
    got = {**shape, **{key: config[key] for key in MATTERS}}
    got |= {key: resolved[key] for key in ("vocab_size", "gradient_accumulation_steps") if key in resolved}
    got["lr_decay_iters"] = config["lr_decay_iters"] or config["max_iters"]
    got["context_iters"] = (config["context_iters"] or config["max_iters"] // 2) if config["context_start"] else 0
    got["n_kv_head"] = config["n_kv_head"] or config["n_head"]
    if config["init_from"] in ("scratch", "resume", "auto"):  # the last two begin from scratch, or go on
        got["init_from"] = "scratch"
    return got


def machine(run):
    """What speed depends on besides the settings."""
    return {**{key: run.env.get(key) for key in MACHINE}, **{f"run on {k}": run.resolved.get(k) for k in RESOLVED}}


def check_same(theirs, run, whose):
    """Raises ValueError where a run's data or settings are not those of `theirs`, a reference."""
    if theirs["dataset_sha256"] != run.env.get("dataset_sha256"):
        raise ValueError(f"{run.name} was trained on another dataset ({str(run.env.get('dataset_sha256'))[:12]}) than "
                         f"{whose} ({str(theirs['dataset_sha256'])[:12]}): their losses do not compare")
    then, now = effective(theirs["config"], theirs["resolved"]), effective(run.config, run.resolved)
    other = [f"{key}={now.get(key)} (there {then.get(key)})" for key in then | now if now.get(key) != then.get(key)]
    if other:
        raise ValueError(f"{run.name} is not the run that {whose} is: {', '.join(other)}")


def spread(curves, digits=6):
    """[(steps, values) of each run] -> {"step", "mean", "std", "min", "max"} over the steps that all of them have."""
    values = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = [step for step in curves[0][0] if all(step in by_step for by_step in values)]
    rows = [[by_step[step] for by_step in values] for step in steps]
    return {"step": steps,
            "mean": [round(statistics.mean(row), digits) for row in rows],
            "std": [round(statistics.stdev(row), digits) if len(row) > 1 else 0.0 for row in rows],
            "min": [round(min(row), digits) for row in rows], "max": [round(max(row), digits) for row in rows]}


def summarise(runs, name):
    """What a new run is compared with: the curves of `runs`, of one kind. Raises ValueError where they are not."""
    first = runs[0]
    seedless = {key: value for key, value in first.config.items() if key not in ("seed", "out_dir")}
    made = {"format": FORMAT, "name": name, "n": len(runs), "seeds": [run.config.get("seed") for run in runs],
            "config": seedless, "resolved": first.resolved,
            "dataset_sha256": first.env.get("dataset_sha256"),
            "commits": sorted({run.env.get("commit") or "unknown" for run in runs}),
            "dirty": any(run.env.get("dirty_diff") for run in runs)}
    for run in runs[1:]:
        check_same(made, run, first.name)
    where = [machine(run) for run in runs]
    made["machine"] = {key: value if all(other[key] == value for other in where) else "several"
                       for key, value in where[0].items()}
    steps_back = smoothing(first)
    curves = {field: [series(run, field) for run in runs] for field in ("loss", "val_loss", "tok_per_s")}
    noise = batch_noise(*curves["loss"][0], steps_back)
    curves["loss"] = [(steps, smooth(steps, values, steps_back)) for steps, values in curves["loss"]]
    made |= {"smooth_steps": steps_back, "curves": {field: spread(found) for field, found in curves.items()}}
    if len(runs) == 1:
        made["curves"]["loss"]["std"] = [noise for _ in made["curves"]["loss"]["std"]]
    tokens = dict(zip(*series(first, "tokens"), strict=True))
    for curve in made["curves"].values():
        curve["tokens"] = [tokens.get(step) for step in curve["step"]]
    if not made["curves"]["loss"]["step"]:
        raise ValueError(f"{', '.join(run.name for run in runs)} have no step in common at which all logged a loss")
    made["val_sha256"] = sorted({record["val_sha256"] for run in runs for record in run.records
                                 if record.get("val_sha256")})
    made["tok_per_s"] = [median(series(run, "tok_per_s")[1]) for run in runs]
    made["mem_gb"] = [max(series(run, "mem_gb")[1], default=None) for run in runs]
    return made


def write_reference(runs, path):
    """The reference curves of `runs` into a file. Raises ValueError where they make none."""
    if len(runs) < LEAST:
        raise ValueError(f"a band needs at least {LEAST} runs that differ in the seed, not {len(runs)}")
    seeds = [run.config.get("seed") for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a band is over seeds that differ, and these runs have {', '.join(map(str, seeds))}")
    unfinished = [run.name for run in runs if run.ended != "end"]
    if unfinished:
        raise ValueError(f"a reference is made of finished runs, and {', '.join(unfinished)} did not end")
    made = summarise(runs, Path(path).stem)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(made) + "\n", encoding="utf-8")
    return made


def read_baseline(path):
    """A reference from its file, or the like of a single run from its folder. Raises ValueError for anything else."""
    path = Path(path)
    if path.is_dir():
        run = read_run(path)
        return summarise([run], run.name)
    if not path.is_file():
        raise ValueError(f"no baseline {path}: it takes a run folder, or a file of reference curves (docs/reference/)")
    found = read_object(path)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} holds no reference curves ({FORMAT})")
    return found


def bands(base, tolerance):
    """[(steps, low, high)] of the training loss and the validation loss, where there is more than a point."""
    found = []
    for field in ("loss", "val_loss"):
        curve = base["curves"][field]
        half = half_widths(curve, base["n"], tolerance)
        low, high = ([m + sign * h for m, h in zip(curve["mean"], half, strict=True)] for sign in (-1, 1))
        found += [(curve["step"], low, high)] * (len(half) > 1)
    return found


# -----------------------------------------------------------------------------
# The comparison


def excursions(outside):
    """[(first, last)] of each stretch of True."""
    found = []
    for i, out in enumerate(outside):
        if out and i and outside[i - 1]:
            found[-1] = (found[-1][0], i)
        elif out:
            found.append((i, i))
    return found


def compare_curve(curve, run_curve, field, what, n, tolerance, needed):
    """How a run's curve lies to the band. `needed`: looks one behind the other that count; 0: the last one does."""
    band = dict(zip(curve["step"], zip(curve["mean"], half_widths(curve, n, tolerance), strict=True), strict=True))
    looks = [(step, value, *band[step]) for step, value in zip(*run_curve, strict=True) if step in band]
    over = [(value - mean) / half for _, value, mean, half in looks]  # above 1 or below -1: outside

    def figures(i):
        step, value, mean, half = looks[i]
        return f"{value:.4f} against {mean:.4f} ± {half:.4f} at step {step:,} ({value / mean - 1:+.1%})"

    def counts(first, last):
        return last - first + 1 >= needed if needed else last == len(looks) - 1

    brief = []
    for side, word in ((1, "above the band"), (-1, "below the band, which is better,")):
        found = excursions([side * z > 1 for z in over])
        spans = {pair: f"{looks[pair[0]][0]:,}" + f" to {looks[pair[1]][0]:,}" * (pair[1] > pair[0]) for pair in found}
        long = [pair for pair in found if counts(*pair)]
        if long:
            worst = max((i for a, b in long for i in range(a, b + 1)), key=lambda i: side * over[i])
            return Finding(field, side > 0, f"{what} is {word} at step {', '.join(spans[pair] for pair in long)}: "
                                            f"{figures(worst)}")
        brief += spans.values()
    but = f", but for step {', '.join(brief)}, too short to count" if brief else ""
    return Finding(field, False, f"{what} is in band{but}: {figures(-1)}")


def compare_quality(run, base, tolerance):
    """Findings of training and validation loss. Raises ValueError where too few steps can be compared."""
    broken = [r["step"] for r in run.records if "loss" in r and r["loss"] is None]
    if broken:
        return [Finding("loss", True, f"training loss is not finite at step {broken[0]:,}")]
    steps, losses = series(run, "loss")
    known = set(base["curves"]["loss"]["step"])
    points = [(step, loss) for step, loss in zip(steps, losses, strict=True) if step in known]
    wanted = [step for step in known if step <= run.records[-1]["step"]]
    if not points or len(points) < len(wanted) / 2:
        raise ValueError(f"{run.name} has a loss at {len(points)} of the {len(wanted)} steps up to its last that "
                         f"{base['name']} has: train with the same log_interval "
                         f"({base['config'].get('log_interval')})")
    steps, losses = zip(*points, strict=True)
    needed = max(3, math.ceil(SUSTAINED * len(known)))
    smoothed = steps, smooth(steps, losses, base["smooth_steps"])
    found = [compare_curve(base["curves"]["loss"], smoothed, "loss", "training loss", base["n"], tolerance, needed)]
    read = {record["val_sha256"] for record in run.records if record.get("val_sha256")}
    vals = series(run, "val_loss")
    if not set(vals[0]) & set(base["curves"]["val_loss"]["step"]):
        found.append(Finding("val_loss", None, "validation loss is left out: no evaluation at the same step"))
    elif sorted(read) != base["val_sha256"]:
        found.append(Finding("val_loss", None, "validation loss is left out: evaluated on other tokens (eval_iters)"))
    else:
        curve = base["curves"]["val_loss"]
        found.append(compare_curve(curve, vals, "val_loss", "validation loss", base["n"], tolerance, 0))
    return found


def beyond(field, what, form, value, then, tolerance, sign):
    """A finding of speed (sign -1: less is worse) or memory (1). Of several runs, their spread counts where it is wider
    than the tolerance; and where it is wider than anything worth knowing, nothing is said."""
    mean = statistics.mean(then)
    noise = reach(len(then)) * statistics.stdev(then) / mean if len(then) > 1 else 0.0
    if noise > TOO_NOISY:
        apart = max(then) / min(then) - 1
        return Finding(field, None, f"{what} left out: the baseline's own runs differ by {apart:.0%}")
    allowed, change = max(tolerance, noise), value / mean - 1
    text = f"{what} {value:{form}} against {mean:{form}} ({change:+.1%}, {sign * allowed:+.1%} allowed)"
    worse = sign * change > allowed
    return Finding(field, worse, text + (": worse" if worse else ": in band"))


def compare_speed(run, base, tolerance, memory_tolerance):
    """Findings of tokens/s (median over the steps that both have) and of peak memory, on equal machines."""
    here = machine(run)
    other = [f"{key} is {here[key]}, there {then}" for key, then in base["machine"].items() if here.get(key) != then]
    if other:
        return [Finding("speed", None, f"speed and memory are left out: {'; '.join(other)}")]
    found, mean = [], dict(zip(base["curves"]["tok_per_s"]["step"], base["curves"]["tok_per_s"]["mean"], strict=True))
    ratios = [speed / mean[step] for step, speed in zip(*series(run, "tok_per_s"), strict=True) if step in mean]
    if ratios and None not in base["tok_per_s"]:
        typical = statistics.mean(base["tok_per_s"])
        found.append(beyond("tok_per_s", "tokens/s", ",.0f", statistics.median(ratios) * typical, base["tok_per_s"],
                            tolerance, -1))
    peak = max(series(run, "mem_gb")[1], default=None)
    if peak is not None and None not in base["mem_gb"]:
        found.append(beyond("mem_gb", "peak memory in GB", ".3f", peak, base["mem_gb"], memory_tolerance, 1))
    return found


def compare(run, base, loss_tolerance, speed_tolerance, memory_tolerance):
    """Findings of a run against a baseline. Raises ValueError where the two are not the same experiment."""
    check_same(base, run, base["name"])
    return compare_quality(run, base, loss_tolerance) + compare_speed(run, base, speed_tolerance, memory_tolerance)
