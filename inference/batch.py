"""
A pass of the model over one new token of each request, in fixed shapes: what can be captured as a CUDA graph, with the
draw of the next tokens at its end.
"""

import torch

from inference.draws import NO_NUMBERS
from inference.kvcache import DecodeCache, rope_at


class BatchPass:
    """Steps of one token of each request, in fixed shapes.

    rows: batch size of the graph; unused rows repeat the first request. blocks: length of the longest table.
    rope: the tables of rope_tables, or None with learned positions. compiled: tokens and a DecodeCache -> logits, in
    place of the model (inference/compiled.py). draws: the engine's Draws, if the pass draws as `variant` says.
    """

    def __init__(self, model, pool, rope, rows, blocks, compiled=None, draws=None, variant=None):
        self.model = model
        self.pool = pool
        self.rope_tables = rope
        self.compiled = compiled
        self.draws = draws if variant else None
        self.variant = variant
        self.graph = None
        device = pool.device
        self.tokens = torch.zeros(1, rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.slots = torch.zeros(rows, dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)  # tokens that each row sees
        self.table = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        self.logits = None  # (rows, vocab_size), fp32, of the last pass
        self.ids = None  # (rows,) that it drew
        if self.draws:
            self.draw_rows = torch.full((rows,), draws.spare, device=device)

    def draw(self, parts, draw_rows):
        """Parts of one token, of the requests in these rows of the draws -> (the ids that follow, list; logits)"""
        spare = [self.draws.spare] * (len(self.draw_rows) - len(parts))
        self.fill(self.draw_rows, draw_rows + spare)
        logits = self(parts)
        ids = self.ids.tolist()[: len(parts)]
        if -1 in ids:
            raise ValueError(NO_NUMBERS)
        return ids, logits

    def __call__(self, parts):
        """Parts of one token -> logits (rows, vocab_size) of what follows them, fp32 on the device; those of the parts
        come first."""
        rows = len(self.table)
        padded = parts + parts[:1] * (rows - len(parts))
        self.fill(self.tokens, [[part.tokens[0] for part in padded]])
        self.fill(self.positions, [part.first for part in padded])
        self.fill(self.slots, [part.table.slot(part.first) for part in padded])
        self.fill(self.lengths, [min(part.first + 1, part.table.window) for part in padded])
        for row, part in enumerate(padded):
            part.table.write(self.table[row])
        if self.pool.device.type == "cuda":
            with torch.cuda.device(self.pool.device):  # a graph is captured and replayed on the current device
                if self.graph is None:
                    self.capture()
                self.graph.replay()
        else:
            self.run()
        return self.logits

    def fill(self, buffer, values):
        buffer.copy_(torch.tensor(values, dtype=buffer.dtype))

    def run(self):
        rope = rope_at(self.rope_tables, self.positions)
        cache = DecodeCache(self.pool.keys, self.pool.values, self.positions, self.slots, self.table, self.lengths,
                            rope, self.pool.size, self.pool.kernel)
        if self.compiled:
            self.logits = self.compiled(self.tokens, cache)
        else:
            self.logits = self.model(self.tokens, cache=cache)[0][0].float()
        if self.draws:
            self.ids = self.draws.draw(self.logits, self.draw_rows, self.variant)

    def capture(self):
        """Record the pass as a graph, after two warm-up passes on another stream, as PyTorch asks.

        All graphs share one pool of memory: they run one at a time, and their logits are copied before the next runs.
        """
        if self.draws:  # the passes to warm up shall not count as draws of the requests
            rows = self.draw_rows.clone()
            self.draw_rows.fill_(self.draws.spare)
        warmup = torch.cuda.Stream()
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(warmup)
        if self.draws:
            self.draw_rows.copy_(rows)
        self.graph = torch.cuda.CUDAGraph()
        if self.pool.graph_memory is None:
            self.pool.graph_memory = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(self.graph, pool=self.pool.graph_memory):
            self.run()
