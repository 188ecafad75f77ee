"""The engine of infer.py held to the plain way: the same tokens with a cache, in blocks, in chunks, beside others."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import infer
from infer import Engine, stream
from inference import kvcache
from inference.sampling import Sampling
from model import GPT, GPTConfig
from tokenizer import CharTokenizer

CHARS = "abcdefghijklmnopqr"
TOKENIZER = CharTokenizer(CHARS)  # 18 characters, bos 18, eos 19


def make(seed=0, **changes):
    """A small model with opinions, where a fresh one has hardly any."""
    torch.manual_seed(seed)
    sizes = {"block_size": 24, "vocab_size": 20, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return make(pos="rope", n_kv_head=2)


def greedy(model, prompt, new):
    """The plain way: the `new` most likely tokens after `prompt`, the whole context read again for each."""
    idx = torch.tensor([prompt], device=model.lm_head.weight.device)
    return model.generate(idx, new, temperature=0)[0, len(prompt) :].tolist()


def some_prompts(lengths=(1, 3, 8, 12), vocab=20, seed=1):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


TOGGLES = [
    dict(pos=pos, n_kv_head=kv, qk_norm=qk, logit_softcap=cap, norm=norm, activation=activation)
    for (pos, kv, qk), (cap, norm, activation) in itertools.product(
        itertools.product(("learned", "rope"), (0, 1, 2), ("none", "rms", "rms_gain")),
        ((0.0, "layernorm", "gelu"), (4.0, "rmsnorm_nogain", "relu2")),
    )
]
TOGGLES += [dict(pos="rope", rope_scaling=kind, rope_factor=4.0) for kind in ("linear", "ntk", "yarn")]


@pytest.mark.parametrize("toggles", TOGGLES, ids=lambda t: "-".join(map(str, t.values())))
def test_greedy_with_a_cache_is_greedy_without(toggles, monkeypatch):
    """Prompts of unequal length, up to the last place of the context, over the borders of blocks and chunks; and the
    logits that the tokens come from are those of the whole context read again, to 1e-5."""
    model = make(norm_embed=True, bias=False, tie_weights=False, **toggles)
    prompts, new = some_prompts(), 13  # 12 + 13 - 1 is the context of 24
    expected = [greedy(model, prompt, new) for prompt in prompts]
    seen = []
    draw = Engine.draw

    def drawn(self, request, logits):
        seen.append((list(request.ids), logits))
        draw(self, request, logits)

    monkeypatch.setattr(Engine, "draw", drawn)
    for options in ({}, {"block": 5, "chunk": 4, "max_requests": 3}, {"block": 1, "max_tokens": 40},
                    {"batched": True, "block": 5}):
        found = Engine(model, **options).generate(prompts, max_new_tokens=new, temperature=0)
        assert [request.tokens for request in found] == expected, options
    for ids, logits in seen[:: max(1, len(seen) // 40)]:
        with torch.no_grad():
            exact = model(torch.tensor([ids]), last_only=True)[0][0, -1]
        torch.testing.assert_close(logits, exact, rtol=1e-5, atol=1e-5)


DRAWN = [Sampling(max_new_tokens=10, temperature=0.9, seed=1), Sampling(max_new_tokens=9, temperature=0),
         Sampling(max_new_tokens=8, top_k=5, seed=4, logprobs=True), Sampling(max_new_tokens=11, min_p=0.1, seed=9),
         Sampling(max_new_tokens=9, top_p=0.8, seed=4, frequency_penalty=0.5, logit_bias={3: 2.0}),
         Sampling(max_new_tokens=10, repetition_penalty=1.3, seed=2, top_logprobs=3)]


@pytest.mark.parametrize("options", [{}, {"chunk": 8, "max_requests": 3}, {"batched": True, "block": 3}],
                         ids=["at once", "in chunks", "batched"])
def test_the_device_draws_what_the_host_draws(options, model):
    """Requests of all kinds beside each other, prompts that are read in pieces, rows that are taken again."""
    prompts = some_prompts()
    prompts = [prompts[i % len(prompts)] for i in range(len(DRAWN))]
    hosts = Engine(model).generate(prompts, DRAWN)
    engine = Engine(model, draws=True, **options)
    for _ in range(2):  # the second time in rows of requests that have ended
        devices = engine.generate(prompts, DRAWN)
        assert [r.tokens for r in devices] == [r.tokens for r in hosts]
        for device, host in zip(devices, hosts, strict=True):
            assert device.logprobs == pytest.approx(host.logprobs, abs=1e-5)
            for top, expected in zip(device.top_logprobs, host.top_logprobs, strict=True):
                assert [token for token, _ in top] == [token for token, _ in expected]
        assert sorted(engine.rows) == list(range(engine.max_requests))


def test_next_tokens_and_pieces_of_prompts_are_two_passes_with_draws_on_the_device(model, monkeypatch):
    passes = []
    for name in ("draw_next", "read_and_draw"):
        plain = getattr(Engine, name)
        monkeypatch.setattr(Engine, name, lambda self, parts, name=name, plain=plain: (
            passes.append((name, len(parts))), plain(self, parts))[1])
    engine = Engine(model, draws=True, chunk=6)
    first = engine.submit([1, 2, 3], max_new_tokens=6)
    engine.step()
    engine.submit(list(range(12)), max_new_tokens=2)
    engine.step()
    assert passes == [("read_and_draw", 1), ("draw_next", 1), ("read_and_draw", 1)] and len(first.tokens) == 2


@pytest.mark.parametrize("draws", [False, True])
def test_logits_that_are_no_numbers_are_an_error(draws):
    broken = make()
    broken.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are no numbers"):
        Engine(broken, draws=draws).generate([1, 2], max_new_tokens=3, seed=1)


def test_what_is_drawn_does_not_depend_on_what_is_beside(model):
    wants = [Sampling(max_new_tokens=10, seed=seed, temperature=t, top_k=k, top_p=p)
             for seed, t, k, p in ((1, 1.0, 0, 1.0), (2, 0.7, 5, 1.0), (3, 1.3, 0, 0.8), (3, 1.0, 0, 1.0))]
    prompts = some_prompts()
    alone = [Engine(model).generate(prompt, want).tokens for prompt, want in zip(prompts, wants, strict=True)]
    assert [r.tokens for r in Engine(model).generate(prompts, wants)] == alone
    small = Engine(model, chunk=3, max_requests=3)
    assert [r.tokens for r in small.generate(prompts[::-1], wants[::-1])] == alone[::-1]


@pytest.mark.parametrize("options", [
    {"temperature": 0.7, "top_k": 5}, {"temperature": 0, "presence_penalty": 2.0, "frequency_penalty": -0.5},
    {"presence_penalty": 1.5, "frequency_penalty": 2.0, "repetition_penalty": 1.3, "min_p": 0.05},
    {"logit_bias": {3: 6.0, 5: -100, 19: 4.5}, "frequency_penalty": 1.0},
], ids=str)
def test_the_engine_and_the_plain_way_draw_alike(options, model):
    prompts = some_prompts()
    found = Engine(model, chunk=3, block=4).generate(prompts, max_new_tokens=12, seed=2, **options)
    for prompt, request in zip(prompts, found, strict=True):
        assert list(stream(model, prompt, 12, seed=2, **options)) == request.tokens
    assert request.tokens != Engine(model).generate(prompts[-1], max_new_tokens=12, seed=2).tokens


def test_a_text_goes_in_and_comes_out(model):
    engine = Engine(model, TOKENIZER)
    whole = engine.generate("abc", max_new_tokens=15, seed=4, ignore_eos=True)
    assert whole.finish == "length" and len(whole.tokens) == 15 and whole.text == TOKENIZER.decode(whole.tokens)
    assert "".join(engine.stream("abc", max_new_tokens=15, seed=4, ignore_eos=True)) == whole.text
    assert engine.generate("", max_new_tokens=3).ids[0] == TOKENIZER.bos
    assert engine.generate([], max_new_tokens=1) == []
    with pytest.raises(ValueError, match="no tokenizer"):
        Engine(model).submit("abc")
    with pytest.raises(ValueError, match="prompt is empty"):
        Engine(model, CharTokenizer(CHARS + "st", specials=())).submit("")
    with pytest.raises(ValueError, match="cannot encode 'z'"):
        engine.submit("az")


def test_what_ends_a_text(model):
    engine = Engine(model, TOKENIZER)
    hot = Sampling(max_new_tokens=20, temperature=3.0, ignore_eos=True)
    found = [engine.generate("abc", hot, seed=seed) for seed in range(40)]
    with_eos = next(request for request in found if TOKENIZER.eos in request.tokens)
    ended = engine.generate("abc", max_new_tokens=20, seed=with_eos.sampling.seed, temperature=3.0)
    assert ended.finish == "eos" and ended.tokens == with_eos.tokens[: with_eos.tokens.index(TOKENIZER.eos)]

    free = next(request for request in found if len(set(request.text)) > 9)
    stop = free.text[4:7]  # over three tokens
    stopped = engine.generate("abc", replace(free.sampling, stop=(stop, free.text[6:9])))
    assert stopped.finish == "stop" and stopped.text == free.text[: free.text.index(stop)]
    assert "".join(engine.stream("abc", replace(free.sampling, stop=(stop,)))) == stopped.text
    token = free.tokens[6]
    by_token = engine.generate("abc", replace(free.sampling, stop_tokens=(token,)))
    assert by_token.finish == "stop" and by_token.tokens == free.tokens[: free.tokens.index(token)]


def test_log_probabilities_are_the_models_own(model):
    found = Engine(model).generate([1, 2, 3], max_new_tokens=8, temperature=0.5, top_k=3, logprobs=True, seed=1)
    for i, logprob in enumerate(found.logprobs):
        with torch.no_grad():
            logits = model(torch.tensor([found.ids[: 3 + i]]), last_only=True)[0][0, -1]
        assert logprob == pytest.approx(float(logits.log_softmax(-1)[found.tokens[i]]), abs=1e-4)
    assert len(found.logprobs) == 8 and not found.top_logprobs and not found.prompt_logprobs


def exact_logprobs(model, ids):
    """log-probabilities (T, vocab_size) of what follows each token of `ids`."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0].log_softmax(-1)


