"""Guardrails: which steps are bad, what each setting does about them; a rewound run equals one without the batch."""

import json
import math
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import Trainer, checkpoints, differences, leftovers, one_error, outcome, records

import checkpoint
from loader import data_step
from model import GPT, GPTConfig
from optim import Optimizers
from training import guard
from training.guard import Guard, Watch

pytest_plugins = ["runs"]

# -----------------------------------------------------------------------------
# Which steps are bad


def numbers(count, seed=0, mean=3.0, deviation=0.1):
    return np.random.default_rng(seed).normal(mean, deviation, count).tolist()


def kinds(guard, losses, norm=1.0):
    return [bad.kind if (bad := guard.judge(loss, norm)) else None for loss in losses]


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_the_z_score(what):
    """Computed from the steps before, against numpy; for the norm, from its logarithm."""
    calm = numbers(16)
    scored = np.array(calm) if what == "loss" else np.log(calm)
    for value, spike in ((4.5, True), (3.2, False), (0.5, False)):  # far above, above, far below
        judge = Guard(5.0, 16)
        for x in calm:
            assert judge.judge(*((x, 1.0) if what == "loss" else (3.0, x))) is None
        bad = judge.judge(*((value, 1.0) if what == "loss" else (3.0, value)))
        z = ((value if what == "loss" else math.log(value)) - scored.mean()) / scored.std()
        assert bool(bad) == spike == (z > 5)
        if bad:
            assert (bad.kind, bad.what, bad.value) == ("spike", what, value)
            assert bad.z == pytest.approx(z, rel=1e-9) and f"{z:.1f} standard deviations above" in str(bad)


def test_no_spike_before_the_window_is_full_or_without_a_threshold():
    assert kinds(Guard(5.0, 16), [*numbers(15), 99.0]) == [None] * 16
    assert kinds(Guard(5.0, 16), [*numbers(16), 99.0])[-1] == "spike"
    assert kinds(Guard(0.0, 16), [*numbers(50), 99.0]) == [None] * 51


def test_only_the_steps_in_the_window_count():
    judge = Guard(5.0, 16)
    kinds(judge, numbers(100, mean=50.0))
    kinds(judge, numbers(16))
    assert judge.judge(5.0, 1.0)


def test_a_spike_does_not_hide_the_next_and_a_level_that_stays_is_normal_soon():
    judge = Guard(5.0, 64)
    assert not any(kinds(judge, numbers(200)))
    assert kinds(judge, [1e6, 3.0, 9.0]) == ["spike", None, "spike"]
    found = kinds(judge, numbers(64, seed=1, mean=6.0))
    assert found[0] == "spike" and not any(found[16:])


def test_what_is_flat_is_calm():
    """Losses that are nearly equal have almost no deviation: many deviations are still few nats."""
    judge = Guard(5.0, 8)
    assert kinds(judge, [1e-4] * 8 + [1.1e-4, 2e-3, 1e-4]) == [None] * 11


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(value):
    assert Guard(5.0, 8).judge(value, 1.0).what == "loss"
    assert Guard(5.0, 8).judge(3.0, abs(value)).what == "grad_norm"
    assert Guard(5.0, 8).judge(value, math.nan).kind == "nan"


def test_a_gradient_that_overflows_with_a_loss_scaler_is_no_fault():
    """That is how the scaler finds its scale. A loss that is not finite is a fault nevertheless."""
    judge = Guard(5.0, 4, scaled=True)
    assert kinds(judge, [3.0] * 8, norm=math.inf) == [None] * 8
    assert kinds(judge, [3.0] * 2, norm=0.0) == [None] * 2
    assert judge.judge(math.nan, math.nan).what == "loss"
    assert judge.windows["grad_norm"] == type(judge.windows["grad_norm"])()


def test_what_is_bad_leaves_no_trace_in_the_window():
    judge = Guard(5.0, 4)
    kinds(judge, [math.nan, math.inf], norm=math.nan)
    assert not judge.windows["loss"] and not judge.windows["grad_norm"]


