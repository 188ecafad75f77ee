"""The server as a process, and what every request passes: its start and end, guards, limits, clients that leave."""

import base64
import contextlib
import hashlib
import json
import re
import signal
import socket
import threading
import time
from html.parser import HTMLParser
from urllib.parse import urlsplit

import httpx
import pytest
from live import PATIENCE, ROOT, live, process, settings
from test_chat import write_endless, write_polite

import serve
import serving.app
from serving.guards import host_name, is_loopback, known_hosts

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
FOREVER = {**HELLO, "max_tokens": 20_000}


@pytest.fixture(scope="module")
def polite(tmp_path_factory):
    return write_polite(tmp_path_factory.mktemp("runs") / "polite")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return write_endless(tmp_path_factory.mktemp("runs") / "endless")


@pytest.fixture(scope="module")
def server(polite):
    with live(polite) as running:
        yield running


def until(condition):
    """Wait until it holds. The limit is only reached by a test that fails."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never holds"
        time.sleep(0.002)


def hold_preparation(monkeypatch):
    """Requests are not parsed before the Event that this returns is set."""
    go_on = threading.Event()
    real_prepare = serving.app.prepare

    def slow(*args):
        assert go_on.wait(PATIENCE)
        return real_prepare(*args)

    monkeypatch.setattr(serving.app, "prepare", slow)
    return go_on


class Gate:
    """Holds the engine of a server before each step while it is closed."""

    def __init__(self, server):
        self.engine = server.worker.engine
        self.real_step = self.engine.step
        self.passable = threading.Event()
        self.waits = threading.Event()  # the engine has come to the gate
        self.engine.step = self.step

    def step(self):
        self.waits.set()
        assert self.passable.wait(PATIENCE)
        return self.real_step()

    def open(self):
        self.passable.set()


def error_of(response):
    """The error in an answer, which must have OpenAI's form."""
    body = response.json()
    assert response.headers["content-type"] == "application/json"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    return body["error"]


def events_of(text):
    """The data of a stream's events, as text."""
    assert text.endswith("\n\n")
    events = text[:-2].split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def metrics_of(server):
    """name or name{labels} -> value"""
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def raw_request(path, body, **headers):
    """The bytes of a POST. headers: with _ for -."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"Host": "localhost", "Content_Length": len(body), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + body


def connect(server):
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)


def read_until(connection, mark):
    """The bytes that arrive, up to the `mark`."""
    raw = b""
    while mark not in raw:
        more = connection.recv(65536)
        assert more, f"{mark} never came: {raw}"
        raw += more
    return raw


# -----------------------------------------------------------------------------
# The process


def test_a_ready_line_and_a_clean_end(polite):
    """One line on stdout says where; SIGTERM and Ctrl-C end it with 0."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with process(polite) as running:
            line = running.ready_line
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+ serves polite \(.*context 128 tokens.*\)\n", line)
            answer = httpx.post(running.url + CHAT, json=HELLO).json()
            assert answer["choices"][0]["message"]["content"] == "Hi!"
            running.signal(number)
            code, err = running.end()
            assert code == 0 and running.out == "" and "Traceback" not in err
            assert "hello" not in err and "Hi!" not in err  # conversations are not logged


def one_error(call_script, *args):
    """serve.py ends before it serves: exit code 2, one line. -> the line"""
    code, out, err = call_script("serve.py", "--device=cpu", *args)
    lines = [line for line in err.splitlines() if not line.startswith("cpu (")]
    assert code == 2 and out == "" and len(lines) == 1, (code, out, err)
    return lines[0]


@pytest.mark.parametrize("args, says", [
    (("--api_key=a b",), "--api_key must be plain characters"),
    (("--api_key=schlüssel",), "--api_key must be plain characters"),
    (("--cors_origins=example.org",), "example.org is not an origin"),
    (("--cors_origins=https://example.org/chat",), "is not an origin"),
    (("--template=alpaca",), "--template=alpaca is not one of"),
    (("--port=70000",), "port=70000 must lie in [0, 65535]"),
    (("--max_requests=0",), "max_requests=0 must be at least 1"),
    (("--host=no such host",), "--host=no such host: no such address"),
    (("--device=cuda:99",), "cuda"),
])
def test_a_setting_that_cannot_be(polite, call_script, args, says):
    assert says in one_error(call_script, f"--out_dir={polite}", "--port=0", *args)


