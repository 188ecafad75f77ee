"""
The clients that people use, against a running server: OpenAI's own, lm-eval's, schemathesis; and a mix of everything.

What OpenAI's client must find is in its code: which status becomes which exception, that it repeats 429 and 5xx by
itself, and that an event with an error ends a stream.
"""

import asyncio
import contextlib
import json
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live import PATIENCE, live
from serving_models import (
    ASKS_HELLO,
    CHAT,
    COMPLETE,
    HELLO,
    WITH_MANY,
    ask,
    asked,
    assert_all_free,
    engine_of,
    held,
    http,
    joined,
    paced,
    streamed,
    texts_of,
    write_endless,
    write_noisy,
    write_talker,
)
from test_chat import WITH_BYTES
from test_serve import connect, error_of, is_refused, metrics_of, raw_request, until

from conversation import Template
from inference.sampling import Sampling
from inference.tasks import log_likelihoods, multiple_choice, open_items

openai = pytest.importorskip("openai")

MESSAGES = ASKS_HELLO


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The runs that are served, by name."""
    root = tmp_path_factory.mktemp("serving")
    return {"talker": write_talker(root / "talker"), "endless": write_endless(root / "endless", block_size=4096),
            "noisy": write_noisy(root / "noisy"),
            "bytes": write_noisy(root / "bytes", WITH_BYTES, seed=3)}


@pytest.fixture(scope="module")
def talker(folders):
    with live(folders["talker"]) as server:
        yield server


@pytest.fixture(scope="module")
def noisy(folders):
    with live(folders["noisy"]) as server:
        yield server


@pytest.fixture(scope="module")
def reference(folders):
    """The engine of `noisy` without a server."""
    return engine_of(folders["noisy"])


def client_of(server, api_key="any", **options):
    """OpenAI's client."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key=api_key, timeout=PATIENCE, **options)


@pytest.fixture
def client(talker):
    with client_of(talker) as client:
        yield client


# -----------------------------------------------------------------------------
# OpenAI's client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["talker"]
    model = client.models.retrieve("talker")
    assert model.object == "model" and model.owned_by and model.created
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found" and "talker" in error.value.message


def test_chat(client):
    answer = client.chat.completions.create(model="talker", messages=MESSAGES)
    choice, = answer.choices
    assert choice.message.content == "Hi!" and choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert choice.message.tool_calls is None and choice.message.refusal is None
    assert answer.object == "chat.completion" and answer.model == "talker" and answer.id.startswith("chatcmpl-")
    assert answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens + 3 == answer.usage.total_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_chat_with_all_that_other_clients_send(client):
    """Nulls, fields that ask for nothing, and fields nobody knows."""
    answer = client.chat.completions.create(
        model="talker", messages=[{"role": "developer", "content": "be kind"}, *MESSAGES], max_completion_tokens=2,
        temperature=0.7, top_p=0.9, frequency_penalty=0.1, presence_penalty=0.1, logit_bias={"5": -100}, n=1, seed=1,
        stop=None, user="anna", metadata={"a": "b"}, store=False, service_tier="auto", response_format={"type": "text"},
        tools=[], tool_choice="none", parallel_tool_calls=True, modalities=["text"],
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.0, "chat_id": "x", "options": {"num_ctx": 5}})
    assert answer.choices[0].message.content == "Hi" and answer.choices[0].finish_reason == "length"


