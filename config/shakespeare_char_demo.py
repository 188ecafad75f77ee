# Tiny Shakespeare, characters, on two CPU cores: what ./run_all.sh demo trains. About a minute and a half, to a
# validation loss below 1.60.
#     python data/shakespeare_char/prepare.py
#     python train.py config/shakespeare_char_demo.py
#     python sample.py --out_dir=out/shakespeare_char_demo
from config.stack import *  # the architecture, and Muon

out_dir = "out/shakespeare_char_demo"
dataset = "shakespeare_char"
block_size = 256
batch_size = 12
max_iters = 800
context_start = 64      # begin with a short context: it is quicker, and the model learns as much
context_iters = 480

n_layer = 4
n_head = 2
n_embd = 128

muon_learning_rate = 0.03
muon_momentum = 0.9
learning_rate = 4e-3
min_lr = 0.0
weight_decay = 0.0
grad_clip = 0.0
warmup_iters = 20
lr_schedule = "wsd"
wsd_decay_frac = 0.6

eval_interval = 200
eval_iters = 0          # the whole validation split
log_interval = 10
sample_tokens = 200
device = "cpu"
