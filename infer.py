"""
From a checkpoint to text: a generation engine with a paged key-value cache.

    engine = Engine.load("out/shakespeare_char")
    print(engine.generate("ROMEO:", max_new_tokens=200).text)
    for piece in engine.stream("ROMEO:", temperature=0.8, seed=1):
        print(piece, end="")

Requests join and leave at any step (continuous batching, Yu et al. 2022, "Orca"); keys and values lie in blocks that
are handed out from one pool (PagedAttention, Kwon et al. 2023, arXiv:2309.06180); a long prompt is read in chunks
beside the others' tokens (Sarathi, Agrawal et al. 2023, arXiv:2308.16369). All tokens of a step go through the model as
one row, so each weight is read once; attention is per request. On CUDA a step of one token each is a graph that is
replayed, attention of all requests being one kernel over their tables of blocks. A request has its own cache and random
numbers: what it draws does not depend on what is computed beside it, but for rounding.

GPT.generate in model.py is the plain way, which reads the whole context for every token. The tests hold the engine to
what it generates.
"""

import operator
import sys
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from checkpoint import CheckpointError, config_of, find, load_model, run_of
from device import inference_kernels, pick_device, pick_dtype
from inference.kvcache import BatchPass, Blocks, StepCache, new_cache, paged_kernel
from inference.quantize import computes_bfloat16, convert
from inference.sampling import Sampling, StopText, penalise, probabilities
from model import GPT, rope_tables
from tokenizer import load_tokenizer


