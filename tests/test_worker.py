"""The engine's thread: what jobs get is what the engine alone would say, and nothing is lost, left over or late.

A test that must know what happens between two steps holds the engine with a Gate. Nothing here depends on how fast the
machine is: tests count steps and calls, and deadlines are those of a clock that the test turns.
"""

import asyncio
import contextlib
import functools
import random
import threading
import time

import pytest
import torch

from infer import Engine
from inference.sampling import Sampling
from model import GPT, GPTConfig
from serving.worker import Full, Job, Progress, Unavailable, Worker, announce
from tokenizer import BPETokenizer, CharTokenizer

PATIENCE = 300  # seconds; only a failing test waits so long
CHARS = "abcdefghijklmnopqr"
TOKENIZER = CharTokenizer(CHARS)  # 18 characters, bos 18, eos 19
BYTES = BPETokenizer([bytes([i]) for i in range(256)])


def make(vocab_size=20, block_size=48):
    """A small model with opinions."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=16, pos="rope"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


MODEL = make()


def engine_of(model=MODEL, tokenizer=TOKENIZER, **options):
    return Engine(model, tokenizer, **{"block": 4, "max_requests": 4, "chunk": 8, **options})


def in_loop(test):
    """Run a test that is a coroutine."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def limited():
            await asyncio.wait_for(test(*args, **kwargs), PATIENCE)

        asyncio.run(limited())

    return run


