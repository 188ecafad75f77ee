"""In and out: the same logits as transformers, nanoGPT's checkpoints read safely, and one line for what cannot be."""

import json
import os
import pickle
import sys
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tokenizer import RANKS, needs_ranks

import checkpoint
import export
from data.common import write_dataset
from dataset import Tokens
from export import NoOptimizer
from foreign.byte_level import bytes_to_unicode
from foreign.tokenizer_files import merges_of
from infer import Engine, load
from loader import Loader
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.parametrize("changes", [LLAMA, {**LLAMA, "qk_norm": "rms_gain"}, NANOCHAT], ids=str)
@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_stretched_positions_go_along(scaling, changes, tmp_path, call_script):
    ours = make_run(tmp_path / "run", **changes, rope_scaling=scaling, rope_factor=4.0, block_size=64)
    code, out, err = call_script("export.py", tmp_path / "run", tmp_path / "hf")
    if changes is NANOCHAT and scaling == "yarn":  # it normalises what is rotated, and so undoes the temperature
        assert code == 2 and "rope_scaling=yarn" in err and err.count("\n") == 1
        return
    assert code == 0, err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = (BPE.encode(TEXT) * 9)[:64]
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() < 1e-4
    plain = GPT(GPTConfig(**{**vars(ours.config), "rope_scaling": "none", "rope_factor": 1.0})).eval()
    plain.load_state_dict(ours.state_dict())
    assert (logits(plain, ids) - logits(theirs, ids)).abs().max() > 1e-2


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
    assert code == 0 and "with its tokenizer" in out, err
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
    bare = {"model_type": "gpt2", "n_embd": 8, "n_positions": 8, "n_layer": 1, "n_head": 1, "vocab_size": 8}
    for name, fields in (("mistral", {"model_type": "mistral"}), ("bare", bare),
                         ("relu", {"model_type": "gpt2", "n_embd": 8, "activation_function": "relu"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for words, named in (
        ((), "FROM TO"), (("a",), "FROM TO"), (("junk.pt", "new"), "junk.pt is refused"),
        (("half.pt", "new"), "model_args"),
        (("odd.pt", "new"), "not in the file"), (("mistral", "new"), "'mistral'"), (("bare", "new"), "safetensors"),
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


# -----------------------------------------------------------------------------
# Training from what comes in


def started(out_dir, dataset):
    """The first record of a run, and what it is for `model`: its loss on the run's first batch."""
    first = json.loads((out_dir / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    config = json.loads((out_dir / "config.json").read_text())
    x, y, *_ = Loader(Tokens(dataset, "train"), config["block_size"], config["batch_size"], seed=1337).batch(0)

    def loss(model):
        with torch.no_grad():
            return pytest.approx(float(model(x, y)[1]), rel=1e-5)

    return first, config, loss


TRAIN = ["--device=cpu", "--dtype=float32", "--max_iters=2", "--eval_iters=1", "--batch_size=4", "--warmup_iters=0"]


def hugging_face(folder, dataset):
    """GPT-2's class with the characters of a dataset as its vocabulary. -> our model of the same weights"""
    characters = load_tokenizer(dataset)
    config = GPTConfig(block_size=16, vocab_size=characters.vocab_size, n_layer=1, n_head=2, n_embd=16)
    ours = opinionated(GPT(config))
    theirs = transformers.GPT2Config(n_positions=16, vocab_size=characters.vocab_size, n_layer=1, n_head=2, n_embd=16)
    theirs = transformers.GPT2LMHeadModel(theirs)
    tensors = {name: p.detach() for name, p in ours.named_parameters()}
    tables = {"transformer.wte.weight": tensors["transformer.wte.weight"][: characters.vocab_size]}
    turned = {name: p.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else p
              for name, p in (tensors | tables).items()}
    assert not theirs.load_state_dict(turned, strict=False).unexpected_keys
    theirs.save_pretrained(folder)
    characters.save(folder)
    return ours


@pytest.mark.parametrize("kind", ["ckpt.pt", "run", "folder", "hub"])
def test_training_starts_from_a_model_of_any_kind(kind, tmp_path, call_script, tiny_dataset, monkeypatch):
    """In one word, its sizes come with it: the first loss is its own, config.json has its fields, and nothing but the
    run is written. It goes on with --init_from=resume, the sizes still unsaid."""
    came, name = [], tmp_path / "ckpt.pt"
    if kind in ("ckpt.pt", "run"):
        ours = nanogpt(name, padded=load_tokenizer(tiny_dataset).vocab_size)
        if kind == "run":
            name = tmp_path / "run"
            words = (tmp_path / "ckpt.pt", name, f"--tokenizer={tiny_dataset}")
            assert call_script("export.py", *words)[0] == 0
    else:
        ours, name = hugging_face(tmp_path / "hf", tiny_dataset), tmp_path / "hf"
        if kind == "hub":
            import huggingface_hub

            name = "gpt2"
            monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda n, **_: came.append(n) or tmp_path / "hf")
    words = [*TRAIN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'more'}"]
    code, out, err = call_script("train.py", *words, f"--init_from={name}")
    assert code == 0, err
    assert came == (["gpt2"] if kind == "hub" else [])
    assert ("does not say which tokenizer it has" in err) == (kind == "ckpt.pt")
    first, config, loss = started(tmp_path / "more", tiny_dataset)
    assert first == loss(ours)
    fields = ("block_size", "n_layer", "n_head", "n_embd", "bias", "activation")
    assert {key: config[key] for key in fields} == {key: getattr(ours.config, key) for key in fields}
    code, out, err = call_script("train.py", *words, "--init_from=resume", "--max_iters=3")
    assert code == 0 and sorted(checkpoint.steps(tmp_path / "more")) == [2, 3], err


def test_a_start_with_fewer_positions(tmp_path, call_script, tiny_dataset):
    ours = nanogpt(tmp_path / "ckpt.pt", padded=load_tokenizer(tiny_dataset).vocab_size)
    words = [*TRAIN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'run'}", "--block_size=8"]
    code, out, err = call_script("train.py", *words, f"--init_from={tmp_path / 'ckpt.pt'}")
    assert code == 0, err
    first, config, loss = started(tmp_path / "run", tiny_dataset)
    assert config["block_size"] == 8 and first == loss(ours)


@pytest.mark.parametrize("said, named", [
    ("--n_layer=12", "n_layer=2, this one 12"),  # train.py's own default, but said
    ("--bias=true", "bias=False, this one True"), ("--block_size=32", "block_size=16, this one 32"),
    ("--context_start=5", "does not double to block_size=16"), ("--init_from=resum", "did you mean resume?"),
    ("--init_from=gpt3-huge", "gpt3-huge is neither a file nor a folder"), ("--dataset=DATA", "vocab_size=64"),
])
def test_a_start_that_does_not_fit_is_one_line(said, named, tmp_path, call_script, tiny_dataset, monkeypatch):
    def offline(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    nanogpt(tmp_path / "ckpt.pt", padded=64 if "DATA" in said else load_tokenizer(tiny_dataset).vocab_size)
    words = [*TRAIN, f"--init_from={tmp_path / 'ckpt.pt'}", f"--out_dir={tmp_path / 'run'}"]
    code, out, err = call_script("train.py", *words, said.replace("DATA", str(tiny_dataset)),
                                 *[f"--dataset={tiny_dataset}"] * (said != "--dataset=DATA"))
    assert code == 2 and named in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_start_with_other_tokens_is_refused(tmp_path, call_script, tiny_dataset):
    hugging_face(tmp_path / "hf", tiny_dataset)
    chars = load_tokenizer(tiny_dataset).chars
    CharTokenizer(chars[::-1]).save(tmp_path / "hf")
    words = [*TRAIN, f"--init_from={tmp_path / 'hf'}", f"--out_dir={tmp_path / 'run'}", f"--dataset={tiny_dataset}"]
    code, out, err = call_script("train.py", *words)
    assert code == 2 and "its tokenizer is not that of" in err and not (tmp_path / "run").exists()


@needs_ranks
def test_gpt2_is_finetuned_by_its_config(tmp_path, call_script, monkeypatch):
    """config/finetune_shakespeare.py, the Hub's gpt2 being a small one here; vocab.json is the dataset's tokenizer."""
    ranks, folder = load_tokenizer(RANKS), tmp_path / "hub"
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 32}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    theirs.save_pretrained(folder)
    spell = bytes_to_unicode()
    words = {"".join(spell[b] for b in piece): i for i, piece in enumerate(ranks.pieces)} | {"<|endoftext|>": 50256}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    ids = ranks.encode_array("To be, or not to be: that is the question.\n" * 40)
    (tmp_path / "data").mkdir()
    split = {"train": ids[:400], "val": ids[400:]}
    write_dataset(tmp_path / "data", split, ranks, {"name": "tiny"}, {"version": 1}, {"read": 1, "kept": 1})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: folder if name == "gpt2" else None)
    less = ["--max_iters=2", "--gradient_accumulation_steps=1", f"--dataset={tmp_path / 'data'}", "--dtype=float32"]
    words = [ROOT / "config" / "finetune_shakespeare.py", *less, "--device=cpu", f"--out_dir={tmp_path / 'run'}"]
    code, out, err = call_script("train.py", *words)
    assert code == 0 and "warning" not in err, err
    first, config, _ = started(tmp_path / "run", tmp_path / "data")
    x, y, *_ = Loader(Tokens(tmp_path / "data", "train"), 32, 1, seed=1337).batch(0)
    with torch.no_grad():
        theirs_loss = torch.nn.functional.cross_entropy(theirs(x.long()).logits[0], y[0].long())
    assert first == pytest.approx(float(theirs_loss), rel=1e-4) and config["bias"] and config["n_layer"] == 1
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates == [3e-5, 3e-5]


# -----------------------------------------------------------------------------
# GGUF


ASCII = CharTokenizer.from_text("the end of it\n To be!")
GGUF = {
    "gpt2": ({}, BPE), "gpt2, no biases": ({"bias": False, "tie_weights": False}, BPE), "gpt2, characters": ({}, ASCII),
    "llama": ({**LLAMA, "n_kv_head": 1}, BPE), "llama, untied": ({**LLAMA, "tie_weights": False, "n_embd": 64}, BPE),
    "qwen3": ({**LLAMA, "qk_norm": "rms_gain", "n_kv_head": 1}, BPE),
}
NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm",
         "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_gate": "ffn_gate",
         "mlp.c_proj": "ffn_down", "attn.q_gain": "attn_q_norm.weight", "attn.k_gain": "attn_k_norm.weight"}


def as_gguf(model):
    """{name in a GGUF: tensor} of a model of ours, its queries and keys as we have them."""
    out, config = {}, model.config
    for name, p in checkpoint.model_tensors(model).items():
        short = name.removeprefix("transformer.").replace("h.", "blk.", 1) if ".h." in name else name[12:]
        for ours, theirs in NAMES.items():
            short = short.replace(ours, theirs)
        if name == "lm_head.weight":
            short = "output.weight"
        if "attn_qkv" in name or "attn_qkv" in short and config.pos == "rope":
            parts = p.split([n * config.head_dim for n in (config.n_head, config.kv_heads, config.kv_heads)])
            out |= {short.replace("qkv", letter): part for letter, part in zip("qkv", parts, strict=True)}
        else:
            out[short] = p[: config.vocab_size] if short in ("token_embd.weight", "output.weight") else p
    return out


def read_gguf(path):
    """-> ({key: value}, {name: tensor, dequantised}, {name: its type})"""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).view(*t.shape.tolist()[::-1])
               for t in reader.tensors}
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_holds_the_model(case, tmp_path, call_script):
    """Every tensor under llama.cpp's name, bit for bit; where it rotates neighbours, queries and keys are the same once
    that is undone; biases that we do not have are zero."""
    changes, tokenizer = GGUF[case]
    ours = make_run(tmp_path / "run", tokenizer, **changes)
    code, out, err = call_script("export.py", tmp_path / "run", tmp_path / "m.gguf")
    assert code == 0, err
    values, tensors, types = read_gguf(tmp_path / "m.gguf")
    family, config = case.split(",")[0], ours.config
    wanted = as_gguf(ours)
    for name, p in tensors.items():
        if name in wanted:
            if family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
                p = p.view(-1, config.head_dim // 2, 2, config.n_embd).transpose(1, 2).reshape(p.shape)
            assert torch.equal(p, wanted[name].float()), name
        else:
            assert family == "gpt2" and not config.bias and name.endswith(".bias") and not p.any(), name
    assert wanted.keys() <= tensors.keys() and set(types.values()) == {"F32"}
    biases = {name.removesuffix("bias") for name in tensors if name.endswith("bias")}
    assert len(biases) == (6 * config.n_layer + 1 if family == "gpt2" else 0)

    eps, width = "layer_norm_epsilon" if family == "gpt2" else "layer_norm_rms_epsilon", config.n_embd
    for key, value in {
        "block_count": 2, "context_length": 32, "embedding_length": width, "feed_forward_length": config.mlp_dim,
        "attention.head_count": 2, "attention.head_count_kv": config.kv_heads, "vocab_size": config.vocab_size,
        f"attention.{eps}": pytest.approx(config.norm_eps),
    }.items():
        assert values[f"{family}.{key}"] == value, key
    if family != "gpt2":
        assert values[f"{family}.rope.freq_base"] == config.rope_theta
        assert values[f"{family}.rope.dimension_count"] == config.head_dim
    words = values["tokenizer.ggml.tokens"]
    assert values["general.architecture"] == family and len(words) == tokenizer.vocab_size == len(set(words))
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.add_bos_token"] is False
    ends = values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]
    assert ends == (tokenizer.bos, tokenizer.eos)
    normal, special = len(tokenizer.pieces), len(tokenizer.special_tokens)
    assert values["tokenizer.ggml.token_type"] == [1] * normal + [3] * special
    if tokenizer is BPE:
        assert values["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the", "Ã ©", "Ċ Ċ"]
        assert words[ord(" ")] == "Ġ" and words[-1] == "<|endoftext|>"


@pytest.mark.parametrize("dtype, kind", [("float16", "F16"), ("bfloat16", "BF16"), ("q8_0", "Q8_0")])
def test_a_gguf_of_fewer_bits(dtype, kind, tmp_path, call_script):
    """Matrices in that type, to its rounding; vectors and positions in float32; what 32 does not divide in float16."""
    ours = make_run(tmp_path / "run", n_embd=48)  # rows of 48, but of 192 in a layer's last matrix
    code, out, err = call_script("export.py", tmp_path / "run", tmp_path / "m.gguf", f"--dtype={dtype}")
    assert code == 0, err
    _, tensors, types = read_gguf(tmp_path / "m.gguf")
    wanted = as_gguf(ours)
    for name, p in tensors.items():
        plain = p.ndim == 1 or name == "position_embd.weight"
        expected = "F32" if plain else "F16" if kind == "Q8_0" and "ffn_down" not in name else kind
        assert types[name] == expected, name
        bound = {"F32": 0, "F16": 2**-11, "BF16": 2**-8}.get(expected)
        whole = wanted[name]
        scale = whole.abs() if bound is not None else whole.view(-1, 32).abs().amax(1, keepdim=True).expand(-1, 32)
        bound = 0.5 / 127 + 2**-11 if bound is None else bound  # half a step, and the scale is a half float
        assert ((p - whole).abs() <= bound * scale.reshape(whole.shape) + 1e-7).all(), name


@pytest.mark.parametrize("changes, named", [
    ({"activation": "gelu"}, "activation=gelu"), ({**NANOCHAT}, "qk_norm=rms"), ({"pos": "rope"}, "pos=rope"),
    ({**LLAMA, "logit_softcap": 5.0}, "logit_softcap=5.0"),
], ids=str)
def test_what_llama_cpp_cannot_express_is_named(changes, named, tmp_path, call_script):
    pytest.importorskip("gguf")
    make_run(tmp_path / "run", **changes)
    code, out, err = call_script("export.py", tmp_path / "run", tmp_path / "m.gguf")
    assert code == 2 and named in err and "llama.cpp" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("m.gguf*"))


