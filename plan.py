"""
Memory and time of a training step on one GPU or many, counted from the model's shape before anything is allocated.

    python plan.py config/owt_124m.py --gpu=h100 --gpus=8          # every sensible layout, best first
    python plan.py --n_layer=32 --n_embd=4096 --n_head=32 --tokens_per_step=4194304 --gpus=64
    python plan.py scaling                                         # the table of docs/scaling.md

It takes the keys of train.py besides its own, and picks the micro-batch. Nothing here was measured on a GPU.
The two estimates are step_memory and step_time; `plans` compares layouts by them. Sources of the formulas:
- activations and recomputation: Korthikanti et al. 2022, arXiv:2205.05198
- what each ZeRO stage shards and sends: Rajbhandari et al. 2020, arXiv:1910.02054
- all-reduces of tensor parallelism: Shoeybi et al. 2019, arXiv:1909.08053
- the pipeline's bubble, (stages - 1) / micro-batches: Narayanan et al. 2021, arXiv:2104.04473
- overlap of communication: the Ultra-Scale Playbook, https://huggingface.co/spaces/nanotron/ultrascale-playbook
"""

import itertools
import json
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

import fused
from configurator import Settings, configure, fail
from cross_entropy import rows_at_once
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
what = "layouts"              # layouts | scaling (models from 124M to 70B on 1 to 4,096 GPUs)
gpu = "h100"                  # a100-40 | a100 | h100 | h200 | b200 | l40s | rtx4090
gpus = 8                      # number of GPUs
efficiency = 0.65             # share of the peak FLOP/s that large matrix products reach; assumed, not measured here
reserve = 0.1                 # share of the memory left to CUDA, NCCL and fragmentation
rows = 12                     # layouts shown; 0: all
# -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent


class GPU(NamedTuple):
    """A GPU, its machine, and the shares of its memory and speed that a run can use."""
    memory: float     # bytes
    flops: float      # dense bf16 per second
    bandwidth: float  # bytes/s of its memory
    link: float       # bytes/s to the other GPUs in its machine, one way
    network: float    # bytes/s to other machines, its share of the adapters, one way
    source: str       # of these figures
    machine: int = 8  # GPUs in one machine
    efficiency: float = efficiency
    reserve: float = reserve

    @property
    def usable(self):
        """Bytes of memory that a run can allocate."""
        return self.memory * (1 - self.reserve)


# Figures from the data sheet in `source`: dense, and one way if the sheet adds up both, as for NVLink (600, 900 and
# 1,800 GB/s) and PCIe 4.0 x16 (64). In a DGX each GPU has one adapter, of 200 Gb/s (A100) or 400. The driver of a B200
# reports a narrower bus, 7.67 TB/s (https://github.com/pytorch/ao/pull/4002). GeForce drivers allow no direct copies
# between GPUs: these pass through the host's memory, and are slower than the figure here.
GPUS = {
    "a100-40": GPU(40e9, 312e12, 1555e9, 300e9, 25e9, "NVIDIA A100 (SXM) and DGX A100 data sheets"),
    "a100": GPU(80e9, 312e12, 2039e9, 300e9, 25e9, "NVIDIA A100 (SXM) and DGX A100 data sheets"),
    "h100": GPU(80e9, 989e12, 3350e9, 450e9, 50e9, "NVIDIA H100 (SXM) and DGX H100 data sheets"),
    "h200": GPU(141e9, 989e12, 4800e9, 450e9, 50e9, "NVIDIA H200 and DGX H200 data sheets"),
    "b200": GPU(180e9, 2250e12, 8000e9, 900e9, 50e9, "NVIDIA DGX B200 data sheet"),
    "l40s": GPU(48e9, 362e12, 864e9, 32e9, 12.5e9, "NVIDIA L40S data sheet (PCIe 4.0 x16); 100 Gb/s a GPU assumed"),
    "rtx4090": GPU(24e9, 165e12, 1008e9, 32e9, 1.25e9, "NVIDIA Ada white paper, PCIe 4.0 x16; 10 Gb/s a GPU assumed"),
}

