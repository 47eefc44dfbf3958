"""The UNet, and the half of it that classifies. CompVis calls this file openaimodel.

Maps are (b, c, *space) with 1, 2 or 3 dimensions of space; 3-dimensional ones keep their first one (time) when
they are halved or doubled.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch as th  # noqa: F401  (the original's name for torch, which other people's code takes from here)
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ldm.errors import MismatchError, UsageError
from ldm.helpers import exists, leaves_others_to_subclasses
from ldm.improved_calls import takes_improved_diffusions_call
from ldm.modules import processors
from ldm.modules.attention import SpatialTransformer, attend
from ldm.modules.diffusionmodules.util import (
    SiLU,  # noqa: F401  (part of the public interface of improved-diffusion's UNet)
    avg_pool_nd,
    check_label_range,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.values import expect_tensors


def convert_module_to_f16(module: nn.Module) -> None:
    """Turn the weights of one layer (a convolution, linear layer or norm) into half precision."""
    _convert(module, torch.float16)


def convert_module_to_f32(module: nn.Module) -> None:
    """Turn the weights of one layer back into single precision."""
    _convert(module, torch.float32)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | nn.LayerNorm | nn.GroupNorm):
        # The original turns convolutions alone, and its transformers then fail on half maps.
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


class AttentionPool2d(nn.Module):
    """Pool a square map by attention from its mean, as CLIP's image encoder does.

    forward takes (b, embed_dim, spacial_dim, spacial_dim) and returns (b, output_dim).
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ):
        super().__init__()
        self.positional_embedding = nn.Parameter(
            torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5
        )  # (c, 1 + h*w), the mean's position first
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:].numel() + 1 != self.positional_embedding.shape[1]:
            raise MismatchError(
                f"the attention pool was made for {self.positional_embedding.shape[1] - 1} cells, got a map of "
                f"{' x '.join(map(str, x.shape[2:]))}; the classifier takes pictures of its own size only"
            )
        x = x.flatten(2)  # (b, c, h*w)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding.to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]


class TimestepBlock(nn.Module):
    """A module whose forward takes the embedding of the level as its second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the module to x, given the embedding of the level."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the level's embedding and the context to those of its children that take them."""

    def forward(self, x: Tensor, emb: Tensor, context: Any = None, size: torch.Size | None = None) -> Tensor:
        """Apply the children in turn; `size` is what those that double the sides have to reach, if not twice."""
        reach = () if size is None else (size,)
        for layer in self:
            if isinstance(layer, ResBlock) and layer.up:
                x = layer(x, emb, *reach)
            elif isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, *reach)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Double the sides by repetition, then convolve where use_conv is set.

    forward also takes the size to reach, so that a map can follow a skip of odd size.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=padding)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        _expect_channels(self, x, self.channels)
        x = F.interpolate(x, size=_doubled(x.shape[2:]) if size is None else size, mode="nearest")
        return self.conv(x) if self.use_conv else x


def _doubled(sides: torch.Size) -> torch.Size:
    """Give twice the sides of a map; of three the first is time, which keeps its length."""
    return torch.Size(side if len(sides) == 3 and i == 0 else 2 * side for i, side in enumerate(sides))


