"""OpenAI's requests and answers as data: what a client sends becomes prompts or one clean error, and what the engine
drew becomes the same answer, whole or in pieces. No server runs here."""

import json
import math
import re
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_chat import WITH_BYTES, WITH_CHARS, chain, ids_of, model_of
from test_house import imports

from conversation import Template, add_template
from infer import Engine
from model import GPT, GPTConfig
from serving import api
from serving.api import (
    DONE,
    APIError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Served,
    TokenizeBody,
    TokenNames,
    event,
    parse,
    plan_chat,
    plan_completion,
)
from tokenizer import BPETokenizer, CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
BODIES = [CompletionBody, ChatBody, TokenizeBody, DetokenizeBody]
CONTEXT = 128
PYTHON_WORDS = re.compile(r"\b(None|True|False|NaN|nan|inf|Infinity|dict|str|bool|NoneType|Traceback|\w+Error)\b"
                          r"|pydantic|surrogates not allowed|codec|Input should|Expecting")
Progress = namedtuple("Progress", "tokens text finish")
START = Progress(0, 0, "")
HELLO = [{"role": "user", "content": "hello"}]


def serve(tokenizer, model, reply_tokens=32, most_choices=16, name="tiny", **options):
    """-> (Served, Engine) of a model"""
    template = Template(tokenizer) if tokenizer and tokenizer.template else None
    served = Served(name, 1_700_000_000, tokenizer, template, model.config.block_size, model.config.vocab_size,
                    reply_tokens, most_choices)
    return served, Engine(model, tokenizer, **options)


def says(text, tokenizer=WITH_CHARS, after="<|assistant|>"):
    """A model that says a text after a token. No token may occur twice in it. -> (Served, Engine)"""
    followers = chain(tokenizer, text)
    ids = ids_of(tokenizer, after, text)
    followers = {token: [then] for token, then in zip(ids, ids[1:], strict=False)}
    return serve(tokenizer, model_of(tokenizer, followers, CONTEXT))


def random_model(tokenizer, seed=0, **options):
    """A model with random weights, whose tokens all differ in likelihood. -> (Served, Engine)"""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=CONTEXT, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32,
                          tie_weights=False))
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    return serve(tokenizer, model, **options)


@pytest.fixture(scope="module")
def polite():
    return says("Hi!<|end|>")


@pytest.fixture(scope="module")
def noisy():
    return random_model(WITH_BYTES)


def read(body_type, **fields):
    return parse(json.dumps(fields).encode(), body_type)


def plan(served, **fields):
    """The answer to a body: of a chat if it has messages."""
    if "messages" in fields:
        return plan_chat(served, read(ChatBody, **fields))
    return plan_completion(served, read(CompletionBody, **fields))


def run(engine, answer):
    """Run the requests of an answer. -> (requests, moments): after each step the Progress of each request"""
    requests = [engine.prepare(ids, sampling) for ids, sampling in answer.prompts]
    engine.waiting.extend(requests)
    moments = [[START] for _ in requests]
    while not all(request.finish for request in requests):
        engine.step()
        for request, seen in zip(requests, moments, strict=True):
            now = Progress(len(request.tokens), len(request.text), request.finish)
            if now != seen[-1]:
                seen.append(now)
    return requests, moments


def ask(world, **fields):
    """-> (answer, requests, the whole answer as a client reads it)"""
    served, engine = world
    answer = plan(served, **fields)
    requests, _ = run(engine, answer)
    return answer, requests, json.loads(json.dumps(answer.whole(requests), allow_nan=False))


def refusal(served, **fields):
    """The error that a body gets."""
    with pytest.raises(APIError) as refused:
        plan(served, **fields)
    assert_clean(refused.value)
    return refused.value


def assert_clean(error):
    """An error that any client can read, and that tells nothing about the inside of the server."""
    assert 400 <= error.status < 500
    body = json.loads(json.dumps(error.body(), ensure_ascii=False, allow_nan=False).encode().decode())
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message and "\n" not in message and len(message) < 1000
    assert not PYTHON_WORDS.search(message), message


def streamed(answer, requests, moments, cuts=None):
    """The events of a stream that looked at the requests at some of their moments. cuts: for each request, the indices
    of these; None: at all of them. -> list of dict"""
    chunks = answer.first(requests)
    for index, request in enumerate(requests):
        seen = START
        last = len(moments[index]) - 1
        for cut in sorted({*cuts[index], last}) if cuts else range(last + 1):
            now = moments[index][cut]
            piece = answer.piece(index, request, seen, now)
            if piece is not None:
                chunks.append(piece)
            seen = now
        chunks.append(answer.end(index, request))
    usage = answer.usage_chunk(requests)
    if usage is not None:
        chunks.append(usage)
    return [json.loads(event(chunk)[len("data: ") :]) for chunk in chunks]


def together(chunks):
    """The chunks of a stream as choices of a whole answer, by index."""
    choices = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            parts = choices.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert parts["finish_reason"] is None, "nothing comes after the end of a choice"
            parts["text"] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            parts["finish_reason"] = choice["finish_reason"]
            if choice["logprobs"] is not None:
                known = parts["logprobs"] or {}
                for name, values in choice["logprobs"].items():
                    known[name] = None if values is None else known.get(name, []) + values
                parts["logprobs"] = known
    return choices


def as_parts(choice):
    """A choice of a whole answer, in the form of `together`."""
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    logprobs = choice["logprobs"]
    if logprobs is not None and not any(logprobs.values()):  # no token at all: a stream has no chunk for it
        logprobs = None
    return {"text": text, "logprobs": logprobs, "finish_reason": choice["finish_reason"]}


# -----------------------------------------------------------------------------
# Bytes to a body


