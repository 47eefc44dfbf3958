"""The samplers: one short class per algorithm, the list of them by name, and `sample_steps`, which runs one.

A run is a plan (levels.py: the levels to go through), a denoiser (denoiser.py: the model with its conditions and
guidance) and a sampler (how to step from one level to the next). `sample_steps` joins them and yields every step, so
progress, preview and interruption need nothing from here. CompVis's DDIMSampler, PLMSSampler and DPMSolverSampler call
the same classes.
"""

import logging
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
    run_levels,
    unit_noise,
)
from ldm.models.diffusion.sampling_util import norm_thresholding
from ldm.process.gaussian import q_sample
from ldm.process.guidance import first_tensor
from ldm.process.prediction import to_x0
from ldm.process.schedule import LEAST_SIGNAL
from ldm.process.spacing import check_steps, continuous_levels
from ldm.process.steps import (
    SOLVER_TYPES,
    ddim_step,
    ddpm_step,
    dpm_solver_pp_step,
    dpm_solver_step,
    plms_eps,
)

__all__ = [
    "DDIM",
    "DDPM",
    "DPMSolver",
    "DPMSolverPP2M",
    "Denoiser",
    "Level",
    "Noise",
    "NoisySampler",
    "PLMS",
    "SAMPLERS",
    "Sampler",
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
    "start_level",
    "unit_noise",
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
    spacing: ClassVar[str]
    etas: ClassVar[str] = "must be 0: this sampler adds no noise"

    denoise: Denoiser
    noise: Noise = unit_noise
    _: KW_ONLY
    quantize_denoised: bool = False
    dynamic_threshold: float | None = None

    @classmethod
    def plan(
        cls, alpha_bar: np.ndarray, steps: int, *, eta: float = 0.0, spacing: str | None = None
    ) -> list[Level]:
        """List the levels of a run over the given table (T,) float64, cleanest first."""
        raise NotImplementedError

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

    The last step goes to the model's level 0, not to the clean end, as CompVis's does. A model whose last level has no
    signal is begun there ("trailing"), for pure noise is what that level was trained on, and no other.
    """

    name = "ddim"
    spacing = "uniform"
    etas = "must be from 0 to 1"

    @classmethod
    def plan(
        cls, alpha_bar: np.ndarray, steps: int, *, eta: float = 0.0, spacing: str | None = None
    ) -> list[Level]:
        default = "trailing" if alpha_bar[-1] <= LEAST_SIGNAL else cls.spacing
        levels = choose_levels(spacing or default, steps, len(alpha_bar))
        return make_plan(levels, alpha_bar[levels], alpha_bar[0], eta)

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
        old_eps: the last three raw predictions, oldest first.
    """

    name = "plms"
    etas = "must be 0: PLMS adds no noise"

    _: KW_ONLY
    old_eps: list[Tensor] = field(default_factory=list)

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
        cls, alpha_bar: np.ndarray, steps: int, *, eta: float = 0.0, spacing: str | None = None
    ) -> list[Level]:
        levels = choose_levels(spacing or cls.spacing, steps, len(alpha_bar))
        return make_plan(levels, alpha_bar[levels], 1.0, eta=1.0)

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

    Levels divide the whole range, so the network gets fractional levels: 999, 949.05, ... for 20 steps. A level without
    signal counts as one with a 2^24th, as in diffusers: its log-SNR would be infinite.

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
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise UsageError(f"order must be 1, 2 or 3, got {shown(self.order)}")
        if self.solver_type not in SOLVER_TYPES:
            raise UsageError(
                f"solver_type must be one of {', '.join(SOLVER_TYPES)}; got {shown(self.solver_type)}"
            )

    @classmethod
    def plan(
        cls, alpha_bar: np.ndarray, steps: int, *, eta: float = 0.0, spacing: str | None = None
    ) -> list[Level]:
        t, alpha_bar = continuous_levels(spacing or cls.spacing, steps, np.maximum(alpha_bar, LEAST_SIGNAL))
        return make_plan(t[1:], alpha_bar[1:], alpha_bar[0], eta)

    def step(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        eps, pred_x0 = self.denoise(x, level.t, level.alpha_bar)
        pred_x0 = self.quantize(pred_x0)
        self.past = [(pred_x0 if self.predict_x0 else eps, level.alpha_bar), *self.past][: self.order]
        outputs, alpha_bars = zip(*self.past[: self.order_at(level)], strict=True)
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
        cls, alpha_bar: np.ndarray, steps: int, *, eta: float = 0.0, spacing: str | None = None
    ) -> list[Level]:
        spacing, train = spacing or cls.spacing, len(alpha_bar)
        if spacing == "linspace" and check_steps(steps, train) < train:
            levels = choose_levels(spacing, steps + 1, train)[
                1:
            ]  # level 0 is where the last step would start
        else:
            levels = choose_levels(spacing, steps, train)
        return make_plan(levels, np.maximum(alpha_bar[levels], LEAST_SIGNAL), 1.0, eta)

    def order_at(self, level: Level) -> int:
        return 1 if level.index == 0 else super().order_at(level)


