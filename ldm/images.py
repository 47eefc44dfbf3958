"""Pictures: PIL and tensors in [-1, 1], masks, grids, safe reading, saving that never overwrites, previews.

Knows no model. PIL is imported inside functions, so that `import ldm` costs no more than torch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.write import sync_folder
from ldm.containers import WANTED, check_tiff, read_exif, read_file, read_xmp
from ldm.errors import FormatError, NumericError, OutputError, UsageError

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

FORMATS = ("PNG", "JPEG", "WEBP")  # decoders without interpreters or external programs behind them
# Further ones for folders of one's own pictures. Left out: EPS and PDF, which run programs, and what nobody trains on.
MORE_FORMATS = (*FORMATS, "BMP", "GIF", "TIFF", "AVIF", "PPM", "MPO")
MAX_PIXELS = 36_000_000
MAX_SIDE = 32_767
MIN_SIDE = 8
# A file of less than a megabyte may make a decoder take so many bytes, at its bytes for each pixel: Pillow keeps 4;
# a progressive JPEG's coefficients are 6 more; libwebp keeps two further frames and hands out a copy.
SMALL_FILE = 2**20
DECODER_BYTES = 200 * 10**6
PIXEL_BYTES = {"PNG": 4, "JPEG": 4, "progressive JPEG": 10, "WEBP": 16}
_PATTERN = r"([^{}]*)\{(?::(?:0([1-9]|1\d|20))?d?)?\}([^{}]*)"
STALE_SECONDS = 3600  # a .part file older than this was left by a killed run

# --- pixels and tensors ---------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """Turn a picture into (1, 3, height, width) float32 in [-1, 1], by CompVis's 2 * (x / 255) - 1."""
    pixels = torch.from_numpy(np.array(to_rgb(image), dtype=np.float32) / 255.0)  # (height, width, 3)
    return 2.0 * pixels.permute(2, 0, 1)[None] - 1.0  # (1, 3, height, width)


def to_unit(x: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1] in float32 and clamp.

    Raises:
        NumericError: a value is not finite; a clamp would pass NaN on and uint8 would paint it black.
    """
    x = x.detach().float()
    if not torch.isfinite(x).all():
        raise NumericError("pictures must be finite, got NaN or infinity; nothing was saved")
    return ((x + 1.0) / 2.0).clamp(0.0, 1.0)


def given_unit(x: Tensor) -> Tensor:
    """Map a given picture from [-1, 1] to [0, 1] float32, so that the bytes it was made of come back.

    The way through to_tensor costs an ulp, which truncation makes a whole level for 63 of the 256 bytes. A value that
    is a byte's up to the rounding of its dtype becomes float32's k / 255, of which unit_to_uint8 makes k again; one
    that lies between two bytes stays there.
    """
    unit = ((x.double() + 1.0) / 2.0).clamp(0.0, 1.0)
    level = (255.0 * unit).round()
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    near = (255.0 * unit - level).abs() <= 255.0 * eps  # two roundings of a value below 1
    return torch.where(near, level.float() / 255.0, unit.float())


def unit_to_uint8(unit: Tensor, rounding: str = "truncate") -> np.ndarray:
    """Turn (b, 3, height, width) float32 in [0, 1] into (b, height, width, 3) uint8, as `to_uint8` does."""
    levels = 127.5 * (2.0 * unit - 1.0) + 127.5 if rounding == "truncate_127.5" else 255.0 * unit
    levels = levels.round() if rounding == "round" else levels
    return levels.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)  # (b, height, width, 3)


def to_uint8(x: Tensor, rounding: str = "truncate") -> np.ndarray:
    """Turn (b, 3, height, width) in [-1, 1] into (b, height, width, 3) uint8.

    In float32 whatever x is in: in float16 the same arithmetic moves one pixel in twenty. A given picture's own bytes
    come back by given_unit and unit_to_uint8 instead.

    Args:
        rounding: "truncate" 255 (x + 1) / 2, as CompVis and the web UIs do; "truncate_127.5", 127.5 x + 127.5 as
            ControlNet does, which is the same but for one pixel in 200,000; or "round", as diffusers does, by which
            45 % of pixels are one higher.
    """
    unit = to_unit(x)
    if rounding != "truncate_127.5":
        return unit_to_uint8(unit, rounding)
    levels = (127.5 * x.detach().float() + 127.5).clamp(0.0, 255.0)
    return levels.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def unit_to_pil(unit: Tensor, rounding: str = "truncate") -> list[Image.Image]:
    """Turn (b, 3, height, width) float32 in [0, 1] into b RGB pictures."""
    return uint8_to_pil(unit_to_uint8(unit, rounding))


def uint8_to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """Turn (b, height, width, 3) uint8 into b RGB pictures."""
    from PIL import Image

    return [Image.fromarray(one) for one in pixels]


def to_pil(x: Tensor) -> list[Image.Image]:
    """Turn (b, 3, height, width) in [-1, 1] into b RGB pictures."""
    return unit_to_pil(to_unit(x))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any picture to 8-bit RGB: transparency on white, 16-bit grey scaled (PIL would clip it).

    Raises:
        UsageError: PIL knows no way from its mode to RGB.
    """
    from PIL import Image

    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image, dtype=np.float64)
        grey = grey / 257.0 if image.mode != "F" else grey
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    return _on_ground(image, 255)


