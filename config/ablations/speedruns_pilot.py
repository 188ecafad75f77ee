"""
Do even rows of Muon's updates and larger first weights help ten million parameters on three million tokens as well? The
stack of config/ablations/pilot.py with both.

    python data/shakespeare_char/prepare.py
    python ablate.py config/ablations/speedruns_pilot.py

One seed says nothing about the noise; docs/results/pilot.jsonl has the stack before.
"""

from config.ablations.pilot import _stack, common  # noqa: F401  ablate.py reads common
from config.ablations.speedruns import _even_rows, _init

base = "config/shakespeare_char_gpt2.py"
seeds = (1,)

variants = {"stack_speedruns": {**_stack, **_even_rows, **_init}}
