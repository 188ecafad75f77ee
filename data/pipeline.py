"""
A corpus -> a dataset, in three passes over documents in the order of the corpus:

1. scan     clean each document, take its hash, its MinHash signature and its tokens   (all cores; chunk by chunk)
2. resolve  decide which documents are duplicates of an earlier one                    (sorting on disk)
3. write    copy the tokens of the others into shards, each to the split that its hash names

What pass 1 finds lies in a folder `scan` beside the shards, a file for each chunk, complete or not there, until the
dataset is. So a process that was killed at any point goes on where it was when the same command is given again; several
(`part`) may share the first pass; and the shards depend neither on that, nor on the number of workers or the size of a
chunk.
"""

import json
import os
import shutil
import sys
import time

import numpy as np

import dedup
from common import DatasetWriter, manifest_hash, only_writer
from configurator import fail
from scan import all_chunks, each, replace, scan, statistics

VERSION = 1  # of what the passes do; part of the manifest
# settings of a prepare.py that decide what comes out, and so must be the same when it goes on
DECIDE = ("text_key", "val_fraction", "min_chars", "max_chars", "dedup", "threshold", "permutations")


def prepare(folder, files, source, tokenizer, settings):
    """Make `folder` the dataset of `files` (InputFile), or this process's part of it. Prints what happens.

    `source` names the corpus in the manifest; `settings` are a prepare.py's, checked by check_settings.
    """
    started, work = time.monotonic(), folder / "scan"
    decide = {key: settings[key] for key in DECIDE}
    listing = [[file.name, file.size] for file in files]
    plan = {"version": VERSION, "source": source, "files": listing, "tokenizer": tokenizer.sha256, **decide}
    if settings["dedup"] == "near":
        plan["rensa"] = version_of("rensa")
    share, shares = part_of(settings["part"])
    if settings["fresh"]:
        shutil.rmtree(work, ignore_errors=True)
    elif not work.exists() and is_there(folder, plan):
        print(f"already there, unchanged: {folder} (dataset {manifest_hash(folder)[:12]}); --fresh makes it anew")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = settings["workers"] or cores
    print_needs(folder, files, settings, workers)
    open_work(work, plan, tokenizer)

    if not settings["merge"]:
        lock = work / f"part_{share}_of_{shares}"
        lock.mkdir(exist_ok=True)
        with only_writer(lock):
            scan(work, files, settings, share, shares, workers)
    if settings["part"]:
        print(f"part {share} of {shares} is scanned; when all are: the same command with --merge in place of --part")
        return
    with only_writer(work):
        chunks = all_chunks(work, files)
        documents, digest = statistics(chunks, work, files)
        print(f"resolve: looking for duplicates among {documents['read']:,} documents ...", flush=True)
        fate = resolve(work, chunks, settings)
        documents["dropped"]["exact_duplicate"] = int((fate == dedup.EXACT).sum())
        documents["dropped"]["near_duplicate"] = int((fate == dedup.NEAR).sum())
        documents["kept"] = int((fate == dedup.KEPT).sum())
        if not documents["kept"]:
            fail(f"no document is left of {documents['read']:,} read: {nothing_left(documents, settings)}")
        print(f"write: {documents['kept']:,} documents ...", flush=True)
        source = source | {"files": len(files), "bytes": sum(file.size for file in files), "sha256": digest}
        changed = write(folder, chunks, fate, tokenizer, source, preprocessing_of(plan), documents, settings)
    (work / "plan.json").unlink()  # first: without it the rest is nothing to go on from
    shutil.rmtree(work, ignore_errors=True)
    report(folder, documents, changed, time.monotonic() - started)


def check_settings(settings):
    """End the script where a setting cannot be."""
    if not 0 < settings["val_fraction"] < 1:
        fail(f"val_fraction is a share between 0 and 1, not {settings['val_fraction']}")
    if settings["dedup"] not in ("near", "exact", "none"):
        fail(f"dedup is near, exact or none, not {settings['dedup']!r}")
    if not 0 < settings["threshold"] <= 1 or settings["permutations"] < 16:
        fail("threshold is a similarity above 0 and up to 1, permutations at least 16")
    if not 0 <= settings["min_chars"] <= settings["max_chars"] or settings["workers"] < 0:
        fail("min_chars and workers are at least 0, max_chars at least min_chars")
    if settings["part"] and (settings["merge"] or settings["fresh"]):
        fail("--part scans its share: give --merge in a run of its own, and --fresh by removing the folder scan")
    part_of(settings["part"])


def part_of(text):
    """ "1/4" -> (1, 4), "" -> (0, 1)"""
    try:
        share, shares = map(int, (text or "0/1").split("/"))
    except ValueError:
        share, shares = -1, 0
    if not 0 <= share < shares:
        fail(f"--part={text}: part 0 of 4 is --part=0/4, the last is --part=3/4")
    return share, shares


