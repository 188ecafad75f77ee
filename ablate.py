"""
Ablations: variants of one configuration, each with several seeds, under one budget, into one results file.

    python ablate.py config/ablations/architecture.py --dry_run
    python ablate.py config/ablations/architecture.py
    python ablate.py config/ablations/architecture.py --part=0/2      # and --part=1/2 beside it
    python report.py out/ablations/architecture/results.jsonl

An experiment is a Python file: its docstring asks the question, and it binds base, common, variants, against and seeds
(reporting/experiment.py says how).

Any key of train.py on the command line counts for all runs: over `common`, under the keys that a variant changes. Each
run is train.py with --init_from=auto in a folder of its own, so a killed run resumes, and a finished one is never
repeated. When it ends, eval.py's loss of the whole validation split in fp32 is its result. Then OUT/results.jsonl is
rewritten: a row for each finished run, by variant and seed. A run that diverges is also a row.
"""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
from configurator import Settings, configure, fail, nearest, read_file, read_keys, show
from dataset import open_datasets, open_tokens
from device import pick_device
from eval import evaluate
from files import sha256, write_whole
from infer import load
from loader import evaluation_rows
from plan import meta_model, model_fields
from reporting.experiment import BUDGETS, OURS, checked, code_sha256, question, read_experiment, steps_of
from reporting.tables import divergence, figures
from training.start import vocabulary

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from working on one run
    fcntl = None

# -----------------------------------------------------------------------------
out_dir = ""                   # where the run folders and results.jsonl go; empty: out/ablations/NAME
seeds: tuple[int, ...] = ()    # seeds to run; (): the experiment's
only: tuple[str, ...] = ()     # variants to run; (): all
part = "0/1"                   # 1/2: every second run, from the second; the other part may run beside it
stale = "stop"                 # runs of other code, settings or data: stop | keep (finished ones count as they are,
                               # others begin again) | rerun
keep_weights = False           # keep the checkpoints of finished runs
dry_run = False                # show what there is and what is missing, and run nothing
# -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
RECORD = "ablation.json"  # in a run's folder: its identity, and once it is finished its whole row
TIMINGS = ("wall_s", "tok_per_s", "mem_gb", "run_s")  # of a row, like its curve's wall_s: they differ between repeats
IDENTITY = {"code": "code_sha256", "settings": "config_sha256", "data": "dataset_sha256"}


class Variant(NamedTuple):
    """A run of train.py, except for its seed and folder."""

    name: str
    config: dict    # all keys of train.py, less OURS
    flags: list     # the command line that turns train.py's defaults and the base into this config
    sizes: dict     # of the model: params, flops_per_token, kv_bytes_per_token
    identity: dict  # the three hashes of IDENTITY