class Clock:
    """A clock that the test turns."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Gate:
    """Lets an engine make its steps one by one. `seen`: the requests, running or waiting, that each step found."""

    def __init__(self, engine, is_open=False):
        self.engine = engine
        self.step_before = engine.step
        self.is_open = is_open
        self.permits = threading.Semaphore(0)
        self.arrivals = threading.Semaphore(0)
        self.seen = []
        engine.step = self.step

    def step(self):
        self.seen.append([*self.engine.running, *self.engine.waiting])
        self.arrivals.release()
        if not self.is_open:
            assert self.permits.acquire(timeout=PATIENCE)
        return self.step_before()

    async def arrival(self):
        """Wait until the thread is about to make its next step; what it does before a step is done."""
        assert await asyncio.to_thread(self.arrivals.acquire, timeout=PATIENCE)

    def let(self, steps=1):
        self.permits.release(steps)

    def open(self):
        self.is_open = True
        self.let()


@contextlib.asynccontextmanager
async def started(engine, **options):
    """A worker whose engine is loaded. At the end it is drained, and must have given back all blocks."""
    worker = Worker(lambda: engine, **options)
    worker.start(asyncio.get_running_loop())
    await until(lambda: worker.state != "loading")
    try:
        yield worker
    finally:
        if isinstance(engine.step.__self__, Gate):
            engine.step.__self__.open()
        worker.drain(0)
        await worker.ended()
    assert not worker.thread.is_alive()
    if worker.state != "dead":
        assert worker.free_blocks == worker.total_blocks > 0
        assert not worker.engine.running and not worker.engine.waiting
        assert worker.waiting == worker.running == 0
        assert not worker.places and not worker.queued


async def until(condition):
    """Wait until something holds that nobody announces."""
    for _ in range(PATIENCE * 1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never held")


async def end_of(job):
    """Wait for the end of a job. -> it"""
    while not job.done:
        await job.news()
    return job


def ask(worker, prompt="abc", count=1, timeout=None, **sampling):
    """Submit a job of `count` requests that each draw max_new_tokens tokens."""
    sampling = {"max_new_tokens": 8, "ignore_eos": True, **sampling}
    return worker.submit([worker.engine.prepare(prompt, seed=i, **sampling) for i in range(count)], timeout)


def content(request):
    return request.text, request.tokens, request.finish


def wishes(count, seed):
    """Prompts and samplings of many kinds: [(prompt, Sampling), ...]"""
    rng = random.Random(seed)
    stops = ((), (), ("a",), ("bc", "k"), ("ef", "gh", "jjj"))
    return [
        ("".join(rng.choices(CHARS,
                             k=rng.randint(1, 20))),
         Sampling(max_new_tokens=rng.randint(1, 25), temperature=rng.choice((0, 0.7, 1.0, 1.5)), seed=i,
                  stop=rng.choice(stops), ignore_eos=rng.random() < 0.5))
        for i in range(count)
    ]


def answers(wanted, **options):
    """What the engine alone says, one request after the other."""
    return [content(engine_of(**options).generate(prompt, sampling)) for prompt, sampling in wanted]


# -----------------------------------------------------------------------------
# The same text, and news of it


@in_loop
async def test_each_text_is_the_engines_own_alone_and_in_a_crowd():
    wanted = wishes(60, seed=1)
    expected = answers(wanted)
    async with started(engine_of()) as worker:
        for (prompt, sampling), answer in list(zip(wanted, expected, strict=True))[:10]:
            job = await end_of(worker.submit([worker.engine.prepare(prompt, sampling)]))
            assert content(job.requests[0]) == answer
        prepared = [worker.engine.prepare(prompt, sampling) for prompt, sampling in wanted]
        jobs = [worker.submit([request]) for request in prepared]
        for job, answer in zip(jobs, expected, strict=True):
            await end_of(job)
            assert content(job.requests[0]) == answer
            assert not job.error
            assert job.progress(0) == Progress(len(answer[1]), len(answer[0]), answer[2])


@in_loop
async def test_several_requests_are_one_job():
    wanted = wishes(7, seed=2)
    async with started(engine_of(max_requests=2)) as worker:
        job = await end_of(worker.submit([worker.engine.prepare(*wish) for wish in wanted]))
        assert [content(request) for request in job.requests] == answers(wanted)
        assert all(job.progress(i).finish for i in range(7))


@pytest.mark.parametrize("gap", (0, 0.001, 0.02))
@pytest.mark.parametrize("tokenizer", (TOKENIZER, BYTES), ids=("characters", "bytes"))
@in_loop
async def test_progress_only_grows_and_all_of_it_is_certain(tokenizer, gap):
    """Of each job one task waits for news, and one looks whether it was told to or not. Single bytes are seldom a
    character, so their text comes later than their tokens."""
    model = MODEL if tokenizer is TOKENIZER else make(tokenizer.vocab_size)
    engine = engine_of(model, tokenizer)

    async def watch(job, called):
        seen = [(Progress(0, 0, ""), "")] * len(job.requests)
        done = False
        while not done:
            await (job.news() if called else asyncio.sleep(0.001))
            done = job.done
            for i, request in enumerate(job.requests):
                progress = job.progress(i)
                text = request.text[: progress.text]
                before, text_before = seen[i]
                assert len(text) == progress.text and len(request.tokens) >= progress.tokens
                assert progress.tokens >= before.tokens and text.startswith(text_before)
                assert not before.finish or progress == before
                seen[i] = progress, text
        for request, (progress, text) in zip(job.requests, seen, strict=True):
            assert (progress.tokens, text, progress.finish) == (len(request.tokens), request.text, request.finish)
            assert request.finish

    async with started(engine, gap=gap) as worker:
        jobs = [ask(worker, count=1 + i % 3, max_new_tokens=5 + i, stop=("ab", "c") if i % 2 else ())
                for i in range(20)]
        await asyncio.gather(*(watch(job, called) for job in jobs for called in (True, False)))


@in_loop
async def test_no_wake_up_is_lost():
    """Many short jobs, each submitted when the thread may just be falling asleep, and waited for at other moments."""
    rng = random.Random(3)
    async with started(engine_of(), gap=0) as worker:
        async def client():
            for _ in range(150):
                job = ask(worker, "a", max_new_tokens=rng.choice((1, 1, 2, 3)))
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                while job.progress(0).finish == "":
                    await job.news()
                await job.news()  # is over, so it does not wait

        for clients in (1, 2):
            await asyncio.gather(*(client() for _ in range(clients)))


@in_loop
async def test_news_tells_of_each_step_once():
    engine = engine_of()
    gate = Gate(engine)
    async with started(engine, gap=0) as worker:
        job = ask(worker, max_new_tokens=4)
        for tokens in (1, 2, 3, 4):
            await gate.arrival()
            waiting = asyncio.ensure_future(job.news())
            for _ in range(20):
                await asyncio.sleep(0)
            assert not waiting.done()
            gate.let()
            await waiting
            assert job.progress(0).tokens == tokens
        assert job.done


@in_loop
async def test_the_first_token_and_the_end_come_immediately_and_the_rest_may_wait():
    """With a gap of days there are two deliveries of each job. The texts are complete all the same."""
    async with started(engine_of(), gap=1e5) as worker:
        for _ in range(2):
            jobs = [ask(worker, max_new_tokens=30) for _ in range(4)]
            for job in jobs:
                calls = 0
                while not job.done:
                    await job.news()
                    calls += 1
                assert calls <= 2
                assert job.progress(0).tokens == 30


@in_loop
async def test_a_first_token_does_not_wait_for_the_news_of_others():
    engine = engine_of()
    gate = Gate(engine)
    async with started(engine, gap=1e5) as worker:
        for _ in range(2):  # the second time, a delivery has just been made
            job = ask(worker, max_new_tokens=3)
            await gate.arrival()
            gate.let()
            await job.news()
            assert job.progress(0).tokens == 1 and job.gaps == []
            gate.let(2)
            await gate.arrival()
            await gate.arrival()
            await job.news()
            assert job.done


@in_loop
async def test_news_that_was_seen_is_not_told_again():
    """The thread was faster than the delivery: whoever was woken by the first news has seen the second as well."""
    job = Job([None], 0, 1)
    job.changes = 2
    job.delivered = 1
    await job.news()
    waiting = asyncio.ensure_future(job.news())
    for changes, told in ((2, False), (3, True)):
        job.changes = changes
        announce([job])
        for _ in range(20):
            await asyncio.sleep(0)
        assert waiting.done() is told


@in_loop
async def test_a_loop_that_is_busy_is_called_once(monkeypatch):
    """However many steps the thread makes, one delivery is on its way."""
    loop = asyncio.get_running_loop()
    calls = []
    call = loop.call_soon_threadsafe
    async with started(engine_of(slide=True), gap=0) as worker:
        def counted(callback, *args, **kwargs):
            if callback == worker.deliver:
                calls.append(worker.steps)
            return call(callback, *args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        jobs = [ask(worker, max_new_tokens=10**6) for _ in range(3)]
        wait_blocking(lambda: worker.steps >= 30)
        assert len(calls) == 1
        for job in jobs:
            await job.news()
            assert job.progress(0).tokens > 20
            worker.cancel(job)
        monkeypatch.setattr(loop, "call_soon_threadsafe", call)


def wait_blocking(condition):
    """Wait without letting the loop run."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class CountedCondition(threading.Condition):
    """Counts waits that began and ended, and notes their limits."""

    def __init__(self):
        super().__init__()
        self.began = 0
        self.ended = 0
        self.limits = set()

    def wait(self, timeout=None):
        self.began += 1
        self.limits.add(timeout)
        result = super().wait(timeout)
        self.ended += 1
        return result


