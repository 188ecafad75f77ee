"""A run survives what happens around it: a second trainer, logs that vanish, an evaluation that fails, output that
nobody reads, a closed terminal, full memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from runs import ROOT, checkpoints, differences, leftovers, one_error, outcome, records

import checkpoint
import train as train_script
from files import FolderLock, LastingFile

pytest_plugins = ["runs"]

# `at(n, name, what)`: the n-th call of optim.Optimizers.step, monitor.Run.metrics, ... does `what` first
AT = """
import importlib, os, shutil, signal
def at(n, name, what):
    *path, last = name.split(".")
    owner = importlib.import_module(path[0])
    for part in path[1:]:
        owner = getattr(owner, part)
    real, calls = getattr(owner, last), []
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            what()
        return real(*args, **kwargs)
    setattr(owner, last, call)
def broken(error):
    raise error
"""


# -----------------------------------------------------------------------------
# One trainer per folder


@pytest.mark.parametrize("init_from", ["scratch", "resume", "auto"])
def test_a_second_trainer_is_refused_and_the_holder_named(init_from, tiny, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    lock = FolderLock(out)
    lock.take()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    error = one_error(tiny(out, init_from=init_from, max_iters=20))
    assert f"process {os.getpid()} on " in error and "another process is training into" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    lock.let_go()
    assert not (out / ".lock").exists()
    assert tiny(out, init_from="resume", max_iters=13).code == 0


def test_a_lock_that_a_dead_process_left_blocks_nobody(tiny, tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "yesterday"}))
    assert tiny(tmp_path).code == 0
    assert not (tmp_path / ".lock").exists()


def test_of_two_that_begin_at_once_one_does_not_mix_with_the_other(tiny, finished, tmp_path):
    """The first has come and gone between the second's check of the folder and its lock."""
    copy = f"shutil.copytree({str(finished)!r}, {str(tmp_path / 'run')!r}, dirs_exist_ok=True)"
    before = AT + f"at(2, 'files.FolderLock.take', lambda: {copy})"
    done = tiny(tmp_path / "run", before=before)
    assert done.code == 2 and "another process has trained into" in done.err
    assert checkpoints(tmp_path / "run") == checkpoints(finished)


def test_a_file_system_without_locks_is_a_warning(tiny, tmp_path):
    none = AT + "import errno\nat(1, 'fcntl.flock', lambda: broken(OSError(errno.ENOLCK, 'No locks available')))"
    done = tiny(tmp_path, before=none)
    assert done.code == 0 and done.err.startswith("warning: ") and "without locks" in done.err
    assert done.err.count("\n") == 1


def test_a_lock_whose_file_was_replaced_is_taken_again(tmp_path):
    """The holder removes the file while another opens it: the other must not hold a file that is gone."""
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    opened = os.open(first.path, os.O_RDWR)
    first.let_go()
    second.take()
    stale = os.fdopen(opened, "r+b", buffering=0)
    assert not second.is_in_folder(stale) and second.is_in_folder(second.file)
    with pytest.raises(ValueError, match="another process"):
        FolderLock(tmp_path).take()
    second.let_go()


# -----------------------------------------------------------------------------
# Logs


@pytest.mark.parametrize("gone", [("metrics.jsonl",), ("events.jsonl",), ("metrics.jsonl", "events.jsonl")])
def test_logs_that_are_removed_are_begun_again(gone, tiny, finished, tmp_path):
    remove = "; ".join(f"os.remove({str(tmp_path / name)!r})" for name in gone)
    done = tiny(tmp_path, before=AT + f"at(6, 'optim.Optimizers.step', lambda: exec({remove!r}))")
    assert done.code == 0 and checkpoints(tmp_path) == [4, 8, 12]
    assert done.err.startswith("warning: ") and done.err.count("\n") == 1 and gone[0] in done.err
    if "metrics.jsonl" in gone:
        assert [r["step"] for r in records(tmp_path)] == list(range(6, 13))
    assert set(differences(outcome(tmp_path), outcome(finished))) <= {"metrics"}


