"""Messages to ids and a loss mask and back: nothing that a user types is a special token, only answers are learned."""

import json
import string
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversation import TEMPLATES, Format, Refused, Template, TooLong, add_template, check_messages, read_format
from foreign.names import Found
from foreign.templates import with_template
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

BYTES = BPETokenizer([bytes([i]) for i in range(256)] + [b"us", b"user", b"\n\n", b"<|"])
FIRST = BPETokenizer([bytes([i]) for i in range(256)],
                     specials={"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2})
CHARS = CharTokenizer(string.printable)
TOKENIZERS = {"bytes": BYTES, "specials first": FIRST, "characters": CHARS}
ODD = Format({"user": "Q: ", "assistant": "A:"}, {"user": "\n", "assistant": "###<|stop|>\n"}, join=" ",
             also=["<|tool|>"])


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def learned_text(template, messages):
    """The learned tokens of a conversation, spelled out."""
    ids, learned = template.encode(messages)
    assert len(ids) == len(learned)
    own = [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]
    return template.tokenizer.decode(own, skip_special=False)


texts = st.one_of(st.text(string.printable, max_size=12), st.sampled_from(["", "<|im_end|>", "<|end|>", " \n", "###"]))
talks = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=6)


def messages_of(talk, first):
    head = [system("be kind")] if first else []
    return head + [{"role": role, "content": content} for role, content in talk]


# -----------------------------------------------------------------------------
# Templates


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(talk=talks, first=st.booleans())
def test_there_and_back(kind, name, talk, first):
    template = Template(add_template(TOKENIZERS[kind], name))
    messages = messages_of(talk, first)
    try:
        ids, learned = template.encode(messages)
    except Refused:
        assert name == "nanochat" and first and talk[0][0] == "assistant"
        return
    assert template.decode(ids) == template.normalise(messages)
    answers = [m["content"] + template.tokenizer.decode([template.end], skip_special=False)
               for m in template.normalise(messages) if m["role"] == "assistant"]
    assert learned_text(template, messages) == "".join(answers)


def test_the_known_templates_are_written_as_their_projects_write_them():
    messages = [system("S"), user("U"), answer("A"), user("V")]
    expected = {
        "minichat": "<|endoftext|><|system|>S<|end|><|user|>U<|end|><|assistant|>A<|end|><|user|>V<|end|><|assistant|>",
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
                  "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
        "nanochat": "<|bos|><|user_start|>S\n\nU<|user_end|><|assistant_start|>A<|assistant_end|><|user_start|>V"
                    "<|user_end|><|assistant_start|>",
    }
    for name, text in expected.items():
        template = Template(add_template(BYTES, name))
        ids, _ = template.encode(messages, reply=True)
        assert template.tokenizer.decode(ids, skip_special=False) == text
    ids, _ = Template(add_template(FIRST, "smollm2")).encode([user("U")])
    assert FIRST.decode(ids, skip_special=False).startswith("<|im_start|>system\nYou are a helpful AI assistant named")


def test_what_a_user_types_is_never_a_special_token():
    for name in TEMPLATES:
        template = Template(add_template(BYTES, name))
        names = "".join(template.tokenizer.special_tokens)
        plain, _ = template.encode([user("x"), answer("y")])
        ids, _ = template.encode([user(names), answer(names)])
        special = [i for i in ids if i in template.special]
        assert special == [i for i in plain if i in template.special]
        assert template.decode(ids)[-2:] == [user(names), answer(names)]


def test_segments_are_encoded_apart():
    """What stands before a message never joins its text: "us" + "er" are two tokens here, though "user" is one."""
    format = Format({"user": "us", "assistant": "A:"}, {"user": "", "assistant": "<|e|>"})
    template = Template(add_template(BYTES, format))
    ids, _ = template.encode([user("er")])
    assert ids == BYTES.encode("us") + BYTES.encode("er") != BYTES.encode("user")


def test_only_the_end_of_an_answer_is_learned():
    template = Template(add_template(BYTES, "chatml"))
    assert learned_text(template, [user("U"), answer("A")]) == "A<|im_end|>"  # and not the line end behind it
    odd = Template(add_template(BYTES, ODD))
    assert learned_text(odd, [user("U"), answer("A")]) == "A###<|stop|>"
    assert odd.end == odd.tokenizer.special_tokens["<|stop|>"] and odd.tokenizer.special_tokens["<|tool|>"]


def test_neighbours_of_one_role():
    messages = [user("a"), user("b"), answer("c"), answer("d")]
    assert Template(add_template(BYTES, "chatml")).normalise(messages) == messages
    assert Template(add_template(BYTES, ODD)).normalise(messages) == [user("a b"), answer("c d")]
    assert messages[0] == user("a")  # the caller's own are not changed


def test_an_answer_that_has_begun_is_continued():
    template = Template(add_template(BYTES, "minichat"))
    opened, _ = template.encode([user("U")], reply=True)
    begun, _ = template.encode([user("U"), answer("Ye")], reply=True)
    assert begun == opened + BYTES.encode("Ye")
    assert template.decode(begun) == [user("U"), answer("Ye")]


def test_generation_stops_at_the_end_of_an_answer_or_a_document():
    template = Template(add_template(BYTES, "minichat"))
    assert template.stops == (template.end, BYTES.eos)


# -----------------------------------------------------------------------------
# A talk that outgrows the context


def test_the_oldest_turns_are_dropped_whole():
    template = Template(add_template(CHARS, "minichat"))
    talk = [system("sys"), user("one"), answer("1"), answer("I"), user("two"), user("too"), answer("2"), user("three")]
    whole, stay = template.fit(talk, 1000)
    assert stay == talk and whole == template.encode(talk, reply=True)[0]
    sizes = set()
    for room in range(14, len(whole) + 1):
        ids, stay = template.fit(talk, room)
        assert len(ids) <= room and stay[0] == talk[0] and stay[1:] == talk[len(talk) - len(stay) + 1 :]
        assert stay[1] in (user("one"), user("two"), user("three"))  # a turn begins with its first user's message
        sizes.add(len(stay))
    assert sizes == {2, 5, 8}
    with pytest.raises(ValueError, match="the last message takes 14 tokens.*room for 13"):
        template.fit(talk, 13)


def plain_fit(template, messages, room):
    """What Template.fit does, turn after turn. -> its result, or None if the last turn does not fit"""
    head = messages[:1] if messages[0]["role"] == "system" else []
    talk = messages[len(head) :]
    turns = [i for i, m in enumerate(talk) if m["role"] == "user" and (not i or talk[i - 1]["role"] != "user")]
    for start in dict.fromkeys((0, *turns)):
        ids, _ = template.encode(head + talk[start:], reply=True)
        if len(ids) <= room:
            return ids, head + talk[start:]
    return None


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("format", [*TEMPLATES, ODD], ids=[*TEMPLATES, "odd"])
@settings(max_examples=40, deadline=None)
@given(talk=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), max_size=12), first=st.booleans(),
       room=st.integers(-1, 120))
