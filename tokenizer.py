"""
Text <-> token ids.

    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode("To be")          # [32, 53, 1, 40, 43] on Tiny Shakespeare
    tokenizer.decode(ids)                    # "To be"
    tokenizer.save(folder)                   # folder/tokenizer.json
    tokenizer = load_tokenizer(folder)       # that file, or nanoGPT's meta.pkl
    tokenizer = load_tokenizer("gpt2.tiktoken")  # GPT-2's byte-level BPE

Every tokenizer has `kind`, `vocab_size`, `special_tokens` (name -> id), `bos` and `eos` (ids, or None if there is
none), `template` (how conversations are written, see conversation.py, or None), and the methods of Tokenizer. Special
tokens enter a stream only by their ids: in a text their names are plain characters, so no text that a user types can
produce one. `encode(text, special=True)` is for text you wrote yourself, which spells them out.

tokenizer.json has format 1, or format 2 where it says more: special tokens at any id, bos and eos by name, a template.
"""

import base64
import codecs
import json
import pickle
import re
from pathlib import Path

import numpy as np

from files import sha256, write_whole

BOS, EOS = "<|bos|>", "<|eos|>"  # before the first and after the last token of a document
MAX_VOCAB = 65_536  # shards hold uint16
OLDEST_TIKTOKEN = 0, 13  # older versions hang on long runs of one character, and emoji can end the process
UNICODE = 0x110000  # the number of code points
CHUNK = 1 << 22  # characters encoded at a time: bounds the memory on texts of gigabytes

END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token. It stands between documents: it is bos and eos
# Where GPT-2 cuts a text before it merges (Radford et al. 2019, encoder.py): contractions, words, numbers, the rest
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# tiktoken's regular expressions look ahead, and exhaust their stack on a run of white space twice this long
LONGEST_SPACE = 400_000
WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
SPACE = re.compile(rf"(?<![{WHITE}])[{WHITE}]{{{LONGEST_SPACE},}}")  # only from a run's beginning: scans each run once

# A long text is encoded in pieces of this many characters, so that a signal waits for one piece, not for the text
PIECE = 1 << 20
# Places where GPT-2's pattern always cuts, whatever stands around them: white space after anything else, or a sign or
# digit after a letter. The sets hold characters that every version of Unicode knows.
LETTERS = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
BORDER = re.compile(rf"(?<=[^{WHITE}])[{WHITE}]|(?<=[{LETTERS}])[!-@\[-`{{-~\u3001\u3002\uff01\uff0c\uff1f]")


def code_points(text):
    """Unicode code points of `text`, in chunks. -> yields (position, uint32 (n,))."""
    # Python allows a lone surrogate in a str; it passes here, so that an error can name it like any other character
    for start in range(0, len(text), CHUNK):
        raw = text[start : start + CHUNK].encode("utf-32-le", "surrogatepass")
        yield start, np.frombuffer(raw, dtype="<u4")


