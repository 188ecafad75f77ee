"""kernels.cpp and the layers over it hold to PyTorch's results, in each form's own arithmetic and on other CPUs too."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import native
from inference import kernels
from inference.kvcache import attend_blocks
from inference.rounding import ungroup
from inference.tiled import TiledLinear

FP32, BF16 = torch.float32, torch.bfloat16
FLOATS = [(32, 1, False), (16, 1, False)]  # bits, group, with a minimum
CODES = [(bits, group, lowest) for bits in (8, 4) for group in (32, 64, 128) for lowest in (False, True)]
SIZES = [(1, 1), (17, 33), (50, 48), (96, 200), (33, 300), (48, 128)]  # outputs, inputs
ROWS = [*range(1, 18), 33, kernels.MOST_ROWS, kernels.MOST_ROWS + 1, 80]
HALF_STEP = 2.0**-8  # of a number in bfloat16, relative

NATIVE = native.FLAGS
# Flags of other CPUs, and the word in /proc/cpuinfo that says that this one has their instructions
OTHERS = {"-march=x86-64-v2": "sse4_2", "-march=x86-64-v3": "avx2", "-march=x86-64-v4": "avx512bw",
          "-march=native -mno-amx-bf16": "avx512_bf16"}


@pytest.fixture
def library():
    if not kernels.available():
        pytest.skip(kernels.trouble())


# -----------------------------------------------------------------------------
# Products


def layer_of(form, outputs, inputs, bias=True):
    """-> (TiledLinear with random weights, its weight in fp32, the size of what a weight is made of)"""
    bits, group, lowest = form
    torch.manual_seed(outputs + inputs + bits)
    if form in FLOATS:
        linear = nn.Linear(inputs, outputs, bias).to(FP32 if bits == 32 else BF16)
        weight = linear.weight.detach().float()
        return TiledLinear.of_floats(linear), weight, weight.abs()
    width = inputs + -inputs % group
    codes = torch.randint(2**bits, (outputs, width), dtype=torch.uint8)
    scale = (torch.rand(outputs, width // group) / 2**bits).half()
    minimum = torch.randn_like(scale) if lowest else None
    offsets = torch.randn(outputs) if bias else None
    weight = ungroup(codes, scale, minimum, bits)[:, :inputs]
    largest = weight.abs()
    if lowest:  # its two parts are summed apart
        largest = ungroup(codes, scale, minimum.abs(), bits)[:, :inputs]
    return TiledLinear.of_codes(codes, scale, minimum, offsets, bits, inputs), weight, largest


def rounded_activations(x):
    """Rows (M, K) in 8 bits: each group of 32 has a scale of its own, 127 steps for the largest."""
    groups = F.pad(x, (0, -x.size(1) % 32)).unflatten(1, (-1, 32))
    largest = groups.abs().amax(2, keepdim=True)
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, 0)  # 127 / largest would be 127 * (1 / largest)
    return ((groups * inverse).round() * (largest / 127)).flatten(1)[:, : x.size(1)]


def check_products(form, outputs, inputs, rows, dtype, bias=True):
    layer, weight, largest = layer_of(form, outputs, inputs, bias)
    x = torch.randn(rows, inputs).to(dtype)
    read = x.float()
    many = rows > kernels.MOST_ROWS
    if not many and form in CODES:
        read = rounded_activations(read)
    elif form[0] == 16 or many and form in CODES and kernels.has_amx():
        read = read.to(BF16).float()
        weight = weight.to(BF16).float()
    offsets = layer.bias if bias else torch.zeros(outputs)
    exact = read.double() @ weight.double().T + offsets.double()
    # the most that sums of this many terms in fp32 can be off, and what a result in bfloat16 is rounded by
    bound = (inputs + 8) * 2.0**-24 * (read.abs() @ largest.T + offsets.abs())
    if dtype == BF16 or many and form[0] == 16:
        bound += 3 * HALF_STEP * (exact.abs() + offsets.abs())
    y = layer(x)
    assert y.dtype == dtype and y.shape == (rows, outputs)
    off = (y.double() - exact).abs()
    assert (off <= bound).all(), (form, outputs, inputs, rows, (off / bound).max())


@pytest.mark.parametrize("form", FLOATS + CODES, ids=str)
def test_a_product_is_that_of_its_weights(library, form):
    """Outputs and inputs that fill no tile and no group; every number of rows that one reading of the weights serves,
    and more of them, until it is a product of floats."""
    for outputs, inputs in SIZES:
        for rows in ROWS if (outputs, inputs) == (50, 48) else (1, 3, 4, 16, 21, 33, 50, 64, 65, 80, 130, 200):
            check_products(form, outputs, inputs, rows, FP32)
    for rows in (1, 5, 64, 65):
        check_products(form, 50, 48, rows, BF16)
        check_products(form, 33, 300, rows, FP32, bias=False)


@pytest.mark.parametrize("form", FLOATS + CODES, ids=str)
def test_the_weight_is_what_was_put_in(library, form):
    for outputs, inputs in SIZES:
        layer, weight, _ = layer_of(form, outputs, inputs)
        assert torch.equal(layer.weight(FP32), weight)
        assert torch.equal(layer.weight(BF16), weight.to(BF16))


def test_all_scales_of_half_precision_are_read(library):
    """Also the smallest, which have no leading one, and infinities."""
    scale = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    scale = scale[~scale.isnan()].view(-1, 1)
    codes = torch.full((len(scale), 32), 9, dtype=torch.uint8)
    layer = TiledLinear.of_codes(codes, scale, None, None, 4, 32)
    assert torch.equal(layer.weight(FP32), scale.float().expand(-1, 32))


def test_shapes_around_the_rows_are_kept(library):
    layer, _, _ = layer_of((8, 32, False), 17, 33)
    x = torch.randn(2, 3, 33)
    assert torch.equal(layer(x), layer(x.view(6, 33)).view(2, 3, 17))
    across = torch.randn(33, 6).T
    assert torch.equal(layer(across), layer(across.contiguous()))
    assert layer(x[:0]).shape == (0, 3, 17)


@pytest.mark.parametrize("form", FLOATS + CODES, ids=str)
def test_zeros_give_the_bias(library, form):
    layer, _, _ = layer_of(form, 17, 33)
    for rows in (1, 5, 80):
        assert torch.equal(layer(torch.zeros(rows, 33)), layer.bias.expand(rows, 17))


@pytest.mark.parametrize("form", FLOATS + CODES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none_and_in_its_row(library, form, bad):
    """Rounded to 8 bits it could become a number like any other, and nobody would learn that the model broke."""
    for rows, inputs, dtype in ((5, 100, FP32), (5, 100, BF16), (5, 128, FP32), (80, 128, BF16)):
        layer, _, _ = layer_of(form, 50, inputs)
        x = torch.randn(rows, inputs).to(dtype)
        expected = layer(x)
        x[2, 40] = bad
        y = layer(x)
        others = torch.arange(rows) != 2
        assert not y[2].isfinite().any() and torch.equal(y[others], expected[others])


def test_the_smallest_and_the_largest_activations(library):
    """Numbers so small that 127 steps of them have no inverse in fp32, and so large that their squares have no sum."""
    layer, weight, _ = layer_of((8, 32, False), 50, 100)
    layer.bias = None
    for size in (1e-44, 1e-39, 1e-30, 1e30, 1e36):
        x = torch.randn(3, 100).clamp(-3, 3) * size
        y = layer(x).double()
        assert ((y - x.double() @ weight.double().T).abs() <= 200 * max(size / 127, 1e-38)).all()


def test_bytes_that_a_product_reads():
    assert layer_of((32, 1, False), 32, 64)[0].weight_bytes == 32 * 64 * 4
    assert layer_of((16, 1, False), 32, 64)[0].weight_bytes == 32 * 64 * 2
    assert layer_of((8, 32, False), 32, 64)[0].weight_bytes == 32 * 64 + 32 * 2 * 2
    assert layer_of((4, 64, True), 32, 64)[0].weight_bytes == 32 * 64 // 2 + 32 * 2 * 2


@pytest.mark.parametrize("form", FLOATS + CODES, ids=str)
def test_another_number_of_threads_gives_the_same_bits(library, form, monkeypatch):
    for rows, inputs in ((21, 200), (80, 256)):
        layer, _, _ = layer_of(form, 96, inputs)
        x = torch.randn(rows, inputs)
        results = []
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append(layer(x))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_products_of_pytorch_between_ours(library):
    """oneDNN uses AMX too, in shapes of its own, and would be stopped if it found ours."""
    layer, _, _ = layer_of((16, 1, False), 96, 256)
    x = torch.randn(80, 256).to(BF16)
    plain = nn.Linear(256, 200, dtype=BF16)
    expected = layer(x), plain(x)
    for _ in range(5):
        assert torch.equal(layer(x), expected[0]) and torch.equal(plain(x), expected[1])


def test_threads_of_python_do_not_disturb_each_other(library):
    layers = [layer_of(form, 200, 300)[0] for form in ((8, 32, False), (4, 64, True), (32, 1, False), (16, 1, False))]
    inputs = [torch.randn(rows, 300) for rows in (1, 2, 5, 16)]
    expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]

    def repeat(i):
        return all(torch.equal(layers[i](inputs[i]), expected[i]) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


# -----------------------------------------------------------------------------
# Attention

LENGTHS = (1, 7, 16, 40)  # in blocks of 5


def batch_of(heads, kv_heads, head_dim, dtype, cache_dtype, lengths=LENGTHS):
    """-> (q, k, v, keys, values, slots, table, lengths, block) as kernels.attend takes them. q, k and v are parts of
    one product, so their rows lie apart, and the blocks of the requests lie scattered."""
    g = torch.Generator().manual_seed(heads * head_dim)
    B, size = len(lengths), 5
    qkv = torch.randn(B, heads + 2 * kv_heads, head_dim, generator=g).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    keys, values = (torch.randn(kv_heads, 40 * size, head_dim, generator=g).to(cache_dtype) for _ in range(2))
    table = torch.randperm(40, generator=g)[: B * 9].view(B, 9).int()
    last = torch.tensor(lengths) - 1
    slots = table[torch.arange(B), last // size].long() * size + last % size
    return q, k, v, keys, values, slots, table, torch.tensor(lengths, dtype=torch.int32), size


def check_attention(heads, kv_heads, head_dim, dtype, cache_dtype, scale=1.0):
    q, k, v, keys, values, slots, table, lengths, size = batch_of(heads, kv_heads, head_dim, dtype, cache_dtype)
    q = q * scale if scale != 1 else q
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:, slots] = k.transpose(0, 1).to(cache_dtype)
    expected_values[:, slots] = v.transpose(0, 1).to(cache_dtype)
    y = torch.ops.minichat.attend(q, k, v, keys, values, slots, table, lengths, size)
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)
    blocks = [t.double().transpose(0, 1).unflatten(0, (-1, size)) for t in (keys, values)]
    exact = attend_blocks(q.double(), *blocks, table, lengths)
    assert y.dtype == dtype and y.shape == q.shape
    rounding = HALF_STEP if dtype == BF16 else 0
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=2e-6)


TYPES = [(FP32, FP32), (BF16, BF16), (FP32, BF16), (BF16, FP32)]


@pytest.mark.parametrize("dtype, cache_dtype", TYPES, ids=str)
def test_attention_is_attention_over_the_blocks(library, dtype, cache_dtype):
    for heads, kv_heads in ((4, 4), (4, 2), (6, 1), (1, 1)):
        for head_dim in (1, 7, 16, 33, 64):
            check_attention(heads, kv_heads, head_dim, dtype, cache_dtype)


def test_attention_that_sees_one_key_alone(library):
    check_attention(4, 2, 16, FP32, FP32, scale=300.0)  # the others' shares are below the smallest fp32


def test_attention_of_a_request_does_not_depend_on_those_beside_or_on_threads(library, monkeypatch):
    q, k, v, keys, values, slots, table, lengths, size = batch_of(6, 2, 33, FP32, BF16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    whole = kernels.attend(q, k, v, keys, values, slots, table, lengths, size)
    for threads in (1, 2, 3, 16):  # with more threads than keys' heads each takes one query head
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(kernels.attend(q, k, v, keys, values, slots, table, lengths, size), whole)
        for i in range(len(LENGTHS)):
            one = slice(i, i + 1)
            own = kernels.attend(q[one], k[one], v[one], keys, values, slots[one], table[one], lengths[one], size)
            assert torch.equal(own, whole[one])


def test_nothing_past_a_requests_length_is_seen(library):
    q, k, v, keys, values, slots, table, lengths, size = batch_of(4, 2, 16, FP32, FP32)
    expected = kernels.attend(q, k, v, keys, values, slots, table, lengths, size)
    seen = torch.zeros(keys.size(1), dtype=torch.bool)
    for row, length in zip(table.long(), LENGTHS, strict=True):
        seen[(row[:, None] * size + torch.arange(size)).flatten()[:length]] = True
    keys[:, ~seen] = values[:, ~seen] = torch.nan
    assert torch.equal(kernels.attend(q, k, v, keys, values, slots, table, lengths, size), expected)


# -----------------------------------------------------------------------------
# Other CPUs


@pytest.mark.slow
@pytest.mark.parametrize("march", OTHERS)
def test_the_ways_of_other_cpus_give_the_same(march, tmp_path, monkeypatch):
    """Without AMX, without instructions for bytes and bfloat16, without 512-bit vectors, and with nothing but loops."""
    if native.compiler() is None or OTHERS[march] not in native.cpu_features().split():
        pytest.skip(f"no compiler, or no CPU for {march}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    others = [flag for flag in NATIVE if not flag.startswith(("-O", "-march"))]
    monkeypatch.setattr(native, "FLAGS", ["-O1", *march.split(), *others])  # -O3 takes a minute for all of them
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    found = kernels.find_library.__wrapped__()
    assert found[0] is not None, found[1]
    monkeypatch.setattr(kernels, "find_library", lambda: found)
    for form in FLOATS + CODES:
        for outputs, inputs in SIZES:
            for rows in (1, 2, 7, 16, 21, 65):
                check_products(form, outputs, inputs, rows, FP32)
            check_products(form, outputs, inputs, 3, BF16)
            layer, weight, _ = layer_of(form, outputs, inputs)
            assert torch.equal(layer.weight(FP32), weight) and torch.equal(layer.weight(BF16), weight.to(BF16))
    test_all_scales_of_half_precision_are_read(None)
    test_the_smallest_and_the_largest_activations(None)
    for dtype, cache_dtype in TYPES:
        for heads, kv_heads, head_dim in ((4, 2, 16), (6, 1, 33), (4, 4, 64)):
            check_attention(heads, kv_heads, head_dim, dtype, cache_dtype)


# -----------------------------------------------------------------------------
# The structures


def test_the_structures_are_those_of_the_source():
    """Eight bytes each, in the order of kernels.cpp's."""
    source = kernels.SOURCE.read_text(encoding="utf-8")
    for structure in (kernels.Matrix, kernels.Batch):
        body = source.partition(f"struct {structure.__name__} {{")[2].partition("};")[0]
        lines = [line.partition("//")[0].strip().rstrip(";") for line in body.splitlines()]
        names = [name.split()[-1].lstrip("*") for line in lines if line for name in line.split(",")]
        assert names == [name for name, _ in structure._fields_]
        assert ctypes.sizeof(structure) == 8 * len(names)
