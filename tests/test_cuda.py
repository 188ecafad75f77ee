"""What only a GPU can show: its kernels against plain formulas, CUDA graphs, events, peak memory, deterministic bits.

    python -m pytest -m cuda tests/test_cuda.py     # about a minute and a half; skipped where there is no GPU

It uses no fixture of conftest.py, so it also runs with --noconftest where hypothesis is missing.
"""

import copy
import gc
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import differences, outcome

import plan
from attention import attend
from benchmarks.common import forget_peak, only_sdpa
from cross_entropy import linear_cross_entropy
from device import autocast, memory_gb
from infer import Engine
from inference.int4 import Int4Linear
from inference.kvcache import attend_blocks
from inference.quantize import Int8Linear
from inference.rounding import round_groups
from inference.sampling import Sampling
from model import GPT, GPTConfig
from optim import Optimizers
from training.monitor import StepTimer

pytest_plugins = ["runs"]  # the dataset `words`
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.device("cuda")
HALF, FULL = torch.bfloat16, torch.float32

# How far the logits of two ways to compute them may lie apart, in standard deviations of the logits. Two ways in
# bfloat16 are 0.05 apart on a CPU; if attention misses one key, they are 2 or more apart.
NEAR = {HALF: 0.2, FULL: 1e-3}


