"""
Which size is best for how much compute: isoFLOP curves, and what they say of sizes that were not trained.

Runs of several sizes share a budget of training FLOPs. Through their losses over log N (parameters) goes a parabola,
whose lowest point is the best size for that budget; through the lowest points of all budgets go N = a C^b and
L = k C^-g (Hoffmann et al. 2022, arXiv:2203.15556, section 3.2). With three budgets a loss that no compute gets below,
which text has, cannot be told from the rest, so far off L is too low. The intervals are of a bootstrap over the
seeds: they hold what the seeds leave open, and not that the laws may bend.
"""

import math
import statistics
from typing import NamedTuple

import numpy as np

SAME = 1.1     # runs whose FLOPs differ by less than this factor have the same budget, rounded to whole steps
DRAWS = 2000   # of the bootstrap
INSIDE = 0.90  # of the draws lie in an interval
SIZE = 124e6   # parameters of GPT-2's smallest


class Law(NamedTuple):
    """N = a C^b for the best size and L = k C^-g for its loss, in natural logarithms."""

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


def budgets(rows):
    """[(FLOPs, {parameters: losses of its seeds})] of the budgets with at least three sizes, by layers and width; []
    unless there are at least two of them. What diverged is left out."""
    cost = sorted(((row["tokens"] * row["flops_per_token"], row) for row in rows
                   if not row["diverged"] and row.get("flops_per_token")), key=lambda pair: pair[0])
    groups = []
    for flops, row in cost:
        if not groups or flops > SAME * groups[-1][0][0]:
            groups.append([])
        groups[-1].append((flops, row))
    found = []
    for group in groups:
        sizes, shapes = {}, {(row["config"]["n_layer"], row["config"]["n_embd"]) for _, row in group if "config" in row}
        for _, row in group if len(shapes) > 2 else ():
            sizes.setdefault(row["params"], []).append(row["val_loss"])
        if len(sizes) > 2:
            found.append((statistics.fmean(flops for flops, _ in group), dict(sorted(sizes.items()))))
    return found if len(found) > 1 else []


def lowest(losses):
    """{parameters: loss} -> (best size, its loss, the parabola's coefficients over log N); None where the parabola has
    no lowest point between the smallest and the largest size."""
    x, y = np.log(list(losses)), np.array(list(losses.values()))
    a, b, c = np.polyfit(x, y, 2)
    if a <= 0 or not x.min() < -b / (2 * a) < x.max():
        return None
    return math.exp(-b / (2 * a)), float(c - b * b / (4 * a)), (a, b, c)


def law(means):
    """The laws through the best sizes of [(FLOPs, {parameters: loss})]; None where one has none, or if larger budgets
    do not ask for larger models."""
    points = [lowest(losses) for _, losses in means]
    if None in points:
        return None
    flops = np.log([budget for budget, _ in means])
    b, a = np.polyfit(flops, np.log([point[0] for point in points]), 1)
    g, k = np.polyfit(flops, np.log([point[1] for point in points]), 1)
    return Law(float(a), float(b), float(k), float(-g)) if b > 0 else None


def means_of(groups):
    return [(flops, {size: statistics.fmean(losses) for size, losses in sizes.items()}) for flops, sizes in groups]


def drawn(groups, draws=DRAWS):
    """The laws of so many sets of as many seeds, drawn with replacement for each run; those that have one."""
    rng = np.random.default_rng(0)
    again = ([(flops, {size: float(np.mean(rng.choice(losses, len(losses)))) for size, losses in sizes.items()})
              for flops, sizes in groups] for _ in range(draws))
    return [found for means in again if (found := law(means))]


def interval(values):
    """The middle 90% of `values`."""
    return tuple(float(np.quantile(values, q)) for q in ((1 - INSIDE) / 2, (1 + INSIDE) / 2))


def markdown(rows, size=SIZE):
    """What the runs say, as Markdown; "" where they are no such study."""
    groups = budgets(rows)
    if not groups:
        return ""
    body = []
    for flops, losses in means_of(groups):
        found = lowest(losses)
        best = (f"{found[0]:,.0f}", f"{flops / (6 * found[0]):,.0f}", f"{found[1]:.4f}") if found else ("none", "", "")
        body.append((f"{flops:.3g}", ", ".join(f"{n:,}" for n in losses), *best))
    header = ("FLOPs", "sizes", "best size N", "FLOPs / 6N, tokens", "its loss")
    lines = [header, ("--:",) * len(header), *body]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    found, others = law(means_of(groups)), drawn(groups)
    if not found or not others:
        return text + "\n\nThe best sizes follow no law: not every budget has one between the sizes that were run."

    def said(value, of, form):
        low, high = interval([value(other) for other in others])
        return f"{of} {value(found):{form}} ({low:{form}} to {high:{form}})"

    best = found.budget(size)
    power = said(lambda law: law.b, "The best size grows as compute to the power of", ".2f")
    falls = said(lambda law: law.g, "and its loss falls as compute to the power of minus", ".3f")
    flops = said(lambda law: law.budget(size), f"{size / 1e6:,.0f} million parameters are best at", ".2g")
    tokens = said(lambda law: law.budget(size) / (6 * size), "FLOPs, which are", ".2g")
    loss = said(lambda law: law.loss(law.budget(size)), "tokens, with a loss of", ".2g")
    return f"""{text}

In parentheses the middle {INSIDE:.0%} of {DRAWS:,} draws of the seeds, of which {len(others) / DRAWS:.1%} give a law \
at all. {power}, {falls}. By that, {flops} {tokens} {loss}: {math.log10(best / groups[-1][0]):.1f} orders of magnitude \
beyond the largest budget that was run."""


def draw(axes, rows, size=SIZE):
    """The isoFLOP curves on the first of two matplotlib axes; the best sizes, their law and its interval up to `size`
    on the second."""
    groups = budgets(rows)
    found, others = law(means_of(groups)), drawn(groups)
    for flops, sizes in groups:
        mean = {n: statistics.fmean(losses) for n, losses in sizes.items()}
        points = axes[0].errorbar(list(mean), list(mean.values()), fmt="o", markersize=4, capsize=2,
                                  yerr=[np.std(losses, ddof=1) if len(losses) > 1 else 0 for losses in sizes.values()],
                                  label=f"{flops:.2g} FLOPs")
        if best := lowest(mean):
            x = np.linspace(math.log(min(mean)), math.log(max(mean)), 100)
            axes[0].plot(np.exp(x), np.polyval(best[2], x), color=points[0].get_color(), linewidth=1)
            axes[1].plot(flops, best[0], "o", color=points[0].get_color())
    axes[0].set(xscale="log", xlabel="parameters", ylabel="validation loss, nats per token")
    axes[0].legend()
    axes[1].set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="best size, parameters")
    if found and others:
        x = np.geomspace(groups[0][0], found.budget(size), 60)
        band = np.array([interval([other.size(c) for other in others]) for c in x])
        axes[1].plot(x, [found.size(c) for c in x], color="grey", linewidth=1)
        axes[1].fill_between(x, band[:, 0], band[:, 1], color="grey", alpha=0.2, linewidth=0)
        axes[1].axhline(size, color="grey", linestyle=":", linewidth=1)
