"""The Triton kernel against the plain gather. On a CPU Triton's interpreter runs it, in a process of its own, as Triton
decides on import how it runs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CODE = """
import random
import torch
from inference import paged
from inference.kvcache import attend_blocks

device = "cuda" if torch.cuda.is_available() else "cpu"
half = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter multiplies the bits of bfloat16
torch.manual_seed(0)
for n_q, n_kv, D, size, blocks, dtype, tolerance in (
    (4, 4, 16, 16, 3, torch.float32, 1e-5),
    (6, 2, 24, 4, 9, torch.float32, 1e-5),     # three heads share one; a head size that is no power of two
    (20, 1, 64, 48, 4, torch.float32, 1e-5),   # more sharing heads than the 16 of a tile; blocks of 48
    (4, 2, 80, 16, 8, half, 2e-2),
    (2, 1, 32, 16, 100, torch.float32, 1e-5),  # up to 1,600 tokens: three programs share them
):
    pool = 5 * blocks
    keys, values = torch.randn(2, pool, size, n_kv, D, device=device).to(dtype)
    if size == 4:  # the layout of a CPU's pool: the rows of one head are neighbours
        keys, values = (t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (keys, values))
    q = torch.randn(5, n_q, D, device=device).to(dtype)
    table = torch.randperm(pool, device=device).view(5, blocks).int()
    most = blocks * size
    lengths = torch.tensor([1, most, most // 2 + 1, min(64, most), min(65, most)], dtype=torch.int32, device=device)
    found = paged.paged_attention(q, keys, values, table, lengths)
    expected = attend_blocks(q.float(), keys.float(), values.float(), table, lengths)
    assert found.shape == q.shape and found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    # what lies past a length, or in blocks of others, is never read: a nan there would show
    for row in range(5):
        other = keys.clone(), values.clone()
        used = torch.zeros(pool * size, dtype=torch.bool, device=device)
        n = int(lengths[row])
        slots = (table[row].long()[:, None] * size + torch.arange(size, device=device)).flatten()[:n]
        used[slots] = True
        for t in other:
            t[~used.view(pool, size)] = torch.nan
        again = paged.paged_attention(q[row : row + 1], *other, table[row : row + 1], lengths[row : row + 1])
        assert torch.equal(again, found[row : row + 1])
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_the_kernel_is_the_gather():
    """Every head count, head size, block size and length; keys and values of others are never touched."""
    import torch

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
