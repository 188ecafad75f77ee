"""
What this machine has, and whether its ranks can talk: to be read, or pasted into a bug report.

    python doctor.py
    torchrun --standalone --nproc_per_node=8 doctor.py      # and between its GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 doctor.py  # on both machines

Under torchrun every rank answers to its number, passes a message around a ring, and takes part in all-reduces of
growing size. Each stage has a time-out: where a rank is missing or hangs, one block says which, and which settings to
try.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from configurator import configure, fail
from device import (
    can_compile,
    compile_one,
    inference_kernels,
    inner_error,
    missing_for_compile,
    peak_flops,
    pick_device,
    pick_dtype,
    sdpa_kernel_of,
)
from model import flash_attn_func, pick_attention
from training.monitor import environment
from training.ranks import from_environment, leave

# -----------------------------------------------------------------------------
out_dir = "out"               # where runs would go: its disk is looked at
device = "auto"               # auto | cpu | cuda | cuda:N | mps; under torchrun cuda is each rank's own
dtype = "auto"                # auto | float32 | bfloat16 | float16
timeout = 30.0                # seconds that any stage under torchrun may take
largest = 64                  # megabytes of the largest all-reduce
# -----------------------------------------------------------------------------

SETTINGS = {  # what to try, by backend
    "nccl": (  # docs/scaling.md says more of them
        ("NCCL_DEBUG=INFO", "says which network and which transport NCCL takes, and what fails"),
        ("NCCL_SOCKET_IFNAME={interfaces}", "the interface that reaches the other machines, where NCCL takes another"),
        ("NCCL_IB_DISABLE=1", "without InfiniBand or RoCE: if that works, look at them (ibstat)"),
        ("NCCL_P2P_DISABLE=1", "without direct copies between GPUs: if that works, look at IOMMU and ACS"),
        ("NCCL_SHM_DISABLE=1", "without shared memory: if that works, /dev/shm is too small (docker: --shm-size)"),
        ("TORCH_DISTRIBUTED_DEBUG=DETAIL", "has PyTorch check that all ranks ask for the same"),
    ),
    "gloo": (
        ("GLOO_SOCKET_IFNAME={interfaces}", "the interface that reaches the other machines, where gloo takes another"),
        ("TORCH_DISTRIBUTED_DEBUG=DETAIL", "has PyTorch check that all ranks ask for the same"),
    ),
}
# what torch and its communication read from the environment, by how a name begins; doctor.py prints those that are set
READ = ("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "TORCH_DISTRIBUTED_DEBUG", "GLOO_", "TP_SOCKET_IFNAME", "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF")
GRACE = 3  # seconds in which the rank that reports is not ended by torchrun because another one was


# -----------------------------------------------------------------------------
# One machine


def gpus():
    """A line for each CUDA device."""
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield f"cuda:{i} {p.name}, {p.total_memory / 1e9:.1f} GB, compute capability {p.major}.{p.minor}"


def attention_backends(where, precision):
    kind, why = pick_attention("auto", where, precision, 1024, 64)
    ours = f"{kind} ({why}); flash-attn {'is' if flash_attn_func else 'is not'} installed"
    if where.type != "cuda":
        return ours
    on = [name for name in ("flash", "mem_efficient", "cudnn", "math")
          if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    return f"{ours}; SDPA may use {', '.join(on)}"


def sdpa_kernels(where, precision):
    """(kernel that SDPA picks to train, kernel to decode), for 12 heads of 64: 8 sequences of 1024 tokens, and 8
    requests with a query for each 512 keys."""
    heads = {"batch": 8, "heads": 12, "kv_heads": 12, "head_dim": 64}
    training = sdpa_kernel_of(where, precision, queries=1024, keys=1024, causal=True, **heads)
    with torch.no_grad(), inference_kernels(where):
        decoding = sdpa_kernel_of(where, precision, queries=1, keys=512, causal=False, **heads)
    return training, decoding


def try_compile(where):
    """Compiles a small function, runs it forward and backward -> "works (N s)", or why it does not."""
    clock = time.perf_counter()
    try:
        compile_one(where)
    except Exception as e:  # the compilers' errors have no class in common
        inner = inner_error(e)
        reason = (str(inner).strip() or type(inner).__name__).splitlines()[0]
        return "; ".join(["fails", *(f"missing {item}" for item in missing_for_compile(where)), reason])
    return f"works ({time.perf_counter() - clock:.0f} s)"


def disk(folder, size=64):
    """(GB free, MB/s of writing `size` MB) where `folder` is, or would be; nothing is left there."""
    there = next(p for p in (folder, *folder.parents) if p.is_dir())
    data = os.urandom(2**20)
    clock = time.perf_counter()
    with tempfile.TemporaryFile(dir=there) as file:
        for _ in range(size):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return shutil.disk_usage(there).free / 1e9, size * 2**20 / 1e6 / (time.perf_counter() - clock)


def infiniband(root=Path("/sys/class/infiniband")):
    """"mlx5_0 4: ACTIVE 400 Gb/sec (4X NDR)" for each port."""
    ports = sorted(root.glob("*/ports/*"))
    read = lambda port, name: (port / name).read_text(encoding="utf-8").strip()  # noqa: E731
    return [f"{port.parent.parent.name} {read(port, 'state')} {read(port, 'rate')}" for port in ports]


def topology():
    """The matrix of `nvidia-smi topo -m`: NV# is NVLink, PIX to SYS PCIe, nearest first. "" where there is none."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, encoding="utf-8", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n\n")[0].rstrip() if done.returncode == 0 else ""


