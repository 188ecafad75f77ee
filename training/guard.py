"""
Guardrails: judge each step, remember the batches to skip, and warn once of trouble ahead.

A step is bad if its loss or gradient norm is not finite (nan), or far above the steps before it (spike). The settings
on_nan and on_spike choose what happens then. `log` warns and trains on. `stop` ends the run (Diverged). `rewind`
resumes from the last checkpoint, or starts over if there is none, and skips the batch of the bad step (Rewind).

A batch is named by its data step: the training step that would read it in a run that skips no batch.
"""

import json
import math
import shutil
import signal
import statistics
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import checkpoint
from files import write_whole
from loader import data_step

ACTIONS = ("log", "stop", "rewind")
LEAST_DEVIATION = 1e-3  # nats, or ln(norm): a flat window counts as this noisy, so that it raises no false alarm

# thresholds of the warnings
WINDOW = 32          # records a median is taken over; no warning before there are this many
SLOW = 5             # a step is slow at this many times the median ...
SLOW_MS = 1000       # ... if it also takes this much longer: shorter hiccups happen on every machine
STALLED = 0.3        # share of a step spent waiting for its batches
AHEAD = 3            # the disk must have room for this many more checkpoints
BYTES_A_WEIGHT = 12  # estimate for the first checkpoint: fp32 weights and AdamW's two moments

# -----------------------------------------------------------------------------
# Bad steps


class Diverged(Exception):
    """The run is lost from `step` on, because of `why`. The last checkpoint is from before."""

    def __init__(self, step, why):
        super().__init__(f"{why} at step {step}")
        self.step, self.why = step, why


class Rewind(Exception):
    """Step number `step` is `bad`: the run goes back to its last checkpoint and skips `batch`, a data step.

    note_rewind adds the `settings` of the run and the `skipped` data steps, with which train.py calls main again.
    """

    def __init__(self, step, bad, batch):
        super().__init__(f"{bad} at step {step}")
        self.step, self.bad, self.batch = step, bad, batch
        self.settings, self.skipped = None, None


@dataclass
class Bad:
    """Why a step is bad."""

    kind: str  # nan | spike
    what: str  # loss | grad_norm
    value: float
    z: float | None = None  # a spike's z-score
    mean: float | None = None  # of the window

    def __str__(self):
        if self.kind == "nan":
            return f"the {'loss' if self.what == 'loss' else 'gradient'} is not finite"
        name = "loss" if self.what == "loss" else "gradient norm"
        height = f"{self.z:.1f} standard deviations above the {self.mean:.4g} before it"
        return f"the {name} is {self.value:.4g}, {height}"


