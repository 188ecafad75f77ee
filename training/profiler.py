"""
torch.profiler for a run: traces of some steps, and the time in which ranks communicate and none computes.
"""

import math
import os
import re
from pathlib import Path

import torch


class Profiler:
    """torch.profiler over some steps of a run: a trace for chrome://tracing or ui.perfetto.dev, and a list of the
    operations that take the most time and memory. Evaluations, samples and checkpoints in between are traced as well.
    """

    def __init__(self, steps, device, run_dir, max_iters, writes=True):
        """`steps` is "10:13" for the updates 10 to 13, or "" for none. Raises ValueError."""
        first, last = 0, 0
        if steps:
            match = re.fullmatch(r"(\d+):(\d+)", steps)
            if match:
                first, last = int(match[1]), int(match[2])
            if not 1 <= first <= last:
                raise ValueError(f"profile={steps!r} is not first:last, two steps such as 10:13; "
                                 "the first step is 1")
            if last > max_iters:
                raise ValueError(f"profile={steps!r} ends after the last step, max_iters={max_iters}")
        self.first, self.last = (first, last) if writes else (0, 0)
        self.device, self.folder, self.profiler = device, Path(run_dir) / "profile", None

    def after(self, step):
        """Call this when `step` updates are done: it begins or ends the trace. -> a report's lines at its end, else []
        """
        if step == self.last and self.profiler:
            return self.stop()
        if step == self.first - 1 and not self.profiler:
            self.profiler = self.start(profile_memory=True)
        return []

    def start(self, **options):
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise Kineto prints when it begins and ends
        profiler = torch.profiler.profile(activities=activities, **options)
        profiler.start()
        return profiler

    def end(self, profiler):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        profiler.stop()

    def exposed(self, call):
        """Milliseconds of `call` in which this rank communicates and does not compute; None while steps are traced.

        Waiting for a late rank counts as communication, and so does a pipeline's bubble.
        """
        if self.profiler:
            call()
            return None
        profiler = self.start()
        call()
        self.end(profiler)
        talk, work = communication(profiler.events())
        return (covered(talk + work) - covered(work)) / 1000

    def stop(self):
        """End the trace and write it. -> the report's lines"""
        self.end(self.profiler)
        path = self.folder / f"trace_{self.first}_{self.last}.json.gz"
        try:
            self.folder.mkdir(exist_ok=True)
            self.profiler.export_chrome_trace(os.fspath(path))
        except (OSError, RuntimeError) as e:  # a full disk ends no run
            path = f"no file ({e})"
        operations = self.profiler.key_averages()
        self.profiler = None
        if self.device.type == "cuda":  # count kernels only: the operation that starts one has its time as well
            kernels = [op for op in operations if op.device_type != torch.autograd.DeviceType.CPU]
            times = [(op.self_device_time_total, op.count, op.key) for op in kernels]
            memory = [(op.self_device_memory_usage, op.count, op.key) for op in operations]
        else:
            times = [(op.self_cpu_time_total, op.count, op.key) for op in operations]
            memory = [(op.self_cpu_memory_usage, op.count, op.key) for op in operations]
        title = f"profile     steps {self.first} to {self.last} are in {path}; by time:"
        lines = [title, *largest(times, 1e-3, "ms")]
        return [*lines, "by memory that they take and do not free:", *largest(memory, 1e-6, "MB")]

    def drop(self):
        """End without writing a trace, because the run rewinds."""
        if self.profiler:
            self.profiler.stop()
            self.profiler = None


def communication(events):
    """torch.profiler's events -> two lists of (start, end) in us: communication, and computation.

    Communication is NCCL's kernels and gloo's work. Computation is all other kernels, or on a CPU the operators.
    """
    on_device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
    kernels = [e for e in on_device if not e.is_user_annotation]
    gloo = [e for e in events if e.name.startswith("gloo:")]
    talk = gloo + [e for e in kernels if "nccl" in e.name.lower()]
    if kernels:
        work = [e for e in kernels if "nccl" not in e.name.lower()]
    else:
        callers = [e for e in events if e.name.startswith("c10d::")]  # these wait if gloo is slow to begin
        talk += callers
        # gloo's own threads add and copy tensors, which is communication
        gloo_threads = {e.thread for e in gloo} - {e.thread for e in callers}
        computes = ("aten::", "Torch-Compiled", "CompiledFunction")
        work = [e for e in events if e.name.startswith(computes) and e.thread not in gloo_threads]
    return spans(talk), spans(work)


def spans(events):
    return [(e.time_range.start, e.time_range.end) for e in events]


def covered(spans):
    """The length of the union of (start, end)."""
    length, until = 0, -math.inf
    for start, end in sorted(spans):
        length += max(0, end - max(start, until))
        until = max(until, end)
    return length


def largest(operations, unit, name, count=10):
    """A table of the `count` largest (amount, calls, operation), with the share of each in the sum. -> its lines"""
    total = sum(max(0, amount) for amount, *_ in operations) or 1
    lines = [f"{name:>12} {'share':>6} {'calls':>7}  operation"]
    for amount, calls, operation in sorted(operations, reverse=True)[:count]:
        lines.append(f"{amount * unit:12.2f} {amount / total:6.1%} {calls:7}  {operation[:80]}")
    return lines
