"""Many processes, one answer: every layout against one process, and what can happen to a run of several."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from layouts import LAYOUTS, MODELS, SIZES, Numbers, cases
from runs import ROOT, TINY, differences, losses, outcome, records
from safetensors.torch import load_file

import checkpoint
from loader import Batch, Loader
from model import GPT, GPTConfig
from parallel import Layout, checkpoint_activations
from training.ranks import own_device

pytest_plugins = ["runs"]

SAME = 1e-5  # relative, in fp32
FAULT = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
import optim
rank, attempt = os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT")
real, calls = optim.Optimizers.step, []
def step(self):
    calls.append(None)
    {fault}
    return real(self)
optim.Optimizers.step = step
sys.argv[0] = "train.py"
runpy.run_path({script!r}, run_name="__main__")
"""


def start(ranks, script, *argv, restarts=0):
    """torchrun of a script on `ranks` processes -> subprocess.Popen"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
               f"--max-restarts={restarts}", "--monitor-interval=0.1", str(script), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def flags(words, out, **settings):
    settings = {**TINY, "gradient_accumulation_steps": 4, "n_layer": 2, "dataset": words, "out_dir": out, **settings}
    return [f"--{key}={value}" for key, value in settings.items()]


def finish(process):
    process.out, process.err = process.communicate(timeout=300)
    return process


@pytest.fixture(scope="session")
def trained(train, words):
    """trained(ranks, out, **settings) -> out, after that many ranks have trained there."""

    def trained(ranks, out, **settings):
        settings = {"gradient_accumulation_steps": 4, "n_layer": 2, "dataset": words, "out_dir": out, **settings}
        done = train(ranks=ranks, **settings)
        assert done.code == 0, done.err
        return out

    return trained


def faulty(tmp_path, fault):
    """A script that is train.py, except that it runs `fault` before each update."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULT.format(root=str(ROOT), script=str(ROOT / "train.py"), fault=fault),
                      encoding="utf-8")
    return script


def close(a, b):
    return all(abs(x - y) <= SAME * abs(y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="session")
def on_two(train):
    """on_two(code) -> what two ranks printed that ran this code without failing."""

    def on_two(code):
        done = train(ranks=2, before=code)  # which ends the process, before there is any training
        assert done.code == 0, done.err
        return done

    return on_two


EXPOSED = """
import time
import torch, torch.distributed as dist
from training import profiler as profiling
from training.ranks import all_fail_together
from parallel import Layout
with all_fail_together():
    layout, x = Layout(), torch.ones(300, 300)
    profiler, found, look = profiling.Profiler("", torch.device("cpu"), "none", 1), [], profiling.communication

    def late():
        if layout.rank:
            time.sleep(0.1)
        dist.all_reduce(torch.ones(1000))

    def hidden():
        dist.barrier()
        if layout.rank:
            time.sleep(0.1)
        work = dist.all_reduce(torch.ones(1000), async_op=True)
        while not work.is_completed():
            x @ x
        work.wait()

    for call in (late, hidden):
        spans = []
        profiling.communication = lambda events: spans.extend(look(events)) or spans
        exposed = profiler.exposed(call)
        talk, work = spans
        within = sum(any(a <= start and end <= b for a, b in talk) for start, end in work)
        found.append([exposed, profiling.covered(talk) / 1000, within])
    if layout.rank == 0:
        print(found)
"""


def test_communication_is_exposed_where_nothing_is_computed_meanwhile(on_two):
    """Rank 0 waits for rank 1, idle or busy. The machine decides for how long, but not which span lies within which."""
    done = on_two(EXPOSED)
    late, hidden = json.loads(done.out.splitlines()[-1])  # torch 2.9 has gloo speak before
    exposed, talk, computations = late
    assert exposed > 0 and exposed == pytest.approx(talk, rel=0.5) and computations < 10
    exposed, talk, computations = hidden
    assert 0 <= exposed < talk and computations > 10


GATHERED = """
import torch
from model import GPT, GPTConfig
from parallel import Layout
from training.ranks import all_fail_together
with all_fail_together():
    layout, x = Layout(zero_stage=3), torch.zeros(1, 16, dtype=torch.long)
    model = layout.place(GPT(GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(x, x)
    if layout.rank == 0:
        events = sorted(profiler.events(), key=lambda e: e.time_range.start)
        print([e.name for e in events if e.name.startswith(("FSDP::all_gather (", "FSDP::pre_forward ("))])
"""


def test_weights_are_gathered_while_the_part_before_them_computes(on_two):
    done = on_two(GATHERED)
    assert "UserWarning" not in done.err
    names = json.loads(done.out.splitlines()[-1].replace("'", '"'))
    first, *rest = [f"(transformer.h.{i}.{part})" for i in range(2) for part in ("attn", "mlp")]
    assert names.index(f"FSDP::pre_forward {first}") < names.index(f"FSDP::all_gather {first}")  # nothing is before it
    for part in rest:
        assert names.index(f"FSDP::all_gather {part}") < names.index(f"FSDP::pre_forward {part}")


@pytest.mark.parametrize("settings", [
    dict(), dict(zero_stage=3), pytest.param(dict(tp_size=2), marks=pytest.mark.slow),
    pytest.param(dict(pp_size=2), marks=pytest.mark.slow),
], ids=str)
def test_what_a_step_communicates_is_measured_and_leaves_no_trace(settings, trained, tmp_path):
    """On request, in any layout, at evaluations, except while steps are traced; and the run keeps its bits."""
    traced = {"profile": "1:3"} if not settings else {}
    often = trained(2, tmp_path / "often", measure_comm=True, max_iters=6, eval_interval=2, **settings, **traced)
    once = trained(2, tmp_path / "once", max_iters=6, eval_interval=6, **settings)
    assert not any("comm_ms" in r for r in records(once))
    assert [r["step"] for r in records(often) if r.get("comm_ms", -1) >= 0] == ([4, 6] if traced else [2, 4, 6])
    assert losses(often) == losses(once)
    weights = [load_file(out / "ckpt/step_00000006/model.safetensors") for out in (often, once)]
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())