def _on_ground(image: Image.Image, grey: int) -> Image.Image:
    """Convert a picture to RGB; what is transparent lets a ground of black (0) to white (255) through."""
    from PIL import Image

    try:
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, (grey, grey, grey, 255))
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError:
        raise UsageError(
            f"a picture must be one that PIL can convert to RGB, got mode {image.mode}"
        ) from None


def to_mask(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """Turn a picture into (1, 1, height, width) of 0 and 1 float32: white (>= half) is 1, repaint.

    Transparent counts as black, keep, as painting programs mean it.

    Args:
        size: (width, height) to resize to, with the nearest pixel, as CompVis does.

    Raises:
        UsageError: PIL knows no way from its mode to RGB.
    """
    from PIL import Image

    if image.has_transparency_data:
        image = _on_ground(image, 0)
    grey = to_rgb(image).convert("L")
    if size is not None and grey.size != size:
        grey = grey.resize(size, Image.Resampling.NEAREST)
    mask = torch.from_numpy(np.array(grey, dtype=np.float32) / 255.0)
    return (mask >= 0.5).float()[None, None]  # (1, 1, height, width)


def shrink_mask(mask: Tensor, f: int, how: str) -> Tensor:
    """Bring a (b, 1, height, width) mask of 0 and 1 to latent cells, f pixels a side.

    Args:
        how: "any" marks a cell if any of its pixels is marked, so that a thin line is not lost. "nearest" takes the
            nearest pixel, which is what the 9-channel models were trained with, and diffusers. "bilinear" gives
            shares, as ComfyUI; "bicubic" means over the cell, rounded, as A1111 by Pillow.
    """
    size = (mask.shape[2] // f, mask.shape[3] // f)
    if how == "any":
        return F.max_pool2d(mask, f)
    if how == "bicubic":
        from PIL import Image

        levels = (255 * mask[:, 0]).round().to(torch.uint8).numpy()
        cells = [Image.fromarray(one).resize(size[::-1], Image.Resampling.BICUBIC) for one in levels]
        return torch.from_numpy(np.stack(cells).astype(np.float32) / 255)[:, None].round()
    return F.interpolate(mask, size=size, mode=how)


def fit_size(image: Image.Image, multiple: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Resize with LANCZOS to size, or else down to a multiple on both sides, as CompVis does with 32."""
    from PIL import Image

    width, height = size or (side - side % multiple for side in image.size)
    if width < multiple or height < multiple:
        raise UsageError(
            f"a picture needs at least {multiple} x {multiple} pixels, got {image.width} x {image.height}"
        )
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def paste(painted: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Keep the original where mask is 0, the painted picture where it is 1, and mix them between.

    All are (b, c, height, width) or broadcast to it; what is kept, is kept to the bit.
    """
    mixed = torch.lerp(original, painted, mask.to(original))
    return torch.where(mask <= 0, original, torch.where(mask >= 1, painted, mixed))


# --- grids ----------------------------------------------------------------------------------------


def make_grid(images: Tensor, nrow: int = 8, padding: int = 2, pad_value: float = 0.0) -> Tensor:
    """Lay (b, c, height, width) out as one (c, H, W) grid with nrow pictures in a row.

    The layout of torchvision's make_grid: a border of `padding` on the left and top of each picture and
    around the whole; one picture alone is returned as it is.
    """
    if nrow < 1:
        raise UsageError(f"a grid needs at least 1 picture in a row, got nrow={nrow}")
    b, c, height, width = images.shape
    if b == 1:
        return images[0]
    columns, rows = min(nrow, b), math.ceil(b / min(nrow, b))
    tall, wide = height + padding, width + padding
    grid = images.new_full((c, rows * tall + padding, columns * wide + padding), pad_value)
    for i, image in enumerate(images):
        y, x = (i // columns) * tall + padding, (i % columns) * wide + padding
        grid[:, y : y + height, x : x + width] = image
    return grid


def grid(pictures: Sequence[Image.Image], nrow: int | None = None) -> Image.Image:
    """Lay pictures out as one, nrow in a row (default: near a square); smaller ones get black borders."""
    from PIL import Image

    if not pictures:
        raise UsageError("a grid needs at least one picture, got none")
    width, height = (max(sides) for sides in zip(*(p.size for p in pictures), strict=True))
    cells = np.zeros((len(pictures), height, width, 3), dtype=np.uint8)
    for cell, picture in zip(cells, pictures, strict=True):
        cell[: picture.height, : picture.width] = np.asarray(to_rgb(picture))
    nrow = nrow or math.ceil(math.sqrt(len(pictures)))
    return Image.fromarray(
        make_grid(torch.from_numpy(cells).permute(0, 3, 1, 2), nrow).permute(1, 2, 0).numpy()
    )


# --- reading --------------------------------------------------------------------------------------


def open_image(
    path: str | os.PathLike, max_pixels: int = MAX_PIXELS, *, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Read a PNG, JPEG or WebP picture whole, upright by its EXIF orientation, in the mode it was stored in.

    The size is judged from the header, before anything is decoded; only the first frame is read. Damage in what is
    said beside the pixels (EXIF, profiles, texts) is passed over; texts that read_metadata knows are in `info`.

    Args:
        formats: Pillow's names of what may be read; MORE_FORMATS for one's own pictures.

    Raises:
        AbsentError: no such file. UsageError: a URL. FormatError: everything else that is wrong with it.
    """
    from PIL import Image, UnidentifiedImageError

    parts, name = read_file(path, others=tuple(formats) != FORMATS), os.fspath(path)
    size = len(parts.pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is passed over
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if tuple(formats) != FORMATS:
                Image.init()  # so that a build without a decoder is known to lack it
                formats = [kind for kind in formats if kind in Image.OPEN]
                if parts.pixels.startswith((b"II", b"MM")):
                    check_tiff(parts.pixels)
            with Image.open(io.BytesIO(parts.pixels), formats=formats) as image:
                parts.pixels = b""
                width, height = image.size
                if width * height > max_pixels or max(width, height) > MAX_SIDE:
                    raise FormatError(
                        f"picture '{name}' has too many pixels, {width} x {height}; "
                        f"wanted at most {max_pixels / 1e6:g} million and {MAX_SIDE} a side"
                    )
                kind = "progressive JPEG" if "progressive" in image.info else image.format
                most = DECODER_BYTES // PIXEL_BYTES.get(kind, 16)
                if width * height > most and size < SMALL_FILE:
                    raise FormatError(
                        f"picture '{name}' has too many pixels, {width} x {height}, for a {kind} file of {size} "
                        f"bytes; wanted at most {most / 1e6:g} million; convert it to PNG"
                    )
                if min(width, height) < MIN_SIDE:
                    raise FormatError(
                        f"picture '{name}' is too small, {width} x {height}; "
                        f"wanted {MIN_SIDE} pixels a side or more"
                    )
                image.load()
                image = _turned(image, parts.orientation)
    except FormatError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FormatError(f"picture '{name}' has too many pixels ({error}); {WANTED}") from None
    except UnidentifiedImageError:
        raise FormatError(f"picture '{name}' is no picture that can be read; {WANTED}") from None
    except Exception as error:  # decoders raise nearly every kind of error on damaged files
        raise FormatError(f"picture '{name}' is damaged or incomplete ({error}); {WANTED}") from None
    image.info |= parts.texts
    return image


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture that somebody opened with PIL as its EXIF orientation says; EXIF that cannot be read says nothing.

    Raises:
        FormatError: its pixels are damaged or incomplete, or its file is closed.
    """
    try:
        image.load()
    except Exception as error:  # as in open_image
        raise FormatError(f"the picture given is damaged or incomplete ({error}); {WANTED}") from None
    exif, xmp = image.info.get("exif"), image.info.get("xmp")
    if isinstance(exif, bytes):  # not by Pillow, whose reader a small file can make take gigabytes
        orientation = read_exif(exif)[1] or (read_xmp(xmp) if isinstance(xmp, bytes) else 1)
        return _turned(image, orientation)
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        return _turned(image, image.getexif().get(0x0112, 1))
    return image


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """Undo an EXIF orientation of 2 to 8, and remove the texts that gave it."""
    from PIL.Image import Transpose

    ways = (
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )
    if orientation in range(2, 9):
        image = image.transpose(ways[orientation - 2])
        for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
            image.info.pop(key, None)
    return image


# --- writing --------------------------------------------------------------------------------------


def prepare_folder(path: str | os.PathLike) -> Path:
    """Make a folder and prove that files can be written in it, before time is spent on pictures.

    Raises:
        OutputError: it cannot be made or written in.
    """
    name = os.fspath(path)
    if name in ("", "-"):
        raise OutputError(f"cannot write to folder '{name}': it is no folder name; choose another")
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_stale(folder)
        part, handle = _open_part(folder)
        os.close(handle)
        part.unlink()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise OutputError(f"cannot write to folder '{name}': {why}; choose another") from None
    return folder


def split_pattern(pattern: str) -> tuple[str, int, str]:
    """Split a pattern for file names into what stands before its number, the number's digits, and what stands after it.

    A pattern is a file name, never a path, with one field for a number: `{}` or `{:05}`, of at most 20 digits.

    Raises:
        UsageError: it is anything else.
    """
    found = re.fullmatch(_PATTERN, pattern) if isinstance(pattern, str) else None
    name = found and found[1] + found[3]
    # Windows' rule knows every separator there is, and drives. A lone surrogate can be in no name.
    if not found or PureWindowsPath(f"{name}0").name != f"{name}0" or not name.isprintable():
        raise UsageError(
            "a pattern must be a file name, without folders, with one number in it, {} or {:05} (20 digits at most), "
            f"such as 'red-{{:05}}.png'; got {pattern!r:.100}"
        )
    return found[1], int(found[2] or 1), found[3]


# Endings that are no PNG, and how well such pictures are kept, 0 to 100.
_LOSSY = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
QUALITY = 95


def save_numbered(
    image: Image.Image, folder: str | os.PathLike, pattern: str = "{:05}.png", info: PngInfo | None = None
) -> Path:
    """Save a picture under the number after the highest in the folder; never overwrite, never leave half a file.

    It is a PNG, or a JPEG or WebP where the pattern ends so.

    CompVis numbers by counting files, so that two runs at once lose pictures, and so does deleting one.
    Here a name is claimed by a hard link, which fails if the name is taken; the next number is then tried.

    Args:
        pattern: file name with one number, such as "grid-{:04}.png"; see split_pattern.

    Raises:
        OutputError: the folder cannot be written, the disk is full. UsageError: the pattern is none.
    """
    folder = Path(folder)
    before, width, after = split_pattern(pattern)
    taken = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))

    def names():
        try:
            numbers = [int(m[1]) for entry in os.listdir(folder) if (m := taken.fullmatch(entry))]
        except OSError as error:
            raise _cannot(folder, error) from None
        number = max(numbers, default=-1) + 1
        while True:
            yield folder / f"{before}{number:0{width}}{after}"
            number += 1

    return _place(_encoded(image, info, f"{before}0{after}"), folder, names())


def save_png(
    image: Image.Image, path: str | os.PathLike, info: PngInfo | None = None, *, rename: bool = False
) -> Path:
    """Save a picture under this name, whole or not at all; with rename, as name-1, name-2, ... if it is taken.

    It is a PNG, or a JPEG or WebP where the name ends so.

    Raises:
        OutputError: the name is taken, or cannot be written.
    """
    return save_file(_encoded(image, info, os.fspath(path)), path, rename=rename)


def save_file(write: Callable[[BinaryIO], object], path: str | os.PathLike, *, rename: bool = False) -> Path:
    """Let `write` fill a file that gets this name when it is whole; with rename, name-1, name-2, ... if it is taken.

    Raises:
        OutputError: the name is taken, or cannot be written.
    """
    path = Path(path)
    others = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(1)) if rename else ()
    return _place(write, path.parent, itertools.chain([path], others))


def _encoded(image: Image.Image, info: PngInfo | None, name: str) -> Callable[[BinaryIO], object]:
    """Encode a picture now, as its name ends (PNG unless that says JPEG or WebP), and give what writes it."""
    buffer, kind = io.BytesIO(), _LOSSY.get(os.path.splitext(name)[1].lower())
    if kind is None:
        image.save(buffer, format="PNG", pnginfo=info)
    elif info is None:
        image.save(buffer, format=kind, quality=QUALITY, exif=b"")
    else:  # a Painted one adds its metadata itself
        image.save(buffer, format=kind, quality=QUALITY)
    return lambda file: file.write(buffer.getbuffer())


def _open_part(folder: Path) -> tuple[Path, int]:
    """Open a new temporary file whose mode obeys the umask (tempfile would make it 0600)."""
    part = folder / f".ldm-{os.getpid()}-{os.urandom(6).hex()}.part"
    return part, os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _clear_stale(folder: Path) -> None:
    """Remove what a killed run left, but not what a running one is writing."""
    for part in folder.glob(".ldm-*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()


def _cannot(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write '{path}': {error.strerror or error}; choose another place or free some space"
    )


def _place(write: Callable[[BinaryIO], object], folder: Path, names) -> Path:
    """Write a file beside its place, make sure it is on disk, then give it the first name that is free."""
    try:
        part, handle = _open_part(folder)
    except (OSError, ValueError) as error:
        raise _cannot(folder, error if isinstance(error, OSError) else OSError(str(error))) from None
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for name in names:
            try:
                _claim(part, name)
            except FileExistsError:
                continue
            sync_folder(folder)
            return name
    except OSError as error:
        raise _cannot(folder, error) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    raise OutputError(f"'{name}' exists already and is not overwritten; choose another name")


def _claim(part: Path, name: Path) -> None:
    """Give a finished file its name, or raise FileExistsError; a link at that name is never followed."""
    try:
        os.link(part, name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links here (vfat, some network mounts): reserve the name, then move the whole file onto it.
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(part, name)


# --- previews -------------------------------------------------------------------------------------


@torch.no_grad()
def fit_latent_rgb(
    decode: Callable[[Tensor], Tensor],
    channels: int = 4,
    *,
    cells: int = 8,
    samples: int = 16,
    spread: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Fit colour = latent @ factors + bias to a decoder's own outputs, by least squares.

    Works for any decoder, where published factors belong to one. The latents are smooth random fields: a
    decoder of pictures has never seen independent noise in neighbouring cells.

    Args:
        decode: (b, channels, h, w) latents, scaled units -> (b, 3, f h, f w) in [-1, 1].
        spread: standard deviation of the latents.

    Returns:
        factors (channels, 3) and bias (3,), float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = spread * torch.randn(samples, channels, 3, 3, generator=generator)
    z = F.interpolate(coarse, size=(cells, cells), mode="bilinear", align_corners=True)
    x = torch.cat([decode(one[None]).float().cpu() for one in z])
    rgb = F.adaptive_avg_pool2d(x, (cells, cells))  # (samples, 3, h, w)
    known = z.permute(0, 2, 3, 1).reshape(-1, channels).double()
    known = torch.cat([known, torch.ones(len(known), 1, dtype=torch.float64)], dim=1)  # (n, channels + 1)
    answer = torch.linalg.lstsq(known, rgb.permute(0, 2, 3, 1).reshape(-1, 3).double()).solution
    return answer[:-1].float(), answer[-1].float()


def preview(pred_x0: Tensor, factors: Tensor, bias: Tensor, scale: int = 8) -> list[Image.Image]:
    """Paint (b, c, h, w) predicted clean latents as small pictures, each cell `scale` pixels wide."""
    rgb = torch.einsum("bchw,cd->bdhw", pred_x0.detach().float().cpu(), factors) + bias[:, None, None]
    return to_pil(F.interpolate(torch.nan_to_num(rgb), scale_factor=float(scale), mode="nearest"))
