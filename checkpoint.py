"""
Checkpoints: write, verify, find and read.

    out_dir/ckpt/step_00001000/
        model.safetensors   plain, unprefixed names; a tied head stored once
        optimizer.pt        tensors by parameter name, readable with torch.load(weights_only=True)
        state.json          step, config, data position, metrics length, ..., the sha256 of each file and its own

A checkpoint is written beside its place, synced and then renamed, so a folder of that name is complete, and a kill at
any instant leaves the one before it whole. It is written before its step is evaluated: state.json then holds the
step's record as "unevaluated", and val_loss is added once it is known (`note`). Nothing read from a checkpoint is ever
executed.

Where gathering the model on one rank hurts, checkpoint_format="sharded" has each rank write what lies on it, by
torch.distributed.checkpoint (DCP) in its safetensors storage: shard-0000R-model-00001-of-00001.safetensors instead of
the two files, with tensors named model/NAME, adamw/NAME/exp_avg, ... and in each header where in the whole they belong.
That storage keeps no pickled index. Where tensor parallelism split attention by heads, those of c_attn lie in the order
that state.json gives as "heads". They are written while the training goes on, from a copy in CPU memory. Such a run is
read and resumed like any other, and made a plain one with

    python checkpoint.py consolidate out/mine
"""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import threading
import warnings
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import configure, fail
from model import GPTConfig

# -----------------------------------------------------------------------------
what = ""                     # consolidate: the sharded checkpoints of runs become plain ones
runs: tuple[str, ...] = ()    # their folders, as bare words
# -----------------------------------------------------------------------------

NAME = re.compile(r"step_(\d{8,})")
FILES = ("model.safetensors", "optimizer.pt")
SHARD = re.compile(r"shard-\d{5,}-.*\.safetensors")  # DCP's name for what one rank writes


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class MissingOptimizer(CheckpointError):
    """A checkpoint whose weights are good and whose optimizer.pt is missing, removed to save room perhaps."""


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(f)


