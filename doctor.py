"""
Report what this machine has, and whether its ranks can communicate. Paste the report into a bug report.

    python doctor.py
    torchrun --standalone --nproc_per_node=8 doctor.py      # also between its GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 doctor.py  # on both machines

Under torchrun every rank reports that it is there, passes a message around a ring, and takes part in all-reduces of
growing size. Each stage has a time-out. If a rank is missing or hangs, the error names it and the settings to try.
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

from attention import flash_attn_func, pick_attention
from configurator import Settings, configure, fail
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
from training.monitor import environment
from training.ranks import from_environment, leave

# -----------------------------------------------------------------------------
out_dir = "out"               # where runs would go: its disk is measured
device = "auto"               # auto | cpu | cuda | cuda:N | mps; under torchrun, cuda is each rank's own GPU
dtype = "auto"                # auto | float32 | bfloat16 | float16
timeout = 30.0                # seconds that any stage under torchrun may take
largest = 64                  # megabytes of the largest all-reduce
# -----------------------------------------------------------------------------

VARIABLES_TO_TRY = {  # by backend
    "nccl": (  # docs/scaling.md explains more of them
        ("NCCL_DEBUG=INFO", "reports the network and the transport that NCCL picks, and what fails"),
        ("NCCL_SOCKET_IFNAME={interfaces}", "the interface that reaches the other machines, if NCCL picks another"),
        ("NCCL_IB_DISABLE=1", "no InfiniBand or RoCE: if that works, look at them (ibstat)"),
        ("NCCL_P2P_DISABLE=1", "no direct copies between GPUs: if that works, look at IOMMU and ACS"),
        ("NCCL_SHM_DISABLE=1", "no shared memory: if that works, /dev/shm is too small (docker: --shm-size)"),
        ("TORCH_DISTRIBUTED_DEBUG=DETAIL", "PyTorch checks that all ranks call the same collective"),
    ),
    "gloo": (
        ("GLOO_SOCKET_IFNAME={interfaces}", "the interface that reaches the other machines, if gloo picks another"),
        ("TORCH_DISTRIBUTED_DEBUG=DETAIL", "PyTorch checks that all ranks call the same collective"),
    ),
}
# How the names of environment variables begin that torch and its communication read
VARIABLES = (
    "NCCL_", "TORCH_NCCL_", "TORCH_FR_", "TORCH_DISTRIBUTED_DEBUG", "GLOO_", "TP_SOCKET_IFNAME", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
GRACE = 3  # seconds that other ranks wait to exit: torchrun ends all ranks when the first one exits


# -----------------------------------------------------------------------------
# One machine


def gpus():
    """A line for each CUDA device."""
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield f"cuda:{i} {p.name}, {p.total_memory / 1e9:.1f} GB, compute capability {p.major}.{p.minor}"


def attention_backends(where, precision):
    """The attention that attn=auto picks, and on CUDA the kernels that SDPA may use."""
    kind, why = pick_attention("auto", where, precision, 1024, 64)
    installed = "is" if flash_attn_func else "is not"
    text = f"{kind} ({why}); flash-attn {installed} installed"
    if where.type != "cuda":
        return text
    enabled = [name for name in ("flash", "mem_efficient", "cudnn", "math")
               if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    return f"{text}; SDPA may use {', '.join(enabled)}"


def sdpa_kernels(where, precision):
    """(kernel that SDPA picks to train, kernel to decode), for 12 heads of 64."""
    heads = {"batch": 8, "heads": 12, "kv_heads": 12, "head_dim": 64}
    training = sdpa_kernel_of(where, precision, queries=1024, keys=1024, causal=True, **heads)
    with torch.no_grad(), inference_kernels(where):
        decoding = sdpa_kernel_of(where, precision, queries=1, keys=512, causal=False, **heads)
    return training, decoding


def try_compile(where):
    """Compiles and runs a small function -> "works (N s)", or the reason why that fails."""
    clock = time.perf_counter()
    try:
        compile_one(where)
    except Exception as error:  # the compilers' errors have no class in common
        cause = inner_error(error)
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        missing = [f"missing {item}" for item in missing_for_compile(where)]
        return "; ".join(["fails", *missing, reason])
    return f"works ({time.perf_counter() - clock:.0f} s)"


def disk(folder, size=64):
    """(GB free, MB/s when writing `size` MB) on the disk of a folder that need not exist. Leaves no file there."""
    parent = next(path for path in (folder, *folder.parents) if path.is_dir())
    data = os.urandom(2**20)
    clock = time.perf_counter()
    with tempfile.TemporaryFile(dir=parent) as file:
        for _ in range(size):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - clock
    return shutil.disk_usage(parent).free / 1e9, size * 2**20 / 1e6 / seconds


def infiniband(root=Path("/sys/class/infiniband")):
    """"mlx5_0 4: ACTIVE 400 Gb/sec (4X NDR)" for each port."""
    lines = []
    for port in sorted(root.glob("*/ports/*")):
        state = (port / "state").read_text(encoding="utf-8").strip()
        rate = (port / "rate").read_text(encoding="utf-8").strip()
        lines.append(f"{port.parent.parent.name} {state} {rate}")
    return lines


def topology():
    """The matrix of `nvidia-smi topo -m`, or "": NV# is NVLink; PIX to SYS are PCIe, nearest first."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, encoding="utf-8", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n\n")[0].rstrip() if done.returncode == 0 else ""


