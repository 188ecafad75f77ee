"""plan.py: its memory estimate against the memory that autograd and the optimizer really use; time by hand."""

import contextlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fused  # noqa: E402
from cross_entropy import PIECE, linear_cross_entropy  # noqa: E402
from device import PEAK_FLOPS  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optim import Optimizers  # noqa: E402
from plan import (  # noqa: E402
    GPUS,
    SHAPES,
    Grid,
    block_traffic,
    costs_of,
    loss_memory,
    meta_model,
    plans,
    scaling_table,
    step_memory,
    step_time,
    throughput,
)

SIZES = dict(block_size=64, vocab_size=101, n_layer=3, n_head=4, n_embd=64)
MODERN = {"pos": "rope", "norm": "rmsnorm_nogain", "norm_embed": True, "qk_norm": "rms", "activation": "relu2",
          "tie_weights": False}
LLAMA = {"pos": "rope", "norm": "rmsnorm", "n_kv_head": 2, "activation": "swiglu", "tie_weights": False, "bias": False}
TOGGLES = [
    {}, {"attn": "math"}, {"activation": "relu2"}, {"activation": "swiglu"}, {"norm": "rmsnorm"}, {"qk_norm": "rms"},
    {"pos": "rope"}, {"pos": "rope", "qk_norm": "rms_gain"}, {"n_kv_head": 1}, {"norm_embed": True}, {"dropout": 0.1},
    {"dropout": 0.1, "attn": "math"}, MODERN, LLAMA, {**LLAMA, "qk_norm": "rms_gain"},
]


def training_memory(model, batch_size, dtype=torch.float32, T=0, recompute="none"):
    """step_memory of a model on one device, the one that it is on."""
    cuda = next(model.parameters()).is_cuda
    return step_memory(costs_of(model), batch_size, dtype, T, Grid(recompute=recompute), cuda=cuda)


def saved_bytes(model, batch_size, T):
    """Bytes that the forward pass keeps for the backward pass: (activations, tensors of the size of logits).

    Each storage counts once, however many views of it are saved. Parameters and buffers are not counted, nor is the
    table's gradient, which the loss makes in the forward pass.
    """
    table = model.lm_head.weight
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages, kept = {}, []

    def pack(t):
        kept.append(t)  # so that no address is used twice
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and (t.shape, t.dtype) != (table.shape, table.dtype):
            of_logits = t.ndim > 0 and t.shape[-1] in (model.config.vocab_size, model.config.padded_vocab_size)
            storages[storage.data_ptr()] = storage.nbytes(), of_logits
        return t

    idx = torch.randint(model.config.vocab_size, (batch_size, T))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(idx, idx, loss_only=True)
    return tuple(sum(n for n, is_logits in storages.values() if is_logits == which) for which in (False, True))


@pytest.mark.parametrize("toggle", TOGGLES, ids=lambda t: ",".join(f"{k}={v}" for k, v in t.items()) or "-")
def test_activations_are_what_autograd_saves(toggle, no_kernels):
    model = GPT(GPTConfig(**{**SIZES, **toggle}))
    for batch_size, T in ((4, 64), (2, 24)):
        body, logits = saved_bytes(model, batch_size, T)
        plan = training_memory(model, batch_size, T=T)
        assert plan["activations"] == pytest.approx(body, rel=0.25)
        assert logits <= plan["logits"]
    assert training_memory(model, 4) == training_memory(model, 4, T=64)


@pytest.mark.parametrize("toggle", TOGGLES, ids=lambda t: ",".join(f"{k}={v}" for k, v in t.items()) or "-")
def test_fused_operations_keep_about_what_the_plan_says(toggle):
    model = GPT(GPTConfig(**{**SIZES, **toggle}))
    assert sum(saved_bytes(model, 4, 64)) < 1.25 * training_memory(model, 4)["activations"]


@pytest.mark.parametrize("toggle", [{}, {"attn": "math"}, {"pos": "rope", "activation": "swiglu"}, MODERN],
                         ids=["gpt2", "math", "rope, swiglu", "modern"])
@pytest.mark.parametrize("T", [64, 256])
def test_with_autocast_activations_and_casts_are_what_autograd_saves(toggle, T, no_kernels):
    model = GPT(GPTConfig(**{**SIZES, "block_size": 256, **toggle}))
    with torch.autocast("cpu", torch.bfloat16):
        body, _ = saved_bytes(model, 2, T)
    plan = training_memory(model, 2, torch.bfloat16, T=T)
    assert plan["activations"] + plan["casts"] == pytest.approx(body, rel=0.25)


