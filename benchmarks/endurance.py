"""
What a server must survive: parts `mixed`, `aborts` and `kill` of bench.py's `serve`.

`mixed`: calls of all kinds at the rate that the server can just bear, a quarter of them streamed, a tenth left by their
clients at a random moment, a twentieth invalid; calls that are refused with 429 are sent again. None may be lost, each
whole text must be the engine's own, /metrics must count what the clients count, and in the end all blocks are free.

`aborts`: clients that all leave at a random moment. In the end all blocks are free.

`kill`: kill -9 while answers are streamed. Each client sees that its answer has no end, no file of the model changes,
and a new server gives the engine's answer.
"""

import asyncio
import random
from collections import Counter
from pathlib import Path

from benchmarks.common import table
from benchmarks.servers import RETRIES, answers_by_status, problem_of, samples, serving, wait_until_idle
from benchmarks.traffic import (
    arrivals,
    closed_loop,
    completion_body,
    deliver,
    exchange,
    open_loop,
    read_answer,
    request_bytes,
    result_of,
    run,
)
from files import file_sha256

STREAMED, ABORTED, INVALID = 0.25, 0.1, 0.05  # shares of the mixed calls
LONG = 1000  # tokens of an answer that is cut by the kill
HIDDEN = (200, 429, 499)  # statuses that the server may count for a client that left

# -----------------------------------------------------------------------------
# Calls of all kinds


def mixed(stand):
    """-> the figures of the part"""
    c = stand.c
    calls = stand.draw("mixed", c.requests, streamed=STREAMED, aborted=ABORTED, invalid=INVALID,
                       leave_s=2 * stand.capacity["latency_s"])
    instants = arrivals(random.Random("mixed arrivals"), stand.capacity["calls_per_s"], len(calls))
    before = wait_until_idle(stand.server)
    memory_before = stand.server.memory_mb()
    results = [result_of(delivery) for delivery in run(open_loop(stand.server.address, calls, instants, RETRIES))]
    after = wait_until_idle(stand.server)
    memory_after = stand.server.memory_mb()

    problems = stand.check("mixed", results)
    free, total = stand.check_blocks("mixed", after)
    differences = compare_counts(results, before, after)
    stand.failed += [f"mixed: {difference}" for difference in differences]
    figures = {
        "calls": len(calls),
        "seconds": max(result.seconds + instant for result, instant in zip(results, instants, strict=True)),
        "statuses": dict(Counter(result.status for result in results if not result.left)),
        "left": sum(result.left for result in results),
        "lost": sum(bool(result.lost) for result in results),
        "sent_again": sum(len(result.statuses) - 1 for result in results),
        "problems": problems,
        **check_texts(stand, results),
        "metrics_differ": differences,
        "blocks_free": free,
        "blocks_total": total,
        "memory_mb": memory_after,
        "memory_growth_mb": None if memory_before is None else memory_after - memory_before,
    }
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(figures["statuses"].items()))
    print(f"\nmixed: {len(calls):,} calls, {statuses}; {figures['left']} left by their clients")
    columns = ["seconds", "lost", "sent_again", "texts", "wrong_texts", "near_ties", "blocks_free", "blocks_total",
               "memory_mb", "memory_growth_mb"]
    table([figures], columns)
    return figures


def check_texts(stand, results):
    """Compare the texts of whole answers with the engine's own. -> how many there are, how many differ, and how many of
    these are near ties: rounding depends on the requests that share a step, and may decide between two tokens"""
    whole = [result for result in results if result.status == 200 and not result.lost and not result.left]
    texts = stand.alone.ask("texts", [result.call.task for result in whole])
    differ = []
    for result, text in zip(whole, texts, strict=True):
        if result.text != text:
            tie = stand.alone.ask("near_tie", result.call.task, result.text)
            differ.append({"prompt": len(result.call.ids), "temperature": result.call.temperature, "near_tie": tie,
                           "differs_at": first_difference(result.text, text), "characters": len(text)})
    wrong = sum(not each["near_tie"] for each in differ)
    if wrong:
        stand.failed.append(f"mixed: {wrong} texts are not the engine's own")
    return {"texts": len(whole), "wrong_texts": wrong, "near_ties": len(differ) - wrong, "differ": differ[:100]}


