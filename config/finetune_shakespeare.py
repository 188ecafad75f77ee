# Finetune GPT-2 (124M parameters, from the Hugging Face Hub) on Tiny Shakespeare in GPT-2's tokens: 20 updates, for a
# GPU; its time and loss have not been measured. Larger models: --init_from=gpt2-medium, gpt2-large, gpt2-xl.
#     python data/shakespeare/prepare.py
#     python train.py config/finetune_shakespeare.py
#     python sample.py --out_dir=out/finetune_shakespeare --ckpt=best --start="ROMEO:"
out_dir = "out/finetune_shakespeare"
dataset = "shakespeare"
init_from = "gpt2"

# nanoGPT's recipe: 1 x 1024 tokens in 32 micro-steps, at a constant learning rate from the first step
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0

eval_interval = 5
eval_iters = 0          # the whole validation split: 36,059 tokens
log_interval = 1
always_save_checkpoint = False  # keep only the latest and the best: 1.5 GB each
