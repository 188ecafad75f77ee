"""
Optimizers and learning-rate schedules: which optimizer trains which parameter, AdamW, Muon.

With optimizer="adamw", AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) trains everything. With optimizer="muon",
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) trains the matrices of the blocks, and AdamW
trains the embeddings, the head, gains and biases.
"""

import math
from itertools import accumulate

import torch


def split_params(model, muon=False):
    """The names of a model's parameters in three groups: {"muon": [...], "decay": [...], "no_decay": [...]}.

    Weight decay is for matrices and embedding tables; gains and biases have none, as in GPT-2 and minGPT.
    Muon takes the matrices of the blocks, never an embedding or the head.
    """
    groups = {"muon": [], "decay": [], "no_decay": []}
    for name, p in model.named_parameters():  # a tied head appears once
        if p.ndim < 2:
            groups["no_decay"].append(name)
        elif muon and name.startswith("transformer.h."):
            groups["muon"].append(name)
        else:
            groups["decay"].append(name)
    return groups


class Optimizers:
    """AdamW, or AdamW and Muon, with the interface of one optimizer, so that a GradScaler steps both or neither.

    The state is saved and loaded by parameter name: {"adamw": {name: {...tensors}}, "muon": {...}}. It holds no
    learning rates, because they follow from the step.

    parallel.Layout.optimizer_options() gives the arguments for a model on many devices. gather_tensor(name, tensor)
    gathers a matrix for Muon, shard_tensor(name, tensor, p) cuts this rank's part out of it, and `peers` are the ranks
    that share Muon's work (see there).

    `found_inf` is None or a float on the device. If it is 1.0, a step changes nothing, and the CPU need not wait to
    know. PyTorch's fused optimizers have the same attribute: a GradScaler sets it after an overflow.
    """

    found_inf = None

    def __init__(self, model, *, optimizer="adamw", learning_rate, muon_learning_rate=0.02,
                 weight_decay=0.0, betas=(0.9, 0.95), muon_momentum=0.95, muon_dtype=torch.float32,
                 muon_even_rows=False,
                 gather_tensor=None, shard_tensor=None, peers=(0, 1, None)):
        params = dict(model.named_parameters())
        self.names = {p: name for name, p in params.items()}
        groups = split_params(model, muon=optimizer == "muon")
        adamw = []
        for group, decay in (("decay", weight_decay), ("no_decay", 0.0)):
            if groups[group]:
                adamw.append({"params": [params[n] for n in groups[group]], "weight_decay": decay})
        fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
        self.by_kind = {
            "adamw": torch.optim.AdamW(adamw, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)
        }
        if optimizer == "muon":
            self.by_kind["muon"] = Muon(
                [params[n] for n in groups["muon"]], lr=muon_learning_rate, momentum=muon_momentum,
                weight_decay=weight_decay, dtype=muon_dtype, names=self.names,
                gather_tensor=gather_tensor, shard_tensor=shard_tensor, peers=peers,
                pieces=pieces_of_attention(model, groups["muon"]), even_rows=muon_even_rows,
            )
        trained = [id(p) for group in self.param_groups for p in group["params"]]
        expected = [id(p) for p in params.values()]
        assert sorted(trained) == sorted(expected), "exactly one group trains each parameter"
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def param_groups(self):
        return [group for opt in self.by_kind.values() for group in opt.param_groups]

    def set_lr(self, factor):
        """Scale every group's own learning rate by `factor`, so that all follow one schedule."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def step(self):
        """One step of all optimizers, unless found_inf is 1.0."""
        if self.found_inf is not None and self.found_inf.device.type == "mps":
            if self.found_inf.item():  # nobody has tried whether the fused AdamW of MPS reads found_inf
                return
        for opt in self.by_kind.values():
            opt.found_inf = self.found_inf
            opt.step()

    def zero_grad(self):
        for opt in self.by_kind.values():
            opt.zero_grad(set_to_none=True)

    def state_dict(self):
        """Kind of optimizer -> name of a parameter -> its tensors, the optimizer's own and no copies."""
        saved = {}
        for kind, opt in self.by_kind.items():
            saved[kind] = {self.names[p]: dict(state) for p, state in opt.state.items()}
        return saved

    def load_state_dict(self, saved):
        """Copy a saved state. Raises ValueError naming an entry that is missing, unknown, or of another shape."""
        if saved.keys() != self.by_kind.keys():
            raise ValueError(f"optimizer state of {', '.join(saved)} does not fit "
                             f"{', '.join(self.by_kind)}")
        for kind, opt in self.by_kind.items():
            params = {self.names[p]: p for group in opt.param_groups for p in group["params"]}
            odd = sorted(saved[kind].keys() ^ params.keys())
            if odd and saved[kind]:  # {} was saved before the first step
                raise ValueError(f"the {kind} state does not fit the model: only one of them has "
                                 f"{', '.join(odd)}")
            for name, state in saved[kind].items():
                p = params[name]
                for key, value in state.items():
                    if value.ndim and value.shape != p.shape:
                        raise ValueError(f"{name}: {key} has shape {tuple(value.shape)}, "
                                         f"not {tuple(p.shape)}")
                # the step count goes to the device as well: fused AdamW reads it there
                opt.state[p] = {key: value.to(p.device, copy=True) for key, value in state.items()}


