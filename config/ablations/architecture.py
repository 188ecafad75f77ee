"""
Which parts of a modern GPT earn their place? Each alone against GPT-2's architecture, and each taken away from the
whole stack, on characters of Tiny Shakespeare: the same tokens in the same order, the same schedule.

    python data/shakespeare_char/prepare.py
    python ablate.py config/ablations/architecture.py

config/ablations/learning_rate.py finds the learning rates of the base and of the stack. A variant has the rates of its
side, except that AdamW has the base's rate wherever it trains the matrices. SwiGLU's hidden layer is two thirds as
wide, so it has as many parameters as the others. Grouped and multi-query attention, a tied head and learned positions
change the number of parameters: the tables say by how much.
"""

base = "config/shakespeare_char_gpt2.py"
common = {"tokens_per_run": 1_024_000}
seeds = (1, 2, 3)

_muon = {"optimizer": "muon"}  # with the base's muon_learning_rate
_stack = {
    "pos": "rope", "norm": "rmsnorm_nogain", "norm_embed": True, "qk_norm": "rms", "activation": "relu2",
    "tie_weights": False, "bias": False, "zero_init": True, **_muon, "learning_rate": 2e-3,
}
_alone = {
    "rope": {"pos": "rope"},
    "rmsnorm": {"norm": "rmsnorm"},
    "rmsnorm_nogain": {"norm": "rmsnorm_nogain"},
    "norm_embed": {"norm_embed": True},
    "qk_norm": {"qk_norm": "rms"},
    "qk_norm_gain": {"qk_norm": "rms_gain"},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "untied": {"tie_weights": False},
    "no_bias": {"bias": False},
    "zero_init": {"zero_init": True},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "muon": _muon,
}
_away = {
    "learned_positions": {"pos": "learned"},
    "layernorm": {"norm": "layernorm"},
    "rmsnorm_gain": {"norm": "rmsnorm"},
    "no_norm_embed": {"norm_embed": False},
    "no_qk_norm": {"qk_norm": "none"},
    "gelu": {"activation": "gelu_tanh"},
    "swiglu": {"activation": "swiglu"},
    "tied": {"tie_weights": True},
    "bias": {"bias": True},
    "random_init": {"zero_init": False},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "adamw": {"optimizer": "adamw", "learning_rate": 4e-3},
}

variants = {
    "base": {},
    **_alone,
    "stack": _stack,
    **{f"stack_{name}": {**_stack, **change} for name, change in _away.items()},
}
against = {f"stack_{name}": "stack" for name in _away}
