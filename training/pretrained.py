"""
Read a model to start from: a run, nanoGPT's ckpt.pt, a Hugging Face folder, or a name on the Hub.

    model, tokenizer, state = read_model("gpt2")

train.py starts from it (--init_from=gpt2) and export.py makes a run of it. No pickle is executed.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import checkpoint
from configurator import fail
from files import read_lines
from model import GPT, GPTConfig
from tokenizer import END_OF_TEXT, EOS, BPETokenizer, CharTokenizer, load_tokenizer

GPT2_VOCAB = 50257
NANOGPT_VOCAB = 50304  # GPT-2's, padded
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers with the causal mask, from before flash attention
# Matrices that GPT-2's class holds transposed (Conv1D)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TABLES = ("transformer.wte.weight", "lm_head.weight")  # a row for each token, and perhaps rows that pad
# The pre_tokenizer of a tokenizer.json whose tokens are characters
CHARACTERS = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


def read_model(name, which="latest", tokenizer_path=""):
    """The model in a run's folder, a ckpt.pt of nanoGPT, a Hugging Face folder, or the Hub's model of that name.

    `which`: the checkpoint of a run, latest, best or a step. `tokenizer_path`: the tokenizer of a model from elsewhere;
    empty: the one beside the model. -> (GPT, tokenizer or None, state): the state of a run's checkpoint, or a dict of
    step and val_loss. Raises ValueError and OSError.
    """
    source = Path(name) if Path(name).exists() else from_hub(str(name))
    state = {"step": 0, "val_loss": None}
    try:
        if source.is_dir() and (checkpoint.steps(source) or not (source / "config.json").exists()):
            return read_run(source, which)
        if source.is_dir():
            config, tensors = from_hugging_face(source)
        else:
            config, tensors, state["step"], state["val_loss"] = from_nanogpt(source)
        model = build(config, tensors)
        if tokenizer_path:
            tokenizer = load_tokenizer(tokenizer_path)
        else:
            tokenizer = tokenizer_beside(source, config.vocab_size)
    except KeyError as error:
        raise ValueError(f"{source}: lacks {error}") from None
    except (TypeError, SafetensorError) as error:
        raise ValueError(f"{source}: {error}") from None
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only {config.vocab_size:,}")
    return model, tokenizer, state


def read_run(source, which):
    """read_model for the folder of a run, or of one checkpoint."""
    folder, state = checkpoint.find(source, which, warn=warn)
    run = checkpoint.run_of(folder)
    model = GPT(checkpoint.config_of(state, folder))
    checkpoint.load_model(model, folder)
    tokenizer = load_tokenizer(run) if (run / "tokenizer.json").exists() else None
    return model, tokenizer, state


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def build(config, tensors):
    """The GPT that holds `tensors`, whose tables may have fewer or more rows of padding. Raises ValueError."""
    model = GPT(config)
    params = dict(model.named_parameters())
    if config.tie_weights:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    for name in sorted(params.keys() | tensors.keys()):
        if name not in params or name not in tensors:
            where = "only in the file" if name in tensors else "not in the file"
            raise ValueError(f"{name} is {where}: it holds another model")
        p = params[name]
        tensor = tensors[name]
        rows = len(p)  # to copy
        rows_needed = len(tensor)
        if name in TABLES:
            rows = min(len(p), len(tensor))
            rows_needed = config.vocab_size
        if p.shape[1:] != tensor.shape[1:] or rows < rows_needed:
            raise ValueError(f"{name} is {tuple(tensor.shape)} in the file and {tuple(p.shape)} in the model")
        with torch.no_grad():
            p[:rows].copy_(tensor[:rows])
            p[rows:].zero_()
    return model


def new_rows(table, old, new, rows, seed=0):
    """A table (N, C) whose first `old` rows are trained -> (rows, C), where the rows old .. new - 1 are those of new
    tokens: the mean of the trained ones and a little noise, 2% of their standard deviation. Rows of zeros would poison
    a tied head, where a logit of 0 beats the negative ones (Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models"). The rows behind them only pad."""
    trained = table[:old].float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(new - old, table.size(1), generator=generator)
    means = trained.mean(0) + 0.02 * trained.std() * noise
    padding = table.new_zeros(rows - new, table.size(1))
    return torch.cat((table[:old], means.to(table), padding))


# -----------------------------------------------------------------------------
# Weights


def from_nanogpt(path):
    """A ckpt.pt -> (GPTConfig, name -> tensor, steps done, validation loss). Raises ValueError."""
    refuse_lfs_pointer(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is damaged or asks to run something
        raise ValueError(f"{path} is refused ({str(error).splitlines()[0]})") from None
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise ValueError(f'{path} is not a checkpoint of nanoGPT: it lacks "model" or "model_args"')
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    sizes = {name: saved["model_args"][name] for name in names if name in saved["model_args"]}
    if GPT2_VOCAB < sizes.get("vocab_size", 0) <= NANOGPT_VOCAB:
        sizes["vocab_size"] = GPT2_VOCAB
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()
               if not name.endswith(MASKS)}
    loss = saved.get("best_val_loss")
    if loss is not None:
        loss = float(loss)  # nanoGPT saves a tensor
    return GPTConfig(**sizes, activation="gelu"), tensors, saved.get("iter_num", 0), loss


def from_hugging_face(folder):
    """A folder of GPT-2's class -> (GPTConfig, name -> tensor). Raises ValueError."""
    fields = read_object(folder / "config.json")
    activation = gpt2_activation(fields, folder)
    tensors = {}
    for file in weight_files(folder):
        refuse_lfs_pointer(file)
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error})") from None
    tied = fields.get("tie_word_embeddings", True)
    config = GPTConfig(
        block_size=fields["n_positions"], vocab_size=fields["vocab_size"], n_layer=fields["n_layer"],
        n_head=fields["n_head"], n_embd=fields["n_embd"], activation=activation, tie_weights=tied,
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
    )
    return config, from_gpt2_names(tensors, tied)