class Guard:
    """Judges each step by its loss (nats) and its gradient norm.

    A spike is a value whose z-score is above `spike_z` (0: nothing is a spike). The z-score is (value - mean) /
    deviation over the `window` steps before it. There are no spikes until the window is full, and a value below the
    mean is never one. The idea is llm.c's.

    The norm is scored by its logarithm. Norms are positive, fall by a factor early on and scatter by factors later, so
    their distribution has a long upper tail that would raise false alarms. Their logarithms are nearly normal, as
    losses are.

    A spike enters the window clipped to spike_z: one spike does not hide the next, and a new level soon counts as
    normal. With a GradScaler (`scaled`) a gradient that is not finite is no fault: the scaler is searching its scale.
    """

    def __init__(self, spike_z, window, scaled=False, state=None, on_nan="stop", on_spike="log"):
        self.spike_z, self.scaled = spike_z, scaled
        self.actions = {"nan": on_nan, "spike": on_spike}
        state = state or {}
        self.windows = {name: deque(state.get(name, ()), window) for name in ("loss", "grad_norm")}

    def state(self):
        """The windows, for a checkpoint: a resumed run judges its steps as an unbroken run does."""
        return {name: list(values) for name, values in self.windows.items()}

    def judge(self, loss, norm):
        """The next step's loss and gradient norm -> Bad, or None for a good step. The larger of two spikes counts."""
        if not math.isfinite(loss):
            return Bad("nan", "loss", loss)
        if not math.isfinite(norm) and not self.scaled:
            return Bad("nan", "grad_norm", norm)
        scores = [self.score("loss", loss, loss)]
        if 0 < norm < math.inf:
            scores.append(self.score("grad_norm", norm, math.log(norm)))
        return max((bad for bad in scores if bad), key=lambda bad: bad.z, default=None)

    def score(self, name, value, scored):
        """-> Bad or None. `scored` is `value` or its logarithm; it joins the window."""
        window = self.windows[name]
        if not self.spike_z or len(window) < window.maxlen:
            window.append(scored)
            return None
        mean = statistics.fmean(window)
        variance = statistics.fmean((x - mean) ** 2 for x in window)
        deviation = max(LEAST_DEVIATION, math.sqrt(variance))
        z = (scored - mean) / deviation
        window.append(min(scored, mean + self.spike_z * deviation))
        if z <= self.spike_z:
            return None
        return Bad("spike", name, value, z, mean if name == "loss" else math.exp(mean))

    def check(self, record, batch, run):
        """Judge the step of a `record` (step, loss, grad_norm, ...), which trained on data step `batch`.

        A bad step becomes an event of the `run` (monitor.Run). Then on_nan or on_spike decides: a warning, Rewind, or
        Diverged. The record is logged before Diverged is raised, because the run ends there.
        """
        step, norm = record["step"], record["grad_norm"]
        bad = self.judge(record["loss"], norm)
        if bad is None:
            return
        action = self.actions[bad.kind]
        run.event(bad.kind, step=step, what=bad.what, value=bad.value, z=bad.z, data_step=batch,
                  action=action)
        if action == "rewind":
            raise Rewind(step, bad, batch)
        if action == "stop":
            run.metrics(record)
            raise Diverged(step, bad)
        skipped = "" if math.isfinite(norm) else "; its update is skipped"
        run.tell("warning", f"{bad} at step {step}, of data step {batch}{skipped}")


# -----------------------------------------------------------------------------
# Batches to skip


def parse_steps(text):
    """ "812,4077" -> [812, 4077], sorted, without repeats. Raises ValueError."""
    if not text.strip():
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"skip_batches={text!r}: it takes data steps, such as 812,4077")
    return sorted({int(part) for part in parts})


def skipped_file(out_dir):
    return Path(out_dir) / "skipped.json"


