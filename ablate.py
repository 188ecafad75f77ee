"""
Ablations: variants of one configuration, each with several seeds, under one budget, into one results file.

    python ablate.py config/ablations/architecture.py --dry_run
    python ablate.py config/ablations/architecture.py
    python ablate.py config/ablations/architecture.py --part=0/2      # and --part=1/2 beside it
    python report.py out/ablations/architecture/results.jsonl

An experiment is a Python file. Its docstring says what is asked, and it binds

    base = "config/FILE.py"        what all runs have in common: a configuration of train.py
    common = {"n_layer": 4, ...}   and these keys over it
    variants = {"base": {}, "rope": {"pos": "rope"}, ...}   what each variant changes
    against = {"stack_no_rope": "stack", ...}   what a variant is compared with; otherwise the first one
    seeds = (1, 2, 3)

The budget of a run is its max_iters, or in its place one of

    tokens_per_run                 tokens, a multiple of those of a step
    flops_per_run                  training FLOPs, to the nearest step

Any key of train.py on the command line counts for all runs, over `common` and under what the variants say. Each run is
train.py with --init_from=auto in a folder of its own, so one that was killed goes on, and one that is finished is never
repeated. When it ends, eval.py's loss of the whole validation split in fp32 is its result, and OUT/results.jsonl is
written anew: a row for each finished run, by variant and seed. A run that diverges is a row, too.
"""

import ast
import hashlib
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
from types import SimpleNamespace
from typing import NamedTuple

import torch

import checkpoint
from configurator import Key, configure, fail, nearest, read_file, read_keys, show
from dataset import open_datasets, open_tokens
from device import pick_device
from eval import evaluate
from infer import load
from plan import meta_model, model_fields
from reporting.tables import divergence, figures
from training.start import vocabulary

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two from working on one run
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
INSTEAD = {"tokens_per_run": Key("tokens_per_run", "int", False, 0),  # of max_iters
           "flops_per_run": Key("flops_per_run", "float", False, 0.0)}
BUDGETS = ("max_iters", *INSTEAD)
OURS = ("seed", "out_dir", "init_from")  # keys of train.py that ablate.py sets for each run
RECORD = "ablation.json"  # in a run's folder: what it is, and once it is finished its whole row
TIMINGS = ("wall_s", "tok_per_s", "mem_gb", "run_s")  # of a row, and its curve's wall_s: what another time may change
IDENTITY = {"code": "code_sha256", "settings": "config_sha256", "data": "dataset_sha256"}


class Experiment(NamedTuple):
    path: str
    base: str
    common: dict
    variants: dict
    against: dict  # variant -> the one it is compared with, or None
    seeds: tuple


class Variant(NamedTuple):
    """What train.py is to do, but for the seed and the folder."""

    name: str
    config: dict    # all keys of train.py, less OURS
    flags: list     # the words of the command line that make this of train.py's defaults and the base
    sizes: dict     # of the model: params, flops_per_token, kv_bytes_per_token
    identity: dict  # the three hashes of IDENTITY


class Run(NamedTuple):
    variant: Variant
    seed: int

    @property
    def name(self):
        return f"{self.variant.name}_seed{self.seed}"

    @property
    def folder(self):
        return Path(out_dir) / self.name


# -----------------------------------------------------------------------------
# The experiment


def checked(overrides, where, keys):
    """Overrides of train.py's keys, in their types. Ends the run for what is no key, or not the experiment's to set."""
    keys = {**keys, **INSTEAD}
    if not isinstance(overrides, dict) or not all(isinstance(name, str) for name in overrides):
        fail(f"{where} takes a dict from keys of train.py to values, not {overrides!r}")
    for name in overrides:
        if name not in keys:
            fail(f"{where}: unknown key {name}{nearest(name, keys)}")
        if name in OURS:
            fail(f"{where}: {name} is what ablate.py sets for each run")
    if len(several := [name for name in BUDGETS if name in overrides]) > 1:
        fail(f"{where}: {' and '.join(several)} contradict each other; leave all but one out")
    return {name: keys[name].check(value, where) for name, value in overrides.items()}


