"""From a file and a configuration to a model without memory: which family it is, and what would hold its tensors."""

import contextlib
import copy
import gc
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoints import names
from ldm.checkpoints.account import shown
from ldm.checkpoints.files import Weights, open_weights
from ldm.checkpoints.folders import FolderWeights, folder_settings, is_diffusers_folder
from ldm.configs import load_config, resolved
from ldm.errors import MismatchError, UsageError
from ldm.paths import shipped
from ldm.util import instantiate_from_config

CONFIGS = {"v1": "configs/v1-inference.yaml", "v1-inpainting": "configs/v1-inpainting.yaml"}
V1_WIDTH = 320  # channels of Stable Diffusion v1's UNet; other sizes need their own configuration


def open_model(
    path: Path, config: str | Path | Mapping[str, Any] | None, opened: contextlib.ExitStack
) -> tuple[Weights, str, dict[str, Any]]:
    """Open a full model; name its family and find its configuration.

    Raises:
        MismatchError: another family, or a configuration that contradicts the file.
    """
    if is_diffusers_folder(path):
        family, settings = folder_settings(path)
        source: Weights = opened.enter_context(contextlib.closing(FolderWeights(path)))
        return source, family, settings if config is None else read_settings(config)
    source = opened.enter_context(contextlib.closing(open_weights(path)))
    family = names.family_of(source.infos)
    if family in names.REFUSED:
        advice = names.ADVICE.get(family, "a full Stable Diffusion v1 model is needed here")
        raise MismatchError(f"'{shown(path)}' is {names.REFUSED[family]}; {advice}")
    first = source.infos.get(f"{names.UNET}input_blocks.0.0.weight")
    shape = first.shape if first is not None else ()
    if config is None:
        if shape[:1] != (V1_WIDTH,):
            raise MismatchError(
                f"'{shown(path)}' has a UNet of width {shape[0] if shape else 'unknown'}, Stable Diffusion v1's is "
                f"{V1_WIDTH}; give the configuration that belongs to it"
            )
        return source, family, read_settings(shipped(CONFIGS[family]))
    settings = read_settings(config)
    unet = settings["model"].get("params", {}).get("unet_config", {})
    wanted = unet.get("params", {}).get("in_channels") if isinstance(unet, Mapping) else None
    if len(shape) > 1 and wanted is not None and wanted != shape[1]:
        kind = {4: "text-to-image", 9: "inpainting"}.get(shape[1], "other")
        raise MismatchError(
            f"'{shown(path)}' is a {shape[1]}-channel ({kind}) checkpoint, but the configuration asks for {wanted} "
            f"channels; use {CONFIGS[family]} or none"
        )
    return source, family, settings


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector: building makes many objects that stay, and each few thousand set it off again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_settings(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read a model configuration into plain dicts, without paths of weights to load on the way."""
    from omegaconf import OmegaConf

    if isinstance(config, str | Path):
        config = load_config(config)
    settings = resolved(config) if OmegaConf.is_config(config) else copy.deepcopy(config)
    model = settings.get("model") if isinstance(settings, Mapping) else None
    if not isinstance(model, dict) or "target" not in model:
        raise MismatchError(
            "a model configuration needs 'model:' with 'target' and 'params'; this one has none"
        )
    params = model.setdefault("params", {})
    if params.pop("ckpt_path", None) is not None and "finetune_keys" in params:
        params["finetune_keys"] = None  # only for training from another model's file
    first_stage = params.get("first_stage_config")
    if isinstance(first_stage, dict) and isinstance(first_stage.get("params"), dict):
        first_stage["params"].pop("ckpt_path", None)
    return settings


class _Empty(TorchFunctionMode):
    """Inside torch.device("meta"): keep tensors that are made from values real, and draw no first weights.

    What has no memory cannot be filled; computing what it would be filled with is most of the time of building.
    """

    MAKERS = frozenset({torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.full})
    # By name: transformers puts functions of its own in the place of torch's.
    FILLS = frozenset(name for name in dir(nn.init) if re.fullmatch("[a-z]+(_[a-z]+)*_", name)) | {
        "fill_",
        "zero_",
    }

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FILLS:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        if func in self.MAKERS and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def build_empty(settings: Mapping[str, Any], tokenizer: str | Path | None = None) -> nn.Module:
    """Build a configured model whose weights take no memory (meta device) and whose computed tables are real."""
    model_config = copy.deepcopy(dict(settings["model"]))
    if tokenizer is not None:
        stage = model_config["params"].get("cond_stage_config")
        if not isinstance(stage, dict):
            raise UsageError("tokenizer= needs a model with a text encoder; this configuration has none")
        stage.setdefault("params", {})["tokenizer"] = str(tokenizer)
    with torch.device("meta"), _Empty():
        return instantiate_from_config(model_config, where="model").eval()