class TransposedUpsample(nn.Module):
    """Double the sides by a learned transposed convolution without padding."""

    def __init__(self, channels: int, out_channels: int | None = None, ks: int = 5):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.up = nn.ConvTranspose2d(channels, self.out_channels, kernel_size=ks, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class Downsample(nn.Module):
    """Halve the sides (rounding up), by a strided convolution or by averaging."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = 2 if dims != 3 else (1, 2, 2)
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=padding)
        else:
            if self.channels != self.out_channels:
                raise MismatchError(
                    f"averaging keeps the {channels} channels, but out_channels={self.out_channels}; use_conv=True"
                )
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        _expect_channels(self, x, self.channels)
        return self.op(x)


def _expect_channels(module: nn.Module, x: Tensor, channels: int) -> None:
    if x.shape[1] != channels:
        raise MismatchError(
            f"{type(module).__name__} has {channels} channels, got x with shape {tuple(x.shape)}"
        )


class ResBlock(TimestepBlock):
    """Two normalised convolutions with a shortcut; the embedding of the level enters between them.

    Args:
        channels, emb_channels: of the map and of the embedding.
        dropout: before the second convolution.
        out_channels: of the result.
        use_conv: a 3x3 instead of a 1x1 convolution on the shortcut, where the channels change.
        use_scale_shift_norm: the embedding scales and shifts the second norm instead of being added before it.
        dims: of the space.
        use_checkpoint: recompute in the backward pass instead of keeping activations.
        up, down: double or halve the sides on the way, without a convolution of its own.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.channels, self.emb_channels, self.dropout = channels, emb_channels, dropout
        self.out_channels = out_channels or channels
        self.use_conv, self.use_checkpoint = use_conv, use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.up, self.updown = up, up or down
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, self.out_channels, 3, padding=1)
        )
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.x_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), linear(emb_channels, (2 if use_scale_shift_norm else 1) * self.out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, size: torch.Size | None = None) -> Tensor:
        """Apply the block; size is the side to reach where `up` is set and the skip has an odd one."""
        return checkpoint(self._forward, (x, emb, size), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor, size: torch.Size | None = None) -> Tensor:
        if self.updown:
            norm_act, conv = self.in_layers[:-1], self.in_layers[-1]
            reach = (size,) if self.up else ()
            h = conv(self.h_upd(norm_act(x), *reach))
            x = self.x_upd(x, *reach)
        else:
            h = self.in_layers(x)
        shift = self.emb_layers(emb.type(self.emb_layers[1].weight.dtype)).type(h.dtype)
        shift = shift.reshape(*shift.shape, *(1 for _ in h.shape[2:]))  # (b, c or 2c, 1, ...)
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = shift.chunk(2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all cells of a map, added to it.

    Args:
        channels: of the map.
        num_heads, num_head_channels: number of heads, or their width where that is not -1.
        use_checkpoint: CompVis recomputes these blocks always; here they follow the flag.
        use_new_attention_order: the order of q, k and v against the heads in the weights.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        if isinstance(num_head_channels, bool):  # improved-diffusion's third argument is use_checkpoint
            use_checkpoint, num_head_channels = num_head_channels, -1
        self.channels = channels
        self.num_heads = _heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (b, c, n)
        h = self.proj_out(self.attention(self.qkv(self.norm(flat))))
        return (flat + h).reshape(x.shape)


def _heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    if num_head_channels == -1:
        if num_heads < 1 or channels % num_heads:
            raise MismatchError(f"{channels} channels do not divide into num_heads={num_heads} heads")
        return num_heads
    if num_head_channels < 1 or channels % num_head_channels:
        raise MismatchError(
            f"{channels} channels do not divide into heads of num_head_channels={num_head_channels}"
        )
    return channels // num_head_channels


def count_flops_attn(model: nn.Module, _x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> None:
    """Add the operations of one attention to model.total_ops, as the `thop` profiler's custom rule."""
    b, c, *space = y[0].shape
    model.total_ops += torch.DoubleTensor([2 * b * math.prod(space) ** 2 * c])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with (b, heads, c, n) tensors."""
    out = attend(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
    return out.transpose(2, 3)


class QKVAttentionLegacy(nn.Module):
    """Attention where the heads are the outer, and q, k and v the inner division of the channels."""

    def __init__(self, n_heads: int = 1):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """Take (b, heads * 3 * c, n), return (b, heads * c, n)."""
        b, _, n = qkv.shape
        q, k, v = qkv.reshape(b, self.n_heads, -1, n).chunk(3, dim=2)  # (b, heads, c, n) each
        return _attend(q, k, v).reshape(b, -1, n)

    @staticmethod
    def count_flops(model: nn.Module, _x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> None:
        """See count_flops_attn."""
        count_flops_attn(model, _x, y)


class QKVAttention(nn.Module):
    """Attention where q, k and v are the outer, and the heads the inner division of the channels.

    Without n_heads it is improved-diffusion's, whose callers put the heads into the batch.
    """

    def __init__(self, n_heads: int = 1):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """Take (b, 3 * heads * c, n), return (b, heads * c, n)."""
        b, _, n = qkv.shape
        q, k, v = qkv.reshape(b, 3, self.n_heads, -1, n).unbind(dim=1)  # (b, heads, c, n) each
        return _attend(q, k, v).reshape(b, -1, n)

    @staticmethod
    def count_flops(model: nn.Module, _x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> None:
        """See count_flops_attn."""
        count_flops_attn(model, _x, y)


class _UNetBase(nn.Module):
    """What the UNet and the encoder UNet share: the dtype of the maps, and how small they may be."""

    dtype: torch.dtype
    smallest_side = (
        1  # of x: of one cell a strided convolution makes one, where averaging has nothing to halve
    )

    def _cast_torso(self, half: bool) -> None:
        convert = convert_module_to_f16 if half else convert_module_to_f32
        for part in (self.input_blocks, self.middle_block, getattr(self, "output_blocks", nn.ModuleList())):
            part.apply(convert)
        self.dtype = torch.float16 if half else torch.float32

    def convert_to_fp16(self) -> None:
        """Run the blocks in half precision; the level's embedding and the last layers stay in single."""
        self._cast_torso(half=True)

    def convert_to_fp32(self) -> None:
        """Run everything in single precision again."""
        self._cast_torso(half=False)

    def _torso_input(self, x: Tensor) -> Tensor:
        """Cast x to what the blocks compute in: their declared dtype, or their weights' if a caller changed it.

        Raises:
            UsageError: x is too small to be halved at every level.
        """
        if min(x.shape[2:][-2:]) < self.smallest_side:
            raise UsageError(
                f"maps for this network, which halves them by averaging, should have sides of {self.smallest_side} or "
                f"more, got {' x '.join(map(str, x.shape[2:]))}"
            )
        weight = self.input_blocks[0][0].weight
        return x.type(self.dtype if self.dtype == torch.float16 else weight.dtype)

    @staticmethod
    def _answer(head: nn.Sequential, h: Tensor, dtype: torch.dtype) -> Tensor:
        """Run the last layers in the dtype of their own weights, and give the answer in the caller's."""
        *_, last = head.parameters()
        return head(h.type(last.dtype)).type(dtype)


@dataclass(frozen=True)
class _Paths:
    """Makes the blocks of a UNet's way down, and of its way up.

    Args:
        dims, num_res_blocks, conv_resample, resblock_updown: UNetModel's, num_res_blocks as a list.
        widths: channels of each level.
        res_block: makes a ResBlock from its channels and options.

    The attention of a path gives what follows a residual block, from (channels, level, block, downsampling factor).
    """

    dims: int
    widths: list[int]
    num_res_blocks: list[int]
    res_block: Callable[..., ResBlock]
    conv_resample: bool
    resblock_updown: bool

    def down(
        self, in_channels: int, attention: Callable[[int, int, int, int], nn.Module | None]
    ) -> tuple[nn.ModuleList, list[int], int]:
        """Make the blocks from the input to the lowest resolution.

        Returns:
            The blocks, the channels after each of them, and the downsampling factor reached.
        """
        expect_tensors(8 * sum(self.num_res_blocks))
        ch, ds = self.widths[0], 1
        blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(self.dims, in_channels, ch, 3, padding=1))])
        after = [ch]
        for level, width in enumerate(self.widths):
            for block in range(self.num_res_blocks[level]):
                layers: list[nn.Module] = [self.res_block(ch, out_channels=width)]
                ch = width
                attending = attention(ch, level, block, ds)
                if attending is not None:
                    layers.append(attending)
                blocks.append(TimestepEmbedSequential(*layers))
                after.append(ch)
            if level != len(self.widths) - 1:
                if self.resblock_updown:
                    smaller: nn.Module = self.res_block(ch, down=True)
                else:
                    smaller = Downsample(ch, self.conv_resample, dims=self.dims)
                blocks.append(TimestepEmbedSequential(smaller))
                after.append(ch)
                ds *= 2
        return blocks, after, ds

    def smallest_side(self, ds: int) -> int:
        """Give how many cells a side needs that is halved to one ds-th."""
        return ds if self.resblock_updown or not self.conv_resample else 1

    def up(
        self, skips: list[int], ds: int, attention: Callable[[int, int, int, int], nn.Module | None]
    ) -> tuple[nn.ModuleList, list[int]]:
        """Make the blocks from the lowest resolution to the output; each takes one skip, joined on channels.

        Args:
            skips, ds: channels and downsampling factor from `down`.

        Returns:
            The blocks, and the channels after each of them.
        """
        skips, ch = list(skips), skips[-1]
        blocks, after = nn.ModuleList([]), []
        for level, width in reversed(list(enumerate(self.widths))):
            for block in range(self.num_res_blocks[level] + 1):
                layers: list[nn.Module] = [self.res_block(ch + skips.pop(), out_channels=width)]
                ch = width
                attending = attention(ch, level, block, ds)
                if attending is not None:
                    layers.append(attending)
                if level and block == self.num_res_blocks[level]:
                    if self.resblock_updown:
                        layers.append(self.res_block(ch, up=True))
                    else:
                        layers.append(Upsample(ch, self.conv_resample, dims=self.dims))
                    ds //= 2
                blocks.append(TimestepEmbedSequential(*layers))
                after.append(ch)
        return blocks, after


