"""The memory estimate against what autograd and the optimizer really hold."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import GPT, GPTConfig  # noqa: E402
from optim import Optimizers  # noqa: E402
from plan import training_memory  # noqa: E402

SIZES = dict(block_size=64, vocab_size=101, n_layer=3, n_head=4, n_embd=64)
MODERN = {"pos": "rope", "norm": "rmsnorm_nogain", "norm_embed": True, "qk_norm": "rms", "activation": "relu2",
          "tie_weights": False}
LLAMA = {"pos": "rope", "norm": "rmsnorm", "n_kv_head": 2, "activation": "swiglu", "tie_weights": False, "bias": False}
TOGGLES = [
    {}, {"attn": "math"}, {"activation": "relu2"}, {"activation": "swiglu"}, {"norm": "rmsnorm"}, {"qk_norm": "rms"},
    {"pos": "rope"}, {"pos": "rope", "qk_norm": "rms_gain"}, {"n_kv_head": 1}, {"norm_embed": True}, {"dropout": 0.1},
    {"dropout": 0.1, "attn": "math"}, MODERN, LLAMA, {**LLAMA, "qk_norm": "rms_gain"},
]


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
    assert plan["total"] == sum(part for name, part in plan.items() if name != "total")


def test_logits_stop_growing_where_the_loss_is_taken_in_chunks():
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=1))
    small, large, larger = (training_memory(model, batch_size)["logits"] for batch_size in (0.25, 1, 64))
    assert small == 3 * 4 * 256 * 50257 and large == larger == 3 * 4 * (2**25 // 50257) * 50257