@pytest.mark.parametrize("toggle", [{}, MODERN], ids=["tied", "untied"])
def test_weights_gradients_and_optimizer_state_are_exact(toggle):
    model = GPT(GPTConfig(**{**SIZES, **toggle}))
    plan = training_memory(model, 2)

    def bytes_of(tensors):
        return sum(t.numel() * t.element_size() for t in tensors if t.ndim)  # step counts are not counted

    def state_bytes(optimizer):
        opt = Optimizers(model, optimizer=optimizer, learning_rate=1e-3)
        idx = torch.zeros(2, 64, dtype=torch.long)
        model(idx, idx, loss_only=True)[1].backward()
        opt.step()
        return bytes_of(t for states in opt.state_dict().values() for state in states.values() for t in state.values())

    adamw, muon = state_bytes("adamw"), state_bytes("muon")
    assert plan["weights"] == bytes_of(model.parameters())
    assert plan["gradients"] == bytes_of(p.grad for p in model.parameters())
    assert plan["optimizer"] == adamw > muon  # an upper bound for Muon, which has one moment
    parts = sum(part for name, part in plan.items() if name != "total")
    assert plan["total"] == parts - min(plan["logits"], plan["backward"])  # these two do not exist at the same time


@pytest.mark.parametrize("kernels", [True, False])
def test_a_piece_of_the_logits_stops_growing(kernels, request):
    """By hand, GPT-2's shape: 50,304 x 768 elements in the table, 2,668 rows in a piece on CUDA, 667 on a CPU. Its
    kernel takes twice as many in bfloat16, where PyTorch needs a copy in fp32."""
    if not kernels:
        request.getfixturevalue("no_kernels")
    elif fused.library() is None:
        pytest.skip("no C++ compiler")
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=1))
    costs, V, C = costs_of(model), 50304, 768
    table = 4 * V * C  # the table's gradient

    def besides_input(tokens, small, cuda):
        return loss_memory(costs, tokens, small, cuda, copied=True) - 4 * tokens * C

    assert besides_input(256, small=4, cuda=False) == table + 4 * 256 * V
    assert besides_input(20 * 667, small=4, cuda=False) == table + 4 * 667 * V
    peak = 2 * 1334 * V + table / 2 if kernels else 6 * 667 * V
    assert besides_input(20 * 1334, small=2, cuda=False) == table + table / 2 + peak
    assert besides_input(20 * 2668, small=2, cuda=True) == table + table / 2 + 2 * 2668 * V + table / 2
    assert besides_input(20 * 2668, small=4, cuda=True) == table + 4 * 2668 * V
    assert besides_input(16, small=2, cuda=True) == table + table / 2 + 2 * 16 * V + table / 2  # the product outlasts
    assert besides_input(668, small=4, cuda=False) == table + 4 * 334 * V  # two pieces of equal size
    assert {kind: piece // V for kind, piece in PIECE.items()} == {"cpu": 667, "cuda": 2668}


def test_the_casts_leave_out_the_head():
    """The loss casts the table and frees it: autocast keeps only the four matrices of each block, tied or not."""
    for tie_weights in (True, False):
        model = GPT(GPTConfig(**{**SIZES, "tie_weights": tie_weights}))
        assert training_memory(model, 2, torch.bfloat16)["casts"] == 2 * 3 * 12 * 64 * 64


# -----------------------------------------------------------------------------
# The whole of a step


def recompute(model, how):
    """Activation checkpointing: of each block, or of its attention and of its MLP."""
    for block in model.transformer.h:
        for part in {"none": (), "selective": (block.attn, block.mlp), "full": (block,)}[how]:
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)


def peak_bytes(model, batch_size, T, dtype):
    """Peak bytes in an update of two micro-steps, including weights and AdamW's state."""
    opt = Optimizers(model, learning_rate=1e-3)
    idx = torch.randint(model.config.vocab_size, (batch_size, T))
    half = dtype != torch.float32

    def update():
        for _ in range(2):
            with torch.autocast("cpu", dtype) if half else contextlib.nullcontext():
                _, loss = model(idx, idx, loss_only=True)
            loss.backward()
        opt.step()
        opt.zero_grad()

    update()
    states = [t for state in opt.state_dict()["adamw"].values() for t in state.values()]
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *states))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        update()
    return peak_of(profile, held)


