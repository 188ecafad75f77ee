"""
What training takes: memory part by part and time per step, on one device or many, before anything is allocated.

    python plan.py config/owt_124m.py --gpu=h100 --gpus=8          # every sensible layout, best first
    python plan.py --n_layer=32 --n_embd=4096 --n_head=32 --tokens_per_step=4194304 --gpus=64
    python plan.py scaling                                         # the table of docs/scaling.md

It takes train.py's keys besides its own; what a step takes stays as they say, but the plan picks the micro-batch.

Where the formulas are from:
- activations, what recomputing them saves: Korthikanti et al. 2022, arXiv:2205.05198
- what the ZeRO stages share out, and send: Rajbhandari et al. 2020, arXiv:1910.02054
- tensor parallelism's all-reduces: Shoeybi et al. 2019, arXiv:1909.08053
- the pipeline's bubble, (stages - 1) / micro-batches: Narayanan et al. 2021, arXiv:2104.04473
- what hides behind what: the Ultra-Scale Playbook, https://huggingface.co/spaces/nanotron/ultrascale-playbook
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import configure, fail
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
what = "layouts"              # layouts | scaling (models from 124M to 70B on 1 to 4,096 GPUs)
gpu = "h100"                  # a100-40 | a100 | h100 | h200 | b200 | l40s | rtx4090
gpus = 8                      # in all
efficiency = 0.5              # share of the peak FLOP/s that computing reaches (Korthikanti et al.: up to 0.56)
reserve = 0.1                 # share of the memory left to CUDA, NCCL and fragmentation
rows = 12                     # layouts shown; 0: all
# -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent


class GPU(NamedTuple):
    memory: float     # bytes
    flops: float      # dense bf16 per second
    bandwidth: float  # bytes/s of its memory
    link: float       # bytes/s to the others in its machine, one way
    network: float    # bytes/s to other machines, its share of the adapters, one way
    source: str
    machine: int = 8  # GPUs in one


# Each figure is the data sheet's that `source` names, dense where it also gives a sparse one, and one way where it adds
# both up: NVLink's 600, 900 and 1,800 GB/s, PCIe 4.0 x16's 64. Of a DGX each GPU has one adapter, of 200 Gb/s (A100) or
# 400. A B200's driver reports a narrower bus, 7.67 TB/s (https://github.com/pytorch/ao/pull/4002). A GeForce's driver
# allows no direct copies between GPUs: they go through the host's memory, and are slower than what is here.
GPUS = {
    "a100-40": GPU(40e9, 312e12, 1555e9, 300e9, 25e9, "NVIDIA A100 (SXM) and DGX A100 data sheets"),
    "a100": GPU(80e9, 312e12, 2039e9, 300e9, 25e9, "NVIDIA A100 (SXM) and DGX A100 data sheets"),
    "h100": GPU(80e9, 989e12, 3350e9, 450e9, 50e9, "NVIDIA H100 (SXM) and DGX H100 data sheets"),
    "h200": GPU(141e9, 989e12, 4800e9, 450e9, 50e9, "NVIDIA H200 and DGX H200 data sheets"),
    "b200": GPU(180e9, 2250e12, 8000e9, 900e9, 50e9, "NVIDIA DGX B200 data sheet"),
    "l40s": GPU(48e9, 362e12, 864e9, 32e9, 12.5e9, "NVIDIA L40S data sheet (PCIe 4.0 x16); 100 Gb/s a GPU assumed"),
    "rtx4090": GPU(24e9, 165e12, 1008e9, 32e9, 1.25e9, "NVIDIA Ada white paper, PCIe 4.0 x16; 10 Gb/s a GPU assumed"),
}


class Layout(NamedTuple):
    data: int = 1
    zero: int = 0  # 0: DDP
    tensor: int = 1
    pipeline: int = 1  # stages, in 1F1B
    recompute: str = "none"


# -----------------------------------------------------------------------------
# Memory


def block_activations(c, T, small, cuda):
    """Bytes per token that a block keeps for its backward pass: (norms' inputs, their outputs, the insides, dropout).

    Insides are attention's and the MLP's. All else is whole on every tensor-parallel rank, as there is no sequence
    parallelism (Korthikanti et al., section 4.2.1). `small` is the size of a matmul's input; the residual stream and
    the norms stay in fp32.
    """
    width, kv = c.n_embd, c.kv_heads * c.head_dim
    mask = (1 if cuda else small) if c.dropout else 0  # bytes of one dropout decision
    qk_copies = (c.qk_norm != "none" or c.pos == "rope") + (c.qk_norm == "rms_gain")  # besides those in qkv
    attention = (width + 2 * kv + qk_copies * (width + kv) + width) * small  # and the output
    half_on_cpu = c.attn == "auto" and small == 2 and not cuda  # where model.attend spells it out
    if c.attn == "math" or half_on_cpu or (c.dropout and not cuda):
        kept = mask + small if c.dropout else 0  # the mask and what was not dropped
        attention += c.n_head * T * ((4 if cuda else small) + kept)
    mlp = c.mlp_dim * small * (4 if c.activation == "swiglu" else 2)
    return 2 * 4 * width, 2 * small * width, attention + mlp, 2 * mask * width


class Costs(NamedTuple):
    """What a model costs, counted once."""
    config: GPTConfig
    weights: int        # bytes of all parameters
    block: int          # bytes of one block's
    table: int          # bytes of the embedding table
    matrices: int       # elements of the linear layers' weights
    layer_flops: float  # of one block forward, per token of a sequence of block_size
    head_flops: float   # of the head


def costs_of(model):
    c = model.config
    block, table = (
        sum(p.numel() * p.element_size() for p in part.parameters())
        for part in (model.transformer.h[0], model.transformer.wte)
    )
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    body = model.forward_flops((c.block_size + 1) / 2, head=False)
    return Costs(c, model.param_bytes(), block, table, matrices, body / c.n_layer, 2 * c.n_embd * c.padded_vocab_size)


def step_memory(costs, batch_size, dtype=torch.float32, T=0, layout=Layout(), micro_steps=1, cuda=True):  # noqa: B008
    """Bytes per device of a training step on `batch_size` sequences of T tokens (0: block_size), by part.

    Weights, gradients and optimizer state are counted from the parameters (AdamW keeps two moments; Muon's one makes
    that an upper bound); gradients are there throughout, as they are from the second micro-step of an update on. Casts
    are the matrices in `dtype`, which autocast keeps for the backward pass; with ZeRO, the weights gathered in it, all
    of them, or in stage 3 two blocks and the ends. Activations are what autograd keeps; on a pipeline's first stage,
    of as many micro-batches as there are stages (the loss, which counts too, is on the last). Attention stores its
    weights with attn="math", and off the GPU with dropout or in half precision. The logits (the loss's peak) and the
    backward pass of the last block (what is computed again, and gradients on the way) are not there at once: the
    larger counts in the total.
    -> {"weights", "gradients", "optimizer", "casts", "activations", "logits", "backward", "total"}
    """
    c, (data, zero, tensor, pipeline, recompute) = costs.config, layout
    small = 4 if dtype == torch.float32 else 2
    tokens = batch_size * (T or c.block_size)
    layers = -(-c.n_layer // pipeline)
    block = costs.block / tensor
    ends = costs.weights - c.n_layer * costs.block
    if pipeline > 1 and not c.tie_weights:
        ends -= costs.table  # the head is on the last stage
    weights = layers * block + ends / tensor
    shards = data if zero else 1

    parts = {"weights": weights / shards, "gradients": weights, "optimizer": 2 * weights / shards}
    if zero >= 2:
        parts["gradients"] = weights / shards + max(block, ends / tensor)
    if zero:
        parts["casts"] = small / 4 * (weights if zero < 3 else 2 * block + ends / tensor)
    else:
        parts["casts"] = 0 if dtype == torch.float32 else small * costs.matrices / tensor * layers / c.n_layer

    inputs, outputs, insides, dropped = block_activations(c, T or c.block_size, small, cuda)
    block_bytes = inputs + outputs + insides / tensor + dropped
    kept = {
        "none": block_bytes,
        "selective": inputs + 2 * 4 * c.n_embd,  # and the norms' outputs, before they are cast
        "full": inputs / 2,
    }[recompute]
    around = dropped / 2 + (4 * c.norm_embed + 4 + small) * c.n_embd  # after the embedding; ln_f's input and output
    parts["activations"] = tokens * (min(pipeline, micro_steps) * layers * kept + around)

    rows_at_once = max(1, 2**25 // c.vocab_size)  # in model.loss
    held = costs.table / tensor  # the head's gradient, until that of the next rows or of the embedding joins it
    parts["logits"] = 3 * 4 * min(tokens, rows_at_once) * c.vocab_size + held * (tokens > rows_at_once)
    hidden = 2 * small * tokens * c.mlp_dim / tensor
    parts["backward"] = tokens * (block_bytes - min(kept, block_bytes)) + hidden + 4 * c.mlp_dim * c.n_embd / tensor
    parts["backward"] += held * c.tie_weights
    total = sum(parts.values()) - min(parts["logits"], parts["backward"])
    return {name: int(size) for name, size in {**parts, "total": total}.items()}


# -----------------------------------------------------------------------------
# Time


def ring(size, ranks, bandwidth):
    """Seconds to reduce-scatter, or all-gather, `size` bytes over a ring: each rank sends (n - 1) / n of them."""
    return size * (ranks - 1) / ranks / bandwidth


def step_time(costs, batch_size, micro_steps, layout, card):
    """Seconds of an update of `micro_steps` micro-batches.

    Ranks lie as parallel.py has them: those of a tensor-parallel group next to each other, then those of a
    data-parallel one. Exposed is the communication that computing does not hide: all of tensor parallelism's and the
    pipeline's; of data parallelism's what outlasts the passes that it runs beside. Latencies are not counted.
    -> {"compute", "bubble", "optimizer", "exposed", "total"}
    """
    data, zero, tensor, pipeline, recompute = layout
    c, tokens = costs.config, batch_size * costs.config.block_size
    layers = -(-c.n_layer // pipeline)
    weights = costs.weights / 4 * layers / c.n_layer / tensor  # as numbers; the ends ride along
    again = 1 if recompute != "none" else 0

    # one micro-batch through the slowest stage, which has the head
    speed = card.flops * efficiency * tensor
    forward = tokens * (layers * costs.layer_flops + costs.head_flops) / speed
    compute = forward * 3 + again * tokens * layers * costs.layer_flops / speed

    # two all-reduces forward and two backward in each layer, and the forward ones again where it is computed again
    reduced = 2 * ring(tokens * c.n_embd * 2, tensor, card.link) * (4 + 2 * again) * layers if tensor > 1 else 0
    hop = card.link if data * tensor * pipeline <= card.machine else card.network  # stages lie furthest apart
    sent = 2 * tokens * c.n_embd * 4 / hop if pipeline > 1 else 0
    slots = micro_steps + pipeline - 1

    # data parallelism: a ring through every machine uses the adapters of all its members there
    members = min(data, max(1, card.machine // tensor))
    bandwidth = card.link if members == data else min(card.link, members * card.network)
    gather, scatter = ring(2 * weights, data, bandwidth), ring(4 * weights, data, bandwidth)
    backward = compute - forward
    if zero == 3:  # weights for each pass, gradients after each
        exposed = micro_steps * (max(0, gather - forward) + max(0, gather + scatter - backward))
    elif zero == 2:
        exposed = micro_steps * max(0, scatter - backward) + max(0, gather - forward)
    elif zero == 1:
        exposed = max(0, scatter - backward) + max(0, gather - forward)
    else:
        exposed = max(0, 2 * scatter - backward)
    parts = {
        "compute": micro_steps * compute,
        "bubble": (pipeline - 1) * compute,
        "optimizer": 28 * weights / (data if zero else 1) / card.bandwidth,  # 3 read and written, gradients read
        "exposed": exposed + slots * (reduced + sent),
    }
    return {**parts, "total": sum(parts.values())}


# -----------------------------------------------------------------------------
# Layouts


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def grids(c, sequences, count, machine):
    """(data, tensor, pipeline) that use `count` GPUs and that train.py takes: heads, hidden units and machine divide by
    tensor, layers suffice for the stages, the batch divides over data and leaves a micro-batch for each stage."""
    for tensor in divisors(min(count, machine)):
        shared = c.kv_heads % tensor and tensor % c.kv_heads
        if c.n_head % tensor or c.mlp_dim % tensor or shared or count % tensor:
            continue
        for pipeline in divisors(count // tensor):
            data = count // tensor // pipeline
            if pipeline <= c.n_layer and sequences % data == 0 and sequences // data >= pipeline:
                yield data, tensor, pipeline


def plans(model, sequences, count, card):
    """Every layout of `count` GPUs, each with the quickest micro-batch that fits, of equals the largest, as it keeps a
    GPU busiest.
    -> (those that fit, best first; those that do not, smallest first): {"layout", "batch_size", "micro_steps",
    "memory", "time"} each, without "time" where it does not fit."""
    costs, limit = costs_of(model), card.memory * (1 - reserve)
    fit, too_large = [], []
    for data, tensor, pipeline in grids(model.config, sequences, count, card.machine):
        for zero in (0, 1, 2, 3) if data > 1 else (0,):
            for recompute in ("none", "selective", "full"):
                layout, found = Layout(data, zero, tensor, pipeline, recompute), []
                for batch_size in divisors(sequences // data):
                    micro_steps = sequences // data // batch_size
                    if micro_steps < pipeline:
                        break
                    memory = step_memory(costs, batch_size, torch.bfloat16, 0, layout, micro_steps)
                    row = {"layout": layout, "batch_size": batch_size, "micro_steps": micro_steps, "memory": memory}
                    if memory["total"] > limit:
                        if not found:
                            too_large.append(row)
                        break
                    found.append({**row, "time": step_time(costs, batch_size, micro_steps, layout, card)})
                if found:
                    fit.append(min(found, key=lambda row: (rank(row)[0], -row["batch_size"])))
    return sorted(fit, key=rank), sorted(too_large, key=lambda row: row["memory"]["total"])


def rank(row):
    """Time to three digits, then the simplest, then the smallest."""
    layout = row["layout"]
    return (float(f"{row['time']['total']:.2e}"), layout.pipeline, layout.tensor, layout.zero,
            row["memory"]["total"])


def named(layout):
    words = [f"data {layout.data}" + (f" zero {layout.zero}" if layout.zero else "")] * (layout.data > 1)
    words += [f"tensor {layout.tensor}"] * (layout.tensor > 1) + [f"pipeline {layout.pipeline}"] * (layout.pipeline > 1)
    words += [f"recompute {layout.recompute}"] * (layout.recompute != "none")
    return ", ".join(words) or "one GPU"


def throughput(model, sequences, row, count, card):
    """(tokens/s over all GPUs, MFU)."""
    speed = sequences * model.config.block_size / row["time"]["total"]
    return speed, speed * model.train_flops(model.config.block_size) / card.flops / count


# -----------------------------------------------------------------------------
# Tables


PARTS = ("weights", "gradients", "optimizer", "casts", "activations", "logits", "backward", "total")
TIMES = ("compute", "bubble", "optimizer", "exposed", "total")


def show_layouts(model, sequences, count, card):
    c = model.config
    fit, too_large = plans(model, sequences, count, card)
    print(f"{model.num_params() / 1e6:,.0f}M parameters, {sequences} sequences of {c.block_size} tokens a step, "
          f"{count} x {gpu} ({card.source})")
    kv = model.kv_cache_bytes(c.block_size, torch.bfloat16)
    print(f"GB per GPU, at most {card.memory * (1 - reserve) / 1e9:.1f}; ms per step. Training keeps no KV cache; "
          f"generating takes {kv / 1e9:.3g} GB for {c.block_size} tokens in bfloat16\n")
    heads = [f"{head:>{max(7, len(head))}}" for head in (*PARTS, *(f"{name} ms" for name in TIMES), "MFU")]
    print(f"{'layout':<44} {'batch':>9}", *heads)
    for row in fit[: rows or None]:
        cells = [f"{row['memory'][part] / 1e9:.2f}" for part in PARTS]
        cells += [f"{1000 * row['time'][part]:.1f}" for part in TIMES]
        cells += [f"{throughput(model, sequences, row, count, card)[1]:.1%}"]
        batch = f"{row['batch_size']}x{row['micro_steps']}"
        print(f"{named(row['layout']):<44} {batch:>9}",
              *(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True)))
    print(f"\n{len(fit)} layouts fit, {len(too_large)} do not"
          + (f", the nearest being {named(too_large[0]['layout'])}: {too_large[0]['memory']['total'] / 1e9:.1f} GB"
             if too_large else ""))
    if not fit and not too_large:
        print(f"{sequences} sequences cannot be shared out over {count} GPUs: the data-parallel size must divide them, "
              "and a pipeline needs as many micro-batches as it has stages")
    return [{**row, "layout": row["layout"]._asdict()} for row in fit[: rows or None]]


GPT2 = dict(bias=False, block_size=1024)
LLAMA = dict(vocab_size=32000, block_size=4096, bias=False, pos="rope", norm="rmsnorm", activation="swiglu",
             tie_weights=False)
SHAPES = {  # name: (fields, tokens per step)
    "124M": (dict(n_layer=12, n_head=12, n_embd=768, **GPT2), 2**19),
    "355M": (dict(n_layer=24, n_head=16, n_embd=1024, **GPT2), 2**19),
    "774M": (dict(n_layer=36, n_head=20, n_embd=1280, **GPT2), 2**19),
    "1.6B": (dict(n_layer=48, n_head=25, n_embd=1600, **GPT2), 2**20),
    "7B": (dict(n_layer=32, n_head=32, n_embd=4096, **LLAMA), 2**22),
    "13B": (dict(n_layer=40, n_head=40, n_embd=5120, **LLAMA), 2**22),
    "70B": (dict(n_layer=100, n_head=64, n_kv_head=8, n_embd=8192, **LLAMA), 2**24),
}


def model_fields(config):
    """The fields of GPTConfig among train.py's settings. Raises ValueError for a field that has no key there."""
    for field in fields(GPTConfig):
        if field.name not in config:
            raise ValueError("GPTConfig has a field that train.py has no key for: add to the model's keys in train.py "
                             f"the line `{field.name} = {field.default!r}`, with a comment on what it is")
    return {field.name: config[field.name] for field in fields(GPTConfig)}


def meta_model(sizes):
    with torch.device("meta"):
        return GPT(GPTConfig(**sizes))


def scaling_table():
    """The best layout of each shape by number of H100s, as Markdown."""
    card = GPUS["h100"]
    lines = ["| model | GPUs | layout | micro-batch | GB per GPU | step | exposed | tokens/s | MFU |", "|" + "---|" * 9]
    for name, (sizes, tokens) in SHAPES.items():
        model = meta_model(sizes)
        sequences = tokens // model.config.block_size
        for count in (1, 8, 64, 512, 4096):
            fit, too_large = plans(model, sequences, count, card)
            if not fit:
                why = (f"does not fit: {too_large[0]['memory']['total'] / 1e9:,.0f} GB at the least" if too_large
                       else f"{sequences} sequences are too few")
                lines.append(f"| {name} | {count:,} | {why} | | | | | | |")
                continue
            best = fit[0]
            speed, mfu = throughput(model, sequences, best, count, card)
            seconds = best["time"]["total"]
            lines.append(
                f"| {name} | {count:,} | {named(best['layout'])} | {best['batch_size']} x {best['micro_steps']} | "
                f"{best['memory']['total'] / 1e9:.1f} | {seconds:.3g} s | {best['time']['exposed'] / seconds:.0%} | "
                f"{speed:,.0f} | {mfu:.0%} |")
    return "\n".join(lines)


def main(config):
    if what == "scaling":
        print(scaling_table())
        return
    if gpu not in GPUS:
        fail(f"gpu={gpu!r} is none of {', '.join(GPUS)}")
    if config["dtype"] == "float32":
        fail("the speeds known here are bfloat16's: leave dtype at auto")
    try:
        sizes = model_fields(config)
    except ValueError as e:
        fail(e)
    try:
        model = meta_model({**sizes, "vocab_size": sizes["vocab_size"] or GPTConfig.vocab_size})
    except ValueError as e:
        fail(e)
    if config["tokens_per_step"] % config["block_size"]:
        fail(f"tokens_per_step={config['tokens_per_step']} is not a multiple of block_size={config['block_size']}")
    steps = config["gradient_accumulation_steps"] or 1
    sequences = config["tokens_per_step"] // config["block_size"] or config["batch_size"] * steps
    if not sequences:
        fail("batch_size=0: say how many tokens an update has, for example --tokens_per_step=491520")
    found = show_layouts(model, sequences, gpus, GPUS[gpu])
    print(json.dumps({"gpu": gpu, "gpus": gpus, "sequences": sequences, "layouts": found}))


if __name__ == "__main__":
    main(configure(globals(), verb="what", verbs=("layouts", "scaling"), also=ROOT / "train.py"))
