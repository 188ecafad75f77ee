"""From logits to tokens, from checkpoints to text."""

import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import CheckpointError, load_model_tensors
from infer import load, stream, stretch
from inference.sampling import probabilities
from model import GPT, GPTConfig
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]

# -----------------------------------------------------------------------------
# What is drawn from


def dyadic(*shares):
    """Logits whose softmax is `shares`, powers of two, to the bit or nearly."""
    return torch.tensor([math.log(share) for share in shares])


def kept(probs):
    return torch.nonzero(probs).flatten().tolist()


def test_plain_softmax():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    probs = probabilities(logits)
    assert probs.dtype == torch.float32 and probs.shape == logits.shape
    torch.testing.assert_close(probs, torch.softmax(logits.double(), -1).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(probabilities(logits, 0.5), torch.softmax(2 * logits.double(), -1).float(), rtol=1e-5,
                               atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.5}])
def test_probabilities_are_fp32(dtype, how):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    probs = probabilities(logits, **how)
    assert probs.dtype == torch.float32 and torch.equal(logits, before)
    assert abs(probs.double().sum().item() - 1) < 1e-6


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_temperature_zero_is_the_most_likely_token(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    probs = probabilities(logits, temperature=0, top_k=3, top_p=0.1)
    assert torch.equal(probs, torch.nn.functional.one_hot(logits.argmax(-1), 7).float())


def test_temperature_zero_takes_the_lowest_id_on_a_tie():
    assert kept(probabilities(torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0]), temperature=0)) == [1]
    assert kept(probabilities(torch.zeros(1000), temperature=0)) == [0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-37])
def test_temperatures_near_zero_approach_greedy(temperature):
    logits = torch.tensor([-300.0, 5.0, 300.0, 299.0])
    assert probabilities(logits, temperature).tolist() == [0, 0, 1, 0]
    assert probabilities(torch.tensor([7.0, 3.0, 7.0]), temperature).tolist() == [0.5, 0, 0.5]


def test_logits_of_minus_infinity_are_never_drawn():
    probs = probabilities(torch.tensor([0.0, -math.inf, 0.0, -math.inf]), temperature=0.7, top_k=3)
    assert probs.tolist() == [0.5, 0, 0.5, 0]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_top_k_keeps_exactly_k_on_ties(k):
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 3.0, 0.0, 3.0])
    order = [1, 2, 3, 4, 6, 0, 5]  # the lower id first where they are equal
    probs = probabilities(logits, top_k=k)
    assert kept(probs) == sorted(order[:k])
    expected = torch.softmax(logits.double(), -1)
    torch.testing.assert_close(probs[order[:k]].double(), expected[order[:k]] / expected[order[:k]].sum())


@pytest.mark.parametrize("k", [0, 7, 8, 200])
def test_top_k_of_all_is_no_change(k):
    logits = torch.randn(7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(probabilities(logits, top_k=k), probabilities(logits))


@pytest.mark.parametrize("top_p, n", [(0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.87, 3), (0.88, 4)])
def test_top_p_is_the_smallest_set(top_p, n):
    logits = dyadic(1 / 4, 1 / 8, 1 / 2, 1 / 8)
    assert kept(probabilities(logits, top_p=top_p)) == sorted([2, 0, 1, 3][:n])  # of equal ones the lower id first


def test_top_p_of_one_is_no_change():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 8
    assert torch.equal(probabilities(logits, top_p=1.0), probabilities(logits))


def test_top_p_is_a_share_of_what_top_k_left():
    logits = dyadic(1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16)
    assert kept(probabilities(logits, top_k=2, top_p=0.66)) == [0]  # 2/3 of what is left
    assert kept(probabilities(logits, top_k=2, top_p=0.67)) == [0, 1]
    assert kept(probabilities(logits, top_p=0.67)) == [0, 1]
    assert kept(probabilities(logits, temperature=0.5, top_p=0.74)) == [0]  # 3/4 after squaring


@given(st.integers(1, 30), st.integers(0, 40), st.floats(0.01, 1.0), st.floats(0.05, 5.0), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_probabilities_by_brute_force(n, k, top_p, temperature, seed):
    logits = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).mul(4).round() / 2  # many ties
    probs = probabilities(logits, temperature, k, top_p)
    for got, row in zip(probs.double(), logits, strict=True):
        exact = torch.softmax(row.double() / temperature, -1).tolist()
        ranked = sorted(range(n), key=lambda i: (-row[i].item(), i))[: k or n]
        total = sum(exact[i] for i in ranked)
        sums = [0, *itertools.accumulate(exact[i] / total for i in ranked)]
        keep = len(kept(got))
        assert sums[keep - 1] < top_p + 1e-5 and (sums[keep] > top_p - 1e-5 or keep == len(ranked))
        assert kept(got) == sorted(ranked[:keep])
        share = sum(exact[i] for i in ranked[:keep])
        for i in ranked[:keep]:
            assert got[i].item() == pytest.approx(exact[i] / share, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_k": 2.5},
     {"top_p": 0}, {"top_p": -0.5}, {"top_p": 1.01}, {"top_p": math.nan}],
)
def test_parameters_without_a_meaning_are_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"^{name}={value} "):
        probabilities(torch.zeros(5), **wrong)
    with pytest.raises(ValueError, match=f"^{name}={value} "):  # greedy does not hide the others
        probabilities(torch.zeros(5), **{"temperature": 0, **wrong})


