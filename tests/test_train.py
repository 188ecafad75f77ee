"""train.py as a user runs it: stopped, resumed, repeated, with NaN, with nanoGPT's settings, and with mistakes."""

import hashlib
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, checkpoints, differences, digest, leftovers, losses, one_error, outcome, records
from safetensors.torch import load_file

import checkpoint
import plan
from dataset import Tokens
from loader import Loader
from model import GPT, GPTConfig

pytest_plugins = ["runs"]

# -----------------------------------------------------------------------------
# Stopped


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["in the step", "while logging", "while saving"])
def test_stopped_by_a_signal(signum, moment, tiny, unbroken, tmp_path):
    """Whenever the signal comes, the step is finished and saved, the exit code names it, and the run resumes."""
    where = {"in the step": "optim.Optimizers.step", "while logging": "monitor.Run.metrics",
             "while saving": "checkpoint.model_tensors"}[moment]
    fault = f"""
        import os, checkpoint, optim
        from training import monitor
        real, calls = {where}, []
        def call(*args):
            calls.append(1)
            if len(calls) == {1 if "saving" in moment else 3}:
                os.kill(os.getpid(), {int(signum)})
            return real(*args)
        {where} = call
    """
    settings = dict(optimizer="muon", dropout=0.1, log_interval=1)
    done = tiny(tmp_path, before=fault, **settings)
    assert done.code == 128 + signum and done.err == ""
    stopped_at = {"in the step": 3, "while logging": 4, "while saving": 5}[moment]
    assert signum.name in done.out and f"after step {stopped_at}, saved;" in done.out
    assert checkpoints(tmp_path)[-1] == stopped_at
    assert records(tmp_path, "events.jsonl")[-1]["reason"] == signum.name
    assert tiny(tmp_path, init_from="resume", **settings).code == 0
    assert differences(outcome(tmp_path), unbroken(**settings)) == []


# -----------------------------------------------------------------------------
# NaN

NAN = """
import math, model
forward, count = model.GPT.forward, []
def poisoned(self, *args, **kwargs):
    logits, loss = forward(self, *args, **kwargs)
    count.extend([1] * self.training)
    if self.training and len(count) == {step}:
        {fault}
    return logits, loss
model.GPT.forward = poisoned
"""
LOSS, GRADIENT = "loss = loss * {}", "loss.register_hook(lambda grad: grad * math.inf)"


@pytest.mark.parametrize("value", ["math.nan", "math.inf"])
@pytest.mark.parametrize("log_interval", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run(value, log_interval, tiny, tmp_path):
    fault = NAN.format(step=6, fault=LOSS.format(value))
    done = tiny(tmp_path, before=fault, log_interval=log_interval, eval_interval=100, save_interval=4)
    assert done.code == 1
    assert done.err.startswith("error: the loss is not finite at step 6;") and done.err.count("\n") == 1
    assert checkpoints(tmp_path) == [4] and leftovers(tmp_path) == []
    checkpoint.verify(tmp_path / "ckpt" / "step_00000004")
    last = records(tmp_path)[-1]
    assert last["step"] == 6 and last["loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "events.jsonl").read_text()
    assert records(tmp_path, "events.jsonl")[-1]["event"] == "stop"


def test_after_a_nan_the_run_goes_on_from_before_it(tiny, finished, tmp_path):
    assert tiny(tmp_path, before=NAN.format(step=6, fault=LOSS.format("math.nan"))).code == 1
    assert tiny(tmp_path, init_from="auto").code == 0
    assert differences(outcome(tmp_path), outcome(finished)) == []


@pytest.mark.parametrize("how", ["eval_interval", "save_interval"])
def test_a_gradient_that_is_not_finite_is_never_saved(how, tiny, tmp_path):
    """The loss of that step is still finite, but the weights after it are not."""
    intervals = {"eval_interval": 100, "log_interval": 100, how: 4}
    done = tiny(tmp_path, before=NAN.format(step=8, fault=GRADIENT), **intervals)
    assert done.code == 1 and done.err.startswith("error: the gradient is not finite at step 8;")
    assert checkpoints(tmp_path) == [4]
    assert records(tmp_path)[-1]["loss"] > 0 and records(tmp_path)[-1]["grad_norm"] is None


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path):
    """Loss and gradient are finite, but the update is not. The run also draws a sample, which NaN would break."""
    done = tiny(tmp_path, learning_rate=1e39, warmup_iters=0, eval_interval=1, sample_tokens=5)
    assert done.code == 1
    assert done.err.startswith("error: a weight is not finite at step 1;") and done.err.count("\n") == 1
    assert checkpoints(tmp_path) == []


def test_too_high_a_learning_rate(tiny, tmp_path):
    done = tiny(tmp_path, learning_rate=1e30, eval_interval=1, max_iters=50, warmup_iters=0)
    assert done.code == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1
    for folder in checkpoint.steps(tmp_path).values():
        state = checkpoint.verify(folder)
        assert math.isfinite(state["val_loss"])
        assert all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())


def test_fp16_skips_a_step_whose_gradient_overflows(tiny, tmp_path):
    """Both optimizers skip it, the scale is halved, and the run continues."""
    before = NAN.format(step=3, fault=GRADIENT) + textwrap.dedent("""
        import optim
        step = optim.Muon.step
        optim.Muon.step = lambda self: print('muon steps') or step(self)
    """)
    done = tiny(tmp_path, before=before, dtype="float16", optimizer="muon", max_iters=6, eval_interval=100)
    assert done.code == 0, done.err
    assert done.out.count("muon steps") == 5
    state = checkpoint.verify(tmp_path / "ckpt" / "step_00000006")
    assert state["scaler"]["scale"] == 2.0**15
    assert records(tmp_path)[2]["grad_norm"] is None and len(records(tmp_path)) == 6
    adamw = checkpoint.load_optimizer_state(tmp_path / "ckpt" / "step_00000006")["adamw"]
    assert {int(state["step"]) for state in adamw.values()} == {5}


