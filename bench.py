"""
Benchmarks, as a user would run the thing: the same commands, timed.

    python bench.py train --config=config/shakespeare_char_cpu.py --seeds=1,2,3
    python bench.py scaling --config=config/shakespeare_char.py --batches=1,4,8 --lengths=64,256 --worlds=1,2
    python bench.py scaling --config=config/owt_124m.py --batches=1,4,8 --lengths=1024 --worlds=1,2,4,8 \\
        --overrides=device=cuda,compile=true    # the same on GPUs
    python bench.py data --input=documents.jsonl.gz     # any file that data/openwebtext/prepare.py reads
    python bench.py loader --config=config/shakespeare_char_cpu.py
    python bench.py infer --forms=float32,int8 --batches=1,16
    python bench.py activations
    python bench.py zero --worlds=1,2 --shape=12,12,768 --tokens=256
    python bench.py monitor --config=config/shakespeare_char_cpu.py
    python bench.py gpu

`train` runs train.py on the config once per seed, each in a fresh folder under out_dir, then eval.py on the whole
validation split in fp32. `scaling` runs a few updates of it for each size of micro-batch, length of context and number
of processes, and says how fast they are, what they hold, and where a step's time goes. `data` makes corpora of several
sizes from the lines of a file and prepares them, by number of workers, beside nanoGPT's recipe, and watches the memory.
`loader` reads batches as fast as it can, beside nanoGPT's way, and trains for a while to see how long a step waits.
`infer` decodes with a GPT-2 of random weights, beside the plain way, transformers and llama.cpp (llama-cpp-python), or
with checkpoints alone (`--models=out/a,out/b`).
`activations` takes one training step with each of train.py's activation_checkpointing and says what it holds in memory
and how long it takes. `zero` says what each rank holds of weights, gradients and optimizer state when the optimizer
steps, by ZeRO stage, and its peak. `monitor` trains on the config with its logging and probes and without, in turns,
and says what they take of a step. `gpu` trains GPT-2's sizes on random tokens beside the machine's ceilings, one thing
varied at a time: compilation, batch, loss, kernel of attention, optimizer (benchmarks/gpu.py). Each prints a table and,
as the last line, one JSON object.
"""

import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import plan
from benchmarks import gpu
from benchmarks.common import forget_peak, machine, table, timed
from configurator import configure, fail, read_file, read_keys
from dataset import Tokens, find_dataset
from device import DTYPES, memory_gb, pick_device
from export import write_gguf
from infer import Engine, load, stream
from inference.quantize import convert
from loader import Loader
from model import GPT, GPTConfig
from optim import Optimizers
from parallel import Layout, checkpoint_activations, local, one_fate, own_device
from training.monitor import cpu_name, git

# -----------------------------------------------------------------------------
what = "train"              # train | scaling | data | loader | infer | activations | zero | monitor | gpu
out_dir = "out/bench"       # where the run folders go; those of an earlier benchmark must be gone

# train, scaling, loader and monitor
config = "config/shakespeare_char_cpu.py"  # the run to time
seeds = (1, 2, 3)           # train: one run each
processes = 1               # train: more than one are started by torchrun
overrides: tuple[str, ...] = ()  # more keys of train.py, such as --overrides=max_iters=100,device=cuda
reads = 2000                # loader: batches read in each round

# scaling, with batches (below), which are those of one micro-step there
lengths = (64, 256)         # tokens of context
worlds = (1, 2)             # scaling, zero: numbers of processes
warm_up = 3                 # scaling, gpu: updates that are not timed, ...
updates = 10                # ... and those that are, in each run

# data
input = ""                  # a file of documents, of whose lines the corpora are made
english = True              # only of its documents that are ASCII to 99 %, as OpenWebText's are
sizes = (50, 150, 500)      # megabytes of text in each corpus; speed is measured on the second
workers = (1, 2)            # numbers of processes
rounds = 3                  # scaling, data, loader, infer, monitor: times each thing is measured, in turns

# infer
forms = ("float32", "bfloat16", "int8")  # of the weights
kv_heads = (12,)            # key and value heads of 12; 1 is multi-query attention
models: tuple[str, ...] = ()  # run folders to measure, alone, in the place of GPT-2's size
batches = (1, 4, 8, 16)     # requests at once; scaling: sequences in a micro-batch
prompts = (16, 512)         # tokens of each prompt
new_tokens = 24             # tokens drawn after the first
peers = True                # also the plain way, without a cache, and transformers and llama.cpp where installed
crowd = 32                  # requests of mixed lengths, all at once and one after another; 0: none
device = "auto"             # infer, activations, zero, gpu: auto | cpu | cuda | cuda:N | mps

# activations, zero: fp32 steps on one sequence
shape = (24, 16, 1024)      # layers, heads and width; these are GPT-2's 355M
tokens = 1024               # in the sequence; gpu: in each

