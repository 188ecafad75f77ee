"""
An experiment's file: variants of one configuration, the seeds to run, and the hash of the code that trains them.

    base = "config/FILE.py"        what all runs have in common: a configuration of train.py
    common = {"n_layer": 4, ...}   keys that override it in all runs
    variants = {"base": {}, "rope": {"pos": "rope"}, ...}   keys that each variant changes
    against = {"stack_no_rope": "stack", ...}   what a variant is compared with; the others with the first one
    seeds = (1, 2, 3)

The budget of a run is its max_iters, or instead one of

    tokens_per_run                 tokens, a multiple of the tokens of a step
    flops_per_run                  training FLOPs, to the nearest step
"""

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from configurator import Key, fail, nearest, read_file
from files import sha256

ROOT = Path(__file__).resolve().parents[1]
INSTEAD = {"tokens_per_run": Key("tokens_per_run", "int", False, 0),  # of max_iters
           "flops_per_run": Key("flops_per_run", "float", False, 0.0)}
BUDGETS = ("max_iters", *INSTEAD)
OURS = ("seed", "out_dir", "init_from")  # keys of train.py that ablate.py sets for each run


class Experiment(NamedTuple):
    path: str
    base: str
    common: dict
    variants: dict
    against: dict  # variant -> the variant it is compared with, or None
    seeds: tuple


# -----------------------------------------------------------------------------
# Reading the file


def checked(overrides, where, keys):
    """Overrides of train.py's keys, in their types. Ends the run for an unknown key, or a key that ablate.py sets."""
    keys = {**keys, **INSTEAD}
    if not isinstance(overrides, dict) or not all(isinstance(name, str) for name in overrides):
        fail(f"{where} takes a dict from keys of train.py to values, not {overrides!r}")
    for name in overrides:
        if name not in keys:
            fail(f"{where}: unknown key {name}{nearest(name, keys)}")
        if name in OURS:
            fail(f"{where}: ablate.py sets {name} for each run")
    budgets = [name for name in BUDGETS if name in overrides]
    if len(budgets) > 1:
        fail(f"{where}: {' and '.join(budgets)} contradict each other; keep one of them")
    return {name: keys[name].check(value, where) for name, value in overrides.items()}


def checked_variants(variants, where, keys):
    if not isinstance(variants, dict) or not variants:
        fail(f"{where}: variants is a dict from names to the keys each changes, such as {{'base': {{}}, ...}}")
    for name in variants:
        if not isinstance(name, str) or not name.replace("-", "_").replace(".", "_").isidentifier():
            fail(f"{where}: {name!r} is no name for a variant, which is also the name of a folder")
    return {name: checked(changes, f"{where}: variant {name}", keys) for name, changes in variants.items()}


def checked_against(against, where):
    if not isinstance(against, dict):
        fail(f"{where}: against is a dict from a variant to the variant it is compared with")
    return against


def read_experiment(path, keys):
    """An experiment's file, checked; `keys` are train.py's. Ends the run naming the line that is wrong."""
    parts = {
        "base": Key("base", "str", False, ""),
        "seeds": Key("seeds", "tuple[int, ...]", False, (1, 2, 3)),
        "common": SimpleNamespace(check=lambda value, where: checked(value, f"{where}: common", keys)),
        "variants": SimpleNamespace(check=lambda value, where: checked_variants(value, where, keys)),
        "against": SimpleNamespace(check=checked_against),
    }
    values = read_file(path, parts)
    for name in ("base", "variants", "seeds"):
        if not values.get(name):
            fail(f"{path} binds no {name}")
    if len(set(values["seeds"])) < len(values["seeds"]):
        fail(f"{path}: seeds has one twice")

    names = list(values["variants"])
    against = {name: names[0] for name in names}
    against[names[0]] = None
    against |= values.get("against", {})
    for pair in against.items():
        for name in pair:
            if name is not None and name not in names:
                fail(f"{path}: against names {name!r}, which is no variant{nearest(str(name), names)}")
    base = str(ROOT / values["base"])  # an absolute path stays as it is
    return Experiment(path, base, values.get("common", {}), values["variants"], against, values["seeds"])


def question(path):
    """The first paragraph of an experiment's docstring, on one line."""
    text = ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def steps_of(settings, config, flops_per_token, where):
    """The updates of a run under its budget. Ends the run where the budget is no whole number of steps."""
    tokens_per_step = config["tokens_per_step"]
    if not tokens_per_step:
        micro_steps = config["gradient_accumulation_steps"] or 1
        tokens_per_step = config["batch_size"] * config["block_size"] * micro_steps
    if tokens := settings.get("tokens_per_run"):
        if tokens_per_step < 1 or tokens % tokens_per_step:
            fail(f"{where}: tokens_per_run={tokens} is not a multiple of the {tokens_per_step} tokens of a step")
        return tokens // tokens_per_step
    if flops := settings.get("flops_per_run"):
        if not flops_per_token:
            fail(f"{where}: flops_per_run needs context_start=0: otherwise a token's FLOPs change during the run")
        return max(1, round(flops / (flops_per_token * tokens_per_step)))
    return config["max_iters"]


# -----------------------------------------------------------------------------
# The code


def code_sha256(root=ROOT, script="train"):
    """The identity of the code that trains: sha256 over the script and all files of ours that it imports, at any depth.

    Line ends do not count.
    """
    sources = {}
    modules = [script]
    while modules:
        module = modules.pop()
        path = Path(root, *module.split(".")).with_suffix(".py")
        if module in sources or not path.is_file():
            continue
        sources[module] = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(sources[module])):
            if isinstance(node, ast.Import):
                modules += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                # both `from training import guard` and `from training.guard import Guard` name training/guard.py
                modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sha256(json.dumps(sources, sort_keys=True))