# -----------------------------------------------------------------------------
# Where a run begins


def test_scratch_refuses_a_folder_with_a_run(tiny, finished):
    before = digest(finished)
    error = one_error(tiny(finished))
    assert "step 12" in error and "--init_from=resume" in error and "--out_dir" in error
    assert digest(finished) == before


def test_resume_needs_something_to_resume(tiny, tmp_path):
    assert "nothing to resume" in one_error(tiny(tmp_path / "run", init_from="resume"), tmp_path / "run")


@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_resuming_a_finished_run_changes_nothing(init_from, tiny, finished):
    before = digest(finished)
    done = tiny(finished, init_from=init_from)
    assert done.code == 0 and done.err == "" and "nothing to do" in done.out
    assert digest(finished) == before


def test_a_finished_run_can_be_extended(tiny, unbroken, tmp_path):
    """With lr_decay_iters set explicitly, 8 + 4 steps equal 12 steps."""
    assert tiny(tmp_path, max_iters=8, lr_decay_iters=12).code == 0
    done = tiny(tmp_path, max_iters=12, lr_decay_iters=12, init_from="resume")
    assert done.code == 0
    assert records(tmp_path, "events.jsonl")[2]["changed"] == {"max_iters": [8, 12]}
    assert differences(outcome(tmp_path), unbroken(max_iters=12, lr_decay_iters=12)) == []


def test_from_the_weights_of_another_run(tiny, finished, tmp_path):
    """It begins at step 0 with a new optimizer state and data order, but its loss is not the loss of a new model."""
    done = tiny(tmp_path / "run", init_from=finished, seed=7, max_iters=2)
    assert done.code == 0, done.err
    assert checkpoints(tmp_path / "run") == [2]
    assert losses(tmp_path / "run")[0] < (losses(finished)[0] + losses(finished)[-1]) / 2
    folder = finished / "ckpt" / "step_00000004"
    done = tiny(tmp_path / "other", init_from=folder, eval_only=True)
    assert f"val {checkpoint.verify(folder)['val_loss']:.4f} " in done.out


@pytest.mark.parametrize(("key", "then", "now"), [("n_embd", 32, 64), ("n_head", 2, 4), ("pos", "learned", "rope")])
def test_weights_that_would_mean_something_else_are_refused(key, then, now, tiny, finished, tmp_path):
    """Even where the shapes are equal."""
    error = one_error(tiny(tmp_path / "run", init_from=finished, **{key: now}), tmp_path / "run")
    assert f"that model has {key}={then}, this one {now}" in error


def test_from_a_model_for_a_longer_context(tiny, tmp_path):
    """Rotary positions are stretched. rope_factor counts from the length of the first training, and is inherited."""
    rotary = dict(pos="rope", max_iters=2)
    assert tiny(tmp_path / "short", **rotary).code == 0
    longer = dict(init_from=tmp_path / "short", max_iters=2, block_size=64, batch_size=1, rope_scaling="yarn", pos="")
    done = tiny(tmp_path / "long", **longer, rope_factor=4)
    assert done.code == 0, done.err
    model = checkpoint.verify(tmp_path / "long" / "ckpt" / "step_00000002")["model"]
    assert (model["block_size"], model["rope_scaling"], model["rope_factor"]) == (64, "yarn", 4.0)
    assert tiny(tmp_path / "long", **longer | dict(init_from="resume", max_iters=3), rope_factor=4).code == 0
    error = one_error(tiny(tmp_path / "wrong", **longer, rope_factor=2), tmp_path / "wrong")
    assert "block_size=64" in error and "rope_factor=2" in error and "times 16" in error
    again = dict(init_from=tmp_path / "long", max_iters=1, block_size="", batch_size=1)
    assert tiny(tmp_path / "again", **again).code == 0
    assert checkpoint.verify(tmp_path / "again" / "ckpt" / "step_00000001")["model"] == model


def test_a_checkpoint_from_before_a_field_goes_on_with_its_default(tiny, unbroken, tmp_path):
    assert tiny(tmp_path, max_iters=8, lr_decay_iters=12).code == 0
    for folder in checkpoint.steps(tmp_path).values():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for key in ("rope_scaling", "rope_factor"):
            del state["model"][key], state["config"][key]
        state = {**state, "sha256": checkpoint.own_sha256(state)}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    done = tiny(tmp_path, max_iters=12, lr_decay_iters=12, init_from="resume")
    assert done.code == 0, done.err
    assert differences(outcome(tmp_path), unbroken(max_iters=12, lr_decay_iters=12)) == []