@pytest.mark.parametrize("raw, param", [
    (b"", None), (b"[]", None), (b"null", None), (b"\xff{}", None), (b'{"prompt": "x"', None), (b"[" * 100_000, None),
    (b'{"a": ' * 100_000, None), (b'{"n": ' + b"9" * 5000 + b"}", None), (b"\xef\xbb\xbf{}", None),
    (b"{}", "prompt"), (b'{"prompt": null}', "prompt"),
    (b'{"prompt": "x", "temperature": NaN}', "temperature"),
    (b'{"prompt": "x", "temperature": -Infinity}', "temperature"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "x", "temperature": "1"}', "temperature"),
    (b'{"prompt": "x", "temperature": ' + b"9" * 400 + b"}", "temperature"),
    (b'{"prompt": "x", "metadata": {"a": [[1e999]]}}', "metadata"),
    (b'{"prompt": "\\ud800"}', "prompt"), (b'{"prompt": ["\\udc00\\ud800"]}', "prompt"),
    (b'{"prompt": "x", "stop": ["\\ud83d"]}', "stop"), (b'{"prompt": "x", "logit_bias": {"\\ud83d": 1}}', "logit_bias"),
    (b'{"prompt": "x", "\\ud83d": 1}', None), (b'{"prompt": "x", "max_tokens": 1.0}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": true}', "max_tokens"), (b'{"prompt": "x", "max_tokens": -1}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 400 + b"}", "max_tokens"), (b'{"prompt": "x", "n": 0}', "n"),
    (b'{"prompt": "x", "n": 129}', "n"), (b'{"prompt": "x", "stream": 1}', "stream"),
    (b'{"prompt": "x", "echo": "yes"}', "echo"), (b'{"prompt": "x", "logprobs": 21}', "logprobs"),
    (b'{"prompt": "x", "top_p": 1.1}', "top_p"), (b'{"prompt": "x", "model": 5}', "model"),
])
def test_a_wrong_body_is_refused_by_field(raw, param):
    with pytest.raises(APIError) as refused:
        parse(raw, CompletionBody)
    assert_clean(refused.value)
    assert (refused.value.status, refused.value.param) == (400, param)
    if param:
        assert param in refused.value.message


def test_what_clients_send_besides_is_tolerated():
    """Nulls, unknown fields, duplicate keys, escaped pairs of surrogates."""
    fields = {name: None for name in CompletionBody.model_fields} | {"prompt": "x", "keep_alive": 5, "user": {}}
    assert read(CompletionBody, **fields) == read(CompletionBody, prompt="x")
    assert parse(b'{"prompt": "a", "prompt": "b"}', CompletionBody).prompt == "b"
    assert parse(b'{"prompt": "\\ud83d\\ude00"}', CompletionBody).prompt == "\U0001f600"
    assert parse(b'{"prompt": "\\\\ud83d"}', CompletionBody).prompt == "\\ud83d"
    assert parse(b'{"prompt": "x", "temperature": 1, "seed": -5}', CompletionBody).temperature == 1.0


words = st.text("abcxyz 09:/<|>\n\u00e9\U0001f600", max_size=8)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 2**31, 2**63, 1e308, 5e-324]))
values = st.recursive(st.one_of(st.none(), st.booleans(), numbers, words),
                      lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
                      max_leaves=12)
halves = st.sampled_from(["\ud800", "a\udfff", "\udc00\ud800"])
field_names = sorted({name for body_type in BODIES for name in body_type.model_fields})


@example(raw=b'{"\\n": Infinity}', body_type=CompletionBody)
@settings(deadline=None)
@given(raw=st.one_of(st.binary(), words.map(str.encode), st.builds(lambda v: json.dumps(v).encode(), values)),
       body_type=st.sampled_from(BODIES))
def test_any_bytes_are_a_body_or_one_clean_error(raw, body_type):
    try:
        assert isinstance(parse(raw, body_type), body_type)
    except APIError as error:
        assert_clean(error)


@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(field_names), st.one_of(values, halves)),
       body_type=st.sampled_from(BODIES))
def test_any_fields_are_a_body_or_one_clean_error(fields, body_type):
    try:
        assert isinstance(read(body_type, **fields), body_type)
    except APIError as error:
        assert_clean(error)


@settings(max_examples=30, deadline=None)
@given(depth=st.integers(1, 3000), opening=st.sampled_from(["[", '{"a":', '{"prompt":[']))
def test_any_depth_is_refused_or_ignored(noisy, depth, opening):
    closing = {"[": "]", '{"a":': "}", '{"prompt":[': "]}"}[opening]
    nested = opening * depth + "1" + closing * depth
    for text in (nested, '{"prompt": "x", "user": ' + nested + "}", '{"prompt": ' + nested + "}",
                 '{"prompt": "x", "stop": ' + nested + "}", '{"prompt": "x", "logit_bias": ' + nested + "}"):
        try:
            plan_completion(noisy[0], parse(text.encode(), CompletionBody))
        except APIError as error:
            assert_clean(error)


# values that often make sense, so that many bodies can be planned
SENSE = {
    "model": st.sampled_from(["", "tiny", "gpt-4"]), "max_tokens": st.integers(0, 20),
    "stop": st.lists(words, max_size=3),
    "max_completion_tokens": st.integers(0, 200), "temperature": st.floats(0, 2), "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 5), "min_p": st.floats(0, 1), "repetition_penalty": st.floats(0.1, 2),
    "presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-2, 2), "seed": st.integers(),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=3),
    "n": st.integers(1, 5), "best_of": st.integers(1, 3), "stream_options": st.just({"include_usage": True}),
    "prompt": st.one_of(words, st.lists(st.integers(0, 300), max_size=5), st.lists(words, max_size=4)),
    "logprobs": st.one_of(st.booleans(), st.integers(0, 20)), "top_logprobs": st.integers(0, 20),
    "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user", "assistant"]),
                                                "content": words}), max_size=5),
}


