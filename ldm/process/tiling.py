"""Overlapping tiles: cut a map into windows that a network can take, and blend the results seamlessly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UsageError


def border_distance(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Measure how far each cell is from the nearest border: (height, width), 0 on the border, 0.5 at most."""
    down = torch.linspace(0, 1, height, device=device)[:, None]  # (h, 1)
    right = torch.linspace(0, 1, width, device=device)[None, :]  # (1, w)
    return torch.minimum(torch.minimum(down, 1 - down), torch.minimum(right, 1 - right))


@dataclass(frozen=True)
class Tiling:
    """Windows of `kernel` cells every `stride` cells over a map of `size` cells, all (height, width).

    Joining weighs every cell by its distance from its window's border, clipped to `weight_range`, so that seams
    vanish; with `tie_range` a window near the map's border weighs less as well (the original's "tie_braker").

    Raises:
        UsageError: windows that leave a rim of the map uncovered (the original divides by zero there).
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    weight_range: tuple[float, float] = (0.01, 0.5)
    tie_range: tuple[float, float] | None = None

    def __post_init__(self):
        for axis, size, kernel, stride in zip(
            ("height", "width"), self.size, self.kernel, self.stride, strict=True
        ):
            if not 0 < stride <= kernel <= size or (size - kernel) % stride:
                raise UsageError(
                    f"tiles of {kernel} cells every {stride} do not cover a {axis} of {size} cells; "
                    "stride <= tile <= size is needed, with (size - tile) a multiple of the stride"
                )

    @property
    def counts(self) -> tuple[int, int]:
        """How many windows stand below and beside each other."""
        pairs = zip(self.size, self.kernel, self.stride, strict=True)
        rows, columns = ((size - kernel) // stride + 1 for size, kernel, stride in pairs)
        return rows, columns

    def split(self, x: Tensor) -> list[Tensor]:
        """Cut x (b, c, *size) into windows, row by row, each (b, c, *kernel)."""
        if tuple(x.shape[-2:]) != tuple(self.size):
            raise UsageError(f"tiles were laid out for {self.size} cells, got a map of {tuple(x.shape[-2:])}")
        windows = F.unfold(x, self.kernel, stride=self.stride)  # (b, c * kh * kw, windows)
        return list(windows.reshape(*x.shape[:2], *self.kernel, -1).unbind(-1))

    def join(self, tiles: Sequence[Tensor], *, up: int = 1, down: int = 1) -> Tensor:
        """Blend windows, each (b, c, *kernel) times up / down, into one map (b, c, *size) times up / down.

        Args:
            up, down: by what factor the network has enlarged or shrunk every window.
        """
        size, kernel, stride = (
            tuple(n * up // down for n in pair) for pair in (self.size, self.kernel, self.stride)
        )
        stacked = torch.stack(list(tiles), dim=-1)  # (b, c, kh, kw, windows)
        if tuple(stacked.shape[2:4]) != kernel:
            raise UsageError(f"tiles to join should be {kernel} cells each, got {tuple(stacked.shape[2:4])}")
        weight = self._weights(kernel, stacked)  # (1, 1, kh, kw, windows)
        total = F.fold((stacked * weight).flatten(1, 3), size, kernel, stride=stride)
        return total / F.fold(weight.flatten(1, 3), size, kernel, stride=stride)

    def _weights(self, kernel: tuple[int, int], like: Tensor) -> Tensor:
        rows, columns = self.counts
        weight = border_distance(*kernel, device=like.device).clamp(*self.weight_range)
        weight = weight[..., None].expand(*kernel, rows * columns)
        if self.tie_range is not None:
            ties = border_distance(rows, columns, device=like.device).clamp(*self.tie_range)
            weight = weight * ties.reshape(-1)
        return weight[None, None].to(like.dtype)