# -----------------------------------------------------------------------------
# Layouts


@pytest.fixture(scope="session")
def table(train, tmp_path_factory):
    """table(ranks) -> rows of layouts.py by (layout, model, optimizer), made once, by one worker for all."""
    known, shared = {}, tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def made(ranks):
        done = train(ranks=ranks, before="import runpy; runpy.run_path('tests/layouts.py', run_name='__main__')")
        assert done.code == 0, done.err
        return done.out.splitlines()[-1]

    def of(ranks):
        if ranks not in known:
            path = shared / f"layouts_{ranks}.json"
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    path.write_text(made(ranks), encoding="utf-8")
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            known[ranks] = {(row["layout"], row["model"], row["optimizer"]): row for row in rows}
        return known[ranks]

    return of


MISTAKES = ("wrong scale", "mean of means")


def rows(ranks):
    marks = [pytest.mark.slow] if ranks > 2 else []
    return [pytest.param(ranks, *case[:3], marks=marks) for case in cases(ranks) if case[0] not in MISTAKES]


@pytest.mark.parametrize("ranks, layout, model, optimizer", [row for ranks in LAYOUTS for row in rows(ranks)])
def test_a_layout_equals_one_process(ranks, layout, model, optimizer, table):
    row = table(ranks)[layout, model, optimizer]
    assert row["same start"], "weights are equal bit for bit once they are placed and gathered"
    assert row["scattered"], "and so is the optimizer's state once it is gathered and given back"
    far = {key: row[key] for key in ("grads", "losses", "norms", "state", "val") if row[key] > SAME}
    assert not far


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_zero_leaves_each_rank_its_share(ranks, stage, table):
    """Of weights, gradients and moments each of n ranks holds an n-th at the step (Rajbhandari et al. 2020)."""
    assert table(ranks)[f"ZeRO-{stage}", "modern", "adamw"]["held"] == pytest.approx(1 / ranks, rel=0.05)