def map_state(state, function):
    """A copy of a state_dict of Optimizers, in which function(name, tensor) replaces each tensor of parameter `name`.
    """
    mapped = {kind: {} for kind in state}
    for kind, by_name in state.items():
        for name, values in by_name.items():
            mapped[kind][name] = {key: function(name, tensor) for key, tensor in values.items()}
    return mapped


# -----------------------------------------------------------------------------
# Muon


def pieces_of_attention(model, names):
    """Which of the parameters `names` join several matrices: c_attn's weight has queries, keys and values, one below
    the other. -> {name: (rows of the queries, of the keys, of the values)}"""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    D = config.head_dim
    rows = (config.n_head * D, config.kv_heads * D, config.kv_heads * D)
    return {name: rows for name in names if name.endswith("attn.c_attn.weight")}


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic a X + (b A + c A A) X with A = X X^T (Jordan 2024)


def orthogonalize(G, steps=5, dtype=torch.float32):
    """An approximation of the orthogonal factor U V^T of each matrix of G (n, rows, cols), by Newton-Schulz in `dtype`.

    The quintic's coefficients (Jordan 2024) trade exactness for speed: singular values end in about [0.7, 1.2].
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value is above 1
    if dtype != torch.bfloat16 and X.size(-1) >= 2 * X.size(-2):
        while steps:
            X = gram_newton_schulz(X, min(steps, 3))
            steps -= min(steps, 3)
    else:
        a, b, c = COEFFICIENTS
        for _ in range(steps):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # aX + (bA + cAA)X
    return (X.mT if tall else X).to(G.dtype)


def gram_newton_schulz(X, steps):
    """The same steps on the small A = X X^T alone (Gram Newton-Schulz, Zhang et al. 2026, Dao-AILab): each multiplies X
    by a polynomial P of A, so A becomes P A P, and one product at the end applies all P. It pays for matrices at least
    twice as wide as high. In fp32 three steps in a row are exact to 1e-5; in bfloat16 its rounding would be several
    times that of the plain iteration."""
    a, b, c = COEFFICIENTS
    A = X @ X.mT
    product = None
    for step in range(steps):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        product = P if product is None else P @ product
        if step < steps - 1:
            A = P @ A @ P
    return product @ X


def even_rows(X):
    """Matrices (n, rows, cols) with rows <= cols -> the same, each of its former size, but with columns of one length,
    or rows if it is square: the weights of every hidden neuron and of every channel of a head change equally fast (of
    keys and values that many queries share, the weights of every input).

    After NorMuon (Li et al. 2025, arXiv:2510.05491), which divides by a running mean of the lengths. Without the mean
    there is no state, and the loss is the same (docs/log.md).
    """
    along, across = (-1, -2) if X.size(-2) == X.size(-1) else (-2, -1)
    length = X.norm(dim=(-2, -1), keepdim=True) / X.size(across) ** 0.5
    return X * (length / (X.norm(dim=along, keepdim=True) + 1e-7))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: p <- p (1 - lr wd) - lr sqrt(max(1, rows/cols)) UV^T.

    Nesterov momentum as in the original. A matrix that joins several, as c_attn joins queries, keys and values, is
    orthogonalised piece by piece: `pieces` maps its name to the rows of each. Pieces of one shape, upright or not, are
    orthogonalised in one batch, and then made even with `even_rows` (see there). The Newton-Schulz iteration runs in
    `dtype`: fp32 is reproducible to 1e-7 between layouts, bf16 is faster.

    Ranks that hold the same matrices divide the work and exchange the updates. `peers` is (this rank's place among
    them, their number, their all-gather: a vector (n,) of each rank -> (ranks, n)). Momentum costs little, so each rank
    computes it for every matrix that it holds. `names` maps a parameter to its name, which gather_tensor and
    shard_tensor take as in Optimizers.
    """

    found_inf = None  # as in Optimizers

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, ns_steps=5,
                 dtype=torch.float32, names=None, gather_tensor=None, shard_tensor=None,
                 peers=(0, 1, None), pieces=None, even_rows=False):
        self.names = names
        self.pieces = pieces or {}
        self.even_rows = even_rows
        self.gather_tensor = gather_tensor
        self.shard_tensor = shard_tensor
        self.rank, self.ranks, self.all_gather = peers
        self.dtype = dtype
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        """Momentum, orthogonalise this rank's share, exchange the updates with the peers, apply them."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(self.pieces_of(p)[0], []).append(p)
            order = [p for params in by_shape.values() for p in params]
            owners = dict(zip(order, share_out([self.pieces_of(p) for p in order], self.ranks), strict=True))
            updates = {}  # parameter -> orthogonal update, for this rank's share
            shapes = {}   # parameter -> shape of its whole update
            for params in by_shape.values():
                own = {}
                for p, update in zip(params, self.momentum_updates(params, group), strict=True):
                    if self.gather_tensor:
                        update = self.gather_tensor(self.names[p], laid_out_like(update, p))
                    shapes[p] = update.shape
                    if owners[p] == self.rank:
                        own[p] = update
                if own:
                    updates |= self.orthogonal(own, group)
                if self.ranks == 1:  # apply them now, so that memory holds the updates of few matrices only
                    self.apply_updates(params, updates, group)
            if self.ranks > 1:
                updates = self.exchange(updates, owners, shapes)
                for params in by_shape.values():
                    self.apply_updates(params, updates, group)

    def pieces_of(self, p):
        """The shapes of the matrices that the parameter p joins, the shorter side first: [(128, 128), ...]"""
        return [tuple(sorted((rows, p.size(1)))) for rows in self.rows_of(p, p)]

    def momentum_updates(self, params, group):
        """Update the momentum of `params` by their gradients. -> this rank's part of each Nesterov update, before it is
        made orthogonal"""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
        grads = [local(p.grad) for p in params]
        if self.found_inf is not None:
            # momentum does not change if the buffer itself takes the place of the gradient
            bad = self.found_inf.to(grads[0].device).bool()
            grads = [torch.where(bad, b, g) for b, g in zip(buffers, grads, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        return torch._foreach_lerp(grads, buffers, group["momentum"])

    def orthogonal(self, updates, group):
        """{parameter: update} -> the same with orthogonal updates. Pieces of one shape are computed in one batch."""
        results = {p: torch.empty_like(update) for p, update in updates.items()}
        batches = {}  # (shorter, longer side) -> the pieces, and where their results belong
        for p, update in updates.items():
            rows = self.rows_of(p, update)
            for piece, result in zip(update.split(rows), results[p].split(rows), strict=True):
                if piece.size(0) > piece.size(1):
                    piece, result = piece.mT, result.mT
                pieces, places = batches.setdefault(piece.shape, ([], []))
                pieces.append(piece)
                places.append(result)
        for pieces, places in batches.values():
            batch = orthogonalize(torch.stack(pieces), group["ns_steps"], self.dtype)
            if self.even_rows:
                batch = even_rows(batch)
            torch._foreach_copy_(places, list(batch.unbind()))
        return results

    def rows_of(self, p, matrix):
        """How many rows each piece of `matrix`, which belongs to the parameter p, has."""
        return self.pieces.get(self.names[p], (matrix.size(0),)) if self.names else (matrix.size(0),)

    def exchange(self, updates, owners, shapes):
        """{parameter: update} of this rank's share -> of all ranks. `owners` maps a parameter to the rank that has its
        update, `shapes` to the update's shape. They travel in self.dtype: Newton-Schulz had no more precision."""
        lengths = [0] * self.ranks
        for p, owner in owners.items():
            lengths[owner] += shapes[p].numel()
        device = next(iter(owners)).device
        own = torch.zeros(max(lengths), dtype=self.dtype, device=device)
        if updates:
            own[: lengths[self.rank]] = torch.cat([update.flatten() for update in updates.values()])
        gathered = self.all_gather(own)  # (ranks, longest)
        begins = [0] * self.ranks
        all_updates = {}
        for p, owner in owners.items():
            begin = begins[owner]
            end = begin + shapes[p].numel()
            all_updates[p] = gathered[owner, begin:end].view(shapes[p])
            begins[owner] = end
        return all_updates

    def apply_updates(self, params, updates, group):
        """Take the updates of `params` out of `updates`, and apply them to this rank's part."""
        steps = [updates.pop(p).to(p.dtype) for p in params]
        torch._foreach_mul_(steps, [math.sqrt(max(1.0, step.size(0) / step.size(1))) for step in steps])
        if self.shard_tensor:
            steps = [local(self.shard_tensor(self.names[p], step, p))
                     for step, p in zip(steps, params, strict=True)]
        weights = [local(p) for p in params]
        decay = 1 - group["lr"] * group["weight_decay"]
        if self.found_inf is not None:  # where it is 1, neither step nor decay
            bad = self.found_inf.to(steps[0].device).bool()
            steps = [step * ~bad for step in steps]
            decay = torch.where(bad, 1.0, decay)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, steps, alpha=-group["lr"])


