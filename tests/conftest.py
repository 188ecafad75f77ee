"""Fixtures that several test files share: a small dataset, a small run, and a way to run the scripts."""

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import setuptools  # noqa: F401  before anything imports distutils, which torch.compile's import of it forbids

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several processes run tests at once
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each process that compiles starts others

import fused  # noqa: E402
import training.start  # noqa: E402
from data.common import write_dataset  # noqa: E402
from inference import kernels  # noqa: E402
from tokenizer import CharTokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TINY_TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 40

# no example has to finish within hypothesis' 200 ms: a busy machine is no fault of the code
hypothesis.settings.register_profile("any machine", deadline=None,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")


def pytest_sessionstart():
    """Compile the kernels of a CPU before the tests, which look at what a script prints."""
    fused.library()
    kernels.available()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """-n auto: a process for each core that this one may use, 8 at most: each holds a gigabyte or two."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 8)


def pytest_collection_modifyitems(items):
    """Run the slow tests first, so that no worker is left with one at the end.

    Before them come the tests that share the longest fixture. A worker that has nothing left to do would otherwise
    take one of them, and build the fixture again."""
    items.sort(key=lambda item: ("table" not in item.fixturenames, not item.get_closest_marker("slow")))


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """run_script("sample.py", "--seed=1", ..., input=b"") runs a script on the CPU, from outside the project's folder.

    -> subprocess.CompletedProcess with stdout and stderr as text.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run_script(script, *args, input=b"", **environment):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        done = subprocess.run(command, input=input, capture_output=True, cwd=elsewhere, env=environment)
        done.stdout, done.stderr = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
        return done

    return run_script


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """A character dataset as prepare.py writes one. Do not change it: the whole session shares it."""
    folder = tmp_path_factory.mktemp("tiny_dataset")
    tokenizer = CharTokenizer.from_text(TINY_TEXT)
    ids = tokenizer.encode_array(TINY_TEXT)
    splits = {"train": ids[:3000], "val": ids[3000:]}
    write_dataset(folder, splits, tokenizer, {"name": "tiny"}, {"version": 1}, {"read": 1, "kept": 1})
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tiny_dataset):
    """Arguments of train.py for a model that trains in a moment: 6 steps, checkpoints at 3 and 6."""
    return [
        f"--dataset={tiny_dataset}", "--device=cpu", "--dtype=float32", "--compile=false", "--threads=1",
        "--block_size=16", "--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=4", "--learning_rate=1e-2",
        "--max_iters=6", "--eval_interval=3", "--eval_iters=2", "--warmup_iters=2",
    ]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, run_script, tiny_settings):
    """The run folder that train.py leaves. Do not change it; copy it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = run_script("train.py", *tiny_settings, f"--out_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def call_script(monkeypatch, capsys):
    """call_script("sample.py", ..., stdin=b"") is run_script within this process, which saves importing torch.

    -> (exit code, stdout, stderr); an exception that a user would see as a traceback is raised.
    """

    def call_script(script, *args, stdin=b""):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call_script


@pytest.fixture(autouse=True)
def memory_goes_back(monkeypatch):
    """device.keep_memory lasts as long as its process, and some tests measure how much memory this one holds."""
    monkeypatch.setattr(training.start, "keep_memory", lambda: None)


@pytest.fixture
def no_kernels(monkeypatch):
    """A CPU without a C++ compiler."""
    monkeypatch.setattr(fused, "library", lambda: None)
    monkeypatch.setattr(kernels, "find_library", lambda: (None, "no C++ compiler: apt install g++"))
