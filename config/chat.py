# From a base model of GPT-2's class to one that chats, on SmolTalk (Allal et al. 2025, arXiv:2502.02737) from the Hub:
# some 400 million tokens, once. For GPUs; its time and loss have not been measured.
#     python data/chat/prepare.py --hub=HuggingFaceTB/smol-smoltalk --tokenizer=out/owt_124m --out_dir=data/smoltalk
#     torchrun --standalone --nproc_per_node=8 train.py config/chat.py
#     python chat.py --out_dir=out/chat
out_dir = "out/chat"
dataset = "smoltalk"
init_from = "auto:out/owt_124m"

batch_size = 16
tokens_per_step = 262144
max_iters = 1500

learning_rate = 3e-4
min_lr = 0.0
weight_decay = 0.0
warmup_iters = 50
lr_schedule = "linear"

eval_interval = 250
eval_iters = 100
