"""OpenAI's logger: numbers by name, averaged between two dumps, printed as a table and kept in a folder.

logger.configure(dir="logs/mine")
logger.log("training...")
logger.logkv("step", 3)
logger.logkv_mean("loss", 0.5)
logger.dumpkvs()
"""

import contextlib
import csv
import datetime
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoints import replacing
from ldm.errors import OutputError, UsageError
from ldm.guided_diffusion import dist_util

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
FORMATS = ("stdout", "log", "csv", "json")


class Logger:
    """Where numbers and words go.

    Args:
        dir: a folder for log.txt, progress.csv and progress.json; None keeps nothing. What is there is added to.
        formats: some of FORMATS.
        suffix: of log.txt's and the other files' names.
    """

    def __init__(self, dir: str | os.PathLike | None, formats: Sequence[str], suffix: str = ""):
        if unknown := [name for name in formats if name not in FORMATS]:
            raise UsageError(f"log format '{unknown[0]:.40}' is unknown; choose some of {', '.join(FORMATS)}")
        self.dir = None if dir is None else str(dir)
        self.formats, self.suffix, self.level = tuple(formats), suffix, INFO
        self.values: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        if self.dir is not None:
            try:
                os.makedirs(self.dir, exist_ok=True)
            except OSError as error:
                raise OutputError(f"log folder '{self.dir:.120}' cannot be made: {error.strerror}") from error

    def _file(self, stem: str, ending: str) -> Path | None:
        return None if self.dir is None else Path(self.dir, f"{stem}{self.suffix}.{ending}")

    def log(self, *args: Any, level: int = INFO) -> None:
        """Say something."""
        if level < self.level:
            return
        line = " ".join(map(str, args))
        if "stdout" in self.formats:
            print(line, flush=True)
        if "log" in self.formats:
            self._append("log", "txt", line + "\n")

    def _append(self, stem: str, ending: str, text: str) -> None:
        path = self._file(stem, ending)
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)

    def dump(self) -> dict[str, Any]:
        """Print and keep the numbers, and begin anew."""
        values = {
            key: float(value) if hasattr(value, "__float__") else value for key, value in self.values.items()
        }
        self.values, self.counts = {}, {}
        if not values or self.level == DISABLED:
            return values
        shown = {
            key: f"{value:.5g}" if isinstance(value, float) else str(value) for key, value in values.items()
        }
        width, room = max(map(len, shown)), max(map(len, shown.values()))
        rule = "-" * (width + room + 7)
        rows = [f"| {key:<{width}} | {shown[key]:<{room}} |" for key in sorted(shown)]
        table = "\n".join([rule, *rows, rule]) + "\n"
        if "stdout" in self.formats:
            sys.stdout.write(table)
            sys.stdout.flush()
        if "log" in self.formats:
            self._append("log", "txt", table)
        if "json" in self.formats:
            self._append("progress", "json", json.dumps(values) + "\n")
        if "csv" in self.formats:
            self._add_row(values)
        return values

    def _add_row(self, values: Mapping[str, Any]) -> None:
        """Add a row to progress.csv; with a column that is new, the file is written anew and whole."""
        path = self._file("progress", "csv")
        if path is None:
            return
        earlier: list[dict[str, Any]] = []
        columns: list[str] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file), [])
            if not set(values) <= set(columns):
                with path.open(newline="", encoding="utf-8") as file:
                    earlier = list(csv.DictReader(file))
        if set(values) <= set(columns):
            self._append("progress", "csv", _as_csv([values], columns, header=False))
            return
        columns += [name for name in sorted(values) if name not in columns]
        with replacing(path) as file:
            file.write(_as_csv([*earlier, values], columns, header=True).encode("utf-8"))


def _as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, header: bool) -> str:
    held = io.StringIO()
    writer = csv.DictWriter(held, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return held.getvalue()


_current = Logger(None, ("stdout",))


def configure(
    dir: str | os.PathLike | None = None,
    format_strs: Sequence[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> None:
    """Choose the folder and the formats; the first process alone prints and writes.

    Args:
        dir: None takes the environment's OPENAI_LOGDIR, or makes a folder among the system's temporary ones.
        format_strs: some of FORMATS; None takes OPENAI_LOG_FORMAT, or "stdout,log,csv".
        comm: without effect; processes are known by dist_util.

    Raises:
        UsageError: an unknown format. OutputError: the folder cannot be made.
    """
    global _current
    dir = dir or os.environ.get("OPENAI_LOGDIR")
    if not dir:
        now = datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
        dir = Path(tempfile.gettempdir(), now)
    if format_strs is None:
        format_strs = os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv").split(",")
    rank, _ = dist_util.place()
    _current = Logger(dir, [name for name in format_strs if name] if rank == 0 else (), log_suffix)
    log(f"Logging to {_current.dir}")


def reset() -> None:
    """Go back to printing alone."""
    global _current
    _current = Logger(None, ("stdout",))


@contextlib.contextmanager
def scoped_configure(dir: str | os.PathLike | None = None, **options: Any) -> Iterator[None]:
    """Log elsewhere for the length of a block."""
    global _current
    before = _current
    configure(dir, **options)
    try:
        yield
    finally:
        _current = before


def get_dir() -> str | None:
    """Tell the folder; None before configure."""
    return _current.dir


def logkv(key: str, val: Any) -> None:
    """Note a number for the next dump; a later one of the same name takes its place."""
    _current.values[key] = val


def logkv_mean(key: str, val: Any) -> None:
    """Note a number whose mean since the last dump is wanted."""
    count = _current.counts.get(key, 0)
    _current.values[key] = (_current.values.get(key, 0.0) * count + float(val)) / (count + 1)
    _current.counts[key] = count + 1


def logkvs(d: Mapping[str, Any]) -> None:
    """Note several numbers."""
    for key, val in d.items():
        logkv(key, val)


def getkvs() -> dict[str, Any]:
    """Return what has been noted since the last dump."""
    return _current.values


def dumpkvs() -> dict[str, Any]:
    """Print and keep what has been noted, return it, and begin anew."""
    return _current.dump()


def log(*args: Any, level: int = INFO) -> None:
    """Say something, if the level is set so low."""
    _current.log(*args, level=level)


def debug(*args: Any) -> None:
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    log(*args, level=WARN)


def error(*args: Any) -> None:
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Say nothing below this level; DISABLED prints and keeps no numbers either."""
    _current.level = level


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add a block's seconds to the number wait_<scopename>."""
    start = time.time()
    try:
        yield
    finally:
        key = "wait_" + scopename
        _current.values[key] = _current.values.get(key, 0.0) + time.time() - start


record_tabular, dump_tabular = logkv, dumpkvs
