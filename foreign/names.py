"""
What the readers of models from elsewhere share: files that are not what they should be, tensors that are made when they
are asked for, and the names of the classes with rotary positions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from model import GPTConfig

# Our names, within a layer and outside, and the names in transformers' classes with rotary positions
LAYER_NAMES = {
    "ln_1.weight": "input_layernorm.weight", "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight", "attn.q_gain": "self_attn.q_norm.weight",
    "attn.k_gain": "self_attn.k_norm.weight", "mlp.c_gate.weight": "mlp.gate_proj.weight",
    "mlp.c_fc.weight": "mlp.up_proj.weight", "mlp.c_proj.weight": "mlp.down_proj.weight",
}
NANOCHAT_NAMES = {"mlp.c_fc.weight": "mlp.fc1.weight", "mlp.c_proj.weight": "mlp.fc2.weight"}
OUTER_NAMES = {"transformer.wte.weight": "model.embed_tokens.weight", "transformer.ln_f.weight": "model.norm.weight",
               "lm_head.weight": "lm_head.weight"}

# A chat template of ours, the fields of conversation.Format, as export.py writes it beside the one in Jinja
OWN_KEY = "minichat_template"  # in tokenizer_config.json
OWN_GGUF_KEY = "minichat.template"  # in a .gguf, as JSON
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # its marks in the one in Jinja: no text has them

# What is fixed in each of these classes, as fields of GPTConfig
ROTARY = {"pos": "rope", "bias": False}
FIXED = {
    "llama": {**ROTARY, "norm": "rmsnorm", "activation": "swiglu"},
    "qwen3": {**ROTARY, "norm": "rmsnorm", "activation": "swiglu", "qk_norm": "rms_gain"},
    "nanochat": {**ROTARY, "norm": "rmsnorm_nogain", "activation": "relu2", "qk_norm": "rms", "norm_embed": True},
}


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


@dataclass
class Found:
    """A chat template that comes with a model: as Jinja, or as our fields if export.py wrote it. `place`: its file."""

    place: str
    jinja: str = ""
    fields: dict | None = None


class Made(Mapping):
    """Tensors by name, each made when it is asked for: {name: function without arguments}. A model from elsewhere is
    never whole in memory beside ours."""

    def __init__(self, makers):
        self.makers = makers

    def __getitem__(self, name):
        return self.makers[name]()

    def __contains__(self, name):
        return name in self.makers  # without making it

    def __iter__(self):
        return iter(self.makers)

    def __len__(self):
        return len(self.makers)


def rotary_config(family, sizes, source):
    """The GPTConfig of a model of `family` with these sizes, which are fields of GPTConfig, and mlp_dim and head_dim.
    Raises ValueError naming what model.py lacks."""
    sizes = dict(sizes)
    mlp_dim = sizes.pop("mlp_dim")
    head_dim = sizes.pop("head_dim")
    if sizes["n_kv_head"] == sizes["n_head"]:
        sizes["n_kv_head"] = 0
    config = GPTConfig(**sizes, **FIXED[family])
    if head_dim not in (None, config.head_dim):
        raise ValueError(f"{source}: its heads have head_dim={head_dim}, and model.py only knows hidden size / heads = "
                         f"{config.n_embd} / {config.n_head} = {config.head_dim}")
    if mlp_dim != config.mlp_dim:
        config.mlp_width = mlp_dim
    return config


def from_rotary_names(tensors, config, family):
    """Tensors under the names of transformers' classes with rotary positions -> Made, under our names. A name that
    these classes do not have stays as it is."""
    layer_names = LAYER_NAMES | NANOCHAT_NAMES if family == "nanochat" else LAYER_NAMES
    ours = {theirs: name for name, theirs in OUTER_NAMES.items()}
    for i in range(config.n_layer):
        for name, theirs in layer_names.items():
            ours[f"model.layers.{i}.{theirs}"] = f"transformer.h.{i}.{name}"
    makers = {}
    for theirs in tensors:
        layer, _, letter = theirs.removesuffix("_proj.weight").rpartition(".self_attn.")
        if letter in ("q", "k", "v"):
            name = f"transformer.h.{layer.removeprefix('model.layers.')}.attn.c_attn.weight"
            makers[name] = partial(join_attention, tensors, layer, config, family)
        elif not theirs.endswith(".rotary_emb.inv_freq"):  # a table, from before it was computed
            makers[ours.get(theirs, theirs)] = partial(tensors.__getitem__, theirs)
    return Made(makers)


def join_attention(tensors, layer, config, family):
    """q, k and v of a layer -> c_attn's matrix. NanoChat rotates in the opposite direction, so the two halves of its
    query and key heads change places."""
    D = config.head_dim
    matrices = []
    for letter, heads in (("q", config.n_head), ("k", config.kv_heads), ("v", config.kv_heads)):
        name = f"{layer}.self_attn.{letter}_proj.weight"
        matrix = tensors[name]
        if matrix.shape != (heads * D, config.n_embd):
            raise ValueError(f"{name} is {tuple(matrix.shape)} in the file, not {(heads * D, config.n_embd)}")
        if family == "nanochat" and letter != "v":
            matrix = matrix.view(-1, 2, D // 2, config.n_embd).flip(1).reshape(matrix.shape)
        matrices.append(matrix)
    return torch.cat(matrices)
