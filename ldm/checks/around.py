"""What is done around a picture and its mask, checked, and done as far as it comes before painting (ldm.sources)."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ldm import images as pictures
from ldm import options
from ldm.errors import UsageError
from ldm.hires import enlarge_picture, load_upscaler
from ldm.limits import CELLS
from ldm.retouch.fit import LATENT
from ldm.retouch.tiles import Grid
from ldm.sources import Source, frame_picture

if TYPE_CHECKING:
    from PIL import Image

MOST_OF_TILES = 4 * pictures.MAX_PIXELS  # pixels of all tiles, which are held at once before they are painted
# What a picture in tiles may be asked besides; and what is done to a picture and a mask before painting.
WITH_TILES = {"upscale_by", "upscale_overlap", "upscaler", "color_match", "strength_rule"}
OF_FRAMES = ("resize_mode", "color_match", "outpaint", "mask_invert", "inpaint_fill", "inpaint_full_res")


def check_around(given: SimpleNamespace, has_image: bool, has_mask: bool) -> dict[str, Any]:
    """Check the options of a picture to begin with, and of its mask, and give those that are not at their defaults.

    Raises:
        UsageError: one without what it is said of, or two that exclude each other.
    """
    found = {}
    for one in options.options():
        if one.group not in (options.START, options.MASK) or one.name == "strength" or not one.keyword:
            continue
        value = getattr(given, one.name)
        if value is None or (value := one.kind.check(one.name, value)) == one.default:
            continue
        if not has_image:
            raise UsageError(
                f"{one.name} is of a picture to start from, and none is given; give one, or leave it out"
            )
        if one.group == options.MASK and not has_mask and given.outpaint is None:
            raise UsageError(
                f"{one.name} is of a mask, and none is given; give mask or outpaint, or leave it out"
            )
        found[one.name] = value
    for name in found:
        beside = options.option(name).beside
        if beside and not any(other in found for other in beside):
            raise UsageError(
                f"{name} is said of {' or '.join(beside)}, which is not asked for; give that, too"
            )
    others = (
        ["mask"] * has_mask
        + ["regions"] * bool(given.regions)
        + [name for name in found if name not in WITH_TILES]
    )
    if "upscale_by" in found and others:
        raise UsageError(f"upscale_by repaints a whole picture in tiles; leave {others[0]} out")
    if "upscale_by" in found and given.output_type == "latent":
        raise UsageError(
            "upscale_by mixes the pictures of its tiles, and has no latents; take another output_type"
        )
    if found.get("resize_mode") == LATENT and (has_mask or "outpaint" in found):
        raise UsageError(
            f"resize_mode={LATENT!r} is for a picture that is repainted whole; with a mask take another"
        )
    if "outpaint" in found and not any(found["outpaint"]):
        raise UsageError(
            "outpaint must let the picture grow at one side at least, got 0,0,0,0; or leave it out"
        )
    if "outpaint" in found and "inpaint_full_res" in found:
        raise UsageError("outpaint paints the whole canvas; leave inpaint_full_res out")
    return found


def needs_frame(found: Mapping[str, Any], loops: bool) -> bool:
    """Tell whether options ask for more than a picture and a mask of one size.

    Args:
        loops: whether what is painted is painted again, for which what is around it has to be known.
    """
    return (
        loops
        or any(name in found for name in OF_FRAMES)
        or any(name.startswith("mask_blur") for name in found)
    )


def framed(
    image: Image.Image,
    mask: Image.Image | None,
    found: Mapping[str, Any],
    size: tuple[int | None, int | None],
    f: int,
) -> Source:
    """Make of an upright picture and mask what is painted.

    Args:
        found: of check_around.
        size: (width, height) that is asked for.

    Raises:
        UsageError: a canvas that is too large, a mask that marks nothing.
    """
    sides, most = found.get("outpaint"), CELLS[1] * f
    if sides is not None:
        grown = image.width + sides[0] + sides[2], image.height + sides[1] + sides[3]
        if max(grown) > most:
            raise UsageError(f"outpaint gives {grown[0]} x {grown[1]} pixels; wanted sides of at most {most}")
    both = found.get("mask_blur", 0)
    blur = found.get("mask_blur_x", both), found.get("mask_blur_y", both)
    more = {name: found[name] for name in (*OF_FRAMES, "inpaint_full_res_padding") if name in found}
    marks = None
    if mask is not None:
        marks = pictures.to_pil(2 * pictures.to_mask(mask).expand(1, 3, -1, -1) - 1)[0].convert("L")
    return frame_picture(pictures.to_rgb(image), marks, size, f, mask_blur=blur, **more)


def in_tiles(
    image: Image.Image,
    found: Mapping[str, Any],
    tile: tuple[int, int],
    f: int,
    upscaler_dir: Any,
    device: torch.device,
) -> tuple[Grid, list[Source]]:
    """Enlarge an upright picture, and cut it into the tiles that are painted.

    Args:
        found: of check_around.
        tile: (width, height) of the tiles.

    Raises:
        UsageError: a picture that becomes too large, or no larger than a cell; tiles that are all overlap, or too many.
        As ldm.hires.load_upscaler.
    """
    sides = tuple(int(side * found["upscale_by"]) // f * f for side in image.size)
    low = CELLS[0] * f
    if min(sides) < low or sides[0] * sides[1] > pictures.MAX_PIXELS:
        raise UsageError(
            f"upscale_by gives {sides[0]} x {sides[1]} pixels; wanted sides of at least {low} and at most "
            f"{pictures.MAX_PIXELS / 1e6:g} million pixels"
        )
    overlap = found.get("upscale_overlap", options.option("upscale_overlap").default)
    for side, whole in zip(tile, sides, strict=True):
        if overlap >= side < whole:
            raise UsageError(
                f"upscale_overlap must be less than a tile of {tile[0]} x {tile[1]}, got {overlap}; "
                "give less, or larger tiles by width and height"
            )
    grid = Grid.over(sides, tile, overlap)
    count = len(grid.columns) * len(grid.rows)
    if count * grid.tile[0] * grid.tile[1] > MOST_OF_TILES:
        raise UsageError(
            f"upscale_overlap {overlap} of tiles of {tile[0]} x {tile[1]} makes {count} tiles of "
            f"{sides[0]} x {sides[1]} pixels, more than {MOST_OF_TILES / 1e6:g} million in all; give less overlap"
        )
    how = load_upscaler(
        "upscaler", found.get("upscaler", "lanczos"), upscaler_dir, tuple(options.PICTURE_UPSCALERS), device
    )
    larger = enlarge_picture(pictures.to_rgb(image), sides, how)
    colours = {"color_match": True} if "color_match" in found else {}
    return grid, [frame_picture(larger.crop(box), None, grid.tile, f, **colours) for box in grid.boxes]
