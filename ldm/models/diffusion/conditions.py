"""Conditions that change while a picture is denoised, several of them for one picture, and such of a part of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Area = tuple[int, int, int, int]  # x, y, width, height in latent cells
FEATHER = 8  # cells over which an area fades out towards the rest of the picture, as in ComfyUI


@dataclass(frozen=True)
class Condition:
    """One condition of one picture.

    Attributes:
        context: (n, d), of the prompt.
        weight: without an area, of its difference to the unconditional answer (A1111's AND); with one, of its answer
            in the mean.
        begin, end: the first and the last call of the network, counted from 0, at which it is there.
        area: the only part of the picture that it is about; None is the whole.
    """

    context: Tensor
    weight: float = 1.0
    begin: int = 0
    end: float = math.inf
    area: Area | None = None


@dataclass(frozen=True)
class BatchCondition:
    """One condition of each picture of a batch at one call of the network.

    Attributes:
        weights: (b) one for each picture.
        given: what the network takes: context (b, n, d), or a dict with it and what 9-channel inpainting has besides.
        area: of all of them.
    """

    weights: Sequence[float]
    given: Any
    area: Area | None = None


def rows_at(
    pictures: Sequence[Sequence[Condition]], call: int
) -> tuple[Tensor, list[list[tuple[int, Condition]]]]:
    """Give the contexts of a batch at a call, (r, n, d), and for each picture its conditions with their rows.

    Contexts of unequal length are padded with their own last vector, as in AUTOMATIC1111.
    """
    owners, contexts = [], []
    for conditions in pictures:
        now = [one for one in conditions if one.begin <= call <= one.end]
        owners.append([(len(contexts) + i, one) for i, one in enumerate(now)])
        contexts += [one.context for one in now]
    longest = max(len(context) for context in contexts)
    padded = [torch.cat([z, z[-1:].expand(longest - len(z), -1)]) for z in contexts]
    return torch.stack(padded), owners


class ScheduledCondition:
    """The conditions of a batch, call by call of the network: what `Denoiser` takes in the place of a tensor.

    A picture may have several conditions of the whole at once, each with a weight (A1111's AND): guidance then moves
    along the sum of their differences to the unconditional answer, each times its weight. And it may have conditions of
    areas (ComfyUI's ConditioningSetArea), whose answers are averaged with that of the whole.

    Args:
        pictures: for each picture its conditions; at each call there is one of the whole at least.
        concat: (b, c, h, w) beside the latents, of 9-channel inpainting.

    Attributes:
        current: what the network was last given as the first condition of every picture.
    """

    def __init__(self, pictures: Sequence[Sequence[Condition]], concat: Tensor | None = None):
        self.pictures = pictures
        self.concat = concat
        self.current: Any = None

    def at(self, call: int) -> list[BatchCondition]:
        """Give the first condition of every picture, then the second ...; those of the whole before those of areas.

        A picture with fewer of an area has its first once more, with weight 0.
        """
        rows, owners = rows_at(self.pictures, call)
        areas = dict.fromkeys([None, *(one.area for own in owners for _, one in own)])
        parts = []
        for area in areas:
            of_it = [[(row, one.weight) for row, one in own if one.area == area] for own in owners]
            for place in range(max(map(len, of_it))):
                own = [
                    found[place] if place < len(found) else (pairs[0][0], 0.0)
                    for found, pairs in zip(of_it, owners, strict=True)
                ]
                context = rows[[row for row, _ in own]]
                given = (
                    context if self.concat is None else {"c_concat": [self.concat], "c_crossattn": [context]}
                )
                parts.append(BatchCondition([weight for _, weight in own], given, area))
        self.current = parts[0].given
        return parts


def context_of(condition: Any) -> Any:
    """Give the context of a condition that is a dict of lists; of another one the condition itself."""
    return (
        condition["c_crossattn"][0]
        if isinstance(condition, dict) and "c_crossattn" in condition
        else condition
    )


def tokens_of(condition: Any) -> int:
    """Count the tokens of a condition as ScheduledCondition gives it."""
    return context_of(condition).shape[1]


def weighted(weights: Sequence[float], like: Tensor) -> Tensor:
    """Make weights (b) fit samples (b, ...)."""
    return torch.tensor(weights, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.dim() - 1))


def area_of(box: Sequence[float], width: int, height: int) -> Area:
    """Give the cells of a box (x, y, width, height), in shares of width x height cells: ComfyUI's rounding."""
    left, top = round(box[0] * width), round(box[1] * height)
    return (
        left,
        top,
        min(max(1, round(box[2] * width)), width - left),
        min(max(1, round(box[3] * height)), height - top),
    )


def crop(x: Tensor, area: Area) -> Tensor:
    """Cut an area out of (b, c, h, w); a view."""
    left, top, width, height = area
    return x[:, :, top : top + height, left : left + width]


def of_area(condition: Any, area: Area) -> Any:
    """Make a condition fit samples that an area was cut out of."""
    if not isinstance(condition, dict) or "c_concat" not in condition:
        return condition
    return {**condition, "c_concat": [crop(one, area) for one in condition["c_concat"]]}


def feathered(area: Area, x: Tensor) -> Tensor:
    """Give the weights (1, 1, height, width) of an area of samples (b, c, h, w), which fade out inside it.

    Up to FEATHER cells, a quarter of the side at most, lead linearly from the rest of the picture to 1; there is none
    at the picture's own edges. ComfyUI's rule for ConditioningSetArea.
    """
    left, top, width, height = area
    sides = []
    for begin, side, whole in ((top, height, x.shape[2]), (left, width, x.shape[3])):
        weights = torch.ones(side, dtype=x.dtype, device=x.device)
        depth = min(FEATHER, side // 4)
        ramp = torch.arange(1, depth + 1, dtype=x.dtype, device=x.device) / max(depth, 1)
        if begin > 0:
            weights[:depth] *= ramp
        if begin + side < whole:
            weights[side - depth :] *= ramp.flip(0)
        sides.append(weights)
    return (sides[0][:, None] * sides[1][None, :])[None, None]
