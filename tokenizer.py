"""
Text <-> token ids.

    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode("To be")          # [32, 53, 1, 40, 43] on Tiny Shakespeare
    tokenizer.decode(ids)                    # "To be"
    tokenizer.save(folder)                   # folder/tokenizer.json
    tokenizer = load_tokenizer(folder)       # that file, or nanoGPT's meta.pkl

Every tokenizer has `kind`, `vocab_size`, `special_tokens` (name -> id), `bos` and `eos` (ids, or None where it has
none), `encode`, `encode_array`, `decode`, `save` and `sha256`. Special tokens get into a stream by their ids alone: in
a text their names are plain characters, so no text that a user types can produce one.
"""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np

BOS, EOS = "<|bos|>", "<|eos|>"  # before the first and after the last token of a document
MAX_VOCAB = 65_536  # shards hold uint16
UNICODE = 0x110000  # code points there are
CHUNK = 1 << 22  # characters encoded at a time: bounds the memory on texts of gigabytes


def code_points(text):
    """Unicode code points of `text`, in chunks. -> yields (position, uint32 (n,)).

    A lone surrogate, which Python allows in a str, passes, so that it can be named in an error like any character.
    """
    for start in range(0, len(text), CHUNK):
        raw = text[start : start + CHUNK].encode("utf-32-le", "surrogatepass")
        yield start, np.frombuffer(raw, dtype="<u4")


class CharTokenizer:
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
        self.chars = chars
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

    def encode(self, text):
        """Ids of `text` as a list of int. Raises ValueError naming the first character that has none, and its place."""
        return self.encode_array(text).tolist()

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

    def decode(self, ids, skip_special=True):
        """Text of `ids` (a sequence or one-dimensional array of integers); special tokens by name, or left out.

        Raises ValueError naming the first id that is not in the vocabulary, and its place.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            return ""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"token ids must be one row of integers, not {ids.dtype} of shape {ids.shape}")
        if len(foreign := np.flatnonzero((ids < 0) | (ids >= self.vocab_size))):
            at = int(foreign[0])
            raise ValueError(f"no token has id {ids[at]} (position {at}): the vocabulary is 0 to {self.vocab_size - 1}")
        pieces = [*self.chars, *("" if skip_special else name for name in self.special_tokens)]
        return "".join([pieces[i] for i in ids.tolist()])

    def to_json(self):
        """The bytes of tokenizer.json: equal tokenizers have equal bytes."""
        fields = {"format": 1, "kind": self.kind, "chars": self.chars, "specials": [*self.special_tokens]}
        return (json.dumps(fields, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()

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


# -----------------------------------------------------------------------------
# Reading


def load_tokenizer(path):
    """The tokenizer in a file, or in a folder's tokenizer.json or (a nanoGPT dataset) meta.pkl.

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
        return _from_meta_pkl(path) if path.suffix == ".pkl" else _from_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer that can be used: {error}") from None


def _from_json(raw):
    try:
        fields = json.loads(raw.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(fields, dict) or fields.get("format") != 1 or fields.get("kind") != CharTokenizer.kind:
        raise ValueError('expected an object with "format": 1 and "kind": "char"')
    chars, specials = fields.get("chars"), fields.get("specials")
    if not isinstance(chars, str) or not isinstance(specials, list) or not all(isinstance(s, str) for s in specials):
        raise ValueError('expected "chars", a string in the order of the ids, and "specials", a list of names')
    return CharTokenizer(chars, specials)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them. A pickle runs code only through a global, and this has none."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a pickle from elsewhere gets to call nothing")


def _from_meta_pkl(path):
    """nanoGPT's {vocab_size, stoi, itos}: its ids are kept, and it has no special tokens."""
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{type(error).__name__}: {error}") from None
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))):
        raise ValueError('expected nanoGPT\'s "itos", a dict with the ids 0, 1, ... as its keys')
    if wrong := [i for i, c in itos.items() if not isinstance(c, str) or len(c) != 1]:
        raise ValueError(f"token {wrong[0]} is not one character")
    if meta.get("vocab_size", len(itos)) != len(itos):
        raise ValueError(f"its vocab_size is {meta['vocab_size']!r}, but it has {len(itos)} characters")
    return CharTokenizer("".join(itos[i] for i in range(len(itos))), specials=())
