"""
Are the learning rates found on characters too high for the tokens of a trained BPE? These and lower rates for GPT-2's
architecture, these and both neighbours for the stack, in steps of two as in config/ablations/learning_rate.py.

    python data/shakespeare_bpe/prepare.py
    python ablate.py config/ablations/learning_rate_bpe.py
"""

from config.ablations.architecture import _stack

base = "config/shakespeare_char_gpt2.py"
common = {"dataset": "shakespeare_bpe", "tokens_per_run": 1_024_000}
seeds = (1, 2, 3)

variants = {
    "base_x1": {}, "base_x0.5": {"learning_rate": 2e-3}, "base_x0.25": {"learning_rate": 1e-3},
    "stack_x1": _stack, "stack_x2": {**_stack, "learning_rate": 4e-3, "muon_learning_rate": 0.03},
    "stack_x0.5": {**_stack, "learning_rate": 1e-3, "muon_learning_rate": 0.0075},
}
against = {"stack_x1": None, "stack_x2": "stack_x1", "stack_x0.5": "stack_x1"}
