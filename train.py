"""
Train a GPT: the settings, the setup and the training loop, top to bottom.

    python train.py config/shakespeare_char_cpu.py
    python train.py config/shakespeare_char.py --out_dir=out/mine --learning_rate=3e-3
    torchrun --standalone --nproc_per_node=4 train.py config/owt_124m.py --zero_stage=1

The data, the dropout and the update of step s follow from (config, seed, s). So a run that was killed and resumed ends
with the bits of an unbroken one, and a run that rewound (training/guard.py) with those of a run that skips its step.
Many processes share the same steps (parallel.py): each trains on some of the micro-batches, and rank 0 writes.
"""

import shlex
import signal
import sys
import threading
import time
from contextlib import closing

import torch

import checkpoint
from configurator import Settings, configure, fail
from dataset import DataError
from files import FolderLock, clock_face
from loader import Loader, data_step
from model import GPT
from optim import Optimizers, lr_at
from parallel import Layout
from training import guard, start, warmup
from training.measure import Costs, Measure, seed_dropout, validation_loss
from training.monitor import Pace, Run, StepTimer, evaluation_line
from training.origin import adopt_sizes, check_origin, find_origin, make_model_config, read_other_model
from training.probe import Update
from training.profiler import Profiler
from training.ranks import all_fail_together
from training.saver import Saver

# -----------------------------------------------------------------------------
# the run
out_dir = "out"               # where config, metrics and checkpoints go
init_from = "scratch"         # scratch | resume | auto (resume a run if there is one) | a model to start from: a run's
                              # folder, ckpt.pt of nanoGPT, FILE.gguf, a Hugging Face folder, a name on the Hub (gpt2);
                              # auto:MODEL resumes a run if there is one, and else starts from the model
seed = 1337                   # of initialisation, data order and dropout
max_iters = 600000            # updates in total
eval_only = False             # evaluate once and stop

# data
dataset = "openwebtext"       # a name under data/, a folder of shards, or a mix of them with weights: a:0.7,b:0.3
verify_data = False           # check every shard's sha256 before the first step (sizes are checked always)
doc_mask: bool | None = None  # the documents in one row do not see each other; none: for conversations
batch_size = 12               # sequences per micro-step; 0: the most that memory is estimated to hold
gradient_accumulation_steps: int | None = None  # micro-steps per update over all ranks; none: 1, or by tokens_per_step
tokens_per_step = 0           # tokens per update; when set, decides gradient_accumulation_steps
prefetch = 4                  # batches read ahead
loader_threads = 1            # threads that read them
context_start = 0             # context at first; it doubles up to block_size while a step keeps its tokens;
                              # 0: block_size throughout
context_iters = 0             # updates until the context is block_size; 0: half of max_iters

# the model: GPTConfig's fields (model.py); one you leave out comes from the checkpoint that is resumed or started from
block_size = 1024             # tokens of context
vocab_size = 0                # token ids; 0: the dataset's
n_layer = 12                  # transformer blocks
n_head = 12                   # query heads
n_kv_head = 0                 # key and value heads; 0: as many as n_head, 1: multi-query
n_embd = 768                  # width of the residual stream
dropout = 0.0                 # 0 for pretraining; 0.1 or more where the data is seen many times
bias = False                  # biases in linear layers and LayerNorms
pos = "learned"               # learned | rope
rope_theta = 10000.0          # base of the rotary frequencies
rope_scaling = "none"         # none | linear | ntk | yarn: to stretch a model to a longer block_size than it learned
rope_factor = 1.0             # how many times longer
norm = "layernorm"            # layernorm | rmsnorm | rmsnorm_nogain
norm_eps = 1e-5               # added to the variance in every norm
norm_embed = False            # a norm right after the embedding
qk_norm = "none"              # none | rms | rms_gain
activation = "gelu_tanh"      # gelu | gelu_tanh | relu2 | swiglu
mlp_width = 0                 # hidden width of the MLP; 0: 4 n_embd, for swiglu two thirds of that
tie_weights = True            # the head is the embedding table
logit_softcap = 0.0           # 0: off
init_std = 0.02               # standard deviation of the blocks' weights at first; 0: 1 / sqrt(inputs)
zero_init = False             # residual projections (and an untied head) start at zero
attn = "auto"                 # auto | sdpa | flash | math

