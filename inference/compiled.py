"""
A step of one new token for each request, compiled: the small operations between the matrices are fused, and all of it
is one call.

torch.export traces the model once with a DecodeCache, Inductor compiles what it traced, and the result is kept in
~/.cache/minichat, so that the next run reads it in a second or two instead. The weights, the cache and the number of
requests are arguments: one result serves every run of the same architecture in the same form. There are two, for one
request and for several.

The uncompiled step stays the reference. Where tracing or compiling fails, RuntimeError says why and the engine takes
the uncompiled one.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import astuple
from pathlib import Path

import torch
import torch.nn as nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor

import native
from device import can_compile, what_failed
from inference import kernels
from inference.kvcache import DecodeCache, new_cache

# Sources that decide what is compiled
SOURCES = ("model.py", "attention.py", "fused.py", "inference/kvcache.py", "inference/kernels.py", "inference/tiled.py",
           "inference/quantize.py", "inference/int4.py", "inference/paged.py", "inference/compiled.py", "float8.py")

# From about so many steps on it pays on a CPU. A rule of thumb: each layer makes a step some 0.2 ms shorter (compare
# the rows of bench.py infer), compiling takes a second or two for each layer, and reading the result a tenth of that.
STEPS_TO_COMPILE = 7500
STEPS_TO_READ = 750


class Step(nn.Module):
    """The model over one token of each request, with all that changes as plain arguments."""

    def __init__(self, model, size, kernel):
        super().__init__()
        self.model = model
        self.size = size
        self.kernel = kernel

    def forward(self, tokens, keys, values, positions, slots, table, lengths, rope):
        """-> logits (requests, vocab_size), fp32"""
        cache = DecodeCache(keys, values, positions, slots, table, lengths, rope or None, self.size, self.kernel)
        return self.model(tokens, cache=cache)[0][0].float()


class CompiledStep:
    """Called with tokens (1, B) and a DecodeCache -> logits (B, vocab_size), fp32, like the model itself."""

    def __init__(self, artifact, weights):
        self.artifact = artifact
        self.weights = weights  # in the order of the compiled arguments

    def __call__(self, tokens, cache):
        rope = cache.rope or ()
        logits = self.artifact(*self.weights, tokens, *cache.keys, *cache.values, cache.positions, cache.slots,
                               cache.table, cache.lengths, *rope)
        return logits[0] if isinstance(logits, (tuple, list)) else logits


def compiled_step(model, pool, several, steps=None, say=None):
    """The compiled step of `model` for one request or for `several`, read from disk or compiled now.

    steps: how many steps it will serve. None: compile whatever it takes. say: is called with a line before that.
    -> CompiledStep, or None if it does not pay. Raises RuntimeError with the reason if it cannot be compiled.
    """
    step = Step(model, pool.size, pool.kernel)
    path = None
    try:
        path = kept_at(step, pool, several)
        if steps is not None and steps < (STEPS_TO_READ if path.exists() else STEPS_TO_COMPILE):
            return None
        if not path.exists():
            if missing := can_compile(pool.device):
                raise RuntimeError(missing)
            if say:
                kind = "several requests" if several else "one request"
                say(f"compiling the step of a token for {kind}, once: about a second for each layer")
            build(step, pool, several, path)
        compiled = read(step, path)
        compare(step, compiled, pool, several)
        return compiled
    except Exception as error:  # the tracer and the compiler raise errors of many kinds
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)  # what cannot be read is compiled again by the next run
        raise RuntimeError(what_failed(error)) from None


def kept_at(step, pool, several):
    """The file of a compiled step. Its name is a digest of everything that decides what is in it."""
    root = Path(__file__).parents[1]
    kernel = getattr(pool.kernel, "__name__", str(pool.kernel))  # a function's own text holds its address
    facts = [torch.__version__, native.cpu_features(), torch.get_num_threads(), several, pool.size, kernel,
             str(pool.dtype), str(pool.device), torch.cuda.get_device_name() if pool.device.type == "cuda" else ""]
    facts += [(root / name).read_text(encoding="utf-8") for name in SOURCES]
    facts.append(repr(astuple(step.model.config)))
    for name, tensor in step.state_dict(keep_vars=True).items():
        facts.append((name, str(tensor.dtype), tuple(tensor.shape)))
    for name, module in step.named_modules():
        facts.append((name, type(module).__name__, str(getattr(module, "products", ""))))
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:20]
    return native.cache_folder() / f"step_{digest}"


def build(step, pool, several, path):
    """Trace and compile, and keep the result at `path`, with the names of its arguments in front."""
    arguments, shapes = examples(step, pool, several)
    with torch.no_grad():
        program = torch.export.export(step, arguments, dynamic_shapes=shapes, strict=False)
        graph = program.graph_module
        fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
        with tracing(TracingContext(mode)):  # the sizes that vary are the tracer's
            artifact = torch._inductor.standalone_compile(graph, fakes, dynamic_shapes="from_tracing_context")
    names = [spec.target for spec in program.graph_signature.input_specs if spec.target is not None]
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        made = Path(beside) / "made"
        made.mkdir()
        artifact.save(path=str(made / "code"), format="binary")
        (made / "names.json").write_text(json.dumps(names), encoding="utf-8")
        try:
            os.replace(made, path)  # whole or not at all
        except OSError:
            if not path.exists():  # another process was faster
                raise


def read(step, path):
    """-> the CompiledStep kept at `path`, for the weights of `step`"""
    names = json.loads((path / "names.json").read_text(encoding="utf-8"))
    tensors = step.state_dict(keep_vars=True) | dict(step.named_buffers())
    weights = [tensors[name].detach() for name in names]
    return CompiledStep(torch._inductor.CompiledArtifact.load(path=str(path / "code"), format="binary"), weights)


@torch.no_grad()
def compare(step, compiled, pool, several):
    """Raises RuntimeError if the compiled step computes something else than the step. Its arguments differ from the
    ones that it was traced with: three requests or one, and a small cache of their own."""
    config = step.model.config
    (tokens, _, _, *rest, rope), _ = examples(step, pool, several, 3 if several else 1)
    rest[2] = rest[2] + torch.arange(len(rest[2]), dtype=torch.int32, device=pool.device)[:, None]  # a block for each
    rest[1] = rest[1] + pool.size * torch.arange(len(rest[1]), device=pool.device)
    rope = tuple(torch.full_like(table, part) for table, part in zip(rope, (0.8, 0.6), strict=False))  # a rotation
    results = []
    for run in (step, lambda *args: compiled(args[0], DecodeCache(*args[1:], step.size, step.kernel))):
        caches = [[new_cache(config, 4 * pool.size, pool.dtype, pool.device) for _ in pool.keys] for _ in range(2)]
        results.append(run(tokens, *caches, *rest, rope).float())
    plain, other = results
    apart = (plain - other).abs().max() / plain.abs().max().clamp(min=1e-6)
    # a compiled step rounds to bfloat16 less often: with large activations that is a fifth of the largest logit
    if not apart < (0.5 if pool.dtype == torch.bfloat16 else 0.1):
        raise RuntimeError(f"the compiled step differs from the plain one by {float(apart):.0%} of the largest logit")


def examples(step, pool, several, requests=4):
    """-> (arguments to trace with, which of their sizes vary)"""
    requests = requests if several else 1
    config = step.model.config
    device = pool.device
    positions = torch.zeros(requests, dtype=torch.long, device=device)
    table = torch.zeros(requests, 7, dtype=torch.int32, device=device)
    lengths = torch.ones(requests, dtype=torch.int32, device=device)
    rope = ()
    if config.pos == "rope":
        rope = tuple(torch.zeros(requests, 1, config.head_dim, device=device) for _ in range(2))
    arguments = (positions[None], pool.keys, pool.values, positions, positions.clone(), table, lengths, rope)

    rows = torch.export.Dim("rows", min=2, max=kernels.MOST_ROWS) if several else None
    slots = torch.export.Dim("slots", min=2 * pool.size)
    blocks = torch.export.Dim("blocks", min=2)
    cache = [{0: slots} for _ in pool.keys]
    own = {0: rows} if several else {}
    shapes = ({1: rows} if several else {}, cache, cache, own, own, own | {1: blocks}, own,
              tuple(own for _ in rope))
    return arguments, shapes