@pytest.mark.parametrize("args, says", [
    (("--ckpt=77",), "77"),
    (("--template=minichat",), "has a chat template already"),
    (("--quantize=int3",), "int3"),
    (("--kv_memory=1",), "--kv_memory=1 holds"),
])
def test_a_model_that_cannot_be_loaded(endless, call_script, args, says):
    assert says in one_error(call_script, f"--out_dir={endless}", "--port=0", *args)


def test_a_folder_without_a_model(tmp_path, call_script):
    assert str(tmp_path) in one_error(call_script, f"--out_dir={tmp_path}", "--port=0")


def test_a_port_that_is_taken(polite, call_script):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = one_error(call_script, f"--out_dir={polite}", f"--port={port}")
    assert f"127.0.0.1:{port} cannot be listened at" in line and "--port=0" in line


def script(folder, lines):
    """A program that runs serve.py after `lines`, which replace something."""
    path = folder / "changed.py"
    path.write_text(f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{lines}\nsys.argv[0] = 'serve.py'\n"
                    f"runpy.run_path({str(ROOT / 'serve.py')!r}, run_name='__main__')\n", encoding="utf-8")
    return path


def test_a_dead_engine_ends_the_process_with_1(polite, tmp_path):
    """A stream gets an error event and no [DONE]."""
    changed = script(tmp_path, "import infer\n"
                               "def step(self):\n    raise RuntimeError('the device is gone')\n"
                               "infer.Engine.step = step")
    with process(polite, script=changed) as running:
        text = httpx.post(running.url + CHAT, json={**HELLO, "stream": True}).text
        code, err = running.end()
    assert json.loads(events_of(text)[-1])["error"]["code"] == "engine" and "[DONE]" not in text
    assert code == 1 and "the device is gone" in err
    assert "the device is gone" not in text  # the client learns nothing of the inside


def test_sigterm_while_the_model_is_loaded(polite, tmp_path):
    changed = script(tmp_path, "import foreign.pretrained, time\n"
                               "def read_model(*args):\n    print('loading', flush=True)\n    time.sleep(10_000)\n"
                               "foreign.pretrained.read_model = read_model")
    with process(polite, script=changed, wait=False) as running:
        assert running.process.stdout.readline() == "loading\n"
        running.signal(signal.SIGTERM)
        assert running.end() == (0, "")


def test_the_second_signal_ends_at_once(endless):
    with process(endless, "--drain=10000") as running, connect(running) as client:
        client.sendall(raw_request(CHAT, {**FOREVER, "stream": True}))
        read_until(client, b'"content":"a')
        running.signal(signal.SIGINT)
        until(lambda: is_refused(running))
        running.signal(signal.SIGINT)
        code, err = running.end()
    assert code == 128 + signal.SIGINT and "Traceback" not in err


def is_refused(server):
    """Whether the server takes no new connections any more."""
    try:
        connect(server).close()
    except OSError:
        return True
    return False


def test_health_while_the_model_is_loaded(polite):
    go_on = threading.Event()
    c = settings(polite)

    def load():
        assert go_on.wait(PATIENCE)
        return serve.load_all(c)

    with live(polite, load=load, wait=False) as server:
        answer = httpx.get(server.url + "/health")
        assert answer.status_code == 503 and answer.json()["status"] == "loading"
        assert error_of(answer)["code"] == "loading"
        for path in ("/v1/models", "/tokenizer_info"):
            assert httpx.get(server.url + path).status_code == 503
        answer = httpx.post(server.url + CHAT, json=HELLO)
        assert answer.status_code == 503 and error_of(answer)["code"] == "loading"
        assert httpx.get(server.url + "/").status_code == 200  # the page waits for /health
        assert httpx.get(server.url + "/metrics").status_code == 200
        go_on.set()
        assert server.ready.wait(PATIENCE)
        assert httpx.get(server.url + "/health").json()["status"] == "ok"
        assert httpx.post(server.url + CHAT, json=HELLO).status_code == 200


