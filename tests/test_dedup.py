"""Duplicates: all exact ones are dropped, near ones by their similarity, and the first is kept."""

import random

import numpy as np
import pytest

import dedup
from dedup import EXACT, KEPT, NEAR, Sorter, band_shape, drop_exact, drop_near, shingles, signatures, words

WORDS = [f"word{i}" for i in range(3000)]


def jaccard(a, b):
    a, b = set(shingles(a).tolist()), set(shingles(b).tolist())
    return len(a & b) / len(a | b)


def near(text, similarity, rng):
    """`text` with words replaced, one after another, while the similarity stays at least this high."""
    old, new = text.split(), text.split()
    while True:
        edited = list(new)
        edited[rng.randrange(len(edited))] = rng.choice(WORDS)
        if jaccard(text, " ".join(edited)) < similarity:
            assert new != old
            return " ".join(new)
        new = edited


def fates(texts, folder, threshold=0.8, permutations=128):
    table = signatures([shingles(text) for text in texts], permutations)
    fate = np.zeros(len(texts), dtype=np.uint8)
    parts = [(i, table[i : i + 7]) for i in range(0, len(texts), 7)]
    drop_near(parts, fate, folder, permutations, threshold)
    assert not list(folder.iterdir()), "nothing is left behind"
    return fate


def test_words_are_those_of_any_script():
    for text, count in (("", 0), ("!? --", 0), ("It's 3 o'clock", 5), ("naïve Straße", 2), ("文字コード。", 5),
                        ("ไทย", 3), ("हिन्दी में", 2), ("a文b", 3), ("\U0001f642", 0)):
        assert len(words(text)) == count, text
    assert (words("One two") == words("ONE, Two!")).all()
    assert words("ab")[0] != words("ba")[0] and len({*words("a b c ab ba abc cab").tolist()}) == 7
    assert len(shingles("one two")) == 1 and len(shingles("a b c d e f")) == 2 and not len(shingles("..."))


def test_signatures_estimate_the_similarity():
    rng = random.Random(1)
    text = " ".join(rng.choices(WORDS, k=800))
    for similarity in (0.5, 0.8, 0.9):
        other = near(text, similarity, rng)
        one, two = signatures([shingles(text), shingles(other)], 1024)
        error = 4 * (similarity * (1 - similarity) / 1024) ** 0.5
        assert abs((one == two).mean() - jaccard(text, other)) < error


def test_planted_near_duplicates(tmp_path):
    """At 0.9 at least 95% are dropped, at 0.5 none. Unrelated texts stay, and so does the first of two."""
    rng = random.Random(2)
    first = [" ".join(rng.choices(WORDS, k=rng.randint(200, 600))) for _ in range(300)]
    close = [near(text, 0.9, rng) for text in first[:100]]
    far = [near(text, 0.5, rng) for text in first[100:200]]
    assert max(jaccard(a, b) for a, b in zip(first[100:200], far, strict=True)) < 0.6
    fate = fates(first + close + far, tmp_path)
    assert not fate[:300].any() and (fate[300:400] == NEAR).sum() >= 95 and not fate[400:].any()


def test_bands_find_what_they_promise():
    for threshold in (0.5, 0.7, 0.8, 0.95):
        for permutations in (16, 64, 128, 256):
            bands, rows = band_shape(threshold, permutations)
            assert bands * rows <= permutations and 1 - (1 - threshold**rows) ** bands >= 0.9


def test_a_document_goes_only_for_one_that_stays(tmp_path):
    """b is close to a, and c to b but not to a: without b, c duplicates nothing that was kept."""
    rng = random.Random(3)
    a = " ".join(rng.choices(WORDS, k=600))
    b = near(a, 0.85, rng)
    c = near(b, 0.85, rng)
    assert jaccard(a, c) < 0.77
    assert fates([a, b, c], tmp_path, permutations=1024).tolist() == [KEPT, NEAR, KEPT]
    assert fates([a, c, b], tmp_path, permutations=1024).tolist() == [KEPT, KEPT, NEAR]


def test_a_crowd_of_duplicates_leaves_one(tmp_path, monkeypatch):
    rng = random.Random(4)
    text = " ".join(rng.choices(WORDS, k=600))
    crowd = [near(text, 0.95, rng) for _ in range(60)]
    for anchors in (64, 4):
        monkeypatch.setattr(dedup, "MOST_ANCHORS", anchors)
        assert (fates([text, *crowd], tmp_path) == KEPT).sum() == 1


def test_documents_without_words_are_not_near_each_other(tmp_path):
    assert not fates(["...", "!!!", "---", "one two three"], tmp_path).any()


def test_exact_duplicates_all_go_but_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "PART_BYTES", 4096)  # many files
    rng = np.random.default_rng(5)
    hashes = rng.integers(0, 2**64, (5000, 2), dtype=np.uint64)
    hashes[100:200, 0] = hashes[0, 0]  # half of a hash in common is none
    copies = rng.choice(5000, 1000)
    hashes = np.concatenate([hashes, hashes[copies]])
    fate = np.zeros(len(hashes), dtype=np.uint8)
    drop_exact([(0, hashes[:3000]), (3000, hashes[3000:])], fate, tmp_path)
    assert not fate[:5000].any() and (fate[5000:] == EXACT).all() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("part_bytes", [64, 1 << 20])
def test_sorting_on_disk_is_sorting(part_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "PART_BYTES", part_bytes)
    rows = np.random.default_rng(6).integers(0, 50, (1000, 2), dtype=np.uint64)
    sorter = Sorter(tmp_path, "x", 2, len(rows), 50)
    sorter.add(rows[:300, 0], rows[:300, 1])
    sorter.add(rows[300:, 0], rows[300:, 1])
    found = np.concatenate(list(sorter))
    assert (found == np.unique(rows, axis=0)).all() and (part_bytes > 64) == (sorter.count == 1)
