"""
The key-value cache of inference: which blocks are whose, and attention over them.

Keys and values of all requests lie in one pool of blocks (PagedAttention, Kwon et al. 2023, arXiv:2309.06180). A step
of the engine (infer.py) is a StepCache: any number of tokens of each request, attention one request after another, over
a view where its blocks are neighbours. Or it is a BatchPass: one token of each, attention of all at once, over a table.
"""

import torch
import torch.nn.functional as F

from model import takes_flash

try:  # optional kernels: pip install flash-attn (CUDA only)
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None


class Blocks:
    """Which blocks of the cache are whose. A block may be shared by requests whose prompts begin alike."""

    def __init__(self, count):
        self.users = [0] * count
        self.free = count
        self.known = {}  # all tokens up to the end of a block -> the block that holds the last of them
        self.names = {}  # and back

    def take(self, count):
        """Blocks of one's own: the first run of neighbours where there is one, as a view needs no copy. -> list"""
        assert count <= self.free, "asked for more than there is"
        run = 0
        for i, users in enumerate(self.users):
            run = 0 if users else run + 1
            if run == count:
                chosen = list(range(i + 1 - count, i + 1))
                break
        else:
            chosen = [i for i, users in enumerate(self.users) if not users][:count]
        for i in chosen:
            self.users[i] = 1
        self.free -= count
        return chosen

    def share(self, tokens, size):
        """Blocks that hold the beginning of `tokens` already, less the last token. They are this request's, too."""
        found = []
        while (end := (len(found) + 1) * size) < len(tokens) and tuple(tokens[:end]) in self.known:
            found.append(self.known[tuple(tokens[:end])])
        for i in found:
            self.users[i] += 1
        return found

    def publish(self, tokens, block):
        """`block` holds the last of `tokens`, and they will not change."""
        if tokens not in self.known and block not in self.names:
            self.known[tokens], self.names[block] = block, tokens

    def release(self, blocks):
        for i in blocks:
            self.users[i] -= 1
            if not self.users[i]:
                self.free += 1
                self.known.pop(self.names.pop(i, None), None)


class StepCache:
    """What model.forward gets for one step: its tokens' positions, and attention over what each request has."""

    def __init__(self, engine, parts):
        """`parts`: (request, tokens) in the order of the step's row; the request's `cached` is still what it was."""
        device, self.engine = engine.device, engine
        self.parts, self.rows = [], []  # a part: (first row, rows, first position, where its keys lie)
        places, slots, at = [], [], 0
        for request, tokens in parts:
            first, n = request.cached, len(tokens)
            places += range(first, first + n)
            slots += [request.slot(place) for place in range(first, first + n)]
            self.parts.append((at, n, first, request.view(first + n)))
            at += n
            if first + n == len(request.ids):
                self.rows.append(at - 1)
        self.positions = torch.tensor(places, device=device)
        self.slots = torch.tensor(slots, device=device)
        self.rope = None
        if engine.rope is not None:
            self.rope = tuple(table[self.positions][:, None] for table in engine.rope)

    def attend(self, layer, q, k, v):
        """Keep k and v (1, N, n_kv, D); softmax(q k^T / sqrt(D)) v for q (1, N, n_q, D), each request by itself."""
        keys, values = self.engine.keys[layer], self.engine.values[layer]
        keys.index_copy_(0, self.slots, k[0].to(keys.dtype))
        values.index_copy_(0, self.slots, v[0].to(values.dtype))
        rows = q[0].to(keys.dtype)
        out = [attend_one(rows[at : at + n], keys[view], values[view], first) for at, n, first, view in self.parts]
        return (out[0] if len(out) == 1 else torch.cat(out))[None].to(q.dtype)