def is_dtensor(tensor):
    """Whether a tensor is a DTensor, without importing DTensor, which is slow and rarely needed."""
    return hasattr(tensor, "to_local")


def local(tensor):
    """This rank's part of a tensor.

    Muon and the norms work on these parts: not every torch takes lists of DTensors, and not every operation keeps their
    layout. torch 2.9 loses the order of rows that both tensor parallelism and ZeRO split.
    """
    return tensor.to_local() if is_dtensor(tensor) else tensor


def laid_out_like(own, p):
    """This rank's part of a tensor -> the tensor, with the layout and the device of `p`."""
    if not is_dtensor(p):
        return own
    tensor = torch.empty_like(p.detach())
    tensor.to_local().copy_(own)
    return tensor


def share_out(pieces, ranks):
    """The rank that orthogonalises each parameter, with about as many FLOPs for each rank. pieces: the shapes
    (shorter, longer side) of each parameter's matrices. -> numbers of ranks, rising: neighbours, which have the same
    shapes, mostly stay together"""
    # FLOPs of a Newton-Schulz step, up to a factor
    flops = [sum(2 * short**2 * long + short**3 for short, long in shapes) for shapes in pieces]
    ends = list(accumulate(flops))
    return [int((end - own / 2) * ranks / ends[-1]) for own, end in zip(flops, ends, strict=True)]


# -----------------------------------------------------------------------------
# Learning rate


def lr_at(step, *, learning_rate, min_lr, schedule, warmup_iters, lr_decay_iters, decay_frac=0.2):
    """The learning rate of the update that follows `step` updates; above 0 at step 0.

    After a linear warm-up, "cosine" and "linear" fall from learning_rate to min_lr at lr_decay_iters. "wsd" stays flat
    and falls linearly over the last decay_frac of lr_decay_iters (Hu et al. 2024, arXiv:2404.06395). "constant" stays.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    start = warmup_iters  # of the decay
    if schedule == "wsd":
        start = max(warmup_iters, lr_decay_iters * (1 - decay_frac))
    progress = min(1.0, max(0.0, (step - start) / max(1, lr_decay_iters - start)))
    weight = 1 - progress
    if schedule == "cosine":
        weight = 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + weight * (learning_rate - min_lr)
