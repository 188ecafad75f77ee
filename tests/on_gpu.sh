#!/usr/bin/env bash
# Tests everything on one CUDA GPU and times it, in five parts of at most nine minutes each (docs/gpu.md).
set -uo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'END'
usage: bash tests/on_gpu.sh PART [--rehearse]
  1  is it right: the tests that need a GPU, short runs in each precision, the same bits in a second run and after a kill
  2  how fast: bench.py gpu, and nanoGPT's bench.py beside it where DATA has it
  3  where the time and the memory go: a profile, the largest batch that fits, 355M and 774M beside plan.py
  4  generation: bench.py infer
  5  two processes on one GPU, over gloo, in each layout
--rehearse: the same commands on the CPU, with tiny models.
Environment variables, with their defaults. Relative paths start at the project's root.
  DATA    folder of prepared datasets (.gpu); a missing dataset is prepared, from MINICHAT_MIRROR if that is set
  OUT     folder for the report (docs/results; a temporary folder for a rehearsal)
  PY      the Python (python3)
  COMMIT  name of the code where there is no git
END
}

stop() {
    echo "on_gpu.sh: $*" >&2
    exit 2
}

part='' rehearse=''
for word in "$@"; do
    case $word in
        [1-5]) part=$word ;;
        --rehearse) rehearse=1 ;;
        -h | --help) usage && exit 0 ;;
        *) stop "unexpected word $word; bash tests/on_gpu.sh --help" ;;
    esac
done
[ -n "$part" ] || stop "which part, 1 to 5? bash tests/on_gpu.sh --help"

PY=${PY:-python3}
command -v "$PY" >/dev/null || stop "there is no $PY here: name a Python that has torch with PY=.venv/bin/python"
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
DATA=${DATA:-.gpu}
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}

# -----------------------------------------------------------------------------
# The machine, the sizes of the runs, and the file of the report

card=rehearsal
device=cuda
steps=200         # updates of a short run
exact=40          # updates of a run that is compared bit by bit
new_tokens=100    # tokens of a sample
small=()          # keys that make a model tiny
train=("$PY" train.py)
launcher=("${train[@]}")  # the command that short_run gives its words to
dtypes=(float32 bfloat16 float16)  # precisions of the compiled runs
layouts=(zero_stage=0 zero_stage=1 zero_stage=2 zero_stage=3 tp_size=2 pp_size=2)
if [ -n "$rehearse" ]; then
    OUT=${OUT:-$(mktemp -d)}
    device=cpu
    steps=4
    exact=6
    new_tokens=8
    dtypes=(bfloat16)
    layouts=(zero_stage=0)  # tests/test_parallel.py tests the others
    small=(--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4)
    export TORCHDYNAMO_DISABLE=1  # no compilation: on a CPU it takes a minute for each model
else
    card=$("$PY" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) ||
        stop "$PY finds no CUDA GPU here; --rehearse runs on the CPU"
fi
OUT=${OUT:-docs/results}
mkdir -p "$OUT" || exit 1
report=$OUT/gpu_${part}_$(printf %s "$card" | tr -cs 'A-Za-z0-9' '_').txt
failed=()

say() { printf '%s\n' "$*" | tee -a "$report"; }

facts() {  # the hardware and software behind the figures; no date, so that two reports can be compared
    local driver='' commit=${COMMIT:-} changed
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
    commit=${commit:-$(git rev-parse HEAD 2>/dev/null)}
    changed=$(git status --porcelain 2>/dev/null | wc -l)
    say "card: $card"
    say "driver: ${driver:-none}"
    say "torch: $("$PY" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || echo none)"
    say "commit: ${commit:-unknown}, $((changed)) files changed since"
}

# -----------------------------------------------------------------------------
# Running a command

# run COMMAND...: print the command, the last `keep` lines of its output (60 lines if it fails), its exit code and its
# seconds. It is killed after `limit` seconds. A failure is recorded, and the next command still runs.
keep=20
limit=200
run() {
    local code began=$SECONDS lines=$keep
    say "" && say "\$ $*"
    timeout -k 10 "$limit" "$@" >"$work/output" 2>&1 </dev/null
    code=$?
    [ "$code" = 0 ] || lines=60
    tail -n "$lines" "$work/output" | cut -c1-2000 | tee -a "$report"
    ended "$code" $((SECONDS - began)) "$@"
}

# run_shown COMMAND...: the same, but each line goes to the report at once, so that an interrupted run leaves figures.
run_shown() {
    local code began=$SECONDS
    say "" && say "\$ $*"
    timeout -k 10 "$limit" "$@" 2>&1 </dev/null | tee -a "$report"
    code=${PIPESTATUS[0]}
    ended "$code" $((SECONDS - began)) "$@"
}

