"""data/chatterbot/prepare.py: talks of a package's YAML become rows, from a small wheel in its place."""

import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest
from test_chats import talks_of

from configurator import Settings, configure
from conversation import add_template
from tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
YAML = """categories:
- numbers
conversations:
- - What is two?
  - 2
- - Hello
  - Hi
  - How are you?
  - Well.
- - Hello
  - Hi
  - How are you?
  - Well.
- - Nobody answers
- - Long?
  - {long}
"""


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """corpus(*arguments) -> exit code of the script, with a wheel of YAML."""
    pytest.importorskip("yaml")
    spec = importlib.util.spec_from_file_location("chatterbot", ROOT / "data" / "chatterbot" / "prepare.py")
    monkeypatch.setattr(sys, "path", sys.path[:])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wheel = tmp_path / module.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("chatterbot_corpus/data/english/b.yml", YAML.format(long="x" * 300))
        archive.writestr("chatterbot_corpus/data/english/a.yml", "conversations:\n- - Me first?\n  - Yes\n")
        german = "conversations:\n- - Ja?\n  - Ja\n- - Nein?\n  - Nein\n"
        archive.writestr("chatterbot_corpus/data/german/a.yml", german)
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("MINICHAT_MIRROR", str(tmp_path))
    tokenizer = tmp_path / "tokenizer.json"
    add_template(CharTokenizer("".join(map(chr, range(32, 127)))), "minichat").save(tokenizer)

    def run(**settings):
        keys = {"tokenizer": tokenizer, "out_dir": tmp_path / "out", "block_size": 64, "val_fraction": 0.5, **settings}
        monkeypatch.setattr(sys, "argv", ["prepare.py", *(f"--{key}={value}" for key, value in keys.items())])
        try:
            module.common.run(module.main, Settings(configure(dict(vars(module)))))
            return 0
        except SystemExit as end:
            return end.code

    return run


def test_talks_become_rows(corpus, tmp_path, capsys):
    assert corpus() == 0
    said = capsys.readouterr().out
    assert "6 conversations read, 3 kept; dropped: 1 exact_duplicate, 1 no_answer, 1 too_long" in said
    texts = {tuple(message["content"] for message in talk) for talk in talks_of(tmp_path / "out")}
    assert texts == {("Me first?", "Yes"), ("What is two?", "2"), ("Hello", "Hi", "How are you?", "Well.")}
    assert {talk[0]["role"] for talk in talks_of(tmp_path / "out")} == {"user"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents"]["dropped"]["exact_duplicate"] == 1 and manifest["rows"]["block_size"] == 64


def test_another_language(corpus, tmp_path):
    assert corpus(language="german") == 0
    assert len(talks_of(tmp_path / "out")) == 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"language": "latin"}, "language=latin is not one of english, german"), ({"block_size": 3}, "block_size=3"),
    ({"tokenizer": "nowhere"}, "nowhere"),
])
def test_a_mistake_is_one_line(settings, message, corpus, tmp_path, capsys):
    assert corpus(**settings) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and not (tmp_path / "out").exists()