def assert_top(top, exact):
    """The most likely tokens in their order, with the log-probabilities of the whole context read at once."""
    expected = exact.sort(descending=True, stable=True)
    assert [token for token, _ in top] == expected.indices[: len(top)].tolist()
    assert [logprob for _, logprob in top] == pytest.approx(expected.values[: len(top)].tolist(), abs=1e-4)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_the_most_likely_tokens_are_those_before_any_penalty(count, model):
    options = {"temperature": 0.5, "presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 2.0,
               "logit_bias": {4: 50}, "min_p": 0.5}
    found = Engine(model).generate([1, 2, 3], max_new_tokens=8, top_logprobs=count, **options)
    exact = exact_logprobs(model, found.ids)
    assert len(found.top_logprobs) == len(found.logprobs) == 8 and set(found.tokens) == {4}
    for i, (top, logprob) in enumerate(zip(found.top_logprobs, found.logprobs, strict=True)):
        assert len(top) == count and logprob == pytest.approx(float(exact[2 + i, 4]), abs=1e-4)
        assert_top(top, exact[2 + i])


@pytest.mark.parametrize("options", [
    {}, {"block": 4, "chunk": 3, "max_requests": 2}, {"batched": True, "chunk": 1, "max_requests": 1},
    {"batched": False}, {"draws": True, "chunk": 5},
], ids=["at once", "in chunks", "batched", "apart", "drawn on the device"])
def test_log_probabilities_of_a_prompt_are_exact_though_parts_of_it_are_known(options, model):
    prompts = [*some_prompts((12, 1, 9)), some_prompts((12,))[0][:8] + [7, 7]]
    engine = Engine(model, max_tokens=200, **options)
    engine.generate(prompts, max_new_tokens=1)  # now the full blocks of all prompts are known
    wants = [Sampling(max_new_tokens=4, temperature=0, prompt_logprobs=top) for top in (True, 5, 2, 20)]
    beside = engine.submit(prompts[0], max_new_tokens=6, temperature=0)
    for request, want in zip(engine.generate(prompts, wants), wants, strict=True):
        prompt = request.ids[: request.prompt_tokens]
        exact = exact_logprobs(model, prompt)
        expected = [float(exact[i, token]) for i, token in enumerate(prompt[1:])]
        assert request.prompt_logprobs[0] is None and request.cached_tokens == 0
        assert request.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        assert request.tokens == greedy(model, prompt, 4)
        if want.prompt_logprobs is True:
            assert request.prompt_top_logprobs == []
            continue
        assert len(request.prompt_top_logprobs) == len(prompt) and request.prompt_top_logprobs[0] is None
        for i, top in enumerate(request.prompt_top_logprobs[1:]):
            assert len(top) == want.prompt_logprobs
            assert_top(top, exact[i])
    while not beside.finish:
        engine.step()
    assert beside.tokens == greedy(model, prompts[0], 6) and not beside.prompt_logprobs
    assert beside.cached_tokens == (8 if engine.block == 4 else 0)


