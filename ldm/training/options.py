"""What a training configuration may say beside its model and data."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ldm.errors import UsageError, nearest, shown
from ldm.values import check

# `sampling` says how to paint with the model; training leaves it to whoever does.
SECTIONS = ("model", "data", "training", "lightning", "sampling")


def training_options(
    *,
    optimizer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    channels_last: bool = False,
    posterior_logvar_start: float | None = None,
    identity_start: bool = False,
    cond_stage_rate: float = 1.0,
    image_guidance: float = 3.0,
    image_steps: int = 20,
    checkpoint_every: int = 500,
    validate_every: int = 1000,
    validation_batches: int = 8,
    curve_every: int = 500,
    print_every: float = 10.0,
) -> dict[str, Any]:
    """Return what is known under `training`, defaults included.

    Args:
        optimizer: {target, params}, instead of the model's own kind of optimizer.
        scheduler: {target, params} of a factor of the rate, instead of the model's own.
        channels_last: the memory format of the networks.
        posterior_logvar_start, identity_start: how fresh weights start; see `ldm.training.objectives`.
        cond_stage_rate: times the learning rate, for a condition stage that is trained along.
        image_guidance, image_steps: of the samples that are shown while a diffusion model trains.
        checkpoint_every, validate_every, validation_batches, curve_every: in optimizer steps (and batches).
        print_every: seconds between two lines on the console.
    """
    return dict(locals())


def trainer_options(
    *,
    max_steps: int | None = None,
    accumulate_grad_batches: int = 1,
    precision: str | int = "32-true",
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    gradient_clip_val: float | None = None,
    benchmark: bool = False,
) -> dict[str, Any]:
    """Return what is known under `lightning.trainer`, defaults included; `benchmark` is accepted for CompVis's files.

    Raises:
        UsageError: max_steps is not given.
    """
    if max_steps is None:
        raise UsageError("lightning.trainer.max_steps should be a whole number above 0, got None")
    return dict(locals())


def take(section: Any, known: Callable[..., dict[str, Any]], name: str) -> dict[str, Any]:
    """Return a section's values over the defaults of a function that lists them.

    Raises:
        UsageError: the section is no mapping, has a key that is not known, or a value of the wrong kind or range.
    """
    given = mapping(section, name)
    refuse_unknown_keys(given, list(inspect.signature(known).parameters), name)
    return known(**check(given, known, name))


def mapping(section: Any, name: str) -> dict[str, Any]:
    """Return a section as a dict; an empty one where it is left out.

    Raises:
        UsageError: it is something else.
    """
    if section is None:
        return {}
    if not hasattr(section, "keys"):
        raise UsageError(f"'{name}' should be a mapping of options to values, got {shown(section)}")
    return {key: section[key] for key in section}


def refuse_unknown_keys(given: Mapping[str, Any], known: list[str], name: str) -> None:
    """Raise UsageError for the first key that is not known, with the nearest one that is."""
    for key in given:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean '{near}'?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"'{name}' has no option {shown(key)}; {hint}")