def test_weights_for_other_characters_are_refused(tiny, finished, tmp_path):
    """The same ids would mean another text, whatever the shapes."""
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["chars"] = tokenizer["chars"][::-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "tokenizer" in one_error(tiny(tmp_path / "run", init_from=other), tmp_path / "run")


@pytest.mark.parametrize("init_from", ["resum", "gpt2-huge", "{words}"])
def test_from_nonsense(init_from, tiny, words, tmp_path):
    init_from = init_from.format(words=words)
    assert init_from in one_error(tiny(tmp_path / "run", init_from=init_from), tmp_path / "run")


@pytest.mark.parametrize(
    "settings, then, now",
    [
        (dict(seed=7), "seed=1337", "7"),
        (dict(batch_size=2), "batch_size x gradient_accumulation_steps = 4 x 1", "2 x 1"),
        (dict(gradient_accumulation_steps=2), "batch_size x gradient_accumulation_steps = 4 x 1", "4 x 2"),
        (dict(tokens_per_step=128), "batch_size x gradient_accumulation_steps = 4 x 1", "4 x 2"),
        (dict(optimizer="muon"), "optimizer=adamw", "muon"),
        (dict(n_layer=2), "n_layer=1", "2"),
        (dict(block_size=32), "block_size=16", "32"),
        (dict(pos="rope"), "pos=learned", "rope"),
    ],
)
def test_another_run_is_not_resumed(settings, then, now, tiny, finished):
    before = digest(finished)
    error = one_error(tiny(finished, init_from="auto", **{"max_iters": 20, **settings}))
    assert f"with {then}, now it is {now};" in error
    assert digest(finished) == before


def test_a_run_goes_on_in_other_micro_batches(tiny, finished, tmp_path):
    """For example on a smaller GPU: an update has the same sequences, and its result is equal up to rounding."""
    for name, settings in {"as it was": {}, "cut": dict(batch_size=2, gradient_accumulation_steps=2)}.items():
        shutil.copytree(finished, tmp_path / name)
        done = tiny(tmp_path / name, init_from="resume", max_iters=16, **settings)
        assert done.code == 0, done.err
    then, now = (records(tmp_path / name) for name in ("as it was", "cut"))
    assert len(then) == 16 and [r["tokens"] for r in now] == [r["tokens"] for r in then]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in now] == pytest.approx([r[key] for r in then], rel=1e-5)
    event = [e for e in records(tmp_path / "cut", "events.jsonl") if e["event"] == "resume"][-1]
    assert event["changed"]["batch_size"] == [4, 2]
    assert event["changed"]["gradient_accumulation_steps"] == [1, 2]


def test_another_dataset_is_not_resumed(tiny, finished, words, tmp_path):
    shutil.copytree(words, tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ", encoding="utf-8")
    error = one_error(tiny(finished, init_from="resume", dataset=tmp_path / "data", max_iters=20))
    for folder in (words, tmp_path / "data"):
        assert hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() in error


def test_what_may_change_is_recorded(tiny, finished, words, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(words, tmp_path / "data")  # the same dataset in another folder
    changes = dict(max_iters=14, learning_rate=5e-3, dropout=0.1)
    done = tiny(tmp_path / "run", init_from="resume", dataset=tmp_path / "data", **changes)
    assert done.code == 0 and done.err.count("\n") == 1 and "learning_rate" in done.err
    resume = [e for e in records(tmp_path / "run", "events.jsonl") if e["event"] == "resume"][-1]
    assert resume["step"] == 12 and resume["changed"] == {
        "max_iters": [12, 14], "dataset": [str(words), str(tmp_path / "data")], "dropout": [0.0, 0.1],
        "learning_rate": [1e-2, 5e-3],
    }
    assert records(tmp_path / "run")[-1]["step"] == 14
    assert json.loads((tmp_path / "run" / "config.json").read_text())["learning_rate"] == 5e-3


def test_another_machine_is_recorded(tiny, tmp_path):
    """dtype=auto and threads=0 are spelled the same there, but resolve to other values."""
    machine = "import device, torch\ndevice.native_bfloat16 = lambda: {}\ntorch.set_num_threads({})"
    settings = dict(dtype="auto", threads=0)
    assert tiny(tmp_path, before=machine.format(True, 1), max_iters=4, **settings).code == 0
    done = tiny(tmp_path, before=machine.format(False, 2), max_iters=4, init_from="auto", **settings)
    assert done.code == 0 and done.err == "" and "nothing to do" in done.out
    done = tiny(tmp_path, before=machine.format(False, 2), max_iters=5, init_from="auto", **settings)
    assert done.code == 0, done.err
    changed = [e["changed"] for e in records(tmp_path, "events.jsonl") if e["event"] == "resume"]
    assert changed == [{"max_iters": [4, 5], "threads": [1, 2], "dtype": ["bfloat16", "float32"]}]


# -----------------------------------------------------------------------------
# What is written, and how often


def test_the_run_folder(finished, words):
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "env.json", "metrics.jsonl", "events.jsonl", "ckpt", "tokenizer.json"
    }
    lines = records(finished)
    assert [r["step"] for r in lines] == list(range(1, 13))
    assert [r["tokens"] for r in lines] == [64 * step for step in range(1, 13)]
    every = {"step", "tokens", "wall_s", "loss", "lr", "grad_norm", "tok_per_s", "mfu", "mem_gb", "rss_gb",
             "step_ms", "data_ms", "forward_ms", "backward_ms", "optim_ms"}
    for r in lines:
        assert r.keys() == every | ({"val_loss", "val_tokens", "val_sha256"} if r["step"] in (4, 8, 12) else set())
    walls = [r["wall_s"] for r in lines]
    assert walls == sorted(walls)
    env = json.loads((finished / "env.json").read_text())
    assert env["dataset_sha256"] == hashlib.sha256((words / "manifest.json").read_bytes()).hexdigest()
    state = checkpoint.verify(finished / "ckpt" / "step_00000012")
    assert state["config"] == json.loads((finished / "config.json").read_text())
    assert state["metrics_bytes"] == (finished / "metrics.jsonl").stat().st_size
    assert state["val_loss"] == lines[-1]["val_loss"] and state["threads"] == state["ranks"] == 1


def test_the_learning_rate_is_the_schedules(finished):
    lrs = [r["lr"] for r in records(finished)]
    assert lrs[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])  # two steps of warm-up, none of them zero
    assert lrs[2:] == sorted(lrs[2:], reverse=True) and lrs[-1] == pytest.approx(1e-3, rel=0.3)


