"""
Bodies of requests: what their fields are, and how the bytes of one become it. serving/api.py plans the answers.

    body = parse(raw, ChatBody)                           # bytes -> a body, or APIError

Whatever a client sends, the only error is APIError, whose body is OpenAI's: {"error": {message, type, param, code}}.
Fields that are unknown are ignored and null means absent, because clients send both.
"""

import json
import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from inference.sampling import MOST_TOP

MOST_STOPS = 16  # strings; OpenAI has 4
MOST = 2**31 - 1  # of any whole number in a body
LONGEST_NAME = 64  # characters of a field's name that is repeated to the client
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class APIError(Exception):
    """What is told to the client: `status` and `headers` of the answer, and its `body`."""

    def __init__(self, message, status=400, *, code=None, param=None, type=None, headers=None):
        message = message.encode("utf-8", "replace").decode()  # half a character cannot be sent
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.type = type or ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def body(self):
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def quoted(text):
    """A text in quotes, cut where it becomes long."""
    return json.dumps(text if len(text) <= 100 else text[:100] + "...", ensure_ascii=False)


# -----------------------------------------------------------------------------
# Bodies. Numbers and flags are checked here. Lists and objects are checked in serving/api.py, item by item: a list of
# a million wrong items would make a million errors. A description completes the sentence "FIELD must be ...".


def whole_number(least, most, description):
    return Annotated[int | None, Field(ge=least, le=most, description=description)]


def number(description, **limits):
    return Annotated[float | None, Field(allow_inf_nan=False, description=description, **limits)]


def anything(description, **schema):
    """A field that is checked by serving/api.py. schema: what a client may send, for openapi.json."""
    return Annotated[Any, Field(description=description), WithJsonSchema({"description": description, **schema})]


TEXT = Annotated[str | None, Field(description="a string")]
FLAG = Annotated[bool | None, Field(description="true or false")]
REFUSED_FIELD = anything("absent or empty: it asks for what no model here can do")
TOKEN_ID = {"type": "integer", "minimum": 0}
IDS = {"type": "array", "items": TOKEN_ID}
PROMPTS = {"type": "array", "items": {"anyOf": [{"type": "string"}, {**IDS, "minItems": 1}]}, "minItems": 1}
TEXTS = {"type": "array", "items": {"type": "string"}}
STOP = {"anyOf": [{"type": "null"}, {"type": "string"}, {**TEXTS, "maxItems": MOST_STOPS}]}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"]}
MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": [*ROLES]},
                   "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": PART}]}},
    "required": ["role", "content"],
}


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class SamplingBody(Body):
    """What both endpoints know."""

    model: TEXT = None
    max_tokens: whole_number(0, MOST, "a whole number of at least 1") = None
    max_completion_tokens: whole_number(0, MOST, "a whole number of at least 1") = None
    temperature: number("a number of at least 0, where 0 takes the most likely token", ge=0) = None
    top_p: number("a number from 0 to 1", ge=0, le=1) = None
    top_k: whole_number(-1, MOST, "a whole number, where 0 and -1 mean all tokens") = None
    min_p: number("a number from 0 to 1", ge=0, le=1) = None
    repetition_penalty: number("a number above 0", gt=0) = None
    presence_penalty: number("a number from -2 to 2", ge=-2, le=2) = None
    frequency_penalty: number("a number from -2 to 2", ge=-2, le=2) = None
    logit_bias: anything("an object of token ids and numbers from -100 to 100", type=["object", "null"],
                         additionalProperties={"type": "number", "minimum": -100, "maximum": 100}) = None
    seed: Annotated[int | None, Field(description="a whole number")] = None
    stop: anything(f"a string or a list of at most {MOST_STOPS} strings, none of them empty", **STOP) = None
    n: whole_number(1, 128, "a whole number from 1 to 128") = None
    ignore_eos: FLAG = None
    stream: FLAG = None
    stream_options: anything("an object", type=["object", "null"],
                             properties={"include_usage": {"type": ["boolean", "null"]}}) = None


