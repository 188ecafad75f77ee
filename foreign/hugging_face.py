"""
A Hugging Face folder: config.json, .safetensors, tokenizer.json, a chat template. Classes: GPT-2's, Llama's, Qwen3's,
NanoChat's. No code of a folder is executed, and a file that could hold some is not read.
"""

from functools import partial

from safetensors import SafetensorError, safe_open

from files import read_lines
from foreign.byte_level import DIGITS_PATTERN, KNOWN_PATTERNS, build, check_ids, check_pattern, pieces_of
from foreign.names import (
    NONCHARACTERS,
    OWN_KEY,
    Found,
    Made,
    from_rotary_names,
    read_object,
    refuse_lfs_pointer,
    rotary_config,
)
from model import GPTConfig
from tokenizer import BOS, END_OF_TEXT, EOS, GPT2_PATTERN, BPETokenizer, CharTokenizer, load_tokenizer

MASKS = (".attn.bias", ".attn.masked_bias")  # buffers with the causal mask, from before flash attention
# Matrices that GPT-2's class holds transposed (Conv1D)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The pre_tokenizer of a tokenizer.json whose tokens are characters
CHARACTERS = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


def read_folder(folder):
    """A folder of one of the four classes -> (GPTConfig, name -> tensor). Raises ValueError."""
    fields = read_object(folder / "config.json")
    family = fields.get("model_type")
    if family == "gpt2":
        config = gpt2_config(fields, folder)
        return config, from_gpt2_names(read_tensors(folder), config.tie_weights)
    if family in ROTARY_FIELDS:
        config = rotary_class_config(fields, family, folder)
        return config, from_rotary_names(read_tensors(folder), config, family)
    raise ValueError(f"{folder} holds a model of type {family!r}: only gpt2, {', '.join(ROTARY_FIELDS)} are read")


# -----------------------------------------------------------------------------
# Weights


def read_tensors(folder):
    """The tensors of all .safetensors in a folder -> Made. Raises ValueError naming a file that cannot be used."""
    makers = {}
    for file in weight_files(folder):
        refuse_lfs_pointer(file)
        try:
            opened = safe_open(file, "pt")  # maps the file, and reads a tensor when it is asked for
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error})") from None
        for name in opened.keys():
            makers[name] = partial(opened.get_tensor, name)
    return Made(makers)


def weight_files(folder):
    """The .safetensors of a Hugging Face folder. Raises ValueError if one that its index names is missing."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(map(str, read_object(index).get("weight_map", {}).values())))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{folder / missing[0]} is missing, one of the {len(names)} files that {index.name} "
                             "names: download the folder again")
    if not files:
        raise ValueError(f"{folder} has no .safetensors; files of other formats can run code, and are not read")
    return files


def from_gpt2_names(tensors, tied):
    """Tensors of GPT-2's class -> Made, with our names and our orientation."""
    makers = {}
    for name in tensors:
        if name.endswith(MASKS):
            continue
        ours = name
        if not name.startswith(("transformer.", "lm_head.")):  # a file of the model without its head
            ours = f"transformer.{name}"
        if name.endswith(TRANSPOSED):
            makers[ours] = partial(turned, tensors, name)
        else:
            makers[ours] = partial(tensors.__getitem__, name)
    if tied and "transformer.wte.weight" not in makers and "lm_head.weight" in makers:  # one of the two is enough
        makers["transformer.wte.weight"] = makers.pop("lm_head.weight")
    return Made(makers)


def turned(tensors, name):
    return tensors[name].T


# -----------------------------------------------------------------------------
# config.json


def refuse_unknown(fields, known, source):
    """Raises ValueError naming the options of a config.json that model.py does not have. known: {key: values that it
    has}; the first is that of a file without the key."""
    unknown = [f"{key}={fields[key]}" for key, values in known.items() if fields.get(key, values[0]) not in values]
    if unknown:
        raise ValueError(f"{source}: model.py does not know {', '.join(unknown)}")


def gpt2_config(fields, folder):
    """The GPTConfig of a config.json of GPT-2's class. Raises ValueError for options that model.py lacks."""
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    refuse_unknown(fields, {
        "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,), "activation_function": tuple(activations),
    }, folder)
    width = fields.get("n_inner") or 0
    return GPTConfig(
        block_size=fields["n_positions"], vocab_size=fields["vocab_size"], n_layer=fields["n_layer"],
        n_head=fields["n_head"], n_embd=fields["n_embd"], tie_weights=fields.get("tie_word_embeddings", True),
        activation=activations[fields.get("activation_function", "gelu_new")],
        mlp_width=0 if width == 4 * fields["n_embd"] else width, norm_eps=fields.get("layer_norm_epsilon", 1e-5),
    )


# For each class with rotary positions, the options that model.py has, the default first
ROTARY_FIELDS = {
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
    "nanochat": {"hidden_act": ("relu2",), "attention_bias": (False,)},
}