def test_mistakes_on_the_way_to_a_gguf_are_one_line(tmp_path, call_script):
    pytest.importorskip("gguf")
    make_run(tmp_path / "run")
    make_run(tmp_path / "wide", CHARS)
    make_run(tmp_path / "endless", CharTokenizer("abcdefghijklmno", ()))
    make_run(tmp_path / "cut", BPETokenizer(BPE.pieces, r"\w+|\W+"))
    (tmp_path / "there.gguf").write_text("")
    for words, named in (
        (("run", "there.gguf"), "already exists"), (("wide", "m.gguf"), "'é'"),
        (("endless", "m.gguf"), "ends a text"),
        (("cut", "m.gguf"), "llama.cpp only by patterns of its own"), (("run", "m.gguf", "--dtype=int8"), "q8_0"),
        (("run", "folder", "--dtype=q8_0"), "for a .gguf"), (("cut", "folder"), "cut texts differently"),
        (("run", "none/m.gguf"), "none"),
    ):
        words = [str(tmp_path / word) if not word.startswith("--") else word for word in words]
        code, out, err = call_script("export.py", *words)
        assert code == 2 and named in err and err.count("\n") == 1, (words, err)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "wide", "endless", "cut", "there.gguf"}


def test_a_gguf_has_a_larger_base_and_no_other_stretching(tmp_path, call_script):
    pytest.importorskip("gguf")
    for scaling in ("ntk", "linear", "yarn"):
        make_run(tmp_path / scaling, **LLAMA, rope_scaling=scaling, rope_factor=4.0)
        code, _, err = call_script("export.py", tmp_path / scaling, tmp_path / f"{scaling}.gguf")
        assert (code, err) == (0, "") if scaling == "ntk" else code == 2 and f"rope_scaling={scaling}" in err
        assert (tmp_path / f"{scaling}.gguf").exists() == (scaling == "ntk")
    base = read_gguf(tmp_path / "ntk.gguf")[0]["llama.rope.freq_base"]
    assert base == pytest.approx(5000.0 * 4.0 ** (16 / 14), rel=1e-6)


