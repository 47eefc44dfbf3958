"""Which configuration belongs to a weight file: the caller's, one beside it, or Stable Diffusion v1's."""

import contextlib
import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.checkpoints import families
from ldm.checkpoints.files import Weights
from ldm.config_text import load_config, resolved
from ldm.errors import AbsentError, LdmError, MismatchError, escaped, refuse_elsewhere
from ldm.paths import shipped

logger = logging.getLogger(__name__)

CONFIGS = {"v1": "configs/v1-inference.yaml", "v1-inpainting": "configs/v1-inpainting.yaml"}
# CompVis's and its forks' own files by the ends of their paths -> ours, with the same keys.
THEIR_CONFIGS = {
    "v1-inference.yaml": CONFIGS["v1"],
    "v1-inpainting-inference.yaml": CONFIGS["v1-inpainting"],
    "v1-inpainting.yaml": CONFIGS["v1-inpainting"],
}
V1_WIDTH = 320  # channels of Stable Diffusion v1's UNet; other sizes need their own configuration
YAML = (".yaml", ".yml")
# Parameters that forks give LatentDiffusion for their trainings; none of them changes what a loaded model computes.
TRAINING_ONLY = frozenset(
    "personalization_config embedding_reg_weight unfreeze_model model_lr embedding_lr learning_rate weight_decay "
    "freeze_model add_token reg_weight prior_loss_weight train_text_encoder trainable_keys sd_locked "
    "only_mid_control".split()
)
# What trainers and forks call the option of the last level without signal -> our name, diffusers' own.
ZERO_SNR = "rescale_betas_zero_snr"
ZERO_SNR_ALIASES = ("zero_terminal_snr", "zero_snr", "ztsnr")

# Option -> names of tensors or metadata that switch it on -> values of such metadata that do.
_YES = ("", "1", "true", "yes")
MARKERS = {
    "parameterization": {
        "v_pred": _YES,
        "ss_v_parameterization": _YES,
        "modelspec.prediction_type": ("v", "v_prediction"),
        "prediction_type": ("v", "v_prediction"),
    },
    ZERO_SNR: {"ztsnr": _YES, "ss_zero_terminal_snr": _YES, ZERO_SNR: _YES},
}


@dataclass(frozen=True)
class Candidate:
    """A configuration that may be a file's, with what is to be said of it. origin: the YAML file beside the weights."""

    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    origin: Path | None = None


def candidates(
    path: Path, source: Weights, family: str, config: str | Path | Mapping[str, Any] | None
) -> list[Candidate]:
    """List the configurations that a file may have, the likeliest first.

    The caller's; else a YAML file beside it, of its name or called config.yaml; else Stable Diffusion v1's.

    Raises:
        MismatchError: none is given or found, or the caller's contradicts the file.
    """
    if config is not None:
        candidate = _candidate(config, source)
        _check_channels(path, source, family, candidate.settings)
        return [candidate]
    found: list[Candidate] = []
    beside = config_beside(path)
    shape = families.first_shape(families.canonical_infos(source.infos))
    is_v1 = shape[:1] == (V1_WIDTH,)
    unread = ""
    if beside is not None:
        try:
            candidate = _candidate(beside, source)
            note = f"configuration '{escaped(beside)}', found beside the file"
            found.append(replace(candidate, notes=(note, *candidate.notes), origin=beside))
        except LdmError as error:
            # A folder's config.yaml may be another program's; one with the file's own name is meant for it.
            if beside.stem == path.stem or not is_v1:
                raise with_origin(error, beside) from error
            unread = f"'{escaped(beside)}' is no configuration of a model and was left alone"
    if beside is None or (beside.stem != path.stem and is_v1):
        if not is_v1:
            raise MismatchError(
                f"'{escaped(path)}' has a UNet of width {shape[0] if shape else 'unknown'}, Stable Diffusion v1's is "
                f"{V1_WIDTH}; give the configuration that belongs to it, or put it beside the file as "
                f"'{escaped(path.stem, 60)}.yaml'"
            )
        candidate = _candidate(shipped(CONFIGS[family]), source)
        if unread:
            candidate = replace(candidate, notes=(unread, *candidate.notes))
        found.append(candidate)
    return found


def with_origin(error: LdmError, origin: Path) -> LdmError:
    return type(error)(f"with '{escaped(origin.name, 60)}', found beside it: {error}")


def config_beside(path: Path) -> Path | None:
    """Find the YAML file that belongs to a weight file: of its name, else the folder's config.yaml."""
    for stem in (path.stem, "config"):
        for suffix in YAML:
            if (beside := path.with_name(stem + suffix)).is_file():
                return beside
    return None


