"""
A model on many devices: data, tensor and pipeline parallelism on one grid of processes, with PyTorch's own tools.

    torchrun --standalone --nproc_per_node=4 train.py config/owt_124m.py --zero_stage=3 --tp_size=2

The grid is pipeline x data x tensor. Data parallelism is DDP, or with zero_stage fully_shard (ZeRO, Rajbhandari et al.
2020, arXiv:1910.02054): stage 1 reduces gradients once a step, 2 after every micro-batch, and 3 also frees the weights
between uses. Tensor parallelism (training/tensor_parallel.py) splits heads and hidden widths. Pipeline parallelism
(training/pipeline_parallel.py) gives each rank some of the layers.

The model knows nothing of this. Every rank initialises or loads the whole model, with the same seed. Layout.place then
puts it on the grid, so every layout has the same weights. Layout.gather joins it again for a checkpoint.
"""

import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recomputed

import checkpoint
from loader import join_batches
from model import GPT, MLP, Attention
from optim import is_dtensor, laid_out_like, local, map_state
from training.pipeline_parallel import Pipeline, count_stages
from training.ranks import Ranks, average_in_place, gather_objects, gather_vectors, own_group
from training.tensor_parallel import SplitLayers, with_local


class Layout(Ranks):
    """The grid of processes, the place of this process in it, and how a model is trained on it.

    `pp`, `dp` and `tp` are the sizes of the grid, `pp_rank`, `dp_rank` and `tp_rank` the place of this process. After
    `place`, the other methods work on the placed model. Every rank calls them.
    """

    def __init__(self, device=None, *, backend="nccl", zero_stage=0, tp_size=1, pp_size=1,
                 pp_schedule="1f1b", cpu_offload=False, activation_checkpointing="none"):
        """Joins the process group. Raises ValueError for settings that cannot be combined."""
        super().__init__()
        self.device = device or torch.device("cpu")
        self.zero = zero_stage if self.world > 1 else 0
        self.tp = tp_size
        self.pp = pp_size
        self.pp_schedule = pp_schedule
        self.offload = cpu_offload
        self.recompute = activation_checkpointing
        self.dp, rest = divmod(self.world, self.tp * self.pp)
        if rest or not self.dp:
            raise ValueError(f"tp_size={tp_size} x pp_size={pp_size} does not divide "
                             f"the {self.world} processes")
        if cpu_offload and (not self.zero or self.device.type != "cuda"):
            raise ValueError("cpu_offload=True moves the shards of zero_stage=1, 2 or 3 from GPUs to the CPU: "
                             "it needs a GPU and a zero_stage")

        self.accumulation = 1     # micro-batches of this rank in a step
        self.model = None         # the part of the model that this rank trains
        self.module = None        # what a forward pass calls: the model, perhaps in DDP or compiled
        self.ddp = None           # the model in DDP, or None
        self.split = None         # the SplitLayers of tensor parallelism, or None
        self.heads = None         # the order of c_attn's heads under tensor parallelism
        self.pipeline = None      # the Pipeline, or None
        self.context = nullcontext
        self.pp_rank = self.dp_rank = self.tp_rank = 0
        self.peer_group = None    # the process group of the ranks that train the same layers; None: all ranks
        if self.world == 1:
            return
        self.join_group(self.device, backend)
        grid = (self.pp, self.dp, self.tp)
        self.mesh = dist.init_device_mesh(self.device.type, grid, mesh_dim_names=("pp", "dp", "tp"))
        self.pp_rank, self.dp_rank, self.tp_rank = self.mesh.get_coordinate()
        if self.pp > 1:
            self.peer_group = own_group(self.mesh.mesh.flatten(1))

    def __str__(self):
        parts = []
        if self.zero:
            parts.append(f"ZeRO-{self.zero} {self.dp}")
        elif self.dp > 1:
            parts.append(f"DDP {self.dp}")
        if self.tp > 1:
            parts.append(f"tensor {self.tp}")
        if self.pp > 1:
            parts.append(f"pipeline {self.pp} ({self.pp_schedule})")
        return f"{self.world} processes: {' x '.join(parts)}"

    # -------------------------------------------------------------------------
    # Whether a run fits the grid

    def check(self, config, dtype=torch.float32):
        """Raises ValueError if a model of this GPTConfig does not fit the grid."""
        if config.n_head % self.tp or config.mlp_dim % self.tp:
            raise ValueError(f"tp_size={self.tp} does not divide n_head={config.n_head} "
                             f"and the MLP's {config.mlp_dim}")
        if config.kv_heads % self.tp and self.tp % config.kv_heads:
            raise ValueError(f"tp_size={self.tp} and n_kv_head={config.kv_heads}: "
                             "one has to divide the other")
        stages = count_stages(self.pp, self.pp_schedule)
        if config.n_layer < stages:
            raise ValueError(f"n_layer={config.n_layer} is too few for the {stages} stages of {self}")
        if self.pp > 1 and dtype == torch.float16:
            raise ValueError("pp_size above 1 has no loss scaling for float16: use bfloat16 or float32")

    def share_micro_batches(self, micro_batches):
        """Divide an update's micro-batches among the ranks. -> this rank's number of them, now `accumulation`.
        Raises ValueError naming numbers that would work."""
        least = self.pp * self.dp  # fewer would leave ranks of a pipeline without work
        unit = self.dp  # the number must be a multiple of it
        if self.pp_schedule == "interleaved":
            unit *= self.pp  # its micro-batches come in rounds of one for each rank
        if micro_batches % unit or micro_batches < least:
            below = max(-(-least // unit), micro_batches // unit)
            raise ValueError(f"gradient_accumulation_steps={micro_batches} does not work with {self}; "
                             f"{below * unit} and {(below + 1) * unit} do")
        self.accumulation = micro_batches // self.dp
        return self.accumulation

    # -------------------------------------------------------------------------
    # Placing a model

    def place(self, model, context=nullcontext, dtype=torch.float32):
        """The whole model, the same on each rank -> the part that this rank trains, with the same parameter names.

        Forward passes run in `context()`, which computes in `dtype`. The order is fixed: split layers, recompute
        activations, cut into stages, and wrap these for data parallelism.
        """
        self.context = context
        if self.tp > 1:
            self.split = SplitLayers(model, self.mesh, self.device)
            self.heads = self.split.heads
            for name, rows in self.split.kv_rows.items():
                self.split.kv_rows[name] = self.zero_part(rows)
        if self.recompute != "none":
            checkpoint_activations(model, self.recompute)
        if self.pp > 1:
            self.pipeline = Pipeline(model, self.mesh, self.pp_schedule, self.device, context)
            model = self.pipeline.model
        self.model = model
        for root in self.roots:
            if self.tp > 1 and "wpe" in root.transformer:  # GPT.embed reads this table without calling its module
                with_local(root, root.transformer.wpe, "weight")
            if self.zero:
                self.shard_weights(root, dtype)
        if self.world > 1 and not self.zero and self.tp == self.pp == 1:
            with warnings.catch_warnings():  # torch 2.13 renames one of these arguments
                warnings.simplefilter("ignore", FutureWarning)
                self.ddp = DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.module = self.ddp or model
        return model

    @property
    def roots(self):
        """The modules whose forward pass is called: the model, or the stages of a pipeline."""
        return self.pipeline.stages if self.pipeline else [self.model]

    def shard_weights(self, root, dtype):
        """ZeRO: gather attention and MLP of each block when they run; embedding, norms and head come with `root`.

        In half precision the weights are gathered in `dtype`, because autocast would keep a second copy of each whole
        weight. Gradients are reduced in fp32. Inputs and outputs keep their dtype, so the numbers are autocast's.
        """
        from torch.distributed import fsdp

        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes to it
        offload = fsdp.CPUOffloadPolicy() if self.offload else fsdp.OffloadPolicy()
        shard = partial(fsdp.fully_shard, mesh=self.mesh["dp"], offload_policy=offload)
        policy = fsdp.MixedPrecisionPolicy(cast_forward_inputs=False)
        if dtype != torch.float32:
            policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        units = parts_of_blocks(root)
        for module in units:
            shard(module, reshard_after_forward=self.zero == 3, mp_policy=policy)
        shard(root, reshard_after_forward=False)
        for module, following in zip(units, units[1:], strict=False):
            # gather the next part while this one computes; the backward pass does so anyway
            module.set_modules_to_forward_prefetch([following])

    # -------------------------------------------------------------------------
    # A training step

    @property
    def passes(self):
        """Calls of forward_backward in a step: a pipeline takes all micro-batches in one."""
        return 1 if self.pp > 1 else self.accumulation

    def next_batch(self, loader):
        """The Batch of the next pass, on the CPU. A pipeline takes the whole step in one pass."""
        if self.pp == 1:
            return next(loader)
        return join_batches([next(loader) for _ in range(self.accumulation)])

    def repeat_batch(self, batch):
        """The Batch of one micro-batch -> that of a pass. A pipeline's pass repeats it for each micro-batch."""
        return batch if self.pp == 1 else join_batches([batch] * self.accumulation)

    def forward_backward(self, batch, micro, scaler=None, timer=None):
        """Pass number `micro` of a step on a loader.Batch, forward and backward. -> the loss, detached. The step's loss
        and gradient are the means over its passes and data-parallel ranks.

        Gradients are reduced in the last pass, number passes - 1; -1 is never the last. In a pipeline the loss is 0 on
        the ranks without the last stage. `timer` (monitor.StepTimer) measures the parts of the step.
        """
        mark = timer.mark if timer else lambda part: None
        if self.pipeline:
            loss = self.pipeline.forward_backward(batch, self.accumulation)
            mark("pipeline_ms")
            return loss
        self.before_forward(last=micro == self.passes - 1)
        with self.context():
            _, loss = self.module(batch.x, batch.y, docs=batch.docs, divisor=batch.divisor, loss_only=True)
        mark("forward_ms")
        share = loss / self.accumulation
        if scaler:
            share = scaler.scale(share)
        share.backward()
        mark("backward_ms")
        return loss.detach()

    def before_forward(self, last):
        """Tell DDP or ZeRO whether the next pass is the `last` of its step: it reduces gradients, and with ZeRO it
        frees gathered weights. ZeRO-2 and 3 reduce gradients in every pass; ZeRO-3 frees weights in every pass."""
        if self.ddp:
            self.ddp.require_backward_grad_sync = last
        elif self.zero and not self.pipeline:  # PyTorch's pipeline schedules do this themselves
            self.model.set_requires_gradient_sync(last or self.zero > 1)
            self.model.set_reshard_after_backward(last or self.zero == 3)

    def reduce_gradients(self):
        """After a step's last backward pass: all-reduce whatever DDP and fully_shard have not reduced already."""
        if self.tp == self.pp == 1:
            return
        for p in self.model.parameters():
            if is_dtensor(p) and p.grad.placements != p.placements:  # a partial sum
                p.grad = p.grad.redistribute(placements=p.placements)
        grads = {name: local(p.grad) for name, p in self.model.named_parameters()}
        if self.dp > 1 and not self.zero:
            average_in_place(list(grads.values()), self.dp, self.mesh["dp"].get_group())
        if self.split:
            self.split.sum_shared_heads(grads)
        if self.pipeline:
            self.pipeline.sum_tied_table(grads)

    def mean(self, losses):
        """Average losses over the data-parallel ranks. In a pipeline only the last rank has a loss; others have 0."""
        if self.world > 1:
            dist.all_reduce(losses)
            losses /= self.dp * self.tp
        return losses

    def free_gathered(self):
        """After a forward pass without a backward pass: free the weights that ZeRO has gathered."""
        if self.zero:
            for module in self.model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()

    # -------------------------------------------------------------------------
    # Compiling

    @property
    def copies_whole(self):
        """Whether each rank has the whole model, and after the last pass of a step its whole gradient."""
        return self.world == 1 or bool(self.ddp)

    @property
    def warm_ups(self):
        """The number of idle passes before the first step: two with DDP, which reorders its buckets, and so its sums,
        after the first backward pass. A resumed run has the bits of an unbroken one only if both run these passes."""
        return 2 if self.ddp else 0

    def cannot_compile(self):
        """Why this layout cannot be compiled, or None. With tensor parallelism there are collectives within layers."""
        return f"not with {self}" if self.tp > 1 else None

    def compile(self):
        """Compile the module that passes call. With ZeRO and in a pipeline, compile only attention and MLP of each
        block and the loss: the hooks and collectives between them stay as they are."""
        if self.copies_whole:
            self.module = torch.compile(self.module, dynamic=False)  # a kernel for each shape
            return
        for module in parts_of_blocks(self.model):
            module.forward = torch.compile(module.forward, dynamic=False)
        for root in self.roots:
            root.loss = partial(root.loss, fuse=self.device.type == "cuda")
            root.attend_apart = partial(root.attend_apart, compiling=True)

    def run_uncompiled(self):
        """Call the module as it was placed, and run everything compiled within it eagerly."""
        self.module = self.ddp or self.model
        torch.compiler.set_stance("force_eager")

    # -------------------------------------------------------------------------
    # Figures of the whole model

    def grad_norm(self):
        """The norm of the gradient of the whole model, each element counted once."""
        if self.copies_whole:
            return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        return self.group_norms(grads, lambda name: 0, 1)[0]

    def group_norms(self, tensors, group_of, n):
        """The norms of `n` groups of the whole model's tensors, each element counted once. -> (n,)

        `tensors` holds a tensor for each name of a parameter, laid out as the parameter is. group_of(name) is a number
        below n, the same on every rank.
        """
        squares = torch.zeros(n, device=self.device)
        for name, tensor in tensors.items():
            if self.pipeline and not self.pipeline.counts(name):
                continue
            split = self.split and name in self.split.dims
            copies = (1 if self.zero else self.dp) * (1 if split else self.tp)
            if self.copies_whole:
                copies = 1
            tensor = local(tensor)
            square = torch.linalg.vector_norm(tensor).square()
            if self.split:
                square = self.split.square_to_count(name, tensor, square)
            squares[group_of(name)] += (square / copies).to(self.device)
        if not self.copies_whole:
            dist.all_reduce(squares)
        return squares.sqrt()

    def weights_are_finite(self):
        """Whether every weight on every rank is finite."""
        finite = all(local(p).isfinite().all() for p in self.model.parameters())
        return not self.agree(int(not finite))[0]

    def gather_probe(self, figures):
        """Figures of probe.attention for this rank's layers and heads -> the same for the whole model."""
        if self.split:
            self.split.join_heads(figures)
        if self.pipeline:
            figures = {key: self.pipeline.join_layers(figure) for key, figure in figures.items()}
        return figures

    def gather_objects(self, value):
        """The values of all data-parallel ranks, in their order."""
        if self.dp == 1:
            return [value]
        return gather_objects(value, self.dp, self.mesh["dp"].get_group())

    # -------------------------------------------------------------------------
    # Gathering and sharding tensors

    def gather_tensor(self, name, tensor):
        """A parameter, its gradient or optimizer state -> the whole tensor. All ranks that hold a part call it."""
        if is_dtensor(tensor):
            tensor = tensor.full_tensor()
        return self.split.to_model_order(name, tensor) if self.split else tensor

    def shard_tensor(self, name, tensor, p):
        """A whole tensor -> this rank's part of it, laid out like the parameter `p` of that name. A part stays."""
        if is_dtensor(tensor) or not is_dtensor(p) or not tensor.ndim:
            return tensor.to(p.device)
        if self.split:
            tensor = self.split.slice_of(name, tensor)
        return laid_out_like(self.zero_part(tensor), p)

    def zero_part(self, tensor):
        """The rows of a tensor that ZeRO keeps on this rank, perhaps none. Without ZeRO, all."""
        if not self.zero:
            return tensor
        parts = tensor.chunk(self.dp)
        return parts[self.dp_rank] if self.dp_rank < len(parts) else tensor[:0]

    def optimizer_options(self):
        """What optim.Optimizers needs to know of the layout."""
        ranks = self.dp * self.tp
        all_gather = partial(gather_vectors, ranks=ranks, group=self.peer_group)
        peers = (self.dp_rank * self.tp + self.tp_rank, ranks, all_gather)
        return dict(gather_tensor=self.gather_tensor, shard_tensor=self.shard_tensor, peers=peers)

    def gather(self, opt):
        """The whole model and its optimizers on the CPU, for checkpoint.save on rank 0. Other ranks get fragments."""
        if self.world == 1:
            return self.model, opt
        weights = self.gather_weights()
        state = map_state(opt.state_dict(), self.gather_to_cpu)
        for kind, by_name in state.items():
            state[kind] = self.join_stages(by_name)
        model = SimpleNamespace(named_parameters=weights.items)
        return model, SimpleNamespace(state_dict=lambda: state)

    def gather_weights(self):
        """Name -> whole weight on the CPU, on rank 0."""
        return self.gather_tensors({name: p.detach() for name, p in self.model.named_parameters()})

    def gather_tensors(self, tensors):
        """Name -> this rank's part of a tensor; on rank 0 it becomes name -> whole tensor of the whole model."""
        gathered = {name: self.gather_to_cpu(name, tensor) for name, tensor in tensors.items()}
        return self.join_stages(gathered)

    def gather_to_cpu(self, name, tensor):
        """The whole tensor on the first rank that trains these layers, None on the others."""
        tensor = self.gather_tensor(name, tensor)
        return tensor.to("cpu").contiguous() if self.dp_rank == self.tp_rank == 0 else None

    def join_stages(self, tensors):
        """Name -> tensor of this rank's layers; on rank 0 it becomes that of all layers."""
        if self.pipeline and self.dp_rank == self.tp_rank == 0:
            return self.pipeline.join_tensors(tensors)
        return tensors

    def gather_model(self):
        """The whole model on rank 0, where it can run alone. None on other ranks."""
        if self.copies_whole:
            return self.model if self.rank == 0 else None
        weights = self.gather_weights()
        if self.rank:
            return None
        copy = GPT(self.model.config).to(self.device)
        with torch.no_grad():
            for name, p in copy.named_parameters():
                p.copy_(weights[name])
        return copy

    def load_optimizer_state(self, folder):
        """A checkpoint's optimizer state for this rank's parameters. Of a sharded checkpoint, only that is read."""
        params = dict(self.model.named_parameters()) if checkpoint.is_sharded(folder) else None
        return self.shard_state(checkpoint.load_optimizer_state(folder, params, self.heads))

    def shard_state(self, state):
        """The optimizer state of a whole model -> that of this rank's parameters."""
        if self.world == 1:
            return state
        params = dict(self.model.named_parameters())
        own = {}
        for kind, by_name in state.items():
            own[kind] = {name: values for name, values in by_name.items() if name in params}
        return map_state(own, lambda name, tensor: self.shard_tensor(name, tensor, params[name]))


def parts_of_blocks(model):
    """The attention and MLP modules of all blocks, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, (Attention, MLP))]


def checkpoint_activations(model, kind):
    """Keep only the inputs of each block ("full"), or of its attention and MLP ("selective"), and recompute the other
    activations in the backward pass (Chen et al. 2016, arXiv:1604.06174). The numbers and dropout stay the same."""
    for block in model.transformer.h:
        modules = [block] if kind == "full" else [block.attn, block.mlp]
        for module in modules:
            module.forward = partial(recomputed, module.forward, use_reentrant=False)
