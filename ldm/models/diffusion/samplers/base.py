"""What every sampler is: how to begin at a level, and how to step from one level to another."""

import math
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm import limits
from ldm.errors import UsageError, shown
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.levels import Level, Noise, is_table, make_plan, unit_noise, visited_levels
from ldm.models.diffusion.sampling_util import norm_thresholding
from ldm.process.gaussian import q_sample
from ldm.process.prediction import to_x0
from ldm.process.scalars import Scalar, scalar, sqrt, tensor
from ldm.process.schedule import LEAST_SIGNAL
from ldm.process.spacing import check_steps
from ldm.process.steps import ddim_inverse_step


@dataclass
class Sampler:
    """One run of one algorithm. What it remembers of earlier steps is in fields with init=False, so a run needs a
    fresh object; every other field is an option.

    Options of every sampler:
        eta: how much fresh noise a step adds, where `accepts_eta` takes it; None = the sampler's own.
        quantize_denoised: snap each predicted clean sample to the first stage's codebook.
        dynamic_threshold: shrink each predicted clean sample to at most this root mean square; None leaves it.

    Attributes:
        levels: those of the run, noisiest first, for a sampler that looks further than a step; no option.
        plan_levels: those of the whole plan, of which a run that begins with a picture takes the last; no option.
    """

    name: ClassVar[str]
    spacing: ClassVar[str]  # its own, where a request names none
    ends_clean: ClassVar[bool] = True  # over whole levels: to alpha_bar 1, and not to the level 0
    skips_lowest: ClassVar[bool] = False  # of its own whole levels: the level 0 is not stepped from
    needs_signal: ClassVar[bool] = (
        False  # a level without signal counts as one with a 2^24th, as in diffusers
    )
    discard_next_to_last: ClassVar[bool] = False  # the last sigma above 0, of tables of sigmas
    starts_above: ClassVar[bool] = (
        False  # an image is noised to the level above the first one it is denoised from
    )
    needs_unconditional: ClassVar[bool] = False  # the prediction without the condition, whatever the guidance
    chooses_levels: ClassVar[bool] = False  # between the first and the last of its run
    inverts: ClassVar[bool] = (
        False  # also steps from a cleaner level to a noisier one, where it draws no noise
    )
    own_eta: ClassVar[float] = 0.0  # where a request names none
    idle: ClassVar[frozenset[str]] = (
        frozenset()
    )  # options of its base that mean nothing to it, and are none of it
    etas: ClassVar[str] = "must be 0: this sampler adds no noise"

    denoise: Denoiser
    noise: Noise = unit_noise
    _: KW_ONLY
    eta: float | None = None
    quantize_denoised: bool = False
    dynamic_threshold: float | None = None
    levels: Sequence[Level] = field(default=(), init=False, repr=False)
    plan_levels: Sequence[Level] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        check_kinds(self)
        self.eta = self.own_eta if self.eta is None else self.eta
        check_eta(type(self), self.eta)

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        """Tell whether eta means something to this sampler."""
        return eta == 0

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        spacing: str | Sequence[float] | None = None,
        **options: Any,
    ) -> list[Level]:
        """List the levels of a run over the given table (T,) float64: noisiest first, and last where it ends.

        Args:
            spacing: see `visited_levels`; None = the sampler's own.
            options: of the spacing, as rho of "karras".
        """
        alpha_bar = np.maximum(alpha_bar, LEAST_SIGNAL) if cls.needs_signal else alpha_bar
        own = cls.own_spacing(alpha_bar)
        spacing = own if spacing is None else spacing
        if cls.skips_lowest and isinstance(spacing, str) and spacing == own:
            count = check_steps(steps, len(alpha_bar))
            if count < len(alpha_bar):
                t, visited, _ = visited_levels(spacing, count + 1, alpha_bar, **options)
                return make_plan(t[1:], visited[1:], 1.0)
        if cls.discard_next_to_last and is_table(spacing):
            options = {"discard_next_to_last": True} | options
        t, visited, end = visited_levels(spacing, steps, alpha_bar, **options)
        if end is None:
            end = 1.0 if cls.ends_clean else alpha_bar[0]
        return make_plan(t, visited, end)

    @classmethod
    def own_spacing(cls, alpha_bar: np.ndarray) -> str:
        """Name the spacing where a request names none."""
        return cls.spacing

    @classmethod
    def start(cls, noise: Tensor, level: Level, z: Tensor | None = None) -> Tensor:
        """Make the sample at a level from unit noise, of the clean z (b, ...) or of pure noise (a whole run's)."""
        return noise if z is None else q_sample(z, noise, alpha_bar=level.alpha_bar)

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        """Step from a level to another, mostly a cleaner one: (sample there, predicted clean sample).

        To a noisier one (to.left > here.left) it inverts, where the class says that it can.
        """
        raise NotImplementedError

    def rise(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        """Step to a noisier level by the noise predicted there, as DDIM's inversion does; also from the clean end."""
        eps, _ = self.denoise(x, to.t, to.alpha_bar)
        x_to = ddim_inverse_step(x, eps, alpha_bar_t=here.alpha_bar, alpha_bar_next=to.alpha_bar)
        return x_to, to_x0("eps", eps, x, here.alpha_bar)

    def draw(self, x: Tensor, here: Level, to: Level) -> Tensor:
        """Draw unit normal noise shaped like x, for the step between two levels."""
        return self.noise(x)

    def quantize(self, pred_x0: Tensor) -> Tensor:
        if self.quantize_denoised:
            pred_x0 = self.denoise.model.first_stage_model.quantize(pred_x0)[0]
        if self.dynamic_threshold is None:
            return pred_x0
        return norm_thresholding(pred_x0, self.dynamic_threshold)


class VariableEta:
    """Of a sampler's bases the first, where eta says how much of the noise is fresh: 0 (none) to 1."""

    etas = "must be from 0 to 1"

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        """Tell whether eta means something to this sampler."""
        return 0 <= eta <= 1


@dataclass
class NoisySampler(Sampler):
    """A sampler that draws noise at every step, even where its weight is 0: CompVis does, and later draws of
    the same generator depend on it.

    Options:
        temperature: factor on the noise.
        noise_dropout: probability of zeroing a value of the noise (the others grow by 1 / (1 - p)).
        repeat_noise: the same noise for every image of the batch.
    """

    _: KW_ONLY
    temperature: float = 1.0
    noise_dropout: float = 0.0
    repeat_noise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        limits.real(f"noise_dropout of {self.name}", self.noise_dropout, *limits.SHARE)

    def draw(self, x: Tensor, here: Level, to: Level) -> Tensor:
        noise = self.noise(x[:1]).expand_as(x) if self.repeat_noise else self.noise(x)
        noise = noise * self.temperature if self.temperature != 1 else noise
        return torch.nn.functional.dropout(noise, p=self.noise_dropout) if self.noise_dropout > 0 else noise


@dataclass
class SigmaSampler(Sampler):
    """A sampler of k-diffusion: one method of theirs is `step_sigma`, around it are our units.

    They step in sigma's units, x / sqrt(alpha_bar) = x0 + sigma * noise. A whole run begins with noise times the
    highest sigma, as theirs do, which is sqrt(1 - alpha_bar) in our units.
    """

    spacing = "normal"
    needs_signal = True

    @classmethod
    def start(cls, noise: Tensor, level: Level, z: Tensor | None = None) -> Tensor:
        return (1 - level.alpha_bar).sqrt() * noise if z is None else super().start(noise, level, z)

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        alpha_bar = scalar(here.alpha_bar)
        if alpha_bar == 1:
            return self.rise(x, here, to)
        x, denoised = self.step_sigma(x / sqrt(alpha_bar), here, to)
        return sqrt(scalar(to.alpha_bar)) * x, denoised

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        """Step from here.sigma to to.sigma: (x there, predicted clean sample)."""
        raise NotImplementedError

    def predict(self, x: Tensor, sigma: Scalar) -> Tensor:
        """Predict the clean sample at any sigma above 0, a number or 0-d."""
        return self.quantize(self.denoise.at_sigma(x, tensor(sigma)))


def check_eta(cls: type[Sampler], eta: float) -> None:
    """Raise UsageError unless eta means something to the sampler."""
    if not is_number(eta) or not cls.accepts_eta(eta):
        raise UsageError(f"eta of {cls.name} {cls.etas}; got {shown(eta)}")


def is_number(value: object) -> bool:
    """Tell whether an option is a finite number."""
    return limits.is_real(value, -sys.float_info.max, sys.float_info.max)


def may_be_none(option: Field) -> bool:
    """Tell whether None is a value of an option, and not only the lack of one."""
    return option.default is None or "None" in str(option.type)


def check_kinds(sampler: Sampler) -> None:
    """Raise UsageError where an option is not of the kind that its default is; which values mean something, the class
    says."""
    for option in fields(sampler):
        if not option.init or option.name in ("denoise", "noise"):
            continue
        value, default = getattr(sampler, option.name), option.default
        also = option.metadata.get("also", ())  # texts beside the values of the default's kind
        if (value is None and may_be_none(option)) or (isinstance(value, str) and value in also):
            continue
        if isinstance(default, bool):
            fits, wanted = isinstance(value, bool | np.bool_ | int) and value in (0, 1), "True or False"
        elif isinstance(default, int):
            fits, wanted = limits.is_whole(value, -sys.maxsize, sys.maxsize), "a whole number"
        elif isinstance(default, str):
            fits, wanted = isinstance(value, str), "a text"
        elif isinstance(default, float) or option.type in (float, float | None, "float", "float | None"):
            # The ends of a range of sigmas may be open.
            ends = option.name in ("s_tmin", "s_tmax")
            fits, wanted = is_number(value) or (ends and value == math.inf), "a finite number"
        else:
            continue
        if not fits:
            hint = f"; or {', '.join(also)}" if also else ""
            raise UsageError(f"{option.name} of {sampler.name} must be {wanted}, got {shown(value)}{hint}")
