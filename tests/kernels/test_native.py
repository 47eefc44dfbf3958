"""The CPU's own kernels against their formulas in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from keyed import keyed_input

from ldm.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels cannot be built here")

# The smallest relative error that rounding the result alone would leave, with room for a few roundings on the way.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def close(got, want, dtype):
    error = (got.double() - want).norm() / want.norm()
    assert got.dtype == dtype and error < CLOSE[dtype]


def heads_apart(x, heads):
    return x.double().unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(
    ("b", "n", "m", "heads", "features"),
    [
        (2, 64, 48, 3, 40),
        (1, 37, 77, 2, 40),  # nothing divides anything
        (2, 5, 531, 1, 80),  # more keys than are taken at a time
        (1, 33, 270, 2, 160),
        (1, 18, 17, 1, 512),
        (2, 50, 135, 3, 17),  # an odd number of features
        (3, 1, 1, 2, 24),
        (1, 149, 700, 1, 512),  # keys that do not stay near: groups of queries share a look at them
        (1, 130, 2100, 2, 168),
        (1, 259, 2113, 1, 136),
    ],
)
def test_attention_is_the_softmax_of_products(dtype, b, n, m, heads, features):
    q, k, v = (
        keyed_input(f"attention.{s}", (b, t, heads * features)).to(dtype)
        for s, t in zip("qkv", (n, m, m), strict=True)
    )
    q, scale = q * 3, features**-0.5  # peaked rows
    weights = (scale * heads_apart(q, heads) @ heads_apart(k, heads).transpose(2, 3)).softmax(-1)
    want = (weights @ heads_apart(v, heads)).transpose(1, 2).flatten(2)
    assert native.supports_attention(q, k, v, heads)
    close(native.attention(q, k, v, heads, scale), want, dtype)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(
    ("b", "n", "heads", "features"),
    [(2, 77, 3, 64), (1, 5, 2, 24), (1, 49, 2, 32), (1, 700, 1, 40), (1, 530, 1, 512)],
)
def test_causal_attention_sees_no_later_token(dtype, b, n, heads, features):
    q, k, v = (keyed_input(f"causal.{s}", (b, n, heads * features)).to(dtype) for s in "qkv")
    q, scale = q * 3, features**-0.5
    scores = scale * heads_apart(q, heads) @ heads_apart(k, heads).transpose(2, 3)
    weights = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
    want = (weights @ heads_apart(v, heads)).transpose(1, 2).flatten(2)
    got = native.causal_attention(q, k, v, heads, scale)
    close(got, want, dtype)
    torch.testing.assert_close(got[:, 0], v[:, 0])  # which sees itself alone


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_attention_of_large_scores_overflows_nothing(dtype):
    """Rows whose largest score comes last, far above the others, and rows of scores that are all alike."""
    m = 300
    k = torch.zeros(1, m, 32)
    k[0, :, 0] = torch.arange(m) - 400.0
    v = torch.eye(m)[None, :, :32] + 1
    q = torch.zeros(1, 2, 32)
    q[0, 0, 0] = 2.0
    out = native.attention(q.to(dtype), k.to(dtype), v.to(dtype), 1, 1.0)
    close(out[0, 0], v[0, -1].double(), dtype)
    close(out[0, 1], v[0].double().mean(0), dtype)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("slope", [0.02, -0.02, 0.2])
def test_attention_follows_a_maximum_that_moves(dtype, slope):
    """Scores that rise, or fall, along the keys: each portion of keys has to be weighed against those before it."""
    m = 330
    k = torch.zeros(1, m, 16)
    k[0, :, 0] = slope * torch.arange(m)
    q = torch.zeros(1, 35, 16)
    q[0, :, 0] = torch.linspace(-1.5, 1.5, 35)
    v = keyed_input("attention.moving", (1, m, 16)) + 1
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    want = (q.double() @ k.double().transpose(1, 2)).softmax(-1) @ v.double()
    close(native.attention(q, k, v, 1, 1.0), want, dtype)


def test_attention_reads_heads_out_of_wider_rows():
    joined = keyed_input("attention.joined", (2, 19, 3 * 48))
    q, k, v = joined.chunk(3, dim=2)
    apart = (part.contiguous() for part in (q, k, v))
    torch.testing.assert_close(
        native.attention(q, k, v, 2, 0.3), native.attention(*apart, 2, 0.3), rtol=0, atol=0
    )


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_attention_hides_no_broken_number(where):
    parts = {s: keyed_input(f"attention.nan.{s}", (1, 40, 32)) for s in "qkv"}
    parts[where][0, 7, 3] = float("nan")
    out = native.attention(*parts.values(), 2, 0.25)
    assert out.isnan().any()
    assert where != "q" or out[0, :7].isfinite().all()


def test_attention_does_not_depend_on_the_number_of_threads():
    q, k, v = (keyed_input(f"attention.threads.{s}", (2, 70, 80)) for s in "qkv")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(native.attention(q, k, v, 2, 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x.to("meta"),
    ],
    ids=["float64", "float16", "every other", "batch inside", "meta"],
)
def test_what_the_kernel_does_not_take_is_left_to_others(make):
    q = make(keyed_input("attention.left", (2, 6, 64)))
    assert not native.supports_attention(q, q, q, 2)


def halved(*axes):
    """All combinations; half of them quick, in which any three axes take all their values together."""
    return [
        pytest.param(
            *row,
            marks=[pytest.mark.slow]
            if sum(axis.index(value) for axis, value in zip(axes, row, strict=True)) % 2
            else [],
        )
        for row in itertools.product(*axes)
    ]


@pytest.mark.parametrize(
    "dtype, silu, per_picture, shifted",
    halved(list(CLOSE), [False, True], [False, True], [False, True]),
    ids=str,
)
@pytest.mark.thinned(8)
def test_group_norm_is_the_formula(backend, dtype, silu, per_picture, shifted):
    b, c, h, w, groups = 3, 48, 5, 29, 4  # more cells than enter a float sum at a time
    x = (keyed_input("norm.x", (b, c, h, w)) * 2 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (keyed_input(f"norm.{s}", (b, c) if per_picture else (c,)) + 1 for s in ("weight", "bias"))
    shift = keyed_input("norm.shift", (b, c)) if shifted else None
    moved = x.double() + (0 if shift is None else shift[:, :, None, None])
    want = F.group_norm(moved, groups, eps=1e-3)
    want = want * weight.reshape(-1, c, 1, 1) + bias.reshape(-1, c, 1, 1)
    want = F.silu(want) if silu else want
    assert backend.supports_norm(x, groups)
    got = backend.group_norm(x, groups, weight, bias, 1e-3, shift=shift, silu=silu)
    close(got, want, dtype)
    assert got.is_contiguous(memory_format=torch.channels_last)
    backend.group_norm(x, groups, weight, bias, 1e-3, shift=shift, silu=silu, out=x)
    assert torch.equal(x, got)


def test_group_norm_far_from_zero_keeps_its_digits(backend):
    """A mean of 1,000 times the spread: sums of squares in float32 would leave a digit (torch's way, channels last)."""
    x = (keyed_input("norm.far", (2, 32, 9, 11)) + 1000).contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(32), torch.zeros(32)
    got = backend.group_norm(x, 8, one, zero, 1e-5)
    want = F.group_norm(x.double(), 8, eps=1e-5)
    assert (got - want).norm() < 1e-4 * want.norm()  # a thousandth of x has that many digits


@pytest.mark.parametrize(
    "cells", [(1, 64), (1, 65), pytest.param((131, 130), marks=pytest.mark.slow)], ids=str
)
def test_group_norm_of_any_number_of_cells_is_the_formula(backend, cells):
    """Sums of one portion, of two, and of portions larger than the smallest (17,030 cells)."""
    x = (keyed_input("norm.cells", (2, 16, *cells)) * 2 + 1).contiguous(memory_format=torch.channels_last)
    got = backend.group_norm(x, 4, torch.ones(16), torch.zeros(16), 1e-6)
    close(got, F.group_norm(x.double(), 4, eps=1e-6), torch.float32)


@pytest.mark.parametrize("c, groups", [(128, 4), (144, 9), (320, 32), (400, 5)])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.thinned(4)
def test_group_norm_of_many_channels_is_the_formula(backend, dtype, c, groups):
    """Blocks of 128 channels, and what is left beside them; groups of no power of two, across blocks."""
    x = (keyed_input("norm.wide", (2, c, 7, 11)) * 2 + 1).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    got = backend.group_norm(x, groups, torch.ones(c), torch.zeros(c), 1e-6)
    close(got, F.group_norm(x.double(), groups, eps=1e-6), dtype)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_group_norm_hides_no_broken_number(backend, dtype, silu):
    x = keyed_input("norm.nan", (2, 32, 3, 5)).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 5, 1, 2] = float("nan")
    got = backend.group_norm(x, 2, torch.ones(32), torch.zeros(32), 1e-6, silu=silu)
    assert got[0, :16].isnan().all() and got[0, 16:].isfinite().all() and got[1].isfinite().all()


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_phases_are_spread_over_a_doubled_map(backend, dtype):
    b, c, h, w = 2, 3, 4, 5
    y = (
        keyed_input("spread", (b, 4 * c, h + 1, w + 1))
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
    )
    want = torch.empty(b, c, 2 * h, 2 * w, dtype=dtype)
    for i in range(2):
        for j in range(2):
            phase = y[:, (2 * i + j) * c : (2 * i + j + 1) * c]
            want[:, :, i::2, j::2] = phase[:, :, i : i + h, j : j + w]
    got = backend.interleave_phases(y)
    assert torch.equal(got, want) and got.is_contiguous(memory_format=torch.channels_last)


