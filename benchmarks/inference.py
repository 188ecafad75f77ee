"""
How fast GPT-2's size generates text: bench.py's `infer`.

The engine of infer.py decodes with random weights in each form (fp32, bf16, int8, int4), for each number of key and
value heads, batch size and prompt length, with the step of a token compiled and not. Decoding reads all weights for
each token, so it cannot be faster than the machine reads memory: `bandwidth` is the share of that speed which decoding
reaches, and `linear_bandwidth` the share which the matrices alone reach, one after another.

Beside the engine, on the same weights: the plain way, which computes the whole context for each token, llama.cpp in a
process of its own (peer_llama names its Python) and transformers where it is installed. A crowd of requests of mixed
lengths shows what batching gains over one request after another. Beside run folders as models only llama.cpp is timed.

All measurements take turns for several rounds, and a figure is the median of its rounds.
"""

import copy
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import forget_peak, form_of, machine, table, timed
from configurator import fail
from device import DTYPES, memory_gb, pick_device
from export import write_gguf
from infer import Engine, load, stream
from inference import kernels
from inference.quantize import convert
from model import GPT, GPTConfig
from training.monitor import cpu_name

LLAMA = {"int8": "q8_0", "int4": "q4_0"}  # form -> llama.cpp's; others have the same name


@torch.no_grad()
def bench_infer(c):
    """-> a row for each model, form, batch and prompt, and a dict of the other figures for each model and form"""
    device = pick_device(c.device)[0]
    loaded = {folder: load_checkpoint(c, folder) for folder in c.models}
    read_speed = read_bytes_per_s(device)
    rows = []
    others = []
    for form in c.forms:
        for subject in c.models or c.kv_heads:
            torch.manual_seed(0)
            label = {"form": form}
            if c.models:
                model = loaded[subject]
                label = {"model": Path(subject).name, "form": form}
            else:
                model = GPT(GPTConfig(n_kv_head=subject))
            model = copy.deepcopy(model).eval().to(device, torch.float32)
            label["kv_heads"] = model.config.kv_heads
            model_rows, other = measure_model(c, model, form, label, device, read_speed)
            rows += model_rows
            others.append(other)

    subject = "checkpoints" if c.models else "GPT-2 124M, random weights"
    print(f"{subject}, {device} ({cpu_name()}, {torch.get_num_threads()} threads), which reads "
          f"{read_speed / 1e9:.1f} GB/s; median of {c.rounds} rounds of {c.new_tokens} tokens")
    columns = ["form", "compiled", "kv_heads", "batch", "prompt", "first_ms", "token_ms", "tok_per_s",
               "bandwidth", "kv_mb", "peak_mb"]
    if c.models:
        columns.insert(0, "model")
    table(rows, columns)
    for other in others:
        parts = [f"{key}: {value:.2f}" if isinstance(value, float) else f"{key}: {value}"
                 for key, value in other.items()]
        print(", ".join(parts))
    return {
        "machine": machine(),
        "device": str(device),
        "read_gb_per_s": read_speed / 1e9,
        "rows": rows,
        "others": others,
    }


def load_checkpoint(c, folder):
    """The model in a run folder. Ends with a message where there is none, or its context is too short."""
    try:
        model = load(folder)[0]
    except (OSError, ValueError) as error:
        fail(error)
    needed = max(c.prompts) + c.new_tokens + 1
    if model.config.block_size < needed:
        prompts = ",".join(map(str, c.prompts))
        fail(f"--prompts={prompts}: {folder} has a context of {model.config.block_size}, and the "
             f"longest prompt takes {needed} with the tokens after it")
    return model


def engines_of(c, model):
    """{compiled or not: an Engine of the converted model} for each way of c.compiled that works here."""
    engines = {}
    room = max(c.batches) * (max(c.prompts) + c.new_tokens + 16)
    for compiled in c.compiled:
        engine = Engine(model, max_tokens=room, max_requests=max(c.batches))
        try:
            if compiled:
                engine.compile(several=max(c.batches) > 1)
        except RuntimeError as error:
            print(f"warning: not compiled: {error}", file=sys.stderr)
            continue
        engines[compiled] = engine
    return engines or fail("--compiled=true: nothing could be compiled; --compiled=false measures the plain step")


