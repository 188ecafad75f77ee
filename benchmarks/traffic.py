"""
Traffic for a server that speaks OpenAI's completions: requests drawn by a seed, a light client, and what came back.

    calls = draw_calls(random.Random(1), 100, mix)
    deliveries = run(closed_loop(address, calls, clients=16))    # each client sends its next call after its last answer
    deliveries = run(open_loop(address, calls, arrivals(rng, 20.0, len(calls))))    # each at its time, come what may
    results = [result_of(delivery) for delivery in deliveries]

An open loop shows what a crowd of strangers sees: they do not wait for each other, so a slow server gets longer queues
and not fewer requests. There a latency counts from the instant at which the call was due.

The client shares its cores with the server. While it runs it only keeps the bytes and the time of each piece: all
parsing is done afterwards. Each request has a connection of its own, which the server closes behind its answer.
"""

import asyncio
import contextlib
import json
import math
import time
from dataclasses import dataclass, field

PATIENCE = 600.0  # seconds after which an answer that has no end counts as lost

# -----------------------------------------------------------------------------
# Calls


@dataclass(frozen=True)
class Mix:
    """How calls are drawn. Lengths are (fewest, most) tokens, shares are of all calls."""

    ids: tuple  # token ids that may stand in a prompt
    context: int  # tokens of the model's context
    prompts: tuple
    answers: tuple
    streamed: float = 1.0
    aborted: float = 0.0
    invalid: float = 0.0
    leave_s: float = 1.0  # a client that leaves does so within this time


@dataclass(eq=False)
class Call:
    """One request. `status`: the one that its answer must have."""

    ids: list
    answer: int  # tokens
    temperature: float
    seed: int
    stream: bool
    leave: float | None = None  # seconds after which the client closes the connection
    status: int = 200
    method: str = "POST"
    path: str = "/v1/completions"
    body: bytes = b""

    @property
    def task(self):
        """What the engine must know to give the same answer."""
        return self.ids, self.answer, self.temperature, self.seed


def draw_calls(rng, count, mix):
    """`count` calls: half of them greedy, the others with a seed. rng: a random.Random. -> list of Call"""
    calls = []
    for _ in range(count):
        ids = rng.choices(mix.ids, k=rng.randint(*mix.prompts))
        temperature = rng.choice((0.0, 1.0))
        call = Call(ids, rng.randint(*mix.answers), temperature, rng.randrange(2**31), rng.random() < mix.streamed)
        fate = rng.random()
        if fate < mix.aborted:
            call.leave = rng.uniform(0, mix.leave_s)
        call.body = completion_body(call)
        if mix.aborted <= fate < mix.aborted + mix.invalid:
            spoil(rng, call, mix)
        calls.append(call)
    return calls


def completion_body(call, **changes):
    """The JSON of a call, bytes. A change to None removes a field."""
    fields = {"prompt": call.ids, "max_tokens": call.answer, "temperature": call.temperature, "seed": call.seed,
              "ignore_eos": True, "stream": call.stream}
    if call.stream:
        fields["stream_options"] = {"include_usage": True}
    fields |= changes
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


def spoil(rng, call, mix):
    """Make a call invalid, in one of several ways."""
    changes = [
        (400, {"body": completion_body(call)[:-1]}),  # JSON without its end
        (400, {"body": completion_body(call, prompt=None)}),
        (400, {"body": completion_body(call, max_tokens=-1)}),
        (400, {"body": completion_body(call, temperature="warm")}),
        (400, {"body": completion_body(call, prompt=call.ids[:1] * (mix.context + 1))}),
        (404, {"body": completion_body(call, model="no such model")}),
        (404, {"path": "/v1/nothing"}),
        (405, {"method": "GET", "body": b""}),
    ]
    call.status, spoiled = rng.choice(changes)
    for name, value in spoiled.items():
        setattr(call, name, value)


def arrivals(rng, rate, count):
    """`count` instants of a Poisson process of `rate` per second, in seconds from its start."""
    instants = []
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        instants.append(now)
    return instants


# -----------------------------------------------------------------------------
# The client


