"""Optimizers: who trains what, Muon against torch's, a state that survives by name, schedules that start above zero."""

import copy
import io
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import optim  # noqa: E402
import train as train_script  # noqa: E402
from configurator import Settings, read_keys  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optim import Muon, Optimizers, lr_at, orthogonalize, split_params  # noqa: E402

TOGGLES = [
    {},
    {"tie_weights": False},
    {"bias": False},
    {"norm": "rmsnorm_nogain", "bias": False},
    {"qk_norm": "rms_gain", "norm_embed": True},
    {"pos": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1, "tie_weights": False},
]

def label(toggle):
    return ",".join(f"{key}={value}" for key, value in toggle.items()) or "-"


every_toggle = pytest.mark.parametrize("toggle", TOGGLES, ids=label)
either = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def build(seed=0, **toggle):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16), **toggle}))


def optimizers(model, optimizer="muon", **settings):
    return Optimizers(model, optimizer=optimizer, **{"learning_rate": 1e-2, "weight_decay": 0.1, **settings})


def loss_at(model, step):
    idx = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(step))
    return model(idx[:, :-1], idx[:, 1:], loss_only=True)[1]


def train(model, opt, steps):
    for step in steps:
        loss_at(model, step).backward()
        opt.step()
        opt.zero_grad()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -----------------------------------------------------------------------------
# Groups


@every_toggle
@either
def test_every_parameter_is_in_exactly_one_group(toggle, optimizer):
    model = build(**toggle)
    params = dict(model.named_parameters())
    groups = split_params(model, muon=optimizer == "muon")
    assert sorted(name for names in groups.values() for name in names) == sorted(params)
    assert all(params[name].ndim == 1 for name in groups["no_decay"])
    assert all(params[name].ndim == 2 for name in groups["decay"] + groups["muon"])
    tables = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} & params.keys()
    if optimizer == "muon":
        assert tables == set(groups["decay"]) and all(name.startswith("transformer.h.") for name in groups["muon"])
    else:
        assert not groups["muon"] and tables < set(groups["decay"])
    held = [id(p) for group in optimizers(model, optimizer).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in params.values())


@every_toggle
@either
def test_weight_decay_shrinks_matrices_and_tables_alone(toggle, optimizer):
    """With gradients of zero nothing else moves a weight: w (1 - lr wd), or not at all."""
    model = build(**toggle)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
            p.grad = torch.zeros_like(p)
    before = weights(model)
    optimizers(model, optimizer, learning_rate=0.01, muon_learning_rate=0.03, weight_decay=0.5).step()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, before[name]), name
        else:
            lr = 0.03 if optimizer == "muon" and name.startswith("transformer.h.") else 0.01
            assert torch.allclose(p, before[name] * (1 - lr * 0.5), rtol=1e-6, atol=0), name


def test_adamw_is_torchs_unfused_adamw():
    """Fused or not is a matter of speed: after ten steps on the same gradients the weights agree."""
    model, plain = build(), build()
    ours = optimizers(model, "adamw", betas=(0.8, 0.9))
    matrices, vectors = ([p for p in plain.parameters() if (p.ndim == 2) == two] for two in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    unfused = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-8, fused=False, foreach=False)
    for _ in range(10):
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        unfused.step()
    start = weights(build())
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5 * (a - start[name]).abs().max(), name


def test_learning_rates_follow_one_schedule_from_their_own_peaks():
    model = build()
    opt = optimizers(model, learning_rate=0.01, muon_learning_rate=0.04)
    for factor in (0.5, 0.25, 1.0):  # always of the peak, not of the last value
        opt.set_lr(factor)
        assert {group["lr"] for group in opt.by_kind["adamw"].param_groups} == {0.01 * factor}
        assert {group["lr"] for group in opt.by_kind["muon"].param_groups} == {0.04 * factor}
    opt.set_lr(0.0)
    before = weights(model)
    train(model, opt, range(1))
    assert same(weights(model), before)


# -----------------------------------------------------------------------------
# Muon


