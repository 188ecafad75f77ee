"""
Where the time of one training update goes, and how fast it is beside nanoGPT's: bench.py's `step`.

The update is train.py's in one process, on one micro-batch of random tokens: forward, backward, clipping, optimizer.
Without --config it is GPT-2's 124M as config/owt_124m.py has it, on 4 x 256 tokens. With --config the model,
batch_size, block_size and the optimizer's keys are the config's. Both take --overrides. Nothing is compiled.

nanoGPT's update (peer_nanogpt names a checkout) is its train.py's, on a model of the same sizes and on the same tokens.
Its train.py uses autocast on GPUs only; here bfloat16 is autocast on a CPU as well.

Each of the two lives in a process of its own, so each has its own peak of memory, and ours sets up its allocator as
train.py does. They take turns: one waits idle while the other makes a few updates. A round's time is the median of its
updates, a speed is that of the median round, and `ratio` is the median of the rounds' ratios.

Then torch.profiler times each operator within our updates, without the operators that it calls. An operator's kind
follows from its name alone: the products within Muon are matrix products, and clipping is a norm and multiplications.
"""

import importlib.util
import multiprocessing
import re
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import ROOT, machine, table, train_settings
from configurator import Settings, fail
from device import DTYPES, allocate_in_segments, autocast, keep_memory, memory_gb, pick_device
from loader import Batch
from model import GPT, GPTConfig
from optim import Optimizers
from parallel import Layout
from plan import model_fields
from training.monitor import StepTimer, cpu_name
from training.profiler import Profiler
from training.start import open_data

FORMS = ("float32", "bfloat16")  # other values of --forms are quantised weights, which nobody trains
LENGTH = 256  # tokens of a sequence of the 124M
TRAIN_PARTS = ("forward_ms", "backward_ms", "optim_ms")

# The kind of an operator, by its whole name without namespace and outer underscores
KINDS = {
    "matrix products": r"mm|addmm|bmm|baddbmm|addbmm|mv|addmv|dot|matmul|linear|linear_backward|mkldnn_.*",
    "attention": r"scaled_dot_product_.*|.*flash_attention.*|.*efficient_attention.*",
    # nothing else in a GPT takes exp: the activations have operators of their own
    "softmax and loss": r".*softmax.*|.*cross_entropy.*|nll_loss.*|logsumexp|exp|expm1",
    "norms": r".*norm.*",
    "optimizer": r"fused_adam.*|foreach_.*|Optimizer\..*",
    "copies and casts": r"copy|to|to_copy|type_as|cat|stack|clone|contiguous|fill|full|zero|zeros|zeros_like|ones_like"
                        r"|roll|repeat_interleave",
    "element-wise, sums": r"add|sub|rsub|mul|div|neg|pow|square|sqrt|rsqrt|reciprocal|lerp|addcmul|addcdiv|where|clamp"
                          r"|clamp_min|maximum|minimum|masked_fill|triu|cos|sin|ne|eq|lt|ge|sum|mean|bernoulli"
                          r"|relu|threshold_backward|(gelu|silu|tanh|sigmoid|native_dropout)(_backward)?",
}
REST = "the rest"


class Job(NamedTuple):
    """What both processes train, and how. It is pickled."""
    settings: dict    # of train.py
    model: GPTConfig
    tokens: int       # of a sequence
    form: str         # a key of DTYPES
    device: str
    nanogpt: str      # the folder of its checkout; "": not measured


def bench_step(c):
    """-> a row for each form, and a row for each form and kind of operator."""
    forms = [form for form in c.forms if form in FORMS]
    if not forms:
        fail(f"--forms={','.join(c.forms)}: step takes {' and '.join(FORMS)}")
    if c.peer_nanogpt and not (Path(c.peer_nanogpt) / "model.py").is_file():
        fail(f"--peer_nanogpt={c.peer_nanogpt} has no model.py: it is the folder that "
             "git clone https://github.com/karpathy/nanoGPT makes")
    job = make_job(c)
    rows = []
    operations = []
    for form in forms:
        row, times_ms = measure_form(c, job._replace(form=form))
        rows.append(row)
        operations += operation_rows(form, times_ms)

    model = job.model
    batch_size = job.settings["batch_size"]
    print(f"{model.n_layer} layers of {model.n_embd}, {model.n_head} heads, {batch_size} x {job.tokens} tokens, "
          f"{job.device} ({cpu_name()}, {torch.get_num_threads()} threads), torch {torch.__version__}; "
          f"median of {c.rounds} rounds of {c.updates} updates after {c.warm_up}")
    show_rows(rows)
    print("\nby operator: milliseconds of an update, and the share in % of all operators")
    table(operations, ("weights", "kind", "share", "ms", "largest"))
    return {
        "machine": machine(),
        "device": job.device,
        "torch": torch.__version__,
        "rows": rows,
        "operations": operations,
    }


