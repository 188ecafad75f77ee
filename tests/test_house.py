"""The house stays true: imports go down its floors, keys have comments, files have one job. The pages: test_docs.py."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import read_file, read_keys  # noqa: E402

ROOMS = ("training", "inference", "foreign", "serving", "reporting", "benchmarks")  # flat folders beside the scripts
FLOORS = [
    "files keys device float8 native inference.puzzles inference.rounding benchmarks.traffic",
    "fused inference.kernels",
    "attention cross_entropy",
    "configurator model tokenizer training.ranks training.sharded_checkpoint reporting.isoflop reporting.significance",
    "dataset conversation foreign.names foreign.byte_level inference.prompts inference.int4 "
    "inference.gptq inference.draws inference.paged inference.tiled",
    "loader optim checkpoint plan training.probe training.track training.monitor training.profiler "
    "inference.sampling inference.kvcache inference.quantize inference.tasks inference.samples inference.terminal "
    "reporting.experiment foreign.hugging_face foreign.gguf_files foreign.templates foreign.chat_template",
    "inference.calibration inference.compiled inference.batch inference.requests",
    "inference.speculation",
    "training.guard training.tensor_parallel training.pipeline_parallel foreign.pretrained infer "
    "inference.long_context inference.chat_tasks inference.letters foreign.tokenizer_files reporting.history",
    "parallel eval export reporting.tables reporting.charts serving.worker serving.bodies serving.answers",
    "training.origin training.start training.saver training.measure reporting.alarm reporting.page "
    "reporting.pictures benchmarks.common benchmarks.servers serving.api",
    "training.warmup benchmarks.endurance serving.guards serving.metrics serving.documents",
    "train benchmarks.* serving.app",
    "serving.server",
    "sample chat serve bench ablate report doctor",
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}

# what the ground floor and model.py may import besides the standard library; see test_setup.py for the other files
BARE = {"configurator": {"files", "keys"}, "keys": set(), "native": set(), "fused": {"torch", "native"},
        "cross_entropy": {"torch", "fused"}, "attention": {"torch", "fused", "flash_attn"},
        "model": {"torch", "attention", "cross_entropy", "fused"}, "inference/kernels": {"torch", "native"},
        "float8": {"torch"}, "device": {"torch"}, "files": set(), "reporting/isoflop": {"numpy"}}

# floors of data/; every prepare.py may import all of these
DATA_FLOORS = [{"common", "sources"}, {"reading"}, {"texts", "cleaning", "dedup"}, {"scan"},
               {"pipeline", "chats"}]
DATA_FLOOR = {name: floor for floor, names in enumerate(DATA_FLOORS) for name in names}

MOST_LINES = 450
LONGER = {  # file: why it is one file all the same
    "infer.py": "a request from its prompt to its end, and the one loop that serves all of them",
    "model.py": "the whole architecture, every choice of it in sight of the others",
    "checkpoint.py": "how a checkpoint is written, verified, found, read and removed: each relies on the others",
    "device.py": "what a machine offers a run: device, precision, kernels, a compiler, its speed, its memory",
    "doctor.py": "one machine, and the ranks on many: one report",
    "dataset.py": "how a dataset is found, its files checked, its tokens and bits read: each relies on the others",
    "tokenizer.py": "text to ids and back, and every file that a tokenizer is read from",
    "plan.py": "memory, time and the layouts there are, each formula beside its source",
}

SCRIPTS = sorted(ROOT.glob("*.py"))
ROOM_FILES = sorted(path for room in ROOMS for path in ROOT.glob(f"{room}/[a-z]*.py"))
DATA_SCRIPTS = sorted(ROOT.glob("data/*.py")) + sorted(ROOT.glob("data/*/*.py"))
CONFIGS = sorted(ROOT.glob("config/[a-z]*.py"))
PRESETS = ("gpt2", "stack")  # an architecture, to be combined with a config that says the rest


def read(path):
    return path.read_text(encoding="utf-8")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Top-level names that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(read(path))))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    return {name.split(".")[0] for name in names}


def own_imports(path):
    """Our modules that a file imports anywhere, as they stand in FLOORS: "model", "training.guard"."""
    names = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = {module_of(file) for file in (*SCRIPTS, *ROOM_FILES)}
    return names & ours


def module_of(path):
    return name_of(path).removesuffix(".py").replace("/", ".")


def floor_of(module):
    """The floor of a module; a benchmark that FLOORS does not name is one of benchmarks.*"""
    return FLOOR.get(module, FLOOR["benchmarks.*"] if module.startswith("benchmarks.") else None)


def present():
    """Names of all files that git tracks, or would if they were added."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return sorted({name for name in listed.split("\0") if name and (ROOT / name).is_file()})


