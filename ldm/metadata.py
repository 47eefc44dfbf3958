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

from ldm.comfyui import read_graph
from ldm.containers import MAX_TEXT, read_exif, read_file, write_comment
from ldm.errors import UsageError

log = logging.getLogger(__name__)

SCHEMA = 1
MAX_DEPTH = 8  # of lists in lists in our own chunk
MAX_WHOLE = 2**64 - 1  # of seeds, the largest whole numbers that anybody writes
MAX_SEGMENT = 65_533  # bytes of EXIF that a JPEG has room for
NEGATIVE = "Negative prompt:"
_QUOTED = re.compile(r'\s*("(?:\\.|[^\\"])+")(?=,|$)')
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"}

# A1111's keys in A1111's order, with our names; Size is put together from width and height.
KEYS = (
    ("Steps", "steps"),
    ("Sampler", "sampler"),
    ("Schedule type", "spacing"),
    ("CFG scale", "guidance_scale"),
    ("Seed", "seed"),
    ("Size", "size"),
    ("Model hash", "model_hash"),
    ("Model", "model"),
    ("Denoising strength", "strength"),
    ("Eta", "eta"),
    ("Init image hash", "init_image_hash"),
    ("Guidance interval", "guidance_interval"),
    ("Cache interval", "cache_interval"),
    ("Cache depth", "cache_depth"),
    ("Token merging ratio", "merge_ratio"),
    ("Token merging seed", "merge_seed"),
    ("Lora hashes", "lora_hashes"),
    ("TI hashes", "ti_hashes"),
    ("RNG", "rng"),
    ("Version", "version"),
)
HASHES = {"Lora hashes": "LoRA", "TI hashes": "Embedding"}  # that are written only: a hash names no file here
SAMPLER_WORDS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "ddpm": "DDPM",
    "dpm_solver": "DPM-Solver",
    "dpmpp_2m": "DPM++ 2M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "lms": "LMS",
    "dpmpp_2s_a": "DPM++ 2S a",
}
OWN_ETA = {"euler_a": 1, "dpm2_a": 1, "dpmpp_2s_a": 1}  # which is not said; of all others it is 0
SPACING_WORDS = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "normal": "Normal",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "beta_sigma": "Beta",
    "kl_optimal_open": "KL Optimal",
    "align_your_steps": "Align Your Steps",
    "turbo": "Turbo",
}
_WHOLE = {"steps", "seed", "width", "height", "cache_interval", "cache_depth", "merge_seed"}
_REAL = {"guidance_scale", "strength", "eta", "merge_ratio"}


