# Talk with Shakespeare's people: the model of ./run_all.sh demo, fine-tuned on the speeches of Tiny Shakespeare as
# talks. ./run_all.sh chat does all of this.
#     python train.py config/shakespeare_char_demo.py
#     python data/shakespeare_chat/prepare.py
#     python train.py config/chat_shakespeare.py
#     python chat.py --out_dir=out/chat_shakespeare --system=ROMEO
out_dir = "out/chat_shakespeare"
dataset = "shakespeare_chat"
init_from = "auto:out/shakespeare_char_demo"

batch_size = 16
max_iters = 300

optimizer = "muon"
muon_learning_rate = 0.01
muon_momentum = 0.9
learning_rate = 1e-3
min_lr = 0.0
weight_decay = 0.0
grad_clip = 0.0
warmup_iters = 10
lr_schedule = "linear"

eval_interval = 100
eval_iters = 0          # the whole validation split
log_interval = 10
device = "cpu"