def test_a_streamed_chat(client):
    """Chunk by chunk, and by the client's own collector, which is strict about what a stream may hold."""
    chunks = list(client.chat.completions.create(model="talker", messages=MESSAGES, stream=True,
                                                 stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hi!"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens == 3

    with client.chat.completions.stream(model="talker", messages=MESSAGES, logprobs=True, top_logprobs=2) as stream:
        kinds = [event.type for event in stream]
        whole = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds
    assert whole.choices[0].message.content == "Hi!" and whole.choices[0].finish_reason == "stop"
    assert [token.token for token in whole.choices[0].logprobs.content] == list("Hi!")
    with pytest.raises(openai.LengthFinishReasonError):
        with client.chat.completions.stream(model="talker", messages=MESSAGES, max_tokens=2) as stream:
            stream.get_final_completion()


def test_completions(client):
    answer = client.completions.create(model="talker", prompt=["x", "0"], echo=True, max_tokens=20, n=2)
    assert [choice.text for choice in answer.choices] == ["xyz", "xyz", "0123456789", "0123456789"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"} and answer.id.startswith("cmpl-")
    chunks = list(client.completions.create(model="talker", prompt="0", stop=["7"], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "123456"
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[0].object == "text_completion"


def test_several_choices_and_log_probabilities(noisy, reference):
    """n answers, each token with the most likely ones beside it, as types of the client."""
    ids, _ = Template(WITH_MANY).encode(MESSAGES, reply=True)
    with client_of(noisy) as client:
        chat = client.chat.completions.create(model="noisy", messages=MESSAGES, n=3, seed=5, max_tokens=8,
                                              logprobs=True, top_logprobs=4)
        completion = client.completions.create(model="noisy", prompt=ids, n=3, seed=5, max_tokens=8, logprobs=4)
        chunks = list(client.completions.create(model="noisy", prompt=ids, n=3, seed=5, max_tokens=8, logprobs=4,
                                                stream=True))
    for j, choice in enumerate(completion.choices):
        request = reference.generate(ids, seed=5 + j, max_new_tokens=8, top_logprobs=4)
        assert choice.text == request.text and choice.index == j
        assert choice.logprobs.token_logprobs == pytest.approx(request.logprobs, abs=1e-4)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(request.tokens)
        for token, logprob, top in zip(choice.logprobs.tokens, choice.logprobs.token_logprobs,
                                       choice.logprobs.top_logprobs, strict=True):
            assert top[token] == logprob and 4 <= len(top) <= 5
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == j]
        assert sum((part.logprobs.tokens for part in parts if part.logprobs), []) == choice.logprobs.tokens
    for choice, same in zip(chat.choices, completion.choices, strict=True):
        if choice.message.content == same.text:  # else it ended at a token that ends a chat
            assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(
                same.logprobs.token_logprobs, abs=1e-4)
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 4
            likely = [top.logprob for top in entry.top_logprobs]
            assert likely == sorted(likely, reverse=True) and entry.logprob <= likely[0]
            if entry.bytes is not None:
                assert bytes(entry.bytes).decode() == entry.token


def test_errors_become_the_clients_exceptions(folders, client):
    create = client.chat.completions.create
    for options, kind, code, param in (
        ({"temperature": -1}, openai.BadRequestError, None, "temperature"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        ({"max_tokens": 1000}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"messages": []}, openai.BadRequestError, None, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, None, "tools"),
        ({"n": 129}, openai.BadRequestError, None, "n"),
    ):
        for stream in (False, True):
            with pytest.raises(kind) as error:
                create(**{"model": "talker", "messages": MESSAGES, "stream": stream, **options})
            assert (error.value.code, error.value.param) == (code, param)
            assert error.value.type == "invalid_request_error" and error.value.request_id
    with live(folders["talker"], api_key="right", max_body=1) as server:
        with client_of(server, "wrong") as stranger, pytest.raises(openai.AuthenticationError) as error:
            stranger.models.list()
        assert error.value.code == "invalid_api_key"
        with client_of(server, "right") as friend:
            assert friend.models.list().data
            with pytest.raises(openai.APIStatusError) as error:
                friend.completions.create(model="talker", prompt="a" * 2000)
            assert error.value.status_code == 413
            with pytest.raises(openai.PermissionDeniedError):
                friend.models.list(extra_headers={"Host": "evil.example"})


def test_a_bad_request_is_sent_once(talker, client):
    """The client repeats a 500 twice: what a client did wrong must not look like that."""
    before = metrics_of(talker).get(f'minichat_requests_total{{route="{COMPLETE}",status="400"}}', 0)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="talker", prompt="\u4e00")  # no token of this model
    after = metrics_of(talker)[f'minichat_requests_total{{route="{COMPLETE}",status="400"}}']
    assert after == before + 1


@pytest.fixture
def naps(monkeypatch):
    """What OpenAI's client would sleep, in seconds, before it tries again. `naps.then` is called instead."""
    naps = SimpleNamespace(seconds=[], then=lambda: None)

    def sleep(seconds):
        naps.seconds.append(seconds)
        naps.then()

    module = openai._base_client
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep, time=module.time.time))
    return naps


def test_it_tries_again_when_the_queue_is_full(folders, naps):
    """After as many seconds as the server says, and it is answered then."""
    with (live(folders["talker"], max_requests=1, max_queue=1) as server, connect(server) as one,
          connect(server) as two, client_of(server) as client):
        with held(server) as gate:
            for number, other in enumerate((one, two), 1):
                other.sendall(raw_request(CHAT, HELLO))
                until(lambda number=number: server.worker.unfinished == number)
            said = int(ask(server, CHAT, **HELLO).headers["retry-after"])

            def make_room():
                if len(naps.seconds) == 2:
                    gate.open()
                    until(lambda: not server.worker.unfinished)

            naps.then = make_room
            answer = client.chat.completions.create(model="talker", messages=MESSAGES)
            assert answer.choices[0].message.content == "Hi!" and naps.seconds == [said, said]
        counts = metrics_of(server)
        assert counts[f'minichat_requests_total{{route="{CHAT}",status="429"}}'] == 3
        assert counts[f'minichat_requests_total{{route="{CHAT}",status="200"}}'] == 3


def test_a_queue_that_stays_full_is_an_exception(folders, naps):
    with (live(folders["talker"], max_requests=1, max_queue=0) as server, connect(server) as one,
          client_of(server) as client, held(server)):
        one.sendall(raw_request(CHAT, HELLO))
        until(lambda: server.worker.unfinished == 1)
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="talker", messages=MESSAGES)
        assert error.value.code == "queue_full" and len(naps.seconds) == client.max_retries == 2