def test_the_same_is_found_after_a_resume():
    """From the state that a checkpoint holds, whatever its step."""
    losses = numbers(40)
    losses[20], losses[33] = 5.0, 3.9
    norms = [math.exp(x) for x in numbers(40, seed=2)]
    norms[27] = 500.0
    whole, unbroken = Guard(5.0, 12), []
    for loss, norm in zip(losses, norms, strict=True):
        unbroken.append(whole.judge(loss, norm))
    assert [i for i, bad in enumerate(unbroken) if bad] == [20, 27, 33]
    for cut in range(40):
        first = Guard(5.0, 12)
        found = [first.judge(*both) for both in zip(losses[:cut], norms[:cut], strict=True)]
        then = Guard(5.0, 12, state=json.loads(json.dumps(first.state())))
        assert found + [then.judge(*both) for both in zip(losses[cut:], norms[cut:], strict=True)] == unbroken


# -----------------------------------------------------------------------------
# The skipped update


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_found_inf_leaves_weights_and_state_as_they_are(optimizer, bad):
    """Where found_inf is 0, the step equals to the bit a step without found_inf."""
    def steps(found):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
        opt = Optimizers(gpt, optimizer=optimizer, learning_rate=1e-2, weight_decay=0.1)
        for flag in found:
            x = torch.randint(11, (2, 8))
            (gpt(x, x)[1] * (bad if flag else 1)).backward()
            opt.found_inf = None if flag is None else torch.tensor(float(flag))
            opt.step()
            opt.zero_grad()
        held = {f"{kind}/{name}/{key}": t for kind, params in opt.state_dict().items()
                for name, values in params.items() for key, t in values.items()}
        return {**dict(gpt.named_parameters()), **held}

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    plain = steps([None, None])
    assert same(steps([0, 0]), plain)
    assert same(steps([0, 0, 1]), plain)
    assert not same(steps([0, 0, 0]), plain)
    assert all(t.isfinite().all() for t in steps([1, 0]).values())


# -----------------------------------------------------------------------------
# Skipped batches


@pytest.mark.parametrize("skipped", [[], [0], [3], [0, 1, 2], [2, 3, 7, 19], [5, 3, 4]])
def test_data_steps_are_the_numbers_that_are_not_skipped(skipped):
    left = [k for k in range(60) if k not in skipped]
    assert [data_step(s, skipped) for s in range(40)] == left[:40]
    assert data_step(-1, skipped) == -1  # belongs to no step


def test_what_skip_batches_takes():
    assert guard.parse_steps("") == guard.parse_steps(" ") == []
    assert guard.parse_steps("7") == [7] and guard.parse_steps("12, 3,12") == [3, 12]
    for text in ("-1", "1.5", "3;4", "3,,4", "3,", "two", "²"):
        with pytest.raises(ValueError, match="skip_batches="):
            guard.parse_steps(text)


