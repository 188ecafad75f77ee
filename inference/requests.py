"""
A request of the engine (infer.py): a prompt, the text that follows it so far, and what it asks for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from inference.kvcache import BlockTable
from inference.sampling import Chooser, Sampling, StopText, top_tokens


@dataclass(eq=False)
class Request:
    """A prompt and the text that follows it so far."""

    ids: list  # the prompt's tokens, then the tokens that were drawn
    prompt_tokens: int
    sampling: Sampling
    blocks_needed: int  # for the prompt and all new tokens
    choose: Chooser  # logits -> the next token, with random numbers of its own
    decode: Callable  # the next token -> text; None -> the rest
    until: StopText  # holds back text that may begin a stop string
    text: str = ""  # what follows the prompt, up to a stop string
    logprobs: list = field(default_factory=list)  # of the tokens that were drawn
    top_logprobs: list = field(default_factory=list)  # of each of them: [(most likely id, its logprob), ...]
    prompt_logprobs: list = field(default_factory=list)  # the first is None: nothing comes before it
    prompt_top_logprobs: list = field(default_factory=list)
    finish: str = ""  # why it ended: length | eos | stop | cancelled; empty until then
    cached: int = 0  # tokens whose keys and values are in the cache
    cached_tokens: int = 0  # tokens of the prompt that were there already, and did not have to be read
    digests: list | None = None  # of its full blocks so far; None: it slides, so its blocks change and are its own
    table: BlockTable | None = None  # where they lie, once it runs
    proposals: list = field(default_factory=list)  # tokens that may follow, which the pass reads behind the last one
    row: int | None = None  # its row in the draws on the device
    drawn: int = 0  # how many tokens it had after the last draw there

    @property
    def tokens(self):
        """The ids that were drawn."""
        return self.ids[self.prompt_tokens :]

    @property
    def blocks(self):
        return self.table.blocks if self.table else []

    @property
    def reads_next_token(self):
        """Whether all that it has left to read is its last token, and only the logits after that are wanted."""
        scores = self.sampling.prompt_logprobs and self.cached < self.prompt_tokens
        return self.cached + 1 == len(self.ids) and not self.proposals and not scores

    def score_prompt(self, logits):
        """Keep the log-probabilities of the prompt's tokens that follow from `logits` (rows, vocab_size)."""
        top = self.sampling.prompt_logprobs
        if not self.prompt_logprobs:
            self.prompt_logprobs.append(None)
            self.prompt_top_logprobs += [] if top is True else [None]
        for row in logits:
            place = len(self.prompt_logprobs)
            if place == self.prompt_tokens:
                return  # what follows the prompt is drawn
            logprobs = torch.log_softmax(row, -1)
            self.prompt_logprobs.append(float(logprobs[self.ids[place]]))
            if top is not True:
                self.prompt_top_logprobs.append(top_tokens(logprobs, top))

    @property
    def wants_logprobs(self):
        """Whether it keeps log-probabilities of the tokens that are drawn."""
        return bool(self.sampling.logprobs or self.sampling.top_logprobs)

    def take(self, token, logits, eos):
        """The token that was drawn. logits (vocab_size,): what it was drawn from, fp32 on the CPU, if wants_logprobs.
        eos: the id that ends a document, or None. -> why the request ends with it; empty: it does not"""
        sampling = self.sampling
        if token in sampling.stop_tokens:
            return "stop"
        if token == eos and not sampling.ignore_eos:
            return "eos"
        self.ids.append(token)
        if self.wants_logprobs:
            logprobs = torch.log_softmax(logits, -1)
            self.logprobs.append(float(logprobs[token]))
            if sampling.top_logprobs:
                self.top_logprobs.append(top_tokens(logprobs, sampling.top_logprobs))
        self.text += self.until(self.decode(token))
        if self.until.stopped:
            return "stop"
        return "length" if len(self.ids) - self.prompt_tokens == sampling.max_new_tokens else ""
