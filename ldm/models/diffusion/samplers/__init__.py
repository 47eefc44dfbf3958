"""The samplers: one short class per algorithm, the list of them by name, and `sample_steps`, which runs one.

A run is a plan (levels.py: the levels to go through), a denoiser (denoiser.py: the model with its conditions and
guidance) and a sampler (how to step from one level to the next). `sample_steps` joins them and yields every step, so
progress, preview and interruption need nothing from here. CompVis's DDIMSampler, PLMSSampler and DPMSolverSampler call
the same classes.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UsageError, nearest, shown
from ldm.models.diffusion.denoiser import WHOLE_INTERVAL, Denoiser, check_interval, predict_both
from ldm.models.diffusion.levels import (
    Level,
    Noise,
    Step,
    alpha_bar_table,
    check_levels,
    choose_levels,
    make_plan,
    resolve_spacing,
    run_levels,
    unit_noise,
    visited_levels,
)
from ldm.models.diffusion.sampling_util import norm_thresholding
from ldm.process.gaussian import q_sample
from ldm.process.guidance import first_tensor
from ldm.process.prediction import to_x0
from ldm.process.schedule import LEAST_SIGNAL
from ldm.process.sigmas import resolve_sigma_table
from ldm.process.spacing import check_steps
from ldm.process.steps import (
    SOLVER_TYPES,
    ddim_step,
    ddpm_step,
    dpm_solver_pp_step,
    dpm_solver_step,
    euler_step,
    heun_step,
    midpoint_step,
    multistep_weights,
    plms_eps,
)

__all__ = [
    "DDIM",
    "DDPM",
    "DPM2",
    "DPM2Ancestral",
    "DPMSolver",
    "DPMSolverPP2M",
    "DPMSolverPP2SAncestral",
    "Denoiser",
    "Euler",
    "EulerAncestral",
    "Heun",
    "LMS",
    "Level",
    "Noise",
    "NoisySampler",
    "PLMS",
    "SAMPLERS",
    "Sampler",
    "SigmaSampler",
    "Step",
    "WHOLE_INTERVAL",
    "alpha_bar_table",
    "predict_both",
    "check_eta",
    "check_interval",
    "check_levels",
    "check_mask",
    "choose_levels",
    "make_plan",
    "resolve_sampler",
    "run_levels",
    "sample_steps",
    "split_sampler",
    "start_level",
    "unit_noise",
    "visited_levels",
    "warn_of_batch",
]

logger = logging.getLogger(__name__)


@dataclass
class Sampler:
    """One run of one algorithm; a multistep one remembers its past, so a run needs a fresh object.

    Options of every sampler:
        quantize_denoised: snap each predicted clean sample to the first stage's codebook.
        dynamic_threshold: shrink each predicted clean sample to at most this root mean square; None leaves it.
    """

    name: ClassVar[str]
    spacing: ClassVar[str]  # its own, where a request names none
    ends_clean: ClassVar[bool] = True  # over whole levels: to alpha_bar 1, and not to the level 0
    discard_next_to_last: ClassVar[bool] = False  # the last sigma above 0, of tables of sigmas
    own_eta: ClassVar[float] = 0.0  # where a request names none
    etas: ClassVar[str] = "must be 0: this sampler adds no noise"

    denoise: Denoiser
    noise: Noise = unit_noise
    _: KW_ONLY
    quantize_denoised: bool = False
    dynamic_threshold: float | None = None

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        eta: float = 0.0,
        spacing: str | Sequence[float] | None = None,
    ) -> list[Level]:
        """List the levels of a run over the given table (T,) float64, cleanest first; see `visited_levels`."""
        spacing = cls.spacing if spacing is None else spacing
        t, visited, end = visited_levels(
            spacing, steps, alpha_bar, discard_next_to_last=cls.discard_next_to_last
        )
        if end is None:
            end = 1.0 if cls.ends_clean else alpha_bar[0]
        return make_plan(t, visited, end, eta)

    @classmethod
    def start(cls, noise: Tensor, level: Level) -> Tensor:
        """Make the sample that a whole run begins with, at the plan's noisiest level, from unit noise."""
        return noise

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        """Tell whether eta means something to this sampler."""
        return eta == 0

    @classmethod
    def start_alpha_bar(cls, plan: Sequence[Level], count: int) -> Tensor:
        """Tell the level to which an image is noised before the last `count` steps of a plan."""
        return plan[count - 1].alpha_bar

    def step(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Step from a level of the plan: (x_prev, pred_x0)."""
        raise NotImplementedError

    def quantize(self, pred_x0: Tensor) -> Tensor:
        if self.quantize_denoised:
            pred_x0 = self.denoise.model.first_stage_model.quantize(pred_x0)[0]
        if self.dynamic_threshold is None:
            return pred_x0
        return norm_thresholding(pred_x0, self.dynamic_threshold)


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

    def draw(self, x: Tensor) -> Tensor:
        noise = self.noise(x[:1]).expand_as(x) if self.repeat_noise else self.noise(x)
        noise = noise * self.temperature if self.temperature != 1 else noise
        return torch.nn.functional.dropout(noise, p=self.noise_dropout) if self.noise_dropout > 0 else noise


class DDIM(NoisySampler):
    """DDIM (arXiv:2010.02502), eta from 0 (deterministic) to 1 (DDPM's variance).

    Over whole levels the last step goes to the model's level 0, not to the clean end, as CompVis's does. A model whose
    last level has no signal is begun there ("trailing"), for pure noise is what that level was trained on, and no
    other.
    """

    name = "ddim"
    spacing = "uniform"
    ends_clean = False
    etas = "must be from 0 to 1"

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        eta: float = 0.0,
        spacing: str | Sequence[float] | None = None,
    ) -> list[Level]:
        if spacing is None and alpha_bar[-1] <= LEAST_SIGNAL:
            spacing = "trailing"
        return super().plan(alpha_bar, steps, eta=eta, spacing=spacing)

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        return 0 <= eta <= 1

    @classmethod
    def start_alpha_bar(cls, plan: Sequence[Level], count: int) -> Tensor:
        # CompVis noises an image to the level above the first one it denoises; kept, for its seeds' images.
        return plan[min(count, len(plan) - 1)].alpha_bar

    def step(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        eps, pred_x0 = self.denoise(x, level.t, level.alpha_bar)
        return self.move(x, eps, self.quantize(pred_x0), level)

    def move(self, x: Tensor, eps: Tensor, pred_x0: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return ddim_step(
            x,
            eps,
            alpha_bar_t=level.alpha_bar,
            alpha_bar_prev=level.alpha_bar_prev,
            std=level.std,
            noise=self.draw(x),
            pred_x0=pred_x0,
        )


@dataclass
class PLMS(DDIM):
    """Pseudo linear multistep (arXiv:2202.09778) over DDIM's levels and transfer, as CompVis has it.

    The first step averages the noise at both its ends, so a run of S steps calls the network S + 1 times. From a level
    without signal it is DDIM's.

    Attributes:
        old_eps: the last three raw predictions, oldest first; no option.
    """

    name = "plms"
    etas = "must be 0: PLMS adds no noise"

    old_eps: list[Tensor] = field(default_factory=list, init=False)

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        return eta == 0

    def step(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        eps, pred_x0 = self.denoise(x, level.t, level.alpha_bar)
        if self.old_eps:
            mean = plms_eps(eps, self.old_eps)
        elif level.alpha_bar == 0:  # noise alone gives no clean sample there; the network's own answer does
            self.old_eps = [eps]
            return self.move(x, eps, self.quantize(pred_x0), level)
        else:
            guess, _ = self.move(x, eps, self.quantize(pred_x0), level)
            # Below the lowest level there is no level to call the network with; the original repeats the lowest.
            alpha_bar = level.alpha_bar_prev if level.index > 0 else level.alpha_bar
            mean = (eps + self.denoise(guess, level.t_next, alpha_bar)[0]) / 2
        self.old_eps = [*self.old_eps, eps][-3:]
        return self.move(x, mean, self.quantize(to_x0("eps", mean, x, level.alpha_bar)), level)


@dataclass
class DDPM(NoisySampler):
    """Ancestral sampling (arXiv:2006.11239) over all levels or over fewer, evenly spread with both ends.

    Options:
        clip_denoised: keep the predicted clean sample within [-1, 1], as pixel models want.
        v_posterior: 0 = the posterior's variance, 1 = beta.
    """

    name = "ddpm"
    spacing = "linspace"
    etas = "must be 0 (unset) or 1: DDPM's noise is fixed"

    _: KW_ONLY
    clip_denoised: bool = False
    v_posterior: float = 0.0

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        eta: float = 0.0,
        spacing: str | Sequence[float] | None = None,
    ) -> list[Level]:
        return super().plan(alpha_bar, steps, eta=1.0, spacing=spacing)

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        return eta in (0, 1)

    def step(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        pred_x0 = self.denoise(x, level.t, level.alpha_bar)[1]
        pred_x0 = self.quantize(pred_x0.clamp(-1, 1) if self.clip_denoised else pred_x0)
        x_prev = ddpm_step(
            x,
            pred_x0,
            alpha_bar_t=level.alpha_bar,
            alpha_bar_prev=level.alpha_bar_prev,
            noise=self.draw(x),
            v_posterior=self.v_posterior,
        )
        return x_prev, pred_x0


@dataclass
class DPMSolver(Sampler):
    """DPM-Solver, multistep, between levels: CompVis's --dpm_solver.

    Its own levels divide the whole range, so the network gets fractional levels: 999, 949.05, ... for 20 steps. The
    step to a clean end is first order, for log-SNR is infinite there. A level without signal counts as one with a
    2^24th, as in diffusers.

    Options:
        predict_x0: extrapolate the clean sample (DPM-Solver++, arXiv:2211.01095; CompVis's choice) or the
            noise (DPM-Solver, arXiv:2206.00927).
        order: 1 to 3.
        lower_order_final: end a run of fewer than 15 steps on lower orders.
        solver_type: "midpoint" or "taylor", see ldm.process.steps.
    """

    name = "dpm_solver"
    spacing = "time_uniform"

    _: KW_ONLY
    predict_x0: bool = True
    order: int = 2
    lower_order_final: bool = True
    solver_type: str = "midpoint"
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise UsageError(f"order must be 1, 2 or 3, got {shown(self.order)}")
        if self.solver_type not in SOLVER_TYPES:
            raise UsageError(
                f"solver_type must be one of {', '.join(SOLVER_TYPES)}; got {shown(self.solver_type)}"
            )

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        eta: float = 0.0,
        spacing: str | Sequence[float] | None = None,
    ) -> list[Level]:
        return super().plan(np.maximum(alpha_bar, LEAST_SIGNAL), steps, eta=eta, spacing=spacing)

    def step(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        eps, pred_x0 = self.denoise(x, level.t, level.alpha_bar)
        pred_x0 = self.quantize(pred_x0)
        self.past = [(pred_x0 if self.predict_x0 else eps, level.alpha_bar), *self.past][: self.order]
        outputs, alpha_bars = zip(*self.past[: self.order_at(level)], strict=True)
        if level.alpha_bar_prev == 1:  # the one step that both solvers take alike
            return pred_x0, pred_x0
        solve = dpm_solver_pp_step if self.predict_x0 else dpm_solver_step
        x_prev = solve(
            x,
            outputs,
            alpha_bars=alpha_bars,
            alpha_bar_next=level.alpha_bar_prev,
            solver_type=self.solver_type,
        )
        return x_prev, pred_x0

    def order_at(self, level: Level) -> int:
        remaining = level.index + 1
        return min(self.order, remaining) if self.lower_order_final and level.total < 15 else self.order


@dataclass
class DPMSolverPP2M(DPMSolver):
    """DPM-Solver++(2M) over whole levels down to the clean end: "DPM++ 2M" elsewhere.

    The numbers of diffusers' DPMSolverMultistepScheduler as it comes: order 2, levels linspaced from the top,
    the last step first order to noise 0. Options as `DPMSolver`, less predict_x0.
    """

    name = "dpmpp_2m"
    spacing = "linspace"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.predict_x0:
            raise UsageError("dpmpp_2m extrapolates the clean sample; for predict_x0=False take dpm_solver")

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        eta: float = 0.0,
        spacing: str | Sequence[float] | None = None,
    ) -> list[Level]:
        own = spacing is None or (isinstance(spacing, str) and spacing == cls.spacing)
        if own and check_steps(steps, len(alpha_bar)) < len(alpha_bar):
            # Without level 0, which is where the last step would start.
            t, visited, _ = visited_levels(cls.spacing, steps + 1, np.maximum(alpha_bar, LEAST_SIGNAL))
            return make_plan(t[1:], visited[1:], 1.0, eta)
        return super().plan(alpha_bar, steps, eta=eta, spacing=spacing)


# --- k-diffusion's: they step in sigma's units, x / sqrt(alpha_bar) = x0 + sigma * noise -------------


@dataclass
class SigmaSampler(Sampler):
    """A sampler of k-diffusion: one method of theirs is `step_sigma`, around it are our units.

    A whole run begins with noise times the highest sigma, as theirs do, which is sqrt(1 - alpha_bar) in our units.
    """

    spacing = "normal"

    @classmethod
    def plan(
        cls,
        alpha_bar: np.ndarray,
        steps: int,
        *,
        eta: float = 0.0,
        spacing: str | Sequence[float] | None = None,
    ) -> list[Level]:
        return super().plan(np.maximum(alpha_bar, LEAST_SIGNAL), steps, eta=eta, spacing=spacing)

    @classmethod
    def start(cls, noise: Tensor, level: Level) -> Tensor:
        return (1 - level.alpha_bar).sqrt() * noise

    def step(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        x, denoised = self.step_sigma(x / level.alpha_bar.sqrt(), level)
        return level.alpha_bar_prev.sqrt() * x, denoised

    def step_sigma(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Step from level.sigma to level.sigma_prev: (x there, predicted clean sample)."""
        raise NotImplementedError

    def predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Predict the clean sample at any sigma above 0."""
        return self.quantize(self.denoise.at_sigma(x, sigma))


@dataclass
class Euler(SigmaSampler):
    """Euler's method: algorithm 2 of arXiv:2206.00364 without its correction. Without churn it is DDIM's step.

    Options:
        s_churn: how much noise is added before each step, over all steps; 0 = none.
        s_tmin, s_tmax: only at these sigmas, both included.
        s_noise: factor on that noise.
    """

    name = "euler"

    _: KW_ONLY
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def step_sigma(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        x, sigma = self.churned(x, level)
        denoised = self.predict(x, sigma)
        return self.move(x, denoised, sigma, level.sigma_prev), denoised

    def move(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
        return euler_step(x, denoised, sigma, sigma_to)

    def churned(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Add noise up to a higher sigma: lines 4 to 6 of the algorithm."""
        if self.s_churn == 0:
            return x, level.sigma
        noise = self.noise(x)  # also where it is not used: later draws depend on it, as in k-diffusion
        if not self.s_tmin <= level.sigma <= self.s_tmax:
            return x, level.sigma
        sigma = level.sigma * (1 + min(self.s_churn / level.total, math.sqrt(2) - 1))
        return x + self.s_noise * (sigma**2 - level.sigma**2).sqrt() * noise, sigma


class Heun(Euler):
    """Heun's method: algorithm 2 of arXiv:2206.00364. Two calls of the network a step; options as `Euler`."""

    name = "heun"

    def move(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
        x_to = euler_step(x, denoised, sigma, sigma_to)
        if sigma_to == 0:
            return x_to
        return heun_step(x, denoised, x_to, self.predict(x_to, sigma_to), sigma, sigma_to)


class DPM2(Euler):
    """k-diffusion's DPM2: the slope midway in log sigma. Two calls of the network a step; options as `Euler`.

    The last sigma of a table is left out, as A1111 and ComfyUI do for it.
    """

    name = "dpm2"
    discard_next_to_last = True

    def move(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
        return _midway(self, x, denoised, sigma, sigma_to)


@dataclass
class EulerAncestral(SigmaSampler):
    """Euler's method down to a lower sigma, and noise back up to the next: "Euler a". DDIM's step with the same eta.

    Options:
        s_noise: factor on the noise.
    """

    name = "euler_a"
    own_eta = 1.0
    etas = "must be from 0 to 1"

    _: KW_ONLY
    s_noise: float = 1.0

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        return 0 <= eta <= 1

    def step_sigma(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        denoised = self.predict(x, level.sigma)
        up = level.std / level.alpha_bar_prev.sqrt()
        x = self.move(x, denoised, level.sigma, (level.sigma_prev**2 - up**2).clamp(min=0).sqrt())
        return (x + self.s_noise * up * self.noise(x) if level.sigma_prev > 0 else x), denoised

    def move(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
        return euler_step(x, denoised, sigma, sigma_to)


class DPM2Ancestral(EulerAncestral):
    """k-diffusion's DPM2 with fresh noise: "DPM2 a". Two calls of the network a step; options as `EulerAncestral`.

    The last sigma of a table is left out, as for DPM2.
    """

    name = "dpm2_a"
    discard_next_to_last = True

    def move(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
        return _midway(self, x, denoised, sigma, sigma_to)


class DPMSolverPP2SAncestral(EulerAncestral):
    """DPM-Solver++(2S) (arXiv:2211.01095) with fresh noise: "DPM++ 2S a". Two calls of the network a step; options as
    `EulerAncestral`."""

    name = "dpmpp_2s_a"

    def move(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
        if sigma_to > 0:
            middle = (sigma * sigma_to).sqrt()
            denoised = self.predict(euler_step(x, denoised, sigma, middle), middle)
        return euler_step(x, denoised, sigma, sigma_to)


def _midway(sampler: SigmaSampler, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
    """Step by the slope midway in log sigma; to the clean end by the slope here."""
    if sigma_to == 0:
        return euler_step(x, denoised, sigma, sigma_to)
    middle = (sigma * sigma_to).sqrt()
    x_mid = euler_step(x, denoised, sigma, middle)
    return midpoint_step(x, x_mid, sampler.predict(x_mid, middle), sigma, middle, sigma_to)


@dataclass
class LMS(SigmaSampler):
    """Linear multistep: the slopes of up to `order` levels, weighed by the polynomial through them. k-diffusion's LMS.

    Options:
        order: 1 to 4.
    """

    name = "lms"

    _: KW_ONLY
    order: int = 4
    past: list[tuple[Tensor, float]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise UsageError(f"order must be 1, 2, 3 or 4, got {shown(self.order)}")

    def step_sigma(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        denoised = self.predict(x, level.sigma)
        slope = (x - denoised) / level.sigma
        self.past = [(slope, float(level.sigma)), *self.past][: self.order]
        slopes, sigmas = zip(*self.past, strict=True)
        weights = multistep_weights(sigmas, float(level.sigma_prev))
        return x + sum(float(w) * slope for w, slope in zip(weights, slopes, strict=True)), denoised


# The one list of samplers by name: what is put into it works wherever a sampler is named (docs/own-sampler.md).
SAMPLERS: dict[str, type[Sampler]] = {
    cls.name: cls
    for cls in (
        DDIM,
        PLMS,
        DDPM,
        DPMSolver,
        DPMSolverPP2M,
        Euler,
        EulerAncestral,
        Heun,
        DPM2,
        DPM2Ancestral,
        LMS,
        DPMSolverPP2SAncestral,
    )
}

# Other programs' spellings, reduced as `_reduce` does: letters and digits, "+" as "p", no "scheduler".
_ALIASES = {
    "eulerancestral": "euler_a",
    "eulerdiscrete": "euler",
    "eulerancestraldiscrete": "euler_a",
    "heundiscrete": "heun",
    "lmsdiscrete": "lms",
    "dpm2ancestral": "dpm2_a",
    "kdpm2discrete": "dpm2",
    "kdpm2ancestraldiscrete": "dpm2_a",
    "dpmpp2sancestral": "dpmpp_2s_a",
    "pndm": "plms",
    "dpmsolverpp": "dpmpp_2m",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmpp": "dpmpp_2m",
}


def _reduce(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p")).removesuffix("scheduler")


def resolve_sampler(name: str) -> str:
    """Find a sampler by any common spelling: CompVis's, A1111's, ComfyUI's or diffusers' class name.

    Raises:
        UsageError: no such sampler; the message lists those there are. Or what SAMPLERS has there is none.
    """
    by_spelling = _ALIASES | {_reduce(key): key for key in SAMPLERS}
    spelling = _reduce(name) if isinstance(name, str) else None
    if spelling not in by_spelling and (spelling or "").startswith("k"):
        spelling = spelling[1:]  # "k_euler_a", as scripts of 2022 say
    found = name if isinstance(name, str) and name in SAMPLERS else by_spelling.get(spelling)
    if found not in SAMPLERS:
        near = nearest(spelling or "", by_spelling, 0.7)
        hint = f" (did you mean {by_spelling[near]}?)" if near else ""
        raise UsageError(f"the sampler must be one of {', '.join(SAMPLERS)}; got {shown(name)}{hint}")
    cls = SAMPLERS[found]
    if not (isinstance(cls, type) and issubclass(cls, Sampler)):
        raise UsageError(
            f"SAMPLERS[{shown(found)}] must be a subclass of ldm.models.diffusion.samplers.Sampler, got {shown(cls)}"
        )
    return found


def split_sampler(
    name: str, spacing: str | Sequence[float] | None = None
) -> tuple[str, str | Sequence[float] | None]:
    """Read a sampler's name, in any spelling, with or without that of a table of sigmas.

    "DPM++ 2M Karras", as A1111 said it, or "dpmpp_2m_k", as InvokeAI.

    Args:
        spacing: what was named for it apart.

    Returns:
        (sampler, spacing), a name of SIGMA_TABLES in its own spelling.

    Raises:
        UsageError: no such sampler or spacing, or two spacings.
    """
    if isinstance(spacing, str):
        spacing = resolve_spacing(spacing)
    words = re.split(r"[\s_-]+", name.strip()) if isinstance(name, str) else []
    for count in range(1, min(len(words), 4)):  # "Align Your Steps" are three
        table = "karras" if words[-count:] == ["k"] else resolve_sigma_table(" ".join(words[-count:]))
        try:
            sampler = resolve_sampler(" ".join(words[:-count])) if table else None
        except UsageError:
            continue
        if sampler is None or name in SAMPLERS:
            continue
        if spacing is not None and not (isinstance(spacing, str) and spacing == table):
            raise UsageError(
                f"the sampler {shown(name)} and spacing={shown(spacing)} name two spacings; give one"
            )
        return sampler, table
    return resolve_sampler(name), spacing


def sample_steps(
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
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: Sequence[float] = WHOLE_INTERVAL,
    separate_passes: bool = False,
    score_corrector: Any = None,
    corrector_kwargs: dict[str, Any] | None = None,
    spacing: str | Sequence[float] | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Sample, one step at a time. Arguments are checked at once; the work is done as steps are taken.

    Args:
        name: any spelling that `split_sampler` knows.
        model: see denoiser.py.
        x_T: (b, ...) the sample to start from: unit noise for a whole run, or with run_last an image noised
            to the level that `start_level` gives. Its dtype and device are kept.
        conditioning, unconditional_conditioning: tensor, list, or dict of lists, for apply_model.
        steps: exactly so many, 1 to the model's number of levels.
        guidance_scale, guidance_rescale, guidance_interval, separate_passes, score_corrector,
            corrector_kwargs: see `Denoiser`.
        eta: 0 to 1 for ddim and the ancestral ones; other samplers have no choice. None = the sampler's own.
        noise: makes unit noise shaped like its argument, for every draw of the run: per step first the noise
            of the blended image (with mask), then the sampler's own. None = `unit_noise`.
        run_last: run only the last so many steps.
        mask: broadcastable to x_T; where 1 the image x0 is kept, where 0 it is repainted. x0, noised
            afresh, is blended in before every step.
        x0: (b, ...) clean sample for the mask.
        spacing: which levels are visited, see `visited_levels`; None = the sampler's own.
        options: of the sampler's class, see SAMPLERS.

    Raises:
        UsageError: an unknown name, option or spacing, or a value out of range.
    """
    name, spacing = split_sampler(name, spacing)
    cls = SAMPLERS[name]
    known = {f.name for f in fields(cls) if f.init} - {"denoise", "noise"}
    if unknown := sorted(options.keys() - known):
        raise UsageError(f"{cls.name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    eta = cls.own_eta if eta is None else eta
    check_eta(cls, eta)
    check_mask(mask, x0, x_T.shape)
    warn_of_batch(conditioning, x_T.shape[0])

    plan = cls.plan(alpha_bar_table(model), _steps(model, steps), eta=eta, spacing=spacing)
    count = len(plan) if run_last is None else run_last
    if not 0 <= count <= len(plan):
        raise UsageError(f"run_last must be from 0 to {len(plan)}, the number of steps; got {run_last}")
    draw = unit_noise if noise is None else noise
    denoise = Denoiser(
        model,
        conditioning,
        unconditional_conditioning=unconditional_conditioning,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        guidance_interval=guidance_interval,
        separate_passes=separate_passes,
        score_corrector=score_corrector,
        corrector_kwargs=corrector_kwargs,
    )

    def keep_known(x: Tensor, level: Level) -> Tensor:
        return q_sample(x0, draw(x0), alpha_bar=level.alpha_bar) * mask + (1 - mask) * x

    before = None if mask is None else keep_known
    x_T = cls.start(x_T, plan[-1]) if count == len(plan) else x_T
    return run_levels(plan[:count][::-1], x_T, cls(denoise, draw, **options).step, before)


def start_level(
    name: str, model: Any, steps: int, strength: float, *, spacing: str | Sequence[float] | None = None
) -> tuple[int, Tensor | None]:
    """Work out where img2img starts: how many steps to run, and to which level the image is noised.

    Args:
        strength: 0 to 1. The count is int(strength * steps), as CompVis rounds.

    Returns:
        (k, alpha_bar): run the last k steps, from the image noised to alpha_bar (0-d float64). alpha_bar is
        None at k = 0, where the image is the answer, and at k = all steps, which start from pure noise.

    Raises:
        UsageError: strength outside [0, 1], steps out of range, an unknown name or spacing.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise UsageError(f"strength must be from 0 to 1, got {shown(strength)}")
    name, spacing = split_sampler(name, spacing)
    cls = SAMPLERS[name]
    plan = cls.plan(alpha_bar_table(model), _steps(model, steps), spacing=spacing)
    count = int(strength * len(plan))
    return count, None if count in (0, len(plan)) else cls.start_alpha_bar(plan, count)


def check_eta(cls: type[Sampler], eta: float) -> None:
    """Raise UsageError unless eta means something to the sampler."""
    if not cls.accepts_eta(eta):
        raise UsageError(f"eta of {cls.name} {cls.etas}; got {eta}")


def check_mask(mask: Tensor | None, x0: Tensor | None, shape: Sequence[int]) -> None:
    """Raise UsageError unless mask and x0 come together and fit a sample of this shape."""
    if (mask is None) != (x0 is None):
        given, absent = ("mask", "x0") if x0 is None else ("x0", "mask")
        raise UsageError(
            f"{given} was given without {absent}; blending needs the image x0 and the mask, 1 = keep"
        )
    if mask is None:
        return
    shape = tuple(shape)
    try:
        fits = torch.broadcast_shapes(mask.shape, x0.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise UsageError(
            f"mask and x0 must fit the sample {shape}, got {tuple(mask.shape)} and {tuple(x0.shape)}"
        )


def warn_of_batch(conditioning: Any, batch_size: int) -> None:
    """Warn of a condition for another number of images, and go on: some models broadcast theirs."""
    tensor = first_tensor(conditioning)
    if tensor is not None and tensor.dim() > 0 and tensor.shape[0] != batch_size:
        logger.warning("got %d conditionings for a batch of %d", tensor.shape[0], batch_size)


def _steps(model: Any, steps: int) -> int:
    return check_steps(steps, model.num_timesteps, name="steps")
