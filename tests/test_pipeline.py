"""A corpus to a dataset: the same bytes however it is read, divided or interrupted; one line for each mistake."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from test_reading import write_corpus
from test_tokenizer import BPE, RANKS, needs_ranks

from configurator import Settings, configure, read_keys
from dataset import Tokens
from reading import InputFile, read_chunks
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")

# openwebtext/prepare.py with small chunks: the first argument is their size
DRIVER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "data")!r}]
import common, scan
from configurator import Settings, configure
from openwebtext import prepare
if __name__ == "__main__":
    scan.CHUNK = int(sys.argv.pop(1))
    common.run(prepare.main, Settings(configure(vars(prepare))))
"""


def documents(n, seed=1):
    """Texts of made-up words; the last fifth are copies of earlier ones, as they stand or with one word changed."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghij é", k=rng.randint(2, 9))) for _ in range(2000)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(60, 200))) for _ in range(n * 4 // 5)]
    for i, text in enumerate(rng.sample(texts[: n // 2], n - len(texts))):
        texts.append(text if i % 2 else text + " more")
    return texts


@pytest.fixture
def prepare(tmp_path):
    """prepare(corpus, *more, chunk=...) runs it in a process of its own. -> CompletedProcess"""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER, encoding="utf-8")
    BPE.save(tmp_path / "bpe.json")

    def command(corpus, *more, chunk=20_000, out="out"):
        words = [f"--input={corpus}"] * (corpus is not None) + [f"--out_dir={tmp_path / out}", *more]
        defaults = [f"--tokenizer={tmp_path / 'bpe.json'}", "--val_fraction=0.2", "--min_chars=20", "--workers=1"]
        return [sys.executable, str(script), str(chunk), *defaults, *words]

    def prepare(corpus, *more, **keywords):
        done = subprocess.run(command(corpus, *more, **keywords), capture_output=True, encoding="utf-8", cwd=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    prepare.command = command
    return prepare


def files(folder):
    """name -> bytes of a finished dataset, which must be alone in its folder."""
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"
    }
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_in(folder, split):
    tokens, tokenizer = Tokens(folder, split), load_tokenizer(folder)
    ids = tokens.read(np.array([0]), len(tokens))[0]
    ends = np.flatnonzero(ids == tokenizer.eos)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(part) for part in np.split(ids, ends[:-1] + 1)]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_bytes())


def test_documents_come_out_in_order_once_and_in_the_split_of_their_hash(prepare, tmp_path, run_script):
    texts = documents(100)
    done = prepare(write_corpus(tmp_path, texts, ".jsonl"))
    assert done.returncode == 0, done.stderr
    train, val = (texts_in(tmp_path / "out", split) for split in ("train", "val"))
    assert train == [text for text in texts[:80] if text in train]
    assert val == [text for text in texts[:80] if text in val]
    assert sorted(train + val) == sorted(texts[:80]) and 5 < len(val) < 30
    found = manifest(tmp_path / "out")["documents"]
    assert found["dropped"] == {"exact_duplicate": 10, "near_duplicate": 10} and found["read"] == 100
    assert found["kept"] == 80 and found["kept_bytes"] == sum(len(text.encode()) for text in texts[:80])
    done = run_script("data/verify.py", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    # read less, and in another order: no document changes its split
    assert prepare(write_corpus(tmp_path, texts[60:20:-1], ".jsonl"), out="less").returncode == 0
    assert set(texts_in(tmp_path / "less", "val")) == set(val) & set(texts[21:61])


@pytest.mark.parametrize("dedup, kept", [("none", 100), ("exact", 90), ("near", 80)])
def test_dedup(dedup, kept, prepare, tmp_path):
    done = prepare(write_corpus(tmp_path, documents(100), ".jsonl"), f"--dedup={dedup}")
    assert done.returncode == 0 and manifest(tmp_path / "out")["documents"]["kept"] == kept
    assert ("rensa" in manifest(tmp_path / "out")["preprocessing"]) == (dedup == "near")


def test_every_format_and_any_chunk_give_the_same_shards(prepare, tmp_path):
    texts = documents(60)
    made = {}
    for i, ending in enumerate((".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".parquet")):
        folder = tmp_path / f"in{i}"
        folder.mkdir()
        done = prepare(write_corpus(folder, texts, ending), chunk=(10**4, 3333, 10**6)[i % 3], out=str(i))
        assert done.returncode == 0, done.stderr
        made[ending] = files(tmp_path / str(i))
        made[ending].pop("manifest.json")
    assert all(found == made[".jsonl"] for found in made.values())


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5])
def test_workers_chunks_and_parts_change_nothing(count, prepare, tmp_path):
    """One file divided by chunks, or five by files; also parts out of order, and a missing one."""
    corpus, texts = tmp_path / "corpus", documents(100)
    for i in range(count):
        (corpus / str(i)).mkdir(parents=True)
        write_corpus(corpus / str(i), texts[i::count], (".jsonl", ".jsonl.gz")[i % 2])
    assert prepare(corpus, out="whole").returncode == 0
    whole = files(tmp_path / "whole")
    for i, more in enumerate((["--workers=2"], ["--workers=3"])):
        assert prepare(corpus, *more, chunk=7000 + i, out=f"w{i}").returncode == 0
        assert files(tmp_path / f"w{i}") == whole
    for parts in (1, 2, 4):
        out = f"parts{parts}"
        for part in reversed(range(1, parts)):
            assert prepare(corpus, f"--part={part}/{parts}", out=out).returncode == 0
        done = prepare(corpus, "--merge", out=out)
        assert done.returncode == 2 and "not wholly scanned" in done.stderr
        assert not (tmp_path / out / "manifest.json").exists()
        assert prepare(corpus, f"--part=0/{parts}", out=out).returncode == 0
        assert prepare(corpus, "--merge", out=out).returncode == 0
        assert files(tmp_path / out) == whole


@posix
@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_bytes_are_the_same(prepare, tmp_path):
    """SIGKILL of the first process alone, at moments from its start to its end; its workers must notice."""
    corpus = write_corpus(tmp_path, documents(1500), ".jsonl.gz")
    began = time.monotonic()
    assert prepare(corpus, "--workers=2", out="whole").returncode == 0
    took = time.monotonic() - began
    whole, rng, stages = files(tmp_path / "whole"), random.Random(7), set()
    for i in range(20):
        out = tmp_path / f"k{i // 4}"  # each is killed four times, and then ends
        process = subprocess.Popen(prepare.command(corpus, "--workers=2", out=out.name), stdout=subprocess.DEVNULL)
        if i:
            time.sleep(rng.uniform(0.1, 1.1) * took)
        while not i and not list(out.glob("**/scan/*")):  # the first one as soon as it scans, on however slow a machine
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        names = {path.name for path in out.glob("**/*")}
        stages.add("nothing" if not names else "scanning" if "scan" in names and "fate.npy" not in names else "later")
        if i % 4 == 3:
            done = prepare(corpus, "--workers=2", out=out.name)
            assert done.returncode == 0, done.stderr
            assert files(out) == whole
    assert "scanning" in stages


@pytest.mark.slow
@posix
def test_killed_between_the_passes(prepare, tmp_path):
    """After any file: one of the scan, the decision, a shard; and in the middle of tidying up."""
    corpus = write_corpus(tmp_path, documents(100), ".jsonl")
    assert prepare(corpus, out="whole").returncode == 0
    whole = files(tmp_path / "whole")
    killer = (tmp_path / "driver.py").read_text(encoding="utf-8").replace("    common.run(", """
    import os, shutil
    count, last = 0, int(os.environ["LAST"])
    def deadly(call):
        def wrapper(*arguments, **keywords):
            global count
            count += 1
            if count > last:
                os.kill(os.getpid(), 9)
            return call(*arguments, **keywords)
        return wrapper
    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    common.run(""")
    (tmp_path / "killer.py").write_text(killer, encoding="utf-8")
    command = prepare.command(corpus, "--workers=1", out="out")
    command[1] = str(tmp_path / "killer.py")
    codes = []
    for last in range(0, 200, 3):
        done = subprocess.run(command, env={**os.environ, "LAST": str(last)}, capture_output=True, cwd=tmp_path)
        codes.append(done.returncode)
        if done.returncode == 0:
            break
        if last % 2:  # else the next process resumes where this one was killed
            assert prepare(corpus).returncode == 0 and files(tmp_path / "out") == whole
            subprocess.run(["rm", "-r", tmp_path / "out"], check=True)
    assert codes[-1] == 0 and len(codes) > 5 and set(codes[:-1]) == {-9}
    assert files(tmp_path / "out") == whole


def test_once_done_it_is_left_alone_and_other_settings_are_not_mixed_in(prepare, tmp_path):
    corpus = write_corpus(tmp_path, documents(60), ".jsonl")
    assert prepare(corpus).returncode == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "already there, unchanged" in prepare(corpus).stdout
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert "already there, unchanged" in prepare(corpus, "--fresh").stdout  # found by doing it again
    assert prepare(corpus, "--min_chars=700").returncode == 0
    assert manifest(tmp_path / "out")["preprocessing"]["min_chars"] == 700

    assert prepare(corpus, "--part=0/2", out="half").returncode == 0
    done = prepare(corpus, "--min_chars=30", out="half")
    assert done.returncode == 2 and "min_chars=20" in done.stderr and "--fresh" in done.stderr
    assert prepare(corpus, "--min_chars=30", "--fresh", out="half").returncode == 0
    assert prepare(corpus, "--min_chars=30", out="new").returncode == 0
    assert files(tmp_path / "half") == files(tmp_path / "new")


def test_documents_that_cannot_be_used_are_counted_and_the_run_goes_on(prepare, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    good = documents(40)[:32]
    lines = [json.dumps({"text": text}).encode() for text in good]
    lines += [b"no json", b'{"body": "x"}', b'{"text": "short"}', b'{"text": "' + b"x" * 9_000_000 + b'"}', b"", b"   ",
              b'{"text": "caf\xe9 ' + b"latin " * 20 + b'"}', b'{"text": "' + b"long " * 50_000 + b'"}']
    (corpus / "a.jsonl").write_bytes(b"\n".join(lines))
    (corpus / "b.txt").write_bytes(b"")
    (corpus / "c.parquet").write_bytes(b"PAR1 cut off")
    write_corpus(corpus, documents(200, seed=2)[:160], ".jsonl.gz")
    cut = (corpus / "corpus.jsonl.gz").read_bytes()
    (corpus / "corpus.jsonl.gz").write_bytes(cut[: len(cut) // 2])
    done = prepare(corpus, "--max_chars=100000")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning:") == 2 and "c.parquet" in done.stderr and "corpus.jsonl.gz" in done.stderr
    found = manifest(tmp_path / "out")["documents"]
    assert found["dropped"] == {"bad_json": 1, "no_text": 1, "too_short": 1, "too_long": 2, "exact_duplicate": 0,
                                "near_duplicate": 0}
    assert found["changes"]["utf8"] == 1 and set(found["damaged_files"]) == {"c.parquet", "corpus.jsonl.gz"}
    assert found["kept"] == found["read"] - 5 > 33
    kept = texts_in(tmp_path / "out", "train") + texts_in(tmp_path / "out", "val")
    assert set(good) < set(kept) and any(text.startswith("caf\ufffd") for text in kept)


@pytest.mark.parametrize(
    "content, more, named",
    [
        ("", [], "the files are empty"),
        ('{"body": "x"}\n', [], "1 no_text; --text_key names another key than 'text'"),
        ('{"text": "x"}\n', [], "1 too_short"),
        ('{"text": "long enough to be one document"}\n', [], "split would have 0 of at least 2 tokens"),
        ("x", ["--val_fraction=1"], "val_fraction="),
        ("x", ["--dedup=fuzzy"], "near, exact or none"),
        ("x", ["--threshold=0"], "threshold"),
        ("x", ["--part=4/4"], "the last is --part=3/4"),
        ("x", ["--part=1/2", "--merge"], "--part scans its share"),
        ("x", ["--tokenizer=char"], "data/text/prepare.py"),
        ("x", ["--max_chars=5"], "max_chars at least min_chars"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_made(content, more, named, prepare, tmp_path):
    (tmp_path / "corpus.jsonl").write_text(content)
    done = prepare("corpus.jsonl", *more)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_vocabulary_that_does_not_fit_is_refused(prepare, tmp_path):
    fields = json.loads(BPE.to_json())
    (tmp_path / "big.json").write_text(json.dumps(fields | {"specials": [f"<{i}>" for i in range(65_300)]}))
    corpus = write_corpus(tmp_path, documents(20), ".jsonl")
    done = prepare(corpus, f"--tokenizer={tmp_path / 'big.json'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "65,536" in done.stderr
    assert not (tmp_path / "out").exists()


@posix
@pytest.mark.parametrize("workers", [1, 2])
def test_no_space_is_one_line_and_the_same_command_goes_on(workers, prepare, tmp_path):
    """A limit on the size of a file stands for a full disk: it shows in write() the same way."""
    corpus = write_corpus(tmp_path, documents(200), ".jsonl")
    script = (tmp_path / "driver.py").read_text(encoding="utf-8")
    limit = "    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n    common.run("
    (tmp_path / "small.py").write_text(script.replace("    common.run(", limit), encoding="utf-8")
    command = prepare.command(corpus, f"--workers={workers}")
    command[1] = str(tmp_path / "small.py")
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert str(tmp_path / "out") in done.stderr and "File too large" in done.stderr
    assert prepare(corpus).returncode == 0 and prepare(corpus, out="whole").returncode == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_a_scan_left_damaged_is_found_and_done_again(prepare, tmp_path):
    corpus = write_corpus(tmp_path, documents(100), ".jsonl")
    assert prepare(corpus, "--part=0/1").returncode == 0
    chunk = sorted((tmp_path / "out" / "scan").glob("*.npz"))[1]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    done = prepare(corpus, "--merge")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and chunk.name in done.stderr
    assert prepare(corpus).returncode == 0 and prepare(corpus, out="whole").returncode == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_hub_is_streamed_and_its_commit_recorded(tmp_path, monkeypatch, capsys):
    """Against the library's own stream of local parquet files, which is the Hub's except for the network."""
    import huggingface_hub

    import common
    import scan
    from openwebtext import prepare

    for i, part in enumerate((documents(100)[:50], documents(100)[50:])):
        (tmp_path / str(i)).mkdir()
        write_corpus(tmp_path / str(i), part, ".parquet")
    asked, load = [], datasets.load_dataset

    def local(name, configuration, split, streaming, revision):
        asked.append((name, configuration, split, streaming, revision))
        return load("parquet", data_files=[str(tmp_path / f"{i}/corpus.parquet") for i in (0, 1)], split=split,
                    streaming=streaming)

    class Hub:
        def dataset_info(self, name, revision=None):
            if name == "gone":
                raise OSError("no\nnetwork")
            return type("Info", (), {"sha": "a" * 40})

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(scan, "CHUNK", 9000)
    BPE.save(tmp_path / "bpe.json")
    words = ["--hub=some/corpus", "--val_fraction=0.2", "--min_chars=20", "--workers=1"]
    words += [f"--tokenizer={tmp_path / 'bpe.json'}"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *words, *more])
        try:
            common.run(prepare.main, Settings(configure(dict(vars(prepare)))))
        except SystemExit as end:
            return end.code
        return 0

    assert run(f"--out_dir={tmp_path / 'hub'}", "--hub_name=small") == 0
    assert asked == [("some/corpus", "small", "train", True, "a" * 40)]
    made = manifest(tmp_path / "hub")
    assert {"name": "some/corpus", "configuration": "small", "revision": "a" * 40}.items() <= made["source"].items()
    assert run(f"--out_dir={tmp_path / 'file'}", f"--input={write_corpus(tmp_path, documents(100), '.jsonl')}") == 0
    assert made["splits"] == manifest(tmp_path / "file")["splits"]
    capsys.readouterr()
    assert run(f"--out_dir={tmp_path / 'no'}", "--hub=gone") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "no network" in line and "--input=FOLDER" in line


def test_a_hub_that_breaks_off_is_no_end_of_the_corpus(capsys):
    def rows():
        yield {"text": "x" * 10}
        raise ConnectionError("timed\nout")

    file = InputFile("shard 1 of 2", rows=rows())
    with pytest.raises(SystemExit) as end:
        list(read_chunks(file, lambda i: True, 100, "text", 100))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and "shard 1 of 2" in line and "resumes" in line
    assert file.fault is None and not file.chunks


def test_fineweb_has_the_keys_and_a_corpus_and_folder_of_its_own(run_script, monkeypatch):
    done = run_script("data/fineweb/prepare.py", "--help")
    assert done.returncode == 0 and "--hub=HuggingFaceFW/fineweb-edu" in done.stdout
    assert "--hub_name=sample-10BT" in done.stdout
    ours, other = (read_keys(ROOT / "data" / name / "prepare.py") for name in ("fineweb", "openwebtext"))
    assert list(ours) == list(other)
    assert [name for name in ours if ours[name] != other[name]] == ["hub", "hub_name"]

    from fineweb import prepare

    folders = []
    monkeypatch.setattr(prepare, "prepare_corpus", lambda c, default_folder: folders.append(default_folder))
    prepare.main(Settings(configure(dict(vars(prepare)), [])))
    assert folders == [ROOT / "data" / "fineweb"]


@needs_ranks
@pytest.mark.slow
def test_real_documents_and_the_owt_config(tmp_path, run_script):
    """512 real documents of many languages, with GPT-2's tokens, as config/owt_124m.py would take them."""
    made, out = tmp_path / "made", tmp_path / "out"
    mirror = {"MINICHAT_MIRROR": str(RANKS.parent)}
    corpus = RANKS.parent / "documents.jsonl.gz"
    done = run_script("data/openwebtext/prepare.py", f"--input={corpus}", f"--out_dir={made}", "--val_fraction=0.05",
                      **mirror)
    assert done.returncode == 0, done.stderr
    found = manifest(made)["documents"]
    assert found["read"] == 512 and found["dropped"] == {"exact_duplicate": 0, "near_duplicate": 5, "too_short": 1}
    done = run_script("train.py", ROOT / "config" / "owt_124m.py", "--max_iters=1", "--device=cpu", "--batch_size=1",
                      "--gradient_accumulation_steps=2", f"--dataset={made}", f"--out_dir={out}", "--eval_iters=1",
                      "--block_size=128",
                      "--n_layer=1", "--n_embd=96", "--n_head=2", "--compile=false")
    assert done.returncode == 0, done.stderr
