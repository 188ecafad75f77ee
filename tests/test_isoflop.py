"""The fit finds the law that made the data, with its uncertainty, and says so where there is no law."""

import math

import pytest

from reporting.isoflop import DRAWS, budgets, draw, drawn, law, lowest, markdown, means_of


def row(size, flops, loss, **more):
    return {"params": size, "flops_per_token": 6.0 * size, "tokens": round(flops / (6 * size)), "val_loss": loss,
            "diverged": False, "config": {"n_layer": 2, "n_embd": round(size**0.5)}, **more}


def study(noise=0.0, curve=0.05, sizes=(1e5, 2e5, 4e5, 8e5, 1.6e6)):
    """Three seeds of five sizes under three budgets, of best sizes 0.1 C^0.5 and losses 10 C^-0.05."""
    return [row(size, flops, 10 * flops**-0.05 + curve * math.log(size / (0.1 * flops**0.5)) ** 2 + noise * seed)
            for flops in (4e12, 1.6e13, 6.4e13) for size in sizes for seed in (-1, 0, 1)]


def test_the_law_is_found():
    groups = budgets(study())
    assert [len(sizes) for _, sizes in groups] == [5, 5, 5]
    assert lowest({n: (math.log(n) - 9) ** 2 + 2 for n in (1e3, 1e4, 1e5)})[:2] == pytest.approx((math.exp(9), 2))
    found = law(means_of(groups))
    assert (found.b, found.g) == pytest.approx((0.5, 0.05), abs=1e-4)
    assert found.size(4e12) == pytest.approx(2e5, rel=1e-3)
    assert found.budget(124e6) == pytest.approx(1.24e9**2, rel=0.01)
    assert found.loss(1e20) == pytest.approx(1.0, rel=1e-3)
    text = markdown(study())
    assert "power of 0.50 (0.50 to 0.50)" in text and "124 million parameters are best at 1.5e+18" in text
    assert "4.4 orders of magnitude" in text


def test_seeds_that_differ_leave_more_open():
    few, many = (sorted(law.b for law in drawn(budgets(study(noise)))) for noise in (0.001, 0.01))
    assert 0 < few[-1] - few[0] < many[-1] - many[0] and len(few) == DRAWS
    assert few[0] < 0.5 < few[-1]


def test_budgets_are_told_apart():
    rows = study()
    assert budgets([r for r in rows if r["tokens"] * r["flops_per_token"] < 5e12]) == []  # one
    assert budgets([r for r in rows if r["params"] < 3e5]) == []  # of two sizes
    rounded = [{**r, "tokens": round(r["tokens"] * 1.03)} if r["params"] == 1e5 else r for r in rows]
    assert [len(sizes) for _, sizes in budgets(rounded)] == [5, 5, 5]
    lost = [{**r, "diverged": True, "val_loss": None} if r["params"] == 1e5 else r for r in rows]
    assert [len(sizes) for _, sizes in budgets(lost)] == [4, 4, 4]
    assert markdown(rows[:3]) == ""
    assert budgets([{**r, "config": {"n_layer": 2, "n_embd": 64}} for r in rows]) == []  # one size, of other parts


@pytest.mark.parametrize("rows", [study(curve=-0.05), study(sizes=(1e7, 2e7, 4e7))], ids=["upside down", "outside"])
def test_where_there_is_no_best_size(rows):
    assert law(means_of(budgets(rows))) is None and "follow no law" in markdown(rows)


def test_the_curves_are_drawn():
    """A curve and its points for each budget; the best sizes, their law, its band, and the size that was asked of."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    curves, sizes = figure.subplots(1, 2)
    draw((curves, sizes), study(noise=0.001))
    assert [text.get_text() for text in curves.get_legend().texts] == ["4e+12 FLOPs", "1.6e+13 FLOPs", "6.4e+13 FLOPs"]
    best = [float(line.get_ydata()[0]) for line in sizes.lines[:3]]
    assert best == pytest.approx([2e5, 4e5, 8e5], rel=0.01)
    assert len(sizes.lines) == 5 and len(sizes.collections) == 1