def rotary_class_config(fields, family, folder):
    """The GPTConfig of a config.json of Llama's, Qwen3's or NanoChat's class. Raises ValueError for options that
    model.py lacks."""
    refuse_unknown(fields, ROTARY_FIELDS[family], folder)
    sizes = {
        "vocab_size": fields["vocab_size"], "n_layer": fields["num_hidden_layers"],
        "n_head": fields["num_attention_heads"], "n_embd": fields["hidden_size"],
        "n_kv_head": fields.get("num_key_value_heads") or fields["num_attention_heads"],
        "norm_eps": fields.get("rms_norm_eps", 1e-6), "tie_weights": fields.get("tie_word_embeddings", False),
        "mlp_dim": fields["intermediate_size"], "head_dim": fields.get("head_dim"),
    }
    if family == "qwen3":
        sizes["head_dim"] = fields.get("head_dim", 128)
    if family == "nanochat":
        sizes["logit_softcap"] = float(fields.get("final_logit_softcapping", 15.0) or 0.0)
    sizes |= rope_sizes(fields, folder)
    return rotary_config(family, sizes, folder)


def rope_sizes(fields, folder):
    """The fields of GPTConfig about rotary positions, and block_size, of a config.json. transformers 5 has them in one
    object, rope_parameters, earlier versions in rope_theta and rope_scaling. Raises ValueError."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta") or fields.get("rope_theta") or 10_000.0
    if kind not in ("default", "linear", "yarn"):
        raise ValueError(f"{folder}: its rotary positions are stretched by {kind!r}, and model.py only knows linear "
                         "and yarn")
    refuse_unknown(parameters, {
        "partial_rotary_factor": (1.0, None), "beta_fast": (32.0, None), "beta_slow": (1.0, None),
        "attention_factor": (None,), "mscale": (None,), "mscale_all_dim": (None,), "truncate": (True, None),
    }, folder)
    refuse_unknown(fields, {"partial_rotary_factor": (1.0, None)}, folder)
    sizes = {"block_size": fields["max_position_embeddings"], "rope_theta": float(theta)}
    if kind != "default":
        sizes |= {"rope_scaling": kind, "rope_factor": float(parameters["factor"])}
    if kind == "yarn":  # our block_size is the stretched context
        first = parameters.get("original_max_position_embeddings") or fields["max_position_embeddings"]
        sizes["block_size"] = round(first * sizes["rope_factor"])
    return sizes


# -----------------------------------------------------------------------------
# Tokenizers


def read_tokenizer(folder, foreign, warn):
    """The tokenizer in a folder: in our format, and if `foreign` also in that of transformers. -> (tokenizer, how many
    bytes it adds at the end). `warn` takes a message. Raises ValueError and FileNotFoundError."""
    vocab_json = folder / "vocab.json"
    tokenizer_json = folder / "tokenizer.json"
    if foreign and tokenizer_json.exists() and "model" in read_object(tokenizer_json):
        return hugging_face_tokenizer(tokenizer_json, warn)
    if vocab_json.exists() and (foreign or not tokenizer_json.exists()):
        try:
            return gpt2_vocabulary(vocab_json), 0
        except ValueError:
            if not tokenizer_json.exists():
                raise
    return load_tokenizer(folder), 0


def gpt2_vocabulary(path):
    """vocab.json -> BPETokenizer. Raises ValueError if the ids are not in the order of the merges."""
    ids = read_object(path)
    if not all(isinstance(i, int) for i in ids.values()):
        raise ValueError(f"{path} is damaged: its ids are not whole numbers")
    special = ids.pop(END_OF_TEXT, None)
    words = sorted(ids, key=ids.get)
    if special != len(words) or [ids[word] for word in words] != list(range(len(words))):
        raise ValueError(f"{path} is not GPT-2's kind of vocabulary: {END_OF_TEXT} is its last token")
    beside = path.with_name("merges.txt")
    if beside.exists():
        lines = [line for line in read_lines(beside) if line and not line.startswith("#version")]
        if [line.replace(" ", "") for line in lines] != words[256:]:
            raise ValueError(f"{path} is not in the order of {beside.name}, as GPT-2's is")
    return BPETokenizer(pieces_of(words))


def hugging_face_tokenizer(path, warn):
    """transformers' tokenizer.json -> (a tokenizer with the same ids, how many bytes it adds at the end): byte-level
    BPE, or characters as export.py writes them. Raises ValueError for any other kind."""
    fields = without_marks(read_object(path))
    model = fields.get("model") or {}
    splitter = fields.get("pre_tokenizer") or {}
    if model.get("type") not in ("BPE", "WordLevel"):
        raise ValueError(f"{path}: {model.get('type')} is not GPT-2's byte-level BPE")
    specials = {token["content"]: token["id"] for token in fields.get("added_tokens") or []}
    words = {word: i for word, i in model.get("vocab", {}).items() if word not in specials}
    check_normalizer(path, fields.get("normalizer"), warn)
    try:
        if model["type"] == "BPE":
            tokenizer, added = bpe_tokenizer(path, model, splitter, words, specials)
        else:
            tokenizer, added = characters_tokenizer(splitter, words, specials), 0
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return tokenizer.changed(**end_names(path, tokenizer)), added


def without_marks(fields):
    """The fields of a tokenizer.json without the steps for the marks of a chat template of export.py's
    (foreign/chat_template.py): no text has these characters."""
    fields = dict(fields)
    steps = (fields.get("normalizer") or {}).get("normalizers") or [{}]
    if all((step.get("pattern") or {}).get("String") in NONCHARACTERS for step in steps):
        fields["normalizer"] = None
    splitter = fields.get("pre_tokenizer") or {}
    first, *others = splitter.get("pretokenizers") or [{}]
    if (first.get("pattern") or {}).get("String") in NONCHARACTERS:
        fields["pre_tokenizer"] = others[0] if len(others) == 1 else {**splitter, "pretokenizers": others}
    return fields


def check_normalizer(path, normalizer, warn):
    """Raises ValueError if a text is changed before it is cut. NFC, Qwen's, changes hardly any text: a warning."""
    kind = (normalizer or {}).get("type")
    if kind == "NFC":
        warn(f"{path}: it composes accents first (NFC), which is not done here: write them composed, as most texts do")
    elif normalizer:
        raise ValueError(f"{path}: it changes a text before it cuts it ({kind})")