@pytest.mark.parametrize("required", ["prompt", "messages"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_body_is_planned_for_the_engine_or_refused(noisy, required, data):
    served, engine = noisy
    names = data.draw(st.lists(st.sampled_from(field_names), unique=True, max_size=6))
    fields = {}
    for name in {required, *names}:
        sense = SENSE.get(name, st.booleans())
        fields[name] = data.draw(sense if data.draw(st.integers(0, 5)) else st.one_of(values, halves))
    try:
        if required == "prompt":
            answer = plan_completion(served, read(CompletionBody, **fields))
        else:
            answer = plan_chat(served, read(ChatBody, **fields))
    except APIError as error:
        assert_clean(error)
        return
    assert 1 <= len(answer.prompts) <= served.most_choices
    for ids, sampling in answer.prompts:
        engine.prepare(ids, sampling)  # the engine takes what was planned


def test_wrong_values_within_lists_and_objects_are_named(noisy):
    served, _ = noisy
    cases = [
        ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"), ({"prompt": [True]}, "prompt"), ({"prompt": {}}, "prompt"),
        ({"prompt": [-1]}, "prompt"), ({"prompt": [10**30]}, "prompt"), ({"prompt": [served.vocab_size]}, "prompt"),
        ({"prompt": "x", "stop": ""}, "stop"), ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"), ({"prompt": "x", "stop": [1]}, "stop"),
        ({"prompt": "x", "stop": {}}, "stop"), ({"prompt": "x", "stop": "a" * 2000}, "stop"),
        ({"prompt": "x", "logit_bias": []}, "logit_bias"), ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"1": "1"}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"1": True}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"99999999": 1}}, "logit_bias"), ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"), ({"prompt": "x", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "x", "n": 17}, "n"), ({"prompt": ["x"] * 17}, "prompt"), ({"prompt": ["x"] * 9, "n": 2}, "n"),
        ({"prompt": "x", "stream": True, "stream_options": []}, "stream_options"),
        ({"prompt": "x", "stream_options": {"include_usage": 1}}, "stream_options"),
    ]
    for fields, param in cases:
        error = refusal(served, **fields)
        assert (error.status, error.param) == (400, param), fields
    assert plan(served, prompt="x", stop=[], logit_bias={}, suffix="", best_of=1).prompts[0][1].stop == ()


# -----------------------------------------------------------------------------
# What is asked becomes Sampling


def sampling_of(served, **fields):
    return plan(served, **{"prompt": "x", **fields}).prompts[0][1]


def test_the_model_is_the_one_there_is(noisy, polite):
    for served, _ in (noisy, polite):
        for name in ("tiny", "", None):
            assert plan(served, prompt="x", model=name).model == "tiny"
        for fields in ({"prompt": "x"}, {"messages": HELLO}):
            error = refusal(served, model="gpt-4o", **fields)
            assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
            assert '"tiny"' in error.message and '"gpt-4o"' in error.message
        assert api.models(served)["data"] == [api.model(served, "tiny")]
        with pytest.raises(APIError, match='"tiny"'):
            api.model(served, "other")


def test_options_reach_the_sampling(noisy):
    served, _ = noisy
    for fields in ({"prompt": "x"}, {"messages": HELLO}):
        default = sampling_of(served, **fields)
        assert (default.temperature, default.top_p, default.top_k, default.stop) == (1.0, 1.0, 0, ())
        assert sampling_of(served, temperature=0, **fields).temperature == 0
        assert sampling_of(served, temperature=None, **fields).temperature == 1.0
        assert sampling_of(served, stop="a", **fields).stop == ("a",)
        assert sampling_of(served, stop=["a", "b"], **fields).stop == ("a", "b")
        assert sampling_of(served, top_k=-1, **fields).top_k == 0
        assert 0 < sampling_of(served, top_p=0, **fields).top_p < 1e-6
        assert sampling_of(served, logit_bias={"7": -100, "8": 1.5}, **fields).logit_bias == ((7, -100.0), (8, 1.5))
        others = {"min_p": 0.1, "repetition_penalty": 1.3, "presence_penalty": -1.0, "frequency_penalty": 0.5,
                  "top_k": 3}
        sampling = sampling_of(served, **others, **fields)
        assert {name: getattr(sampling, name) for name in others} == others


def test_a_chat_ends_with_the_templates_tokens(noisy):
    served, _ = noisy
    assert sampling_of(served, prompt="x").stop_tokens == ()
    assert sampling_of(served, messages=HELLO).stop_tokens == served.template.stops
    on = sampling_of(served, messages=HELLO, ignore_eos=True)
    assert on.ignore_eos and on.stop_tokens == ()


def test_seeds(noisy):
    served, _ = noisy

    def seeds_of(**fields):
        return [sampling.seed for _, sampling in plan(served, **fields).prompts]

    assert seeds_of(prompt=["x", "y"], n=3, seed=5) == [5, 6, 7] * 2
    assert seeds_of(messages=HELLO, n=2, seed=2**63 - 1) == [2**63 - 1, 0]
    assert seeds_of(prompt="x", n=2, seed=-1) == [2**63 - 1, 0]
    assert seeds_of(prompt="x", seed=10**400) == [10**400 % 2**63]
    drawn = seeds_of(prompt=["x"] * 4, n=4) + seeds_of(prompt="x") + seeds_of(messages=HELLO)
    assert len(set(drawn)) == len(drawn) == 18 and all(0 <= seed < 2**63 for seed in drawn)