def test_presence_and_frequency_are_counted_over_the_answer_alone(model):
    """OpenAI's definition, with the whole context read again for each token."""
    presence, frequency = 0.8, 0.6
    ids = [1, 2, 2, 3]
    for _ in range(16):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0][0, -1]
        for token in set(ids[4:]):
            logits[token] -= presence + frequency * ids[4:].count(token)
        ids = [*ids, int(logits.argmax())]
    found = Engine(model).generate([1, 2, 2, 3], max_new_tokens=16, temperature=0, presence_penalty=presence,
                                   frequency_penalty=frequency)
    assert found.ids == ids and ids[4:] != greedy(model, ids[:4], 16)


def test_a_bias_forces_and_forbids_tokens(model):
    engine = Engine(model)
    assert engine.generate([1, 2], max_new_tokens=9, logit_bias={7: 100}).tokens == [7] * 9
    free = engine.generate([1, 2], max_new_tokens=9, temperature=0).tokens
    without = engine.generate([1, 2], max_new_tokens=9, temperature=0, logit_bias={free[0]: -100}).tokens
    assert free[0] not in without
    with pytest.raises(ValueError, match="^logit_bias names token 20, outside the model's vocabulary of 20$"):
        engine.submit([1, 2], max_new_tokens=1, logit_bias={20: 1})
    with pytest.raises(ValueError, match="logit_bias names token 99"):
        next(stream(model, [1, 2], 1, logit_bias={99: 1}))
    assert not engine.waiting


