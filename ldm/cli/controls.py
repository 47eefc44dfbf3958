"""The ControlNets and their like of a run of a painting script: how flags say them, and each file read once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ldm.errors import AbsentError, UsageError, nearest_file, refuse_elsewhere, shown
from ldm.limits import ADAPTERS

if TYPE_CHECKING:
    from ldm.adapters import ControlNet, IPAdapter, T2IAdapter

FLAGS = {"control": "--control", "t2i_adapter": "--t2i-adapter", "ip_adapter": "--ip-adapter"}
# Said of an IP-Adapter, and nothing else is.
OF_IMAGES = ("ip_image", "ip_scale", "ip_start", "ip_end", "ip_mask", "image_encoder")
OF_IP = ("scale", "start", "end")  # of ip_scale and on
PICTURES = {"hint": "--hint", "ip_image": "--ip-image"}
# What lays a picture and its mask out before they are painted.
AROUND = ("width", "height", "resize_mode", "outpaint", "inpaint_full_res", "upscale_by")
AROUND += ("mask_invert", "mask_blur", "mask_blur_x", "mask_blur_y")
MODES = {
    "balanced": {},
    "prompt": {"weights": "soft"},
    "control": {"guess": True},
    "middle": {"only_mid_control": True},
}
NUMBERS = {
    "canny": ("low", "high"),
    "scribble": ("level",),
    "shuffle": ("seed",),
    "threshold": ("level",),
    "tile": ("rate",),
}


@dataclass
class Said:
    """What flags say of one adapter.

    Attributes:
        kind: the option that names its file.
        hints: pictures, by their paths; of an IP-Adapter those to paint after.
        masks: of these.
        options: what else, by the options' names.
    """

    kind: str
    file: str
    hints: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{FLAGS[self.kind]} {shown(self.file)}"


def gather(parts: Sequence[tuple[str, Any]]) -> list[Said]:
    """Bring what flags say, in their order, into one record for each adapter.

    Raises:
        UsageError: a flag that stands before any adapter, or twice behind one; or too many adapters.
    """
    found: list[Said] = []
    for name, value in parts:
        flag = "--" + name.replace("_", "-")
        if name in FLAGS:
            if not value:
                raise UsageError(f"wanted a file after {flag}, got none")
            found.append(Said(name, value))
        elif not found:
            raise UsageError(
                f"{flag} {shown(value)} is said of the {_owners(name)} before it, and there is none; name one first"
            )
        elif (name in OF_IMAGES) != (found[-1].kind == "ip_adapter"):
            raise UsageError(f"{flag} is said of a {_owners(name)}, and stands behind {found[-1]}; move it")
        elif name in PICTURES:
            found[-1].hints.append(value)
        elif name == "ip_mask":
            found[-1].masks.append(value)
        elif name in found[-1].options:
            raise UsageError(f"{flag} was given twice for {found[-1]}; give it once")
        else:
            found[-1].options[name] = value
    if len(found) > ADAPTERS[1]:
        raise UsageError(f"at most {ADAPTERS[1]} adapters work together, got {len(found)}")
    for one in found:
        if one.kind == "t2i_adapter" and "control_mode" in one.options:
            raise UsageError(f"--control-mode is for ControlNets, and {one} is a T2I-Adapter; leave it out")
    return found


def _owners(name: str) -> str:
    """Say which flags an option is said of."""
    return "--ip-adapter" if name in OF_IMAGES else "--control or --t2i-adapter"


def check_controls(
    parts: Sequence[tuple[str, Any]], source: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> None:
    """Refuse files and hints that are not on this machine.

    Args:
        parts: what the flags say.
        source: the picture to begin with ("image") and its mask ("mask"), where there are any.
        options: of what is painted, among them those that lay the picture out.

    Raises:
        AbsentError: one is not there. UsageError: as gather; an address; no hint.
    """
    encoder = None
    if options and options.get("outpaint"):
        source = {"mask": None, **source}  # which it makes
    for one in gather(parts):
        is_image = one.kind == "ip_adapter"
        paths = [(FLAGS[one.kind], one.file)]
        paths += [(PICTURES["ip_image" if is_image else "hint"], path) for path in one.hints]
        paths += [("--ip-mask", path) for path in one.masks]
        if "image_encoder" in one.options:
            encoder = one.options["image_encoder"]
            paths.append(("--image-encoder", encoder))
        for flag, path in paths:
            refuse_elsewhere(flag, path)
            if not os.path.lexists(path):
                near = nearest_file(path)
                hint = f"did you mean {near!r}?" if near else "check the path; nothing is downloaded here"
                raise AbsentError(f"{flag} {shown(path)} is not there; {hint}")
        if is_image and not one.hints:
            raise UsageError(f"{one} has no picture; say which to paint after: --ip-image PICTURE")
        if is_image and encoder is None:
            raise UsageError(
                f"{one} has nothing to see with; name CLIP's vision model: --image-encoder PATH, its folder or file "
                "(IP-Adapter's models/image_encoder)"
            )
        if not one.hints and "image" not in source:
            raise UsageError(f"{one} has no hint; say what to paint along: --hint PICTURE")
        if "preprocess" in one.options:
            _preprocessor(one, source)


def _preprocessor(one: Said, source: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Give what makes a hint of a picture, as --preprocess KIND[:NUMBER...] says.

    Raises:
        UsageError: more numbers than the kind has, or words in their place; a hole without a mask.
    """
    from ldm.adapters.preprocessors import find, preprocess

    kind, *texts = one.options["preprocess"].split(":")
    kind = find(kind)
    names = NUMBERS.get(kind, ())
    if len(texts) > len(names):
        wanted = f"takes {' and '.join(names)} behind it" if names else "takes no numbers"
        raise UsageError(f"--preprocess {kind} {wanted}, got {shown(':'.join(texts))}")
    options: dict[str, Any] = {}
    for name, text in zip(names, texts, strict=False):
        try:
            options[name] = int(text) if name == "seed" else float(text)
        except ValueError:
            raise UsageError(f"--preprocess {kind}: {name} should be a number, got {shown(text)}") from None
    if kind == "inpaint":
        if "mask" not in source:
            raise UsageError(
                "--preprocess inpaint wants a mask: --mask of inpaint.py or edit.py, or --outpaint; in Python, mask="
            )
        options["mask"] = source["mask"]
    return lambda picture: preprocess(picture, kind, **options)