def _candidate(config: str | Path | Mapping[str, Any], source: Weights) -> Candidate:
    settings = read_settings(config)
    params = settings["model"]["params"]
    notes = []
    left = sorted(params.keys() & TRAINING_ONLY) if _is_ours(settings) else []
    for name in left:
        del params[name]
    if left:
        notes.append(f"for training only, left out of the configuration: {', '.join(left)}")
        logger.warning("'%s': %s", escaped(source.path), notes[-1])
    return Candidate(settings, (*notes, *_heed_markers(params, source)))


def _is_ours(settings: Mapping[str, Any]) -> bool:
    return str(settings["model"]["target"]).startswith("ldm.models.diffusion.ddpm.")


def _heed_markers(params: dict[str, Any], source: Weights) -> list[str]:
    """Read from a file what its network predicts and whether its last level has no signal, where the configuration
    does not say; returns what is to be said of that."""
    notes = []
    for key, value, words in (
        ("parameterization", "v", "predicts v"),
        (ZERO_SNR, True, "has a last level without signal (zero terminal SNR)"),
    ):
        marker = _marker(source, key)
        if marker is None:
            continue
        if key not in params:
            params[key] = value
            notes.append(f"the file says by '{marker}' that the model {words}; so it is used")
        elif params[key] != value:
            notes.append(
                f"the file says by '{marker}' that the model {words}; the configuration's {key} was kept"
            )
            logger.warning("'%s': %s", escaped(source.path), notes[-1])
    return notes


def _marker(source: Weights, option: str) -> str | None:
    """Name the tensor or metadata by which a file switches an option on."""
    for name, values in MARKERS[option].items():
        if name in source.infos or source.metadata.get(name, "no").strip().lower() in values:
            return name
    return None


def _check_channels(path: Path, source: Weights, family: str, settings: Mapping[str, Any]) -> None:
    unet = settings["model"]["params"].get("unet_config", {})
    wanted = unet.get("params", {}).get("in_channels") if isinstance(unet, Mapping) else None
    shape = families.first_shape(families.canonical_infos(source.infos))
    if len(shape) > 1 and wanted is not None and wanted != shape[1]:
        kind = {4: "text-to-image", 9: "inpainting"}.get(shape[1], "other")
        raise MismatchError(
            f"'{escaped(path)}' is a {shape[1]}-channel ({kind}) checkpoint, but the configuration asks for {wanted} "
            f"channels; use {CONFIGS[family]} or none"
        )


def find_config(config: str | Path) -> Path:
    """Find a configuration file: where it is said to be, else the one that ships with ldm, also for CompVis's paths.

    Raises:
        AbsentError: there is none.
    """
    path = Path(config)
    if os.path.exists(path):
        return path
    with contextlib.suppress(AbsentError):
        return shipped(str(config))
    if ours := THEIR_CONFIGS.get(path.name):
        logger.info("'%s' is not there; '%s' with the same keys is used", escaped(config), ours)
        return shipped(ours)
    refuse_elsewhere("configuration", config)
    raise AbsentError(
        f"configuration '{escaped(config)}' does not exist; check the path, or leave it out for Stable Diffusion v1 "
        f"(with ldm come {', '.join(CONFIGS.values())})"
    )


def read_settings(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read a model configuration into plain dicts, without paths of weights to load on the way.

    A text encoder's folder that lies beside the YAML file is found from everywhere.
    """
    from omegaconf import OmegaConf

    folder = None
    if isinstance(config, str | Path):
        file = find_config(config)
        folder, config = file.parent, load_config(file)
    settings = resolved(config) if OmegaConf.is_config(config) else copy.deepcopy(config)
    model = settings.get("model") if isinstance(settings, Mapping) else None
    if not isinstance(model, dict) or "target" not in model:
        raise MismatchError(
            "a model configuration needs 'model:' with 'target' and 'params'; this one has none"
        )
    params = model["params"] = model.get("params") or {}
    if not isinstance(params, dict):
        raise MismatchError(
            f"'params' of a model configuration should be a mapping, got {escaped(params, 60)}"
        )
    if params.pop("ckpt_path", None) is not None and "finetune_keys" in params:
        params["finetune_keys"] = None  # only for training from another model's file
    first_stage = params.get("first_stage_config")
    if isinstance(first_stage, dict) and isinstance(first_stage.get("params"), dict):
        first_stage["params"].pop("ckpt_path", None)
    text = params.get("cond_stage_config")
    if folder is not None and isinstance(text, dict) and isinstance(text.get("params"), dict):
        for name in ("version", "tokenizer"):
            value = text["params"].get(name)
            if isinstance(value, str) and value and os.path.isdir(folder / value):
                text["params"][name] = str(folder / value)
    for alias in ZERO_SNR_ALIASES:
        if alias in params and _is_ours(settings):
            params.setdefault(ZERO_SNR, params.pop(alias))
    return settings
