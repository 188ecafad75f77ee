"""Calibration: fp8's scales and int4's codes, what they are made of, and that every script finds them."""

import contextlib
import copy
import json
import shutil

import pytest
import torch

from checkpoint import steps
from dataset import open_datasets, open_tokens
from float8 import E4M3, cast
from infer import Engine, load
from inference import calibration, gptq
from inference.quantize import convert
from inference.rounding import round_groups
from loader import Batch
from model import GPT, GPTConfig

pytest_plugins = ["runs"]
SIZES = dict(n_layer=2, n_embd=64, block_size=32, batch_size=8, activation="relu2")
FEW = ["--num_samples=1", "--max_new_tokens=2"]  # ends a script soon


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run that has learned its text. Copy it; do not change it."""
    folder = tmp_path_factory.mktemp("fp8") / "run"
    done = tiny(folder, **SIZES, max_iters=200, eval_interval=200)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def evaluated(call_script):
    """evaluated("calibrate", folder, ...) runs eval.py. -> (its last line, stderr)"""
    def run(verb, folder, *args):
        code, out, err = call_script("eval.py", verb, f"--out_dir={folder}", "--device=cpu", *args)
        assert code == 0, err
        return json.loads(out.splitlines()[-1]), err

    return run


def file_of(folder, quantize="fp8"):
    return calibration.path_of(max(steps(folder).values()), quantize)


# -----------------------------------------------------------------------------
# fp8


def test_the_scale_has_the_least_squared_error():
    """Against the error of real casts of the numbers themselves, for every scale that is tried."""
    torch.manual_seed(0)
    x = torch.randn(20000)
    x[7] = 30.0  # an outlier
    record = calibration.summarize("it", calibration.magnitude_counts(x), x.abs().max())
    assert record["largest"] == 30.0 and 3.5 < record["p99_99"] < 5
    assert sum(record["octaves"].values()) == 20000

    def error(scale):
        scale = torch.tensor(scale)
        return float((cast(x, scale, E4M3).float() * scale - x).double().square().sum())

    errors = [error(30 / 448 * 2 ** (-step / 16)) for step in range(96)]
    assert error(record["scale"]) < 1.02 * min(errors)  # counts know a number to 1/128
    assert max(errors) > 10 * min(errors)


def test_zeros_have_a_scale_and_infinity_is_refused():
    zeros = torch.zeros(100)
    record = calibration.summarize("it", calibration.magnitude_counts(zeros), zeros.max())
    assert record["scale"] > 0 and record["error"] == 0.0
    x = torch.tensor([1.0, torch.inf])
    with pytest.raises(ValueError, match="what it reads is not finite"):
        calibration.summarize("it", calibration.magnitude_counts(x), x.max())


def test_perplexity_dynamic_static_and_on_noise(copied, evaluated):
    plain, _ = evaluated("loss", copied, "--dtype=bfloat16")
    dynamic, err = evaluated("loss", copied, "--quantize=fp8")
    assert "fp8: dynamic scales" in err
    made, _ = evaluated("calibrate", copied)
    assert made["layers"] == 8 and file_of(copied).exists()
    static, err = evaluated("loss", copied, "--quantize=fp8")
    assert "fp8: static scales of 8 layers" in err and err.count("\n") == 1
    assert plain["perplexity"] < 5  # it has learned something that can be lost
    assert 0 < abs(dynamic["perplexity"] / plain["perplexity"] - 1) < 0.01
    assert 0 < abs(static["perplexity"] / dynamic["perplexity"] - 1) < 0.01
    evaluated("calibrate", copied, "--noise")
    noise, err = evaluated("loss", copied, "--quantize=fp8")
    assert "noise, as a control" in err and noise["perplexity"] > 1.02 * static["perplexity"]


def test_a_calibration_is_the_same_every_time_and_names_what_it_was_made_of(copied, evaluated):
    made, _ = evaluated("calibrate", copied, "--eval_iters=1", "--batch_size=4")
    first = file_of(copied).read_bytes()
    evaluated("calibrate", copied, "--eval_iters=1", "--batch_size=4")
    assert file_of(copied).read_bytes() == first
    found = json.loads(first)
    state = json.loads((file_of(copied).parent / "state.json").read_text())
    assert found["weights_sha256"] == state["files"]["model.safetensors"]
    assert found["dataset_sha256"] == state["dataset_sha256"] == made["dataset_sha256"]
    assert found["tokens"] == 4 * 32


@pytest.mark.parametrize("script", ["eval.py", "sample.py"])
def test_stale_or_damaged_scales_are_refused(copied, evaluated, call_script, script):
    evaluated("calibrate", copied, "--eval_iters=1")
    found = json.loads(file_of(copied).read_text())
    for content, match in [(json.dumps({**found, "weights_sha256": "0" * 64}), "was made for other weights"),
                           ("{", "cannot be read"), (json.dumps({**found, "layers": 3}), "cannot be read")]:
        file_of(copied).write_text(content)
        code, _, err = call_script(script, f"--out_dir={copied}", "--device=cpu", "--quantize=fp8", *FEW)
        assert code == 2 and err.count("\n") == 1 and match in err
        assert "python eval.py calibrate" in err and "without the file, scales are dynamic" in err
        code, _, err = call_script(script, f"--out_dir={copied}", "--device=cpu", "--quantize=int8", *FEW)
        assert code == 0, err  # int8 does not read it


@pytest.mark.parametrize("options, match", [
    (["--quantize=int8"], "--quantize=int8 has no calibration: fp8, int4, int4_64, int4_128 have one"),
    (["--quantize=int4", "--split=train"], "leave split out"),
    (["--quantize=int4", "--noise"], "leave noise out"),
    (["--block_size=33"], "the model sees at most 32 tokens"),
])
def test_calibrate_refuses(copied, call_script, options, match):
    code, _, err = call_script("eval.py", "calibrate", f"--out_dir={copied}", "--device=cpu", *options)
    assert code == 2 and match in err and err.count("\n") == 1 and not file_of(copied).exists()


# -----------------------------------------------------------------------------
# int4


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=2, n_embd=64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def batches_of(count):
    return [Batch(idx, idx) for idx in torch.randint(100, (count, 8, 32))]


def test_moments_are_means_over_all_tokens_whatever_autocast_does(model):
    batches = batches_of(2)
    moments, tokens = calibration.second_moments(model, batches, lambda: torch.autocast("cpu", torch.bfloat16))
    assert tokens == 2 * 8 * 32 and len(moments) == 8 and "lm_head" not in moments
    seen = []
    hook = model.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in batches:
            model(batch.x)
    hook.remove()
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    x = torch.cat(seen).flatten(0, 1).double()
    torch.testing.assert_close(moments["transformer.h.1.mlp.c_proj"].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="what transformer.h.0.attn.c_attn reads is not finite"):
        calibration.second_moments(model, batches, contextlib.nullcontext)


def test_convert_takes_codes_that_change_the_outputs_less(model):
    batches = batches_of(8)
    moments, _ = calibration.second_moments(model, batches, contextlib.nullcontext)
    nearest = convert(copy.deepcopy(model), quantize="int4_64")
    calibrated = copy.deepcopy(model)
    gptq.use_codes(calibrated, gptq.round_layers(model, moments, 64))
    assert all(torch.equal(p, q) for p, q in zip(calibrated.parameters(), model.parameters(), strict=True))
    convert(calibrated, quantize="int4_64")
    with torch.no_grad():
        logits = [m(batches[0].x)[0] for m in (model, nearest, calibrated)]
    errors = [(other - logits[0]).square().mean() for other in logits[1:]]
    assert 0 < errors[1] < 0.9 * errors[0]

    name = "transformer.h.0.mlp.c_fc"
    weighted = gptq.round_layers(model, moments, 64, in_turn=False)[name].read()
    weight = model.get_submodule(name).weight
    assert torch.equal(weighted[0], round_groups(weight, 4, 64, moments[name].diagonal())[0])


def test_codes_come_back_from_their_file(model, tmp_path):
    moments, _ = calibration.second_moments(model, batches_of(1), contextlib.nullcontext)
    path = tmp_path / "codes.safetensors"
    codes = gptq.round_layers(model, moments, 32)
    gptq.save_codes(path, codes, {"weights": "abc"})
    facts, again = gptq.read_codes(path)
    assert facts["weights"] == "abc" and again.keys() == codes.keys()
    for name, packed in again.items():
        assert packed.group == 32
        assert all(torch.equal(a, b) for a, b in zip(packed.read()[:2], codes[name].read()[:2], strict=True))
    for changes, match in [({"n_layer": 3}, "only one of the two has transformer.h.2"), ({"n_embd": 32}, "c_attn has")]:
        sizes = {"block_size": 32, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_embd": 64, **changes}
        with pytest.raises(ValueError, match=f"another model's: .*{match}"):
            gptq.use_codes(GPT(GPTConfig(**sizes)), again)


@pytest.mark.parametrize("losses, best", [([3.0, 2.0, 1.0], "gptq"), ([2.0, 1.0, 1.5], "weighted"),
                                          ([1.0, 1.0, 1.0], "nearest")])
def test_the_least_loss_decides_and_equals_stay_plain(model, losses, best):
    moments, _ = calibration.second_moments(model, batches_of(1), contextlib.nullcontext)
    given = iter(losses)
    way, found, codes = calibration.best_codes(model, "int4", moments, lambda _: next(given))
    assert way == best and list(found.values()) == losses and (codes is None) == (best == "nearest")
    assert not hasattr(model.transformer.h[0].attn.c_attn, "packed")


def test_every_script_finds_the_codes(copied, evaluated, call_script, capsys):
    nearest, err = evaluated("loss", copied, "--quantize=int4_128")
    assert "int4_128: not calibrated; python eval.py calibrate --quantize=int4_128 looks for better codes" in err
    made, _ = evaluated("calibrate", copied, "--quantize=int4_128", "--eval_iters=2")
    assert made["codes"] != "nearest" and made["losses"][made["codes"]] < made["losses"]["nearest"]
    path = file_of(copied, "int4_128")
    assert path.name == "int4_128_calibration.safetensors" and made["file"] == str(path)
    calibrated, err = evaluated("loss", copied, "--quantize=int4_128")
    assert "int4_128: codes of 8 layers, calibrated on" in err and err.count("\n") == 1
    # one batch is the whole validation split: what the choice saw is what eval.py says
    assert nearest["loss"] == made["losses"]["nearest"] and calibrated["loss"] == made["losses"][made["codes"]]

    code, _, err = call_script("sample.py", f"--out_dir={copied}", "--device=cpu", "--quantize=int4_128", *FEW)
    assert code == 0 and "int4_128: codes of 8 layers" in err
    engine = Engine.load(copied, device="cpu", dtype="float32", quantize="int4_128")
    assert "int4_128: codes of 8 layers" in capsys.readouterr().err
    plain, _, state, _ = load(copied)
    by_hand = copy.deepcopy(plain)
    gptq.use_codes(by_hand, gptq.read_codes(path)[1])
    idx = torch.arange(16)[None]
    with torch.no_grad():
        logits = [m(idx)[0] for m in (engine.model, convert(by_hand, quantize="int4_128"),
                                      convert(plain, quantize="int4_128"))]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    _, err = evaluated("loss", copied, "--quantize=int4")
    assert "int4: not calibrated" in err  # other groups have a file of their own


def test_codes_are_the_same_every_time_and_name_what_they_were_made_of(copied, evaluated):
    few = ["--quantize=int4_64", "--eval_iters=1", "--batch_size=4"]
    made, _ = evaluated("calibrate", copied, *few)
    first = file_of(copied, "int4_64").read_bytes()
    evaluated("calibrate", copied, *few)
    assert file_of(copied, "int4_64").read_bytes() == first
    facts, codes = gptq.read_codes(file_of(copied, "int4_64"))
    state = json.loads((file_of(copied).parent / "state.json").read_text())
    assert facts["weights_sha256"] == state["files"]["model.safetensors"]
    assert facts["dataset_sha256"] == state["dataset_sha256"] == made["dataset_sha256"]
    assert facts["tokens"] == 4 * 32 and facts["split"] == "train"
    assert "lm_head" not in codes and len(codes) == 8
    model, _, _, _ = load(copied)
    tokens = open_tokens(open_datasets(state["config"]["dataset"])[0], "train", model.config.vocab_size)
    moments, _ = calibration.second_moments(model, calibration.windows(tokens, 32, 4, 1), contextlib.nullcontext)
    by_hand = gptq.round_layers(model, moments, 64, in_turn=made["codes"] == "gptq")
    assert all(torch.equal(codes[name].read()[0], by_hand[name].read()[0]) for name in by_hand)


def test_without_a_gain_nothing_is_written(copied, evaluated, monkeypatch, capsys):
    file_of(copied, "int4").write_bytes(b"of before")

    def zeros(model, moments, group, in_turn=True):
        rounded = {}
        for name, layer in gptq.linear_layers(model).items():
            codes, scale, _ = round_groups(layer.weight, 4, group)
            rounded[name] = gptq.Packed(4, group, lambda parts=(codes, scale * 0, None): parts)
        return rounded

    monkeypatch.setattr(gptq, "round_layers", zeros)
    made, _ = evaluated("calibrate", copied, "--quantize=int4", "--eval_iters=1")
    assert made["codes"] == "nearest" and made["file"] is None
    assert not file_of(copied, "int4").exists()


@pytest.mark.parametrize("script", ["eval.py", "sample.py"])
def test_stale_or_damaged_codes_are_refused(copied, evaluated, call_script, script):
    assert evaluated("calibrate", copied, "--quantize=int4_64", "--eval_iters=1")[0]["file"]
    path = file_of(copied, "int4_64")
    content = path.read_bytes()
    facts, codes = gptq.read_codes(path)
    flipped = bytearray(content)
    flipped[-9] ^= 1

    def saved(**changes):
        gptq.save_codes(path, codes, {**facts, **changes})
        return path.read_bytes()

    for damaged, match in [(content[:-9], "cannot be read"), (b"", "cannot be read"),
                           (bytes(flipped), "its sha256 is not what it was"),
                           (saved(weights_sha256="0" * 64), "was made for other weights"),
                           (saved(format="other"), "its format is 'other'")]:
        path.write_bytes(damaged)
        code, _, err = call_script(script, f"--out_dir={copied}", "--device=cpu", "--quantize=int4_64", *FEW)
        assert code == 2 and err.count("\n") == 1 and match in err
        assert "python eval.py calibrate" in err and "--quantize=int4_64 makes it again; without the file" in err
    path.write_bytes(damaged)
    path.rename(file_of(copied, "int4"))
    assert call_script(script, f"--out_dir={copied}", "--device=cpu", *FEW)[0] == 0  # nothing reads it
    evaluated("calibrate", copied, "--quantize=int4_64", "--eval_iters=1")  # the mend
    path.rename(file_of(copied, "int4"))
    code, _, err = call_script(script, f"--out_dir={copied}", "--device=cpu", "--quantize=int4", *FEW)
    assert code == 2 and "its groups have another size" in err
