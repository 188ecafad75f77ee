"""
Where a run begins: from scratch, at its own last checkpoint, or at another model; and whether that may be.
"""

import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import checkpoint
from configurator import fail, nearest
from loader import data_step
from model import GPTConfig
from training.guard import parse_steps, read_skipped
from training.pretrained import read_model

# these must be the same on resume, besides the model's shape: otherwise it would be another run
MUST_MATCH = ("seed", "dataset_sha256", "train_tokens", "optimizer")

# fields of the model that may differ from the checkpoint: they change no weight's meaning
FREE_FIELDS = ("dropout", "attn")


@dataclass
class Origin:
    """Where a run begins: at its own checkpoint `folder` with that `state`, at another `model`, or from scratch."""

    folder: Any = None
    state: Any = None
    model: Any = None
    tokenizer: Any = None  # the other model's
    skipped: list = field(default_factory=list)  # data steps to skip

    @property
    def resumes(self):
        return self.folder is not None

    @property
    def guard_window(self):
        """The guard's state at the checkpoint, or None."""
        return self.state.get("guard") if self.resumes else None

    @property
    def unevaluated(self):
        """The record of the checkpoint's step, if the run ended before that step was evaluated."""
        return self.state.get("unevaluated") if self.resumes else None

    @property
    def progress(self):
        """How far the run had come, as fields of its state."""
        return {key: self.state[key] for key in ("step", "wall_s", "metrics_bytes")} if self.resumes else {}

    def is_finished(self, c):
        """Whether there is nothing left to do."""
        if not self.resumes or c.eval_only:
            return False
        return self.state["step"] >= c.max_iters and not self.unevaluated

    def load_weights(self, model, c):
        """Put the weights that the run begins with into `model`; from scratch it keeps its own."""
        if self.resumes:
            checkpoint.load_model(model, self.folder)
        elif self.model:
            tensors = self.model.state_dict()
            if c.pos == "learned":  # a shorter context takes the first positions
                tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][: c.block_size]
            model.load_state_dict(tensors)
            self.model = None  # free its memory

    def restore(self, opt, scaler, layout):
        """Give the optimizer and the loss scaler the state of the checkpoint."""
        if self.resumes:
            opt.load_state_dict(layout.load_optimizer_state(self.folder))
            if self.state["scaler"]:
                scaler.load_state_dict(self.state["scaler"])


def find_origin(c, layout, lock, rewound=None):
    """Where the run begins, agreed between the ranks, and which batches it skips. -> Origin, without another model."""
    if not c.eval_only:
        layout.on_rank0(lambda: lock.take(create=False))  # before this process judges another one's checkpoint
    found = layout.on_rank0(lambda: checkpoint_to_resume(c, rewound))
    origin = Origin(*found) if found else Origin()
    if origin.resumes:
        checkpoint.config_of(origin.state, origin.folder)  # refuses a model that this code does not know
    origin.skipped = layout.on_rank0(lambda: batches_to_skip(c, origin.state, rewound))
    return origin


