# Puzzles with checkable answers (sums, spelling, counting letters, reversing, copying), from scratch, in characters:
# does the whole way from conversations to answers teach? Held-out puzzles are others by construction
# (inference/puzzles.py).
#     python data/puzzles/prepare.py
#     python train.py config/puzzles.py
#     python eval.py chat --out_dir=out/puzzles --task=puzzles
from config.stack import *  # the architecture, and Muon

out_dir = "out/puzzles"
dataset = "puzzles"

batch_size = 32
max_iters = 2400

n_layer = 4
n_head = 4
n_embd = 128

muon_learning_rate = 0.02
muon_momentum = 0.9
learning_rate = 3e-3
min_lr = 0.0
weight_decay = 0.0
grad_clip = 0.0
warmup_iters = 20
lr_schedule = "linear"

eval_interval = 600
eval_iters = 0          # the whole validation split
log_interval = 20
device = "cpu"
