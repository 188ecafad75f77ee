"""
Does the stack keep its lead in the largest model that two CPU cores can train in half an hour? GPT-2's architecture,
the stack, and the stack with multi-query attention, one after another with both cores, on the same three million
tokens. The model has nanoGPT's size for this text (six layers of 384, a context of 256).

    python data/shakespeare_char/prepare.py
    python ablate.py config/ablations/pilot.py --keep_weights
    python bench.py infer --prompts=16,200 --models=base_seed1,stack_seed1,stack_mqa_seed1  # in out/ablations/pilot

With one seed nothing says by how much another seed would have moved a difference. Learning rates come from
config/ablations/learning_rate.py at a width of 128. AdamW's rate for matrices, which are three times as wide here, is
divided by three (Yang et al. 2022, arXiv:2203.03466). That concerns the base; in the stack Muon has the matrices.
"""

from config.ablations.architecture import _stack

base = "config/shakespeare_char_gpt2.py"
common = {
    "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "max_iters": 800, "threads": 2,
    "learning_rate": 1.33e-3, "eval_interval": 100, "eval_iters": 8,
}
seeds = (1,)

_stack = {**_stack, "learning_rate": 2e-3}
variants = {"base": {}, "stack": _stack, "stack_mqa": {**_stack, "n_kv_head": 1}}
against = {"stack_mqa": "stack"}
