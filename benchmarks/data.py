"""
How fast text becomes tokens, and tokens become batches: bench.py's `data` and `loader`.

`data` makes corpora of several sizes from the lines of a file, and prepares one of them with
data/openwebtext/prepare.py, with each kind of deduplication and number of workers. nanoGPT's recipe prepares the same
corpus. The speed counts the whole command. Then it prepares all sizes, to see whether memory grows with the corpus.

`loader` reads batches as fast as it can, in turns with nanoGPT's way to read them. Then it trains on the config, and
reports the share of a step that is spent waiting for data.
"""

import json
import mmap
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import PARTS, ROOT, machine, new_folder, read_run, run_script, table, train_settings
from configurator import fail
from dataset import Tokens, find_dataset
from loader import Loader

# What nanoGPT's data/openwebtext/prepare.py does with a corpus that is on disk: tokens by datasets.map in `procs`
# processes, then 1,024 slices into a memmap. Its arguments: corpus, folder, procs, our tokenizer.json (the same ranks)
# and the root of this project. The time does not include loading the corpus.
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
    at = 0
    slices = min(1024, len(rows))
    for i in range(slices):
        ids = np.concatenate(rows.shard(num_shards=slices, index=i, contiguous=True).with_format("numpy")["ids"])
        out[at : at + len(ids)] = ids
        at += len(ids)
    out.flush()
print(json.dumps({"map_s": mapped - began, "write_s": time.perf_counter() - mapped}))
"""

# -----------------------------------------------------------------------------
# data


def bench_data(c):
    """-> a row for each way to prepare the second corpus, a row for each size of corpus, and how many times as fast as
    the recipe each way is."""
    if not c.input:
        fail("--input is missing: a file of documents, such as .jsonl.gz, to make the corpora of")
    folder = new_folder(c.out_dir)
    folder.mkdir(parents=True)
    corpora = make_corpora(c, folder)
    main = corpora[min(1, len(corpora) - 1)]
    megabytes = main.stat().st_size / 1e6
    rows = preparation_rows(c, folder, main, megabytes)
    memory = memory_rows(c, folder, corpora)

    print(f"{megabytes:.0f} MB of text, whole command, median of {c.rounds}; "
          "the recipe without loading the corpus")
    for row in rows:
        print(f"{row['what']:>20}  {row['seconds']:7.1f} s  {row['MB/s']:6.1f} MB/s  "
              f"{row['peak MB']:7.0f} MB at most")
    print(f"near, {max(c.workers)} workers, by size of the corpus")
    table(memory, ("corpus MB", "seconds", "MB/s", "peak MB"))
    recipe_s = rows[-1]["seconds"]
    ratios = {row["what"]: recipe_s / row["seconds"] for row in rows[:-1]}
    listed = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items())
    print(f"times as fast as the recipe: {listed}")
    return {
        "machine": machine(),
        "megabytes": megabytes,
        "rows": rows,
        "memory": memory,
        "ratios": ratios,
    }


LONG = 15_000  # characters of a text whose lines documents are made of


def make_corpora(c, folder):
    """Write a corpus of each size from the documents of c.input. -> their paths"""
    sys.path.insert(0, str(ROOT / "data"))  # for the modules of the prepare scripts
    from texts import read_texts

    texts = read_texts(c.input)[0]
    if c.english:
        texts = [text for text in texts if sum(map(str.isascii, text)) >= 0.99 * len(text)]
    texts = [text for text in texts if len(text) >= LONG]
    if not texts:
        fail(f"--input={c.input} has no document of {LONG:,} characters or more: the corpora are made of their lines")
    paths = []
    for size in c.sizes:
        path = folder / f"corpus_{size}.jsonl"
        make_corpus(path, texts, size)
        paths.append(path)
    return paths


def make_corpus(path, texts, megabytes, seed=1):
    """A .jsonl of documents of about 4,500 characters. The lines of a document are drawn from a single text, so they
    are in the same language."""
    rng = random.Random(seed)
    line_lists = [text.split("\n") for text in texts]
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            lines = rng.choice(line_lists)
            document = []
            length = 0
            while length < 4500:
                document.append(rng.choice(lines))
                length += len(document[-1]) + 1
            text = "\n".join(document)
            size += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def preparation_rows(c, folder, corpus, megabytes):
    """Prepare a corpus in each way, c.rounds times, in turns. -> a row for each way; the recipe is the last"""
    ways = {}
    for dedup in ("none", "exact", "near"):
        for workers in c.workers:
            ways[f"{dedup}, {workers} workers"] = partial(prepare, folder, corpus, dedup, workers)
    ways["nanoGPT's recipe"] = partial(prepare_by_recipe, folder, corpus, max(c.workers))
    results = {name: [] for name in ways}
    for _ in range(c.rounds):
        for name, prepare_once in ways.items():
            seconds, peak_mb, tokens = prepare_once()
            results[name].append((seconds, peak_mb, tokens))
            print(f"    {name}: {megabytes / seconds:.1f} MB/s", file=sys.stderr)
    rows = []
    for name, rounds in results.items():
        all_s = [seconds for seconds, _, _ in rounds]
        seconds = statistics.median(all_s)
        tokens = rounds[0][2]
        peak_mb = max(peak_mb or 0 for _, peak_mb, _ in rounds)
        rows.append({
            "what": name,
            "seconds": seconds,
            "MB/s": megabytes / seconds,
            "Mtokens/s": tokens / seconds / 1e6,
            "peak MB": peak_mb,
            "all_s": all_s,
        })
    return rows


def memory_rows(c, folder, corpora):
    """Peak memory by size of the corpus, with the largest number of workers and near duplicates dropped."""
    rows = []
    for path, size in zip(corpora, c.sizes, strict=True):
        seconds, peak_mb, _ = prepare(folder, path, "near", max(c.workers))
        speed = path.stat().st_size / 1e6 / seconds
        rows.append({"corpus MB": size, "seconds": seconds, "MB/s": speed, "peak MB": peak_mb})
    return rows


def prepare(folder, corpus, dedup, workers):
    """Prepare a corpus with our script. -> (seconds, peak memory in MB, tokens)"""
    made = folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, ROOT / "data" / "openwebtext" / "prepare.py"]
    command += [f"--input={corpus}", f"--out_dir={made}", f"--dedup={dedup}"]
    command += [f"--workers={workers}", "--val_fraction=0.01"]
    seconds, peak_mb, _ = run_watched(command)
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    return seconds, peak_mb, sum(split["tokens"] for split in manifest["splits"].values())


def prepare_by_recipe(folder, corpus, procs):
    """Prepare a corpus as nanoGPT does. -> (seconds without loading the corpus, peak memory in MB, 0)"""
    made = folder / "recipe"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    tokenizer = folder / "made" / "tokenizer.json"  # of the run of our script before it
    command = [sys.executable, "-c", RECIPE, corpus, made, str(procs), tokenizer, ROOT]
    _, peak_mb, output = run_watched(command)
    times = json.loads(output.splitlines()[-1])
    return times["map_s"] + times["write_s"], peak_mb, 0


def run_watched(command):
    """Run a command in a session of its own. -> (seconds, peak resident memory of all its processes in MB, stdout)

    Memory is read from /proc ten times a second, and is None where there is no /proc.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    peak = 0
    ended = threading.Event()

    def watch():
        nonlocal peak
        while not ended.wait(0.1):
            peak = max(peak, session_bytes(process.pid))

    began = time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0].decode()
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    if process.returncode:
        fail(f"{' '.join(map(str, command[1:4]))} ... exited with {process.returncode}")
    return seconds, peak / 1e6 or None, output


