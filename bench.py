"""
Benchmarks, as a user would run the thing: the same commands, timed, over several seeds.

    python bench.py train --config=config/shakespeare_char_cpu.py --seeds=1,2,3

`train` runs train.py on the config once per seed, each in a fresh folder under out_dir, then eval.py on the whole
validation split in fp32. It prints a table and, as the last line, one JSON object.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from configurator import configure, fail
from monitor import git

# -----------------------------------------------------------------------------
what = "train"              # train
config = "config/shakespeare_char_cpu.py"  # the run to time
seeds = (1, 2, 3)           # one run each
overrides: tuple[str, ...] = ()  # more keys of train.py, such as --overrides=max_iters=100,device=cuda
out_dir = "out/bench"       # where the run folders go; those of an earlier benchmark must be gone
# -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
PARTS = ("data_ms", "forward_ms", "backward_ms", "optim_ms")  # of a step


def run(script, *args):
    """Run one of our scripts, its output on the screen's stderr; -> the last line of its stdout. Ends when it fails."""
    process = subprocess.Popen([sys.executable, ROOT / script, *args], stdout=subprocess.PIPE, encoding="utf-8")
    line = ""
    for line in process.stdout:
        print("   ", line, end="", file=sys.stderr)
    if process.wait():
        fail(f"{script} {' '.join(args)} exited with {process.returncode}")
    return line


def train_once(seed):
    """One training run: its figures as a dict."""
    folder = Path(out_dir) / f"{Path(config).stem}_seed{seed}"
    if folder.exists():
        fail(f"{folder} exists: a benchmark starts from nothing; remove it or give another --out_dir")
    run("train.py", config, f"--seed={seed}", f"--out_dir={folder}", *(f"--{key}" for key in overrides))
    evaluated = json.loads(run("eval.py", f"--out_dir={folder}"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "val_loss": evaluated["loss"],
        "train_s": records[-1]["wall_s"],  # compilation counts, evaluation and saving do not
        "step_ms": statistics.median(sum(r[part] for part in PARTS) for r in records),
        **{part: statistics.median(r[part] for r in records) for part in PARTS},
        "tok_per_s": statistics.median(r["tok_per_s"] for r in records),
        "mem_gb": records[-1]["mem_gb"],
        "steps": records[-1]["step"],
        "commit": env["commit"],
        "dirty": bool(env["dirty_diff"] or env["untracked"]),
        "threads": env["threads"],
        "dataset_sha256": env["dataset_sha256"],
        "environment_sha256": env["environment_sha256"],
        "cpu": env["cpu"],
        "device": env["device"],
        "torch": env["packages"]["torch"],
    }


def main(settings):
    if not Path(config).exists():
        fail(f"no config file {config}")
    if not seeds:
        fail("--seeds is empty: it takes the seed of each run, such as --seeds=1,2,3")
    rows = []
    for seed in seeds:
        rows.append(train_once(seed))
    columns = ("seed", "val_loss", "train_s", "step_ms", *PARTS, "tok_per_s")
    print(f"{config}: {rows[0]['steps']:,} steps, {rows[0]['device']} ({rows[0]['cpu']}), "
          f"commit {git('rev-parse', 'HEAD')}")
    print("  ".join(f"{c:>11}" for c in columns))
    for row in rows:
        print("  ".join(f"{row[c]:>11.4f}" if isinstance(row[c], float) else f"{row[c]:>11}" for c in columns))
    summary = {}
    for column in ("val_loss", "train_s", "step_ms"):
        values = [row[column] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[column] = {"mean": statistics.mean(values), "stdev": spread, "min": min(values), "max": max(values)}
        print(f"{column}: mean {statistics.mean(values):.4f}, standard deviation {spread:.4f}, "
              f"{min(values):.4f} to {max(values):.4f}")
    print(json.dumps({"benchmark": what, "settings": settings, **summary, "runs": rows}))


if __name__ == "__main__":
    settings = configure(globals(), verb="what", verbs=("train",))
    main(settings)
