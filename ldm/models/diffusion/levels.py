"""Levels, plans of the levels that a run goes through, and the one loop over them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UsageError, nearest, shown
from ldm.process.scalars import scalar, tensor
from ldm.process.schedule import LEAST_SIGNAL
from ldm.process.sigmas import (
    SIGMA_TABLES,
    alpha_bar_of_sigma,
    check_sigmas,
    resolve_sigma_table,
    sigma_of_alpha_bar,
    sigma_of_t,
    sigma_table,
    t_of_sigma,
)
from ldm.process.spacing import (
    CONTINUOUS_METHODS,
    EXACT_METHODS,
    check_steps,
    compvis_levels,
    continuous_levels,
    exact_levels,
)

Noise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One finished step of a run.

    Attributes:
        index: 0-based, of `total` in this run.
        t: the level that the network was called with; fractional for dpm_solver.
        x_t: (b, ...) the sample after the step.
        pred_x0: (b, ...) the clean sample as predicted in this step: what to preview.
    """

    index: int
    total: int
    t: float
    x_t: Tensor
    pred_x0: Tensor


@dataclass(frozen=True, eq=False)
class Level:
    """How noisy a sample is: the number that the network is called with, and the fraction of signal variance.

    Attributes:
        t: in the model's levels, fractional between two; or (b,), one per image. 0 at the clean end, which has none.
        alpha_bar: 0-d, best float64 on the CPU; or (b,). 1 is clean.
        left: how many steps of its plan are left from here, 0 at the plan's end.
        total: how many steps its plan has.
    """

    t: float | Tensor
    alpha_bar: Tensor
    left: int = 0
    total: int = 0

    @cached_property
    def sigma(self) -> Tensor:
        """Noise over signal, sqrt((1 - alpha_bar) / alpha_bar): k-diffusion's unit. 0 at the clean end."""
        alpha_bar = scalar(self.alpha_bar)
        if isinstance(alpha_bar, Tensor):
            return ((1 - alpha_bar) / alpha_bar).sqrt()
        return tensor(math.sqrt((1 - alpha_bar) / alpha_bar))

    @cached_property
    def log_snr(self) -> Tensor:
        """log(alpha_bar / (1 - alpha_bar)); infinite at the clean end."""
        return self.alpha_bar.log() - (1 - self.alpha_bar).log()


class LevelTable:
    """The levels of a model, whole ones and those between: sigma to level, and back by `Level.sigma`.

    Args:
        alpha_bar: (T,) float64, falling; a level without signal counts as one with a 2^24th.
    """

    def __init__(self, alpha_bar: np.ndarray):
        self.alpha_bar = np.maximum(alpha_bar, LEAST_SIGNAL)
        self.sigmas = sigma_of_alpha_bar(self.alpha_bar)
        self.log_sigmas, self._t = np.log(self.sigmas), np.arange(len(self.sigmas), dtype=np.float64)

    def at_sigma(self, sigma: float) -> Level:
        """Give the level of a sigma, 0 or above; t is linear in log sigma and stays within the model's ends."""
        alpha_bar = torch.tensor(1 / (1 + sigma**2), dtype=torch.float64)
        return Level(self.t_of_sigma(sigma) if sigma > 0 else 0.0, alpha_bar)

    def t_of_sigma(self, sigma: float) -> float:
        """Give the fractional t of a sigma above 0, as `ldm.process.sigmas.t_of_sigma` does of many."""
        return float(np.interp(math.log(sigma), self.log_sigmas, self._t))

    def at_t(self, t: float) -> Level:
        """Give the level of t, from 0 to T - 1."""
        return self.at_sigma(float(sigma_of_t(t, self.sigmas)))


def unit_noise(like: Tensor) -> Tensor:
    """Draw unit normal noise from the global generator of the tensor's device, as CompVis does."""
    return torch.randn(like.shape, device=like.device, dtype=like.dtype)