def test_a_gguf_of_a_model_from_elsewhere(tmp_path, call_script, tiny_dataset):
    """Straight from a Hugging Face folder; without its tokenizer, and with a vocabulary larger than that."""
    ours = hugging_face(tmp_path / "hf", tiny_dataset)
    small = BPETokenizer([bytes([i]) for i in range(256)])
    make_run(tmp_path / "run", small, vocab_size=300)
    (tmp_path / "hf" / "tokenizer.json").unlink()
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "m.gguf")
    assert code == 0 and "without a tokenizer" in out, err
    values, tensors, _ = read_gguf(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.model"] == "none" and values["gpt2.vocab_size"] == ours.config.vocab_size
    assert torch.equal(tensors["blk.0.attn_qkv.weight"], ours.transformer.h[0].attn.c_attn.weight)
    code, out, err = call_script("export.py", tmp_path / "run", tmp_path / "n.gguf")
    assert code == 0, err
    values, tensors, _ = read_gguf(tmp_path / "n.gguf")
    assert len(tensors["token_embd.weight"]) == len(values["tokenizer.ggml.tokens"]) == 300
    assert values["tokenizer.ggml.token_type"] == [1] * 256 + [3] + [5] * 43


@pytest.mark.parametrize("case", GGUF)
def test_llama_cpp_draws_the_same(case, tmp_path, call_script):
    """Its ids of a text, its logits (its GELU is a table of half floats) and its greedy text are ours."""
    llama_cpp = pytest.importorskip("llama_cpp")
    changes, tokenizer = GGUF[case]
    ours = make_run(tmp_path / "run", tokenizer, **changes)
    code, out, err = call_script("export.py", tmp_path / "run", tmp_path / "m.gguf")
    assert code == 0, err
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=32, logits_all=True, verbose=False, type_k=0, type_v=0)
    text = TEXT if tokenizer is BPE else "the end of it\n"
    ids = tokenizer.encode(text)
    assert theirs.tokenize(text.encode(), add_bos=False) == ids
    assert (theirs.token_bos(), theirs.token_eos()) == (tokenizer.bos, tokenizer.eos)
    drawn = Engine(ours).generate(ids[:5], max_new_tokens=20, temperature=0).ids
    theirs.eval(ids[:5])
    for _ in range(20):
        theirs.eval([int(theirs.scores[theirs.n_tokens - 1].argmax())])
    assert theirs.input_ids[:25].tolist() == drawn
    most = 1e-3 if case.startswith("gpt2") else 1e-5
    assert (logits(ours, drawn) - torch.from_numpy(theirs.scores[:25])).abs().max() < most
    theirs.close()


