"""
The routes: from HTTP to the engine's thread and back.

    service = Service(c, load, page)      # c: settings of serve.py; load() -> (Engine, Served); page: chat.html, bytes
    service.app                           # an ASGI app, behind all layers of serving/guards.py

A request's body is parsed and tokenised in a thread of `pool`, so that the event loop stays free. Then its job is
submitted to the worker (serving/worker.py). Streamed or not, the answer waits for two things at once: for news of the
job, and for the client to leave, which cancels the job. Nothing of a conversation is logged.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving import api
from serving.api import DONE, APIError, event
from serving.documents import openapi, page_headers, takes
from serving.guards import GONE, TooLarge, error_headers, guarded
from serving.metrics import CONTENT_TYPE, Metrics
from serving.worker import Full, Progress, Unavailable, Worker

PARSERS = 2  # threads that parse and tokenise
NOTHING = Progress(0, 0, "")  # of a request that has not begun
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                  (b"x-accel-buffering", b"no")]  # the last: nginx must not hold the events back
# why the server ended a job -> the error that its client gets
ENDINGS = {
    "timeout": ("the request took longer than this server allows", 503, {"x-should-retry": "false"}),
    "shutdown": ("the server is shutting down", 503, {}),
    "engine": ("the engine failed, and the server ends", 500, {}),
}


class LoadRefused(Exception):
    """The model cannot be loaded, and the reason is on stderr."""


class Service:
    """One model behind HTTP."""

    def __init__(self, c, load, page):
        self.c = c
        self.load = load
        self.page = page
        self.page_headers = page_headers(page)
        self.served = None  # once it is loaded
        self.preparing = 0  # requests between their arrival and the worker
        self.pool = ThreadPoolExecutor(PARSERS, thread_name_prefix="parser")
        self.worker = Worker(self.load_engine, max_queue=c.max_queue, timeout=c.timeout)
        self.metrics = Metrics(self.worker)
        self.routes = make_routes(self)
        self.app = guarded(self.routes, c, self.count)

    def load_engine(self):
        """The worker's thread calls this. -> Engine"""
        try:
            engine, self.served = self.load()
        except SystemExit:  # configurator.fail, which would only end this thread
            raise LoadRefused from None
        return engine

    def count(self, path, status):
        self.metrics.count_request(route_label(path), status)

    # -------------------------------------------------------------------------
    # What a request finds

    def loaded(self):
        """-> Served. Raises APIError while there is none."""
        if self.served is None:
            raise self.unavailable()
        return self.served

    def unavailable(self, message=""):
        """The APIError of a server that cannot generate now."""
        messages = {"loading": "the model is still being loaded", "draining": "the server is shutting down",
                    "ready": "the server cannot take it now"}
        state = self.worker.state
        message = message or messages.get(state, "the engine failed")
        return APIError(message, 503, code=state, headers={"retry-after": "1"})

    async def in_thread(self, function, *args):
        return await asyncio.get_running_loop().run_in_executor(self.pool, partial(function, *args))

    async def prepare(self, raw, body_type, plan):
        """The bytes of a body -> (Answer, engine requests). Raises APIError.

        A crowd is refused before it costs time: when the queue is full, and when as many requests are being prepared as
        could run and wait."""
        self.refuse_if_full(1)
        if self.preparing >= self.c.max_requests + self.c.max_queue:
            raise too_many(1)
        self.preparing += 1
        try:
            return await self.in_thread(prepare, self.worker.engine, self.served, raw, body_type, plan)
        finally:
            self.preparing -= 1

    def submit(self, requests):
        """-> Job. Raises APIError."""
        self.refuse_if_full(len(requests))
        return self.worker.submit(requests)

    def refuse_if_full(self, count):
        """Raise APIError if the worker would not take so many requests now."""
        try:
            self.worker.check_room(count)
        except Full as full:
            raise too_many(full.retry_after) from None
        except Unavailable as error:
            raise self.unavailable(str(error)) from None

    def health(self):
        """-> (status, body)"""
        worker = self.worker
        body = {"status": "ok" if worker.state == "ready" else worker.state, "running": worker.running,
                "waiting": worker.waiting, "kv_blocks_free": worker.free_blocks,
                "kv_blocks_total": worker.total_blocks}
        if worker.state == "ready":
            return 200, body
        return 503, body | self.unavailable().body()