# gpu: bfloat16 steps
gpu_models = ("124m", "355m")  # 124m | 355m | 774m | tiny; the first is the one that is varied
gpu_batches = (16, 64, 128)  # sequences of a step of 124m (a larger model takes fewer); the middle one is the base
gpu_pieces = (33554432, 67108864, 134217728, 268435456)  # logits that the fused loss holds at once
# -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
PARTS = ("data_ms", "forward_ms", "backward_ms", "optim_ms")  # of a step


def run(script, *args, ranks=1, must=True):
    """Run one of our scripts, its output on the screen's stderr; -> the last line of its stdout. Where it fails the
    benchmark ends, unless it need not (`must`): -> None."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, ROOT / script, *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    line = ""
    for line in process.stdout:
        print("   ", line, end="", file=sys.stderr)
    if process.wait():
        failed = f"{script} {' '.join(args)} exited with {process.returncode}"
        if must:
            fail(failed)
        print(f"warning: {failed}", file=sys.stderr)
        return None
    return line


def new_folder(path):
    if Path(path).exists():
        fail(f"{path} exists: a benchmark starts from nothing; remove it or give another --out_dir")
    return Path(path)


# -----------------------------------------------------------------------------
# train


def read_run(folder):
    """-> (the records of a run's metrics.jsonl, what they depend on)"""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    kept = ("commit", "threads", "dataset_sha256", "environment_sha256", "cpu", "device")
    origin = {"dirty": bool(env["dirty_diff"] or env["untracked"]), "torch": env["packages"]["torch"]}
    return records, {**{key: env[key] for key in kept}, **origin}


def typical(records):
    """The median of a step's time, of its parts and of its speed; None where nothing was recorded, as of
    communication, which is measured at evaluations, in one process."""
    found = {}
    for part in ("step_ms", *PARTS, "comm_ms", "tok_per_s", "mfu"):
        values = [r[part] for r in records if r.get(part) is not None]
        found[part] = statistics.median(values) if values else None
    return found


def train_once(seed):
    """One training run: its figures as a dict."""
    folder = new_folder(Path(out_dir) / f"{Path(config).stem}_seed{seed}")
    keys = (f"--seed={seed}", f"--out_dir={folder}", *(f"--{key}" for key in overrides))
    run("train.py", config, *keys, ranks=processes)
    evaluated = json.loads(run("eval.py", f"--out_dir={folder}"))
    records, origin = read_run(folder)
    return {
        "seed": seed,
        "val_loss": evaluated["loss"],
        "train_s": records[-1]["wall_s"],  # compilation counts, evaluation and saving do not
        **typical(records),
        "mem_gb": records[-1]["mem_gb"],
        "steps": records[-1]["step"],
        **origin,
    }


def bench_train():
    if not seeds:
        fail("--seeds is empty: it takes the seed of each run, such as --seeds=1,2,3")
    rows = []
    for seed in seeds:
        rows.append(train_once(seed))
    columns = ("seed", "val_loss", "train_s", "step_ms", *PARTS, "tok_per_s")
    print(f"{config}: {rows[0]['steps']:,} steps, {rows[0]['device']} ({rows[0]['cpu']}), "
          f"commit {git('rev-parse', 'HEAD')}")
    print("  ".join(f"{c:>11}" for c in columns))
    for row in rows:
        print("  ".join(f"{row[c]:>11.4f}" if isinstance(row[c], float) else f"{row[c]:>11}" for c in columns))
    summary = {}
    for column in ("val_loss", "train_s", "step_ms"):
        values = [row[column] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[column] = {"mean": statistics.mean(values), "stdev": spread, "min": min(values), "max": max(values)}
        print(f"{column}: mean {statistics.mean(values):.4f}, standard deviation {spread:.4f}, "
              f"{min(values):.4f} to {max(values):.4f}")
    return {**summary, "runs": rows}


# -----------------------------------------------------------------------------
# scaling


def run_few(batch_size, length, ranks, micro_batches, folder, must):
    """A few updates of train.py. -> (the records after the warm-up, peak memory in MB, what they depend on) or None"""
    steps = warm_up + updates
    grid = {"batch_size": batch_size, "block_size": length, "gradient_accumulation_steps": micro_batches,
            "tokens_per_step": 0, "context_start": 0, "max_iters": steps, "log_interval": 1, "eval_interval": steps,
            "eval_iters": 1, "save_interval": 0, "save_minutes": 0, "sample_tokens": 0, "measure_comm": True,
            "out_dir": folder}
    for key in overrides:
        if key.partition("=")[0] in grid:
            fail(f"--overrides={key}: that is for the grid of scaling to say")
    # a process has as many threads alone as beside others, so that it stands for a GPU
    keys = [f"threads={max(1, (os.cpu_count() or 1) // max(worlds))}", *overrides]
    keys += [f"{name}={value}" for name, value in grid.items()]
    if run("train.py", config, *(f"--{key}" for key in keys), ranks=ranks, must=must) is None:
        return None
    records, origin = read_run(folder)
    shutil.rmtree(folder / "ckpt")  # of hundreds of megabytes each
    peak = records[-2]["mem_gb"]  # rank 0's; the last record's has the evaluation in it
    return records[warm_up:], peak and 1000 * peak, origin


def bench_scaling():
    """Per batch, length and number of processes, at a global batch that stays (strong scaling: all processes together
    take as many micro-batches) and at one that grows (weak: each takes one). Efficiency is the speed of each process
    as a share of that with the fewest processes."""
    if not (batches and lengths and worlds):
        fail("batches, lengths and worlds need at least one number each")
    if warm_up + updates < 2:
        fail("warm_up and updates must be two together: the last update's memory has the evaluation in it")
    most = math.lcm(*worlds)
    sizes = sorted({(n, most) for n in worlds} | {(n, n) for n in worlds})
    cases = [(batch, length, *size) for length in lengths for batch in batches for size in sizes]
    found, origins = {case: [] for case in cases}, []
    for turn in range(rounds):
        for case in cases:
            name = "b{}_t{}_p{}_m{}".format(*case)
            folder = new_folder(Path(out_dir) / f"{Path(config).stem}_{name}_{turn}")
            done = run_few(*case, folder, must=not origins)  # a larger one may not fit
            if done:
                found[case].append(done[:2])
                origins.append(done[2])
    rows = []
    for (batch, length, ranks, micro_batches), done in found.items():
        if len(done) == rounds:
            peaks = [peak for _, peak in done if peak is not None]
            row = {"length": length, "batch": batch, "processes": ranks, "micro_batches": micro_batches,
                   **typical([record for records, _ in done for record in records])}
            row["peak_mb"] = max(peaks, default=None)
            row["mfu_%"] = None if row["mfu"] is None else 100 * row["mfu"]
            rows.append(row)
    for row in rows:
        for kind, same in (("strong_%", lambda r: r["micro_batches"] == most),
                           ("weak_%", lambda r: r["micro_batches"] == r["processes"])):
            alike = [r for r in rows if (r["length"], r["batch"]) == (row["length"], row["batch"]) and same(r)]
            each = [r["tok_per_s"] / r["processes"] for r in alike]  # the fewest processes come first
            row[kind] = 100 * row["tok_per_s"] / row["processes"] / each[0] if same(row) else None
    print(f"{config}: median of {rounds} x {updates} updates after {warm_up}, {origins[0]['device']} "
          f"({origins[0]['cpu']}), {origins[0]['threads']} threads a process; micro_batches are those of a step, of "
          "all processes; strong and weak: speed of a process beside that with the fewest processes")
    table(rows, ("length", "batch", "processes", "micro_batches", "tok_per_s", "mfu_%", "peak_mb", "step_ms", "data_ms",
                 "forward_ms", "backward_ms", "comm_ms", "optim_ms", "strong_%", "weak_%"))
    return {"runs": origins, "rows": rows, "missing": [case for case, done in found.items() if len(done) < rounds]}


# -----------------------------------------------------------------------------
# data

# What nanoGPT's data/openwebtext/prepare.py does with a corpus that is on disk: tokens by datasets.map in `procs`
# processes, then 1,024 slices into a memmap. Its arguments: corpus, folder, procs, our tokenizer.json (the same ranks).
RECIPE = """
import json, os, sys, time
import numpy as np
corpus, folder, procs, tokenizer, root = sys.argv[1:]
os.environ["HF_HOME"] = folder
sys.path.insert(0, root)
import datasets
from tokenizer import load_tokenizer
bpe = load_tokenizer(tokenizer)._bpe
def encode(row):
    ids = bpe.encode_ordinary(row["text"]) + [bpe.eot_token]
    return {"ids": ids, "len": len(ids)}
loaded = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=folder)
split = loaded.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
began = time.perf_counter()
done = split.map(encode, remove_columns=["text"], num_proc=int(procs))
mapped = time.perf_counter()
for name, rows in done.items():
    total = int(np.sum(rows["len"], dtype=np.uint64))
    out = np.memmap(os.path.join(folder, name + ".bin"), dtype=np.uint16, mode="w+", shape=(total,))
    at, slices = 0, min(1024, len(rows))
    for i in range(slices):
        ids = np.concatenate(rows.shard(num_shards=slices, index=i, contiguous=True).with_format("numpy")["ids"])
        out[at : at + len(ids)] = ids
        at += len(ids)
    out.flush()
print(json.dumps({"map_s": mapped - began, "write_s": time.perf_counter() - mapped}))
"""


def make_corpus(path, texts, megabytes, seed=1):
    """A .jsonl of documents of about 4,500 characters, each of lines drawn from one text, so of one language."""
    rng, size, texts = random.Random(seed), 0, [text.split("\n") for text in texts if len(text) >= 15_000]
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            lines, document, length = rng.choice(texts), [], 0
            while length < 4500:
                document.append(rng.choice(lines))
                length += len(document[-1]) + 1
            text = "\n".join(document)
            size += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def watched(command):
    """Run a command in a session of its own. -> (seconds, most resident memory of all its processes in MB, stdout)

    Memory is read from /proc ten times a second, and is None where there is no /proc.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    most, ended, page = [0], threading.Event(), os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0

    def resident(stat):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            return int(fields[21]) * page if int(fields[3]) == process.pid else 0  # fields 24 and 6 of proc(5)
        except (OSError, ValueError, IndexError):  # it ended meanwhile
            return 0

    def watch():
        while not ended.wait(0.1):
            most[0] = max(most[0], sum(map(resident, Path("/proc").glob("[0-9]*/stat"))))

    began = time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    out = process.communicate()[0].decode()
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    if process.returncode:
        fail(f"{' '.join(map(str, command[1:4]))} ... exited with {process.returncode}")
    return seconds, most[0] / 1e6 or None, out


def prepare_once(corpus, dedup, count):
    """Prepare a corpus. -> (seconds, MB of memory, tokens)"""
    made = Path(out_dir) / "made"
    shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, ROOT / "data" / "openwebtext" / "prepare.py", f"--input={corpus}", f"--out_dir={made}",
               f"--dedup={dedup}", f"--workers={count}", "--val_fraction=0.01"]
    seconds, memory, _ = watched(command)
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    return seconds, memory, sum(split["tokens"] for split in manifest["splits"].values())


def recipe_once(corpus, procs):
    """nanoGPT's recipe. -> (seconds without loading the corpus, MB of memory, 0)"""
    folder = Path(out_dir) / "recipe"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tokenizer = Path(out_dir) / "made" / "tokenizer.json"
    _, memory, out = watched([sys.executable, "-c", RECIPE, corpus, folder, str(procs), tokenizer, ROOT])
    times = json.loads(out.splitlines()[-1])
    return times["map_s"] + times["write_s"], memory, 0


def bench_data():
    sys.path.insert(0, str(ROOT / "data"))
    from reading import read_texts

    if not input:
        fail("--input is missing: a file of documents, such as .jsonl.gz, to make the corpora of")
    folder = new_folder(out_dir)
    folder.mkdir(parents=True)
    texts = [text for text in read_texts(input)[0] if not english or sum(map(str.isascii, text)) >= 0.99 * len(text)]
    corpora = [folder / f"corpus_{size}.jsonl" for size in sizes]
    for path, size in zip(corpora, sizes, strict=True):
        make_corpus(path, texts, size)

    main = corpora[min(1, len(corpora) - 1)]
    megabytes = main.stat().st_size / 1e6
    most = max(workers)
    cases = {f"{dedup}, {count} workers": (lambda d=dedup, c=count: prepare_once(main, d, c))
             for dedup in ("none", "exact", "near") for count in workers}
    cases["nanoGPT's recipe"] = lambda: recipe_once(main, most)
    found = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(case())
            print(f"    {name}: {megabytes / found[name][-1][0]:.1f} MB/s", file=sys.stderr)
    rows = []
    for name, times in found.items():
        seconds = statistics.median(t[0] for t in times)
        rows.append({"what": name, "seconds": seconds, "MB/s": megabytes / seconds,
                     "Mtokens/s": times[0][2] / seconds / 1e6, "peak MB": max(t[1] or 0 for t in times),
                     "all_s": [t[0] for t in times]})
    memory = []
    for path, size in zip(corpora, sizes, strict=True):
        seconds, peak, _ = prepare_once(path, "near", most)
        speed = path.stat().st_size / 1e6 / seconds
        memory.append({"corpus MB": size, "seconds": seconds, "MB/s": speed, "peak MB": peak})
    print(f"{megabytes:.0f} MB of text, whole command, median of {rounds}; the recipe without loading the corpus")
    for row in rows:
        print(f"{row['what']:>20}  {row['seconds']:7.1f} s  {row['MB/s']:6.1f} MB/s  {row['peak MB']:7.0f} MB at most")
    print(f"near, {most} workers, by size of the corpus")
    table(memory, ("corpus MB", "seconds", "MB/s", "peak MB"))
    recipe = rows[-1]["seconds"]
    ratios = {row["what"]: recipe / row["seconds"] for row in rows[:-1]}
    print("times as fast as the recipe: " + ", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))
    return {"machine": machine(), "megabytes": megabytes, "rows": rows, "memory": memory, "ratios": ratios}


# -----------------------------------------------------------------------------
# loader


def crops(path, block_size, batch_size):
    """nanoGPT's batches: a memmap anew each time, a random crop for each row. Yields (x, y), int64 (B, T)."""
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r", offset=1024)
        at = torch.randint(len(data) - block_size, (batch_size,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in at])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in at])
        yield x, y


def bench_loader():
    keys = read_keys(ROOT / "train.py")
    values = {name: key.default for name, key in keys.items()} | read_file(config, keys)
    for pair in overrides:
        name, _, text = pair.partition("=")
        if name not in keys:
            fail(f"--overrides: train.py has no key {name}")
        values[name] = keys[name].check(text, f"--overrides={pair}", parse=True)
    block_size, batch_size = values["block_size"], values["batch_size"]
    tokens = Tokens(find_dataset(values["dataset"]), "train")

    def tokens_per_s(source):
        began = time.perf_counter()
        for _ in range(reads):
            next(source)
        return reads * batch_size * block_size / (time.perf_counter() - began)

    speeds = {"minichat": [], "nanoGPT": []}
    for _ in range(rounds):
        loader = Loader(tokens, block_size, batch_size, prefetch=values["prefetch"], threads=values["loader_threads"])
        speeds["minichat"].append(tokens_per_s(loader))
        loader.close()
        speeds["nanoGPT"].append(tokens_per_s(crops(tokens.paths[0], block_size, batch_size)))
    folder = new_folder(Path(out_dir) / f"{Path(config).stem}_loader")
    run("train.py", config, f"--out_dir={folder}", *(f"--{key}" for key in overrides))
    records, _ = read_run(folder)
    waiting, whole = (sum(r[p] for r in records for p in parts) for parts in (("data_ms",), PARTS))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"{config}: batches of {batch_size} x {block_size}, median of {rounds} rounds of {reads:,}")
    for name, speed in medians.items():
        print(f"{name:>10}: {speed / 1e6:8.2f} million tokens/s")
    print(f"a training step waits for data {waiting / whole:.3%} of its time ({records[-1]['step']:,} steps)")
    return {"machine": machine(), "tokens_per_s": medians, "all": speeds, "waiting": waiting / whole}