@pytest.mark.parametrize("how", ["shutil.move({0!r}, {0!r} + '_moved')", "shutil.rmtree({0!r})"])
def test_a_folder_that_is_moved_or_removed_is_made_again(how, tiny, tmp_path):
    out = tmp_path / "run"
    done = tiny(out, before=AT + f"at(6, 'optim.Optimizers.step', lambda: {how.format(str(out))})")
    assert done.code == 0 and done.err.count("\n") == 1 and "moved" in done.err
    assert checkpoints(out) == [8, 12]
    assert {"config.json", "env.json", "tokenizer.json", "metrics.jsonl"} <= {path.name for path in out.iterdir()}
    assert tiny(out, init_from="resume", max_iters=13).code == 0


def test_logs_that_cannot_be_written_do_not_keep_a_checkpoint_from_the_disk(tiny, finished, tmp_path):
    full = AT + """
from training import monitor
def full(run, path, to_disk=False):
    raise OSError(28, "No space left on device")
monitor.Run._flush = full
"""
    done = tiny(tmp_path, before=full)
    assert done.code == 0 and checkpoints(tmp_path) == [4, 8, 12]
    assert done.err.count("\n") == 1 and "No space left" in done.err


# -----------------------------------------------------------------------------
# Saved before evaluated

FAULTS = {
    "an error": ("RuntimeError('evaluation')", 1),
    "killed": (None, -signal.SIGKILL),
}


@pytest.mark.parametrize("n, step", [(2, 8), (3, 12)])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_in_an_evaluation_loses_nothing(fault, n, step, tiny, finished, tmp_path):
    """The checkpoint exists, and a resume repeats the evaluation: the same bits, records included."""
    error, code = FAULTS[fault]
    what = f"broken({error})" if error else "os.kill(os.getpid(), signal.SIGKILL)"
    done = tiny(tmp_path, before=AT + f"at({n}, 'eval.evaluate', lambda: {what})")
    assert done.code == code and checkpoints(tmp_path)[-1] == step
    assert checkpoint.find(tmp_path)[1]["val_loss"] is None
    done = tiny(tmp_path, init_from="resume")
    assert done.code == 0 and done.err == ""
    assert differences(outcome(tmp_path), outcome(finished)) == []
    assert [r["step"] for r in records(tmp_path) if "val_loss" in r] == [4, 8, 12]


def test_a_sample_that_fails_loses_nothing(tiny, tmp_path):
    done = tiny(tmp_path, before=AT + "at(1, 'infer.stream', lambda: broken(RuntimeError('sample')))", sample_tokens=4)
    assert done.code == 1 and checkpoints(tmp_path) == [4]
    assert tiny(tmp_path, init_from="resume", sample_tokens=4).code == 0
    assert checkpoints(tmp_path) == [4, 8, 12]


def test_a_second_signal_in_the_evaluation_loses_nothing(tiny, finished, tmp_path):
    twice = "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]"
    done = tiny(tmp_path, before=AT + f"at(1, 'eval.evaluate', lambda: {twice})")
    assert done.code == -signal.SIGINT and checkpoints(tmp_path) == [4]
    assert tiny(tmp_path, init_from="resume").code == 0
    assert differences(outcome(tmp_path), outcome(finished)) == []


def test_killed_while_a_checkpoint_learns_its_loss(tiny, finished, tmp_path):
    for instant in ("before", "after"):
        out = tmp_path / instant
        kill = "os.kill(os.getpid(), signal.SIGKILL)"
        half = AT + (f"at(1, 'checkpoint.write_whole', lambda: {kill})" if instant == "before" else
                     f"at(2, 'checkpoint.prune', lambda: {kill})")
        assert tiny(out, before=half).code == -signal.SIGKILL
        checkpoint.verify(list(checkpoint.steps(out).values())[-1])
        assert tiny(out, init_from="resume").code == 0
        assert differences(outcome(out), outcome(finished)) == []


