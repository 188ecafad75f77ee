"""
Speculative decoding: several tokens from one pass of the model (Leviathan et al. 2023, arXiv:2211.17192).

    Engine(model, tokenizer, speculate="lookup")             # proposals from the text itself
    Engine(model, tokenizer, speculate="out/small_run")      # from a smaller run with the same tokenizer

A pass over a few rows takes little longer than over one, because memory decides: all weights are read once. So somebody
cheap proposes the next tokens, and the model reads them together with the last one. Then the request draws as ever, one
token after another, each with the random numbers that it would have used anyway. A proposal is accepted if it is what
was drawn; the first token that differs is kept too, and what was proposed behind it is forgotten.

So the text is token for token that of plain decoding, greedy or drawn, except for the rounding of logits, and its
distribution is that of plain sampling whoever proposes. Leviathan et al. accept at random and draw again from what is
left. Here common random numbers take the place of that: a proposal x that does not know them is accepted with
probability p(x) all the same, and a draft model that draws with the same numbers mostly draws the same token.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from device import inference_kernels
from inference.kvcache import Part
from inference.sampling import Sampling

AT_ONCE = 4       # most requests in a pass that speculates: a batch keeps the processor busy without
MOST_LOOKUP = 8   # most tokens proposed at once from the text
MOST_DRAFT = 4    # and by a draft model, which needs a pass for each
LONGEST = 3       # tokens that must be found again; if they are not, fewer, down to one
ROW_COST = 0.1    # of one more row in a pass of the model, as a share of the pass
MEMORY = 8        # tried proposals that an estimate rests on
RETRY = 32        # tokens from one try to the next, where proposals do not pay


def speculation(how, engine, load):
    """-> the Speculation of an engine, or None. how: "lookup"; the folder of a draft run, whose engine load(folder,
    **options of Engine.load) gives; a Speculation; empty: none. Raises ValueError for a draft that does not fit."""
    if not how or isinstance(how, Speculation):
        return how or None
    if how == "lookup":
        return Speculation(PromptLookup())
    dtype = str(engine.dtype).removeprefix("torch.")
    try:
        draft = load(os.path.expanduser(how), device=str(engine.device), dtype=dtype,
                     max_requests=AT_ONCE, quantize=getattr(engine.model, "quantize", ""))
    except (ValueError, OSError) as e:
        raise ValueError(f"speculate={how} is neither lookup nor a run that can be a draft: {e}") from None
    check_draft(how, draft, engine)
    ratio = matrix_size(draft.model) / matrix_size(engine.model)
    return Speculation(DraftModel(draft), MOST_DRAFT, ROW_COST + ratio)


def check_draft(name, draft, engine):
    """Raises ValueError if a token id does not mean the same to both models."""
    sizes = [e.model.config.vocab_size for e in (draft, engine)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"speculate={name}: the draft has a vocabulary of {sizes[0]:,} tokens and the model one of "
                         f"{sizes[1]:,}: take a draft with the model's tokenizer")
    ours = engine.tokenizer
    theirs = draft.tokenizer
    if ours is not None and theirs is not None and (
        ours.pieces != theirs.pieces or ours.special_tokens != theirs.special_tokens
    ):
        raise ValueError(f"speculate={name}: the draft has another tokenizer than the model: take one that was "
                         "trained on the same tokens")


def matrix_size(model):
    """The number of weights in the matrices that a pass reads, packed and quantised ones included."""
    return sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))


# -----------------------------------------------------------------------------
# How many tokens to propose


@dataclass
class Record:
    """How proposals of one kind fared in one request. Before the first, one of two is taken to be accepted."""

    accepted: float = 1.0
    tried: float = 2.0  # those accepted and the first that was not: what stands behind that one was not tried
    last: int = -RETRY  # tokens of the request when it was last tried

    def count(self, cost, most, length):
        """How many tokens to propose now, at most `most`, when the request has `length` tokens."""
        best = best_count(self.accepted / self.tried, cost, most)
        if not best and length - self.last >= RETRY:
            best = min(1, most)
        return best

    def add(self, accepted, proposed, cost):
        """`accepted` of `proposed` tokens were."""
        if accepted and not best_count(self.accepted / self.tried, cost, 1):
            self.accepted, self.tried = 1.0, 2.0  # the text has changed: forget what was
        self.accepted += accepted
        self.tried += min(accepted + 1, proposed)
        if self.tried > MEMORY:
            self.accepted *= MEMORY / self.tried
            self.tried = MEMORY


def best_count(rate, cost, most):
    """How many tokens to propose, 0 to `most`, if each is accepted with probability `rate` once all before it are, and
    costs `cost` of a pass: the k with the most tokens per time, (1 + rate + ... + rate^k) / (1 + k cost) (Leviathan et
    al. 2023, theorem 3.8)."""
    best = 0
    best_speed = tokens = power = 1.0
    for k in range(1, most + 1):
        power *= rate
        tokens += power
        speed = tokens / (1 + k * cost)
        if speed > best_speed:
            best, best_speed = k, speed
    return best


@dataclass
class Trial:
    """What a request knows about its proposals."""

    records: dict = field(default_factory=dict)  # kind -> Record
    kind: int = 0  # of the proposals that were made last
    proposals: list = field(default_factory=list)  # these; empty: they are counted already
    length: int = 0  # tokens of the request when they were made


class Speculation:
    """Decides which requests propose how many tokens, and lets `source` propose them.

    For each request, and each kind of proposal that the source tells apart, it estimates from the last few proposals
    how often one is accepted, and proposes as many tokens as give the most tokens per time. If that is none, it tries
    one token again every RETRY (32) tokens; when this one is accepted, it begins as with a new request. So a text in
    which none is ever accepted costs, for each kind, about ten rows at its beginning and then one in 32 tokens. With
    look-up's three kinds, and rows at a tenth of a pass, that is 1% of the time.

    source: PromptLookup or DraftModel, or anything with their `kind`, `propose` and `end`.
    most: most tokens proposed at once. cost: of a proposal, as a share of a pass of the model.
    at_once: most requests in a pass. With more of them it proposes nothing.
    """

    def __init__(self, source, most=MOST_LOOKUP, cost=ROW_COST, at_once=AT_ONCE):
        self.source = source
        self.most = most
        self.cost = cost
        self.at_once = at_once
        self.trials = {}  # request -> Trial
        self.proposed = 0  # tokens, over all requests
        self.accepted = 0

    def propose(self, parts, room, window):
        """Set `proposals` of the requests in `parts`, [(request, how many of its own tokens are read), ...].
        room: rows that the pass has left for them. window: the context; past it nothing is proposed.

        No proposal reaches past max_new_tokens, so those read always fit into the blocks that a request has reserved.
        """
        self.count_finished()
        wants = []
        for request, count in parts:
            request.proposals = []
            length = len(request.ids)
            is_next = request.cached + count == length > request.prompt_tokens
            if is_next and len(parts) <= self.at_once:
                left = request.sampling.max_new_tokens - (length - request.prompt_tokens) - 1  # one is drawn behind
                wanted = self.how_many(request, min(self.most, room, left, window - length))
                if wanted:
                    wants.append((request, wanted))
                    room -= wanted
        for (request, _), tokens in zip(wants, self.source.propose(wants), strict=True):
            request.proposals = tokens
            self.trials[request].proposals = tokens
            self.proposed += len(tokens)

    def how_many(self, request, most):
        """How many tokens to propose for a request, at most `most`; the last ones are counted first."""
        trial = self.trials.setdefault(request, Trial())
        self.count(request, trial)
        kind = self.source.kind(request) if most > 0 else 0
        if not kind:
            return 0
        length = len(request.ids)
        record = trial.records.setdefault(kind, Record())
        wanted = record.count(self.cost, most, length)
        if wanted:
            trial.kind = kind
            trial.length = record.last = length
        return wanted

    def count(self, request, trial):
        """Note how many of the last proposals were accepted: as many as are tokens of the request by now."""
        if trial.proposals:
            accepted = common_length(trial.proposals, request.ids[trial.length :])
            self.accepted += accepted
            trial.records[trial.kind].add(accepted, len(trial.proposals), self.cost)
            trial.proposals = []

    def count_finished(self):
        """Forget the requests that have ended."""
        for request in [request for request in self.trials if request.finish]:
            self.count(request, self.trials.pop(request))
            self.source.end(request)


def common_length(a, b):
    """How many tokens two lists have in common at their beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


