"""The GPU's backend on a CPU, with Triton's kernels interpreted: fused modules give the plain numbers by it, too."""

import logging
import re
import sys

import pytest
import torch
from keyed import fill, keyed_input
from tiny_networks import UNET, VAE

from ldm.kernels import cuda, fused, optimize, restore
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, UNetModel


@pytest.fixture(autouse=True)
def without_gradients(interpreted):
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """Names of the backend's functions, in the order of their calls."""
    found = []

    def noting(name, own):
        return lambda *args, **kwargs: found.append(name) or own(*args, **kwargs)

    for name in ("group_norm", "geglu", "attention", "interleave_phases", "convolve", "multiply"):
        monkeypatch.setattr(cuda, name, noting(name, getattr(cuda, name)))
    return found


def close(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert (got - want).norm() < 2e-5 * want.norm()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True}], ids=str)
def test_a_unet_gives_the_plain_numbers(calls, options):
    unet = fill(UNetModel(**{**UNET, "attention_resolutions": [2], **options}), "cuda.")
    x = keyed_input("cuda.x", (2, 4, 4, 6))
    given = (torch.cat([x[:1], x[:1]]), torch.tensor([30, 30]), keyed_input("cuda.context", (2, 7, 24)))
    want = unet(*given)
    close(optimize(unet)(*given), want)
    # Halves that are alike are no shorter way here, and each attention to itself is one product, not three.
    assert calls.count("group_norm") == sum(isinstance(m, torch.nn.GroupNorm) for m in unet.modules())
    assert {"geglu", "attention", "interleave_phases", "convolve", "multiply"} <= set(calls)
    if options:
        return
    for value in (given[2], *unet.parameters()):  # in place: the context and the weights
        value.mul_(1.1)
    changed = unet(*given)
    close(changed, restore(unet)(*given))
    assert not torch.allclose(changed, want, atol=1e-3)


@pytest.mark.slow
def test_an_autoencoder_gives_the_plain_numbers(calls):
    encoder, decoder = (fill(kind(**VAE), "cuda.vae.") for kind in (Encoder, Decoder))
    x, z = keyed_input("cuda.pixels", (1, 3, 12, 8)), keyed_input("cuda.z", (2, 4, 5, 3))
    want = encoder(x), decoder(z)
    close(optimize(encoder)(x), want[0])
    close(optimize(decoder)(z), want[1])
    norms = sum(isinstance(m, torch.nn.GroupNorm) for m in (*encoder.modules(), *decoder.modules()))
    assert calls.count("group_norm") == norms


@pytest.mark.slow
def test_openai_s_attention_gives_the_plain_numbers(calls):
    block = fill(AttentionBlock(96, num_heads=2), "cuda.block.").eval()
    x = keyed_input("cuda.block", (3, 96, 5, 7))
    want = block(x)
    close(optimize(block)(x), want)
    assert calls == ["group_norm", "multiply", "attention", "multiply"]


def test_half_precision_is_supported():
    norm = torch.nn.GroupNorm(4, 32).half()
    x = keyed_input("cuda.half", (2, 32, 5, 7)).half().contiguous(memory_format=torch.channels_last)
    got = fused.FusedGroupNorm(norm).try_forward(x)
    assert got.dtype == torch.float16
    torch.testing.assert_close(
        got.float(), torch.nn.functional.group_norm(x.float(), 4), rtol=2e-3, atol=2e-3
    )


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def last(*size, dtype):
    return keyed_input("cuda.trial", size).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.slow
def test_a_kernel_is_tried_once_at_each_width_and_dtype_that_is_used(monkeypatch, trials, dtype):
    maps, fewer, tokens = (last(*s, dtype=dtype) for s in ((2, 24, 3, 5), (2, 24, 2, 5), (1, 8, 1, 1)))
    for _ in range(2):
        assert cuda.supports_norm(maps, 6) and cuda.supports_norm(fewer, 6)
        assert cuda.supports_norm(maps, 4) and cuda.supports_geglu(tokens, 34)
    assert trials == [(24, 6, 15), (24, 6, 10), (24, 4, 15), (34,)]
    assert float(cuda.norm_error(maps, 6)) < cuda.MAX_ERROR[dtype] / 2
    assert float(cuda.gate_error(tokens, 34)) < cuda.MAX_ERROR[dtype] / 2


