"""
Train a GPT, or go on with one: the whole procedure, top to bottom.

    python train.py config/shakespeare_char_cpu.py
    python train.py config/shakespeare_char.py --out_dir=out/mine --learning_rate=3e-3
    torchrun --standalone --nproc_per_node=4 train.py config/owt_124m.py --zero_stage=1

What happens at step s follows from (config, seed, s), so a run that was killed and continued with
--init_from=resume ends with the same bits as one that was not, and one that went back from a bad step
(training/guard.py) with those of a run that was told to leave its batch out. Many processes share the same steps
(parallel.py): each sees some of a step's micro-batches, one writes.
"""

import gc
import math
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial

import torch

import checkpoint
import parallel
import plan
from configurator import configure, fail, nearest, read_keys
from dataset import DataError, open_datasets, open_tokens, verify_shards
from device import (
    SDPA,
    allocate_in_segments,
    autocast,
    can_compile,
    compile_one,
    free_memory,
    memory_is_full,
    pick_device,
    pick_dtype,
    sdpa_kernel_of,
    use_sdpa,
    use_tf32,
    what_failed,
)
from device import peak_flops as peak_of
from eval import evaluate
from files import FolderLock
from infer import stream
from loader import Loader, context_length, data_step, fixed_batches, keyed
from model import GPT, GPTConfig, pick_attention
from optim import Optimizers, lr_at
from tokenizer import load_tokenizer, meta_vocab_size
from training.guard import ACTIONS, Guard, Watch, keep_skipped, parse_steps, read_skipped
from training.monitor import (
    Hardware,
    Pace,
    Profiler,
    Run,
    StepTimer,
    clear_bar,
    clock_face,
    environment,
    evaluation_line,
    plain,
    show,
)
from training.pretrained import read_model
from training.probe import Update, attention
from training.track import TRACKERS, Tracker

# -----------------------------------------------------------------------------
# the run
out_dir = "out"               # where config, metrics and checkpoints go
init_from = "scratch"         # scratch | resume | auto (resume if there is something to) | a model to start from: a
                              # run's folder, nanoGPT's ckpt.pt, a Hugging Face folder, a name of the Hub's (gpt2)
seed = 1337                   # of initialisation, data order and dropout
max_iters = 600000            # updates in all
eval_only = False             # evaluate once and stop

# data
dataset = "openwebtext"       # a name under data/, a folder of shards, or a mix of them with weights: a:0.7,b:0.3
verify_data = False           # check every shard's sha256 before the first step (sizes are checked always)
batch_size = 12               # sequences per micro-step; 0: of tokens_per_step as many as memory is thought to hold
gradient_accumulation_steps: int | None = None  # micro-steps per update over all ranks; none: 1, or by tokens_per_step
tokens_per_step = 0           # tokens per update; when set, decides gradient_accumulation_steps
prefetch = 4                  # batches read ahead
loader_threads = 1            # threads that read them
context_start = 0             # context at first, doubling up to block_size, the tokens of a step staying the same;
                              # 0: block_size throughout
context_iters = 0             # updates after which the context is block_size; 0: half of max_iters

# the model: GPTConfig's fields, described in model.py; those not set are those of the model it goes on or starts from
block_size = 1024             # tokens of context
vocab_size = 0                # token ids; 0: as the dataset says
n_layer = 12                  # transformer blocks
n_head = 12                   # query heads
n_kv_head = 0                 # key and value heads; 0: as many as n_head, 1: multi-query
n_embd = 768                  # width of the residual stream
dropout = 0.0                 # 0 for pretraining; 0.1 and more where the data is seen many times
bias = False                  # biases in linear layers and LayerNorms
pos = "learned"               # learned | rope
rope_theta = 10000.0          # base of the rotary frequencies
rope_scaling = "none"         # none | linear | ntk | yarn: for a longer block_size than the model was first trained at
rope_factor = 1.0             # how many times as long
norm = "layernorm"            # layernorm | rmsnorm | rmsnorm_nogain
norm_eps = 1e-5               # added to the variance in every norm
norm_embed = False            # a norm right after the embedding
qk_norm = "none"              # none | rms | rms_gain
activation = "gelu_tanh"      # gelu | gelu_tanh | relu2 | swiglu
tie_weights = True            # the head is the embedding table
logit_softcap = 0.0           # 0: off
zero_init = False             # residual projections (and an untied head) start at zero
attn = "auto"                 # auto | sdpa | flash | math

# the optimizer
optimizer = "adamw"           # adamw | muon (for the blocks' matrices, AdamW for the rest)
learning_rate = 6e-4          # AdamW's peak
muon_learning_rate = 0.02     # Muon's peak; follows the same schedule
muon_momentum = 0.95          # Nesterov momentum
muon_dtype = "auto"           # of the Newton-Schulz iteration: float32 | bfloat16 | auto (bfloat16 where dtype is)
weight_decay = 1e-1           # on matrices and embeddings
beta1 = 0.9                   # AdamW's
beta2 = 0.95                  # AdamW's
grad_clip = 1.0               # largest global gradient norm; 0: no clipping

# the learning rate
decay_lr = True               # false: constant from the first step on
lr_schedule = "cosine"        # cosine | linear | wsd (flat, then linear)
warmup_iters = 2000           # updates of linear warm-up
lr_decay_iters = 0            # update at which min_lr is reached; 0: max_iters
min_lr = 6e-5                 # AdamW's at the end; Muon's falls in proportion
wsd_decay_frac = 0.2          # wsd: share of lr_decay_iters that decays

# looking at it
eval_interval = 2000          # updates between evaluations, each with a checkpoint
eval_iters = 200              # fixed batches (of 16,384 tokens) of validation windows; 0: the whole split
log_interval = 1              # updates between records in metrics.jsonl and lines on the screen
sample_tokens = 0             # tokens of a sample shown at each evaluation; 0: none
sample_start = "\n"           # what the sample starts from
probe_interval = 100          # updates between looks inside, each with a copy of the weights for a step; 0: none
peak_flops = 0.0              # FLOP/s of a device, which MFU divides by; 0: its data sheet's, of a CPU measured
measure_comm = False          # many processes: at each evaluation measure the communication that no computation hides,
                              # by six more passes through the model