class Tokenizer:
    """What all kinds share. Each has its own `encode_array`, `fields` of tokenizer.json, and `pieces`: the bytes of
    each token by id, b"" for a special token. Special tokens behind all others are not in `pieces`."""

    template = None  # a dict, kept as it is: conversation.Template reads it

    def set_specials(self, specials, others):
        """Give the special tokens their ids: a list of names, behind the `others` tokens, or a dict of name -> id.
        Raises ValueError for ids that are taken, or leave a gap."""
        if not isinstance(specials, dict):
            if len(set(specials)) != len(specials):
                raise ValueError("the names of the special tokens must be distinct")
            specials = {name: others + i for i, name in enumerate(specials)}
        self.vocab_size = others + len(specials)
        self.special_tokens = dict(sorted(specials.items(), key=lambda item: item[1]))
        ids = set(specials.values())
        if len(ids) != len(specials) or not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError("the special tokens must have distinct ids, none above the number of all tokens, "
                             f"{self.vocab_size:,}")
        self.ordinary = [i for i in range(self.vocab_size) if i not in ids]  # ids of all other tokens, rising

    def place_pieces(self, pieces):
        """The bytes of ordinary tokens in their order -> `pieces`: by id, with b"" for special tokens among them."""
        if self.ordinary and self.ordinary[-1] == len(pieces) - 1:
            return pieces
        by_id = [b""] * (self.ordinary[-1] + 1 if pieces else 0)
        for i, piece in zip(self.ordinary, pieces, strict=True):
            by_id[i] = piece
        return by_id

    def encode(self, text, special=False):
        """Ids of `text` as a list of int. Raises ValueError naming the first character that has no id, and its place.

        With `special`, the names of special tokens in the text become these tokens.
        """
        if not special or not self.special_tokens:
            return self.encode_array(text).tolist()
        names = sorted(self.special_tokens, key=len, reverse=True)  # of two that begin alike, the longer
        pattern = "|".join(re.escape(name) for name in names)
        ids = []
        for i, part in enumerate(re.split(f"({pattern})", text)):
            if i % 2:  # the split alternates between plain text and names
                ids.append(self.special_tokens[part])
            else:
                ids += self.encode(part)
        return ids

    def decode(self, ids, skip_special=True):
        """Text of `ids` (a sequence or one-dimensional array of integers); special tokens are skipped, or spelled out.

        Bytes that are not UTF-8 become U+FFFD. Raises ValueError naming the first id outside the vocabulary, and its
        place.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            return ""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"token ids must be one row of integers, not {ids.dtype} of shape {ids.shape}")
        unknown = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if len(unknown):
            at = int(unknown[0])
            raise ValueError(f"no token has id {ids[at]} (position {at}): the vocabulary is 0 to {self.vocab_size - 1}")
        special = {}
        for name, i in self.special_tokens.items():
            special[i] = b"" if skip_special else name.encode()
        pieces = [special[i] if i in special else self.pieces[i] for i in ids.tolist()]
        return b"".join(pieces).decode("utf-8", "replace")

    def stream_decoder(self):
        """A function that takes ids one by one. It returns the text that is complete so far, never half a character.

        At the end, call it with None for the rest. All its texts together are what `decode` gives for all ids.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        size = len(self.pieces)

        def decode_next(i):
            is_piece = i is not None and i < size  # special tokens at the end have no text
            return utf8.decode(self.pieces[i] if is_piece else b"", final=i is None)

        return decode_next

    def to_json(self):
        """The bytes of tokenizer.json: equal tokenizers have equal bytes. Format 1, unless that cannot express it."""
        fields = self.fields()
        at_end = not self.ordinary or self.ordinary[-1] == len(self.ordinary) - 1
        if not at_end or (self.bos, self.eos) != self.usual_ends() or self.template is not None:
            fields |= self.new_fields()
        return self.dump(fields)

    def new_fields(self):
        """The fields of tokenizer.json that only format 2 has."""
        name_of = {i: name for name, i in self.special_tokens.items()}
        return {"format": 2, "specials": self.special_tokens, "bos": name_of.get(self.bos),
                "eos": name_of.get(self.eos), "template": self.template}

    def changed(self, **fields):
        """A tokenizer with other `fields` of format 2: specials, bos, eos (names or None), template. Raises ValueError.
        """
        return _from_fields({**self.fields(), **self.new_fields(), **fields})

    @property
    def sha256(self):
        """The SHA-256 of tokenizer.json, the one that `sha256sum` shows."""
        return sha256(self.to_json())

    def save(self, path):
        """Write tokenizer.json, whole at any moment, into the folder `path` or as the file `path`."""
        path = Path(path)
        write_whole(path / "tokenizer.json" if path.is_dir() else path, self.to_json())


