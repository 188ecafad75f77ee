# Tiny Shakespeare, characters, on two CPU cores: the lowest loss found within twelve minutes. Validation loss 1.3789
# after 8.3 minutes of training in bfloat16 (docs/results/shakespeare_char_12min.txt).
#     python data/shakespeare_char/prepare.py
#     python train.py config/shakespeare_char_12min.py
#     python sample.py --out_dir=out/shakespeare_char_12min
from config.stack import *  # the architecture, and Muon

out_dir = "out/shakespeare_char_12min"
dataset = "shakespeare_char"
block_size = 256
batch_size = 12
max_iters = 2600
context_start = 64      # begin with a short context: it is quicker, and the model learns as much
context_iters = 1560

n_layer = 4
n_head = 4
n_embd = 256

muon_learning_rate = 0.03
muon_momentum = 0.9
learning_rate = 4e-3
min_lr = 0.0
weight_decay = 0.1
grad_clip = 0.0
warmup_iters = 20
lr_schedule = "wsd"
wsd_decay_frac = 0.6

eval_interval = 650
eval_iters = 0          # the whole validation split
log_interval = 10
sample_tokens = 200
device = "cpu"
