"""Pictures of a folder as OpenAI's scripts read them: squares in [-1, 1], a class before a name's first underscore."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import AbsentError, FormatError, LdmError, UnsafeFileError, UsageError
from ldm.guided_diffusion import dist_util
from ldm.images import MORE_FORMATS, open_image, to_rgb
from ldm.limits import whole
from ldm.training.listing import SUFFIXES, class_name

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


def load_data(
    *,
    data_dir: str | os.PathLike,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    seed: int = 0,
) -> "Batches":
    """Read a folder's pictures for ever, batch by batch.

    Batch n depends on (seed, n) alone, so that a resumed run goes on where the other one ended. The next batch is read
    while one is used.

    Args:
        data_dir: with pictures, also in folders below; files that begin with a dot are left alone.
        batch_size: of this process.
        image_size: pixels a side.
        class_cond: give labels, too: the sorted names before the first underscore, numbered from 0.
        deterministic: in order, instead of a new random one each time round.
        random_crop: cut the square anywhere, of a picture that is larger by up to a quarter; else its middle.
        random_flip: mirror every other picture.

    Returns:
        An iterator over ((b, 3, image_size, image_size) in [-1, 1], {"y": (b,) int64} or {}).

    Raises:
        UsageError: no data_dir, a value out of range, or the package's extra for training is not there.
        UnsafeFileError: an address. AbsentError: no such folder, or no pictures in it.
        MismatchError: fewer pictures than a batch of all processes takes.
    """
    if not data_dir:
        raise UsageError("unspecified data directory: data_dir should name a folder of pictures")
    if "://" in str(data_dir):
        raise UnsafeFileError(
            f"data_dir '{data_dir}' is an address; nothing is downloaded, name a folder on disk"
        )
    folder = Path(data_dir)
    if not folder.is_dir():
        raise AbsentError(f"data_dir '{folder}' is no folder; check the path")
    whole("batch_size", batch_size, 1, 1_000_000)
    whole("image_size", image_size, 1, 65_536)
    files = _list_image_files_recursively(folder)
    if not files:
        raise AbsentError(f"data_dir '{folder}' holds no pictures ({', '.join(SUFFIXES)})")
    classes = None
    if class_cond:
        names = [class_name(Path(path), folder, "prefix") for path in files]
        numbers = {name: i for i, name in enumerate(sorted(set(names)))}
        classes = [numbers[name] for name in names]
        without = [path for path in files if "_" not in Path(path).name]
        if without:
            log.warning(
                "%d of %d pictures have no underscore in their name, so that each is a class of its own, such as '%s'",
                len(without), len(files), Path(without[0]).name,
            )  # fmt: skip
        log.info("%d classes: %s", len(numbers), ", ".join(list(numbers)[:20]))
    dataset = ImageDataset(image_size, files, classes, random_crop=random_crop, random_flip=random_flip)
    Stream = needs_training("data").Stream
    rank, world = dist_util.place()
    return Batches(Stream(dataset, batch_size, seed=seed, rank=rank, world=world, shuffle=not deterministic))


def needs_training(module: str) -> Any:
    """Import a module of ldm.training.

    Raises:
        UsageError: what the package's extra for training brings is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"ldm.training.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "ldm":
            raise
        raise UsageError(
            f"pictures of a folder and training need {error.name}; pip install 'faithful-ldm[train]'"
        ) from error


def _list_image_files_recursively(data_dir: str | os.PathLike) -> list[str]:
    """List a folder's pictures by name, without those whose path has a part that begins with a dot."""
    root, found, others = Path(data_dir), [], 0
    for path in sorted(root.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file():
            continue
        if path.suffix.lower() in SUFFIXES:
            found.append(str(path))
        else:
            others += 1
    if others:
        log.warning(
            "%d files in '%s' are no pictures (%s) and are left out", others, root, ", ".join(SUFFIXES)
        )
    return found


class ImageDataset(Dataset):
    """Pictures as squares, with labels if there are any.

    Args:
        resolution: pixels a side.
        image_paths: the files.
        classes: one label for each, or None.
        shard, num_shards: every num_shards-th file from the shard-th on.
        random_crop, random_flip: see load_data.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ):
        self.resolution = resolution
        self.local_images = list(image_paths[shard::num_shards])
        self.local_classes = None if classes is None else list(classes[shard::num_shards])
        self.random_crop, self.random_flip = random_crop, random_flip
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Read a picture: ((3, resolution, resolution) float32 in [-1, 1], {"y": label} or {})."""
        made = self.item(idx, np.random.default_rng(), 0)
        return made.pop("image"), made

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        """Read picture `index`, cut and mirrored as rng says; the next sound one where it cannot be read.

        Raises:
            FormatError: no picture can be read.
        """
        seed = int(rng.integers(1 << 63))  # so that the next picture is cut as this one would be
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            if at in self._unreadable:
                continue
            try:
                picture = to_rgb(open_image(self.local_images[at], formats=MORE_FORMATS))
            except LdmError as error:
                self._unreadable.add(at)
                log.warning("a picture is left out: %s", error)
                continue
            draws = np.random.default_rng(seed)
            cut = random_crop_arr(picture, self.resolution, rng=draws) if self.random_crop else None
            pixels = center_crop_arr(picture, self.resolution) if cut is None else cut
            if self.random_flip and draws.random() < 0.5:
                pixels = pixels[:, ::-1]
            image = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1
            label = (
                {} if self.local_classes is None else {"y": np.array(self.local_classes[at], dtype=np.int64)}
            )
            return {"image": image, **label}
        raise FormatError(f"none of {len(self)} pictures can be read, the first is '{self.local_images[0]}'")


class Batches:
    """An endless iterator over a stream's batches that can be set to any of them.

    Attributes:
        position: number of the batch that comes next.
    """

    def __init__(self, stream: Any):
        self.stream, self.position = stream, 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="load_data")
        self._ahead: tuple[int, Future] | None = None

    def seek(self, position: int) -> None:
        """Let batch `position` come next."""
        self.position = whole("position", position, 0, 1 << 60)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return self

    def __next__(self) -> tuple[Tensor, dict[str, Tensor]]:
        read = self.stream.__getitem__
        if self._ahead is None or self._ahead[0] != self.position:
            self._ahead = self.position, self._reader.submit(read, self.position)
        batch = self._ahead[1].result()
        self.position += 1
        self._ahead = self.position, self._reader.submit(read, self.position)
        return batch["image"], {"y": batch["y"]} if "y" in batch else {}


def _shrunk(picture: "Image.Image", smaller: int) -> "Image.Image":
    """Resize so that the shorter side is `smaller`: by halves with a box filter as long as that goes, then bicubic."""
    from PIL import Image

    while min(picture.size) >= 2 * smaller:
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.Resampling.BOX)
    scale = smaller / min(picture.size)
    size = tuple(round(side * scale) for side in picture.size)
    return picture.resize(size, resample=Image.Resampling.BICUBIC)


def center_crop_arr(pil_image: "Image.Image", image_size: int) -> np.ndarray:
    """Shrink a picture and cut its middle: (image_size, image_size, 3) uint8."""
    pixels = np.asarray(_shrunk(pil_image, image_size))
    top, left = ((side - image_size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]


def random_crop_arr(
    pil_image: "Image.Image",
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Shrink a picture so that a square is 0.8 to 1 of its shorter side, and cut one anywhere."""
    rng = np.random.default_rng() if rng is None else rng
    low, high = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    pixels = np.asarray(_shrunk(pil_image, int(rng.integers(low, high + 1))))
    top, left = (int(rng.integers(side - image_size + 1)) for side in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]