def measure_model(c, model, form, label, device, read_speed):
    """Measure one fp32 model in one form. -> (a row for each way, batch and prompt, a dict of the other figures)

    The rows and the dict begin with `label`. The model is converted in place.
    """
    dtype, quantize = form_of(form, device)
    peers = peers_of(c, model, form, dtype, device)
    convert(model, dtype, quantize)
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    weights = sum(map(weight_bytes, layers))
    engines = engines_of(c, model)

    cases = [(compiled, batch, length) for length in c.prompts for batch in c.batches for compiled in engines]
    decode_s = {case: [] for case in cases}  # pairs, as decode returns them
    peak_mb = {}
    linear_s = []
    read_s = []
    peer_s = {name: [] for name in peers}
    for _ in range(c.rounds):
        linear_s += linear_times(layers, device, dtype)
        read_s.append(weights / read_bytes_per_s(device))
        for compiled, batch, length in cases:
            forget_peak(device)
            decode_s[compiled, batch, length].append(decode(engines[compiled], batch, length, c.new_tokens))
            peak_mb[compiled, batch, length] = memory_gb(device) * 1e3
        for name, measure in peers.items():
            peer_s[name].append(measure())

    engine = engines[cases[0][0]]
    rows = []
    for case, rounds in decode_s.items():
        row = decode_row(c, engine, case, rounds, weights, read_speed)
        rows.append({**label, **row, "peak_mb": peak_mb[case]})
    other = dict(label)
    if c.crowd and not c.models:
        other |= crowd_times(model, c.crowd, any(engines))
    other["read_ms"] = 1000 * statistics.median(read_s)  # of the weights, as fast as the machine reads
    other["linear_ms"] = 1000 * statistics.median(linear_s)
    other["linear_bandwidth"] = other["read_ms"] / other["linear_ms"]
    alone = min(row["token_ms"] for row in rows if row["batch"] == 1) if 1 in c.batches else None
    if alone:
        other["linear_share"] = other["linear_ms"] / alone  # of the fastest step of one request
    other["kv_pool_mb"] = engine.kv_bytes / 1e6
    other["kv_pool_formula_mb"] = model.kv_cache_bytes(len(engine.keys[0]), engine.kv_dtype) / 1e6
    for name, figures in peer_s.items():
        firsts, tokens = zip(*figures, strict=True)
        other[f"{name}, ms"] = 1000 * statistics.median(tokens)
        if all(firsts):
            other[f"{name}, first ms"] = 1000 * statistics.median(firsts)
    return rows, other