def test_what_took_too_long_is_not_tried_again(folders, naps):
    """It would take as long once more, while others wait."""
    with live(folders["endless"], timeout=0.0) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError) as error:
            client.chat.completions.create(model="endless", messages=MESSAGES)
        assert error.value.code == "timeout" and not naps.seconds
        with pytest.raises(openai.APIError) as error:
            list(client.chat.completions.create(model="endless", messages=MESSAGES, stream=True))
        assert error.value.code == "timeout"


def test_an_error_within_a_stream_is_an_exception(folders):
    """Behind all that was said until then."""
    with live(folders["talker"]) as server, client_of(server) as client, paced(server):
        step = server.worker.engine.step
        left = [3]

        def fail_later():
            if not left[0]:
                raise RuntimeError("out of memory")
            left[0] -= 1
            return step()

        server.worker.engine.step = fail_later
        said = []
        with pytest.raises(openai.APIError) as error:
            for chunk in client.completions.create(model="talker", prompt="0", stream=True):
                said.append(chunk.choices[0].text)
        assert "".join(said) == "123" and error.value.code == "engine"
        assert server.wait() == 1


def test_a_stream_that_is_closed_ends_its_work(folders):
    with live(folders["endless"], kv_memory=32) as server, client_of(server) as client:
        stream = client.chat.completions.create(model="endless", messages=MESSAGES, stream=True, max_tokens=4000)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        assert_all_free(server)
        assert client.completions.create(model="endless", prompt="a", max_tokens=3).choices[0].text == "bab"


