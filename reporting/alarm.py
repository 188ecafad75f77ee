"""
Is a run as good and as fast as it should be? Reference curves with bands, and the comparison with them or another run.

The rule. A reference is n >= 5 runs that differ in the seed. At each logged step, one more run of the same kind lies
within mean ± t(n-1, 0.995) * s * sqrt(1 + 1/n) with probability 0.99. This is the prediction interval for a single
future observation (Hahn and Meeker 1991, Statistical Intervals, section 4.7), taken of the training loss smoothed over
steps and of the validation loss. A single run does not tell how seeds differ: against one, the band is a share of its
loss (--loss_tolerance), and for the training loss also the noise of its batches, estimated from successive records.

Many looks. A curve is looked at many times, so even a good run leaves the band now and then. The alarm is raised when
the last validation loss is above its band, or the training loss is above it for a tenth of its looks, and at least
three, one after another. A shorter excursion is only mentioned. Below the band is never an alarm.
"""

import json
import math
import statistics
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from configurator import read_keys
from files import write_whole
from model import GPTConfig
from reporting.history import median_or_none, read_object, read_run, series, smooth, smoothing
from reporting.significance import t_critical

ROOT = Path(__file__).resolve().parents[1]
FORMAT = "minichat reference 1"
LEAST = 5            # seeds of a reference
INSIDE = 0.99        # share of runs expected within the band, at one look
SUSTAINED = 0.1      # share of a curve's looks that raises the alarm
TOO_NOISY = 0.3      # speed or memory whose band reaches further than this is not compared
ROUNDING = 1e-3      # share of the loss by which any two machines may differ, where all seeds agree

# What decides what is learned, besides the model's shape and the dataset. All other keys say where and how it runs.
MATTERS = (
    "init_from", "batch_size", "gradient_accumulation_steps", "context_start", "context_iters", "optimizer",
    "learning_rate", "muon_learning_rate", "muon_momentum", "muon_even_rows", "weight_decay", "beta1", "beta2",
    "grad_clip", "decay_lr", "lr_schedule", "warmup_iters", "lr_decay_iters", "min_lr", "wsd_decay_frac",
    "skip_batches", "doc_mask",
)
# Speed compares where these of env.json and of the start agree
MACHINE = ("system", "cpu", "device", "threads", "cuda")
RESOLVED = ("device", "dtype", "ranks")


class Finding(NamedTuple):
    field: str
    worse: bool | None  # None: it could not be compared
    text: str


# -----------------------------------------------------------------------------
# Statistics


def reach(n):
    """How many standard deviations of n runs the band extends to either side of their mean."""
    return t_critical(1 - INSIDE, n - 1) * math.sqrt(1 + 1 / n)


def half_widths(curve, n, tolerance):
    """Half the width of the band at each step. For a single run: `tolerance` times its loss, and the batches' noise."""
    pairs = zip(curve["mean"], curve["std"], strict=True)
    if n == 1:
        z = statistics.NormalDist().inv_cdf((1 + INSIDE) / 2)
        return [math.hypot(tolerance * mean, z * math.sqrt(2) * std) for mean, std in pairs]
    reach_n = reach(n)
    return [max(reach_n * std, ROUNDING * mean) for mean, std in pairs]


def batch_noise(steps, losses, steps_back):
    """Standard deviation of the smoothed loss that is due to its batches alone.

    The noise of single records is estimated from successive differences, which a slow fall hardly changes (von Neumann
    et al. 1941). Their median ignores the fast fall at the start. An exponential average that keeps a share k has
    sqrt((1 - k) / (1 + k)) of that noise.
    """
    if len(losses) < 3:
        return 0.0
    difference = statistics.median(abs(b - a) for a, b in zip(losses, losses[1:], strict=False))
    spacing = (steps[-1] - steps[0]) / (len(steps) - 1)
    keep = math.exp(-spacing / steps_back)
    normal = statistics.NormalDist().inv_cdf(0.75)  # median of |z|
    return difference / normal / math.sqrt(2) * math.sqrt((1 - keep) / (1 + keep))


# -----------------------------------------------------------------------------
# The reference


