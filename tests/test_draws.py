"""Draws for many requests at once, on their device: each request draws what Chooser would draw for it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from device import missing_for_compile
from inference.draws import (
    Draws,
    Variant,
    inverse_cdf,
    is_penalised,
    keep_candidates,
    keep_nucleus,
    keep_top_k,
    variant,
)
from inference.sampling import Chooser, Sampling, penalise, penalise_answer, probabilities

VOCAB = 61
BELOW = 1 - 2**-24  # the largest number of a generator


def exact(sampling, logits, ids, counts):
    """The logits that Chooser draws from."""
    logits = penalise(logits, ids, sampling.repetition_penalty)
    logits = penalise_answer(logits, counts, sampling.presence_penalty, sampling.frequency_penalty)
    bias = torch.zeros(len(logits))
    for token, number in sampling.logit_bias:
        bias[token] = number
    return logits + bias


def may_draw(sampling, logits, u, token, tolerance=1e-6):
    """Whether the interval of `token` in the cumulative distribution has `u`, in fp64, both ends and the edge of the
    nucleus within `tolerance`."""
    for p in (sampling.top_p, sampling.top_p * (1 - tolerance), min(1, sampling.top_p * (1 + tolerance))):
        probs = probabilities(logits, sampling.temperature, sampling.top_k, p, sampling.min_p).double()
        ends = probs.cumsum(0) / probs.sum()
        if probs[token] > 0 and ends[token] - probs[token] - tolerance <= u <= ends[token] + tolerance:
            return True
    return False


def batch_of(samplings, prompts, vocab, first_row=0):
    draws = Draws(first_row + len(samplings) + 1, vocab, "cpu")
    choosers = [Chooser(s, vocab) for s in samplings]
    rows = list(range(first_row, first_row + len(samplings)))[::-1]  # not in the order of the batch
    for row, sampling, ids in zip(rows, samplings, prompts, strict=True):
        draws.load(row, sampling, ids, len(ids))
    return draws, choosers, rows


def check_steps(samplings, prompts, logits_of, vocab, how=None, steps=3):
    """Draw some tokens for all requests together, and each one alone by Chooser. -> (draws, how many differ)"""
    draws, choosers, rows = batch_of(samplings, prompts, vocab)
    numbers = [Chooser(s, vocab) for s in samplings]  # of the draws on the device
    ids = [list(prompt) for prompt in prompts]
    how = how or variant(samplings, vocab)
    if how.penalised:
        draws.allocate()
    different = 0
    for step in range(steps):
        logits = logits_of(step)
        before = logits.clone()
        draws.next_numbers(rows, numbers)
        found = draws.draw(logits, torch.tensor(rows), how).tolist()
        assert torch.equal(logits, before)  # the log-probabilities are those of the model
        for i, (chooser, sampling) in enumerate(zip(choosers, samplings, strict=True)):
            counts = torch.zeros(vocab) if chooser.counts is None else chooser.counts.clone()
            changed = exact(sampling, logits[i], ids[i], counts)
            token = chooser(logits[i], ids[i])
            if token != found[i]:
                assert may_draw(sampling, changed, draws.numbers[rows[i]], found[i]), (sampling, token, found[i])
                different += 1
            if chooser.counts is not None:  # both continue with the token of the device
                chooser.counts[token] -= 1
            chooser.count(found[i])
            ids[i].append(found[i])
            if is_penalised(sampling):
                assert draws.seen[rows[i]].nonzero().flatten().tolist() == sorted(set(ids[i]))
                answer = torch.tensor(ids[i][len(prompts[i]) :])
                assert torch.equal(draws.counts[rows[i]], torch.bincount(answer, minlength=vocab).int())
    return steps * len(samplings), different


OPTIONS = [{}, {"temperature": 0}, {"temperature": 0.3}, {"temperature": 5e-324}, {"temperature": 1e300},
           {"top_k": 1}, {"top_k": 7}, {"top_k": 1000}, {"top_p": 0.5}, {"top_p": 0.99}, {"top_p": 1e-46},
           {"min_p": 0.1}, {"min_p": 1.0}, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6},
           {"repetition_penalty": 1e300}, {"presence_penalty": 1.5}, {"frequency_penalty": -0.7},
           {"logit_bias": {3: 4.0, 5: -100.0}}, {"temperature": 0, "frequency_penalty": 2.0},
           {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2,
            "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {0: 1.0}}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
def test_every_option_alone_draws_what_the_host_draws(options):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(8, VOCAB, generator=generator) * 3 for _ in range(8)]
    samplings = [Sampling(seed=seed, **options) for seed in range(8)]
    prompts = [[i, 3, 3 + i] for i in range(8)]
    for how in (None, Variant("filtered", 0, True), Variant("candidates", VOCAB, True)):
        drawn, different = check_steps(samplings, prompts, logits.__getitem__, VOCAB, how, steps=8)
        assert drawn == 64 and different == 0


one_sampling = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.0, 4.0]),
    top_k=st.sampled_from([0, 0, 1, 5, VOCAB - 1, VOCAB, 500]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 1 / 3, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -0.25]),
    logit_bias=st.sampled_from([(), (), ((0, 5.0), (VOCAB - 1, -100.0))]),
    seed=st.integers(0, 10**6),
)


@given(st.lists(one_sampling, min_size=1, max_size=5), st.integers(0, 10**6), st.sampled_from([1.0, 10.0, 1e4, 1e30]),
       st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=120)
def test_mixed_requests_draw_together_what_each_would_draw_alone(samplings, seed, size, ties, masked, whole):
    """With ties, forbidden tokens and huge logits; by the variant that the batch needs, and by that which does all."""
    generator = torch.Generator().manual_seed(seed)

    def logits_of(step):
        logits = torch.randn(len(samplings), VOCAB, generator=generator) * 2
        if ties:
            logits = logits.round()
        if masked:
            forbidden = torch.rand(logits.shape, generator=generator) < 0.7
            forbidden[:, seed % VOCAB] = False
            logits = logits.masked_fill(forbidden, -math.inf)
        return logits * size

    prompts = [torch.randint(0, VOCAB, (1 + i,), generator=generator).tolist() for i in range(len(samplings))]
    check_steps(samplings, prompts, logits_of, VOCAB, Variant("filtered", 0, True) if whole else None)


def test_a_large_vocabulary_is_drawn_from_alike():
    """Each variant in turn over 5,000 tokens: above MOST_CANDIDATES, the threshold is found by bisection."""
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(4, 5000, generator=generator) * 2 for _ in range(6)]
    kinds = set()
    for options in ({}, {"top_k": 50}, {"top_k": 600}, {"top_k": 2000}, {"top_p": 0.9}, {"min_p": 0.01},
                    {"top_k": 3000, "top_p": 0.95, "min_p": 1e-4}):
        samplings = [Sampling(seed=seed, **options) for seed in range(4)]
        kinds.add(variant(samplings, 5000)[:2])
        assert check_steps(samplings, [[1]] * 4, logits.__getitem__, 5000, steps=6)[1] == 0
    assert kinds == {("plain", 0), ("candidates", 64), ("candidates", 1024), ("filtered", 0), ("nucleus", 0)}


# -----------------------------------------------------------------------------
# The parts


@given(st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), min_size=1, max_size=40), st.integers(1, 45),
       st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_filters_keep_exactly_what_they_say_on_ties(weights, k, p, min_p):
    """Weights whose sums are exact, so there is no rounding to allow for: against a plain loop."""
    weights[0] = 1.0
    ranked = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:k]
    total = sum(weights[i] for i in ranked)
    expected = [0.0] * len(weights)
    before = 0.0
    for i in ranked:
        if (p == 1 or before < p * total) and weights[i] >= min_p:
            expected[i] = weights[i]
        before += weights[i]
    row = torch.tensor([weights])
    options = [torch.tensor([[float(x)]]) for x in (min(k, len(weights)), p, min_p)]
    assert keep_candidates(row, len(weights), *options)[0].tolist() == expected
    assert keep_nucleus(keep_top_k(row, options[0]), *options[1:])[0].tolist() == expected


def test_top_p_of_one_drops_nothing_by_rounding():
    """The most likely token alone is 1.0 in fp32, but the others are drawn now and then."""
    weights = torch.tensor([[1e-9, 1.0, 1e-12, 0.0]])
    options = [torch.tensor([[x]]) for x in (4.0, 1.0, 0.0)]
    assert torch.equal(keep_candidates(weights, 4, *options), weights)
    assert torch.equal(keep_nucleus(keep_top_k(weights, options[0]), *options[1:]), weights)
    assert probabilities(weights[0].log(), top_k=3).count_nonzero() == 3


def test_the_first_and_the_last_number_draw_a_token_that_has_weight():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (BELOW, 4)):
        assert inverse_cdf(weights, torch.tensor([u])).tolist() == [token]
    many = torch.softmax(torch.randn(3, 50_257, generator=torch.Generator().manual_seed(0)) * 8, -1)
    many[:, -100:] = 0
    assert (inverse_cdf(many, torch.full((3,), BELOW)) < 50_157).all()


def test_draws_follow_the_distribution():
    """Chi squared over 20,000 draws in one batch, against the exact softmax cut by top_p."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    probs = probabilities(logits, top_p=0.8)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    drawn = inverse_cdf(probs.expand(20_000, -1), uniform)
    counts, expected = torch.bincount(drawn, minlength=50), probs * 20_000
    often = expected > 5
    assert not counts[probs == 0].any()
    free = int(often.sum()) - 1
    assert float(((counts - expected)[often] ** 2 / expected[often]).sum()) < free + 5 * math.sqrt(2 * free) + 5


