#!/usr/bin/env bash
# Sets up minichat on a fresh machine and runs it. It needs bash and Python 3.10 to 3.13 with venv; everything else goes
# into .venv.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

usage() {
    cat <<'END'
usage: ./run_all.sh [setup | demo | chat | serve [KEYS OF serve.py] | perf | test [PYTEST ARGUMENTS]]
  setup   create .venv with the pinned packages for training, sampling and the tests
  demo    train on Tiny Shakespeare and print a sample; the same command resumes a demo that was stopped
  chat    demo's model, fine-tuned on Shakespeare's speeches as talks, and its first answer; resumes like demo
  serve   chat's model in a browser, and for programs; for example: ./run_all.sh serve --port=8080
  perf    run the notebooks, which measure this machine, and save them in out/notebooks
  test    setup, then all tests, one process per core; for example: ./run_all.sh test -m "not slow"
Without an argument: setup, test, demo and perf, one after another.
PYTHON=python3.12 ./run_all.sh chooses the interpreter for .venv.
END
}

stop() {
    echo "run_all.sh: $*" >&2
    exit 2
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

check_python() {  # sets python to the interpreter for .venv; it must be a supported version that can create one
    local version held
    held=$(version_of .venv/bin/python) || held=""
    python=${PYTHON:-${held:+.venv/bin/python}}  # a .venv keeps the Python it was created with
    python=${python:-python3}
    command -v "$python" >/dev/null ||
        stop "$python is missing: install Python 3.10 to 3.13 (Debian, Ubuntu: apt install python3 python3-venv)"
    version=$(version_of "$python") || stop "$python does not run: name a Python 3.10 to 3.13 with PYTHON=python3.12 $0"
    case $version in
        3.10 | 3.11 | 3.12 | 3.13) ;;
        *) stop "$python is Python $version, minichat needs 3.10 to 3.13: name one with PYTHON=python3.12 $0" ;;
    esac
    # Debian ships venv without ensurepip; `python3 -m venv` would then stop halfway with a long message.
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        stop "$python has no venv module with pip, which is a separate package on Debian: apt install python3-venv"
    if [ -L .venv/bin/python ] && [ "$held" != "$version" ]; then
        stop ".venv was created with Python ${held:-(now gone)}, and $python is $version: start over with rm -r .venv"
    fi
}

no_nvidia_driver() {  # a container has the device files, WSL has only nvidia-smi
    [ "$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && ! nvidia-smi >/dev/null 2>&1
}

driver_cuda() {  # prints the major CUDA version of the NVIDIA driver, such as 12; nothing if nvidia-smi shows none
    local version='CUDA (UMD )?Version: *([0-9]+)\.'  # drivers since 610 print "CUDA UMD Version"
    if [[ $(nvidia-smi 2>/dev/null) =~ $version ]]; then echo "${BASH_REMATCH[2]}"; fi
}

pick_build() {  # sets build to the build of torch for this machine (empty: the package index's default), prints why
    build=""
    if no_nvidia_driver; then
        build=cpu
        echo "No NVIDIA driver here: installing the CPU build of torch."
        return
    fi
    case $(driver_cuda) in
        12)
            build=cu126
            echo "The NVIDIA driver is for CUDA 12; the default build of torch needs one for CUDA 13 (580 or later):" \
                "installing the CUDA 12.6 build of torch, which runs on GPUs up to Hopper."
            ;;
        [1-9] | 10 | 11)
            build=cpu
            echo "The NVIDIA driver is too old: every build of torch since 2.9 needs one for CUDA 12 (525 or later)." \
                "Installing the CPU build. To use the GPU, update the driver, rm -r .venv and run this again."
            ;;
    esac
}

index_answers() {
    # The timer also limits the name look-up, which urlopen's timeout does not.
    .venv/bin/python - "$1/torch/" 2>/dev/null <<'END'
import os, sys, threading, urllib.request
threading.Timer(5, os._exit, [1]).start()
try:
    urllib.request.urlopen(sys.argv[1], timeout=5).close()
    os._exit(0)
finally:
    os._exit(1)
END
}

# A hash of everything that decides the packages in .venv: pyproject.toml, constraints.txt and the Python version.
fingerprint() { { cat pyproject.toml constraints.txt; version_of .venv/bin/python || true; } | cksum | tr ' ' '-'; }