def test_how_many_tokens_may_follow(noisy):
    served, _ = noisy

    def new(**fields):
        return sampling_of(served, **fields).max_new_tokens

    assert new(prompt="x") == 16  # OpenAI's default
    assert new(prompt="x", max_tokens=5) == 5 and new(prompt="x", max_tokens=None) == 16
    assert new(prompt="x", max_tokens=5, max_completion_tokens=7) == 7
    assert new(prompt="x" * 120) == 9 and new(prompt="x" * 128) == 1  # the last token is drawn, never read
    assert new(prompt="x" * 120, max_tokens=9) == 9
    assert new(prompt="x", max_tokens=0, echo=True) == 1
    error = refusal(served, prompt="x", max_tokens=0)
    assert error.param == "max_tokens"
    assert refusal(served, prompt="x", max_completion_tokens=0, max_tokens=4).param == "max_completion_tokens"

    assert new(messages=HELLO) == served.reply_tokens == 32
    assert new(messages=HELLO, max_tokens=99) == 99 and new(messages=HELLO, max_completion_tokens=3, max_tokens=9) == 3
    assert refusal(served, messages=HELLO, max_tokens=0).param == "max_tokens"
    ids, sampling = plan(served, messages=[{"role": "user", "content": "x" * 93}]).prompts[0]
    assert len(ids) == 97 and sampling.max_new_tokens == 32  # older turns make so much room, if there are any
    assert new(messages=[{"role": "user", "content": "x" * 94}]) == 31  # a last message that leaves less
    assert new(messages=[{"role": "user", "content": "x" * 124}]) == 1
    error = refusal(served, messages=[{"role": "user", "content": "x" * 125}])
    assert error.code == "context_length_exceeded" and "128" in error.message and "129" in error.message
    served, _ = random_model(WITH_BYTES, reply_tokens=100)
    assert new(messages=HELLO) == 100 and new(messages=[{"role": "user", "content": "x" * 93}]) == 32


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(noisy, monkeypatch):
    served, _ = noisy
    for fields, numbers in [
        ({"prompt": "x" * 129}, ["128", "129"]), ({"prompt": [1] * 500}, ["128", "500"]),
        ({"prompt": "x" * 100, "max_tokens": 30}, ["128", "100", "30"]),
        ({"prompt": ["x", "x" * 129]}, ["128", "129"]),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, ["128"]),
        ({"messages": HELLO, "max_tokens": 121}, ["128", "9", "121"]),
        ({"messages": HELLO, "max_tokens": 2_000_000_000}, ["128", "2000000000"]),
    ]:
        error = refusal(served, **fields)
        assert (error.status, error.code) == (400, "context_length_exceeded")
        assert "maximum context length" in error.message
        assert error.param == next(iter(fields))
        assert all(re.search(rf"\b{number}\b", error.message) for number in numbers), error.message
    assert len(plan(served, prompt="x" * 128, max_tokens=1).prompts[0][0]) == 128

    def never(self, text, special=False):
        raise AssertionError("a text that cannot fit is not encoded")

    monkeypatch.setattr(BPETokenizer, "encode", never)
    assert refusal(served, prompt="\u20ac" * 43).code == "context_length_exceeded"  # 129 bytes, tokens of one
    long = {"role": "user", "content": "x" * 500}
    for messages in ([long], [*HELLO, long], [*HELLO, {"role": "assistant", "content": "a"}, long]):
        assert refusal(served, messages=messages).code == "context_length_exceeded"


def test_the_oldest_turns_are_dropped_and_counted(noisy):
    served, engine = noisy
    system = {"role": "system", "content": "be kind"}
    talk = [{"role": role, "content": "x" * 20} for _ in range(6) for role in ("user", "assistant")]
    messages = [system, *talk, *HELLO]
    answer = plan(served, messages=messages, max_tokens=10)
    assert answer.dropped and answer.dropped % 2 == 0
    kept = [system, *messages[1 + answer.dropped :]]
    assert answer.prompts[0][0] == served.template.encode(kept, reply=True)[0]
    assert len(answer.prompts[0][0]) + 10 - 1 <= CONTEXT
    requests, moments = run(engine, answer)
    assert answer.whole(requests)["dropped_messages"] == answer.dropped
    chunks = streamed(answer, requests, moments)
    assert [chunk.get("dropped_messages") for chunk in chunks] == [answer.dropped] + [None] * (len(chunks) - 1)
    assert "dropped_messages" not in ask(noisy, messages=HELLO)[2]


def test_names_of_special_tokens_are_plain_text(noisy):
    served, _ = noisy
    special = set(WITH_BYTES.special_tokens.values())
    for name in WITH_BYTES.special_tokens:
        ids = plan(served, prompt=f"a{name}b").prompts[0][0]
        assert ids == list(f"a{name}b".encode()) and not special & set(ids)
        ids = plan(served, messages=[{"role": "user", "content": name}]).prompts[0][0]
        plain = plan(served, messages=[{"role": "user", "content": "x" * len(name)}]).prompts[0][0]
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
        assert api.tokenize(served, read(TokenizeBody, prompt=name + " "))["tokens"] == list(f"{name} ".encode())


# -----------------------------------------------------------------------------
# Messages


def test_roles_and_content(noisy):
    served, _ = noisy

    def ids(*messages):
        return plan(served, messages=list(messages)).prompts[0][0]

    user = HELLO[0]
    system = {"role": "system", "content": "be kind"}
    assert ids(system | {"role": "developer"}, user) == ids(system, user)
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert ids(user | {"content": parts}) == ids(user | {"content": "hel\nlo"})
    assert ids(user | {"name": "me", "refusal": None, "tool_calls": [], "audio": None}) == ids(user)
    opened = ids(user)
    begun = ids(user, {"role": "assistant", "content": "Ye"})  # the assistant continues its own words
    assert begun == opened + list(b"Ye")
    assert ids(user, user) == served.template.encode([user, user], reply=True)[0]


