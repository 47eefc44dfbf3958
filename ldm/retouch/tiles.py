"""A picture cut into tiles that overlap, and put together again without seams: A1111's SD upscale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Grid:
    """Where tiles lie in a picture.

    Attributes:
        size: (width, height) of the picture.
        tile: of every tile; never larger than the picture.
        overlap: pixels over which neighbours are mixed; they share at least as many.
        columns, rows: left edges, and upper ones.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    overlap: int
    columns: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def over(cls, size: tuple[int, int], tile: tuple[int, int], overlap: int) -> Grid:
        """Cover a picture with as few tiles as share `overlap` pixels, evenly.

        Args:
            overlap: below both sides of the tile.
        """
        tile = min(tile[0], size[0]), min(tile[1], size[1])
        columns, rows = (_starts(*one, overlap) for one in zip(size, tile, strict=True))
        return cls(size, tile, overlap, columns, rows)

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """The tiles as (left, top, right, bottom), row by row."""
        width, height = self.tile
        return [(x, y, x + width, y + height) for y in self.rows for x in self.columns]

    def join(self, tiles: Sequence[Image.Image]) -> Image.Image:
        """Put tiles together, in the order of `boxes`: each fades in over its first `overlap` columns, each row so."""
        from PIL import Image

        (width, height), overlap = self.tile, self.overlap
        ramp = (np.arange(overlap) * 255 / max(overlap, 1)).astype(np.uint8)
        across = Image.fromarray(np.repeat(ramp[None], height, axis=0)) if overlap else None
        down = Image.fromarray(np.repeat(ramp[:, None], self.size[0], axis=1)) if overlap else None
        whole = Image.new("RGB", self.size)
        for i, y in enumerate(self.rows):
            row = Image.new("RGB", (self.size[0], height))
            for tile, x in zip(tiles[i * len(self.columns) :], self.columns, strict=False):
                first = 0 if x == 0 else overlap
                if first:
                    row.paste(tile.crop((0, 0, first, height)), (x, 0), across)
                row.paste(tile.crop((first, 0, width, height)), (x + first, 0))
            first = 0 if y == 0 else overlap
            if first:
                whole.paste(row.crop((0, 0, self.size[0], first)), (0, y), down)
            whole.paste(row.crop((0, first, self.size[0], height)), (0, y + first))
        return whole


def _starts(side: int, tile: int, overlap: int) -> tuple[int, ...]:
    if tile == side:
        return (0,)
    count = math.ceil((side - overlap) / (tile - overlap))
    return tuple(min(int(i * (side - tile) / (count - 1)), side - tile) for i in range(count))