# Assumed shares of a GPU's peak, besides `efficiency`. The best matrix product that one search found on an H100 reaches
# 0.80 (https://github.com/stas00/ml-engineering, Maximum Achievable Matmul FLOPS). cuDNN's attention on an H100, from
# the figures of FlashAttention-3 (arXiv:2407.08608): with heads of 64 and 1,024 tokens 288 TFLOP/s forward and 348
# backward, with heads of 128 and 4,096 tokens about 500. Bandwidth: github.com/calculon-ai/calculon, a100_80g.json.
HALF_WIDTH = 256       # a matrix product of this width reaches half of `efficiency`: our own assumption
SMALL_HEADS = 0.33     # share of the peak FLOP/s that attention reaches with heads smaller than 128
LARGE_HEADS = 0.5      # with larger heads
BANDWIDTH_SHARE = 0.9  # share of the memory bandwidth


class Grid(NamedTuple):
    """How many ways each kind of parallelism divides a run, and which activations are recomputed."""
    data: int = 1
    zero: int = 0            # ZeRO stage; 0: DDP
    tensor: int = 1
    pipeline: int = 1        # stages, in 1F1B
    recompute: str = "none"  # none | selective | full


ONE_GPU = Grid()


# -----------------------------------------------------------------------------
# Memory


def block_activations(c, T, small, cuda):
    """Bytes per token that a block keeps for its backward pass: (inputs of the norms, outputs of the norms, inside of
    attention and MLP, dropout masks). Tensor parallelism divides only the inside (Korthikanti et al., section 4.2.1).

    `small` is the element size of a matmul's input; the residual stream and the norms stay in fp32.
    """
    width = c.n_embd
    kv = c.kv_heads * c.head_dim
    mask = 0
    if c.dropout:
        mask = 1 if cuda else small  # bytes of one dropout decision
    # copies of q and k besides those in qkv
    qk_copies = (c.qk_norm != "none" or c.pos == "rope") + (c.qk_norm == "rms_gain")
    attention = (width + 2 * kv + qk_copies * (width + kv) + width) * small  # and the output
    half_on_cpu = c.attn == "auto" and small == 2 and not cuda  # attention.attend picks plain matrix products
    if c.attn == "math" or half_on_cpu or (c.dropout and not cuda):
        after_dropout = mask + small if c.dropout else 0  # the mask and the surviving weights
        attention += c.n_head * T * ((4 if cuda else small) + after_dropout)
    mlp = c.mlp_dim * small * (4 if c.activation == "swiglu" else 2)
    return 2 * 4 * width, 2 * small * width, attention + mlp, 2 * mask * width


class Costs(NamedTuple):
    """Sizes and FLOPs of a model, counted once."""
    config: GPTConfig
    weights: int        # bytes of all parameters
    block: int          # bytes of the parameters of one block
    table: int          # bytes of the embedding table
    matrices: int       # elements of the matrices in all blocks
    attention: float    # FLOPs of attention in all blocks, forward, per token of a sequence of block_size


def costs_of(model):
    c = model.config
    block = sum(p.nbytes for p in model.transformer.h[0].parameters())
    table = model.transformer.wte.weight.nbytes
    linear = [m for m in model.transformer.modules() if isinstance(m, torch.nn.Linear)]
    matrices = sum(layer.weight.numel() for layer in linear)
    attention = model.forward_flops((c.block_size + 1) / 2, head=False)  # a query sees half of the keys on average
    attention -= model.forward_flops(0, head=False)
    return Costs(c, model.param_bytes(), block, table, matrices, attention)