def small_model(seed=0, sharp=1.0, **changes):
    """A GPT with random weights on the GPU. `sharp` multiplies the weights of the blocks: attention then rests on few
    tokens, so that a wrong one shows."""
    torch.manual_seed(seed)
    sizes = {"block_size": 256, "vocab_size": 1000, "n_layer": 2, "n_head": 4, "n_embd": 256}
    model = GPT(GPTConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            if p.ndim == 2:
                p.mul_(sharp)
    return model.to(CUDA)


def random_tokens(shape, vocab_size=1000, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(CUDA)


def relative_error(result, expected):
    """|result - expected| / |expected| over whole tensors, in fp64."""
    result = result.double().cpu()
    expected = expected.double().cpu()
    return float((result - expected).norm() / expected.norm())


# -----------------------------------------------------------------------------
# The engine


def record_draws(engine):
    """{request: [(its tokens so far, the logits that the next one is drawn from), ...]}, filled as the engine runs."""
    draws = {}
    draw = engine.draw

    def record(request, logits):
        draws.setdefault(request, []).append((list(request.ids), logits.float().cpu()))
        draw(request, logits)

    engine.draw = record
    return draws


def same_draw(logits, expected, tolerance):
    """Whether two rows of logits agree. If the two best tokens of `expected` are clearly apart, the greedy tokens must
    be equal as well."""
    close = (logits - expected).abs().max() < tolerance
    best, second = expected.topk(2).values
    return bool(close and (best - second < 2 * tolerance or logits.argmax() == expected.argmax()))


@pytest.mark.parametrize("n_kv_head", [0, 1, 2])
def test_greedy_tokens_in_bfloat16_are_those_of_spelled_out_attention(n_kv_head):
    """Prompts of about the sizes of the kernels' tiles, each followed by steps of one token."""
    model = small_model(sharp=4.0, n_kv_head=n_kv_head).eval().to(HALF)
    spelled_out = GPT(GPTConfig(**{**vars(model.config), "attn": "math"})).to(CUDA, HALF).eval()
    spelled_out.load_state_dict(model.state_dict())
    for length in (1, 2, 63, 64, 65, 127, 129):
        engine = Engine(model, draws=False)
        draws = record_draws(engine)
        request = engine.generate(random_tokens((length,), seed=length), max_new_tokens=6, temperature=0)
        assert len(draws[request]) == 6
        for ids, logits in draws[request]:
            with torch.no_grad():
                expected = spelled_out(torch.tensor([ids], device=CUDA))[0][0, -1].float().cpu()
            assert same_draw(logits, expected, NEAR[HALF] * expected.std()), (length, len(ids))


@pytest.mark.parametrize("n_kv_head, dtype", [(0, FULL), (2, FULL), (0, HALF)])
def test_a_replayed_graph_gives_what_the_step_gives_without_one(n_kv_head, dtype):
    """One to five requests run at once, and they join and leave: each graph is replayed for other requests, tables and
    lengths."""
    model = small_model(sharp=4.0, n_kv_head=n_kv_head).eval().to(dtype)
    prompts = [random_tokens((length,), seed=length).tolist() for length in (1, 17, 40, 5, 100, 33)]
    new_tokens = (30, 3, 18, 16, 12, 14)  # of each request: the second leaves before the others join
    records = []
    for batched in (True, False):
        engine = Engine(model, max_tokens=1024, batched=batched, draws=False)
        draws = record_draws(engine)
        requests = []
        for prompt, count in zip(prompts, new_tokens, strict=True):
            requests.append(engine.submit(prompt, max_new_tokens=count, temperature=0))
            for _ in range(2):
                engine.step()
        while engine.running or engine.waiting:
            engine.step()
        assert {rows for rows, _, _ in engine.passes} == ({1, 2, 4, 8} if batched else set())
        records.append([draws[request] for request in requests])
    compared = 0
    for with_graph, without in zip(*records, strict=True):
        for (ids, logits), (expected_ids, expected) in zip(with_graph, without, strict=True):
            if ids != expected_ids:
                break  # two tokens were equally likely, and from there on the texts differ
            assert same_draw(logits, expected, NEAR[dtype] * expected.std())
            compared += 1
    assert compared > sum(new_tokens) / 2


@pytest.mark.parametrize("compiled", [False, True])
def test_the_graph_draws_what_the_host_draws(compiled):
    """Requests of all kinds beside each other, in graphs with their draws, and with the model compiled in them."""
    model = small_model(sharp=4.0).eval()
    samplings = [Sampling(max_new_tokens=20, seed=1), Sampling(max_new_tokens=12, temperature=0),
                 Sampling(max_new_tokens=16, top_k=5, seed=4), Sampling(max_new_tokens=15, top_p=0.8, seed=5),
                 Sampling(max_new_tokens=14, min_p=0.1, frequency_penalty=0.5, repetition_penalty=1.2, seed=6)]
    prompts = [random_tokens((length,), seed=length).tolist() for length in (3, 17, 40, 5, 100)]
    hosts = Engine(model, max_tokens=1024, batched=False).generate(prompts, samplings)
    engine = Engine(model, max_tokens=1024)
    if compiled:
        engine.compile()
    devices = engine.generate(prompts, samplings)
    assert engine.draws is not None and any(variant for _, _, variant in engine.passes)
    same = sum(device.tokens == host.tokens for device, host in zip(devices, hosts, strict=True))
    assert same >= 4, "one may differ where a random number falls between two sums"


@pytest.mark.parametrize("heads, n_kv, dim, dtype", [(12, 12, 64, HALF), (9, 3, 64, HALF), (4, 1, 80, FULL)])
def test_paged_attention_is_that_of_gathered_keys(heads, n_kv, dim, dtype):
    from inference.paged import paged_attention

    torch.manual_seed(0)
    keys, values = (torch.randn(64, 16, n_kv, dim, device=CUDA, dtype=dtype) for _ in range(2))
    table = torch.randperm(64, device=CUDA).view(4, 16).int()
    lengths = torch.tensor([1, 17, 100, 256], device=CUDA, dtype=torch.int32)
    q = torch.randn(4, heads, dim, device=CUDA, dtype=dtype)
    expected = attend_blocks(q.double(), keys.double(), values.double(), table, lengths)
    found = paged_attention(q, keys, values, table, lengths).double()
    assert (found - expected).abs().max() < (2e-2 if dtype == HALF else 1e-5)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_weights_multiply_as_what_they_stand_for(group):
    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 512)
    layer = Int4Linear(*(part if part is None else part.to(CUDA) for part in round_groups(linear.weight, 4, group)))
    x = torch.randn(3, 1024, device=CUDA, dtype=HALF)
    expected = x.double() @ layer.weight().double().T
    assert (layer(x).double() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 3, 64, 65])