@pytest.mark.parametrize("messages, param", [
    ([], "messages"), ("hello", "messages"), ({}, "messages"), (["hello"], "messages[0]"), ([{}], "messages[0].role"),
    ([{"role": "tool", "content": "x"}], "messages[0].role"),
    ([{"role": "function", "content": "x"}], "messages[0].role"),
    ([{"role": "User", "content": "x"}], "messages[0].role"), ([{"role": None, "content": "x"}], "messages[0].role"),
    ([{"role": {}, "content": "x"}], "messages[0].role"), ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([*HELLO, {"role": "user", "content": ["x"]}], "messages[1].content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content"),
    ([*HELLO, {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}], "messages[1].tool_calls"),
    ([*HELLO, {"role": "system", "content": "x"}], "messages"),
])
def test_messages_that_are_refused(noisy, messages, param):
    error = refusal(noisy[0], messages=messages)
    assert (error.status, error.param) == (400, param)
    for kind in ("image_url", "tool", "function"):
        if kind in json.dumps(messages):
            assert kind in error.message


def test_what_the_model_cannot_do_is_refused_by_name(noisy):
    served, _ = noisy
    harmful = {"tools": [{"type": "function"}], "tool_choice": "auto", "functions": [{}],
               "function_call": {"name": "f"},
               "modalities": ["text", "audio"], "audio": {"voice": "alloy"}, "prediction": {"type": "content"},
               "web_search_options": {}, "response_format": {"type": "json_object"}}
    assert harmful.keys() == api.REFUSED.keys()
    for name, value in harmful.items():
        error = refusal(served, messages=HELLO, **{name: value})
        assert (error.status, error.param) == (400, name) and name in error.message
    harmless = {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "modalities": ["text"],
                "response_format": {"type": "text"}, "audio": None, "store": True, "metadata": {}, "user": "me",
                "service_tier": "auto", "parallel_tool_calls": True}
    assert plan(served, messages=HELLO, **harmless).prompts


def test_a_model_without_a_template_or_a_tokenizer():
    plain = CharTokenizer("helo", specials=())
    served, engine = random_model(plain)
    assert refusal(served, messages=HELLO).code == "no_chat_template"
    assert refusal(served, prompt="").param == "prompt"  # there is no bos
    error = refusal(served, prompt="hex")
    assert error.param == "prompt" and "'x'" in error.message
    assert len(ask((served, engine), prompt="he", max_tokens=2)[2]["choices"][0]["text"]) == 2

    served = Served("bare", 0, None, None, CONTEXT, served.vocab_size, 32, 4)
    assert refusal(served, prompt="he").param == "prompt" and refusal(served, prompt="").param == "prompt"
    bare = served, Engine(engine.model, None)
    answer, requests, whole = ask(bare, prompt=[0, 1], max_tokens=3, logprobs=1, echo=True)
    logprobs = whole["choices"][0]["logprobs"]
    assert whole["choices"][0]["text"] == "" and logprobs["tokens"][:2] == ["token_id:0", "token_id:1"]
    assert api.tokenizer_info(served)["eos_token"] is None


def test_an_empty_prompt_is_the_beginning_of_a_text(noisy):
    answer = plan(noisy[0], prompt=["", "x"], echo=True)
    assert [ids for ids, _ in answer.prompts] == [[WITH_BYTES.bos], [ord("x")]]
    assert answer.texts == ["", "x"]


# -----------------------------------------------------------------------------
# Whole answers


@pytest.mark.parametrize("most, text, finish, tokens", [(1, "H", "length", 1), (2, "Hi", "length", 2),
                                                        (3, "Hi!", "length", 3), (4, "Hi!", "stop", 3),
                                                        (5, "Hi!", "stop", 3), (None, "Hi!", "stop", 3)])
def test_why_a_chat_ends_is_exact_at_the_boundary(polite, most, text, finish, tokens):
    answer, requests, whole = ask(polite, messages=HELLO, max_tokens=most, temperature=0)
    assert whole["choices"] == [{"index": 0, "message": {"role": "assistant", "content": text, "refusal": None},
                                 "logprobs": None, "finish_reason": finish}]
    prompt_tokens = len(answer.prompts[0][0])
    assert whole["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": tokens,
                              "total_tokens": prompt_tokens + tokens, "prompt_tokens_details": {"cached_tokens": 0}}
    assert whole["object"] == "chat.completion" and whole["id"].startswith("chatcmpl-") and whole["model"] == "tiny"


@pytest.mark.parametrize("stop, text, finish", [
    ("i", "H", "stop"), ("Hi", "", "stop"), (["!x", "zz"], "Hi!", "stop"), ("!", "Hi", "stop"),
    (["!", "i!"], "H", "stop"), ("i!?", "Hi!", "stop"),
])
def test_stop_strings(polite, stop, text, finish):
    """Half a stop string at the end is part of the text; nothing follows a whole one."""
    whole = ask(polite, messages=HELLO, stop=stop)[2]
    assert (whole["choices"][0]["message"]["content"], whole["choices"][0]["finish_reason"]) == (text, finish)


