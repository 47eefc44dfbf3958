"""ImageNet under CompVis's names: a folder for each class. Nothing is downloaded or unpacked."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.config_text import load_config
from ldm.data.base import SUFFIXES, PictureList, read_list, seeded_by_torch, to_signed
from ldm.errors import AbsentError, FormatError, UsageError

# Pictures that are known to be broken.
BROKEN = {"n06596364_9591.JPEG"}
# What ImageNetBase understands in its configuration; a class may add "<Class>/random_crop".
KEYS = ("size", "keep_orig_class_label", "sub_indices")
PIL_METHODS = {
    "pil_nearest": Image.Resampling.NEAREST,
    "pil_bilinear": Image.Resampling.BILINEAR,
    "pil_bicubic": Image.Resampling.BICUBIC,
    "pil_box": Image.Resampling.BOX,
    "pil_hamming": Image.Resampling.HAMMING,
    "pil_lanczos": Image.Resampling.LANCZOS,
}
# OpenCV's methods that torch has, too: without smoothing before, its bicubic with the same a = -0.75.
CV_METHODS = {"cv_nearest": "nearest", "cv_bilinear": "bilinear", "cv_bicubic": "bicubic", "cv_area": "area"}


class ImageNetBase(Dataset):
    """Pictures in folders named by their class (synset).

    Below `root`: `data/<synset>/<picture>`; optional `filelist.txt` (one `<synset>/<picture>` a line; without it the
    folders are listed), `synset_human.txt` (a synset and its name a line; without it a class is called by its synset)
    and `index_synset.yaml` (original number: synset).

    An item has "image" (size, size, 3) in [-1, 1], "class_label" (a number from 0), "human_label", "synsets", "relpath"
    and "file_path_".

    Args:
        config: {"size": pixels a side (256), "keep_orig_class_label": number classes as index_synset.yaml does instead
            of in the order of the synsets that are there, "sub_indices": only these, "0-9, 20",
            "<Class>/random_crop": cut the square at random}.
        process_images: False only lists: `data` then holds the paths.
        data_root: folder that holds the class's NAME; None means $XDG_CACHE_HOME/autoencoders/data.

    Raises:
        AbsentError: the folder is not there, or a file of it that the configuration asks for.
        FormatError: one of the text files is not what it should be.
        UnsafeFileError: filelist.txt names a file outside of the folder.
        UsageError: a key or value of the configuration that is unknown.
    """

    NAME = ""
    RANDOM_CROP = False

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        process_images: bool = True,
        data_root: str | None = None,
    ):
        if not self.NAME:
            raise UsageError(
                "ImageNetBase is what ImageNetTrain and ImageNetValidation share; take one of them"
            )
        self.config = {} if config is None else {key: config[key] for key in config}
        known = (*KEYS, f"{type(self).__name__}/random_crop")
        for key in self.config:
            if key not in known and not key.endswith("/random_crop"):
                raise UsageError(
                    f"{type(self).__name__} has no key '{key}' in its config; it has {', '.join(known)}"
                )
        self.process_images, self.data_root = process_images, data_root
        self.keep_orig_class_label = bool(self.config.get("keep_orig_class_label", False))
        self.random_crop = bool(self.config.get(known[-1], self.RANDOM_CROP))
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "autoencoders", "data")
        self.root = str(Path(data_root or cache) / self.NAME)
        self.datadir, self.txt_filelist = f"{self.root}/data", f"{self.root}/filelist.txt"
        self._load()

    def _load(self) -> None:
        what = type(self).__name__
        if not Path(self.datadir).is_dir():
            raise AbsentError(
                f"{what}: put the pictures into '{self.datadir}/<synset>/', which is not there, or name the folder of "
                f"'{self.NAME}' as data_root; nothing is downloaded"
            )
        if Path(self.txt_filelist).is_file():
            names = read_list(Path(self.txt_filelist), Path(self.datadir), what)
        else:
            found = (p for p in Path(self.datadir).glob("*/*") if p.suffix.lower() in SUFFIXES)
            names = sorted(path.relative_to(self.datadir).as_posix() for path in found)
        numbers = self._original_numbers()
        if "sub_indices" in self.config:
            wanted = _indices(str(self.config["sub_indices"]))
            names = [name for name in names if numbers.get(name.split("/")[0]) in wanted]
        self.relpaths = [name for name in names if name.split("/")[-1] not in BROKEN]
        if not self.relpaths:
            raise AbsentError(
                f"{what}: '{self.datadir}' holds no pictures ({', '.join(SUFFIXES)}) of these classes"
            )
        self.synsets = [name.split("/")[0] for name in self.relpaths]
        self.abspaths = [f"{self.datadir}/{name}" for name in self.relpaths]
        if not self.keep_orig_class_label:
            numbers = {synset: i for i, synset in enumerate(sorted(set(self.synsets)))}
        called = self._human_names()
        try:
            self.class_labels = [numbers[synset] for synset in self.synsets]
        except KeyError as error:
            raise FormatError(f"{what}: '{self.root}/index_synset.yaml' has no class {error}") from None
        self.human_labels = [called.get(synset, synset) for synset in self.synsets]
        self.size = self.config.get("size", 256)
        self.labels = {
            "relpath": self.relpaths,
            "synsets": self.synsets,
            "class_label": [np.array(number) for number in self.class_labels],
            "human_label": self.human_labels,
            "file_path_": self.abspaths,
        }
        paths = [Path(path) for path in self.abspaths]
        self.data: Any = self.abspaths
        if self.process_images:
            self.data = PictureList(paths, self.labels, self.size, random_crop=self.random_crop)

    def _original_numbers(self) -> dict[str, int]:
        """Read index_synset.yaml where the configuration asks for original numbers: synset -> number."""
        if not (self.keep_orig_class_label or "sub_indices" in self.config):
            return {}
        path = Path(self.root, "index_synset.yaml")
        if not path.is_file():
            raise AbsentError(
                f"{type(self).__name__}: the classes' own numbers need '{path}', which is not there; nothing is "
                "downloaded"
            )
        try:
            return {str(synset): int(number) for number, synset in load_config(path).items()}
        except (ValueError, TypeError):
            raise FormatError(f"'{path}' should have a line 'number: synset' for each class") from None

    def _human_names(self) -> dict[str, str]:
        """Read synset_human.txt, if it is there: synset -> name."""
        path = Path(self.root, "synset_human.txt")
        if not path.is_file():
            return {}
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            return dict(line.split(maxsplit=1) for line in lines)
        except (OSError, ValueError):
            raise FormatError(f"'{path}' should have a line 'synset name' for each class") from None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        return self.data[i]

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        """Read picture `index`, cut as rng says."""
        if not self.process_images:
            raise UsageError(f"{type(self).__name__} only lists its pictures; set process_images: true")
        return self.data.item(index, rng, step)


def _indices(text: str) -> set[int]:
    """Read "0-9, 20": single numbers, and ranges with both ends."""
    try:
        spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
        return {number for span in spans for number in range(span[0], span[-1] + 1)}
    except ValueError:
        raise UsageError(f"sub_indices should be such as '0-9, 20', got {text!r:.80}") from None


class ImageNetTrain(ImageNetBase):
    """The training part, cut at random."""

    NAME = "ILSVRC2012_train"
    RANDOM_CROP = True


class ImageNetValidation(ImageNetBase):
    """The validation part, cut in the middle."""

    NAME = "ILSVRC2012_validation"


class ImageNetSR(Dataset):
    """ImageNet's pictures beside small versions of them, to train an upscaler.

    An item has "image" (size, size, 3) and "LR_image" (size / downscale_f a side), in [-1, 1], and the labels of
    ImageNetBase. All pictures are used: the list of large ones that latent-diffusion reads is a pickle.

    Args:
        size: pixels a side.
        degradation: how the small version is made: "pil_nearest", "pil_bilinear", "pil_bicubic", "pil_box",
            "pil_hamming", "pil_lanczos", or OpenCV's "cv_nearest", "cv_bilinear", "cv_bicubic", "cv_area".
        downscale_f: how many times smaller it is; divides size.
        min_crop_f, max_crop_f: the square that is cut has between these shares of the shorter side.
        random_crop: cut it at random; False cuts the middle.
        base: ImageNetBase's data_root, and config for which classes.

    Raises:
        UsageError: an unknown degradation, or a value out of range.
        AbsentError: see ImageNetBase.
    """

    BASE: type[ImageNetBase] | None = None

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        **base: Any,
    ):
        known = (*PIL_METHODS, *CV_METHODS)
        if degradation not in known:
            raise UsageError(f"degradation should be one of {', '.join(known)}; got {degradation!r}")
        if size is None or size < 8 or downscale_f < 1 or size % downscale_f:
            raise UsageError(
                f"size should be a multiple of downscale_f ({downscale_f}) from 8 on, got {size}"
            )
        if not 0 < min_crop_f <= max_crop_f <= 1:
            raise UsageError(
                f"0 < min_crop_f <= max_crop_f <= 1 should hold, got {min_crop_f} and {max_crop_f}"
            )
        self.size, self.LR_size = size, size // downscale_f
        self.degradation = degradation
        self.min_crop_f, self.max_crop_f = min_crop_f, max_crop_f
        self.center_crop = not random_crop
        self.base = self.get_base(**base)

    def get_base(self, **base: Any) -> ImageNetBase:
        """Find the pictures."""
        if self.BASE is None:
            raise UsageError("ImageNetSR is what its Train and Validation share; take one of them")
        return self.BASE(**base)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.item(range(len(self))[i], seeded_by_torch(), 0)

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        """Read picture `index`, cut as rng says, and shrink it."""
        share, across, down = rng.random(3)
        taken, picture = self.base.data.read(index)
        width, height = picture.size
        share = self.min_crop_f + share * (self.max_crop_f - self.min_crop_f)
        side = max(1, int(min(width, height) * share))
        if self.center_crop:
            left, top = (width - side) // 2, (height - side) // 2
        else:
            left, top = int(across * (width - side + 1)), int(down * (height - side + 1))
        picture = picture.crop((left, top, left + side, top + side))
        # As OpenCV's INTER_AREA, which averages on the way down and interpolates on the way up.
        method = Image.Resampling.BOX if side >= self.size else Image.Resampling.BILINEAR
        picture = picture.resize((self.size, self.size), method)
        labels = {name: values[taken] for name, values in self.base.labels.items()}
        small = self.degradation_process(picture)
        return {**labels, "image": to_signed(np.asarray(picture)), "LR_image": to_signed(small)}

    def degradation_process(self, picture: Image.Image) -> np.ndarray:
        """Shrink a square picture to LR_size: (LR_size, LR_size, 3) bytes."""
        if self.degradation in PIL_METHODS:
            size = (self.LR_size, self.LR_size)
            return np.asarray(picture.resize(size, PIL_METHODS[self.degradation]))
        mode = CV_METHODS[self.degradation]
        pixels: Tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
        small = F.interpolate(pixels, size=(self.LR_size, self.LR_size), mode=mode)
        return small[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()


class ImageNetSRTrain(ImageNetSR):
    """The training part."""

    BASE = ImageNetTrain


class ImageNetSRValidation(ImageNetSR):
    """The validation part."""

    BASE = ImageNetValidation