def request_bytes(address, method, path, body=b""):
    """An HTTP/1.1 request that asks the server to close the connection behind its answer."""
    host, port = address
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class Exchange(asyncio.Protocol):
    """A request on a connection of its own, and the pieces of bytes that come back, each with its time."""

    def __init__(self, request):
        self.request = request
        self.began = time.perf_counter()
        self.ended = None
        self.pieces = []  # (time, bytes)
        self.left = False  # the client closed the connection
        self.failure = ""
        self.transport = None
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data):
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error):
        self.end(str(error or ""))

    def leave(self):
        self.left = True
        self.transport.close()

    def give_up(self):
        self.failure = f"no end within {PATIENCE:.0f} s"
        self.transport.abort()

    def end(self, failure):
        self.ended = time.perf_counter()
        self.failure = self.failure or failure
        if not self.over.done():
            self.over.set_result(None)


async def exchange(address, request, leave=None):
    """Send the bytes of a request and wait for the end. leave: seconds after which the client leaves. -> Exchange"""
    loop = asyncio.get_running_loop()
    one = Exchange(request)
    try:
        await loop.create_connection(lambda: one, *address)
    except OSError as error:
        one.end(str(error))
        return one
    timer = loop.call_later(PATIENCE, one.give_up) if leave is None else loop.call_later(leave, one.leave)
    await one.over
    timer.cancel()
    return one


@dataclass
class Delivery:
    """A call, when it was due, and its exchanges: more than one if the server was busy and it was sent again."""

    call: Call
    due: float
    exchanges: list = field(default_factory=list)


async def deliver(address, call, due=None, retries=0):
    """Send a call, and again after status 429, when the server says, up to `retries` times. -> Delivery"""
    request = request_bytes(address, call.method, call.path, call.body)
    delivery = Delivery(call, time.perf_counter() if due is None else due)
    while True:
        one = await exchange(address, request, call.leave)
        delivery.exchanges.append(one)
        busy = bool(one.pieces) and one.pieces[0][1].startswith(b"HTTP/1.1 429")
        if not busy or len(delivery.exchanges) > retries:
            return delivery
        await asyncio.sleep(float(read_answer(one.pieces).headers.get("retry-after", 1)))


async def closed_loop(address, calls, clients, retries=0):
    """Send the calls from so many clients, of which each waits for its answer. -> deliveries, in the order of calls"""
    deliveries = [None] * len(calls)
    numbered = iter(enumerate(calls))

    async def client():
        for i, call in numbered:
            deliveries[i] = await deliver(address, call, retries=retries)

    await asyncio.gather(*(client() for _ in range(clients)))
    return deliveries


