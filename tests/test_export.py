"""In and out: the same logits as transformers, nanoGPT's checkpoints read safely, and one line for what cannot be."""

import json
import os
import pickle

import pytest
import torch
from test_tokenizer import RANKS, needs_ranks

import checkpoint
from export import NoOptimizer, bytes_to_unicode, merges_of
from infer import Engine, load
from loader import Loader, Tokens
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")
TEXT = "the thé 🙂 the end\n"
CHARS = CharTokenizer.from_text(TEXT)
BPE = BPETokenizer([*(bytes([i]) for i in range(256)), b"th", b"the", b" the", "é".encode(), b"\n\n"])


def opinionated(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def make_run(folder, tokenizer=BPE, **changes):
    """A run's folder with a small model. -> the model"""
    sizes = {"block_size": 32, "vocab_size": tokenizer.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = GPTConfig(**{**sizes, **changes})
    model = opinionated(GPT(config))
    state = {"step": 3, "val_loss": 1.5, "model": vars(config), "config": {"dataset": ""}}
    checkpoint.save(folder, model, NoOptimizer(), state)
    tokenizer.save(folder)
    return model


def logits(model, ids):
    with torch.no_grad():
        found = model(torch.tensor([ids]))
    return found.logits[0] if hasattr(found, "logits") else found[0][0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": False}, {"activation": "gelu"}, {"tie_weights": False}, {"n_kv_head": 2, "norm_eps": 1e-6},
     {"bias": False, "tie_weights": False, "activation": "gelu"}],
    ids=str,
)
@pytest.mark.parametrize("tokenizer", [BPE, CHARS], ids=["bpe", "char"])
def test_there_and_back(changes, tokenizer, tmp_path, call_script):
    """transformers loads it without code of its own: logits to 1e-4, the same ids of a text, the same greedy text; and
    what it saves comes back as the same model."""
    ours = make_run(tmp_path / "run", tokenizer, **changes)
    code, out, err = call_script("export.py", tmp_path / "run", tmp_path / "hf")
    assert code == 0, err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = tokenizer.encode(TEXT)[:30]
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() < 1e-4

    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert words.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT)
    assert words.decode(tokenizer.encode(TEXT)) == TEXT and words.eos_token_id == tokenizer.eos
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    drawn = theirs.generate(torch.tensor([ids[:5]]), **greedy)
    assert Engine(ours).generate(ids[:5], max_new_tokens=20, temperature=0).ids == drawn[0].tolist()

    theirs.save_pretrained(tmp_path / "saved")
    code, out, err = call_script("export.py", tmp_path / "saved", tmp_path / "back", f"--tokenizer={tmp_path / 'run'}")
    assert code == 0, err
    back, found, state, _ = load(tmp_path / "back")
    assert (logits(ours, ids) - logits(back, ids)).abs().max() < 1e-5 and found.sha256 == tokenizer.sha256
    assert state["step"] == 0 and state["val_loss"] is None


LLAMA = {"pos": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "rope_theta": 5000.0}
NANOCHAT = {"pos": "rope", "norm": "rmsnorm_nogain", "norm_embed": True, "qk_norm": "rms", "activation": "relu2",
            "bias": False, "tie_weights": False}


@pytest.mark.parametrize(
    "name, changes",
    [("Llama", LLAMA), ("Llama", {**LLAMA, "n_kv_head": 1, "tie_weights": False}),
     ("Qwen3", {**LLAMA, "qk_norm": "rms_gain", "n_kv_head": 1}), ("NanoChat", {**NANOCHAT, "logit_softcap": 15.0}),
     ("NanoChat", {**NANOCHAT, "n_kv_head": 1, "norm_eps": 1e-6})],
)
def test_the_classes_with_rotary_positions(name, changes, tmp_path, call_script):
    """A class of transformers, without code of its own: logits to 1e-4 and the same greedy text."""
    ours = make_run(tmp_path / "run", **changes)
    code, out, err = call_script("export.py", tmp_path / "run", tmp_path / "hf")
    assert code == 0, err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    ids = BPE.encode(TEXT * 2)[:30]
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() < 1e-4
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    drawn = theirs.generate(torch.tensor([ids[:5]]), **greedy)
    assert Engine(ours).generate(ids[:5], max_new_tokens=20, temperature=0).ids == drawn[0].tolist()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").encode(TEXT) == BPE.encode(TEXT)