def session_bytes(session):
    """Resident bytes of all processes of a session, from /proc/PID/stat."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # from field 3 of proc(5) on
            if int(fields[3]) == session:  # field 6
                total += int(fields[21]) * mmap.PAGESIZE  # field 24: resident pages
        except (OSError, ValueError, IndexError):  # the process ended in between
            continue
    return total


# -----------------------------------------------------------------------------
# loader


def bench_loader(c):
    """-> tokens per second of our loader and of nanoGPT's way, and the share of a step that waits for data."""
    values = train_settings(c)
    block_size = values["block_size"]
    batch_size = values["batch_size"]
    tokens = Tokens(find_dataset(values["dataset"]), "train")

    def tokens_per_s(batches):
        began = time.perf_counter()
        for _ in range(c.reads):
            next(batches)
        return c.reads * batch_size * block_size / (time.perf_counter() - began)

    speeds = {"minichat": [], "nanoGPT": []}
    for _ in range(c.rounds):
        loader = Loader(tokens, block_size, batch_size, prefetch=values["prefetch"],
                        threads=values["loader_threads"])
        speeds["minichat"].append(tokens_per_s(loader))
        loader.close()
        batches = nanogpt_batches(tokens.paths[0], block_size, batch_size)
        speeds["nanoGPT"].append(tokens_per_s(batches))
    medians = {name: statistics.median(rounds) for name, rounds in speeds.items()}

    folder = new_folder(Path(c.out_dir) / f"{Path(c.config).stem}_loader")
    overrides = [f"--{override}" for override in c.overrides]
    run_script("train.py", c.config, f"--out_dir={folder}", *overrides)
    records, _ = read_run(folder)
    waiting = sum(record["data_ms"] for record in records)
    waiting /= sum(record[part] for record in records for part in PARTS)

    print(f"{c.config}: batches of {batch_size} x {block_size}, "
          f"median of {c.rounds} rounds of {c.reads:,}")
    for name, speed in medians.items():
        print(f"{name:>10}: {speed / 1e6:8.2f} million tokens/s")
    steps = records[-1]["step"]
    print(f"a training step waits for data {waiting:.3%} of its time ({steps:,} steps)")
    return {"machine": machine(), "tokens_per_s": medians, "all": speeds, "waiting": waiting}


def nanogpt_batches(path, block_size, batch_size):
    """nanoGPT's batches: a new memmap for each, and a random crop for each row. Yields (x, y), int64 (B, T)."""
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r", offset=1024)  # after a shard's header
        x_rows = []
        y_rows = []
        for i in torch.randint(len(data) - block_size, (batch_size,)).tolist():
            x_rows.append(torch.from_numpy(data[i : i + block_size].astype(np.int64)))
            y_rows.append(torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)))
        yield torch.stack(x_rows), torch.stack(y_rows)
