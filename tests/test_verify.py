"""A changed dataset is noticed, and the change is named."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from data.common import shard_header, write_dataset
from tokenizer import CharTokenizer


@pytest.fixture
def verify(tiny_dataset, tmp_path, run_script):
    """verify(change) runs data/verify.py on a dataset after change(folder). -> CompletedProcess"""
    folder = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, folder)

    def verify(change=lambda folder: None):
        change(folder)
        return run_script("data/verify.py", folder)

    return verify


def edit(folder, change):
    """Change the manifest by `change(manifest)`."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip(folder):
    path = folder / "val_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


def too_high(folder):
    """Write a token above the vocabulary, and a manifest that has the digest of that shard."""
    path = folder / "val_000000.bin"
    ids = np.frombuffer(path.read_bytes()[1024:], dtype="<u2").copy()
    ids[3] = 60_000
    path.write_bytes(shard_header(len(ids)) + ids.tobytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda manifest: manifest["splits"]["val"]["shards"][0].update(sha256=digest))


def other_header(folder):
    path = folder / "val_000000.bin"
    path.write_bytes(b"\0" * 1024 + path.read_bytes()[1024:])


CHANGES = {
    "flipped bit": (flip, "val_000000.bin was changed after it was written"),
    "truncated": (lambda f: os.truncate(f / "train_000000.bin", 2000), "train_000000.bin has 2,000 bytes, not the"),
    "missing": (lambda f: (f / "train_000000.bin").unlink(), "train_000000.bin is missing"),
    "header": (other_header, "val_000000.bin is not a token shard"),
    "token range": (too_high, "val_000000.bin holds token 60000"),
    "one more shard": (lambda f: shutil.copy(f / "val_000000.bin", f / "val_000001.bin"), "val_000001.bin is in no"),
    "another tokenizer": (lambda f: CharTokenizer("abc").save(f), "tokenizer.json is another tokenizer"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "half-written": (lambda f: (f / "INCOMPLETE").touch(), "was left half-written"),
    "token count": (lambda f: edit(f, lambda m: m["splits"]["val"].update(tokens=7)), "tokens together, not 7"),
    "documents": (lambda f: edit(f, lambda m: m["documents"].update(kept=3)), "0 ends of documents, the"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "damaged manifest": (lambda f: (f / "manifest.json").write_text("{}"), "is not a manifest"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_named(change, verify):
    done = verify()
    assert done.returncode == 0 and "as its manifest says" in done.stdout, done.stderr
    spoil, named = CHANGES[change]
    done = verify(spoil)
    assert done.returncode == 2 and named in done.stderr and done.stdout == ""
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


def test_documents_are_counted(run_script, tmp_path):
    tokenizer = CharTokenizer("ab")
    ids = np.uint16([tokenizer.bos, 0, 1, tokenizer.eos, tokenizer.bos, 1, 0, tokenizer.eos])
    for kept, code in ((2, 0), (3, 2)):
        write_dataset(tmp_path, {"train": ids[:5], "val": ids[5:]}, tokenizer, {}, {}, {"kept": kept})
        done = run_script("data/verify.py", tmp_path)
        assert done.returncode == code and (not code or "2 ends of documents" in done.stderr)


def test_which_dataset(run_script):
    done = run_script("data/verify.py")
    assert done.returncode == 2 and "which dataset" in done.stderr