def test_a_wrong_scale_of_the_gradient_is_seen(table):
    """Negative control: clipped steps hide it in the losses; raw gradients and their norm do not."""
    row = table(2)["wrong scale", "GPT-2", "adamw"]
    assert row["grads"] > 0.1 and row["norms"] > 0.1


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_mean_of_means_is_seen(ranks, table):
    """Negative control: where micro-batches have unequal numbers of targets, their means must not be averaged."""
    row = table(ranks)["mean of means", "talks", "adamw"]
    assert row["grads"] > 0.1 and row["norms"] > 0.1


def gradients(batches):
    """Of one update on one process."""
    torch.manual_seed(0)
    model, layout = GPT(GPTConfig(**SIZES, n_layer=2)), Layout()
    layout.share_micro_batches(len(batches))
    layout.place(model)
    losses = [layout.forward_backward(batch, micro) for micro, batch in enumerate(batches)]
    return torch.stack(losses).mean(), [p.grad for p in model.parameters()]


def test_gradients_do_not_depend_on_how_an_update_is_cut():
    """One micro-batch of eight rows is eight of one row each, one of which has no target at all."""
    x = torch.randint(61, (8, 16), generator=torch.Generator().manual_seed(0))
    learned = torch.arange(16) < torch.tensor([16, 1, 0, 3, 9, 16, 2, 5])[:, None]
    y = torch.where(learned, x, -1)
    docs = torch.arange(16).expand(8, 16) // 5
    found = []
    for size in (8, 2, 1):
        divisor = learned.sum() * size / 8
        pieces = zip(x.split(size), y.split(size), docs.split(size), strict=True)
        found.append(gradients([Batch(*rows, divisor) for rows in pieces]))
    for loss, grads in found[1:]:
        assert float(loss) == pytest.approx(float(found[0][0]), rel=SAME)
        for grad, whole in zip(grads, found[0][1], strict=True):
            assert (grad - whole).norm() <= SAME * whole.norm()
    each_its_mean = gradients([Batch(*rows) for rows in zip(x.split(1), y.split(1), docs.split(1), strict=True)])[1]
    apart = [(grad - whole).norm() / whole.norm() for grad, whole in zip(each_its_mean, found[0][1], strict=True)]
    assert min(apart) > 0.1, "negative control"


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_activations_computed_again_change_no_gradient(model, kind):
    """To the bit, and with the same dropout."""
    grads = {}
    for recompute in ("none", kind):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(**SIZES, **MODELS[model], n_layer=2, dropout=0.1))
        if recompute != "none":
            checkpoint_activations(gpt, recompute)
        x = torch.randint(61, (2, 16))
        gpt(x, x, loss_only=True)[1].backward()
        grads[recompute] = [p.grad for p in gpt.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*grads.values(), strict=True))


def test_one_process_is_left_alone():
    layout, model = Layout(zero_stage=3), GPT(GPTConfig(**SIZES, n_layer=1))
    assert layout.place(model) is model is layout.module and layout.gather_model() is model
    assert layout.gather("its optimizers") == (model, "its optimizers") and layout.warm_ups == 0
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("settings, grid, steps, would_do", [
    (dict(), dict(dp=4), 6, "4 and 8 do"),
    (dict(), dict(dp=4), 1, "4 and 8 do"),
    (dict(pp_schedule="1f1b"), dict(dp=2, pp=4), 6, "8 and 10 do"),
    (dict(pp_schedule="interleaved"), dict(dp=2, pp=2), 6, "4 and 8 do"),
])
def test_micro_batches_that_do_not_divide(settings, grid, steps, would_do):
    layout = Layout(**settings)
    vars(layout).update(grid)
    with pytest.raises(ValueError, match=would_do):
        layout.share_micro_batches(steps)
    for number in would_do.split()[::2][:2]:
        assert layout.share_micro_batches(int(number)) == int(number) // grid["dp"] == layout.accumulation


@pytest.mark.parametrize("grid, changes, named", [
    (dict(tp=3), {}, "n_head=4"),
    (dict(tp=2), dict(n_head=6, n_embd=48, n_kv_head=3), "n_kv_head=3"),
    (dict(pp=4), {}, "n_layer=2"),
    (dict(pp=2, pp_schedule="interleaved"), {}, "n_layer=2"),
])
def test_a_model_that_cannot_be_laid_out(grid, changes, named):
    layout = Layout()
    vars(layout).update(grid)
    with pytest.raises(ValueError, match=named):
        layout.check(GPTConfig(**{**SIZES, "n_layer": 2, **changes}))