def make_job(c):
    """The Job of the settings, without its form. Ends the benchmark where they make no model."""
    if c.step_model not in ("124m", "config"):
        fail(f"--step_model={c.step_model}: it takes 124m or config")
    gpt2 = c.step_model == "124m"
    if gpt2:
        own = ("batch_size=4", "vocab_size=50257")
        c = c.changed(config=str(ROOT / "config" / "owt_124m.py"), overrides=(*own, *c.overrides))
    settings = train_settings(c)
    if settings["batch_size"] < 1:
        fail(f"batch_size={settings['batch_size']}: step needs a number, such as --overrides=batch_size=4")
    try:
        if not settings["vocab_size"]:
            settings["vocab_size"] = open_data(settings["dataset"]).vocab_size
        model = GPTConfig(**model_fields(settings))
        picked = pick_device(c.device)[0]
    except (ValueError, OSError) as error:
        fail(error)
    tokens = min(LENGTH, model.block_size) if gpt2 else model.block_size
    return Job(settings, model, tokens, "", str(picked), c.peer_nanogpt)


def measure_form(c, job):
    """Time the updates of both projects in turns, and profile ours. -> (a row, {operator: milliseconds of an update})
    """
    trainers = {"minichat": Trainer(our_updates, job)}
    if job.nanogpt:
        trainers["nanoGPT"] = Trainer(nanogpt_updates, job)
    rounds = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.ask(make_updates, c.warm_up)
    for turn in range(c.rounds):
        order = list(trainers)
        if turn % 2:  # neither is always the first
            order.reverse()
        for name in order:
            rounds[name].append(trainers[name].ask(make_updates, c.updates))
            print(f"    {job.form} {name}: {update_ms(rounds[name][-1]):.1f} ms", file=sys.stderr)
    # before the profile, which takes memory too
    peaks = {name: trainer.ask(peak_gb) for name, trainer in trainers.items()}
    times_ms = trainers["minichat"].ask(profile, c.updates)
    for trainer in trainers.values():
        trainer.end()
    return step_row(job, rounds, peaks), times_ms


def step_row(job, rounds, peaks):
    """The row of a form. rounds: by project, for each round the parts of its updates; peaks: by project, in GB."""
    tokens = job.settings["batch_size"] * job.tokens
    rounds_ms = {name: [update_ms(updates) for updates in all_rounds] for name, all_rounds in rounds.items()}
    ours_ms = rounds_ms["minichat"]
    row = {"weights": job.form, "tok_per_s": 1000 * tokens / statistics.median(ours_ms)}
    if job.nanogpt:
        theirs_ms = rounds_ms["nanoGPT"]
        ratios = [theirs / ours for theirs, ours in zip(theirs_ms, ours_ms, strict=True)]
        row["nanogpt_tok_per_s"] = 1000 * tokens / statistics.median(theirs_ms)
        row["ratio"] = statistics.median(ratios)
        row["ratios"] = ratios
    for part in TRAIN_PARTS:
        row[part] = statistics.median(parts[part] for updates in rounds["minichat"] for parts in updates)
    row["mem_gb"] = peaks["minichat"]
    if job.nanogpt:
        row["nanogpt_mem_gb"] = peaks["nanoGPT"]
    return row


def update_ms(updates):
    """The median milliseconds of some updates, of which each is a dict of its parts."""
    return statistics.median(sum(parts.values()) for parts in updates)


def show_rows(rows):
    """Print the rows. A ratio and gigabytes need two decimals."""
    columns = [column for column in rows[0] if column != "ratios"]
    shown = []
    for row in rows:
        row = dict(row)
        for column in ("ratio", "mem_gb", "nanogpt_mem_gb"):
            if row.get(column) is not None:
                row[column] = f"{row[column]:.2f}"
        shown.append(row)
    table(shown, columns)


# -----------------------------------------------------------------------------
# A process of its own


class Trainer:
    """A process of its own that makes updates when it is asked to, and waits idle in between."""

    def __init__(self, updates_of, job):
        """updates_of(job) is a generator: each step of it makes an update."""
        spawn = multiprocessing.get_context("spawn")
        self.name = updates_of.__name__
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=answer, args=(theirs, updates_of, job), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the child dies

    def ask(self, function, *args):
        """-> function(updates, device, *args), called in the process. Ends the benchmark when the process has ended."""
        try:
            self.pipe.send((function, args))
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            fail(f"the process of {self.name} ended without a result; its error is above")

    def end(self):
        self.pipe.send(None)
        self.process.join()


def answer(pipe, updates_of, job):
    """The child of a Trainer."""
    sys.stdout = sys.stderr  # nanoGPT's model prints its size; stdout is the benchmark's
    picked = torch.device(job.device)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)  # for the events that time the parts
    updates = updates_of(job)
    for function, args in iter(pipe.recv, None):
        pipe.send(function(updates, picked, *args))


def make_updates(updates, device, count):
    """-> the milliseconds of the parts of each update"""
    return list(islice(updates, count))


def peak_gb(updates, device):
    return memory_gb(device)