# the optimizer
optimizer = "adamw"           # adamw | muon (for the blocks' matrices; AdamW for the rest)
learning_rate = 6e-4          # AdamW's peak
muon_learning_rate = 0.02     # Muon's peak; follows the same schedule
muon_momentum = 0.95          # Nesterov momentum
muon_even_rows = False        # every row of Muon's updates has the same length (optim.even_rows)
muon_dtype = "auto"           # of the Newton-Schulz iteration: float32 | bfloat16 | auto (bfloat16 if dtype is)
weight_decay = 1e-1           # on matrices and embeddings
beta1 = 0.9                   # AdamW's
beta2 = 0.95                  # AdamW's
grad_clip = 1.0               # largest global gradient norm; 0: no clipping

# the learning rate
decay_lr = True               # false: constant from the first step on
lr_schedule = "cosine"        # cosine | linear | wsd (flat, then linear)
warmup_iters = 2000           # updates of linear warm-up
lr_decay_iters = 0            # update at which min_lr is reached; 0: max_iters
min_lr = 6e-5                 # AdamW's at the end; Muon's falls by the same factor
wsd_decay_frac = 0.2          # wsd: share of lr_decay_iters that decays

# logging and evaluation
eval_interval = 2000          # updates between evaluations, each with a checkpoint
eval_iters = 200              # fixed batches (of 16,384 tokens) of validation windows; 0: the whole split
log_interval = 1              # updates between records in metrics.jsonl and lines on the screen
sample_tokens = 0             # tokens of a sample shown at each evaluation; 0: none
sample_start = "\n"           # what the sample starts from
probe_interval = 100          # updates between probes, each with a copy of the weights for one step; 0: none
peak_flops = 0.0              # FLOP/s of a device, the base of MFU; 0: from its data sheet, or measured on a CPU
measure_comm = False          # many processes: measure exposed communication at evaluations, by six more passes
profile = ""                  # steps to trace with torch.profiler, such as 10:13
tracker = ""                  # wandb | trackio | tensorboard, besides metrics.jsonl
wandb_log = False             # nanoGPT's key: tracker=wandb
wandb_project = "owt"         # nanoGPT's key, also for trackio
wandb_run_name = "gpt2"       # nanoGPT's key, also for trackio

# guardrails: log, stop (exit code 1, nothing saved) or rewind (resume the last checkpoint and skip the bad batch)
on_nan = "stop"               # loss or gradient not finite; log: that update is skipped. With float16 the loss scaling
                              # skips a gradient that overflows, and that is no fault
on_spike = "log"              # loss or gradient norm far above the steps before
spike_z = 7.0                 # how far: standard deviations above the mean; 0: nothing is a spike
spike_window = 128            # steps that the mean and deviation are taken over; there are no spikes before
max_rewinds = 3               # to one checkpoint; then the run stops
skip_batches = ""             # skip these data steps, as a rewind does: 812,4077

# checkpoints: the latest and the best are always kept
always_save_checkpoint = True  # false: keep only these two
keep_checkpoints = 3          # how many of the latest are kept otherwise
save_interval = 0             # updates between checkpoints; 0: only at evaluations
save_minutes = 10.0           # at most this many minutes between checkpoints; 0: no limit
checkpoint_format = "plain"   # plain | sharded: each rank writes its own part, where gathering on one rank hurts

# the machine
device = "auto"               # auto | cpu | cuda | cuda:N | mps
dtype = "auto"                # auto | float32 | bfloat16 | float16 (with loss scaling)
fp8 = False                   # multiply the blocks' matrices in FP8 (float8.py); a CPU emulates it, slowly
fp8_ends = True               # with fp8: those of the first and the last block too
tf32 = False                  # CUDA: multiply float32 matrices in TF32 (10 bits of mantissa), several times faster
sdpa = "auto"                 # CUDA: the kernel of PyTorch's attention: cudnn | flash | efficient | math | auto
compile: bool | None = None   # torch.compile; none: on CUDA
threads = 0                   # CPU threads; 0: torch's choice
deterministic = False         # bit-identical on CUDA too, at some cost in speed

# many processes, under torchrun
zero_stage = 0                # 0: DDP; 1, 2, 3: fully_shard splits optimizer and gradients, 3 the weights as well
tp_size = 1                   # tensor parallelism: ranks that split each layer's heads and hidden units
pp_size = 1                   # pipeline parallelism: ranks that hold the layers, one after another
pp_schedule = "1f1b"          # gpipe | 1f1b | interleaved: the order of the micro-batches through the pipeline
cpu_offload = False           # with zero_stage: the shards wait in pinned CPU memory
activation_checkpointing = "none"  # none | selective (attention, MLP) | full: recompute these in the backward pass
backend = "nccl"              # communication between GPUs: nccl | gloo; CPUs use gloo
# -----------------------------------------------------------------------------


