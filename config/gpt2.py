# GPT-2's architecture, to put over any configuration: docs/report.md compares the stack with it. It is the default,
# except for the biases.
#     python train.py config/owt_124m.py config/gpt2.py
pos = "learned"
norm = "layernorm"
norm_embed = False
qk_norm = "none"
activation = "gelu_tanh"
tie_weights = True
bias = True
zero_init = False

optimizer = "adamw"
