# GPT-2's 124M parameters, from the Hub, go on with Tiny Shakespeare; first: python data/shakespeare/prepare.py
# The larger ones: --init_from=gpt2-medium, gpt2-large, gpt2-xl.
#     python train.py config/finetune_shakespeare.py
#     python sample.py --out_dir=out/finetune_shakespeare --ckpt=best --start="ROMEO:"
out_dir = "out/finetune_shakespeare"
dataset = "shakespeare"
init_from = "gpt2"

# nanoGPT's recipe: 1 x 1024 tokens in 32 micro-steps, at a constant learning rate from the first step on
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0

eval_interval = 5
eval_iters = 0          # the whole validation split: 36,059 tokens
log_interval = 1
always_save_checkpoint = False  # the latest and the best: 1.5 GB each