def profile(updates, device, count):
    """-> {operator: milliseconds of an update in it, without the operators that it calls}; on CUDA, in its kernels"""
    profiler = Profiler("", device, "", max_iters=0)
    trace = profiler.start()
    make_updates(updates, device, count)
    profiler.end(trace)
    cuda = device.type == "cuda"
    times_ms = {}
    for operator in trace.key_averages():
        if operator.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time its operator has
        if cuda and operator.is_user_annotation:
            continue  # such as Optimizer.step, which starts no kernel itself
        us = operator.self_device_time_total if cuda else operator.self_cpu_time_total
        times_ms[operator.key] = us / 1000 / count
    return times_ms


# -----------------------------------------------------------------------------
# The two updates


def random_batch(job, device):
    """The same random tokens for both."""
    generator = torch.Generator().manual_seed(0)
    shape = (job.settings["batch_size"], job.tokens)
    x = torch.randint(job.model.vocab_size, shape, generator=generator)  # (B, T)
    y = torch.randint(job.model.vocab_size, shape, generator=generator)
    return Batch(x, y).to(device)


def our_updates(job):
    """Make updates as train.py does. Yields the milliseconds of the parts of each."""
    c = Settings(job.settings)
    set_up_memory(job.device)
    device = torch.device(job.device)
    dtype = DTYPES[job.form]
    torch.manual_seed(c.seed)
    layout = Layout(device)
    model = layout.place(GPT(job.model).to(device), autocast(device, dtype), dtype)
    opt = make_optimizer(c, model, dtype)
    batch = random_batch(job, device)
    timer = StepTimer(device)
    while True:
        timer.start()
        layout.forward_backward(batch, 0, timer=timer)
        norm = layout.grad_norm()
        if c.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), c.grad_clip, norm)
        opt.step()
        opt.zero_grad()
        timer.mark("optim_ms")
        yield timer.read()


def set_up_memory(device_name):
    """Set up the allocator as train.py does, before the first tensor."""
    if device_name.startswith("cuda"):
        allocate_in_segments()
    keep_memory()


def make_optimizer(c, model, dtype):
    """The optimizer of train.py's settings `c`, for a forward pass in `dtype`."""
    muon_dtype = DTYPES.get(c.muon_dtype, dtype)  # auto: as the forward pass
    return Optimizers(
        model, optimizer=c.optimizer, weight_decay=c.weight_decay, betas=(c.beta1, c.beta2),
        learning_rate=c.learning_rate, muon_learning_rate=c.muon_learning_rate,
        muon_momentum=c.muon_momentum, muon_even_rows=c.muon_even_rows, muon_dtype=muon_dtype,
    )


def nanogpt_updates(job):
    """Make updates as nanoGPT's train.py does. Yields the milliseconds of each."""
    c = Settings(job.settings)
    device = torch.device(job.device)
    nanogpt = import_nanogpt(job.nanogpt)
    sizes = job.model
    padded = -(-sizes.vocab_size // 64) * 64  # as nanoGPT has GPT-2's 50,257 token ids
    torch.manual_seed(c.seed)
    model = nanogpt.GPT(nanogpt.GPTConfig(
        block_size=sizes.block_size, vocab_size=padded, n_layer=sizes.n_layer, n_head=sizes.n_head,
        n_embd=sizes.n_embd, dropout=sizes.dropout, bias=sizes.bias,
    )).to(device)
    opt = model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2), device.type)
    context = autocast(device, DTYPES[job.form])
    batch = random_batch(job, device)
    timer = StepTimer(device)
    while True:
        timer.start()
        with context():
            logits, loss = model(batch.x, batch.y)  # as in its train.py, these live until the next ones are there
        loss.backward()
        if c.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        timer.mark("update_ms")
        yield timer.read()


def import_nanogpt(folder):
    """The module of nanoGPT's model.py, under a name that is not our model's."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


# -----------------------------------------------------------------------------
# By operator


def operation_rows(form, times_ms):
    """A row for each kind of operator, the largest first. times_ms: {operator: milliseconds of an update}"""
    by_kind = {}
    for operator, ms in times_ms.items():
        by_kind.setdefault(kind_of(operator), {})[operator] = ms
    total = sum(times_ms.values())
    rows = []
    for kind, operators in by_kind.items():
        largest = sorted(operators, key=operators.get, reverse=True)[:3]
        named = [f"{operator.removeprefix('aten::')[:60]} {operators[operator]:.1f}" for operator in largest]
        ms = sum(operators.values())
        rows.append({"weights": form, "kind": kind, "share": 100 * ms / total, "ms": ms,
                     "largest": ", ".join(named)})
    return sorted(rows, key=lambda row: -row["ms"])


def kind_of(operator):
    """"aten::_foreach_norm" -> "norms". The first kind that knows the name."""
    name = operator.rpartition("::")[2].strip("_")
    for kind, names in KINDS.items():
        if re.fullmatch(names, name):
            return kind
    return REST
