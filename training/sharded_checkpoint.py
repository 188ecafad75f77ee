"""
Sharded checkpoints: each rank writes and reads the tensors that lie on it, by torch.distributed.checkpoint (DCP).

checkpoint.py decides when, where, and what else belongs to a checkpoint. The files are those of DCP's safetensors
storage, which keeps no pickled index: shard-0000R-model-00001-of-00001.safetensors, with tensors named model/NAME,
adamw/NAME/exp_avg, ... and in each header where in the whole tensor they belong.
"""

import re
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist

SHARD = re.compile(r"shard-\d{5,}-.*\.safetensors")  # DCP's name for the file of one rank


def write_shards(folder, tensors, group=None):
    """Write the part of each of `tensors` (by name) that lies on this rank. All ranks call it. Raises, on all of them,
    the error of a rank that failed."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    with one_error():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(tensors, storage_writer=writer, no_dist=not dist.is_initialized(), process_group=group)


def own_shards(folder):
    """Paths of the files that this rank wrote."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return list(folder.glob(f"shard-{rank + 1:05d}-*"))


def read_shards(folder, weights, params=None, same_heads=True):
    """Name -> tensor, of the weights or else of the optimizer. Raises what DCP and safetensors do.

    Without `params` the tensors are whole and on the CPU. With `params` (by name; all ranks call it) they are those of
    these parameters, laid out like them. The exception is a c_attn, unless the file has the `same_heads` in the same
    order: it comes whole.
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
    """The rows of a c_attn, whose heads lie in the order `heads`, some of them twice -> head by head, as in the
    model."""
    by_head = tensor.unflatten(0, (len(heads), -1))
    ordered = by_head.new_empty(max(heads) + 1, *by_head.shape[1:])
    ordered[heads] = by_head
    return ordered.flatten(0, 1)


@contextmanager
def one_error():
    """DCP tells every rank which ranks failed, in an exception of its own. Raise the first rank's own error instead."""
    from torch.distributed.checkpoint import CheckpointException

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is meant to be one
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # DCP's own call, in torch 2.9 and on GPUs
    try:
        yield
    except CheckpointException as e:
        raise next(iter(e.failures.values()))[0] from None
