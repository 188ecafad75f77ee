"""
FineWeb-Edu's sample of 10 billion tokens (Penedo et al. 2024, arXiv:2406.17557), as GPT-2's tokens.

    python data/fineweb/prepare.py
    python data/fineweb/prepare.py --hub_name=sample-100BT --out_dir=data/fineweb100

The keys are those of data/openwebtext/prepare.py. Its documents are without near duplicates already, within each crawl.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # so that it runs from anywhere

import common  # noqa: E402, I001
from openwebtext import prepare  # noqa: E402


def main():
    prepare.main(hub="HuggingFaceFW/fineweb-edu", hub_name="sample-10BT", out_dir=str(HERE))


if __name__ == "__main__":
    common.run(main)
