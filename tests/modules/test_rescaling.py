"""The small networks around an autoencoder's halves, held against their parts by hand; and their key names."""

import pytest
import torch
import torch.nn.functional as F
from keyed import fill, keyed_input
from tiny_networks import VAE
from torch import nn

from ldm.errors import UsageError
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules import model, rescaling
from ldm.modules.diffusionmodules.model import (
    FirstStagePostProcessor,
    LatentRescaler,
    MergedRescaleDecoder,
    MergedRescaleEncoder,
    Resize,
    SimpleDecoder,
    UpsampleDecoder,
    Upsampler,
)

X = keyed_input("x", (2, 32, 4, 6))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def residual(block, x):
    h = block.conv1(F.silu(block.norm1(x)))
    h = block.conv2(F.silu(block.norm2(h)))
    return h + (block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x)


def double(layer, x):
    return layer.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def end(net, x):
    return net.conv_out(F.silu(F.group_norm(x, 32, net.norm_out.weight, net.norm_out.bias, 1e-6)))


@torch.no_grad()
def test_simple_decoder():
    net = fill(SimpleDecoder(32, 5))
    first, a, b, c, narrow, up = net.model
    want = end(net, double(up, narrow(residual(c, residual(b, residual(a, first(X)))))))
    close(net(X), want)
    assert want.shape == (2, 5, 8, 12)
    assert {key.split(".")[0] for key in net.state_dict()} == {"model", "norm_out", "conv_out"}
    assert net.model[2].conv1.weight.shape == (128, 64, 3, 3)
    assert not any("temb_proj" in key for key in net.state_dict())


@torch.no_grad()
def test_upsample_decoder():
    net = fill(UpsampleDecoder(32, 5, ch=32, num_res_blocks=1, resolution=16, ch_mult=(2, 1, 3)))
    h = X
    for level, blocks in enumerate(net.res_blocks):
        for block in blocks:
            h = residual(block, h)
        if level < 2:
            h = double(net.upsample_blocks[level], h)
    close(net(X), end(net, h))
    assert net(X).shape == (2, 5, 16, 24) and [len(b) for b in net.res_blocks] == [2, 2, 2]
    widths = [block.conv2.weight.shape[0] for blocks in net.res_blocks for block in blocks]
    assert widths == [64, 64, 32, 32, 96, 96] and len(net.upsample_blocks) == 2


@torch.no_grad()
@pytest.mark.parametrize(("factor", "size"), [(1.0, (4, 6)), (1.5, (6, 9)), (0.5, (2, 3)), (0.6, (2, 4))])
def test_latent_rescaler(factor, size):
    net = fill(LatentRescaler(factor, 32, 64, 5, depth=2))
    h = net.conv_in(X)
    for block in net.res_block1:
        h = residual(block, h)
    h = net.attn(F.interpolate(h, size=size))
    for block in net.res_block2:
        h = residual(block, h)
    close(net(X), net.conv_out(h))
    assert net(X).shape == (2, 5, *size)


@torch.no_grad()
def test_merged_halves_are_half_and_rescaler():
    options = {"ch": 32, "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 16, "ch_mult": [1, 2]}
    pictures = keyed_input("pictures", (2, 3, 16, 24))
    encoder = fill(MergedRescaleEncoder(in_channels=3, out_ch=4, rescale_factor=0.5, **options))
    features = encoder.encoder(pictures)
    assert features.shape == (2, 64, 8, 12)
    close(encoder(pictures), encoder.rescaler(features))
    assert encoder(pictures).shape == (2, 4, 4, 6) and encoder.rescaler.factor == 0.5
    options["ch_mult"] = [1, 2]
    decoder = fill(MergedRescaleDecoder(z_channels=32, out_ch=3, rescale_factor=2.0, **options))
    close(decoder(X), decoder.decoder(decoder.rescaler(X)))
    assert decoder(X).shape == (2, 3, 16, 24) and decoder.decoder.conv_in.weight.shape[1] == 64


@torch.no_grad()
def test_upsampler():
    """Four times by two doublings; and by a factor of 1 + the remainder first, as the original has it."""
    net = fill(Upsampler(in_size=4, out_size=16, in_channels=32, out_channels=3))
    assert net.rescaler.factor == 1 and net(X).shape == (2, 3, 16, 24)
    close(net(X), net.decoder(net.rescaler(X)))
    assert Upsampler(in_size=4, out_size=9, in_channels=32, out_channels=3).rescaler.factor == 2
    with pytest.raises(UsageError, match="out_size 3 is below in_size 4"):
        Upsampler(4, 3, 32, 3)


def test_resize():
    assert Resize()(X) is X and list(Resize().state_dict()) == []
    for mode in ("bilinear", "bicubic"):
        want = F.interpolate(X, scale_factor=0.5, mode=mode, align_corners=False)
        assert torch.equal(Resize(mode=mode)(X, 0.5), want) and want.shape == (2, 32, 2, 3)
    with pytest.raises(UsageError, match="set learned: false"):
        Resize(4, learned=True)


@pytest.mark.parametrize("reshape", [False, True])
def test_first_stage_post_processor(reshape):
    config = {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "ddconfig": {**VAE, "double_z": True},
            "lossconfig": {"target": "torch.nn.Identity"},
            "embed_dim": 4,
        },
    }
    net = fill(FirstStagePostProcessor([1, 2], 4, reshape=reshape, pretrained_config=config))
    pictures = keyed_input("pictures", (2, 3, 16, 24))
    stage = net.pretrained_model
    assert isinstance(stage, AutoencoderKL) and net.proj.weight.shape == (32, 4, 3, 3)
    assert not any(p.requires_grad for p in stage.parameters())
    z = stage.encode(pictures).mode()
    h = F.silu(net.proj(F.group_norm(z, 2, net.proj_norm.weight, net.proj_norm.bias, 1e-6)))
    for block in net.model:
        h = F.avg_pool2d(residual(block, h), 2)
    got = net(pictures)
    close(got, h.flatten(2).transpose(1, 2) if reshape else h)
    assert got.shape == ((2, 6, 64) if reshape else (2, 64, 2, 3))
    assert "model.0.temb_proj.weight" in net.state_dict()  # in the originals' files, and never used
    got.sum().backward()
    assert net.proj.weight.grad is not None
    given = FirstStagePostProcessor([1], 4, pretrained_model=stage, n_channels=64)
    assert given.pretrained_model is stage and given.proj.weight.shape[0] == 64
    with pytest.raises(UsageError, match="pretrained_model or pretrained_config, got neither"):
        FirstStagePostProcessor([1], 4)


def test_they_are_where_compvis_has_them():
    for name in (
        *("FirstStagePostProcessor", "LatentRescaler", "MergedRescaleDecoder", "MergedRescaleEncoder"),
        *("Resize", "SimpleDecoder", "UpsampleDecoder", "Upsampler"),
    ):
        assert getattr(model, name) is getattr(rescaling, name) and issubclass(
            getattr(model, name), nn.Module
        )
    with pytest.raises(AttributeError, match="has no attribute 'Sideways'"):
        model.Sideways  # noqa: B018
