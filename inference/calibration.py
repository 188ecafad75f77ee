"""
What a model's own activations teach its forms for inference: static scales for FP8, codes of 4 bits.

`eval.py calibrate` runs the plain model over fixed windows of text, and watches what enters each linear layer.

- fp8: it counts magnitudes. The scale of a layer is the one whose saturating cast to e4m3 has the least squared error
  over these counts.
- int4: it sums second moments, and rounds by them in two ways (inference/gptq.py). Other windows decide whether one of
  them is better than rounding to the nearest step.

The result lies beside the weights of the checkpoint that it belongs to, and names them and the data by their sha256.
`convert_run` finds it there.
"""

import copy
import json
import shlex
import sys
from pathlib import Path

import torch

import checkpoint
import float8
from files import sha256, write_whole
from inference import gptq
from inference.quantize import INTEGERS, convert
from loader import fixed_batches

FILE = "fp8_calibration.json"
FORMAT = "minichat fp8 calibration 1"
CODES_FORMAT = "minichat int4 calibration 1"
CODES = [name for name, (bits, _) in INTEGERS.items() if bits == 4]  # forms that can have calibrated codes
BINS = 1 << 15       # magnitudes as their first 15 bits: 128 bins for each power of two, from 0 to infinity
STEPS_PER_OCTAVE = 16  # scales that are tried
OCTAVES = 6            # below the scale at which nothing saturates


# -----------------------------------------------------------------------------
# What enters a layer


def windows(tokens, block_size, batch_size, most):
    """The Batches that decide: the first windows of each dataset of `tokens`, at most `most` batches of it."""
    for part, _ in tokens.parts:
        yield from fixed_batches(part, block_size, batch_size, most)


@torch.no_grad()
def watch(model, batches, context, layers, look):
    """Run `model` over `batches`, and call look(name, x) with what each of `layers`, {name: module}, reads.
    -> tokens read"""
    device = next(model.parameters()).device
    hooks = [layer.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs[0]))
             for name, layer in layers.items()]
    count = 0
    try:
        for batch in batches:
            batch = batch.to(device)
            with context():
                model(batch.x, batch.y, docs=batch.docs, loss_only=True)
            count += batch.x.numel()
    finally:
        for hook in hooks:
            hook.remove()
    return count


# -----------------------------------------------------------------------------
# fp8: from counts to a scale


def magnitude_counts(x):
    """How many elements of x have each magnitude: int64 (BINS,), on x's device."""
    codes = x.detach().float().abs().contiguous().view(torch.int32) >> 16
    return torch.bincount(codes.flatten(), minlength=BINS)


def magnitudes():
    """The magnitude in the middle of each bin, fp32 (BINS,). The last ones are infinite or NaN."""
    codes = torch.arange(BINS, dtype=torch.int32)
    return ((codes << 16) + (1 << 15)).view(torch.float32)


def layer_scales(model, batches, context, noise_seed=None):
    """Run `model` over `batches`. -> ({name of a layer that FP8 takes: its record}, tokens read). Raises ValueError if
    no layer fits FP8, or if an activation is not finite.

    noise_seed: a negative control, whose scales are those of standard normal noise. (Windows of random tokens would be
    none: after a norm they reach as far as text, and give scales that are as good.)
    """
    layers = {name: layer for name, layer in gptq.linear_layers(model).items() if float8.fits(layer)}
    if not layers:
        raise ValueError(f"no linear layer of this model has sides that are multiples of {float8.UNIT}, so none can be "
                         "in FP8")
    noise = None if noise_seed is None else torch.Generator().manual_seed(noise_seed)
    seen = {}  # name -> (counts, largest)

    def look(name, x):
        if noise:
            x = torch.randn(x.shape, generator=noise)
        counts, largest = magnitude_counts(x), x.detach().abs().amax().float()
        if name in seen:
            counts += seen[name][0]
            largest = torch.maximum(largest, seen[name][1])
        seen[name] = counts, largest

    count = watch(model, batches, context, layers, look)
    return {name: summarize(name, *counts) for name, counts in seen.items()}, count


def squared_error(counts, scale):
    """The summed squared error of a cast to e4m3 with this scale, over magnitudes with these counts, on the CPU."""
    wanted = magnitudes()[: len(counts)]
    scale = torch.tensor(scale, dtype=torch.float32)
    reached = float8.values(float8.cast(wanted, scale, float8.E4M3)) * scale
    return float((counts * (wanted.double() - reached.double()).square()).sum())


