"""
Convert a run of ours for transformers or llama.cpp, and a model from elsewhere into a run.

    python export.py out/mine hf/mine                       # to a folder that transformers loads
    python export.py out/mine mine.gguf --dtype=q8_0        # to a file that llama.cpp loads
    python export.py out-shakespeare/ckpt.pt out/mine      # from nanoGPT
    python export.py gpt2 out/gpt2                          # from the Hub, or a folder with config.json and safetensors
    python export.py llama.gguf out/llama                   # from llama.cpp's file

A run becomes a model of the class of transformers that can express it: GPT-2's, Llama's, Qwen3's or NanoChat's (RMSNorm
without gain, a norm after the embedding, RoPE, QK-norm, ReLU squared). llama.cpp has the first three. Its tokenizer
and its chat template go along (foreign/).

foreign/pretrained.py reads models from elsewhere, and executes no pickle. The result is a run like any other:
sample.py and eval.py read it, and train.py starts from it with --init_from=. (train.py also starts from the original.)
"""

import json
import os
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoint
from configurator import Settings, configure, fail
from foreign.hugging_face import TRANSPOSED
from foreign.names import LAYER_NAMES, NANOCHAT_NAMES, OUTER_NAMES
from foreign.pretrained import TABLES, read_model
from foreign.tokenizer_files import add_to_gguf, hugging_face_files
from model import rope_base

# -----------------------------------------------------------------------------
paths: tuple[str, ...] = ()  # source and target, as bare words; a target NAME.gguf is for llama.cpp
ckpt = "latest"         # which checkpoint of a run: latest | best | a step
tokenizer = ""          # for a model from elsewhere: a file or folder (nanoGPT's data folder); empty: the one beside it
template = ""           # for a model from elsewhere: minichat | chatml | smollm2 | nanochat; empty: the model's own
dtype = "float32"       # of the matrices in a .gguf: float32 | float16 | bfloat16 | q8_0 | q4_0 | q4_1 (8 or 4 bits)
# -----------------------------------------------------------------------------

# -----------------------------------------------------------------------------
# Which class can express a model

# Fields of GPTConfig that are written or checked below. A fork may have more.
KNOWN = set("""activation attn bias block_size dropout init_std logit_softcap mlp_width n_embd n_head n_kv_head n_layer
    norm norm_embed norm_eps pos qk_norm rope_factor rope_scaling rope_theta tie_weights vocab_size
    zero_init""".split())

# For each class of transformers, the values of our fields that it can express
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
# The same for llama.cpp; the only GELU of its gpt2 is the tanh form
LLAMA_CPP = {
    "gpt2": {**FAMILIES["gpt2"], "activation": ("gelu_tanh",)},
    "llama": {**FAMILIES["llama"], "rope_scaling": ("none", "ntk")},
    "qwen3": {**FAMILIES["qwen3"], "rope_scaling": ("none", "ntk")},
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM",
           "nanochat": "NanoChatForCausalLM"}


