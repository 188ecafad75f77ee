"""
What training takes: memory part by part and time per step, on one device or many, before anything is allocated.

    python plan.py config/owt_124m.py --gpu=h100 --gpus=8          # every sensible layout, best first
    python plan.py --n_layer=32 --n_embd=4096 --n_head=32 --tokens_per_step=4194304 --gpus=64
    python plan.py scaling                                         # the table of docs/scaling.md

It takes train.py's keys besides its own; what a step takes stays as they say, but the plan picks the micro-batch.
Times and MFU are counted from the model's shape. Nothing here was measured on a GPU.

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
from cross_entropy import rows_at_once
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
what = "layouts"              # layouts | scaling (models from 124M to 70B on 1 to 4,096 GPUs)
gpu = "h100"                  # a100-40 | a100 | h100 | h200 | b200 | l40s | rtx4090
gpus = 8                      # in all
efficiency = 0.65             # share of the peak FLOP/s that large matrix products reach; assumed, not measured here
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


# Each figure is from the data sheet that `source` names: dense, and one way where it adds up both, as for NVLink (600,
# 900 and 1,800 GB/s) and PCIe 4.0 x16 (64). In a DGX each GPU has one adapter, of 200 Gb/s (A100) or 400. A B200's
# driver reports a narrower bus, 7.67 TB/s (https://github.com/pytorch/ao/pull/4002). A GeForce's driver allows no
# direct copies between GPUs: they go through the host's memory, and are slower than what is here.
GPUS = {
    "a100-40": GPU(40e9, 312e12, 1555e9, 300e9, 25e9, "NVIDIA A100 (SXM) and DGX A100 data sheets"),
    "a100": GPU(80e9, 312e12, 2039e9, 300e9, 25e9, "NVIDIA A100 (SXM) and DGX A100 data sheets"),
    "h100": GPU(80e9, 989e12, 3350e9, 450e9, 50e9, "NVIDIA H100 (SXM) and DGX H100 data sheets"),
    "h200": GPU(141e9, 989e12, 4800e9, 450e9, 50e9, "NVIDIA H200 and DGX H200 data sheets"),
    "b200": GPU(180e9, 2250e12, 8000e9, 900e9, 50e9, "NVIDIA DGX B200 data sheet"),
    "l40s": GPU(48e9, 362e12, 864e9, 32e9, 12.5e9, "NVIDIA L40S data sheet (PCIe 4.0 x16); 100 Gb/s a GPU assumed"),
    "rtx4090": GPU(24e9, 165e12, 1008e9, 32e9, 1.25e9, "NVIDIA Ada white paper, PCIe 4.0 x16; 10 Gb/s a GPU assumed"),
}


# Assumed shares of a card's peak, besides `efficiency`. Of matrix products the best shape that a search found reaches
# 0.80 on an H100 (https://github.com/stas00/ml-engineering, Maximum Achievable Matmul FLOPS). Attention by cuDNN on an
# H100, in the figures of FlashAttention-3 (arXiv:2407.08608): with heads of 64 and 1,024 tokens 288 TFLOP/s forward and
# 348 backward, with heads of 128 and 4,096 tokens about 500. Bandwidth: github.com/calculon-ai/calculon, a100_80g.json.
HALF_WIDTH = 256       # a matrix product of this width reaches half of `efficiency`: our own assumption
SMALL_HEADS = 0.33     # of the peak FLOP/s, attention with heads smaller than 128
LARGE_HEADS = 0.5      # with larger ones
BANDWIDTH_SHARE = 0.9  # of the memory bandwidth


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
    the norms stay in fp32."""
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
    matrices: int       # elements of the matrices in all blocks
    attention: float    # FLOPs of all blocks' attention forward, per token of a sequence of block_size


def costs_of(model):
    c = model.config
    block = sum(p.nbytes for p in model.transformer.h[0].parameters())
    table = model.transformer.wte.weight.nbytes
    matrices = sum(m.weight.numel() for m in model.transformer.modules() if isinstance(m, torch.nn.Linear))
    attention = model.forward_flops((c.block_size + 1) / 2, head=False) - model.forward_flops(0, head=False)
    return Costs(c, model.param_bytes(), block, table, matrices, attention)