def summarize(name, counts, amax):
    """-> the record of a layer: its largest and 99.99th percentile magnitude, the scale with the least squared error,
    that error as a share of the sum of squares, and the elements in each power of two. Raises ValueError."""
    counts, amax = counts.cpu(), float(amax)
    if not torch.isfinite(torch.tensor(amax)):
        raise ValueError(f"what {name} reads is not finite: such a model has no scale")
    finite = int(torch.isfinite(magnitudes()).sum())
    counts = counts[:finite].double()
    middle = magnitudes()[:finite].double()
    rank = (counts.cumsum(0) >= 0.9999 * counts.sum()).int().argmax()
    best, least = float(float8.scale_for(torch.tensor(amax), float8.E4M3)), float("inf")
    for step in range(STEPS_PER_OCTAVE * OCTAVES if amax else 0):
        scale = amax / float8.largest(float8.E4M3) * 2 ** (-step / STEPS_PER_OCTAVE)
        error = squared_error(counts, scale)
        if error < least:
            best, least = scale, error
    power = float((counts * middle.square()).sum())
    octaves = counts[:finite].view(-1, 128).sum(1)  # a power of two is 128 bins
    return {
        "largest": amax, "p99_99": min(float(middle[rank]), amax), "scale": best,
        "error": least / power if amax else 0.0,
        "octaves": {str(i - 127): int(n) for i, n in enumerate(octaves) if n},
    }


def table(layers):
    """The lines of a table of the records."""
    lines = [f"{'layer':<32} {'largest':>9} {'99.99%':>9} {'scale to':>9} {'error':>8}"]
    for name, layer in layers.items():
        reach = layer["scale"] * float8.largest(float8.E4M3)  # what is larger saturates
        lines.append(f"{name:<32} {layer['largest']:9.3f} {layer['p99_99']:9.3f} {reach:9.3f} {layer['error']:8.1e}")
    return lines


# -----------------------------------------------------------------------------
# int4: from second moments to codes


def second_moments(model, batches, context):
    """Run `model` over `batches`. -> ({name of a layer: the mean of x x^T over all x that it reads, (in, in) float32},
    tokens read). All these matrices are in memory. Raises ValueError if an activation is not finite."""
    sums = {}

    def add(name, x):
        with torch.autocast(x.device.type, enabled=False):  # its half precision would be too coarse for the sums
            x = x.detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.T @ x

    count = watch(model, batches, context, gptq.linear_layers(model), add)
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise ValueError(f"what {name} reads is not finite: such a model cannot be calibrated")
    return {name: total / count for name, total in sums.items()}, count


def best_codes(model, quantize, moments, loss):
    """Round by each way, and let loss(model) decide on text that is not among the moments'. Beside the model there is
    one copy of it at a time.

    -> (the best way, {way: loss}, the codes of the best: {name: Packed}, or None for nearest). nearest: to the nearest
    step; weighted: with scales for which inputs count by their mean square; gptq: one input after another.
    """
    group = INTEGERS[quantize][1]
    ways = {
        "nearest": None,
        "weighted": gptq.round_layers(model, moments, group, in_turn=False),
        "gptq": gptq.round_layers(model, moments, group),
    }
    losses = {}
    for way, codes in ways.items():
        rounded = copy.deepcopy(model)
        if codes:
            gptq.use_codes(rounded, codes)
        losses[way] = loss(convert(rounded, torch.float32, quantize))
    best = min(losses, key=losses.get)  # the first of equals
    return best, losses, ways[best]


# -----------------------------------------------------------------------------
# The files


def check(form, split, noise):
    """Raises ValueError for what eval.py calibrate cannot make: form is fp8 or one of CODES."""
    if form != "fp8" and form not in CODES:
        raise ValueError(f"--quantize={form} has no calibration: fp8, {', '.join(CODES)} have one")
    if form in CODES and (noise or split == "train"):
        raise ValueError("codes are made from the training split and compared on the validation split: leave "
                         f"{'noise' if noise else 'split'} out")


def make_scales(model, batches, context, folder, state, about, noise_seed):
    """The verb's fp8: prints the table of the layers, writes their scales. -> what the last line says"""
    layers, count = layer_scales(model, batches, context, noise_seed)
    about = {**about, "tokens": count, "noise": noise_seed is not None}
    path = write(folder, state, layers, about)
    print(*table(layers), sep="\n")
    print(f"{path}: static scales of {len(layers)} layers, from {count:,} tokens of {about['dataset']}")
    return {"file": str(path), **about, "layers": len(layers)}


def make_codes(model, quantize, batches, context, folder, state, about, loss):
    """The verb's int4: prints the losses of each way, writes the best codes. -> what the last line says"""
    moments, count = second_moments(model, batches, context)
    best, losses, codes = best_codes(model, quantize, moments, loss)
    about = {**about, "tokens": count, "codes": best, "losses": losses}
    path = path_of(folder, quantize)
    print(f"{quantize}: loss {losses['nearest']:.4f} with each weight at its nearest step, {losses['weighted']:.4f} "
          f"weighted by what layers read, {losses['gptq']:.4f} with errors made up for (GPTQ)")
    if codes is None:
        path.unlink(missing_ok=True)  # one from before is no better, or of other weights
        print(f"the nearest steps are best, so there is no {path.name}")
        return {"file": None, **about}
    gptq.save_codes(path, codes, {"format": CODES_FORMAT, "weights_sha256": weights_sha256(state), **about})
    print(f"{path}: codes of {len(codes)} layers, from {count:,} tokens of {about['dataset']}")
    return {"file": str(path), **about, "layers": len(codes)}