@pytest.mark.parametrize("where", ["at the beginning", "in the last window"])
def test_validation_tokens_are_read_before_the_first_step(where, tiny, words, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(words, data)
    (data / "manifest.json").unlink()
    raw = bytearray((data / "val_000000.bin").read_bytes())
    place = 1024 if where == "at the beginning" else len(raw) - 2
    raw[place : place + 2] = b"\xff\x7f"
    (data / "val_000000.bin").write_bytes(raw)
    assert "32767" in one_error(tiny(tmp_path / "run", dataset=data, eval_iters=0), tmp_path / "run")


# -----------------------------------------------------------------------------
# Nobody reads


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_an_output_that_is_full_ends_no_run(tiny, tmp_path):
    assert tiny(tmp_path, tty="/dev/full").code == 0
    assert checkpoints(tmp_path) == [4, 8, 12]


@pytest.mark.parametrize("redirect", ["| head -n 1", ">&-", "2>&- >&-", "2>/dev/full"])
def test_an_output_that_nobody_reads_ends_no_script(redirect, words, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("To be, or not to be\n" * 50)
    prepare = f"data/shakespeare_char/prepare.py --input={text} --out_dir={tmp_path / 'data'}"
    command = f"set -o pipefail; {sys.executable} {prepare} {redirect}; echo code=$? >{tmp_path / 'code'}"
    subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True)
    assert (tmp_path / "code").read_text() == "code=0\n" and (tmp_path / "data" / "manifest.json").exists()


def test_what_cannot_be_written_is_dropped():
    reader, writer = os.pipe()
    os.close(reader)
    assert LastingFile(writer, "w").write(b"nobody") == 6


# -----------------------------------------------------------------------------
# Signals


def test_a_closed_terminal_stops_a_run_saved(tiny, finished, tmp_path):
    done = tiny(tmp_path, before=AT + "at(3, 'optim.Optimizers.step', lambda: os.kill(os.getpid(), signal.SIGHUP))")
    assert done.code == 128 + signal.SIGHUP and checkpoints(tmp_path) == [3] and leftovers(tmp_path) == []
    assert "stopped by SIGHUP after step 3, saved" in done.out
    assert tiny(tmp_path, init_from="resume").code == 0
    assert differences(outcome(tmp_path), outcome(finished)) == []


def test_nohup_is_heeded(tiny, tmp_path):
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    hang_up = "at(3, 'optim.Optimizers.step', lambda: os.kill(os.getpid(), signal.SIGHUP))"
    assert tiny(tmp_path, before=AT + ignored + hang_up).code == 0


def test_handlers_are_put_back():
    """As after %run train.py in a notebook, whose interrupt button is SIGINT."""
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(signum) for signum in watched]
    stop = train_script.StopSignal()
    stop.listen()
    assert signal.getsignal(signal.SIGINT) == stop.caught
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signum == signal.SIGTERM
    stop.put_back()
    assert [signal.getsignal(signum) for signum in watched] == before


def test_in_a_thread_there_are_no_signals():
    stop = train_script.StopSignal()
    thread = threading.Thread(target=stop.listen)
    thread.start()
    thread.join()
    assert stop.handlers == {} and signal.getsignal(signal.SIGINT) != stop.caught


# -----------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("error", [
    "RuntimeError('[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can\\'t allocate memory: you tried to '"
    " 'allocate 4096 bytes. Error code 12 (Cannot allocate memory)')",
    "MemoryError('no room for an array')",
])
def test_a_full_memory_is_one_line(error, tiny, tmp_path):
    done = tiny(tmp_path, before=AT + f"at(2, 'optim.Optimizers.step', lambda: broken({error}))")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "memory is full" in done.err and "--batch_size=2" in done.err


def test_another_error_keeps_its_traceback(tiny, tmp_path):
    """Negative control of the test above."""
    done = tiny(tmp_path, before=AT + "at(2, 'optim.Optimizers.step', lambda: broken(RuntimeError('a bug')))")
    assert done.code == 1 and "Traceback" in done.err
