"""
The run folder and its logs; the clocks of a step; the lines on the screen.

    out_dir/config.json     the resolved settings
    out_dir/env.json        commit, packages, hardware, dataset
    out_dir/metrics.jsonl   one record per logged step
    out_dir/events.jsonl    start, resume, warning, sample, nan, spike, rewind, stop, end
    out_dir/profile/        a trace of some steps, if the settings ask for one (profiler.py)
    out_dir/ckpt/           checkpoints (checkpoint.py)
    out_dir/.lock           the process that is training into the folder (files.py)
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import fused
from attention import pick_attention
from device import memory_gb, rss_gb, sdpa_kernel_of
from files import clock_face, finite, sha256, write_whole

# -----------------------------------------------------------------------------
# The environment: everything besides the config that a result depends on

PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "flash-attn", "datasets", "wandb",
            "transformers")
LONGEST_DIFF = 10_000_000  # characters

# a user's configuration of git must not change the format of its answers
GIT_SETTINGS = ("color.ui=never", "core.quotepath=off", "diff.relative=false", "status.showUntrackedFiles=normal")
DIFF_OPTIONS = ("--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short", "--no-renames")
PATCH_OPTIONS = (*DIFF_OPTIONS, "--unified=3", "--src-prefix=a/", "--dst-prefix=b/", "--binary", "HEAD")


def git(*args):
    """The answer of a git command in this folder, or None where there is no git or no repository."""
    command = ["git"]
    for setting in GIT_SETTINGS:
        command += ["-c", setting]
    variables = {name: value for name, value in os.environ.items() if name != "GIT_DIFF_OPTS"}
    try:
        done = subprocess.run([*command, *args], cwd=Path(__file__).parent, env=variables,
                              capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return done.stdout.decode("utf-8", "replace").removesuffix("\n")


def uncommitted_diff():
    """The changes since the last commit, in the format of `git apply`, binary files included.

    None if there is no repository, "" without changes. If the diff is too large, the names of the files instead.
    """
    diff = git("diff", *PATCH_OPTIONS)
    if diff is not None and len(diff) <= LONGEST_DIFF:
        return diff
    files = git("diff", *DIFF_OPTIONS, "--stat", "HEAD")
    if not files:  # no repository
        return diff
    # binary files are the usual reason: try again without them
    changed = (git("diff", *DIFF_OPTIONS, "--numstat", "-z", "HEAD") or "").split("\0")
    binary = [line[4:] for line in changed if line.startswith("-\t-\t")]
    if binary:
        excluded = [f":(top,exclude,literal){path}" for path in binary]
        text = git("diff", *PATCH_OPTIONS, "--", ":(top)", *excluded)
        if text and len(text) <= LONGEST_DIFF:
            return f"too large to keep, and missing here: {', '.join(binary)}\n{text}"
    why = "git took too long to list the changes"
    if diff is not None:
        why = f"{len(diff):,} characters are too many to keep"
    return f"{why}; the changes are in:\n{files}"


def cpu_name():
    """The CPU's name, such as "AMD EPYC 7763 64-Core Processor", or at least its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(device, dataset_sha256):
    """The content of env.json. `environment_sha256` names the packages and the hardware."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    diff = uncommitted_diff()
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
        "environment_sha256": sha256(json.dumps(machine, sort_keys=True)),
        "commit": git("rev-parse", "HEAD"),
        "dirty_diff": diff and diff + "\n",  # git apply needs the last line end
        "untracked": (git("ls-files", "--others", "--exclude-standard") or "").splitlines(),
        "dataset_sha256": dataset_sha256,
    }


# -----------------------------------------------------------------------------
# The run folder


class Run:
    """The run folder, open for writing. A line that cannot be written now is written with the next one, so a full disk
    loses no line.

    Only the process that `writes` does so; all others drop their lines. Warnings are noted with `state["step"]`.
    """

    def __init__(self, out_dir, writes=True, state=None):
        self.dir, self.writes, self.state = Path(out_dir), writes, state
        self.metrics_path = self.dir / "metrics.jsonl"
        self.events_path = self.dir / "events.jsonl"
        self.pending = {self.metrics_path: b"", self.events_path: b""}
        self.length = {}  # log -> bytes of the whole lines in it
        self.kept = {}    # name -> content of the other files
        self.renewed = False
        self.tracker = None  # track.Tracker, which gets every record

    def open(self, config, env, metrics_bytes=0):
        """Write config.json and env.json; cut metrics.jsonl to the length that the checkpoint knows."""
        self.dir.mkdir(parents=True, exist_ok=True)
        self.keep("config.json", json.dumps(config, indent=1))
        self.keep("env.json", json.dumps(env, indent=1))
        for path in self.pending:
            path.touch()
            self.length[path] = path.read_bytes().rfind(b"\n") + 1
        if self.length[self.metrics_path] < metrics_bytes:
            message = f"metrics.jsonl lacks some of the {metrics_bytes} bytes the checkpoint knows"
            self.event("warning", message=message)
        self.length[self.metrics_path] = min(metrics_bytes, self.length[self.metrics_path])
        os.truncate(self.metrics_path, self.length[self.metrics_path])

    def keep(self, name, content):
        """Write the file `name`. If the folder is removed during the run, the file is written again."""
        self.kept[name] = content
        write_whole(self.dir / name, content)

    def metrics(self, record):
        """One line of metrics.jsonl; a number that is not finite becomes null."""
        self._write(self.metrics_path, record)
        if self.tracker:
            self.tracker.log(finite(record))

    def event(self, kind, **fields):
        """One line of events.jsonl. The events "stop" and "end" close the tracker."""
        self._write(self.events_path, {"event": kind, "time": round(time.time(), 3), **fields})
        if self.tracker and kind in ("stop", "end"):
            self.tracker.finish(failed=kind == "stop")

    def warn(self, message):
        """A warning on stderr and in events.jsonl."""
        self.tell("warning", message)
        step = {"step": self.state["step"]} if self.state else {}
        self.event("warning", **step, message=message)

    def tell(self, kind, message):
        """A line on stderr, if this process writes."""
        if self.writes:
            clear_bar()
            print(f"{kind}: {message}", file=sys.stderr)

    def say(self, line):
        """A line on stdout, if this process writes."""
        if self.writes:
            print(line, flush=True)

    def say_lines(self, lines):
        """Lines on stdout in place of the progress bar, if this process writes."""
        if self.writes and lines:
            clear_bar()
            print(*lines, sep="\n", flush=True)

    def _write(self, path, record):
        if not self.writes:
            return
        self.pending[path] += (json.dumps(finite(record), allow_nan=False) + "\n").encode()
        with contextlib.suppress(OSError):  # a full disk: the lines wait, and flush() raises at the next checkpoint
            self._flush(path)

    def _flush(self, path, to_disk=False):
        try:
            file = open(path, "r+b")
        except FileNotFoundError:
            self._renew(path)
            file = open(path, "r+b")
        with file as f:
            f.seek(self.length[path])
            f.truncate()  # drop a line that an earlier try left half-written
            f.write(self.pending[path])
            f.flush()
            if to_disk:
                os.fsync(f.fileno())
        self.length[path] += len(self.pending[path])
        self.pending[path] = b""

    def _renew(self, path):
        """Somebody removed a log or moved the folder: begin it again, so that the run can still be saved."""
        self.dir.mkdir(parents=True, exist_ok=True)
        for name, content in self.kept.items():
            if not (self.dir / name).exists():
                self.keep(name, content)
        path.touch()
        self.length[path] = 0
        if not self.renewed:
            self.renewed = True
            self.warn(f"{path} was removed or moved while the run wrote to it: "
                      f"a new one begins here, and checkpoints are saved in {self.dir}")

    def flush(self):
        """Write every line to the disk. -> bytes of metrics.jsonl. Raises OSError (disk full)."""
        for path in self.pending:
            self._flush(path, to_disk=True)
        return self.length[self.metrics_path]


# -----------------------------------------------------------------------------
# Time and hardware


class StepTimer:
    """Times the parts of a step. mark("forward_ms") adds the time since the previous mark to that part.

    On CUDA the marks are events in the stream. They are read when the step is logged, so no step waits for them.
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
        """-> the result of `call`. The time until now counts as `part`, the time of the call as "probe_ms"."""
        self.mark(part)
        result = call()
        self.mark("probe_ms")
        return result

    def read(self):
        """Milliseconds of the last step, by part."""
        if self.cuda:
            torch.cuda.synchronize()
        parts = {}
        for (_, a), (part, b) in zip(self.marks, self.marks[1:], strict=False):
            ms = a.elapsed_time(b) if self.cuda else (b - a) * 1000
            parts[part] = parts.get(part, 0.0) + ms
        return parts