def test_a_repetition_penalty_says_less_of_the_same(model):
    engine = Engine(model)
    free = engine.generate([1, 2], max_new_tokens=20, temperature=0)
    held = engine.generate([1, 2], max_new_tokens=20, temperature=0, repetition_penalty=1e6)
    assert len(set(held.tokens)) > len(set(free.tokens)) and not {1, 2} & set(held.tokens[:10])


# -----------------------------------------------------------------------------
# The end of the context


@pytest.mark.parametrize("n, new, named", [(25, 1, "context of 24"), (10, 16, "16 new ones"), (24, 2, "context of 24")])
def test_what_does_not_fit_the_context_is_refused_before_it_starts(model, n, new, named):
    engine = Engine(model)
    with pytest.raises(ValueError, match=named):
        engine.submit([1] * n, max_new_tokens=new)
    assert engine.generate([1] * 24, max_new_tokens=1, temperature=0).finish == "length"
    with pytest.raises(ValueError, match="never fits into max_tokens=16"):
        Engine(model, max_tokens=16).submit([1] * 10, max_new_tokens=8)
    with pytest.raises(ValueError, match="vocabulary of 20"):
        engine.submit([20])
    assert not engine.waiting and not engine.running


@pytest.mark.parametrize("block", [16, 7])
def test_a_window_slides_as_long_as_one_likes(block):
    """Of one layer, keys and values depend on their token alone: then sliding is reading the last 24 tokens again."""
    model = make(pos="rope", n_layer=1)
    expected = greedy(model, [3, 1, 4], 90)
    engine = Engine(model, slide=True, block=block, max_tokens=2 * 28)
    found = engine.generate([[3, 1, 4], [5]], max_new_tokens=90, temperature=0)
    assert found[0].tokens == expected and len(found[1].tokens) == 90
    assert engine.blocks.free == len(engine.blocks.users)
    with pytest.raises(ValueError, match="slide needs pos='rope'"):
        Engine(make(pos="learned"), slide=True)