def test_a_document_ends_by_itself_also_with_the_last_token_allowed():
    world = says("abc<|eos|>", after="x")
    for most, text, finish in ((2, "ab", "length"), (3, "abc", "length"), (4, "abc", "stop"), (9, "abc", "stop")):
        choice = ask(world, prompt="x", max_tokens=most)[2]["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text, finish)
    choice = ask(world, prompt="x", max_tokens=6, ignore_eos=True)[2]["choices"][0]
    assert choice["text"].startswith("abc") and choice["finish_reason"] == "length"


def test_several_prompts_and_choices_come_in_the_order_of_their_index(noisy):
    served, engine = noisy
    answer, requests, whole = ask(noisy, prompt=["ab", [100, 101], "c"], n=2, max_tokens=4, seed=3, echo=True)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"][:2] for choice in whole["choices"][:4]] == ["ab", "ab", "de", "de"]
    expected = [("ab", 3), ("ab", 4), ([100, 101], 3), ([100, 101], 4), ("c", 3), ("c", 4)]
    for index, (prompt, seed) in enumerate(expected):
        alone = engine.generate(prompt, max_new_tokens=4, seed=seed)
        assert requests[index].tokens == alone.tokens
    drawn = sum(len(request.tokens) for request in requests)
    assert whole["usage"]["prompt_tokens"] == 5 and whole["usage"]["completion_tokens"] == drawn
    assert whole["usage"]["total_tokens"] == 5 + drawn


def test_cached_tokens_are_told():
    world = random_model(WITH_BYTES)
    prompt = "a" * 50
    ask(world, prompt=prompt, max_tokens=1)
    usage = ask(world, prompt=prompt, max_tokens=1, n=3)[2]["usage"]
    assert usage["prompt_tokens"] == 50 and usage["prompt_tokens_details"] == {"cached_tokens": 48}


# -----------------------------------------------------------------------------
# Log-probabilities


@torch.no_grad()
def logprobs_of(model, ids):
    """Log-probabilities of what follows each of the ids, (T, vocab_size)."""
    logits, _ = model(torch.tensor([ids]), targets=torch.tensor([ids]))
    return torch.log_softmax(logits[0].float(), -1)


def test_echo_has_the_log_probabilities_of_the_prompt(noisy):
    served, engine = noisy
    text = "The same."
    answer, requests, whole = ask(noisy, prompt=text, max_tokens=2, echo=True, logprobs=3, temperature=0)
    choice = whole["choices"][0]
    ids = requests[0].ids
    expected = logprobs_of(engine.model, ids)
    logprobs = choice["logprobs"]
    assert choice["text"] == text + requests[0].text
    assert logprobs["tokens"][: len(text)] == list(text) and len(logprobs["tokens"]) == len(ids)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for place in range(1, len(ids)):
        own = logprobs["token_logprobs"][place]
        assert own == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-4)
        top = logprobs["top_logprobs"][place]
        assert top[logprobs["tokens"][place]] == own  # the very same number
        assert len(top) in (3, 4)
        assert max(top.values()) == pytest.approx(float(expected[place - 1].max()), abs=1e-4)
        assert (own == max(top.values())) == (ids[place] == int(expected[place - 1].argmax()))


