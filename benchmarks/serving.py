"""
A model behind HTTP: bench.py's `serve`. It starts serve.py at a free port and sends calls of mixed lengths to
/v1/completions, with ids as prompts and answers of a given number of tokens (ignore_eos). Parts, in this order:

    closed    clients that each wait for their answer: tokens a second over HTTP, and of the engine alone on the same
              calls; what many at once gain over one after another
    idle      the first token of single calls, over HTTP and of the engine alone, in turns
    load      calls arrive at random (Poisson) at 70 % of what the server can answer: the first token, the gaps between
              the events of a stream, the queue and the server's memory
    overload  ten times what it can answer: answers as at full load, the others refused at once, and /health
    mixed, aborts, kill: what it must survive (benchmarks/endurance.py)
    peers     the same texts sent to the servers of llama-cpp-python and transformers, on the same weights

The client runs on the same cores as the server, so its own work is part of each figure. Latencies count from the
instant at which a call is due to when its text is there, the connection included. An event may hold several tokens.
"""

import random
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import machine, table
from benchmarks.endurance import aborts, kill, mixed
from benchmarks.servers import RETRIES, Alone, Stand, samples, serving, serving_peer
from benchmarks.traffic import (
    arrivals,
    closed_loop,
    completion_body,
    in_ms,
    open_loop,
    read_answer,
    result_of,
    run,
    watched,
)
from configurator import fail
from training.monitor import cpu_name

LOAD = 0.7  # calls that arrive in a second, over the number that the server can answer in a second
OVERLOAD = 10  # the same, for the part overload
HEALTH_S = 0.05  # between two looks at /health
QUEUE_S = 0.5  # between two looks at the queue


def bench_serve(c):
    """-> the figures of each part; "failed": what must not happen, in words"""
    check(c)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the servers that it started
    folder = c.models[0]
    keys = [f"--device={c.device}", f"--dtype={c.dtype}", f"--max_requests={c.max_requests}"]
    keys += [f"--{word}" for word in c.overrides]  # such as max_queue=8
    tokens = c.max_requests * (max(c.prompt_lengths) + max(c.answer_lengths) + 32)
    with Alone(folder, c.device, c.dtype, c.max_requests, tokens) as alone:
        about = alone.about
        needed = max(c.prompt_lengths) + max(c.answer_lengths)
        if needed > about["context"]:
            fail(f"{folder} has a context of {about['context']}, and the longest prompt takes {needed} with its answer")
        with serving(folder, keys) as server:
            stand = Stand(c, folder, keys, server, alone)
            print(f"{Path(folder).name} ({about['weights'] / 1e6:.1f}M weights, {c.dtype}), {cpu_name()}; prompts of "
                  f"{c.prompt_lengths[0]} to {c.prompt_lengths[1]} tokens, answers of {c.answer_lengths[0]} to "
                  f"{c.answer_lengths[1]}; at most {c.max_requests} at once")
            figures = measure(stand)
            code = server.stop()
    if code:
        stand.failed.append(f"serve.py ended with {code}")
    for line in stand.failed:
        print("failed:", line)
    return {"machine": machine(), "model": Path(folder).name, "weights": about["weights"], **figures,
            "failed": stand.failed}


def check(c):
    """End for settings that make no sense."""
    if not c.models:
        fail("--models=RUN names the model to serve")
    unknown = [part for part in c.parts if part not in PARTS]
    if unknown or not c.parts:
        fail(f"--parts={','.join(unknown)}: it takes {', '.join(PARTS)}")
    for name in ("prompt_lengths", "answer_lengths"):
        if len(c[name]) != 2 or c[name][0] > c[name][1]:
            fail(f"--{name} takes two numbers: the fewest tokens and the most")
    if not c.crowd:
        fail("--crowd=0: a round needs at least one call")
    if not c.clients:
        fail("--clients is empty: it takes numbers of clients, such as 1,16")


def measure(stand):
    """-> {part: its figures}, in the order of PARTS"""
    parts = stand.c.parts
    if "closed" not in parts and set(parts) - {"idle", "kill", "peers"}:
        closed_rounds(stand, [2 * stand.c.max_requests], rounds=1)  # the other parts need the server's capacity
    figures = {}
    for name, part in PARTS.items():
        if name in parts:
            figures[name] = part(stand)
            sys.stdout.flush()  # the next part may take long
    return figures