def choose_levels(spacing: str, steps: int, num_train: int) -> np.ndarray:
    """List `steps` levels by a name of `exact_levels`, or CompVis's historic list by "compvis".

    Raises:
        UsageError: an unknown name, steps outside 1..num_train, or a historic list that leaves the table.
    """
    if spacing != "compvis":
        return exact_levels(spacing, check_steps(steps, num_train, name="steps"), num_train)
    return check_levels(compvis_levels("uniform", steps, num_train), num_train)


def explicit_levels(spacing: str | Sequence[float] | None) -> tuple[str, Sequence[float]] | None:
    """Read a spacing that lists its levels itself: ("t" or "sigma", numbers); None where it is a name.

    A list holds sigmas; a text begins with what it lists, as "t=999,749,499" or "sigma=14.6,3,0".

    Raises:
        UsageError: a text that holds no numbers.
    """
    if spacing is None or not isinstance(spacing, str):
        return None if spacing is None else ("sigma", spacing)
    kind, equals, numbers = spacing.partition("=")
    if not equals or kind.strip() not in ("t", "sigma"):
        return None
    try:
        return kind.strip(), [float(one) for one in numbers.split(",")]
    except ValueError:
        raise UsageError(
            f"a spacing that lists its levels is numbers with commas between, as t=999,749,499; got {shown(spacing)}"
        ) from None


def check_timesteps(values: Sequence[float], num_train: int) -> np.ndarray:
    """Return an explicit list of t, as float64, or raise UsageError unless it falls within 0..num_train - 1."""
    t = np.asarray(values, dtype=np.float64)
    if not (np.diff(t) < 0).all() or not (t >= 0).all() or not (t <= num_train - 1).all():
        raise UsageError(
            f"a list of t must fall from t to t, each from 0 to {num_train - 1}, got {shown(list(values))}"
        )
    return t


def resolve_spacing(name: str) -> str:
    """Find a spacing by its name; those of tables of sigmas in any common spelling. One that lists its levels stays.

    Raises:
        UsageError: there is none; the message lists some, and the nearest.
    """
    if name in (*EXACT_METHODS, "compvis") or explicit_levels(name) is not None:
        return name
    found = resolve_sigma_table(name)
    if found is None:
        names = list(dict.fromkeys((*EXACT_METHODS, "compvis", *SIGMA_TABLES)))
        near = nearest(name, names, 0.7)
        hint = f" (did you mean {near}?)" if near else ""
        some = ", ".join((*EXACT_METHODS, "compvis", "karras", "exponential", "sgm_uniform"))
        raise UsageError(
            f"the spacing must be one of {some} or others of docs/samplers.md; got {shown(name)}{hint}"
        )
    return found


def is_table(spacing: str | Sequence[float]) -> bool:
    """Tell whether a spacing is a table of sigmas by name, which has options."""
    name = resolve_sigma_table(spacing) if isinstance(spacing, str) else None
    return name is not None and name not in (*CONTINUOUS_METHODS, *EXACT_METHODS)


