"""
The best model size for a compute budget: isoFLOP curves, and a prediction for sizes that were not trained.

Runs of several sizes share a budget of training FLOPs. A parabola goes through their losses over log N (parameters),
and its lowest point is the best size for that budget. Two laws go through the lowest points of all budgets: N = a C^b
and L = k C^-g (Hoffmann et al. 2022, arXiv:2203.15556, section 3.2). Text has an irreducible loss, which three budgets
cannot separate from the rest, so far from the data the predicted L is too low. The intervals are a bootstrap over the
seeds: they cover the noise of the seeds, but not errors of the laws themselves.
"""

import math
import statistics
from typing import NamedTuple

import numpy as np

SAME = 1.1     # runs whose FLOPs differ by less than this factor share a budget, which was rounded to whole steps
DRAWS = 2000   # of the bootstrap
INSIDE = 0.90  # share of the draws in an interval
SIZE = 124e6   # parameters of GPT-2's smallest


class Law(NamedTuple):
    """N = a C^b for the best size and L = k C^-g for its loss; `a` and `k` are natural logarithms."""

    a: float
    b: float
    k: float
    g: float

    def size(self, budget):
        return math.exp(self.a + self.b * math.log(budget))

    def budget(self, size):
        """The FLOPs for which `size` is best."""
        return math.exp((math.log(size) - self.a) / self.b)

    def loss(self, budget):
        return math.exp(self.k - self.g * math.log(budget))


# -----------------------------------------------------------------------------
# The fit


def group_by_flops(rows):
    """[[(FLOPs, row), ...], ...]: the rows of each budget, from the smallest on. Rows that diverged are ignored."""
    costs = [(row["tokens"] * row["flops_per_token"], row) for row in rows
             if not row["diverged"] and row.get("flops_per_token")]
    groups = []
    for flops, row in sorted(costs, key=lambda pair: pair[0]):
        if not groups or flops > SAME * groups[-1][0][0]:
            groups.append([])
        groups[-1].append((flops, row))
    return groups


def budgets(rows):
    """[(FLOPs, {parameters: losses of its seeds})] of the budgets with at least three sizes, by layers and width.

    [] unless there are at least two such budgets.
    """
    result = []
    for group in group_by_flops(rows):
        configs = [row["config"] for _, row in group if "config" in row]
        shapes = {(config["n_layer"], config["n_embd"]) for config in configs}
        if len(shapes) < 3:
            continue
        sizes = {}
        for _, row in group:
            sizes.setdefault(row["params"], []).append(row["val_loss"])
        if len(sizes) > 2:
            mean_flops = statistics.fmean(flops for flops, _ in group)
            result.append((mean_flops, dict(sorted(sizes.items()))))
    return result if len(result) > 1 else []


def lowest(losses):
    """{parameters: loss} -> (best size, its loss, the parabola's coefficients over log N).

    None where the parabola has no lowest point between the smallest and the largest size.
    """
    x = np.log(list(losses))
    y = np.array(list(losses.values()))
    a, b, c = np.polyfit(x, y, 2)
    if a <= 0 or not x.min() < -b / (2 * a) < x.max():
        return None
    return math.exp(-b / (2 * a)), float(c - b * b / (4 * a)), (a, b, c)


def law(means):
    """The Law through the best sizes of [(FLOPs, {parameters: loss})].

    None where a budget has no best size, or larger budgets do not ask for larger models.
    """
    points = [lowest(losses) for _, losses in means]
    if None in points:
        return None
    flops = np.log([budget for budget, _ in means])
    b, a = np.polyfit(flops, np.log([point[0] for point in points]), 1)
    g, k = np.polyfit(flops, np.log([point[1] for point in points]), 1)
    return Law(float(a), float(b), float(k), float(-g)) if b > 0 else None


def means_of(groups):
    """The groups of budgets() with the mean loss of each size."""
    means = []
    for flops, sizes in groups:
        means.append((flops, {size: statistics.fmean(losses) for size, losses in sizes.items()}))
    return means


def drawn(groups, draws=DRAWS):
    """The laws of `draws` bootstrap samples (seeds, drawn with replacement), without the samples that have none."""
    rng = np.random.default_rng(0)
    laws = []
    for _ in range(draws):
        means = []
        for flops, sizes in groups:
            resampled = {}
            for size, losses in sizes.items():
                resampled[size] = float(np.mean(rng.choice(losses, len(losses))))
            means.append((flops, resampled))
        fitted = law(means)
        if fitted:
            laws.append(fitted)
    return laws


