# Tiny Shakespeare, characters, on two CPU cores: validation loss 1.4624 after 89 seconds of training, where the CPU
# multiplies bfloat16 in hardware (docs/results/shakespeare_char.txt). nanoGPT's README reports 1.4697, trained on an
# A100.
#     python data/shakespeare_char/prepare.py
#     python train.py config/shakespeare_char.py
#     python sample.py --out_dir=out/shakespeare_char
from config.stack import *  # the architecture, and Muon

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
block_size = 256
batch_size = 12
max_iters = 720
context_start = 64      # begin with a short context: it is quicker, and the model learns as much
context_iters = 432

n_layer = 4
n_head = 3
n_embd = 192

muon_learning_rate = 0.03
muon_momentum = 0.9
learning_rate = 4e-3
min_lr = 0.0
weight_decay = 0.0
grad_clip = 0.0
warmup_iters = 20
lr_schedule = "wsd"
wsd_decay_frac = 0.6

eval_interval = 360
eval_iters = 0          # the whole validation split
log_interval = 10
sample_tokens = 200
device = "cpu"
