"""DDIM, PNDM, Euler, Euler ancestral and DPM-Solver++ digit by digit as diffusers' schedulers compute them.

Our own samplers work their factors out in float64, from a table made in float64. diffusers' are float32 throughout, and
the order of their operations is another; after some steps and a decoder that is a byte of one pixel in ten thousand.
Here it is none: tables, factors and operations are those of src/diffusers/schedulers of diffusers 0.42, one class each.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UsageError, shown
from ldm.models.diffusion.denoiser import WHOLE_INTERVAL, Denoiser
from ldm.models.diffusion.levels import Noise, Step, unit_noise
from ldm.models.diffusion.samplers.masks import Noised, keeping
from ldm.process.spacing import check_steps, exact_levels

SPACINGS = ("leading", "trailing", "linspace")
RULES = {
    "mask_rule": ("compvis", "diffusers"),  # the others blend predictions
    "strength_rule": ("compvis",),
    "first_noise": (None,),
    "final_alpha": (None,),
}


@dataclass
class Schedule:
    """What one of diffusers' schedulers does with a sample; x is in its own units.

    Args:
        alphas: (T,) float32 table of alpha_bar.
        steps, spacing: how many steps over which levels.
        eta: share of fresh noise, of DDIM.

    Attributes:
        times: what the network is called with, in this order.
    """

    own_spacing: ClassVar[str] = "leading"
    takes_eta: ClassVar[bool] = False

    alphas: Tensor
    steps: int
    spacing: str
    eta: float = 0.0
    times: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.times = self.levels()

    @classmethod
    def calls(cls, steps: int) -> int:
        """Tell how often the network is called in so many steps."""
        return steps

    def levels(self) -> list[Any]:
        """List the levels that are visited, noisiest first."""
        return exact_levels(self.spacing, self.steps, len(self.alphas))[::-1].tolist()

    def alpha(self, i: int) -> Tensor:
        """Give alpha_bar of the i-th call's level."""
        return self.alphas[self.times[i]]

    def pure(self, noise: Tensor) -> Tensor:
        """Make the sample that a whole run begins with."""
        return noise

    def noised(self, z: Tensor, noise: Tensor, i: int) -> Tensor:
        """Noise a clean z to the level of the i-th call."""
        alpha = self.alpha(i)
        return alpha**0.5 * z + (1 - alpha) ** 0.5 * noise

    def seen(self, x: Tensor, i: int) -> Tensor:
        """Give what the network sees of a sample."""
        return x

    def ours(self, x: Tensor, i: int) -> Tensor:
        """Give a sample at the level of the i-th call, or behind the last one, in our units."""
        return x

    def step(self, eps: Tensor, x: Tensor, i: int, draw: Noise) -> tuple[Tensor, Tensor]:
        """Step from the i-th call's level to the next: (sample there, predicted clean sample)."""
        raise NotImplementedError


