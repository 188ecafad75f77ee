"""
kernels.cpp, compiled for the CPU at hand and called from PyTorch: the products that decide how fast a CPU generates.

    minichat::linear(x, codes, ...)   a few rows times a matrix that lies in tiles (inference/tiled.py)
    minichat::attend(q, k, v, ...)    the attention of one new token for each request (inference/kvcache.py)

The compiler runs once, about ten seconds (native.py). Where there is no C++ compiler, trouble() says so and PyTorch's
own kernels take over. Both functions are operators of PyTorch, so torch.compile keeps them as they are amid what it
fuses.
"""

import ctypes
import functools
from pathlib import Path

import torch

import native

SOURCE = Path(__file__).with_name("kernels.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
MOST_ROWS = 64  # of a product as in decoding; for more, as in a prompt, a product of floats is faster

Pointer = ctypes.c_void_p
Int = ctypes.c_int64


class Matrix(ctypes.Structure):
    """kernels.cpp's Matrix."""

    _fields_ = [("codes", Pointer), ("scales", Pointer), ("minimum", Pointer), ("outputs", Int), ("inputs", Int),
                ("bits", Int), ("group", Int)]


class Batch(ctypes.Structure):
    """kernels.cpp's Batch."""

    _fields_ = [("requests", Int), ("heads", Int), ("kv_heads", Int), ("head_dim", Int), ("slots", Int),
                ("block", Int), ("table_width", Int), ("table", Pointer), ("lengths", Pointer), ("new_slots", Pointer)]


# -----------------------------------------------------------------------------
# The library


@functools.lru_cache(maxsize=1)
def find_library():
    """-> (the library, "") or (None, why there is none)"""
    library, reason = native.load(SOURCE)
    if library is None:
        return None, reason
    library.linear.argtypes = [Pointer, Pointer, Int, Pointer, Pointer, Int, Int]
    library.unpack.argtypes = [Pointer, Pointer, Int, Int]
    library.attend.argtypes = [Pointer] * 7 + [Int] * 3 + [ctypes.c_double] + [Int] * 3
    library.read_all.argtypes = [Pointer, Int, Int]
    library.read_all.restype = Int
    library.has_amx.restype = Int
    for function in (library.linear, library.unpack, library.attend):
        function.restype = None
    return library, ""


def available():
    """Whether the kernels run here. The first call compiles them, unless they are kept from an earlier run."""
    return find_library()[0] is not None


def trouble():
    """Why they do not, in words; empty if they do."""
    return find_library()[1]


def has_amx():
    """Whether the kernels multiply bfloat16 with AMX: then many rows at once are theirs too."""
    return available() and bool(find_library()[0].has_amx())


# -----------------------------------------------------------------------------
# The operators


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def matrix_of(codes, scales, minimum, outputs, inputs, bits, group):
    return Matrix(address(codes), address(scales), address(minimum), outputs, inputs, bits, group)


def linear(x, codes, scales, minimum, bias, outputs, bits, group):
    """x (M, inputs), fp32 or bfloat16, times a matrix of `outputs` rows that lies in tiles, plus bias (outputs,) fp32.
    codes, scales, minimum, bits and group are TiledLinear's. -> (M, outputs) in x's dtype"""
    x = x.contiguous()
    rows, inputs = x.shape
    y = x.new_empty(rows, outputs)
    matrix = matrix_of(codes, scales, minimum, outputs, inputs, bits, group)
    find_library()[0].linear(ctypes.byref(matrix), x.data_ptr(), rows, address(bias), y.data_ptr(), TYPES[x.dtype],
                             torch.get_num_threads())
    return y


def unpack(codes, scales, minimum, outputs, inputs, bits, group, dtype):
    """The matrix row after row. -> (outputs, inputs) in dtype, fp32 or bfloat16"""
    weight = torch.empty(outputs, inputs, dtype=dtype)
    matrix = matrix_of(codes, scales, minimum, outputs, inputs, bits, group)
    find_library()[0].unpack(ctypes.byref(matrix), weight.data_ptr(), TYPES[dtype], torch.get_num_threads())
    return weight


def read_all(tensor):
    """Read all of a tensor's memory, and nothing else."""
    return find_library()[0].read_all(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())


def rows_of(x):
    """x (B, heads, D) with its heads one after another, as the kernel reads them; rows may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.size(2) else x.contiguous()


def attend(q, k, v, keys, values, slots, table, lengths, block):
    """One new token of each of B requests. Stores k and v (B, n_kv, D) at `slots` (B,) int64 of keys and values
    (n_kv, slots, D), and attends with q (B, n_q, D) to the first `lengths` (B,) int32 tokens in the blocks that
    `table` (B, n) int32 names. q, k, v and the cache are fp32 or bfloat16. -> (B, n_q, D) in q's dtype

    PyTorch is not told that keys and values change, so that torch.compile does not copy the whole cache around each
    call. Nothing else in a step reads them.
    """
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    B, heads, D = q.shape
    y = q.new_empty(B, heads, D)
    batch = Batch(B, heads, k.size(1), D, keys.size(1), block, table.size(1), table.data_ptr(), lengths.data_ptr(),
                  slots.data_ptr())
    find_library()[0].attend(
        ctypes.byref(batch), q.data_ptr(), k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(),
        y.data_ptr(), q.stride(0), k.stride(0), v.stride(0), D**-0.5, TYPES[q.dtype], TYPES[keys.dtype],
        torch.get_num_threads(),
    )
    return y


OPERATORS = torch.library.Library("minichat", "DEF")
OPERATORS.define("linear(Tensor x, Tensor codes, Tensor? scales, Tensor? minimum, Tensor? bias, int outputs, int bits, "
                 "int group) -> Tensor")
OPERATORS.define("attend(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor slots, Tensor table, "
                 "Tensor lengths, int block) -> Tensor")
OPERATORS.impl("linear", linear, "CPU")
OPERATORS.impl("attend", attend, "CPU")


@torch.library.register_fake("minichat::linear", lib=OPERATORS)
def linear_shape(x, codes, scales, minimum, bias, outputs, bits, group):
    return x.new_empty(x.size(0), outputs)


@torch.library.register_fake("minichat::attend", lib=OPERATORS)
def attend_shape(q, k, v, keys, values, slots, table, lengths, block):
    return q.new_empty(q.shape)