# -----------------------------------------------------------------------------
# Clients that wait for their answers


def closed(stand):
    """-> a row for each number of clients"""
    c = stand.c
    rows = closed_rounds(stand, c.clients, c.rounds)
    print(f"\nclosed: median of {c.rounds} rounds; gain: over one client")
    table(rows, ["clients", "calls", "http_tok_per_s", "engine_tok_per_s", "http_%", "gain", "latency_ms"])
    return rows


def closed_rounds(stand, client_counts, rounds):
    """Measure in turns, and remember the capacity. -> a row for each number of clients"""
    measured = {clients: [] for clients in client_counts}
    stand.closed(stand.draw("warm-up", stand.c.max_requests), stand.c.max_requests)
    for i in range(rounds):
        for clients in client_counts:
            calls = stand.draw(f"closed {i} {clients}", max(stand.c.crowd, 4 * clients))
            http_s, results = stand.closed(calls, clients)
            stand.check("closed", results)
            engine_s = stand.alone.ask("crowd", [call.task for call in calls], clients)
            tokens = sum(call.answer for call in calls)
            latency_s = statistics.median(result.seconds for result in results)
            measured[clients].append((tokens / http_s, tokens / engine_s, latency_s, len(calls) / http_s))
    rows = []
    for clients, figures in measured.items():
        http, engine, latency_s, calls_per_s = (statistics.median(column) for column in zip(*figures, strict=True))
        rows.append({"clients": clients, "calls": max(stand.c.crowd, 4 * clients), "http_tok_per_s": http,
                     "engine_tok_per_s": engine, "http_%": 100 * http / engine, "gain": None,
                     "latency_ms": 1000 * latency_s, "calls_per_s": calls_per_s})
    for row in rows:
        if 1 in measured:
            row["gain"] = row["http_tok_per_s"] / rows[client_counts.index(1)]["http_tok_per_s"]
    best = max(rows, key=lambda row: row["http_tok_per_s"])
    stand.capacity = {"tok_per_s": best["http_tok_per_s"], "calls_per_s": best["calls_per_s"],
                      "latency_s": best["latency_ms"] / 1000}
    return rows


# -----------------------------------------------------------------------------
# Latencies


def idle(stand):
    """-> the figures of the part"""
    calls = stand.draw("idle", stand.c.crowd)
    results = []
    engine_s = []
    for call in calls:
        results += stand.closed([call], 1)[1]
        engine_s.append(stand.alone.ask("first_token", call.task))
    stand.check("idle", results)
    figures = stream_figures(results)
    figures["engine_first_ms"] = in_ms(engine_s)
    if figures["first_ms"]["p50"] is not None:
        figures["added_ms"] = figures["first_ms"]["p50"] - figures["engine_first_ms"]["p50"]
        print(f"\nidle: {len(calls)} single calls; HTTP adds {figures['added_ms']:.1f} ms to the first token")
    rows = latency_rows(figures, {"engine_first_ms": "first token of the engine alone"})
    table(rows, ["ms", "p50", "p95", "p99", "max"])
    stand.idle = figures
    return figures


def stream_figures(results):
    """Milliseconds to the first text of streams, and between their events; the tokens of an event."""
    streams = [result for result in results if result.instants]
    events = sum(len(result.instants) for result in streams)
    tokens = sum(result.tokens for result in streams)
    return {
        "first_ms": in_ms([result.instants[0] for result in streams]),
        "gap_ms": in_ms([gap for result in streams for gap in result.gaps]),
        "tokens_per_event": tokens / events if events else None,
    }


def latency_rows(figures, names):
    """Rows of a table from figures that in_ms made."""
    names = {"first_ms": "first token", "gap_ms": "gap between events", **names}
    return [{"ms": words, **figures[name]} for name, words in names.items() if name in figures]


def random_arrivals(stand, part, rate, path, interval):
    """Send calls that arrive at random, `rate` a second for `seconds` seconds, and GET `path` every `interval` seconds
    meanwhile. -> (deliveries, the Exchanges of the GETs)"""
    calls = stand.draw(part, max(1, round(rate * stand.c.seconds)))
    instants = arrivals(random.Random(f"{part} arrivals"), rate, len(calls))

    async def traffic():
        async with watched(stand.server.address, path, interval) as looks:
            deliveries = await open_loop(stand.server.address, calls, instants)
        return deliveries, looks

    return run(traffic())


