"""
Probes: what a model does inside, by layer, measured beside the training and never in it.

- `attention`: entropy and largest logit of each layer's attention, and the size of the residual stream, on one fixed
  row. Entropy that falls to 0 and logits that grow without end announce a loss that diverges (Zhai et al. 2023,
  arXiv:2303.06296; Dehghani et al. 2023, arXiv:2302.05442).
- `Update`: the gradient's norm and how far a step moves the weights, by group: embed, layer_0, ..., head. About 1e-3
  of the weights' own norm is the usual rule of thumb.

Nothing here draws a random number or leaves a trace: a run is the same to the bit with probes and without.
"""

import sys
from contextlib import nullcontext

import torch

from model import Block


class Attend:
    """What GPT.forward takes for a cache: attention spelled out, which notes what SDPA keeps to itself."""

    rows = slice(-1, None)  # of the logits, which nobody wants

    def __init__(self, model, T, device):
        self.positions = torch.arange(T, device=device)
        self.rope = model.rope(T)
        self.entropy, self.largest = [], []  # by layer

    def attend(self, layer, q, k, v, chunk=2**24):
        """model.attend in fp32, with `chunk` weights at once at most, or those of one query."""
        B, T, heads, D = q.shape
        with torch.autocast(q.device.type, enabled=False):
            q, k, values = (t.float().transpose(1, 2) for t in (q, k, v))
            k, values = (t.repeat_interleave(heads // t.size(1), dim=1) for t in (k, values))  # (B, heads, T, D)
            entropies, largest, y = [], [], []
            for rows in torch.arange(T, device=q.device).split(max(1, chunk // (B * heads * T))):
                future = torch.arange(T, device=q.device) > rows[:, None]
                scores = q[:, :, rows] @ k.mT * D**-0.5  # (B, heads, rows, T)
                scores = scores.masked_fill(future, float("-inf"))
                weights = scores.softmax(-1)
                entropies.append(torch.special.entr(weights).sum(-1))  # entr(w) = -w ln w, and 0 at 0
                largest.append(scores.amax())
                y.append(weights @ values)
        self.entropy.append(torch.cat(entropies, dim=2).mean())
        self.largest.append(torch.stack(largest).amax())
        return torch.cat(y, dim=2).transpose(1, 2).to(v.dtype)


@torch.no_grad()
def attention(model, idx, context):
    """One forward pass of a GPT over `idx` (B, T) in evaluation mode, within `context()`, with attention spelled out.

    -> {"attn_entropy", "attn_logit_max", "act_rms"}, each a tensor of one number a layer: the entropy of the attention
    weights in nats, mean over heads and query positions (query t sees t + 1 keys, so uniform attention has the mean of
    ln(t + 1), about ln T - 1, and that is what to divide by to compare lengths); the largest scaled logit before the
    softmax; the root mean square of the residual stream after the block. Of a model on many ranks (parallel.py), this
    one's layers and heads.
    """
    rms, training = [], model.training
    hooks = [block.register_forward_hook(lambda block, args, x: rms.append(x.float().square().mean().sqrt()))
             for block in model.modules() if isinstance(block, Block)]
    probe = Attend(model, idx.size(1), idx.device)
    compiles = "torch._dynamo" in sys.modules  # and would compile anew for each layer what is looked at once
    model.eval()
    try:
        with context(), torch.compiler.set_stance("force_eager") if compiles else nullcontext():
            model(idx, cache=probe)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    found = {"attn_entropy": probe.entropy, "attn_logit_max": probe.largest, "act_rms": rms}
    return {key: torch.stack(by_layer) for key, by_layer in found.items()}


def groups_of(config):
    """Names of the groups of a GPTConfig's parameters. The head has some, if only its norm's gain, or is none."""
    head = [] if config.tie_weights and config.norm == "rmsnorm_nogain" else ["head"]
    return ["embed", *(f"layer_{i}" for i in range(config.n_layer)), *head]


def group_of(name, n_layer):
    """The number of a parameter's group: 0 embeddings and their norm, 1 + i layer i, n_layer + 1 the last norm and an
    untied head. (A tied one is named wte.)"""
    parts = name.split(".")
    if parts[:2] == ["transformer", "h"]:
        return 1 + int(parts[2])
    return 0 if parts[1] in ("wte", "wpe", "ln_e") else n_layer + 1


class Update:
    """One optimizer step, looked at. Begun between the backward pass and the step, while the gradient is there."""

    @torch.no_grad()
    def __init__(self, model, norms):
        """Keeps a copy of the weights until the step is done. `norms(tensors, group_of, n)` gives the norms of `n`
        groups of tensors by name that lie as the parameters do (parallel.Layout.group_norms)."""
        self.model, self.groups, layers = model, groups_of(model.config), model.config.n_layer
        self.norms = lambda tensors: norms(tensors, lambda name: group_of(name, layers), layers + 2)
        self.grads = self.norms({name: p.grad for name, p in model.named_parameters()})
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def end(self):
        """After the step; nothing is read from the device yet."""
        weights = self.norms(self.before)
        for name, p in self.model.named_parameters():
            self.before[name].sub_(p.detach())  # in place: no second copy
        self.ratios = self.norms(self.before) / weights  # of weights that are all 0 no number
        self.before = None

    def read(self):
        """-> {"grad_norms": {group: norm}, "update_ratio": {group: ||update|| / ||weights before it||}}"""
        return {key: dict(zip(self.groups, values.tolist(), strict=False))
                for key, values in (("grad_norms", self.grads), ("update_ratio", self.ratios))}
