"""The order of the data, batches, and what is refused as a dataset."""

import gc
import itertools
import json
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset as dataset_module
from data.common import shard_header, write_dataset
from dataset import (
    DataError,
    Tokens,
    find_dataset,
    open_datasets,
    open_tokens,
    parse_mix,
    read_manifest,
    verify_shards,
)
from loader import Batch, Loader, MixedOrder, Order, fixed_batches, join_batches, keyed, permute
from tokenizer import CharTokenizer
from training.start import vocabulary

ROOT = Path(__file__).resolve().parents[1]


def write_shards(folder, split, ids, cuts=()):
    """`ids` as shards, cut before each position of `cuts`."""
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(np.split(np.asarray(ids, dtype="<u2"), cuts)):
        (folder / f"{split}_{i:06d}.bin").write_bytes(shard_header(len(part)) + part.tobytes())
    return folder


@pytest.fixture
def counting(tmp_path):
    """1,000 tokens, each its own position: a window is known by what it holds."""
    return Tokens(write_shards(tmp_path / "counting", "train", np.arange(1000)), "train")


def refused(call, *names):
    """`call` raises DataError, in one line that has each of `names`."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert str(name) in message


# -----------------------------------------------------------------------------
# The permutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 100, 4096, 4097, 15625])
@pytest.mark.parametrize("key", ["a", "1337/0/order"])
def test_permute_is_a_permutation(n, key):
    there = permute(np.arange(n), n, key)
    assert there.dtype == np.int64
    assert np.array_equal(np.sort(there), np.arange(n))


@given(st.integers(1, 3000), st.text(max_size=5))
@settings(max_examples=100, deadline=None)
def test_permute_is_a_permutation_of_any_length(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_never_changes():
    """A run that is resumed under another version, or on another machine, must see the rest of the same epoch."""
    assert keyed(1337, 0, "offset") == 10162866142961747282
    assert permute(np.arange(10), 10, "golden").tolist() == [2, 3, 0, 1, 4, 8, 6, 7, 5, 9]
    assert permute(np.array([0, 1, 2, 999_999]), 1_000_000, "golden").tolist() == [621965, 317437, 753247, 607807]
    assert permute(np.array([0, 1, 10**10 - 1]), 10**10, "golden").tolist() == [8442922008, 1228361739, 787746392]
    assert Order(1000, 8, 1337).starts(np.array([0, 1, 123, 124, 10**9])).tolist() == [418, 410, 706, 771, 977]


def test_permute_depends_on_the_key():
    orders = {tuple(permute(np.arange(50), 50, key).tolist()) for key in range(20)}
    assert len(orders) == 20


def test_permute_moves_things_about():
    """Of a random permutation: about one fixed point, and neighbours land a third of the range apart on average."""
    n = 4097
    there = permute(np.arange(n), n, "about")
    assert (there == np.arange(n)).sum() <= 8
    assert 0.30 < np.abs(np.diff(there)).mean() / n < 0.36
    assert abs(np.corrcoef(np.arange(n), there)[0, 1]) < 0.08


def test_permute_of_ten_billion_needs_no_table():
    n = 10**10
    index = np.array([0, 1, 2, n // 2, n - 2, n - 1])
    there = permute(index, n, "large")
    assert len(set(there.tolist())) == len(index) and there.min() >= 0 and there.max() < n
    assert [int(permute(i, n, "large")[0]) for i in index] == there.tolist()


# -----------------------------------------------------------------------------
# The order


@given(st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_windows_of_an_epoch(block_size, extra, seed):
    """In every epoch each window once, none overlaps another, and each has its targets inside the stream."""
    n_tokens = block_size + extra
    order = Order(n_tokens, block_size, seed)
    for epoch in range(3):
        starts = np.sort(order.starts(np.arange(epoch * order.windows, (epoch + 1) * order.windows)))
        assert 0 <= starts[0] < block_size
        assert np.array_equal(starts, starts[0] + block_size * np.arange(order.windows))
        assert starts[-1] + block_size + 1 <= n_tokens
    assert order.windows >= max(1, n_tokens // block_size - 1)  # at most a window's worth is left out


def test_windows_leave_nothing_out_at_the_edges():
    block_size = 8
    for n_tokens in range(9, 60):
        order = Order(n_tokens, block_size, 0)
        last = (order.windows - 1) * block_size + order.offsets - 1 + block_size + 1  # of the furthest offset
        assert last <= n_tokens
        assert order.offsets == block_size or last == n_tokens  # every offset that fits is in use


def test_offsets_vary_by_epoch():
    order = Order(10_000, 32, 1)
    offsets = {int(order.starts(np.arange(e * order.windows, (e + 1) * order.windows)).min()) for e in range(200)}
    assert offsets <= set(range(32)) and len(offsets) > 24  # 200 draws of 32 leave out more than 7 once in 10^9


def test_epochs_have_different_orders_and_seeds_too():
    def epoch(e, seed):
        order = Order(1000, 10, seed)
        starts = order.starts(np.arange(e * order.windows, (e + 1) * order.windows))
        return tuple(((starts - starts.min()) // 10).tolist())

    assert len({epoch(e, seed) for e in range(5) for seed in range(5)}) == 25


def test_any_position_equals_iterating():
    order = Order(500, 7, 3)
    all_of_them = order.starts(np.arange(400))  # several epochs in one call
    assert order.windows < 200
    for position in range(400):
        assert order.starts(np.array([position]))[0] == all_of_them[position]
    assert order.starts([]).tolist() == []


def test_too_few_tokens():
    refused(lambda: Order(8, 8, 0), "8 tokens", "block_size=8", "block_size + 1")
    assert Order(9, 8, 0).starts(np.arange(20)).tolist() == [0] * 20


# -----------------------------------------------------------------------------
# Batches


def rows(batch):
    return torch.cat((batch[0][:, :1], batch[1]), dim=1).tolist()


def test_a_batch_is_windows_and_the_tokens_after(counting):
    loader = Loader(counting, 16, 5, seed=1)
    x, y, *_ = loader.batch(3)
    loader.close()
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (5, 16) and x.is_contiguous()
    assert torch.equal(x + 1, y) and torch.equal(x[:, 1:], y[:, :-1])
    assert x[:, 0].tolist() == Order(1000, 16, 1).starts(np.arange(15, 20)).tolist()


@pytest.mark.parametrize("first_step", [0, 1, 5, 77, 10**7])
@pytest.mark.parametrize("accumulation, prefetch", [(1, 1), (3, 4)])
def test_the_iterator_is_batch_of_step_and_micro(counting, first_step, accumulation, prefetch):
    loader = Loader(counting, 16, 3, accumulation=accumulation, seed=2, first_step=first_step, prefetch=prefetch)
    for i, (x, y, *_) in zip(range(8), loader, strict=False):
        expected = loader.batch(first_step + i // accumulation, i % accumulation)
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    loader.close()


def test_a_batch_is_moved_cut_and_joined_whole():
    """Documents travel with their tokens, and one divisor stands for all micro-batches of an update."""
    x, docs, divisor = torch.arange(16).view(2, 8), torch.arange(16).view(2, 8) // 3, torch.tensor(2.5)
    batch = Batch(x, x + 1, docs, divisor)
    cut = batch.to("cpu").cut(4)
    assert torch.equal(cut.x, x.view(4, 4)) and torch.equal(cut.y, cut.x + 1) and torch.equal(cut.docs, cut.x // 3)
    joined = join_batches([batch, batch])
    assert torch.equal(joined.x[2:], x) and torch.equal(joined.y[:2], x + 1) and torch.equal(joined.docs[2:], docs)
    assert cut.divisor == joined.divisor == 2.5
    plain = join_batches([Batch(x, x).to("meta").cut(2)] * 3)
    assert plain.x.shape == (24, 2) and plain.x.is_meta and plain.docs is None and plain.divisor is None


def test_each_epoch_is_whole_after_a_resume(counting):
    """Resumed in the middle of epoch 0, epoch 1 has all windows, not those after the place of the resume only."""
    windows = Order(1000, 10, 5).windows
    loader = Loader(counting, 10, 3, seed=5, first_step=17)
    starts = [int(start) for _, (x, *_) in zip(range(windows), loader, strict=False) for start in x[:, 0]]
    loader.close()
    rest = windows - 17 * 3
    second = sorted(starts[rest : rest + windows])
    assert np.array_equal(second, second[0] + 10 * np.arange(windows))


@pytest.mark.parametrize("world, accumulation", [(2, 4), (4, 2), (8, 1), (2, 1), (1, 1)])
def test_ranks_share_one_order(counting, world, accumulation):
    """The tokens of a step, in order, are those of one process with the same global batch."""
    alone = Loader(counting, 10, 2, accumulation=world * accumulation, seed=4)
    ranks = [Loader(counting, 10, 2, accumulation=accumulation, seed=4, rank=r, world=world) for r in range(world)]
    for step in (0, 1, 9, 1000):
        shared = [row for m in range(accumulation) for loader in ranks for row in rows(loader.batch(step, m))]
        assert shared == [row for m in range(world * accumulation) for row in rows(alone.batch(step, m))]
    for each in (alone, *ranks):
        each.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_skipped_data_steps_are_left_out_and_all_else_is_as_it_was(counting, rank):
    """Whole updates, with all their micro-batches on all ranks; wherever it begins."""
    share = dict(accumulation=2, seed=4, rank=rank, world=2)
    whole, left = Loader(counting, 10, 2, **share), [k for k in range(40) if k not in (0, 3, 4, 11)]
    for first_step in (0, 2, 9):
        skipping = Loader(counting, 10, 2, **share, first_step=first_step, skipped=[0, 3, 4, 11])
        for step in range(first_step, 20):
            for micro in range(2):
                assert rows(next(skipping)) == rows(whole.batch(left[step], micro)) == rows(skipping.batch(step, micro))
        skipping.close()
    whole.close()


def test_the_threads_end_on_close(counting):
    before = set(threading.enumerate())
    loader = Loader(counting, 16, 2)
    next(loader)
    assert {t.name.split('_')[0] for t in set(threading.enumerate()) - before} == {"loader"}
    loader.close()
    loader.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("error", [DataError("damaged"), OSError("gone")])
def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(counting, monkeypatch, error):
    read, calls = counting.read, itertools.count()

    def fails_at_the_third(starts, length):
        if next(calls) >= 2:
            raise error
        return read(starts, length)

    monkeypatch.setattr(counting, "read", fails_at_the_third)
    loader = Loader(counting, 16, 300)  # more rows than are read together
    next(loader), next(loader)
    for _ in range(2):  # who asks again does not wait for ever
        with pytest.raises(type(error), match=str(error)):
            next(loader)
    loader.close()


# -----------------------------------------------------------------------------
# Shards


@given(st.lists(st.integers(0, 200), max_size=6), st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_several_shards_are_one_stream(tmp_path_factory, cuts, length, data):
    ids = np.arange(200) * 7 % 256
    folder = write_shards(tmp_path_factory.mktemp("shards"), "train", ids, sorted(cuts))  # empty shards too
    tokens = Tokens(folder, "train")
    starts = data.draw(st.lists(st.integers(0, 200 - length), max_size=8))
    assert len(tokens) == 200
    got = tokens.read(np.array(starts, dtype=np.int64), length)
    assert got.shape == (len(starts), length) and got.dtype == np.uint16
    assert np.array_equal(got, np.array([ids[s : s + length] for s in starts]).reshape(len(starts), length))


def test_batches_do_not_depend_on_the_shards(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50, 997)
    one = Tokens(write_shards(tmp_path / "one", "train", ids), "train")
    many = Tokens(write_shards(tmp_path / "many", "train", ids, [1, 2, 130, 131, 500, 990]), "train")
    loaders = [Loader(tokens, 33, 4, seed=8) for tokens in (one, many)]
    for step in range(20):
        assert rows(loaders[0].batch(step)) == rows(loaders[1].batch(step))
    for ours, theirs in zip(fixed_batches(one, 33, 4), fixed_batches(many, 33, 4), strict=True):
        assert rows(ours) == rows(theirs)
    for each in loaders:
        each.close()


def test_more_than_ten_shards_are_read_in_order(tmp_path):
    ids = np.arange(60)
    tokens = Tokens(write_shards(tmp_path / "d", "train", ids, range(5, 60, 5)), "train")
    assert tokens.read([0], 60)[0].tolist() == ids.tolist()


def test_nanogpts_headerless_file(tmp_path):
    ids = np.arange(500, dtype="<u2")
    ids.tofile(tmp_path / "train.bin")
    ids[:50].tofile(tmp_path / "val.bin")
    tokens = Tokens(find_dataset(tmp_path), "train")
    assert len(tokens) == 500 and tokens.read([13], 5)[0].tolist() == [13, 14, 15, 16, 17]
    assert len(Tokens(tmp_path, "val")) == 50
    (tmp_path / "train.bin").write_bytes(b"\0" * 999)
    refused(lambda: Tokens(tmp_path, "train"), tmp_path / "train.bin", "999 bytes", "again")


def test_a_split_that_is_missing(tmp_path):
    write_shards(tmp_path / "d", "train", range(50))
    refused(lambda: Tokens(tmp_path / "d", "val"), tmp_path / "d", "no val split", "prepare")


@pytest.mark.parametrize("length", [0, 3, 4, 1023])
def test_a_file_shorter_than_a_header(tmp_path, length):
    path = write_shards(tmp_path / "d", "train", range(50)) / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:length])
    refused(lambda: Tokens(tmp_path / "d", "train"), path, "again")


@pytest.mark.parametrize("change", [-100, -2, -1, 1, 2])
def test_size_against_header(tmp_path, change):
    path = write_shards(tmp_path / "d", "train", range(50), [25]) / "train_000001.bin"
    raw = path.read_bytes() + b"\0\0"
    path.write_bytes(raw[: 1024 + 50 + change])
    refused(lambda: Tokens(tmp_path / "d", "train"), path, "1,074", "prepare the dataset again")


@pytest.mark.parametrize("field, value", [(0, 20240801), (0, 0), (1, 2)])
def test_a_foreign_header(tmp_path, field, value):
    path = write_shards(tmp_path / "d", "train", range(50)) / "train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[4 * field : 4 * field + 4] = np.array(value, dtype="<i4").tobytes()
    path.write_bytes(raw)
    refused(lambda: Tokens(tmp_path / "d", "train"), path, str(value), "20240520", "prepare the dataset again")


@pytest.fixture
def dataset(tiny_dataset, tmp_path):
    """A copy of the dataset that prepare.py would write, to be damaged."""
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))


def test_manifest_agrees(dataset):
    manifest, digest = read_manifest(dataset)
    assert len(Tokens(dataset, "train")) == manifest["splits"]["train"]["tokens"] == 3000
    (dataset / "manifest.json").write_bytes((dataset / "manifest.json").read_bytes() + b" ")
    assert read_manifest(dataset)[1] != digest
    (dataset / "manifest.json").unlink()
    assert read_manifest(dataset) == ({}, None)
    assert len(Tokens(dataset, "train")) == 3000


def test_a_shard_of_another_length_than_the_manifest_says(dataset):
    write_shards(dataset, "train", range(40))
    refused(lambda: Tokens(dataset, "train"), dataset / "train_000000.bin", "40", "3000", "prepare the dataset again")


def test_a_shard_the_manifest_does_not_have(dataset):
    shutil.copy(dataset / "train_000000.bin", dataset / "train_000001.bin")
    refused(lambda: Tokens(dataset, "train"), dataset / "train_000001.bin", "none", "prepare the dataset again")


def test_a_shard_that_is_gone(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"].append({"file": "train_000001.bin", "tokens": 77})
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    refused(lambda: Tokens(dataset, "train"), dataset / "train_000001.bin", "77", "prepare the dataset again")


def test_a_split_the_manifest_does_not_have(dataset):
    write_shards(dataset, "test", range(40))
    refused(lambda: Tokens(dataset, "test"), dataset / "test_000000.bin", "none")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_a_manifest_that_is_none(dataset, text):
    (dataset / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(lambda: Tokens(dataset, "train"), dataset / "manifest.json", "prepare the dataset again")


def test_a_token_above_the_vocabulary(tmp_path):
    folder = write_shards(tmp_path / "d", "train", [0, 1, 2, 99, 3, 4, 5, 6, 7])
    assert Tokens(folder, "train", 99).read([4], 5).max() == 7
    refused(lambda: Tokens(folder, "train", 99).read([0], 5), folder, "token 99", "vocab_size")
    assert Tokens(folder, "train", 100).read([0], 5).max() == 99
    loader = Loader(Tokens(folder, "train", 99), 8, 1)
    refused(lambda: next(loader), "token 99")
    loader.close()


def test_datasets_are_found_by_path_and_by_name(tiny_dataset, tmp_path, monkeypatch):
    assert find_dataset(str(tiny_dataset)) == tiny_dataset
    root = tmp_path / "root"
    shutil.copytree(tiny_dataset, root / "data" / "tiny")
    (root / "data" / "other").mkdir()
    (root / "data" / "other" / "prepare.py").touch()
    monkeypatch.setattr(dataset_module, "__file__", str(root / "dataset.py"))
    monkeypatch.chdir(tmp_path)
    assert find_dataset("tiny") == root / "data" / "tiny"
    refused(lambda: find_dataset("other"), "'other' is not prepared", root / "data" / "other" / "prepare.py")
    refused(lambda: find_dataset(root / "data" / "other"), "not prepared", root / "data" / "other" / "prepare.py")
    refused(lambda: find_dataset("missing"), "'missing'", "other")
    refused(lambda: find_dataset(tmp_path), tmp_path, "other")


def test_a_dataset_that_was_left_half_written(dataset):
    (dataset / "INCOMPLETE").touch()
    refused(lambda: find_dataset(str(dataset)), dataset, "half-written", "prepare.py again")
    for path in dataset.glob("*.bin"):
        path.unlink()
    refused(lambda: find_dataset(str(dataset)), dataset, "half-written", "prepare.py again")


# -----------------------------------------------------------------------------
# Windows for evaluation


@pytest.mark.parametrize("n_tokens", [2, 3, 15, 16, 17, 18, 32, 33, 34, 100, 161])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_every_target_once_with_the_tail(tmp_path, n_tokens, batch_size):
    tokens = Tokens(write_shards(tmp_path / "d", "val", np.arange(n_tokens)), "val")
    batches = list(fixed_batches(tokens, 16, batch_size))
    x = torch.cat([batch.x for batch in batches])
    y = torch.cat([batch.y for batch in batches])
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (-(-(n_tokens - 1) // 16), 16)
    assert all(len(batch[0]) == batch_size for batch in batches[:-1]) and len(batches[-1][0]) <= batch_size
    assert y[y != -1].tolist() == list(range(1, n_tokens))
    assert y.flatten()[n_tokens - 1 :].tolist() == [-1] * (y.numel() - n_tokens + 1)  # the end, and only the end
    assert torch.equal(x[y != -1] + 1, y[y != -1])


@pytest.mark.parametrize("limit", [1, 2, 6, 7, 50])
def test_limit_takes_the_first_batches(tmp_path, limit):
    tokens = Tokens(write_shards(tmp_path / "d", "val", np.arange(301)), "val")
    every, some = list(fixed_batches(tokens, 16, 3)), list(fixed_batches(tokens, 16, 3, limit))
    assert len(every) == 7 and len(some) == min(limit, 7)
    assert [rows(batch) for batch in some] == [rows(batch) for batch in every[:limit]]


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_a_split_without_a_target(tmp_path, n_tokens):
    tokens = Tokens(write_shards(tmp_path / "d", "val", np.arange(n_tokens)), "val")
    refused(lambda: list(fixed_batches(tokens, 16, 4)), tmp_path / "d", "val", f"{n_tokens} tokens")


# -----------------------------------------------------------------------------
# Memory

MEMORY = """
import os, sys
import numpy as np
from dataset import Tokens
from loader import Loader, Order

