"""
Where a run begins: from scratch, at its own last checkpoint, or at another model.

find_origin decides that. check_origin refuses a checkpoint of another run, and a model that does not fit the settings.
"""

import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

import checkpoint
from configurator import fail, nearest
from foreign.pretrained import TABLES, add_rows, read_model
from loader import data_step
from model import GPTConfig
from training.guard import parse_steps, read_skipped

# these must be the same on resume, and so must the model's shape: otherwise it would be another run
MUST_MATCH = ("seed", "dataset_sha256", "train_tokens", "optimizer")

WORDS = ("scratch", "resume", "auto")  # what init_from may be besides a model
AUTO = "auto:"  # before a model: start from it, or resume a run that did

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
    old_tokens: int = 0  # rows of the other model's tables that are trained; the rest begins as their mean

    @property
    def resumes(self):
        return self.folder is not None

    def size(self, field):
        """A field of the GPTConfig of the checkpoint or the other model; from scratch 0."""
        if self.resumes:
            return self.state["model"][field]
        return getattr(self.model.config, field) if self.model else 0

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
        if not self.resumes:
            return {}
        return {key: self.state[key] for key in ("step", "wall_s", "metrics_bytes")}

    def is_finished(self, c):
        """Whether there is nothing left to do."""
        if not self.resumes or c.eval_only:
            return False
        return self.state["step"] >= c.max_iters and not self.unevaluated

    def load_weights(self, model, c):
        """Copy the weights of the checkpoint or the other model into `model`. From scratch, it keeps its own."""
        if self.resumes:
            checkpoint.load_model(model, self.folder)
        elif self.model:
            tensors = self.model.state_dict()
            if c.pos == "learned":  # a shorter context takes the first positions
                positions = tensors["transformer.wpe.weight"]
                tensors["transformer.wpe.weight"] = positions[: model.config.block_size]
            for name in TABLES:
                if name in tensors and self.old_tokens:  # there may be more rows, or fewer that pad
                    table = torch.zeros(model.config.padded_vocab_size, tensors[name].size(1))
                    table[: self.old_tokens] = tensors[name][: self.old_tokens]
                    tensors[name] = table
            model.load_state_dict(tensors)
            if self.old_tokens:
                add_rows(model, self.old_tokens, model.config.vocab_size)
            self.model = None  # free its memory

    def restore(self, opt, scaler, layout):
        """Give the optimizer and the loss scaler the state of the checkpoint."""
        if self.resumes:
            opt.load_state_dict(layout.load_optimizer_state(self.folder))
            if self.state["scaler"]:
                scaler.load_state_dict(self.state["scaler"])


def find_origin(c, layout, lock, rewound=None):
    """Rank 0 decides where the run begins and which batches it skips. -> Origin; read_other_model adds a model"""
    if not c.eval_only:
        # first of all: a checkpoint of a process that is still training must not be judged, or set aside
        layout.on_rank0(lambda: lock.take(create=False))
    folder_and_state = layout.on_rank0(lambda: checkpoint_to_resume(c, rewound))
    origin = Origin(*folder_and_state) if folder_and_state else Origin()
    if origin.resumes:
        checkpoint.config_of(origin.state, origin.folder)  # refuses a model that this code does not know
        refuse_foreign_model(c, origin.state)
    origin.skipped = layout.on_rank0(lambda: batches_to_skip(c, origin.state, rewound))
    return origin


def refuse_foreign_model(c, saved):
    """Ends the run if export.py made the checkpoint from a model of another project: it holds no training."""
    if "seed" not in saved:
        source = saved["config"].get("init_from") or "elsewhere"
        fail(f"{c.out_dir} holds a model from {source} and no training to resume: "
             f"start from it with {shlex.quote(f'--init_from={c.out_dir}')} and another --out_dir")


def checkpoint_to_resume(c, rewound=None):
    """(folder, state) of the checkpoint to resume, or None to begin. Ends the run if init_from forbids that."""
    steps = checkpoint.steps(c.out_dir)
    may_resume = c.init_from in ("resume", "auto") or c.init_from.startswith(AUTO)
    if may_resume and steps and c.eval_only:
        return checkpoint.find(c.out_dir)
    if may_resume or rewound:
        latest = checkpoint.latest_good(c.out_dir, warn=warn)
        if latest is None and c.init_from == "resume":
            fail(f"nothing to resume: {c.out_dir} holds no checkpoint; "
                 "--init_from=scratch begins a run, auto resumes one or begins one")
        return latest
    if c.init_from not in WORDS and not os.path.exists(c.init_from):
        if mend := nearest(c.init_from, WORDS):
            fail(f"init_from={c.init_from!r} is no model to start from{mend}")
    if steps:
        fail(f"{c.out_dir} already holds a run (step {max(steps)}): continue it with --init_from=resume, "
             "or begin in another --out_dir")
    return None


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def batches_to_skip(c, saved, rewound=None):
    """The data steps to skip, sorted: from the settings, the checkpoint's state `saved`, and a rewind. Ends the run if
    the settings name one that the checkpoint was trained on already."""
    asked = parse_steps(c.skip_batches)
    steps_done = saved["step"] if saved else 0
    before = saved.get("skipped", []) if saved else []
    last_seen = data_step(steps_done - 1, before)
    for batch in asked:
        if batch not in before and batch <= last_seen:
            fail(f"skip_batches={c.skip_batches}: {c.out_dir} resumes at step {steps_done}, "
                 f"which has seen data step {batch}")
    since = rewound or []
    if not rewound and (saved or c.init_from.startswith("auto")):
        since = read_skipped(c.out_dir)  # a rewind after the checkpoint, and then the run was killed
    return sorted({*asked, *before, *since})


