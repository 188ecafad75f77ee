"""Blocks, and attention over them, one request after another and all at once."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_engine import greedy, make, some_prompts

import infer
import model as model_file
from infer import Engine, stream
from inference import kvcache
from inference.kvcache import BatchPass, Blocks, Part, attend_blocks, attend_one, paged_kernel


def test_blocks_are_neighbours_where_they_can_be():
    blocks = Blocks(8)
    a, b, c = blocks.allocate(2), blocks.allocate(2), blocks.allocate(2)
    blocks.release(b)
    assert blocks.allocate(2) == [2, 3] and (a, c) == ([0, 1], [4, 5])
    blocks.release(a)
    assert blocks.allocate(4) == [0, 1, 6, 7], "scattered, where there is no run"


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
    expected = [greedy(model, prompt, 9) for prompt in prompts]
    monkeypatch.setattr(infer, "paged_kernel", lambda device, dtype, head_dim: kernel)
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


@pytest.mark.parametrize("way", ["engine", "batched", "stream"])
def test_tokens_are_made_within_the_kernels_of_inference(monkeypatch, way):
    """Without cuDNN's: device.inference_kernels is entered and left around each pass of the model."""
    model, inside, seen = make(), [], []

    @contextlib.contextmanager
    def kernels(device):
        inside.append(device)
        yield
        inside.pop()

    monkeypatch.setattr(infer, "inference_kernels", kernels)
    model.register_forward_pre_hook(lambda *args: seen.append(list(inside)))
    if way == "stream":
        list(stream(model, [1, 2, 3], 4))
    else:
        Engine(model, batched=way == "batched").generate([1, 2, 3], max_new_tokens=4)
    assert len(seen) == 4 and all(devices == [torch.device("cpu")] for devices in seen) and not inside


def test_no_kernel_on_a_cpu():
    assert paged_kernel(torch.device("cpu"), torch.bfloat16, 64) is None


@pytest.mark.parametrize("capability, dtype, head_dim, there", [
    ((8, 0), torch.bfloat16, 64, True), ((9, 0), torch.float16, 256, True), ((7, 5), torch.float16, 64, False),
    ((8, 0), torch.float32, 64, False), ((8, 0), torch.bfloat16, 264, False), ((8, 0), torch.bfloat16, 60, False)])
def test_the_paged_kernel_runs_where_the_training_kernel_does(monkeypatch, capability, dtype, head_dim, there):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kvcache, "flash_attn_with_kvcache", len)
    monkeypatch.setattr(model_file, "flash_attn_func", len)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    cuda = torch.device("cuda")
    assert (paged_kernel(cuda, dtype, head_dim) is len) == there
    assert (model_file.pick_attention("auto", cuda, dtype, 64, head_dim)[0] == "flash") == there


class FakeGraphs:
    """torch.cuda's graphs, whose replay does nothing. What is asked for, and on which device, is noted in `calls`."""

    def __init__(self, monkeypatch):
        self.calls, self.current = [], "cuda:0"
        stream = SimpleNamespace(wait_stream=lambda other: None)
        graph = SimpleNamespace(replay=lambda: self.calls.append(("replay", self.current)))
        fakes = {"device": self.device, "graph": self.graph, "graph_pool_handle": self.pool,
                 "CUDAGraph": lambda: graph, "Stream": lambda: stream, "current_stream": lambda: stream,
                 "stream": lambda stream: contextlib.nullcontext()}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, str(device)
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None):
        self.calls.append(("capture", self.current, pool))
        yield

    def pool(self):
        self.calls.append(("pool", self.current))
        return "the pool"


def test_graphs_are_captured_and_replayed_on_the_engines_device_in_one_pool(monkeypatch):
    """The engine believes that it lies on cuda:1, while another device is the current one."""
    engine = Engine(make(), block=4, batched=True)
    request = engine.submit([1, 2, 3], max_new_tokens=2)
    engine.admit()
    request.cached = 2
    passes = [BatchPass(engine.model, engine.pool, engine.rope, rows, 2) for rows in (1, 2)]
    fake = FakeGraphs(monkeypatch)
    engine.pool.device = torch.device("cuda:1")
    with torch.no_grad():
        for each in passes * 2:
            each([Part([3], request.cached, request.table, wanted=True)])
    captured = [("capture", "cuda:1", "the pool"), ("replay", "cuda:1")]
    assert fake.calls == [("pool", "cuda:1"), *captured, *captured, *[("replay", "cuda:1")] * 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("toggles", [{}, {"pos": "rope", "n_kv_head": 2, "qk_norm": "rms"}])
def test_a_replayed_graph_says_what_the_plain_way_says(toggles):
    model = make(**toggles).cuda()
    prompts = some_prompts()
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    engine = Engine(model, block=4)
    assert [r.tokens for r in engine.generate(prompts, max_new_tokens=12, temperature=0)] == expected
    assert all(each.graph is not None for each in engine.passes.values()) and engine.passes