def test_each_window_once_an_epoch():
    numbers, seen = Numbers(700), []
    for rank in range(3):
        loader = Loader(numbers, 16, 2, accumulation=1, rank=rank, world=3)
        seen += [loader.positions(step, 0) for step in range(loader.order.windows // 6)]
        loader.close()
    positions = sorted(int(p) for each in seen for p in each)
    assert positions == list(range(len(positions))) and len(set(loader.order.starts(positions))) == len(positions)


# -----------------------------------------------------------------------------
# Runs


@pytest.mark.slow
def test_a_run_goes_on_in_any_layout(trained, tmp_path, unbroken, tiny):
    """Two ranks save it. One, four, and two that split each layer resume it."""
    one = unbroken(gradient_accumulation_steps=4, n_layer=2)
    half = trained(2, tmp_path / "half", max_iters=6, lr_decay_iters=12, zero_stage=2)
    for ranks, settings in ((1, {}), (4, {}), (2, dict(tp_size=2))):
        out = tmp_path / f"on_{ranks}{len(settings) and settings}"
        shutil.copytree(half, out)
        saved = load_file(out / "ckpt" / "step_00000006" / "model.safetensors")
        trained(ranks, out, init_from="resume", **settings)
        assert all(torch.equal(saved[k], t) for k, t in
                   load_file(out / "ckpt" / "step_00000006" / "model.safetensors").items())
        there = outcome(out)
        for key in ("loss", "grad_norm"):
            assert close([r[key] for r in there["metrics"]], [r[key] for r in one["metrics"]]), (settings, key)
        assert [r["tokens"] for r in there["metrics"]] == [r["tokens"] for r in one["metrics"]]
        assert close([there["val_loss"]], [one["val_loss"]])
        assert checkpoint.read_state(checkpoint.find(out)[0])["ranks"] == ranks


@pytest.mark.slow
def test_shards_go_on_in_any_layout(trained, tmp_path, unbroken):
    """Each of two ranks writes its own. Resumed on the same layout, as shards or consolidated, they give the bits of a
    plain checkpoint; resumed on other layouts, one of which splits layers, the losses of one process."""
    one = unbroken(gradient_accumulation_steps=4, n_layer=2)
    same, begin = dict(zero_stage=3), dict(max_iters=6, lr_decay_iters=12, zero_stage=3)
    shards = trained(2, tmp_path / "sharded", checkpoint_format="sharded", **begin)
    plain = trained(2, tmp_path / "plain", **begin)
    names = [path.name for path in (shards / "ckpt" / "step_00000006").iterdir()]
    assert sorted(names) == [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)] + ["state.json"]
    runs = {"plain": plain}
    for name in ("2", "4", "split", "consolidated"):
        runs[name] = tmp_path / name
        shutil.copytree(shards, runs[name])
    assert len(checkpoint.consolidate(runs["consolidated"])) == 2
    assert differences(outcome(runs["consolidated"]), outcome(plain)) == []
    for name, ranks, settings in (("plain", 2, same), ("2", 2, same), ("consolidated", 2, same),
                                  ("4", 4, dict(zero_stage=1)), ("split", 2, dict(tp_size=2))):
        trained(ranks, runs[name], init_from="resume", **settings)
        there = outcome(runs[name])
        if settings is same:
            assert differences(there, outcome(plain)) == [], name
        for key in ("loss", "grad_norm"):
            assert close([r[key] for r in there["metrics"]], [r[key] for r in one["metrics"]]), (name, key)


@pytest.mark.slow
def test_shards_of_a_rank_that_is_killed_while_it_writes(trained, words, tmp_path):
    """torchrun restarts all ranks. They resume the checkpoint before and end with the bits of an unbroken run."""
    settings = dict(init_from="auto", save_interval=2, zero_stage=3, checkpoint_format="sharded", max_iters=8)
    trained(2, tmp_path / "whole", **settings)
    there = tmp_path / "killed" / "ckpt" / "step_00000002"
    kill = faulty(tmp_path, f"""if rank == "1" and attempt == "0" and len(calls) == 1:
        import safetensors.torch
        write = safetensors.torch.save
        def once_the_first_is_there(*args, **kwargs):
            if os.path.exists({str(there)!r}):
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **kwargs)
        safetensors.torch.save = once_the_first_is_there""")
    done = finish(start(2, kill, *flags(words, tmp_path / "killed", **settings), restarts=1))
    assert done.returncode == 0, done.err
    assert [e["step"] for e in records(tmp_path / "killed", "events.jsonl") if e["event"] == "resume"] == [2]
    for out in ("whole", "killed"):
        checkpoint.consolidate(tmp_path / out)
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks, settings, others, other", [
    (2, dict(tp_size=2), 2, dict(zero_stage=3)),  # the ranks hold the same keys and values
    (4, dict(tp_size=2, zero_stage=3), 1, {}),
    (4, dict(pp_size=2, tp_size=2), 2, dict(tp_size=2)),
], ids=str)
def test_shards_of_layers_that_are_split(ranks, settings, others, other, trained, tmp_path):
    """They hold what a plain checkpoint of the same layout holds. The same layout resumes them to the bit, another one
    to rounding."""
    model = dict(n_head=4, n_kv_head=1 if ranks == 2 else 2, optimizer="muon", bias=True, max_iters=8)
    plain = trained(ranks, tmp_path / "plain", **model, **settings)
    shards = trained(ranks, tmp_path / "shards", checkpoint_format="sharded", **model, **settings)
    found = checkpoint.find(shards)[0]
    held = [checkpoint.load_model_tensors(folder) for folder in (found, checkpoint.find(plain)[0])]
    assert held[0].keys() == held[1].keys() and all(torch.equal(t, held[1][name]) for name, t in held[0].items())
    state = checkpoint.read_state(found)
    assert ("heads" in state) == ("tp_size" in settings) and len(state["files"]) > 1
    runs = {name: tmp_path / name for name in ("same", "other")}
    for out in runs.values():
        shutil.copytree(shards, out)
        shutil.rmtree(out / "ckpt" / "step_00000008")
    trained(ranks, runs["same"], init_from="resume", **model, **settings)
    assert differences(outcome(runs["same"]), outcome(plain)) == []
    trained(others, runs["other"], init_from="resume", **model, **other)
    there, here = (outcome(out)["metrics"] for out in (runs["other"], plain))
    for key in ("loss", "grad_norm"):
        assert close([r[key] for r in there], [r[key] for r in here]), key
    assert len(checkpoint.consolidate(shards)) == 2
    assert differences(outcome(shards), outcome(plain)) == []
    assert "heads" not in checkpoint.read_state(checkpoint.find(shards)[0])


