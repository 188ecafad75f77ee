"""A user's text as a dataset: any tokenizer, one file or many, and where GPT-2's ranks come from."""

import io
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_pipeline import manifest
from test_reading import write_corpus
from test_tokenizer import BPE, RANKS, needs_ranks

import sources
from common import BESIDE
from dataset import Tokens
from files import sha256
from reading import ENDINGS
from tokenizer import CharTokenizer, load_tokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "text" / "prepare.py"
TEXT = "the thé 🙂 the end\n" * 30


@pytest.fixture
def prepare(tmp_path):
    """prepare(**settings) -> CompletedProcess, with no mirror and an empty cache."""

    def prepare(env=None, **settings):
        words = [f"--{key}={value}" for key, value in {"out_dir": tmp_path / "made", **settings}.items()]
        environment = {key: value for key, value in os.environ.items() if key != "MINICHAT_MIRROR"}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "LOCALAPPDATA": str(tmp_path / "cache")}
        environment |= env or {}
        return subprocess.run(
            [sys.executable, SCRIPT, *words], env=environment, capture_output=True, encoding="utf-8", cwd=tmp_path
        )

    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    BPE.save(tmp_path / "bpe.json")
    return prepare


def stream(folder, split):
    tokens = Tokens(folder, split)
    return tokens.read(np.array([0]), len(tokens))[0].tolist()


def test_one_file(prepare, tmp_path):
    """It is cut by characters before anything is encoded, as nanoGPT does."""
    for tokenizer in (tmp_path / "bpe.json", "char"):
        done = prepare(input="text.txt", tokenizer=tokenizer)
        assert done.returncode == 0, done.stderr
        made = load_tokenizer(tmp_path / "made")
        cut = int(len(TEXT) * 0.9)
        assert made.decode(stream(tmp_path / "made", "train")) == TEXT[:cut]
        assert made.decode(stream(tmp_path / "made", "val")) == TEXT[cut:]
    assert "already there, unchanged" in prepare(input="text.txt", tokenizer="char").stdout
    assert "already there" in prepare(input="text.txt", tokenizer="made").stdout  # a folder's own


def test_documents_of_a_folder_end(prepare, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("the second", encoding="utf-8")
    (folder / "a.txt").write_text(f"the {BESIDE} <|endoftext|>", encoding="utf-8")
    done = prepare(input="texts", tokenizer=tmp_path / "bpe.json", val_fraction=0.2)
    assert done.returncode == 0, done.stderr
    ids = stream(tmp_path / "made", "train") + stream(tmp_path / "made", "val")
    first = BPE.encode(f"the {BESIDE} <|endoftext|>")
    assert ids == [*first, BPE.eos, *BPE.encode("the second"), BPE.eos] and BPE.eos not in first


@pytest.mark.parametrize("ending", ENDINGS)
def test_any_kind_of_file(ending, prepare, tmp_path):
    """A packed .txt is one text as it is, any other file has documents; a folder may hold all kinds."""
    texts = ["the first", "the <|endoftext|> second 🙂", "the third"]
    path = write_corpus(tmp_path, texts, ending)
    done = prepare(input=path.name, tokenizer=tmp_path / "bpe.json", val_fraction=0.3)
    assert done.returncode == 0, done.stderr
    ids = stream(tmp_path / "made", "train") + stream(tmp_path / "made", "val")
    if ending.startswith(".txt"):
        assert BPE.decode(ids) == "".join(f"<|endoftext|>\n{text}\n" for text in texts).removeprefix("<|endoftext|>\n")
    else:
        assert ids == [i for text in texts for i in [*BPE.encode(text), BPE.eos]]
    (tmp_path / "all").mkdir()
    path.rename(tmp_path / "all" / path.name)
    (tmp_path / "all" / "z.txt").write_text("the last", encoding="utf-8")
    done = prepare(input="all", tokenizer=tmp_path / "bpe.json", out_dir=tmp_path / "both", val_fraction=0.3)
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path / "both")["documents"]["kept"] == (2 if ending.startswith(".txt") else 4)


