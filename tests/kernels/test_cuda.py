"""The GPU's engine on a CPU, with Triton's kernels interpreted: the stand-ins give the plain numbers by it, too."""

import contextlib
import logging
import re
import sys

import pytest
import torch
from keyed import fill, keyed_input
from tiny_networks import UNET, VAE
from torch.nn.attention import SDPBackend

from ldm.kernels import cuda, optimize, restore, stand_ins
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, UNetModel


@pytest.fixture(autouse=True)
def without_gradients(interpreted):
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """Names of the engine's functions, in the order of their calls."""
    found = []

    def noting(name, own):
        return lambda *args, **kwargs: found.append(name) or own(*args, **kwargs)

    for name in ("group_norm", "geglu", "attention", "spread", "convolve", "multiply"):
        monkeypatch.setattr(cuda, name, noting(name, getattr(cuda, name)))
    return found


def close(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert (got - want).norm() < 2e-5 * want.norm()


@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True}], ids=str)
def test_a_unet_gives_the_plain_numbers(calls, options):
    unet = fill(UNetModel(**{**UNET, "attention_resolutions": [2], **options}), "cuda.")
    x = keyed_input("cuda.x", (2, 4, 4, 6))
    given = (torch.cat([x[:1], x[:1]]), torch.tensor([30, 30]), keyed_input("cuda.context", (2, 7, 24)))
    want = unet(*given)
    close(optimize(unet)(*given), want)
    # Halves that are alike are no shorter way here, and each attention to itself is one product, not three.
    assert calls.count("group_norm") == sum(isinstance(m, torch.nn.GroupNorm) for m in unet.modules())
    assert {"geglu", "attention", "spread", "convolve", "multiply"} <= set(calls)
    if options:
        return
    for value in (given[2], *unet.parameters()):  # in place: what is told, and by what
        value.mul_(1.1)
    changed = unet(*given)
    close(changed, restore(unet)(*given))
    assert not torch.allclose(changed, want, atol=1e-3)


def test_an_autoencoder_gives_the_plain_numbers(calls):
    encoder, decoder = (fill(kind(**VAE), "cuda.vae.") for kind in (Encoder, Decoder))
    x, z = keyed_input("cuda.pixels", (1, 3, 12, 8)), keyed_input("cuda.z", (2, 4, 5, 3))
    want = encoder(x), decoder(z)
    close(optimize(encoder)(x), want[0])
    close(optimize(decoder)(z), want[1])
    norms = sum(isinstance(m, torch.nn.GroupNorm) for m in (*encoder.modules(), *decoder.modules()))
    assert calls.count("group_norm") == norms


def test_openai_s_attention_gives_the_plain_numbers(calls):
    block = fill(AttentionBlock(96, num_heads=2), "cuda.block.").eval()
    x = keyed_input("cuda.block", (3, 96, 5, 7))
    want = block(x)
    close(optimize(block)(x), want)
    assert calls == ["group_norm", "multiply", "attention", "multiply"]


def test_the_fastest_attention_is_chosen_once_for_a_shape(monkeypatch):
    """Of those that a CPU has: one that holds all scores in double steps is never the faster by much."""
    q, k, v = (keyed_input(f"cuda.{s}", (1, 2, 64, 16)) for s in "qkv")
    tried, own = [], cuda.fastest
    monkeypatch.setattr(cuda, "fastest", lambda *args: tried.append(args[1]) or own(*args))
    monkeypatch.setattr(cuda, "_choices", {})
    for _ in range(3):
        assert cuda.backend_for(q, k, v, 0.25) in (None, SDPBackend.FLASH_ATTENTION)
    assert tried == [cuda.BACKENDS]
    cuda.backend_for(q[:, :, :32], k, v, 0.25)
    cuda.backend_for(q.double(), k.double(), v.double(), 0.25)
    assert len(tried) == 3


def test_what_serves_and_gains_much_is_chosen():
    taken = {None: 1.0, "slow": 1.4, "a little faster": 0.95, "fast": 0.5, "faster": 0.4}
    asked = [None]

    @contextlib.contextmanager
    def within(name):
        if name == "none":
            raise RuntimeError("No available kernel")
        asked.append(name)
        yield
        asked.append(None)

    def chosen(*names):
        return cuda.fastest(lambda: taken[asked[-1]], names, within)

    assert chosen("slow", "none", "fast", "a little faster") == "fast"
    assert chosen("fast", "faster", "slow") == "faster"
    assert chosen("slow", "a little faster") is None
    assert chosen("none") is None


def test_half_precision_is_served():
    norm = torch.nn.GroupNorm(4, 32).half()
    x = keyed_input("cuda.half", (2, 32, 5, 7)).half().contiguous(memory_format=torch.channels_last)
    got = stand_ins.Norm(norm).fast(x)
    assert got.dtype == torch.float16
    torch.testing.assert_close(
        got.float(), torch.nn.functional.group_norm(x.float(), 4), rtol=2e-3, atol=2e-3
    )


def test_kernels_that_are_wrong_or_cannot_be_built_are_left_out(monkeypatch, caplog):
    found = cuda.kernels()
    assert cuda.error_of(found, torch.device("cpu")) < 1e-5
    own = found.geglu
    changes = (
        (lambda *args: own(*args).mul_(1.01), r"their numbers are off by 0\.00\d+"),
        (lambda *args: own(*args).fill_(float("nan")), "their numbers are off by nan"),
        (lambda *args: args[0].no_such_thing, "they cannot be built: 'Tensor' object has no attribute"),
    )
    for change, words in changes:
        monkeypatch.setattr(found, "geglu", change)
        cuda.kernels.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ldm.kernels.cuda"):
            assert cuda.kernels() is None and not cuda.serves_geglu(64)
        assert len(caplog.messages) == 1 and re.search(words, caplog.messages[0])
    cuda.kernels.cache_clear()


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
