"""LSUN's pictures under CompVis's names: a text file of names and a folder. Nothing is downloaded."""

from pathlib import Path
from typing import Any

from ldm.data.base import PictureList, read_list


class LSUNBase(PictureList):
    """Pictures listed in a text file, cut to their middle square.

    An item has "image" (size, size, 3) in [-1, 1], "relative_file_path_" and "file_path_".

    Args:
        txt_file: one picture a line, relative to data_root.
        data_root: the folder.
        size: pixels a side; None keeps the pixels of the square.
        interpolation: "linear", "bilinear", "bicubic" or "lanczos".
        flip_p: how often a picture is mirrored.

    Raises:
        AbsentError: the list or the folder is not there.
        FormatError: the list cannot be read or names nothing.
        UnsafeFileError: it names a file outside of the folder.
        UsageError: a value out of range.
    """

    def __init__(
        self,
        txt_file: str,
        data_root: str,
        size: int | None = None,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
    ):
        self.data_paths, self.data_root = txt_file, data_root
        self.image_paths = read_list(Path(txt_file), Path(data_root), type(self).__name__)
        paths = [Path(data_root) / name for name in self.image_paths]
        labels = {"relative_file_path_": self.image_paths, "file_path_": [str(path) for path in paths]}
        super().__init__(paths, labels, size, interpolation, flip_p=flip_p)


class _Named(LSUNBase):
    """A part of LSUN where latent-diffusion expects it; `txt_file` and `data_root` name another place."""

    DEFAULTS: dict[str, Any]

    def __init__(self, **kwargs: Any):
        super().__init__(**{**self.DEFAULTS, **kwargs})


class LSUNChurchesTrain(_Named):
    """Churches to train on."""

    DEFAULTS = {"txt_file": "data/lsun/church_outdoor_train.txt", "data_root": "data/lsun/churches"}


class LSUNChurchesValidation(_Named):
    """Churches to validate on, not mirrored."""

    DEFAULTS = {
        "txt_file": "data/lsun/church_outdoor_val.txt",
        "data_root": "data/lsun/churches",
        "flip_p": 0.0,
    }


class LSUNBedroomsTrain(_Named):
    """Bedrooms to train on."""

    DEFAULTS = {"txt_file": "data/lsun/bedrooms_train.txt", "data_root": "data/lsun/bedrooms"}


class LSUNBedroomsValidation(_Named):
    """Bedrooms to validate on, not mirrored."""

    DEFAULTS = {"txt_file": "data/lsun/bedrooms_val.txt", "data_root": "data/lsun/bedrooms", "flip_p": 0.0}


class LSUNCatsTrain(_Named):
    """Cats to train on."""

    DEFAULTS = {"txt_file": "data/lsun/cat_train.txt", "data_root": "data/lsun/cats"}


class LSUNCatsValidation(_Named):
    """Cats to validate on, not mirrored."""

    DEFAULTS = {"txt_file": "data/lsun/cat_val.txt", "data_root": "data/lsun/cats", "flip_p": 0.0}