# -----------------------------------------------------------------------------
# What others write


@pytest.mark.parametrize("tokenizer", [BPE, CHARS, CharTokenizer("ab", specials=())], ids=["bpe", "char", "bare"])
@pytest.mark.parametrize("resaved", [False, True], ids=["ours", "saved by transformers"])
def test_a_folder_with_tokenizer_json_alone_is_read_back(tokenizer, resaved, tmp_path, call_script):
    ours = make_run(tmp_path / "run", tokenizer)
    assert call_script("export.py", tmp_path / "run", tmp_path / "hf")[0] == 0
    if resaved:
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "hf")
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "back")
    assert code == 0 and err == "" and "with its tokenizer" in out
    model, words, _, _ = load(tmp_path / "back")
    text = TEXT if tokenizer.kind == "bpe" or len(tokenizer.chars) > 2 else "abba"
    ids = tokenizer.encode(text)
    assert words.encode(text) == ids and words.special_tokens == tokenizer.special_tokens and words.eos == tokenizer.eos
    greedy = {"max_new_tokens": 10, "temperature": 0}
    assert Engine(model).generate(ids[:5], **greedy).ids == Engine(ours).generate(ids[:5], **greedy).ids


def without_order(fields):
    vocab = fields["model"]["vocab"]
    last = vocab.pop("<|endoftext|>")
    fields["model"]["vocab"] = {word: last - 1 - i for word, i in vocab.items()}


