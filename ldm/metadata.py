"""What a picture says about how it was made: A1111's `parameters` text and our own lossless `ldm` chunk.

A1111's text is read by every tool of the field but cannot say everything (a prompt that holds a line
"Negative prompt:" is cut there); the `ldm` chunk is JSON and holds every parameter with its type.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import options
from ldm.comfyui import read_graph
from ldm.comfyui_workflow import to_graph
from ldm.containers import MAX_TEXT, read_exif, read_file, write_comment
from ldm.errors import UsageError, shown
from ldm.options import OWN_ETA, Fact, Option
from ldm.other_pictures import (
    MOST_ADAPTERS,
    bare,
    clean,
    from_draw_things,
    from_dream,
    from_invokeai,
    from_json,
    from_novelai,
    from_sd_metadata,
    lora,
    mapping,
    parse,
    sort_out,
)

log = logging.getLogger(__name__)

SCHEMA = 1
MAX_DEPTH = 8  # of lists in lists in our own chunk
MAX_SEGMENT = 65_533  # bytes of EXIF that a JPEG has room for
NEGATIVE = "Negative prompt:"
_QUOTED = re.compile(r'\s*("(?:\\.|[^\\"])+")(?=,|$)')
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"}

HASHES = {"Lora hashes": "LoRA", "TI hashes": "Embedding"}  # that are written only: a hash names no file here
# A1111's keys of its first units for ControlNets and T2I-Adapters, written only as well: place -> key.
UNITS = {f"ControlNet {i}": i for i in range(3)}
# With one of these A1111's "Denoising strength" is the second pass's.
_SECOND = ("hires_scale", "hires_size")
FITS = {"crop": "Crop and Resize", "pad": "Resize and Fill", "stretch": "Just Resize"}


def quote(value: Any) -> str:
    """Write a value as A1111 does: as JSON text if it holds a comma, a colon or a newline."""
    text = clean(str(value))
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def unquote(text: str) -> str:
    """Undo quote(); text that is not sound JSON is returned as it stands."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return clean(value) if isinstance(value, str) else text
    return text


def to_infotext(parameters: Mapping[str, Any]) -> str:
    """Write parameters as A1111's text: prompt, negative prompt if there is one, one line of `Key: value`."""
    values = dict(parameters)
    if values.get("strength") is None and any(_is_on(options.option(name), values) for name in _SECOND):
        values["strength"] = values.get("hires_strength")
    pairs = []
    for entry in options.TABLE:
        value = _fact(entry, values) if isinstance(entry, Fact) else _said(entry, values)
        if entry.infotext is not None and value is not None:
            pairs.append(f"{entry.infotext}: {quote(value)}")
    lines = [clean(values.get("prompt", ""))]
    if values.get("negative_prompt"):
        lines.append(f"{NEGATIVE} {clean(values['negative_prompt'])}")
    return "\n".join([*lines, ", ".join(pairs)]).strip()


def _said(option: Option, values: Mapping[str, Any]) -> str | None:
    """Write an option's value; None where it is off, so that other readers meet no key that they do not know."""
    value = values.get(option.name)
    if value is None or option.infotext is None:
        return None
    if option.name == "eta" and value == OWN_ETA.get(values.get("sampler"), 0):
        return None
    if option.beside:
        is_on = any(_is_on(options.option(name), values) for name in option.beside)
        return option.kind.write(value) if is_on else None
    return option.kind.write(value) if option.always or _is_on(option, values) else None


def _is_on(option: Option, values: Mapping[str, Any]) -> bool:
    value = values.get(option.name)
    return value is not None and option.kind.plain(value) != option.kind.plain(option.default)