class Trial(NamedTuple):
    """One run of train.py: a variant with one seed, in a folder of its own."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def name(self):
        return self.folder.name


# -----------------------------------------------------------------------------
# The plan


def resolve(experiment, name, given, keys, code):
    """The Variant of this name. `given`: overrides from the command line; `keys`: train.py's; `code`: its hash.

    Everything is checked that can be checked before train.py runs. Ends the run where it makes no sense.
    """
    base = read_file(experiment.base, keys)
    base = {key: value for key, value in base.items() if key not in OURS}
    settings = {}
    for level in (base, experiment.common, given, experiment.variants[name]):
        if any(budget in level for budget in BUDGETS):  # a later budget replaces an earlier one of another kind
            settings = {key: value for key, value in settings.items() if key not in BUDGETS}
        settings |= level
    config = {}
    for key in keys.values():
        if key.name not in OURS:
            config[key.name] = settings.get(key.name, key.default)
    where = f"{experiment.path}: variant {name}"
    try:
        datasets, manifest, dataset_sha256 = open_datasets(config["dataset"])
        fields = model_fields(config)
        fields["vocab_size"] = fields["vocab_size"] or vocabulary(datasets[0][0], manifest)[1]
        model = meta_model(fields)
    except (ValueError, OSError) as error:
        fail(f"{where}: {error}")
    flops_per_token = None
    if not config["context_start"]:  # with a growing context a token's FLOPs change during the run
        flops_per_token = model.train_flops(config["block_size"])
    config["max_iters"] = steps_of(settings, config, flops_per_token, where)

    flags = []
    start = {**{key.name: key.default for key in keys.values()}, **base}
    for key, value in config.items():
        if value != start[key]:
            flags.append(f"--{key}={value if isinstance(value, str) else show(value)}")
    sizes = {"params": model.num_params(), "flops_per_token": flops_per_token,
             "kv_bytes_per_token": model.kv_cache_bytes(1, torch.bfloat16)}
    identity = {"code_sha256": code, "config_sha256": sha256(json.dumps(config, sort_keys=True)),
                "dataset_sha256": dataset_sha256}
    return Variant(name, config, flags, sizes, identity)


def plan_runs(c, experiment, variants):
    """The runs of this part: seeds outermost, so that an unfinished experiment already compares all variants."""
    runs = []
    for seed in c.seeds or experiment.seeds:
        for variant in variants:
            if not c.only or variant.name in c.only:
                runs.append(Trial(variant, seed, Path(c.out_dir) / f"{variant.name}_seed{seed}"))
    return pick_part(runs, c.part)


def pick_part(runs, part):
    """The runs of part i/n: every n-th. Ends the run for another form."""
    i, _, n = part.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        fail(f"part={part} is not of the form i/n, with i from 0 to n - 1, such as 0/2 and 1/2")
    return runs[int(i) :: int(n)]


# -----------------------------------------------------------------------------
# Run folders


def read_record(folder):
    """A run's RECORD, or None."""
    try:
        return json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        fail(f"{Path(folder) / RECORD} cannot be read ({error}); remove {folder} to run it again")


def write_record(folder, record):
    write_whole(Path(folder) / RECORD, json.dumps(record), durable=True)


def is_finished(record):
    return record is not None and "diverged" in record


def state_of(run):
    """-> ("missing" | "begun" | "finished", the names in IDENTITY that differ from the current code, settings, data)

    The names are ["origin"] if ablate.py did not make the folder.
    """
    record = read_record(run.folder)
    if not (run.folder / "config.json").exists():
        return "missing", []
    if record is None:
        return "begun", ["origin"]
    identity = run.variant.identity
    differences = [name for name, key in IDENTITY.items() if record.get(key) != identity[key]]
    return "finished" if is_finished(record) else "begun", differences


def check_stale(c, runs):
    """If there are runs of other code, settings or data, end the command or print a line."""
    stale_runs = {}  # "code" -> names of runs of other code
    for run in runs:
        for name in state_of(run)[1]:
            stale_runs.setdefault(name, []).append(run.name)
    if not stale_runs:
        return
    if "origin" in stale_runs:
        fail(f"ablate.py did not begin the run {Path(c.out_dir) / stale_runs['origin'][0]}; take another --out_dir")
    parts = []
    for name, names in stale_runs.items():
        text = f"other {name}: {', '.join(names[:6])}"
        if len(names) > 6:
            text += f" and {len(names) - 6} more"
        parts.append(text)
    if c.stale == "stop" and not c.dry_run:
        fail(f"{c.out_dir} has runs of {'; '.join(parts)}; --stale=rerun runs them again, --stale=keep counts finished "
             "ones as they are, or take another --out_dir")
    print(f"{c.stale}: runs of {'; '.join(parts)}")


def remove(folder):
    """Remove a run folder. It is renamed first, so that a half-removed one is never resumed."""
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed)