# -----------------------------------------------------------------------------
# Who proposes


class PromptLookup:
    """Proposes what followed when the last few tokens were there before, in the prompt or in the answer (Saxena 2023,
    github.com/apoorvumang/prompt-lookup-decoding). Good where an answer repeats: a document, code, names.

    Where the last 3 tokens were never there, the last 2 or the last one count; these are kinds of their own. Of several
    places the latest counts. Each request has an index, so a token costs the same after a long text.
    """

    def __init__(self, longest=LONGEST):
        self.longest = longest
        self.indexes = {}  # request -> [how many of its tokens are indexed, {n-gram: place behind it}]
        self.places = {}  # request -> where what it proposes begins

    def kind(self, request):
        """How many of the last tokens were there before; 0: none."""
        ids = request.ids
        indexed, places = self.indexes.setdefault(request, [0, {}])
        end = len(ids) - 1  # nothing follows the last token yet
        for i in range(indexed + 1, end + 1):
            for n in range(1, min(self.longest, i) + 1):
                places[tuple(ids[i - n : i])] = i
        self.indexes[request][0] = max(indexed, end)
        for n in range(min(self.longest, len(ids)), 0, -1):
            place = places.get(tuple(ids[-n:]))
            if place is not None:
                self.places[request] = place
                return n
        return 0

    def propose(self, wants):
        """[(request, how many), ...] whose `kind` was just asked for -> the tokens for each"""
        found = []
        for request, count in wants:
            tokens = request.ids[self.places[request] :][:count]
            period = len(tokens)  # what reaches the end of the text repeats from there
            found.append([tokens[i % period] for i in range(count)])
        return found

    def end(self, request):
        self.indexes.pop(request, None)
        self.places.pop(request, None)