@in_loop
async def test_an_idle_worker_sleeps():
    """It makes no step, and wakes once for each job, never to look around."""
    worker = Worker(engine_of, gap=0)
    worker.changed = CountedCondition()
    worker.start(asyncio.get_running_loop())
    await until(lambda: worker.changed.began == 1)
    for i in range(20):
        assert worker.changed.ended == i
        steps = worker.steps
        await end_of(ask(worker, "a", max_new_tokens=3))
        assert worker.steps == steps + 3
        await until(lambda i=i: worker.changed.began == i + 2)
    await until(lambda: not worker.resting)  # the timer of the loop ends too
    worker.drain(60)
    await worker.ended()
    assert worker.changed.limits == {None}
    assert worker.steps == 60


@in_loop
async def test_times_are_those_of_the_clock():
    clock = Clock()
    engine = engine_of(max_requests=1)
    gate = Gate(engine)
    async with started(engine, clock=clock) as worker:
        first = ask(worker, max_new_tokens=3)
        await gate.arrival()
        second = ask(worker, max_new_tokens=2)
        for step in range(5):
            clock.now += 1
            gate.let()
            await (gate.arrival() if step < 4 else end_of(second))
        assert (first.submitted, first.waited, first.first_token, first.gaps) == (1000, 0, 1001, [1, 1])
        assert (second.submitted, second.waited, second.first_token, second.gaps) == (1000, 3, 1004, [1])


