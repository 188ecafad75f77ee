# GPT-2's architecture at the size of the ablations: what config/ablations/ changes one thing of at a time.
#     python data/shakespeare_char/prepare.py
#     python train.py config/shakespeare_char_gpt2.py
out_dir = "out/shakespeare_char_gpt2"
dataset = "shakespeare_char"
block_size = 128
batch_size = 8
max_iters = 1000

n_layer = 4
n_head = 4
n_embd = 128
bias = True             # the rest of GPT-2's architecture is the default

learning_rate = 4e-3    # what config/ablations/learning_rate.py finds for it
min_lr = 0.0
beta2 = 0.99
warmup_iters = 20
lr_schedule = "wsd"
wsd_decay_frac = 0.6

muon_learning_rate = 0.015  # where optimizer is "muon"; what it finds for the stack
muon_momentum = 0.9
muon_dtype = "auto"

eval_interval = 100
eval_iters = 2
log_interval = 10
always_save_checkpoint = False
device = "cpu"
threads = 1
