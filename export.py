"""
To and from other ecosystems: a checkpoint of nanoGPT, or a Hugging Face folder, into a run of ours, and out again.

    python export.py out-shakespeare/ckpt.pt out/mine      # nanoGPT's
    python export.py gpt2 out/gpt2                          # the Hub's, or a folder with config.json and safetensors
    python export.py out/mine hf/mine                       # to a folder that transformers loads
    python export.py out/mine mine.gguf --dtype=q8_0        # to a file that llama.cpp loads

What comes in is a run like any other: sample.py and eval.py read it, and train.py starts from it with --init_from=,
as it does from what `read_model` reads without one. No pickle is executed on the way. What goes out is of the class of
transformers that can express the model: GPT-2's, Llama's, Qwen3's or NanoChat's (RMSNorm without gain, a norm after the
embedding, RoPE, QK-norm, ReLU squared); llama.cpp has the first three of them.
"""

import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoint
from configurator import configure, fail
from model import GPT, GPTConfig, rope_base
from tokenizer import END_OF_TEXT, EOS, GPT2_PATTERN, BPETokenizer, CharTokenizer, load_tokenizer

# -----------------------------------------------------------------------------
paths: tuple[str, ...] = ()  # from where and to where, as bare words; to a name that ends in .gguf: for llama.cpp
ckpt = "latest"         # of a run that goes out: latest | best | a step
tokenizer = ""          # of what comes in: a file or folder (nanoGPT's data folder); empty: what lies beside it
dtype = "float32"       # of the matrices in a .gguf: float32 | float16 | bfloat16 | q8_0 (8 bits, a scale for each 32)
# -----------------------------------------------------------------------------

GPT2_VOCAB = 50257  # which nanoGPT pads to 50304
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers with the causal mask: before flash attention, on PyTorch 1
CHARACTERS = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # GPT-2's Conv1D


class NoOptimizer:
    """Of a model that comes from elsewhere."""

    def state_dict(self):
        return {}


# -----------------------------------------------------------------------------
# In


def from_nanogpt(path):
    """A ckpt.pt -> (GPTConfig, name -> tensor, steps done, validation loss). Raises ValueError."""
    check_lfs(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds, for a file that is damaged or asks to run something
        raise ValueError(f"{path} is refused ({str(error).splitlines()[0]})") from None
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise ValueError(f'{path} is no checkpoint of nanoGPT: it lacks "model" or "model_args"')
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    sizes = {name: saved["model_args"][name] for name in names if name in saved["model_args"]}
    if GPT2_VOCAB < sizes.get("vocab_size", 0) <= 50304:
        sizes["vocab_size"] = GPT2_VOCAB
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()
               if not name.endswith(MASKS)}
    loss = saved.get("best_val_loss")
    loss = None if loss is None else float(loss)
    return GPTConfig(**sizes, activation="gelu"), tensors, saved.get("iter_num", 0), loss


def from_hugging_face(folder):
    """A folder of GPT-2's class -> (GPTConfig, name -> tensor). Raises ValueError."""
    fields = read_object(folder / "config.json")
    if fields.get("model_type") != "gpt2":
        raise ValueError(f"{folder} holds a model of type {fields.get('model_type')!r}: only gpt2 is read")
    activation = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}.get(
        fields.get("activation_function", "gelu_new"))
    known = {"scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
             "add_cross_attention": (False,), "n_inner": (None, 4 * fields["n_embd"])}
    odd = [f"{key}={fields[key]}" for key, values in known.items() if fields.get(key, values[0]) not in values]
    if activation is None or odd:
        odd = odd or [f"activation_function={fields['activation_function']}"]
        raise ValueError(f"{folder}: {', '.join(odd)} is nothing that model.py knows")
    tensors = {}
    for file in weight_files(folder):
        check_lfs(file)
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error})") from None
    tensors = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
               for name, tensor in tensors.items() if not name.endswith(MASKS)}
    tensors = {name: t.T if name.endswith(TRANSPOSED) else t for name, t in tensors.items()}
    tied = fields.get("tie_word_embeddings", True)
    if tied and "transformer.wte.weight" not in tensors and "lm_head.weight" in tensors:  # one of the two is enough
        tensors["transformer.wte.weight"] = tensors.pop("lm_head.weight")
    config = GPTConfig(
        block_size=fields["n_positions"], vocab_size=fields["vocab_size"], n_layer=fields["n_layer"],
        n_head=fields["n_head"], n_embd=fields["n_embd"], activation=activation, tie_weights=tied,
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
    )
    return config, tensors


