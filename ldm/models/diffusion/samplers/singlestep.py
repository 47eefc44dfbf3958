"""DPM-Solver in steps that call the network within themselves: k-diffusion's DPM fast and DPM adaptive."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm import limits
from ldm.errors import NumericError, UsageError, shown
from ldm.models.diffusion.levels import Level, LevelTable, explicit_levels
from ldm.models.diffusion.samplers.base import SigmaSampler, VariableEta
from ldm.process.spacing import check_steps
from ldm.process.steps import ancestral_split, dpm_solver_singlestep

LEAST_H = 1e-5  # of dpm_adaptive's steps, in log sigma: a run would have some 10^5 of them


@dataclass(frozen=True, eq=False)
class OrderedLevel(Level):
    """A level that says of which order the step from it is."""

    order: int = 3


@dataclass
class DPMFast(VariableEta, SigmaSampler):
    """DPM-Solver-fast (arXiv:2206.00927, section 3.4): "DPM fast".

    `steps` counts calls of the network: S of them are S // 3 + 1 steps of order 3, but for the last. Its own levels are
    even in log sigma and end at the model's lowest sigma, for its steps cannot reach 0; so do other spacings' here. A
    list of sigmas is stepped through as it is, by order 3, to 0 by order 1.

    Options:
        s_noise: factor on the noise, where eta is above 0.
    """

    name = "dpm_fast"
    spacing = "exponential"

    _: KW_ONLY
    s_noise: float = 1.0

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        spacing: str | Sequence[float] | None = None,
        **options: Any,
    ) -> list[Level]:
        calls = check_steps(steps, len(alpha_bar))
        if explicit_levels(spacing) is not None:
            plan = super().plan(alpha_bar, steps, spacing=spacing, **options)
            return [OrderedLevel(one.t, one.alpha_bar, one.left, one.total) for one in plan]
        orders = [3] * (calls // 3 - 1) + [2, 1] if calls % 3 == 0 else [3] * (calls // 3) + [calls % 3]
        levels = ending_above_0(super().plan, alpha_bar, len(orders), spacing=spacing, **options)
        left = range(len(levels) - 1, -1, -1)
        orders += [1] * (len(levels) - len(orders))  # a spacing may give more levels than it was asked for
        rows = zip(levels, left, orders, strict=True)
        return [OrderedLevel(one.t, one.alpha_bar, i, len(levels) - 1, order) for one, i, order in rows]

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        sigma, sigma_to = float(here.sigma), float(to.sigma)
        denoised = self.predict(x, sigma)
        if sigma_to == 0:
            return denoised, denoised
        end = float(self.denoise.levels.sigmas[0]) if self.eta else 0.0
        down, up = split_down_to(sigma, sigma_to, self.eta, end)
        eps = (x - denoised) / sigma
        x, _ = dpm_solver_singlestep(x, self.predict, sigma, down, getattr(here, "order", 3), eps)
        if self.eta == 0:
            return x, denoised
        return x + self.s_noise * up * self.draw(x, here, to), denoised


@dataclass
class DPMAdaptive(VariableEta, SigmaSampler):
    """DPM-Solver of order 3, embedded in order 2, whose steps are as long as a tolerance allows: "DPM adaptive".

    From the noisiest level of the spacing to the model's lowest sigma; `steps` has no effect on a whole run. A run from
    a picture begins at the level that the steps and the strength name. The error is measured over the batch, so that
    pictures of one batch share their steps and depend, within the tolerance, on one another.

    Options:
        order: 2 or 3.
        rtol, atol: relative and absolute tolerance of a step.
        h_init: length of the first step, in log sigma.
        pcoeff, icoeff, dcoeff: of the PID controller of the steps' lengths.
        accept_safety: least factor on the length at which a step counts.
        s_noise: factor on the noise, where eta is above 0.
    """

    name = "dpm_adaptive"
    spacing = "exponential"
    chooses_levels = True

    _: KW_ONLY
    order: int = 3
    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept_safety: float = 0.81
    s_noise: float = 1.0
    h: float = field(default=0.0, init=False, repr=False)
    errors: list[float] = field(default_factory=list, init=False, repr=False)
    low: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (2, 3):
            raise UsageError(f"order must be 2 or 3, got {shown(self.order)}")
        for name in ("rtol", "atol", "h_init", "accept_safety"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be a number above 0, got {shown(getattr(self, name))}")
        # Beyond these no step may ever count.
        for name in ("accept_safety", "pcoeff", "icoeff", "dcoeff"):
            limits.real(name, getattr(self, name), *limits.SHARE)
        self.h = self.h_init

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        spacing: str | Sequence[float] | None = None,
        **options: Any,
    ) -> list[Level]:
        if explicit_levels(spacing) is not None:
            return super().plan(alpha_bar, steps, spacing=spacing, **options)
        levels = ending_above_0(super().plan, alpha_bar, steps, spacing=spacing, **options)
        total = len(levels) - 1
        return [Level(one.t, one.alpha_bar, total - i, total) for i, one in enumerate(levels)]

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, ...]:
        """Step towards a level, as far as the tolerance allows: (x, predicted clean sample, level reached)."""
        x, sigma, end = x / math.sqrt(here.alpha_bar), float(here.sigma), float(to.sigma)
        denoised = self.predict(x, sigma)
        if end == 0:
            return denoised, denoised
        eps, accepted = (x - denoised) / sigma, False
        while not accepted:
            reaches_end = self.h >= math.log(sigma / end) - 1e-5
            sigma_to = end if reaches_end else sigma * math.exp(-self.h)
            down, up = split_down_to(sigma, sigma_to, self.eta, end)
            high, low = dpm_solver_singlestep(x, self.predict, sigma, down, self.order, eps)
            error = self.error(low, high, x if self.low is None else self.low)
            if not math.isfinite(error):
                raise NumericError(
                    f"the network gave values that are not finite near sigma {sigma:g}, and dpm_adaptive makes "
                    "no step by them; use float32 or another model file"
                )
            accepted = self.propose(error)
            if not accepted and self.h < LEAST_H:
                raise UsageError(
                    f"dpm_adaptive finds no step within rtol {self.rtol:g} and atol {self.atol:g} near sigma "
                    f"{sigma:g}; raise them"
                )
        self.low = low
        reached = to if reaches_end else self.denoise.levels.at_sigma(sigma_to)
        if self.eta > 0:
            high = high + self.s_noise * up * self.draw(x, here, reached)
        return math.sqrt(reached.alpha_bar) * high, denoised, reached

    def error(self, low: Tensor, high: Tensor, before: Tensor) -> float:
        """Measure the difference of the orders in units of the tolerance: its root mean square."""
        tolerance = (self.rtol * torch.maximum(low.abs(), before.abs())).clamp(min=self.atol)
        return float(((low - high) / tolerance).square().mean().sqrt())

    def propose(self, error: float) -> bool:
        """Make the next step's length from an error, and tell whether the step of that error counts."""
        order = 1.5 if self.eta else self.order
        inverse = 1 / (error + 1e-8)
        self.errors = [inverse, *(self.errors[1:] or [inverse, inverse])]
        powers = (
            (self.pcoeff + self.icoeff + self.dcoeff) / order,
            -(self.pcoeff + 2 * self.dcoeff) / order,
            self.dcoeff / order,
        )
        factor = math.prod(one**power for one, power in zip(self.errors, powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        accepted = factor >= self.accept_safety
        if accepted:
            self.errors = [self.errors[0], self.errors[0], self.errors[1]]
        self.h *= factor
        return accepted


def split_down_to(sigma: float, sigma_to: float, eta: float, end: float) -> tuple[float, float]:
    """`ancestral_split` that goes down no further than the end of the run."""
    if eta == 0:
        return sigma_to, 0.0
    down = max(ancestral_split(sigma, sigma_to, eta)[0], end)
    return down, math.sqrt(max(sigma_to * sigma_to - down * down, 0.0))


def ending_above_0(
    plan: Any, alpha_bar: np.ndarray, steps: int, *, spacing: str | None, **options: Any
) -> list[Level]:
    """List the steps + 1 levels of a spacing down to the lowest of its sigmas, or of the model's, instead of 0."""
    table = LevelTable(alpha_bar)
    lowest = options.get("sigma_min") or table.sigmas[0]
    if steps < len(alpha_bar):
        longer = plan(alpha_bar, steps + 1, spacing=spacing, **options)
        if float(longer[-2].sigma) < lowest * (1 + 1e-6):
            return longer[:-1]
    levels = plan(alpha_bar, steps, spacing=spacing, **options)
    if levels[-1].alpha_bar < 1:
        return levels
    if float(levels[-2].sigma) < lowest * (1 + 1e-6):
        return levels[:-1] if len(levels) > 2 else levels
    return [*levels[:-1], table.at_sigma(lowest)]
