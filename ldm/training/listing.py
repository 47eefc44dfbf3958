"""What lies in a folder of pictures: the pictures, their captions and their classes, before any is opened."""

import codecs
import csv
import io
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config_text import first_line
from ldm.errors import FormatError, UnsafeFileError, shown

logger = logging.getLogger(__name__)

SUFFIXES = tuple(
    ".png .jpg .jpeg .jfif .jpe .webp .bmp .dib .gif .tif .tiff .avif .ppm .pgm .pbm .pnm .mpo".split()
)
BESIDE = (".txt", ".caption", ".json", ".jsonl", ".csv", ".md", ".yaml", ".yml")  # expected beside pictures
SYSTEM = ("__MACOSX", "Thumbs.db", "desktop.ini")  # what systems leave; so do names that begin with a dot
UNREADABLE = re.compile("[\0-\x1f\ud800-\udfff]")  # in a file's name
MAX_LINE, MAX_NAME = 1 << 20, 1024  # characters of a line of metadata, and of a name in it
MAX_CAPTION = 1 << 16  # bytes; no caption is as long, so a longer one is another file gone astray


@dataclass
class Listing:
    """The pictures of a folder with their captions.

    Attributes:
        samples: (picture, caption); the caption is "" where there is none.
        unread: pictures whose caption cannot be read, and why.
        uncaptioned: pictures without a caption.
        others: how many files of which other kinds (".psd") are left alone.
    """

    samples: list[tuple[Path, str]] = field(default_factory=list)
    unread: dict[Path, str] = field(default_factory=dict)
    uncaptioned: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def list_folder(folder: Path, caption: str | None) -> Listing:
    """List a folder's pictures, also those in subfolders, in the order of metadata.jsonl or .csv or of their names.

    Args:
        caption: of all pictures; None looks for their own.

    Raises:
        FormatError: metadata is not what it should be. UnsafeFileError: it names a picture outside.
    """
    found = [
        folder / f"metadata.{kind}" for kind in ("jsonl", "csv") if (folder / f"metadata.{kind}").is_file()
    ]
    if len(found) == 2:
        logger.warning("'%s' is read, and '%s' beside it is not", *found)
    listing = Listing()
    if found and caption is None:
        read = _json_lines if found[0].suffix == ".jsonl" else _csv_rows
        root = folder.resolve()
        listing.samples = [_listed(entry, folder, root, where) for entry, where in read(found[0])]
        return listing
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") or part in SYSTEM for part in parts) or not path.is_file():
            continue
        if path.suffix.lower() in SUFFIXES:
            _add(listing, path, caption)
        elif path.suffix.lower() not in BESIDE:
            listing.others[path.suffix.lower() or path.name] += 1
    return listing


def _add(listing: Listing, picture: Path, caption: str | None) -> None:
    beside = next((b for end in (".txt", ".caption") if (b := picture.with_suffix(end)).is_file()), None)
    if caption is None and beside is not None:
        try:
            if beside.stat().st_size > MAX_CAPTION:
                raise ValueError(f"{beside.stat().st_size} bytes are no caption")
            caption = decoded(beside.read_bytes()).strip()
        except (OSError, ValueError) as error:
            listing.unread[picture] = f"its caption '{beside.name}' cannot be read: {first_line(error)}"
            return
    elif caption is None:
        listing.uncaptioned.append(picture)
    listing.samples.append((picture, caption or ""))


def decoded(data: bytes) -> str:
    """Read UTF-8, or UTF-16 where a byte order mark says so, without the mark.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def _text_of(path: Path) -> str:
    try:
        return decoded(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"'{path}' cannot be read as text in UTF-8: {first_line(error)}") from error


def _json_lines(path: Path) -> list[tuple[Any, str]]:
    entries = []
    # Lines end at line feeds only: U+2028 and its like may stand inside of a JSON string.
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        where = f"'{path}' line {number}"
        if len(line) > MAX_LINE:
            raise FormatError(f"{where} has {len(line)} characters; at most {MAX_LINE} are read")
        if not line.strip():
            continue
        try:
            entries.append((json.loads(line), where))
        except (ValueError, RecursionError) as error:
            raise _no_entry(where, error) from error
    return entries


def _csv_rows(path: Path) -> list[tuple[Any, str]]:
    entries = []
    rows = csv.DictReader(io.StringIO(_text_of(path), newline=""), strict=True)
    try:
        if not {"text", "caption"} & set(rows.fieldnames or ()) or "file_name" not in (rows.fieldnames or ()):
            raise FormatError(
                f"'{path}' should begin with a line that names the columns file_name and text, got "
                f"{shown(','.join(rows.fieldnames or ()))}"
            )
        for row in rows:
            entries.append((row, f"'{path}' line {rows.line_num}"))
    except csv.Error as error:
        raise FormatError(f"'{path}' line {rows.line_num} is no row of a CSV file: {error}") from error
    return entries


def _no_entry(where: str, error: Exception) -> FormatError:
    return FormatError(
        f'{where} should be {{"file_name": ..., "text": ...}}: {type(error).__name__}: {first_line(error)}'
    )


def _listed(entry: Any, folder: Path, root: Path, where: str) -> tuple[Path, str]:
    """Take picture and caption from an entry of metadata."""
    try:
        name, text = entry["file_name"], entry.get("text", entry.get("caption"))
    except (KeyError, TypeError, AttributeError) as error:
        raise _no_entry(where, error) from error
    if not (isinstance(name, str) and isinstance(text, str)):
        wrong = name if not isinstance(name, str) else text
        raise FormatError(f"{where}: file_name and text should be strings, got {shown(wrong)}")
    if not name.strip() or UNREADABLE.search(name) or len(name) > MAX_NAME:
        raise FormatError(f"{where}: file_name should be the name of a picture, got {shown(name)}")
    if re.search("[\ud800-\udfff]", text):
        raise FormatError(f"{where}: a caption with half a character, {shown(text)}")
    if len(text.encode()) > MAX_CAPTION:
        raise FormatError(f"{where}: a text of {len(text)} characters is no caption; at most {MAX_CAPTION}")
    picture = folder / name
    try:
        home = picture.resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise FormatError(f"{where}: {shown(name)} leads nowhere: {first_line(error)}") from error
    if root not in home.parents:
        raise UnsafeFileError(f"{where}: {shown(name)} lies outside the folder; keep the pictures inside")
    return picture, text


def class_name(picture: Path, folder: Path, label: str) -> str:
    """Name a picture's class: its folder's name, or what stands before the first underscore of its own.

    Raises:
        FormatError: label is "folder", and the picture lies in no subfolder.
    """
    if label == "prefix":
        return picture.name.split("_")[0]
    if picture.parent == folder:
        raise FormatError(
            f"'{picture}' lies in no subfolder that could name its class; move it into one, or set label: prefix"
        )
    return picture.parent.name
