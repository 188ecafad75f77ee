"""
The machine as torch sees it: which device (pick_device), precision (pick_dtype) and kernels to use and why, whether
torch.compile can work, its peak speed and its memory. Every function stands by itself.
"""

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
import re
import shutil
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Peak dense FLOP/s: in bf16 and fp16 with fp32 sums, and in fp32 without TF32 (None: the sources differ). A key is a
# part of the name in torch.cuda.get_device_name; if one key contains another, the longer comes first. From the makers'
# data sheets and white papers (Volta to RTX Blackwell, CDNA 3), half of the figures they print "with sparsity".
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

OTHER_CHIP = re.compile(r"\b(Laptop|Max-Q|Ti|D|SUPER|MIG)\b")  # names of other chips, or of parts of one

# A machine with an NVIDIA driver has one of these files: on Linux, in a container, on WSL
NVIDIA_DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1")

# Builds of torch 2.9 to 2.14: wheel index -> the lowest and highest compute capability with kernels. CUDA 13 dropped
# Maxwell, Pascal and Volta; CUDA 12.6 came before Blackwell. From torch.cuda.PYTORCH_RELEASES_CODE_CC of 2.13.
BUILDS = {"cu130": ((7, 5), (12, 1)), "cu126": ((5, 0), (9, 0))}

SDPA = ("auto", "cudnn", "flash", "efficient", "math")  # kernels of scaled_dot_product_attention on CUDA


# -----------------------------------------------------------------------------
# The device


