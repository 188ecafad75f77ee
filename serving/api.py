"""
OpenAI's requests as data: from the bytes of a body to prompts for the engine. It knows no socket and no thread.

    body = parse(raw, ChatBody)                           # bytes -> a body, or APIError (serving/bodies.py)
    answer = plan_chat(served, body)                      # -> ChatAnswer (serving/answers.py), or APIError
    requests = [engine.prepare(ids, sampling) for ids, sampling in answer.prompts]

What the server cannot do, such as tools and images, is refused by name: an answer that silently ignores it would be
wrong. Names of special tokens in a text are plain characters (tokenizer.py), so no user can end a message or begin
another.
"""

import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from conversation import TooLong
from inference.sampling import Sampling
from serving.answers import DONE, Answer, ChatAnswer, CompletionAnswer, TokenNames, event
from serving.bodies import (
    MOST_STOPS,
    ROLES,
    APIError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    openapi_schemas,
    parse,
    quoted,
    wrong_field,
)

# what others need to know is all here
__all__ = [
    "DONE", "APIError", "Answer", "ChatAnswer", "ChatBody", "CompletionAnswer", "CompletionBody", "DetokenizeBody",
    "Served", "TokenizeBody", "detokenize", "event", "model", "models", "openapi_schemas", "parse", "plan_chat",
    "plan_completion", "tokenize", "tokenizer_info",
]

LONGEST_STOP = 1024  # characters of a stop string
COMPLETION_TOKENS = 16  # new tokens of a completion that does not say how many, as OpenAI has it
SEEDS = 2**63

# fields that ask for something the server cannot do -> values of them that ask for nothing, besides null and []
REFUSED = {"tools": [], "tool_choice": ["none"], "functions": [], "function_call": ["none"], "modalities": [["text"]],
           "audio": [], "prediction": [], "web_search_options": [], "response_format": [{"type": "text"}]}


@dataclass
class Served:
    """What is served."""

    name: str
    created: int  # Unix time of the model
    tokenizer: Any  # or None: only prompts of token ids
    template: Any  # conversation.Template, or None: no chats
    context: int  # tokens, the model's block_size
    vocab_size: int  # of the model
    reply_tokens: int  # most new tokens of a chat that does not say how many
    most_choices: int  # in one answer

    @cached_property
    def longest_piece(self):
        """Bytes of the longest token: a text of more than `context` such pieces cannot fit."""
        return max(map(len, self.tokenizer.pieces), default=1)


# -----------------------------------------------------------------------------
# What both endpoints ask


def check_model(served, name):
    if name not in (None, "", served.name):
        raise APIError(f"there is no model {quoted(name)}: this server has {quoted(served.name)}", 404,
                       code="model_not_found", param="model")


def include_usage(body):
    """Whether a stream ends with its usage."""
    options = {} if body.stream_options is None else body.stream_options
    wanted = options.get("include_usage") if isinstance(options, dict) else ""
    if not isinstance(wanted, bool | None):
        raise APIError("stream_options must be an object with include_usage true or false", param="stream_options")
    return bool(body.stream and wanted)


def count_choices(served, body, prompts):
    """The number of choices for each of so many prompts."""
    n = body.n or 1
    if n * prompts > served.most_choices:
        raise APIError(f"n times the number of prompts is {n * prompts}: at most {served.most_choices} answers can be "
                       "asked for at once", param="n" if n > 1 else "prompt")
    return n


def most_new_tokens(body):
    """(how many tokens were asked for, or None; the field that says so)"""
    if body.max_completion_tokens is not None:
        return body.max_completion_tokens, "max_completion_tokens"
    return body.max_tokens, "max_tokens"


def stop_strings(body):
    """-> tuple of str"""
    stops = [] if body.stop is None else body.stop
    if isinstance(stops, str):
        stops = [stops]
    good = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not good or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise APIError(f"stop must be a string or a list of at most {MOST_STOPS} strings, each of 1 to {LONGEST_STOP} "
                       "characters", param="stop")
    return tuple(stops)


