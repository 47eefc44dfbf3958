"""The random numbers of a training step, drawn for the whole batch of all processes.

A model's own `shared_step` draws from torch's global generator in shapes that depend on how many processes share
the batch. Here noise, levels and caption dropout are drawn for the whole batch of all processes from (seed, batch
number) and each process takes its rows, so two processes train exactly as one with the same global batch.
"""

import random

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.resample import ScheduleSampler


class Draws:
    """The random numbers of one batch: rows rank*b .. rank*b + b of draws for the b*world samples of all processes.

    Making one also seeds the global generators of torch, numpy and Python from the same numbers and the rank, for
    whatever else draws during the step (dropout, third-party models).
    """

    def __init__(self, seed: int, micro: int, *, rank: int = 0, world: int = 1):
        words = np.random.SeedSequence((seed, 3, micro)).generate_state(3, np.uint64)
        self.generator = torch.Generator().manual_seed(int(words[0]))
        self.rank, self.world = rank, world
        torch.manual_seed(int(words[1]) + rank & (1 << 63) - 1)
        np.random.seed(int(words[2] % (1 << 32)) ^ rank)
        random.seed(int(words[2]) + rank)

    def _mine(self, drawn: Tensor, like: Tensor) -> Tensor:
        b = like.shape[0]
        return drawn[self.rank * b : (self.rank + 1) * b].to(like.device)

    def normal(self, like: Tensor) -> Tensor:
        """Draw unit normals of like's shape, device and dtype."""
        drawn = torch.randn((self.world * like.shape[0], *like.shape[1:]), generator=self.generator)
        return self._mine(drawn, like).to(like.dtype)

    def levels(self, high: int, like: Tensor) -> Tensor:
        """Draw (b,) whole numbers in [0, high)."""
        return self._mine(
            torch.randint(0, high, (self.world * like.shape[0],), generator=self.generator), like
        )

    def weighted_levels(self, sampler: ScheduleSampler, like: Tensor) -> tuple[Tensor, Tensor]:
        """Draw (b,) levels from a schedule sampler, and the (b,) weights of their losses."""
        seed = int(torch.randint(0, 1 << 32, (), generator=self.generator))  # alike in every process
        levels, weights = sampler.sample(self.world * like.shape[0], "cpu", rng=np.random.RandomState(seed))
        return self._mine(levels, like), self._mine(weights, like)

    def uniform(self, like: Tensor) -> Tensor:
        """Draw (b,) numbers in [0, 1)."""
        return self._mine(torch.rand(self.world * like.shape[0], generator=self.generator), like)