class DDIM(Schedule):
    """DDIMScheduler with clip_sample and set_alpha_to_one off, as Stable Diffusion v1 has them."""

    takes_eta = True

    def before(self, t: int) -> Tensor:
        """Give alpha_bar a stride below a level; below all it is that of level 0."""
        return self.alphas[max(t - len(self.alphas) // self.steps, 0)]

    def step(self, eps: Tensor, x: Tensor, i: int, draw: Noise) -> tuple[Tensor, Tensor]:
        alpha, to = self.alpha(i), self.before(self.times[i])
        pred_x0 = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        std = self.eta * ((1 - to) / (1 - alpha) * (1 - alpha / to)) ** 0.5
        x = to**0.5 * pred_x0 + (1 - to - std**2) ** 0.5 * eps
        return x + std * draw(x) if self.eta > 0 else x, pred_x0


@dataclass
class PNDM(DDIM):
    """PNDMScheduler with skip_prk_steps: PLMS. Its second level is visited twice, a step more than are asked for.

    A run that begins later takes its second call for that visit, though it is at the next level: so does diffusers'.
    """

    takes_eta = False

    past: list[Tensor] = field(default_factory=list, init=False, repr=False)
    first: Tensor | None = field(default=None, init=False, repr=False)
    counter: int = field(default=0, init=False, repr=False)

    @classmethod
    def calls(cls, steps: int) -> int:
        return steps + (steps > 1)

    def levels(self) -> list[Any]:
        once = super().levels()
        return [*once[:2], *once[1:]]

    def step(self, eps: Tensor, x: Tensor, i: int, draw: Noise) -> tuple[Tensor, Tensor]:
        t = self.times[i]
        stride = len(self.alphas) // self.steps
        if self.counter == 1:
            alpha, to = self.alphas[t + stride], self.alphas[t]
            eps, x = (eps + self.past[-1]) / 2, self.first
        else:
            alpha, to = self.alphas[t], self.before(t)
            self.past, self.first = [*self.past[-3:], eps], x
            eps = self.extrapolated()
        self.counter += 1
        pred_x0 = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        below = alpha * (1 - to) ** 0.5 + (alpha * (1 - alpha) * to) ** 0.5
        return (to / alpha) ** 0.5 * x - (to - alpha) * eps / below, pred_x0

    def extrapolated(self) -> Tensor:
        """Extrapolate the noise from its past: Adams-Bashforth."""
        past = self.past
        if len(past) == 1:
            return past[0]
        if len(past) == 2:
            return (3 * past[-1] - past[-2]) / 2
        if len(past) == 3:
            return (23 * past[-1] - 16 * past[-2] + 5 * past[-3]) / 12
        return (1 / 24) * (55 * past[-1] - 59 * past[-2] + 37 * past[-3] - 9 * past[-4])


@dataclass
class Euler(Schedule):
    """EulerDiscreteScheduler: x is the clean sample plus sigma times noise."""

    own_spacing = "linspace"

    sigmas: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        table = ((1 - self.alphas) / self.alphas).sqrt().numpy()
        at = np.interp(self.times, np.arange(len(table)), table)
        self.sigmas = torch.from_numpy(np.concatenate([at, [0.0]]).astype(np.float32))

    def levels(self) -> list[Any]:
        if self.spacing == "linspace":
            between = np.linspace(0, len(self.alphas) - 1, self.steps, dtype=np.float32)[::-1]
            return between.tolist()
        return [float(t) for t in super().levels()]

    def alpha(self, i: int) -> Tensor:
        return 1 / (1 + self.sigmas[i] ** 2)

    def pure(self, noise: Tensor) -> Tensor:
        top = self.sigmas.max()
        return noise * ((top**2 + 1) ** 0.5 if self.spacing == "leading" else top)

    def noised(self, z: Tensor, noise: Tensor, i: int) -> Tensor:
        return z + noise * self.sigmas[i]

    def seen(self, x: Tensor, i: int) -> Tensor:
        return x / (self.sigmas[i] ** 2 + 1) ** 0.5

    ours = seen

    def step(self, eps: Tensor, x: Tensor, i: int, draw: Noise) -> tuple[Tensor, Tensor]:
        sigma = self.sigmas[i]
        pred_x0 = x - sigma * eps
        return x + (x - pred_x0) / sigma * (self.sigmas[i + 1] - sigma), pred_x0


class EulerAncestral(Euler):
    """EulerAncestralDiscreteScheduler, which draws noise at every step, the last one, too."""

    def step(self, eps: Tensor, x: Tensor, i: int, draw: Noise) -> tuple[Tensor, Tensor]:
        sigma, to = self.sigmas[i], self.sigmas[i + 1]
        pred_x0 = x - sigma * eps
        up = (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5
        down = (to**2 - up**2) ** 0.5
        return x + (x - pred_x0) / sigma * (down - sigma) + draw(x) * up, pred_x0


@dataclass
class DPMSolverPP2M(Euler):
    """DPMSolverMultistepScheduler as it comes: dpmsolver++ of order 2, midpoint, over whole levels to the clean end."""

    last: Tensor | None = field(default=None, init=False, repr=False)

    def levels(self) -> list[Any]:
        count, steps = len(self.alphas), self.steps
        if self.spacing == "trailing":
            return Schedule.levels(self)
        if self.spacing == "leading":
            found = np.arange(steps + 1) * (count // (steps + 1)) + 1
        else:
            found = np.linspace(0, count - 1, steps + 1).round().astype(np.int64)
        return found[::-1][:-1].tolist()

    def pure(self, noise: Tensor) -> Tensor:
        return noise

    def parts(self, i: int) -> tuple[Tensor, Tensor]:
        """Give the shares of the clean sample and of the noise."""
        alpha = 1 / (self.sigmas[i] ** 2 + 1) ** 0.5
        return alpha, self.sigmas[i] * alpha

    def noised(self, z: Tensor, noise: Tensor, i: int) -> Tensor:
        alpha, sigma = self.parts(i)
        return alpha * z + sigma * noise

    def seen(self, x: Tensor, i: int) -> Tensor:
        return x

    ours = seen

    def step(self, eps: Tensor, x: Tensor, i: int, draw: Noise) -> tuple[Tensor, Tensor]:
        (alpha, sigma), (to_alpha, to_sigma) = self.parts(i), self.parts(i + 1)
        pred_x0 = (x - sigma * eps) / alpha
        clock = alpha.log() - sigma.log()
        h = to_alpha.log() - to_sigma.log() - clock
        before, self.last = self.last, pred_x0
        grown = to_alpha * ((-h).exp() - 1.0)
        there = (to_sigma / sigma) * x - grown * pred_x0
        if before is None or i == len(self.times) - 1:
            return there, pred_x0
        last_alpha, last_sigma = self.parts(i - 1)
        r = (clock - (last_alpha.log() - last_sigma.log())) / h
        return there - 0.5 * grown * ((1.0 / r) * (pred_x0 - before)), pred_x0


SCHEDULES: dict[str, type[Schedule]] = {
    "ddim": DDIM,
    "plms": PNDM,
    "euler": Euler,
    "euler_a": EulerAncestral,
    "dpmpp_2m": DPMSolverPP2M,
}


def alphas_in_float32(model: Any) -> Tensor:
    """Make the table of alpha_bar (T,) as diffusers does, wholly in float32.

    From the ends of the model's betas where they are linear in their square roots, as Stable Diffusion v1's, and else
    from the betas that it has.
    """
    betas = model.betas.detach().cpu().float()
    ends = [getattr(model, name, math.nan) ** 0.5 for name in ("linear_start", "linear_end")]
    made = torch.linspace(*ends, len(betas), dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - (made if torch.allclose(made, betas, rtol=1e-5, atol=0) else betas), dim=0)


def check_schedule(
    sampler: str, spacing: Any, steps: int, num_train: int, others: dict[str, Any]
) -> tuple[type[Schedule], str]:
    """Find the schedule of a sampler, and its spacing where None is given.

    Args:
        others: options of samplers and spacings, which none of these has; None is not set.

    Raises:
        UsageError: another sampler, spacing or option, or a number of steps that leaves the table.
    """
    if sampler not in SCHEDULES:
        raise UsageError(
            f"arithmetic 'diffusers' is of {', '.join(SCHEDULES)}, got sampler {shown(sampler)}; take arithmetic 'own'"
        )
    cls = SCHEDULES[sampler]
    spacing = cls.own_spacing if spacing is None else spacing
    if spacing not in SPACINGS:
        raise UsageError(
            f"arithmetic 'diffusers' has the spacings {', '.join(SPACINGS)}, got {shown(spacing)}; take "
            "arithmetic 'own'"
        )
    if said := sorted(name for name, value in others.items() if value is not None):
        raise UsageError(f"arithmetic 'diffusers' has no option {', '.join(said)}; take arithmetic 'own'")
    if check_steps(steps, num_train, name="steps") >= num_train:
        raise UsageError(f"arithmetic 'diffusers' takes at most {num_train - 1} steps, got {steps}")
    return cls, spacing


def check_rules(**rules: Any) -> None:
    """Raise UsageError for rules of other programs that no pipeline of diffusers has, by the names of their options."""
    for name, rule in rules.items():
        if rule not in RULES[name]:
            allowed = " and ".join(map(str, RULES[name]))
            raise UsageError(
                f"arithmetic 'diffusers' has the {name} {allowed}, got {shown(rule)}; take arithmetic 'own'"
            )


def last_calls(sampler: str, steps: int, strength: float) -> int:
    """Tell how many calls of the network are left of a picture's strength, as diffusers' pipelines count."""
    count = int(steps * strength)
    return count + SCHEDULES[sampler].calls(steps) - steps if count else 0


def steps_as_diffusers(
    name: str,
    model: Any,
    x_T: Tensor,
    conditioning: Any,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    unconditional_conditioning: Any = None,
    eta: float | None = None,
    noise: Noise | None = None,
    run_last: int | None = None,
    start_from: Tensor | None = None,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: Sequence[float] = WHOLE_INTERVAL,
    separate_passes: bool = False,
    spacing: str | None = None,
    behind: Callable[[Tensor], Tensor] | None = None,
    mask_rule: str = "diffusers",
    **options: Any,
) -> Iterator[Step]:
    """Sample as a pipeline of diffusers does, one call of the network at a time.

    Args:
        as in `sample_steps`, but for these:
        name: of SCHEDULES.
        guidance_scale: up to 1 nothing is guided.
        run_last: so many calls, see `last_calls`.
        start_from: where given, it is noised also before a whole run.

    Raises:
        UsageError: what `check_schedule` and `check_rules` refuse, or a value out of range.
    """
    cls, spacing = check_schedule(name, spacing, steps, model.num_timesteps, options)
    if mask is not None:
        check_rules(mask_rule=mask_rule)
    eta = eta if eta is not None and cls.takes_eta else 0.0
    schedule = cls(alphas_in_float32(model), steps, spacing, eta)
    denoise = Denoiser(
        model,
        conditioning,
        unconditional_conditioning=unconditional_conditioning,
        guidance_scale=max(guidance_scale, 1.0),
        guidance_rescale=guidance_rescale,
        guidance_interval=guidance_interval,
        separate_passes=separate_passes,
    )
    draw = unit_noise if noise is None else noise
    first = 0 if run_last is None else len(schedule.times) - run_last
    x = schedule.pure(x_T) if start_from is None else schedule.noised(start_from, x_T, first)
    keep = None if mask is None else keeping(mask_rule, mask, x0, draw, x_T)
    return _calls(schedule, denoise, x, first, draw, keep, behind)


@torch.no_grad()
def _calls(
    schedule: Schedule,
    denoise: Denoiser,
    x: Tensor,
    first: int,
    draw: Noise,
    keep: Callable[[Tensor, Noised, bool], Tensor] | None,
    behind: Callable[[Tensor], Tensor] | None,
) -> Iterator[Step]:
    total = len(schedule.times)
    for i in range(first, total):
        if keep is not None:
            x = keep(x, partial(schedule.noised, i=i), i == first)
        t = schedule.times[i]
        eps, _ = denoise(schedule.seen(x, i), t, schedule.alpha(i))
        x, pred_x0 = schedule.step(eps, x, i, draw)
        x = x if behind is None else behind(x)
        yield Step(i - first, total - first, float(t), schedule.ours(x, i + 1), pred_x0)
