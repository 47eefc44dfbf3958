"""Which tensor of a file goes where in a model, decided from names and shapes before any value is read."""

import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from ldm.checkpoints import families, key_mapping
from ldm.checkpoints.families import COMPUTED
from ldm.checkpoints.files import Weights
from ldm.checkpoints.report import NAMED, LoadReport, TensorInfo, first_few
from ldm.errors import MismatchError, UsageError, escaped
from ldm.process.schedule import SCHEDULE_BUFFERS

logger = logging.getLogger(__name__)

LEFT_OUT = "left out by ignore"
SCALES = (".scale_weight", ".weight_scale")  # what ComfyUI calls the factor of a weight in 8 bits


def check_patterns(ignore: str | Iterable[str]) -> tuple[str, ...]:
    """Bring `ignore` into a tuple of patterns.

    Raises:
        UsageError: one of them is no text, or empty, which would fit every name.
    """
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise UsageError(
                f"ignore takes names, their beginnings or shell patterns ('loss.*'), got {pattern!r:.60}"
            )
    return patterns


def fits(name: str, pattern: str) -> bool:
    """Tell whether a name is a shell pattern's, or begins with it, as CompVis's ignore_keys have it."""
    return name.startswith(pattern) or fnmatchcase(name, pattern)


def without(infos: Mapping[str, TensorInfo], patterns: tuple[str, ...]) -> dict[str, TensorInfo]:
    """Leave out the tensors that `ignore` names."""
    return {
        name: info for name, info in infos.items() if not any(fits(name, pattern) for pattern in patterns)
    }


def without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Leave out sizes of 1 at the end: (c, c) is a linear layer and (c, c, 1, 1) the same as a convolution."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def match(
    path: str,
    *,
    infos: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[int, ...]],
    rename: Mapping[str, str],
    ignored: Mapping[str, str],
    initialised: Mapping[str, str],
) -> dict[str, str]:
    """Match the tensors of a file with those of a model by name and shape, or say in one error what does not match.

    Shapes may differ in sizes of 1 at their ends: (c, c) is a linear layer and (c, c, 1, 1) the same as a convolution,
    and diffusers' export writes either, and biases as (c, 1, 1).

    Args:
        path: the file, for the message.
        infos: what the file holds, by name.
        wanted: the shape of every tensor of the model's state dict.
        rename: name in the file -> name in the model, for those whose names differ; a name that is absent
            here stands for itself.
        ignored: names of the file that are left out on purpose, with the reason.
        initialised: names of the model that need not be in the file, with the reason.

    Returns:
        name in the file -> name in the model.

    Raises:
        MismatchError: missing, unexpected, misshapen or twice-named tensors; the first few are named.
    """
    assigned: dict[str, str] = {}
    source: dict[str, str] = {}
    unexpected, misshapen, twice = [], [], []
    for name, info in infos.items():
        if name in ignored:
            continue
        target = rename.get(name, name)
        if target not in wanted:
            unexpected.append(name)
            continue
        if target in source:
            twice.append(f"{source[target]} and {name}")
            continue
        source[target] = name
        assigned[name] = target
        if without_trailing_ones(info.shape) != without_trailing_ones(tuple(wanted[target])):
            misshapen.append(f"'{escaped(name)}' {list(info.shape)} instead of {list(wanted[target])}")
    missing = [name for name in wanted if name not in source and name not in initialised]

    faults = []
    if missing:
        faults.append(f"{len(missing)} of the model's {len(wanted)} tensors missing ({first_few(missing)})")
    foreign = f"{len(unexpected)} of the file's {len(infos)} not expected ({first_few(unexpected)})"
    if unexpected:
        faults.append(foreign)
    if misshapen:
        tail = f" and {len(misshapen) - NAMED} more" if len(misshapen) > NAMED else ""
        faults.append(f"{len(misshapen)} of another shape ({', '.join(misshapen[:NAMED])}{tail})")
    if twice:
        faults.append(f"{len(twice)} given twice ({first_few(twice)})")
    if faults:
        advice = "use the file's own configuration"
        if faults[0] == foreign:
            advice = "leave it out with ignore= (--ignore-keys PATTERN) if it is no part of a model"
        raise MismatchError(f"'{escaped(path)}' does not fit the model: {'; '.join(faults)}; {advice}")
    return assigned


