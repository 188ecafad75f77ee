"""The run folder: what a run leaves on disk, also after interruptions and with a full disk."""

import gzip
import json
import math
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dataset import read_manifest
from device import rss_gb
from training import monitor
from training.monitor import Hardware, Run, StepTimer, environment
from training.profiler import Profiler, communication, covered, largest

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def lines(path):
    """The records of a .jsonl file, which must be whole lines of strict JSON: no NaN."""
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
    """From now on no file of this process can grow beyond `limit` bytes: writing stops in the middle of a line."""
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
            run.metrics({"step": step})  # no error here: training continues
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
    """A git repository as the folder of monitor.py, with a commit and a change in an unknown encoding."""
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
    assert config["beta2"] == defaults["beta2"]  # it also holds what was not asked for
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


def test_what_is_looked_at_aside_is_not_the_steps(time):
    timer = StepTimer(CPU)
    timer.start()
    time(1)

    def look():
        time(4)
        return "seen"

    assert timer.aside("optim_ms", look) == "seen"
    time(2)
    timer.mark("optim_ms")
    assert timer.read() == {"optim_ms": 3000, "probe_ms": 4000}


# -----------------------------------------------------------------------------
# MFU and the hardware

SMALL = ["--gradient_accumulation_steps=2", "--log_interval=1"]


def mfus(out):
    return [(r["mfu"], r["tok_per_s"]) for r in lines(out / "metrics.jsonl")]


def flops_per_token(n_embd=16, block_size=16, vocab=64):
    """Of a training step of tiny_settings' model, counted by hand: 3 times 2 for each weight of its matrices, and
    attention over half of the context on average."""
    matrices = 12 * n_embd**2 + vocab * n_embd
    return 3 * (2 * matrices + 4 * n_embd * (block_size + 1) / 2)


def test_mfu_is_the_share_of_peak_flops(tmp_path, tiny_settings, call_script):
    code, out, err = call_script("train.py", *tiny_settings, *SMALL, "--peak_flops=1e9", f"--out_dir={tmp_path / 'a'}")
    assert code == 0 and "peak        0.001 TFLOP/s (asked for)" in out, err
    for mfu, tok_per_s in mfus(tmp_path / "a"):
        assert mfu == pytest.approx(tok_per_s * flops_per_token() / 1e9, rel=1e-3)


def test_mfu_on_a_cpu_is_the_share_of_what_a_matrix_product_reaches(tmp_path, tiny_settings, call_script, monkeypatch):
    monkeypatch.setattr("device.matmul_flops", lambda dtype, threads: {(torch.float32, 1): 2e9}[dtype, threads])
    code, out, err = call_script("train.py", *tiny_settings, *SMALL, f"--out_dir={tmp_path / 'a'}")
    assert code == 0 and "peak        0.002 TFLOP/s (measured)" in out and "  mfu " in out, err
    for mfu, tok_per_s in mfus(tmp_path / "a"):
        assert mfu == pytest.approx(tok_per_s * flops_per_token() / 2e9, rel=1e-3)


def test_an_unknown_device_has_no_mfu(tmp_path, tiny_settings, call_script, monkeypatch):
    monkeypatch.setattr("device.peak_flops", lambda device, dtype, tf32: None)
    code, out, err = call_script("train.py", *tiny_settings, *SMALL, f"--out_dir={tmp_path / 'a'}")
    assert code == 0 and "peak        not known, so MFU is n/a" in out, err
    assert out.count("  mfu n/a  ") == 6 and {mfu for mfu, _ in mfus(tmp_path / "a")} == {None}


class Nvml(ModuleType):
    """nvidia-ml-py on a machine with a GPU that is busy."""

    class NVMLError(Exception):
        pass

    def __init__(self, fault=None):
        super().__init__("pynvml")
        self.asked, self.fault = [], fault

    def __getattr__(self, name):
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def answer(*args):
            self.asked.append((name, *args))
            if name == self.fault:
                raise self.NVMLError(name)
            return {"nvmlDeviceGetHandleByUUID": "handle", "nvmlDeviceGetPowerUsage": 312500,
                    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97),
                    "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=41_000_000_000)}.get(name)

        return answer


@pytest.fixture
def gpu(monkeypatch):
    """gpu(Nvml()): Hardware of a machine with one."""

    def pretend(nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000)
        return Hardware(torch.device("cuda", 1))

    return pretend


def test_a_gpus_load_power_and_memory(gpu):
    nvml = Nvml()
    found = gpu(nvml).read()
    assert nvml.asked[1] == ("nvmlDeviceGetHandleByUUID", "GPU-ab-cd")  # not by number: torch's may be another's
    assert found.pop("rss_gb") == pytest.approx(rss_gb(), rel=0.5) or os.name == "nt"
    assert found == {"mem_gb": 2.5, "gpu_util": 0.97, "gpu_power_w": 312.5, "gpu_mem_gb": 41.0}