def main(c, given, stop, lock, rewound=None):
    """One run, from its settings to its exit code.

    `given` names the settings that the user set, `stop` is the StopSignal, and `lock` is the FolderLock of out_dir.
    After a rewind, `rewound` lists the data steps to skip. Raises guard.Diverged if the run is lost, and guard.Rewind
    if it has to begin again at its last checkpoint.
    """
    with start.one_line_errors():
        # ---- the machine and the grid of processes -------------------------------------------
        start.check_settings(c)
        machine = start.prepare_machine(c)
        layout = Layout(machine.device, backend=c.backend, zero_stage=c.zero_stage, tp_size=c.tp_size,
                        pp_size=c.pp_size, pp_schedule=c.pp_schedule, cpu_offload=c.cpu_offload,
                        activation_checkpointing=c.activation_checkpointing)
        profiler = Profiler(c.profile, machine.device, c.out_dir, c.max_iters, layout.rank == 0)

        # ---- where the run begins: from scratch, at its checkpoint, or at another model ------
        origin = find_origin(c, layout, lock, rewound)
        data = start.open_data(c.dataset)
        read_other_model(c, origin)
        c = adopt_sizes(c, given, origin)
        c = start.adopt_rows(c, given, data)
        model_config = make_model_config(c, origin, data)
        layout.check(model_config, machine.dtype)
        c, budget = start.settle_batch(c, origin, model_config, layout, machine)
        start.open_splits(c, data, model_config.vocab_size, layout)
        state = start.first_state(c, origin, model_config, budget, data, layout, machine)
        changed = check_origin(c, origin, state, model_config, data)
        state |= origin.progress
        run = Run(c.out_dir, writes=layout.rank == 0, state=state)
        if origin.is_finished(c):
            run.say(f"nothing to do: {origin.folder} has all {c.max_iters:,} steps")
            return 0

        # ---- model and optimizer, placed on the ranks ----------------------------------------
        torch.manual_seed(c.seed)
        model = GPT(model_config).to(machine.device)  # the same on every rank, and whole until it is placed
        origin.load_weights(model, c)
        costs = Costs(model, c.block_size)
        start.use_float8(c, model)
        model = layout.place(model, machine.context, machine.dtype)
        opt = make_optimizer(c, model, layout, machine)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        judge = guard.Guard(c.spike_z, c.spike_window, scaler.is_enabled(), origin.guard_window, c.on_nan, c.on_spike)
        origin.restore(opt, scaler, layout)

    if c.eval_only:  # writes nothing
        result = validation_loss(c, layout, data.val, machine.context)
        run.say(evaluation_line(result, data.unit))
        return 0

    # ---- what the run leaves behind ----------------------------------------------------------
    with start.one_line_errors():
        loader = Loader(
            data.train, c.block_size, c.batch_size, accumulation=layout.accumulation, seed=c.seed,
            rank=layout.dp_rank, world=layout.dp, first_step=state["step"], skipped=origin.skipped,
            prefetch=c.prefetch, threads=c.loader_threads, pin=machine.device.type == "cuda",
        )
        start.open_run(c, run, lock, layout, origin, data, machine)
        watch = guard.Watch(run.warn)
        saver = Saver(c, layout, opt, scaler, judge, state, run, watch, costs.weights)
    measure = Measure(c, layout, machine, data, run, costs)
    start.announce_run(c, run, origin, changed, budget, measure)
    saver.watch_disk()
    start.start_tracker(c, run)

    # ---- the steps ---------------------------------------------------------------------------
    bad_end_noted = guard.bad_end_noted(c, run, saver, layout, origin.skipped, profiler, stop)
    with closing(loader), start.full_memory_explained(c), bad_end_noted:
        clock = time.perf_counter()
        warmup.compile_model(c, layout, measure, loader, opt, state["step"])
        warmup.settle_buckets(c, layout, measure, loader, opt, state["step"])
        state["wall_s"] += time.perf_counter() - clock

        stop.listen()
        saved, val_loss = True, None
        if origin.unevaluated:  # the run ended between a checkpoint and its evaluation
            val_loss = measure.evaluate_step(origin.unevaluated, saver, saved=True)
        first_step, first_wall_s = state["step"], state["wall_s"]
        timer, pace = StepTimer(machine.device), Pace()
        unread = []  # (loss, gradient norm) of the steps since the last record, still on the device
        last_save = time.monotonic()
        while state["step"] < c.max_iters:
            step = state["step"]
            probing = c.probe_interval and (step + 1) % c.probe_interval == 0
            with pace.aside():
                run.say_lines(profiler.after(step))
            timer.start()
            lr = learning_rate_at(c, step)
            opt.set_lr(lr / c.learning_rate)

            # the gradient of the update, accumulated over micro-batches and ranks
            micro_losses = []
            for micro in range(layout.passes):
                batch = layout.next_batch(loader)  # (batch_size, block_size) token ids
                batch = measure.to_device(batch, step, loader.pin)
                timer.mark("data_ms")
                seed_dropout(c, layout, step, micro)
                micro_losses.append(layout.forward_backward(batch, micro, scaler, timer))
            layout.reduce_gradients()

            # the update
            scaler.unscale_(opt)  # does nothing except in float16
            norm = layout.grad_norm()
            if c.on_nan == "log":
                opt.found_inf = (~norm.isfinite()).float()  # stays on the device: nobody waits for it
            if probing:
                update = timer.aside("optim_ms", lambda: Update(model, layout.group_norms))
            if c.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), c.grad_clip, norm)
            scaler.step(opt)
            scaler.update()
            if probing:
                timer.aside("optim_ms", update.end)
            opt.zero_grad()
            timer.mark("optim_ms")
            unread.append((torch.stack(micro_losses).mean(), norm))
            state["step"] = step = step + 1
            pace.steps += 1
            if step == first_step + 2:  # the first step is slower than the rest
                seconds = sum(timer.read().values()) / 1000 * (c.max_iters - step)
                run.say_lines([f"time        about {clock_face(seconds)} to go"])

            # what is due now?
            last = step == c.max_iters
            log_due = step % c.log_interval == 0 or last or probing
            eval_due = step % c.eval_interval == 0 or last
            save_due = (c.save_interval and step % c.save_interval == 0
                        or c.save_minutes and time.monotonic() - last_save > 60 * c.save_minutes)
            save_due, stop.agreed = layout.agree(bool(save_due), stop.signum)  # once: both can change at any moment
            if not (log_due or eval_due or save_due or stop.agreed):
                continue

            # read and judge the losses: from here on the device has finished the step
            steps_read = range(step + 1 - len(unread), step + 1)
            losses = layout.mean(torch.stack([loss for loss, _ in unread])).tolist()
            norms = torch.stack([norm for _, norm in unread]).tolist()
            unread = []
            parts = timer.read()
            seconds, steps = pace.read()
            state["wall_s"] += seconds
            step_ms = (1000 * seconds - parts.get("probe_ms", 0.0)) / steps
            for past_step, loss, grad_norm in zip(steps_read, losses, norms, strict=True):
                outcome = measure.outcome(past_step, state["wall_s"], loss, grad_norm)
                judge.check(outcome, data_step(past_step - 1, origin.skipped), run)
            watch.step(step, parts)

            # log, save, evaluate; loss and grad_norm are now those of this step
            with pace.aside():
                inside = measure.look_inside(update) if probing else {}
            if log_due or eval_due:
                record = measure.record(step, state["wall_s"], loss, lr, grad_norm, step_ms, parts)
                record |= inside
                if not eval_due:
                    measure.log(record)
                saver.poll()
            saved = False
            if eval_due or save_due or stop.agreed:
                with pace.aside():
                    if not layout.weights_are_finite():
                        raise guard.Diverged(step, "a weight is not finite")
                    saved = saver.save(record if eval_due else None)  # before anything that may fail or be interrupted
                    last_save = time.monotonic()
                    if eval_due:
                        comm = {}
                        if c.measure_comm and layout.world > 1:
                            comm = measure.communication(loader, opt, profiler, step)
                        val_loss = measure.evaluate_step(record, saver, saved, **comm)
                    if last or stop.agreed:
                        saved = saver.wait() and saved
            if stop.agreed:
                return stop_early(c, run, stop.agreed, saved)

    saved = saver.wait() and saved
    run.say_lines(profiler.after(state["step"]))
    seconds = state["wall_s"] - first_wall_s
    summary = f"trained {state['step'] - first_step:,} steps in {seconds:.1f} s; val loss {val_loss:.4f}"
    return end_run(c, run, summary, saved, data.tokenizer)


