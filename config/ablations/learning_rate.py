"""
Which learning rate for GPT-2's architecture, and which for the stack? The same sweep for both: all learning rates of a
side, times a factor from 1/4 to 4 in steps of two, judged by the loss after as many tokens as the other experiments
have. If the best rate is at an end of the sweep, extend the sweep.

    python data/shakespeare_char/prepare.py
    python ablate.py config/ablations/learning_rate.py
"""

from config.ablations.architecture import _stack

base = "config/shakespeare_char_gpt2.py"
common = {"tokens_per_run": 1_024_000}
seeds = (1, 2, 3)

_factors = {"x1": 1, "x0.25": 1 / 4, "x0.5": 1 / 2, "x2": 2, "x4": 4}

variants = {
    **{f"base_{name}": {"learning_rate": 2e-3 * factor} for name, factor in _factors.items()},
    **{f"stack_{name}": {**_stack, "learning_rate": 4e-3 * factor, "muon_learning_rate": 0.03 * factor}
       for name, factor in _factors.items()},
}
against = {f"stack_{name}": "stack_x1" for name in _factors if name != "x1"} | {"stack_x1": None}
