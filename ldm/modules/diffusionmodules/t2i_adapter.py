"""T2I-Adapter (arXiv:2302.08453): a small network that turns a hint into a map for each level of a UNet's way down."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

HINT_FACTOR = 8  # pixels of the hint to a latent cell; the pixels of a cell become its channels


def _conv(shape: Sequence[int]) -> nn.Conv2d:
    """A convolution whose weight has this shape, and whose maps keep their size."""
    out_channels, in_channels, side, _ = shape
    return nn.Conv2d(in_channels, out_channels, side, padding=side // 2)


class AdapterBlock(nn.Module):
    """Two convolutions with a ReLU between, added to what they got."""

    def __init__(self, first: Sequence[int], second: Sequence[int]):
        super().__init__()
        self.block1, self.block2 = _conv(first), _conv(second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class AdapterLevel(nn.Module):
    """The blocks of one resolution, behind a convolution where widths change; the light kind has one at both ends."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], blocks: int):
        super().__init__()
        self.in_conv = _conv(shapes["in_conv.weight"]) if "in_conv.weight" in shapes else nn.Identity()
        self.resnets = nn.Sequential(
            *(
                AdapterBlock(shapes[f"resnets.{i}.block1.weight"], shapes[f"resnets.{i}.block2.weight"])
                for i in range(blocks)
            )
        )
        self.out_conv = _conv(shapes["out_conv.weight"]) if "out_conv.weight" in shapes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.resnets(self.in_conv(x)))


class T2IAdapterModel(nn.Module):
    """Both kinds, full and light, under diffusers' names without "adapter.".

    Args:
        shapes: of its weights; a convolution of the pixels first is there where "conv_in.weight" is (the full kind).
        levels: how many resolutions.
        blocks: how many AdapterBlocks each of them has.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], levels: int, blocks: int):
        super().__init__()
        self.conv_in = _conv(shapes["conv_in.weight"]) if "conv_in.weight" in shapes else nn.Identity()
        self.body = nn.ModuleList(
            AdapterLevel(
                {
                    name.removeprefix(f"body.{level}."): shape
                    for name, shape in shapes.items()
                    if name.startswith(f"body.{level}.")
                },
                blocks,
            )
            for level in range(levels)
        )

    def forward(self, hint: Tensor) -> list[Tensor]:
        """Turn hints (n, 1 or 3, 8 h, 8 w) in [0, 1] into a map for each level, (n, c, *its space)."""
        h = self.conv_in(F.pixel_unshuffle(hint, HINT_FACTOR))
        maps = []
        for i, level in enumerate(self.body):
            # Sides that do not halve evenly are rounded up, as the UNet's are.
            h = level(F.avg_pool2d(h, 2, ceil_mode=True) if i else h)
            maps.append(h)
        return maps