def _digest(f):  # Python 3.10
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def own_sha256(state):
    """sha256 of state.json's content but for the field that holds it."""
    plain = {k: v for k, v in state.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sync(path):
    """Have the disk hold a file or a folder's entries. Windows cannot open folders and does not need to."""
    if os.name == "nt" and Path(path).is_dir():
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def model_tensors(model):
    """Name -> tensor on the CPU, without torch.compile's prefix, a tied head once."""
    return {
        name.removeprefix("_orig_mod."): p.detach().to("cpu").contiguous() for name, p in model.named_parameters()
    }


def save(out_dir, model, optimizers, state):
    """Write checkpoint `state["step"]`, which must be JSON values, and return its folder. Raises OSError (disk full)
    after removing what it wrote; checkpoints that exist stay as they are."""
    final = place(out_dir, state)
    if final.exists():
        return final  # this step was saved already, and a step has one outcome
    with writing(final):
        begin(final)
        write_plain(final, model, optimizers, state)
    return final


def place(out_dir, state):
    return Path(out_dir) / "ckpt" / f"step_{state['step']:08d}"


def beside_of(final):
    return final.with_name(f".writing_{final.name}")


@contextmanager
def writing(final):
    """Where it fails, what was written is removed, and the error is an OSError if a full disk or the like is behind."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as e:
        shutil.rmtree(beside_of(final), ignore_errors=True)
        if (cause := system_error(e)) is None:
            raise
        raise OSError(cause.errno, f"{final} could not be written: {cause.strerror or cause}") from e


def begin(final):
    """Make the folder beside `final`."""
    ckpt = final.parent
    ckpt.mkdir(parents=True, exist_ok=True)
    sync(ckpt.parent)  # which has new entries the first time
    for left in ckpt.glob(".writing_*"):  # by a run that was killed
        shutil.rmtree(left)
    beside_of(final).mkdir()


def write_plain(final, model, optimizers, state):
    beside = beside_of(final)
    save_file(model_tensors(model), beside / "model.safetensors", metadata={"format": "pt"})
    with open(beside / "optimizer.pt", "wb") as f:  # a file of Python's, whose errors say what happened
        torch.save(optimizers.state_dict(), f)
    finish(final, state, {name: file_sha256(beside / name) for name in FILES})


def finish(final, state, files):
    """Once the `files` (name -> sha256) are written: state.json, and the name that says it is complete."""
    beside = beside_of(final)
    state = json.loads(json.dumps({**state, "files": files}))  # as it will be read: tuples are lists
    state["sha256"] = own_sha256(state)
    (beside / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
    for name in (*files, "state.json"):
        sync(beside / name)
    sync(beside)
    if final.exists():  # as shards, which are these tensors
        final.rename(final.with_name(f"{final.name}.sharded"))
    os.replace(beside, final)
    sync(final.parent)


def note(folder, **fields):
    """Change fields of a complete checkpoint's state.json, which is whole at every instant. -> the new state. Raises
    OSError and CheckpointError."""
    folder = Path(folder)
    state = json.loads(json.dumps({**read_state(folder), **fields}))
    state["sha256"] = own_sha256(state)
    beside = folder / ".state.json"
    try:
        with open(beside, "w", encoding="utf-8") as f:
            json.dump(state, f, indent=1, sort_keys=True)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, folder / "state.json")
    finally:
        beside.unlink(missing_ok=True)
    sync(folder)
    return state


def discard(folder):
    """Remove a checkpoint. Half-removed it is no checkpoint either."""
    gone = folder.with_name(f".writing_{folder.name}")
    os.replace(folder, gone)
    shutil.rmtree(gone)


def system_error(e):
    """The OSError in what a full disk makes torch.save and safetensors raise; None where it is something else."""
    if match := re.search(r"\(os error (\d+)\)", str(e)):  # safetensors: "No space left on device (os error 28)"
        return OSError(int(match[1]), os.strerror(int(match[1])))
    causes = (e, e.__context__)  # torch.save: "unexpected pos", a RuntimeError met while handling the file's OSError
    return next((cause for cause in causes if isinstance(cause, OSError)), None)


def read_state(folder):
    """state.json of a checkpoint, verified against its own sha256. Raises CheckpointError."""
    path = Path(folder) / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        names = state["files"].keys()
        whole = set(FILES) <= names or names and all(map(SHARD.fullmatch, names))
        intact = state["sha256"] == own_sha256(state) and whole
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise CheckpointError(f"{path} is missing ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # another OSError says nothing of the checkpoint
        raise CheckpointError(f"{path} cannot be read ({type(e).__name__}: {e})") from None
    if not intact:
        raise CheckpointError(f"{path} was changed after it was written (sha256 differs)")
    return state


def verify(folder, only=None):
    """The state of a checkpoint, every file (or `only` one, of a plain one) checked. Raises CheckpointError naming the
    file."""
    state = read_state(folder)
    plain = set(FILES) <= state["files"].keys()
    for path in () if plain else Path(folder).glob("*.safetensors"):  # DCP would read them all
        if path.name not in state["files"]:
            raise CheckpointError(f"{path} is not of this checkpoint")
    for name in [only] if plain and only else FILES if plain else state["files"]:
        path = Path(folder) / name
        if not path.exists():  # the weights come first, and are good
            raise (MissingOptimizer if name == "optimizer.pt" else CheckpointError)(f"{path} is missing")
        try:
            digest = file_sha256(path)
        except OSError as e:
            if e.errno != errno.EIO:  # a bad sector is damage; too many open files, say, is not
                raise
            digest = None
        if digest != state["files"][name]:
            raise CheckpointError(f"{path} is damaged (sha256 differs from state.json)")
    if plain and only is None:
        load_optimizer_state(folder)  # a file with the right digest can still hold what weights_only refuses
    return state


def load_model_tensors(folder):
    """Name -> tensor. Raises CheckpointError."""
    if is_sharded(folder):
        return {name.removeprefix("model/"): t for name, t in load_shards(folder, weights=True).items()}
    path = Path(folder) / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path} cannot be read ({e})") from None


def load_optimizer_state(folder, params=None, heads=None):
    """As Optimizers.state_dict gave it. Raises CheckpointError, also for a pickle that asks for more than tensors. Of a
    sharded one with `params`, by name, whose c_attn have their `heads` in this order, what is theirs, as `load_shards`
    has it; all ranks call it."""
    if is_sharded(folder):
        state = {}
        for whole_name, t in load_shards(folder, weights=False, params=params, heads=heads).items():
            kind, name, key = whole_name.split("/")
            state.setdefault(kind, {}).setdefault(name, {})[key] = t
        return state
    path = Path(folder) / "optimizer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a damaged or malicious file
        raise CheckpointError(f"{path} is refused ({str(e).splitlines()[0]})") from None


def config_of(state, folder):
    """The GPTConfig of a checkpoint's model. Raises CheckpointError naming each field that this code does not know:
    without it, it would be another model."""
    if unknown := sorted(state["model"].keys() - {field.name for field in fields(GPTConfig)}):
        named = ", ".join(f"{name}={state['model'][name]}" for name in unknown)
        raise CheckpointError(f"{folder} holds a model with {named}, which this version does not know: take the "
                              "version that trained it (env.json names the commit)")
    try:
        return GPTConfig(**{**state["model"], "attn": "auto"})
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{folder} holds a model that this version does not know ({e})") from None


def run_of(folder):
    """The run's folder of a checkpoint's, itself where it is in none. The tokenizer lies there: also where ckpt/ is a
    link to another disk, or `folder` a link into a run."""
    places = [Path(folder), Path(os.path.abspath(folder)), Path(folder).resolve()]
    runs = [place.parent.parent for place in places if place.parent.name == "ckpt"]
    held = [run for run in runs if (run / "tokenizer.json").exists()]
    return (held or runs or [Path(folder)])[0]


def load_model(model, folder):
    """Put a checkpoint's weights into `model`. Raises CheckpointError naming the first parameter that does not fit."""
    tensors, params = load_model_tensors(folder), dict(model.named_parameters())
    for name in sorted(tensors.keys() | params.keys()):
        saved, own = tensors.get(name), params.get(name)
        if saved is None or own is None or saved.shape != own.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (saved, own)]
            raise CheckpointError(f"{folder}: {name} is {shapes[0]} there and {shapes[1]} in the model")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[name])