def gpt2_activation(fields, folder):
    """GPTConfig's name for the activation in a config.json of GPT-2's class. Raises ValueError if model.py lacks it, or
    lacks another option that the file sets."""
    if fields.get("model_type") != "gpt2":
        raise ValueError(f"{folder} holds a model of type {fields.get('model_type')!r}: only gpt2 is read")
    known = {"scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
             "add_cross_attention": (False,), "n_inner": (None, 4 * fields["n_embd"])}
    unknown = []
    for key, values in known.items():
        if fields.get(key, values[0]) not in values:
            unknown.append(f"{key}={fields[key]}")
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    activation = activations.get(fields.get("activation_function", "gelu_new"))
    if activation is None and not unknown:
        unknown = [f"activation_function={fields['activation_function']}"]
    if unknown:
        raise ValueError(f"{folder}: model.py does not know {', '.join(unknown)}")
    return activation


def from_gpt2_names(tensors, tied):
    """Tensors of GPT-2's class -> with our names and our orientation."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(MASKS):
            continue
        if not name.startswith(("transformer.", "lm_head.")):  # a file of the model without its head
            name = f"transformer.{name}"
        renamed[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
    if tied and "transformer.wte.weight" not in renamed and "lm_head.weight" in renamed:  # one of the two is enough
        renamed["transformer.wte.weight"] = renamed.pop("lm_head.weight")
    return renamed


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


def refuse_lfs_pointer(path):
    """Raises ValueError for the pointer that a clone without Git LFS has instead of a large file."""
    with open(path, "rb") as file:
        if file.read(64).startswith(b"version https://git-lfs.github.com"):
            raise ValueError(f"{path} is a Git LFS pointer and not the file itself: git lfs pull fetches it")


def read_object(path):
    """The JSON object in a file. Raises ValueError naming the file."""
    refuse_lfs_pointer(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return fields


def from_hub(name):
    """The folder of a model of the Hub: its weights as safetensors, its configuration and vocabulary."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        fail(f"{name} is neither a file nor a folder; to load it from the Hub: pip install huggingface-hub")
    try:
        files = ["config.json", "vocab.json", "tokenizer.json", "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # no network, no such model: their errors have no class in common
        fail(f"{name} is neither a file nor a folder, and the Hub does not have it ({type(error).__name__}: {error})")


# -----------------------------------------------------------------------------
# Tokenizers


def tokenizer_beside(source, most):
    """The tokenizer beside a model from elsewhere, or None. A tokenizer of another kind, or of more than `most` tokens,
    is skipped with a warning: the weights are good without it."""
    folder = source if source.is_dir() else source.parent
    try:
        tokenizer = read_tokenizer(folder, foreign=source.is_dir())
        if tokenizer.vocab_size > most:
            raise ValueError(f"it has {tokenizer.vocab_size:,} tokens, the model only {most:,}")
        return tokenizer
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error
        if not isinstance(error, ValueError):
            reason = f"{folder / 'tokenizer.json'} is damaged: {type(error).__name__}: {error}"
        warn(f"the model comes without its tokenizer ({reason}): --tokenizer=FOLDER names one")
        return None


def read_tokenizer(folder, foreign):
    """The tokenizer in a folder: in our format, and if `foreign` also in that of transformers."""
    vocab_json = folder / "vocab.json"
    tokenizer_json = folder / "tokenizer.json"
    if vocab_json.exists() and (foreign or not tokenizer_json.exists()):
        try:
            return gpt2_vocabulary(vocab_json)
        except ValueError:
            if not tokenizer_json.exists():
                raise
    if foreign and tokenizer_json.exists() and "model" in read_object(tokenizer_json):
        return hugging_face_tokenizer(tokenizer_json)
    return load_tokenizer(folder)


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


def hugging_face_tokenizer(path):
    """transformers' tokenizer.json -> a tokenizer with the same ids: GPT-2's kind of byte-level BPE, or characters as
    export.py writes them. Raises ValueError for any other kind."""
    fields = read_object(path)
    model = fields.get("model") or {}
    splitter = fields.get("pre_tokenizer") or {}
    if model.get("type") not in ("BPE", "WordLevel"):
        raise ValueError(f"{path}: {model.get('type')} is not GPT-2's byte-level BPE")
    added = {token["content"]: token["id"] for token in fields.get("added_tokens") or []}
    words = [word for word in sorted(model.get("vocab", {}), key=model["vocab"].get) if word not in added]
    specials = sorted(added, key=added.get)
    ids = [model["vocab"][word] for word in words] + [added[name] for name in specials]
    if ids != list(range(len(ids))):
        raise ValueError(f"{path}: its special tokens do not follow the others, as they do in GPT-2's vocabulary")
    if fields.get("normalizer"):
        raise ValueError(f"{path}: it changes a text before it cuts it ({fields['normalizer'].get('type')})")
    if model["type"] == "WordLevel":
        if splitter != CHARACTERS or any(len(word) != 1 for word in words):
            raise ValueError(f"{path}: its tokens are words")
        return CharTokenizer("".join(words), specials)
    check_byte_level(path, model, splitter, words)
    check_end_of_text(path, added, specials)
    return BPETokenizer(pieces_of(words), specials=specials)


def check_byte_level(path, model, splitter, words):
    """Raises ValueError if the BPE of a tokenizer.json is not GPT-2's byte-level kind."""
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    byte_level = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if affixes or not byte_level or splitter.get("add_prefix_space", True):
        raise ValueError(f"{path}: BPE cut by {splitter.get('type')} is not GPT-2's byte-level BPE")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    if ["".join(pair) for pair in pairs] != words[256:]:
        raise ValueError(f"{path}: its ids are not in the order of its merges, as GPT-2's are")


def check_end_of_text(path, added, specials):
    """Raises ValueError if the last special token does not end a text, as in BPETokenizer."""
    eos = read_object(path.with_name("config.json")).get("eos_token_id")
    if eos not in added.values():
        eos = added.get(END_OF_TEXT, added.get(EOS))
    if specials and eos != added[specials[-1]]:
        raise ValueError(f"{path}: its last special token, {specials[-1]}, is not the one that ends a text")


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
