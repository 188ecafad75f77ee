"""ablate.py runs what is missing, once, and a killed experiment ends with the same rows as an unbroken one."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runs import TINY, records  # noqa: E402

import ablate as plain_ablate  # noqa: E402
from configurator import Settings, configure, read_file, read_keys  # noqa: E402
from reporting.experiment import OURS, code_sha256, question, read_experiment  # noqa: E402

pytest_plugins = ["runs"]

# kills train.py when it has written the record of step 6, of the run whose folder is named
KILL = """
import os, signal
from training import monitor
write = monitor.Run.metrics
def metrics(self, record):
    write(self, record)
    if record["step"] == 6 and self.dir.name == "rope_seed1":
        os.kill(os.getpid(), signal.SIGKILL)
monitor.Run.metrics = metrics
"""


@pytest.fixture
def lab(tmp_path, words, train, monkeypatch, capsys):
    """lab(*words) is `python ablate.py EXPERIMENT *words` in this process, but train.py runs from runs.py's server.

    -> code, out, err and `trained`, the runs that train.py was started for.
    """
    base, path, out = tmp_path / "base.py", tmp_path / "small.py", tmp_path / "out" / "ablations" / "small"
    settings = {**TINY, "dataset": str(words), "out_dir": "out/small"}
    base.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()), encoding="utf-8")

    def write(variants='{"base": {}, "rope": {"pos": "rope"}}', **more):
        more = {"base": str(base), "seeds": (1, 2), "common": {"log_interval": 2}, **more}
        lines = [f"{name} = {value!r}\n" for name, value in more.items() if value is not None]
        path.write_text(f'"""Is it better?\n\nMore."""\nvariants = {variants}\n' + "".join(lines), encoding="utf-8")

    def lab(*line, before="", **patches):
        spec = importlib.util.spec_from_file_location("ablate", ROOT / "ablate.py")
        ablate = importlib.util.module_from_spec(spec)  # a new one, with the defaults of its keys
        spec.loader.exec_module(ablate)
        trained = []

        def run(argv, log):
            trained.append(next(word for word in argv if word.startswith("--out_dir=")).rpartition("/")[2])
            train.start(*argv, before=before, **dict.fromkeys(TINY, ""))
            done = train.wait()
            log.write((done.out + done.err).encode())
            log.flush()
            return done.code

        ablate.train = run
        for name, value in patches.items():
            setattr(ablate, name, value)
        paths, rest = ablate.split_words([str(path), f"--out_dir={out}", *line])
        given, code = set(), 0
        try:
            c = Settings(configure(vars(ablate), rest, given=given, also=ROOT / "train.py"))
            ablate.main(c, paths, given)
        except SystemExit as end:
            code = end.code or 0
        except KeyboardInterrupt:
            code = 130
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err, trained=trained)

    lab.write, lab.path, lab.base, lab.out = write, path, base, out
    write()
    return lab


def rows_of(out):
    """The rows of results.jsonl, without the fields that differ between repeats."""
    rows = records(out, "results.jsonl")
    for row in rows:
        row["curve"].pop("wall_s")
        for key in plain_ablate.TIMINGS:
            row.pop(key)
    return rows


@pytest.fixture(scope="module")
def made():
    return []


@pytest.fixture
def whole(lab, made, tmp_path):
    """The rows of the lab's first experiment without interruption, made once."""
    if not made:
        assert lab(f"--out_dir={tmp_path / 'whole'}").code == 0
        made += rows_of(tmp_path / "whole")
    return made


def one_line(done):
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert not done.trained
    return done.err


# -----------------------------------------------------------------------------
# Running


