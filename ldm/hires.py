"""How hires fix enlarges what its first pass gave: latents by interpolation, pictures by Pillow or a network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm import images as pictures
from ldm.retouch.upscalers import FileUpscaler, find_upscaler

if TYPE_CHECKING:
    from PIL import Image

# How latents are interpolated, A1111's table: name -> (mode, with a low-pass filter). Other names are of pictures.
LATENT = {
    "latent": ("bilinear", False),
    "latent antialiased": ("bilinear", True),
    "latent bicubic": ("bicubic", False),
    "latent bicubic antialiased": ("bicubic", True),
    "latent nearest": ("nearest", False),
    "latent nearest-exact": ("nearest-exact", False),
}


def enlarge_latents(latents: Tensor, cells: tuple[int, int], upscaler: str) -> Tensor:
    """Interpolate latents (b, c, h, w) to (b, c, *cells).

    Args:
        upscaler: of LATENT.
    """
    mode, antialias = LATENT[upscaler]
    return F.interpolate(latents, size=cells, mode=mode, antialias=antialias)


def enlarge_pictures(unit: Tensor, size: tuple[int, int], upscaler: str | FileUpscaler) -> Tensor:
    """Resize pictures (b, 3, height, width) in [0, 1], rounded to bytes, to (width, height), and into [-1, 1]."""
    resized = [enlarge_picture(image, size, upscaler) for image in pictures.unit_to_pil(unit)]
    return torch.cat([pictures.to_tensor(image) for image in resized])


def enlarge_picture(image: Image.Image, size: tuple[int, int], upscaler: str | FileUpscaler) -> Image.Image:
    """Resize a picture to (width, height).

    Args:
        upscaler: "lanczos", "nearest", or a network from a file.
    """
    from PIL import Image

    if isinstance(upscaler, FileUpscaler):
        return upscaler.enlarge(image, size)
    return image.resize(size, Image.Resampling[upscaler.upper()])


def load_upscaler(
    name: str, value: str, folder: str | os.PathLike | None, words: Sequence[str], device: torch.device
) -> str | FileUpscaler:
    """Give an upscaler that an option names: a way without a file by its name, or the network of a file.

    Args:
        name: of the option, which errors name.
        folder: with files that are called by their names, or None.
        words: names of ways without a file.

    Raises:
        As FileUpscaler and find_upscaler.
    """
    return value if value in words else FileUpscaler(find_upscaler(name, value, folder, words), device)


def middle(x: Tensor, sides: tuple[int, int]) -> Tensor:
    """Cut (height, width) out of the middle of (b, c, H, W); of an odd rest the larger part goes at the end."""
    top, left = ((have - want) // 2 for have, want in zip(x.shape[2:], sides, strict=True))
    return x[:, :, top : top + sides[0], left : left + sides[1]]
