"""Speculative decoding held to plain decoding: the same tokens, fewer passes, and little lost where nothing fits."""

import math
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer import Engine
from inference.sampling import Chooser, Sampling, probabilities
from inference.speculation import (
    RETRY,
    DraftModel,
    PromptLookup,
    Record,
    Speculation,
    best_count,
    shadow,
)
from model import GPT, GPTConfig
from tokenizer import CharTokenizer, load_tokenizer

CHARS = "abcdefghijklmnopqr"
TOKENIZER = CharTokenizer(CHARS)  # 18 characters, bos 18, eos 19


def make(seed=0, **changes):
    """A small model with opinions, where a fresh one has hardly any."""
    torch.manual_seed(seed)
    sizes = {"block_size": 64, "vocab_size": 20, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def nearly(model, noise=0.1):
    """A draft for `model`: its weights with some noise, so that it is often right and often wrong."""
    draft = GPT(model.config).eval()
    draft.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * noise)
    return draft


def counting(period=20, **changes):
    """A model that says 1, 2, 3, ... up to `period`, and begins again: from its embedding straight to its head."""
    model = make(tie_weights=False, block_size=512, **changes)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            for p in (block.attn.c_proj.bias, block.mlp.c_proj.bias):
                p.zero_()
        if hasattr(model.transformer, "wpe"):
            model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.zero_()[:20, :20] = torch.eye(20)
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.ln_f.bias.zero_()
        model.lm_head.weight.zero_()
        for i in range(20):
            model.lm_head.weight[(i + 1) % period, i] = 4.0
    return model


@pytest.fixture(scope="module")
def model():
    return make(pos="rope", n_kv_head=2)


def drafted(model, draft=None, most=4, at_once=8, **options):
    """A Speculation by a draft model, by default nearly the model itself."""
    engine = Engine(draft or nearly(model), max_requests=at_once, **options)
    return Speculation(DraftModel(engine), most, cost=0.1, at_once=at_once)


def looked_up(at_once=8):
    return Speculation(PromptLookup(), at_once=at_once)


def some_prompts(lengths=(1, 3, 8, 12), seed=1):
    rng = random.Random(seed)
    return [[rng.randrange(5) for _ in range(n)] for n in lengths]


def steps_of(engine, *prompt, **sampling):
    """-> (the finished requests, steps that they took)"""
    requests = [engine.submit(ids, **sampling) for ids in prompt]
    steps = 0
    while not all(request.finish for request in requests):
        engine.step()
        steps += 1
    return requests, steps


def noted_reads(engine):
    """-> a list to which each pass of the engine adds how many rows it reads"""
    rows = []
    read = engine.read

    def noted(parts):
        rows.append(sum(len(part.tokens) for part in parts))
        return read(parts)

    engine.read = noted
    return rows


class Proposer:
    """A source that proposes what `guess` says for a request, and counts nothing."""

    def __init__(self, guess):
        self.guess = guess

    def kind(self, request):
        return 1

    def propose(self, wants):
        return [self.guess(request)[:count] for request, count in wants]

    def end(self, request):
        pass


# -----------------------------------------------------------------------------
# The same tokens


TOGGLES = [
    {"pos": "learned"}, {"pos": "learned", "n_kv_head": 1, "norm": "rmsnorm_nogain", "activation": "relu2"},
    {"pos": "rope", "n_kv_head": 1}, {"pos": "rope", "n_kv_head": 2, "qk_norm": "rms", "logit_softcap": 4.0},
    {"pos": "rope", "qk_norm": "rms_gain", "activation": "swiglu", "norm": "rmsnorm"},
    {"pos": "rope", "rope_scaling": "yarn", "rope_factor": 4.0}, {"pos": "learned", "tie_weights": False},
]