def test_int8_weights_multiply_as_what_they_stand_for(rows):
    """65 rows are multiplied as floats (kernels.MOST_ROWS)."""
    torch.manual_seed(0)
    layer = Int8Linear(torch.nn.Linear(256, 512)).to(CUDA)
    x = torch.randn(rows, 256, device=CUDA, dtype=HALF)
    weight = layer.weight.double() * layer.scale.double()[:, None]
    expected = x.double() @ weight.T + layer.bias.double()
    with torch.no_grad():
        y = layer.to(HALF)(x)
    assert relative_error(y, expected) < 2**-7


# -----------------------------------------------------------------------------
# Attention


def attention_and_gradients(attn, q, k, v):
    """Causal attention as `attn` computes it, and the gradients of a weighted sum of it."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    y = attend(*leaves, attn)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    return [y.detach(), *(t.grad for t in leaves)]


def random_heads(n_q, n_kv, dtype, tokens=160):
    """Queries, keys and values (2, tokens, heads, 64)."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, tokens, n, 64, generator=generator).to(CUDA, dtype) for n in (n_q, n_kv, n_kv)]


@pytest.mark.parametrize("dtype, tolerance", [(FULL, 1e-4), (HALF, 1e-2)])
@pytest.mark.parametrize("n_kv", [1, 2])
def test_query_heads_that_share_keys_attend_as_spelled_out(n_kv, dtype, tolerance):
    q, k, v = random_heads(4, n_kv, dtype)
    exact = attention_and_gradients("math", q.double(), k.double(), v.double())
    for tensor, expected in zip(attention_and_gradients("sdpa", q, k, v), exact, strict=True):
        assert relative_error(tensor, expected) < tolerance


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "math"])
def test_each_kernel_of_sdpa_is_attention(kernel):
    q, k, v = random_heads(4, 4, HALF)
    exact = attention_and_gradients("math", q.double(), k.double(), v.double())
    with only_sdpa(kernel, CUDA):
        try:
            tensors = attention_and_gradients("sdpa", q, k, v)
        except RuntimeError as e:
            needed = torch.cuda.get_device_capability() >= (8, 0) and kernel != "cudnn"
            assert not needed, f"this GPU should have it: {e}"
            pytest.skip(f"this GPU has no such kernel: {e}")
    for tensor, expected in zip(tensors, exact, strict=True):
        assert relative_error(tensor, expected) < 1e-2


# -----------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype, softcap, tolerance", [(FULL, 0.0, 1e-4), (HALF, 0.0, 2e-2), (HALF, 5.0, 2e-2)])
def test_the_fused_loss_is_that_of_whole_logits_in_float64(dtype, softcap, tolerance, compiled):
    torch.manual_seed(0)
    vocab_size, padded = 1000, 1024
    x = torch.randn(200, 128, device=CUDA).to(dtype).float()  # rounded, so that only the products are inexact
    table = (torch.randn(padded, 128, device=CUDA) / 8).to(dtype).float()
    targets = random_tokens((200,))
    targets[::7] = -1
    exact = [t.double().requires_grad_() for t in (x, table)]
    logits = (exact[0] @ exact[1].T)[:, :vocab_size]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    expected.backward()

    leaves = [t.clone().requires_grad_() for t in (x, table)]
    call = torch.compile(linear_cross_entropy, dynamic=False) if compiled else linear_cross_entropy
    with autocast(CUDA, dtype)():
        loss = call(*leaves, targets, vocab_size, softcap, piece=64 * padded)  # several pieces; the last is smaller
    loss.backward()
    torch.compiler.reset()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    for leaf, exact_leaf in zip(leaves, exact, strict=True):
        assert relative_error(leaf.grad, exact_leaf.grad) < tolerance