def test_what_was_skipped_is_on_the_disk(tmp_path):
    assert guard.read_skipped(tmp_path) == []
    guard.keep_skipped(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
    guard.keep_skipped(tmp_path, [3, 12])
    assert guard.read_skipped(tmp_path) == [3, 12] and [p.name for p in tmp_path.iterdir()] == ["skipped.json"]
    (tmp_path / "skipped.json").write_text("[", encoding="utf-8")
    with pytest.raises(ValueError, match="skipped.json"):
        guard.read_skipped(tmp_path)


# -----------------------------------------------------------------------------
# Warnings that are printed once


def watched(records):
    said = []
    watch = Watch(said.append)
    for step, parts in enumerate(records):
        watch.step(step, parts)
    return said


def parts(data=1.0, forward=50.0, backward=100.0, optim=10.0):
    return {"data_ms": data, "forward_ms": forward, "backward_ms": backward, "optim_ms": optim}


def test_a_slow_step_is_said_once_with_its_figure():
    calm = [parts()] * 40
    assert watched(calm) == []
    said = watched([*calm, parts(forward=3000.0), *calm, parts(forward=9000.0)])
    assert len(said) == 1 and "step 40 took 3.1 s, 19 times the median" in said[0] and "forward_ms = 3000" in said[0]
    assert watched([*calm, parts(forward=700.0)]) == []  # 5 times as long, but less than a second more
    assert watched([parts(forward=3000.0), *calm]) == []  # the first, which compiles
    assert watched([parts(forward=9000.0)] * 40 + [parts(forward=12000.0)]) == []  # but not 5 times


def test_a_data_stall_is_said_once_with_its_figure():
    said = watched([parts(data=240.0)] * 99)
    assert len(said) == 1 and "60%" in said[0] and "loader_threads" in said[0]
    assert watched([parts(data=40.0)] * 99) == []
    assert watched([parts(data=240.0), parts(), parts()] * 40) == []  # now and then a slow step is no stall


def test_a_disk_about_to_fill_is_said_once(tmp_path, monkeypatch):
    said, free = [], {"bytes": 0}
    monkeypatch.setattr(guard.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    folders = [tmp_path / f"step_{i}" for i in range(4)]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"0" * 700)
        (folder / "optimizer.pt").write_bytes(b"0" * 300)
    # keep_checkpoints, how many exist -> how many more the next three add at most: the best, the one being written
    for keep, there, more, each in ((3, 0, 3, 12 * 100), (1, 1, 2, 1000), (3, 3, 2, 1000), (3, 4, 1, 1000),
                                    (1, 4, 1, 1000), (999, 4, 3, 1000)):
        for free["bytes"], full in ((more * each, False), (more * each - 1, True)):
            watch = Watch(said.append)
            watch.disk(tmp_path, folders[:there], keep, weights=100)
            watch.disk(tmp_path, folders[:there], keep, weights=100)
            assert len(said) == full
            assert not said or f"({more} of {each / 1e9:.3g} GB)" in said.pop()


def test_a_run_says_each_of_them(tiny, tmp_path):
    """With a clock and a disk that the test controls: 40 steps that wait for data, one that hangs, and a full disk."""
    fault = """
        import shutil
        from types import SimpleNamespace
        from training import monitor
        steps = []
        def read(self):
            steps.append(1)
            return {"data_ms": 90.0 if len(steps) != 36 else 9e4, "forward_ms": 60.0, "backward_ms": 60.0,
                    "optim_ms": 1.0}
        monitor.StepTimer.read = read
        shutil.disk_usage = lambda path: SimpleNamespace(free=1000)
    """
    done = tiny(tmp_path, before=fault, max_iters=40, eval_interval=40)
    assert done.code == 0
    lines = done.err.splitlines()
    assert len(lines) == 3 and all(line.startswith("warning: ") for line in lines)
    assert "1e-06 GB are free" in lines[0] and "waiting for batches is 43%" in lines[1] and "90.1 s, 427" in lines[2]
    warned = [e["message"] for e in records(tmp_path, "events.jsonl") if e["event"] == "warning"]
    assert [f"warning: {message}" for message in warned] == lines


# -----------------------------------------------------------------------------
# Runs with a batch that is bad whenever it is read

FAULTY = """
import math, os, loader, model
faults, rank = {faults}, {rank}
init, following, loss_of, now = loader.Loader.__init__, loader.Loader.__next__, model.GPT.loss, [None, 0, 0]
def begin(self, *args, first_step=0, **more):
    init(self, *args, first_step=first_step, **more)
    self.taken = first_step * self.accumulation
def follow(self):
    step, micro = divmod(self.taken, self.accumulation)
    self.taken += 1
    now[:] = loader.data_step(step, self.skipped), micro, self.accumulation
    return following(self)
def poisoned(self, *args):
    loss = loss_of(self, *args)
    fault = faults.get(now[0]) if self.training and now[1] == now[2] - 1 else None
    if fault and int(os.environ.get("RANK", rank)) == rank:
        if fault == "gradient":
            loss.register_hook(lambda grad: grad * math.inf)
        else:
            loss = loss * fault
    return loss
loader.Loader.__init__, loader.Loader.__next__, model.GPT.loss = begin, follow, poisoned
"""
NAN, GRADIENT, SPIKE = "math.nan", "'gradient'", "1e4"
LOOK = dict(spike_z=1000, spike_window=3)  # over so few steps the deviation can be small by chance


def faulty(faults, rank=0):
    """Code to run before train.py that injects {data step: fault}."""
    inner = ", ".join(f"{step}: {fault}" for step, fault in faults.items())
    return FAULTY.format(faults="{" + inner + "}", rank=rank)


def events(out, kind):
    return [{k: v for k, v in e.items() if k not in ("event", "time")} for e in records(out, "events.jsonl")
            if e["event"] == kind]


def state(out):
    return checkpoint.read_state(list(checkpoint.steps(out).values())[-1])


def same(out, other):
    """Whether two runs are equal to the bit, including the state of the guardrails."""
    assert differences(outcome(out), outcome(other)) == []
    assert all(state(out)[key] == state(other)[key] for key in ("guard", "skipped"))


@pytest.fixture(scope="session")
def skipping(tiny, tmp_path_factory):
    """The folder of a run with these settings and skip_batches."""
    known = {}

    def run(skip, **settings):
        key = json.dumps([skip, settings], sort_keys=True)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("skipping")
            done = tiny(known[key], skip_batches=skip, **settings)
            assert done.code == 0 and done.err == "", done.err
        return known[key]

    return run


ACCUMULATED = dict(batch_size=2, gradient_accumulation_steps=2, dropout=0.1, optimizer="muon")


@pytest.mark.parametrize("fault", [NAN, GRADIENT, SPIKE])
@pytest.mark.parametrize("log_interval", [1, 100])
@pytest.mark.parametrize("settings", [{}, ACCUMULATED], ids=["alone", "accumulated"])
def test_a_rewind_ends_as_a_run_that_skipped_the_batch(fault, log_interval, settings, tiny, skipping, tmp_path):
    settings = {**settings, **LOOK, "log_interval": log_interval}
    acts = {"on_nan": "rewind"} if fault != SPIKE else {"on_spike": "rewind"}
    done = tiny(tmp_path, before=faulty({5: fault}), **acts, **settings)
    assert done.code == 0 and done.err.count("\n") == 1, done.err
    assert "at step 6; back to step 4, skipping its batch, data step 5" in done.err
    rewound, = events(tmp_path, "rewind")
    assert rewound["step"] == 6 and rewound["skipped"] == [5] and rewound["to"] == 4
    assert rewound["what"] == ("grad_norm" if fault == GRADIENT else "loss")
    assert (rewound["value"] is None) == (fault != SPIKE or None) or rewound["value"] > 1e3
    assert (rewound["z"] or 0) > 1000 or fault != SPIKE
    assert events(tmp_path, "spike" if fault == SPIKE else "nan")[0]["action"] == "rewind"
    assert state(tmp_path)["skipped"] == [5] and checkpoints(tmp_path) == [4, 8, 12] and leftovers(tmp_path) == []
    same(tmp_path, skipping("5", **settings))


def test_skipping_leaves_out_that_batch_and_no_other(tiny, finished, skipping):
    """Negative control: the run differs from that step on, and is the same before."""
    losses = [r["loss"] for r in records(finished)]
    other = [r["loss"] for r in records(skipping("5"))]
    assert losses[:5] == other[:5] and all(a != b for a, b in zip(losses[5:], other[5:], strict=True))


def test_rewinds_one_after_the_other(tiny, skipping, tmp_path):
    """Neighbours, each met only once the one before is skipped, and a batch after the next checkpoint."""
    acts = dict(on_nan="rewind", on_spike="rewind", log_interval=3, **LOOK)
    done = tiny(tmp_path, before=faulty({5: NAN, 6: SPIKE, 7: NAN, 12: SPIKE}), **acts)
    assert done.code == 0, done.err
    rewound = [(e["step"], e["to"], e["skipped"]) for e in events(tmp_path, "rewind")]
    assert rewound == [(6, 4, [5]), (6, 4, [6]), (6, 4, [7]), (10, 8, [12])]
    same(tmp_path, skipping("5,6,7,12", log_interval=3, **LOOK))


def test_before_the_first_checkpoint_it_begins_again(tiny, skipping, tmp_path):
    done = tiny(tmp_path, before=faulty({2: NAN}), on_nan="rewind")
    assert done.code == 0 and "back to the beginning" in done.err
    assert events(tmp_path, "rewind")[0]["to"] == 0 and [e["step"] for e in events(tmp_path, "start")] == [0, 0]
    same(tmp_path, skipping("2"))


def test_a_rewind_of_a_run_from_other_weights_goes_back_to_them(tiny, finished, tmp_path):
    settings = dict(init_from=finished, max_iters=4, seed=3)
    assert tiny(tmp_path / "a", before=faulty({2: NAN}), on_nan="rewind", **settings).code == 0
    assert tiny(tmp_path / "b", skip_batches=2, **settings).code == 0
    same(tmp_path / "a", tmp_path / "b")


def test_what_comes_back_stops_the_run(tiny, tmp_path):
    """Whichever batch replaces it: the batches are not to blame."""
    before = faulty(dict.fromkeys(range(5, 40), NAN))
    done = tiny(tmp_path, before=before, on_nan="rewind", max_rewinds=2)
    assert done.code == 1
    *warnings, error = done.err.splitlines()
    assert len(warnings) == 2 and all(line.startswith("warning: ") for line in warnings)
    assert error.startswith("error: after 2 rewinds to step 4, without data steps [5, 6], the loss is not finite at "
                            f"step 6; {tmp_path / 'ckpt' / 'step_00000004'} is from before it")
    assert checkpoints(tmp_path) == [4] and events(tmp_path, "stop")[0]["step"] == 6
    done = tiny(tmp_path, before=before, init_from="auto", on_nan="rewind", max_rewinds=2)  # no retry
    assert done.code == 1 and "after 2 rewinds" in done.err and done.err.count("\n") == 1


def test_a_fault_that_passes_is_rewound_too(tiny, skipping, tmp_path):
    """For example a fault of the machine. The batch is skipped nevertheless, so the rest does not depend on it."""
    passing = faulty({5: NAN}) + "\ninit_ = begin\ndef once(self, *args, **more):\n    init_(self, *args, **more)\n" \
        "    faults.clear() if more['skipped'] else None\nloader.Loader.__init__ = once"
    assert tiny(tmp_path, before=passing, on_nan="rewind").code == 0
    same(tmp_path, skipping("5"))


KILLED = """
import os
from training import guard
real = guard.keep_skipped
def killed(out_dir, skipped):
    {before}
    real(out_dir, skipped)
    {after}
guard.keep_skipped = killed
"""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step, to", [(5, 4), (2, 0)])
def test_killed_right_after_a_rewind(moment, step, to, tiny, skipping, tmp_path):
    """The next start skips the batch that was noted, or finds it again."""
    kill = {"before": "pass", "after": "pass", moment: "os._exit(9) if skipped else None"}
    settings = dict(on_nan="rewind", init_from="auto")
    done = tiny(tmp_path, before=faulty({step: NAN}) + KILLED.format(**kill), **settings)
    assert done.code == 9 and checkpoints(tmp_path) == ([4] if to else [])
    assert guard.read_skipped(tmp_path) == ([step] if moment == "after" else [])
    assert tiny(tmp_path, before=faulty({step: NAN}), **settings).code == 0
    assert len(events(tmp_path, "rewind")) == (1 if moment == "after" else 2)
    same(tmp_path, skipping(str(step)))


def test_a_rewind_begins_the_trace_again(tiny, tmp_path):
    """The trace that the bad step cut off is not written."""
    done = tiny(tmp_path, before=faulty({2: NAN}), on_nan="rewind", profile="2:4", max_iters=6)
    assert done.code == 0 and done.out.count("steps 2 to 4 are in") == 1, done.err
    assert "back to the beginning" in done.err, done.err
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["trace_2_4.json.gz"]


def test_a_rewind_lets_go_of_the_profiler_and_the_tracker(tmp_path):
    calls = []
    note = SimpleNamespace(wait=lambda: calls.append("wait"), drop=lambda: calls.append("drop"),
                           finish=lambda: calls.append("finish"))
    run = SimpleNamespace(event=lambda *args, **fields: None, flush=lambda: None, tell=lambda *args: None, tracker=note)
    layout = SimpleNamespace(on_rank0=lambda function: function())
    c = SimpleNamespace(out_dir=tmp_path, skip_batches="", max_rewinds=3)
    bad_end_noted = guard.bad_end_noted(c, run, note, layout, [2], note, SimpleNamespace(agreed=0))
    with pytest.raises(guard.Rewind) as rewind, bad_end_noted:
        raise guard.Rewind(5, guard.Bad("nan", "loss", math.nan), batch=5)
    assert calls == ["wait", "drop", "finish"]
    assert rewind.value.skipped == [2, 5] == guard.read_skipped(tmp_path) and rewind.value.settings is c


def test_a_rewind_ends_the_tracker_before_it_begins_again(tiny, tmp_path):
    fake = f"""
import sys, types
def note(word):
    with open({str(tmp_path / "calls")!r}, "a") as file:
        file.write(word + "\\n")
run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: note("finish"))
sys.modules["trackio"] = types.SimpleNamespace(init=lambda **kwargs: note("init") or run)
"""
    done = tiny(tmp_path / "run", before=faulty({5: NAN}) + fake, on_nan="rewind", tracker="trackio")
    assert done.code == 0, done.err
    assert (tmp_path / "calls").read_text().split() == ["init", "finish", "init", "finish"]


def test_stopped_while_it_rewinds(tiny, skipping, tmp_path):
    """The signal is not lost: the run stops after its first step, which is saved."""
    stop = KILLED.format(before="pass", after="seen.append(os.kill(os.getpid(), 15)) if skipped and not seen else None")
    done = tiny(tmp_path, before=faulty({5: NAN}) + "\nseen = []" + stop, on_nan="rewind")
    assert done.code == 128 + signal.SIGTERM and "after step 5, saved" in done.out
    assert tiny(tmp_path, init_from="resume", on_nan="rewind").code == 0
    same(tmp_path, skipping("5"))


def test_stopped_in_the_bad_step(tiny, skipping, tmp_path):
    """The skipped batch is recorded on disk, and no checkpoint is saved."""
    before = faulty({5: NAN}) + """
import optim
step, calls = optim.Optimizers.step, []
def stopped(self):
    calls.append(1)
    os.kill(os.getpid(), 15) if len(calls) == 6 else None
    step(self)
optim.Optimizers.step = stopped
"""
    done = tiny(tmp_path, before=before, on_nan="rewind")
    assert done.code == 128 + signal.SIGTERM and checkpoints(tmp_path) == [4]
    assert records(tmp_path, "events.jsonl")[-1]["reason"] == "SIGTERM"
    assert tiny(tmp_path, init_from="resume", on_nan="rewind").code == 0
    same(tmp_path, skipping("5"))


def test_a_rewind_that_cannot_be_noted_stops_the_run(tiny, skipping, tmp_path):
    full = KILLED.format(before="if skipped: raise OSError(28, 'No space left')", after="pass")
    done = tiny(tmp_path, before=faulty({5: NAN}) + full, on_nan="rewind")
    assert done.code == 1 and done.err.startswith("error: a rewind could not be noted") and done.err.count("\n") == 1
    assert "No space left" in done.err and "the loss is not finite at step 6" in done.err
    assert tiny(tmp_path, before=faulty({5: NAN}), on_nan="rewind", init_from="auto").code == 0
    same(tmp_path, skipping("5"))


def test_fp16_rewinds_with_its_scale(tiny, tmp_path):
    """A loss that is not finite is rewound; a gradient that overflows is left to the scaler."""
    settings = dict(dtype="float16", on_nan="rewind")
    done = tiny(tmp_path / "a", before=faulty({1: GRADIENT, 5: NAN}), **settings)
    assert done.code == 0, done.err
    assert [e["skipped"] for e in events(tmp_path / "a", "rewind")] == [[5]]
    done = tiny(tmp_path / "b", before=faulty({1: GRADIENT}), skip_batches=5, **settings)
    assert done.code == 0 and done.err == ""
    assert state(tmp_path / "a")["scaler"]["scale"] == 2.0**15
    same(tmp_path / "a", tmp_path / "b")


# -----------------------------------------------------------------------------
# Log and stop


@pytest.mark.parametrize("fault", [NAN, GRADIENT])
@pytest.mark.parametrize("log_interval", [1, 100])
@pytest.mark.parametrize("settings", [{}, ACCUMULATED], ids=["alone", "accumulated"])
def test_a_nan_that_is_logged_is_not_applied(fault, log_interval, settings, tiny, tmp_path):
    done = tiny(tmp_path, before=faulty({5: fault}), on_nan="log", log_interval=log_interval, **settings)
    assert done.code == 0, done.err
    what = "loss" if fault == NAN else "gradient"
    assert done.err == f"warning: the {what} is not finite at step 6, of data step 5; its update is skipped\n"
    found, = events(tmp_path, "nan")
    assert (found["step"], found["data_step"], found["value"], found["z"]) == (6, 5, None, None)
    assert [r["step"] for r in records(tmp_path)][-1] == 12 and math.isfinite(records(tmp_path)[-1]["loss"])
    adamw = checkpoint.load_optimizer_state(tmp_path / "ckpt" / "step_00000012")["adamw"]
    assert {int(values["step"]) for values in adamw.values()} == {11}


@pytest.mark.parametrize("settings", [{}, ACCUMULATED], ids=["alone", "accumulated"])
def test_on_nan_changes_no_good_step(settings, tiny, unbroken, tmp_path):
    assert tiny(tmp_path, on_nan="log", **settings).code == 0
    assert differences(outcome(tmp_path), unbroken(**settings)) == []


@pytest.mark.parametrize("log_interval", [1, 100])
@pytest.mark.parametrize("settings", [{}, ACCUMULATED], ids=["alone", "accumulated"])
def test_a_spike_is_logged_and_changes_nothing(log_interval, settings, tiny, tmp_path):
    """The run equals to the bit one without the guardrail."""
    outs = [tmp_path / name for name in ("seen", "unseen")]
    for out, z in zip(outs, (1000, 0), strict=True):
        done = tiny(out, before=faulty({5: SPIKE}), log_interval=log_interval, spike_window=3, spike_z=z, **settings)
        assert done.code == 0
        assert len(events(out, "spike")) == done.err.count("\n") == bool(z)
    found, = events(outs[0], "spike")
    assert (found["step"], found["what"], found["data_step"], found["action"]) == (6, "loss", 5, "log")
    assert found["value"] > 1e3 and found["z"] > 1000
    assert differences(*map(outcome, outs)) == []


def test_a_spike_of_the_gradient_alone(tiny, tmp_path):
    before = faulty({5: "'gradient'"}).replace("math.inf", "1e6")
    assert tiny(tmp_path, before=before, spike_window=3, spike_z=15).code == 0
    found, = [e for e in events(tmp_path, "spike") if e["step"] == 6]
    assert found["what"] == "grad_norm" and found["value"] > 1e4


@pytest.mark.parametrize("log_interval", [1, 100])
@pytest.mark.parametrize("fault", [NAN, SPIKE])
@pytest.mark.parametrize("settings", [{}, ACCUMULATED], ids=["alone", "accumulated"])
def test_stop_saves_nothing_and_names_the_checkpoint_before(log_interval, fault, settings, tiny, tmp_path):
    settings = dict(log_interval=log_interval, on_nan="stop", on_spike="stop", eval_interval=3, **LOOK, **settings)
    done = tiny(tmp_path, before=faulty({5: fault}), **settings)
    assert done.code == 1 and done.err.startswith("error: the loss is ") and done.err.count("\n") == 1
    assert f"at step 6; {tmp_path / 'ckpt' / 'step_00000003'} is from before it" in done.err
    assert checkpoints(tmp_path) == [3] and leftovers(tmp_path) == [] and records(tmp_path)[-1]["step"] == 6
    assert events(tmp_path, "stop")[0]["step"] == 6 and not (tmp_path / "skipped.json").exists()


def test_a_spike_is_found_by_what_was_before_a_resume(tiny, tmp_path):
    """The checkpoint holds the window: without it there would be too few steps to judge by."""
    settings = dict(before=faulty({5: SPIKE}), spike_z=1000, spike_window=5, lr_decay_iters=12)
    assert tiny(tmp_path / "once", **settings).code == 0
    assert tiny(tmp_path / "twice", max_iters=4, **settings).code == 0
    assert tiny(tmp_path / "twice", init_from="resume", **settings).code == 0
    found = [events(tmp_path / out, "spike") for out in ("once", "twice")]
    assert len(found[0]) == 1 and found[0] == found[1]
    same(tmp_path / "once", tmp_path / "twice")


# -----------------------------------------------------------------------------
# What a user skips


def test_what_is_skipped_stays_so(tiny, skipping, tmp_path):
    """Even where the command that resumes does not repeat it; later batches may be added."""
    settings = dict(lr_decay_iters=12)
    assert tiny(tmp_path, skip_batches="2,5", max_iters=4, **settings).code == 0
    assert state(tmp_path)["skipped"] == [2, 5] == guard.read_skipped(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "more")
    assert tiny(tmp_path, init_from="resume", **settings).code == 0
    same(tmp_path, skipping("2,5", **settings))
    assert tiny(tmp_path / "more", init_from="resume", skip_batches="2,7", **settings).code == 0
    same(tmp_path / "more", skipping("2,5,7", **settings))
    error = one_error(tiny(tmp_path, init_from="resume", skip_batches="2,4", max_iters=20))
    assert "skip_batches=2,4" in error and "step 12, which has seen data step 4" in error


def test_a_run_that_begins_skips_only_what_it_is_told(tiny, finished, tmp_path):
    """The list of an earlier run in this folder, whose checkpoints are gone, does not apply."""
    guard.keep_skipped(tmp_path, [5])
    assert tiny(tmp_path).code == 0
    assert not (tmp_path / "skipped.json").exists()
    same(tmp_path, finished)


@pytest.mark.parametrize("named, settings", [
    ("on_nan='ignore'", dict(on_nan="ignore")), ("on_spike='rewnd'", dict(on_spike="rewnd")),
    ("spike_z=-1.0", dict(spike_z=-1)), ("spike_window=1", dict(spike_window=1)),
    ("max_rewinds=0", dict(max_rewinds=0)),
    ("skip_batches='3;4'", dict(skip_batches="3;4")), ("skip_batches='-1'", dict(skip_batches="-1")),
])
def test_a_mistake_gets_one_line(named, settings, tiny, tmp_path):
    assert named in one_error(tiny(tmp_path / "run", **settings), tmp_path / "run")


@pytest.mark.slow
def test_compiled_rewinds(tiny, tmp_path):
    """It is compiled the second time as well, and computes the same."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    settings = dict(compile=True, on_nan="rewind", env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    told = "\nimport torch\nreal = torch.compile\n" \
        "torch.compile = lambda *args, **more: print('compiled') or real(*args, **more)\n"
    once = "\nreal_judge, seen = guard.Guard.judge, []\ndef judge(self, loss, norm):\n    seen.append(1)\n" \
        "    return real_judge(self, math.nan if len(seen) == 6 else loss, norm)\nguard.Guard.judge = judge\n"
    done = tiny(tmp_path / "a", before="import math\nfrom training import guard" + told + once, **settings)
    assert done.code == 0 and done.err.count("\n") == 1, done.err
    assert done.out.count("compiled\n") == 4, done.out  # twice the training, twice the evaluation
    done = tiny(tmp_path / "b", skip_batches=5, **settings)
    assert done.code == 0 and done.err == ""
    same(tmp_path / "a", tmp_path / "b")


# -----------------------------------------------------------------------------
# Two ranks


@pytest.fixture(scope="session")
def two(train, words, tmp_path_factory):
    """Runs train.py on two ranks, with torchrun's variables and a store like its agent's. -> the output of each"""
    trainers = [train, Trainer(tmp_path_factory.mktemp("second"))]

    def run(out, **settings):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, trainer in enumerate(trainers):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
            settings = {"gradient_accumulation_steps": 4, "dataset": words, "out_dir": out, **settings}
            trainer.start(env={key: str(value) for key, value in env.items()}, **settings)
        return [trainer.wait() for trainer in trainers]

    yield run
    trainers[1].server.stdin.close()
    assert trainers[1].server.wait(30) == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"zero_stage": 2}, {"tp_size": 2}, {"pp_size": 2}], ids=str)
def test_two_ranks_rewind_alike(layout, two, tmp_path):
    """A NaN and a spike that only one of them sees."""
    settings = dict(dropout=0.1, log_interval=3, n_layer=2, **LOOK, **layout)
    acts = dict(on_nan="rewind", on_spike="rewind")
    done = two(tmp_path / "a", before=faulty({5: NAN, 9: SPIKE}, rank=1), **acts, **settings)
    assert [each.code for each in done] == [0, 0], done
    assert done[0].err.count("\n") == 2 and done[1].err == ""
    assert [e["skipped"] for e in events(tmp_path / "a", "rewind")] == [[5], [9]]
    assert [each.code for each in two(tmp_path / "b", skip_batches="5,9", **settings)] == [0, 0]
    same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("layout", [{"optimizer": "muon"}, {"zero_stage": 2, "optimizer": "muon"},
                                    {"tp_size": 2, "optimizer": "muon"}, {"pp_size": 2}], ids=str)
def test_two_ranks_leave_an_update_out_alike(layout, two, tmp_path):
    """They skip the update of a step that is not finite on any rank; the update of a spike is applied."""
    settings = dict(n_layer=2, max_iters=8, eval_interval=8, on_nan="log", **LOOK, **layout)
    done = two(tmp_path, before=faulty({4: GRADIENT, 6: SPIKE}, rank=1), **settings)
    assert [each.code for each in done] == [0, 0], done
    assert done[0].err.count("\n") == 2 and done[1].err == ""
    assert events(tmp_path, "nan")[0]["step"] == 5 and events(tmp_path, "spike")[0]["step"] == 7
    adamw = checkpoint.load_optimizer_state(tmp_path / "ckpt" / "step_00000008")["adamw"]
    assert {int(values["step"]) for values in adamw.values()} == {7}
    tensors = outcome(tmp_path)["tensors"]
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("fault", [NAN, SPIKE])
def test_two_ranks_stop_alike(fault, two, tmp_path):
    settings = dict(on_nan="stop", on_spike="stop", log_interval=100, **LOOK)
    done = two(tmp_path, before=faulty({5: fault}, rank=1), **settings)
    assert [each.code for each in done] == [1, 1]
    assert done[0].err.startswith("error: the loss is") and "at step 6; " in done[0].err and done[1].err == ""
    assert done[0].err.count("\n") == 1 and checkpoints(tmp_path) == [4]
