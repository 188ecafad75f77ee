"""
Evaluate a checkpoint: loss over the fixed windows of a split, perplexity, bits per token.

    python eval.py --out_dir=out/shakespeare_char
"""

import contextlib
import itertools
import json
import math

import torch

from configurator import configure, fail
from device import autocast, pick_device, pick_dtype
from infer import load
from loader import fixed_batches, open_datasets, open_tokens, sha256
from monitor import plain
from weights import convert

# -----------------------------------------------------------------------------
out_dir = "out"     # run folder, or one checkpoint's folder
ckpt = "latest"     # which checkpoint: latest | best | a step
dataset = ""        # name under data/, a folder, or a mix a:0.7,b:0.3; empty: what it was trained on
split = "val"       # train | val
block_size = 0      # tokens per window; 0: the model's
batch_size = 64     # windows at once
eval_iters = 0      # batches of windows; 0: the whole split
device = "auto"     # auto | cpu | cuda | cuda:N | mps
dtype = "float32"   # float32 | bfloat16 | float16 | auto; fp32 compares between machines
quantize = ""       # int8: the weights as sample.py would have them; empty: as they are
# -----------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tokens, block_size, batch_size, eval_iters=0, context=contextlib.nullcontext, rank=0, ranks=1,
             collect=lambda sums: [sums]):
    """Mean cross-entropy of `model` over the fixed windows of `tokens`, in nats per token.

    Each window is read from its start, so its first tokens have little context: losses compare at equal block_size.
    Of a mix of datasets, each is evaluated by itself and the losses are weighted as the mix is. Of several `ranks`,
    each takes every so many-th batch, and `collect` gives all of them the sums of all: added in the order of the
    batches, so that the result is one rank's.
    -> {"loss", "perplexity", "bits" (per token), "tokens" (predicted), "tokens_sha256"}: losses compare where the last
    two, which say what was read, are equal.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, tokens_read, digests = 0.0, 0, []
    for part, weight in tokens.parts:
        sums, count = [], 0
        batches = fixed_batches(part, block_size, batch_size, eval_iters)
        while together := list(itertools.islice(batches, ranks)):
            x, y = together[min(rank, len(together) - 1)]  # all take part in a sharded model's pass
            n = int((y != -1).sum())
            with context():
                _, mean = model(x.to(device), y.to(device), loss_only=True)
            # a sum over tokens: a mean of means would weigh the tail's tokens more
            sums.append(mean.item() * n if rank < len(together) else 0.0)
            count += sum(int((y != -1).sum()) for _, y in together)
        total = 0.0
        for in_turn in zip(*collect(sums), strict=True):
            for one in in_turn:
                total += one
        loss += float(weight) * total / count
        tokens_read += count
        digests.append(part.sha256_of(count + 1))  # the windows lie one behind the other from the first token on
    model.train(was_training)
    digest = digests[0] if len(digests) == 1 else sha256("".join(digests).encode())
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits": loss / math.log(2), "tokens": tokens_read,
            "tokens_sha256": digest}


def main():
    if split not in ("train", "val") or batch_size < 1 or eval_iters < 0:
        fail("split is train or val, batch_size at least 1, eval_iters at least 0")
    try:
        where = pick_device(device)[0]
        context = autocast(where, pick_dtype(dtype, where)[0])
        model, tokenizer, state, folder = load(out_dir, ckpt, where)
        found, manifest, dataset_sha256 = open_datasets(dataset or state["config"]["dataset"])
        tokens = open_tokens(found, split, model.config.vocab_size)
        if tokenizer and manifest.get("tokenizer", {}).get("sha256", tokenizer.sha256) != tokenizer.sha256:
            fail(f"{found[0][0]} was prepared with another tokenizer than {folder} was trained with: their ids differ")
        if not 0 <= block_size <= model.config.block_size:
            fail(f"--block_size={block_size}: the model sees at most {model.config.block_size} tokens")
        if quantize:
            convert(model, torch.float32, quantize)
        result = evaluate(model, tokens, block_size or model.config.block_size, batch_size, eval_iters, context)
    except (ValueError, OSError) as e:  # CheckpointError and DataError are ValueErrors
        fail(e)
    unit = "character" if tokenizer and tokenizer.kind == "char" else "token"
    print(f"{folder} on {result['tokens']:,} tokens of {tokens.folder}, split {split}:")
    print(f"loss {result['loss']:.4f}  perplexity {result['perplexity']:.3f}  bits per {unit} {result['bits']:.4f}")
    print(json.dumps({**plain(result), "step": state["step"], "split": split, "dataset_sha256": dataset_sha256}))


if __name__ == "__main__":
    configure(globals())
    main()