def logit_biases(served, body):
    """-> dict of token id -> number"""
    biases = {} if body.logit_bias is None else body.logit_bias
    if not isinstance(biases, dict):
        raise wrong_field(type(body), "logit_bias")
    checked = {}
    for name, bias in biases.items():
        if not re.fullmatch("[0-9]{1,9}", name) or int(name) >= served.vocab_size:
            raise APIError(f"logit_bias names {quoted(name)}: token ids are 0 to {served.vocab_size - 1}",
                           param="logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise APIError(f"logit_bias of token {name} must be a number from -100 to 100", param="logit_bias")
        checked[int(name)] = bias
    return checked


def sampling_options(served, body):
    """Fields of Sampling that all choices of an answer share. -> dict"""
    options = {
        "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k, "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty, "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty, "ignore_eos": body.ignore_eos,
    }
    options = {name: value for name, value in options.items() if value is not None}  # Sampling has OpenAI's defaults
    if body.top_p == 0:
        options["top_p"] = 1e-9  # the smallest set there is: the most likely token
    if body.top_k == -1:
        options["top_k"] = 0  # vLLM's word for all tokens
    return options | {"stop": stop_strings(body), "logit_bias": logit_biases(served, body)}


def seeds(body, n):
    """The seeds of n choices. Without a seed in the body they are random, and differ between prompts too."""
    if body.seed is None:
        return [secrets.randbits(63) for _ in range(n)]
    return [(body.seed + j) % SEEDS for j in range(n)]


def too_long(served, tokens, new, field, param, at_least=False):
    """The error for a prompt of so many tokens, with `new` to come, which do not fit the context."""
    count = f"at least {tokens}" if at_least else f"{tokens}"
    message = f"This model's maximum context length is {served.context} tokens, but the prompt has {count} tokens"
    if new:
        message += f" and {field} asks for {new} more: shorten one of them"
    else:
        message += ": shorten it"
    return APIError(message, code="context_length_exceeded", param=param)


def new_tokens(served, tokens, asked, field, default, param):
    """How many tokens may follow a prompt of `tokens`. asked: by the client, or None. The last token is drawn but never
    read, so it needs no place. Raises APIError if they do not fit."""
    room = served.context - tokens + 1
    new = min(default, room) if asked is None else max(1, asked)
    if room < 1 or new > room:
        raise too_long(served, tokens, asked, field, param)
    return new


# -----------------------------------------------------------------------------
# Completions


def plan_completion(served, body):
    """A CompletionBody -> its CompletionAnswer. It tokenises, which takes time for a long prompt. Raises APIError."""
    check_model(served, body.model)
    if body.suffix not in (None, ""):
        raise APIError("suffix cannot be used: this model only continues texts", param="suffix")
    prompts = prompts_of(body.prompt)
    n = count_choices(served, body, len(prompts))
    if body.best_of not in (None, n):
        raise APIError("best_of must equal n: all answers are sent", param="best_of")
    echo = bool(body.echo)
    asked, field = most_new_tokens(body)
    if asked == 0 and not echo:
        raise APIError(f"{field} must be at least 1, or 0 together with echo", param=field)
    options = sampling_options(served, body)
    top = body.logprobs
    keep_end = None
    if top is not None:
        options |= {"logprobs": True, "top_logprobs": top}
        if echo:
            options["prompt_logprobs"] = top or True
        # who measures a prompt draws one token and drops it, and counts on it: it is there, even if it ends the text
        if echo and asked == 1 and served.tokenizer and not body.ignore_eos:
            keep_end = served.tokenizer.eos
            options["ignore_eos"] = True
    planned = []
    texts = []
    for prompt in prompts:
        ids = prompt_ids(served, prompt)
        options["max_new_tokens"] = new_tokens(served, len(ids), asked, field, COMPLETION_TOKENS, "prompt")
        planned += [(ids, Sampling(**options, seed=seed)) for seed in seeds(body, n)]
        texts.append(prompt_text(served, prompt) if echo else "")
    return CompletionAnswer(served.name, served.tokenizer, planned, n=n, stream=bool(body.stream),
                            include_usage=include_usage(body), top=top, texts=texts, echo=echo, only_echo=asked == 0,
                            keep_end=keep_end)


def prompts_of(prompt):
    """A string, a list of ids, or a list of these -> list of strings and lists of ids."""
    if isinstance(prompt, str) or is_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) or is_ids(one) for one in prompt):
        return prompt
    raise APIError("prompt must be a string, a list of token ids, or a list of these, and not empty", param="prompt")


