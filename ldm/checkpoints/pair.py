"""Which tensor of a file goes where in a model, decided from names and shapes before any value is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldm.checkpoints import names
from ldm.checkpoints.account import LoadReport, match, shown
from ldm.checkpoints.files import Weights
from ldm.checkpoints.folders import modern_name
from ldm.errors import MismatchError
from ldm.process.schedule import SCHEDULE_BUFFERS

COMPUTED = "computed from the configuration"
# Left over from a training that is not resumed, or from another reader; none of them is used in sampling.
UNUSED = {
    "cond_stage_model.logit_scale": "not used by the text encoder of v1",
    "cond_stage_model.text_projection": "not used by the text encoder of v1",
    "cond_stage_model.transformer.logit_scale": "not used by the text encoder of v1",
    "cond_stage_model.transformer.text_projection.weight": "not used by the text encoder of v1",
    "lvlb_weights": COMPUTED,
    "model_ema.decay": "bookkeeping of a moving average that this model does not keep",
    "model_ema.num_updates": "bookkeeping of a moving average that this model does not keep",
}


def account_model(
    model: nn.Module,
    source: Weights,
    family: str,
    use_ema: bool | None = None,
    given_vae: str | Path | None = None,
) -> LoadReport:
    """Pair a full model with its file.

    Raises:
        MismatchError: tensors that do not pair, or an average that is asked for and not there.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    report = LoadReport(path=shown(source.path), family=family, notes=list(source.notes))
    folder = source.kind == "diffusers folder"
    rename = _folder_names(wanted, source) if folder else _file_names(source)
    for name in source.infos:
        reason = _reason_to_ignore(rename.get(name, name), wanted)
        if reason:
            report.ignored[name] = reason
    for name in dict(model.named_buffers()):
        absent = name not in source.infos or name in report.ignored
        if name in wanted and absent and not name.startswith(tuple(names.PARTS.values())):
            report.initialised[name] = COMPUTED
    _account_ema(wanted, source, rename, report, use_ema)
    if given_vae is not None:
        reason = f"replaced by the VAE of '{shown(given_vae)}'"
        report.ignored.update({n: reason for n in source.infos if rename.get(n, n).startswith(names.VAE)})
        report.initialised.update(
            {n: f"VAE of '{shown(given_vae)}'" for n in wanted if n.startswith(names.VAE)}
        )
    report.assigned = match(
        source.path,
        held=source.infos,
        wanted=wanted,
        rename=rename,
        ignored=report.ignored,
        initialised=report.initialised,
        linear_is_conv=folder,
    )
    return report


def _file_names(source: Weights) -> dict[str, str]:
    """Where a single file's names differ from the model's: text keys without "text_model."."""
    head = names.TEXT + "transformer."
    return {n: head + names.text_name(n.removeprefix(head)) for n in source.infos if n.startswith(head)}


def _folder_names(wanted: Mapping[str, Any], source: Weights) -> dict[str, str]:
    """Translate a folder's names by translating the model's own and turning the table round."""

    def inside(prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in wanted if name.startswith(prefix)]

    table = {
        f"unet/{theirs}": names.UNET + ours
        for ours, theirs in names.unet_to_diffusers(inside(names.UNET)).items()
    }
    table |= {
        f"vae/{theirs}": names.VAE + ours
        for ours, theirs in names.vae_to_diffusers(inside(names.VAE)).items()
    }
    rename = {}
    for name in source.infos:
        modern = modern_name(name)
        if modern.startswith("text_encoder/"):
            rename[name] = f"{names.TEXT}transformer.{modern.removeprefix('text_encoder/')}"
        else:
            rename[name] = table.get(modern, name)
    return rename


