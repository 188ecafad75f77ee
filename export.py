"""
To and from other ecosystems: a checkpoint of nanoGPT, or a Hugging Face folder, into a run of ours, and out again.

    python export.py out-shakespeare/ckpt.pt out/mine      # nanoGPT's
    python export.py gpt2 out/gpt2                          # the Hub's, or a folder with config.json and safetensors
    python export.py out/mine hf/mine                       # to a folder that transformers loads

What comes in is a run like any other: sample.py and eval.py read it, and train.py starts from it with --init_from=.
No pickle is executed on the way. What goes out is of the class of transformers that can express the model: GPT-2's,
Llama's, Qwen3's or NanoChat's (RMSNorm without gain, a norm after the embedding, RoPE, QK-norm, ReLU squared).
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoint
from configurator import configure, fail
from model import GPT, GPTConfig
from tokenizer import END_OF_TEXT, GPT2_PATTERN, BPETokenizer, load_tokenizer

# -----------------------------------------------------------------------------
paths: tuple[str, ...] = ()  # from where and to where, as bare words
ckpt = "latest"         # of a run that goes out: latest | best | a step
tokenizer = ""          # of what comes in: a file or folder (nanoGPT's data folder); empty: what lies beside it
# -----------------------------------------------------------------------------

GPT2_VOCAB = 50257  # which nanoGPT pads to 50304
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # GPT-2's Conv1D


class NoOptimizer:
    """Of a model that comes from elsewhere."""

    def state_dict(self):
        return {}


# -----------------------------------------------------------------------------
# In


def from_nanogpt(path):
    """A ckpt.pt -> (GPTConfig, name -> tensor, steps done, validation loss). Raises ValueError."""
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
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}
    loss = saved.get("best_val_loss")
    loss = None if loss is None else float(loss)
    return GPTConfig(**sizes, activation="gelu"), tensors, saved.get("iter_num", 0), loss


def from_hugging_face(folder):
    """A folder of GPT-2's class -> (GPTConfig, name -> tensor). Raises ValueError."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors; files of other formats can run code, and are not read")
    tensors = {}
    for file in files:
        tensors |= load_file(file)
    tensors = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
               for name, tensor in tensors.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    tensors = {name: t.T if name.endswith(TRANSPOSED) else t for name, t in tensors.items()}
    tied = fields.get("tie_word_embeddings", True)
    config = GPTConfig(
        block_size=fields["n_positions"], vocab_size=fields["vocab_size"], n_layer=fields["n_layer"],
        n_head=fields["n_head"], n_embd=fields["n_embd"], activation=activation, tie_weights=tied,
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
    )
    return config, tensors


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
    ids = json.loads(path.read_text(encoding="utf-8"))
    special = ids.pop(END_OF_TEXT, None)
    back = {character: byte for byte, character in bytes_to_unicode().items()}
    words = sorted(ids, key=ids.get)
    if special != len(words) or [ids[word] for word in words] != list(range(len(words))):
        raise ValueError(f"{path} is not GPT-2's kind of vocabulary: {END_OF_TEXT} is its last token")
    return BPETokenizer([bytes(back[character] for character in word) for word in words])


def tokenizer_beside(source):
    """The tokenizer that `tokenizer` names, or that lies beside what comes in; None where there is none."""
    if tokenizer:
        return load_tokenizer(tokenizer)
    folder = source if source.is_dir() else source.parent
    if (folder / "vocab.json").exists():
        return gpt2_vocabulary(folder / "vocab.json")
    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        return None


def bring_in(source, target):
    """Make `target` a run that holds the model at `source`."""
    if checkpoint.steps(target):
        fail(f"{target} already holds a run: give another folder")
    step, loss = 0, None
    if source.is_dir():
        config, tensors = from_hugging_face(source)
    else:
        config, tensors, step, loss = from_nanogpt(source)
    model, found = build(config, tensors), tokenizer_beside(source)
    if found and found.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {found.vocab_size:,} tokens, the model only {config.vocab_size:,}")
    origin = {"dataset": "", "init_from": source.name}
    state = {"step": step, "val_loss": loss, "model": asdict(config), "config": origin}
    checkpoint.save(target, model, NoOptimizer(), state)
    if found:
        found.save(target)
    said = "its tokenizer is there, too" if found else "without a tokenizer: --tokenizer=FOLDER names one"
    print(f"{model.num_params():,} parameters in {target}, {said}")
    print(f"next: python sample.py --out_dir={target}")


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
                 "activation": ("relu2",)},
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM",
           "nanochat": "NanoChatForCausalLM"}


