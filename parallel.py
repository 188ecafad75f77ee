"""
A model on many devices: data, tensor and pipeline parallelism on one grid of processes, all of it PyTorch's own.

    torchrun --standalone --nproc_per_node=4 train.py config/owt_124m.py --zero_stage=3 --tp_size=2

The grid is pipeline x data x tensor. Data parallelism is DDP, or with zero_stage fully_shard (ZeRO, Rajbhandari et al.
2020, arXiv:1910.02054): stage 1 reduces gradients once a step, 2 after every micro-batch, and 3 also frees the weights
between uses. Tensor parallelism (training/tensor_parallel.py) splits heads and hidden widths. Pipeline parallelism
(training/pipeline_parallel.py) gives each rank some of the layers.

The model knows nothing of this. It is initialised and loaded whole, with the same seed on every rank, and then placed,
so every layout has the same weights. It is gathered whole for a checkpoint. One process needs no process group.
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
from model import GPT, MLP, Attention
from optim import is_dtensor, laid_out_like, local, map_state
from training.pipeline_parallel import Pipeline, count_stages
from training.ranks import Ranks, average_in_place, gather_objects, gather_vectors, own_group
from training.tensor_parallel import SplitLayers, with_local


class Layout(Ranks):
    """The grid of processes, where this one stands in it, and how a model is trained on it.

    `pp`, `dp` and `tp` are the sizes of the grid, `pp_rank`, `dp_rank` and `tp_rank` the place of this process. The
    methods of a training step and of gathering work on the model that was placed; every rank calls them.
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
            raise ValueError("cpu_offload=True moves from GPUs what zero_stage=1, 2 or 3 shards: "
                             "it needs both")

        self.accumulation = 1     # micro-batches of this rank in a step
        self.model = None         # what this rank trains
        self.module = None        # what a forward pass calls: the model, in DDP, or compiled
        self.ddp = None           # the model in DDP, if it is
        self.split = None         # the SplitLayers of tensor parallelism
        self.heads = None         # the order of c_attn's heads that goes with it
        self.pipeline = None      # the Pipeline
        self.context = nullcontext
        self.pp_rank = self.dp_rank = self.tp_rank = 0
        self.peer_group = None    # the ranks that train the same layers, if not all do
        if self.world == 1:
            return
        self.join_group(self.device, backend)
        grid = (self.pp, self.dp, self.tp)
        names = ("pp", "dp", "tp")
        self.mesh = dist.init_device_mesh(self.device.type, grid, mesh_dim_names=names)
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
    # Does a run fit the grid

    def check(self, config, dtype=torch.float32):
        """Raises ValueError where a model of this GPTConfig cannot be laid out so."""
        if config.n_head % self.tp or config.mlp_dim % self.tp:
            raise ValueError(f"tp_size={self.tp} does not divide n_head={config.n_head} "
                             f"and the MLP's {config.mlp_dim}")
        if config.kv_heads % self.tp and self.tp % config.kv_heads:
            raise ValueError(f"tp_size={self.tp} and n_kv_head={config.kv_heads}: "
                             "one has to divide the other")
        if config.n_layer < (stages := count_stages(self.pp, self.pp_schedule)):
            raise ValueError(f"n_layer={config.n_layer} is too few for the {stages} stages of {self}")
        if self.pp > 1 and dtype == torch.float16:
            raise ValueError("pp_size above 1 has no loss scaling for float16: use bfloat16 or float32")

    def share_micro_batches(self, micro_batches):
        """The micro-batches of an update over all ranks -> how many are this rank's, which `accumulation` keeps.
        Raises ValueError naming numbers that would work."""
        least = self.pp * self.dp  # fewer would leave ranks of a pipeline without work
        unit = self.dp
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
        """A model that is whole and the same on each rank -> what this rank trains, under the same parameter names.

        Forward passes run in `context()`, which computes in `dtype`. The order is fixed: split layers, recompute
        activations, cut into stages, and then data parallelism around them.
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
            if self.tp > 1 and "wpe" in root.transformer:  # GPT.embed reads it, and calls nothing
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
        """ZeRO: gather attention and MLP of each block when they are needed, norms and both ends with `root`.

        In half precision the weights are gathered in `dtype`, else autocast would keep a copy of each whole one.
        Gradients are reduced in fp32. Inputs and outputs keep their dtype, so the numbers are autocast's.
        """
        from torch.distributed import fsdp

        # nobody changes that view in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        offload = fsdp.CPUOffloadPolicy() if self.offload else fsdp.OffloadPolicy()
        shard = partial(fsdp.fully_shard, mesh=self.mesh["dp"], offload_policy=offload)
        half = {"param_dtype": dtype, "reduce_dtype": torch.float32}
        precision = half if dtype != torch.float32 else {}
        policy = fsdp.MixedPrecisionPolicy(**precision, cast_forward_inputs=False)
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
        """The tokens of the next pass, (x, y) on the CPU, each (B, T); a pipeline's are those of the whole step."""
        if self.pp == 1:
            return next(loader)
        batches = [next(loader) for _ in range(self.accumulation)]
        x, y = zip(*batches, strict=True)
        return torch.cat(x), torch.cat(y)

    def repeat_batch(self, batch):
        """The (x, y) of one micro-batch -> those of a pass, which in a pipeline repeats it."""
        repeats = self.accumulation if self.pp > 1 else 1
        return [tokens.repeat(repeats, 1) for tokens in batch]

    def forward_backward(self, x, y, micro, scaler=None, timer=None):
        """Pass number `micro` of a step, forward and backward. x, y (B, T) -> the mean loss, detached.

        Gradients are reduced in the last pass, number passes - 1; -1 stands for one that is not the last. In a pipeline
        the loss is 0 on the ranks without the last stage. `timer` has a mark(part) for the parts of the step.
        """
        mark = timer.mark if timer else lambda part: None
        if self.pipeline:
            loss = self.pipeline.forward_backward(x, y, self.accumulation)
            mark("pipeline_ms")
            return loss
        self.before_forward(last=micro == self.passes - 1)
        with self.context():
            _, loss = self.module(x, y, loss_only=True)
        mark("forward_ms")
        share = loss / self.accumulation
        if scaler:
            share = scaler.scale(share)
        share.backward()
        mark("backward_ms")
        return loss.detach()

    def before_forward(self, last):
        """Tell DDP or ZeRO whether the next pass is the last of its step. Only then are gradients reduced, except that
        ZeRO-2 and 3 always reduce them, and weights freed, except that ZeRO-3 always frees them."""
        if self.ddp:
            self.ddp.require_backward_grad_sync = last
        elif self.zero and not self.pipeline:  # a pipeline's stages see to it themselves
            self.model.set_requires_gradient_sync(last or self.zero > 1)
            self.model.set_reshard_after_backward(last or self.zero == 3)

    def reduce_gradients(self):
        """After a step's last backward pass: all-reduce whatever DDP and fully_shard have not reduced already."""
        if self.tp == self.pp == 1:
            return
        for p in self.model.parameters():
            if is_dtensor(p) and p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(placements=p.placements)
        grads = {name: local(p.grad) for name, p in self.model.named_parameters()}
        if self.dp > 1 and not self.zero:
            average_in_place(list(grads.values()), self.dp, self.mesh["dp"].get_group())
        if self.split:
            self.split.sum_shared_heads(grads)
        if self.pipeline:
            self.pipeline.sum_tied_table(grads)

    def mean(self, losses):
        """The mean over the data-parallel ranks of losses that are 0 on all but the last rank of a pipeline."""
        if self.world > 1:
            dist.all_reduce(losses)
            losses /= self.dp * self.tp
        return losses

    def free_gathered(self):
        """After a forward pass without a backward one: free the weights that ZeRO has gathered."""
        if self.zero:
            for module in self.model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()

    # -------------------------------------------------------------------------
    # Compiling

    @property
    def copies_whole(self):
        """Whether each rank has all of the model, and all of its gradient after the last backward pass of a step."""
        return self.world == 1 or bool(self.ddp)

    @property
    def warm_ups(self):
        """Passes before the first step. After its first backward pass DDP puts its buckets in another order, and with
        them its sums. A resumed run has the bits of an unbroken one only if both begin with two idle passes."""
        return 2 if self.ddp else 0

    def cannot_compile(self):
        """Why no layer is compiled in this layout, or None: tensor parallelism's collectives lie within them."""
        return f"not with {self}" if self.tp > 1 else None

    def compile(self):
        """Have passes call compiled code: the whole module, or with ZeRO and in a pipeline attention and MLP of each
        block and the loss, so that hooks and collectives around them stay as they are."""
        if self.copies_whole:
            self.module = torch.compile(self.module, dynamic=False)  # a kernel for each shape
            return
        for module in parts_of_blocks(self.model):
            module.forward = torch.compile(module.forward, dynamic=False)
        for root in self.roots:
            root.loss = partial(root.loss, fuse=self.device.type == "cuda")

    def run_uncompiled(self):
        """Back to the module as it was placed, whatever is compiled within it."""
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
        """Whether every weight is, on every rank."""
        finite = all(local(p).isfinite().all() for p in self.model.parameters())
        return not self.agree(int(not finite))[0]

    def gather_probe(self, figures):
        """What training/probe.py has measured in this rank's layers and heads -> the same of all the model's."""
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
        """A parameter, its gradient or optimizer state -> as one process has it. All ranks that hold it call it."""
        if is_dtensor(tensor):
            tensor = tensor.full_tensor()
        return self.split.to_model_order(name, tensor) if self.split else tensor

    def shard_tensor(self, name, tensor, p):
        """`tensor`, if it is whole, laid out as the parameter `p` of that name is on this rank."""
        if is_dtensor(tensor) or not is_dtensor(p) or not tensor.ndim:
            return tensor.to(p.device)
        if self.split:
            tensor = self.split.slice_of(name, tensor)
        return laid_out_like(self.zero_part(tensor), p)

    def zero_part(self, tensor):
        """The rows of a tensor that ZeRO leaves on this rank, maybe none; without ZeRO all."""
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
        """The model and its optimizers as one process has them, for checkpoint.save. Of use on rank 0 alone."""
        if self.world == 1:
            return self.model, opt
        weights = self.gather_weights()
        state = map_state(opt.state_dict(), self.gather_to_cpu)
        for kind, by_name in state.items():
            state[kind] = self.join_stages(by_name)
        model = SimpleNamespace(named_parameters=weights.items)
        return model, SimpleNamespace(state_dict=lambda: state)

    def gather_weights(self):
        return self.gather_tensors({name: p.detach() for name, p in self.model.named_parameters()})

    def gather_tensors(self, tensors):
        """Tensors by the names of parameters -> on rank 0 the whole model's on the CPU; elsewhere of no use."""
        gathered = {name: self.gather_to_cpu(name, tensor) for name, tensor in tensors.items()}
        return self.join_stages(gathered)

    def gather_to_cpu(self, name, tensor):
        """The whole tensor on the first rank that trains these layers, None on the others."""
        tensor = self.gather_tensor(name, tensor)
        return tensor.to("cpu").contiguous() if self.dp_rank == self.tp_rank == 0 else None

    def join_stages(self, tensors):
        if self.pipeline and self.dp_rank == self.tp_rank == 0:
            return self.pipeline.join_tensors(tensors)
        return tensors

    def gather_model(self):
        """A model that runs on rank 0 alone; None elsewhere."""
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
        """The optimizer state in a checkpoint, for this rank's parameters; a sharded one is read no further."""
        params = dict(self.model.named_parameters()) if checkpoint.is_sharded(folder) else None
        return self.shard_state(checkpoint.load_optimizer_state(folder, params, self.heads))

    def shard_state(self, state):
        """An optimizer state as one process saves it -> that of this rank's parameters."""
        if self.world == 1:
            return state
        params = dict(self.model.named_parameters())
        own = {}
        for kind, by_name in state.items():
            own[kind] = {name: values for name, values in by_name.items() if name in params}
        return map_state(own, lambda name, tensor: self.shard_tensor(name, tensor, params[name]))


def parts_of_blocks(model):
    """Attention and MLP of each block, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, (Attention, MLP))]


def checkpoint_activations(model, kind):
    """Keep only the inputs of each block ("full"), or of its attention and MLP ("selective"), and compute the rest
    again in the backward pass (Chen et al. 2016, arXiv:1604.06174). The numbers stay the same, and so does dropout."""
    for block in model.transformer.h:
        modules = [block] if kind == "full" else [block.attn, block.mlp]
        for module in modules:
            module.forward = partial(recomputed, module.forward, use_reentrant=False)
