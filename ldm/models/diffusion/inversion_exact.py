"""Inversions that come back up to rounding, whatever the network: their steps can be undone.

They carry two samples instead of one, in float64. EDICT's two are nearly the same one at the same level, BDIA's and
BELM's those of two levels that follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.limits import real
from ldm.models.diffusion.inversion_base import Method, Run, fall, fine, rise, sample_of
from ldm.models.diffusion.levels import Level

Pair = tuple[Tensor, Tensor]


@dataclass
class EDICT(Method):
    """EDICT (arXiv:2211.12446): two samples step in turn, each by the noise of the other, and are then mixed.

    Eq. 14 down and Eq. 15 up. Which of the two goes first changes with every step, as in the published code: on the way
    down the first one at the first step.

    Options:
        mix_weight: p of Eq. 14, 0.5 to 1; None = 0.93, and with more than 50 steps what comes to the same over all of
            them: a way up widens the gap between the two by 1 / p^2 in each step.
    """

    name = "edict"
    exact = True

    _: KW_ONLY
    mix_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix_weight is not None:
            real("mix_weight of edict", self.mix_weight, 0.5, 1)

    def weight(self, level: Level) -> float:
        """Give p for a run of so many steps."""
        return 0.93 ** (50 / max(50, level.total)) if self.mix_weight is None else self.mix_weight

    def begin(self, run: Run, x0: Tensor) -> Pair:
        return fine(x0), fine(x0)

    def up(self, run: Run, state: Pair, here: Level, to: Level) -> tuple[Pair, None]:
        p, first = self.weight(to), (to.total - to.left) % 2
        x, y = state
        y = (y - (1 - p) * x) / p
        pair = [(x - (1 - p) * y) / p, y]
        for i in (1 - first, first):
            pair[i] = rise(pair[i], run.eps(pair[1 - i], to), here, to)
        return (pair[0], pair[1]), None

    def changed(self, state: Pair, change: Callable[[Tensor], Tensor]) -> Pair:
        x = change(state[0])
        return x, state[1] + (x - state[0])  # the gap between the two is what the inversion needs

    def down(self, run: Run, state: Pair, here: Level, to: Level, kept: Any) -> Pair:
        p, first = self.weight(here), (here.total - here.left) % 2
        pair = list(state)
        for i in (first, 1 - first):
            pair[i] = fall(pair[i], run.eps(pair[1 - i], here), here, to)
        x = p * pair[0] + (1 - p) * pair[1]
        return x, p * pair[1] + (1 - p) * x


@dataclass
class TwoStep(Method):
    """A step down from two levels: x_below = g x_above + (DDIM down) - g (DDIM up), both from x with its one noise.

    Linear in x_above, it can be undone. States are (x, x_below) on the way up and (x, x_above) on the way down. The
    first step up is DDIM's; the first step down, with nothing above it, is remembered, and the same under any context.
    """

    exact = True

    def share(self, below: Level, here: Level, above: Level) -> float | Tensor:
        """Give g, how much of the noisier sample goes into the cleaner one."""
        raise NotImplementedError

    def plan(self, alpha_bar: np.ndarray, steps: int, spacing: str | Sequence[float] | None) -> list[Level]:
        *levels, end = super().plan(alpha_bar, steps, spacing)
        # A step between equal levels cannot be undone: where the level 0 is stepped from, the end is the clean one.
        if end.alpha_bar == levels[-1].alpha_bar:
            end = replace(end, alpha_bar=torch.ones_like(end.alpha_bar))
        return [*levels, end]

    def begin(self, run: Run, x0: Tensor) -> Tensor:
        return fine(x0)

    def up(self, run: Run, state: Any, here: Level, to: Level) -> tuple[Pair, Tensor]:
        if here.left == 0:
            return (rise(state, run.eps(state, to), here, to), state), state
        x, x_below = state
        below = run.level(here.left - 1)
        eps, g = run.eps(x, here), self.share(below, here, to)
        return ((x_below - fall(x, eps, here, below)) / g + rise(x, eps, here, to), x), x

    def resume(self, run: Run, state: Any, above: Any = None) -> tuple[Tensor, Tensor | None]:
        return sample_of(state), None if above is None else sample_of(above)

    def changed(self, state: Any, change: Callable[[Tensor], Tensor]) -> Any:
        return change(state[0]), state[1]

    def down(self, run: Run, state: Any, here: Level, to: Level, kept: Tensor) -> Pair:
        x, x_above = state
        if x_above is None:
            return kept, x
        above = run.level(here.left + 1)
        eps, g = run.eps(x, here), self.share(to, here, above)
        return g * (x_above - rise(x, eps, here, above)) + fall(x, eps, here, to), x


@dataclass
class BDIA(TwoStep):
    """BDIA-DDIM (arXiv:2307.10829): the mean of a step down and of the step up before it, read backwards.

    Options:
        gamma: 0 to 1 (0 left out), weight of the step up; at 1 up and down are the same step.
    """

    name = "bdia"

    _: KW_ONLY
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        real("gamma of bdia", self.gamma, 0.01, 1)

    def share(self, below: Level, here: Level, above: Level) -> float:
        return self.gamma


@dataclass
class BELM(TwoStep):
    """O-BELM (arXiv:2410.07273): of the two-step formulas the one with the least local error, of second order.

    With x / sqrt(alpha_bar) over sigma, h the step down and k the one from above: x_below = (h/k)^2 x_above +
    (1 - (h/k)^2) x - h (1 + h/k) eps. Steps down damp errors as steps up let them grow, by (k/h)^2: what a way up
    arrives at has more than unit variance, the more the higher the guidance, and leads back all the same.
    """

    name = "belm"

    def share(self, below: Level, here: Level, above: Level) -> Tensor:
        ratio = (here.sigma - below.sigma) / (above.sigma - here.sigma)
        return (below.alpha_bar / above.alpha_bar).sqrt() * ratio**2
