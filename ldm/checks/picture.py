"""The size of what a request paints, and the picture and mask that it starts from, checked."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm import images as pictures
from ldm.checks.around import check_around, framed, in_tiles, needs_frame
from ldm.devices import dtype_name
from ldm.errors import UsageError, shown
from ldm.limits import CELLS, SHARE, is_whole, real
from ldm.results import tensor_hash

if TYPE_CHECKING:
    from PIL import Image

    from ldm.checkpoints.sampling import SamplingDefaults

log = logging.getLogger(__name__)


def check_picture(
    image: Any, mask: Any, given: SimpleNamespace, f: int, defaults: SamplingDefaults, device: torch.device
) -> dict[str, Any]:
    """Check the size of what is painted, and the picture, mask and strength that it starts from.

    Args:
        given: all options by name.
        device: where a network that enlarges the picture computes.
    """
    found = check_around(given, image is not None, mask is not None)
    strength = given.strength
    size = (
        None if given.width is None else check_size("width", given.width, f),
        None if given.height is None else check_size("height", given.height, f),
    )
    own = (
        size[1] or check_size("height", defaults.size[0], f),
        size[0] or check_size("width", defaults.size[1], f),
    )
    frame, grid, tiles = None, None, []
    if "upscale_by" in found:
        whole, _ = _as_pictures(image, None, f)
        grid, tiles = in_tiles(whole, found, own[::-1], f, given.upscaler_dir, device)
        pixels, marks, original = tiles[0].pixels, None, tiles[0].frame.original
    elif image is not None and needs_frame(found, "loops" in found):
        whole, marked = _as_pictures(image, mask, f)
        if "outpaint" not in found:
            for name, side, pixels in zip(("width", "height"), size, whole.size, strict=True):
                check_size(f"{name} of the picture", side or pixels - pixels % f, f)
        source = framed(whole, marked, found, size, f)
        pixels, marks, frame, original = source.pixels, source.mask, source.frame, source.frame.original
    else:
        pixels, original, marks = read_pictures(image, mask, size, f)
    if pixels is None:
        if strength is not None:
            raise UsageError(
                f"strength is for a picture to start from, got strength={strength} and image=None"
            )
        height, width = own
        mode = "txt2img"
    else:
        width, height = (pixels.shape[3], pixels.shape[2]) if frame is None else frame.size
        for name, side in (("width of the picture", width), ("height of the picture", height)):
            check_size(name, side, f)
        mode = "img2img" if marks is None else "inpaint"
        if strength is None:
            strength = 0.75 if marks is None else 1.0
        strength = real("strength", strength, *SHARE)
    return {
        "mode": mode,
        "height": height,
        "width": width,
        "image": pixels,
        "original": original,
        "image_hash": None if pixels is None else tensor_hash(pixels),
        "mask": marks,
        "frame": frame,
        "tiles": (grid, tiles),
        "strength": strength,
    }


def check_size(name: str, value: int, f: int) -> int:
    """Return a side in pixels if the model can paint it.

    Raises:
        UsageError: it is no multiple of f, or out of range; the nearest two sides that work are named.
    """
    low, high = (cells * f for cells in CELLS)
    if not is_whole(value, low, high):
        raise UsageError(f"{name} must be a multiple of {f} from {low} to {high}, got {shown(value)}")
    if value % f:
        below = value - value % f
        raise UsageError(
            f"{name} must be a multiple of {f}, got {value}; the nearest two that work are {below} and {below + f}"
        )
    return int(value)


def read_pictures(
    image: Any, mask: Any, size: tuple[int | None, int | None], f: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Read a picture, in [-1, 1] and as it is given back in [0, 1], and a mask, of one size."""
    if image is None:
        if mask is not None:
            raise UsageError("a mask needs a picture to repaint, got mask and image=None")
        return None, None, None
    if isinstance(image, Tensor):
        pixels = _as_picture("image", image, 3)
        for name, side in zip(("width", "height"), (pixels.shape[3], pixels.shape[2]), strict=True):
            check_size(name, side, f)
        if size[0] not in (None, pixels.shape[3]) or size[1] not in (None, pixels.shape[2]):
            raise UsageError(
                f"an image given as a tensor keeps its size, got {tuple(pixels.shape)} and {size}"
            )
        most = pixels.float().abs().max().item()
        if not pixels.is_floating_point() or most > 2:
            raise UsageError(
                "an image given as a tensor must be floating point from -1 (black) to 1 (white), "
                f"got {dtype_name(pixels.dtype)} up to {most:g}; bytes x are 2 * (x / 255) - 1"
            )
        original = pictures.given_unit(pixels.cpu())
        pixels = pixels.float().cpu()
    else:
        image = _open("image", image)
        sides = [side or own - own % f for side, own in zip(size, image.size, strict=True)]
        low, high = (cells * f for cells in CELLS)
        for name, asked, side, own in zip(("width", "height"), size, sides, image.size, strict=True):
            # One that is too small or too large is told as it is, and not brought down to whole cells.
            check_size(f"{name} of the picture", side if asked or low <= side <= high else own, f)
        if tuple(sides) != image.size:
            log.info("the picture was resized from %s to %s", image.size, tuple(sides))
        pixels = pictures.to_tensor(pictures.fit_size(pictures.to_rgb(image), f, tuple(sides)))
        original = pictures.given_unit(pixels)
    marks = None
    if mask is not None:
        at = (pixels.shape[3], pixels.shape[2])
        if isinstance(mask, Tensor):
            marks = (_as_picture("mask", mask, 1).float().cpu() >= 0.5).float()
            if marks.shape[2:] != pixels.shape[2:]:
                raise UsageError(f"mask must have the picture's size {at}, got {tuple(marks.shape)}")
        else:
            mask = _open("mask", mask)
            if mask.size != at:
                log.info("the mask was resized from %s to %s", mask.size, at)
            marks = pictures.to_mask(mask, at)
        if not marks.any():
            raise UsageError("the mask marks nothing; paint white what is to be repainted")
    return pixels, original, marks


def _as_pictures(image: Any, mask: Any, f: int) -> tuple[Image.Image, Image.Image | None]:
    """Read a picture and a mask as Pillow's; tensors are checked, and rounded to bytes."""
    if isinstance(image, Tensor):
        _, original, _ = read_pictures(image, None, (None, None), f)
        (image,) = pictures.unit_to_pil(original)
    if isinstance(mask, Tensor):
        marks = (_as_picture("mask", mask, 1).float().cpu() >= 0.5).float()
        if (marks.shape[3], marks.shape[2]) != _open("image", image).size:
            raise UsageError(f"mask must have the picture's size, got {tuple(marks.shape)}")
        (mask,) = pictures.unit_to_pil(marks.expand(-1, 3, -1, -1))
    return _open("image", image), None if mask is None else _open("mask", mask)


def _as_picture(name: str, value: Tensor, channels: int) -> Tensor:
    if value.dim() != 4 or value.shape[:2] != (1, channels) or not torch.isfinite(value).all():
        raise UsageError(
            f"{name} must be a finite (1, {channels}, height, width) tensor, got {tuple(value.shape)}"
        )
    return value


def _open(name: str, value: Any) -> Image.Image:
    from PIL import Image

    if isinstance(value, str | os.PathLike):
        return pictures.open_image(value)
    if isinstance(value, Image.Image):
        return pictures.upright(value)
    raise UsageError(f"{name} must be a PIL picture, a path or a tensor, got {type(value).__name__}")
