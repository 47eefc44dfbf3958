"""Resuming a run: whether a training state is whole, and which options may have changed since it was written."""

import fnmatch
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import MismatchError, shown

logger = logging.getLogger(__name__)

GUARD = ("total", "row", "recent")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def find_flaws(state: dict[str, Any]) -> list[str]:
    """Say which parts of a complete training state are not what they should be, whatever the model."""
    run, weights = state["run"], state["state_dict"]
    flaws = [
        f"has a '{key}' that is no step count" for key in ("global_step", "epoch") if not is_count(state[key])
    ]
    kinds = {"optimizer_states": (state, list), "lr_schedulers": (state, list), "state_dict": (state, dict)}
    kinds |= {"run": (state, dict)}
    if isinstance(run, dict):
        kinds |= {"data": (run, dict), "guard": (run, dict)}
        flaws += [f"has a 'run.{key}' that is no whole number" for key in ("seed",) if not is_count(run[key])]
    for key, (holder, kind) in kinds.items():
        if not isinstance(holder[key], kind):
            flaws.append(f"has a '{key}' that is no {kind.__name__} but a {type(holder[key]).__name__}")
    if flaws:
        return flaws
    guard = run["guard"]
    flaws += [f"lacks run.guard.{key}" for key in GUARD if key not in guard]
    if not flaws and not (
        is_count(guard["total"])
        and is_count(guard["row"])
        and isinstance(guard["recent"], list)
        and all(map(is_count, guard["recent"]))
    ):
        flaws.append("has a run.guard that is no count of skipped steps")
    for number, saved in enumerate(state["optimizer_states"]):
        flaws += [f"{flaw} in optimizer_states[{number}]" for flaw in _optimizer_flaws(saved)]
    for number, saved in enumerate(state["lr_schedulers"]):
        if saved is not None and not (isinstance(saved, dict) and is_count(saved.get("last_epoch"))):
            flaws.append(f"lacks the step count 'last_epoch' in lr_schedulers[{number}]")
    moments = run.get("moments")
    if moments is not None and not (isinstance(moments, list) and all(map(is_count, moments))):
        flaws.append("has a run.moments that is no list of counts")
    scale = run.get("loss_scale")
    if scale is not None and not (
        isinstance(scale, dict)
        and isinstance(scale.get("scale"), float)
        and 0 < scale["scale"] < math.inf
        and is_count(scale.get("sound"))
    ):
        flaws.append("has a run.loss_scale that is no scale and count")
    if not isinstance(run.get("options", {}), dict):
        flaws.append("has a run.options that is no mapping")
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            flaws.append(f"has a '{name}' in state_dict that is no tensor")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            flaws.append(f"has a '{name}' in state_dict that is not finite")
    return flaws


def _optimizer_flaws(saved: Any) -> list[str]:
    if not isinstance(saved, dict):
        return ["has no mapping"]
    flaws = [f"lacks '{key}'" for key in ("state", "param_groups") if key not in saved]
    if flaws:
        return flaws
    groups, entries = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or not all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(map(is_count, group["params"]))
        for group in groups
    ):
        return ["has 'param_groups' without lists of 'params'"]
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        return ["has a 'state' that is no mapping of moments"]
    known = {number for group in groups for number in group["params"]}
    return [
        f"has moments of a parameter {number!r:.20} that it does not list"
        for number in entries
        if number not in known
    ]


def go_to_step(scheduler: Any, saved: dict[str, Any]) -> None:
    """Set a schedule to its checkpoint's step; the rates are this run's own base rates times its own factors.

    Raises:
        MismatchError: the base rates differ, and the schedule is of a kind that builds each rate on the one before.
    """
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler.last_epoch = saved["last_epoch"]
        scheduler._step_count = scheduler.last_epoch + 1
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, factors, strict=True
        ):
            group["lr"] = base * factor
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return
    if saved.get("base_lrs") != scheduler.base_lrs:
        raise MismatchError(
            f"the checkpoint's learning rate is {saved.get('base_lrs')}, now {scheduler.base_lrs}; a "
            f"{type(scheduler).__name__} cannot take another on the way, resume with the run's own"
        )
    scheduler.load_state_dict({**scheduler.state_dict(), **saved})
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def wanted_moments(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, bool] | None:
    """Say what an optimizer remembers of a parameter: name -> whether in the parameter's shape.

    Found by one step of its kind on a parameter of six numbers; None where it cannot be made without more.
    """
    probe = nn.Parameter(torch.ones(2, 3))
    probe.grad = torch.ones_like(probe)
    try:
        twin = type(optimizer)([probe])
        twin.param_groups[0].update({name: value for name, value in group.items() if name != "params"})
        twin.step()
    except (TypeError, RuntimeError):
        return None
    return {
        name: isinstance(value, Tensor) and value.shape == probe.shape
        for name, value in twin.state[probe].items()
        if value is not None
    }