profile = ""                  # steps to trace with torch.profiler, such as 10:13
tracker = ""                  # wandb | trackio | tensorboard; none: metrics.jsonl alone, which is written in any case
wandb_log = False             # nanoGPT's key: tracker=wandb
wandb_project = "owt"         # nanoGPT's key, of trackio, too
wandb_run_name = "gpt2"       # nanoGPT's key, of trackio, too

# guardrails: log, stop (exit code 1, nothing saved) or rewind (go on from the last checkpoint without the bad batch)
on_nan = "stop"               # loss or gradient not finite; log: that update is left out. A gradient that overflows in
                              # float16 is none: the loss scaling leaves it out in any case
on_spike = "log"              # loss or gradient norm far above those of the steps before
spike_z = 7.0                 # how far: standard deviations above the mean; 0: there are no spikes
spike_window = 128            # steps before it whose mean and deviation count; until there are as many, no spikes
max_rewinds = 3               # to one checkpoint; then the run stops
skip_batches = ""             # leave these data steps out, as a rewind does: 812,4077

# checkpoints: the latest is always kept, and the best
always_save_checkpoint = True  # false: keep only these two
keep_checkpoints = 3          # how many of the last are kept otherwise
save_interval = 0             # updates between checkpoints; 0: only at evaluations
save_minutes = 10.0           # minutes between checkpoints at most; 0: no limit
checkpoint_format = "plain"   # plain | sharded: each rank writes what lies on it, where gathering it on one hurts

# the machine
device = "auto"               # auto | cpu | cuda | cuda:N | mps
dtype = "auto"                # auto | float32 | bfloat16 | float16 (with loss scaling)
tf32 = False                  # CUDA: products of float32 with 10 bits after the point (TF32), several times as fast
sdpa = "auto"                 # CUDA: the kernel of PyTorch's attention: cudnn | flash | efficient | math | auto (torch
                              # chooses)
compile: bool | None = None   # torch.compile; none: on CUDA
threads = 0                   # CPU threads; 0: torch's choice
deterministic = False         # bit-identical on CUDA too, at some cost in speed

# many processes, under torchrun
zero_stage = 0                # 0: DDP; 1, 2, 3: fully_shard, which splits optimizer and gradients, 3 the weights too
tp_size = 1                   # ranks that share each layer's heads and hidden units
pp_size = 1                   # ranks that share the layers, one after the other
pp_schedule = "1f1b"          # gpipe | 1f1b | interleaved: the order of the micro-batches through them
cpu_offload = False           # zero_stage: what is sharded waits in pinned CPU memory
activation_checkpointing = "none"  # none | selective (attention, MLP) | full: what the backward pass computes again
backend = "nccl"              # of the GPUs' communication: nccl | gloo; CPUs take gloo
# -----------------------------------------------------------------------------

# what must be the same on resume, besides the model's shape: else it would be another run
MUST_MATCH = ("seed", "dataset_sha256", "train_tokens", "optimizer")