def is_ids(value):
    """Whether this is a list of at least one whole number."""
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)


def prompt_ids(served, prompt):
    """The token ids of a prompt, which may be such ids already. Raises APIError."""
    if isinstance(prompt, list):
        if not 0 <= min(prompt) <= max(prompt) < served.vocab_size:
            raise APIError(f"prompt has a token id that does not exist: they are 0 to {served.vocab_size - 1}",
                           param="prompt")
        return prompt
    if prompt:
        return text_ids(served, prompt, "prompt", served.context)
    if served.tokenizer is None or served.tokenizer.bos is None:
        raise APIError("prompt is empty, and this model has no token for the beginning of a text", param="prompt")
    return [served.tokenizer.bos]


def text_ids(served, text, param, most=None):
    """The token ids of a text; names of special tokens in it are plain text. Raises APIError, without any work for a
    text that is certainly more than `most` tokens."""
    if served.tokenizer is None:
        raise APIError(f"this model has no tokenizer: {param} must be a list of token ids", param=param)
    least = -(-len(text.encode("utf-8", "replace")) // served.longest_piece)
    if most is not None and least > most:
        raise too_long(served, least, 0, "", param, at_least=True)
    try:
        return served.tokenizer.encode(text)
    except ValueError as error:  # a character that the tokenizer does not know
        raise APIError(f"{param}: {error}", param=param) from None


def prompt_text(served, prompt):
    """The text of a prompt, as echo repeats it."""
    if isinstance(prompt, str):
        return prompt
    return decoded(served, prompt, skip_special=True)


def decoded(served, ids, skip_special):
    """The text of ids, of which those beyond the tokenizer's (a model may be padded) have none."""
    if served.tokenizer is None:
        return ""
    return served.tokenizer.decode([i for i in ids if i < served.tokenizer.vocab_size], skip_special=skip_special)


# -----------------------------------------------------------------------------
# Chats


def plan_chat(served, body):
    """A ChatBody -> its ChatAnswer. The oldest turns that do not fit the context are dropped, and counted. It
    tokenises, which takes time for a long talk. Raises APIError."""
    check_model(served, body.model)
    refuse_abilities(body)
    if served.template is None:
        raise APIError("this model has no chat template: it continues texts at /v1/completions",
                       code="no_chat_template")
    messages = chat_messages(body.messages)
    n = count_choices(served, body, 1)
    asked, field = most_new_tokens(body)
    if asked == 0:
        raise APIError(f"{field} must be at least 1", param=field)
    options = sampling_options(served, body)
    if not options.get("ignore_eos"):
        options["stop_tokens"] = served.template.stops
    if body.top_logprobs and not body.logprobs:
        raise APIError("top_logprobs needs logprobs to be true", param="top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    if top is not None:
        options |= {"logprobs": True, "top_logprobs": top}

    spare = max(1, min(served.reply_tokens, served.context // 4)) if asked is None else asked
    ids, stay = fit(served, messages, spare, asked, field)
    options["max_new_tokens"] = new_tokens(served, len(ids), asked, field, served.reply_tokens, "messages")
    planned = [(ids, Sampling(**options, seed=seed)) for seed in seeds(body, n)]
    return ChatAnswer(served.name, served.tokenizer, planned, n=n, stream=bool(body.stream),
                      include_usage=include_usage(body), top=top, dropped=len(messages) - len(stay))


def fit(served, messages, spare, asked, field):
    """Template.fit with room for an answer of `spare` tokens: (ids, the messages that stay). A client that did not ask
    for a number of tokens gets what room there is. Raises APIError."""
    try:
        return served.template.fit(messages, served.context - spare + 1)
    except TooLong as error:
        if asked is None and spare > 1:
            return fit(served, messages, 1, asked, field)
        raise too_long(served, error.tokens, asked or 0, field, "messages", error.at_least) from None
    except ValueError as error:  # a conversation that the template does not know, or a character without an id
        raise APIError(f"messages: {error}", param="messages") from None


def refuse_abilities(body):
    """Raise APIError naming a field that asks for what no model here can do."""
    for name, harmless in REFUSED.items():
        if getattr(body, name) not in (None, [], *harmless):
            raise APIError(f"{name} cannot be used: this model answers with text alone", param=name)


def chat_messages(messages):
    """Messages as clients send them -> as conversation.py knows them. Raises APIError naming the message and field."""
    if not isinstance(messages, list) or not messages:
        raise APIError("messages must be a list of at least one message", param="messages")
    checked = []
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(message, dict):
            raise APIError(f"{place} must be an object with role and content", param=place)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            named = f", not {quoted(role)}" if isinstance(role, str) else ""
            raise APIError(f"{place}.role must be one of {', '.join(ROLES)}{named}", param=f"{place}.role")
        for name in ("tool_calls", "function_call", "audio"):
            if message.get(name) not in (None, []):
                raise APIError(f"{place}.{name} cannot be used: only text can", param=f"{place}.{name}")
        content = message.get("content")
        check_content(content, f"{place}.content")
        checked.append({"role": ROLES[role], "content": content})
    return checked


def check_content(content, place):
    """Raise APIError for content that is neither text nor a list of parts of text."""
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise APIError(f"{place} must be a string or a list of parts", param=place)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise APIError(f"{place} has a part of type {quoted(kind)}: only text can be used", param=place)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise APIError(f"{place} has a part that is no text: it needs type and text", param=place)


# -----------------------------------------------------------------------------
# Models and tokens


def models(served):
    """GET /v1/models"""
    return {"object": "list", "data": [model(served, served.name)]}


def model(served, name):
    """GET /v1/models/NAME. Raises APIError for a model that is not there."""
    check_model(served, name)
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "minichat",
            "context_length": served.context, "chat": served.template is not None}


def tokenizer_info(served):
    """GET /tokenizer_info, which lm-eval reads. chat_template is null: a template of Jinja would write special tokens
    as text, and in a text they are plain characters. /v1/chat/completions applies the model's own."""
    names = TokenNames(served.tokenizer).special
    tokenizer = served.tokenizer
    return {
        "tokenizer_class": tokenizer.kind if tokenizer else None,
        "vocab_size": served.vocab_size,
        "model_max_length": served.context,
        "bos_token": names.get(tokenizer.bos) if tokenizer else None,
        "eos_token": names.get(tokenizer.eos) if tokenizer else None,
        "chat_template": None,
    }


def tokenize(served, body):
    """POST /tokenize: the ids that /v1/completions makes of a prompt, which never adds a special token. Only a prompt
    that is exactly the name of bos or eos, as tokenizer_info gives it, is this token: lm-eval asks so for its id."""
    info = tokenizer_info(served)
    if body.prompt and body.prompt in (info["bos_token"], info["eos_token"]):
        ids = [served.tokenizer.special_tokens[body.prompt]]
    else:
        ids = text_ids(served, body.prompt, "prompt")
    return {"count": len(ids), "context_length": served.context, "tokens": ids}


def detokenize(served, body):
    """POST /detokenize: the text of token ids, with the names of special tokens."""
    ids = body.tokens
    if ids != [] and not is_ids(ids):
        raise wrong_field(type(body), "tokens")
    if ids and not 0 <= min(ids) <= max(ids) < served.vocab_size:
        raise APIError(f"tokens has an id that does not exist: they are 0 to {served.vocab_size - 1}", param="tokens")
    if served.tokenizer is None:
        raise APIError("this model has no tokenizer: its tokens have no text", param="tokens")
    return {"prompt": decoded(served, ids, skip_special=False)}