def test_the_asynchronous_client(noisy, reference):
    """Many at once, streamed and not: each gets its own answer."""
    prompts = [WITH_MANY.encode(f"question {i}") for i in range(24)]
    expected = [request.text for request in reference.generate(
        prompts, [Sampling(max_new_tokens=10, seed=i) for i in range(24)])]

    async def plain(client, i):
        answer = await client.completions.create(model="noisy", prompt=prompts[i], max_tokens=10, seed=i)
        return answer.choices[0].text

    async def in_pieces(client, i):
        stream = await client.completions.create(model="noisy", prompt=prompts[i], max_tokens=10, seed=i, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def leaves(client):
        stream = await client.chat.completions.create(model="noisy", messages=MESSAGES, stream=True)
        async for _ in stream:
            break
        await stream.close()

    async def run():
        async with openai.AsyncOpenAI(base_url=noisy.url + "/v1", api_key="any", timeout=PATIENCE) as client:
            tasks = [(plain, in_pieces)[i % 2](client, i) for i in range(24)]
            texts, *_ = await asyncio.gather(asyncio.gather(*tasks), *(leaves(client) for _ in range(6)))
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("gpt-4")
            return texts

    assert asyncio.run(run()) == expected
    assert_all_free(noisy)


def test_a_server_that_is_gone_is_a_lost_connection(folders, naps):
    with live(folders["talker"]) as server, client_of(server) as client:
        assert client.models.list().data
        server.stop()
        assert is_refused(server)
        with pytest.raises(openai.APIConnectionError):
            client.chat.completions.create(model="talker", messages=MESSAGES)


# -----------------------------------------------------------------------------
# lm-eval's client


@pytest.fixture
def no_other_hosts(monkeypatch):
    """Every connection to another machine than this one is an error."""
    real_connect = socket.socket.connect

    def connect_here(self, address):
        here = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        assert here, f"it wants to reach {address}"
        return real_connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"):
        monkeypatch.setenv(name, "1" if "OFFLINE" in name else "0")
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def write_items(folder, count=60):
    """items.jsonl of questions with choices of unequal lengths, some with characters of several bytes. -> its path"""
    words = ["red", "a green one", "blue", "caf\u00e9", "\u65e5\u672c", "none of these", "x"]
    lines = []
    for i in range(count):
        choices = [words[(i * 3 + j * (1 + i % 5)) % len(words)] + str(j) for j in range(2 + i % 3)]
        lines.append(json.dumps({"context": f"Question {i}: what is {i * i % 37}?\nAnswer:", "choices": choices,
                                 "answer": i * 7 % len(choices)}))
    path = folder / "items.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_task(folder, items):
    """The task of these items for lm-eval. -> its name"""
    lines = ["task: items", "dataset_path: json", "dataset_kwargs:", "  data_files:", f"    test: {items}",
             f"  cache_dir: {folder / 'cache'}", "test_split: test", "output_type: multiple_choice",
             'doc_to_text: "{{context}}"', "doc_to_choice: choices", "doc_to_target: answer",
             'target_delimiter: " "', "metric_list:"]
    for name in ("acc", "acc_norm", "acc_bytes"):
        lines += [f"  - metric: {name}", "    aggregation: mean", "    higher_is_better: true"]
    (folder / "items.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "items"


@pytest.mark.slow
@pytest.mark.parametrize("batch_size, concurrent", [(1, 1), (8, 1), (4, 4)])
@pytest.mark.parametrize("name", ["bytes", "noisy"])
def test_lm_eval_gets_the_accuracy_of_eval_py(folders, tmp_path, no_other_hosts, name, batch_size, concurrent):
    """To the last digit, with lists of ids and the server's own tokenizer, which lm-eval finds by itself."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    items = write_items(tmp_path)
    if name == "noisy":  # it does not know these characters
        text = items.read_text(encoding="utf-8")
        items.write_text(text.replace("\\u00e9", "e").replace("\\u65e5\\u672c", "\\u4e00\\u4e01"), encoding="utf-8")
    reference = engine_of(folders[name])
    parsed = open_items("", str(items))
    ours = multiple_choice(reference.model, reference.tokenizer, parsed, 8)
    assert 0.1 < ours["acc"] < 0.9 and ours["acc"] != ours["acc_norm"], "too easy to get by chance"

    with live(folders[name]) as server:
        arguments = {"model": name, "base_url": server.url + COMPLETE, "tokenizer_backend": "auto", "max_length": 128,
                     "num_concurrent": concurrent}
        result = lm_eval.simple_evaluate(
            model="local-completions", model_args=arguments, tasks=[write_task(tmp_path, items)], batch_size=batch_size,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            log_samples=True)
        counts = metrics_of(server)
        assert_all_free(server)
    theirs = result["results"]["items"]
    assert theirs["acc,none"] == ours["acc"]
    assert theirs["acc_norm,none"] == ours["acc_norm"]
    assert theirs["acc_bytes,none"] == ours["acc_bytes"]
    for metric in ("acc", "acc_norm", "acc_bytes"):
        assert theirs[f"{metric}_stderr,none"] == pytest.approx(ours[f"{metric}_stderr"], abs=1e-12)
    assert not [name for name in counts if 'status="4' in name or 'status="5' in name]

    samples = sorted(result["samples"]["items"], key=lambda sample: sample["doc_id"])
    for sample, item in zip(samples, parsed, strict=True):
        for (logprob, is_greedy), (context, continuation) in zip(sample["filtered_resps"], item.pairs, strict=True):
            ids = reference.tokenizer.encode(context + continuation)
            count = len(ids) - len(reference.tokenizer.encode(context))
            (score, hit), = log_likelihoods(reference.model, [(ids, count)], 1)
            assert float(logprob) == pytest.approx(score, abs=1e-3) and is_greedy in (hit, str(hit))


@pytest.mark.slow
def test_lm_eval_generates_without_a_tokenizer(folders, tmp_path, no_other_hosts):
    """tokenizer_backend None sends texts: greedy answers up to a stop string."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [{"question": "0", "answer": "12345"}, {"question": "x", "answer": "yz"}, {"question": "9", "answer": "no"}]
    items = tmp_path / "rows.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "said.yaml").write_text("\n".join([
        "task: said", "dataset_path: json", "dataset_kwargs:", "  data_files:", f"    test: {items}",
        f"  cache_dir: {tmp_path / 'cache'}", "test_split: test", "output_type: generate_until",
        'doc_to_text: "{{question}}"', 'doc_to_target: "{{answer}}"', "generation_kwargs:", "  until:", '    - "6"',
        "  max_gen_toks: 20", "  do_sample: false", "metric_list:", "  - metric: exact_match", "    aggregation: mean",
        "    higher_is_better: true"]) + "\n", encoding="utf-8")
    with live(folders["talker"]) as server:
        result = lm_eval.simple_evaluate(
            model="local-completions", tasks=["said"],
            model_args={"model": "talker", "base_url": server.url + COMPLETE, "tokenizer_backend": None,
                        "eos_string": "<|eos|>"},
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0)
    assert result["results"]["said"]["exact_match,none"] == 2 / 3


