"""VAE tiling and slicing: the encoder and decoder computed tile by tile, or image by image, in less memory.

A tile is some rows of a map over its whole width. Tiling is exact, nothing is blended, so there are no seams: a group
norm takes its statistics from the whole map, in a pass of its own; a 3x3 convolution reads one row more above and below
its tile (the halo), and zeros only at the map's own borders; attention takes its queries in chunks, each against all
keys. Results overwrite the maps that they replace: a residual block needs one map beside its input, and none where it
has at most half as many channels.

With Stable Diffusion's autoencoder that is, beside the weights and a few tiles, 2.5 maps of the first level (`ch`
channels at the image's size) for decoding, where the plain modules hold 6, and 2 for encoding, where they hold 4. At
1024 x 1024 pixels in half precision such a map has 256 MiB. More than 2 are needed at the last upsampling only, whose
output alone is 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.kernels.fused_module import ForwardWrapper, FusedModule
from ldm.modules.diffusionmodules import model as plain
from ldm.modules.diffusionmodules.model import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    LinAttnBlock,
    ResnetBlock,
    Upsample,
)
from ldm.modules.seams import on, own_forward, register, set_execution

TILE_BYTES = 16 << 20  # about four tiles live at once: a tenth of what the maps of a 1024 x 1024 image take

# Modules that are computed here. One that is subclassed, hooked or patched computes something else.
_SUPPORTED = (
    Encoder,
    Decoder,
    plain._Level,
    plain._Middle,
    ResnetBlock,
    AttnBlock,
    LinAttnBlock,
    Downsample,
    Upsample,
    nn.Conv2d,
    nn.Dropout,
    nn.GroupNorm,
    nn.Identity,
    nn.ModuleList,
)
register(*_SUPPORTED)
_NONLINEARITY = plain.nonlinearity


def decode_tiled(
    decoder: Decoder, z: Tensor, *, rows: int | None = None, tile_bytes: int = TILE_BYTES
) -> Tensor:
    """Compute decoder(z), image by image and tile by tile; without gradients.

    Args:
        z: (b, z_channels, h, w), behind post_quant_conv.
        rows: rows of a tile, at every resolution; None lets tile_bytes decide.
        tile_bytes: of a tile where rows is None. About four of them live at once.

    Returns:
        (b, out_ch, f h, f w), or the last features with give_pre_end, equal to decoder(z) up to rounding.

    Raises:
        UsageError: z that requires gradients or is no batch of maps; a decoder with subclassed, patched or hooked
            parts, other padding or active dropout.
    """
    tiles = _checked(decoder, Decoder, z, rows, tile_bytes)
    decoder.last_z_shape = z.shape
    return torch.cat([_decode(decoder, one, tiles) for one in z.split(1)])


def encode_tiled(
    encoder: Encoder, x: Tensor, *, rows: int | None = None, tile_bytes: int = TILE_BYTES
) -> Tensor:
    """Compute encoder(x), image by image and tile by tile; without gradients.

    Args:
        x: (b, in_channels, height, width).
        rows, tile_bytes: as for decode_tiled.

    Returns:
        (b, 2 z_channels, height / f, width / f), z_channels without double_z; quant_conv comes behind it.

    Raises:
        UsageError: as decode_tiled, and images too small to be halved at every level.
    """
    tiles = _checked(encoder, Encoder, x, rows, tile_bytes)
    encoder.check_sides(x)
    return torch.cat([_encode(encoder, one, tiles) for one in x.split(1)])


class TiledForward(FusedModule):
    """An encoder's or decoder's forward by tiling, on any device; what tiling does not support falls back."""

    def try_forward(self, x: Tensor) -> Tensor | None:
        """Decode (b, z, h, w) or encode (b, 3, h, w) by tiles; None where they do not fit the module."""
        if torch.is_autocast_enabled(x.device.type):
            return None
        tiled = decode_tiled if isinstance(self.module, Decoder) else encode_tiled
        try:
            return tiled(self.module, x)
        except UsageError:
            return None


def halves(root: nn.Module) -> list[nn.Module]:
    """List the encoders and decoders of a tree."""
    return [part for part in root.modules() if type(part) in (Encoder, Decoder)]


class SlicedForward(ForwardWrapper):
    """An encoder's or decoder's forward for one image of a batch after the other."""

    def try_forward(self, x: Tensor) -> Tensor:
        """Take and give what the module does, one row of the batch at a time."""
        return torch.cat([self.fallback(one) for one in x.split(1)]) if len(x) else self.fallback(x)


def attach_slicing(root: nn.Module) -> None:
    """Let every encoder and decoder of a tree, however it computes, take one image at a time."""
    for half in halves(root):
        set_execution(half, SlicedForward(half, own_forward(half)))


def attach(root: nn.Module) -> None:
    """Let every encoder and decoder of a tree compute by tiling."""
    for half in halves(root):
        set_execution(half, TiledForward(half))


# --- what is supported ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiles:
    """The height of tiles."""

    rows: int | None
    tile_bytes: int

    def spans(self, height: int, row_bytes: int, most: int | None = None) -> list[tuple[int, int]]:
        """Divide rows 0 to height into tiles [a, b), none of more than `most` rows."""
        rows = max(1, self.tile_bytes // row_bytes) if self.rows is None else self.rows
        rows = min(rows, height if most is None else most)
        return [(a, min(a + rows, height)) for a in range(0, height, rows)]


def _checked(network: nn.Module, kind: type, x: Tensor, rows: int | None, tile_bytes: int) -> _Tiles:
    """Refuse what tiling would compute otherwise than the plain modules; return the height of tiles."""
    if type(network) is not kind:
        raise UsageError(f"VAE tiling is for a plain {kind.__name__}, got {type(network).__name__}")
    for name, value in (("rows", rows), ("tile_bytes", tile_bytes)):
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{name} should be a whole number from 1 on, got {value!r}")
    if x.dim() != 4 or 0 in x.shape:
        raise UsageError(f"VAE tiling takes maps (b, c, h, w), got a shape of {tuple(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise UsageError(
            f"VAE tiling gives no gradients; detach its input, or call the {kind.__name__} itself"
        )
    for name, part in network.named_modules():
        changed = _modification(part)
        if changed is not None:
            raise UsageError(
                f"VAE tiling is for a {kind.__name__} of plain parts, got {changed} at {name or 'its top'!r}; "
                f"call the {kind.__name__} itself"
            )
    return _Tiles(rows, tile_bytes)


def _modification(part: nn.Module) -> str | None:
    """Name what makes a module compute otherwise than the code below assumes, if anything does."""
    if type(part) not in _SUPPORTED or on(part).kind == "foreign":
        return f"a changed {type(part).__name__}"
    if isinstance(part, ResnetBlock) and plain.nonlinearity is not _NONLINEARITY:
        return "a changed nonlinearity"
    if isinstance(part, nn.Conv2d) and part.padding_mode != "zeros":
        return f"padding_mode={part.padding_mode!r}"
    if isinstance(part, nn.Dropout) and part.training and part.p > 0:
        return f"active dropout (p={part.p}; eval() ends it)"
    return None


# --- all layers, for one image -------------------------------------------------------------------


@torch.no_grad()
def _decode(decoder: Decoder, z: Tensor, tiles: _Tiles) -> Tensor:
    layers = [decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2]
    for level in reversed(decoder.up):
        layers += _layers(level)
        if hasattr(level, "upsample"):
            layers.append(level.upsample)
    h = _through(layers, _convolve(decoder.conv_in, z, tiles), tiles)
    if decoder.give_pre_end:
        return h
    h = _convolve(decoder.conv_out, h, tiles, decoder.norm_out)
    return h.tanh_() if decoder.tanh_out else h


@torch.no_grad()
def _encode(encoder: Encoder, x: Tensor, tiles: _Tiles) -> Tensor:
    layers = []
    for level in encoder.down:
        layers += _layers(level)
        if hasattr(level, "downsample"):
            layers.append(level.downsample)
    layers += [encoder.mid.block_1, encoder.mid.attn_1, encoder.mid.block_2]
    h = _through(layers, _convolve(encoder.conv_in, x, tiles), tiles)
    return _convolve(encoder.conv_out, h, tiles, encoder.norm_out)


def _layers(level: nn.Module) -> list[nn.Module]:
    """List the blocks of a level, each followed by its attention if there is any."""
    attns = level.attn or [nn.Identity()] * len(level.block)
    return [layer for pair in zip(level.block, attns, strict=True) for layer in pair]


def _through(layers: list[nn.Module], h: Tensor, tiles: _Tiles) -> Tensor:
    """Run one layer after the other. No caller may keep h, so that each map is freed when the next one is complete."""
    spare = None
    for layer in layers:
        if isinstance(layer, ResnetBlock):
            h, spare = _resnet(layer, h, spare, tiles)
            continue
        if isinstance(layer, nn.Identity):
            continue
        spare = None
        if isinstance(layer, AttnBlock):
            _attend_(layer, h, tiles)
        elif isinstance(layer, LinAttnBlock):
            _attend_linearly_(layer, h, tiles)
        elif isinstance(layer, Downsample):
            h = _downsample(layer, h, tiles)
        else:
            if h.untyped_storage().nbytes() > h.nbytes:
                h = (
                    h.clone()
                )  # a view of a larger map, which should be freed before the upsampled one is allocated
            h = _upsample(layer, h, tiles)
    return h


# --- the layers ----------------------------------------------------------------------------------


def _convolve(conv: nn.Conv2d, x: Tensor, tiles: _Tiles, norm: nn.GroupNorm | None = None) -> Tensor:
    """Compute conv(x) of x (1, c, h, w), or conv(SiLU(norm(x))) if a norm is given, in a new map."""
    out = None
    for a, b, tile in _convolved(conv, x, tiles, norm):
        if out is None:  # a tile tells the dtype and memory format of the result
            out = _map_like(tile, tile.shape[1], *x.shape[2:])
        out[:, :, a:b] = tile
    return out


def _resnet(
    block: ResnetBlock, x: Tensor, spare: Tensor | None, tiles: _Tiles
) -> tuple[Tensor, Tensor | None]:
    """Run a block on x; return its output, and a map of that size that is free for the next block, if there is one.

    The map between the convolutions, h, is written to `spare`, and the output to x. Where the block has at most half as
    many output channels, both are written to x; at any other change both to one new map, one after the other.
    """
    to = block.out_channels
    is_same = block.in_channels == to
    is_split = 2 * to <= block.in_channels and not block.use_conv_shortcut
    if is_same:
        h, out = torch.empty_like(x) if spare is None else spare, x
    elif is_split:
        h, out = x[:, :to], x[:, to : 2 * to]
    else:
        h = out = _map_like(x, to, *x.shape[2:])

    for a, b, tile in _convolved(block.conv1, x, tiles, block.norm1, is_overwritten=is_split):
        if is_split:
            out[:, :, a:b] = _shortcut(block, x, a, b)
        h[:, :, a:b] = tile
    for a, b, tile in _convolved(block.conv2, h, tiles, block.norm2, is_overwritten=out is h):
        if is_same or is_split:
            out[:, :, a:b].add_(tile)
        else:
            out[:, :, a:b] = tile.add_(_shortcut(block, x, a, b))
    return out, None if out is h else h


def _shortcut(block: ResnetBlock, x: Tensor, a: int, b: int) -> Tensor:
    """Return rows a to b of the shortcut of a block that changes the number of channels."""
    if not block.use_conv_shortcut:
        return block.nin_shortcut(x[:, :, a:b])
    window = _framed(x[:, :, max(a - 1, 0) : b + 1], int(a == 0), int(b == x.shape[2]))
    return _convolve_window(block.conv_shortcut, window)


def _upsample(layer: Upsample, x: Tensor, tiles: _Tiles) -> Tensor:
    c, h, w = x.shape[1:]
    out = _map_like(x, c, 2 * h, 2 * w)
    for a, b in tiles.spans(2 * h, _row_bytes(out)):
        # The tile needs rows a - 1 to b; the upsampled window may begin one row earlier and end one later.
        first, last = max(a - 1, 0) // 2, min(b // 2 + 1, h)
        window = F.interpolate(x[:, :, first:last], scale_factor=2.0, mode="nearest")
        window = _framed(window, 2 * first - (a - 1), b + 1 - 2 * last)
        out[:, :, a:b] = _convolve_window(layer.conv, window) if layer.with_conv else window[:, :, 1:-1]
    return out


def _downsample(layer: Downsample, x: Tensor, tiles: _Tiles) -> Tensor:
    out = _map_like(x, x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    for a, b in tiles.spans(out.shape[2], 4 * _row_bytes(out)):
        # The layer pads a row of zeros below every tile, but reads it only below the last.
        out[:, :, a:b] = layer(x[:, :, 2 * a : 2 * b + 1])
    return out


def _attend_(layer: AttnBlock, x: Tensor, tiles: _Tiles) -> None:
    """Add attention to x in place: keys and values of all cells first, then the queries in chunks."""
    c, h, w = x.shape[1:]
    affine = _affine(layer.norm, x, tiles)
    k, v = (x.new_empty(1, 1, h * w, c) for _ in range(2))  # (1, 1, n, c)
    for a, b in tiles.spans(h, _row_bytes(x)):
        normed = _normalised(x[:, :, a:b], affine)
        k[:, 0, a * w : b * w] = layer.k(normed).flatten(2).transpose(1, 2)
        v[:, 0, a * w : b * w] = layer.v(normed).flatten(2).transpose(1, 2)
    # Without a fused attention kernel every chunk makes a matrix of scores; 4 c queries bound it by a few maps.
    for a, b in tiles.spans(h, _row_bytes(x), most=max(1, 4 * c // w)):
        q = layer.q(_normalised(x[:, :, a:b], affine)).reshape(1, 1, c, (b - a) * w)
        mixed = F.scaled_dot_product_attention(q.transpose(2, 3).contiguous(), k, v)  # (1, 1, (b - a) w, c)
        x[:, :, a:b].add_(layer.proj_out(mixed.transpose(2, 3).reshape(1, c, b - a, w)))


def _attend_linearly_(layer: LinAttnBlock, x: Tensor, tiles: _Tiles) -> None:
    """Replace x by its linear attention. The softmax over all cells is summed tile by tile."""
    h, w = x.shape[2:]
    spans = tiles.spans(h, 3 * _row_bytes(x))
    total = mixed = highest = None
    for a, b in spans:
        _, k, v = layer.to_qkv(x[:, :, a:b]).reshape(3, layer.heads, -1, (b - a) * w)  # each (heads, c, n)
        k, v = (y.to(_statistics_dtype(x)) for y in (k, v))
        top = k.amax(dim=-1, keepdim=True)
        if highest is not None:
            # Sums are relative to the highest key so far, so that exp cannot overflow.
            top = torch.maximum(top, highest)
            total, mixed = ((highest - top).exp() * y for y in (total, mixed))
        weights = (k - top).exp()
        news = weights.sum(dim=-1, keepdim=True), weights @ v.transpose(1, 2)  # (heads, c, 1), (heads, c, c)
        total, mixed = news if highest is None else (total + news[0], mixed + news[1])
        highest = top
    mixed = (mixed / total).to(x.dtype)
    for a, b in spans:
        q = layer.to_qkv(x[:, :, a:b]).reshape(3, layer.heads, -1, (b - a) * w)[0]
        x[:, :, a:b] = layer.to_out((mixed.transpose(1, 2) @ q).reshape(1, -1, b - a, w))


# --- tiles ----------------------------------------------------------------------------------------


def _convolved(
    conv: nn.Conv2d, x: Tensor, tiles: _Tiles, norm: nn.GroupNorm | None = None, is_overwritten: bool = False
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (a, b, rows a to b of a 3x3 convolution of x), of act(norm(x)) if a norm is given, from top to bottom.

    Args:
        is_overwritten: the caller writes over these rows of x before it takes the next tile.
    """
    height = x.shape[2]
    affine = None if norm is None else _affine(norm, x, tiles)
    above = x[:, :, :0]
    for a, b in tiles.spans(height, _row_bytes(x, conv.out_channels)):
        window = x[:, :, max(a - 1, 0) : b + 1]
        if is_overwritten:
            window = torch.cat([above, x[:, :, a : b + 1]], dim=2)
            above = x[:, :, b - 1 : b].clone()
        if affine is not None:
            window = F.silu(_normalised(window, affine), inplace=True)
        window = _framed(window, int(a == 0), int(b == height))
        yield a, b, _convolve_window(conv, window)


