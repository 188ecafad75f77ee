"""
Guardrails: which step has gone wrong, which batches are left out since, and what a run warns of once.

A step is bad where its loss or gradient norm is not finite (nan), or far above those of the steps before it (spike).
What then happens is train.py's: it logs, stops, or rewinds, which is to go on from the last checkpoint, or from the
beginning where there is none, without the batch of the bad step. A batch is named by its data step: the training step
that takes it in a run that leaves none out.
"""

import json
import math
import os
import shutil
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

ACTIONS = ("log", "stop", "rewind")
LEAST = 1e-3  # a window's standard deviation, in nats or of ln(norm), counts as at least this: what is flat is calm

# of the warnings
ENOUGH = 32          # records until a median says something
SLOW = 5             # times the median: a slow step,
SLOW_MS = 1000       # if it is longer by this much, too: below it is what any system does now and then
STALLED = 0.3        # of a step spent waiting for its batches
AHEAD = 3            # checkpoints to come that there has to be room for
BYTES_A_WEIGHT = 12  # of a checkpoint, before there is one: fp32 weights and AdamW's two moments

# -----------------------------------------------------------------------------
# Bad steps


@dataclass
class Bad:
    kind: str  # nan | spike
    what: str  # loss | grad_norm
    value: float
    z: float | None = None  # a spike's z-score
    mean: float | None = None  # of the window

    def __str__(self):
        if self.kind == "nan":
            return f"the {'loss' if self.what == 'loss' else 'gradient'} is not finite"
        what = "loss" if self.what == "loss" else "gradient norm"
        return f"the {what} is {self.value:.4g}, {self.z:.1f} standard deviations above the {self.mean:.4g} before it"


class Guard:
    """Judges each step by its loss (nats) and its gradient norm.

    A spike's z-score is above `spike_z` (0: there are none): (value - mean) / standard deviation of the `window` steps
    before it; until so many were seen, there are none either. The idea is llm.c's. Of the norm it is the logarithm that
    is scored: norms are positive, fall by a factor early on and scatter by factors later, so their distribution has a
    long upper tail, which would raise false alarms; that of their logarithms is near to a normal one, as the loss's is.
    What is below the mean is no spike.

    A spike enters the window as spike_z: one does not hide the next, and a level that stays is the new normal soon.
    With a GradScaler (`scaled`) a gradient that is not finite is no fault: it finds the scale so.
    """

    def __init__(self, spike_z, window, scaled=False, state=None):
        self.spike_z, self.scaled = spike_z, scaled
        self.windows = {what: deque((state or {}).get(what, ()), window) for what in ("loss", "grad_norm")}

    def state(self):
        """For a checkpoint: the same steps are judged in the same way after a resume."""
        return {what: list(values) for what, values in self.windows.items()}

    def judge(self, loss, norm):
        """The next step's loss and gradient norm -> Bad, of a spike the larger; None where it is a good one."""
        if not math.isfinite(loss):
            return Bad("nan", "loss", loss)
        if not math.isfinite(norm) and not self.scaled:
            return Bad("nan", "grad_norm", norm)
        found = [self.score("loss", loss, loss)]
        if 0 < norm < math.inf:
            found.append(self.score("grad_norm", norm, math.log(norm)))
        return max((bad for bad in found if bad), key=lambda bad: bad.z, default=None)

    def score(self, what, value, scored):
        """Bad or None; `scored`, which is `value` or its logarithm, becomes part of the window."""
        window = self.windows[what]
        if not self.spike_z or len(window) < window.maxlen:
            window.append(scored)
            return None
        mean = statistics.fmean(window)
        deviation = max(LEAST, math.sqrt(statistics.fmean((x - mean) ** 2 for x in window)))
        z = (scored - mean) / deviation
        window.append(min(scored, mean + self.spike_z * deviation))
        usual = mean if what == "loss" else math.exp(mean)
        return Bad("spike", what, value, z, usual) if z > self.spike_z else None


# -----------------------------------------------------------------------------
# Batches that are left out


def parse_steps(text):
    """ "812,4077" -> [812, 4077], rising, each once. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"skip_batches={text!r}: it takes data steps, such as 812,4077")
    return sorted(set(map(int, parts)))


def skipped_file(out_dir):
    return Path(out_dir) / "skipped.json"


def read_skipped(out_dir):
    """What keep_skipped wrote, or []. Raises ValueError."""
    path = skipped_file(out_dir)
    if not path.exists():
        return []
    try:
        return sorted(map(int, json.loads(path.read_text(encoding="utf-8"))["skipped"]))
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read ({type(e).__name__}: {e}): remove it, and the next checkpoint's "
                         "state.json says what was skipped before it") from None


def keep_skipped(out_dir, skipped):
    """Have the disk hold them before the first checkpoint that does: a run that is killed at any moment after a rewind
    leaves the same batches out. Raises OSError."""
    path = skipped_file(out_dir)
    if not skipped:
        path.unlink(missing_ok=True)
        return
    beside = path.with_name(f".{path.name}")
    with open(beside, "w", encoding="utf-8") as f:
        json.dump({"skipped": skipped}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


# -----------------------------------------------------------------------------
# What is said once


class Watch:
    """Says what slows a run or will end it, each once, with the figure. `warn` takes the line."""

    def __init__(self, warn):
        self.warn, self.said = warn, set()
        self.took, self.waited = deque(maxlen=ENOUGH), deque(maxlen=ENOUGH)

    def once(self, what, message):
        if what not in self.said:
            self.said.add(what)
            self.warn(message)

    def step(self, step, parts):
        """The milliseconds of a step that is logged, by part (StepTimer.read)."""
        took = sum(parts.values())
        if len(self.took) == ENOUGH:
            usual = statistics.median(self.took)
            if took > SLOW * usual and took > usual + SLOW_MS:
                most = max(parts, key=parts.get)
                self.once("slow", f"step {step} took {took / 1000:.1f} s, {took / usual:.0f} times the median of the "
                          f"{ENOUGH} before it; most of it was {most} = {parts[most]:.0f}")
        self.took.append(took)
        self.waited.append(parts["data_ms"] / took)
        if len(self.waited) == ENOUGH and (share := statistics.median(self.waited)) > STALLED:
            self.once("stall", f"waiting for batches is {share:.0%} of a step's time (median of {ENOUGH}): more "
                      "loader_threads or prefetch, or a faster disk")

    def disk(self, out_dir, checkpoints, keep, weights):
        """Whether there is room for the next checkpoints: `keep` of them and the best stay, and one is written before
        another is removed. `checkpoints` are the folders there are, rising, of a model of so many `weights`."""
        try:
            sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in checkpoints]
            free = shutil.disk_usage(out_dir).free
        except OSError:  # another process removed one meanwhile, say
            return
        each, more = sizes[-1] if sizes else BYTES_A_WEIGHT * weights, min(AHEAD, max(1, keep + 2 - len(sizes)))
        if free < each * more:
            self.once("disk", f"{free / 1e9:.3g} GB are free in {out_dir}, less than the next checkpoints take ({more} "
                      f"of {each / 1e9:.3g} GB): make room, or lower keep_checkpoints")
