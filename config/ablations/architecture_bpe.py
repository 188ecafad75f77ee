"""
Does what helps on characters also help on BPE tokens? The parts of config/ablations/architecture.py that matter most,
on Tiny Shakespeare in a byte-level BPE of 1,024 tokens, trained on its training split. The head is a larger share of
the model here, and the text has fewer tokens.

    python data/shakespeare_bpe/prepare.py
    python ablate.py config/ablations/architecture_bpe.py

It trains on as many tokens as that experiment, so it sees more of the text. config/ablations/learning_rate_bpe.py
finds the learning rates: for AdamW half the rate of characters, for the stack the same. Losses are per token: do not
compare them with losses per character.
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
