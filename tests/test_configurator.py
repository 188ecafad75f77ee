"""Settings: which lines are keys, which value wins, what each type takes, and one line with the mend per mistake."""

import copy
import json
import math
import os
import pickle
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import Settings, configure, fail, read_file, read_keys, show  # noqa: E402
from keys import PATHS, RANGES, parse_text, range_error  # noqa: E402

SCRIPT = '''"""
Train a small model.
It is quick.

Second paragraph.
"""

import sys

sys.getrecursionlimit()
# -----------------------------------------------------------------------------
# what it writes
out_dir = "out"              # where checkpoints and "#1" metrics go
start = "\\n"                 # prompt, or FILE:path
max_iters = 600_000          # updates
                             # over the whole run
# model
# (as in GPT-2)
dropout = 0.0                # 0: none
gradient_accumulation_steps = 5 * 8  # micro-steps per update
weight_decay = -1e-1         # may be negative here
bias = True                  # of the linear layers
eval_only = False            # stop after the first evaluation
betas = (0.9, 0.95)          # AdamW's moments

compile: bool | None = None  # none: where it pays
top_k: int | None = 200      # none: all
tracker: str | None = None
temperature: float = 1       # an int that is a float
window: tuple[int, int] = (1, 2)
seeds = (1, 2, 3)
names = ("a", "b")
runs = ()                    # strings
_private = 3
CONSTANT = 4
here = str(1)
table = {"a": 1}
twice = also = 1
from_other = max_iters
for loop_variable in range(2):
    inside = 1
# -----------------------------------------------------------------------------


def main():
    pass


after = 1
'''
DEFAULTS = {
    "out_dir": "out",
    "start": "\n",
    "max_iters": 600_000,
    "dropout": 0.0,
    "gradient_accumulation_steps": 40,
    "weight_decay": -0.1,
    "bias": True,
    "eval_only": False,
    "betas": (0.9, 0.95),
    "compile": None,
    "top_k": 200,
    "tracker": None,
    "temperature": 1.0,
    "window": (1, 2),
    "seeds": (1, 2, 3),
    "names": ("a", "b"),
    "runs": (),
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(source=SCRIPT):
    Path("script.py").write_text(source, encoding="utf-8")
    return runpy.run_path("script.py", run_name="script")


def resolve(*argv, source=SCRIPT, **options):
    return configure(load(source), list(argv), **options)


def config_file(text, name="config.py"):
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


@pytest.fixture
def refused(capsys):
    """Runs configure, which must end in exit code 2 and one line on stderr, and write nothing; returns that line."""

    def run(*argv, source=SCRIPT, **options):
        namespace = load(source)
        before = dict(namespace)
        with pytest.raises(SystemExit) as stop:
            configure(namespace, list(argv), **options)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        assert namespace == before
        return err

    return run


def same(a, b):
    """Equal in value and type, down to the elements of tuples."""
    return a == b and repr(a) == repr(b)


# what is a key


def test_keys_are_the_plain_lines_in_source_order():
    result = resolve()
    assert type(result) is dict and list(result) == list(DEFAULTS)
    assert same(result, DEFAULTS)
    assert json.loads(json.dumps(result))["betas"] == [0.9, 0.95]


def test_result_is_written_back_and_nothing_else_is():
    namespace = load()
    before = dict(namespace)
    result = configure(namespace, ["--max_iters=5", "--temperature=2"])
    assert {name: namespace[name] for name in result} == result
    changed = {name for name in namespace if name not in before or not same(before[name], namespace[name])}
    assert changed == {"max_iters", "temperature"}


def test_default_is_the_value_at_the_call():
    source = "import sys\nworkers = 4  # processes\nif sys.version_info:\n    workers = 0\n"
    assert resolve(source=source) == {"workers": 0}
    assert read_keys("script.py")["workers"].default == 4  # without a namespace: what the source says


def test_other_calls_do_not_end_the_settings():
    assert resolve(source="a = 1\ndict(configure=1)\nprint = id\nprint(2)\nb = 2\n") == {"a": 1, "b": 2}


@pytest.mark.parametrize("end", ["def f(): pass", "class C: pass", "config = configure(globals(), [])"])
def test_settings_end_at_the_first_definition_or_at_the_call(end):
    namespace = load(f"from configurator import configure\nbatch_size = 8\n{end}\nbest = 1e9\n")
    assert configure(namespace, []) == {"batch_size": 8}


def test_what_was_set_is_known():
    """Even if it was set to its default, by a file or by the command line."""
    named, source = set(), "a = 1\nb = 2\nc = 3\nd = 4\nkind = ''\nruns: tuple[str, ...] = ()\n"
    words = (config_file("b = 2"), "--c=3", "train", "x")
    assert resolve(*words, source=source, verb="kind", verbs=("train",), paths="runs", given=named)["a"] == 1
    assert named == {"b", "c", "kind", "runs"}


@pytest.mark.parametrize("words, found", [
    ((), (64, None)),
    (("--gradient_accumulation_steps=4",), (0, 4)),                        # nanoGPT's key over the file
    (("--tokens_per_step=128",), (128, None)),
    (("--gradient_accumulation_steps=none",), (64, None)),                 # set to nothing, it overrides nothing
    (("--tokens_per_step=128", "--gradient_accumulation_steps=4"), (128, 4)),  # together they must agree
    (("steps.py",), (0, 8)),
    (("steps.py", "--tokens_per_step=128"), (128, None)),
], ids=str)
def test_of_two_ways_to_say_one_thing_the_later_one_wins(words, found):
    """The tokens of an update, in a config file of ours, in one of nanoGPT's, and on the command line."""
    source = "tokens_per_step = 0\ngradient_accumulation_steps: int | None = None\n"
    ours = config_file("tokens_per_step = 64", "ours.py")
    theirs = config_file("gradient_accumulation_steps = 8", "steps.py")
    words = [theirs if word == "steps.py" else word for word in words]
    named = set()
    values = resolve(ours, *words, source=source, given=named)
    assert (values["tokens_per_step"], values["gradient_accumulation_steps"]) == found
    assert ("tokens_per_step" in named) == bool(found[0])


def test_argv_is_the_command_line_unless_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--max_iters=7"])
    assert configure(load())["max_iters"] == 7
    assert configure(load(), [])["max_iters"] == 600_000


@pytest.mark.parametrize("line", ["x = None", "x: dict = 1", "x: int | str = 1", 'x = (1, "a")', "x: int = None"])
def test_a_setting_without_a_clear_type_is_named(refused, line):
    assert "script.py:1: x " in refused(source=line)


# what wins


def test_later_wins_in_the_order_of_the_command_line():
    one = config_file("max_iters = 1\ndropout = 0.1\nbias = False\n", "one.py")
    two = config_file("max_iters = 2\n", "two.py")
    assert resolve(one)["max_iters"] == 1
    assert resolve(one, two)["max_iters"] == 2
    assert resolve(two, one)["max_iters"] == 1
    assert resolve(one, "--max_iters=3", two)["max_iters"] == 2
    assert resolve("--max_iters=3", one)["max_iters"] == 1
    assert resolve(one, two, "--max_iters=3", "--max_iters", "4")["max_iters"] == 4
    result = resolve(one, two, "--dropout=0.2")
    assert (result["dropout"], result["bias"], result["out_dir"]) == (0.2, False, "out")


# what each type takes


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--max_iters=1000", 1000),
        ("--max_iters=1_000", 1000),
        ("--max_iters=1e6", 1_000_000),
        ("--max_iters=2.0", 2),
        ("--max_iters=-3", -3),
        ("--max_iters=9007199254740993", 2**53 + 1),
        ("--dropout=1", 1.0),
        ("--dropout=1e-4", 1e-4),
        ("--dropout=-.5", -0.5),
        ("--dropout=inf", math.inf),
        ("--start=a=b", "a=b"),
        ("--start=--max_iters=3", "--max_iters=3"),
        ("--start=two words\nand a line", "two words\nand a line"),
        ("--start= padded ", " padded "),
        ("--start=FILE:prompt.txt", "FILE:prompt.txt"),
        ("--start=123", "123"),
        ("--start='quoted'", "'quoted'"),
        ("--start=None", "None"),
        ("--start=true", "true"),
        ("--start=", ""),
        ("--out_dir=none", "none"),
        ("--tracker=none", None),
        ("--tracker=wandb", "wandb"),
        ("--top_k=none", None),
        ("--top_k=None", None),
        ("--top_k=5", 5),
        ("--compile=none", None),
        ("--compile=0", False),
        ("--compile", True),
        ("--eval_only", True),
        ("--temperature=0", 0.0),
        ("--betas=(0.9,0.99)", (0.9, 0.99)),
        ("--betas=0.9, 0.99", (0.9, 0.99)),
        ("--betas=[0.9, 0.99]", (0.9, 0.99)),
        ("--betas=0,1", (0.0, 1.0)),
        ("--window=3,1e3", (3, 1000)),
        ("--seeds=7", (7,)),
        ("--seeds=(7,)", (7,)),
        ("--seeds=-1,-2,-3,-4", (-1, -2, -3, -4)),
        ("--seeds=()", ()),
        ("--names=c", ("c",)),
        ("--names=('c', \"d\")", ("c", "d")),
        ("--names=1,none", ("1", "none")),
        ("--runs=1,b=2", ("1", "b=2")),
    ],
)
def test_value_from_the_command_line(argument, value):
    assert same(resolve(argument), DEFAULTS | {argument[2:].split("=")[0]: value})


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1", "yes", "Yes"])
def test_spellings_of_true_and_false(text):
    no = {"t": "false", "1": "0", "y": "no"}[text[0].lower()]
    no = no.upper() if text.isupper() else no.title() if text.istitle() else no
    assert resolve(f"--eval_only={text}")["eval_only"] is True
    assert resolve(f"--bias={no}")["bias"] is False


