"""Backend: the operations that fused modules are made of, one implementation for each kind of device.

cpu.py and cuda.py are backends; each is a module that offers what the protocol lists. Maps are (b, c, h, w) in
channels_last memory format, tokens are (b, n, c).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Backend(Protocol):
    """What a backend offers.

    Attributes:
        DTYPES: that its operations take.
        CACHES_CONTEXT: whether tensors are compared by value, to reuse the keys and values of a context that did not
            change since the last call. A comparison makes the CPU wait for a GPU.
        FEED_FORWARD_ROWS: tokens that go through a feed-forward at a time.
    """

    DTYPES: tuple[torch.dtype, ...]
    CACHES_CONTEXT: bool
    FEED_FORWARD_ROWS: int

    def pack_linear(self, weight: Tensor, rows: int) -> Any:
        """Pack a linear layer's weight (out, in) for products with so many rows, in a form of the backend's own."""
        ...

    def multiply(self, x: Tensor, packed: Any, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
        """Compute x W^T + bias + add with a weight of `pack_linear`; x is (..., in)."""
        ...

    def pack_conv(
        self, weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, size: Sequence[int]
    ) -> Tensor:
        """Pack a convolution's weight (out, in / groups, kh, kw) for maps of a size (b, in, h, w)."""
        ...

    def run_conv(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        padding: Any,
        stride: Any,
        dilation: Any,
        groups: int,
        add: Tensor | None = None,
    ) -> Tensor:
        """Convolve a map with a weight of `pack_conv`; `add` is a map of the result's shape to add."""
        ...

    def convolve(self, conv: nn.Conv2d, x: Tensor, caches: Mapping[str, Any], add: Tensor | None) -> Tensor:
        """Convolve a map as a layer does, by the fastest algorithm for its size.

        Args:
            caches: by name of the algorithm, the WeightCache of its packed weight: caches[name].get(pack, weight).
            add: a map of the result's shape to add, or None.
        """
        ...

    def interleave_phases(self, y: Tensor) -> Tensor:
        """Interleave the four phases (b, 4 c, h + 1, w + 1) of upsampled maps; see upsample_conv.interleave_phases."""
        ...

    def supports_norm(self, x: Tensor, groups: int) -> bool:
        """Whether `group_norm` takes this (b, c, h, w) map."""
        ...

    def group_norm(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        *,
        shift: Tensor | None = None,
        silu: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Normalise x + shift over groups of channels and scale it, then apply SiLU if `silu`; statistics in float32.

        Args:
            x: (b, c, h, w).
            weight, bias: (c,) or (b, c) float32, contiguous.
            shift: (b, c) float32, contiguous, or None.
            out: of x's kind, may be x; None makes one.
        """
        ...

    def supports_attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> bool:
        """Whether `attention` takes these (b, tokens, heads * features) tensors."""
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
        """Compute softmax(scale q k^T) v for each head.

        Args:
            q: (b, n, heads * features).
            k, v: (b, m, heads * features). Heads lie side by side, as a linear layer gives them.

        Returns:
            (b, n, heads * features).
        """
        ...

    def supports_geglu(self, tokens: Tensor, doubled: int) -> bool:
        """Whether `geglu` takes (rows, doubled) of the tokens' dtype."""
        ...

    def geglu(self, x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
        """Write first half * gelu(second half) of x + bias into out, and return it.

        Args:
            x: (rows, 2 width), contiguous.
            bias: (2 width,) float32.
            out: (rows, width) of x's dtype, contiguous.
        """
        ...
