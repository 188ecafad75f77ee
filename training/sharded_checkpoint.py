"""
Sharded checkpoints: each rank writes and reads its own tensors, with torch.distributed.checkpoint (DCP).

checkpoint.py calls this, and adds everything else that belongs to a checkpoint. DCP's safetensors storage needs no
pickled index. Its files are named shard-0000R-model-00001-of-00001.safetensors, their tensors model/NAME,
adamw/NAME/exp_avg, ... Each header gives the place of each slice in the whole tensor.
"""

import re
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist

SHARD = re.compile(r"shard-\d{5,}-.*\.safetensors")  # DCP's name for the file of one rank


def write_shards(folder, tensors, group=None):
    """Write this rank's part of each tensor (`tensors` by name). All ranks call it. If one fails, all raise its error.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    with one_error():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(tensors, storage_writer=writer, no_dist=not dist.is_initialized(), process_group=group)


def own_shards(folder):
    """The files that this rank has written."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return list(folder.glob(f"shard-{rank + 1:05d}-*"))


def read_shards(folder, weights, params=None, same_heads=True):
    """Name -> tensor: the weights, or else the optimizer's state. Raises DCP's and safetensors' errors.

    Without `params` the tensors are whole and on the CPU. With `params` (name -> parameter; all ranks call it) only
    these parameters are read, each laid out like the parameter. A c_attn comes whole, unless the files have the
    `same_heads` in the same order.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    tensors = {}
    with one_error():
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        for name, saved in metadata.items():
            kind, param_name = name.split("/")[:2]
            if (kind == "model") != weights or (params is not None and param_name not in params):
                continue
            p = params[param_name] if params is not None else None
            if p is not None and saved.size == p.shape and (same_heads or ".c_attn." not in name):
                tensors[name] = torch.zeros_like(p.detach())
            else:
                tensors[name] = torch.zeros(saved.size, dtype=saved.properties.dtype)
        no_dist = params is None or not dist.is_initialized()
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_dist)
    return tensors


def in_model_order(tensor, heads):
    """The rows of a c_attn, with its heads in the order `heads`, some more than once -> in the model's own order."""
    by_head = tensor.unflatten(0, (len(heads), -1))
    ordered = by_head.new_empty(max(heads) + 1, *by_head.shape[1:])
    ordered[heads] = by_head
    return ordered.flatten(0, 1)


@contextmanager
def one_error():
    """DCP raises an exception of its own on every rank, which lists the ranks that failed. Raise the first's error."""
    from torch.distributed.checkpoint import CheckpointException

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a run may have a single process
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # DCP's own call, in torch 2.9 and on GPUs
    try:
        yield
    except CheckpointException as e:
        raise next(iter(e.failures.values()))[0] from None