# The one list of samplers by name: what is put into it works wherever a sampler is named (docs/own-sampler.md).
SAMPLERS: dict[str, type[Sampler]] = {cls.name: cls for cls in (DDIM, PLMS, DDPM, DPMSolver, DPMSolverPP2M)}

# Other programs' spellings, reduced as `_reduce` does: letters and digits, "+" as "p", no "scheduler".
_ALIASES = {
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


def sample_steps(
    name: str,
    model: Any,
    x_T: Tensor,
    conditioning: Any,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    unconditional_conditioning: Any = None,
    eta: float = 0.0,
    noise: Noise | None = None,
    run_last: int | None = None,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: Sequence[float] = WHOLE_INTERVAL,
    separate_passes: bool = False,
    score_corrector: Any = None,
    corrector_kwargs: dict[str, Any] | None = None,
    spacing: str | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Sample, one step at a time. Arguments are checked at once; the work is done as steps are taken.

    Args:
        name: any spelling that `resolve_sampler` knows.
        model: see denoiser.py.
        x_T: (b, ...) the sample to start from: unit noise for a whole run, or with run_last an image noised
            to the level that `start_level` gives. Its dtype and device are kept.
        conditioning, unconditional_conditioning: tensor, list, or dict of lists, for apply_model.
        steps: exactly so many, 1 to the model's number of levels.
        guidance_scale, guidance_rescale, guidance_interval, separate_passes, score_corrector,
            corrector_kwargs: see `Denoiser`.
        eta: 0 to 1 for ddim; other samplers have no choice.
        noise: makes unit noise shaped like its argument, for every draw of the run: per step first the noise
            of the blended image (with mask), then the sampler's own. None = `unit_noise`.
        run_last: run only the last so many steps.
        mask: broadcastable to x_T; where 1 the image x0 is kept, where 0 it is repainted. x0, noised
            afresh, is blended in before every step.
        x0: (b, ...) clean sample for the mask.
        spacing: a name of `exact_levels` or "compvis" (for dpm_solver: of `continuous_levels`); None = the
            sampler's own.
        options: of the sampler's class, see SAMPLERS.

    Raises:
        UsageError: an unknown name, option or spacing, or a value out of range.
    """
    cls = SAMPLERS[resolve_sampler(name)]
    known = {f.name for f in fields(cls)} - {"denoise", "noise", "old_eps", "past"}
    if unknown := sorted(options.keys() - known):
        raise UsageError(f"{cls.name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
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
    return run_levels(plan[:count][::-1], x_T, cls(denoise, draw, **options).step, before)


def start_level(
    name: str, model: Any, steps: int, strength: float, *, spacing: str | None = None
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
    cls = SAMPLERS[resolve_sampler(name)]
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