@pytest.mark.parametrize("spoil, why", [
    (without_order, "order of its merges"),
    (lambda fields: fields.update(pre_tokenizer={"type": "Metaspace"}), "byte-level BPE"),
    (lambda fields: fields.update(normalizer={"type": "NFKC"}), "changes a text"),
    (lambda fields: fields["added_tokens"].append({"content": "<pad>", "id": 999}), "special tokens"),
    (lambda fields: fields["model"].update(type="Unigram", vocab=[["a", -0.5]]), "byte-level BPE"),
    (lambda fields: fields["model"].update(end_of_word_suffix="</w>"), "byte-level BPE"),
    (lambda fields: fields["model"].update(vocab=3), "damaged"),
], ids=["another order", "other cuts", "a normalizer", "a gap", "Unigram", "a suffix", "damaged"])
def test_weights_come_without_a_tokenizer_of_another_kind(spoil, why, tmp_path, call_script):
    ours = make_run(tmp_path / "run", vocab_size=BPE.vocab_size + 7)
    assert call_script("export.py", tmp_path / "run", tmp_path / "hf")[0] == 0
    path = tmp_path / "hf" / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    spoil(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "back")
    assert code == 0 and err.startswith("warning: the model comes without its tokenizer") and why in err
    assert err.count("\n") == 1 and "--tokenizer=" in err
    ids = BPE.encode(TEXT)[:20]
    assert torch.equal(logits(ours, ids), logits(load(tmp_path / "back")[0], ids))


