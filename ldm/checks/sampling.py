"""How a request is sampled, and with what attached to the model, checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.adapters.deepcache import DeepCache, check_cache
from ldm.adapters.tome import TokenMerging, check_merging
from ldm.adapters.use import PromptWords, check_adapters
from ldm.errors import UsageError, shown
from ldm.limits import AUTO_AT_MOST, AUTO_CELLS, SHARE, STRENGTH_RULES, choice, real, whole
from ldm.models.diffusion.levels import explicit_levels
from ldm.models.diffusion.samplers import (
    SAMPLERS,
    check_schedule,
    last_calls,
    split_options,
    split_sampler,
    start_level,
)
from ldm.passes import planned_steps
from ldm.process.sigmas import check_sigmas

if TYPE_CHECKING:
    from ldm.checkpoints.sampling import SamplingDefaults
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)


def check_sampling(
    model: LatentDiffusion,
    defaults: SamplingDefaults,
    sampler: Any,
    steps: Any,
    spacing: Any,
    eta: Any,
    strength: float | None,
    of_sampler: dict[str, Any],
    arithmetic: str = "own",
    strength_rule: str = "compvis",
) -> dict[str, Any]:
    """Check the sampler and its steps, and how many of them a picture's strength leaves to be run.

    Args:
        of_sampler: options that only some samplers or spacings have; None is not set.
        arithmetic, strength_rule: whose steps are taken, and how many, see ldm.options.
    """
    sampler, spacing = split_sampler(sampler, spacing)
    if spacing is not None and not isinstance(spacing, str | Sequence | np.ndarray):
        raise UsageError(f"spacing must be a name, or a list of sigmas, got {shown(spacing)}")
    if listed := explicit_levels(spacing):
        kind, numbers = listed
        if kind == "sigma":
            spacing = check_sigmas(numbers).tolist()
        if steps is None:
            steps = len(numbers) - (kind == "sigma")
    if steps is None:
        fewest = defaults.least_steps.get(sampler, 1)
        steps = min(max(defaults.steps, fewest), model.num_timesteps)
    steps = whole("steps", steps, 1, model.num_timesteps)
    strength_rule = choice("strength_rule", strength_rule, STRENGTH_RULES)
    if arithmetic == "diffusers":
        check_schedule(sampler, spacing, steps, model.num_timesteps, of_sampler)
        run_last = last_calls(sampler, steps, strength or 0.0)
    else:  # refuses what no spacing has the name of
        share = 1.0 if strength is None else strength
        planned = planned_steps(strength_rule, steps, share)
        if planned > model.num_timesteps:
            raise UsageError(
                f"{steps} steps at strength {share:g} are the last of {planned} by the rule 'comfyui', more than the "
                f"model's {model.num_timesteps} levels; give more strength, or fewer steps"
            )
        counted, _ = start_level(sampler, model, planned, share, spacing=spacing, **of_sampler)
        if spacing == "compvis":  # whose share is of the steps asked for, and whose list may be longer
            counted = int(share * steps)
        whole_run, _ = start_level(sampler, model, planned, 1.0, spacing=spacing, **of_sampler)
        run_last = {
            "compvis": counted,
            "bubbliiiing": min(counted, steps - 1),
            "a1111": min(int(min(share, 0.999) * steps) + 1, whole_run),
            "comfyui": min(steps, whole_run) if share > 0 else 0,
        }[strength_rule]
    eta = SAMPLERS[sampler].own_eta if eta is None else real("eta", eta, *SHARE)
    own, _ = split_options(SAMPLERS[sampler], of_sampler)
    SAMPLERS[sampler](None, eta=eta, **own)  # refuses values that it does not take
    return {"sampler": sampler, "steps": steps, "spacing": spacing, "eta": eta, "run_last": run_last}


def auto_batch_size(height: int, width: int) -> int:
    """Choose how many pictures of (height, width) latent cells are painted at once, the same on every machine.

    So a picture that is painted again meets the same neighbours, whose number its last bits depend on.
    """
    return max(1, min(AUTO_AT_MOST, AUTO_CELLS // (height * width)))


def check_adapting(
    model: LatentDiffusion,
    prompts: Sequence[str],
    adapters: Any,
    cache_interval: Any,
    cache_depth: Any,
    merge_ratio: Any,
    merge_seed: Any,
) -> dict[str, Any]:
    """Check what is attached to the model, and warn of embeddings that none of the prompts names: they do nothing.

    TokenMerging and DeepCache among the adapters become the options that they stand for.

    Raises:
        UsageError: one of these twice, or beside its option.
    """
    unet = model.model.diffusion_model
    others: list[Any] = []
    knobs: dict[str, tuple[Any, Any]] = {}
    for one in check_adapters(model, adapters):
        if isinstance(one, TokenMerging):
            name, values, option, is_off = "merge", (one.ratio, one.seed), "merge_ratio", merge_ratio == 0
        elif isinstance(one, DeepCache):
            name, values, option, is_off = (
                "cache",
                (one.interval, one.depth),
                "cache_interval",
                cache_interval == 1,
            )
        else:
            others.append(one)
            continue
        if name in knobs or not is_off:
            raise UsageError(
                f"{type(one).__name__} is given twice, in adapters or as {option}; leave one out"
            )
        knobs[name] = values
    merge_ratio, merge_seed = check_merging(unet, *knobs.get("merge", (merge_ratio, merge_seed)))
    cache_interval, cache_depth = check_cache(unet, *knobs.get("cache", (cache_interval, cache_depth)))
    warn_unnamed(model, others, prompts)
    return {
        "adapters": tuple(others),
        "cache_interval": cache_interval,
        "cache_depth": cache_depth,
        "merge_ratio": merge_ratio,
        "merge_seed": merge_seed,
    }


def warn_unnamed(model: LatentDiffusion, adapters: Sequence[Any], prompts: Sequence[str]) -> None:
    """Warn of embeddings among adapters that none of the prompts names."""
    words = PromptWords.of(model, adapters) if prompts else None
    for embedding in [] if words is None else words.unnamed(model.cond_stage_model, prompts):
        log.warning(
            "no prompt names the embedding %s; write %s", embedding.file, " or ".join(embedding.names)
        )
