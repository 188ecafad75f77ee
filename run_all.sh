#!/usr/bin/env bash
# minichat from a fresh machine: needs bash and Python 3.10 to 3.13 with venv, everything else goes into .venv.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

usage() {
    cat <<'END'
usage: ./run_all.sh [setup | demo | perf | test [PYTEST ARGUMENTS]]
  setup   create .venv with the pinned versions of everything that training, sampling and the tests need
  demo    learn Tiny Shakespeare and write some; the same command again picks up where it was stopped
  perf    run the notebooks, with what they measure of this machine, into out/notebooks
  test    setup, then the whole test suite, a process a core; for example: ./run_all.sh test -m "not slow"
With no argument: setup, test, demo and perf in turn. PYTHON=python3.12 ./run_all.sh picks the interpreter for .venv.
END
}

stop() {
    echo "run_all.sh: $*" >&2
    exit 2
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

check_python() {  # find the interpreter for .venv: there, of a supported version, and able to make one
    local version held
    held=$(version_of .venv/bin/python) || held=""
    python=${PYTHON:-${held:+.venv/bin/python}}  # a .venv stays with the Python it was made of
    python=${python:-python3}
    command -v "$python" >/dev/null ||
        stop "$python is missing: install Python 3.10 to 3.13 (Debian, Ubuntu: apt install python3 python3-venv)"
    version=$(version_of "$python") || stop "$python does not run: name a Python 3.10 to 3.13 with PYTHON=python3.12 $0"
    case $version in
        3.10 | 3.11 | 3.12 | 3.13) ;;
        *) stop "$python is Python $version, minichat needs 3.10 to 3.13: name one with PYTHON=python3.12 $0" ;;
    esac
    # Debian ships venv without ensurepip; `python3 -m venv` would then stop half-way with a long message.
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        stop "$python has no venv module with pip, which Debian packages apart: apt install python3-venv"
    if [ -L .venv/bin/python ] && [ "$held" != "$version" ]; then
        stop ".venv is of Python ${held:-that is gone}, $python is $version: start over with rm -r .venv"
    fi
}

no_nvidia_driver() {  # a container has the device files, WSL has only nvidia-smi
    [ "$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && ! nvidia-smi >/dev/null 2>&1
}

driver_cuda() {  # the major version of CUDA that the NVIDIA driver is for, such as 12; nothing where it does not say
    local version='CUDA (UMD )?Version: *([0-9]+)\.'  # drivers from 610 on say "CUDA UMD Version"
    if [[ $(nvidia-smi 2>/dev/null) =~ $version ]]; then echo "${BASH_REMATCH[2]}"; fi
}

pick_build() {  # sets build to the build of torch for this machine, empty for the package index's own, and says why
    build=""
    if no_nvidia_driver; then
        build=cpu
        echo "No NVIDIA driver here: the CPU build of torch will do."
        return
    fi
    case $(driver_cuda) in
        12)
            build=cu126
            echo "The NVIDIA driver is for CUDA 12, and torch's own default needs a driver for CUDA 13 (580 or later):" \
                "the CUDA 12.6 build of torch runs on GPUs up to Hopper."
            ;;
        [1-9] | 10 | 11)
            build=cpu
            echo "The NVIDIA driver is too old for every build of torch since 2.9, which need one for CUDA 12" \
                "(525 or later): the CPU build is installed. Update the driver, rm -r .venv and run this again."
            ;;
    esac
}

index_answers() {
    # The timer bounds the name look-up too, which urlopen's timeout does not.
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

# What .venv must hold: pyproject.toml and constraints.txt decide it, together with the Python that .venv runs.
fingerprint() { { cat pyproject.toml constraints.txt; version_of .venv/bin/python || true; } | cksum | tr ' ' '-'; }

install() {  # install base|dev; quick when .venv holds it already
    local want=$1 what made="" package=. pip build index started=$SECONDS
    if [ -n "${PYTHON:-}" ]; then check_python; fi
    what=$(fingerprint)
    if [ -f .venv/minichat-stamp ]; then made=$(cat .venv/minichat-stamp); fi
    if [ "$made" = "$what $want" ] || [ "$made" = "$what dev" ]; then return; fi  # dev holds base too
    if [ "${made##* }" = dev ]; then want=dev; fi  # renewing a dev environment renews all of it

    check_python
    rm -f .venv/minichat-stamp
    echo "Preparing .venv with $("$python" -V) ..."
    "$python" -m venv .venv || stop "could not create .venv in $PWD (the reason is above)"  # also mends a partial one
    pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off -c constraints.txt)

    pick_build
    if [ -n "$build" ]; then
        index=https://download.pytorch.org/whl/$build
        echo "Looking for torch at $index ..."
        if ! index_answers "$index"; then
            echo "It does not answer: torch comes from the package index that pip is set up with."
        elif ! "${pip[@]}" --no-deps --index-url "$index" torch; then
            echo "That failed: torch comes from the package index that pip is set up with."
        fi
    fi

    if [ "$want" = dev ]; then package=".[dev]"; fi
    echo "Installing the $want dependencies (a minute or two, most of it torch) ..."
    "${pip[@]}" -e "$package" || stop "pip failed (the reason is above); the same command goes on from here"
    echo "$(fingerprint) $want" >.venv/minichat-stamp  # last, so that an interrupted set-up has no stamp
    echo "Installed in $((SECONDS - started)) s."
}

demo() {
    install base
    .venv/bin/python data/shakespeare_char/prepare.py
    .venv/bin/python train.py config/shakespeare_char_demo.py --init_from=auto
    .venv/bin/python sample.py --out_dir=out/shakespeare_char_demo --num_samples=1 --max_new_tokens=500
}

perf() {
    install dev
    .venv/bin/python -m ipykernel install --sys-prefix --name=minichat --display-name=minichat >/dev/null
    .venv/bin/python data/shakespeare_char/prepare.py
    .venv/bin/python notebooks/execute.py
}

run_tests() {
    install dev
    .venv/bin/python -m pytest -n auto --dist worksteal "$@"  # a process a core; -n 0 after it: one
}

no_more() { [ $# -eq 0 ] || stop "only test takes further arguments, got: $*"; }

verb=${1:-all}
if [ $# -gt 0 ]; then shift; fi
case $verb in
    setup) no_more "$@"; install dev ;;
    demo) no_more "$@"; demo ;;
    perf) no_more "$@"; perf ;;
    test) run_tests "$@" ;;
    all) run_tests; demo; perf ;;  # the tests begin with setup
    -h | --help) usage ;;
    *) stop "unknown verb '$verb': it is one of setup, demo, perf, test; --help explains them" ;;
esac
