"""Benchmarks: the figures are those of the run folders, and no benchmark writes into an older run's folder."""

import json
import random
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_tokenizer import RANKS, needs_ranks

from benchmarks import common, step
from benchmarks.common import timed
from benchmarks.inference import llama_cpp_of
from benchmarks.training import typical
from configurator import Settings
from model import GPT, GPTConfig

pytest_plugins = ["runs"]

KEYS = ("seed", "val_loss", "train_s", "step_ms", "data_ms", "forward_ms", "backward_ms", "optim_ms", "tok_per_s")


@pytest.fixture(scope="module")
def bench(run_script, tiny_settings, tmp_path_factory):
    """bench(seeds, out_dir) -> the finished process of `python bench.py train` on the tiny model."""
    config = tmp_path_factory.mktemp("config") / "tiny.py"
    settings = [word.removeprefix("--").split("=", 1) for word in tiny_settings]
    text = {"dataset", "device", "dtype"}
    values = {key: repr(value) if key in text else value.replace("false", "False") for key, value in settings}
    config.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), encoding="utf-8")

    def bench(seeds, out_dir, *words):
        return run_script("bench.py", "train", f"--config={config}", f"--seeds={seeds}", f"--out_dir={out_dir}", *words)

    bench.config = config
    # the same command for call_script, which runs it in this process; --out_dir is still to be added
    bench.words = lambda seeds: ["bench.py", "train", f"--config={config}", f"--seeds={seeds}"]
    return bench


@pytest.mark.slow
def test_figures_are_those_of_the_runs(bench, call_script, tmp_path):
    done = bench("1,2", tmp_path, "--overrides=max_iters=8,eval_interval=4")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    assert [run["seed"] for run in result["runs"]] == [1, 2] and result["settings"]["overrides"][0] == "max_iters=8"
    for run in result["runs"]:
        lines = (tmp_path / f"tiny_seed{run['seed']}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert run["steps"] == records[-1]["step"] == 8 and run["train_s"] == records[-1]["wall_s"]
        assert run["step_ms"] == statistics.median(r["step_ms"] for r in records)
        assert run["commit"] is None or len(run["commit"]) == 40
        row = next(line for line in table if line.split()[0] == str(run["seed"]))
        assert row.split()[1] == f"{run['val_loss']:.4f}"
    losses = [run["val_loss"] for run in result["runs"]]
    assert losses[0] != losses[1]
    assert result["val_loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert result["val_loss"]["stdev"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert table[1].split() == list(KEYS)

    code, _, err = call_script(*bench.words("2,3"), f"--out_dir={tmp_path}")  # the folder of seed 2 exists
    assert code == 2 and "tiny_seed2 exists" in err


@pytest.mark.parametrize(
    "seeds, words, named",
    [
        ("()", (), "--seeds is empty"),
        ("1", ("--config=config/none.py",), "no config file config/none.py"),
    ],
)
def test_mistakes_are_named(seeds, words, named, bench, call_script, tmp_path):
    code, _, err = call_script(*bench.words(seeds), f"--out_dir={tmp_path / 'out'}", *words)
    assert code == 2 and named in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_train_py_names(bench, tmp_path):
    done = bench("1", tmp_path / "out", "--overrides=max_itres=8")
    assert done.returncode == 2 and "unknown key --max_itres" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_a_gpu_is_given_is_timed_until_it_has_run(monkeypatch):
    """Kernels run after they are launched, so the clock waits for all of them before it starts and before it stops."""
    said = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: said.append("waited"))
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: said.append("clock") or len(said)))
    timed(lambda: said.append("launched"), torch.device("cuda"))
    assert said == ["waited", "clock", "launched", "waited", "clock"]
    said.clear()
    timed(lambda: said.append("done"), torch.device("cpu"))
    assert said == ["clock", "done", "clock"]


def test_a_part_that_was_not_recorded_is_not_known():
    record = {"step_ms": 14.0, "data_ms": 1.0, "forward_ms": 2.0, "backward_ms": 3.0, "optim_ms": 4.0, "tok_per_s": 10,
              "mfu": None}
    found = typical([record, {**record, "optim_ms": 8.0, "comm_ms": 5.0}, {**record, "optim_ms": 9.0}])
    assert found["step_ms"] == 14.0 and found["optim_ms"] == 8.0 and found["tok_per_s"] == 10
    assert found["comm_ms"] == 5.0 and found["mfu"] is None  # the median of one value; of none
    piped = {"step_ms": 12.0, "data_ms": 1.0, "pipeline_ms": 6.0, "optim_ms": 4.0, "tok_per_s": 10, "mfu": 0.5}
    assert typical([piped])["step_ms"] == 12.0 and typical([piped])["forward_ms"] is None


