"""VAE tiling: the plain modules' numbers whatever the tiles, within a bound on live bytes."""

import pytest
import torch
from keyed import fill, keyed_input
from meter import peak_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.errors import UsageError
from ldm.kernels import optimize, restore, vae_tiling
from ldm.kernels.vae_tiling import decode_tiled, encode_tiled
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules import model as plain
from ldm.modules.diffusionmodules.model import Decoder, Encoder, ResnetBlock

BASE = {
    "ch": 6,
    "out_ch": 3,
    "ch_mult": (1, 2, 4),
    "num_res_blocks": 2,
    "attn_resolutions": (),
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
    "num_groups": 3,
}
OPTIONS = {
    "halved widths": {},
    "equal widths": {"ch_mult": (1, 1, 1), "num_res_blocks": 1},
    "widths narrowed by a third": {"ch_mult": (2, 3)},
    "widest first": {"ch_mult": (3, 1, 2)},
    "one level": {"ch_mult": (2,)},
    "32 groups": {"ch": 32, "num_groups": 32, "num_res_blocks": 1, "ch_mult": (1, 2)},
    "attention in levels": {"attn_resolutions": (16, 8), "num_res_blocks": 1},
    "linear attention": {"attn_type": "linear", "attn_resolutions": (8,)},
    "use_linear_attn": {"use_linear_attn": True, "ch_mult": (1, 2)},
    "no attention": {"attn_type": "none", "attn_resolutions": (8,)},
    "resampling without weights": {"resamp_with_conv": False},
    "tanh_out": {"tanh_out": True, "ch_mult": (1, 2)},
    "give_pre_end": {"give_pre_end": True, "ch_mult": (1, 2)},
    "single z": {"double_z": False, "ch_mult": (1, 2)},
    "sleeping dropout": {"dropout": 0.7, "ch_mult": (1, 2)},
}
# Heights of the maps go from 5 to 23, so these are below and above them, and divide few of them.
TILES = [{"rows": 1}, {"rows": 2}, {"rows": 3}, {"rows": 7}, {"tile_bytes": 3000}, {}]
SIDES = [
    (Decoder, decode_tiled, "z", (2, 4, 5, 3)),
    (Encoder, encode_tiled, "x", (2, 3, 23, 26)),  # odd heights on the way down: 23, 11, 5
]
SIDE_NAMES = ["decoder", "encoder"]
sides = pytest.mark.parametrize(("kind", "tiled", "name", "shape"), SIDES, ids=SIDE_NAMES)


def build(kind, dtype=torch.float64, **options):
    return fill(kind(**{**BASE, **options}), "strips.").to(dtype)


# --- the same numbers -----------------------------------------------------------------------------


@sides
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
@pytest.mark.thinned(5)
def test_tiles_of_any_height_give_the_plain_numbers(kind, tiled, name, shape, options):
    network, x = build(kind, **options), keyed_input(name, shape)[:1].double()
    before, want = x.clone(), network(x)
    for tiles in TILES:
        torch.testing.assert_close(tiled(network, x, **tiles), want, rtol=0, atol=1e-12, msg=str(tiles))
    assert torch.equal(x, before)


