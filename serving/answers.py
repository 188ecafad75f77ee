"""
OpenAI's answers as data: the whole of one, or the chunks of a stream. serving/api.py plans them from a request's body.

    answer = plan_chat(served, body)                      # -> ChatAnswer, with the prompts for the engine
    answer.whole(requests)                                # the answer, once all requests are finished
    answer.first(requests)                                # a stream: chunks before any token,
    answer.piece(index, request, seen, now)               # what is new between two moments of a request,
    answer.end(index, request)                            # why it ended,
    answer.usage_chunk(requests)                          # how many tokens it took

`requests` are the engine's (infer.Request), one for each choice, in the order of `answer.prompts`. The pieces of a
stream together are the whole answer, wherever it is cut: text and log-probabilities. Nothing here changes a request, so
it may be read while the engine's thread works on it: only what lies before `now` is looked at.
"""

import json
import math
import secrets
import time
from dataclasses import dataclass, field

LEAST_LOGPROB = -9999.0  # OpenAI's value for a token that is next to impossible; JSON has no -Infinity
# JSON allows these in a string, but clients split lines at them
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
DONE = b"data: [DONE]\n\n"


def event(data):
    """A dict -> the bytes of one server-sent event. Raises ValueError for numbers that JSON does not have."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign, escaped in LINE_ENDS.items():
        text = text.replace(sign, escaped)
    return f"data: {text}\n\n".encode()


# -----------------------------------------------------------------------------
# Tokens as text


class TokenNames:
    """Token ids as the strings that stand for them beside log-probabilities. No two ids have the same string.

    A token that is no whole text, such as half a character, is written as OpenAI does: bytes:\\xe2\\x80. Ids without
    a text, of a model that has no tokenizer or a padded vocabulary, are token_id:5, as vLLM writes them.
    """

    def __init__(self, tokenizer):
        self.pieces = tokenizer.pieces if tokenizer else []
        self.special = {}
        if tokenizer:
            self.special = {token: name for name, token in tokenizer.special_tokens.items()}
        self.taken = {name.encode() for name in self.special.values()}

    def __call__(self, token):
        if token in self.special:
            return self.special[token]
        piece = self.bytes(token)
        if piece is None:
            return f"token_id:{token}"
        text = None
        if piece not in self.taken and not piece.startswith((b"bytes:", b"token_id:")):
            text = whole_text(piece)
        if text is None:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
        return text

    def bytes(self, token):
        """The bytes of a token in the text, or None for one that has none."""
        if token in self.special or token >= len(self.pieces):
            return None
        return self.pieces[token]


def whole_text(piece):
    """The text of bytes, or None if they are not whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def finite(logprob):
    """A log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


# -----------------------------------------------------------------------------
# What both kinds of answers share


@dataclass(eq=False)
class Answer:
    """The answer to one body. Its subclasses say how a choice and a chunk look."""

    model: str  # the name that is served
    tokenizer: object  # or None
    prompts: list  # (ids, Sampling) of each choice: the n choices of the first prompt, then those of the second, ...
    n: int = 1  # choices for each prompt
    stream: bool = False
    include_usage: bool = False  # a stream ends with its usage
    top: int | None = None  # most likely tokens that are shown beside each token; None: no log-probabilities
    dropped: int = 0  # messages that were left out, the oldest
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time
    id: str = ""

    def __post_init__(self):
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.names = TokenNames(self.tokenizer)

    def whole(self, requests):
        """The full answer as a dict. All requests are finished."""
        choices = []
        for index, request in enumerate(requests):
            choices.append(self.choice(index, request))
        return self.body(self.whole_object, choices) | {"usage": self.usage(requests)} | self.remarks()

    def end(self, index, request):
        """The last chunk of a choice, which only says why it ended."""
        return self.chunk(index, self.nothing(), finish_reason=self.finish_reason(request))

    def usage(self, requests):
        """How many tokens: each prompt once, and all tokens of the answers as `Request.tokens` has them. A token that
        ends an answer is not shown, so it does not count; the tokens of a stop string do, as they were drawn."""
        prompt_tokens = sum(request.prompt_tokens for request in requests[:: self.n])
        completion_tokens = sum(self.drawn(request) for request in requests)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in requests[:: self.n])},
        }

    def usage_chunk(self, requests):
        """The chunk that ends a stream, or None if its usage was not asked for."""
        if not self.include_usage:
            return None
        return self.body(self.chunk_object, []) | {"usage": self.usage(requests)}

    def drawn(self, request):
        """How many tokens of the answer are shown."""
        return len(request.ids) - request.prompt_tokens

    def finish_reason(self, request):
        """OpenAI's word for it: "stop" for a stop string, a token that ends an answer, and the end of a document."""
        return "length" if request.finish == "length" else "stop"

    def chunk(self, index, content, logprobs=None, finish_reason=None):
        """A chunk of a stream for one choice. content: a dict with what this kind of answer calls its text."""
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self.body(self.chunk_object, [choice])
        if self.include_usage:
            chunk["usage"] = None  # as OpenAI has it: only the last chunk has a usage
        return chunk

    def body(self, object_type, choices):
        return {"id": self.id, "object": object_type, "created": self.created, "model": self.model, "choices": choices}

    def remarks(self):
        """What only this server says: how many messages were dropped."""
        return {"dropped_messages": self.dropped} if self.dropped else {}


