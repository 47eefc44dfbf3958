"""From a training state to plain weights: the averaged network in its place, no optimizer, no loss."""

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config_text import load_config
from ldm.errors import AbsentError, MismatchError, OutputError
from ldm.modules.ema import average_key
from ldm.paths import shipped
from ldm.process.schedule import SCHEDULE_BUFFERS
from ldm.training.checkpointing import read_newest

logger = logging.getLogger(__name__)

MARK = (
    "# Written with the weights of the same name, for use; a training's configuration is in its run folder.\n"
)
# Of the model's parameters, what only a training needs.
FOR_TRAINING = ("ckpt_path", "ignore_keys", "load_only_unet", "scheduler_config", "monitor", "reset_ema")


def plain_weights(state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Pick what a model needs for use out of a training state's state_dict, with CompVis's keys.

    A network with a moving average gives the average. Losses and the schedule's tables, which every reader
    computes, are left out; scale_factor stays in float32.

    Args:
        dtype: of the floating-point weights; None leaves each its own.
    """
    weights = {}
    for name, tensor in state_dict.items():
        is_loss = name.startswith(("loss.", "first_stage_model.loss."))
        if is_loss or name.startswith("model_ema.") or name in SCHEDULE_BUFFERS or name == "logvar":
            continue
        averaged = "model_ema." + name.removeprefix("model.").replace(".", "")
        if name.startswith("model.") and averaged in state_dict:
            tensor = state_dict[averaged]
        keeps_dtype = dtype is None or name == "scale_factor" or not tensor.is_floating_point()
        weights[name] = (tensor if keeps_dtype else tensor.to(dtype)).contiguous()
    return weights


def kept_averages(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """List a pixel model's averages: key of the rate (`average_key`) -> what the names of its buffers begin with.

    Empty for a model of another kind. The first is the one that was named first.
    """
    parts = [name.split(".") for name in state_dict if name.startswith("averages.")]
    return {part[1]: f"averages.{part[1]}." for part in parts}


def pixel_weights(
    state_dict: dict[str, Tensor], dtype: torch.dtype, ema_rate: float | None = None
) -> dict[str, Tensor]:
    """Pick a PixelDiffusion's network out of a training state's state_dict, averaged, with OpenAI's keys.

    Args:
        ema_rate: of the average; None for the one that was named first.

    Raises:
        MismatchError: the run kept no average of that rate.
    """
    averages = kept_averages(state_dict)
    key = next(iter(averages)) if ema_rate is None else average_key(ema_rate)
    if key not in averages:
        kept = ", ".join(name.replace("_", ".") for name in averages) or "none"
        raise MismatchError(f"the run has averages of rate {kept}, but not of {ema_rate}")
    names = [name.removeprefix("model.") for name in state_dict if name.startswith("model.")]
    averaged = {name: state_dict[averages[key] + name.replace(".", "")] for name in names}
    return {name: tensor.to(dtype).contiguous() for name, tensor in averaged.items()}


def settings_for_use(config: Mapping[str, Any], beside: Path) -> dict[str, Any]:
    """Turn a latent diffusion run's configuration into one for the exported weights.

    Args:
        config: of the run, with `model:`, and `sampling:` if it advises how to paint.
        beside: the folder of the weights; a text encoder's folder of one's own is named from there.
    """
    model = copy.deepcopy(dict(config["model"]))
    model.pop("base_learning_rate", None)
    params = {name: value for name, value in model["params"].items() if name not in FOR_TRAINING}
    params |= {"use_ema": False, "cond_stage_trainable": False}
    if "finetune_keys" in params:
        params["finetune_keys"] = None
    first_stage = params["first_stage_config"]
    if isinstance(first_stage, dict):
        inner = {n: v for n, v in first_stage.get("params", {}).items() if n not in FOR_TRAINING}
        first_stage["params"] = {**inner, "lossconfig": {"target": "torch.nn.Identity"}}
    text = params.get("cond_stage_config")
    version = text.get("params", {}).get("version") if isinstance(text, dict) else None
    if isinstance(version, str) and os.path.isdir(version) and not os.path.isabs(version):
        try:
            shipped(version)
        except AbsentError:
            text["params"]["version"] = os.path.relpath(version, beside)
    advice = {"sampling": config["sampling"]} if config.get("sampling") else {}
    return {**advice, "model": {**model, "params": params}}


def _yaml_for(run: Path, path: Path) -> str | None:
    """Write down the configuration of a run's weights; None where the run has none."""
    from omegaconf import OmegaConf

    file = run / "configs" / "project.yaml"
    if not file.is_file():
        logger.warning("'%s' is not there, so no configuration is written beside '%s'", file, path)
        return None
    config = OmegaConf.to_container(load_config(file), resolve=True)
    return MARK + OmegaConf.to_yaml(OmegaConf.create(settings_for_use(config, path.parent)))


def export_run(
    run: Path, path: Path, *, dtype: torch.dtype = torch.float16, ema_rate: float | None = None
) -> dict[str, str]:
    """Write a run's newest weights as one safetensors file.

    A latent diffusion run's file is a v1 checkpoint, and its configuration for use is written beside it under the same
    name, where every loader finds it. A pixel diffusion run's has the network alone, as OpenAI's have.

    Args:
        ema_rate: which of a pixel model's averages; None for the one that was named first.

    Returns:
        the file's metadata.

    Raises:
        AbsentError: the run has no checkpoint.
        MismatchError: the run kept no average of that rate.
        OutputError: a YAML file of that name is there and was not written by an export; nothing is written then.
    """
    from ldm.checkpoints import replacing, save_safetensors

    found = read_newest(run / "checkpoints")
    if found is None:
        raise AbsentError(
            f"there is no checkpoint in '{run}' to export; train first, or name the run with --logdir"
        )
    state, _ = found
    metadata = {"format": "pt", "global_step": str(state["global_step"]), "seed": str(state["run"]["seed"])}
    tensors = state["state_dict"]
    if kept_averages(tensors) or ema_rate is not None:
        weights = pixel_weights(tensors, dtype, ema_rate)
    else:
        weights = plain_weights(tensors, dtype)
    beside = path.with_suffix(".yaml")
    text = _yaml_for(run, path) if any(name.startswith("first_stage_model.") for name in weights) else None
    if text is not None and beside.exists() and not _is_ours(beside):
        raise OutputError(
            f"'{beside}' is there and not of an export, so the weights' configuration has no place; choose another name"
        )
    save_safetensors(path, weights, metadata)
    if text is not None:
        with replacing(beside) as file:
            file.write(text.encode("utf-8"))
    return metadata


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode("utf-8")