class BatchPass:
    """What model.forward gets for a step of one token for each request, in shapes that do not depend on the requests:
    its tensors are filled anew for each step, so that on CUDA a graph of the pass can be replayed.

    rows: requests at most, those too few being made up by the first one again; blocks: of the longest table.
    """

    def __init__(self, engine, rows, blocks):
        self.engine, self.rows, self.graph = engine, slice(None), None
        whole = {"dtype": torch.long, "device": engine.device}
        self.tokens, self.positions = torch.zeros(1, rows, **whole), torch.zeros(rows, **whole)
        self.slots = torch.zeros(rows, **whole)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=engine.device)
        self.table = torch.zeros(rows, blocks, dtype=torch.int32, device=engine.device)

    def __call__(self, requests):
        """-> logits (len(requests), vocab_size) of each one's next token, fp32 on the CPU"""
        rows, blocks = self.table.shape
        each = requests + requests[:1] * (rows - len(requests))
        self.fill(self.tokens, [[r.ids[r.cached] for r in each]])
        self.fill(self.positions, [r.cached for r in each])
        self.fill(self.slots, [r.slot(r.cached) for r in each])
        self.fill(self.lengths, [min(r.cached + 1, r.window) for r in each])
        self.fill(self.table, [(r.blocks + [0] * blocks)[:blocks] for r in each])
        if self.engine.device.type == "cuda":
            with torch.cuda.device(self.engine.device):  # a graph is captured and replayed on the current device
                if self.graph is None:
                    self.capture()
                self.graph.replay()
        else:
            self.out = self.run()
        return self.out[: len(requests)].cpu()

    def fill(self, buffer, values):
        buffer.copy_(torch.tensor(values, dtype=buffer.dtype))

    def run(self):
        self.rope = None
        if self.engine.rope is not None:
            self.rope = tuple(table[self.positions][:, None] for table in self.engine.rope)
        return self.engine.model(self.tokens, cache=self)[0][0].float()

    def capture(self):
        """Record the pass as a graph; what it calls is set up before, on a stream beside, as PyTorch asks for. All
        graphs of an engine share one pool of memory: they run one at a time, and the logits of each are copied at once.
        """
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        if self.engine.graph_pool is None:
            self.engine.graph_pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(self.graph, pool=self.engine.graph_pool):
            self.out = self.run()

    def attend(self, layer, q, k, v):
        """As StepCache's, for all requests at once."""
        engine = self.engine
        keys, values = engine.keys[layer], engine.values[layer]
        keys.index_copy_(0, self.slots, k[0].to(keys.dtype))
        values.index_copy_(0, self.slots, v[0].to(values.dtype))
        keys, values = (t.unflatten(0, (-1, engine.block)) for t in (keys, values))
        y = attend_blocks(q[0].to(keys.dtype), keys, values, self.table, self.lengths, engine.kernel)
        return y[None].to(q.dtype)


def attend_blocks(q, k, v, table, lengths, kernel=None):
    """Attention of q (B, n_q, D), one token each, over the first `lengths` (B,) of the keys in the blocks of `table`
    (B, n), of k and v (blocks, block, n_kv, D). -> (B, n_q, D)"""
    if kernel is not None:
        return kernel(q[:, None], k, v, cache_seqlens=lengths, block_table=table)[:, 0]
    k, v = (t[table].flatten(1, 2).transpose(1, 2) for t in (k, v))  # (B, n_kv, n * block, D)
    seen = torch.arange(k.size(2), device=q.device) < lengths[:, None]
    q = q.unflatten(1, (k.size(1), -1))  # (B, n_kv, group, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None]).flatten(1, 2)


def new_cache(config, slots, dtype, device):
    """Keys or values of a layer: (slots, n_kv, D). On a CPU a head's rows lie one after another, as it reads them."""
    if device.type == "cpu":
        return torch.zeros(config.kv_heads, slots, config.head_dim, dtype=dtype).transpose(0, 1)
    return torch.zeros(slots, config.kv_heads, config.head_dim, dtype=dtype, device=device)


def paged_kernel(device, dtype, head_dim):
    """flash-attn's kernel that reads keys and values by a table of blocks, where it is installed and can run."""
    return flash_attn_with_kvcache if takes_flash(device, dtype, head_dim) else None


def attend_one(q, k, v, first):
    """Attention of q (T, n_q, D), at positions first, first + 1, ..., over k and v (L, n_kv, D). -> (T, n_q, D)

    The query heads that share one key and value head are so many more rows: keys and values are never repeated.
    """
    T, n_q, D = q.shape
    group = n_q // k.size(1)
    k, v, mask = k.transpose(0, 1)[None], v.transpose(0, 1)[None], None
    if T == 1:
        return F.scaled_dot_product_attention(q.view(1, -1, group, D), k, v).view(1, n_q, D)
    q = q.view(T, -1, group, D).permute(1, 2, 0, 3).reshape(1, -1, group * T, D)
    causal = first == 0 and group == 1
    if not causal:
        mask = torch.ones(T, k.size(2), dtype=torch.bool, device=q.device).tril(first).repeat(group, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.view(n_q // group, group, T, D).permute(2, 0, 1, 3).reshape(T, n_q, D)
