"""What ControlNet and T2I-Adapter share: hints, the part of the steps, the weights of a small network, sums of maps."""

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import images
from ldm.adapters.file_hash import hashes_of, stamp_of
from ldm.checkpoints import TensorInfo, open_weights
from ldm.checkpoints.families import REFUSED, family_of
from ldm.checkpoints.files import require_float
from ldm.checkpoints.safe import check_memory
from ldm.checkpoints.tensors import check_finite
from ldm.errors import AbsentError, MismatchError, UsageError, escaped, shown
from ldm.modules.seams import StepInfo
from ldm.values import Range, check_value

log = logging.getLogger(__name__)

FITS = ("crop", "pad", "stretch")
MAX_HINTS = 64
MASKED = -1.0  # in all channels: a pixel that an inpainting ControlNet is to make up
STEM = "diffusion_pytorch_model"  # of the weights in a diffusers folder
# Width of a context -> whose it is.
CONTEXTS = {768: "Stable Diffusion v1", 1024: "Stable Diffusion v2", 2048: "Stable Diffusion XL"}

# --- the part of the steps --------------------------------------------------------------------------


def check_span(start: Any, end: Any) -> tuple[float, float]:
    """Return the part of the sampler's way as two numbers.

    Raises:
        UsageError: not from 0 to 1, or start is not below end.
    """
    first = float(check_value(start, float, "start", Range(0, 1)))
    last = float(check_value(end, float, "end", Range(0, 1)))
    if first >= last:
        raise UsageError(f"start should be below end, got start={start} and end={end}")
    return first, last


def is_within(step: StepInfo | None, start: float, end: float) -> bool:
    """Tell whether a step lies wholly in a part of the sampler's way, 0 (noise) to 1 (picture), as diffusers has it."""
    if step is None:
        return True
    return not (step.index / step.total < start or (step.index + 1) / step.total > end)


def unusual(adapter: Any, usual: Mapping[str, Any]) -> dict[str, Any]:
    """List fields of an adapter that are not as usual, for a picture's metadata."""
    return {name: getattr(adapter, name) for name, value in usual.items() if getattr(adapter, name) != value}


def span_of(adapter: Any) -> dict[str, float]:
    """Say an adapter's part of the sampler's way where it is not all of it, for a picture's metadata."""
    return unusual(adapter, {"start": 0.0, "end": 1.0})


# --- hints ------------------------------------------------------------------------------------------