install() {  # install base|dev; quick if .venv has it already
    local want=$1 what made="" package=. pip build index started=$SECONDS
    if [ -n "${PYTHON:-}" ]; then check_python; fi
    what=$(fingerprint)
    if [ -f .venv/minichat-stamp ]; then made=$(cat .venv/minichat-stamp); fi
    if [ "$made" = "$what $want" ] || [ "$made" = "$what dev" ]; then return; fi  # dev includes base
    if [ "${made##* }" = dev ]; then want=dev; fi  # renewing a dev environment renews all of it

    check_python
    rm -f .venv/minichat-stamp
    echo "Preparing .venv with $("$python" -V) ..."
    "$python" -m venv .venv || stop "could not create .venv in $PWD (the reason is above)"  # repairs a partial one
    pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off -c constraints.txt)

    pick_build
    if [ -n "$build" ]; then
        index=https://download.pytorch.org/whl/$build
        echo "Looking for torch at $index ..."
        if ! index_answers "$index"; then
            echo "It does not answer: installing torch from pip's usual package index."
        elif ! "${pip[@]}" --no-deps --index-url "$index" torch; then
            echo "That failed: installing torch from pip's usual package index."
        fi
    fi

    if [ "$want" = dev ]; then package=".[dev]"; fi
    echo "Installing the $want dependencies (a minute or two, most of it torch) ..."
    "${pip[@]}" -e "$package" || stop "pip failed (the reason is above); run the same command again to continue"
    echo "$(fingerprint) $want" >.venv/minichat-stamp  # last, so that an interrupted set-up has no stamp
    echo "Installed in $((SECONDS - started)) s."
}

demo() {
    install base
    .venv/bin/python data/shakespeare_char/prepare.py
    .venv/bin/python train.py config/shakespeare_char_demo.py --init_from=auto
    .venv/bin/python sample.py --out_dir=out/shakespeare_char_demo --num_samples=1 --max_new_tokens=500
}

chat() {
    install base
    .venv/bin/python data/shakespeare_char/prepare.py
    .venv/bin/python train.py config/shakespeare_char_demo.py --init_from=auto
    .venv/bin/python data/shakespeare_chat/prepare.py
    .venv/bin/python train.py config/chat_shakespeare.py
    local question="What say you of love?"
    echo "you     $question"
    .venv/bin/python chat.py --out_dir=out/chat_shakespeare --system=ROMEO --prompt="$question"
    echo "Talk on with: .venv/bin/python chat.py --out_dir=out/chat_shakespeare --system=ROMEO"
    echo "Or in a browser: ./run_all.sh serve"
}

serve() {
    install base
    if ! .venv/bin/python -c 'import fastapi, prometheus_client, uvicorn' 2>/dev/null; then
        .venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e ".[serve]" ||
            stop "pip failed (the reason is above); run the same command again to continue"
    fi
    if [ ! -d out/chat_shakespeare/ckpt ]; then chat; fi
    exec .venv/bin/python serve.py --out_dir=out/chat_shakespeare "$@"
}

perf() {
    install dev
    .venv/bin/python -m ipykernel install --sys-prefix --name=minichat --display-name=minichat >/dev/null
    .venv/bin/python data/shakespeare_char/prepare.py
    .venv/bin/python notebooks/execute.py
}

run_tests() {
    install dev
    .venv/bin/python -m pytest -n auto --dist worksteal "$@"  # one process per core; add -n 0 for one in all
}

no_arguments() { [ $# -eq 0 ] || stop "only the verbs serve and test take arguments, got: $*"; }

verb=${1:-all}
if [ $# -gt 0 ]; then shift; fi
case $verb in
    setup) no_arguments "$@"; install dev ;;
    demo) no_arguments "$@"; demo ;;
    chat) no_arguments "$@"; chat ;;
    serve) serve "$@" ;;
    perf) no_arguments "$@"; perf ;;
    test) run_tests "$@" ;;
    all) run_tests; demo; perf ;;  # the tests begin with setup
    -h | --help) usage ;;
    *) stop "unknown verb '$verb': it is one of setup, demo, chat, serve, perf, test; --help explains them" ;;
esac
