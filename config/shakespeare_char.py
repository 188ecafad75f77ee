# The headline: past what nanoGPT reaches on an A100 (validation loss 1.4697), on two CPU cores in five minutes,
# where they multiply bfloat16 in hardware; docs/measured.md has what float32 takes.
#     python data/shakespeare_char/prepare.py
#     python train.py config/shakespeare_char.py
#     python sample.py --out_dir=out/shakespeare_char
from config.stack import *  # the architecture, and Muon

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
block_size = 256
batch_size = 12
max_iters = 1250
context_start = 64      # short context first: quicker, and it teaches as much
context_iters = 750

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

eval_interval = 500
eval_iters = 0          # the whole validation split
log_interval = 10
sample_tokens = 200
device = "cpu"