def takes_settings(path):
    """Whether a script calls configure(globals()), so that its keys are on the command line."""
    calls = [n for n in ast.walk(ast.parse(read(path))) if isinstance(n, ast.Call)]
    return any(ast.unparse(call).startswith("configure(globals()") for call in calls)


# -----------------------------------------------------------------------------
# The floors


@pytest.mark.parametrize("path", [*SCRIPTS, *ROOM_FILES], ids=name_of)
def test_imports_go_down_the_floors(path):
    floor = floor_of(module_of(path))
    assert floor is not None, f"{name_of(path)} has no floor in the design"
    above = {module for module in own_imports(path) if floor_of(module) >= floor}
    assert not above, f"{name_of(path)} is on floor {floor} and imports " + ", ".join(
        f"{module} of floor {floor_of(module)}" for module in sorted(above)
    )


def test_an_import_up_the_floors_would_be_seen(tmp_path):
    """Negative control of the test above: both ways to import a file of a room count."""
    for line in ("from training import guard", "from training.guard import Guard", "import training.guard"):
        path = tmp_path / "file.py"
        path.write_text(line)
        assert own_imports(path) == {"training.guard"}, line


@pytest.mark.parametrize("path", DATA_SCRIPTS, ids=name_of)
def test_data_scripts_import_the_ground_floor_and_those_below_them(path):
    ours = {p.stem for p in (*SCRIPTS, *DATA_SCRIPTS)} | set(ROOMS) | {"data"}
    below = {name for name, floor in DATA_FLOOR.items() if floor < DATA_FLOOR.get(path.stem, len(DATA_FLOORS))}
    if path.name == "fetch.py":  # it brings a model and not data: export.py makes a run of it
        below |= {"export", "checkpoint"}
    ground = set(FLOORS[0].split())
    rooms = {name.split(".")[0] for name in ground if "." in name}
    assert imports(path) & ours <= ground | rooms | {"configurator", "tokenizer", "conversation"} | below
    assert {name for name in own_imports(path) if "." in name} <= ground


@pytest.mark.parametrize("name", BARE)
def test_the_ground_floor_stands_on_little(name):
    assert imports(ROOT / f"{name}.py") - sys.stdlib_module_names <= BARE[name]


# -----------------------------------------------------------------------------
# Keys and configs


@pytest.mark.parametrize("path", [*filter(takes_settings, (*SCRIPTS, *DATA_SCRIPTS))], ids=name_of)
def test_every_key_has_a_comment(path):
    keys = read_keys(path)
    assert keys
    assert not [name for name, key in keys.items() if not key.comment]


def test_the_main_scripts_have_keys():
    """Negative control of the test above: these are among its files."""
    for name in ("train.py", "sample.py", "eval.py", "data/shakespeare_char/prepare.py"):
        assert takes_settings(ROOT / name), name


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_sets_keys_of_train_alone(path):
    values = read_file(os.fspath(path), read_keys(ROOT / "train.py"))  # ends with a message for another key or type
    if path.stem in PRESETS:
        assert not values.keys() & {"out_dir", "dataset", "max_iters", "n_layer", "learning_rate"}
    else:
        assert values.get("out_dir") == f"out/{path.stem}", "its runs would mix with another config's"


# -----------------------------------------------------------------------------
# The files


def test_no_file_grows_beyond_one_job():
    """Tests are lists of cases and may be long; what one has to understand may not."""
    names = [name for name in present() if name.endswith((".py", ".sh")) and not name.startswith("tests/")]
    lines = {name: len(read(ROOT / name).splitlines()) for name in names}
    long = {name: n for name, n in lines.items() if n > MOST_LINES and name not in LONGER}
    assert not long, f"above {MOST_LINES} lines: split, or give a reason in LONGER: {long}"
    assert not [name for name in LONGER if lines[name] <= MOST_LINES], "short enough to need no reason"


def test_nothing_is_left_for_later():
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for name in present():
        if name.endswith(".png"):
            continue
        found = words.search((ROOT / name).read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{name} says {found.group()}: do it, or open an issue"