def effective(config, resolved):
    """The settings that decide what is learned, with "auto" and 0 replaced by what they stand for: {key: value}.

    A key that is newer than the run gets its default, which is how the older code behaved.
    """
    config = {**{name: key.default for name, key in read_keys(ROOT / "train.py").items()}, **config}
    shape = [field.name for field in fields(GPTConfig) if field.name != "attn"]
    settings = {key: config[key] for key in (*shape, *MATTERS) if key in config}
    for key in ("vocab_size", "gradient_accumulation_steps"):
        if key in resolved:
            settings[key] = resolved[key]
    settings["lr_decay_iters"] = config["lr_decay_iters"] or config["max_iters"]
    settings["context_iters"] = 0
    if config["context_start"]:
        settings["context_iters"] = config["context_iters"] or config["max_iters"] // 2
    settings["n_kv_head"] = config["n_kv_head"] or config["n_head"]
    if config["init_from"] in ("scratch", "resume", "auto"):  # all three begin from scratch
        settings["init_from"] = "scratch"
    else:
        settings["init_from"] = config["init_from"].removeprefix("auto:")
    return settings


def machine(run):
    """What speed depends on besides the settings."""
    described = {key: run.env.get(key) for key in MACHINE}
    for key in RESOLVED:
        described[f"run on {key}"] = run.resolved.get(key)
    return described


def check_same(reference, run, name):
    """Raises ValueError where a run's data or settings differ from those of `reference`, which is called `name`."""
    expected_data = reference["dataset_sha256"]
    data = run.env.get("dataset_sha256")
    if data != expected_data:
        raise ValueError(f"{run.name} was trained on another dataset ({str(data)[:12]}) than {name} "
                         f"({str(expected_data)[:12]}): their losses do not compare")
    expected = effective(reference["config"], reference["resolved"])
    actual = effective(run.config, run.resolved)
    different = []
    for key in expected | actual:
        if actual.get(key) != expected.get(key):
            different.append(f"{key}={actual.get(key)} (there {expected.get(key)})")
    if different:
        raise ValueError(f"{run.name} has other settings than {name}: {', '.join(different)}")


def spread(curves, digits=6):
    """[(steps, values) of each run] -> {"step", "mean", "std", "min", "max"} over the steps that all of them have."""
    by_step = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = [step for step in curves[0][0] if all(step in values for values in by_step)]
    rows = [[values[step] for values in by_step] for step in steps]
    return {
        "step": steps,
        "mean": [round(statistics.mean(row), digits) for row in rows],
        "std": [round(statistics.stdev(row), digits) if len(row) > 1 else 0.0 for row in rows],
        "min": [round(min(row), digits) for row in rows],
        "max": [round(max(row), digits) for row in rows],
    }


def shared_curves(runs, steps_back):
    """{field: spread of the runs} of training loss (smoothed), validation loss and speed, each with its tokens."""
    curves = {field: [series(run, field) for run in runs] for field in ("loss", "val_loss", "tok_per_s")}
    noise = batch_noise(*curves["loss"][0], steps_back)
    curves["loss"] = [(steps, smooth(steps, values, steps_back)) for steps, values in curves["loss"]]
    spreads = {field: spread(pairs) for field, pairs in curves.items()}
    if len(runs) == 1:
        spreads["loss"]["std"] = [noise for _ in spreads["loss"]["std"]]
    tokens = dict(zip(*series(runs[0], "tokens"), strict=True))
    for curve in spreads.values():
        curve["tokens"] = [tokens.get(step) for step in curve["step"]]
    return spreads


def summarise(runs, name):
    """The reference that runs of one kind make, as a JSON object. Raises ValueError where they are not of one kind."""
    first = runs[0]
    reference = {
        "format": FORMAT, "name": name, "n": len(runs), "seeds": [run.config.get("seed") for run in runs],
        "config": {key: value for key, value in first.config.items() if key not in ("seed", "out_dir")},
        "resolved": first.resolved,
        "dataset_sha256": first.env.get("dataset_sha256"),
        "commits": sorted({run.env.get("commit") or "unknown" for run in runs}),
        "dirty": any(run.env.get("dirty_diff") for run in runs),
    }
    for run in runs[1:]:
        check_same(reference, run, first.name)
    machines = [machine(run) for run in runs]
    reference["machine"] = {}
    for key, value in machines[0].items():
        same = all(other[key] == value for other in machines)
        reference["machine"][key] = value if same else "several"
    reference["smooth_steps"] = smoothing(first)
    reference["curves"] = shared_curves(runs, reference["smooth_steps"])
    if not reference["curves"]["loss"]["step"]:
        raise ValueError(f"{', '.join(run.name for run in runs)} have no step in common at which all logged a loss")
    reference["val_sha256"] = val_sha256_of(runs)
    reference["tok_per_s"] = [median_or_none(series(run, "tok_per_s")[1]) for run in runs]
    reference["mem_gb"] = [max(series(run, "mem_gb")[1], default=None) for run in runs]
    return reference


