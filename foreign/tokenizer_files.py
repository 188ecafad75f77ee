"""
A tokenizer of ours for other projects: as the files of transformers, and as the fields of a GGUF.

    files = hugging_face_files(tokenizer)    # {"tokenizer.json": ..., "tokenizer_config.json": ..., ...}
    add_to_gguf(writer, tokenizer, vocab_size)

Both need the merges of a byte-level BPE, which our file leaves to the order of its tokens. A chat template goes along
as Jinja (chat_template.py), and as it is, under the names that foreign/hugging_face.py and gguf_files.py read first.
"""

import json

from conversation import Template
from foreign.byte_level import PRE, bytes_to_unicode
from foreign.chat_template import BORDER, jinja_of, stand_ins
from foreign.hugging_face import CHARACTERS
from foreign.names import OWN_GGUF_KEY, OWN_KEY
from tokenizer import GPT2_PATTERN

# -----------------------------------------------------------------------------
# Tokens and merges


def spelled_tokens(tokenizer):
    """Every token in the order of the ids: special tokens by name, characters, and the pieces of a BPE in GPT-2's
    spelling. Raises ValueError if a special token is spelled like another."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    spell = bytes_to_unicode()
    tokens = []
    for i in range(tokenizer.vocab_size):
        if i in names:
            tokens.append(names[i])
        elif tokenizer.kind == "bpe":
            tokens.append("".join(spell[byte] for byte in tokenizer.pieces[i]))
        else:
            tokens.append(tokenizer.pieces[i].decode())
    ordinary = {tokens[i] for i in tokenizer.ordinary}
    for name in tokenizer.special_tokens:
        if name in ordinary or not name:
            raise ValueError(f"the special token {name!r} is spelled like another token, and other projects cannot "
                             "tell them apart")
    return tokens


def spelled_merges(tokenizer):
    """The pairs that make the tokens of a BPETokenizer, in GPT-2's spelling. Raises ValueError."""
    spell = bytes_to_unicode()
    pairs = []
    for pair in merges_of(tokenizer.pieces):
        pairs.append(tuple("".join(spell[byte] for byte in part) for part in pair))
    return pairs


def merges_of(pieces):
    """The merges that make each token, as pairs of bytes in the order of the ids: the two parts into which the earlier
    merges turn the bytes of the token. Special tokens (b"") and single bytes need none, wherever they are."""
    ranks = {piece: i for i, piece in enumerate(pieces)}
    pairs = []
    for piece in pieces:
        parts = [bytes([byte]) for byte in piece]
        while len(parts) > 2:
            neighbours = enumerate(zip(parts, parts[1:], strict=False))
            rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in neighbours)
            if rank >= ranks[piece]:
                raise ValueError(f"token {piece!r} is not made of two that come before it")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append(tuple(parts))
    return pairs


# -----------------------------------------------------------------------------
# transformers


def hugging_face_files(tokenizer):
    """{file name: JSON}, from which transformers makes the same ids, of a text and of a conversation. Raises
    ValueError."""
    template = Template(tokenizer) if tokenizer.template is not None else None
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    for key, i in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        if i in names:
            options[key] = names[i]
    files = {"tokenizer.json": tokenizer_json(tokenizer), "tokenizer_config.json": options}
    if template:
        options["chat_template"] = jinja_of(template.format, [*tokenizer.special_tokens])
        options[OWN_KEY] = tokenizer.template
        # an answer ends with either of them
        files["generation_config.json"] = {"bos_token_id": tokenizer.bos, "eos_token_id": [*template.stops]}
    return files


def tokenizer_json(tokenizer):
    """The fields of transformers' tokenizer.json. With a chat template its tokenizer undoes what the Jinja does."""
    tokens = {token: i for i, token in enumerate(spelled_tokens(tokenizer))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if tokenizer.kind == "bpe":
        pairs = spelled_merges(tokenizer)
        model = {"type": "BPE", "vocab": tokens, "merges": pairs}
        splitters = splitters_of(tokenizer.pattern, byte_level)
        decoder = byte_level
    else:
        model = {"type": "WordLevel", "vocab": tokens, "unk_token": ""}
        splitters = [CHARACTERS]
        decoder = {"type": "Fuse"}
    normalizer = None
    if tokenizer.template is not None:
        replaced = stand_ins(tokenizer.special_tokens).items()
        steps = [{"type": "Replace", "pattern": {"String": mark}, "content": first} for first, mark in replaced]
        normalizer = {"type": "Sequence", "normalizers": steps}
        splitters.insert(0, {"type": "Split", "pattern": {"String": BORDER}, "behavior": "Removed", "invert": False})
    splitter = splitters[0]
    if len(splitters) > 1:
        splitter = {"type": "Sequence", "pretokenizers": splitters}
    specials = [{"id": i, "content": name, "special": True, "normalized": False, "single_word": False, "lstrip": False,
                 "rstrip": False} for name, i in tokenizer.special_tokens.items()]
    return {"version": "1.0", "added_tokens": specials, "normalizer": normalizer, "pre_tokenizer": splitter,
            "decoder": decoder, "post_processor": None, "truncation": None, "padding": None, "model": model}


def splitters_of(pattern, byte_level):
    """The pre_tokenizers of a BPE that cuts texts by `pattern`. Raises ValueError if their engine cuts differently."""
    if pattern == GPT2_PATTERN:
        return [byte_level]
    check_cuts(pattern)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {**byte_level, "use_regex": False}]


