"""The samplers of distilled models: LCM's and TCD's."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ldm.errors import UsageError, shown
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers.base import Sampler
from ldm.process.multistep import lcm_boundary
from ldm.process.steps import ddim_step

MOST_STEPS = 50  # of the spacing "lcm"


class DistilledSampler(Sampler):
    """A sampler of models that were distilled on 50 levels, which are its own; in more steps it goes by others."""

    spacing = "lcm"
    needs_signal = True

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        spacing: str | Sequence[float] | None = None,
        **options: Any,
    ) -> list[Level]:
        if spacing is None and steps > MOST_STEPS:
            spacing = "trailing"
        return super().plan(alpha_bar, steps, spacing=spacing, **options)


@dataclass
class LCM(DistilledSampler):
    """Latent consistency models (arXiv:2310.04378, algorithm 3): predict the clean sample, and noise it afresh.

    Options:
        timestep_scaling: of its boundary condition, see `lcm_boundary`; None leaves it out, as ComfyUI does.
        s_noise: factor on the fresh noise.
    """

    name = "lcm"
    etas = "must be 0 (unset): all of its noise is fresh, see s_noise"

    _: KW_ONLY
    timestep_scaling: float | None = 10.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        scaling = self.timestep_scaling
        if scaling is not None and scaling <= 0:
            raise UsageError(f"timestep_scaling of lcm must be above 0, or None, got {shown(scaling)}")

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        _, pred_x0 = self.denoise(x, here.t, here.alpha_bar)
        if self.timestep_scaling is not None:
            skip, out = lcm_boundary(here.t, self.timestep_scaling)
            pred_x0 = skip * x + out * pred_x0
        pred_x0 = self.quantize(pred_x0)
        alpha_bar = float(to.alpha_bar)
        if alpha_bar == here.alpha_bar:
            return x, pred_x0
        if to.left == 0:
            return pred_x0, pred_x0
        std = self.s_noise * math.sqrt(1 - alpha_bar)
        return math.sqrt(alpha_bar) * pred_x0 + std * self.draw(x, here, to), pred_x0


@dataclass
class TCD(DistilledSampler):
    """Trajectory consistency distillation (arXiv:2402.19159, algorithm 4): strategic stochastic sampling.

    A step goes by DDIM to a level below the next one, and back up to it by fresh noise; the last by DDIM alone.

    Options:
        gamma: how far below: 0 = not at all, 1 = to level 0. diffusers calls it eta.
    """

    name = "tcd"
    etas = "must be 0 (unset): gamma says how much of its noise is fresh"

    _: KW_ONLY
    gamma: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise UsageError(f"gamma of tcd must be from 0 to 1, got {shown(self.gamma)}")

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        eps, pred_x0 = self.denoise(x, here.t, here.alpha_bar)
        pred_x0 = self.quantize(pred_x0)
        if to.alpha_bar == here.alpha_bar:
            return x, pred_x0
        fresh = self.gamma > 0 and to.left > 0
        low = self.denoise.levels.at_t(math.floor((1 - self.gamma) * to.t)) if fresh else to
        if low.alpha_bar < to.alpha_bar:  # a list of sigmas may go below the model's lowest
            low = to
        x, _ = ddim_step(x, eps, alpha_bar_t=here.alpha_bar, alpha_bar_prev=low.alpha_bar, pred_x0=pred_x0)
        if not fresh:
            return x, pred_x0
        kept = float(to.alpha_bar) / float(low.alpha_bar)
        return math.sqrt(kept) * x + math.sqrt(1 - kept) * self.draw(x, here, to), pred_x0
