"""Weights as 4- and 8-bit codes: the numbers that llama.cpp's formats have, and the scale of least squared error."""


import pytest
import torch

from inference import gptq
from inference.rounding import GROUPS, round_groups, ungroup

torch.manual_seed(0)
WEIGHT = torch.randn(48, 256) * 0.02


def squared_error(weight, *rounded, bits=4):
    return (ungroup(*rounded, bits)[:, : weight.size(1)] - weight).square().sum()


def largest_to_minus_8(weight, group):
    """q4_0 as llama.cpp rounds: the largest weight of a group becomes -8 steps."""
    groups = weight.view(-1, group)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scale = (largest / -8).half()
    codes = (groups / scale.float()).round().clamp(-8, 7) + 8
    return codes.to(torch.uint8).view(weight.shape), scale.view(len(weight), -1), None


@pytest.mark.parametrize("group", GROUPS)
def test_shapes_and_the_formula(group):
    for bits, half in ((4, 8), (8, 128)):
        codes, scale, minimum = round_groups(WEIGHT, bits, group)
        assert (codes.dtype, scale.dtype, minimum) == (torch.uint8, torch.float16, None)
        assert codes.shape == WEIGHT.shape and scale.shape == (48, 256 // group) and int(codes.max()) < 2 * half
        wide = scale.float().repeat_interleave(group, 1)
        assert torch.equal(ungroup(codes, scale, None, bits), (codes.float() - half) * wide)
        lowest = torch.zeros_like(scale) + 0.5
        assert torch.equal(ungroup(codes, scale, lowest, bits), codes * wide + 0.5)


@pytest.mark.parametrize("group", GROUPS)
def test_each_code_is_the_nearest_for_its_scale(group):
    """Of the scale that float16 can hold, not of the one before it was rounded."""
    for bits, first, last in ((4, -8, 7), (8, -128, 127)):
        codes, scale, _ = round_groups(WEIGHT, bits, group)
        wide = scale.double().repeat_interleave(group, 1)
        nearest = (WEIGHT.double() / wide).clamp(first, last)
        assert ((codes.double() - 2 ** (bits - 1) - nearest).abs() < 0.5 + 1e-4).all()


@pytest.mark.parametrize("group", GROUPS)
def test_four_bits_beat_the_largest_weight_in_every_group(group):
    ours = round_groups(WEIGHT, 4, group)
    errors = []
    for rounded in (ours, largest_to_minus_8(WEIGHT, group)):
        errors.append((ungroup(*rounded, 4) - WEIGHT).view(-1, group).square().sum(1))
    assert (errors[0] <= errors[1] * (1 + 1e-3)).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


def test_eight_bits_keep_the_largest_weight():
    codes, scale, _ = round_groups(WEIGHT, 8, 32)
    largest = WEIGHT.view(-1, 32).abs().amax(1)
    torch.testing.assert_close(scale.flatten().float(), largest / 127, rtol=2**-11, atol=2**-25)
    assert squared_error(WEIGHT, codes, scale, None, bits=8) < 1e-4 * WEIGHT.square().sum()


def test_importance_lowers_the_error_where_it_counts():
    importance = torch.ones(256)
    importance[::5] = 50
    plain, weighed = round_groups(WEIGHT, 4, 64), round_groups(WEIGHT, 4, 64, importance)

    def counted(rounded):
        return ((ungroup(*rounded, 4) - WEIGHT).square() * importance).sum()

    assert counted(weighed) < 0.97 * counted(plain)
    assert squared_error(WEIGHT, *weighed) > squared_error(WEIGHT, *plain)
    assert torch.equal(round_groups(WEIGHT, 4, 64, 7 * torch.ones(256))[0], plain[0])


def test_each_group_is_rounded_alone(monkeypatch):
    """Whatever is rounded at once, and whatever lies beside it; with an importance too."""
    importance = torch.rand(256)
    whole = round_groups(WEIGHT, 4, 32, importance)
    monkeypatch.setattr("inference.rounding.PIECE", 13)
    for part, same in zip(round_groups(WEIGHT, 4, 32, importance)[:2], whole[:2], strict=True):
        assert torch.equal(part, same)
    alone = round_groups(WEIGHT[5:6, 64:128], 4, 32, importance[64:128])
    assert torch.equal(alone[0], whole[0][5:6, 64:128]) and torch.equal(alone[1], whole[1][5:6, 2:4])


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_are_no_multiple_of_the_group(bits):
    codes, scale, _ = round_groups(WEIGHT[:, :200], bits, 64)
    assert codes.shape == (48, 256) and scale.shape == (48, 4)
    assert (codes[:, 200:] == 2 ** (bits - 1)).all()
    assert torch.equal(codes[:, :192], round_groups(WEIGHT[:, :192], bits, 64)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_zeros_stay_zeros(bits):
    weight = WEIGHT.clone()
    weight[3, 32:64] = 0
    weight[4] = 0
    back = ungroup(*round_groups(weight, bits, 32), bits)
    assert torch.equal(back[3, 32:64], torch.zeros(32)) and torch.equal(back[4], torch.zeros(256))
    codes, scale, minimum = round_groups(torch.zeros(2, 64), bits, 32)
    assert (codes == 2 ** (bits - 1)).all() and not scale.any() and minimum is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1.0, 1e4])
