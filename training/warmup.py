"""
Passes before the first step: they compile the model, and let DDP settle its buckets.

They change neither weights nor the order of the data, and their gradients are dropped. If the model does not compile,
the run stays uncompiled.
"""

import torch

from configurator import fail
from device import can_compile, compile_one, what_failed
from training.measure import context_at, seed_dropout


def compile_model(c, layout, measure, loader, opt, step):
    """Compile the model for training and evaluation, if the settings ask for it. If it fails on any rank, the run warns
    and stays uncompiled on all of them."""
    device = measure.machine.device
    asked = device.type == "cuda" if c.compile is None else c.compile
    if not asked:
        return
    trouble = layout.any_trouble(can_compile(device) or layout.cannot_compile())
    if not trouble and not layout.copies_whole:
        # ranks wait for each other within a pass, so find out first, with a small function of its own
        trouble = layout.any_trouble(trouble_of(lambda: compile_one(device)))
    if not trouble:
        trouble = trouble_of(lambda: first_passes(c, layout, measure, loader, step))
        if trouble and not layout.copies_whole:
            fail(f"torch.compile failed ({trouble}); --compile=false trains uncompiled")
        trouble = layout.any_trouble(trouble)
    opt.zero_grad()
    if trouble:
        layout.run_uncompiled()
        measure.evaluator = None
        measure.run.warn(f"torch.compile does not work here ({trouble}); running uncompiled")


def first_passes(c, layout, measure, loader, step):
    """Compile by running a pass for each length of context that the run will have."""
    layout.compile()
    if layout.copies_whole:
        measure.evaluator = torch.compile(layout.model, dynamic=False)
    torch._dynamo.config.recompile_limit = 64  # a graph for each length, and one for the evaluation
    # DDP's ranks communicate in the last micro-step only: in any other, a rank that fails leaves none waiting
    micro = -1 if layout.copies_whole else layout.accumulation - 1
    batch = layout.repeat_batch(loader.batch(step)).to(measure.machine.device)
    length = context_at(c, step)
    while length <= c.block_size:
        seed_dropout(c, layout, step, micro)
        layout.forward_backward(batch.cut(length), micro)
        length *= 2


def trouble_of(call):
    """The error of `call` in one line, or None if it works. A full memory is raised: uncompiled, the run needs no less.
    """
    try:
        call()
    except Exception as e:
        return what_failed(e)
    return None


def settle_buckets(c, layout, measure, loader, opt, step):
    """Idle passes after which DDP keeps the order of its buckets: a resumed run then sums in the same order."""
    last = layout.accumulation - 1
    for _ in range(layout.warm_ups):
        batch = measure.to_device(loader.batch(step), step)
        seed_dropout(c, layout, step, last)
        layout.forward_backward(batch, last)
        opt.zero_grad()