def characters_tokenizer(splitter, words, specials):
    """The tokenizer of a WordLevel whose tokens are characters. Raises ValueError."""
    if splitter != CHARACTERS or any(len(word) != 1 for word in words):
        raise ValueError("its tokens are words")
    check_ids(words, specials)
    return CharTokenizer("".join(sorted(words, key=words.get)), specials)


def bpe_tokenizer(path, model, splitter, words, specials):
    """The tokenizer of a byte-level BPE -> (BPETokenizer, how many bytes it adds). Raises ValueError."""
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise ValueError("its BPE has affixes or dropout, and GPT-2's byte-level BPE has none")
    pattern = pattern_of(splitter)
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges", [])]
    tokenizer, added = build(words, pairs, specials, pattern)
    if pattern not in KNOWN_PATTERNS:
        encode = None
        if not added:  # a byte that it lacks has another id there, or none
            encode = encoder_of(path)
        check_pattern(tokenizer, encode)
    return tokenizer, added


def pattern_of(splitter):
    """The regular expression by which a pre_tokenizer of byte-level BPE cuts a text. Raises ValueError for other kinds.
    """
    steps = [splitter]
    if splitter.get("type") == "Sequence":
        steps = splitter.get("pretokenizers") or [{}]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space", True):
        raise ValueError(f"BPE cut by {' and '.join(map(str, kinds))} is not GPT-2's byte-level BPE")
    first = steps[0]
    uses_own = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and uses_own:
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and uses_own and first.get("individual_digits"):
        return DIGITS_PATTERN
    if kinds == ["Split", "ByteLevel"] and not uses_own:
        pattern = (first.get("pattern") or {}).get("Regex")
        if pattern and first.get("behavior") == "Isolated" and not first.get("invert"):
            return pattern
    raise ValueError(f"byte-level BPE cut by {' and '.join(map(str, kinds))} with these options is not known")


def encoder_of(path):
    """The function text -> ids of a tokenizer.json by the package tokenizers; None where it is not installed."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    theirs = Tokenizer.from_file(str(path))
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


def end_names(path, tokenizer):
    """{"bos": name, "eos": name} as the files beside a tokenizer.json have them. Where they have none, a special token
    of a usual name, or None."""
    options = {}
    if path.with_name("tokenizer_config.json").exists():
        options = read_object(path.with_name("tokenizer_config.json"))
    ids = {}
    if path.with_name("config.json").exists():
        ids = read_object(path.with_name("config.json"))
    name_of = {i: name for name, i in tokenizer.special_tokens.items()}
    names = {}
    for end in ("bos", "eos"):
        token = options.get(f"{end}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token not in tokenizer.special_tokens:
            i = ids.get(f"{end}_token_id")
            i = i[0] if isinstance(i, list) and i else i
            token = name_of.get(i) if isinstance(i, int) else None
        if token is not None:
            names[end] = token
    usual = [name for name in (END_OF_TEXT, EOS) if name in tokenizer.special_tokens]
    names.setdefault("eos", usual[0] if usual else None)
    usual = [name for name in (BOS, END_OF_TEXT) if name in tokenizer.special_tokens]
    names.setdefault("bos", usual[0] if usual else None)
    return names


# -----------------------------------------------------------------------------
# The chat template


def find_template(folder):
    """The chat template of a folder -> Found or None. Of several that a file names, the one called default."""
    config = folder / "tokenizer_config.json"
    options = read_object(config) if config.exists() else {}
    if isinstance(options.get(OWN_KEY), dict):
        return Found(str(config), fields=options[OWN_KEY])
    file = folder / "chat_template.jinja"
    if file.exists():
        return Found(str(file), jinja=file.read_text(encoding="utf-8"))
    jinja = options.get("chat_template")
    if isinstance(jinja, list):
        named = {item.get("name"): item.get("template") for item in jinja if isinstance(item, dict)}
        jinja = named.get("default")
    return Found(str(config), jinja=jinja) if isinstance(jinja, str) else None
