"""Trackers get what metrics.jsonl gets, and a run neither fails nor waits for one."""

import http.server
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from runs import ROOT, checkpoints, differences, one_error, outcome, records

from training import track
from training.track import Tracker, flat

pytest_plugins = ["runs"]


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """As on a machine where nobody has logged in to anything."""
    for key in [key for key in os.environ if key.startswith(("WANDB_", "TRACKIO_", "NETRC"))]:
        monkeypatch.delenv(key)
    compiled = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"  # fused.cpp is compiled there already
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.fixture
def said():
    return []


@pytest.fixture
def run_train(run_script, tiny_settings):
    """train.py as a user starts it, in a process that ends as Python does."""
    return lambda out, *flags: run_script("train.py", *tiny_settings, f"--out_dir={out}", *flags)


# -----------------------------------------------------------------------------
# What is sent


def test_a_record_is_flattened():
    record = {"step": 3, "loss": 2.5, "mfu": None, "val_sha256": "ab", "attn_entropy": [1.0, math.nan],
              "grad_norms": {"embed": 1, "layer_0": None}, "lr": math.inf}
    assert flat(record) == {"step": 3, "loss": 2.5, "attn_entropy/layer_0": 1.0, "grad_norms/embed": 1}


class Recorder(ModuleType):
    """A stand-in for a tracker's package that notes what it is told, and fails at `fault`."""

    def __init__(self, name, fault=None):
        super().__init__(name)
        self.told, self.fault = [], fault

    def note(self, kind, *args, **kwargs):
        self.told.append((kind, args, kwargs))
        if kind == self.fault:
            raise RuntimeError(f"{kind} failed\nat length")

    def init(self, **kwargs):
        self.note("init", **kwargs)
        return SimpleNamespace(log=lambda *args, **kwargs: self.note("log", *args, **kwargs),
                               finish=lambda: self.note("finish"))