def _reason_to_ignore(name: str, wanted: Mapping[str, Any]) -> str | None:
    """Say why a tensor of the file, under its name in the model, is left out; None if it is not."""
    if name.endswith(names.POSITION_IDS):
        return "a constant, made anew"
    if name in SCHEDULE_BUFFERS and name in wanted:
        return f"{COMPUTED}, and equal"
    if name in wanted:
        return None
    if name in UNUSED:
        return UNUSED[name]
    if name.startswith((f"{names.VAE}loss.", "loss.")):
        return "the VAE's training loss"
    if name.startswith(f"{names.VAE}model_ema."):
        return "a moving average of the VAE"
    if name in ("logvar", "scale_factor"):
        return "fixed by the configuration"
    return None


def _account_ema(
    wanted: Mapping[str, Any],
    source: Weights,
    rename: dict[str, str],
    report: LoadReport,
    use_ema: bool | None,
) -> None:
    """Decide where the UNet's weights and its moving average come from; changes rename and report."""
    shadows = {names.ema_name(name): name for name in wanted if name.startswith("model.")}
    held = [shadow for shadow in shadows if shadow in source.infos]
    keeps = any(name.startswith(names.EMA) for name in wanted)
    if use_ema and not held:
        raise MismatchError(
            f"'{shown(source.path)}' has no EMA weights (model_ema.*); load it with use_ema=False"
        )
    if use_ema is None and held and keeps:
        report.notes.append("plain weights in the UNet, the file's EMA weights in its moving average")
        return
    if use_ema:
        for shadow in held:
            rename[shadow] = shadows[shadow]
            if shadows[shadow] in source.infos:
                report.ignored[shadows[shadow]] = "the EMA weights were chosen"
    else:
        report.ignored.update({shadow: "EMA weights, the plain ones were chosen" for shadow in held})
    if keeps:
        report.notes.append("the model's moving average was seeded from the loaded weights")
        for name in wanted:
            if name.startswith(names.EMA) and name in shadows:
                report.initialised[name] = "seeded from the loaded weights"
            elif name.startswith(names.EMA) and (use_ema is False or name not in source.infos):
                report.initialised[name] = COMPUTED
                if name in source.infos:
                    report.ignored[name] = UNUSED[name]


def account_vae(module: nn.Module, source: Weights, ignore_keys: tuple[str, ...] = ()) -> LoadReport:
    """Pair an autoencoder with a file that holds one, alone or among others.

    Raises:
        MismatchError: no VAE in the file, or tensors that do not pair.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    report = LoadReport(path=shown(source.path), family="VAE", notes=list(source.notes))
    diffusers = source.kind == "diffusers folder" or names.family_of(source.infos) == "VAE (diffusers)"
    rename: dict[str, str] = {}
    if diffusers:
        table = {theirs: ours for ours, theirs in names.vae_to_diffusers(wanted).items()}
        for name in source.infos:
            modern = names.modern_vae_name(name.removeprefix("vae/"))
            rename[name] = table.get(modern, name)
    elif any(name.startswith(names.VAE) for name in source.infos):
        rename = {n: n.removeprefix(names.VAE) for n in source.infos if n.startswith(names.VAE)}
        report.ignored = {n: "not part of the VAE" for n in source.infos if n not in rename}
    for name in source.infos:
        target = rename.get(name, name)
        if ignore_keys and target.startswith(ignore_keys):
            report.ignored[name] = "left out by ignore_keys"
        elif target not in wanted and target.startswith(("loss.", "model_ema.")):
            report.ignored[name] = "training state of the VAE"
    given = {rename.get(name, name) for name in source.infos if name not in report.ignored}
    if not given & wanted.keys():
        kind = names.REFUSED.get(names.family_of(source.infos), "a model without one")
        raise MismatchError(f"'{shown(source.path)}' holds no VAE that fits: it is {kind}")
    for name in wanted:
        if name in given:
            continue
        if name.startswith(("loss.", "model_ema.")) or (ignore_keys and name.startswith(ignore_keys)):
            report.initialised[name] = "keeps its own value"
    report.assigned = match(
        source.path,
        held=source.infos,
        wanted=wanted,
        rename=rename,
        ignored=report.ignored,
        initialised=report.initialised,
        linear_is_conv=diffusers,
    )
    return report