@sides
@torch.no_grad()
@pytest.mark.thinned(2)
def test_float32_and_half_precision_are_as_near_to_the_truth_as_the_plain_modules(kind, tiled, name, shape):
    x = keyed_input(name, shape)
    truth = build(kind)(x.double())
    for dtype, most in ((torch.float32, 5e-6), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        network = build(kind, dtype)
        usual = (network(x.to(dtype)) - truth).abs()
        for tiles in ({"rows": 3}, {}):
            got = tiled(network, x.to(dtype), **tiles)
            assert got.dtype == dtype
            error = (got - truth).abs()
            assert error.max() < most
            assert error.mean() < 1.2 * usual.mean()


@sides
@torch.no_grad()
def test_shortcuts_of_3x3_are_supported(kind, tiled, name, shape):
    """No configuration of the autoencoder asks for them; the block knows them."""
    network = kind(**BASE)
    for level in network.down if kind is Encoder else network.up:
        for i, block in enumerate(level.block):
            wide = {"in_channels": block.in_channels, "out_channels": block.out_channels}
            level.block[i] = ResnetBlock(
                **wide, conv_shortcut=True, dropout=0.0, temb_channels=0, num_groups=3
            )
    network, x = fill(network, "strips.").double(), keyed_input(name, shape).double()
    assert any("conv_shortcut" in key for key in network.state_dict())
    for rows in (1, 2, 5, None):
        torch.testing.assert_close(tiled(network, x, rows=rows), network(x), rtol=0, atol=1e-12)


@sides
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_neighbours(kind, tiled, name, shape):
    network, x = build(kind, torch.float32), keyed_input(name, shape)
    together = tiled(network, x, rows=3)
    for i in range(shape[0]):
        assert torch.equal(together[i : i + 1], tiled(network, x[i : i + 1], rows=3))


@sides
@torch.no_grad()
def test_statistics_survive_a_mean_far_from_zero(kind, tiled, name, shape):
    """A mean square less a squared mean would keep no digit of a variance of 1 beside a mean of 3000."""
    network, x = build(kind), keyed_input(name, shape).double()
    network.conv_in.bias += 3000
    truth = network(x)
    usual = (network.float()(x.float()) - truth).abs().max()
    error = (tiled(network, x.float(), rows=3) - truth).abs().max()
    assert error < 1.5 * usual < 0.05


@sides
@torch.no_grad()
def test_channels_last_weights_keep_the_maps_in_their_layout(kind, tiled, name, shape):
    network, x = build(kind), keyed_input(name, shape).double()
    want = network(x)
    network.to(memory_format=torch.channels_last)
    for rows in (2, None):
        torch.testing.assert_close(tiled(network, x, rows=rows), want, rtol=0, atol=1e-12)
    maps = build(Decoder, give_pre_end=True).to(memory_format=torch.channels_last)
    z = keyed_input("z", (1, 4, 5, 3)).double()
    assert decode_tiled(maps, z, rows=2).is_contiguous(memory_format=torch.channels_last)


@sides
@torch.no_grad()
def test_autocast_gives_what_it_gives_the_plain_modules(kind, tiled, name, shape):
    network, x = build(kind, torch.float32), keyed_input(name, shape)
    truth = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual, got = network(x), tiled(network, x, rows=3)
    assert got.dtype == usual.dtype == torch.bfloat16
    assert (got - truth).abs().mean() < 1.2 * (usual - truth).abs().mean()


def test_nothing_is_left_behind_but_the_shape_that_the_decoder_remembers():
    decoder, z = build(Decoder), keyed_input("z", (1, 4, 5, 3)).double()
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    picture = decode_tiled(decoder, z, rows=2)
    assert picture.requires_grad is False
    assert decoder.last_z_shape == z.shape
    assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())


# --- memory ---------------------------------------------------------------------------------------


def test_the_meter_sees_what_lives_and_what_goes():
    def work():
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100) + 1  # 8000 with a
        del a
        return b + 1  # 8000, a is gone

    assert peak_of(work) == (8000, 4000)


WIDE = {**BASE, "ch": 8, "ch_mult": (1, 2, 4, 4), "num_groups": 4}  # the widths of Stable Diffusion, by 16


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("kind", "tiled", "shape", "maps", "usual"),
    [
        (Decoder, decode_tiled, (1, 4, 18, 9), 2.5, 6),
        (Encoder, encode_tiled, (1, 3, 144, 72), 2.0, 4),
    ],
    ids=SIDE_NAMES,
)
@pytest.mark.thinned(2)
def test_so_many_maps_of_the_first_level_are_alive_at_most(kind, tiled, shape, maps, usual, layout):
    """What comes in is alive, too, and four tiles of 4 of 144 rows, of 2 ch channels at most."""
    network = fill(kind(**WIDE)).to(memory_format=layout)
    x = keyed_input("x", shape)
    one_map = 8 * 144 * 72 * 4  # ch, height, width, float32
    peak, _ = peak_of(lambda: tiled(network, x, rows=4))
    assert maps * one_map < peak - x.nbytes < (maps + 4 * 4 / 144 * 2) * one_map
    plain_peak, _ = peak_of(lambda: network(x))
    assert plain_peak >= usual * one_map


