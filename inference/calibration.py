"""
Static scales of activations for FP8 inference: what each linear layer reads over fixed windows of a split decides them.

`eval.py calibrate` runs the plain model and counts the magnitudes that enter each layer. The scale of a layer is the
one whose saturating cast to e4m3 has the least squared error over these counts. The result lies beside the weights of
the checkpoint that it belongs to, and names them and the data by their sha256.
"""

import json
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn

import checkpoint
import float8
from files import sha256, write_whole
from loader import fixed_batches

FILE = "fp8_calibration.json"
FORMAT = "minichat fp8 calibration 1"
BINS = 1 << 15       # magnitudes as their first 15 bits: 128 bins for each power of two, from 0 to infinity
STEPS_PER_OCTAVE = 16  # scales that are tried
OCTAVES = 6            # below the scale at which nothing saturates


# -----------------------------------------------------------------------------
# What enters a layer


def magnitude_counts(x):
    """How many elements of x have each magnitude: int64 (BINS,), on x's device."""
    codes = x.detach().float().abs().contiguous().view(torch.int32) >> 16
    return torch.bincount(codes.flatten(), minlength=BINS)


def magnitudes():
    """The magnitude in the middle of each bin, fp32 (BINS,). The last ones are infinite or NaN."""
    codes = torch.arange(BINS, dtype=torch.int32)
    return ((codes << 16) + (1 << 15)).view(torch.float32)


@contextmanager
def watch_inputs(model, noise=None):
    """Within it, count what each linear layer of `model` reads that FP8 takes. Yields {name: (counts, largest)}, which
    fills while the model runs. With `noise`, a CPU generator, it counts normal noise of the same shapes."""
    seen = {}

    def look(name, inputs):
        x = inputs[0]
        if noise:
            x = torch.randn(x.shape, generator=noise)
        counts, largest = magnitude_counts(x), x.detach().abs().amax().float()
        if name in seen:
            counts += seen[name][0]
            largest = torch.maximum(largest, seen[name][1])
        seen[name] = counts, largest

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and float8.fits(module) and module is not model.lm_head:
            hooks.append(module.register_forward_pre_hook(lambda module, inputs, name=name: look(name, inputs)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def watch(model, tokens, block_size, batch_size, most, context, noise_seed=None):
    """Run `model` over the first windows of each dataset of `tokens`, at most `most` batches. -> ({name of a layer: its
    record}, tokens read). block_size 0: the model's. Raises ValueError if no layer fits FP8, or if an activation is not
    finite.

    noise_seed: a negative control, whose scales are those of standard normal noise. (Windows of random tokens would be
    none: after a norm they reach as far as text, and give scales that are as good.)
    """
    device = next(model.parameters()).device
    noise = None if noise_seed is None else torch.Generator().manual_seed(noise_seed)
    count = 0
    with watch_inputs(model, noise) as seen:
        for part, _ in tokens.parts:
            length = block_size or part.row_size or model.config.block_size
            for batch in fixed_batches(part, length, batch_size, most):
                batch = batch.to(device)
                with context():
                    model(batch.x, batch.y, docs=batch.docs, loss_only=True)
                count += batch.x.numel()
    if not seen:
        raise ValueError(f"no linear layer of this model has sides that are multiples of {float8.UNIT}, so none can be "
                         "in FP8")
    return {name: summarize(name, *counts) for name, counts in seen.items()}, count


# -----------------------------------------------------------------------------
# From counts to a scale


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


# -----------------------------------------------------------------------------
# The file


def weights_sha256(state):
    """What names the weights of a checkpoint, from its state: the sha256 of its file, or of those of all its parts."""
    files = state["files"]
    return files.get("model.safetensors") or sha256(json.dumps(sorted(files.items())))


def write(folder, state, layers, about):
    """Write the calibration of a checkpoint. `layers`: name -> record; `about`: what it was made with. -> its path"""
    path = Path(folder) / FILE
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


def table(layers):
    """The lines of a table of the records."""
    lines = [f"{'layer':<32} {'largest':>9} {'99.99%':>9} {'scale to':>9} {'error':>8}"]
    for name, layer in layers.items():
        reach = layer["scale"] * float8.largest(float8.E4M3)  # what is larger saturates
        lines.append(f"{name:<32} {layer['largest']:9.3f} {layer['p99_99']:9.3f} {reach:9.3f} {layer['error']:8.1e}")
    return lines


def read(out_dir, state):
    """The calibration of a checkpoint, or None if it has none. Raises ValueError for one of other weights."""
    folder = folder_of(out_dir, state)
    if folder is None or not (folder / FILE).exists():
        return None
    path = folder / FILE
    mend = (f"python eval.py calibrate {shlex.quote(f'--out_dir={out_dir}')} makes it again; without the file, scales "
            "are dynamic")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}")
        scales = {name: float(layer["scale"]) for name, layer in found["layers"].items()}
        if not all(0 < scale < float("inf") for scale in scales.values()):
            raise ValueError("a scale is not a positive number")
        theirs = found["weights_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} cannot be read ({e}): {mend}") from None
    if theirs != weights_sha256(state):
        raise ValueError(f"{path} was made for other weights (sha256 {str(theirs)[:12]}...) than this checkpoint has "
                         f"({weights_sha256(state)[:12]}...): {mend}")
    return found


def static_scales(quantize, out_dir, state):
    """For convert: name of a layer -> its static scale, from the calibration beside the checkpoint; None without one,
    and if quantize is not fp8. Says on stderr which it is. Raises ValueError for a calibration of other weights."""
    if quantize != "fp8":
        return None
    found = read(out_dir, state)
    if found is None:
        print("fp8: dynamic scales, one a token; python eval.py calibrate makes static ones", file=sys.stderr)
        return None
    source = "noise, as a control" if found.get("noise") else found.get("dataset", "an unknown dataset")
    print(f"fp8: static scales of {len(found['layers'])} layers, calibrated on {source}", file=sys.stderr)
    return {name: layer["scale"] for name, layer in found["layers"].items()}