def pick_device(name="auto"):
    """"auto", "cpu", "cuda", "cuda:1" or "mps" -> (torch.device, reason to print). Raises ValueError if this machine
    has no such device, or has an NVIDIA GPU that this build of torch cannot use."""
    if name == "auto":
        if cuda_is_available():
            device = torch.device("cuda")
            check_kernels(name, device)
            return device, f"{torch.cuda.get_device_name()} found"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU found"
        check_driver(name)
        return torch.device("cpu"), why_no_gpu()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is none of auto, cpu, cuda, cuda:N, mps") from None
    available = {"cpu": True, "cuda": cuda_is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        if device.type == "cuda":
            check_driver(name)
        raise ValueError(f"device={name!r}: torch {torch.__version__} finds no such device here; "
                         "device=auto takes what there is")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device={name!r}: there are {count} CUDA device(s) here, counted from 0")
        check_kernels(name, device)
    return device, "asked for"


def cuda_is_available():
    """torch.cuda.is_available() without its warning about the driver: check_driver reports that in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def nvidia_driver():
    """Whether this machine has an NVIDIA driver."""
    return any(Path(file).exists() for file in NVIDIA_DRIVER)


def install_torch(index):
    """The command that replaces this torch with another build of the same version, from a wheel index."""
    version = torch.__version__.partition("+")[0]
    return f"pip install --force-reinstall --index-url https://download.pytorch.org/whl/{index} torch=={version}"


def why_no_gpu():
    """Why device=auto picks the CPU, in words."""
    if torch.version.cuda is None and torch.version.hip is None and nvidia_driver():
        return ("this torch is a CPU build; an NVIDIA driver is here: install a CUDA build with "
                f"{install_torch('cu130')}, or with cu126 where the driver is older than 580")
    return "no GPU found"


def check_driver(name):
    """Raises ValueError if there is an NVIDIA driver but CUDA does not start, in which case torch.cuda.is_available()
    is False as if there were no GPU. `name` is the device setting, for the error."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None or hidden or not nvidia_driver():
        return
    try:
        torch.cuda.init()
        return
    except RuntimeError as e:
        error = " ".join(str(e).split())
    if "No CUDA GPUs are available" in error or "Found no NVIDIA driver" in error:
        return  # a container, for example, that has no access to the machine's GPUs
    build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    old = re.search(r"driver on your system is too old \(found version (\d+)\)", error)
    if old is None:
        raise ValueError(f"device={name!r}: CUDA does not start here ({error.partition('. ')[0]}), and {build}; "
                         "--device=cpu runs without it")
    major, minor = int(old[1]) // 1000, int(old[1]) % 1000 // 10
    mend = "update the driver"
    if major == 12 and not torch.version.cuda.startswith("12."):
        mend = f"update the driver, or for a GPU older than Blackwell {install_torch('cu126')}"
    raise ValueError(f"device={name!r}: the NVIDIA driver here is for CUDA {major}.{minor}, and {build}: {mend}; "
                     "--device=cpu runs without the GPU")


def runs_on(arch, capability):
    """Whether code for "sm_86", "sm_90a" or "compute_90" runs on a GPU of this compute capability, such as (8, 9).

    A binary (sm) runs on later minor versions of its major version, PTX (compute) on all later GPUs. "a" restricts
    either to exactly its version (CUDA C++ Programming Guide, Binary Compatibility and PTX Compatibility)."""
    kind, _, version = arch.partition("_")
    number = int(version.rstrip("af"))
    built = divmod(number, 10)
    if version.endswith("a"):
        return capability == built
    if kind == "compute":
        return capability >= built
    return capability[0] == built[0] and capability[1] >= built[1]


def check_kernels(name, device):
    """Raises ValueError if this build of torch has no kernels for the GPU. `name` is the device setting."""
    archs = torch.cuda.get_arch_list()
    if torch.version.cuda is None or not archs:  # AMD GPUs have names instead of compute capabilities
        return
    capability = tuple(torch.cuda.get_device_capability(device))
    if any(runs_on(arch, capability) for arch in archs):
        return
    gpu = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
    raise ValueError(f"device={name!r}: {gpu}, torch {torch.__version__} has kernels for {' '.join(archs)} only; "
                     f"{build_for(capability)}; --device=cpu runs without the GPU")


def build_for(capability):
    """Which build of torch has kernels for a compute capability that the installed build does not support, in words."""
    if capability < (5, 0):
        return "no build of torch >= 2.9 has"
    for index, (lowest, highest) in BUILDS.items():
        if lowest <= capability <= highest:
            driver = "a driver of CUDA 13 and " if index == "cu130" else ""
            low, high = (f"sm_{major}{minor}" for major, minor in (lowest, highest))
            return f"the build {index} has {low} to {high}: {driver}{install_torch(index)}"
    return "install a newer torch, built for this GPU"


def pick_threads(asked=0):
    """`threads` of the settings, 0: torch's choice -> (how many threads torch shall use on the CPU, reason to print).

    torch counts the cores that a process may run on. A container can have a share of their time that is smaller; more
    threads than that wait for each other in every operation."""
    if asked:
        return asked, "asked for"
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return threads, "OMP_NUM_THREADS"
    share = cpu_share()
    if share and share < threads:
        return max(1, int(share)), f"this container's share of {threads} cores"
    return threads, "one for each core"


def cpu_share(file="/sys/fs/cgroup/cpu.max"):
    """How many cores the control group of this process may keep busy (Linux, cgroup v2); None: as many as there are."""
    try:
        quota, period = Path(file).read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None


# -----------------------------------------------------------------------------
# Precision


def pick_dtype(name, device):
    """"auto", "float32", "bfloat16" or "float16" -> (torch.dtype, reason to print). Raises ValueError."""
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
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX). Emulated, it is slower than float32."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # private: a torch may lack them
        is_supported = getattr(torch.cpu, name, None)
        if is_supported and is_supported():
            return True
    return False


def autocast(device, dtype):
    """A function that returns a context to run a model in: mixed precision, or none in fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype)


def use_tf32(enabled, device):
    """Allows or forbids CUDA to multiply fp32 matrices in TF32: 10 bits of mantissa instead of 23."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if enabled else "highest")


# -----------------------------------------------------------------------------
# Attention kernels


def use_sdpa(name, device):
    """Restricts scaled_dot_product_attention to one CUDA kernel in this whole process: a name in SDPA, or "auto" for
    torch's own choice. Raises ValueError for another name, and for a kernel if the device is not CUDA."""
    if name not in SDPA:
        raise ValueError(f"sdpa={name!r} is none of {', '.join(SDPA)}")
    if name == "auto":
        return
    if device.type != "cuda":
        raise ValueError(f"sdpa={name!r} needs a CUDA device, and this is {device.type}: sdpa=auto works everywhere")
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(name == "efficient")
    torch.backends.cuda.enable_math_sdp(name == "math")


