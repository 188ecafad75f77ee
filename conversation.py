"""
Conversations <-> token ids, by a template that is data in tokenizer.json.

    tokenizer = add_template(tokenizer, "minichat")      # with the special tokens that the template needs
    template = Template(tokenizer)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    ids, learned = template.encode(messages)             # learned: the answer "Hello!" and the token that ends it
    ids, _ = template.encode(messages[:1], reply=True)   # up to where the assistant answers
    template.decode(ids)                                 # [{"role": "user", "content": "Hi"}]

A template says what comes before and after a message of each role. Names of special tokens in it are these tokens. The
content of a message is encoded apart, as plain text: a user who types the name of a special token gets its characters
and never the token. No template is code, so none is executed.
"""

from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate

ROLES = ("system", "user", "assistant")


class Refused(ValueError):
    """A conversation that cannot be used. `reason` is one word, under which data/chat/prepare.py counts it."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class TooLong(ValueError):
    """A talk whose last turn takes more tokens than there is room for: `tokens` of them or, if that is clear without
    encoding it, `at_least` so many."""

    def __init__(self, tokens, room, at_least=False):
        number = f"at least {tokens:,}" if at_least else f"{tokens:,}"
        super().__init__(f"the last message takes {number} tokens, and the context has room for {max(0, room):,}: "
                         "shorten it")
        self.tokens = tokens
        self.at_least = at_least


@dataclass(frozen=True)
class Format:
    """How conversations are written, as tokenizer.json holds it."""

    before: dict  # role -> what comes before a message. Without "system", its text goes in front of the first user's
    after: dict  # role -> what follows it; the assistant's must have a special token, which ends an answer
    begin: str = ""  # comes before the first message; "bos": the name of the tokenizer's bos
    system: str = ""  # the system message of a conversation that has none
    join: str | None = None  # joins neighbours of one role, which become one message; None: they stay apart
    also: list = field(default_factory=list)  # more special tokens, which models of this family have


def one_token_each(begin, **options):
    """A Format with a token for each role, <|user|>, and one that ends a message."""
    before = {role: f"<|{role}|>" for role in ROLES}
    return Format(before, dict.fromkeys(ROLES, "<|end|>"), begin, **options)


def chatml(**options):
    """OpenAI's ChatML, which Qwen, SmolLM2 and others use."""
    before = {role: f"<|im_start|>{role}\n" for role in ROLES}
    return Format(before, dict.fromkeys(ROLES, "<|im_end|>\n"), **options)


