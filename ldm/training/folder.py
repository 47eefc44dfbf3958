"""Pictures with captions from a folder: metadata.jsonl, or a .txt file beside each picture."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.configs import first_line
from ldm.errors import AbsentError, FormatError, LdmError, UnsafeFileError, UsageError
from ldm.images import open_image, to_rgb
from ldm.training.data import Item
from ldm.values import shown

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
UNREADABLE = re.compile("[\0-\x1f\ud800-\udfff]")  # in a file's name
MAX_LINE, MAX_NAME = 1 << 20, 1024  # characters of a line of metadata.jsonl, and of a name in it
MAX_CAPTION = 1 << 16  # bytes; no caption is as long, so a longer one is another file gone astray
MAX_BAD_SHARE, MAX_BAD = 0.01, 100


class ImageFolder(Dataset):
    """A folder of pictures, each with a caption.

    Captions come from `metadata.jsonl` (a line {"file_name": ..., "text": ...}; "caption" is understood as well)
    where there is one, else from `<picture>.txt`. A picture or caption that cannot be read is left out with a
    warning and the next sound one takes its place; too many of them end the run.

    Args:
        folder: with the pictures, also in subfolders.
        image_size: pixels a side of an item.
        random_crop: cut the square at random; False cuts the middle.
        flip: mirror half the pictures (never where captions say left or right).
        needs_captions: False gives an empty caption to pictures without one.

    Raises:
        AbsentError: no folder, or no picture in it.
        FormatError: metadata.jsonl is not what it should be; a caption is missing; more than 1 % (or 100) of the
            pictures cannot be read.
        UnsafeFileError: the folder is an address, or metadata.jsonl names a picture outside it.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int = 256,
        random_crop: bool = False,
        flip: bool = False,
        needs_captions: bool = True,
    ):
        self.folder = Path(folder)
        self.image_size, self.random_crop, self.flip = image_size, random_crop, flip
        if image_size < 8:
            raise UsageError(f"image_size should be at least 8, got {image_size}")
        if "\0" in str(folder):
            raise UsageError(
                f"data folder {shown(str(folder))} is no path; set data.params.train.params.folder"
            )
        if "://" in str(folder):
            raise UnsafeFileError(
                f"data folder '{folder}' is an address; nothing is downloaded, name a folder on disk"
            )
        if not self.folder.is_dir():
            raise AbsentError(
                f"data folder '{self.folder}' is not there; set data.params.train.params.folder"
            )
        listed = self.folder / "metadata.jsonl"
        self.samples = (
            self._from_metadata(listed) if listed.is_file() else self._from_neighbours(needs_captions)
        )
        if not self.samples:
            raise AbsentError(f"data folder '{self.folder}' holds no pictures ({', '.join(SUFFIXES)})")
        self._bad: set[int] = set()

    def _from_metadata(self, path: Path) -> list[tuple[Path, str]]:
        samples = []
        root = self.folder.resolve()
        try:
            # Lines end at line feeds only: U+2028 and its like may stand inside of a JSON string.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise FormatError(f"'{path}' cannot be read as text in UTF-8: {first_line(error)}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                samples.append(self._listed(line, root, f"'{path}' line {number}"))
        return samples

    def _listed(self, line: str, root: Path, where: str) -> tuple[Path, str]:
        """Read one line of metadata.jsonl."""
        if len(line) > MAX_LINE:
            raise FormatError(f"{where} has {len(line)} characters; at most {MAX_LINE} are read")
        try:
            entry: Any = json.loads(line)
            name, text = entry["file_name"], entry.get("text", entry.get("caption"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f'{where} should be {{"file_name": ..., "text": ...}}: {type(error).__name__}: {first_line(error)}'
            ) from error
        if not (isinstance(name, str) and isinstance(text, str)):
            wrong = name if not isinstance(name, str) else text
            raise FormatError(f"{where}: file_name and text should be strings, got {shown(wrong)}")
        if not name.strip() or UNREADABLE.search(name) or len(name) > MAX_NAME:
            raise FormatError(f"{where}: file_name should be the name of a picture, got {shown(name)}")
        if re.search("[\ud800-\udfff]", text):
            raise FormatError(f"{where}: a caption with half a character, {shown(text)}")
        if len(text.encode()) > MAX_CAPTION:
            raise FormatError(
                f"{where}: a text of {len(text)} characters is no caption; at most {MAX_CAPTION}"
            )
        picture = self.folder / name
        try:
            home = picture.resolve()
        except (OSError, RuntimeError) as error:  # a circle of links
            raise FormatError(f"{where}: {shown(name)} leads nowhere: {first_line(error)}") from error
        if root not in home.parents:
            raise UnsafeFileError(f"{where}: {shown(name)} lies outside the folder; keep the pictures inside")
        return picture, text

    def _from_neighbours(self, needs_captions: bool) -> list[tuple[Path, str]]:
        samples = []
        pictures = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        for picture in pictures:
            beside = picture.with_suffix(".txt")
            if beside.is_file():
                text = self._read_caption(beside)
            elif needs_captions:
                raise FormatError(
                    f"'{picture}' has no caption; put one into '{beside.name}' beside it or into metadata.jsonl, "
                    "or set needs_captions: false"
                )
            else:
                text = ""
            if text is not None:
                samples.append((picture, text))
        if pictures and len(pictures) - len(samples) > self._allowed_bad(len(pictures)):
            raise FormatError(
                f"{len(pictures) - len(samples)} of {len(pictures)} captions in '{self.folder}' cannot be read"
            )
        return samples

    @staticmethod
    def _read_caption(path: Path) -> str | None:
        try:
            if path.stat().st_size > MAX_CAPTION:
                raise ValueError(f"{path.stat().st_size} bytes")
            return path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            logger.warning("caption '%s' is left out with its picture: %s", path, error)
            return None

    @staticmethod
    def _allowed_bad(length: int) -> float:
        return min(MAX_BAD, MAX_BAD_SHARE * length)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, np.random.default_rng(0), 0)

    def item(self, index: int, rng: np.random.Generator, step: int) -> Item:
        """Read picture `index` (or the next sound one), cropped and mirrored as rng says."""
        if not 0 <= index < len(self.samples):
            raise IndexError(f"index {index} is outside a folder of {len(self.samples)} pictures")
        top, left, mirror = rng.random(3)
        for offset in range(len(self.samples)):
            taken = (index + offset) % len(self.samples)
            path, caption = self.samples[taken]
            try:
                pixels = self._pixels(path, top, left)
            except (LdmError, OSError, ValueError) as error:
                self._note_bad(taken, path, error)
                continue
            if self.flip and mirror < 0.5:
                pixels = pixels[:, ::-1]
            return {"image": np.ascontiguousarray(pixels), "caption": caption, "txt": caption}
        raise FormatError(f"no picture in '{self.folder}' can be read")

    def _pixels(self, path: Path, top: float, left: float) -> np.ndarray:
        """Read a picture, resize its shorter side and cut a square: (h, w, 3) float32 in [-1, 1]."""
        picture = to_rgb(open_image(path))
        size = self.image_size
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), resample=3)  # bicubic
        x, y = (width - size) // 2, (height - size) // 2
        if self.random_crop:
            x, y = int(left * (width - size + 1)), int(top * (height - size + 1))
        return np.asarray(picture.crop((x, y, x + size, y + size)), np.float32) / 127.5 - 1.0

    def _note_bad(self, index: int, path: Path, error: Exception) -> None:
        if index in self._bad:
            return
        self._bad.add(index)
        logger.warning("picture '%s' cannot be read and is left out: %s", path, error)
        if len(self._bad) > self._allowed_bad(len(self.samples)):
            raise FormatError(
                f"{len(self._bad)} of {len(self.samples)} pictures in '{self.folder}' cannot be read, more than "
                f"{MAX_BAD_SHARE:.0%}; last: '{path}'"
            )
