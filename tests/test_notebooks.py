"""The notebooks run from top to bottom; the saved ones are complete, clean and name no particular machine."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import read_keys

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 400_000
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|var|mnt|Users|private)/|[A-Za-z]:\\\\?Users")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """Every text that a code cell shows."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        elif output.output_type == "error":
            yield "\n".join(output.traceback)
        else:
            yield from ("".join(text) for kind, text in output.data.items() if not kind.startswith("image/png"))


def problems(notebook):
    """Faults of an executed notebook, by cell id."""
    found = {}
    for number, cell in enumerate(code(notebook), start=1):
        said = [output for output in cell.outputs if output.output_type == "stream" and output.name == "stderr"]
        if any(output.output_type == "error" for output in cell.outputs):
            found[cell.id] = "an error"
        elif said:
            found[cell.id] = "a warning"
        elif any(MACHINE_PATH.search(text) for text in texts(cell)):
            found[cell.id] = "a path of a machine"
        elif cell.execution_count != number:
            found[cell.id] = "not executed in order"
        elif set(cell.metadata) - {"tags"}:
            found[cell.id] = "metadata"
    if not any(cell.outputs for cell in code(notebook)):
        found["all"] = "no output"
    return found


# -----------------------------------------------------------------------------
# The saved notebooks


def test_there_are_notebooks():
    assert {"gpt.ipynb", "perf.ipynb", "results.ipynb"} == {path.name for path in NOTEBOOKS}


@each_notebook
def test_it_is_kept_executed_and_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert not problems(notebook)
    assert notebook.metadata.kernelspec == {"name": "minichat", "display_name": "minichat", "language": "python"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert any("image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs)
    assert path.stat().st_size < MOST_BYTES


@each_notebook
def test_its_cells_have_names_for_ids(path):
    """A random id changes with every tool that writes the file; a name can be talked about."""
    ids = [cell.id for cell in read(path).cells]
    assert len(set(ids)) == len(ids)
    assert not [i for i in ids if not re.fullmatch(r"[a-z][a-z0-9-]*", i) or re.fullmatch(r"[0-9a-f-]{8,}", i)]


@each_notebook
def test_its_links_lead_somewhere(path):
    """The contents point at headings, by Jupyter's rule: blanks become hyphens."""
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    headings = {line.lstrip("# ").replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
    for name in re.findall(r"`([\w/.-]+\.(?:py|ipynb|sh))`", text):
        assert (ROOT / name).exists() or (FOLDER / name).exists(), f"no {name}"


def test_ruff_checks_the_notebooks():
    if not shutil.which("ruff") and not (Path(sys.executable).parent / "ruff").exists():
        pytest.skip("no ruff")
    ruff = shutil.which("ruff") or str(Path(sys.executable).parent / "ruff")
    files = subprocess.run([ruff, "check", ".", "--show-files"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert {str(path) for path in NOTEBOOKS} <= set(files.stdout.splitlines())
    checked = subprocess.run([ruff, "check", FOLDER], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert checked.returncode == 0, checked.stdout


def test_the_executor_imports_what_is_optional_where_it_is_used():
    tree = ast.parse((FOLDER / "execute.py").read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"configurator", "files"}
    assert all(key.comment for key in read_keys(FOLDER / "execute.py").values())


# -----------------------------------------------------------------------------
# Executing


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the files that the notebooks need, so that nothing is written here, and a kernel named minichat."""
    top = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "notebooks", top / "notebooks")
    shutil.copytree(ROOT / "data", top / "data", ignore=shutil.ignore_patterns("*.bin", "*.json", "__pycache__"))
    shutil.copytree(ROOT / "docs" / "results", top / "docs" / "results")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, top)
    for room in ("training", "inference", "foreign", "serving", "reporting", "benchmarks"):
        if (ROOT / room).is_dir():
            shutil.copytree(ROOT / room, top / room, ignore=shutil.ignore_patterns("__pycache__"))
    register = [sys.executable, "-m", "ipykernel", "install", f"--prefix={top}", "--name=minichat"]
    subprocess.run(register, check=True, capture_output=True)
    return top


@pytest.fixture
def run(house):
    """run(*args) -> the finished execute.py, with this kernel, on one thread."""
    environment = {**os.environ, "JUPYTER_PATH": str(house / "share" / "jupyter"), "OMP_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": ""}

    def run(*args):
        command = [sys.executable, "notebooks/execute.py", *args]
        return subprocess.run(command, cwd=house, capture_output=True, encoding="utf-8", env=environment)

    return run


@pytest.mark.slow
@each_notebook
def test_it_runs_from_top_to_bottom(run, house, path):
    before = (house / "notebooks" / path.name).read_bytes()
    done = run(path.name, "--small")
    if done.returncode and "no text to prepare" in done.stderr:
        pytest.skip("neither the text nor a package index can be reached")
    assert done.returncode == 0, done.stderr
    made = read(house / "out" / "notebooks" / path.name)
    assert not problems(made)
    assert [(c.id, c.source) for c in made.cells] == [(c.id, c.source) for c in read(path).cells]
    assert (house / "notebooks" / path.name).read_bytes() == before, "the saved notebook changes only on request"


def broken(house, source, kernel="minichat"):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, id="one")])
    notebook.metadata.kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(notebook, house / "notebooks" / "broken.ipynb")


def test_a_notebook_that_fails_is_not_written(run, house):
    broken(house, "assert 1 + 1 == 3, 'arithmetic'")
    done = run("broken.ipynb", "--out_dir=out/broken")
    assert done.returncode == 1 and "arithmetic" in done.stderr
    assert not list((house / "out" / "broken").iterdir())


def test_what_a_user_can_mend_is_one_line(run, house):
    broken(house, "1", kernel="nowhere")
    cases = {
        "nothing.ipynb": "no notebook nothing.ipynb",
        "--smal": "did you mean --small",
        "broken.ipynb": "no kernel nowhere: register it with python -m ipykernel install",
    }
    for word, message in cases.items():
        done = run(word)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_problems_are_seen():
    """Negative control of the test of saved notebooks."""
    cell = nbformat.v4.new_code_cell("1", id="a", execution_count=1)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    assert problems(notebook) == {"all": "no output"}
    for output, why in [
        (nbformat.v4.new_output("stream", name="stdout", text="written to /home/me/x"), "a path of a machine"),
        (nbformat.v4.new_output("stream", name="stderr", text="careful"), "a warning"),
        (nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]), "an error"),
    ]:
        cell.outputs = [output]
        assert problems(notebook) == {"a": why}
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="data/mine, 3/4, https://x.org/tmp/y")]
    assert not problems(notebook)
    cell.execution_count = 2
    assert problems(notebook) == {"a": "not executed in order"}
