"""
Guardrails: judge each step, remember the batches to skip, and warn once of trouble ahead.

A step is bad where its loss or gradient norm is not finite (nan), or far above the steps before it (spike). The
settings on_nan and on_spike choose an action: log it, stop (Diverged), or rewind (Rewind): resume from the last
checkpoint, or begin again where there is none, and skip the batch of the bad step. A batch is named by its data step:
the training step that would read it in a run that skips no batch.
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
LEAST_DEVIATION = 1e-3  # nats, or ln(norm): a flat window still has this standard deviation, so it raises no alarm

# thresholds of the warnings
WINDOW = 32          # records a median is taken over; no warning before there are this many
SLOW = 5             # a step is slow at this many times the median ...
SLOW_MS = 1000       # ... if it also takes this much longer: shorter hiccups happen on every machine
STALLED = 0.3        # share of a step spent waiting for its batches
AHEAD = 3            # the disk must have room for this many checkpoints more
BYTES_A_WEIGHT = 12  # of a checkpoint that is not there yet: fp32 weights and AdamW's two moments

# -----------------------------------------------------------------------------
# Bad steps


class Diverged(Exception):
    """The run is lost from `step` on, because of `why`. The last checkpoint is from before."""

    def __init__(self, step, why):
        super().__init__(f"{why} at step {step}")
        self.step, self.why = step, why


class Rewind(Exception):
    """`bad` step number `step` asks the run to go back to its last checkpoint and to skip `batch`, a data step.

    train.py adds the `settings` and the `skipped` data steps that the run begins again with.
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
        return f"the {name} is {self.value:.4g}, {self.z:.1f} standard deviations above the {self.mean:.4g} before it"


class Guard:
    """Judges each step by its loss (nats) and its gradient norm.

    A spike is a value whose z-score is above `spike_z` (0: nothing is a spike): (value - mean) / standard deviation of
    the `window` steps before it; there are no spikes until the window is full. The idea is llm.c's. The norm is scored
    by its logarithm: norms are positive, fall by a factor early on and scatter by factors later, so their distribution
    has a long upper tail that would raise false alarms, while their logarithms are nearly normal, as losses are. A
    value below the mean is never a spike.

    A spike enters the window clipped to spike_z: one spike does not hide the next, and a level that stays becomes
    normal soon. With a GradScaler (`scaled`) a gradient that is not finite is no fault: the scaler searches its scale.
    """

    def __init__(self, spike_z, window, scaled=False, state=None, on_nan="stop", on_spike="log"):
        self.spike_z, self.scaled = spike_z, scaled
        self.actions = {"nan": on_nan, "spike": on_spike}
        state = state or {}
        self.windows = {name: deque(state.get(name, ()), window) for name in ("loss", "grad_norm")}

    def state(self):
        """The windows, for a checkpoint: a resumed run judges the same steps in the same way."""
        return {name: list(values) for name, values in self.windows.items()}

    def judge(self, loss, norm):
        """The next step's loss and gradient norm -> Bad, or None for a good step. Of two spikes the larger counts."""
        if not math.isfinite(loss):
            return Bad("nan", "loss", loss)
        if not math.isfinite(norm) and not self.scaled:
            return Bad("nan", "grad_norm", norm)
        scores = [self.score("loss", loss, loss)]
        if 0 < norm < math.inf:
            scores.append(self.score("grad_norm", norm, math.log(norm)))
        return max((bad for bad in scores if bad), key=lambda bad: bad.z, default=None)

    def score(self, name, value, scored):
        """Bad or None. `scored`, which is `value` or its logarithm, joins the window."""
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
        """Judge the step of a `record` (step, loss, grad_norm, ...) that trained on data step `batch`, and act on it.

        A bad step becomes an event of the `run` (monitor.Run). Raises Rewind or Diverged, as on_nan and on_spike ask;
        before Diverged the record is logged.
        """
        step, norm = record["step"], record["grad_norm"]
        bad = self.judge(record["loss"], norm)
        if bad is None:
            return
        action = self.actions[bad.kind]
        run.event(bad.kind, step=step, what=bad.what, value=bad.value, z=bad.z, data_step=batch, action=action)
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
    """ "812,4077" -> [812, 4077], rising, without repeats. Raises ValueError."""
    if not text.strip():
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"skip_batches={text!r}: it takes data steps, such as 812,4077")
    return sorted({int(part) for part in parts})


def skipped_file(out_dir):
    return Path(out_dir) / "skipped.json"


def read_skipped(out_dir):
    """The data steps that keep_skipped wrote; [] where it wrote none. Raises ValueError."""
    path = skipped_file(out_dir)
    if not path.exists():
        return []
    try:
        return sorted(int(step) for step in json.loads(path.read_text(encoding="utf-8"))["skipped"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read ({type(e).__name__}: {e}): remove it, and the next checkpoint's "
                         "state.json says what was skipped before it") from None


def keep_skipped(out_dir, skipped):
    """Write the skipped data steps to the disk, before the first checkpoint that knows them: a run that is killed at
    any moment after a rewind skips the same batches again. Raises OSError."""
    path = skipped_file(out_dir)
    if skipped:
        write_whole(path, json.dumps({"skipped": skipped}), durable=True)
    else:
        path.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Bad ends


@contextmanager
def bad_end_noted(c, run, saver, layout, skipped, profiler, stop):
    """Around the steps: a run that is lost, or has to rewind, says so on the screen and in its folder."""
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
    saver.wait()
    run.event("stop", step=diverged.step, reason=str(diverged.why))
    folders = list(checkpoint.steps(c.out_dir).values())
    kept = f"{folders[-1]} is from" if folders else "there is no checkpoint from"
    run.tell("error", f"{diverged}; {kept} before it. Lower learning_rate, or check the data")


def note_rewind(c, rewind, run, layout, skipped):
    """Write down which batches the run skips when it begins again. Raises Diverged where it has rewound too often to
    the same checkpoint, or the disk refuses."""
    bad = rewind.bad
    to = layout.on_rank0(lambda: max(checkpoint.steps(c.out_dir), default=0))
    asked = parse_steps(c.skip_batches)
    since = [batch for batch in skipped if batch > data_step(to - 1, skipped) and batch not in asked]
    if len(since) >= c.max_rewinds:
        raise Diverged(rewind.step, f"after {len(since)} rewinds to step {to}, without data steps {since}, {bad}")
    rewind.settings = c
    rewind.skipped = sorted({*skipped, rewind.batch})

    def note():
        try:
            run.event("rewind", step=rewind.step, what=bad.what, value=bad.value, z=bad.z, skipped=[rewind.batch],
                      to=to)
            run.flush()
            keep_skipped(c.out_dir, rewind.skipped)
        except OSError as e:
            return str(e)
        return None

    trouble = layout.on_rank0(note)
    if trouble:
        raise Diverged(rewind.step, f"a rewind could not be noted ({trouble}), but {bad}")
    back = f"step {to}" if to else "the beginning"
    run.tell("warning", f"{rewind}; back to {back}, and on without its batch, data step {rewind.batch}")


# -----------------------------------------------------------------------------
# Warnings


class Watch:
    """Warns of what slows a run down or will end it: each trouble once, with its figure. `warn` takes the line."""

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
        """Warn where the next checkpoints will not fit. `keep` of them and the best one stay, and a new one is written
        before an old one is removed. `checkpoints` are the folders there are, rising; the model has `weights` weights.
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
