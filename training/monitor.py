"""
The run folder and what is written there while a run goes on: config, environment, metrics, events, step timing. And the
lines on the screen.

    out_dir/config.json     the resolved settings
    out_dir/env.json        commit, packages, hardware, dataset
    out_dir/metrics.jsonl   one record per logged step
    out_dir/events.jsonl    start, resume, warning, sample, nan, spike, rewind, stop, end
    out_dir/profile/        a trace of some steps, if asked for
    out_dir/ckpt/           checkpoint.py's
    out_dir/.lock           which process trains into it, while one does (files.py)
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from device import memory_gb, rss_gb

PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "flash-attn", "datasets", "wandb", "transformers")

# what a user may have set and a program that reads git's answers does not want
GIT_SETTINGS = [word for setting in ("color.ui=never", "core.quotepath=off", "diff.relative=false",
                                     "status.showUntrackedFiles=normal") for word in ("-c", setting)]


def git(*args):
    """What git says in this folder, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *GIT_SETTINGS, *args], cwd=Path(__file__).parent, capture_output=True, timeout=10,
                              env={k: v for k, v in os.environ.items() if k != "GIT_DIFF_OPTS"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").removesuffix("\n") if done.returncode == 0 else None


LONGEST_DIFF = 10_000_000  # characters


def plain_diff():
    """The changes since the last commit as `git apply` takes them, whatever the user's configuration of git says of
    colours, prefixes and programs; binary files included. None where there is no repository, "" without changes."""
    options = ("--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short", "--no-renames")
    whole = (*options, "--unified=3", "--src-prefix=a/", "--dst-prefix=b/", "--binary", "HEAD")
    diff = git("diff", *whole)
    if diff is not None and len(diff) <= LONGEST_DIFF:
        return diff
    files = git("diff", *options, "--stat", "HEAD")
    if not files:  # no repository
        return diff
    changed = (git("diff", *options, "--numstat", "-z", "HEAD") or "").split("\0")
    if binary := [line[4:] for line in changed if line.startswith("-\t-\t")]:
        text = git("diff", *whole, "--", ":(top)", *(f":(top,exclude,literal){path}" for path in binary))
        if text and len(text) <= LONGEST_DIFF:
            return f"too large to keep, and missing here: {', '.join(binary)}\n{text}"
    why = "git took too long to list the changes" if diff is None else f"{len(diff):,} characters are too many to keep"
    return f"{why}; the changes are in:\n{files}"


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device, dataset_sha256):
    """What a result depends on besides the config. `environment_sha256` names packages and hardware together."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    diff = plain_diff()
    machine = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda,
        "packages": packages,
    }
    return {
        **machine,
        "environment_sha256": hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest(),
        "commit": git("rev-parse", "HEAD"),
        "dirty_diff": diff and diff + "\n",  # whole, as git apply wants it
        "untracked": (git("ls-files", "--others", "--exclude-standard") or "").splitlines(),
        "dataset_sha256": dataset_sha256,
    }


def plain(value):
    """`value` as JSON can hold it: a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Run:
    """The run folder, open for writing. Lines are kept until they are in their file, so a full disk loses none.
    Of several processes one `writes`, and what the others say is dropped."""

    def __init__(self, out_dir, writes=True):
        self.dir, self.writes = Path(out_dir), writes
        self.metrics_path, self.events_path = self.dir / "metrics.jsonl", self.dir / "events.jsonl"
        self.pending = {self.metrics_path: b"", self.events_path: b""}
        self.length = {}  # bytes of each file that are known to be whole lines
        self.kept = {}    # name -> content of the files that stand beside them
        self.warn = lambda message: None  # takes a line, once, where files are gone and are made again
        self.renewed = False
        self.tracker = None  # track.Tracker, which gets each record too

    def open(self, config, env, metrics_bytes=0):
        """Write config.json and env.json; cut metrics.jsonl to the length that the checkpoint knows."""
        self.dir.mkdir(parents=True, exist_ok=True)
        for name, content in (("config.json", config), ("env.json", env)):
            self.keep(name, json.dumps(content, indent=1).encode())
        for path in self.pending:
            path.touch()
            self.length[path] = path.read_bytes().rfind(b"\n") + 1
        if self.length[self.metrics_path] < metrics_bytes:
            self.event("warning", message=f"metrics.jsonl lacks some of the {metrics_bytes} bytes the checkpoint knows")
        self.length[self.metrics_path] = min(metrics_bytes, self.length[self.metrics_path])
        os.truncate(self.metrics_path, self.length[self.metrics_path])

    def keep(self, name, content):
        """Write the file `name` with these bytes, and again if the folder is gone later."""
        self.kept[name] = content
        beside = self.dir / f".{name}"
        beside.write_bytes(content)
        os.replace(beside, self.dir / name)

    def metrics(self, record):
        """One line of metrics.jsonl; a number that is not finite becomes null."""
        self._write(self.metrics_path, record)
        if self.tracker:
            self.tracker.log(plain(record))

    def event(self, kind, **fields):
        self._write(self.events_path, {"event": kind, "time": round(time.time(), 3), **fields})
        if self.tracker and kind in ("stop", "end"):
            self.tracker.finish(failed=kind == "stop")

    def _write(self, path, record):
        if not self.writes:
            return
        self.pending[path] += (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        with contextlib.suppress(OSError):  # a full disk: the lines wait, and flush() says so at the next checkpoint
            self._flush(path)

    def _flush(self, path, to_disk=False):
        try:
            file = open(path, "r+b")
        except FileNotFoundError:
            self._renew(path)
            file = open(path, "r+b")
        with file as f:
            f.seek(self.length[path])
            f.truncate()  # what an earlier try left half-written
            f.write(self.pending[path])
            f.flush()
            if to_disk:
                os.fsync(f.fileno())
        self.length[path] += len(self.pending[path])
        self.pending[path] = b""

    def _renew(self, path):
        """Somebody removed a log, or moved the folder: begin the log again, for a run that is to be saved."""
        self.dir.mkdir(parents=True, exist_ok=True)
        for name, content in self.kept.items():
            if not (self.dir / name).exists():
                self.keep(name, content)
        path.touch()
        self.length[path] = 0
        if not self.renewed:
            self.renewed = True
            self.warn(f"{path} was removed or moved while the run wrote to it: a new one begins here, and checkpoints "
                      f"are saved in {self.dir}")

    def flush(self):
        """Have the disk hold every line; -> bytes of metrics.jsonl. Raises OSError (disk full)."""
        for path in self.pending:
            self._flush(path, to_disk=True)
        return self.length[self.metrics_path]


class StepTimer:
    """Where a step's time goes. mark("forward_ms") adds the time since the mark before to that part.

    On CUDA the marks are events in the stream, read when the step is logged, so that nothing waits for them.
    """

    def __init__(self, device):
        self.cuda, self.mps = device.type == "cuda", device.type == "mps"
        self.marks = []

    def mark(self, part):
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            if self.mps:
                torch.mps.synchronize()
            event = time.perf_counter()
        self.marks.append((part, event))

    def start(self):
        self.marks = []
        self.mark("start")

    def aside(self, part, call):
        """What `call` gives. The time until now goes to `part`, that of the call to "probe_ms"."""
        self.mark(part)
        result = call()
        self.mark("probe_ms")
        return result

    def read(self):
        """Milliseconds by part, of the step that was marked last."""
        if self.cuda:
            torch.cuda.synchronize()
        parts = {}
        for (_, a), (part, b) in zip(self.marks, self.marks[1:], strict=False):
            ms = a.elapsed_time(b) if self.cuda else (b - a) * 1000
            parts[part] = parts.get(part, 0.0) + ms
        return parts


class Pace:
    """Time from the start of a step to the start of the next: all that StepTimer marks, and the host's work between
    steps, such as logging. `steps` counts those since the last reading."""

    def __init__(self):
        self.since, self.steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def aside(self):
        """Within it nothing is training: evaluating, saving, looking inside."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def read(self):
        """-> (seconds, steps) since the last reading. Its caller has waited for the device."""
        now = time.perf_counter()
        found = now - self.since, self.steps
        self.since, self.steps = now, 0
        return found


class Hardware:
    """What the machine is doing. Reading it waits for no kernel."""

    def __init__(self, device):
        self.device, self.gpu = device, None
        if device.type == "cuda":
            with contextlib.suppress(Exception):  # nvidia-ml-py or the driver is not there, or it is a part of a GPU
                import pynvml

                pynvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(device).uuid  # torch's number need not be the driver's
                self.nvml, self.gpu = pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self):
        """-> {"mem_gb": of the GPU or this process at its peak, "rss_gb": of this process now}, and of a GPU that the
        driver tells of {"gpu_util": share of the time that it was busy, "gpu_power_w", "gpu_mem_gb": in use by all}."""
        found = {"mem_gb": memory_gb(self.device), "rss_gb": rss_gb()}
        if self.gpu is not None:
            try:
                found["gpu_util"] = self.nvml.nvmlDeviceGetUtilizationRates(self.gpu).gpu / 100
                found["gpu_power_w"] = self.nvml.nvmlDeviceGetPowerUsage(self.gpu) / 1000
                found["gpu_mem_gb"] = self.nvml.nvmlDeviceGetMemoryInfo(self.gpu).used / 1e9
            except self.nvml.NVMLError:
                self.gpu = None  # it has no such figure: not asked again
        return found


class Profiler:
    """torch.profiler over some steps of a run: a trace for chrome://tracing or ui.perfetto.dev, and the operations that
    take the most time and memory. What is evaluated, sampled and saved meanwhile is in it, too."""

    def __init__(self, steps, device, run_dir, max_iters, writes=True):
        """`steps` "10:13" are the updates 10 to 13, both included; "" none. Raises ValueError."""
        first, last = 0, 0
        if steps:
            found = re.fullmatch(r"(\d+):(\d+)", steps)
            first, last = map(int, found.groups()) if found else (0, 0)
            if not 1 <= first <= last:
                raise ValueError(f"profile={steps!r} is not first:last, two steps from 1 on such as 10:13")
            if last > max_iters:
                raise ValueError(f"profile={steps!r} ends after the last step, max_iters={max_iters}")
        self.first, self.last = (first, last) if writes else (0, 0)
        self.device, self.folder, self.profiler = device, Path(run_dir) / "profile", None

    def after(self, step):
        """Called when `step` updates are done, begins or ends. -> the report's lines at the end, else none"""
        if step == self.last and self.profiler:
            return self.stop()
        if step == self.first - 1 and not self.profiler:
            self.profiler = self.begun(profile_memory=True)
        return []

    def begun(self, **options):
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * (self.device.type == "cuda")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says on stderr that it begins and ends
        profiler = torch.profiler.profile(activities=activities, **options)
        profiler.start()
        return profiler

    def end(self, profiler):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        profiler.stop()

    def exposed(self, call):
        """Milliseconds of `call` in which something is communicated and nothing computed, None where these are steps to
        trace. It includes the wait for a rank that is late, and thus a pipeline's bubble."""
        if self.profiler:
            call()
            return None
        profiler = self.begun()
        call()
        self.end(profiler)
        talk, work = communication(profiler.events())
        return (covered(talk + work) - covered(work)) / 1000

    def stop(self):
        self.end(self.profiler)
        path = self.folder / f"trace_{self.first}_{self.last}.json.gz"
        try:
            self.folder.mkdir(exist_ok=True)
            self.profiler.export_chrome_trace(os.fspath(path))
        except (OSError, RuntimeError) as e:  # a full disk ends no run
            path = f"no file ({e})"
        operations = self.profiler.key_averages()
        self.profiler = None
        if self.device.type == "cuda":  # time by kernel, as the operation that starts one has its time, too
            kernels = [op for op in operations if op.device_type != torch.autograd.DeviceType.CPU]
            times = [(op.self_device_time_total, op.count, op.key) for op in kernels]
            memory = [(op.self_device_memory_usage, op.count, op.key) for op in operations]
        else:
            times = [(op.self_cpu_time_total, op.count, op.key) for op in operations]
            memory = [(op.self_cpu_memory_usage, op.count, op.key) for op in operations]
        return [f"profile     steps {self.first} to {self.last} are in {path}; by time:", *largest(times, 1e-3, "ms"),
                "by memory that they take and leave to others:", *largest(memory, 1e-6, "MB")]

    def drop(self):
        """Ends without a trace, where the run goes back to before what is traced."""
        if self.profiler:
            self.profiler.stop()
            self.profiler = None


def communication(events):
    """torch.profiler's events -> two lists of (start, end) in us: what is communicated (NCCL's kernels, gloo's work),
    and what is computed (all other kernels, or on a CPU operators)."""
    kernels = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU and not e.is_user_annotation]
    gloo = [e for e in events if e.name.startswith("gloo:")]
    talk = gloo + [e for e in kernels if "nccl" in e.name.lower()]
    if kernels:
        work = [e for e in kernels if "nccl" not in e.name.lower()]
    else:
        callers = [e for e in events if e.name.startswith("c10d::")]  # which have to wait where gloo is slow to begin
        talk += callers
        theirs = {e.thread for e in gloo} - {e.thread for e in callers}  # gloo's own threads add and copy, too
        computes = ("aten::", "Torch-Compiled", "CompiledFunction")
        work = [e for e in events if e.name.startswith(computes) and e.thread not in theirs]
    return [[(e.time_range.start, e.time_range.end) for e in found] for found in (talk, work)]


