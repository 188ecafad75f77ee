"""The memory estimate against what autograd and the optimizer really hold."""

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

from device import PEAK_FLOPS  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optim import Optimizers  # noqa: E402
from plan import (  # noqa: E402
    GPUS,
    SHAPES,
    Layout,
    costs_of,
    meta_model,
    plans,
    scaling_table,
    step_memory,
    step_time,
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
    """step_memory of a model where it lies, on one device."""
    cuda = next(model.parameters()).is_cuda
    return step_memory(costs_of(model), batch_size, dtype, T, Layout(recompute=recompute), cuda=cuda)


def saved_bytes(model, batch_size, T):
    """Bytes that the forward pass keeps for the backward pass: (in the body, of the size of logits).

    Each storage counts once, however many views of it are saved; parameters and buffers not at all.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages, kept = {}, []

    def pack(t):
        kept.append(t)  # so that no address is used twice
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            of_logits = t.ndim > 0 and t.shape[-1] in (model.config.vocab_size, model.config.padded_vocab_size)
            storages[storage.data_ptr()] = storage.nbytes(), of_logits
        return t

    idx = torch.randint(model.config.vocab_size, (batch_size, T))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(idx, idx, loss_only=True)
    return tuple(sum(n for n, is_logits in storages.values() if is_logits == which) for which in (False, True))


@pytest.mark.parametrize("toggle", TOGGLES, ids=lambda t: ",".join(f"{k}={v}" for k, v in t.items()) or "-")
def test_activations_are_what_autograd_saves(toggle):
    model = GPT(GPTConfig(**{**SIZES, **toggle}))
    for batch_size, T in ((4, 64), (2, 24)):
        body, logits = saved_bytes(model, batch_size, T)
        plan = training_memory(model, batch_size, T=T)
        assert plan["activations"] == pytest.approx(body, rel=0.25)
        assert logits <= plan["logits"]
    assert training_memory(model, 4) == training_memory(model, 4, T=64)


@pytest.mark.parametrize("toggle", [{}, {"attn": "math"}, {"pos": "rope", "activation": "swiglu"}, MODERN],
                         ids=["gpt2", "math", "rope, swiglu", "modern"])
@pytest.mark.parametrize("T", [64, 256])
def test_with_autocast_activations_and_casts_are_what_autograd_saves(toggle, T):
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
    assert plan["total"] == parts - min(plan["logits"], plan["backward"])  # which are not there at once


def test_logits_stop_growing_where_the_loss_is_taken_in_chunks():
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=1))
    small, large, larger = (training_memory(model, batch_size)["logits"] for batch_size in (0.25, 1, 64))
    waiting = 4 * 50304 * 768  # the head's gradient, from one chunk to the next
    assert small == 3 * 4 * 256 * 50257 and large == larger == 3 * 4 * (2**25 // 50257) * 50257 + waiting


# -----------------------------------------------------------------------------
# The whole of a step


def recompute(model, how):
    """Activation checkpointing: of each block, or of its attention and of its MLP."""
    for block in model.transformer.h:
        for part in {"none": (), "selective": (block.attn, block.mlp), "full": (block,)}[how]:
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)


def peak_bytes(model, batch_size, T, dtype):
    """The most that is allocated at once in an update of two micro-steps, with weights and AdamW's state."""
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
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = held
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


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
def test_the_total_is_what_a_step_takes_within_a_tenth(name, how):
    sizes, batch_size, dtype = MEASURED[name]
    torch.manual_seed(1)
    model = GPT(GPTConfig(**sizes))
    recompute(model, how)
    plan = training_memory(model, batch_size, dtype, recompute=how)
    assert plan["total"] == pytest.approx(peak_bytes(model, batch_size, model.config.block_size, dtype), rel=0.1)


# -----------------------------------------------------------------------------
# Layouts


def test_what_the_zero_stages_share_out():
    """Rajbhandari et al. 2020, figure 1: optimizer, gradients, weights, one after the other; here the weights too, as
    fully_shard keeps a rank's part and gathers the rest in half precision."""
    costs = costs_of(meta_model(SHAPES["7B"][0]))
    P = costs.weights
    layouts = [Layout(data=64, zero=zero) for zero in range(4)]
    ddp, one, two, three = (step_memory(costs, 1, torch.bfloat16, layout=layout) for layout in layouts)
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer"]) == (P, P, 2 * P)
    assert (one["weights"], one["gradients"], one["optimizer"], one["casts"]) == (P // 64, P, P // 32, P // 2)
    assert two["gradients"] < 0.08 * P and two["optimizer"] == one["optimizer"] and two["casts"] == P // 2
    assert three["casts"] < 0.1 * P and three["gradients"] == two["gradients"]
    assert len({plan["activations"] for plan in (ddp, one, two, three)}) == 1


def test_tensor_and_pipeline_parallelism_share_out_weights_but_not_all_activations():
    costs = costs_of(meta_model(SHAPES["70B"][0]))
    alone, tensor, stages = (step_memory(costs, 1, torch.bfloat16, layout=layout, micro_steps=8)
                             for layout in (Layout(), Layout(tensor=8), Layout(pipeline=4)))
    assert tensor["weights"] == costs.weights // 8
    assert alone["activations"] / 8 < tensor["activations"] < alone["activations"] / 2  # the residual stream is whole
    assert costs.weights / 4 < stages["weights"] < costs.weights / 3.9  # the first has the embedding too
    assert stages["activations"] == pytest.approx(alone["activations"], rel=0.01)  # a quarter, of four micro-batches


def test_time_by_hand():
    """Compute from FLOPs, the pipeline's bubble of (p - 1) / m, a ring's 2 (n - 1) / n, as the papers have them."""
    model, card = meta_model(SHAPES["7B"][0]), GPUS["h100"]
    costs, T = costs_of(model), 4096
    one = step_time(costs, 1, 16, Layout(), card)
    assert one["compute"] == pytest.approx(16 * T * model.train_flops(T) / (card.flops * 0.5), rel=0.01)
    assert one["bubble"] == one["exposed"] == 0
    piped = step_time(costs, 1, 16, Layout(pipeline=4), card)
    assert piped["bubble"] / piped["compute"] == pytest.approx(3 / 16)
    full = step_time(costs, 1, 16, Layout(recompute="full"), card)
    assert 1.3 < full["compute"] / one["compute"] < 1.34
    tensor = step_time(costs, 1, 1, Layout(tensor=8), card)
    assert tensor["exposed"] == pytest.approx(32 * 4 * 2 * 7 / 8 * T * 4096 * 2 / 450e9)
    slow = card._replace(flops=1e30)  # nothing to hide behind
    ddp = step_time(costs, 1, 1, Layout(data=8), slow)
    assert ddp["exposed"] == pytest.approx(2 * 7 / 8 * costs.weights / 450e9)
    across = step_time(costs, 1, 1, Layout(data=16, tensor=8), slow)["exposed"]
    tensor = step_time(costs, 1, 1, Layout(tensor=8), slow)["exposed"]
    assert across - tensor == pytest.approx(2 * 15 / 16 * costs.weights / 8 / 50e9)  # one of its ranks in each machine


def test_ranks_lie_as_parallel_has_them():
    """Pipeline x data x tensor, the last innermost: stages in other machines, data-parallel ranks in one."""
    costs, card = costs_of(meta_model(SHAPES["7B"][0])), GPUS["h100"]._replace(flops=1e30)
    T, width = 4096, 4096

    def exposed(layout, machine=8):
        return step_time(costs, 1, 1, layout, card._replace(machine=machine))["exposed"]

    sent = 2 * T * width * 4
    assert exposed(Layout(pipeline=8)) == pytest.approx(8 * sent / 450e9)
    assert exposed(Layout(pipeline=8), machine=4) == pytest.approx(8 * sent / 50e9)
    stages = exposed(Layout(data=8, pipeline=2)) - 2 * sent / 50e9  # each data-parallel group fills a machine
    assert stages == pytest.approx(2 * 7 / 8 * costs.weights / 2 / 450e9)


def test_what_train_would_refuse_is_no_plan():
    """parallel.Layout's rules: heads, key and value heads, a micro-batch for each stage."""
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