# -----------------------------------------------------------------------------
# Memory


def test_the_cache_takes_what_the_formula_says_and_mqa_divides_it():
    taken = {}
    for kv in (4, 2, 1):
        model = make(n_kv_head=kv)
        engine = Engine(model, max_tokens=160)
        taken[kv] = engine.kv_bytes
        assert engine.kv_bytes == model.kv_cache_bytes(160)
    assert taken[4] == 2 * taken[2] == 4 * taken[1]


def test_keys_and_values_of_few_heads_are_never_repeated(monkeypatch):
    sizes = []
    kernel = kvcache.F.scaled_dot_product_attention
    monkeypatch.setattr(kvcache.F, "scaled_dot_product_attention",
                        lambda q, k, v, **how: (sizes.append((k.size(1), v.size(1))), kernel(q, k, v, **how))[1])
    Engine(make(n_kv_head=1)).generate(some_prompts(), max_new_tokens=5)
    assert set(sizes) == {(1, 1)}


def test_prompts_that_begin_alike_share_their_blocks(model):
    common, wants = [1, 2, 3, 4, 5, 6, 7, 8], {"max_new_tokens": 6, "temperature": 0}
    prompts = [[*common, 9, 10], [*common, 11], [*common[:4], 12, 13], list(common)]
    alone = [Engine(model).generate(prompt, **wants).tokens for prompt in prompts]
    engine = Engine(model, block=4, max_tokens=200)
    requests = [engine.submit(prompts[0], **wants)]
    engine.step()
    requests += [engine.submit(prompt, **wants) for prompt in prompts[1:]]
    engine.step()
    used = [set(request.blocks) for request in requests]
    assert len(used[0] & used[1]) == 2 and len(used[0] & used[2]) == 1
    assert len(used[0] & used[3]) == 1, "the last token of a prompt is read, for what follows from it"
    assert requests[1].blocks[:2] == requests[0].blocks[:2] and max(engine.blocks.users) == 4
    while any(not request.finish for request in requests):
        engine.step()
    assert [request.tokens for request in requests] == alone
    assert engine.blocks.free == len(engine.blocks.users)


# -----------------------------------------------------------------------------
# What finished requests leave


@pytest.fixture(scope="module")
def talker():
    """A small model with a context of 1,024."""
    return make(pos="rope", n_kv_head=2, block_size=1024, n_layer=1)


@pytest.mark.parametrize("options", [{}, {"slide": True}, {"batched": False}, {"draws": True}],
                         ids=["plain", "slide", "apart", "drawn on the device"])
def test_the_next_turn_of_a_talk_reads_only_what_is_new(options, talker):
    """800 tokens of prompt and answer, then a message of 20, and one of 30."""
    engine = Engine(talker, **options)
    others = engine.blocks.allocate(30)  # they leave a gap in front of the talk
    talk = engine.generate(some_prompts((740,))[0], max_new_tokens=60, temperature=0)
    engine.blocks.release(others)
    assert engine.tokens_read == len(talk.ids) - 1 and talk.cached_tokens == 0, "the last one is drawn, not read"
    for message in some_prompts((20, 30), seed=5):
        prompt = talk.ids + message
        before = engine.tokens_read
        talk = engine.generate(prompt, max_new_tokens=8, temperature=0)
        read = engine.tokens_read - before - 7
        assert read == len(prompt) - talk.cached_tokens <= len(message) + engine.block
        assert talk.cached_tokens % engine.block == 0 and talk.table.neighbours, "no copy of what is read"
        assert talk.tokens == greedy(talker, prompt, 8)
    engine.blocks.forget()  # negative control
    assert engine.generate(talk.ids, max_new_tokens=1).cached_tokens == 0