class CharTokenizer(Tokenizer):
    """One token per character: the i-th of `chars` is id i, the special tokens follow.

    `chars` is a string of distinct characters. `specials` may be a dict of name -> id instead of names; the characters
    take the ids that it leaves. Raises ValueError for a repeated character, or for more than fit into uint16.
    """

    kind = "char"

    def __init__(self, chars, specials=(BOS, EOS)):
        if len(set(chars)) != len(chars):
            raise ValueError("the characters must be distinct")
        if any("\ud800" <= c <= "\udfff" for c in chars):
            raise ValueError("a lone surrogate is half a character, and no vocabulary can hold one")
        if len(chars) + len(specials) > MAX_VOCAB:
            raise ValueError(
                f"{len(chars):,} distinct characters are too many: with {len(specials)} special tokens, "
                f"{MAX_VOCAB - len(specials):,} fit into 16-bit tokens; use a BPE tokenizer for such a text"
            )
        self.chars = chars
        self.set_specials(specials, len(chars))
        self.pieces = self.place_pieces([c.encode() for c in chars])
        self.bos, self.eos = self.usual_ends()
        self._ids = np.full(UNICODE, -1, dtype=np.int32)  # code point -> id: 4 MB, and encoding is one look-up
        for start, codes in code_points(chars):
            self._ids[codes] = self.ordinary[start : start + len(codes)]

    @classmethod
    def from_text(cls, text):
        """The tokenizer of a text's characters in code point order: nanoGPT's `sorted(set(text))`."""
        seen = np.zeros(UNICODE, dtype=bool)  # on a long text some 30 times faster than a set
        for _, codes in code_points(text):
            seen[codes] = True
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())))

    def encode_array(self, text):
        """Ids of `text`. -> uint16 (len(text),). Raises as `encode` does."""
        out = np.empty(len(text), dtype=np.uint16)
        for start, codes in code_points(text):
            ids = self._ids[codes]
            unknown = np.flatnonzero(ids < 0)
            if len(unknown):
                raise self._unknown_character(text, start + int(unknown[0]))
            out[start : start + len(ids)] = ids
        return out

    def _unknown_character(self, text, at):
        known = repr(self.chars[:100])
        if len(self.chars) > 100:
            known += " ..."
        return ValueError(
            f"cannot encode {text[at]!r} (U+{ord(text[at]):04X}) at position {at}: "
            f"this tokenizer knows {len(self.chars):,} characters, {known}"
        )

    def usual_ends(self):
        """bos and eos where format 1 does not name them."""
        return self.special_tokens.get(BOS), self.special_tokens.get(EOS)

    def fields(self):
        """The fields of tokenizer.json in format 1."""
        return {"format": 1, "kind": self.kind, "chars": self.chars, "specials": [*self.special_tokens]}

    @staticmethod
    def dump(fields):
        return (json.dumps(fields, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


class BPETokenizer(Tokenizer):
    """Byte-level BPE, run by tiktoken: GPT-2's with its ranks, or one you trained yourself (data/tok_train.py).

    `pieces` are the bytes of each token, in the order of the ids, which is the order of the merges (Sennrich et al.
    2016, arXiv:1508.07909). Every single byte is among them, so any text can be encoded. `pattern` says where a text
    is cut before anything is merged. Special tokens follow, and the last of them ends a document; `specials` may be a
    dict of name -> id instead, and then the other tokens take the ids that it leaves. Raises ValueError for a
    vocabulary that is not of this kind.
    """

    kind = "bpe"

    def __init__(self, pieces, pattern=GPT2_PATTERN, specials=(END_OF_TEXT,)):
        import tiktoken

        major, minor = tiktoken.__version__.split(".")[:2]
        if (int(major), int(minor)) < OLDEST_TIKTOKEN:
            raise ValueError(f"tiktoken {tiktoken.__version__} panics or hangs on some texts: pip install 'tiktoken>="
                             f"{'.'.join(map(str, OLDEST_TIKTOKEN))}'")
        self.pattern = pattern
        pieces = list(pieces)
        self.set_specials(specials, len(pieces))
        self.pieces = self.place_pieces(pieces)
        ranks = dict(zip(pieces, self.ordinary, strict=True))
        if len(ranks) != len(pieces) or b"" in ranks:
            raise ValueError("the tokens must be distinct, and none of them empty")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"byte 0x{missing[0]:02x} is not among the tokens, so not every text could be encoded")
        self.bos, self.eos = self.usual_ends()
        self.dtype = np.uint16 if self.vocab_size <= MAX_VOCAB else np.uint32
        try:
            self._bpe = tiktoken.Encoding(
                "minichat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
            )
        except Exception as error:  # tiktoken passes on the errors of its regular expressions
            raise ValueError(f"tiktoken refuses it: {error}") from None

    @classmethod
    def from_ranks(cls, raw):
        """The tokenizer of a .tiktoken file, given as bytes, with GPT-2's pattern and special token. The file has a
        line for each token: its bytes in base64 and its rank."""
        lines = [line.split() for line in raw.splitlines() if line.strip()]
        if any(len(line) != 2 or line[1] != b"%d" % i for i, line in enumerate(lines)):
            raise ValueError("expected lines of a token in base64 and its rank, 0, 1, ...")
        return cls([base64.b64decode(piece, validate=True) for piece, _ in lines])

    def encode_array(self, text):
        """Ids of `text`. -> uint16 (n,), or uint32 if the vocabulary is larger. Raises ValueError naming the place of
        half a character (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"cannot encode U+{ord(text[error.start]):04X} at position {error.start}: it is half a character"
            ) from None
        if len(text) <= LONGEST_SPACE:
            return self._encode(text)
        arrays = []
        at = 0
        for run in SPACE.finditer(text):
            end = run.end()
            if end < len(text):
                end -= 1  # GPT-2's pattern leaves the last blank to the word that follows
            arrays.append(self._encode(text[at : run.start()]))
            blanks = self._bpe._encode_single_piece(text[run.start() : end].encode())
            arrays.append(np.array(blanks, dtype=self.dtype))
            at = end
        arrays.append(self._encode(text[at:]))
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def _encode(self, text):
        """encode_array, piece by piece, of a text without runs of white space that exhaust tiktoken's stack."""
        arrays = []
        at = 0
        while at < len(text) or not arrays:
            # nobody knows where another pattern always cuts, so its text is one piece
            border = BORDER.search(text, at + PIECE) if self.pattern == GPT2_PATTERN else None
            end = border.start() if border else len(text)
            # straight to an array; no special token is allowed and none is refused, so their names are plain text
            ids = self._bpe.encode_to_numpy(text[at:end], allowed_special=set(), disallowed_special=())
            arrays.append(ids.astype(self.dtype))
            at = end
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def usual_ends(self):
        """bos and eos where format 1 does not name them: the last special token ends a document."""
        eos = [*self.special_tokens.values()][-1] if self.special_tokens else None
        return self.special_tokens.get(BOS, eos), eos

    def fields(self):
        """The fields of tokenizer.json in format 1."""
        pieces = [base64.b64encode(self.pieces[i]).decode() for i in self.ordinary]
        return {"format": 1, "kind": self.kind, "pattern": self.pattern, "pieces": pieces,
                "specials": [*self.special_tokens]}

    @staticmethod
    def dump(fields):
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode()


# -----------------------------------------------------------------------------
# Reading


def load_tokenizer(path):
    """The tokenizer in a file, or in a folder's tokenizer.json or meta.pkl (of a nanoGPT dataset). A file of tiktoken's
    ranks (.tiktoken) is read with GPT-2's pattern and special token.

    Raises FileNotFoundError if there is none, ValueError naming a file that is not a tokenizer and the reason.
    """
    path = Path(path)
    if path.is_dir():
        path = _tokenizer_file(path)
    elif not path.exists():
        raise FileNotFoundError(f"there is no tokenizer {path}")
    try:
        if path.suffix == ".tiktoken":
            return BPETokenizer.from_ranks(path.read_bytes())
        if path.suffix == ".pkl":
            return _from_meta_pkl(path)
        return _from_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer that can be used: {error}") from None


def _tokenizer_file(folder):
    for name in ("tokenizer.json", "meta.pkl"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor nanoGPT's meta.pkl")


def _from_json(raw):
    """The tokenizer of a tokenizer.json's bytes. Raises ValueError."""
    try:
        return _from_fields(json.loads(raw.decode()))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _from_fields(fields):
    """The tokenizer of a tokenizer.json's fields. Raises ValueError."""
    known = isinstance(fields, dict) and fields.get("format") in (1, 2)
    kind = fields.get("kind") if known else None
    if kind not in (CharTokenizer.kind, BPETokenizer.kind):
        raise ValueError('expected an object with "format": 1 or 2, and "kind": "char" or "bpe"')
    specials = fields.get("specials")
    if fields["format"] == 1 and not _is_strings(specials):
        raise ValueError('expected "specials", a list of names')
    if fields["format"] == 2 and not _is_ids(specials):
        raise ValueError('expected "specials", an object of names and ids')
    if kind == BPETokenizer.kind:
        pieces = fields.get("pieces")
        pattern = fields.get("pattern")
        if not _is_strings(pieces) or not isinstance(pattern, str):
            raise ValueError('expected "pieces", a list of tokens in base64, and "pattern", a regular expression')
        pieces = [base64.b64decode(piece, validate=True) for piece in pieces]
        tokenizer = BPETokenizer(pieces, pattern, specials)
    elif isinstance(fields.get("chars"), str):
        tokenizer = CharTokenizer(fields["chars"], specials)
    else:
        raise ValueError('expected "chars", a string in the order of the ids')
    if fields["format"] == 2:
        for name in ("bos", "eos"):
            if fields.get(name) not in (None, *specials):
                raise ValueError(f'"{name}" is {fields[name]!r}, which is not among its special tokens')
            setattr(tokenizer, name, specials.get(fields.get(name)))
        if not isinstance(fields.get("template"), (dict, type(None))):
            raise ValueError('expected "template", an object or null')
        tokenizer.template = fields.get("template")
    return tokenizer


def _is_strings(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_ids(value):
    """Whether it is a dict of special tokens: name -> id."""
    return isinstance(value, dict) and all(type(i) is int for i in value.values())


# -----------------------------------------------------------------------------
# nanoGPT's meta.pkl. It is a pickle, and a pickle from elsewhere can run code, so nothing in it may be called


class _Dtype:
    """Stands for numpy's dtype in a pickle: remembers the code, such as "i8", and the byte order."""

    def __init__(self, code, *options):
        self.code = code
        self.order = "<"

    def __setstate__(self, state):
        self.order = state[1]


def _scalar(dtype, raw):
    """Stands for numpy's scalar in a pickle. -> int or str. Raises UnpicklingError for any other kind of value."""
    known = isinstance(dtype, _Dtype) and isinstance(raw, bytes)
    order = "big" if known and dtype.order == ">" else "little"
    if known and dtype.code in (f"i{len(raw)}", f"u{len(raw)}"):
        return int.from_bytes(raw, order, signed=dtype.code[0] == "i")
    if known and dtype.code == f"U{len(raw) // 4}":
        return raw.decode("utf-32-be" if order == "big" else "utf-32-le").rstrip("\0")
    raise pickle.UnpicklingError("it holds a numpy value that is neither a whole number nor a string")


def _bytes(text, encoding):
    """Stands for _codecs.encode, by which protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes in {encoding!r}")
    return text.encode("latin-1")


def _plain_dict(*arguments):
    """Stands for a dict of `collections`: a plain dict, which the pickle fills later."""
    return dict(arguments[0]) if arguments and isinstance(arguments[0], dict) else {}


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them. A pickle runs code only through a global. OWN has the only globals
    that are allowed: for numpy's whole numbers and strings, and for the dicts of `collections`."""

    OWN = {
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "scalar"): _scalar,  # numpy 1
        ("numpy._core.multiarray", "scalar"): _scalar,  # numpy 2
        ("collections", "OrderedDict"): _plain_dict,
        ("collections", "Counter"): _plain_dict,
        ("collections", "defaultdict"): _plain_dict,
        ("_codecs", "encode"): _bytes,
    }
    OWN |= {("builtins", name): _plain_dict for name in ("int", "long", "str", "unicode")}  # a defaultdict's default

    def find_class(self, module, name):
        if module == "__builtin__":  # its name in Python 2 and in old protocols
            module = "builtins"
        if (module, name) in self.OWN:
            return self.OWN[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a pickle from elsewhere gets to call nothing")


def _read_meta_pkl(path):
    """nanoGPT's meta.pkl as a dict. Raises ValueError."""
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(meta, dict):
        raise ValueError("expected nanoGPT's dict")
    return meta


def _from_meta_pkl(path):
    """The tokenizer of nanoGPT's {vocab_size, stoi, itos}: its ids stay, and it has no special tokens."""
    meta = _read_meta_pkl(path)
    itos = meta.get("itos")
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))):
        raise ValueError('expected nanoGPT\'s "itos", a dict with the ids 0, 1, ... as its keys')
    wrong = [i for i, c in itos.items() if not isinstance(c, str) or len(c) != 1]
    if wrong:
        raise ValueError(f"token {min(wrong)} is not one character")
    size = meta.get("vocab_size", len(itos))
    if not isinstance(size, int) or size < len(itos):  # a larger one is padded
        raise ValueError(f"its vocab_size is {size!r}, but it has {len(itos)} characters")
    return CharTokenizer("".join(itos[i] for i in range(len(itos))), specials=())


def meta_vocab_size(folder):
    """The vocabulary size in a nanoGPT dataset's meta.pkl, which may hold nothing else; it may be padded.

    -> None if there is no such size, or if a tokenizer.json says more.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists() or not (folder / "meta.pkl").exists():
        return None
    try:
        meta = _read_meta_pkl(folder / "meta.pkl")
    except ValueError:
        return None
    size = meta.get("vocab_size")
    itos = meta.get("itos")
    if "vocab_size" not in meta and isinstance(itos, (dict, list, tuple)):
        size = len(itos)
    is_number = isinstance(size, int) and not isinstance(size, bool)
    return size if is_number and 0 < size <= MAX_VOCAB else None