async def open_loop(address, calls, instants, retries=0):
    """Send each call at its instant, seconds from now. -> deliveries, in the order of calls"""
    start = time.perf_counter()
    tasks = []
    for call, instant in zip(calls, instants, strict=True):
        due = start + instant
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(deliver(address, call, due, retries)))
    return await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def watched(address, path, every):
    """GET `path` every so many seconds while the body of the `with` runs. -> the list that collects the Exchanges"""
    exchanges = []

    async def watch():
        while True:
            exchanges.append(await exchange(address, request_bytes(address, "GET", path)))
            await asyncio.sleep(every)

    task = asyncio.create_task(watch())
    try:
        yield exchanges
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def run(coroutine):
    """Run a coroutine on a new event loop, of uvloop where it is installed: the client takes less of the cores."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = asyncio.new_event_loop
    with contextlib.closing(new_event_loop()) as loop:
        return loop.run_until_complete(coroutine)


# -----------------------------------------------------------------------------
# What came back


@dataclass
class Answer:
    """An HTTP answer. body: (time, bytes) of its pieces, without the framing of chunks."""

    status: int = 0  # 0: no whole head came
    headers: dict = field(default_factory=dict)
    body: list = field(default_factory=list)
    complete: bool = False

    @property
    def content(self):
        return b"".join(data for _, data in self.body)


def read_answer(pieces):
    """The pieces of an exchange -> Answer. What is cut off or is no HTTP is not complete."""
    answer = Answer()
    head = b""
    rest = []
    for i, (instant, data) in enumerate(pieces):
        head += data
        if b"\r\n\r\n" in head:
            head, _, begun = head.partition(b"\r\n\r\n")
            rest = [(instant, begun), *pieces[i + 1 :]]
            break
    else:
        return answer
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, status = first.partition(" ")
    if not version.startswith("HTTP/1.") or not status[:3].isdigit():
        return answer
    answer.status = int(status[:3])
    for line in lines:
        name, _, value = line.partition(":")
        answer.headers[name.strip().lower()] = value.strip()
    if answer.headers.get("transfer-encoding", "").lower() == "chunked":
        answer.body, answer.complete = unchunk(rest)
    else:
        answer.body = [piece for piece in rest if piece[1]]
        length = answer.headers.get("content-length", "")
        answer.complete = length.isdigit() and int(length) == len(answer.content)
    return answer


def unchunk(pieces):
    """The pieces of a chunked body -> ((time, bytes) of each whole chunk, whether the last chunk came). The time is
    that of the piece with which the chunk was whole."""
    chunks = []
    held = b""
    for instant, data in pieces:
        held += data
        while b"\r\n" in held:
            line, _, rest = held.partition(b"\r\n")
            try:
                size = int(line.partition(b";")[0], 16)
            except ValueError:
                return chunks, False
            if len(rest) < size + 2:
                break
            if size == 0:
                return chunks, True
            if rest[size : size + 2] != b"\r\n":
                return chunks, False
            chunks.append((instant, rest[:size]))
            held = rest[size + 2 :]
    return chunks, False


def read_events(body):
    """(time, bytes) of a text/event-stream -> [(time, data of the event as str), ...]. The time is that of its end."""
    events = []
    held = b""
    for instant, data in body:
        held += data
        *whole, held = held.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                events.append((instant, b"\n".join(lines).decode("utf-8", "replace")))
    return events


@dataclass
class Result:
    """What became of a call. Times are in seconds from the instant at which it was due."""

    call: Call
    statuses: list  # of all its exchanges; 0: no answer
    status: int  # the last of them
    seconds: float  # until the end
    lag: float  # until it was sent
    left: bool = False  # the client left before the end
    lost: str = ""  # why there is no whole answer, although the client stayed
    text: str = ""
    tokens: int = 0  # as the server counts them
    finish: str = ""
    instants: list = field(default_factory=list)  # of the events with text

    @property
    def gaps(self):
        return [b - a for a, b in zip(self.instants, self.instants[1:], strict=False)]


def result_of(delivery):
    """-> Result of a Delivery"""
    answers = [read_answer(one.pieces) for one in delivery.exchanges]
    last = delivery.exchanges[-1]
    answer = answers[-1]
    result = Result(delivery.call, [each.status for each in answers], answer.status, last.ended - delivery.due,
                    delivery.exchanges[0].began - delivery.due)
    if not answer.complete:
        result.left = last.left
        if not last.left:
            result.lost = last.failure or ("the answer is cut off" if answer.status else "no answer")
        return result
    try:
        read_completion(result, answer, delivery)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        result.lost = f"the answer of status {answer.status} cannot be read: {error!r:.200}"
    return result


def read_completion(result, answer, delivery):
    """Fill in what a whole answer says. Raises ValueError and the like for one that has not OpenAI's form."""
    is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
    if answer.status != 200:
        assert_error(json.loads(answer.content))
        return
    if is_stream != delivery.call.stream:
        raise ValueError(f"content-type {answer.headers.get('content-type')}")
    if not is_stream:
        whole = json.loads(answer.content)
        take_chunk(result, whole)
        return
    events = read_events(answer.body)
    if not events or events[-1][1] != "[DONE]":
        result.lost = "the stream ends without [DONE]"
        if events and "error" in json.loads(events[-1][1]):
            result.lost = f"the stream ends with {events[-1][1]:.200}"
        return
    for instant, data in events[:-1]:
        if take_chunk(result, json.loads(data)):
            result.instants.append(instant - delivery.due)


def assert_error(body):
    if not isinstance(body["error"]["message"], str):
        raise ValueError("an error without a message")


def take_chunk(result, chunk):
    """Add a whole answer, or a piece of one, to a result. -> its text"""
    text = ""
    for choice in chunk["choices"]:
        text += choice["text"]
        result.finish = choice.get("finish_reason") or result.finish
    result.text += text
    usage = chunk.get("usage")
    if usage:
        result.tokens = usage["completion_tokens"]
    return text


# -----------------------------------------------------------------------------
# Figures


def percentile(values, share):
    """The smallest of `values` that at least this share of them does not exceed; None of no values."""
    if not values:
        return None
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def in_ms(values):
    """Seconds -> {"p50", "p95", "p99", "max"} in ms; None where there are no values."""
    figures = {f"p{share}": percentile(values, share / 100) for share in (50, 95, 99, 100)}
    figures["max"] = figures.pop("p100")
    return {name: None if value is None else 1000 * value for name, value in figures.items()}
