"""The checker: reads a picture of shapes and says whether a caption holds, attribute by attribute.

No learned parts. The picture is brought to 128 pixels; the median of its border gives the background; each
pixel is a mixture of the background and one of the colours, and where the colour has the larger share it
belongs to an object. Connected pixels of one colour are an object, whose shape, size and centre are those of
the best fitting template. Written to forgive what small generative models do to a right picture (soft or
uneven edges, noise, slightly shifted colours) and nothing that makes it wrong.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image
from scipy import ndimage

from ldm.errors import UsageError
from ldm.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Claim,
    Item,
    coverage,
    parse_caption,
)

MIN_PIXELS = 48  # below, a small star has too few pixels to be told from a triangle
WORKING = 128  # pixels a side that every picture is brought to
BORDER = 2  # working pixels from which the background is read; objects keep 3 away
SPECK = 0.004  # connected areas below this fraction of the picture are no objects (a small star has 0.015)
PART = 0.15  # a second colour with this share of a connected area makes it two objects
SAME_TINT = 20.0  # unless its lightness and hue coordinates (CIELAB) are all nearer than this to the first's
COLOUR_LIMIT = (
    28.0  # CIELAB distance from which a colour has no name; white and beige are 20 apart, others 30
)
COLOUR_LEAD = 0.8  # it must be this much nearer than the next nearest of all colours and backgrounds
CENTRE_LIMIT = 0.125  # "in the center" is nearer to the middle than this; the other places are 0.2 away
DOMINANCE = 1.5  # the direction that a caption names must be this much longer than the one across it
SIZE_LIMIT = (
    1.2  # how far an object may be outside a size's range; halfway between two ranges is 1.11 to 1.14
)
SHAPE_FIT = 0.78  # overlap with the best template below which a shape has no name
SHAPE_LEAD = 0.015  # and how far the next best shape must stay behind
GRID = 36  # cells a side of a template
WINDOW = 1.3  # side of a template over the longer side of the object
SCALES = (0.86, 0.93, 1.0, 1.075, 1.155)
SHIFTS = (-2, -1, 0, 1, 2)  # cells
BLURS = (0, 2)  # cells; a soft small star would otherwise look like a circle
REACH = 3  # working pixels around an object's mask where its soft edge is looked for
EDGE = 0.2  # the share of its colour from which a pixel counts for an object's first bounding box


@dataclass(frozen=True)
class SeenObject:
    """One object in a picture; colour, shape or size is None where it is none of ours, or too unclear to say.

    x, y (centre of the bounding box) and extent (its longer side) are fractions of the picture; fit is the
    overlap with the best template, 1 at most.
    """

    colour: str | None
    shape: str | None
    size: str | None
    x: float
    y: float
    extent: float
    fit: float


@dataclass(frozen=True)
class Sighting:
    """What a picture shows: the background's name (None: none of ours) and its objects, largest first."""

    background: str | None
    objects: tuple[SeenObject, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether every attribute that a caption names (`attributes`: name to truth) is in the picture seen."""

    holds: bool
    attributes: dict[str, bool]
    sighting: Sighting


def check(image: Image.Image | np.ndarray, caption: str | Claim) -> Verdict:
    """Say whether a picture shows what a caption says, attribute by attribute.

    Attributes are "background", "count", "colour", "shape" and "size" of each object ("colour 1" is that of
    the first one named), and "place" or "relation". A size that a caption does not name is in between, and is
    checked as such. Objects are matched with those named in the way that lets most attributes hold.

    Raises:
        UsageError: a caption outside the grammar of `ldm.shapes.scenes`, or a picture that `see` refuses.
    """
    return judge(see(image), parse_caption(caption) if isinstance(caption, str) else caption)


def judge(sighting: Sighting, claim: Claim) -> Verdict:
    """Compare what was seen with what was said; see `check`."""
    wanted = len(claim.objects)
    candidates = [*sighting.objects, *[None] * max(0, wanted - len(sighting.objects))]
    objects = max(
        (_compare(claim, match) for match in permutations(candidates, wanted)), key=lambda a: sum(a.values())
    )
    attributes = {
        "background": sighting.background == claim.background,
        "count": len(sighting.objects) == wanted,
        **objects,
    }
    return Verdict(all(attributes.values()), attributes, sighting)


def _compare(claim: Claim, match: tuple[SeenObject | None, ...]) -> dict[str, bool]:
    attributes = {}
    for number, (named, seen) in enumerate(zip(claim.objects, match, strict=True), 1):
        for attribute in ("colour", "shape", "size"):
            held = seen is not None and getattr(seen, attribute) == getattr(named, attribute)
            attributes[f"{attribute} {number}"] = held
    if claim.where is not None:
        kind = "relation" if len(claim.objects) == 2 else "place"
        attributes[kind] = None not in match and where(*match) == claim.where
    return attributes


def where(seen: SeenObject, other: SeenObject | None = None) -> str | None:
    """Name the place of an object, or its relation to another; None between two places (diagonals)."""
    dx, dy = (seen.x - 0.5, seen.y - 0.5) if other is None else (seen.x - other.x, seen.y - other.y)
    if other is None and max(abs(dx), abs(dy)) < CENTRE_LIMIT:
        return "in the center"
    if abs(dx) >= DOMINANCE * abs(dy):
        if other is None:
            return "on the left" if dx < 0 else "on the right"
        return "to the left of" if dx < 0 else "to the right of"
    if abs(dy) >= DOMINANCE * abs(dx):
        if other is None:
            return "at the top" if dy < 0 else "at the bottom"
        return "above" if dy < 0 else "below"
    return None


def see(image: Image.Image | np.ndarray) -> Sighting:
    """Read a square picture: its background and its objects.

    Args:
        image: a PIL image, or an array (h, w, 3) of uint8.

    Raises:
        UsageError: not such a picture, not square, or under 48 pixels.
    """
    pixels = _prepare(image)  # (h, w, 3) float, 0..255
    edge = np.ones(pixels.shape[:2], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(pixels[edge], axis=0)
    name = _nearest(ground, BACKGROUNDS)
    parts = _parts(pixels, ground)
    taken = np.any(parts, axis=0) if parts else None
    objects = [_describe(pixels, ground, part, taken & ~part) for part in parts]
    return Sighting(name, tuple(sorted(objects, key=lambda o: -o.extent)))


def _prepare(image: Image.Image | np.ndarray) -> np.ndarray:
    if not isinstance(image, Image.Image):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UsageError(
                f"the checker reads uint8 arrays of shape (h, w, 3); got {image.dtype} {image.shape}"
            )
        image = Image.fromarray(image)
    if image.width != image.height or image.width < MIN_PIXELS:
        raise UsageError(
            f"the checker reads square pictures of {MIN_PIXELS} pixels or more; "
            f"got {image.width}x{image.height}, crop or enlarge it"
        )
    resample = Image.Resampling.BOX if image.width > WORKING else Image.Resampling.BICUBIC
    return np.asarray(image.convert("RGB").resize((WORKING, WORKING), resample), np.float32)


def _mixture(pixels: np.ndarray, ground: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain pixels (..., 3) as mixtures of the ground and each colour (n, 3): shares (..., n), errors²."""
    reach = colours - ground  # (n, 3)
    length = np.maximum((reach**2).sum(1), 1)  # the ground may be one of the colours
    offset = pixels - ground
    along = offset @ reach.T  # (..., n)
    share = np.clip(along / length, 0, 1)
    # |offset - share * reach|^2, multiplied out: no array of pixels x colours x channels
    error = (offset**2).sum(-1, keepdims=True) - 2 * share * along + share**2 * length
    return share, error


def _parts(pixels: np.ndarray, ground: np.ndarray) -> list[np.ndarray]:
    """Find the masks (h, w) of the objects: connected, of one colour, larger than a speck."""
    share, error = _mixture(pixels, ground, np.array(list(COLOURS.values()), np.float32))
    kind = error.argmin(-1)  # (h, w) index of the colour that explains the pixel best
    front = np.take_along_axis(share, kind[..., None], -1)[..., 0] > 0.5
    labels, _ = ndimage.label(front)
    sizes = np.bincount(labels.ravel())  # pixels of each label; 0 is the background
    parts = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        if sizes[number] < SPECK * front.size:
            continue
        area = labels[box] == number
        least = max(SPECK * front.size, PART * sizes[number])
        pieces = [area & (kind[box] == k) for k in np.unique(kind[box][area])]
        pieces = [piece for piece in pieces if _opened(piece).sum() >= least]
        tints = _lab(np.array([np.median(pixels[box][piece], axis=0) for piece in pieces]).reshape(-1, 3))
        if not len(tints) or np.ptp(tints, axis=0).max() < SAME_TINT:
            pieces = [area]
        for piece in pieces:
            mask = np.zeros_like(front)
            mask[box] = piece
            parts.append(mask)
    return parts


def _opened(mask: np.ndarray) -> np.ndarray:
    """Take away what is thinner than three pixels, such as the mixed colours along an edge."""
    return ndimage.binary_opening(mask, np.ones((3, 3), bool))


def _describe(pixels: np.ndarray, ground: np.ndarray, mask: np.ndarray, others: np.ndarray) -> SeenObject:
    core = ndimage.binary_erosion(mask, iterations=2)
    colour = np.median(pixels[core if core.sum() >= 12 else mask], axis=0)
    near = ndimage.binary_dilation(mask, iterations=REACH) & ~ndimage.binary_dilation(others)
    share = np.where(near, _mixture(pixels, ground, colour[None])[0][..., 0], 0).astype(np.float32)

    body = share > EDGE
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    y, x = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1.0
    for _ in range(2):  # the second look is centred on what the first found
        fits, placed = _fit(share, x, y, extent)
        best = int(fits.max(1).argmax())
        x, y, extent = placed[best]
    order = np.sort(fits.max(1))
    clear = order[-1] >= SHAPE_FIT and order[-1] - order[-2] >= SHAPE_LEAD
    return SeenObject(
        _nearest(colour, COLOURS),
        SHAPES[best] if clear else None,
        _size_name(extent / WORKING),
        x / WORKING,
        y / WORKING,
        extent / WORKING,
        float(order[-1]),
    )


def _fit(share: np.ndarray, x: float, y: float, extent: float):
    """Compare an object with every template: overlaps (shapes, templates), each shape's best (x, y, extent).

    The overlap of soft masks a and b is a.b / (a.a + b.b - a.b) (Tanimoto): 1 when they are equal, and
    intersection over union when they are hard.
    """
    side = extent * WINDOW
    pad = math.ceil(side)
    field = Image.fromarray(np.pad(share, pad))
    window = (x - side / 2 + pad, y - side / 2 + pad, x + side / 2 + pad, y + side / 2 + pad)
    seen = np.asarray(field.resize((GRID, GRID), Image.Resampling.BILINEAR, box=window)).ravel()
    bank, squares, offsets = _templates()
    dot = bank @ seen  # (shapes * templates,)
    fits = (dot / (squares + seen @ seen - dot)).reshape(len(SHAPES), -1)
    cell = side / GRID
    placed = []
    for best in fits.argmax(1):
        dx, dy, scale = offsets[best]
        placed.append((x + dx * cell, y + dy * cell, extent * scale))
    return fits, placed


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, float]]]:
    """Draw every shape at every scale and shift: (templates, cells), their squares, (dx, dy, scale)."""
    offsets = [(dx, dy, scale) for scale in SCALES for dx in SHIFTS for dy in SHIFTS for _ in BLURS]
    rows = []
    for shape in SHAPES:
        for dx, dy, scale in offsets[:: len(BLURS)]:
            item = Item("red", shape, "large", 0.5 + dx / GRID, 0.5 + dy / GRID, scale / WINDOW)
            mask, corner = coverage(item, GRID)
            cell = Image.new("L", (GRID, GRID))
            cell.paste(mask, corner)
            sharp = np.asarray(cell, np.float32) / 255
            rows += [ndimage.gaussian_filter(sharp, blur).ravel() for blur in BLURS]
    bank = np.stack(rows)
    return bank, (bank**2).sum(1), offsets


def _size_name(extent: float) -> str | None:
    """Name the size whose range is nearest, if the extent is within a factor of `SIZE_LIMIT` of it."""
    factor, name = min((max(low / extent, extent / high, 1.0), name) for name, (low, high) in SIZES.items())
    return name if factor <= SIZE_LIMIT else None


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str | None:
    """Name the perceptually nearest colour (CIELAB, CIE 1976 distance), None when none is clearly nearest."""
    everything = COLOURS | BACKGROUNDS
    distances = np.linalg.norm(_lab(np.array(list(everything.values()))) - _lab(colour), axis=-1)
    best, following = np.argsort(distances)[:2]
    is_clear = distances[best] <= min(COLOUR_LIMIT, COLOUR_LEAD * distances[following])
    name = list(everything)[best]
    return name if is_clear and name in names else None


def _lab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB (..., 3) in 0..255 to CIELAB, white point D65 (IEC 61966-2-1, CIE 15)."""
    v = np.asarray(rgb, np.float64) / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / (0.9505, 1.0, 1.089)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1
    )