def test_accumulation_changes_nothing_but_memory(tiny, words, tmp_path):
    """4 x 1, 2 x 2 and 1 x 4 sequences: at each step the same tokens, and the same mean loss up to rounding."""
    runs, seen = {}, {}
    tokens = Tokens(words, "train")
    for micro in (1, 2, 4):
        settings = {"batch_size": 4 // micro, "gradient_accumulation_steps": micro, "optimizer": "muon"}
        assert tiny(tmp_path / str(micro), **settings).code == 0
        runs[micro] = records(tmp_path / str(micro))
        loader = Loader(tokens, 16, 4 // micro, accumulation=micro, seed=1337)
        seen[micro] = torch.cat([next(loader)[0] for _ in range(3 * micro)])
        loader.close()
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[1], seen[4])
    for micro in (2, 4):
        for a, b in zip(runs[1], runs[micro], strict=True):
            assert a["tokens"] == b["tokens"]
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_the_loss_is_the_mean_over_micro_batches(tiny, tmp_path):
    before = """
        import model
        forward = model.GPT.forward
        def told(self, *args, **kwargs):
            logits, loss = forward(self, *args, **kwargs)
            print("micro", loss.item()) if self.training else None
            return logits, loss
        model.GPT.forward = told
    """
    done = tiny(tmp_path, before=before, gradient_accumulation_steps=3, max_iters=4)
    micro = [float(line.split()[1]) for line in done.out.splitlines() if line.startswith("micro ")]
    assert len(micro) == 12
    assert losses(tmp_path) == pytest.approx(np.reshape(micro, (4, 3)).mean(1).tolist(), rel=1e-6)


def test_dropout_is_drawn_from_seed_step_and_micro_step(tiny, tmp_path):
    """Masks differ between steps, and are the same when the run is repeated or resumed in the middle."""
    before = """
        import model, torch
        forward = model.GPT.forward
        def told(self, *args, **kwargs):
            print("drawn", torch.get_rng_state().sum().item(), torch.initial_seed()) if self.training else None
            return forward(self, *args, **kwargs)
        model.GPT.forward = told
    """
    drawn = []
    for seed, iters in ((1, 2), (1, 4), (2, 4)):
        settings = dict(seed=seed, max_iters=iters, init_from="auto", dropout=0.1, gradient_accumulation_steps=3)
        done = tiny(tmp_path / str(seed), before=before, **settings)
        drawn += [line for line in done.out.splitlines() if line.startswith("drawn ")]
    assert len(drawn) == 24 and len(set(drawn)) == 24
    done = tiny(tmp_path / "again", before=before, **settings)
    assert [line for line in done.out.splitlines() if line.startswith("drawn ")] == drawn[12:]


def test_a_context_that_grows(tiny, tmp_path):
    """Every step has the same number of tokens, first in shorter rows: 4, 8 and 16, then block_size."""
    before = """
        import model
        forward = model.GPT.forward
        def told(self, idx, *args, **kwargs):
            print("shape", *idx.shape) if self.training else None
            return forward(self, idx, *args, **kwargs)
        model.GPT.forward = told
    """
    settings = dict(context_start=4, context_iters=6, max_iters=8)
    done = tiny(tmp_path, before=before, **settings)
    shapes = [tuple(map(int, line.split()[1:])) for line in done.out.splitlines() if line.startswith("shape ")]
    assert shapes == [(16, 4)] * 3 + [(8, 8)] * 3 + [(4, 16)] * 2
    assert [r["tokens"] for r in records(tmp_path)] == [64 * step for step in range(1, 9)]


def test_the_advice_for_one_gpu(tiny, tmp_path):
    """As the page gives it, on top of the OpenWebText configuration, with a small model and a short context."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    words = re.search(r"`(--tokens_per_step=\d+ --batch_size=0)`", page)
    small = dict(batch_size="", block_size=256, n_layer=1, n_head=1, n_embd=8, max_iters=1, eval_interval=1)
    done = tiny(tmp_path / "run", "config/owt_124m.py", *words[1].split(), **small)
    assert done.code == 0 and "step        491,520 tokens = " in done.out, done.err
    done = tiny(tmp_path / "nanogpt", "config/owt_124m.py", gradient_accumulation_steps=2, **{**small, "batch_size": 4})
    assert done.code == 0 and "step        2,048 tokens = 4 x 256 x 2" in done.out, done.err


def test_the_time_between_steps_counts(tiny, tmp_path):
    """On a clock that an update moves by 1 s, a line on the screen by 10, an evaluation by 100, a checkpoint by 1,000,
    a probe by 10,000 and the profiler by 100,000: a step lasts until the next one begins, but evaluating, saving,
    probing and profiling are none of it."""
    done = tiny(tmp_path, max_iters=6, eval_interval=3, probe_interval=5, peak_flops=1e9, before="""
        import time
        import checkpoint, eval, optim
        from training import probe
        from training import monitor, profiler
        now = [0.0]
        time.perf_counter = lambda: now[0]
        def moving(module, name, seconds):
            call = getattr(module, name)
            def moves(*args, **options):
                now[0] += seconds
                return call(*args, **options)
            setattr(module, name, moves)
        moving(optim.Optimizers, "step", 1)
        moving(monitor, "show", 10)
        moving(eval, "evaluate", 100)
        moving(checkpoint, "save", 1000)
        moving(probe.Update, "end", 10000)
        moving(profiler.Profiler, "after", 100000)
    """)
    assert done.code == 0, done.err
    found = records(tmp_path)
    # step 3 is evaluated: its line is shown within the time that does not count
    assert [r["step_ms"] for r in found] == [1000, 11000, 11000, 1000, 11000, 11000]
    assert [r["wall_s"] for r in found] == [1, 12, 23, 24, 10035, 10046]
    assert [r["tok_per_s"] for r in found] == [round(64 / seconds) for seconds in (1, 11, 11, 1, 11, 11)]
    assert [r["optim_ms"] for r in found] == [1000] * 6


def test_what_is_asked_of_the_gpu_is_told_to_torch(tiny, tmp_path):
    """There is no GPU here, so the functions are patched; without that, a CUDA kernel of attention is refused."""
    done = tiny(tmp_path / "run", max_iters=1, tf32=True, sdpa="flash", before="""
        import device
        device.use_tf32 = lambda enabled, where: print("tf32", enabled, where)
        device.use_sdpa = lambda name, where: print("sdpa", name, where)
    """)
    assert done.code == 0 and done.out.startswith("tf32 True cpu\nsdpa flash cpu\n"), done.err
    assert "sdpa='flash' needs a CUDA device" in one_error(tiny(tmp_path / "other", sdpa="flash"), tmp_path / "other")


def test_tokens_per_step_sets_the_accumulation(tiny, tmp_path):
    done = tiny(tmp_path / "run", tokens_per_step=192, max_iters=1)
    assert done.code == 0 and "192 tokens = 4 x 16 x 3" in done.out
    assert records(tmp_path / "run")[0]["tokens"] == 192
    error = one_error(tiny(tmp_path / "other", tokens_per_step=200), tmp_path / "other")
    assert "192 and 256" in error
    error = one_error(tiny(tmp_path / "other", tokens_per_step=10), tmp_path / "other")
    assert "64 and 128" in error
    error = one_error(tiny(tmp_path / "other", tokens_per_step=192, gradient_accumulation_steps=2), tmp_path / "other")
    assert "takes 3 micro-steps" in error and "gradient_accumulation_steps=2" in error


def test_intervals(tiny, tmp_path):
    done = tiny(tmp_path, log_interval=5, eval_interval=6, save_interval=4, keep_checkpoints=100, max_iters=13)
    assert done.code == 0
    assert [r["step"] for r in records(tmp_path)] == [5, 6, 10, 12, 13]
    assert [r["step"] for r in records(tmp_path) if "val_loss" in r] == [6, 12, 13]
    assert checkpoints(tmp_path) == [4, 6, 8, 12, 13]


def test_log_interval_changes_no_number(tiny, finished, tmp_path):
    assert tiny(tmp_path, log_interval=5).code == 0
    every = {r["step"]: r for r in records(finished)}
    for r in records(tmp_path):
        assert {k: r.get(k) for k in ("loss", "val_loss", "lr", "grad_norm")} == {
            k: every[r["step"]].get(k) for k in ("loss", "val_loss", "lr", "grad_norm")
        }


def test_saving_by_the_clock(tiny, tmp_path):
    """--save_minutes, with a clock that advances two minutes each time it is read."""
    clock = "import itertools, time\nminutes = itertools.count(0, 120)\ntime.monotonic = lambda: float(next(minutes))"
    settings = dict(eval_interval=100, keep_checkpoints=100, max_iters=6)
    assert tiny(tmp_path / "5", before=clock, save_minutes=5, **settings).code == 0
    assert checkpoints(tmp_path / "5") == [3, 6]
    assert tiny(tmp_path / "0", before=clock, save_minutes=0, **settings).code == 0
    assert checkpoints(tmp_path / "0") == [6]


SCRIPTED = """
import eval
real, script = eval.evaluate, iter({})
eval.evaluate = lambda *args, **more: {{**real(*args, **more), "loss": next(script)}}
"""


@pytest.mark.parametrize("settings, kept", [
    (dict(keep_checkpoints=2), [4, 10, 12]),  # the last two and the best
    (dict(always_save_checkpoint=False, keep_checkpoints=5), [4, 12]),  # the last and the best
    (dict(keep_checkpoints=3, save_interval=1), [4, 10, 11, 12]),
])
def test_the_last_few_and_the_best_are_kept(settings, kept, tiny, tmp_path):
    before = SCRIPTED.format([3.0, 1.5, 2.0, 1.5, 1.75, 9.0])
    assert tiny(tmp_path, before=before, eval_interval=2, **settings).code == 0
    assert checkpoints(tmp_path) == kept
    assert checkpoint.find(tmp_path, "best")[1]["val_loss"] == 1.5


def test_evaluate_only(tiny, finished, tmp_path):
    before = digest(finished)
    done = tiny(finished, init_from="resume", eval_only=True)
    assert done.code == 0, done.err
    val_loss = records(finished)[-1]["val_loss"]
    assert f"val {val_loss:.4f}  ppl {math.exp(val_loss):.3f}  {val_loss / math.log(2):.4f} bits/char" in done.out
    assert digest(finished) == before
    assert tiny(tmp_path / "run", eval_only=True).code == 0 and not (tmp_path / "run").exists()


def test_samples_at_evaluation(tiny, finished, tmp_path):
    """They are shown and recorded, are equal in each run of a seed, and change nothing in the training."""
    done = tiny(tmp_path, sample_tokens=20, sample_start="the ")
    samples = [e for e in records(tmp_path, "events.jsonl") if e["event"] == "sample"]
    assert [e["step"] for e in samples] == [4, 8, 12]
    for e in samples:
        assert e["text"].startswith("the ") and len(e["text"]) <= 24 and e["text"] in done.out
    assert differences(outcome(tmp_path), outcome(finished)) == []


def test_progress_bar_on_a_terminal(train, words, tmp_path):
    """One line is rewritten, except after an evaluation; it is never wider than the terminal."""
    master, slave = pty.openpty()
    train.start(dataset=words, out_dir=tmp_path, tty=os.ttyname(slave), env={"COLUMNS": "170"})
    shown = b""
    done = train.wait()
    while select.select([master], [], [], 0.2)[0]:
        shown += os.read(master, 1 << 16)
    os.close(slave)
    os.close(master)
    assert done.code == 0, done.err
    bars = [line for line in shown.decode().replace("\r\n", "\n").split("\r") if "step " in line and "[" in line]
    assert len(bars) == 12
    assert all(len(line.split("\n")[0]) < 170 for line in bars)
    assert [i + 1 for i, line in enumerate(bars) if "\n" in line] == [4, 8, 12]
    assert bars[-1].startswith("[#####") and bars[0].count("#") < bars[6].count("#") < bars[-1].count("#")


# -----------------------------------------------------------------------------
# The same numbers each time


def test_the_same_command_gives_the_same_bits(tiny, finished, tmp_path):
    assert tiny(tmp_path).code == 0
    assert differences(outcome(tmp_path), outcome(finished)) == []
    assert tiny(tmp_path / "other", seed=2).code == 0  # another seed gives other numbers
    assert "model" in differences(outcome(tmp_path / "other"), outcome(finished))


GOLDEN = {
    "adamw": [3.037278, 2.874266, 2.826391, 2.740773, 2.662897, 2.678509, 2.421658, 2.936374, 2.476729, 2.612411,
              2.504364, 2.473212, 2.494906],
    "muon": [2.992292, 2.759800, 2.577936, 2.348317, 2.080880, 1.951158, 1.857395, 1.822350, 1.777188, 1.702210,
             1.327828, 1.448631, 1.469958],
}


@pytest.mark.parametrize("optimizer", GOLDEN)
def test_golden_curve(optimizer, tiny, tmp_path):
    """Losses of a fixed seed are as recorded: this covers initialisation, data, model, optimizer and schedule."""
    stack = dict(pos="rope", qk_norm="rms", norm="rmsnorm", activation="relu2", tie_weights=False, lr_schedule="wsd")
    settings = dict(dtype="float32", max_iters=24, log_interval=2, eval_interval=24)
    done = tiny(tmp_path, optimizer=optimizer, **settings, **(stack if optimizer == "muon" else {}))
    assert done.code == 0, done.err
    curve = losses(tmp_path) + [records(tmp_path)[-1]["val_loss"]]
    assert curve == pytest.approx(GOLDEN[optimizer], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_falls_in_every_precision(dtype, tiny, tmp_path):
    done = tiny(tmp_path, dtype=dtype, max_iters=40, eval_interval=40)
    assert done.code == 0 and dtype in done.out
    curve = losses(tmp_path)
    assert sum(curve[-5:]) / 5 < curve[0] - 0.5
    model = load_file(tmp_path / "ckpt" / "step_00000040" / "model.safetensors")
    assert {t.dtype for t in model.values()} == {torch.float32}


# -----------------------------------------------------------------------------
# Compilation


@pytest.mark.parametrize("how", ["raises", "raises without a word", "no compiler"])
def test_compile_falls_back_with_one_warning(how, tiny, finished, tmp_path):
    word = '"boom\\nand more"' if how == "raises" else ""
    before = """
        import device
        device.has_compiler = lambda variable, names: False
    """ if how == "no compiler" else f"""
        import device, torch
        device.has_compiler = lambda variable, names: True
        def compile(model, dynamic):
            raise RuntimeError({word})
        torch.compile = compile
    """
    done = tiny(tmp_path, compile=True, before=before)
    assert done.code == 0
    assert done.err.startswith("warning: torch.compile does not work here (") and done.err.count("\n") == 1
    assert {"raises": "boom", "no compiler": "no C++ compiler"}.get(how, "RuntimeError") in done.err
    assert differences(outcome(tmp_path), outcome(finished)) == []


def test_a_run_without_fused_operations_says_why(tiny, tmp_path):
    done = tiny(tmp_path / "with", max_iters=1)
    assert "CPU threads (asked for)" in done.out and "\nfused " not in done.out
    done = tiny(tmp_path / "without", max_iters=1, before="""
        import native
        native.load = lambda source: (None, "no C++ compiler: apt install g++")
    """)
    assert done.code == 0
    assert "\nfused       not at all, so steps take longer: no C++ compiler: apt install g++\n" in done.out


def test_the_cause_of_a_failure_to_compile_is_named(tiny, finished, tmp_path):
    """torch.compile raises an error of its own; the cause is inside it."""
    done = tiny(tmp_path, compile=True, before="""
        import torch
        def compile(model, dynamic):
            try:
                raise FileNotFoundError("Python.h is not there")
            except FileNotFoundError as e:
                raise RuntimeError("backend='inductor' raised:") from e
        torch.compile = compile
    """)
    assert done.code == 0 and "FileNotFoundError: Python.h is not there" in done.err and "inductor" not in done.err


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('CUDA out of memory. Tried 9 GB')",
                                   "RuntimeError(\"DefaultCPUAllocator: can't allocate memory\")"])
def test_full_memory_is_no_trouble_of_the_compiler(error, tiny, tmp_path):
    """It shows in the first passes, which compile; also where the compiler has wrapped the error."""
    done = tiny(tmp_path, compile=True, before=f"""
        import torch
        def compile(model, dynamic):
            try:
                raise {error}
            except Exception as e:
                raise RuntimeError("backend='inductor' raised:") from e
        torch.compile = compile
    """)
    assert done.code == 2 and "torch.compile" not in done.err and "memory" in done.err
    assert "--batch_size=2 --gradient_accumulation_steps=2" in done.err


def test_evaluations_are_compiled_too(tiny, finished, tmp_path):
    done = tiny(tmp_path, compile=True, before="""
        import torch
        def compile(model, dynamic):
            def forward(*args, **options):
                if not torch.is_grad_enabled():
                    print("evaluates compiled")
                return model(*args, **options)
            return forward
        torch.compile = compile
    """)
    assert done.code == 0 and done.err == ""
    assert done.out.count("evaluates compiled") == 3  # at steps 4, 8 and 12, in one batch
    assert differences(outcome(tmp_path), outcome(finished)) == []


def test_an_evaluation_that_does_not_compile_runs_all_the_same(tiny, finished, tmp_path):
    done = tiny(tmp_path, compile=True, before="""
        import torch
        def compile(model, dynamic):
            def forward(*args, **options):
                if not torch.is_grad_enabled():
                    raise torch._dynamo.exc.BackendCompilerFailed(len, OSError("no room for the kernels"), None)
                return model(*args, **options)
            return forward
        torch.compile = compile
    """)
    assert done.code == 0 and done.err.count("\n") == 1
    assert "does not work for the evaluation (OSError: no room for the kernels)" in done.err
    assert differences(outcome(tmp_path), outcome(finished)) == []


@pytest.mark.slow
def test_compiled(tiny, finished, tmp_path):
    """The losses are equal up to rounding, checkpoints lack torch.compile's prefix, and the run resumes uncompiled."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = tiny(tmp_path / "run", compile=True, max_iters=8, lr_decay_iters=12, env=env)
    assert done.code == 0 and done.err == ""
    assert losses(tmp_path / "run") == pytest.approx(losses(finished)[:8], rel=1e-3)
    names = load_file(tmp_path / "run" / "ckpt" / "step_00000008" / "model.safetensors").keys()
    assert names == load_file(finished / "ckpt" / "step_00000008" / "model.safetensors").keys()
    assert tiny(tmp_path / "run", init_from="resume", lr_decay_iters=12).code == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-3)


