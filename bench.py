"""
Benchmarks: what a user would run, timed. Each prints a table and, as its last line, one JSON object.

    python bench.py train --config=config/shakespeare_char_cpu.py --seeds=1,2,3
    python bench.py scaling --config=config/shakespeare_char.py --batches=1,4,8 --lengths=64,256 --worlds=1,2
    python bench.py scaling --config=config/owt_124m.py --batches=1,4,8 --lengths=1024 --worlds=1,2,4,8 \\
        --overrides=device=cuda,compile=true    # the same on GPUs
    python bench.py monitor --config=config/shakespeare_char_cpu.py
    python bench.py data --input=documents.jsonl.gz     # any file that data/openwebtext/prepare.py reads
    python bench.py loader --config=config/shakespeare_char_cpu.py
    python bench.py infer --forms=float32,int8 --batches=1,16
    python bench.py infer --models=out/a,out/b          # checkpoints instead of GPT-2's size
    python bench.py turns --models=out/smollm2 --prompts=200,800 --forms=float32,bfloat16
    python bench.py sft --models=out/smollm2 --dataset=chatterbot --tokens=2048 --forms=float32,bfloat16
    python bench.py activations
    python bench.py zero --worlds=1,2 --shape=12,12,768 --tokens=256
    python bench.py step --peer_nanogpt=FOLDER      # an update of GPT-2's 124M beside nanoGPT's, in a checkout
    python bench.py step --config=config/shakespeare_char_cpu.py --forms=bfloat16
    python bench.py gpu
    python bench.py serve --models=out/chat_shakespeare     # a model behind HTTP, under load
    python bench.py serve --models=out/smollm2 --parts=closed,peers --peer_llama=PYTHON

This file holds the settings and the verbs. What a benchmark measures, and how, stands at the top of its file:
benchmarks/training.py (train, scaling, monitor), data.py (data, loader), inference.py (infer), chat.py (turns, sft),
memory.py (activations, zero), step.py (step), gpu.py (gpu) and serving.py (serve).
"""

import json
import sys
from pathlib import Path

from benchmarks.chat import bench_sft, bench_turns
from benchmarks.data import bench_data, bench_loader
from benchmarks.gpu import bench_gpu
from benchmarks.inference import bench_infer
from benchmarks.memory import bench_activations, bench_zero
from benchmarks.serving import bench_serve
from benchmarks.step import bench_step
from benchmarks.training import bench_monitor, bench_scaling, bench_train
from configurator import Settings, configure, fail
from device import DTYPES, pick_device
from inference.quantize import FORMS
from model import GPTConfig

# -----------------------------------------------------------------------------
what = "train"              # train | scaling | data | loader | infer | turns | sft | activations | zero | monitor
                            # | step | gpu | serve
out_dir = "out/bench"       # where the run folders go; remove those of an earlier benchmark first

# train, scaling, loader, monitor and step
config = "config/shakespeare_char_cpu.py"  # the run to time
seeds = (1, 2, 3)           # train: one run each
processes = 1               # train: ranks of each run; more than one start under torchrun
overrides: tuple[str, ...] = ()  # more keys of train.py, such as --overrides=max_iters=100,device=cuda
reads = 2000                # loader: batches read in each round

# scaling, which also reads batches (below) as sizes of a micro-batch
lengths = (64, 256)         # tokens of context
worlds = (1, 2)             # scaling, zero: numbers of processes
warm_up = 3                 # scaling, sft, step, gpu: untimed updates at the start of each run
updates = 10                # scaling, sft, step, gpu: timed updates after them; step: in each round

# data
input = ""                  # a file of documents; the corpora are made of its lines
english = True              # use only documents that are at least 99 % ASCII, as OpenWebText's are
sizes = (50, 150, 500)      # megabytes of text in each corpus; speed is measured on the second
workers = (1, 2)            # numbers of processes
rounds = 3                  # scaling, data, loader, infer, turns, sft, monitor, step: times each is measured, in turns

# infer; turns and sft, which also read forms and models; step, which takes the first two forms
forms = ("float32", "bfloat16", "int8", "int4")  # forms of the weights: a dtype, or one of sample.py's quantize
compiled = (False, True)    # infer: the step of a token as it is, and compiled
kv_heads = (12,)            # key and value heads of 12; 1 is multi-query attention
models: tuple[str, ...] = ()  # measure only these run folders instead of GPT-2's size
batches = (1, 4, 8, 16)     # requests at once; scaling: sequences in a micro-batch
prompts = (16, 512)         # tokens of each prompt; turns: of the talk before the second message
new_tokens = 24             # tokens drawn after the first
peers = True                # also the plain way without a cache, transformers where installed, llama.cpp (peer_llama)
crowd = 32                  # requests of mixed lengths, all at once and one after another; 0: none
device = "auto"             # infer, activations, zero, step, gpu, serve: auto | cpu | cuda | cuda:N | mps

