"""
Which documents are duplicates of an earlier one: exact ones by their hash, near ones by MinHash.

A near duplicate shares at least `threshold` of its 5-word shingles (Jaccard similarity, Broder 1997), estimated from
MinHash signatures, which rensa computes. Documents that agree in a whole band of their signatures are candidates
(Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", 3.4). Then the whole signatures of each pair are compared
with the threshold. A document is dropped if it duplicates an earlier one that stays. So the first always stays, and
every dropped document has a duplicate that was kept.

Documents have numbers 0, 1, ... in the order of the corpus. All that grows with the corpus is on disk, in files that
are sorted one at a time. Memory holds a byte a document and the largest of these files.
"""

import functools
import math
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np

SHINGLE = 5  # words, as in Lee et al. 2022 (arXiv:2107.06499) and FineWeb (arXiv:2406.17557)
SEED = 1
NO_WORDS = 0xFFFFFFFF  # every value of an empty set's signature
MOST_ANCHORS = 64  # each document that shares a band is compared with the first MOST_ANCHORS
PART_BYTES = 1 << 24  # size of a file that is sorted in memory
MOST_PARTS = 512  # such files open at once
KEPT, EXACT, NEAR = 0, 1, 2

# Scripts that put no spaces between words: here each character counts as a word
UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF),
    (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)

PIECE = 1 << 18  # characters hashed at a time; a word that is cut in two counts as two
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse
POWERS, INVERSES = (
    np.cumprod(np.append(np.uint64(1), np.full(PIECE - 1, x, dtype=np.uint64)))
    for x in (int(FACTOR), pow(int(FACTOR), -1, 2**64))
)


# -----------------------------------------------------------------------------
# Signatures


@functools.cache
def word_table():
    """For each code point: between words (0), part of a word (1), or a word by itself (2). -> uint8 (n,)"""
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    table[[i for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] in "LMN"]] = 1
    for first, last in UNSPACED:
        table[first : last + 1] *= 2
    return table


def mix(x):
    """Scatter the bits of uint64 (Steele et al. 2014, SplitMix64's finaliser). -> uint64, same shape"""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def words(text):
    """A hash of each word of `text` in lower case. -> uint64 (n,)"""
    text = text.lower()
    starts = range(0, len(text) or 1, PIECE)
    return np.concatenate([words_of_piece(text[i : i + PIECE]) for i in starts])


def words_of_piece(text):
    """A word's hash is the sum of its characters' code points times the powers 0, 1, ... of FACTOR, modulo 2^64."""
    if text.isascii():
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    kind = word_table().take(codes)
    starts = kind == 1
    starts[1:] &= kind[:-1] != 1
    starts = np.flatnonzero(starts | (kind == 2))
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    # The powers begin at the start of the text, for all words at once. Dividing each sum by the power of the place
    # where its word begins makes it the same wherever the word stands.
    values = codes * POWERS[: len(codes)]
    values *= kind != 0
    return np.add.reduceat(values, starts) * INVERSES[starts]


def shingles(text):
    """A hash of each run of SHINGLE words, or of all words where they are fewer. -> uint64 (n,), n = 0 without words"""
    hashes = words(text)
    size = min(SHINGLE, len(hashes))
    if not size:
        return hashes
    total = np.zeros(len(hashes) - size + 1, dtype=np.uint64)
    for i in range(size):
        total = total * FACTOR + hashes[i : i + len(total)]
    return mix(total)


def signatures(sets, permutations):
    """MinHash signatures of sets of hashes, each uint64 (n,). -> uint32 (len(sets), permutations)"""
    from rensa import RMinHash

    ends = np.cumsum([0, *map(len, sets)], dtype=np.int64)
    flat = np.concatenate([*sets, np.empty(0, dtype=np.uint64)])
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, permutations, SEED).to_rows()
    return np.array(rows, dtype=np.uint32).reshape(len(sets), permutations)


