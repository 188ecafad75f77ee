"""
Text <-> token ids.

    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode("To be")          # [32, 53, 1, 40, 43] on Tiny Shakespeare
    tokenizer.decode(ids)                    # "To be"
    tokenizer.save(folder)                   # folder/tokenizer.json
    tokenizer = load_tokenizer(folder)       # that file, or nanoGPT's meta.pkl
    tokenizer = load_tokenizer("gpt2.tiktoken")  # GPT-2's byte-level BPE

Every tokenizer has `kind`, `vocab_size`, `special_tokens` (name -> id), `bos` and `eos` (ids, or None if there is
none), and the methods of Tokenizer. Special tokens enter a stream only by their ids: in a text their names are plain
characters, so no text that a user types can produce one. `encode(text, special=True)` is for text you wrote yourself,
which spells them out.
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
    """What all kinds share. Each has its own `encode_array`, `to_json` and `pieces`, the bytes of each token by id."""

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
            is_piece = i is not None and i < size  # special tokens have no text
            return utf8.decode(self.pieces[i] if is_piece else b"", final=i is None)

        return decode_next

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

    `chars` is a string of distinct characters. Raises ValueError for a repeated one, or for more than fit into uint16.
    """

    kind = "char"

    def __init__(self, chars, specials=(BOS, EOS)):
        if len(set(chars)) != len(chars) or len(set(specials)) != len(specials):
            raise ValueError("the characters, and the names of the special tokens, must be distinct")
        if any("\ud800" <= c <= "\udfff" for c in chars):
            raise ValueError("a lone surrogate is half a character, and no vocabulary can hold one")
        if len(chars) + len(specials) > MAX_VOCAB:
            raise ValueError(
                f"{len(chars):,} distinct characters are too many: with {len(specials)} special tokens, "
                f"{MAX_VOCAB - len(specials):,} fit into 16-bit tokens; use a BPE tokenizer for such a text"
            )
        self.chars = chars
        self.pieces = [c.encode() for c in chars]
        self.special_tokens = {name: len(chars) + i for i, name in enumerate(specials)}
        self.bos = self.special_tokens.get(BOS)
        self.eos = self.special_tokens.get(EOS)
        self.vocab_size = len(chars) + len(specials)
        self._ids = np.full(UNICODE, -1, dtype=np.int32)  # code point -> id: 4 MB, and encoding is one look-up
        for start, codes in code_points(chars):
            self._ids[codes] = np.arange(start, start + len(codes))

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

    def to_json(self):
        """The bytes of tokenizer.json: equal tokenizers have equal bytes."""
        fields = {"format": 1, "kind": self.kind, "chars": self.chars, "specials": [*self.special_tokens]}
        return (json.dumps(fields, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


class BPETokenizer(Tokenizer):
    """Byte-level BPE, run by tiktoken: GPT-2's with its ranks, or one you trained yourself (data/tok_train.py).

    `pieces` are the bytes of each token, in the order of the ids, which is the order of the merges (Sennrich et al.
    2016, arXiv:1508.07909). Every single byte is among them, so any text can be encoded. `pattern` says where a text
    is cut before anything is merged. Special tokens follow, and the last of them ends a document. Raises ValueError
    for a vocabulary that is not of this kind.
    """

    kind = "bpe"

    def __init__(self, pieces, pattern=GPT2_PATTERN, specials=(END_OF_TEXT,)):
        import tiktoken

        major, minor = tiktoken.__version__.split(".")[:2]
        if (int(major), int(minor)) < OLDEST_TIKTOKEN:
            raise ValueError(f"tiktoken {tiktoken.__version__} panics or hangs on some texts: pip install 'tiktoken>="
                             f"{'.'.join(map(str, OLDEST_TIKTOKEN))}'")
        self.pieces = list(pieces)
        self.pattern = pattern
        ranks = {piece: i for i, piece in enumerate(self.pieces)}
        self.special_tokens = {name: len(self.pieces) + i for i, name in enumerate(specials)}
        self.vocab_size = len(self.pieces) + len(self.special_tokens)
        if len(ranks) != len(self.pieces) or len(self.special_tokens) != len(specials):
            raise ValueError("the tokens, and the names of the special tokens, must be distinct")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"byte 0x{missing[0]:02x} is not among the tokens, so not every text could be encoded")
        if self.vocab_size > MAX_VOCAB:
            raise ValueError(f"a vocabulary of {self.vocab_size:,} does not fit into 16-bit tokens ({MAX_VOCAB:,})")
        self.eos = self.special_tokens[specials[-1]] if specials else None
        self.bos = self.special_tokens.get(BOS, self.eos)
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
        """Ids of `text`. -> uint16 (n,). Raises ValueError naming the place of half a character (a lone surrogate)."""
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
            arrays.append(np.array(blanks, dtype=np.uint16))
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
            arrays.append(ids.astype(np.uint16))
            at = end
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def to_json(self):
        """The bytes of tokenizer.json: equal tokenizers have equal bytes."""
        pieces = [base64.b64encode(piece).decode() for piece in self.pieces]
        fields = {"format": 1, "kind": self.kind, "pattern": self.pattern, "pieces": pieces,
                  "specials": [*self.special_tokens]}
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
        fields = json.loads(raw.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    known = isinstance(fields, dict) and fields.get("format") == 1
    kind = fields.get("kind") if known else None
    if kind not in (CharTokenizer.kind, BPETokenizer.kind):
        raise ValueError('expected an object with "format": 1 and "kind": "char" or "bpe"')
    specials = fields.get("specials")
    if not _is_strings(specials):
        raise ValueError('expected "specials", a list of names')
    if kind == BPETokenizer.kind:
        pieces = fields.get("pieces")
        pattern = fields.get("pattern")
        if not _is_strings(pieces) or not isinstance(pattern, str):
            raise ValueError('expected "pieces", a list of tokens in base64, and "pattern", a regular expression')
        return BPETokenizer([base64.b64decode(piece, validate=True) for piece in pieces], pattern, specials)
    if not isinstance(fields.get("chars"), str):
        raise ValueError('expected "chars", a string in the order of the ids')
    return CharTokenizer(fields["chars"], specials)


def _is_strings(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


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
