"""Brownian motion over sigma, for samplers whose noise of two overlapping steps has to belong together.

One path an image, made from a seed: independent of the batch, of the device and of the intervals that are asked for, so
that runs of another number of steps meet the same noise. A path is a tree: known at both ends of an interval, it is
drawn in the middle (Levy's construction), down to the interval that is asked for.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import AbsentError

TOP = 13  # sigmas up to 2^13; a level without signal counts as 2^12
CELL = 14  # and in steps of 2^-14, or, where that is more, of a thousandth: ends of intervals are rounded to ten bits
BITS = 10


class BrownianPaths:
    """Paths W(sigma) with W(0) = 0, one for each seed.

    Args:
        seeds: one an image, any whole numbers.
        shape: of an image, without the batch.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]):
        self.seeds = [int(seed) for seed in seeds]
        self.shape = tuple(shape)
        top = math.sqrt(2**TOP) * self._normal(0, 0)
        # Of each depth the node met last: (index, W at its left end, W at its right end).
        self._nodes: dict[int, tuple[int, Tensor, Tensor]] = {0: (0, torch.zeros_like(top), top)}

    def at(self, sigma: float) -> Tensor:
        """Give W at a sigma, rounded to the grid: (b, ...) float32."""
        return self._at(self._cell(sigma)[0])

    def between(self, sigma: float, sigma_to: float) -> Tensor:
        """Give W(sigma_to) - W(sigma) over the root of the interval's length: unit normal, (b, ...) float32."""
        (start, unit), (end, _) = self._cell(sigma), self._cell(sigma_to)
        if start == end:
            start, end = (start, start + unit) if sigma_to >= sigma else (start + unit, start)
        return (self._at(end) - self._at(start)) / math.sqrt(abs(end - start) * 2.0**-CELL)

    def _cell(self, sigma: float) -> tuple[int, int]:
        """Round a sigma: (the number of its cell, how many cells the grid is wide there)."""
        cell = min(round(sigma * 2**CELL), 2 ** (TOP + CELL) - 2 ** (TOP + CELL - BITS))
        unit = 1 << max(cell.bit_length() - BITS, 0)
        return (cell + unit // 2) // unit * unit, unit

    def _at(self, cell: int) -> Tensor:
        """Walk down the tree to the place where a node ends at this cell."""
        depth, left, right = 0, *self._nodes[0][1:]
        if cell == 0:
            return left
        length = TOP + CELL
        while cell % (1 << (length - depth)):
            index = cell >> (length - depth - 1)
            known = self._nodes.get(depth + 1)
            if known is None or known[0] != index:
                # W in the middle, given both ends: their mean, and a quarter of the interval as variance.
                spread = math.sqrt(2.0 ** (TOP - depth) / 4)
                middle = torch.lerp(left, right, 0.5).add_(self._normal(depth + 1, index >> 1), alpha=spread)
                ends = (left, middle) if index % 2 == 0 else (middle, right)
                known = (index, *ends)
                self._nodes[depth + 1] = known
            _, left, right = known
            depth += 1
        return left

    def _normal(self, depth: int, index: int) -> Tensor:
        """Draw what belongs to one node of each tree: (b, ...) float32."""
        draws = []
        for seed in self.seeds:
            name = hashlib.blake2b(f"{seed} {depth} {index}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(name, "little"))
            draws.append(torch.randn(self.shape, generator=generator))
        return torch.stack(draws)


class TorchsdePaths:
    """Paths W(sigma) within a range, one for each seed, as torchsde's BrownianTree makes them.

    k-diffusion's BrownianTreeNoiseSampler of a list of seeds, and so the paths of A1111's and diffusers' samplers. Like
    theirs they depend on the range, and in float32.

    Args:
        seeds: one an image, from 0 on.
        shape: of an image, without the batch.
        low, high: the lowest sigma above 0 and the highest of the run.

    Raises:
        AbsentError: torchsde is not installed.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], low: float, high: float):
        tree = need_torchsde().BrownianTree
        zero, ends = torch.zeros(tuple(shape)), {"t0": torch.tensor(low), "t1": torch.tensor(high)}
        self.trees = [tree(w0=zero, entropy=int(seed), **ends) for seed in seeds]

    def between(self, sigma: float, sigma_to: float) -> Tensor:
        """Give W(sigma_to) - W(sigma) over the root of the interval's length: unit normal, (b, ...) float32."""
        low, high = (torch.tensor(one) for one in sorted((sigma, sigma_to)))
        rise = torch.stack([tree(low, high) for tree in self.trees]) / (high - low).sqrt()
        return rise if sigma_to > sigma else -rise


def need_torchsde() -> Any:
    """Import torchsde, or raise AbsentError."""
    try:
        import torchsde
    except ImportError:
        raise AbsentError(
            "brownian='torchsde' needs torchsde: pip install 'faithful-ldm[torchsde]', or leave brownian out"
        ) from None
    return torchsde