def band_shape(threshold, permutations):
    """(bands, rows of each) that find a pair of similarity `threshold` with probability 0.9, and few pairs below it.

    A pair of similarity s agrees in one of b bands of r rows with probability 1 - (1 - s^r)^b.
    """
    shapes = [(permutations // rows, rows) for rows in range(1, permutations + 1)]
    return [(b, r) for b, r in shapes if 1 - (1 - threshold**r) ** b >= 0.9][-1]


def band_hashes(signature, bands, rows):
    """A hash of each band of each signature, with its number. (N, permutations) -> uint64 (N, bands)"""
    out = np.empty((len(signature), bands), dtype=np.uint64)
    for band in range(bands):
        total = np.full(len(signature), band + 1, dtype=np.uint64)
        for column in signature[:, band * rows : (band + 1) * rows].T:
            total = mix(total * FACTOR + column)
        out[:, band] = total
    return out


# -----------------------------------------------------------------------------
# Sorting on disk


class Sorter:
    """Rows of uint64 that are added in any order and come back sorted, file by file.

    The first column of a row, which lies in [0, span), decides its file: the files divide that range evenly.
    """

    def __init__(self, folder, name, columns, rows, span):
        count = min(MOST_PARTS, max(1, math.ceil(rows * columns * 8 / PART_BYTES)))
        self.columns, self.span, self.count = columns, span, count
        self.paths = [Path(folder) / f"{name}_{i:04d}" for i in range(count)]
        self.files = [open(path, "wb", buffering=1 << 14) for path in self.paths]

    def add(self, *columns):
        rows = np.stack([np.asarray(column, dtype=np.uint64) for column in columns], axis=1)
        part = rows[:, 0].astype(np.float64) / self.span * self.count
        part = part.astype(np.int64).clip(0, self.count - 1)
        order = np.argsort(part, kind="stable")
        cuts = np.searchsorted(part[order], np.arange(self.count + 1))
        for file, start, end in zip(self.files, cuts[:-1], cuts[1:], strict=True):
            if end > start:
                file.write(rows[order[start:end]].data)

    def __iter__(self):
        """Yields the sorted rows of each file, (n, columns), without repetitions, and removes the file."""
        for file in self.files:
            file.close()
        for path in self.paths:
            rows = np.fromfile(path, dtype=np.uint64).reshape(-1, self.columns)
            os.unlink(path)
            rows = rows[np.lexsort(rows.T[::-1])]
            if len(rows):
                new = np.ones(len(rows), dtype=bool)
                new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
                yield rows[new]


def same_as_before(rows, columns):
    """Whether each row agrees with the one before it in its first `columns`. -> bool (n,)"""
    same = np.zeros(len(rows), dtype=bool)
    same[1:] = (rows[1:, :columns] == rows[:-1, :columns]).all(axis=1)
    return same


# -----------------------------------------------------------------------------
# Deciding


def drop_exact(hashes, fate, folder):
    """Mark in `fate` each document whose hash an earlier one has. `hashes` yields (first number, uint64 (n, 2))."""
    sorter = Sorter(folder, "exact", 3, len(fate), 2.0**64)
    for start, part in hashes:
        sorter.add(part[:, 0], part[:, 1], np.arange(start, start + len(part)))
    for rows in sorter:
        fate[rows[same_as_before(rows, 2), 2].astype(np.int64)] = EXACT


def drop_near(parts, fate, folder, permutations, threshold):
    """Mark in `fate` each document that nearly duplicates an earlier one that stays.

    `parts` yields (first number, signatures (n, permutations)) in order. Documents that are marked already are skipped.
    """
    bands, rows = band_shape(threshold, permutations)
    store = Path(folder) / "signatures"
    sorter = Sorter(folder, "bands", 2, len(fate) * bands, 2.0**64)
    with open(store, "wb") as file:
        for start, signature in parts:
            file.write(np.ascontiguousarray(signature).data)
            kept = fate[start : start + len(signature)] == KEPT
            stays = np.flatnonzero(kept & (signature != NO_WORDS).any(axis=1))
            hashes = band_hashes(signature[stays], bands, rows)
            sorter.add(hashes.ravel(), np.repeat(stays + start, bands))

    pairs = Sorter(folder, "pairs", 2, len(fate) * 4, max(1, len(fate)))  # (later, earlier)
    for rows in sorter:
        for later, earlier in candidates(rows):
            pairs.add(later, earlier)
    with open(store, "rb") as file:
        for rows in pairs:  # all pairs of a document, after all pairs of the documents before it
            alike = similar(file, rows.astype(np.int64), permutations, threshold)
            for later, earlier in rows[alike].astype(np.int64).tolist():
                if fate[earlier] == KEPT:
                    fate[later] = NEAR
    os.unlink(store)


def candidates(rows):
    """Yields (later, earlier): each document of a bucket with its first MOST_ANCHORS. `rows` are sorted."""
    same = same_as_before(rows, 1)
    place = np.arange(len(rows))
    first = np.maximum.accumulate(np.where(same, 0, place))
    for i in range(MOST_ANCHORS):
        later = np.flatnonzero(first + i < place)
        if not len(later):
            return
        yield rows[later, 1], rows[first[later] + i, 1]


def similar(file, pairs, permutations, threshold, most=4096):
    """Whether the signatures of each pair of documents, (n, 2), agree in at least `threshold`. -> bool (n,)"""
    alike = np.empty(len(pairs), dtype=bool)
    for start in range(0, len(pairs), most):
        part = pairs[start : start + most]
        numbers, index = np.unique(part, return_inverse=True)
        table = np.empty((len(numbers), permutations), dtype=np.uint32)
        for row, number in zip(table, numbers.tolist(), strict=True):
            file.seek(number * permutations * 4)
            file.readinto(row.data)
        later, earlier = table[index.reshape(-1, 2).T]
        alike[start : start + most] = (later == earlier).mean(axis=1) >= threshold
    return alike
