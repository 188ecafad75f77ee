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


def test_what_is_drawn_does_not_depend_on_what_is_beside(model):
    wants = [Sampling(max_new_tokens=10, seed=seed, temperature=t, top_k=k, top_p=p)
             for seed, t, k, p in ((1, 1.0, 0, 1.0), (2, 0.7, 5, 1.0), (3, 1.3, 0, 0.8), (3, 1.0, 0, 1.0))]
    prompts = some_prompts()
    alone = [Engine(model).generate(prompt, want).tokens for prompt, want in zip(prompts, wants, strict=True)]
    assert [r.tokens for r in Engine(model).generate(prompts, wants)] == alone
    small = Engine(model, chunk=3, max_requests=3)
    assert [r.tokens for r in small.generate(prompts[::-1], wants[::-1])] == alone[::-1]
    plain = list(stream(model, prompts[1], 10, temperature=0.7, top_k=5, seed=2))
    assert alone[1] == plain, "the engine and the plain way draw alike"


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
    assert len(found.logprobs) == 8


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


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(0, 12), st.booleans()), max_size=9),
       st.integers(3, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_requests_come_and_go_and_no_block_is_lost_or_shared_wrongly(plans, count, block, most, seed):
    """Random arrivals, cancellations and memory for hardly one: all finish, with what they would have drawn alone."""
    model, rng = SCHEDULED, random.Random(seed)
    engine = Engine(model, max_tokens=count * 8, block=block, max_requests=most, chunk=5)
    requests, pending, step = [], sorted(plans, key=lambda plan: plan[2]), 0
    while pending or not all(request.finish for request in requests):
        while pending and pending[0][2] <= step:
            n, new, _, cancelled = pending.pop(0)
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
        assert len(engine.running) <= most and step < 2000
    assert engine.blocks.free == len(engine.blocks.users) 
    for request in requests:
        if request.finish != "cancelled":
            prompt = request.ids[: request.prompt_tokens]
            assert request.tokens == greedy(model, prompt, request.sampling.max_new_tokens)


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
