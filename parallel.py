"""
A model on many devices: data, tensor and pipeline parallelism on one grid of processes, all of it PyTorch's own.

    torchrun --standalone --nproc_per_node=4 train.py config/owt_124m.py --zero_stage=3 --tp_size=2

The grid is pipeline x data x tensor. Data parallelism is DDP, or with zero_stage fully_shard (ZeRO, Rajbhandari et al.
2020, arXiv:1910.02054): 1 reduces gradients once a step, 2 after every micro-batch, 3 frees the weights between uses,
too. Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053) splits heads and hidden widths; embedding, head and
norms are whole on each rank. Pipeline parallelism gives each rank some of the layers.

The model knows nothing of this. It is initialised and loaded whole, with the same seed everywhere, and then placed, so
that every layout has the same weights; it is gathered whole for a checkpoint. Without torchrun there is no process
group, and each function here gives back what it was given.
"""

import atexit
import os
import sys
import time
import uuid
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

import checkpoint
from model import GPT, MLP, Attention
from optim import like, local

SCHEDULES = ("gpipe", "1f1b", "interleaved")


def from_environment(name, default):
    """A whole number that torchrun sets. Raises ValueError naming the variable."""
    text = os.environ.get(name) or str(default)
    if not text.strip().isdecimal():
        raise ValueError(f"the environment variable {name}={text!r} must be a whole number, as torchrun sets it; "
                         "without torchrun, unset it")
    return int(text)


def rank():
    return from_environment("RANK", 0)


def world():
    """Processes in all, from the environment: what torchrun says, never a count of devices."""
    return from_environment("WORLD_SIZE", 1)


def own_device(name, device, backend="nccl"):
    """The device of this process, of those on its machine: the LOCAL_RANK-th GPU, whatever else it is given. Over gloo,
    processes may share a GPU, as a test of their talk does."""
    local = from_environment("LOCAL_RANK", 0)
    if world() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"device={name!r}: under torchrun each process takes a GPU of its own, so say cuda")
    if backend == "gloo" and torch.cuda.device_count():
        return torch.device("cuda", local % torch.cuda.device_count())
    if local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine has no GPU of its own: there are "
                         f"{torch.cuda.device_count()}; give torchrun that --nproc_per_node")
    return torch.device("cuda", local)


def fresh(store):
    """`store` under a prefix of this start's own. torchrun's outlives a restart and still holds the addresses of the
    processes before, and its count of restarts is not the same on every machine: so rank 0 makes a name, and tells it
    to each rank under that rank's own, until the answer comes."""
    mine = uuid.uuid4().hex
    if rank():
        store.set(f"here/{rank()}", mine)
        name = store.get(mine).decode()
        store.set(f"{name}/{rank()}", "")
        return dist.PrefixStore(name, store)
    for other in range(1, world()):
        while not store.check([f"{mine}/{other}"]):
            store.set(store.get(f"here/{other}").decode(), mine)  # whose name may yet be that of the process before it
            time.sleep(0.01)
    return dist.PrefixStore(mine, store)


