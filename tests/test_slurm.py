"""slurm.sh against stand-ins for Slurm: the commands it starts, and what a signal does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs bash")

# prints its arguments, then waits for the signal to save
SRUN = """#!/usr/bin/env bash
trap 'echo saved; exit 143' TERM
printf '%s\\n' "$@"; echo started
if [ -n "${FAKE_WAITS:-}" ]; then while :; do sleep 0.05; done; fi
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '%s\\n' node07 node08 ;;
    requeue) echo "requeued $2" ;;
esac
"""


@pytest.fixture
def submit(tmp_path):
    """submit(*words, **environment) starts slurm.sh as Slurm would on the first of two machines with four GPUs."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32",
           "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_SUBMIT_DIR": str(tmp_path)}

    def submit(*words, **environment):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, **job, **environment}
        return subprocess.Popen(["bash", ROOT / "slurm.sh", *words], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")

    return submit


def test_one_torchrun_on_each_machine_that_goes_on_where_it_was(submit):
    process = submit("config/owt_124m.py", "--zero_stage=1")
    words = process.communicate(timeout=60)[0].split()
    assert process.returncode == 0
    assert {"--nnodes=2", "--nproc_per_node=4", "--rdzv_backend=c10d", "--rdzv_endpoint=node07:23456"} <= set(words)
    assert words[-5:] == ["train.py", "config/owt_124m.py", "--zero_stage=1", "--init_from=auto", "started"]
    words = submit("doctor.py", "--timeout=60").communicate(timeout=60)[0].split()
    assert words[-3:] == ["doctor.py", "--timeout=60", "started"]


@pytest.mark.parametrize("signum, requeued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_saves_and_the_job_queues_again(submit, signum, requeued):
    process = submit("config/owt_124m.py", FAKE_WAITS="1")
    for line in process.stdout:
        if line == "started\n":
            break
    process.send_signal(signum)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "saved\n" in rest and "back into the queue" in rest
    assert ("requeued 123456" in rest) == requeued  # after preemption Slurm requeues the job itself
