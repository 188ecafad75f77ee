"""
What every request passes before a route sees it: plain ASGI layers, the outermost first.

    Frame    an id and a log line for each answer, its count in the metrics, errors as OpenAI's JSON
    Doors    which names this server answers to, and which pages of a browser may use it
    CORS     Starlette's, if pages of other origins are wanted
    Key      the API key
    Body     how many bytes a body may have

A browser on this machine runs code of strangers. It can reach a server on loopback in two ways: with a name that was
made to mean 127.0.0.1 (DNS rebinding), which only the Host header shows, and by sending a form to it, which the Origin
header shows.
"""

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import json
import re
import secrets
import sys
import time
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

from serving.api import APIError

OPEN_PATHS = {"/health"}  # need no key
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
GONE = 499  # nginx's status of a request whose client left before the answer; it is only counted
DROP_SECONDS = 5  # so long the rest of a refused body is read, so that the client sees the answer
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CORS = {"allow_methods": ["*"], "allow_headers": ["*"], "allow_credentials": False, "allow_private_network": True,
        "expose_headers": ["x-request-id", "retry-after"]}


def guarded(app, c, count):
    """`app` behind all layers. c: the settings of serve.py; count(path, status) is called once for each request."""
    app = Body(app, c.max_body * 1024)
    app = Key(app, c.api_key)
    if c.cors_origins:
        app = CORSMiddleware(app, allow_origins=c.cors_origins, **CORS)
    app = Doors(app, known_hosts(c.host, c.allowed_hosts), c.cors_origins)
    return Frame(app, count, c.access_log)


def header(scope, name):
    """The value of a request's header as str, or "". `name` in small letters, as bytes."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def error_headers(error, body):
    """The headers of an answer that is an APIError, as ASGI has them."""
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= error.headers
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]


async def send_error(send, error, more_body=False):
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    await send({"type": "http.response.start", "status": error.status, "headers": error_headers(error, body)})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


# -----------------------------------------------------------------------------


class Frame:
    """The outermost layer: each answer gets an x-request-id, the client's if it is a plain word, and is counted when
    it begins. A layer below may raise APIError."""

    def __init__(self, app, count, log):
        self.app = app
        self.count = count
        self.log = log

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = time.monotonic()
        request_id = header(scope, b"x-request-id")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        status = GONE

        async def send_framed(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                self.count(scope["path"], status)
            await send(message)

        try:
            await self.app(scope, receive, send_framed)
        except APIError as error:
            await send_error(send_framed, error)
        finally:
            if status == GONE:
                self.count(scope["path"], status)
            if self.log:
                seconds = time.monotonic() - begun
                print(f"{request_id} {scope['method']} {scope['path']!r} {status} {seconds:.3f} s", file=sys.stderr)


class Doors:
    """Refuses names of this server that it does not know, and browsers' pages that are not its own.

    hosts: the names it answers to, in small letters and without a port; None: any. origins: those of other pages that
    may use it; "*" is any.
    """

    def __init__(self, app, hosts, origins):
        self.app = app
        self.hosts = hosts
        self.origins = origins

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            for host in hosts:  # a browser always sends one
                if self.hosts is not None and host_name(host) not in self.hosts:
                    raise APIError("this server does not answer to the name in the Host header: --allowed_hosts= names "
                                   "it", 403, code="unknown_host")
            origin = header(scope, b"origin")
            if origin and scope["method"] not in ("GET", "HEAD") and not self.may_use(origin, hosts):
                raise APIError("pages of this origin may not use this server: --cors_origins= names it", 403,
                               code="unknown_origin")
        await self.app(scope, receive, send)

    def may_use(self, origin, hosts):
        if origin in self.origins or "*" in self.origins:
            return True
        try:
            own = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return bool(own) and [own] == [host.lower() for host in hosts]  # a proxy in front may speak https


def host_name(host):
    """The name in a Host header, without its port: "[::1]:8000" -> "::1"."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def known_hosts(bound, allowed):
    """The names that a server answers to, or None for any: one that other machines reach has names it cannot know."""
    names = {host_name(host) for host in allowed}
    if is_loopback(bound):
        return names | {*LOOPBACK, bound.lower()}
    return names or None


def is_loopback(host):
    """Whether only this machine reaches a server that is bound to `host`, a name or an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Key:
    """Asks for the API key, if there is one: as "Authorization: Bearer KEY", or as the password of HTTP Basic, for
    which a browser asks its user."""

    def __init__(self, app, key):
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and self.key and scope["path"] not in OPEN_PATHS:
            given = given_key(header(scope, b"authorization"))
            # takes as long for a key that is almost right
            if not secrets.compare_digest(given, self.key):
                kind = 'Basic realm="minichat", charset="UTF-8"' if scope["path"] == "/" else "Bearer"
                message = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
                error = APIError(message, 401, code="invalid_api_key", headers={"www-authenticate": kind})
                return await send_error(send, error)  # not raised: a page of another origin reads it through CORS
        await self.app(scope, receive, send)


def given_key(authorization):
    """The key in an Authorization header, as bytes; empty if there is none."""
    kind, _, value = authorization.strip().partition(" ")
    value = value.strip()
    if kind.lower() == "bearer":
        return value.encode("latin-1")
    if kind.lower() == "basic":
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(value, validate=True).partition(b":")[2]
    return b""


class Body:
    """Counts the bytes of a body while it is read, and refuses one with more than `most`: at once if its
    Content-Length says so, else where it gets there. The rest is dropped, so it takes no memory."""

    def __init__(self, app, most):
        self.app = app
        self.most = most

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = header(scope, b"content-length")
        if length.isdecimal() and int(length[:20]) > self.most:
            return await self.refuse(receive, send)
        read = 0
        started = False

        async def receive_counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise TooLarge
            return message

        async def send_noted(message):
            nonlocal started
            started = True
            await send(message)

        await self.app(scope, receive_counted, send_noted)
        if read > self.most and not started:
            await self.refuse(receive, send)

    async def refuse(self, receive, send):
        """Answer 413, and then read what the client still sends: if the connection were closed before, many clients
        would report that instead of the answer."""
        error = APIError(f"the body has more than {self.most:,} bytes", 413, code="body_too_large",
                         headers={"connection": "close"})
        await send_error(send, error, more_body=True)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(drop_body(receive), DROP_SECONDS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class TooLarge(Exception):
    """A body has more bytes than it may. The app returns without an answer then: the layer Body gives it."""


async def drop_body(receive):
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return
