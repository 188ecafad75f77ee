"""
From a checkpoint to text: a generation engine with a paged key-value cache.

    engine = Engine.load("out/shakespeare_char")
    print(engine.generate("ROMEO:", max_new_tokens=200).text)
    for piece in engine.stream("ROMEO:", temperature=0.8, seed=1):
        print(piece, end="")

Requests join and leave at any step (continuous batching, Yu et al. 2022, "Orca"). Keys and values lie in blocks of one
pool (PagedAttention, Kwon et al. 2023, arXiv:2309.06180; inference/kvcache.py). A long prompt is read in chunks, beside
the tokens of other requests (Sarathi, Agrawal et al. 2023, arXiv:2308.16369). All tokens of a step pass the model as
one row, so each weight is read once. On CUDA a step of one token per request is a graph that is replayed. Each request
has its own cache and random numbers: except for rounding, its tokens do not depend on the requests beside it.

GPT.generate in model.py is the plain way: it reads the whole context for every token. The tests compare the engine with
it. Read Engine.step first: it is the whole loop.
"""

import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import CheckpointError, config_of, find, load_model, run_of
from device import inference_kernels, pick_device, pick_dtype
from inference import kernels
from inference.batch import BatchPass
from inference.calibration import convert_run
from inference.compiled import compiled_step
from inference.draws import Draws, variant
from inference.kvcache import (
    Blocks,
    BlockTable,
    Part,
    Pool,
    StepCache,
    block_digest,
    block_digests,
    paged_kernel,
)
from inference.prompts import check_prompt, encode_prompt, is_one_prompt, plain_lists, token_ids
from inference.quantize import computes_bfloat16
from inference.requests import Request
from inference.sampling import Chooser, Sampling, StopText
from inference.speculation import speculation
from model import GPT, rope_tables
from tokenizer import load_tokenizer


def load(out_dir, which="latest", device="cpu", rope_scaling="", rope_factor=1.0):
    """-> (a run's model, in eval mode and fp32 on `device`; its tokenizer; the checkpoint's state; its folder)

    `which` is latest, best or a step. If the latest is damaged, the one before it is used, with a warning on stderr.
    The tokenizer is None for a run on bare token ids. With rope_scaling the context becomes rope_factor times as long
    as the one first trained at (`stretch`). Raises CheckpointError naming the file that is missing or damaged, and
    ValueError if the context cannot become longer.
    """
    folder, state = find(out_dir, which, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    run = run_of(folder)
    try:
        # a checkpoint folder that was taken out of its run may have its own
        beside = (Path(folder) / "tokenizer.json").exists()
        tokenizer = load_tokenizer(folder if beside else run)
    except FileNotFoundError:
        tokenizer = None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"the tokenizer of {run} cannot be read: {e}") from None
    model = GPT(config_of(state, folder))
    load_model(model, folder)
    if rope_scaling:
        stretch(model, model.config, rope_scaling, rope_factor)
    return model.to(device).eval(), tokenizer, state, folder


def stretch(model, trained, rope_scaling, rope_factor):
    """Make the context of `model` rope_factor times as long as the one it was first trained at, without any training.
    `trained` is its GPTConfig. With rope_scaling "none" the positions simply continue. Raises ValueError for learned
    positions. An Engine of the model must be made again: it has tables of its own, and keys at the old positions."""
    if trained.pos != "rope":
        raise ValueError(f"a context longer than block_size={trained.block_size} needs a model with pos='rope': the "
                         "positions of this one are learned, and end there")
    block_size = round(trained.block_size / trained.rope_factor * rope_factor)
    factor = 1.0 if rope_scaling == "none" else rope_factor
    model.config = replace(trained, block_size=block_size, rope_scaling=rope_scaling, rope_factor=factor)
    cos, sin = rope_tables(model.config)
    model.rope_cos = cos.to(model.rope_cos)
    model.rope_sin = sin.to(model.rope_sin)


# -----------------------------------------------------------------------------
# The plain way, token by token


