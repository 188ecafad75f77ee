"""
Optimizers and learning-rate schedules: which parameter is trained by what, AdamW, Muon.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) trains everything, or with optimizer="muon" the embeddings, the
head, gains and biases, while Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) trains the
matrices of the blocks.
"""

import math
from itertools import accumulate

import torch


def split_params(model, muon=False):
    """Names of the parameters by the group that trains them: {"muon": [...], "decay": [...], "no_decay": [...]}.

    Weight decay is for matrices and embedding tables; gains and biases have none (GPT-2 and minGPT do the same).
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
    """AdamW, or AdamW and Muon, behind the face of one optimizer, so that a GradScaler steps both or neither.

    The state is saved and loaded by parameter name: {"adamw": {name: {...tensors}}, "muon": {...}}. Learning rates are
    not in it, they follow from the step. Of a model that lies on many devices, `whole` and `part` (parallel.Layout's)
    gather a matrix for Muon and give back this rank's part of it, and `peers` are the ranks that share its work.

    Where `found_inf`, a float on the device, is 1.0, a step changes nothing, and nothing waits to know: the name and
    the meaning are those of PyTorch's fused optimizers, to which a GradScaler says it so.
    """

    found_inf = None

    def __init__(self, model, *, optimizer="adamw", learning_rate, muon_learning_rate=0.02, weight_decay=0.0,
                 betas=(0.9, 0.95), muon_momentum=0.95, muon_dtype=torch.float32, whole=None, part=None,
                 peers=(0, 1, None)):
        params = dict(model.named_parameters())
        self.names = {p: name for name, p in params.items()}
        groups = split_params(model, muon=optimizer == "muon")
        decays = {"decay": weight_decay, "no_decay": 0.0}
        adamw = [
            {"params": [params[n] for n in groups[g]], "weight_decay": wd} for g, wd in decays.items() if groups[g]
        ]
        fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
        self.each = {"adamw": torch.optim.AdamW(adamw, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)}
        if optimizer == "muon":
            self.each["muon"] = Muon(
                [params[n] for n in groups["muon"]], lr=muon_learning_rate, momentum=muon_momentum,
                weight_decay=weight_decay, dtype=muon_dtype,
                whole=whole and (lambda t, p: whole(self.names[p], t)),
                part=part and (lambda t, p: part(self.names[p], t, p)), peers=peers,
            )
        held = [id(p) for group in self.param_groups for p in group["params"]]
        assert sorted(held) == sorted(map(id, params.values())), "each parameter is trained by exactly one group"
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def param_groups(self):
        return [group for opt in self.each.values() for group in opt.param_groups]

    def set_lr(self, factor):
        """Scale every group's own learning rate by `factor`, so that all follow one schedule."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def step(self):
        if self.found_inf is not None and self.found_inf.device.type == "mps" and self.found_inf.item():
            return  # whether its fused AdamW looks has not been tried
        for opt in self.each.values():
            opt.found_inf = self.found_inf
            opt.step()

    def zero_grad(self):
        for opt in self.each.values():
            opt.zero_grad(set_to_none=True)

    def state_dict(self):
        return {
            kind: {self.names[p]: dict(state) for p, state in opt.state.items()} for kind, opt in self.each.items()
        }

    def load_state_dict(self, saved):
        """Raises ValueError naming what is missing, not there, or of another shape."""
        if saved.keys() != self.each.keys():
            raise ValueError(f"optimizer state of {', '.join(saved)} does not fit {', '.join(self.each)}")
        for kind, opt in self.each.items():
            params = {self.names[p]: p for group in opt.param_groups for p in group["params"]}
            odd = sorted(saved[kind].keys() ^ params.keys())
            if odd and saved[kind]:  # before the first step there is none
                raise ValueError(f"the {kind} state does not fit the model: only one of them has {', '.join(odd)}")
            for name, state in saved[kind].items():
                p = params[name]
                for key, value in state.items():
                    if value.ndim and value.shape != p.shape:
                        raise ValueError(f"{name}: {key} has shape {tuple(value.shape)}, not {tuple(p.shape)}")
                # the step count, too: fused AdamW reads it on the device
                opt.state[p] = {key: value.to(p.device, copy=True) for key, value in state.items()}


# -----------------------------------------------------------------------------
# Muon


def orthogonalize(G, steps=5, dtype=torch.float32):
    """Nearly the orthogonal factor U V^T of each matrix of G (n, rows, cols), by Newton-Schulz in `dtype`.

    The quintic's coefficients (Jordan 2024) trade exactness for speed: singular values end in about [0.7, 1.2].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value is above 1
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # aX + (bA + cAA)X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: p <- p (1 - lr wd) - lr sqrt(max(1, rows/cols)) UV^T.

    Nesterov momentum as in the original. Matrices of one shape are orthogonalised in one batch. `dtype` is that of
    the Newton-Schulz iteration: fp32 is reproducible to 1e-7 between layouts, bf16 faster on GPUs. Ranks that hold the
    same matrices (`peers`: this one's place, how many they are, their all-gather of equally long vectors) share them
    out and tell each other the updates; momentum, which costs little, each keeps for all of what it holds.
    """

    found_inf = None  # as in Optimizers

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, ns_steps=5, dtype=torch.float32,
                 whole=None, part=None, peers=(0, 1, None)):
        self.whole, self.part = (f or (lambda t, p: t) for f in (whole, part))
        self.rank, self.ranks, self.all_gather = peers
        self.dtype = dtype  # no default of the groups: those are saved, as plain values
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            order = [p for params in shapes.values() for p in params]
            owners = dict(zip(order, shares([p.shape for p in order], self.ranks), strict=True))
            sizes, updates = {}, {}
            for params in shapes.values():
                own = {}
                for p, update in zip(params, self.momentum(params, group), strict=True):
                    update = self.whole(like(update, p), p)
                    sizes[p] = update.shape
                    if owners[p] == self.rank:
                        own[p] = update
                if own:
                    batch = torch.stack(list(own.values()))  # (n, rows, cols)
                    updates |= zip(own, orthogonalize(batch, group["ns_steps"], self.dtype).unbind(), strict=True)
                if self.ranks == 1:
                    self.move(params, updates, group)
            if self.ranks > 1:
                updates = self.exchange(updates, owners, sizes)
                for params in shapes.values():
                    self.move(params, updates, group)

    def momentum(self, params, group):
        """The momentum of some parameters goes on by their gradients -> what lies here of the updates, yet to be made
        orthogonal."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers, grads = [local(self.state[p]["momentum_buffer"]) for p in params], [local(p.grad) for p in params]
        if self.found_inf is not None:  # a buffer is then its own gradient, which leaves it as it is
            bad = self.found_inf.to(grads[0].device).bool()
            grads = [torch.where(bad, b, g) for b, g in zip(buffers, grads, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        return torch._foreach_lerp(grads, buffers, group["momentum"])

    def exchange(self, updates, owners, sizes):
        """The updates of this rank's share -> those of all, in `dtype`, which loses nothing."""
        lengths = [sum(sizes[p].numel() for p, owner in owners.items() if owner == rank) for rank in range(self.ranks)]
        own = torch.zeros(max(lengths), dtype=self.dtype, device=next(iter(owners)).device)
        if updates:
            own[: lengths[self.rank]] = torch.cat([update.flatten() for update in updates.values()])
        each, at, found = self.all_gather(own), [0] * self.ranks, {}
        for p, owner in owners.items():
            begin, at[owner] = at[owner], at[owner] + sizes[p].numel()
            found[p] = each[owner, begin : at[owner]].view(sizes[p])
        return found

    def move(self, params, updates, group):
        """Take some parameters' whole updates and apply them."""
        updates = [updates.pop(p).to(p.dtype) for p in params]
        rows, cols = updates[0].shape
        updates, decay = list(map(self.part, updates, params)), 1 - group["lr"] * group["weight_decay"]
        updates, params = list(map(local, updates)), list(map(local, params))
        if self.found_inf is not None:
            bad = self.found_inf.to(updates[0].device).bool()
            updates, decay = [update * ~bad for update in updates], torch.where(bad, 1.0, decay)
        if group["weight_decay"]:
            torch._foreach_mul_(params, decay)
        torch._foreach_add_(params, updates, alpha=-group["lr"] * math.sqrt(max(1.0, rows / cols)))


