"""The run folder: what a run leaves on the disk, through interruptions and a full disk."""

import json
import math
import os
import platform
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import monitor
from loader import read_manifest
from monitor import Run, StepTimer, environment

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def lines(path):
    """The records of a .jsonl file, which must be whole lines of JSON proper: no NaN."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    not_json = pytest.fail  # called with NaN, Infinity or -Infinity
    return [json.loads(line, parse_constant=not_json) for line in text.splitlines()]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.open({"seed": 1}, {})
    return run


# -----------------------------------------------------------------------------
# Metrics and events


def test_metrics_are_lines(run):
    records = [{"step": 1, "loss": 1.25, "mfu": None}, {"step": 2, "loss": 0.1 + 0.2, "mfu": None}]
    for record in records:
        run.metrics(record)
    assert lines(run.metrics_path) == records  # floats to the bit
    assert run.flush() == run.metrics_path.stat().st_size


def test_not_finite_is_null(run):
    run.metrics({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "parts": {"a": [math.nan, 2.0]}})
    run.event("resume", changed={"grad_clip": [math.inf, 1.0]}, pair=(1, math.nan))
    assert lines(run.metrics_path) == [
        {"step": 1, "loss": None, "grad_norm": None, "lr": None, "parts": {"a": [None, 2.0]}}
    ]
    event = lines(run.events_path)[0]
    assert event["changed"] == {"grad_clip": [None, 1.0]} and event["pair"] == [1, None]


def test_a_resumed_run_drops_what_the_checkpoint_does_not_know(tmp_path):
    run = Run(tmp_path)
    run.open({"seed": 1}, {})
    run.metrics({"step": 1})
    run.metrics({"step": 2})
    known = run.flush()
    run.metrics({"step": 3})
    run.event("start")

    again = Run(tmp_path)
    again.open({"seed": 2}, {}, known)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    again.metrics({"step": 3, "again": True})
    again.event("resume", step=2)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert [e["event"] for e in lines(tmp_path / "events.jsonl")] == ["start", "resume"]  # nothing is cut here
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 2}


def test_a_new_run_begins_with_no_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    Run(tmp_path).open({}, {})
    assert lines(tmp_path / "metrics.jsonl") == []


def test_half_a_line_of_a_killed_run_is_cut(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "warning", "message": "' + 300 * "x")
    run = Run(tmp_path)
    run.open({}, {}, metrics_bytes=12)
    run.metrics({"step": 2})
    run.event("resume")
    assert lines(run.metrics_path) == [{"step": 1}, {"step": 2}]
    assert [e["event"] for e in lines(run.events_path)] == ["start", "resume"]


def test_metrics_that_are_gone_are_said(tmp_path):
    run = Run(tmp_path)
    run.open({}, {}, metrics_bytes=500)
    assert lines(run.metrics_path) == []
    warning, = lines(run.events_path)
    assert warning["event"] == "warning" and "500" in warning["message"]
    run.metrics({"step": 9})
    assert lines(run.metrics_path) == [{"step": 9}] and run.flush() == run.metrics_path.stat().st_size


def fill_up(limit):
    """From here on no file of this process can grow beyond `limit` bytes: writing stops in the middle of a line."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_a_full_disk_loses_no_line(run):
    import resource

    run.metrics({"step": 0})
    run.event("start")
    try:
        fill_up(run.metrics_path.stat().st_size + 30)
        for step in range(1, 6):
            run.metrics({"step": step})  # no error here: training goes on
            run.event("warning", step=step)
        half = run.metrics_path.read_bytes()
        with pytest.raises(OSError):
            run.flush()
    finally:
        fill_up(resource.RLIM_INFINITY)
    assert len(half) > run.length[run.metrics_path]  # the disk did fill up within a line
    assert run.flush() == run.metrics_path.stat().st_size
    assert [r["step"] for r in lines(run.metrics_path)] == [0, 1, 2, 3, 4, 5]
    assert [e.get("step") for e in lines(run.events_path)] == [None, 1, 2, 3, 4, 5]
    run.metrics({"step": 6})
    assert [r["step"] for r in lines(run.metrics_path)] == [0, 1, 2, 3, 4, 5, 6]


def test_lines_wait_for_room_and_go_with_the_next(run, monkeypatch):
    run.metrics({"step": 0})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(monitor, "open", full, raising=False)
        run.metrics({"step": 1})
        run.metrics({"step": 2})
        with pytest.raises(OSError, match="No space left"):
            run.flush()
    assert lines(run.metrics_path) == [{"step": 0}]
    run.metrics({"step": 3})
    assert [r["step"] for r in lines(run.metrics_path)] == [0, 1, 2, 3]