@pytest.mark.slow
def test_the_batch_does_not_raise_the_peak():
    decoder, z = build(Decoder, torch.float32), keyed_input("z", (3, 4, 10, 8))
    alone, _ = peak_of(lambda: decode_tiled(decoder, z[:1], rows=2))
    together, _ = peak_of(lambda: decode_tiled(decoder, z, rows=2))
    pictures = 3 * 3 * 40 * 32 * 4
    assert alone < together <= alone + 2 * pictures


def test_the_attention_matrix_never_exists_as_a_whole():
    """Held for the path without a fused kernel, which has to make the weights of every portion of queries."""
    decoder = build(Decoder, torch.float32, ch_mult=(1, 1), num_res_blocks=1)
    z = keyed_input("z", (1, 4, 40, 32))
    n, queries = 40 * 32, 4 * 6 // 32 or 1
    with sdpa_kernel(SDPBackend.MATH):
        _, largest = peak_of(lambda: decode_tiled(decoder, z))
        _, whole = peak_of(lambda: decoder(z))
        one_map = 6 * 80 * 64 * 4
        assert largest == max(one_map, queries * 32 * n * 4)
        assert whole == n * n * 4


@pytest.mark.parametrize(
    ("kind", "tiled", "shape", "mebibytes"),
    [
        (Decoder, decode_tiled, (1, 4, 128, 128), 680),
        (Encoder, encode_tiled, (1, 3, 1024, 1024), 588),
    ],
    ids=SIDE_NAMES,
)
@pytest.mark.slow
def test_stable_diffusion_at_1024_pixels_in_half_precision(kind, tiled, shape, mebibytes):
    """On the meta device, by shapes alone, with the unfused attention that it has."""
    with torch.device("meta"):
        network = kind(**{**BASE, "ch": 128, "ch_mult": (1, 2, 4, 4), "num_groups": 32}).half().eval()
        x = torch.empty(shape, dtype=torch.half)
    peak, _ = peak_of(lambda: tiled(network, x))
    assert peak <= mebibytes << 20


# --- what is refused ------------------------------------------------------------------------------


@sides
@pytest.mark.parametrize("rows", [0, -3, 2.0, True])
def test_tiles_need_a_row(kind, tiled, name, shape, rows):
    with pytest.raises(UsageError, match=rf"^rows should be a whole number from 1 on, got {rows}$"):
        tiled(build(kind), keyed_input(name, shape), rows=rows)


def test_strip_bytes_of_nothing_are_refused():
    with pytest.raises(UsageError, match=r"^tile_bytes should be a whole number from 1 on, got 0$"):
        decode_tiled(build(Decoder), keyed_input("z", (1, 4, 5, 3)), tile_bytes=0)


@sides
@pytest.mark.parametrize("wrong", [(4, 5, 3), (2, 4, 0, 3)])
def test_what_is_no_batch_of_maps_is_refused(kind, tiled, name, shape, wrong):
    with pytest.raises(
        UsageError, match=r"maps \(b, c, h, w\), got a shape of \(" + ", ".join(map(str, wrong))
    ):
        tiled(build(kind), torch.zeros(wrong))


def test_pictures_that_vanish_on_the_way_down_are_refused():
    encoder = build(Encoder)
    assert encode_tiled(encoder, torch.ones(1, 3, 4, 5).double()).shape == (1, 8, 1, 1)
    for encode in (lambda x: encode_tiled(encoder, x), encoder):
        with pytest.raises(UsageError, match=r"sides of 4 or more, got 3 x 5"):
            encode(torch.ones(1, 3, 3, 5).double())