def local(tensor):
    """What of a tensor lies on this rank. Lists of DTensors are not for every torch, and their layouts do not come
    through every operation (2.9 loses the order of rows that tensor parallelism and ZeRO both split)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def like(own, p):
    """This rank's part of a tensor -> that tensor, laid out as `p` is, and where `p` is."""
    if not hasattr(p, "to_local"):
        return own
    tensor = torch.empty_like(p.detach())
    tensor.to_local().copy_(own)
    return tensor


def shares(shapes, ranks):
    """Which of the ranks orthogonalises each of some matrices: about as many FLOPs each, in runs, so that those of one
    shape stay together as far as they can."""
    flops = [2 * min(shape) ** 2 * max(shape) + min(shape) ** 3 for shape in shapes]  # of a step, but for a factor
    ends = list(accumulate(flops))
    return [int((end - own / 2) * ranks / ends[-1]) for own, end in zip(flops, ends, strict=True)]


# -----------------------------------------------------------------------------
# Learning rate


def lr_at(step, *, learning_rate, min_lr, schedule, warmup_iters, lr_decay_iters, decay_frac=0.2):
    """Learning rate of the update after `step` updates are done; above 0 at step 0.

    Linear warm-up, then cosine or linear from learning_rate down to min_lr at lr_decay_iters; or wsd, which stays
    flat and goes down linearly over the last decay_frac of lr_decay_iters (Hu et al. 2024, arXiv:2404.06395); or
    constant.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    start = max(warmup_iters, lr_decay_iters * (1 - decay_frac)) if schedule == "wsd" else warmup_iters
    progress = min(1.0, max(0.0, (step - start) / max(1, lr_decay_iters - start)))
    weight = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_lr + weight * (learning_rate - min_lr)

