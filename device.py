"""
The machine as torch sees it: which device and precision to use and why, what it can reach, how much memory is in use.
"""

import contextlib
import functools
import math
import os
import re
import shutil
import sys
import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Peak dense FLOP/s, without sparsity: in bf16 and fp16 with fp32 sums, and in fp32 without TF32, which train.py never
# asks for (None: the sources differ). By a part of what torch.cuda.get_device_name says; the longer name first where
# one contains another. From the makers' data sheets and architecture white papers (Volta, Turing, Ampere GA100 and
# GA102, Ada, Hopper, Blackwell, RTX Blackwell, CDNA 3), half of what they print "with sparsity".
PEAK_FLOPS = {
    "GB200": (2500e12, None),
    "B200": (2250e12, None),
    "GH200": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H20": (148e12, 44e12),
    "A100": (312e12, 19.5e12),
    "A30": (165e12, 10.3e12),
    "A40": (149.7e12, 37.4e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "T4": (65e12, 8.1e12),
    "V100-PCIE": (112e12, 14e12),
    "V100": (125e12, 15.7e12),
    "RTX PRO 6000 Blackwell Workstation": (503.8e12, 126e12),
    "RTX 6000 Ada": (364.2e12, 91.1e12),
    "RTX A6000": (154.8e12, 38.7e12),
    "RTX 5090": (209.5e12, 104.8e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "MI325X": (1307.4e12, 163.4e12),
    "MI300X": (1307.4e12, 163.4e12),
}

OTHER_CHIP = re.compile(r"\b(Laptop|Max-Q|Ti|D|SUPER|MIG)\b")  # another chip, or a part of one, behind the same name


def pick_device(name="auto"):
    """"auto", "cpu", "cuda", "cuda:1" or "mps" -> (torch.device, why). Raises ValueError where it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"{torch.cuda.get_device_name()} found"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU found"
        return torch.device("cpu"), "no GPU found"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is none of auto, cpu, cuda, cuda:N, mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise ValueError(
            f"device={name!r}: torch {torch.__version__} finds no such device here; device=auto takes what there is"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: there are {torch.cuda.device_count()} CUDA device(s) here, counted from 0")
    return device, "asked for"


def pick_dtype(name, device):
    """"auto", "float32", "bfloat16" or "float16" -> (torch.dtype, why). Raises ValueError for another name."""
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} is none of auto, {', '.join(DTYPES)}")
        return DTYPES[name], "asked for"
    if device.type == "cpu" and native_bfloat16():
        return torch.bfloat16, "this CPU multiplies it in hardware"
    if device.type != "cuda":
        return torch.float32, f"the safe choice on {device.type}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU has it"
    return torch.float16, "this GPU has no bfloat16"


def native_bfloat16():
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); emulated, it is slower than float32."""
    supported = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in supported if ask)


def autocast(device, dtype):
    """A function that gives the context to run a model in: mixed precision, or nothing in fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype)


def can_compile(device):
    """Why torch.compile cannot work here, or None where it should."""
    if sys.platform == "win32":
        return "not on Windows"
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler found"
    return None


def peak_flops(device, dtype):
    """FLOP/s that `device` can reach at best in `dtype`, or None where it is not known. That of a CPU is measured."""
    if device.type == "cpu":
        return matmul_flops(dtype, torch.get_num_threads())
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if OTHER_CHIP.search(name):
        return None
    found = (peaks for known, peaks in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name))
    half, single = next(found, (None, None))
    return single if dtype == torch.float32 else half


@functools.cache
def matmul_flops(dtype, threads):
    """FLOP/s of this CPU in a matrix product of `dtype`, with the `threads` that torch has: the best of a few tries in
    some 0.1 s. No data sheet knows its clock under load, so MFU is a share of what a product reaches here."""
    n = 768  # wide enough for the caches' blocks, and 0.9 GFLOP
    a, best, began = torch.ones(n, n, dtype=dtype), math.inf, time.perf_counter()
    for _ in range(8):
        clock = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - clock)
        if clock - began > 0.1:
            break
    return 2 * n**3 / best


def memory_gb(device):
    """Peak memory so far in GB (1e9 bytes), of the GPU, else of this process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as f:  # Linux
            return next(int(line.split()[1]) * 1024 / 1e9 for line in f if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes; elsewhere a parent's peak is in it, too
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory(device, processes=1):
    """Bytes that this process can still have, of the GPU, else a share of the machine's for each of the `processes` on
    it; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as f:  # Linux
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable:")) // processes
    except (OSError, StopIteration):
        return None


def rss_gb():
    """Memory of this process that is in RAM now, in GB (1e9 bytes); None where there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, ValueError):
        return None


def memory_is_full(error):
    """The line that says so where `error` is about a CPU's or a GPU's memory, or None: for a CPU torch has no class."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return ". ".join(text.split(". ", 2)[:2])
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"this machine's memory is full ({text[-200:]})"
    return None