def check_lfs(path):
    """Raises ValueError for the pointer that a clone without Git LFS has instead of a large file."""
    with open(path, "rb") as file:
        if file.read(64).startswith(b"version https://git-lfs.github.com"):
            raise ValueError(f"{path} is a Git LFS pointer and not the file itself: git lfs pull fetches it")


def read_object(path):
    """The JSON object in a file. Raises ValueError naming the file."""
    check_lfs(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return fields


def weight_files(folder):
    """The .safetensors of a Hugging Face folder. Raises ValueError for one that its index names and that is missing."""
    files = sorted(folder.glob("*.safetensors"))
    if (index := folder / "model.safetensors.index.json").exists():
        names = sorted(set(map(str, read_object(index).get("weight_map", {}).values())))
        if missing := [name for name in names if not (folder / name).exists()]:
            raise ValueError(f"{folder / missing[0]} is missing, one of the {len(names)} files that {index.name} "
                             "names: download the folder again")
    if not files:
        raise ValueError(f"{folder} has no .safetensors; files of other formats can run code, and are not read")
    return files


def build(config, tensors):
    """The model of `tensors`, whose tables may lack rows that only pad, or have some. Raises ValueError."""
    model = GPT(config)
    params = dict(model.named_parameters())
    if config.tie_weights:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    for name in sorted(params.keys() | tensors.keys()):
        if name not in params or name not in tensors:
            where = "in the file alone" if name in tensors else "not in the file"
            raise ValueError(f"{name} is {where}: it holds another model")
        own, theirs = params[name], tensors[name]
        table = name in ("transformer.wte.weight", "lm_head.weight")
        rows = min(len(own), len(theirs)) if table else len(own)
        if own.shape[1:] != theirs.shape[1:] or rows < (config.vocab_size if table else len(theirs)):
            raise ValueError(f"{name} is {tuple(theirs.shape)} in the file and {tuple(own.shape)} in the model")
        with torch.no_grad():
            own[:rows].copy_(theirs[:rows])
            own[rows:].zero_()
    return model


def bytes_to_unicode():
    """The character that GPT-2's vocab.json writes for each byte (Radford et al. 2019, encoder.py): itself where it can
    be seen, the others from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def gpt2_vocabulary(path):
    """vocab.json -> BPETokenizer. Raises ValueError for one that is not in the order of its merges."""
    ids = read_object(path)
    if not all(isinstance(i, int) for i in ids.values()):
        raise ValueError(f"{path} is damaged: its ids are no whole numbers")
    special = ids.pop(END_OF_TEXT, None)
    words = sorted(ids, key=ids.get)
    if special != len(words) or [ids[word] for word in words] != list(range(len(words))):
        raise ValueError(f"{path} is not GPT-2's kind of vocabulary: {END_OF_TEXT} is its last token")
    if (beside := path.with_name("merges.txt")).exists():
        lines = beside.read_text(encoding="utf-8").splitlines()
        if [line.replace(" ", "") for line in lines if line and not line.startswith("#version")] != words[256:]:
            raise ValueError(f"{path} is not in the order of {beside.name}, as GPT-2's is")
    return BPETokenizer(pieces_of(words))


def pieces_of(words):
    """Tokens as GPT-2's vocab.json spells them -> their bytes. Raises ValueError."""
    back = {character: byte for byte, character in bytes_to_unicode().items()}
    try:
        return [bytes(back[character] for character in word) for word in words]
    except KeyError as error:
        raise ValueError(f"{error} stands for no byte in GPT-2's spelling") from None


def hugging_face_tokenizer(path):
    """transformers' tokenizer.json -> a tokenizer with the same ids: GPT-2's kind of byte-level BPE, or characters as
    `tokenizer_files` writes them. Raises ValueError for any other."""
    fields = read_object(path)
    model, cut = fields.get("model") or {}, fields.get("pre_tokenizer") or {}
    if model.get("type") not in ("BPE", "WordLevel"):
        raise ValueError(f"{path}: {model.get('type')} is not GPT-2's byte-level BPE")
    added = {token["content"]: token["id"] for token in fields.get("added_tokens") or []}
    words = [word for word in sorted(model.get("vocab", {}), key=model["vocab"].get) if word not in added]
    specials = sorted(added, key=added.get)
    if [model["vocab"][word] for word in words] + [added[name] for name in specials] != [
            *range(len(words) + len(specials))]:
        raise ValueError(f"{path}: its special tokens do not follow the others, as they do in GPT-2's vocabulary")
    if fields.get("normalizer"):
        raise ValueError(f"{path}: it changes a text before it cuts it ({fields['normalizer'].get('type')})")
    if model["type"] == "WordLevel":
        if cut != CHARACTERS or any(len(word) != 1 for word in words):
            raise ValueError(f"{path}: its tokens are words")
        return CharTokenizer("".join(words), specials)
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    bytes_only = cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
    if affixes or not bytes_only or cut.get("add_prefix_space", True):
        raise ValueError(f"{path}: BPE cut by {cut.get('type')} is not GPT-2's byte-level BPE")
    merges = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", [])]
    if merges != words[256:]:
        raise ValueError(f"{path}: its ids are not in the order of its merges, as GPT-2's are")
    eos = read_object(path.with_name("config.json")).get("eos_token_id")
    eos = eos if eos in added.values() else added.get(END_OF_TEXT, added.get(EOS))
    if specials and eos != added[specials[-1]]:
        raise ValueError(f"{path}: its last special token, {specials[-1]}, is not the one that ends a text")
    return BPETokenizer(pieces_of(words), specials=specials)


def tokenizer_beside(source, most):
    """The tokenizer that `tokenizer` names, or that lies beside what comes in; None where there is none, and, with a
    warning, where there is one of another kind or with more than `most` tokens: the weights are good without it."""
    if tokenizer:
        return load_tokenizer(tokenizer)
    folder = source if source.is_dir() else source.parent
    try:
        found = read_tokenizer(folder, foreign=source.is_dir())
        if found.vocab_size > most:
            raise ValueError(f"it has {found.vocab_size:,} tokens, the model only {most:,}")
        return found
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = f"{folder / 'tokenizer.json'} is damaged: {type(error).__name__}: {error}"
        why = error if isinstance(error, ValueError) else damaged
        print(f"warning: the model comes without its tokenizer ({why}): --tokenizer=FOLDER names one", file=sys.stderr)
        return None


def read_tokenizer(folder, foreign):
    """The tokenizer in a folder, in a `foreign` one also as transformers writes it."""
    whole, words = folder / "tokenizer.json", folder / "vocab.json"
    if words.exists() and (foreign or not whole.exists()):
        try:
            return gpt2_vocabulary(words)
        except ValueError:
            if not whole.exists():
                raise
    if foreign and whole.exists() and "model" in read_object(whole):
        return hugging_face_tokenizer(whole)
    return load_tokenizer(folder)


def from_hub(name):
    """The folder of a model of the Hub: its weights as safetensors, its configuration and vocabulary."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        fail(f"{name} is neither a file nor a folder; to have it from the Hub: pip install huggingface-hub")
    try:
        files = ["config.json", "vocab.json", "tokenizer.json", "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # no network, no such model: none has a class in common
        fail(f"{name} is neither a file nor a folder, nor to be had from the Hub ({type(error).__name__}: {error})")


def read_model(name):
    """The model of a run's folder, of a ckpt.pt of nanoGPT's, of a Hugging Face folder, or the Hub's of that name.
    -> (GPT, tokenizer or None, its state: a run's own, else step and val_loss). Raises ValueError, OSError."""
    source = Path(name) if Path(name).exists() else from_hub(str(name))
    state = {"step": 0, "val_loss": None}
    try:
        if source.is_dir() and (checkpoint.steps(source) or not (source / "config.json").exists()):
            return read_run(source)
        if source.is_dir():
            config, tensors = from_hugging_face(source)
        else:
            config, tensors, state["step"], state["val_loss"] = from_nanogpt(source)
        model, found = build(config, tensors), tokenizer_beside(source, config.vocab_size)
    except KeyError as error:
        raise ValueError(f"{source}: lacks {error}") from None
    except (TypeError, SafetensorError) as error:
        raise ValueError(f"{source}: {error}") from None
    if found and found.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {found.vocab_size:,} tokens, the model only {config.vocab_size:,}")
    return model, found, state


def read_run(source):
    folder, state = checkpoint.find(source, ckpt, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    model, run = GPT(checkpoint.config_of(state, folder)), checkpoint.run_of(folder)
    checkpoint.load_model(model, folder)
    return model, load_tokenizer(run) if (run / "tokenizer.json").exists() else None, state


def write_run(model, found, state, source, target):
    """Make `target` a run that holds a model from elsewhere."""
    if checkpoint.steps(target):
        fail(f"{target} already holds a run: give another folder")
    origin = {"dataset": "", "init_from": source.name}
    checkpoint.save(target, model, NoOptimizer(), {**state, "model": asdict(model.config), "config": origin})
    if found:
        found.save(target)
    said = "with its tokenizer" if found else "without a tokenizer: --tokenizer=FOLDER names one"
    print(f"{model.num_params():,} parameters in {target}, {said}")
    print(f"next: python sample.py {shlex.quote(f'--out_dir={target}')}")


# -----------------------------------------------------------------------------
# Out


# Classes of transformers and the fields of ours that each can express
PLAIN = {"norm_embed": (False,), "logit_softcap": (0.0,)}
ROTARY = {"pos": ("rope",), "bias": (False,)}
FAMILIES = {
    "gpt2": {**PLAIN, "pos": ("learned",), "norm": ("layernorm",), "qk_norm": ("none",), "n_kv_head": ("n_head",),
             "activation": ("gelu", "gelu_tanh")},
    "llama": {**PLAIN, **ROTARY, "norm": ("rmsnorm",), "qk_norm": ("none",), "activation": ("swiglu",)},
    "qwen3": {**PLAIN, **ROTARY, "norm": ("rmsnorm",), "qk_norm": ("rms_gain",), "activation": ("swiglu",)},
    "nanochat": {**ROTARY, "norm": ("rmsnorm_nogain",), "norm_embed": (True,), "qk_norm": ("rms",),
                 "activation": ("relu2",),
                 "rope_scaling": ("none", "linear", "ntk")},  # its norm after the rotation undoes YaRN's temperature
}
# llama.cpp's, by the same names; its gpt2 has no GELU but the tanh form
LLAMA_CPP = {
    "gpt2": {**FAMILIES["gpt2"], "activation": ("gelu_tanh",)},
    **{family: {**FAMILIES[family], "rope_scaling": ("none", "ntk")} for family in ("llama", "qwen3")},
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM",
           "nanochat": "NanoChatForCausalLM"}


def family_of(config, families, whose):
    """The one of `families` that can express a model. Raises ValueError naming the fields in the way of the nearest."""
    own = {**vars(config), "n_kv_head": "n_head" if config.kv_heads == config.n_head else config.kv_heads}
    obstacles = {family: [f"{key}={getattr(config, key)}" for key, known in allowed.items() if own[key] not in known]
                 for family, allowed in families.items()}
    nearest = min(obstacles, key=lambda family: len(obstacles[family]))
    if odd := obstacles[nearest]:
        raise ValueError(f"nothing of {whose} can express this model; nearest is {nearest}, and in its way "
                         f"{'is' if len(odd) == 1 else 'are'} {', '.join(odd)}")
    return nearest


def tensors_of(model, family):
    """({name: tensor} as the class of transformers has them, the fields of its config.json that are its own)"""
    tables = ("transformer.wte.weight", "lm_head.weight")  # without the rows that pad them
    tensors = {name: p[: model.config.vocab_size] if name in tables else p
               for name, p in checkpoint.model_tensors(model).items()}
    rename = gpt2_tensors if family == "gpt2" else rotary_tensors
    return rename(tensors, model.config, family)


def gpt2_tensors(tensors, config, family):
    """tensors_of for GPT-2's class."""
    out = {name: (p.T if name.endswith(TRANSPOSED) else p).contiguous() for name, p in tensors.items()}
    for name, p in list(out.items()):  # every layer of GPT-2's class has a bias
        layer = name.removesuffix(".weight").removesuffix(".bias")
        if layer not in ("transformer.wte", "transformer.wpe", "lm_head"):
            out.setdefault(f"{layer}.bias", torch.zeros(p.size(-1)))
    return out, {
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_positions": config.block_size,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        "layer_norm_epsilon": config.norm_eps, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
    }


def rotary_tensors(tensors, config, family):
    """tensors_of for the classes with rotary positions. NanoChat rotates the other way round, so that the halves of
    each query and key head change places."""
    names = {"ln_1.weight": "input_layernorm.weight", "ln_2.weight": "post_attention_layernorm.weight",
             "attn.c_proj.weight": "self_attn.o_proj.weight", "attn.q_gain": "self_attn.q_norm.weight",
             "attn.k_gain": "self_attn.k_norm.weight", "mlp.c_gate.weight": "mlp.gate_proj.weight",
             "mlp.c_fc.weight": "mlp.up_proj.weight", "mlp.c_proj.weight": "mlp.down_proj.weight"}
    if family == "nanochat":
        names |= {"mlp.c_fc.weight": "mlp.fc1.weight", "mlp.c_proj.weight": "mlp.fc2.weight"}
    whole = {"transformer.wte.weight": "model.embed_tokens.weight", "transformer.ln_f.weight": "model.norm.weight",
             "lm_head.weight": "lm_head.weight"}
    out, D = {}, config.head_dim
    for name, p in tensors.items():
        layer, _, part = name.removeprefix("transformer.h.").partition(".")
        if name in whole:
            out[whole[name]] = p
        elif part == "attn.c_attn.weight":
            q, k, v = p.split((config.n_head * D, config.kv_heads * D, config.kv_heads * D))
            if family == "nanochat":
                q, k = (t.view(-1, 2, D // 2, t.size(1)).flip(1).reshape(t.shape) for t in (q, k))
            for letter, t in zip("qkv", (q, k, v), strict=True):
                out[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = t
        else:
            out[f"model.layers.{layer}.{names[part]}"] = p
    fields = {
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd, "intermediate_size": config.mlp_dim, "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps, "hidden_act": {"swiglu": "silu"}.get(config.activation, config.activation),
        "attention_bias": False, "mlp_bias": False, "attention_dropout": config.dropout, "head_dim": D,
        "rope_parameters": rope_parameters(config), "rope_theta": rope_base(config),
    }
    if family == "nanochat":
        fields["final_logit_softcapping"] = config.logit_softcap or None
    return {name: t.contiguous() for name, t in out.items()}, fields


def rope_parameters(config):
    """As transformers has them. It knows ntk by another name only, but that is no more than a larger base."""
    known = {"rope_type": "default", "rope_theta": rope_base(config)}
    if config.rope_scaling in ("linear", "yarn"):
        known |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "yarn":
        known["original_max_position_embeddings"] = round(config.block_size / config.rope_factor)
    return known


def merges_of(pieces):
    """The merges that make each token, as pairs of bytes in the order of the ids.

    A token was made of the two parts that the merges before it leave of its bytes.
    """
    ranks, pairs = {piece: i for i, piece in enumerate(pieces)}, []
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


def words_and_merges(found):
    """Of a BPETokenizer, as GPT-2's files spell them: the tokens, and the pairs that make them. Raises ValueError."""
    if found.pattern != GPT2_PATTERN:
        raise ValueError("the tokenizer cuts texts in another way than GPT-2's, which no file there can express")
    spell = bytes_to_unicode()
    words = {piece: "".join(spell[byte] for byte in piece) for piece in found.pieces}
    return [*words.values()], [(words[a], words[b]) for a, b in merges_of(found.pieces)]


def tokenizer_files(found):
    """{name of a file: what it holds}, from which AutoTokenizer makes the same ids. Raises ValueError."""
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if found.kind == "bpe":
        words, pairs = words_and_merges(found)
        model = {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": pairs}
        cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        decoder = {**cut, "type": "ByteLevel"}
    else:
        model = {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(found.chars)}, "unk_token": ""}
        cut = CHARACTERS
        decoder = {"type": "Fuse"}
    specials = [{"id": i, "content": name, "special": True, "normalized": False, "single_word": False, "lstrip": False,
                 "rstrip": False} for name, i in found.special_tokens.items()]
    fields = {"version": "1.0", "added_tokens": specials, "normalizer": None, "pre_tokenizer": cut, "decoder": decoder,
              "post_processor": None, "truncation": None, "padding": None, "model": model}
    names = {i: name for name, i in found.special_tokens.items()}
    options |= {key: names[i] for key, i in (("bos_token", found.bos), ("eos_token", found.eos)) if i in names}
    return {"tokenizer.json": fields, "tokenizer_config.json": options}


def write_hugging_face(model, found, target):
    """Make `target` a folder from which transformers loads the model."""
    config = model.config
    family = family_of(config, FAMILIES, "transformers")
    if target.exists() and any(target.iterdir()):
        fail(f"{target} is not empty: give another folder")
    tensors, fields = tensors_of(model, family)
    fields |= {
        "model_type": family, "architectures": [CLASSES[family]], "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights, "bos_token_id": found.bos if found else None,
        "eos_token_id": found.eos if found else None, "pad_token_id": None,
    }
    files = (tokenizer_files(found) if found else {}) | {"config.json": fields}
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"the model is in {target}: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it")


# -----------------------------------------------------------------------------
# Out, for llama.cpp


DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # and what a GGUF calls them


def write_gguf(model, found, target, dtype="float32"):
    """Make `target` a file that llama.cpp loads, its matrices in `dtype`. Where a row of one does not divide into the
    32 weights that share a scale in q8_0, that one is float16, as llama.cpp's own conversion has it."""
    try:
        import gguf
    except ImportError:
        fail("a .gguf is written with the package gguf: pip install -e '.[export]' -c constraints.txt")
    config, beside = model.config, target.with_name(target.name + ".writing")
    family = family_of(config, LLAMA_CPP, "llama.cpp")
    if target.exists():
        fail(f"{target} is there already: give another name")
    short = DTYPES[dtype]
    writer = gguf.GGUFWriter(beside, family)
    add_sizes(writer, config, family)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if short == "F32" else f"MOSTLY_{short}"])
    add_tokenizer(writer, found, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.n_layer)
    for name, p in tensors_of(model, family)[0].items():
        if family == "gpt2" and name.endswith(TRANSPOSED):
            p = p.T
        elif family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # it pairs neighbours, not halves
            p = p.view(-1, 2, config.head_dim // 2, p.size(1)).transpose(1, 2).reshape(p.shape)
        kind = "F32" if p.ndim == 1 or "wpe" in name else "F16" if short == "Q8_0" and p.size(1) % 32 else short
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(p.float().contiguous().numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(beside, target)
    finally:
        writer.close()  # which Windows wants before a file is removed
        beside.unlink(missing_ok=True)


def add_sizes(writer, config, family):
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if family == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(rope_base(config))


def add_tokenizer(writer, found, vocab_size):
    """As llama.cpp's byte-level BPE. Characters are that, too, where each is a byte. Raises ValueError."""
    if not found:
        return writer.add_tokenizer_model("none")
    if found.eos is None:
        raise ValueError("the tokenizer has no token that ends a text, without which llama.cpp takes its own for one")
    if found.kind == "bpe":
        words, pairs = words_and_merges(found)
        merges = [" ".join(pair) for pair in pairs]
    else:
        if wide := [c for c in found.chars if not c.isascii()]:
            raise ValueError(f"the tokenizer has {wide[0]!r} as a token, which llama.cpp can have of ASCII alone: "
                             "train on the tokens of a BPE tokenizer instead (data/text/prepare.py)")
        words = [bytes_to_unicode()[ord(c)] for c in found.chars]
        merges = []
    end = [*found.special_tokens][-1]
    merges = merges or [f"{end} {end}"]  # a list must not be empty, and no text has these in it
    words += found.special_tokens
    spare = [f"[PAD{i}]" for i in range(len(words), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words + spare)
    normal, control, unused = 1, 3, 5  # gguf.TokenType
    specials = len(found.special_tokens)
    writer.add_token_types([normal] * (len(words) - specials) + [control] * specials + [unused] * len(spare))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(found.eos if found.bos is None else found.bos)
    writer.add_eos_token_id(found.eos)
    writer.add_add_bos_token(False)


def main():
    if len(paths) != 2:
        fail("from where to where? python export.py FROM TO")
    target = Path(paths[1])
    to_llama_cpp = target.suffix == ".gguf"
    known = DTYPES if to_llama_cpp else ("float32",)
    if dtype not in known:
        fail(f"dtype={dtype!r} is not one of {', '.join(known)}" + ", as this is no .gguf" * (not to_llama_cpp))
    try:
        model, found, state = read_model(paths[0])
        if to_llama_cpp:
            write_gguf(model, found, target, dtype)
            said = f"llama-cli -m {target} runs it" if found else "without a tokenizer, so that it takes ids alone"
            print(f"the model is in {target}: {said}")
        elif "model" in state:
            write_hugging_face(model, found, target)
        else:
            write_run(model, found, state, Path(paths[0]), target)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    configure(globals(), paths="paths")
    sys.exit(main())
