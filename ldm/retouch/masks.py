"""Masks of inpainting: softened, the region around them, what is put under them, and the canvas of outpainting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ldm.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

# How often a blur of which radius is laid over the picture: the last, unblurred, is what the mask leaves.
FILL = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


def blur(mask: Image.Image, x: float, y: float) -> Image.Image:
    """Soften a grey mask by Gaussians of standard deviations x and y in pixels, one after the other; 0 leaves it.

    Kernels reach 2.5 deviations, the edge is mirrored without its own pixel, and each direction is rounded to bytes, as
    A1111 has it by OpenCV.
    """
    from PIL import Image

    pixels = np.asarray(mask, dtype=np.uint8)  # (height, width)
    for axis, sigma in ((1, x), (0, y)):
        if sigma > 0:
            pixels = _blur_along(pixels, axis, sigma)
    return Image.fromarray(pixels)


def _blur_along(pixels: np.ndarray, axis: int, sigma: float) -> np.ndarray:
    reach = int(2.5 * sigma + 0.5)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    ends = [(0, 0), (0, 0)]
    ends[axis] = (reach, reach)
    wide = np.moveaxis(np.pad(pixels, ends, mode="reflect"), axis, -1)
    # Of long kernels a product of spectra is much the faster; what wraps around is cut off.
    spectrum = np.fft.rfft(wide) * np.fft.rfft(kernel / kernel.sum(), wide.shape[-1])
    total = np.fft.irfft(spectrum, wide.shape[-1])[..., 2 * reach :]
    return np.moveaxis(np.clip(np.rint(total), 0, 255), -1, axis).astype(np.uint8)


def region_of(mask: Image.Image, padding: int) -> tuple[int, int, int, int]:
    """Find the smallest box (left, top, right, bottom) around what is not black, wider by padding on each side.

    Raises:
        UsageError: everything is black.
    """
    box = mask.getbbox()
    if box is None:
        raise UsageError("the mask marks nothing; paint white what is to be repainted")
    left, top, right, bottom = box
    return (
        max(left - padding, 0),
        max(top - padding, 0),
        min(right + padding, mask.width),
        min(bottom + padding, mask.height),
    )


def widened(
    box: tuple[int, int, int, int], aspect: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Enlarge a box to the aspect of (width, height), inside a picture of (width, height) as far as that goes."""
    left, top, right, bottom = box
    if (right - left) * aspect[1] > aspect[0] * (bottom - top):
        top, bottom = _grown(top, bottom, int((right - left) * aspect[1] / aspect[0]), size[1])
    else:
        left, right = _grown(left, right, int((bottom - top) * aspect[0] / aspect[1]), size[0])
    return left, top, right, bottom


def _grown(low: int, high: int, wanted: int, most: int) -> tuple[int, int]:
    """Let an interval grow on both sides to a length, moved back into 0 to most, or to all of that."""
    more = max(0, wanted - (high - low))
    low -= more // 2
    high = low + wanted if more else high
    low -= max(0, high - most)
    high = min(high, most)
    return (0, min(high - low, most)) if low < 0 else (low, high)


def fill(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Put the colours around a mask (L, white is filled) under it, by blurs of falling radius laid over one another."""
    from PIL import Image, ImageFilter, ImageOps

    kept = Image.new("RGBa", image.size)  # colours times opacity, so that nothing black bleeds in
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    filled = Image.new("RGBA", image.size)
    for radius, times in FILL:
        layer = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            filled.alpha_composite(layer)
    return filled.convert("RGB")


def extended(
    image: Image.Image, sides: tuple[int, int, int, int], multiple: int
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Lay a picture on a canvas that is larger by (left, up, right, down) pixels, which `fill` gives its colours.

    The canvas is rounded up to a multiple on both sides; what that adds goes to the sides that grow, by their share.

    Returns:
        canvas, and the box (left, top, right, bottom) of the picture in it.
    """
    from PIL import Image

    left, up, right, down = sides
    left, right = _shared_out(left, right, image.width, multiple)
    up, down = _shared_out(up, down, image.height, multiple)
    canvas = Image.new("RGB", (image.width + left + right, image.height + up + down))
    box = (left, up, left + image.width, up + image.height)
    canvas.paste(image, box)
    return fill(canvas, around(box, canvas.size)), box


def around(box: tuple[int, int, int, int], size: tuple[int, int], inwards: int = 0) -> Image.Image:
    """Make a mask of (width, height) that is white around a box; what the box shares with the edge stays black.

    Args:
        inwards: how many pixels of the box are white, too, at its other sides.
    """
    from PIL import Image

    left, top = (side + (inwards if side else 0) for side in box[:2])
    right, bottom = (side - (inwards if side < most else 0) for side, most in zip(box[2:], size, strict=True))
    mask = Image.new("L", size, 255)
    if left < right and top < bottom:
        mask.paste(0, (left, top, right, bottom))
    return mask


def _shared_out(before: int, after: int, side: int, multiple: int) -> tuple[int, int]:
    """Round side + before + after up to a multiple, what that adds shared out as before and after are."""
    total = before + after
    if not total:
        return 0, 0
    more = total + -(side + total) % multiple
    first = before * more // total
    return first, more - first