def clean(text: str) -> str:
    """Drop control characters except newline and tab, and what cannot be encoded."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and ord(c) != 127))
    return kept.encode("utf-8", "ignore").decode()


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
    if values.get("eta") == OWN_ETA.get(values.get("sampler"), 0):
        values["eta"] = None
    values["sampler"] = SAMPLER_WORDS.get(values.get("sampler"), values.get("sampler"))
    if values.get("width") and values.get("height"):
        values["size"] = f"{values['width']}x{values['height']}"
    # A missing RNG is read as GPU. Ours is drawn on the CPU, one generator an image, exactly as A1111's
    # "CPU".
    values["rng"] = {"image": "CPU", "nv": "NV", "compvis": "CompVis"}.get(
        values.get("rng"), values.get("rng")
    )
    spacing = values.get("spacing")  # a list of sigmas is in our own chunk only
    values["spacing"] = SPACING_WORDS.get(spacing, spacing) if isinstance(spacing, str) else None
    # Options that are off are left out, so that other programs' readers meet no key that they do not know.
    low, high = values.get("guidance_interval") or (0, 1)
    values["guidance_interval"] = f"{low} to {high}" if (low, high) != (0, 1) else None
    if values.get("cache_interval", 1) == 1:
        values["cache_interval"] = values["cache_depth"] = None
    if not values.get("merge_ratio"):
        values["merge_ratio"] = values["merge_seed"] = None
    for key, kind in HASHES.items():
        ours = [one for one in values.get("adapters") or () if one.get("kind") == kind]
        values[dict(KEYS)[key]] = ", ".join(f"{one['name']}: {one['hash']}" for one in ours) or None
    if values.get("version"):
        values["version"] = f"ldm {values['version']}"
    options = ", ".join(f"{key}: {quote(values[name])}" for key, name in KEYS if values.get(name) is not None)
    lines = [clean(values.get("prompt", ""))]
    if values.get("negative_prompt"):
        lines.append(f"{NEGATIVE} {clean(values['negative_prompt'])}")
    return "\n".join([*lines, options]).strip()


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
    ours, extra = dict(KEYS), {}
    words = {word: name for name, word in SAMPLER_WORDS.items()}
    # "Automatic" is what the program takes for the sampler, which may not be what ours takes.
    spacings = {word: name for name, word in SPACING_WORDS.items()} | {"Uniform": "normal", "Automatic": None}
    for key, raw in pairs:
        value = unquote(raw.strip())
        if key == "Size" and (size := _SIZE.fullmatch(value)):
            found["width"], found["height"] = int(size[1]), int(size[2])
        elif key == "Schedule type":
            if (spacing := spacings.get(value, value)) is not None:
                found["spacing"] = spacing
        elif key in ours and key not in ("Size", *HASHES):
            found |= _typed(ours[key], words.get(value, value) if key == "Sampler" else value)
        else:
            extra[key] = value
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


def _typed(name: str, value: str) -> dict[str, Any]:
    """Make {name: value} of the right type, or {} if the text is no such value."""
    if name in _WHOLE:
        sound = re.fullmatch(r"[0-9]{1,20}", value) and int(value) <= MAX_WHOLE
        return {name: int(value)} if sound else {}
    if name in _REAL:
        numbers = _numbers(value)
        return {name: numbers[0]} if len(numbers) == 1 else {}
    if name == "guidance_interval":
        numbers = _numbers(*value.split(" to "))
        return {name: numbers} if len(numbers) == 2 else {}
    return {name: value}


def _numbers(*texts: str) -> list[float]:
    """Read finite numbers; [] if one of the texts is none."""
    try:
        numbers = [float(text[:40]) for text in texts]
    except ValueError:
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


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


def read_metadata(picture: str | os.PathLike | Image.Image) -> dict[str, Any]:
    """Read how a picture was made; {} if it does not say.

    Our own chunk is preferred, being lossless; then A1111's text, in a PNG's chunk or in EXIF's comment, then
    InvokeAI's and ComfyUI's JSON, of which the common fields are taken. What a text holds never raises and is never
    acted upon. The key `source` says which was read: "ldm", "a1111", "invokeai" or "comfyui".

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
        raise UsageError(f"read_metadata wants a path or a PIL picture, got {type(picture).__name__}")
    for source, key, reader in (
        ("ldm", "ldm", _from_ours),
        ("a1111", "parameters", from_infotext),
        ("a1111", "UserComment", from_infotext),
        ("invokeai", "invokeai_metadata", _from_invokeai),
        ("comfyui", "prompt", _from_comfyui),
    ):
        text = texts.get(key)
        if isinstance(text, str) and text and len(text) <= MAX_TEXT and (found := reader(text)):
            return {"source": source, **found}
    return {}


def _json(text: str) -> Any:
    """Parse JSON; None if it is not sound, or nested beyond reason.

    NaN, which Python and ComfyUI write, stands for every number that nobody can use: infinite, or longer than a seed.
    """

    def bounded(word: str) -> int | float:
        return int(word) if len(word) <= 21 else math.nan

    try:
        return json.loads(text, parse_int=bounded)
    except (ValueError, RecursionError):
        return None


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


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _from_ours(text: str) -> dict[str, Any]:
    chunk = _mapping(_json(text))
    found = _mapping(chunk.get("parameters")) if chunk.get("schema") == SCHEMA else {}
    return {name: value for name, value in found.items() if _finite(value)}


def _numbers_and_words(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Take the fields named {theirs: ours} whose values have the right type."""
    found = {}
    for theirs, ours in names.items():
        value = raw.get(theirs)
        if isinstance(value, str) and ours not in _WHOLE | _REAL:
            found[ours] = clean(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_WHOLE:
            if ours in _REAL:
                found[ours] = value
            elif ours in _WHOLE and value >= 0 and value == int(value):
                found[ours] = int(value)
    return found


def _from_invokeai(text: str) -> dict[str, Any]:
    names = {
        "positive_prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "steps": "steps",
        "scheduler": "sampler",
        "cfg_scale": "guidance_scale",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "strength": "strength",
    }
    return _numbers_and_words(_mapping(_json(text)), names)


def _from_comfyui(text: str) -> dict[str, Any]:
    found = read_graph(_mapping(_json(text)))
    return _numbers_and_words(found, {name: name for name in found})