@pytest.mark.parametrize("fault", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_left_alone(fault, tmp_path, said, monkeypatch):
    package = Recorder("trackio", fault)
    monkeypatch.setitem(sys.modules, "trackio", package)
    tracker = Tracker("trackio", tmp_path, {}, "p", "n", 0, said.append)
    for step in range(1, 4):
        tracker.log({"step": step, "loss": 1.0})
    tracker.finish()
    tracker.finish()
    assert said == [f"tracker=trackio does not work ({fault} failed); everything is in metrics.jsonl"]
    kinds = [kind for kind, *_ in package.told]
    assert kinds == {"init": ["init"], "log": ["init", "log", "finish"],
                     "finish": ["init", "log", "log", "log", "finish"]}[fault]


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_said(kind, tmp_path, said, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Tracker(kind, tmp_path, {}, "p", "n", 0, said.append).log({"step": 1})
    assert said == [f"tracker={kind} does not work ({kind} is not installed: pip install -e '.[track]'); "
                    "everything is in metrics.jsonl"]


def test_no_tracker_does_nothing(tmp_path, said):
    tracker = Tracker("", tmp_path, {}, "p", "n", 0, said.append)
    tracker.log({"step": 1})
    tracker.finish()
    assert not said and not tracker.where and not list(tmp_path.iterdir())


def test_a_run_that_goes_on_has_its_id_and_another_has_another(tmp_path):
    first = track.id_of(tmp_path, resumed=False)
    assert track.id_of(tmp_path, resumed=True) == first and len(first) == 8
    assert track.id_of(tmp_path, resumed=False) != first


@pytest.mark.parametrize("how", ["missing", "fails"])
def test_a_run_goes_on_without_its_tracker(how, tiny, finished, tmp_path):
    """One warning, the same numbers, exit code 0."""
    package = "sys.modules['trackio'] = None" if how == "missing" else """
class Broken:
    def __getattr__(self, name):
        raise RuntimeError("the server is gone")
sys.modules['trackio'] = Broken()"""
    done = tiny(tmp_path, tracker="trackio", before="import sys\n" + package)
    assert done.code == 0, done.err
    assert done.err.startswith("warning: tracker=trackio does not work (") and done.err.count("\n") == 1
    assert differences(outcome(tmp_path), outcome(finished)) == []
    warning, = (e for e in records(tmp_path, "events.jsonl") if e["event"] == "warning")
    assert "trackio" in warning["message"]


FAKE = """
import sys, types
def note(*what):
    print("told", *what)
run = types.SimpleNamespace(log=lambda values, step: note("log", step, values["loss"]), finish=lambda: note("finish"))
sys.modules["trackio"] = types.SimpleNamespace(init=lambda **kwargs: note("init", kwargs["name"]) or run)
"""


def told(done):
    return [line.split()[1:] for line in done.out.splitlines() if line.startswith("told ")]


def test_each_record_is_sent_and_a_resumed_run_keeps_its_name(tiny, tmp_path):
    done = tiny(tmp_path, before=FAKE, tracker="trackio", max_iters=4, lr_decay_iters=12, wandb_run_name="mine")
    assert done.code == 0, done.err
    first = told(done)
    assert [kind for kind, *_ in first] == ["log"] * 4, "trackio's own lines are not shown"
    assert [(int(step), float(loss)) for _, step, loss in first] == [(r["step"], r["loss"]) for r in records(tmp_path)]
    assert "tracker     trackio" in done.out
    name = (tmp_path / "tracker_id").read_text()
    assert tiny(tmp_path, before=FAKE, tracker="trackio", init_from="resume", lr_decay_iters=12).code == 0
    assert (tmp_path / "tracker_id").read_text() == name


def test_rank_0_alone_has_a_tracker(tiny, tmp_path):
    package = tmp_path / "packages" / "trackio.py"
    package.parent.mkdir()
    package.write_text("import os\n"
                       "open(os.environ['TOLD'], 'a').write(os.environ['RANK'])\n"
                       "class Run:\n    log = finish = lambda self, *args, **kwargs: None\n"
                       "init = lambda **kwargs: Run()\n", encoding="utf-8")
    settings = dict(gradient_accumulation_steps=2, max_iters=2, eval_interval=2, warmup_iters=0, tracker="trackio")
    done = tiny(tmp_path / "run", ranks=2, before=f"import sys\nsys.path.insert(0, {str(package.parent)!r})",
                env={"TOLD": tmp_path / "told"}, **settings)
    assert done.code == 0, done.err
    assert (tmp_path / "told").read_text() == "0"


@pytest.mark.parametrize("settings, named", [
    (dict(tracker="mlflow"), "tracker='mlflow' is not one of nothing, wandb, trackio, tensorboard"),
    (dict(probe_interval=-1), "probe_interval=-1"),
    (dict(peak_flops=-1.0), "peak_flops=-1.0"),
])
def test_a_mistake_gets_one_line(settings, named, tiny, tmp_path):
    assert named in one_error(tiny(tmp_path / "run", **settings), tmp_path / "run")


# -----------------------------------------------------------------------------
# wandb itself


def wandb_records(run_dir, id):
    """The records of all offline runs under `run_dir` with this id: wandb's file is a LevelDB log of protobufs."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = []
    for path in sorted((run_dir / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb")):
        data, at, message = path.read_bytes(), 7, b""  # after the file's own header
        while at < len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768  # the rest of a block that is too short for a header is empty
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            message += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part of one
                record = pb.Record()
                record.ParseFromString(message)
                found.append(record)
                message = b""
    return found


def wandb_history(found):
    """By record what was logged, names and values."""
    rows = [r.history for r in found if r.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


@pytest.mark.slow
def test_wandb_offline_has_the_values_and_goes_on_after_a_resume(run_train, tmp_path):
    """Without a key or a network no question is asked; a second half has the id of the first; nothing else changes."""
    pytest.importorskip("wandb")
    out, plain = tmp_path / "run", tmp_path / "plain"
    flags = ["--wandb_log=True", "--wandb_project=mine", "--wandb_run_name=first", "--probe_interval=2"]
    done = run_train(out, *flags, "--max_iters=3", "--lr_decay_iters=6")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "tracker     wandb offline (no key: wandb login); wandb sync " in done.stdout
    done = run_train(out, *flags, "--init_from=resume", "--lr_decay_iters=6")
    assert done.returncode == 0, done.stderr
    id = (out / "tracker_id").read_text(encoding="utf-8").strip()
    found = wandb_records(out, id)
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert {(r.run_id, r.project, r.display_name) for r in runs} == {(id, "mine", "first")} and len(runs) >= 2
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["n_embd"] == 16 and config["max_iters"] == 3
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [0, 0]
    rows, wanted = wandb_history(found), records(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, record in zip(rows, wanted, strict=True):
        assert {key: row[key] for key in flat(record)} == flat(record)
    assert rows[1]["attn_entropy/layer_0"] == wanted[1]["attn_entropy"][0]
    assert rows[3]["grad_norms/embed"] == wanted[3]["grad_norms"]["embed"]

    assert run_train(plain, "--probe_interval=2", "--lr_decay_iters=6").returncode == 0
    assert differences(outcome(out), outcome(plain)) == []


def test_wandb_hears_of_a_run_that_was_stopped(words, tmp_path):
    """A signal to the whole group, as Ctrl-C in a terminal sends it, leaves a checkpoint and a whole offline run."""
    pytest.importorskip("wandb")
    flags = dict(dataset=words, out_dir=tmp_path / "run", batch_size=2, block_size=8, n_layer=1, n_head=2, n_embd=16,
                 max_iters=1000000, eval_interval=1000000, warmup_iters=0, device="cpu", threads=1, tracker="wandb",
                 log_interval=10, lr_decay_iters=10)
    process = subprocess.Popen([sys.executable, "train.py", *(f"--{key}={value}" for key, value in flags.items())],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "tok/s" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert len(checkpoints(tmp_path / "run")) == 1
    found = wandb_records(tmp_path / "run", (tmp_path / "run" / "tracker_id").read_text(encoding="utf-8").strip())
    logged = [r["step"] for r in records(tmp_path / "run")]
    assert [row["step"] for row in wandb_history(found)] == logged
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [1]


@pytest.fixture(params=["no answer", "401", "no address"])
def server(request, monkeypatch):
    """Where wandb is to call at, with a key in the environment: a server that is silent, refuses or is not there."""
    silent, refuses = socket.create_server(("127.0.0.1", 0)), None
    address = f"http://127.0.0.1:{silent.getsockname()[1]}"
    if request.param == "401":
        class Refuses(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(401)
                self.end_headers()

            do_POST = do_GET

            def log_message(self, *args):
                pass

        refuses = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
        address = f"http://127.0.0.1:{refuses.server_port}"
        threading.Thread(target=refuses.serve_forever, daemon=True).start()
    elif request.param == "no address":
        address = "http://nowhere.invalid"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield address
    silent.close()
    if refuses:
        refuses.shutdown()
        refuses.server_close()


def test_wandb_goes_offline_where_its_server_does_not_help(server, tmp_path):
    """In a process of its own, as wandb keeps what it has read of the environment."""
    pytest.importorskip("wandb")
    code = ("import sys\nfrom training import track\n"
            "track.SECONDS = 1\n"
            "run = track.Tracker('wandb', sys.argv[1], {'a': 1}, 'p', 'n', 0, lambda text: print('warning', text))\n"
            "run.log({'step': 1, 'loss': 2.5})\n"
            "run.finish()\n"
            "print(run.where)\n")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.startswith("wandb offline (")
    id = (tmp_path / "tracker_id").read_text(encoding="utf-8").strip()
    assert wandb_history(wandb_records(tmp_path, id))[0]["loss"] == 2.5


def test_a_key_is_looked_for_where_wandb_does(tmp_path, monkeypatch):
    settings = SimpleNamespace(api_key=None, base_url="https://api.example.org")
    assert not track.has_key(settings)
    assert track.has_key(SimpleNamespace(api_key="x", base_url=settings.base_url))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine api.example.org login user password x\n", encoding="utf-8")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    assert track.has_key(settings)
    assert not track.has_key(SimpleNamespace(api_key=None, base_url="https://other.example.org"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert track.has_key(SimpleNamespace(api_key=None, base_url="https://other.example.org"))


def test_a_server_that_is_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(track, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not track.reachable(f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: time.sleep(5))  # a name that is looked up
    assert not track.reachable("http://slow.invalid")


# -----------------------------------------------------------------------------
# TensorBoard and trackio themselves


def scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_has_the_values_and_goes_on_after_a_kill(run_train, tmp_path):
    pytest.importorskip("tensorboard")
    flags = ["--tracker=tensorboard", "--probe_interval=2", "--lr_decay_iters=6"]
    assert run_train(tmp_path / "run", *flags, "--max_iters=5").returncode == 0
    shutil.rmtree(tmp_path / "run" / "ckpt" / "step_00000005")  # as if it had been killed after step 5
    done = run_train(tmp_path / "run", *flags, "--init_from=resume")
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr  # that max_iters is another
    found, wanted = scalars(tmp_path / "run" / "tensorboard"), records(tmp_path / "run")
    for record in wanted:
        for key, value in flat(record).items() - {("step", record["step"])}:
            assert found[key][record["step"]] == pytest.approx(value, rel=1e-6), key
    assert list(found["loss"]) == [1, 2, 3, 4, 5, 6] and list(found["attn_entropy/layer_0"]) == [2, 4, 6]


def test_trackio_has_the_values_and_goes_on_after_a_resume(run_train, tmp_path):
    """Its folder holds an SQLite file by project."""
    pytest.importorskip("trackio")
    out, flags = tmp_path / "run", ["--tracker=trackio", "--wandb_project=mine", "--wandb_run_name=first"]
    for more in (["--max_iters=3", "--lr_decay_iters=6"], ["--init_from=resume", "--lr_decay_iters=6"]):
        done = run_train(out, *flags, *more)
        assert done.returncode == 0 and "trackio" not in done.stderr, done.stderr
    with sqlite3.connect(tmp_path / "trackio" / "mine.db") as file:
        rows = file.execute("select run_name, step, metrics from metrics order by step").fetchall()
    name = f"first-{(out / 'tracker_id').read_text(encoding='utf-8').strip()}"
    assert [row[:2] for row in rows] == [(name, step) for step in range(1, 7)]
    for (_, _, found), record in zip(rows, records(out), strict=True):
        assert json.loads(found).items() >= flat(record).items() - {("step", record["step"])}
