"""
What new special tokens cost a model: the loss of plain text before and after four tokens are added to its vocabulary.

    python tests/new_tokens.py out/shakespeare_char_demo shakespeare_char

The rows of new tokens are the mean of the table (foreign/pretrained.py); beside that, rows of zeros. The last line is
JSON.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset import Tokens, find_dataset  # noqa: E402
from eval import evaluate  # noqa: E402
from foreign.pretrained import TABLES, add_rows  # noqa: E402
from infer import load  # noqa: E402
from loader import evaluation_rows  # noqa: E402
from model import GPT  # noqa: E402

COUNT = 4


@torch.no_grad()
def main(run, dataset):
    model = load(run)[0]
    old = model.config.vocab_size
    tokens = Tokens(find_dataset(dataset), "val")

    def loss(model):
        size = model.config.block_size
        return evaluate(model, tokens, size, evaluation_rows(size))["loss"]

    before = loss(model)
    larger = GPT(replace(model.config, vocab_size=old + COUNT)).eval()
    params = dict(larger.named_parameters())
    for name, p in model.named_parameters():
        rows = old if name in TABLES else len(p)
        params[name][:rows].copy_(p[:rows])
    add_rows(larger, old, old + COUNT)
    mean = loss(larger) - before
    for name in TABLES:
        if name in params:
            params[name][old:] = 0
    zeros = loss(larger) - before
    print(f"{run}: {before:.4f} nats a token; {COUNT} new tokens add {mean:.5f} as the mean of the table, "
          f"{zeros:.5f} as zeros")
    print(json.dumps({"loss": before, "mean": mean, "zeros": zeros, "tokens": COUNT}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tests/new_tokens.py RUN_FOLDER DATASET")
    main(*sys.argv[1:])
