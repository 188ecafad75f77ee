"""
Do the parts that lowered the loss of the CPU record (docs/log.md, 2026-11-28) help a larger model on more tokens? The
stack of config/ablations/architecture.py, with even rows of Muon's updates, with larger first weights, and with both;
and both with a soft-cap. Muon orthogonalises queries, keys and values apart in all of them.

    python data/shakespeare_char/prepare.py
    python ablate.py config/ablations/speedruns.py

Learning rates are the stack's.
"""

from config.ablations.architecture import _stack

base = "config/shakespeare_char_gpt2.py"
common = {**_stack, "tokens_per_run": 1_024_000}
seeds = (1, 2, 3)

_even_rows = {"muon_even_rows": True}
_init = {"init_std": 0.0}

variants = {
    "stack": {},
    "even_rows": _even_rows,
    "init": _init,
    "both": {**_even_rows, **_init},
    "both_softcap": {**_even_rows, **_init, "logit_softcap": 15.0},
}