@pytest.mark.slow
def test_what_is_missing_is_run_once(lab, whole):
    plan = lab("--dry_run")
    assert "4 runs: 0 finished, 0 begun, 4 missing; no estimate" in plan.out and "Is it better?\n" in plan.out
    assert not plan.trained and not lab.out.exists()

    done = lab()
    assert done.code == 0, done.err
    assert done.trained == ["base_seed1", "rope_seed1", "base_seed2", "rope_seed2"], "a part of it compares already"
    text = (lab.out / "results.jsonl").read_bytes()
    rows = records(lab.out, "results.jsonl")
    assert [(row["variant"], row["seed"]) for row in rows] == [("base", 1), ("base", 2), ("rope", 1), ("rope", 2)]
    metrics, env = (json.loads((lab.out / "rope_seed2" / name).read_text(encoding="utf-8").splitlines()[-1] if
                    name == "metrics.jsonl" else (lab.out / "rope_seed2" / name).read_text(encoding="utf-8"))
                    for name in ("metrics.jsonl", "env.json"))
    row = rows[-1]
    assert row["tokens"] == metrics["tokens"] == 12 * 4 * 16 and row["curve"]["tokens"] == [256, 512, 768]
    assert row["curve"]["val_loss"][-1] == metrics["val_loss"] and row["best"] == min(row["curve"]["val_loss"])
    assert row["commit"] == env["commit"] and row["environment_sha256"] == env["environment_sha256"]
    assert row["dataset_sha256"] == env["dataset_sha256"] and row["dtype"] == "float32" and row["threads"] == 1
    config = json.loads((lab.out / "rope_seed2" / "config.json").read_text(encoding="utf-8"))
    defaults = {name: key.default for name, key in read_keys(ROOT / "train.py").items()}
    assert row["config"] == {key: value for key, value in config.items()
                             if value != defaults[key] and key not in OURS}
    assert row["config"]["pos"] == "rope" and config["seed"] == 2 and row["against"] == "base"
    assert rows[0]["against"] is None and row["params"] == rows[0]["params"] - 16 * 32, "no table of positions"
    assert row["flops_per_token"] > 0 and row["kv_bytes_per_token"] == 2 * 32 * 2 and row["spikes"] == 0
    assert len({row["code_sha256"] for row in rows}) == 1 and len({row["config_sha256"] for row in rows}) == 2
    # all of the validation split, in fp32; TINY's evaluations see all of this small one, in fp32, too
    assert row["val_tokens"] == metrics["val_tokens"] and row["val_sha256"] == metrics["val_sha256"]
    assert row["val_loss"] == pytest.approx(metrics["val_loss"], rel=1e-5)
    assert not (lab.out / "rope_seed2" / "ckpt").exists()

    again = lab()
    assert again.code == 0 and not again.trained and (lab.out / "results.jsonl").read_bytes() == text
    assert "4 finished, 0 begun, 0 missing; about 0 minutes" in lab("--dry_run").out
    assert lab("--seeds=3", "--only=rope").trained == ["rope_seed3"]
    assert len(records(lab.out, "results.jsonl")) == 5
    assert rows_of(lab.out)[:4] == whole


@pytest.mark.slow
def test_a_killed_run_goes_on_and_the_rows_are_the_same(lab, whole):
    killed = lab(before=KILL)
    assert killed.code == 2 and killed.trained == ["base_seed1", "rope_seed1"]
    assert "rope_seed1: train.py was ended by SIGKILL" in killed.err and killed.err.count("\n") == 1
    assert [row["variant"] for row in records(lab.out, "results.jsonl")] == ["base"]
    assert "1 finished, 1 begun, 2 missing" in lab("--dry_run").out

    def interrupted(folder, config):
        raise KeyboardInterrupt

    assert lab(final_loss=interrupted).code == 130  # trained to the end, but there is no result yet
    assert (lab.out / "rope_seed1" / "ckpt" / "step_00000012").exists()
    done = lab()
    assert done.code == 0 and done.trained == ["rope_seed1", "base_seed2", "rope_seed2"]
    events = [event["event"] for event in records(lab.out / "rope_seed1", "events.jsonl")]
    assert events.count("start") == 1 and events.count("resume") == 1
    assert rows_of(lab.out) == whole


def test_the_parts_are_the_whole(lab, whole):
    first = lab("--part=0/2")
    assert first.trained == ["base_seed1", "base_seed2"] and len(rows_of(lab.out)) == 2
    second = lab("--part=1/2")
    assert second.trained == ["rope_seed1", "rope_seed2"]
    assert rows_of(lab.out) == whole


