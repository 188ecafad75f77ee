"""
What training holds in memory: bench.py's `activations` and `zero`.

`activations` takes one forward and backward pass of a GPT-2 with each value of train.py's activation_checkpointing. It
reports the memory of the activations, the peak, the time, and a digest of the gradients, which must not differ.

`zero` measures the weights, gradients and optimizer state that each rank holds when the optimizer steps, and the peak
of an update, for each ZeRO stage and number of processes, beside the theory and plan.py's estimate.

Every case runs in fresh processes, because the peak memory of a process never falls. All steps are in fp32, on one
sequence.
"""

import hashlib
import os
import time

import torch

import plan
from benchmarks.common import forget_peak, in_processes, machine, table
from configurator import fail
from device import memory_gb, pick_device
from loader import Batch
from model import GPT, GPTConfig
from optim import Optimizers, local
from parallel import Layout, checkpoint_activations
from training.ranks import own_device


def large_model(shape, tokens):
    """A GPT-2 of `shape` (layers, heads, width) with the same random weights each time, and a sequence (1, tokens)."""
    n_layer, n_head, n_embd = shape
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=tokens, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    return model, torch.randint(50257, (1, tokens))


# -----------------------------------------------------------------------------
# activations


def bench_activations(c):
    """-> a row for each kind of activation checkpointing."""
    rows = []
    for kind in ("none", "selective", "full"):
        rows += in_processes(step_once, kind, c.shape, c.tokens, c.device)
    for row in rows:
        row["of_none_%"] = 100 * row["activations_mb"] / rows[0]["activations_mb"]
    n_layer, n_head, n_embd = c.shape
    print(f"{n_layer} layers of {n_embd}, {n_head} heads, 1 sequence of {c.tokens} tokens, fp32, "
          f"{torch.get_num_threads()} threads; activations: how far the forward pass raises the peak")
    table(rows, ("checkpointing", "activations_mb", "of_none_%", "peak_mb", "step_s", "gradients"))
    return {"machine": machine(), "rows": rows}


def step_once(kind, shape, tokens, device_name):
    """One forward and backward pass, in a process of its own. -> its figures"""
    device = pick_device(device_name)[0]
    model, x = large_model(shape, tokens)
    model = model.to(device)
    x = x.to(device)  # (1, T)
    if kind != "none":
        checkpoint_activations(model, kind)
    weights_gb = memory_gb(device)
    began = time.perf_counter()
    _, loss = model(x, x, loss_only=True)
    activations_gb = memory_gb(device) - weights_gb
    loss.backward()
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.grad.cpu().numpy().data)
    return {
        "checkpointing": kind,
        "activations_mb": 1000 * activations_gb,
        "peak_mb": 1000 * memory_gb(device),
        "step_s": time.perf_counter() - began,
        "gradients": digest.hexdigest()[:16],
    }


# -----------------------------------------------------------------------------
# zero


def bench_zero(c):
    """-> a row for each number of processes and ZeRO stage, from the rank that holds the most.

    The theory: weights, gradients and AdamW's two moments are 4 numbers for each parameter. At the optimizer's step
    each of n ranks holds an n-th of them, in every stage (Rajbhandari et al. 2020): by then fully_shard has reduced the
    gradients into shards and freed the unsharded weights. The stages differ in the peak. Stage 3 frees weights between
    uses. Stages 2 and 3 reduce gradients after each micro-batch; stage 1 keeps them unsharded up to the last one.
    """
    if not c.worlds:
        fail("worlds must be at least 1 number of processes")
    # for the children: glibc then returns freed memory to the system at once
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "100000"
    rows = []
    for ranks in c.worlds:
        stages = (0, 1, 2, 3) if ranks > 1 else (0,)
        for stage in stages:
            by_rank = in_processes(updates_once, stage, c.shape, c.tokens, c.device, ranks=ranks)
            rows.append(zero_row(ranks, stage, by_rank))
    n_layer, n_head, n_embd = c.shape
    print(f"{n_layer} layers of {n_embd}, {n_head} heads, "
          f"2 micro-batches of 1 sequence of {c.tokens} tokens, fp32; MB on the rank that has most: "
          "at the optimizer's step (theory: of all three), then the peak of an update, "
          "and what plan.py says of it")
    table(rows, ("processes", "layout", "weights_mb", "gradients_mb", "optimizer_mb", "theory_mb",
                 "of_theory_%", "peak_mb", "plan_mb"))
    return {"machine": machine(), "rows": rows}


def zero_row(ranks, stage, by_rank):
    """The row of a case, from what each rank measured."""
    if stage:
        layout = f"ZeRO-{stage}"
    else:
        layout = "DDP" if ranks > 1 else "one"
    row = {"processes": ranks, "layout": layout}
    for name in by_rank[0]:
        row[f"{name}_mb"] = max(figures[name] for figures in by_rank) / 1e6
    held = row["weights_mb"] + row["gradients_mb"] + row["optimizer_mb"]
    row["of_theory_%"] = 100 * held / row["theory_mb"]
    return row


def updates_once(stage, shape, tokens, device_name):
    """Two updates of two micro-batches each, in a process of its own. -> figures of the second update, in bytes

    They are the memory that this rank holds when the optimizer steps, the theory, the peak, and plan.py's estimate of
    the peak. The peak is the memory that stays from one update to the next, plus the rise during the update.
    """
    device = own_device(device_name, pick_device(device_name)[0])
    layout = Layout(device, zero_stage=stage)
    unplaced, x = large_model(shape, tokens)
    unplaced = unplaced.to(device)
    x = x.to(device)  # (1, T)
    theory = 4 * unplaced.param_bytes() / (layout.dp if layout.zero else 1)
    planned = plan.step_memory(plan.costs_of(unplaced), 1, micro_steps=2, cuda=device.type == "cuda",
                               layout=plan.Grid(layout.dp, layout.zero))
    model = layout.place(unplaced)
    del unplaced
    opt = Optimizers(model, learning_rate=1e-3, **layout.optimizer_options())
    layout.accumulation = 2
    for _ in range(2):  # the first makes the optimizer's state
        forget_peak(device)
        before_gb = memory_gb(device)
        for micro in range(layout.passes):
            layout.forward_backward(Batch(x, x), micro)
        layout.reduce_gradients()
        opt.step()
        held = held_bytes(model, opt)
        opt.zero_grad()
    stays = held["weights"] + held["optimizer"]
    if layout.ddp:  # its buckets hold the gradients
        stays += held["gradients"]
    peak = stays + 1e9 * (memory_gb(device) - before_gb)
    return {**held, "theory": theory, "peak": peak, "plan": planned["total"]}


def held_bytes(model, opt):
    """Bytes of weights, gradients and optimizer state that lie on this rank, without the optimizer's step counts."""
    states = []
    for by_parameter in opt.state_dict().values():
        for state in by_parameter.values():
            states += [tensor for tensor in state.values() if tensor.ndim]
    parts = {
        "weights": model.parameters(),
        "gradients": [p.grad for p in model.parameters()],
        "optimizer": states,
    }
    held = {}
    for name, tensors in parts.items():
        held[name] = sum(tensor.numel() * tensor.element_size() for tensor in map(local, tensors))
    return held