def check_moments(
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    number: int,
    count: int | None,
    *,
    has_stepped: bool,
) -> None:
    """Check a saved optimizer state against the shapes of the optimizer's parameters.

    Args:
        saved: a state_dict of its kind, of the same groups.
        number: of the optimizer, for messages.
        count: of how many parameters there were moments when it was saved; None where that was not noted.
        has_stepped: whether it had taken any step.

    Raises:
        MismatchError: moments are missing, misshapen, not finite, or of another kind of optimizer.
    """
    where, entries = f"optimizer_states[{number}]", saved["state"]
    advice = "resume from another checkpoint, or start a new run with model.params.ckpt_path"
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        wanted = wanted_moments(optimizer, group)
        if wanted is None:
            continue
        # A count of none is believed: float16 may have skipped every step so far.
        if wanted and has_stepped and not entries and count != 0:
            raise MismatchError(
                f"the checkpoint lacks all moments ({', '.join(wanted)}) in {where}; {advice}"
            )
        for parameter, index in zip(group["params"], saved_group["params"], strict=True):
            entry = entries.get(index)
            if entry is None:
                continue
            held = {name for name, value in entry.items() if value is not None}
            if held != set(wanted):
                lacking, others = sorted(set(wanted) - held), sorted(held - set(wanted))
                what = (
                    f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(others)}, of another kind,"
                )
                raise MismatchError(
                    f"the checkpoint {what} in {where}.state[{index}], but {type(optimizer).__name__} has "
                    f"{', '.join(wanted) or 'nothing'} there; resume with the run's own training.optimizer"
                )
            for name, is_shaped in wanted.items():
                value = entry[name] if isinstance(entry[name], Tensor) else torch.tensor(entry[name])
                shape = parameter.shape if is_shaped else torch.Size()
                if value.shape != shape or not torch.isfinite(value).all():
                    came = f"of shape {list(value.shape)}" if value.shape != shape else "not finite"
                    raise MismatchError(
                        f"the checkpoint's '{name}' in {where}.state[{index}] is {came}, wanted finite numbers "
                        f"of shape {list(shape)}; {advice}"
                    )
    if count is not None and len(entries) != count:
        raise MismatchError(
            f"the checkpoint lacks moments in {where}: {len(entries)} of {count} are there; {advice}"
        )


# -- what may change ------------------------------------------------------------------------------------

# By place: the first pattern that fits decides. What fits none is taken over: the run goes on with the new value.
FIXED, IDLE = "fixed", "idle"
RULES = (
    ("*scheduler*", None),  # the factor is computed afresh from the step
    # Weights come from the checkpoint, and their start lies behind the run.
    ("*.ckpt_path", IDLE),
    ("*.ignore_keys", IDLE),
    ("*.load_only_unet", IDLE),
    ("*.reset_ema", IDLE),
    ("*.reset_num_ema_updates", IDLE),
    ("*.finetune_keys", IDLE),
    ("*.keep_finetune_dims", IDLE),
    ("training.identity_start", IDLE),
    ("training.posterior_logvar_start", IDLE),
    # What the weights mean, and what the checkpoint holds the tables, averages or moments of.
    ("optimizers*", FIXED),
    ("*.target", FIXED),
    *(
        (f"model.params.{name}", FIXED)
        for names in (
            "timesteps beta_schedule linear_start linear_end cosine_s given_betas* v_posterior parameterization",
            "scale_factor scale_by_std logvar_init learn_logvar use_ema ema_rate* diffusion_steps noise_schedule",
            "predict_xstart learn_sigma schedule_sampler timestep_respacing rescale_timesteps",
        )
        for name in names.split()
    ),
)


def rule_of(place: str) -> str | None:
    """Say whether an option is FIXED, IDLE, or (None) free to change."""
    return next((rule for pattern, rule in RULES if fnmatch.fnmatchcase(place, pattern)), None)


def differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (place, old value, new value) where two trees of plain data differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
    elif old != new:
        yield place, old, new


def compare(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> list[str]:
    """Compare the options of a resumed run with those of its checkpoint.

    Returns:
        A line for each that is taken over. Those that can have no effect any more are warned about.

    Raises:
        MismatchError: one that cannot change within a run.
    """
    taken = []
    for place, was, now in differences(old, new):
        rule = rule_of(place)
        if rule == FIXED:
            raise MismatchError(
                f"'{path}' is of a run with {place} {shown(was)}, now {shown(now)}; that cannot change within a run: "
                "resume with the run's own value, or start a new run with model.params.ckpt_path"
            )
        if rule == IDLE:
            logger.warning(
                "%s is now %s instead of %s, which has no effect on a resumed run: its weights come from '%s'",
                place,
                shown(now),
                shown(was),
                path,
            )
        else:
            taken.append(f"resuming with {place} {shown(now)} instead of {shown(was)}")
    return taken