@pytest.mark.parametrize("toggles", TOGGLES, ids=lambda t: "-".join(map(str, t.values())))
def test_greedy_is_token_for_token_greedy_without(toggles):
    """To the last place of the context, over the borders of blocks and chunks, alone and beside others."""
    model = make(norm_embed=True, bias=False, **toggles)
    prompts = some_prompts()
    want = Sampling(max_new_tokens=53, temperature=0, logprobs=True)
    expected = Engine(model).generate(prompts, want)
    options = ({}, {"block": 5, "chunk": 9, "max_requests": 3}, {"block": 1}, {"batched": True, "block": 5})
    for by in (looked_up, lambda: drafted(model)):
        for option in options:
            engine = Engine(model, speculate=by(), **option)
            found = engine.generate(prompts, want)
            assert [request.ids for request in found] == [request.ids for request in expected], option
            for request, plain in zip(found, expected, strict=True):
                assert request.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
            assert engine.speculation.accepted > 10, "or nothing was tested"
            assert engine.speculation.proposed > engine.speculation.accepted


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"temperature": 0, "presence_penalty": 2.0},
    {"presence_penalty": 1.5, "frequency_penalty": 0.3, "repetition_penalty": 1.3, "min_p": 0.05},
    {"logit_bias": {3: 3.0, 5: -100}, "frequency_penalty": 0.2, "top_logprobs": 3, "prompt_logprobs": 2},
], ids=str)
def test_drawn_tokens_are_those_without(options, model):
    prompts = some_prompts()
    plain = Engine(model).generate(prompts, max_new_tokens=50, seed=7, **options)
    for speculate in (looked_up(), drafted(model)):
        found = Engine(model, speculate=speculate).generate(prompts, max_new_tokens=50, seed=7, **options)
        for request, expected in zip(found, plain, strict=True):
            assert request.ids == expected.ids
            assert request.cached == expected.cached == len(request.ids) - 1
            assert request.table.blocks and len(request.logprobs) == len(expected.logprobs)
            for tops in ("top_logprobs", "prompt_top_logprobs"):
                ids = [[[token for token, _ in top or []] for top in getattr(r, tops)] for r in (request, expected)]
                assert ids[0] == ids[1]
    assert speculate.accepted > 10, "or nothing was tested"


def test_a_draft_draws_with_the_requests_own_numbers(model):
    """The model as its own draft is right every time, drawn and with penalties: all passes are full."""
    for options in ({"temperature": 0}, {"seed": 3}, {"seed": 4, "frequency_penalty": 0.7, "repetition_penalty": 1.2}):
        speculate = drafted(model, model)
        (request,), steps = steps_of(Engine(model, speculate=speculate), [1, 2, 3], max_new_tokens=41, **options)
        speculate.count_finished()
        assert speculate.accepted == speculate.proposed and steps < 41 / 3
        other, slow = steps_of(Engine(model), [1, 2, 3], max_new_tokens=41, **options)
        assert request.ids == other[0].ids and slow == 41


def test_a_shadow_leaves_no_trace():
    choose = Chooser(Sampling(frequency_penalty=1.0, seed=3), 20)
    logits = torch.zeros(20)
    other = shadow(choose)
    drawn = [other(logits, []) for _ in range(9)]
    assert [shadow(choose)(logits, []) for _ in range(3)] == drawn[:1] * 3
    assert [choose(logits, []) for _ in range(9)] == drawn and len(set(drawn)) > 3


# -----------------------------------------------------------------------------
# The same distribution


