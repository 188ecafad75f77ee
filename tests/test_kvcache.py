"""Blocks, and attention over them, one request after another and all at once."""

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import greedy, make, some_prompts

import attention as attention_file
import infer
from infer import Engine, stream
from inference import kernels, kvcache
from inference.batch import BatchPass
from inference.kvcache import (
    Blocks,
    BlockTable,
    DecodeCache,
    Part,
    Pool,
    StepCache,
    attend_blocks,
    attend_one,
    block_digest,
    block_digests,
    paged_kernel,
)
from model import GPTConfig


def skip_without_kernels():
    if not kernels.available():
        pytest.skip(kernels.trouble())


def test_blocks_are_neighbours_where_they_can_be():
    blocks = Blocks(8)
    a, b, c = blocks.allocate(2), blocks.allocate(2), blocks.allocate(2)
    blocks.release(b)
    assert blocks.allocate(2) == [2, 3] and (a, c) == ([0, 1], [4, 5])
    blocks.release(a)
    assert blocks.allocate(4) == [0, 1, 6, 7], "scattered, where there is no run"


def test_new_blocks_follow_those_that_are_shared():
    blocks = Blocks(9)
    blocks.allocate(1)
    talk = blocks.allocate(3)
    blocks.release(talk, [b"a", b"b"])
    assert blocks.share([b"a", b"b"]) == [1, 2]
    assert blocks.allocate(3, after=2) == [3, 4, 5]
    assert blocks.allocate(3, after=5) == [6, 7, 8]
    blocks.release([3, 4, 5])
    assert blocks.allocate(2, after=8) == [3, 4], "none behind the last"
    assert blocks.allocate(1, after=0) == [5], "the next is in use"


def test_a_view_of_scattered_blocks_is_their_slots_in_order():
    table = BlockTable([5, 2, 3], size=4, window=10)
    assert not table.neighbours and BlockTable([2, 3], 4, 10).view(7) == slice(8, 15)
    for count in (1, 4, 5, 10):
        assert table.view(count).tolist() == [table.slot(position) for position in range(count)]
    assert table.view(99).tolist() == table.view(10).tolist() and table.slot(10) == table.slot(0) == 20


# -----------------------------------------------------------------------------
# What is known of blocks


def test_a_digest_stands_for_all_tokens_up_to_the_end_of_its_block():
    digests = block_digests([1, 2, 3, 4, 5, 6, 7], 3)
    assert len(digests) == 2 and digests == block_digests([1, 2, 3, 4, 5, 6], 3)
    assert digests[1] == block_digest(block_digest(b"", [1, 2, 3]), [4, 5, 6])
    others = [block_digests(tokens, 3)[1]
              for tokens in ([9, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6], [1, 2, 3, 4, 5, 9], [4, 5, 6, 1, 2, 3])]
    assert len({*others, digests[1], block_digest(b"", [4, 5, 6])}) == 6
    assert block_digests([1, 2], 3) == [] and len(digests[0]) == 32


def test_the_least_recently_used_block_goes_first_and_each_before_the_one_in_front():
    blocks = Blocks(6)
    old, young = blocks.allocate(3), blocks.allocate(3)
    blocks.release(old, [b"a", b"b", b"c"])
    blocks.release(young, [b"x", b"y"])  # the third is not full
    assert blocks.free == 6 and len(blocks.block_of) == 5
    assert blocks.allocate(1) == [5], "the unknown one before all others"
    blocks.allocate(1)
    assert blocks.block_of.keys() == {b"a", b"b", b"x", b"y"}
    blocks.release(blocks.share([b"a", b"b"]))  # now the others are the older ones
    blocks.allocate(3)
    assert blocks.block_of.keys() == {b"a"} and blocks.free == 1


def test_of_equal_blocks_one_is_known_and_the_other_takes_its_place_when_it_goes():
    """Two requests read the same text at the same time, the second ends later and has a block more."""
    blocks = Blocks(5)
    first, second = blocks.allocate(2), blocks.allocate(3)
    for digest, one, other in ((b"a", 0, 2), (b"b", 1, 3)):
        blocks.publish(digest, one)
        blocks.publish(digest, other)
    blocks.publish(b"c", 4)
    assert blocks.block_of == {b"a": 0, b"b": 1, b"c": 4}
    blocks.release(first, [b"a", b"b"])
    assert blocks.allocate(1) == [1]
    blocks.release(second, [b"a", b"b", b"c"])
    assert blocks.block_of == {b"a": 0, b"b": 3, b"c": 4} and list(blocks.idle) == [4, 3, 0]
    assert blocks.free == 4 and blocks.is_empty(2)