def val_sha256_of(runs):
    """The hashes of the tokens that the evaluations read."""
    hashes = set()
    for run in runs:
        hashes |= {record["val_sha256"] for record in run.records if record.get("val_sha256")}
    return sorted(hashes)


def write_reference(runs, path):
    """Write the reference curves of `runs` to a file. Raises ValueError where the runs make none."""
    if len(runs) < LEAST:
        raise ValueError(f"a band needs at least {LEAST} runs that differ in the seed, not {len(runs)}")
    seeds = [run.config.get("seed") for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a band is over seeds that differ, and these runs have {', '.join(map(str, seeds))}")
    unfinished = [run.name for run in runs if run.ended != "end"]
    if unfinished:
        raise ValueError(f"a reference is made of finished runs, and {', '.join(unfinished)} did not end")
    reference = summarise(runs, Path(path).stem)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(reference) + "\n")
    return reference


def read_baseline(path):
    """A reference from its file, or one made of the single run in a folder. Raises ValueError for anything else."""
    path = Path(path)
    if path.is_dir():
        run = read_run(path)
        return summarise([run], run.name)
    if not path.is_file():
        raise ValueError(f"no baseline {path}: it takes a run folder, or a file of reference curves (docs/reference/)")
    reference = read_object(path)
    if reference.get("format") != FORMAT:
        raise ValueError(f"{path} holds no reference curves ({FORMAT})")
    return reference


def bands(base, tolerance):
    """[(steps, low, high)] of the training loss and the validation loss, where the curve has more than one point."""
    bands = []
    for field in ("loss", "val_loss"):
        curve = base["curves"][field]
        half = half_widths(curve, base["n"], tolerance)
        if len(half) > 1:
            low = [mean - h for mean, h in zip(curve["mean"], half, strict=True)]
            high = [mean + h for mean, h in zip(curve["mean"], half, strict=True)]
            bands.append((curve["step"], low, high))
    return bands


# -----------------------------------------------------------------------------
# The comparison


def excursions(outside):
    """[(first, last)] index of each stretch of True."""
    stretches = []
    for i, out in enumerate(outside):
        if out and i and outside[i - 1]:
            stretches[-1] = (stretches[-1][0], i)
        elif out:
            stretches.append((i, i))
    return stretches


def compare_curve(curve, run_curve, field, title, n, tolerance, needed):
    """The Finding of a run's curve against the band of `curve`.

    `needed`: how many looks one after another raise the alarm; 0: the last look alone decides.
    """
    half = half_widths(curve, n, tolerance)
    band = dict(zip(curve["step"], zip(curve["mean"], half, strict=True), strict=True))
    looks = [(step, value, *band[step]) for step, value in zip(*run_curve, strict=True) if step in band]
    deviation = [(value - mean) / half for _, value, mean, half in looks]  # above 1 or below -1: outside

    def figures(i):
        step, value, mean, half = looks[i]
        return f"{value:.4f} against {mean:.4f} ± {half:.4f} at step {step:,} ({value / mean - 1:+.1%})"

    def span(first, last):
        text = f"{looks[first][0]:,}"
        return text if first == last else f"{text} to {looks[last][0]:,}"

    def is_sustained(first, last):
        return last - first + 1 >= needed if needed else last == len(looks) - 1

    brief = []
    for side, word in ((1, "above the band"), (-1, "below the band, which is better,")):
        stretches = excursions([side * z > 1 for z in deviation])
        sustained = [pair for pair in stretches if is_sustained(*pair)]
        if sustained:
            inside = [i for first, last in sustained for i in range(first, last + 1)]
            worst = max(inside, key=lambda i: side * deviation[i])
            where = ", ".join(span(*pair) for pair in sustained)
            return Finding(field, side > 0, f"{title} is {word} at step {where}: {figures(worst)}")
        brief += [span(*pair) for pair in stretches]
    exceptions = f", except at step {', '.join(brief)}, too short to count" if brief else ""
    return Finding(field, False, f"{title} is in band{exceptions}: {figures(-1)}")


