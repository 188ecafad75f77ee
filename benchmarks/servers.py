"""
The processes that bench.py's `serve` measures: serve.py, servers of others, and the engine alone.

    with serving(folder, settings) as server:       # serve.py at a free port
        server.address, server.memory_mb(), read_metrics(server)
    with Alone(folder, "cpu", "float32", 16, 1536) as alone:
        alone.ask("texts", tasks)

The engine alone answers the same calls without HTTP. It lives in a process of its own for the whole benchmark, so that
measurements can take turns; while it waits for the next question it takes no time from the server.
"""

import contextlib
import io
import itertools
import multiprocessing
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.traffic import Mix, closed_loop, draw_calls, exchange, read_answer, request_bytes, result_of, run
from configurator import fail
from device import pick_device, pick_dtype
from export import write_gguf, write_hugging_face
from foreign.pretrained import read_model
from infer import Engine
from inference.quantize import convert
from inference.sampling import Chooser, Sampling
from serving.worker import default_chunk

ROOT = Path(__file__).resolve().parents[1]
RETRIES = 100  # of a call that is refused with 429
TRIES = 64  # changes of the logits that near_tie tries
NOISE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}  # their size, that of rounding in a model
START = 300  # seconds that a server may take until it answers
END = 60  # seconds that serve.py may take to end; more than its `drain`
SAMPLE = re.compile(r"^(minichat_\w+(?:\{[^}]*\})?) (\S+)", re.MULTILINE)
STATUS = re.compile(r'minichat_requests_total\{route="([^"]*)",status="(\d+)"\}')
WATCHED = ("/health", "/metrics")  # the benchmark's own looks at the server, which are not traffic

# -----------------------------------------------------------------------------
# What the parts of the benchmark share


@dataclass
class Stand:
    """A server, the engine alone beside it, and what is known of both."""

    c: object  # the settings of bench.py
    folder: str  # of the model
    keys: list  # of serve.py
    server: object
    alone: object
    capacity: dict = field(default_factory=dict)  # tok_per_s, calls_per_s and latency_s of the full server
    idle: dict | None = None  # the figures of the idle server, once they are measured
    failed: list = field(default_factory=list)  # what must not happen, in words

    def draw(self, seed, count, **shares):
        """`count` calls that only depend on `seed`."""
        c = self.c
        mix = Mix(self.alone.about["ids"], self.alone.about["context"], c.prompt_lengths, c.answer_lengths, **shares)
        return draw_calls(random.Random(seed), count, mix)

    def closed(self, calls, clients):
        """Send calls from so many clients. -> (seconds until the last answer, results)"""
        deliveries = run(closed_loop(self.server.address, calls, clients, RETRIES))
        began = min(delivery.due for delivery in deliveries)
        ended = max(delivery.exchanges[-1].ended for delivery in deliveries)
        return ended - began, [result_of(delivery) for delivery in deliveries]

    def check(self, part, results):
        """Note what must not happen: lost answers, wrong statuses, wrong numbers of tokens. -> {problem: how many}"""
        problems = Counter(filter(None, map(problem_of, results)))
        self.failed += [f"{part}: {count} x {problem}" for problem, count in problems.items()]
        return dict(problems)

    def check_blocks(self, part, metrics):
        """-> (free blocks, all blocks), which must be equal when nothing runs."""
        free = int(metrics.get("minichat_kv_blocks_free", -1))
        total = int(metrics.get("minichat_kv_blocks_total", 0))
        if free != total:
            self.failed.append(f"{part}: {free} of {total} blocks are free at the end")
        return free, total


def problem_of(result):
    """What must not happen to a call, in words; "" if all is well."""
    if result.left:
        return ""
    if result.lost:
        return f"lost: {result.lost}"
    if result.status >= 500:
        return f"status {result.status}"
    if result.status not in (result.call.status, 429):
        return f"status {result.status} instead of {result.call.status}"
    if result.status == 200 and result.tokens != result.call.answer:
        return "another number of tokens"
    return ""


# -----------------------------------------------------------------------------
# Servers