def test_what_is_forgotten_is_shared_with_nobody():
    blocks = Blocks(4)
    done, running = blocks.allocate(2), blocks.allocate(2)
    blocks.release(done, [b"a", b"b"])
    blocks.publish(b"x", running[0])
    blocks.forget()
    assert blocks.share([b"a"]) == blocks.share([b"x"]) == [] and blocks.free == 2
    blocks.publish(b"y", running[1])
    blocks.release(running, [b"x", b"y"])
    assert not blocks.block_of and not blocks.digest_of and blocks.free == 4
    blocks.release(blocks.allocate(4), [b"x"])
    assert blocks.block_of == {b"x": 0}, "what is read afterwards is known again"


class PlainBlocks:
    """Blocks as one would write them without a thought of speed: by whole texts, and the time of their last use."""

    def __init__(self, count, size):
        self.count = count
        self.size = size
        self.live = []  # the requests that run
        self.known = {}  # text up to the end of a full block -> the block
        self.used = {}  # the same text -> when
        self.clock = 0
        self.never = set()  # blocks in use since forget

    def users(self):
        users = [0] * self.count
        for request in self.live:
            for block in request.blocks:
                users[block] += 1
        return users

    def texts(self, tokens):
        return [tuple(tokens[:end]) for end in range(self.size, len(tokens) + 1, self.size)]

    def publish(self, text, block):
        if text not in self.known and block not in self.known.values() and block not in self.never:
            self.known[text] = block

    def idle(self):
        """The known texts that nobody uses, in the order in which they have to go."""
        users = self.users()
        texts = [text for text, block in self.known.items() if not users[block]]
        return sorted(texts, key=lambda text: (self.used[text], -len(text)))

    def evict_for(self, own):
        room = self.count - len({*self.known.values()} | {i for i, users in enumerate(self.users()) if users})
        for text in self.idle()[: max(0, own - room)]:
            del self.known[text]

    def use(self, texts):
        self.clock += 1
        self.used.update(dict.fromkeys(texts, self.clock))

    def release(self, request):
        texts = [] if request.slides else self.texts(request.tokens[: request.cached])
        for text, block in zip(texts, request.blocks, strict=False):
            self.publish(text, block)
        self.use(texts)
        self.live.remove(request)
        self.never &= {i for i, users in enumerate(self.users()) if users}

    def forget(self):
        self.known.clear()
        self.never = {i for i, users in enumerate(self.users()) if users}