@contextmanager
def one_fate():
    """Around a whole run: where one rank fails, the others do, and the error that is shown is that rank's."""
    try:
        yield
    except (Exception, SystemExit) as e:
        if not dist.is_initialized():
            raise
        if isinstance(e, SystemExit) and (e.code in (None, 0) or e.code > 128):  # all of them end so
            leave(e.code or 0)
        mine = f"rank {rank()} failed ({type(e).__name__}: {e})"
        first = Layout.store.compare_set("failed", "", mine).decode()
        if first == mine or isinstance(e, SystemExit):
            raise
        print(f"rank {rank()} stops: {first.splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    if dist.is_initialized():
        leave(0)


def leave(code):
    """Ends this process of a group. A thread of gloo's may still hold tensors of the last collective, and to let go of
    them while the interpreter takes itself down aborts a process whose work is done: so there is no taking down."""
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Layout:
    """Where this process stands in the grid, and what its place in it means for a training step."""

    store = None  # what the ranks share besides the process group

    def __init__(self, device=None, *, backend="nccl", zero_stage=0, tp_size=1, pp_size=1, pp_schedule="1f1b",
                 cpu_offload=False, activation_checkpointing="none"):
        """Joins the process group. Raises ValueError for what cannot be combined."""
        self.device = device or torch.device("cpu")
        self.rank, self.world = rank(), world()
        self.zero, self.tp, self.pp, self.kind = zero_stage * (self.world > 1), tp_size, pp_size, pp_schedule
        self.offload, self.recompute = cpu_offload, activation_checkpointing
        self.dp, rest = divmod(self.world, self.tp * self.pp)
        if rest or not self.dp:
            raise ValueError(f"tp_size={tp_size} x pp_size={pp_size} does not divide the {self.world} processes")
        if cpu_offload and (not self.zero or self.device.type != "cuda"):
            raise ValueError("cpu_offload=True moves from GPUs what zero_stage=1, 2 or 3 shards: it needs both")
        self.pp_rank, self.dp_rank, self.tp_rank = 0, 0, 0
        self.module = None                # what a forward pass calls
        self.split, self.order = {}, {}   # of a tensor-parallel parameter's name: the dimension; c_attn's order of rows
        self.heads = None                 # which is that of these heads
        self.kv, self.kv_copies = {}, 1   # of c_attn's name: which rows lie on other ranks, too, and on how many
        self.kv_group = self.tied_group = self.peer_group = None
        self.schedules = {}               # of a pipeline, by the shape of a step's tokens
        if self.world == 1:
            return
        if not dist.is_initialized():
            Layout.store = fresh(next(dist.rendezvous("env://"))[0])
            gpu = f"cpu:gloo,cuda:{backend}"  # what concerns the processes goes by the CPU, and waits for no kernel
            dist.init_process_group(gpu if self.device.type == "cuda" else "gloo", store=Layout.store,
                                    rank=self.rank, world_size=self.world)
        shape = (self.pp, self.dp, self.tp)
        self.mesh = dist.init_device_mesh(self.device.type, shape, mesh_dim_names=("pp", "dp", "tp"))
        self.pp_rank, self.dp_rank, self.tp_rank = self.mesh.get_coordinate()
        if self.pp > 1:  # else all of them
            self.peer_group = own_group(self.mesh.mesh.flatten(1))

    def __str__(self):
        data = f"ZeRO-{self.zero}" if self.zero else "DDP"
        parts = [f"{data} {self.dp}" * (self.dp > 1 or self.zero > 0), f"tensor {self.tp}" * (self.tp > 1),
                 f"pipeline {self.pp} ({self.kind})" * (self.pp > 1)]
        return f"{self.world} processes: {' x '.join(filter(None, parts))}"

    # -------------------------------------------------------------------------
    # What the ranks agree on

    def first(self, function):
        """What `function` gives on rank 0, on every rank; where it ends the run there, it ends on all."""
        if self.world == 1:
            return function()
        found = [None, 0]
        try:
            if self.rank == 0:
                found = [function(), None]
        except BaseException as e:
            found = [None, e.code if isinstance(e, SystemExit) else 1]
            raise
        finally:
            dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        if found[1] is not None:
            sys.exit(found[1])
        return found[0]

    def agree(self, *numbers):
        """The largest of each whole number over the ranks."""
        if self.world == 1:
            return numbers
        numbers = torch.tensor(numbers)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def any_trouble(self, trouble):
        """A line of text or None of each rank -> on every rank that of the first that has one, or None."""
        if self.world == 1:
            return trouble
        each = [None] * self.world
        dist.all_gather_object(each, trouble)
        return next((f"rank {rank}: {line}" for rank, line in enumerate(each) if line), None)

    def mean(self, losses):
        """The mean over the data-parallel ranks of a tensor that on all but the last pipeline rank is 0."""
        if self.world > 1:
            dist.all_reduce(losses)
            losses /= self.dp * self.tp
        return losses

    def collect(self, value):
        """The values of all data-parallel ranks, in their order."""
        if self.dp == 1:
            return [value]
        values = [None] * self.dp
        dist.all_gather_object(values, value, group=self.mesh["dp"].get_group())
        return values

    @property
    def peers(self):
        """The ranks that train the same layers: (this one's place among them, how many, their all-gather)."""
        return self.dp_rank * self.tp + self.tp_rank, self.dp * self.tp, self.all_gather

    def all_gather(self, own):
        """A vector (n,) of each of the peers, equally long -> (peers, n)"""
        found = own.new_empty(self.dp * self.tp, len(own))
        dist.all_gather(list(found), own, group=self.peer_group)
        return found

    # -------------------------------------------------------------------------
    # Placing a model

    @property
    def stages(self):
        """Parts that a pipeline cuts the model in; interleaved, each rank has two that do not touch."""
        return self.pp * (2 if self.kind == "interleaved" and self.pp > 1 else 1)

    def accumulation(self, steps):
        """Micro-batches of this rank, of `steps` an update takes over all. Raises ValueError with what would do."""
        unit, least = self.dp, self.pp  # in a pipeline no rank waits for want of micro-batches
        if self.kind == "interleaved":
            unit *= self.pp  # it goes round in as many micro-batches as there are ranks
        if steps % unit or steps < least * self.dp:
            below = max(-(-least * self.dp // unit), steps // unit)
            raise ValueError(f"gradient_accumulation_steps={steps} does not do for {self}; "
                             f"{below * unit} and {(below + 1) * unit} do")
        return steps // self.dp

    def check(self, config, dtype=torch.float32):
        """Raises ValueError where a model of this GPTConfig cannot be laid out so."""
        if config.n_head % self.tp or config.mlp_dim % self.tp:
            raise ValueError(f"tp_size={self.tp} does not divide n_head={config.n_head} and the MLP's {config.mlp_dim}")
        if config.kv_heads % self.tp and self.tp % config.kv_heads:
            raise ValueError(f"tp_size={self.tp} and n_kv_head={config.kv_heads}: one has to divide the other")
        if config.n_layer < self.stages:
            raise ValueError(f"n_layer={config.n_layer} is too few for the {self.stages} stages of {self}")
        if self.pp > 1 and dtype == torch.float16:
            raise ValueError("pp_size above 1 has no loss scaling for float16: use bfloat16 or float32")

    def place(self, model, context=nullcontext, dtype=torch.float32):
        """`model`, whole and the same on each rank -> what this rank trains, whose parameters have the same names. A
        pipeline's stages run in `context`, as the caller runs the rest, which computes in `dtype`."""
        if self.tp > 1:
            self.split_layers(model)
        if self.recompute != "none":
            checkpoint_activations(model, self.recompute)
        if self.pp > 1:
            model = self.cut(model, context)
        for root in model.stages if self.pp > 1 else [model]:
            if self.tp > 1 and "wpe" in root.transformer:  # read there, not called
                with_local(root, root.transformer.wpe, "weight")
            if self.zero:
                self.shard(root, dtype)
        self.module = model
        if self.world > 1 and not self.zero and self.tp == self.pp == 1:
            with warnings.catch_warnings():  # a key with another name from torch 2.13 on
                warnings.simplefilter("ignore", FutureWarning)
                self.module = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        return model

    def shard(self, root, dtype):
        """ZeRO: attention and MLP of each block are gathered when they are needed, norms and the ends with `root`. In
        half precision their weights are gathered so, as autocast would keep a copy of each whole one; gradients are
        reduced in fp32, and what goes in and out is as it is without, so that the numbers are autocast's."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody changes in place
        policy = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        options = {"mesh": self.mesh["dp"], "offload_policy": policy}
        half = {} if dtype == torch.float32 else {"param_dtype": dtype, "reduce_dtype": torch.float32}
        short = MixedPrecisionPolicy(**half, cast_forward_inputs=False)
        units = parts_of_blocks(root)
        for module in units:
            fully_shard(module, reshard_after_forward=self.zero == 3, mp_policy=short, **options)
        fully_shard(root, reshard_after_forward=False, **options)
        for module, following in zip(units, units[1:], strict=False):  # gathered while this one computes
            module.set_modules_to_forward_prefetch([following])  # backward it is so anyway

    def split_layers(self, model):
        """Tensor parallelism: heads and hidden units over the ranks, the rest whole on each, all as DTensors.

        c_attn holds queries, keys and values one behind the other; its rows are ordered so that each rank's slice holds
        its own heads' of each. With fewer key/value heads than ranks, several ranks hold the same one.
        """
        from torch.distributed.tensor import distribute_tensor
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh, c = self.mesh["tp"], model.config
        self.heads, n_q = self.order_of_heads(c), c.n_head // self.tp * c.head_dim
        order = torch.arange((c.n_head + 2 * c.kv_heads) * c.head_dim).view(-1, c.head_dim)[self.heads].flatten()
        for i, block in enumerate(model.transformer.h):
            attn = block.attn.c_attn
            for kind, p in list(attn.named_parameters()):
                name = f"transformer.h.{i}.attn.c_attn.{kind}"
                setattr(attn, kind, nn.Parameter(p.detach()[order.to(p.device)]))
                self.order[name] = order
                kv = torch.arange(len(order) // self.tp, device=self.device) >= n_q
                self.kv[name] = self.dp_part(kv) if self.zero else kv
            attn.out_features = len(order)
            plan = {"attn.c_attn": ColwiseParallel(), "attn.c_proj": RowwiseParallel(), "mlp.c_fc": ColwiseParallel(),
                    "mlp.c_gate": ColwiseParallel(), "mlp.c_proj": RowwiseParallel()}
            plan = {name: style for name, style in plan.items() if name != "mlp.c_gate" or hasattr(block.mlp, "c_gate")}
            parallelize_module(block, mesh, plan, src_data_rank=None)
            for name, style in plan.items():
                down = isinstance(style, RowwiseParallel)
                self.split[f"transformer.h.{i}.{name}.weight"] = int(down)
                if not down:
                    self.split[f"transformer.h.{i}.{name}.bias"] = 0
            if hasattr(block.attn, "q_gain"):  # each rank's heads give it a part of the gradient
                with_local(block.attn, block.attn, "q_gain", "k_gain", summed=True)
        replicated = {}  # parameter -> DTensor: a tied head stays tied
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if not is_sharded(p):
                    if p not in replicated:
                        replicated[p] = nn.Parameter(distribute_tensor(p.detach(), mesh, src_data_rank=None))
                    setattr(module, name, replicated[p])
                    if name in ("weight", "bias"):
                        with_local(module, module, name)
        if c.kv_heads < self.tp:
            self.kv_copies = self.tp // c.kv_heads
            self.kv_group = own_group(self.mesh.mesh.view(-1, self.kv_copies))

    def order_of_heads(self, c):
        """For each head of c_attn as the ranks have them, one rank behind the other, its place in the whole."""
        q, k, v = torch.arange(c.n_head + 2 * c.kv_heads).split((c.n_head, c.kv_heads, c.kv_heads))
        each = []
        for rank in range(self.tp):
            mine = slice(rank * c.kv_heads // self.tp, max(1, c.kv_heads // self.tp) + rank * c.kv_heads // self.tp)
            each += [q.chunk(self.tp)[rank], k[mine], v[mine]]
        return torch.cat(each).tolist()

    def cut(self, model, context):
        """Pipeline parallelism: the layers that this rank holds, as one model with a list of `stages`."""
        layers = [i * model.config.n_layer // self.stages for i in range(self.stages + 1)]
        mine = range(self.pp_rank, self.stages, self.pp)
        stages = [Stage(model, range(layers[i], layers[i + 1]), i == 0, i == self.stages - 1, context) for i in mine]
        held = [layer for i in mine for layer in range(layers[i], layers[i + 1])]
        union = Stage(model, held, self.pp_rank == 0, self.pp_rank == self.pp - 1, context)
        union.forward = partial(self.relay, union)
        union.stages = nn.ModuleList(stages)  # the same modules a second time, whose names come second
        if model.config.tie_weights:
            self.tied_group = own_group(self.mesh.mesh[[0, -1]].flatten(1).T)
        return union

    # -------------------------------------------------------------------------
    # A training step

    def take(self, loader, accumulation):
        """The next micro-batch; for a pipeline all that a step has, one behind the other."""
        if self.pp == 1:
            return next(loader)
        return map(torch.cat, zip(*(next(loader) for _ in range(accumulation)), strict=True))

    def repeated(self, batch, accumulation):
        """A micro-batch where a pipeline's step takes all of them: as often as it has some."""
        return [tokens.repeat(accumulation if self.pp > 1 else 1, 1) for tokens in batch]

    def pipeline(self, model, x, y, accumulation):
        """Forward and backward pass of `accumulation` micro-batches through the stages. x, y (B, T) -> their mean loss
        where the last stage is, 0 elsewhere."""
        from torch.distributed import pipelining as pipe

        if x.shape not in self.schedules:
            rows = x[: len(x) // accumulation]
            hidden = torch.empty(*rows.shape, model.config.n_embd, device=self.device, requires_grad=True)
            one = torch.empty(1, device=self.device, requires_grad=True)
            stages = [
                with_one_greeting(pipe.PipelineStage(
                    stage, i, self.stages, self.device, input_args=hidden if i else rows,
                    output_args=one if i == self.stages - 1 else hidden, group=self.mesh["pp"].get_group(),
                )) for i, stage in zip(range(self.pp_rank, self.stages, self.pp), model.stages, strict=True)
            ]
            kind = {"gpipe": pipe.ScheduleGPipe, "1f1b": pipe.Schedule1F1B,
                    "interleaved": pipe.ScheduleInterleaved1F1B}[self.kind]
            self.schedules[x.shape] = kind(
                stages if self.kind == "interleaved" else stages[0], accumulation, scale_grads=False,
                loss_fn=lambda loss, _: loss.sum() / accumulation,  # a mean of micro-batches, as everywhere else
            )
        losses = []
        self.schedules[x.shape].step(*[x] * (self.pp_rank == 0), target=y, losses=losses, targets=y)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.device)

    def relay(self, model, idx, targets=None, *, loss_only=True, cache=None):
        """GPT.forward of a pipeline without a backward pass: stage after stage, the loss told all. -> (None, loss), or
        with a cache (None, None): what it saw is what is wanted."""
        group, x = self.mesh["pp"].get_group(), idx
        for i in range(self.stages):
            before, here = (i - 1) % self.pp, i % self.pp
            if i and before != here and self.pp_rank == before:
                dist.send(x, group=group, group_dst=here)
            if self.pp_rank == here:
                if i and before != here:
                    x = torch.empty(*idx.shape, model.config.n_embd, device=self.device)
                    dist.recv(x, group=group, group_src=before)
                x = model.stages[i // self.pp](x, targets, cache)
        if cache is not None:
            return None, None
        loss = x if self.pp_rank == self.pp - 1 else torch.empty(1, device=self.device)
        dist.broadcast(loss, group=group, group_src=self.pp - 1)
        return None, loss[0]

    def reduce(self, model):
        """After a step's last backward pass: what of the gradient is not yet the sum over all ranks becomes it."""
        if self.tp == self.pp == 1:
            return  # DDP and fully_shard have done it
        for p in model.parameters():
            if is_sharded(p) and p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(placements=p.placements)
        grads = {name: local(p.grad) for name, p in model.named_parameters()}
        if self.dp > 1 and not self.zero:
            flat = torch.cat([grad.flatten() for grad in grads.values()]) / self.dp
            dist.all_reduce(flat, group=self.mesh["dp"].get_group())
            for grad, mean in zip(grads.values(), flat.split([g.numel() for g in grads.values()]), strict=True):
                grad.copy_(mean.view_as(grad))
        for name, rows in self.kv.items() if self.kv_copies > 1 else ():
            if name in grads:
                shared = grads[name][rows]
                dist.all_reduce(shared, group=self.kv_group)
                grads[name][rows] = shared
        if self.tied_group:
            dist.all_reduce(grads["transformer.wte.weight"], group=self.tied_group)

    @property
    def warm_ups(self):
        """Passes before the first step. After its first backward pass DDP orders its buckets anew, which changes the
        order of sums: a run that goes on has the bits of one that was not stopped if both begin with two idle passes.
        """
        return 2 if isinstance(self.module, DistributedDataParallel) else 0

    @property
    def copies_whole(self):
        """Whether each rank has all of the model, and all of its gradient after the last backward pass of a step."""
        return self.world == 1 or isinstance(self.module, DistributedDataParallel)

    def cannot_compile(self):
        """Why no layer is compiled in this layout, or None: tensor parallelism's collectives lie within them."""
        return f"not with {self}" if self.tp > 1 else None

    def compile(self, model):
        """What a forward pass calls, by torch.compile: the whole, or with ZeRO and in a pipeline attention and MLP of
        each block and the loss, around which hooks and collectives stay as they are."""
        if self.copies_whole:
            return torch.compile(self.module, dynamic=False)  # a kernel for each shape, the same after a resume
        for module in parts_of_blocks(model):
            module.forward = torch.compile(module.forward, dynamic=False)
        for root in model.stages if self.pp > 1 else [model]:
            root.loss = partial(root.loss, fuse=self.device.type == "cuda")
        return self.module

    def before_forward(self, model, last):
        """Says whether the micro-batch that follows is the `last` of its step: only then are gradients reduced (but
        for stages 2 and 3), and weights freed (but for stage 3)."""
        if isinstance(self.module, DistributedDataParallel):
            self.module.require_backward_grad_sync = last
        elif self.zero and self.pp == 1:  # a pipeline's stages see to it themselves
            model.set_requires_gradient_sync(last or self.zero > 1)
            model.set_reshard_after_backward(last or self.zero == 3)

    def grad_norm(self, model):
        """The norm of the gradient of the whole model, each of its elements counted once."""
        if self.copies_whole:
            return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        return self.norms({name: p.grad for name, p in model.named_parameters()}, lambda name: 0, 1)[0]

    def norms(self, tensors, group_of, n):
        """The norms of `n` groups of the whole model's tensors, which by name lie as its parameters do, each element
        counted once. group_of(name) is a number below n, the same on every rank. All ranks call it."""
        squares = torch.zeros(n, device=self.device)
        for name, tensor in tensors.items():
            if self.tied_group and self.pp_rank and name == "transformer.wte.weight":
                continue  # the first stage has counted it
            copies = 1 if self.copies_whole else (1 if self.zero else self.dp) * (1 if name in self.split else self.tp)
            square = torch.linalg.vector_norm(local(tensor)).square()
            if self.kv_copies > 1 and name in self.kv:
                extra = torch.linalg.vector_norm(local(tensor)[self.kv[name]]).square()
                square = square - extra * (1 - 1 / self.kv_copies)
            squares[group_of(name)] += (square / copies).to(self.device)
        if not self.copies_whole:
            dist.all_reduce(squares)
        return squares.sqrt()

    def of_all_layers(self, model, figures):
        """What probe.attention found of this rank's layers and heads -> of all of the model's. All ranks call it."""
        if self.tp > 1:
            group = self.mesh["tp"].get_group()
            dist.all_reduce(figures["attn_entropy"], group=group)
            dist.all_reduce(figures["attn_logit_max"], dist.ReduceOp.MAX, group=group)
            figures["attn_entropy"] /= self.tp
        if self.pp > 1:
            held = torch.tensor([int(i) for i in model.transformer.h], device=self.device)
            for key, by_layer in figures.items():
                figures[key] = by_layer.new_zeros(model.config.n_layer).index_copy_(0, held, by_layer)
                dist.all_reduce(figures[key], group=self.mesh["pp"].get_group())
        return figures

    def finite(self, model):
        """Whether every weight is, on every rank."""
        bad = not all(local(p).isfinite().all() for p in model.parameters())
        return not self.agree(int(bad))[0]

    def rest(self, model):
        """After a forward pass without a backward one: weights that were gathered are freed."""
        if self.zero:
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()

    # -------------------------------------------------------------------------
    # Whole and part

    def whole(self, name, tensor):
        """A parameter, or what the optimizer keeps for it, as one process has it. All ranks that hold it call it."""
        tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
        if name not in self.order or not tensor.ndim:
            return tensor
        order = self.order[name].to(tensor.device)
        whole = tensor.new_empty(int(order.max()) + 1, *tensor.shape[1:])
        whole[order] = tensor
        return whole

    def part(self, name, tensor, p):
        """`tensor`, if it is whole, as `p` lies on this rank."""
        if is_sharded(tensor) or not is_sharded(p) or not tensor.ndim:
            return tensor.to(p.device)
        if name in self.order:
            tensor = tensor[self.order[name].to(tensor.device)]
        if name in self.split:
            tensor = tensor.chunk(self.tp, self.split[name])[self.tp_rank]
        return like(self.dp_part(tensor) if self.zero else tensor, p)

    def dp_part(self, tensor):
        """The rows of a tensor that ZeRO leaves this rank."""
        parts = tensor.chunk(self.dp)
        return parts[self.dp_rank] if self.dp_rank < len(parts) else tensor[:0]

    def gather(self, model, opt):
        """What checkpoint.save asks of a model and its optimizers, as one process has it, on rank 0; elsewhere of no
        use. All ranks call it."""
        if self.world == 1:
            return model, opt
        tensors = self.whole_tensors(model)
        state = {kind: self.of_all_stages({
            name: {key: self.keep(self.whole(name, t)) for key, t in values.items()} for name, values in params.items()
        }) for kind, params in opt.state_dict().items()}
        return SimpleNamespace(named_parameters=tensors.items), SimpleNamespace(state_dict=lambda: state)

    def whole_tensors(self, model):
        tensors = {name: self.keep(self.whole(name, p.detach())) for name, p in model.named_parameters()}
        return self.of_all_stages(tensors)

    def keep(self, tensor):
        return tensor.to("cpu").contiguous() if self.dp_rank == self.tp_rank == 0 else None

    def of_all_stages(self, named):
        """What the ranks of a pipeline hold by name, together, on rank 0."""
        if self.pp == 1 or self.dp_rank or self.tp_rank:
            return named
        each = [None] * self.pp if self.rank == 0 else None
        dist.gather_object(named, each, dst=0, group=self.mesh["pp"].get_group())
        return {name: value for stage in each or [] for name, value in stage.items()}

    def scatter(self, model, saved):
        """An optimizer state as one process saves it -> that of this rank's parameters."""
        if self.world == 1:
            return saved
        params = dict(model.named_parameters())
        return {kind: {name: {key: self.part(name, t, params[name]) for key, t in values.items()}
                       for name, values in states.items() if name in params} for kind, states in saved.items()}

    def optimizer_state(self, model, folder):
        """Of a checkpoint, what the optimizer keeps for this rank's parameters; of a sharded one only that is read."""
        own = dict(model.named_parameters()) if checkpoint.is_sharded(folder) else None
        return self.scatter(model, checkpoint.load_optimizer_state(folder, own, self.heads))

    def whole_model(self, model):
        """A model that runs on rank 0 alone; None elsewhere. All ranks call it."""
        if self.copies_whole:
            return model if self.rank == 0 else None
        tensors = self.whole_tensors(model)
        if self.rank:
            return None
        copy = GPT(model.config).to(self.device)
        with torch.no_grad():
            for name, p in copy.named_parameters():
                p.copy_(tensors[name])
        return copy


class Stage(GPT):
    """Some layers of a GPT under the names they have there, with the embedding if it is the `first` stage and with the
    head and the loss if it is the `last`. Of a tied table both hold a copy."""

    def __init__(self, model, layers, first, last, context):
        nn.Module.__init__(self)
        self.config, self.first, self.last, self.context = model.config, first, last, context
        ends = {"wte": first or last and model.config.tie_weights, "wpe": first, "ln_e": first, "ln_f": last}
        parts = {name: model.transformer[name] for name, mine in ends.items() if mine and name in model.transformer}
        parts["h"] = nn.ModuleDict({str(i): model.transformer.h[i] for i in layers})
        self.transformer = nn.ModuleDict(parts)
        if last:
            self.lm_head = model.lm_head
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, x, targets=None, cache=None):
        """Token ids (B, T) or what the stage before gave (B, T, n_embd) -> (B, T, n_embd), or of the last stage, if no
        cache stands in for attention as in GPT.forward, the mean loss (1,)."""
        with self.context():
            rope = self.rope(x.size(1))
            x = self.embed(x) if self.first else x
            for i, block in self.transformer.h.items():
                x = block(x, rope, cache and partial(cache.attend, int(i)))
            return torch.stack([self.loss(x, targets)]) if self.last and not cache else x


def with_one_greeting(stage):
    """A pipeline's stages greet their neighbours first; in torch 2.9 with an int64 where those expect a float32."""
    greet = stage._get_init_p2p_neighbors_ops

    def floats():
        messages = greet()
        for message in messages:
            message.tensor = message.tensor.float()
        return messages

    stage._get_init_p2p_neighbors_ops = floats
    return stage


def with_local(module, owner, *names, summed=False):
    """Have `module` run with the parameters of `owner` as plain tensors: as each tensor-parallel rank has all of them,
    so it has their gradient, or with `summed` a part of it."""
    from torch.distributed.tensor import Partial, Replicate

    forward, grads = module.forward, [Partial() if summed else Replicate()]

    def run(*args, **kwargs):
        for name in names:  # before torch.nn.Module looks among its parameters
            owner.__dict__[name] = owner._parameters[name].to_local(grad_placements=grads)
        try:
            return forward(*args, **kwargs)
        finally:
            for name in names:
                del owner.__dict__[name]

    module.forward = run


def own_group(rows):
    """The process group of this rank among those of `rows` (n, ranks), or None."""
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    return group


def parts_of_blocks(model):
    """Attention and MLP of each block, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, (Attention, MLP))]


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def checkpoint_activations(model, kind):
    """Keep only the inputs of each block ("full"), or of its attention and MLP ("selective"), and compute the rest
    again in the backward pass (Chen et al. 2016, arXiv:1604.06174). The numbers stay the same, dropout's too."""
    for block in model.transformer.h:
        for module in [block] if kind == "full" else [block.attn, block.mlp]:
            module.forward = partial(recomputed, module.forward, use_reentrant=False)