def compare_loss(run, base, tolerance):
    """The Finding of the training loss. Raises ValueError where too few of its steps are in the baseline."""
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
    curve = base["curves"]["loss"]
    return compare_curve(curve, smoothed, "loss", "training loss", base["n"], tolerance, needed)


def compare_val_loss(run, base, tolerance):
    """The Finding of the validation loss."""
    curve = base["curves"]["val_loss"]
    vals = series(run, "val_loss")
    if not set(vals[0]) & set(curve["step"]):
        return Finding("val_loss", None, "validation loss is not compared: no evaluation at the same step")
    if val_sha256_of([run]) != base["val_sha256"]:
        return Finding("val_loss", None, "validation loss is not compared: evaluated on other tokens (eval_iters)")
    return compare_curve(curve, vals, "val_loss", "validation loss", base["n"], tolerance, 0)


def compare_quality(run, base, tolerance):
    """Findings of training and validation loss. Raises ValueError where too few steps can be compared."""
    broken = [record["step"] for record in run.records if "loss" in record and record["loss"] is None]
    if broken:
        return [Finding("loss", True, f"training loss is not finite at step {broken[0]:,}")]
    return [compare_loss(run, base, tolerance), compare_val_loss(run, base, tolerance)]


def compare_figure(field, title, form, value, baseline, tolerance, sign):
    """The Finding of speed (sign -1: less is worse) or memory (1), against the values of the baseline's runs.

    The spread of several runs counts where it is wider than the tolerance; where it is very wide nothing is compared.
    """
    mean = statistics.mean(baseline)
    noise = reach(len(baseline)) * statistics.stdev(baseline) / mean if len(baseline) > 1 else 0.0
    if noise > TOO_NOISY:
        apart = max(baseline) / min(baseline) - 1
        return Finding(field, None, f"{title} not compared: the baseline's own runs differ by {apart:.0%}")
    allowed = max(tolerance, noise)
    change = value / mean - 1
    worse = sign * change > allowed
    verdict = "worse" if worse else "in band"
    return Finding(field, worse, f"{title} {value:{form}} against {mean:{form}} "
                                 f"({change:+.1%}, {sign * allowed:+.1%} allowed): {verdict}")


def compare_speed(run, base, tolerance, memory_tolerance):
    """Findings of tokens/s (median over the steps that both have) and of peak memory, on equal machines."""
    here = machine(run)
    different = [f"{key} is {here[key]}, there {value}" for key, value in base["machine"].items()
                 if here.get(key) != value]
    if different:
        return [Finding("speed", None, f"speed and memory are not compared: {'; '.join(different)}")]
    findings = []
    curve = base["curves"]["tok_per_s"]
    expected = dict(zip(curve["step"], curve["mean"], strict=True))
    ratios = [speed / expected[step] for step, speed in zip(*series(run, "tok_per_s"), strict=True)
              if step in expected]
    if ratios and None not in base["tok_per_s"]:
        speed = statistics.median(ratios) * statistics.mean(base["tok_per_s"])
        findings.append(compare_figure("tok_per_s", "tokens/s", ",.0f", speed, base["tok_per_s"], tolerance, -1))
    peak = max(series(run, "mem_gb")[1], default=None)
    if peak is not None and None not in base["mem_gb"]:
        findings.append(compare_figure("mem_gb", "peak memory in GB", ".3f", peak, base["mem_gb"],
                                       memory_tolerance, 1))
    return findings


def compare(run, base, loss_tolerance, speed_tolerance, memory_tolerance):
    """Findings of a run against a baseline. Raises ValueError where the two are not the same experiment."""
    check_same(base, run, base["name"])
    quality = compare_quality(run, base, loss_tolerance)
    return quality + compare_speed(run, base, speed_tolerance, memory_tolerance)