def test_the_cheapest_variant_that_serves_all():
    hot, cold = Sampling(), Sampling(temperature=0)
    assert variant([cold, replace(cold, top_p=0.5)], 50_257) == ("greedy", 0, False)
    assert variant([hot, cold, replace(hot, top_k=50_257)], 50_257) == ("plain", 0, False)
    few = replace(hot, top_k=3, top_p=0.5)
    assert variant([replace(hot, top_k=50), few, cold], 50_257) == ("candidates", 64, False)
    assert variant([replace(hot, top_k=200)], 50_257) == ("candidates", 256, False)
    assert variant([replace(hot, top_k=50), hot], 50_257) == ("filtered", 0, False)
    assert variant([replace(hot, min_p=0.1), hot], 50_257) == ("nucleus", 0, False)
    assert variant([replace(hot, top_p=0.9)], 300) == ("candidates", 300, False)
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", 1), ("frequency_penalty", 1),
                        ("logit_bias", {1: 1})):
        assert variant([hot, replace(cold, **{name: value})], 50_257) == ("plain", 0, True)


def test_logits_that_are_no_numbers_are_marked():
    draws = Draws(3, 9, "cpu")
    draws.allocate()
    for how in ({}, {"top_k": 2}, {"top_p": 0.5, "presence_penalty": 1.0}):
        samplings = [Sampling(**how)] * 3
        for row, sampling in enumerate(samplings):
            draws.load(row, sampling, [1], 1)
        logits = torch.zeros(3, 9)
        logits[0], logits[2] = math.nan, math.inf
        for kind in ("filtered", "nucleus", "candidates"):
            found = draws.draw(logits, torch.arange(3), Variant(kind, 9, variant(samplings, 9).penalised)).tolist()
            assert found[0] == found[2] == -1 and 0 <= found[1] < 9


