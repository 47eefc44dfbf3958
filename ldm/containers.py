"""PNG, JPEG and WebP from outside: which bytes make the pixels, and what is said beside them.

A picture is sound if its pixels are. Texts, colour profiles, EXIF, previews and further frames lie in blocks of their
own, which no pixel needs; decoders stumble over damaged ones, and some cost far more than the picture (Pillow copies
all fields of an EXIF table, each as large as the whole). So a decoder is given the pixels only, and the few fields
that somebody reads are read here.
"""

from __future__ import annotations

import html
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from ldm.errors import AbsentError, FormatError, UsageError

MAX_BYTES = 256 * 2**20  # of a file
MAX_TEXT = (
    5 * 2**19
)  # bytes of a text that is worth reading: two prompts of 100,000 characters, each told twice
MAX_UNPACKED = 64 * 2**20  # bytes of all compressed texts and profiles of a PNG together
MAX_SCANS = 100  # of a JPEG: encoders write up to 20, and each is a walk over the whole picture
# Keys of PNG texts that somebody here reads.
PNG_KEYS = ("ldm", "parameters", "invokeai_metadata", "sd-metadata", "Dream", "prompt", "workflow", "Comment")
PNG_KEYS += ("Description", "XML:com.adobe.xmp", "Raw profile type exif")

WANTED = "wanted a sound PNG, JPEG or WebP file; convert or download it again"

# EXIF's fields (Exif 2.32, tables 3 to 8) and the bytes of the types that they are written in.
_ORIENTATION, _EXIF_TABLE, _USER_COMMENT = 0x0112, 0x8769, 0x9286
_DESCRIPTION, _MAKE, _MODEL = 0x010E, 0x010F, 0x0110
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 7: 1, 13: 4}
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
# JPEG's markers that begin a segment or end the picture: not stuffing, fill bytes, restarts or a start.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)
_CHARACTER_CODES = (b"ASCII\0\0\0", b"UNICODE\0", b"JIS\0\0\0\0\0", bytes(8))


@dataclass
class Container:
    """A picture file, taken apart.

    Attributes:
        pixels: the file without what no pixel needs.
        texts: what is said beside the pixels, by the keys of PNG's texts; from EXIF "UserComment", "prompt" and
            "workflow", from XMP "XMP comment".
        orientation: EXIF's, or else XMP's: 2 to 8 say how to turn the picture, all others that it is upright.
    """

    pixels: bytes
    texts: dict[str, str] = field(default_factory=dict)
    orientation: int = 1


