"""Rows of conversations, from the files beside the shards to an update of train.py."""

import json
import math
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ROOT, differences, one_error, outcome, records

import checkpoint
from common import shard_header
from dataset import BITS, DataError, Mix, Tokens, open_datasets, open_tokens, verify_shards
from eval import evaluate
from files import file_sha256
from infer import load
from loader import Loader, fixed_batches
from tokenizer import load_tokenizer

pytest_plugins = ["runs"]

T = 16


def random_rows(n, seed=0, vocab_size=50):
    """(ids, learned, begins) of `n` rows of T tokens: two or three conversations in each, their second halves learned.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, (n, T)).astype(np.uint16)
    learned = np.zeros((n, T), bool)
    begins = np.zeros((n, T), bool)
    for i in range(n):
        cuts = [0, *sorted(rng.choice(np.arange(3, T - 2), rng.integers(1, 3), replace=False).tolist()), T]
        for a, b in zip(cuts, cuts[1:], strict=False):
            begins[i, a] = True
            learned[i, (a + b) // 2 : b] = True
        learned[i, 0] = False
    return ids, learned, begins


def write_rows(folder, ids, learned, begins, split="train", cuts=()):
    """Rows (n, T) as a split of a dataset, its shards cut before each of `cuts` (rows)."""
    folder.mkdir(exist_ok=True)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"rows": {"block_size": ids.shape[1]}, "splits": {}}
    shards = []
    parts = zip(*(np.split(array, cuts) for array in (ids, learned, begins)), strict=True)
    for i, (tokens, *bits) in enumerate(parts):
        file = folder / f"{split}_{i:06d}.bin"
        file.write_bytes(shard_header(tokens.size) + tokens.astype("<u2").tobytes())
        entry = {"file": file.name, "tokens": tokens.size, "sha256": file_sha256(file)}
        for name, array in zip(BITS, bits, strict=True):
            beside = file.with_suffix(f".{name}")
            beside.write_bytes(np.packbits(array, bitorder="little").tobytes())
            entry[name] = {"file": beside.name, "sha256": file_sha256(beside)}
        shards.append(entry)
    manifest["splits"][split] = {"tokens": ids.size, "shards": shards}
    path.write_text(json.dumps(manifest))
    return folder


# -----------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4, 11)])
def test_bits_belong_to_their_tokens(tmp_path, cuts):
    ids, learned, begins = random_rows(20)
    tokens = Tokens(write_rows(tmp_path / "d", ids, learned, begins, cuts=cuts), "train", doc_mask=True)
    assert tokens.row_size == T
    for start, length in ((0, 320), (0, T), (7, 1), (13, 100), (319, 1)):
        assert np.array_equal(tokens.read_bits("learned", [start], length)[0], learned.flat[start : start + length])
        assert np.array_equal(tokens.read_bits("begins", [start], length)[0], begins.flat[start : start + length])


def test_targets_are_the_learned_tokens_and_documents_their_conversations(tmp_path):
    ids, learned, begins = random_rows(9)
    tokens = Tokens(write_rows(tmp_path / "d", ids, learned, begins, "val"), "val", doc_mask=True)
    batches = list(fixed_batches(tokens, T, 4))
    assert [len(batch.x) for batch in batches] == [4, 4, 1]
    x, y, docs = (torch.cat(part).numpy() for part in zip(*(batch[:3] for batch in batches), strict=True))
    assert np.array_equal(x, ids)
    for row in range(9):
        for t in range(T):
            target = ids[row, t + 1] if t + 1 < T and learned[row, t + 1] else -1
            assert y[row, t] == target
            assert docs[row, t] == begins[row, : t + 1].sum()


@settings(max_examples=12, deadline=None)
@given(n=st.integers(2, 40), accumulation=st.integers(1, 3), world=st.integers(1, 3), batch_size=st.integers(1, 3),
       seed=st.integers(0, 9))
def test_every_row_once_an_epoch_on_any_number_of_ranks(tmp_path_factory, n, accumulation, world, batch_size, seed):
    ids, learned, begins = random_rows(n, seed)
    ids[:, 0] = np.arange(n)  # a row is known by its first token
    tokens = Tokens(write_rows(tmp_path_factory.mktemp("d"), ids, learned, begins), "train")
    seen = []
    update = accumulation * world * batch_size
    loaders = []
    for rank in range(world):
        loaders.append(Loader(tokens, T, batch_size, accumulation=accumulation, seed=seed, rank=rank, world=world))
    for step in range(-(-2 * n // update)):
        for micro in range(accumulation):
            for loader in loaders:
                seen += loader.batch(step, micro).x[:, 0].tolist()
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == list(range(n))
    assert n < 8 or seen[:n] != seen[n : 2 * n]
    for loader in loaders:
        loader.close()


def test_the_divisor_counts_the_targets_of_the_whole_update(tmp_path):
    ids, learned, begins = random_rows(30)
    tokens = Tokens(write_rows(tmp_path / "d", ids, learned, begins), "train")
    loaders = [Loader(tokens, T, 2, accumulation=3, rank=rank, world=2, skipped=[1]) for rank in range(2)]
    for step in range(3):
        batches = [loader.batch(step, micro) for loader in loaders for micro in range(3)]
        targets = sum(int((batch.y != -1).sum()) for batch in batches)
        assert {batch.divisor.item() for batch in batches} == {np.float32(targets / 6)}
    for loader in loaders:
        loader.close()


def test_a_mix_of_conversations(tmp_path):
    parts = []
    for name, seed in (("a", 1), ("b", 2)):
        write_rows(tmp_path / name, *random_rows(20, seed), "train")
        parts.append((tmp_path / name, Fraction(1, 2)))
    mix = open_tokens(parts, "train", 50, doc_mask=True)
    loader = Loader(mix, T, 4)
    batch = loader.batch(0)
    rows = {tuple(row) for seed in (1, 2) for row in random_rows(20, seed)[0].tolist()}
    assert {tuple(row) for row in batch.x.tolist()} <= rows
    assert batch.divisor.item() == (batch.y != -1).sum() and batch.docs.min() == 1
    loader.close()
    with pytest.raises(DataError, match="one stream of tokens"):
        (tmp_path / "b" / "manifest.json").unlink()
        Mix([(Tokens(folder, "train"), weight) for folder, weight in parts])


def test_documents_of_a_plain_stream(tmp_path):
    ids = np.arange(100) % 10
    (tmp_path / "train_000000.bin").write_bytes(shard_header(100) + ids.astype("<u2").tobytes())
    loader = Loader(Tokens(tmp_path, "train", doc_mask=True, bos=3), T, 2)
    batch = loader.batch(0)
    assert batch.divisor is None and torch.equal(batch.docs, (batch.x == 3).cumsum(1))
    loader.close()


# -----------------------------------------------------------------------------
# Damaged files


def test_what_a_damaged_dataset_gets(tmp_path):
    folder = write_rows(tmp_path / "d", *random_rows(4))
    manifest = (folder / "manifest.json").read_text()
    bits = folder / "train_000000.learned"
    good = bits.read_bytes()
    for content in (good[:-1], good + b"x", None):
        if content is None:
            bits.unlink()
        else:
            bits.write_bytes(content)
        with pytest.raises(DataError, match=r"train_000000\.learned.*prepare the dataset again"):
            Tokens(folder, "train")
    bits.write_bytes(bytes([good[0] ^ 2]) + good[1:])
    with pytest.raises(DataError, match=r"train_000000\.learned was changed"):
        verify_shards(folder)
    bits.write_bytes(good)
    verify_shards(folder)
    for rows in ({"block_size": 10}, {"block_size": "16"}, [16]):
        (folder / "manifest.json").write_text(json.dumps({**json.loads(manifest), "rows": rows}))
        with pytest.raises(DataError, match="prepare"):
            Tokens(folder, "train")


def test_the_name_of_an_evaluation_tells_what_is_learned(tmp_path):
    ids, learned, begins = random_rows(4)
    one = Tokens(write_rows(tmp_path / "a", ids, learned, begins, "val"), "val")
    other = learned.copy()
    other[2, -1] = False
    two = Tokens(write_rows(tmp_path / "b", ids, other, begins, "val"), "val")
    assert one.sha256_of(48) != two.sha256_of(48) and one.sha256_of(32) == two.sha256_of(32)
    assert open_datasets(str(tmp_path / "a"))[2] != open_datasets(str(tmp_path / "b"))[2]


# -----------------------------------------------------------------------------
# Training


T_CHAT = 48
# block_size and the model's sizes are left to the data and the base
SIZES = dict(batch_size=4, block_size="", n_layer="", n_head="", n_embd="", learning_rate=3e-3, warmup_iters=0)


@pytest.fixture(scope="session")
def base(tiny, tmp_path_factory):
    """A run on plain text, with a longer context than the rows of conversations."""
    out = tmp_path_factory.mktemp("base") / "run"
    done = tiny(out, block_size=64, pos="rope", n_layer=2, max_iters=500, eval_interval=500, learning_rate=1e-2)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="session")
def chat(words, base, tmp_path_factory):
    """Conversations in the words of that text: a question of some words, answered by its last word."""
    folder = tmp_path_factory.mktemp("chat")
    vocabulary = (words / "words.txt").read_text().replace(".", "").split()
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(400):
        question = " ".join(rng.choice(vocabulary, rng.integers(1, 5)))
        talk = [("user", question), ("assistant", question.split()[-1])]
        if rng.random() < 0.3:
            talk += [("user", "and"), ("assistant", question.split()[0])]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]}))
    (folder / "talks.jsonl").write_text("\n".join(lines))
    command = ["data/chat/prepare.py", f"--input={folder / 'talks.jsonl'}", f"--out_dir={folder / 'rows'}",
               f"--tokenizer={base}", f"--block_size={T_CHAT}"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return folder / "rows"


@pytest.fixture(scope="session")
def tune(train, base, chat):
    """train.py on the conversations, from the base run."""
    def run(out_dir, **settings):
        return train(**{**SIZES, "dataset": chat, "init_from": f"auto:{base}", "out_dir": out_dir, **settings})
    return run


@pytest.fixture(scope="session")
def tuned(tune, tmp_path_factory):
    """A finished run of tune's settings: copy it, do not change it."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    done = tune(out)
    assert done.code == 0, done.err
    return out