def interval(values):
    """The middle 90% of `values`."""
    return tuple(float(np.quantile(values, q)) for q in ((1 - INSIDE) / 2, (1 + INSIDE) / 2))


# -----------------------------------------------------------------------------
# As text and as a picture


def markdown(rows, size=SIZE):
    """The best sizes and their law as Markdown; "" where the rows are no study of sizes and budgets."""
    groups = budgets(rows)
    if not groups:
        return ""
    header = ("FLOPs", "sizes", "best size N", "FLOPs / 6N, tokens", "its loss")
    lines = [header, ("--:",) * len(header)]
    for flops, losses in means_of(groups):
        best = lowest(losses)
        cells = ("none", "", "")
        if best:
            cells = (f"{best[0]:,.0f}", f"{flops / (6 * best[0]):,.0f}", f"{best[1]:.4f}")
        lines.append((f"{flops:.3g}", ", ".join(f"{n:,}" for n in losses), *cells))
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)

    fitted = law(means_of(groups))
    draws = drawn(groups)
    if not fitted or not draws:
        return text + "\n\nThe best sizes follow no law: not every budget has one between the sizes that were run."

    def estimate(value, form):
        """value(law) with its interval: 0.53 (0.48 to 0.57)."""
        low, high = interval([value(other) for other in draws])
        return f"{value(fitted):{form}} ({low:{form}} to {high:{form}})"

    b = estimate(lambda law: law.b, ".2f")
    g = estimate(lambda law: law.g, ".3f")
    flops = estimate(lambda law: law.budget(size), ".2g")
    tokens = estimate(lambda law: law.budget(size) / (6 * size), ".2g")
    loss = estimate(lambda law: law.loss(law.budget(size)), ".2g")
    distance = math.log10(fitted.budget(size) / groups[-1][0])
    return (
        f"{text}\n\nIn parentheses the middle {INSIDE:.0%} of {DRAWS:,} draws of the seeds, of which "
        f"{len(draws) / DRAWS:.1%} give a law at all. The best size grows as compute to the power of {b}, and its loss "
        f"falls as compute to the power of minus {g}. By that, {size / 1e6:,.0f} million parameters are best at "
        f"{flops} FLOPs, which are {tokens} tokens, with a loss of {loss}: {distance:.1f} orders of magnitude "
        "beyond the largest budget that was run."
    )


def draw(axes, rows, size=SIZE):
    """The isoFLOP curves on the first of two matplotlib axes; on the second the best sizes and their law with its
    interval, up to `size`."""
    curves, sizes_of_budgets = axes
    groups = budgets(rows)
    for flops, sizes in groups:
        mean = {n: statistics.fmean(losses) for n, losses in sizes.items()}
        error = [np.std(losses, ddof=1) if len(losses) > 1 else 0 for losses in sizes.values()]
        points = curves.errorbar(list(mean), list(mean.values()), yerr=error, fmt="o", markersize=4, capsize=2,
                                 label=f"{flops:.2g} FLOPs")
        color = points[0].get_color()
        if best := lowest(mean):
            x = np.linspace(math.log(min(mean)), math.log(max(mean)), 100)
            curves.plot(np.exp(x), np.polyval(best[2], x), color=color, linewidth=1)
            sizes_of_budgets.plot(flops, best[0], "o", color=color)
    curves.set(xscale="log", xlabel="parameters", ylabel="validation loss, nats per token")
    curves.legend()
    sizes_of_budgets.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="best size, parameters")

    fitted = law(means_of(groups))
    draws = drawn(groups)
    if fitted and draws:
        x = np.geomspace(groups[0][0], fitted.budget(size), 60)
        band = np.array([interval([other.size(c) for other in draws]) for c in x])  # (60, 2)
        sizes_of_budgets.plot(x, [fitted.size(c) for c in x], color="grey", linewidth=1)
        sizes_of_budgets.fill_between(x, band[:, 0], band[:, 1], color="grey", alpha=0.2, linewidth=0)
        sizes_of_budgets.axhline(size, color="grey", linestyle=":", linewidth=1)
