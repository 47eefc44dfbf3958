"""Seamless tiling: pictures whose opposite edges meet, because the convolutions see a map as a ring.

    sd.txt2img("moss, a texture", adapters=[SeamlessTiling()])

What lies beyond a map's right edge is its left one, and likewise above and below (circular padding), in the UNet and in
the VAE. With it, rolling the latents rolls the picture.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.deepcache import check_compiled, check_unet
from ldm.errors import UsageError
from ldm.modules.diffusionmodules.model import Decoder, Downsample, Encoder
from ldm.modules.seams import Rank, StepInfo, Undo, fill, undo_all
from ldm.values import check_value


@dataclass(eq=False)
class SeamlessTiling:
    """Circular padding of the convolutions of a UNet and a VAE.

    Args:
        x, y: whether the left edge meets the right one, and the top the bottom; neither = nothing is attached.

    Raises:
        UsageError: no truth value; when attached, a network without 2-dimensional maps, or a compiled one.
    """

    x: bool = True
    y: bool = True
    rank: ClassVar[Rank] = Rank.RESIDUALS
    is_for_vae: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.x, self.y = (bool(check_value(getattr(self, name), bool, name)) for name in ("x", "y"))

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        return {"x": self.x, "y": self.y}

    def check(self, network: nn.Module) -> None:
        """Raise UsageError if it cannot be attached to a UNet."""
        check_unet(network, "SeamlessTiling")
        if network.input_blocks[0][0].weight.dim() != 4:
            raise UsageError(
                "SeamlessTiling is for maps of 2 dimensions, and this UNet's have another number"
            )
        for part in network.modules():
            check_compiled(part, "SeamlessTiling")

    def at(self, step: StepInfo) -> None:
        """Do nothing: maps are rings at every step."""

    def attach(self, network: nn.Module) -> Undo:
        """Let the convolutions of a UNet, an Encoder or a Decoder see maps as rings."""
        if not isinstance(network, Encoder | Decoder):
            self.check(network)
        undo: list[Undo] = []
        if self.x or self.y:
            before = network.edges  # of another one, whose axes stay rings
            mine = self if before is None else SeamlessTiling(self.x or before.x, self.y or before.y)
            undo.append(fill(network, "edges", mine))
            ends = {
                id(part.conv) for part in network.modules() if isinstance(part, Downsample) and part.with_conv
            }
            for conv in network.modules():
                if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1):
                    padded = mine._close if id(conv) in ends else mine._pad
                    # Fused convolutions and VAE tiling step aside for what does not pad with zeros.
                    undo.append(fill(conv, "padding_mode", "circular"))
                    undo.append(fill(conv, "_conv_forward", _Ring(conv, padded)))
        return undo_all(undo)

    def state(self) -> Hashable:
        """Say what a captured graph depends on."""
        return ("SeamlessTiling", self.x, self.y)

    def _pad(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Pad a map by what a convolution wants."""
        above, beside = conv.padding
        if self.x:
            x = F.pad(x, (beside, beside, 0, 0), mode="circular")
        if self.y:
            x = F.pad(x, (0, 0, above, above), mode="circular")
        return F.pad(x, (0 if self.x else beside,) * 2 + (0 if self.y else above,) * 2)

    def _close(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Put the first row and column of a map behind the last ones, where the VAE's halving put zeros."""
        x = x.clone()
        if self.x:
            x[..., -1] = x[..., 0]
        if self.y:
            x[..., -1, :] = x[..., 0, :]
        return x


class _Ring:
    """What stands for a convolution's `_conv_forward`: it pads the map, and convolves without padding."""

    def __init__(self, conv: nn.Conv2d, padded: Any):
        self._conv, self._padded = conv, padded

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = self._conv
        return F.conv2d(self._padded(conv, x), weight, bias, conv.stride, 0, conv.dilation, conv.groups)
