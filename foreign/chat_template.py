"""
A chat template of ours (conversation.py) as Jinja, which transformers, vLLM and llama.cpp run.

    jinja_of(format, names)                 # for transformers: exactly the ids of Template.encode
    jinja_of(format, names, exact=False)    # plain, for llama.cpp

conversation.Template encodes the parts of a conversation apart, and content as plain text. transformers renders the
whole conversation to one text and encodes that. Two kinds of Unicode's noncharacters, which no text should have, keep
the difference:

- BORDER stands between texts that are encoded apart. The tokenizer cuts there and drops it.
- A stand-in takes the place of the first character of special names, in content that has such a name: then the text
  has no special name. The tokenizer puts the character back after it has found its special tokens.

Content with one of these noncharacters is refused. {% generation %} marks what is learned (transformers'
return_assistant_tokens_mask). With add_generation_prompt an answer that is the last message stays open, as with
Template.encode(reply=True).
"""

import json
import re

from conversation import ROLES
from foreign.names import NONCHARACTERS

BORDER, *STAND_INS = NONCHARACTERS


def stand_ins(names):
    """{first character of special names: the noncharacter that stands for it}. Raises ValueError for names that leave
    too few noncharacters."""
    for name in names:
        if set(NONCHARACTERS) & set(name):
            raise ValueError(f"the special token {name!r} has a character of U+FDD0 to U+FDEF, which mark the parts of "
                             "a conversation: give it another name")
    firsts = sorted({name[0] for name in names if name})
    if len(firsts) > len(STAND_INS):
        raise ValueError(f"the special tokens begin with {len(firsts)} different characters, and {len(STAND_INS)} can "
                         "be told apart")
    return dict(zip(firsts, STAND_INS, strict=False))


def literal(text):
    """A text as a string of Jinja, noncharacters visible."""
    quoted = json.dumps(text, ensure_ascii=False)
    for character in set(NONCHARACTERS) & set(text):
        quoted = quoted.replace(character, f"\\u{ord(character):04x}")
    return quoted


def output(expression):
    return f"{{{{- {expression} -}}}}"


def refuse_if(condition, reason):
    return f"{{%- if {condition} -%}}{output(f'raise_exception({literal(reason)})')}{{%- endif -%}}"


def jinja_of(format, names, exact=True):
    """The Jinja template of a conversation.Format. `names`: the tokenizer's special tokens. Raises ValueError.

    `exact` needs the tokenizer of tokenizer_files.py. Otherwise the template is plain text: content can hold special
    tokens, and it may merge with the template's words beside it.
    """
    return "\n".join(Writer(format, names, exact).lines())


