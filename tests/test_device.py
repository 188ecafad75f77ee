"""Device and precision: the choice and its reason, errors for missing devices, no guess about an unknown GPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import device  # noqa: E402
from device import (  # noqa: E402
    PEAK_FLOPS,
    SDPA,
    allocate_in_segments,
    autocast,
    can_compile,
    inference_kernels,
    inner_error,
    keep_memory,
    memory_gb,
    missing_for_compile,
    peak_flops,
    pick_device,
    pick_dtype,
    rss_gb,
    runs_on,
    sdpa_kernel_of,
    use_sdpa,
    use_tf32,
)

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda="NVIDIA A100-SXM4-80GB", count=2, bf16=True, mps=False): torch as on another machine.

    `build`: the CUDA version that torch is built for; `capability`, `archs`: of the GPU and of the build; `driver`:
    whether an NVIDIA driver is there; `error`: what starting CUDA says.
    """

    def pretend(cuda=None, count=1, bf16=True, mps=False, build=None, capability=(8, 0), archs="", driver=False,
                error=None):
        def init():
            if error:
                raise RuntimeError(error)

        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch, "__version__", f"2.13.0+cu{build.replace('.', '')}" if build else "2.13.0+cpu")
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", archs.split)
        monkeypatch.setattr(device, "NVIDIA_DRIVER", (str(ROOT),) if driver else ())
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
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


CU130 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
CU126 = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"


def too_old(version):
    return (f"The NVIDIA driver on your system is too old (found version {version}). Please update your GPU driver by "
            "downloading and installing a new\nversion from the URL: http://www.nvidia.com/Download/index.aspx")


def refusal(name):
    with pytest.raises(ValueError) as e:
        pick_device(name)
    text = str(e.value)
    assert text.startswith(f"device={name!r}: ") and "\n" not in text and "--device=cpu" in text
    return text


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_driver_too_old_for_this_build_is_no_missing_gpu(machine, name, monkeypatch):
    machine(build="13.0", driver=True, error=too_old(12040))
    text = refusal(name)
    assert "for CUDA 12.4" in text and "torch 2.13.0+cu130 is built for CUDA 13.0" in text
    assert "--index-url https://download.pytorch.org/whl/cu126 torch==2.13.0;" in text
    machine(build="12.6", driver=True, error=too_old(11080))
    text = refusal(name)
    assert "for CUDA 11.8" in text and "update the driver" in text and "download.pytorch.org" not in text
    assert pick_device("cpu")[0] == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # whoever hides all GPUs wants the CPU
    assert pick_device("auto") == (CPU, "no GPU found")


def test_cuda_that_does_not_start_is_no_missing_gpu(machine):
    machine(build="13.0", driver=True, error="CUDA unknown error - this may be due to a bad setup. Setting the devices")
    assert "(CUDA unknown error - this may be due to a bad setup)" in refusal("auto")


@pytest.mark.parametrize("error", ["No CUDA GPUs are available", "Found no NVIDIA driver on your system. Please check"])
def test_a_driver_without_a_gpu_is_no_trouble(machine, error):
    machine(build="13.0", driver=True, error=error)
    assert pick_device("auto") == (CPU, "no GPU found")
    with pytest.raises(ValueError, match="finds no such device"):
        pick_device("cuda")


def test_cuda_is_not_started_without_a_driver(machine):
    machine(build="13.0", error=too_old(12040))
    assert pick_device("auto") == (CPU, "no GPU found")


def test_the_warning_about_the_driver_is_left_to_the_one_line(machine, monkeypatch, recwarn):
    machine(build="13.0", driver=True, error=too_old(12040))

    def warns():
        device.warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warns)
    refusal("auto")
    assert not recwarn.list


def test_a_cpu_build_beside_a_driver_says_so(machine, monkeypatch):
    machine(driver=True)
    where, why = pick_device("auto")
    assert where == CPU and "CPU build" in why and "download.pytorch.org/whl/cu130 torch==2.13.0" in why
    assert "cu126" in why
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert pick_device("auto") == (CPU, "no GPU found")