def _fact(fact: Fact, values: Mapping[str, Any]) -> Any:
    """Give what a picture's text says beside its options; None where there is nothing to say."""
    if fact.name == "size":
        sides = values.get("width"), values.get("height")
        return f"{sides[0]}x{sides[1]}" if all(sides) else None
    if fact.infotext in HASHES:
        ours = [one for one in values.get("adapters") or () if one.get("kind") == HASHES[fact.infotext]]
        ours = [one for one in ours if "hash" in one]  # another program's picture may name none
        return ", ".join(f"{one['name']}: {one['hash']}" for one in ours) or None
    if fact.infotext in UNITS:
        units = [
            one for one in values.get("adapters") or () if one.get("kind") in ("ControlNet", "T2IAdapter")
        ]
        place = UNITS[fact.infotext]
        return _unit(units[place]) if place < len(units) else None
    value = values.get(fact.name)
    return f"ldm {value}" if fact.name == "version" and value else value


def _unit(one: Mapping[str, Any]) -> str:
    """Write a ControlNet or T2I-Adapter as A1111's extension does; how its hint was made is not known."""
    mode = "control" if one.get("guess") else "prompt" if one.get("weights") == "soft" else "balanced"
    pairs = {
        "Module": "none",
        "Model": one.get("name"),
        "Weight": one.get("scale"),
        "Resize Mode": FITS.get(one.get("fit", "crop")),
        "Guidance Start": one.get("start", 0.0),
        "Guidance End": one.get("end", 1.0),
        "Control Mode": options.CONTROL_MODES[mode],
    }
    return ", ".join(f"{key}: {value}" for key, value in pairs.items())


def from_infotext(text: str) -> dict[str, Any]:
    """Read A1111's text into our names; never raises, whatever the text holds.

    Known fields come back typed and only if they are sound; unknown ones come back as text under `extra`.
    """
    *lines, last = clean(text[:MAX_TEXT]).strip().split("\n")
    pairs = _pairs(last)
    if len(pairs) < 3:  # A1111's own rule: this is no line of options
        lines, pairs = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        if line.strip().startswith(NEGATIVE) and target is prompt:
            target, line = negative, line.strip()[len(NEGATIVE) :].lstrip()
        target.append(line)
    found: dict[str, Any] = {"prompt": "\n".join(prompt).strip()}
    if negative:
        found["negative_prompt"] = "\n".join(negative).strip()
    ours, extra = {entry.infotext: entry for entry in options.TABLE if entry.infotext}, {}
    for key, raw in pairs:
        value, entry = unquote(raw.strip()), ours.get(key)
        if key == "Size" and (size := _SIZE.fullmatch(value)):
            found["width"], found["height"] = int(size[1]), int(size[2])
        elif entry is None or key in ("Size", *HASHES, *UNITS):
            extra[key] = value
        elif isinstance(entry, Fact):
            found[entry.name] = (bare(value) if key in ("Model", "VAE") else None) or value
        elif (read := entry.kind.read(value)) is not None:
            found[entry.name] = read
        else:
            extra[key] = value
    if "strength" in found and any(name in found for name in _SECOND):
        found["hires_strength"] = found.pop("strength")
    return found | ({"extra": extra} if extra else {})


def _pairs(line: str) -> list[tuple[str, str]]:
    """Split a line of options into (key, raw value), as A1111's pattern does, but in one walk along the line.

    A key is two characters or more of letters, digits, blanks, "-" and "/" before a colon, beginning with a letter or
    a digit; a value reaches to the next comma, or is a quoted text.
    """
    pairs, at = [], 0
    while (colon := line.find(":", at)) >= 0:
        start = colon
        while start > at and (line[start - 1].isalnum() or line[start - 1] in "_ -/"):
            start -= 1
        key = line[start:colon].lstrip(" -/")
        at = colon + 1
        if len(key) < 2:
            continue
        quoted = _QUOTED.match(line, at)
        comma = line.find(",", at)
        end = quoted.end() if quoted else comma if comma >= 0 else len(line)
        pairs.append((key, quoted[1] if quoted else line[at:end]))
        at = end + 1
    return pairs


def png_info(parameters: Mapping[str, Any]) -> PngInfo:
    """Make the text chunks of a PNG: `parameters` (A1111) and `ldm` (ours)."""
    info = PngInfo()
    info.add_text("parameters", to_infotext(parameters))
    info.add_text("ldm", to_chunk(parameters))
    return info