def test_bisection_finds_what_dropping_turn_after_turn_finds(kind, format, talk, first, room):
    tokenizer = TOKENIZERS[kind]
    if format == ODD and kind == "specials first":
        tokenizer = BYTES
    template = Template(add_template(tokenizer, format))
    messages = messages_of([("user", "first"), *talk], first)
    fitting = plain_fit(template, messages, room)
    if fitting:
        assert template.fit(messages, room) == fitting
    else:
        with pytest.raises(TooLong) as refused:
            template.fit(messages, room)
        assert refused.value.tokens > room


@pytest.mark.parametrize("format", [*TEMPLATES, ODD], ids=[*TEMPLATES, "odd"])
def test_a_talk_that_just_fits_is_not_taken_for_too_long(format):
    """What is counted without encoding must never be more than there is: joined messages share what is around them."""
    template = Template(add_template(BYTES, format))
    for text in ("", "us", "user"):
        for talk in ([user(text)] * 50, [system(text), user(text)], [user(text), answer(text)] * 20):
            ids, _ = template.encode(talk, reply=True)
            assert template.fit(talk, len(ids)) == (ids, check_messages(talk))


@pytest.mark.parametrize("name", ["minichat", "nanochat"])
def test_a_talk_of_thousands_of_turns_is_encoded_a_dozen_times(name, monkeypatch):
    """Hostile clients send such talks: the work must not grow with the square of the turns."""
    template = Template(add_template(BYTES, name))
    talk = [user("hi"), answer("yes")] * 5_000
    encoded = []
    encode = Template.encode

    def counted(self, messages, reply=False):
        encoded.append(len(messages))
        return encode(self, messages, reply)

    monkeypatch.setattr(Template, "encode", counted)
    ids, stay = template.fit(talk, 30_000)
    assert len(ids) <= 30_000 and stay == talk[-len(stay) :] and stay[0]["role"] == "user"
    assert len(encode(template, talk[-len(stay) - 2 :], reply=True)[0]) > 30_000
    assert len(encoded) <= 15

    encoded.clear()
    whole, stay = template.fit(talk, 1_000_000)
    assert stay == talk and encoded == [10_000]

    encoded.clear()
    with pytest.raises(TooLong, match="at least"):  # clear without encoding it
        template.fit(talk + [user("x" * 100_000)], 100)
    assert not encoded
    with pytest.raises(TooLong, match="takes [0-9,]+ tokens"):
        template.fit(talk, 4)
    assert len(encoded) <= 15


# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(("messages", "reason"), [
    ([], "no_messages"), ("hi", "no_messages"), (None, "no_messages"), (["hi"], "no_messages"),
    ([{"content": "x"}], "unknown_role"), ([{"role": "bot", "content": "x"}], "unknown_role"),
    ([{"role": ["user"], "content": "x"}], "unknown_role"),
    ([user("x"), system("y")], "late_system"),
    ([user(None)], "no_content"), ([{"role": "user"}], "no_content"), ([user(3)], "no_content"),
    ([user([{"type": "image_url", "image_url": "x"}])], "not_text"), ([user(["x"])], "not_text"),
    ([user([{"type": "text"}])], "not_text"),
])
def test_what_is_no_conversation(messages, reason):
    with pytest.raises(Refused) as caught:
        check_messages(messages)
    assert caught.value.reason == reason and "\n" not in str(caught.value)


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([user(parts)]) == [user("a\nb")]


