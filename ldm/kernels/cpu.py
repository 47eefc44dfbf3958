"""What the stand-ins compute with on a CPU: oneDNN's products with weights laid out beforehand, and the kernels
in cpp/.

An engine is a module with these names; cuda.py is the other one. Maps are (b, c, h, w) with channels last.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.kernels import native, upsample_conv, winograd
from ldm.kernels.native import (
    attention,
    geglu,
    group_norm,
    supports_attention,
    supports_geglu,
    supports_norm,
)

__all__ = [
    "DTYPES",
    "FEED_FORWARD_ROWS",
    "CACHES_CONTEXT",
    "attention",
    "convolve",
    "geglu",
    "group_norm",
    "multiply",
    "pack_conv",
    "pack_linear",
    "run_conv",
    "supports_attention",
    "supports_geglu",
    "supports_norm",
    "interleave_phases",
]

DTYPES = (torch.float32, torch.bfloat16)
CACHES_CONTEXT = True  # to compare values costs next to nothing here
# Tokens that go through a feed-forward at a time, so that what lies between stays in the cache.
FEED_FORWARD_ROWS = 1024
# Overloads are named below: to find one by trial, torch prints the tensors into an error that nobody sees.
mkldnn = torch.ops.mkldnn


def pack_linear(weight: Tensor, rows: int) -> Tensor:
    """Lay a linear layer's weight (out, in) out for products with so many rows."""
    return mkldnn._reorder_linear_weight(weight, rows)


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias + add with a weight of `pack_linear`; x is (..., in)."""
    x = x.contiguous()
    if add is not None:
        return mkldnn._linear_pointwise.binary(x, add, packed, bias, "add")
    return mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def pack_conv(
    weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, size: Sequence[int]
) -> Tensor:
    """Lay a convolution's weight out for maps of a size."""
    return mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(size))


def run_conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    padding: Any,
    stride: Any,
    dilation: Any,
    groups: int,
    add: Tensor | None = None,
) -> Tensor:
    """Convolve a map with a weight of `pack_conv`, and add a map if there is one."""
    if add is None:
        return mkldnn._convolution_pointwise.default(
            x, packed, bias, padding, stride, dilation, groups, "none", [], ""
        )
    add = add.contiguous(memory_format=torch.channels_last)
    return mkldnn._convolution_pointwise.binary(
        x, add, packed, bias, padding, stride, dilation, groups, "add", 1.0, None, [], None
    )


def convolve(conv: nn.Conv2d, x: Tensor, kept: Mapping[str, Any], add: Tensor | None) -> Tensor:
    """Convolve a map as a layer does, and add a map if there is one.

    Args:
        kept: by way of convolving (maps of other sizes may go another), what keeps the laid-out weight until the
            layer's weight changes: kept[way].get(make, weight).
    """
    if winograd.supports(conv, x):
        tiles = x.shape[0] * x.shape[2] * x.shape[3] // 4
        packed = kept["winograd"].get(lambda: winograd.pack(conv.weight.detach(), tiles), conv.weight)
        return winograd.convolve(x, packed, conv.bias, conv.out_channels, add)
    how = (conv.padding, conv.stride, conv.dilation, conv.groups)
    packed = kept["direct"].get(lambda: pack_conv(conv.weight.detach(), *how, x.shape), conv.weight)
    return run_conv(x, packed, conv.bias, *how, add=add)


def interleave_phases(y: Tensor) -> Tensor:
    """Lay the four phases (b, 4 c, h + 1, w + 1) of doubled maps out as one (b, c, 2 h, 2 w)."""
    return upsample_conv.interleave_phases(y) if native.library() is None else native.interleave_phases(y)
