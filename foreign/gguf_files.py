"""
A .gguf, llama.cpp's file: a model, its tokenizer and its chat template in one. Architectures: gpt2, llama, qwen3.

The header is read here, with every length held against the file's, so that a damaged file is an error and no more. The
package gguf turns quantised tensors into numbers. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from functools import partial

import numpy as np
import torch

from configurator import fail
from foreign.byte_level import PRE, build
from foreign.names import OWN_GGUF_KEY, Found, Made, from_rotary_names, refuse_lfs_pointer, rotary_config
from inference.rounding import Packed
from model import GPTConfig

NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
TEXT, ARRAY = 8, 9  # the other types of values
MOST_DIMENSIONS = 4
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens (gguf.TokenType)


class GGUF:
    """The header of a file: `values` by key, `tensors` by name. Its tensors stay in the file, mapped into memory.

    Raises ValueError naming a file that is damaged or of an unknown version.
    """

    def __init__(self, path):
        try:
            import gguf
        except ImportError:
            fail("a .gguf is read with the package gguf: pip install -e '.[export]' -c constraints.txt")
        refuse_lfs_pointer(path)
        self.gguf = gguf
        self.path = path
        self.data = np.memmap(path, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        self.at = 0
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
        self.at = 4
        version = self.number("<u4")
        if version not in (2, 3):
            raise ValueError(f"{path} has version {version} of GGUF: 2 and 3, with the low byte first, are read")
        try:
            self.read_header()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def read_header(self):
        n_tensors = self.number("<u8")
        n_values = self.number("<u8")
        self.values = {}
        for _ in range(n_values):
            key = self.text()
            self.values[key] = self.value(self.number("<u4"))
        self.tensors = {}  # name -> (shape, rows last in the file first here; type; offset)
        for _ in range(n_tensors):
            name = self.text()
            n_dims = self.number("<u4")
            if n_dims > MOST_DIMENSIONS:
                raise ValueError(f"{self.path} is damaged: {name} has {n_dims} dimensions")
            shape = [int(size) for size in self.numbers("<u8", n_dims)]
            self.tensors[name] = shape[::-1], self.number("<u4"), self.number("<u8")
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.path} is damaged: general.alignment is {alignment!r}")
        self.start = -(-self.at // alignment) * alignment

    def take(self, size):
        """The next `size` bytes."""
        if size > len(self.data) - self.at:
            raise ValueError(f"{self.path} is damaged or cut off: it ends within its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, code, count):
        return np.frombuffer(self.take(np.dtype(code).itemsize * count), dtype=code)

    def number(self, code):
        return self.numbers(code, 1)[0].item()

    def text(self):
        return self.take(self.number("<u8")).tobytes().decode()

    def value(self, kind):
        """The next value: a number, a str, or a list of either."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"{self.path} is damaged: no value has the type {kind}")
        kind = self.number("<u4")
        count = self.number("<u8")
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind], count).tolist()
        if kind != TEXT:
            raise ValueError(f"{self.path}: a list of type {kind} is not known")
        return [self.text() for _ in range(count)]

    def __getitem__(self, key):
        """A value. Raises ValueError naming one that is missing."""
        if key not in self.values:
            raise ValueError(f"{self.path} lacks {key}")
        return self.values[key]

    def blocks(self, name):
        """A tensor as it lies in the file -> (its bytes, uint8 (..., N, bytes of a row); its type). Raises ValueError
        if its type is not known, or the file does not hold it whole."""
        shape, number, offset = self.tensors[name]
        gguf = self.gguf
        try:
            kind = gguf.GGMLQuantizationType(number)
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise ValueError(f"{self.path}: {name} is of type {number}, which is not known") from None
        if not shape or shape[-1] % per_block:
            raise ValueError(f"{self.path} is damaged: {name} of shape {shape} is not made of blocks of {per_block}")
        size = int(np.prod(shape, dtype=object)) // per_block * block_bytes
        begin = self.start + offset
        if begin + size > len(self.data):
            raise ValueError(f"{self.path} is cut off: it ends within {name}; download it again")
        return self.data[begin : begin + size].reshape(*shape[:-1], shape[-1] // per_block * block_bytes), kind

    def tensor(self, name):
        """A tensor in float32. Raises ValueError for a type that cannot be read, or one that the file does not hold
        whole."""
        raw, kind = self.blocks(name)
        try:
            values = self.gguf.quants.dequantize(raw, kind)
        except NotImplementedError:
            raise ValueError(f"{self.path}: {name} is of type {kind.name}, which cannot be turned into "
                             "numbers here") from None
        return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy, which no longer needs the file


# -----------------------------------------------------------------------------
# The model


def read_gguf(file):
    """The model in a GGUF -> (GPTConfig, name -> tensor, name -> Packed). Raises ValueError."""
    family = file["general.architecture"]
    if family not in ("gpt2", "llama", "qwen3"):
        raise ValueError(f"{file.path} holds a model of architecture {family!r}: only gpt2, llama, qwen3 are read")
    if "rope_freqs.weight" in file.tensors:
        raise ValueError(f"{file.path}: its rotary positions are stretched by 'llama3', and model.py only knows linear "
                         "and yarn")
    if file.values.get(f"{family}.expert_count"):
        raise ValueError(f"{file.path} is a mixture of experts, which model.py does not know")
    config = config_of(file, family)
    if config.n_layer > len(file.tensors):  # before that many layers are made
        raise ValueError(f"{file.path} is damaged: it has {config.n_layer} layers and {len(file.tensors)} tensors")
    tensors = under_our_names(file, config, family, file.tensors, file.tensor)
    return config, tensors, packed_matrices(file, config, family)


def under_our_names(file, config, family, names, read):
    """The tensors `names` of a file -> Made, under our names. read(name) gives one, in any form that has its rows."""
    to_theirs = file.gguf.get_tensor_name_map(file.gguf.MODEL_ARCH[family.upper()], config.n_layer).get_name
    known = {to_theirs(name, (".weight", ".bias")): name for name in names_in_transformers(family, config)}
    makers = {}
    for name in names:
        theirs = known.get(name, name)
        rows = family == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight"))
        makers[theirs] = partial(halves_first, file, name, config, read) if rows else partial(read, name)
    tensors = Made(makers)
    return tensors if family == "gpt2" else from_rotary_names(tensors, config, family)


def config_of(file, family):
    """The GPTConfig in a file's values. Raises ValueError."""

    def value(key, *default):
        if default and f"{family}.{key}" not in file.values:
            return default[0]
        found = file[f"{family}.{key}"]
        if isinstance(found, (list, str)):
            raise ValueError(f"{file.path}: {family}.{key} is {found!r}: layers that differ are not known")
        return found

    sizes = {
        "block_size": value("context_length"), "n_layer": value("block_count"), "n_embd": value("embedding_length"),
        "n_head": value("attention.head_count"), "tie_weights": "output.weight" not in file.tensors,
        "vocab_size": vocabulary_size(file),
    }
    width = value("feed_forward_length")
    if family == "gpt2":
        width = 0 if width == 4 * sizes["n_embd"] else width
        return GPTConfig(**sizes, mlp_width=width, norm_eps=single(value("attention.layer_norm_epsilon")))
    rotated = value("rope.dimension_count", sizes["n_embd"] // max(1, sizes["n_head"]))
    sizes |= {
        "n_kv_head": value("attention.head_count_kv", sizes["n_head"]), "mlp_dim": width, "head_dim": rotated,
        "norm_eps": single(value("attention.layer_norm_rms_epsilon")), "rope_theta": value("rope.freq_base", 10_000.0),
    }
    if {value("attention.key_length", rotated), value("attention.value_length", rotated)} != {rotated}:
        raise ValueError(f"{file.path}: only a part of each head is rotated, which model.py does not know")
    scaling = file.values.get(f"{family}.rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise ValueError(f"{file.path}: its rotary positions are stretched by {scaling!r}, and model.py only knows "
                         "linear and yarn")
    if scaling != "none":
        sizes |= {"rope_scaling": scaling, "rope_factor": value("rope.scaling.factor")}
    if scaling == "yarn":  # our block_size is the stretched context
        first = value("rope.scaling.original_context_length", sizes["block_size"])
        sizes["block_size"] = round(first * sizes["rope_factor"])
    return rotary_config(family, sizes, file.path)


def single(number):
    """A float32 in the file as the shortest decimal that is this float32: 1e-5 and not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def vocabulary_size(file):
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks token_embd.weight")
    return file.tensors["token_embd.weight"][0][0]


def names_in_transformers(family, config):
    """The names that the class of transformers has for a model's tensors; gpt2's are ours as well."""
    layers = range(config.n_layer)
    if family == "gpt2":
        parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        modules = ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"]
        modules += [f"transformer.h.{i}.{part}" for i in layers for part in parts]
        return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    parts = ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
             "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    if family == "qwen3":
        parts += ("self_attn.q_norm", "self_attn.k_norm")
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return names + [f"model.layers.{i}.{part}.weight" for i in layers for part in parts]


def halves_first(file, name, config, read):
    """A matrix of queries or keys of llama, where llama.cpp rotates pairs of neighbours: the rows of each head with the
    first of every pair first, so that the two halves of the head are rotated, as in transformers and here."""
    p = read(name)
    D = config.head_dim
    if p.ndim != 2 or len(p) % D:
        raise ValueError(f"{file.path}: {name} of shape {tuple(p.shape)} is not made of heads of {D} rows")
    return p.view(-1, D // 2, 2, p.size(1)).transpose(1, 2).reshape(p.shape)


# -----------------------------------------------------------------------------
# Matrices of 4 and 8 bits, as they are

PACKED = {"Q4_0": (4, "codes", "scale"), "Q4_1": (4, "codes", "scale", "minimum"), "Q8_0": (8, "codes", "scale")}
GROUP = 32  # weights of a row that share a scale


def packed_matrices(file, config, family):
    """The matrices that lie in the file as q4_0, q4_1 or q8_0 -> {our name: Packed}.

    Groups lie along the inputs, so their rows change places and join as those of floats do. A c_attn is only there if
    the matrices of queries, keys and values are of one type.
    """
    packed = {}
    for kind, (bits, *parts) in PACKED.items():
        number = file.gguf.GGMLQuantizationType[kind]
        names = [name for name, (shape, own, _) in file.tensors.items() if own == number and len(shape) == 2]
        read = [under_our_names(file, config, family, names, partial(packed_part, file, part)) for part in parts]
        for name in read[0]:
            packed[name] = Packed(bits, GROUP, partial(read_packed, read, name))
    for i in range(config.n_layer):
        names = [f"blk.{i}.attn_{letter}.weight" for letter in "qkv"]
        if len({file.tensors[name][1] for name in names if name in file.tensors}) > 1:
            packed.pop(f"transformer.h.{i}.attn.c_attn.weight", None)
    return packed


def read_packed(parts, name):
    codes, scale, *minimum = (part[name] for part in parts)
    one = [p[:, ::GROUP].contiguous() for p in (scale, *minimum)]  # for each group
    return codes, one[0], one[1] if minimum else None


def packed_part(file, part, name):
    """The codes, uint8 (N, K), of a matrix, or the scale or minimum of each of its weights, float16 (N, K).

    ggml's blocks of 32 weights begin with the scale, and in q4_1 with the minimum behind it. In 4 bits, byte j has
    weight j in its low half and weight j + 16 in its high half; in 8 bits it is the step itself, -128 .. 127.
    """
    raw, kind = file.blocks(name)
    blocks = np.array(raw).reshape(len(raw), -1, file.gguf.GGML_QUANT_SIZES[kind][1])  # (N, K / 32, bytes of a block)
    head = 2 * (len(PACKED[kind.name]) - 2)  # a float16 for each part besides the codes
    body = blocks[..., head:]
    if part != "codes":
        both = np.ascontiguousarray(blocks[..., :head]).view("<f2")  # (N, K / 32, 1 or 2)
        values = both[..., [int(part == "minimum")]].repeat(GROUP, -1)
    elif kind.name == "Q8_0":
        values = body ^ 0x80  # + 128
    else:
        values = np.concatenate((body & 15, body >> 4), -1)
    return torch.from_numpy(values.reshape(len(raw), -1))


# -----------------------------------------------------------------------------
# The tokenizer


def gguf_tokenizer(file):
    """The tokenizer in a GGUF -> (tokenizer, how many bytes it adds at the end), or (None, 0) if it has none. Raises
    ValueError for one that is not byte-level BPE with a known pattern."""
    kind = file.values.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None, 0
    if kind != "gpt2":
        raise ValueError(f"{file.path}: its tokenizer is {kind!r} and not byte-level BPE, which llama.cpp calls gpt2")
    pre = file.values.get("tokenizer.ggml.pre", "default")
    if pre not in PRE:
        raise ValueError(f"{file.path}: tokenizer.ggml.pre is {pre!r}, and the patterns that are known are "
                         f"{', '.join(PRE)}")
    names = file["tokenizer.ggml.tokens"]
    types = file.values.get("tokenizer.ggml.token_type") or [NORMAL] * len(names)
    merges = file.values.get("tokenizer.ggml.merges") or []
    if len(types) != len(names):
        raise ValueError(f"{file.path} is damaged: it has {len(names)} tokens and {len(types)} types")
    while types and types[-1] == UNUSED:  # they only pad the table
        types = types[:-1]
    words = {}
    specials = {}
    for i, (name, kind) in enumerate(zip(names, types, strict=False)):
        (words if kind == NORMAL else specials)[name] = i
    pairs = [tuple(pair.split(" ")) for pair in merges]
    try:
        tokenizer, added = build(words, [pair for pair in pairs if pair[0] not in specials], specials, PRE[pre])
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    ends = {}
    for end in ("bos", "eos"):
        i = file.values.get(f"tokenizer.ggml.{end}_token_id", -1)
        ends[end] = names[i] if 0 <= i < len(types) and names[i] in specials else None
    return tokenizer.changed(**ends), added


def gguf_template(file):
    """The chat template in a GGUF -> Found or None."""
    if OWN_GGUF_KEY in file.values:
        try:
            fields = json.loads(file.values[OWN_GGUF_KEY])
        except (ValueError, TypeError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise ValueError(f"{file.path} is damaged: {OWN_GGUF_KEY} is no JSON object")
        return Found(str(file.path), fields=fields)
    jinja = file.values.get("tokenizer.chat_template")
    return Found(str(file.path), jinja=jinja) if isinstance(jinja, str) else None
