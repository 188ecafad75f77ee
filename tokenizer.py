"""
Text <-> token ids.

    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode("To be")          # [32, 53, 1, 40, 43] on Tiny Shakespeare
    tokenizer.decode(ids)                    # "To be"
    tokenizer.save(folder)                   # folder/tokenizer.json
    tokenizer = load_tokenizer(folder)       # that file, or nanoGPT's meta.pkl
    tokenizer = load_tokenizer("gpt2.tiktoken")  # GPT-2's byte-level BPE

Every tokenizer has `kind`, `vocab_size`, `special_tokens` (name -> id), `bos` and `eos` (ids, or None where it has
none), and what Tokenizer has. Special tokens get into a stream by their ids alone: in a text their names are plain
characters, so no text that a user types can produce one. `encode(text, special=True)` is for text of one's own that
spells them.
"""

import base64
import codecs
import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np

BOS, EOS = "<|bos|>", "<|eos|>"  # before the first and after the last token of a document
MAX_VOCAB = 65_536  # shards hold uint16
OLDEST_TIKTOKEN = 0, 13  # before it, long runs of one character hang and emoji can end the process
UNICODE = 0x110000  # code points there are
CHUNK = 1 << 22  # characters encoded at a time: bounds the memory on texts of gigabytes

END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token: between documents, so a beginning and an end
# Where GPT-2 cuts a text before it merges (Radford et al. 2019, encoder.py): contractions, words, numbers, the rest
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Half of the run of white space at which tiktoken's regular expressions, which look ahead, exhaust their stack
LONGEST_SPACE = 400_000
WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
SPACE = re.compile(rf"(?<![{WHITE}])[{WHITE}]{{{LONGEST_SPACE},}}")  # from a run's beginning: each is looked at once

# A long text is encoded in pieces, so that a signal waits for one piece, not for the text
PIECE = 1 << 20
# Where GPT-2's pattern cuts whatever stands around it: white space after something else, or a sign or digit after a
# letter. The sets are of characters that every version of Unicode knows.
LETTERS = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
BORDER = re.compile(rf"(?<=[^{WHITE}])[{WHITE}]|(?<=[{LETTERS}])[!-@\[-`{{-~\u3001\u3002\uff01\uff0c\uff1f]")


def code_points(text):
    """Unicode code points of `text`, in chunks. -> yields (position, uint32 (n,)).

    A lone surrogate, which Python allows in a str, passes, so that it can be named in an error like any character.
    """
    for start in range(0, len(text), CHUNK):
        raw = text[start : start + CHUNK].encode("utf-32-le", "surrogatepass")
        yield start, np.frombuffer(raw, dtype="<u4")


