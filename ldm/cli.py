"""What the command-line scripts share: the parser, validated numbers, one-line errors and exit codes.

Nothing here needs torch, so that `--help` and a wrong option answer at once.
"""

import argparse
import contextlib
import difflib
import errno
import logging
import math
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from ldm.errors import AbsentError, LdmError, OutputError, ResourceError, UsageError

MAX_LINE = 400  # characters of an error line, so that it stays readable in a log
MAX_SEED = 2**64 - 1  # what torch.Generator takes
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no `except Exception` on the way can swallow it."""


class Parser(argparse.ArgumentParser):
    """Parse options as argparse does, but raise UsageError in one line and refuse what is ambiguous.

    Differences: no abbreviations, an option given twice is refused, an unknown one is answered with the
    nearest known one; `--debug` is always there.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        args = list(sys.argv[1:] if args is None else args)
        self._refuse_repeats(args)
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse_unknown(unknown)
        return found

    def given(self, args: Sequence[str] | None = None) -> set[str]:
        """Name the destinations that these arguments set, as opposed to those left at their default."""
        return {action.dest for action in self._named(sys.argv[1:] if args is None else args)}

    def _named(self, args: Sequence[str]) -> Iterator[argparse.Action]:
        for word in args:
            if word == "--":
                return
            action = self._option_string_actions.get(word.split("=", 1)[0])
            if action is not None:
                yield action

    def _refuse_repeats(self, args: Sequence[str]) -> None:
        seen: dict[str, str] = {}
        for action in self._named(args):
            if isinstance(action, argparse._AppendAction | argparse._CountAction):
                continue
            name = action.option_strings[0]
            if action.dest in seen and not isinstance(action, argparse._StoreConstAction):
                self.error(f"option {name} was given twice; give it once")
            seen[action.dest] = name

    def _refuse_unknown(self, words: list[str]) -> NoReturn:
        option = next((word.split("=", 1)[0] for word in words if word.startswith("-")), None)
        if option is None:
            self.error(f"unexpected word {words[0]!r}; put quotes around a value with spaces")
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        self.error(f"unknown option {option!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def integer(low: int, high: int) -> Callable[[str], int]:
    """Make an argparse type that takes whole numbers from low to high, both included."""

    def parse(text: str) -> int:
        wanted = f"wanted a whole number from {low} to {high}, got {text!r}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(wanted) from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(wanted)
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Make an argparse type that takes finite numbers from low to high, both included."""

    def parse(text: str) -> float:
        wanted = f"wanted a number from {low:g} to {high:g}, got {text!r}"
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(wanted) from None
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(wanted)
        return value

    return parse


def seed(text: str) -> int | None:
    """Read a seed as an argparse type: 0 to 2^64 - 1, or "random" (None)."""
    if text == "random":
        return None
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"wanted a seed from 0 to 2^64-1 or 'random', got {text!r}")
    return value


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
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
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
