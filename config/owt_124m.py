# GPT-2's smallest (124M parameters) on OpenWebText, for GPUs. This run has not been made yet:
# see first what memory and time it needs.
#     python data/openwebtext/prepare.py
#     python plan.py config/owt_124m.py --gpu=h100 --gpus=8
#     torchrun --nproc_per_node=8 train.py config/owt_124m.py
out_dir = "out/owt_124m"
dataset = "openwebtext"

# nanoGPT's train_gpt2.py: 12 x 1024 tokens in 40 micro-steps, about half a million tokens per update
batch_size = 12
block_size = 1024
tokens_per_step = 491_520
max_iters = 600_000
lr_decay_iters = 600_000

n_layer = 12
n_head = 12
n_embd = 768

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200
log_interval = 10
