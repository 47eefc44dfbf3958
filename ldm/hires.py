"""How hires fix enlarges what its first pass gave: latents by interpolation, pictures by Pillow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm import images as pictures

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


def enlarge_pictures(unit: Tensor, size: tuple[int, int], upscaler: str) -> Tensor:
    """Resize pictures (b, 3, height, width) in [0, 1], rounded to bytes, to (width, height), and into [-1, 1].

    Args:
        upscaler: "lanczos" or "nearest".
    """
    from PIL import Image

    how = Image.Resampling[upscaler.upper()]
    resized = [image.resize(size, how) for image in pictures.unit_to_pil(unit)]
    return torch.cat([pictures.to_tensor(image) for image in resized])


def middle(x: Tensor, sides: tuple[int, int]) -> Tensor:
    """Cut (height, width) out of the middle of (b, c, H, W); of an odd rest the larger part goes at the end."""
    top, left = ((have - want) // 2 for have, want in zip(x.shape[2:], sides, strict=True))
    return x[:, :, top : top + sides[0], left : left + sides[1]]