def test_a_dead_engine(polite):
    """The stream and the plain answer get an error, then the server ends with 1."""
    with live(polite) as server:
        gate = Gate(server)
        gate.real_step = lambda: 1 / 0
        with connect(server) as streaming, connect(server) as plain:
            streaming.sendall(raw_request(CHAT, {**HELLO, "stream": True}))
            plain.sendall(raw_request(CHAT, HELLO))
            assert gate.waits.wait(PATIENCE)
            until(lambda: server.worker.running + server.worker.waiting == 2)
            gate.open()
            text = read_until(streaming, b'"code":"engine"').decode()
            assert "[DONE]" not in text and "ZeroDivision" not in text
            head, _, body = read_until(plain, b'"code":"engine"').partition(b"\r\n\r\n")
            assert b" 500 " in head and json.loads(body)["error"]["type"] == "server_error"
        assert server.wait() == 1


# -----------------------------------------------------------------------------
# Draining


def test_what_runs_may_finish(endless):
    """No new connections from then on, and the stream has its whole tail."""
    with live(endless, drain=1000.0) as server, connect(server) as client, connect(server) as idle:
        gate = Gate(server)
        client.sendall(raw_request(CHAT, {**HELLO, "max_tokens": 50, "stream": True}))
        assert gate.waits.wait(PATIENCE)
        server.server.stop()
        until(lambda: is_refused(server))
        assert idle.recv(1) == b""  # a connection without a request is closed
        gate.open()
        raw = read_until(client, b"0\r\n\r\n").decode()
        assert raw.count('"content":') >= 2 and '"finish_reason":"length"' in raw and "data: [DONE]\n\n" in raw
        assert server.wait() == 0


@pytest.mark.parametrize("stream", [True, False])
def test_what_does_not_finish_within_drain_ends_with_an_error(endless, stream):
    with live(endless, drain=0.0) as server, connect(server) as client:
        gate = Gate(server)
        client.sendall(raw_request(CHAT, {**FOREVER, "stream": stream}))
        assert gate.waits.wait(PATIENCE)
        server.server.stop()
        until(lambda: is_refused(server))
        gate.open()
        raw = read_until(client, b'"code":"shutdown"').decode()
        assert raw.startswith(f"HTTP/1.1 {200 if stream else 503} ") and "[DONE]" not in raw
        assert server.wait() == 0
        assert server.worker.free_blocks == server.worker.total_blocks


def test_a_half_question_does_not_hold_up_the_end(polite):
    with live(polite, drain=0.0) as server, connect(server) as client:
        client.sendall(raw_request(CHAT, b"{", Content_Length=1000))
        until(lambda: server.server.server_state.tasks)
        assert server.stop() == 0
        assert client.recv(1000) == b""


@pytest.mark.parametrize("stream", [True, False])
def test_the_deadline(endless, stream):
    with live(endless, timeout=0.1) as server:
        answer = httpx.post(server.url + CHAT, json={**FOREVER, "stream": stream}, timeout=PATIENCE)
        if stream:
            assert json.loads(events_of(answer.text)[-1])["error"]["code"] == "timeout"
        else:
            assert answer.status_code == 503 and error_of(answer)["code"] == "timeout"
            assert answer.headers["x-should-retry"] == "false"  # the openai client would take as long twice more
        assert server.worker.free_blocks == server.worker.total_blocks
        assert metrics_of(server)['minichat_aborted_total{reason="timeout"}'] == 1


# -----------------------------------------------------------------------------
# Guards


def routes_of(server):
    """(method, path) of every route."""
    pairs = []
    for route in server.service.routes.routes:
        pairs += [(method, route.path.replace("{name:path}", "polite")) for method in sorted(route.methods - {"HEAD"})]
    assert len(pairs) >= 11
    return pairs


def test_every_route_asks_for_the_key(polite):
    key = "s3cret-Key"
    basic = base64.b64encode(f"anyone:{key}".encode()).decode()
    wrong = ["", "Bearer", "Bearer s3cret-Ke", f"Bearer {key}x", key, f"Basic {key}", "Basic !!!", "Bearer \xff"]
    with live(polite, api_key=key) as server:
        assert ("GET", "/health") in routes_of(server) and ("POST", CHAT) in routes_of(server)
        for method, path in [*routes_of(server), ("GET", "/nothing"), ("POST", "/")]:
            url = server.url + path
            if path == "/health":
                assert httpx.request(method, url).status_code == 200
                continue
            for value in wrong:
                headers = {"Authorization": value.encode("latin-1")} if value else {}
                answer = httpx.request(method, url, headers=headers)
                assert answer.status_code == 401, (method, path, value)
                assert error_of(answer)["code"] == "invalid_api_key"
                scheme = "Basic" if path == "/" else "Bearer"
                assert answer.headers["www-authenticate"].startswith(scheme)
                assert answer.headers["x-request-id"]
            for value in (f"Bearer {key}", f"bearer  {key}", f"Basic {basic}"):
                assert httpx.request(method, url, headers={"Authorization": value}).status_code != 401, (path, value)
        assert httpx.request("POST", server.url + "/health").status_code == 405


