"""What several test files share: a small dataset, a small run, and a way to run the scripts."""

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import setuptools  # noqa: F401  before anything imports distutils, which torch.compile's import of it forbids

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several processes run tests beside each other
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each that compiles starts others

from data.common import write_dataset  # noqa: E402
from tokenizer import CharTokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TINY_TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 40

# no example has to be ready within hypothesis' 200 ms: a busy machine is no fault of the code
hypothesis.settings.register_profile("any machine", deadline=None,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """-n auto: a process a core, of those that this one may use; each holds a gigabyte or two."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 8)


def pytest_collection_modifyitems(items):
    """Long ones first, so that no worker is left with one at the end; before them those that share the longest fixture,
    which a worker that has nothing left to do would otherwise take from the one that has it."""
    items.sort(key=lambda item: ("table" not in item.fixturenames, not item.get_closest_marker("slow")))


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """run_script("sample.py", "--seed=1", ..., input=b"") runs one on the CPU, from a folder that is not the project's.

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
    """A character dataset as prepare.py writes one. Read it only: it is there for the whole session."""
    folder = tmp_path_factory.mktemp("tiny_dataset")
    tokenizer = CharTokenizer.from_text(TINY_TEXT)
    ids = tokenizer.encode_array(TINY_TEXT)
    splits = {"train": ids[:3000], "val": ids[3000:]}
    write_dataset(folder, splits, tokenizer, {"name": "tiny"}, {"version": 1}, {"read": 1, "kept": 1})
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tiny_dataset):
    """Arguments of train.py for a model that is trained in no time: 6 steps, checkpoints at 3 and 6."""
    return [
        f"--dataset={tiny_dataset}", "--device=cpu", "--dtype=float32", "--compile=false", "--threads=1",
        "--block_size=16", "--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=4", "--learning_rate=1e-2",
        "--max_iters=6", "--eval_interval=3", "--eval_iters=2", "--warmup_iters=2",
    ]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, run_script, tiny_settings):
    """The run folder that train.py leaves. Read it only, or copy it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = run_script("train.py", *tiny_settings, f"--out_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def call_script(monkeypatch, capsys):
    """call_script("sample.py", ..., stdin=b"") is run_script in this process, which saves importing torch.

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
