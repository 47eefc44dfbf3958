"""The one place where weight files are opened: what a file is, is read from its first bytes, never from its name."""

import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.checkpoints.open_file import OpenFile
from ldm.checkpoints.pickles import PickleWeights, load_object
from ldm.checkpoints.report import TensorInfo
from ldm.checkpoints.safe import SafetensorsWeights, check_memory
from ldm.errors import FormatError, LdmError, MismatchError, UnsafeFileError, escaped

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
END_OF_ZIP = b"PK\x05\x06"
# First bytes of what people download by mistake -> what to call it. (offset, bytes, words)
FOREIGN = (
    (0, b"version https://git-lfs", "is a git-lfs pointer, not the weights; run `git lfs pull`"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (0, b"\x1f\x8b", "is a gzip archive; unpack it first"),
    (0, b"\xfd7zXZ\x00", "is an xz archive; unpack it first"),
    (0, b"BZh", "is a bzip2 archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "is a zstd archive; unpack it first"),
    (0, b"Rar!", "is a rar archive; unpack it first"),
    (257, b"ustar", "is a tar archive; unpack it first"),
    (0, b"GGUF", "is a GGUF file, which is not supported; get the .safetensors version"),
    (0, b"PK\x05\x06", "is an empty zip archive; download it again"),
)


class Weights(Protocol):
    """An open weight file: what it holds is known before any value is read."""

    path: str
    kind: str
    infos: Mapping[str, TensorInfo]
    metadata: dict[str, str]
    notes: list[str]

    def read(self, name: str, scratch: Tensor | None = None) -> Tensor:
        """Read one tensor into memory of its own, or into the scratch buffer given, until the next read into it."""

    def close(self) -> None: ...


def sniff(handle: OpenFile) -> str:
    """Tell "safetensors", "zip" or "pickle" from the first bytes, or say what the file is instead."""
    path = escaped(handle.path)
    if handle.size == 0:
        raise FormatError(f"'{path}' is empty; download it again")
    head = os.read(handle.file.fileno(), 512)
    # First, for a header's length can begin with any byte, those of other formats included.
    if head[6:9] == b"\0\0{":
        os.lseek(handle.file.fileno(), max(0, handle.size - 22), os.SEEK_SET)
        if os.read(handle.file.fileno(), 4) == END_OF_ZIP:
            raise UnsafeFileError(
                f"'{path}' is two formats at once, safetensors and zip; get it from its author anew"
            )
        return "safetensors"
    for offset, magic, words in FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            raise FormatError(f"'{path}' {words}")
    if head.lstrip()[:1] == b"<":
        raise FormatError(f"'{path}' is a web page, not weights: the download failed; get the file again")
    named_safetensors = handle.path.endswith(".safetensors")
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        if named_safetensors:
            raise FormatError(f"'{path}' is a pickle, not safetensors; its name hides what it is")
        return "zip" if head[:1] == b"P" else "pickle"
    if head[8:9] == b"{":
        return "safetensors"  # with a length that its reader will refuse
    wanted = (
        "a safetensors file" if named_safetensors else "weights (safetensors, or a checkpoint of torch.save)"
    )
    raise FormatError(
        f"'{path}' is not {wanted}: it begins with {escaped(head[:12])}, {handle.size} bytes in all"
    )


def open_weights(path: str | os.PathLike) -> Weights:
    """Open a weight file of either kind and list what it holds.

    What it holds is known from a header or a pickle, which only our own restricted reader runs; values are read
    tensor by tensor when `read` is called, and those of a zip checked against their checksums. Close it after use.

    Raises:
        AbsentError: there is no such file.
        FormatError: truncated, damaged, or not a weight file.
        UnsafeFileError: it holds more than tensors.
        MismatchError: it holds no weights, or tensors of a kind that is not supported.
    """
    handle = OpenFile(path)
    try:
        kind = sniff(handle)
        if kind == "safetensors":
            weights: Weights = SafetensorsWeights(handle)
            if handle.path.endswith(PICKLE_SUFFIXES):
                weights.notes.append(
                    f"a safetensors file under the name '{escaped(os.path.basename(handle.path))}'"
                )
            return weights
        return PickleWeights(handle, kind)
    except OSError as error:
        handle.file.close()
        if isinstance(error, LdmError):
            raise
        raise FormatError(f"'{escaped(handle.path)}' cannot be read: {escaped(error)}") from error
    except BaseException:
        handle.file.close()
        raise


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor of a weight file into memory of its own, with the file's metadata.

    Raises: as open_weights; ResourceError for more than this machine's memory.
    """
    weights = open_weights(path)
    try:
        check_memory(weights.path, sum(info.nbytes for info in weights.infos.values()))
        return {name: weights.read(name) for name in weights.infos}, weights.metadata
    finally:
        weights.close()


def read_object(path: str | os.PathLike) -> Any:
    """Read what torch.save wrote, nested as it was, through the restricted unpickler.

    For a program's own training states: dicts, lists, strings, numbers and tensors come back; objects of
    Lightning, NumPy and the like come back as inert placeholders.

    Raises: as open_weights; FormatError for a safetensors file.
    """
    with OpenFile(path) as handle:
        kind = sniff(handle)
        if kind == "safetensors":
            raise FormatError(
                f"'{escaped(handle.path)}' is safetensors; a state written by torch.save was wanted"
            )
        return load_object(handle, kind)


def require_float(path: str, name: str, dtype: torch.dtype) -> None:
    """Raise MismatchError unless a weight is stored as floating point."""
    if not dtype.is_floating_point:
        raise MismatchError(
            f"'{escaped(path)}': '{escaped(name)}' is stored as {str(dtype).removeprefix('torch.')}; "
            "only floating-point weights are supported"
        )
