"""
Passes before the first step: compile the model, fall back once where that fails, and let DDP settle its buckets.

They change neither weights nor the order of the data: their gradients are dropped.
"""

import torch

from configurator import fail
from device import can_compile, compile_one, what_failed
from training.measure import context_at, seed_dropout


def compile_model(c, layout, measure, loader, opt, step):
    """Compile the model for training and evaluation, where the settings ask for it. Where it does not work, the run
    warns and stays uncompiled, on all ranks."""
    device = measure.machine.device
    asked = device.type == "cuda" if c.compile is None else c.compile
    if not asked:
        return
    trouble = layout.any_trouble(can_compile(device) or layout.cannot_compile())
    if not trouble and not layout.copies_whole:
        # ranks wait for each other within a pass, so first compile a function that no rank waits for
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
    """Compile, by one pass for each length of context that the run will have."""
    layout.compile()
    if layout.copies_whole:
        measure.evaluator = torch.compile(layout.model, dynamic=False)
    torch._dynamo.config.recompile_limit = 64  # graphs of one function: one a length, and the evaluation's
    # DDP's ranks do not talk in a micro-step before the last, so a rank that fails leaves none waiting
    micro = -1 if layout.copies_whole else layout.accumulation - 1
    x, y = layout.repeat_batch(loader.batch(step))
    x, y = x.to(measure.machine.device), y.to(measure.machine.device)
    length = context_at(c, step)
    while length <= c.block_size:
        seed_dropout(c, layout, step, micro)
        layout.forward_backward(x.view(-1, length), y.view(-1, length), micro)
        length *= 2


def trouble_of(call):
    """Why `call` fails, in a line; None where it works. Raises where memory is full: running in another way needs no
    less."""
    try:
        call()
    except Exception as e:
        return what_failed(e)
    return None


def settle_buckets(c, layout, measure, loader, opt, step):
    """DDP orders its buckets after its first backward pass: have them as a resumed run has them."""
    for _ in range(layout.warm_ups):
        x, y = loader.batch(step)
        seed_dropout(c, layout, step, layout.accumulation - 1)
        layout.forward_backward(measure.to_device(x, step), measure.to_device(y, step), layout.accumulation - 1)
        opt.zero_grad()
