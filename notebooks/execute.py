"""
Run notebooks from top to bottom, each in a kernel of its own, and keep what they print and draw.

    python notebooks/execute.py                             # all that are here, into out/notebooks
    python notebooks/execute.py perf.ipynb
    python notebooks/execute.py --out_dir=notebooks         # renew the ones that are kept in this folder

A notebook names its kernel, minichat, which ./run_all.sh registers in .venv. It is written only if every cell ran;
what would differ between two runs that print the same (times of execution, versions) is left out.
"""

import base64
import io
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that it runs from anywhere

from configurator import configure, fail  # noqa: E402

# -----------------------------------------------------------------------------
names: tuple[str, ...] = ()  # notebooks in this folder; none: all of them
out_dir = "out/notebooks"    # where the executed ones go
small = False                # the budget of the tests: everything happens, the figures mean nothing
timeout = 1800               # seconds that a cell may take
# -----------------------------------------------------------------------------


def execute(path, small=False, timeout=1800):
    """The notebook at `path`, executed in its own folder. Raises nbclient's CellExecutionError where a cell fails,
    CellTimeoutError where one takes longer than `timeout` seconds, NoSuchKernel where its kernel is not registered."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, **({"MINICHAT_SMALL": "1"} if small else {})}
    environment.pop("MPLBACKEND", None)  # one that is set, such as agg, would draw nothing
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name=notebook.metadata.kernelspec.name, record_timing=False,
        coalesce_streams=True, extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(Path(path).resolve().parent)}},
    )
    client.execute(env=environment)
    notebook.metadata.language_info = {"name": "python"}  # a kernel adds its version
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(png):
    """A PNG in base64 -> the same in 256 colours: a chart looks the same and takes a third of the room in git."""
    from PIL import Image  # comes with matplotlib

    made = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256).save(made, "PNG", optimize=True)
    return base64.b64encode(made.getvalue()).decode()


def save(notebook, path):
    """Write it beside, then rename: a notebook that is there is whole."""
    import nbformat

    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(beside, path)


def chosen():
    """Paths of the notebooks that `names` names, by file name, with or without the folder."""
    here = {path.name: path for path in sorted(HERE.glob("*.ipynb"))}
    for name in names:
        if Path(name).name not in here:
            fail(f"no notebook {name}: there are {', '.join(here)}")
    return [here[Path(name).name] for name in names] or list(here.values())


def main():
    configure(globals(), paths="names")
    try:
        from jupyter_client.kernelspec import NoSuchKernel
        from nbclient.exceptions import CellExecutionError, CellTimeoutError
    except ImportError:
        fail("running notebooks needs nbclient and ipykernel: pip install -e '.[notebooks]' -c constraints.txt")
    paths = chosen()
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    for path in paths:
        started = time.monotonic()
        print(f"{path.name} ...", flush=True)
        try:
            notebook = execute(path, small, timeout)
        except NoSuchKernel as e:
            fail(f"no kernel {e.name}: register it with python -m ipykernel install --sys-prefix --name={e.name}")
        except CellTimeoutError:
            fail(f"{path.name}: a cell took more than {timeout} s; --timeout=SECONDS gives it more")
        except CellExecutionError as e:  # a fault of the notebook, or of what it calls
            print(e, file=sys.stderr)
            return 1
        save(notebook, Path(out_dir) / path.name)
        print(f"{Path(out_dir) / path.name}, executed in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