def match_model(
    model: nn.Module,
    source: Weights,
    family: str,
    use_ema: bool | None = None,
    given_vae: str | Path | None = None,
    ignore: tuple[str, ...] = (),
) -> LoadReport:
    """Match a full model with its file.

    Raises:
        MismatchError: tensors that do not match, or an average that use_ema wants and that is not whole.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    report = LoadReport(path=escaped(source.path), family=family, notes=list(source.notes))
    rename = _to_model(key_mapping.canonical(source.infos), wanted)
    _leave_out(report, source, ignore)
    for name, target in rename.items():
        reason = None if name in report.ignored else _reason_to_ignore(target, wanted)
        if reason:
            report.ignored[name] = reason
    _match_scales(wanted, rename, report)
    given = {target for name, target in rename.items() if name not in report.ignored}
    for name in dict(model.named_buffers()):
        if name in wanted and name not in given and not name.startswith(tuple(key_mapping.PARTS.values())):
            report.initialised[name] = COMPUTED
    _match_ema(wanted, source, rename, report, use_ema)
    if given_vae is None:
        _match_vae_average(wanted, source, rename, report, key_mapping.VAE)
    else:
        reason = f"replaced by the VAE of '{escaped(given_vae)}'"
        report.ignored.update({n: reason for n, t in rename.items() if t.startswith(key_mapping.VAE)})
        report.initialised.update(
            {n: f"VAE of '{escaped(given_vae)}'" for n in wanted if n.startswith(key_mapping.VAE)}
        )
    _match(report, source, wanted, rename)
    return report


def _match(
    report: LoadReport, source: Weights, wanted: Mapping[str, tuple[int, ...]], rename: Mapping[str, str]
) -> None:
    report.assigned = match(
        source.path,
        infos=source.infos,
        wanted=wanted,
        rename=rename,
        ignored=report.ignored,
        initialised=report.initialised,
    )
    reshaped = sum(source.infos[n].shape != tuple(wanted[t]) for n, t in report.assigned.items())
    if reshaped:
        report.notes.append(f"{reshaped} tensors had sizes of 1 too many or too few at their ends")


def _to_model(spelling: Mapping[str, str], wanted: Iterable[str]) -> dict[str, str]:
    """Give a file's tensors, under their canonical names, the names that they have in the model.

    diffusers' names are translated by translating the model's own and turning the table round.
    """

    def inside(prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in wanted if name.startswith(prefix)]

    table = {
        f"unet/{theirs}": key_mapping.UNET + ours
        for ours, theirs in key_mapping.unet_to_diffusers(inside(key_mapping.UNET)).items()
    } | {
        f"vae/{theirs}": key_mapping.VAE + ours
        for ours, theirs in key_mapping.vae_to_diffusers(inside(key_mapping.VAE)).items()
    }
    # A scale stands beside its weight.
    table |= {
        theirs.removesuffix(".weight") + end: ours.removesuffix(".weight") + end
        for theirs, ours in table.items()
        if theirs.endswith(".weight")
        for end in SCALES
    }
    return {name: table.get(known, known) for name, known in spelling.items()}


def _leave_out(report: LoadReport, source: Weights, patterns: tuple[str, ...]) -> None:
    """Ignore the tensors that `ignore` names, and warn of patterns that match none."""
    for pattern in patterns:
        found = [name for name in source.infos if fits(name, pattern)]
        report.ignored.update(dict.fromkeys(found, LEFT_OUT))
        if not found:
            report.notes.append(f"ignore '{escaped(pattern, 60)}' fits no tensor of the file")
            logger.warning("'%s': %s", report.path, report.notes[-1])


def _reason_to_ignore(name: str, wanted: Mapping[str, Any]) -> str | None:
    """Say why a tensor of the file, under its name in the model, is left out; None if it is not."""
    if name.endswith(key_mapping.POSITION_IDS):
        return "a constant, made anew"
    if name in SCHEDULE_BUFFERS and name in wanted:
        return f"{COMPUTED}, and equal"
    if name in wanted:
        return None
    if name in ("logvar", "scale_factor"):
        return "fixed by the configuration"
    return None if name.startswith(f"{key_mapping.VAE}model_ema.") else families.why_unused(name)


def _match_scales(wanted: Mapping[str, Any], rename: Mapping[str, str], report: LoadReport) -> None:
    """Find the factors of weights in 8 bits, which ComfyUI writes beside them."""
    for name, target in rename.items():
        base, dot, end = target.rpartition(".")
        if dot + end in SCALES and f"{base}.weight" in wanted and name not in report.ignored:
            report.ignored[name] = "a scale, multiplied into its weight"
            report.scales[f"{base}.weight"] = name


def _match_ema(
    wanted: Mapping[str, Any],
    source: Weights,
    rename: dict[str, str],
    report: LoadReport,
    use_ema: bool | None,
) -> None:
    """Decide where the UNet's weights and its moving average come from; changes rename and report."""
    path = escaped(source.path)
    in_file = {target: name for name, target in rename.items() if name not in report.ignored}
    shadows = {key_mapping.ema_name(name): name for name in wanted if name.startswith("model.")}
    averages = [shadow for shadow in shadows if shadow in in_file]
    plain = [name for name in shadows.values() if name in in_file]
    keeps = any(name.startswith(key_mapping.EMA) for name in wanted)
    is_only = bool(averages) and not plain  # the UNet is nowhere else
    if use_ema and not averages:
        raise MismatchError(f"'{path}' has no EMA weights (model_ema.*); load it with use_ema=False")
    if use_ema is False and is_only:
        raise MismatchError(
            f"'{path}' has its UNet as a moving average only (model_ema.*), no plain weights; load it with use_ema=True"
        )
    chosen = use_ema or is_only
    if averages and len(averages) < len(shadows) and (chosen or (keeps and use_ema is None)):
        raise _incomplete(path, "moving average (model_ema.*)", averages, shadows, is_only)
    if not chosen and averages and keeps and use_ema is None:
        report.notes.append("plain weights in the UNet, the file's EMA weights in its moving average")
        return
    for shadow in averages:
        if chosen:
            rename[in_file[shadow]] = shadows[shadow]
        else:
            report.ignored[in_file[shadow]] = "EMA weights, the plain ones were chosen"
    if chosen:
        report.ignored.update({in_file[name]: "the EMA weights were chosen" for name in plain})
    if is_only:
        report.notes.append("the UNet is in the file as a moving average only, which was loaded")
    if keeps:
        report.notes.append("the model's moving average was seeded from the loaded weights")
        for name in wanted:
            if name.startswith(key_mapping.EMA) and name in shadows:
                report.initialised[name] = "seeded from the loaded weights"
            elif name.startswith(key_mapping.EMA) and (use_ema is False or name not in in_file):
                report.initialised[name] = COMPUTED
                if name in in_file:
                    report.ignored[in_file[name]] = families.why_unused(name)