def environment_settings():
    """The environment variables among VARIABLES that are set, by name."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}


def machine(c, where, why, world=1):
    """What this machine has, as (name, text) lines for people and a dict for programs. If other ranks wait (world > 1)
    nothing is compiled: that may take longer than their time-out."""
    precision, dtype_why = pick_dtype(c.dtype, where)
    dtype_name = str(precision).removeprefix("torch.")
    recorded = environment(where, None)
    training, decoding = sdpa_kernels(where, precision)
    free, speed = disk(Path(c.out_dir).resolve())
    peak = peak_flops(where, precision)
    facts = {"dtype": dtype_name, "peak_flops": peak, "disk_free_gb": free, "disk_mb_per_s": speed,
             "sdpa_training": training, "sdpa_decoding": decoding, "infiniband": infiniband(),
             "variables": environment_settings()}
    compiles = can_compile(where)
    if not compiles:
        compiles = "not tried under torchrun" if world > 1 else try_compile(where)
    packages = ", ".join(f"{name} {version}" for name, version in recorded["packages"].items())
    variables = " ".join(f"{key}={value}" for key, value in facts["variables"].items())
    reach = f"{peak / 1e12:.3g} TFLOP/s, the base of MFU" if peak else "not known, so MFU is n/a"
    changes = " with changes" if recorded["dirty_diff"] or recorded["untracked"] else ""
    lines = [
        ("system", f"{platform.platform()}, Python {recorded['python']}"),
        ("packages", packages),
        ("libraries", libraries(where)),
        ("cpu", f"{recorded['cpu']}, {os.cpu_count()} cores, {recorded['threads']} threads"),
        *(("gpu", line) for line in gpus()),
        ("device", f"{where} ({why})"),
        ("dtype", f"{dtype_name} ({dtype_why})"),
        ("peak", reach),
        ("attention", attention_backends(where, precision)),
        ("attention", f"SDPA picks {training} to train, {decoding} to decode ({dtype_name}, heads of 64)"),
        ("compile", compiles),
        ("disk", f"{free:.1f} GB free, {speed:.0f} MB/s written, at out_dir={c.out_dir}"),
        *(("infiniband", port) for port in facts["infiniband"] or ["none"]),
        *(("topology", line) for line in topology().splitlines()),
        ("variables", variables or "none set"),
        ("commit", f"{recorded['commit'] or 'not a git checkout'}{changes}"),
        ("env.json", f"environment_sha256 {recorded['environment_sha256']}"),
    ]
    del recorded["dirty_diff"], recorded["untracked"]
    return lines, {**recorded, **facts}


def libraries(where):
    nccl = "none"
    if where.type == "cuda" and dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    gloo = "yes" if dist.is_available() and dist.is_gloo_available() else "no"
    return f"CUDA {torch.version.cuda or 'none'}, NCCL {nccl}, gloo {gloo}"


# -----------------------------------------------------------------------------
# Many ranks


class Ranks:
    """The ranks that torchrun started, and the stages that each has finished, in a store that all can read."""

    def __init__(self, rank, world, backend, timeout):
        self.rank = rank
        self.world = world
        self.backend = backend
        self.timeout = timeout  # seconds that a stage may take
        self.cards = []         # what each rank reports about itself
        self.store = self.connect(first=True)

    def connect(self, first=False):
        """A client of the store. torchrun's agent hosts the store, or without an agent rank 0, in its `first` call."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        try:
            return dist.TCPStore(host, port, is_master=first and self.rank == 0 and not agent,
                                 timeout=timedelta(seconds=self.timeout), wait_for_workers=False)
        except dist.DistError as error:
            self.report(f"rank {self.rank} on {socket.gethostname()} does not reach {host}:{port}", [
                str(error).splitlines()[0],
                "does that name mean the same address there, and is the port open?"])

    def finish_stage(self, stage, value=""):
        """Notes in the store that this rank has finished a stage."""
        self.store.set(f"doctor/{stage}/{self.rank}", value)
        if self.store.add(f"doctor/{stage}", 1) == self.world:
            self.store.set(f"doctor/{stage}/all", "")

    def all_finished(self, stage):
        """Whether all ranks finish a stage within the time-out. Polls one key: there may be thousands of ranks."""
        end = time.monotonic() + self.timeout
        while not self.store.check([f"doctor/{stage}/all"]):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def unfinished(self, stage):
        """The ranks that have not finished a stage."""
        return [r for r in range(self.world) if not self.store.check([f"doctor/{stage}/{r}"])]

    def roll_call(self):
        """Reads what every rank reports about itself. Ends with an error that names the ranks that never did."""
        if not self.all_finished("here"):
            self.exit_unless_first()
            absent = self.unfinished("here")
            present = [r for r in range(self.world) if r not in absent]
            self.report(f"{ranks(absent)} of {self.world} did not come within {self.timeout:g} s", [
                f"{ranks(present)} did; a missing rank was not started, or died, or cannot reach the store: "
                "its own output says why",
                "is torchrun running on every machine, with the same --nnodes and --rdzv_endpoint?"])
        keys = [f"doctor/here/{r}" for r in range(self.world)]
        self.cards = [json.loads(card) for card in self.store.multi_get(keys)]

    @contextmanager
    def stage(self, name, symptom):
        """A stage that ends within the time-out, or ends all ranks. symptom(r) says what a hang of rank r means."""
        guard = threading.Timer(self.timeout, self.report_stage, [name, symptom])
        guard.daemon = True
        guard.start()
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors
            self.report_stage(name, symptom, str(error).splitlines()[0])
        guard.cancel()
        self.finish_stage(name)

    def report_stage(self, name, symptom, error=""):
        """Reports the ranks that have not finished a stage, because of an error or of the time-out."""
        self.exit_unless_first()
        stuck = self.unfinished(name)
        hosts = ", ".join(sorted({self.cards[r]["host"] for r in stuck}))
        happened = "failed" if error else f"did not get through within {self.timeout:g} s"
        details = [symptom(r) for r in stuck[:8]]
        if error:
            details.append(error)
        self.report(f"{name}: {ranks(stuck)} of {self.world} (on {hosts}) {happened}", details)

    def exit_unless_first(self):
        """Ends this process in silence unless it is the first rank with trouble: one rank reports."""
        if self.store.add("doctor/trouble", 1) > 1:
            time.sleep(GRACE)
            os._exit(1)

    def report(self, trouble, details):
        """Prints what is wrong and what to try, and ends the process."""
        interfaces = [name for _, name in socket.if_nameindex() if name != "lo"] or ["lo"]
        settings = [(setting.format(interfaces=",".join(interfaces)), why)
                    for setting, why in VARIABLES_TO_TRY[self.backend]]
        width = max(len(setting) for setting, _ in settings)
        lines = [f"error: {trouble}", *(f"  {detail}" for detail in details), "  try, on every machine:"]
        lines += [f"    {setting:<{width}}  {why}" for setting, why in settings]
        print("\n" + "\n".join(lines) + "\n", file=sys.stderr, flush=True)
        os._exit(1)  # it may be the guard's thread, while the main thread is in a collective that never returns


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


