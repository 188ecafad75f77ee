"""Device and precision: what is chosen and why, what cannot be had, and no guess about an unknown GPU."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import device  # noqa: E402
from device import (  # noqa: E402
    PEAK_FLOPS,
    autocast,
    can_compile,
    memory_gb,
    peak_flops,
    pick_device,
    pick_dtype,
    rss_gb,
)

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda="NVIDIA A100-SXM4-80GB", count=2, bf16=True, mps=False): torch as it is on another machine."""

    def pretend(cuda=None, count=1, bf16=True, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count if cuda else 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    pretend()
    return pretend


def test_auto_takes_the_best_that_is_there_and_says_why(machine):
    assert pick_device("auto") == (CPU, "no GPU found")
    machine(mps=True)
    where, why = pick_device("auto")
    assert where == MPS and "Apple" in why
    machine(cuda="NVIDIA A100-SXM4-80GB", mps=True)
    where, why = pick_device("auto")
    assert where == CUDA and "NVIDIA A100-SXM4-80GB" in why
    assert pick_device("cpu") == (CPU, "asked for")  # forced, though there is a GPU
    assert pick_device("mps")[0] == MPS


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "Auto"])
def test_a_name_that_is_no_device_is_refused_with_those_that_are(machine, name):
    with pytest.raises(ValueError) as e:
        pick_device(name)
    assert f"device={name!r}" in str(e.value) and all(word in str(e.value) for word in ("auto", "cpu", "cuda", "mps"))


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "meta", "xpu"])
def test_a_device_that_is_not_here_is_refused_with_the_way_out(machine, name):
    with pytest.raises(ValueError, match=f"device='{name}'.*auto"):
        pick_device(name)


def test_a_gpu_beyond_the_last_is_refused(machine):
    machine(cuda="Tesla T4", count=2)
    assert pick_device("cuda:1")[0] == torch.device("cuda:1")
    for name in ("cuda:2", "cuda:7"):
        with pytest.raises(ValueError, match=f"device='{name}'.*2 CUDA"):
            pick_device(name)


@pytest.mark.parametrize("native", [False, True])
def test_a_cpu_takes_bfloat16_where_it_multiplies_it(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    dtype, why = pick_dtype("auto", CPU)
    assert dtype == (torch.bfloat16 if native else torch.float32) and "CPU" in why.upper()


def test_precision_is_chosen_for_the_device_and_said_why(machine, monkeypatch):
    monkeypatch.setattr("device.native_bfloat16", lambda: False)
    for where in (CPU, MPS):
        dtype, why = pick_dtype("auto", where)
        assert dtype == torch.float32 and where.type in why
    machine(cuda="NVIDIA A100-SXM4-80GB", bf16=True)
    assert pick_dtype("auto", CUDA)[0] == torch.bfloat16
    assert pick_dtype("auto", CPU)[0] == torch.float32  # the device decides, not what else is in the machine
    machine(cuda="Tesla T4", bf16=False)  # which torch would emulate, slowly
    dtype, why = pick_dtype("auto", CUDA)
    assert dtype == torch.float16 and "bfloat16" in why
    for name in ("float32", "bfloat16", "float16"):
        assert pick_dtype(name, CPU) == (getattr(torch, name), "asked for")


@pytest.mark.parametrize("name", ["bf16", "float64", "", "Float32"])
def test_an_unknown_precision_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError) as e:
        pick_dtype(name, CPU)
    assert repr(name) in str(e.value)
    assert all(word in str(e.value) for word in ("auto", "float32", "bfloat16", "float16"))


def test_autocast_is_nothing_in_fp32():
    a = torch.randn(4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        context = autocast(CPU, dtype)
        for _ in range(2):  # entered once a micro-step
            with context():
                assert (a @ a).dtype == dtype and torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16)
        assert not torch.is_autocast_enabled("cpu")


# -----------------------------------------------------------------------------
# What a GPU can reach. Names as torch.cuda.get_device_name gives them.


@pytest.mark.parametrize("name, peak, single", [
    ("NVIDIA GB200", 2500e12, None),
    ("NVIDIA B200", 2250e12, None),
    ("NVIDIA GH200 480GB", 989e12, 67e12),
    ("NVIDIA H200", 989e12, 67e12),
    ("NVIDIA H200 NVL", 835e12, 60e12),
    ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
    ("NVIDIA H100 PCIe", 756e12, 51e12),
    ("NVIDIA H100 NVL", 835e12, 60e12),
    ("NVIDIA H20", 148e12, 44e12),
    ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
    ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
    ("A100-SXM4-80GB", 312e12, 19.5e12),
    ("NVIDIA A10", 125e12, 31.2e12),
    ("NVIDIA A30", 165e12, 10.3e12),
    ("NVIDIA A40", 149.7e12, 37.4e12),
    ("NVIDIA L40S", 362e12, 91.6e12),
    ("NVIDIA L40", 181e12, 90.5e12),
    ("NVIDIA L4", 121e12, 30.3e12),
    ("Tesla T4", 65e12, 8.1e12),
    ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
    ("Tesla V100-PCIE-32GB", 112e12, 14e12),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8e12, 126e12),
    ("NVIDIA RTX 6000 Ada Generation", 364.2e12, 91.1e12),
    ("NVIDIA RTX A6000", 154.8e12, 38.7e12),
    ("NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12),
    ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12),
    ("NVIDIA GeForce RTX 3090", 71e12, 35.6e12),
    ("AMD Instinct MI300X", 1307.4e12, 163.4e12),
])
def test_known_gpus_have_their_data_sheets_peak(machine, name, peak, single):
    machine(cuda=name)
    assert peak_flops(CUDA, torch.bfloat16) == peak_flops(CUDA, torch.float16) == peak
    assert peak_flops(CUDA, torch.float32) == single


