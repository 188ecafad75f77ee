"""C++ is compiled once and kept for its user alone; each thing that can go wrong is one line that says what."""

import os
import stat
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import native  # noqa: E402

load = native.load.__wrapped__  # it remembers nothing


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache. -> its folder"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minichat"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_file_is_compiled_once_and_read_again(source, cache, monkeypatch, capsys):
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    library, why = load(source)
    assert library.answer() == 42 and why == ""
    assert "compiling source.cpp" in capsys.readouterr().err
    monkeypatch.setattr(native.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert load(source)[0].answer() == 42
    assert capsys.readouterr().err == "" and len(list(cache.iterdir())) == 1


def test_without_a_compiler_it_says_what_to_install(source, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert load(source) == (None, "no C++ compiler: apt install g++")


@pytest.mark.parametrize("text, reason", [
    ("echo cannot find crtbegin >&2; echo more >&2; exit 1", "does not compile source.cpp: cannot find crtbegin"),
    ("exit 3", "does not compile source.cpp: no message"),
    ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "source_"),  # of the loader, which names the file
])
def test_a_compiler_that_fails_is_one_reason(text, reason, source, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(write_program(tmp_path / "cxx", text)))
    library, why = load(source)
    assert library is None and reason in why and "\n" not in why
    assert not [p for p in cache.iterdir() if not p.name.startswith("source_")], "nothing is left"


def test_a_cache_that_cannot_be_written_is_one_reason(source, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    library, why = load(source)
    assert library is None and "a file" in why and "\n" not in why


@pytest.mark.parametrize("attribute, value", [("platform", "win32"), ("byteorder", "big")])
def test_a_system_that_the_code_is_not_written_for_is_one_reason(source, attribute, value, monkeypatch):
    monkeypatch.setattr(native.sys, attribute, value)
    library, why = load(source)
    assert library is None and why.startswith("source.cpp is not written for ")


def test_only_its_user_may_write_to_the_cache(cache):
    assert native.cache_folder() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_processes_that_compile_at_once_leave_one_library(source, tmp_path, monkeypatch):
    """A compiler that waits until two of it run."""
    program = write_program(tmp_path / "cxx", f"""
        touch {tmp_path}/running.$$
        for i in $(seq 1000); do [ $(ls {tmp_path}/running.* | wc -l) -lt 2 ] || break; sleep 0.01; done
        while [ "$1" != -o ]; do shift; done
        echo $$ > "$2" """)
    monkeypatch.setenv("CXX", str(program))
    folder = tmp_path / "libraries"
    folder.mkdir()
    made = []
    threads = [threading.Thread(target=lambda: made.append(native.build(source, folder))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] == made[1] and os.listdir(folder) == [made[0].name]
    assert native.build(source, folder) == made[0]
    assert len(list(tmp_path.glob("running.*"))) == 2, "compiled again"


def test_another_cpu_compiler_or_source_gives_another_library(source, tmp_path, monkeypatch):
    program = write_program(tmp_path / "cxx", 'while [ "$1" != -o ]; do shift; done; touch "$2"')
    monkeypatch.setenv("CXX", str(program))
    names = {native.build(source, tmp_path).name}
    monkeypatch.setattr(native, "cpu_features", lambda: "flags: fpu vme avx512_vnni")
    names.add(native.build(source, tmp_path).name)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    names.add(native.build(source, tmp_path).name)
    source.write_text("int x;")
    names.add(native.build(source, tmp_path).name)
    monkeypatch.setenv("CXX", str(write_program(tmp_path / "cxx2", program.read_text().partition("\n")[2])))
    names.add(native.build(source, tmp_path).name)
    assert len(names) == 5