def inference_kernels(device):
    """The context to run inference in: scaled_dot_product_attention without cuDNN's kernel.

    From torch 2.11 SDPA prefers cuDNN on Hopper and B200 (with cuDNN 9.15.1 or later, which CUDA 13 builds have). cuDNN
    takes about 0.4 s to plan for each new shape, and decoding has a new shape at every length. On B200 it was reported
    to be wrong for a query of length 1 (pytorch/pytorch#193893). A kernel chosen with use_sdpa stays the only one.
    """
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        return contextlib.nullcontext()
    enabled = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    kernels = [kernel for kernel, is_on in enabled.items() if is_on]
    if not kernels:
        return contextlib.nullcontext()  # use_sdpa("cudnn")
    # Without set_priority: torch sets up its order once, at the first attention of the process, and a priority restored
    # over it would change the kernel that training gets afterwards. With cuDNN off that order is right.
    return sdpa_kernel(kernels)


def sdpa_kernel_of(device, dtype, *, batch, queries, keys, heads, kv_heads, head_dim, causal):
    """The kernel that scaled_dot_product_attention picks now for this shape, `queries` and `keys` in tokens: "cudnn" |
    "flash" | "efficient" | "math", or "unknown". If gradients are enabled, the tensors require them, as in training."""
    names = {SDPBackend.CUDNN_ATTENTION: "cudnn", SDPBackend.FLASH_ATTENTION: "flash",
             SDPBackend.EFFICIENT_ATTENTION: "efficient", SDPBackend.MATH: "math"}
    grad = torch.is_grad_enabled()
    try:
        q = torch.empty(batch, queries, heads, head_dim, device=device, dtype=dtype, requires_grad=grad)
        k = torch.empty(batch, keys, kv_heads, head_dim, device=device, dtype=dtype, requires_grad=grad)
        q = q.transpose(1, 2)  # (B, heads, T, head_dim), with the same strides as in model.py
        k = k.transpose(1, 2)
        choice = torch._fused_sdp_choice(q, k, k, is_causal=causal, enable_gqa=heads != kv_heads)
        return names.get(SDPBackend(choice), "unknown")
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return "unknown"  # torch's function is private, and may change


# -----------------------------------------------------------------------------
# torch.compile


def has_compiler(variable, names):
    """Whether an environment variable names a compiler, or one of the names is on PATH."""
    return bool(os.environ.get(variable)) or any(shutil.which(name) for name in names)


def has_python_h():
    """Whether the headers of this Python are installed, as inductor and triton look for them."""
    folders = [sysconfig.get_path("include")]
    folders.append(sysconfig.get_path("include", "posix_prefix"))  # another one on Debian
    return any((Path(folder) / "Python.h").is_file() for folder in folders)


def missing_for_compile(device):
    """The tools that torch.compile needs for this device and this machine lacks, each with the way to install it."""
    missing = []
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            missing.append("triton: pip install triton")
        if not has_compiler("CC", ("gcc", "clang")):  # where triton looks
            missing.append("a C compiler: apt install gcc")
    if device.type == "cpu" and not has_compiler("CXX", ("c++", "g++", "clang++")):
        missing.append("a C++ compiler: apt install g++")
    if device.type in ("cpu", "cuda") and not has_python_h():
        missing.append("Python.h: apt install python3-dev")
    return missing


def can_compile(device):
    """The reason why torch.compile cannot work here, or None if it should."""
    if sys.platform == "win32":
        return "not on Windows"
    if device.type == "cpu" and not has_compiler("CXX", ("c++", "g++", "clang++")):
        return "no C++ compiler found"
    return None


def compile_one(device):
    """Compiles a small function and runs it forward and backward. Raises whatever torch.compile raises."""
    x = torch.ones(64, device=device, requires_grad=True)
    torch.compile(lambda x: x.sin() + x.cos())(x).sum().backward()


def inner_error(error):
    """The innermost cause of an exception. A level's cause is the exception that torch.compile wrapped
    (inner_exception), else the one named by `raise ... from`, else the one that was being handled."""
    seen = {id(error)}
    while True:
        context = None if error.__suppress_context__ else error.__context__
        inner = getattr(error, "inner_exception", None) or error.__cause__ or context
        if not isinstance(inner, BaseException) or id(inner) in seen:
            return error
        seen.add(id(inner))
        error = inner


def what_failed(error):
    """The innermost cause of an error, in one line. If memory is full it raises that cause instead: without
    torch.compile a run needs no less."""
    cause = inner_error(error)
    if memory_is_full(cause):
        raise cause from None
    text = str(cause).strip().partition("\n")[0]
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


# -----------------------------------------------------------------------------
# Peak speed