def environment_settings():
    """Those of READ that are set, by name."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(READ)}


def machine(where, why, world=1):
    """What there is, as (name, text) lines for people and a dict for programs. Where other ranks wait, nothing is
    compiled: it may take longer than their time-out."""
    precision, dtype_why = pick_dtype(dtype, where)
    name = str(precision).removeprefix("torch.")
    peak = peak_flops(where, precision)
    recorded = environment(where, None)
    free, speed = disk(Path(out_dir).resolve())
    has_nccl = where.type == "cuda" and dist.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"
    gloo = "yes" if dist.is_available() and dist.is_gloo_available() else "no"
    dirty = " with changes" if recorded["dirty_diff"] or recorded["untracked"] else ""
    ports, settings = infiniband(), environment_settings()
    training, decoding = sdpa_kernels(where, precision)
    compiles = can_compile(where) or ("not tried under torchrun" if world > 1 else try_compile(where))
    lines = [
        ("system", f"{platform.platform()}, Python {recorded['python']}"),
        ("packages", ", ".join(f"{package} {version}" for package, version in recorded["packages"].items())),
        ("libraries", f"CUDA {torch.version.cuda or 'none'}, NCCL {nccl}, gloo {gloo}"),
        ("cpu", f"{recorded['cpu']}, {os.cpu_count()} cores, {recorded['threads']} threads"),
        *(("gpu", line) for line in gpus()),
        ("device", f"{where} ({why})"),
        ("dtype", f"{name} ({dtype_why})"),
        ("peak", f"{peak / 1e12:.3g} TFLOP/s, what MFU is a share of" if peak else "not known, so MFU is n/a"),
        ("attention", attention_backends(where, precision)),
        ("attention", f"SDPA picks {training} to train, {decoding} to decode ({name}, heads of 64)"),
        ("compile", compiles),
        ("disk", f"{free:.1f} GB free, {speed:.0f} MB/s written, at out_dir={out_dir}"),
        *(("infiniband", port) for port in ports or ["none"]),
        *(("topology", line) for line in topology().splitlines()),
        ("variables", " ".join(f"{key}={value}" for key, value in settings.items()) or "none set"),
        ("commit", f"{recorded['commit'] or 'not a git checkout'}{dirty}"),
        ("env.json", f"environment_sha256 {recorded['environment_sha256']}"),
    ]
    del recorded["dirty_diff"], recorded["untracked"]
    return lines, {**recorded, "dtype": name, "peak_flops": peak, "disk_free_gb": free, "disk_mb_per_s": speed,
                   "sdpa_training": training, "sdpa_decoding": decoding, "infiniband": ports, "variables": settings}


# -----------------------------------------------------------------------------
# Many ranks


def interfaces():
    return [name for _, name in socket.if_nameindex()]


class Ranks:
    """The ranks of a torchrun, and what each has come to, in a store of their own."""

    def __init__(self, rank, world, backend):
        self.rank, self.world, self.backend = rank, world, backend
        self.cards = []  # what each rank says of itself
        self.store = self.connect(first=True)

    def connect(self, first=False):
        """A client of the store that torchrun's agent holds; without an agent rank 0 does, from its first call on."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            return dist.TCPStore(host, port, is_master=first and self.rank == 0 and not agent,
                                 timeout=timedelta(seconds=timeout), wait_for_workers=False)
        except dist.DistError as e:
            self.tell(f"rank {self.rank} on {socket.gethostname()} does not reach {host}:{port}", [
                str(e).splitlines()[0], "does that name mean the same address there, and is the port open?"])

    def done(self, stage, value=""):
        self.store.set(f"doctor/{stage}/{self.rank}", value)
        if self.store.add(f"doctor/{stage}", 1) == self.world:
            self.store.set(f"doctor/{stage}/all", "")

    def all_done(self, stage):
        """Whether all ranks are, within the time-out. One small question at a time, as there may be thousands."""
        end = time.monotonic() + timeout
        while not self.store.check([f"doctor/{stage}/all"]):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def missing(self, stage):
        return [r for r in range(self.world) if not self.store.check([f"doctor/{stage}/{r}"])]

    def roll_call(self):
        """What every rank says of itself; those that say nothing are named."""
        if not self.all_done("here"):
            self.first_to_tell()
            absent = self.missing("here")
            self.tell(f"{ranks(absent)} of {self.world} did not come within {timeout:g} s", [
                f"{ranks([r for r in range(self.world) if r not in absent])} did; one that is missing was not started, "
                "or died, or cannot reach the store: its own output says why",
                "is torchrun running on every machine, with the same --nnodes and --rdzv_endpoint?"])
        keys = [f"doctor/here/{r}" for r in range(self.world)]
        self.cards = [json.loads(card) for card in self.store.multi_get(keys)]

    @contextmanager
    def stage(self, name, means):
        """A part that ends for all ranks within the time-out, or for none: `means` is what it shows of rank r."""
        guard = threading.Timer(timeout, self.hangs, [name, means])
        guard.daemon = True
        guard.start()
        try:
            yield
        except RuntimeError as e:  # torch.distributed's errors
            self.hangs(name, means, str(e).splitlines()[0])
        guard.cancel()
        self.done(name)

    def hangs(self, name, means, error=""):
        self.first_to_tell()
        stuck = self.missing(name)
        hosts = sorted({self.cards[r]["host"] for r in stuck})
        self.tell(f"{name}: {ranks(stuck)} of {self.world} (on {', '.join(hosts)}) "
                  + ("failed" if error else f"did not get through within {timeout:g} s"),
                  [means(r) for r in stuck[:8]] + [error] * bool(error))

    def first_to_tell(self):
        """Returns on the first rank to have trouble; the others end, in silence."""
        if self.store.add("doctor/trouble", 1) > 1:
            time.sleep(GRACE)
            os._exit(1)

    def tell(self, trouble, details):
        """The block of what is wrong and what to try; the end."""
        names = [name for name in interfaces() if name != "lo"] or ["lo"]
        tries = [(setting.format(interfaces=",".join(names)), why) for setting, why in SETTINGS[self.backend]]
        width = max(len(setting) for setting, _ in tries)
        lines = [f"error: {trouble}", *(f"  {detail}" for detail in details), "  try, on every machine:",
                 *(f"    {setting:<{width}}  {why}" for setting, why in tries)]
        print("\n" + "\n".join(lines) + "\n", file=sys.stderr, flush=True)
        os._exit(1)  # also from the guard's thread, and with a collective that never returns