def check_cards(group):
    """Ends with an error if two ranks share a GPU."""
    holders = {}
    for r, card in enumerate(group.cards):
        if card["device"] != "cpu":
            holders.setdefault((card["host"], card["uuid"]), []).append(r)
    shared = [f"{ranks(members)} on {host}" for (host, _), members in holders.items() if len(members) > 1]
    if shared:
        group.exit_unless_first()
        group.report(f"one GPU is shared by {'; '.join(shared)}", [
            "torchrun --nproc_per_node=N with no more than the GPUs here; CUDA_VISIBLE_DEVICES the same for all"])


def time_all_reduce(group, where, size):
    """Seconds of an all-reduce of `size` bytes: the median of five, after a first one that opens connections."""
    x = torch.ones(size // 4, device=where)
    times = []
    for _ in range(6):
        x.fill_(group.rank)
        clock = time.perf_counter()
        dist.all_reduce(x)
        total = x[-1].item()  # waits for the device
        times.append(time.perf_counter() - clock)
    assert total == group.world * (group.world - 1) / 2, "an all-reduce is a sum"
    return sorted(times[1:])[2]


def bandwidths(group, where, largest):
    """All-reduces from 4 kB to `largest` MB -> rows of bytes, ms, and GB/s as nccl-tests defines them: algbw is
    size / time, and busbw is 2 (n - 1) / n times that, the traffic of each link in a ring of n ranks."""
    rows = []
    size = 4096
    while size <= largest * 1_000_000:
        with group.stage(f"all-reduce of {size:,} bytes", lambda r: f"rank {r} on {group.cards[r]['host']}"):
            seconds = time_all_reduce(group, where, size)
        algbw = size / seconds / 1e9
        busbw = size / seconds * 2 * (group.world - 1) / group.world / 1e9
        rows.append({"bytes": size, "ms": 1000 * seconds, "algbw_gb_s": algbw, "busbw_gb_s": busbw})
        size *= 8
    return rows


def join_ranks(c, where, rank, world):
    """Reports that this rank is here, and the device it runs on. -> Ranks"""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            fail(f"WORLD_SIZE={world}, but {name} is not set: torchrun sets both")
    group = Ranks(rank, world, "nccl" if where.type == "cuda" else "gloo", c.timeout)
    card = {"host": socket.gethostname(), "pid": os.getpid(), "device": where.type,
            "variables": environment_settings()}
    if where.type == "cuda":
        card["name"] = torch.cuda.get_device_name(where)
        card["uuid"] = str(torch.cuda.get_device_properties(where).uuid)
    group.finish_stage("here", json.dumps(card))
    return group


def check_communication(c, group, where):
    """Checks that the ranks reach each other, and how fast -> the rows of bandwidths. Ends with an error if not."""
    group.roll_call()
    check_cards(group)
    rank, world = group.rank, group.world
    with group.stage("connecting", lambda r: f"rank {r} on {group.cards[r]['host']} does not reach all others"):
        dist.init_process_group(group.backend, store=group.connect(), rank=rank, world_size=world,
                                timeout=timedelta(seconds=2 * c.timeout))  # later than the guard
    before, after = (rank - 1) % world, (rank + 1) % world
    with group.stage("a message around the ring", lambda r: f"rank {r} heard nothing from rank {(r - 1) % world}"):
        sent = torch.full((1,), float(rank), device=where)
        received = torch.empty(1, device=where)
        swap = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
        for work in dist.batch_isend_irecv(swap):
            work.wait()
        assert received.item() == before, "the message is its sender's number"
    rows = bandwidths(group, where, c.largest)
    group.finish_stage("end")
    if rank == 0:  # it may host the store, so it leaves last
        group.all_finished("end")
    return rows


def differing(cards):
    """{variable: {value: ranks}} of environment variables that are not the same on all ranks."""
    names = {name for card in cards for name in card["variables"]} - {"CUDA_VISIBLE_DEVICES"}
    ranks_by_value = {name: {} for name in sorted(names)}
    for name, holders in ranks_by_value.items():
        for r, card in enumerate(cards):
            holders.setdefault(card["variables"].get(name, ""), []).append(r)
    return {name: holders for name, holders in ranks_by_value.items() if len(holders) > 1}


def show_ranks(backend, cards, rows):
    """Prints the hosts, the variables that differ between ranks, and the speed of all-reduces."""
    print(f"\n{len(cards)} ranks over {backend}, all reached")
    for host in dict.fromkeys(card["host"] for card in cards):
        members = [r for r, card in enumerate(cards) if card["host"] == host]
        kinds = sorted({cards[r].get("name", "CPU") for r in members})
        print(f"  {host}: {ranks(members)}, {', '.join(kinds)}")
    for name, holders in differing(cards).items():
        values = [f"{value or 'not set'} on {ranks(members)}" for value, members in holders.items()]
        print(f"  {name} differs: {'; '.join(values)}")
    print(f"\n{'all-reduce':>12} {'ms':>9} {'algbw GB/s':>11} {'busbw GB/s':>11}")
    for row in rows:
        print(f"{row['bytes']:>12,} {row['ms']:>9.3f} {row['algbw_gb_s']:>11.3f} {row['busbw_gb_s']:>11.3f}")


def pick_rank_device(c, world, local):
    """(torch.device, why) of this rank: under torchrun, cuda is the GPU of its local number."""
    where, why = pick_device(c.device)
    if where.type == "cuda" and world > 1:
        where, _ = pick_device(f"cuda:{local}")
        why = "the rank's own"
        torch.cuda.set_device(where)
    return where, why


def main(c):
    group = None
    lines = []
    facts = {}
    try:
        world, rank, local = (from_environment(name, 0) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        where, why = pick_rank_device(c, world, local)
        pick_dtype(c.dtype, where)  # on every rank: a wrong setting is one error, before any rank waits
        if world > 1:
            group = join_ranks(c, where, rank, world)
        if rank == 0:
            lines, facts = machine(c, where, why, world)
    except (ValueError, OSError) as error:
        fail(error)
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        print(f"{name:<{width}}  {text}", flush=True)
    if group:
        rows = check_communication(c, group, where)
        facts |= {"backend": group.backend, "ranks": group.cards, "all_reduce": rows}
        if rank == 0:
            show_ranks(group.backend, group.cards, rows)
    if rank == 0:
        print(json.dumps(facts))
    if group:
        leave(0)


if __name__ == "__main__":
    main(Settings(configure(globals())))