def read_skipped(out_dir):
    """The data steps that keep_skipped wrote; [] if it wrote none. Raises ValueError."""
    path = skipped_file(out_dir)
    if not path.exists():
        return []
    try:
        return sorted(int(step) for step in json.loads(path.read_text(encoding="utf-8"))["skipped"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read ({type(e).__name__}: {e}): remove it, and the next checkpoint's "
                         "state.json says what was skipped before it") from None


def keep_skipped(out_dir, skipped):
    """Write the skipped data steps to the disk. Raises OSError.

    A rewind writes them long before the next checkpoint does. So a run that is killed in between skips them again.
    """
    path = skipped_file(out_dir)
    if skipped:
        write_whole(path, json.dumps({"skipped": skipped}), durable=True)
    else:
        path.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Bad ends


@contextmanager
def bad_end_noted(c, run, saver, layout, skipped, profiler, stop):
    """Around the steps: report a lost run or a rewind on the screen and in the run's folder, then raise it again."""
    try:
        yield
    except Diverged as diverged:
        note_divergence(c, diverged, run, saver)
        raise
    except Rewind as rewind:
        saver.wait()
        try:
            note_rewind(c, rewind, run, layout, skipped)
        except Diverged as diverged:
            note_divergence(c, diverged, run, saver)
            raise
        profiler.drop()
        run.tracker.finish()  # the run that follows has the same id
        if stop.agreed:
            run.event("stop", step=rewind.step, reason=signal.Signals(stop.agreed).name)
        raise


def note_divergence(c, diverged, run, saver):
    """Write a "stop" event, and tell the user which checkpoint is left."""
    saver.wait()
    run.event("stop", step=diverged.step, reason=str(diverged.why))
    folders = list(checkpoint.steps(c.out_dir).values())
    last = f"{folders[-1]} is from" if folders else "there is no checkpoint from"
    run.tell("error", f"{diverged}; {last} before it. Lower learning_rate, or check the data")


def note_rewind(c, rewind, run, layout, skipped):
    """Write down which batches the run skips when it begins again. Raises Diverged if it has rewound to the same
    checkpoint too often, or if the disk is full."""
    bad, step = rewind.bad, rewind.step
    to = layout.on_rank0(lambda: max(checkpoint.steps(c.out_dir), default=0))
    asked = parse_steps(c.skip_batches)
    # every rewind to this checkpoint has left one skipped batch after it
    last_seen = data_step(to - 1, skipped)
    since = [batch for batch in skipped if batch > last_seen and batch not in asked]
    if len(since) >= c.max_rewinds:
        raise Diverged(step, f"after {len(since)} rewinds to step {to}, without data steps {since}, {bad}")
    rewind.settings = c
    rewind.skipped = sorted({*skipped, rewind.batch})

    def note():
        try:
            run.event("rewind", step=step, what=bad.what, value=bad.value, z=bad.z,
                      skipped=[rewind.batch], to=to)
            run.flush()
            keep_skipped(c.out_dir, rewind.skipped)
        except OSError as e:
            return str(e)
        return None

    trouble = layout.on_rank0(note)
    if trouble:
        raise Diverged(step, f"a rewind could not be noted ({trouble}), but {bad}")
    back = f"step {to}" if to else "the beginning"
    run.tell("warning", f"{rewind}; back to {back}, skipping its batch, data step {rewind.batch}")


# -----------------------------------------------------------------------------
# Warnings


class Watch:
    """Warns once of each trouble that slows a run down or will end it. `warn` takes the line."""

    def __init__(self, warn):
        self.warn = warn
        self.warned = set()
        self.step_ms = deque(maxlen=WINDOW)
        self.waiting = deque(maxlen=WINDOW)  # share of each step spent waiting for data

    def once(self, trouble, message):
        if trouble not in self.warned:
            self.warned.add(trouble)
            self.warn(message)

    def step(self, step, parts):
        """The milliseconds of a logged step, by part (StepTimer.read)."""
        total = sum(parts.values())
        if len(self.step_ms) == WINDOW:
            median = statistics.median(self.step_ms)
            if total > SLOW * median and total > median + SLOW_MS:
                longest = max(parts, key=parts.get)
                self.once("slow", f"step {step} took {total / 1000:.1f} s, {total / median:.0f} times the median of "
                          f"the {WINDOW} before it; most of it was {longest} = {parts[longest]:.0f}")
        self.step_ms.append(total)
        self.waiting.append(parts["data_ms"] / total)
        if len(self.waiting) == WINDOW:
            share = statistics.median(self.waiting)
            if share > STALLED:
                self.once("stall", f"waiting for batches is {share:.0%} of a step's time (median of {WINDOW}): more "
                          "loader_threads or prefetch, or a faster disk")

    def disk(self, out_dir, checkpoints, keep, weights):
        """Warn if the next checkpoints will not fit on the disk.

        The last `keep` and the best one stay, and a new one is written before an old one is removed. `checkpoints`
        are the existing folders, oldest first; the model has `weights` weights.
        """
        try:
            sizes = [folder_bytes(folder) for folder in checkpoints]
            free = shutil.disk_usage(out_dir).free
        except OSError:  # for example, another process has just removed a checkpoint
            return
        size = sizes[-1] if sizes else BYTES_A_WEIGHT * weights
        more = min(AHEAD, max(1, keep + 2 - len(sizes)))
        if free < size * more:
            self.once("disk", f"{free / 1e9:.3g} GB are free in {out_dir}, less than the next checkpoints take ({more} "
                      f"of {size / 1e9:.3g} GB): make room, or lower keep_checkpoints")


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.iterdir())