@pytest.mark.parametrize(
    "argument, takes",
    [
        ("--max_iters=abc", "a whole number"),
        ("--max_iters=1.5", "a whole number"),
        ("--max_iters=1e999", "a whole number"),
        ("--max_iters=", "a whole number"),
        ("--max_iters=none", "a whole number"),
        ("--max_iters=true", "a whole number"),
        ("--max_iters=1\n2", "a whole number"),
        ("--dropout=abc", "a number"),
        ("--dropout=", "a number"),
        ("--dropout=true", "a number"),
        ("--bias=maybe", "true or false"),
        ("--bias=2", "true or false"),
        ("--bias=", "true or false"),
        ("--bias=none", "true or false"),
        ("--compile=maybe", "true or false or none"),
        ("--top_k=many", "a whole number or none"),
        ("--betas=0.9,x", "such as 0.9,0.95"),
        ("--betas=", "such as 0.9,0.95"),
        ("--betas=(0.9,0.95", "such as 0.9,0.95"),
        ("--betas=0.9,,0.95", "such as 0.9,0.95"),
        ("--runs=", "such as ()"),
        ("--seeds=1,2.5", "such as 1,2,3"),
        ("--window=1", "tuple[int, int], such as 1,2"),
        ("--window=1,2,3", "tuple[int, int], such as 1,2"),
    ],
)
def test_wrong_value_on_the_command_line(refused, argument, takes):
    name, _, text = argument[2:].partition("=")
    line = refused(argument)
    assert line.startswith(f"error: --{name}: {name} takes ") and takes in line and line.endswith(f", not {text!r}\n")