class Pace:
    """Times whole steps, from start to start: the parts that StepTimer marks, and the work between steps, such as
    logging. The training loop counts `steps` since the last reading."""

    def __init__(self):
        self.since, self.steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def aside(self):
        """Around work that is not training: evaluating, saving, probing. Its time does not count."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def read(self):
        """-> (seconds, steps) since the last reading. The caller has waited for the device."""
        now = time.perf_counter()
        seconds, steps = now - self.since, self.steps
        self.since, self.steps = now, 0
        return seconds, steps


class Hardware:
    """Memory and load of the machine. Reading them waits for no kernel."""

    def __init__(self, device):
        self.device, self.gpu = device, None
        if device.type == "cuda":
            with contextlib.suppress(Exception):  # no nvidia-ml-py, no driver, or only a part of a GPU (MIG)
                import pynvml

                pynvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(device).uuid  # torch's number need not be the driver's
                self.nvml, self.gpu = pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self):
        """-> {"mem_gb": peak of the GPU or this process, "rss_gb": this process now}. If the driver reports on the GPU,
        also "gpu_util", the share of the time that it was busy, "gpu_power_w", and "gpu_mem_gb", of all processes."""
        figures = {"mem_gb": memory_gb(self.device), "rss_gb": rss_gb()}
        if self.gpu is not None:
            try:
                figures["gpu_util"] = self.nvml.nvmlDeviceGetUtilizationRates(self.gpu).gpu / 100
                figures["gpu_power_w"] = self.nvml.nvmlDeviceGetPowerUsage(self.gpu) / 1000
                figures["gpu_mem_gb"] = self.nvml.nvmlDeviceGetMemoryInfo(self.gpu).used / 1e9
            except self.nvml.NVMLError:
                self.gpu = None  # this GPU does not report a figure: do not ask again
        return figures


# -----------------------------------------------------------------------------
# The screen


def evaluation_line(result, unit):
    return f"val {result['loss']:.4f}  ppl {result['perplexity']:.3f}  {result['bits']:.4f} bits/{unit}"


def clear_bar():
    """Clear the line of the progress bar, on a terminal."""
    if sys.stdout.isatty():
        print("\r" + " " * (shutil.get_terminal_size().columns - 1), end="\r", flush=True)


def show(record, unit, max_iters):
    """One line of progress. On a terminal it has a bar, and the next line replaces it, unless it is an evaluation."""
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
    bar = min(30, width - len(line) - 4)
    if bar > 5:
        filled = "#" * round(bar * done)
        line = f"[{filled.ljust(bar, '.')}]  {line}"
    print("\r" + line[:width].ljust(width), end="\n" if "val_loss" in record else "", flush=True)


def announce(c, run, budget, measure, model_config):
    """The first lines of a run: device, layout, data, model, step, peak, memory. -> the kind of attention

    `budget` (start.Budget) has the memory of a step, `measure` (measure.Measure) the costs of the model and the peak.
    """
    layout, machine, data, costs = measure.layout, measure.machine, measure.data, measure.costs
    attention, attention_why = describe_attention(c, machine, model_config, data.train.doc_mask)
    run.say(f"device      {machine.device} ({machine.device_why}), {machine.dtype_name} ({machine.dtype_why}), "
            f"{attention} attention ({attention_why}), {torch.get_num_threads()} CPU threads ({machine.threads_why})")
    if machine.device.type == "cpu" and fused.trouble():
        run.say(f"fused       not at all, so steps take longer: {fused.trouble()}")
    if layout.world > 1:
        run.say(f"layout      {layout}")
    rows = ""
    if data.row_size:
        rows = f", in rows of {data.row_size}, whose conversations see each other"
    if data.row_size and data.train.doc_mask:
        rows = f", in rows of {data.row_size}, whose conversations do not see each other"
    run.say(f"data        {data.source}: {len(data.train):,} training and {len(data.val):,} validation tokens{rows}")
    run.say(f"model       {costs.weights:,} parameters, {c.n_layer} layers of {c.n_embd}, context {c.block_size}")
    tokens = measure.tokens_per_step
    epochs = c.max_iters * tokens / len(data.train)
    run.say(f"step        {tokens:,} tokens = {c.batch_size} x {c.block_size} x {budget.micro_batches}, "
            f"{tokens * costs.flops[c.block_size] / 1e12:.3g} TFLOP; {c.max_iters:,} steps see the data {epochs:.2g} "
            "times")
    if measure.peak:
        run.say(f"peak        {measure.peak / 1e12:.3g} TFLOP/s ({measure.peak_why})")
    else:
        run.say("peak        not known, so MFU is n/a")
    memory = f"memory      about {budget.step_bytes / 1e9:.2g} GB"
    if layout.world > 1:
        memory += " a process"
    if budget.free_bytes:
        memory += f", of {budget.free_bytes / 1e9:.2g} GB that are free"
    run.say(memory)
    return attention


def describe_attention(c, machine, model_config, docs):
    """-> (the kind of attention, why it was chosen, and on CUDA which kernel runs it). `docs`: whether the documents in
    a row are kept apart."""
    device, dtype, head_dim = machine.device, machine.dtype, model_config.head_dim
    asked_to_compile = device.type == "cuda" if c.compile is None else c.compile
    kind, why = pick_attention(c.attn, device, dtype, c.block_size, head_dim, docs=docs, dropout=c.dropout,
                               compiling=asked_to_compile)
    if kind == "sdpa" and device.type == "cuda":
        kernel = sdpa_kernel_of(
            device, dtype, batch=c.batch_size, queries=c.block_size, keys=c.block_size,
            heads=c.n_head // c.tp_size, kv_heads=max(1, model_config.kv_heads // c.tp_size),
            head_dim=head_dim, causal=True,
        )
        why = f"{why}; {kernel} kernel"
    return kind, why