def family_of(config):
    """(the class that can express a model, or else the nearest; the fields that stand in its way, as field=value)"""
    own = {**vars(config), "n_kv_head": "n_head" if config.kv_heads == config.n_head else config.kv_heads}

    def obstacles(family):
        return [f"{key}={getattr(config, key)}" for key, allowed in FAMILIES[family].items() if own[key] not in allowed]

    nearest = min(FAMILIES, key=lambda family: len(obstacles(family)))
    return nearest, obstacles(nearest)


def gpt2_tensors(tensors, config):
    """Our names and tensors -> those of GPT-2's class, and the fields of its config.json that are its own."""
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
    """The same for the classes with rotary positions. NanoChat rotates the other way round, so that the halves of each
    query and key head change places."""
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
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "rope_theta": config.rope_theta,
    }
    if family == "nanochat":
        fields["final_logit_softcapping"] = config.logit_softcap or None
    return {name: t.contiguous() for name, t in out.items()}, fields


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


def write_tokenizer(found, folder):
    """Files from which AutoTokenizer makes the same ids."""
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if found.kind == "bpe":
        if found.pattern != GPT2_PATTERN:
            raise ValueError("the tokenizer cuts texts in another way than GPT-2's, which its class cannot express")
        spell = bytes_to_unicode()
        words = ["".join(spell[byte] for byte in piece) for piece in found.pieces]
        pairs = [[spelled(spell, a), spelled(spell, b)] for a, b in merges_of(found.pieces)]
        model = {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": pairs}
        cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        decoder = {**cut, "type": "ByteLevel"}
    else:
        model = {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(found.chars)}, "unk_token": ""}
        cut = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        decoder = {"type": "Fuse"}
    specials = [{"id": i, "content": name, "special": True, "normalized": False, "single_word": False, "lstrip": False,
                 "rstrip": False} for name, i in found.special_tokens.items()]
    fields = {"version": "1.0", "added_tokens": specials, "normalizer": None, "pre_tokenizer": cut, "decoder": decoder,
              "post_processor": None, "truncation": None, "padding": None, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    names = {i: name for name, i in found.special_tokens.items()}
    options |= {key: names[i] for key, i in (("bos_token", found.bos), ("eos_token", found.eos)) if i in names}
    (folder / "tokenizer_config.json").write_text(json.dumps(options, indent=1), encoding="utf-8")


def spelled(spell, piece):
    return "".join(spell[byte] for byte in piece)


def take_out(source, target):
    """Make `target` a folder from which transformers loads the model of a run."""
    folder, state = checkpoint.find(source, ckpt, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    model, run = GPT(GPTConfig(**{**state["model"], "attn": "auto"})), folder.resolve().parent.parent
    checkpoint.load_model(model, folder)
    found, config = load_tokenizer(run) if (run / "tokenizer.json").exists() else None, model.config
    family, obstacles = family_of(config)
    if obstacles:
        raise ValueError(f"{folder}: no class of transformers can express it; nearest is {CLASSES[family]}, and in its "
                         f"way {'is' if len(obstacles) == 1 else 'are'} {', '.join(obstacles)}")
    if target.exists() and any(target.iterdir()):
        fail(f"{target} is not empty: give another folder")
    tables = ("transformer.wte.weight", "lm_head.weight")  # without the rows that pad them
    tensors = {name: p[: config.vocab_size] if name in tables else p
               for name, p in checkpoint.model_tensors(model).items()}
    tensors, fields = gpt2_tensors(tensors, config) if family == "gpt2" else rotary_tensors(tensors, config, family)
    fields |= {
        "model_type": family, "architectures": [CLASSES[family]], "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights, "bos_token_id": found.bos if found else None,
        "eos_token_id": found.eos if found else None, "pad_token_id": None,
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if found:
        write_tokenizer(found, target)
    (target / "config.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    print(f"{folder} is in {target}: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it")


def from_hub(name):
    """The folder of a model of the Hub: its weights as safetensors, its configuration and vocabulary."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["config.json", "vocab.json", "*.safetensors"]))
    except Exception as error:  # no package, no network, no such model: none has a class in common
        fail(f"{name} is neither a file nor a folder, nor to be had from the Hub ({type(error).__name__}: {error})")


def main():
    if len(paths) != 2:
        fail("from where to where? python export.py FROM TO")
    source, target = map(Path, paths)
    if not source.exists():
        source = from_hub(paths[0])
    try:
        if source.is_file() or (source / "config.json").exists() and not checkpoint.steps(source):
            bring_in(source, target)
        else:
            take_out(source, target)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        fail(f"{source}: lacks {error}" if isinstance(error, KeyError) else error)


if __name__ == "__main__":
    configure(globals(), paths="paths")
    sys.exit(main())