LAST = """
import atexit, sys
import torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from parallel import Layout
from training.ranks import all_fail_together
class Held:
    def __del__(self):
        print("the interpreter takes itself down")
held = Held()
atexit.register(sys.stdout.write, "what was asked for at the end\\n")
with all_fail_together():
    layout = Layout()
    dist.all_reduce(torch.ones(1000))
    sys.stdout.write(f"done {{layout.rank}}\\n")  # in one piece, as two ranks print
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "sys.exit(0)", "sys.exit(130)"])
def test_a_process_whose_work_is_done_ends_at_once(end, tmp_path):
    """A thread of gloo's that holds a tensor of the last collective aborts an interpreter that shuts down: on a busy
    machine this ended 1 in 80 runs of two ranks."""
    script = tmp_path / "last.py"
    script.write_text(LAST.format(root=str(ROOT), end=end), encoding="utf-8")
    done = finish(start(2, script))
    assert (done.returncode == 0) == ("130" not in end), done.err
    assert "done 0" in done.out and "done 1" in done.out
    assert "asked for at the end" in done.out and "down" not in done.out
    assert "130" not in end or "exitcode  : 130" in done.err


def test_dropout_is_that_of_one_process(trained, tmp_path, unbroken):
    settings = dict(dropout=0.2, max_iters=4, gradient_accumulation_steps=4, n_layer=2)
    one = unbroken(**settings)
    there = outcome(trained(2, tmp_path, **settings))
    assert close([r["loss"] for r in there["metrics"]], [r["loss"] for r in one["metrics"]])


@pytest.mark.slow
def test_a_rank_that_is_killed(trained, words, tmp_path):
    """torchrun restarts all ranks. They resume the last checkpoint and end with the bits of a run without a fault."""
    settings = dict(init_from="auto", save_interval=2, dropout=0.1)
    trained(4, tmp_path / "whole", **settings)
    when = 'rank == "2" and attempt == "0" and len(calls) == 8'
    kill = faulty(tmp_path, f"if {when}: os.kill(os.getpid(), signal.SIGKILL)")
    done = finish(start(4, kill, *flags(words, tmp_path / "killed", **settings), restarts=1))
    assert done.returncode == 0, done.err
    assert [e["event"] for e in records(tmp_path / "killed", "events.jsonl")] == ["start", "resume", "end"]
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", [
    dict(zero_stage=3, activation_checkpointing="selective"), dict(zero_stage=2, activation_checkpointing="full"),
    dict(pp_size=2), dict(pp_size=2, pp_schedule="interleaved", n_layer=4)], ids=str)
def test_a_layout_compiles(layout, tiny, tmp_path, unbroken):
    """Attention and MLP of each block do. The losses are those of one uncompiled process. Probes do not compile."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    one = unbroken(gradient_accumulation_steps=4, n_layer=layout.get("n_layer", 2))
    counting = f"""
import atexit, os
import torch
from torch._dynamo.utils import counters
torch._logging.set_logs(recompiles=True)
@atexit.register
def tell():
    with open({str(tmp_path)!r} + "/graphs_" + os.environ["RANK"], "w") as file:
        print(sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"], file=file)
"""
    settings = {"gradient_accumulation_steps": 4, "n_layer": 2, "compile": True, "probe_interval": 6, **layout}
    done = tiny(tmp_path / "run", ranks=2, measure_comm=True, before=counting, **settings)
    assert done.code == 0 and "torch.compile" not in done.err and "other_attend" not in done.err, done.err
    assert "attn_entropy" in records(tmp_path / "run")[-1]
    for rank in range(2):
        breaks, graphs = map(int, (tmp_path / f"graphs_{rank}").read_text().split())
        assert breaks == 0 and graphs > 1
    there = outcome(tmp_path / "run")
    for key in ("loss", "grad_norm"):
        assert close([r[key] for r in there["metrics"]], [r[key] for r in one["metrics"]]), key
    assert close([there["val_loss"]], [one["val_loss"]])


