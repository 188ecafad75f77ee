"""
The run folder and what is written there while a run goes on: config, environment, metrics, events, step timing.

    out_dir/config.json     the resolved settings
    out_dir/env.json        commit, packages, hardware, dataset
    out_dir/metrics.jsonl   one record per logged step
    out_dir/events.jsonl    start, resume, warning, sample, stop, end
    out_dir/ckpt/           checkpoint.py's
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "flash-attn", "datasets", "wandb", "transformers")


def git(*args):
    """What git says in this folder, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").removesuffix("\n") if done.returncode == 0 else None


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
    diff = git("diff", "HEAD")
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

    def open(self, config, env, metrics_bytes=0):
        """Write config.json and env.json; cut metrics.jsonl to the length that the checkpoint knows."""
        self.dir.mkdir(parents=True, exist_ok=True)
        for name, content in (("config.json", config), ("env.json", env)):
            beside = self.dir / f".{name}"
            beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(beside, self.dir / name)
        for path in self.pending:
            path.touch()
            self.length[path] = path.read_bytes().rfind(b"\n") + 1
        if self.length[self.metrics_path] < metrics_bytes:
            self.event("warning", message=f"metrics.jsonl lacks some of the {metrics_bytes} bytes the checkpoint knows")
        self.length[self.metrics_path] = min(metrics_bytes, self.length[self.metrics_path])
        os.truncate(self.metrics_path, self.length[self.metrics_path])

    def metrics(self, record):
        """One line of metrics.jsonl; a number that is not finite becomes null."""
        self._write(self.metrics_path, record)

    def event(self, kind, **fields):
        self._write(self.events_path, {"event": kind, "time": round(time.time(), 3), **fields})

    def _write(self, path, record):
        if not self.writes:
            return
        self.pending[path] += (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        with contextlib.suppress(OSError):  # a full disk: the lines wait, and flush() says so at the next checkpoint
            self._flush(path)

    def _flush(self, path, to_disk=False):
        with open(path, "r+b") as f:
            f.seek(self.length[path])
            f.truncate()  # what an earlier try left half-written
            f.write(self.pending[path])
            f.flush()
            if to_disk:
                os.fsync(f.fileno())
        self.length[path] += len(self.pending[path])
        self.pending[path] = b""

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

    def read(self):
        """Milliseconds by part, of the step that was marked last."""
        if self.cuda:
            torch.cuda.synchronize()
        parts = {}
        for (_, a), (part, b) in zip(self.marks, self.marks[1:], strict=False):
            ms = a.elapsed_time(b) if self.cuda else (b - a) * 1000
            parts[part] = parts.get(part, 0.0) + ms
        return parts
