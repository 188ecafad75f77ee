"""Blocks, and attention over them, one request after another and all at once."""

import pytest
import torch
from test_engine import make, some_prompts

import infer
from infer import Engine, stream
from kvcache import Blocks, attend_blocks, attend_one, paged_kernel


def test_blocks_are_neighbours_where_they_can_be():
    blocks = Blocks(8)
    a, b, c = blocks.take(2), blocks.take(2), blocks.take(2)
    blocks.release(b)
    assert blocks.take(2) == [2, 3] and (a, c) == ([0, 1], [4, 5])
    blocks.release(a)
    assert blocks.take(4) == [0, 1, 6, 7], "scattered, where there is no run"


def blocks_of_three(group=2, seed=0):
    """(q, k, v, table, lengths): three requests whose blocks of 4 lie scattered in a pool of 16, two key heads."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(16, 4, 2, 8, generator=g) for _ in range(2))
    table = torch.randperm(16, generator=g)[:9].view(3, 3).int()
    return torch.randn(3, 2 * group, 8, generator=g), k, v, table, torch.tensor([1, 7, 12], dtype=torch.int32)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_all_at_once_is_one_after_another(group):
    q, k, v, table, lengths = blocks_of_three(group)
    found = attend_blocks(q, k, v, table, lengths)
    for i, n in enumerate(lengths.tolist()):
        keys, values = (t[table[i]].flatten(0, 1)[:n] for t in (k, v))
        torch.testing.assert_close(found[i : i + 1], attend_one(q[i : i + 1], keys, values, n - 1))


def test_nothing_past_a_requests_length_is_seen():
    q, k, v, table, lengths = blocks_of_three()
    before = attend_blocks(q, k, v, table, lengths)
    k[table[1, 1], 3] = v[table[1, 1], 3] = 1e3  # the eighth of a request of seven
    assert torch.equal(attend_blocks(q, k, v, table, lengths), before)
    k[table[1, 1], 2] += 1
    assert not torch.equal(attend_blocks(q, k, v, table, lengths), before)


def test_flash_attns_kernel_is_asked_in_its_own_terms(monkeypatch):
    """Its interface (flash_attn_with_kvcache) spelled out in PyTorch, in place of it: the same tokens."""
    calls = []

    def kernel(q, k_cache, v_cache, *, cache_seqlens, block_table):
        assert q.shape[1:] == (1, 4, 8) and k_cache.shape[1:] == v_cache.shape[1:] == (256, 2, 8)
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        calls.append(len(q))
        rows = zip(q[:, 0], cache_seqlens.tolist(), block_table.long(), strict=True)
        out = [attend_one(one[None], k_cache[blocks].flatten(0, 1)[:n], v_cache[blocks].flatten(0, 1)[:n], n - 1)
               for one, n, blocks in rows]
        return torch.stack(out)

    model, prompts = make(pos="rope", n_kv_head=2), some_prompts()
    expected = [list(stream(model, prompt, 9, temperature=0)) for prompt in prompts]
    monkeypatch.setattr(infer, "paged_kernel", lambda device, dtype: kernel)
    engine = Engine(model, max_tokens=1024, batched=True)
    assert [r.tokens for r in engine.generate(prompts, max_new_tokens=9, temperature=0)] == expected
    assert engine.block == 256 and set(calls) == {4}


def test_a_pass_is_made_once_for_all_steps_of_its_shape():
    """Requests of three lengths that come and go: few shapes; and sliding, whose tables of rotations grow."""
    model = make(pos="rope")
    engine = Engine(model, block=4, batched=True)
    engine.generate(some_prompts((1, 2, 3)), max_new_tokens=12, temperature=0)
    assert set(engine.passes) == {(4, 1), (4, 2), (4, 4)}
    plain, batched = (Engine(model, slide=True, batched=way).generate(some_prompts(), max_new_tokens=70, temperature=0)
                      for way in (False, True))
    assert [r.tokens for r in batched] == [r.tokens for r in plain]


def test_no_kernel_on_a_cpu():
    assert paged_kernel(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("toggles", [{}, {"pos": "rope", "n_kv_head": 2, "qk_norm": "rms"}])
def test_a_replayed_graph_says_what_the_plain_way_says(toggles):
    model = make(**toggles).cuda()
    prompts = some_prompts()
    expected = [list(stream(model, prompt, 12, temperature=0)) for prompt in prompts]
    engine = Engine(model, block=4)
    assert [r.tokens for r in engine.generate(prompts, max_new_tokens=12, temperature=0)] == expected
    assert all(each.graph is not None for each in engine.passes.values()) and engine.passes