@pytest.mark.parametrize("fault", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetUtilizationRates"])
def test_a_gpu_that_does_not_tell_is_asked_once(fault, gpu):
    nvml = Nvml(fault)
    hardware = gpu(nvml)
    assert [set(hardware.read()) for _ in range(3)] == [{"mem_gb", "rss_gb"}] * 3
    assert [name for name, *_ in nvml.asked].count(fault) == 1


def test_without_nvidia_ml_py(gpu):
    assert set(gpu(None).read()) == {"mem_gb", "rss_gb"}


def test_a_cpu_is_not_asked_for_a_gpu(gpu):
    nvml = Nvml()
    gpu(nvml)
    asked = len(nvml.asked)
    assert set(Hardware(CPU).read()) == {"mem_gb", "rss_gb"} and len(nvml.asked) == asked


# -----------------------------------------------------------------------------
# Profiler


@pytest.mark.slow
def test_a_profile_of_some_steps(tmp_path, tiny_settings, run_script, tiny_run):
    """The trace holds the work of those steps alone, and the run is the same."""
    out = tmp_path / "run"
    done = run_script("train.py", *tiny_settings, f"--out_dir={out}", "--profile=4:6")
    assert done.returncode == 0, done.stderr
    with gzip.open(out / "profile" / "trace_4_6.json.gz", "rt", encoding="utf-8") as f:
        names = [event.get("name") for event in json.load(f)["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 3
    assert sum(name == "aten::linear" for name in names) > 3
    header = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("operation")]
    assert header == ["ms", "MB"] and "by time" in done.stdout and "by memory" in done.stdout
    tables = done.stdout.split("by time")[1].split("\n")
    assert sum(bool(re.match(r" +[\d.]+ +[\d.]+% +\d+  \S", line)) for line in tables) == 20
    assert [r["loss"] for r in lines(out / "metrics.jsonl")] == [r["loss"] for r in lines(tiny_run / "metrics.jsonl")]
    weights = [load_file(run / "ckpt" / "step_00000006" / "model.safetensors") for run in (out, tiny_run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_profile_from_the_first_step_on(tmp_path):
    profiler = Profiler("1:2", CPU, tmp_path, max_iters=5)
    profiler.after(0)
    for step in (1, 2):
        torch.ones(300, 300) @ torch.ones(300, 300)
        assert bool(profiler.after(step)) == (step == 2)
    assert (tmp_path / "profile" / "trace_1_2.json.gz").exists() and profiler.after(3) == []


def test_a_trace_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "profile").write_text("in the way", encoding="utf-8")
    profiler = Profiler("1:1", CPU, tmp_path, max_iters=5)
    profiler.after(0)
    torch.ones(30, 30) @ torch.ones(30, 30)
    report = profiler.after(1)
    assert "no file (" in report[0] and any("aten::mm" in line for line in report)


@pytest.mark.parametrize("steps, writes, began", [("", True, 0), ("2:3", False, 0), ("2:3", True, 2)])
def test_no_profile_where_none_is_asked_for_or_its_steps_are_past(steps, writes, began, tmp_path):
    profiler = Profiler(steps, CPU, tmp_path, max_iters=5, writes=writes)
    assert [profiler.after(step) for step in range(began, 6)] == [[]] * (6 - began) and not list(tmp_path.iterdir())


def test_the_largest_come_first_with_their_share():
    rows = largest([(1000, 2, "small"), (3000, 1, "large"), (-500, 1, "freed")], 1e-3, "ms", count=2)
    assert [row.split() for row in rows] == [["ms", "share", "calls", "operation"], ["3.00", "75.0%", "1", "large"],
                                             ["1.00", "25.0%", "2", "small"]]


@pytest.mark.parametrize("profile", ["10", "10-13", "0:3", "5:4", "2:", "1:7", "a:b", "-1:2"])
def test_a_profile_of_no_steps_is_one_line(profile, tmp_path, tiny_settings, call_script):
    code, out, err = call_script("train.py", *tiny_settings, f"--out_dir={tmp_path / 'run'}", f"--profile={profile}")
    assert code == 2 and f"profile='{profile}'" in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


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


# -----------------------------------------------------------------------------
# Exposed communication


def spans(*events):
    """Of events (name, start, end[, thread[, device]]), as torch.profiler has them: time of communication, exposed."""
    kinds = torch.autograd.DeviceType
    made = [SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), thread=([*more, 1])[0],
                            device_type=kinds.CUDA if "cuda" in more else kinds.CPU, is_user_annotation="note" in more)
            for name, start, end, *more in events]
    talk, work = communication(made)
    return covered(talk), covered(talk + work) - covered(work)


def test_what_hides_communication_on_a_cpu():
    assert spans(("gloo:all_reduce", 10, 30, 2)) == (20, 20)
    assert spans(("gloo:all_reduce", 10, 30, 2), ("aten::mm", 0, 12), ("aten::mm", 25, 40)) == (20, 13)
    assert spans(("gloo:all_reduce", 10, 30, 2), ("aten::mm", 5, 50), ("aten::add", 12, 14)) == (20, 0)
    # two at once count once; gloo's threads do not compute; a call that waits for gloo communicates
    assert spans(("gloo:a", 10, 30, 2), ("gloo:b", 20, 40, 3), ("aten::copy_", 12, 40, 2)) == (30, 30)
    assert spans(("c10d::allreduce_", 5, 12), ("gloo:a", 10, 30, 2), ("aten::mm", 12, 20)) == (25, 17)
    assert spans(("c10d::recv_", 0, 9), ("gloo:recv", 8, 10), ("aten::mm", 10, 20)) == (10, 10)
    # compiled code has no operators of its own; an event that only contains others is no computation
    compiled = ("Torch-Compiled Region: 0/0", 0, 20)
    assert spans(("gloo:a", 10, 30, 2), compiled, ("autograd::engine::evaluate_function", 0, 90)) == (20, 10)


def test_what_hides_communication_on_a_gpu():
    """Kernels count, but not the calls that start them, nor the ranges that are recorded around them."""
    calls = [("c10d::allreduce_", 0, 50), ("aten::mm", 0, 99)]
    nccl = ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 10, 30, 7, "cuda")
    assert spans(*calls, nccl, ("ampere_sgemm", 0, 12, 8, "cuda")) == (20, 18)
    noted = [("FSDP::all_gather", 0, 90, 8, "cuda", "note"), ("nccl:all_reduce", 0, 90, 8, "cuda", "note")]
    assert spans(*calls, nccl, *noted, ("Memcpy DtoD", 15, 18, 8, "cuda")) == (20, 17)
    assert spans(("gloo:all_reduce", 0, 20, 2), ("ampere_sgemm", 15, 30, 8, "cuda")) == (20, 15)  # backend=gloo


