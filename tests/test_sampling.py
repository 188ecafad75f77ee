"""What is drawn, and where a text ends. The distribution itself is held to brute force in test_infer.py."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference.sampling import (
    Chooser,
    Sampling,
    StopText,
    inverse_cdf,
    most_likely,
    penalise,
    penalise_answer,
    probabilities,
    top_tokens,
)


def kept(probs):
    return probs.nonzero().flatten().tolist()


@pytest.mark.parametrize("min_p, n", [(0.0, 4), (0.2, 4), (0.26, 2), (0.5, 2), (0.51, 1), (1.0, 1)])
def test_min_p_is_a_share_of_the_likeliest(min_p, n):
    logits = torch.tensor([1 / 8, 1 / 2, 1 / 8, 1 / 4]).log()
    assert kept(probabilities(logits, min_p=min_p)) == sorted([1, 3, 0, 2][:n])


@pytest.mark.parametrize("k", [1, 3, 50, 4999])
def test_the_most_likely_are_those_of_a_stable_sort(k):
    probs = torch.randint(0, 40, (5000,), generator=torch.Generator().manual_seed(k)).float()  # ties everywhere
    expected = probs.sort(descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(most_likely(probs, k), expected)


def test_draws_follow_the_distribution():
    """Chi squared over 20,000 draws, against the exact softmax cut by top_k, top_p and min_p."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    for how in ({}, {"temperature": 0.7}, {"top_k": 10}, {"top_p": 0.8}, {"min_p": 0.1}):
        probs = probabilities(logits, **how)
        numbers = torch.rand(20_000, generator=torch.Generator().manual_seed(1)).tolist()
        draws = torch.tensor([inverse_cdf(probs, u) for u in numbers])
        counts, expected = torch.bincount(draws, minlength=50), probs * 20_000
        assert not counts[probs == 0].any()
        often = expected > 5
        chi2 = float(((counts - expected)[often] ** 2 / expected[often]).sum())
        free = int(often.sum()) - 1
        assert chi2 < free + 5 * math.sqrt(2 * free) + 5


def test_a_number_draws_the_first_token_whose_cumulative_probability_exceeds_it():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    below = 1 - 2**-24  # the largest fp32 number below 1
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (below, 4)):
        assert inverse_cdf(probs, u) == token
        assert inverse_cdf(probs * 3, u) == token  # a share of all, whatever they add up to


def test_each_draw_takes_one_number_and_a_greedy_one_none():
    """The contract with the device and with speculation: torch.rand(1) of the request's own CPU generator, in turn."""
    probs = torch.softmax(torch.randn(50, generator=torch.Generator().manual_seed(0)), -1)
    for how in ({}, {"top_k": 5}, {"top_p": 0.5}, {"presence_penalty": 1e-9}):
        choose = Chooser(Sampling(seed=7, **how), 50)
        generator = torch.Generator().manual_seed(7)
        for _ in range(5):
            u = float(torch.rand(1, generator=generator))
            cut = {name: value for name, value in how.items() if name.startswith("top")}
            assert choose(probs.log(), [1]) == inverse_cdf(probabilities(probs.log(), **cut), u)
        assert choose.uniform() == float(torch.rand(1, generator=generator))
    greedy = Chooser(Sampling(temperature=0, seed=7), 50)
    before = greedy.generator.get_state()
    assert greedy(probs.log(), [1]) == int(probs.argmax()) and greedy.uniform() == 0
    assert torch.equal(greedy.generator.get_state(), before)


def test_tokens_drawn_elsewhere_count():
    one, other = (Chooser(Sampling(seed=3, frequency_penalty=2.0), 4) for _ in range(2))
    logits = torch.zeros(4)
    tokens = []
    for _ in range(8):
        tokens.append(one(logits, [0]))
        other.uniform()
        other.count(tokens[-1])
    assert torch.equal(one.counts, other.counts) and int(one.counts.sum()) == 8
    assert one(logits, [0]) == other(logits, [0])


def test_logits_that_are_no_numbers_are_one_clear_error():
    for how in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
        for logits in (torch.full((9,), math.nan), torch.full((9,), -math.inf), torch.full((9,), math.inf)):
            with pytest.raises(ValueError, match="logits are no numbers") as caught:
                Chooser(Sampling(**how), 9)(logits, [0])
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 0.99999])
def test_a_nucleus_needs_no_sort_of_the_unlikely(top_p):
    """It is the set that a sort of all tokens finds, for a vocabulary of usual size."""
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(5)) * 3
    probs = torch.softmax(logits.double(), -1)
    ranked, order = probs.sort(descending=True, stable=True)
    found = kept(probabilities(logits, top_p=top_p))
    least = order[: int((ranked.cumsum(0) - ranked < top_p - 1e-6).sum())]
    most = order[: int((ranked.cumsum(0) - ranked < top_p + 1e-6).sum())]
    assert set(least.tolist()) <= set(found) <= set(most.tolist())


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0},
     {"repetition_penalty": math.inf}, {"temperature": -1}, {"top_k": 2.5}, {"top_p": 0},
     {"temperature": math.nan}, {"top_p": math.nan}, {"min_p": math.nan}, {"repetition_penalty": math.nan},
     {"temperature": math.inf}, {"seed": 2**64}, {"seed": math.nan}, {"presence_penalty": 2.1},
     {"presence_penalty": math.nan}, {"frequency_penalty": -2.1}, {"top_logprobs": 21}, {"top_logprobs": -1},
     {"top_logprobs": 1.0}, {"top_logprobs": True}, {"prompt_logprobs": 21}, {"prompt_logprobs": -1},
     {"prompt_logprobs": 2.0}],
)
def test_parameters_without_a_meaning_are_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"^{name}={value} "):
        Sampling(**wrong)
    for stop in ("text", ("",), (1,)):
        with pytest.raises(ValueError, match="^stop="):
            Sampling(stop=stop)


