"""Small networks around an autoencoder's halves, that change the size of maps or prepare latents as conditions.

CompVis has these classes in model.py, where they can be imported from as well.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import instantiate_from_config
from ldm.errors import UsageError
from ldm.modules.diffusionmodules.model import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    Normalize,
    ResnetBlock,
    Upsample,
    nonlinearity,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


def _block(in_channels: int, out_channels: int, dropout: float = 0.0) -> ResnetBlock:
    """Make a residual block without a level's embedding."""
    return ResnetBlock(in_channels=in_channels, out_channels=out_channels, temb_channels=0, dropout=dropout)


class SimpleDecoder(nn.Module):
    """Three residual blocks and one doubling of the sides: (b, in_channels, h, w) to (b, out_channels, 2h, 2w)."""

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any):
        super().__init__()
        c = in_channels
        self.model = nn.ModuleList(
            [
                nn.Conv2d(c, c, 1),
                _block(c, 2 * c),
                _block(2 * c, 4 * c),
                _block(4 * c, 2 * c),
                nn.Conv2d(2 * c, c, 1),
                Upsample(c, with_conv=True),
            ]
        )
        self.norm_out = Normalize(c)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x, None) if isinstance(layer, ResnetBlock) else layer(x)
        return self.conv_out(nonlinearity(self.norm_out(x)))