def _level_embedder(model_channels: int, embed_dim: int) -> nn.Sequential:
    """Make what turns the sinusoids of a level, (b, model_channels), into the embedding (b, embed_dim)."""
    return nn.Sequential(linear(model_channels, embed_dim), nn.SiLU(), linear(embed_dim, embed_dim))


def _label_embedder(num_classes: int | str, embed_dim: int) -> nn.Module:
    """Make what embeds labels (b,), or (b, 1) numbers where num_classes is "continuous", as (b, embed_dim)."""
    if num_classes == "continuous":
        return nn.Linear(1, embed_dim)
    if not isinstance(num_classes, int):
        raise UsageError(f"num_classes should be a number, 'continuous' or None, got {num_classes!r}")
    return nn.Embedding(num_classes, embed_dim)


def _check_per_level(levels: int, **options: list[Any] | None) -> None:
    """Raise MismatchError unless each option, where given, has one value for each level."""
    for name, values in options.items():
        if exists(values) and len(values) != levels:
            raise MismatchError(f"{name} lists {len(values)} values for the {levels} levels of channel_mult")


@dataclass(frozen=True, kw_only=True)
class _AttentionMaker:
    """Makes the attention of a UNet's blocks: AttentionBlocks or SpatialTransformers; the fields are UNetModel's.

    Raises:
        MismatchError: options that do not go together.
    """

    attention_resolutions: Iterable[int]
    num_heads: int
    num_head_channels: int
    use_checkpoint: bool
    use_new_attention_order: bool
    use_spatial_transformer: bool
    transformer_depth: int
    context_dim: int | list[int] | None
    legacy: bool
    disable_self_attentions: list[bool] | None
    num_attention_blocks: list[int] | None
    use_linear_in_transformer: bool

    def __post_init__(self) -> None:
        if self.use_spatial_transformer != exists(self.context_dim):
            raise MismatchError(
                "use_spatial_transformer and context_dim go together, got "
                f"use_spatial_transformer={self.use_spatial_transformer} and context_dim={self.context_dim}"
            )
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise MismatchError("one of num_heads and num_head_channels has to be set, both are -1")
        for name in ("num_heads", "num_head_channels"):
            value = getattr(self, name)
            if value < 1 and value != -1:
                raise MismatchError(
                    f"{name} should be at least 1, or -1 for the other to decide; got {value}"
                )

    def after(self, channels: int, level: int, block: int, ds: int, *, heads: int) -> nn.Module | None:
        """Make what follows a residual block, if anything does; heads count as in `make`."""
        if ds not in self.attention_resolutions:
            return None
        if self.num_attention_blocks is not None and block >= self.num_attention_blocks[level]:
            return None
        only_context = exists(self.disable_self_attentions) and bool(self.disable_self_attentions[level])
        return self.make(channels, heads, only_context)

    def make(self, channels: int, heads: int, context_only: bool) -> nn.Module:
        """Make the attention of one block.

        Args:
            heads: counted only where no width decides: in the legacy rule of AttentionBlocks.
            context_only: a transformer's first attention looks at the context, too.
        """
        if self.num_head_channels == -1:
            count, width = self.num_heads, channels // self.num_heads
        else:
            count, width = channels // self.num_head_channels, self.num_head_channels
        if not self.use_spatial_transformer:
            return AttentionBlock(
                channels,
                use_checkpoint=self.use_checkpoint,
                num_heads=heads,
                num_head_channels=self.num_head_channels if self.legacy else width,
                use_new_attention_order=self.use_new_attention_order,
            )
        return SpatialTransformer(
            channels,
            count,
            channels // count if self.legacy else width,
            depth=self.transformer_depth,
            context_dim=self.context_dim,
            disable_self_attn=context_only,
            use_linear=self.use_linear_in_transformer,
            use_checkpoint=self.use_checkpoint,
        )


