"""
Measurements of a run while it trains: validation, probes, communication, and the record of a step.

Nothing here changes the run: with or without a measurement, weights, optimizer and random numbers are the same bits.
"""

import math

import torch

import device
from device import what_failed
from eval import evaluate
from infer import stream
from loader import context_length, evaluation_rows, fixed_batches, keyed
from training.guard import Diverged
from training.monitor import Hardware, show
from training.probe import attention


def context_at(c, step):
    """Tokens of context at `step`. The rows of a batch are cut to it, so the data keeps its order."""
    return context_length(step, c.block_size, c.context_start, c.context_iters or c.max_iters // 2)


def seed_dropout(c, layout, step, micro):
    """Seed the dropout of one pass by (seed, step, micro-batch), so that a resumed run drops the same activations."""
    if c.dropout:
        micro_batch = micro * layout.dp + layout.dp_rank  # counted over all ranks
        pass_seed = keyed(c.seed, step, micro_batch, "dropout") >> 1  # 63 bits
        torch.manual_seed(pass_seed + layout.pp_rank)


def validation_loss(c, layout, tokens, context, compiled=None):
    """eval.evaluate over the fixed validation windows, which the ranks share. `compiled` runs the full batches."""
    rows = evaluation_rows(c.block_size)
    result = evaluate(layout.model, tokens, c.block_size, rows, c.eval_iters, context,
                      layout.dp_rank, layout.dp, layout.gather_objects, compiled=compiled)
    layout.free_gathered()
    return result


class Costs:
    """The size of a whole model: its number of `weights`, and the `flops` of a training token by context length."""

    def __init__(self, model, block_size):
        self.weights = model.num_params()
        lengths = [block_size >> n for n in range(block_size.bit_length())]
        self.flops = {length: model.train_flops(length) for length in lengths}


class Measure:
    """The measurements of one run. All ranks call all methods."""

    def __init__(self, c, layout, machine, data, run, costs):
        self.c = c
        self.layout = layout
        self.machine = machine
        self.data = data
        self.run = run
        self.costs = costs
        self.evaluator = None  # the compiled model for evaluations; None: they run uncompiled
        self.hardware = Hardware(machine.device)
        self.tokens_per_step = c.batch_size * layout.accumulation * layout.dp * c.block_size
        if c.peak_flops:
            self.peak, self.peak_why = c.peak_flops, "asked for"
        else:
            self.peak = device.peak_flops(machine.device, machine.dtype, c.tf32)  # None where it is not known
            self.peak_why = "its data sheet" if machine.device.type == "cuda" else "measured"

    # -------------------------------------------------------------------------
    # Validation

    def validate(self, step):
        """Evaluate, and print a sample if the settings ask for one. -> the loss, and a digest of its tokens"""
        result = self.validation_loss()
        c, data = self.c, self.data
        if c.sample_tokens and data.tokenizer and math.isfinite(result["loss"]):
            model = self.layout.gather_model()
            if model is not None:  # on rank 0
                text = self.sample(model)
                self.run.event("sample", step=step, text=text)
                self.run.say(f"---- sample at step {step}\n{text}\n----")
        return {
            "val_loss": result["loss"], "val_tokens": result["tokens"],
            "val_sha256": result["tokens_sha256"],
        }

    def validation_loss(self):
        """validation_loss of the run; if the compiled model fails, again without it."""
        c, layout, tokens, context = self.c, self.layout, self.data.val, self.machine.context
        evaluator = self.evaluator
        try:
            return validation_loss(c, layout, tokens, context, evaluator)
        except RuntimeError as e:
            if evaluator is None or not isinstance(e, torch._dynamo.exc.TorchDynamoException):
                raise
            self.evaluator = None
            why = what_failed(e)
            self.run.warn(f"torch.compile does not work for the evaluation ({why}); it runs uncompiled")
            return validation_loss(c, layout, tokens, context)

    def sample(self, model):
        """sample_start and sample_tokens more tokens, as text. The same weights write the same text each time."""
        c, tokenizer = self.c, self.data.tokenizer
        prompt = tokenizer.encode(c.sample_start)
        model.eval()
        with self.machine.context():
            drawn = stream(model, prompt, c.sample_tokens, temperature=0.8, top_k=200, seed=c.seed)
            tokens = prompt + list(drawn)
        model.train()
        return tokenizer.decode(tokens)

    def evaluate_step(self, record, saver, saved, **more):
        """Validate the step of `record`, and log the record with the result and `more`. -> the validation loss

        If the step's checkpoint was `saved`, it gets the result as well. Raises Diverged for a loss that is not finite,
        after removing that checkpoint.
        """
        result = self.validate(record["step"])
        if not math.isfinite(result["val_loss"]):
            if saved:
                saver.discard(record)
            raise Diverged(record["step"], "the validation loss is not finite")
        record = {**record, **result, **more}
        self.log(record)
        if saved:
            saver.note(record)
        return result["val_loss"]

    # -------------------------------------------------------------------------
    # The record of a step

    def outcome(self, step, wall_s, loss, grad_norm):
        """The record of a step that may be bad. `wall_s` is the training time of the run so far."""
        return {
            "step": step, "tokens": step * self.tokens_per_step, "wall_s": round(wall_s, 3),
            "loss": loss, "grad_norm": grad_norm,
        }

    def record(self, step, wall_s, loss, lr, grad_norm, step_ms, parts):
        """The line of a step in metrics.jsonl. `parts` are the milliseconds of its parts; `step_ms` is the mean time of
        a step since the last record."""
        tok_per_s = self.tokens_per_step / (step_ms / 1000)
        mfu = None
        if self.peak:
            flops = tok_per_s * self.costs.flops[context_at(self.c, step - 1)]
            mfu = flops / (self.peak * self.layout.world)
        record = {
            "step": step, "tokens": step * self.tokens_per_step, "wall_s": round(wall_s, 3),
            "loss": loss, "lr": lr, "grad_norm": grad_norm,
            "tok_per_s": round(tok_per_s), "mfu": mfu, **self.hardware.read(),
            "step_ms": round(step_ms, 3),
        }
        return record | {part: round(ms, 3) for part, ms in parts.items()}

    def log(self, record):
        """Write a line to metrics.jsonl, and one to the screen."""
        self.run.metrics(record)
        if self.run.writes:
            show(record, self.data.unit, self.c.max_iters)

    # -------------------------------------------------------------------------
    # Probes and communication

    def look_inside(self, update):
        """Probe one step: its `update` (probe.Update), and the attention on the first validation window."""
        tokens = self.data.val.parts[0][0]
        batch = next(fixed_batches(tokens, self.c.block_size, 1))
        length = min(self.c.block_size, len(tokens) - 1)  # a short split ends within its first window
        window = batch.x[:, :length].to(self.machine.device)
        figures = attention(self.layout.model, window, self.machine.context)
        figures = self.layout.gather_probe(figures)
        self.layout.free_gathered()
        return update.read() | {name: by_layer.tolist() for name, by_layer in figures.items()}

    def communication(self, loader, opt, profiler, step):
        """Measure the communication of a step that no computation hides. -> {"comm_ms": ms}; {} during a trace

        It runs three micro-batches twice each, and the faster time counts: the first; the second, which stands for all
        others in the middle; and the last, which reduces the gradients.
        """
        layout, last = self.layout, self.layout.passes - 1
        batch = self.to_device(layout.repeat_batch(loader.batch(step)), step)

        def run_pass(micro):
            seed_dropout(self.c, layout, step, micro)
            layout.forward_backward(batch, micro)
            if micro == last:
                layout.reduce_gradients()

        stands_for = {0: 1, 1: last - 1, last: 1}  # micro-batch -> number of micro-batches like it
        times = {micro: [] for micro, count in stands_for.items() if count > 0}  # two of each, in ms
        for _ in range(2):
            for micro, ms in times.items():
                ms.append(profiler.exposed(lambda micro=micro: run_pass(micro)))
            opt.zero_grad()
        if None in times[0]:
            return {}
        total = sum(stands_for[micro] * min(ms) for micro, ms in times.items())
        return {"comm_ms": round(total, 3)}

    def to_device(self, batch, step, pinned=False):
        """A Batch of rows of block_size -> on the device, with each row cut into rows of the context at `step`."""
        return batch.to(self.machine.device, non_blocking=pinned).cut(context_at(self.c, step))
