# GPT-2 medium (355M parameters) on OpenWebText, for GPUs. This run has not been made yet:
# see first what memory and time it needs.
#     python data/openwebtext/prepare.py
#     python plan.py config/owt_355m.py --gpu=h100 --gpus=8
#     torchrun --nproc_per_node=8 train.py config/owt_355m.py
out_dir = "out/owt_355m"
dataset = "openwebtext"

# as in owt_124m.py, about half a million tokens per update, in smaller micro-steps
batch_size = 8
block_size = 1024
tokens_per_step = 491_520
max_iters = 600_000
lr_decay_iters = 600_000

n_layer = 24
n_head = 16
n_embd = 1024

learning_rate = 3e-4    # GPT-3's for this size (Brown et al. 2020, arXiv:2005.14165, table 2.1)
min_lr = 3e-5
warmup_iters = 2000
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200
log_interval = 10