# -----------------------------------------------------------------------------
# Full, cancelled, late


@in_loop
async def test_a_full_queue_refuses_at_once_and_those_accepted_finish():
    wanted = wishes(6, seed=4)
    expected = answers(wanted)
    engine = engine_of(max_requests=2)
    gate = Gate(engine)
    async with started(engine, max_queue=4) as worker:
        requests = [engine.prepare(*wish) for wish in wanted]
        jobs = [worker.submit(requests[:1]), worker.submit(requests[1:3])]
        await gate.arrival()
        jobs += [worker.submit(requests[3:5])]
        with pytest.raises(Full):  # one place is left, and a job is accepted as a whole or not at all
            ask(worker, count=2)
        jobs += [worker.submit(requests[5:])]
        for _ in range(3):
            with pytest.raises(Full) as refused:
                ask(worker)
            assert isinstance(refused.value.retry_after, int) and refused.value.retry_after >= 1
        assert (worker.running, worker.waiting) == (0, 6)  # the first step is still to come
        gate.open()
        for job in jobs:
            await end_of(job)
        assert [content(request) for job in jobs for request in job.requests] == expected
        await end_of(ask(worker, count=6))


@in_loop
async def test_a_cancelled_job_has_no_more_steps():
    """Whether it runs, waits in the engine or was never seen by it: the next step finds it no more."""
    engine = engine_of(max_requests=2)
    gate = Gate(engine)
    async with started(engine) as worker:
        runs, stays, waits = (ask(worker, max_new_tokens=20) for _ in range(3))
        await gate.arrival()
        gate.let(2)
        await gate.arrival()
        await gate.arrival()
        assert [request in engine.running for job in (runs, stays, waits) for request in job.requests] == [1, 1, 0]
        assert list(engine.waiting) == waits.requests
        assert (worker.running, worker.waiting) == (2, 1)
        inbox = ask(worker, count=3)
        free = worker.free_blocks
        steps = worker.steps
        for job in (runs, waits, inbox, runs):
            worker.cancel(job)
        gate.let()  # the step that was on its way
        await gate.arrival()
        assert worker.steps == steps + 1
        assert gate.seen[-1] == stays.requests
        assert worker.free_blocks == free + runs.requests[0].blocks_needed
        for job in (runs, waits, inbox):
            assert job.done and job.error == "cancelled"
            assert {request.finish for request in job.requests} == {"cancelled"}
            await job.news()
            worker.cancel(job)  # changes nothing
        assert runs.progress(0).tokens == 3 and waits.progress(0).tokens == 0
        gate.open()
        await end_of(stays)
        worker.cancel(stays)
        assert not stays.error and stays.progress(0) == Progress(20, len(stays.requests[0].text), "length")


@pytest.mark.parametrize("when", ("inbox", "running"))
@in_loop
async def test_after_the_last_cancel_there_is_no_step(when):
    engine = engine_of(slide=True)
    gate = Gate(engine)
    async with started(engine) as worker:
        first = ask(worker, count=6, max_new_tokens=10**6)
        await gate.arrival()
        second = ask(worker) if when == "inbox" else first
        worker.cancel(second)
        worker.cancel(first)
        gate.let()
        await end_of(first)
        await end_of(second)
        assert worker.free_blocks == worker.total_blocks
        for _ in range(100):  # turns of the loop, in which an idle worker does nothing
            await asyncio.sleep(0.001)
        assert worker.steps == 1  # the one that was on its way


