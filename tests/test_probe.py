"""Probes: each figure against plain loops, and a run that is the same to the bit with them and without."""

import json
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from runs import differences, outcome, records

from device import autocast
from model import GPT, GPTConfig, apply_rope
from optim import Optimizers
from parallel import Layout
from training import probe

pytest_plugins = ["runs"]

SIZES = dict(block_size=12, vocab_size=31, n_layer=3, n_head=4, n_embd=32)
KINDS = {
    "GPT-2": dict(dropout=0.2),
    "modern": dict(pos="rope", norm="rmsnorm_nogain", norm_embed=True, qk_norm="rms", activation="swiglu", bias=False,
                   n_kv_head=1),
    "grouped": dict(pos="rope", norm="rmsnorm", qk_norm="rms_gain", activation="relu2", n_kv_head=2,
                    tie_weights=False, attn="math"),
}


def model_of(**changes):
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SIZES, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # attention that is not uniform
    return model


def by_hand(model, idx):
    """Entropy, largest logit and RMS by layer, query by query and head by head."""
    c = model.config
    x = model.embed(idx)[0]
    T, entropies, largest, rms = len(x), [], [], []
    for block in model.transformer.h:
        attn, heads = block.attn, []
        qkv = attn.c_attn(block.ln_1(x)).view(T, -1, c.head_dim)
        q, k, v = qkv.split((c.n_head, c.kv_heads, c.kv_heads), dim=1)
        if c.qk_norm != "none":
            q, k = (t / (t.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() for t in (q, k))
        if c.qk_norm == "rms_gain":
            q, k = q * attn.q_gain, k * attn.k_gain
        if c.pos == "rope":
            q, k = (apply_rope(t[None], *model.rope(T))[0] for t in (q, k))
        entropy, most = [], -math.inf
        for h in range(c.n_head):
            shared, out = h // (c.n_head // c.kv_heads), []
            for t in range(T):
                logits = [float(q[t, h] @ k[s, shared]) / math.sqrt(c.head_dim) for s in range(t + 1)]
                whole = sum(math.exp(z) for z in logits)
                weights = [math.exp(z) / whole for z in logits]
                entropy.append(-sum(w * math.log(w) for w in weights))
                most = max(most, *logits)
                out.append(sum(w * v[s, shared] for s, w in enumerate(weights)))
            heads.append(torch.stack(out))
        x = x + attn.c_proj(torch.cat(heads, dim=-1))
        x = x + block.mlp(block.ln_2(x))
        entropies.append(sum(entropy) / len(entropy))
        largest.append(most)
        rms.append(math.sqrt(float(x.square().sum()) / x.numel()))
    return {"attn_entropy": entropies, "attn_logit_max": largest, "act_rms": rms}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_what_loops_give(kind):
    model = model_of(**KINDS[kind])
    idx = torch.randint(31, (1, 12))
    found = probe.attention(model, idx, nullcontext)
    with torch.no_grad():
        wanted = by_hand(model.eval(), idx)
    assert found.keys() == wanted.keys()
    for key, by_layer in found.items():
        assert by_layer.tolist() == pytest.approx(wanted[key], rel=1e-4), key
    assert len(set(found["attn_entropy"].tolist())) == 3  # the layers differ


def test_the_logits_of_the_probes_pass_are_the_models():
    for changes in KINDS.values():
        model = model_of(**changes).eval()
        idx = torch.randint(31, (1, 12))
        logits, _ = model(idx, cache=probe.Attend(model, 12, idx.device))
        torch.testing.assert_close(logits, model(idx, last_only=True)[0], rtol=1e-4, atol=1e-5)


def test_uniform_attention_has_the_mean_of_the_logarithms():
    model = model_of()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
    found = probe.attention(model, torch.randint(31, (1, 12)), nullcontext)
    wanted = sum(math.log(t + 1) for t in range(12)) / 12
    assert found["attn_entropy"].tolist() == pytest.approx([wanted] * 3)
    assert found["attn_logit_max"].tolist() == [0.0] * 3


def test_attention_in_pieces_is_the_same(monkeypatch):
    model, idx = model_of(**KINDS["grouped"]), torch.randint(31, (1, 12))
    whole = probe.attention(model, idx, nullcontext)
    attend = probe.Attend.attend
    monkeypatch.setattr(probe.Attend, "attend", lambda *args: attend(*args, chunk=100))  # 2 queries, then 1 of 4 heads
    for key, by_layer in probe.attention(model, idx, nullcontext).items():
        torch.testing.assert_close(by_layer, whole[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    model, idx = model_of(**KINDS["modern"]), torch.randint(31, (1, 12))
    exact = probe.attention(model, idx, nullcontext)
    for key, by_layer in probe.attention(model, idx, autocast(idx.device, dtype)).items():
        assert by_layer.dtype == torch.float32
        assert by_layer.tolist() == pytest.approx(exact[key].tolist(), rel=0.1), key


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_no_trace(training):
    model, idx = model_of(dropout=0.5).train(training), torch.randint(31, (1, 12))
    _, loss = model(idx, idx)
    loss.backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    rng = torch.get_rng_state()
    first = probe.attention(model, idx, nullcontext)
    again = probe.attention(model, idx, nullcontext)
    assert all(torch.equal(first[key], again[key]) for key in first)  # without dropout
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(p, a) and torch.equal(p.grad, b)
               for p, (a, b) in zip(model.parameters(), before, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_what_fails_leaves_no_trace_either(monkeypatch):
    model = model_of()
    monkeypatch.setattr(probe.Attend, "attend", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe.attention(model, torch.randint(31, (1, 12)), nullcontext)
    assert model.training and not any(module._forward_hooks for module in model.modules())


# -----------------------------------------------------------------------------
# Gradients and updates by group


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_its_group(kind):
    model = model_of(**KINDS[kind])
    groups = probe.groups_of(model.config)
    found = {}
    for name, _ in model.named_parameters():
        found.setdefault(groups[probe.group_of(name, 3)], []).append(name)
    assert set(found) == set(groups)
    assert all(name.startswith("transformer.h.1.") for name in found["layer_1"])
    assert not any(name.startswith("transformer.h.") for name in found["embed"] + found.get("head", []))
    assert ("head" in groups) == (kind != "modern")  # tied, and its norm has no gain
    assert ("lm_head.weight" in found.get("head", [])) == (kind == "grouped")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_norms_and_ratios_are_what_they_say(kind, optimizer):
    model = model_of(**KINDS[kind])
    opt = Optimizers(model, optimizer=optimizer, learning_rate=1e-2, weight_decay=0.1)
    idx = torch.randint(31, (2, 12))
    model(idx, idx)[1].backward()
    layout = Layout()
    layout.place(model)
    norm = float(layout.grad_norm())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    update = probe.Update(model, layout.group_norms)
    opt.step()
    update.end()
    opt.zero_grad()
    found = update.read()
    for i, group in enumerate(probe.groups_of(model.config)):
        mine = [name for name in before if probe.group_of(name, 3) == i]
        flat = {key: torch.cat([t[name].flatten() for name in mine])
                for key, t in (("grad", grads), ("before", before), ("after", model.state_dict()))}
        assert found["grad_norms"][group] == pytest.approx(float(flat["grad"].norm()), rel=1e-5)
        ratio = float((flat["after"] - flat["before"]).norm() / flat["before"].norm())
        assert found["update_ratio"][group] == pytest.approx(ratio, rel=1e-4) and ratio > 1e-4
    assert math.hypot(*found["grad_norms"].values()) == pytest.approx(norm, rel=1e-5)


# -----------------------------------------------------------------------------
# In a run

PROBES = {"attn_entropy", "attn_logit_max", "act_rms", "grad_norms", "update_ratio"}


def without_probes(found):
    return {**found, "metrics": [{k: v for k, v in r.items() if k not in PROBES} for r in found["metrics"]]}


@pytest.mark.parametrize("settings", [
    dict(dropout=0.1, batch_size=2, gradient_accumulation_steps=2, context_start=4, optimizer="muon", pos="rope"),
    dict(dtype="bfloat16", activation_checkpointing="full"),
    dict(dtype="float16"),
], ids=["hard", "bfloat16", "float16"])
def test_a_run_is_the_same_with_probes_and_without(settings, tiny, tmp_path):
    for name, interval in (("with", 3), ("without", 0)):
        done = tiny(tmp_path / name, probe_interval=interval, **settings)
        assert done.code == 0 and done.err == "", done.err
    probed = [r["step"] for r in records(tmp_path / "with") if PROBES <= r.keys()]
    assert probed == [3, 6, 9, 12] and not any(PROBES & r.keys() for r in records(tmp_path / "without"))
    found = outcome(tmp_path / "with")
    assert differences(without_probes(found), outcome(tmp_path / "without")) == []
    for r in found["metrics"][2::3]:
        assert len(r["attn_entropy"]) == len(r["act_rms"]) == 1 and 0 < r["attn_entropy"][0] < math.log(16)
        assert math.hypot(*r["grad_norms"].values()) == pytest.approx(r["grad_norm"], rel=1e-5)
        assert r["update_ratio"].keys() == r["grad_norms"].keys() == {"embed", "layer_0", "head"}
        assert all(ratio > 0 for ratio in r["update_ratio"].values())


def test_a_probe_is_a_record_and_resumes_exactly(tiny, tmp_path):
    """Between log_interval's records, too; its time is not the step's; and after a resume it is the same again."""
    settings = dict(probe_interval=3, log_interval=100)
    assert tiny(tmp_path / "whole", **settings).code == 0
    found = {r["step"]: r for r in records(tmp_path / "whole")}
    assert list(found) == [3, 4, 6, 8, 9, 12] and "probe_ms" in found[3] and "probe_ms" not in found[4]
    assert found[3]["tok_per_s"] == pytest.approx(64 / found[3]["step_ms"] * 1000, abs=0.6, rel=1e-4)
    assert tiny(tmp_path / "half", max_iters=4, lr_decay_iters=12, **settings).code == 0
    assert tiny(tmp_path / "half", init_from="resume", lr_decay_iters=12, **settings).code == 0
    assert differences(outcome(tmp_path / "half"), outcome(tmp_path / "whole")) == []


def test_an_update_that_a_scaler_skips_is_none(tiny, tmp_path):
    """The gradient overflows in float16: its norms are null, and nothing has moved."""
    before = """
        import math, model
        forward, count = model.GPT.forward, []
        def poisoned(self, *args, **kwargs):
            logits, loss = forward(self, *args, **kwargs)
            count.extend([1] * self.training)
            if self.training and len(count) == 2:
                loss.register_hook(lambda grad: grad * math.inf)
            return logits, loss
        model.GPT.forward = poisoned
    """
    done = tiny(tmp_path, before=before, dtype="float16", probe_interval=2, max_iters=4)
    assert done.code == 0, done.err
    at_2, at_4 = (r for r in records(tmp_path) if "update_ratio" in r)
    assert set(at_2["update_ratio"].values()) == {0.0} and set(at_2["grad_norms"].values()) == {None}
    assert all(ratio > 0 for ratio in at_4["update_ratio"].values())


@pytest.fixture(scope="module")
def on_ranks(tiny, tmp_path_factory):
    """on_ranks(ranks, **settings): the last record of two steps of a small model."""
    settings = dict(batch_size=2, gradient_accumulation_steps=4, block_size=16, n_layer=4, n_head=2,
                    n_kv_head=1, n_embd=32, pos="rope", qk_norm="rms_gain", max_iters=2, warmup_iters=0,
                    learning_rate=1e-2, min_lr=1e-3, eval_interval=2, eval_iters=1, device="cpu", dtype="float32",
                    threads=1, probe_interval=2, save_minutes=0)

    def run(ranks, **changes):
        out = tmp_path_factory.mktemp("ranks")
        done = tiny(out, ranks=ranks if ranks > 1 else 0, **settings, **changes)
        assert done.code == 0, done.err
        return records(out)[-1]

    return run


@pytest.fixture(scope="module")
def one_process(on_ranks):
    return on_ranks(1)


@pytest.mark.parametrize("settings", [
    dict(tp_size=2),
    pytest.param(dict(), marks=pytest.mark.slow),
    pytest.param(dict(zero_stage=1), marks=pytest.mark.slow),
    dict(zero_stage=3),
    dict(pp_size=2),
    pytest.param(dict(pp_size=2, pp_schedule="interleaved"), marks=pytest.mark.slow),
    pytest.param(dict(pp_size=2, tp_size=2), marks=pytest.mark.slow),
], ids=["TP 2", "DDP", "ZeRO-1", "ZeRO-3", "PP 2", "PP 2 interleaved", "PP 2 x TP 2"])
def test_layouts_see_what_one_process_sees(settings, on_ranks, one_process):
    found = on_ranks(2 * settings.get("pp_size", 1) if "tp_size" in settings else 2, **settings)
    for key in PROBES:
        assert found[key] == pytest.approx(one_process[key], rel=1e-3), key


@pytest.mark.slow
def test_probes_beside_a_compiled_model(tiny, tmp_path):
    """The same figures to rounding. Only the evaluation compiles again, as it has no gradient; probes do not."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    before = "import torch\ntorch._logging.set_logs(recompiles=True)"
    done = tiny(tmp_path / "compiled", compile=True, probe_interval=2, max_iters=4, env=env, before=before)
    assert done.code == 0 and done.err.count("Recompiling") == done.err.count("grad_mode") == 1, done.err
    assert tiny(tmp_path / "plain", probe_interval=2, max_iters=4).code == 0
    for a, b in zip(records(tmp_path / "compiled"), records(tmp_path / "plain"), strict=True):
        for key in PROBES & b.keys():
            assert json.dumps(a[key]) and a[key] == pytest.approx(b[key], rel=1e-2)