def test_maps_that_the_norm_does_not_take_are_left_to_others():
    x = keyed_input("norm.left", (2, 48, 6, 7))
    assert not native.supports_norm(x, 4)  # channels first
    x = x.contiguous(memory_format=torch.channels_last)
    assert native.supports_norm(x, 4) and not native.supports_norm(x, 5)
    assert not native.supports_norm(x[:, :24].contiguous(memory_format=torch.channels_last), 4)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_the_gate_is_the_exact_gelu(backend, dtype):
    x, bias = keyed_input("gate.x", (19, 544)).to(dtype) * 3, keyed_input("gate.bias", (544,))
    value, gate = (x.double() + bias).chunk(2, dim=1)
    assert backend.supports_geglu(x, 544)
    out = backend.geglu(x, bias, torch.empty(19, 272, dtype=dtype))
    close(out, value * F.gelu(gate), dtype)


def test_the_gate_keeps_broken_numbers_and_ends(backend):
    x = torch.ones(2, 64)
    x[0, 32], x[1, 32], x[1, 33] = float("nan"), 50.0, -50.0
    out = backend.geglu(x, torch.zeros(64), torch.empty(2, 32))
    assert out[0, 0].isnan() and out[0, 1:].isfinite().all()
    assert out[1, 0] == 50 and abs(out[1, 1]) < 1e-30