def test_weights_of_any_size(bits, size):
    """Scales below the least float16 would make zeros or infinities of small weights."""
    weight = WEIGHT / WEIGHT.abs().max() * size
    back = ungroup(*round_groups(weight, bits, 32), bits)
    assert torch.isfinite(back).all() and (back - weight).abs().max() < max(0.2 * size, 2**-21)


def test_a_weight_that_cannot_be_rounded_is_named():
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = WEIGHT.clone()
        weight[7, 9] = bad
        with pytest.raises(ValueError, match="h.0.mlp.weight holds numbers that are not finite"):
            round_groups(weight, 4, 32, name="h.0.mlp.weight")
    for bits in (4, 8):
        with pytest.raises(ValueError, match="too large for scales in float16"):
            round_groups(WEIGHT * 1e9, bits, 32)
    for bits, group in ((3, 32), (4, 48)):
        with pytest.raises(ValueError, match=f"{bits} bits in groups of {group}"):
            round_groups(WEIGHT, bits, group)


@pytest.mark.parametrize("kind, bits", [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_what_llama_cpp_has_rounded_comes_back_unchanged(kind, bits):
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(WEIGHT.numpy(), number), number))
    rounded = round_groups(theirs, bits, 32)
    assert torch.equal(ungroup(*rounded, bits), theirs) and (rounded[2] is not None) == (kind == "Q4_1")
    assert not torch.equal(ungroup(*round_groups(WEIGHT, bits, 32), bits), WEIGHT)


# -----------------------------------------------------------------------------
# GPTQ


def correlated(count, size):
    """Inputs (count, size) that share a few directions, some of them large."""
    torch.manual_seed(1)
    return torch.randn(count, size // 8) @ torch.randn(size // 8, size) + 0.3 * torch.randn(count, size)


def test_without_correlation_there_is_nothing_to_make_up_for():
    codes, scale = gptq.round_in_turn(WEIGHT[:, :200], torch.eye(200), 64)
    nearest = round_groups(WEIGHT[:, :200], 4, 64)
    assert torch.equal(codes, nearest[0]) and torch.equal(scale, nearest[1])


@pytest.mark.parametrize("group", GROUPS)
def test_the_outputs_are_nearer_though_the_weights_are_farther(group):
    x = correlated(4096, 200)
    weight = WEIGHT[:, :200]
    errors = []
    for codes, scale in (gptq.round_in_turn(weight, x.T @ x / len(x), group), round_groups(weight, 4, group)[:2]):
        change = ungroup(codes, scale, None, 4)[:, :200] - weight
        errors.append(((x @ change.T).square().mean(), change.square().mean()))
    assert errors[0][0] < 0.5 * errors[1][0] and errors[0][1] > errors[1][1]


def test_a_calibration_names_a_weight_that_is_not_finite():
    with pytest.raises(ValueError, match="head holds numbers that are not finite"):
        gptq.round_in_turn(WEIGHT * torch.nan, torch.eye(256), 32, "head")
