"""3x3 convolutions in float32 by Winograd's minimal filtering: 4/9 of the products.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), F(2x2, 3x3): patches of 4x4 are
turned into 16 numbers a channel, each multiplied by a matrix of its own (oneDNN's product, laid out beforehand), and
turned back into 2x2 results. All turning is sums and differences, so the rounding is that of a direct convolution up
to a small factor. In half precision it would not be, and the products are too cheap there to be worth it.
"""

import torch
from torch import Tensor, nn

from ldm.kernels import native

# G of the paper: what a filter's rows and columns are turned by.
FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
# Bytes of turned patches at a time: they stay in a cache, and one matrix product has enough rows.
PORTION = 32 << 20
MIN_TILES = 64  # fewer, and reading 16/9 of the weights costs more than the products saved
mkldnn = torch.ops.mkldnn


def supports(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `convolve` takes this layer and map (b, c, h, w), and gains by it."""
    tiles = x.shape[0] * -(-x.shape[2] // 2) * -(-x.shape[3] // 2)
    return (
        x.dtype == torch.float32
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.in_channels % native.LANES == 0
        and conv.out_channels % native.LANES == 0
        and tiles >= MIN_TILES
        and native.library() is not None
    )


def pack(weight: Tensor, tiles: int) -> list[Tensor]:
    """Turn filters (out, in, 3, 3) into 16 matrices (out, in), laid out for products with so many rows."""
    turn = torch.tensor(FILTER, dtype=torch.float64)
    turned = torch.einsum("ip,ocpq,jq->ijoc", turn, weight.double(), turn).float().flatten(0, 1)
    return [mkldnn._reorder_linear_weight(matrix, tiles) for matrix in turned.contiguous()]


def portion(x: Tensor, out_channels: int) -> int:
    """How many rows of tiles are turned at a time."""
    row = 16 * -(-x.shape[3] // 2) * max(x.shape[1], out_channels) * x.element_size()
    return max(1, PORTION // row)


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
    rows, at_once = b * -(-h // 2), portion(x, out_channels)
    for first in range(0, rows, at_once):
        here = min(at_once, rows - first)
        turned = torch.empty((16, here * across, c))
        native.winograd_input(x, first, here, turned)
        products = [
            mkldnn._linear_pointwise.default(part, matrix, None, "none", [], "")
            for part, matrix in zip(turned, packed, strict=True)
        ]
        native.winograd_output(products, bias, add, out, first, here)
    return out
