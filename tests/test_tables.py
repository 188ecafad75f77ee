"""Tables of an ablation: the statistics are those of a book, noise is seldom bold, the tables say what the rows say."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from reporting import significance, tables

ROOT = Path(__file__).resolve().parents[1]


def row(variant, seed, loss, *, curve=None, against=None, diverged=False, flops=100.0, **more):
    tokens, losses, seconds = curve or ((100, 1000), (loss + 1, loss), (1.0, 10.0))
    points = {"tokens": list(tokens), "val_loss": list(losses), "wall_s": list(seconds)}
    return {"variant": variant, "seed": seed, "against": against, "diverged": diverged,
            "val_loss": None if diverged else loss, "curve": points, "flops_per_token": flops,
            "tokens": tokens[-1], "wall_s": seconds[-1], **more}


# -----------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("p, dof, t", [
    (0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 4, 2.776), (0.05, 10, 2.228), (0.01, 30, 2.750), (0.001, 5, 6.869),
])
def test_the_critical_values_are_those_of_the_printed_table(p, dof, t):
    assert significance.t_critical(p, dof) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 50.0])
def test_p_of_one_and_two_degrees_of_freedom_has_a_closed_form(t):
    assert significance.t_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
    assert significance.t_p(t, 2) == significance.t_p(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


def test_welch_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (list(rng.normal(rng.normal(), rng.uniform(0.1, 3), rng.integers(2, 9))) for _ in range(2))
        theirs = stats.ttest_ind(b, a, equal_var=False)
        ours = significance.welch(a, b)
        assert (ours.p, ours.dof) == (pytest.approx(theirs.pvalue, rel=1e-9), pytest.approx(theirs.df, rel=1e-9))
        assert ours.difference / ours.error == pytest.approx(theirs.statistic)


def test_welch_by_hand():
    found = significance.welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert found.difference == 2 and found.error == pytest.approx(math.sqrt(1 / 3 + 4 / 3))
    assert found.dof == pytest.approx((5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2))
    assert significance.t_critical(found.p, found.dof) == pytest.approx(2 / found.error)
    assert significance.welch([1.0, 1.0], [2.0, 2.0]).p == 1  # no noise was measured, so nothing is above it


@pytest.mark.parametrize("ps, real", [
    ((0.01, 0.02, 0.04), (True, True, True)),     # below 0.05 / 3, 0.05 / 2, 0.05
    ((0.04, 0.01, 0.03), (False, True, False)),   # 0.03 is not below 0.05 / 2, which ends it, for 0.04 as well
    ((0.02, 0.02, 0.02), (False, False, False)),  # none is below 0.05 / 3
])
def test_holms_steps_by_hand(ps, real, monkeypatch):
    monkeypatch.setattr(significance, "welch", lambda a, b: significance.Comparison(b[0], 1.0, 4.0, b[0]))
    found = significance.compare({"base": [0, 0], **{str(i): [p, p] for i, p in enumerate(ps)}}, "base")
    assert tuple(found[str(i)].real for i in range(3)) == real


def test_bold_is_what_is_above_the_floor():
    rng, seen = np.random.default_rng(1), set()
    for _ in range(20):
        values = {str(i): list(rng.normal(i * (i > 3), rng.uniform(0.1, 0.5), 3)) for i in range(8)}
        for one in tables.compare(values, "0").values():
            assert one.real == (abs(one.difference) > one.floor)
            seen.add(one.real)
    assert seen == {True, False}


def test_noise_is_seldom_bold_and_a_planted_difference_is():
    rng, false, missed, tries = np.random.default_rng(2), 0, 0, 120
    for _ in range(tries):
        spread = rng.uniform(0.5, 2, 6)  # not the same for all
        values = {str(i): list(rng.normal(0, spread[i], 3)) for i in range(6)}
        values["planted"] = list(rng.normal(-40, 1, 3))
        found = tables.compare(values, "0")
        false += any(found[str(i)].real for i in range(1, 6))
        missed += not found["planted"].real
    assert false <= tries * tables.LEVEL * 1.5  # seeded; the bound leaves room for luck
    assert missed <= tries * 0.05


def test_one_seed_is_no_comparison():
    assert tables.compare({"base": [1.0, 1.1], "a": [0.0]}, "base") == {}
    assert tables.compare({"base": [1.0], "a": [0.0, 0.1]}, "base") == {}
    text = tables.markdown([row("base", 1, 2.0), row("a", 1, 1.0, against="base")])
    assert "±" not in text.partition("## Against")[2] and "**" not in text and "| 1.0000 (1) |" in text


# -----------------------------------------------------------------------------
# Rows and tables


def test_a_loss_between_two_of_the_curve():
    one = row("a", 1, 2.0, curve=((100, 1000, 10000), (4.0, 3.0, 2.0), (1.0, 10.0, 20.0)))
    assert tables.loss_at(one, "tokens", math.sqrt(100 * 1000)) == pytest.approx(3.5)  # half-way along the logarithm
    assert tables.loss_at(one, "flops", 1000 * 100) == pytest.approx(3.0)
    assert tables.loss_at(one, "wall_s", 20.0) == 2.0
    assert tables.loss_at(one, "tokens", 99) is None and tables.loss_at(one, "tokens", 10001) is None
    assert tables.loss_at({**one, "flops_per_token": None}, "flops", 1e5) is None


def test_equal_compute_and_time_are_what_all_reached():
    rows = [row("base", seed, 2.0 + seed / 100) for seed in (1, 2)]
    rows += [row("slow", seed, 1.8 + seed / 100, against="base", flops=400.0,
                 curve=((100, 1000), (3.0, 1.8 + seed / 100), (4.0, 40.0))) for seed in (1, 2)]
    text = tables.markdown(rows)
    assert "at 1e+05 FLOPs" in text and "at 10 s" in text
    slow = next(line for line in text.splitlines() if line.startswith("| slow |"))
    losses = [tables.loss_at(r, "wall_s", 10.0) for r in rows[2:]]
    assert f"| {np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f} (2) |" in slow
    assert losses[0] > 1.81 and slow.split(" | ")[1] == "1.8150 ± 0.0071 (2)"


def test_the_table_is_that_of_the_rows():
    rows = [row("base", seed, loss, params=1000, spikes=1) for seed, loss in enumerate((2.00, 2.01, 2.02), 1)]
    rows += [row("good", seed, loss, against="base", attn_entropy=[3.0, 2.0])
             for seed, loss in enumerate((1.00, 1.01, 1.02), 1)]
    rows += [row("noise", seed, loss, against="base") for seed, loss in enumerate((1.98, 2.01, 2.05), 1)]
    rows += [row("wild", 1, 1.0, against="base", diverged=True), row("wild", 2, 0.5, against="base"),
             row("wild", 3, 0.51, against="base")]
    text = tables.markdown(rows)
    lines = {line.split(" | ")[0].strip("| "): line for line in text.partition("### Cost")[0].splitlines()}
    assert lines["base"].startswith("| base | 2.0100 ± 0.0100 (3) |  |")
    assert lines["good"].startswith("| good | 1.0100 ± 0.0100 (3) | **-1.0000** ± 0.0082 (")
    assert lines["noise"].startswith("| noise | 2.0133 ± 0.0351 (3) | +0.0033 ± 0.0211 (")
    assert "(2 of 3)" in lines["wild"] and "**" not in lines["wild"], "the survivors of three are no candidate"
    assert "3.00 → 2.00" in text and "1 of 3" in text and "attention logit" not in text


def test_each_is_compared_with_what_it_was_run_against():
    rows = [row(name, seed, loss + seed / 100, against=against) for seed in (1, 2) for name, against, loss in
            (("base", None, 2.0), ("a", "base", 1.9), ("stack", "base", 1.5), ("stack_no_a", "stack", 1.6))]
    parts = tables.markdown(rows).split("## Against ")[1:]
    assert [part.split()[0] for part in parts] == ["base", "stack"]
    assert "| a |" in parts[0] and "| stack_no_a |" not in parts[0]
    assert "| stack_no_a | 1.6150 ± 0.0071 (2) | +0.1000" in parts[1] or "**+0.1000**" in parts[1]
    assert tables.markdown(rows, "stack").count("## Against") == 1


def test_rows_of_other_code_are_said():
    rows = [row("base", 1, 2.0, code_sha256="a"), row("b", 1, 2.0, against="base", code_sha256="a")]
    assert "The rows differ" not in tables.markdown(rows)
    assert "The rows differ in code" in tables.markdown([rows[0], {**rows[1], "code_sha256": "b"}])


def test_a_results_file_is_read_or_refused(tmp_path):
    path = tmp_path / "arch" / "results.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row("base", 1, 2.0)) + "\n" + json.dumps(row("a", 1, 1.5)) + "\n", encoding="utf-8")
    assert tables.report_of(path).startswith("# Ablation: arch\n") and "| a | 1.5000 (1) |" in tables.report_of(path)
    for text, named in (("", "no rows"), ("{}\n", ":1 is no row"), ("null\n", ":1 is no row"), ("{", ":1 is no row")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=named):
            tables.report_of(path)


def test_trends_by_hand():
    assert tables.trend([9, 9, 4, 4, 3, 3, 1, 1]) == 0.25 and tables.trend([1, 2, 3]) is None
    records = [{}, {"attn_entropy": [1.0, 3.0]}, {"attn_entropy": None}, {"attn_entropy": [1.0, None]}]
    assert tables.ends_of(records, "attn_entropy", max) == [3.0, 1.0]
    assert tables.ends_of([{}], "attn_entropy", max) is None


def test_learning_curves_have_bands():
    class Axes:
        lines, bands, labels = {}, [], []

        def plot(self, x, y, label):
            self.lines[label] = (x, y)
            return [self]

        def get_color(self):
            return "red"

        def fill_between(self, x, low, high, **_):
            self.bands.append((low, high))

        def set_xlabel(self, text):
            self.labels.append(text)

        set_ylabel = set_xlabel

        def legend(self):
            pass

    ax = Axes()
    rows = [row("base", 1, 2.0), row("base", 2, 2.2), row("one", 1, 1.0), row("lost", 1, 1.0, diverged=True)]
    tables.learning_curves(ax, rows, by="flops")
    assert list(ax.lines) == ["base (2)", "one (1)"] and len(ax.bands) == 1 and ax.labels[0] == "FLOPs"
    x, y = ax.lines["base (2)"]
    assert (x[0], x[-1]) == pytest.approx((1e4, 1e5)) and (y[0], y[-1]) == pytest.approx((3.1, 2.1))
    low, high = ax.bands[0]
    assert (high[-1] - low[-1]) / 2 == pytest.approx(math.sqrt(0.02))


# -----------------------------------------------------------------------------
# In a document


def test_tables_in_a_document_are_renewed(tmp_path):
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps(row(name, seed, loss + seed / 100)) + "\n"
                            for name, loss in (("base", 1.5), ("rope", 1.4)) for seed in (1, 2)), encoding="utf-8")
    text = f"before\n<!-- python report.py {path} -->\nof last year\n<!-- end -->\nafter\n"
    new = tables.put_into(text, path)
    assert new.startswith("before\n") and new.endswith("<!-- end -->\nafter\n") and "last year" not in new
    assert "\n## Ablation: letters\n" in new and "\n### Against base\n" in new and "1.4150 ± 0.0071 (2)" in new
    assert tables.put_into(new, path) == new
    with pytest.raises(ValueError, match="no lines"):
        tables.put_into("nothing here", path)


def test_the_report_is_what_its_results_say(monkeypatch):
    """Each table of docs/report.md, made again from the results in docs/results."""
    monkeypatch.chdir(ROOT)
    text = Path("docs/report.md").read_text(encoding="utf-8")
    found = re.findall(r"^<!-- python report.py (\S+) -->$", text, re.M)
    assert found
    for path in found:
        assert tables.put_into(text, path) == text, f"python report.py {path} --into=docs/report.md"
