"""
4-bit weights by what a layer does to real text: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

    moments, tokens = calibration.second_moments(model, batches, context)
    codes = round_layers(model, moments, group=32)
    save_codes("codes.safetensors", codes, facts)
    use_codes(model, codes)
    convert(model, dtype, "int4")            # takes these codes instead of the nearest ones

The inputs of a layer are rounded one after another. What the rounding of one input changes in the layer's outputs, the
inputs that are still to come make up for as well as they can: which of them carry the same information, the second
moments of the layer's inputs over the windows tell.
"""

import hashlib
import json

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from files import write_whole
from inference.rounding import Packed, best_scale, check_finite, pad_inputs, round_groups, to_steps

DAMPING = 0.01  # of the mean square of an input, added to all: the paper's


def linear_layers(model):
    """{name: linear layer} of all but the head, which keeps 8 bits or more."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer is not model.lm_head}


def round_layers(model, moments, group, in_turn=True):
    """-> {name: Packed}, 4-bit codes of the layers in `moments`, {name: the second moments (in, in) of what it reads}.
    in_turn=False: each weight to its nearest step, with scales for which inputs count by their mean square. Raises
    ValueError naming a weight that cannot be rounded."""
    layers = linear_layers(model)
    codes = {}
    for name, moment in moments.items():
        weight = layers[name].weight
        if in_turn:
            parts = *round_in_turn(weight, moment, group, f"{name}.weight"), None
        else:
            parts = round_groups(weight, 4, group, moment.diagonal(), f"{name}.weight")
        codes[name] = Packed(4, group, lambda parts=parts: parts)
    return codes


def use_codes(model, codes):
    """Keep {name: Packed} in the layers' `packed`, from where quantize.convert takes them. The weights stay. Raises
    ValueError if they are not those of this model's layers."""
    layers = linear_layers(model)
    if codes.keys() != layers.keys():
        raise ValueError(f"the codes are another model's: only one of the two has {min(codes.keys() ^ layers.keys())}")
    for name, layer in layers.items():
        found = tuple(codes[name].read()[0].shape)
        inputs = layer.in_features + -layer.in_features % codes[name].group
        if found != (layer.out_features, inputs):
            raise ValueError(f"the codes are another model's: {name} has codes for a weight of {found}")
    for name, layer in layers.items():
        layer.packed = codes[name]


def save_codes(path, codes, facts):
    """Write {name: Packed} to a file. facts: a dict for JSON, such as the sha256 of the weights and the data."""
    tensors = {}
    for name, packed in codes.items():
        steps, scale, minimum = packed.read()
        tensors[f"{name}.nibbles"] = (steps[:, ::2] | steps[:, 1::2] << 4).cpu()
        tensors[f"{name}.scale"] = scale.cpu()
        if minimum is not None:
            tensors[f"{name}.minimum"] = minimum.cpu()
    facts = {**facts, "codes_sha256": tensors_sha256(tensors)}
    # safetensors would write several entries in any order
    write_whole(path, save(tensors, metadata={"facts": json.dumps(facts)}))


def read_codes(path):
    """-> (facts, {name: Packed}) of a file of save_codes. Raises OSError, and ValueError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if facts.get("codes_sha256") != tensors_sha256(tensors):
        raise ValueError("its sha256 is not what it was when it was written")
    codes = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part == "nibbles":
            nibbles, scale = tensors[key], tensors[f"{name}.scale"]
            steps = torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1)
            parts = steps, scale, tensors.get(f"{name}.minimum")
            codes[name] = Packed(4, steps.size(1) // scale.size(1), lambda parts=parts: parts)
    return facts, codes


def tensors_sha256(tensors):
    """The sha256 of {name: a tensor on the CPU}, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def round_in_turn(weight, moment, group, name="the weight"):
    """A matrix (N, K), and the second moments (K, K) of its inputs -> (codes uint8 (N, K), scale float16 (N, K / G)) of
    symmetric groups as in round_groups. K is rounded up to a multiple of the group. Raises ValueError."""
    check_finite(weight, name)
    weight = pad_inputs(weight.detach().float(), group).clone()
    fill = weight.size(1) - len(moment)
    moment = F.pad(moment, (0, fill, 0, fill))
    square = moment.diagonal()
    moment = moment + torch.diag(DAMPING * square.mean() + (square == 0).float())
    # row j of the upper factor of the inverse: how inputs j, j + 1, ... make up for an error at input j
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    follow = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scales = []
    for first in range(0, weight.size(1), group):
        inputs = slice(first, first + group)
        scale = best_scale(weight[:, inputs], square[None, inputs], name)
        scales.append(scale)
        wide = scale.float()[:, None]
        errors = torch.empty_like(weight[:, inputs])
        for j in range(first, first + group):
            own = weight[:, j : j + 1]
            steps = to_steps(own, wide, -8, 7)
            codes[:, j : j + 1] = (steps + 8).to(torch.uint8)
            error = (own - steps * wide) / follow[j, j]
            weight[:, j : first + group] -= error * follow[j, j : first + group]
            errors[:, j - first : j - first + 1] = error
        weight[:, first + group :] -= errors @ follow[inputs, first + group :]
    return codes, torch.stack(scales, 1)