def read_experiment(path, keys):
    """An experiment's file, checked. Ends the run naming the line for whatever is wrong with it."""
    def variants(value, where):
        if not isinstance(value, dict) or not value:
            fail(f"{where}: variants is a dict from names to what each changes, such as {{'base': {{}}, ...}}")
        for name in value:
            if not isinstance(name, str) or not name.replace("-", "_").replace(".", "_").isidentifier():
                fail(f"{where}: {name!r} is no name for a variant, which is a folder's, too")
        return {name: checked(one, f"{where}: variant {name}", keys) for name, one in value.items()}

    def against(value, where):
        if not isinstance(value, dict):
            fail(f"{where}: against is a dict from a variant to the one it is compared with")
        return value

    parts = {"base": Key("base", "str", False, ""), "seeds": Key("seeds", "tuple[int, ...]", False, (1, 2, 3)),
             "common": SimpleNamespace(check=lambda value, where: checked(value, f"{where}: common", keys)),
             "variants": SimpleNamespace(check=variants), "against": SimpleNamespace(check=against)}
    found = read_file(path, parts)
    for name in ("base", "variants", "seeds"):
        if not found.get(name):
            fail(f"{path} binds no {name}")
    if len(set(found["seeds"])) < len(found["seeds"]):
        fail(f"{path}: seeds has one twice")
    first, *others = names = list(found["variants"])
    named = {first: None, **dict.fromkeys(others, first), **found.get("against", {})}
    for name, other in named.items():
        for one in (name, other):
            if one not in names and one is not None:
                fail(f"{path}: against names {one!r}, which is no variant{nearest(str(one), names)}")
    base = os.path.join(ROOT, found["base"])  # found["base"] itself where that is absolute
    return Experiment(path, base, found.get("common", {}), found["variants"], named, found["seeds"])


def question(path):
    """The first paragraph of an experiment's docstring, on one line."""
    text = ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def resolve(experiment, name, given, keys, code):
    """A Variant, all that can be checked before train.py runs being checked. Ends the run where it makes no sense."""
    below = {key: value for key, value in read_file(experiment.base, keys).items() if key not in OURS}
    settings = {}
    for level in (below, experiment.common, given, experiment.variants[name]):
        if any(budget in level for budget in BUDGETS):  # a later budget takes the place of an earlier one
            settings = {key: value for key, value in settings.items() if key not in BUDGETS}
        settings |= level
    config = {key.name: settings.get(key.name, key.default) for key in keys.values()
              if key.name not in OURS}
    where = f"{experiment.path}: variant {name}"
    try:
        found, manifest, dataset_sha256 = open_datasets(config["dataset"])
        sizes = model_fields(config)
        sizes["vocab_size"] = sizes["vocab_size"] or vocabulary(found[0][0], manifest)[1]
        model = meta_model(sizes)
    except (ValueError, OSError) as e:
        fail(f"{where}: {e}")
    each = None if config["context_start"] else model.train_flops(config["block_size"])  # it would change on the way
    config["max_iters"] = steps_of(settings, config, each, where)
    start = {**{key.name: key.default for key in keys.values()}, **below}
    flags = [f"--{key}={value if isinstance(value, str) else show(value)}"
             for key, value in config.items() if value != start[key]]
    sizes = {"params": model.num_params(), "flops_per_token": each,
             "kv_bytes_per_token": model.kv_cache_bytes(1, torch.bfloat16)}
    identity = {"code_sha256": code, "config_sha256": sha256(json.dumps(config, sort_keys=True)),
                "dataset_sha256": dataset_sha256}
    return Variant(name, config, flags, sizes, identity)


def steps_of(settings, config, flops_per_token, where):
    """The updates of a run, from the budget it has. Ends the run where that is no number of steps."""
    per_step = config["tokens_per_step"] or \
        config["batch_size"] * config["block_size"] * (config["gradient_accumulation_steps"] or 1)
    if tokens := settings.get("tokens_per_run"):
        if per_step < 1 or tokens % per_step:
            fail(f"{where}: tokens_per_run={tokens} is not a multiple of the {per_step} tokens of a step")
        return tokens // per_step
    if flops := settings.get("flops_per_run"):
        if not flops_per_token:
            fail(f"{where}: flops_per_run needs context_start=0: else a token's FLOPs change on the way")
        return max(1, round(flops / (flops_per_token * per_step)))
    return config["max_iters"]


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def code_sha256(root=ROOT, script="train"):
    """Names the code that trains: sha256 over the script and all files beside it that it imports, line ends apart."""
    sources, names = {}, [script]
    while names:
        name = names.pop()
        path = Path(root, *name.split(".")).with_suffix(".py")
        if name in sources or not path.is_file():
            continue
        sources[name] = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(sources[name])):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sha256(json.dumps(sources, sort_keys=True))


# -----------------------------------------------------------------------------
# What is there already


def read_record(folder):
    """A run's RECORD, or None."""
    try:
        return json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        fail(f"{Path(folder) / RECORD} cannot be read ({e}); remove {folder} and the run is done again")