def prepare(engine, served, raw, body_type, plan):
    """Service.prepare in a thread of the pool."""
    answer = plan(served, api.parse(raw, body_type))
    requests = []
    for ids, sampling in answer.prompts:
        try:
            requests.append(engine.prepare(ids, sampling))
        except ValueError as error:
            raise APIError(str(error)) from None
    return answer, requests


def too_many(seconds):
    return APIError("the server is busy: all places and the queue are full", 429, code="queue_full",
                    headers={"retry-after": str(seconds)})


# -----------------------------------------------------------------------------
# An answer


class Generation(Response):
    """The response of an answer: it submits the requests, and ends their job if the client leaves."""

    def __init__(self, service, answer, requests):
        super().__init__()
        self.service = service
        self.answer = answer
        self.requests = requests
        self.job = None
        self.counted = False

    async def __call__(self, scope, receive, send):
        worker = self.service.worker
        self.job = self.service.submit(self.requests)
        leaving = asyncio.create_task(self.cancel_when_gone(receive))
        try:
            if self.answer.stream:
                await self.send_stream(send)
            else:
                await self.send_whole(send)
        finally:
            leaving.cancel()
            worker.cancel(self.job)
            while not self.job.done:
                await self.job.news()
            self.count()

    async def cancel_when_gone(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass
        self.service.worker.cancel(self.job)

    def count(self):
        """Count the job, which has ended, before its client sees the end: the metrics are exact from then on."""
        if not self.counted:
            self.counted = True
            self.service.metrics.count_job(self.job, self.answer.usage(self.requests))

    async def send_whole(self, send):
        while not self.job.done:
            await self.job.news()
        self.count()
        if self.job.error == "cancelled":
            return
        if self.job.error:
            raise ending(self.job)
        if self.answer.top is None:
            body = json_bytes(self.answer.whole(self.requests))
        else:  # with log-probabilities it may be long
            body = await self.service.in_thread(lambda: json_bytes(self.answer.whole(self.requests)))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def send_stream(self, send):
        """Send what is new whenever the job has news, in one piece."""
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        chunks = self.answer.first(self.requests)
        seen = [NOTHING] * len(self.requests)
        while True:
            done = self.job.done  # first: what is new before it is sent below
            chunks += self.new_chunks(seen)
            if done:
                break
            if chunks:
                await send({"type": "http.response.body", "body": b"".join(map(event, chunks)), "more_body": True})
                chunks = []
            await self.job.news()
        self.count()
        if self.job.error == "cancelled":
            return
        tail = b"".join(map(event, chunks)) + self.tail()
        await send({"type": "http.response.body", "body": tail, "more_body": False})

    def new_chunks(self, seen):
        """The chunks of what is new since `seen`, a Progress of each request, which becomes the present one."""
        chunks = []
        for index, request in enumerate(self.requests):
            now = self.job.progress(index)
            if now == seen[index]:
                continue
            piece = self.answer.piece(index, request, seen[index], now)
            if piece is not None:
                chunks.append(piece)
            if now.finish and not seen[index].finish and now.finish != "cancelled":
                chunks.append(self.answer.end(index, request))
            seen[index] = now
        return chunks

    def tail(self):
        """The last events of a stream."""
        if self.job.error:
            return event(ending(self.job).body())
        usage = self.answer.usage_chunk(self.requests)
        return DONE if usage is None else event(usage) + DONE


def ending(job):
    """The APIError of a job that the server ended."""
    message, status, headers = ENDINGS[job.error]
    return APIError(message, status, code=job.error, headers=headers)


def json_bytes(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_response(value, status=200):
    return Response(json_bytes(value), status, media_type="application/json")


# -----------------------------------------------------------------------------
# The routes


def make_routes(service):
    """-> FastAPI, without the guards"""

    @asynccontextmanager
    async def lifespan(app):
        service.worker.start(asyncio.get_running_loop())
        yield
        service.pool.shutdown(wait=False, cancel_futures=True)

    # pages of documentation would load scripts from elsewhere; a redirect would repeat the client's Host header
    app = FastAPI(title="minichat", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.openapi = partial(openapi, app, service)
    add_error_handlers(app)
    add_information(app, service)

    @app.post("/v1/completions", openapi_extra=takes("CompletionBody"))
    async def completions(request: Request):
        """Text that follows a prompt."""
        prepared = await service.prepare(await request.body(), api.CompletionBody, api.plan_completion)
        return Generation(service, *prepared)

    @app.post("/v1/chat/completions", openapi_extra=takes("ChatBody"))
    async def chat(request: Request):
        """The next message of a conversation."""
        prepared = await service.prepare(await request.body(), api.ChatBody, api.plan_chat)
        return Generation(service, *prepared)

    @app.post("/tokenize", openapi_extra=takes("TokenizeBody"))
    async def tokenize(request: Request):
        """A text as token ids."""
        return await with_body(request, api.TokenizeBody, api.tokenize)

    @app.post("/detokenize", openapi_extra=takes("DetokenizeBody"))
    async def detokenize(request: Request):
        """Token ids as a text."""
        return await with_body(request, api.DetokenizeBody, api.detokenize)

    async def with_body(request, body_type, function):
        raw = await request.body()
        served = service.loaded()
        value = await service.in_thread(lambda: function(served, api.parse(raw, body_type)))
        return json_response(value)

    return app


def add_information(app, service):
    """The routes that generate nothing."""

    @app.get("/", include_in_schema=False)
    async def page():
        return Response(service.page, headers=service.page_headers)

    @app.get("/v1/models")
    async def models():
        """The model that is served, in a list."""
        return json_response(api.models(service.loaded()))

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        """The model that is served."""
        served = service.loaded()
        if not name:
            raise HTTPException(404)
        return json_response(api.model(served, name))

    @app.get("/tokenizer_info")
    async def tokenizer_info():
        """Special tokens and the chat template."""
        return json_response(api.tokenizer_info(service.loaded()))

    @app.get("/health")
    async def health():
        """Whether the server can answer. It needs no API key."""
        status, body = service.health()
        return json_response(body, status)

    @app.get("/metrics")
    async def metrics():
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def route_label(path):
    """The route of a path, as the metrics name it: no client can make more of them."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{name}"
    return path if path in ROUTES else "other"


ROUTES = {"/", "/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/tokenizer_info",
          "/health", "/metrics", "/openapi.json"}


def add_error_handlers(app):
    """Whatever goes wrong, the client gets OpenAI's form of it."""

    def answer_error(error):
        body = json_bytes(error.body())
        response = Response(body, error.status)
        response.raw_headers = error_headers(error, body)
        return response

    @app.exception_handler(APIError)
    async def own(request, error):
        return answer_error(error)

    @app.exception_handler(HTTPException)
    async def starlettes(request, error):
        names = {404: f"there is nothing at {request.url.path[:100]}",
                 405: f"{request.method[:20]} is not possible here"}
        message = names.get(error.status_code, str(error.detail))
        return answer_error(APIError(message, error.status_code, headers=error.headers))

    @app.exception_handler(Exception)
    async def others(request, error):  # its traceback is printed by uvicorn
        return answer_error(APIError("the server made a mistake", 500, code="internal_error"))

    @app.exception_handler(ClientDisconnect)
    async def gone(request, error):
        return Response(status_code=GONE)  # nobody reads it

    @app.exception_handler(TooLarge)
    async def too_large(request, error):
        return None  # guards.Body answers
