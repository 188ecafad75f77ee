"""The model: it is GPT-2, every toggle computes what its paper says, nothing looks ahead, and the counts are right."""

import ast
import copy
import math
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import attention as attention_file  # noqa: E402
import cross_entropy  # noqa: E402
import model as model_file  # noqa: E402
from configurator import read_keys  # noqa: E402
from model import GPT, GPTConfig, apply_rope  # noqa: E402
from optim import Optimizers  # noqa: E402

SMALL = dict(block_size=24, vocab_size=83, n_layer=2, n_head=4, n_embd=32)  # 83: the tables have 45 rows of padding

# every value that a field of GPTConfig can take, one at a time, and some together
TOGGLES = [
    {},
    {"pos": "rope"},
    {"pos": "rope", "rope_theta": 50.0},
    {"pos": "rope", "rope_scaling": "linear", "rope_factor": 3.0},
    {"pos": "rope", "rope_scaling": "ntk", "rope_factor": 3.0},
    {"pos": "rope", "rope_scaling": "yarn", "rope_factor": 1.5},
    {"norm": "rmsnorm"},
    {"norm": "rmsnorm_nogain"},
    {"norm_eps": 0.1},
    {"norm_embed": True},
    {"qk_norm": "rms"},
    {"qk_norm": "rms_gain"},
    {"activation": "gelu"},
    {"activation": "relu2"},
    {"activation": "swiglu"},
    {"mlp_width": 40},
    {"mlp_width": 56, "activation": "swiglu"},
    {"tie_weights": False},
    {"logit_softcap": 3.0},
    {"init_std": 0.0},
    {"zero_init": True},
    {"bias": False},
    {"dropout": 0.2},
    {"n_kv_head": 1},
    {"n_kv_head": 2},
    {"attn": "sdpa"},
    {"attn": "math"},
    {"attn": "math", "n_kv_head": 2, "pos": "rope", "qk_norm": "rms_gain"},
    {"pos": "rope", "norm": "rmsnorm_nogain", "norm_embed": True, "qk_norm": "rms", "activation": "relu2",
     "tie_weights": False, "zero_init": True},
    {"pos": "rope", "norm": "rmsnorm", "n_kv_head": 1, "qk_norm": "rms_gain", "activation": "swiglu",
     "tie_weights": False, "bias": False, "logit_softcap": 15.0, "norm_embed": True},
]
MODERN = TOGGLES[-2]

def label(toggle):
    return ",".join(f"{key}={value}" for key, value in toggle.items()) or "-"


every_toggle = pytest.mark.parametrize("toggle", TOGGLES, ids=label)


def build(seed=0, std=0.2, **sizes):
    """A small model in eval mode. With `std`, weights far enough from their initialisation that every part matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **sizes})).eval()
    if std:
        with torch.no_grad():
            for name, p in model.named_parameters():
                gain = name.endswith("_gain") or ".ln_" in name and name.endswith("weight")
                p.normal_(mean=1.0 if gain else 0.0, std=std)
    return model


def tokens(model, B=2, T=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (B, T or model.config.block_size), generator=generator)


def distance(a, b):
    """Largest difference, relative to the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def test_the_toggles_cover_every_field():
    assert {f.name for f in fields(GPTConfig)} - set(SMALL) <= {key for toggle in TOGGLES for key in toggle}


# -----------------------------------------------------------------------------
# It computes what it says


@pytest.mark.parametrize("n_layer", [1, 6])
def test_the_defaults_are_gpt2(n_layer):
    """Logits of transformers' GPT-2 with the same weights, ten times larger than usual: 1e-4 relative."""
    transformers = pytest.importorskip("transformers")
    ours = build(n_layer=n_layer, block_size=48, n_embd=64)
    c = ours.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )).eval()
    weights = {name: w for name, w in ours.state_dict().items() if not name.startswith("rope")}
    for name in weights:
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weights[name] = weights[name].T  # transformers' Conv1D is (in, out)
        elif name in ("transformer.wte.weight", "lm_head.weight"):
            weights[name] = weights[name][: c.vocab_size]
    theirs.load_state_dict(weights)  # strict: the names are GPT-2's as well
    idx = tokens(ours)
    with torch.no_grad():
        expected = theirs(idx).logits
        assert distance(ours(idx)[0], expected) < 1e-4
        erf = GPT(GPTConfig(**{**asdict(c), "activation": "gelu"})).eval()  # that small a difference is seen
        erf.load_state_dict(ours.state_dict())
        assert distance(erf(idx)[0], expected) > 1e-4


