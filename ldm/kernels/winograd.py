"""Winograd convolution, F(2x2, 3x3), in float32: 4/9 of the products.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308): 4x4 input tiles are transformed
into 16 numbers a channel, each multiplied by a matrix of its own (oneDNN's product with a packed weight), and
transformed back into 2x2 outputs. The transforms are sums and differences, so the rounding error is that of a direct
convolution up to a small factor. In half precision it would not be, and products are too cheap there for a gain.
"""

import torch
from torch import Tensor, nn

from ldm.kernels import native

# G of the paper, the filter transform.
FILTER_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
# Bytes of transformed tiles at a time: few enough for the cache, and rows enough for one matrix product.
CHUNK_BYTES = 32 << 20
MIN_TILES = 64  # below, reading 16/9 of the weights costs more than the saved products
# Multiplications of a direct convolution, below which those saved do not pay for the calls of sixteen products.
MIN_MULTIPLICATIONS = 1 << 27
mkldnn = torch.ops.mkldnn


def supports(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `convolve` takes this layer and map (b, c, h, w), and is faster."""
    tiles = x.shape[0] * -(-x.shape[2] // 2) * -(-x.shape[3] // 2)
    return (
        x.dtype == torch.float32
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.in_channels % native.LANES == 0
        and conv.out_channels % native.LANES == 0
        and tiles >= MIN_TILES
        and 4 * tiles * conv.weight.numel() >= MIN_MULTIPLICATIONS
        and native.library() is not None
    )


def pack(weight: Tensor, tiles: int) -> list[Tensor]:
    """Transform filters (out, in, 3, 3) into 16 matrices (out, in), packed for products with so many rows."""
    g = torch.tensor(FILTER_TRANSFORM, dtype=torch.float64)
    transformed = torch.einsum("ip,ocpq,jq->ijoc", g, weight.double(), g).float().flatten(0, 1)
    return [mkldnn._reorder_linear_weight(matrix, tiles) for matrix in transformed.contiguous()]


def tile_rows_at_once(x: Tensor, out_channels: int) -> int:
    """How many rows of tiles are transformed at a time."""
    row = 16 * -(-x.shape[3] // 2) * max(x.shape[1], out_channels) * x.element_size()
    return max(1, CHUNK_BYTES // row)


def convolve(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, out_channels: int, add: Tensor | None
) -> Tensor:
    """Convolve with zeros around the map.

    Args:
        x: (b, c, h, w) float32, channels last.
        packed: of `pack`.
        bias: (out,) or None.
        add: (b, out, h, w), channels last, to be added; or None.

    Returns:
        (b, out, h, w), channels last.
    """
    (b, c, h, w), across = x.shape, -(-x.shape[3] // 2)
    out = torch.empty((b, out_channels, h, w), memory_format=torch.channels_last)
    add = None if add is None else add.contiguous(memory_format=torch.channels_last)
    rows, at_once = b * -(-h // 2), tile_rows_at_once(x, out_channels)
    for first in range(0, rows, at_once):
        here = min(at_once, rows - first)
        transformed = torch.empty((16, here * across, c))
        native.winograd_input(x, first, here, transformed)
        products = [
            mkldnn._linear_pointwise.default(part, matrix, None, "none", [], "")
            for part, matrix in zip(transformed, packed, strict=True)
        ]
        native.winograd_output(products, bias, add, out, first, here)
    return out