def weights_sha256(state):
    """What names the weights of a checkpoint, from its state: the sha256 of its file, or of those of all its parts."""
    files = state["files"]
    return files.get("model.safetensors") or sha256(json.dumps(sorted(files.items())))


def path_of(folder, quantize):
    """Where the calibration of a form lies in the folder of a checkpoint."""
    return Path(folder) / (FILE if quantize == "fp8" else f"{quantize}_calibration.safetensors")


def write(folder, state, layers, about):
    """Write the scales of a checkpoint. `layers`: name -> record; `about`: what it was made with. -> its path"""
    path = path_of(folder, "fp8")
    content = {"format": FORMAT, "weights_sha256": weights_sha256(state), **about, "layers": layers}
    write_whole(path, json.dumps(content, indent=1) + "\n")
    return path


def folder_of(out_dir, state):
    """The folder of the checkpoint that `state` was read from; None for a model that is no run of ours."""
    if "files" not in state:
        return None
    if (Path(out_dir) / "state.json").exists():
        return Path(out_dir)
    return checkpoint.steps(out_dir).get(state["step"])


def read_scales(path):
    """-> (facts, {name of a layer: the static scale of its input}). Raises OSError and ValueError."""
    found = json.loads(path.read_text(encoding="utf-8"))
    scales = {name: float(layer["scale"]) for name, layer in found["layers"].items()}
    if not all(0 < scale < float("inf") for scale in scales.values()):
        raise ValueError("a scale is not a positive number")
    return found, scales


def read(out_dir, state, quantize):
    """-> (facts, scales or codes by the name of a layer) of the calibration beside a checkpoint, or None if it has
    none. Raises ValueError for one that is damaged, or of other weights."""
    folder = folder_of(out_dir, state)
    if folder is None or not path_of(folder, quantize).exists():
        return None
    path = path_of(folder, quantize)
    option, without = "", "scales are dynamic"
    if quantize in CODES:
        option, without = f" --quantize={quantize}", "weights are rounded to the nearest step"
    mend = (f"python eval.py calibrate {shlex.quote(f'--out_dir={out_dir}')}{option} makes it again; without the file, "
            f"{without}")
    try:
        facts, layers = gptq.read_codes(path) if quantize in CODES else read_scales(path)
        if facts["format"] != (CODES_FORMAT if quantize in CODES else FORMAT):
            raise ValueError(f"its format is {facts['format']!r}")
        if quantize in CODES and any(packed.group != INTEGERS[quantize][1] for packed in layers.values()):
            raise ValueError("its groups have another size")
        theirs = facts["weights_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} cannot be read ({e}): {mend}") from None
    if theirs != weights_sha256(state):
        raise ValueError(f"{path} was made for other weights (sha256 {str(theirs)[:12]}...) than this checkpoint has "
                         f"({weights_sha256(state)[:12]}...): {mend}")
    return facts, layers


def convert_run(model, dtype, quantize, out_dir, state):
    """quantize.convert for the model of a checkpoint, with the calibration beside it if there is one. Says on stderr
    whether there is, for forms that can have one. -> the model. Raises ValueError, also for a calibration of other
    weights, and OSError."""
    scales = None
    if quantize == "fp8" or quantize in CODES:
        found = read(out_dir, state, quantize)
        print(describe(quantize, found, out_dir, state), file=sys.stderr)
        if found and quantize == "fp8":
            scales = found[1]
        elif found:
            gptq.use_codes(model, found[1])
    return convert(model, dtype, quantize, scales)


def describe(quantize, found, out_dir, state):
    """The line that says what decides a form's scales or codes. found: as `read` returns it"""
    codes = quantize in CODES
    if found:
        facts, layers = found
        source = "noise, as a control" if facts.get("noise") else facts.get("dataset", "an unknown dataset")
        return f"{quantize}: {'codes' if codes else 'static scales'} of {len(layers)} layers, calibrated on {source}"
    line = f"{quantize}: not calibrated" if codes else "fp8: dynamic scales, one a token"
    if folder_of(out_dir, state) is None:  # no run of ours, so there is no place for a calibration
        return line
    if codes:
        return f"{line}; python eval.py calibrate --quantize={quantize} looks for better codes"
    return f"{line}; python eval.py calibrate makes static ones"
