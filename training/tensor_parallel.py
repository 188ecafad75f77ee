"""
Tensor parallelism: each rank has some heads and some hidden units of every layer (Shoeybi et al. 2019,
arXiv:1909.08053).

It is surgery from outside on a whole GPT, the same on every rank. PyTorch's parallelize_module splits attention and
MLP. Embedding, head and norms stay whole on each rank. Every parameter becomes a DTensor.
"""

import torch
import torch.distributed as dist
import torch.nn as nn

from optim import is_dtensor
from training.ranks import own_group


class SplitLayers:
    """The layers of a GPT, split over the ranks of a grid, and the place of each slice in the whole.

    c_attn holds queries, then keys, then values. Its rows are reordered first, so that each rank's slice holds the
    queries, keys and values of its own heads. If there are fewer key/value heads than ranks, several ranks hold a copy
    of the same head.
    """

    def __init__(self, model, grid, device):
        """Splits `model` in place, over the "tp" dimension of the device mesh `grid`. All ranks call it."""
        mesh = grid["tp"]
        config = model.config
        self.group = mesh.get_group()
        self.rank = mesh.get_local_rank()
        self.size = mesh.size()
        self.heads = order_of_heads(config, self.size)
        # each by the name of a parameter
        self.dims = {}       # the dimension that is split
        self.row_order = {}  # c_attn: the place of each reordered row in the whole
        self.kv_rows = {}    # c_attn: which rows of this rank's slice are keys and values

        rows = torch.arange((config.n_head + 2 * config.kv_heads) * config.head_dim)
        rows = rows.view(-1, config.head_dim)[self.heads].flatten()
        queries = config.n_head // self.size * config.head_dim
        kv_rows = torch.arange(len(rows) // self.size, device=device) >= queries
        for i, block in enumerate(model.transformer.h):
            prefix = f"transformer.h.{i}"
            reorder_rows(block.attn.c_attn, rows)
            for kind, _ in block.attn.c_attn.named_parameters():
                self.row_order[f"{prefix}.attn.c_attn.{kind}"] = rows
                self.kv_rows[f"{prefix}.attn.c_attn.{kind}"] = kv_rows
            self.split_block(block, mesh, prefix)
        replicate_rest(model, mesh)

        self.kv_copies = 1  # ranks that hold the same key/value head
        if config.kv_heads < self.size:
            self.kv_copies = self.size // config.kv_heads
            self.kv_group = own_group(grid.mesh.view(-1, self.kv_copies))

    def split_block(self, block, mesh, prefix):
        """Split attention and MLP: their first projections by output, and so their last projections by input."""
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        by_output = ["attn.c_attn", "mlp.c_fc"]
        if hasattr(block.mlp, "c_gate"):
            by_output.append("mlp.c_gate")
        by_input = ["attn.c_proj", "mlp.c_proj"]
        plan = {name: ColwiseParallel() for name in by_output}
        plan |= {name: RowwiseParallel() for name in by_input}
        parallelize_module(block, mesh, plan, src_data_rank=None)
        for name in by_output:
            self.dims[f"{prefix}.{name}.weight"] = 0
            self.dims[f"{prefix}.{name}.bias"] = 0
        for name in by_input:
            self.dims[f"{prefix}.{name}.weight"] = 1  # its bias is whole on each rank
        if hasattr(block.attn, "q_gain"):
            # each rank's heads contribute a part of the gains' gradient
            with_local(block.attn, block.attn, "q_gain", "k_gain", summed=True)

    def to_model_order(self, name, tensor):
        """A tensor gathered over the ranks -> the same with the rows of c_attn in the model's own order."""
        if name not in self.row_order or not tensor.ndim:
            return tensor
        order = self.row_order[name].to(tensor.device)
        whole = tensor.new_empty(int(order.max()) + 1, *tensor.shape[1:])
        whole[order] = tensor
        return whole

    def slice_of(self, name, tensor):
        """This rank's slice of a whole tensor."""
        if name in self.row_order:
            tensor = tensor[self.row_order[name].to(tensor.device)]
        if name in self.dims:
            tensor = tensor.chunk(self.size, self.dims[name])[self.rank]
        return tensor

    def sum_shared_heads(self, grads):
        """Add up the gradients of key and value heads that several ranks hold. Changes `grads`, name -> tensor."""
        if self.kv_copies == 1:
            return
        for name, rows in self.kv_rows.items():
            if name in grads:  # a pipeline's other ranks have the rest
                shared = grads[name][rows]
                dist.all_reduce(shared, group=self.kv_group)
                grads[name][rows] = shared

    def square_to_count(self, name, tensor, square):
        """`square` is the squared norm of this rank's `tensor`. -> its share in the squared norm of the whole: a head
        that two ranks hold counts half on each"""
        if self.kv_copies == 1 or name not in self.kv_rows:
            return square
        shared = torch.linalg.vector_norm(tensor[self.kv_rows[name]]).square()
        return square - shared * (1 - 1 / self.kv_copies)

    def join_heads(self, figures):
        """Turn probe.attention's figures for this rank's heads into figures for all heads, in place."""
        dist.all_reduce(figures["attn_entropy"], group=self.group)
        dist.all_reduce(figures["attn_logit_max"], dist.ReduceOp.MAX, group=self.group)
        figures["attn_entropy"] /= self.size


def order_of_heads(config, ranks):
    """The heads of c_attn in the order in which the ranks hold them. -> for each, its place in the whole projection"""
    counts = (config.n_head, config.kv_heads, config.kv_heads)
    q, k, v = torch.arange(sum(counts)).split(counts)
    kv_heads = max(1, config.kv_heads // ranks)  # of one rank
    heads = []
    for rank in range(ranks):
        first = rank * config.kv_heads // ranks
        own = slice(first, first + kv_heads)
        heads += [q.chunk(ranks)[rank], k[own], v[own]]
    return torch.cat(heads).tolist()


def reorder_rows(linear, rows):
    """Give `linear` these `rows` of its weight and bias, in this order. A row may occur more than once."""
    for kind, p in list(linear.named_parameters()):
        setattr(linear, kind, nn.Parameter(p.detach()[rows.to(p.device)]))
    linear.out_features = len(rows)


def replicate_rest(model, mesh):
    """Turn every parameter that is not split into a DTensor that is whole on each rank."""
    from torch.distributed.tensor import distribute_tensor

    replicated = {}  # parameter -> its DTensor: a tied head must stay tied
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if is_dtensor(p):
                continue
            if p not in replicated:
                tensor = distribute_tensor(p.detach(), mesh, src_data_rank=None)
                replicated[p] = nn.Parameter(tensor)
            setattr(module, name, replicated[p])
            if name in ("weight", "bias"):
                with_local(module, module, name)


def with_local(module, owner, *names, summed=False):
    """Make `module` run with the parameters `names` of `owner` as plain tensors.

    Every tensor-parallel rank has the whole parameter and computes its whole gradient. With `summed`, each rank
    computes a part of the gradient, which is the sum over the ranks.
    """
    from torch.distributed.tensor import Partial, Replicate

    forward = module.forward
    grads = [Partial() if summed else Replicate()]

    def run(*args, **kwargs):
        for name in names:
            # Python looks at an instance's attributes before torch.nn.Module looks at its parameters
            owner.__dict__[name] = owner._parameters[name].to_local(grad_placements=grads)
        try:
            return forward(*args, **kwargs)
        finally:
            for name in names:
                del owner.__dict__[name]

    module.forward = run