def to_chunk(parameters: Mapping[str, Any]) -> str:
    """Write parameters as our own text, JSON. Lone surrogates (of a file's odd name) are escaped and so come back."""
    text = json.dumps({"schema": SCHEMA, "parameters": dict(parameters)}, allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


class Painted(Image.Image):
    """A picture that says how it was made, wherever it is saved by PIL's own `save`.

    A PNG gets both texts, a JPEG or WebP A1111's. A copy says the same; what PIL makes of it otherwise (a crop, another
    size) is another picture and says nothing.

    Attributes:
        get_parameters: gives them when they are needed, and no earlier: the hash of a model file takes seconds.
    """

    get_parameters: Callable[[], Mapping[str, Any]]

    @classmethod
    def of(cls, image: Image.Image, get_parameters: Callable[[], Mapping[str, Any]]) -> Painted:
        """Take over a picture's pixels."""
        painted = cls()
        painted.__dict__ |= image.__dict__
        painted.get_parameters = get_parameters
        return painted

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Save as PIL does; `pnginfo` or `exif` that is given, be it None or empty, replaces the metadata."""
        name = fp if isinstance(fp, str | bytes | os.PathLike) else getattr(fp, "name", "")
        name = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else ""
        kind = (format or _FORMATS.get(PurePath(name).suffix.lower(), "")).upper()
        if kind == "PNG" and "pnginfo" not in params:
            params["pnginfo"] = png_info(self.get_parameters())
        elif kind in ("JPEG", "WEBP") and "exif" not in params:
            exif = write_comment(to_infotext(self.get_parameters()))
            if kind == "JPEG" and len(exif) > MAX_SEGMENT:
                log.warning(
                    "a JPEG holds texts up to 32,000 characters; this one is saved without its metadata"
                )
            else:
                params["exif"] = exif
        super().save(fp, format, **params)

    def copy(self) -> Painted:
        """Copy the picture with what it says."""
        return Painted.of(super().copy(), self.get_parameters)

    __copy__ = copy

    def __eq__(self, other: object) -> bool:
        """Compare as PIL does, which wants both of one class."""
        plain = (_plain(one) if isinstance(one, Painted) else one for one in (self, other))
        return next(plain) == next(plain)

    __hash__ = None

    def __getstate__(self) -> list[Any]:
        return [*super().__getstate__(), self.get_parameters]

    def __setstate__(self, state: list[Any]) -> None:
        *state, self.get_parameters = state
        super().__setstate__(state)


def _plain(painted: Painted) -> Image.Image:
    image = Image.Image()
    image.__dict__ |= painted.__dict__
    del image.get_parameters
    return image


def read_parameters(picture: str | os.PathLike | Image.Image) -> dict[str, Any]:
    """Read how a picture was made, by the names of our options; {} if it does not say.

    Our own chunk is preferred, being lossless; then A1111's text, in a PNG's chunk or in EXIF's comment (Forge, SD.Next
    and stable-diffusion.cpp write the same), InvokeAI's JSON of any version, ComfyUI's graph and workflow, NovelAI's
    and Draw Things' comments, and flat JSON by diffusers' or SwarmUI's names. What a text holds never raises and is
    never acted upon.

    Returns:
        the options that are said, with `model`, `model_hash`, `vae`, `mode` and `adapters` where they are; `source`,
        which was read: "ldm", "a1111", "invokeai", "comfyui", "novelai", "draw things", "diffusers" or "swarmui";
        `extra`, what no option of ours takes, as text; `unread`, a line for each text that could not be read.

    Args:
        picture: a PNG, JPEG or WebP file, whose pixels are not looked at, or a PIL picture.

    Raises:
        AbsentError, FormatError: the file is not there or is no picture. UsageError: neither a path nor a picture.
    """
    if isinstance(picture, Painted):
        texts = {"ldm": to_chunk(picture.get_parameters())}
    elif isinstance(picture, Image.Image):
        exif = picture.info.get("exif")
        texts = {**(read_exif(exif)[0] if isinstance(exif, bytes) else {}), **picture.info}
    elif isinstance(picture, str | os.PathLike):
        texts = read_file(picture).texts
    else:
        raise UsageError(f"read_parameters wants a path or a PIL picture, got {type(picture).__name__}")
    found, unread = {}, []
    for key, (source, reader) in READERS.items():
        text = texts.get(key)
        if not isinstance(text, str) or not text:
            continue
        if len(text) <= MAX_TEXT and (found := reader(text)):
            found = {"source": source, **found}
            break
        if key in OURS_TO_READ:
            unread.append(f"its text {key!r} cannot be read, it says {shown(clean(text[:200]), 60)}")
    if found.get("source") == "novelai" and isinstance(texts.get("Description"), str):
        found.setdefault("prompt", clean(texts["Description"][:MAX_TEXT]))
    return found | ({"unread": unread} if unread else {})


read_metadata = read_parameters  # as it was called


def _finite(value: Any) -> bool:
    """Tell whether a parsed value holds no NaN and no infinity, and no more lists in lists than we write."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if not all(math.isfinite(one) for one in level if isinstance(one, float)):
            return False
        holders = (
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        )
        level = [inner for holder in holders for inner in holder]
        if not level:
            return True
    return False