def test_the_key_of_the_environment(polite, monkeypatch):
    monkeypatch.setenv("MINICHAT_API_KEY", "from-outside")
    assert serve.check(settings(polite)).api_key == "from-outside"
    assert serve.check(settings(polite, api_key="given")).api_key == "given"


def test_a_preflight_needs_no_key_and_a_foreign_page_gets_nothing(polite):
    preflight = {"Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}
    chat_page = {"Origin": "https://chat.example"}
    with live(polite, api_key="key", cors_origins=("https://chat.example",)) as server:
        url = server.url + CHAT
        answer = httpx.options(url, headers={**preflight, **chat_page})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "access-control-allow-credentials" not in answer.headers
        answer = httpx.post(url, json=HELLO, headers={**chat_page, "Authorization": "Bearer key"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://chat.example"
        answer = httpx.post(url, json=HELLO, headers=chat_page)  # a page must be able to read the error
        assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://chat.example"
        for method in ("OPTIONS", "POST"):
            for origin in ("https://evil.example", "http://chat.example", "null"):
                headers = {**preflight, "Origin": origin, "Authorization": "Bearer key"}
                answer = httpx.request(method, url, headers=headers)
                assert answer.status_code == 403 and error_of(answer)["code"] == "unknown_origin"
                assert "access-control-allow-origin" not in answer.headers


def test_any_origin_is_never_with_credentials(polite):
    with live(polite, cors_origins=("*",)) as server:
        answer = httpx.post(server.url + CHAT, json=HELLO, headers={"Origin": "https://any.example"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


def test_pages_of_other_origins_are_off_by_default(server):
    port = urlsplit(server.url).port
    for origin, status in ((server.url, 200), (f"https://127.0.0.1:{port}", 200), ("http://127.0.0.1:1", 403),
                           (f"http://localhost:{port}", 403), ("https://evil.example", 403), ("null", 403),
                           ("http://[", 403)):
        answer = httpx.post(server.url + CHAT, json=HELLO, headers={"Origin": origin})
        assert answer.status_code == status, origin
        assert not [name for name in answer.headers if name.startswith("access-control")]
    answer = httpx.options(server.url + CHAT, headers={"Origin": "https://evil.example",
                                                       "Access-Control-Request-Method": "POST"})
    assert answer.status_code == 403


def test_unknown_names_of_this_machine_are_refused(polite):
    """DNS rebinding: a stranger's page may reach loopback, under a stranger's name."""
    with live(polite, allowed_hosts=("chat.example",)) as server:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "[::1]", "chat.example:443"):
            assert httpx.get(server.url + "/health", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "localhost.evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
            for path in ("/health", "/", "/v1/models"):
                answer = httpx.get(server.url + path, headers={"Host": host})
                assert answer.status_code == 403 and error_of(answer)["code"] == "unknown_host", host
        with connect(server) as client:  # two names
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
            assert b" 403 " in read_until(client, b"\r\n")


def test_names_of_a_server_that_other_machines_reach():
    assert known_hosts("0.0.0.0", ()) is None
    assert known_hosts("192.168.1.5", ("Chat.example:443",)) == {"chat.example"}
    assert known_hosts("127.0.0.2", ()) == {"localhost", "127.0.0.1", "::1", "127.0.0.2"}
    assert [is_loopback(host) for host in ("localhost", "::1", "127.9.9.9", "0.0.0.0", "::", "", "example.org")] == [
        True, True, True, False, False, False, False]
    assert [host_name(host) for host in ("A.b:1", "[::1]:2", "[::1]", "", ":8")] == ["a.b", "::1", "::1", "", ""]


# -----------------------------------------------------------------------------
# Bodies and errors


def test_a_body_over_the_limit(polite):
    with live(polite, max_body=1) as server:
        for path in (CHAT, "/tokenize"):
            answer = httpx.post(server.url + path, content=b"x" * 1025)
            assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"
            assert answer.headers["connection"] == "close"
            answer = httpx.post(server.url + path, content=iter([b"x" * 100] * 11))  # chunked
            assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"
            assert httpx.post(server.url + path, content=b"x" * 1024).status_code == 400
            assert httpx.post(server.url + path, content=iter([b"x" * 64] * 16)).status_code == 400
        big = httpx.post(server.url + CHAT, content=b"x" * 30_000_000)  # most of it is still to come at the answer
        assert big.status_code == 413
        assert server.worker.steps == 0
        assert metrics_of(server)[f'minichat_requests_total{{route="{CHAT}",status="413"}}'] == 3


def test_a_body_over_the_limit_is_refused_before_it_comes(server):
    with connect(server) as client:
        client.sendall(raw_request(CHAT, b"", Content_Length=10**12))
        assert b'"code": "body_too_large"' in read_until(client, b"}}")


def test_errors_have_openais_form(server, monkeypatch):
    url = server.url
    for answer, status in (
        (httpx.get(url + "/nothing"), 404),
        (httpx.get(url + "/v1/models/other"), 404),
        (httpx.get(url + "/docs"), 404),
        (httpx.get(url + "/v1/models/"), 404),
        (httpx.get(url + CHAT), 405),
        (httpx.post(url + "/health"), 405),
        (httpx.delete(url + "/"), 405),
        (httpx.post(url + CHAT, content=b"{"), 400),
        (httpx.post(url + CHAT, json={**HELLO, "model": "other"}), 404),
        (httpx.post(url + CHAT, json={**HELLO, "tools": [{"type": "function"}]}), 400),
        (httpx.post(url + COMPLETE, json={"prompt": "a" * 200}), 400),
        (httpx.post(url + "/detokenize", json={"tokens": [10**9]}), 400),
    ):
        assert answer.status_code == status, answer.text
        error_of(answer)
        assert answer.headers["x-request-id"]
    assert httpx.get(url + CHAT).headers["allow"] == "POST"

    def fail(*args):
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(serving.app, "prepare", fail)
    answer = httpx.post(url + CHAT, json=HELLO)
    assert answer.status_code == 500 and error_of(answer)["code"] == "internal_error" and "secret" not in answer.text


def test_request_ids(server):
    for path in ("/health", "/nothing", "/v1/models"):
        answer = httpx.get(server.url + path, headers={"X-Request-Id": "mine_1.2-3"})
        assert answer.headers["x-request-id"] == "mine_1.2-3"
        ids = {httpx.get(server.url + path, headers={"X-Request-Id": odd}).headers["x-request-id"]
               for odd in ("two words", "x" * 129, "a;b", "")}
        assert len(ids) == 4 and all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)
    answer = httpx.post(server.url + CHAT, json={**HELLO, "stream": True}, headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine"


def test_the_log_has_no_text(polite, capfd):
    with live(polite, access_log=True) as server:
        httpx.post(server.url + CHAT, json=HELLO, headers={"X-Request-Id": "mine"})
        httpx.get(server.url + "/no%0Aline")
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("cpu (")]
    assert len(lines) == 2 and re.fullmatch(rf"mine POST '{CHAT}' 200 \d+\.\d+ s", lines[0])
    assert "hello" not in err and "Hi" not in err


# -----------------------------------------------------------------------------
# A full queue, and clients that leave


def test_a_full_queue_refuses_at_once(endless):
    with live(endless, max_requests=1, max_queue=1) as server, contextlib.ExitStack() as stack:
        gate = Gate(server)
        clients = [stack.enter_context(connect(server)) for _ in range(2)]
        for number, client in enumerate(clients, 1):
            client.sendall(raw_request(CHAT, {**HELLO, "max_tokens": 5, "stream": True}))
            until(lambda number=number: server.worker.running + server.worker.waiting == number)
        answer = httpx.post(server.url + CHAT, json=HELLO)  # while the engine stands still
        assert answer.status_code == 429 and error_of(answer)["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) >= 1
        assert httpx.get(server.url + "/health").status_code == 200
        gate.open()
        for client in clients:
            assert b"[DONE]" in read_until(client, b"0\r\n\r\n")


def test_a_crowd_is_refused_before_its_texts_are_read(polite, monkeypatch):
    """Requests that are still being tokenised are bounded too."""
    go_on = hold_preparation(monkeypatch)
    with live(polite, max_requests=1, max_queue=1) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(2)]
        for client in clients:
            client.sendall(raw_request(CHAT, HELLO))
        until(lambda: server.service.preparing == 2)
        answer = httpx.post(server.url + CHAT, json=HELLO)
        assert answer.status_code == 429 and error_of(answer)["code"] == "queue_full"
        go_on.set()
        for client in clients:
            assert b"Hi!" in read_until(client, b"Hi!")
        assert server.service.preparing == 0


@pytest.fixture
def cancelled(monkeypatch):
    """Set once a client has left, and the worker was told."""
    event = threading.Event()
    real = serving.app.Worker.cancel

    def cancel(self, job):
        if not job.done:
            event.set()
        real(self, job)

    monkeypatch.setattr(serving.app.Worker, "cancel", cancel)
    return event


@pytest.mark.parametrize("kind", ["streaming", "plain", "plain, reset", "streaming completion"])
def test_a_client_that_leaves_ends_its_work(endless, cancelled, kind):
    """Within one step of the engine its blocks are free, streamed or not."""
    path = COMPLETE if "completion" in kind else CHAT
    body = {**FOREVER, "prompt": "ab", "stream": "streaming" in kind}
    with live(endless) as server:
        client = connect(server)
        client.sendall(raw_request(path, body))
        until(lambda: server.worker.steps > 3)
        gate = Gate(server)
        assert gate.waits.wait(PATIENCE)
        before = server.worker.steps
        assert server.worker.free_blocks < server.worker.total_blocks
        if "reset" in kind:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        assert cancelled.wait(PATIENCE)
        gate.open()  # the step that waits there is the one that may still be taken
        until(lambda: server.worker.running == 0)
        assert server.worker.free_blocks == server.worker.total_blocks
        assert server.worker.steps <= before + 1
        name = 'minichat_aborted_total{reason="cancelled"}'
        until(lambda: metrics_of(server).get(name) == 1)
        status = "200" if "streaming" in kind else "499"
        assert metrics_of(server)[f'minichat_requests_total{{route="{path}",status="{status}"}}'] == 1


def test_a_client_that_leaves_the_queue(endless, cancelled):
    with live(endless, max_requests=1) as server, connect(server) as running:
        running.sendall(raw_request(CHAT, {**FOREVER, "stream": True}))
        until(lambda: server.worker.running == 1)
        queued = connect(server)
        queued.sendall(raw_request(CHAT, FOREVER))
        until(lambda: server.worker.waiting == 1)
        queued.close()
        assert cancelled.wait(PATIENCE)
        until(lambda: server.worker.waiting == 0)
        assert server.worker.running == 1  # the other continues
        metrics = metrics_of(server)
        until(lambda: metrics_of(server).get('minichat_aborted_total{reason="cancelled"}') == 1)
        assert metrics["minichat_generated_tokens_total"] == 0  # it never ran


def test_a_client_that_leaves_before_its_question_ends(server):
    before = server.worker.steps
    for body in (b"{", json.dumps(HELLO).encode()):
        client = connect(server)
        client.sendall(raw_request(CHAT, body, Content_Length=len(body) + 1))
        until(lambda: server.server.server_state.tasks)
        client.close()
        until(lambda: not server.server.server_state.tasks)
    assert server.worker.steps == before and httpx.get(server.url + "/health").status_code == 200


# -----------------------------------------------------------------------------
# Metrics, the page, no files


def test_metrics_are_exact(polite):
    with live(polite) as server:
        bodies = [{**HELLO, "n": 2}, HELLO, {**HELLO, "stream": True, "stream_options": {"include_usage": True}}]
        usages = [httpx.post(server.url + CHAT, json=body).json()["usage"] for body in bodies[:2]]
        usages.append(json.loads(events_of(httpx.post(server.url + CHAT, json=bodies[2]).text)[-2])["usage"])
        metrics = metrics_of(server)  # each was counted before its client saw the end
        httpx.post(server.url + CHAT, content=b"")
        httpx.get(server.url + "/v1/models/x")
        httpx.get(server.url + "/v1/models/y")
        httpx.get(server.url + "/anything")
        after = metrics_of(server)
        assert metrics["minichat_engine_steps_total"] == server.worker.steps
    assert metrics["minichat_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert metrics["minichat_generated_tokens_total"] == sum(usage["completion_tokens"] for usage in usages) == 12
    assert metrics["minichat_cached_tokens_total"] == sum(
        usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert metrics["minichat_time_to_first_token_seconds_count"] == 3
    assert metrics["minichat_queue_seconds_count"] == 3
    assert metrics["minichat_token_gap_seconds_count"] == 8  # of four answers with three tokens each
    assert metrics['minichat_token_gap_seconds_bucket{le="+Inf"}'] == 8
    assert metrics["minichat_running"] == metrics["minichat_waiting"] == 0
    assert metrics["minichat_kv_blocks_free"] == metrics["minichat_kv_blocks_total"] > 0
    requests = {name: value for name, value in after.items() if name.startswith("minichat_requests")}
    assert requests == {
        f'minichat_requests_total{{route="{CHAT}",status="200"}}': 3,
        f'minichat_requests_total{{route="{CHAT}",status="400"}}': 1,
        'minichat_requests_total{route="/v1/models/{name}",status="404"}': 2,
        'minichat_requests_total{route="other",status="404"}': 1,
        'minichat_requests_total{route="/metrics",status="200"}': 1,
    }


class Blocks(HTMLParser):
    """The inline scripts and styles of a page, and whatever a strict policy would not let run."""

    def __init__(self):
        super().__init__()
        self.blocks = {"script": [], "style": []}
        self.refused = []
        self.inside = None

    def handle_starttag(self, tag, attributes):
        self.refused += [name for name, _ in attributes if name == "style" or name.startswith("on")]
        if tag in self.blocks:
            self.inside = tag
            self.blocks[tag].append("")

    def handle_data(self, data):
        if self.inside:
            self.blocks[self.inside][-1] += data

    def handle_endtag(self, tag):
        self.inside = None


def test_the_page_and_its_policy(server):
    answer = httpx.get(server.url + "/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == (ROOT / "serving" / "chat.html").read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["img-src"] == "data:"
    page = Blocks()
    page.feed(answer.text)
    for kind, blocks in page.blocks.items():
        hashes = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        assert policy[f"{kind}-src"].split() == [f"'sha256-{digest}'" for digest in hashes] and hashes
    assert not page.refused, "the policy would block them"


def test_no_file_is_served(server):
    """There is no folder of files at all: only the page, which is in memory."""
    for path in ("/serve.py", "/../serve.py", "/%2e%2e/serve.py", "/..%2fserve.py", "/serving/chat.html", "/chat.html",
                 "//etc/passwd", "/v1/../../etc/passwd", "/static/../serve.py", "/v1/models/../../../etc/passwd",
                 "/v1/models/..%2f..%2fetc%2fpasswd", "/%00", "/\\..\\serve.py"):
        with connect(server) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            head, _, body = read_until(client, b"}}").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 "), (path, head)
        assert json.loads(body)["error"]["message"]


def test_openapi_names_every_route_and_no_other_site(server):
    text = httpx.get(server.url + "/openapi.json").text
    paths = json.loads(text)["paths"]
    hidden = {"/", "/openapi.json"}
    assert set(paths) == {route.path.replace(":path", "") for route in server.service.routes.routes} - hidden
    for operations in paths.values():
        for operation in operations.values():
            assert "422" not in operation["responses"] and "200" in operation["responses"]
    ids = json.loads(text)["components"]["schemas"]["DetokenizeBody"]["properties"]["tokens"]["items"]
    assert ids["maximum"] == server.service.served.vocab_size - 1
    assert "http" not in text.replace("/schemas/HTTP", "")


def test_help_needs_no_server_packages(run_script):
    done = run_script("serve.py", "--help")
    assert done.returncode == 0 and "--api_key" in done.stdout and "MINICHAT_API_KEY" in done.stdout


def test_a_missing_package_is_one_line(polite, tmp_path):
    changed = script(tmp_path, "sys.modules['fastapi'] = None")
    with process(polite, script=changed, wait=False) as running:
        code, err = running.end()
    assert code == 2 and running.out == "" and re.fullmatch(r"error: fastapi is not installed: pip install .*\n", err)