@pytest.mark.parametrize(
    "words, named",
    [
        (["scaling", "--worlds=0"], "must be at least 1"),
        (["scaling", "--warm_up=0", "--updates=1"], "two together"),
        (["scaling", "--overrides=batch_size=3"], "--overrides=batch_size=3"),
        (["zero", "--worlds=()"], "worlds must be at least 1"),
        (["zero", "--shape=2,3,64"], "64"),
        (["activations", "--device=tpu"], "device='tpu'"),
        (["infer", "--forms=float32,fp4"], "--forms=fp4"),
        (["step", "--forms=int8"], "step takes float32 and bfloat16"),
        (["step", "--step_model=gpt3"], "--step_model=gpt3"),
        (["step", "--overrides=batch_size=0"], "--overrides=batch_size=4"),
        (["step", "--overrides=n_embd=15"], "n_embd=15"),
        (["step", "--peer_nanogpt=none"], "--peer_nanogpt=none has no model.py: it is the folder that git clone"),
    ],
)
def test_what_cannot_be_measured_is_one_line(call_script, bench, tmp_path, words, named):
    code, _, err = call_script("bench.py", *words, f"--config={bench.config}", f"--out_dir={tmp_path / 'out'}")
    assert code == 2 and named in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_grid_of_processes_has_equal_work_and_its_efficiency(bench, run_script, tmp_path):
    words = ["--batches=2", "--lengths=8", "--worlds=1,2", "--warm_up=1", "--updates=2", "--rounds=1"]
    done = run_script("bench.py", "scaling", f"--config={bench.config}", *words, f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["processes"], row["micro_batches"]): row for row in result["rows"]}
    assert list(rows) == [(1, 1), (1, 2), (2, 2)] and not result["missing"]
    for (ranks, micro_batches), row in rows.items():
        folder = tmp_path / f"tiny_b2_t8_p{ranks}_m{micro_batches}_0"
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["tokens"] for r in records] == [2 * 8 * micro_batches * n for n in (1, 2, 3)]
        assert row["tok_per_s"] == statistics.median(r["tok_per_s"] for r in records[1:])
        assert row["peak_mb"] == 1000 * records[1]["mem_gb"] and row["mfu_%"] > 0
        assert not (folder / "ckpt").exists()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["threads"] == 1  # as tiny has it
    alone, twice, both = rows.values()
    assert alone["comm_ms"] is None and both["comm_ms"] >= 0
    assert alone["strong_%"] is None and both["strong_%"] == pytest.approx(50 * both["tok_per_s"] / twice["tok_per_s"])
    assert twice["weak_%"] is None and both["weak_%"] == pytest.approx(50 * both["tok_per_s"] / alone["tok_per_s"])
    row = next(line for line in done.stdout.splitlines() if line.startswith("|      8 |     2 |         2 |"))
    assert [cell.strip() for cell in row.split("|")][5] == f"{both['tok_per_s']:.1f}"