def test_max_tokens_0_echoes_alone(noisy):
    answer, requests, whole = ask(noisy, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"] and choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert [len(top or {}) for top in choice["logprobs"]["top_logprobs"]] == [0, 1, 1]
    assert whole["usage"]["completion_tokens"] == 0 and whole["usage"]["prompt_tokens"] == 3


def test_lm_eval_finds_the_one_token_it_asked_for_even_if_it_ends_the_text():
    """It reads token_logprobs[context:-1]. If the last entry were not the drawn token, a token of the prompt would be
    left out of the sum."""
    world = says("<|eos|>", after="b")
    answer, requests, whole = ask(world, prompt=ids_of(WITH_CHARS, "ab"), max_tokens=1, echo=True, logprobs=1,
                                  temperature=0, seed=1234)
    choice = whole["choices"][0]
    assert choice["logprobs"]["tokens"] == ["a", "b", "<|eos|>"] and len(choice["logprobs"]["token_logprobs"]) == 3
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    choice = ask(world, prompt="a", max_tokens=1, echo=True, logprobs=1)[2]["choices"][0]
    assert choice["finish_reason"] == "length"


def test_lm_eval_reads_the_log_likelihoods(noisy):
    module = pytest.importorskip("lm_eval.models.openai_completions")
    served, engine = noisy
    rows = [list(b"what is it? that"), list(b"no."), [200, 201, 202, 203]]
    starts = [8, 1, 2]
    whole = ask(noisy, prompt=rows, max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234, model="tiny")[2]
    results = module.LocalCompletionsAPI.parse_logprobs([whole], tokens=rows, ctxlens=starts)
    for row, start, (total, is_greedy) in zip(rows, starts, results, strict=True):
        logprobs = logprobs_of(engine.model, row)[start - 1 : -1]
        own = logprobs.gather(1, torch.tensor(row[start:])[:, None])
        assert total == pytest.approx(float(own.sum()), abs=1e-4)
        assert is_greedy == (logprobs.argmax(-1).tolist() == row[start:])


def test_chat_log_probabilities(noisy):
    answer, requests, whole = ask(noisy, messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=4, ignore_eos=True)
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for entry, token, top in zip(content, requests[0].tokens, requests[0].top_logprobs, strict=True):
        names = TokenNames(WITH_BYTES)
        assert entry["token"] == names(token) and len(entry["top_logprobs"]) == 4
        assert [likely["logprob"] for likely in entry["top_logprobs"]] == [logprob for _, logprob in top]
        if token < 256:
            assert bytes(entry["bytes"]) == WITH_BYTES.pieces[token]
    plain = ask(noisy, messages=HELLO, max_tokens=2, logprobs=True)[2]["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in plain)
    assert refusal(noisy[0], messages=HELLO, top_logprobs=2).param == "top_logprobs"
    assert plan(noisy[0], messages=HELLO, top_logprobs=0).top is None


def test_half_characters():
    """Bytes of a character are named so that none collide, and come out of a stream as whole characters."""
    world = says("\u00e9\U0001f600!", WITH_BYTES, after="x")
    served, engine = world
    answer = plan(served, prompt="x", max_tokens=7, logprobs=0, echo=True)
    requests, moments = run(engine, answer)
    choice = answer.whole(requests)["choices"][0]
    assert choice["text"] == "x\u00e9\U0001f600!"
    names = ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"]
    assert choice["logprobs"]["tokens"] == ["x", *names, "!"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]
    chunks = streamed(answer, requests, moments)
    assert not any("\ufffd" in json.dumps(chunk, ensure_ascii=False) for chunk in chunks)
    assert together(chunks)[0] == as_parts(choice)


def test_no_two_tokens_have_one_name():
    pieces = [bytes([i]) for i in range(256)] + ["\u00e9".encode(), b"<|end|>", b"bytes:\\xff", b"token_id:300", b"ab"]
    tokenizer = BPETokenizer(pieces, specials=["<|endoftext|>", "<|end|>"])
    names = TokenNames(tokenizer)
    ids = range(tokenizer.vocab_size + 60)  # a model may have more than its tokenizer
    assert len({names(token) for token in ids}) == len(ids)
    assert names(256) == "\u00e9" and names(0xC3) == "bytes:\\xc3" and names(tokenizer.eos) == "<|end|>"
    assert names.bytes(256) == "\u00e9".encode() and names.bytes(tokenizer.eos) is None and names.bytes(300) is None


def test_an_impossible_token_has_a_log_probability_that_json_can_hold(polite):
    whole = ask(polite, messages=HELLO, logprobs=True, top_logprobs=20)[2]
    for place in whole["choices"][0]["logprobs"]["content"]:
        assert all(math.isfinite(likely["logprob"]) for likely in place["top_logprobs"])
    answer = plan(polite[0], messages=HELLO, logprobs=True)
    assert answer.entry(0, -math.inf)["logprob"] == -9999.0


# -----------------------------------------------------------------------------
# Streams


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_pieces_of_a_stream_are_the_whole_answer(noisy, data):
    served, engine = noisy
    fields = {
        "n": data.draw(st.integers(1, 3)), "max_tokens": data.draw(st.integers(1, 12)),
        "seed": data.draw(st.integers(0, 9)),
        "stop": data.draw(st.lists(st.sampled_from(["a", "e\ufffd", "\ufffd\ufffd", "t ", "\x00", "zz"]), max_size=3)),
        "temperature": data.draw(st.sampled_from([0, 1, 1.5])), "stream": True,
        # letters, so that there is text, and ends, so that there are all reasons to end
        "logit_bias": {str(token): 4 for token in [*b" aet", WITH_BYTES.eos]},
    }
    if data.draw(st.booleans()):
        fields |= {"messages": HELLO, "logprobs": data.draw(st.sampled_from([None, False, True]))}
        if fields["logprobs"]:
            fields["top_logprobs"] = data.draw(st.integers(0, 3))
    else:
        fields |= {"prompt": data.draw(st.sampled_from(["ab", ["ab", "\u20ac"], [[226, 130], "c"]])),
                   "logprobs": data.draw(st.sampled_from([None, 0, 2])), "echo": data.draw(st.booleans())}
        if fields["echo"]:
            fields["max_tokens"] = data.draw(st.integers(0, 12))
    answer = plan(served, **fields)
    requests, moments = run(engine, answer)
    cuts = [data.draw(st.lists(st.integers(0, len(seen) - 1), max_size=8)) for seen in moments]
    chunks = streamed(answer, requests, moments, cuts)
    whole = json.loads(json.dumps(answer.whole(requests)))
    choices = together(chunks)
    assert {index: as_parts(choice) for index, choice in enumerate(whole["choices"])} == choices
    for chunk in chunks:
        assert chunk["id"] == whole["id"] and chunk["model"] == "tiny" and chunk["created"] == whole["created"]
        assert "usage" not in chunk


def test_the_pieces_are_the_same_while_the_engine_runs(noisy):
    """A piece looks at nothing beyond `now`, so it does not matter how far the request is by then."""
    served, engine = noisy
    fields = {"prompt": "ab", "max_tokens": 20, "seed": 1, "logprobs": 1, "echo": True, "ignore_eos": True}
    answer = plan(served, **fields)
    request = engine.prepare(*answer.prompts[0])
    engine.waiting.append(request)
    seen = START
    live = []
    while not request.finish:
        engine.step()
        now = Progress(len(request.tokens), len(request.text), request.finish)
        live.append(answer.piece(0, request, seen, now))
        seen = now
    later = plan(served, **fields)
    later.id, later.created = answer.id, answer.created
    requests, moments = run(engine, later)
    assert live == [later.piece(0, requests[0], *pair) for pair in zip(moments[0], moments[0][1:], strict=False)]
    assert answer.piece(0, request, seen, seen) is None


def test_the_tail_of_a_stream(polite):
    served, engine = polite
    for usage in (True, False):
        answer = plan(served, messages=HELLO, stream=True, stream_options={"include_usage": usage})
        requests, moments = run(engine, answer)
        chunks = streamed(answer, requests, moments)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        assert [delta["content"] for delta in deltas[1:-1]] == ["H", "i", "!"]
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]
        if usage:
            assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == answer.whole(requests)["usage"]
            assert all(chunk["usage"] is None for chunk in chunks[:-1])
        else:
            assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert DONE == b"data: [DONE]\n\n"
    assert plan(served, messages=HELLO, stream_options={"include_usage": True}).usage_chunk([]) is None  # no stream


def test_never_a_part_of_a_stop_string_in_a_stream(polite):
    served, engine = polite
    for fields in ({"messages": HELLO}, {"prompt": "x", "logit_bias": {str(WITH_CHARS.encode("a")[0]): 100}}):
        answer = plan(served, stop=["i!", "aab"], max_tokens=6, temperature=0, **fields)
        requests, moments = run(engine, answer)
        chunks = streamed(answer, requests, moments)
        text = ""
        for chunk in chunks:
            choice = chunk["choices"][0]
            text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            assert requests[0].text.startswith(text)
        assert text == requests[0].text
        assert text == ("H" if "messages" in fields else "aaaaaa")


def test_a_cancelled_request_has_no_more_than_it_had(noisy):
    """A deadline may end a request before its prompt has been read."""
    served, engine = noisy
    answer = plan(served, prompt="abc", echo=True, logprobs=2)
    request = engine.prepare(*answer.prompts[0])
    engine.waiting.append(request)
    engine.cancel(request)
    assert answer.piece(0, request, START, Progress(0, 0, "cancelled")) is None


def test_an_event_is_one_line():
    data = {"text": "a\r\n\n\u2028\u2029\x85\x0b\x0c\x1c\u00e9\U0001f600"}
    raw = event(data)
    assert raw.startswith(b"data: ") and raw.endswith(b"\n\n")
    line = raw.decode()[:-2]
    assert len(line.splitlines()) == 1 and "\u00e9\U0001f600" in line
    assert json.loads(line[len("data: ") :]) == data
    with pytest.raises(ValueError):
        event({"logprob": math.nan})


# -----------------------------------------------------------------------------
# As the openai client reads it


def test_the_openai_clients_types_read_all_answers(noisy):
    types = pytest.importorskip("openai.types")
    chat_types = pytest.importorskip("openai.types.chat")
    served, engine = noisy
    for more in ({}, {"logprobs": True, "top_logprobs": 2}):
        answer = plan(served, messages=HELLO, n=2, max_tokens=4, **more, stream=True,
                      stream_options={"include_usage": True})
        requests, moments = run(engine, answer)
        whole = chat_types.ChatCompletion.model_validate(answer.whole(requests), strict=True)
        assert [choice.message.content for choice in whole.choices] == [request.text for request in requests]
        assert whole.usage.completion_tokens == sum(len(request.tokens) for request in requests)
        for chunk in streamed(answer, requests, moments):
            chat_types.ChatCompletionChunk.model_validate(chunk, strict=True)
    answer = plan(served, prompt=["a", "b"], max_tokens=4, logprobs=1)
    requests, moments = run(engine, answer)
    types.Completion.model_validate(answer.whole(requests), strict=True)
    for chunk in streamed(answer, requests, moments):
        if chunk["choices"][0]["finish_reason"] is None:
            chunk["choices"][0]["finish_reason"] = "stop"  # the type has no null, which OpenAI's own chunks have
        types.Completion.model_validate(chunk, strict=True)
    types.Model.model_validate(api.model(served, "tiny"), strict=True)


# -----------------------------------------------------------------------------
# Tokens, schemas, errors


def test_tokens_for_lm_eval(noisy):
    served, _ = noisy
    info = api.tokenizer_info(served)
    assert info["bos_token"] == "<|endoftext|>" == info["eos_token"] and info["chat_template"] is None

    def ids(text):
        return api.tokenize(served, read(TokenizeBody, prompt=text, add_special_tokens=False))["tokens"]

    assert ids("caf\u00e9") == list("caf\u00e9".encode()) and ids("") == []
    assert ids(info["eos_token"]) == [WITH_BYTES.eos]  # so it asks for the id of the end
    assert ids("<|assistant|>") == list(b"<|assistant|>")
    assert len(ids("x" * 1000)) == 1000  # longer than the context is no matter here

    def text(tokens):
        return api.detokenize(served, read(DetokenizeBody, tokens=tokens))["prompt"]

    assert text(list("caf\u00e9".encode())) == "caf\u00e9" and text([]) == ""
    assert text([WITH_BYTES.eos]) == info["eos_token"]
    for tokens in ([-1], [10**30], ["a"], "a", [True], {}, [1.0]):
        with pytest.raises(APIError) as refused:
            text(tokens)
        assert_clean(refused.value)
        assert refused.value.param == "tokens"


def test_schemas_say_what_may_be_sent():
    schemas = api.openapi_schemas(259)
    assert schemas.keys() == {body_type.__name__ for body_type in BODIES}
    assert json.loads(json.dumps(schemas, allow_nan=False)) == schemas
    for schema in schemas.values():
        assert all(field.get("description") for field in schema["properties"].values())
    assert schemas["CompletionBody"]["required"] == ["prompt"] and schemas["ChatBody"]["required"] == ["messages"]
    jsonschema = pytest.importorskip("jsonschema")
    for body_type in BODIES:
        jsonschema.Draft202012Validator.check_schema(schemas[body_type.__name__])
    valid = {"messages": HELLO, "stop": ["a"], "temperature": None, "logit_bias": {"1": 2}, "stream_options": None}
    jsonschema.validate(valid, schemas["ChatBody"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"messages": "hello"}, schemas["ChatBody"])
    for name, field in (("DetokenizeBody", "tokens"), ("CompletionBody", "prompt")):
        jsonschema.validate({field: [258]}, schemas[name])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({field: [259]}, schemas[name])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"prompt": []}, schemas["CompletionBody"])
    jsonschema.validate({"tokens": [259]}, api.openapi_schemas(None)["DetokenizeBody"])