@in_loop
async def test_a_thousand_aborts_leave_nothing_behind():
    """Jobs of one to three requests are aborted at random instants; the other jobs give the texts they always give."""
    rng = random.Random(5)
    wanted = wishes(30, seed=6)
    expected = answers(wanted)
    aborted = 0
    kept = 0
    ends = set()
    async with started(engine_of(max_requests=6, max_tokens=200), max_queue=200, gap=0.001) as worker:
        async def client():
            nonlocal aborted, kept
            while aborted < 1000:
                chosen = [rng.randrange(30) for _ in range(rng.randint(1, 3))]
                job = worker.submit([worker.engine.prepare(*wanted[i]) for i in chosen])
                if rng.random() < 0.1:
                    await end_of(job)
                    assert [content(request) for request in job.requests] == [expected[i] for i in chosen]
                    kept += 1
                    continue
                kind = rng.randrange(4)
                if kind == 1:
                    await asyncio.sleep(0)
                elif kind == 2:
                    await job.news()
                elif kind == 3:
                    await asyncio.sleep(rng.random() * 0.03)
                worker.cancel(job)
                aborted += 1
                await end_of(job)
                ends.add(job.error)

        await asyncio.gather(*(client() for _ in range(20)))
        await until(lambda: not worker.jobs)
        assert worker.free_blocks == worker.total_blocks
        assert worker.waiting == worker.running == worker.unfinished == 0
    assert aborted >= 1000 and kept and "cancelled" in ends


@in_loop
async def test_a_deadline_ends_a_job_that_runs_or_waits():
    clock = Clock()
    engine = engine_of(max_requests=1)
    gate = Gate(engine)
    async with started(engine, timeout=10, clock=clock) as worker:
        runs = ask(worker, max_new_tokens=20)
        waits = ask(worker, count=2)
        patient = ask(worker, timeout=1000, max_new_tokens=2)
        for _ in range(3):
            await gate.arrival()
            gate.let()
        await gate.arrival()
        clock.now += 9.5
        inbox = ask(worker, timeout=0.5)
        last = ask(worker, timeout=1000)
        gate.let()
        await gate.arrival()
        assert not (runs.done or waits.done or inbox.done)
        clock.now += 0.5
        gate.let()
        await gate.arrival()
        assert gate.seen[-1] == patient.requests + last.requests
        for job in (runs, waits, inbox):
            assert job.done and job.error == "timeout"
            await job.news()
        assert runs.progress(0).tokens == 5
        gate.open()
        for job in (patient, last):
            assert not (await end_of(job)).error


# -----------------------------------------------------------------------------
# How it ends


@in_loop
async def test_drain_lets_those_there_finish_and_takes_no_more():
    ends = []
    engine = engine_of(max_requests=2)
    gate = Gate(engine)
    async with started(engine, on_end=ends.append) as worker:
        jobs = [ask(worker, count=2) for _ in range(3)]
        await gate.arrival()
        worker.drain(10**6)
        assert worker.state == "draining"
        with pytest.raises(Unavailable, match="shutting down"):
            ask(worker)
        gate.open()
        await worker.ended()
        assert ends == [worker] and not worker.thread.is_alive()
        for job in jobs:
            assert job.done and not job.error and job.progress(1).tokens == 8


@in_loop
async def test_what_is_not_finished_when_the_time_to_drain_is_over_ends():
    clock = Clock()
    engine = engine_of(max_requests=1, slide=True)
    gate = Gate(engine)
    async with started(engine, clock=clock, timeout=10**6) as worker:
        short = ask(worker, max_new_tokens=2)
        endless = [ask(worker, max_new_tokens=10**6) for _ in range(2)]
        await gate.arrival()
        worker.drain(30)
        clock.now += 29
        worker.drain(60)  # does not make it longer
        for _ in range(3):
            gate.let()
            await gate.arrival()
        assert short.done and not short.error and not endless[0].done
        steps = worker.steps
        clock.now += 1
        gate.let()
        await worker.ended()
        assert worker.steps == steps + 1
        assert [job.error for job in endless] == ["shutdown"] * 2
        assert worker.free_blocks == worker.total_blocks
        for job in endless:
            await job.news()