def _framed(window: Tensor, above: int, below: int) -> Tensor:
    """Add rows of zeros above and below, or cut as many rows off where a number is negative."""
    return F.pad(window, (0, 0, above, below)) if above or below else window


def _convolve_window(conv: nn.Conv2d, window: Tensor) -> Tensor:
    """Convolve 3x3 with zeros on the left and right only; the result has two rows less."""
    return F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))


def _affine(norm: nn.GroupNorm, x: Tensor, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """Turn a group norm of all of x (1, c, h, w) into a scale and a shift, (c, 1, 1) each.

    Statistics are in float32 at least, and combined by Chan, Golub and LeVeque's update, which is free of cancellation.
    """
    dtype = _statistics_dtype(x)
    groups = x.unflatten(1, (norm.num_groups, -1))  # (1, g, c / g, h, w)
    mean = var = 0.0
    for a, b in tiles.spans(x.shape[2], _row_bytes(x)):
        tile_var, tile_mean = torch.var_mean(
            groups[..., a:b, :].to(dtype), dim=(0, 2, 3, 4), correction=0, keepdim=True
        )
        share, delta = (b - a) / b, tile_mean - mean
        mean = mean + share * delta
        var = (1 - share) * var + share * tile_var + share * (1 - share) * delta.square()
    scale = norm.weight.to(dtype).view(1, norm.num_groups, -1, 1, 1) * (var + norm.eps).rsqrt()
    shift = norm.bias.to(dtype).view_as(scale) - mean * scale
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)


def _normalised(x: Tensor, affine: tuple[Tensor, Tensor]) -> Tensor:
    scale, shift = affine
    return torch.addcmul(shift, x, scale).to(x.dtype)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _row_bytes(x: Tensor, channels: int = 0) -> int:
    """Count the bytes of a row of x, or of one of so many channels if that is more."""
    return max(x.shape[1], channels) * x.shape[3] * x.element_size()


def _map_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Allocate one map with the dtype, device and memory format of x."""
    layout = torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format
    return torch.empty((1, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout)