@pytest.mark.parametrize("end", ["stop", "length", "eos", "cancelled"])
def test_a_turn_that_ends_in_any_way_is_remembered(end, talker):
    """Prompt and answer, as far as they were read: after a token that ends the answer all of it, else all but one."""
    prompt = some_prompts((50,))[0]
    tokens = Engine(talker).generate(prompt, max_new_tokens=40, seed=3, temperature=2.0).tokens
    last = next(i for i in range(20, 40) if tokens[i] not in tokens[:i] or tokens[i] == 19)
    engine = Engine(talker, CharTokenizer(CHARS), block=1)
    request = engine.submit(prompt, max_new_tokens=last + 1, seed=3, temperature=2.0, ignore_eos=end != "eos",
                            stop_tokens=(tokens[last],) if end == "stop" else (),
                            logit_bias={19: 100} if end == "eos" else ())
    while not request.finish:
        if end == "cancelled" and len(request.tokens) == 7:
            engine.cancel(request)
        else:
            engine.step()
    assert request.finish == end
    whole = end in ("stop", "eos")
    assert engine.generate([*request.ids, 5], max_new_tokens=1).cached_tokens == len(request.ids) - (not whole)
    assert engine.blocks.free == len(engine.blocks.users)


def test_a_request_that_outgrows_the_context_shares_nothing(model):
    engine = Engine(model, slide=True, block=4, max_tokens=200)
    prompt = some_prompts((12,))[0]
    alone = engine.generate(prompt, max_new_tokens=40, temperature=0)
    assert not engine.blocks.block_of and not engine.blocks.digest_of
    assert engine.generate(prompt, max_new_tokens=13, temperature=0).cached_tokens == 0
    assert len(engine.blocks.block_of) == 6, "this one fits, and all its 24 tokens were read"
    again = engine.generate(prompt, max_new_tokens=40, temperature=0)
    assert again.tokens == alone.tokens and again.cached_tokens == 0
    assert engine.generate(prompt, max_new_tokens=13, temperature=0).cached_tokens == 8


def test_each_block_is_hashed_once(monkeypatch, talker):
    """No prefix is hashed again: the work of a step does not grow with the text."""
    hashed = []
    digest = kvcache.block_digest

    def counted(parent, tokens):
        hashed.append(tuple(tokens))
        return digest(parent, tokens)

    monkeypatch.setattr(kvcache, "block_digest", counted)
    monkeypatch.setattr(infer, "block_digest", counted)
    request = Engine(talker, block=8).generate(some_prompts((100,))[0], max_new_tokens=61)
    assert hashed == [tuple(request.ids[i : i + 8]) for i in range(0, 160, 8)]