def load(out_dir, which="latest", device="cpu", rope_scaling="", rope_factor=1.0):
    """A run's model in eval mode and fp32 on `device`, its tokenizer, the checkpoint's state and folder.

    `which` is latest, best or a step; a damaged latest is passed over, which is said on stderr. The tokenizer is None
    for a run on token ids alone. With rope_scaling the context is rope_factor times as long as it was (`stretch`).
    Raises CheckpointError naming what is missing or damaged, ValueError where the context cannot be longer.
    """
    folder, state = find(out_dir, which, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    run = run_of(folder)
    try:
        tokenizer = load_tokenizer(next((f for f in (folder, run) if (Path(f) / "tokenizer.json").exists()), run))
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
    """Give `model`, trained as the GPTConfig `trained` says, a context rope_factor times as long as the one that it was
    first trained at, without any training. With rope_scaling "none" its positions go on past that. Raises ValueError
    where they are learned: there are no more."""
    if trained.pos != "rope":
        raise ValueError(f"a context longer than block_size={trained.block_size} needs a model with pos='rope': the "
                         "positions of this one are learned, and end there")
    size = round(trained.block_size / trained.rope_factor * rope_factor)
    factor = 1.0 if rope_scaling == "none" else rope_factor
    model.config = replace(trained, block_size=size, rope_scaling=rope_scaling, rope_factor=factor)
    for name, table in zip(("rope_cos", "rope_sin"), rope_tables(model.config), strict=True):
        setattr(model, name, table.to(getattr(model, name)))


# -----------------------------------------------------------------------------
# The plain way, token by token


@torch.no_grad()
def stream(model, prompt, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
           seed=0, eos=None):
    """Yield up to max_new_tokens token ids that follow `prompt` (at least one id), and stop before `eos`.

    Like GPT.generate it reads the last block_size tokens again for every new one. It stays beside generate because it
    yields each token at once, and draws with every option of Sampling and a seed of its own, on the CPU: the same seed
    gives the same tokens on every device, and the same tokens as the engine's.
    """
    prompt = token_ids(prompt)
    check_prompt(prompt, model.config)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    ids = torch.tensor([prompt], dtype=torch.long, device=device)
    for _ in range(max_new_tokens):
        with inference_kernels(device):
            logits, _ = model(ids[:, -model.config.block_size :], last_only=True)
        logits = penalise(logits[0, -1].float().cpu(), ids[0].tolist(), repetition_penalty)
        probs = probabilities(logits, temperature, top_k, top_p, min_p)
        token = int(torch.multinomial(probs, 1, generator=generator))
        if token == eos:
            return
        yield token
        ids = torch.cat((ids, torch.tensor([[token]], device=device)), dim=1)


def is_id(value):
    """Whether a value is a whole number, of Python, numpy or torch."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def token_ids(prompt):
    """A list, tuple, numpy array or tensor of token ids (T,) -> list of int. Raises ValueError for anything else."""
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(prompt, (list, tuple)) or not all(map(is_id, prompt)):
        raise ValueError(f"a prompt is a string or one row of token ids, which are whole numbers, not {prompt!r:.80}")
    return [operator.index(i) for i in prompt]


def check_prompt(prompt, config):
    if not prompt:
        raise ValueError("the prompt is empty: it needs at least one token, such as the tokenizer's bos")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise ValueError(f"the prompt has a token outside the model's vocabulary of {config.vocab_size}")


# -----------------------------------------------------------------------------
# The engine


@dataclass(eq=False)
class Request:
    """A prompt and what follows it so far."""

    ids: list  # the prompt's tokens, then those that were drawn
    sampling: Sampling
    prompt_tokens: int = 0
    text: str = ""  # what follows the prompt, up to a stop string
    logprobs: list = field(default_factory=list)
    finish: str = ""  # why it ended: length | eos | stop | cancelled; empty while it goes on
    cached: int = 0  # tokens whose keys and values are kept
    blocks: list = field(default_factory=list)

    @property
    def tokens(self):
        return self.ids[self.prompt_tokens :]

    def place(self, blocks, size, window):
        """Where in the cache it lives: `blocks` of `size` tokens, which go round where a window slides."""
        self.blocks, self.size, self.window = blocks, size, window
        self.run = all(b == a + 1 for a, b in zip(blocks, blocks[1:], strict=False))

    def slot(self, place):
        place %= self.window
        return self.blocks[place // self.size] * self.size + place % self.size

    def view(self, count):
        """Index of its first `count` tokens (of a window that went round, all of it): a slice, or a list."""
        count = min(count, self.window)
        if self.run:
            return slice(self.blocks[0] * self.size, self.blocks[0] * self.size + count)
        return [self.slot(place) for place in range(count)]


class Engine:
    """Requests in, tokens out. `submit` and `step`, or `generate` and `stream`, which do both.

    max_tokens: how many tokens' keys and values are held at most, over all requests. A request that could never fit is
    refused by `submit`; one that does not fit now waits, and has all the room that it may need once it starts.
    slide: past block_size go on with the last block_size tokens (RoPE alone: positions are relative); else a request
    that would get there is refused.
    block: tokens of a block; 0: 16, or the 256 that flash-attn's kernel asks for, where it is used.
    batched: a step of one token each is one BatchPass; none: on CUDA.
    """

    def __init__(self, model, tokenizer=None, *, max_tokens=0, block=0, chunk=512, max_requests=32, slide=False,
                 batched=None):
        self.model, self.tokenizer, self.slide = model.eval(), tokenizer, slide
        config, weight = model.config, model.transformer.wte.weight
        if slide and config.pos != "rope":
            raise ValueError("slide needs pos='rope': learned positions end with the context")
        self.device, self.dtype = weight.device, weight.dtype
        self.max_requests, self.chunk = max_requests, max(chunk, max_requests)
        self.batched, self.passes = self.device.type == "cuda" if batched is None else batched, {}
        self.graph_pool = None  # of memory, for the graphs of all passes
        self.kernel = paged_kernel(self.device, self.dtype, config.head_dim)
        self.block = block = block or (256 if self.kernel else 16)
        count = -(-(max_tokens or 4 * config.block_size) // block)
        self.blocks = Blocks(count)
        # a CPU without bfloat16 would convert all keys and values for every token: fp32 takes half the time
        slow = self.dtype == torch.bfloat16 and self.device.type == "cpu" and not computes_bfloat16()
        kept = torch.float32 if slow else self.dtype
        self.keys, self.values = (
            [new_cache(config, count * block, kept, self.device) for _ in range(config.n_layer)] for _ in range(2)
        )
        self.rope = None
        self.extend_rope(config.block_size)
        self.waiting, self.running = deque(), []

    @classmethod
    def load(cls, out_dir, which="latest", device="auto", dtype="auto", quantize="", rope_scaling="", rope_factor=1.0,
             **options):
        """The engine of a run's checkpoint. dtype and quantize as in weights.convert, rope_scaling as in `load`."""
        where = pick_device(device)[0]
        model, tokenizer, _, _ = load(out_dir, which, where, rope_scaling, rope_factor)
        return cls(convert(model, pick_dtype(dtype, where)[0], quantize), tokenizer, **options)

    def extend_rope(self, count):
        if self.model.config.pos == "rope" and (self.rope is None or len(self.rope[0]) < count):
            more = count if self.rope is None else 2 * count  # than needed, where a window slides on and on
            tables = rope_tables(self.model.config, torch.arange(more))
            self.rope = tuple(table.to(self.device) for table in tables)
            self.passes.clear()  # whose graphs read the tables that were

    @property
    def kv_dtype(self):
        return self.keys[0].dtype

    @property
    def kv_bytes(self):
        """Bytes of the cache, used or not."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def submit(self, prompt, sampling=None, **changes):
        """Queue a prompt: a string, or a list, array or tensor of ids. -> Request. Raises ValueError for one that
        cannot be served."""
        sampling = replace(sampling or Sampling(), **changes)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer: give the prompt as a list of ids")
            prompt = self.tokenizer.encode(prompt) if prompt else [self.tokenizer.bos]
            if prompt == [None]:
                raise ValueError("the prompt is empty, and the tokenizer has no token for the beginning of a text")
        prompt = token_ids(prompt)
        check_prompt(prompt, self.model.config)
        window, total = self.model.config.block_size, len(prompt) + sampling.max_new_tokens - 1
        if len(prompt) > window or total > window and not self.slide:
            raise ValueError(f"{len(prompt)} tokens of prompt and {sampling.max_new_tokens} new ones do not fit the "
                             f"context of {window}: shorten one of them")
        needs = -(-min(total, window) // self.block)
        if needs > len(self.blocks.users):
            raise ValueError(f"a request of {min(total, window)} tokens never fits into max_tokens="
                             f"{len(self.blocks.users) * self.block}")
        request = Request(list(prompt), sampling, len(prompt))
        request.needs, request.generator = needs, torch.Generator().manual_seed(sampling.seed)
        request.decode = self.tokenizer.stream_decoder() if self.tokenizer else lambda i: ""
        request.until = StopText(sampling.stop)
        self.waiting.append(request)
        return request

    def cancel(self, request):
        """End a request now; its room is free for others."""
        if not request.finish:
            self.end(request, "cancelled")

    def end(self, request, why):
        request.finish = why
        request.text += "" if request.until.stopped else request.until(request.decode(None), last=True)
        if request in self.running:
            self.running.remove(request)
            self.blocks.release(request.blocks)
        elif request in self.waiting:
            self.waiting.remove(request)

    def admit(self):
        """Start waiting requests, in their order, for as long as there is room for all they may need."""
        while self.waiting and len(self.running) < self.max_requests:
            request = self.waiting[0]
            shared = [] if self.slide else self.blocks.share(request.ids, self.block)
            if request.needs - len(shared) > self.blocks.free:
                self.blocks.release(shared)
                return
            own = self.blocks.take(request.needs - len(shared))
            window = self.model.config.block_size if self.slide else len(self.blocks.users) * self.block
            request.place(shared + own, self.block, window)
            request.cached = len(shared) * self.block
            self.running.append(self.waiting.popleft())

    @torch.no_grad()
    def step(self):
        """One pass of the model over each request's next token or piece of its prompt. -> those that got a token"""
        self.admit()
        room, parts = self.chunk, []
        for request in sorted(self.running, key=lambda r: len(r.ids) - r.cached):  # who waits for one token goes first
            n = min(len(request.ids) - request.cached, max(room, 1 if not parts else 0))
            if n:
                parts.append((request, request.ids[request.cached : request.cached + n]))
                room -= n
        if not parts:
            return []
        self.extend_rope(max(request.cached + len(tokens) for request, tokens in parts))
        with inference_kernels(self.device):
            logits = self.forward(parts)
        for request, tokens in parts:
            self.keep(request, len(tokens))
        ready = [request for request, _ in parts if request.cached == len(request.ids)]
        for request, row in zip(ready, logits, strict=True):
            self.draw(request, row)
        return ready

    def forward(self, parts):
        """Logits (rows, vocab_size), fp32 on the CPU, of each request whose tokens are all in `parts`, in their order.
        Their keys and values are in the cache."""
        if self.batched and all(request.cached + 1 == len(request.ids) for request, _ in parts):
            needed = max(-(-min(len(request.ids), request.window) // self.block) for request, _ in parts)
            rows, blocks = (1 << (n - 1).bit_length() for n in (len(parts), needed))  # few shapes serve all steps
            if (rows, blocks) not in self.passes:
                self.passes[rows, blocks] = BatchPass(self, rows, blocks)
            return self.passes[rows, blocks]([request for request, _ in parts])
        idx = torch.tensor([[token for _, tokens in parts for token in tokens]], device=self.device)
        return self.model(idx, cache=StepCache(self, parts))[0][0].float().cpu()

    def keep(self, request, n):
        """`n` more tokens are in the cache; whole blocks of a prompt may be shared from now on."""
        before, request.cached = request.cached, request.cached + n
        if not self.slide:
            for i in range(before // self.block, min(request.cached, request.prompt_tokens) // self.block):
                self.blocks.publish(tuple(request.ids[: (i + 1) * self.block]), request.blocks[i])

    def draw(self, request, logits):
        """Choose a request's next token, and see whether that ends it."""
        want = request.sampling
        raw, logits = logits, penalise(logits, request.ids, want.repetition_penalty)
        if want.temperature == 0:
            token = int(logits.argmax())
        else:
            probs = probabilities(logits, want.temperature, want.top_k, want.top_p, want.min_p)
            token = int(torch.multinomial(probs, 1, generator=request.generator))
        if token in want.stop_tokens or not want.ignore_eos and self.tokenizer and token == self.tokenizer.eos:
            return self.end(request, "stop" if token in want.stop_tokens else "eos")
        request.ids.append(token)
        if want.logprobs:
            request.logprobs.append(float(torch.log_softmax(raw, -1)[token]))
        request.text += request.until(request.decode(token))
        if request.until.stopped:
            self.end(request, "stop")
        elif len(request.ids) - request.prompt_tokens == want.max_new_tokens:
            self.end(request, "length")

    def generate(self, prompts, sampling=None, **changes):
        """The finished Request of a prompt, or of each of a list; `sampling` may be a list, one for each."""
        row = getattr(prompts, "ndim", 2) == 1  # an array or tensor
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
        one = row or not isinstance(prompts, (list, tuple)) or prompts and is_id(prompts[0])
        several, prompts = not one, [prompts] if one else prompts
        each = sampling if isinstance(sampling, (list, tuple)) else [sampling] * len(prompts)
        requests = []
        try:
            for prompt, want in zip(prompts, each, strict=True):
                requests.append(self.submit(prompt, want, **changes))
            while not all(request.finish for request in requests):
                self.step()
        finally:  # also where one was refused, or Ctrl-C
            for request in requests:
                self.cancel(request)
        return requests if several else requests[0]

    def stream(self, prompt, sampling=None, **changes):
        """Yield the text that follows a prompt, as it becomes certain. Other requests go on beside it."""
        request, shown = self.submit(prompt, sampling, **changes), 0
        try:
            while not request.finish:
                self.step()
                if len(request.text) > shown:
                    yield request.text[shown:]
                    shown = len(request.text)
        finally:
            self.cancel(request)
