"""
The process around the routes: its socket, its signals, its end. uvicorn speaks HTTP.

    server = Server(service, listen("127.0.0.1", 8000), announce)
    code = server.serve_until_end()

A first SIGTERM or Ctrl-C drains: no new connections, and what runs may finish. A second one ends the process at once.
"""

import asyncio
import os
import socket
import sys
import traceback

import uvicorn

from serving.app import LoadRefused
from serving.guards import is_loopback

# Seconds after which a thread that waits for the interpreter's lock is given it. The engine lets go of the lock in every
# operation of torch, and with Python's 0.005 it would wait that long for it each time the loop sends something.
SWITCH_INTERVAL = 0.0005
PATIENCE = 2  # seconds after drain, for the last bytes to reach clients that still read


def listen(host, port):
    """A socket that listens. port 0: a free one. Raises OSError with a message for the user."""
    place = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise OSError(f"--host={host}: no such address ({getattr(error, 'strerror', None) or error})") from None
    try:
        if os.name != "nt":  # there it would take the port of another program
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"{place} cannot be listened at ({error.strerror or error}): --port=0 takes a free one") from None
    return listener


def url_of(listener):
    """Where a browser on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until a signal comes or the engine ends. announce(server) is called once, when the model is loaded."""

    def __init__(self, service, listener, announce):
        super().__init__(uvicorn.Config(
            service.app, loop="auto", http="auto",  # uvloop and httptools where they are installed
            ws="none", lifespan="on", interface="asgi3", log_config=None, log_level="warning", access_log=False,
            proxy_headers=False, server_header=False,
            timeout_graceful_shutdown=int(service.c.drain) + 3 * PATIENCE,  # never reached: see shutdown
        ))
        self.service = service
        self.worker = service.worker
        self.listener = listener
        self.announce = announce
        self.announced = False
        self.worker.on_end = self.stop_after_end
        self.url = url_of(listener)
        self.is_loopback = is_loopback(listener.getsockname()[0])

    def serve_until_end(self):
        """-> exit code: 0 after a signal, 1 if the engine failed while it served, 2 if the load ended with a message.
        Another error of the load is raised."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        self.run(sockets=[self.listener])
        if isinstance(self.worker.failure, LoadRefused):
            return 2
        if self.worker.state == "failed":
            raise self.worker.failure
        return 1 if self.worker.state == "dead" else 0

    def stop(self):
        """Drain, and then end. Any thread may call it."""
        self.should_exit = True

    def stop_after_end(self, worker):
        if worker.state == "dead":
            traceback.print_exception(worker.failure)
        self.should_exit = True

    def handle_exit(self, number, frame):
        """uvicorn's handler of signals. Its own would repeat the signal at the end, so that no exit code is 0."""
        if self.should_exit:
            os._exit(128 + number)  # nothing is on its way to a disk
        self.should_exit = True

    async def on_tick(self, counter):
        """uvicorn calls this ten times a second. -> whether to end"""
        if self.worker.state == "ready" and not self.announced:
            self.announced = True
            self.announce(self)
        return await super().on_tick(counter)

    async def shutdown(self, sockets=None):
        """Close the sockets, let the worker drain, and end. A client that does not read its answer, or never ends its
        question, is not waited for."""
        if self.worker.state == "ready":
            self.worker.drain(self.service.c.drain)
        loop = asyncio.get_running_loop()
        stragglers = loop.call_later(self.service.c.drain + PATIENCE, self.drop_connections)
        await super().shutdown(sockets)
        stragglers.cancel()
        if self.worker.state != "loading":  # a load cannot be stopped, and nobody waits for its end
            await self.worker.ended()

    def drop_connections(self):
        for connection in list(self.server_state.connections):
            connection.transport.abort()