class UNetModel(_UNetBase):
    """The UNet of latent diffusion: residual blocks and attention at several resolutions, with skips.

    A call without image_size is improved-diffusion's: num_heads is 1 where neither it nor num_head_channels is given.

    Args:
        image_size: side of the latents in training; any size works.
        in_channels, model_channels, out_channels: of the input, of the first level, of the output.
        num_res_blocks: in each level; a list gives one number for each.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which blocks are followed by attention.
        dropout: in the residual blocks.
        channel_mult: channels of level i are int(channel_mult[i] * model_channels); fractions are allowed.
        conv_resample: resample with convolutions.
        dims: of the space: 1, 2 or 3.
        num_classes: number of labels, or "continuous" for a single number as y.
        use_checkpoint: recompute in the backward pass instead of keeping activations.
        use_fp16: maps in half precision (then call convert_to_fp16, as the original's scripts do).
        num_heads, num_head_channels, num_heads_upsample: number of heads, their width where that is not -1,
            and their number on the way up where that is not -1.
        use_scale_shift_norm, resblock_updown: see ResBlock; resampling by residual blocks.
        use_new_attention_order: see AttentionBlock.
        use_spatial_transformer, transformer_depth, context_dim: attention to a context by SpatialTransformers.
        n_embed: predict codebook indices instead of values (forward returns (b, n_embed, ...)).
        legacy: the rule for head widths: channels // num_heads for transformers, num_head_channels otherwise.
        disable_self_attentions: for each level, whether its transformers only look at the context.
        num_attention_blocks: for each level, how many of its blocks are followed by attention.
        disable_middle_self_attn: the middle transformer only looks at the context.
        use_linear_in_transformer: linear layers instead of 1x1 convolutions around the transformers.

    Attributes:
        joining: a slot (ldm.modules.seams): called with the number of an output block, what it gets from the block
            before and its skip, it gives the two that are joined; None = as they are.
        edges: a slot: says that convolutions see something else than zeros beyond a map (ldm.adapters.seamless).
    """

    joining: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    edges: Any = None

    # long: half of it is CompVis's signature of 27 options and the handing on of each by its name.
    @leaves_others_to_subclasses
    @takes_improved_diffusions_call
    def __init__(
        self,
        image_size: int | tuple[int, int] | None,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | list[int],
        attention_resolutions: Iterable[int],
        dropout: float = 0,
        channel_mult: tuple[float, ...] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | list[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: list[bool] | None = None,
        num_attention_blocks: list[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
    ):
        super().__init__()
        if exists(context_dim) and not isinstance(context_dim, int):
            context_dim = list(context_dim)
        attention = _AttentionMaker(
            attention_resolutions=attention_resolutions,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
            use_spatial_transformer=use_spatial_transformer,
            transformer_depth=transformer_depth,
            context_dim=context_dim,
            legacy=legacy,
            disable_self_attentions=disable_self_attentions,
            num_attention_blocks=num_attention_blocks,
            use_linear_in_transformer=use_linear_in_transformer,
        )
        self.num_res_blocks = num_res_blocks  # as given, for those who build another UNet after this one
        num_res_blocks = (
            [num_res_blocks] * len(channel_mult) if isinstance(num_res_blocks, int) else list(num_res_blocks)
        )
        _check_per_level(
            len(channel_mult),
            num_res_blocks=num_res_blocks,
            disable_self_attentions=disable_self_attentions,
            num_attention_blocks=num_attention_blocks,
        )

        attending = [2 * n + 1 for level, n in enumerate(num_res_blocks) if 2**level in attention_resolutions]
        if use_spatial_transformer:  # 20 tensors in each of its blocks; the middle has one transformer, too
            expect_tensors(20 * transformer_depth * (1 + sum(attending)))
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.channel_mult = model_channels, channel_mult
        self.attention_resolutions = attention_resolutions
        self.dropout, self.conv_resample, self.num_classes = dropout, conv_resample, num_classes
        self.use_checkpoint = use_checkpoint
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.predict_codebook_ids = n_embed is not None
        # For networks that are built after this one; the original keeps those above.
        self.dims, self.resblock_updown = dims, resblock_updown
        self.use_scale_shift_norm = use_scale_shift_norm
        self.transformer_depth, self.context_dim, self.legacy = transformer_depth, context_dim, legacy
        self.disable_self_attentions = disable_self_attentions
        self.num_attention_blocks = num_attention_blocks
        self.disable_middle_self_attn = disable_middle_self_attn
        self.use_linear_in_transformer = use_linear_in_transformer

        embed_dim = model_channels * 4
        self.time_embed = _level_embedder(model_channels, embed_dim)
        if num_classes is not None:
            self.label_emb = _label_embedder(num_classes, embed_dim)

        res_block = partial(
            ResBlock,
            emb_channels=embed_dim,
            dropout=dropout,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
        )

        widths = [int(mult * model_channels) for mult in channel_mult]
        paths = _Paths(dims, widths, num_res_blocks, res_block, conv_resample, resblock_updown)
        self.input_blocks, skips, ds = paths.down(in_channels, partial(attention.after, heads=num_heads))
        self.smallest_side = paths.smallest_side(ds)
        ch = skips[-1]
        self.middle_block = TimestepEmbedSequential(
            res_block(ch), attention.make(ch, num_heads, disable_middle_self_attn), res_block(ch)
        )
        self.output_blocks, after = paths.up(
            skips, ds, partial(attention.after, heads=self.num_heads_upsample)
        )
        self._feature_size = sum(skips) + ch + sum(after)  # channels of all blocks together
        ch = after[-1]

        self.out = nn.Sequential(
            normalization(ch), nn.SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1))
        )
        if self.predict_codebook_ids:
            self.id_predictor = nn.Sequential(normalization(ch), conv_nd(dims, model_channels, n_embed, 1))

    @property
    def attn_processors(self) -> dict[str, Any]:
        """What answers in each attention, by diffusers' names and in its order; see ldm.modules.processors."""
        return processors.attn_processors(self)

    def set_attn_processor(self, processor: Any) -> None:
        """Let an attention processor answer in all attentions, or one each; see ldm.modules.processors.

        Raises:
            UsageError: a dictionary with another number of processors, or with a name that is none of attn_processors.
        """
        processors.set_attn_processor(self, processor)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Any = None,
        y: Tensor | None = None,
        *,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
        features: Mapping[int, Tensor] | None = None,
        depth: int = 0,
        deep: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict from maps and their levels; a keyword of another network is a TypeError.

        Args:
            x: (b, in_channels, *space).
            timesteps: (b,) levels, fractional ones allowed.
            context: (b, n, context_dim), or one for each transformer block.
            y: (b,) labels, or (b, 1) numbers where num_classes is "continuous".
            control: maps to add to what the input blocks hand over to the output blocks, one each in the order of the
                input blocks, and last one for the middle block's (ControlNet, arXiv:2302.05543); None = nothing.
            only_mid_control: add only the last one.
            features: maps to add to what input blocks give, by the blocks' numbers; the next block and the skip get the
                sum (T2I-Adapter, arXiv:2302.08453); None = nothing.
            depth: how many input blocks from the first on, and as many output blocks from the last backwards, are the
                shallow ones; the others are the deep ones. 0 = all are deep.
            deep: what the deep blocks gave at an earlier call of this depth, (b, c, *small space): only the shallow
                blocks run (DeepCache, arXiv:2312.00858).

        Returns:
            (b, out_channels, *space) in x's dtype; with a depth and without `deep`, the pair of that and what the deep
            blocks gave.

        Raises:
            MismatchError: y is missing, not wanted, or not one label for each map; a control of another number of maps,
                or features of blocks that are not there.
            UsageError: a label that the model does not have; a depth that is not from 0 (with `deep`, from 1) to the
                number of input blocks.
        """
        blocks = len(self.input_blocks)
        if not (deep is not None) <= depth <= blocks:
            raise UsageError(
                f"depth should be from {int(deep is not None)} to {blocks} for this UNet, got {depth}"
            )
        if features and not set(features) <= set(range(blocks)):
            raise MismatchError(
                f"features should be keyed by input blocks, 0 to {blocks - 1}, got {sorted(features)}"
            )
        control = self._control(control, only_mid_control)
        emb = self._embed(x, timesteps, y)
        skips: list[Tensor] = []
        if deep is None:
            h = self._torso_input(x)
            return self._run_from(0, h, emb, context, skips, control, depth, x.dtype, features)
        self.run_blocks(self._torso_input(x), emb, context, skips, control, stop=depth, features=features)
        shallow = 2 * blocks + 1 - depth
        return self._finish(self.run_blocks(deep, emb, context, skips, control, start=shallow), x.dtype)

    def _control(self, control: Sequence[Tensor] | None, only_mid: bool) -> list[Tensor | None]:
        """Give what is added for each input block and the middle one; None = nothing."""
        wanted = len(self.input_blocks) + 1
        if control is None:
            return [None] * wanted
        if len(control) != wanted:
            raise MismatchError(
                f"a control for this UNet should have {wanted} maps, one for each input block and one for the middle, "
                f"got {len(control)}"
            )
        return [None] * (wanted - 1) + [control[-1]] if only_mid else list(control)

    def run_blocks(
        self,
        h: Tensor,
        emb: Tensor,
        context: Any,
        skips: list[Tensor],
        control: list[Tensor | None],
        start: int = 0,
        stop: int | None = None,
        features: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Run some of the blocks. Input blocks are 0 to n - 1, the middle one is n, output blocks are n + 1 to 2 n.

        Args:
            h: (b, c, *space), what block `start` takes.
            emb: (b, 4 * model_channels).
            context: as for forward.
            skips: what the input blocks before `start` gave, less what the output blocks before it took; those that run
                add to its end and take from there.
            control: what is added for each input block, where its output block takes it, and for the middle one.
            start, stop: the first block, and the one that no longer runs; None = all from `start` on.
            features: as for forward.

        Returns:
            what the last block that ran gave, in the dtype of the blocks; h if none did.
        """
        middle = len(self.input_blocks)
        blocks = [*self.input_blocks, self.middle_block, *self.output_blocks]
        for i, block in enumerate(blocks[start:stop], start):
            if i <= middle:
                h = block(h, emb, context)
                if i < middle:
                    h = _with(h, features.get(i) if features else None)
                    skips.append(h)
                else:
                    h = _with(h, control[middle])
                continue
            skip = _with(skips.pop(), control[2 * middle - i])
            if self.joining is not None:
                h, skip = self.joining(i - middle - 1, h, skip)
            h = torch.cat([h, skip], dim=1)
            reach = skips[-1].shape[2:] if skips else h.shape[2:]
            # Sides that do not halve evenly: the map has to reach its skip's size, not twice its own. A single cell was
            # halved to one.
            sides = h.shape[2:]
            is_even = reach == _doubled(sides) or (reach == sides and max(sides[-2:]) > 1)
            h = block(h, emb, context) if is_even else block(h, emb, context, reach)
        return h

    def _embed(self, x: Tensor, timesteps: Tensor | None, y: Tensor | None) -> Tensor:
        """Embed levels and labels: (b, 4 * model_channels)."""
        if exists(y) != exists(self.num_classes):
            raise MismatchError(
                f"labels y are needed if and only if the model has classes; num_classes={self.num_classes}, "
                f"y {'was' if exists(y) else 'was not'} given"
            )
        emb = timestep_embedding(timesteps, self.model_channels)
        emb = self.time_embed(emb.to(self.time_embed[0].weight.dtype))
        if exists(y):
            check_labels(y, x.shape[0], self.num_classes)
            emb = emb + self.label_emb(y)
        return emb

    def _run_from(
        self,
        start: int,
        h: Tensor,
        emb: Tensor,
        context: Any,
        skips: list[Tensor],
        control: list[Tensor | None],
        depth: int,
        dtype: torch.dtype,
        features: Mapping[int, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run all blocks from `start` on, none of which is among the last `depth`, and give what forward gives."""
        shallow = 2 * len(self.input_blocks) + 1 - depth
        deep = self.run_blocks(h, emb, context, skips, control, start, shallow, features)
        answer = self._finish(self.run_blocks(deep, emb, context, skips, control, shallow), dtype)
        return (answer, deep) if depth else answer

    def _finish(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """Give the answer from what the last block gave."""
        return self._answer(self.id_predictor if self.predict_codebook_ids else self.out, h, dtype)


def _with(h: Tensor, control: Tensor | None) -> Tensor:
    return h if control is None else h + control.to(h.dtype)


# Labels on a GPU that were right: how often they had been written to then, and the number of classes.
_looked_at = WeakTensorKeyDictionary()


def check_labels(y: Tensor, maps: int, num_classes: int | str) -> None:
    """Refuse what is not one label for each map, or no label of this many classes (or of "continuous" ones).

    Raises:
        MismatchError: y is not (maps,), or does not begin with that dimension where labels are continuous.
        UsageError: labels that are no whole numbers, or not from 0 to num_classes - 1.
    """
    discrete = isinstance(num_classes, int)
    if y.shape[0] != maps or (discrete and y.dim() != 1):
        raise MismatchError(f"y should hold one label for each of {maps} maps, got shape {tuple(y.shape)}")
    if not discrete:
        return
    if y.is_floating_point():
        raise UsageError(f"labels y should be whole numbers from 0 to {num_classes - 1}, got {y.dtype}")
    # On a GPU this waits for the labels; a wrong one would otherwise end the whole CUDA context, without its number.
    # So labels that stay, as they do from step to step, are looked at once.
    capturing = y.is_cuda and torch.cuda.is_current_stream_capturing()
    if not (y.is_meta or capturing or torch.compiler.is_compiling()):
        state = None if y.is_cpu or y.is_inference() else (y._version, num_classes)
        if state is not None and _looked_at.get(y) == state:
            return
        check_label_range(y, num_classes)
        if state is not None:
            _looked_at[y] = state


class SuperResModel(UNetModel):
    """A UNet that also sees a small picture, enlarged to the size of its own and joined to it on channels.

    The upsampler of Improved DDPM and ADM (arXiv:2102.09672, arXiv:2105.05233).

    Args:
        image_size: side of the large pictures.
        in_channels: of one picture; the network takes twice as many.
        The others are UNetModel's.
    """

    @takes_improved_diffusions_call
    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any):
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(
        self, x: Tensor, timesteps: Tensor | None = None, low_res: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Predict from large maps and the small pictures that they belong to.

        Args:
            x: (b, c, height, width).
            timesteps: (b,) levels.
            low_res: (b, c, any height, any width), enlarged bilinearly.
            kwargs: UNetModel's y.

        Raises:
            MismatchError: no low_res, or one with another batch or other channels than x.
        """
        wanted = (x.shape[0], self.in_channels - x.shape[1])
        if low_res is None or low_res.dim() != 4 or tuple(low_res.shape[:2]) != wanted:
            came = "none was given" if low_res is None else f"got shape {tuple(low_res.shape)}"
            raise MismatchError(
                f"low_res should be {wanted[0]} small pictures of {wanted[1]} channels, for x has shape "
                f"{tuple(x.shape)} and the model {self.in_channels} input channels; {came}"
            )
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, enlarged], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_UNetBase):
    """The UNet's path down and a pooled head: a classifier of maps at any noise level.

    Args:
        out_channels: classes.
        pool: "adaptive" (mean, then a 1x1 convolution), "attention" (AttentionPool2d), "spatial" or
            "spatial_v2" (the means of all blocks' maps through a small perceptron, the second with norms).
        The others are UNetModel's.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Iterable[int],
        dropout: float = 0,
        channel_mult: tuple[float, ...] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        super().__init__()
        self.in_channels, self.model_channels, self.out_channels = in_channels, model_channels, out_channels
        self.num_res_blocks, self.attention_resolutions = num_res_blocks, attention_resolutions
        self.dropout, self.channel_mult, self.conv_resample = dropout, channel_mult, conv_resample
        self.use_checkpoint = use_checkpoint
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.pool = pool

        embed_dim = model_channels * 4
        self.time_embed = _level_embedder(model_channels, embed_dim)

        res_block = partial(
            ResBlock,
            emb_channels=embed_dim,
            dropout=dropout,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
        )

        def attention(channels: int) -> AttentionBlock:
            return AttentionBlock(
                channels,
                use_checkpoint=use_checkpoint,
                num_heads=num_heads,
                num_head_channels=num_head_channels,
                use_new_attention_order=use_new_attention_order,
            )

        def attention_down(channels: int, level: int, block: int, ds: int) -> nn.Module | None:
            return attention(channels) if ds in attention_resolutions else None

        blocks = [num_res_blocks] * len(channel_mult)
        level_widths = [int(mult * model_channels) for mult in channel_mult]
        paths = _Paths(dims, level_widths, blocks, res_block, conv_resample, resblock_updown)
        self.input_blocks, widths, ds = paths.down(in_channels, attention_down)
        self.smallest_side = paths.smallest_side(ds)
        ch = widths[-1]
        self.middle_block = TimestepEmbedSequential(res_block(ch), attention(ch), res_block(ch))
        self._feature_size = sum(widths) + ch

        self.out = self._make_head(ch, image_size // ds, dims)

    def _make_head(self, ch: int, side: int, dims: int) -> nn.Sequential:
        """Make the last layers, from the lowest maps of ch channels, or from the means of all blocks' maps."""
        if self.pool == "adaptive":
            return nn.Sequential(
                normalization(ch),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d((1, 1)),
                zero_module(conv_nd(dims, ch, self.out_channels, 1)),
                nn.Flatten(),
            )
        if self.pool == "attention":
            if self.num_head_channels == -1:
                raise MismatchError("pool='attention' needs num_head_channels, got -1")
            pooling = AttentionPool2d(side, ch, self.num_head_channels, self.out_channels)
            return nn.Sequential(normalization(ch), nn.SiLU(), pooling)
        if self.pool == "spatial":
            return nn.Sequential(
                nn.Linear(self._feature_size, 2048), nn.ReLU(), nn.Linear(2048, self.out_channels)
            )
        if self.pool == "spatial_v2":
            return nn.Sequential(
                nn.Linear(self._feature_size, 2048),
                normalization(2048),
                nn.SiLU(),
                nn.Linear(2048, self.out_channels),
            )
        raise UsageError(
            f"pool should be 'adaptive', 'attention', 'spatial' or 'spatial_v2', got {self.pool!r}"
        )

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Classify maps (b, in_channels, *space) at levels (b,): (b, out_channels) logits."""
        emb = timestep_embedding(timesteps, self.model_channels)
        emb = self.time_embed(emb.to(self.time_embed[0].weight.dtype))
        pooled = []
        h = self._torso_input(x)
        for module in self._path():
            h = module(h, emb)
            if self.pool.startswith("spatial"):
                pooled.append(h.type(x.dtype).mean(dim=tuple(range(2, h.dim()))))
        if self.pool.startswith("spatial"):
            h = torch.cat(pooled, dim=-1)
        return self._answer(self.out, h, x.dtype)

    def _path(self) -> Iterator[TimestepEmbedSequential]:
        yield from self.input_blocks
        yield self.middle_block