ended() {  # exit code, seconds, command: report how it ended
    say "exit $1, $2 s"
    [ "$1" = 0 ] || failed+=("${*:3}")
    return "$1"
}

# Set $words to the arguments of train.py for a run into $work/NAME that evaluates only at its end.
words_for() {  # name, updates, config, dataset, then more arguments; a later argument wins
    local name=$1 updates=$2 config=$3 dataset=$4
    shift 4
    words=("$config" --dataset="$dataset" --max_iters="$updates" --lr_decay_iters="$updates" --warmup_iters=2
        --eval_interval="$updates" --eval_iters=2 --save_minutes=0 --device=$device --out_dir="$work/$name"
        ${small[@]+"${small[@]}"} "$@")
}

short_run() {  # name, updates, then more arguments: a small model on characters
    words_for "$1" "$2" config/shakespeare_char_nanogpt.py "$DATA/shakespeare_char" --log_interval=50 "${@:3}"
    run "${launcher[@]}" "${words[@]}"
}

# -----------------------------------------------------------------------------
# The datasets

dataset() {  # name, then the script that prepares it (with its arguments) if it is missing
    local folder=$DATA/$1
    shift
    [ -f "$folder/manifest.json" ] || run "$PY" "$@" --out_dir="$folder"
}

characters() { dataset shakespeare_char data/shakespeare_char/prepare.py; }

gpt2_tokens() {  # set $tokens to the larger of two datasets of GPT-2's tokens
    local documents=${MINICHAT_MIRROR:-}/documents.jsonl.gz
    if [ -f "$DATA/documents/manifest.json" ] || [ -f "$documents" ]; then
        dataset documents data/text/prepare.py --input="$documents" && tokens=$DATA/documents && return
    fi
    dataset shakespeare data/shakespeare/prepare.py
    tokens=$DATA/shakespeare
}

# -----------------------------------------------------------------------------
# 1: is it right

is_it_right() {
    local dtype
    if command -v nvidia-smi >/dev/null; then
        keep=30 run nvidia-smi
    fi
    characters
    keep=60 run "$PY" doctor.py --out_dir="$work"
    run "$PY" -m pytest -q --noconftest -p no:cacheprovider -m cuda tests/test_cuda.py

    short_run float32_eager $steps --dtype=float32 --compile=false
    for dtype in "${dtypes[@]}"; do
        short_run $dtype $steps --dtype=$dtype --compile=true
    done
    short_run stack $steps config/stack.py --dtype=auto
    short_run growing $steps --dtype=auto --context_start=16

    # a second run, and a run that was killed in the middle and resumed, must have the same bits
    local exactly=(--dtype=auto --compile=false --deterministic=true --dropout=0.1 --save_interval=2)
    short_run unbroken $exact "${exactly[@]}"
    short_run again $exact "${exactly[@]}"
    same_bits unbroken again
    write_killer
    launcher=(bash -c '"$@"; [ $? = 137 ]' killed "$PY" "$work/killed.py" $((exact / 2 + 1)))
    short_run killed $exact "${exactly[@]}"
    launcher=("${train[@]}")
    short_run killed $exact "${exactly[@]}" --init_from=resume
    same_bits unbroken killed

    run "$PY" sample.py --out_dir="$work/stack" --num_samples=2 --max_new_tokens=$new_tokens --device=$device
    run "$PY" sample.py --out_dir="$work/stack" --num_samples=2 --max_new_tokens=$new_tokens --device=$device --compile
}

same_bits() {  # two runs: compare the weights and optimizer state of their last checkpoints
    local file last
    last=ckpt/step_$(printf %08d $exact)
    for file in model.safetensors optimizer.pt; do
        run cmp "$work/$1/$last/$file" "$work/$2/$last/$file"
    done
}

write_killer() {  # killed.py STEP ...: train.py ..., which dies of SIGKILL just before it takes that step
    cat >"$work/killed.py" <<'END'
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
import optim
left = int(sys.argv[1])
step = optim.Optimizers.step
def step_or_die(self):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
optim.Optimizers.step = step_or_die
sys.argv = ["train.py", *sys.argv[2:]]
runpy.run_path("train.py", run_name="__main__")
END
}

# -----------------------------------------------------------------------------
# 2: how fast

how_fast() {
    local words=()
    [ -n "$rehearse" ] &&
        words=(--gpu_models=tiny --gpu_batches=2,4 --gpu_pieces=4096 --tokens=32 --updates=2 --warm_up=1)
    limit=480 run_shown "$PY" bench.py gpu --device=$device ${words[@]+"${words[@]}"}
    if [ -f "$DATA/nanogpt_bench.py" ]; then
        limit=150 run_shown "$PY" "$DATA/nanogpt_bench.py"
    else
        say "" && say "nanoGPT is not measured: $DATA has no nanogpt_bench.py"
    fi
}

