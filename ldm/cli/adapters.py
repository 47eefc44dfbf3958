"""The adapters of a run of a painting script: how --lora and --embedding name them, and each file read once."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli.running import printable, say
from ldm.errors import AbsentError, FormatError, UsageError, escaped, nearest_file, refuse_elsewhere, shown

if TYPE_CHECKING:
    from torch import nn

    from ldm.adapters import Embedding, LoRA
    from ldm.adapters.lora import LoraFile

SUFFIXES = (".safetensors", ".pt", ".bin")  # that people leave out
MAX_PATH = 4096  # characters
MAX_COLONS = 4  # that a file's name is looked for between, from the end


@dataclass(frozen=True)
class LoraFlag:
    """What --lora says."""

    file: str
    weight: float = 1.0
    text_weight: float | None = None


@dataclass(frozen=True)
class EmbeddingFlag:
    """What --embedding says; the file may be a folder."""

    file: str
    token: str | None = None


def lora_flag(text: str) -> LoraFlag:
    """Read FILE[:weight[:text weight]] as an argparse type.

    Numbers are read from the end, and what is there under a longer name is that file: a path may have colons.
    """
    path, rest = _split(text)
    if path is None:
        path, rest = text, []
        while len(rest) < 2 and (found := path.rpartition(":"))[0] and _number(found[2]) is not None:
            path, rest = found[0], [found[2], *rest]
    numbers = [_number(one) for one in rest]
    if not path or len(rest) > 2 or None in numbers:
        raise argparse.ArgumentTypeError(
            f"wanted FILE, FILE:weight or FILE:weight:text weight with finite numbers, got {shown(text)}"
        )
    return LoraFlag(path, *numbers)


def embedding_flag(text: str) -> EmbeddingFlag:
    """Read FILE[:token] as an argparse type; a path may have colons, as may a token behind a file that is there."""
    path, rest = _split(text)
    if path is None:
        path, _, token = text.rpartition(":")
        is_drive = len(path) == 1 and path.isalpha() and token.startswith(("/", "\\"))
        if not path or is_drive:
            path, token = text, None
    else:
        token = ":".join(rest) if rest else None
    if not path or token == "":
        raise argparse.ArgumentTypeError(f"wanted FILE or FILE:token, got {shown(text)}")
    return EmbeddingFlag(path, token)


def _split(text: str) -> tuple[str | None, list[str]]:
    """Part the longest beginning of a text that is on this machine from the rest; (None, []) if none is."""
    if len(text) > MAX_PATH:
        raise argparse.ArgumentTypeError(f"wanted a path of at most {MAX_PATH} characters, got {len(text)}")
    path, rest = text, []
    for _ in range(MAX_COLONS + 1):
        if path and os.path.lexists(path):
            return path, rest
        path, colon, part = path.rpartition(":")
        if not colon:
            break
        rest = [part, *rest]
    return None, []


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def check_there(flags: Iterable[LoraFlag | EmbeddingFlag]) -> None:
    """Refuse files that are not on this machine.

    Raises:
        AbsentError: one is not there. FormatError: a folder for a LoRA.
        UsageError: an address, or a token for a folder.
    """
    for flag in dict.fromkeys(flags):
        option = "--lora" if isinstance(flag, LoraFlag) else "--embedding"
        refuse_elsewhere(option, flag.file)
        if not os.path.lexists(flag.file):
            suffixed = next((flag.file + end for end in SUFFIXES if os.path.lexists(flag.file + end)), None)
            near = suffixed or nearest_file(flag.file)
            hint = f"did you mean {near!r}?" if near else "check the path; nothing is downloaded here"
            raise AbsentError(f"{option} {shown(flag.file)} is not there; {hint}")
        if isinstance(flag, LoraFlag) and os.path.isdir(flag.file):
            inside: list[str] = []
            with contextlib.suppress(OSError):  # a folder that may not be listed
                inside = sorted(name for name in os.listdir(flag.file) if name.endswith(SUFFIXES))
            raise FormatError(
                f"--lora {shown(flag.file)} is a folder; name a file in it"
                + (f", {inside[0]!r}" if inside else "")
            )
        if isinstance(flag, EmbeddingFlag) and flag.token is not None and os.path.isdir(flag.file):
            raise UsageError(
                f"--embedding {shown(flag.file)} is a folder, whose files have names of their own; leave "
                f"{shown(flag.token)} out, or give one file"
            )


def read_loras(flags: Sequence[LoraFlag], files: dict[str, LoraFile]) -> list[LoRA]:
    """Make LoRAs; files are those that were read before, by their paths, and those that are read now join them."""
    from ldm.adapters import LoRA
    from ldm.adapters.lora import LoraFile

    found = []
    for flag in flags:
        path = os.path.realpath(flag.file)
        if path not in files:
            files[path] = LoraFile(flag.file)
        found.append(LoRA(files[path], flag.weight, flag.text_weight))
    return found


class Embeddings:
    """The embeddings of a run, for a model's text encoder.

    Args:
        model: a LatentDiffusion.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._read: dict[EmbeddingFlag, list[Embedding]] = {}
        self._named: set[Embedding] = set()

    def named(self, flags: Sequence[EmbeddingFlag], prompts: Sequence[str]) -> list[Embedding]:
        """List those of the embeddings that prompts name.

        Raises:
            LdmError: one cannot be read, or does not fit the text encoder; two go by the same name.
        """
        from ldm.adapters.use import PromptWords

        alone = [one for flag in flags if not os.path.isdir(flag.file) for one in self._of(flag)]
        paths = {os.path.realpath(one.file) for one in alone}
        others = [one for flag in flags if os.path.isdir(flag.file) for one in self._of(flag)]
        others = [one for one in others if os.path.realpath(one.file) not in paths]
        embeddings = list(dict.fromkeys(alone + others))
        words = PromptWords.of(self._model, embeddings)
        if words is None:
            return []
        unnamed = set(words.unnamed(self._model.cond_stage_model, prompts))
        found = [one for one in embeddings if one not in unnamed]
        self._named.update(found)
        return found

    def pop_unnamed(self, flags: Sequence[EmbeddingFlag]) -> list[Embedding]:
        """List, once, the files given one by one that no prompt has named; of a folder nobody needs all."""
        own = [one for flag in flags if not os.path.isdir(flag.file) for one in self._of(flag)]
        found = [one for one in dict.fromkeys(own) if one not in self._named]
        self._named.update(found)
        return found

    def _of(self, flag: EmbeddingFlag) -> list[Embedding]:
        if flag not in self._read:
            from ldm.adapters import Embedding
            from ldm.adapters.use import token_width

            width = token_width(self._model)
            if os.path.isdir(flag.file):
                self._read[flag] = _of_folder(flag.file, width)
            else:
                self._read[flag] = [Embedding(flag.file, flag.token, width)]
        return self._read[flag]


