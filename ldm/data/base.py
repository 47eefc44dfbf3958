"""What the data sets under CompVis's names share: a list of pictures cut to squares, and the base of streams."""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ldm.errors import AbsentError, FormatError, LdmError, UnsafeFileError, UsageError
from ldm.images import open_image, to_rgb

logger = logging.getLogger(__name__)

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
INTERPOLATIONS = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_BAD_SHARE = 0.01


class Txt2ImgIterableBaseDataset(IterableDataset):
    """Base of streams of pictures with captions, which torch can chain; a subclass writes __iter__.

    Args:
        num_records: what len() says.
        valid_ids: kept as valid_ids and as sample_ids, which a loader's worker may narrow.
        size: pixels a side; kept for the subclass.
    """

    def __init__(self, num_records: int = 0, valid_ids: Any = None, size: int = 256):
        super().__init__()
        self.num_records = num_records
        self.valid_ids = self.sample_ids = valid_ids
        self.size = size
        logger.info("%s has %d examples", type(self).__name__, len(self))

    def __len__(self) -> int:
        return self.num_records

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Yield the examples."""


class PictureList(Dataset):
    """Pictures from a list of files, each cut to a square, with the labels that belong to it.

    An item is {"image": (size, size, 3) float32 in [-1, 1], **labels}. A file that cannot be read is left out with a
    warning, and the next sound one takes its place.

    Args:
        paths: of the pictures.
        labels: key of an item -> one value for each picture.
        size: pixels a side; None keeps the pixels of the square.
        interpolation: a name of INTERPOLATIONS.
        random_crop: cut the square at random; False cuts the middle.
        flip_p: how often a picture is mirrored.

    Raises:
        FormatError: (by an item) more than 1 % of the pictures cannot be read, and more than one.
        UsageError: an unknown interpolation, or a value out of range.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Mapping[str, Sequence[Any]],
        size: int | None = None,
        interpolation: str = "bicubic",
        random_crop: bool = False,
        flip_p: float = 0.0,
    ):
        if interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"interpolation should be one of {', '.join(INTERPOLATIONS)}; got {interpolation!r}"
            )
        if size is not None and not (isinstance(size, int) and size >= 8):
            raise UsageError(
                f"size should be a whole number of pixels from 8 on, or null for each picture's own; got {size!r:.40}"
            )
        if not 0 <= flip_p <= 1:
            raise UsageError(f"flip_p should be from 0 (never) to 1 (always), got {flip_p}")
        self.paths, self.labels, self.size = list(paths), dict(labels), size
        self.resampling = INTERPOLATIONS[interpolation]
        self.random_crop, self.flip_p = random_crop, flip_p
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a picture; where it is cut and whether it is mirrored follow torch's seed."""
        return self.item(range(len(self))[index], seeded_by_torch(), 0)

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        """Read picture `index`, or the next sound one, cut and mirrored as rng says; `step` has no effect."""
        offset, mirror = rng.random(2)
        taken, picture = self.read(index)
        width, height = picture.size
        side = min(width, height)
        if self.random_crop:  # one of the two has no room
            left, top = int(offset * (width - side + 1)), int(offset * (height - side + 1))
        else:
            left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        if self.size is not None:
            picture = picture.resize((self.size, self.size), self.resampling)
        pixels = to_signed(np.asarray(picture))
        if mirror < self.flip_p:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        return {"image": pixels, **{name: values[taken] for name, values in self.labels.items()}}

    def read(self, index: int) -> tuple[int, Image.Image]:
        """Read picture `index` as RGB, or the next that can be read; return which it is as well."""
        for taken in (*range(index, len(self)), *range(index)):
            try:
                return taken, to_rgb(open_image(self.paths[taken]))
            except LdmError as error:
                self._leave_out(taken, error)
        raise FormatError(f"none of {len(self)} pictures can be read")

    def _leave_out(self, index: int, error: LdmError) -> None:
        if index not in self._bad:
            logger.warning("%s; it is left out", error)
        self._bad.add(index)
        if len(self._bad) > max(1, MAX_BAD_SHARE * len(self)):
            raise FormatError(
                f"{len(self._bad)} of {len(self)} pictures cannot be read, more than {MAX_BAD_SHARE:.0%}; last: {error}"
            )


def seeded_by_torch() -> np.random.Generator:
    """Make a generator whose seed is drawn from torch's, which differs from one loader process to the next."""
    return np.random.default_rng(int(torch.randint(1 << 62, ())))


def to_signed(pixels: np.ndarray) -> np.ndarray:
    """Turn bytes (h, w, 3) into float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def read_list(path: Path, root: Path, what: str) -> list[str]:
    """Read a text file that names one picture a line, relative to root.

    Args:
        what: the data set, for messages.

    Raises:
        AbsentError: there is no such file or folder; nothing is downloaded.
        FormatError: it is no text, or names nothing.
        UnsafeFileError: it names a file outside of root.
    """
    if not root.is_dir():
        raise AbsentError(
            f"{what}: put the pictures into '{root}', which is not there; nothing is downloaded"
        )
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise AbsentError(
            f"{what}: put a list of the pictures in '{root}', one file name a line, into '{path}', which is not there; "
            "nothing is downloaded"
        ) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{what}: the list '{path}' cannot be read: {error}") from None
    names = [name for name in names if name.strip()]
    if not names:
        raise FormatError(f"{what}: the list '{path}' names no pictures")
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise UnsafeFileError(f"{what}: '{path}' names '{name:.80}', which is outside of '{root}'")
    return names