def peak_of(profile, held=0):
    """Peak bytes during a profile with memory, including `held` bytes allocated before."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = held
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [True, False])
def test_the_loss_takes_what_the_plan_says(dtype, softcap, kernels, request):
    """Two pieces, or four with a soft-cap; the plan counts the gradient of the hidden states as an activation. A CPU's
    kernel takes one piece in bfloat16, and no more memory for a soft-cap than for none."""
    if not kernels:
        request.getfixturevalue("no_kernels")
    elif fused.library() is None:
        pytest.skip("no C++ compiler")
    N, C, V = 1024, 64, 50257
    costs = costs_of(meta_model({**SIZES, "n_embd": C, "vocab_size": V}))
    x, table = torch.randn(N, C, requires_grad=True), torch.randn(50304, C, requires_grad=True)
    targets = torch.randint(V, (N,))
    half = dtype != torch.float32
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.autocast("cpu", dtype) if half else contextlib.nullcontext():
            linear_cross_entropy(x, table, targets, V, softcap)
    plan = loss_memory(costs, N, 2 if half else 4, cuda=False, copied=True)
    measured = peak_of(profile)  # x and its gradient, of equal size, change places
    if kernels and softcap:
        assert plan / 2 < measured < plan
    else:
        assert measured == pytest.approx(plan, rel=0.2 if softcap else 0.1) and measured < 1.1 * plan


GPT2 = dict(block_size=256, vocab_size=5000, n_layer=6, n_head=4, n_embd=256)
MEASURED = {
    "activations": (GPT2, 8, torch.float32),
    "logits in chunks": ({**GPT2, "vocab_size": 50257, "n_layer": 3}, 4, torch.float32),
    "weights": ({**GPT2, "n_head": 8, "n_embd": 512}, 1, torch.float32),
    "llama": ({**GPT2, **LLAMA}, 4, torch.float32),
    "bfloat16": ({**GPT2, "block_size": 128, "n_layer": 3}, 2, torch.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MEASURED)
def test_the_total_is_what_a_step_takes_within_a_tenth(name, how, no_kernels):
    sizes, batch_size, dtype = MEASURED[name]
    torch.manual_seed(1)
    model = GPT(GPTConfig(**sizes))
    recompute(model, how)
    plan = training_memory(model, batch_size, dtype, recompute=how)
    assert plan["total"] == pytest.approx(peak_bytes(model, batch_size, model.config.block_size, dtype), rel=0.1)


# -----------------------------------------------------------------------------
# Layouts


def test_what_the_zero_stages_share_out():
    """Rajbhandari et al. 2020, figure 1: stages shard the optimizer, then gradients, then weights. Here every stage
    also shards the weights, as fully_shard keeps a rank's part and gathers the rest in half precision."""
    costs = costs_of(meta_model(SHAPES["7B"][0]))
    P = costs.weights
    layouts = [Grid(data=64, zero=zero) for zero in range(4)]
    ddp, one, two, three = (step_memory(costs, 1, torch.bfloat16, layout=layout) for layout in layouts)
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer"]) == (P, P, 2 * P)
    assert (one["weights"], one["gradients"], one["optimizer"], one["casts"]) == (P // 64, P, P // 32, P // 2)
    assert two["gradients"] < 0.08 * P and two["optimizer"] == one["optimizer"] and two["casts"] == P // 2
    assert three["casts"] < 0.1 * P and three["gradients"] == two["gradients"]
    assert len({plan["activations"] for plan in (ddp, one, two, three)}) == 1


def test_tensor_and_pipeline_parallelism_share_out_weights_but_not_all_activations():
    costs = costs_of(meta_model(SHAPES["70B"][0]))
    alone, tensor, stages = (step_memory(costs, 1, torch.bfloat16, layout=layout, micro_steps=8)
                             for layout in (Grid(), Grid(tensor=8), Grid(pipeline=4)))
    ends = costs.weights - 100 * costs.block  # embedding and head are whole on every rank
    assert tensor["weights"] == 100 * costs.block // 8 + ends
    assert alone["activations"] / 8 < tensor["activations"] < alone["activations"] / 2  # the residual stream is whole
    assert costs.weights / 4 < stages["weights"] < costs.weights / 3.9  # the first has the embedding too
    assert stages["activations"] == pytest.approx(alone["activations"], rel=0.01)  # a quarter, of four micro-batches


def test_time_by_hand():
    """Compute from FLOPs, the pipeline's bubble of (p - 1) / m, a ring's 2 (n - 1) / n, as in the papers."""
    model, card = meta_model(SHAPES["7B"][0]), GPUS["h100"]
    costs, T = costs_of(model), 4096
    one = step_time(costs, 1, 16, Grid(), card)
    assert one["bubble"] == one["exposed"] == 0
    piped = step_time(costs, 1, 16, Grid(pipeline=4), card)
    assert piped["bubble"] / piped["compute"] == pytest.approx(3 / 16)
    full = step_time(costs, 1, 16, Grid(recompute="full"), card)
    assert 1.28 < full["compute"] / one["compute"] < 1.34
    tensor = step_time(costs, 1, 1, Grid(tensor=8), card)
    assert tensor["exposed"] == pytest.approx(32 * 4 * 2 * 7 / 8 * T * 4096 * 2 / 450e9)
    slow = card._replace(flops=1e30, bandwidth=1e30)  # nothing to hide behind
    ddp = step_time(costs, 1, 1, Grid(data=8), slow)
    assert ddp["exposed"] == pytest.approx(2 * 7 / 8 * costs.weights / 450e9)
    across = step_time(costs, 1, 1, Grid(data=16, tensor=8), slow)["exposed"]
    tensor = step_time(costs, 1, 1, Grid(tensor=8), slow)["exposed"]
    weights = costs.weights - 32 * costs.block * 7 / 8  # of which embedding and head are whole on every rank
    assert across - tensor == pytest.approx(2 * 15 / 16 * weights / 50e9)  # one of its ranks in each machine


@pytest.mark.parametrize("name, T, layers, width, share", [("124M", 1024, 12, 768, 0.33), ("7B", 4096, 32, 4096, 0.5)])
def test_time_of_products_and_attention_by_hand(name, T, layers, width, share):
    """With infinite bandwidth: three times the forward FLOPs of matrices, 3.5 times those of attention."""
    model = meta_model(SHAPES[name][0])
    card = GPUS["h100"]._replace(bandwidth=1e30)
    products = 3 * model.forward_flops(0) / (0.65 * width / (width + 256))
    attention = 3.5 * 4 * (T + 1) / 2 * layers * width / share
    compute = step_time(costs_of(model), 2, 16, Grid(), card)["compute"]
    assert compute == pytest.approx(2 * 16 * T * (products + attention) / 989e12)


def test_memory_bound_bytes_by_hand():
    """Elements of width C, K (keys) and H (hidden), 4 bytes in the residual stream and 2 elsewhere."""
    C = 64
    forward = 2 * (4 + 2 + 4 + 2) * C + 2 * (3 * C + C) + 2 * (4 * C + 4 * C)
    backward = 2 * (2 + 4 + 4 + 4 + 2) * C + 2 * (4 + 2) * C     # norms, their gains
    backward += 2 * (5 * C + 3 * C) + 2 * 2 * 3 * C              # attention, its three gradients joined
    backward += 2 * 3 * 4 * C + 2 * (3 * C + C + 4 * C + C)      # GELU, four biases
    assert block_traffic(GPTConfig(**SIZES), 1) == (forward, backward) == (48 * 64, 114 * 64)
    K, H = 32, 176
    forward = 24 * C + 2 * (2 * C + 2 * K) + 2 * 2 * (C + K) + 2 * 3 * H
    backward = 44 * C + 2 * (4 * C + 4 * K) + 2 * 2 * (C + K) + 2 * 2 * (C + 2 * K) + 2 * 5 * H
    llama = GPTConfig(**{**SIZES, **LLAMA})
    assert block_traffic(llama, 1) == (forward, backward)
    stream = 24 * C, 44 * C  # whole on both ranks of two
    halves = [whole / 2 + part / 2 for whole, part in zip(stream, (forward, backward), strict=True)]
    assert block_traffic(llama, 2) == tuple(halves)


def test_time_of_the_memory_bound_operations_by_hand():
    """With infinite FLOP/s: blocks, ends, the passes of the loss, and 16 bytes per weight and micro-batch."""
    costs = costs_of(meta_model(dict(n_layer=2, n_head=12, n_embd=768, bias=False)))
    card, C, V, T = GPUS["h100"]._replace(flops=1e30), 768, 50304, 1024
    blocks = 2 * (48 + 96) * C  # 114 in the backward pass, without 18 of the biases
    ends = (4 + 2 + 4 + 2 + 2 + 4 + 4 + 4 + 2) * C + 4 * 4 * C
    moved = 8 * T * (blocks + ends + 3 * 2 * V) + 4 * 10 * V * C  # 8,192 tokens are 4 pieces of at most 2,668
    moved += 16 * costs.weights / 4
    assert step_time(costs, 8, 3, Grid(), card)["compute"] == pytest.approx(3 * moved / (0.9 * 3.35e12))


def test_larger_models_have_a_higher_mfu():
    """Counted, not measured: the range of each size is the one in the documents."""
    mfu = {}
    for name, count in {"124M": 1, "355M": 1, "774M": 1, "1.6B": 1, "7B": 8}.items():
        sizes, tokens = SHAPES[name]
        model = meta_model(sizes)
        sequences = tokens // sizes["block_size"]
        best = plans(model, sequences, count, GPUS["h100"])[0][0]
        mfu[name] = throughput(model, sequences, best, count, GPUS["h100"])[1]
    assert list(mfu.values()) == sorted(mfu.values())
    assert 0.30 < mfu["124M"] < 0.37 < mfu["355M"] and 0.45 < mfu["7B"] < 0.55


def test_ranks_lie_as_parallel_has_them():
    """Pipeline x data x tensor, tensor innermost: stages on different machines, data-parallel ranks on one."""
    costs, card = costs_of(meta_model(SHAPES["7B"][0])), GPUS["h100"]._replace(flops=1e30, bandwidth=1e30)
    T, width = 4096, 4096

    def exposed(layout, machine=8):
        return step_time(costs, 1, 1, layout, card._replace(machine=machine))["exposed"]

    sent = 2 * T * width * 4
    assert exposed(Grid(pipeline=8)) == pytest.approx(8 * sent / 450e9)
    assert exposed(Grid(pipeline=8), machine=4) == pytest.approx(8 * sent / 50e9)
    stages = exposed(Grid(data=8, pipeline=2)) - 2 * sent / 50e9  # each data-parallel group fills a machine
    weights = costs.weights - costs.table - 16 * costs.block  # of the first stage: no head, half of the blocks
    assert stages == pytest.approx(2 * 7 / 8 * weights / 450e9)


def test_what_train_would_refuse_is_no_plan():
    """The rules of parallel.Layout: heads, key and value heads, a micro-batch for each stage."""
    model = meta_model(dict(n_layer=8, n_head=12, n_kv_head=6, n_embd=768, block_size=1024))
    fit, too_large = plans(model, 16, 8, GPUS["h100"])
    layouts = {row["layout"] for row in fit}
    assert not too_large and {layout.tensor for layout in layouts} == {1, 2}  # of 4, which 6 does not share out over
    assert {layout.pipeline for layout in layouts} == {1, 2, 4, 8}
    assert all(row["micro_steps"] >= row["layout"].pipeline for row in fit)


def test_the_best_comes_first_and_what_does_not_fit_is_kept():
    model = meta_model(SHAPES["13B"][0])
    fit, too_large = plans(model, 1024, 8, GPUS["h100"])
    times = [row["time"]["total"] for row in fit]
    assert fit and too_large and all(b > a * 0.99 for a, b in zip(times, times[1:], strict=False))
    assert all(row["memory"]["total"] <= 72e9 for row in fit)
    assert all(row["memory"]["total"] > 72e9 for row in too_large)
    for row in fit:
        layout = row["layout"]
        assert layout.data * layout.tensor * layout.pipeline == 8 and model.config.n_head % layout.tensor == 0
        assert layout.data * row["batch_size"] * row["micro_steps"] == 1024
    assert not any(row["layout"].zero == 0 and row["layout"].data == 8 for row in fit)  # 208 GB of states alone


def test_the_command_takes_a_config_and_keys_of_train(call_script):
    code, out, err = call_script("plan.py", ROOT / "config" / "owt_124m.py", "--gpu=a100-40", "--gpus=4", "--rows=2")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["sequences"] == 480 and len(result["layouts"]) == 2 and "124M parameters" in out
    assert "nothing was measured on a GPU" in out
    wide = call_script("plan.py", "--n_embd=8192", "--n_head=64", "--n_layer=100", "--gpus=1", "--batch_size=1")[1]
    assert "0 layouts fit" in wide and json.loads(wide.splitlines()[-1])["layouts"] == []
    assert "cannot be shared out over 3 GPUs" in call_script("plan.py", "--gpus=3", "--n_layer=2", "--batch_size=1",
                                                              "--n_head=2")[1]


@pytest.mark.parametrize("words", [["--gpu=tpu"], ["--gpus=0"], ["--n_head=5"], ["--dtype=float32"], ["--n_layr=1"],
                                   ["--tokens_per_step=1000"], ["--batch_size=0"]])
def test_what_cannot_be_planned_is_one_line(call_script, words):
    code, out, err = call_script("plan.py", *words)
    assert code == 2 and not out and err.startswith("error:") and err.count("\n") == 1


def test_the_table_of_the_docs_is_the_commands():
    assert scaling_table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_a_gpus_peak_is_the_one_that_mfu_divides_by():
    names = {"a100-40": "A100", "a100": "A100", "h100": "H100", "h200": "H200", "b200": "B200", "l40s": "L40S",
             "rtx4090": "RTX 4090"}
    assert {key: PEAK_FLOPS[name][0] for key, name in names.items()} == {key: gpu.flops for key, gpu in GPUS.items()}
