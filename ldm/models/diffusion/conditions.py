"""Conditions that change while a picture is denoised, and several of them for one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class ScheduledCondition:
    """The condition of a batch, call by call of the network: what `Denoiser` takes in the place of a tensor.

    A picture may have several conditions at once, each with a weight (A1111's AND): guidance then moves along the sum
    of their differences to the unconditional answer, each times its weight.

    Args:
        rows_at: gives for a call, counted from 0, contexts (r, n, d) and for each picture its (row, weight) pairs: see
            ldm.prompt.encode.at_step.
        concat: (b, c, h, w) beside the latents, of 9-channel inpainting.

    Attributes:
        current: what the network was last given as the first condition of every picture.
    """

    def __init__(
        self,
        rows_at: Callable[[int], tuple[Tensor, Sequence[Sequence[tuple[int, float]]]]],
        concat: Tensor | None = None,
    ):
        self.rows_at = rows_at
        self.concat = concat
        self.current: Any = None

    def at(self, call: int) -> list[tuple[list[float], Any]]:
        """Give the weights (b) of the first condition of every picture and that condition, then of the second ...

        A picture with fewer of them has its first once more, with weight 0.
        """
        rows, owners = self.rows_at(call)
        parts = []
        for place in range(max(map(len, owners))):
            own = [pairs[place] if place < len(pairs) else (pairs[0][0], 0.0) for pairs in owners]
            context = rows[[row for row, _ in own]]
            condition = (
                context if self.concat is None else {"c_concat": [self.concat], "c_crossattn": [context]}
            )
            parts.append(([weight for _, weight in own], condition))
        self.current = parts[0][1]
        return parts


def tokens_of(condition: Any) -> int:
    """Count the tokens of a condition as ScheduledCondition gives it."""
    context = condition if isinstance(condition, Tensor) else condition["c_crossattn"][0]
    return context.shape[1]


def weighted(weights: Sequence[float], like: Tensor) -> Tensor:
    """Make weights (b) fit samples (b, ...)."""
    return torch.tensor(weights, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.dim() - 1))