@sides
def test_gradients_are_refused_where_they_are_asked_for(kind, tiled, name, shape):
    network, x = build(kind), keyed_input(name, shape).double().requires_grad_()
    with pytest.raises(
        UsageError, match=f"^VAE tiling gives no gradients; .* call the {kind.__name__} itself$"
    ):
        tiled(network, x)
    with torch.no_grad():
        torch.testing.assert_close(tiled(network, x, rows=2), network(x), rtol=0, atol=1e-12)


class Tiled(nn.Conv2d):
    """Somebody's convolution."""


def subclass(network):
    network.mid.block_1.conv1 = Tiled(24, 24, 3, padding=1)
    return "a changed Tiled at 'mid.block_1.conv1'"


def instance_forward(network):
    network.mid.attn_1.forward = lambda x: x
    return "a changed AttnBlock at 'mid.attn_1'"


def hook(network):
    network.norm_out.register_forward_hook(lambda module, args, out: out + 1)
    return "a changed GroupNorm at 'norm_out'"


def early_hook(network):
    network.register_forward_pre_hook(lambda module, args: None)
    return f"a changed {type(network).__name__} at 'its top'"


def circular(network):
    network.conv_in.padding_mode = "circular"
    return "padding_mode='circular' at 'conv_in'"


def dropout(network):
    network.mid.block_2.dropout = nn.Dropout(0.25)
    return r"active dropout \(p=0.25; eval\(\) ends it\) at 'mid.block_2.dropout'"


@sides
@pytest.mark.parametrize("change", [subclass, instance_forward, hook, early_hook, circular, dropout])
def test_a_changed_part_is_refused_not_passed_over(kind, tiled, name, shape, change):
    network = build(kind)
    found = change(network)
    with pytest.raises(UsageError, match=f"plain parts, got {found}; call the {kind.__name__} itself$"):
        tiled(network, keyed_input(name, shape).double())


@sides
def test_a_patched_class_and_a_rebound_global_are_refused(kind, tiled, name, shape, monkeypatch):
    """Both are how other people's code changes CompVis's modules."""
    network, x = build(kind), keyed_input(name, shape).double()
    with monkeypatch.context() as patch:
        patch.setattr(plain.AttnBlock, "forward", lambda self, x: x)
        with pytest.raises(UsageError, match="got a changed AttnBlock at 'mid.attn_1'"):
            tiled(network, x)
    with monkeypatch.context() as patch:
        patch.setattr(plain, "nonlinearity", torch.relu)
        with pytest.raises(UsageError, match="got a changed nonlinearity at '(mid|down)[.]"):
            tiled(network, x)
    assert torch.isfinite(tiled(network, x)).all()


@sides
def test_another_network_is_refused_by_name(kind, tiled, name, shape):
    other = Encoder if kind is Decoder else Decoder
    with pytest.raises(
        UsageError, match=f"^VAE tiling is for a plain {kind.__name__}, got {other.__name__}$"
    ):
        tiled(build(other), keyed_input(name, shape).double())


# --- as part of optimize() ------------------------------------------------------------------------


@pytest.fixture
def autoencoder():
    dd = {**BASE, "double_z": True}
    config = {"embed_dim": 4, "ddconfig": dd, "lossconfig": {"target": "torch.nn.Identity"}}
    return fill(AutoencoderKL(**config), "strips.whole.").eval()


@pytest.fixture
def calls(monkeypatch):
    """Names of the halves that were computed by tiling."""
    found = []
    for name in ("decode_tiled", "encode_tiled"):
        own = getattr(vae_tiling, name)
        monkeypatch.setattr(
            vae_tiling, name, lambda *given, own=own, name=name: found.append(name) or own(*given)
        )
    return found