def first_difference(a, b):
    """Index of the first character at which two texts differ."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))


def compare_counts(results, before, after):
    """Compare what the server counted between two looks at /metrics with the results. -> the differences, in words

    Of a client that left, the server may have counted one of HIDDEN, and some of its tokens.
    """
    counted = Counter(answers_by_status(after))
    counted.subtract(answers_by_status(before))
    seen = Counter()
    for result in results:
        seen.update(result.statuses[:-1] if result.left else result.statuses)
    left = [result for result in results if result.left]
    differences = []
    hidden = 0
    for status in sorted(counted.keys() | seen.keys()):
        more = counted[status] - seen[status]
        if status in HIDDEN and more >= 0:
            hidden += more
        elif more:
            differences.append(f"{counted[status]} answers of status {status} by the metrics, "
                               f"{seen[status]} by the clients")
    if hidden != len(left):
        differences.append(f"{hidden} answers more by the metrics than by the clients, of which {len(left)} left")
    name = "minichat_generated_tokens_total"
    generated = after.get(name, 0) - before.get(name, 0)
    least = sum(result.tokens for result in results if not result.left)
    most = least + sum(result.call.answer for result in left)
    if not least <= generated <= most:
        differences.append(f"{generated:.0f} tokens by the metrics, {least} to {most} by the clients")
    return differences


# -----------------------------------------------------------------------------
# Clients that leave


def aborts(stand):
    """-> the figures of the part"""
    c = stand.c
    calls = stand.draw("aborts", c.aborts, streamed=0.5, aborted=1.0, leave_s=stand.capacity["latency_s"])
    _, results = stand.closed(calls, 2 * c.max_requests)
    problems = stand.check("aborts", results)
    free, total = stand.check_blocks("aborts", wait_until_idle(stand.server))
    figures = {"calls": len(calls), "left": sum(result.left for result in results),
               "begun": sum(result.left and result.status == 200 for result in results), "problems": problems,
               "blocks_free": free, "blocks_total": total}
    print("\naborts: clients that left at a random moment; begun: the answer had begun")
    table([figures], ["calls", "left", "begun", "blocks_free", "blocks_total"])
    return figures


# -----------------------------------------------------------------------------
# kill -9


def kill(stand):
    """-> the figures of the part"""
    c = stand.c
    before = digests(stand.folder)
    calls = stand.draw("kill", c.max_requests)
    for call in calls:
        call.answer = min(LONG, stand.alone.about["context"] - len(call.ids))
        call.body = completion_body(call)
    with serving(stand.folder, stand.keys) as server:
        results = [result_of(delivery) for delivery in run(kill_under_load(server, calls))]
    cut = sum(bool(result.lost) for result in results)
    after = digests(stand.folder)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    call = stand.draw("after the kill", 1)[0]
    with serving(stand.folder, stand.keys) as server:
        again = result_of(run(deliver(server.address, call)))
        code = server.stop()
    serves = not problem_of(again) and again.text == stand.alone.ask("texts", [call.task])[0]

    whole = len(calls) - cut
    if whole:
        stand.failed.append(f"kill: {whole} of {len(calls)} clients saw no error")
    if changed:
        stand.failed.append(f"kill: files changed: {', '.join(changed)}")
    if not serves:
        stand.failed.append("kill: the next server gave another answer")
    if code:
        stand.failed.append(f"kill: the next server ended with {code}")
    figures = {"streams": len(calls), "cut": cut, "files": len(before), "files_changed": len(changed),
               "serves_again": serves, "exit_code": code}
    print("\nkill: kill -9 while answers are streamed, and a new server afterwards")
    columns = ["streams", "cut", "files", "files_changed", "serves_again", "exit_code"]
    table([{**figures, "serves_again": str(serves)}], columns)
    return figures


async def kill_under_load(server, calls):
    """Kill the server when all calls run or wait for room. -> deliveries"""
    sent = asyncio.ensure_future(closed_loop(server.address, calls, len(calls)))
    while not sent.done():
        look = await exchange(server.address, request_bytes(server.address, "GET", "/metrics"))
        metrics = samples(read_answer(look.pieces))
        if metrics["minichat_running"] and metrics["minichat_running"] + metrics["minichat_waiting"] == len(calls):
            break
        await asyncio.sleep(0.01)
    server.process.kill()
    return await sent


def digests(folder):
    """{path: sha256} of all files of a model"""
    root = Path(folder)
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path): file_sha256(path) for path in files}