def read_file(path: str | os.PathLike, *, others: bool = False) -> Container:
    """Read a PNG, JPEG or WebP file whole and take it apart, without decoding a pixel.

    Args:
        others: give files of other kinds back as they are, for a decoder to judge.

    Raises:
        AbsentError: no such file. UsageError: a URL. FormatError: everything else that is wrong with it.
    """
    name = os.fspath(path)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", name):
        raise UsageError(
            f"pictures are read from files and nothing is downloaded here, got the URL {name!r:.100}; download it first"
        )
    try:
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"picture '{name}' is not a regular file; give a PNG, JPEG or WebP file")
        if not 0 < status.st_size <= MAX_BYTES:
            raise FormatError(f"picture '{name}' has {status.st_size} bytes; wanted 1 to {MAX_BYTES}")
        data = Path(name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise AbsentError(f"picture '{name}' does not exist; check the path") from None
    except FormatError:
        raise
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read picture '{name}': {error}; check the path") from None
    try:
        parts = take_apart(data)
    except FormatError as error:
        raise FormatError(f"picture '{name}' is damaged or hostile ({error}); {WANTED}") from None
    if parts is None and others:
        return Container(data)
    if parts is None:
        raise FormatError(f"picture '{name}' is no picture that can be read; {WANTED}")
    return parts


def take_apart(data: bytes) -> Container | None:
    """Tell the pixels of a PNG, JPEG or WebP file from the rest; None if it is none of them.

    Damage in the rest is passed over; damage that pixels may share stays in, for the decoder to judge.

    Raises:
        FormatError: compressed texts that unpack to more than 64 MiB; a JPEG of more than 100 scans.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    return None


def _container(pixels: bytes, texts: dict[str, str], exif: bytes, xmp: bytes) -> Container:
    found, orientation = read_exif(exif)
    if comment := _xmp_comment(xmp):
        found["XMP comment"] = comment
    return Container(pixels, {**found, **texts}, read_xmp(xmp) if orientation is None else orientation)


# --- PNG ------------------------------------------------------------------------------------------


def _png(data: bytes) -> Container:
    """Keep the critical chunks, whose names begin with a capital letter, and the transparency."""
    view = memoryview(data)
    kept, texts, exif, room, at = [view[:8]], {}, b"", MAX_UNPACKED, 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data) or not kind.isalpha():
            break
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(view[at:end])
        elif kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        elif kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            key, text, unpacked = _png_text(kind, data[at + 8 : end - 4], room)
            room -= unpacked
            if key in PNG_KEYS:
                texts[key] = text
        at = len(data) if kind == b"IEND" else end  # what follows the end is no part of the picture
    kept.append(view[at:])
    # ImageMagick writes EXIF as a text: a head of three lines, then hexadecimal digits.
    digits = "".join(texts.pop("Raw profile type exif", "").split("\n")[3:])
    if not exif and len(digits) % 2 == 0 and set(digits) <= set("0123456789abcdefABCDEF"):
        exif = bytes.fromhex(digits)
    xmp = texts.pop("XML:com.adobe.xmp", "").encode()
    return _container(b"".join(kept), texts, exif, xmp)


def _png_text(kind: bytes, body: bytes, room: int) -> tuple[str, str, int]:
    """Read a chunk that may be compressed: its key, its text, and how much was unpacked.

    The text is "" where it is damaged or longer than MAX_TEXT.
    """
    key, _, rest = body.partition(b"\0")
    packed, encoding = kind != b"tEXt", "latin-1"
    if kind == b"iTXt":
        packed, encoding = rest[:1] != b"\0", "utf-8"
        rest = (
            rest[1:2] + rest[2:].split(b"\0", 2)[-1]
        )  # the method, then what follows language and translated key
    unpacked = 0
    if packed:
        rest, unpacked = _unpack(rest[1:], room)
    elif kind == b"iTXt":
        rest = rest[1:]
    try:
        text = rest.decode(encoding) if len(rest) <= MAX_TEXT else ""
    except UnicodeDecodeError:
        text = ""
    return key.decode("latin-1"), text, unpacked


def _unpack(packed: bytes, room: int) -> tuple[bytes, int]:
    """Unpack a zlib stream piece by piece; keep it up to MAX_TEXT, count it up to room.

    Raises:
        FormatError: there is more than room for.
    """
    unpacker, pieces, size = zlib.decompressobj(), [], 0
    while True:
        try:
            piece = unpacker.decompress(packed, 2**20)
        except zlib.error:
            return b"", size
        if not piece:
            return b"".join(pieces), size
        packed = unpacker.unconsumed_tail
        size += len(piece)
        if size > room:
            raise FormatError(f"its texts unpack to more than {MAX_UNPACKED // 2**20} MiB")
        pieces = pieces + [piece] if size <= MAX_TEXT else []


# --- JPEG -----------------------------------------------------------------------------------------


def _jpeg(data: bytes) -> Container:
    """Keep all but application segments, comments, and what follows the picture's end.

    Of application segments the decoder needs two, JFIF's and Adobe's, which say how colours are coded.
    """
    view = memoryview(data)
    kept, exif, xmp, scans, at = [view[:2]], [], b"", 0, 2
    while found := _MARKER.search(data, at):
        if scans:
            kept.append(
                view[at : found.start()]
            )  # before the first scan it is junk, which decoders step over
        at, marker = found.start(), data[found.start() + 1]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xD9 or end < at + 4 or end > len(data):
            break
        body = data[at + 4 : end]
        extra = 0xE0 <= marker <= 0xEF or marker == 0xFE
        jfif = marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
        adobe = marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
        if not extra or jfif or adobe:
            kept.append(view[at:end])
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif.append(body[6:])
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = body
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            raise FormatError(f"it has more than {MAX_SCANS} scans")
        at = end
    # Other programs' data may follow the end, a film for instance; a file that breaks off is left to the decoder.
    kept.append(view[at : at + 2] if found and data[at + 1] == 0xD9 else view[at:])
    return _container(b"".join(kept), {}, b"".join(exif), xmp)


# --- WebP -----------------------------------------------------------------------------------------


def _webp(data: bytes) -> Container:
    """Read EXIF and XMP; libwebp passes over what it does not need."""
    found, at = {}, 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind in (b"EXIF", b"XMP "):
            found[kind] = data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return _container(data, {}, found.get(b"EXIF", b""), found.get(b"XMP ", b""))


# --- EXIF and XMP ---------------------------------------------------------------------------------


def read_exif(exif: bytes) -> tuple[dict[str, str], int | None]:
    """Read the texts of an EXIF block that may tell how a picture was made, and its orientation if it has one.

    Texts: "UserComment", where A1111 writes, and "prompt" and "workflow", which ComfyUI puts into fields meant for
    cameras. What is cut or points beyond the end is passed over.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return {}, None
    texts = {}
    fields = _fields(exif, order, struct.unpack_from(f"{order}I", exif, 4)[0])
    for raw in (fields.get(tag, b"") for tag in (_DESCRIPTION, _MAKE, _MODEL)):
        for key in ("prompt", "workflow"):
            if raw.startswith(head := f"{key}:".encode()):
                texts[key] = raw[len(head) :].rstrip(b"\0").decode("utf-8", "replace")
    if len(fields.get(_EXIF_TABLE, b"")) == 4:
        fields |= _fields(exif, order, struct.unpack(f"{order}I", fields[_EXIF_TABLE])[0])
    if comment := _comment(fields.get(_USER_COMMENT, b"")):
        texts["UserComment"] = comment
    orientation = fields.get(_ORIENTATION, b"")
    big = "little" if order == "<" else "big"
    return texts, int.from_bytes(orientation, big) if len(orientation) in (1, 2, 4) else None


def read_xmp(xmp: bytes) -> int:
    """Read the orientation from an XMP block; 1 if it says none."""
    digit = xmp.partition(b"tiff:Orientation")[2].lstrip(b'=">')[:1]
    return int(digit) if digit.isdigit() else 1


def _xmp_comment(xmp: bytes) -> str:
    """Read the comment of an XMP block, as Draw Things writes it: an object in JSON."""
    entry = xmp.partition(b"exif:UserComment")[2].partition(b"<rdf:li")[2].partition(b">")[2]
    text = html.unescape(entry.partition(b"<")[0][:MAX_TEXT].decode("utf-8", "replace")).strip()
    return text if text.startswith("{") else ""


def write_comment(text: str) -> bytes:
    """Make an EXIF block that holds a comment in UTF-16, as A1111 writes it: two tables of one field each."""
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    head = b"Exif\0\0MM\0*" + struct.pack(">IHHHIII", 8, 1, _EXIF_TABLE, 4, 1, 26, 0)
    return head + struct.pack(">HHHIII", 1, _USER_COMMENT, 7, len(comment), 44, 0) + comment


def _fields(exif: bytes, order: str, at: int) -> dict[int, bytes]:
    """Read the wanted fields of one table; the first of each counts."""
    wanted = {_DESCRIPTION, _MAKE, _MODEL, _ORIENTATION, _EXIF_TABLE, _USER_COMMENT}
    fields: dict[int, bytes] = {}
    if at + 2 > len(exif):
        return fields
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", exif, entry)
        if tag not in wanted or tag in fields:
            continue
        size = _TYPE_BYTES.get(kind, 0) * number
        start = entry + 8 if size <= 4 else struct.unpack_from(f"{order}I", exif, entry + 8)[0]
        if 0 < size <= MAX_TEXT and start + size <= len(exif):
            fields[tag] = exif[start : start + size]
    return fields


def _comment(raw: bytes) -> str:
    """Decode a comment in which A1111's word stands, or an object; others say nothing, and cameras write junk there.

    The code in front says "UNICODE" for UTF-16 in either order, and programs disagree about which: the word decides.
    """
    body = raw[8:] if raw[:8] in _CHARACTER_CODES else raw
    for encoding in ("utf-8", "utf-16-be", "utf-16-le"):
        text = body.decode(encoding, "replace")
        if "Steps: " in text or text.lstrip("\ufeff ").startswith('{"'):
            return text.lstrip("\ufeff").rstrip("\0 ")
    return ""


# --- TIFF -----------------------------------------------------------------------------------------


def check_tiff(data: bytes) -> None:
    """Hold the tables of a TIFF file against its length: Pillow copies each field, and all may name the same bytes.

    Looks at the first picture's table, and at those for EXIF, GPS and interoperability that hang from it.

    Raises:
        FormatError: the fields together are longer than twice the file; a BigTIFF.
    """
    order = "<" if data[:2] == b"II" else ">"
    if len(data) < 8 or struct.unpack_from(f"{order}H", data, 2)[0] != 42:
        raise FormatError("a TIFF of no known kind")
    todo, seen, total = [struct.unpack_from(f"{order}I", data, 4)[0]], set(), 0
    while todo:
        at = todo.pop()
        if at in seen or at + 2 > len(data):
            continue
        seen.add(at)
        count = min(struct.unpack_from(f"{order}H", data, at)[0], (len(data) - at - 2) // 12)
        for i in range(count):
            tag, kind, number, value = struct.unpack_from(f"{order}HHII", data, at + 2 + 12 * i)
            total += number * _TIFF_BYTES.get(kind, 8)
            if tag in (_EXIF_TABLE, 0x8825, 0xA005):
                todo.append(value)
    if total > 2 * len(data) + 4096:
        raise FormatError(f"fields of {total} bytes in a file of {len(data)}")
