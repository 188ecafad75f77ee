"""
Byte-level BPE from elsewhere: the spelling of GPT-2's vocabularies, and the patterns that others cut a text by.

A BPETokenizer merges whatever two neighbours make the token of the lowest id. Others have a list of pairs. build()
holds the list against the ids, and so the ids of a text are the same.
"""

from tokenizer import GPT2_PATTERN, BPETokenizer

# Where others cut a text. Each is a copy of the project's own regular expression, or does the same in one as a sequence
# of steps does there.
# SmolLM and StarCoder: every digit apart, then GPT-2's. White space before a digit ends a text there, so it is whole
DIGITS_PATTERN = (r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
                  r"|\s+(?=\p{N})|\s+(?!\S)|\s+")
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
NANOCHAT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                    r"|\s*[\r\n]|\s+(?!\S)|\s+")
KNOWN_PATTERNS = (GPT2_PATTERN, DIGITS_PATTERN, QWEN_PATTERN, LLAMA3_PATTERN, NANOCHAT_PATTERN)

# llama.cpp's names for them, tokenizer.ggml.pre (llama-vocab.cpp)
PRE = {
    "gpt-2": GPT2_PATTERN, "phi-2": GPT2_PATTERN, "mpt": GPT2_PATTERN, "olmo": GPT2_PATTERN,
    "smollm": DIGITS_PATTERN, "starcoder": DIGITS_PATTERN, "refact": DIGITS_PATTERN, "codeshell": DIGITS_PATTERN,
    "qwen2": QWEN_PATTERN, "stablelm2": QWEN_PATTERN, "deepseek-r1-qwen": QWEN_PATTERN,
    "llama-bpe": LLAMA3_PATTERN, "llama3": LLAMA3_PATTERN, "llama-v3": LLAMA3_PATTERN,
}

# Texts that patterns cut in different ways
AWKWARD = (
    "It's 1984, we'll see: I'VE 12345 things & they're  3 x 4 = 12!  ", " 1  2\t3\n4  five   6\n\n\n7 \n 8",
    "Größe café naïve — “quoted” … ¿qué?\u00a0x\u2003y\u3000z", "日本語 テキスト 한국어 русский עברית العربية ไทย",
    "🙂👍🏽 e\u0301 ½ ² Ⅷ ٣ ３ １２３４", "def f(x):\n\treturn {'a': [1, 2]}  # ok\r\n\r\n  \r\n", "",
    " ", "\n", "  a", "\x00\x7f",
    "a_b-c.d/e\\f@g#h$i%j^k*l(m)n", "don't DON'T don’t 'tis ''s", "x" * 50 + " " * 50 + "9" * 50,
)


def bytes_to_unicode():
    """The character that GPT-2's vocab.json writes for each byte (Radford et al. 2019, encoder.py): the byte itself if
    it is visible, otherwise a character from U+0100 on."""
    visible = []
    for first, last in ("!~", "¡¬", "®ÿ"):
        visible += range(ord(first), ord(last) + 1)
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def pieces_of(words):
    """Tokens as GPT-2's vocab.json spells them -> their bytes. Raises ValueError."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    pieces = []
    try:
        for word in words:
            pieces.append(bytes(byte_of[character] for character in word))
        return pieces
    except KeyError as error:
        raise ValueError(f"{error} stands for no byte in GPT-2's spelling") from None


def build(words, pairs, specials, pattern=GPT2_PATTERN):
    """A BPETokenizer of tokens and pairs to merge from elsewhere. -> (tokenizer, how many bytes it adds at the end)

    words: {token, in GPT-2's spelling: id}, without the special ones, `specials` {name: id}; pairs: of tokens, in the
    order in which they are merged. Bytes without a token, which the other tokenizer cannot encode, get one each behind
    all others. Raises ValueError if a text would have other ids here.
    """
    check_ids(words, specials)
    ordered = sorted(words, key=words.get)
    check_merges(ordered, pairs)
    pieces = pieces_of(ordered)
    missing = sorted({bytes([byte]) for byte in range(256)}.difference(pieces))
    return BPETokenizer([*pieces, *missing], pattern, dict(specials)), len(missing)


def check_ids(words, specials):
    """Raises ValueError unless tokens and special tokens, {name: id}, share the ids 0, 1, ..."""
    ids = sorted([*words.values(), *specials.values()])
    for i, found in enumerate(ids):
        if found != i:
            raise ValueError(f"no token has the id {i}, or two have the one before: tokens and special tokens must "
                             f"share 0 to {len(ids) - 1}")


def check_merges(words, pairs):
    """Raises ValueError, naming a token, unless merging `pairs` in their order is the same as merging whatever makes
    the first of `words`: the tokens in the order of their ids.

    Each token of several bytes must be made by the pair that is left when the earlier merges have run over its bytes.
    Merges inside a token do not see what stands around it, so the same then holds within any text.
    """
    ranks = {word: i for i, word in enumerate(words)}
    made = []
    by_word = {}
    for left, right in pairs:
        word = left + right
        if word not in ranks:
            raise ValueError(f"its merges make {word!r}, which is no token")
        if word not in by_word:
            made.append(word)
        by_word.setdefault(word, []).append((left, right))
    longer = [word for word in words if len(word) > 1]
    if made != longer:
        places = zip(made, longer, strict=False)
        word = next((ours for ours, theirs in places if ours != theirs), (made + longer)[min(len(made), len(longer))])
        raise ValueError(f"its ids are not in the order of its merges, as GPT-2's are: {word!r} is out of place")
    for word in longer:
        if last_pair(word, ranks) not in by_word[word]:
            raise ValueError(f"its token {word!r} is not made by the pair that is left after the earlier merges")


def last_pair(word, ranks):
    """The two parts that are left of a token when all merges before its own have run over its characters; None if there
    are more. ranks: {token: place in the order of merges}"""
    parts = list(word)
    own = ranks[word]
    while len(parts) > 2:
        best = own
        place = -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], own)
            if rank < best:
                best = rank
                place = i
        if place < 0:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return tuple(parts)


def check_pattern(tokenizer, encode=None):
    """Raises ValueError unless `tokenizer`, with a pattern that nobody has checked, keeps every character of some
    awkward texts and, if `encode` (text -> ids) is the other project's tokenizer, gives its ids of them."""
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            raise ValueError(f"its pattern {tokenizer.pattern!r} loses characters of {text!r}")
        if encode is not None and encode(text) != ids:
            raise ValueError(f"its pattern {tokenizer.pattern!r} cuts {text!r} otherwise in tiktoken")