def matrix(n, rows, cols, seed=0):
    """n matrices with singular values from 0.1 to 1, and their U and V^T."""
    torch.manual_seed(seed)
    U, _, Vh = torch.linalg.svd(torch.randn(n, rows, cols, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.1, min(rows, cols), dtype=torch.float64)
    return (U * s) @ Vh, U, Vh


@pytest.mark.parametrize("rows, cols", [(24, 24), (64, 16), (16, 64), (1, 8), (8, 1)])
@pytest.mark.parametrize("dtype, off_diagonal", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_orthogonalize_keeps_the_singular_vectors_and_evens_the_values(rows, cols, dtype, off_diagonal):
    G, U, Vh = matrix(3, rows, cols)
    out = orthogonalize(G.float(), dtype=dtype)
    assert out.shape == G.shape and out.dtype == torch.float32
    values = U.mT @ out.double() @ Vh.mT  # diagonal in G's singular vectors
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < diagonal.min() and diagonal.max() < 1.3
    assert (values - torch.diag_embed(diagonal)).abs().max() < off_diagonal
    scaled = orthogonalize(1000 * G.float(), dtype=dtype)
    assert (scaled - out).abs().max() < off_diagonal / 5  # the length of the gradient does not matter


def test_orthogonalize_treats_each_matrix_alone():
    G = matrix(5, 24, 16)[0].float()
    G[3] *= 1e-3
    one_by_one = torch.cat([orthogonalize(g[None]) for g in G])
    assert torch.allclose(orthogonalize(G), one_by_one, rtol=0, atol=1e-5)
    assert torch.allclose(orthogonalize(G.mT), one_by_one.mT, rtol=0, atol=1e-5)
    assert not orthogonalize(torch.zeros(1, 4, 4)).any()  # and no 0 / 0


def plain_newton_schulz(G, dtype):
    """orthogonalize as Jordan wrote it, on X itself: X <- aX + (bA + cAA)X with A = X X^T. G (n, rows, cols), lying"""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def relative_error(X, exact):
    return ((X.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("rows, cols", [(16, 32), (24, 96), (64, 256), (1, 8)])
@pytest.mark.parametrize("condition", [1e1, 1e4])
def test_the_iteration_on_the_small_matrix_is_the_plain_one(rows, cols, condition):
    """Exact in fp64, in fp32 to 1e-5. In bfloat16 it would be less exact, so there the plain one is taken."""
    _, U, Vh = matrix(3, rows, cols)
    s = torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64)
    G = (U * s) @ Vh
    exact = plain_newton_schulz(G, torch.float64)
    assert relative_error(orthogonalize(G, dtype=torch.float64), exact) < 1e-12
    assert relative_error(orthogonalize(G.float()), exact) < 1e-5
    assert relative_error(orthogonalize(G.mT.float()).mT, exact) < 1e-5
    half = orthogonalize(G.float(), dtype=torch.bfloat16)
    assert torch.equal(half, plain_newton_schulz(G.float(), torch.bfloat16).float())


@pytest.mark.parametrize("rows, cols, along", [(16, 16, -1), (16, 40, -2), (1, 8, -2)])
def test_even_rows_gives_columns_or_rows_of_one_length(rows, cols, along):
    """Rows if the matrix is square. Each matrix keeps its size (Frobenius norm) and the directions of its vectors."""
    X = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(0))
    X *= torch.tensor([1.0, 0.1, 50.0])[:, None, None]
    even = optim.even_rows(X)
    length = even.norm(dim=along)
    assert torch.allclose(length, length.mean(-1, keepdim=True).expand_as(length), rtol=1e-4)
    assert torch.allclose(even.norm(dim=(-2, -1)), X.norm(dim=(-2, -1)), rtol=1e-4, atol=0)
    assert torch.allclose(F.cosine_similarity(even, X, dim=along), torch.ones(()), atol=1e-5)
    assert torch.equal(optim.even_rows(torch.zeros(2, rows, cols)), torch.zeros(2, rows, cols))


@pytest.mark.parametrize("even_rows", [False, True])
@pytest.mark.parametrize("n_kv_head", [0, 2, 1])
def test_queries_keys_and_values_are_orthogonalised_each_alone(n_kv_head, even_rows):
    """c_attn's weight has them one below another. Its state stays one buffer of its shape: checkpoints do not change.
    """
    model = build(n_head=4, n_embd=32, n_kv_head=n_kv_head)
    name = "transformer.h.1.attn.c_attn.weight"
    weight, before = model.get_parameter(name), weights(model)[name]
    opt = optimizers(model, weight_decay=0.0, muon_learning_rate=0.5, muon_even_rows=even_rows)
    loss_at(model, 0).backward()
    opt.step()
    width = 8 * (n_kv_head or 4)
    step = []
    nesterov = (1 - 0.95**2) * weight.grad  # of the first step
    for part in nesterov.split((32, width, width)):
        update = orthogonalize(part[None])
        step.append(optim.even_rows(update)[0] if even_rows else update[0])
    step = torch.cat(step) * math.sqrt(weight.size(0) / weight.size(1))
    assert torch.allclose(before - weight, 0.5 * step, rtol=0, atol=1e-5)
    state = opt.state_dict()["muon"]
    assert state.keys() == set(split_params(model, muon=True)["muon"])
    assert all(set(values) == {"momentum_buffer"} for values in state.values())
    assert all(values["momentum_buffer"].shape == model.get_parameter(n).shape for n, values in state.items())


def run_muon(cls, shapes, steps, rows=None, **settings):
    """-> weights and momentum buffers after `steps` steps on the same random gradients. rows: how many each piece of
    the first matrix has, if it joins several."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    start = [p.detach().clone() for p in params]
    if rows:
        settings |= dict(names={p: str(i) for i, p in enumerate(params)}, pieces={"0": rows})
    opt = cls(params, lr=0.05, **settings)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    return start, [p.detach() for p in params], [opt.state[p]["momentum_buffer"] for p in params]


@pytest.mark.parametrize("momentum, weight_decay", [(0.95, 0.0), (0.8, 0.1)])
@pytest.mark.parametrize("steps", [1, 4])
def test_muon_is_torchs_muon(momentum, weight_decay, steps):
    """torch.optim.Muon computes in bf16, so ours does here: eight bits of mantissa, a few per cent of the update.

    The test also compares conventions: momentum buffers are running means (lerp), the rate sqrt(max(1, rows / cols)).
    """
    shapes = [(32, 32), (32, 32), (96, 24), (24, 96), (96, 24)]
    named = dict(momentum=momentum, weight_decay=weight_decay)
    start, ours, buffers = run_muon(Muon, shapes, steps, dtype=torch.bfloat16, **named)
    _, theirs, their_buffers = run_muon(
        torch.optim.Muon, shapes, steps, nesterov=True, eps=1e-7, ns_steps=5, adjust_lr_fn="original", **named
    )
    for a, b in zip(buffers, their_buffers, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for begin, a, b in zip(start, ours, theirs, strict=True):
        moved = b - begin
        assert (a - b).norm() < 0.02 * moved.norm()
    _, exact, _ = run_muon(Muon, shapes, steps, **named)
    for begin, a, b in zip(start, exact, theirs, strict=True):
        assert (a - b).norm() < 0.05 * (b - begin).norm()  # fp32 is the same method


def test_equal_shapes_in_one_batch_are_trained_as_each_alone():
    shapes = [(24, 16), (16, 24), (24, 16), (24, 16)]
    _, together, _ = run_muon(Muon, shapes, 3, weight_decay=0.1)

    def separately(params, **settings):
        opts = [Muon([p], **settings) for p in params]

        class Each:
            state = {p: opt.state[p] for p, opt in zip(params, opts, strict=True)}

            def step(self):
                for opt in opts:
                    opt.step()

        return Each()

    _, alone, _ = run_muon(separately, shapes, 3, weight_decay=0.1)
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on", [False, True])
def test_train_py_hands_its_settings_to_muon(on):
    defaults = {name: key.default for name, key in read_keys(ROOT / "train.py").items()}
    given = {"optimizer": "muon", "muon_momentum": 0.7, "muon_even_rows": on}
    layout, machine = SimpleNamespace(optimizer_options=dict), SimpleNamespace(dtype=torch.bfloat16)
    muon = train_script.make_optimizer(Settings(defaults | given), build(), layout, machine).by_kind["muon"]
    assert muon.even_rows is on and muon.dtype == torch.bfloat16
    assert muon.param_groups[0]["momentum"] == 0.7 and muon.param_groups[0]["lr"] == defaults["muon_learning_rate"]


def test_muon_leaves_a_weight_without_gradient_alone():
    a, b = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    before = a.detach().clone(), b.detach().clone()
    a.grad = torch.randn(4, 4)
    Muon([a, b], weight_decay=0.1).step()
    assert not torch.equal(a, before[0]) and torch.equal(b, before[1])


class Peers:
    """Ranks that are threads; an all-gather waits for all of them."""

    def __init__(self, ranks):
        self.ranks, self.own, self.barrier = ranks, [None] * ranks, threading.Barrier(ranks, timeout=60)

    def of(self, rank):
        return rank, self.ranks, lambda own: self.all_gather(rank, own)

    def all_gather(self, rank, own):
        self.own[rank] = own
        self.barrier.wait()
        gathered = torch.stack(self.own)
        self.barrier.wait()
        return gathered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("even_rows", [False, True])
def test_ranks_share_the_work_of_muon(ranks, dtype, even_rows, monkeypatch):
    """Each orthogonalises some of the matrices and keeps the whole state. All end with the same bits, which are those
    of one process up to rounding. Eight ranks are more than there are matrices."""
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16), (24, 16), (16, 24)]
    options = dict(rows=(16, 4, 4), weight_decay=0.1, dtype=dtype, even_rows=even_rows)
    _, alone, alone_buffers = run_muon(Muon, shapes, 3, **options)
    done = []  # matrices in each batch
    monkeypatch.setattr(optim, "orthogonalize", lambda G, *rest: done.append(len(G)) or orthogonalize(G, *rest))
    peers = Peers(ranks)

    def of(rank):
        return run_muon(Muon, shapes, 3, peers=peers.of(rank), **options)

    with ThreadPoolExecutor(ranks) as pool:
        _, there, buffers = zip(*pool.map(of, range(ranks)), strict=True)
    assert sum(done) == 3 * (len(shapes) + 2), "none is done twice"  # the first is three matrices
    for params, kept in zip(there, buffers, strict=True):
        assert all(map(torch.equal, params, there[0])) and all(map(torch.equal, kept, alone_buffers))
        assert all(torch.allclose(a, b, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
                   for a, b in zip(params, alone, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4, 12])
def test_muons_work_is_shared_out_evenly(ranks):
    """In runs, so that few shapes are divided; and no rank has much more than its share."""
    kinds = ([(64, 64), (32, 64), (32, 64)], [(64, 64)], [(64, 256)], [(64, 256)])  # c_attn is three matrices
    pieces = [shapes for shapes in kinds for _ in range(12)]
    owners = optim.share_out(pieces, ranks)
    flops = [sum(2 * n**2 * m + n**3 for n, m in shapes) for shapes in pieces]  # X X^T, A A, and a product with X
    assert owners == sorted(owners) and set(owners) == set(range(ranks))
    load = [sum(f for f, owner in zip(flops, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(load) <= sum(load) / ranks + max(flops)


# -----------------------------------------------------------------------------
# State


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # tensors and plain values alone


@every_toggle
@either
def test_a_loaded_state_continues_to_the_same_bits(toggle, optimizer):
    model = build(**toggle)
    opt = optimizers(model, optimizer)
    train(model, opt, range(4))
    half_way, saved = weights(model), through_a_file(opt.state_dict())
    train(model, opt, range(4, 8))

    def resumed(load):
        other = build(seed=9, **toggle)
        other.load_state_dict(half_way, strict=False)
        again = optimizers(other, optimizer)
        if load:
            again.load_state_dict(saved)
        train(other, again, range(4, 8))
        return other, again

    other, again = resumed(load=True)
    assert same(weights(other), weights(model))
    for kind, states in opt.state_dict().items():
        assert all(same(state, again.state_dict()[kind][name]) for name, state in states.items())
    other, _ = resumed(load=False)  # the control: without the state it is another run, in every weight that learns
    trained = weights(model)
    assert not any(torch.equal(p, trained[name]) for name, p in other.named_parameters() if p.ndim == 2)


def test_state_goes_by_the_names_of_parameters():
    """A model that lists its parameters in another order takes each one's own state, not its place's."""
    model = build()
    opt = optimizers(model)
    train(model, opt, range(3))
    other = copy.deepcopy(model)
    for module in (other.transformer, *other.transformer.h):
        turned = list(module._modules.items())[::-1]
        module._modules.clear()
        module._modules.update(turned)
    order = [name for name, _ in other.named_parameters()]
    assert order != list(weights(model)) and sorted(order) == sorted(weights(model))
    saved = through_a_file(opt.state_dict())
    again = optimizers(other)
    again.load_state_dict({kind: dict(list(states.items())[::-1]) for kind, states in saved.items()})
    for kind, states in again.state_dict().items():
        assert states.keys() == saved[kind].keys()
        assert all(same(state, saved[kind][name]) for name, state in states.items())
    train(model, opt, range(3, 6))
    train(other, again, range(3, 6))
    other = weights(other)
    assert all(torch.allclose(p, other[name], rtol=1e-4, atol=1e-5) for name, p in model.named_parameters())


def test_state_before_the_first_step_is_empty_and_loads():
    saved = through_a_file(optimizers(build()).state_dict())
    assert saved == {"adamw": {}, "muon": {}}
    model = build()
    opt = optimizers(model)
    opt.load_state_dict(saved)
    train(model, opt, range(1))


def trained_state(optimizer="muon", **toggle):
    model = build(**toggle)
    opt = optimizers(model, optimizer)
    train(model, opt, range(1))
    return through_a_file(opt.state_dict())


def test_a_state_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="muon.*adamw"):
        optimizers(build(), "adamw").load_state_dict(trained_state("muon"))
    with pytest.raises(ValueError, match="adamw.*muon"):
        optimizers(build(), "muon").load_state_dict(trained_state("adamw"))


@either
def test_a_state_of_another_shape_is_refused(optimizer):
    with pytest.raises(ValueError, match=r"c_attn.*shape \(48, 16\).*\(96, 32\)|wte.*shape \(64, 16\).*\(64, 32\)"):
        optimizers(build(n_embd=32), optimizer).load_state_dict(trained_state(optimizer))


@either
@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_proj.weight", "transformer.wte.weight"])
def test_a_state_that_lacks_a_parameter_is_refused(optimizer, name):
    """Silently starting one parameter's moments from zero is a damaged optimizer."""
    saved = trained_state(optimizer)
    del next(states for states in saved.values() if name in states)[name]
    with pytest.raises(ValueError, match=name):
        optimizers(build(), optimizer).load_state_dict(saved)


def test_a_state_with_a_parameter_that_is_not_there_is_refused():
    saved = trained_state()
    saved["muon"]["transformer.h.7.attn.c_attn.weight"] = saved["muon"]["transformer.h.0.attn.c_attn.weight"]
    with pytest.raises(ValueError, match="transformer.h.7.attn.c_attn.weight"):
        optimizers(build()).load_state_dict(saved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@either
def test_a_state_read_on_the_cpu_continues_on_the_gpu(optimizer):
    """checkpoint.py reads to the CPU; fused AdamW on CUDA wants its step count on the GPU."""
    model = build().cuda()
    saved = trained_state(optimizer)
    opt = optimizers(model, optimizer)
    opt.load_state_dict(saved)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert all(float(state["step"]) == 2 for state in opt.state_dict()["adamw"].values())


# -----------------------------------------------------------------------------
# Loss scaling


@pytest.mark.parametrize(
    "where", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.bias"],
)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("unscale", [True, False], ids=["clipped", "not clipped"])
def test_a_scaler_steps_both_optimizers_or_neither(where, bad, unscale):
    """fp16: one gradient of one optimizer overflows, and no weight of any may move."""
    model = build()
    opt = optimizers(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(overflow):
        scaler.scale(loss_at(model, 0)).backward()
        if overflow:
            dict(model.named_parameters())[where].grad.view(-1)[0] = bad
        if unscale:
            scaler.unscale_(opt)
        before = weights(model)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        after = weights(model)
        return [name for name in before if not torch.equal(before[name], after[name])]

    assert step(overflow=True) == [] and scaler.get_scale() == 2.0**9
    assert opt.state_dict() == {"adamw": {}, "muon": {}}
    assert set(step(overflow=False)) == set(weights(model))  # and the next step is taken


def test_a_scaled_step_is_the_unscaled_step():
    """Powers of two scale exactly, so the scaler changes no bit."""
    plain, scaled = build(), build()
    train(plain, optimizers(plain), range(1))
    opt, scaler = optimizers(scaled), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_at(scaled, 0)).backward()
    scaler.step(opt)
    assert same(weights(plain), weights(scaled))


# -----------------------------------------------------------------------------
# Schedules


def schedule(name, **changed):
    settings = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110, decay_frac=0.2)
    return [lr_at(step, schedule=name, **{**settings, **changed}) for step in range(150)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_starts_above_zero_and_ends_at_the_peak(name):
    rates = schedule(name)
    assert 0 < rates[0] < 0.1 + 1e-9
    assert rates[10] == 1.0 and max(rates) == 1.0
    rises = [b - a for a, b in zip(rates[:10], rates[1:11], strict=True)]
    assert rises == pytest.approx([rates[0]] * 10)  # linear
    assert schedule(name, warmup_iters=0)[0] == 1.0


def test_where_schedules_stand_half_way_and_at_the_end():
    cosine, linear, wsd = schedule("cosine"), schedule("linear"), schedule("wsd")
    for rates in (cosine, linear, wsd):
        assert rates[110:] == pytest.approx([0.1] * 40) and rates[109] > 0.1
    assert cosine[60] == pytest.approx(0.55) and linear[60] == pytest.approx(0.55)
    assert cosine[35] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2) and linear[35] == pytest.approx(0.775)
    assert wsd[10:89] == [1.0] * 79  # flat until the last 20% of 110
    assert wsd[88] == 1.0 and wsd[99] == pytest.approx(0.55)
    assert schedule("constant")[10:] == [1.0] * 140


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    peak=st.floats(1e-5, 1.0), floor=st.floats(0, 1), warmup=st.integers(0, 60), decay=st.integers(1, 60),
    share=st.floats(0, 1),
)
def test_after_warm_up_rates_never_rise_and_stay_in_bounds(name, peak, floor, warmup, decay, share):
    rates = [
        lr_at(step, learning_rate=peak, min_lr=floor * peak, schedule=name, warmup_iters=warmup, lr_decay_iters=decay,
              decay_frac=share)
        for step in range(130)
    ]
    assert rates[0] > 0 and rates[warmup] == pytest.approx(peak)
    assert all(a < b for a, b in zip(rates[:warmup], rates[1 : warmup + 1], strict=True))
    falls = rates[warmup:]
    assert all(a >= b - 1e-12 for a, b in zip(falls, falls[1:], strict=False))
    assert all(floor * peak - 1e-12 <= rate <= peak + 1e-12 for rate in falls)
    if name != "constant":
        assert rates[-1] == pytest.approx(floor * peak, abs=1e-12)
