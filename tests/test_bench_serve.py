"""bench.py serve: its client reads what servers send, however it is cut; what must not happen is found and named."""

import asyncio
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_chat import WITH_CHARS, model_of

import checkpoint
from benchmarks import endurance, serving, traffic
from benchmarks.servers import (
    Stand,
    answers_by_status,
    export,
    near_tie,
    problem_of,
    samples,
    serving_peer,
    texts,
)
from benchmarks.traffic import (
    Answer,
    Call,
    Delivery,
    Mix,
    Result,
    arrivals,
    closed_loop,
    completion_body,
    deliver,
    draw_calls,
    open_loop,
    percentile,
    read_answer,
    read_events,
    request_bytes,
    result_of,
    run,
    watched,
)
from configurator import Settings
from export import NoOptimizer
from infer import Engine
from model import GPT, GPTConfig

pytest_plugins = ["runs"]

ENDED = "data: [DONE]\n\n"


def chunk(text="", finish=None, **more):
    """An event of a stream of completions."""
    choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]
    return "data: " + json.dumps({"choices": choices, **more}, ensure_ascii=False) + "\n\n"


def usage(tokens):
    return "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}) + "\n\n"


def chunked(*parts):
    """A body in chunks."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def streamed(*events):
    """The bytes of an answer that is streamed, each event in a chunk."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + chunked(*(event.encode() for event in events))


def whole(body, status=200, **headers):
    """The bytes of an answer with a length."""
    body = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Some Words", "content-type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def error(message="no"):
    return {"error": {"message": message, "type": "x", "param": None, "code": None}}


