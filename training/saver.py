"""
Saves checkpoints while a run trains.

A checkpoint is written before its step is evaluated, so an evaluation that fails cannot lose it. Its state holds the
step's record as "unevaluated" until the result is noted; a resume that finds such a record evaluates first. A full disk
never ends a run: the run trains on, and its earlier checkpoints stay good.

With checkpoint_format="plain", rank 0 writes the gathered model before the next step begins. With "sharded", each rank
copies its own part to CPU memory and writes it in a thread (Background). checkpoint.py has both formats.
"""

import threading
from copy import deepcopy

import torch.distributed as dist

import checkpoint
from files import finite


class Saver:
    """Saves the model of `layout`, the optimizer `opt`, and the run's `state`, to which scaler and guard add theirs.

    `state` is the dict that becomes state.json; the training loop changes it in place. `watch` (guard.Watch) warns
    before the disk is full; the model has `weights` weights. All ranks call all methods.
    """

    def __init__(self, c, layout, opt, scaler, guard, state, run, watch, weights):
        self.c = c
        self.layout = layout
        self.opt = opt
        self.scaler = scaler
        self.guard = guard
        self.state = state
        self.run = run
        self.watch = watch
        self.weights = weights
        self.keep = c.keep_checkpoints if c.always_save_checkpoint else 1
        self.background = Background(layout.heads) if c.checkpoint_format == "sharded" else None
        self.evaluations = {}  # checkpoint folder -> fields that its state.json does not hold yet

    # -------------------------------------------------------------------------
    # Saving

    def save(self, unevaluated=None):
        """Save a checkpoint now. `unevaluated` is the record of a step whose evaluation is still to come.

        -> whether the checkpoint is written; for shards, whether writing has begun
        """
        self.wait()  # so that a failure of the last checkpoint is not taken for a failure of this one
        if self.background:
            model, optimizers = self.layout.model, self.opt
        else:
            model, optimizers = self.layout.gather(self.opt)
        self.state["scaler"] = self.scaler.state_dict() if self.scaler.is_enabled() else None
        self.state["guard"] = self.guard.state()
        self.state["metrics_bytes"] = self.layout.on_rank0(self.flush_logs)
        saved = {**self.state, "val_loss": None, "unevaluated": finite(unevaluated)}

        def begin_shards():
            self.background.save(self.c.out_dir, model, optimizers, saved, self.keep)

        def write_plain():
            checkpoint.save(self.c.out_dir, model, optimizers, saved)
            if not unevaluated:  # otherwise prune after the evaluation, which may find that this one is the best
                checkpoint.prune(self.c.out_dir, self.keep)
            if self.state["step"] < self.c.max_iters:
                self.watch_disk()

        if self.background:
            return self.succeeds(begin_shards, self.state["step"])
        return self.layout.on_rank0(lambda: self.succeeds(write_plain, self.state["step"]))

    def succeeds(self, write, step):
        """Write the checkpoint of `step` by calling `write`. -> whether that worked; an OSError is only a warning"""
        try:
            write()
        except OSError as e:
            self.run.warn(f"no checkpoint at step {step}: {e}; earlier ones stay, "
                          f"make room in {self.c.out_dir}")
            return False
        return True

    def flush_logs(self):
        """Write the logs to the disk. -> bytes of metrics.jsonl there. A failure only warns: checkpoints matter more"""
        try:
            return self.run.flush()
        except OSError as e:
            self.watch.once("logs", f"the logs of {self.c.out_dir} cannot be written ({e}): "
                            "their lines wait in memory, and checkpoints are saved all the same")
            return self.run.length[self.run.metrics_path]

    def watch_disk(self):
        """Warn if the next checkpoints will not fit on the disk."""
        if self.layout.rank:
            return
        folders = checkpoint.steps(self.c.out_dir).values()
        self.watch.disk(self.c.out_dir, folders, self.keep, self.weights)

    def wait(self):
        """Wait for shards that are being written. -> False if one could not be written"""
        written = True
        if self.background:
            written = self.succeeds(self.background.wait, self.background.step)
        if written and self.layout.rank == 0:
            self.note_evaluations()
        self.evaluations.clear()
        return written

    def poll(self):
        """Find out, without waiting, whether shards have been written or have failed."""
        if self.background and self.background.done():
            self.wait()

    # -------------------------------------------------------------------------
    # Evaluations: each comes after the checkpoint of its step

    def note(self, record):
        """Add an evaluation to the checkpoint of its step. `record` has the val_loss."""
        length = self.layout.on_rank0(self.flush_logs)
        self.state["metrics_bytes"] = length
        folder = checkpoint.place(self.c.out_dir, record)
        self.evaluations[folder] = {"val_loss": record["val_loss"], "metrics_bytes": length}
        if not self.background:
            self.wait()

    def note_evaluations(self):
        """Write them into state.json; then it is known which checkpoint is the best, so prune."""
        for folder, fields in self.evaluations.items():
            try:
                checkpoint.note(folder, **fields, unevaluated=None)
            except OSError as e:  # a full disk; a resume would evaluate again
                self.run.warn(f"{folder} does not hold its val_loss: {e}")
        if self.evaluations:
            checkpoint.prune(self.c.out_dir, self.keep)

    def discard(self, record):
        """Remove the checkpoint of a step whose evaluation is not finite."""
        if self.wait():
            folder = checkpoint.place(self.c.out_dir, record)
            self.layout.on_rank0(lambda: checkpoint.discard(folder))


# -----------------------------------------------------------------------------
# Shards, written while the next steps run


class Background:
    """Writes sharded checkpoints in a thread, one after another, while the training continues.

    Each rank has a Background, and all make the same calls. Their threads communicate in a process group of their own.
    Each state.json notes `heads`, the order in which tensor parallelism keeps the rows of c_attn.
    """

    def __init__(self, heads=None):
        self.heads = heads
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread = self.error = self.step = None

    def save(self, out_dir, model, optimizers, state, keep):
        """Wait for the last checkpoint, copy this rank's tensors to CPU memory, and begin to write them.

        When this returns, model and optimizers may change. The thread prunes once all ranks have written. Raises what
        `wait` raises.
        """
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        self.wait()
        tensors = BlockingAsyncStager().stage(checkpoint.shards(model, optimizers))
        self.step = state["step"]
        state = deepcopy(state)
        if self.heads:
            state["heads"] = self.heads
        arguments = (out_dir, tensors, state, keep)
        self.thread = threading.Thread(target=self.write, args=arguments, daemon=True)
        self.thread.start()

    def write(self, out_dir, tensors, state, keep):
        """The thread: write, prune, and keep an error for `wait`."""
        try:
            checkpoint.save_sharded(out_dir, tensors, state, self.group)
            rank = dist.get_rank() if dist.is_initialized() else 0
            checkpoint.together(lambda: rank == 0 and checkpoint.prune(out_dir, keep), self.group)
        except Exception as e:
            self.error = e

    def done(self):
        """Whether a checkpoint is written, or has failed, and nobody has called `wait` since."""
        return self.thread is not None and not self.thread.is_alive()

    def wait(self):
        """Wait until the checkpoint is written. If that failed, raises the OSError, once and on all ranks."""
        if self.thread:
            self.thread.join()
        error = self.error
        self.thread = self.error = None
        if error:
            raise error