def test_layers_that_are_split_do_not_compile(tiny, tmp_path, unbroken):
    one = unbroken(gradient_accumulation_steps=4, n_layer=2)
    done = tiny(tmp_path / "run", ranks=2, gradient_accumulation_steps=4, n_layer=2, compile=True, tp_size=2)
    assert done.code == 0 and done.err.count("warning: torch.compile does not work here") == 1
    assert close(losses(tmp_path / "run"), [r["loss"] for r in one["metrics"]])


def test_rank_0_alone_prints(tiny, tmp_path):
    done = tiny(tmp_path, ranks=2, gradient_accumulation_steps=2, max_iters=4, eval_interval=4)
    assert done.code == 0, done.err
    starts = Counter(line.split()[0] for line in done.out.splitlines())
    once = ("device", "layout", "data", "model", "peak", "memory", "time", "trained")
    assert starts == {**dict.fromkeys(once, 1), "step": 1 + 4}, done.out  # how large a step is, and four records


ONE_DOES_NOT_COMPILE = """
import os, torch
def compile(function, **options):
    if os.environ["RANK"] == "1" and ({when}):
        raise RuntimeError("no room for kernels")
    return function
torch.compile = compile
"""


@pytest.mark.parametrize("zero_stage, when", [(0, "options"), (3, "not options")], ids=["DDP", "ZeRO-3"])
def test_where_one_rank_does_not_compile_all_run_uncompiled(zero_stage, when, tiny, tmp_path, unbroken):
    """DDP finds out in its first passes, in which the ranks do not communicate; ZeRO in a trial before them."""
    one = unbroken(gradient_accumulation_steps=4, n_layer=2)
    done = tiny(tmp_path / "run", ranks=2, gradient_accumulation_steps=4, n_layer=2, compile=True,
                zero_stage=zero_stage, before=ONE_DOES_NOT_COMPILE.format(when=when))
    assert done.code == 0, done.err
    assert done.err == ("warning: torch.compile does not work here (rank 1: RuntimeError: no room for kernels); "
                        "running uncompiled\n")
    assert close(losses(tmp_path / "run"), [r["loss"] for r in one["metrics"]])


