"""Networks that enlarge pictures: ESRGAN and its kin, from a weight file, by spandrel (an optional package).

The file is read by our own reader, which runs nothing that is in it; spandrel tells from the names and shapes of its
tensors which network they are of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.files import read_tensors
from ldm.errors import AbsentError, MismatchError, NumericError, UsageError, escaped, nearest, shown
from ldm.option_kinds import Upscaler
from ldm.retouch.tiles import Grid

if TYPE_CHECKING:
    from PIL import Image

# Where a trainer keeps the network among other things; the first that is there is taken: averages first.
PARTS = ("params_ema.", "params-ema.", "params.", "model_state_dict.", "state_dict.")
TILE, OVERLAP = 192, 8  # pixels; larger pictures are enlarged in tiles, as A1111 does
AT_MOST = 3  # how often a picture goes through the network to reach its size


def find_upscaler(
    option: str, name: str | os.PathLike, folder: str | os.PathLike | None, others: Sequence[str]
) -> Path:
    """Find the weight file that a name means: a path, or a file's name in the folder, with or without its suffix.

    Args:
        option: that gave the name, which errors name.
        others: names of ways that need no file, of which the nearest is told.

    Raises:
        AbsentError: there is no such file. UsageError: the name is neither a file's nor one of the others.
    """
    path = Path(name)
    if path.is_file():
        return path
    there: dict[str, Path] = {}
    if folder is not None:
        if not Path(folder).is_dir():
            raise AbsentError(
                f"upscaler_dir {shown(os.fspath(folder))} is no folder; give one with upscalers"
            )
        files = sorted(one for one in Path(folder).iterdir() if one.suffix.lower() in Upscaler.suffixes)
        there = {one.stem: one for one in files} | {one.name: one for one in files}
        if path.name in there:
            return there[path.name]
    near = nearest(path.name, [*others, *there])
    advice = f"; did you mean {near!r}?" if near else ""
    if path.suffix.lower() in Upscaler.suffixes:
        raise AbsentError(
            f"{option} {shown(os.fspath(name))} is not there{advice or '; give the path of its file'}"
        )
    raise UsageError(
        f"{option}: wanted one of {', '.join(others)}, a weight file or a name in upscaler_dir; "
        f"got {shown(os.fspath(name))}{advice}"
    )


class FileUpscaler:
    """A network that makes RGB pictures `scale` times as large.

    Attributes:
        path, name: the file, and what pictures say: its name without suffix.
        scale: how many times as large; 1 restores.

    Raises:
        UsageError: spandrel is not installed, or does not load. MismatchError: the file is of no network that takes
        pictures to pictures.
        Those of ldm.checkpoints.files.read_tensors.
    """

    def __init__(self, path: str | os.PathLike, device: str | torch.device = "cpu"):
        try:
            import spandrel
        except ImportError:
            raise UsageError(
                "an upscaler from a file needs spandrel: pip install 'faithful-ldm[upscale]', or take lanczos or latent"
            ) from None
        except RuntimeError as error:  # a torchvision of another build than torch's
            raise UsageError(
                f"spandrel is there and does not load ({escaped(error, 160)}); install the torchvision of your torch's "
                "build"
            ) from None
        self.path, self.name = Path(path), Path(path).stem
        state = _network_of(path)
        try:
            found = spandrel.ModelLoader(device=device).load_from_state_dict(state)
        except spandrel.UnsupportedModelError:
            found = None
        except (KeyError, IndexError, ValueError, RuntimeError, AssertionError) as error:
            raise MismatchError(
                f"'{escaped(path)}' looks like an upscaler but does not fit its network ({escaped(error, 160)}); "
                "get it anew"
            ) from None
        if not isinstance(found, spandrel.ImageModelDescriptor):
            raise MismatchError(
                f"'{escaped(path)}' is no upscaler that spandrel knows; give one such as ESRGAN's"
            )
        if (found.input_channels, found.output_channels) != (3, 3):
            raise MismatchError(
                f"'{escaped(path)}' takes {found.input_channels} channels to {found.output_channels}; "
                "give one of colours"
            )
        self._network = found.eval()
        self.scale: int = found.scale

    def __repr__(self) -> str:
        return f"FileUpscaler({self.name}, {self._network.architecture.name}, x{self.scale})"

    def enlarge(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Enlarge an RGB picture to (width, height): until it covers that, three times at most, then by Lanczos.

        Raises:
            NumericError: the network gave values that are not finite.
        """
        from PIL import Image

        for _ in range(AT_MOST):
            if image.width >= size[0] and image.height >= size[1]:
                break
            image = self._once(image)
            if self.scale == 1:
                break
        return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)

    def _once(self, image: Image.Image) -> Image.Image:
        grid = Grid.over(image.size, (TILE, TILE), OVERLAP)
        s = self.scale
        whole = Grid(
            *((one[0] * s, one[1] * s) for one in (grid.size, grid.tile)),
            grid.overlap * s,
            tuple(x * s for x in grid.columns),
            tuple(y * s for y in grid.rows),
        )
        return whole.join([self._tile(image.crop(box)) for box in grid.boxes])

    def _tile(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        unit = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0).permute(2, 0, 1)[None]
        larger = self._network(unit.to(self._network.device, self._network.dtype))
        if not torch.isfinite(larger).all():
            raise NumericError(
                f"upscaler '{escaped(self.name)}' gave values that are not finite; take another"
            )
        pixels = (255.0 * larger[0].float().clamp(0, 1)).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _network_of(path: str | os.PathLike) -> Mapping[str, Tensor]:
    """Read the tensors of a file, of a trainer's state those of the network alone."""
    tensors, _ = read_tensors(path)
    part = next((part for part in PARTS if any(name.startswith(part) for name in tensors)), "")
    return {name.removeprefix(part): one for name, one in tensors.items() if name.startswith(part)}
