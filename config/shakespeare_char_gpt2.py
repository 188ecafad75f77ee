# GPT-2's architecture on Tiny Shakespeare, characters, on one CPU core: the baseline of the ablations, each of which
# changes one thing of it (config/ablations/). Validation loss 1.9293 after 42 seconds of training in bfloat16
# (variant "base" in docs/results/architecture.jsonl).
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

learning_rate = 4e-3    # the best that config/ablations/learning_rate.py finds
min_lr = 0.0
beta2 = 0.99
warmup_iters = 20
lr_schedule = "wsd"
wsd_decay_frac = 0.6

muon_learning_rate = 0.015  # with optimizer = "muon": the best that it finds for the stack
muon_momentum = 0.9
muon_dtype = "auto"

eval_interval = 100
eval_iters = 2
log_interval = 10
always_save_checkpoint = False
device = "cpu"
threads = 1
