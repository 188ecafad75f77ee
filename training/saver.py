"""
Saves checkpoints while a run trains: when a step is done, before it is evaluated, whatever the disk does.

A checkpoint is written before its step is evaluated, so nothing that fails during an evaluation loses it. Its state
holds the step's record as "unevaluated" until the evaluation is noted; a resume that finds such a record evaluates
first. A full disk never ends a run: it trains on, and the checkpoints that are there stay good.

With checkpoint_format="plain" rank 0 writes the gathered model before the next step begins. With "sharded" each rank
writes its own part behind the steps (Background), from a copy in CPU memory. checkpoint.py has both formats.
"""

import threading
from copy import deepcopy

import torch.distributed as dist

import checkpoint
from files import finite


class Saver:
    """Saves the run that `layout` and `opt` train. `state` is the run's state as state.json has it; it changes with
    every step. `guard` and `scaler` add theirs. `watch` (guard.Watch) warns before the disk is full; the model has
    `weights` weights. All ranks call all methods."""

    def __init__(self, c, layout, opt, scaler, guard, state, run, watch, weights):
        self.c, self.layout, self.opt, self.scaler, self.guard = c, layout, opt, scaler, guard
        self.state, self.run, self.watch, self.weights = state, run, watch, weights
        self.keep = c.keep_checkpoints if c.always_save_checkpoint else 1
        self.background = Background(layout.heads) if c.checkpoint_format == "sharded" else None
        self.evaluations = {}  # checkpoint folder -> fields that its state.json does not hold yet

    # -------------------------------------------------------------------------
    # Saving

    def save(self, unevaluated=None):
        """Save a checkpoint of now. `unevaluated` is the record of a step whose evaluation is still to come.

        -> whether the checkpoint is written; for shards, whether writing has begun
        """
        self.wait()  # otherwise a failure of the checkpoint before would look like one of this
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
            if not unevaluated:  # otherwise once the evaluation says whether this is the best one
                checkpoint.prune(self.c.out_dir, self.keep)
            if self.state["step"] < self.c.max_iters:
                self.watch_disk()

        if self.background:
            return self.succeeds(begin_shards, self.state["step"])
        return self.layout.on_rank0(lambda: self.succeeds(write_plain, self.state["step"]))

    def succeeds(self, write, step):
        """Whether `write` could write the checkpoint of `step`. Where the disk refuses, the run warns and trains on."""
        try:
            write()
        except OSError as e:
            self.run.warn(f"no checkpoint at step {step}: {e}; earlier ones stay, make room in {self.c.out_dir}")
            return False
        return True

    def flush_logs(self):
        """-> bytes of metrics.jsonl on the disk. Logs that cannot be written never keep a checkpoint from the disk."""
        try:
            return self.run.flush()
        except OSError as e:
            self.watch.once("logs", f"the logs of {self.c.out_dir} cannot be written ({e}): their lines wait in "
                            "memory, and checkpoints are saved all the same")
            return self.run.length[self.run.metrics_path]

    def watch_disk(self):
        """Warn where the next checkpoints will not fit."""
        if self.layout.rank:
            return
        folders = checkpoint.steps(self.c.out_dir).values()
        self.watch.disk(self.c.out_dir, folders, self.keep, self.weights)

    def wait(self):
        """Wait for shards that are being written. -> whether every checkpoint that was begun is written"""
        written = True
        if self.background:
            written = self.succeeds(self.background.wait, self.background.step)
        if written and self.layout.rank == 0:
            self.note_evaluations()
        self.evaluations.clear()
        return written

    def poll(self):
        """Learn of shards that were written meanwhile, or could not be."""
        if self.background and self.background.done():
            self.wait()

    # -------------------------------------------------------------------------
    # Evaluations, which come after the checkpoint of their step

    def note(self, record):
        """Have the checkpoint of a step hold its evaluation: the `record` with the val_loss."""
        length = self.layout.on_rank0(self.flush_logs)
        self.state["metrics_bytes"] = length
        folder = checkpoint.place(self.c.out_dir, record)
        self.evaluations[folder] = {"val_loss": record["val_loss"], "metrics_bytes": length}
        if not self.background:
            self.wait()

    def note_evaluations(self):
        for folder, fields in self.evaluations.items():
            try:
                checkpoint.note(folder, **fields, unevaluated=None)
            except OSError as e:  # a full disk: a resume evaluates again
                self.run.warn(f"{folder} does not hold its val_loss: {e}")
        if self.evaluations:
            checkpoint.prune(self.c.out_dir, self.keep)

    def discard(self, record):
        """Remove the checkpoint of a step whose evaluation is not finite."""
        if self.wait():
            self.layout.on_rank0(lambda: checkpoint.discard(checkpoint.place(self.c.out_dir, record)))


# -----------------------------------------------------------------------------
# Shards, behind the steps


class Background:
    """Writes sharded checkpoints one after another while the training continues.

    Each rank has one and makes the same calls. Its threads talk in a process group of their own. Each checkpoint notes
    `heads`, the order in which tensor parallelism keeps the rows of c_attn.
    """

    def __init__(self, heads=None):
        self.heads = heads
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread = self.error = self.step = None

    def save(self, out_dir, model, optimizers, state, keep):
        """Begin as soon as the checkpoint before is written. When this returns, this rank's tensors are copied to CPU
        memory, so model and optimizers may change. Prunes once all is written. Raises what `wait` raises, before it
        begins."""
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        self.wait()
        tensors = BlockingAsyncStager().stage(checkpoint.shards(model, optimizers))
        self.step = state["step"]
        state = deepcopy(state)
        if self.heads:
            state["heads"] = self.heads
        self.thread = threading.Thread(target=self.write, args=(out_dir, tensors, state, keep), daemon=True)
        self.thread.start()

    def write(self, out_dir, tensors, state, keep):
        try:
            checkpoint.save_sharded(out_dir, tensors, state, self.group)
            rank = dist.get_rank() if dist.is_initialized() else 0
            checkpoint.together(lambda: rank == 0 and checkpoint.prune(out_dir, keep), self.group)
        except Exception as e:
            self.error = e

    def done(self):
        """Whether a checkpoint has been written, or has failed, that nobody has waited for yet."""
        return self.thread is not None and not self.thread.is_alive()

    def wait(self):
        """Wait until all is written. Raises, once and on all ranks, the OSError of a checkpoint that failed."""
        if self.thread:
            self.thread.join()
        error = self.error
        self.thread = self.error = None
        if error:
            raise error
