"""Loss over fixed windows: every target counts once and the same."""

import contextlib
import hashlib
import json
import math
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import device
from checkpoint import file_sha256, load_model_tensors, own_sha256
from data.common import shard_header, write_dataset
from dataset import Mix, Tokens, read_manifest
from eval import evaluate, text_size
from export import NoOptimizer
from infer import load, stretch
from inference.samples import code, code_block
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer


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


def test_eval_runs_within_the_kernels_of_inference(call_script, tiny_run, monkeypatch):
    inside = []

    @contextlib.contextmanager
    def kernels(where):
        inside.append(where)
        yield

    forward = GPT.forward
    monkeypatch.setattr(device, "inference_kernels", kernels)
    monkeypatch.setattr(GPT, "forward", lambda *args, **options: (inside[0], forward(*args, **options))[1])
    code, _, err = call_script("eval.py", f"--out_dir={tiny_run}", "--device=cpu")
    assert code == 0 and inside == [torch.device("cpu")], err


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_given_back_and_dropout_is_off(model, tokens, training):
    model.train(training)
    results = [evaluate(model, tokens, 16, 2) for _ in range(2)]
    assert model.training == training and model.transformer.h[0].training == training
    assert results[0] == results[1]
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_a_compiled_model_reads_the_batches_of_full_size(model, tokens):
    """53 targets in windows of 16: a batch of three, and the rest, which would be compiled for itself alone."""
    shapes = []

    class Compiled(torch.nn.Module):  # which says of a model, as torch.compile's does, that it has no length
        def __len__(self):
            raise TypeError

        def forward(self, x, y, **options):
            shapes.append(tuple(x.shape))
            return model(x, y, **options)

    assert evaluate(model, tokens, 16, 3, compiled=Compiled()) == evaluate(model, tokens, 16, 3)
    assert shapes == [(3, 16)]


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
     ("--dataset=other", "tokenizer"), ("--dataset=damaged", "val_000000.bin"), ("--dataset=foreign", "token 60000"),
     ("--rope_scaling=yarn", "--rope_factor"), ("--rope_factor=2", "--rope_scaling"), ("--rope_scaling=dynamic", "ntk"),
     ("--rope_factor=0.5", "at least 1"), ("lose", "lose"), ("choice", "--data"), ("--alternatives=1", "alternatives")],
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


# -----------------------------------------------------------------------------
# Bits of text


BPE = BPETokenizer([*(bytes([i]) for i in range(256)), b"th", b"the", b" the", "é".encode(), "🙂".encode()[:2]])
TEXT = "the thé 🙂 — the end, ünd thé rest 🙂🙂\n" * 9


