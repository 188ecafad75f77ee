"""Rows of conversations, from the files beside the shards to an update of train.py."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import shard_header
from dataset import BITS, DataError, Mix, Tokens, open_datasets, open_tokens, verify_shards
from files import file_sha256
from loader import Loader, fixed_batches

T = 16


def random_rows(n, seed=0, vocab_size=50):
    """(ids, learned, begins) of `n` rows of T tokens: two or three conversations in each, their second halves learned.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, (n, T)).astype(np.uint16)
    learned = np.zeros((n, T), bool)
    begins = np.zeros((n, T), bool)
    for i in range(n):
        cuts = [0, *sorted(rng.choice(np.arange(3, T - 2), rng.integers(1, 3), replace=False).tolist()), T]
        for a, b in zip(cuts, cuts[1:], strict=False):
            begins[i, a] = True
            learned[i, (a + b) // 2 : b] = True
        learned[i, 0] = False
    return ids, learned, begins


def write_rows(folder, ids, learned, begins, split="train", cuts=()):
    """Rows (n, T) as a split of a dataset, its shards cut before each of `cuts` (rows)."""
    folder.mkdir(exist_ok=True)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"rows": {"block_size": ids.shape[1]}, "splits": {}}
    shards = []
    parts = zip(*(np.split(array, cuts) for array in (ids, learned, begins)), strict=True)
    for i, (tokens, *bits) in enumerate(parts):
        file = folder / f"{split}_{i:06d}.bin"
        file.write_bytes(shard_header(tokens.size) + tokens.astype("<u2").tobytes())
        entry = {"file": file.name, "tokens": tokens.size, "sha256": file_sha256(file)}
        for name, array in zip(BITS, bits, strict=True):
            beside = file.with_suffix(f".{name}")
            beside.write_bytes(np.packbits(array, bitorder="little").tobytes())
            entry[name] = {"file": beside.name, "sha256": file_sha256(beside)}
        shards.append(entry)
    manifest["splits"][split] = {"tokens": ids.size, "shards": shards}
    path.write_text(json.dumps(manifest))
    return folder


# -----------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4, 11)])
def test_bits_belong_to_their_tokens(tmp_path, cuts):
    ids, learned, begins = random_rows(20)
    tokens = Tokens(write_rows(tmp_path / "d", ids, learned, begins, cuts=cuts), "train", doc_mask=True)
    assert tokens.row_size == T
    for start, length in ((0, 320), (0, T), (7, 1), (13, 100), (319, 1)):
        assert np.array_equal(tokens.read_bits("learned", [start], length)[0], learned.flat[start : start + length])
        assert np.array_equal(tokens.read_bits("begins", [start], length)[0], begins.flat[start : start + length])


def test_targets_are_the_learned_tokens_and_documents_their_conversations(tmp_path):
    ids, learned, begins = random_rows(9)
    tokens = Tokens(write_rows(tmp_path / "d", ids, learned, begins, "val"), "val", doc_mask=True)
    batches = list(fixed_batches(tokens, T, 4))
    assert [len(batch.x) for batch in batches] == [4, 4, 1]
    x, y, docs = (torch.cat(part).numpy() for part in zip(*(batch[:3] for batch in batches), strict=True))
    assert np.array_equal(x, ids)
    for row in range(9):
        for t in range(T):
            target = ids[row, t + 1] if t + 1 < T and learned[row, t + 1] else -1
            assert y[row, t] == target
            assert docs[row, t] == begins[row, : t + 1].sum()


@settings(max_examples=12, deadline=None)
@given(n=st.integers(2, 40), accumulation=st.integers(1, 3), world=st.integers(1, 3), batch_size=st.integers(1, 3),
       seed=st.integers(0, 9))