def visited_levels(
    spacing: str | Sequence[float],
    steps: int,
    alpha_bar: np.ndarray,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """List the levels of a run by any name there is for a spacing, or by their sigmas.

    Args:
        spacing: a name that `resolve_spacing` knows; or steps + 1 sigmas, descending, as a list or as
            "sigma=14.6,3,0"; or as many t as steps, as "t=999,749,499", from the last of which the sampler goes
            where its own spacings end.
        alpha_bar: (T,) float64, of the model.
        options: of a table of sigmas, see `sigma_table`.

    Returns:
        (t, alpha_bar, end), cleanest first: t (n,) is whole where the names of whole levels say so and fractional
        elsewhere; end is the alpha_bar that the last step goes to, None where the spacing does not say.

    Raises:
        UsageError: an unknown name or option, steps out of range, or a list that does not fall or is of another length.
    """
    signal = np.maximum(alpha_bar, LEAST_SIGNAL)
    own = sigma_of_alpha_bar(signal)
    listed = explicit_levels(spacing)
    if listed is None:
        spacing = resolve_spacing(spacing)
        if options and not is_table(spacing):
            raise UsageError(
                f"the spacing '{spacing}' has no option {', '.join(options)}; tables of sigmas have, as 'karras'"
            )
        if spacing not in SIGMA_TABLES:
            levels = choose_levels(spacing, steps, len(alpha_bar))
            return levels, alpha_bar[levels], None
        if spacing in CONTINUOUS_METHODS:
            t, between = continuous_levels(spacing, steps, signal)
            return t[1:], between[1:], between[0]
        sigmas = sigma_table(spacing, steps, own, **options)
    else:
        if options:
            raise UsageError(
                f"a list of sigmas or of t has no option {', '.join(options)}; it says itself which levels it visits"
            )
        kind, numbers = listed
        if kind == "t":
            t = check_timesteps(numbers, len(alpha_bar))[::-1]
            if len(t) != steps:
                raise UsageError(f"{steps} steps need {steps} t, got {len(t)}")
            whole = t.astype(np.int64)
            if (t == whole).all():
                return whole, alpha_bar[whole], None
            return t, alpha_bar_of_sigma(sigma_of_t(t, own)), None
        sigmas = check_sigmas(numbers)
        if len(sigmas) != steps + 1:
            raise UsageError(f"{steps} steps need {steps + 1} sigmas, the end included; got {len(sigmas)}")
    between = alpha_bar_of_sigma(sigmas[::-1])
    t = t_of_sigma(sigmas[:-1][::-1], own)
    whole = np.rint(t)  # levels that went through a logarithm and back
    return np.where(np.abs(t - whole) < 1e-6, whole, t), between[1:], float(between[0])


def check_levels(levels: np.ndarray, num_train: int) -> np.ndarray:
    """Return levels, or raise UsageError if the highest is none of the model's."""
    if levels[-1] >= num_train:
        raise UsageError(
            f"the historic spacing wants level {levels[-1]} of a model whose highest is {num_train - 1}; take "
            "another number of steps, or the spacing 'uniform'"
        )
    return levels


def make_plan(t: np.ndarray, alpha_bar: np.ndarray, final: float) -> list[Level]:
    """Join levels, given cleanest first, into a plan: noisiest first, and then the level alpha_bar = `final`."""
    total = len(t)
    rows = zip(reversed(t.tolist()), torch.tensor(alpha_bar[::-1].copy(), dtype=torch.float64), strict=True)
    plan = [Level(time, level, total - i, total) for i, (time, level) in enumerate(rows)]
    end = torch.tensor(float(final), dtype=torch.float64)
    return [*plan, Level(0 if isinstance(plan[0].t, int) else 0.0, end, 0, total)]


StepTo = Callable[[Tensor, Level, Level], tuple]


@torch.no_grad()
def run_levels(
    levels: Iterable[Level],
    x: Tensor,
    step: StepTo,
    before: Callable[[Tensor, Level], Tensor] | None = None,
) -> Iterator[Step]:
    """Take a sample through levels, in the order given, and yield each step. The only loop of this package.

    Args:
        levels: the first is where x is, the last where the run ends.
        x: (b, ...) sample at the first level.
        step: from sample, its level and the next to (sample there, predicted clean sample). A third value is the level
            where it stopped before the next one. A predicted sample of None makes no step of its own: the move belongs
            to the one that comes after (Restart's way back up).
        before: changes the sample before each step, e.g. blends a known image in.
    """
    levels = list(levels)
    here, rest = (levels[0], levels[1:]) if levels else (None, [])
    index, total = 0, here.left - rest[-1].left if rest and here.left > rest[-1].left else len(rest)
    for to in rest:
        while here is not to:
            if before is not None:
                x = before(x, here)
            t = here.t
            x, pred_x0, *stop = step(x, here, to)
            here = stop[0] if stop else to
            if pred_x0 is None:
                continue
            total += here is not to
            yield Step(index, total, float(t), x, pred_x0)
            index += 1


def alpha_bar_table(model: Any) -> np.ndarray:
    """Copy the model's alphas_cumprod (T,) into float64, where the levels are computed."""
    return model.alphas_cumprod.detach().cpu().double().numpy()