def version_of(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        fail(f"dedup=near needs the package {package}: pip install -c constraints.txt '.[data]', or --dedup=exact")


def preprocessing_of(plan):
    return {key: value for key, value in plan.items() if key not in ("source", "files", "tokenizer")}


def is_there(folder, plan):
    """Whether `folder` is already, by its manifest, what `plan` would make."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        source, sizes = manifest["source"], [size for _, size in plan["files"]]
        same = manifest["preprocessing"] == preprocessing_of(plan) and plan["source"].items() <= source.items()
        return same and manifest["tokenizer"]["sha256"] == plan["tokenizer"] and (
            (source["files"], source["bytes"]) == (len(sizes), sum(sizes)) and not (folder / "INCOMPLETE").exists()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_work(work, plan, tokenizer):
    """The folder `scan`, new or of this very plan: else what another run has found would be mixed in."""
    path = work / "plan.json"
    if path.exists():
        held = json.loads(path.read_bytes())
        if differ := sorted(key for key in held.keys() | plan.keys() if held.get(key) != plan.get(key)):
            was = ", ".join(f"{key}={held.get(key)}" for key in differ if key != "files")
            fail(f"{work} holds a scan with other {' and '.join(differ)}{f' ({was})' if was else ''}: "
                 "go on with those, or start anew with --fresh")
        return
    shutil.rmtree(work, ignore_errors=True)  # of a run that had finished
    work.mkdir(parents=True)
    tokenizer.save(work)
    replace(path, lambda file: file.write((json.dumps(plan) + "\n").encode()))


def print_needs(folder, files, settings, workers):
    """What this will take, before it is taken: estimates from the sizes of the files."""
    size = sum(file.size * (1 if file.seekable else 3) for file in files)  # text packs to about a third
    near = settings["permutations"] * 4 / 4000 if settings["dedup"] == "near" else 0  # a document has about 4,000 bytes
    tokens, scanned = size / 4, size / 2 * (1 + 2 * near)  # a token stands for about 4 bytes, and takes 2
    place = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    free = shutil.disk_usage(place).free
    memory = 0.1 + workers * 0.15  # as bench.py data finds it
    if size:
        print(f"{len(files):,} files, about {size / 1e6:,.0f} MB of text, {tokens / 1e6:,.0f} million tokens")
        print(f"disk: about {tokens * 2 / 1e9:.2f} GB for the shards and {scanned / 1e9:.2f} GB more until they are "
              f"written; free are {free / 1e9:.2f} GB")
    else:
        print(f"disk: free are {free / 1e9:.2f} GB; a token takes 2 bytes, and until the shards are written twice that "
              "and more")
    print(f"memory: about {memory:.1f} GB for {workers} workers, and a byte a document", flush=True)
    if size and free < tokens * 2 + scanned:
        print(f"warning: that may not fit on the disk of {place}", file=sys.stderr)


# -----------------------------------------------------------------------------
# Pass 2


def resolve(work, chunks, settings):
    """What becomes of each document. -> uint8 (N,) of dedup.KEPT, EXACT, NEAR"""
    path = work / "fate.npy"
    if path.exists():
        return np.load(path)
    fate = np.zeros(sum(len(hashes) for _, hashes in each(chunks, "hashes")), dtype=np.uint8)
    if settings["dedup"] != "none":
        dedup.drop_exact(each(chunks, "hashes"), fate, work)
    if settings["dedup"] == "near":
        parts = each(chunks, "signatures")
        dedup.drop_near(parts, fate, work, settings["permutations"], settings["threshold"])
    replace(path, lambda file: np.save(file, fate))
    return fate


# -----------------------------------------------------------------------------
# Pass 3


def write(folder, chunks, fate, tokenizer, source, preprocessing, documents, settings):
    """The shards of the documents that stay. -> whether anything changed"""
    totals, kept_bytes = {"train": 0, "val": 0}, 0
    for start, hashes, sizes in each(chunks, "hashes", "sizes"):
        for split, chosen in chosen_for(hashes, fate[start : start + len(hashes)], settings["val_fraction"]):
            totals[split] += int(sizes[chosen, 0].sum())
            kept_bytes += int(sizes[chosen, 1].sum())
    with DatasetWriter(folder, tokenizer, totals) as writer:
        for start, hashes, sizes, tokens in each(chunks, "hashes", "sizes", "tokens"):
            for split, chosen in chosen_for(hashes, fate[start : start + len(hashes)], settings["val_fraction"]):
                writer.add(split, tokens[np.repeat(chosen, sizes[:, 0])])
        return writer.finish(source, preprocessing, documents | {"kept_bytes": kept_bytes})


def chosen_for(hashes, fate, val_fraction):
    """The documents of each split, validation's by a hash in the lowest val_fraction. -> [(split, bool (n,)), ...]"""
    val = hashes[:, 0] < np.uint64(int(val_fraction * 2**64))
    return [("train", (fate == dedup.KEPT) & ~val), ("val", (fate == dedup.KEPT) & val)]


def nothing_left(documents, settings):
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in documents["dropped"].items() if count)
    if documents["damaged_files"]:
        reasons = ", ".join([reasons] * bool(reasons) + [f"{k}: {v}" for k, v in documents["damaged_files"].items()])
    mend = f"; --text_key names another key than {settings['text_key']!r}" * ("no_text" in documents["dropped"])
    return (reasons or "the files are empty") + mend


def report(folder, documents, changed, seconds):
    """What there is now."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    counts = [f"{count:,} {name}" for name, count in documents["dropped"].items() if count]
    changes = [f"{count:,} {name}" for name, count in documents["changes"].items() if count]
    print(f"{documents['read']:,} documents read, {documents['kept']:,} kept; dropped: {', '.join(counts) or 'none'}; "
          f"changed: {', '.join(changes) or 'none'}")
    train, val = (manifest["splits"][split]["tokens"] for split in ("train", "val"))
    print(f"{train:,} tokens for training, {val:,} for validation, in {seconds:.0f} s")
    state = "written to" if changed else "already there, unchanged:"
    print(f"{state} {folder} (dataset {manifest_hash(folder)[:12]})")