def covered(spans):
    """The length of the union of (start, end)."""
    length, until = 0, -math.inf
    for start, end in sorted(spans):
        length += max(0, end - max(start, until))
        until = max(until, end)
    return length


def largest(operations, unit, name, count=10):
    """Lines of the `count` largest of (amount, calls, operation), and their share of all that is above 0."""
    whole = sum(max(0, amount) for amount, *_ in operations) or 1
    return [f"{name:>12} {'share':>6} {'calls':>7}  operation"] + [
        f"{amount * unit:12.2f} {amount / whole:6.1%} {calls:7}  {operation[:80]}"
        for amount, calls, operation in sorted(operations, reverse=True)[:count]]


# -----------------------------------------------------------------------------
# The screen


def evaluation_line(result, unit):
    return f"val {result['loss']:.4f}  ppl {result['perplexity']:.3f}  {result['bits']:.4f} bits/{unit}"


def clear_bar():
    """Begin a line of its own where the progress bar may stand."""
    if sys.stdout.isatty():
        print("\r" + " " * (shutil.get_terminal_size().columns - 1), end="\r", flush=True)


def clock_face(seconds):
    """Seconds as 4:05, or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"


def show(record, unit, max_iters):
    """One line of progress; on a terminal with a bar, and over the line before it unless that has an evaluation."""
    done = record["step"] / max_iters
    parts = [
        f"step {record['step']:>{len(str(max_iters))}}/{max_iters}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"norm {record['grad_norm']:.2f}",
        f"{record['tok_per_s'] / 1000:.1f}k tok/s",
        f"mfu {record['mfu']:.1%}" if record["mfu"] else "mfu n/a",
        f"{clock_face(record['wall_s'])}, {clock_face(record['wall_s'] * (1 - done) / done)} to go",
    ]
    if "val_loss" in record:
        loss = record["val_loss"]
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits": loss / math.log(2)}
        parts.insert(2, evaluation_line(result, unit))
    line = "  ".join(part for part in parts if part)
    if not sys.stdout.isatty():
        print(line, flush=True)
        return
    width = shutil.get_terminal_size().columns - 1
    bar = max(0, min(30, width - len(line) - 4))
    line = f"[{('#' * round(bar * done)).ljust(bar, '.')}]  {line}" if bar > 5 else line
    print("\r" + line[:width].ljust(width), end="\n" if "val_loss" in record else "", flush=True)