def z_of_pairs(model, speculate, seeds=3000):
    """How far the frequencies of the next two tokens lie from the exact distribution, in standard deviations: the
    chi-square by Wilson & Hilferty. Below 3.72 lie 99.99% of fair draws."""
    want = Sampling(max_new_tokens=4, temperature=0.8)
    engine = Engine(model, max_requests=100, max_tokens=4000, speculate=speculate)
    counts = torch.zeros(5, 5)
    for first in range(0, seeds, 100):
        wants = [Sampling(max_new_tokens=4, temperature=0.8, seed=seed) for seed in range(first, first + 100)]
        for request in engine.generate([[0, 1, 2, 0]] * 100, wants):
            counts[request.tokens[1], request.tokens[2]] += 1
    exact = torch.zeros(5, 5)
    with torch.no_grad():
        first = probabilities(model(torch.tensor([[0, 1, 2, 0]]))[0][0, -1], want.temperature)
        for a in range(5):
            second = probabilities(model(torch.tensor([[0, 1, 2, 0, a]]))[0][0, -1], want.temperature)
            for b in range(5):
                third = probabilities(model(torch.tensor([[0, 1, 2, 0, a, b]]))[0][0, -1], want.temperature)
                exact[b] += first[a] * second[b] * third
    expected = seeds * exact
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    degrees = 24
    return ((chi2 / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def test_the_distribution_is_that_of_plain_sampling(monkeypatch):
    """Frequencies of the second and third token, which are proposed, against the exact ones; and as a negative control
    those of an engine that accepts every proposal."""
    model = make(vocab_size=5, block_size=16, n_layer=1, pos="rope", seed=2)
    always = Proposer(lambda request: [1, 2, 3])
    speculate = Speculation(always, cost=0.0, at_once=100)
    assert z_of_pairs(model, speculate) < 3.72
    assert 0 < speculate.accepted < speculate.proposed

    def accept_all(self, request, logits):
        proposals = request.proposals
        request.proposals = []
        for token, row in zip([*proposals, None], logits, strict=True):
            if token is not None:
                request.choose = lambda logits, ids, token=token: token
            self.draw(request, row)
            if token is not None and not request.finish:
                self.publish(request, 1)

    monkeypatch.setattr(Engine, "accept", accept_all)
    assert z_of_pairs(model, Speculation(always, cost=0.0, at_once=100), seeds=300) > 10


# -----------------------------------------------------------------------------
# What ends a text


@pytest.mark.parametrize("end", ["stop", "stop token", "eos", "length"])
def test_a_text_ends_within_accepted_proposals_as_it_does_without(end, model):
    """Wherever the end lies among the proposals: the same text, tokens and keys, and nothing of what follows."""
    wanted = {"max_new_tokens": 40, "seed": 3, "temperature": 2.0, "logprobs": True, "ignore_eos": end != "eos"}
    free = Engine(model, TOKENIZER).generate("abc", **{**wanted, "ignore_eos": True})
    tokens = free.tokens
    lasts = [i for i in range(6, 36) if tokens[i] not in tokens[:i] or end != "stop token"][:12]
    accepted = ends = 0
    for last in lasts:
        if end == "stop":
            wanted["stop"] = (TOKENIZER.decode(tokens[last - 2 : last + 1]) or "never",)
        elif end == "stop token":
            wanted["stop_tokens"] = (tokens[last],)
        elif end == "eos":
            wanted["logit_bias"] = {19: -1.0}
            wanted["seed"] = last
        else:
            wanted["max_new_tokens"] = last
        plain = Engine(model, TOKENIZER, block=1)
        expected = plain.generate("abc", **wanted)
        engine = Engine(model, TOKENIZER, block=1, speculate=drafted(model, model))
        request = engine.generate("abc", **wanted)
        assert (request.text, request.ids, request.finish) == (expected.text, expected.ids, expected.finish)
        assert request.cached == expected.cached and engine.tokens_read == plain.tokens_read
        assert request.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert engine.blocks.block_of.keys() == plain.blocks.block_of.keys(), "known: what was kept, and no more"
        assert engine.blocks.free == len(engine.blocks.users)
        assert set(engine.blocks.idle) == set(engine.blocks.digest_of) == set(engine.blocks.block_of.values())
        engine.speculation.count_finished()
        assert not engine.speculation.trials
        accepted += engine.speculation.accepted
        ends += request.finish == end.split()[0]
    assert accepted > 30 and ends >= 4, "or nothing was tested"


def test_a_proposal_never_leaves_a_block_known_that_it_filled(model):
    """A wrong proposal fills the block; the next request does not find its tokens there."""
    wrong = Speculation(Proposer(lambda request: [19] * 8), cost=0.0)
    engine = Engine(model, block=2, speculate=wrong)
    forbidden = {"max_new_tokens": 30, "temperature": 0, "logit_bias": {19: -100}}
    for _ in range(2):
        found = engine.generate([1, 2, 3], **forbidden)
        assert found.ids == Engine(model).generate([1, 2, 3], **forbidden).ids
        longer = engine.generate([*found.ids, 1], **forbidden)
        assert longer.cached_tokens == 32
        assert longer.ids == Engine(model).generate([*found.ids, 1], **forbidden).ids
    assert wrong.proposed > 20 and not wrong.accepted


def test_after_ctrl_c_within_a_step_nothing_is_left(model, monkeypatch):
    engine = Engine(model, speculate=Speculation(Proposer(lambda request: [19] * 8)))
    requests = [engine.submit([1, 2], max_new_tokens=20, temperature=0) for _ in range(2)]
    engine.step()
    draw, calls = engine.draw, []

    def interrupted(request, logits):
        calls.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(engine, "draw", draw)
    assert requests[1].proposals, "as the step left it"
    engine.cancel(requests[0])
    engine.speculation.at_once = 0
    while not requests[1].finish:
        engine.step()
    assert requests[1].ids == Engine(model).generate([1, 2], max_new_tokens=20, temperature=0).ids


def test_a_window_that_slides_is_not_read_ahead():
    """A proposal would take the place of a token that the one before it must still see."""
    model = make(pos="rope", block_size=24)
    speculate = Speculation(Proposer(lambda request: [3, 1, 4, 1, 5]), cost=0.0)
    engine = Engine(model, slide=True, speculate=speculate)
    request = engine.submit([1, 2, 3], max_new_tokens=80, seed=1)
    proposed = {}  # by the length of the text
    while not request.finish:
        length = len(request.ids)
        before = speculate.proposed
        engine.step()
        proposed[length] = speculate.proposed - before
    assert all(length + count <= 24 for length, count in proposed.items() if count)
    assert sum(proposed.values()) > 10 and len(proposed) > 50
    assert request.ids == Engine(model, slide=True).generate([1, 2, 3], max_new_tokens=80, seed=1).ids


# -----------------------------------------------------------------------------
# The scheduler


SCHEDULED = make(pos="rope", n_kv_head=2, block_size=24)
SCHEDULED_DRAFT = nearly(SCHEDULED)


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 14), st.integers(0, 8), st.booleans()), max_size=7),
       st.integers(3, 6), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.booleans(),
       st.sampled_from(["lookup", "draft", "short draft"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_requests_come_and_go_and_draw_what_they_would_alone(plans, count, most, chunk, seed, slide, who, batched):
    """Random arrivals, cancellations, memory for hardly one: all finish with what they would have drawn alone."""
    draft_engine = Engine(SCHEDULED_DRAFT, block=4, chunk=3, max_tokens=24 if who == "short draft" else 96)
    source = PromptLookup() if who == "lookup" else DraftModel(draft_engine)
    speculate = Speculation(source, most=5, cost=0.05, at_once=3)
    engine = Engine(SCHEDULED, max_tokens=count * 8, block=4, max_requests=most, chunk=chunk, slide=slide,
                    batched=batched, speculate=speculate)
    rng = random.Random(seed)
    requests, pending, step = [], sorted(plans, key=lambda plan: plan[2]), 0
    while pending or not all(request.finish for request in requests):
        while pending and pending[0][2] <= step:
            n, new, _, cancelled = pending.pop(0)
            new += 20 * (slide and n % 3 == 0)  # beyond the context of 24
            prompt = [1, 2, 3, 1, 2, 3, 1, 2][: n // 2] + [rng.randrange(5) for _ in range(n - n // 2)]
            requests.append(engine.submit(prompt, max_new_tokens=new, temperature=0.5 * (n % 2), seed=n))
            requests[-1].to_cancel = cancelled
        for request in requests:
            if request.to_cancel and rng.random() < 0.2:
                engine.cancel(request)
        before = [(request, len(request.ids)) for request in engine.running]
        engine.step()
        step += 1
        assert all(len(request.ids) - length <= 6 and not request.proposals for request, length in before)
        for request in engine.running:
            read = request.cached + 1 - request.prompt_tokens
            assert read <= max(0, len(request.tokens)) and len(request.ids) >= request.cached
            assert len(request.blocks) == request.blocks_needed
        users = [sum(i in request.blocks for request in engine.running) for i in range(len(engine.blocks.users))]
        assert users == engine.blocks.users and engine.blocks.free == users.count(0)
        assert step < 2000
    speculate.count_finished()
    assert engine.blocks.free == len(engine.blocks.users) and not speculate.trials
    assert draft_engine.blocks.free == len(draft_engine.blocks.users)
    assert not draft_engine.running and not draft_engine.waiting
    for request in requests:
        if request.finish != "cancelled":
            alone = Engine(SCHEDULED, block=4, slide=slide)
            prompt = request.ids[: request.prompt_tokens]
            assert request.tokens == alone.generate(prompt, request.sampling).tokens


def test_a_prompt_that_is_read_in_chunks_takes_its_room_first(model):
    """Nobody waits for rows because another one speculates."""
    engine = Engine(model, chunk=8, max_requests=2, speculate=drafted(model, model))
    fast = engine.submit([1, 2, 3], max_new_tokens=40, temperature=0)
    while engine.speculation.proposed < 9:
        engine.step()
    before = len(fast.tokens)
    engine.step()
    assert len(fast.tokens) == before + 5
    slow = engine.submit(some_prompts((30,))[0], max_new_tokens=3, temperature=0)
    for piece in range(1, 5):
        engine.step()
        assert slow.cached == 7 * piece and len(fast.tokens) == before + 5 + piece
    while not (fast.finish and slow.finish):
        engine.step()
    for request in (fast, slow):
        prompt = request.ids[: request.prompt_tokens]
        assert request.tokens == Engine(model).generate(prompt, request.sampling).tokens


def test_many_requests_at_once_do_not_speculate(model):
    speculate = looked_up(at_once=2)
    engine = Engine(model, speculate=speculate)
    engine.generate([[1, 2, 1, 2]] * 3, max_new_tokens=20, temperature=0)
    assert not speculate.proposed
    engine.generate([[1, 2, 1, 2]] * 2, max_new_tokens=20, temperature=0)
    assert speculate.proposed


# -----------------------------------------------------------------------------
# Fewer passes


def test_a_text_that_repeats_takes_a_fraction_of_the_passes():
    """Counting to 20 again and again: from the second round on 8 of 9 tokens are found in the text."""
    model = counting(pos="rope")
    engine = Engine(model, speculate="lookup")
    (request,), steps = steps_of(engine, [0], max_new_tokens=200, temperature=0)
    assert request.ids == [i % 20 for i in range(201)]
    assert steps <= 20 + 180 / 9 + 5
    assert steps_of(Engine(model), [0], max_new_tokens=200, temperature=0)[1] == 200
    drawn = {"max_new_tokens": 200, "temperature": 0.05, "seed": 1}
    assert steps_of(engine, list(range(20)) * 2, **drawn)[1] <= 200 / 9 + 5, "a prompt is looked up too"


def test_a_draft_of_one_layer_saves_passes_of_two():
    model = counting(pos="rope")
    draft = Engine(counting(pos="learned", n_layer=1))
    rows = noted_reads(draft)
    (request,), steps = steps_of(Engine(model, speculate=Speculation(DraftModel(draft), 4, 0.6)), [3],
                                 max_new_tokens=101, temperature=0)
    assert request.tokens == [(4 + i) % 20 for i in range(101)]
    assert steps <= 1 + 100 / 5 + 5, "the first ones find out"
    assert sum(rows) <= len(request.ids), "each token once: what was accepted stays in its cache"


@pytest.mark.parametrize("most", [1, 4, 8])
def test_where_nothing_is_accepted_little_more_is_read(most):
    """As Speculation's docstring says: some ten rows, then one in RETRY tokens."""
    model = counting(pos="rope")
    speculate = Speculation(Proposer(lambda request: [request.ids[-1]] * 8), most=most)
    (request,), steps = steps_of(Engine(model, speculate=speculate), [0], max_new_tokens=400, temperature=0)
    assert steps == 400 and not speculate.accepted
    assert 400 / RETRY - 2 <= speculate.proposed <= 11 + 400 / RETRY


def test_random_text_is_no_reason_to_read_ahead(model):
    """Tokens drawn nearly evenly from 20: one proposal in 20 is right by chance. The rest is at most one row in
    six tokens, for three kinds, or 2% of the passes."""
    speculate = looked_up()
    engine = Engine(make(pos="rope", block_size=1024, n_layer=1), speculate=speculate)
    request = engine.generate([1, 2], max_new_tokens=1000, temperature=1e4)
    speculate.count_finished()
    assert len(set(request.tokens)) == 20
    assert 0 < speculate.proposed - speculate.accepted < 1000 / 6


def test_a_text_that_begins_to_repeat_is_noticed():
    """After 300 tokens without any accepted, all are: the next try finds out."""
    model = counting(pos="rope")
    right = Proposer(lambda request: [(request.ids[-1] + 1 + i + 5 * (len(request.ids) < 300)) % 20 for i in range(8)])
    engine = Engine(model, speculate=Speculation(right))
    request = engine.submit([0], max_new_tokens=500, temperature=0)
    steps = 0
    while not request.finish:
        steps += len(request.ids) >= 300
        engine.step()
    assert steps <= RETRY + 200 / 9 + 8


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.5, 1.2])
def test_the_count_is_the_fastest_one(cost):
    for rate in (0.0, 0.05, 0.3, 0.6, 0.9, 1.0):
        speeds = [sum(rate**i for i in range(k + 1)) / (1 + k * cost) for k in range(9)]
        assert speeds[best_count(rate, cost, 8)] == pytest.approx(max(speeds))
    assert best_count(0.05, 0.1, 8) == 0 and best_count(1.0, 0.1, 8) == 8 and best_count(1.0, 0.1, 0) == 0


def test_an_estimate_forgets_what_was_long_ago():
    record = Record(last=0)
    for _ in range(50):
        record.add(8, 8, 0.1)
    assert record.count(0.1, 8, 0) == 8
    for _ in range(30):
        record.add(0, 8, 0.1)
    assert record.count(0.1, 8, 0) == 0 and record.count(0.1, 8, RETRY) == 1


# -----------------------------------------------------------------------------
# Looking up


class Text:
    """What PromptLookup sees of a request."""

    def __init__(self, ids):
        self.ids = ids


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_lookup_is_a_scan_for_the_longest_and_latest(ids, count, longest):
    source = PromptLookup(longest)
    text = Text([])
    for token in ids:  # the index grows with the text
        text.ids.append(token)
        kind = source.kind(text)
        length = len(text.ids)
        places = [(n, end) for n in range(1, longest + 1) for end in range(n, length)
                  if text.ids[end - n : end] == text.ids[length - n :]]
        if not places:
            assert kind == 0
            continue
        n, place = max(places)
        expected = list(text.ids)
        for i in range(count):
            expected.append(expected[place + i])
        assert kind == n and source.propose([(text, count)]) == [expected[length:]]
    source.end(text)
    assert not source.indexes and not source.places


def test_a_long_text_is_indexed_once():
    """The n-grams of a token are entered when it comes, and the text is never read again."""

    class Counted(list):
        read = 0

        def __getitem__(self, place):
            found = super().__getitem__(place)
            Counted.read += len(found) if isinstance(place, slice) else 1
            return found

    text = Text(Counted(range(5000)))
    source = PromptLookup()
    source.kind(text)
    before = Counted.read
    for i in range(100):
        text.ids.append(i)
        source.kind(text)
    assert Counted.read - before <= 100 * 12


# -----------------------------------------------------------------------------
# The draft model


def test_a_draft_reads_a_long_prompt_in_chunks_and_talks_share_it(model):
    draft = Engine(nearly(model), chunk=8, max_requests=8, block=4)
    engine = Engine(model, speculate=Speculation(DraftModel(draft), 4, 0.05))
    reads = noted_reads(draft)
    prompt = some_prompts((40,))[0]
    talk = engine.generate(prompt, max_new_tokens=12, temperature=0)
    assert max(reads) <= 8 and reads[:4] == [8] * 4
    assert talk.ids == Engine(model).generate(prompt, max_new_tokens=12, temperature=0).ids
    engine.generate([*talk.ids, 3], max_new_tokens=9, temperature=0)
    twin, = draft.running
    assert twin.cached_tokens >= 40, "the next turn finds what the draft has read"


def test_a_draft_with_a_short_context_proposes_to_its_end(model):
    draft = GPT(GPTConfig(**{**vars(model.config), "block_size": 16})).eval()
    draft.load_state_dict(model.state_dict(), strict=False)
    speculate = drafted(model, draft)
    (request,), steps = steps_of(Engine(model, speculate=speculate), [1, 2, 3], max_new_tokens=40, temperature=0)
    assert request.ids == Engine(model).generate([1, 2, 3], max_new_tokens=40, temperature=0).ids
    assert 8 <= speculate.accepted <= 13 and steps == 40 - speculate.accepted
    assert not Engine(model, speculate=speculate).generate([1] * 30, max_new_tokens=9).proposals


def test_the_keys_of_a_draft_are_those_of_what_was_kept(model):
    """Greedy, with proposals accepted and refused: at any time its cache is that of reading the text at once."""
    draft = Engine(nearly(model, 0.15), block=64)
    speculate = Speculation(DraftModel(draft), 4, 0.05)
    engine = Engine(model, speculate=speculate)
    request = engine.submit([1, 2, 3], max_new_tokens=50, temperature=0)
    while len(request.tokens) < 40:
        before = speculate.proposed
        engine.step()
        # now and then others run beside it, and a draft that was wrong is not asked for a while
        speculate.at_once = 0 if speculate.proposed > before and len(request.tokens) % 2 else 4
    twin = speculate.source.twins[request]
    speculate.how_many(request, 4)
    speculate.source.propose([(request, 2)])
    exact = Engine(draft.model, block=64)
    exact.generate(list(request.ids), max_new_tokens=1)
    n = len(request.ids)
    assert twin.request.cached == n
    first = twin.request.blocks[0] * 64
    for kept, read in zip(draft.keys, exact.keys, strict=True):
        torch.testing.assert_close(kept[first : first + n], read[:n], rtol=1e-4, atol=1e-4)
    assert 0 < speculate.accepted < speculate.proposed


# -----------------------------------------------------------------------------
# By name


def test_a_draft_must_know_the_same_tokens(model, tiny_run, tmp_path):
    tiny = load_tokenizer(tiny_run)
    with pytest.raises(ValueError, match=r"^speculate=nowhere is neither lookup nor a run .*nowhere holds no checkpo"):
        Engine(model, speculate="nowhere")
    with pytest.raises(ValueError, match=rf"a vocabulary of {tiny.vocab_size} tokens and the model one of 20: take"):
        Engine(model, TOKENIZER, speculate=str(tiny_run))
    other = CharTokenizer("".join(chr(ord("A") + i) for i in range(tiny.vocab_size - 2)))
    target = Engine.load(tiny_run, device="cpu", dtype="float32").model
    with pytest.raises(ValueError, match="the draft has another tokenizer than the model"):
        Engine(target, other, speculate=str(tiny_run))
    folder = shutil.copytree(tiny_run, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="speculate=.*damaged.*tokenizer") as caught:
        Engine(target, speculate=str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_an_engine_loads_its_draft_in_its_own_form(tiny_run, quantize):
    plain = Engine.load(tiny_run, device="cpu", dtype="float32", quantize=quantize)
    engine = Engine.load(tiny_run, device="cpu", dtype="float32", quantize=quantize, speculate=str(tiny_run))
    draft = engine.speculation.source.engine
    assert type(draft.model.lm_head) is type(engine.model.lm_head) and draft.dtype == engine.dtype
    assert engine.speculation.cost == pytest.approx(1.1), "a draft as large as the model"
    wants = {"max_new_tokens": 12, "seed": 2}
    assert engine.generate("To be", **wants).ids == plain.generate("To be", **wants).ids


def test_the_samples_are_the_same_with_the_key(call_script, tiny_run):
    settings = [f"--out_dir={tiny_run}", "--device=cpu", "--dtype=float32", "--start=To be", "--num_samples=2",
                "--max_new_tokens=30", "--top_k=0"]
    code, expected, _ = call_script("sample.py", *settings)
    assert code == 0
    for speculate in ("lookup", str(tiny_run), ""):
        assert call_script("sample.py", *settings, f"--speculate={speculate}")[:2] == (0, expected)
    for script, more in (("sample.py", settings), ("chat.py", [f"--out_dir={tiny_run}", "--template=minichat"])):
        code, out, err = call_script(script, *more, "--speculate=nowhere")
        assert (code, out) == (2, "") and err.count("error:") == 1 and "Traceback" not in err
        if script == "sample.py":
            assert "error: speculate=nowhere is neither lookup nor a run" in err