@pytest.mark.parametrize("optimizer, muon_dtype", [("adamw", FULL), ("muon", FULL), ("muon", HALF)])
def test_a_step_that_found_inf_changes_no_weight(optimizer, muon_dtype):
    model = small_model()
    opt = Optimizers(model, optimizer=optimizer, learning_rate=1e-2, weight_decay=0.1, muon_dtype=muon_dtype)

    def step(gradient, found_inf):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        opt.found_inf = torch.tensor(found_inf, device=CUDA)
        opt.step()
        return [torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True)]

    assert not any(step(0.1, 0.0))
    assert all(step(float("nan"), 1.0)) and all(step(float("inf"), 1.0))
    assert not any(step(0.1, 0.0))
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_parts_of_a_step_are_its_time():
    """The clock of the events against the host's, for a step of known length with nothing else in it."""
    cycles = 10**8  # about 50 ms
    timer = StepTimer(CUDA)
    for _ in range(2):  # the first is a warm-up
        torch.cuda.synchronize()
        began = time.perf_counter()
        timer.start()
        for part, count in (("forward_ms", 1), ("backward_ms", 2), ("optim_ms", 1)):
            for _ in range(count):
                torch.cuda._sleep(cycles)
            timer.mark(part)
        parts = timer.read()  # waits for the device
        wall = 1000 * (time.perf_counter() - began)
    assert 0.8 * wall < sum(parts.values()) < 1.02 * wall
    assert parts["backward_ms"] / parts["forward_ms"] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_the_peak_of_a_step_is_what_the_plan_says(dtype):
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=1024, n_layer=8, n_head=12, n_embd=768, bias=False)).to(CUDA)
    model.loss = partial(model.loss, fuse=True)  # as train.py does on CUDA, and as the plan counts
    opt = Optimizers(model, learning_rate=1e-3)
    x = random_tokens((16, 1024), 50257)
    context = autocast(CUDA, dtype)
    for _ in range(3):  # from the second update on the optimizer has its state
        forget_peak(CUDA)
        for _ in range(2):  # micro-steps: in the second the gradients exist already, as the plan counts them
            with context():
                _, loss = model(x, x, loss_only=True)
            loss.backward()
        opt.step()
        opt.zero_grad()
    planned = plan.step_memory(plan.costs_of(model), len(x), dtype, micro_steps=2, cuda=True)
    assert 1e9 * memory_gb(CUDA) - before == pytest.approx(planned["total"], rel=0.15), planned


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_in_float32_are_those_of_the_cpu(optimizer):
    on_gpu = small_model(block_size=64)
    on_cpu = copy.deepcopy(on_gpu).cpu()
    batches = [random_tokens((4, 65), seed=seed) for seed in range(4)]
    losses = {}
    for model in (on_gpu, on_cpu):
        where = next(model.parameters()).device
        opt = Optimizers(model, optimizer=optimizer, learning_rate=1e-3, muon_dtype=FULL)
        device_losses = losses[where.type] = []
        for step in range(20):
            tokens = batches[step % len(batches)].to(where)
            _, loss = model(tokens[:, :-1], tokens[:, 1:], loss_only=True)
            loss.backward()
            opt.step()
            opt.zero_grad()
            device_losses.append(float(loss.detach()))
    assert losses["cuda"][-1] < losses["cuda"][0] - 0.1, "it must learn, so that a wrong gradient would show"
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(words, tmp_path):
    def train(out_dir, max_iters, *more):
        sizes = ["--batch_size=4", "--block_size=32", "--n_layer=2", "--n_head=2", "--n_embd=64", "--dropout=0.1"]
        when = [f"--max_iters={max_iters}", "--lr_decay_iters=12", "--warmup_iters=2", "--eval_interval=6"]
        how = ["--device=cuda", "--dtype=bfloat16", "--deterministic=true", "--compile=false", "--eval_iters=2"]
        keys = [*sizes, *when, *how, "--learning_rate=1e-2", "--save_minutes=0", f"--dataset={words}"]
        command = [sys.executable, str(ROOT / "train.py"), *keys, f"--out_dir={out_dir}", *more]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path, env=dict(os.environ))
        assert done.returncode == 0, done.stderr

    train(tmp_path / "unbroken", 12)
    train(tmp_path / "stopped", 6)
    train(tmp_path / "stopped", 12, "--init_from=resume")
    assert differences(outcome(tmp_path / "stopped"), outcome(tmp_path / "unbroken")) == []
