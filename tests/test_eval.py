"""Loss over fixed windows: every target counts once and the same."""

import hashlib
import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoint import file_sha256, load_model_tensors, own_sha256
from data.common import shard_header, write_dataset
from eval import evaluate
from loader import Mix, Tokens, read_manifest
from model import GPT, GPTConfig
from tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=30, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # losses that differ from token to token
    return model


@pytest.fixture
def tokens(tmp_path):
    """Three and a bit windows of 16: 53 targets."""
    ids = np.random.default_rng(0).integers(0, 30, 54).astype("<u2")
    (tmp_path / "val_000000.bin").write_bytes(shard_header(54) + ids.tobytes())
    return Tokens(tmp_path, "val", 30)


def losses_one_by_one(model, tokens, block_size, windows=None):
    """The loss of every target, float64, each window by itself."""
    ids = torch.from_numpy(tokens.read([0], len(tokens))[0].astype(np.int64))
    model.eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, block_size)[:windows]:
            x, y = ids[start : start + block_size + 1][:-1], ids[start + 1 : start + block_size + 1]
            log_p = torch.log_softmax(model(x[None])[0][0].double(), -1)
            losses += [-log_p[i, target].item() for i, target in enumerate(y)]
    return losses


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("block_size", [16, 5])
def test_the_mean_over_all_targets(model, tokens, block_size, batch_size):
    losses = losses_one_by_one(model, tokens, block_size)
    result = evaluate(model, tokens, block_size, batch_size)
    assert result["tokens"] == len(losses) == 53
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result["bits"] == pytest.approx(np.mean(losses) / math.log(2), rel=1e-6)


def test_a_mean_of_means_would_be_seen(model, tokens):
    losses = losses_one_by_one(model, tokens, 16)
    means = np.mean([np.mean(losses[i : i + 16]) for i in range(0, 53, 16)])
    assert evaluate(model, tokens, 16, 1)["loss"] != pytest.approx(means, rel=1e-4)


def test_limit_takes_the_first_batches(model, tokens):
    for eval_iters, windows in ((1, 2), (2, 4), (9, 4)):
        losses = losses_one_by_one(model, tokens, 16, windows)
        result = evaluate(model, tokens, 16, 2, eval_iters)
        assert result["tokens"] == len(losses)
        assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_given_back_and_dropout_is_off(model, tokens, training):
    model.train(training)
    results = [evaluate(model, tokens, 16, 2) for _ in range(2)]
    assert model.training == training and model.transformer.h[0].training == training
    assert results[0] == results[1]
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_evaluating_draws_no_random_numbers(model, tokens):
    before = torch.get_rng_state()
    evaluate(model.train(), tokens, 16, 2)
    assert torch.equal(torch.get_rng_state(), before)


# -----------------------------------------------------------------------------
# The script