# -----------------------------------------------------------------------------
# Shards


def is_sharded(folder):
    return "model.safetensors" not in read_state(folder)["files"]


def shards(model, optimizers):
    """Name -> tensor of all that a checkpoint holds, as it lies on this rank."""
    tensors = {f"model/{name.removeprefix('_orig_mod.')}": p.detach() for name, p in model.named_parameters()}
    for kind, params in optimizers.state_dict().items():
        tensors |= {f"{kind}/{name}/{key}": t for name, values in params.items() for key, t in values.items()}
    return tensors


def save_sharded(out_dir, tensors, state, group=None):
    """As `save`, but all ranks call it, and each writes and digests what of the `shards` lies on it. Raises OSError on
    all of them where one fails. `out_dir` is on a disk that all ranks see."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    final, rank = place(out_dir, state), dist.get_rank() if dist.is_initialized() else 0
    if together(lambda: rank == 0 and final.exists(), group)[0]:
        return final
    with writing(final):
        together(lambda: rank == 0 and begin(final), group)
        with one_error():
            writer = HuggingFaceStorageWriter(str(beside_of(final)), save_distributed=True)
            save(tensors, storage_writer=writer, no_dist=not dist.is_initialized(), process_group=group)
        own = beside_of(final).glob(f"shard-{rank + 1:05d}-*")
        each = together(lambda: {path.name: file_sha256(path) for path in own}, group)
        files = {name: digest for digests in each for name, digest in digests.items()}
        together(lambda: rank == 0 and finish(final, state, files), group)
    return final


class Background:
    """Writes sharded checkpoints while the steps go on, one after the other. Each rank has one and calls the same; what
    the threads have to tell each other goes by a group of their own. The order of c_attn's `heads` is noted."""

    def __init__(self, heads=None):
        self.heads = heads
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread = self.error = self.step = None

    def save(self, out_dir, model, optimizers, state, keep):
        """Begin as soon as the one before is done: once this returns, what lies on this rank is copied to CPU memory,
        and model and optimizers may change. Prunes when all is written. Raises what `wait` does, before it begins."""
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        self.wait()
        copied = BlockingAsyncStager().stage(shards(model, optimizers))
        self.step, state = state["step"], deepcopy(state) | ({"heads": self.heads} if self.heads else {})
        self.thread = threading.Thread(target=self.write, args=(out_dir, copied, state, keep), daemon=True)
        self.thread.start()

    def write(self, out_dir, tensors, state, keep):
        try:
            save_sharded(out_dir, tensors, state, self.group)
            first = not dist.is_initialized() or dist.get_rank() == 0
            together(lambda: first and prune(out_dir, keep), self.group)
        except Exception as e:
            self.error = e

    def done(self):
        """Whether there is an outcome that nobody has asked for."""
        return self.thread is not None and not self.thread.is_alive()

    def wait(self):
        """Until all is written. Raises the OSError of what could not be, once, on all ranks."""
        if self.thread:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error:
            raise error