@pytest.mark.slow
def test_zero_holds_what_theory_says_and_its_peak_is_beside_it(run_script):
    done = run_script("bench.py", "zero", "--worlds=2", "--shape=2,2,64", "--tokens=64", "--device=cpu")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["layout"] for row in rows] == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    whole = rows[0]["weights_mb"]
    for row in rows:
        share = whole / (1 if row["layout"] == "DDP" else 2)
        assert row["weights_mb"] == pytest.approx(share, rel=0.05) == row["gradients_mb"]
        assert row["optimizer_mb"] == pytest.approx(2 * share, rel=0.05)
        assert row["of_theory_%"] == pytest.approx(100, abs=5)
        assert row["peak_mb"] > row["weights_mb"] + row["optimizer_mb"] and row["plan_mb"] > row["theory_mb"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents as long as those of a real corpus."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(2000)]
    texts = ["\n".join(" ".join(rng.choices(words, k=12)) for _ in range(300)) for _ in range(5)] + ["é" * 20_000]
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@needs_ranks
@pytest.mark.slow
def test_preparing_data_is_timed_beside_the_recipe(corpus, run_script, call_script, tmp_path):
    words = [f"--input={corpus}", "--sizes=1,2", "--workers=1,2", "--rounds=1", f"--out_dir={tmp_path / 'out'}"]
    done = run_script("bench.py", "data", *words, MINICHAT_MIRROR=str(RANKS.parent))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["settings"]["input"] == "documents.jsonl" and 2 < result["megabytes"] < 2.2
    names = [f"{dedup}, {n} workers" for dedup in ("none", "exact", "near") for n in (1, 2)] + ["nanoGPT's recipe"]
    assert [row["what"] for row in result["rows"]] == names and set(result["ratios"]) == set(names[:-1])
    for row in result["rows"]:
        assert row["MB/s"] == pytest.approx(result["megabytes"] / row["seconds"]) and row["peak MB"] > 20
    assert [row["corpus MB"] for row in result["memory"]] == [1, 2]
    ours, theirs = (np.fromfile(path, dtype="<u2") for path in (
        tmp_path / "out" / "made" / "train_000000.bin", tmp_path / "out" / "recipe" / "train.bin"))
    made = json.loads((tmp_path / "out" / "made" / "manifest.json").read_text(encoding="utf-8"))
    total = sum(split["tokens"] for split in made["splits"].values())
    both = len(theirs) + (tmp_path / "out" / "recipe" / "test.bin").stat().st_size // 2
    assert total == both and len(ours) > 1000, "the recipe makes the same number of tokens from the same text"
    code, _, err = call_script("bench.py", "data", *words)
    assert code == 2 and "exists" in err


@pytest.mark.slow
def test_the_loader_is_timed_and_its_wait_is_a_share(bench, run_script, tmp_path):
    config = bench.config
    done = run_script("bench.py", "loader", f"--config={config}", "--reads=20", "--rounds=2", f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    lines = (tmp_path / "tiny_loader" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    parts = ("data_ms", "forward_ms", "backward_ms", "optim_ms")
    whole = sum(r[part] for r in records for part in parts)
    assert result["waiting"] == pytest.approx(sum(r["data_ms"] for r in records) / whole)
    assert all(len(result["all"][name]) == 2 and result["tokens_per_s"][name] > 0 for name in ("minichat", "nanoGPT"))


@pytest.mark.slow
def test_the_share_of_logging_and_probes_is_that_of_the_same_steps(bench, run_script, tmp_path):
    words = [f"--config={bench.config}", "--rounds=2", f"--out_dir={tmp_path}", "--overrides=probe_interval=2"]
    done = run_script("bench.py", "monitor", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    without, configured = result["rows"]
    assert without["steps"] == configured["steps"] == 6 and len(without["rounds_ms"]) == 2
    assert result["share"] == pytest.approx(configured["mean_ms"] / without["mean_ms"] - 1)
    assert f"{result['share']:.2%} of a step" in done.stdout
    with_probes, none = ((tmp_path / f"monitor_{way}_0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                         for way in ("as", "without"))
    assert sum("attn_entropy" in line for line in with_probes) == 3 and len(with_probes) == 6
    assert len(none) == 1 and "attn_entropy" not in none[0]


@pytest.mark.slow
def test_activations_that_are_computed_again_are_not_held(run_script):
    done = run_script("bench.py", "activations", "--shape=6,4,256", "--device=cpu")
    assert done.returncode == 0, done.stderr
    none, selective, full = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert none["gradients"] == selective["gradients"] == full["gradients"]
    assert none["activations_mb"] > selective["activations_mb"] > full["activations_mb"] > 0
    assert full["peak_mb"] < none["peak_mb"]


def test_a_recipe_needs_documents(call_script, tmp_path):
    code, _, err = call_script("bench.py", "data", f"--out_dir={tmp_path / 'out'}")
    assert code == 2 and "--input is missing" in err and not (tmp_path / "out").exists()


def test_a_corpus_needs_a_long_document(call_script, tmp_path):
    (tmp_path / "short.txt").write_text("short\n" * 100)
    code, _, err = call_script("bench.py", "data", f"--out_dir={tmp_path / 'out'}", f"--input={tmp_path / 'short.txt'}")
    assert code == 2 and "no document of 15,000 characters" in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_inference_of_checkpoints(run_script, call_script, tiny, tmp_path):
    for name, heads in (("all", 0), ("one", 1)):
        done = tiny(tmp_path / name, max_iters=1, warmup_iters=0, n_kv_head=heads)
        assert done.code == 0, done.err
    words = ["--forms=float32", "--batches=2", "--prompts=4", "--new_tokens=2", "--rounds=1", "--device=cpu",
             "--compiled=false"]
    done = run_script("bench.py", "infer", *words, f"--models={tmp_path / 'all'},{tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    every, one = result["rows"]
    assert (every["model"], one["model"]) == ("all", "one") and every["kv_heads"] > one["kv_heads"] == 1
    assert every["kv_mb"] == pytest.approx(every["kv_heads"] * one["kv_mb"])
    assert not [key for other in result["others"] for key in other if key.startswith(("plain", "crowd"))]
    for more, named in ((f"--models={tmp_path / 'none'}", "none"), ("--prompts=4,512", "has a context of")):
        code, _, err = call_script("bench.py", "infer", *words, f"--models={tmp_path / 'all'}", more)
        assert code == 2 and err.count("\n") == 1 and named in err, err


@pytest.mark.parametrize("life", ["pass", "os.abort()"])
def test_a_peer_that_ends_takes_nothing_with_it(life, tmp_path, monkeypatch, capfd):
    """llama.cpp's q8_0 crashes on a Xeon with AMX."""
    (tmp_path / "llama_cpp.py").write_text(f"""
import itertools, os
class Llama:
    def __init__(self, path, **settings):
        assert os.path.getsize(path) > 0 and settings["use_mmap"] is False
    def reset(self): pass
    def close(self): pass
    def generate(self, ids, **settings):
        assert len(ids) == 5
        {life}
        return itertools.count()
""", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8, vocab_size=50257))
    c = Settings({"peer_llama": sys.executable, "prompts": (5,), "new_tokens": 24})
    peers = llama_cpp_of(c, model, "float32")
    if life == "pass":
        first_s, token_s = peers["llama.cpp, prompt of 5"]()
        assert first_s > 0 and token_s > 0
    else:
        assert peers == {} and "warning: llama.cpp ended without a figure for float32" in capfd.readouterr().err
    assert llama_cpp_of(c.changed(peer_llama=""), model, "float32") == {}


@pytest.mark.slow
def test_inference_is_timed_beside_the_plain_way(run_script):
    words = ["--forms=float32,int8", "--kv_heads=12,1", "--batches=1,2", "--prompts=4,8", "--new_tokens=2",
             "--compiled=false"]
    done = run_script("bench.py", "infer", *words, "--rounds=1", "--crowd=3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["rows"]) == 16 and result["read_gb_per_s"] > 0
    for row in result["rows"]:
        assert row["tok_per_s"] == pytest.approx(1000 * row["batch"] / row["token_ms"]) and row["first_ms"] > 0
        assert row["kv_mb"] == pytest.approx(
            2 * 12 * row["kv_heads"] * 64 * 4 * row["batch"] * (row["prompt"] + 2) / 1e6)
    sizes = {(row["form"], row["kv_heads"]): row["weights_mb"] for row in result["rows"]}
    # a scale of 16 bits for each 32 weights, or without a C++ compiler one for each row
    assert 4 / 1.063 < sizes["float32", 12] / sizes["int8", 12] < 4.01
    first, *_ = result["others"]
    assert first["gain"] == pytest.approx(first["one_by_one_s"] / first["at_once_s"]) and first["crowd"] == 3
    assert {"linear_ms", "plain, ms", "plain, prompt of 8, ms", "transformers, batch 1, ms"} <= first.keys()
    for other in result["others"]:
        assert other["kv_pool_mb"] == other["kv_pool_formula_mb"]


# -----------------------------------------------------------------------------
# step

NANOGPT = """
# A model with the interface of nanoGPT's model.py.
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print(config)
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("optimizer", weight_decay, learning_rate, betas, device_type)
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, idx, targets):
        logits = F.linear(self.table(idx), self.table.weight)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
"""


@pytest.mark.slow
def test_an_update_is_timed_beside_nanogpts(run_script, tmp_path):
    """GPT-2's 124M, made small: its batch and its optimizer stay, and nanoGPT's model has the same sizes."""
    folder = tmp_path / "nano"
    folder.mkdir()
    (folder / "model.py").write_text(NANOGPT, encoding="utf-8")
    done = run_script(
        "bench.py", "step", f"--peer_nanogpt={folder}", "--forms=float32,int8", "--rounds=2", "--updates=2",
        "--warm_up=1", "--overrides=n_layer=1,n_head=2,n_embd=16,block_size=8,vocab_size=50", "--device=cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["settings"]["peer_nanogpt"] == "nano" and str(tmp_path) not in done.stdout
    assert "GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16, dropout=0.0, bias=False)" in (
        done.stderr), "what nanoGPT prints is no part of the benchmark's output"
    assert "optimizer 0.1 0.0006 (0.9, 0.95) cpu" in done.stderr
    row, = result["rows"]  # int8 trains nothing
    assert row["weights"] == "float32" and len(row["ratios"]) == 2
    assert row["ratio"] == pytest.approx(statistics.median(row["ratios"]))
    assert row["tok_per_s"] > 0 and row["nanogpt_tok_per_s"] > 0
    assert row["mem_gb"] > 0 and row["nanogpt_mem_gb"] > 0
    assert done.stdout.startswith("1 layers of 16, 2 heads, 4 x 8 tokens, cpu")
    assert "nanogpt_tok_per_s" in done.stdout.splitlines()[1]


def test_an_update_of_a_config_has_its_parts_and_operators(bench, call_script):
    code, out, err = call_script("bench.py", "step", f"--config={bench.config}", "--forms=bfloat16", "--rounds=1",
                                 "--updates=2", "--warm_up=0", "--device=cpu")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    row, = result["rows"]
    assert row.keys() == {"weights", "tok_per_s", "forward_ms", "backward_ms", "optim_ms", "mem_gb"}
    assert result["settings"]["step_model"] == "config" and out.startswith("1 layers of 16, 2 heads, 4 x 16 tokens")
    kinds = [operation["kind"] for operation in result["operations"]]
    assert {"matrix products", "softmax and loss", "norms", "optimizer"} <= set(kinds)
    assert sum(operation["share"] for operation in result["operations"]) == pytest.approx(100)
    times = [operation["ms"] for operation in result["operations"]]
    assert times == sorted(times, reverse=True)
    products = result["operations"][kinds.index("matrix products")]
    assert "mm" in products["largest"] and len(products["largest"].split(", ")) == 3


def test_a_process_that_dies_ends_the_benchmark(capsys):
    trainer = step.Trainer(step.our_updates, step.Job({}, None, 0, "float32", "no device", ""))
    with pytest.raises(SystemExit):
        trainer.ask(step.make_updates, 1)
    assert "the process of our_updates ended without a result" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, operators",
    [
        ("matrix products", "aten::mm aten::addmm aten::bmm aten::baddbmm aten::linear mkldnn::_mkldnn_reshape"),
        ("attention", "aten::_scaled_dot_product_flash_attention_for_cpu_backward aten::scaled_dot_product_attention"),
        ("softmax and loss", "aten::_log_softmax aten::_softmax_backward_data minichat::linear_cross_entropy exp_"),
        ("norms", "aten::native_layer_norm_backward aten::_fused_rms_norm aten::linalg_vector_norm _foreach_norm"),
        ("optimizer", "aten::_fused_adamw_ aten::_foreach_lerp_ Optimizer.step#AdamW.step"),
        ("copies and casts", "aten::copy_ aten::_to_copy aten::to aten::cat aten::fill_ aten::clone"),
        ("element-wise, sums", "aten::mul_ aten::gelu_backward aten::sum aten::native_dropout aten::relu"),
        ("the rest", "aten::view aten::embedding_dense_backward MmBackward0 aten::empty_strided"),
    ],
)
def test_an_operators_kind_follows_from_its_name(kind, operators):
    assert {name: step.kind_of(name) for name in operators.split()} == dict.fromkeys(operators.split(), kind)


def test_the_shares_of_operators_are_of_all():
    times_ms = {"aten::mm": 6.0, "aten::addmm": 1.0, "aten::bmm": 0.5, "aten::linear": 0.25, "aten::view": 2.25}
    assert step.operation_rows("float32", times_ms) == [
        {"weights": "float32", "kind": "matrix products", "share": 77.5, "ms": 7.75,
         "largest": "mm 6.0, addmm 1.0, bmm 0.5"},
        {"weights": "float32", "kind": "the rest", "share": 22.5, "ms": 2.25, "largest": "view 2.2"},
    ]