@pytest.mark.parametrize("toggle", ["pos=rope", "norm=rmsnorm", "norm_embed=True", "qk_norm=rms", "activation=relu2",
                                    "logit_softcap=5.0", "n_kv_head=1"])
def test_what_no_class_can_express_is_named(toggle, tmp_path, call_script):
    key, value = toggle.split("=")
    make_run(tmp_path / "run", **{key: {"True": True, "5.0": 5.0, "1": 1}.get(value, value)})
    code, out, err = call_script("export.py", tmp_path / "run", tmp_path / "hf")
    assert code == 2 and toggle in err and err.count("\n") == 1 and not (tmp_path / "hf").exists()


def nanogpt(path, padded=64, prefix="_orig_mod.", **changes):
    """A checkpoint with the fields that nanoGPT's train.py saves. -> our model of the same weights"""
    config = GPTConfig(block_size=16, vocab_size=padded, n_layer=2, n_head=2, n_embd=16, bias=False, activation="gelu")
    model = opinionated(GPT(config))
    weights = {prefix + name: p.detach() for name, p in model.named_parameters()}
    weights[prefix + "lm_head.weight"] = weights[prefix + "transformer.wte.weight"]
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    args = {name: getattr(config, name) for name in names}
    saved = {"model": weights, "optimizer": {"state": {}, "param_groups": []}, "model_args": args, "iter_num": 7,
             "best_val_loss": torch.tensor(1.25), "config": {"dataset": "x"}}
    torch.save({**saved, **changes}, path)
    return model


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpts_checkpoint(prefix, tmp_path, call_script):
    ours = nanogpt(tmp_path / "ckpt.pt", prefix=prefix)
    with open(tmp_path / "meta.pkl", "wb") as file:  # as its data folder has
        chars = "".join(map(chr, range(33, 33 + 64)))
        itos = dict(enumerate(chars))
        pickle.dump({"vocab_size": 64, "itos": itos, "stoi": {c: i for i, c in itos.items()}}, file)
    code, out, err = call_script("export.py", tmp_path / "ckpt.pt", tmp_path / "run")
    assert code == 0 and "its tokenizer is there" in out, err
    model, found, state, _ = load(tmp_path / "run")
    assert torch.equal(logits(model, [1, 2, 3]), logits(ours, [1, 2, 3]))
    assert (state["step"], state["val_loss"], found.vocab_size) == (7, 1.25, 64)
    assert model.config.activation == "gelu" and not model.config.bias
    code, out, err = call_script("export.py", tmp_path / "ckpt.pt", tmp_path / "run")
    assert code == 2 and "already holds a run" in err


@needs_ranks
def test_a_padded_vocabulary_is_gpt2s(tmp_path, call_script):
    ours = nanogpt(tmp_path / "ckpt.pt", padded=50304)
    code, out, err = call_script("export.py", tmp_path / "ckpt.pt", tmp_path / "run", f"--tokenizer={RANKS}")
    assert code == 0, err
    model, found, _, _ = load(tmp_path / "run")
    assert model.config.vocab_size == found.vocab_size == 50257
    torch.testing.assert_close(logits(model, [1, 2]), logits(ours, [1, 2])[:, :50257])


class Trap:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, call_script):
    trap = Trap()
    Trap.path = tmp_path / "executed"
    nanogpt(tmp_path / "ckpt.pt", config=trap)
    code, out, err = call_script("export.py", tmp_path / "ckpt.pt", tmp_path / "run")
    assert code == 2 and "refused" in err and err.count("\n") == 1
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