# -----------------------------------------------------------------------------
# Steps of main


def make_optimizer(c, model, layout, machine):
    """AdamW, or AdamW and Muon, for what this rank trains."""
    bfloat16 = c.muon_dtype == "bfloat16"
    if c.muon_dtype == "auto":
        bfloat16 = machine.dtype == torch.bfloat16
    return Optimizers(
        model, optimizer=c.optimizer, learning_rate=c.learning_rate, betas=(c.beta1, c.beta2),
        weight_decay=c.weight_decay, muon_learning_rate=c.muon_learning_rate, muon_momentum=c.muon_momentum,
        muon_even_rows=c.muon_even_rows, muon_dtype=torch.bfloat16 if bfloat16 else torch.float32,
        **layout.optimizer_options(),
    )


def learning_rate_at(c, step):
    """AdamW's learning rate of the update that follows `step` updates."""
    return lr_at(
        step, learning_rate=c.learning_rate, min_lr=c.min_lr,
        schedule=c.lr_schedule if c.decay_lr else "constant", warmup_iters=c.warmup_iters if c.decay_lr else 0,
        lr_decay_iters=c.lr_decay_iters or c.max_iters, decay_frac=c.wsd_decay_frac,
    )


def end_run(c, run, summary, saved, tokenizer):
    """Note that the run has all its steps, and say what comes next. -> the exit code"""
    run.event("end", step=run.state["step"], wall_s=run.state["wall_s"])
    if not saved:
        run.say(f"{summary}; the last checkpoint could not be saved (the reason is above)")
        return 1
    script = "chat.py" if tokenizer and tokenizer.template else "sample.py"
    flag = "" if tokenizer else " --tokenizer=FILE"
    run.say(f"{summary}; next: python {script} {shlex.quote(f'--out_dir={c.out_dir}')}{flag}")
    return 0


