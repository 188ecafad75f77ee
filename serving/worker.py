"""
The engine in a thread of its own, for an event loop that serves many clients.

    worker = Worker(lambda: Engine.load("out/shakespeare_char"))
    worker.start(asyncio.get_running_loop())
    ...
    job = worker.submit([worker.engine.prepare("ROMEO:")])
    done = False
    while not done:
        await job.news()
        done = job.done  # before the look at its progress: after the end there must be one more look
        print(job.requests[0].text[: job.progress(0).text])

The thread calls Engine.step again and again (`steps_until_the_end` is the whole loop). Nobody else calls the engine,
except `prepare`, which changes nothing. Between two steps it takes new jobs, ends those that were cancelled or are
late, and notes how far each request has come. The loop reads these notes, and the requests only as far as they say:
tokens and text are only ever added.

The two share the interpreter's lock, so a step must not wake the loop for every token. News is delivered at most every
`gap` seconds (25 times a second is fluent for a reader), for all jobs at once; but a job's first token and its end are
delivered immediately. While the thread has
nothing to do, it waits on a condition and costs nothing.
"""

import asyncio
import math
import threading
import time
from collections import deque
from typing import NamedTuple

UNAVAILABLE = {
    "loading": "the model is still being loaded: try again in a moment",
    "draining": "the server is shutting down",
    "dead": "the engine has failed, and the server must be started again",
    "failed": "the model could not be loaded",
}
LONGEST_RETRY = 60  # seconds; an estimate beyond this means nothing


def default_chunk(device_type):
    """Most tokens in one step of the engine, by the type of its device: on a CPU a long step holds up the streams."""
    return 128 if device_type == "cpu" else 512


class Full(Exception):
    """The queue has no room for these requests. retry_after: whole seconds until there may be, at least 1."""

    def __init__(self, retry_after):
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


class Unavailable(Exception):
    """No job is taken now: the model is being loaded or could not be, the server shuts down, or the engine is dead."""


class Progress(NamedTuple):
    """How far a request has come, after a step of the engine. The next one of the same request is never behind it."""

    tokens: int  # len(request.tokens)
    text: int  # len(request.text): so many characters of it are certain, and stay
    finish: str  # request.finish: empty until it ended


class Job:
    """Requests that are one unit: they are accepted together, and an early end is the end of all of them.

    Times are those of the worker's clock, in seconds. One task may wait for `news`. The worker's thread changes the
    requests until `done` is True, and never after.
    """

    def __init__(self, requests, submitted, deadline):
        self.requests = requests
        self.error = ""  # why it was ended early: timeout | shutdown | engine | cancelled; empty: it was not
        self.done = False  # all requests have finished, or there is an error
        self.submitted = submitted
        self.deadline = deadline
        self.waited = None  # seconds until its first request ran
        self.first_token = None  # when it came
        self.gaps = []  # seconds between tokens of the same request

        # written by the thread
        self.snapshots = [Progress(0, 0, "") for _ in requests]
        self.token_times = [None for _ in requests]  # when the last token of each came
        self.unfinished = len(requests)
        self.changes = 0  # of the snapshots, so far

        # used on the loop alone
        self.delivered = 0  # changes that the loop has been told of
        self.seen = 0  # changes that whoever waits for news has been told of
        self.event = asyncio.Event()

    def progress(self, i):
        """The Progress of its request i."""
        return self.snapshots[i]

    async def news(self):
        """Wait until something is new since the last call, or the job is done."""
        while not self.done and self.delivered <= self.seen:
            # nothing is delivered between this test and the wait: deliveries run on this loop too
            self.event.clear()
            await self.event.wait()
        self.seen = self.changes