def read_other_model(c, origin):
    """Read the model that init_from names, if the run begins at one. Raises ValueError."""
    if not origin.resumes and c.init_from not in ("scratch", "auto"):
        origin.model, origin.tokenizer = read_model(c.init_from.removeprefix(AUTO))[:2]


def adopt_sizes(c, given, origin):
    """Model settings that the user did not set come from the checkpoint or the other model. -> c with these

    `given` names the settings that the user set.
    """
    if origin.resumes:
        sizes = origin.state["model"]
    elif origin.model:
        sizes = asdict(origin.model.config)
    else:
        return c
    own = {*given, *FREE_FIELDS, "vocab_size"}  # the dataset says vocab_size
    return c.changed(**{key: value for key, value in sizes.items() if key not in own})


def make_model_config(c, origin, data):
    """The GPTConfig of the settings, with the vocab_size of the dataset if the settings have none.

    A model that is fine-tuned on rows of conversations keeps its context if that is longer. If the dataset's tokenizer
    is the other model's with more special tokens, the model gets rows for them.
    """
    sizes = {f.name: c[f.name] for f in fields(GPTConfig)}
    sizes["vocab_size"] = c.vocab_size or data.vocab_size
    if data.row_size:
        sizes["block_size"] = max(c.block_size, origin.size("block_size"))
    if origin.model and origin.tokenizer and extends(data.tokenizer, origin.tokenizer):
        origin.old_tokens = origin.tokenizer.vocab_size
    if data.row_size and not c.vocab_size:  # a vocabulary that was padded stays so
        sizes["vocab_size"] = max(data.vocab_size, origin.size("vocab_size"))
    return GPTConfig(**sizes)


def extends(tokenizer, other):
    """Whether `tokenizer` is `other` with more special tokens behind its own."""
    if tokenizer is None or tokenizer.kind != other.kind or tokenizer.ordinary != other.ordinary:
        return False
    if {**tokenizer.fields(), "specials": None} != {**other.fields(), "specials": None}:
        return False
    return other.special_tokens.items() < tokenizer.special_tokens.items()


def same_ids(tokenizer, other):
    """Whether both give every text the same ids: they may differ in their chat template alone."""
    return tokenizer.changed(template=None).sha256 == other.changed(template=None).sha256


def check_origin(c, origin, state, model_config, data):
    """Ends the run if the checkpoint is another run's, or the other model does not fit the settings.

    -> {key: [before, now]} of the settings that have changed since the checkpoint, and may
    """
    if origin.resumes:
        return check_resume(c, origin.state, state)
    if origin.model:
        check_other_model(c, origin, model_config, data.tokenizer)
    return {}


def check_resume(c, saved, state):
    """Ends the run if `saved`, the checkpoint's state, is another run's. -> as check_origin"""
    # a field of the model that an older checkpoint does not have gets its default
    before = {**saved, **asdict(GPTConfig()), **saved["model"]}
    now = {**state, **asdict(GPTConfig()), **state["model"]}
    for key in (*MUST_MATCH, *state["model"]):
        if before.get(key) != now[key] and key not in FREE_FIELDS:
            fail(f"cannot resume {c.out_dir}: it was trained with {key}={before.get(key)}, "
                 f"now it is {now[key]}; set it back, or begin in another --out_dir")
    check_sequences(c, saved, state)
    changed = {}
    for key, value in state["config"].items():
        if saved["config"].get(key, value) != value and key not in ("init_from", "out_dir"):
            changed[key] = [saved["config"][key], value]
    # with another one of these the run is the same up to rounding, and dropout drops other activations
    for key in ("threads", "dtype", "ranks", "batch_size", "gradient_accumulation_steps"):
        if saved.get(key) != state[key]:
            changed[key] = [saved.get(key), state[key]]
    return changed


def check_sequences(c, saved, state):
    """Ends the run if an update has another number of sequences than before. It may be cut into other micro-batches."""
    before = saved["batch_size"], saved["gradient_accumulation_steps"]
    now = state["batch_size"], state["gradient_accumulation_steps"]
    if math.prod(before) != math.prod(now):
        fail(f"cannot resume {c.out_dir}: it was trained with batch_size x gradient_accumulation_steps "
             f"= {before[0]} x {before[1]}, now it is {now[0]} x {now[1]}; "
             "their product must stay: set it back, or begin in another --out_dir")


def check_other_model(c, origin, model_config, tokenizer):
    """Ends the run if another model's weights, even of the same shape, would mean something else in this one."""
    theirs = origin.model.config
    for key, value in asdict(model_config).items():
        their_value = getattr(theirs, key)
        if their_value == value or key in (*FREE_FIELDS, "rope_scaling", "rope_factor"):
            continue
        if key == "vocab_size" and origin.old_tokens and value > their_value:
            continue
        if key == "block_size" and (c.pos == "rope" or value < their_value):
            continue
        fail(f"init_from={c.init_from}: that model has {key}={their_value}, this one {value}")
    # both must stretch the same context, the one that the model was first trained at
    first = round(theirs.block_size / theirs.rope_factor)
    stretched = round(model_config.block_size / model_config.rope_factor)
    if c.rope_scaling == "yarn" and first != stretched:
        fail(f"rope_scaling='yarn': block_size={c.block_size} must be rope_factor={c.rope_factor} "
             f"times {first}, which {c.init_from} was first trained at")
    if tokenizer and not origin.tokenizer:
        warn(f"{c.init_from} does not say which tokenizer it has; it should be that of {c.dataset}")
    elif tokenizer and not origin.old_tokens and not same_ids(tokenizer, origin.tokenizer):
        fail(f"init_from={c.init_from}: its tokenizer is not that of {c.dataset}, "
             "so the same ids are other text")