def stop_early(c, run, signum, saved):
    """Note that a signal ended the run, and say how to resume it. -> the exit code"""
    name = signal.Signals(signum).name
    run.event("stop", step=run.state["step"], reason=name)
    how = "saved; resume" if saved else "not saved; resume the last checkpoint, if there is one,"
    run.say(f"\nstopped by {name} after step {run.state['step']}, {how} with "
            f"--init_from=resume {shlex.quote(f'--out_dir={c.out_dir}')}")
    return 128 + signum


class StopSignal:
    """Remembers SIGINT, SIGTERM or SIGHUP (the terminal was closed), so that the run can finish its step and save it.

    A second signal ends the process immediately. A signal that comes while a rewind sets the run up again is not lost.
    """

    def __init__(self):
        self.signum = 0  # the signal that this process got
        self.agreed = 0  # the signal that all ranks stop for
        self.handlers = {}  # signal -> its handler before listen

    def listen(self):
        """Begin to remember signals. In a thread, where Python handles no signals, this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        signums = {signal.SIGINT, signal.SIGTERM}
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signums.add(signal.SIGHUP)
        for signum in signums - self.handlers.keys():
            self.handlers[signum] = signal.signal(signum, self.caught)

    def caught(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)

    def put_back(self):
        """Restore the old handlers: in a notebook the process outlives the run."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self.handlers = {}


def run_until_done(c, given):
    """Call main, and call it again after each rewind; it then sets the run up as for a resume. -> the exit code"""
    stop = StopSignal()
    lock = FolderLock(c.out_dir, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    rewound = None
    try:
        while True:
            try:
                return main(c, given, stop, lock, rewound)
            except guard.Diverged:
                return 1
            except guard.Rewind as rewind:
                if stop.agreed:
                    return 128 + stop.agreed
                c, rewound = rewind.settings, rewind.skipped
            start.free_last_run()
    finally:
        stop.put_back()
        lock.let_go()


if __name__ == "__main__":
    given = set()
    c = Settings(configure(globals(), given=given))
    try:
        with all_fail_together(), start.full_memory_explained(c):
            sys.exit(run_until_done(c, given))
    except KeyboardInterrupt:  # before the loop, which has StopSignal
        sys.exit(130)
    except (checkpoint.CheckpointError, DataError, start.FullMemory) as e:
        fail(e)