class Server:
    """A server as a process. address: (host, port)."""

    def __init__(self, process, address):
        self.process = process
        self.address = address

    def memory_mb(self):
        """MB that the process holds in memory (VmRSS in proc(5)); None where /proc does not tell."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return None
        kilobytes = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(kilobytes[1]) * 1024 / 1e6 if kilobytes else None

    def get(self, path):
        """-> Answer of GET path"""
        return read_answer(run(exchange(self.address, request_bytes(self.address, "GET", path))).pieces)

    def kill(self):
        """End it at once, as the kernel does with a process that takes too much memory."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        """End it as systemd or docker would. -> exit code; None: it had to be killed"""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END)
        except subprocess.TimeoutExpired:
            self.kill()
            return None


@contextlib.contextmanager
def serving(folder, keys):
    """serve.py with a model, at a free port. keys: more words of its command line. -> Server. Ends the benchmark if it
    does not start."""
    command = [sys.executable, str(ROOT / "serve.py"), f"--out_dir={folder}", "--port=0", "--access_log=False", *keys]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        url = process.stdout.readline().partition(" ")[0]  # the line that it prints when it is ready
        if not url.startswith("http://"):
            fail(f"serve.py ended with {process.wait()}; its error is above")
        host, _, port = url.removeprefix("http://").rpartition(":")
        yield Server(process, (host, int(port)))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def serving_peer(command, log):
    """Another project's server; "{port}" in its command becomes a free port. Its output goes to the file `log`.
    -> Server, once it answers GET /v1/models, be it with an error. Raises RuntimeError for one that does not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [word.replace("{port}", str(port)) for word in command]
    with open(log, "wb") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        except OSError as error:
            raise RuntimeError(str(error)) from None
    server = Server(process, ("127.0.0.1", port))
    try:
        limit = time.monotonic() + START
        while not server.get("/v1/models").status:
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"it does not start: {last_line(log)}")
            time.sleep(0.5)
        yield server
    finally:
        process.kill()
        process.wait()


def last_line(log):
    lines = Path(log).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it says nothing")[:200]


def read_metrics(server):
    return samples(server.get("/metrics"))


def samples(answer):
    """The Answer of GET /metrics -> {sample with its labels: value}"""
    return {name: float(value) for name, value in SAMPLE.findall(answer.content.decode())}


def answers_by_status(metrics):
    """How many answers of each status the server has counted, except to the benchmark's own looks. -> dict"""
    counts = {}
    for name, value in metrics.items():
        labels = STATUS.fullmatch(name)
        if labels and labels[1] not in WATCHED:
            status = int(labels[2])
            counts[status] = counts.get(status, 0) + int(value)
    return counts


def wait_until_idle(server, seconds=END):
    """Wait until nothing runs or waits. -> the metrics then, or after so many seconds"""
    limit = time.monotonic() + seconds
    while True:
        metrics = read_metrics(server)
        busy = metrics.get("minichat_running", 0) + metrics.get("minichat_waiting", 0)
        if not busy or time.monotonic() > limit:
            return metrics
        time.sleep(0.1)


# -----------------------------------------------------------------------------
# The engine alone


