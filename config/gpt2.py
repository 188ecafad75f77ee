# GPT-2's architecture, which is the default but for its biases: what docs/report.md compares with.
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