@pytest.mark.parametrize("setting", ["diff.noprefix=true", "color.ui=always", "diff.mnemonicPrefix=true",
                                     "diff.external=false", "color.diff=always", "diff.context=0",
                                     "GIT_DIFF_OPTS=--unified=0", "GIT_EXTERNAL_DIFF=false"])
def test_the_diff_can_be_applied_whatever_git_is_configured_to(setting, tmp_path, monkeypatch):
    """It contains binary files as well."""
    repo = tmp_path / "repo"
    repo.mkdir()

    def git(*args, **options):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *args], cwd=repo, check=True, capture_output=True, **options)

    git("init", "-q")
    before = {"text.py": b"a = 1\n" * 20, "picture.png": bytes(range(256))}
    after = {"text.py": b"a = 1\n" * 10 + b"b = 2\n" * 10, "picture.png": bytes(range(255, -1, -1))}
    for name, content in before.items():
        (repo / name).write_bytes(content)
    git("add", ".")
    git("commit", "-qm", "before")
    name, value = setting.split("=", 1)
    if name.startswith("GIT_"):
        monkeypatch.setenv(name, value)
    else:
        git("config", name, value)
    for name, content in after.items():
        (repo / name).write_bytes(content)
    monkeypatch.setattr(monitor, "__file__", str(repo / "monitor.py"))
    diff = environment(CPU, None)["dirty_diff"]
    git("checkout", "-q", ".")
    git("apply", "-", input=diff.encode())
    assert {name: (repo / name).read_bytes() for name in after} == after


def test_a_diff_that_is_too_long_is_summed_up(monkeypatch):
    monkeypatch.setattr(monitor, "git", lambda *args: " a.bin | 1 +" if "--stat" in args else "x" * 20_000_000)
    diff = environment(CPU, None)["dirty_diff"]
    assert len(diff) < 1000 and "a.bin" in diff and "20,000,000" in diff


@pytest.mark.parametrize("name", ["weights.bin", "né [1].png"])
def test_without_binary_files_that_are_too_large_the_diff_is_kept(name, repository, monkeypatch):
    """git apply accepts the rest, and the first line says what is missing."""
    (repository / "note.txt").write_text("text")
    (repository / name).write_bytes(bytes(4))
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", "commit", "--no-verify", "-qm", "second"],
                   cwd=repository, check=True)
    (repository / name).write_bytes(os.urandom(4000))
    (repository / "note.txt").write_text("other text")
    monkeypatch.setattr(monitor, "LONGEST_DIFF", 2000)
    diff = environment(CPU, None)["dirty_diff"]
    assert name in diff.splitlines()[0] and "missing" in diff.splitlines()[0] and len(diff) < 2000
    subprocess.run(["git", "apply", "-R"], input=diff.encode(), cwd=repository, check=True)
    assert (repository / "note.txt").read_text() == "text"


def test_a_diff_that_takes_too_long_is_summed_up(monkeypatch):
    monkeypatch.setattr(monitor, "git", lambda *args: None if "--binary" in args else " a.bin | Bin 1 -> 2")
    assert "a.bin" in environment(CPU, None)["dirty_diff"]


@pytest.mark.parametrize("setting, change", [("color.status=always", "note.txt"), ("core.quotepath=true", "né.txt"),
                                             ("status.showUntrackedFiles=no", "new.txt")])
def test_what_git_says_is_plain_whatever_it_is_configured_to(setting, change, repository):
    subprocess.run(["git", "config", *setting.split("=")], cwd=repository, check=True)
    (repository / change).write_text("a\n")
    said = monitor.git("status", "--porcelain")
    assert change in said and "\033" not in said
    assert environment(CPU, None)["untracked"] == [change] * (change != "note.txt")