class CompletionBody(SamplingBody):
    """POST /v1/completions"""

    prompt: anything("a string, a list of token ids, or a list of these",
                     anyOf=[{"type": "string"}, {**IDS, "minItems": 1}, PROMPTS])
    logprobs: whole_number(0, MOST_TOP, f"a whole number from 0 to {MOST_TOP}") = None
    echo: FLAG = None
    best_of: whole_number(1, 128, "a whole number from 1 to 128") = None
    suffix: REFUSED_FIELD = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions"""

    messages: anything("a list of messages with role and content", type="array", items=MESSAGE, minItems=1)
    logprobs: FLAG = None
    top_logprobs: whole_number(0, MOST_TOP, f"a whole number from 0 to {MOST_TOP}") = None
    tools: REFUSED_FIELD = None
    tool_choice: REFUSED_FIELD = None
    functions: REFUSED_FIELD = None
    function_call: REFUSED_FIELD = None
    modalities: REFUSED_FIELD = None
    audio: REFUSED_FIELD = None
    prediction: REFUSED_FIELD = None
    web_search_options: REFUSED_FIELD = None
    response_format: REFUSED_FIELD = None


class TokenizeBody(Body):
    """POST /tokenize"""

    prompt: Annotated[str, Field(description="a string")]
    add_special_tokens: FLAG = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    tokens: anything("a list of token ids", **IDS)


def openapi_schemas(vocab_size):
    """The JSON schemas of all bodies, as "#/components/schemas/..." of openapi.json. -> dict by name

    vocab_size: of the model that is served, or None where it is not known yet.
    """
    schemas = {}
    for body_type in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody):
        schema = body_type.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body_type.__name__] = schema
    return schemas if vocab_size is None else with_largest_id(schemas, vocab_size - 1)


def with_largest_id(schema, largest):
    """A JSON schema whose token ids end at `largest`."""
    if schema == TOKEN_ID:
        return {**schema, "maximum": largest}
    if isinstance(schema, dict):
        return {name: with_largest_id(item, largest) for name, item in schema.items()}
    if isinstance(schema, list):
        return [with_largest_id(item, largest) for item in schema]
    return schema


# -----------------------------------------------------------------------------
# Bytes -> a body


HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be one; a pair of them is a whole character


def parse(raw, body_type):
    """The bytes of a request -> a body of `body_type`. Raises APIError."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise APIError(f"the body is not UTF-8: byte {error.start} is no part of a character") from None
    odd = []  # numbers that are not finite

    def constant(name):
        odd.append(name)
        return math.nan

    def decimal(digits):
        value = float(digits)
        if math.isinf(value):
            odd.append(digits)
        return value

    try:
        value = json.loads(text, parse_constant=constant, parse_float=decimal)
    except json.JSONDecodeError as error:
        raise APIError(f"the body is not JSON: see line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise APIError("the body is nested too deep") from None
    except ValueError:  # more digits than Python turns into a number
        raise APIError("the body has a number with too many digits") from None
    if not isinstance(value, dict):
        raise APIError("the body must be a JSON object")
    if odd or HALF_CHARACTER.search(text):
        refuse_odd_values(value)
    value = {name: item for name, item in value.items() if item is not None}  # null means absent
    try:
        return body_type.model_validate(value)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(wrong["loc"][0])
    if wrong["type"] == "missing":
        raise APIError(f"{name} is missing", param=name)
    raise wrong_field(body_type, name)


def wrong_field(body_type, name):
    return APIError(f"{name} must be {body_type.model_fields[name].description}", param=name)


def refuse_odd_values(body):
    """Raise APIError naming the field that has NaN, an infinite number, or half a character of UTF-16 (a lone
    surrogate), which no text may hold."""
    for name, item in body.items():
        param = name if is_text(name) and name.isprintable() and len(name) <= LONGEST_NAME else None
        stack = [name, item]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                stack += value.keys()
                stack += value.values()
            elif isinstance(value, list):
                stack += value
            elif isinstance(value, str) and not is_text(value):
                raise APIError(f"{param or 'a field'} has half a character (a lone surrogate)", param=param)
            elif isinstance(value, float) and not math.isfinite(value):
                raise APIError(f"{param or 'a field'} has a number that is not finite", param=param)


def is_text(value):
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