def test_mistakes_are_one_line(tmp_path, call_script):
    make_run(tmp_path / "run")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"model": {}}, tmp_path / "half.pt")
    nanogpt(tmp_path / "ok.pt")
    nanogpt(tmp_path / "odd.pt", model={"transformer.wte.weight": torch.zeros(64, 16)})
    for name, fields in (("llama", {"model_type": "llama"}), ("bare", {"model_type": "gpt2", "n_embd": 8}),
                         ("relu", {"model_type": "gpt2", "n_embd": 8, "activation_function": "relu"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for words, named in (
        ((), "FROM TO"), (("a",), "FROM TO"), (("junk.pt", "new"), "junk.pt is refused"),
        (("half.pt", "new"), "model_args"),
        (("odd.pt", "new"), "not in the file"), (("llama", "new"), "'llama'"), (("bare", "new"), "safetensors"),
        (("relu", "new"), "activation_function=relu"), (("run", "full"), "not empty"),
        (("ok.pt", "new", f"--tokenizer={RANKS if RANKS.is_file() else tmp_path / 'none'}"), "token"),
    ):
        words = [str(tmp_path / word) if not word.startswith("--") else word for word in words]
        code, out, err = call_script("export.py", *words)
        assert code == 2 and named in err and err.count("\n") == 1, (words, err)
        assert not (tmp_path / "new").exists()


@needs_ranks
def test_gpt2s_merges_are_made_of_its_ranks(tmp_path, call_script):
    """Its vocabulary in the spelling of vocab.json, and its merges, as many as it has tokens of more than a byte."""
    ours = load_tokenizer(RANKS)
    pairs = merges_of(ours.pieces)
    assert len(pairs) == 50_000 and pairs[0] == (b" ", b"t") and len(set(pairs)) == 50_000
    assert [a + b for a, b in pairs] == ours.pieces[256:]
    spell = bytes_to_unicode()
    assert len(set(spell.values())) == 256 and spell[ord(" ")] == "Ġ" and spell[ord("a")] == "a"

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=16)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    words = {"".join(spell[b] for b in piece): i for i, piece in enumerate(ours.pieces)} | {"<|endoftext|>": 50256}
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "run")
    assert code == 0, err
    model, found, _, _ = load(tmp_path / "run")
    assert found.sha256 == ours.sha256
    assert (logits(model, [1, 2, 3]) - logits(theirs, [1, 2, 3])).abs().max() < 1e-4


def test_training_goes_on_from_what_came_in(tmp_path, call_script, tiny_dataset):
    """nanoGPT's checkpoint, made a run, is what train.py starts from: the first loss is its own."""
    characters = load_tokenizer(tiny_dataset)
    ours = nanogpt(tmp_path / "ckpt.pt", padded=characters.vocab_size)
    code, out, err = call_script("export.py", tmp_path / "ckpt.pt", tmp_path / "run", f"--tokenizer={tiny_dataset}")
    assert code == 0, err
    words = ["--device=cpu", "--dtype=float32", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16",
             "--activation=gelu", "--max_iters=2", "--eval_iters=1", "--batch_size=4", f"--dataset={tiny_dataset}"]
    more = [f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'more'}"]
    code, out, err = call_script("train.py", *words, *more)
    assert code == 0, err
    first = json.loads((tmp_path / "more" / "metrics.jsonl").read_text().splitlines()[0])
    with torch.no_grad():
        x, y = Loader(Tokens(tiny_dataset, "train"), 16, 4, seed=1337).batch(0)
        assert first["loss"] == pytest.approx(float(ours(x, y)[1]), rel=1e-5)
    code, out, err = call_script("train.py", *words, "--init_from=gpt2", f"--out_dir={tmp_path / 'no'}")
    assert code == 2 and "export.py makes one" in err and err.count("\n") == 1
