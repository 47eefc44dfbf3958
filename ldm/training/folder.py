"""Pictures of a folder, with captions or classes, checked before training."""

import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from ldm.checkpoints import replacing
from ldm.config_text import first_line
from ldm.errors import AbsentError, FormatError, LdmError, UnsafeFileError, UsageError, shown
from ldm.images import MORE_FORMATS, open_image, to_rgb
from ldm.training.data import Item
from ldm.training.listing import SUFFIXES, class_name, list_folder
from ldm.training.masks import draw_mask

logger = logging.getLogger(__name__)

NAMED = 3  # of what is left out, so many are named
MAX_BAD = 10  # pictures that may become unreadable while they are trained on


class ImageFolder(Dataset):
    """A folder of pictures, each with a caption or a class or neither.

    Captions come from `metadata.jsonl` (a line {"file_name": ..., "text": ...}; "caption" is understood as well) or
    `metadata.csv` (columns file_name and text) where there is one, else from `<picture>.txt`. An item is
    {"image": (size, size, 3) float32 in [-1, 1], "caption", "txt"}, with a label also {"class_label", "human_label"},
    with masks also {"mask", "masked_image"}, with low_resolution also {"LR_image"}.

    Attributes:
        samples: (picture, caption) of each item.
        classes: names by number; None without a label.
        changes: what is another since the look whose account was given to `look`: a line, or "".

    Args:
        folder: with the pictures, also in subfolders. Dot files and what systems leave (__MACOSX) are left alone.
        image_size: pixels a side of an item.
        random_crop: cut the square at random; False cuts the middle.
        flip: mirror half the pictures (never where captions say left or right).
        needs_captions: False gives an empty caption to pictures without one; so do `caption` and `label`.
        caption: one for all pictures.
        label: "folder" takes the name of each picture's folder for its class, "prefix" what stands before the first
            underscore of its own name.
        classes: all classes in the order of their numbers; None sorts the names that there are.
        masks: give what inpainting models are shown as well: "mask" (size, size, 1), 1 where it is to be repainted,
            drawn anew for each use as `masks.draw_mask` says, and "masked_image", the picture with 0 (gray) there.
        low_resolution: give "LR_image" as well, the picture with so many pixels a side, by means over squares.

    Raises:
        AbsentError: no folder, or no picture in it.
        FormatError: metadata or classes are not what they should be, or a caption is missing.
        UnsafeFileError: the folder is an address, or metadata names a picture outside it.
        UsageError: a value out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int = 256,
        random_crop: bool = False,
        flip: bool = False,
        needs_captions: bool = True,
        caption: str | None = None,
        label: Literal["folder", "prefix"] | None = None,
        classes: Sequence[str] | None = None,
        masks: bool = False,
        low_resolution: int | None = None,
    ):
        self.folder, self.masks = Path(folder), masks
        self.low_resolution = low_resolution
        self.image_size, self.random_crop, self.flip, self.label = image_size, random_crop, flip, label
        if image_size < 8:
            raise UsageError(f"image_size should be at least 8, got {image_size}")
        if low_resolution is not None and (low_resolution < 1 or image_size % low_resolution):
            raise UsageError(
                f"low_resolution should divide image_size ({image_size}), or be left out; got {low_resolution}"
            )
        if label not in (None, "folder", "prefix"):
            raise UsageError(f"label should be 'folder' or 'prefix', or left out; got {shown(label)}")
        if classes is not None and label is None:
            raise UsageError("classes need a label: 'folder' or 'prefix'")
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
        self.listing = list_folder(self.folder, caption)
        self.samples = self.listing.samples
        if not self.samples and not self.listing.unread:
            others = (
                ", ".join(f"{n} {kind}" for kind, n in self.listing.others.most_common(5)) or "nothing else"
            )
            raise AbsentError(
                f"data folder '{self.folder}' holds no pictures ({', '.join(SUFFIXES)}), but {others:.100}"
            )
        lacking = self.listing.uncaptioned
        if lacking and needs_captions and label is None:
            raise FormatError(
                f"'{lacking[0]}' has no caption ({len(lacking)} of {len(self.samples)} have none); put one into "
                f"'{lacking[0].stem}.txt' beside it, list them in metadata.jsonl or .csv, set caption: one for all, or "
                "set needs_captions: false"
            )
        self.classes = None if label is None else self._classes(classes)
        self.changes = ""
        self._bad: set[Path] = set(self.listing.unread)
        self._warn("%d of %d captions cannot be read; their pictures are left out", self.listing.unread)

    def _classes(self, given: Sequence[str] | None) -> list[str]:
        names = {class_name(path, self.folder, self.label) for path, _ in self.samples}
        if given is None:
            return sorted(names)
        if unknown := sorted(names - set(given)):
            raise FormatError(
                f"class {shown(unknown[0])} in '{self.folder}' is none of {', '.join(given):.200}"
            )
        return list(given)

    def _warn(self, text: str, reasons: dict[Path, str]) -> None:
        if reasons:
            some = "; ".join(f"'{path}': {why}" for path, why in list(reasons.items())[:NAMED])
            more = ", ..." if len(reasons) > NAMED else ""
            count = len(self.samples) + len(self.listing.unread)
            logger.warning(f"{text}: %s%s", len(reasons), count, some, more)

    def look(self, account: Path, write: bool = True) -> list[str]:
        """Open every picture once, leave out for good what cannot be read, and say what there is.

        Args:
            account: file that remembers what was seen of each picture, by path, size and time of change.
            write: False leaves the account as it is.

        Returns:
            Lines to print.

        Raises:
            FormatError: no picture can be read.
        """
        known = _read_record(account)
        seen = dict(self._looked_at(known))
        bad = {path: why for path, _ in self.samples if (why := seen[self._name(path)][2])}
        self._warn("%d of %d pictures cannot be read and are left out", bad)
        if len(bad) == len(self.samples):
            raise FormatError(f"no picture in '{self.folder}' can be read")
        self.samples = [(path, caption) for path, caption in self.samples if path not in bad]
        names = {self._name(path) for path, _ in self.samples}
        before = {name for name, entry in known.items() if not entry[2]}
        differences = {"added": names - before, "taken away": before - names}
        self.changes = "; ".join(
            f"{len(some)} {what} ({', '.join(Path(name).name for name in sorted(some)[:NAMED])})"
            for what, some in differences.items()
            if some and known
        )
        if write:
            with replacing(account) as file:
                file.write(json.dumps(seen).encode())
        return self._account(len(bad) + len(self.listing.unread))

    def _account(self, left_out: int) -> list[str]:
        captions = sum(bool(caption) for _, caption in self.samples)
        line = f"'{self.folder}': {len(self.samples)} pictures, {captions} with a caption"
        line += f", {left_out} unreadable left out" * bool(left_out)
        if self.listing.others:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.listing.others.most_common(5))
            line += f"; other files are left alone: {kinds}"
        lines = [line]
        if self.classes is not None:
            some = ", ".join(self.classes[:10]) + ", ..." * (len(self.classes) > 10)
            lines.append(f"{len(self.classes)} classes, numbered from 0: {some}")
        return lines

    def _looked_at(self, known: dict[str, list[Any]]) -> Iterator[tuple[str, list[Any]]]:
        """Yield (path, [size, time of change, what is wrong or ""]) of every picture."""

        def one(path: Path) -> tuple[str, list[Any]]:
            name = self._name(path)
            try:
                status = path.stat()
                stamp = [status.st_size, status.st_mtime_ns]
                if name in known and known[name][:2] == stamp:
                    return name, known[name]
                to_rgb(open_image(path, formats=MORE_FORMATS))
            except (LdmError, OSError, ValueError) as error:
                return name, [*(stamp if path.is_file() else [0, 0]), first_line(error)]
            return name, [*stamp, ""]

        paths = [path for path, _ in self.samples]
        # Reading a picture quiets warnings for a while, in threads that overlap; here they all end.
        with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            looked: Any = pool.map(one, paths)
            if sys.stderr.isatty():
                from tqdm import tqdm

                looked = tqdm(looked, total=len(paths), desc="pictures", leave=False)
            yield from looked

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def digest(self) -> str:
        """Name the samples: their paths below the folder, captions and classes, in their order."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for path, caption in self.samples:
            digest.update(json.dumps([self._name(path), caption]).encode())
        return digest.hexdigest()[:16]

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
            path, caption = self.samples[(index + offset) % len(self.samples)]
            try:
                pixels = self._pixels(path, top, left)
            except (LdmError, OSError, ValueError) as error:
                self._note_bad(path, error)
                continue
            if self.flip and mirror < 0.5:
                pixels = pixels[:, ::-1]
            made = {"image": np.ascontiguousarray(pixels), "caption": caption, "txt": caption}
            if self.classes is not None:
                made["human_label"] = class_name(path, self.folder, self.label)
                made["class_label"] = np.array(self.classes.index(made["human_label"]))
            if self.masks:
                made["mask"] = draw_mask(self.image_size, rng)[..., None]
                made["masked_image"] = made["image"] * (1 - made["mask"])
            if self.low_resolution is not None:
                size = self.low_resolution
                squares = made["image"].reshape(size, self.image_size // size, size, -1, 3)
                made["LR_image"] = squares.mean(axis=(1, 3))
            return made
        raise FormatError(f"no picture in '{self.folder}' can be read")

    def _pixels(self, path: Path, top: float, left: float) -> np.ndarray:
        """Read a picture, resize its shorter side and cut a square: (h, w, 3) float32 in [-1, 1]."""
        picture = to_rgb(open_image(path, formats=MORE_FORMATS))
        size = self.image_size
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), resample=3)  # bicubic
        x, y = (width - size) // 2, (height - size) // 2
        if self.random_crop:
            x, y = int(left * (width - size + 1)), int(top * (height - size + 1))
        return np.asarray(picture.crop((x, y, x + size, y + size)), np.float32) / 127.5 - 1.0

    def _note_bad(self, path: Path, error: Exception) -> None:
        if path in self._bad:
            return
        self._bad.add(path)
        logger.warning("picture '%s' cannot be read, and the next one takes its place: %s", path, error)
        if len(self._bad) - len(self.listing.unread) > MAX_BAD:
            raise FormatError(
                f"{MAX_BAD + 1} of {len(self.samples)} pictures in '{self.folder}' could not be read any more; last: "
                f"'{path}'; --resume looks at all of them and goes on with the others"
            )


def _read_record(path: Path) -> dict[str, list[Any]]:
    """Read the record of an earlier check; {} where there is none, or it is damaged."""
    try:
        seen = json.loads(path.read_text(encoding="utf-8"))
        return {name: list(entry) for name, entry in seen.items() if len(entry) == 3}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
