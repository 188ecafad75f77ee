"""
Checkpoints: write, verify, find and read.

    out_dir/ckpt/step_00001000/
        model.safetensors   plain, unprefixed names; a tied head stored once
        optimizer.pt        tensors by parameter name, readable with torch.load(weights_only=True)
        state.json          step, config, data position, metrics length, ..., the sha256 of each file and its own

A checkpoint is written under another name, synced and then renamed. So a folder of that name is complete, and a kill
at any moment leaves all earlier checkpoints as they were. A checkpoint is written before its step is evaluated:
state.json then holds the step's record as "unevaluated", and `note` adds val_loss later. Nothing read from a checkpoint
is ever executed.

checkpoint_format="sharded" is for models that are too large to gather on one rank. Each rank writes its own tensors
(training/sharded_checkpoint.py) while the training continues; these shards replace the two files. If tensor parallelism
split attention, "heads" in state.json is the order of the heads in c_attn. Such a run is read and resumed like any
other. To turn its checkpoints into plain ones:

    python checkpoint.py consolidate out/mine
"""

import errno
import json
import os
import re
import shlex
import shutil
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import Settings, configure, fail
from files import file_sha256, sha256, sync, write_whole
from model import GPTConfig
from training.sharded_checkpoint import SHARD, in_model_order, own_shards, read_shards, write_shards

# -----------------------------------------------------------------------------
what = ""                     # consolidate: the sharded checkpoints of runs become plain ones
runs: tuple[str, ...] = ()    # their folders, as bare words
# -----------------------------------------------------------------------------