class Alone:
    """The engine of a model in a process of its own. max_tokens: of its cache, at least a context. about: what
    `describe` says of the model."""

    def __init__(self, folder, device, dtype, max_requests, max_tokens):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        arguments = (theirs, folder, device, dtype, max_requests, max_tokens)
        self.process = spawn.Process(target=answer_questions, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the child dies
        self.about = self.receive()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pipe.close()
        self.process.kill()
        self.process.join()

    def ask(self, question, *args):
        """Call one of the functions of QUESTIONS there. -> its result"""
        with contextlib.suppress(OSError):  # if it has ended, `receive` says so
            self.pipe.send((question, args))
        return self.receive()

    def receive(self):
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            fail("the process of the engine ended; its error is above")


def answer_questions(pipe, folder, device, dtype, max_requests, max_tokens):
    """The child of Alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    device = pick_device(device)[0]
    try:
        model, tokenizer, _ = read_model(folder)
    except (OSError, ValueError) as error:
        fail(error)
    about = describe(model, tokenizer)
    model = convert(model.to(device).eval(), pick_dtype(dtype, device)[0])
    max_tokens = max(max_tokens, model.config.block_size)
    engine = Engine(model, tokenizer, max_tokens=max_tokens, max_requests=max_requests,
                    chunk=default_chunk(device.type))
    pipe.send(about)
    with contextlib.suppress(EOFError):  # the parent has ended
        while True:
            question, args = pipe.recv()
            pipe.send(QUESTIONS[question](engine, *args))


def submit(engine, task):
    """Queue a task: (ids, tokens of the answer, temperature, seed). -> Request"""
    ids, answer, temperature, seed = task
    return engine.submit(ids, max_new_tokens=answer, temperature=temperature, seed=seed, ignore_eos=True)


def crowd(engine, tasks, clients):
    """Seconds that the tasks take from so many clients, of which each waits for its answer."""
    engine.blocks.forget()
    tasks = iter(tasks)
    began = time.perf_counter()
    waiting = [submit(engine, task) for task in itertools.islice(tasks, clients)]
    while waiting:
        engine.step()
        done = [request for request in waiting if request.finish]
        if done:
            waiting = [request for request in waiting if not request.finish]
            waiting += [submit(engine, task) for task in itertools.islice(tasks, len(done))]
    return time.perf_counter() - began


def first_token(engine, task):
    """Seconds to the first token of a task, alone."""
    engine.blocks.forget()
    began = time.perf_counter()
    request = submit(engine, task)
    while not request.tokens:
        engine.step()
    seconds = time.perf_counter() - began
    engine.cancel(request)
    return seconds


def texts(engine, tasks):
    """-> the text that follows each prompt"""
    requests = [submit(engine, task) for task in tasks]
    while engine.waiting or engine.running:
        engine.step()
    return [request.text for request in requests]


def near_tie(engine, task, text):
    """Whether a text that is not the engine's own may come from rounding: where it leaves the engine's own, logits that
    are changed by NOISE choose its next token too."""
    ids, _, temperature, seed = task
    request = submit(engine, task)
    while not request.finish:
        engine.step()
    with torch.no_grad():
        logits = engine.model(torch.tensor([request.ids], device=engine.device))[0][0].float().cpu()  # (T, vocab_size)
    choose = Chooser(Sampling(temperature=temperature, seed=seed), logits.shape[1])
    for i, token in enumerate(request.tokens):
        row = logits[len(ids) - 1 + i]
        before = choose.generator.get_state()
        others = set()
        for noise in torch.randn(TRIES, len(row), generator=torch.Generator().manual_seed(i)) * NOISE[engine.dtype]:
            choose.generator.set_state(before)
            others.add(choose(row + noise, []))
        for other in others - {token}:
            if text.startswith(whole_characters(engine.tokenizer.decode([*request.tokens[:i], other]))):
                return True
        if not text.startswith(whole_characters(engine.tokenizer.decode(request.tokens[: i + 1]))):
            return False
    return False


def whole_characters(text):
    return text.rstrip("\ufffd")  # stands for half a character


def describe(model, tokenizer):
    """-> dict: the context, the ids that a prompt may have, and how many weights there are"""
    vocab = tokenizer.vocab_size if tokenizer else model.config.vocab_size
    special = set(tokenizer.special_tokens.values()) if tokenizer else set()
    ids = tuple(token for token in range(vocab) if token not in special)
    return {"context": model.config.block_size, "ids": ids, "weights": sum(p.numel() for p in model.parameters())}


def decode(engine, tasks):
    """-> the prompts of tasks as text"""
    return [engine.tokenizer.decode(ids) for ids, *_ in tasks]


def export(engine, folder, path, dtype):
    """Write the model in `folder` for other projects: a .gguf in `dtype`, or else a Hugging Face folder. -> why it
    cannot be written, or "" """
    path = Path(path)
    model, tokenizer, _ = read_model(folder)  # the engine's has another form
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if path.suffix == ".gguf":
                write_gguf(model, tokenizer, path, dtype)
            else:
                write_hugging_face(model, tokenizer, path)
    except (SystemExit, ValueError, OSError) as error:
        return said.getvalue().strip().removeprefix("error: ") or str(error)
    return ""


QUESTIONS = {function.__name__: function for function in (crowd, first_token, texts, near_tie, decode, export)}
