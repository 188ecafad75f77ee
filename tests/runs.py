"""
Runs of train.py for tests, in a fraction of a second each, and the comparison of what they leave.

`Trainer` is a process that has imported torch once and forks for each run. The fork executes train.py as __main__ with
its own command line. Faults are injected by code that runs before it. A test file gets the fixtures by
pytest_plugins = ["runs"], and imports the rest. That import comes first, hence PYTEST_DONT_REWRITE.
"""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import checkpoint

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = {"wall_s", "tok_per_s", "mfu", "mem_gb", "rss_gb", "gpu_util", "gpu_power_w", "gpu_mem_gb"}  # and all *_ms

TINY = dict(batch_size=4, block_size=16, n_layer=1, n_head=2, n_embd=32, max_iters=12, warmup_iters=2, min_lr=1e-3,
            learning_rate=1e-2, eval_interval=4, eval_iters=2, device="cpu", dtype="float32", threads=1,
            save_minutes=0)
# everything that a resume could get wrong
HARD = dict(dropout=0.1, batch_size=2, gradient_accumulation_steps=2, context_start=4, save_interval=2,
            keep_checkpoints=1)

SERVER = """
import json, os, runpy, sys, traceback
import torch
import torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.pipelining
import torch.distributed.tensor.parallel
import checkpoint, eval, infer, loader, model, optim, parallel, plan, tokenizer
from training import monitor
torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), fused=True)  # imports what it needs only now

def run(job, env):
    for fd, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
    os.environ.update(env)
    sys.argv = ["train.py", *job["argv"]]
    try:
        exec(job["before"], {})
        runpy.run_path("train.py", run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    job, pids = json.loads(line), []
    for env in job["env"]:
        pids.append(os.fork())
        if pids[-1] == 0:
            run(job, env)
    print(pids[0], flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(next((code for code in codes if code), 0), flush=True)
"""


class Trainer:
    """Runs train.py, each time in a process of its own."""

    def __init__(self, logs):
        self.logs, self.count = logs, 0
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )

    def start(self, *argv, before="", env=None, tty=None, ranks=0, **settings):
        """Start a run. -> the process's id. Settings are --key=value and override TINY.

        Several ranks are processes that find each other by torchrun's variables and a store like its agent's. They
        print to one file."""
        before = textwrap.dedent(before)
        if ranks:
            self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            every = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
                     "TORCHELASTIC_RESTART_COUNT": 0, "CUDA_VISIBLE_DEVICES": "", **(env or {})}
            env = [{key: str(value) for key, value in {**every, "RANK": i, "LOCAL_RANK": i}.items()}
                   for i in range(ranks)]
        self.count += 1
        self.out, self.err = (self.logs / f"{self.count}.{kind}" for kind in ("out", "err"))
        flags = [f"--{key}={value}" for key, value in {**TINY, **settings}.items() if value != ""]
        job = {"argv": [*argv, *flags], "before": before, "env": env if ranks else [env or {}],
               "stdout": tty or str(self.out), "stderr": str(self.err)}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def alive(self, pid):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self):
        """Wait for a run. -> its exit code (for a signal, minus its number), stdout and stderr"""
        code = int(self.server.stdout.readline())
        read = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (self.out, self.err)]
        return SimpleNamespace(code=code, out=read[0], err=read[1])

    def __call__(self, *argv, **settings):
        self.start(*argv, **settings)
        return self.wait()


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("logs"))
    yield trainer
    trainer.server.stdin.close()
    assert trainer.server.wait(30) == 0


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A dataset as prepare.py makes it, of about 12,000 characters that are computed, not random."""
    words = "the cat sat on a mat and saw red dogs run over green hills while old men sing low songs".split()
    text, x = [], 1
    for _ in range(2500):
        x = x * 1103515245 + 12345 & 0x7FFFFFFF
        text.append(words[(x >> 16) % len(words)] + (".\n" if x >> 8 & 15 == 0 else " "))
    folder = tmp_path_factory.mktemp("data")
    (folder / "words.txt").write_text("".join(text), encoding="utf-8")
    prepare = ["data/shakespeare_char/prepare.py", f"--input={folder / 'words.txt'}", f"--out_dir={folder}"]
    subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def tiny(train, words):
    """train, on this dataset."""
    return lambda out_dir, *argv, **settings: train(*argv, **{"dataset": words, "out_dir": out_dir, **settings})


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A run's folder with TINY's 12 steps done and checkpoints 4, 8, 12: copy it, do not change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = tiny(out)
    assert done.code == 0, done.err
    return out


def records(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(out) / name).read_text(encoding="utf-8").splitlines()]


def losses(out):
    return [r["loss"] for r in records(out)]


def outcome(out):
    """All that must not depend on how often a run was interrupted, in a form that `same` compares bit by bit."""
    step, folder = list(checkpoint.steps(out).items())[-1]
    state = checkpoint.verify(folder)
    tensors = {f"model/{name}": t for name, t in load_file(folder / "model.safetensors").items()}
    for kind, params in checkpoint.load_optimizer_state(folder).items():
        for name, values in params.items():
            tensors |= {f"{kind}/{name}/{key}": t for key, t in values.items()}
    metrics = [{k: v for k, v in r.items() if k not in TIMINGS and not k.endswith("_ms")} for r in records(out)]
    return {"step": step, **{k: state[k] for k in ("scaler", "val_loss")}, "metrics": metrics, "tensors": tensors}


def differences(a, b):
    """The parts in which two outcomes differ, if only by a bit."""
    parts = [part for part in ("step", "scaler", "val_loss", "metrics") if a[part] != b[part]]
    names = a["tensors"].keys() | b["tensors"].keys()
    if a["tensors"].keys() != b["tensors"].keys():
        parts.append("names")
    elif not all(torch.equal(a["tensors"][n], b["tensors"][n]) for n in names if n.startswith("model/")):
        parts.append("model")
    elif not all(torch.equal(a["tensors"][n], b["tensors"][n]) for n in names):
        parts.append("optimizer")
    return parts


def digest(folder):
    """SHA-256 of every file below a folder, by path, and the folders."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in sorted(Path(folder).rglob("*"))}


def checkpoints(out):
    return list(checkpoint.steps(out))


def leftovers(out):
    return sorted(p.name for p in (Path(out) / "ckpt").glob("*") if not checkpoint.NAME.fullmatch(p.name))


def one_error(done, out=None):
    """The line of a run that was refused: exit code 2, one line on stderr, no traceback, nothing written."""
    assert done.code == 2, (done.code, done.err)
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert out is None or not Path(out).exists()
    return done.err


@pytest.fixture(scope="session")
def unbroken(tiny, tmp_path_factory):
    """The outcome of a run of these settings that nothing interrupted."""
    known = {}

    def run(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            out = tmp_path_factory.mktemp("unbroken")
            done = tiny(out, **settings)
            assert done.code == 0, done.err
            known[key] = outcome(out)
        return known[key]

    return run
