"""What other people's code imports from ldm.util: CompVis's helpers, and those that tutorials have from ControlNet."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import read_tensors
from ldm.config import get_obj_from_str, instantiate_from_config
from ldm.config_text import load_config, resolved
from ldm.devices import pick_device
from ldm.errors import MismatchError, UsageError
from ldm.helpers import count_params, default, exists, isimage, ismap, mean_flat

__all__ = [
    "count_params",
    "create_model",
    "default",
    "exists",
    "get_obj_from_str",
    "instantiate_from_config",
    "isimage",
    "ismap",
    "load_config",
    "load_state_dict",
    "log_txt_as_img",
    "mean_flat",
    "parallel_data_prefetch",
    "resolved",
]


def log_txt_as_img(wh: tuple[int, int], xc: Iterable[str], size: int = 10) -> Tensor:
    """Draw one caption per picture, black on white, wrapped to the width.

    Args:
        wh: (width, height) in pixels.
        xc: the captions.
        size: of the letters, in pixels.

    Returns:
        (b, 3, height, width) in [-1, 1].
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    width, height = wh
    font = ImageFont.load_default(size)
    per_line = max(1, int(1.6 * width / size))
    pictures = []
    for caption in xc:
        lines = [caption[i : i + per_line] for i in range(0, len(caption), per_line)]
        picture = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(picture).text((0, 0), "\n".join(lines), fill="black", font=font)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1.0)  # (3, h, w)
    return torch.stack(pictures)


def create_model(config_path: str | Path) -> nn.Module:
    """Build the model of a configuration file on the CPU, with initial weights, ready for `load_state_dict`.

    ControlNet's words for it, which tutorials go by:

        model = create_model("configs/v1-inference.yaml")
        model.load_state_dict(load_state_dict("model_data/v1-5-pruned-emaonly.safetensors"), strict=False)

    strict=False says nothing of what it leaves out; load_latent_diffusion of ldm.checkpoints does both in one call,
    faster, and accounts for every tensor.

    Raises:
        As load_config and instantiate_from_config; MismatchError: the file has no 'model:'.
    """
    config = load_config(config_path)
    if "model" not in config:
        found = ", ".join(map(str, config))
        raise MismatchError(
            f"configuration '{config_path}' needs a 'model:' with 'target' and 'params'; it has {found:.120}"
        )
    model = instantiate_from_config(config["model"])
    return model.cpu()


def load_state_dict(path: str | Path, location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a .ckpt, .pt, .pth, .bin or .safetensors file by name, what is under "state_dict" as it is.

    A file's format is read from its content, not from its name, and none can run code.

    Args:
        location: the device that the tensors go to.

    Raises:
        As ldm.checkpoints.read_tensors; UsageError: there is no such device.
    """
    device = pick_device(location, or_meta=True)
    tensors, _ = read_tensors(path)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def parallel_data_prefetch(
    func: Callable[[Any], Any],
    data: Any,
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:
    """Apply a function to n_proc slices of the data side by side and join the results in order.

    Args:
        func: takes a slice (and the worker's number, if use_worker_id).
        data: an array or list.
        n_proc: how many workers.
        target_data_type: "ndarray" concatenates the results, "list" chains them.
        cpu_intensive: processes instead of threads.
        use_worker_id: pass the worker's number as a second argument.
    """
    import numpy as np

    if target_data_type not in ("ndarray", "list"):
        raise UsageError(f"target_data_type should be 'ndarray' or 'list', got {target_data_type!r}")
    if n_proc < 1:
        raise UsageError(f"n_proc should be at least 1, got {n_proc}")
    data = list(data.values()) if isinstance(data, Mapping) else data
    bounds = [len(data) * i // n_proc for i in range(n_proc + 1)]
    slices = [data[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    arguments = [slices, range(n_proc)] if use_worker_id else [slices]
    pool = ProcessPoolExecutor if cpu_intensive else ThreadPoolExecutor
    with pool(n_proc) as workers:
        results = list(workers.map(func, *arguments))
    return (
        np.concatenate(results, axis=0) if target_data_type == "ndarray" else [x for r in results for x in r]
    )