class Hint:
    """A picture, or several, that say what is to be where: edges, depths, poses; made by a program of its own.

    Attributes:
        pictures: (3, height, width) float32 in [0, 1] each; -1 in all channels where an inpainting ControlNet is to
            make up what is there (see preprocessors.inpaint).
        hash: the first 12 digits of SHA-256 of sizes and values.

    Args:
        given: a picture of PIL, the path of one, a tensor (3, height, width) or (n, 3, height, width) in [0, 1], or a
            list of these, of which picture i of a request has the i-th, and after the last the first again.
            Transparency becomes white.
        fit: where the aspect is another: "crop" keeps it and cuts off what is too much on both sides, "pad" keeps it
            and fills both sides with the median of the hint's border, "stretch" changes it.

    Raises:
        UsageError: another kind, or a tensor of another shape or range.
        Others: as images.open_image.
    """

    def __init__(self, given: Any, fit: str = "crop"):
        if fit not in FITS:
            raise UsageError(f"fit should be one of {', '.join(FITS)}, got {shown(fit)}")
        self.fit = fit
        several = given if isinstance(given, list | tuple) else [given]
        if not 0 < len(several) <= MAX_HINTS:
            raise UsageError(f"a list of hints should hold 1 to {MAX_HINTS}, got {len(several)}")
        self.pictures = [picture for one in several for picture in read_hints(one)]
        digest = hashlib.sha256()
        for picture in self.pictures:
            digest.update(f"{tuple(picture.shape)}".encode())
            digest.update(picture.contiguous().numpy().tobytes())
        self.hash = digest.hexdigest()[:12]

    def sized(self, height: int, width: int) -> Tensor:
        """Give all hints at one size, (n, 3, height, width); that a picture is cropped is said in the log."""
        return torch.cat([self._sized(picture, height, width) for picture in self.pictures])

    def part(self, size: tuple[int, int], box: tuple[int, int, int, int]) -> "Hint":
        """Give what lies in a box (left, top, right, bottom) of a picture of (width, height) that the hints are of."""
        left, top, right, bottom = box
        found = copy.copy(self)
        found.pictures = [one[:, top:bottom, left:right] for one in self.sized(*size[::-1])]
        found.fit = "stretch"
        return found

    def of_images(self, places: Sequence[int]) -> "Hint":
        """Give the hints of some images of a request, by their places from 0: one each, or all where they alternate."""
        count = len(self.pictures)
        mine = [place % count for place in places]
        if len(mine) % count == 0 and mine == list(range(count)) * (len(mine) // count):
            return self
        found = copy.copy(self)
        found.pictures = [self.pictures[i] for i in mine]
        return found

    def check_rows(self, images: int) -> int:
        """Return how many hints there are, if so many images have each as often as the others, or raise UsageError."""
        count = len(self.pictures)
        if images % count:
            raise UsageError(
                f"{count} hints go round among the pictures (picture {count} has the first again), so that their "
                f"number should divide that of the pictures, got {images} picture{'s' * (images > 1)}; give one hint, "
                "or as many as there are pictures"
            )
        return count

    def _sized(self, picture: Tensor, height: int, width: int) -> Tensor:
        h, w = picture.shape[1:]
        if self.fit == "crop":
            scale = max(height / h, width / w)
            rows, columns = min(h, round(height / scale)), min(w, round(width / scale))
            if (rows, columns) != (h, w):
                log.warning(
                    "the hint of %d x %d pixels has another aspect than the picture of %d x %d: its middle, %d x %d, "
                    "is used; fit='stretch' or 'pad' use all of it",
                    *(w, h, width, height, columns, rows),
                )
                top, left = (h - rows) // 2, (w - columns) // 2
                picture = picture[:, top : top + rows, left : left + columns]
        elif self.fit == "pad":
            scale = min(height / h, width / w)
            rows, columns = max(1, round(h * scale)), max(1, round(w * scale))
            edge = torch.cat([picture[:, [0, -1]].flatten(1), picture[:, :, [0, -1]].flatten(1)], 1)
            whole = edge.median(1).values[:, None, None].repeat(1, height, width)
            top, left = (height - rows) // 2, (width - columns) // 2
            whole[:, top : top + rows, left : left + columns] = resized(picture, rows, columns)
            picture = whole
        return resized(picture, height, width)[None]


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """Resize a hint (3, h, w); pixels that are to be made up stay -1 where more than half of what becomes one is."""
    if picture.shape[1:] == (height, width):
        return picture
    masked = (picture == MASKED).all(0)
    given = F.interpolate(
        picture.clamp(min=0.0)[None], size=(height, width), mode="bicubic", antialias=True
    ).clamp(0.0, 1.0)[0]
    if masked.any():
        share = F.interpolate(
            masked.float()[None, None], size=(height, width), mode="bilinear", antialias=True
        )
        given[:, share[0, 0] > 0.5] = MASKED
    return given


def hint_of(given: Any, fit: str) -> Hint:
    """Make a Hint of what an adapter was given; one that is a Hint already keeps its own fit.

    Raises:
        UsageError: as Hint; or a Hint with another fit than the adapter's, which is not the usual one.
    """
    if not isinstance(given, Hint):
        return Hint(given, fit)
    if fit not in ("crop", given.fit):
        raise UsageError(
            f"fit should be one of {', '.join(FITS)}, and that of the hint where it is a Hint ({given.fit!r}), got "
            f"{shown(fit)}; leave it out"
        )
    return given


def images_of(step: StepInfo | None, rows: int) -> int:
    """Give how many images a call of so many rows is for."""
    return rows if step is None or step.images is None else step.images


def read_hints(given: Any) -> list[Tensor]:
    """Read one entry of hints: pictures (3, height, width) in [0, 1]."""
    if isinstance(given, str | os.PathLike):
        given = images.open_image(given)
    elif hasattr(given, "convert") and hasattr(given, "getbands"):
        given = images.upright(given)
    elif isinstance(given, Tensor):
        return _checked(given)
    else:
        wanted = "a hint should be a picture, the path of one, or a tensor (3, height, width) in [0, 1]"
        raise UsageError(f"{wanted}, got {'none' if given is None else shown(given)}")
    # k / 255 exactly, which (to_tensor(...) + 1) / 2 is not.
    return [images.given_unit(images.to_tensor(given))[0]]


def _checked(given: Tensor) -> list[Tensor]:
    shape = tuple(given.shape)
    if len(shape) not in (3, 4) or shape[-3] != 3 or 0 in shape or not given.is_floating_point():
        raise UsageError(
            "a hint's tensor should be floating point, (3, height, width) or (n, 3, height, width), got "
            f"{str(given.dtype).removeprefix('torch.')} of shape {shape}"
        )
    given = given.detach().float().cpu().reshape(-1, *shape[-3:])
    if len(given) > MAX_HINTS:
        raise UsageError(f"at most {MAX_HINTS} hints are taken, got {len(given)}")
    there = given[(given != MASKED).any(1, keepdim=True).expand_as(given)]
    low, high = (there.min().item(), there.max().item()) if there.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise UsageError(
            f"a hint's values should be from 0 to 1 (-1 in all channels where it is masked), got {low:g} to {high:g}"
        )
    return list(given.clone())


# --- files ------------------------------------------------------------------------------------------


class Hinted:
    """What adapters with a hint share: dataclasses whose fields are a `hint`, a Hint, and its `fit`, among others."""

    hint: Any

    def begin(self) -> Self:
        """Return one for one run of a sampler, which stands at a step of its own."""
        return replace(self)

    def of_images(self, places: Sequence[int]) -> Self:
        """Return one for some images of a request: see `Hint.of_images`."""
        hint = self.hint.of_images(places)
        return self if hint is self.hint else replace(self, hint=hint)

    def of_part(self, size: tuple[int, int], box: tuple[int, int, int, int]) -> Self:
        """Return one for a part of the picture: see `Hint.part`."""
        hint = self.hint.part(size, box)
        return replace(self, hint=hint, fit=hint.fit)


class ControlFile:
    """A file of weights that are read whole: of a ControlNet or a T2I-Adapter, as its subclass says.

    Attributes:
        path, name: the file, and its name without folder and suffix.
        tensors: what it holds, by its own names, in its own dtype.
        ignored: key -> why it is left out.

    Args:
        path: a safetensors file or one of torch.save; nothing in it can run code. Or diffusers' folder of it.

    Raises:
        UsageError: a path of another kind.
        AbsentError, FormatError, UnsafeFileError: the file cannot be read; see `open_weights`.
        MismatchError: it is something else, or for another base model.
        NumericError: a weight is not finite.
    """

    family: str  # of ldm.checkpoints.families
    wanted: str  # in words

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(check_value(path, str | os.PathLike, f"the file of {self.wanted}"))
        self.name = Path(self.path).stem
        if os.path.isdir(self.path):
            self.path = _in_folder(Path(self.path))
        self._stamp = stamp_of(self.path)
        weights = open_weights(self.path)
        try:
            self.notes = list(weights.notes)
            self._is_safetensors = weights.kind == "safetensors"
            self.ignored: dict[str, str] = {}
            infos = self.own(weights.infos)
            check_memory(self.path, sum(info.nbytes for info in infos.values()))
            self.tensors: dict[str, Tensor] = {}
            for name, info in infos.items():
                require_float(self.path, name, info.dtype)
                self.tensors[name] = weights.read(name)
                check_finite(self.path, name, self.tensors[name])
        finally:
            weights.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({escaped(self.path)})"

    def own(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """List what of the file is read, and fill `ignored`.

        Raises:
            MismatchError: the file is none of these.
        """
        family = family_of(infos)
        if family != self.family:
            raise self.misfit(REFUSED.get(family, "a full Stable Diffusion v1 model"))
        return dict(infos)

    def misfit(self, what: str) -> MismatchError:
        """An error that says what was wanted, and what the file is."""
        return MismatchError(f"'{escaped(self.path)}': {self.wanted} was wanted, and this is {what}")

    @property
    def hashes(self) -> tuple[str, str]:
        """SHA-256 of the whole file, and of what follows its header; see `file_hash.hashes_of`."""
        if not hasattr(self, "_hashes"):
            self._hashes = hashes_of(self.path, self._stamp, self._is_safetensors)
        return self._hashes


def _in_folder(folder: Path) -> str:
    """Find the weights in a diffusers folder."""
    for name in (f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bin", f"{STEM}.fp16.bin"):
        if (folder / name).is_file():
            return str(folder / name)
    raise AbsentError(f"there is no {STEM}.safetensors or .bin in '{escaped(folder)}'; name the file itself")


def described(adapter: Any, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Say of an adapter with a file, a hint and a scale what goes into a picture's metadata.

    Args:
        usual: values of further fields, which are left out where they are these.

    Returns:
        name, scale, hint (a hash of it), hash (10 digits of the file's SHA-256, as A1111 writes it), sha256; and
        the further fields and fit where they are not the usual ones.
    """
    found: dict[str, Any] = {"name": adapter.file.name, "scale": adapter.scale, "hint": adapter.hint.hash}
    found |= unusual(adapter, usual)
    if adapter.hint.fit != "crop":
        found["fit"] = adapter.hint.fit
    whole = adapter.file.hashes[0]
    return {**found, "hash": whole[:10], "sha256": whole}


# --- networks ---------------------------------------------------------------------------------------


def filled(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build a network around tensors that are there already, by its own names; nothing is copied.

    Of tensors of several dtypes all become the widest one's: a network computes in one.
    """
    with torch.device("meta"):
        network = build()
    dtype = reduce(torch.promote_types, {x.dtype for x in tensors.values()})
    network.load_state_dict(
        {name: tensors[name].reshape(x.shape).to(dtype) for name, x in network.state_dict().items()},
        assign=True,
    )
    return network.eval().requires_grad_(False)


def put(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a network's weights where those are that it works with."""
    first = next(network.parameters())
    if (first.device, first.dtype) != (device, dtype):
        network.to(device, dtype)


def add_maps(one: Sequence[Tensor | None] | None, other: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Add maps to those that are there already; None = nothing."""
    if one is None:
        return other
    if len(one) != len(other):
        raise MismatchError(f"controls should have the same number of maps, got {len(one)} and {len(other)}")
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]