# -----------------------------------------------------------------------------
# The state


def test_a_row_that_is_taken_again_keeps_nothing_of_the_request_before():
    draws = Draws(2, 9, "cpu")
    draws.load(0, Sampling(temperature=0, frequency_penalty=2, logit_bias={4: 50}), [1, 2, 2], 1)
    draws.load(1, Sampling(temperature=0, repetition_penalty=1.1), [1], 1)
    logits = torch.arange(9.0).expand(2, 9)
    both = torch.tensor([0, 1])
    assert draws.draw(logits, both, Variant("greedy", 0, True)).tolist() == [4, 8]
    assert draws.counts[0].tolist() == [0, 0, 2, 0, 1, 0, 0, 0, 0]
    draws.load(0, Sampling(temperature=0), [5], 1)
    assert draws.draw(logits, both, Variant("greedy", 0, True)).tolist() == [8, 8]
    draws.load(0, Sampling(temperature=0, presence_penalty=2), [5, 8], 1)
    assert draws.counts[0].tolist() == [0] * 8 + [1] and draws.bias[0].eq(0).all()
    assert draws.draw(logits, both, Variant("greedy", 0, True)).tolist() == [7, 8]


def test_padding_rows_touch_no_request():
    draws = Draws(2, 9, "cpu")
    draws.load(0, Sampling(seed=1, frequency_penalty=2), [1], 1)
    draws.next_numbers([0], [Chooser(Sampling(seed=1), 9)])
    rows = torch.tensor([0, draws.spare, draws.spare])
    for kind in ("greedy", "plain", "filtered", "nucleus", "candidates"):
        found = draws.draw(torch.zeros(3, 9), rows, Variant(kind, 9, True))
        assert found[1:].tolist() == [0, 0]
    assert int(draws.counts[0].sum()) == 5 and not draws.counts[1].any()


def tensors_of(draws):
    return {name: t for name, t in vars(draws).items() if isinstance(t, torch.Tensor)}


VARIANTS = [Variant("greedy"), Variant("plain"), Variant("candidates", 16), Variant("nucleus"), Variant("filtered"),
            Variant("filtered", 0, True)]


def check_graph(how, backend):
    """One graph without a break, so nothing waits for a number on the host and no shape depends on one; it gives the
    ids and the state of the plain code, into the same memory."""
    samplings = [Sampling(seed=1, top_k=9, frequency_penalty=0.5), Sampling(seed=2, top_k=5), Sampling(temperature=0)]
    plain, compiled = (batch_of(samplings, [[1, 2]] * 3, VOCAB) for _ in range(2))
    draw = torch.compile(compiled[0].draw, fullgraph=True, dynamic=False, backend=backend)
    where = {name: t.data_ptr() for name, t in tensors_of(compiled[0]).items()}
    for step in range(3):
        logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(step))
        found = []
        for (draws, choosers, rows), function in ((plain, plain[0].draw), (compiled, draw)):
            draws.next_numbers(rows, choosers)
            found.append(function(logits, torch.tensor(rows), how))
        assert torch.equal(*found) and found[0].dtype == torch.long
    for name, tensor in tensors_of(plain[0]).items():
        assert torch.equal(tensor, getattr(compiled[0], name)), name
    assert {name: t.data_ptr() for name, t in tensors_of(compiled[0]).items()} == where


@pytest.mark.parametrize("how", VARIANTS, ids=lambda how: "-".join(map(str, how)))
def test_each_variant_is_one_graph(how):
    check_graph(how, "aot_eager")


@pytest.mark.slow
def test_a_compiler_draws_the_same():
    if missing_for_compile(torch.device("cpu")):
        pytest.skip("no compiler")
    check_graph(Variant("candidates", 16, True), "inductor")