@contextmanager
def one_line_errors():
    """Around setting up: what cannot be had as asked is the user's to mend. Later errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        fail(e)


def main(config, given, stop, lock, rewound=None):
    """One run -> its exit code; or, as a list, the data steps to leave out, for which it is to be called again, with
    them as `rewound`. `stop` is its StopSignal, `lock` holds the run's folder."""
    with one_line_errors():
        # ---- the machine -------------------------------------------------------------
        check_settings()
        if threads:
            torch.set_num_threads(threads)
        where, device_why = pick_device(device)
        if where.type == "cuda":
            allocate_in_segments()
        where = parallel.own_device(device, where, backend)
        precision, dtype_why = pick_dtype(dtype, where)
        precision_name = str(precision).removeprefix("torch.")
        context = autocast(where, precision)
        if where.index is not None and where.type == "cuda":
            torch.cuda.set_device(where)  # for the events that time the steps
        use_tf32(tf32, where)
        use_sdpa(sdpa, where)
        if attn == "flash" and (where.type != "cuda" or precision == torch.float32):
            fail(f"attn='flash' needs a CUDA device and half precision, not {where.type} in {precision_name}")
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

        layout = parallel.Layout(
            where, backend=backend, zero_stage=zero_stage, tp_size=tp_size, pp_size=pp_size, pp_schedule=pp_schedule,
            cpu_offload=cpu_offload, activation_checkpointing=activation_checkpointing,
        )
        if layout.rank:
            sys.stdout = open(os.devnull, "w")
        profiler = Profiler(profile, where, out_dir, max_iters, writes=layout.rank == 0)

        # ---- the data, the model, and where they stand ---------------------------------------
        if not eval_only:
            layout.first(lambda: lock.take(create=False))  # before a checkpoint of the holder's is judged
        resumed = layout.first(lambda: what_to_resume(rewound))
        if resumed:
            checkpoint.config_of(resumed[1], resumed[0])  # refuses a model that this code does not know
        skipped = layout.first(lambda: what_to_skip(resumed, rewound))
        found, manifest, dataset_sha256 = open_datasets(dataset)
        source = ", ".join(str(folder) for folder, _ in found)
        tokenizer, vocab = vocabulary(found[0][0], manifest)
        start = None if resumed or init_from in ("scratch", "auto") else read_model(init_from)
        if resumed or start:
            adopt(resumed[1]["model"] if resumed else asdict(start[0].config), config, given)
        sizes = {f.name: config[f.name] for f in fields(GPTConfig)}
        model_config = GPTConfig(**{**sizes, "vocab_size": vocab_size or vocab})
        layout.check(model_config, precision)
        with torch.device("meta"):
            costs = plan.costs_of(GPT(model_config))
        free = free_memory(where, parallel.from_environment("LOCAL_WORLD_SIZE", 1))
        grid = plan.Layout(layout.dp, layout.zero, tp_size, pp_size, activation_checkpointing)

        def takes(batch_size, accumulation):
            return plan.step_memory(costs, batch_size, precision, 0, grid, accumulation, where.type == "cuda")["total"]

        if not batch_size:
            cut = {"batch_size": 0 if resumed else what_fits(takes, free, layout), "gradient_accumulation_steps": None}
            cut |= {key: resumed[1][key] for key in cut if resumed}  # to the bit what it would have been
            config.update(cut)
            globals().update(cut)
        micro_batches = micro_steps()
        accumulation = layout.accumulation(micro_batches)
        memory = takes(batch_size, accumulation)
        if tokenizer and model_config.vocab_size < vocab:
            fail(f"vocab_size={vocab_size} is too small for {source}, which has {vocab} token ids; 0 takes that")
        if tokenizer and sample_tokens:
            check_sample_start(tokenizer)
        for folder, _ in found if verify_data else ():
            verify_shards(folder)
        train_tokens, val_tokens = (open_tokens(found, split, model_config.vocab_size) for split in ("train", "val"))
        if len(val_tokens) < 2:
            fail(f"{source}: {len(val_tokens)} validation tokens are too few: at least 2")
        layout.first(lambda: check_validation(val_tokens))
        state = {
            "step": 0, "wall_s": 0.0, "metrics_bytes": 0, "scaler": None, "skipped": skipped,
            "model": asdict(model_config), "config": config, "seed": seed, "dataset_sha256": dataset_sha256,
            "train_tokens": len(train_tokens), "batch_size": batch_size, "gradient_accumulation_steps": micro_batches,
            "optimizer": optimizer, "threads": torch.get_num_threads(), "ranks": layout.world,
            "dtype": precision_name,
        }

        auto_bfloat16 = muon_dtype == "auto" and precision == torch.bfloat16
        torch.manual_seed(seed)
        model = GPT(model_config).to(where)  # the same on every rank, and whole until it is placed
        changed = {}
        if resumed:
            folder, folder_state = resumed
            changed = check_resume(folder_state, state)
            if folder_state["step"] >= max_iters and not eval_only and not folder_state.get("unevaluated"):
                print(f"nothing to do: {folder} has all {max_iters:,} steps")
                return 0
            checkpoint.load_model(model, folder)
            state |= {key: folder_state[key] for key in ("step", "wall_s", "metrics_bytes")}
        elif start:
            check_start(*start[:2], model_config, tokenizer)
            tensors = start[0].state_dict()
            if pos == "learned":  # the first of its positions
                tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:block_size]
            model.load_state_dict(tensors)
            del start, tensors
        size = model.num_params()
        flops = {block_size >> n: model.train_flops(block_size >> n) for n in range(block_size.bit_length())}
        model = layout.place(model, context, precision)
        opt = Optimizers(
            model, optimizer=optimizer, learning_rate=learning_rate, muon_learning_rate=muon_learning_rate,
            weight_decay=weight_decay, betas=(beta1, beta2), muon_momentum=muon_momentum,
            muon_dtype=torch.bfloat16 if muon_dtype == "bfloat16" or auto_bfloat16 else torch.float32,
            whole=layout.whole, part=layout.part, peers=layout.peers,
        )
        scaler = torch.amp.GradScaler(where.type, enabled=precision == torch.float16)
        guard = Guard(spike_z, spike_window, scaler.is_enabled(), resumed and folder_state.get("guard"))
        if resumed:
            opt.load_state_dict(layout.optimizer_state(model, folder))
            if folder_state["scaler"]:
                scaler.load_state_dict(folder_state["scaler"])

    unit = "char" if tokenizer and tokenizer.kind == "char" else "token"
    if eval_only:  # writes nothing
        print(evaluation_line(evaluate_now(model, val_tokens, context, layout), unit))
        return 0

    # ---- the run folder and the summary ------------------------------------------------
    with one_line_errors():
        loader = Loader(train_tokens, block_size, batch_size, accumulation=accumulation, seed=seed,
                        rank=layout.dp_rank, world=layout.dp, first_step=state["step"], prefetch=prefetch,
                        threads=loader_threads, pin=where.type == "cuda", skipped=skipped)
        layout.first(lambda: hold_folder(lock, resumed))
        run = Run(out_dir, writes=layout.rank == 0)
        shards = checkpoint.Background(layout.heads) if checkpoint_format == "sharded" else None
        layout.first(lambda: run.open(config, environment(where, dataset_sha256), state["metrics_bytes"]))
        layout.first(lambda: keep_skipped(out_dir, skipped))
        if tokenizer:
            layout.first(lambda: run.keep("tokenizer.json", tokenizer.to_json()))

    def tell(kind, message):
        if layout.rank == 0:
            clear_bar()
            print(f"{kind}: {message}", file=sys.stderr)

    def warn(message):
        tell("warning", message)
        run.event("warning", step=state["step"], message=message)

    watch = Watch(warn)
    run.warn = warn

    per_step = batch_size * micro_batches * block_size
    passes = accumulation if pp_size == 1 else 1  # of this rank through the model a step; a pipeline has all in one
    keep = keep_checkpoints if always_save_checkpoint else 1
    peak = peak_flops or peak_of(where, precision, tf32)
    peak_why = "asked for" if peak_flops else "its data sheet" if where.type == "cuda" else "measured"
    attn_kind, attn_why = pick_attention(attn, where, precision, block_size, model_config.head_dim)
    if attn_kind == "sdpa" and where.type == "cuda":
        kernel = sdpa_kernel_of(where, precision, batch=batch_size, queries=block_size, keys=block_size,
                                heads=n_head // tp_size, kv_heads=max(1, model_config.kv_heads // tp_size),
                                head_dim=model_config.head_dim, causal=True)
        attn_why = f"{attn_why}; {kernel} kernel"
    print(f"device      {where} ({device_why}), {precision_name} ({dtype_why}), {attn_kind} attention ({attn_why}), "
          f"{torch.get_num_threads()} CPU threads")
    if layout.world > 1:
        print(f"layout      {layout}")
    print(f"data        {source}: {len(train_tokens):,} training and {len(val_tokens):,} validation tokens")
    print(f"model       {size:,} parameters, {n_layer} layers of {n_embd}, context {block_size}")
    print(f"step        {per_step:,} tokens = {batch_size} x {block_size} x {micro_batches}, "
          f"{per_step * flops[block_size] / 1e12:.3g} TFLOP; {max_iters:,} steps see the data "
          f"{max_iters * per_step / len(train_tokens):.2g} times")
    print("peak        " + (f"{peak / 1e12:.3g} TFLOP/s ({peak_why})" if peak else "not known, so MFU is n/a"))
    print(f"memory      about {memory / 1e9:.2g} GB{' a process' * (layout.world > 1)}"
          f"{f', of {free / 1e9:.2g} GB that are free' if free else ''}")
    run.event("resume" if resumed else "start", step=state["step"], changed=changed, resolved={
        "device": str(where), "dtype": precision_name, "attn": attn_kind, "threads": torch.get_num_threads(),
        "vocab_size": model_config.vocab_size, "gradient_accumulation_steps": micro_batches, "ranks": layout.world,
    })
    if free and memory > free:
        warn(f"a step takes about {memory / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free: {smaller()}")
    if changed:
        warn(f"resumed with other settings than it was saved with: {changed}")
    if layout.rank == 0:
        watch.disk(out_dir, checkpoint.steps(out_dir).values(), keep, size)
    run.tracker = Tracker((tracker or "wandb" * wandb_log) if layout.rank == 0 else "", run.dir, config, wandb_project,
                          wandb_run_name, state["step"], warn)
    if run.tracker.where:
        print(f"tracker     {run.tracker.where}")

    # ---- everything that runs more than once ---------------------------------------------
    def micro_step(x, y, step, micro, timer=None):
        """One forward and backward pass; -> the micro-batch's mean loss, detached. A pipeline has but one, for all."""
        if dropout:  # what is dropped follows from (seed, step, micro-step of all ranks)
            seeded = keyed(seed, step, micro * layout.dp + layout.dp_rank, "dropout") >> 1
            torch.manual_seed(seeded + layout.pp_rank)
        if layout.pp > 1:
            loss = layout.pipeline(model, x, y, accumulation)
            if timer:
                timer.mark("pipeline_ms")
            return loss
        layout.before_forward(model, last=micro == accumulation - 1)
        with context():
            _, loss = compiled(x, y, loss_only=True)
        if timer:
            timer.mark("forward_ms")
        scaler.scale(loss / accumulation).backward()
        if timer:
            timer.mark("backward_ms")
        return loss.detach()

    def communication():
        """Communication in a step that no computation hides, in ms. Of the micro-batches the first is looked at, the
        second, which stands for those that follow it, and the last, which reduces the gradients; the least of two each.
        """
        x, y = layout.repeated(loader.batch(state["step"]), accumulation)
        x, y = (t.to(where).view(-1, context_at(state["step"])) for t in (x, y))

        def look(micro):
            micro_step(x, y, state["step"], micro)
            if micro == passes - 1:
                layout.reduce(model)

        alike = {0: 1, 1: passes - 2, passes - 1: 1}  # how many of them each stands for
        found = {micro: [] for micro, n in alike.items() if n > 0}
        for _ in range(2):
            for micro, ms in found.items():
                ms.append(profiler.exposed(partial(look, micro)))
            opt.zero_grad()
        if None in found[0]:
            return {}
        return {"comm_ms": round(sum(alike[micro] * min(ms) for micro, ms in found.items()), 3)}

    def validate():
        nonlocal evaluator
        try:
            result = evaluate_now(model, val_tokens, context, layout, evaluator)
        except torch._dynamo.exc.TorchDynamoException as e:
            if evaluator is None:
                raise
            evaluator = None
            warn(f"torch.compile does not work for the evaluation ({what_failed(e)}); it runs uncompiled")
            result = evaluate_now(model, val_tokens, context, layout)
        if sample_tokens and tokenizer and math.isfinite(result["loss"]):
            if whole := layout.whole_model(model):  # on one rank
                text = sample(whole, tokenizer, context)
                run.event("sample", step=state["step"], text=text)
                print(f"---- sample at step {state['step']}\n{text}\n----")
        return {"val_loss": result["loss"], "val_tokens": result["tokens"], "val_sha256": result["tokens_sha256"]}

    def look_inside(update):
        """What training/probe.py sees of this step, and in evaluation on the first validation window."""
        x, y = next(fixed_batches(val_tokens.parts[0][0], block_size, 1))
        figures = layout.of_all_layers(model, attention(model, x[:, : int((y != -1).sum())].to(where), context))
        layout.rest(model)
        return update.read() | {key: by_layer.tolist() for key, by_layer in figures.items()}

    def profiled(step):
        """The profiler begins or ends here, if it is to."""
        if lines := profiler.after(step):
            clear_bar()
            print(*lines, sep="\n", flush=True)

    def diverged(step, why):
        """Says that the run is lost from `step` on, and saves nothing. -> the exit code"""
        loader.close()
        written()
        run.event("stop", step=step, reason=str(why))
        last = list(checkpoint.steps(out_dir).values())
        kept = f"{last[-1]} is from" if last else "there is no checkpoint from"
        tell("error", f"{why} at step {step}; {kept} before it. Lower learning_rate, or check the data")
        return 1

    def rewind(step, bad, batch, stopped_by):
        """Notes that the run goes on from the last checkpoint, or the beginning, without the `batch` of `step`. -> what
        main gives"""
        written()
        to = layout.first(lambda: max(checkpoint.steps(out_dir), default=0))
        since = [k for k in skipped if k > data_step(to - 1, skipped) and k not in parse_steps(skip_batches)]
        if len(since) >= max_rewinds:
            return diverged(step, f"after {len(since)} rewinds to step {to}, without data steps {since}, {bad}")
        more = sorted({*skipped, batch})

        def note():
            try:
                run.event("rewind", step=step, what=bad.what, value=bad.value, z=bad.z, skipped=[batch], to=to)
                run.flush()
                keep_skipped(out_dir, more)
            except OSError as e:
                return str(e)

        if trouble := layout.first(note):
            return diverged(step, f"a rewind could not be noted ({trouble}), but {bad}")
        loader.close()
        profiler.drop()
        run.tracker.finish()  # the run that goes on has the same id
        back = f"step {to}" if to else "the beginning"
        tell("warning", f"{bad} at step {step}; back to {back}, and on without its batch, data step {batch}")
        if stopped_by:
            run.event("stop", step=step, reason=signal.Signals(stopped_by).name)
            return 128 + stopped_by
        return more

    unnoted = {}  # folder of a checkpoint -> what its evaluation found, which it does not hold yet

    def went_well(write, step):
        """Whether `write` could do so. A full disk is said and the run goes on: what is there already stays good."""
        try:
            write()
        except OSError as e:
            warn(f"no checkpoint at step {step}: {e}; earlier ones stay, make room in {out_dir}")
            return False
        return True

    def written():
        """Waits for shards that are being written. -> whether all is that was begun"""
        done = not shards or went_well(shards.wait, shards.step)
        if done and layout.rank == 0:
            note_evaluation()
        unnoted.clear()
        return done

    def note_evaluation():
        """Have the checkpoint that was saved before an evaluation hold what that found."""
        for folder, found in unnoted.items():
            try:
                checkpoint.note(folder, **found, unevaluated=None)
            except OSError as e:  # a full disk: a resume evaluates again
                warn(f"{folder} does not hold its val_loss: {e}")
        if unnoted:
            checkpoint.prune(out_dir, keep)

    def flush_logs():
        """-> bytes of metrics.jsonl that the disk holds. Logs never keep a checkpoint from being written."""
        try:
            return run.flush()
        except OSError as e:
            watch.once("logs", f"the logs of {out_dir} cannot be written ({e}): their lines wait in memory, and "
                       "checkpoints are saved all the same")
            return run.length[run.metrics_path]

    def save(unevaluated=None):
        """A checkpoint of now. `unevaluated` is the record of a step whose evaluation is still to come: a resume makes
        up for it. -> whether the checkpoint is written, or begun if each rank writes its shards"""
        written()  # else those before would be told of as these
        held = (model, opt) if shards else layout.gather(model, opt)
        state.update(scaler=scaler.state_dict() if scaler.is_enabled() else None, guard=guard.state())

        def flush():
            return layout.rank == 0 and flush_logs()

        def write():  # on each rank if sharded, else on the first
            state["metrics_bytes"] = checkpoint.together(flush)[0] if shards else flush()
            saved = {**state, "val_loss": None, "unevaluated": plain(unevaluated)}
            if shards:
                return shards.save(out_dir, *held, saved, keep)
            checkpoint.save(out_dir, *held, saved)
            if not unevaluated:  # else once it is known whether this one is the best
                checkpoint.prune(out_dir, keep)
            if state["step"] < max_iters:
                watch.disk(out_dir, checkpoint.steps(out_dir).values(), keep, size)

        attempt = partial(went_well, write, state["step"])
        return attempt() if shards else layout.first(attempt)

    def evaluated(record, saved, **more):
        """Evaluates, logs the `record` of the step with what that found, and has the checkpoint hold it, where it was
        `saved` before. -> the validation loss, which may be not finite: then that checkpoint is gone"""
        result = validate()
        if not math.isfinite(result["val_loss"]):
            if written() and saved:
                layout.first(lambda: checkpoint.discard(checkpoint.place(out_dir, record)))
            return result["val_loss"]
        record = {**record, **result, **more}
        run.metrics(record)
        show(record, unit, max_iters)
        if saved:
            length = layout.first(flush_logs)
            state["metrics_bytes"] = length
            unnoted[checkpoint.place(out_dir, record)] = {"val_loss": result["val_loss"], "metrics_bytes": length}
            if not shards:
                written()
        return result["val_loss"]

    # ---- compile, and fall back once if that fails ---------------------------------------
    compiled, evaluator = layout.module, None  # what training's forward pass calls; the compiled model that evaluates
    clock = time.perf_counter()
    if compile or (compile is None and where.type == "cuda"):
        def first_passes():
            """A pass for each length of the context."""
            nonlocal compiled, evaluator
            compiled = layout.compile(model)
            evaluator = torch.compile(model, dynamic=False) if layout.copies_whole else None
            torch._dynamo.config.recompile_limit = 64  # graphs of one function: one a length, and the evaluation's
            x, y = (t.to(where) for t in layout.repeated(loader.batch(state["step"]), accumulation))
            length = context_at(state["step"])
            while length <= block_size:
                # DDP's ranks do not talk in a micro-step before the last, so one that fails leaves none waiting
                micro_step(x.view(-1, length), y.view(-1, length), state["step"],
                           -1 if layout.copies_whole else accumulation - 1)
                length *= 2

        trouble = layout.any_trouble(can_compile(where) or layout.cannot_compile())
        if not trouble and not layout.copies_whole:  # ranks wait for each other within a pass: first a trial without
            trouble = layout.any_trouble(trouble_of(lambda: compile_one(where)))
        if not trouble:
            trouble = trouble_of(first_passes)
            if trouble and not layout.copies_whole:
                fail(f"torch.compile failed ({trouble}); --compile=false trains uncompiled")
            trouble = layout.any_trouble(trouble)
        opt.zero_grad()
        if trouble:
            compiled, evaluator = layout.module, None
            torch.compiler.set_stance("force_eager")  # of what is compiled within it, too
            warn(f"torch.compile does not work here ({trouble}); running uncompiled")
    for _ in range(layout.warm_ups):  # DDP's buckets follow its first pass: have them as a resume does
        x, y = (t.to(where).view(-1, context_at(state["step"])) for t in loader.batch(state["step"]))
        micro_step(x, y, state["step"], accumulation - 1)
        opt.zero_grad()
    state["wall_s"] += time.perf_counter() - clock

    # ---- the loop ---------------------------------------------------------------------
    stop.listen()
    saved, val_loss = True, None
    if resumed and (record := folder_state.get("unevaluated")):  # it ended between a checkpoint and its evaluation
        val_loss = evaluated(record, saved=True)
        if not math.isfinite(val_loss):
            return diverged(record["step"], "the validation loss is not finite")
    timer, pace, hardware = StepTimer(where), Pace(), Hardware(where)
    unread = []  # loss and gradient norm of each step since the last record, still on the device
    last_save = time.monotonic()
    began = state["step"], state["wall_s"]
    while state["step"] < max_iters:
        step = state["step"]
        probing = probe_interval and (step + 1) % probe_interval == 0
        with pace.aside():
            profiled(step)
        timer.start()
        lr = learning_rate_at(step)
        opt.set_lr(lr / learning_rate)
        losses = []
        for micro in range(passes):
            x, y = layout.take(loader, accumulation)
            x, y = (t.to(where, non_blocking=loader.pin).view(-1, context_at(step)) for t in (x, y))
            timer.mark("data_ms")
            losses.append(micro_step(x, y, step, micro, timer))
        layout.reduce(model)
        scaler.unscale_(opt)  # nothing but in float16
        norm = layout.grad_norm(model)
        if on_nan == "log":
            opt.found_inf = (~norm.isfinite()).float()  # on the device, which nobody waits for
        update = timer.aside("optim_ms", lambda: Update(model, layout.norms)) if probing else None
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
        scaler.step(opt)
        scaler.update()
        if probing:
            timer.aside("optim_ms", update.end)
        opt.zero_grad()
        timer.mark("optim_ms")
        unread.append((torch.stack(losses).mean(), norm))
        state["step"] = step = step + 1
        pace.steps += 1
        if step == began[0] + 2:  # the first step is slower than the rest
            seconds = sum(timer.read().values()) / 1000 * (max_iters - step)
            clear_bar()
            print(f"time        about {clock_face(seconds)} to go", flush=True)

        last = step == max_iters
        log_due = step % log_interval == 0 or last or probing
        eval_due = step % eval_interval == 0 or last
        save_due = save_interval and step % save_interval == 0 or \
            save_minutes and time.monotonic() - last_save > 60 * save_minutes
        save_due, stopped_by = layout.agree(bool(save_due), stop.signum)  # once, as they can change at any moment
        if not (log_due or eval_due or save_due or stopped_by):
            continue

        # read the losses: from here on the device has finished the step
        read = list(zip(layout.mean(torch.stack([loss for loss, _ in unread])).tolist(),
                        torch.stack([norm for _, norm in unread]).tolist(), strict=True))
        parts = timer.read()
        seconds, steps = pace.read()
        state["wall_s"] += seconds
        step_ms = (1000 * seconds - parts.get("probe_ms", 0.0)) / steps
        unread = []
        for at, (loss, grad_norm) in enumerate(read, step + 1 - len(read)):
            bad = guard.judge(loss, grad_norm)
            if not bad:
                continue
            action, batch = on_nan if bad.kind == "nan" else on_spike, data_step(at - 1, skipped)
            run.event(bad.kind, step=at, what=bad.what, value=bad.value, z=bad.z, data_step=batch, action=action)
            if action == "rewind":
                return rewind(at, bad, batch, stopped_by)
            if action == "stop":
                run.metrics({"step": at, "tokens": at * per_step, "wall_s": round(state["wall_s"], 3), "loss": loss,
                             "grad_norm": grad_norm})
                return diverged(at, bad)
            tell("warning", f"{bad} at step {at}, of data step {batch}"
                            f"{'' if math.isfinite(grad_norm) else '; its update is left out'}")
        watch.step(step, parts)
        with pace.aside():
            inside = look_inside(update) if probing else {}
        if log_due or eval_due:
            tok_per_s = per_step / (step_ms / 1000)
            mfu = tok_per_s * flops[context_at(step - 1)] / (peak * layout.world) if peak else None
            record = {
                "step": step, "tokens": step * per_step, "wall_s": round(state["wall_s"], 3), "loss": loss,
                "lr": lr, "grad_norm": grad_norm, "tok_per_s": round(tok_per_s), "mfu": mfu,
                **hardware.read(), "step_ms": round(step_ms, 3),
                **{part: round(ms, 3) for part, ms in parts.items()}, **inside,
            }
            if not eval_due:
                run.metrics(record)
                show(record, unit, max_iters)
            if shards and shards.done():
                written()
        saved = False
        if eval_due or save_due or stopped_by:
            with pace.aside():
                if not layout.finite(model):
                    return diverged(step, "a weight is not finite")
                saved = save(record if eval_due else None)  # before anything that may fail or be interrupted
                last_save = time.monotonic()
                if eval_due:
                    comm = communication() if measure_comm and layout.world > 1 else {}
                    val_loss = evaluated(record, saved, **comm)
                    if not math.isfinite(val_loss):
                        return diverged(step, "the validation loss is not finite")
                if last or stopped_by:
                    saved = written() and saved
        if stopped_by:
            run.event("stop", step=step, reason=signal.Signals(stopped_by).name)
            kept = "saved; resume" if saved else "not saved; resume the last checkpoint, if there is one,"
            print(f"\nstopped by {signal.Signals(stopped_by).name} after step {step}, {kept} with "
                  f"--init_from=resume {shlex.quote(f'--out_dir={out_dir}')}")
            loader.close()
            return 128 + stopped_by

    loader.close()
    saved = written() and saved
    profiled(state["step"])
    run.event("end", step=state["step"], wall_s=state["wall_s"])
    done = f"trained {state['step'] - began[0]:,} steps in {state['wall_s'] - began[1]:.1f} s; val loss {val_loss:.4f}"
    if not saved:
        print(f"{done}; the last checkpoint could not be saved (the reason is above)")
        return 1
    words = "" if tokenizer else " --tokenizer=FILE"  # the dataset has none
    print(f"{done}; next: python sample.py {shlex.quote(f'--out_dir={out_dir}')}{words}")
    return 0


