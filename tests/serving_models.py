"""
Tiny models for the tests of the server, and ways to look at its answers and to slow its engine down.

A `talker` says known texts, so every answer can be written down by the test:

    <|assistant|> is followed by "Hi!" and the end of the answer
    x  by "yz" and the end of the document
    0  by "123456789" and the end of the document
    a  by "bababa" and so on, up to the length or the context

`noisy` has random weights over some 600 characters, one token each, so the text of an answer tells its ids.
"""

import asyncio
import contextlib
import json

import httpx
import torch
from live import PATIENCE
from test_chat import WITH_BYTES, WITH_CHARS, chain, ids_of, write_run
from test_serve import Gate, events_of, until

import checkpoint
from conversation import add_template
from export import NoOptimizer
from infer import Engine
from model import GPT, GPTConfig
from tokenizer import CharTokenizer

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
BOTH = (COMPLETE, CHAT)
CONTEXT = 128
ASKS_HELLO = [{"role": "user", "content": "hello"}]
HELLO = {"messages": ASKS_HELLO}
WIDE = "é☕日𝄞"  # characters of 2, 3, 3 and 4 bytes, no byte of which is there twice
MANY_CHARS = "\n" + "".join(map(chr, [*range(32, 127), *range(0x4E00, 0x4E00 + 500)]))
WITH_MANY = add_template(CharTokenizer(MANY_CHARS), "minichat")

# one for all requests of a test's process: to make one takes longer than an answer of a tiny model
http = httpx.Client(timeout=PATIENCE, trust_env=False)


# -----------------------------------------------------------------------------
# Models


def follows(tokenizer, *parts):
    """Followers of a model that continues the first token of these texts with the rest."""
    ids = ids_of(tokenizer, *parts)
    return {token: [after] for token, after in zip(ids, ids[1:], strict=False)}


def write_talker(folder, block_size=CONTEXT):
    """A run that says the texts above. -> its folder"""
    followers = chain(WITH_CHARS, "Hi!<|end|>") | follows(WITH_CHARS, "xyz<|eos|>")
    followers |= follows(WITH_CHARS, "0123456789<|eos|>") | follows(WITH_CHARS, "aba")
    return write_run(folder, WITH_CHARS, followers, block_size)


def write_endless(folder, block_size=30_000):
    """A run whose chats never end: "abababa"."""
    return write_run(folder, WITH_CHARS, chain(WITH_CHARS, "ab") | follows(WITH_CHARS, "aba"), block_size)


def write_wide(folder):
    """A run over bytes that answers with WIDE, and then ends."""
    return write_run(folder, WITH_BYTES, chain(WITH_BYTES, WIDE, "<|end|>"))


def write_noisy(folder, tokenizer=WITH_MANY, seed=0):
    """A run with random weights, no two tokens of which are equally likely."""
    torch.manual_seed(seed)
    config = GPTConfig(block_size=CONTEXT, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32,
                       tie_weights=False)
    model = GPT(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    checkpoint.save(folder, model, NoOptimizer(), {"step": 1, "val_loss": None, "model": vars(config),
                                                   "config": {"dataset": ""}})
    tokenizer.save(folder)
    return folder


def engine_of(folder):
    """The engine without a server: what it says is what the server must say."""
    return Engine.load(folder, device="cpu", dtype="float32")


# -----------------------------------------------------------------------------
# Questions and answers


def ask(server, path, **body):
    """A plain answer, as httpx has it."""
    return http.post(server.url + path, json=body)


def asked(server, path, **body):
    """The JSON of an answer that must have come."""
    answer = ask(server, path, **body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def streamed(server, path, **body):
    """The chunks of a stream, which must end with [DONE]."""
    answer = ask(server, path, stream=True, **body)
    assert answer.status_code == 200, answer.text
    *chunks, last = events_of(answer.text)
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def body_for(path, text="hello", **options):
    """A body for one of BOTH endpoints."""
    if path == CHAT:
        return {"messages": [{"role": "user", "content": text}], **options}
    return {"prompt": text, **options}


def text_of(choice):
    """The text of a choice of any answer or chunk."""
    if "message" in choice:
        return choice["message"]["content"]
    if "delta" in choice:
        return choice["delta"].get("content", "")
    return choice["text"]


def texts_of(answer):
    """The texts of an answer, which must be in the order of their index."""
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [text_of(choice) for choice in answer["choices"]]


def joined(chunks):
    """The chunks of a stream -> [(text, finish_reason)] in the order of the index. After the end of a choice there is
    nothing more of it."""
    texts = {}
    reasons = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            assert reasons.get(index) is None, "something follows the end of a choice"
            texts[index] = texts.get(index, "") + text_of(choice)
            reasons[index] = choice["finish_reason"]
    assert all(reasons.values()), "a choice has no end"
    return [(texts[index], reasons[index]) for index in sorted(texts)]


def pieces(chunks, index=0):
    """The texts of a choice's chunks, one by one, without empty ones."""
    texts = [text_of(choice) for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [text for text in texts if text]


# -----------------------------------------------------------------------------
# A slow engine, without a clock


@contextlib.contextmanager
def held(server):
    """The engine stands still before its next step, until the Gate is opened; at the end it is as before."""
    gate = Gate(server)
    try:
        yield gate
    finally:
        gate.open()
        server.worker.engine.step = gate.real_step


@contextlib.contextmanager
def paced(server):
    """The engine takes its next step when every client has been sent the news of the last one: each token has a chunk
    of its own, however fast the machine is."""
    worker = server.worker
    real_step = worker.engine.step
    real_gap = worker.gap

    async def nothing():
        pass

    def step():
        until(lambda: all(job.seen == job.changes for job in list(worker.jobs)))
        # the task that was told has gone on until it waits again
        asyncio.run_coroutine_threadsafe(nothing(), worker.loop).result(PATIENCE)
        return real_step()

    worker.gap = 0
    worker.engine.step = step
    try:
        yield
    finally:
        worker.engine.step = real_step
        worker.gap = real_gap


def is_idle(server):
    """Whether nothing runs, waits, or is being prepared."""
    return server.service.preparing == server.worker.unfinished == 0


def assert_all_free(server):
    """Every block of the cache is free again, once nothing runs."""
    until(lambda: is_idle(server))
    engine = server.worker.engine
    assert server.worker.free_blocks == server.worker.total_blocks
    assert not engine.running and not engine.waiting and not any(engine.blocks.users)