@in_loop
async def test_drain_of_an_idle_worker_and_of_one_that_loads():
    async with started(engine_of()) as worker:
        worker.drain(10**6)
        await worker.ended()
        assert worker.steps == 0

    may_load = threading.Event()

    def load():
        assert may_load.wait(PATIENCE)
        return engine_of()

    ends = []
    worker = Worker(load, on_end=ends.append)
    worker.start(asyncio.get_running_loop())
    assert (worker.state, worker.engine, worker.waiting, worker.running) == ("loading", None, 0, 0)
    assert (worker.free_blocks, worker.total_blocks) == (0, 0)
    with pytest.raises(Unavailable, match="loaded"):
        worker.submit([])
    worker.drain(10**6)
    may_load.set()
    await worker.ended()
    assert (worker.state, worker.failure, worker.steps, ends) == ("draining", None, 0, [worker])


@in_loop
async def test_an_exception_in_the_model_ends_all_jobs(monkeypatch):
    ends = []
    engine = engine_of(max_requests=2)
    gate = Gate(engine)
    loop = asyncio.get_running_loop()
    async with started(engine, on_end=lambda w: ends.append((w, asyncio.get_running_loop()))) as worker:
        jobs = [ask(worker, max_new_tokens=20) for _ in range(4)]
        for _ in range(3):
            await gate.arrival()
            gate.let()
        await gate.arrival()
        jobs.append(ask(worker, count=2))
        snapshots = [job.progress(0) for job in jobs]
        waiting = [asyncio.ensure_future(job.news()) for job in jobs[2:]]
        await asyncio.sleep(0)

        def broken(*args, **kwargs):
            raise RuntimeError("no more memory")

        monkeypatch.setattr(engine.model, "forward", broken)
        gate.open()
        await asyncio.gather(*waiting)
        await worker.ended()
        assert (worker.state, str(worker.failure)) == ("dead", "no more memory")
        assert ends == [(worker, loop)]
        for job, before in zip(jobs, snapshots, strict=True):
            assert job.done and job.error == "engine" and job.progress(0) == before
            await job.news()
            worker.cancel(job)
        with pytest.raises(Unavailable, match="failed"):
            ask(worker)
        worker.drain(0)
        assert worker.state == "dead"


@pytest.mark.parametrize("failure", (ValueError("no such file"), SystemExit(2)), ids=lambda e: type(e).__name__)
@in_loop
async def test_a_model_that_cannot_be_loaded(failure):
    def load():
        raise failure

    ends = []
    worker = Worker(load)
    worker.on_end = ends.append
    worker.start(asyncio.get_running_loop())
    await worker.ended()
    assert (worker.state, worker.failure, worker.engine) == ("failed", failure, None)
    assert ends == [worker]
    with pytest.raises(Unavailable, match="could not be loaded"):
        worker.submit([])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_is_closed_ends_the_thread():
    """Nobody waits any more: the thread ends its jobs, and no exception comes out of it."""
    loop = asyncio.new_event_loop()
    worker = Worker(lambda: engine_of(slide=True), gap=0)

    async def begin():
        worker.start(loop)
        await until(lambda: worker.state == "ready")
        job = ask(worker, count=6, max_new_tokens=10**6)
        await job.news()
        return job

    job = loop.run_until_complete(begin())
    loop.close()
    worker.thread.join(PATIENCE)
    assert not worker.thread.is_alive()
    assert job.done and job.error == "shutdown"
    assert worker.free_blocks == worker.total_blocks


@in_loop
async def test_cancelling_the_task_that_waits_harms_nothing():
    """As a server does when a client leaves: the job continues until someone cancels it."""
    engine = engine_of()
    gate = Gate(engine)
    async with started(engine, gap=0) as worker:
        job = ask(worker, max_new_tokens=3)
        await gate.arrival()
        waiting = asyncio.ensure_future(job.news())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.let()
        await job.news()
        assert job.progress(0).tokens == 1
        gate.open()
        assert (await end_of(job)).progress(0).tokens == 3
