"""Checkpoints: killed at any instant, damaged, on a full disk; writing, finding and pruning them."""

import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import HARD, checkpoints, differences, leftovers, losses, one_error, outcome, records
from safetensors.torch import load_file

import checkpoint
import export
import infer
from checkpoint import CheckpointError
from model import GPT, GPTConfig
from optim import Optimizers
from training import saver

pytest_plugins = ["runs"]

# -----------------------------------------------------------------------------
# Killed at any instant

# `die_at(owner, name, n, where, half)`: this process is gone at the n-th call of owner.name that has `where` in its
# arguments: before the call, or after `half` of it.
KILL = """
import os, shutil, signal, torch
from pathlib import Path
import checkpoint
from training import monitor

def die_at(owner, name, n, where="", half=lambda *args, **kwargs: None):
    real, calls = getattr(owner, name), []
    def call(*args, **kwargs):
        calls.extend([1] if where in " ".join(map(str, args)) else [])
        if len(calls) == n and where in " ".join(map(str, args)):
            half(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, call)
    return real

def half_model(tensors, path, metadata=None):
    save_file(tensors, path, metadata=metadata)
    os.truncate(path, os.path.getsize(path) // 2)

def half_optimizer(state, f):
    save(state, f)
    f.truncate(f.tell() // 2)

def half_text(path, text, encoding=None):
    write_text(path, text[:len(text) // 2])

def half_removed(folder, *args, **kwargs):
    os.remove(sorted(Path(folder).iterdir())[0])

def half_line(run, path, *args, **kwargs):
    line = run.pending[path][:-20]
    with open(path, "ab") as f:
        f.write(line)
"""

