"""Everything a caller can get wrong, by kind; each kind has the exit code that the scripts end with."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable


def shown(value: object, limit: int = 80) -> str:
    """Show a value in an error's line, however large it is; Python itself refuses to print 4,301 digits and more."""
    try:
        text = repr(value)
    except Exception:  # a stranger's object may fail at this as it likes
        return f"a {type(value).__name__} that cannot be shown"
    text = " ".join(text.splitlines())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def escaped(text: object, limit: int = 120) -> str:
    """Escape and shorten a name that a stranger's file chose, so that it can stand in a one-line message."""
    escaped = str(text)[: limit + 1].encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def nearest(name: object, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Give the one of names that is spelt most like this one, or None if none is near.

    Args:
        name: whatever came; its first 80 characters count, so that a stranger's long one costs no time.
        cutoff: the least likeness, 0 to 1.
    """
    found = difflib.get_close_matches(str(name)[:80], list(names), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest_file(path: str | os.PathLike) -> str | None:
    """Give the name in the same folder that is spelt most like that of a file which is not there, or None."""
    folder, name = os.path.split(os.fsdecode(path).rstrip(os.sep))
    with contextlib.suppress(OSError, ValueError):
        return nearest(name, os.listdir(folder or "."))
    return None


class LdmError(Exception):
    """Base of all errors raised on purpose; the message is one line: what was wanted, what came, what to do."""

    exit_code = 1


class UsageError(LdmError, ValueError):
    """A value, option or size that is out of range or of the wrong kind."""

    exit_code = 2


class OptionError(UsageError, TypeError):
    """A keyword that a function does not have; Python raises TypeError for it."""


class FormatError(LdmError, ValueError):
    """A file that cannot be read: truncated, malformed, or not what its name says."""

    exit_code = 3


class UnsafeFileError(LdmError):
    """A file or configuration that asks for more than data: code, foreign classes, impossible sizes."""

    exit_code = 4


class MismatchError(LdmError, ValueError):
    """Files that are sound but do not fit together: another family, a missing or misshapen tensor."""

    exit_code = 5


class ResourceError(LdmError, RuntimeError):
    """Out of memory, or a worker process died."""

    exit_code = 6


class OutputError(LdmError, OSError):
    """An output folder or file that cannot be written."""

    exit_code = 7


class NumericError(LdmError, ArithmeticError):
    """A result that is not finite."""

    exit_code = 8


class AbsentError(LdmError, FileNotFoundError):
    """A needed file that is not there, or cannot be had without a network."""

    exit_code = 9


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib leaves one slash of two; a drive is one letter
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_NAME = re.compile(r"\.[A-Za-z]\w*$")


def refuse_elsewhere(what: str, path: object, *, hub: bool = True) -> None:
    """Say so where a path that is not on this machine names something on a network; other paths pass.

    Args:
        what: what is wanted, as a message begins: "weight file".
        hub: whether "owner/name" may mean a model on Hugging Face's hub.

    Raises:
        UsageError: an address (https://, hf://, s3:// and so on).
        AbsentError: a hub's name.
    """
    if not isinstance(path, str | os.PathLike) or os.path.lexists(path):
        return
    text = os.fsdecode(path)
    if _ADDRESS.match(text):
        raise UsageError(
            f"{what} {shown(text)} is an address: nothing is downloaded here; fetch it yourself and give the file"
        )
    is_name = hub and _HUB_NAME.fullmatch(text) and not _FILE_NAME.search(text)
    if is_name and not os.path.isdir(os.path.dirname(text)):
        raise AbsentError(
            f"{what} {shown(text)} is not on this machine; names on a hub are not looked up, and nothing is downloaded "
            "here; fetch it yourself and give its file or folder"
        )


# How torch, oneDNN, CUDA and its libraries, HIP, Metal and the systems say that memory is short.
_NO_MEMORY = re.compile(
    r"out of memory|bad_alloc|defaultcpuallocator|(can'?t|cannot|could not|unable to|failed to) allocate"
    r"|could not create a (primitive(?! desc)|memory)|not enough memory|insufficient memory"
    r"|_status_alloc_failed|erroroutofmemory|paging file is too small",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory is short, whichever library raised it."""
    if isinstance(error, LdmError):  # has said what it is
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None