# -----------------------------------------------------------------------------
# The steps of main that have a name


def check_settings():
    """Ends the run for a setting that has no meaning."""
    plan.model_fields(read_keys(__file__))  # says which key is missing
    if decay_lr and not 0 <= min_lr <= learning_rate:
        fail(f"min_lr={min_lr} must lie between 0 and learning_rate={learning_rate}; or set decay_lr=false")
    choices = {"optimizer": ("adamw", "muon"), "muon_dtype": ("float32", "bfloat16", "auto"),
               "lr_schedule": ("cosine", "linear", "wsd"), "zero_stage": (0, 1, 2, 3), "backend": ("nccl", "gloo"),
               "sdpa": SDPA, "checkpoint_format": ("plain", "sharded"), "pp_schedule": parallel.SCHEDULES,
               "on_nan": ACTIONS, "on_spike": ACTIONS, "tracker": TRACKERS,
               "activation_checkpointing": ("none", "selective", "full")}
    for key, known in choices.items():
        if globals()[key] not in known:
            fail(f"{key}={globals()[key]!r} is not one of {', '.join(str(choice) or 'nothing' for choice in known)}")


def check_sample_start(tokenizer):
    """Ends the run where sample_start is no prompt."""
    try:
        prompt = tokenizer.encode(sample_start)
    except ValueError as e:
        fail(f"sample_start={sample_start!r}: {e}")
    if not prompt:
        fail("sample_start is empty: a sample needs at least one character to start from")


