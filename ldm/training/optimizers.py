"""What a configuration says about steps: the learning rate, the precision, optimizers and their schedules."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.config import get_obj_from_str, instantiate_from_config
from ldm.config_text import first_line
from ldm.errors import MismatchError, UsageError, shown
from ldm.training.options import (
    mapping,
)
from ldm.values import check

PRECISIONS = {
    "32-true": ("32-true", "32", "fp32"),
    "bf16-mixed": ("bf16-mixed", "bf16"),
    "16-mixed": ("16-mixed", "fp16-mixed", "16", "fp16"),
}
MAX_LEARNING_RATE = 10.0  # a higher one is a typing error
TORCH_OPTIMIZERS = tuple(f"torch.optim.{name}" for name in ("Adam", "AdamW", "SGD", "RAdam", "NAdam"))


def learning_rate(
    base: float, *, scale: bool, accumulate: int, devices: int, batch_size: int
) -> tuple[float, str]:
    """Compute the rate as CompVis does, and a line that says how.

    Raises:
        UsageError: the rate is not within (0, 10].
    """
    if scale:
        rate = accumulate * devices * batch_size * base
        factors = (
            f"{accumulate} (accumulate) x {devices} (devices) x {batch_size} (batch) x {base:.2e} (base)"
        )
        formula = f"{rate:.2e} = {factors}"
    else:
        rate, formula = base, f"{base:.2e} (base, not scaled)"
    if not (math.isfinite(rate) and 0 < rate <= MAX_LEARNING_RATE):
        raise UsageError(
            f"the learning rate should be above 0 and at most {MAX_LEARNING_RATE:g}, got {rate:g}; set "
            "model.base_learning_rate, and mind that --scale_lr multiplies it"
        )
    return rate, f"learning rate {formula}"


def chosen_precision(given: str | int) -> str:
    """Return Lightning's name of a precision.

    Raises:
        UsageError: it is none of those that can be trained in.
    """
    for name, spellings in PRECISIONS.items():
        if str(given) in spellings:
            return name
    known = ", ".join("/".join(map(repr, spellings)) for spellings in PRECISIONS.values())
    raise UsageError(f"lightning.trainer.precision should be one of {known}; got {shown(given)}")


def build_optimizers(model: nn.Module, rate: float, training: dict[str, Any]) -> tuple[list, list]:
    """Build the model's own optimizers, replace their kind and their schedules where the configuration says so.

    Returns:
        (optimizers, schedulers), one scheduler or None for each optimizer.
    """
    model.learning_rate = rate
    made = model.configure_optimizers()
    optimizers, schedules = made if isinstance(made, tuple) else (made, [])
    optimizers = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
    if training["optimizer"] is not None:
        kind, params = chosen_optimizer(training["optimizer"])
        params.setdefault("lr", rate)
        try:
            optimizers = [
                kind([p for g in o.param_groups for p in g["params"]], **params) for o in optimizers
            ]
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise MismatchError(f"training.optimizer: {first_line(error)}") from error
    if training["cond_stage_rate"] != 1.0:
        part_condition_stage(model, optimizers, float(training["cond_stage_rate"]))
    if training["optimizer"] is not None or training["cond_stage_rate"] != 1.0:
        schedules = [rebuilt(s, o) for s, o in zip(schedules, optimizers, strict=False)]
    schedulers = [s["scheduler"] if isinstance(s, dict) else s for s in schedules]
    if training["scheduler"] is not None:
        factor = instantiate_from_config(training["scheduler"], where="training.scheduler")
        if not callable(getattr(factor, "schedule", None)):
            raise MismatchError(
                f"training.scheduler should be a schedule of ldm.lr_scheduler, got {type(factor).__name__}"
            )
        schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lr_lambda=factor.schedule) for o in optimizers]
    schedulers += [None] * (len(optimizers) - len(schedulers))
    return optimizers, schedulers


def chosen_optimizer(chosen: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """Return the class and the options that `training.optimizer` names.

    Raises:
        MismatchError: no target, or one that is no optimizer.
        UsageError: an option of the wrong kind or out of range.
    """
    if "target" not in chosen:
        raise MismatchError(
            f"training.optimizer needs the key 'target', got only {', '.join(chosen) or 'nothing'}"
        )
    kind = get_obj_from_str(chosen["target"], allow=TORCH_OPTIMIZERS)
    if not issubclass(kind, torch.optim.Optimizer):
        raise MismatchError(f"training.optimizer.target should be an optimizer, got {kind.__name__}")
    return kind, check(
        mapping(chosen.get("params"), "training.optimizer.params"), kind, "training.optimizer.params"
    )


def part_condition_stage(model: nn.Module, optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Give the condition stage's parameters a group of their own, at `factor` times the rate.

    Raises:
        UsageError: the factor is not within (0, 1000], or no parameter of a condition stage is trained.
    """
    if not (math.isfinite(factor) and 0 < factor <= 1000):
        raise UsageError(f"training.cond_stage_rate should be above 0 and at most 1000, got {factor:g}")
    stage = getattr(model, "cond_stage_model", None)
    theirs = {id(p) for p in stage.parameters()} if stage is not None else set()
    is_found = False
    for optimizer in optimizers:
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in theirs]
            if not moved:
                continue
            is_found = True
            group["params"] = [p for p in group["params"] if id(p) not in theirs]
            rate = group.get("initial_lr", group["lr"])  # a schedule may have touched "lr" already
            options = {name: value for name, value in group.items() if name != "initial_lr"}
            optimizer.add_param_group({**options, "params": moved, "lr": factor * rate})
    if not is_found:
        raise UsageError(
            f"training.cond_stage_rate is {factor:g}, but no condition stage is trained; set "
            "model.params.cond_stage_trainable: true, or leave it at 1"
        )


def rebuilt(schedule: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Put a LambdaLR's factor on an optimizer as it now is; all of its groups share one."""
    scheduler = schedule["scheduler"] if isinstance(schedule, dict) else schedule
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr", group["lr"])
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=scheduler.lr_lambdas[0])
