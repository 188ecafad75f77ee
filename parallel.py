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

import os
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from model import GPT

SCHEDULES = ("gpipe", "1f1b", "interleaved")


def rank():
    return int(os.environ.get("RANK") or 0)


def world():
    """Processes in all, from the environment: what torchrun says, never a count of devices."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def own_device(name, device):
    """The device of this process, of those on its machine: the LOCAL_RANK-th GPU, whatever else it is given."""
    local = int(os.environ.get("LOCAL_RANK") or 0)
    if world() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"device={name!r}: under torchrun each process takes a GPU of its own, so say cuda")
    if local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine has no GPU of its own: there are "
                         f"{torch.cuda.device_count()}; give torchrun that --nproc_per_node")
    return torch.device("cuda", local)


@contextmanager
def one_fate():
    """Around a whole run: where one rank fails, the others do, and the error that is shown is that rank's."""
    try:
        yield
    except Exception as e:
        if not dist.is_initialized():
            raise
        mine = f"rank {rank()} failed ({type(e).__name__}: {e})"
        first = Layout.store.compare_set("failed", "", mine).decode()
        if first == mine:
            raise
        print(f"rank {rank()} stops: {first.splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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
        self.module = self.schedules = None
        if self.world == 1:
            return
        if not dist.is_initialized():
            Layout.store, _, _ = next(dist.rendezvous("env://"))
            gpu = f"cpu:gloo,cuda:{backend}"  # what concerns the processes goes by the CPU, and waits for no kernel
            dist.init_process_group(gpu if self.device.type == "cuda" else "gloo", store=Layout.store,
                                    rank=self.rank, world_size=self.world)
        shape = (self.pp, self.dp, self.tp)
        self.mesh = dist.init_device_mesh(self.device.type, shape, mesh_dim_names=("pp", "dp", "tp"))
        self.pp_rank, self.dp_rank, self.tp_rank = self.mesh.get_coordinate()

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

    # -------------------------------------------------------------------------
    # Placing a model

    def accumulation(self, steps):
        """Micro-batches of this rank, of `steps` an update takes over all. Raises ValueError with what would do."""
        if steps % self.dp:
            below = max(1, steps // self.dp)
            raise ValueError(f"gradient_accumulation_steps={steps} does not divide by {self.dp} data-parallel ranks; "
                             f"{below * self.dp} and {(below + 1) * self.dp} do")
        return steps // self.dp

    def place(self, model):
        """`model`, whole and the same on each rank -> what this rank trains, whose parameters have the same names."""
        if self.recompute != "none":
            checkpoint_activations(model, self.recompute)
        self.module = model
        if self.world == 1:
            return model
        if self.zero:
            self.shard(model)
        else:
            self.module = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        return model

    def shard(self, model):
        """ZeRO: each block is gathered when it is needed, the rest with the model."""
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        policy = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        options = {"mesh": self.mesh["dp"], "offload_policy": policy}
        for block in model.transformer.h:
            fully_shard(block, reshard_after_forward=self.zero == 3, **options)
        fully_shard(model, reshard_after_forward=False, **options)

    # -------------------------------------------------------------------------
    # A training step

    def before_forward(self, model, last):
        """Says whether the micro-batch that follows is the `last` of its step: only then are gradients reduced (but
        for stages 2 and 3), and weights freed (but for stage 3)."""
        if isinstance(self.module, DistributedDataParallel):
            self.module.require_backward_grad_sync = last
        elif self.zero:
            model.set_requires_gradient_sync(last or self.zero > 1)
            model.set_reshard_after_backward(last or self.zero == 3)

    def grad_norm(self, model):
        """The norm of the gradient of the whole model, each of its elements counted once."""
        if self.world == 1 or not self.zero:
            return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        grads = [local(p.grad) for p in model.parameters()]
        total = torch.stack([norm.square() for norm in torch._foreach_norm(grads)]).sum().to(self.device)
        dist.all_reduce(total)
        return total.sqrt()

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
        """A parameter, or what the optimizer keeps for it, as one process has it. All ranks call it."""
        return tensor.full_tensor() if is_sharded(tensor) else tensor

    def part(self, name, tensor, p):
        """`tensor`, which is whole, as `p` lies on this rank."""
        if not is_sharded(p) or not tensor.ndim:
            return tensor.to(p.device)
        own = tensor.chunk(self.dp)
        own = own[self.dp_rank] if self.dp_rank < len(own) else tensor[:0]
        return like(own.to(p.device), p)

    def gather(self, model, opt):
        """What checkpoint.save asks of a model and its optimizers, as one process has it, on rank 0; elsewhere of no
        use. All ranks call it."""
        if self.world == 1:
            return model, opt
        tensors = self.whole_tensors(model)
        state = {kind: {name: {key: self.keep(self.whole(name, t)) for key, t in values.items()}
                        for name, values in params.items()} for kind, params in opt.state_dict().items()}
        return SimpleNamespace(named_parameters=tensors.items), SimpleNamespace(state_dict=lambda: state)

    def whole_tensors(self, model):
        return {name: self.keep(self.whole(name, p.detach())) for name, p in model.named_parameters()}

    def keep(self, tensor):
        return tensor.to("cpu").contiguous() if self.rank == 0 else None

    def scatter(self, model, saved):
        """An optimizer state as one process saves it -> that of this rank's parameters."""
        if self.world == 1:
            return saved
        params = dict(model.named_parameters())
        return {kind: {name: {key: self.part(name, t, params[name]) for key, t in values.items()}
                       for name, values in states.items() if name in params} for kind, states in saved.items()}

    def whole_model(self, model):
        """A model that runs on rank 0 alone; None elsewhere. All ranks call it."""
        if self.world == 1 or not self.zero:
            return model if self.rank == 0 else None
        tensors = self.whole_tensors(model)
        if self.rank:
            return None
        copy = GPT(model.config).to(self.device)
        with torch.no_grad():
            for name, p in copy.named_parameters():
                p.copy_(tensors[name])
        return copy


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def local(tensor):
    """What of a tensor lies on this rank."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def like(own, p):
    """This rank's part of a tensor -> that tensor, laid out as `p` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(own.contiguous(), p.device_mesh, p.placements, run_check=False, shape=p.shape,
                              stride=p.stride())


def checkpoint_activations(model, kind):
    """Keep only the inputs of each block ("full"), or of its attention and MLP ("selective"), and compute the rest
    again in the backward pass (Chen et al. 2016, arXiv:1604.06174). The numbers stay the same, dropout's too."""
    for block in model.transformer.h:
        for module in [block] if kind == "full" else [block.attn, block.mlp]:
            module.forward = partial(recomputed, module.forward, use_reentrant=False)