def check_validation(val_tokens):
    """Reads the tokens that an evaluation will read, before the first step. Raises DataError for what is damaged."""
    for part, _ in val_tokens.parts:
        targets = len(part) - 1
        if eval_iters:
            targets = min(targets, eval_iters * max(1, 16384 // block_size) * block_size)
        part.sha256_of(targets + 1)  # kept for the evaluation, which asks for it again


def hold_folder(lock, resumed):
    """Keep other processes from training into out_dir, which is made where it is not there."""
    os.makedirs(out_dir, exist_ok=True)
    lock.take()
    if not resumed and (found := checkpoint.steps(out_dir)):
        fail(f"another process has trained into {out_dir} meanwhile (step {max(found)}): resume it with "
             "--init_from=resume, or begin in another --out_dir")


def what_fits(takes, free, layout):
    """The largest micro-batch that divides tokens_per_step and leaves plan.py's reserve of the `free` bytes, where
    `takes` says how many it takes. Ends the run where there is none."""
    sequences, rest = divmod(tokens_per_step, block_size)
    if rest or not sequences or not free:
        fail("batch_size=0 takes what fits, of tokens_per_step, a multiple of block_size; " +
             ("here nothing says how much memory is free" if not free else f"set it, for example to {8 * block_size}"))
    fits, least = [], math.inf
    for n in plan.divisors(sequences):
        with suppress(ValueError):  # the ranks cannot share so few micro-batches
            need = takes(n, layout.accumulation(sequences // n))
            least = min(least, need)
            fits += [n] * (need <= free * (1 - plan.reserve))
    found = -layout.agree(-max(fits, default=0))[0]  # what every rank has room for
    if not found:
        fail(f"batch_size=0: a step takes at least {least / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free: {smaller()}")
    return found


def smaller():
    """What to try where a step takes too much memory."""
    cuts = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), 1)
    steps = "" if tokens_per_step else f" --gradient_accumulation_steps={cuts * (gradient_accumulation_steps or 1)}"
    same = f"--batch_size={batch_size // cuts}{steps} is the same update in smaller pieces; " if cuts > 1 else ""
    return f"{same}--activation_checkpointing=full takes less, and with more processes --zero_stage=3"


def micro_steps():
    """Micro-steps per update, from gradient_accumulation_steps or tokens_per_step. Ends the run where they disagree,
    or the context does not double to its length."""
    doublings = [block_size >> n for n in range(block_size.bit_length()) if block_size % (1 << n) == 0]
    if context_start and context_start not in doublings:
        fail(f"context_start={context_start} does not double to block_size={block_size}")
    if not tokens_per_step:
        return gradient_accumulation_steps or 1
    micro = batch_size * block_size
    steps, rest = divmod(tokens_per_step, micro)
    if rest or not steps:
        below = max(1, steps)
        fail(f"tokens_per_step={tokens_per_step} is not a multiple of batch_size x block_size = {batch_size} x "
             f"{block_size} = {micro}; {below * micro} and {(below + 1) * micro} are")
    if gradient_accumulation_steps not in (None, steps):
        fail(f"tokens_per_step={tokens_per_step} takes {steps} micro-steps, but gradient_accumulation_steps="
             f"{gradient_accumulation_steps}; leave one of them out")
    return steps


def what_to_resume(rewound=None):
    """(folder, state) of the checkpoint to go on from, or None to begin. Ends the run where init_from forbids it."""
    found = checkpoint.steps(out_dir)
    if init_from in ("resume", "auto") and found and eval_only:
        return checkpoint.find(out_dir)
    if init_from in ("resume", "auto") or rewound:
        good = checkpoint.latest_good(out_dir, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
        if good is None and init_from == "resume":
            fail(f"nothing to resume: {out_dir} holds no checkpoint; --init_from=scratch begins, auto does either")
        return good
    words = ("scratch", "resume", "auto")
    if init_from not in words and not os.path.exists(init_from) and (mend := nearest(init_from, words)):
        fail(f"init_from={init_from!r} is no model to start from{mend}")
    if found:
        fail(f"{out_dir} already holds a run (step {max(found)}): continue it with --init_from=resume, "
             "or begin in another --out_dir")
    return None


def what_to_skip(resumed, rewound=None):
    """Data steps that are left out, rising: those asked for, and those of the run that goes on. Ends the run for one
    that it was trained on already."""
    asked, then = parse_steps(skip_batches), resumed[1].get("skipped", []) if resumed else []
    done = resumed[1]["step"] if resumed else 0
    late = [k for k in asked if k not in then and k <= data_step(done - 1, then)]
    if late:
        fail(f"skip_batches={skip_batches}: {out_dir} goes on from step {done}, which has seen data step {late[0]}")
    since = rewound or (read_skipped(out_dir) if resumed or init_from == "auto" else [])
    return sorted({*asked, *then, *since})


def check_resume(saved, state):
    """Ends the run where the saved one was another; -> {key: [then, now]} of what changed and may."""
    if "seed" not in saved:  # export.py made it of a model from elsewhere
        source = saved["config"].get("init_from") or "elsewhere"
        fail(f"{out_dir} holds a model from {source} and no training to resume: "
             f"start from it with {shlex.quote(f'--init_from={out_dir}')} and another --out_dir")
    # a field that there was not yet has its default
    then, now = ({**s, **asdict(GPTConfig()), **s["model"], "model": None} for s in (saved, state))
    for key in (*MUST_MATCH, *state["model"]):
        if then.get(key) != now[key] and key not in ("dropout", "attn"):
            fail(f"cannot resume {out_dir}: it was trained with {key}={then.get(key)}, now it is {now[key]}; "
                 "set it back, or begin in another --out_dir")
    rows = [[s["batch_size"], s["gradient_accumulation_steps"]] for s in (saved, state)]
    if math.prod(rows[0]) != math.prod(rows[1]):  # the micro-batches that an update is cut in may change
        before, here = (" x ".join(map(str, row)) for row in rows)
        fail(f"cannot resume {out_dir}: it was trained with batch_size x gradient_accumulation_steps = {before}, "
             f"now it is {here}; their product must stay: set it back, or begin in another --out_dir")
    changed = {key: [saved["config"][key], value] for key, value in state["config"].items()
               if saved["config"].get(key, value) != value and key not in ("init_from", "out_dir")}
    resolved = ("threads", "dtype", "ranks", "batch_size", "gradient_accumulation_steps")
    for key in resolved:  # equal to rounding only; and what dropout leaves out goes by micro-batch
        if saved.get(key) != state[key]:
            changed[key] = [saved.get(key), state[key]]
    return changed


def adopt(sizes, config, given):
    """Fields of the model that nobody set become those of the model to go on from, here and in `config`."""
    for key, value in sizes.items():
        if key not in given and key not in ("dropout", "attn", "vocab_size"):  # the last is for the dataset to say
            config[key] = globals()[key] = value


def check_start(theirs, its_tokenizer, model_config, tokenizer):
    """Ends the run where another model's weights, though of the same shape, would mean something else in this one."""
    for key, value in asdict(model_config).items():
        then = getattr(theirs.config, key)
        fits = key in ("dropout", "attn") or key == "block_size" and (pos == "rope" or value < then)
        if then != value and not fits and key not in ("rope_scaling", "rope_factor"):
            fail(f"init_from={init_from}: that model has {key}={then}, this one {value}")
    first, here = (round(c.block_size / c.rope_factor) for c in (theirs.config, model_config))
    if rope_scaling == "yarn" and first != here:
        fail(f"rope_scaling='yarn': block_size={block_size} must be rope_factor={rope_factor} times {first}, which "
             f"{init_from} was first trained at")
    if tokenizer and not its_tokenizer:
        print(f"warning: {init_from} says nothing of its tokenizer, which should be that of {dataset}", file=sys.stderr)
    elif tokenizer and its_tokenizer.sha256 != tokenizer.sha256:
        fail(f"init_from={init_from}: its tokenizer is not that of {dataset}, so the same ids are other text")


def vocabulary(source, manifest):
    """(tokenizer or None, vocab_size) of a dataset; one that says nothing is GPT-2's, as nanoGPT's are. Of nanoGPT's
    meta.pkl the vocab_size is enough. Raises ValueError for a tokenizer that cannot be read."""
    try:
        tokenizer = load_tokenizer(source)
    except FileNotFoundError:
        return None, manifest.get("tokenizer", {}).get("vocab_size", 50257)
    except ValueError as e:
        size = meta_vocab_size(source)
        if size is None:
            raise
        if parallel.rank() == 0:
            print(f"warning: {e}; the run trains on its {size:,} token ids and has no tokenizer", file=sys.stderr)
        return None, size
    return tokenizer, max(tokenizer.vocab_size, meta_vocab_size(source) or 0)


def learning_rate_at(step):
    return lr_at(
        step, learning_rate=learning_rate, min_lr=min_lr, schedule=lr_schedule if decay_lr else "constant",
        warmup_iters=warmup_iters if decay_lr else 0, lr_decay_iters=lr_decay_iters or max_iters,
        decay_frac=wsd_decay_frac,
    )


def evaluate_now(model, val_tokens, context, layout, compiled=None):
    """eval.evaluate over the fixed validation windows, in batches of about 16,384 tokens, shared by the ranks."""
    result = evaluate(model, val_tokens, block_size, max(1, 16384 // block_size), eval_iters, context,
                      layout.dp_rank, layout.dp, layout.collect, compiled=compiled)
    layout.rest(model)
    return result


def trouble_of(call):
    """What goes wrong in `call`, in a line; None where nothing does. Raises where memory is full: to run in another way
    takes no less."""
    try:
        call()
    except Exception as e:
        return what_failed(e)


def context_at(step):
    """Tokens of context at `step`. The rows of a batch are cut, so the order of the data stays what it is."""
    return context_length(step, block_size, context_start, context_iters or max_iters // 2)


def sample(model, tokenizer, context):
    """sample_tokens tokens that follow sample_start, as text; the same at every call for the same weights."""
    model.eval()
    prompt = tokenizer.encode(sample_start)
    with context():
        tokens = prompt + list(stream(model, prompt, sample_tokens, temperature=0.8, top_k=200, seed=seed))
    model.train()
    return tokenizer.decode(tokens)


class StopSignal:
    """SIGINT, SIGTERM or SIGHUP (the terminal was closed): remembered, so that the step is finished and saved; a second
    one ends the process at once. One that comes while a rewind sets up the run again is not lost."""

    def __init__(self):
        self.signum, self.before = 0, {}

    def listen(self):
        """From here on. In a thread, where Python has no signals, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            return
        signums = {signal.SIGINT, signal.SIGTERM}
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
            signums.add(signal.SIGHUP)
        for signum in signums - self.before.keys():
            self.before[signum] = signal.signal(signum, self.caught)

    def caught(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)

    def put_back(self):
        """The handlers of before: in a notebook the run ends and the process does not."""
        for signum, handler in self.before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self.before = {}


def until_done(config, given):
    """main, and after a rewind main again: everything is set up as a resume sets it up. -> the exit code"""
    stop = StopSignal()
    lock = FolderLock(out_dir, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    try:
        done = main(config, given, stop, lock)
        while isinstance(done, list):
            gc.collect()  # the model that was, before there is another
            if "torch._dynamo" in sys.modules:
                torch.compiler.set_stance("default")
                torch.compiler.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            done = main(config, given, stop, lock, done)
        return done
    finally:
        stop.put_back()
        lock.let_go()


if __name__ == "__main__":
    given = set()
    settings = configure(globals(), given=given)
    try:
        with parallel.one_fate():
            sys.exit(until_done(settings, given))
    except KeyboardInterrupt:  # before the loop, which has StopSignal
        sys.exit(130)
    except (checkpoint.CheckpointError, DataError) as e:
        fail(e)
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
        if full := memory_is_full(e):
            fail(f"{full}: {smaller()}")
        raise