def megabytes():  # resident, as the system sees it
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

tokens = Tokens(sys.argv[1], "train")
loader = Loader(tokens, 64, 4)
for _ in range(50):
    next(loader)
before, most = megabytes(), 0
for i in range(10_000):
    next(loader)
    if i % 100 == 0:
        most = max(most, megabytes())
loader.close()
held = np.memmap(tokens.paths[0], dtype="<u2", mode="r", offset=1024)  # what nanoGPT once did, as a control
total = sum(int(held[start : start + 65].sum()) for start in Order(len(tokens), 64, 0).starts(np.arange(20_000)))
print(most - before, megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_ten_thousand_batches(tmp_path):
    count = 100_000_000
    with open(tmp_path / "train_000000.bin", "wb") as file:
        file.write(shard_header(count))
        file.truncate(1024 + 2 * count)  # 200 MB of zeros that need no room
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    growth, control = map(float, done.stdout.split())
    assert growth < 50
    assert control > 100  # the file is large enough for the fault to show


# -----------------------------------------------------------------------------
# A mix of datasets


@pytest.fixture
def mixed(tmp_path):
    """Three datasets, told apart by their tokens: 0 to 999, 2000 to 2499, 4000 to 4299; weights 7 : 2 : 1."""
    sizes = (("a", 0, 1000, "0.7"), ("b", 2000, 500, "0.2"), ("c", 4000, 300, "0.1"))
    for name, first, n, _ in sizes:
        write_shards(tmp_path / name, "train", np.arange(first, first + n), cuts=(n // 3,))
    found, _, _ = open_datasets(",".join(f"{tmp_path / name}:{weight}" for name, _, _, weight in sizes))
    return open_tokens(found, "train", 65536)


@pytest.mark.parametrize("text", ["owt", "data/a,b", "C:\\data", "a:b", "x:1e3"])
def test_what_names_one_dataset_is_no_mix(text):
    assert parse_mix(text) == [(text, 1)]


def test_weights_are_shares():
    assert [(name, float(weight)) for name, weight in parse_mix("a:3, b:1.0")] == [("a", 0.75), ("b", 0.25)]
    assert parse_mix("a:.2") == [("a", 1)]
    for wrong in ("a:0.5,b", "a:0,b:1", "a:1,a:2"):
        refused(lambda wrong=wrong: parse_mix(wrong), wrong)


def test_a_mix_is_drawn_from_by_its_weights_at_any_point(mixed):
    order = MixedOrder(mixed, 16, seed=1)
    for first, n in ((0, 1000), (123, 77), (10**11, 500)):
        which = mixed.read(order.starts(np.arange(first, first + n)), 17)[:, 0] // 2000
        for i, weight in enumerate((0.7, 0.2, 0.1)):
            assert abs((which == i).sum() - n * weight) <= 2, "evenly, not by chance"


def test_each_dataset_of_a_mix_keeps_its_own_order(mixed):
    """Each window once an epoch of its own, whatever the others do; and a position is found without those before it."""
    order = MixedOrder(mixed, 16, seed=1)
    rows = mixed.read(order.starts(np.arange(2000)), 17)
    assert (np.diff(rows.astype(int), axis=1) == 1).all(), "no window spans two datasets"
    for i, (tokens, _) in enumerate(mixed.parts):
        alone = Order(len(tokens), 16, f"1/{i}")
        here = rows[rows[:, 0] // 2000 == i]
        assert np.array_equal(here, tokens.read(alone.starts(np.arange(len(here))), 17))
    shuffled = np.random.default_rng(0).permutation(2000)
    assert np.array_equal(order.starts(shuffled), order.starts(np.arange(2000))[shuffled])


def test_a_loader_of_a_mix_resumes_and_shares_out_as_any(mixed):
    whole = Loader(mixed, 16, 4, seed=3, accumulation=2)
    batches = [next(whole)[0] for _ in range(8)]
    later = Loader(mixed, 16, 4, seed=3, accumulation=2, first_step=2)
    assert all(torch.equal(next(later)[0], batch) for batch in batches[4:])
    for each in (whole, later):
        each.close()


def test_a_mix_of_different_tokenizers_or_too_few_tokens_is_refused(mixed, tmp_path):
    for name, text in (("x", "abc" * 50), ("y", "abd" * 50)):
        tokenizer = CharTokenizer.from_text(text)
        ids = tokenizer.encode_array(text)
        write_dataset(tmp_path / name, {"train": ids, "val": ids}, tokenizer, {}, {}, {"read": 1, "kept": 1})
    refused(lambda: open_datasets(f"{tmp_path / 'x'}:1,{tmp_path / 'y'}:1"), tmp_path / "y", "another tokenizer")
    refused(lambda: MixedOrder(mixed, 400, 0), tmp_path / "c", "300 tokens")


def test_the_data_has_one_name_that_its_weights_are_part_of(tiny_dataset, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_dataset, other)
    names = {open_datasets(text)[2] for text in (
        str(tiny_dataset), f"{tiny_dataset}:1,{other}:1", f"{tiny_dataset}:2,{other}:1", f"{other}:2,{tiny_dataset}:1")}
    assert len(names) == 3, "the last two have the same content"
    assert open_datasets(f"{tiny_dataset}:5")[2] == read_manifest(tiny_dataset)[1]


# -----------------------------------------------------------------------------
# Threads, and what was written


@pytest.mark.parametrize("threads, prefetch", [(1, 1), (4, 2), (3, 16)])
def test_threads_and_depth_change_nothing(counting, threads, prefetch):
    loader = Loader(counting, 16, 3, accumulation=2, seed=2, threads=threads, prefetch=prefetch)
    found = [next(loader) for _ in range(100)]
    assert all(torch.equal(x, loader.batch(i // 2, i % 2)[0]) for i, (x, *_) in enumerate(found))
    assert len(loader.ahead) == 1, "85 batches of three rows are read together"
    loader.close()
    deep = Loader(counting, 16, 200, threads=threads, prefetch=prefetch)
    assert len(deep.ahead) == prefetch
    deep.close()


def test_a_changed_shard_is_named(tiny_dataset, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_dataset, folder)
    verify_shards(folder)
    shard = folder / "val_000000.bin"
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    refused(lambda: verify_shards(folder), shard, "changed")
    assert len(Tokens(folder, "val")) > 0  # which sizes do not show
    (folder / "manifest.json").unlink()
    refused(lambda: verify_shards(folder), "no manifest.json")


def test_what_was_read_has_a_name(counting, tmp_path):
    import hashlib

    first = np.arange(700, dtype="<u2")
    assert counting.sha256_of(700) == hashlib.sha256(first.tobytes()).hexdigest()
    other = Tokens(write_shards(tmp_path / "cut", "train", np.arange(1000), cuts=(3, 650)), "train")
    assert other.sha256_of(700) == counting.sha256_of(700) != counting.sha256_of(701)


def test_the_order_of_ten_billion_tokens_takes_no_memory():
    """A position far into a run is found without the others: what is allocated does not depend on the corpus."""
    import tracemalloc

    peaks = []
    for tokens in (10**6, 10**10):
        order = Order(tokens, 1024, seed=1)
        tracemalloc.start()
        starts = order.starts(np.arange(order.windows * 3 - 32, order.windows * 3 + 32))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(set(starts.tolist())) == 64 and starts.max() <= tokens - 1025
    assert peaks[1] < 2 * peaks[0] < 1_000_000


# -----------------------------------------------------------------------------
# Other projects' names


def shard(path, ids):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(shard_header(len(ids)) + np.asarray(ids, dtype="<u2").tobytes())


@pytest.mark.parametrize("names", [
    ("edu_fineweb_train_000001.bin", "edu_fineweb_train_000002.bin"), ("TinyStories_train.bin",), ("train.bin",),
    ("my_train_set_train_000007.bin",),
], ids=lambda names: names[0])
def test_shards_under_the_names_of_other_projects(names, tmp_path):
    for i, name in enumerate(names):
        shard(tmp_path / "d" / name, np.arange(10 * i, 10 * i + 10))
    shard(tmp_path / "d" / names[0].replace("train_0", "val_0").replace("train.bin", "val.bin"), np.arange(100, 110))
    folder = find_dataset(str(tmp_path / "d"))
    assert Tokens(folder, "train").read([0], 10 * len(names))[0].tolist() == list(range(10 * len(names)))
    assert Tokens(folder, "val").read([0], 10)[0].tolist() == list(range(100, 110))


def test_nanogpts_file_with_a_damaged_header_is_refused(tmp_path):
    shard(tmp_path / "d" / "train.bin", np.arange(10))
    raw = (tmp_path / "d" / "train.bin").read_bytes()
    (tmp_path / "d" / "train.bin").write_bytes(raw[:-2])
    refused(lambda: Tokens(tmp_path / "d", "train"), "train.bin", "damaged")
    (tmp_path / "d" / "train.bin").write_bytes(raw[:4] + b"\2\0\0\0" + raw[8:])
    refused(lambda: Tokens(tmp_path / "d", "train"), "train.bin", "version 2")


def test_shards_of_two_datasets_in_one_folder_are_refused(tmp_path):
    for name in ("a_train_000000.bin", "b_train_000000.bin"):
        shard(tmp_path / "d" / name, np.arange(10))
    refused(lambda: Tokens(tmp_path / "d", "train"), "a_train_000000.bin", "b_train_000000.bin")


def test_another_projects_name_needs_the_header(tmp_path):
    (tmp_path / "x_train.bin").write_bytes(np.arange(600, dtype="<u2").tobytes())
    refused(lambda: Tokens(tmp_path, "train"), "x_train.bin", "not a token shard")


@pytest.mark.parametrize("train, val", [
    ("fineweb_train_000001.bin", "tiny_shakespeare_val.bin"), ("train.bin", "edu_val_000000.bin"),
    ("a_b_train.bin", "a_val.bin"),
])
def test_training_and_validation_of_two_datasets_are_refused(train, val, tmp_path):
    for name in (train, val):
        shard(tmp_path / "d" / name, np.arange(10))
    for split in ("train", "val"):
        refused(lambda split=split: Tokens(tmp_path / "d", split), train, val, "a folder of its own")


@pytest.mark.parametrize("names", [("train.bin", "x_train.bin"), ("train_000000.bin", "x_train_000003.bin"),
                                   ("x_train.bin", "x_train_000001.bin")], ids=lambda names: names[0])
def test_a_name_of_ours_beside_anothers_is_refused_without_a_manifest(names, tmp_path):
    for name in names:
        shard(tmp_path / "d" / name, np.arange(10))
    refused(lambda: Tokens(tmp_path / "d", "train"), *names)


def test_the_manifest_says_which_shards_are_the_datasets(dataset):
    shard(dataset / "x_train_000000.bin", np.arange(10))
    assert len(Tokens(dataset, "train")) == 3000


@pytest.mark.parametrize("name, start, said", [
    ("train.bin", np.array([20240801, 7, 400], "<i4").tobytes(), "Llama 3"),
    ("train.bin", b"\x93NUMPY\x01\x00v\x00{'descr': '<u2'}", "numpy.save"),
    ("val.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
    ("val.bin", b"\x1f\x8b\x08\x00", "gunzip"),
], ids=["another magic", "npy", "lfs", "gzip"])
def test_what_is_no_tokens_under_nanogpts_name(name, start, said, tmp_path):
    (tmp_path / name).write_bytes(start.ljust(3000, b"\0"))
    refused(lambda: Tokens(tmp_path, name[:-4]), tmp_path / name, said)


@pytest.mark.parametrize("files, call", [
    (("dataset_info.json",), "['train']"), (("dataset_dict.json",), "['train']"),
    (("state.json", "dataset_info.json", "data-00000-of-00002.arrow"), "load_from_disk"),
    (("train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow"), "['train']"),
], ids=lambda files: files[0])
def test_a_folder_of_save_to_disk_is_named(files, call, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    refused(lambda: find_dataset(str(tmp_path)), tmp_path, "save_to_disk", "to_parquet", call, "data/text/prepare.py")
    (tmp_path / "train_000000.bin").touch()
    assert find_dataset(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["part-0001.jsonl", "a.parquet", "notes.txt"])
def test_a_folder_of_text_is_named(name, tmp_path):
    (tmp_path / name).touch()
    refused(lambda: find_dataset(str(tmp_path)), f"data/text/prepare.py --input={tmp_path}")


def test_all_datasets_share_the_files_that_are_open(tmp_path):
    """More shards than may be open, of two datasets in turns: each is read, and no more than MOST_FILES stay open."""
    several = [Tokens(write_shards(tmp_path / name, "train", np.arange(300), range(3, 300, 3)), "train")
               for name in "ab"]
    for start in range(0, 297, 3):
        for tokens in several:
            assert tokens.read([start], 3)[0].tolist() == [start, start + 1, start + 2]
    assert len(dataset_module.OPEN.files) == dataset_module.MOST_FILES
    owners = {tokens.owner for tokens in several}
    del several, tokens
    gc.collect()
    assert not owners & {owner for owner, _ in dataset_module.OPEN.files}


def meta_pkl(folder, itos, **fields):
    """A dataset as a prepare.py of nanoGPT's kind writes it."""
    folder.mkdir()
    for split in ("train", "val"):
        (np.arange(500) % 3).astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": itos, **fields}))
    return folder


@pytest.mark.parametrize("ours, theirs", [
    (dict(enumerate("abc")), dict(enumerate("cab"))), (dict(enumerate("abc")), {0: "the", 1: "cat", 2: "sat"}),
    ({0: "le", 1: "chat", 2: "dort"}, {0: "the", 1: "cat", 2: "sat"}),
], ids=["characters", "words", "two of words"])
def test_a_mix_of_two_tokenizers_without_manifests_is_refused(ours, theirs, tmp_path):
    for name, itos in (("a", ours), ("b", theirs), ("c", ours)):
        meta_pkl(tmp_path / name, itos)
    refused(lambda: open_datasets(f"{tmp_path}/a:1,{tmp_path}/b:1"), tmp_path / "b", "another tokenizer")
    assert len(open_datasets(f"{tmp_path}/a:1,{tmp_path}/c:1")[0]) == 2


@pytest.mark.parametrize("itos, fields, size, said", [
    ({0: "C4", 1: "D4", 2: "E4"}, {}, 3, "token 0 is not one character"),
    (None, {"vocab_size": np.int16(300)}, 300, "itos"),
    ([b"a", b"b", b"c"], {}, 3, "token 0 is not one character"),
    (dict(enumerate("abc")), {"vocab_size": 8}, 8, None),
], ids=["notes", "size alone", "bytes", "padded"])
def test_train_needs_no_more_than_the_size(itos, fields, size, said, tmp_path, capsys):
    tokenizer, found = vocabulary(meta_pkl(tmp_path / "d", itos, **fields), {})
    warned = capsys.readouterr().err
    assert found == size and (tokenizer is None) == bool(said)
    if said:
        assert warned.count("\n") == 1 and said in warned and f"{size} token ids" in warned
    else:
        assert warned == ""


def test_train_refuses_a_pickle_that_calls(tmp_path):
    with pytest.raises(ValueError, match="gets to call nothing"):
        vocabulary(meta_pkl(tmp_path / "d", dict(enumerate("abc")), extra=print), {})


def test_a_dataset_that_says_nothing_is_gpt2s(tmp_path):
    meta_pkl(tmp_path / "d", None)
    (tmp_path / "d" / "meta.pkl").unlink()
    assert vocabulary(tmp_path / "d", {}) == (None, 50257)


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
import threading, dataset
if sys.argv[2] == "late":  # more than the limit was thought to allow
    dataset.OPEN.most = 1000
several = [dataset.Tokens(folder, "train") for folder in sys.argv[3:]]
wrong = []
def read(tokens):
    for start in range(0, 297, 3):
        if tokens.read([start], 3)[0].tolist() != [start, start + 1, start + 2]:
            wrong.append(start)
threads = [threading.Thread(target=read, args=(tokens,)) for tokens in several]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(wrong), dataset.OPEN.most, len(dataset.OPEN.files))
"""


@pytest.mark.parametrize("limit, when", [(80, "at once"), (200, "at once"), (80, "late")])
def test_few_files_may_be_open(limit, when, tmp_path):
    """Three datasets of 100 shards, read by three threads, where the process may open fewer files than MOST_FILES."""
    pytest.importorskip("resource")
    folders = [write_shards(tmp_path / name, "train", np.arange(300), range(3, 300, 3)) for name in "abc"]
    done = subprocess.run([sys.executable, "-c", FEW_FILES, str(limit), when, *map(str, folders)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong, most, files = map(int, done.stdout.split())
    assert wrong == 0 and files <= most < limit and (when == "late" or most == limit // 4)
