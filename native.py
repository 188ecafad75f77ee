"""
C++ of this project, compiled once for the CPU at hand (`load`): fused.cpp for training, inference/kernels.cpp for
generation. The result is kept in ~/.cache/minichat, or under XDG_CACHE_HOME.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# without errno and traps the compiler may use vectors for roots and rounding; no bit of a result changes
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def cache_folder():
    """Where compiled code is kept between runs: ~/.cache/minichat, or XDG_CACHE_HOME/minichat. It is made for its user
    alone, because what lies there is executed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minichat"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def compiler():
    """The C++ compiler's path, or None."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def cpu_features():
    """The instructions of this CPU, as far as the system tells: -march=native makes other code for another CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        if line.startswith(("flags", "Features")):
            return line
    return platform.processor()


def build(source, folder):
    """Compile the C++ file `source` into `folder` unless it is there already. -> the library's path. Raises
    RuntimeError."""
    program = compiler()
    if program is None:
        raise RuntimeError("no C++ compiler: apt install g++")
    parts = (source.read_text(encoding="utf-8"), program, *FLAGS, platform.machine(), cpu_features())
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
    target = folder / f"{source.stem}_{name}.so"
    if target.exists():
        return target
    print(f"compiling {source.name} for this CPU, once: some ten seconds", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        made = Path(beside) / "library.so"
        command = [program, *FLAGS, str(source), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            first_line = (result.stderr.strip() or "no message").splitlines()[0]
            raise RuntimeError(f"{program} does not compile {source.name}: {first_line}")
        os.replace(made, target)  # whole or not at all, also when several processes compile at once
    return target


@functools.cache
def load(source):
    """-> (the library of the C++ file `source`, "") or (None, why there is none). The first call compiles it, unless it
    is kept from an earlier run."""
    if sys.byteorder != "little" or sys.platform == "win32":
        return None, f"{source.name} is not written for {sys.platform}"
    try:
        return ctypes.CDLL(str(build(source, cache_folder()))), ""
    except (OSError, RuntimeError) as error:
        return None, str(error)
