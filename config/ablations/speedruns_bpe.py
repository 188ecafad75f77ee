"""
Does what config/ablations/speedruns.py asks of characters hold for BPE tokens? Tiny Shakespeare in a byte-level BPE of
1,024 tokens.

    python data/shakespeare_bpe/prepare.py
    python ablate.py config/ablations/speedruns_bpe.py

Losses are per token: do not compare them with losses per character.
"""

from config.ablations.architecture import _stack
from config.ablations.speedruns import _even_rows, _init

base = "config/shakespeare_char_gpt2.py"
common = {**_stack, "dataset": "shakespeare_bpe", "tokens_per_run": 1_024_000}
seeds = (1, 2, 3)

variants = {"stack": {}, "even_rows": _even_rows, "init": _init, "both": {**_even_rows, **_init}}