def product_of(dtype):
    if not native.has_product(dtype):
        pytest.skip("this processor has no such product")


ACTS = {None: lambda y: y, "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y), "gelu": F.gelu}


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "out", "act", "bias", "add"),
    [
        (1, 32, 16, None, False, False),
        (2, 64, 48, "quick_gelu", True, False),  # an odd number of blocks
        (17, 96, 80, "gelu", True, True),  # a tile and one row
        (31, 32, 112, None, True, True),
        (48, 160, 64, "quick_gelu", False, True),
        (101, 128, 240, None, True, False),
    ],
)
def test_a_product_is_the_formula(dtype, rows, k, out, act, bias, add):
    product_of(dtype)
    x, weight, b, beside = (
        keyed_input(f"product.{s}", size).to(dtype)
        for s, size in (("x", (rows, k)), ("w", (out, k)), ("b", (out,)), ("add", (rows, out)))
    )
    want = ACTS[act](F.linear(x.double(), weight.double(), b.double() if bias else None))
    want = want + beside.double() if add else want
    packed, given = native.pack_product(weight), (b if bias else None, beside if add else None)
    close(native.linear(x, packed, *given, act), want, dtype)
    shaped = native.linear(x[None], packed, given[0], None if given[1] is None else given[1][None], act)
    assert shaped.shape == (1, rows, out)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(
    ("b", "c", "h", "w", "out", "side", "stride", "padding"),
    [
        (2, 32, 5, 7, 48, 3, 1, 1),
        (3, 4, 6, 5, 16, 3, 2, 1),  # taps that fill no tile
        (1, 64, 9, 4, 32, 1, 1, 0),
        (2, 20, 4, 3, 80, 2, 1, 1),
        (1, 16, 8, 11, 64, 5, 3, 0),
    ],
)
def test_a_small_map_s_convolution_is_the_formula(dtype, b, c, h, w, out, side, stride, padding):
    product_of(dtype)
    x, weight, bias = (
        keyed_input(f"small.{s}", size).to(dtype)
        for s, size in (("x", (b, c, h, w)), ("w", (out, c, side, side)), ("b", (out,)))
    )
    want = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    add = keyed_input("small.add", tuple(want.shape)).to(dtype).contiguous(memory_format=torch.channels_last)
    x, packed = x.contiguous(memory_format=torch.channels_last), native.pack_product(weight, stride, padding)
    close(native.convolution(x, packed, bias), want, dtype)
    got = native.convolution(x, packed, bias, add)
    assert got.is_contiguous(memory_format=torch.channels_last)
    close(got, want + add.double(), dtype)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_products_do_not_depend_on_the_number_of_threads(dtype):
    product_of(dtype)
    x, weight = (keyed_input(f"threads.{s}", (n, 320)).to(dtype) for s, n in (("x", 203), ("w", 176)))
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(native.linear(x, native.pack_product(weight), None))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("act", list(ACTS), ids=str)
def test_a_product_hides_no_broken_number(act):
    x, packed = torch.ones(20, 64), native.pack_product(torch.ones(32, 64))
    product_of(x.dtype)
    x[3, 5], x[7, 1] = float("nan"), float("inf")
    got = native.linear(x, packed, None, None, act)
    assert got[3].isnan().all() and not got[7].isfinite().any()
    assert got[[0, 1, 2, 4, 5, 6, 8]].isfinite().all()


def test_a_machine_without_a_compiler_is_told_so(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "there is no C++ compiler; install g++, or name one in CXX" in caplog.text
        x = torch.ones(1, 2, 16)
        assert not native.supports_attention(x, x, x, 1)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    assert native.library() is not None


def test_a_compiler_that_fails_is_told_so(monkeypatch, caplog, tmp_path):
    broken = tmp_path / "cpp"
    broken.mkdir()
    (broken / "broken.cpp").write_text("int main( { }")
    monkeypatch.setattr(native, "SOURCES", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "failed:" in caplog.text and "error" in caplog.text
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