def checkpoint_to_resume(c, rewound=None):
    """(folder, state) of the checkpoint to resume, or None to begin. Ends the run where init_from forbids it."""
    steps = checkpoint.steps(c.out_dir)
    if c.init_from in ("resume", "auto") and steps and c.eval_only:
        return checkpoint.find(c.out_dir)
    if c.init_from in ("resume", "auto") or rewound:
        good = checkpoint.latest_good(c.out_dir, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
        if good is None and c.init_from == "resume":
            fail(f"nothing to resume: {c.out_dir} holds no checkpoint; --init_from=scratch begins, auto does either")
        return good
    words = ("scratch", "resume", "auto")
    if c.init_from not in words and not os.path.exists(c.init_from) and (mend := nearest(c.init_from, words)):
        fail(f"init_from={c.init_from!r} is no model to start from{mend}")
    if steps:
        fail(f"{c.out_dir} already holds a run (step {max(steps)}): continue it with --init_from=resume, "
             "or begin in another --out_dir")
    return None


def batches_to_skip(c, saved, rewound=None):
    """Data steps to skip, rising: the settings', the resumed run's, and those of a rewind. Ends the run where one of
    the settings' was trained on already."""
    asked = parse_steps(c.skip_batches)
    before = saved.get("skipped", []) if saved else []
    last_seen = data_step((saved["step"] if saved else 0) - 1, before)
    for batch in asked:
        if batch not in before and batch <= last_seen:
            fail(f"skip_batches={c.skip_batches}: {c.out_dir} resumes at step {saved['step']}, which has seen data "
                 f"step {batch}")
    if rewound:
        since = rewound
    else:
        since = read_skipped(c.out_dir) if saved or c.init_from == "auto" else []
    return sorted({*asked, *before, *since})


def read_other_model(c, origin):
    """Read the model that init_from names, if the run begins at one. Raises ValueError."""
    if not origin.resumes and c.init_from not in ("scratch", "auto"):
        origin.model, origin.tokenizer = read_model(c.init_from)[:2]


def adopt_sizes(c, given, origin):
    """Settings of the model that nobody `given` come from the checkpoint or the model that the run begins at."""
    if origin.resumes:
        sizes = origin.state["model"]
    elif origin.model:
        sizes = asdict(origin.model.config)
    else:
        return c
    own = {*given, *FREE_FIELDS, "vocab_size"}  # the dataset says vocab_size
    return c.changed(**{key: value for key, value in sizes.items() if key not in own})


def check_origin(c, origin, state, model_config, data):
    """Ends the run where what it begins at is another run, or a model of another meaning. -> {key: [before, now]} of
    the settings that changed since the checkpoint, and may."""
    if origin.resumes:
        return check_resume(c, origin.state, state)
    if origin.model:
        check_other_model(c, origin, model_config, data.tokenizer)
    return {}


def check_resume(c, saved, state):
    """Ends the run where the saved one was another; -> {key: [before, now]} of what changed and may."""
    if "seed" not in saved:  # export.py made it of a model from elsewhere
        source = saved["config"].get("init_from") or "elsewhere"
        fail(f"{c.out_dir} holds a model from {source} and no training to resume: "
             f"start from it with {shlex.quote(f'--init_from={c.out_dir}')} and another --out_dir")
    # a field of the model that the checkpoint does not know has its default
    before = {**saved, **asdict(GPTConfig()), **saved["model"]}
    now = {**state, **asdict(GPTConfig()), **state["model"]}
    for key in (*MUST_MATCH, *state["model"]):
        if before.get(key) != now[key] and key not in FREE_FIELDS:
            fail(f"cannot resume {c.out_dir}: it was trained with {key}={before.get(key)}, now it is {now[key]}; "
                 "set it back, or begin in another --out_dir")
    sequences = [s["batch_size"] * s["gradient_accumulation_steps"] for s in (saved, state)]
    if sequences[0] != sequences[1]:  # an update may be cut into other micro-batches
        products = [f"{s['batch_size']} x {s['gradient_accumulation_steps']}" for s in (saved, state)]
        fail(f"cannot resume {c.out_dir}: it was trained with batch_size x gradient_accumulation_steps = {products[0]},"
             f" now it is {products[1]}; their product must stay: set it back, or begin in another --out_dir")
    changed = {}
    for key, value in state["config"].items():
        if saved["config"].get(key, value) != value and key not in ("init_from", "out_dir"):
            changed[key] = [saved["config"][key], value]
    # these are equal to rounding only, and the micro-batch decides which activations dropout drops
    for key in ("threads", "dtype", "ranks", "batch_size", "gradient_accumulation_steps"):
        if saved.get(key) != state[key]:
            changed[key] = [saved.get(key), state[key]]
    return changed


def check_other_model(c, origin, model_config, tokenizer):
    """Ends the run where another model's weights, though of the same shape, would mean something else in this one."""
    theirs = origin.model.config
    for key, value in asdict(model_config).items():
        their_value = getattr(theirs, key)
        if their_value == value or key in (*FREE_FIELDS, "rope_scaling", "rope_factor"):
            continue
        if key == "block_size" and (c.pos == "rope" or value < their_value):
            continue
        fail(f"init_from={c.init_from}: that model has {key}={their_value}, this one {value}")
    first, here = (round(config.block_size / config.rope_factor) for config in (theirs, model_config))
    if c.rope_scaling == "yarn" and first != here:
        fail(f"rope_scaling='yarn': block_size={c.block_size} must be rope_factor={c.rope_factor} times {first}, which "
             f"{c.init_from} was first trained at")
    if tokenizer and not origin.tokenizer:
        print(f"warning: {c.init_from} says nothing of its tokenizer, which should be that of {c.dataset}",
              file=sys.stderr)
    elif tokenizer and origin.tokenizer.sha256 != tokenizer.sha256:
        fail(f"init_from={c.init_from}: its tokenizer is not that of {c.dataset}, so the same ids are other text")
