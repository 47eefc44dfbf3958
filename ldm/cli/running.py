"""How a script runs and ends: one line for an error, an exit code for its kind, nothing lost."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from ldm.errors import (
    AbsentError,
    LdmError,
    OutputError,
    ResourceError,
    is_out_of_memory,
)

MAX_LINE = 400  # characters of an error line, so that it stays readable in a log
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no `except Exception` on the way can swallow it."""


def printable(text: str, limit: int = MAX_LINE) -> str:
    """Put text into one line without control, format or surrogate characters; cut its middle beyond limit."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    if len(line) <= limit:
        return line
    tail = limit // 3  # the end says what to do
    return f"{line[: limit - tail - 5]} ... {line[-tail:]}"


def say(text: str) -> None:
    """Print a line for the user; a reader that went away (`| head`) is no error."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        print(text, flush=True)


def run(main: Callable[[list[str] | None], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a script's main and end the process with its exit code.

    0 ok; an LdmError ends with its own code (2 usage, 3 file, 4 unsafe, 5 mismatch, 6 resources, 7 output,
    8 not finite, 9 absent); 130 after Ctrl-C, 143 after SIGTERM; 1 for anything unexpected. Errors are one
    line on stderr, `ldm: error: ...`, with a traceback above it only under --debug.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A prompt in any script must not fail on a terminal that cannot show it.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    with _warnings_on_stderr(), _terminable():
        try:
            code = main(argv) or 0
        except SystemExit as stop:  # argparse's --help
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException as error:
            if "--debug" in argv:
                traceback.print_exc()
            code, line = _verdict(error)
            with contextlib.suppress(BrokenPipeError, ValueError):
                print(printable(f"ldm: error: {line}"), file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError, ValueError, OSError, AttributeError):
        sys.stdout.flush()
    sys.exit(code)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Say with which exit code and line an exception ends the process."""
    text = str(error)
    if isinstance(error, LdmError):
        return error.exit_code, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; finished images and files are kept"
    if isinstance(error, Terminated):
        return 143, "terminated; finished images and files are kept"
    if is_out_of_memory(error):
        return ResourceError.exit_code, f"out of memory: {text}; use a smaller size or batch"
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return OutputError.exit_code, f"cannot write: {text}; free some space or choose another folder"
    if isinstance(error, FileNotFoundError):
        return AbsentError.exit_code, f"not found: {text}"
    return 1, f"unexpected {type(error).__name__}: {text}; this is a bug, --debug shows where"


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Show what the library logs at WARNING and above, one line each."""

    class OneLine(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(f"ldm: {record.levelname.lower()}: {record.getMessage()}", limit=2000)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    logger = logging.getLogger("ldm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into Terminated, where signals can be had (the main thread)."""

    def stop(number, frame):
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