def test_what_another_process_is_at_is_left_to_it(lab):
    """Somebody holds a run until all others are done: it is skipped, waited for, and then found undone."""
    log = lab.out / "logs" / "base_seed1.txt"
    held = threading.Event()

    def hold():
        with plain_ablate.locked(log):
            held.set()
            deadline = time.monotonic() + 60
            while not (lab.out / "rope_seed2" / "ablation.json").exists() and time.monotonic() < deadline:
                time.sleep(0.01)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    done = lab()
    holder.join()
    assert done.code == 0 and done.trained == ["rope_seed1", "base_seed2", "rope_seed2", "base_seed1"]
    assert len(rows_of(lab.out)) == 4


def test_a_run_that_diverges_is_a_row(lab):
    lab.write('{"base": {}, "hot": {"learning_rate": 1e30, "grad_clip": 0}}', seeds=(1,))
    done = lab()
    assert done.code == 0, done.err
    base, hot = records(lab.out, "results.jsonl")
    assert not base["diverged"] and hot["diverged"] and hot["val_loss"] is None
    assert "is not finite" in hot["stopped_by"] and f"hot_seed1: {hot['stopped_by']}" in done.out
    assert not lab().trained


def test_another_failure_ends_it_naming_the_run(lab):
    broken = "import model\ndef broken(*a): raise RuntimeError('the dog ate it')\nmodel.Block.forward = broken"
    done = lab(before=broken)
    assert done.code == 2 and done.trained == ["base_seed1"] and done.err.count("\n") == 1
    assert "base_seed1: train.py exited with 1: RuntimeError: the dog ate it" in done.err
    assert lab().code == 0


# -----------------------------------------------------------------------------
# Other code and other settings


def test_runs_of_other_code_are_named_and_decided_on(lab):
    assert lab("--seeds=1").code == 0
    before = rows_of(lab.out)
    message = one_line(lab(code_sha256=lambda: "new"))
    assert "other code: base_seed1, rope_seed1" in message and "--stale=rerun" in message
    assert "base_seed1                       finished, of other code" in lab("--dry_run", code_sha256=lambda: "new").out

    kept = lab("--stale=keep", code_sha256=lambda: "new")
    assert kept.trained == ["base_seed2", "rope_seed2"]
    rows = rows_of(lab.out)
    assert [row for row in rows if row["seed"] == 1] == before
    assert [row["code_sha256"] for row in rows] == [before[0]["code_sha256"], "new"] * 2

    again = lab("--stale=rerun", code_sha256=lambda: "new")
    assert again.trained == ["base_seed1", "rope_seed1"]
    assert {row["code_sha256"] for row in rows_of(lab.out)} == {"new"}
    assert not list(lab.out.glob("*.removed"))


def test_a_begun_run_never_goes_on_with_other_code(lab):
    assert lab("--only=rope", "--seeds=1", before=KILL).code == 2
    one_line(lab("--only=rope", "--seeds=1", code_sha256=lambda: "new"))
    done = lab("--only=rope", "--seeds=1", "--stale=keep", code_sha256=lambda: "new")
    assert done.code == 0 and done.trained == ["rope_seed1"]
    assert [event["event"] for event in records(lab.out / "rope_seed1", "events.jsonl")][0] == "start"
    assert "resume" not in (lab.out / "rope_seed1" / "events.jsonl").read_text(encoding="utf-8")


def test_other_settings_are_noticed_where_they_are(lab):
    assert lab("--seeds=1").code == 0
    lab.write('{"base": {}, "rope": {"pos": "rope", "rope_theta": 500.0}}')
    message = one_line(lab("--seeds=1"))
    assert "other settings: rope_seed1;" in message
    assert "other settings: base_seed1, rope_seed1;" in one_line(lab("--seeds=1", "--weight_decay=0"))
    assert lab("--seeds=1", "--stale=rerun").trained == ["rope_seed1"]


