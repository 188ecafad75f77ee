"""
Which differences between variants are more than noise: Welch's t-test, with Holm's correction over a column.

Each variant's mean over its seeds is compared with the mean of the variant it was run against, by Welch's t-test
(Welch 1947, Biometrika 34). It does not assume equal variances, since a change may well make training noisier. A
column of m comparisons is one family: the chance that any of them is bold by luck is at most 5%, by Holm's steps
(Holm 1979, Scand. J. Statist. 6). The smallest p is held against 0.05 / m, the next against 0.05 / (m - 1), up to the
first that fails. The noise floor of a row is the smallest difference that its step accepts, and only a difference
above it is bold. One seed alone has no noise floor and is never bold.
Runs of one seed see the data in the same order, but the test does not pair them by seed: with three seeds a paired test
has two degrees of freedom instead of up to four, and the shared order makes Welch's test stricter, not laxer.
"""

import math
import statistics
from typing import NamedTuple

LEVEL = 0.05  # chance that anything in a column is bold by luck


def t_p(t, dof):
    """The two-sided p-value of Student's t."""
    from scipy.stats import t as student

    return float(2 * student.sf(abs(t), dof))


def t_critical(p, dof):
    """The t whose two-sided p-value is `p`."""
    from scipy.stats import t as student

    return float(student.isf(p / 2, dof))


class Comparison(NamedTuple):
    """Two means, each over at least two seeds. `floor` and `real` depend on the whole family; see compare."""

    difference: float  # mean of b - mean of a
    error: float       # its standard error
    dof: float         # degrees of freedom, by Welch and Satterthwaite
    p: float           # chance of so large a difference by luck alone
    floor: float = math.inf  # the noise floor
    real: bool = False       # whether the difference is above it


def welch(a, b):
    """`b` against `a`, two lists of at least two numbers. -> Comparison without a floor

    Where neither list varies, nothing measures the noise: p is 1.
    """
    difference = statistics.fmean(b) - statistics.fmean(a)
    var_a = statistics.variance(a) / len(a)  # of the mean
    var_b = statistics.variance(b) / len(b)
    if var_a + var_b == 0:
        return Comparison(difference, 0.0, len(a) + len(b) - 2, 1.0)
    dof = (var_a + var_b) ** 2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1))
    error = math.sqrt(var_a + var_b)
    return Comparison(difference, error, dof, t_p(difference / error, dof))


def compare(values, reference, level=LEVEL):
    """Each variant against the reference, all of them one family. `values`: variant -> losses of its seeds.

    -> variant -> Comparison, in the order of `values`. A variant needs two losses; so does the reference, else {}.
    """
    if len(values.get(reference, ())) < 2:
        return {}
    several = [name for name, losses in values.items() if name != reference and len(losses) > 1]
    compared = {name: welch(values[reference], values[name]) for name in several}

    passing = True
    for i, name in enumerate(sorted(several, key=lambda name: compared[name].p)):
        comparison = compared[name]
        if passing:  # Holm: after the first failure none is real, and all are held against its level
            allowed = level / (len(several) - i)
            passing = comparison.p <= allowed
        floor = math.inf
        if comparison.error:
            floor = t_critical(allowed, comparison.dof) * comparison.error
        compared[name] = comparison._replace(floor=floor, real=passing)
    return compared