def peak_flops(device, dtype, tf32=False):
    """The most FLOP/s that `device` can reach in `dtype`, or None if unknown. A CPU's is measured.
    `tf32`: fp32 matrices are multiplied in TF32, if the GPU has it."""
    if device.type == "cpu":
        return matmul_flops(dtype, torch.get_num_threads())
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if OTHER_CHIP.search(name):
        return None
    matches = (peaks for known, peaks in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name))
    half, single = next(matches, (None, None))
    if dtype != torch.float32:
        return half
    # TF32 came with Ampere. In NVIDIA's data sheets it is half as fast as bf16: A100 156 of 312 TFLOP/s, H100 495 of
    # 989, L40S 183 of 362, RTX 4090 82.6 of 165, B200 1125 of 2250, all dense.
    if tf32 and half and torch.version.hip is None:
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return half / 2
    return single


@functools.cache
def matmul_flops(dtype, threads):
    """FLOP/s of this CPU in a matrix product of `dtype` with torch's `threads`: the best of a few tries in about 0.1 s.
    No data sheet knows a CPU's clock under load, so its MFU is a share of this measurement."""
    n = 768  # wide enough for the caches' blocks, and 0.9 GFLOP
    a = torch.ones(n, n, dtype=dtype)
    seconds = math.inf
    began = time.perf_counter()
    for _ in range(8):
        clock = time.perf_counter()
        torch.mm(a, a)
        seconds = min(seconds, time.perf_counter() - clock)
        if clock - began > 0.1:
            break
    return 2 * n**3 / seconds


# -----------------------------------------------------------------------------
# Memory


def allocate_in_segments():
    """Makes the CUDA allocator grow its segments (expandable_segments), unless the user set PYTORCH_ALLOC_CONF or
    PYTORCH_CUDA_ALLOC_CONF. Call it before the first CUDA tensor. Linux only, without WSL.

    Micro-batches of different lengths need tensors of different sizes. In segments of fixed size, freed tensors leave
    holes that no later tensor fits into, and memory runs out while gigabytes are free."""
    is_set = "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ
    if sys.platform != "linux" or "microsoft" in os.uname().release or torch.version.hip or is_set:
        return
    wanted = "expandable_segments:True"
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if release < (2, 10):  # it reads only the old name (pytorch/pytorch#183387), at the first tensor
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = wanted
        return
    os.environ["PYTORCH_ALLOC_CONF"] = wanted  # for child processes: a CUDA build reads it when torch is imported
    set_now = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if set_now:
        with contextlib.suppress(RuntimeError):  # a driver without it: memory is allocated as before
            set_now(wanted)


def keep_memory():
    """Makes glibc keep the memory that this process frees, unless the user set one of its MALLOC_ variables. Call it
    before training on a CPU. Does nothing without glibc.

    By default a block of more than 32 MB goes back to the kernel as soon as it is freed. Each step then gets its logits
    and gradients as new pages, which the kernel fills with zeros first: with GPT-2's 124M in bfloat16 that is a sixth
    of the CPU time of a step (docs/log.md). The numbers are mallopt(3)'s: M_TRIM_THRESHOLD is -1, M_MMAP_MAX is -4."""
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt:
        mallopt(-1, -1)  # never shrink the heap
        mallopt(-4, 0)  # all blocks come from the heap


def memory_gb(device):
    """Peak memory so far in GB (1e9 bytes), of the GPU, else of this process; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = proc_bytes("/proc/self/status", "VmHWM:")
    if peak is not None:
        return peak / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes; elsewhere it includes a parent's peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory(device, processes=1):
    """Bytes that this process can still allocate: on the GPU, else its share of the machine's memory if `processes` of
    them run on it. None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = proc_bytes("/proc/meminfo", "MemAvailable:")
    return None if free is None else free // processes


def proc_bytes(path, field):
    """The bytes in a field of a file of Linux's /proc; None on other systems."""
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))
    except (OSError, StopIteration):
        return None


def rss_gb():
    """Memory of this process that is in RAM now, in GB (1e9 bytes); None if there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, ValueError):
        return None


def memory_is_full(error):
    """One line that says so if `error` means that the memory of a CPU or a GPU is full, else None."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return ". ".join(text.split(". ", 2)[:2])
    if isinstance(error, MemoryError) or "can't allocate memory" in text:  # torch has no class for a CPU's memory
        return f"this machine's memory is full ({text[-200:]})"
    return None
