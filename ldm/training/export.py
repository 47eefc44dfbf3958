"""From a training state to plain weights: the averaged network in its place, no optimizer, no loss."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import AbsentError, MismatchError
from ldm.models.diffusion.pixel_diffusion import average_key
from ldm.process.schedule import SCHEDULE_BUFFERS
from ldm.training.checkpointing import read_newest


def plain_weights(state_dict: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Pick what a model needs for use out of a training state's state_dict, with CompVis's keys.

    A network with a moving average gives the average. Losses and the schedule's tables, which every reader
    computes, are left out; scale_factor stays in float32.
    """
    weights = {}
    for name, tensor in state_dict.items():
        is_loss = name.startswith(("loss.", "first_stage_model.loss."))
        if is_loss or name.startswith("model_ema.") or name in SCHEDULE_BUFFERS or name == "logvar":
            continue
        averaged = "model_ema." + name.removeprefix("model.").replace(".", "")
        if name.startswith("model.") and averaged in state_dict:
            tensor = state_dict[averaged]
        keeps_dtype = name == "scale_factor" or not tensor.is_floating_point()
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


def export_run(
    run: Path, path: Path, *, dtype: torch.dtype = torch.float16, ema_rate: float | None = None
) -> dict[str, str]:
    """Write a run's newest weights as one safetensors file.

    A latent diffusion run's file is a v1 checkpoint, a pixel diffusion run's has the network alone, as OpenAI's have.

    Args:
        ema_rate: which of a pixel model's averages; None for the one that was named first.

    Returns:
        the file's metadata.

    Raises:
        AbsentError: the run has no checkpoint.
        MismatchError: the run kept no average of that rate.
    """
    from ldm.checkpoints import save_safetensors

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
    save_safetensors(path, weights, metadata)
    return metadata