# -----------------------------------------------------------------------------
# schemathesis


def operations_of(server):
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


def declared_checks():
    """The checks of schemathesis that compare an answer with openapi.json."""
    from schemathesis import checks

    checks.load_all_checks()
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
             "response_headers_conformance")
    return [checks.CHECKS.get_one(name) for name in names]


def assert_declared(case, response):
    """An answer is one that openapi.json tells of; errors have OpenAI's form, and no fault is the server's."""
    case.validate_response(response, checks=declared_checks())
    assert response.status_code < 500
    if response.status_code >= 400:
        body = response.json()
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"] and "\n" not in body["error"]["message"]
    assert response.headers["x-request-id"]


def try_operation(server, operation, generation, examples):
    """Send so many questions to one route. -> how often each status came"""
    statuses = Counter()

    @settings(max_examples=examples, database=None, phases=[Phase.generate], derandomize=True, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=generation))
    def answers_as_declared(case):
        response = case.call(base_url=server.url, timeout=PATIENCE)
        statuses[response.status_code] += 1
        assert_declared(case, response)

    answers_as_declared()
    return statuses


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_schemathesis_finds_nothing(folders, mode):
    """Bodies that openapi.json allows, and such that it does not, for every route."""
    schemathesis = pytest.importorskip("schemathesis")
    generation = schemathesis.GenerationMode(mode)
    statuses = {}  # path -> those of its answers
    with live(folders["bytes"]) as server:
        for operation in operations_of(server):
            posts = operation.method.upper() == "POST"
            if mode == "negative" and not posts:
                continue  # there is nothing to get wrong but the name of a model
            examples = 150 if posts else 5
            statuses[operation.path] = try_operation(server, operation, generation, examples)
        assert_all_free(server)
        assert http.get(server.url + "/health").json()["status"] == "ok"
    posts = {CHAT, COMPLETE, "/tokenize", "/detokenize"}
    if mode == "positive":
        assert set(statuses) == posts | {"/v1/models", "/v1/models/{name}", "/tokenizer_info", "/health", "/metrics"}
        assert all(statuses[path][200] >= 20 for path in posts), statuses
    else:
        assert set(statuses) == posts
        assert all(statuses[path][400] >= 20 for path in posts), statuses


# -----------------------------------------------------------------------------
# A mix of everything


WORDS = st.text(st.sampled_from("abc de\u4e00\u4e01<|>"), min_size=1, max_size=30)
OPTIONS = {"max_tokens": st.integers(1, 20), "temperature": st.sampled_from([0.0, 0.5, 1.0]),
           "top_p": st.sampled_from([0.3, 1.0]), "top_k": st.sampled_from([0, 5]), "seed": st.integers(-9, 2**62),
           "stop": st.lists(st.sampled_from(["a", "\u4e00", "zz"]), max_size=2),
           "presence_penalty": st.sampled_from([0.0, 1.0]), "ignore_eos": st.booleans()}
GOOD = st.fixed_dictionaries({
    "path": st.sampled_from([CHAT, COMPLETE]), "text": WORDS, "n": st.integers(1, 3), "stream": st.booleans(),
    "options": st.fixed_dictionaries({"max_tokens": OPTIONS["max_tokens"], "seed": OPTIONS["seed"]}, optional={
        name: values for name, values in OPTIONS.items() if name not in ("max_tokens", "seed")})})
BAD = st.fixed_dictionaries({
    "path": st.sampled_from([CHAT, COMPLETE, "/tokenize", "/detokenize", "/nothing"]),
    "bad": st.sampled_from([b"", b"{", b"[]", b'{"prompt": 5, "messages": 5, "tokens": "a"}', b"\xff", b'{"n": NaN}'])})