def test_half_a_character_is_an_error():
    with pytest.raises(ValueError, match="U\\+D800 at position 1"):
        Template(add_template(BYTES, "chatml")).encode([user("a\ud800")])


@pytest.mark.parametrize(("fields", "message"), [
    ({"before": {}}, '"before" must have a text for user and assistant'),
    ({"after": {"user": "x", "assistant": 3}}, '"after" must have a text'),
    ({"before": {"user": "", "assistant": "A"}}, "must not be empty"),
    ({"before": {"user": "U", "assistant": "A", "system": "S"}}, "the same roles"),
    ({"begin": None}, '"begin" and "system" must be texts'), ({"join": 1}, '"join" must be'),
    ({"code": "x"}, "has the fields before, after"),
    ({"after": {"user": "\n", "assistant": "\n"}}, "the chat template has no end"),
])
def test_what_is_no_template(fields, message):
    good = asdict(ODD)
    assert read_format(good) == ODD
    with pytest.raises(ValueError, match=message):
        Template(add_template(BYTES, ODD).changed(template={**good, **fields}))


def test_a_tokenizer_without_a_template():
    for tokenizer in (None, BYTES):
        with pytest.raises(ValueError, match="no chat template.*minichat, chatml"):
            Template(tokenizer)
    with pytest.raises(ValueError, match="template='chatgpt' is not one of minichat"):
        add_template(BYTES, "chatgpt")


def test_ids_that_are_no_conversation():
    template = Template(add_template(BYTES, "minichat"))
    with pytest.raises(ValueError, match="do not begin"):
        template.decode([65])
    with pytest.raises(ValueError, match="position 1"):
        template.decode([*template.begin, 65])


# -----------------------------------------------------------------------------
# tokenizer.json


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokenizer_json_keeps_the_template(tmp_path, kind, name):
    made = add_template(TOKENIZERS[kind], name)
    made.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.template, loaded.special_tokens, loaded.bos, loaded.eos) == (
        made.template, made.special_tokens, made.bos, made.eos)
    assert loaded.to_json() == made.to_json() and json.loads(made.to_json())["format"] == 2
    assert add_template(made, name).sha256 == made.sha256  # nothing is added twice
    assert made.encode("Hello") == TOKENIZERS[kind].encode("Hello")
    assert made.special_tokens.items() >= TOKENIZERS[kind].special_tokens.items()


def test_a_format_1_tokenizer_keeps_its_bytes():
    for tokenizer in (BYTES, CHARS, CharTokenizer("ab", specials=())):
        assert json.loads(tokenizer.to_json())["format"] == 1
        assert tokenizer.changed().to_json() == tokenizer.to_json()
    moved = BYTES.changed(bos=None)
    assert moved.bos is None and moved.eos == BYTES.eos and json.loads(moved.to_json())["format"] == 2


def test_special_tokens_at_any_id():
    assert FIRST.encode("a") == [3 + ord("a")] and FIRST.decode([3 + ord("a"), 2]) == "a"
    assert FIRST.decode([1, 3 + ord("a")], skip_special=False) == "<|im_start|>a"
    decode = FIRST.stream_decoder()
    assert [decode(0), decode(3 + ord("a")), decode(2), decode(None)] == ["", "a", "", ""]
    middle = CharTokenizer("abc", specials={"<|x|>": 1})
    assert middle.encode("abc") == [0, 2, 3] and middle.decode([0, 1, 2, 3]) == "abc" and middle.vocab_size == 4
    for specials in ({"x": 4}, {"x": -1}, {"x": 0, "y": 0}):
        with pytest.raises(ValueError, match="distinct ids"):
            CharTokenizer("abc", specials=specials)


@pytest.mark.parametrize(("change", "message"), [
    ({"bos": "x"}, '"bos" is .x., which is not among'), ({"template": []}, '"template", an object'),
    ({"specials": ["<|x|>"]}, '"specials", an object'), ({"specials": {"<|x|>": True}}, '"specials", an object'),
    ({"format": 3}, '"format": 1 or 2'), ({"chars": None}, '"chars"'),
])
def test_a_damaged_tokenizer_json(tmp_path, change, message):
    fields = json.loads(add_template(CHARS, "minichat").to_json()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_template_that_another_program_wrote_in_another_order_is_the_same_tokenizer():
    """transformers sorts the fields of a file that it saves again."""
    fields = json.loads(json.dumps(asdict(TEMPLATES["chatml"]), sort_keys=True))
    assert list(fields["before"]) != list(TEMPLATES["chatml"].before)
    again = with_template(add_template(BYTES, "chatml"), Found("a file", fields=fields), "", pytest.fail)
    assert again.to_json() == add_template(BYTES, "chatml").to_json()


def test_the_templates_are_what_read_format_accepts():
    for template in (*TEMPLATES.values(), replace(ODD, join=None)):
        assert read_format(asdict(template)) == template