@pytest.mark.parametrize("arch, runs, fails", [
    ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
    ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
    ("sm_90a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
    ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ("sm_120", [(12, 0), (12, 1)], [(10, 0), (11, 0)]),
    ("compute_90", [(9, 0), (10, 0), (12, 1)], [(8, 9), (7, 5)]),
    ("compute_90a", [(9, 0)], [(10, 0)]),
])
def test_which_gpus_run_an_architectures_code(arch, runs, fails):
    assert all(runs_on(arch, capability) for capability in runs)
    assert not any(runs_on(arch, capability) for capability in fails)


@pytest.mark.parametrize("build, archs, capability, says", [
    ("13.0", CU130, (6, 1), "whl/cu126 torch==2.13.0;"),    # Pascal: CUDA 13 dropped it
    ("13.0", CU130, (7, 0), "cu126 has sm_50 to sm_90"),    # Volta
    ("12.6", CU126, (12, 0), "a driver of CUDA 13 and pip install"),   # Blackwell
    ("12.6", CU126, (10, 0), "whl/cu130 torch==2.13.0;"),
    ("13.0", CU130, (13, 0), "install a newer torch"),
    ("13.0", CU130, (3, 7), "no build of torch >= 2.9 has"),
])
@pytest.mark.parametrize("name", ["auto", "cuda:0"])
def test_a_gpu_without_kernels_in_this_build_is_refused(machine, name, build, archs, capability, says):
    machine(cuda="Some GPU", build=build, archs=archs, capability=capability)
    text = refusal(name)
    assert says in text and archs in text and f"Some GPU has compute capability {capability[0]}.{capability[1]}" in text


@pytest.mark.parametrize("build, archs, capability", [
    ("13.0", CU130, (8, 9)),
    ("13.0", CU130, (10, 3)),
    ("12.6", CU126, (6, 1)),
    ("13.0", CU130 + " compute_120", (13, 0)),  # the driver compiles the PTX
    ("13.0", "", (9, 0)),                       # a build that does not say
    (None, "gfx90a gfx942", (9, 4)),            # ROCm
])
def test_a_gpu_that_this_build_runs_on_is_taken(machine, build, archs, capability):
    machine(cuda="Some GPU", build=build, archs=archs, capability=capability)
    assert pick_device("auto")[0] == CUDA and pick_device("cuda:0")[1] == "asked for"


@pytest.mark.parametrize("limit, cores", [("150000 100000", 1.5), ("max 100000", None), ("", None), ("100 0", None)])
def test_the_share_of_a_container(limit, cores, tmp_path):
    (tmp_path / "cpu.max").write_text(limit)
    assert device.cpu_share(tmp_path / "cpu.max") == cores
    assert device.cpu_share(tmp_path / "none") is None


@pytest.mark.parametrize("asked, variable, share, threads, why", [
    (3, None, 1.0, 3, "asked for"), (0, "8", 1.0, 8, "OMP_NUM_THREADS"), (0, None, None, 8, "one for each core"),
    (0, None, 2.5, 2, "this container's share of 8 cores"), (0, None, 0.5, 1, "this container's share of 8 cores"),
    (0, None, 8.0, 8, "one for each core"),
])
def test_threads_are_those_that_the_process_can_keep_busy(asked, variable, share, threads, why, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(device, "cpu_share", lambda: share)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert device.pick_threads(asked) == (threads, why)


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


@pytest.mark.parametrize("name, capability, peak", [
    ("NVIDIA A100-SXM4-80GB", (8, 0), 156e12),
    ("NVIDIA H100 80GB HBM3", (9, 0), 494.5e12),
    ("NVIDIA L40S", (8, 9), 181e12),
    ("NVIDIA GeForce RTX 4090", (8, 9), 82.5e12),
    ("NVIDIA B200", (10, 0), 1125e12),
    ("Tesla V100-SXM2-16GB", (7, 0), 15.7e12),    # without TF32: the peak of fp32
    ("Tesla T4", (7, 5), 8.1e12),
    ("Some GPU 5000", (9, 0), None),
])
def test_the_peak_of_tf32_is_half_of_bf16s(machine, name, capability, peak):
    machine(cuda=name, capability=capability)
    assert peak_flops(CUDA, torch.float32, tf32=True) == peak
    assert peak_flops(CUDA, torch.bfloat16, tf32=True) == peak_flops(CUDA, torch.bfloat16)


def test_amd_gpus_have_no_tf32_peak(machine, monkeypatch):
    machine(cuda="AMD Instinct MI300X", capability=(9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert peak_flops(CUDA, torch.float32, tf32=True) == peak_flops(CUDA, torch.float32) == 163.4e12


def test_tf32_is_a_setting_of_cuda_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    use_tf32(True, CPU)
    use_tf32(False, MPS)
    assert asked == []
    use_tf32(True, CUDA)
    use_tf32(False, torch.device("cuda:1"))
    assert asked == ["high", "highest"]


# -----------------------------------------------------------------------------
# Attention kernels. The switches of torch.backends.cuda exist without CUDA. On a CPU SDPA obeys the one of flash.

SHAPE = {"batch": 2, "queries": 8, "keys": 8, "heads": 4, "kv_heads": 4, "head_dim": 16, "causal": True}


def enabled():
    """The names of the SDPA kernels that are enabled."""
    switches = {"cudnn": "cudnn", "flash": "flash", "efficient": "mem_efficient", "math": "math"}
    return [name for name, switch in switches.items() if getattr(torch.backends.cuda, f"{switch}_sdp_enabled")()]


@pytest.fixture
def switches():
    """Restores the switches of SDPA after the test."""
    before = enabled()
    yield before
    torch.backends.cuda.enable_cudnn_sdp("cudnn" in before)
    torch.backends.cuda.enable_flash_sdp("flash" in before)
    torch.backends.cuda.enable_mem_efficient_sdp("efficient" in before)
    torch.backends.cuda.enable_math_sdp("math" in before)


def test_a_named_kernel_is_the_only_one(switches):
    for where in (CPU, MPS, CUDA):
        use_sdpa("auto", where)
        assert enabled() == switches == list(SDPA[1:])
    for name in SDPA[1:]:
        use_sdpa(name, CUDA)
        assert enabled() == [name]


def test_a_kernel_that_cannot_be_had_is_one_line(switches):
    with pytest.raises(ValueError, match="sdpa='triton' is none of auto, cudnn, flash, efficient, math$"):
        use_sdpa("triton", CUDA)
    for where in (CPU, MPS):
        with pytest.raises(ValueError, match=f"sdpa='flash' needs a CUDA device, and this is {where.type}"):
            use_sdpa("flash", where)
    assert enabled() == switches


def test_inference_on_cuda_is_without_cudnn(switches):
    before, order = torch._C._get_sdp_priority_order(), [3, 1, 2, 0, 4]  # cuDNN first, as torch has it on Hopper
    torch._C._set_sdp_priority_order(order)
    for _ in range(2):
        with inference_kernels(CUDA):
            assert enabled() == ["flash", "efficient", "math"]
            assert torch._C._get_sdp_priority_order() == order
        assert enabled() == switches
    assert torch._C._get_sdp_priority_order() == order  # else training would get another kernel after an evaluation
    torch._C._set_sdp_priority_order(before)
    for where in (CPU, MPS):
        with inference_kernels(where):
            assert enabled() == switches


@pytest.mark.parametrize("name", SDPA[1:])
def test_inference_keeps_to_a_named_kernel(switches, name):
    use_sdpa(name, CUDA)
    with inference_kernels(CUDA):
        assert enabled() == [name]
    assert enabled() == [name]


def test_the_kernel_is_the_one_that_sdpa_picks(switches):
    assert sdpa_kernel_of(CPU, torch.float32, **SHAPE) == "flash"
    assert sdpa_kernel_of(CPU, torch.float32, **{**SHAPE, "kv_heads": 2}) == "flash"
    torch.backends.cuda.enable_flash_sdp(False)
    assert sdpa_kernel_of(CPU, torch.float32, **SHAPE) == "math"


def test_the_tensors_are_those_that_are_asked_about(monkeypatch):
    asked = []

    def choose(q, k, v, is_causal, enable_gqa):
        asked.append((q.shape, k.shape, v.shape, q.dtype, is_causal, enable_gqa, q.requires_grad))
        return 3

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    shape = {"batch": 2, "queries": 1, "keys": 5, "heads": 4, "kv_heads": 2, "head_dim": 16, "causal": False}
    with torch.no_grad():
        assert sdpa_kernel_of(CPU, torch.bfloat16, **shape) == "cudnn"
    assert asked.pop() == ((2, 4, 1, 16), (2, 2, 5, 16), (2, 2, 5, 16), torch.bfloat16, False, True, False)
    assert sdpa_kernel_of(CPU, torch.float16, **SHAPE) == "cudnn"
    assert asked.pop()[3:] == (torch.float16, True, False, True)


@pytest.mark.parametrize("choice, name", [(0, "math"), (1, "flash"), (2, "efficient"), (3, "cudnn"), (-1, "unknown"),
                                          (4, "unknown"), (99, "unknown")])
def test_a_choice_has_a_name(monkeypatch, choice, name):
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: choice)
    assert sdpa_kernel_of(CPU, torch.float32, **SHAPE) == name


def test_a_torch_that_does_not_say_its_kernel(monkeypatch):
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert sdpa_kernel_of(CPU, torch.float32, **SHAPE) == "unknown"


# -----------------------------------------------------------------------------
# The allocator


@pytest.fixture
def allocator(monkeypatch):
    """The settings that torch was given, on a Linux machine where neither variable is set."""
    told = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that the end of the test removes what is set
        monkeypatch.delenv(name)
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.os, "uname", lambda: os.uname_result(("Linux", "host", "6.8.0", "#1", "x86_64")))
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    return told


def test_the_allocator_grows_its_segments(allocator, monkeypatch):
    allocate_in_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    assert allocator == ["expandable_segments:True"]  # a build that read the variable at import


def test_an_allocator_that_refuses_is_left_as_it_is(allocator, monkeypatch):
    def refuse(wanted):
        raise RuntimeError("not supported by this driver")

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", refuse, raising=False)
    allocate_in_segments()


def test_torch_2_9_reads_the_old_name(allocator, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu126")
    allocate_in_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["expandable_segments:False", ""])
def test_what_the_user_set_for_the_allocator_stays(allocator, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    allocate_in_segments()
    both = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    assert {key: os.environ[key] for key in both & set(os.environ)} == {name: value} and allocator == []


@pytest.fixture
def mallopt(monkeypatch):
    """Linux with glibc and none of its variables set. -> the options that mallopt is called with"""
    options = []

    class Glibc:
        def __init__(self, name):
            assert name is None  # this process
            self.mallopt = lambda option, value: options.append((option, value)) or 1

    for name in os.environ:
        if name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", Glibc)
    return options


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def test_a_process_keeps_the_memory_that_it_frees(mallopt):
    keep_memory()
    assert mallopt == [(M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0)]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX"])
def test_what_the_user_set_for_malloc_stays(mallopt, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    keep_memory()
    assert mallopt == []


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_malloc_is_left_alone_on_another_system(mallopt, monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    keep_memory()
    assert mallopt == []


def test_another_c_library_has_no_mallopt(monkeypatch, mallopt):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())  # musl
    keep_memory()


@pytest.mark.parametrize("where", ["darwin", "wsl", "rocm"])
def test_the_allocator_is_left_alone_elsewhere(allocator, monkeypatch, where):
    if where == "darwin":
        monkeypatch.setattr(device.sys, "platform", "darwin")
    if where == "wsl":
        release = "5.15.167.4-microsoft-standard-WSL2"
        monkeypatch.setattr(device.os, "uname", lambda: os.uname_result(("Linux", "host", release, "#1", "x86_64")))
    if where == "rocm":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    allocate_in_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and allocator == []


def test_a_cpus_peak_is_measured_once_for_each_dtype_and_number_of_threads(monkeypatch):
    """The best of its tries, with a fake clock; it draws no random number."""
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
    monkeypatch.delenv("CXX", raising=False)
    assert "compiler" in can_compile(CPU) and can_compile(CUDA) is None
    monkeypatch.setattr(device.shutil, "which", lambda name: f"bin/{name}" if name == "g++" else None)
    assert can_compile(CPU) is None
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "/opt/bin/g++")
    assert can_compile(CPU) is None


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """tools("gcc", "triton", "Python.h"): a machine that has these tools, and no others."""

    def tools(*there):
        monkeypatch.setattr(device.shutil, "which", lambda name: f"bin/{name}" if name in there else None)
        monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name if name in there else None)
        monkeypatch.setattr(device.sysconfig, "get_path", lambda *_: str(tmp_path))
        (tmp_path / "Python.h").unlink(missing_ok=True)
        if "Python.h" in there:
            (tmp_path / "Python.h").touch()
        for name in ("CC", "CXX"):
            monkeypatch.delenv(name, raising=False)

    return tools


def test_each_thing_that_compiling_lacks_has_its_mend(tools, monkeypatch):
    header = "Python.h: apt install python3-dev"
    tools()
    triton, cc, last = missing_for_compile(CUDA)
    assert triton == "triton: pip install triton" and cc == "a C compiler: apt install gcc" and last == header
    assert missing_for_compile(CPU) == ["a C++ compiler: apt install g++", header]
    assert missing_for_compile(MPS) == []
    monkeypatch.setenv("CC", "/opt/bin/cc")
    monkeypatch.setenv("CXX", "/opt/bin/c++")
    assert missing_for_compile(CUDA) == [triton, header] and missing_for_compile(CPU) == [header]
    for cc in ("gcc", "clang"):
        tools("triton", cc, "Python.h")
        assert missing_for_compile(CUDA) == []
    for cxx in ("c++", "g++", "clang++"):
        tools(cxx, "Python.h")
        assert missing_for_compile(CPU) == []


def test_the_innermost_exception_is_found():
    class Wrapped(Exception):
        pass

    root, cause, outer = ValueError("root"), RuntimeError("cause"), Wrapped("outer")
    cause.__context__ = root
    outer.__cause__ = cause
    assert inner_error(outer) is root and inner_error(root) is root
    outer.inner_exception = KeyError("compiler")  # as torch._dynamo.exc.BackendCompilerFailed has it
    assert inner_error(outer) is outer.inner_exception
    outer.inner_exception.__cause__ = outer  # a circle ends
    assert inner_error(outer) is outer.inner_exception


def test_an_exception_raised_from_none_is_the_innermost():
    with pytest.raises(ValueError) as e:
        try:
            raise KeyError("looked up")
        except KeyError:
            raise ValueError("what is wrong") from None
    assert isinstance(e.value.__context__, KeyError) and inner_error(e.value) is e.value


def test_memory_is_in_gigabytes():
    """Of this process: at least the size of a tensor that it filled, at most 64 GB."""
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