def test_value_in_the_next_word():
    result = resolve("--max_iters", "-5", "--weight_decay", "-1e-3", "--start", "a=b c", "--out_dir", "-", "--bias")
    expected = {"max_iters": -5, "weight_decay": -1e-3, "start": "a=b c", "out_dir": "-", "bias": True}
    assert same(result, DEFAULTS | expected)
    path = config_file("max_iters = 1\n", "one.py")
    assert resolve("--out_dir", path) == DEFAULTS | {"out_dir": path}  # a value, not a config file


def test_a_boolean_flag_never_eats_the_next_word(refused):
    path = config_file("max_iters = 1\n", "one.py")
    assert resolve("--eval_only", path) == DEFAULTS | {"eval_only": True, "max_iters": 1}
    assert resolve("--compile", path, "--bias=0") == DEFAULTS | {"compile": True, "max_iters": 1, "bias": False}
    assert resolve("--eval_only", "x", paths="runs") == DEFAULTS | {"eval_only": True, "runs": ("x",)}
    for word in ("False", "true", "0"):
        line = refused("--compile", word)
        assert f"unexpected word {word!r}" in line and f"--key={word}" in line


@pytest.mark.parametrize("argv", [["--max_iters"], ["--max_iters", "--bias"], ["--start", "--bias"]])
def test_missing_value(refused, argv):
    assert f"{argv[0]} needs a value: {argv[0]}=VALUE" in refused(*argv)


def in_process(name, text):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "script.py")
        Path(path).write_text(SCRIPT, encoding="utf-8")
        return [configure({"__file__": path}, argv)[name] for argv in ([f"--{name}={text}"], [f"--{name}", text])]


@given(st.integers())
def test_round_trip_int(value):
    assert all(same(v, value) for v in in_process("max_iters", repr(value)))


@given(st.floats())
def test_round_trip_float(value):
    assert all(repr(v) == repr(value) for v in in_process("dropout", repr(value)))


@given(st.text().filter(lambda text: not text.startswith("--") and text != "-h"))
def test_round_trip_str(value):
    assert in_process("start", value) == [value, value]


@given(st.lists(st.floats(allow_nan=False)).map(tuple))
def test_round_trip_tuple(value):
    assert all(same(v, value) for v in in_process("betas", repr(value)))


WORDS = ["--bias", "--betas=", "--seeds", "--max_iters", "--top_k=none", "--start", "=", "-1", "()", "train", "x.py"]


@given(st.lists(st.sampled_from(WORDS) | st.text() | st.text().map("--".__add__)), st.booleans())
def test_any_command_line_resolves_or_is_refused(argv, bare):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "script.py")
        Path(path).write_text(SCRIPT, encoding="utf-8")
        try:
            result = configure({"__file__": path}, argv, paths="runs" if bare else "")
        except SystemExit as stop:
            assert stop.code == (0 if {"-h", "--help"} & set(argv) else 2)
        else:
            assert list(result) == list(DEFAULTS)


# ranges: by name, for the scripts of this project