def nanochat():
    """nanochat's (tokenizer.py): no role for the system, and the first message is the user's."""
    roles = ROLES[1:]
    before = {role: f"<|{role}_start|>" for role in roles}
    after = {role: f"<|{role}_end|>" for role in roles}
    tools = ["<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
    return Format(before, after, "<|bos|>", join="\n\n", also=tools)


TEMPLATES = {
    "minichat": one_token_each("bos"),
    "chatml": chatml(),
    "smollm2": chatml(system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "nanochat": nanochat(),
}


# -----------------------------------------------------------------------------
# Messages


def check_messages(messages):
    """A conversation's messages -> the same as new dicts of role and content, both str. Raises Refused.

    Content may be a list of parts, of which those of text are joined. A system message comes first, or not at all.
    """
    if not isinstance(messages, list) or not messages:
        raise Refused("no_messages", "a conversation is a list of at least one message")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Refused("no_messages", f"message {i + 1} is not an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise Refused("unknown_role", f"message {i + 1} has the role {role!r}: it is one of {', '.join(ROLES)}")
        if role == "system" and i:
            raise Refused("late_system", f"message {i + 1} is a system message: only the first one may be")
        checked.append({"role": role, "content": text_of(message.get("content"), i + 1)})
    return checked


def text_of(content, number):
    """The text of message `number`: a str, or the text parts of a list. Raises Refused."""
    if isinstance(content, str):
        return content
    if content is None:
        raise Refused("no_content", f"message {number} has no content")
    if not isinstance(content, list):
        raise Refused("no_content", f"the content of message {number} is neither text nor a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Refused("not_text", f"message {number} has a part of type {kind!r}: only text can be used")
        texts.append(part["text"])
    return "\n".join(texts)


# -----------------------------------------------------------------------------
# The template of a tokenizer


class Template:
    """The template of `tokenizer`, ready to use. `end` is the token that ends an answer, `stops` all tokens at which
    generation stops. Raises ValueError if the tokenizer has no template, or one that cannot be used."""

    def __init__(self, tokenizer):
        if tokenizer is None or tokenizer.template is None:
            raise ValueError("the tokenizer has no chat template: data/chat/prepare.py adds one for training, and "
                             f"--template=NAME names one of {', '.join(TEMPLATES)}")
        self.tokenizer = tokenizer
        self.format = read_format(tokenizer.template)
        self.before = {role: self.special_ids(text) for role, text in self.format.before.items()}
        self.after = {role: self.special_ids(text) for role, text in self.format.after.items()}
        self.begin = self.special_ids(self.format.begin)
        self.special = set(tokenizer.special_tokens.values())
        self.longest_piece = max(map(len, tokenizer.pieces), default=1)  # bytes
        self.end_places = {role: self.end_place(ids) for role, ids in self.after.items()}
        if self.end_places["assistant"] is None:
            raise ValueError(f"the chat template has no end: after an answer comes {self.format.after['assistant']!r}, "
                             "which has no special token")
        self.end = self.after["assistant"][self.end_places["assistant"]]
        self.stops = (self.end,) if tokenizer.eos is None else tuple(dict.fromkeys((self.end, tokenizer.eos)))

    def special_ids(self, text):
        try:
            return self.tokenizer.encode(text, special=True)
        except ValueError as error:
            raise ValueError(f"the chat template has {text!r}: {error}") from None

    def end_place(self, ids):
        """Index of the first special token in what follows a message, or None."""
        return next((i for i, token in enumerate(ids) if token in self.special), None)

    def normalise(self, messages):
        """check_messages, and then what the template says about the system message and about neighbours of one role.
        """
        messages = check_messages(messages)
        if self.format.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.format.system})
        if messages[0]["role"] == "system" and "system" not in self.before:
            system = messages.pop(0)
            if not messages or messages[0]["role"] != "user":
                raise Refused("late_user", "a template without a system role needs a user's message after the system's")
            gap = "\n\n" if self.format.join is None else self.format.join
            messages[0]["content"] = system["content"] + gap + messages[0]["content"]
        if self.format.join is None:
            return messages
        groups = []  # (role, contents) of neighbours
        for message in messages:
            if not groups or groups[-1][0] != message["role"]:
                groups.append((message["role"], []))
            groups[-1][1].append(message["content"])
        return [{"role": role, "content": self.format.join.join(contents)} for role, contents in groups]

    def encode(self, messages, reply=False):
        """Messages -> (ids, learned): a list of token ids, and for each whether it is a word of the assistant's, or the
        token that ends an answer.

        With `reply` the ids end where the assistant continues: after the beginning of an answer or, if the last message
        is the assistant's, after its text. Raises Refused, and ValueError for text without ids.
        """
        messages = self.normalise(messages)
        ids = list(self.begin)
        learned = [False] * len(ids)

        def add(more, is_learned=False):
            ids.extend(more)
            learned.extend([is_learned] * len(more))

        for i, message in enumerate(messages):
            role = message["role"]
            answers = role == "assistant"
            add(self.before[role])
            add(self.tokenizer.encode(message["content"]), answers)
            if reply and answers and i == len(messages) - 1:
                return ids, learned
            end = self.end_places[role]
            end = 0 if end is None else end + 1
            add(self.after[role][:end], answers)
            add(self.after[role][end:])
        if reply:
            add(self.before["assistant"])
        return ids, learned

    def decode(self, ids):
        """Token ids that `encode` made -> messages. An answer that has only begun is a message without its end. Raises
        ValueError for ids that are no conversation of this template."""
        ids = list(ids)
        at = len(self.begin)
        if ids[:at] != self.begin:
            raise ValueError("the ids do not begin as a conversation of this template")
        messages = []
        while at < len(ids):
            roles = [role for role, before in self.before.items() if ids[at : at + len(before)] == before]
            if not roles:
                raise ValueError(f"no message of the template begins at position {at}")
            role = max(roles, key=lambda role: len(self.before[role]))
            start = at + len(self.before[role])
            after = self.after[role]
            at = next((i for i in range(start, len(ids)) if ids[i : i + len(after)] == after), len(ids))
            messages.append({"role": role, "content": self.tokenizer.decode(ids[start:at])})
            at += len(after)
        return messages

    def fit(self, messages, room):
        """The messages of a talk, so few of them that their ids with the beginning of an answer fit into `room` tokens:
        the oldest turns are dropped whole, a user's message with its answers, and the system message stays.

        -> (ids, messages that stay). Raises TooLong if the last turn does not fit, and what `encode` raises for the
        messages that it looks at. It bisects over the turns: a talk of thousands is encoded a dozen times.
        """
        messages = check_messages(messages)
        self.normalise(messages)  # raises for a talk that is no conversation of this template, dropped or not
        system = messages[:1] if messages[0]["role"] == "system" else []
        talk = messages[len(system) :]
        turns = [i for i, m in enumerate(talk) if m["role"] == "user" and (not i or talk[i - 1]["role"] != "user")]
        starts = list(dict.fromkeys((0, *turns)))  # the talk may begin at these messages

        # turns that are too long for certain need not be encoded
        least = [self.least_tokens(message) for message in talk]
        sums = list(accumulate(reversed(least), initial=0))[::-1]  # of all messages from a place on
        base = sum(map(self.least_tokens, system))
        low = next((i for i, start in enumerate(starts) if base + sums[start] <= room), None)
        if low is None:
            raise TooLong(base + sums[starts[-1]], room, at_least=True)

        ids, _ = self.encode(system + talk[starts[low] :], reply=True)
        if len(ids) <= room:
            return ids, system + talk[starts[low] :]
        # `low` is too long; find the first that fits: `high` does, or nothing is known to
        high = len(starts)
        fitting = None
        while high - low > 1:
            middle = (low + high) // 2
            shorter, _ = self.encode(system + talk[starts[middle] :], reply=True)
            if len(shorter) <= room:
                high, fitting = middle, shorter
            else:
                low, ids = middle, shorter
        if fitting is None:
            raise TooLong(len(ids), room)
        return fitting, system + talk[starts[high] :]

    def least_tokens(self, message):
        """A number of tokens that a message takes at least, alone or as part of a joined one, without encoding it."""
        # what comes before a message is never empty
        apart = 1 if self.format.join is None and message["role"] in self.before else 0
        return apart + len(message["content"].encode("utf-8", "replace")) // self.longest_piece


def read_format(fields):
    """The Format of a template's fields. Raises ValueError for fields that cannot be one."""
    try:
        format = Format(**fields)
    except TypeError:
        raise ValueError(f"a chat template has the fields {', '.join(Format.__dataclass_fields__)}") from None
    for name in ("before", "after"):
        texts = getattr(format, name)
        good = isinstance(texts, dict) and {"user", "assistant"} <= texts.keys() <= set(ROLES)
        if not good or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f'the chat template\'s "{name}" must have a text for user and assistant, and may for '
                             "system")
        if not all(format.before.values()):
            raise ValueError('the chat template\'s "before" must not be empty: it tells the roles apart')
    if format.before.keys() != format.after.keys():
        raise ValueError('the chat template\'s "before" and "after" must have the same roles')
    if not all(isinstance(text, str) for text in (format.begin, format.system)):
        raise ValueError('the chat template\'s "begin" and "system" must be texts')
    if not isinstance(format.join, (str, type(None))):
        raise ValueError('the chat template\'s "join" must be a text or null')
    before = {role: format.before[role] for role in ROLES if role in format.before}
    after = {role: format.after[role] for role in ROLES if role in format.after}
    return replace(format, before=before, after=after)  # in one order, whatever the order in the file


def add_template(tokenizer, template):
    """A tokenizer with a chat template, and with the special tokens that it needs behind all others.

    template: one of TEMPLATES by name, or a Format. Raises ValueError.
    """
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise ValueError(f"template={template!r} is not one of {', '.join(TEMPLATES)}")
        template = TEMPLATES[template]
    fields = asdict(template)
    if template.begin == "bos":
        name_of = {i: name for name, i in tokenizer.special_tokens.items()}
        fields["begin"] = name_of.get(tokenizer.bos, "")
    specials = dict(tokenizer.special_tokens)
    for name in special_names(fields):
        if name not in specials:
            specials[name] = tokenizer.vocab_size + len(specials) - len(tokenizer.special_tokens)
    changed = tokenizer.changed(specials=specials, template=fields)
    Template(changed)  # raises for a template that cannot be used
    return changed


def template_of(tokenizer, name, source):
    """The Template of a model that is to be talked with: its tokenizer's own or, where that has none, the one of
    TEMPLATES that `name` names. None if there is neither.

    source: where the model comes from, for messages. Raises ValueError for a name beside a template of its own, and for
    a template whose special tokens the model never learned.
    """
    if tokenizer is None or (tokenizer.template is None and not name):
        if name:
            raise ValueError(f"--template={name}: {source} has no tokenizer")
        return None
    if tokenizer.template is not None:
        if name:
            raise ValueError(f"--template={name}: the tokenizer of {source} has a chat template already")
        return Template(tokenizer)
    changed = add_template(tokenizer, name)
    added = [special for special in changed.special_tokens if special not in tokenizer.special_tokens]
    if added:
        raise ValueError(f"--template={name} needs the special tokens {', '.join(added)}, and the model never learned "
                         "them: fine-tune the run on conversations, which data/chat/prepare.py prepares")
    return Template(changed)


def special_names(fields):
    """Names of the form <|name|> in the fields of a template, in order."""
    texts = [fields["begin"], *fields["before"].values(), *fields["after"].values(), *fields["also"]]
    names = []
    for text in texts:
        while "<|" in text and "|>" in text:
            _, _, text = text.partition("<|")
            name, _, text = text.partition("|>")
            names.append(f"<|{name}|>")
    return list(dict.fromkeys(names))