@pytest.mark.parametrize("words", [{"<s>": 0, "<pad>": 1, "a": 2}, {"▁the": 0, "<|endoftext|>": 1}, ["a"]], ids=str)
def test_a_vocab_json_of_another_kind_leaves_the_weights(words, tmp_path, call_script):
    make_run(tmp_path / "run")
    assert call_script("export.py", tmp_path / "run", tmp_path / "hf")[0] == 0
    (tmp_path / "hf" / "tokenizer.json").unlink()
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "back")
    assert code == 0 and err.startswith("warning: ") and "without a tokenizer" in out


@pytest.mark.parametrize("merges, kept", [("#version: 0.2\nt h\nth e\n", True), ("t h\nh e\n", False)])
def test_the_merges_beside_a_vocab_json_have_its_order(merges, kept, tmp_path, call_script):
    words = [*(bytes_to_unicode()[byte] for byte in range(256)), "th", "the", "<|endoftext|>"]
    make_run(tmp_path / "run")
    assert call_script("export.py", tmp_path / "run", tmp_path / "hf")[0] == 0
    (tmp_path / "hf" / "tokenizer.json").unlink()
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "hf" / "merges.txt").write_text(merges)
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "back")
    assert code == 0 and (load(tmp_path / "back")[1] is not None) == kept == (err == "")