def test_an_error_has_openais_form():
    error = APIError("half \ud800", 429, code="full", headers={"Retry-After": "1"})
    assert error.body() == {"error": {"message": "half ?", "type": "rate_limit_error", "param": None, "code": "full"}}
    assert (error.status, error.headers) == (429, {"Retry-After": "1"})
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error",
             503: "server_error"}
    assert {status: APIError("x", status).type for status in kinds} == kinds


def test_it_knows_no_socket_no_thread_and_no_torch():
    others = {"torch", "asyncio", "socket", "threading", "fastapi", "starlette", "uvicorn"}
    for name in ("api", "bodies", "answers"):
        assert not imports(ROOT / f"serving/{name}.py") & others


def test_names_of_special_tokens_are_no_special_tokens_of_a_template_of_another_kind():
    """The same with a template whose tokens have longer names, as nanochat's."""
    tokenizer = add_template(BPETokenizer([bytes([i]) for i in range(256)]), "nanochat")
    served, _ = random_model(tokenizer)
    ids = plan(served, messages=[{"role": "user", "content": "<|assistant_end|>"}]).prompts[0][0]
    assert tokenizer.special_tokens["<|assistant_end|>"] not in ids
    assert bytes(i for i in ids if i < 256) == b"<|assistant_end|>"
