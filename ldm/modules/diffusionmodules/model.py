"""The autoencoder's encoder and decoder, and the pixel UNet of the DDPM paper. CompVis calls this file model.py.

Everything works on (b, c, h, w). Group norms have 32 groups and an eps of 1e-6.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.helpers import living_in
from ldm.modules.attention import LinearAttention, Normalize, attend
from ldm.values import expect_tensors

__all__ = [
    "AttnBlock",
    "Decoder",
    "Downsample",
    "Encoder",
    "LinAttnBlock",
    "MemoryEfficientAttnBlock",
    "Model",
    "Normalize",
    "ResnetBlock",
    "Upsample",
    "get_timestep_embedding",
    "make_attn",
    "nonlinearity",
]

# Classes that CompVis has in this file; they build on it, and are imported on first use.
__getattr__ = living_in(
    "ldm.modules.diffusionmodules.rescaling",
    "FirstStagePostProcessor",
    "LatentRescaler",
    "MergedRescaleDecoder",
    "MergedRescaleEncoder",
    "Resize",
    "SimpleDecoder",
    "UpsampleDecoder",
    "Upsampler",
    of=__name__,
)


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Embed levels as [sin, cos] with the last frequency at exactly 1/10000, as the DDPM paper's code does.

    The UNet of Stable Diffusion uses the other convention: ldm.modules.diffusionmodules.util.timestep_embedding.

    Args:
        timesteps: (b,) levels.
        embedding_dim: of the result; an odd one ends in a zero.

    Returns:
        (b, embedding_dim) float32.
    """
    half = embedding_dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=timesteps.device) * -(math.log(10000) / (half - 1))
    )
    angles = timesteps.float()[:, None] * frequencies[None]  # (b, half)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, embedding_dim % 2))


def nonlinearity(x: Tensor) -> Tensor:
    """Apply swish, x * sigmoid(x)."""
    return F.silu(x)


