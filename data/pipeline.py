"""
A corpus -> a dataset, in three passes over documents in the order of the corpus:

1. scan     clean each document; compute its hash, its MinHash signature, its tokens   (all cores; chunk by chunk)
2. resolve  decide which documents are duplicates of an earlier one                    (sorting on disk)
3. write    copy the tokens of the others into shards, each to the split that its hash names

The results of pass 1 lie in a folder `scan` beside the shards until the dataset is written, a file for each chunk,
which is complete or not there. So a process that was killed at any point resumes when the same command is given again,
and several (`part`) may share the first pass. The shards depend neither on that, nor on the number of workers or the
size of a chunk.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

import dedup
from common import DatasetWriter, manifest_hash, only_writer, print_dataset
from configurator import fail
from reading import hub_files, list_files
from scan import all_chunks, chunk_arrays, scan, statistics, write_result
from texts import pick_tokenizer

VERSION = 1  # of what the passes do; part of the manifest
# settings of a prepare.py that decide what comes out, and so must be the same when it resumes
DECIDE = (
    "text_key", "val_fraction", "min_chars", "max_chars", "dedup", "threshold", "permutations",
)


def prepare_corpus(c, default_folder):
    """The work of data/openwebtext/prepare.py and data/fineweb/prepare.py. `c`: their settings"""
    check_settings(c)
    folder = Path(c.out_dir) if c.out_dir else default_folder
    if c.tokenizer == "char":
        fail("tokenizer=char is for data/text/prepare.py: a large corpus takes gpt2, or a tokenizer "
             "that data/tok_train.py has made")
    if c.input:
        files = list_files(c.input)
        source = {"name": Path(c.input).resolve().name}
    else:
        files, source = hub_files(c.hub, c.hub_name, c.hub_revision, folder / "scan" / "plan.json")
    prepare(folder, files, source, pick_tokenizer(c.tokenizer), c)


def prepare(folder, files, source, tokenizer, c):
    """Make `folder` the dataset of `files` (InputFile), or this process's part of it. Prints what happens.

    `source` names the corpus in the manifest.
    """
    started = time.monotonic()
    work = folder / "scan"
    plan = plan_of(files, source, tokenizer, c)
    share, shares = part_of(c.part)
    if c.fresh:
        shutil.rmtree(work, ignore_errors=True)
    elif not work.exists() and is_there(folder, plan):
        digest = manifest_hash(folder)[:12]
        print(f"already there, unchanged: {folder} (dataset {digest}); --fresh makes it again")
        return
    workers = c.workers or cores()
    print_needs(folder, files, c, workers)
    open_work(work, plan, tokenizer)

    if not c.merge:
        lock = work / f"part_{share}_of_{shares}"
        lock.mkdir(exist_ok=True)
        with only_writer(lock):
            scan(work, files, c, share, shares, workers)
    if c.part:
        print(f"part {share} of {shares} is scanned; when all are: the same command with --merge "
              "instead of --part")
        return
    with only_writer(work):
        merge(folder, work, files, source, tokenizer, plan, c, started)


def merge(folder, work, files, source, tokenizer, plan, c, started):
    """Passes 2 and 3, when all of the corpus is scanned."""
    chunks = all_chunks(work, files)
    documents, digest = statistics(chunks, work, files)
    print(f"resolve: looking for duplicates among {documents['read']:,} documents ...", flush=True)
    fate = resolve(work, chunks, c)
    documents["dropped"]["exact_duplicate"] = int((fate == dedup.EXACT).sum())
    documents["dropped"]["near_duplicate"] = int((fate == dedup.NEAR).sum())
    documents["kept"] = int((fate == dedup.KEPT).sum())
    if not documents["kept"]:
        reasons = nothing_left(documents, c.text_key)
        fail(f"no document is left of {documents['read']:,} read: {reasons}")
    print(f"write: {documents['kept']:,} documents ...", flush=True)
    size = sum(file.size for file in files)
    source = source | {"files": len(files), "bytes": size, "sha256": digest}
    preprocessing = preprocessing_of(plan)
    changed = write(
        folder, chunks, fate, tokenizer, source, preprocessing, documents, c.val_fraction
    )
    (work / "plan.json").unlink()  # first: without it nobody resumes from the rest
    shutil.rmtree(work, ignore_errors=True)
    report(folder, documents, changed, time.monotonic() - started)


# -----------------------------------------------------------------------------
# Before the first pass


def check_settings(c):
    """End the script where settings are out of range or contradict each other."""
    if not 0 < c.val_fraction < 1:
        fail(f"val_fraction is a share between 0 and 1, not {c.val_fraction}")
    if c.dedup not in ("near", "exact", "none"):
        fail(f"dedup is near, exact or none, not {c.dedup!r}")
    if not 0 < c.threshold <= 1 or c.permutations < 16:
        fail("threshold is a similarity above 0 and up to 1, permutations at least 16")
    if not 0 <= c.min_chars <= c.max_chars or c.workers < 0:
        fail("min_chars and workers are at least 0, max_chars at least min_chars")
    if c.part and (c.merge or c.fresh):
        fail("--part scans its share: give --merge in a run of its own, and --fresh by removing "
             "the folder scan")
    part_of(c.part)


def part_of(text):
    """ "1/4" -> (1, 4), "" -> (0, 1)"""
    try:
        share, shares = map(int, (text or "0/1").split("/"))
    except ValueError:
        share, shares = -1, 0
    if not 0 <= share < shares:
        fail(f"--part={text}: part 0 of 4 is --part=0/4, the last is --part=3/4")
    return share, shares


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan_of(files, source, tokenizer, c):
    """All that the dataset depends on, as JSON can hold it."""
    plan = {
        "version": VERSION,
        "source": source,
        "files": [[file.name, file.size] for file in files],
        "tokenizer": tokenizer.sha256,
    }
    plan |= {key: c[key] for key in DECIDE}
    if c.dedup == "near":
        plan["rensa"] = version_of("rensa")
    return plan


def version_of(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        fail(f"dedup=near needs the package {package}: pip install -c constraints.txt '.[data]', or "
             "--dedup=exact")


def preprocessing_of(plan):
    elsewhere = ("source", "files", "tokenizer")  # which the manifest has in other places
    return {key: value for key, value in plan.items() if key not in elsewhere}


def is_there(folder, plan):
    """Whether `folder` is already, by its manifest, what `plan` would make."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        source = manifest["source"]
        sizes = [size for _, size in plan["files"]]
        return (
            manifest["preprocessing"] == preprocessing_of(plan)
            and plan["source"].items() <= source.items()
            and manifest["tokenizer"]["sha256"] == plan["tokenizer"]
            and (source["files"], source["bytes"]) == (len(sizes), sum(sizes))
            and not (folder / "INCOMPLETE").exists()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_work(work, plan, tokenizer):
    """Make the folder `scan`, or resume it if it has this very plan: results of another must not be mixed in."""
    path = work / "plan.json"
    if path.exists():
        earlier = json.loads(path.read_bytes())
        keys = sorted(earlier.keys() | plan.keys())
        differ = [key for key in keys if earlier.get(key) != plan.get(key)]
        if differ:
            values = ", ".join(f"{key}={earlier.get(key)}" for key in differ if key != "files")
            if values:
                values = f" ({values})"
            fail(f"{work} holds a scan with other {' and '.join(differ)}{values}: "
                 "resume with those, or start again with --fresh")
        return
    shutil.rmtree(work, ignore_errors=True)  # of a run that had finished
    work.mkdir(parents=True)
    tokenizer.save(work)
    with write_result(path) as file:
        file.write((json.dumps(plan) + "\n").encode())


def print_needs(folder, files, c, workers):
    """Print the disk and memory this will need before it starts: estimates from the sizes of the files."""
    # text packs to about a third
    size = sum(file.size if file.seekable else 3 * file.size for file in files)
    tokens = size / 4  # a token stands for about 4 bytes, and takes 2
    scanned = tokens * 2
    if c.dedup == "near":  # a document has about 4,000 bytes of text, and a signature
        scanned *= 1 + 2 * c.permutations * 4 / 4000
    place = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    free = shutil.disk_usage(place).free
    memory = 0.1 + workers * 0.15  # as bench.py data measures it
    if size:
        print(f"{len(files):,} files, about {size / 1e6:,.0f} MB of text, "
              f"{tokens / 1e6:,.0f} million tokens")
        print(f"disk: about {tokens * 2 / 1e9:.2f} GB for the shards and {scanned / 1e9:.2f} GB more "
              f"until they are written; {free / 1e9:.2f} GB are free")
    else:
        print(f"disk: {free / 1e9:.2f} GB are free; a token takes 2 bytes, and until the shards are "
              "written twice that and more")
    print(f"memory: about {memory:.1f} GB for {workers} workers, and a byte a document", flush=True)
    if size and free < tokens * 2 + scanned:
        print(f"warning: that may not fit on the disk of {place}", file=sys.stderr)


# -----------------------------------------------------------------------------
# Pass 2


def resolve(work, chunks, c):
    """What becomes of each document. -> uint8 (N,) of dedup.KEPT, EXACT, NEAR"""
    path = work / "fate.npy"
    if path.exists():
        return np.load(path)
    count = sum(len(hashes) for _, hashes in chunk_arrays(chunks, "hashes"))
    fate = np.zeros(count, dtype=np.uint8)
    if c.dedup != "none":
        dedup.drop_exact(chunk_arrays(chunks, "hashes"), fate, work)
    if c.dedup == "near":
        signatures = chunk_arrays(chunks, "signatures")
        dedup.drop_near(signatures, fate, work, c.permutations, c.threshold)
    with write_result(path) as file:
        np.save(file, fate)
    return fate


# -----------------------------------------------------------------------------
# Pass 3


def write(folder, chunks, fate, tokenizer, source, preprocessing, documents, val_fraction):
    """Write the shards of the documents that stay. -> whether anything changed"""
    totals = {"train": 0, "val": 0}
    kept_bytes = 0
    for start, hashes, sizes in chunk_arrays(chunks, "hashes", "sizes"):
        for split, chosen in splits_of(hashes, fate[start : start + len(hashes)], val_fraction):
            totals[split] += int(sizes[chosen, 0].sum())
            kept_bytes += int(sizes[chosen, 1].sum())
    with DatasetWriter(folder, tokenizer, totals) as writer:
        for start, hashes, sizes, tokens in chunk_arrays(chunks, "hashes", "sizes", "tokens"):
            for split, chosen in splits_of(hashes, fate[start : start + len(hashes)], val_fraction):
                writer.add(split, tokens[np.repeat(chosen, sizes[:, 0])])
        return writer.finish(source, preprocessing, documents | {"kept_bytes": kept_bytes})


def splits_of(hashes, fate, val_fraction):
    """The documents of each split: a hash in the lowest val_fraction is validation's. -> [(split, bool (n,)), ...]"""
    val = hashes[:, 0] < np.uint64(int(val_fraction * 2**64))
    return [("train", (fate == dedup.KEPT) & ~val), ("val", (fate == dedup.KEPT) & val)]


# -----------------------------------------------------------------------------
# What is printed at the end


def list_counts(counts):
    """The counts that are not 0, as in "1,200 too_short, 3 too_long"."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def nothing_left(documents, text_key):
    """Why no document is left."""
    reasons = [list_counts(documents["dropped"])]
    reasons += [f"{name}: {fault}" for name, fault in documents["damaged_files"].items()]
    text = ", ".join(filter(None, reasons)) or "the files are empty"
    if "no_text" in documents["dropped"]:
        text += f"; --text_key names another key than {text_key!r}"
    return text


def report(folder, documents, changed, seconds):
    """Print what was read, and what the dataset holds."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    dropped = list_counts(documents["dropped"]) or "none"
    changes = list_counts(documents["changes"]) or "none"
    print(f"{documents['read']:,} documents read, {documents['kept']:,} kept; "
          f"dropped: {dropped}; changed: {changes}")
    train, val = (manifest["splits"][split]["tokens"] for split in ("train", "val"))
    print(f"{train:,} tokens for training, {val:,} for validation, in {seconds:.0f} s")
    print_dataset(folder, changed)
