"""
4-bit weights by what a layer does to real text: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

    calibrate(model, windows, group=32)      # windows: (B, T) ids each
    convert(model, dtype, "int4")            # takes these codes instead of the nearest ones
    save_codes("codes.safetensors", model, facts)

The inputs of a layer are rounded one after another. What the rounding of one input changes in the layer's outputs, the
inputs that are still to come make up for as well as they can: which of them carry the same information, the second
moments of the layer's inputs over the windows tell.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from files import write_whole
from inference.rounding import Packed, best_scale, check_finite, pad_inputs, round_groups, to_steps

DAMPING = 0.01  # of the mean square of an input, added to all: the paper's


def calibrate(model, windows, group, in_turn=True):
    """Round the weight of each linear layer of `model`, and keep the codes in its `packed`, from where quantize.convert
    takes them. The weights stay. in_turn=False: each weight to its nearest step, with scales for which inputs count by
    their mean square. For each layer (in, in) float32 numbers are in memory. Raises ValueError naming a
    weight that cannot be rounded."""
    moments = second_moments(model, windows)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            moment = moments.pop(layer)
            if in_turn:
                parts = *round_in_turn(layer.weight, moment, group, f"{name}.weight"), None
            else:
                parts = round_groups(layer.weight, 4, group, moment.diagonal(), f"{name}.weight")
            layer.packed = Packed(4, group, lambda parts=parts: parts)


def save_codes(path, model, facts):
    """Write the codes of a calibration to a file. facts: {str: str}, such as the sha256 of the weights and the data."""
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            codes, scale, minimum = layer.packed.read()
            tensors[f"{name}.nibbles"] = (codes[:, ::2] | codes[:, 1::2] << 4).cpu()
            tensors[f"{name}.scale"] = scale.cpu()
            if minimum is not None:
                tensors[f"{name}.minimum"] = minimum.cpu()
    write_whole(path, save(tensors, metadata=facts))


def load_codes(path, model, facts):
    """Give the linear layers of `model` the codes of a file. Raises OSError, and ValueError for a damaged file, for one
    whose facts are not `facts` (those that only the file has do not count), and for another model's."""
    try:
        with safe_open(path, "pt") as file:
            written = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for key, value in facts.items():
        if written.get(key) != value:
            raise ValueError(f"{path} was made with {key} {written.get(key)}, and here it is {value}: calibrate again")
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        nibbles, scale, minimum = (tensors.get(f"{name}.{part}") for part in ("nibbles", "scale", "minimum"))
        if nibbles is None or scale is None or len(nibbles) != layer.out_features:
            raise ValueError(f"{path} is another model's: it has no codes for {name}")
        codes = torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1)
        layer.packed = Packed(4, codes.size(1) // scale.size(1), lambda parts=(codes, scale, minimum): parts)


@torch.no_grad()
def second_moments(model, windows):
    """{linear layer: the mean of x x^T (in, in) over the inputs x that the windows give it}"""
    sums = {layer: 0 for layer in model.modules() if isinstance(layer, nn.Linear)}
    rows = 0

    def add(layer, inputs):
        x = inputs[0].flatten(0, -2).float()
        sums[layer] = sums[layer] + x.T @ x

    hooks = [layer.register_forward_pre_hook(add) for layer in sums]
    try:
        for idx in windows:
            rows += idx.numel()
            model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: total / rows for layer, total in sums.items()}


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