# -----------------------------------------------------------------------------
# Chats


@dataclass(eq=False)
class ChatAnswer(Answer):
    """The answer of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index, request):
        message = {"role": "assistant", "content": request.text, "refusal": None}
        logprobs = self.logprobs(request, 0, self.drawn(request))
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason(request)}

    def first(self, requests):
        """A chunk for each choice, which says whose words follow."""
        chunks = [self.chunk(index, {"delta": {"role": "assistant", "content": ""}}) for index in range(len(requests))]
        chunks[0] |= self.remarks()
        return chunks

    def piece(self, index, request, seen, now):
        """The chunk of what is new of a request between two Progress, or None if there is nothing to show."""
        text = request.text[seen.text : now.text]
        logprobs = None
        if now.tokens > seen.tokens:
            logprobs = self.logprobs(request, seen.tokens, now.tokens)
        if not text and logprobs is None:
            return None
        return self.chunk(index, {"delta": {"content": text}}, logprobs)

    def nothing(self):
        return {"delta": {}}

    def logprobs(self, request, start, end):
        """OpenAI's log-probabilities of the drawn tokens from `start` to `end`, or None if they were not asked for."""
        if self.top is None:
            return None
        content = []
        for place in range(start, end):
            entry = self.entry(request.ids[request.prompt_tokens + place], request.logprobs[place])
            likely = request.top_logprobs[place] if self.top else []
            entry["top_logprobs"] = [self.entry(token, logprob) for token, logprob in likely]
            content.append(entry)
        return {"content": content, "refusal": None}

    def entry(self, token, logprob):
        piece = self.names.bytes(token)
        return {"token": self.names(token), "bytes": None if piece is None else list(piece), "logprob": finite(logprob)}


# -----------------------------------------------------------------------------
# Completions


