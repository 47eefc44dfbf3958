"""CPU backend: oneDNN's linear layers and convolutions with packed weights, and the C++ kernels in cpp/."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.kernels import native, upsample_conv, winograd
from ldm.kernels.native import attention as attention
from ldm.kernels.native import geglu as geglu
from ldm.kernels.native import group_norm as group_norm
from ldm.kernels.native import supports_attention as supports_attention
from ldm.kernels.native import supports_geglu as supports_geglu
from ldm.kernels.native import supports_norm as supports_norm

DTYPES = (torch.float32, torch.bfloat16)
CACHES_CONTEXT = True  # a comparison costs next to nothing here
# So that the wide activations of a feed-forward stay in the processor's cache.
FEED_FORWARD_ROWS = 1024
# Overloads are named below: to choose one itself, torch tries each, printing the tensors into errors that it discards.
mkldnn = torch.ops.mkldnn


# Multiplications of a product up to which our kernel is the faster one: what oneDNN spends on finding its own, measured
# within a step and not in a loop over one layer, is more than a small product takes.
MAX_SMALL = {torch.float32: 1 << 23, torch.bfloat16: 1 << 25}


def is_small(weight: Tensor, rows: int) -> bool:
    """Whether a product of so many rows with a weight (out, in, ...) is one for our kernel in cpp/product.cpp."""
    return (
        rows * weight.numel() <= MAX_SMALL[weight.dtype]
        and weight.shape[0] % native.LANES == 0
        and native.has_product(weight.dtype)
    )


def _is_one_dtype(x: Tensor, *others: Tensor | None) -> bool:
    return all(other is None or other.dtype == x.dtype for other in others)


class PackedLinear:
    """A linear layer's weight (out, in), packed when a small or a large product first needs it."""

    def __init__(self, weight: Tensor, rows: int):
        self.weight = weight
        self.rows = rows  # of large products, to choose a layout by; others work, too

    @functools.cached_property
    def small(self) -> native.PackedProduct:
        return native.pack_product(self.weight)

    @functools.cached_property
    def large(self) -> Tensor:
        return mkldnn._reorder_linear_weight(self.weight, self.rows)


def pack_linear(weight: Tensor, rows: int) -> Any:
    """Pack a linear layer's weight (out, in) for products with so many rows."""
    return PackedLinear(weight, rows)


def multiply(x: Tensor, packed: Any, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias + add with a weight of `pack_linear`; x is (..., in)."""
    x = x.contiguous()
    width = packed.weight.shape[1]
    small = width % 32 == 0 and is_small(packed.weight, x.numel() // width)
    if small and _is_one_dtype(x, bias, add):
        return native.linear(x, packed.small, bias, None if add is None else add.contiguous())
    packed = packed.large
    if add is not None:
        return mkldnn._linear_pointwise.binary(x, add, packed, bias, "add")
    return mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def multiply_act(x: Tensor, packed: PackedLinear, bias: Tensor, act: str) -> Tensor:
    """Compute act(x W^T + bias), act being a name of native.ACTIVATIONS; x is (..., in), in a multiple of 32."""
    if native.has_product(x.dtype) and packed.weight.shape[0] % native.LANES == 0:
        return native.linear(x.contiguous(), packed.small, bias, None, act)
    out = multiply(x, packed, bias)
    return out * torch.sigmoid(1.702 * out) if act == "quick_gelu" else torch.nn.functional.gelu(out)


def pack_conv(
    weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, size: Sequence[int]
) -> Tensor:
    """Pack a convolution's weight (out, in / groups, kh, kw) for maps of a size (b, in, h, w)."""
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


def convolve(conv: nn.Conv2d, x: Tensor, caches: Mapping[str, Any], add: Tensor | None) -> Tensor:
    """Convolve a map (b, c, h, w) as a layer does, by Winograd's algorithm where it pays; see Backend.convolve."""
    (b, _, h, w), stride = x.shape, conv.stride[0]
    small = is_small(conv.weight, b * h * w // stride**2) and _is_square(conv)
    if small and _is_one_dtype(x, conv.bias, add):
        packed = caches["small"].get(
            lambda: native.pack_product(conv.weight.detach(), stride, conv.padding[0]), conv.weight
        )
        add = None if add is None else add.contiguous(memory_format=torch.channels_last)
        return native.convolution(x, packed, conv.bias, add)
    if winograd.supports(conv, x):
        tiles = x.shape[0] * x.shape[2] * x.shape[3] // 4
        packed = caches["winograd"].get(lambda: winograd.pack(conv.weight.detach(), tiles), conv.weight)
        return winograd.convolve(x, packed, conv.bias, conv.out_channels, add)
    options = (conv.padding, conv.stride, conv.dilation, conv.groups)
    packed = caches["direct"].get(lambda: pack_conv(conv.weight.detach(), *options, x.shape), conv.weight)
    return run_conv(x, packed, conv.bias, *options, add=add)


def _is_square(conv: nn.Conv2d) -> bool:
    """Whether a convolution treats rows as it does columns, without groups and dilation."""
    sides = (conv.kernel_size, conv.stride, conv.padding)
    return all(a == b for a, b in sides) and conv.groups == 1 and conv.dilation == (1, 1)


def interleave_phases(y: Tensor) -> Tensor:
    """Interleave the four phases (b, 4 c, h + 1, w + 1) of an upsampled map into one (b, c, 2 h, 2 w)."""
    return upsample_conv.interleave_phases(y) if native.library() is None else native.interleave_phases(y)