# while its second checkpoint is written, from the first byte to the last and after
INSTANTS = {
    "before the metrics are on the disk": "die_at(monitor.Run, 'flush', 2)",
    "half of model.safetensors": "save_file = die_at(checkpoint, 'save_file', 2, half=half_model)",
    "before optimizer.pt": "die_at(torch, 'save', 2)",
    "half of optimizer.pt": "save = die_at(torch, 'save', 2, half=half_optimizer)",
    "half of state.json": "write_text = die_at(Path, 'write_text', 2, 'state.json', half_text)",
    "files not yet synced": "die_at(checkpoint, 'sync', 2, 'model.safetensors')",
    "folder not yet synced": "die_at(checkpoint, 'sync', 11)",  # six a time, this is the fifth
    "before the rename": "die_at(os, 'replace', 2, '.writing_step')",
    "after the rename": "replace = die_at(os, 'replace', 2, '.writing_step', lambda *args: replace(*args))",
    "before the first is pruned": "die_at(checkpoint, 'prune', 2)",
    "half of the first is pruned": "die_at(shutil, 'rmtree', 1, '.writing_step', half_removed)",
    "half a line of metrics": "die_at(monitor.Run, '_flush', 6, 'metrics.jsonl', half_line)",
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_again_and_again_while_saving(optimizer, tiny, unbroken, tmp_path):
    """One run, killed at one instant after the other, each time continued by the same command."""
    settings = dict(HARD, optimizer=optimizer, max_iters=32, init_from="auto")
    for instant, fault in INSTANTS.items():
        done = tiny(tmp_path / "run", before=KILL + fault, **settings)
        assert done.code == -signal.SIGKILL, (instant, done.err)
        for folder in checkpoint.steps(tmp_path / "run").values():  # those of before, or the whole new one
            checkpoint.verify(folder)
    assert 0 < checkpoints(tmp_path / "run")[-1] < 32
    done = tiny(tmp_path / "run", **settings)
    assert done.code == 0 and done.err == ""
    assert differences(outcome(tmp_path / "run"), unbroken(**settings)) == []
    assert leftovers(tmp_path / "run") == []
    assert [e["event"] for e in records(tmp_path / "run", "events.jsonl")].count("resume") > 5


def test_killed_from_outside_at_any_moment(train, words, unbroken, tmp_path):
    """Once so many lines are logged; where in the step or a save that is, chance decides."""
    settings = dict(HARD, optimizer="muon", max_iters=60, init_from="auto", log_interval=3)
    out, kills, through = tmp_path / "run", 0, 0
    metrics = out / "metrics.jsonl"
    while kills < 6:
        pid = train.start(dataset=words, out_dir=out, **settings)
        while train.alive(pid) and (not metrics.exists() or metrics.read_bytes().count(b"\n") <= 2 * kills):
            time.sleep(0.002)
        if train.alive(pid):
            os.kill(pid, signal.SIGKILL)
        done = train.wait()
        kills += done.code == -signal.SIGKILL
        if done.code != -signal.SIGKILL:  # it was faster: once more
            assert done.code == 0 and (through := through + 1) < 20, done.err
            shutil.rmtree(out)
    done = train(dataset=words, out_dir=out, **settings)
    assert done.code == 0, done.err
    assert differences(outcome(out), unbroken(**settings)) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_resumes_exactly(dtype, tiny, unbroken, tmp_path):
    """And the loss scale, which here changes every other step, is saved and restored."""
    moving = """
        import functools, torch
        torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=1024.0, growth_interval=2)
    """
    settings = dict(HARD, optimizer="muon", dtype=dtype, max_iters=8, before=moving)
    expected = unbroken(**settings)
    kill = "\ndie_at(os, 'replace', 3, '.writing_step')"
    done = tiny(tmp_path, **settings | dict(before=textwrap.dedent(moving) + KILL + kill))
    assert done.code == -signal.SIGKILL and checkpoints(tmp_path)[-1] == 4
    done = tiny(tmp_path, init_from="resume", **settings)
    assert done.code == 0, done.err
    assert differences(outcome(tmp_path), expected) == []
    if dtype == "float16":
        assert expected["scaler"]["scale"] == 1024.0 * 2**4
    else:
        assert expected["scaler"] is None


@pytest.mark.parametrize(
    "fault, differs",
    [
        ("optim.Optimizers.load_state_dict = lambda self, saved: None", ["metrics", "model"]),
        ("start = loader.Loader.__init__\nloader.Loader.__init__ = lambda *a, first_step, **k: "
         "start(*a, first_step=first_step + 1, **k)", ["metrics", "model"]),
        ("checkpoint.load_model = lambda model, folder: None", ["metrics", "model"]),
        ("keyed = loader.keyed\nloader.keyed = lambda *parts: keyed(*parts, *['other'] * (parts[-1] == 'dropout'))",
         ["metrics", "model"]),
    ],
    ids=["optimizer state dropped", "data position shifted", "weights dropped", "other dropout"],
)
def test_a_resume_that_is_not_exact_is_seen(fault, differs, tiny, unbroken, tmp_path):
    """The negative control of all tests above: the same comparison, after a resume with a fault in it."""
    settings = dict(HARD, optimizer="muon", max_iters=8)
    kill = "die_at(os, 'replace', 3, '.writing_step')"
    assert tiny(tmp_path, before=KILL + kill, **settings).code == -signal.SIGKILL
    before = "import checkpoint, loader, optim\n" + fault
    assert tiny(tmp_path, before=before, init_from="resume", **settings).code == 0
    found = differences(outcome(tmp_path), unbroken(**settings))
    assert [part for part in found if part != "val_loss"] == differs


# -----------------------------------------------------------------------------
# Damaged checkpoints


class Malicious:
    def __reduce__(self):
        return os.system, ("echo executed >$MINICHAT_TEST_TRACE",)


def resign(folder):
    """Have state.json vouch for the files as they are now, so that its hashes do not give a change away."""
    path = folder / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["files"] = {name: checkpoint.file_sha256(folder / name) for name in state["files"]}
    state["sha256"] = checkpoint.own_sha256(state)
    path.write_text(json.dumps(state), encoding="utf-8")


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def malicious(path):
    torch.save({"adamw": {}, "muon": Malicious()}, path)
    resign(path.parent)


def keyless(path):
    state = {"step": 12}
    path.write_text(json.dumps({**state, "sha256": checkpoint.own_sha256(state)}), encoding="utf-8")


DAMAGES = {
    "truncated": ("model.safetensors", truncate),
    "bit-flipped": ("optimizer.pt", flip),
    "malicious": ("optimizer.pt", malicious),
    "missing": ("model.safetensors", Path.unlink),  # an optimizer.pt that is missing is no damage: see the end
    "garbage": ("state.json", lambda path: path.write_bytes(b"\xff\x00{")),
    "edited": ("state.json", lambda path: path.write_text(path.read_text().replace('"step": 12', '"step": 11'))),
    "keyless": ("state.json", keyless),
    "no state": ("state.json", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(damage, tiny, finished, tmp_path):
    name, spoil = DAMAGES[damage]
    out, trace = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(finished, out)
    spoil(out / "ckpt" / "step_00000012" / name)
    done = tiny(out, init_from="auto", env={"MINICHAT_TEST_TRACE": str(trace)})
    assert done.code == 0
    assert done.err.startswith("warning: ") and done.err.count("\n") == 1
    assert f"step_00000012/{name}" in done.err and "step_00000012.corrupt" in done.err
    assert leftovers(out) == ["step_00000012.corrupt"]
    assert differences(outcome(out), outcome(finished)) == []
    assert not trace.exists()


def test_the_malicious_file_would_have_run(tiny, tmp_path):
    """The negative control: without weights_only it is executed."""
    torch.save(Malicious(), tmp_path / "optimizer.pt")
    load = f"import torch\ntorch.load({str(tmp_path / 'optimizer.pt')!r}, weights_only=False)"
    done = tiny(tmp_path, before=load, max_iters=0, env={"MINICHAT_TEST_TRACE": str(tmp_path / "executed")})
    assert done.code == 2 and (tmp_path / "executed").exists()


def test_no_good_checkpoint_left_stops_the_run_each_time(tiny, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for folder in checkpoint.steps(out).values():
        flip(folder / "model.safetensors")
    first, second = tiny(out, init_from="auto"), tiny(out, init_from="auto")
    assert first.code == second.code == 2
    assert [line.split(":")[0] for line in first.err.splitlines()] == ["warning"] * 3 + ["error"]
    assert one_error(second) == first.err.splitlines(keepends=True)[-1]
    assert "no checkpoint that verifies" in second.err and "scratch" in second.err
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert tiny(out, init_from="scratch").code == 0


# -----------------------------------------------------------------------------
# Disk full

FULL = """
import resource, signal
import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that grows past the limit is an OSError, as on a full disk
save, count = checkpoint.save, []
def save_on_a_full_disk(*args):
    count.append(1)
    full = len(count) in {saves}
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit} if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        return save(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoint.save = save_on_a_full_disk
"""


@pytest.mark.parametrize("file, limit", [("model.safetensors", 10_000), ("optimizer.pt", 70_000)])
def test_disk_full_in_the_middle(file, limit, tiny, finished, tmp_path):
    """It is said, the run goes on, what was saved stays good, and when there is room again saving works again."""
    done = tiny(tmp_path, before=FULL.format(saves={2}, limit=limit))
    assert done.code == 0
    assert done.err.startswith("warning: no checkpoint at step 8: ") and done.err.count("\n") == 1
    assert os.strerror(27) in done.err and "make room" in done.err  # EFBIG, here; see below for ENOSPC
    assert checkpoints(tmp_path) == [4, 12] and leftovers(tmp_path) == []
    checkpoint.verify(tmp_path / "ckpt" / "step_00000004")
    assert [e["event"] for e in records(tmp_path, "events.jsonl")] == ["start", "warning", "end"]
    assert differences(outcome(tmp_path), outcome(finished)) == []


def test_disk_full_at_the_end(tiny, finished, tmp_path):
    done = tiny(tmp_path, before=FULL.format(saves={3}, limit=10_000))
    assert done.code == 1 and "no checkpoint at step 12" in done.err
    assert checkpoints(tmp_path) == [4, 8] and leftovers(tmp_path) == []
    assert tiny(tmp_path, init_from="auto").code == 0
    assert differences(outcome(tmp_path), outcome(finished)) == []


def test_disk_really_full(tiny, finished, tmp_path):
    """The same on a small file system, which only root can make: what does not fit is refused, the rest stays good."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = tiny(small / "run", keep_checkpoints=100, eval_interval=1)
        assert done.code == 1
        lines = done.err.splitlines()
        assert "GB are free" in lines[0] and len(lines) > 1  # said before the first step
        lost = [line for line in lines[1:] if line.startswith("warning: no checkpoint at step")]
        small_files = [line for line in lines[1:] if line not in lost]  # a page is a lot here
        assert lost and all("does not hold its val_loss" in line or "the logs of" in line for line in small_files)
        assert len(small_files) <= 2 and all(os.strerror(28) in line for line in (lost[0], *small_files))
        saved = checkpoints(small / "run")
        assert saved == list(range(1, len(saved) + 1)) and 1 <= len(saved) < 12 and leftovers(small / "run") == []
        for folder in checkpoint.steps(small / "run").values():
            checkpoint.verify(folder)
        for step in saved[1:]:
            shutil.rmtree(small / "run" / "ckpt" / f"step_{step:08d}")
        assert tiny(small / "run", keep_checkpoints=1, init_from="auto", eval_interval=4).code == 0
        assert outcome(small / "run")["tensors"].keys() == outcome(finished)["tensors"].keys()
        assert losses(small / "run") == losses(finished)
    finally:
        subprocess.run(["umount", str(small)], check=True)


# -----------------------------------------------------------------------------
# Writing and reading


@pytest.fixture
def trained():
    """A tiny model with a tied head and its optimizers after one step."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16))
    opt = Optimizers(model, optimizer="muon", learning_rate=1e-3)
    x = torch.arange(8)[None]
    model(x, x + 1, loss_only=True)[1].backward()
    opt.step()
    return model, opt


def put(out, trained, step, val_loss=None):
    return checkpoint.save(out, *trained, {"step": step, "val_loss": val_loss})


def test_what_is_written_is_what_is_read(trained, tmp_path):
    model, opt = trained
    folder = put(tmp_path, trained, 7, 1.5)
    assert folder == tmp_path / "ckpt" / "step_00000007"
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "optimizer.pt", "state.json"]
    state = checkpoint.verify(folder)
    assert state["step"] == 7 and state["val_loss"] == 1.5
    assert state["files"] == {name: checkpoint.file_sha256(folder / name) for name in checkpoint.FILES}

    other = GPT(model.config)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    checkpoint.load_model(other, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    saved, held = checkpoint.load_optimizer_state(folder), opt.state_dict()
    assert saved.keys() == held.keys() == {"adamw", "muon"}
    for kind in saved:
        assert saved[kind].keys() == held[kind].keys() and saved[kind]
        for name, values in saved[kind].items():
            assert values.keys() == held[kind][name].keys()
            assert all(torch.equal(value, held[kind][name][key]) for key, value in values.items())


def test_names_are_plain_and_a_tied_head_is_there_once(trained, tmp_path):
    tensors = load_file(put(tmp_path, trained, 1) / "model.safetensors")
    assert "transformer.wte.weight" in tensors and "lm_head.weight" not in tensors
    wrapped = torch.nn.Module()
    wrapped._orig_mod = trained[0]  # as torch.compile wraps it
    assert checkpoint.model_tensors(wrapped).keys() == tensors.keys() == dict(trained[0].named_parameters()).keys()


def test_the_same_state_is_the_same_bytes(trained, tmp_path):
    a, b = put(tmp_path / "a", trained, 1), put(tmp_path / "b", trained, 1)
    for name in (*checkpoint.FILES, "state.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_what_a_kill_left_is_removed_by_the_next_save(trained, tmp_path):
    (tmp_path / "ckpt" / ".writing_step_00000003").mkdir(parents=True)
    (tmp_path / "ckpt" / ".writing_step_00000003" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.steps(tmp_path) == {} and checkpoint.latest_good(tmp_path) is None
    put(tmp_path, trained, 4)
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["step_00000004"]


def test_another_shape_is_named(trained, tmp_path):
    folder = put(tmp_path, trained, 1)
    wider = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=32))
    with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.attn\.c_attn\.bias is \(48,\) there and \(96,\) in"):
        checkpoint.load_model(wider, folder)
    deeper = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\..* is None there"):
        checkpoint.load_model(deeper, folder)


def test_an_error_that_is_not_the_disks_is_not_taken_for_it(trained, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        put(tmp_path, trained, 1)
    assert leftovers(tmp_path) == []


def test_finding(trained, tmp_path):
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, None), (4, 1.0), (5, 2.0)):
        put(tmp_path, trained, step, val_loss)
    found = checkpoint.steps(tmp_path)
    assert list(found) == [1, 2, 3, 4, 5]
    for which, step in (("latest", 5), ("best", 2), ("3", 3), (4, 4)):
        folder, state = checkpoint.find(tmp_path, which)
        assert folder == found[step] and state["step"] == step
    assert checkpoint.find(found[1])[1]["step"] == 1  # one checkpoint's own folder
    with pytest.raises(CheckpointError, match="no checkpoint 'newest'.*latest, best, 1, 2, 3, 4, 5"):
        checkpoint.find(tmp_path, "newest")
    with pytest.raises(CheckpointError, match="nowhere holds no checkpoint"):
        checkpoint.find(tmp_path / "nowhere")


def test_no_best_without_an_evaluation(trained, tmp_path):
    put(tmp_path, trained, 1)
    with pytest.raises(CheckpointError, match="no evaluated checkpoint"):
        checkpoint.find(tmp_path, "best")


def test_finding_passes_over_a_damaged_one_and_leaves_it(trained, tmp_path):
    for step in (1, 2):
        put(tmp_path, trained, step)
    flip(tmp_path / "ckpt" / "step_00000002" / "model.safetensors")
    said = []
    assert checkpoint.find(tmp_path, warn=said.append)[1]["step"] == 1
    assert len(said) == 1 and "step_00000002" in said[0] and leftovers(tmp_path) == []
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.find(tmp_path, "2")
    truncate(tmp_path / "ckpt" / "step_00000001" / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints verifies"):
        checkpoint.find(tmp_path, warn=said.append)


def test_pruning_keeps_the_last_few_and_the_best(trained, tmp_path):
    for step, val_loss in ((1, 2.0), (2, 1.0), (3, None), (4, 1.5), (5, None), (6, None)):
        put(tmp_path, trained, step, val_loss)
    checkpoint.prune(tmp_path, 3)
    assert checkpoints(tmp_path) == [2, 4, 5, 6] and leftovers(tmp_path) == []
    checkpoint.prune(tmp_path, 0)  # the latest is always kept
    assert checkpoints(tmp_path) == [2, 6]


# -----------------------------------------------------------------------------
# Shards, here of one process; of several in test_parallel.py


def put_sharded(out, trained, step):
    return checkpoint.save_sharded(out, checkpoint.shards(*trained), {"step": step, "val_loss": None})


def the_shard(folder):
    return next(folder.glob("shard-*.safetensors"))


def test_consolidated_is_what_one_process_writes(trained, tmp_path, run_script):
    plain, shards = put(tmp_path / "plain", trained, 3), put_sharded(tmp_path / "run", trained, 3)
    assert sorted(p.name for p in shards.iterdir()) == [the_shard(shards).name, "state.json"]
    assert checkpoint.find(tmp_path / "run")[0] == shards, "and it is read as it is"
    other = GPT(trained[0].config)
    checkpoint.load_model(other, shards)
    assert all(torch.equal(a, b) for a, b in zip(trained[0].parameters(), other.parameters(), strict=True))
    done = run_script("checkpoint.py", "consolidate", tmp_path / "run")
    assert done.returncode == 0 and f"{shards} is a plain checkpoint now" in done.stdout, done.stderr
    assert checkpoints(tmp_path / "run") == [3] and leftovers(tmp_path / "run") == []
    assert (shards / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    states = [{(kind, name, key): t for kind, params in checkpoint.load_optimizer_state(folder).items()
               for name, values in params.items() for key, t in values.items()} for folder in (shards, plain)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][key]) for key, t in states[0].items())
    assert checkpoint.verify(shards)["val_loss"] is checkpoint.verify(plain)["val_loss"] is None
    assert "has no sharded checkpoint" in run_script("checkpoint.py", "consolidate", tmp_path / "run").stdout


def test_a_pickle_beside_the_shards_is_not_read(trained, tmp_path):
    """.metadata is what other storages of DCP unpickle."""
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = put_sharded(tmp_path, trained, 1)
    assert not (folder / ".metadata").exists()
    for name in (".metadata", "__0.metadata", "__0_0.distcp"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    checkpoint.latest_good(tmp_path)
    checkpoint.load_model(GPT(trained[0].config), folder)
    trained[1].load_state_dict(checkpoint.load_optimizer_state(folder, dict(trained[0].named_parameters())))
    checkpoint.consolidate(tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "executed").exists(), "negative control"


@pytest.mark.parametrize("damage", [flip, truncate, os.remove, lambda path: shutil.copy(path, f"{path}.safetensors")])
def test_a_damaged_shard_is_noticed(damage, trained, tmp_path):
    good, bad = (put_sharded(tmp_path, trained, step) for step in (1, 2))
    damage(the_shard(bad))
    with pytest.raises(CheckpointError, match="step_00000002/shard-.*(damaged|missing|does not belong)"):
        checkpoint.consolidate(tmp_path)
    said = []
    assert checkpoint.latest_good(tmp_path, said.append)[0] == good and "set aside" in said[0]
    assert checkpoints(tmp_path) == [1] and leftovers(tmp_path) == ["step_00000002.corrupt"]


def test_consolidation_that_was_killed_loses_nothing(trained, tmp_path):
    folder = put_sharded(tmp_path, trained, 1)
    folder.rename(folder.with_name("step_00000001.sharded"))
    (folder.parent / ".writing_step_00000001").mkdir()
    assert checkpoint.consolidate(tmp_path) == [folder] and leftovers(tmp_path) == []
    checkpoint.verify(folder)


def test_a_full_disk_leaves_no_shard(trained, tmp_path, monkeypatch):
    good = put_sharded(tmp_path, trained, 1)

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)  # DCP's own, at the end of a shard
    monkeypatch.setattr(checkpoint, "sync", lambda path: None)
    with pytest.raises(OSError, match="step_00000002 could not be written: No space left"):
        put_sharded(tmp_path, trained, 2)
    assert checkpoint.latest_good(tmp_path)[0] == good and leftovers(tmp_path) == []


# -----------------------------------------------------------------------------
# Shards are written while the steps go on


def test_shards_are_of_the_moment_and_written_later(trained, tmp_path, monkeypatch):
    """What changes meanwhile is not in them, nothing of their name is there before all is, and the next save waits."""
    plain = put(tmp_path / "plain", trained, 1)
    go, seen, begin = threading.Event(), [], checkpoint.begin

    def held_up(final):
        assert go.wait(60)
        seen.append((final.name, checkpoints(tmp_path)))
        begin(final)

    monkeypatch.setattr(checkpoint, "begin", held_up)
    behind, state = saver.Background(), {"step": 1, "val_loss": None, "window": [1.0]}
    behind.save(tmp_path, *trained, state, keep=2)
    state["window"].append(2.0)
    trained[1].step()
    assert checkpoints(tmp_path) == [] and not behind.done()
    go.set()
    behind.save(tmp_path, *trained, {"step": 2, "val_loss": None}, keep=2)
    behind.wait()
    assert seen == [("step_00000001", []), ("step_00000002", [1])] and leftovers(tmp_path) == []
    first, second = (tmp_path / "ckpt" / f"step_0000000{i}" for i in (1, 2))
    assert checkpoint.verify(first)["window"] == [1.0]
    for load in (checkpoint.load_model_tensors, checkpoint.load_optimizer_state):
        assert flat(load(first)).keys() == flat(load(plain)).keys()
        assert all(torch.equal(t, flat(load(plain))[key]) for key, t in flat(load(first)).items())
        assert not all(torch.equal(t, flat(load(second))[key]) for key, t in flat(load(first)).items())


def flat(tree, name=""):
    """Tensors of nested dicts by their path."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    return {path: t for key, value in tree.items() for path, t in flat(value, f"{name}/{key}").items()}


def test_an_error_behind_is_raised_once_where_it_is_waited_for(trained, tmp_path, monkeypatch):
    behind = saver.Background()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "finish", lambda *args: 1 / 0)
        behind.save(tmp_path, *trained, {"step": 1, "val_loss": None}, 1)
        with pytest.raises(ZeroDivisionError):
            behind.wait()
    behind.wait()
    behind.save(tmp_path, *trained, {"step": 2, "val_loss": None}, 1)
    behind.wait()
    assert checkpoints(tmp_path) == [2] and leftovers(tmp_path) == []


# the thread that writes is held up until the run waits for it, which is as late as it can be
LATE = """
import checkpoint, errno, optim, os, signal, threading
from training import saver
begin, wait, waited = checkpoint.begin, saver.Background.wait, threading.Event()
def held_up(final):
    assert waited.wait(60)
    begin(final)
def waits(self):
    if self.thread:
        waited.set()
    wait(self)
    waited.clear()
checkpoint.begin, saver.Background.wait = held_up, waits
"""
STOP = """
step, count = optim.Optimizers.step, []
def stop(self):
    count.append(1)
    if len(count) == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)
optim.Optimizers.step = stop
"""
NO_ROOM = """
finish, saves = checkpoint.finish, []
def full(*args):
    saves.append(1)
    if len(saves) == {n}:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finish(*args)
checkpoint.finish = full
"""
# while its second checkpoint is written
BEHIND = {
    "nothing written": "die_at(checkpoint, 'begin', 2)",
    "shards without digests": "die_at(checkpoint, 'file_sha256', 2)",
    "half of state.json": "write_text = die_at(Path, 'write_text', 2, 'state.json', half_text)",
    "before the rename": "die_at(os, 'replace', 2, '.writing_step')",
    "complete": "replace = die_at(os, 'replace', 2, '.writing_step', lambda *args: replace(*args))",
}


def test_killed_while_shards_are_written_behind(tiny, unbroken, tmp_path):
    """As above; each time when the run has gone on to its next save, so that metrics.jsonl is ahead of the shards."""
    settings = dict(HARD, optimizer="muon", max_iters=16, init_from="auto")
    for instant, fault in BEHIND.items():
        done = tiny(tmp_path, before=KILL + LATE + fault, checkpoint_format="sharded", **settings)
        assert done.code == -signal.SIGKILL, (instant, done.err)
        for folder in checkpoint.steps(tmp_path).values():
            checkpoint.verify(folder)
        assert len(records(tmp_path)) > checkpoints(tmp_path)[-1], instant
    done = tiny(tmp_path, checkpoint_format="sharded", **settings)
    assert done.code == 0 and done.err == "" and leftovers(tmp_path) == []
    checkpoint.consolidate(tmp_path)
    assert differences(outcome(tmp_path), unbroken(**settings)) == []


def test_the_end_waits_for_shards(tiny, finished, tmp_path):
    done = tiny(tmp_path, before=LATE, checkpoint_format="sharded")
    assert done.code == 0 and checkpoints(tmp_path) == [4, 8, 12], done.err
    checkpoint.consolidate(tmp_path)
    assert differences(outcome(tmp_path), outcome(finished)) == []


def test_a_stop_waits_for_shards(tiny, tmp_path):
    done = tiny(tmp_path, before=LATE + STOP, checkpoint_format="sharded", eval_interval=100)
    assert done.code == 128 + signal.SIGTERM and checkpoints(tmp_path) == [6], done.err
    assert "saved; resume" in done.out and leftovers(tmp_path) == []


@pytest.mark.parametrize("n, code, there", [(2, 0, [4, 12]), (3, 1, [4, 8])])
def test_a_full_disk_behind_is_said_and_the_run_goes_on(n, code, there, tiny, tmp_path):
    done = tiny(tmp_path, before=LATE + NO_ROOM.format(n=n), checkpoint_format="sharded")
    assert done.code == code and checkpoints(tmp_path) == there and leftovers(tmp_path) == []
    assert done.err.startswith(f"warning: no checkpoint at step {4 * n}: ") and done.err.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in done.err and "make room" in done.err
    assert [e["event"] for e in records(tmp_path, "events.jsonl")] == ["start", "warning", "end"]


def test_the_state_holds_no_number_that_is_not_finite(tmp_path, monkeypatch):
    """float16 skips an update whose gradient norm is inf, and that step may be the one that is saved."""
    saved = {}
    monkeypatch.setattr(checkpoint, "save", lambda out_dir, model, optimizers, state: saved.update(state))
    c = SimpleNamespace(out_dir=tmp_path, keep_checkpoints=3, always_save_checkpoint=True, checkpoint_format="plain",
                        max_iters=1)
    layout = SimpleNamespace(rank=0, heads=None, gather=lambda opt: (None, opt), on_rank0=lambda function: function())
    scaler, guard = SimpleNamespace(is_enabled=lambda: False), SimpleNamespace(state=dict)
    run = SimpleNamespace(flush=lambda: 0)
    writer = saver.Saver(c, layout, None, scaler, guard, {"step": 1}, run, watch=None, weights=0)
    assert writer.save({"step": 1, "loss": 1.0, "grad_norm": math.inf})
    assert saved["unevaluated"] == {"step": 1, "loss": 1.0, "grad_norm": None}


# the first checkpoint fails behind step 5, which waits for that
FAILS_BEHIND = """
import checkpoint, errno, optim, os
from training import saver
save, step, finish, threads = saver.Background.save, optim.Optimizers.step, checkpoint.finish, []
def saves(self, *args):
    save(self, *args)
    threads.append(self.thread)
def waits(self):
    for thread in threads:
        thread.join()
    return step(self)
def full(*args):
    checkpoint.finish = finish
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
saver.Background.save, optim.Optimizers.step, checkpoint.finish = saves, waits, full
"""


def test_a_failure_behind_the_steps_is_told_at_the_next_record(tiny, tmp_path):
    """And not only when the next checkpoint is due."""
    done = tiny(tmp_path, before=FAILS_BEHIND, checkpoint_format="sharded")
    assert done.code == 0 and checkpoints(tmp_path) == [8, 12], done.err
    warning, = (e for e in records(tmp_path, "events.jsonl") if e["event"] == "warning")
    assert warning["step"] == 5 and warning["message"].startswith("no checkpoint at step 4: ")


# -----------------------------------------------------------------------------
# Removed, linked, of another version


def test_an_optimizer_that_was_removed_is_not_damage(tiny, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for folder in list(checkpoint.steps(out).values())[1:]:
        (folder / "optimizer.pt").unlink()
    for init_from in ("resume", "auto"):
        error = one_error(tiny(out, init_from=init_from, max_iters=20))
        assert "optimizer.pt is missing" in error and f"--init_from={out}" in error
        assert "to resume step 4 instead, remove" in error
        assert all(f"step_{step:08d}" in error.partition("remove")[2] for step in (8, 12))
        assert checkpoints(out) == checkpoints(finished) and leftovers(out) == []
    kept = (out / "ckpt" / "step_00000004" / "optimizer.pt").rename(tmp_path / "kept")
    assert "instead" not in one_error(tiny(out, init_from="resume", max_iters=20))  # there is none to resume
    kept.rename(out / "ckpt" / "step_00000004" / "optimizer.pt")
    assert checkpoint.find(out)[1]["step"] == 12  # weights are all that sampling needs
    done = tiny(tmp_path / "next", init_from=out, max_iters=4)
    assert done.code == 0, done.err
    shutil.rmtree(list(checkpoint.steps(out).values())[-1])
    shutil.rmtree(list(checkpoint.steps(out).values())[-1])
    assert tiny(out, init_from="resume").code == 0


@pytest.mark.parametrize("field", [{"window": 128}, {"value_embeddings": True}])
def test_a_field_of_the_model_that_is_not_known_is_refused_everywhere(field, tiny, finished, tmp_path, call_script):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for folder in checkpoint.steps(out).values():
        state = checkpoint.read_state(folder)
        checkpoint.note(folder, model=state["model"] | field)
    name, value = next(iter(field.items()))
    named = f"{name}={value}, which this version does not know"
    assert named in one_error(tiny(out, init_from="resume", max_iters=13))
    assert named in one_error(tiny(tmp_path / "other", init_from=out), tmp_path / "other")
    for command in (["sample.py", f"--out_dir={out}"], ["eval.py", f"--out_dir={out}"],
                    ["export.py", out, tmp_path / "hf"]):
        code, _, err = call_script(*command)
        assert code == 2 and named in err and err.count("\n") == 1, command


@pytest.mark.parametrize("link", ["ckpt", "step", "run"])
def test_a_tokenizer_beside_a_link_is_found(link, finished, tmp_path):
    """`ckpt` on another disk; one checkpoint given by a link into the run; the whole run by a link."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    step = "ckpt/step_00000012"
    if link == "ckpt":
        (out / "ckpt").rename(tmp_path / "big")
        (out / "ckpt").symlink_to(tmp_path / "big")
        places = [out, out / step]
    elif link == "step":
        (tmp_path / "latest").symlink_to(out / step)
        places = [tmp_path / "latest"]
    else:
        (tmp_path / "linked").symlink_to(out)
        places = [tmp_path / "linked", tmp_path / "linked" / step]
    for place in places:
        assert infer.load(place)[1] is not None, place
        assert export.read_model(place)[1] is not None, place


def test_a_model_from_elsewhere_has_no_training_to_resume(tiny, finished, tmp_path):
    model = infer.load(finished)[0]
    state = {"step": 0, "val_loss": None, "model": vars(model.config), "config": {"dataset": "", "init_from": "gpt2"}}
    checkpoint.save(tmp_path, model, export.NoOptimizer(), state)
    error = one_error(tiny(tmp_path, init_from="resume"))
    assert "a model from gpt2 and no training to resume" in error and f"--init_from={tmp_path}" in error
    assert one_error(tiny(tmp_path, init_from="resume", batch_size=0, tokens_per_step=64)) == error


def test_a_noted_checkpoint_is_whole(trained, tmp_path):
    folder = put(tmp_path, trained, 3)
    assert checkpoint.note(folder, val_loss=1.25)["val_loss"] == 1.25
    assert checkpoint.verify(folder)["val_loss"] == 1.25 and sorted(p.name for p in folder.iterdir()) == [
        "model.safetensors", "optimizer.pt", "state.json"]