def test_over_gloo_processes_share_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    cuda = torch.device("cuda")
    assert own_device("cuda", cuda, "gloo") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU of its own"):
        own_device("cuda", cuda, "nccl")


@pytest.mark.parametrize("kind, fuse", [("cuda", True), ("cpu", False)])
def test_where_blocks_are_compiled_one_by_one_so_is_the_loss_on_a_gpu(monkeypatch, kind, fuse):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = GPT(GPTConfig(**SIZES, n_layer=1))
    layout = Layout(torch.device(kind))
    layout.place(model)
    layout.world = 2  # without DDP: as with ZeRO
    layout.compile()
    assert layout.module is model
    assert model.loss.keywords == {"fuse": fuse}


def test_a_rank_that_does_not_compile_amid_collectives_stops_all(tiny, tmp_path):
    """With ZeRO the others wait within a pass, so the run cannot continue."""
    done = tiny(tmp_path / "run", ranks=2, gradient_accumulation_steps=4, n_layer=2, compile=True, zero_stage=3,
                before=ONE_DOES_NOT_COMPILE.format(when="options"))
    assert done.code and "Traceback" not in done.err
    assert "error: torch.compile failed (RuntimeError: no room for kernels); --compile=false" in done.err


ONE_IS_FULL = """
import os, optim
step, calls = optim.Optimizers.step, []
def full(self):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise MemoryError("no room for an array")
    step(self)
optim.Optimizers.step = full
"""


def test_a_rank_whose_memory_is_full_stops_all(tiny, tmp_path):
    """Its error has the advice, in which batch_size=0 is settled; the other rank names the cause."""
    done = tiny(tmp_path / "run", ranks=2, batch_size=0, tokens_per_step=128, before=ONE_IS_FULL)
    assert done.code and "Traceback" not in done.err
    assert "error: this machine's memory is full (no room for an array): --batch_size=2 is the same update" in done.err
    assert "rank 0 stops: rank 1 failed (FullMemory: this machine's memory is full" in done.err


@pytest.mark.slow
def test_a_rank_that_fails(words, tmp_path):
    """All ranks stop, and the error that is shown is that rank's."""
    script = faulty(tmp_path, 'assert rank != "1" or len(calls) < 3, "on purpose"')
    done = finish(start(2, script, *flags(words, tmp_path / "run")))
    assert done.returncode != 0
    assert "[rank1]: AssertionError: on purpose" in done.err and "[rank0]: " not in done.err
    assert "rank 0 stops: rank 1 failed (AssertionError: on purpose)" in done.err
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_batch_that_the_ranks_do_not_divide(words, tmp_path):
    done = finish(start(2, ROOT / "train.py", *flags(words, tmp_path / "run", gradient_accumulation_steps=3)))
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert done.err.count("error: gradient_accumulation_steps=3 does not work with 2 processes: DDP 2; 2 and 4 do") == 1


@pytest.mark.slow
def test_stopped_by_a_signal_all_at_one_step(words, tmp_path):
    settings = dict(zero_stage=1, log_interval=1, eval_interval=1000)
    running = start(2, ROOT / "train.py", *flags(words, tmp_path / "run", max_iters=100000, **settings))
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses(tmp_path / "run")) < 3:
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    finish(running)
    stop = records(tmp_path / "run", "events.jsonl")[-1]
    assert stop["event"] == "stop" and stop["reason"] == "SIGTERM", running.err
    assert list(checkpoint.steps(tmp_path / "run")) == [stop["step"]] and len(losses(tmp_path / "run")) == stop["step"]