@dataclass
class Twin:
    """A request in the engine of the draft model."""

    request: Any  # its `ids` are the very list of the request that it proposes for
    ahead: list = field(default_factory=list)  # proposals whose keys and values lie behind its cached tokens
    guesses: list = field(default_factory=list)
    choose: Callable | None = None

    def part(self):
        """What the draft reads next: the proposal that was drawn last."""
        request = self.request
        self.ahead.append(self.guesses[-1])
        return Part(self.guesses[-1:], len(request.ids) + len(self.ahead) - 1, request.table, 1)


class DraftModel:
    """Proposes what a smaller model draws, with the random numbers and the options of the request itself.

    engine: of that model, and of nobody else. In it each request has a twin with a cache of its own, which keeps the
    proposals that were accepted: mostly it reads one token, or two. Of a long prompt a step reads at most one chunk,
    and prompts that begin alike share what was read, as in any engine. A draft with a shorter context proposes up to
    its end.
    """

    def __init__(self, engine):
        self.engine = engine
        self.twins = {}  # request -> Twin, or None if it has no room

    def kind(self, request):
        """1 if it can propose a token now, else 0."""
        if request not in self.twins:
            self.twins[request] = self.start(request)
        twin = self.twins[request]
        self.engine.admit()
        return int(twin is not None and twin.request.table is not None and self.room(request) > 0)

    def room(self, request):
        return self.engine.model.config.block_size - len(request.ids)

    def start(self, request):
        """The twin of a request, queued in the engine. None if its text is too long for the draft model."""
        left = request.sampling.max_new_tokens - (len(request.ids) - request.prompt_tokens)
        most = min(left, self.room(request))
        if most < 1:
            return None
        try:
            twin = self.engine.submit(request.ids, Sampling(max_new_tokens=most))
        except ValueError:
            return None
        twin.ids = request.ids
        return Twin(twin)

    def propose(self, wants):
        """[(request, how many), ...] whose `kind` was just asked for -> the tokens for each"""
        wants = [(request, self.twins[request], min(count, self.room(request))) for request, count in wants]
        with inference_kernels(self.engine.device):
            self.catch_up(wants)
            for i in range(1, max((count for _, _, count in wants), default=0)):
                busy = [(request, twin) for request, twin, count in wants if twin.guesses and i < count]
                if busy:
                    self.guess(busy, self.engine.read([twin.part() for _, twin in busy]))
        return [twin.guesses for _, twin, _ in wants]

    def catch_up(self, wants):
        """Read what is new of each request, and propose the first token that follows."""
        parts = []
        for request, twin, _ in wants:
            behind = request.ids[twin.request.cached :]
            kept = min(common_length(twin.ahead, behind), len(behind) - 1)
            twin.ahead = []
            twin.guesses = []
            self.engine.publish(twin.request, kept)
            twin.choose = shadow(request.choose)
            parts.append((twin.request, min(len(behind) - kept, self.engine.chunk)))
        logits = self.engine.forward(parts) if parts else ()
        for part in parts:
            self.engine.publish(*part)
        self.guess([(request, twin) for request, twin, _ in wants], logits)

    def guess(self, busy, logits):
        """Draw the next proposal of each (request, twin) from `logits`, which have no row if its prompt is not read."""
        for (request, twin), rows in zip(busy, logits, strict=True):
            if len(rows):
                twin.guesses.append(twin.choose(rows[-1], request.ids + twin.guesses))

    def end(self, request):
        twin = self.twins.pop(request, None)
        if twin:
            self.engine.cancel(twin.request)


def shadow(choose):
    """A Chooser that draws what `choose` would, and leaves its random numbers and counts as they are."""
    other = copy.copy(choose)
    other.generator = choose.generator.clone_state()
    if choose.counts is not None:
        other.counts = choose.counts.clone()
    return other