@pytest.mark.parametrize("name", [
    "NVIDIA A10G",                            # not the A10
    "NVIDIA A16",
    "NVIDIA L40G",                            # nor the L40
    "NVIDIA T400 4GB",                        # nor is this a T4
    "NVIDIA T4G",
    "NVIDIA RTX A1000",                       # nor this an A100
    "NVIDIA RTX A1000 Laptop GPU",
    "NVIDIA GeForce RTX 4090 Laptop GPU",     # another chip than the RTX 4090
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",      # a part of an A100
    "NVIDIA GeForce GTX 1080",
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "Quadro RTX 6000",
    "Tesla V100S-PCIE-32GB",
    "AMD Instinct MI300A",
    "AMD Instinct MI250X",                    # which torch sees as two
    "Some GPU 5000",
])
def test_an_unknown_gpu_has_no_peak(machine, name):
    """No guesses: a model flops utilisation (MFU) over another card's peak is wrong by up to tens of times."""
    machine(cuda=name)
    assert peak_flops(CUDA, torch.bfloat16) is None and peak_flops(CUDA, torch.float32) is None


def test_no_peak_for_an_apple_gpu():
    assert peak_flops(MPS, torch.float16) is None


def test_a_cpus_peak_is_measured_once_for_each_dtype_and_number_of_threads(monkeypatch):
    """The best of its tries, with the clock of the test; no random number is drawn."""
    device.matmul_flops.cache_clear()
    products, now, rng = [], [0.0], torch.get_rng_state()
    durations = iter([8.0, 2.0, 4.0] * 10)
    mm = torch.mm

    def timed(a, b):
        products.append(a.dtype)
        now[0] += next(durations) / 1000
        return mm(a, b)

    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "mm", timed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    first = peak_flops(CPU, torch.float32)
    assert first == pytest.approx(2 * 768**3 / 0.002) and 2 <= len(products) <= 20
    assert peak_flops(CPU, torch.float32) == first and set(products) == {torch.float32}
    count = len(products)
    assert peak_flops(CPU, torch.bfloat16) and set(products[count:]) == {torch.bfloat16}
    count = len(products)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    peak_flops(CPU, torch.float32)
    assert len(products) > count and torch.equal(torch.get_rng_state(), rng)
    device.matmul_flops.cache_clear()


def test_a_slow_cpu_is_measured_in_few_tries(monkeypatch):
    device.matmul_flops.cache_clear()
    now, products = [0.0], []
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])

    def slow(a, b):
        now[0] += 1.0
        products.append(1)

    monkeypatch.setattr(torch, "mm", slow)
    assert peak_flops(CPU, torch.bfloat16) == pytest.approx(2 * 768**3) and len(products) <= 2
    device.matmul_flops.cache_clear()


def test_no_entry_of_the_table_hides_a_longer_one():
    names = list(PEAK_FLOPS)
    for i, name in enumerate(names):
        assert not [other for other in names[i + 1 :] if name in other], f"{name} would be found first"
    assert all(1e13 < half < 1e16 and (single is None or half / 20 <= single < half / 1.9)
               for half, single in PEAK_FLOPS.values())


# -----------------------------------------------------------------------------


def test_why_compile_cannot_work(monkeypatch):
    monkeypatch.setattr(device.sys, "platform", "win32")
    assert "Windows" in can_compile(CUDA)
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert "compiler" in can_compile(CPU) and can_compile(CUDA) is None
    monkeypatch.setattr(device.shutil, "which", lambda name: f"bin/{name}" if name == "g++" else None)
    assert can_compile(CPU) is None


def test_memory_is_in_gigabytes():
    """Of this process: at least a tensor that it filled, at most what a test takes."""
    pytest.importorskip("resource")
    block = torch.ones(30_000_000)  # 0.12 GB
    assert 0.12 < memory_gb(CPU) < 64 and block.sum() > 0


def test_memory_now_falls_again():
    if rss_gb() is None:
        pytest.skip("no /proc here")
    before = rss_gb()
    block = torch.ones(50_000_000)  # 0.2 GB
    assert before + 0.15 < rss_gb() <= memory_gb(CPU) + 0.01
    del block
    assert rss_gb() < before + 0.1
