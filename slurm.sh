#!/usr/bin/env bash
# Trains on a Slurm cluster: one torchrun on each machine, which starts one process for each of its GPUs.
#
#     sbatch --nodes=4 slurm.sh config/owt_355m.py --zero_stage=1      # arguments of train.py
#     sbatch --nodes=2 slurm.sh doctor.py                              # first: do the machines communicate, how fast?
#
# Partition, account and other options depend on the cluster: give them to sbatch, or add #SBATCH lines. Submit from
# this folder. All machines must see it, and it needs a .venv (./run_all.sh setup).

#SBATCH --job-name=minichat
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1         # torchrun, which starts the other processes
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64          # CPU cores of a machine, for all of its GPUs
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append          # a requeued job appends to the same file
#SBATCH --requeue                   # after preemption or the loss of a machine
#SBATCH --signal=B:USR1@120         # signal this script two minutes before the time limit

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# When the time is nearly up, train.py gets SIGTERM: it finishes its step and saves, and the job is requeued. torchrun
# allows 30 seconds; if they are too few, the run resumes from its last checkpoint. On preemption Slurm itself sends
# SIGTERM, and requeues the job if the cluster allows it.
step=""
stop_and_requeue() {
    trap '' USR1 TERM
    echo "slurm.sh: $1, saving; job ${SLURM_JOB_ID} goes back into the queue"
    kill -TERM "$step" 2>/dev/null || true
    wait "$step" || true
    if [ "$1" = "time is nearly up" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit 0
}
trap 'stop_and_requeue "time is nearly up"' USR1
trap 'stop_and_requeue "preempted"' TERM

# All machines meet at the first one of the list. The port depends on the job, so that two jobs do not collide.
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
meet=${machines%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))

# CPU threads of each process. Some clusters also need settings of NCCL; doctor.py tells which ones to try.
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-8} / ${SLURM_GPUS_ON_NODE:-1}))
if [ "$OMP_NUM_THREADS" -lt 1 ]; then OMP_NUM_THREADS=1; fi
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=INFO

# The first argument may be doctor.py; otherwise run train.py, which starts the run or resumes it.
case ${1:-} in
    doctor.py) script=("$@") ;;
    *) script=(train.py "$@" --init_from=auto) ;;
esac

# In the background, because bash runs a trap only between commands. torchrun restarts workers that die.
srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$meet" \
    "${script[@]}" &
step=$!
wait "$step"