class UpsampleDecoder(nn.Module):
    """Levels of num_res_blocks + 1 residual blocks, the sides doubled between them.

    Args:
        in_channels, out_channels: of the map and of the result.
        ch, ch_mult: level i has ch * ch_mult[i] channels.
        resolution: kept for its callers; any size works.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ch: int,
        num_res_blocks: int,
        resolution: int,
        ch_mult: Sequence[int] = (2, 2),
        dropout: float = 0.0,
    ):
        super().__init__()
        self.temb_ch, self.num_resolutions, self.num_res_blocks = 0, len(ch_mult), num_res_blocks
        self.res_blocks, self.upsample_blocks = nn.ModuleList(), nn.ModuleList()
        width = in_channels
        for level, mult in enumerate(ch_mult):
            widths = [width, *[ch * mult] * (num_res_blocks + 1)]
            pairs = zip(widths[:-1], widths[1:], strict=True)
            self.res_blocks.append(nn.ModuleList(_block(a, b, dropout) for a, b in pairs))
            width = ch * mult
            if level != len(ch_mult) - 1:
                self.upsample_blocks.append(Upsample(width, True))
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for level, blocks in enumerate(self.res_blocks):
            for block in blocks:
                x = block(x, None)
            if level < len(self.upsample_blocks):
                x = self.upsample_blocks[level](x)
        return self.conv_out(nonlinearity(self.norm_out(x)))


class LatentRescaler(nn.Module):
    """Residual blocks, sides times a factor by the nearest cell, attention, residual blocks.

    Args:
        factor: sides become round(factor * side).
        in_channels, mid_channels, out_channels: before, within and after.
        depth: residual blocks on either side.
    """

    def __init__(self, factor: float, in_channels: int, mid_channels: int, out_channels: int, depth: int = 2):
        super().__init__()
        self.factor = factor
        self.conv_in = nn.Conv2d(in_channels, mid_channels, 3, padding=1)
        self.res_block1 = nn.ModuleList(_block(mid_channels, mid_channels) for _ in range(depth))
        self.attn = AttnBlock(mid_channels)
        self.res_block2 = nn.ModuleList(_block(mid_channels, mid_channels) for _ in range(depth))
        self.conv_out = nn.Conv2d(mid_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.res_block1:
            x = block(x, None)
        x = self.attn(F.interpolate(x, size=[round(side * self.factor) for side in x.shape[2:]]))
        for block in self.res_block2:
            x = block(x, None)
        return self.conv_out(x)


class MergedRescaleEncoder(nn.Module):
    """An Encoder whose features a LatentRescaler brings to another size: (b, out_ch, h, w)."""

    def __init__(
        self,
        in_channels: int,
        ch: int,
        resolution: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        rescale_factor: float = 1.0,
        rescale_module_depth: int = 1,
    ):
        super().__init__()
        width = ch * ch_mult[-1]
        self.encoder = Encoder(
            in_channels=in_channels,
            num_res_blocks=num_res_blocks,
            ch=ch,
            ch_mult=tuple(ch_mult),
            z_channels=width,
            double_z=False,
            resolution=resolution,
            attn_resolutions=tuple(attn_resolutions),
            dropout=dropout,
            resamp_with_conv=resamp_with_conv,
            out_ch=out_ch,
        )
        self.rescaler = LatentRescaler(rescale_factor, width, width, out_ch, rescale_module_depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.rescaler(self.encoder(x))


class MergedRescaleDecoder(nn.Module):
    """A Decoder of latents that a LatentRescaler has brought to another size."""

    def __init__(
        self,
        z_channels: int,
        out_ch: int,
        resolution: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        rescale_factor: float = 1.0,
        rescale_module_depth: int = 1,
    ):
        super().__init__()
        width = z_channels * ch_mult[-1]
        self.decoder = Decoder(
            out_ch=out_ch,
            z_channels=width,
            attn_resolutions=tuple(attn_resolutions),
            dropout=dropout,
            resamp_with_conv=resamp_with_conv,
            in_channels=out_ch,
            num_res_blocks=num_res_blocks,
            ch_mult=tuple(ch_mult),
            resolution=resolution,
            ch=ch,
        )
        self.rescaler = LatentRescaler(rescale_factor, z_channels, width, width, rescale_module_depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.rescaler(x))


class Upsampler(nn.Module):
    """Enlarge maps from in_size to out_size: a LatentRescaler by 1 + out_size % in_size, then a Decoder.

    Raises:
        UsageError: out_size is smaller than in_size.
    """

    def __init__(self, in_size: int, out_size: int, in_channels: int, out_channels: int, ch_mult: int = 2):
        super().__init__()
        if out_size < in_size:
            raise UsageError(f"Upsampler enlarges, but out_size {out_size} is below in_size {in_size}")
        levels = int(math.log2(out_size // in_size)) + 1
        self.rescaler = LatentRescaler(1.0 + out_size % in_size, in_channels, 2 * in_channels, in_channels)
        self.decoder = Decoder(
            out_ch=out_channels,
            resolution=out_size,
            z_channels=in_channels,
            num_res_blocks=2,
            attn_resolutions=(),
            in_channels=in_channels,
            ch=in_channels,
            ch_mult=(ch_mult,) * levels,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.rescaler(x))


class Resize(nn.Module):
    """Resize maps by a factor given at the call.

    Args:
        in_channels: kept for its callers.
        learned: False; the original has no code for True.
        mode: "bilinear" or "bicubic".

    Raises:
        UsageError: learned.
    """

    def __init__(self, in_channels: int | None = None, learned: bool = False, mode: str = "bilinear"):
        super().__init__()
        if learned:
            raise UsageError("Resize has no learned kind, in the original neither; set learned: false")
        self.with_conv, self.mode = learned, mode

    def forward(self, x: Tensor, scale_factor: float = 1.0) -> Tensor:
        if scale_factor == 1.0:
            return x
        return F.interpolate(x, mode=self.mode, align_corners=False, scale_factor=scale_factor)


class FirstStagePostProcessor(nn.Module):
    """Latents of a frozen first stage as a condition: normed, widened, and halved once for each of ch_mult.

    Args:
        ch_mult: level i has ch_mult[i] * n_channels channels.
        in_channels: of the latents; even, for their norm has in_channels / 2 groups.
        pretrained_model, pretrained_config: the first stage, or what builds it.
        reshape: give tokens (b, h w, c) instead of maps.
        n_channels: None means the first stage's `encoder.ch`.

    Raises:
        UsageError: neither a first stage nor a configuration.
    """

    def __init__(
        self,
        ch_mult: Sequence[int],
        in_channels: int,
        pretrained_model: nn.Module | None = None,
        reshape: bool = False,
        n_channels: int | None = None,
        dropout: float = 0.0,
        pretrained_config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if pretrained_config is not None:
            self.instantiate_pretrained(pretrained_config)
        elif pretrained_model is not None:
            self.pretrained_model = pretrained_model
        else:
            raise UsageError(
                "FirstStagePostProcessor needs pretrained_model or pretrained_config, got neither"
            )
        self.do_reshape = reshape
        n_channels = self.pretrained_model.encoder.ch if n_channels is None else n_channels
        self.proj_norm = Normalize(in_channels, num_groups=in_channels // 2)
        self.proj = nn.Conv2d(in_channels, n_channels, 3, padding=1)
        widths = [n_channels, *(mult * n_channels for mult in ch_mult)]
        # The originals' blocks carry the projection of an embedding that is never given.
        self.model = nn.ModuleList(
            ResnetBlock(in_channels=a, out_channels=b, dropout=dropout)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.downsampler = nn.ModuleList(Downsample(width, with_conv=False) for width in widths[1:])

    def instantiate_pretrained(self, config: Mapping[str, Any]) -> None:
        """Build the first stage and freeze it."""
        self.pretrained_model = instantiate_from_config(config).eval().requires_grad_(False)

    @torch.no_grad()
    def encode_with_pretrained(self, x: Tensor) -> Tensor:
        """Encode pictures (b, 3, h, w) to the likeliest latents."""
        c = self.pretrained_model.encode(x)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    def forward(self, x: Tensor) -> Tensor:
        z = nonlinearity(self.proj(self.proj_norm(self.encode_with_pretrained(x))))
        for block, smaller in zip(self.model, self.downsampler, strict=True):
            z = smaller(block(z, None))
        return z.flatten(2).transpose(1, 2) if self.do_reshape else z