def test_documents_without_text_are_counted_and_what_is_damaged_is_named(prepare, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "the one"}\n{"body": ""}\n{"text": "x"}\nno\n{"body": "the two"}\n')
    assert prepare(input="a.jsonl", tokenizer=tmp_path / "bpe.json", text_key="body", val_fraction=0.5).returncode == 0
    found = manifest(tmp_path / "made")["documents"]
    assert found == {"read": 5, "kept": 2, "changed": 0, "dropped": {"empty": 1, "no_text": 1, "bad_json": 1}}
    for name, raw, named in (("b.jsonl.gz", b"\x1f\x8bno", "damaged"), ("c.parquet", b"PAR1", "damaged"),
                             ("d.txt.gz", b"no", "damaged"), ("e.jsonl", b'{"text": "\xff"}', "not UTF-8"),
                             ("f.jsonl", b"{}\n", "no text")):
        (tmp_path / name).write_bytes(raw)
        done = prepare(input=name, tokenizer=tmp_path / "bpe.json", out_dir=tmp_path / "no")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and name in done.stderr and named in done.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "settings, named",
    [
        ({}, "--input is missing"),
        ({"input": "none.txt"}, "there is no such file or folder"),
        ({"input": "text.txt", "tokenizer": "gtp2"}, "tokenizer=gtp2 is neither gpt2 nor char"),
        ({"input": "text.txt", "tokenizer": "text.txt"}, "not a tokenizer that can be used"),
        ({"input": "text.txt", "tokenizer": "char", "val_fraction": 1.5}, "val_fraction="),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(settings, named, prepare, tmp_path):
    done = prepare(**settings)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr
    assert not (tmp_path / "made").exists()


def test_what_cannot_be_encoded_is_named_with_its_document(prepare, tmp_path):
    """Several documents: by number and beginning. A single text: by the place in it."""
    CharTokenizer("abc ").save(tmp_path / "abc.json")
    (tmp_path / "many.jsonl").write_text('{"text": "abc"}\n{"text": ""}\n{"text": "cab x"}\n')
    done = prepare(input="many.jsonl", tokenizer=tmp_path / "abc.json")
    assert done.returncode == 2 and "many.jsonl, document 2 of 2 ('cab x'): cannot encode 'x'" in done.stderr
    for place in (3, 97):
        (tmp_path / "one.txt").write_text("a" * place + "y" + "b" * (99 - place))
        done = prepare(input="one.txt", tokenizer=tmp_path / "abc.json")
        assert done.returncode == 2 and f"one.txt: cannot encode 'y' (U+0079) at position {place}:" in done.stderr


@pytest.mark.parametrize("name", ["a b", "it's", "$HOME"])
def test_the_next_command_can_be_pasted(name, prepare, tmp_path):
    done = prepare(input="text.txt", tokenizer="char", out_dir=name)
    command = done.stdout.strip().rpartition("next: ")[2].partition(" (and ")[0]
    assert shlex.split(command) == ["python", "train.py", f"--dataset={name}"], done.stderr


def test_half_a_character_does_not_stop_a_prepare(prepare, tmp_path):
    (tmp_path / "x.jsonl").write_text(r'{"text": "the \udc80 end"}' + "\n" + r'{"text": "the \ud83d"}' + "\n" * 3)
    for tokenizer in (tmp_path / "bpe.json", "char"):
        done = prepare(input="x.jsonl", tokenizer=tokenizer, val_fraction=0.3, out_dir=tmp_path / "made")
        assert done.returncode == 0 and "x.jsonl: half a character" in done.stderr, done.stderr
        assert manifest(tmp_path / "made")["documents"]["changed"] == 2
        text = load_tokenizer(tmp_path / "made").decode(
            stream(tmp_path / "made", "train") + stream(tmp_path / "made", "val"))
        assert text == "the \ufffd endthe \ufffd"


def test_ranks_come_from_the_address_or_else_a_package(monkeypatch, tmp_path, capsys):
    ranks = b"the ranks"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in (("x-1/other", b"no"), ("x-1/whisper/assets/gpt2.tiktoken", ranks)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(sources, "RANKS_SHA256", sha256(ranks))
    monkeypatch.setattr(sources, "download_package", lambda *args: archive.getvalue())
    monkeypatch.setattr(sources, "download_url", lambda url: ranks)
    assert sources.download_ranks() == ranks and capsys.readouterr().out == ""
    monkeypatch.setattr(sources, "download_url", lambda url: b"<html>please log in")
    assert sources.download_ranks() == ranks and "another file; trying" in capsys.readouterr().out

    def unreachable(*args):
        raise OSError("stubbed away")

    monkeypatch.setattr(sources, "download_url", unreachable)
    assert sources.download_ranks() == ranks and "stubbed away; trying" in capsys.readouterr().out
    monkeypatch.setattr(sources, "download_package", unreachable)
    monkeypatch.delenv("MINICHAT_MIRROR", raising=False)
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(sources.SourceError, match="stubbed away"):
        sources.gpt2_tokenizer()


def test_ranks_that_are_not_to_be_had(prepare, tmp_path):
    nothing = {"https_proxy": "http://127.0.0.1:9", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = prepare(nothing, input="text.txt")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "GPT-2's ranks" in done.stderr and "MINICHAT_MIRROR" in done.stderr and not (tmp_path / "made").exists()


@needs_ranks
def test_gpt2_from_the_mirror_trains_and_samples(tmp_path, run_script):
    """Through every script: GPT-2's vocabulary, a few steps, and text of whole characters."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 5, encoding="utf-8")
    made, out = tmp_path / "made", tmp_path / "out"
    done = run_script("data/text/prepare.py", f"--input={text}", f"--out_dir={made}", MINICHAT_MIRROR=str(RANKS.parent))
    assert done.returncode == 0, done.stderr
    sizes = ["--block_size=16", "--n_layer=1", "--n_head=1", "--n_embd=16", "--batch_size=2", "--max_iters=2"]
    done = run_script("train.py", f"--dataset={made}", f"--out_dir={out}", "--device=cpu", "--eval_iters=1", *sizes)
    assert done.returncode == 0 and "bits/token" in done.stdout, done.stderr
    done = run_script("sample.py", f"--out_dir={out}", "--start=the", "--num_samples=1", "--max_new_tokens=5")
    assert done.returncode == 0 and done.stdout.startswith("the"), done.stderr


@needs_ranks
def test_shakespeare_is_nanogpts(tmp_path, run_script):
    done = run_script("data/shakespeare/prepare.py", f"--out_dir={tmp_path}", MINICHAT_MIRROR=str(RANKS.parent))
    assert done.returncode == 0, done.stderr
    assert [len(Tokens(tmp_path, split)) for split in ("train", "val")] == [301_966, 36_059]
    tokenizer = load_tokenizer(tmp_path)
    text = tokenizer.decode(stream(tmp_path, "train") + stream(tmp_path, "val"))
    assert text == (RANKS.parent / "tinyshakespeare.txt").read_text(encoding="utf-8")


@needs_ranks
def test_shakespeare_has_a_bpe_of_its_own(tmp_path, run_script):
    """It is learned from the training part alone, is the same at every call, and gives the text back."""
    pytest.importorskip("rustbpe")
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        done = run_script("data/shakespeare_bpe/prepare.py", f"--out_dir={folder}", MINICHAT_MIRROR=str(RANKS.parent))
        assert done.returncode == 0, done.stderr
        made.append((folder / "manifest.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path / "a")
    text = tokenizer.decode(stream(tmp_path / "a", "train") + stream(tmp_path / "a", "val"))
    assert text == (RANKS.parent / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert tokenizer.vocab_size == 1024 and made[0] == made[1]
