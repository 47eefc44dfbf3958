"""The picture that a request begins with, as A1111's options have it: fitted, masked, filled; and how it is laid back.

`frame_picture` makes of a picture, a mask and options what is painted (a Source); its Frame lays what was painted into
the picture that comes back. What is neither fitted, softened, cut out nor recoloured needs neither: see
ldm.checks.picture.read_pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm.errors import UsageError
from ldm.retouch import masks
from ldm.retouch.colour import match_colours
from ldm.retouch.fit import CROP, FILL, JUST, LATENT, fit
from ldm.retouch.tiles import Grid

if TYPE_CHECKING:
    from PIL import Image

ORIGINAL, FILLED, NOISE, NOTHING = "original", "fill", "latent noise", "latent nothing"
FILLED_LATENTS = (NOISE, NOTHING)


@dataclass(frozen=True, eq=False)
class Frame:
    """What is around that which is painted.

    Args:
        original: (1, 3, H, W) in [0, 1]: the picture that it is laid into.
        size: (width, height) that is painted.
        weights: (1, 1, H, W): share of what is painted in each pixel; 0 keeps the original's bytes; None is 1.
        box: (left, top, right, bottom) in the original that is painted; None is all of it, at its own size.
        colours: (height, width, 3) uint8, whose colours what is painted gets; None keeps its own.
    """

    original: Tensor
    size: tuple[int, int]
    weights: Tensor | None = None
    box: tuple[int, int, int, int] | None = None
    colours: np.ndarray | None = None

    def lay(self, unit: Tensor, pixels: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Lay painted pictures into the original.

        Args:
            unit, pixels: (b, 3, height, width) in [0, 1], and their bytes (b, height, width, 3).

        Returns:
            the same of the whole, (b, 3, H, W) and (b, H, W, 3).
        """
        if self.colours is not None:
            pixels = np.stack([match_colours(one, self.colours) for one in pixels])
        if self.box is not None:
            pixels = np.stack([self._placed(one) for one in pixels])
        if self.colours is not None or self.box is not None:
            unit = _unit(pixels)
        if self.weights is None:
            return unit, pixels
        share = self.weights[0, 0, :, :, None].numpy()
        mixed = np.rint(share * pixels + (1.0 - share) * pictures.unit_to_uint8(self.original))
        return pictures.paste(unit, self.original, self.weights), mixed.astype(np.uint8)

    def _placed(self, pixels: np.ndarray) -> np.ndarray:
        left, top, right, bottom = self.box
        (whole,) = pictures.unit_to_uint8(self.original)
        (painted,) = pictures.uint8_to_pil(pixels[None])
        whole[top:bottom, left:right] = np.asarray(fit(painted, (right - left, bottom - top), CROP))
        return whole

    def cut(self, pixels: np.ndarray) -> Tensor:
        """Cut out of pictures (b, H, W, 3) uint8 what is painted of them: (b, 3, height, width) in [-1, 1]."""
        whole = pictures.uint8_to_pil(pixels)
        parts = whole if self.box is None else [one.crop(self.box) for one in whole]
        return torch.cat([pictures.to_tensor(fit(one, self.size, FILL)) for one in parts])


@dataclass(frozen=True, eq=False)
class Source:
    """A picture to begin with.

    Args:
        pixels: (1, 3, height, width) in [-1, 1], for the encoder; with "latent upscale" of the picture's own size.
        mask: (1, 1, height, width) of what is painted, 1 = repaint; None is everything.
        frame: what is around it.
    """

    pixels: Tensor
    mask: Tensor | None
    frame: Frame