def ranks(numbers):
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    spans = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    text = ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def check_cards(them):
    """One rank, one GPU."""
    holders = {}
    for r, card in enumerate(them.cards):
        if card["device"] != "cpu":
            holders.setdefault((card["host"], card["uuid"]), []).append(r)
    shared = [f"{ranks(held)} on {host}" for (host, _), held in holders.items() if len(held) > 1]
    if shared:
        them.first_to_tell()
        them.tell(f"one GPU is shared by {'; '.join(shared)}",
                  ["torchrun --nproc_per_node=N with no more than there are; CUDA_VISIBLE_DEVICES the same for all"])


def bandwidths(them, where):
    """All-reduces from 4 kB up -> rows of MB, ms, and GB/s as nccl-tests has them: algbw is size / time, busbw
    2 (n - 1) / n times that: what each link carries in a ring, whatever the number of ranks."""
    rows, size = [], 4096
    while size <= largest * 1_000_000:
        x = torch.ones(size // 4, device=where)
        with them.stage(f"all-reduce of {size:,} bytes", lambda r: f"rank {r} on {them.cards[r]['host']}"):
            times = []
            for _ in range(6):
                x.fill_(them.rank)
                clock = time.perf_counter()
                dist.all_reduce(x)
                total = x[-1].item()  # waits for the device
                times.append(time.perf_counter() - clock)
            assert total == them.world * (them.world - 1) / 2, "an all-reduce is a sum"
        seconds = sorted(times[1:])[2]  # the median of five, after one that opens connections
        bus = size / seconds * 2 * (them.world - 1) / them.world
        rows.append({"bytes": size, "ms": 1000 * seconds, "algbw_gb_s": size / seconds / 1e9, "busbw_gb_s": bus / 1e9})
        size *= 8
    return rows


def arrive(where, rank, world):
    """Says that this rank is here, and what it runs on. -> Ranks"""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            fail(f"WORLD_SIZE={world}, but {name} is not set: torchrun sets both")
    them = Ranks(rank, world, "nccl" if where.type == "cuda" else "gloo")
    card = {"host": socket.gethostname(), "pid": os.getpid(), "device": where.type, "variables": environment_settings()}
    if where.type == "cuda":
        card |= {"name": torch.cuda.get_device_name(where), "uuid": str(torch.cuda.get_device_properties(where).uuid)}
    them.done("here", json.dumps(card))
    return them


def talk(them, where):
    """Whether the ranks reach each other, and how fast: bandwidths' rows. Ends with what is wrong where they do not."""
    them.roll_call()
    check_cards(them)
    rank, world = them.rank, them.world
    with them.stage("connecting", lambda r: f"rank {r} on {them.cards[r]['host']} does not reach all others"):
        dist.init_process_group(them.backend, store=them.connect(), rank=rank, world_size=world,
                                timeout=timedelta(seconds=2 * timeout))  # later than the guard
    before, after = (rank - 1) % world, (rank + 1) % world
    with them.stage("a message around the ring", lambda r: f"rank {r} heard nothing from rank {(r - 1) % world}"):
        sent, got = torch.full((1,), float(rank), device=where), torch.empty(1, device=where)
        swap = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, got, before)]
        for work in dist.batch_isend_irecv(swap):
            work.wait()
        assert got.item() == before, "the message is its sender's number"
    rows = bandwidths(them, where)
    them.done("end")
    if rank == 0:  # which may hold the store
        them.all_done("end")
    return rows