class Upsample(nn.Module):
    """Double height and width by repetition, then smooth with a 3x3 convolution where with_conv is set."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (b, c, 2h, 2w)
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halve height and width, by a strided convolution or by averaging."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.with_conv:
            return F.avg_pool2d(x, kernel_size=2, stride=2)
        # One zero on the right and the bottom only: the original's padding, part of what its weights learned.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Two normalised convolutions with a shortcut; a level's embedding may enter between them."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 512,
        num_groups: int = 32,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels = in_channels if out_channels is None else out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class LinAttnBlock(LinearAttention):
    """Linear attention under the name and the arguments that make_attn expects."""

    def __init__(self, in_channels: int):
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


class AttnBlock(nn.Module):
    """Self-attention over all cells of the map, with one head as wide as the map is deep."""

    def __init__(self, in_channels: int, num_groups: int = 32):
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels, num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        normed = self.norm(x)
        q, k, v = (
            layer(normed).reshape(b, 1, c, h * w).transpose(2, 3)  # (b, 1, h*w, c)
            for layer in (self.q, self.k, self.v)
        )
        out = attend(q, k, v)
        return x + self.proj_out(out.transpose(2, 3).reshape(b, c, h, w))


# Stable Diffusion 2 gave the memory-saving path a class of its own; here AttnBlock saves memory itself.
MemoryEfficientAttnBlock = AttnBlock


def make_attn(in_channels: int, attn_type: str = "vanilla", num_groups: int = 32) -> nn.Module:
    """Make the attention that a configuration names: "vanilla", "linear" or "none"."""
    if attn_type == "vanilla":
        return AttnBlock(in_channels, num_groups)
    if attn_type == "linear":
        return LinAttnBlock(in_channels)
    if attn_type == "none":
        return nn.Identity()
    raise UsageError(f"attn_type should be 'vanilla', 'linear' or 'none', got {attn_type!r}")


class _Level(nn.Module):
    """The blocks that work at one resolution; `attn` is empty where the level has no attention.

    `options` are the ResnetBlocks' dropout, temb_channels and num_groups.
    """

    def __init__(self, channels: list[tuple[int, int]], attn_type: str | None, options: dict[str, Any]):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(in_channels=a, out_channels=b, **options) for a, b in channels)
        self.attn = nn.ModuleList(
            make_attn(b, attn_type, options["num_groups"]) for _, b in channels if attn_type is not None
        )

    def step(self, i: int, h: Tensor, temb: Tensor | None) -> Tensor:
        h = self.block[i](h, temb)
        return self.attn[i](h) if len(self.attn) else h


class _Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, attn_type: str, options: dict[str, Any]):
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, out_channels=channels, **options)
        self.attn_1 = make_attn(channels, attn_type, options["num_groups"])
        self.block_2 = ResnetBlock(in_channels=channels, out_channels=channels, **options)

    def forward(self, h: Tensor, temb: Tensor | None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, temb)), temb)


class Encoder(nn.Module):
    """Picture to latent moments, halving height and width between levels.

    Args:
        ch: channels of the first level; level i has ch * ch_mult[i].
        num_res_blocks: blocks in each level.
        attn_resolutions: sides, counted down from `resolution`, at which every block is followed by attention.
        resolution: side that attn_resolutions count from; pictures may have any size that halves evenly.
        z_channels: of the latents; double_z gives twice as many (means and log variances).
        out_ch: the decoder's; accepted because both are built from one configuration.
        use_linear_attn: short for attn_type="linear".
        num_groups: of every norm. The original's 32 leave one channel to a group where a level has 32 channels,
            which wipes out how bright a picture is; narrow models want fewer.

    Attributes:
        edges: a slot (ldm.modules.seams): see UNetModel.
    """

    edges: Any = None

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: tuple[int, ...] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        tanh_out: bool = False,
        give_pre_end: bool = False,
        num_groups: int = 32,
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.ch, self.temb_ch, self.in_channels, self.resolution = ch, 0, in_channels, resolution
        self.num_resolutions, self.num_res_blocks = len(ch_mult), num_res_blocks
        options = {"dropout": dropout, "temb_channels": self.temb_ch, "num_groups": num_groups}
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down, width = _down_path(
            ch, ch_mult, num_res_blocks, attn_resolutions, resolution, attn_type, resamp_with_conv, options
        )
        self.mid = _Middle(width, attn_type, options)
        self.norm_out = Normalize(width, num_groups)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.check_sides(x)
        h = self.conv_in(x)
        for level in self.down:
            for i in range(self.num_res_blocks):
                h = level.step(i, h, None)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(nonlinearity(self.norm_out(self.mid(h, None))))

    def check_sides(self, x: Tensor) -> None:
        """Raise UsageError if images (b, in_channels, height, width) are too small to be halved at every level."""
        smallest = 2 ** sum(hasattr(level, "downsample") for level in self.down)
        if min(x.shape[2:]) < smallest:
            raise UsageError(
                f"images for this encoder should have sides of {smallest} or more, got "
                f"{' x '.join(map(str, x.shape[2:]))}"
            )


def _down_path(
    ch: int,
    ch_mult: tuple[int, ...],
    num_res_blocks: int,
    attn_resolutions: tuple[int, ...],
    resolution: int,
    attn_type: str,
    resamp_with_conv: bool,
    options: dict[str, Any],
) -> tuple[nn.ModuleList, int]:
    """Build the levels from high to low resolution; return them and the width of the last."""
    expect_tensors(8 * len(ch_mult) * num_res_blocks)
    levels, width = nn.ModuleList(), ch
    for i, mult in enumerate(ch_mult):
        channels = [(width if j == 0 else ch * mult, ch * mult) for j in range(num_res_blocks)]
        here = attn_type if resolution // 2**i in attn_resolutions else None
        level = _Level(channels, here, options)
        width = ch * mult
        if i != len(ch_mult) - 1:
            level.downsample = Downsample(width, resamp_with_conv)
        levels.append(level)
    return levels, width


class Decoder(nn.Module):
    """Latents to picture, doubling height and width between levels; see Encoder for the arguments.

    Args:
        tanh_out: squash the picture into [-1, 1].
        give_pre_end: return the last features instead of a picture.
        double_z: the encoder's; accepted because both are built from one configuration.

    Attributes:
        edges: a slot (ldm.modules.seams): see UNetModel.
    """

    edges: Any = None

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: tuple[int, ...] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        double_z: bool = True,
        num_groups: int = 32,
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.ch, self.temb_ch, self.in_channels, self.resolution = ch, 0, in_channels, resolution
        self.num_resolutions, self.num_res_blocks = len(ch_mult), num_res_blocks
        self.give_pre_end, self.tanh_out = give_pre_end, tanh_out
        lowest, width = resolution // 2 ** (len(ch_mult) - 1), ch * ch_mult[-1]
        self.z_shape = (1, z_channels, lowest, lowest)
        options = {"dropout": dropout, "temb_channels": self.temb_ch, "num_groups": num_groups}
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _Middle(width, attn_type, options)
        levels = []
        for i in reversed(range(len(ch_mult))):
            channels = [
                (width if j == 0 else ch * ch_mult[i], ch * ch_mult[i]) for j in range(num_res_blocks + 1)
            ]
            here = attn_type if resolution // 2**i in attn_resolutions else None
            level = _Level(channels, here, options)
            width = ch * ch_mult[i]
            if i != 0:
                level.upsample = Upsample(width, resamp_with_conv)
            levels.insert(0, level)  # stored from high to low resolution, as the checkpoints number them
        self.up = nn.ModuleList(levels)
        self.norm_out = Normalize(width, num_groups)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.features(z)
        return h if self.give_pre_end else self.answer(h)

    def features(self, z: Tensor) -> Tensor:
        """Compute the maps (b, ch, f h, f w) that the last norm and convolution turn into a picture."""
        self.last_z_shape = z.shape
        h = self.mid(self.conv_in(z), None)
        for level in reversed(self.up):
            for i in range(self.num_res_blocks + 1):
                h = level.step(i, h, None)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return h

    def answer(self, h: Tensor) -> Tensor:
        """Turn features into a picture (b, out_ch, f h, f w)."""
        h = self.conv_out(nonlinearity(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h


class Model(nn.Module):
    """The pixel UNet of the DDPM paper (arXiv:2006.11239), with a skip from every block.

    forward takes x (b, in_channels, h, w), t (b,) where use_timestep is set, and an optional context that is
    concatenated to x along the channels; it returns (b, out_ch, h, w).
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: tuple[int, ...] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        use_timestep: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        num_groups: int = 32,
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.ch, self.temb_ch, self.in_channels, self.resolution = ch, 4 * ch, in_channels, resolution
        self.num_resolutions, self.num_res_blocks = len(ch_mult), num_res_blocks
        self.use_timestep = use_timestep
        if use_timestep:
            self.temb = nn.Module()
            self.temb.dense = nn.ModuleList(
                [nn.Linear(ch, self.temb_ch), nn.Linear(self.temb_ch, self.temb_ch)]
            )
        options = {"dropout": dropout, "temb_channels": self.temb_ch, "num_groups": num_groups}
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down, width = _down_path(
            ch, ch_mult, num_res_blocks, attn_resolutions, resolution, attn_type, resamp_with_conv, options
        )
        self.mid = _Middle(width, attn_type, options)
        levels = []
        for i in reversed(range(len(ch_mult))):
            own = ch * ch_mult[i]
            # The last block of a level takes the skip that entered the level on the way down.
            entered = ch * (1, *ch_mult)[i]
            skips = [own] * num_res_blocks + [entered]
            channels = [((width if j == 0 else own) + skip, own) for j, skip in enumerate(skips)]
            here = attn_type if resolution // 2**i in attn_resolutions else None
            level = _Level(channels, here, options)
            width = own
            if i != 0:
                level.upsample = Upsample(width, resamp_with_conv)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = Normalize(width, num_groups)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = torch.cat((x, context), dim=1)
        temb = None
        if self.use_timestep:
            if t is None:
                raise UsageError(
                    "this model is built with use_timestep=True and needs t, the levels of the batch"
                )
            temb = get_timestep_embedding(t, self.ch).to(x.dtype)
            temb = self.temb.dense[1](nonlinearity(self.temb.dense[0](temb)))  # (b, 4 ch)
        skips = [self.conv_in(x)]
        for level in self.down:
            for i in range(self.num_res_blocks):
                skips.append(level.step(i, skips[-1], temb))
            if hasattr(level, "downsample"):
                skips.append(level.downsample(skips[-1]))
        h = self.mid(skips[-1], temb)
        for level in reversed(self.up):
            for i in range(self.num_res_blocks + 1):
                h = level.step(i, torch.cat([h, skips.pop()], dim=1), temb)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))

    def get_last_layer(self) -> Tensor:
        """Return the weight that adversarial losses balance their gradients on."""
        return self.conv_out.weight