def decode_row(c, engine, case, rounds, weights, read_speed):
    """The figures of one case, (compiled, batch, length): its `rounds` are what decode returned. weights: bytes."""
    compiled, batch, length = case
    model = engine.model
    token_s = statistics.median(token for _, token in rounds)
    # a step reads all weights, and the keys and values of half of the new tokens on average
    read = weights + model.kv_cache_bytes(batch * (length + c.new_tokens // 2), engine.kv_dtype)
    kv_bytes = model.kv_cache_bytes(batch * (length + c.new_tokens), engine.kv_dtype)
    return {
        "compiled": compiled,
        "batch": batch,
        "prompt": length,
        "first_ms": 1000 * statistics.median(first for first, _ in rounds),
        "token_ms": 1000 * token_s,
        "tok_per_s": batch / token_s,
        "bandwidth": read / token_s / read_speed,
        "weights_mb": weights / 1e6,
        "kv_mb": kv_bytes / 1e6,
    }


# -----------------------------------------------------------------------------
# The engine and the machine


def read_bytes_per_s(device, size=2**27):
    """Bytes per second that a device reads, of `size` floats: the most that decoding could use. A median of five."""
    data = torch.ones(size, device=device)
    if device.type == "cpu" and kernels.available():
        return data.nbytes / statistics.median(timed(lambda: kernels.read_all(data)) for _ in range(5))
    return data.nbytes / statistics.median(timed(lambda: data.sum().item()) for _ in range(5))


def random_prompts(batch, length, vocab_size=50257):
    """(batch, length) token ids, the same each time."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def decode(engine, batch, length, new_tokens):
    """One round of requests. -> (seconds to the first token of all, median seconds of a step after it)"""
    engine.blocks.forget()  # the prompts are those of the last round, and shall be read again
    prompts = random_prompts(batch, length, engine.model.config.vocab_size)
    requests = []
    for ids in prompts.tolist():
        requests.append(engine.submit(ids, max_new_tokens=new_tokens + 1, temperature=0))
    began = time.perf_counter()
    while not all(request.tokens for request in requests):
        engine.step()
    first_s = time.perf_counter() - began
    steps_s = [timed(engine.step) for _ in range(new_tokens)]
    assert all(request.finish for request in requests)
    return first_s, statistics.median(steps_s)


def linear_times(layers, device, dtype):
    """Seconds that all linear layers take for one row, one after another, five times."""
    widths = {layer.in_features for layer in layers}
    rows = {width: torch.randn(1, width, device=device, dtype=dtype) for width in widths}

    def all_layers():
        for layer in layers:
            layer(rows[layer.in_features])

    return [timed(all_layers, device) for _ in range(5)]


def weight_bytes(layer):
    """Bytes that a linear layer reads for one row."""
    if hasattr(layer, "weight_bytes"):
        return layer.weight_bytes
    weight = layer.packed if hasattr(layer, "packed") else layer.weight
    return weight.numel() * weight.element_size()


def crowd_times(model, crowd, compiled):
    """Requests of mixed lengths, one after another and all at once. -> their figures, as a dict"""
    engine = Engine(model, max_tokens=crowd * 112, max_requests=crowd)
    if compiled:
        engine.compile()
    rng = random.Random(0)
    requests = []
    for _ in range(crowd):
        prompt = [rng.randrange(50257) for _ in range(rng.randint(4, 64))]
        requests.append((prompt, rng.randint(8, 32)))

    def one_by_one():
        for prompt, new_tokens in requests:
            engine.generate(prompt, max_new_tokens=new_tokens, temperature=0)

    def at_once():
        for prompt, new_tokens in requests:
            engine.submit(prompt, max_new_tokens=new_tokens, temperature=0)
        while engine.waiting or engine.running:
            engine.step()

    one_by_one_s = timed(one_by_one)
    engine.blocks.forget()  # the same prompts again
    at_once_s = timed(at_once)
    return {
        "crowd": crowd,
        "one_by_one_s": one_by_one_s,
        "at_once_s": at_once_s,
        "gain": one_by_one_s / at_once_s,
    }


# -----------------------------------------------------------------------------
# Other ways to generate, beside the engine


def peers_of(c, model, form, dtype, device):
    """{name: a function that generates and returns (seconds to the first token or None, seconds of a token)}"""
    if not c.peers:
        return {}
    peers = llama_cpp_of(c, model, form)
    if c.models or model.config.kv_heads != 12:
        return peers
    if form in DTYPES:  # the integers are only llama.cpp's
        model = copy.deepcopy(model).to(dtype)
        shortest = min(c.prompts)
        longest = max(c.prompts)
        peers["plain"] = partial(plain_s, model, shortest)
        peers |= transformers_of(c, shortest, dtype, device)
        peers[f"plain, prompt of {longest}"] = partial(plain_s, model, longest)
    return peers


def plain_s(model, length):
    """(None, seconds for each token of the plain way, without a cache)"""
    new_tokens = 3 if length > 100 else 8  # a token takes long
    prompt = random_prompts(1, length)[0].tolist()
    tokens = stream(model, prompt, new_tokens + 1, temperature=0)
    next(tokens)
    return None, timed(lambda: list(tokens)) / new_tokens


def transformers_of(c, length, dtype, device):
    """As peers_of: transformers' GPT-2, with a batch of one and with the largest batch; {} if it is not installed."""
    try:
        import transformers
    except ImportError:
        return {}
    # other random weights, which are read as fast
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(device, dtype)
    prompt = random_prompts(1, length)

    def generate_s(prompts, new_tokens):
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None,
                   "min_new_tokens": new_tokens, "max_new_tokens": new_tokens,
                   "attention_mask": torch.ones_like(prompts)}
        return timed(lambda: model.generate(prompts, **options))

    def seconds(prompts):  # the first token also reads the prompt
        first_s = generate_s(prompts, 1)
        return first_s, (generate_s(prompts, c.new_tokens + 1) - first_s) / c.new_tokens

    peers = {}
    for batch in sorted({1, max(c.batches)}):
        prompts = prompt.expand(batch, -1).to(device)
        peers[f"transformers, batch {batch}"] = partial(seconds, prompts)
    return peers


def llama_cpp_of(c, model, form):
    """As peers_of: llama.cpp on the same weights, through GGUF, for each length of prompt. {} if peer_llama names no
    Python that has llama-cpp-python, if the form is not one of its, or if it fails."""
    name = LLAMA.get(form, form)
    if not c.peer_llama or name not in ("float32", "bfloat16", *LLAMA.values()):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        try:
            write_gguf(model, None, path, name)
        except ValueError as error:
            print(f"warning: without llama.cpp: {error}", file=sys.stderr)
            return {}
        prompts = {length: random_prompts(1, length, model.config.vocab_size)[0].tolist() for length in c.prompts}
        script = Path(__file__).with_name("llama_cpp_peer.py")
        command = [c.peer_llama, str(script), str(path), str(torch.get_num_threads()), str(c.new_tokens)]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def seconds(length):
            peer.stdin.write(json.dumps(prompts[length]) + "\n")
            peer.stdin.flush()
            return json.loads(peer.stdout.readline())

        try:
            seconds(min(c.prompts))  # it has read the file when this returns
        except (OSError, ValueError):
            print(f"warning: llama.cpp ended without a figure for {form}", file=sys.stderr)
            return {}
    return {f"llama.cpp, prompt of {length}": partial(seconds, length) for length in c.prompts}
