"""Benchmarks: the figures are those of the run folders, and nothing is measured over what is there."""

import json
import statistics

import pytest

KEYS = ("seed", "val_loss", "train_s", "step_ms", "data_ms", "forward_ms", "backward_ms", "optim_ms", "tok_per_s")


@pytest.fixture(scope="module")
def bench(run_script, tiny_settings, tmp_path_factory):
    """bench(seeds, out_dir) -> what `python bench.py train` did on the tiny model."""
    config = tmp_path_factory.mktemp("config") / "tiny.py"
    settings = [word.removeprefix("--").split("=", 1) for word in tiny_settings]
    text = {"dataset", "device", "dtype"}
    values = {key: repr(value) if key in text else value.replace("false", "False") for key, value in settings}
    config.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), encoding="utf-8")

    def bench(seeds, out_dir, *words):
        return run_script("bench.py", "train", f"--config={config}", f"--seeds={seeds}", f"--out_dir={out_dir}", *words)

    return bench


def test_figures_are_those_of_the_runs(bench, tmp_path):
    done = bench("1,2", tmp_path, "--overrides=max_iters=8,eval_interval=4")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    assert [run["seed"] for run in result["runs"]] == [1, 2] and result["settings"]["overrides"][0] == "max_iters=8"
    for run in result["runs"]:
        lines = (tmp_path / f"tiny_seed{run['seed']}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert run["steps"] == records[-1]["step"] == 8 and run["train_s"] == records[-1]["wall_s"]
        parts = [r["data_ms"] + r["forward_ms"] + r["backward_ms"] + r["optim_ms"] for r in records]
        assert run["step_ms"] == pytest.approx(statistics.median(parts))
        assert run["commit"] is None or len(run["commit"]) == 40
        row = next(line for line in table if line.split()[0] == str(run["seed"]))
        assert row.split()[1] == f"{run['val_loss']:.4f}"
    losses = [run["val_loss"] for run in result["runs"]]
    assert losses[0] != losses[1]
    assert result["val_loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert result["val_loss"]["stdev"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert table[1].split() == list(KEYS)

    again = bench("2,3", tmp_path)  # one of the folders is there: nothing is mixed with it
    assert again.returncode == 2 and "tiny_seed2 exists" in again.stderr


@pytest.mark.parametrize(
    "seeds, words, named",
    [
        ("()", (), "--seeds is empty"),
        ("1", ("--config=config/none.py",), "no config file config/none.py"),
        ("1", ("--overrides=max_itres=8",), "unknown key --max_itres"),
    ],
)
def test_mistakes_are_named(seeds, words, named, bench, tmp_path):
    done = bench(seeds, tmp_path / "out", *words)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
