"""Restart sampling: back up by fresh noise, and down again."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ldm.models.diffusion.levels import Level, LevelTable, explicit_levels
from ldm.models.diffusion.samplers.kdiffusion import Heun
from ldm.process.sigmas import check_sigmas, sigma_table


class Restart(Heun):
    """Restart (arXiv:2306.14878) on Heun's method, with A1111's choice of where: "Restart".

    From 20 steps on 9 of them, from 36 on twice a quarter, are spent on going from sigma 2 to 0.1 again, over levels
    of "karras"; the others go the whole way, by the spacing. Fewer steps go the whole way once. A list of sigmas is
    gone along as it is, and where it rises, noise leads back up. Options as `Heun`; s_noise is also a factor on that
    noise.
    """

    name = "restart"
    inverts = False
    spacing = "karras"
    low, high = 0.1, 2.0

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        spacing: str | Sequence[float] | None = None,
        **options: Any,
    ) -> list[Level]:
        again, times = (steps // 4, 2) if steps >= 36 else (9, 1)
        table, listed = LevelTable(alpha_bar), explicit_levels(spacing)
        if listed is not None and listed[0] == "sigma":
            way = check_sigmas(listed[1], may_rise=True)
            if (np.diff(way) > 0).any() and len(way) == steps + 1 and not options:
                return cls.along(way, table)
        if steps < 20 or listed is not None:
            return super().plan(alpha_bar, steps, spacing=spacing, **options)
        plan = super().plan(alpha_bar, steps - again * times, spacing=spacing, **options)
        sigmas = np.array([float(level.sigma) for level in plan])
        bottom, top = (int(np.abs(sigmas - at).argmin()) for at in (cls.low, cls.high))
        if top >= bottom or sigmas[bottom] == 0:
            return super().plan(alpha_bar, steps, spacing=spacing, **options)
        ends = {"sigma_min": sigmas[bottom], "sigma_max": sigmas[top]}
        loop = sigma_table("karras", again + 1, table.sigmas, **ends)[:-1]
        way = [*sigmas[: bottom + 1], *np.tile(loop, times), *sigmas[bottom + 1 :]]
        return cls.along(np.array(way), table)

    @staticmethod
    def along(way: np.ndarray, table: LevelTable) -> list[Level]:
        """Make levels of sigmas that may rise, of which a way back up is no step."""
        falls = [after < before for before, after in zip(way, way[1:], strict=False)]
        total, levels = sum(falls), []
        for i, sigma in enumerate(way):
            level = table.at_sigma(sigma)
            levels.append(Level(level.t, level.alpha_bar, sum(falls[i:]), total))
        return levels

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor | None]:
        sigma, sigma_to = float(here.sigma), float(to.sigma)
        if sigma_to <= sigma:
            return super().step_sigma(x, here, to)
        noise = self.draw(x, here, to)
        return x + self.s_noise * math.sqrt(sigma_to * sigma_to - sigma * sigma) * noise, None