@pytest.mark.parametrize("bias, message", [
    ({1: 101}, "101 for token 1 must be a number in"), ({1: -100.5}, "-100.5 for token 1"), ({1: math.nan}, "nan for"),
    ({1: "2"}, "'2' for token 1"), ({"1": 2}, "'1' is no token id"), ({1.5: 2}, "1.5 is no token id"),
    ({True: 2}, "True is no token id"), (5, "=5 must be a dict"), ("ab", "='ab' must be a dict"),
])
def test_a_bias_without_a_meaning_is_named(bias, message):
    with pytest.raises(ValueError, match=f"^logit_bias(: )?{message}") as caught:
        Sampling(logit_bias=bias)
    assert "\n" not in str(caught.value)


def test_a_bias_is_frozen_like_the_rest():
    bias = {3: 1, 5: -100}
    sampling = Sampling(logit_bias=bias)
    bias[7] = 2
    assert sampling.logit_bias == ((3, 1.0), (5, -100.0)) and hash(sampling)
    assert replace(sampling, seed=1).logit_bias == sampling.logit_bias
    assert Sampling(logit_bias={}).logit_bias == Sampling().logit_bias == ()


def test_penalties_of_the_answer_are_openais():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, as its documentation writes them."""
    logits, counts = torch.tensor([1.0, -2.0, 3.0, -math.inf]), torch.tensor([0.0, 1, 3, 2])
    before = logits.clone()
    assert penalise_answer(logits, counts, 0.5, 0.25).tolist() == [1.0, -2.75, 1.75, -math.inf]
    assert penalise_answer(logits, counts, -0.5, 0).tolist() == [1.0, -1.5, 3.5, -math.inf]
    assert torch.equal(logits, before) and torch.equal(penalise_answer(logits, counts, 0, 0), logits)


def test_penalties_add_up_and_biases_come_on_top():
    """By hand: repetition over all tokens, then presence and frequency of the answer, then the bias."""
    choose = Chooser(Sampling(temperature=0, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5,
                              logit_bias={3: 1.25}), 4)
    logits = torch.tensor([4.0, 3.0, 1.0, 0.0])
    assert choose(logits, [0]) == 1  # 2, 3, 1, 1.25
    assert choose(logits, [0, 1]) == 0  # 2, 0, 1, 1.25
    assert choose(logits, [0, 1, 0]) == 3  # 0.5, 0, 1, 1.25
    assert choose(logits, [0, 1, 0, 3]) == 2  # 0.5, 0, 1, -0.25
    assert logits.tolist() == [4, 3, 1, 0]


def test_the_most_likely_tokens_are_ranked_and_the_lowest_id_wins_a_tie():
    logprobs = torch.tensor([-3.0, -1.0, -3.0, -0.5, -1.0, -math.inf])
    ranked = [(3, -0.5), (1, -1.0), (4, -1.0), (0, -3.0), (2, -3.0), (5, -math.inf)]
    for count in (1, 2, 4, 6, 20):
        assert top_tokens(logprobs, count) == ranked[:count]


@given(st.lists(st.text("ab\n", max_size=3)), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_leaks_however_the_text_is_cut(pieces, stops):
    """Also where stop strings overlap, contain each other, or lie across pieces: what comes out is the text before the
    first of them to be complete; of two that are complete at once, before the one that begins first."""
    until, out = StopText(tuple(stops)), ""
    for piece in pieces:
        out += until(piece)
        if until.stopped:
            break
    else:
        out += until("", last=True)
    text = "".join(pieces)
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert until.stopped == bool(found)
    assert text.startswith(out) and not any(stop in out for stop in stops)
    if not found:
        assert out == text
    elif len(stops) == 1:
        assert out == text[: found[0]]


def test_text_is_held_back_no_longer_than_it_must_be():
    until = StopText(("User:",))
    assert [until(piece) for piece in ("Hello U", "se", "ful Us", "er", ": no")] == ["Hello ", "", "Useful ", "", ""]
    assert until.stopped


EXTREME = [5e-324, 1e-300, 1e-46, 1e-38]  # above 0, but 0 or subnormal in fp32


@pytest.mark.parametrize("least", EXTREME)
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_a_number_that_fp32_cannot_hold_draws_the_most_likely_token(name, least):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    for more in ({}, {"top_k": 3}, {"min_p": 0.5}):
        assert torch.equal(probabilities(logits, **{name: least}, **more), probabilities(logits, temperature=0))
    masked = logits.index_fill(0, torch.tensor([0, 7]), -math.inf)
    assert probabilities(masked, **{name: least})[[0, 7]].eq(0).all()


@pytest.mark.parametrize("factor", [*EXTREME, 1e39, 1e300])
def test_extreme_factors_leave_a_distribution(factor):
    logits = torch.tensor([0.0, -0.0, 3.0, -3.0, -math.inf, 1e30])
    hot = probabilities(logits, temperature=factor)
    punished = probabilities(penalise(logits, [0, 1, 2, 3], factor))
    for probs in (hot, punished):
        assert probs.sum() == pytest.approx(1) and probs.min() >= 0 and probs[4] == 0