@contextmanager
def locked(path, wait=False):
    """Open `path` for appending, and lock it. Yields None if another process has the lock.

    A child process inherits the file and its lock: a train.py that outlives a killed ablate.py keeps its run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def collect(experiment, out_dir):
    """Rewrite results.jsonl from the finished runs in the folder, by variant and seed. -> the rows"""
    out_dir = Path(out_dir)
    order = {name: i for i, name in enumerate(experiment.variants)}
    rows = []
    with locked(out_dir / "logs" / "results.lock", wait=True):  # or another part could write what it read before
        for path in out_dir.glob(f"*/{RECORD}"):
            row = read_record(path.parent)
            if path.parent.suffix != ".removed" and is_finished(row) and row["variant"] in order:
                against = experiment.against[row["variant"]]
                rows.append({"variant": row["variant"], "seed": row["seed"], "against": against, **row})
        rows.sort(key=lambda row: (order[row["variant"]], row["seed"]))
        write_whole(out_dir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows), durable=True)
    return rows


# -----------------------------------------------------------------------------
# One run


def train(words, log):
    """Run train.py with these words, its output in `log`. -> its exit code, below 0 for a signal

    SIGINT, SIGTERM and SIGHUP are passed on: train.py finishes its step and saves, and then ablate.py ends.
    """
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *words], stdin=subprocess.DEVNULL, stdout=log,
                               stderr=log, start_new_session=True)  # so that Ctrl-C does not reach it twice
    caught = []

    def stop(signum, frame):
        if caught:
            process.kill()
        else:
            process.terminate()
        caught.append(signum)

    signums = {signal.SIGINT, signal.SIGTERM}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signums.add(signal.SIGHUP)
    before = {signum: signal.signal(signum, stop) for signum in signums}
    code = process.wait()
    for signum, handler in before.items():
        signal.signal(signum, handler or signal.SIG_DFL)
    if caught:
        print("stopped; the same command resumes from here")
        sys.exit(128 + caught[0])
    return code


def execute(run, experiment, log, keep_weights):
    """Train or resume a run, then evaluate it. -> its row, also written to its folder. Ends where train.py fails."""
    began = time.monotonic()
    config = run.variant.config
    identity = {"variant": run.variant.name, "seed": run.seed, **run.variant.identity}
    run.folder.mkdir(parents=True, exist_ok=True)
    write_record(run.folder, identity)
    code = train([experiment.base, *run.variant.flags, f"--seed={run.seed}", f"--out_dir={run.folder}",
                  "--init_from=auto"], log)
    reason = divergence(run.folder)
    complete = max(checkpoint.steps(run.folder), default=0) >= config["max_iters"]
    if not reason and (code or not complete):
        fail(f"{run.name}: train.py {ending(code)}: {last_line(log.name)} (the whole output is in {log.name}); the "
             "same command resumes from here")
    evaluated = {}
    try:
        if not reason:
            evaluated = final_loss(run.folder, config)
    except (ValueError, OSError) as error:
        fail(f"{run.name} cannot be evaluated: {error}")
    defaults = read_keys(ROOT / "train.py")
    changed = {key: value for key, value in config.items() if value != defaults[key].default}
    row = {**identity, "config": changed, **run.variant.sizes, **figures(run.folder), "diverged": bool(reason),
           "stopped_by": reason, **evaluated, "run_s": round(time.monotonic() - began, 3)}
    write_record(run.folder, row)
    if not keep_weights:
        shutil.rmtree(run.folder / "ckpt", ignore_errors=True)
    return row


def ending(code):
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


def last_line(path):
    text = Path(path).read_text(encoding="utf-8", errors="replace").strip() or "no output"
    return text.splitlines()[-1].removeprefix("error: ")


def final_loss(folder, config):
    """The loss of the last checkpoint on the whole validation split, in fp32."""
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    model = load(folder, device=pick_device(config["device"])[0])[0]
    tokens = open_tokens(open_datasets(config["dataset"])[0], "val", model.config.vocab_size)
    block_size = config["block_size"]
    result = evaluate(model, tokens, block_size, evaluation_rows(block_size))
    if not math.isfinite(result["loss"]):
        raise ValueError("its loss is not finite")
    return {"val_loss": result["loss"], "val_tokens": result["tokens"], "val_sha256": result["tokens_sha256"]}


# -----------------------------------------------------------------------------
# All runs


def estimate(runs, out_dir):
    """Seconds that the unfinished runs will take, judged by the finished ones; None where none is finished."""
    seconds = {}  # variant -> run times
    for path in Path(out_dir).glob(f"*/{RECORD}"):
        row = read_record(path.parent)
        if is_finished(row) and not row["diverged"]:
            seconds.setdefault(row["variant"], []).append(row["run_s"])
    if not seconds:
        return None
    typical = statistics.median(s for times in seconds.values() for s in times)
    total = 0
    for run in runs:
        if state_of(run)[0] != "finished":
            total += statistics.median(seconds.get(run.variant.name, [typical]))
    return total


def show_plan(runs, out_dir):
    states = []
    for run in runs:
        state, differences = state_of(run)
        states.append(state)
        origin = f", of other {' and '.join(differences)}" if differences else ""
        print(f"  {run.name:32} {state}{origin}")
    seconds = estimate(runs, out_dir)
    remaining = "no estimate before a run is finished"
    if seconds is not None:
        remaining = f"about {seconds / 60:.0f} minutes left"
    print(f"{len(runs)} runs: {states.count('finished')} finished, {states.count('begun')} begun, "
          f"{states.count('missing')} missing; {remaining}")


def work(c, runs, experiment):
    """Execute the missing runs. A run that another process works on is skipped, and waited for in the end."""
    queue = deque(runs)
    skipped = 0  # runs that other processes hold, one after another
    number = 0
    while queue:
        run = queue.popleft()
        wait = skipped > len(queue)  # only such runs are left
        if wait:
            print(f"waiting for the process that has {run.name}", flush=True)
        with locked(Path(c.out_dir) / "logs" / f"{run.name}.txt", wait) as log:
            if log is None:
                queue.append(run)
                skipped += 1
                continue
            skipped = 0
            number += 1
            state, differences = state_of(run)
            if state == "finished" and (not differences or c.stale == "keep"):
                continue
            if differences:
                remove(run.folder)
            row = execute(run, experiment, log, c.keep_weights)
        collect(experiment, c.out_dir)
        result = row["stopped_by"] if row["diverged"] else f"val loss {row['val_loss']:.4f}"
        print(f"[{number}/{len(runs)}] {run.name}: {result}, {row['run_s']:.1f} s", flush=True)


def split_words(words):
    """The command line's words. -> (paths of experiments, all other words)

    They are separated because configure would read every .py file as a file of settings.
    """
    paths = [word for word in words if word.endswith(".py") and not word.startswith("--")]
    return paths, [word for word in words if word not in paths]


def main(c, paths, given):
    """`paths`: the experiment, as the only one; `given`: names of the keys on the command line."""
    if len(paths) != 1:
        fail("which experiment? python ablate.py config/ablations/NAME.py")
    if c.stale not in ("stop", "keep", "rerun"):
        fail(f"stale={c.stale!r} is not one of stop, keep, rerun")
    path = paths[0]
    keys = read_keys(ROOT / "train.py")
    experiment = read_experiment(path, keys)
    own = read_keys(__file__)
    overrides = checked({key: c[key] for key in given if key not in own}, "the command line", keys)
    unknown = [name for name in c.only if name not in experiment.variants]
    if unknown:
        fail(f"--only={unknown[0]} is no variant of {path}{nearest(unknown[0], experiment.variants)}")
    if not c.out_dir:
        c = c.changed(out_dir=os.path.join("out", "ablations", Path(path).stem))
    code = code_sha256()
    variants = [resolve(experiment, name, overrides, keys, code) for name in experiment.variants]
    runs = plan_runs(c, experiment, variants)
    print(f"{path}: {question(path)}")
    check_stale(c, runs)
    if c.dry_run:
        show_plan(runs, c.out_dir)
        return
    work(c, runs, experiment)
    rows = collect(experiment, c.out_dir)
    results = Path(c.out_dir) / "results.jsonl"
    print(f"{len(rows)} rows in {results}; next: python report.py {results}")


if __name__ == "__main__":
    try:
        paths, words = split_words(sys.argv[1:])
        given = set()
        c = Settings(configure(globals(), words, given=given, also=ROOT / "train.py"))
        main(c, paths, given)
    except KeyboardInterrupt:  # between two runs
        sys.exit(130)