@pytest.fixture
def trials(monkeypatch):
    """Widths of the trials, in the order in which they are made; none has been made."""
    found, own = [], cuda.is_right

    def noting(name, error, like, *width):
        return own(name, lambda: found.append(width) or error(), like, *width)

    monkeypatch.setattr(cuda, "is_right", noting)
    monkeypatch.setattr(cuda, "_trials", {})
    return found


class OfTritonsKind(Exception):
    """Triton's errors are no RuntimeErrors."""


def refuse(*args, **kwargs):
    raise OfTritonsKind("out of resource: shared memory, Required: 300000\nand more")


WRONG = {
    "too large": (lambda own: lambda *a, **k: own(*a, **k).mul_(1.05), r"its numbers are off by 0\.0\d+"),
    "nan": (lambda own: lambda *a, **k: own(*a, **k).fill_(float("nan")), "its numbers are off by nan"),
    "refuses": (lambda own: refuse, "it cannot be used: out of resource: shared memory, Required: 300000$"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
@pytest.mark.thinned(2)
def test_what_is_wrong_or_refuses_at_one_width_is_left_out_there(monkeypatch, caplog, trials, change, words):
    dtype = torch.float16
    found = cuda.kernels()
    norm, gate = found.group_norm, found.geglu

    def at(size, own):
        return lambda x, *args, **kwargs: (change(own) if x.shape[1] == size else own)(x, *args, **kwargs)

    monkeypatch.setattr(found, "group_norm", at(24, norm))
    monkeypatch.setattr(found, "geglu", at(34, gate))
    tokens = last(1, 8, 1, 1, dtype=dtype)
    with caplog.at_level(logging.WARNING, "ldm.kernels.cuda"):
        for _ in range(2):
            assert not cuda.supports_norm(last(2, 24, 3, 5, dtype=dtype), 6)
            assert cuda.supports_norm(last(2, 32, 3, 5, dtype=dtype), 8)
            assert not cuda.supports_geglu(tokens, 34) and cuda.supports_geglu(tokens, 36)
    assert len(caplog.messages) == 2
    begin = f"the GPU's kernel group_norm is left out for {dtype} of width (24, 6, 15): "
    assert caplog.messages[0].startswith(begin) and re.search(words, caplog.messages[0])
    assert caplog.messages[1].startswith(f"the GPU's kernel geglu is left out for {dtype} of width (34,): ")


def test_a_unet_goes_on_where_a_kernel_refuses(monkeypatch, trials):
    monkeypatch.setattr(cuda.kernels(), "group_norm", refuse)
    monkeypatch.setattr(cuda.kernels(), "geglu", refuse)
    unet = fill(UNetModel(**{**UNET, "channel_mult": [1], "attention_resolutions": [1]}), "cuda.")
    given = (
        keyed_input("cuda.x", (2, 4, 4, 6)),
        torch.tensor([30, 7]),
        keyed_input("cuda.context", (2, 7, 24)),
    )
    want = unet(*given)
    close(optimize(unet)(*given), want)
    assert trials


def test_where_there_is_no_triton_it_is_said_once_and_done_without(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ldm.kernels.triton_kernels", None)
    monkeypatch.delattr("ldm.kernels.triton_kernels", raising=False)
    cuda.kernels.cache_clear()
    decoder = fill(Decoder(**VAE), "cuda.vae.")
    z = keyed_input("cuda.z", (1, 4, 5, 3))
    want = decoder(z)
    with caplog.at_level(logging.WARNING, "ldm.kernels.cuda"):
        close(optimize(decoder)(z), want)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the GPU's own kernels are left out, there is no Triton: ")
    cuda.kernels.cache_clear()
