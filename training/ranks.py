"""
The processes of a run: their numbers, how they find each other, how they agree, and how they end together.

torchrun starts the processes and tells each its rank in environment variables. Without torchrun there is one process
and no process group, and nothing here communicates.
"""

import atexit
import os
import sys
import time
import uuid
from contextlib import contextmanager

import torch
import torch.distributed as dist


def from_environment(name, default):
    """A whole number that torchrun sets. Raises ValueError naming the variable."""
    text = os.environ.get(name) or str(default)
    if not text.strip().isdecimal():
        raise ValueError(f"the environment variable {name}={text!r} must be a whole number, as torchrun sets it; "
                         "without torchrun, unset it")
    return int(text)


def rank():
    return from_environment("RANK", 0)


def world():
    """The number of processes: what torchrun says, never a count of devices."""
    return from_environment("WORLD_SIZE", 1)


def own_device(name, device, backend="nccl"):
    """The device of this process: under torchrun the LOCAL_RANK-th GPU of its machine, otherwise `device`.

    Over gloo, processes may share a GPU, so a machine with one GPU can test their communication. `name` is the setting
    as the user wrote it. Raises ValueError if there is no GPU for this process.
    """
    local_rank = from_environment("LOCAL_RANK", 0)
    if world() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"device={name!r}: under torchrun each process takes a GPU of its own, so say cuda")
    gpus = torch.cuda.device_count()
    if backend == "gloo" and gpus:
        return torch.device("cuda", local_rank % gpus)
    if local_rank >= gpus:
        raise ValueError(f"process {local_rank} of this machine has no GPU of its own: there are "
                         f"{gpus}; give torchrun that --nproc_per_node")
    return torch.device("cuda", local_rank)


# -----------------------------------------------------------------------------
# The process group


def fresh_store(store):
    """`store` under a prefix that only this start of the processes has.

    torchrun's store outlives a restart. It still holds the addresses of the old processes, and machines may count the
    restarts differently. So rank 0 draws a random name for this start. Each other rank draws a random mailbox,
    announces it, and waits there for the name.
    """
    own = uuid.uuid4().hex
    if rank():
        store.set(f"here/{rank()}", own)
        start = store.get(own).decode()  # waits for rank 0
        store.set(f"{start}/{rank()}", "")
        return dist.PrefixStore(start, store)
    for other in range(1, world()):
        # the announced mailbox may belong to a process before the restart, so post the name until it is confirmed
        while not store.check([f"{own}/{other}"]):
            mailbox = store.get(f"here/{other}").decode()
            store.set(mailbox, own)
            time.sleep(0.01)
    return dist.PrefixStore(own, store)


def own_group(rows):
    """Make a process group of each row of `rows` (n, ranks). -> this rank's, or None. All ranks call it."""
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    return group


@contextmanager
def all_fail_together():
    """Around a whole run: if one rank fails, all ranks end, and only the error of that rank is shown."""
    try:
        yield
    except (Exception, SystemExit) as e:
        if not dist.is_initialized():
            raise
        if isinstance(e, SystemExit) and (e.code in (None, 0) or e.code > 128):
            leave(e.code or 0)  # every rank ends like this when a run is done or a signal stopped it
        from torch.distributed.distributed_c10d import _get_default_store

        own = f"rank {rank()} failed ({type(e).__name__}: {e})"
        first = _get_default_store().compare_set("failed", "", own).decode()
        if first == own or isinstance(e, SystemExit):
            raise
        print(f"rank {rank()} stops: {first.splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    if dist.is_initialized():
        leave(0)


def leave(code):
    """End this process of a group without taking the interpreter down.

    One of gloo's threads may still hold tensors of the last collective. If it frees them while the interpreter shuts
    down, a process that has done its work aborts.
    """
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -----------------------------------------------------------------------------
# What the ranks tell each other


def gather_objects(value, ranks, group=None):
    """Collect a value from each of the `ranks` processes of a group. -> the values by rank. All of them call it."""
    values = [None] * ranks
    dist.all_gather_object(values, value, group=group)
    return values


def gather_vectors(own, ranks, group=None):
    """Collect a vector (n,) from each of the `ranks` processes of a group. -> (ranks, n). All of them call it."""
    gathered = own.new_empty(ranks, len(own))
    dist.all_gather(list(gathered), own, group=group)
    return gathered


def average_in_place(tensors, ranks, group):
    """Replace tensors by their means over a group of `ranks` processes, with one all-reduce of a flat copy."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]) / ranks
    dist.all_reduce(flat, group=group)
    means = flat.split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


class Ranks:
    """The processes of a run: the `rank` of this one, and their number, `world`.

    Every rank calls each of these methods, in the same order.
    """

    def __init__(self):
        self.rank = rank()
        self.world = world()

    def join_group(self, device, backend):
        """Join the run's process group, once. `backend` carries tensors on GPUs, and gloo tensors on CPUs."""
        if dist.is_initialized():
            return
        store, _, _ = next(dist.rendezvous("env://"))
        backends = "gloo"
        if device.type == "cuda":
            # on_rank0 and agree use the CPU, so that they wait for no kernel
            backends = f"cpu:gloo,cuda:{backend}"
        dist.init_process_group(
            backends, store=fresh_store(store), rank=self.rank, world_size=self.world
        )

    def on_rank0(self, function):
        """Call `function` on rank 0 only. -> its result, on every rank. An exception there ends all ranks."""
        if self.world == 1:
            return function()
        result = None
        exit_code = None
        try:
            if self.rank == 0:
                result = function()
        except BaseException as e:
            exit_code = e.code if isinstance(e, SystemExit) else 1
            raise
        finally:
            message = [result, exit_code]
            dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
        result, exit_code = message
        if exit_code is not None:
            sys.exit(exit_code)
        return result

    def agree(self, *numbers):
        """The maximum of each whole number over the ranks."""
        if self.world == 1:
            return numbers
        numbers = torch.tensor(numbers)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def any_trouble(self, line):
        """Each rank gives a line of text or None. -> the line of the first rank that has one, with its rank; or None"""
        if self.world == 1:
            return line
        for rank, text in enumerate(gather_objects(line, self.world)):
            if text:
                return f"rank {rank}: {text}"
        return None