def family_of(config, families, project):
    """The first of a project's `families` that can express a model. Raises ValueError naming the fields that stand in
    the way of the nearest family."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in KNOWN and value != field.default:
            raise ValueError(f"{field.name}={value}: export.py does not know this field, and {project} would get "
                             "another model without it")
    own = dict(vars(config))
    own["n_kv_head"] = "n_head" if config.kv_heads == config.n_head else config.kv_heads
    obstacles = {}
    for family, allowed in families.items():
        keys = [key for key, values in allowed.items() if own[key] not in values]
        obstacles[family] = [f"{key}={getattr(config, key)}" for key in keys]
    nearest = min(obstacles, key=lambda family: len(obstacles[family]))
    if obstacles[nearest]:
        raise ValueError(f"no model of {project} can express this one; the nearest is {nearest}, which does not have "
                         f"{', '.join(obstacles[nearest])}")
    return nearest


# -----------------------------------------------------------------------------
# To transformers


def write_hugging_face(model, tokenizer, target):
    """Make `target` a folder from which transformers loads the model."""
    config = model.config
    family = family_of(config, FAMILIES, "transformers")
    if target.exists() and any(target.iterdir()):
        fail(f"{target} is not empty: give another folder")
    tensors, fields = tensors_of(model, family)
    fields |= {
        "model_type": family, "architectures": [CLASSES[family]], "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights, "bos_token_id": tokenizer.bos if tokenizer else None,
        "eos_token_id": tokenizer.eos if tokenizer else None, "pad_token_id": None,
    }
    files = hugging_face_files(tokenizer) if tokenizer else {}
    files["config.json"] = fields
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"the model is in {target}: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it")


def tensors_of(model, family):
    """({name: tensor} under the names of the class of transformers, the fields of config.json that only it has)"""
    tensors = checkpoint.model_tensors(model)
    for name in TABLES:
        if name in tensors:
            tensors[name] = tensors[name][: model.config.vocab_size]  # without the rows that pad
    if family == "gpt2":
        return gpt2_tensors(tensors, model.config), gpt2_fields(model.config)
    return rotary_tensors(tensors, model.config, family), rotary_fields(model.config, family)


def gpt2_tensors(tensors, config):
    """{name: tensor} of GPT-2's class."""
    renamed = {}
    for name, p in tensors.items():
        renamed[name] = (p.T if name.endswith(TRANSPOSED) else p).contiguous()
    for name, p in list(renamed.items()):  # every layer of GPT-2's class has a bias
        layer = name.removesuffix(".weight").removesuffix(".bias")
        if layer not in ("transformer.wte", "transformer.wpe", "lm_head"):
            renamed.setdefault(f"{layer}.bias", torch.zeros(p.size(-1)))
    return renamed


def gpt2_fields(config):
    return {
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_positions": config.block_size,
        "n_inner": config.mlp_dim,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        "layer_norm_epsilon": config.norm_eps, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
    }