def test_the_script_finds_what_training_found(tiny_run, tiny_dataset, call_script):
    losses = [json.loads(line).get("val_loss") for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    code, out, err = call_script("eval.py", f"--out_dir={tiny_run}", "--device=cpu")
    *table, last = out.splitlines()
    result = json.loads(last)
    assert code == 0 and err == ""
    assert result["loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert result["step"] == 6 and result["split"] == "val"
    assert result["tokens"] == len(Tokens(tiny_dataset, "val")) - 1
    assert result["dataset_sha256"] == read_manifest(tiny_dataset)[1]
    assert f"loss {result['loss']:.4f}" in table[1] and "step_00000006" in table[0]


def test_split_limit_and_checkpoint(tiny_run, call_script):
    code, out, _ = call_script("eval.py", f"--out_dir={tiny_run}", "--device=cpu", "--ckpt=3", "--split=train",
                               "--eval_iters=2", "--batch_size=3", "--block_size=8")
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert (result["step"], result["split"], result["tokens"]) == (3, "train", 2 * 3 * 8)


def test_a_loss_that_is_no_number_is_null(tiny_run, tmp_path, call_script):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    folder = run / "ckpt" / "step_00000006"
    save_file({k: t * math.nan for k, t in load_model_tensors(folder).items()}, folder / "model.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["files"]["model.safetensors"] = file_sha256(folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps({**state, "sha256": own_sha256(state)}))
    code, out, _ = call_script("eval.py", f"--out_dir={run}", "--device=cpu")

    def not_json(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert code == 0 and json.loads(out.splitlines()[-1], parse_constant=not_json)["loss"] is None


def other_datasets(folder):
    """A dataset with more characters, one with other characters, one that is damaged."""
    for name, text in {"more": "abcdefghijklmnopqrstuvwxyzABCDEFG" * 9, "other": "xyz\n" * 99}.items():
        tokenizer = CharTokenizer.from_text(text)
        ids = tokenizer.encode_array(text)
        write_dataset(folder / name, {"train": ids, "val": ids}, tokenizer, {}, {}, {})
    shutil.copytree(folder / "other", folder / "damaged")
    (folder / "damaged" / "val_000000.bin").write_bytes(b"short")
    (folder / "foreign").mkdir()
    np.full(100, 60_000, dtype="<u2").tofile(folder / "foreign" / "val.bin")


@pytest.mark.parametrize(
    "argument, named",
    [("--out_dir=missing", "missing"), ("--ckpt=nonsense", "nonsense"), ("--split=test", "split"),
     ("--dataset=nowhere", "nowhere"), ("--block_size=17", "block_size=17"), ("--block_size=-1", "block_size=-1"),
     ("--batch_size=0", "batch_size"), ("--eval_iters=-1", "eval_iters"), ("--device=tpu", "tpu"),
     ("--dtype=int8", "int8"), ("--spilt=val", "--split"), ("--dataset=more", "tokenizer"),
     ("--dataset=other", "tokenizer"), ("--dataset=damaged", "val_000000.bin"), ("--dataset=foreign", "token 60000")],
)
def test_errors_are_one_line(tiny_run, tmp_path, monkeypatch, call_script, argument, named):
    other_datasets(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = call_script("eval.py", f"--out_dir={tiny_run}", argument)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err


def test_help(call_script):
    code, out, _ = call_script("eval.py", "--help")
    assert code == 0 and "--eval_iters=0" in out


def test_a_mix_is_weighed_and_every_result_says_what_was_read(model, tokens, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    ids = np.random.default_rng(1).integers(0, 30, 200).astype("<u2")
    (other / "val_000000.bin").write_bytes(shard_header(200) + ids.tobytes())
    other = Tokens(other, "val", 30)
    one, two = (evaluate(model, part, 16, 2, eval_iters=1) for part in (tokens, other))
    both = evaluate(model, Mix([(tokens, Fraction(3, 4)), (other, Fraction(1, 4))]), 16, 2, eval_iters=1)
    assert both["loss"] == pytest.approx(0.75 * one["loss"] + 0.25 * two["loss"]) and both["tokens"] == 64
    assert one["tokens_sha256"] == hashlib.sha256(tokens.read([0], 33).tobytes()).hexdigest()
    assert len({one["tokens_sha256"], two["tokens_sha256"], both["tokens_sha256"]}) == 3
    assert evaluate(model, tokens, 16, 2)["tokens_sha256"] == tokens.sha256_of(54)


def test_int8_is_evaluated_as_it_is_sampled(tiny_run, call_script):
    losses = []
    for more in ([], ["--quantize=int8"]):
        code, out, err = call_script("eval.py", f"--out_dir={tiny_run}", *more)
        assert code == 0, err
        losses.append(json.loads(out.splitlines()[-1])["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)
    code, out, err = call_script("eval.py", f"--out_dir={tiny_run}", "--quantize=int3")
    assert code == 2 and "int3" in err and err.count("\n") == 1
