"""`sample_steps`, which runs a sampler: it joins a plan (the levels to go through), a denoiser and the sampler."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ldm import limits
from ldm.errors import UsageError, shown
from ldm.models.diffusion.denoiser import WHOLE_INTERVAL, Denoiser
from ldm.models.diffusion.levels import Level, Noise, Step, alpha_bar_table, run_levels, unit_noise
from ldm.models.diffusion.samplers.base import Sampler, check_eta, may_be_none
from ldm.models.diffusion.samplers.masks import OF_PREDICTIONS, keeping
from ldm.models.diffusion.samplers.names import SAMPLERS, split_sampler
from ldm.process.gaussian import q_sample
from ldm.process.guidance import first_tensor
from ldm.process.sigmas import SIGMA_TABLES, sigma_table
from ldm.process.spacing import check_steps

logger = logging.getLogger(__name__)

# Options of spacings: which a run takes beside those of its sampler.
SPACING_OPTIONS = frozenset(
    parameter.name
    for make in (sigma_table, *SIGMA_TABLES.values())
    for parameter in inspect.signature(make).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
)


def sampler_options(cls: type[Sampler]) -> set[str]:
    """Name the options of a sampler that are not every run's own arguments."""
    return {f.name for f in fields(cls) if f.init} - {"denoise", "noise", "eta"} - cls.idle


def split_options(cls: type[Sampler], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part options into those of a sampler and those of spacings, or raise UsageError for any other.

    An option that is None is not set, unless None is one of its values, as of lcm's timestep_scaling.
    """
    known = sampler_options(cls)
    with_none = {option.name for option in fields(cls) if option.name in known and may_be_none(option)}
    every = SPACING_OPTIONS.union(*map(sampler_options, SAMPLERS.values()))
    kept = with_none | (options.keys() - every)
    options = {name: value for name, value in options.items() if value is not None or name in kept}
    if unknown := sorted(options.keys() - known - SPACING_OPTIONS):
        raise UsageError(f"{cls.name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    own = {name: value for name, value in options.items() if name in known}
    return own, {name: value for name, value in options.items() if name not in known}


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
    start_from: Tensor | None = None,
    invert: bool = False,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: Sequence[float] = WHOLE_INTERVAL,
    separate_passes: bool = False,
    score_corrector: Any = None,
    corrector_kwargs: dict[str, Any] | None = None,
    spacing: str | Sequence[float] | None = None,
    behind: Callable[[Tensor], Tensor] | None = None,
    mask_rule: str = "compvis",
    keep_start: bool = False,
    first_noise: str | None = None,
    final_alpha: str | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Sample, one step at a time. Arguments are checked at once; the work is done as steps are taken.

    Args:
        name: any spelling that `split_sampler` knows.
        model: see denoiser.py.
        x_T: (b, ...) unit noise; or with run_last and without start_from the sample to start from, an image noised
            to the level that `start_level` gives. Its dtype and device are kept.
        conditioning, unconditional_conditioning: tensor, list, or dict of lists, for apply_model.
        steps: exactly so many, 1 to the model's number of levels.
        guidance_scale, guidance_rescale, guidance_interval, separate_passes, score_corrector,
            corrector_kwargs: see `Denoiser`.
        eta: 0 to 1 for ddim and the ancestral ones; other samplers have no choice. None = the sampler's own.
        noise: makes unit noise shaped like its argument, for every draw of the run: per step first the noise
            of the blended image (with mask), then the sampler's own. None = `unit_noise`.
        run_last: run only the last so many steps.
        start_from: (b, ...) clean sample that x_T noises, to the level where a run of the last steps starts.
        invert: walk the other way, up the last so many steps or all, along the deterministic path: x_T is then the
            clean sample, and the last step's x_t the noise that leads back to it, nearer with more steps.
        mask: broadcastable to x_T; where 1 the image x0 is kept, where 0 it is repainted, as mask_rule says.
        x0: (b, ...) clean sample for the mask.
        mask_rule: "compvis": x0, noised afresh, is blended in before every step. "diffusers": noised by x_T, before
            every step but the first. "a1111": the predicted clean sample is blended with x0. "comfyui": that, and x0
            noised by x_T before every step.
        spacing: which levels are visited, see `visited_levels`; None = the sampler's own.
        behind: changes the sample (b, ...) behind each step, the last one, too.
        keep_start: start_from counts before a whole run, too, which else begins with pure noise.
        first_noise: how much noise a whole run begins with: "sigma", as k-diffusion has it, sqrt(1 - alpha_bar) in our
            units; "unit", 1, as if there were no signal; None = the sampler's own.
        final_alpha: where the last step goes: "one", the clean end; "lowest", the model's level 0; None = what sampler
            and spacing say.
        options: of the sampler's class, see SAMPLERS; and of the spacing, see `sigma_table`.

    Raises:
        UsageError: an unknown name, option or spacing, or a value out of range.
    """
    name, spacing = split_sampler(name, spacing)
    cls = SAMPLERS[name]
    own, of_spacing = split_options(cls, options)
    check_eta(cls, cls.own_eta if eta is None else eta)
    check_mask(mask, x0, x_T.shape)
    warn_of_batch(conditioning, x_T.shape[0])
    check_rules(mask_rule, first_noise, final_alpha)

    plan = _plan(cls, model, steps, spacing, of_spacing, final_alpha)
    total = plan[0].left
    count = total if run_last is None else run_last
    if not limits.is_whole(count, 0, total):
        raise UsageError(f"run_last must be from 0 to {total}, the number of steps; got {shown(run_last)}")
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
        known=(mask, x0) if mask is not None and mask_rule in OF_PREDICTIONS else None,
    )
    keep = None if mask is None else keeping(mask_rule, mask, x0, draw, x_T)

    def keep_known(x: Tensor, level: Level) -> Tensor:
        return keep(x, partial(q_sample, alpha_bar=level.alpha_bar), level.left == count)

    before = None if keep is None else keep_known
    sampler = cls(denoise, draw, eta=eta, **own)
    if invert:
        check_inverts(sampler, mask, start_from)
    elif count == total:
        x_T = _whole_start(cls, plan[0], x_T, start_from if keep_start else None, first_noise)
    elif start_from is not None:
        x_T = cls.start(x_T, noised_level(cls, plan, count), start_from) if count > 0 else start_from
    sampler.plan_levels, sampler.levels = plan, _last_levels(cls, plan, count)
    levels = sampler.levels[::-1] if invert else sampler.levels
    step = sampler.step

    def step_and_change(x: Tensor, here: Level, to: Level) -> tuple[Any, ...]:
        x, *others = step(x, here, to)
        return behind(x), *others

    return run_levels(levels, x_T, step if behind is None else step_and_change, before)


