"""Safetensors files: a header checked strictly, then values copied out of the one open file."""

import json
import os
import re
import struct
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.open_file import OpenFile
from ldm.checkpoints.report import TensorInfo
from ldm.errors import FormatError, LdmError, MismatchError, ResourceError, UnsafeFileError, escaped

MAX_HEADER = 100_000_000  # bytes, as the safetensors library; 1131 tensors need 0.2 MB
# A header is metadata for the rest. Texts cost as much memory as bytes, but lists, numbers and short texts far more.
MAX_STRUCTURE = 4 << 20  # bytes beside texts and spaces; 20,000 tensors of 8 dimensions need 3 MB
MAX_PIECES = 1_000_000  # texts, and what lies between them
PIECE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[ \t\r\n]++|([^" \t\r\n]{1,65536}+)', re.DOTALL)
MAX_TENSORS = 20_000
MAX_RANK = 8
NAME = re.compile(r"[A-Za-z0-9_.<>*\- ]{1,256}")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


def check_name(path: str, name: str) -> None:
    """Raise FormatError for a tensor name that could be a path, an escape sequence or a megabyte."""
    if not NAME.fullmatch(name):
        raise FormatError(f"'{escaped(path)}': illegal tensor name '{escaped(name, 60)}'")


def check_memory(path: str, nbytes: int) -> None:
    """Raise ResourceError for tensors of more bytes than this machine has memory, before any is read."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and nbytes > (
        have := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    ):
        raise ResourceError(
            f"'{escaped(path)}' holds tensors of {nbytes / 2**30:.1f} GiB; this machine's memory is "
            f"{have / 2**30:.1f} GiB"
        )


class SafetensorsWeights:
    """An open safetensors file: values are copied with read()."""

    kind = "safetensors"

    def __init__(self, handle: OpenFile):
        self.path = handle.path
        self.notes: list[str] = []
        self._handle = handle
        self._objects = 0  # of JSON in the header
        self._spans: dict[str, tuple[int, int]] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._read_header()

    def _fail(self, why: str) -> FormatError:
        return FormatError(f"'{escaped(self.path)}' is malformed: {why}; download it again")

    def _read_header(self) -> None:
        number, size = self._handle.file.fileno(), self._handle.size
        os.lseek(number, 0, os.SEEK_SET)
        (length,) = struct.unpack("<Q", self._bytes(8))
        if length > MAX_HEADER:
            raise self._fail(f"a header of {length} bytes is impossible (at most {MAX_HEADER})")
        if 8 + length > size:
            raise FormatError(
                f"'{escaped(self.path)}' is incomplete: {size} of at least {8 + length} bytes; download it again"
            )
        text = self._bytes(length)
        if not text.startswith(b"{"):
            raise self._fail("the header does not begin with '{'")
        if length > MAX_STRUCTURE and not _is_text(text):
            raise UnsafeFileError(
                f"'{escaped(self.path)}' has a header of {length} bytes that is not text for the most part; refused"
            )
        try:
            header = json.loads(
                text.decode("utf-8"), object_pairs_hook=self._once, parse_constant=self._constant
            )
        except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number without end
            if isinstance(error, LdmError):
                raise
            raise self._fail(f"the header is not JSON ({escaped(error, 80)})") from error

        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._fail("its metadata should be text")
        if len(header) > MAX_TENSORS:
            raise UnsafeFileError(
                f"'{escaped(self.path)}' lists {len(header)} tensors; more than {MAX_TENSORS} are refused"
            )
        self.metadata = metadata
        self._check_tensors(header, start=8 + length)

    def _check_tensors(self, header: dict[str, Any], start: int) -> None:
        """Check every entry against the file: dtype, shape and offsets that tile the body exactly."""
        for name, entry in header.items():
            check_name(self.path, name)
            if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
                raise self._fail(f"entry '{escaped(name)}' should have dtype, shape and data_offsets only")
            shape, span = entry["shape"], entry["data_offsets"]
            if not _natural(shape) or not _natural(span) or len(span) != 2:
                raise self._fail(f"'{escaped(name)}' has no usable shape or offsets")
            if len(shape) > MAX_RANK:
                raise self._fail(f"'{escaped(name)}' has {len(shape)} dimensions, more than {MAX_RANK}")
            if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
                raise MismatchError(
                    f"'{escaped(self.path)}': '{escaped(name)}' has the unsupported dtype {escaped(entry['dtype'], 20)}"
                )
            info = TensorInfo(tuple(shape), DTYPES[entry["dtype"]])
            if max(shape, default=0) >= 1 << 40 or info.nbytes != span[1] - span[0]:
                raise self._fail(
                    f"'{escaped(name)}' of shape {escaped(shape, 60)} does not fill "
                    f"{escaped(span[1] - span[0], 30)} bytes"
                )
            self.infos[name] = info
            self._spans[name] = (start + span[0], start + span[1])

        position = start
        for name, (begin, end) in sorted(self._spans.items(), key=lambda item: item[1]):
            if begin != position:
                raise self._fail(f"a hole or overlap of the data before '{escaped(name)}'")
            position = end
        if position > self._handle.size:
            raise FormatError(
                f"'{escaped(self.path)}' is incomplete: {self._handle.size} of {position} bytes; download it again"
            )
        if position < self._handle.size:
            raise self._fail(f"{self._handle.size - position} bytes after the last tensor")

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        self._objects += 1
        if self._objects > MAX_TENSORS + 2:  # and the header itself, and its metadata
            raise UnsafeFileError(f"'{escaped(self.path)}' lists more than {MAX_TENSORS} tensors; refused")
        if len(entries) != len(pairs):
            raise self._fail("a name stands twice in the header")
        return entries

    def _constant(self, word: str) -> None:
        raise self._fail(f"{word} in the header")

    def _bytes(self, count: int) -> bytes:
        text = os.read(self._handle.file.fileno(), count)
        if len(text) != count:
            raise FormatError(
                f"'{escaped(self.path)}' is incomplete: {self._handle.size} bytes, no whole header; download it again"
            )
        return text

    def read(self, name: str, scratch: Tensor | None = None) -> Tensor:
        """Copy one tensor out of the file.

        Args:
            name: of the tensor.
            scratch: uint8 memory to copy into, at least as large; the tensor then lives until its next use.

        Raises:
            FormatError: the file was cut meanwhile, or the disk does not give it.
        """
        begin, end = self._spans[name]
        info = self.infos[name]
        body = torch.empty(end - begin, dtype=torch.uint8) if scratch is None else scratch[: end - begin]
        try:
            self._handle.read_into(memoryview(body.numpy()), begin)
        except EOFError:
            raise FormatError(f"'{escaped(self.path)}' was cut while it was read; load it again") from None
        except OSError as error:
            raise FormatError(f"'{escaped(self.path)}' cannot be read: {escaped(error)}") from error
        values = body.ne(0) if info.dtype is torch.bool else body.view(info.dtype)
        return values.reshape(info.shape)

    def close(self) -> None:
        """Close the file.

        Raises:
            FormatError: it was rewritten since it was opened.
        """
        if not self._handle.file.closed:
            try:
                self._handle.check_unchanged()
            finally:
                self._handle.file.close()


def _natural(values: Any) -> bool:
    """Tell whether a JSON value is a list of whole numbers from 0 up (True is not a number here)."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _is_text(header: bytes) -> bool:
    """Tell whether a header, but for so much, is texts and spaces; without parsing it."""
    structure = 0
    for count, piece in enumerate(PIECE.finditer(header)):
        structure += len(piece[1] or b"")
        if count > MAX_PIECES or structure > MAX_STRUCTURE:
            return False
    return True