# Texts on which two engines of regular expressions have to agree: contractions (the long s and the Kelvin sign are
# letters in another case), numbers, white space, ends of lines, signs, joiners, marks, scripts, code points without a
# character. None is long: `our_cuts` makes a token of every substring.
TEXTS = [
    "I'll say it's THEY'RE'S 'tis don't'll '' ' s'd", "it'\u017f a'\u212a 'LL 'Ve'M \u017fK",
    "0 12 345 67890 1.5e-3 x2y", "²½Ⅷ٣٤ 12३ 1_000,000 ⑨ ㍿",
    "a  b   c \t d\u00a0\u00a0e \u3000f\u2003\u2003 g", " \n\n\r\n x\n  y \n\t\n 12  ",
    "end \n", "   ", "\n", "a\n\n", "  7", "x\u0085y\u2028z\u2029\u000b\u000c\u001c\0\ufeff\u00ad\ufffd q",
    "(stop)!? <|x|> <!-- --> {a[0]}='b'; //c\n/// \\d", "\u200d\u200c _a-b_ 9\u200da e\u0301e\u0300 \u0327",
    "naïve ÉCOLE ǅ ʰ straße ﬁ ΑΣς İı", "日本語 한국어 ไทย हिन्दी العربية 1日2本", "🙂👩‍👩‍👧🏽 ☃️ €5 £ © ™ ∑∞",
    "http://a.b/c?d=e&f#g me@host.org snake_case camelCase v1.2", "\U000e0041\u0378\ue000 \U0001d538 ꙳",
]


def check_cuts(pattern):
    """Raises ValueError if the regular expressions of `tokenizers` (Oniguruma) cut one of TEXTS where those of tiktoken
    do not, or cannot read the pattern."""
    try:
        from tokenizers import Regex, pre_tokenizers
    except ImportError:
        raise ValueError("whether transformers cuts texts like this tokenizer is checked with the package tokenizers: "
                         "pip install tokenizers") from None
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # it has no class of its own
        raise ValueError(f"transformers cannot cut texts by {pattern!r}: {error}") from None
    for text in TEXTS:
        cuts = [piece for piece, _ in split.pre_tokenize_str(text)]
        if cuts != our_cuts(pattern, text):
            raise ValueError(f"transformers would cut texts differently by {pattern!r}, for example {text!r}")


def our_cuts(pattern, text):
    """The pieces into which tiktoken cuts a short text: with all substrings as tokens, each piece is one token."""
    import tiktoken

    raw = text.encode()
    substrings = {raw[i:j] for i in range(len(raw)) for j in range(i + 1, len(raw) + 1)}
    ranks = {piece: i for i, piece in enumerate(sorted(substrings | {bytes([byte]) for byte in range(256)}))}
    encoding = tiktoken.Encoding("cuts", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_single_token_bytes(i).decode() for i in encoding.encode_ordinary(text)]


# -----------------------------------------------------------------------------
# llama.cpp

def add_to_gguf(writer, tokenizer, vocab_size):
    """Add the tokenizer as llama.cpp's byte-level BPE, which can also express one of ASCII characters; and its chat
    template, plain. Raises ValueError."""
    if not tokenizer:
        return writer.add_tokenizer_model("none")
    template = Template(tokenizer) if tokenizer.template is not None else None
    eos = tokenizer.eos
    if eos is None and template:
        eos = template.end
    if eos is None:
        raise ValueError("the tokenizer has no token that ends a text, and llama.cpp would use its own for one")
    pre_tokenizer, merges = gguf_merges(tokenizer)
    tokens = gguf_tokens(tokenizer)
    normal, control, unused = 1, 3, 5  # gguf.TokenType
    types = [normal] * len(tokens)
    for i in tokenizer.special_tokens.values():
        types[i] = control
    spare = [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens + spare)
    writer.add_token_types(types + [unused] * len(spare))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(eos if tokenizer.bos is None else tokenizer.bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)
    if template:
        writer.add_eot_token_id(template.end)
        writer.add_chat_template(jinja_of(template.format, [*tokenizer.special_tokens], exact=False))
        writer.add_string(OWN_GGUF_KEY, json.dumps(tokenizer.template, ensure_ascii=False))


def gguf_merges(tokenizer):
    """(the name of llama.cpp's pre-tokenizer, merges "A B"). Raises ValueError."""
    if tokenizer.kind == "bpe":
        names = [name for name, pattern in PRE.items() if pattern == tokenizer.pattern]
        if not names:
            raise ValueError(f"the tokenizer cuts texts by {tokenizer.pattern!r}, and llama.cpp only by patterns of "
                             f"its own: {', '.join(PRE)}")
        return names[0], [" ".join(pair) for pair in spelled_merges(tokenizer)]
    name = [*tokenizer.special_tokens][-1]
    return "gpt-2", [f"{name} {name}"]  # the list must not be empty, and no text contains this pair


def gguf_tokens(tokenizer):
    """Every token in GPT-2's spelling, special tokens by name. Raises ValueError."""
    tokens = spelled_tokens(tokenizer)
    if tokenizer.kind == "bpe":
        return tokens
    wide = [c for c in tokenizer.chars if not c.isascii()]
    if wide:
        raise ValueError(f"the tokenizer has {wide[0]!r} as a token, and llama.cpp takes only ASCII characters as "
                         "tokens: train on the tokens of a BPE tokenizer instead (data/text/prepare.py)")
    spell = bytes_to_unicode()
    for i in tokenizer.ordinary:
        tokens[i] = spell[ord(tokens[i])]
    return tokens