COMPLETION = {"choices": [{"index": 0, "text": "ab", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}
STREAM = streamed(chunk("ü"), chunk("b"), chunk(finish="length"), usage(2), ENDED)


def call_of(stream=True, **fields):
    return Call([1], 2, 0.0, 0, stream, **fields)


def result(*raws, call=None, left=False, failure=""):
    """The Result of a call whose exchanges brought these bytes, in one piece each at second 1, and ended at second 2.
    """
    exchanges = []
    for raw in raws:
        pieces = raw if isinstance(raw, list) else [(1.0, raw)]
        exchanges.append(SimpleNamespace(pieces=pieces, began=0.5, ended=2.0, left=left, failure=failure))
    return result_of(Delivery(call or call_of(), 0.0, exchanges))


# -----------------------------------------------------------------------------
# Reading an answer


def cut(raw, places):
    """`raw` in pieces, the i-th at second i."""
    places = sorted({0, *places, len(raw)})
    return [(float(i), raw[a:b]) for i, (a, b) in enumerate(zip(places, places[1:], strict=False))]


@given(st.sets(st.integers(0, len(STREAM))))
def test_a_stream_means_the_same_however_it_is_cut(places):
    found = result(cut(STREAM, places))
    assert (found.text, found.tokens, found.finish, found.status) == ("üb", 2, "length", 200)
    assert not found.lost and problem_of(found) == "" and len(found.instants) == 2


def test_a_stream_in_single_bytes():
    assert result(cut(STREAM, range(len(STREAM)))).text == "üb"
    raw = whole(COMPLETION)
    assert result(cut(raw, range(len(raw))), call=call_of(stream=False)).text == "ab"


def test_an_event_has_the_time_of_its_last_byte():
    ends = [STREAM.index(b'"b"'), STREAM.index(chunk(finish="length").encode())]
    found = result(cut(STREAM, ends))
    assert found.instants == [0.0, 1.0] and found.gaps == [1.0]
    at_once = result(STREAM)
    assert at_once.instants == [1.0, 1.0] and at_once.gaps == [0.0]


def test_events_without_text_are_not_timed():
    found = result(streamed(chunk(""), chunk("a"), chunk(""), chunk(finish="length"), usage(2), ENDED))
    assert found.text == "a" and len(found.instants) == 1


def test_a_stream_that_is_cut_off_is_lost():
    for length in range(len(STREAM)):
        found = result(STREAM[:length])
        assert found.lost and not found.left and "lost" in problem_of(found)


def test_a_whole_answer_that_is_cut_off_is_lost():
    raw = whole(COMPLETION)
    for length in range(len(raw)):
        assert result(raw[:length], call=call_of(stream=False)).lost


def test_a_client_that_left_loses_nothing():
    found = result(STREAM[:-20], left=True)
    assert found.left and not found.lost and problem_of(found) == ""
    whole_all_the_same = result(STREAM, left=True)
    assert not whole_all_the_same.left and whole_all_the_same.text == "üb"


@pytest.mark.parametrize(
    "events, named",
    [
        ((chunk("a"), chunk(finish="length")), "without [DONE]"),
        ((chunk("a"), "data: " + json.dumps(error("the engine failed")) + "\n\n"), "the engine failed"),
        ((), "without [DONE]"),
        ((chunk("a"), "data: {\n\n", ENDED), "cannot be read"),
        ((chunk("a"), 'data: {"a": 1}\n\n', ENDED), "cannot be read"),
        ((chunk("a"), "data: nonsense\n\n"), "cannot be read"),
    ],
)
def test_a_stream_without_its_end_is_lost(events, named):
    assert named in result(streamed(*events)).lost


@pytest.mark.parametrize(
    "raw",
    [b"", b"garbage\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
     b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nno length",
     b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\ntoo long"],
)
def test_what_is_no_http_is_lost(raw):
    assert not read_answer([(0.0, raw)]).complete and result(raw).lost


def test_why_an_answer_is_lost_is_said():
    assert result(b"", failure="Connection refused").lost == "Connection refused"
    assert result(b"").lost == "no answer" and result(STREAM[:-5]).lost == "the answer is cut off"


def test_errors_have_openais_form():
    found = result(whole(error(), status=404), call=call_of(status=404))
    assert found.status == 404 and problem_of(found) == ""
    for body in ({"detail": "no"}, {"error": "no"}, [], {"error": {"message": None}}):
        assert "cannot be read" in result(whole(body, status=404), call=call_of(status=404)).lost
    assert problem_of(result(whole(error(), status=400))) == "status 400 instead of 200"
    assert problem_of(result(whole(error(), status=503))) == "status 503"
    assert problem_of(result(whole(error(), status=429))) == ""
    assert problem_of(result(STREAM, call=call_of(status=400))) == "status 200 instead of 400"


def test_an_answer_of_the_other_kind_is_no_answer():
    assert "content-type" in result(whole(COMPLETION)).lost
    assert "content-type" in result(STREAM, call=call_of(stream=False)).lost


def test_other_numbers_of_tokens_are_found():
    raw = streamed(chunk("a"), chunk(finish="length"), usage(1), ENDED)
    assert problem_of(result(raw)) == "another number of tokens"


def test_events_of_several_lines_and_with_carriage_returns():
    body = [(0.0, b": comment\n\ndata: a\ndata: b\r"), (1.0, b"\n\r"), (2.0, b"\ndata: c\n\nevent: x\n\n")]
    assert read_events(body) == [(2.0, "a\nb"), (2.0, "c")]


def test_statuses_of_all_attempts_are_kept():
    found = result(whole(error(), status=429), STREAM)
    assert found.statuses == [429, 200] and found.status == 200 and found.seconds == 2.0 and found.lag == 0.5


# -----------------------------------------------------------------------------
# Sending


class Stub:
    """A server whose answers a test writes. answer(request bytes, number of the request) -> list of bytes to send, with
    pauses in which they are sent; None: the connection is left open until the client closes it."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.left = 0  # clients that closed an open connection

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()

    async def __aexit__(self, *error):
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-len")]
        request = head + await reader.readexactly(sum(length))
        self.requests.append(request)
        pieces = self.answer(request, len(self.requests))
        for piece in pieces or []:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if pieces is None:
            await reader.read()
            self.left += 1
        writer.close()


def with_stub(answer, use):
    """use(address) with a stub. -> (its result, the stub)"""
    stub = Stub(answer)

    async def both():
        async with stub as address:
            return await asyncio.wait_for(use(address), 300)

    return run(both()), stub


def test_calls_are_sent_as_http_and_their_answers_read():
    calls = draw_calls(random.Random(1), 6, Mix((1, 2, 3), 64, (1, 4), (2, 2)))
    pieces = [STREAM[i : i + 7] for i in range(0, len(STREAM), 7)]
    deliveries, stub = with_stub(lambda request, number: pieces, lambda address: closed_loop(address, calls, 2))
    results = [result_of(delivery) for delivery in deliveries]
    assert [each.text for each in results] == ["üb"] * 6 and not any(map(problem_of, results))
    assert [each.call for each in results] == calls
    bodies = []
    for request in stub.requests:
        head, _, body = request.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert lines[0] == "POST /v1/completions HTTP/1.1" and "Connection: close" in lines
        assert any(line.startswith("Host: 127.0.0.1:") for line in lines)
        bodies.append(json.loads(body))
    assert sorted(body["seed"] for body in bodies) == sorted(call.seed for call in calls)
    assert all(body["max_tokens"] == 2 and body["ignore_eos"] and body["stream"] for body in bodies)


def test_a_closed_loop_has_no_more_requests_than_clients():
    running = []

    def answer(request, number):
        running.append(number)
        return [STREAM]

    async def use(address):
        return await closed_loop(address, [call_of(body=b"{}") for _ in range(5)], 1)

    deliveries, _ = with_stub(answer, use)
    ends = [delivery.exchanges[0].ended for delivery in deliveries]
    begins = [delivery.exchanges[0].began for delivery in deliveries]
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False)) and running == [1, 2, 3, 4, 5]


def test_an_open_loop_does_not_wait_for_answers():
    """The first calls get no answer before the last has arrived."""
    arrived = asyncio.Event()

    class Late(Stub):
        async def serve(self, reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            self.requests.append(b"")
            if len(self.requests) == 3:
                arrived.set()
            await arrived.wait()
            writer.write(STREAM)
            writer.close()

    async def both():
        async with Late(None) as address:
            return await asyncio.wait_for(open_loop(address, [call_of() for _ in range(3)], [0.0, 0.0, 0.001]), 300)

    deliveries = run(both())
    assert [result_of(delivery).text for delivery in deliveries] == ["üb"] * 3
    assert deliveries[2].due == pytest.approx(deliveries[0].due + 0.001)


@pytest.mark.parametrize("refusals, retries, status", [(2, 5, 200), (5, 2, 429), (1, 0, 429)])
def test_a_refused_call_is_sent_again_up_to_a_limit(refusals, retries, status):
    def answer(request, number):
        return [whole(error(), status=429, retry_after=0) if number <= refusals else STREAM]

    delivery, stub = with_stub(answer, lambda address: deliver(address, call_of(body=b"{}"), retries=retries))
    found = result_of(delivery)
    sent = min(refusals, retries) + 1
    assert found.status == status and len(found.statuses) == sent == len(stub.requests)
    assert problem_of(found) == ""


def test_the_wait_before_the_next_try_is_the_servers(monkeypatch):
    waits = []
    sleep = asyncio.sleep

    async def noted(seconds):
        waits.append(seconds)
        await sleep(0)

    def answer(request, number):
        return [whole(error(), status=429, retry_after=7) if number == 1 else STREAM]

    async def use(address):
        monkeypatch.setattr(traffic.asyncio, "sleep", noted)
        return await deliver(address, call_of(body=b"{}"), retries=1)

    with_stub(answer, use)
    assert 7.0 in waits


def test_a_client_that_leaves_closes_its_connection():
    delivery, stub = with_stub(lambda request, number: None, lambda address: deliver(address, call_of(leave=0.01)))
    found = result_of(delivery)
    assert found.left and found.statuses == [0] and stub.left == 1


def test_no_server_and_an_early_end_are_lost():
    async def nobody(address):
        return await deliver(("127.0.0.1", 1), call_of())

    delivery, _ = with_stub(lambda request, number: [], nobody)
    assert result_of(delivery).lost and result_of(delivery).status == 0
    delivery, _ = with_stub(lambda request, number: [], lambda address: deliver(address, call_of()))
    assert result_of(delivery).lost == "no answer"


def test_an_answer_without_an_end_is_given_up(monkeypatch):
    monkeypatch.setattr(traffic, "PATIENCE", 0.01)
    delivery, _ = with_stub(lambda request, number: None, lambda address: deliver(address, call_of()))
    found = result_of(delivery)
    assert found.lost.startswith("no end within") and not found.left


def test_a_path_is_watched_while_the_traffic_runs():
    async def use(address):
        async with watched(address, "/health", 0) as looks:
            while len(looks) < 3 or not looks[1].ended:
                await asyncio.sleep(0)
        return looks

    looks, stub = with_stub(lambda request, number: [whole({"status": "ok"})], use)
    assert stub.requests[0].startswith(b"GET /health HTTP/1.1\r\n") and read_answer(looks[0].pieces).status == 200


# -----------------------------------------------------------------------------
# Drawing


MIX = Mix(tuple(range(5, 60)), 256, (8, 64), (16, 32), streamed=0.25, aborted=0.1, invalid=0.05, leave_s=3.0)


def test_calls_depend_on_the_seed_alone():
    bodies = [[(call.body, call.path, call.leave) for call in draw_calls(random.Random("a"), 50, MIX)] for _ in "ab"]
    assert bodies[0] == bodies[1]
    assert bodies[0] != [(call.body, call.path, call.leave) for call in draw_calls(random.Random("b"), 50, MIX)]


def test_calls_have_the_lengths_and_shares_that_were_asked_for():
    calls = draw_calls(random.Random(0), 8000, MIX)
    share = {name: sum(bool(test(call)) for call in calls) / len(calls) for name, test in {
        "streamed": lambda call: call.stream, "left": lambda call: call.leave is not None,
        "invalid": lambda call: call.status != 200, "greedy": lambda call: call.temperature == 0}.items()}
    expected = {"streamed": 0.25, "left": 0.1, "invalid": 0.05, "greedy": 0.5}
    assert share == pytest.approx(expected, abs=0.02)  # three standard errors
    assert {len(call.ids) for call in calls} == set(range(8, 65))
    assert {call.answer for call in calls} == set(range(16, 33))
    assert all(set(call.ids) <= set(MIX.ids) for call in calls)
    assert {call.status for call in calls} == {200, 400, 404, 405}
    assert all(0 <= call.leave <= 3 for call in calls if call.leave is not None)
    assert not any(call.status != 200 and call.leave is not None for call in calls)


def test_a_field_that_becomes_none_is_left_out():
    fields = json.loads(completion_body(call_of(stream=False), ignore_eos=None, prompt="text", model="m"))
    assert "ignore_eos" not in fields and fields["prompt"] == "text" and fields["model"] == "m"
    assert "stream_options" not in fields
    assert request_bytes(("h", 1), "GET", "/x") == b"GET /x HTTP/1.1\r\nHost: h:1\r\nConnection: close\r\n\r\n"


def test_arrivals_are_a_poisson_process():
    instants = arrivals(random.Random(0), 20.0, 10_000)
    gaps = [b - a for a, b in zip([0.0, *instants], instants, strict=False)]
    assert min(gaps) >= 0 and instants[-1] == pytest.approx(500, rel=0.03)
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)  # as of an exponential distribution


def test_percentiles_are_values_that_occurred():
    assert [percentile([3, 1, 2, 4], share) for share in (0.0, 0.25, 0.5, 0.51, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert percentile([], 0.5) is None and traffic.in_ms([])["max"] is None
    assert traffic.in_ms([0.001, 0.002]) == {"p50": 1.0, "p95": 2.0, "p99": 2.0, "max": 2.0}


# -----------------------------------------------------------------------------
# What must not happen


METRICS = b"""# HELP minichat_running Requests that run.
minichat_running 0.0
minichat_kv_blocks_free 7.0
minichat_kv_blocks_total 8.0
minichat_generated_tokens_total 12.0
minichat_requests_total{route="/v1/completions",status="200"} 5.0
minichat_requests_total{route="/v1/chat/completions",status="200"} 1.0
minichat_requests_total{route="other",status="404"} 2.0
minichat_requests_total{route="/health",status="200"} 90.0
minichat_requests_total{route="/metrics",status="200"} 90.0
"""


def test_metrics_are_read_without_the_benchmarks_own_looks():
    found = samples(Answer(200, {}, [(0.0, METRICS)], True))
    assert found["minichat_kv_blocks_free"] == 7 and answers_by_status(found) == {200: 6, 404: 2}


def counts(tokens, **statuses):
    found = {f'minichat_requests_total{{route="/v1/completions",status="{name[1:]}"}}': float(count)
             for name, count in statuses.items()}
    return {**found, "minichat_generated_tokens_total": float(tokens)}


def done(*statuses, tokens=0, left=False):
    return Result(call_of(), list(statuses), statuses[-1], 1.0, 0.0, left=left, tokens=tokens)


def test_counts_of_both_sides_are_compared():
    before = counts(100, s200=7)
    results = [done(200, tokens=2), done(429, 200, tokens=2), done(0, left=True), done(200, left=True)]
    same = counts(104, s200=10, s429=1, s499=1)
    assert endurance.compare_counts(results, before, same) == []
    for after, named in (
        (counts(104, s200=9, s429=1, s499=1), "1 answers more by the metrics than by the clients, of which 2 left"),
        (counts(104, s200=8, s429=1, s499=3), "1 answers of status 200 by the metrics, 2 by the clients"),
        (counts(104, s200=10, s429=1, s499=1, s400=1), "1 answers of status 400 by the metrics, 0 by the clients"),
        (counts(103, s200=10, s429=1, s499=1), "3 tokens by the metrics, 4 to 8 by the clients"),
        (counts(109, s200=10, s429=1, s499=1), "9 tokens by the metrics, 4 to 8 by the clients"),
    ):
        assert any(named in line for line in endurance.compare_counts(results, before, after)), named


def test_problems_are_counted_by_their_words():
    stand = Stand(None, "", [], None, None)
    results = [result(STREAM), result(STREAM[:-5]), result(STREAM[:-6]), result(whole(error(), status=500))]
    assert stand.check("part", results) == {"lost: the answer is cut off": 2, "status 500": 1}
    assert stand.failed == ["part: 2 x lost: the answer is cut off", "part: 1 x status 500"]
    assert stand.check_blocks("part", {"minichat_kv_blocks_free": 7.0, "minichat_kv_blocks_total": 8.0}) == (7, 8)
    assert stand.failed[-1] == "part: 7 of 8 blocks are free at the end"
    assert stand.check_blocks("part", {"minichat_kv_blocks_free": 8.0, "minichat_kv_blocks_total": 8.0}) == (8, 8)
    stand.check_blocks("part", {})
    assert len(stand.failed) == 4, "metrics without blocks are no proof"


def test_the_first_difference_of_two_texts():
    pairs = (("abc", "abd", 2), ("ab", "abc", 2), ("", "a", 0), ("ab", "ab", 2))
    assert all(endurance.first_difference(a, b) == place for a, b, place in pairs)


def tied(**followers):
    """An engine that knows which characters follow which."""
    ids = {WITH_CHARS.encode(a)[0]: WITH_CHARS.encode(b) for a, b in followers.items()}
    return Engine(model_of(WITH_CHARS, ids, 64), WITH_CHARS)


def test_a_near_tie_is_told_from_a_wrong_text():
    """After b, both c and d are as likely as each other; after a, only b can follow."""
    engine = tied(a="b", b="cd", c="a", d="a")
    task = (WITH_CHARS.encode("a"), 5, 0.0, 0)
    (own,) = texts(engine, [task])
    other = own.replace("c", "#").replace("d", "c").replace("#", "d")
    assert own == "bcabc" and other == "bdabd"
    assert near_tie(engine, task, other) and near_tie(engine, task, "bdabc")
    assert not near_tie(engine, task, "babab") and not near_tie(engine, task, "acabc")
    assert not near_tie(engine, task, "bca") and not near_tie(engine, task, "")


def test_a_near_tie_of_a_draw():
    """A seed draws c or d; the other one is no near tie but where the draw is at the border."""
    engine = tied(a="b", b="cd", c="a", d="a")
    ties = 0
    for seed in range(20):
        task = (WITH_CHARS.encode("a"), 2, 1.0, seed)
        (own,) = texts(engine, [task])
        ties += near_tie(engine, task, "b" + ("d" if own == "bc" else "c"))
    assert ties < 3


def test_wrong_texts_are_failures_and_near_ties_are_not(monkeypatch):
    engine = tied(a="b", b="cd", c="a", d="a")
    questions = {"texts": texts, "near_tie": near_tie}
    alone = SimpleNamespace(ask=lambda question, *args: questions[question](engine, *args))
    stand = Stand(None, "", [], None, alone)
    results = []
    for text in ("bcabc", "bdabc", "bbbbb"):
        call = Call(WITH_CHARS.encode("a"), 5, 0.0, 0, True)
        results.append(Result(call, [200], 200, 1.0, 0.0, text=text, tokens=5))
    found = endurance.check_texts(stand, results)
    assert (found["texts"], found["wrong_texts"], found["near_ties"]) == (3, 1, 1)
    assert [each["differs_at"] for each in found["differ"]] == [1, 1]
    assert stand.failed == ["mixed: 1 texts are not the engine's own"]


# -----------------------------------------------------------------------------
# The verb


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of a model with random weights."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=96, vocab_size=WITH_CHARS.vocab_size, n_layer=2, n_head=2, n_embd=32))
    state = {"step": 1, "val_loss": None, "model": vars(model.config), "config": {"dataset": ""}}
    checkpoint.save(folder, model, NoOptimizer(), state)
    WITH_CHARS.save(folder)
    return folder


@pytest.mark.parametrize(
    "words, named",
    [
        ([], "--models=RUN names the model"),
        (["--models=x", "--parts=closed,open"], "--parts=open: it takes closed, idle"),
        (["--models=x", "--parts=()"], "--parts="),
        (["--models=x", "--clients=()"], "--clients is empty"),
        (["--models=x", "--clients=0"], "must be at least 1"),
        (["--models=x", "--seconds=0"], "must be above 0"),
        (["--models=x", "--crowd=0"], "--crowd=0"),
        (["--models=x", "--prompt_lengths=9,8"], "--prompt_lengths takes two numbers"),
        (["--models=x", "--answer_lengths=8"], "--answer_lengths takes two numbers"),
        (["--models=x", "--dtype=int4"], "--dtype=int4: it takes float32"),
        (["--models=x", "--device=tpu"], "device='tpu'"),
    ],
)
def test_mistakes_are_one_line(call_script, words, named):
    code, _, err = call_script("bench.py", "serve", *words)
    assert code == 2 and named in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_model_that_cannot_be_exported_says_why(small, tmp_path):
    assert export(None, small, str(tmp_path / "model.gguf"), "float32") or (tmp_path / "model.gguf").exists()
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=WITH_CHARS.vocab_size, n_layer=1, n_head=1, n_embd=32, pos="rope",
                          norm="rmsnorm_nogain", activation="relu2"))
    state = {"step": 1, "val_loss": None, "model": vars(model.config), "config": {"dataset": ""}}
    checkpoint.save(tmp_path / "ours", model, NoOptimizer(), state)
    for name in ("model.gguf", "model"):
        reason = export(None, tmp_path / "ours", str(tmp_path / "other" / name), "float32")
        assert reason and "\n" not in reason and not (tmp_path / "other" / name).exists()


def test_a_peer_that_does_not_start_says_why(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no module named llama')"]
    with pytest.raises(RuntimeError, match="it does not start: no module named llama"):
        with serving_peer(command, tmp_path / "log"):
            pass
    with pytest.raises(RuntimeError, match="no-such-python"):
        with serving_peer(["no-such-python"], tmp_path / "log"):
            pass


PEER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def do_GET(self):
        self.answer({"data": []})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["prompt"] == "text" and body.get("model", "") == sys.argv[2] and "ignore_eos" not in body, body
        choices = [{"index": 0, "text": "x", "finish_reason": "length"}]
        self.answer({"choices": choices, "usage": {"completion_tokens": body["max_tokens"]}})
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_peers_get_the_same_texts_and_those_that_are_missing_have_a_reason(tmp_path, monkeypatch, capsys):
    peer = tmp_path / "peer.py"
    peer.write_text(PEER, encoding="utf-8")
    words = [str(peer), "{port}", "{model}"]
    monkeypatch.setattr(serving, "PEERS", {
        "stub": ("peer_llama", "model.gguf", words, {"model": "{model}"}),
        "refuses": ("peer_llama", "model.gguf", words, {}),
        "absent": ("peer_transformers", "model", words, {}),
        "broken": ("peer_llama", "model", ["-c", "raise SystemExit('it is broken')"], {}),
    })
    exported = []

    def ask(question, *args):
        if question == "export":
            exported.append(args[1].rpartition("/")[2])
            return ""
        return ["text"] * len(args[0])

    c = Settings({"peer_llama": sys.executable, "peer_transformers": "", "clients": (1, 2), "crowd": 2,
                  "prompt_lengths": (1, 2), "answer_lengths": (3, 3), "dtype": "float32"})
    alone = SimpleNamespace(ask=ask, about={"ids": (1, 2), "context": 16})
    with serving_peer([sys.executable, str(peer), "{port}", ""], tmp_path / "log") as server:
        rows = serving.peers(Stand(c, "folder", [], server, alone))
    assert [(row["server"], row["clients"], row["failed"]) for row in rows] == [
        ("minichat", 1, 0), ("minichat", 2, 0), ("stub", 1, 0), ("stub", 2, 0), ("refuses", 1, 2), ("refuses", 2, 2),
        ("absent", None, None), ("broken", None, None)]
    assert rows[6]["why"] == "--peer_transformers=PYTHON names the Python that has it"
    assert rows[7]["why"] == "it does not start: it is broken"
    assert all(row["tok_per_s"] > 0 for row in rows[:4]) and exported == ["model.gguf", "model.gguf", "model"]
    assert "it is broken" in capsys.readouterr().out


@pytest.mark.slow
def test_every_part_of_the_benchmark(small, run_script):
    words = [f"--models={small}", "--device=cpu", "--rounds=1", "--crowd=3", "--clients=1,4", "--max_requests=4",
             "--prompt_lengths=2,8", "--answer_lengths=3,6", "--seconds=0.5", "--requests=120", "--aborts=12"]
    done = run_script("bench.py", "serve", *words)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and result["failed"] == [], done.stderr
    assert [row["clients"] for row in result["closed"]] == [1, 4] and result["closed"][0]["gain"] == 1.0
    for row in result["closed"]:
        assert row["http_%"] == pytest.approx(100 * row["http_tok_per_s"] / row["engine_tok_per_s"])
    idle, load, overload, mixed = (result[part] for part in ("idle", "load", "overload", "mixed"))
    assert idle["added_ms"] == pytest.approx(idle["first_ms"]["p50"] - idle["engine_first_ms"]["p50"])
    assert load["calls"] > 0 and load["first_ms"]["p95"] >= load["first_ms"]["p50"] > 0
    assert overload["answered"] + overload["refused"] == overload["calls"] and overload["health_ms"]["max"] > 0
    assert sum(mixed["statuses"].values()) + mixed["left"] == mixed["calls"] == 120
    assert mixed["lost"] == mixed["wrong_texts"] == 0 < mixed["texts"] <= mixed["statuses"]["200"]
    assert mixed["blocks_free"] == mixed["blocks_total"] > 0 and mixed["metrics_differ"] == []
    assert result["aborts"]["calls"] == 12 and result["aborts"]["left"] > 0
    assert result["kill"]["cut"] == result["kill"]["streams"] == 4 and result["kill"]["serves_again"]
    assert result["kill"]["files_changed"] == 0 < result["kill"]["files"]
    assert [row["server"] for row in result["peers"]] == ["minichat"] * 2 + ["llama-cpp-python", "transformers"]
    for part in ("closed", "idle", "load", "overload", "mixed", "aborts", "kill", "peers"):
        assert f"\n{part}: " in done.stdout


@pytest.mark.slow
def test_a_model_that_is_too_short_is_one_line(small, call_script):
    code, _, err = call_script("bench.py", "serve", f"--models={small}", "--answer_lengths=90,100", "--device=cpu")
    assert code == 2 and "has a context of 96, and the longest prompt takes 164 with its answer" in err