class Tokenizer:
    """What all kinds share. Each has its own `encode_array`, `to_json` and `pieces`, the bytes of each token by id."""

    def encode(self, text, special=False):
        """Ids of `text` as a list of int. Raises ValueError naming the first character that has none, and its place.

        With `special`, the names of special tokens in it become these tokens.
        """
        if not special or not self.special_tokens:
            return self.encode_array(text).tolist()
        names = sorted(self.special_tokens, key=len, reverse=True)  # of two that begin alike, the longer
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = [[self.special_tokens[part]] if i % 2 else self.encode(part) for i, part in enumerate(parts)]
        return [i for part in ids for i in part]

    def encode_batch(self, texts, pad=False):
        """Ids of each text, a list of lists. With `pad` -> (ids, mask): int64 and bool (len(texts), T), T the longest.

        Rows are padded on the right, with `eos` or else 0, where the mask is False.
        """
        rows = [self.encode(text) for text in texts]
        if not pad:
            return rows
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        ids = np.full(mask.shape, self.eos or 0, dtype=np.int64)
        ids[mask] = [i for row in rows for i in row]
        return ids, mask

    def decode(self, ids, skip_special=True):
        """Text of `ids` (a sequence or one-dimensional array of integers); special tokens by name, or left out.

        Bytes that are no UTF-8 become U+FFFD. Raises ValueError naming the first id that is not in the vocabulary, and
        its place.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            return ""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"token ids must be one row of integers, not {ids.dtype} of shape {ids.shape}")
        if len(foreign := np.flatnonzero((ids < 0) | (ids >= self.vocab_size))):
            at = int(foreign[0])
            raise ValueError(f"no token has id {ids[at]} (position {at}): the vocabulary is 0 to {self.vocab_size - 1}")
        special = {i: b"" if skip_special else name.encode() for name, i in self.special_tokens.items()}
        parts = [special[i] if i in special else self.pieces[i] for i in ids.tolist()]
        return b"".join(parts).decode("utf-8", "replace")

    def stream_decoder(self):
        """A function of one id that returns the text which is whole by now, never half a character; of None: the rest.

        What it returns, put together, is what `decode` gives for all ids.
        """
        half = codecs.getincrementaldecoder("utf-8")("replace")
        size = len(self.pieces)
        return lambda i: half.decode(self.pieces[i] if i is not None and i < size else b"", final=i is None)

    @property
    def sha256(self):
        """Of tokenizer.json, so that `sha256sum` shows the same."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def save(self, path):
        """Write tokenizer.json into the folder `path`, or the file `path`: at once, never a part of it."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        beside = path.with_name(path.name + ".writing")
        beside.write_bytes(self.to_json())
        os.replace(beside, path)


class CharTokenizer(Tokenizer):
    """One token per character: the i-th of `chars` is id i, the special tokens follow.

    `chars` is a string of distinct characters. Raises ValueError where it is not, or has more than fit into uint16.
    """

    kind = "char"

    def __init__(self, chars, specials=(BOS, EOS)):
        if len(set(chars)) != len(chars) or len(set(specials)) != len(specials):
            raise ValueError("the characters, and the names of the special tokens, must be distinct")
        if any("\ud800" <= c <= "\udfff" for c in chars):
            raise ValueError("a lone surrogate is half a character and cannot be in a vocabulary")
        if len(chars) + len(specials) > MAX_VOCAB:
            raise ValueError(
                f"{len(chars):,} distinct characters are too many: with {len(specials)} special tokens, "
                f"{MAX_VOCAB - len(specials):,} fit into 16-bit tokens; such a text is one for a BPE tokenizer"
            )
        self.chars, self.pieces = chars, [c.encode() for c in chars]
        self.special_tokens = {name: len(chars) + i for i, name in enumerate(specials)}
        self.bos, self.eos = self.special_tokens.get(BOS), self.special_tokens.get(EOS)
        self.vocab_size = len(chars) + len(specials)
        self._ids = np.full(UNICODE, -1, dtype=np.int32)  # code point -> id; 4 MB make encoding one look-up
        for start, codes in code_points(chars):
            self._ids[codes] = np.arange(start, start + len(codes))

    @classmethod
    def from_text(cls, text):
        """The tokenizer whose characters are those of `text` in code point order: nanoGPT's `sorted(set(text))`."""
        seen = np.zeros(UNICODE, dtype=bool)  # some 30 times as fast as a set on a long text
        for _, codes in code_points(text):
            seen[codes] = True
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())))

    def encode_array(self, text):
        """Ids of `text`. -> uint16 (len(text),). Raises as `encode` does."""
        out = np.empty(len(text), dtype=np.uint16)
        for start, codes in code_points(text):
            ids = self._ids[codes]
            if len(unknown := np.flatnonzero(ids < 0)):
                at = start + int(unknown[0])
                known = repr(self.chars) if len(self.chars) <= 100 else repr(self.chars[:100]) + " ..."
                raise ValueError(
                    f"cannot encode {text[at]!r} (U+{ord(text[at]):04X}) at position {at}: "
                    f"this tokenizer knows {len(self.chars):,} characters, {known}"
                )
            out[start : start + len(ids)] = ids
        return out

    def to_json(self):
        """The bytes of tokenizer.json: equal tokenizers have equal bytes."""
        fields = {"format": 1, "kind": self.kind, "chars": self.chars, "specials": [*self.special_tokens]}
        return (json.dumps(fields, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


class BPETokenizer(Tokenizer):
    """Byte-level BPE, run by tiktoken: GPT-2's with its ranks, or one trained on a text of one's own.

    `pieces` are the bytes of each token in the order of the ids, which is that of the merges (Sennrich et al. 2016,
    arXiv:1508.07909); every single byte is among them, so there is no text that it cannot encode. `pattern` says where
    a text is cut before anything is merged. Special tokens follow, the last of them ending a document. Raises
    ValueError for what is no such vocabulary.
    """

    kind = "bpe"

    def __init__(self, pieces, pattern=GPT2_PATTERN, specials=(END_OF_TEXT,)):
        import tiktoken

        if tuple(map(int, tiktoken.__version__.split(".")[:2])) < OLDEST_TIKTOKEN:
            raise ValueError(f"tiktoken {tiktoken.__version__} panics or hangs on some texts: pip install 'tiktoken>="
                             f"{'.'.join(map(str, OLDEST_TIKTOKEN))}'")
        self.pieces, self.pattern = list(pieces), pattern
        ranks = {piece: i for i, piece in enumerate(self.pieces)}
        self.special_tokens = {name: len(self.pieces) + i for i, name in enumerate(specials)}
        self.vocab_size = len(self.pieces) + len(self.special_tokens)
        if len(ranks) != len(self.pieces) or len(self.special_tokens) != len(specials):
            raise ValueError("the tokens, and the names of the special tokens, must be distinct")
        if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"byte 0x{lacking[0]:02x} is not among the tokens, so not every text could be encoded")
        if self.vocab_size > MAX_VOCAB:
            raise ValueError(f"a vocabulary of {self.vocab_size:,} does not fit into 16-bit tokens ({MAX_VOCAB:,})")
        self.eos = self.special_tokens[specials[-1]] if specials else None
        self.bos = self.special_tokens.get(BOS, self.eos)
        try:
            self._bpe = tiktoken.Encoding(
                "minichat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
            )
        except Exception as error:  # tiktoken raises what its regular expressions do
            raise ValueError(f"tiktoken refuses it: {error}") from None

    @classmethod
    def from_ranks(cls, raw):
        """GPT-2's pattern and special token with the ranks of a .tiktoken file, given as bytes: a line for each token,
        its bytes in base64 and its rank."""
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
        parts, at = [], 0
        for run in SPACE.finditer(text) if len(text) > LONGEST_SPACE else ():
            end = run.end() - (run.end() < len(text))  # GPT-2's pattern leaves the last one to the word that follows
            piece = self._bpe._encode_single_piece(text[run.start() : end].encode())
            parts += [self._encode(text[at : run.start()]), np.array(piece, dtype=np.uint16)]
            at = end
        return np.concatenate([*parts, self._encode(text[at:])]) if parts else self._encode(text)

    def _encode(self, text):
        parts, at = [], 0
        while at < len(text) or not parts:
            border = BORDER.search(text, at + PIECE) if self.pattern == GPT2_PATTERN else None
            end = border.start() if border else len(text)
            # without a list of numbers in between; no special token is allowed and none refused, so all are plain text
            ids = self._bpe.encode_to_numpy(text[at:end], allowed_special=set(), disallowed_special=())
            parts.append(ids.astype(np.uint16))
            at = end
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def to_json(self):
        """The bytes of tokenizer.json: equal tokenizers have equal bytes."""
        pieces = [base64.b64encode(piece).decode() for piece in self.pieces]
        fields = {"format": 1, "kind": self.kind, "pattern": self.pattern, "pieces": pieces}
        return (json.dumps(fields | {"specials": [*self.special_tokens]}, ensure_ascii=False) + "\n").encode()


# -----------------------------------------------------------------------------
# Reading


def load_tokenizer(path):
    """The tokenizer in a file, or in a folder's tokenizer.json or (a nanoGPT dataset) meta.pkl. A file of tiktoken's
    ranks (.tiktoken) is read with GPT-2's pattern and special token.

    Raises FileNotFoundError where there is none, ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "meta.pkl") if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} has no tokenizer: neither tokenizer.json nor nanoGPT's meta.pkl")
        path = found[0]
    elif not path.exists():
        raise FileNotFoundError(f"there is no tokenizer {path}")
    try:
        if path.suffix == ".tiktoken":
            return BPETokenizer.from_ranks(path.read_bytes())
        return _from_meta_pkl(path) if path.suffix == ".pkl" else _from_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer that can be used: {error}") from None


def _from_json(raw):
    try:
        fields = json.loads(raw.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    kind = fields.get("kind") if isinstance(fields, dict) and fields.get("format") == 1 else None
    if kind not in (CharTokenizer.kind, BPETokenizer.kind):
        raise ValueError('expected an object with "format": 1 and "kind": "char" or "bpe"')
    specials = fields.get("specials")
    if not isinstance(specials, list) or not all(isinstance(s, str) for s in specials):
        raise ValueError('expected "specials", a list of names')
    if kind == BPETokenizer.kind:
        pieces, pattern = fields.get("pieces"), fields.get("pattern")
        if not isinstance(pieces, list) or not all(isinstance(p, str) for p in pieces) or not isinstance(pattern, str):
            raise ValueError('expected "pieces", a list of tokens in base64, and "pattern", a regular expression')
        return BPETokenizer([base64.b64decode(piece, validate=True) for piece in pieces], pattern, specials)
    if not isinstance(fields.get("chars"), str):
        raise ValueError('expected "chars", a string in the order of the ids')
    return CharTokenizer(fields["chars"], specials)


class _Dtype:
    """Stands for numpy's dtype in a pickle: holds what it was called with."""

    def __init__(self, code, *options):
        self.code, self.order = code, "<"

    def __setstate__(self, state):
        self.order = state[1]


def _scalar(dtype, raw):
    """Stands for numpy's scalar in a pickle. -> int or str. Raises UnpicklingError for any other."""
    known = isinstance(dtype, _Dtype) and isinstance(raw, bytes)
    order = "big" if known and dtype.order == ">" else "little"
    if known and dtype.code in (f"i{len(raw)}", f"u{len(raw)}"):
        return int.from_bytes(raw, order, signed=dtype.code[0] == "i")
    if known and dtype.code == f"U{len(raw) // 4}":
        return raw.decode("utf-32-be" if order == "big" else "utf-32-le").rstrip("\0")
    raise pickle.UnpicklingError("it holds one of numpy's values that is neither a whole number nor a string")


def _bytes(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes in {encoding!r}")
    return text.encode("latin-1")


def _empty(kind):
    """Stands for a class of `collections` that is filled after it was made: a plain `kind`."""
    return lambda *arguments: kind(*arguments[:1]) if arguments and isinstance(arguments[0], kind) else kind()


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them. A pickle runs code only through a global: this has none besides
    its own, which read numpy's whole numbers and strings, and the dicts of `collections` as plain ones."""

    OWN = {("numpy", "dtype"): _Dtype, ("numpy.core.multiarray", "scalar"): _scalar,
           ("numpy._core.multiarray", "scalar"): _scalar, ("collections", "OrderedDict"): _empty(dict),
           ("collections", "Counter"): _empty(dict), ("collections", "defaultdict"): _empty(dict),
           ("_codecs", "encode"): _bytes,  # how protocol 2 has bytes
           **{("builtins", name): _empty(dict) for name in ("int", "long", "str", "unicode")}}  # what defaultdict has

    def find_class(self, module, name):
        module = {"__builtin__": "builtins"}.get(module, module)  # as Python 2 and old protocols call it
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
    """nanoGPT's {vocab_size, stoi, itos}: its ids are kept, and it has no special tokens."""
    meta = _read_meta_pkl(path)
    itos = meta.get("itos")
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))):
        raise ValueError('expected nanoGPT\'s "itos", a dict with the ids 0, 1, ... as its keys')
    if wrong := [i for i, c in itos.items() if not isinstance(c, str) or len(c) != 1]:
        raise ValueError(f"token {min(wrong)} is not one character")
    size = meta.get("vocab_size", len(itos))
    if not isinstance(size, int) or size < len(itos):  # a larger one is padded
        raise ValueError(f"its vocab_size is {size!r}, but it has {len(itos)} characters")
    return CharTokenizer("".join(itos[i] for i in range(len(itos))), specials=())


def meta_vocab_size(folder):
    """The vocabulary of a nanoGPT dataset as its meta.pkl has it, which may be padded, or be all that is in there. None
    where nothing says it, or a tokenizer.json says more."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists() or not (folder / "meta.pkl").exists():
        return None
    try:
        meta = _read_meta_pkl(folder / "meta.pkl")
    except ValueError:
        return None
    itos = meta.get("itos")
    size = meta.get("vocab_size", len(itos) if isinstance(itos, (dict, list, tuple)) else None)
    return size if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= MAX_VOCAB else None