@pytest.mark.parametrize("more", [1, 300])
def test_a_tokenizer_with_more_tokens_than_the_model_is_left(more, tmp_path, call_script):
    make_run(tmp_path / "run")
    assert call_script("export.py", tmp_path / "run", tmp_path / "hf")[0] == 0
    names = tuple(f"<{i}>" for i in range(more))
    BPETokenizer(BPE.pieces, specials=(*names, "<|endoftext|>")).save(tmp_path / "hf")
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "back")
    assert code == 0 and f"{BPE.vocab_size + more} tokens, the model only" in err and err.count("\n") == 1
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "new", f"--tokenizer={tmp_path / 'hf'}")
    assert code == 2 and "the model only" in err and not (tmp_path / "new").exists()  # the one that was asked for


def test_a_tied_model_with_its_head_alone_is_read(tmp_path, call_script):
    ours = make_run(tmp_path / "run")
    assert call_script("export.py", tmp_path / "run", tmp_path / "hf")[0] == 0
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, path)
    assert call_script("export.py", tmp_path / "hf", tmp_path / "back")[0] == 0
    ids = BPE.encode(TEXT)[:20]
    assert torch.equal(logits(ours, ids), logits(load(tmp_path / "back")[0], ids))


@pytest.mark.parametrize("name", ["attn.bias", "attn.masked_bias"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_masks_in_a_checkpoint_of_nanogpts_are_left_out(name, prefix, tmp_path, call_script):
    ours = nanogpt(tmp_path / "ckpt.pt", prefix=prefix)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    saved["model"] |= {f"{prefix}transformer.h.{i}.{name}": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    torch.save(saved, tmp_path / "ckpt.pt")
    code, out, err = call_script("export.py", tmp_path / "ckpt.pt", tmp_path / "run")
    assert code == 0, err
    assert torch.equal(logits(ours, [1, 2, 3]), logits(load(tmp_path / "run")[0], [1, 2, 3]))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548118077\n"


@pytest.mark.parametrize("name, content, named", [
    ("model.safetensors", POINTER, "git lfs pull"), ("config.json", POINTER, "git lfs pull"),
    ("config.json", '{"model_type": "gpt', "config.json is damaged"), ("config.json", "[]", "config.json is damaged"),
    ("model.safetensors", "not a tensor", "model.safetensors is damaged"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
     "model-00001-of-00002.safetensors is missing"),
], ids=["weights", "config", "cut", "no object", "damaged", "shard"])
def test_what_is_wrong_with_a_hugging_face_folder_is_named(name, content, named, tmp_path, call_script):
    make_run(tmp_path / "run")
    assert call_script("export.py", tmp_path / "run", tmp_path / "hf")[0] == 0
    (tmp_path / "hf" / name).write_text(content)
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "back")
    assert code == 2 and named in err and err.count("\n") == 1 and not (tmp_path / "back").exists()


def test_a_pointer_in_the_place_of_a_ckpt_is_named(tmp_path, call_script):
    (tmp_path / "ckpt.pt").write_text(POINTER)
    code, out, err = call_script("export.py", tmp_path / "ckpt.pt", tmp_path / "run")
    assert code == 2 and "git lfs pull" in err and err.count("\n") == 1


def test_the_hub_without_its_package_names_it(tmp_path, call_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    code, out, err = call_script("export.py", "gpt2-large", tmp_path / "run")
    assert code == 2 and "pip install huggingface-hub" in err and err.count("\n") == 1


def test_a_field_of_a_fork_is_named_and_not_dropped():
    """Without its field a fork's model would be another one; at its default it is the same."""
    fork = make_dataclass("Fork", [("shift", bool, False)], bases=(GPTConfig,))
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=64)
    assert export.family_of(fork(**sizes), export.FAMILIES, "transformers") == "gpt2"
    with pytest.raises(ValueError, match="shift=True: export.py does not know this field"):
        export.family_of(fork(**sizes, shift=True), export.FAMILIES, "transformers")