def test_weights_that_change_are_followed_after_forget():
    model = make(pos="rope")
    engine = Engine(model, block=4)
    prompt = some_prompts((12,))[0]
    engine.generate(prompt, max_new_tokens=4)
    running = engine.submit(prompt, max_new_tokens=8)
    engine.step()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    engine.blocks.forget()
    assert engine.generate(prompt, max_new_tokens=4, temperature=0).tokens == greedy(model, prompt, 4)
    while not running.finish:
        engine.step()
    assert engine.generate([*running.ids[:16], 1], max_new_tokens=1).cached_tokens < 16, "read with the old weights"
    assert engine.generate(prompt, max_new_tokens=4, temperature=0).tokens == greedy(model, prompt, 4)


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(0, 12), st.booleans()), max_size=9),
       st.integers(3, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_requests_come_and_go_and_no_block_is_lost_or_shared_wrongly(plans, count, block, most, seed, slide):
    """Random arrivals, cancellations and memory for hardly one: all finish, with what they would have drawn alone."""
    model, rng = SCHEDULED, random.Random(seed)
    engine = Engine(model, max_tokens=count * 8, block=block, max_requests=most, chunk=5, slide=slide)
    requests, pending, step = [], sorted(plans, key=lambda plan: plan[2]), 0
    while pending or not all(request.finish for request in requests):
        while pending and pending[0][2] <= step:
            n, new, _, cancelled = pending.pop(0)
            if slide and n % 3 == 0:
                new += 20  # beyond the context of 24
            prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10][: n // 2] + [rng.randrange(20) for _ in range(n - n // 2)]
            request = engine.submit(prompt, max_new_tokens=new, temperature=0)
            request.to_cancel = cancelled
            requests.append(request)
        for request in requests:
            if request.to_cancel and rng.random() < 0.2:
                engine.cancel(request)
        engine.step()
        step += 1
        users = [0] * len(engine.blocks.users)
        for request in engine.running:
            for i in request.blocks:
                users[i] += 1
        assert users == engine.blocks.users and engine.blocks.free == users.count(0)
        assert set(engine.blocks.idle) == {i for i in engine.blocks.digest_of if not users[i]}
        assert len(engine.running) <= most and step < 2000
    assert engine.blocks.free == len(engine.blocks.users)
    assert set(engine.blocks.idle) == set(engine.blocks.digest_of) == set(engine.blocks.block_of.values())
    for request in requests:
        if request.finish != "cancelled":
            prompt = request.ids[: request.prompt_tokens]
            new = request.sampling.max_new_tokens
            if len(prompt) + new - 1 <= 24:
                assert request.tokens == greedy(model, prompt, new)
            else:
                alone = Engine(model, block=block, slide=True).generate(prompt, max_new_tokens=new, temperature=0)
                assert request.tokens == alone.tokens


SCHEDULED = make(pos="rope", n_kv_head=2)


def test_an_engine_is_of_use_after_a_mistake_and_after_ctrl_c(model, monkeypatch):
    engine = Engine(model)
    with pytest.raises(ValueError):
        engine.generate([[1, 2], [99]], max_new_tokens=4)
    assert not engine.waiting and not engine.running and engine.blocks.free == len(engine.blocks.users)
    monkeypatch.setattr(Engine, "draw", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([1, 2], max_new_tokens=4)
    monkeypatch.undo()
    assert not engine.running and engine.blocks.free == len(engine.blocks.users)
    text = engine.stream([1, 2], max_new_tokens=9)
    next(text, None)
    text.close()  # whoever reads has enough
    assert not engine.running and engine.generate([1, 2], max_new_tokens=4).finish == "length"


def test_half_precision_and_int8_say_nearly_the_same(tiny_run):
    """They promise less: the log-probabilities of a text are close, and every form loads by name."""
    engines = [Engine.load(tiny_run, device="cpu", dtype=dtype, quantize=quantize)
               for dtype, quantize in (("float32", ""), ("bfloat16", ""), ("float32", "int8"), ("bfloat16", "int8"))]
    scores = []
    for engine in engines:
        request = engine.generate("To be", max_new_tokens=1, logprobs=True, temperature=0)
        scores.append(request.logprobs[0])
        assert engine.kv_dtype in (engine.dtype, torch.float32)
    assert all(math.isclose(score, scores[0], abs_tol=0.1) for score in scores)


# -----------------------------------------------------------------------------
# What a prompt may be


@pytest.mark.parametrize("prompt", [
    (3, 1, 4), np.array([3, 1, 4]), np.array([3, 1, 4], np.uint16), torch.tensor([3, 1, 4]),
    [np.int64(3), np.int32(1), torch.tensor(4)],
], ids=["tuple", "numpy", "uint16", "torch", "mixed numbers"])
def test_ids_of_any_kind_are_a_prompt(prompt, model):
    engine = Engine(model)
    expected = engine.generate([3, 1, 4], max_new_tokens=5, temperature=0).ids
    assert engine.generate(prompt, max_new_tokens=5, temperature=0).ids == expected
    several = engine.generate([prompt, [5]], max_new_tokens=5, temperature=0)
    assert several[0].ids == expected and len(several) == 2


def test_rows_of_ids_are_several_prompts(model):
    engine = Engine(model)
    for rows in (np.array([[3, 1], [4, 1]]), torch.tensor([[3, 1], [4, 1]])):
        assert [request.ids[:2] for request in engine.generate(rows, max_new_tokens=1)] == [[3, 1], [4, 1]]


@pytest.mark.parametrize("prompt", [np.array([], int), torch.zeros(0, dtype=torch.long)], ids=["numpy", "torch"])
def test_an_empty_row_is_an_empty_prompt(prompt, model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        Engine(model).generate(prompt)
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(stream(model, prompt, 1))


@pytest.mark.parametrize("prompt", [
    np.array([0.5, 1.0]), torch.tensor([1.5]), None, {"ids": [1]}, [[[1]]], [True, 2], 7,
    torch.zeros(1, 2, 3, dtype=torch.long),
], ids=repr)
def test_what_is_no_prompt_is_one_line(prompt, model):
    with pytest.raises(ValueError, match="a prompt is a string or one row of token ids") as caught:
        Engine(model).generate(prompt, max_new_tokens=1)
    assert "\n" not in str(caught.value)
