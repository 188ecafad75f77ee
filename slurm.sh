#!/usr/bin/env bash
# A training run on a Slurm cluster: one torchrun on each machine, which starts a process for each of its GPUs.
#
#     sbatch --nodes=4 slurm.sh config/owt_355m.py --zero_stage=1      # what follows are train.py's keys
#     sbatch --nodes=2 slurm.sh doctor.py                              # first: can the machines talk, and how fast?
#
# Partition, account and the like are the cluster's own: give them to sbatch, or add #SBATCH lines. Submit from this
# folder, which all machines must see, with .venv made (./run_all.sh setup).

#SBATCH --job-name=minichat
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1         # torchrun; it starts the others itself
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64          # of the machine, for all of its GPUs
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append          # a job that is requeued goes on in the same file
#SBATCH --requeue                   # preempted, or a machine lost: back into the queue
#SBATCH --signal=B:USR1@120         # two minutes before the time is up, to this script

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# The time is nearly up: training finishes its step and saves (train.py does so on SIGTERM; torchrun gives it 30 seconds,
# then the run goes on from its last checkpoint), and the job queues again. On preemption Slurm sends SIGTERM itself, and
# queues it again where the cluster allows.
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

# The first machine of the list is where the others meet; the port follows from the job, so that two jobs do not.
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
meet=${machines%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))

# Threads are torch's, of each process; the rest are NCCL's, where a cluster needs them (doctor.py says which to try).
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-8} / ${SLURM_GPUS_ON_NODE:-1}))
if [ "$OMP_NUM_THREADS" -lt 1 ]; then OMP_NUM_THREADS=1; fi
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=INFO

# A script may be named first; else it is train.py, which begins or goes on, whichever it is.
case ${1:-} in
    doctor.py) script=("$@") ;;
    *) script=(train.py "$@" --init_from=auto) ;;
esac

# In the background, as bash runs a trap only between commands. A worker that dies is started again on the spot.
srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$meet" \
    "${script[@]}" &
step=$!
wait "$step"