NAME = re.compile(r"step_(\d{8,})")
FILES = ("model.safetensors", "optimizer.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file, and says what is wrong with it."""


class MissingOptimizer(CheckpointError):
    """A checkpoint with good weights and without its optimizer.pt. Perhaps somebody removed it to save space."""


# -----------------------------------------------------------------------------
# Writing


def save(out_dir, model, optimizers, state):
    """Write the checkpoint of step state["step"]; all of `state` must be JSON values. -> its folder

    Raises OSError (disk full) after removing the half-written folder. Earlier checkpoints stay as they are.
    """
    final = place(out_dir, state)
    if final.exists():
        return final  # this step was saved already, and a step has one outcome
    with writing(final):
        begin(final)
        write_model(final, model_tensors(model))
        write_optimizer(final, optimizers.state_dict())
        finish(final, state, plain_digests(final))
    return final


def save_sharded(out_dir, tensors, state, group=None):
    """Like `save`, but all ranks call it, and each writes and digests its own `tensors` (from `shards`).

    If one rank fails, all raise OSError. `out_dir` must be on a disk that all ranks see.
    """
    final = place(out_dir, state)
    is_rank0 = not dist.is_initialized() or dist.get_rank() == 0
    if together(lambda: is_rank0 and final.exists(), group)[0]:
        return final
    with writing(final):
        together(lambda: is_rank0 and begin(final), group)
        beside = beside_of(final)
        write_shards(beside, tensors, group)
        files = {}
        for digests in together(lambda: digests_of(own_shards(beside)), group):
            files |= digests
        together(lambda: is_rank0 and finish(final, state, files), group)
    return final


def model_tensors(model):
    """Name -> tensor on the CPU. Names are without torch.compile's prefix, and a tied head appears once."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name.removeprefix("_orig_mod.")] = p.detach().to("cpu").contiguous()
    return tensors


def shards(model, optimizers):
    """Name -> this rank's part of a tensor, for all tensors of a sharded checkpoint."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model/{name.removeprefix('_orig_mod.')}"] = p.detach()
    for kind, params in optimizers.state_dict().items():
        for name, values in params.items():
            tensors |= {f"{kind}/{name}/{key}": tensor for key, tensor in values.items()}
    return tensors


def place(out_dir, state):
    """The folder of the checkpoint of a step."""
    return Path(out_dir) / "ckpt" / f"step_{state['step']:08d}"


def beside_of(final):
    """The folder's name while it is being written, or removed."""
    return final.with_name(f".writing_{final.name}")


@contextmanager
def writing(final):
    """Around writing: after an error, remove the half-written folder. An error of the disk is raised as an OSError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as e:
        shutil.rmtree(beside_of(final), ignore_errors=True)
        cause = system_error(e)
        if cause is None:
            raise
        message = f"{final} could not be written: {cause.strerror or cause}"
        raise OSError(cause.errno, message) from e


def system_error(e):
    """The OSError behind an error of torch.save or safetensors, for example of a full disk. None for another error."""
    if match := re.search(r"\(os error (\d+)\)", str(e)):  # safetensors: "No space left on device (os error 28)"
        number = int(match[1])
        return OSError(number, os.strerror(number))
    # torch.save: "unexpected pos", a RuntimeError raised while the file's OSError was handled
    for cause in (e, e.__context__):
        if isinstance(cause, OSError):
            return cause
    return None


def begin(final):
    """Make the folder beside_of(final)."""
    ckpt = final.parent
    ckpt.mkdir(parents=True, exist_ok=True)
    sync(ckpt.parent)  # the first time, ckpt/ is a new entry there
    for leftover in ckpt.glob(".writing_*"):  # from a run that was killed
        shutil.rmtree(leftover)
    beside_of(final).mkdir()


def write_model(final, tensors):
    save_file(tensors, beside_of(final) / "model.safetensors", metadata={"format": "pt"})


def write_optimizer(final, optimizer_state):
    with open(beside_of(final) / "optimizer.pt", "wb") as file:  # a Python file, because its errors give a reason
        torch.save(optimizer_state, file)


def plain_digests(final):
    return digests_of(beside_of(final) / name for name in FILES)


def digests_of(paths):
    """Name of a file -> its sha256."""
    return {path.name: file_sha256(path) for path in paths}


def finish(final, state, files):
    """When the `files` (name -> sha256) are written: write state.json, sync, and rename the folder to `final`."""
    beside = beside_of(final)
    state = signed({**state, "files": files})
    text = json.dumps(state, indent=1, sort_keys=True)
    (beside / "state.json").write_text(text, encoding="utf-8")
    for name in (*files, "state.json"):
        sync(beside / name)
    sync(beside)
    if final.exists():  # consolidate: the sharded checkpoint of the same tensors
        final.rename(final.with_name(f"{final.name}.sharded"))
    os.replace(beside, final)
    sync(final.parent)


def note(folder, **fields):
    """Change fields of a complete checkpoint's state.json, atomically. -> the new state

    Raises OSError and CheckpointError.
    """
    folder = Path(folder)
    state = signed({**read_state(folder), **fields})
    write_whole(folder / "state.json", json.dumps(state, indent=1, sort_keys=True), durable=True)
    return state


def signed(state):
    """A copy of `state` as a reader will see it (tuples become lists), with its own sha256."""
    state = json.loads(json.dumps(state))
    state["sha256"] = own_sha256(state)
    return state


def own_sha256(state):
    """sha256 of state.json's content without the field "sha256"."""
    plain = {key: value for key, value in state.items() if key != "sha256"}
    return sha256(json.dumps(plain, sort_keys=True))


def discard(folder):
    """Remove a checkpoint. It is renamed first, so that a half-removed folder is not taken for a checkpoint."""
    gone = beside_of(folder)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def together(function, group=None):
    """Call `function` on every rank. -> the results by rank. If it raises an OSError on one rank, all raise it."""
    try:
        result = function()
    except OSError as e:
        result = e
    results = [result]
    if dist.is_initialized():
        results = [None] * dist.get_world_size()
        dist.all_gather_object(results, result, group=group)
    for result in results:
        if isinstance(result, OSError):
            raise result
    return results


# -----------------------------------------------------------------------------
# Verifying and reading


def read_state(folder):
    """state.json of a checkpoint, verified against its own sha256. Raises CheckpointError."""
    path = Path(folder) / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        complete = names_are_complete(state["files"].keys())
        intact = complete and state["sha256"] == own_sha256(state)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise CheckpointError(f"{path} is missing ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # another OSError is not the checkpoint's fault
        raise CheckpointError(f"{path} cannot be read ({type(e).__name__}: {e})") from None
    if not intact:
        raise CheckpointError(f"{path} was changed after it was written (sha256 differs)")
    return state


def names_are_complete(names):
    """Whether these are the files of a plain checkpoint, or of a sharded one."""
    if set(FILES) <= names:
        return True
    return bool(names) and all(SHARD.fullmatch(name) for name in names)


def is_sharded(folder):
    return "model.safetensors" not in read_state(folder)["files"]


def verify(folder, only=None):
    """Check all files of a checkpoint, or `only` one file if it is plain. -> its state. Raises CheckpointError naming
    the file that is wrong."""
    folder = Path(folder)
    state = read_state(folder)
    digests = state["files"]
    if set(FILES) <= digests.keys():
        # FILES begins with the weights: at MissingOptimizer they have been checked
        for name in FILES if only is None else [only]:
            verify_file(folder / name, digests[name])
        if only is None:
            load_optimizer_state(folder)  # weights_only may refuse even a file with the right digest
        return state
    for path in folder.glob("*.safetensors"):  # DCP would read any file that somebody added
        if path.name not in digests:
            raise CheckpointError(f"{path} does not belong to this checkpoint")
    for name, digest in digests.items():
        verify_file(folder / name, digest)
    return state


def verify_file(path, digest):
    """Raise CheckpointError if a checkpoint's file is missing or has another sha256."""
    if not path.exists():
        kind = MissingOptimizer if path.name == "optimizer.pt" else CheckpointError
        raise kind(f"{path} is missing")
    try:
        intact = file_sha256(path) == digest
    except OSError as e:
        if e.errno != errno.EIO:  # a bad sector is damage; too many open files, for example, is not
            raise
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged (sha256 differs from state.json)")


def load_model_tensors(folder):
    """Name -> tensor. Raises CheckpointError."""
    if is_sharded(folder):
        tensors = load_shards(folder, weights=True)
        return {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}
    path = Path(folder) / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path} cannot be read ({e})") from None


def load_optimizer_state(folder, params=None, heads=None):
    """The state_dict of Optimizers. Raises CheckpointError, also for a pickle that would load more than tensors.

    If the checkpoint is sharded, all ranks may call it with `params`, this rank's parameters by name: then it reads
    only their part, as in `load_shards`. `heads` is the order of the heads in their c_attn.
    """
    if is_sharded(folder):
        state = {}
        for path, tensor in load_shards(folder, weights=False, params=params, heads=heads).items():
            kind, name, key = path.split("/")
            state.setdefault(kind, {}).setdefault(name, {})[key] = tensor
        return state
    path = Path(folder) / "optimizer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a damaged or malicious file
        raise CheckpointError(f"{path} is refused ({str(e).splitlines()[0]})") from None


def load_shards(folder, weights, params=None, heads=None):
    """As read_shards, except that a c_attn with another order than `heads` is put into the model's own order. Raises
    CheckpointError."""
    written_heads = read_state(folder).get("heads")
    try:
        tensors = read_shards(folder, weights, params, same_heads=written_heads == heads)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise CheckpointError(f"{folder} cannot be read ({e})") from None
    if written_heads and written_heads != heads:
        for name, tensor in tensors.items():
            if ".c_attn." in name and tensor.ndim:
                tensors[name] = in_model_order(tensor, written_heads)
    return tensors


def config_of(state, folder):
    """The GPTConfig of a checkpoint's model. Raises CheckpointError naming each field that this version does not know,
    because without such a field it would be another model."""
    known = {field.name for field in fields(GPTConfig)}
    unknown = sorted(state["model"].keys() - known)
    if unknown:
        named = ", ".join(f"{name}={state['model'][name]}" for name in unknown)
        raise CheckpointError(f"{folder} holds a model with {named}, which this version does not know: take the "
                              "version that trained it (env.json names the commit)")
    try:
        return GPTConfig(**{**state["model"], "attn": "auto"})
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{folder} holds a model that this version does not know ({e})") from None


def run_of(folder):
    """The folder of the run that a checkpoint's folder belongs to, or `folder` itself if it belongs to none.

    The tokenizer is there, even if ckpt/ is a link to another disk, or `folder` is a link into a run.
    """
    places = [Path(folder), Path(os.path.abspath(folder)), Path(folder).resolve()]
    runs = [path.parent.parent for path in places if path.parent.name == "ckpt"]
    with_tokenizer = [run for run in runs if (run / "tokenizer.json").exists()]
    return (with_tokenizer or runs or [Path(folder)])[0]


def load_model(model, folder):
    """Put a checkpoint's weights into `model`. Raises CheckpointError naming the first parameter that does not fit."""
    tensors = load_model_tensors(folder)
    params = dict(model.named_parameters())
    for name in sorted(tensors.keys() | params.keys()):
        saved_shape = tuple(tensors[name].shape) if name in tensors else None
        shape = tuple(params[name].shape) if name in params else None
        if saved_shape != shape:
            raise CheckpointError(f"{folder}: {name} is {saved_shape} there and {shape} in the model")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[name])


