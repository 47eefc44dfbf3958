"""How a picture of another size comes to the size that is painted: A1111's resize modes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

JUST, CROP, FILL, LATENT = "just resize", "crop and resize", "resize and fill", "latent upscale"


def fit(
    image: Image.Image, size: tuple[int, int], mode: str = JUST, resample: str = "LANCZOS"
) -> Image.Image:
    """Resize a picture to (width, height).

    Args:
        mode: "just resize" changes the aspect; "crop and resize" covers the size and cuts what is over;
            "resize and fill" lies within it, and continues its edges. "latent upscale" is as "just resize" here.
        resample: Pillow's name of the filter.
    """
    from PIL import Image

    if image.size == size:
        return image
    width, height = size
    # Of pictures that are wider than the size by their aspect the width is cut, or the height is filled.
    wider = image.width * height > width * image.height
    inner = size
    if mode in (CROP, FILL):
        by_width = wider == (mode == FILL)
        inner = (
            (width, max(1, image.height * width // image.width))
            if by_width
            else (max(1, image.width * height // image.height), height)
        )
    image = image.resize(inner, Image.Resampling[resample])
    if inner == size:
        return image
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    if mode == CROP:
        return image.crop((-left, -top, width - left, height - top))
    whole = Image.new(image.mode, size)
    whole.paste(image, (left, top))
    # A box without height or width is an edge.
    for side, at, box in (
        ((width, top), (0, 0), (0, 0, width, 0)),
        ((width, height - top - inner[1]), (0, top + inner[1]), (0, inner[1], width, inner[1])),
        ((left, height), (0, 0), (0, 0, 0, height)),
        ((width - left - inner[0], height), (left + inner[0], 0), (inner[0], 0, inner[0], height)),
    ):
        if min(side) > 0 and side != size:
            whole.paste(image.resize(side, box=box), at)
    return whole
