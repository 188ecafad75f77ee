"""
Every layout against one process: the same weights, batches and steps, and how far apart they end.

    torchrun --standalone --nproc_per_node=4 tests/layouts.py

A row of the table is a layout of the ranks for one kind of model: the largest relative difference of a raw gradient
(by tensor), of the loss and the gradient norm in ten clipped steps, of the weights and moments after them, and of the
validation loss. The last line is the same as JSON; test_parallel.py reads it.
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine  # noqa: E402
from benchmarks.memory import held_bytes  # noqa: E402
from dataset import Tokens  # noqa: E402
from eval import evaluate  # noqa: E402
from loader import Loader, read_batch  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optim import Optimizers, local, map_state  # noqa: E402
from parallel import Layout  # noqa: E402
from training.ranks import all_fail_together, world  # noqa: E402

STEPS, MICRO_BATCHES, ROWS, T = 10, 4, 2, 16
SIZES = dict(block_size=T, vocab_size=61, n_head=4, n_embd=32)
MODERN = dict(pos="rope", norm="rmsnorm", norm_embed=True, qk_norm="rms_gain", activation="swiglu")
MODELS = {
    "GPT-2": {},  # learned positions, biases, a tied head
    "modern": dict(**MODERN, bias=False, tie_weights=False),
    "grouped": dict(**MODERN, n_kv_head=2),
    "multi-query": dict(qk_norm="rms_gain", n_kv_head=1),
}
TALKS = {  # models that train on documents in a row, some of whose tokens are learned
    "talks": dict(n_kv_head=2),
    "modern talks": MODELS["modern"],
}
LAYOUTS = {
    2: {
        "DDP": {}, "ZeRO-1": dict(zero_stage=1), "ZeRO-2": dict(zero_stage=2), "ZeRO-3": dict(zero_stage=3),
        "TP 2": dict(tp_size=2), "PP 2 gpipe": dict(pp_size=2, pp_schedule="gpipe"), "PP 2 1f1b": dict(pp_size=2),
        "PP 2 interleaved": dict(pp_size=2, pp_schedule="interleaved"),
    },
    4: {
        "DDP": {}, "ZeRO-1": dict(zero_stage=1), "ZeRO-2": dict(zero_stage=2), "ZeRO-3": dict(zero_stage=3),
        "TP 4": dict(tp_size=4), "TP 2 x DDP": dict(tp_size=2), "TP 2 x ZeRO-1": dict(tp_size=2, zero_stage=1),
        "TP 2 x ZeRO-3": dict(tp_size=2, zero_stage=3), "PP 4 1f1b": dict(pp_size=4),
        "PP 2 x DDP": dict(pp_size=2), "PP 2 interleaved x DDP": dict(pp_size=2, pp_schedule="interleaved"),
        "PP 2 x ZeRO-2": dict(pp_size=2, zero_stage=2), "PP 2 x ZeRO-3": dict(pp_size=2, zero_stage=3),
        "PP 2 x TP 2": dict(pp_size=2, tp_size=2),
    },
    8: {
        "PP 2 x DDP 2 x TP 2": dict(pp_size=2, tp_size=2),
        "PP 2 x ZeRO-1 2 x TP 2": dict(pp_size=2, tp_size=2, zero_stage=1),
    },
}


def cases(ranks):
    """(layout, model, optimizer, its settings) of every row."""
    for name, settings in LAYOUTS[ranks].items():
        models = MODELS if name in ("TP 2", "TP 2 x DDP") else {"TP 4": ("grouped", "multi-query")}.get(
            name, ("modern", "multi-query") if "TP" in name else ("GPT-2", "modern"))
        for model in models:
            yield name, model, "adamw", settings
        if ranks == 4 and ("ZeRO-3" in name or name in ("TP 2 x DDP", "PP 2 x DDP")):
            yield name, "multi-query", "muon", settings
        if ranks == 2 and name in ("ZeRO-3", "TP 2"):
            yield name, "multi-query", "even muon", settings
        if "TP 4" not in name:
            yield name, "talks", "adamw", settings
    if ranks < 8:
        yield "wrong scale", "GPT-2", "adamw", {}  # which must be seen
        yield "mean of means", "talks", "adamw", {}  # and this
    if ranks == 2:
        yield "DDP", "modern", "muon", {}
        yield "PP 2 1f1b", "modern talks", "adamw", dict(pp_size=2)
        yield "ZeRO-3, selective", "talks", "adamw", dict(zero_stage=3, activation_checkpointing="selective")
        for kind in ("selective", "full"):
            yield f"ZeRO-3, {kind}", "modern", "adamw", dict(zero_stage=3, activation_checkpointing=kind)
        yield "TP 2, selective", "grouped", "adamw", dict(tp_size=2, activation_checkpointing="selective")


class Numbers(Tokens):
    """A split of `n` tokens with some order in it, and no file."""

    def __init__(self, n):
        self.folder, self.split = "numbers", "train"
        self.ids = (np.cumsum(np.random.default_rng(0).integers(0, 3, n)) % SIZES["vocab_size"]).astype(np.uint16)

    def __len__(self):
        return len(self.ids)

    def read(self, starts, length):
        return np.stack([self.ids[start : start + length] for start in starts])


class Talks(Loader):
    """Batches as those of conversations: documents in each row, and tokens that are not learned. The number of targets
    differs a lot between rows, and some rows have none."""

    def batches(self, micro_steps):
        batches = zip(super().batches(micro_steps), micro_steps, strict=True)
        return [batch._replace(y=learned(*batch[:2]), docs=documents(batch.x), divisor=self.divisor(step))
                for batch, (step, _) in batches]

    def find_divisor(self, step):
        """Targets of an update, divided by its micro-batches."""
        micro_batches = self.accumulation * self.world
        rows = micro_batches * self.batch_size
        starts = self.starts(np.arange(step * rows, (step + 1) * rows))
        batch = read_batch(self.tokens, starts, self.block_size)
        return (learned(batch.x, batch.y) != -1).sum().float() / micro_batches


class MeanOfMeans(Talks):
    """The mistake: each micro-batch divides by the number of its own targets."""

    def find_divisor(self, step):
        return None


def documents(x):
    """A document begins at each token that 5 divides."""
    return (x % 5 == 0).long().cumsum(1)


def learned(x, y):
    """Targets: the tokens of every other document, in every third row all tokens, and in some rows none."""
    kind = x[:, :1] % 3
    wanted = (kind == 0) | (kind == 1) & (documents(x) % 2 == 1)
    return torch.where(wanted, y, -1)


@contextmanager
def alone():
    """As if this were the only process."""
    ranks = os.environ.pop("WORLD_SIZE")
    try:
        yield
    finally:
        os.environ["WORLD_SIZE"] = ranks


def train(layout, name, optimizer, layers, scale=1.0, batches=None):
    """Ten steps as train.py does them, with a model of that name, and an optimizer, "even muon" being Muon with
    even_rows. -> what is compared: names -> tensors, or numbers"""
    torch.manual_seed(1)
    changes = (MODELS | TALKS)[name]
    model = GPT(GPTConfig(**SIZES, **changes, n_layer=layers))
    with torch.no_grad():
        for p in model.parameters():  # so that biases are not 0, gains not 1, and logits do differ
            p.add_(torch.randn_like(p) * 0.05)
    layout.check(model.config)
    accumulation = layout.share_micro_batches(MICRO_BATCHES)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = layout.place(model)
    opt = Optimizers(model, optimizer=optimizer.removeprefix("even "), muon_even_rows=optimizer.startswith("even "),
                     learning_rate=1e-3, weight_decay=0.1, **layout.optimizer_options())
    placed = layout.gather_weights()
    same = layout.rank > 0 or all_equal(placed, start)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)  # and nobody unscales
    batches = batches or (Talks if name in TALKS else Loader)
    loader = batches(Numbers(3000), T, ROWS, accumulation=accumulation, seed=1, rank=layout.dp_rank, world=layout.dp)
    losses, norms = [], []
    for step in range(STEPS):
        means = []
        for micro in range(layout.passes):
            means.append(layout.forward_backward(layout.next_batch(loader), micro, scaler))
        layout.reduce_gradients()
        if step == 0:
            # copies: clipping changes gradients in place
            grads = layout.gather_tensors({name: p.grad.clone() for name, p in model.named_parameters()})
        norms.append(layout.grad_norm())
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.3, norms[-1])
        opt.step()
        held = held_bytes(model, opt)
        opt.zero_grad()
        losses.append(torch.stack(means).mean())
    loader.close()
    val = evaluate(model, Numbers(500), T, 4, rank=layout.dp_rank, ranks=layout.dp, collect=layout.gather_objects)
    layout.free_gathered()
    state = layout.gather(opt)[1].state_dict()
    weights = layout.gather_weights()
    return {"same start": same, "scattered": comes_back(layout, opt, state), "held": sum(held.values()),
            "losses": layout.mean(torch.stack(losses)), "norms": torch.stack(norms), "grads": grads,
            "state": vectors(weights, state) if layout.rank == 0 else {}, "val": torch.tensor(val["loss"])}


def all_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def comes_back(layout, opt, state):
    """Whether loading the optimizer's gathered `state` gives back, on every rank, the state it has."""
    before = map_state(opt.state_dict(), lambda name, tensor: local(tensor))
    opt.load_state_dict(layout.shard_state(layout.on_rank0(lambda: state)))
    after = map_state(opt.state_dict(), lambda name, tensor: local(tensor))
    equal = before.keys() == after.keys()
    for kind, by_name in before.items():
        for name, values in by_name.items():
            equal &= all_equal(values, after[kind][name])
    return not layout.agree(int(not equal))[0]


