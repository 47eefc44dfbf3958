"""Files that pictures name: models, VAEs, LoRAs, embeddings, found in folders by a hash of theirs, or by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import AbsentError, LdmError, nearest, refuse_elsewhere, shown

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
LEAST_DIGITS = 8  # of a hash that names a file
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000  # what A1111's first hashes of models were of


@dataclass(frozen=True)
class Found:
    """A file that a picture names, or why there is none.

    Attributes:
        path: None where there is none.
        note: how it was found, where that is not by its name and hash; or why it was not.
        is_same: it is the one that is meant: by its hash, or by its name where no hash is said.
    """

    path: Path | None
    note: str = ""
    is_same: bool = False


class Library:
    """The files of some folders, and of those in them, which are hashed when they are asked for.

    Args:
        option: what the scripts call these folders, as "--loras".
        places: folders, or files.
        folders: whether a folder with model_index.json, as diffusers writes models, counts as a file.

    Raises:
        AbsentError: one is not there. UsageError: an address.
    """

    def __init__(self, option: str, places: Sequence[str | os.PathLike], *, folders: bool = False):
        self.option = option
        self.files: list[Path] = []
        for place in map(Path, places):
            refuse_elsewhere(option, place, hub=False)
            if not place.exists():
                raise AbsentError(f"{option} '{place}' is not there; give a folder, or a file")
            inside = sorted(place.rglob("*")) if place.is_dir() else [place]
            self.files += [one for one in inside if one.suffix.lower() in SUFFIXES and one.is_file()]
            if folders and place.is_dir():
                self.files += [one.parent for one in (place / "model_index.json", *inside) if _is_index(one)]
        self.files = list(dict.fromkeys(self.files))
        self._hashes: dict[Path, tuple[str, ...]] = {}

    def find(self, what: str, name: str | None, digits: str | None) -> Found:
        """Find a file by its hash, or by its name if no hash is said.

        Args:
            what: a word for it: "LoRA".
            name: without folder and ending; None where only a hash is said.
            digits: the first of a hash, 8 or more: of SHA-256, of that without a safetensors header (LoRAs), or the
                8 of A1111's first hashes; fewer say nothing.
        """
        named = [one for one in self.files if name is not None and _name(one).lower() == name.lower()]
        called = f"{what} {shown(name)}" if name is not None else what
        if digits is not None and len(digits) >= LEAST_DIGITS:
            others = [one for one in self.files if one not in named]
            for one in (*named, *others):
                if self.has_hash(one, digits):
                    note = "" if one in named else f"{called} is here as '{one.name}', by its hash"
                    return Found(one, note, True)
            if named:
                note = f"{called}: '{named[0].name}' has another hash than the picture's {digits[:12]}"
                return Found(named[0], note)
        elif named:
            return Found(named[0], f"{called} is found by its name alone", True)
        hashed = f" (hash {digits[:12]})" if digits else ""
        if not self.files:
            return Found(None, f"{called}{hashed} is not here; give {self.option}, the folder that it is in")
        near = nearest(name, {_name(one) for one in self.files}) if name is not None else None
        hint = f"the nearest name is {near!r}" if near else f"there are {len(self.files)} files"
        return Found(None, f"{called}{hashed} is not in {self.option}; {hint}")

    def has_hash(self, path: Path, digits: str) -> bool:
        """Tell whether a file's hash, of any of the kinds that pictures say, begins so."""
        if path not in self._hashes:
            try:
                self._hashes[path] = _hashes(path)
            except (LdmError, OSError):  # one that cannot be read is none that is meant
                self._hashes[path] = ()
        digits = digits.lower()
        *whole, legacy = self._hashes[path] or ("",)
        return any(one.startswith(digits) for one in whole) or (len(digits) == 8 and digits == legacy)


def _is_index(path: Path) -> bool:
    return path.name == "model_index.json" and path.is_file()


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _hashes(path: Path) -> tuple[str, ...]:
    """SHA-256 of a file, of it without a safetensors header, and A1111's first hash; () of a folder."""
    from ldm.adapters.file_hash import hashes_of, stamp_of

    if path.is_dir():
        return ()
    with open(path, "rb") as file:
        file.seek(_LEGACY_START)
        legacy = hashlib.sha256(file.read(_LEGACY_BYTES)).hexdigest()[:8]
    stamp = stamp_of(path)
    is_safetensors = path.suffix.lower() == ".safetensors" and stamp.size > 8
    return (*hashes_of(path, stamp, is_safetensors), legacy)