def as_painted(source: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out the picture to begin with, and its mask, as they are painted: at their size, on their canvas.

    Where a part of it is painted at a time, hints are of the whole: adapters cut out of them what they need.

    Args:
        source: the picture ("image") and its mask ("mask"), opened.
        options: of what is painted, by AROUND's names; one that is not there is at its default.

    Raises:
        UsageError: a mask that marks nothing, a canvas that is too large.
    """
    from ldm import images
    from ldm.checks.around import framed
    from ldm.modules.diffusionmodules.controlnet import HINT_FACTOR

    image, given = source["image"], {name: options.get(name) for name in AROUND}
    size = given.pop("width"), given.pop("height")
    larger, is_part = given.pop("upscale_by"), given.pop("inpaint_full_res")
    if larger is not None:
        size = tuple(int(side * larger) // HINT_FACTOR * HINT_FACTOR for side in image.size)
    elif is_part:
        size = image.size
    said = {name: value for name, value in given.items() if value is not None}
    whole = framed(image, source.get("mask"), said, size, HINT_FACTOR)
    found = {"image": whole.frame.original[0]}
    if whole.mask is not None:
        found["mask"] = images.to_pil(2 * whole.mask.expand(-1, 3, -1, -1) - 1)[0]
    return found


class Controls:
    """Makes the adapters of a run; files and hints are read once."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], Any] = {}
        self._made: dict[Any, list[ControlNet | T2IAdapter | IPAdapter]] = {}
        self._encoders: dict[str, Any] = {}

    def read(
        self,
        parts: Sequence[tuple[str, Any]],
        source: Mapping[str, Any],
        number: int,
        options: Mapping[str, Any] | None = None,
    ) -> list[ControlNet | T2IAdapter | IPAdapter]:
        """Make adapters.

        Args:
            parts: what the flags say.
            source: the pictures to begin with, opened; number: which they are.
            options: as check_controls.

        Raises:
            LdmError: a file that cannot be read, or is another kind; a hint that is no picture.
        """
        options = {name: options[name] for name in AROUND if name in options} if options else {}
        key = (tuple(parts), number, tuple(options.items()))
        if key not in self._made:
            made, encoder = [], None
            for one in gather(parts):
                if one.kind == "ip_adapter":
                    encoder = one.options.get("image_encoder", encoder)
                    made.append(self._see(one, encoder))
                else:
                    made.append(self._make(one, source, options))
            self._made[key] = made
        return self._made[key]

    def _see(self, one: Said, encoder: str) -> IPAdapter:
        """Make an IP-Adapter; vision models are read once, and let go with this object."""
        from ldm.adapters import IPAdapter
        from ldm.adapters.ip_adapter_file import IPAdapterFile
        from ldm.adapters.ip_adapter_images import load_encoder

        place = (one.kind, os.path.realpath(one.file))
        if place not in self._files:
            self._files[place] = IPAdapterFile(one.file)
        if encoder not in self._encoders:
            self._encoders[encoder] = load_encoder(encoder)
        told = {name: one.options[f"ip_{name}"] for name in OF_IP if f"ip_{name}" in one.options}
        told |= {"mask": one.masks or None, "image_encoder": self._encoders[encoder]}
        return IPAdapter(self._files[place], one.hints, **told)

    def _make(
        self, one: Said, source: Mapping[str, Any], laid_out: Mapping[str, Any]
    ) -> ControlNet | T2IAdapter:
        from ldm.adapters import ControlNet, T2IAdapter
        from ldm.adapters.controlnet import ControlNetFile
        from ldm.adapters.t2i_adapter import T2IAdapterFile

        is_control = one.kind == "control"
        place = (one.kind, os.path.realpath(one.file))
        if place not in self._files:
            self._files[place] = (ControlNetFile if is_control else T2IAdapterFile)(one.file)
        if "image" in source and (not one.hints or "preprocess" in one.options):
            source = as_painted(source, laid_out)
        hints: list[Any] = list(one.hints) or [source["image"]]
        if "preprocess" in one.options:
            hints = list(map(_preprocessor(one, source), hints))
        names = {
            "control_scale": "scale",
            "control_start": "start",
            "control_end": "end",
            "control_fit": "fit",
        }
        options = {ours: one.options[name] for name, ours in names.items() if name in one.options}
        if is_control:
            options |= MODES[one.options.get("control_mode", "balanced")]
        return (ControlNet if is_control else T2IAdapter)(self._files[place], hints, **options)
