"""Hints from pictures, by rules that need no weights: edges, black on white, tiles, holes, shuffled pixels.

    ControlNet("control_v11p_sd15_canny.pth", preprocess("house.png", "canny", low=80))

Thresholds and rules are those of A1111's extension for ControlNet. What a network draws (depths, poses, soft edges) is
given ready.
"""

import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import images
from ldm.adapters.controls import MASKED, read_hints
from ldm.errors import AbsentError, UsageError, nearest, shown
from ldm.limits import whole
from ldm.values import Range, check_value

BYTE = (0, 255)
SHUFFLE_CELL = 256  # pixels between the random numbers that pixels are moved by
# Kinds that other programs draw with a network: a name that begins so.
WITH_WEIGHTS = (
    "depth", "midas", "zoe", "normal", "bae", "pose", "openpose", "dwpose", "densepose", "face", "mediapipe", "hed",
    "softedge", "pidi", "pidinet", "teed", "lineart", "anime", "mlsd", "seg", "ofade", "oneformer", "uniformer", "clip",
    "scribble_", "ip-adapter", "animal", "hand",
)  # fmt: skip


def preprocess(picture: Any, kind: str, **options: Any) -> Tensor:
    """Make a hint of a picture.

    Args:
        picture: as Hint takes one: a picture of PIL, the path of one, or a tensor (3, height, width) in [0, 1].
        kind: a name of KINDS.
        options: of that kind; see its function.

    Returns:
        (3, height, width) float32 in [0, 1], at the picture's size; -1 where "inpaint" is to make something up.

    Raises:
        UsageError: another kind, one that needs weights, an option that it does not have, or several pictures.
        AbsentError: "canny" without OpenCV.
        Others: as images.open_image.
    """
    name = find(kind)
    function = KINDS[name]
    known = list(inspect.signature(function).parameters)[1:]
    for option in options:
        if option not in known:
            has = f"has {', '.join(known)}" if known else "has no options"
            raise UsageError(f"{name!r} {has}, got {shown(option)}")
    pictures = read_hints(picture)
    if len(pictures) != 1:
        raise UsageError(f"one picture at a time is preprocessed, got {len(pictures)}")
    return function(pictures[0], **options)


def find(kind: Any) -> str:
    """Give the name of a kind of hint, in any case.

    Raises:
        UsageError: there is no such kind, or it needs weights.
    """
    name = kind.lower().strip() if isinstance(kind, str) else None
    if name in KINDS:
        return name
    names = ", ".join(KINDS)
    if name is not None and name.startswith(WITH_WEIGHTS):
        raise UsageError(
            f"{shown(kind, 40)} is drawn by a network of its own, which is not here: give a ready map as the hint; "
            f"{names} need none"
        )
    near = nearest(name, KINDS) if name else None
    hint = f"; did you mean {near!r}?" if near else ""
    raise UsageError(f"a kind of hint should be one of {names}, got {shown(kind, 40)}{hint}")


def canny(picture: Tensor, low: float = 100, high: float = 200) -> Tensor:
    """Draw edges white on black (Canny 1986, by OpenCV), for ControlNets named canny.

    Args:
        low, high: gradients, in steps of a byte, from which an edge goes on, and begins.
    """
    low, high = (
        float(check_value(one, float, name, Range(*BYTE))) for one, name in ((low, "low"), (high, "high"))
    )
    if low > high:
        raise UsageError(f"low should not be above high, got low={low:g} and high={high:g}")
    try:
        import cv2
    except ImportError:
        raise AbsentError(
            "canny needs OpenCV: pip install 'faithful-ldm[hints]' (opencv-python-headless), or give a ready map"
        ) from None
    edges = cv2.Canny(_bytes(picture), low, high)
    return _grey(torch.from_numpy(edges).float() / 255)


def threshold(picture: Tensor, level: float = 127) -> Tensor:
    """Make what is brighter than a byte in all channels white, and all else black."""
    return _grey((255 * picture.min(0).values > _level(level)).float())


def scribble(picture: Tensor, level: float = 127) -> Tensor:
    """Make dark lines on a light ground white on black, for ControlNets named scribble: darker than a byte is white."""
    return _grey((255 * picture.min(0).values < _level(level)).float())


def invert(picture: Tensor) -> Tensor:
    """Exchange light and dark: of black lines on white, what ControlNets named lineart were trained on."""
    return 1 - picture


def tile(picture: Tensor, rate: float = 1) -> Tensor:
    """Make a picture coarser, for ControlNets named tile, which add details; with a rate of 1 it is as it is.

    Args:
        rate: how many pixels a side become one.
    """
    rate = float(check_value(rate, float, "rate", Range(1, 64)))
    h, w = picture.shape[1:]
    small = (max(1, round(h / rate)), max(1, round(w / rate)))
    if small == (h, w):
        return picture
    coarse = F.interpolate(picture[None], size=small, mode="area")
    return F.interpolate(coarse, size=(h, w), mode="bicubic").clamp(0, 1)[0]


def inpaint(picture: Tensor, mask: Any = None) -> Tensor:
    """Mark the pixels that an inpainting ControlNet (control_v11p_sd15_inpaint) is to make up, by -1.

    Args:
        mask: a picture of PIL or the path of one, whose lighter half is to be made up.
    """
    if isinstance(mask, str | os.PathLike):
        mask = images.open_image(mask)
    if not (hasattr(mask, "convert") and hasattr(mask, "getbands")):
        raise UsageError(
            f"'inpaint' wants mask=, a picture whose white is made up, got {'none' if mask is None else shown(mask)}"
        )
    h, w = picture.shape[1:]
    holes = images.to_mask(images.upright(mask), (w, h))[0, 0] > 0
    return torch.where(holes, torch.full_like(picture, MASKED), picture)


def shuffle(picture: Tensor, seed: int = 0) -> Tensor:
    """Move pixels about by smooth random numbers, for ControlNets named shuffle: colours stay, contents do not.

    Args:
        seed: of the random numbers.
    """
    h, w = picture.shape[1:]
    generator = torch.Generator().manual_seed(whole("seed", seed, 0, 2**63 - 1))
    f = SHUFFLE_CELL
    noise = torch.rand(2, 1, h // f + 2, w // f + 2, generator=generator)
    flow = F.interpolate(noise, size=(h + 2 * f, w + 2 * f), mode="bicubic")[:, 0, f : f + h, f : f + w]
    low, high = flow.amin((1, 2), keepdim=True), flow.amax((1, 2), keepdim=True)
    where = (flow - low) / (high - low).clamp(min=1e-9) * 2 - 1  # (x, y) from -1 to 1, one side to the other
    return F.grid_sample(picture[None], where.permute(1, 2, 0)[None], align_corners=True).clamp(0, 1)[0]


KINDS: dict[str, Callable[..., Tensor]] = {
    "canny": canny,
    "inpaint": inpaint,
    "invert": invert,
    "scribble": scribble,
    "shuffle": shuffle,
    "threshold": threshold,
    "tile": tile,
}


def _level(level: Any) -> float:
    return float(check_value(level, float, "level", Range(*BYTE)))


def _bytes(picture: Tensor) -> np.ndarray:
    return images.unit_to_uint8(picture[None])[0]


def _grey(picture: Tensor) -> Tensor:
    return picture.expand(3, -1, -1).contiguous()