def test_flush_syncs_what_it_counts(run, monkeypatch):
    synced = []
    monkeypatch.setattr(monitor.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    run.metrics({"step": 1})
    assert synced == []  # not at every step
    assert run.flush() in synced


# -----------------------------------------------------------------------------
# What a result depends on


def test_the_environment():
    env = environment(CPU, "abc")
    assert env["packages"]["torch"] == version("torch") and env["packages"]["numpy"] == version("numpy")
    assert "safetensors" in env["packages"] and "pytest" not in env["packages"]
    assert env["python"] == platform.python_version() and env["threads"] == torch.get_num_threads()
    assert env["cpu"] and env["device"] == "cpu" and env["dataset_sha256"] == "abc"
    assert json.loads(json.dumps(env)) == env


def test_the_environments_hash_names_packages_and_hardware(monkeypatch):
    digest = environment(CPU, "abc")["environment_sha256"]
    assert environment(CPU, "another dataset")["environment_sha256"] == digest
    monkeypatch.setattr(monitor, "git", lambda *args: "another commit")
    assert environment(CPU, "abc")["environment_sha256"] == digest
    monkeypatch.setattr(monitor.importlib.metadata, "version", lambda name: "0.0.1")
    assert environment(CPU, "abc")["environment_sha256"] != digest


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The folder of monitor.py as a git repository of its own, with a commit and a change in no encoding we know."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)

    def git(*args):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "note.txt").write_bytes("un\n\nblank line above and below\n\n".encode("latin-1"))
    git("add", ".")
    git("commit", "--no-verify", "-m", "first")
    (tmp_path / "note.txt").write_bytes("un é\n\nblank line above and below\n\n".encode("latin-1"))
    monkeypatch.setattr(monitor, "__file__", str(tmp_path / "monitor.py"))
    return tmp_path


def test_commit_and_diff(repository):
    env = environment(CPU, None)
    assert len(env["commit"]) == 40 and int(env["commit"], 16)
    assert "+un \ufffd" in env["dirty_diff"]  # the latin-1 é does not end the run
    (repository / "note.txt").write_text("deux\n\nblank line above and below\n\n")
    diff = environment(CPU, None)["dirty_diff"]
    subprocess.run(["git", "apply", "-R"], input=diff.encode(), cwd=repository, check=True)  # it is whole
    assert environment(CPU, None)["dirty_diff"] == ""
    assert environment(CPU, None)["commit"] == env["commit"]


def test_no_repository_and_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(monitor, "__file__", str(tmp_path / "monitor.py"))
    assert environment(CPU, None)["commit"] is None and environment(CPU, None)["dirty_diff"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(CPU, None)["commit"] is None


def test_the_folder_of_a_run(tiny_run, tiny_dataset):
    config = json.loads((tiny_run / "config.json").read_text())
    defaults = runpy.run_path(str(ROOT / "train.py"))
    assert config["n_embd"] == 16 and config["dataset"] == str(tiny_dataset) and config["out_dir"] == str(tiny_run)
    assert config["beta2"] == defaults["beta2"]  # what was not asked for is in it too
    env = json.loads((tiny_run / "env.json").read_text())
    assert env["dataset_sha256"] == read_manifest(tiny_dataset)[1] is not None
    assert env["packages"]["torch"] == version("torch") and env["threads"] == 1
    records, events = lines(tiny_run / "metrics.jsonl"), lines(tiny_run / "events.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6]
    assert all(r["tokens"] == r["step"] * 4 * 16 for r in records)
    assert events[0]["event"] == "start" and events[-1]["event"] == "end"
    known = {p.name for p in tiny_run.iterdir()}
    assert known == {"config.json", "env.json", "metrics.jsonl", "events.jsonl", "tokenizer.json", "ckpt"}


# -----------------------------------------------------------------------------
# Step timing


@pytest.fixture
def time(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_the_parts_of_a_step_sum_to_the_whole(time):
    timer = StepTimer(CPU)
    timer.start()
    for _ in range(2):
        for part, seconds in (("data_ms", 0.25), ("forward_ms", 0.5), ("backward_ms", 1.0)):
            time(seconds)
            timer.mark(part)
    time(0.125)
    timer.mark("optim_ms")
    time(50)  # after the step
    assert timer.read() == {"data_ms": 500, "forward_ms": 1000, "backward_ms": 2000, "optim_ms": 125}


def test_a_step_knows_nothing_of_the_one_before(time):
    timer = StepTimer(CPU)
    assert timer.read() == {}
    timer.start()
    time(1)
    timer.mark("forward_ms")
    timer.start()
    time(2)
    timer.mark("backward_ms")
    assert timer.read() == {"backward_ms": 2000}


# -----------------------------------------------------------------------------
# No network

OFFLINE = """
import runpy, socket, sys

def hook(event, args):  # below all of Python: nothing makes a socket in another way
    if event.startswith("socket."):
        raise PermissionError(f"no network here: {event}")

sys.addaudithook(hook)
try:
    socket.socket()
    sys.exit("sockets are not blocked")
except PermissionError:
    pass
for argv in (sys.argv[2:], ["sample.py", sys.argv[1], "--device=cpu", "--num_samples=1", "--max_new_tokens=5"]):
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def test_training_and_sampling_open_no_socket(tmp_path, tiny_settings):
    out_dir = f"--out_dir={tmp_path / 'run'}"
    command = [sys.executable, "-c", OFFLINE, out_dir, "train.py", *tiny_settings, out_dir]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "---------------" in done.stdout and "tokens/s" in done.stderr