# -----------------------------------------------------------------------------
# Streams


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.4)  # opinions, where a fresh model has hardly any
    return model


def test_the_seed_decides(model):
    texts = [tuple(stream(model, [1, 2], 30, seed=seed)) for seed in (0, 0, 1, 2)]
    assert len(texts[0]) == 30 and all(0 <= t < 20 for t in texts[0])
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_a_stream_leaves_and_takes_no_random_numbers(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = list(stream(model, [1], 10, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert list(stream(model, [1], 10, seed=3)) == first


def test_streams_do_not_disturb_each_other(model):
    alone = [list(stream(model, [3], 10, seed=s)) for s in (1, 2)]
    woven = list(zip(stream(model, [3], 10, seed=1), stream(model, [3], 10, seed=2), strict=True))
    assert [list(each) for each in zip(*woven, strict=True)] == alone


def test_greedy_is_the_argmax_of_what_the_model_sees(model):
    ids, seen = [4, 7], []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    tokens = list(stream(model, ids, 25, temperature=0, seed=9))  # three times as long as the model's context
    hook.remove()
    for token, context in zip(tokens, seen, strict=True):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids[-8:]]))
        assert context == [ids[-8:]] and token == int(logits[0, -1].argmax())
        ids = [*ids, token]
    assert len(ids) == 27 and len(set(ids)) > 2
    assert tokens == list(stream(model, [4, 7], 25, temperature=0, seed=10))


def test_greedy_is_what_the_model_generates(model):
    expected = model.generate(torch.tensor([[4, 7]]), 25, temperature=0)
    assert list(stream(model, [4, 7], 25, temperature=0)) == expected[0, 2:].tolist()


def test_a_prompt_longer_than_the_context(model):
    prompt = [int(i) for i in torch.arange(50) % 20]
    assert list(stream(model, prompt, 5, temperature=0)) == list(stream(model, prompt[-8:], 5, temperature=0))


def test_the_stream_ends_before_eos(model):
    tokens = list(stream(model, [1, 2], 40, seed=0))
    eos = tokens[10]
    assert list(stream(model, [1, 2], 40, seed=0, eos=eos)) == tokens[: tokens.index(eos)]
    assert list(stream(model, [1, 2], 40, seed=0, eos=tokens[0])) == []
    assert list(stream(model, [1, eos], 40, seed=0, eos=None)) != []


def test_the_length_of_a_stream(model):
    assert [len(list(stream(model, [1], n))) for n in (0, 1, 9)] == [0, 1, 9]


def test_streaming_needs_no_gradients_and_leaves_the_mode_alone(model):
    for _ in stream(model, [1], 3):
        assert torch.is_grad_enabled()  # of whoever reads the stream
    assert all(p.grad is None for p in model.parameters())