def _from_parameters(text: str) -> dict[str, Any]:
    """Read the text that most programs call parameters: A1111's lines, or an object."""
    return (from_json(text) if text.lstrip().startswith("{") else {}) or from_infotext(text)


def _from_ours(text: str) -> dict[str, Any]:
    chunk = mapping(parse(text))
    found = mapping(chunk.get("parameters")) if chunk.get("schema") == SCHEMA else {}
    sound = {name: value for name, value in found.items() if _finite(value) and _is_of_chunk(name, value)}
    others = {clean(name)[:100]: shown(found[name], 200) for name in found if name not in sound}
    extra = sound.get("extra", {}) | others
    return sound | ({"extra": extra} if sound and extra else {})


def _is_of_chunk(name: str, value: Any) -> bool:
    """Tell whether a chunk may say this: what the reader says of itself not, lists and objects in their form only."""
    if name == "adapters":
        return isinstance(value, list) and all(isinstance(one, dict) for one in value)
    return isinstance(value, dict) if name == "extra" else name not in ("source", "unread")


def _from_comfyui(text: str) -> dict[str, Any]:
    return _of_graph(mapping(parse(text)))


def _from_workflow(text: str) -> dict[str, Any]:
    return _of_graph(to_graph(mapping(parse(text))))


def _of_graph(graph: Mapping[str, Any]) -> dict[str, Any]:
    """Bring what ComfyUI's graph says into the form of the other readers."""
    found = read_graph(graph)
    loras = [lora(*one) for one in found.pop("loras", ())][:MOST_ADAPTERS]
    nodes = found.pop("nodes", [])
    files = {name: found.pop(name, None) for name in ("model", "vae")}
    names = {one.name: one.name for one in options.options()} | {"mode": "mode"}
    result = sort_out(found, names) | {name: file for name in files if (file := bare(files[name]))}
    if any(loras):
        result["adapters"] = [one for one in loras if one is not None]
    if nodes and len(result) > 0:
        result.setdefault("extra", {})["nodes"] = clean(", ".join(nodes))
    return result


# What a picture's texts are called -> who wrote them, and how they are read; the first that says something counts.
READERS: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "ldm": ("ldm", _from_ours),
    "parameters": ("a1111", _from_parameters),
    "UserComment": ("a1111", _from_parameters),
    "invokeai_metadata": ("invokeai", from_invokeai),
    "sd-metadata": ("invokeai", from_sd_metadata),
    "Dream": ("invokeai", from_dream),
    "prompt": ("comfyui", _from_comfyui),
    "workflow": ("comfyui", _from_workflow),
    "Comment": ("novelai", from_novelai),
    "XMP comment": ("draw things", from_draw_things),
}
# Of texts that nobody else writes under these names it is said if they cannot be read.
OURS_TO_READ = ("ldm", "invokeai_metadata", "sd-metadata", "prompt", "workflow")