def vectors(weights, state):
    """The weights and each kind of moment, each as one vector. By tensor they would differ: where a gradient is 0 up to
    rounding, as that of a key's bias, AdamW's step is as large as for any other."""
    tensors = {"weights": weights}  # kind -> name -> tensor
    for by_name in state.values():
        for name, values in by_name.items():
            for key, tensor in values.items():
                tensors.setdefault(key, {})[name] = tensor
    del tensors["step"]
    return {kind: torch.cat([named[name].flatten() for name in sorted(named)]) for kind, named in tensors.items()}


def apart(a, b):
    """The largest relative difference: of tensors by their norms, of numbers one by one."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)
    return float(((a - b).abs() / b.abs()).max())


def main():
    torch.set_num_threads(1)
    references, rows = {}, []
    for name, model, optimizer, settings in cases(world()):
        clock = time.perf_counter()
        layout = Layout(**settings)
        case = model, optimizer, 4 if layout.pp > 1 else 2
        if layout.rank == 0 and str(case) not in references:
            with alone():
                references[str(case)] = train(Layout(), *case)
        mistake = {"wrong scale": dict(scale=1.5), "mean of means": dict(batches=MeanOfMeans)}.get(name, {})
        found = train(layout, *case, **mistake)
        if layout.rank:
            continue
        reference = references[str(case)]
        assert min(reference["norms"]) > 0.3, "clipping is active"
        row = {"layout": name, "model": model, "optimizer": optimizer, "same start": found["same start"],
               "scattered": found["scattered"],
               "held": found["held"] / reference["held"]}  # of weights, gradients and moments after a step
        figures = {key: apart(found[key], reference[key]) for key in ("grads", "losses", "norms", "state", "val")}
        rows.append(row | figures)
        text = "  ".join(f"{key} {figure:.1e}" for key, figure in figures.items()) + f"  held {row['held']:.2f}"
        print(f"{name:<24} {model:<12} {optimizer:<6} {text}  {time.perf_counter() - clock:.1f} s", flush=True)
    if rows:
        result = {"ranks": world(), "torch": torch.__version__, "machine": machine(), "rows": rows}
        print(json.dumps({"benchmark": "layouts", **result}))


if __name__ == "__main__":
    with all_fail_together():
        main()