class Worker:
    """The thread that runs the engine. All methods but `run` and what it calls are for the event loop.

    load: () -> Engine; called in the thread, which may take its time.
    max_queue: how many requests may wait. The requests that the engine runs do not count.
    timeout: seconds from `submit` after which a job is ended, queued or not, unless it says otherwise.
    gap: least seconds between two deliveries of news.
    clock: () -> seconds; for all times of jobs.
    on_end: called on the loop with the worker, after the thread has ended for whatever reason.
    """

    def __init__(self, load, *, max_queue=64, timeout=600.0, gap=0.04, clock=time.monotonic, on_end=None):
        self.load = load
        self.max_queue = max_queue
        self.timeout = timeout
        self.gap = gap
        self.clock = clock
        self.on_end = on_end
        self.state = "loading"  # loading | ready | draining | dead | failed
        self.failure = None  # the exception, if it is dead or failed
        self.engine = None  # until it is loaded
        self.steps = 0  # of the engine, so far
        self.loop = None
        self.thread = None
        self.has_ended = asyncio.Event()

        # shared by loop and thread, under the lock of `changed`, as is `state`
        self.changed = threading.Condition()  # notified if the thread has a reason to look
        self.inbox = []  # jobs that were submitted since the last step
        self.to_cancel = []
        self.drain_until = math.inf  # on the clock
        self.unfinished = 0  # requests of all jobs
        self.finish_times = deque(maxlen=32)  # of the last requests that finished
        self.urgent = {}  # jobs (a dict keeps their order) with news to be delivered immediately,
        self.fresh = {}  # and with news that may wait until `resting` is over
        self.called = False  # `deliver` is on its way to the loop
        self.resting = False  # the last delivery is less than `gap` ago: a timer of the loop brings the next

        # the thread's own
        self.jobs = {}  # that have not ended, in the order in which they came; the values mean nothing
        self.places = {}  # request -> (its job, which of the job's requests it is)
        self.queued = {}  # jobs that do not run yet, in the same way
        self.next_deadline = math.inf  # no job has an earlier one

    # -------------------------------------------------------------------------
    # On the loop

    def start(self, loop):
        """Start the thread. News is delivered on `loop`."""
        self.loop = loop
        # a daemon: a process that must end at once does not wait for a step or for a model that is being loaded
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    @property
    def running(self):
        """Requests that the engine works on."""
        return len(self.engine.running) if self.engine else 0

    @property
    def waiting(self):
        """Requests that are accepted and do not run yet."""
        return max(0, self.unfinished - self.running)  # between the end of a request and its note: one too few run

    @property
    def free_blocks(self):
        return self.engine.blocks.free if self.engine else 0

    @property
    def total_blocks(self):
        return len(self.engine.blocks.users) if self.engine else 0

    def submit(self, requests, timeout=None):
        """Queue Requests of Engine.prepare. -> their Job; timeout: seconds, instead of the worker's

        Raises Unavailable, and Full if more requests than max_queue would have to wait even if the engine ran as many
        as it may.
        """
        now = self.clock()
        with self.changed:
            self.check_room(len(requests))
            job = Job(list(requests), now, now + (self.timeout if timeout is None else timeout))
            self.unfinished += len(requests)
            self.inbox.append(job)
            self.changed.notify()
        return job

    def check_room(self, count=1):
        """Raise what `submit` would raise now for so many requests."""
        with self.changed:
            if self.state != "ready":
                raise Unavailable(UNAVAILABLE[self.state])
            excess = self.unfinished + count - self.max_queue - self.engine.max_requests
            if excess > 0:
                raise Full(self.retry_after(excess))

    def retry_after(self, count):
        """Whole seconds until `count` more requests will have finished, at the pace of the last ones."""
        times = self.finish_times
        pace = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
        return min(max(math.ceil(count * pace), 1), LONGEST_RETRY)

    def cancel(self, job):
        """End a job before the next step, with the error "cancelled". One that has ended stays as it is."""
        with self.changed:
            if not job.done:  # so the thread is awake, and looks before its next step
                self.to_cancel.append(job)

    def drain(self, seconds):
        """Take no more jobs. Those there are may finish within `seconds`, else they end with the error "shutdown"; then
        the thread ends. A second call can only shorten the time."""
        with self.changed:
            if self.state in ("loading", "ready"):
                self.state = "draining"
            self.drain_until = min(self.drain_until, self.clock() + seconds)
            self.changed.notify()

    async def ended(self):
        """Wait until the thread has ended: drained, dead or failed."""
        await self.has_ended.wait()

    def deliver(self):
        """Tell of what is urgent; and of all other news, unless the last delivery was just now."""
        with self.changed:
            self.called = False
            jobs = self.urgent
            self.urgent = {}
            rested = not self.resting
            if rested:
                jobs.update(self.fresh)
                self.fresh = {}
                self.resting = True
        announce(jobs)
        if rested:
            self.loop.call_later(self.gap, self.deliver_fresh)

    def deliver_fresh(self):
        """The last delivery is `gap` ago: tell of what is new since then."""
        with self.changed:
            jobs = self.fresh
            self.fresh = {}
            self.resting = bool(jobs)  # if nothing is new, the thread calls when something is
        announce(jobs)
        if jobs:
            self.loop.call_later(self.gap, self.deliver_fresh)

    def finish(self):
        """The last call that the thread makes."""
        self.thread.join()  # it has nothing left to do
        self.has_ended.set()
        if self.on_end:
            self.on_end(self)

    # -------------------------------------------------------------------------
    # In the thread

    def run(self):
        """The thread: load the engine, run it, and say so when that ends."""
        failed = "failed"  # what an exception makes of the state
        try:
            engine = self.load()
            with self.changed:
                self.engine = engine
                if self.state == "loading":
                    self.state = "ready"
            failed = "dead"
            self.steps_until_the_end()
        except BaseException as e:  # also SystemExit: it would end the thread, and nobody would know
            self.die(e, failed)
        self.ring()
        self.call_loop(self.finish)

    def steps_until_the_end(self):
        """Step while there is work, and wait while there is none; until the worker is drained."""
        while True:
            with self.changed:
                while not (self.jobs or self.inbox or self.state == "draining"):
                    self.changed.wait()
                arrived = self.inbox
                self.inbox = []
                to_cancel = self.to_cancel
                self.to_cancel = []
            for job in arrived:
                self.take(job)
            for job in to_cancel:
                self.end(job, "cancelled")
            begun = self.clock()
            self.end_late_jobs(begun)
            self.ring()
            if self.jobs:
                ready = self.engine.step()
                self.steps += 1
                self.record(ready, begun, self.clock())
                self.ring()
            elif self.state == "draining":
                return

    def take(self, job):
        """Queue a job's requests in the engine."""
        self.jobs[job] = None
        self.queued[job] = None
        self.next_deadline = min(self.next_deadline, job.deadline)
        for i, request in enumerate(job.requests):
            self.places[request] = job, i
            self.engine.waiting.append(request)

    def end(self, job, error):
        """End a job early: its requests leave the engine, and their blocks are free."""
        if job.done:
            return
        with self.changed:
            for i, request in enumerate(job.requests):
                if request.finish:
                    continue
                self.engine.cancel(request)
                self.note(job, i)
            job.error = error
            self.close(job)

    def end_late_jobs(self, now):
        """End jobs whose deadline is over, and all if the time to drain is."""
        if now >= self.next_deadline:
            for job in list(self.jobs):
                if now >= job.deadline:
                    self.end(job, "timeout")
            self.next_deadline = min((job.deadline for job in self.jobs), default=math.inf)
        if now >= self.drain_until:
            for job in list(self.jobs):
                self.end(job, "shutdown")

    def record(self, ready, begun, now):
        """Note what a step did. ready: the requests that got a token or finished; begun, now: its beginning and end"""
        with self.changed:
            self.note_starts(begun)
            for request in ready:
                job, i = self.places[request]
                tokens = self.note(job, i)
                if tokens:
                    self.note_time(job, i, now)
                if request.finish:
                    self.finish_times.append(now)
                if not job.unfinished:
                    self.close(job)
                elif job not in self.urgent:
                    self.fresh[job] = None

    def note_starts(self, begun):
        """Note which jobs started in the step that `begun` then."""
        for job in list(self.queued):
            if job.requests[0].table is None:
                return  # requests start in their order, so all behind it wait too
            del self.queued[job]
            job.waited = begun - job.submitted

    def note(self, job, i):
        """Take a snapshot of a job's request i. -> tokens that are new in it"""
        request = job.requests[i]
        before = job.snapshots[i].tokens
        tokens = len(request.ids) - request.prompt_tokens
        job.snapshots[i] = Progress(tokens, len(request.text), request.finish)
        job.changes += 1
        if request.finish:
            del self.places[request]
            job.unfinished -= 1
            self.unfinished -= 1
        return tokens - before

    def note_time(self, job, i, now):
        """A job's request i got a token `now`."""
        if job.first_token is None:
            job.first_token = now
            self.urgent[job] = None
        last = job.token_times[i]
        if last is not None:
            job.gaps.append(now - last)
        job.token_times[i] = now

    def close(self, job):
        """A job has ended. From here on the thread does not touch its requests."""
        del self.jobs[job]
        self.queued.pop(job, None)
        self.fresh.pop(job, None)
        self.urgent[job] = None
        job.done = True

    def die(self, failure, state):
        """The model could not be loaded, or the engine raised an exception: end all jobs, and leave the engine alone,
        as nobody knows what it still holds."""
        with self.changed:
            self.state = state
            self.failure = failure
            self.jobs.update(dict.fromkeys(self.inbox))
            self.inbox = []
            for job in list(self.jobs):
                job.error = "engine"
                self.unfinished -= job.unfinished
                self.close(job)

    def ring(self):
        """Wake the loop if there is news for it, unless it is about to look anyway."""
        with self.changed:
            news = self.urgent or (self.fresh and not self.resting)
            if self.called or not news:
                return
            self.called = True
        # not under the lock: the loop would wake and wait for it
        self.call_loop(self.deliver)

    def call_loop(self, callback):
        """Let the loop call this. If the loop is closed, nobody waits for any job: end them all."""
        try:
            self.loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed
            self.drain(0)


def announce(jobs):
    """Wake the tasks that wait for news of these jobs."""
    for job in jobs:
        job.delivered = job.changes
        job.event.set()