dataset = "chatterbot"      # sft: the conversations

# activations, zero: fp32 steps on one sequence
shape = (24, 16, 1024)      # layers, heads and width; these are GPT-2's 355M
tokens = 1024               # tokens of the sequence; gpu: of each sequence; sft: of an update

# step
step_model = "124m"         # 124m (GPT-2's, on 4 x 256 tokens) | config (what --config says; the default if you set it)
peer_nanogpt = ""           # a checkout of nanoGPT (https://github.com/karpathy/nanoGPT) to run beside

# gpu: bfloat16 steps
gpu_models = ("124m", "355m")  # 124m | 355m | 774m | tiny; every variation is of the first
gpu_batches = (16, 64, 128)  # sequences of a step for 124m (fewer for a larger model); the middle one is the base
gpu_pieces = (33554432, 67108864, 134217728, 268435456)  # logits that the fused loss holds at once

# serve, which also reads models (one), rounds, crowd (calls of a round, at least), device, and overrides of serve.py
parts = ("closed", "idle", "load", "overload", "mixed", "aborts", "kill", "peers")  # what to measure
dtype = "float32"           # of the weights: float32 | bfloat16
max_requests = 16           # answers that are generated at once
clients = (1, 4, 16, 64)    # closed, peers: clients that each wait for their answer
prompt_lengths = (8, 64)    # tokens of a prompt: fewest and most
answer_lengths = (16, 64)   # tokens of an answer: fewest and most
seconds = 20.0              # load, overload: in which calls arrive
requests = 10000            # mixed: calls
aborts = 1000               # aborts: calls
peer_llama = ""             # infer, peers: the Python in which llama-cpp-python[server] is installed
peer_transformers = ""      # peers: the Python in which transformers[serving] and accelerate are installed
# -----------------------------------------------------------------------------

VERBS = {
    "train": bench_train,
    "scaling": bench_scaling,
    "data": bench_data,
    "loader": bench_loader,
    "infer": bench_infer,
    "turns": bench_turns,
    "sft": bench_sft,
    "activations": bench_activations,
    "zero": bench_zero,
    "monitor": bench_monitor,
    "step": bench_step,
    "gpu": bench_gpu,
    "serve": bench_serve,
}
PATHS = ("input", "peer_nanogpt", "peer_llama", "peer_transformers")  # keys that name a file or a folder


def check_settings(c):
    """End for a setting that makes no sense. A benchmark checks the settings that only it reads."""
    if c.what in ("train", "scaling", "loader", "monitor") and not Path(c.config).exists():
        fail(f"no config file {c.config}")
    unknown = [form for form in c.forms if form not in (*DTYPES, *FORMS)]
    if unknown:
        fail(f"--forms={','.join(unknown)}: it takes {', '.join((*DTYPES, *FORMS))}")
    if c.dtype not in DTYPES:
        fail(f"--dtype={c.dtype}: it takes {', '.join(DTYPES)}")
    if len(c.shape) != 3:
        fail("--shape takes three numbers: layers, heads and width")
    try:
        if c.what in ("infer", "activations", "zero", "step", "gpu", "serve"):
            pick_device(c.device)
        for heads in c.kv_heads:
            GPTConfig(n_kv_head=heads)
        n_layer, n_head, n_embd = c.shape
        GPTConfig(block_size=c.tokens, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    except ValueError as error:
        fail(error)


def main(c):
    """-> the exit code: 1 where a benchmark names what failed"""
    check_settings(c)
    figures = VERBS[c.what](c)
    # names without their folders, which are nobody else's business
    names = {key: Path(c[key]).name for key in PATHS}
    published = c.changed(**names)
    print(json.dumps({"benchmark": c.what, "settings": dict(published), **figures}))
    return 1 if figures.get("failed") else 0


if __name__ == "__main__":
    given = set()  # names of the keys that the user set
    c = Settings(configure(globals(), verb="what", verbs=tuple(VERBS), given=given))
    if c.what == "step" and "config" in given and "step_model" not in given:
        c = c.changed(step_model="config")
    sys.exit(main(c))