def rotary_tensors(tensors, config, family):
    """{name: tensor} of the classes with rotary positions."""
    layer_names = LAYER_NAMES | NANOCHAT_NAMES if family == "nanochat" else LAYER_NAMES
    renamed = {}
    for name, p in tensors.items():
        layer, _, part = name.removeprefix("transformer.h.").partition(".")
        if name in OUTER_NAMES:
            renamed[OUTER_NAMES[name]] = p
        elif part == "attn.c_attn.weight":
            for letter, matrix in split_attention(p, config, family).items():
                renamed[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = matrix
        else:
            renamed[f"model.layers.{layer}.{layer_names[part]}"] = p
    return {name: p.contiguous() for name, p in renamed.items()}


def split_attention(c_attn, config, family):
    """c_attn's matrix -> {"q", "k", "v"}. NanoChat rotates in the opposite direction, so the two halves of its query
    and key heads change places."""
    D = config.head_dim
    q, k, v = c_attn.split((config.n_head * D, config.kv_heads * D, config.kv_heads * D))
    if family == "nanochat":
        q, k = (t.view(-1, 2, D // 2, t.size(1)).flip(1).reshape(t.shape) for t in (q, k))
    return {"q": q, "k": k, "v": v}


def rotary_fields(config, family):
    fields = {
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads, "hidden_size": config.n_embd, "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.block_size, "rms_norm_eps": config.norm_eps,
        "hidden_act": {"swiglu": "silu"}.get(config.activation, config.activation),
        "attention_bias": False, "mlp_bias": False, "attention_dropout": config.dropout, "head_dim": config.head_dim,
        "rope_parameters": rope_parameters(config), "rope_theta": rope_base(config),
    }
    if family == "nanochat":
        fields["final_logit_softcapping"] = config.logit_softcap or None
    return fields


def rope_parameters(config):
    """The fields of transformers for our rotary positions. ntk needs only its larger base."""
    parameters = {"rope_type": "default", "rope_theta": rope_base(config)}
    if config.rope_scaling in ("linear", "yarn"):
        parameters |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "yarn":
        parameters["original_max_position_embeddings"] = round(config.block_size / config.rope_factor)
    return parameters


# -----------------------------------------------------------------------------
# To llama.cpp


# our names, and GGUF's
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}


def write_gguf(model, tokenizer, target, dtype="float32"):
    """Make `target` a file that llama.cpp loads, with its matrices in `dtype`.

    In q8_0, q4_0 and q4_1, 32 weights of a row share a scale, and in q4_1 a least weight. A matrix whose rows do not
    divide by 32 is float16, as in llama.cpp's own conversion.
    """
    try:
        import gguf
    except ImportError:
        fail("a .gguf is written with the package gguf: pip install -e '.[export]' -c constraints.txt")
    config = model.config
    beside = target.with_name(target.name + ".writing")  # gguf opens files by name
    family = family_of(config, LLAMA_CPP, "llama.cpp")
    if target.exists():
        fail(f"{target} already exists: give another name")
    short = DTYPES[dtype]
    writer = gguf.GGUFWriter(beside, family)
    add_sizes(writer, config, family)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if short == "F32" else f"MOSTLY_{short}"])
    add_to_gguf(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.n_layer)
    for name, p in tensors_of(model, family)[0].items():
        p = gguf_layout(name, p, config, family)
        kind = gguf.GGMLQuantizationType[gguf_type(name, p, short)]
        data = gguf.quants.quantize(p.float().contiguous().numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(beside, target)
    finally:
        writer.close()  # Windows removes no open file
        beside.unlink(missing_ok=True)


def gguf_layout(name, p, config, family):
    """A tensor of a class of transformers, with its rows in the order of llama.cpp."""
    if family == "gpt2" and name.endswith(TRANSPOSED):
        return p.T
    if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        # it rotates pairs of neighbours, not the two halves of a head
        return p.view(-1, 2, config.head_dim // 2, p.size(1)).transpose(1, 2).reshape(p.shape)
    return p


def gguf_type(name, p, short):
    if p.ndim == 1 or "wpe" in name:
        return "F32"
    if short.startswith("Q") and p.size(1) % 32:
        return "F16"
    return short


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


# -----------------------------------------------------------------------------
# To a run of ours


class NoOptimizer:
    """In place of the optimizers, which a model from elsewhere does not bring."""

    def state_dict(self):
        return {}


def write_run(model, tokenizer, state, source, target):
    """Make `target` a run that holds a model from elsewhere."""
    if checkpoint.steps(target):
        fail(f"{target} already holds a run: give another folder")
    origin = {"dataset": "", "init_from": source.name}
    checkpoint.save(target, model, NoOptimizer(), {**state, "model": asdict(model.config), "config": origin})
    note = "without a tokenizer: --tokenizer=FOLDER names one"
    if tokenizer:
        tokenizer.save(target)
        note = "with its tokenizer"
    print(f"{model.num_params():,} parameters in {target}, {note}")
    print(f"next: python sample.py {shlex.quote(f'--out_dir={target}')}")


def main(c):
    if len(c.paths) != 2:
        fail("export.py needs a source and a target: python export.py FROM TO")
    target = Path(c.paths[1])
    to_llama_cpp = target.suffix == ".gguf"
    if to_llama_cpp and c.dtype not in DTYPES:
        fail(f"dtype={c.dtype!r} is not one of {', '.join(DTYPES)}")
    if not to_llama_cpp and c.dtype != "float32":
        fail(f"dtype={c.dtype!r} is for a .gguf: here it is float32")
    try:
        model, tokenizer, state = read_model(c.paths[0], c.ckpt, c.tokenizer, c.template)
        if to_llama_cpp:
            write_gguf(model, tokenizer, target, c.dtype)
            note = f"llama-cli -m {target} runs it" if tokenizer else "without a tokenizer, so it takes only ids"
            print(f"the model is in {target}: {note}")
        elif "model" in state:  # a run of ours
            write_hugging_face(model, tokenizer, target)
        else:
            write_run(model, tokenizer, state, Path(c.paths[0]), target)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    c = Settings(configure(globals(), paths="paths"))
    main(c)
