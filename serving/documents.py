"""
What the server says about itself: openapi.json, and what a browser may do with the page.
"""

import base64
import hashlib
import re

from fastapi.openapi.utils import get_openapi

from serving.api import openapi_schemas

ERRORS = (400, 401, 403, 404, 405, 413, 429, 500, 503)  # any route may answer with these


def takes(schema):
    """The body of a route in openapi.json."""
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def openapi(app, service):
    """The dict of /openapi.json. It names the largest token id once the model is loaded, and is kept from then on."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version="1", routes=app.routes)
    text = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    error = {"type": "object", "required": list(fields), "properties": fields}
    schemas = {"Error": {"type": "object", "required": ["error"], "properties": {"error": error}}}
    vocab_size = service.served.vocab_size if service.served else None
    schema.setdefault("components", {})["schemas"] = schemas | openapi_schemas(vocab_size)
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for operations in schema["paths"].values():
        for operation in operations.values():
            answers = operation["responses"]
            answers.pop("422", None)  # FastAPI's form of an error
            for status in ERRORS:
                answers[str(status)] = {"description": "an error", "content": content}
    answers = schema["paths"]["/metrics"]["get"]["responses"]
    answers["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = schema["paths"][path]["post"]["responses"]
        # without a schema: programs disagree whether it is that of the text or of each event
        answers["200"]["content"]["text/event-stream"] = {}
    if vocab_size is not None:
        app.openapi_schema = schema
    return schema


def page_headers(page):
    """The headers of the page (bytes). Its Content-Security-Policy allows the scripts and styles that are written in
    it, by their hashes, and requests to this server: nothing that a model writes can run or load anything."""
    policy = {
        "default-src": "'none'",
        "script-src": inline_hashes(page, b"script"),
        "style-src": inline_hashes(page, b"style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def inline_hashes(page, tag):
    """The sources of a Content-Security-Policy for the blocks <tag>...</tag> of a page."""
    hashes = []
    for block in re.findall(rb"<%b(?:\s[^>]*)?>(.*?)</%b>" % (tag, tag), page, re.DOTALL):
        block = block.replace(b"\r\n", b"\n")  # as a browser reads it
        digest = base64.b64encode(hashlib.sha256(block).digest()).decode()
        hashes.append(f"'sha256-{digest}'")
    return " ".join(hashes) or "'none'"