def together(function, group=None):
    """What `function` gives on each rank. Raises its OSError on all of them where it has one on any."""
    try:
        mine = function()
    except OSError as e:
        mine = e
    each = [mine]
    if dist.is_initialized():
        each = [None] * dist.get_world_size()
        dist.all_gather_object(each, mine, group=group)
    for one in each:
        if isinstance(one, OSError):
            raise one
    return each


@contextmanager
def one_error():
    """DCP tells every rank what failed on one, in an exception of its own: here it is what failed."""
    from torch.distributed.checkpoint import CheckpointException

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant to be one
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # DCP's own call, in torch 2.9 and on GPUs
    try:
        yield
    except CheckpointException as e:
        raise next(iter(e.failures.values()))[0] from None


def load_shards(folder, weights, params=None, heads=None):
    """Name -> tensor, of the weights or of the optimizer, whole and on the CPU. With `params`, by name, what is theirs,
    laid out as they are, but for a c_attn whose heads are in another order than `heads`; all ranks call it. Raises
    CheckpointError."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    written = read_state(folder).get("heads")
    try:
        with one_error():
            found, tensors = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata, {}
            for name, saved in found.items():
                p = params and params.get(name.split("/")[1])
                if name.startswith("model/") == weights and (params is None or p is not None):
                    same = p is not None and saved.size == p.shape and (written == heads or ".c_attn." not in name)
                    tensors[name] = torch.zeros_like(p.detach()) if same else \
                        torch.zeros(saved.size, dtype=saved.properties.dtype)
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)),
                 no_dist=params is None or not dist.is_initialized())
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise CheckpointError(f"{folder} cannot be read ({e})") from None
    if written and written != heads:
        tensors |= {name: by_heads(t, written) for name, t in tensors.items() if ".c_attn." in name and t.ndim}
    return tensors


def by_heads(tensor, heads):
    """A c_attn's rows by `heads` in this order, some of them twice -> by head as the model has them."""
    tensor = tensor.unflatten(0, (len(heads), -1))
    whole = tensor.new_empty(max(heads) + 1, *tensor.shape[1:])
    whole[heads] = tensor
    return whole.flatten(0, 1)


def consolidate(out_dir):
    """Make each sharded checkpoint of a run the plain one that it would have been. -> their folders. Raises
    CheckpointError for one that does not verify, and OSError; those that are left stay as they were."""
    for aside in (Path(out_dir) / "ckpt").glob("step_*.sharded"):
        if aside.with_suffix("").exists():
            shutil.rmtree(aside)
        else:  # a kill came between two renames
            aside.rename(aside.with_suffix(""))
    done = [folder for folder in steps(out_dir).values() if is_sharded(folder)]
    for folder in done:
        state, tensors, optimizer = verify(folder), load_model_tensors(folder), load_optimizer_state(folder)
        state.pop("heads", None)  # now as everywhere
        with writing(folder):
            begin(folder)
            write_plain(folder, SimpleNamespace(named_parameters=tensors.items),
                        SimpleNamespace(state_dict=lambda optimizer=optimizer: optimizer), state)
        shutil.rmtree(folder.with_name(f"{folder.name}.sharded"))
    return done


# -----------------------------------------------------------------------------
# Which there are


