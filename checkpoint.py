"""
Checkpoints: write, verify, find and read.

    out_dir/ckpt/step_00001000/
        model.safetensors   plain, unprefixed names; a tied head stored once
        optimizer.pt        tensors by parameter name, readable with torch.load(weights_only=True)
        state.json          step, config, data position, metrics length, ..., the sha256 of each file and its own

A checkpoint is written beside its place, synced and then renamed, so a folder of that name is complete, and a kill at
any instant leaves the one before it whole. Nothing read from a checkpoint is ever executed.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

NAME = re.compile(r"step_(\d{8,})")
FILES = ("model.safetensors", "optimizer.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


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
    ckpt = Path(out_dir) / "ckpt"
    final = ckpt / f"step_{state['step']:08d}"
    if final.exists():
        return final  # this step was saved already, and a step has one outcome
    ckpt.mkdir(parents=True, exist_ok=True)
    sync(ckpt.parent)  # which has new entries the first time
    for left in ckpt.glob(".writing_*"):  # by a run that was killed
        shutil.rmtree(left)
    beside = ckpt / f".writing_{final.name}"
    try:
        beside.mkdir()
        save_file(model_tensors(model), beside / "model.safetensors", metadata={"format": "pt"})
        with open(beside / "optimizer.pt", "wb") as f:  # a file of Python's, whose errors say what happened
            torch.save(optimizers.state_dict(), f)
        state = {**state, "files": {name: file_sha256(beside / name) for name in FILES}}
        state = json.loads(json.dumps(state))  # as it will be read: tuples are lists
        state["sha256"] = own_sha256(state)
        (beside / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
        for name in (*FILES, "state.json"):
            sync(beside / name)
        sync(beside)
        os.replace(beside, final)
        sync(ckpt)
    except (OSError, SafetensorError, RuntimeError) as e:
        shutil.rmtree(beside, ignore_errors=True)
        if (cause := system_error(e)) is None:
            raise
        raise OSError(cause.errno, f"{final} could not be written: {cause.strerror or cause}") from e
    return final


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
        intact = state["sha256"] == own_sha256(state) and set(FILES) <= state["files"].keys()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise CheckpointError(f"{path} is missing ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # another OSError says nothing of the checkpoint
        raise CheckpointError(f"{path} cannot be read ({type(e).__name__}: {e})") from None
    if not intact:
        raise CheckpointError(f"{path} was changed after it was written (sha256 differs)")
    return state


def verify(folder, only=None):
    """The state of a checkpoint, every file (or `only` one) checked. Raises CheckpointError naming the file."""
    state = read_state(folder)
    for name in [only] if only else FILES:
        path = Path(folder) / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing")
        try:
            digest = file_sha256(path)
        except OSError as e:
            if e.errno != errno.EIO:  # a bad sector is damage; too many open files, say, is not
                raise
            digest = None
        if digest != state["files"][name]:
            raise CheckpointError(f"{path} is damaged (sha256 differs from state.json)")
    if only is None:
        load_optimizer_state(folder)  # a file with the right digest can still hold what weights_only refuses
    return state


def load_model_tensors(folder):
    """Name -> tensor. Raises CheckpointError."""
    path = Path(folder) / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path} cannot be read ({e})") from None


def load_optimizer_state(folder):
    """As Optimizers.state_dict gave it. Raises CheckpointError, also for a pickle that asks for more than tensors."""
    path = Path(folder) / "optimizer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a damaged or malicious file
        raise CheckpointError(f"{path} is refused ({str(e).splitlines()[0]})") from None


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


def steps(out_dir):
    """Step -> folder of every checkpoint of a run, rising. Half-written and corrupt ones have other names."""
    found = {}
    for folder in (Path(out_dir) / "ckpt").glob("step_*"):
        if match := NAME.fullmatch(folder.name):
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def latest_good(out_dir, warn=print):
    """(folder, state) of the highest step that verifies, or None where a run has no checkpoint.

    One that does not verify is renamed to *.corrupt, and said. Raises CheckpointError when there are checkpoints, or
    were before they were set aside, and none is good.
    """
    found = steps(out_dir)
    for _, folder in sorted(found.items(), reverse=True):
        try:
            return folder, verify(folder)
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
        raise CheckpointError(f"{out_dir} holds no checkpoint: python train.py --out_dir={out_dir} makes one")
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
            gone = folder.with_name(f".writing_{folder.name}")  # half-removed is not a checkpoint either
            os.replace(folder, gone)
            shutil.rmtree(gone)