def check_rules(mask_rule: str, first_noise: str | None, final_alpha: str | None) -> None:
    """Raise UsageError unless each is one of its choices: see `sample_steps`."""
    limits.choice("mask_rule", mask_rule, limits.MASK_RULES)
    if first_noise is not None:
        limits.choice("first_noise", first_noise, limits.FIRST_NOISES)
    if final_alpha is not None:
        limits.choice("final_alpha", final_alpha, limits.FINAL_ALPHAS)


def check_inverts(sampler: Sampler, mask: Tensor | None, start_from: Tensor | None) -> None:
    """Raise UsageError unless a sampler can walk from a clean sample to noise."""
    if not sampler.inverts or sampler.eta or getattr(sampler, "s_churn", 0):
        able = ", ".join(name for name, cls in SAMPLERS.items() if cls.inverts)
        why = "with fresh noise" if sampler.inverts else "at all"
        raise UsageError(f"{sampler.name} does not invert {why}; these do, at eta and s_churn 0: {able}")
    if mask is not None or start_from is not None:
        raise UsageError(
            "an inversion begins at the clean sample and keeps nothing: leave mask and start_from out"
        )


def _plan(
    cls: type[Sampler],
    model: Any,
    steps: int,
    spacing: str | Sequence[float] | None,
    of_spacing: dict[str, Any],
    final_alpha: str | None,
) -> list[Level]:
    """List the levels of a run: see `sample_steps`."""
    table = alpha_bar_table(model)
    plan = cls.plan(table, _steps(model, steps), spacing=spacing, **of_spacing)
    if final_alpha is None:
        return plan
    end = 1.0 if final_alpha == "one" else float(table[0])
    return [*plan[:-1], replace(plan[-1], alpha_bar=torch.tensor(end, dtype=torch.float64))]


def _last_levels(cls: type[Sampler], plan: Sequence[Level], count: int) -> list[Level]:
    """List the levels of the last `count` steps of a plan; their ends, of a sampler that chooses those between."""
    levels = [level for level in plan if level.left <= count]
    if cls.chooses_levels and count > 0:
        return [replace(levels[0], left=1, total=1), replace(levels[-1], total=1)]
    return levels


def _whole_start(
    cls: type[Sampler], level: Level, noise: Tensor, z: Tensor | None, first_noise: str | None
) -> Tensor:
    """Make what a whole run begins with: see `sample_steps`."""
    if first_noise is None:
        return cls.start(noise, level, z)
    alpha_bar = float(level.alpha_bar)
    x = noise if first_noise == "unit" else math.sqrt(1 - alpha_bar) * noise
    return x if z is None else math.sqrt(alpha_bar) * z + x


def noised_level(cls: type[Sampler], plan: Sequence[Level], count: int) -> Level:
    """Find the level to which an image is noised before the last `count` steps of a plan."""
    left = min(count + cls.starts_above, plan[0].left)
    return next(level for level in plan if level.left == left)


def start_level(
    name: str,
    model: Any,
    steps: int,
    strength: float,
    *,
    spacing: str | Sequence[float] | None = None,
    **options: Any,
) -> tuple[int, Tensor | None]:
    """Work out where img2img starts: how many steps to run, and to which level the image is noised.

    Args:
        strength: 0 to 1. The count is int(strength * steps), as CompVis rounds.
        options: of the sampler or the spacing, as `sample_steps` takes them.

    Returns:
        (k, alpha_bar): run the last k steps, from the image noised to alpha_bar (0-d float64). alpha_bar is
        None at k = 0, where the image is the answer, and at k = all steps, which start from pure noise.

    Raises:
        UsageError: strength outside [0, 1], steps out of range, an unknown name, option or spacing.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise UsageError(f"strength must be from 0 to 1, got {shown(strength)}")
    name, spacing = split_sampler(name, spacing)
    cls = SAMPLERS[name]
    _, of_spacing = split_options(cls, options)
    plan = cls.plan(alpha_bar_table(model), _steps(model, steps), spacing=spacing, **of_spacing)
    total = plan[0].left
    count = int(strength * total)
    return count, None if count in (0, total) else noised_level(cls, plan, count).alpha_bar


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
