"""Winograd's 3x3 convolutions against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from keyed import keyed_input
from torch import nn

from ldm.kernels import cpu, native, optimize, winograd

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels cannot be built here")


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """Let maps as small as the tests' go this way."""
    monkeypatch.setattr(winograd, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(cpu, "MAX_SMALL", {torch.float32: 0, torch.bfloat16: 0})


def conv(c, out, **options):
    layer = nn.Conv2d(c, out, 3, padding=1, **options)
    with torch.no_grad():
        layer.weight.copy_(keyed_input("winograd.weight", tuple(layer.weight.shape)))
        if layer.bias is not None:
            layer.bias.copy_(keyed_input("winograd.bias", (out,)))
    return layer.eval()


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(
    ("b", "c", "out", "h", "w"),
    [
        (1, 16, 48, 16, 18),
        (3, 32, 16, 13, 11),  # half of the last tiles lies outside
        (5, 48, 32, 2, 35),
        (70, 16, 16, 1, 1),
    ],
)
def test_it_is_the_convolution(b, c, out, h, w, added, bias):
    layer = conv(c, out, bias=bias)
    x = keyed_input("winograd.x", (b, c, h, w)).contiguous(memory_format=torch.channels_last)
    add = keyed_input("winograd.add", (b, out, h, w)) if added else None
    want = F.conv2d(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double(), padding=1
    )
    want = want + add if added else want
    assert winograd.supports(layer, x)
    with torch.no_grad():
        got = winograd.convolve(x, winograd.pack(layer.weight, 100), layer.bias, out, add)
        direct = F.conv2d(x, layer.weight, layer.bias, padding=1) + (add if added else 0)
    assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, want) < 1e-6 and error(got, want) < 3 * error(direct, want) + 1e-7


def test_portions_of_rows_join_without_a_seam(monkeypatch):
    """Portions of one, two and all rows of tiles: 3 pictures of 5 rows, so that portions run across pictures."""
    layer, x = (
        conv(16, 32),
        keyed_input("winograd.rows", (3, 16, 9, 14)).contiguous(memory_format=torch.channels_last),
    )
    row, found = 16 * 7 * 32 * 4, []
    with torch.no_grad():
        for portion in (1, 2 * row, 100 * row):
            monkeypatch.setattr(winograd, "CHUNK_BYTES", portion)
            found.append(winograd.convolve(x, winograd.pack(layer.weight, 7), layer.bias, 32, None))
    assert winograd.tile_rows_at_once(x, 32) == 100
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], found[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "size", "dtype"),
    [
        ({"stride": 2}, (4, 16, 12, 14), torch.float32),
        ({"dilation": 2}, (4, 16, 12, 14), torch.float32),
        ({"groups": 2}, (4, 16, 12, 14), torch.float32),
        ({}, (4, 16, 12, 14), torch.bfloat16),
        ({}, (1, 16, 12, 14), torch.float32),  # too few tiles to pay for the weights
    ],
    ids=["stride", "dilation", "groups", "bfloat16", "small"],
)
def test_what_it_does_not_serve_is_left_to_others(options, size, dtype):
    assert winograd.supports(conv(16, 32), torch.empty(4, 16, 12, 14))
    assert not winograd.supports(conv(16, 32, **options), torch.empty(size, dtype=dtype))
    assert not winograd.supports(conv(3, 32), torch.empty(4, 3, 12, 14))


def test_an_optimized_layer_uses_it_and_notices_new_weights(monkeypatch):
    layer, x = conv(16, 32), keyed_input("winograd.layer", (4, 16, 12, 14))
    optimize(layer)
    calls, plain = [], winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *given: calls.append(1) or plain(*given))
    with torch.no_grad():
        for factor in (1.0, 2.0):
            layer.weight.mul_(factor)
            want = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
            assert error(layer(x), want) < 1e-6
    assert len(calls) == 2
