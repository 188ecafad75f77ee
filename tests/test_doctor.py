"""doctor.py's report on a machine, and on ranks that communicate, are missing, or hang."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import doctor  # noqa: E402
from configurator import Settings  # noqa: E402

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# doctor.py, where rank 1 hangs in the function `what` of torch.distributed
SLEEPER = """
import os, runpy, sys, time
import torch.distributed as dist
if os.environ["RANK"] == "1":
    dist.{what} = lambda *args, **more: time.sleep(600)
sys.path.insert(0, {root!r})
runpy.run_path({doctor!r}, run_name="__main__")
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(command, **environment):
    return subprocess.Popen([*map(str, command)], env={**ENVIRONMENT, **environment}, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(process):
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture
def no_compiling(monkeypatch):
    """torch.compile returns the function unchanged, at once."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_one_machine_is_a_list_and_a_json_line(call_script, tmp_path, no_compiling):
    code, out, err = call_script("doctor.py", "--device=cpu", f"--out_dir={tmp_path / 'run'}")
    assert code == 0 and not err
    *lines, last = out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"system", "packages", "cpu", "device", "dtype", "peak", "attention", "disk", "env.json"} <= set(names)
    assert "SDPA picks flash to train, flash to decode (" in out and "works (" in out
    texts = {line[len(max(names, key=len)):][:2] for line in lines}
    assert texts == {"  "}  # aligned
    found = json.loads(last)
    assert found["packages"]["torch"] == version("torch") and found["environment_sha256"] in out
    assert found["peak_flops"] > 1e8 and "TFLOP/s, the base of MFU" in out
    assert found["sdpa_training"] == found["sdpa_decoding"] == "flash"
    assert found["disk_free_gb"] > 0 and found["disk_mb_per_s"] > 0 and not list(tmp_path.iterdir())


def test_the_kernels_are_those_of_training_and_of_inference(monkeypatch):
    asked = []

    def choose(q, k, v, is_causal, enable_gqa):
        asked.append((q.shape, k.shape, q.dtype, is_causal, q.requires_grad))
        return 3 if torch.backends.cuda.cudnn_sdp_enabled() else 1

    cpu = torch.device("cpu")
    inference = doctor.inference_kernels
    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    monkeypatch.setattr(doctor, "inference_kernels", lambda where: inference(torch.device("cuda")))
    assert doctor.sdpa_kernels(cpu, torch.bfloat16) == ("cudnn", "flash")
    assert asked == [((8, 12, 1024, 64), (8, 12, 1024, 64), torch.bfloat16, True, True),
                     ((8, 12, 1, 64), (8, 12, 512, 64), torch.bfloat16, False, False)]


@pytest.mark.slow
def test_a_compiler_that_works_is_tried():
    assert doctor.try_compile(torch.device("cpu")).startswith("works (")


def test_a_compiler_that_fails_says_why(monkeypatch):
    cpu = torch.device("cpu")

    def fails(function):
        raise RuntimeError("backend='inductor' raised:") from ValueError("g++: not found\n  at line 1")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(doctor, "missing_for_compile", lambda where: [])
    assert doctor.try_compile(cpu) == "fails; g++: not found"
    monkeypatch.setattr(doctor, "missing_for_compile", lambda where: ["Python.h: apt install python3-dev"])
    assert doctor.try_compile(cpu) == "fails; missing Python.h: apt install python3-dev; g++: not found"


def test_nothing_is_compiled_while_other_ranks_wait(monkeypatch, tmp_path):
    def compile(function):
        raise AssertionError("rank 0 keeps the others waiting")

    monkeypatch.setattr(torch, "compile", compile)
    c = Settings({"dtype": "auto", "out_dir": str(tmp_path)})
    lines, _ = doctor.machine(c, torch.device("cpu"), "asked for", world=2)
    assert dict(lines)["compile"] == "not tried under torchrun"


@pytest.mark.parametrize("words", [["--device=tpu"], ["--dtype=int4"], ["--timeout=0"], ["--largest=0"]])
def test_what_cannot_be_had_is_one_line(call_script, words):
    code, out, err = call_script("doctor.py", *words)
    assert code == 2 and not out and err.startswith("error:") and err.count("\n") == 1


def test_infiniband_ports_are_read(tmp_path):
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert doctor.infiniband(tmp_path) == ["mlx5_0 4: ACTIVE 400 Gb/sec (4X NDR)"]
    assert doctor.infiniband(tmp_path / "none") == []


def test_the_topology_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    said = "\tGPU0\tGPU1\nGPU0\t X \tNV18\nGPU1\tNV18\t X \n\nLegend:\n\n  X = Self\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n[ \"$*\" = 'topo -m' ] && printf '%s' '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert doctor.topology() == said.partition("\n\nLegend")[0].rstrip()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert doctor.topology() == ""


def test_what_is_set_is_said(monkeypatch, call_script, tmp_path, no_compiling):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCLX", "no variable of it")
    code, out, err = call_script("doctor.py", "--device=cpu", f"--out_dir={tmp_path / 'run'}")
    found = json.loads(out.splitlines()[-1])["variables"]
    assert code == 0 and found["NCCL_DEBUG"] == "INFO" and "NCCLX" not in found and "NCCL_DEBUG=INFO" in out


def test_a_variable_that_some_ranks_lack_is_told_of(capsys):
    values = [{"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0"}, {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5"}]
    cards = [{"host": "ab"[i], "variables": each} for i, each in enumerate(values)]
    assert doctor.differing(cards) == {"NCCL_IB_HCA": {"": [0], "mlx5": [1]}}
    doctor.show_ranks("nccl", cards, [])
    assert "NCCL_IB_HCA differs: not set on rank 0; mlx5 on rank 1" in capsys.readouterr().out


def test_ranks_are_named_in_spans():
    assert doctor.ranks([3]) == "rank 3"
    assert doctor.ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_one_rank_one_gpu():
    class Them:
        cards = [{"host": "a", "device": "cuda", "uuid": uuid} for uuid in "xyx"]

        def exit_unless_first(self):
            pass

        def report(self, trouble, details):
            raise RuntimeError(trouble)

    with pytest.raises(RuntimeError, match="one GPU is shared by ranks 0, 2 on a"):
        doctor.check_cards(Them())
    Them.cards = Them.cards[:2] + [{"host": "b", "device": "cuda", "uuid": "x"}]
    doctor.check_cards(Them())


@pytest.mark.slow
def test_two_ranks_talk():
    code, out, err = result(start([*TORCHRUN, "--standalone", "--nproc_per_node=2", ROOT / "doctor.py",
                                   "--largest=1", "--timeout=120"]))
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["backend"] == "gloo" and len(found["ranks"]) == 2 and "ranks 0-1, CPU" in out
    assert [row["bytes"] for row in found["all_reduce"]] == [4096, 32768, 262144]
    for row in found["all_reduce"]:
        assert row["algbw_gb_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["busbw_gb_s"] == pytest.approx(row["algbw_gb_s"])  # 2 (n - 1) / n is 1 for two


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named():
    """Two ranks of three, started without an agent, as by srun or mpirun."""
    where = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [start([sys.executable, ROOT / "doctor.py", "--timeout=10"], RANK=str(rank), **where) for rank in (0, 1)]
    ends = [result(process) for process in both]
    assert [code for code, _, _ in ends] == [1, 1]
    told = [err for _, _, err in ends if "error: " in err]
    assert len(told) == 1  # by one of them
    assert "error: rank 2 of 3 did not come within 10 s" in told[0] and "ranks 0-1 did" in told[0]
    assert "GLOO_SOCKET_IFNAME=" in told[0] and "{" not in told[0]


@pytest.mark.slow
@pytest.mark.parametrize("what, says", [("batch_isend_irecv", "rank 0 heard nothing from rank 1"),
                                        ("init_process_group", "connecting: ranks 0-1 of 2")])
def test_a_rank_that_hangs_is_told_of(tmp_path, what, says):
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER.format(what=what, root=str(ROOT), doctor=str(ROOT / "doctor.py")))
    code, _, err = result(start([*TORCHRUN, "--standalone", "--nproc_per_node=2", script, "--timeout=10"]))
    assert code == 1 and err.strip().startswith("error: ") and err.count("error: ") == 1  # torchrun's own comes after
    assert says in err
    assert "did not get through within 10 s" in err and "TORCH_DISTRIBUTED_DEBUG" in err


# -----------------------------------------------------------------------------
# Two machines


@pytest.fixture
def two_hosts():
    """(prefixes that run a command on one of two hosts, the address of the first host, their interfaces). The hosts are
    network namespaces joined by a cable if this user may create them, else this machine twice, on loopback."""
    made, left, right = [], "minichat-a", "minichat-b"

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    try:
        if shutil.which("ip") and all(ip("netns", "add", name) and not made.append(name) for name in (left, right)):
            steps = ["link add mc0 netns minichat-a type veth peer name mc1 netns minichat-b"]
            for name, end, address in ((left, "mc0", "10.77.0.1/24"), (right, "mc1", "10.77.0.2/24")):
                steps += [f"-n {name} addr add {address} dev {end}", f"-n {name} link set {end} up",
                          f"-n {name} link set lo up"]
            assert all(ip(*step.split()) for step in steps)
            yield [["ip", "netns", "exec", name] for name in (left, right)], "10.77.0.1", ["mc0", "mc1"]
        else:
            yield [[], []], "127.0.0.1", ["lo", "lo"]
    finally:
        for name in made:
            ip("netns", "del", name)


def launch(two_hosts, *words):
    """Starts a torchrun on each host; they find each other by c10d rendezvous."""
    hosts, address, links = two_hosts
    torchrun = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=doctor",
                f"--rdzv_endpoint={address}:{free_port()}"]
    addresses = (address, address.replace("77.0.1", "77.0.2"))
    for first, host, link, where in zip((True, False), hosts, links, addresses, strict=True):
        # torchrun would know its own address by the host's name, but these two have one name
        local = [f"--local_addr={where}", f"--rdzv_conf=is_host={str(first).lower()}"]
        yield start([*host, *torchrun, *local, ROOT / "doctor.py", *words], GLOO_SOCKET_IFNAME=link)


@pytest.mark.slow
def test_two_hosts_talk(two_hosts):
    ends = [result(process) for process in list(launch(two_hosts, "--largest=1", "--timeout=120"))]
    assert [code for code, _, _ in ends] == [0, 0], ends
    out = next(out for _, out, _ in ends if out)
    assert len(json.loads(out.splitlines()[-1])["ranks"]) == 2