def test_a_prompt_of_nothing(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        next(stream(model, [], 5))


@pytest.mark.parametrize("prompt", [[20], [1, -1], [1, 2, 1000]])
def test_a_prompt_outside_the_vocabulary(model, prompt):
    with pytest.raises(ValueError, match="vocabulary of 20"):
        next(stream(model, prompt, 5))


def test_drawn_frequencies_are_the_models(model):
    """Chi-square of 3,000 first tokens against the exact distribution; 99.99% of such draws lie below the bound."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([[1, 2, 3]]))
    for how in ({}, {"temperature": 0.7, "top_k": 12, "top_p": 0.95}):
        exact = probabilities(logits[0, -1], **how)
        drawn = [next(stream(model, [1, 2, 3], 1, seed=seed, **how)) for seed in range(3000)]
        counts = torch.bincount(torch.tensor(drawn), minlength=20)
        assert counts[exact == 0].sum() == 0
        expected = 3000 * exact[exact > 0]
        chi2 = ((counts[exact > 0] - expected) ** 2 / expected).sum().item()
        degrees = len(expected) - 1
        assert degrees >= 3
        z = ((chi2 / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))  # Wilson & Hilferty
        assert z < 3.72


# -----------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_load_gives_the_model_of_the_checkpoint(tiny_run):
    model, tokenizer, state, folder = load(tiny_run)
    assert folder == tiny_run / "ckpt" / "step_00000006" and state["step"] == 6
    assert not model.training and {p.device.type for p in model.parameters()} == {"cpu"}
    saved = load_model_tensors(folder)
    assert {name for name, _ in model.named_parameters()} == saved.keys()
    assert all(torch.equal(p, saved[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert tokenizer.sha256 == load_tokenizer(tiny_run).sha256
    assert model.config.attn == "auto" and model.config.n_embd == 16


def test_load_by_name_step_and_folder(tiny_run, monkeypatch):
    losses = {step: load(tiny_run, str(step))[2]["val_loss"] for step in (3, 6)}
    assert load(tiny_run, "best")[2]["step"] == min(losses, key=losses.get)
    assert load(tiny_run, "3")[3] == tiny_run / "ckpt" / "step_00000003"
    assert load(tiny_run, 3)[2]["step"] == 3
    assert load(tiny_run / "ckpt" / "step_00000003")[2]["step"] == 3
    monkeypatch.chdir(tiny_run / "ckpt" / "step_00000003")
    assert load(".")[2]["step"] == 3


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn"])
def test_a_context_is_stretched_and_back(scaling):
    """What a model of that config with the same weights computes; and a factor of 1 is as it was."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "n_layer": 1, "n_head": 2, "n_embd": 16, "pos": "rope"}
    model = GPT(GPTConfig(block_size=8, **sizes)).eval()
    idx = torch.arange(20)[None]
    with torch.no_grad():
        before, trained = model(idx[:, :8])[0], model.config
        stretch(model, trained, scaling, 2.5)
        factor = 1.0 if scaling == "none" else 2.5
        other = GPT(GPTConfig(block_size=20, rope_scaling=scaling, rope_factor=factor, **sizes)).eval()
        other.load_state_dict(model.state_dict())
        assert model.config == other.config and torch.equal(model(idx)[0], other(idx)[0])
        assert torch.allclose(model(idx)[0][:, :8], before, atol=1e-6) == (scaling == "none")
        stretch(model, trained, scaling, 1.0)
        assert model.config.block_size == 8 and torch.equal(model(idx[:, :8])[0], before)
        if scaling != "none":  # of a model that was trained so, the first length counts
            stretch(model, other.config, scaling, 2.5)
            assert model.config == other.config


def test_learned_positions_cannot_be_stretched(tiny_run):
    with pytest.raises(ValueError, match="block_size=16.*pos='rope'"):
        load(tiny_run, rope_scaling="yarn", rope_factor=2.0)


def test_a_damaged_latest_is_passed_over_and_said(run, capsys):
    flip(run / "ckpt" / "step_00000006" / "model.safetensors")
    assert load(run)[2]["step"] == 3
    said = capsys.readouterr()
    assert "step_00000006" in said.err and said.out == ""  # stdout is for the text
    assert (run / "ckpt" / "step_00000006").exists()  # nothing is renamed: the run may be training


@pytest.mark.parametrize("which", ["6", "latest"])
def test_nothing_but_damage(run, which):
    for folder in (run / "ckpt").iterdir():
        flip(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="step_00000006.*sha256|verifies"):
        load(run, which)


@pytest.mark.parametrize("which", ["5", "newest", "-1", ""])
def test_a_checkpoint_that_is_not_there(tiny_run, which):
    with pytest.raises(CheckpointError, match=f"{which!r}.*latest, best, 3, 6"):
        load(tiny_run, which)


def test_no_run_at_all(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="holds no checkpoint.*train.py"):
            load(folder)


def test_a_run_without_a_tokenizer(run):
    """A run on bare token ids has none, and can be evaluated all the same."""
    (run / "tokenizer.json").unlink()
    assert load(run)[1] is None
    (run / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load(run)


def test_a_checkpoint_folder_that_left_its_run(run, tmp_path):
    """With its tokenizer beside it, one folder is all it takes."""
    alone = Path(shutil.copytree(run / "ckpt" / "step_00000006", tmp_path / "alone"))
    assert load(alone)[1] is None
    shutil.copy(run / "tokenizer.json", alone)
    assert load(alone)[1] is not None and load(alone)[2]["step"] == 6


SECOND = """
import sys
from infer import load, stream
model, tokenizer, state, folder = load(sys.argv[1])
print(list(stream(model, tokenizer.encode("To be"), 60, temperature=0)))
print(list(stream(model, tokenizer.encode("To be"), 60, seed=4)))
"""


def test_a_second_process_draws_the_same(tiny_run):
    done = subprocess.run([sys.executable, "-c", SECOND, str(tiny_run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tokenizer, _, _ = load(tiny_run)
    prompt = tokenizer.encode("To be")
    ours = [list(stream(model, prompt, 60, temperature=0)), list(stream(model, prompt, 60, seed=4))]
    assert done.stdout.splitlines() == [str(tokens) for tokens in ours]
