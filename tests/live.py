"""
A running server for tests, in a thread of the test's process or as a process of its own.

    with live(folder) as server:                          # settings of serve.py as arguments: max_queue=2
        httpx.get(server.url + "/health")
        server.worker.steps                               # a look inside
    with process(folder, "--max_queue=2") as running:     # arguments of serve.py
        running.process.terminate()

Neither needs pytest. Both listen at a free port, and compute on the CPU in fp32.
"""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import serve
from configurator import Settings, read_keys

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 20  # seconds for the server to start or end; only a failing test waits so long
SETTINGS = {"host": "127.0.0.1", "port": 0, "device": "cpu", "dtype": "float32", "compile": False}


def settings(folder, **changes):
    """The settings of serve.py, as the command line would make them."""
    defaults = {name: key.default for name, key in read_keys(ROOT / "serve.py").items()}
    return Settings(defaults).changed(out_dir=str(folder), **{**SETTINGS, **changes})


class Live:
    """A server in a thread. url; worker; service; stop() and the `code` it ended with, or the `failure` of its load."""

    def __init__(self, c, load=None):
        self.ready = threading.Event()  # loaded, or ended before
        self.code = None
        self.failure = None
        self.server = serve.make_server(serve.check(c), load, lambda server: self.ready.set())
        self.service = self.server.service
        self.worker = self.server.worker
        self.url = self.server.url
        self.thread = threading.Thread(target=self.run, name="server", daemon=True)
        self.thread.start()

    def run(self):
        try:
            self.code = self.server.serve_until_end()
        except BaseException as error:
            self.failure = error
        finally:
            self.ready.set()

    def stop(self):
        """Drain and end, as SIGTERM does. -> exit code"""
        self.server.stop()
        return self.wait()

    def wait(self):
        """Until the server has ended. -> exit code"""
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the server does not end"
        return self.code


@contextlib.contextmanager
def live(folder, load=None, wait=True, **changes):
    """A Live of the model in `folder`. changes: settings of serve.py. load: a function to load with, -> (Engine,
    Served). wait: until it is loaded."""
    server = Live(settings(folder, **changes), load)
    try:
        if wait:
            assert server.ready.wait(PATIENCE), "the model is never loaded"
            if server.failure:
                raise server.failure
        yield server
    finally:
        server.stop()


class Process:
    """serve.py as a process. url, once it is ready; ready_line."""

    def __init__(self, folder, args, script, environment):
        command = [sys.executable, str(script), f"--out_dir={folder}", *args]
        for name, value in SETTINGS.items():
            if not any(arg.startswith(f"--{name}=") for arg in args):
                command.append(f"--{name}={value}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        environment = {name: value for name, value in environment.items() if value is not None}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        encoding="utf-8", env=environment)
        self.ready_line = ""
        self.url = ""
        self.out = ""

    def wait_until_ready(self):
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        self.ready_line = self.process.stdout.readline()
        timer.cancel()
        self.url = self.ready_line.partition(" ")[0]
        if not self.url:
            raise RuntimeError(f"serve.py ended with {self.process.wait(PATIENCE)}: {self.process.stderr.read()}")

    def end(self):
        """Wait for the end. -> (exit code, stderr)"""
        self.out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err

    def signal(self, number):
        self.process.send_signal(number)


@contextlib.contextmanager
def process(folder, *args, wait=True, script=ROOT / "serve.py", **environment):
    """A Process of serve.py. args: of its command line; environment: more variables; None removes one. wait: until it
    is ready. script: another program that takes the same arguments."""
    running = Process(folder, args, script, environment)
    try:
        if wait:
            running.wait_until_ready()
        yield running
    finally:
        running.process.kill()
        running.process.communicate()
