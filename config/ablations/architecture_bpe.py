"""
Does what helps on characters help on tokens, too? The parts of config/ablations/architecture.py that most is
asked of, on Tiny Shakespeare in a byte-level BPE of 1,024 tokens, trained on its training part, where the head is a
larger share of the model and a text is shorter.

    python data/shakespeare_bpe/prepare.py
    python ablate.py config/ablations/architecture_bpe.py

The same number of tokens as there, which see more of the text. Learning rates are those that
config/ablations/learning_rate_bpe.py finds: for AdamW half of what they are on characters, for the stack the same.
Losses are per token: not to be compared with those of characters.
"""

from config.ablations.architecture import _alone, _away, _stack

base = "config/shakespeare_char_gpt2.py"
common = {"dataset": "shakespeare_bpe", "tokens_per_run": 1_024_000, "learning_rate": 2e-3}
seeds = (1, 2, 3)

_alone = {name: _alone[name] for name in ("rope", "untied", "mqa", "muon")}
_away = {name: _away[name] for name in ("learned_positions", "tied", "mqa", "adamw")}
_away["adamw"] = {**_away["adamw"], "learning_rate": 2e-3}

variants = {
    "base": {},
    **_alone,
    "stack": _stack,
    **{f"stack_{name}": {**_stack, **change} for name, change in _away.items()},
}
against = {f"stack_{name}": "stack" for name in _away}