class Writer:
    """Writes the template. Its state is `talk`: the role and the text of the message so far, as neighbours of one role
    may become one message."""

    def __init__(self, format, names, exact):
        self.format = format
        self.names = [name for name in names if name]
        self.exact = exact
        self.stand_ins = stand_ins(self.names) if exact else {}
        longest_first = sorted(self.names, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.has_system = "system" in format.before
        self.gap = "\n\n" if format.join is None else format.join

    def lines(self):
        format = self.format
        roles = ", ".join(map(literal, ROLES))
        start = "namespace(role=\"\", text=\"\")"
        if format.system and not self.has_system:
            default = f"namespace(role=\"system\", text={literal(format.system)})"
            start = f"{start} if messages[0].role == \"system\" else {default}"
        lines = [*self.comment(), f"{{%- set talk = {start} -%}}"]
        if format.begin:
            lines.append(output(literal(self.apart(format.begin))))
        if not self.has_system:
            lines += self.check_first_user()
        elif format.system:
            default = self.apart(format.before["system"]) + self.guarded(format.system)
            default = literal(default + self.apart(format.after["system"]))
            lines.append(f"{{%- if messages[0].role != \"system\" -%}}{output(default)}{{%- endif -%}}")
        return [
            *lines,
            "{%- for message in messages -%}",
            refuse_if(f"message.role not in [{roles}]", f"a message's role is one of {', '.join(ROLES)}"),
            refuse_if("message.role == \"system\" and not loop.first", "only the first message may be the system's"),
            *self.gather(),
            *self.write(),
            "{%- endfor -%}",
            "{%- if add_generation_prompt and messages[-1].role != \"assistant\" -%}",
            output(literal(self.apart(format.before["assistant"]))),
            "{%- endif -%}",
        ]

    def comment(self):
        if not self.exact:
            return []
        return ["{#- U+FDD0 stands between texts that are encoded apart, U+FDD1 and following for the first character "
                "of a special name in a message: tokenizer.json takes them out again -#}"]

    def check_first_user(self):
        """Without a role for the system, its text goes in front of the first user's."""
        alone = "messages | length == 1 or messages[1].role != \"user\""
        condition = f"messages[0].role == \"system\" and ({alone})"
        if self.format.system:
            condition = f"messages[0].role == \"assistant\" or {condition}"
        return [refuse_if(condition, "a user's message must follow the system's")]

    # How a message joins its neighbours

    def continues(self, role, next_role):
        """The condition under which a message of `next_role` continues one of `role`; "" if it never does."""
        conditions = []
        if self.format.join is not None:
            conditions.append(f"{role} == {next_role}")
        if not self.has_system:
            conditions.append(f"{role} == \"system\"")
        return " or ".join(conditions)

    def gather(self):
        """Lines that put a message's content, behind the messages that it continues, into talk.text."""
        lines = []
        content = "message.content"
        if self.exact:  # llama.cpp joins parts itself
            lines = self.join_parts()
            content = "content"
        continued = self.continues("talk.role", "message.role")
        if continued:
            before = f"(talk.text + {literal(self.gap)} if {continued} else \"\")"
            content = f"{before} + {content}"
        return [*lines, f"{{%- set talk.text = {content} -%}}", "{%- set talk.role = message.role -%}"]

    def join_parts(self):
        parts = "message.content is defined and message.content is sequence and message.content is not mapping"
        of_text = "message.content | selectattr(\"type\", \"equalto\", \"text\") | list | length"
        return [
            "{%- if message.content is string -%}",
            "{%- set content = message.content -%}",
            f"{{%- elif {parts} and ({of_text}) == (message.content | length) -%}}",
            "{%- set content = message.content | map(attribute=\"text\") | join(\"\\n\") -%}",
            "{%- else -%}",
            output("raise_exception(\"a message's content is a text, or a list of parts of type text\")"),
            "{%- endif -%}",
        ]

    # How a message is written

    def write(self):
        """Lines that write talk.text, unless the next message continues it."""
        lines = self.guard() if self.exact else []
        for role in self.format.before:
            if role != "assistant":
                before = literal(self.apart(self.format.before[role]))
                after = literal(self.apart(self.format.after[role]))
                lines += [f"{{%- if message.role == {literal(role)} -%}}",
                          output(f"{before} + talk.text + {after}"), "{%- endif -%}"]
        lines += ["{%- if message.role == \"assistant\" -%}", *self.write_answer(), "{%- endif -%}"]
        continued = self.continues("message.role", "messages[loop.index0 + 1].role")
        if continued:
            lines = [f"{{%- if loop.last or not ({continued}) -%}}", *lines, "{%- endif -%}"]
        return lines

    def write_answer(self):
        """An answer that stays open has a border behind it: transformers takes the end of a mask that has no token for
        the end of the text, and the last character of an answer may have several tokens."""
        after = self.format.after["assistant"]
        end = self.special.search(after).end()  # Template: an answer is learned up to its first special token
        head, tail = after[:end], after[end:]
        if not self.exact:
            closed = f"(\"\" if add_generation_prompt and loop.last else {literal(after)})"
            return [output(f"{literal(self.format.before['assistant'])} + talk.text + {closed}")]
        text = "talk.text"
        if self.opens(head):  # but a mask must begin at a character that has a token
            text = f"(talk.text + {literal(BORDER)} if talk.text else \"\")"
        if self.closes(after):
            tail += BORDER
        lines = [
            output(literal(self.apart(self.format.before["assistant"]))),
            "{%- set is_open = add_generation_prompt and loop.last -%}",
            "{%- generation -%}",
            output(f"{text} + ({literal(BORDER)} if is_open else {literal(head)})"),
            "{%- endgeneration -%}",
        ]
        if tail:
            lines.append(output(f"\"\" if is_open else {literal(tail)}"))
        return lines

    # Texts apart

    def apart(self, text):
        """A text of the template with borders where it is not a special token that stands beside other text."""
        if not self.exact or not text:
            return text
        return (BORDER if self.opens(text) else "") + text + (BORDER if self.closes(text) else "")

    def opens(self, text):
        """Whether text in front of `text` could merge with it, into a token or the name of a special token."""
        first = self.special.match(text)
        ends = {name[i:] for name in self.names for i in range(1, len(name))}
        return not first or any(text.startswith(end) or end.startswith(text) for end in ends)

    def closes(self, text):
        """The same for text behind it."""
        specials = [*self.special.finditer(text)]
        beginnings = {name[:i] for name in self.names for i in range(1, len(name))}
        at_end = specials and specials[-1].end() == len(text)
        return not at_end or any(text.endswith(begin) or begin.endswith(text) for begin in beginnings)

    def guarded(self, text):
        """A text without special names, as `guard` makes it."""
        for first, stand_in in self.stand_ins.items():
            names = [name for name in self.names if name[0] == first]
            if any(name in text for name in names):
                text = text.replace(first, stand_in)
        return text

    def guard(self):
        """Lines that take the special names out of talk.text."""
        marks = " or ".join(f"{literal(mark)} in talk.text" for mark in (BORDER, *self.stand_ins.values()))
        lines = [refuse_if(marks, "a message has a noncharacter (U+FDD0 and following)")]
        for first, stand_in in self.stand_ins.items():
            names = ", ".join(literal(name) for name in self.names if name[0] == first)
            lines.append(f"{{%- for name in [{names}] if name in talk.text -%}}")
            lines.append(f"{{%- set talk.text = talk.text | replace({literal(first)}, {literal(stand_in)}) -%}}")
            lines.append("{%- endfor -%}")
        return lines
