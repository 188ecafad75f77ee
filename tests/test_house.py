"""The house stays true: imports go down its floors, keys have comments, and the README tells of what is there."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import read_file, read_keys  # noqa: E402
from reporting.experiment import read_experiment  # noqa: E402

ROOMS = ("training", "inference", "serving", "reporting", "benchmarks")  # flat folders beside the scripts
FLOORS = [
    "configurator files device cross_entropy",
    "model tokenizer training.ranks reporting.isoflop reporting.significance reporting.experiment",
    "loader optim checkpoint plan training.guard training.probe training.track training.monitor inference.sampling "
    "inference.kvcache inference.quantize",
    "training.tensor_parallel training.pipeline_parallel infer export inference.tasks reporting.history",
    "parallel eval reporting.tables reporting.charts",
    "training.start training.saver training.measure reporting.alarm reporting.page reporting.pictures "
    "benchmarks.common",
    "train benchmarks.*",
    "sample bench ablate report doctor",
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}

# what the ground floor and model.py may import besides the standard library; see test_setup.py for the other files
BARE = {"configurator": set(), "cross_entropy": {"torch"}, "model": {"torch", "flash_attn", "cross_entropy"},
        "device": {"torch"}, "files": set(), "reporting/isoflop": {"numpy"}}

# floors of data/: a prepare.py may import another's, besides these
DATA_FLOORS = [{"common"}, {"reading"}, {"cleaning", "dedup"}, {"scan"}, {"pipeline"}]
DATA_FLOOR = {name: floor for floor, names in enumerate(DATA_FLOORS) for name in names}

MOST_LINES = 450
LONGER = {  # file: why it is one file all the same
    "model.py": "the whole architecture, every choice of it in sight of the others",
    "train.py": "a hundred lines of settings above the story",
    "checkpoint.py": "plain and sharded, at once and behind the steps, and how one becomes the other",
    "configurator.py": "where settings come from, the range of each number, and prints that never fail",
    "loader.py": "which shards a dataset has, the order of their tokens, and batches in that order",
    "bench.py": "nine benchmarks, each by itself",
    "export.py": "two ways in and two ways out, each by itself",
    "plan.py": "memory, time and the layouts there are, each formula beside its source",
    "parallel.py": "data, tensor and pipeline parallelism meet on one grid and in every step",
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
    assert imports(path) & ours <= {*FLOORS[0].split(), "tokenizer"} | below


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


def section(text, heading):
    """The text under a heading, to the next one of its level or above; "" where there is none."""
    found = re.search(rf"^(#+) {heading}\s*$(.*?)(?=^#{{1,2}} |\Z)", text, re.M | re.S | re.I)
    return found.group(2) if found else ""


def quoted(text):
    return re.findall(r"`([^`\n]+)`", text)


def unnamed(text, files):
    """Top-level files and folders of `files` that the file map in `text` does not name."""
    named = {token.removeprefix("./").split("/")[0] for token in quoted(section(text, "The files"))}
    return sorted({name.split("/")[0] for name in files} - named)


def missing(text, root):
    """Files and folders that the file map names, and scripts that the rest of the text names, that are not there.

    In a line of the map that begins with a folder, names may be those within it.
    """
    map_, wanted = section(text, "The files"), []  # (folders where it may lie, name)
    for line in map_.splitlines():
        names = [token for token in quoted(line) if re.fullmatch(r"[\w./-]+(\.(py|sh|md|toml|txt)|/)", token)]
        folders = [root, *(root / name for name in names[:1] if name.endswith("/"))]
        wanted += [(folders, name) for name in names]
    wanted += [([root], token) for token in quoted(text.replace(map_, "")) if re.fullmatch(r"[\w./-]+\.(py|sh)", token)]
    return sorted(name for folders, name in wanted if not any((folder / name).exists() for folder in folders))


def commands(text):
    """Each simple command in the ```sh blocks, and each `python ...` or `./...` within a line, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    for block in (*blocks, *(token for token in quoted(text) if token.startswith(("python ", "./")))):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
            lexer.whitespace_split = True
            words = []
            for word in (*lexer, ";"):
                if set(word) <= set(";&|<>"):
                    while words and re.fullmatch(r"\w+=.*", words[0]):
                        words = words[1:]  # VARIABLE=value in front
                    if words:
                        yield words
                    words = []
                else:
                    words.append(word)


def faults(words, root):
    """What is wrong with a command of the README: a file that is not there, a key or a value that is not taken."""
    if words[0].startswith("./") and not os.access(root / words[0], os.X_OK):
        return [f"{words[0]} cannot be run"]
    if words[0] == "./run_all.sh":
        verbs = re.findall(r"^ +([\w-]+)\)", read(root / "run_all.sh"), re.M)
        return [f"{verb} is no verb of it" for verb in words[1:2] if verb not in verbs]
    files = [word for word in words if re.fullmatch(r"[\w./-]+\.py", word)]
    wrong = [f"no file {file}" for file in files if not (root / file).is_file()]
    if wrong or not re.fullmatch(r"(.*/)?python[\d.]*", words[0]) or len(words) < 2 or words[1] not in files:
        return wrong
    also = read_keys(root / "train.py") if words[1] in ("plan.py", "ablate.py") else {}
    keys = {**also, **read_keys(root / words[1])}
    try:
        for file in files[1:]:
            if words[1] == "ablate.py":  # an experiment is no list of keys
                read_experiment(os.fspath(root / file), also)
            else:
                read_file(os.fspath(root / file), keys)
        for word in words[2:]:
            name, equals, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and name != "help":
                if name not in keys:
                    wrong.append(f"no key {word}")
                elif equals:
                    keys[name].check(value, word, parse=True)
    except SystemExit:
        wrong.append("a config or value is refused (the reason is on stderr)")
    return wrong


def test_the_readme_maps_every_file():
    assert not unnamed(read(ROOT / "README.md"), present())


def test_every_file_that_the_readme_names_is_there():
    assert not missing(read(ROOT / "README.md"), ROOT)


def test_the_readmes_commands_are_right():
    found = list(commands(read(ROOT / "README.md")))
    assert any("train.py" in words for words in found) and any("./run_all.sh" in words for words in found)
    wrong = {" ".join(words): faults(words, ROOT) for words in found}
    assert not {command: why for command, why in wrong.items() if why}


def test_the_readmes_figures_are_those_of_the_results():
    """Each benchmark's mean, spread and time stand in its row of the README as they stand in docs/results."""
    measured = section(read(ROOT / "README.md"), "Measured")
    results = sorted((ROOT / "docs" / "results").glob("*.txt"))
    results = [path for path in results if not path.name.startswith("gpu_")]  # what tests/on_gpu.sh says of a card
    assert results
    for path in results:
        result = json.loads(read(path).splitlines()[-1])
        rows = [line for line in measured.splitlines() if f"/{path.name})" in line]
        assert rows, f"{path.name} is in no row"
        holds = {"train": holds_train, "data": holds_data, "loader": holds_loader, "infer": holds_infer,
                 "activations": holds_activations, "layouts": holds_layouts, "scaling": holds_scaling,
                 "zero": holds_zero, "monitor": holds_monitor}
        holds[result["benchmark"]](rows, result)
        made = result.get("runs") or [result["machine"]]
        assert not any(run["dirty"] for run in made) and len({run["commit"] for run in made}) == 1


def holds_train(rows, result):
    loss, seconds, n = result["val_loss"], result["train_s"], len(result["runs"])
    assert rows[0].startswith(f"| `{result['settings']['config']}`")
    assert all(key in rows[0] for key in result["settings"]["overrides"])
    spread = f" ± {loss['stdev']:.4f}" if n > 1 else ""  # of one run there is none
    assert f"| {loss['mean']:.4f}{spread} ({n}) |" in rows[0]
    assert f"| {seconds['mean']:.1f} s |" in rows[0]


def holds_data(rows, result):
    """A row for each case that is told of, and one for the memory by size of the corpus."""
    cases = {row["what"]: row for row in result["rows"]}
    told = [row for line in rows for what, row in cases.items() if line.startswith(f"| {what} |")]
    assert len(told) >= 3
    for row in told:
        ratio = result["ratios"].get(row["what"], 1.0)
        figures = f"| {row['what']} | {row['MB/s']:.1f} MB/s | {ratio:.2f} | {row['peak MB']:.0f} MB |"
        assert any(line.startswith(figures) for line in rows), figures
    memory = ", ".join(f"{row['peak MB']:.0f} MB for {row['corpus MB']} MB" for row in result["memory"])
    assert any(memory in line for line in rows), memory


def holds_loader(rows, result):
    speed = result["tokens_per_s"]
    figures = f"| {speed['minichat'] / 1e6:.2f} | {speed['nanoGPT'] / 1e6:.2f} | {result['waiting']:.2%} |"
    assert rows[0].startswith(f"| `{result['settings']['config']}` {figures}"), figures


def holds_infer(rows, result):
    """A row for each form and number of heads: tokens/s by batch and prompt, then what is beside it."""
    for other in result["others"]:
        which = ("model", "form", "kv_heads")
        mine = [row for row in result["rows"] if all(row.get(key) == other.get(key) for key in which)]
        figures = [f"{row['tok_per_s']:.1f}" for row in mine] + ([f"{other['gain']:.2f}"] if "gain" in other else [])
        beside = [key for key in sorted(other) if key.startswith(("llama", "plain, prompt", "transformers"))]
        figures += [f"{other[key]:.1f}" for key in beside]
        named = f"{other['model']}, " if "model" in other else ""
        line = f"| {named}{other['form']}, {other['kv_heads']} heads | " + " | ".join(figures) + " |"
        assert any(row.startswith(line) for row in rows), line


def holds_activations(rows, result):
    for row in result["rows"]:
        line = (f"| {row['checkpointing']} | {row['activations_mb']:.0f} MB | {row['of_none_%']:.0f}% | "
                f"{row['step_s']:.1f} s |")
        assert any(found.startswith(line) for found in rows), line
    assert len({row["gradients"] for row in result["rows"]}) == 1


def holds_layouts(rows, result):
    """How far the layouts are from one process at most, by what is compared."""
    right = [row for row in result["rows"] if row["layout"] != "wrong scale"]
    most = [max(row[key] for row in right) for key in ("grads", "losses", "norms", "state", "val")]
    line = f"| {result['ranks']} | {len(right)} | " + " | ".join(f"{figure:.1e}" for figure in most) + " |"
    assert any(found.startswith(line) for found in rows), line
    assert all(row["same start"] and row["scattered"] for row in right)


def cells(row, columns):
    """A row as bench.py prints it."""
    def cell(value):
        if value is None:
            return "n/a"
        return f"{value:.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
    return "| " + " | ".join(cell(row[column]) for column in columns.split()) + " |"


def holds_scaling(rows, result):
    """Each row that is told is one of the grid, and each number of processes is told of."""
    columns = ("length batch processes micro_batches tok_per_s mfu_% peak_mb step_ms data_ms forward_ms backward_ms "
               "comm_ms optim_ms strong_% weak_%")
    told = [row for row in result["rows"] if any(line.startswith(cells(row, columns)) for line in rows)]
    assert len(told) == len(rows), "a row that is not the grid's"
    assert {row["processes"] for row in told} == {row["processes"] for row in result["rows"]}


def holds_zero(rows, result):
    """At the optimizer's step each rank holds what theory says, within a twentieth."""
    columns = "processes layout weights_mb gradients_mb optimizer_mb theory_mb of_theory_% peak_mb plan_mb"
    for row in result["rows"]:
        assert any(line.startswith(cells(row, columns)) for line in rows), cells(row, columns)
        assert row["of_theory_%"] == pytest.approx(100, abs=5)


def holds_monitor(rows, result):
    """What logging and probes take of a step is below 2%."""
    without, configured = (row["median_ms"] for row in result["rows"])
    assert f"| {without:.1f} ms | {configured:.1f} ms | {result['share']:.2%} |" in rows[0]
    assert result["share"] < 0.02


def test_a_wrong_figure_in_the_readme_is_seen():
    names = ("tok_per_s", "peak_mb", "step_ms", "data_ms", "forward_ms", "backward_ms", "optim_ms")
    numbers = dict.fromkeys(names, 1.0)
    grid = {**numbers, "length": 64, "batch": 4, "mfu_%": None, "comm_ms": None, "micro_batches": 2}
    grid = {"rows": [{**grid, "processes": n, "strong_%": 100.0, "weak_%": None} for n in (1, 2)]}
    lines = [f"| 64 | 4 | {n} | 2 | 1.0 | n/a | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | n/a | 1.0 | 100.0 | n/a | [x](y) |"
             for n in (1, 2)]
    holds_scaling(lines, grid)
    for wrong in (lines[:1], [*lines, lines[0].replace("100.0", "101.0")]):
        with pytest.raises(AssertionError):
            holds_scaling(wrong, grid)
    parts = dict.fromkeys(("weights_mb", "gradients_mb", "optimizer_mb", "theory_mb", "peak_mb", "plan_mb"), 2.0)
    row = {"processes": 2, "layout": "ZeRO-1", **parts, "of_theory_%": 99.0}
    line = "| 2 | ZeRO-1 | 2.0 | 2.0 | 2.0 | 2.0 | 99.0 | 2.0 | 2.0 | [x](y) |"
    holds_zero([line], {"rows": [row]})
    for wrong, of_theory in ((line.replace("ZeRO-1", "ZeRO-2"), 99.0), (line.replace("99.0", "94.0"), 94.0)):
        with pytest.raises(AssertionError):
            holds_zero([wrong], {"rows": [{**row, "of_theory_%": of_theory}]})


SLOW = ("-m", "bench.py", "ablate.py", "notebooks/execute.py")  # what has its own tests with less to do


@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path):
    """In a fresh copy, in the README's order, as they stand; not what sets up, not what takes long."""
    for name in present():
        if not name.startswith("tests/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    ran, plays = [], False
    for words in commands(read(ROOT / "README.md")):
        to_fill_in = any(re.search(r"(^|=)[A-Z_]+$", word) for word in words)
        if words[0] != "python" or words[1] in SLOW or to_fill_in:
            continue
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, encoding="utf-8")
        if done.returncode and "no text to prepare" in done.stderr:
            pytest.skip("neither the text nor a package index can be reached")
        plays |= "another text than Tiny Shakespeare" in done.stdout
        judged = any(word.startswith("--baseline=") for word in words)  # 1: the machine is slower, not the loss worse
        ended = done.returncode == 0 or judged and done.returncode == 1 and not re.search("WORSE .*loss", done.stdout)
        refused = judged and plays and "another dataset" in done.stderr
        assert ended or refused, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        ran.append(words[1])
    assert {"data/shakespeare_char/prepare.py", "train.py", "sample.py", "eval.py"} <= set(ran)


def test_the_readmes_map_goes_up_the_floors():
    """It says: a file imports from the ones above it in this table, never from those below."""
    rows = [quoted(line)[0] for line in section(read(ROOT / "README.md"), "The files").splitlines() if quoted(line)]
    order = [row.removesuffix(".py") for row in rows if (ROOT / row) in SCRIPTS]
    assert sorted(order) == [path.stem for path in SCRIPTS]
    for i, name in enumerate(order):
        below = imports(ROOT / f"{name}.py") & set(order[i:])
        assert not below, f"{name}.py imports {below}, which the table has below it"


README = """
# x
`missing.py` is run with `python train.py --nothing=1`.
## The files
| `train.py` | trains | writes `metrics.jsonl` |
| `config/` | `shakespeare_char_cpu.py`, `none.py` |
- `gone.py`, `tests/test_gone.py`, `data/<name>/prepare.py`
### More
- `LICENSE`
## Use
```sh
./run_all.sh demo && python train.py config/shakespeare_char_cpu.py \\
    --max_iters=10   # a short one
THREADS=1 python train.py --learning_rate=fast
python train.py --learnin_rate=1
python train.py config/gone.py
./run_all.sh fly; ./gone.sh
echo "a; b" | python sample.py --start=- --num_samples 3
```
"""


def test_the_readmes_tests_see_what_is_wrong():
    files = ["train.py", "config/a.py", "LICENSE", "model.py", "tests/test_model.py", ".ci/run"]
    assert unnamed(README, files) == [".ci", "model.py"]
    assert missing(README, ROOT) == ["gone.py", "missing.py", "none.py", "tests/test_gone.py"]
    found = {" ".join(words): faults(words, ROOT) for words in commands(README)}
    assert [command for command, why in found.items() if not why] == [
        "./run_all.sh demo",
        "python train.py config/shakespeare_char_cpu.py --max_iters=10",
        "echo a; b",
        "python sample.py --start=- --num_samples 3",
    ]
    assert len(found) == 10 and found["python train.py --learnin_rate=1"] == ["no key --learnin_rate=1"]