@torch.no_grad()
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.slow
def test_an_optimized_autoencoder_computes_by_tiling(autoencoder, calls, compile):
    x, z = keyed_input("strips.x", (2, 3, 20, 28)), keyed_input("strips.z", (3, 4, 5, 7))
    want = autoencoder.encode(x).mean, autoencoder.decode(z)
    optimize(autoencoder, compile=compile, tiled_vae=True)
    got = autoencoder.encode(x).mean, autoencoder.decode(z)
    assert calls == ["encode_tiled", "decode_tiled"]
    for ours, plain_way in zip(got, want, strict=True):
        torch.testing.assert_close(ours, plain_way, rtol=2e-5, atol=2e-5)
    restore(autoencoder)
    assert torch.equal(autoencoder.decode(z), want[1]) and len(calls) == 2
    assert not any("forward" in vars(part) or part._compiled_call_impl for part in autoencoder.modules())


def test_what_tiling_does_not_support_falls_back(autoencoder, calls):
    z = keyed_input("strips.z", (1, 4, 5, 7))
    with torch.no_grad():
        want = autoencoder.decode(z)
    optimize(autoencoder, tiled_vae=True)
    autoencoder.decode(z).sum().backward()  # gradients
    assert autoencoder.decoder.conv_in.weight.grad is not None and calls == []
    seen = []
    autoencoder.decoder.mid.block_1.register_forward_hook(lambda *given: seen.append(1))
    with torch.no_grad():
        torch.testing.assert_close(autoencoder.decode(z), want, rtol=2e-5, atol=2e-5)
    assert calls == ["decode_tiled"] and seen == [1]


def test_a_model_without_an_autoencoder_has_nothing_to_tile():
    with pytest.raises(UsageError, match="tiled_vae is for a model with an autoencoder, Sequential has none"):
        optimize(nn.Sequential(nn.Conv2d(3, 4, 3)), tiled_vae=True)


# --- one picture after the other ------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"compile": True}, marks=pytest.mark.slow), {"tiled_vae": True}], ids=str
)
def test_a_batch_goes_through_picture_by_picture(autoencoder, options):
    x, z = keyed_input("strips.x", (3, 3, 20, 28)), keyed_input("strips.z", (2, 4, 5, 7))
    want = autoencoder.encode(x).mean, autoencoder.decode(z)
    seen = []
    autoencoder.decoder.mid.block_1.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    optimize(autoencoder, sliced_vae=True, **options)
    got = autoencoder.encode(x).mean, autoencoder.decode(z)
    assert seen == [1, 1]
    for ours, plain_way in zip(got, want, strict=True):
        torch.testing.assert_close(ours, plain_way, rtol=2e-5, atol=2e-5)
    restore(autoencoder)
    seen.clear()
    assert torch.equal(autoencoder.decode(z), want[1]) and seen == [2]


@torch.no_grad()
def test_picture_by_picture_needs_the_memory_of_one(autoencoder):
    decoder, z = autoencoder.decoder, keyed_input("strips.z", (4, 4, 12, 10))
    together, _ = peak_of(lambda: decoder(z))
    alone, _ = peak_of(lambda: decoder(z[:1]))
    optimize(autoencoder, sliced_vae=True)
    sliced, _ = peak_of(
        lambda: decoder.forward.try_forward(z)
    )  # who counts operations gets the plain ones otherwise
    pictures = decoder(z).nbytes
    assert alone < sliced <= alone + 2 * pictures + z.nbytes < together / 2


def test_an_empty_batch_is_still_a_batch(autoencoder):
    optimize(autoencoder, sliced_vae=True)
    with torch.no_grad():
        assert autoencoder.decode(torch.empty(0, 4, 5, 7)).shape[0] == 0


@pytest.mark.parametrize("way", ["tiled_vae", "sliced_vae"])
def test_a_model_without_an_autoencoder_is_refused(way):
    with pytest.raises(UsageError, match=f"{way} is for a model with an autoencoder, Linear has none"):
        optimize(nn.Linear(3, 5), **{way: True})