@torch.no_grad()
def stream(model, prompt, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
           presence_penalty=0.0, frequency_penalty=0.0, logit_bias=(), seed=0, eos=None):
    """Yield up to max_new_tokens token ids that follow `prompt` (at least one id), and stop before `eos`.

    Like GPT.generate it reads the last block_size tokens again for every new one. Unlike generate it yields each token
    immediately, knows every option of Sampling that changes a token, and draws on the CPU: a seed gives the same tokens
    on every device, and in the engine.
    """
    ids = token_ids(prompt)
    check_prompt(ids, model.config)
    device = next(model.parameters()).device
    choose = Chooser(Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, logit_bias=logit_bias, seed=seed,
    ), model.config.vocab_size)
    for _ in range(max_new_tokens):
        context = torch.tensor([ids[-model.config.block_size :]], device=device)
        with inference_kernels(device):
            logits, _ = model(context, last_only=True)
        token = choose(logits[0, -1].float().cpu(), ids)
        if token == eos:
            return
        yield token
        ids.append(token)


# -----------------------------------------------------------------------------
# The engine


class Engine:
    """Requests in, tokens out: `submit` and `step`, or `generate` and `stream`, which call both.

    max_tokens: how many tokens' keys and values the cache holds, over all requests; 0: four contexts. A request that
    could never fit is refused by `submit`. One that does not fit now waits; once it starts it has all the room that it
    may need. Room that is not needed keeps what finished requests left, so the next turn of a talk reads only what is
    new. After a change of the model's weights, call `engine.blocks.forget()`.
    block: tokens in a block; 0: 16, or the 256 that flash-attn's kernel needs.
    chunk: most tokens in one step.
    slide: past block_size, continue with the last block_size tokens (only with RoPE, whose positions are relative).
    Without it a request that would get there is refused.
    batched: a step of one token for each request is one BatchPass; None: on CUDA, and on a CPU with a C++ compiler.
    draws: such a step also draws the tokens, on the device; None: on CUDA.
    speculate: who proposes tokens to read ahead (inference/speculation.py): "lookup", the folder of a draft run, or a
    Speculation; empty: nobody. It does not change what is drawn.
    """

    def __init__(self, model, tokenizer=None, *, max_tokens=0, block=0, chunk=512, max_requests=32, slide=False,
                 batched=None, draws=None, speculate=""):
        config = model.config
        if slide and config.pos != "rope":
            raise ValueError("slide needs pos='rope': learned positions end with the context")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.slide = slide
        self.max_requests = max_requests
        self.chunk = max(chunk, max_requests)
        weight = model.transformer.wte.weight
        self.device = weight.device
        self.dtype = weight.dtype
        kernel = paged_kernel(self.device, self.dtype, config.head_dim)
        on_cpu = self.device.type == "cpu"
        self.batched = self.device.type == "cuda" or kernel == "cpu" if batched is None else batched

        # a CPU without bfloat16 would convert all keys and values for every token: fp32 takes half the time
        slow = self.dtype == torch.bfloat16 and on_cpu and not computes_bfloat16()
        kv_dtype = torch.float32 if slow else self.dtype
        self.block = block or (256 if callable(kernel) else 16)  # flash-attn needs 256
        count = -(-(max_tokens or 4 * config.block_size) // self.block)
        self.blocks = Blocks(count, in_a_row=on_cpu)
        self.pool = Pool(config, count, self.block, kv_dtype, self.device, kernel)

        self.passes = {}  # (rows, blocks, variant of the draws) -> BatchPass
        self.compiled = {}  # whether for several requests -> CompiledStep
        self.rope = None  # tables of all positions so far; a sliding window goes past the context
        self.extend_rope(config.block_size)
        self.draws = None
        self.rows = list(range(max_requests))  # of the draws, that no request has
        if draws or draws is None and self.batched and self.device.type == "cuda":
            self.draws = Draws(max_requests, config.vocab_size, self.device)
        self.waiting = deque()
        self.running = []
        self.speculation = speculation(speculate, self, Engine.load)
        self.tokens_read = 0  # by the model, so far; those found in the cache do not count

    @classmethod
    def load(cls, out_dir, which="latest", device="auto", dtype="auto", quantize="", rope_scaling="", rope_factor=1.0,
             **options):
        """The engine of a run's checkpoint. dtype and quantize as in quantize.convert, rope_scaling as in `load`."""
        device, _ = pick_device(device)
        dtype, _ = pick_dtype(dtype, device)
        model, tokenizer, state, _ = load(out_dir, which, device, rope_scaling, rope_factor)
        return cls(convert_run(model, dtype, quantize, out_dir, state), tokenizer, **options)

    def compile(self, steps=None, several=True, say=None):
        """Compile the steps of one new token for each request (inference/compiled.py), or read them from disk.

        steps: how many there will be, so that it is done only where it pays; None: in any case. several: also the steps
        of more than one request. say: is called with a line before something is compiled. -> whether all of them are
        compiled now. Raises RuntimeError with the reason why that cannot be; the engine works all the same.
        """
        if not self.batched:
            raise RuntimeError(kernels.trouble() or f"on {self.device} in this dtype the requests of a step are apart")
        for many in (False, True) if several else (False,):
            step = compiled_step(self.model, self.pool, many, steps, say)
            if step is None:
                return False
            self.compiled[many] = step
            self.passes.clear()
        return True

    def try_to_compile(self, wish, steps, several, say):
        """For a script: compile if `wish` is true, or if it is None and that pays for so many steps. `say` gets a line
        before something is compiled, and one with the reason if that fails."""
        if self.device.type == "cpu" and kernels.trouble():
            say(f"no fast kernels for this CPU, generation takes about twice as long: {kernels.trouble()}")
        if wish is False or wish is None and not self.batched:
            return
        try:
            self.compile(None if wish else steps, several, say)
        except RuntimeError as e:
            say(f"warning: the step of a token cannot be compiled here ({e}); running uncompiled")

    @property
    def keys(self):
        """The cached keys of each layer, (slots, n_kv, head_dim)."""
        return self.pool.keys

    @property
    def kv_dtype(self):
        return self.pool.dtype

    @property
    def kv_bytes(self):
        """Bytes of the cache, used or not."""
        return sum(t.numel() * t.element_size() for t in (*self.pool.keys, *self.pool.values))

    # -------------------------------------------------------------------------
    # A request: submit, admit, step, finish

    def submit(self, prompt, sampling=None, **changes):
        """Queue a prompt. Arguments, result and errors are those of `prepare`."""
        request = self.prepare(prompt, sampling, **changes)
        self.waiting.append(request)
        return request

    def prepare(self, prompt, sampling=None, **changes):
        """A Request that is not queued yet, of a prompt: a string, or a list, array or tensor of ids.

        It changes nothing in the engine, so any thread may call it while another one steps. `changes` are fields of
        Sampling that differ from `sampling`. Raises ValueError for a request that never fits.
        """
        sampling = replace(sampling or Sampling(), **changes)
        if isinstance(prompt, str) and self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give the prompt as a list of ids")
        ids = encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else token_ids(prompt)
        check_prompt(ids, self.model.config)
        window = self.model.config.block_size
        total = len(ids) + sampling.max_new_tokens - 1  # the last token is drawn, never read
        if len(ids) > window or (total > window and not self.slide):
            raise ValueError(f"{len(ids)} tokens of prompt and {sampling.max_new_tokens} new ones do not fit the "
                             f"context of {window}: shorten one of them")
        blocks_needed = -(-min(total, window) // self.block)
        if blocks_needed > len(self.blocks.users):
            raise ValueError(f"a request of {min(total, window)} tokens never fits into max_tokens="
                             f"{len(self.blocks.users) * self.block}")
        choose = Chooser(sampling, self.model.config.vocab_size)
        decode = self.tokenizer.stream_decoder() if self.tokenizer else lambda token: ""
        request = Request(ids, len(ids), sampling, blocks_needed, choose, decode, StopText(sampling.stop))
        if total <= window:
            request.digests = block_digests(ids, self.block)
        return request

    def admit(self):
        """Start waiting requests, in their order, as long as there is room for all the blocks that they may need."""
        while self.waiting and len(self.running) < self.max_requests:
            request = self.waiting[0]
            shared = []
            # log-probabilities of the prompt need the logits of all its tokens, so all must be read
            if request.digests and not request.sampling.prompt_logprobs:
                # the last token is always read: the next one follows from it
                shared = self.blocks.share(request.digests[: (request.prompt_tokens - 1) // self.block])
            own = request.blocks_needed - len(shared)
            if own > self.blocks.free:
                self.blocks.release(shared)
                return
            window = len(self.blocks.users) * self.block  # never reached
            if self.slide:
                window = self.model.config.block_size
            behind = shared[-1] if shared else None
            request.table = BlockTable(shared + self.blocks.allocate(own, behind), self.block, window)
            request.cached = request.cached_tokens = len(shared) * self.block
            self.running.append(self.waiting.popleft())

    @torch.no_grad()
    def step(self):
        """One pass of the model over the next token, or the next piece of the prompt, of each running request. -> the
        requests that got a token; some may have finished

        With draws on the device it is two passes: the next tokens in one, whose shapes do not change, and the pieces of
        prompts in another. Otherwise one pass reads the weights once for all of them.
        """
        self.admit()
        parts = self.next_parts()
        if not parts:
            return []
        self.extend_rope(max(request.cached + count for request, count in parts))
        ready = []
        with inference_kernels(self.device):
            if self.draws is None:
                return self.read_and_draw(parts)
            singles = [request for request, _ in parts if request.reads_next_token]
            pieces = [(request, count) for request, count in parts if not request.reads_next_token]
            if singles:
                ready += self.draw_next(singles)
            if pieces:
                ready += self.read_and_draw(pieces)
        return ready

    def read_and_draw(self, parts):
        """A pass whose tokens are drawn on the host. -> the requests that got one"""
        ready = []
        for (request, count), logits in zip(parts, self.forward(parts), strict=True):
            self.publish(request, count)
            if request.sampling.prompt_logprobs:
                request.score_prompt(logits)
            if request.cached == len(request.ids):
                self.accept(request, logits[-1 - len(request.proposals) :])
                ready.append(request)
        return ready

    def draw(self, request, logits):
        """Choose the next token from `logits` (vocab_size,), fp32 on the CPU."""
        self.take(request, request.choose(logits, request.ids), logits)

    def draw_next(self, requests):
        """A pass of one token of each request, whose next tokens are drawn on the device. -> the requests"""
        for request in requests:
            if request.row is None:
                request.row = self.rows.pop()
            if request.drawn != len(request.ids):  # its last token was drawn on the host
                self.draws.load(request.row, request.sampling, request.ids, request.prompt_tokens)
        parts = [Part(request.ids[-1:], request.cached, request.table, 1) for request in requests]
        rows = [request.row for request in requests]
        samplings = [request.sampling for request in requests]
        self.draws.next_numbers(rows, [request.choose for request in requests])
        batch = self.batch_pass(parts, variant(samplings, self.model.config.vocab_size))
        tokens, logits = batch.draw(parts, rows)
        for place, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            self.publish(request, 1)
            request.choose.count(token)
            request.drawn = len(request.ids) + 1
            self.take(request, token, logits[place].cpu() if request.wants_logprobs else None)
        return requests

    def take(self, request, token, logits):
        """A token that was drawn: the request has it, and may end with it."""
        eos = self.tokenizer.eos if self.tokenizer else None
        if why := request.take(token, logits, eos):
            self.finish(request, why)

    def next_parts(self):
        """The tokens that the next pass reads, at most `chunk` in all. -> [(request, how many of its tokens), ...]"""
        room = self.chunk
        parts = []
        # the request that waits for the fewest tokens comes first: a long prompt does not hold up the others
        for request in sorted(self.running, key=lambda r: len(r.ids) - r.cached):
            least = 0 if parts else 1
            count = min(len(request.ids) - request.cached, max(room, least))
            if count:
                parts.append((request, count))
                room -= count
        if self.speculation:
            self.speculation.propose(parts, room, self.model.config.block_size)
        return parts

    def forward(self, parts):
        """Logits (rows, vocab_size), fp32 on the CPU, of each of the `parts`: of its last token if that is the last of
        the request, of its proposals, and with prompt_logprobs of each token of the prompt. -> tuple, in the order of
        `parts`; their keys and values are in the cache afterwards"""
        reads = []
        for request, count in parts:
            first = request.cached
            end = first + count
            wanted = int(end == len(request.ids))  # the last token is read, so its logits are wanted
            if request.sampling.prompt_logprobs and first < request.prompt_tokens:
                wanted = count
            wanted += len(request.proposals)
            reads.append(Part(request.ids[first:end] + request.proposals, first, request.table, wanted))
        return self.read(reads)

    def read(self, reads):
        """One pass over a list of Part. -> a tuple of the logits that each wants, (wanted, vocab_size), fp32 on the CPU
        """
        rows = sum(len(part.tokens) for part in reads)
        all_wanted = all(part.wanted == len(part.tokens) for part in reads)
        if self.batched and all_wanted and rows <= max(len(reads), kernels.MOST_ROWS):
            # a token and its proposals are rows like those of several requests: each sees what lies before it
            singles = [Part([token], part.first + i, part.table, 1)
                       for part in reads for i, token in enumerate(part.tokens)]
            logits = self.batch_pass(singles)(singles)[: len(singles)].cpu()
        else:
            idx = torch.tensor([[token for part in reads for token in part.tokens]], device=self.device)  # (1, N)
            logits = self.model(idx, cache=StepCache(self.pool, self.rope, reads))[0][0].float().cpu()
        return logits.split([part.wanted for part in reads])

    def batch_pass(self, parts, variant=None):
        """The BatchPass that has room for these parts, and draws as `variant` says. On CUDA its sizes are powers of
        two: few graphs serve all steps."""
        rows = len(parts)
        if self.pool.kernel == "cpu":
            blocks = -(-self.model.config.block_size // self.block)  # as many as a request can have
        else:
            longest = max(-(-min(part.first + 1, part.table.window) // self.block) for part in parts)
            rows = 1 << (rows - 1).bit_length()
            blocks = 1 << (longest - 1).bit_length()
        if (rows, blocks, variant) not in self.passes:
            compiled = self.compiled.get(rows > 1) if rows <= kernels.MOST_ROWS else None
            self.passes[rows, blocks, variant] = BatchPass(self.model, self.pool, self.rope, rows, blocks, compiled,
                                                           self.draws, variant)
        return self.passes[rows, blocks, variant]

    def extend_rope(self, count):
        """Let the rotary tables reach `count` positions."""
        if self.model.config.pos != "rope" or (self.rope is not None and len(self.rope[0]) >= count):
            return
        if self.rope is not None:
            count = 2 * count  # a window that slides will need more and more
        tables = rope_tables(self.model.config, torch.arange(count))
        self.rope = tuple(table.to(self.device) for table in tables)
        self.passes.clear()  # their graphs read the old tables

    def publish(self, request, count):
        """`count` more tokens are in the cache. From now on others may share the blocks that they fill."""
        before = request.cached
        request.cached = before + count
        self.tokens_read += count
        if request.digests is None:
            return
        for i in range(before // self.block, request.cached // self.block):
            if i == len(request.digests):  # the block has tokens that were drawn
                parent = request.digests[-1] if i else b""
                tokens = request.ids[i * self.block : (i + 1) * self.block]
                request.digests.append(block_digest(parent, tokens))
            self.blocks.publish(request.digests[i], request.table.blocks[i])

    def accept(self, request, logits):
        """Draw tokens of a request from logits (1 + proposals, vocab_size) until one is not what was proposed: it is
        kept like the others. Keys and values of an accepted proposal are in the cache already."""
        proposals = request.proposals
        request.proposals = []
        self.draw(request, logits[0])
        for token, row in zip(proposals, logits[1:], strict=True):
            if request.finish or request.ids[-1] != token:
                return
            self.publish(request, 1)
            self.draw(request, row)

    def finish(self, request, why):
        """End a request: complete its text, and free its blocks, which stay known while nobody needs their room."""
        request.finish = why
        if not request.until.stopped:
            request.text += request.until(request.decode(None), last=True)
        if request in self.running:
            self.running.remove(request)
            if request.row is not None:
                self.rows.append(request.row)
            self.blocks.release(request.blocks, (request.digests or [])[: request.cached // self.block])
        elif request in self.waiting:
            self.waiting.remove(request)

    def cancel(self, request):
        """End a request early. A finished one stays as it is."""
        if not request.finish:
            self.finish(request, "cancelled")

    # -------------------------------------------------------------------------
    # All of it in one call

    def generate(self, prompts, sampling=None, **changes):
        """The finished Request of a prompt, or a list of them for several prompts.

        sampling: one for all of several prompts, or a list with one for each.
        """
        several = not is_one_prompt(prompts)
        prompts = plain_lists(prompts) if several else [prompts]
        samplings = sampling if isinstance(sampling, (list, tuple)) else [sampling] * len(prompts)
        requests = []
        try:
            for prompt, own_sampling in zip(prompts, samplings, strict=True):
                requests.append(self.submit(prompt, own_sampling, **changes))
            while not all(request.finish for request in requests):
                self.step()
        finally:  # also if one was refused, or on Ctrl-C
            for request in requests:
                self.cancel(request)
        return requests if several else requests[0]

    def stream(self, prompt, sampling=None, **changes):
        """Yield the text that follows a prompt as soon as it is certain. Other requests share its steps."""
        request = self.submit(prompt, sampling, **changes)
        shown = 0  # characters
        try:
            while not request.finish:
                self.step()
                if len(request.text) > shown:
                    yield request.text[shown:]
                    shown = len(request.text)
        finally:
            self.cancel(request)
