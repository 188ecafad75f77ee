"""
Run notebooks from top to bottom, each in its own kernel, and save them with everything they print and draw.

    python notebooks/execute.py                             # all notebooks of this folder, into out/notebooks
    python notebooks/execute.py perf.ipynb
    python notebooks/execute.py --out_dir=notebooks         # renew the notebooks of this folder

A notebook names its kernel, minichat, which ./run_all.sh registers in .venv. It is saved only if every cell ran.
Times of execution and versions are not saved: two runs that print the same give the same file.
"""

import base64
import io
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that it runs from anywhere

from configurator import Settings, configure, fail  # noqa: E402
from files import write_whole  # noqa: E402

# -----------------------------------------------------------------------------
names: tuple[str, ...] = ()  # notebooks in this folder; (): all of them
out_dir = "out/notebooks"    # where the executed notebooks go
small = False                # the budget of the tests: every cell runs, the figures mean nothing
timeout = 1800               # seconds that a cell may take
# -----------------------------------------------------------------------------


def execute(path, small=False, timeout=1800):
    """The notebook at `path`, executed in its own folder.

    Raises nbclient's CellExecutionError if a cell fails, CellTimeoutError if one takes longer than `timeout` seconds,
    NoSuchKernel if its kernel is not registered.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    environment = dict(os.environ)
    if small:
        environment["MINICHAT_SMALL"] = "1"
    environment.pop("MPLBACKEND", None)  # a backend such as agg would draw nothing
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name=notebook.metadata.kernelspec.name, record_timing=False,
        coalesce_streams=True, extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(Path(path).resolve().parent)}},
    )
    client.execute(env=environment)
    notebook.metadata.language_info = {"name": "python"}  # the kernel has added its version
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = shrink_png(output.data["image/png"])
    return notebook


def shrink_png(png):
    """A PNG in base64 -> the same in 256 colours: a chart looks the same and takes a third of the space in git."""
    from PIL import Image  # comes with matplotlib

    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def notebook_paths(names):
    """The paths of the notebooks with these file names, with or without the folder; of all notebooks if none is named.
    """
    here = {path.name: path for path in sorted(HERE.glob("*.ipynb"))}
    for name in names:
        if Path(name).name not in here:
            fail(f"no notebook {name}: there are {', '.join(here)}")
    return [here[Path(name).name] for name in names] or list(here.values())


def main(c):
    """Executes and saves the notebooks -> exit code."""
    try:
        import nbformat
        from jupyter_client.kernelspec import NoSuchKernel
        from nbclient.exceptions import CellExecutionError, CellTimeoutError
    except ImportError:
        fail("running notebooks needs nbclient and ipykernel: pip install -e '.[notebooks]' -c constraints.txt")
    paths = notebook_paths(c.names)
    Path(c.out_dir).mkdir(parents=True, exist_ok=True)
    for path in paths:
        started = time.monotonic()
        print(f"{path.name} ...", flush=True)
        try:
            notebook = execute(path, c.small, c.timeout)
        except NoSuchKernel as error:
            fail(f"no kernel {error.name}: register it with "
                 f"python -m ipykernel install --sys-prefix --name={error.name}")
        except CellTimeoutError:
            fail(f"{path.name}: a cell took more than {c.timeout} s; --timeout=SECONDS allows more")
        except CellExecutionError as error:  # a fault of the notebook, or of the code that it calls
            print(error, file=sys.stderr)
            return 1
        saved = Path(c.out_dir) / path.name
        write_whole(saved, nbformat.writes(notebook) + "\n")
        print(f"{saved}, executed in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    c = Settings(configure(globals(), paths="names"))
    sys.exit(main(c))