def first_stage(costs, layout):
    """Bytes of fp32 weights on a rank of the first stage: (blocks, which tensor parallelism shares out; the ends)."""
    ends = costs.weights - costs.config.n_layer * costs.block
    if layout.pipeline > 1 and not costs.config.tie_weights:
        ends -= costs.table  # the head is on the last stage
    return -(-costs.config.n_layer // layout.pipeline) * costs.block / layout.tensor, ends


def loss_memory(costs, tokens, small, cuda, copied):
    """Bytes at the peak of cross_entropy.py: its input, the table's gradient, the table `copied` to half precision, and
    a piece of the logits with either what the softmax takes or the table's gradient from that piece."""
    pieces = -(-tokens // rows_at_once(costs.config.padded_vocab_size, "cuda" if cuda else "cpu"))
    piece = -(-tokens // pieces) * costs.config.padded_vocab_size  # a soft-cap: half the rows, twice their bytes
    half = costs.table / 2 if small == 2 else 0                    # bytes of the table in half precision
    softmax = 4 if small == 2 and not cuda else 0                  # bytes a logit: in fp32; compiled, none
    peak = piece * small + max(piece * softmax, half)
    return 4 * tokens * costs.config.n_embd + costs.table + half * copied + peak


def step_memory(costs, batch_size, dtype=torch.float32, T=0, layout=Layout(), micro_steps=1, cuda=True):  # noqa: B008
    """Bytes per device of a training step on `batch_size` sequences of T tokens (0: block_size), by part.

    Weights, gradients and optimizer state are counted from the parameters. AdamW keeps two moments; Muon's one makes
    that an upper bound. Gradients are there throughout. Casts are the blocks' matrices in `dtype`, which autocast keeps
    for the backward pass; with ZeRO, the weights gathered in it, in stage 3 those of two blocks and the ends.
    Activations are what autograd keeps; on a pipeline's first stage, of as many micro-batches as there are stages (the
    loss, which counts too, is on the last). Attention stores its weights with attn="math", and off the GPU with dropout
    or in half precision. The larger of the loss's peak (logits) and the last block's backward pass is in the total.
    -> {"weights", "gradients", "optimizer", "casts", "activations", "logits", "backward", "total"}
    """
    c, (data, zero, tensor, pipeline, recompute) = costs.config, layout
    layers = -(-c.n_layer // pipeline)
    small = 4 if dtype == torch.float32 else 2
    tokens = batch_size * (T or c.block_size)
    block, (blocks, ends) = costs.block / tensor, first_stage(costs, layout)
    weights = blocks + ends
    shards = data if zero else 1
    parts = {"weights": weights / shards, "gradients": weights, "optimizer": 2 * weights / shards}
    if zero >= 2:
        parts["gradients"] = weights / shards + max(block, ends)
    if zero:
        parts["casts"] = small / 4 * (weights if zero < 3 else 2 * block + ends)
    else:
        parts["casts"] = 0 if dtype == torch.float32 else small * costs.matrices / tensor * layers / c.n_layer
    inputs, outputs, insides, dropped = block_activations(c, T or c.block_size, small, cuda)
    block_bytes = inputs + outputs + insides / tensor + dropped
    kept = {
        "none": block_bytes,
        "selective": inputs + 2 * 4 * c.n_embd,  # and the norms' outputs, before they are cast
        "full": inputs / 2,
    }[recompute]
    around = dropped / 2 + (4 * c.norm_embed + 4 + 4) * c.n_embd  # embedding; ln_f's input, its output's gradient
    parts["activations"] = tokens * (min(pipeline, micro_steps) * layers * kept + around)
    parts["logits"] = loss_memory(costs, tokens, small, cuda, copied=not zero)  # ZeRO gathers the table in `dtype`
    hidden = 2 * small * tokens * c.mlp_dim / tensor
    parts["backward"] = tokens * (block_bytes - min(kept, block_bytes)) + hidden + 4 * c.mlp_dim * c.n_embd / tensor
    parts["backward"] += costs.table * c.tie_weights  # the head's gradient, until that of the embedding joins it
    total = sum(parts.values()) - min(parts["logits"], parts["backward"])
    return {name: int(size) for name, size in {**parts, "total": total}.items()}


# -----------------------------------------------------------------------------
# Time


def ring(size, ranks, bandwidth):
    """Seconds to reduce-scatter, or all-gather, `size` bytes over a ring: each rank sends (n - 1) / n of them."""
    return size * (ranks - 1) / ranks / bandwidth


def block_traffic(c, tensor):
    """Bytes per token that a block's memory-bound operations read and write: (forward, backward). The residual stream
    is in fp32, all else in bf16, as autocast has it. torch.compile makes one kernel of adding a branch to the stream,
    the norm and the cast. Matrix products' own bytes are in their share of the peak; dropout is not counted."""
    stream, branch, q = 4 * c.n_embd, 2 * c.n_embd, 2 * c.n_embd / tensor
    kv, hidden = 4 * c.kv_heads * c.head_dim / tensor, 2 * c.mlp_dim / tensor
    gated = c.activation == "swiglu"
    rotate = 2 * (q + kv / 2) if c.pos == "rope" or c.qk_norm != "none" else 0  # queries and keys, in and out
    forward = 2 * (2 * stream + 2 * branch)   # two norms: stream and branch in, stream and the norm's output out
    forward += 2 * q + kv + rotate            # attention: q, k and v in, y out
    forward += hidden * (3 if gated else 2)   # the activation
    backward = 2 * (3 * stream + 2 * branch)  # two norms: their input and both gradients in, the sum and its cast out
    if c.norm != "rmsnorm_nogain":
        backward += 2 * (stream + branch)     # the gains' gradients: their own pass over input and gradient
    backward += 4 * q + 2 * kv + rotate       # attention: q, k, v, y and y's gradient in, three gradients out
    backward += 2 * (q + kv)                  # these joined into the gradient of c_attn's output
    backward += hidden * (5 if gated else 3)
    if c.bias:                                # a pass over the gradient of each matrix's output
        backward += q + kv + 2 * branch + hidden * (2 if gated else 1)
    return forward, backward


def compute_time(costs, tokens, layout, card):
    """Seconds of one micro-batch through the slowest stage, which has the head: (forward, backward). Matrix products
    and attention at their shares of the peak FLOP/s, then the bytes of the rest at its share of the bandwidth."""
    c, tensor, bandwidth = costs.config, layout.tensor, card.bandwidth * BANDWIDTH_SHARE
    layers = -(-c.n_layer // layout.pipeline)

    def products(elements, width):  # forward, by matrices of so many elements
        return 2 * tokens * elements / (card.flops * efficiency * width / (width + HALF_WIDTH))

    matrices = products(costs.matrices / c.n_layer * layers / tensor, c.n_embd / tensor)
    attention = tokens * costs.attention / c.n_layer * layers / tensor / card.flops
    attention /= SMALL_HEADS if c.head_dim < 128 else LARGE_HEADS
    moved_forward, moved_backward = (tokens * layers * moved / bandwidth for moved in block_traffic(c, tensor))
    blocks = matrices + attention + moved_forward
    backward = 2 * matrices + 2.5 * attention + moved_backward + (blocks if layout.recompute != "none" else 0)
    backward += 16 * sum(first_stage(costs, layout)) / 4 / bandwidth  # weights cast (4, 2), gradients added (2, 4, 4)
    # The loss makes its gradients in the forward pass, on every tensor-parallel rank all of them: three products. It
    # reads logits twice and writes their gradient; a piece's gradient of the table (2) is added to the sum (4, 4).
    vocab, pieces = c.padded_vocab_size, -(-tokens // rows_at_once(c.padded_vocab_size, "cuda", c.logit_softcap))
    moved = tokens * (3 * 2 * vocab + (28 + 16) * c.n_embd) + pieces * 10 * vocab * c.n_embd  # and ln_f, the embedding
    return blocks + 3 * products(vocab * c.n_embd, c.n_embd) + moved / bandwidth, backward


def step_time(costs, batch_size, micro_steps, layout, card):
    """Seconds of an update of `micro_steps` micro-batches, counted, not measured.

    Tensor-parallel ranks lie next to each other, then data-parallel ones, as in parallel.py. Exposed is communication
    that computing does not hide: all of tensor parallelism's and the pipeline's; of data parallelism's what outlasts
    the passes that it runs beside. Latencies are not counted.
    -> {"compute", "bubble", "optimizer", "exposed", "total"}
    """
    data, zero, tensor, pipeline, recompute = layout
    c, tokens = costs.config, batch_size * costs.config.block_size
    layers = -(-c.n_layer // pipeline)
    weights = sum(first_stage(costs, layout)) / 4  # as numbers
    forward, backward = compute_time(costs, tokens, layout, card)
    compute = forward + backward
    again = 1 if recompute != "none" else 0
    # two all-reduces forward and two backward in each layer, and the forward ones again where it is computed again
    reduced = 2 * ring(tokens * c.n_embd * 2, tensor, card.link) * (4 + 2 * again) * layers if tensor > 1 else 0
    hop = card.link if data * tensor * pipeline <= card.machine else card.network  # stages lie furthest apart
    sent = 2 * tokens * c.n_embd * 4 / hop if pipeline > 1 else 0
    # data parallelism: a ring through every machine uses the adapters of all its members there
    members = min(data, max(1, card.machine // tensor))
    ring_speed = card.link if members == data else min(card.link, members * card.network)
    gather, scatter = ring(2 * weights, data, ring_speed), ring(4 * weights, data, ring_speed)
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
        "optimizer": 28 * weights / (data if zero else 1) / (card.bandwidth * BANDWIDTH_SHARE),  # 7 fp32 in or out
        "exposed": exposed + (micro_steps + pipeline - 1) * (reduced + sent),
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
    """Every layout of `count` GPUs, each with the quickest micro-batch that fits, the largest of equally quick ones.
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
    return (float(f"{row['time']['total']:.2e}"), layout.pipeline, layout.tensor, layout.zero, row["memory"]["total"])


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
    print("Times and MFU are counted, from assumed shares of the GPU's peak: nothing was measured on a GPU")
    print(f"GB per GPU, at most {card.memory * (1 - reserve) / 1e9:.1f}; ms per step. Training keeps no KV cache; "
          f"generating takes {kv / 1e9:.3g} GB for {c.block_size} tokens in bfloat16\n")
    heads = [f"{head:>{max(7, len(head))}}" for head in (*PARTS, *(f"{name} ms" for name in TIMES), "MFU")]
    print(f"{'layout':<44} {'batch':>9}", *heads)
    for row in fit[: rows or None]:
        cells = [f"{row['memory'][part] / 1e9:.2f}" for part in PARTS]
        cells += [f"{1000 * row['time'][part]:.1f}" for part in TIMES]
        cells += [f"{throughput(model, sequences, row, count, card)[1]:.1%}"]
        print(f"{named(row['layout']):<44} {row['batch_size']:>4}x{row['micro_steps']:<4}",
              *(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True)))
    print(f"\n{len(fit)} layouts fit, {len(too_large)} do not"
          + (f", the nearest being {named(too_large[0]['layout'])}: {too_large[0]['memory']['total'] / 1e9:.1f} GB"
             if too_large else ""))
    if not fit and not too_large:
        print(f"{sequences} sequences cannot be shared out over {count} GPUs: data parallelism divides them evenly, a "
              "pipeline needs as many micro-batches as it has stages")
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
            best, seconds = fit[0], fit[0]["time"]["total"]
            speed, mfu = throughput(model, sequences, best, count, card)
            lines.append(f"| {name} | {count:,} | {named(best['layout'])} | {best['batch_size']} x "
                         f"{best['micro_steps']} | {best['memory']['total'] / 1e9:.1f} | {seconds:.3g} s | "
                         f"{best['time']['exposed'] / seconds:.0%} | {speed:,.0f} | {mfu:.0%} |")
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
        model = meta_model({**sizes, "vocab_size": sizes["vocab_size"] or GPTConfig.vocab_size})
    except ValueError as e:
        fail(e)
    if config["tokens_per_step"] % config["block_size"]:
        fail(f"tokens_per_step={config['tokens_per_step']} is not a multiple of block_size={config['block_size']}")
    accumulated = config["batch_size"] * (config["gradient_accumulation_steps"] or 1)
    sequences = config["tokens_per_step"] // config["block_size"] or accumulated
    if not sequences:
        fail("batch_size=0: say how many tokens an update has, for example --tokens_per_step=491520")
    found = show_layouts(model, sequences, gpus, GPUS[gpu])
    print(json.dumps({"gpu": gpu, "gpus": gpus, "sequences": sequences, "layouts": found}))


if __name__ == "__main__":
    main(configure(globals(), verb="what", verbs=("layouts", "scaling"), also=ROOT / "train.py"))