def test_a_run_on_conversations_learns_them_and_keeps_the_context_of_its_model(tune, base, chat, tmp_path):
    done = tune(tmp_path, max_iters=80, eval_interval=40, eval_iters=0, attn="sdpa")
    assert done.code == 0, done.err
    state = checkpoint.find(tmp_path)[1]
    assert state["model"]["block_size"] == 64 and state["config"]["block_size"] == T_CHAT
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.template and state["model"]["vocab_size"] == tokenizer.vocab_size
    assert tokenizer.vocab_size == load_tokenizer(base).vocab_size + 4
    first, last = (r["val_loss"] for r in records(tmp_path) if "val_loss" in r)
    assert last < first
    assert "sdpa attention (with a mask that hides other documents)" in done.out
    assert "whose conversations do not see each other" in done.out and "bits/learned token" in done.out
    assert f"next: python chat.py --out_dir={tmp_path}" in done.out
    told = subprocess.run([sys.executable, "eval.py", f"--out_dir={tmp_path}", "--device=cpu"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert json.loads(told.stdout.splitlines()[-1])["loss"] == pytest.approx(last, rel=1e-6)


def test_validation_is_the_mean_over_the_answers(tuned, chat):
    """By hand: each conversation alone, through the plain forward pass."""
    model, tokenizer, _, _ = load(tuned)
    tokens = Tokens(chat, "val", doc_mask=True)
    total = count = size = 0
    for start in range(0, len(tokens), T_CHAT):
        ids = tokens.read([start], T_CHAT)[0].astype(np.int64)
        learned = tokens.read_bits("learned", [start], T_CHAT)[0]
        edges = [*np.flatnonzero(tokens.read_bits("begins", [start], T_CHAT)[0]), T_CHAT]
        for a, b in zip(edges, edges[1:], strict=False):
            if not learned[a:b].any():
                continue  # padding
            log_probs = model(torch.from_numpy(ids[None, a : b - 1]))[0][0].log_softmax(-1)
            for at in np.flatnonzero(learned[a + 1 : b]):
                total -= log_probs[at, ids[a + 1 + at]].item()
                count += 1
        size += len(tokenizer.decode(ids[learned]).encode())
    result = evaluate(model, tokens, T_CHAT, 7, tokenizer=tokenizer)
    assert result["tokens"] == count and result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["bytes"] == size and result["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert records(tuned)[-1]["val_loss"] == pytest.approx(evaluate(model, tokens, T_CHAT, 341, 2)["loss"], rel=1e-6)


@pytest.mark.slow
def test_killed_ten_times_and_resumed_it_ends_with_the_same_bits(tune, tuned, tmp_path):
    kill = """
        import os, optim
        real, calls = optim.Optimizers.step, []
        def step(self, *args, **options):
            calls.append(1)
            if len(calls) > {n}:
                os.kill(os.getpid(), 9)
            return real(self, *args, **options)
        optim.Optimizers.step = step
    """
    for n in (0, 1, 2, 1, 2, 1, 0, 2, 1, 1):
        assert tune(tmp_path, save_interval=1, before=kill.format(n=n)).code == -9
    done = tune(tmp_path, save_interval=1)
    assert done.code == 0, done.err
    assert differences(outcome(tmp_path), outcome(tuned)) == []


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    dict(batch_size=1, gradient_accumulation_steps=8),
    dict(batch_size=2, gradient_accumulation_steps=4, ranks=2),
    dict(batch_size=1, gradient_accumulation_steps=8, ranks=4),
    dict(batch_size=2, gradient_accumulation_steps=4, ranks=2, zero_stage=2),
    dict(batch_size=2, gradient_accumulation_steps=4, ranks=2, pp_size=2),
], ids=lambda s: " ".join(f"{key}={value}" for key, value in s.items()))
def test_an_update_is_one_mean_over_its_learned_tokens(settings, tune, tmp_path):
    """However the update is cut: losses, gradient norms and validation of 12 steps agree, though the parts of an update
    have unequal numbers of learned tokens."""
    whole = tune(tmp_path / "whole", batch_size=8)
    assert whole.code == 0, whole.err
    done = tune(tmp_path / "parts", **settings)
    assert done.code == 0, done.err
    for ours, theirs in zip(records(tmp_path / "parts"), records(tmp_path / "whole"), strict=True):
        for key in {"loss", "grad_norm", "val_loss"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_ranks(tune, tmp_path):
    settings = dict(batch_size=2, gradient_accumulation_steps=2, lr_decay_iters=12)
    assert tune(tmp_path / "whole", **settings).code == 0
    assert tune(tmp_path / "moved", max_iters=8, **settings).code == 0
    done = tune(tmp_path / "moved", ranks=2, init_from="resume", **settings)
    assert done.code == 0, done.err
    for ours, theirs in zip(records(tmp_path / "moved"), records(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("fault", [
    "dataset.Tokens.read_bits = lambda self, name, starts, length: real(self, name, starts, length) | "
    "(name == 'learned')",  # the mask is dropped
    "loader.Loader.find_divisor = lambda self, step: None",  # a mean of means
    "dataset.Tokens.begins = lambda self, starts, tokens: None",  # conversations see each other
], ids=["no mask", "mean of means", "no documents"])
def test_a_fault_in_the_loss_is_seen(fault, tune, tmp_path):
    """The control of the tests above: what they compare does tell these faults."""
    settings = dict(batch_size=2, gradient_accumulation_steps=4, max_iters=4)
    before = f"import dataset, loader\nreal = dataset.Tokens.read_bits\n{fault}"
    assert tune(tmp_path / "right", **settings).code == 0
    done = tune(tmp_path / "wrong", before=before, **settings)
    assert done.code == 0, done.err
    assert records(tmp_path / "wrong")[0]["loss"] != pytest.approx(records(tmp_path / "right")[0]["loss"], rel=1e-4)


def test_new_tokens_hardly_change_the_loss_of_plain_text(base, tune, tmp_path):
    before = load(base)[0]
    assert tune(tmp_path, max_iters=1, learning_rate=1e-12, min_lr=0.0, eval_interval=1).code == 0
    after = load(tmp_path)[0]
    words = Tokens(checkpoint.find(base)[1]["config"]["dataset"], "val")
    losses = [evaluate(model, words, 64, 16)["loss"] for model in (before, after)]
    old = before.config.vocab_size
    fair = math.log(1 + 4 / old)  # what four tokens cost that are as likely as an average one
    assert 0 < losses[1] - losses[0] < fair / 20
    table = after.transformer.wte.weight
    assert torch.allclose(table[:old], before.transformer.wte.weight[:old], rtol=0, atol=1e-9)
    mean = before.transformer.wte.weight[:old].mean(0)
    for row in table[old : after.config.vocab_size]:
        assert 0 < (row - mean).norm() < 0.1 * before.transformer.wte.weight[:old].norm(dim=1).mean()


def test_new_tokens_learn_from_the_first_step(tune, tmp_path):
    out = tmp_path / "run"
    assert tune(out, max_iters=1, eval_interval=1).code == 0
    assert tune(tmp_path / "still", max_iters=1, eval_interval=1, learning_rate=1e-12, min_lr=0.0).code == 0
    moved, still = (load(folder)[0].transformer.wte.weight for folder in (out, tmp_path / "still"))
    size = load_tokenizer(out).vocab_size
    for row in range(size - 4, size):
        assert (moved[row] - still[row]).abs().max() > 1e-4 or row == size - 4  # nobody is a system here


@pytest.mark.parametrize(("settings", "message"), [
    (dict(block_size=32), f"block_size=32, but .* has rows of {T_CHAT} tokens: leave block_size out"),
    (dict(init_from="auto:nowhere"), "nowhere is neither a file nor a folder"),
    (dict(init_from="auto"), "block_size|n_layer|nothing"),
])
def test_a_mistake_gets_one_line(settings, message, tune, tmp_path):
    done = tune(tmp_path / "run", **settings)
    if settings["init_from" if "init_from" in settings else "block_size"] == "auto":
        assert done.code == 0  # from scratch: rows need no model to start from
        return
    assert re.search(message, one_error(done, tmp_path / "run"))


def test_documents_of_plain_text_need_a_token_that_begins_them(train, tmp_path):
    ids = np.arange(400) % 50
    for split in ("train", "val"):
        (tmp_path / f"{split}_000000.bin").write_bytes(shard_header(400) + ids.astype("<u2").tobytes())
    error = one_error(train(dataset=tmp_path, out_dir=tmp_path / "run", doc_mask=True), tmp_path / "run")
    assert "no token that begins a document" in error


def test_another_base_model_is_refused(tune, words, train, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "text.txt").write_text("some other letters, and more of them. " * 200)
    command = ["data/shakespeare_char/prepare.py", f"--input={tmp_path / 'text.txt'}", f"--out_dir={other}"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    assert train(dataset=other, out_dir=tmp_path / "base", block_size=T_CHAT).code == 0
    error = one_error(tune(tmp_path / "run", init_from=tmp_path / "base"), tmp_path / "run")
    assert "vocab_size" in error or "its tokenizer is not that of" in error