def _of_folder(folder: str, width: int) -> list[Embedding]:
    from ldm.adapters.embedding import read_folder

    names, refused = read_folder(folder, width)
    found = [one for name, one in names.items() if name == one.token]
    tokens = {one.file: one.token for one in found}
    for (
        path,
        why,
    ) in refused.items():  # of diffusers' folders, all files have one name, and tokens of their own
        what = f"{path} goes by {shown(tokens[path])} alone" if path in tokens else "left out"
        say(printable(f"--embedding {folder}: {what}: {why}"))
    if not found:
        raise AbsentError(
            f"--embedding {shown(folder)} holds no embedding for this model; give a folder of .pt, .bin or .safetensors"
        )
    return found


# --- --like ---------------------------------------------------------------------------------------

HOW = ("weight", "text_weight", "start", "end", "blocks")  # what a picture says of a LoRA's strength
# And of what follows a hint, with the flags that say so.
CONTROLLED = {"ControlNet": "--control", "T2IAdapter": "--t2i-adapter", "IPAdapter": "--ip-adapter"}
HOW_CONTROLLED = ("scale", "start", "end", "guess", "weights", "fit", "pooled", "only_mid_control", "hint")
HOW_CONTROLLED += ("image", "negative_image", "mask", "combine", "lora_scale", "shortcut")  # of an IP-Adapter


