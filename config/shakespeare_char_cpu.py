# Tiny Shakespeare, characters, on two CPU cores in seconds: validation loss 1.8555 after 4.0 seconds of training in
# bfloat16 (docs/results/shakespeare_char_cpu.txt), 6.4 seconds in float32 (shakespeare_char_cpu_float32.txt there).
# nanoGPT's recipe for a CPU ends at 1.8857 after 2,000 steps, more than a minute (docs/results/nanogpt.log).
#     python data/shakespeare_char/prepare.py
#     python train.py config/shakespeare_char_cpu.py
from config.stack import *  # the architecture, and Muon

out_dir = "out/shakespeare_char_cpu"
dataset = "shakespeare_char"
block_size = 64
batch_size = 16
max_iters = 180
context_start = 32
context_iters = 72

n_layer = 2
n_head = 2
n_embd = 128

muon_learning_rate = 0.06
muon_momentum = 0.8
learning_rate = 1.2e-2
min_lr = 0.0
weight_decay = 0.0
grad_clip = 0.0
warmup_iters = 10
lr_schedule = "wsd"
wsd_decay_frac = 0.6

eval_interval = 180
eval_iters = 0
log_interval = 10
device = "cpu"
