"""tests/on_gpu.sh and `bench.py gpu` without a GPU: a rehearsal runs all commands, and failures are reported."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cross_entropy
from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[1]

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 100
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs bash")

# A Python that runs nothing: it prints its arguments, and fails if one of them is $BROKEN.
FAKE = """#!/usr/bin/env bash
echo "told: $*"
case " $* " in *" $BROKEN "*) echo "it broke" && exit 3 ;; esac
"""

SHOWN = {  # by part: commands and parts of their output that the report must contain
    1: ("doctor.py", "-m cuda tests/test_cuda.py", "--dtype=float32 --compile=false", "--dtype=bfloat16 --compile=true",
        "config/stack.py", "--context_start=16", "--deterministic=true", "again/ckpt/step_00000006/model.safetensors",
        "killed.py", "--init_from=resume", "killed/ckpt/step_00000006/optimizer.pt", "sample.py", "--compile\n"),
    2: ("bench.py gpu", "row base  model tiny", "row piece 2**12", "row muon bfloat16 alone", '{"benchmark": "gpu"',
        "nanoGPT is not measured"),
    3: ("config/owt_124m.py", "--profile=10:12", "by memory that they take", "--batch_size=0", "memory      about",
        "config/owt_355m.py", "config/owt_774m.py", "mem_gb"),
    4: ("bench.py infer", '{"benchmark": "infer"'),
    5: ("--nproc_per_node=2", "--backend=gloo", "layout      2 processes", "losses, at most"),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small text, prepared under the names of the datasets that the parts train on."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    for name in ("shakespeare_char", "shakespeare"):
        words = [f"--input={folder / 'text.txt'}", f"--out_dir={folder / name}"]
        subprocess.run([sys.executable, ROOT / "data/shakespeare_char/prepare.py", *words], check=True)
    return folder


def on_gpu(*words, **environment):
    """Run bash tests/on_gpu.sh WORDS -> subprocess.CompletedProcess, with stderr in stdout."""
    inherited = {key: value for key, value in os.environ.items() if key != "MINICHAT_MIRROR"}
    environment = {key: str(value) for key, value in environment.items()}
    env = {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PY": sys.executable, **environment}
    return subprocess.run(["bash", ROOT / "tests/on_gpu.sh", *words], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")


def commands(report):
    return [line[2:] for line in report.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_every_part_rehearses(data, tmp_path):
    with ThreadPoolExecutor(2) as two_at_once:
        rehearsals = two_at_once.map(lambda part: on_gpu(str(part), "--rehearse", DATA=data, OUT=tmp_path), SHOWN)
    for part, done in zip(SHOWN, rehearsals, strict=True):
        assert done.returncode == 0, done.stdout
        report = (tmp_path / f"gpu_{part}_rehearsal.txt").read_text(encoding="utf-8")
        first = report.splitlines()[:5]
        assert [line.partition(":")[0] for line in first] == [f"# part {part}", "card", "driver", "torch", "commit"]
        assert not [text for text in SHOWN[part] if text not in report]
        ends = [line for line in report.splitlines() if line.startswith("exit ")]
        assert len(ends) == len(commands(report)) and all(line.startswith("exit 0, ") for line in ends)
    assert len(list(tmp_path.iterdir())) == len(SHOWN), "one report each"


@pytest.fixture
def fake(tmp_path):
    """The path of FAKE, to be PY."""
    path = tmp_path / "python"
    path.write_text(FAKE, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("part", [1, 2, 3, 4, 5])
def test_a_command_that_fails_is_told_and_the_others_run(part, fake, tmp_path):
    broken = {1: "doctor.py", 2: "gpu", 3: "config/owt_355m.py", 4: "infer", 5: "torch.distributed.run"}[part]
    out = tmp_path / "out"
    done = on_gpu(str(part), "--rehearse", PY=fake, BROKEN=broken, DATA=tmp_path / "data", OUT=out)
    assert done.returncode == 1
    report = (out / f"gpu_{part}_rehearsal.txt").read_text(encoding="utf-8")
    assert "it broke\nexit 3, " in report
    failed = [line for line in report.splitlines() if line.startswith("failed: ")]
    assert any(f" {broken} " in f"{line} " for line in failed)
    last = {1: "sample.py", 2: "bench.py", 3: "config/owt_774m.py", 4: "bench.py", 5: "torch.distributed.run"}[part]
    assert any(f" {last} " in command for command in commands(report)), "the commands after it still run"


def test_what_is_missing_is_prepared_and_what_is_there_is_not(fake, tmp_path):
    mirror, data, out = tmp_path / "mirror", tmp_path / "data", tmp_path / "out"
    mirror.mkdir()
    where = {"PY": fake, "BROKEN": "nothing", "DATA": data, "OUT": out}

    def prepared(part, **more):
        on_gpu(part, "--rehearse", **where, **more)
        report = (out / f"gpu_{part}_rehearsal.txt").read_text(encoding="utf-8")
        return [word for command in commands(report) for word in command.split() if word.endswith("prepare.py")]

    assert prepared("1") == ["data/shakespeare_char/prepare.py"]
    assert prepared("3", MINICHAT_MIRROR=mirror) == ["data/shakespeare/prepare.py"]
    (mirror / "documents.jsonl.gz").touch()
    assert prepared("3", MINICHAT_MIRROR=mirror) == ["data/text/prepare.py"]
    for name in ("shakespeare_char", "documents"):
        (data / name).mkdir(parents=True)
        (data / name / "manifest.json").touch()
    assert prepared("1") == prepared("3") == []


@pytest.mark.parametrize("words, named", [((), "which part"), (("6",), "unexpected word 6"), (("1",), "no CUDA GPU")])
def test_a_part_that_cannot_begin_leaves_nothing(words, named, tmp_path):
    done = on_gpu(*words, OUT=tmp_path / "out")
    assert done.returncode == 2 and named in done.stdout and not (tmp_path / "out").exists()


def measure_tiny(**changes):
    """bench.py gpu on a tiny model, in this process. -> its figures"""
    return gpu.bench_gpu(SimpleNamespace(**{
        "device": "cpu", "gpu_models": ("tiny",), "gpu_batches": (2,), "gpu_pieces": (2048,), "tokens": 16,
        "updates": 1, "warm_up": 0, **changes}))


def test_a_row_that_has_no_figure_says_why_and_the_next_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    step = gpu.Training.step
    errors = {"whole loss": torch.OutOfMemoryError("CUDA out of memory. Tried to"),
              "eager": RuntimeError("no such\nkernel")}

    def fail(training):
        if error := errors.get(training.case.row):
            raise error
        step(training)

    monkeypatch.setattr(gpu.Training, "step", fail)
    figures = measure_tiny()
    rows = {row["row"]: row for row in figures["rows"]}
    assert rows["whole loss"]["trouble"] == "out of memory" and rows["eager"]["trouble"] == "no such"
    assert figures["failed"] == ["eager"], "too little memory is no fault; an unknown error is"
    shown = capsys.readouterr().out
    for name in ("base", "piece 2**11", "adamw alone", "muon float32 alone"):
        assert rows[name]["step_ms"] > 0 and not rows[name]["trouble"] and f"row {name}  model tiny" in shown
    assert rows["base"]["tok_per_s"] == pytest.approx(1000 * 2 * 16 / rows["base"]["step_ms"], abs=1)


def test_the_piece_size_is_what_the_loss_holds_and_is_put_back(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    before, pieces, rows_at_once = dict(cross_entropy.PIECE), [], cross_entropy.rows_at_once

    def rows(*args):
        pieces.append(cross_entropy.PIECE["cpu"])
        return rows_at_once(*args)

    monkeypatch.setattr(cross_entropy, "rows_at_once", rows)
    measure_tiny(gpu_pieces=(1024, 2048))
    assert set(pieces) == {before["cpu"], 1024, 2048} and cross_entropy.PIECE == before


@pytest.mark.parametrize("word, named", [("--gpu_models=gpt9", "gpt9"), ("--gpu_batches=()", "one batch")])
def test_what_cannot_be_measured_is_one_line(word, named, call_script):
    code, _, err = call_script("bench.py", "gpu", "--device=cpu", word)
    assert code == 2 and named in err and err.count("\n") == 1


def test_two_runs_that_differ_are_seen(tmp_path):
    """losses.py of part 5, as on_gpu.sh writes it."""
    script = (ROOT / "tests" / "on_gpu.sh").read_text(encoding="utf-8")
    text = script.partition('cat >"$work/losses.py" <<\'END\'\n')[2].partition("\nEND\n")[0]
    (tmp_path / "losses.py").write_text(text, encoding="utf-8")

    def compare(*losses):
        folders = [tmp_path / str(i) for i in range(len(losses))]
        for folder, values in zip(folders, losses, strict=True):
            Path(folder).mkdir(exist_ok=True)
            lines = "".join(json.dumps({"loss": value}) + "\n" for value in values)
            (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        return subprocess.run([sys.executable, tmp_path / "losses.py", *folders], capture_output=True).returncode

    assert compare([3.0, 2.0], [3.001, 2.0]) == 0
    assert compare([3.0, 2.0], [3.0, 2.01]) == 1
    assert compare([3.0, 2.0], [3.0]) == 1