def _incomplete(
    path: str, what: str, averages: list[str], shadows: Mapping[str, str], is_only: bool
) -> MismatchError:
    missing = [shadow for shadow in shadows if shadow not in set(averages)]
    advice = "no plain weights are there; get the file again" if is_only else "load it with use_ema=False"
    return MismatchError(
        f"'{path}' holds {len(averages)} of {len(shadows)} tensors of its {what}, without {first_few(missing, 2)}; "
        f"{advice}"
    )


def _match_vae_average(
    wanted: Mapping[str, Any], source: Weights, rename: dict[str, str], report: LoadReport, prefix: str
) -> None:
    """Take the VAE's moving average where the file has the VAE in no other form; else leave it out."""
    in_file = {target: name for name, target in rename.items() if name not in report.ignored}
    average = f"{prefix}model_ema."
    shadows = {
        average + name.removeprefix(prefix).replace(".", ""): name
        for name in wanted
        if name.startswith(prefix) and not name.startswith((average, f"{prefix}loss."))
    }
    averages = [shadow for shadow in shadows if shadow in in_file]
    is_only = bool(averages) and not any(name in in_file for name in shadows.values())
    if is_only and len(averages) < len(shadows):
        raise _incomplete(
            escaped(source.path), f"VAE's moving average ({average}*)", averages, shadows, is_only
        )
    if is_only:
        rename.update({in_file[shadow]: shadows[shadow] for shadow in averages})
        report.notes.append("the VAE is in the file as a moving average only, which was loaded")
    for target, name in in_file.items():
        if target.startswith(average) and target not in wanted and not (is_only and target in shadows):
            report.ignored[name] = "a moving average of the VAE"


def match_vae(module: nn.Module, source: Weights, ignore: tuple[str, ...] = ()) -> LoadReport:
    """Match an autoencoder with a file that holds one, alone or among others.

    Raises:
        MismatchError: no VAE in the file, or tensors that do not match.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    report = LoadReport(path=escaped(source.path), family="VAE", notes=list(source.notes))
    spelling = key_mapping.canonical(source.infos)
    if not any(known.startswith((key_mapping.VAE, "vae/")) for known in spelling.values()):
        alone = key_mapping.canonical(key_mapping.VAE + known for known in spelling.values())
        spelling = {name: alone[key_mapping.VAE + known] for name, known in spelling.items()}
    full = _to_model(spelling, [key_mapping.VAE + name for name in wanted])
    rename = {name: target.removeprefix(key_mapping.VAE) for name, target in full.items()}
    _leave_out(report, source, ignore)
    for name, target in full.items():
        if name in report.ignored or rename[name] in wanted:
            continue
        if not target.startswith((key_mapping.VAE, "vae/")):
            report.ignored[name] = "not part of the VAE"
        elif (reason := families.why_unused(target)) and not target.startswith(
            f"{key_mapping.VAE}model_ema."
        ):
            report.ignored[name] = reason
    _match_scales(wanted, rename, report)
    _match_vae_average(wanted, source, rename, report, "")
    given = {target for name, target in rename.items() if name not in report.ignored}
    if not given & wanted.keys():
        kind = families.REFUSED.get(families.family_of(source.infos), "a model without one")
        raise MismatchError(f"'{escaped(source.path)}' holds no VAE that fits: it is {kind}")
    for name in wanted.keys() - given:
        if name.startswith(("loss.", "model_ema.")) or any(fits(name, pattern) for pattern in ignore):
            report.initialised[name] = "keeps its own value"
    _match(report, source, wanted, rename)
    return report
