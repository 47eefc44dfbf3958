"""From a training state to plain weights: the averaged network in its place, no optimizer, no loss."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import AbsentError
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


def export_run(run: Path, path: Path, *, dtype: torch.dtype = torch.float16) -> dict[str, str]:
    """Write a run's newest weights as one safetensors file; a diffusion run's file is a v1 checkpoint.

    Returns:
        the file's metadata.

    Raises:
        AbsentError: the run has no checkpoint.
    """
    from ldm.checkpoints import save_safetensors

    found = read_newest(run / "checkpoints")
    if found is None:
        raise AbsentError(
            f"there is no checkpoint in '{run}' to export; train first, or name the run with --logdir"
        )
    state, _ = found
    metadata = {"format": "pt", "global_step": str(state["global_step"]), "seed": str(state["run"]["seed"])}
    save_safetensors(path, plain_weights(state["state_dict"], dtype), metadata)
    return metadata