# -----------------------------------------------------------------------------
# infer


def bandwidth(where, size=2**28):
    """Bytes per second that this device reads, summing `size` floats: the most that decoding could use."""
    data = torch.ones(size, device=where)
    return data.nbytes / min(timed(lambda: data.sum().item()) for _ in range(5))


def decode(engine, batch, length):
    """One round of requests. -> (seconds to the first token, median seconds of a step after it)"""
    ids = torch.randint(engine.model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    requests = [engine.submit(row, max_new_tokens=new_tokens + 1, temperature=0) for row in ids.tolist()]
    began = time.perf_counter()
    while not all(request.tokens for request in requests):
        engine.step()
    first = time.perf_counter() - began
    steps = [timed(engine.step) for _ in range(new_tokens)]
    assert all(request.finish for request in requests)
    return first, statistics.median(steps)


def peers_of(model, where, length):
    """{name: a function that draws new_tokens after a first and -> seconds for each of them}, in the model's dtype."""
    ids = torch.randint(50257, (1, length), generator=torch.Generator().manual_seed(0))
    most = 3 if length > 100 else 8  # tokens, of the plain way

    def plain():
        tokens = stream(model, ids[0].tolist(), most + 1, temperature=0)
        next(tokens)
        return timed(lambda: list(tokens)) / most

    found = {"plain": plain}
    try:
        import transformers
    except ImportError:
        return found
    # random weights: what they are does not matter to how fast they are read
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(where, next(model.parameters()).dtype)

    def generate(batch):
        rows = ids.expand(batch, -1).to(where)
        how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(rows)}

        def once(n):
            return timed(lambda: theirs.generate(rows, max_new_tokens=n, min_new_tokens=n, **how))

        return lambda: (once(new_tokens + 1) - once(1)) / new_tokens

    return found | {f"transformers, batch {batch}": generate(batch) for batch in sorted({1, max(batches)})}


