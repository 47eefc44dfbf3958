"""Writing weight files so that a file under its final name is always whole, old or new."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.checkpoints.report import TensorInfo
from ldm.checkpoints.safe import DTYPES, check_name
from ldm.errors import OutputError, UsageError, escaped

try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed writer stay until somebody deletes them
    fcntl = None

CODES = {dtype: code for code, dtype in DTYPES.items()}


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside path that takes path's name at the end of the block, complete and on disk.

    Whatever interrupts the block, a file that had the name before is still there, unharmed. The temporary
    file is `.<name>.<random>.part`; one that a killed writer left is removed by the next.

    Raises:
        OutputError: the folder or the disk does not take the file.
    """
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OutputError(f"cannot write '{escaped(path)}': it is a folder; give a file name")
        _remove_leftovers(path)
        number, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(number, "wb") as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)  # held while we live: tells our file from a leftover
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(part, _usual_mode(path))
            os.replace(part, path)
            part = None
        sync_folder(path.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write '{escaped(path)}': {error.strerror or error}; free space or another folder is needed"
        ) from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)


def _usual_mode(path: Path) -> int:
    """The mode of the file to be replaced, else what open() would give; mkstemp alone gives 0600."""
    with contextlib.suppress(OSError):
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _remove_leftovers(path: Path) -> None:
    if not fcntl:
        return
    for leftover in path.parent.glob(f".{_literal(path.name)}.*.part"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _literal(name: str) -> str:
    """Escape a name for glob."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def sync_folder(folder: Path) -> None:
    """Put the new name on disk too; not every system lets a folder be opened for that."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def save_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file, atomically.

    Args:
        path: the final name.
        tensors: name -> tensor, on any device, of any dtype that safetensors files hold here.
        metadata: text -> text for the header.

    Raises:
        UsageError: a name, dtype or metadata value that the format does not take.
        OutputError: it cannot be written; a file of that name that was there before is untouched.
    """
    for name, value in tensors.items():
        if value.dtype not in CODES or value.layout is not torch.strided or value.is_meta:
            raise UsageError(
                f"'{escaped(name)}' cannot be saved: a {value.dtype} tensor on '{value.device}', {value.layout}"
            )
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    stream_safetensors(path, infos, tensors.__getitem__, metadata)


def stream_safetensors(
    path: str | os.PathLike,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    finish: Callable[[], object] = lambda: None,
) -> None:
    """Write a safetensors file, atomically, of tensors that are made one by one when their turn comes.

    So no more than one of them is in memory. Nothing is left if `read` fails.

    Args:
        path: the final name.
        infos: name -> shape and dtype of what `read` will give.
        read: name -> tensor, on any device.
        metadata: text -> text for the header.
        finish: called when all are read, before the file takes its name; what it raises keeps the name from it.

    Raises:
        UsageError: a name, dtype or metadata value that the format does not take.
        OutputError: it cannot be written; a file of that name that was there before is untouched.
    """
    metadata = dict(metadata or {})
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise UsageError(
                f"metadata should be text to text, got {escaped(key, 40)!r}: {type(value).__name__}"
            )
    for name, info in infos.items():
        if info.dtype not in CODES:
            raise UsageError(f"'{escaped(name)}' cannot be saved: a {info.dtype} tensor")
        check_name(str(path), name)

    # Widest items first keeps every tensor aligned to its item size, as the safetensors library orders them.
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name in order:
        info = infos[name]
        header[name] = {
            "dtype": CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = read(name)
            assert (tuple(value.shape), value.dtype) == (infos[name].shape, infos[name].dtype), name
            flat = value.detach().to("cpu").contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))
        finish()


def save_object(path: str | os.PathLike, value: Any) -> None:
    """Write a program's state with torch.save, atomically; read_object reads it back.

    Raises:
        OutputError: it cannot be written; a file of that name that was there before is untouched.
    """
    with replacing(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # how torch reports a full disk
            raise OutputError(
                f"cannot write '{escaped(path)}': {escaped(error)}; is the disk full?"
            ) from error