# -----------------------------------------------------------------------------
# Finding and pruning


def steps(out_dir):
    """Step -> folder of every checkpoint of a run, rising. Half-written and corrupt ones have other names."""
    folders = {}
    for folder in (Path(out_dir) / "ckpt").glob("step_*"):
        if match := NAME.fullmatch(folder.name):
            folders[int(match[1])] = folder
    return dict(sorted(folders.items()))


def latest_good(out_dir, warn=print):
    """(folder, state) of the latest checkpoint that verifies, or None if the run has no checkpoint.

    A damaged one is renamed to *.corrupt, with a warning. Raises CheckpointError if all are damaged, and for one
    without its optimizer.pt, which is not damaged.
    """
    folders = steps(out_dir)
    for step, folder in sorted(folders.items(), reverse=True):
        try:
            return folder, verify(folder)
        except MissingOptimizer as e:
            raise CheckpointError(without_optimizer(e, out_dir, folders, step)) from None
        except CheckpointError as e:
            aside = folder.with_name(folder.name + ".corrupt")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            warn(f"{e}; set aside as {aside.name}")
    corrupt = list((Path(out_dir) / "ckpt").glob("step_*.corrupt"))
    if corrupt:  # now or by an earlier call: a repeated command must not start from scratch unasked
        raise CheckpointError(
            f"{out_dir} has no checkpoint that verifies: all {len(corrupt)} are set aside as *.corrupt; "
            "--init_from=scratch begins again"
        )
    return None