def load(stand):
    """-> the figures of the part"""
    rate = LOAD * stand.capacity["calls_per_s"]
    deliveries, looks = random_arrivals(stand, "load", rate, "/metrics", QUEUE_S)
    results = [result_of(delivery) for delivery in deliveries]
    waiting = [number for number in map(waiting_calls, looks) if number is not None]
    figures = {
        "calls_per_s": rate,
        "calls": len(results),
        "problems": stand.check("load", results),
        "refused": sum(result.status == 429 for result in results),
        **stream_figures(results),
        "lag_ms": in_ms([result.lag for result in results]),
        "waiting_mean": statistics.fmean(waiting) if waiting else None,
        "waiting_max": max(waiting, default=None),
        "memory_mb": stand.server.memory_mb(),
    }
    figures |= ratios(figures, stand.idle)
    print(f"\nload: {len(results)} calls at {rate:.1f} a second, {100 * LOAD:.0f} % of the most; "
          f"{figures['refused']} refused")
    table(latency_rows(figures, {"lag_ms": "calls sent too late by the client"}), ["ms", "p50", "p95", "p99", "max"])
    columns = ["first_p95_to_idle", "gap_p99_to_median", "gap_p99_to_idle", "tokens_per_event", "waiting_mean",
               "waiting_max", "memory_mb"]
    table([figures], columns)
    return figures


def ratios(figures, idle_figures):
    """How much longer clients wait than at an idle server, and how uneven a stream is."""

    def ratio(value, base):
        return value / base if value and base else None

    first, gap = figures["first_ms"], figures["gap_ms"]
    alone = idle_figures or {"first_ms": {"p50": None}, "gap_ms": {"p50": None}}
    return {
        "first_p95_to_idle": ratio(first["p95"], alone["first_ms"]["p50"]),
        "gap_p99_to_median": ratio(gap["p99"], gap["p50"]),
        "gap_p99_to_idle": ratio(gap["p99"], alone["gap_ms"]["p50"]),
    }


def waiting_calls(look):
    """How many calls wait, by an Exchange of GET /metrics; None if it brought nothing."""
    return samples(read_answer(look.pieces)).get("minichat_waiting")


def overload(stand):
    """-> the figures of the part"""
    rate = OVERLOAD * stand.capacity["calls_per_s"]
    deliveries, looks = random_arrivals(stand, "overload", rate, "/health", HEALTH_S)
    results = [result_of(delivery) for delivery in deliveries]
    problems = stand.check("overload", results)
    answered = [result for result in results if result.status == 200 and not result.lost]
    refused = [result for result in results if result.status == 429]
    began = min(delivery.due for delivery in deliveries)
    ended = max(delivery.exchanges[-1].ended for delivery in deliveries)
    tok_per_s = sum(result.tokens for result in answered) / (ended - began)
    looks = [look for look in looks if look.ended]  # the last one was not waited for
    sick = sum(read_answer(look.pieces).status != 200 for look in looks)
    if sick:
        stand.failed.append(f"overload: {sick} of {len(looks)} looks at /health found no 200")
    figures = {
        "calls_per_s": rate, "calls": len(results), "problems": problems, "answered": len(answered),
        "refused": len(refused), "tok_per_s": tok_per_s, "of_full_%": 100 * tok_per_s / stand.capacity["tok_per_s"],
        "refused_ms": in_ms([result.seconds - result.lag for result in refused]),
        "health_ms": in_ms([look.ended - look.began for look in looks]),
        "lag_ms": in_ms([result.lag for result in results]),
        "memory_mb": stand.server.memory_mb(),
    }
    print(f"\noverload: {len(results)} calls at {rate:.1f} a second, {OVERLOAD} times the most")
    table([figures], ["answered", "refused", "tok_per_s", "of_full_%", "memory_mb"])
    names = {"refused_ms": "refusal (429)", "health_ms": "/health", "lag_ms": "calls sent too late by the client"}
    table(latency_rows(figures, names), ["ms", "p50", "p95", "p99", "max"])
    return figures


