"""Seamless tiling: rolled latents give rolled pictures, in every way of computing; nothing stays; refusals."""

import pytest
import torch
from keyed import fill, keyed_input
from tiny_networks import UNET, VAE
from torch import nn

from ldm.adapters import SeamlessTiling
from ldm.adapters.use import check_adapters
from ldm.errors import UsageError
from ldm.generate import decode, denoise
from ldm.kernels import cuda_graphs, optimize, restore
from ldm.modules import seams
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.seams import attached

T, C = torch.tensor([5, 700]), keyed_input("s.c", (2, 7, 24))
WAYS = [(True, True), (True, False), (False, True)]


@pytest.fixture(scope="module")
def networks():
    """Each network with an input, by how many cells it may be rolled, and how many times larger the answer is."""
    unet = fill(UNetModel(**UNET), "seamless.u.")
    decoder, encoder = fill(Decoder(**VAE), "seamless.d."), fill(Encoder(**VAE), "seamless.e.")
    return {
        "unet": (unet, lambda x: unet(x, T, C), keyed_input("s.x", (2, 4, 8, 6)), 2, 1),
        "decoder": (decoder, decoder, keyed_input("s.z", (1, 4, 4, 5)), 1, 2),
        "encoder": (encoder, encoder, keyed_input("s.i", (1, 3, 12, 8)), 2, 0.5),
    }


def roll(x, by, x_too, y_too):
    return x.roll((by if y_too else 0, by if x_too else 0), (2, 3))


def near(got, want, rel=2e-5):
    return bool((got - want).abs().max() <= rel * want.abs().max())


@pytest.mark.parametrize("way", ["plain", "optimized", "tiled_vae"])
@pytest.mark.parametrize("name", ["unet", "decoder", "encoder"])
@torch.no_grad()
@pytest.mark.thinned(4)
def test_rolling_what_comes_in_rolls_what_goes_out(networks, name, way):
    network, ask, given, by, larger = networks[name]
    if way == "tiled_vae" and name == "unet":
        return
    plain, keys = ask(given), {key: sorted(vars(m)) for key, m in network.named_modules()}
    want = {}
    for x, y in WAYS:
        with attached(network, SeamlessTiling(x, y)):
            want[x, y] = ask(given)
    if way != "plain":
        optimize(network, tiled_vae=way == "tiled_vae")
    try:
        for x, y in WAYS:
            with attached(network, SeamlessTiling(x, y)):
                here = ask(given)
                assert near(here, want[x, y]) and not near(here, plain, 1e-3)
                for x_too, y_too in WAYS:
                    rolled = ask(roll(given, by, x_too, y_too))
                    is_ring = (x or not x_too) and (y or not y_too)
                    same = near(rolled, roll(here, int(by * larger), x_too, y_too))
                    assert same == is_ring, (x, y, x_too, y_too)
        assert near(ask(given), plain)
    finally:
        restore(network)
    assert torch.equal(ask(given), plain)
    assert {key: sorted(vars(m)) for key, m in network.named_modules()} == keys


def test_a_small_map_and_odd_sides_are_rings_too(networks):
    network, *_ = networks["unet"]
    for size in ((3, 2), (5, 7)):
        with torch.no_grad(), attached(network, SeamlessTiling()):
            assert torch.isfinite(network(keyed_input("s.small", (2, 4, *size)), T, C)).all()


def test_one_for_each_axis_is_one_for_both(networks):
    with torch.no_grad():
        for network, ask, given, *_ in networks.values():
            with attached(network, SeamlessTiling()):
                want = ask(given)
            with attached(network, SeamlessTiling(True, False), SeamlessTiling(False, True)):
                assert torch.equal(ask(given), want)


def test_neither_axis_is_nothing_and_a_graph_is_kept_under_the_axes(networks):
    network, ask, given, *_ = networks["unet"]
    made = []

    def capture(run, inputs):
        made.append(None)
        return run

    with torch.no_grad():
        plain = ask(given)
        with attached(network, SeamlessTiling(False, False)):
            assert torch.equal(ask(given), plain) and not seams.on(network).state
        cuda_graphs.attach(network, capture)
        try:
            for _ in range(4):  # the third call of each is captured
                for tiling in (SeamlessTiling(), SeamlessTiling(True, False), SeamlessTiling(False, False)):
                    with attached(network, tiling):
                        ask(given)
        finally:
            restore(network)
    assert len(made) == 3


def paint(sd, *adapters, **options):
    options = {"seed": 3, "steps": 3, "output_type": "pt", "height": 64, "width": 64, **options}
    return sd.txt2img("a large red circle", adapters=adapters, **options)


@torch.no_grad()
def test_a_picture_rolls_with_its_noise(painter):
    """The whole way: the sampler's steps, the UNet and the decoder."""
    model, tiling = painter.model, SeamlessTiling()
    x_T, c = keyed_input("s.x_T", (1, 4, 8, 12)), keyed_input("s.c2", (1, 7, 128))
    vae = model.first_stage_model

    def picture(x):
        steps = denoise(model, x, c, sampler="ddim", steps=3, adapters=[tiling])
        latents = [step.x_t for step in steps][-1]
        with attached(vae.decoder, tiling):
            return decode(model, latents)

    want = picture(x_T)
    assert near(picture(x_T.roll((2, 6), (2, 3))), want.roll((16, 48), (2, 3)), 1e-4)


def trace(model):
    own = "last_z_shape"  # which a decoder sets at each call
    return {name: {k: id(v) for k, v in vars(m).items() if k != own} for name, m in model.named_modules()}


def test_painting_decodes_and_encodes_with_it_and_leaves_no_trace(painter):
    plain = paint(painter)
    before = trace(painter.model)
    tiled = paint(painter, SeamlessTiling())
    vae = painter.model.first_stage_model
    with attached(vae.decoder, SeamlessTiling()):
        again = decode(painter.model, tiled.latents)
    unit = (again.float() / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(torch.as_tensor(tiled.images), unit, atol=1e-5)
    picture = keyed_input("s.p", (1, 3, 64, 64)).clamp(0, 1)
    source = {"strength": 0.0, "steps": 3, "seed": 3, "output_type": "latent"}
    latents = [painter.img2img("x", picture, adapters=a, **source).latents for a in ([], [SeamlessTiling()])]
    assert not torch.equal(*latents)
    assert torch.equal(paint(painter).images, plain.images)
    assert trace(painter.model) == before and not torch.equal(tiled.images, plain.images)


REFUSED = [
    (lambda: SeamlessTiling("yes"), "x should be"),
    (lambda: SeamlessTiling(True, 2), "y should be"),
    (lambda: SeamlessTiling().check(nn.Linear(2, 3)), "SeamlessTiling needs a UNetModel, got Linear"),
    (lambda: SeamlessTiling().check(UNetModel(**UNET | {"dims": 1})), "is for maps of 2 dimensions"),
]


def test_refusals(painter):
    for make, words in REFUSED:
        with pytest.raises(UsageError, match=words):
            make()
    unet = UNetModel(**UNET)
    unet.middle_block[0]._compiled_call_impl = unet.middle_block[0].forward  # as compile() does
    with pytest.raises(
        UsageError, match="SeamlessTiling needs the plain ResBlock, but this one was compiled"
    ):
        SeamlessTiling().check(unet)
    assert check_adapters(painter.model, [SeamlessTiling()])