def without_optimizer(error, out_dir, folders, step):
    """The message for a run whose latest checkpoint, of `step`, has no optimizer.pt. It says what to do instead."""
    init_from = shlex.quote(f"--init_from={out_dir}")
    message = (f"{error}, so {out_dir} cannot be resumed; its weights are good: "
               f"{init_from} with another --out_dir starts from them")
    earlier = []  # steps that can be resumed
    for other, folder in folders.items():
        sharded = not (folder / "model.safetensors").exists()
        if other < step and (sharded or (folder / "optimizer.pt").exists()):
            earlier.append(other)
    if earlier:
        later = [str(folder) for other, folder in folders.items() if earlier[-1] < other <= step]
        message += f"; to resume step {earlier[-1]} instead, remove {' and '.join(later)}"
    return message


def find(out_dir, which="latest", warn=print):
    """(folder, state) of a checkpoint to read weights from. Raises CheckpointError.

    `which` is latest, best (lowest val_loss) or a step number; `out_dir` may be the folder of a checkpoint instead of a
    run's. "latest" skips a checkpoint that does not verify, with a warning. Unlike latest_good, it renames nothing: the
    run may still be training.
    """
    if (Path(out_dir) / "state.json").exists():
        return Path(out_dir), verify(out_dir, "model.safetensors")
    folders = steps(out_dir)
    if not folders:
        raise CheckpointError(f"{out_dir} holds no checkpoint: python train.py {shlex.quote(f'--out_dir={out_dir}')} "
                              "makes one")
    if which == "latest":
        for folder in reversed(folders.values()):
            try:
                return folder, verify(folder, "model.safetensors")
            except CheckpointError as e:
                warn(f"{e}; looking at the one before it")
        raise CheckpointError(f"{out_dir}: none of its {len(folders)} checkpoints verifies")
    missing = f"checkpoint {which!r}"
    step = int(which) if str(which).isdigit() else None
    if which == "best":
        missing = "evaluated checkpoint, so none is best"
        step = best_step(folders)
    if step not in folders:
        raise CheckpointError(f"{out_dir} has no {missing}; there are latest, best, {', '.join(map(str, folders))}")
    return folders[step], verify(folders[step], "model.safetensors")


def best_step(folders):
    """The step with the lowest val_loss in `folders` (step -> folder). The earlier step wins a tie; None if no step was
    evaluated."""
    losses = {}
    for step, folder in folders.items():
        try:
            loss = read_state(folder).get("val_loss")
        except CheckpointError:
            continue
        if loss is not None:
            losses[step] = loss
    return min(losses, key=losses.get) if losses else None


def prune(out_dir, keep):
    """Remove all checkpoints except the last `keep` (at least one) and the best."""
    folders = steps(out_dir)
    last = list(folders)[-max(1, keep):]
    best = best_step(folders)
    for step, folder in folders.items():
        if step not in last and step != best:
            discard(folder)


# -----------------------------------------------------------------------------
# Sharded to plain


def consolidate(out_dir):
    """Turn each sharded checkpoint of a run into the plain one of the same tensors. -> their folders

    Raises CheckpointError for one that does not verify, and OSError; the remaining ones stay sharded.
    """
    for aside in (Path(out_dir) / "ckpt").glob("step_*.sharded"):
        if aside.with_suffix("").exists():
            shutil.rmtree(aside)
        else:  # a kill came between two renames
            aside.rename(aside.with_suffix(""))
    folders = [folder for folder in steps(out_dir).values() if is_sharded(folder)]
    for folder in folders:
        state = verify(folder)
        tensors = load_model_tensors(folder)
        optimizer_state = load_optimizer_state(folder)
        state.pop("heads", None)  # load_model_tensors has put them into the model's order
        with writing(folder):
            begin(folder)
            write_model(folder, tensors)
            write_optimizer(folder, optimizer_state)
            finish(folder, state, plain_digests(folder))
        shutil.rmtree(folder.with_name(f"{folder.name}.sharded"))
    return folders


def main(c):
    if not c.what or not c.runs:
        fail("say what to do with which run: python checkpoint.py consolidate out/mine")
    for run in c.runs:
        try:
            folders = consolidate(run)
        except (CheckpointError, OSError) as e:
            fail(e)
        for folder in folders:
            print(f"{folder} is a plain checkpoint now")
        if not folders:
            print(f"{run} has no sharded checkpoint")


if __name__ == "__main__":
    c = Settings(configure(globals(), verb="what", verbs=("consolidate",), paths="runs"))
    main(c)