def llama_cpp_of(model, form, length):
    """{name: a function as those above}: llama.cpp on the same weights through GGUF, int8 being its q8_0. It works in a
    process of its own, whose end is not the end of the others' figures: on a Xeon with AMX its q8_0 faults."""
    if not importlib.util.find_spec("llama_cpp"):
        return {}
    spawn = multiprocessing.get_context("spawn")
    end, its_end = spawn.Pipe()

    def once():
        end.send(None)
        return end.recv()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, None, path, {"int8": "q8_0"}.get(form, form))
        args = its_end, str(path), length, new_tokens, torch.get_num_threads()
        spawn.Process(target=llama_cpp_draws, args=args, daemon=True).start()
        its_end.close()  # so that a child that dies ends the wait
        try:
            once()
        except (EOFError, OSError):
            print(f"warning: llama.cpp ended without a figure for {form}", file=sys.stderr)
            return {}
    return {"llama.cpp": once}


def llama_cpp_draws(end, path, length, n, threads):
    """A child of llama_cpp_of's: each message asks for the seconds of a token."""
    import llama_cpp

    settings = {"n_threads": threads, "n_threads_batch": threads, "use_mmap": False, "verbose": False}
    theirs = llama_cpp.Llama(path, n_ctx=1024, **settings)
    ids = torch.randint(50257, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    with contextlib.suppress(EOFError):  # the parent's end
        while True:
            end.recv()
            theirs.reset()
            tokens = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
            next(tokens)
            end.send(timed(lambda tokens=tokens: [next(tokens) for _ in range(n)]) / n)
    theirs.close()


def crowded(engine):
    """Requests of mixed lengths. -> (seconds one after another, seconds all at once)"""
    rng = random.Random(0)
    wants = [([rng.randrange(50257) for _ in range(rng.randint(4, 64))], rng.randint(8, 32)) for _ in range(crowd)]

    def one_by_one():
        for prompt, n in wants:
            engine.generate(prompt, max_new_tokens=n, temperature=0)

    def at_once():
        for prompt, n in wants:
            engine.submit(prompt, max_new_tokens=n, temperature=0)
        while engine.waiting or engine.running:
            engine.step()

    return timed(one_by_one), timed(at_once)


def checkpoint_of(folder, length):
    """The model in a run folder. Ends with a message where there is none, or none for so many tokens."""
    try:
        model = load(folder)[0]
    except (OSError, ValueError) as e:
        fail(e)
    if model.config.block_size < length:
        fail(f"--prompts={','.join(map(str, prompts))}: {folder} has a context of {model.config.block_size}, and the "
             f"longest prompt takes {length} with the tokens after it")
    return model


@torch.no_grad()
def bench_infer():
    where = pick_device(device)[0]
    loaded = {folder: checkpoint_of(folder, max(prompts) + new_tokens + 1) for folder in models}
    memory, rows, others = bandwidth(where), [], []
    for form in forms:
        for subject in models or kv_heads:
            torch.manual_seed(0)
            model = loaded[subject] if models else GPT(GPTConfig(n_kv_head=subject))
            model = copy.deepcopy(model).eval().to(where, torch.float32)
            heads, named = model.config.kv_heads, {"model": Path(subject).name} if models else {}
            int8 = form == "int8"
            dtype = torch.float32 if int8 and where.type == "cpu" else getattr(torch, "bfloat16" if int8 else form)
            standard = peers and not models and heads == 12
            beside = llama_cpp_of(model, form, min(prompts)) if standard else {}
            if standard and not int8:
                plain = copy.deepcopy(model).to(dtype)
                beside |= peers_of(plain, where, min(prompts)) | {
                    f"plain, prompt of {max(prompts)}": peers_of(plain, where, max(prompts))["plain"]}
            convert(model, dtype, "int8" if int8 else "")
            layers = [m for m in model.modules() if hasattr(m, "in_features")]
            engine = Engine(model, max_tokens=max(batches) * (max(prompts) + new_tokens + 16))
            size = sum(weight_bytes(m) for m in layers)
            cases = [(batch, length) for length in prompts for batch in batches]
            found, linear, peak = {case: [] for case in cases}, [], {}
            times = {name: [] for name in beside}
            for _ in range(rounds):
                linear += linear_times(layers, where, dtype)
                for case in cases:
                    forget_peak(where)
                    found[case].append(decode(engine, *case))
                    peak[case] = memory_gb(where) * 1e3
                for name, call in beside.items():
                    times[name].append(call())
            for (batch, length), pairs in found.items():
                first, each = (statistics.median(column) for column in zip(*pairs, strict=True))
                read = size + model.kv_cache_bytes(batch * (length + new_tokens // 2), engine.kv_dtype)
                rows.append({**named, "form": form, "kv_heads": heads, "batch": batch, "prompt": length,
                             "first_ms": 1000 * first, "token_ms": 1000 * each, "tok_per_s": batch / each,
                             "bandwidth": read / each / memory, "weights_mb": size / 1e6,
                             "peak_mb": peak[batch, length],
                             "kv_mb": model.kv_cache_bytes(batch * (length + new_tokens), engine.kv_dtype) / 1e6})
            mixed = {}
            if crowd and not models:
                alone_s, at_once_s = crowded(Engine(model, max_tokens=crowd * 112, max_requests=crowd))
                mixed = {"crowd": crowd, "one_by_one_s": alone_s, "at_once_s": at_once_s, "gain": alone_s / at_once_s}
            others.append({**named, "form": form, "kv_heads": heads, **mixed,
                           "linear_ms": 1000 * statistics.median(linear), "kv_pool_mb": engine.kv_bytes / 1e6,
                           "kv_pool_formula_mb": model.kv_cache_bytes(len(engine.keys[0]), engine.kv_dtype) / 1e6,
                           **{f"{name}, ms": 1000 * statistics.median(t) for name, t in times.items()}})
    print(f"{'checkpoints' if models else 'GPT-2 124M, random weights'}, {where} ({cpu_name()}, "
          f"{torch.get_num_threads()} threads), which reads {memory / 1e9:.1f} GB/s; median of {rounds} rounds of "
          f"{new_tokens} tokens")
    table(rows, (*["model"] * bool(models), "form", "kv_heads", "batch", "prompt", "first_ms", "token_ms", "tok_per_s",
                 "bandwidth", "kv_mb", "peak_mb"))
    for other in others:
        print(", ".join(f"{k}: {v:.1f}" if isinstance(v, float) else f"{k}: {v}" for k, v in other.items()))
    return {"machine": machine(), "device": str(where), "read_gb_per_s": memory / 1e9, "rows": rows, "others": others}


def linear_times(layers, where, dtype):
    """Seconds that all linear layers take for one row, one after another, five times."""
    row = {n: torch.randn(1, n, device=where, dtype=dtype) for n in {layer.in_features for layer in layers}}
    return [timed(lambda: [layer(row[layer.in_features]) for layer in layers], where) for _ in range(5)]


def weight_bytes(layer):
    """Bytes that a linear layer reads for one row."""
    kept = [layer.packed] if hasattr(layer, "packed") else [layer.weight]
    return sum(w.numel() * w.element_size() for w in kept)


# -----------------------------------------------------------------------------
# activations and zero: what is held in memory


def apart(function, *args, ranks=1):
    """What `function` gives, by rank, in processes of their own, as the peak of a process never falls."""
    spawn = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waiting, found = {}, {}
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        here, there = spawn.Pipe(duplex=False)
        spawn.Process(target=tell, args=(there, place, function, args), daemon=True).start()
        there.close()  # so that a child that dies ends the wait
        waiting[here] = rank
    while waiting:
        for end in wait(list(waiting)):
            rank = waiting.pop(end)
            try:
                found[rank] = end.recv()
            except EOFError:
                fail(f"{function.__name__}: process {rank} of {ranks} ended without a result; its error is above")
    return [found[rank] for rank in range(ranks)]


def tell(end, place, function, args):
    """A child of `apart`: what `function` gives goes to the parent."""
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(max(1, torch.get_num_threads() // place["WORLD_SIZE"]))
    with one_fate():
        end.send(function(*args))


def large_model(shape, tokens):
    """A GPT-2 of `shape` (layers, heads, width) with random weights, always the same, and a sequence for it."""
    n_layer, n_head, n_embd = shape
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=tokens, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    return model, torch.randint(50257, (1, tokens))


def step_once(kind, shape, tokens, device):
    """What one forward and backward pass takes."""
    where = pick_device(device)[0]
    model, x = (t.to(where) for t in large_model(shape, tokens))
    if kind != "none":
        checkpoint_activations(model, kind)
    weights, clock = memory_gb(where), time.perf_counter()
    _, loss = model(x, x, loss_only=True)
    held = memory_gb(where) - weights
    loss.backward()
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.grad.cpu().numpy().data)
    return {"checkpointing": kind, "activations_mb": 1000 * held, "peak_mb": 1000 * memory_gb(where),
            "step_s": time.perf_counter() - clock, "gradients": digest.hexdigest()[:16]}


def bench_activations():
    rows = [apart(step_once, kind, shape, tokens, device)[0] for kind in ("none", "selective", "full")]
    for row in rows:
        row["of_none_%"] = 100 * row["activations_mb"] / rows[0]["activations_mb"]
    print(f"{shape[0]} layers of {shape[2]}, {shape[1]} heads, 1 sequence of {tokens} tokens, fp32, "
          f"{torch.get_num_threads()} threads; activations: how far the forward pass raises the peak")
    table(rows, ("checkpointing", "activations_mb", "of_none_%", "peak_mb", "step_s", "gradients"))
    return {"machine": machine(), "rows": rows}


def held_bytes(model, opt):
    """Bytes that lie on this rank of weights, gradients and what the optimizer keeps; its step counts aside."""
    states = [t for kind in opt.state_dict().values() for values in kind.values() for t in values.values() if t.ndim]
    parts = {"weights": list(model.parameters()), "gradients": [p.grad for p in model.parameters()],
             "optimizer": states}
    return {name: sum(local(t).numel() * t.element_size() for t in tensors) for name, tensors in parts.items()}


def updates_once(stage, shape, tokens, device):
    """What this rank holds when the optimizer steps, and at most in an update of two micro-batches, the second one:
    what stays from one to the next, and how far memory rises meanwhile."""
    where = own_device(device, pick_device(device)[0])
    layout = Layout(where, zero_stage=stage)
    whole, x = (t.to(where) for t in large_model(shape, tokens))
    theory = 4 * whole.param_bytes() / (layout.dp if layout.zero else 1)
    planned = plan.step_memory(plan.costs_of(whole), 1, layout=plan.Layout(layout.dp, layout.zero), micro_steps=2,
                               cuda=where.type == "cuda")["total"]
    model = layout.place(whole)
    del whole
    opt = Optimizers(model, learning_rate=1e-3, whole=layout.whole, part=layout.part)
    for _ in range(2):  # the first makes the optimizer's state
        forget_peak(where)
        before = memory_gb(where)
        for last in (False, True):
            layout.before_forward(model, last)
            _, loss = layout.module(x, x, loss_only=True)
            (loss / 2).backward()
        layout.reduce(model)
        opt.step()
        held = held_bytes(model, opt)
        opt.zero_grad()
    stays = held["weights"] + held["optimizer"]
    if layout.module is not model:  # DDP's buckets, which the gradients lie in
        stays += held["gradients"]
    peak = stays + 1e9 * (memory_gb(where) - before)
    return {**held, "theory": theory, "peak": peak, "plan": planned}


def bench_zero():
    """Theory: weights, gradients and AdamW's two moments, 4 numbers for each parameter; in every stage each of n ranks
    has an n-th of them at the step (Rajbhandari et al. 2020), as fully_shard reduces gradients into shards and frees
    whole weights by then. What the stages differ in is the peak: 3 frees weights between uses, 2 and 3 reduce
    gradients after each micro-batch, 1 keeps them whole up to the last."""
    if not worlds:
        fail("worlds must be at least 1 number of processes")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "100000"  # for the children: glibc gives back at once what they free
    rows = []
    for ranks in worlds:
        for stage in (0, 1, 2, 3) if ranks > 1 else (0,):
            each = apart(updates_once, stage, shape, tokens, device, ranks=ranks)
            most = {f"{name}_mb": max(one[name] for one in each) / 1e6 for name in each[0]}
            held = sum(most[f"{name}_mb"] for name in ("weights", "gradients", "optimizer"))
            rows.append({"processes": ranks, "layout": f"ZeRO-{stage}" if stage else "DDP" if ranks > 1 else "one",
                         **most, "of_theory_%": 100 * held / most["theory_mb"]})
    print(f"{shape[0]} layers of {shape[2]}, {shape[1]} heads, 2 micro-batches of 1 sequence of {tokens} tokens, fp32; "
          "MB on the rank that has most: at the optimizer's step (theory: of all three), then the peak of an update, "
          "and what plan.py says of it")
    table(rows, ("processes", "layout", "weights_mb", "gradients_mb", "optimizer_mb", "theory_mb", "of_theory_%",
                 "peak_mb", "plan_mb"))
    return {"machine": machine(), "rows": rows}


def check():
    """Ends where a setting cannot be had."""
    if what in ("train", "scaling", "loader", "monitor") and not Path(config).exists():
        fail(f"no config file {config}")
    unknown = [form for form in forms if form not in (*DTYPES, "int8")]
    if unknown:
        fail(f"--forms={','.join(unknown)}: it takes {', '.join(DTYPES)}, int8")
    if len(shape) != 3:
        fail("--shape takes three numbers: layers, heads and width")
    try:
        if what in ("infer", "activations", "zero", "gpu"):
            pick_device(device)
        for heads in kv_heads:
            GPTConfig(n_kv_head=heads)
        GPTConfig(block_size=tokens, n_layer=shape[0], n_head=shape[1], n_embd=shape[2])
    except ValueError as e:
        fail(e)


# -----------------------------------------------------------------------------
# monitor

# train.py, whose last line is the time of every optimizer step: between two of them lies all that a step takes
TIMED = """
import json, runpy, sys, time
sys.path.insert(0, sys.argv[1])
import optim
times, step = [], optim.Optimizers.step
def timed(self):
    times.append(time.perf_counter())
    return step(self)
optim.Optimizers.step = timed
sys.argv = sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(times))
"""


def step_times(folder, *keys):
    """Seconds from each step to the next in a run of train.py, evaluated and saved at its end alone."""
    last = ("--eval_interval=1000000000", "--eval_iters=1", "--save_interval=0", "--save_minutes=0")
    keys = (*(f"--{key}" for key in overrides), *last, f"--out_dir={new_folder(folder)}", *keys)
    command = [sys.executable, "-c", TIMED, ROOT, ROOT / "train.py", config, *keys]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        fail(f"train.py {' '.join(keys)} exited with {done.returncode}")
    return np.diff(json.loads(done.stdout.splitlines()[-1]))


def bench_monitor():
    """The same steps with the config's logging and probes and without any, each step by the least of its rounds."""
    ways = {"without": ("--log_interval=1000000000", "--probe_interval=0"), "as configured": ()}
    took = {way: [] for way in ways}
    for i in range(rounds):
        for way, keys in list(ways.items())[:: 1 if i % 2 else -1]:
            took[way].append(step_times(Path(out_dir) / f"monitor_{way.split()[0]}_{i}", *keys))
    least = {way: np.min(times, axis=0) for way, times in took.items()}
    rows = [{"way": way, "steps": len(least[way]) + 1, "mean_ms": 1000 * float(least[way].mean()),
             "median_ms": 1000 * float(np.median(least[way])), "longest_ms": 1000 * float(least[way].max()),
             "rounds_ms": [1000 * float(times.mean()) for times in took[way]]} for way in ways]
    share = float(least["as configured"].sum() / least["without"].sum() - 1)
    print(f"{config}, {torch.get_num_threads()} threads: milliseconds from step to step, the least of {rounds} rounds")
    table(rows, ("way", "steps", "mean_ms", "median_ms", "longest_ms"))
    print(f"logging and probes take {share:.2%} of a step")
    return {"machine": machine(), "rows": rows, "share": share}


if __name__ == "__main__":
    benchmarks = {"train": bench_train, "scaling": bench_scaling, "data": bench_data, "loader": bench_loader,
                  "infer": bench_infer, "activations": bench_activations, "zero": bench_zero,
                  "monitor": bench_monitor, "gpu": lambda: gpu.bench(SimpleNamespace(**settings))}
    settings = configure(globals(), verb="what", verbs=tuple(benchmarks))
    check()
    figures = benchmarks[what]()
    settings["input"] = Path(input).name  # where it lies is this machine's own affair
    print(json.dumps({"benchmark": what, "settings": settings, **figures}))
    if figures.get("failed"):
        sys.exit(1)
