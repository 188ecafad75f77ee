"""
Do even rows of Muon's updates and larger first weights help ten million parameters on three million tokens as well, and
what does the recipe of the short records add? The stack of config/ablations/pilot.py with both; and with the headline's
recipe too (a context that grows from 64 to 256, higher learning rates).

    python data/shakespeare_char/prepare.py
    python ablate.py config/ablations/speedruns_pilot.py

One seed says nothing about the noise; docs/results/pilot.jsonl has the stack before.
"""

from config.ablations.pilot import _stack, common  # noqa: F401  ablate.py reads common
from config.ablations.speedruns import _even_rows, _init

base = "config/shakespeare_char_gpt2.py"
seeds = (1,)

_both = {**_stack, **_even_rows, **_init}
_recipe = {**_both, "context_start": 64, "context_iters": 480, "muon_learning_rate": 0.03, "learning_rate": 4e-3}
variants = {"stack_speedruns": _both, "stack_speedruns_recipe": _recipe}