PROJECT = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/*/*.py")]
           if path.name != "configurator.py" and "configure(globals()" in path.read_text(encoding="utf-8")]


def of_project(script, *argv):
    """The values of one of this project's scripts, which is not imported."""
    return configure({"__file__": str(ROOT / script)}, list(argv))


@pytest.fixture
def refused_by(capsys):
    def run(script, *argv):
        with pytest.raises(SystemExit) as stop:
            of_project(script, *argv)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize("path", PROJECT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_number_has_a_range_with_its_default_in_it(path):
    numbers = [key for key in read_keys(path).values() if re.search("int|float", key.kind)]
    assert all(RANGES.get(f"{path.stem}.{key.name}") or key.name in RANGES for key in numbers), path


def test_every_range_and_path_is_some_keys():
    """A renamed key would silently lose its range."""
    names = {name for path in PROJECT for key in read_keys(path) for name in (key, f"{path.stem}.{key}")}
    assert set(RANGES) <= names and PATHS <= names


@pytest.mark.parametrize("path", PROJECT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_number_is_nan_or_infinite_or_too_long(path, refused_by):
    for key in read_keys(path).values():
        for text in ("nan", "inf", "-inf") if "float" in key.kind else ():
            assert refused_by(path, f"--{key.name}={text}").startswith(f"{key.name}={text} must ")
        if "int" in key.kind:
            assert refused_by(path, f"--{key.name}={2**70}").startswith(f"{key.name}={2**70} must ")


@pytest.mark.parametrize("script, argument, must", [
    ("train.py", "learning_rate=0", "learning_rate=0.0 must be above 0"),
    ("train.py", "learning_rate=inf", "learning_rate=inf must be above 0 and finite"),
    ("train.py", "beta1=1", "beta1=1.0 must lie in [0, 1)"),
    ("train.py", "beta2=-0.5", "beta2=-0.5 must lie in [0, 1)"),
    ("train.py", "wsd_decay_frac=0", "wsd_decay_frac=0.0 must lie in (0, 1]"),
    ("train.py", "threads=1025", "threads=1025 must lie in [0, 1024]"),
    ("train.py", "seed=-1", "seed=-1 must be at least 0"),
    ("train.py", f"seed={2**63}", f"seed={2**63} must have at most 63 bits"),
    ("train.py", "block_size=0", "block_size=0 must be at least 1"),  # where eval.py's 0 is the model's own
    ("eval.py", "lengths=64,1", "lengths=64,1 must be at least 2"),
    ("eval.py", "depths=0.5,1.5", "depths=0.5,1.5 must lie in [0, 1]"),
    ("sample.py", "top_p=1.01", "top_p=1.01 must lie in (0, 1]"),
    ("plan.py", "reserve=1", "reserve=1.0 must lie in [0, 1)"),
    ("data/text/prepare.py", "val_fraction=0", "val_fraction=0.0 must lie in (0, 1)"),
])
def test_a_number_out_of_its_range_is_named(refused_by, script, argument, must):
    assert refused_by(script, f"--{argument}") == must


def test_a_range_holds_for_config_files_too_and_names_the_line(refused_by):
    assert refused_by("train.py", config_file("\nbeta1 = 2\n")) == "config.py:2: beta1=2.0 must lie in [0, 1)"
    assert of_project("eval.py", "--block_size=0", f"--seed={2**63 - 1}")["seed"] == 2**63 - 1


@given(st.floats() | st.integers(), st.sampled_from(sorted(set(RANGES.values()))))
def test_an_interval_is_what_mathematics_says(number, interval):
    least, most = map(float, interval[1:-1].split(","))
    within = least < number < most or number == least and interval[0] == "[" or number == most and interval[-1] == "]"
    assert bool(range_error(number, interval)) == (not within or isinstance(number, int) and number >= 2**63)


# paths


@pytest.mark.parametrize("script, key", [
    ("train.py", "out_dir"), ("train.py", "dataset"), ("train.py", "init_from"), ("sample.py", "out_dir"),
    ("eval.py", "prompts"), ("doctor.py", "out_dir"), ("data/text/prepare.py", "out_dir"),
    ("data/shakespeare/prepare.py", "out_dir"), ("report.py", "runs"), ("bench.py", "config"),
])
def test_an_empty_path_is_refused(refused_by, script, key):
    quoted = '""' if key == "runs" else ""  # nothing at all is no tuple
    assert refused_by(script, f"--{key}={quoted}") == f"--{key}= is empty: an unset variable?"


def test_the_home_folder(monkeypatch, refused_by, refused):
    monkeypatch.setenv("HOME", "/mine")
    assert of_project("train.py", "--out_dir=~/run")["out_dir"] == "/mine/run"
    assert of_project("train.py", "--out_dir", "~")["out_dir"] == "/mine"
    assert of_project("train.py", "--dataset=~/a:0.7,b:0.1,~/c:0.2")["dataset"] == "/mine/a:0.7,b:0.1,/mine/c:0.2"
    assert of_project("train.py", config_file("out_dir = '~/x'"))["out_dir"] == "/mine/x"
    assert of_project("report.py", "--runs=~/a,b~", "--html=~/p.html")["runs"] == ("/mine/a", "b~")
    assert of_project("sample.py", "--start=~ hello")["start"] == "~ hello"  # no path
    assert of_project("train.py", "--out_dir=./~x")["out_dir"] == "./~x"
    assert resolve("~/a", "c", source=BENCH, paths="runs")["runs"] == ("/mine/a", "c")
    assert "no config file /mine/no.py" in refused("~/no.py")
    assert "no home folder ~nobody-9" in refused_by("train.py", "--out_dir=~nobody-9/run")


# lists of strings


@pytest.mark.parametrize("text, parts", [
    ("\n", ("\n",)), ("\n\nUser:, END", ("\n\nUser:", "END")), ("a,\n", ("a", "\n")), ('" a "', (" a ",)),
    ("',',\";\"", (",", ";")), ('"x\n, y" , z', ("x\n, y", "z")), ('"say ""no"", he said"', ('say "no", he said',)),
    ("it's,don't", ("it's", "don't")), ('"', ('"',)), ("('a,b', 'c')", ("a,b", "c")), ('"a,b', ('"a', "b")),
    ('"("', ("(",)), ('""', ("",)),
])
def test_quotes_protect_commas_newlines_and_blanks(text, parts):
    assert parse_text("tuple[str, ...]", text) == parts


@given(st.lists(st.text() | st.text("\"', \n\\()[]a", max_size=4)).map(tuple))
def test_a_shown_tuple_of_strings_is_read_back(value):
    assert parse_text("tuple[str, ...]", show(value)) == value


@given(st.lists(st.integers()).map(tuple))
def test_a_shown_tuple_of_numbers_is_read_back(value):
    assert parse_text("tuple[int, ...]", show(value)) == value


# config files


def test_numpy_numbers_are_numbers():
    text = """
import numpy as np
max_iters = np.int64(3)
dropout = np.float32(0.5)
bias = np.bool_(False)
betas = (np.float64(0.25), 1)
seeds = np.arange(3)
"""
    expected = {"max_iters": 3, "dropout": 0.5, "bias": False, "betas": (0.25, 1.0), "seeds": (0, 1, 2)}
    assert same(resolve(config_file(text)), DEFAULTS | expected)


@pytest.mark.parametrize("line", ["max_iters = np.float32(0.5)", "bias = np.int64(1)", "dropout = np.bool_(True)"])
def test_a_numpy_number_of_another_type_is_refused(refused, line):
    assert " takes " in refused(config_file("import numpy as np\n" + line))


def test_names_in_capitals_and_imported_ones_are_no_mistyped_keys(refused):
    text = "from math import pi as tau, e\nfrom os.path import *\nfrom os import environ\n"
    path = config_file(text + "N_GPUS = 8\nPATHS_2 = ['a']\nmax_iters = 5 * N_GPUS\n")
    assert resolve(path) == DEFAULTS | {"max_iters": 40}
    assert "unknown key Max_Iters" in refused(config_file(text + "Max_Iters = 3"))
    assert "unknown key max_iter;" in refused(config_file(text + "max_iter = 3"))


def test_a_script_beside_train_py_ignores_the_keys_of_train_py(refused):
    """Even keys that a fork has added: a run is trained and sampled with the same config file."""
    Path("train.py").write_text("max_iters = 1\nforks_own = 'x'\n", encoding="utf-8")
    assert resolve(config_file("forks_own = 'y'\nsteps = 4"), source=BENCH)["steps"] == 4
    assert "unknown key forks_owm" in refused(config_file("forks_owm = 'y'"), source=BENCH)
    assert "forks_own takes a string" in refused(config_file("forks_own = 5"), source=BENCH)
    assert "unknown key --forks_own" in refused("--forks_own=y", source=BENCH)  # on the command line it is a slip


@pytest.mark.parametrize("script", ["sample.py", "eval.py", "doctor.py", "bench.py"])
def test_configs_of_this_project_are_read_by_the_scripts_beside_train_py(script):
    path = str(ROOT / "config" / "shakespeare_char_cpu.py")
    values = of_project(script, path)
    assert values["out_dir"] == read_file(path, read_keys(ROOT / "train.py"))["out_dir"]

FINETUNE_SHAKESPEARE = """
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

init_from = 'gpt2-xl' # this is the largest GPT-2 model

# 1 batch_size * 32 grad_accum * 1024 tokens = 32,768 tokens/iter
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# finetune at constant LR
learning_rate = 3e-5
decay_lr = False
"""


def test_a_config_file_of_nanogpt_runs_unchanged():
    source = """
out_dir = 'out'
eval_interval = 2000
eval_iters = 200
init_from = 'scratch' # 'scratch' or 'resume' or 'gpt2*'
wandb_log = False # disabled by default
wandb_project = 'owt'
wandb_run_name = 'gpt2' # 'run' + str(time.time())
gradient_accumulation_steps = 5 * 8 # used to simulate larger batch sizes
batch_size = 12 # if gradient_accumulation_steps > 1, this is the micro-batch size
learning_rate = 6e-4 # max learning rate
max_iters = 600000 # total number of training iterations
decay_lr = True # whether to decay the learning rate
"""
    result = resolve(config_file(FINETUNE_SHAKESPEARE), source=source)
    assert result.pop("wandb_run_name").startswith("ft-")
    assert result == {
        "out_dir": "out-shakespeare",
        "eval_interval": 5,
        "eval_iters": 40,
        "init_from": "gpt2-xl",
        "wandb_log": False,
        "wandb_project": "shakespeare",
        "gradient_accumulation_steps": 32,
        "batch_size": 1,
        "learning_rate": 3e-5,
        "max_iters": 20,
        "decay_lr": False,
    }


def test_a_config_file_has_names_of_its_own():
    text = """
import math
import os.path
from collections import OrderedDict
from time import time

_steps = 10

def double(x):
    return 2 * x

class Helper:
    pass

max_iters = double(_steps)
"""
    assert resolve(config_file(text)) == DEFAULTS | {"max_iters": 20}


@pytest.mark.parametrize(
    "line, key, value",
    [
        ("dropout = 1", "dropout", 1.0),
        ("max_iters = 1e3", "max_iters", 1000),
        ("bias = False", "bias", False),
        ("compile = True", "compile", True),
        ("compile = None", "compile", None),
        ("top_k = None", "top_k", None),
        ("betas = [0, 0.99]", "betas", (0.0, 0.99)),
        ("names = ['x']", "names", ("x",)),
        ("max_iters: int = 3", "max_iters", 3),
    ],
)
def test_value_in_a_config_file(line, key, value):
    assert same(resolve(config_file(line)), DEFAULTS | {key: value})


@pytest.mark.parametrize(
    "line, takes",
    [
        ("max_iters = True", "a whole number, not True"),
        ("max_iters = 1.5", "a whole number, not 1.5"),
        ("max_iters = '5'", "a whole number, not '5'"),
        ("max_iters = None", "a whole number, not None"),
        ("dropout = '0.1'", "a number, not '0.1'"),
        ("dropout = True", "a number, not True"),
        ("dropout = 10**400", "a number, not 1000"),
        ("bias = 1", "true or false, not 1"),
        ("bias = 'true'", "true or false, not 'true'"),
        ("compile = 'none'", "true or false or none, not 'none'"),
        ("start = 123", "a string, not 123"),
        ("start = str", "a string, not <class 'str'>"),
        ("betas = 0.9", "such as 0.9,0.95, not 0.9"),
        ("betas = ('a', 'b')", "such as 0.9,0.95, not ('a', 'b')"),
        ("window = (1,)", "such as 1,2, not (1,)"),
    ],
)
def test_wrong_value_in_a_config_file(refused, line, takes):
    error = refused(config_file(f"# one\n\n{line}\n"))
    assert error.startswith(f"error: config.py:3: {line.split()[0]} takes ") and takes in error


def test_a_config_file_neither_sees_nor_changes_the_caller(refused):
    namespace = load()
    before = dict(namespace)
    configure(namespace, [config_file("_private = 99\n\ndef main():\n    return 1\n")])
    assert namespace == before
    error = refused(config_file("out_dir = 'x'\nmax_iters = max_iters * 2\n"))
    assert error == "error: config.py:2: NameError: name 'max_iters' is not defined\n"


@pytest.mark.parametrize(
    "text, where",
    [
        ("max_iters = 1\nmax_iters = = 2\n", "config.py:2: SyntaxError: "),
        ("max_iters = 1\n\n1 / 0\n", "config.py:3: ZeroDivisionError: "),
        ("def f():\n    raise ValueError('two\\nlines')\n\nf()\n", "config.py:2: ValueError: two lines"),
        ("import sys\nsys.exit('enough')\n", "config.py:2: SystemExit: enough"),
        ("import no_such_module_at_all\n", "config.py:1: ModuleNotFoundError: "),
        ("  max_iters = 1\n", "config.py:1: IndentationError: "),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(refused, text, where):
    assert refused(config_file(text)).startswith(f"error: {where}")


def test_a_config_file_that_is_no_text(refused):
    Path("config.py").write_bytes(b"\xff\xfe\x00")
    assert refused("config.py").startswith("error: config.py")


# settings as an object


def test_settings_are_attributes_in_the_order_of_the_script():
    c = Settings(resolve("--max_iters=5"))
    assert c.max_iters == c["max_iters"] == 5 and c.betas == (0.9, 0.95)
    assert type(dict(c)) is dict and same(dict(c), DEFAULTS | {"max_iters": 5}) and list(c.keys()) == list(DEFAULTS)


def test_settings_never_change():
    c = Settings({"max_iters": 5})
    with pytest.raises(AttributeError, match=r"do not change: c.changed\(max_iters=...\) gives a changed copy"):
        c.max_iters = 6
    with pytest.raises(AttributeError, match="settings do not change"):
        c.new = 1
    assert dict(c) == {"max_iters": 5}


def test_a_changed_copy_leaves_the_settings_as_they_are():
    c = Settings({"max_iters": 5, "bias": True})
    changed = c.changed(max_iters=6)
    assert isinstance(changed, Settings) and dict(changed) == {"max_iters": 6, "bias": True}
    assert dict(c) == {"max_iters": 5, "bias": True} and dict(c.changed()) == dict(c)


def test_an_unknown_setting_names_the_nearest_one():
    c = Settings({"max_iters": 5, "bias": True})
    for ask in (lambda: c.max_iter, lambda: c.changed(max_iter=6)):
        with pytest.raises(AttributeError, match=r"no setting max_iter; did you mean max_iters\?"):
            ask()
    with pytest.raises(AttributeError, match="no setting qqqq$"):
        _ = c.qqqq
    assert not hasattr(c, "qqqq") and getattr(c, "qqqq", None) is None


@pytest.mark.parametrize("duplicate", [lambda c: pickle.loads(pickle.dumps(c)), copy.copy, copy.deepcopy])
def test_settings_can_be_pickled_and_copied(duplicate):
    """Spawned processes get their settings by pickling."""
    c = duplicate(Settings(DEFAULTS))
    assert isinstance(c, Settings) and same(dict(c), DEFAULTS)
    with pytest.raises(AttributeError):
        c.bias = False


# unknown keys


@pytest.mark.parametrize("rank, local, seconds", [("0", "0", 0), ("8", "0", 3), ("3", "3", 6)])
def test_under_torchrun_an_error_is_said_after_those_of_the_ranks_before(rank, local, seconds, monkeypatch, capsys):
    """If the ranks before have the same error, they end the run meanwhile."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    waited = []
    monkeypatch.setattr(time, "sleep", lambda s: waited.append((s, capsys.readouterr().err)))
    with pytest.raises(SystemExit) as end:
        fail("no such thing")
    assert end.value.code == 2 and waited == [(seconds, "")]
    assert capsys.readouterr().err == "error: no such thing\n"


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("text", ["abc", "1.5", "-1", " "])
def test_a_rank_that_is_no_number_does_not_hide_the_error(name, text, monkeypatch, capsys):
    monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit):
        fail("no such thing")
    assert capsys.readouterr().err == "error: no such thing\n"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("text", ["abc", "-1", "1.0"])
def test_what_torchrun_should_set_is_named_where_it_is_no_number(name, text, monkeypatch):
    from training import ranks

    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name}='{text}' must be a whole number"):
        ranks.from_environment(name, 0)
    monkeypatch.setenv(name, "")
    assert ranks.from_environment(name, 7) == 7


def test_a_field_of_the_model_without_a_key_names_the_line_to_add():
    from plan import model_fields

    keys = read_keys(ROOT / "train.py")
    assert model_fields(keys)["n_layer"] is keys["n_layer"]
    for name, line in (("rope_theta", "`rope_theta = 10000.0`"), ("attn", "`attn = 'auto'`")):
        with pytest.raises(ValueError, match=line):
            model_fields({key: value for key, value in keys.items() if key != name})


def test_unknown_key_on_the_command_line(refused):
    assert refused("--max_iter=5") == "error: unknown key --max_iter; did you mean --max_iters?\n"
    assert "did you mean --max_iters=5?" in refused("--max-iters=5")
    assert "did you mean --max_iters=5?" in refused("-max_iters=5")
    assert "did you mean --max_iters=5?" in refused("max_iters=5")
    assert refused("--qqqq=1") == "error: unknown key --qqqq; --help lists the keys\n"
    assert "unknown key --_private" in refused("--_private=1")
    assert "unknown key --CONSTANT" in refused("--CONSTANT=1")
    assert "unknown key --" in refused("--")
    assert "did you mean --bias=false?" in refused("--no_bias")
    assert "did you mean --bias=false?" in refused("--no-bias")


def test_unknown_key_in_a_config_file(refused):
    path = config_file("bias = False\n\nmax_iter = 5\n", "config/small.py")
    assert refused(path) == "error: config/small.py:3: unknown key max_iter; did you mean max_iters?\n"
    assert "config.py:1: unknown key qqqq; a name of its own begins with _" in refused(config_file("qqqq = 1\n"))
    assert "config.py:1: unknown key max_iter;" in refused(config_file("for max_iter in (1, 2):\n    pass\n"))


def test_a_word_without_a_place(refused):
    config_file("bias = False\n", "config/small.py")
    assert "did you mean config/small.py?" in refused("config/small")
    assert refused("config/smal.py") == "error: no config file config/smal.py; did you mean config/small.py?\n"
    assert refused("scripts.py") == "error: no config file scripts.py; did you mean script.py?\n"
    assert refused("config/qqqqqqqqqqqq.py") == "error: no config file config/qqqqqqqqqqqq.py\n"
    assert refused("nowhere/small.py") == "error: no config file nowhere/small.py\n"
    assert "unexpected word 'word'; expected config/FILE.py or --key=value" in refused("word")


# verbs and paths

BENCH = """
what = ""  # what to measure
runs: tuple[str, ...] = ()  # run folders
steps = 3  # how many
quick = False
"""


def test_verb():
    def bench(*argv):
        return resolve(*argv, source=BENCH, verb="what", verbs=("train", "infer"))

    assert bench()["what"] == ""
    assert bench("infer")["what"] == "infer"
    late = {"what": "infer", "runs": (), "steps": 5, "quick": True}
    assert bench("--quick", config_file("steps = 5\n"), "infer") == late
    assert bench("--what=train")["what"] == "train"
    assert bench("infer", "--what=train")["what"] == "train"


def test_also_takes_another_scripts_keys_and_only_returns_them(tmp_path):
    other = tmp_path / "other.py"
    other.write_text("steps = 5  # ours wins\nwidth = 64  # of the model\n", encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text("steps = 3  # how many\n", encoding="utf-8")
    namespace = {"__file__": str(script)}
    assert configure(namespace, ["--width=8"], also=other) == {"steps": 3, "width": 8}
    assert namespace["steps"] == 3 and "width" not in namespace


def test_wrong_verb(refused):
    options = {"source": BENCH, "verb": "what", "verbs": ("train", "infer")}
    assert refused("trian", **options) == "error: unexpected word 'trian'; did you mean train?\n"
    assert "expected train, infer, config/FILE.py or --key=value" in refused("x" * 9, **options)
    assert refused("--what=foo", **options) == "error: what is one of train, infer, not 'foo'\n"
    assert "unexpected word 'infer'" in refused("train", "infer", **options)
    assert "unexpected word 'trian'" in refused("trian", paths="runs", **options)
    config_file("steps = 1\n", "config/small.py")
    assert "did you mean config/small.py?" in refused("config/small", **options)


def test_paths(refused):
    def report(*argv, **options):
        return resolve(*argv, source=BENCH, paths="runs", **options)

    assert report()["runs"] == ()
    assert report("b", "--steps=1", "a", "--quick", "c")["runs"] == ("b", "a", "c")
    assert report("a=b", "1", "x,y")["runs"] == ("a=b", "1", "x,y")
    assert report("--runs=a,b")["runs"] == ("a", "b")
    assert report("--runs=a,b", "c")["runs"] == ("c",)  # later wins
    assert report("c", "--runs=a,b")["runs"] == ("a", "b")
    both = report("train", "a", "train", verb="what", verbs=("train",))
    assert (both["what"], both["runs"]) == ("train", ("a", "train"))
    assert report(config_file("steps = 9\n"), "a") == {"what": "", "runs": ("a",), "steps": 9, "quick": False}
    assert "no config file a.py" in refused("a.py", source=BENCH, paths="runs")
    assert "unknown key -x" in refused("-x", source=BENCH, paths="runs")


# --help


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--max_iters=3", "nonsense", "--help"]])
def test_help(argv, capsys):
    namespace = load()
    before = dict(namespace)
    with pytest.raises(SystemExit) as stop:
        configure(namespace, argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == "" and namespace == before
    assert out.startswith("Train a small model.\nIt is quick.\n\nusage: python script.py [config/FILE.py ...] [--key=")
    assert "Second paragraph" not in out
    width = len("--gradient_accumulation_steps=40")
    for line in [
        "what it writes\n  " + "--out_dir=out".ljust(width) + '   where checkpoints and "#1" metrics go\n',
        "  " + "--start='\\n'".ljust(width) + "   prompt, or FILE:path\n",
        "  " + "--max_iters=600000".ljust(width) + "   updates over the whole run\n\nmodel\n(as in GPT-2)\n  --dropout",
        "  --gradient_accumulation_steps=40   micro-steps per update\n",
        "  " + "--betas=0.9,0.95".ljust(width) + "   AdamW's moments\n",
        "  " + "--compile=none".ljust(width) + "   none: where it pays\n",
        "  " + "--runs=()".ljust(width) + "   strings\n",
        "  --tracker=none\n",
    ]:
        assert line in out
    assert out.count("\n  --") == len(DEFAULTS)
    for word in ("_private", "CONSTANT", "loop_variable", "--after", "-----"):
        assert word not in out


def test_help_names_verbs_and_paths(capsys):
    with pytest.raises(SystemExit):
        resolve("-h", source=BENCH, verb="what", verbs=("train", "infer"), paths="runs")
    usage = "usage: python script.py [train|infer] [config/FILE.py ...] [RUNS ...] [--key=value ...]\n"
    assert usage in capsys.readouterr().out


def test_comments_and_headings():
    source = """# coding: utf-8
import os
# fmt: off
# ----- data -----

a = "éééé # no"  # größe # two
b = (
    1,  # first
    2,
)  # both
   # below
    # not below
c = 3  # c
# heading of d
d = 4
"""
    load(source)
    keys = read_keys("script.py")
    assert {key.name: key.comment for key in keys.values()} == {
        "a": "größe # two",
        "b": "both below",
        "c": "c",
        "d": "",
    }
    assert [key.heading for key in keys.values()] == [("data",), (), (), ("heading of d",)]


# as a program


def python(*argv):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env)


def test_as_a_program():
    main = """
if __name__ == "__main__":
    config = configure(globals())
    print(config == {name: globals()[name] for name in config}, max_iters)
"""
    Path("train.py").write_text("from configurator import configure\n" + SCRIPT + main)
    good = python("train.py", config_file("max_iters = 5\n"), "--eval_only")
    assert (good.returncode, good.stdout, good.stderr) == (0, "True 5\n", "")
    bad = python("train.py", "--max_itres=5")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: unknown key --max_itres; did you mean --max_iters?\n"


def test_it_needs_the_standard_library_alone():
    done = python("-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import configurator")
    assert done.returncode == 0, done.stderr


def test_fail_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        fail("no such thing\nat all")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: no such thing at all\n")
