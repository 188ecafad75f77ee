"""
Probes: what happens inside a model, layer by layer. They measure beside the training and never change it.

- `attention`: entropy and largest logit of each layer's attention, and the size of the residual stream, on one fixed
  row. Entropy that falls to 0 and logits that keep growing are early signs of a loss that diverges (Zhai et al. 2023,
  arXiv:2303.06296; Dehghani et al. 2023, arXiv:2302.05442).
- `Update`: the gradient's norm and how far a step moves the weights, by group: embed, layer_0, ..., head. The usual
  rule of thumb is about 1e-3 of the weights' own norm.

Nothing here draws a random number or leaves a trace: a run is the same to the bit with probes and without.
"""

import sys
from contextlib import nullcontext
from functools import partial

import torch

from model import Block


class Attend:
    """GPT.forward takes it as a cache. It computes attention step by step, and records what SDPA does not show."""

    rows = slice(-1, None)  # forward computes the logits of these positions only; nobody reads them

    def __init__(self, model, T, device):
        self.positions = torch.arange(T, device=device)
        self.rope = model.rope(T)
        self.entropy = []  # by layer
        self.largest = []  # by layer

    def attend(self, layer, q, k, v, chunk=2**24):
        """attention.attend in fp32. It holds at most `chunk` attention weights at once, or those of one query."""
        B, T, heads, D = q.shape
        with torch.autocast(q.device.type, enabled=False):
            groups = heads // k.size(2)  # query heads that share a key head
            queries = q.float().transpose(1, 2)  # (B, heads, T, D)
            keys = k.float().transpose(1, 2).repeat_interleave(groups, dim=1)  # (B, heads, T, D)
            values = v.float().transpose(1, 2).repeat_interleave(groups, dim=1)  # (B, heads, T, D)
            entropies, largest, outputs = [], [], []
            for rows in torch.arange(T, device=q.device).split(max(1, chunk // (B * heads * T))):
                future = torch.arange(T, device=q.device) > rows[:, None]
                scores = queries[:, :, rows] @ keys.mT * D**-0.5  # (B, heads, rows, T)
                scores = scores.masked_fill(future, float("-inf"))
                weights = scores.softmax(-1)
                entropies.append(torch.special.entr(weights).sum(-1))  # entr(w) = -w ln w, and 0 at 0
                largest.append(scores.amax())
                outputs.append(weights @ values)
        self.entropy.append(torch.cat(entropies, dim=2).mean())
        self.largest.append(torch.stack(largest).amax())
        return torch.cat(outputs, dim=2).transpose(1, 2).to(v.dtype)


@torch.no_grad()
def attention(model, idx, context):
    """One forward pass of a GPT over `idx` (B, T) in evaluation mode, within `context()`, with attention by Attend.

    -> {"attn_entropy", "attn_logit_max", "act_rms"}, each a tensor with one number a layer:

    - the entropy of the attention weights in nats, averaged over heads and query positions. Query t sees t + 1 keys, so
      uniform attention has the mean of ln(t + 1), about ln T - 1: divide by that to compare lengths.
    - the largest scaled logit before the softmax.
    - the root mean square of the residual stream after the block.

    With many ranks (parallel.py), these are the figures of this rank's layers and heads.
    """
    rms = []

    def note_rms(block, args, x):
        rms.append(x.float().square().mean().sqrt())

    blocks = [module for module in model.modules() if isinstance(module, Block)]
    hooks = [block.register_forward_hook(note_rms) for block in blocks]
    probe = Attend(model, idx.size(1), idx.device)
    # if torch.compile is in use, it would compile every layer again for this single pass
    compiles = "torch._dynamo" in sys.modules
    training = model.training
    model.eval()
    try:
        with context(), torch.compiler.set_stance("force_eager") if compiles else nullcontext():
            model(idx, cache=probe)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    by_layer = {"attn_entropy": probe.entropy, "attn_logit_max": probe.largest, "act_rms": rms}
    return {key: torch.stack(values) for key, values in by_layer.items()}


def groups_of(config):
    """Names of the groups of a GPTConfig's parameters. There is no group "head" if neither the head nor its norm has
    parameters of its own."""
    groups = ["embed", *(f"layer_{i}" for i in range(config.n_layer))]
    if not config.tie_weights or config.norm != "rmsnorm_nogain":
        groups.append("head")
    return groups


def group_of(name, n_layer):
    """The number of a parameter's group: 0 the embeddings and their norm, 1 + i layer i, n_layer + 1 the last norm and
    an untied head. (A tied head goes by the name of wte.)"""
    parts = name.split(".")
    if parts[:2] == ["transformer", "h"]:
        return 1 + int(parts[2])
    return 0 if parts[1] in ("wte", "wpe", "ln_e") else n_layer + 1


class Update:
    """Measures one optimizer step. Create it after the backward pass and before the step."""

    @torch.no_grad()
    def __init__(self, model, norms):
        """Keeps a copy of the weights until the step is done.

        `norms(tensors, group_of, n)` computes the norms of `n` groups of tensors (parallel.Layout.group_norms).
        """
        self.model = model
        self.groups = groups_of(model.config)
        n_layer = model.config.n_layer
        number_of = partial(group_of, n_layer=n_layer)
        self.norms = partial(norms, group_of=number_of, n=n_layer + 2)
        self.grads = self.norms({name: p.grad for name, p in model.named_parameters()})
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def end(self):
        """Call this after the step. It does not wait for the device."""
        weights = self.norms(self.before)
        for name, p in self.model.named_parameters():
            self.before[name].sub_(p.detach())  # in place: no second copy
        self.ratios = self.norms(self.before) / weights  # not a number where all weights are 0
        self.before = None

    def read(self):
        """-> {"grad_norms": {group: norm}, "update_ratio": {group: ||update|| / ||weights before it||}}"""
        # not strict: there is a norm for the head, which may not be a group
        return {
            "grad_norms": dict(zip(self.groups, self.grads.tolist(), strict=False)),
            "update_ratio": dict(zip(self.groups, self.ratios.tolist(), strict=False)),
        }