def test_a_run_of_somebody_else_is_not_touched(lab):
    folder = lab.out / "base_seed1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert "did not begin" in one_line(lab("--stale=rerun"))
    assert (folder / "config.json").exists()


def test_the_code_is_what_train_imports(tmp_path):
    files = {"train.py": "import a\nfrom b import x\n", "a.py": "def f():\n    import c\n", "b.py": "x = 1\n",
             "c.py": "", "other.py": "y = 1\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    names = [code_sha256(tmp_path)]
    for name in ("other.py", "c.py", "b.py", "train.py"):
        (tmp_path / name).write_text(files[name] + "z = 2\n", encoding="utf-8")
        names.append(code_sha256(tmp_path))
    assert names[0] == names[1] and len(set(names)) == 4


@pytest.mark.parametrize("line", ["from training import guard", "from training.guard import Guard",
                                  "import training.guard"])
def test_the_code_in_folders_counts(line, tmp_path):
    """A file of a folder is found by each way to import it, and so is what it imports; its neighbours do not count."""
    files = {"train.py": f"{line}\n", "training/guard.py": "from reporting import rows\nclass Guard: pass\n",
             "training/other.py": "", "reporting/rows.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    names = [code_sha256(tmp_path)]
    for name in ("training/other.py", "training/guard.py", "reporting/rows.py"):
        (tmp_path / name).write_text(files[name] + "z = 2\n", encoding="utf-8")
        names.append(code_sha256(tmp_path))
    assert names[0] == names[1] and len(set(names)) == 3


# -----------------------------------------------------------------------------
# What a user can get wrong


@pytest.mark.parametrize("variants, more, named", [
    ('{"base": {}, "rope": {"poss": "rope"}}', {}, "small.py:4: variant rope: unknown key poss; did you mean pos?"),
    ('{"base": {}, "rope": {"pos": "ropes"}}', {}, "variant rope: pos='ropes' is not one of learned, rope"),
    ('{"base": {}, "wide": {"n_embd": "big"}}', {}, "variant wide: n_embd takes a whole number, not 'big'"),
    ('{"base": {}, "wide": {"seed": 3}}', {}, "variant wide: ablate.py sets seed"),
    ('{"base": {}, "b c": {}}', {}, "'b c' is no name for a variant"),
    ('{}', {}, "variants is a dict"),
    ('{"base": {}}', {"common": {"n_layers": 2}}, "common: unknown key n_layers; did you mean n_layer?"),
    ('{"base": {}}', {"base": "config/none.py"}, "no config file"),
    ('{"base": {}}', {"base": None}, "binds no base"),
    ('{"base": {}}', {"seeds": (1, 1)}, "seeds has one twice"),
    ('{"base": {}, "rope": {}}', {"against": {"rope": "bas"}}, "against names 'bas', which is no variant; did you"),
    ('{"base": {}}', {"common": {"tokens_per_run": 100}}, "tokens_per_run=100 is not a multiple of the 64 tokens"),
    ('{"base": {}}', {"common": {"tokens_per_run": 64, "max_iters": 1}}, "max_iters and tokens_per_run contradict"),
    ('{"base": {}}', {"common": {"flops_per_run": 1e9, "context_start": 4}}, "flops_per_run needs context_start=0"),
    ('{"base": {}}', {"common": {"dataset": "shakespear"}}, "no dataset 'shakespear'"),
    ('{"base": {}}', {"bases": "x"}, "unknown key bases; did you mean base?"),
])
def test_a_mistake_in_the_file_is_one_line_before_anything_runs(variants, more, named, lab):
    lab.write(variants, **more)
    assert named in one_line(lab())
    assert not lab.out.exists()


@pytest.mark.parametrize("line, named", [
    (("--part=2/2",), "part=2/2 is not of the form i/n"),
    (("--stale=maybe",), "not one of stop, keep, rerun"),
    (("--only=ropes",), "--only=ropes is no variant of"),
    (("--seed=3",), "ablate.py sets seed"),
    (("--learnin_rate=3",), "did you mean --learning_rate?"),
    (("another.py",), "which experiment?"),
])
def test_a_mistake_on_the_command_line_is_one_line(line, named, lab):
    assert named in one_line(lab(*line))
    assert not lab.out.exists()


def test_budgets_become_steps_and_the_later_one_counts(lab):
    keys = read_keys(ROOT / "train.py")

    def steps(given=None, **more):
        lab.write('{"base": {}, "long": {"tokens_per_run": 640}}', **more)
        experiment = read_experiment(str(lab.path), keys)
        found = [plain_ablate.resolve(experiment, name, given or {}, keys, "") for name in experiment.variants]
        return [variant.config["max_iters"] for variant in found], found[0]

    assert steps()[0] == [12, 10]
    assert steps(common={"tokens_per_run": 320})[0] == [5, 10]
    assert steps({"max_iters": 7}, common={"tokens_per_run": 320})[0] == [7, 10]
    (few, _), base = steps(common={"flops_per_run": 1e8})
    assert few == round(1e8 / (base.sizes["flops_per_token"] * 64))
    assert "--max_iters=5" in steps(common={"tokens_per_run": 320})[1].flags


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "ablations").glob("*.py")), ids=lambda path: path.stem)
def test_the_experiments_that_are_there_make_sense(path, words, monkeypatch):
    """Every variant resolves, is another run than each other one, and all but a scaling study see the same tokens."""
    keys = read_keys(ROOT / "train.py")
    experiment = read_experiment(str(path), keys)
    # their datasets may not be there: this one takes their place
    found = [plain_ablate.resolve(experiment._replace(variants={name: {**variant, "dataset": str(words)}}), name, {},
                                  keys, "") for name, variant in experiment.variants.items()]
    few = {"pilot": (3, 1), "learning_rate_bpe": (6, 3), "speedruns": (5, 3), "speedruns_bpe": (4, 3),
           "speedruns_pilot": (2, 1)}
    least = few.get(path.stem, (10, 3))
    assert len({variant.identity["config_sha256"] for variant in found}) == len(found) >= least[0]
    assert len(experiment.seeds) >= least[1]
    assert re.search(r"[?]", question(path))
    budgets = {variant.config["max_iters"] for variant in found}
    assert len(budgets) == 1 or path.stem == "scaling"
    for name, other in experiment.against.items():
        assert other is None or other in experiment.variants and other != name


