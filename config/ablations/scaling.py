"""
How does the loss fall with compute, and which size is best for a given budget? Five sizes of the stack, each trained
with three budgets of FLOPs to the end of its schedule (isoFLOP curves, Hoffmann et al. 2022, arXiv:2203.15556, section
3.2). A size that is large for its budget sees only part of the text, and a small one sees the text several times.

    python data/shakespeare_char/prepare.py
    python ablate.py config/ablations/scaling.py

The learning rates are the stack's at four layers of 128. A head has 32 channels at every size.
"""

from config.ablations.architecture import _stack

base = "config/shakespeare_char_gpt2.py"
common = {**_stack, "eval_interval": 500}
seeds = (1, 2, 3)

_sizes = {  # the others are compared with the first
    "w128": {"n_layer": 3, "n_head": 4, "n_embd": 128},
    "w64": {"n_layer": 2, "n_head": 2, "n_embd": 64},
    "w96": {"n_layer": 2, "n_head": 3, "n_embd": 96},
    "w160": {"n_layer": 4, "n_head": 5, "n_embd": 160},
    "w192": {"n_layer": 4, "n_head": 6, "n_embd": 192},
}
_budgets = {"1.5e12": 1.5e12, "3e12": 3e12, "6e12": 6e12}

variants = {f"{size}_{budget}": {**_sizes[size], "flops_per_run": _budgets[budget]}
            for budget in _budgets for size in _sizes}
against = {f"{size}_{budget}": f"w128_{budget}" if size != "w128" else None for budget in _budgets for size in _sizes}
