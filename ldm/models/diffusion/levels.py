"""Plans: the levels that a run goes through, cleanest first; and the one loop over them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UsageError, nearest, shown
from ldm.process.schedule import LEAST_SIGNAL
from ldm.process.sigmas import (
    SIGMA_TABLES,
    alpha_bar_of_sigma,
    check_sigmas,
    resolve_sigma_table,
    sigma_of_alpha_bar,
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
from ldm.process.steps import ddim_std

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


class Level(NamedTuple):
    """One level of a plan. Plans list theirs cleanest first, as the tables of DDIM do.

    Attributes:
        index: place in the plan, 0 = cleanest.
        total: length of the plan.
        t: what the network is called with: a number, or (b,) one per image.
        t_next: the same at the level stepped to (the plan's cleanest stays where it is).
        alpha_bar, alpha_bar_prev: 0-d, here and at the level stepped to.
        std: 0-d, standard deviation of the fresh noise.
    """

    index: int
    total: int
    t: float | Tensor
    t_next: float | Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    std: Tensor

    @property
    def sigma(self) -> Tensor:
        """Noise over signal here, sqrt((1 - alpha_bar) / alpha_bar)."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    @property
    def sigma_prev(self) -> Tensor:
        """The same at the level stepped to, 0 at the clean end."""
        return ((1 - self.alpha_bar_prev) / self.alpha_bar_prev).sqrt()

    @property
    def log_snr(self) -> Tensor:
        """log(alpha_bar / (1 - alpha_bar)) here."""
        return self.alpha_bar.log() - (1 - self.alpha_bar).log()


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


def resolve_spacing(name: str) -> str:
    """Find a spacing by its name; those of tables of sigmas in any common spelling.

    Raises:
        UsageError: there is none; the message lists some, and the nearest.
    """
    if name in (*EXACT_METHODS, "compvis"):
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


def visited_levels(
    spacing: str | Sequence[float],
    steps: int,
    alpha_bar: np.ndarray,
    *,
    discard_next_to_last: bool = False,
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """List the levels of a run by any name there is for a spacing, or by their sigmas.

    Args:
        spacing: a name that `resolve_spacing` knows; or steps + 1 sigmas, descending.
        alpha_bar: (T,) float64, of the model.
        discard_next_to_last: of a table of sigmas, see `sigma_table`.

    Returns:
        (t, alpha_bar, end), cleanest first: t (n,) is whole where the names of whole levels say so and fractional
        elsewhere; end is the alpha_bar that the last step goes to, None where the spacing does not say.

    Raises:
        UsageError: an unknown name, steps out of range, or a list that does not fall or is of another length.
    """
    signal = np.maximum(alpha_bar, LEAST_SIGNAL)
    own = sigma_of_alpha_bar(signal)
    if isinstance(spacing, str):
        spacing = resolve_spacing(spacing)
        if spacing not in SIGMA_TABLES:
            levels = choose_levels(spacing, steps, len(alpha_bar))
            return levels, alpha_bar[levels], None
        if spacing in CONTINUOUS_METHODS:
            t, between = continuous_levels(spacing, steps, signal)
            return t[1:], between[1:], between[0]
        sigmas = sigma_table(spacing, steps, own, discard_next_to_last=discard_next_to_last)
    else:
        sigmas = check_sigmas(spacing)
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


def make_plan(t: np.ndarray, alpha_bar: np.ndarray, final: float, eta: float) -> list[Level]:
    """Join levels, cleanest first, into a plan whose last step goes to alpha_bar = `final`."""
    here = torch.as_tensor(alpha_bar, dtype=torch.float64)
    prev = torch.cat([here.new_tensor([final]), here[:-1]])
    times = t.tolist()
    rows = zip(here.unbind(), prev.unbind(), ddim_std(here, prev, eta).unbind(), strict=True)
    return [Level(i, len(times), times[i], times[max(i - 1, 0)], *row) for i, row in enumerate(rows)]


@torch.no_grad()
def run_levels(
    levels: Iterable[Level],
    x: Tensor,
    step: Callable[[Tensor, Level], tuple[Tensor, Tensor]],
    before: Callable[[Tensor, Level], Tensor] | None = None,
) -> Iterator[Step]:
    """Take a sample through levels, in the order given, and yield each step. The only loop of this package.

    Args:
        x: (b, ...) sample at the first level.
        step: from sample and level to (next sample, predicted clean sample).
        before: changes the sample before each step, e.g. blends a known image in.
    """
    levels = list(levels)
    for index, level in enumerate(levels):
        if before is not None:
            x = before(x, level)
        x, pred_x0 = step(x, level)
        yield Step(index, len(levels), float(level.t), x, pred_x0)


def alpha_bar_table(model: Any) -> np.ndarray:
    """Copy the model's alphas_cumprod (T,) into float64, where the levels are computed."""
    return model.alphas_cumprod.detach().cpu().double().numpy()