def test_every_row_once_an_epoch_on_any_number_of_ranks(tmp_path_factory, n, accumulation, world, batch_size, seed):
    ids, learned, begins = random_rows(n, seed)
    ids[:, 0] = np.arange(n)  # a row is known by its first token
    tokens = Tokens(write_rows(tmp_path_factory.mktemp("d"), ids, learned, begins), "train")
    seen = []
    update = accumulation * world * batch_size
    loaders = []
    for rank in range(world):
        loaders.append(Loader(tokens, T, batch_size, accumulation=accumulation, seed=seed, rank=rank, world=world))
    for step in range(-(-2 * n // update)):
        for micro in range(accumulation):
            for loader in loaders:
                seen += loader.batch(step, micro).x[:, 0].tolist()
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == list(range(n))
    assert n < 8 or seen[:n] != seen[n : 2 * n]
    for loader in loaders:
        loader.close()


def test_the_divisor_counts_the_targets_of_the_whole_update(tmp_path):
    ids, learned, begins = random_rows(30)
    tokens = Tokens(write_rows(tmp_path / "d", ids, learned, begins), "train")
    loaders = [Loader(tokens, T, 2, accumulation=3, rank=rank, world=2, skipped=[1]) for rank in range(2)]
    for step in range(3):
        batches = [loader.batch(step, micro) for loader in loaders for micro in range(3)]
        targets = sum(int((batch.y != -1).sum()) for batch in batches)
        assert {batch.divisor.item() for batch in batches} == {np.float32(targets / 6)}
    for loader in loaders:
        loader.close()


def test_a_mix_of_conversations(tmp_path):
    parts = []
    for name, seed in (("a", 1), ("b", 2)):
        write_rows(tmp_path / name, *random_rows(20, seed), "train")
        parts.append((tmp_path / name, Fraction(1, 2)))
    mix = open_tokens(parts, "train", 50, doc_mask=True)
    loader = Loader(mix, T, 4)
    batch = loader.batch(0)
    rows = {tuple(row) for seed in (1, 2) for row in random_rows(20, seed)[0].tolist()}
    assert {tuple(row) for row in batch.x.tolist()} <= rows
    assert batch.divisor.item() == (batch.y != -1).sum() and batch.docs.min() == 1
    loader.close()
    with pytest.raises(DataError, match="one stream of tokens"):
        (tmp_path / "b" / "manifest.json").unlink()
        Mix([(Tokens(folder, "train"), weight) for folder, weight in parts])


def test_documents_of_a_plain_stream(tmp_path):
    ids = np.arange(100) % 10
    (tmp_path / "train_000000.bin").write_bytes(shard_header(100) + ids.astype("<u2").tobytes())
    loader = Loader(Tokens(tmp_path, "train", doc_mask=True, bos=3), T, 2)
    batch = loader.batch(0)
    assert batch.divisor is None and torch.equal(batch.docs, (batch.x == 3).cumsum(1))
    loader.close()


# -----------------------------------------------------------------------------
# Damaged files


def test_what_a_damaged_dataset_gets(tmp_path):
    folder = write_rows(tmp_path / "d", *random_rows(4))
    manifest = (folder / "manifest.json").read_text()
    bits = folder / "train_000000.learned"
    good = bits.read_bytes()
    for content in (good[:-1], good + b"x", None):
        if content is None:
            bits.unlink()
        else:
            bits.write_bytes(content)
        with pytest.raises(DataError, match=r"train_000000\.learned.*prepare the dataset again"):
            Tokens(folder, "train")
    bits.write_bytes(bytes([good[0] ^ 2]) + good[1:])
    with pytest.raises(DataError, match=r"train_000000\.learned was changed"):
        verify_shards(folder)
    bits.write_bytes(good)
    verify_shards(folder)
    for rows in ({"block_size": 10}, {"block_size": "16"}, [16]):
        (folder / "manifest.json").write_text(json.dumps({**json.loads(manifest), "rows": rows}))
        with pytest.raises(DataError, match="prepare"):
            Tokens(folder, "train")


def test_the_name_of_an_evaluation_tells_what_is_learned(tmp_path):
    ids, learned, begins = random_rows(4)
    one = Tokens(write_rows(tmp_path / "a", ids, learned, begins, "val"), "val")
    other = learned.copy()
    other[2, -1] = False
    two = Tokens(write_rows(tmp_path / "b", ids, other, begins, "val"), "val")
    assert one.sha256_of(48) != two.sha256_of(48) and one.sha256_of(32) == two.sha256_of(32)
    assert open_datasets(str(tmp_path / "a"))[2] != open_datasets(str(tmp_path / "b"))[2]
