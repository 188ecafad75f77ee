# Fine-tune a real chat model on two CPU cores: SmolLM2-135M-Instruct on the conversations of data/chatterbot, for which
# another --dataset= of data/chat/prepare.py can stand. Two times through the data.
#     python data/smollm2/fetch.py
#     python data/chatterbot/prepare.py
#     python train.py config/chat_smollm2.py
#     python chat.py --out_dir=out/chat_smollm2
out_dir = "out/chat_smollm2"
dataset = "chatterbot"
init_from = "auto:out/smollm2"

batch_size = 4
gradient_accumulation_steps = 2
max_iters = 50

learning_rate = 2e-4
min_lr = 0.0
weight_decay = 0.0
warmup_iters = 5
lr_schedule = "linear"

eval_interval = 25
eval_iters = 0          # the whole validation split
log_interval = 5
always_save_checkpoint = False  # keep only the latest and the best: 1.6 GB each