def steps(out_dir):
    """Step -> folder of every checkpoint of a run, rising. Half-written and corrupt ones have other names."""
    found = {}
    for folder in (Path(out_dir) / "ckpt").glob("step_*"):
        if match := NAME.fullmatch(folder.name):
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def latest_good(out_dir, warn=print):
    """(folder, state) of the highest step that verifies, or None where a run has no checkpoint.

    One that is damaged is renamed to *.corrupt, with a warning. Raises CheckpointError when there are checkpoints, or
    were before they were set aside, and none is good; also for one without its optimizer.pt, which is not damaged.
    """
    found = steps(out_dir)
    for step, folder in sorted(found.items(), reverse=True):
        try:
            return folder, verify(folder)
        except MissingOptimizer as e:
            before = [n for n, f in found.items() if n < step and
                      ((f / "optimizer.pt").exists() or not (f / "model.safetensors").exists())]  # plain, or sharded
            above = [str(f) for n, f in found.items() if max(before, default=0) < n <= step]
            earlier = f"; to resume step {max(before)} instead, remove {' and '.join(above)}" if before else ""
            raise CheckpointError(f"{e}, so {out_dir} cannot be resumed; its weights are good: "
                                  f"{shlex.quote(f'--init_from={out_dir}')} with another --out_dir starts from them"
                                  f"{earlier}") from None
        except CheckpointError as e:
            aside = folder.with_name(folder.name + ".corrupt")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            warn(f"{e}; set aside as {aside.name}")
    corrupt = list((Path(out_dir) / "ckpt").glob("step_*.corrupt"))
    if corrupt:  # also at the second try: a command that is repeated must not begin again unasked
        raise CheckpointError(
            f"{out_dir} has no checkpoint that verifies: all {len(corrupt)} are set aside as *.corrupt; "
            "--init_from=scratch begins again"
        )
    return None


def find(out_dir, which="latest", warn=print):
    """(folder, state) of the checkpoint to read weights from: latest, best (lowest val_loss) or a step number.

    `out_dir` is a run's folder or one checkpoint's. Latest passes over one that does not verify, and says so; nothing
    is renamed, as the run may be going on. Raises CheckpointError.
    """
    if (Path(out_dir) / "state.json").exists():
        return Path(out_dir), verify(out_dir, "model.safetensors")
    found = steps(out_dir)
    if not found:
        raise CheckpointError(f"{out_dir} holds no checkpoint: python train.py {shlex.quote(f'--out_dir={out_dir}')} "
                              "makes one")
    if which == "latest":
        for folder in reversed(found.values()):
            try:
                return folder, verify(folder, "model.safetensors")
            except CheckpointError as e:
                warn(f"{e}; looking at the one before it")
        raise CheckpointError(f"{out_dir}: none of its {len(found)} checkpoints verifies")
    step = best_step(found) if which == "best" else int(which) if str(which).isdigit() else None
    if step not in found:
        what = "evaluated checkpoint, so none is best" if which == "best" else f"checkpoint {which!r}"
        raise CheckpointError(f"{out_dir} has no {what}; there are latest, best, {', '.join(map(str, found))}")
    return found[step], verify(found[step], "model.safetensors")


def best_step(found):
    """The step with the lowest val_loss among `found`, the earlier one on a tie; None where none was evaluated."""
    losses = {}
    for step, folder in found.items():
        try:
            losses[step] = read_state(folder).get("val_loss")
        except CheckpointError:
            continue
    losses = {step: loss for step, loss in losses.items() if loss is not None}
    return min(losses, key=losses.get) if losses else None


def prune(out_dir, keep):
    """Remove all but the last `keep` checkpoints (at least one) and the best."""
    found = steps(out_dir)
    stay = {*list(found)[-max(1, keep):], best_step(found)}
    for step, folder in found.items():
        if step not in stay:
            discard(folder)


def main():
    if not what or not runs:
        fail("say what to do with which run: python checkpoint.py consolidate out/mine")
    for run in runs:
        try:
            done = consolidate(run)
        except (CheckpointError, OSError) as e:
            fail(e)
        print("\n".join(f"{folder} is a plain checkpoint now" for folder in done) or f"{run} has no sharded checkpoint")


if __name__ == "__main__":
    configure(globals(), verb="what", verbs=("consolidate",), paths="runs")
    main()
