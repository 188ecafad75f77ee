"""
Pipeline parallelism: each rank has some of the layers, and micro-batches travel from rank to rank.

The schedules are PyTorch's: GPipe (Huang et al. 2019, arXiv:1811.06965), 1F1B (Narayanan et al. 2019,
arXiv:1806.03377) and interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473).
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn

from model import GPT
from training.ranks import own_group

SCHEDULES = ("gpipe", "1f1b", "interleaved")


def count_stages(ranks, schedule):
    """The number of stages that the layers are cut into: one a rank. Interleaved: two, which are not neighbours."""
    if schedule == "interleaved" and ranks > 1:
        return 2 * ranks
    return ranks


class Stage(GPT):
    """Some layers of a GPT, under their names in the GPT.

    The `first` stage has the embedding, the `last` stage has the head and the loss. Both have a copy of a tied table.
    """

    def __init__(self, model, layers, first, last, context):
        nn.Module.__init__(self)
        self.config = model.config
        self.first = first
        self.last = last
        self.context = context
        self.divisor = None  # of the loss, as in GPT.forward; an attribute, because PyTorch cuts arguments by rows
        ends = []
        if first or last and model.config.tie_weights:
            ends.append("wte")
        if first:
            ends += ["wpe", "ln_e"]
        if last:
            ends.append("ln_f")
        parts = {name: model.transformer[name] for name in ends if name in model.transformer}
        parts["h"] = nn.ModuleDict({str(i): model.transformer.h[i] for i in layers})
        self.transformer = nn.ModuleDict(parts)
        if last:
            self.lm_head = model.lm_head
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, x, targets=None, cache=None, docs=None):
        """Token ids (B, T), or the output (B, T, n_embd) of the previous stage -> (B, T, n_embd).

        The last stage returns the loss (1,), unless a cache replaces attention. docs (B, T) and the cache are those of
        GPT.forward.
        """
        with self.context():
            rope = self.rope(x.size(1))
            if self.first:
                x = self.embed(x, docs=docs)
            other_attend = self.attend_apart(docs, x.dtype)
            for i, block in self.transformer.h.items():
                if cache:
                    other_attend = partial(cache.attend, int(i))
                x = block(x, rope, other_attend)
            if self.last and not cache:
                x = torch.stack([self.loss(x, targets, self.divisor)])
            return x


class Pipeline:
    """A GPT cut into stages over the ranks of a grid. Stage i lies on rank i modulo the number of ranks.

    `stages` are this rank's. `model` is one module of all their layers; its forward pass runs the whole pipeline.
    """

    def __init__(self, model, grid, schedule, device, context):
        """Cuts `model` over the "pp" dimension of the device mesh `grid`. The stages run in `context()`."""
        self.group = grid["pp"].get_group()
        self.rank = grid["pp"].get_local_rank()
        self.ranks = grid["pp"].size()
        self.schedule = schedule
        self.device = device
        self.by_shape = {}  # shape of a step's tokens -> PyTorch's schedule for it

        n = count_stages(self.ranks, schedule)
        self.count = n
        self.places = range(self.rank, n, self.ranks)  # numbers of this rank's stages
        ends = [i * model.config.n_layer // n for i in range(n + 1)]
        self.stages = []
        layers = []
        for i in self.places:
            own = range(ends[i], ends[i + 1])
            self.stages.append(Stage(model, own, i == 0, i == n - 1, context))
            layers += own
        last = self.rank == self.ranks - 1
        self.model = Stage(model, layers, self.rank == 0, last, context)
        self.model.forward = self.forward
        # model.modules() and model.train() must reach the stages; their parameters keep their first names
        self.model.stages = nn.ModuleList(self.stages)

        self.tied_group = None  # process group of the first and the last rank, if both hold the embedding table
        if model.config.tie_weights:
            self.tied_group = own_group(grid.mesh[[0, -1]].flatten(1).T)

    def forward_backward(self, batch, micro_batches):
        """Forward and backward pass of a step's micro-batches, joined in a loader.Batch. -> their mean loss on the rank
        with the last stage, 0 on the others."""
        x, y = batch.x, batch.y
        if x.shape not in self.by_shape:
            self.by_shape[x.shape] = self.new_schedule(x, micro_batches)
        inputs = [x] if self.rank == 0 else []
        by_rows = {"targets": y}  # cut into micro-batches, for every stage
        if batch.docs is not None:
            by_rows["docs"] = batch.docs
        self.set_divisor(batch.divisor)
        losses = []
        self.by_shape[x.shape].step(*inputs, target=y, losses=losses, **by_rows)
        if not losses:
            return torch.zeros((), device=self.device)
        return torch.stack(losses).sum().detach()

    def set_divisor(self, divisor):
        """The number that every stage's loss is divided by, or None for the mean, until it is set again."""
        for stage in self.stages:
            stage.divisor = divisor

    def new_schedule(self, x, micro_batches):
        """PyTorch's schedule for steps of this shape: it has to know the shapes that travel between stages."""
        from torch.distributed import pipelining

        rows = x[: len(x) // micro_batches]  # (B, T) of a micro-batch
        hidden = torch.empty(
            *rows.shape, self.model.config.n_embd, device=self.device, requires_grad=True
        )
        loss = torch.empty(1, device=self.device, requires_grad=True)
        stages = []
        for i, stage in zip(self.places, self.stages, strict=True):
            stage = pipelining.PipelineStage(
                stage, i, self.count, self.device, group=self.group,
                input_args=rows if i == 0 else hidden,
                output_args=loss if i == self.count - 1 else hidden,
            )
            greet_in_float32(stage)
            stages.append(stage)
        kinds = {
            "gpipe": pipelining.ScheduleGPipe,
            "1f1b": pipelining.Schedule1F1B,
            "interleaved": pipelining.ScheduleInterleaved1F1B,
        }
        return kinds[self.schedule](
            stages if self.schedule == "interleaved" else stages[0],
            micro_batches, scale_grads=False,
            # a mean over micro-batches, as without a pipeline
            loss_fn=lambda loss, _: loss.sum() / micro_batches,
        )

    def forward(self, idx, targets=None, *, docs=None, divisor=None, loss_only=True, cache=None):
        """GPT.forward without a backward pass: one stage after another, and every rank gets the loss.

        -> (None, loss), or with a cache (None, None), because the caller then wants what the cache has recorded.
        """
        self.set_divisor(divisor)
        x = idx
        for i in range(self.count):
            here = i % self.ranks
            previous = (i - 1) % self.ranks
            travels = i > 0 and previous != here
            if travels and self.rank == previous:
                dist.send(x, group=self.group, group_dst=here)
            if self.rank == here:
                if travels:
                    x = torch.empty(*idx.shape, self.model.config.n_embd, device=self.device)
                    dist.recv(x, group=self.group, group_src=previous)
                x = self.stages[i // self.ranks](x, targets, cache, docs)
        if cache is not None:
            return None, None
        last = self.ranks - 1
        loss = x if self.rank == last else torch.empty(1, device=self.device)
        dist.broadcast(loss, group=self.group, group_src=last)
        return None, loss[0]

    def sum_tied_table(self, grads):
        """Add up the gradients of an embedding table that the first and the last stage hold. Changes `grads`."""
        if self.tied_group:
            dist.all_reduce(grads["transformer.wte.weight"], group=self.tied_group)

    def counts(self, name):
        """Whether a norm counts this rank's tensor of that name: a tied table is counted on the first rank only."""
        return not (self.tied_group and self.rank and name == "transformer.wte.weight")

    def join_layers(self, by_layer):
        """One number for each layer of this rank -> (n_layer,), one for each layer of the model."""
        own = torch.tensor([int(i) for i in self.model.transformer.h], device=self.device)
        numbers = by_layer.new_zeros(self.model.config.n_layer)
        numbers.index_copy_(0, own, by_layer)
        dist.all_reduce(numbers, group=self.group)
        return numbers

    def join_tensors(self, tensors):
        """This rank's tensors by name -> on the first rank the tensors of all ranks; elsewhere {}."""
        gathered = [None] * self.ranks if self.rank == 0 else None
        dist.gather_object(tensors, gathered, group=self.group, group_dst=0)
        joined = {}
        for stage in gathered or []:
            joined |= stage
        return joined


def greet_in_float32(stage):
    """Stages greet their neighbours first. torch 2.9 sends an int64 where the neighbours expect a float32."""
    greet = stage._get_init_p2p_neighbors_ops

    def greet_in_floats():
        messages = greet()
        for message in messages:
            message.tensor = message.tensor.float()
        return messages

    stage._get_init_p2p_neighbors_ops = greet_in_floats