# -----------------------------------------------------------------------------
# Servers of others

# name: (setting with its Python, what it reads, its command, more fields of a call)
PEERS = {
    "llama-cpp-python": (
        "peer_llama", "model.gguf",
        ["-m", "llama_cpp.server", "--model", "{model}", "--port", "{port}", "--n_ctx", "{context}",
         "--n_threads", "{threads}", "--n_threads_batch", "{threads}", "--interrupt_requests", "false"],
        {"repeat_penalty": 1.0},
    ),
    "transformers": (
        "peer_transformers", "model",
        ["-m", "transformers.cli.transformers", "serve", "{model}", "--port", "{port}", "--dtype", "{dtype}",
         "--device", "cpu"],
        {"model": "{model}"},
    ),
    "transformers, batching": (
        "peer_transformers", "model",
        ["-m", "transformers.cli.transformers", "serve", "{model}", "--port", "{port}", "--dtype", "{dtype}",
         "--device", "cpu", "--continuous-batching"],
        {"model": "{model}"},
    ),
}


def peers(stand):
    """-> a row for each server and number of clients; a server that cannot be measured has the reason"""
    rows = peer_rows(stand, "minichat", stand.server, {})
    for name in PEERS:
        try:
            rows += one_peer(stand, name)
        except RuntimeError as error:
            rows.append({"server": name, "clients": None, "tok_per_s": None, "latency_p50_ms": None,
                         "latency_p95_ms": None, "failed": None, "why": str(error)})
    print("\npeers: texts as prompts, greedy, not streamed; the tokens that each server counts")
    table(rows, ["server", "clients", "tok_per_s", "latency_p50_ms", "latency_p95_ms", "failed"])
    for row in rows:
        if row["why"]:
            print(f"{row['server']}: {row['why']}")
    return rows


def one_peer(stand, name):
    """-> the rows of a peer. Raises RuntimeError saying why it cannot be measured."""
    key, file, command, fields = PEERS[name]
    python = stand.c[key]
    if not python:
        raise RuntimeError(f"--{key}=PYTHON names the Python that has it")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / file)
        reason = stand.alone.ask("export", stand.folder, path, stand.c.dtype)
        if reason:
            raise RuntimeError(reason)
        values = {"{model}": path, "{dtype}": stand.c.dtype, "{context}": str(stand.alone.about["context"]),
                  "{threads}": str(torch.get_num_threads())}
        command = [python, *(values.get(word, word) for word in command)]
        fields = {field: values.get(value, value) for field, value in fields.items()}
        try:
            with serving_peer(command, f"{folder}/log") as server:
                return peer_rows(stand, name, server, fields)
        except RuntimeError as error:  # paths of this machine are nobody else's business
            raise RuntimeError(str(error).replace(python, "python").replace(folder, "")) from None


def peer_rows(stand, name, server, fields):
    """A row for each number of clients, with the calls of the same seeds for every server."""

    def draw(seed, count):
        calls = stand.draw(seed, count, streamed=0.0)
        for call, text in zip(calls, stand.alone.ask("decode", [call.task for call in calls]), strict=True):
            call.body = completion_body(call, prompt=text, temperature=0.0, ignore_eos=None, **fields)
        return calls

    rows = []
    run(closed_loop(server.address, draw("peers warm-up", 2), 1))
    for clients in stand.c.clients:
        calls = draw(f"peers {clients}", max(stand.c.crowd, clients))
        deliveries = run(closed_loop(server.address, calls, clients, RETRIES))
        results = [result_of(delivery) for delivery in deliveries]
        good = [result for result in results if result.status == 200 and not result.lost]
        began = min(delivery.due for delivery in deliveries)
        ended = max(delivery.exchanges[-1].ended for delivery in deliveries)
        latencies = in_ms([result.seconds for result in good])
        rows.append({"server": name, "clients": clients,
                     "tok_per_s": sum(result.tokens for result in good) / (ended - began),
                     "latency_p50_ms": latencies["p50"], "latency_p95_ms": latencies["p95"],
                     "failed": len(results) - len(good), "why": ""})
    return rows


PARTS = {"closed": closed, "idle": idle, "load": load, "overload": overload, "mixed": mixed, "aborts": aborts,
         "kill": kill, "peers": peers}
