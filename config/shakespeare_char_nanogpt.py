# nanoGPT's README recipe for a CPU, in these keys, on two CPU cores: the other configurations are compared with it.
# Validation loss 1.9082 after 64 seconds of training in float32 (docs/results/shakespeare_char_nanogpt.txt).
#     python train.py config/shakespeare_char_nanogpt.py
out_dir = "out/shakespeare_char_nanogpt"
dataset = "shakespeare_char"
block_size = 64
batch_size = 12
max_iters = 2000

n_layer = 4
n_head = 4
n_embd = 128
activation = "gelu"     # in the erf form, as in nanoGPT

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

eval_interval = 250
eval_iters = 0          # the whole validation split
log_interval = 10
always_save_checkpoint = False
device = "cpu"
dtype = "float32"