def test_the_presets_are_what_was_compared():
    keys, experiment = read_keys(ROOT / "train.py"), ROOT / "config" / "ablations" / "architecture.py"
    variants = read_experiment(str(experiment), keys).variants
    later = read_experiment(str(experiment.with_name("speedruns.py")), keys).variants["both"]
    variants["stack"] = {**variants["stack"], **later}
    base = read_file(str(ROOT / "config" / "shakespeare_char_gpt2.py"), keys)
    defaults = {name: key.default for name, key in keys.items()}
    for preset, variant in (("gpt2", "base"), ("stack", "stack")):
        for name, value in read_file(str(ROOT / "config" / f"{preset}.py"), keys).items():
            assert value == {**defaults, **base, **variants[variant]}[name], name


# -----------------------------------------------------------------------------
# The program itself


@pytest.mark.slow
def test_the_program_can_be_killed_and_stopped(lab, whole):
    """SIGKILL: its train.py lives on, and whoever comes next waits for that. SIGTERM: train.py saves, then both end."""
    lab.write(seeds=(1,))
    command = [sys.executable, str(ROOT / "ablate.py"), str(lab.path)]

    def start():
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                                cwd=lab.base.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def wait_for(path):
        deadline = time.monotonic() + 120
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    killed = start()
    wait_for(lab.out / "base_seed1" / "ablation.json")
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = start()
    wait_for(lab.out / "rope_seed1" / "metrics.jsonl")
    again.send_signal(signal.SIGTERM)
    out, err = again.communicate(timeout=120)
    assert again.returncode in (143, -signal.SIGTERM), err  # the latter where it was evaluating
    done = start()
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0 and "2 rows in" in out, err
    assert rows_of(lab.out) == [row for row in whole if row["seed"] == 1]