def frame_picture(
    image: Image.Image,
    mask: Image.Image | None,
    size: tuple[int | None, int | None],
    f: int,
    *,
    resize_mode: str = JUST,
    color_match: bool = False,
    outpaint: tuple[int, int, int, int] | None = None,
    mask_invert: bool = False,
    mask_blur: tuple[int, int] = (0, 0),
    inpaint_fill: str = ORIGINAL,
    inpaint_full_res: bool = False,
    inpaint_full_res_padding: int = 32,
) -> Source:
    """Make of a picture (RGB) and a mask (L of 0 and 255) what is painted, by A1111's rules.

    Args:
        size: (width, height) that is painted; None is the picture's own side, down to a multiple of f.
        outpaint: pixels to grow at (left, up, right, down); the canvas is then painted at its own size unless another
            is given.
        mask_blur: standard deviations (x, y) in pixels of the picture.

    Raises:
        UsageError: a mask that marks nothing, or nothing when it is softened.
    """
    if mask is not None and (mask_invert or inpaint_full_res or outpaint or resize_mode != JUST):
        mask = fit(mask, image.size, JUST, "NEAREST")  # its place in the picture matters
    if mask is not None and mask_invert:
        mask = mask.point(lambda grey: 255 - grey)
    marked = mask  # what is painted; `mask` is what is mixed
    if outpaint is not None:
        image, mask, marked = _on_canvas(image, mask, outpaint, mask_blur, f)
        mask_blur = (2 * mask_blur[0], 2 * mask_blur[1])
    width, height = (side or own - own % f for side, own in zip(size, image.size, strict=True))
    size = width, height
    soft, box, whole = None, None, image
    if mask is not None:
        if not marked.getbbox():
            raise UsageError("the mask marks nothing; paint white what is to be repainted")
        soft = masks.blur(mask, *mask_blur)
        if not soft.getbbox():
            raise UsageError(
                f"mask_blur {max(mask_blur)} leaves nothing of so small a mask; give less, or a larger mask"
            )
    if soft is not None and inpaint_full_res:
        box = masks.widened(masks.region_of(soft, inpaint_full_res_padding), size, image.size)
        image, painted, marked = (one.crop(box) for one in (image, soft, marked))
        image = fit(image, size, FILL)
        painted, marked = fit(painted, size, FILL), fit(marked, size, FILL, "NEAREST")
        weights = soft
    else:
        own_size, image = image, fit(image, size, resize_mode)
        whole = image
        if soft is not None:
            resample = "LANCZOS" if any(mask_blur) else "NEAREST"
            soft = painted = fit(soft, size, resize_mode, resample)
            marked = fit(marked, size, resize_mode, "NEAREST")
            weights = soft.point(lambda grey: min(2 * grey, 255))  # A1111's: whole where half is marked
        elif resize_mode == LATENT:
            image = pictures.fit_size(own_size, f)
    if soft is not None and inpaint_fill != ORIGINAL:  # also under latents that are replaced, as A1111 does
        image = masks.fill(image, painted)
    original = pictures.given_unit(pictures.to_tensor(whole))
    frame = Frame(
        original,
        size,
        None if soft is None else _grey(weights),
        box,
        np.asarray(image) if color_match else None,
    )
    pixels = pictures.to_tensor(image)
    return Source(pixels, None if marked is None else (_grey(marked) >= 0.5).float(), frame)


def _on_canvas(
    image: Image.Image,
    mask: Image.Image | None,
    sides: tuple[int, int, int, int],
    blur: tuple[int, int],
    f: int,
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Let a picture grow; give the canvas, what is mixed of it and what is painted (A1111's poor man's outpainting)."""
    image = pictures.fit_size(image, f)
    canvas, box = masks.extended(image, sides, f)
    found = []
    for inwards in (2 * max(blur), max(blur) // 2):
        border = masks.around(box, canvas.size, inwards)
        if mask is not None:
            border.paste(255, box, fit(mask, image.size, JUST, "NEAREST"))
        found.append(border)
    return canvas, *found


def _unit(pixels: np.ndarray) -> Tensor:
    """Turn (b, height, width, 3) uint8 into (b, 3, height, width) in [0, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(0, 3, 1, 2)


def _grey(mask: Image.Image) -> Tensor:
    """Turn a grey picture into (1, 1, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(mask, dtype=np.float32) / 255.0)[None, None]


def join_tiles(grid: Grid, tiles: Sequence[np.ndarray]) -> tuple[Tensor, np.ndarray]:
    """Put the tiles of b pictures, each (b, height, width, 3) uint8, together: in [0, 1] and as bytes, as Frame.lay."""
    by_picture = zip(*map(pictures.uint8_to_pil, tiles), strict=True)
    pixels = np.stack([np.asarray(grid.join(one)) for one in by_picture])
    return _unit(pixels), pixels
