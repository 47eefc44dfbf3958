"""Hashes of adapters' files, as web UIs and model pages write them."""

import hashlib
import os
import struct
from typing import NamedTuple

from ldm.checkpoints.open_file import OpenFile
from ldm.errors import FormatError, escaped

PIECE = 1 << 20


class Stamp(NamedTuple):
    """What tells that a file was written to: its size in bytes and the time in nanoseconds."""

    size: int
    time: int


def stamp_of(path: str | os.PathLike) -> Stamp:
    """Look at a file before it is read.

    Raises: as OpenFile.
    """
    with OpenFile(path) as handle:
        return Stamp(handle.size, handle.before.st_mtime_ns)


def hashes_of(path: str | os.PathLike, stamp: Stamp, is_safetensors: bool) -> tuple[str, str]:
    """SHA-256 of the whole file, and of what follows a safetensors file's header, both in hexadecimal.

    The second is what A1111 writes into a picture for a LoRA, and what model pages call AutoV3; of other kinds of files
    it is that of the whole. The first 10 digits of the first are AutoV2.

    Raises:
        FormatError: the file changed since its stamp was taken.
    """
    with OpenFile(path) as handle:
        if (handle.size, handle.before.st_mtime_ns) != stamp:
            raise FormatError(f"'{escaped(handle.path)}' changed since it was read; load it again")
        begin = 8 + struct.unpack("<Q", handle.file.read(8))[0] if is_safetensors else 0
        whole, body = hashlib.sha256(), hashlib.sha256()
        handle.file.seek(0)
        position = 0
        while piece := handle.file.read(PIECE):
            whole.update(piece)
            body.update(piece[max(0, begin - position) :])
            position += len(piece)
        handle.check_unchanged()
    return whole.hexdigest(), body.hexdigest()