class BlocksUnderTest:
    """Requests that come, read and go, in Blocks and in PlainBlocks; and what each slot holds: the text up to there."""

    def __init__(self, count, size):
        self.blocks = Blocks(count)
        self.plain = PlainBlocks(count, size)
        self.size = size
        self.held = {}  # slot -> text
        self.evicted = self.shared = 0

    def start(self, tokens, prompt, slides):
        size, blocks, plain = self.size, self.blocks, self.plain
        window = 2 * size if slides else len(tokens)
        needed = -(-min(len(tokens), window) // size)
        texts = [] if slides else plain.texts(tokens[: prompt - 1])
        found = [text for i, text in enumerate(texts) if all(before in plain.known for before in texts[: i + 1])]
        shared = blocks.share(block_digests(tokens[: prompt - 1], size) if not slides else [])
        assert shared == [plain.known[text] for text in found]
        for place, block in enumerate(shared):
            for i in range(size):
                assert self.held[block * size + i] == tuple(tokens[: place * size + i + 1]), "another text's block"
        self.shared += len(shared)
        request = SimpleNamespace(tokens=tokens, slides=slides, cached=len(shared) * size, blocks=shared)
        plain.live.append(request)
        own = needed - len(shared)
        if own > blocks.free:
            assert own > plain.users().count(0)
            blocks.release(shared)
            plain.use(found)
            plain.live.remove(request)
            return
        before = len(plain.known)
        plain.evict_for(own)
        self.evicted += before - len(plain.known)
        new = blocks.allocate(own, shared[-1] if shared else None)
        users = plain.users()
        assert len(set(new)) == own and not any(users[block] for block in new)
        assert not {*new} & {*plain.known.values()}
        request.blocks = shared + new
        request.table = BlockTable(request.blocks, size, window)

    def read(self, request, count):
        size, users = self.size, self.plain.users()
        before = request.cached
        request.cached = min(before + count, len(request.tokens))
        for position in range(before, request.cached):
            slot = request.table.slot(position)
            assert users[slot // size] == 1, "a block that others use is written to"
            self.held[slot] = tuple(request.tokens[: position + 1])
        if request.slides:
            return
        digests = block_digests(request.tokens[: request.cached], size)
        texts = self.plain.texts(request.tokens[: request.cached])
        for i in range(before // size, request.cached // size):
            self.blocks.publish(digests[i], request.blocks[i])
            self.plain.publish(texts[i], request.blocks[i])

    def finish(self, request):
        digests = [] if request.slides else block_digests(request.tokens[: request.cached], self.size)
        self.blocks.release(request.blocks, digests)
        self.plain.release(request)

    def forget(self):
        self.blocks.forget()
        self.plain.forget()

    def check(self):
        blocks, plain, size = self.blocks, self.plain, self.size
        assert blocks.users == plain.users() and blocks.free == blocks.users.count(0)
        assert blocks.block_of == {block_digests(text, size)[-1]: block for text, block in plain.known.items()}
        assert {block: digest for block, digest in blocks.digest_of.items() if digest} == {
            block: digest for digest, block in blocks.block_of.items()}
        assert list(blocks.idle) == [plain.known[text] for text in plain.idle()]
        for text in plain.idle():
            assert len(text) == size or text[:-size] in plain.known, "known, and never to be found"
        for text, block in plain.known.items():
            for i in range(size):
                assert self.held[block * size + i] == text[: len(text) - size + i + 1]


EVENTS = st.lists(st.tuples(st.sampled_from(["start"] * 4 + ["read"] * 6 + ["finish"] * 3 + ["forget"]),
                            st.integers(0, 2**30)), max_size=60)


@given(EVENTS, st.integers(3, 16), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_blocks_are_those_of_the_plain_way(events, count, size):
    play(BlocksUnderTest(count, size), events)


def play(under_test, events):
    """Texts of two letters, so that many begin alike; some slide, which rewrites their blocks; some end half read."""
    plain, size = under_test.plain, under_test.size
    for event, number in events:
        rng = random.Random(number)
        if event == "start":
            tokens = [rng.choice((0, 0, 0, 1)) for _ in range(rng.randint(1, size * min(plain.count, 6)))]
            under_test.start(tokens, prompt=rng.randint(1, len(tokens)), slides=rng.random() < 0.2)
        elif event == "forget":
            under_test.forget()
        elif plain.live:
            request = rng.choice(plain.live)
            if event == "read":
                under_test.read(request, rng.randint(1, 2 * size))
            else:
                under_test.finish(request)
        under_test.check()
    while plain.live:
        under_test.finish(plain.live[0])
        under_test.check()
    assert under_test.blocks.free == plain.count


def test_the_plain_way_is_asked_hard_questions():
    """Negative control of the test above: its events share and evict blocks, and an eviction in another order fails."""
    rng = random.Random(0)
    events = [(rng.choice(["start", "read", "read", "finish"]), rng.randrange(2**30)) for _ in range(600)]
    under_test = BlocksUnderTest(16, 2)
    play(under_test, events)
    assert under_test.shared > 50 and under_test.evicted > 50
    under_test = BlocksUnderTest(16, 2)
    under_test.blocks.idle.move_to_end = lambda block: None  # equal blocks are not used by those who have the other
    with pytest.raises(AssertionError):
        play(under_test, events)


# -----------------------------------------------------------------------------
# Attention over blocks


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


def test_a_pass_is_made_once_for_all_steps_of_its_shape(no_kernels):
    """Requests of three lengths that come and go: few shapes; and sliding, whose tables of rotations grow."""
    model = make(pos="rope")
    engine = Engine(model, block=4, batched=True)
    engine.generate(some_prompts((1, 2, 3)), max_new_tokens=12, temperature=0)
    assert set(engine.passes) == {(4, 1, None), (4, 2, None), (4, 4, None)}
    check_sliding(model)


def check_sliding(model):
    plain, batched = (Engine(model, slide=True, batched=way).generate(some_prompts(), max_new_tokens=70, temperature=0)
                      for way in (False, True))
    assert [r.tokens for r in batched] == [r.tokens for r in plain]


def test_a_cpus_kernel_reads_what_each_request_has_so_a_pass_is_made_for_each_number_of_requests():
    skip_without_kernels()
    model = make(pos="rope")
    engine = Engine(model, block=4)
    prompts = some_prompts((1, 2, 3))
    for i, prompt in enumerate(prompts):
        engine.submit(prompt, max_new_tokens=9 + i, temperature=0)
    while engine.step():
        pass
    assert set(engine.passes) == {(rows, 6, None) for rows in (1, 2, 3)}
    check_sliding(model)


@pytest.mark.parametrize("toggles", [{}, {"pos": "rope", "n_kv_head": 2, "qk_norm": "rms"}, {"n_kv_head": 1}], ids=str)
@pytest.mark.parametrize("batched", [False, True, None])
def test_without_kernels_the_tokens_are_the_same(no_kernels, toggles, batched):
    """One request after another, which is the way of a CPU then; and gathered, as on CUDA without Triton."""
    model, prompts = make(**toggles), some_prompts()
    engine = Engine(model, block=5, batched=batched)
    assert engine.pool.kernel is None and engine.batched == bool(batched)
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    assert [r.tokens for r in engine.generate(prompts, max_new_tokens=12, temperature=0)] == expected
    assert bool(engine.passes) == bool(batched)


@pytest.mark.parametrize("way", ["engine", "batched", "stream"])
def test_tokens_are_made_within_the_kernels_of_inference(monkeypatch, way):
    """Without cuDNN's: device.inference_kernels is entered and left around each pass of the model."""
    model, inside, seen = make(), [], []

    @contextlib.contextmanager
    def entered(device):
        inside.append(device)
        yield
        inside.pop()

    monkeypatch.setattr(infer, "inference_kernels", entered)
    model.register_forward_pre_hook(lambda *args: seen.append(list(inside)))
    if way == "stream":
        list(stream(model, [1, 2, 3], 4))
    else:
        Engine(model, batched=way == "batched").generate([1, 2, 3], max_new_tokens=4)
    assert len(seen) == 4 and all(devices == [torch.device("cpu")] for devices in seen) and not inside


def test_the_kernel_of_a_cpu():
    """Ours, in the dtypes that it knows."""
    skip_without_kernels()
    assert paged_kernel(torch.device("cpu"), torch.bfloat16, 64) == "cpu"
    assert paged_kernel(torch.device("cpu"), torch.float32, 33) == "cpu"
    assert paged_kernel(torch.device("cpu"), torch.float16, 64) is None


def test_no_kernel_on_a_cpu_without_a_compiler(no_kernels):
    assert paged_kernel(torch.device("cpu"), torch.bfloat16, 64) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_gets_the_same_from_both_caches(dtype):
    """DecodeCache with a CPU's kernel, with the gather, and StepCache, over the same scattered blocks: what attention
    says, and what lies in the pool afterwards."""
    skip_without_kernels()
    config = GPTConfig(block_size=24, vocab_size=20, n_layer=1, n_head=4, n_kv_head=2, n_embd=32)
    cpu = torch.device("cpu")
    pools = [Pool(config, 12, 4, dtype, cpu, kernel) for kernel in ("cpu", None, None)]
    for pool in pools:
        torch.manual_seed(0)
        pool.keys[0].normal_()
        pool.values[0].normal_()
    tables = [BlockTable(blocks, 4, 24) for blocks in ([7, 2, 3], [0, 9, 11], [5, 6, 4])]
    parts = [Part([1], first, table, 1) for first, table in zip((0, 7, 11), tables, strict=True)]
    qkv = torch.randn(1, 3, 8, 8).to(dtype)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    outputs = []
    for pool in pools[:2]:
        batch = BatchPass(None, pool, None, 3, 3)
        for i, part in enumerate(parts):
            part.table.write(batch.table[i])
        slots = torch.tensor([part.table.slot(part.first) for part in parts])
        lengths = torch.tensor([part.first + 1 for part in parts], dtype=torch.int32)
        cache = DecodeCache(pool.keys, pool.values, None, slots, batch.table, lengths, None, 4, pool.kernel)
        outputs.append(cache.attend(0, q, k, v))
    outputs.append(StepCache(pools[2], None, parts).attend(0, q, k, v))
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5  # PyTorch rounds the shares to bfloat16 too
    for pool, y in zip(pools[1:], outputs[1:], strict=True):
        assert torch.equal(pool.keys[0], pools[0].keys[0]) and torch.equal(pool.values[0], pools[0].values[0])
        torch.testing.assert_close(y, outputs[0], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("capability, dtype, head_dim, there", [
    ((8, 0), torch.bfloat16, 64, True), ((9, 0), torch.float16, 256, True), ((7, 5), torch.float16, 64, False),
    ((8, 0), torch.float32, 64, False), ((8, 0), torch.bfloat16, 264, False), ((8, 0), torch.bfloat16, 60, False)])
def test_the_paged_kernel_runs_where_the_training_kernel_does(monkeypatch, capability, dtype, head_dim, there):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kvcache, "flash_attn_with_kvcache", len)
    monkeypatch.setattr(attention_file, "flash_attn_func", len)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    cuda = torch.device("cuda")
    assert (paged_kernel(cuda, dtype, head_dim) is len) == there
    assert (attention_file.pick_attention("auto", cuda, dtype, 64, head_dim)[0] == "flash") == there


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
            each([Part([3], request.cached, request.table, wanted=1)])
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
