"""The set-up files: run_all.sh's decisions (against a stand-in for Python), the pins, the imports."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE = [Requirement(r) for r in PROJECT["dependencies"]]
EXTRAS = [Requirement(r) for extra in PROJECT["optional-dependencies"].values() for r in extra]
PYTEST = "-m pytest -n auto --dist worksteal"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

# Answers like an interpreter, writes its arguments to a file, and "creates" a .venv whose python is itself.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *version_info*) echo "${FAKE_VERSION:-3.12}" ;;
    *ensurepip*) exit "${FAKE_NO_VENV:-0}" ;;
    -V) echo "Python ${FAKE_VERSION:-3.12}" ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python 2>/dev/null || true ;;
    *"pip "*--index-url*) echo "$*" >>asked; exit "${FAKE_INDEX_LACKS_TORCH:-0}" ;;
    *"pip "*) echo "$*" >>asked; exit "${FAKE_PIP_FAILS:-0}" ;;
    "- "*) exit "${FAKE_NO_INDEX:-0}" ;;
    *) echo "$*" >>asked; if [[ $* = *pytest* ]]; then exit "${FAKE_TESTS_FAIL:-0}"; fi ;;
esac
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def house(tmp_path):
    """run(*args, **env) -> (exit code, output, arguments of each call of Python). It uses a copy of the set-up files
    in a folder whose name has a space."""
    folder, tools = tmp_path / "mini chat", tmp_path / "tools"
    folder.mkdir(), tools.mkdir()
    for name in ["run_all.sh", "pyproject.toml", "constraints.txt"]:
        shutil.copy(ROOT / name, folder)
    for name in ["bash", "env", "cat", "cksum", "cp", "dirname", "mkdir", "rm", "tr", "uname"]:
        (tools / name).symlink_to(shutil.which(name))
    executable(tools / "nvidia-smi", '#!/usr/bin/env bash\necho "${FAKE_SMI:-}"\nexit ${FAKE_NO_GPU:-0}\n')
    executable(tools / "python3", FAKE_PYTHON)

    def run(*args, **env):
        asked = folder / "asked"
        asked.unlink(missing_ok=True)
        command = [shutil.which("bash"), str(folder / "run_all.sh"), *args]
        done = subprocess.run(command, env={"PATH": str(tools), **env}, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, asked.read_text().splitlines() if asked.exists() else []

    run.folder, run.tools = folder, tools
    return run


def one_line(output):
    return output.endswith("\n") and output.count("\n") == 1


# ---------------------------------------------------------------- run_all.sh


@pytest.mark.parametrize("script", ["run_all.sh", ".ci/run", "slurm.sh"])
def test_scripts_are_whole(script):
    assert os.access(ROOT / script, os.X_OK)
    assert b"\r" not in (ROOT / script).read_bytes()
    assert subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True).returncode == 0


def test_help_names_the_verbs(house):
    code, out, asked = house("--help")
    assert code == 0 and not asked and all(f"  {verb} " in out for verb in ["setup", "demo", "perf", "test"])


@pytest.mark.parametrize("args", [["frobnicate"], ["demo", "twice"], ["perf", "gpt.ipynb"]])
def test_wrong_arguments_are_one_line(house, args):
    code, out, asked = house(*args)
    assert code == 2 and one_line(out) and args[-1] in out and not asked


def test_no_python_is_one_line(house):
    (house.tools / "python3").unlink()
    code, out, _ = house("setup")
    assert code == 2 and one_line(out) and "python3 is missing" in out and "apt install python3" in out


def test_no_venv_module_is_one_line_with_the_mend(house):
    code, out, _ = house("setup", FAKE_NO_VENV="1")
    assert code == 2 and one_line(out) and "apt install python3-venv" in out
    assert not (house.folder / ".venv").exists()


@pytest.mark.parametrize("version", ["3.9", "3.14"])
def test_unsupported_python_is_one_line(house, version):
    code, out, _ = house("setup", FAKE_VERSION=version)
    assert code == 2 and one_line(out) and version in out and "3.10 to 3.13" in out


def test_demo_takes_base_and_tests_take_dev(house):
    code, _, asked = house("demo")
    assert code == 0 and asked[0].endswith("-c constraints.txt -e .") and len(asked) == 4
    assert [line.split()[0] for line in asked[1:]] == ["data/shakespeare_char/prepare.py", "train.py", "sample.py"]
    assert len(house("demo")[2]) == 3  # nothing to install again

    code, _, asked = house("test", "-m", "not slow")
    assert code == 0 and asked[0].endswith("-e .[dev]") and asked[1:] == [f"{PYTEST} -m not slow"]
    assert len(house("demo")[2]) == 3  # dev is enough for the demo
    assert house("test")[2] == [PYTEST]

    with open(house.folder / "constraints.txt", "a") as f:
        f.write("# changed\n")
    assert house("demo")[2][0].endswith("-e .[dev]")  # and it stays dev when it is renewed


def test_perf_registers_the_kernel_and_runs_the_notebooks(house):
    code, _, asked = house("perf")
    assert code == 0 and asked[0].endswith("-e .[dev]")
    register, *scripts = asked[1:]
    assert register.startswith("-m ipykernel install --sys-prefix --name=minichat")
    assert scripts == ["data/shakespeare_char/prepare.py", "notebooks/execute.py"]


def test_an_interrupted_setup_is_not_taken_for_a_finished_one(house):
    code, out, asked = house("setup", FAKE_PIP_FAILS="1")
    assert code == 2 and "pip failed" in out and len(asked) == 1
    code, _, asked = house("setup")
    assert code == 0 and len(asked) == 1
    assert house("setup")[2] == []


def test_a_failing_test_suite_fails_and_stops_the_rest(house):
    code, _, asked = house(FAKE_TESTS_FAIL="1")
    assert code == 1 and asked[-1] == PYTEST


def test_no_argument_is_setup_tests_demo_and_notebooks(house):
    code, _, asked = house()
    assert code == 0 and asked[0].endswith("-e .[dev]") and asked[1] == PYTEST
    assert [line.split()[0] for line in asked[2:5]] == ["data/shakespeare_char/prepare.py", "train.py", "sample.py"]
    assert asked[-1] == "notebooks/execute.py" and "ipykernel" in asked[-3]
    assert len([line for line in asked if "pip " in line]) == 1, "set up once"


@pytest.mark.skipif(sys.platform != "linux" or Path("/proc/driver/nvidia/version").exists(), reason="has a GPU driver")
def test_torch_comes_from_the_cpu_index_only_without_a_driver(house):
    def installs(**env):
        shutil.rmtree(house.folder / ".venv", ignore_errors=True)
        return ["download.pytorch.org/whl/cpu" in line for line in house("setup", **env)[2]]

    assert installs() == [False]  # nvidia-smi answers
    assert installs(FAKE_NO_GPU="1") == [True, False]
    assert installs(FAKE_NO_GPU="1", FAKE_NO_INDEX="1") == [False]


OLD_HEADER = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {:<8} |"
NEW_HEADER = "| NVIDIA-SMI 610.43.02    KMD Version: 610.43.02     CUDA UMD Version: {:<8} |"


@pytest.mark.parametrize("header, build", [
    (OLD_HEADER.format("12.4"), "cu126"),
    (OLD_HEADER.format("12.9"), "cu126"),
    (NEW_HEADER.format("12.9"), "cu126"),
    (OLD_HEADER.format("13.0"), None),
    (NEW_HEADER.format("13.3"), None),
    (OLD_HEADER.format("11.8"), "cpu"),
    (OLD_HEADER.format("10.2"), "cpu"),
    (OLD_HEADER.format("N/A"), None),
    (OLD_HEADER.format("120.1"), None),
])
def test_the_build_of_torch_is_one_for_the_driver(house, header, build):
    code, out, asked = house("setup", FAKE_SMI=f"Wed Sep 30 21:53:38 2026\n+-----+\n{header}\n+-----+")
    assert code == 0 and asked[-1].endswith("-c constraints.txt -e .[dev]")
    first = f"-c constraints.txt --no-deps --index-url https://download.pytorch.org/whl/{build} torch"
    if build is None:
        assert len(asked) == 1 and "download.pytorch.org" not in out
    else:
        assert len(asked) == 2 and asked[0].endswith(first)
    assert ("too old" in out) == (build == "cpu") and ("CUDA 12.6 build" in out) == (build == "cu126")


@pytest.mark.parametrize("trouble, says", [("FAKE_NO_INDEX", "does not answer"), ("FAKE_INDEX_LACKS_TORCH", "failed")])
def test_an_index_without_torch_leaves_the_default_one(house, trouble, says):
    code, out, asked = house("setup", FAKE_SMI=OLD_HEADER.format("12.4"), **{trouble: "1"})
    assert code == 0 and says in out and asked[-1].endswith("-c constraints.txt -e .[dev]")
    assert sum("--index-url" in line for line in asked) == (trouble == "FAKE_INDEX_LACKS_TORCH")


# ---------------------------------------------------------------- pins and imports


def test_constraints_are_exact_and_cover_every_dependency():
    pins = defaultdict(list)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), line
            pins[canonicalize_name(pin.name)].append(pin)

    for python in PYTHONS:
        here = {"python_version": python, "python_full_version": python + ".1"}
        for name, found in pins.items():
            found = [pin for pin in found if pin.marker is None or pin.marker.evaluate(here)]
            assert len(found) <= 1, f"{name} is pinned twice for Python {python}"
        for wanted in BASE + EXTRAS:
            found = [p for p in pins[canonicalize_name(wanted.name)] if p.marker is None or p.marker.evaluate(here)]
            assert found, f"{wanted.name} has no pin for Python {python}"
            version = str(found[0].specifier).removeprefix("==")
            assert wanted.specifier.contains(version, prereleases=True), f"{wanted} does not allow {version}"


def test_all_brings_every_optional_part_but_flash_attn():
    extras = PROJECT["optional-dependencies"]
    wanted = {need for name, needs in extras.items() if name not in ("dev", "all") for need in needs}
    assert len(extras["all"]) == len(set(extras["all"])), "listed twice"
    assert set(extras["all"]) == {need for need in wanted if Requirement(need).name != "flash-attn"}


def test_scripts_import_only_base_dependencies_at_module_level():
    rooms = ["training", "inference", "foreign", "serving", "reporting", "benchmarks"]
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]
    scripts += [path for room in rooms for path in ROOT.glob(f"{room}/*.py")]
    allowed = {*sys.stdlib_module_names, *(r.name for r in BASE), *(path.stem for path in scripts)}
    allowed |= {"data", *rooms}  # folders of this project
    allowed |= {path.parent.name for path in scripts if path.stem == "prepare"}  # a dataset's script may use another's
    server = {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"}  # used by serving/
    for path in scripts:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            extra = {name.split(".")[0] for name in names} - allowed
            if path.parent.name == "serving":
                extra -= server
            assert not extra, f"{path.relative_to(ROOT)}: import {extra} where it is used, not at the top"


def test_no_package_index_or_machine_path_in_any_file():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    foreign = re.compile(r"py(?:pi\.org|thonhosted)|(?<![\w.\-])/(?:root|work|tmp)(?:/|\b)", re.IGNORECASE)
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file():
            hit = foreign.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not hit, f"{name} names {hit.group()}, which other machines do not have"


def test_every_floor_is_in_the_environment_of_lowest_versions():
    """A lowest version that is raised or added must be tested in that environment: tests/lowest.txt says how."""
    wanted = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    floors = {match[1]: match[2] for need in wanted if (match := re.match(r"([\w-]+)>=([\d.]+)", need))}
    lines = [line.split("==") for line in (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
             if line and not line.startswith("#")]
    lowest = {name: version for name, version in lines}
    assert floors.keys() == lowest.keys() and "torch" in floors
    for name, floor in floors.items():
        assert re.fullmatch(rf"{re.escape(floor)}(\.0)*", lowest[name]), name
