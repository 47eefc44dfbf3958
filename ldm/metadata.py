"""What a PNG says about how it was made: A1111's `parameters` text and our own lossless `ldm` chunk.

A1111's text is read by every tool of the field but cannot say everything (a prompt that holds a line
"Negative prompt:" is cut there); the `ldm` chunk is JSON and holds every parameter with its type.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ldm.images import open_image

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

SCHEMA = 1
MAX_TEXT = 64 * 1024  # characters of a chunk that are worth reading
NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d+)x(\d+)")

# A1111's keys in A1111's order, with our names; Size is put together from width and height.
KEYS = (
    ("Steps", "steps"),
    ("Sampler", "sampler"),
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
    ("RNG", "rng"),
    ("Version", "version"),
)
SAMPLER_WORDS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "ddpm": "DDPM",
    "dpm_solver": "DPM-Solver",
    "dpmpp_2m": "DPM++ 2M",
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
        return value if isinstance(value, str) else text
    return text


def to_infotext(parameters: Mapping[str, Any]) -> str:
    """Write parameters as A1111's text: prompt, negative prompt if there is one, one line of `Key: value`."""
    values = dict(parameters)
    values["sampler"] = SAMPLER_WORDS.get(values.get("sampler"), values.get("sampler"))
    if values.get("width") and values.get("height"):
        values["size"] = f"{values['width']}x{values['height']}"
    # A missing RNG is read as GPU. Ours is drawn on the CPU, one generator an image, exactly as A1111's
    # "CPU".
    values["rng"] = {"image": "CPU", "compvis": "CompVis"}.get(values.get("rng"), values.get("rng"))
    if not values.get("eta"):
        values["eta"] = None
    # Knobs that are off say nothing, so that other programs' readers are told of nothing they do not know.
    low, high = values.get("guidance_interval") or (0, 1)
    values["guidance_interval"] = f"{low} to {high}" if (low, high) != (0, 1) else None
    if values.get("cache_interval", 1) == 1:
        values["cache_interval"] = values["cache_depth"] = None
    if not values.get("merge_ratio"):
        values["merge_ratio"] = values["merge_seed"] = None
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
    pairs = _PAIR.findall(last)
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
    for key, raw in pairs:
        value = unquote(raw.strip())
        if key == "Size" and (size := _SIZE.fullmatch(value)):
            found["width"], found["height"] = int(size[1][:9]), int(size[2][:9])
        elif key in ours and key != "Size":
            found |= _typed(ours[key], words.get(value, value) if key == "Sampler" else value)
        else:
            extra[key] = value
    return found | ({"extra": extra} if extra else {})


def _typed(name: str, value: str) -> dict[str, Any]:
    """Make {name: value} of the right type, or {} if the text is no such value."""
    if name in _WHOLE:
        return {name: int(value)} if re.fullmatch(r"\d{1,20}", value) else {}
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
        numbers = [float(text) for text in texts]
    except ValueError:
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


def png_info(parameters: Mapping[str, Any]) -> PngInfo:
    """Make the text chunks of a PNG: `parameters` (A1111) and `ldm` (ours)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", to_infotext(parameters))
    # ASCII JSON, so that the chunk is plain Latin-1 text for every reader.
    info.add_text("ldm", json.dumps({"schema": SCHEMA, "parameters": dict(parameters)}, allow_nan=False))
    return info


def read_metadata(png: str | os.PathLike | Image.Image) -> dict[str, Any]:
    """Read how a picture was made; {} if it does not say.

    Our own chunk is preferred, being lossless; then A1111's text, then InvokeAI's and ComfyUI's JSON, of
    which the common fields are taken. What a chunk holds never raises and is never acted upon. The key
    `source` says which was read: "ldm", "a1111", "invokeai" or "comfyui".

    Raises:
        AbsentError, FormatError: the file is not there or is no picture.
    """
    texts = (open_image(png) if isinstance(png, str | os.PathLike) else png).info
    readers = {
        "ldm": ("ldm", _from_ours),
        "a1111": ("parameters", from_infotext),
        "invokeai": ("invokeai_metadata", _from_invokeai),
        "comfyui": ("prompt", _from_comfyui),
    }
    for source, (key, reader) in readers.items():
        text = texts.get(key)
        if isinstance(text, str) and text and len(text) <= MAX_TEXT and (found := reader(text)):
            return {"source": source, **found}
    return {}


def _json(text: str) -> Any:
    """Parse JSON strictly (no NaN); None if it is not sound, or nested beyond reason."""

    def refuse(word: str):
        raise ValueError(word)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _finite(value: Any) -> bool:
    """Tell whether a parsed value holds no infinity (JSON's 1e999)."""
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


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
        if ours in _WHOLE:
            sound = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        elif ours in _REAL:
            sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else:
            sound = isinstance(value, str)
        if sound:
            found[ours] = value
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
    """Follow the first KSampler's links to its two CLIPTextEncode nodes and its empty latent."""
    graph = _mapping(_json(text))
    nodes = {key: _mapping(node) for key, node in graph.items()}

    def inputs(link: Any) -> dict[str, Any]:
        key = link[0] if isinstance(link, list) and link and isinstance(link[0], str) else None
        return _mapping(nodes.get(key, {}).get("inputs"))

    sampler = next((n for n in nodes.values() if n.get("class_type") == "KSampler"), {})
    own = _mapping(sampler.get("inputs"))
    names = {
        "seed": "seed",
        "steps": "steps",
        "cfg": "guidance_scale",
        "sampler_name": "sampler",
        "denoise": "strength",
    }
    found = _numbers_and_words(own, names)
    found |= _numbers_and_words(inputs(own.get("positive")), {"text": "prompt"})
    found |= _numbers_and_words(inputs(own.get("negative")), {"text": "negative_prompt"})
    return found | _numbers_and_words(inputs(own.get("latent_image")), {"width": "width", "height": "height"})