def differing(cards):
    """{variable: {value: ranks}} of those that are not the same everywhere, which may be meant so, or forgotten."""
    found = {}
    for name in sorted({name for card in cards for name in card["variables"]} - {"CUDA_VISIBLE_DEVICES"}):
        for r, card in enumerate(cards):
            found.setdefault(name, {}).setdefault(card["variables"].get(name, ""), []).append(r)
    return {name: held for name, held in found.items() if len(held) > 1}


def show_ranks(backend, cards, rows):
    print(f"\n{len(cards)} ranks over {backend}, all reached")
    for host in dict.fromkeys(card["host"] for card in cards):
        there = [r for r, card in enumerate(cards) if card["host"] == host]
        kinds = sorted({cards[r].get("name", "CPU") for r in there})
        print(f"  {host}: {ranks(there)}, {', '.join(kinds)}")
    for name, held in differing(cards).items():
        values = [f"{value or 'not set'} on {ranks(there)}" for value, there in held.items()]
        print(f"  {name} differs: {'; '.join(values)}")
    print(f"\n{'all-reduce':>12} {'ms':>9} {'algbw GB/s':>11} {'busbw GB/s':>11}")
    for row in rows:
        print(f"{row['bytes']:>12,} {row['ms']:>9.3f} {row['algbw_gb_s']:>11.3f} {row['busbw_gb_s']:>11.3f}")


def main():
    try:
        world, rank, local = (from_environment(name, 0) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        where, why = pick_device(device)
        if where.type == "cuda" and world > 1:
            where, why = pick_device(f"cuda:{local}")[0], "the rank's own"
            torch.cuda.set_device(where)
        pick_dtype(dtype, where)
        them = arrive(where, rank, world) if world > 1 else None
        lines, found = machine(where, why, world) if rank == 0 else ([], {})
    except (ValueError, OSError) as e:
        fail(e)
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        print(f"{name:<{width}}  {text}", flush=True)
    if them:
        rows = talk(them, where)
        found |= {"backend": them.backend, "ranks": them.cards, "all_reduce": rows}
        if rank == 0:
            show_ranks(them.backend, them.cards, rows)
    if rank == 0:
        print(json.dumps(found))
    if them:
        leave(0)


if __name__ == "__main__":
    configure(globals())
    main()