def write_whole(path, text):
    """Write a file so that a kill at any moment leaves either what was there or all of this."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    checkpoint.sync(path.parent)


def state_of(run):
    """-> ("missing" | "begun" | "finished", what of IDENTITY it was made with is other than now's)"""
    record = read_record(run.folder)
    if not (run.folder / "config.json").exists():
        return "missing", []
    if record is None:
        return "begun", ["origin"]
    differs = [what for what, key in IDENTITY.items() if record.get(key) != run.variant.identity[key]]
    return "finished" if finished(record) else "begun", differs


def finished(record):
    return record is not None and "diverged" in record


def check_stale(runs):
    """Ends the run, or says what is kept, where runs are of other code, settings or data."""
    found = {}
    for run in runs:
        for what in state_of(run)[1]:
            found.setdefault(what, []).append(run.name)
    if not found:
        return
    if "origin" in found:
        fail(f"{Path(out_dir) / found['origin'][0]} is a run that ablate.py did not begin; take another --out_dir")
    named = "; ".join(f"other {what}: {', '.join(names[:6])}{f' and {len(names) - 6} more' * (len(names) > 6)}"
                      for what, names in found.items())
    if stale == "stop" and not dry_run:
        fail(f"{out_dir} has runs of {named}; --stale=rerun does them again, --stale=keep counts those that are "
             "finished as they are, or take another --out_dir")
    print(f"{stale}: runs of {named}")


def remove(folder):
    """A run folder out of the way: at once by its name, so that a half-removed one is never gone on with."""
    gone = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


@contextmanager
def locked(path, wait=False):
    """`path`, open for appending, while nobody else has it; None if somebody does. What inherits the file has it, too:
    a train.py that outlives a killed ablate.py."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file


def collect(experiment):
    """Write results.jsonl anew from the finished runs that are there, by variant and seed. -> the rows"""
    order, rows = {name: i for i, name in enumerate(experiment.variants)}, []
    with locked(Path(out_dir) / "logs" / "results.lock", wait=True):  # else a part could write what it read before
        for path in Path(out_dir).glob(f"*/{RECORD}"):
            row = read_record(path.parent)
            if path.parent.suffix != ".removed" and finished(row) and row["variant"] in order:
                against = experiment.against[row["variant"]]
                rows.append({"variant": row["variant"], "seed": row["seed"], "against": against, **row})
        rows.sort(key=lambda row: (order[row["variant"]], row["seed"]))
        write_whole(Path(out_dir) / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows


# -----------------------------------------------------------------------------
# One run


def train(words, log):
    """train.py with these words, its output in `log`. -> its exit code, below 0 for a signal

    SIGINT, SIGTERM and SIGHUP are passed on: it finishes its step and saves, and then ablate.py ends.
    """
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *words], stdin=subprocess.DEVNULL, stdout=log,
                               stderr=log, start_new_session=True)  # so that Ctrl-C is not there twice
    caught = []

    def stop(signum, frame):
        process.kill() if caught else process.terminate()
        caught.append(signum)

    signums = {signal.SIGINT, signal.SIGTERM}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        signums.add(signal.SIGHUP)
    before = {signum: signal.signal(signum, stop) for signum in signums}
    code = process.wait()
    for signum, handler in before.items():
        signal.signal(signum, handler or signal.SIG_DFL)
    if caught:
        print("stopped; the same command resumes from here")
        sys.exit(128 + caught[0])
    return code


def run_one(run, experiment, log):
    """Train, or go on, then evaluate. -> the run's row, which is in its folder then. Ends where train.py fails."""
    began = time.monotonic()
    identity = {"variant": run.variant.name, "seed": run.seed, **run.variant.identity}
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(run.folder / RECORD, json.dumps(identity))
    code = train([experiment.base, *run.variant.flags, f"--seed={run.seed}", f"--out_dir={run.folder}",
                  "--init_from=auto"], log)
    lost = divergence(run.folder)
    whole = max(checkpoint.steps(run.folder), default=0) >= run.variant.config["max_iters"]
    if not lost and (code or not whole):
        lines = Path(log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        fail(f"{run.name}: train.py {how}: {lines[-1].removeprefix('error: ')} (all of it is in {log.name}); "
             "the same command goes on from here")
    try:
        evaluated = {} if lost else final_loss(run.folder, run.variant.config)
    except (ValueError, OSError) as e:
        fail(f"{run.name} cannot be evaluated: {e}")
    defaults = read_keys(ROOT / "train.py")
    changed = {key: value for key, value in run.variant.config.items() if value != defaults[key].default}
    row = {**identity, "config": changed, **run.variant.sizes, **figures(run.folder), "diverged": bool(lost),
           "stopped_by": lost, **evaluated, "run_s": round(time.monotonic() - began, 3)}
    write_whole(run.folder / RECORD, json.dumps(row))
    if not keep_weights:
        shutil.rmtree(run.folder / "ckpt", ignore_errors=True)
    return row


def final_loss(folder, config):
    """The loss of the last checkpoint on the whole validation split, in fp32."""
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    model = load(folder, device=pick_device(config["device"])[0])[0]
    tokens = open_tokens(open_datasets(config["dataset"])[0], "val", model.config.vocab_size)
    T = config["block_size"]
    result = evaluate(model, tokens, T, max(1, 16384 // T))
    if not math.isfinite(result["loss"]):
        raise ValueError("its loss is not finite")
    return {"val_loss": result["loss"], "val_tokens": result["tokens"], "val_sha256": result["tokens_sha256"]}


# -----------------------------------------------------------------------------
# All of them


def share(runs):
    """The runs of this part. Ends the run where `part` is none."""
    i, _, n = part.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        fail(f"part={part} is not of the form i/n, with i from 0 to n - 1, such as 0/2 and 1/2")
    return runs[int(i) :: int(n)]


def estimate(runs):
    """Seconds that the runs which are not finished will take, by those which are; None where none is."""
    done = {}
    for path in Path(out_dir).glob(f"*/{RECORD}"):
        if finished(row := read_record(path.parent)) and not row["diverged"]:
            done.setdefault(row["variant"], []).append(row["run_s"])
    if not done:
        return None
    usual = statistics.median(s for times in done.values() for s in times)
    return sum(statistics.median(done.get(run.variant.name, [usual])) for run in runs if state_of(run)[0] != "finished")


def show_plan(runs):
    found = [state_of(run) for run in runs]
    for run, (state, differs) in zip(runs, found, strict=True):
        print(f"  {run.name:32} {state}{', of other ' * bool(differs)}{' and '.join(differs)}")
    states = [state for state, _ in found]
    seconds = estimate(runs)
    time_ = "no estimate before a run is finished" if seconds is None else f"about {seconds / 60:.0f} minutes to go"
    print(f"{len(runs)} runs: {states.count('finished')} finished, {states.count('begun')} begun, "
          f"{states.count('missing')} missing; {time_}")


def work(runs, experiment):
    """Do what is missing. What another process is at meanwhile is passed over, and waited for in the end."""
    queue, passed, number = deque(runs), 0, 0
    while queue:
        run = queue.popleft()
        wait = passed > len(queue)
        if wait:
            print(f"waiting for the process that has {run.name}", flush=True)
        with locked(Path(out_dir) / "logs" / f"{run.name}.txt", wait) as log:
            if log is None:
                queue.append(run)
                passed += 1
                continue
            passed, number = 0, number + 1
            state, differs = state_of(run)
            if state == "finished" and (not differs or stale == "keep"):
                continue
            if differs:
                remove(run.folder)
            row = run_one(run, experiment, log)
        collect(experiment)
        result = row["stopped_by"] if row["diverged"] else f"val loss {row['val_loss']:.4f}"
        print(f"[{number}/{len(runs)}] {run.name}: {result}, {row['run_s']:.1f} s", flush=True)


def main():
    words = sys.argv[1:]
    paths = [word for word in words if word.endswith(".py") and not word.startswith("--")]
    given = set()
    config = configure(globals(), [word for word in words if word not in paths], given=given, also=ROOT / "train.py")
    if len(paths) != 1:
        fail("which experiment? python ablate.py config/ablations/NAME.py")
    if stale not in ("stop", "keep", "rerun"):
        fail(f"stale={stale!r} is not one of stop, keep, rerun")
    keys = read_keys(ROOT / "train.py")
    experiment = read_experiment(paths[0], keys)
    own = read_keys(__file__)
    on_line = checked({key: config[key] for key in given if key not in own}, "the command line", keys)
    unknown = [name for name in only if name not in experiment.variants]
    if unknown:
        fail(f"--only={unknown[0]} is no variant of {paths[0]}{nearest(unknown[0], experiment.variants)}")
    globals()["out_dir"] = out_dir or os.path.join("out", "ablations", Path(paths[0]).stem)
    code = code_sha256()
    variants = [resolve(experiment, name, on_line, keys, code) for name in experiment.variants]
    # the seeds outermost, so that what there is half-way compares
    runs = share([Run(variant, seed) for seed in seeds or experiment.seeds for variant in variants
                  if not only or variant.name in only])
    print(f"{paths[0]}: {question(paths[0])}")
    check_stale(runs)
    if dry_run:
        show_plan(runs)
        return
    work(runs, experiment)
    rows = collect(experiment)
    print(f"{len(rows)} rows in {Path(out_dir) / 'results.jsonl'}; next: python report.py "
          f"{Path(out_dir) / 'results.jsonl'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # between two runs
        sys.exit(130)