def told_adapters(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the adapters that a picture's metadata name, from our own text or A1111's; anything may stand there."""
    own = parameters.get("adapters")
    found = [one for one in own if isinstance(one, dict)] if isinstance(own, list) else []
    extra = parameters.get("extra")
    for key, kind in (("Lora hashes", "LoRA"), ("TI hashes", "Embedding")):
        text = extra.get(key) if isinstance(extra, dict) else None
        for entry in text.split(", ") if isinstance(text, str) else ():
            name, _, digits = entry.rpartition(": ")
            if name:
                found.append({"kind": kind, "name": name, "hash": digits})
    return found


# What a picture says of adapters that need no file.
FILELESS = {
    "FreeU": ("b1", "b2", "s1", "s2", "start", "end"),
    "PAG": ("scale", "layers", "adaptive_scale", "start", "end"),
    "SAG": ("scale", "blur_sigma", "start", "end"),
    "SeamlessTiling": ("x", "y"),
    "AttentionSlicing": ("size",),
}


def lacking(told: Sequence[Mapping[str, Any]], given: Iterable[Any]) -> str | None:
    """Say which adapters of a picture are not given, or at another strength; None if all are."""
    from ldm.adapters.use import described

    here = described(given)
    parts = []
    for one in told:
        name, kind, digits = (escaped(one.get(key, "?"), 40) for key in ("name", "kind", "hash"))
        if kind in FILELESS:
            how = ", ".join(f"{key} {shown(one[key], 40)}" for key in FILELESS[kind] if key in one)
            if one not in here:
                parts.append(f"{kind} ({how}), which no option gives in this way")
            continue
        same = [other for other in here if one.get("kind") == other["kind"] and _is_hash_of(one, other)]
        if kind in CONTROLLED:
            differing = [_differing(one, other) for other in same]
            if [] not in differing:
                now = (
                    f"which is given with another {', '.join(differing[0])}" if same else "which is not given"
                )
                parts.append(f"{kind} '{name}' (hash {digits}), {now} ({_controlled(one)})")
            continue
        if any("weight" not in one or all(one.get(key) == other.get(key) for key in HOW) for other in same):
            continue
        option = {"LoRA": "--lora FILE", "Embedding": "--embedding FILE"}.get(kind, "")
        more = "".join(f", {key} {shown(one[key], 40)}" for key in HOW[2:] if key in one)
        now = "which is not given"
        if option and "weight" in one:
            option += f":{_strength(one)}"
        if same and not more:
            now = f"which is given at {_strength(same[0])}"
        elif same:
            now, option = "which no option gives in this way", ""
        at = f" at {_strength(one)}" if "weight" in one else ""
        parts.append(f"{kind} '{name}'{at}{more} (hash {digits}), {now}" + (f" ({option})" if option else ""))
    return f"was painted with {'; '.join(parts)}" if parts else None


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name in what a ControlNet or T2I-Adapter that a picture says differs from one that is given."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return [key for key in HOW_CONTROLLED if plain(one.get(key)) != plain(other.get(key))]


def _controlled(one: Mapping[str, Any]) -> str:
    """Write the flags that give a ControlNet and its like as a picture says."""
    if one["kind"] == "IPAdapter":
        scale = one.get("scale", 1)
        others = {*HOW_CONTROLLED} - {"scale", "image", "start", "end", "mask"}
        if not isinstance(scale, int | float) or others & one.keys():
            return "no option gives it in this way"
        flags = [f"--ip-adapter FILE --ip-image PICTURE --ip-scale {escaped(scale, 20)}"]
        flags += [f"--ip-{key} {escaped(one[key], 20)}" for key in ("start", "end") if key in one]
        masks = one.get("mask")
        flags += [
            f"--ip-mask PICTURE with hash {escaped(mask, 20)}"
            for mask in (masks if isinstance(masks, list) else [])
        ]
        return " ".join([*flags, "--image-encoder PATH"])
    flags = [f"{CONTROLLED[one['kind']]} FILE --hint PICTURE with hash {escaped(one.get('hint', '?'), 20)}"]
    flags += [
        f"--control-{key} {escaped(one[key], 20)}" for key in ("scale", "start", "end", "fit") if key in one
    ]
    modes = {"guess": "control", "weights": "prompt", "only_mid_control": "middle"}
    flags += [f"--control-mode {mode}" for key, mode in modes.items() if one.get(key) in (True, "soft")]
    return " ".join(flags)


def _is_hash_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    digits = one.get("hash")
    is_hash = isinstance(digits, str) and len(digits) >= 8
    return is_hash and isinstance(other.get("hash"), str) and other["hash"].startswith(digits[:12])


def _strength(one: Mapping[str, Any]) -> str:
    text = one.get("text_weight")
    return ":".join(escaped(value, 20) for value in (one.get("weight", 1), text) if value is not None)
