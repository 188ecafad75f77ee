"""report.py and its parts: figures of run folders, the page in a real browser, bands, the alarm, pictures."""

import json
import math
import random
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from runs import ROOT, records

import report
from configurator import read_file, read_keys
from loader import context_length
from model import GPT, GPTConfig
from reporting import alarm, charts, history, page, pictures

pytest_plugins = ["runs"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# keys of train.py that say where and how it runs, or what it logs, but not what is learned
FREE = {
    "out_dir", "seed", "max_iters", "eval_only", "dataset", "verify_data", "tokens_per_step", "prefetch",
    "loader_threads", "attn", "muon_dtype", "eval_interval", "eval_iters", "log_interval", "sample_tokens",
    "sample_start", "probe_interval", "peak_flops", "profile", "tracker", "wandb_log", "wandb_project",
    "wandb_run_name", "on_nan", "on_spike", "spike_z", "spike_window", "max_rewinds", "always_save_checkpoint",
    "keep_checkpoints", "save_interval", "save_minutes", "checkpoint_format",
    "fp8", "fp8_ends", "tf32", "sdpa", "measure_comm", "device", "dtype", "compile", "threads",
    "deterministic", "zero_stage", "tp_size", "pp_size",
    "pp_schedule", "cpu_offload", "activation_checkpointing", "backend",
}


def rewrite(folder, change, name="metrics.jsonl"):
    """Replace each record of a run by change(record)."""
    lines = [json.dumps(change(record)) for record in records(folder, name)]
    (Path(folder) / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def steady(folder, jitter=0):
    """Speed and memory that do not depend on the machine that runs the tests."""
    rewrite(folder, lambda r: {**r, "tok_per_s": 1000 + jitter, "mem_gb": 0.5})


@pytest.fixture(scope="session")
def seeds(tiny, tmp_path_factory):
    """Folders of six short runs that differ in the seed."""
    root = tmp_path_factory.mktemp("report")
    for seed in range(1, 7):
        done = tiny(root / f"seed{seed}", seed=seed, max_iters=40, eval_interval=20, sample_tokens=8, context_start=4)
        assert done.code == 0, done.err
        steady(root / f"seed{seed}", seed % 3)
    return root


@pytest.fixture(scope="session")
def other(tiny, seeds):
    settings = dict(seed=1, max_iters=40, eval_interval=20, context_start=4)
    done = tiny(seeds / "other", **settings, learning_rate=2e-2, pos="rope")
    assert done.code == 0, done.err
    return seeds / "other"


@pytest.fixture
def copy(seeds, tmp_path):
    """copy(name, change) is the folder of that run with other records."""
    def copy(name, change=None, file="metrics.jsonl", to="new"):
        shutil.copytree(seeds / name, tmp_path / to)
        if change:
            rewrite(tmp_path / to, change, file)
        return tmp_path / to

    return copy


def rich(record):
    """A record with all that a run on a GPU with probes may log."""
    layers = [1.0, 2.0, 3.0]
    by_group = {"embed": 0.5, "layer_0": 0.1, "layer_1": 0.2, "head": 0.3}
    return {**record, "mfu": 0.4, "rss_gb": 1.0, "gpu_util": 0.9, "gpu_power_w": 300.0, "gpu_mem_gb": 2.0,
            "comm_ms": 0.1, "attn_entropy": layers, "attn_logit_max": layers, "act_rms": layers,
            "grad_norms": by_group, "update_ratio": by_group}


# -----------------------------------------------------------------------------
# What run folders say


def test_figures_are_those_of_the_records(seeds):
    run = history.read_run(seeds / "seed1")
    rows, found = records(seeds / "seed1"), history.summary(run)
    vals = [r["val_loss"] for r in rows if "val_loss" in r]
    assert (found["val_loss"], found["best"], found["bits"]) == (vals[-1], min(vals), vals[-1] / math.log(2))
    assert (found["steps"], found["tokens"], found["time"]) == (40, rows[-1]["tokens"], rows[-1]["wall_s"])
    assert found["tok_per_s"] == 1001 and found["mfu"] > 0 and run.ended == "end"
    assert found["commit"].startswith(run.env["commit"][:9])


def test_flops_follow_the_context(seeds):
    run = history.read_run(seeds / "seed1")
    config = {f.name: run.config[f.name] for f in fields(GPTConfig)} | {"vocab_size": run.resolved["vocab_size"]}
    model = GPT(GPTConfig(**config))
    lengths = [context_length(step, 16, 4, 20) for step in range(40)]
    assert lengths[:20] == [4] * 10 + [8] * 10 and set(lengths[20:]) == {16}
    assert run.records[-1]["flops"] == pytest.approx(sum(64 * model.train_flops(T) for T in lengths), rel=1e-12)
    assert run.params == model.num_params()


def test_flops_are_left_out_where_they_are_not_known(copy):
    resumed = copy("seed1", lambda e: {**e, "changed": {"max_iters": [30, 40]}} if e["event"] == "start" else e,
                   "events.jsonl", to="changed")
    assert "flops" not in history.read_run(resumed).records[-1]  # its contexts are not on record
    (resumed / "events.jsonl").unlink()  # nor is its vocabulary
    run = history.read_run(resumed)
    assert "flops" not in run.records[-1] and run.params is None and run.ended == ""


def test_a_run_that_went_back_counts_once():
    steps = [1, 2, 3, 4, 3, 4, 5]
    kept = history.drop_undone([{"step": step, "at": at} for at, step in enumerate(steps)])
    assert [(r["step"], r["at"]) for r in kept] == [(1, 0), (2, 1), (3, 4), (4, 5), (5, 6)]


def test_a_line_that_is_being_written_waits(copy):
    folder = copy("seed1")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 41, "lo')
    assert history.read_run(folder).records[-1]["step"] == 40


def test_differences_are_those_of_the_settings(seeds, other):
    runs = history.read_runs([seeds / "seed1", other])
    found = history.differences(runs)
    assert found == {"learning_rate": [1e-2, 2e-2], "pos": ["learned", "rope"], "sample_tokens": [8, 0]}


def test_names_that_are_the_same_are_told_apart(seeds, tmp_path):
    shutil.copytree(seeds / "seed1", tmp_path / "a" / "seed1")
    shutil.copytree(seeds / "seed1", tmp_path / "b" / "seed1")
    paths = [tmp_path / "a" / "seed1", tmp_path / "b" / "seed1", seeds / "seed2"]
    assert [run.name for run in history.read_runs(paths)] == ["a/seed1", "b/seed1", "seed2"]


def test_smoothing():
    steps, flat = list(range(1, 101)), [2.0] * 100
    assert history.smooth(steps, flat, 10) == pytest.approx(flat) == history.smooth_both_ways(steps, flat, 10)
    noisy = [2 + random.Random(i).gauss(0, 1) for i in range(2000)]
    few = history.smooth(range(10, 20010, 10), noisy, 100)
    share = math.exp(-10 / 100)  # of the average that is kept from a record to the next
    assert statistics.stdev(few[200:]) == pytest.approx(math.sqrt((1 - share) / (1 + share)), rel=0.2)
    noise = alarm.batch_noise(range(10, 20010, 10), noisy, 100)
    assert noise == pytest.approx(math.sqrt((1 - share) / (1 + share)), rel=0.1)
    falling = [5 - 0.01 * step for step in steps]
    assert history.smooth_both_ways(steps, falling, 5)[50] == pytest.approx(falling[50])  # no lag
    assert history.smooth(steps, falling, 5)[50] > falling[50] + 0.03


def test_long_curves_keep_their_spikes():
    ys = [1.0] * 100_000
    ys[31_337], ys[77_777] = 9.0, -9.0
    xs, thin = charts.thin(list(range(100_000)), ys, 500)
    assert len(xs) <= 500 and xs == sorted(set(xs)) and (xs[0], xs[-1]) == (0, 99_999)
    assert dict(zip(xs, thin, strict=True))[31_337] == 9.0 == -dict(zip(xs, thin, strict=True))[77_777]


# -----------------------------------------------------------------------------
# The summary, the page, the picture


def test_the_summary_is_always_printed(call_script, seeds, other):
    code, out, err = call_script("report.py", seeds / "seed1", seeds / "seed2", other)
    assert code == 0 and not err
    lines = out.splitlines()
    assert re.fullmatch(r" +seed +pos +learning_rate +sample_tokens", lines[1])
    assert re.fullmatch(r"  other +1 +rope +0.02 +0", lines[4])
    figures = history.summary(history.read_run(seeds / "seed2"))
    assert any(line.startswith("seed2") and f"{figures['val_loss']:.4f}" in line for line in lines)
    assert re.fullmatch(r"seed1  loss \d\.\d{3} [▁▂▃▄▅▆▇█]{10,} \d\.\d{3}", lines[-3])


def test_the_spark_falls():
    line = report.spark([10, 8, 6, 4, 3, 2.5, 2.2, 2.1, 2.05, 2.0], 10)
    assert len(line) == 10 and list(line) == sorted(line, reverse=True) and line[-1] == "▁" and line[0] == "█"
    assert report.spark([1.0, 1.0], 10) == "▄▄" and len(report.spark(list(range(1000)), 60)) <= 60


CLICKS = """<script>
const lines = () => [...document.querySelectorAll(".plot")].filter(box => box.offsetParent)
  .map(box => box.querySelectorAll(".js-line").length);
const seen = {charts: DATA.charts.length, first: lines()};
for (const button of document.querySelectorAll("[data-axis]")) { button.click(); seen[button.dataset.axis] = lines(); }
document.querySelector("[data-axis=step]").click();
const loss = document.getElementById("loss"), box = loss.getBoundingClientRect();
loss.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + box.width / 2, clientY: box.top + 60}));
seen.tip = [...loss.querySelectorAll(".tip tr")].map(row => row.innerText.replace(/\\s+/g, " "));
document.querySelector("[data-run]").click(); seen.hidden = lines();
const select = document.querySelector("select");
select.value = DATA.runs[1].name; select.onchange(); seen.samples = document.querySelectorAll(".samples").length;
seen.inner = [...document.querySelectorAll("[data-of]")].filter(part => part.offsetParent).map(part => part.dataset.of);
seen.wide = document.documentElement.scrollWidth > innerWidth;
document.documentElement.dataset.seen = JSON.stringify(seen);
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_the_page_in_a_browser(call_script, seeds, other, copy, tmp_path):
    """Three real runs, one with all that may be logged: no error, every curve on every axis, in a small window."""
    pytest.importorskip("plotly")
    probed = copy("seed2", rich, to="probed")
    path = tmp_path / "page.html"
    code, out, _ = call_script("report.py", seeds / "seed1", probed, other, f"--html={path}")
    assert code == 0 and f"written to {path}" in out
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", CLICKS), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
             "--enable-logging=stderr", "--window-size=500,900", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, encoding="utf-8", timeout=240)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, done.stderr[-2000:]
    seen = json.loads(seen.group(1).replace("&quot;", '"').replace("&amp;", "&"))
    # 3 runs x (raw, smoothed, validation); then a line a run, of which one logs the probes; then the first run's own
    shared = {"loss": 9, "grad_norm": 3, "lr": 3, "attn_entropy": 1, "attn_logit_max": 1, "act_rms": 1,
              "tok_per_s": 3, "mfu": 3, "mem_gb": 3, "gpu_util": 1, "gpu_power_w": 1}
    assert seen["first"] == [*shared.values(), 4, 2] and seen["charts"] > len(shared) + 3 * 2
    for axis in history.AXES:
        assert seen[axis] == seen["first"], axis
    assert seen["hidden"][:3] == [6, 2, 2] and seen["inner"] == ["probed"] and seen["samples"] == 2
    assert [row.split()[0] for row in seen["tip"]] == ["step", "seed1", "probed", "other"]
    assert all(len(row.split()) == 3 for row in seen["tip"][1:])  # each run's training and validation loss
    assert not seen["wide"]  # nothing but tables scrolls sideways


def test_the_page_needs_nothing_else(seeds, copy):
    """No address that a browser would fetch, and what a run holds stays text."""
    pytest.importorskip("plotly")
    evil = "</script><img src=http://example.com onerror=alert(1)>"
    folder = copy("seed1", lambda e: {**e, "text": evil, "message": evil}, "events.jsonl")
    text = page.render(history.read_runs([folder, seeds / "seed2"]))
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "<img" not in own and "&lt;img" in own
    assert not re.search(r"""<[^>]*(src|href)=["']?(https?:)?//""", own) and "default-src 'none'" in own
    assert not re.search(r"\{\{\w+\}\}", own)


def test_an_old_run_has_what_it_has(copy):
    """Of a run without most fields, events and keys there are a page and a picture all the same."""
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    folder = copy("seed1", lambda r: {"step": r["step"], "loss": r["loss"]})
    (folder / "events.jsonl").unlink()
    (folder / "config.json").write_text('{"max_iters": 40}', encoding="utf-8")
    (folder / "env.json").write_text("{}", encoding="utf-8")
    runs = history.read_runs([folder])
    text = page.render(runs)
    assert 'id="loss"' in text and 'id="grad_norm"' not in text and "data-axis=\"step\"" in text
    assert 'data-axis="tokens"' not in text
    report.picture(runs, folder / "a.png")
    assert (folder / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_and_its_parts(call_script, copy, other):
    pytest.importorskip("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    probed = copy("seed2", rich)
    code, _, err = call_script("report.py", probed, other, f"--png={probed / 'a.png'}", "--x=flops")
    assert code == 0 and not err and (probed / "a.png").read_bytes()[:4] == b"\x89PNG"
    runs = report.read_runs([probed, other])
    figure, axes = plt.subplots(4)
    report.plot_loss(axes[0], runs, "tokens")
    report.plot_field(axes[1], runs, "grad_norm", log=True)
    report.plot_keys(axes[2], runs[0], "grad_norms")
    report.plot_parts(axes[3], runs[0])
    assert [len(ax.lines) for ax in axes[:3]] == [6, 2, 4] and len(axes[3].collections) == 4
    assert axes[0].lines[0].get_xdata()[-1] == runs[0].records[-1]["tokens"]
    plt.close(figure)


def test_events_are_marked_where_they_happened(copy):
    spike = {"event": "spike", "time": 1, "step": 7, "what": "loss", "value": 9.0, "z": 8.5, "action": "log"}
    folder = copy("seed1")
    with open(folder / "events.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(spike) + "\n" + json.dumps({**spike, "event": "rewind", "to": 4, "skipped": [6]}) + "\n")
    run = history.read_run(folder)
    mark, = charts.marks(run, 0, "loss")
    assert mark["step"] == [7, 7] and mark["y"] == [run.records[6]["loss"]] * 2
    assert mark["text"][0].endswith("step 7: spike: loss 9, z 8.5")
    assert mark["text"][1].endswith("rewind: loss 9, z 8.5: back to step 4, without the data of step 6")


def test_watching_ends_with_the_run(call_script, copy, monkeypatch):
    pytest.importorskip("plotly")
    folder, seen = copy("seed1"), []
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "events.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    path = folder / "page.html"

    def pause(seconds):
        seen.append((seconds, '"watch":5' in path.read_text(encoding="utf-8")))
        if len(seen) == 2:
            (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")

    monkeypatch.setattr(time, "sleep", pause)
    code, out, err = call_script("report.py", folder, f"--html={path}", "--watch=5")
    assert code == 0 and not err and "the runs have ended" in out
    assert seen == [(5.0, True)] * 2 and '"watch":0' in path.read_text(encoding="utf-8")
    assert [p.name for p in folder.glob("*.html*")] == ["page.html"]  # nothing half-written beside it


# -----------------------------------------------------------------------------
# Bands


def draw(rng, looks, shift=0.0):
    """A curve as seeds make them: one offset for the whole, and noise that lasts for some looks."""
    offset, noise, curve = rng.gauss(0, 0.5), rng.gauss(0, 0.87), []
    for i in range(looks):
        noise = 0.7 * noise + math.sqrt(1 - 0.49) * rng.gauss(0, 0.87)
        curve.append(100 - 20 * i / looks + offset + noise + shift)
    return list(range(1, looks + 1)), curve


def alarms(trials, looks, shift, needed, n=5):
    rng, raised = random.Random(1), 0
    for _ in range(trials):
        band = alarm.spread([draw(rng, looks) for _ in range(n)])
        raised += alarm.compare_curve(band, draw(rng, looks, shift), "loss", "loss", n, 0.0, needed).worse
    return raised / trials


@pytest.mark.parametrize("looks, needed", [(40, 4), (5, 0)])
def test_few_false_alarms_and_most_losses_found(looks, needed):
    """Of simulated runs of the same kind, the band of five seeds calls few worse, though it looks many times; and
    nearly all that are worse by nine standard deviations."""
    assert alarms(200, looks, 0.0, needed) <= 0.03
    assert alarms(100, looks, 9.0, needed) >= 0.8


def test_excursions():
    assert alarm.excursions([False, True, True, False, True]) == [(1, 2), (4, 4)]


def test_a_run_that_may_resume_compares_with_one_that_starts_from_the_same_model():
    keys = {name: key.default for name, key in read_keys(ROOT / "train.py").items()}
    one, two, other = ({**keys, "init_from": start} for start in ("out/base", "auto:out/base", "auto"))
    assert alarm.effective(one, {}) == alarm.effective(two, {}) != alarm.effective(other, {})


def test_every_key_of_train_is_decided():
    """A new key either changes what is learned (alarm.MATTERS, or a field of the model), so that runs that differ in it
    do not compare, or it does not (FREE above)."""
    keys = set(read_keys(ROOT / "train.py"))
    shape = {f.name for f in fields(GPTConfig)} - {"attn"}
    assert keys - FREE - set(alarm.MATTERS) - shape == set()
    assert not FREE & {*alarm.MATTERS, *shape} and set(alarm.MATTERS) <= keys


def drift(path):
    """{key: (in the reference, in the shipped config of that name)} where the two are no longer the same."""
    reference = json.loads(path.read_text(encoding="utf-8"))
    keys = read_keys(ROOT / "train.py")
    now = {name: key.default for name, key in keys.items()} | read_file(f"{ROOT}/config/{path.stem}.py", keys)
    found = reference["resolved"]
    then, now = alarm.effective(reference["config"], found), alarm.effective(now, {"vocab_size": found["vocab_size"]})
    now["gradient_accumulation_steps"] = now["gradient_accumulation_steps"] or 1
    return {key: (then.get(key), now.get(key)) for key in then.keys() | now.keys() if then.get(key) != now.get(key)}


def test_each_configuration_for_cpus_has_reference_curves():
    """But for the one of twelve minutes: five runs of it take an hour."""
    found = {path.stem for path in ROOT.glob("docs/reference/*.json")}
    assert found == {path.stem for path in ROOT.glob("config/shakespeare_char*.py")} - {"shakespeare_char_12min"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/reference/*.json")), ids=lambda path: path.stem)
def test_reference_curves_are_of_the_shipped_configs(path):
    assert drift(path) == {}
    assert alarm.read_baseline(path)["n"] >= alarm.LEAST


def test_drift_is_seen(tmp_path):
    """Negative control of the test above, which may have no file to look at."""
    keys = read_keys(ROOT / "train.py")
    config = {name: key.default for name, key in keys.items()}
    config |= read_file(f"{ROOT}/config/shakespeare_char_cpu.py", keys)
    path = tmp_path / "shakespeare_char_cpu.json"
    made = {"config": config, "resolved": {"vocab_size": 65, "gradient_accumulation_steps": 1}}
    path.write_text(json.dumps(made), encoding="utf-8")
    assert drift(path) == {}
    path.write_text(json.dumps({**made, "config": {**config, "learning_rate": 1.0}}), encoding="utf-8")
    assert drift(path) == {"learning_rate": (1.0, config["learning_rate"])}
    del config["wsd_decay_frac"], config["lr_schedule"]  # as if the file were older than these keys
    path.write_text(json.dumps(made), encoding="utf-8")
    assert set(drift(path)) == {"wsd_decay_frac", "lr_schedule"}  # which the shipped config does not leave as they were
    del config["bias"]
    path.write_text(json.dumps(made), encoding="utf-8")
    assert "bias" not in drift(path)


# -----------------------------------------------------------------------------
# The alarm


@pytest.fixture(scope="session")
def reference(seeds, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "tiny.json"
    alarm.write_reference(history.read_runs([seeds / f"seed{i}" for i in range(1, 6)]), path)
    return path


def test_the_reference_says_what_it_is_of(call_script, seeds, reference, tmp_path):
    path = tmp_path / "docs" / "again.json"
    code, out, err = call_script("report.py", *(seeds / f"seed{i}" for i in range(1, 6)), f"--reference={path}")
    assert code == 0 and not err and f"{path}: 5 seeds, 40 steps" in out
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made == {**json.loads(reference.read_text(encoding="utf-8")), "name": "again"}
    run = history.read_run(seeds / "seed1")
    assert (made["n"], made["seeds"]) == (5, [1, 2, 3, 4, 5]) and "seed" not in made["config"]
    assert made["dataset_sha256"] == run.env["dataset_sha256"] and made["commits"] == [run.env["commit"]]
    vals = [history.series(history.read_run(seeds / f"seed{i}"), "val_loss")[1][-1] for i in range(1, 6)]
    curve = made["curves"]["val_loss"]
    assert curve["step"] == [20, 40] and curve["tokens"] == [20 * 64, 40 * 64]
    assert curve["mean"][-1] == pytest.approx(statistics.mean(vals), abs=1e-6)
    assert curve["std"][-1] == pytest.approx(statistics.stdev(vals), abs=1e-6)
    assert (curve["min"][-1], curve["max"][-1]) == pytest.approx((min(vals), max(vals)), abs=1e-6)


@pytest.mark.parametrize("against", ["reference", "run"])
def test_another_seed_is_in_band(call_script, seeds, reference, against):
    baseline = reference if against == "reference" else seeds / "seed2"
    # seeds of so small a model differ more than those of the shipped configurations
    code, out, err = call_script("report.py", seeds / "seed6", f"--baseline={baseline}", "--loss_tolerance=0.25")
    assert code == 0 and not err and ": in band\n" in out and "WORSE" not in out
    assert "validation loss is in band" in out and "tokens/s 1,000 against 1,00" in out


@pytest.mark.parametrize("against", ["reference", "run"])
def test_five_percent_slower_is_an_alarm(call_script, seeds, reference, copy, against):
    slow = copy("seed6", lambda r: {**r, "tok_per_s": 0.95 * r["tok_per_s"]})
    command = ["report.py", slow, f"--baseline={reference if against == 'reference' else seeds / 'seed2'}"]
    code, out, _ = call_script(*command)
    assert code == 1 and "worse in tok_per_s" in out and out.count("WORSE") == 1
    assert re.search(r"WORSE tokens/s 950 against 1,00\d \(-5\.\d%, -3\.0% allowed\)", out)
    assert call_script(*command, "--speed_tolerance=0.06")[0] == 0


def test_more_memory_is_an_alarm(call_script, reference, copy):
    code, out, _ = call_script("report.py", copy("seed6", lambda r: {**r, "mem_gb": 0.55}), f"--baseline={reference}")
    assert code == 1 and "worse in mem_gb" in out and "(+10.0%, +5.0% allowed)" in out


def test_speed_on_another_machine_is_left_out(call_script, reference, copy):
    slow = copy("seed6", lambda r: {**r, "tok_per_s": 1})
    env = json.loads((slow / "env.json").read_text(encoding="utf-8"))
    (slow / "env.json").write_text(json.dumps({**env, "cpu": "an abacus"}), encoding="utf-8")
    code, out, _ = call_script("report.py", slow, f"--baseline={reference}")
    assert code == 0 and "speed and memory are not compared: cpu is an abacus, there" in out


@pytest.mark.parametrize("against", ["reference", "run"])
def test_a_worse_loss_is_an_alarm_that_says_where(call_script, seeds, reference, copy, against):
    """From step 25 on it learns nothing more, and then loses some."""
    def spoil(r):
        later = max(0, r["step"] - 24)
        return {**r, **{key: r[key] + 0.1 * later for key in ("loss", "val_loss") if key in r}}

    baseline = reference if against == "reference" else seeds / "seed2"
    code, out, _ = call_script("report.py", copy("seed6", spoil), f"--baseline={baseline}")
    assert code == 1 and "worse in loss, val_loss" in out
    assert (first := re.search(r"training loss is above the band at step (?:\d+, )*(\d+) to 40: ", out)), out
    assert 25 <= int(first.group(1)) <= 36
    assert re.search(r"validation loss is above the band at step 40: .* at step 40 \(\+\d+\.\d%\)", out)


def test_a_brief_excursion_is_no_alarm(call_script, reference, copy):
    jump = copy("seed6", lambda r: {**r, "loss": r["loss"] + 8 * (r["step"] == 30)})
    code, out, _ = call_script("report.py", jump, f"--baseline={reference}")
    assert code == 0 and "too short to count" in out and re.search(r"except at step 30", out)


def test_a_loss_that_is_no_number_is_an_alarm(call_script, reference, copy):
    broken = copy("seed6", lambda r: {**r, "loss": None} if r["step"] == 40 else r)
    code, out, _ = call_script("report.py", broken, f"--baseline={reference}")
    assert code == 1 and "training loss is not finite at step 40" in out


def test_a_run_on_its_way_is_compared_as_far_as_it_is(call_script, reference, copy):
    half = copy("seed6")
    lines = (half / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(lines[:24]), encoding="utf-8")
    code, out, _ = call_script("report.py", half, f"--baseline={reference}")
    assert code == 0 and re.search(r"training loss is in band: .* at step 24", out)
    assert re.search(r"validation loss is in band: .* at step 20", out)


def test_the_findings_are_on_the_page(call_script, reference, copy):
    pytest.importorskip("plotly")
    slow = copy("seed6", lambda r: {**r, "tok_per_s": 900})
    code, _, _ = call_script("report.py", slow, f"--baseline={reference}", f"--html={slow / 'page.html'}")
    text = (slow / "page.html").read_text(encoding="utf-8")
    assert code == 1 and "<b>worse</b>tokens/s 900 against" in text and text.count('"role":"band"') == 2


# -----------------------------------------------------------------------------
# What cannot be done, in one line


def refused(done):
    code, _, err = done
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_what_is_no_run_is_refused(call_script, seeds, copy, tmp_path):
    assert "whose report?" in refused(call_script("report.py"))
    assert "no run folder" in refused(call_script("report.py", tmp_path / "none"))
    assert "holds no config.json" in refused(call_script("report.py", tmp_path))
    assert "given twice" in refused(call_script("report.py", seeds / "seed1", seeds / "seed1"))
    folder = copy("seed1")
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    assert "logged no step yet" in refused(call_script("report.py", folder))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\nnonsense\n', encoding="utf-8")
    assert "metrics.jsonl:2 is no record" in refused(call_script("report.py", folder))
    (folder / "metrics.jsonl").write_text('{"loss": 1.0}\n', encoding="utf-8")
    assert "without a step" in refused(call_script("report.py", folder))
    (folder / "env.json").write_text("[1]", encoding="utf-8")
    assert "JSON object" in refused(call_script("report.py", folder))


def test_what_does_not_go_together_is_refused(call_script, seeds):
    assert "x='steps'" in refused(call_script("report.py", seeds / "seed1", "--x=steps"))
    assert "--html" in refused(call_script("report.py", seeds / "seed1", "--watch=5"))
    both = [f"--baseline={seeds / 'seed2'}", "--watch=5", "--html=a.html"]
    assert "does not go with" in refused(call_script("report.py", seeds / "seed1", *both))


def test_baselines_that_are_none_are_refused(call_script, seeds, other, tmp_path):
    run = seeds / "seed1"
    assert "no baseline" in refused(call_script("report.py", run, f"--baseline={tmp_path / 'none.json'}"))
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    assert "no reference curves" in refused(call_script("report.py", run, f"--baseline={tmp_path / 'a.json'}"))
    err = refused(call_script("report.py", run, f"--baseline={other}"))
    assert "learning_rate=0.01 (there 0.02)" in err and "pos=learned (there rope)" in err and "seed" not in err[60:]


def test_other_data_is_refused(call_script, seeds, copy):
    folder = copy("seed1")
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    (folder / "env.json").write_text(json.dumps({**env, "dataset_sha256": "0" * 64}), encoding="utf-8")
    assert "another dataset" in refused(call_script("report.py", folder, f"--baseline={seeds / 'seed2'}"))


def test_a_sparser_log_is_refused(call_script, seeds, copy):
    folder = copy("seed1")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[9::10]), encoding="utf-8")
    assert "same log_interval (1)" in refused(call_script("report.py", folder, f"--baseline={seeds / 'seed2'}"))


def test_no_reference_of_few_or_equal_or_unfinished_runs(call_script, seeds, copy, tmp_path):
    path = tmp_path / "r.json"
    runs = [seeds / f"seed{i}" for i in range(1, 5)]
    assert "at least 5" in refused(call_script("report.py", *runs, f"--reference={path}"))
    twin = copy("seed1", to="twin")
    assert "seeds that differ" in refused(call_script("report.py", *runs, twin, f"--reference={path}"))
    going = copy("seed5", to="going")
    (going / "events.jsonl").write_text("", encoding="utf-8")
    assert "did not end" in refused(call_script("report.py", *runs, going, f"--reference={path}"))
    assert not path.exists()


def test_a_missing_package_is_named(call_script, seeds, monkeypatch, tmp_path):
    for package, key in (("plotly", "html"), ("matplotlib", "png")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        err = refused(call_script("report.py", seeds / "seed1", f"--{key}={tmp_path / 'a'}"))
        assert f"needs the package {package}: pip install -e '.[report]'" in err and not (tmp_path / "a").exists()


def test_torch_is_not_needed_for_more_than_counting():
    """The model that gives FLOPs and parameters has no storage, so that a report of a large one is quick."""
    model = history.model_of({"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024}, {"vocab_size": 50257})
    assert {p.device for p in model.parameters()} == {torch.device("meta")}


# -----------------------------------------------------------------------------
# An ablation's results


def test_the_tables_of_an_ablation(call_script, tmp_path):
    curve = {"tokens": [100, 1000], "val_loss": [2.0, 1.5], "wall_s": [1.0, 10.0]}
    rows = [{"variant": name, "seed": seed, "against": None if name == "base" else "base", "diverged": False,
             "val_loss": loss + seed / 1000, "curve": curve, "flops_per_token": 10.0, "tokens": 1000, "wall_s": 10.0}
            for name, loss in (("base", 1.5), ("rope", 1.4)) for seed in (1, 2, 3)]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, err = call_script("report.py", path, f"--png={tmp_path / 'curves.png'}")
    assert code == 0 and not err
    assert "## Against base" in out and "1.4020 ± 0.0010 (3) | **-0.1000**" in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for key in ("--html=page.html", "--labels=a"):
        code, _, err = call_script("report.py", path, key)
        assert code == 2 and err.count("\n") == 1 and "results of an ablation alone" in err
    path.write_text("nothing\n", encoding="utf-8")
    code, _, err = call_script("report.py", path)
    assert code == 2 and f"{path}:1 is no row" in err


# -----------------------------------------------------------------------------
# A picture of reference curves

CURVES = [ROOT / "docs" / "reference" / f"shakespeare_char_{name}.json" for name in ("nanogpt", "cpu", "demo")]


def test_reference_curves_over_time(call_script, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "docs" / "loss.png"
    code, out, err = call_script("report.py", *CURVES, f"--png={path}")
    assert code == 0 and not err and f"written to {path}" in out
    head = path.read_bytes()[:24]
    assert head[:4] == b"\x89PNG" and [int.from_bytes(head[i : i + 4], "big") for i in (16, 20)] == [1200, 600]


def test_a_reference_knows_its_seconds():
    """100 tokens at 50 tokens/s take 2 s, the next 300 at 100 take 3 s more."""
    speed = {"step": [10, 40], "tokens": [100, 400], "mean": [50.0, 100.0]}
    assert pictures.seconds_at({"curves": {"tok_per_s": speed}}) == {10: 2.0, 40: 5.0}


def test_the_labels_stand_at_the_lines(monkeypatch, tmp_path):
    """Its name, its last validation loss and the time; below the end where another curve passes on the right."""
    figures = pytest.importorskip("matplotlib.figure")
    save, drawn = figures.Figure.savefig, []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path: (drawn.append(figure), save(figure, path)))
    pictures.loss_over_time([alarm.read_baseline(path) for path in CURVES], ("a", "b", "c"), tmp_path / "a.png")
    ax = drawn[0].axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert [text.splitlines()[0] for text in texts] == ["a", "b", "c"]
    assert texts[0].splitlines()[1].startswith("1.90 after 4") and texts[1].splitlines()[1].startswith("1.87 after ")
    assert [text.get_ha() for text in ax.texts] == ["left", "right", "left"]
    assert len(ax.lines) == 6 and len(ax.collections) == 3  # line and dots of each, and its band


def test_labels_come_from_the_names():
    names = ["shakespeare_char_nanogpt", "shakespeare_char_12min", "shakespeare_char"]
    assert pictures.labels_of(names[:2]) == ["nanogpt", "12min"]
    assert pictures.labels_of(names) == ["char nanogpt", "char 12min", "char"]
    assert pictures.labels_of(["tiny_text"]) == ["tiny text"]


def test_curves_that_make_no_picture_are_refused(call_script, seeds, tmp_path):
    png = f"--png={tmp_path / 'a.png'}"
    assert "not both" in refused(call_script("report.py", CURVES[0], seeds / "seed1", png))
    assert "--png=FILE" in refused(call_script("report.py", CURVES[0]))
    assert "--png=FILE" in refused(call_script("report.py", CURVES[0], png, "--html=a.html"))
    assert "2 names for 1 files" in refused(call_script("report.py", CURVES[0], png, "--labels=a,b"))
    assert "labels is for" in refused(call_script("report.py", seeds / "seed1", "--labels=a"))
    assert "no baseline" in refused(call_script("report.py", tmp_path / "none.json", png))
    assert not (tmp_path / "a.png").exists()