# -----------------------------------------------------------------------------
# 3: where the time and the memory go

few_steps() {  # name, updates, config, then more arguments: print a large model's figures, then delete its run
    words_for "$1" "$2" "$3" "$tokens" --eval_iters=1 --log_interval=1 --probe_interval=0 "${@:4}"
    keep=50 run "${train[@]}" "${words[@]}" && run "$PY" "$work/figures.py" "$work/$1"
    rm -rf "${work:?}/$1"  # a checkpoint of 774M takes 9 GB
}

where_it_goes() {
    local one=(--gradient_accumulation_steps=1 --tokens_per_step=0) batch=64 whole=491520
    if [ -n "$rehearse" ]; then
        batch=4
        whole=512
    fi
    gpt2_tokens
    write_figures
    few_steps profile 14 config/owt_124m.py "${one[@]}" --batch_size=$batch --profile=10:12
    few_steps fits 4 config/owt_124m.py --gradient_accumulation_steps=none --tokens_per_step=$whole --batch_size=0
    few_steps 355m 5 config/owt_355m.py "${one[@]}"
    if [ -z "$rehearse" ]; then  # a rehearsal compiles nothing, so these would repeat the run above
        few_steps 355m_eager 5 config/owt_355m.py "${one[@]}" --compile=false
        few_steps 774m_eager 5 config/owt_774m.py "${one[@]}" --compile=false
    fi
    few_steps 774m_recomputed 5 config/owt_774m.py "${one[@]}" --compile=false --activation_checkpointing=full
}

write_figures() {  # figures.py RUN: a step's speed, parts and memory, each the median of the updates
    cat >"$work/figures.py" <<'END'
import json, statistics, sys
with open(sys.argv[1] + "/metrics.jsonl", encoding="utf-8") as lines:
    records = [json.loads(line) for line in lines][1:-1]  # the last one has the evaluation in it
names = ("tok_per_s", "mfu", "mem_gb", "gpu_util", "gpu_power_w", "gpu_mem_gb")
for key in [key for key in records[0] if key.endswith("_ms") or key in names]:
    values = [record[key] for record in records if record[key] is not None]
    print(key, statistics.median(values) if values else "n/a")
END
}

# -----------------------------------------------------------------------------
# 4: generation

generation() {
    local peers=false
    "$PY" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("transformers"))' && peers=true
    words=(--forms=bfloat16,float32,int8,int4 --batches=1,8,32 --prompts=16,512 --new_tokens=64 --rounds=2 --peers=$peers)
    if [ -n "$rehearse" ]; then  # a tiny model instead of GPT-2's size
        characters
        short_run tiny 2
        words=(--forms=float32,int8 --batches=1,2 --prompts=4 --new_tokens=4 --rounds=1 "--models=$work/tiny")
    fi
    limit=480 run_shown "$PY" bench.py infer --device=$device --out_dir="$work/infer" "${words[@]}"
}

# -----------------------------------------------------------------------------
# 5: two processes on one GPU

two_processes() {
    local layout same=(--dtype=float32 --compile=false --gradient_accumulation_steps=2 --log_interval=1 --backend=gloo)
    export CUDA_VISIBLE_DEVICES=0
    characters
    write_losses
    short_run one $exact "${same[@]}"
    launcher=("$PY" -m torch.distributed.run --standalone --nproc_per_node=2 train.py)
    for layout in "${layouts[@]}"; do
        short_run "$layout" $exact "${same[@]}" --"$layout" && run "$PY" "$work/losses.py" "$work/one" "$work/$layout"
    done
}

write_losses() {  # losses.py RUN RUN: exits with 0 if all losses agree within a relative 1e-3
    cat >"$work/losses.py" <<'END'
import json, sys
runs = [[json.loads(line)["loss"] for line in open(run + "/metrics.jsonl", encoding="utf-8")] for run in sys.argv[1:]]
most = max(abs(a - b) / a for a, b in zip(*runs, strict=True))
print(f"{len(runs[0])} losses, at most a relative {most:.1e} apart")
sys.exit(most > 1e-3)
END
}

# -----------------------------------------------------------------------------

titles=("" "is it right" "how fast" "where the time and the memory go" "generation" "two processes on one GPU")
parts=("" is_it_right how_fast where_it_goes generation two_processes)
: >"$report" || exit 1
say "# part $part: ${titles[part]}"
facts
"${parts[part]}"
say ""
say "part $part took $SECONDS s; ${#failed[@]} commands failed"
for command in ${failed[@]+"${failed[@]}"}; do
    say "failed: $command"
done
echo "the report is $report"
[ ${#failed[@]} = 0 ]