@dataclass(eq=False)
class CompletionAnswer(Answer):
    """The answer of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    texts: list = field(default_factory=list)  # the text of each prompt, which echo repeats; else empty
    echo: bool = False
    only_echo: bool = False  # max_tokens is 0: the one token that the engine draws is dropped
    keep_end: int | None = None  # a token that ends the answer, but is drawn and shown like any other

    def __post_init__(self):
        super().__post_init__()
        self.starts = {}  # index -> the Starts of a choice's tokens

    def choice(self, index, request):
        text = self.prompt_text(index)
        if not self.only_echo:
            text += request.text
        logprobs = self.logprobs(index, request, 0, self.drawn(request), self.echo)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason(request)}

    def first(self, requests):
        """With echo, a chunk for each choice with the prompt's text, unless its log-probabilities belong to it: they
        are known once the prompt has been read, and come with the first piece."""
        if not self.echo or self.top is not None:
            return []
        return [self.chunk(index, {"text": self.prompt_text(index)}) for index in range(len(requests))]

    def piece(self, index, request, seen, now):
        """The chunk of what is new of a request between two Progress, or None if there is nothing to show."""
        text = "" if self.only_echo else request.text[seen.text : now.text]
        start, end = (0, 0) if self.only_echo else (seen.tokens, now.tokens)
        # the prompt has been read as soon as there is a token, or one that ended the request
        begins = not (seen.tokens or seen.finish) and (now.tokens or now.finish not in ("", "cancelled"))
        with_prompt = bool(begins and self.echo and self.top is not None)
        if with_prompt:
            text = self.prompt_text(index) + text
        logprobs = None
        if end > start or with_prompt:
            logprobs = self.logprobs(index, request, start, end, with_prompt)
        if not text and logprobs is None:
            return None
        return self.chunk(index, {"text": text}, logprobs)

    def nothing(self):
        return {"text": ""}

    def prompt_text(self, index):
        return self.texts[index // self.n] if self.echo else ""

    def drawn(self, request):
        return 0 if self.only_echo else super().drawn(request)

    def finish_reason(self, request):
        if self.only_echo:
            return "length"
        if self.keep_end is not None and request.ids[request.prompt_tokens :] == [self.keep_end]:
            return "stop"
        return super().finish_reason(request)

    def logprobs(self, index, request, start, end, with_prompt):
        """OpenAI's log-probabilities of the drawn tokens from `start` to `end`, behind those of the prompt if it is
        echoed; None if they were not asked for.

        The chosen token is among its own top_logprobs, with the very same number: a client sees by that whether it was
        the most likely one. text_offset counts characters from the beginning of the text, before a stop string cuts it.
        """
        if self.top is None:
            return None
        tokens, logprobs, likely = [], [], []
        if with_prompt:
            tokens += request.ids[: request.prompt_tokens]
            logprobs += request.prompt_logprobs
            likely += request.prompt_top_logprobs if self.top else [[]] * request.prompt_tokens
        tokens += request.ids[request.prompt_tokens + start : request.prompt_tokens + end]
        logprobs += request.logprobs[start:end]
        likely += request.top_logprobs[start:end] if self.top else [[]] * (end - start)
        return {
            "tokens": [self.names(token) for token in tokens],
            "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
            "top_logprobs": [self.top_dict(*place) for place in zip(tokens, logprobs, likely, strict=True)],
            "text_offset": self.offsets(index, request, start, end, with_prompt),
        }

    def top_dict(self, token, logprob, likely):
        """The most likely tokens of one place, and the token that stands there. None for the first of a prompt."""
        if logprob is None:
            return None
        names = {self.names(other): finite(value) for other, value in likely}
        return names | {self.names(token): finite(logprob)}

    def offsets(self, index, request, start, end, with_prompt):
        """Where the drawn tokens from `start` to `end` begin in the text, behind those of the prompt if it is echoed.
        -> list of int"""
        prompt = []
        if with_prompt:
            prompt = Starts(self.tokenizer, 0).until(request.ids[: request.prompt_tokens])
        if index not in self.starts:
            self.starts[index] = Starts(self.tokenizer, len(self.prompt_text(index)))
        starts = self.starts[index]
        known = len(starts.places)
        starts.until(request.ids[request.prompt_tokens + known : request.prompt_tokens + end])
        return prompt + starts.places[start:end]


class Starts:
    """Where the tokens of a text begin, in characters. `at`: where the first one does."""

    def __init__(self, tokenizer, at):
        self.decode = tokenizer.stream_decoder() if tokenizer else lambda token: ""
        self.at = at
        self.places = []

    def until(self, tokens):
        """More tokens -> the places of all tokens so far."""
        for token in tokens:
            self.places.append(self.at)
            self.at += len(self.decode(token))
        return self.places