# -----------------------------------------------------------------------------
# nanoGPT's habits, and a user's mistakes

NANOGPT = """
# train a miniature character-level model
# good for debugging and playing on macbooks and such
import time

out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 200
log_interval = 10 # don't print too too often

# we expect to overfit on this small dataset, so only save when val improves
always_save_checkpoint = False

wandb_log = False # override via command line if you like
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt' + str(time.time())

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256 # context of up to 256 previous characters

# baby GPT model :)
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3 # with baby networks can afford to go a bit higher
max_iters = 5000
lr_decay_iters = 5000 # make equal to max_iters usually
min_lr = 1e-4 # learning_rate / 10 usually
beta2 = 0.99 # make a bit bigger because number of tokens per iter is small

warmup_iters = 100 # not super necessary potentially
backend = 'nccl'

# on macbook also add
# device = 'cpu'  # run on cpu only
# compile = False # do not torch compile the model
"""


def test_a_config_file_of_nanogpt_runs_as_it_is(words, tmp_path):
    """As a user would: python train.py FILE --key=value, from another folder."""
    (tmp_path / "train_shakespeare_char.py").write_text(NANOGPT, encoding="utf-8")
    command = [sys.executable, str(ROOT / "train.py"), "train_shakespeare_char.py", "--device=cpu", "--compile=False",
               f"--dataset={words}", "--block_size=16", "--n_layer=1", "--n_head=2", "--n_embd=32", "--batch_size", "4",
               "--max_iters=20", "--lr_decay_iters=20", "--eval_interval=10", "--eval_iters=2", "--threads=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = tmp_path / "out-shakespeare-char"
    assert [r["step"] for r in records(out)] == [10, 20]
    config = json.loads((out / "config.json").read_text())
    assert config["dropout"] == 0.2 and config["beta2"] == 0.99 and config["wandb_run_name"].startswith("mini-gpt1")


MISTAKES = {
    "'nowhere'": dict(dataset="nowhere"),
    "learning_rat": dict(learning_rat=1),
    "lr_schedule='cosin'": dict(lr_schedule="cosin"),
    "optimizer='adam'": dict(optimizer="adam"),
    "n_embd=33": dict(n_embd=33),
    "dropout=1.0": dict(dropout=1.0),
    "activation='gelux'": dict(activation="gelux"),
    "device='cuda:99'": dict(device="cuda:99"),
    "device='gpu'": dict(device="gpu"),
    "dtype='fp16'": dict(dtype="fp16"),
    "max_iters=0": dict(max_iters=0),
    "batch_size=0": dict(batch_size=0),
    "gradient_accumulation_steps=0": dict(gradient_accumulation_steps=0),
    "gradient_accumulation_steps=-1": dict(gradient_accumulation_steps=-1),
    "block_size=0": dict(block_size=0, tokens_per_step=64),
    "context_start=6": dict(context_start=6),
    "context_start=32": dict(context_start=32),
    "log_interval=0": dict(log_interval=0),
    "beta": dict(beta1=1.5),
    "vocab_size=5": dict(vocab_size=5),
    "block_size=100000": dict(block_size=100000),
    "sample_start": dict(sample_tokens=5, sample_start=" "),
    "'Z'": dict(sample_tokens=5, sample_start="Zebra"),
    "tp_size=2": dict(tp_size=2),  # without torchrun
    "zero_stage=4": dict(zero_stage=4),
    "cpu_offload": dict(cpu_offload=True),
}


@pytest.mark.parametrize("named", MISTAKES)
def test_a_mistake_gets_one_line(named, tiny, tmp_path):
    settings = dict(MISTAKES[named])
    argv = ["--sample_start="] if settings.get("sample_start") == " " and settings.pop("sample_start") else []
    assert named in one_error(tiny(tmp_path / "run", *argv, **settings), tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
def test_a_gpu_that_is_not_there(tiny, tmp_path):
    assert "device='cuda'" in one_error(tiny(tmp_path / "run", device="cuda"), tmp_path / "run")


def test_an_out_dir_that_cannot_be(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in one_error(tiny(tmp_path / "file" / "run"))


FREE = "import device\ndevice.free_memory = lambda *_: {}"


def test_the_largest_micro_batch_that_fits(tiny, tmp_path):
    """It divides tokens_per_step. The run equals one with any other micro-batch, and resumes with the one it has."""
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
    costs = plan.costs_of(GPT(config))
    takes = [plan.step_memory(costs, n, T=16, micro_steps=12 // n, cuda=False)["total"] for n in (4, 6)]
    limit = sum(takes) / 2 / (1 - plan.reserve)  # 4 fit, and the next divisor of 12 does not
    settings = dict(tokens_per_step=12 * 16, vocab_size=50, max_iters=4, batch_size=0)
    done = tiny(tmp_path / "fits", before=FREE.format(int(limit)), **settings)
    assert done.code == 0 and "192 tokens = 4 x 16 x 3" in done.out, done.err
    one = tiny(tmp_path / "one", **{**settings, "batch_size": 1})
    assert one.code == 0, one.err
    assert losses(tmp_path / "fits") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    again = {**settings, "max_iters": 6, "init_from": "resume", "tokens_per_step": 0, "gradient_accumulation_steps": 9}
    again = tiny(tmp_path / "fits", before=FREE.format(2**40), **again)
    assert again.code == 0 and "192 tokens = 4 x 16 x 3" in again.out, again.err
    error = one_error(tiny(tmp_path / "none", before=FREE.format(1000), **settings), tmp_path / "none")
    assert "batch_size=0: a step takes at least" in error and "--activation_checkpointing" in error
    error = one_error(tiny(tmp_path / "none", before=FREE.format(None), **settings), tmp_path / "none")
    assert "batch_size=0" in error and "nothing says how much memory" in error


def test_a_step_that_memory_does_not_hold(tiny, tmp_path):
    """The run warns beforehand, and an out-of-memory error of a GPU becomes one line."""
    full = """
        import optim, torch
        def step(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of.\\nMore")
        optim.Optimizers.step = step
    """
    done = tiny(tmp_path, before=textwrap.dedent(full) + FREE.format(1000), gradient_accumulation_steps=2)
    warning, error = done.err.splitlines()
    assert done.code == 2 and warning.startswith("warning: a step takes about") and "1e-06 GB are free" in warning
    assert error.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB: "
                            "--batch_size=2 --gradient_accumulation_steps=4 is the same update in smaller pieces")


def test_a_bug_keeps_its_traceback(tiny, tmp_path):
    """Only errors of the setup are a user's mistake: an error in the loop is ours, and must be findable."""
    bug = "import optim\ndef step(self):\n    raise ValueError('a bug')\noptim.Optimizers.step = step"
    done = tiny(tmp_path, before=bug)
    assert done.code == 1 and "Traceback" in done.err and "a bug" in done.err


def test_a_mix_trains_and_resumes_and_a_changed_shard_is_refused(tiny_dataset, tiny_settings, tmp_path, call_script):
    other = tmp_path / "other"
    shutil.copytree(tiny_dataset, other)
    mix = f"--dataset={tiny_dataset}:0.7,{other}:0.3"
    settings = [word for word in tiny_settings if not word.startswith("--dataset")]
    code, out, err = call_script("train.py", *settings, mix, f"--out_dir={tmp_path / 'whole'}", "--verify_data")
    assert code == 0, err
    half = [*settings, mix, f"--out_dir={tmp_path / 'half'}"]
    assert call_script("train.py", *half, "--max_iters=3", "--lr_decay_iters=6")[0] == 0
    assert call_script("train.py", *half, "--init_from=resume", "--loader_threads=3")[0] == 0
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("whole", "half")]
    assert losses[0] == losses[1]
    code, out, err = call_script("train.py", *half, "--init_from=resume", "--max_iters=9", f"--dataset={tiny_dataset}")
    assert code == 2 and "dataset_sha256" in err
    assert call_script("eval.py", f"--out_dir={tmp_path / 'whole'}")[0] == 0

    shard = other / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x00")
    code, out, err = call_script("train.py", *settings, mix, f"--out_dir={tmp_path / 'new'}", "--verify_data")
    assert code == 2 and err.count("\n") == 1 and str(shard) in err and not (tmp_path / "new").exists()


def test_a_constant_learning_rate_has_no_warm_up(run_script, tiny_settings, tmp_path):
    """decay_lr=False as nanoGPT means it: its config/finetune_shakespeare.py sets no warm-up and takes 20 steps."""
    done = run_script("train.py", *tiny_settings, f"--out_dir={tmp_path / 'run'}", "--decay_lr=false")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["lr"] for line in lines] == [1e-2] * 6