def first_stage(costs, layout):
    """Bytes of fp32 weights on a rank of the first pipeline stage: (its part of the blocks, embedding and head)."""
    ends = costs.weights - costs.config.n_layer * costs.block
    if layout.pipeline > 1 and not costs.config.tie_weights:
        ends -= costs.table  # the head is on the last stage
    return -(-costs.config.n_layer // layout.pipeline) * costs.block / layout.tensor, ends


def loss_memory(costs, tokens, small, cuda, copied):
    """Bytes at the peak of cross_entropy.py: its input, the table's gradient, a piece of the logits with its softmax or
    its gradient of the table, and a copy of the table in half precision if it is `copied`."""
    vocab = costs.config.padded_vocab_size
    dtype = torch.bfloat16 if small == 2 else torch.float32
    pieces = -(-tokens // rows_at_once(vocab, "cuda" if cuda else "cpu", dtype=dtype))
    piece = -(-tokens // pieces) * vocab  # elements; a soft-cap halves the rows and doubles the bytes
    half = costs.table / 2 if small == 2 else 0  # bytes of the table in half precision
    in_place = cuda or fused.library() is not None
    softmax = 4 if small == 2 and not in_place else 0  # bytes per logit, in fp32; compiled it takes none
    peak = piece * small + max(piece * softmax, half) + (half if copied else 0)
    return 4 * tokens * costs.config.n_embd + costs.table + peak


def step_memory(costs, batch_size, dtype=torch.float32, T=0, layout=ONE_GPU, micro_steps=1, cuda=True):
    """Bytes per device of a training step on `batch_size` sequences of T tokens (0: block_size), by part.

    - optimizer: the two moments of AdamW; Muon keeps one, so this is an upper bound for it
    - casts: the matrices of the blocks in `dtype`, which autocast keeps for the backward pass; with ZeRO the gathered
      weights, which in stage 3 belong to two blocks and the ends (embedding and head)
    - activations: what autograd keeps on the first pipeline stage, for as many micro-batches as there are stages; a
      CPU's fused operations (fused.py) keep up to an eighth more
    - logits: the peak of the loss; backward: that of the last block. The total contains the larger of the two
    -> {"weights", "gradients", "optimizer", "casts", "activations", "logits", "backward", "total"}
    """
    c = costs.config
    data, zero, tensor, pipeline, recompute = layout
    layers = -(-c.n_layer // pipeline)
    small = 4 if dtype == torch.float32 else 2
    T = T or c.block_size
    tokens = batch_size * T
    block = costs.block / tensor
    blocks, ends = first_stage(costs, layout)
    weights = blocks + ends
    shards = data if zero else 1
    parts = {"weights": weights / shards, "gradients": weights, "optimizer": 2 * weights / shards}
    if zero >= 2:
        parts["gradients"] = weights / shards + max(block, ends)
    parts["casts"] = 0
    if zero:
        parts["casts"] = small / 4 * (weights if zero < 3 else 2 * block + ends)
    elif dtype != torch.float32:
        parts["casts"] = small * costs.matrices / tensor * layers / c.n_layer
    inputs, outputs, inside, dropped = block_activations(c, T, small, cuda)
    block_bytes = inputs + outputs + inside / tensor + dropped  # per token
    saved = {
        "none": block_bytes,
        "selective": inputs + 2 * 4 * c.n_embd,  # and the norms' outputs before the cast
        "full": inputs / 2,
    }[recompute]
    # around the blocks: the embedding, the input of ln_f, the gradient of its output
    around = dropped / 2 + (4 * c.norm_embed + 4 + 4) * c.n_embd
    parts["activations"] = tokens * (min(pipeline, micro_steps) * layers * saved + around)
    # ZeRO gathers the table in `dtype`, so nobody copies it
    parts["logits"] = loss_memory(costs, tokens, small, cuda, copied=not zero)
    recomputed = block_bytes - min(saved, block_bytes)
    hidden = 2 * small * tokens * c.mlp_dim / tensor
    parts["backward"] = tokens * recomputed + hidden + 4 * c.mlp_dim * c.n_embd / tensor
    if c.tie_weights:
        parts["backward"] += costs.table  # the head's gradient, until the embedding's is added to it
    total = sum(parts.values()) - min(parts["logits"], parts["backward"])
    return {name: int(size) for name, size in {**parts, "total": total}.items()}


# -----------------------------------------------------------------------------
# Time


def ring(size, ranks, bandwidth):
    """Seconds to reduce-scatter, or all-gather, `size` bytes over a ring: each rank sends (n - 1) / n of them."""
    return size * (ranks - 1) / ranks / bandwidth


def block_traffic(c, tensor):
    """Bytes per token that the memory-bound operations of a block read and write: (forward, backward).

    The residual stream is in fp32, all else in bf16. torch.compile fuses a branch's addition to the stream, the norm
    and the cast into one kernel. The share of the peak covers the bytes of matrix products. Dropout is not counted.
    """
    stream = 4 * c.n_embd
    branch = 2 * c.n_embd
    q = 2 * c.n_embd / tensor
    kv = 4 * c.kv_heads * c.head_dim / tensor
    hidden = 2 * c.mlp_dim / tensor
    gated = c.activation == "swiglu"
    rotate = 0
    if c.pos == "rope" or c.qk_norm != "none":
        rotate = 2 * (q + kv / 2)             # queries and keys, in and out
    forward = 2 * (2 * stream + 2 * branch)   # two norms: stream and branch in, stream and the norm's output out
    forward += 2 * q + kv + rotate            # attention: q, k and v in, y out
    forward += hidden * (3 if gated else 2)   # the activation
    backward = 2 * (3 * stream + 2 * branch)  # two norms: their input and both gradients in, the sum and its cast out
    if c.norm != "rmsnorm_nogain":
        backward += 2 * (stream + branch)     # gradients of the gains: another pass over input and gradient
    backward += 4 * q + 2 * kv + rotate       # attention: q, k, v, y and y's gradient in, three gradients out
    backward += 2 * (q + kv)                  # these joined into the gradient of c_attn's output
    backward += hidden * (5 if gated else 3)
    if c.bias:                                # a pass over the gradient of each matrix's output
        backward += q + kv + 2 * branch + hidden * (2 if gated else 1)
    return forward, backward


def compute_time(costs, tokens, layout, card):
    """Seconds of one micro-batch on the slowest stage, which has the head: (forward, backward)."""
    c = costs.config
    tensor = layout.tensor
    bandwidth = card.bandwidth * BANDWIDTH_SHARE
    layers = -(-c.n_layer // layout.pipeline)

    def products(elements, width):  # forward, by matrices with this many elements
        return 2 * tokens * elements / (card.flops * card.efficiency * width / (width + HALF_WIDTH))

    matrices = products(costs.matrices / c.n_layer * layers / tensor, c.n_embd / tensor)
    attention = tokens * costs.attention / c.n_layer * layers / tensor / card.flops
    attention /= SMALL_HEADS if c.head_dim < 128 else LARGE_HEADS
    traffic_forward, traffic_backward = block_traffic(c, tensor)
    # products and attention at their shares of the peak FLOP/s, all else at its share of the memory bandwidth
    blocks = matrices + attention + tokens * layers * traffic_forward / bandwidth
    backward = 2 * matrices + 2.5 * attention + tokens * layers * traffic_backward / bandwidth
    if layout.recompute != "none":
        backward += blocks
    # weights are cast (4, 2 bytes), gradients are added (2, 4, 4)
    backward += 16 * sum(first_stage(costs, layout)) / 4 / bandwidth

    # The loss computes its gradients in the forward pass: three products, complete on every tensor-parallel rank. It
    # reads logits twice and writes their gradient. Each piece adds its gradient of the table (2) to the sum (4, 4).
    vocab = c.padded_vocab_size
    pieces = -(-tokens // rows_at_once(vocab, "cuda", c.logit_softcap))
    moved = tokens * (3 * 2 * vocab + (28 + 16) * c.n_embd)  # bytes, with ln_f and the embedding
    moved += pieces * 10 * vocab * c.n_embd
    return blocks + 3 * products(vocab * c.n_embd, c.n_embd) + moved / bandwidth, backward


def exposed_gradients(costs, layout, card, micro_steps, forward, backward):
    """Seconds of data parallelism's communication in an update that computation does not hide."""
    data, zero = layout.data, layout.zero
    weights = sum(first_stage(costs, layout)) / 4  # parameters, not bytes
    # a ring through every machine uses the network adapters of all its members there
    members = min(data, max(1, card.machine // layout.tensor))
    speed = card.link if members == data else min(card.link, members * card.network)
    gather = ring(2 * weights, data, speed)
    scatter = ring(4 * weights, data, speed)
    if zero == 3:  # weights for each pass, gradients after each
        return micro_steps * (max(0, gather - forward) + max(0, gather + scatter - backward))
    if zero == 2:
        return micro_steps * max(0, scatter - backward) + max(0, gather - forward)
    if zero == 1:
        return max(0, scatter - backward) + max(0, gather - forward)
    return max(0, 2 * scatter - backward)


def step_time(costs, batch_size, micro_steps, layout, card):
    """Seconds of an update of `micro_steps` micro-batches -> {"compute", "bubble", "optimizer", "exposed", "total"}

    Exposed is communication that computation does not hide: all of tensor parallelism's and the pipeline's, and the
    part of data parallelism's that outlasts the passes beside it. Latencies are not counted.
    """
    data, zero, tensor, pipeline, recompute = layout
    c = costs.config
    tokens = batch_size * c.block_size
    layers = -(-c.n_layer // pipeline)
    weights = sum(first_stage(costs, layout)) / 4  # parameters, not bytes
    forward, backward = compute_time(costs, tokens, layout, card)
    compute = forward + backward

    reduced = 0  # seconds per micro-batch
    if tensor > 1:  # two all-reduces forward and two backward per layer, two more to recompute
        all_reduces = 4 if recompute == "none" else 6
        reduced = 2 * ring(tokens * c.n_embd * 2, tensor, card.link) * all_reduces * layers
    sent = 0  # seconds per micro-batch
    if pipeline > 1:  # its ranks are furthest apart, as in parallel.py
        hop = card.link if data * tensor * pipeline <= card.machine else card.network
        sent = 2 * tokens * c.n_embd * 4 / hop
    exposed = exposed_gradients(costs, layout, card, micro_steps, forward, backward)
    shards = data if zero else 1
    parts = {
        "compute": micro_steps * compute,
        "bubble": (pipeline - 1) * compute,
        "optimizer": 28 * weights / shards / (card.bandwidth * BANDWIDTH_SHARE),  # 7 fp32 in or out
        "exposed": exposed + (micro_steps + pipeline - 1) * (reduced + sent),
    }
    return {**parts, "total": sum(parts.values())}


# -----------------------------------------------------------------------------
# Layouts


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def layouts(c, sequences, count, machine):
    """Every grid of `count` GPUs that train.py accepts: tensor divides heads, hidden units and the GPUs of a machine,
    each stage has a layer, and the batch divides over data with a micro-batch for each stage."""
    for tensor in divisors(min(count, machine)):
        uneven_kv = c.kv_heads % tensor and tensor % c.kv_heads
        if c.n_head % tensor or c.mlp_dim % tensor or uneven_kv or count % tensor:
            continue
        for pipeline in divisors(count // tensor):
            data = count // tensor // pipeline
            if pipeline > c.n_layer or sequences % data or sequences // data < pipeline:
                continue
            zero_stages = (0, 1, 2, 3) if data > 1 else (0,)
            for zero, recompute in itertools.product(zero_stages, ("none", "selective", "full")):
                yield Grid(data, zero, tensor, pipeline, recompute)


def micro_batches(costs, sequences, layout, card):
    """The micro-batches of a layout. -> (rows that fit in memory, the smallest row if none fits else None)"""
    fit = []
    per_rank = sequences // layout.data
    for batch_size in divisors(per_rank):
        micro_steps = per_rank // batch_size
        if micro_steps < layout.pipeline:
            break
        memory = step_memory(costs, batch_size, torch.bfloat16, 0, layout, micro_steps)
        row = {"layout": layout, "batch_size": batch_size, "micro_steps": micro_steps, "memory": memory}
        if memory["total"] > card.usable:
            return fit, None if fit else row
        fit.append({**row, "time": step_time(costs, batch_size, micro_steps, layout, card)})
    return fit, None


def plans(model, sequences, count, card):
    """Every layout of `count` GPUs, each with its fastest micro-batch that fits; on a tie with the largest.
    -> (rows that fit, best first; rows that do not fit, smallest first). A row is {"layout", "batch_size",
    "micro_steps", "memory", "time"}, without "time" if it does not fit."""
    costs = costs_of(model)
    fit = []
    too_large = []
    for layout in layouts(model.config, sequences, count, card.machine):
        rows, smallest = micro_batches(costs, sequences, layout, card)
        if rows:
            fit.append(min(rows, key=lambda row: (rank(row)[0], -row["batch_size"])))
        elif smallest:
            too_large.append(smallest)
    return sorted(fit, key=rank), sorted(too_large, key=lambda row: row["memory"]["total"])


def rank(row):
    """Sort key of a row: time to three digits, then the simplest layout, then the least memory."""
    layout = row["layout"]
    seconds = float(f"{row['time']['total']:.2e}")
    return seconds, layout.pipeline, layout.tensor, layout.zero, row["memory"]["total"]


def layout_name(layout):
    """A layout in words: "data 8 zero 1, recompute full"."""
    sizes = {"data": layout.data, "tensor": layout.tensor, "pipeline": layout.pipeline}
    words = [f"{kind} {size}" for kind, size in sizes.items() if size > 1]
    if layout.data > 1 and layout.zero:
        words[0] += f" zero {layout.zero}"
    if layout.recompute != "none":
        words.append(f"recompute {layout.recompute}")
    return ", ".join(words) or "one GPU"


def throughput(model, sequences, row, count, card):
    """(tokens/s over all GPUs, MFU)."""
    T = model.config.block_size
    speed = sequences * T / row["time"]["total"]
    return speed, speed * model.train_flops(T) / card.flops / count


# -----------------------------------------------------------------------------
# Tables

PARTS = ("weights", "gradients", "optimizer", "casts", "activations", "logits", "backward", "total")
TIMES = ("compute", "bubble", "optimizer", "exposed", "total")


def show_layouts(c, model, sequences, card):
    """Prints the best layouts of c.gpus GPUs as a table -> their rows, as plain values."""
    T = model.config.block_size
    cache = model.kv_cache_bytes(T, torch.bfloat16) / 1e9
    print(f"{model.num_params() / 1e6:,.0f}M parameters, {sequences} sequences of {T} tokens a step, "
          f"{c.gpus} x {c.gpu} ({card.source})")
    print("Times and MFU are counted, from assumed shares of the GPU's peak: nothing was measured on a GPU")
    print(f"GB per GPU, at most {card.usable / 1e9:.1f}; ms per step. Training keeps no KV cache; "
          f"generating takes {cache:.3g} GB for {T} tokens in bfloat16\n")

    fit, too_large = plans(model, sequences, c.gpus, card)
    best = fit[: c.rows or None]
    names = (*PARTS, *(f"{name} ms" for name in TIMES), "MFU")
    heads = [f"{name:>{max(7, len(name))}}" for name in names]
    print(f"{'layout':<44} {'batch':>9}", *heads)
    for row in best:
        cells = [f"{row['memory'][part] / 1e9:.2f}" for part in PARTS]
        cells += [f"{1000 * row['time'][part]:.1f}" for part in TIMES]
        cells += [f"{throughput(model, sequences, row, c.gpus, card)[1]:.1%}"]
        print(f"{layout_name(row['layout']):<44} {row['batch_size']:>4}x{row['micro_steps']:<4}",
              *(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True)))
    smallest = ""
    if too_large:
        memory = too_large[0]["memory"]["total"] / 1e9
        smallest = f"; the smallest of these needs {memory:.1f} GB: {layout_name(too_large[0]['layout'])}"
    print(f"\n{len(fit)} layouts fit, {len(too_large)} do not{smallest}")
    if not fit and not too_large:
        print(f"{sequences} sequences cannot be shared out over {c.gpus} GPUs: data parallelism needs a number that "
              "divides them, a pipeline needs a micro-batch for each stage")
    return [{**row, "layout": row["layout"]._asdict()} for row in best]


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
    """The fields of GPTConfig among the settings of train.py. Raises ValueError for a field without a key there."""
    for field in fields(GPTConfig):
        if field.name not in config:
            raise ValueError("train.py has no key for a field of GPTConfig: add to the model's keys in train.py the "
                             f"line `{field.name} = {field.default!r}`, with a comment that says what it is")
    return {field.name: config[field.name] for field in fields(GPTConfig)}


def meta_model(sizes):
    """A GPT with these fields on the meta device: shapes without memory."""
    with torch.device("meta"):
        return GPT(GPTConfig(**sizes))


def scaling_table(card=GPUS["h100"]):  # noqa: B008
    """The best layout of each shape by number of GPUs, as Markdown."""
    lines = ["| model | GPUs | layout | micro-batch | GB per GPU | step | exposed | tokens/s | MFU |",
             "|" + "---|" * 9]
    for name, (sizes, tokens) in SHAPES.items():
        model = meta_model(sizes)
        sequences = tokens // model.config.block_size
        for count in (1, 8, 64, 512, 4096):
            lines.append(f"| {name} | {count:,} | {scaling_cells(model, sequences, count, card)} |")
    return "\n".join(lines)


def scaling_cells(model, sequences, count, card):
    """The best layout in the cells of scaling_table; if there is none, the reason and empty cells."""
    fit, too_large = plans(model, sequences, count, card)
    if not fit:
        reason = f"{sequences} sequences are too few"
        if too_large:
            reason = f"does not fit: {too_large[0]['memory']['total'] / 1e9:,.0f} GB at the least"
        return f"{reason} | | | | | |"
    best = fit[0]
    seconds = best["time"]["total"]
    speed, mfu = throughput(model, sequences, best, count, card)
    return (f"{layout_name(best['layout'])} | {best['batch_size']} x {best['micro_steps']} | "
            f"{best['memory']['total'] / 1e9:.1f} | {seconds:.3g} s | "
            f"{best['time']['exposed'] / seconds:.0%} | {speed:,.0f} | {mfu:.0%}")


def main(c):
    shares = {"efficiency": c.efficiency, "reserve": c.reserve}
    if c.what == "scaling":
        print(scaling_table(GPUS["h100"]._replace(**shares)))
        return
    if c.gpu not in GPUS:
        fail(f"gpu={c.gpu!r} is none of {', '.join(GPUS)}")
    if c.dtype == "float32":
        fail("the known speeds are for bfloat16: leave dtype at auto")
    try:
        sizes = model_fields(dict(c))
        model = meta_model({**sizes, "vocab_size": sizes["vocab_size"] or GPTConfig.vocab_size})
    except ValueError as error:
        fail(error)
    if c.tokens_per_step % c.block_size:
        fail(f"tokens_per_step={c.tokens_per_step} is not a multiple of block_size={c.block_size}")
    accumulated = c.batch_size * (c.gradient_accumulation_steps or 1)
    sequences = c.tokens_per_step // c.block_size or accumulated
    if not sequences:
        fail("batch_size=0: say how many tokens an update has, for example --tokens_per_step=491520")
    best = show_layouts(c, model, sequences, GPUS[c.gpu]._replace(**shares))
    print(json.dumps({"gpu": c.gpu, "gpus": c.gpus, "sequences": sequences, "layouts": best}))


if __name__ == "__main__":
    verbs = ("layouts", "scaling")
    main(Settings(configure(globals(), verb="what", verbs=verbs, also=ROOT / "train.py")))
