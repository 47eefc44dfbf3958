"""A weight file held open, from its first bytes to the last read."""

import os
import stat
import threading
from types import TracebackType
from typing import BinaryIO, Self

from ldm.errors import AbsentError, FormatError, escaped, nearest_file, refuse_elsewhere


class OpenFile:
    """A regular file held open once from sniffing to the last read; noticing whether it changed meanwhile."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        try:
            # Non-blocking, so that a FIFO without a writer cannot hang the open.
            number = os.open(
                self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            )
        except FileNotFoundError:
            refuse_elsewhere("weight file", self.path)
            raise _absent(self.path) from None
        except IsADirectoryError:
            raise FormatError(f"'{escaped(self.path)}' is a folder, not a weight file") from None
        except PermissionError:
            raise FormatError(f"'{escaped(self.path)}' cannot be read: permission denied") from None
        except (OSError, ValueError) as error:
            raise FormatError(f"'{escaped(self.path)}' cannot be opened: {escaped(error)}") from error
        try:
            self.before = os.fstat(number)
            if not stat.S_ISREG(self.before.st_mode):
                kind = "a folder" if stat.S_ISDIR(self.before.st_mode) else "a pipe, socket or device"
                raise FormatError(f"'{escaped(self.path)}' is {kind}, not a regular file")
            self.file: BinaryIO = os.fdopen(number, "rb", buffering=0)
        except BaseException:
            os.close(number)
            raise
        self.size = self.before.st_size
        self._seeking = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def read_into(self, view: memoryview, position: int) -> None:
        """Fill memory with the file's bytes from a position on; several threads may do so at once.

        Raises:
            EOFError: the file ends before. OSError: the disk does not give it.
        """
        filled = 0
        while filled < len(view):
            count = self._read_at(view[filled:], position + filled)
            if not count:
                raise EOFError
            filled += count

    def _read_at(self, view: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [view], position)
        with self._seeking:  # Windows
            self.file.seek(position)
            return self.file.readinto(view)

    def check_unchanged(self) -> None:
        """Raise FormatError if the file was rewritten or cut since it was opened."""
        now = os.fstat(self.file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.before.st_size, self.before.st_mtime_ns):
            raise FormatError(f"'{escaped(self.path)}' changed while it was read; load it again")


def _absent(path: str) -> AbsentError:
    if os.path.islink(path):
        return AbsentError(f"'{escaped(path)}' is a link to a file that is not there")
    near = nearest_file(path)
    hint = f"did you mean '{escaped(near)}'?" if near else "check the path"
    return AbsentError(f"weight file '{escaped(path)}' is not there; {hint}")