LEAVES = st.fixed_dictionaries({
    "path": st.sampled_from([CHAT, COMPLETE]), "text": WORDS, "stream": st.booleans(), "reads": st.integers(0, 300),
    "leaves": st.just(True)})


def body_of(action):
    body = {"n": action.get("n", 1), "stream": action["stream"], **action.get("options", {})}
    if action["path"] == CHAT:
        return {**body, "messages": [{"role": "user", "content": action["text"]}]}
    return {**body, "prompt": action["text"]}


def expectation(reference, action):
    """The texts and ends that the engine gives without a server."""
    template = Template(WITH_MANY)
    options = dict(action["options"])
    sampling = Sampling(max_new_tokens=options.pop("max_tokens"), seed=0,
                        **{name: value for name, value in options.items() if name not in ("seed", "stop")},
                        stop=tuple(options.get("stop", ())))
    ids = WITH_MANY.encode(action["text"])
    stops = ()
    if action["path"] == CHAT:
        ids, _ = template.encode([{"role": "user", "content": action["text"]}], reply=True)
        stops = () if options.get("ignore_eos") else template.stops
    answers = []
    for j in range(action["n"]):
        request = reference.generate(ids, sampling, seed=(options["seed"] + j) % 2**63, stop_tokens=stops)
        answers.append((request.text, "length" if request.finish == "length" else "stop"))
    return answers


def perform(server, action):
    """-> what came: texts and ends, a status, or None for a client that left"""
    if "bad" in action:
        return http.post(server.url + action["path"], content=action["bad"]).status_code
    body = body_of(action)
    if "leaves" in action:
        with connect(server) as client:
            client.sendall(raw_request(action["path"], {**body, "max_tokens": 60}))
            if action["reads"]:
                client.recv(action["reads"])
        return None
    if action["stream"]:
        return joined(streamed(server, action["path"], **{k: v for k, v in body.items() if k != "stream"}))
    answer = asked(server, action["path"], **body)
    return list(zip(texts_of(answer), [choice["finish_reason"] for choice in answer["choices"]], strict=True))


def total(counts, prefix):
    """The sum of all metrics that begin like this."""
    return sum(value for name, value in counts.items() if name.startswith(prefix))


@given(actions=st.lists(st.one_of(GOOD, GOOD, GOOD, BAD, LEAVES), min_size=1, max_size=12))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                                 HealthCheck.too_slow])
def test_a_mix_of_everything(noisy, reference, actions):
    """All at once: each answer is the engine's own, what is wrong is refused, who leaves leaves nothing behind, and
    nothing is lost or counted twice."""
    before = metrics_of(noisy)
    with ThreadPoolExecutor(len(actions)) as pool:
        came = list(pool.map(lambda action: perform(noisy, action), actions))
    for action, answer in zip(actions, came, strict=True):
        if "bad" in action:
            assert answer == (404 if action["path"] == "/nothing" else 400)
        elif "leaves" not in action:
            assert answer == expectation(reference, action), action
    assert_all_free(noisy)

    def counted():
        counts = metrics_of(noisy)
        posts = [f'minichat_requests_total{{route="{route}"' for route in (CHAT, COMPLETE)]
        return sum(total(counts, prefix) - total(before, prefix) for prefix in posts)

    until(lambda: counted() == sum(action["path"] in (CHAT, COMPLETE) for action in actions))
    after = metrics_of(noisy)
    assert not [name for name in after if name.startswith("minichat_requests") and 'status="5' in name]
    assert after["minichat_running"] == after["minichat_waiting"] == 0


def test_two_answers_over_one_connection(talker):
    """A client may send its next question before it has read the last answer; they come one after the other."""
    with connect(talker) as client, contextlib.closing(client.makefile("rb")) as lines:
        client.sendall(b"".join(raw_request(COMPLETE, {"prompt": prompt}) for prompt in ("x", "0", "x")))
        texts = []
        while len(texts) < 3:
            line = lines.readline()
            assert line
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
                while lines.readline().strip():
                    pass
                texts += texts_of(json.loads(lines.read(length)))
    assert texts == ["yz", "123456789", "yz"]


def test_errors_of_http_itself_have_openais_form(talker):
    for method, path, status in (("PUT", CHAT, 405), ("GET", "/v1", 404), ("POST", "/v1/embeddings", 404),
                                 ("GET", "/v1/chat", 404), ("DELETE", "/v1/models/talker", 405)):
        answer = httpx.request(method, talker.url + path)
        assert answer.status_code == status and error_of(answer)["message"]