@pytest.mark.parametrize("tokenizer", [BPE, CharTokenizer.from_text(TEXT)], ids=["bpe", "char"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_characters_and_bytes_are_those_of_the_text(tokenizer, piece, tmp_path):
    """Characters of several tokens are counted once, special tokens not at all, in any pieces of the stream."""
    ids = tokenizer.encode(TEXT)
    ids = [*ids[:40], tokenizer.eos, *ids[40:]]
    (tmp_path / "val_000000.bin").write_bytes(shard_header(len(ids)) + np.array(ids, "<u2").tobytes())
    tokens = Tokens(tmp_path, "val", tokenizer.vocab_size)
    assert text_size(tokenizer, tokens, 0, len(ids), piece).tolist() == [len(TEXT), len(TEXT.encode())]
    assert text_size(tokenizer, tokens, 1, 33, piece)[1] == len(b"".join(tokenizer.pieces[i] for i in ids[1:33]))


def test_bits_per_character_and_byte(tmp_path):
    """The same nats on another scale; the first token is read, and not predicted. Of a mix each has its own."""
    model = GPT(GPTConfig(block_size=16, vocab_size=BPE.vocab_size, n_layer=1, n_head=2, n_embd=16)).eval()
    parts = []
    for name, text in (("a", TEXT), ("b", "plain " * 50)):
        (tmp_path / name).mkdir()
        ids = np.array(BPE.encode(text), "<u2")
        (tmp_path / name / "val_000000.bin").write_bytes(shard_header(len(ids)) + ids.tobytes())
        parts.append(Tokens(tmp_path / name, "val", BPE.vocab_size))
    a, b = (evaluate(model, part, 16, 4, tokenizer=BPE) for part in parts)
    first = BPE.pieces[BPE.encode(TEXT)[0]]
    assert (a["characters"], a["bytes"]) == (len(TEXT) - len(first), len(TEXT.encode()) - len(first))
    assert a["bits_per_character"] == pytest.approx(a["bits"] * a["tokens"] / a["characters"])
    assert a["bits_per_byte"] == pytest.approx(a["bits"] * a["tokens"] / a["bytes"]) and a["bytes"] > a["characters"]
    short = evaluate(model, parts[0], 16, 2, eval_iters=1, tokenizer=BPE)
    assert short["bytes"] == len(b"".join(BPE.pieces[i] for i in BPE.encode(TEXT)[1:33]))
    mix = evaluate(model, Mix([(parts[0], Fraction(1, 4)), (parts[1], Fraction(3, 4))]), 16, 4, tokenizer=BPE)
    assert mix["bits_per_byte"] == pytest.approx(a["bits_per_byte"] / 4 + 3 * b["bits_per_byte"] / 4)
    assert mix["bytes"] == a["bytes"] + b["bytes"]
    assert {k: v for k, v in a.items() if k in evaluate(model, parts[0], 16, 4)} == evaluate(model, parts[0], 16, 4)


def test_characters_are_printed_and_recorded(tiny_run, tiny_dataset, call_script):
    code, out, _ = call_script("eval.py", f"--out_dir={tiny_run}", "--device=cpu")
    line, last = out.splitlines()[-2:]
    result = json.loads(last)
    assert result["bits_per_character"] == result["bits_per_byte"] == pytest.approx(result["bits"])
    assert result["characters"] == result["bytes"] == result["tokens"]
    assert line.endswith(f"  bits per character {result['bits']:.4f}  bits per byte {result['bits']:.4f}")


# -----------------------------------------------------------------------------
# Samples


def prompts(tmp_path, *lines):
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    return f"--prompts={tmp_path / 'prompts.txt'}"


def test_samples_of_a_bank_of_prompts(tiny_run, tmp_path, call_script):
    """Learned positions: a prompt near the end of the context gets a short sample. The seed decides."""
    bank = prompts(tmp_path, "To be", "", "µ-law", "be: be: be: be:", "to" * 9)
    texts = []
    for name, more in (("1.md", []), ("2.md", []), ("3.md", ["--seed=5"])):
        words = [f"--out_dir={tiny_run}", bank, f"--out={tmp_path / name}", *more]
        code, out, err = call_script("eval.py", "prompts", *words)
        assert code == 0, err
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
        result = json.loads(out.splitlines()[-1])
        assert result["samples"] == 4 and result["left_out"] == ["µ-law", "to" * 9] and "2 skipped" in out
    assert texts[0] == texts[1] != texts[2]
    assert "step 6" in texts[0] and "seeds 1337 to 1338" in texts[0] and "temperature 0.8" in texts[0]
    weights = tiny_run / "ckpt" / "step_00000006" / "model.safetensors"
    assert file_sha256(weights)[:16] in texts[0]
    assert "cannot encode 'µ'" in texts[0] and "do not fit the context" in texts[0]
    blocks = texts[0].split("```text\n")[1:]
    assert [block.startswith("To be") for block in blocks] == [True, True, False, False]
    assert len(blocks[0].partition("\n```")[0]) > 5 and len({*blocks}) == 4


def test_samples_lie_in_the_run_if_not_elsewhere(tiny_run, tmp_path, call_script):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    for folder in (run, run / "ckpt" / "step_00000006"):
        code, _, err = call_script("eval.py", "prompts", f"--out_dir={folder}", "--num_samples=1", "--max_new_tokens=3")
        assert code == 0, err
        (run / "samples_step_6.md").unlink()
    assert checkpoint.verify(run / "ckpt" / "step_00000006")
    for argument, named in (("--prompts=gone.txt", "gone.txt"), ("--num_samples=0", "num_samples"),
                            ("--out=gone/x.md", "gone"), ("--temperature=-1", "temperature")):
        code, out, err = call_script("eval.py", "prompts", f"--out_dir={run}", argument)
        assert code == 2 and named in err and err.count("\n") == 1 and out == "", argument


@pytest.mark.parametrize("text", ["plain", "a `tick`", "``` ends", "`", "# no heading", " <b>", "````\n~~~\n```x"])
def test_code_is_code_whatever_is_in_it(text):
    """A fence longer than any run of backticks within, and as long a run on both sides of a span (CommonMark)."""
    block = code_block(text).split("\n")
    assert block[0] == block[-1] + "text" and set(block[-1]) == {"`"} and len(block[-1]) >= 3
    assert "\n".join(block[1:-1]) == text and block[-1] not in text
    span = code(text)
    marks = len(span) - len(span.lstrip("`"))
    inner = span[marks:-marks]
    assert span == "`` ` ``" if text == "`" else "`" * marks not in text and text in (inner, inner[1:-1])


# -----------------------------------------------------------------------------
# Tasks


def test_tasks_from_the_command_line(tiny_run, tmp_path, call_script):
    rows = [{"context": "to be", "choices": ["or", "not"], "answer": i % 2} for i in range(5)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "w.jsonl").write_text('{"text": "to be or not"}\n', encoding="utf-8")
    code, out, err = call_script("eval.py", "choice", f"--out_dir={tiny_run}", f"--data={tmp_path / 'q.jsonl'}")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["items"] == 5 and result["acc"] in (0.4, 0.6) and len(result["items_sha256"]) == 64
    assert f"acc {result['acc']:.4f} ± {result['acc_stderr']:.4f}" in out
    less = call_script("eval.py", "choice", f"--out_dir={tiny_run}", f"--data={tmp_path / 'q.jsonl'}", "--limit=3")[1]
    assert json.loads(less.splitlines()[-1])["items"] == 3
    code, out, err = call_script("eval.py", "lastword", f"--out_dir={tiny_run}", f"--data={tmp_path / 'w.jsonl'}")
    assert code == 0 and json.loads(out.splitlines()[-1])["perplexity"] > 1
    for words in (["choice", "--data=gone.jsonl"], ["choice", "--task=lambada"], ["lastword", "--task=piqa"],
                  ["choice", f"--data={tmp_path / 'w.jsonl'}"]):
        code, out, err = call_script("eval.py", *words, f"--out_dir={tiny_run}")
        assert code == 2 and out == "" and err.count("\n") == 1 and words[1].partition("=")[2] in err


# -----------------------------------------------------------------------------
# Long contexts


@pytest.fixture(scope="module")
def rotary(tmp_path_factory, tiny_dataset):
    """A run's folder with a model of rotary positions, context 8."""
    folder = tmp_path_factory.mktemp("rotary")
    tokenizer = load_tokenizer(tiny_dataset)
    config = GPTConfig(block_size=8, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, pos="rope",
                       rope_theta=100.0)  # with which YaRN treats pairs differently for another first length
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    state = {"step": 3, "val_loss": None, "model": vars(config), "config": {"dataset": str(tiny_dataset)}}
    checkpoint.save(folder, model, NoOptimizer(), state)
    tokenizer.save(folder)
    return folder


def test_loss_by_position(rotary, tiny_dataset, tmp_path, call_script):
    """Every target once, by its place in the window, in bins; for each length and kind of scaling, by one at a time."""
    code, out, err = call_script("eval.py", "context", f"--out_dir={rotary}", "--lengths=8,20", "--batch_size=5",
                                 "--bin_size=6")
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    kinds = [("none", 1.0), ("none", 1.0), ("linear", 2.5), ("ntk", 2.5), ("yarn", 2.5)]
    assert [(row["rope_scaling"], row["rope_factor"]) for row in rows] == kinds
    assert [row["length"] for row in rows] == [8, 20, 20, 20, 20]
    tokens = Tokens(tiny_dataset, "val")
    for row in rows:
        model = load(rotary)[0]
        if row["length"] > 8:
            stretch(model, model.config, row["rope_scaling"], 2.5)
        losses = losses_one_by_one(model, tokens, row["length"])
        assert row["tokens"] == len(losses) and row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        places = np.arange(len(losses)) % row["length"] // 6
        bins = [np.mean(np.array(losses)[places == i]) for i in range(-(-row["length"] // 6))]
        assert row["bins"] == pytest.approx(bins, rel=1e-5)
    assert len({row["loss"] for row in rows}) == 5


def test_a_longer_context_from_the_command_line(rotary, call_script):
    """The whole-split loss at that context; shorter lengths, and a factor of one, change nothing."""
    losses = {}
    none4 = ("--rope_scaling=none", "--rope_factor=4")
    for words in ((), ("--rope_scaling=yarn", "--rope_factor=1"), ("--rope_scaling=yarn", "--rope_factor=4"), none4,
                  (*none4, "--block_size=8")):
        code, out, err = call_script("eval.py", f"--out_dir={rotary}", *words)
        assert code == 0, err
        losses[words] = json.loads(out.splitlines()[-1])["loss"]
    plain, once, yarn, none, short = losses.values()
    assert plain == once == short and len({plain, yarn, none}) == 3
    _, out, _ = call_script("eval.py", "context", f"--out_dir={rotary}", "--lengths=32,8", "--rope_scaling=none,yarn")
    assert [row["loss"] for row in json.loads(out.splitlines()[-1])["rows"]] == pytest.approx([none, yarn, plain])
    _, out, _ = call_script("eval.py", "context", f"--out_dir={rotary}", "--lengths=8", "--rope_scaling=yarn",
                            "--rope_factor=4")
    assert json.loads(out.splitlines()[-1])["rows"][0]["loss"] != pytest.approx(plain)


def test_a_plot_of_it(rotary, tmp_path, monkeypatch, call_script):
    words = ["context", f"--out_dir={rotary}", "--lengths=8,16", f"--plot={tmp_path / 'plot.png'}"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = call_script("eval.py", *words)
    assert code == 2 and "pip install" in err and out == "" and err.count("\n") == 1
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    code, _, err = call_script("eval.py", *words)
    assert code == 0 and (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG", err
    code, out, err = call_script("eval.py", *words[:-1], "--plot=gone/plot.png")
    assert code == 2 and "gone" in err


def test_the_passkey_from_the_command_line(rotary, call_script):
    words = ["passkey", f"--out_dir={rotary}", "--lengths=60,40", "--rope_scaling=none,yarn", "--trials=2",
             "--alternatives=3", "--depths=0,1", "--sentence=that is the {key}."]
    code, out, err = call_script("eval.py", *words)
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [(row["length"], row["rope_scaling"], row["depth"]) for row in rows] == [
        (n, scaling, depth) for n in (60, 40) for scaling in ("none", "yarn") for depth in (0.0, 1.0)]
    assert call_script("eval.py", *words)[1] == out
    wrong = {"--lengths=20": "at least", "--sentence=no": "{key}", "--sentence={key} is it": "words",
             "--depths=2": "depths", "--lengths=9999999": "too few", "--sentence=§ {key}": "§",
             "--rope_factor=2": "--lengths=60 is more"}
    for argument, named in wrong.items():
        code, out, err = call_script("eval.py", *words, argument)
        assert code == 2 and named in err and err.count("\n") == 1, argument


@pytest.mark.parametrize("words", [["context", "--lengths=32"], ["passkey", "--lengths=64"],
                                   ["--rope_scaling=yarn", "--rope_factor=2"]])
def test_learned_positions_end_with_the_context(tiny_run, words, call_script):
    code, _, err = call_script("eval.py", *words, f"--out_dir={tiny_run}")
    assert code == 2 and "pos='rope'" in err and "block_size=16" in err and err.count("\n") == 1


def test_learned_positions_within_the_context(tiny_run, tiny_dataset, call_script):
    code, out, err = call_script("eval.py", "context", f"--out_dir={tiny_run}")
    row, = json.loads(out.splitlines()[-1])["rows"]
    whole = json.loads(call_script("eval.py", f"--out_dir={tiny_run}")[1].splitlines()[-1])
    assert code == 0 and row["loss"] == pytest.approx(whole["loss"]) and row["tokens"] == whole["tokens"]
    mix = f"--dataset={tiny_dataset}:0.5,{tiny_dataset}/:0.5"
    code, _, err = call_script("eval.py", "context", f"--out_dir={tiny_run}", mix)
    assert code == 2 and "--dataset" in err