def reference(model, idx):
    """Logits (T, vocab_size) of one sequence in float64, by the papers' formulas, a head and a token at a time."""
    c, w = model.config, {name: p.detach().double() for name, p in model.state_dict().items()}
    T, D, n_kv = len(idx), c.n_embd // c.n_head, c.n_kv_head or c.n_head

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()

    def norm(x, name):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)  # LayerNorm is RMSNorm of what is centred
        return rms(x) * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0)

    def turn(i):  # of pair i from one position to the next
        s, first = c.rope_factor, c.block_size / c.rope_factor
        if c.rope_scaling == "ntk":
            return (c.rope_theta * s ** (D / (D - 2))) ** (-2 * i / D)
        angle = c.rope_theta ** (-2 * i / D)
        if c.rope_scaling == "yarn":  # the pairs that turn 32 times and once within the first context, rounded apart
            quick, slow = (D / 2 * math.log(first / (2 * math.pi * n), c.rope_theta) for n in (32, 1))
            quick, slow = max(0, math.floor(quick)), math.ceil(slow)
            slowed = min(1, max(0, (i - quick) / (slow - quick)))
            return angle * (1 - slowed) + angle / s * slowed
        return angle / s if c.rope_scaling == "linear" else angle

    def rotate(x):  # (T, D): the pairs (i, i + D/2) as complex numbers, turned by position * theta^(-2i/D)
        z = torch.complex(x[:, : D // 2], x[:, D // 2 :])
        frequency = torch.tensor([turn(i) for i in range(D // 2)], dtype=torch.float64)
        z = z * torch.exp(1j * torch.arange(T, dtype=torch.float64)[:, None] * frequency)
        z = z * (1 + 0.1 * math.log(c.rope_factor) if c.rope_scaling == "yarn" else 1)
        return torch.cat((z.real, z.imag), dim=-1)

    def attention(x, name):
        heads = linear(x, f"{name}.c_attn").split(D, dim=-1)  # queries, keys, values
        out = []
        for h in range(c.n_head):
            shared = h * n_kv // c.n_head  # the key and value head that this query head reads
            q, k, v = heads[h], heads[c.n_head + shared], heads[c.n_head + n_kv + shared]
            if c.qk_norm != "none":
                q, k = rms(q) * w.get(f"{name}.q_gain", 1.0), rms(k) * w.get(f"{name}.k_gain", 1.0)
            if c.pos == "rope":
                q, k = rotate(q), rotate(k)
            rows = []
            for t in range(T):
                score = (k[: t + 1] @ q[t] / math.sqrt(D)).exp()
                rows.append(score @ v[: t + 1] / score.sum())
            out.append(torch.stack(rows))
        return linear(torch.cat(out, dim=-1), f"{name}.c_proj")

    def mlp(x, name):
        h = linear(x, f"{name}.c_fc")
        if c.activation == "gelu":
            h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        elif c.activation == "gelu_tanh":
            h = h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        elif c.activation == "relu2":
            h = h.clamp(min=0) ** 2
        else:
            gate = linear(x, f"{name}.c_gate")
            h = gate / (1 + torch.exp(-gate)) * h
        return linear(h, f"{name}.c_proj")

    x = w["transformer.wte.weight"][idx]
    if c.pos == "learned":
        x = x + w["transformer.wpe.weight"][:T]
    if c.norm_embed:
        x = norm(x, "transformer.ln_e")
    for i in range(c.n_layer):
        block = f"transformer.h.{i}"
        x = x + attention(norm(x, f"{block}.ln_1"), f"{block}.attn")
        x = x + mlp(norm(x, f"{block}.ln_2"), f"{block}.mlp")
    head = w["transformer.wte.weight" if c.tie_weights else "lm_head.weight"][: c.vocab_size]
    logits = norm(x, "transformer.ln_f") @ head.T
    return c.logit_softcap * torch.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


@every_toggle
def test_logits_equal_a_float64_computation_by_hand(toggle):
    model = build(**toggle)
    idx = tokens(model)
    expected = torch.stack([reference(model, row) for row in idx])
    with torch.no_grad():
        assert distance(model(idx)[0], expected) < 1e-5  # fp32
        assert distance(model.double()(idx)[0], expected) < 1e-6  # what is left: rotary tables and softmax in fp32


@every_toggle
def test_no_logit_depends_on_a_later_token(toggle):
    """Exactly: a masked weight is 0, not small. And everything from the changed token on does change."""
    model = build(block_size=40, **toggle)
    idx = tokens(model, B=1)
    with torch.no_grad():
        before = model(idx)[0]
        for t in (1, 17, 39):
            other = idx.clone()
            other[0, t] = (idx[0, t] + 1) % model.config.vocab_size
            after = model(other)[0]
            assert torch.equal(after[:, :t], before[:, :t])
            assert (after[:, t:] != before[:, t:]).any(-1).all()


@every_toggle
def test_a_prefix_has_the_logits_it_has_in_the_whole(toggle):
    model = build(**toggle)
    idx = tokens(model)
    with torch.no_grad():
        whole = model(idx)[0]
        for T in (1, 7):
            assert distance(model(idx[:, :T])[0], whole[:, :T]) < 1e-5


@every_toggle
def test_shapes_and_what_is_returned(toggle):
    model = build(**toggle)
    for B, T in ((1, 1), (3, 7), (2, 24)):
        idx = tokens(model, B, T)
        logits, loss = model(idx)
        assert logits.shape == (B, T, 83) and loss is None
        assert distance(model(idx, last_only=True)[0], logits[:, -1:]) < 1e-5
        assert model(idx, last_only=True)[0].shape == (B, 1, 83)
        assert torch.equal(model(idx.int())[0], logits)
        logits, loss = model(idx, idx)
        expected = F.cross_entropy(logits.double().flatten(0, 1), idx.flatten())
        assert loss.shape == () and abs(loss - expected) < 1e-5 * expected
        none, alone = model(idx, idx, loss_only=True)
        assert none is None and abs(alone - expected) < 1e-5 * expected


@every_toggle
def test_bf16_autocast_runs_and_stays_close(toggle):
    model = build(std=0.05, **toggle)
    idx = tokens(model)
    exact = model(idx, idx)[1]
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, idx)
        alone = model(idx, idx, loss_only=True)[1]
    alone.backward()
    assert loss.dtype == alone.dtype == torch.float32  # the loss is never summed in bf16
    assert abs(loss - exact) < 0.02 * exact and abs(alone - exact) < 0.02 * exact
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("n_kv_head", [0, 2, 1], ids=["mha", "gqa", "mqa"])
def test_attention_backends_agree(n_kv_head):
    results = []
    for attn in ("math", "sdpa", "auto"):
        model = build(n_kv_head=n_kv_head, attn=attn, pos="rope")
        idx = tokens(model)
        logits, loss = model(idx, idx)
        loss.backward()
        results.append((logits, model.transformer.h[0].attn.c_attn.weight.grad))
    for logits, grad in results[1:]:
        assert distance(logits, results[0][0]) < 1e-5 and distance(grad, results[0][1]) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.skipif(attention_file.flash_attn_func is None, reason="needs flash-attn")
@pytest.mark.parametrize("n_kv_head", [0, 2, 1], ids=["mha", "gqa", "mqa"])
def test_flash_attention_agrees(n_kv_head):
    logits = []
    for attn in ("math", "flash"):
        model = build(n_kv_head=n_kv_head, attn=attn, pos="rope").cuda()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logits.append(model(tokens(model).cuda())[0])
    assert distance(logits[1], logits[0]) < 0.05


# -----------------------------------------------------------------------------
# Positions and heads


def test_rope_scores_depend_on_the_distance_alone():
    model = build(pos="rope", block_size=64, n_embd=128)
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k = (apply_rope(x.expand(1, 64, 1, 32), *model.rope(64))[0, :, 0] for x in (q, k))
    scores = q @ k.T  # the same query and key at every pair of positions
    for apart in (0, 1, 13, 50):
        along = scores.diagonal(-apart)
        assert (along - along[0]).abs().max() < 1e-5 * q[0].norm() * k[0].norm()
    assert scores[:, 0].std() > 0.1  # and on the distance they do depend
    assert torch.allclose(q.norm(dim=-1), q[0].norm(), rtol=1e-6)  # a rotation keeps lengths


ROPES = [{"head_dim": 64, "block_size": 8192, "rope_theta": 10000.0}, {"head_dim": 128, "block_size": 32768,
         "rope_theta": 500000.0}, {"head_dim": 8, "block_size": 64, "rope_theta": 10000.0}]


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn"])
@pytest.mark.parametrize("factor", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("sizes", ROPES, ids=str)
def test_stretched_positions_are_those_of_transformers(sizes, factor, scaling):
    """Angles to 1e-6, which are fp32 there, and the temperature of attention. It knows NTK-aware scaling as what its
    dynamic kind has at a length of so many times the first."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    first = sizes["block_size"] / factor
    if scaling == "none" or scaling == "yarn" and first != int(first):
        factor, first = 1.0, sizes["block_size"]
    ours = GPTConfig(pos="rope", rope_scaling=scaling, rope_factor=factor, block_size=sizes["block_size"],
                     rope_theta=sizes["rope_theta"], n_head=2, n_embd=2 * sizes["head_dim"])
    kind = {"none": "linear", "ntk": "dynamic"}.get(scaling, scaling)
    said = {"rope_type": kind, "rope_theta": ours.rope_theta, "factor": 1.0 if scaling == "ntk" else factor,
            "original_max_position_embeddings": int(first)}
    theirs = LlamaConfig(hidden_size=ours.n_embd, num_attention_heads=2, max_position_embeddings=int(first),
                         rope_parameters=said)
    seq_len = int(first) * factor if scaling == "ntk" else None
    frequency, temperature = utils.ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=seq_len)
    found, scale = model_file.rope_frequencies(ours)
    assert torch.allclose(found.float(), frequency, rtol=2e-6, atol=0) and scale == pytest.approx(temperature)
    if factor > 1:
        plain, _ = model_file.rope_frequencies(GPTConfig(pos="rope", rope_theta=ours.rope_theta, n_head=2,
                                                         n_embd=ours.n_embd))
        assert not torch.allclose(found, plain)
        assert found[-1] == pytest.approx(plain[-1] / factor)  # the slowest, in all three


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_positions_that_are_stretched_once_are_as_they_were(scaling):
    """To the bit: the default costs nothing, and a factor of 1 is none."""
    config = GPTConfig(**SMALL, pos="rope", rope_scaling=scaling, rope_factor=1.0)
    plain = model_file.rope_tables(GPTConfig(**SMALL, pos="rope"))
    half = torch.arange(0, 8, 2, dtype=torch.float64) / 8
    angle = torch.outer(torch.arange(24).double(), 10000.0**-half)
    assert torch.equal(plain[0][:, :4], angle.cos().float()) and torch.equal(plain[1][:, 4:], angle.sin().float())
    assert all(torch.equal(a, b) for a, b in zip(model_file.rope_tables(config), plain, strict=True))


@pytest.mark.parametrize("pos", ["learned", "rope"])
@pytest.mark.parametrize("attn", ["math", "sdpa"])
def test_qk_norm_gives_queries_and_keys_of_unit_rms(monkeypatch, pos, attn):
    seen = []
    attend = model_file.attend

    def spy(q, k, *rest, **named):
        seen.extend((q, k))
        return attend(q, k, *rest, **named)

    monkeypatch.setattr(model_file, "attend", spy)
    model = build(qk_norm="rms", pos=pos, attn=attn, n_kv_head=2)
    model(tokens(model))
    assert len(seen) == 2 * model.config.n_layer
    for x in seen:
        assert (x.square().mean(-1).sqrt() - 1).abs().max() < 1e-3


def with_all_heads(model, heads_of):
    """The model with key and value heads written out: one for each query head, taken from `heads_of` it."""
    c = model.config
    full = GPT(GPTConfig(**{**asdict(c), "n_kv_head": 0})).eval()
    weights = model.state_dict()
    for name in [n for n in weights if ".c_attn." in n]:
        heads = weights[name].split(c.head_dim)
        kv = c.n_kv_head
        k, v = heads[c.n_head : c.n_head + kv], heads[c.n_head + kv :]
        picked = [k[heads_of(h)] for h in range(c.n_head)] + [v[heads_of(h)] for h in range(c.n_head)]
        weights[name] = torch.cat([*heads[: c.n_head], *picked])
    full.load_state_dict(weights)
    return full


@pytest.mark.parametrize("n_kv_head, heads_of", [(1, lambda h: 0), (2, lambda h: h // 2)], ids=["mqa", "gqa"])
def test_shared_heads_are_repeated_heads(n_kv_head, heads_of):
    model = build(n_kv_head=n_kv_head, pos="rope", qk_norm="rms_gain")
    full, idx = with_all_heads(model, heads_of), tokens(model)
    with torch.no_grad():
        assert distance(model(idx)[0], full(idx)[0]) < 1e-5


def test_a_key_head_for_every_query_head_is_plain_attention():
    plain, spelled = build(n_kv_head=0), build(n_kv_head=4)
    idx = tokens(plain)
    assert torch.equal(plain(idx)[0], spelled(idx)[0])


@pytest.mark.parametrize("n_kv_head, ranks", [(0, 2), (0, 4), (2, 2), (1, 2), (1, 4), (2, 4)])
def test_a_shard_with_some_of_the_heads_is_the_same_module(n_kv_head, ranks):
    """Tensor parallelism (Shoeybi et al. 2019): c_attn by heads, c_proj by columns; the shards' outputs add up.

    With fewer key heads than ranks each rank holds the one that its query heads read.
    """
    model = build(n_kv_head=n_kv_head, pos="rope", qk_norm="rms_gain")
    whole, c = model.transformer.h[0].attn, model.config
    x, kv, D = torch.randn(2, 24, c.n_embd), c.kv_heads, c.head_dim
    total = whole.c_proj.bias.detach().clone()
    for rank in range(ranks):
        mine = range(rank * c.n_head // ranks, (rank + 1) * c.n_head // ranks)
        read = sorted({h * kv // c.n_head for h in mine})
        rows = [*mine, *(c.n_head + h for h in read), *(c.n_head + kv + h for h in read)]
        rows = torch.cat([torch.arange(h * D, (h + 1) * D) for h in rows])
        columns = torch.cat([torch.arange(h * D, (h + 1) * D) for h in mine])
        shard = copy.deepcopy(whole)
        shard.c_attn = torch.nn.Linear(c.n_embd, len(rows))
        shard.c_proj = torch.nn.Linear(len(columns), c.n_embd, bias=False)
        with torch.no_grad():
            shard.c_attn.weight.copy_(whole.c_attn.weight[rows])
            shard.c_attn.bias.copy_(whole.c_attn.bias[rows])
            shard.c_proj.weight.copy_(whole.c_proj.weight[:, columns])
            total = total + shard(x, model.rope(24))
    assert distance(total, whole(x, model.rope(24))) < 1e-5


def test_more_tokens_than_block_size_are_refused():
    model = build()
    with pytest.raises(ValueError, match="block_size"):
        model(torch.zeros(1, 25, dtype=torch.long))


# -----------------------------------------------------------------------------
# Documents in one row

DOCUMENTS = [[7, 1, 16], [24], [3, 2, 1, 1, 9, 8]]  # the lengths of each row's
KINDS = ("sdpa", "math", "varlen", "flex")
PACKED = [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "pos": "rope"}, MODERN]


def documents_of(rows):
    """Lengths of documents -> docs (B, T): their numbers rise, from anywhere and by any step"""
    numbered = [torch.arange(len(row)) * 3 + i for i, row in enumerate(rows)]
    return torch.stack([n.repeat_interleave(torch.tensor(row)) for n, row in zip(numbered, rows, strict=True)])


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
           causal=False, deterministic=False):
    """What flash-attn's function of this kind computes: q, k, v (tokens, heads, D) of sequences one after another."""
    assert causal and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff()
    assert cu_seqlens_q[0] == 0 and lengths.min() > 0 and lengths.max() == max_seqlen_q == max_seqlen_k
    outputs = []
    for parts in zip(*[x.transpose(0, 1).split(lengths.tolist(), dim=1) for x in (q, k, v)], strict=True):
        outputs.append(F.scaled_dot_product_attention(*parts, dropout_p=dropout_p, is_causal=True, enable_gqa=True))
    return torch.cat(outputs, dim=1).transpose(0, 1)


@pytest.fixture
def force(monkeypatch):
    """force(kind): documents are kept apart by this kernel, also where pick_attention would not take it."""
    pick = attention_file.pick_attention

    def force(kind):
        monkeypatch.setattr(attention_file, "pick_attention", lambda *args, docs=False, **options:
                            (kind, "forced") if docs else pick(*args, **options))
        monkeypatch.setattr(attention_file, "flash_attn_varlen_func", varlen)
        # PyTorch refuses FlexAttention's backward pass on a CPU, where it is not compiled but computes the same
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)

    return force


def learn(model, *batches):
    """-> the gradients of the summed losses of some (idx, targets, options)"""
    model.zero_grad()
    for idx, targets, options in batches:
        model(idx, targets, loss_only=True, **options)[1].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("toggle", PACKED, ids=label)
def test_packed_documents_compute_what_each_computes_alone(toggle, kind, force):
    force(kind)
    model = build(**toggle)
    idx, docs = tokens(model, B=3), documents_of(DOCUMENTS)
    targets, divisor = masked_targets(model, idx), torch.tensor(10.0)
    alone = []  # (idx, targets, options) of each document
    for row, lengths in enumerate(DOCUMENTS):
        pairs = zip(idx[row : row + 1].split(lengths, 1), targets[row : row + 1].split(lengths, 1), strict=True)
        alone += [(x, y, {"divisor": divisor}) for x, y in pairs]

    packed = model(idx, docs=docs)[0]
    expected = torch.cat([model(x)[0] for x, _, _ in alone], 1).view(packed.shape)
    assert distance(packed, expected) < 1e-5
    grads = learn(model, (idx, targets, {"docs": docs, "divisor": divisor}))
    expected_grads = learn(model, *alone)
    scale = max(grad.abs().max() for grad in expected_grads.values())  # a key's bias has a gradient of 0, but rounded
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).norm() < 1e-5 * max(expected_grads[name].norm(), 1e-2 * scale), name

    # negative control: without docs every document but a row's first one is another, and one alone in its row is not
    mixed = model(idx)[0]
    first = docs == docs[:, :1]
    assert distance(mixed[first], expected[first]) < 1e-5
    assert ((mixed - expected)[~first].abs().amax(-1) > 1e-3).all()
    table = "transformer.wte.weight"
    assert distance(learn(model, (idx, targets, {"divisor": divisor}))[table], expected_grads[table]) > 1e-2


def test_learned_positions_restart_in_each_document(monkeypatch):
    docs = documents_of(DOCUMENTS)
    positions = torch.cat([torch.arange(n) for row in DOCUMENTS for n in row]).view(docs.shape)
    assert torch.equal(attention_file.positions_within(docs), positions)
    model = build()
    idx = tokens(model, B=3)
    expected = model(idx, docs=docs)[0]
    monkeypatch.setattr(model_file, "positions_within", lambda docs: torch.arange(24).expand(docs.shape))
    moved = (model(idx, docs=docs)[0] - expected).abs().amax(-1) > 1e-3  # negative control: it matters that they do
    assert torch.equal(moved, docs != docs[:, :1])


@pytest.mark.parametrize("T", [24, 128, 300, 512])
def test_the_blocks_of_a_mask_are_pytorchs(T):
    from torch.nn.attention.flex_attention import create_block_mask

    docs = (torch.rand(3, T, generator=torch.Generator().manual_seed(0)) < 0.01).long().cumsum(1)
    docs[1] = 0  # one document: below the diagonal, blocks are whole
    same = docs[:, :, None] == docs[:, None, :]
    ours = attention_file.to_block_mask(same.tril()[:, None], docs)
    theirs = create_block_mask(ours.mask_mod, 3, None, T, T, device="cpu")
    assert ours.shape == theirs.shape and torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
                 "full_q_num_blocks", "full_q_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert T < 256 or ours.full_kv_num_blocks.any()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_depends_on_another_document(kind, force):
    """Exactly, and on no later token of its own either."""
    force(kind)
    model, docs = build(n_kv_head=2), documents_of(DOCUMENTS)[:1]
    idx = tokens(model, B=1)
    with torch.no_grad():
        before = model(idx, docs=docs)[0]
        for t in (3, 7, 12):
            other = idx.clone()
            other[0, t] = (idx[0, t] + 1) % 83
            changed = (model(other, docs=docs)[0] != before).any(-1)[0]
            assert torch.equal(changed, (docs[0] == docs[0, t]) & (torch.arange(24) >= t))


@pytest.mark.parametrize("toggle", [{}, MODERN], ids=label)
def test_documents_under_bf16_and_dropout(toggle):
    model, docs = build(std=0.05, **toggle), documents_of(DOCUMENTS)
    idx = tokens(model, B=3)
    exact = model(idx, idx, docs=docs)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx, docs=docs, loss_only=True)[1]
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02 * exact
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    wet = build(**toggle, dropout=0.3).train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(wet(idx, idx, docs=docs, loss_only=True)[1].detach()))
    assert losses[0] == losses[1] != losses[2]


def test_dropout_reaches_attention_between_documents(monkeypatch):
    seen = []
    attend = model_file.attend
    monkeypatch.setattr(model_file, "attend", lambda *args, **options: seen.append(options) or attend(*args, **options))
    model, docs = build(dropout=0.3), documents_of(DOCUMENTS)
    for training in (True, False):
        model.train(training)(tokens(model, B=3), docs=docs)
    assert [options["dropout"] for options in seen] == [0.3, 0.3, 0.0, 0.0]
    assert seen[0]["apart"] is seen[1]["apart"], "made once, shared by the layers"


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind, toggle", [
    ("sdpa", {}), pytest.param("math", MODERN, marks=pytest.mark.slow), ("flex", {"pos": "rope", "n_kv_head": 2}),
], ids=str)
def test_documents_compile_to_one_graph_for_any_documents(kind, toggle, force):
    force(kind)
    model = build(n_layer=1, **toggle)
    idx = tokens(model, B=3)
    targets, divisor = masked_targets(model, idx), torch.tensor(10.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (DOCUMENTS, [[24], [12, 12], [1] * 24]):
            options = {"docs": documents_of(rows), "divisor": divisor}
            grads = learn(model, (idx, targets, options))
            for name, grad in learn(compiled, (idx, targets, options)).items():
                plain = grads[name.removeprefix("_orig_mod.")]
                assert (grad - plain).norm() <= 1e-5 * max(plain.norm(), 1e-3), name


@pytest.mark.parametrize("kind", ["sdpa", "flex"])
def test_documents_with_parts_compiled_alone(kind, force):
    """As Layout.compile does where collectives lie between the parts: what keeps documents apart is made outside."""
    force(kind)
    model, docs = build(n_kv_head=2), documents_of(DOCUMENTS)
    idx = tokens(model, B=3)
    expected = learn(model, (idx, idx, {"docs": docs}))
    torch._dynamo.reset()
    for block in model.transformer.h:
        block.attn.forward = torch.compile(block.attn.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    for other in (documents_of([[12, 12]] * 3), docs):
        grads = learn(model, (idx, idx, {"docs": other}))
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-5 * max(expected[name].norm(), 1e-3), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("n_kv_head", [0, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
def test_documents_on_a_gpu_compute_what_they_compute_on_a_cpu(compiling, n_kv_head):
    """Compiled this is FlexAttention, on keys and values that are views; otherwise flash-attn, or SDPA with a mask."""
    model = build(block_size=300, n_embd=64, pos="rope", n_kv_head=n_kv_head)
    idx, docs = tokens(model), documents_of([[70, 130, 100], [300]])
    with torch.no_grad():
        expected, mixed = model(idx, docs=docs)[0], model(idx)[0]
        model = model.cuda()
        run = torch.compile(model, dynamic=False) if compiling else model
        with torch.autocast("cuda", torch.bfloat16):
            found = run(idx.cuda(), docs=docs.cuda())[0].cpu()
    assert distance(found, expected) < 0.05 < distance(mixed, expected)


def test_documents_do_not_lengthen_the_context():
    model = build()
    with pytest.raises(ValueError, match="block_size"):
        model(torch.zeros(1, 25, dtype=torch.long), docs=torch.arange(25)[None] // 5)


# -----------------------------------------------------------------------------
# The loss


def test_the_loss_is_divided_by_the_divisor_and_without_targets_it_is_0():
    """Without a divisor it is the mean, to the bit, as before there were any."""
    model = build()
    idx = tokens(model, B=3)
    targets = masked_targets(model, idx)
    logits, loss = model(idx, targets)
    alone = model(idx, targets, loss_only=True)[1]
    assert torch.equal(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1))
    total = model(idx, targets, loss_only=True, divisor=torch.tensor(1.0))[1]
    assert torch.equal(alone, total / (targets != -1).sum())
    for loss_only in (False, True):
        loss = model(idx, targets, divisor=torch.tensor(7.0), loss_only=loss_only)[1]
        assert loss.item() == pytest.approx(total.item() / 7, rel=1e-6)
        for divisor in (None, torch.tensor(7.0)):
            model.zero_grad()
            none = model(idx, torch.full_like(idx, -1), divisor=divisor, loss_only=loss_only)[1]
            none.backward()
            assert none == 0 and none.dtype == torch.float32
            assert not any(p.grad.any() for p in model.parameters())  # 0, and not NaN


def test_a_loss_that_is_not_finite_stays_so():
    """Only a loss without targets is 0: a run that diverges must see it."""
    model = build()
    with torch.no_grad():
        model.transformer.wte.weight[:] = float("nan")
    for loss_only in (False, True):
        assert model(tokens(model), tokens(model), loss_only=loss_only)[1].isnan()


def masked_targets(model, idx):
    """Targets of which very different shares are ignored in different rows: a mean of means would show."""
    targets = tokens(model, *idx.shape, seed=2)
    targets[0, 3:] = -1
    targets[1, ::5] = -1
    return targets


@pytest.mark.parametrize("toggle", [{}, {"tie_weights": False, "logit_softcap": 3.0}], ids=["tied", "untied, capped"])
def test_the_loss_in_pieces_is_the_loss(toggle, monkeypatch):
    model = build(**toggle)
    idx = tokens(model, B=3)
    targets = masked_targets(model, idx)
    counted = targets != -1

    def run(loss):
        model.zero_grad()
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    logits = model(idx)[0]
    expected = -logits.double().log_softmax(-1)[counted].gather(-1, targets[counted][:, None]).mean()
    plain, grads = run(model(idx, targets)[1])
    assert abs(plain - expected) < 1e-6 * expected

    for rows in (0, 1, 7, 24, 71, 72):  # 7 and 71 do not divide 72
        monkeypatch.setitem(cross_entropy.PIECE, "cpu", rows * 128 * (2 if toggle else 1) or 2**25)
        loss, other = run(model(idx, targets, loss_only=True)[1])
        assert abs(loss - expected) < 1e-6 * expected
        for name in grads:
            assert (other[name] - grads[name]).abs().max() < 1e-5 * grads[name].abs().max(), name


@pytest.mark.parametrize("tie_weights", [True, False])
def test_padding_of_the_vocabulary_is_in_nothing(tie_weights):
    model = build(tie_weights=tie_weights)
    assert model.lm_head.weight.shape[0] == 128
    idx = tokens(model)
    logits, loss = model(idx, idx)
    alone = model(idx, idx, loss_only=True)[1]
    loss.backward()
    for table in {model.lm_head.weight, model.transformer.wte.weight}:
        assert not table.grad[83:].any() and table.grad[:83].any()
        with torch.no_grad():
            table[83:] = 1000.0
    assert torch.equal(model(idx)[0], logits) and torch.equal(model(idx, idx, loss_only=True)[1], alone)


# -----------------------------------------------------------------------------
# Generation, the plain way


@pytest.fixture
def opinionated():
    """A model whose padded rows would win every draw, were they tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        model.transformer.wte.weight[SMALL["vocab_size"] :] *= 50
    return model


def nanogpt_generate(model, idx, max_new_tokens, temperature=1.0, top_k=None):
    """generate of nanoGPT's model.py, line by line."""
    for _ in range(max_new_tokens):
        idx_cond = idx if idx.size(1) <= model.config.block_size else idx[:, -model.config.block_size :]
        logits, _ = model(idx_cond)
        logits = logits[:, -1, :] / temperature
        if top_k is not None:
            v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
            logits[logits < v[:, [-1]]] = -float("Inf")
        probs = F.softmax(logits, dim=-1)
        idx_next = torch.multinomial(probs, num_samples=1)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"temperature": 1.5, "top_k": 500}])
def test_generate_draws_what_nanogpt_draws(opinionated, options):
    """From the same global seed, past the end of the context."""
    idx = torch.tensor([[3, 1, 4], [15, 9, 2]])
    torch.manual_seed(7)
    with torch.no_grad():
        expected = nanogpt_generate(opinionated, idx, 40, **options)
    torch.manual_seed(7)
    found = opinionated.generate(idx, 40, **options)
    assert found.dtype == torch.long and found.shape == (2, 43) and torch.equal(found, expected)
    assert torch.equal(found[:, :3], idx) and found.max() < SMALL["vocab_size"]


def test_greedy_generation_takes_the_most_likely_token(opinionated):
    state = torch.get_rng_state()
    found = opinionated.generate(torch.tensor([[3, 1, 4]]), 30, temperature=0)
    assert torch.equal(torch.get_rng_state(), state), "greedy draws nothing"
    for end in range(3, 33):
        with torch.no_grad():
            logits, _ = opinionated(found[:, max(0, end - SMALL["block_size"]) : end])
        assert found[0, end] == logits[0, -1].argmax()
    assert torch.equal(opinionated.generate(torch.tensor([[3, 1, 4]]), 30, temperature=2.0, top_k=1), found)


def test_generate_with_a_generator_leaves_the_global_random_numbers_alone(opinionated):
    idx = torch.tensor([[3, 1, 4]])
    state = torch.get_rng_state()
    found = [opinionated.generate(idx, 20, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(opinionated.generate(idx, 0), idx)


# -----------------------------------------------------------------------------
# How it starts


@pytest.mark.parametrize("bias", [True, False])
def test_initial_weights_are_gpt2s(bias):
    model = build(std=0, n_layer=8, n_embd=128, vocab_size=1024, bias=bias, tie_weights=False, activation="swiglu",
                  qk_norm="rms_gain")
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 1 / sqrt(2 * 8 layers)
            n = p.numel()  # an estimate of the deviation spreads by std / sqrt(2 n), of the mean by std / sqrt(n)
            assert abs(p.std() - std) < 5 * std / math.sqrt(2 * n), name
            assert abs(p.mean()) < 5 * std / math.sqrt(n), name
    assert any(name.endswith("bias") for name, _ in model.named_parameters()) == bias


def test_init_std_is_that_of_the_blocks_matrices_alone():
    """0: 1 / sqrt(inputs), with which a matrix keeps the size of what passes it. The embedding and the head stay."""
    sizes = dict(std=0, n_layer=8, n_embd=128, vocab_size=1024, tie_weights=False)
    usual = dict(build(**sizes).named_parameters())
    for init_std in (0.05, 0.0):
        for name, p in build(init_std=init_std, **sizes).named_parameters():
            if p.ndim == 2 and name.startswith("transformer.h."):
                std = init_std or p.size(1) ** -0.5
                if name.endswith("c_proj.weight"):
                    std = std / 4  # 1 / sqrt(2 * 8 layers)
                assert abs(p.std() - std) < 5 * std / math.sqrt(2 * p.numel()), name
            elif p.ndim == 2:
                n = p.numel()
                assert abs(p.std() - usual[name].std()) < 5 * 0.02 / math.sqrt(n), name


def test_an_untrained_model_knows_nothing():
    model = build(std=0, vocab_size=1024, n_embd=64)
    idx = tokens(model, B=8)
    assert abs(model(idx, idx.roll(1))[1] - math.log(1024)) < 0.1


def test_zero_init_begins_with_blocks_that_do_nothing():
    tied = build(std=0, zero_init=True)
    idx = tokens(tied)
    assert torch.equal(tied(idx)[0], tied.head(tied.embed(idx))) and tied(idx)[0].any()
    untied = build(std=0, zero_init=True, tie_weights=False)
    assert not untied(idx)[0].any()
    residual = [p for name, p in untied.named_parameters() if name.endswith("c_proj.weight")]
    assert len(residual) == 4 and not any(p.any() for p in residual)
    untied(idx, idx)[1].backward()
    assert untied.lm_head.weight.grad.any()  # and it can leave there


def test_a_tied_head_is_one_parameter():
    tied, untied = build(), build(tie_weights=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert "lm_head.weight" not in dict(tied.named_parameters()) and "lm_head.weight" in dict(untied.named_parameters())
    assert untied.num_params() - tied.num_params() == 83 * 32
    assert untied.num_params(padding=True) - tied.num_params(padding=True) == 128 * 32


def test_softcap_bounds_the_logits():
    raw, capped = build(std=1.0), build(std=1.0, logit_softcap=2.0)
    idx = tokens(raw)
    assert raw(idx)[0].abs().max() > 4
    assert capped(idx)[0].abs().max() <= 2
    assert torch.allclose(capped(idx)[0], 2 * torch.tanh(raw(idx)[0] / 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attn", ["math", "sdpa"])
def test_dropout_drops_in_training_alone(attn):
    plain, model = build(attn=attn), build(attn=attn, dropout=0.5)
    idx = tokens(model)

    def run(seed):
        torch.manual_seed(seed)
        return model(idx)[0]

    assert torch.equal(run(1), plain(idx)[0])  # in eval mode it is the model without
    model.train()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    plain.train()
    assert torch.equal(plain(idx)[0], plain(idx)[0])


@pytest.mark.parametrize("attn", ["math", "sdpa"])
def test_dropout_is_after_embedding_attention_and_mlp(attn):
    """Each place alone: what comes out is zero, or what came in over 1 - p."""
    model = build(attn=attn, dropout=0.5).train()
    idx, x = tokens(model), torch.randn(2, 24, 32)
    block = model.transformer.h[0]
    for place in (lambda: model.embed(idx), lambda: block.mlp(x)):
        model.eval()
        whole = place()
        model.train()
        dropped = place()
        zero = dropped == 0
        assert 0.4 < zero.float().mean() < 0.6
        assert torch.allclose(dropped[~zero], 2 * whole[~zero], rtol=1e-5, atol=1e-6)
    out = block.attn(x)
    assert 0.4 < (out == 0).float().mean() < 0.6
    with torch.no_grad():  # dropout hits its weights as well: token 0 reads only itself, so all of a head or nothing
        block.attn.c_proj.weight.copy_(torch.eye(32))
        block.attn.c_proj.bias.zero_()
    heads = block.attn(torch.randn(500, 1, 32)).view(500, 4, 8)
    assert 0.4 < (heads == 0).all(-1).float().mean() < 0.6


# -----------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize("wrong, named", [
    ({"pos": "alibi"}, ["pos", "alibi", "learned", "rope"]),
    ({"norm": "batchnorm"}, ["norm", "batchnorm", "layernorm", "rmsnorm", "rmsnorm_nogain"]),
    ({"qk_norm": "l2"}, ["qk_norm", "l2", "none", "rms", "rms_gain"]),
    ({"activation": "relu"}, ["activation", "relu", "gelu", "gelu_tanh", "relu2", "swiglu"]),
    ({"attn": "xformers"}, ["attn", "xformers", "auto", "sdpa", "flash", "math"]),
    ({"block_size": 0}, ["block_size"]),
    ({"vocab_size": 0}, ["vocab_size"]),
    ({"n_layer": -1}, ["n_layer"]),
    ({"n_head": 0}, ["n_head"]),
    ({"n_embd": 0}, ["n_embd"]),
    ({"rope_theta": 0.0}, ["rope_theta"]),
    ({"rope_scaling": "longrope", "pos": "rope"}, ["rope_scaling", "longrope", "none", "linear", "ntk", "yarn"]),
    ({"rope_scaling": "yarn", "rope_factor": 2.0}, ["rope_scaling='yarn'", "pos='rope'"]),
    ({"pos": "rope", "rope_factor": 2.0}, ["rope_factor=2.0", "rope_scaling"]),
    ({"pos": "rope", "rope_scaling": "ntk", "rope_factor": 0.5}, ["rope_factor=0.5"]),
    ({"pos": "rope", "rope_scaling": "ntk", "rope_factor": 2.0, "n_head": 16}, ["rope_scaling='ntk'", "heads"]),
    ({"norm_eps": 0.0}, ["norm_eps"]),
    ({"dropout": -0.1}, ["dropout"]),
    ({"dropout": 1.0}, ["dropout"]),
    ({"logit_softcap": -1.0}, ["logit_softcap"]),
    ({"mlp_width": -1}, ["mlp_width"]),
    *(({name: value}, [f"{name}={value} must be finite"]) for value in (math.nan, math.inf, -math.inf)
      for name in ("rope_theta", "norm_eps", "dropout", "logit_softcap", "rope_factor")),
    ({"n_embd": 30}, ["n_embd=30", "n_head=4"]),
    ({"n_kv_head": 3}, ["n_head=4", "n_kv_head=3"]),
    ({"n_kv_head": 8}, ["n_head=4", "n_kv_head=8"]),
    ({"n_kv_head": -1}, ["n_kv_head=-1"]),
    ({"pos": "rope", "n_embd": 12}, ["pos", "n_embd=12", "n_head=4"]),
])
def test_a_combination_without_meaning_is_named(wrong, named):
    with pytest.raises(ValueError) as e:
        GPTConfig(**{**SMALL, **wrong})
    assert all(word in str(e.value) for word in named), e.value


@pytest.mark.skipif(attention_file.flash_attn_func is not None, reason="flash-attn is here")
def test_flash_without_its_package_is_named():
    with pytest.raises(ValueError, match="attn='flash'.*flash-attn"):
        GPTConfig(attn="flash")


@pytest.mark.parametrize(("file", "others"), [
    ("model.py", {"attention", "cross_entropy", "fused"}), ("attention.py", {"flash_attn", "fused"}),
])
def test_the_model_imports_torch_its_attention_its_loss_and_fused_operations_alone(file, others):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch", *others}
    needed = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
    assert "torch" in needed and "flash_attn" not in needed  # flash-attn stands in a try


def test_the_models_fields_are_keys_of_train():
    keys = list(read_keys(ROOT / "train.py").values())
    begin = next(i for i, key in enumerate(keys) if any("GPTConfig" in line for line in key.heading))
    end = next((i for i, key in enumerate(keys[begin + 1 :], begin + 1) if key.heading), len(keys))
    section = {key.name: key for key in keys[begin:end]}
    assert set(section) == {f.name for f in fields(GPTConfig)}
    for f in fields(GPTConfig):
        key = section[f.name]
        assert key.comment, f"{f.name} has no comment"
        assert key.kind == f.type.__name__ if isinstance(f.type, type) else key.kind == f.type, f.name


# -----------------------------------------------------------------------------
# The counts


@pytest.mark.parametrize("sizes, parameters", [
    ({}, 124_439_808),
    ({"n_layer": 24, "n_head": 16, "n_embd": 1024}, 354_823_168),
    ({"n_layer": 36, "n_head": 20, "n_embd": 1280}, 774_030_080),
    ({"n_layer": 48, "n_head": 25, "n_embd": 1600}, 1_557_611_200),
], ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_gpt2s_have_their_parameters(sizes, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    assert model.num_params() == parameters
    assert model.num_params(padding=True) == parameters + 47 * model.config.n_embd  # 50257 -> 50304
    assert model.param_bytes() == 4 * (parameters + 47 * model.config.n_embd)
    assert model.to(torch.bfloat16).param_bytes() == 2 * (parameters + 47 * model.config.n_embd)


def test_flops_by_hand():
    model = build(n_kv_head=2)  # 2 layers of 32, 4 heads of 8, 2 of keys and values, 128 rows in the head
    layer = 32 * (4 + 2 + 2) * 8 + 32 * 32 + 2 * 32 * 128
    assert model.forward_flops(10) == 2 * (2 * layer + 32 * 128) + 4 * 10 * 2 * 32
    swiglu = build(activation="swiglu", tie_weights=False)  # 8/3 of 32 is 85.3, so 96 wide
    assert swiglu.forward_flops(1) == 2 * (2 * (32 * 96 + 32 * 32 + 3 * 32 * 96) + 32 * 128) + 4 * 2 * 32


@every_toggle
def test_flops_equal_those_that_torch_counts(toggle):
    """Every matrix product of the real model, attention spelled out: then each token does attend to all T places."""
    model = build(**{**toggle, "attn": "math"})
    idx = tokens(model, B=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(idx)
    assert counter.get_total_flops() == 3 * 24 * model.forward_flops(24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(idx, last_only=True)
    assert counter.get_total_flops() == 3 * (24 * model.forward_flops(24, head=False) + 2 * 32 * 128)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == 3 * 24 * 3 * model.forward_flops(24)  # backward: twice forward


def test_training_counts_what_causality_leaves():
    model = build()
    each = [model.forward_flops(t) for t in range(1, 25)]  # token t attends to t tokens
    assert model.train_flops(24) == 3 * sum(each) / 24


def test_kv_cache_bytes():
    sizes = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=64, block_size=8)
    with torch.device("meta"):
        mha, gqa, mqa = (GPT(GPTConfig(**sizes, n_kv_head=n)) for n in (0, 4, 1))
    assert mha.kv_cache_bytes(1000, torch.float16) == 2 * 12 * 768 * 1000 * 2  # keys and values, layers, width, tokens
    assert mha.kv_cache_bytes(1000) == 2 * mha.kv_cache_bytes(1000, torch.float16)
    assert mha.kv_cache_bytes(7) == 3 * gqa.kv_cache_bytes(7) == 12 * mqa.kv_cache_bytes(7) > 0


# -----------------------------------------------------------------------------
# Training gives what it gave. Where the mathematics changes on purpose, python tests/test_model.py prints it again.

GOLDEN = {
    "gpt2 with adamw": [
        4.440352, 4.41966, 4.375268, 4.336189, 4.321221, 4.299854, 4.246164, 4.239044, 4.207537, 4.170401,
        4.140665, 4.122877, 4.093358, 4.060036, 4.03055, 4.019767, 3.967413, 3.933475, 3.947262, 3.902695,
    ],
    "modern with muon": [
        4.418841, 4.42001, 4.416791, 4.334822, 4.344827, 4.344484, 4.257256, 4.263386, 4.255876, 4.170937,
        4.170194, 4.160046, 4.083923, 4.072246, 4.065974, 3.994827, 3.974914, 3.971694, 3.897368, 3.881861,
    ],
}


def curve(toggle, optimizer):
    """Losses of 20 steps on a fixed sequence with some structure, fp32, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build(seed=1337, std=0, **toggle).train()
        opt = Optimizers(model, optimizer=optimizer, learning_rate=3e-3, weight_decay=0.1)
        n = torch.arange(20 * 8 * 24 + 1)
        stream = (n * n // 7 + 3 * n) % 83
        losses = []
        for step in range(20):
            part = stream[step * 192 : step * 192 + 193]
            loss = model(part[:-1].view(8, 24), part[1:].view(8, 24), loss_only=True)[1]
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        return losses
    finally:
        torch.set_num_threads(threads)


RUNS = {"gpt2 with adamw": ({}, "adamw"), "modern with muon": (MODERN, "muon")}


@pytest.mark.parametrize("run", RUNS)
def test_the_golden_loss_curve(run):
    losses = curve(*RUNS[run])
    assert losses == pytest.approx(GOLDEN[run], rel=1e-4)
    assert losses[-1] < losses[0] - 0.1  # it learns


if __name__ == "__main__":
    for run in RUNS:
        print(f'    "{run}": {[round(loss, 6) for loss in curve(*RUNS[run])]},')


# -----------------------------------------------------------------------------
# On other devices, by what they say of themselves


@pytest.mark.parametrize("version, capability, kind", [
    ("2.10.0+cu128", (9, 0), "flash"), ("2.11.0+cu130", (9, 0), "sdpa"), ("2.13.0", (9, 0), "sdpa"),
    ("2.13.0", (8, 0), "flash"), ("2.9.1", (8, 6), "flash"), ("2.13.0", (7, 5), "sdpa")])
def test_where_flash_attn_is_installed_it_is_taken_if_it_is_the_quicker_one(monkeypatch, version, capability, kind):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_file, "flash_attn_func", len)
    assert attention_file.pick_attention("auto", torch.device("cuda"), torch.bfloat16, 1024, 64)[0] == kind
    assert attention_file.pick_attention("flash", torch.device("cuda"), torch.bfloat16, 1024, 64)[0] == "flash"


@pytest.mark.parametrize("attn, device, dtype, head_dim, options, kind", [
    ("auto", "cpu", torch.float32, 64, {}, "sdpa"),
    ("auto", "cpu", torch.bfloat16, 64, {}, "math"),
    ("math", "cuda", torch.bfloat16, 64, {}, "math"),
    ("auto", "cuda", torch.bfloat16, 64, {}, "varlen"),
    ("flash", "cuda", torch.bfloat16, 64, {}, "varlen"),
    ("sdpa", "cuda", torch.bfloat16, 64, {}, "sdpa"),
    ("auto", "cuda", torch.float32, 64, {}, "sdpa"),
    ("auto", "cuda", torch.bfloat16, 64, {"dropout": 0.1}, "varlen"),
    ("auto", "cuda", torch.bfloat16, 64, {"compiling": True}, "flex"),
    ("flash", "cuda", torch.bfloat16, 64, {"compiling": True}, "flex"),
    ("auto", "cuda", torch.bfloat16, 64, {"compiling": True, "dropout": 0.1}, "sdpa"),
    ("flash", "cuda", torch.bfloat16, 64, {"compiling": True, "dropout": 0.1}, "sdpa"),
    ("sdpa", "cuda", torch.bfloat16, 64, {"compiling": True}, "sdpa"),
    ("auto", "cuda", torch.float32, 64, {"compiling": True}, "sdpa"),
    ("auto", "cuda", torch.bfloat16, 8, {"compiling": True}, "sdpa"),
    ("auto", "cpu", torch.float32, 64, {"compiling": True}, "sdpa"),
])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_how_documents_are_kept_apart(monkeypatch, attn, device, dtype, head_dim, options, kind, capability):
    """By a kernel that skips other documents where there is one. None that mixes them is taken, and why is said."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(attention_file, name, len)
    pick = attention_file.pick_attention
    assert pick(attn, torch.device(device), dtype, 512, head_dim, docs=True, **options)[0] == kind
    monkeypatch.setattr(attention_file, "flash_attn_varlen_func", None)
    if attn == "auto":
        without, why = pick(attn, torch.device(device), dtype, 512, head_dim, docs=True, **options)
        assert without == kind.replace("varlen", "sdpa") and why


@pytest.mark.parametrize("device, dtype, capability, shares", [
    ("cpu", torch.float32, None, True), ("cuda", torch.bfloat16, (8, 0), True), ("cuda", torch.float32, (9, 0), False),
    ("cuda", torch.float16, (7, 5), False)])
def test_which_kernels_take_fewer_key_heads(monkeypatch, device, dtype, capability, shares):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention_file.shares_heads(torch.device(device), dtype, 64) == shares


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_repeated_heads_are_shared_heads(monkeypatch, n_kv_head):
    """What a GPU gets whose kernels want a key head for each query head: here, where they do not, it is the same."""
    model = build(n_kv_head=n_kv_head)
    idx = tokens(model)
    expected = model(idx)[0]
    groups = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **options: groups.append((q.size(1), k.size(1))) or sdpa(q, k, v, **options))
    monkeypatch.setattr(attention_file, "shares_heads", lambda device, dtype, head_dim: False)
    torch.testing.assert_close(model(idx)[0], expected)
    assert set(groups) == {(4, 4)}


def test_relu_squared_is_finite_in_float16():
    """The square of 256 is no float16; what comes in may be larger."""
    mlp = model_file.MLP(GPTConfig(**SMALL, activation="relu2")).half()
    with torch.no_grad():
        mlp.c_fc.weight.zero_()
        mlp.c_fc.weight[0] = 1.0  # this unit gets 32,000
    x = torch.full((1, 32), 1000.0, dtype=torch.float16, requires_grad=True)
    y = mlp(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    small = torch.full((1, 32), 0.1, dtype=torch.float16)
    torch.testing.assert_close(mlp(small), mlp.float()(small.float()).half(), rtol=2e-2, atol=1e-3)
