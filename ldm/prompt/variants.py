"""Templates of prompts: `{red|blue}` and `__colours__`, of which one text is drawn, as A1111's Dynamic Prompts has it.

The rule by which it is drawn: `random.Random(seed)` gives numbers r from 0 to 1, one for each choice, in the order in
which the choices are met from left to right, those within a chosen text before those behind it. A choice goes through
its options in their order, and takes the first at which the sum of the weights up to it exceeds r times the sum of all.
Of several options the number is drawn first, if it is not fixed, evenly; each that was taken is taken out. Python keeps
these numbers the same in all its versions.
"""

from __future__ import annotations

import fnmatch
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.errors import AbsentError, FormatError, UsageError, nearest, refuse_elsewhere, shown
from ldm.limits import MAX_PROMPT

SUFFIX = ".txt"
SEPARATOR = ", "
MAX_BYTES = 10 * 2**20  # of a file
MAX_DEPTH = 100  # of files that name files
MAX_CHOICES = 100_000  # of one prompt
MAX_OPEN = 10_000  # braces at once

_TOKEN = re.compile(r"\\[{}|]|\\__|\$\{|[{}|\[\]]|__(?![\s_])([\w ./*-]+?)__")
_COUNT = re.compile(r"\s*(?:(\d{1,6})(?:(-)(\d{1,6})?)?|-(\d{1,6}))\$\$(?:([^$]*)\$\$)?")
_WEIGHT = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))::")


@dataclass(frozen=True)
class Wildcard:
    """`__name__`: a line of a file, or of all whose names fit where it holds a `*`."""

    name: str


@dataclass(frozen=True)
class Choice:
    """`{a|b}`: so many of the options, at most all there are.

    Attributes:
        options: (weight, items) of each.
        low, high: how many; high None is all.
    """

    options: tuple[tuple[float, Items], ...]
    low: int = 1
    high: int | None = 1
    separator: str = SEPARATOR


Items = tuple["str | Wildcard | Choice", ...]


@dataclass
class _Open:
    """A brace that has been opened: its options up to now, and where square brackets within it opened."""

    options: list[list[str | Wildcard | Choice]] = field(default_factory=lambda: [[]])
    square: list[int] = field(default_factory=list)


def parse(text: str) -> Items:
    r"""Read a template: texts, Wildcards and Choices.

    `{a|b}` is one of its options, `{2::a|b}` with weights (1 where none is said), `{2$$a|b|c}` two of them,
    `{1-2$$...}`, `{-2$$...}` and `{2-$$...}` some, joined by ", " or by what `{2$$ and $$a|b|c}` says. All may be
    nested. Within square brackets that open and close in an option a | is theirs. `\{`, `\}`, `\|` and `\__` are text.

    Raises:
        UsageError: braces that do not close, or were not opened; a weight below 0 or none above; variables, `${x=a}`,
            which are not here; more than 10,000 braces open at once.
    """
    top: list[str | Wildcard | Choice] = []
    stack: list[_Open] = []

    def add(item: str | Wildcard | Choice) -> None:
        if item != "":
            (stack[-1].options[-1] if stack else top).append(item)

    end = 0
    for match in _TOKEN.finditer(text):
        add(text[end : match.start()])
        end, token = match.end(), match[0]
        if token[0] == "\\":
            # Outside of braces a | is no mark, and what stands before it another language's.
            add(token if token == "\\|" and not stack else token[1:])
        elif token == "${":
            raise UsageError(
                f"variables of a template, {shown(text[match.start() : match.start() + 20])}, are not here; write the "
                "choice where it is wanted, or \\{ for text"
            )
        elif token == "{":
            if len(stack) == MAX_OPEN:
                raise UsageError(f"a template may have {MAX_OPEN} braces open at once; close some")
            stack.append(_Open())
        elif token == "}":
            if not stack:
                raise UsageError(
                    f"a template has a }} without its {{ at {_place(text, match)}; write \\}} for text"
                )
            opened = stack.pop()
            add(_choice(opened.options))
        elif match[1] is not None:
            add(Wildcard(match[1].strip()))
        elif token == "|" and stack:
            stack[-1].options.append([])
        else:
            add(token)
            if stack and token == "[":
                stack[-1].square.append(len(stack[-1].options) - 1)
            elif stack and token == "]" and stack[-1].square:
                _join(stack[-1].options, stack[-1].square.pop())
    if stack:
        raise UsageError(
            f"a template has {len(stack)} {{ without }} in {shown(text)}; close it, or write \\{{ for text"
        )
    add(text[end:])
    return tuple(top)


def _place(text: str, match: re.Match[str]) -> str:
    return f"character {match.start() + 1} of {shown(text)}"


def _join(options: list[list[str | Wildcard | Choice]], first: int) -> None:
    """Make one option of those since a square bracket that has closed."""
    for part in options[first + 1 :]:
        options[first] += ["|", *part]
    del options[first + 1 :]


def _choice(options: list[list[str | Wildcard | Choice]]) -> Choice:
    low, high, separator = 1, 1, SEPARATOR
    if count := _match(_COUNT, options[0]):
        fixed, dash, most, at_most, given = count.groups()
        low = int(fixed or 1)
        high = int(at_most or most or fixed) if at_most or most or not dash else None
        separator = SEPARATOR if given is None else given
        if high is not None and high < low:
            raise UsageError(
                f"a template wants from {low} to {high} of its options; write the smaller number first"
            )
    weighed = tuple(_weighed(one) for one in options)
    return Choice(weighed, low, high, separator)


def _match(pattern: re.Pattern[str], option: list[str | Wildcard | Choice]) -> re.Match[str] | None:
    """Match the beginning of an option, and take it off."""
    texts = []
    for item in option:
        if not isinstance(item, str):
            break
        texts.append(item)
    found = pattern.match("".join(texts))
    if found is not None:
        option[: len(texts)] = [found.string[found.end() :]]
    return found


def _weighed(option: list[str | Wildcard | Choice]) -> tuple[float, Items]:
    found = _match(_WEIGHT, option)
    weight = float(found[1]) if found else 1.0
    if not 0 <= weight < math.inf:
        raise UsageError(f"a weight of a template's option should be a number from 0, got {shown(found[1])}")
    return weight, tuple(option)


class Wildcards:
    """The files of a folder, and of those in it, by their names without the ending, as `colours` and `dogs/small`.

    A file has one text a line; empty lines, and those that begin with #, are skipped, and a line may be a template.

    Raises:
        AbsentError: no such folder.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._read: dict[str, tuple[tuple[float, Items], ...]] = {}
        if folder is not None:
            refuse_elsewhere("wildcards", folder, hub=False)
            if not Path(folder).is_dir():
                raise AbsentError(
                    f"wildcards '{folder}' is no folder; give the one with the files that prompts name"
                )
            files = sorted(path for path in Path(folder).rglob(f"*{SUFFIX}") if path.is_file())
            self._files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}

    def options(self, name: str) -> tuple[tuple[float, Items], ...]:
        """Give the lines that a name means, with their weights.

        Raises:
            UsageError: no folder was given, or a line is no template. AbsentError: no file goes by the name.
            FormatError: a file that is no text, is too large or has no lines.
        """
        if self.folder is None:
            raise UsageError(
                f"__{name}__ is a line of a file; give wildcards (--wildcards), the folder that it is in, or \\__ for "
                "text"
            )
        if name not in self._read:
            names = [name] if name in self._files else sorted(fnmatch.filter(self._files, name))
            if not names:
                near = nearest(name, self._files)
                hint = f"did you mean {near!r}?" if near else f"there are {len(self._files)} in the folder"
                raise AbsentError(f"no wildcard file goes by {shown(name)}; {hint}")
            self._read[name] = tuple(option for one in names for option in self._lines(one))
        return self._read[name]

    def _lines(self, name: str) -> Iterator[tuple[float, Items]]:
        path = self._files[name]
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES} bytes")
            lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
        except (OSError, ValueError) as error:
            raise FormatError(
                f"cannot read wildcards '{path}': {error}; give text in UTF-8, one a line"
            ) from None
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise FormatError(f"wildcards '{path}' hold no text; write one a line")
        for line in lines:
            try:
                yield _weighed(list(parse(line)))
            except UsageError as error:
                raise UsageError(f"wildcards '{path}': {error}") from None


def draw(template: str, seed: int | str, wildcards: Wildcards) -> str:
    """Draw one text of a template, by the rule above.

    Raises:
        UsageError: as parse; files that lead back to themselves without an end; a text that is too long.
        AbsentError, FormatError: as Wildcards.options.
    """
    numbers = random.Random(seed)
    out: list[str] = []
    length = choices = 0
    waiting: list[tuple[str | Wildcard | Choice, int]] = [(item, 0) for item in reversed(parse(template))]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            out.append(item)
            length += len(item)
            if length > MAX_PROMPT:
                raise UsageError(f"the text drawn of {shown(template)} has more than {MAX_PROMPT} characters")
            continue
        choices += 1
        if depth > MAX_DEPTH or choices > MAX_CHOICES:
            raise UsageError(
                f"the template {shown(template)} does not come to an end: its wildcard files lead back to themselves; "
                f"{MAX_DEPTH} within one another and {MAX_CHOICES} choices are the most"
            )
        if isinstance(item, Wildcard):
            item, depth = Choice(wildcards.options(item.name)), depth + 1
        waiting += [(one, depth) for one in reversed(_chosen(item, numbers, wildcards))]
    return "".join(out)


def _chosen(choice: Choice, numbers: random.Random, wildcards: Wildcards) -> list[str | Wildcard | Choice]:
    left = list(choice.options)
    if choice.high != 1 and len(left) == 1:  # {2$$__colours__} takes several lines, each once
        items = [one for one in left[0][1] if not isinstance(one, str) or one.strip()]
        if len(items) == 1 and isinstance(items[0], Wildcard):
            left = list(wildcards.options(items[0].name))
    high = len(left) if choice.high is None else min(choice.high, len(left))
    low = min(choice.low, high)
    count = low if low == high else low + int(numbers.random() * (high - low + 1))
    found: list[str | Wildcard | Choice] = []
    for place in range(count):
        found += [choice.separator] if place else []
        found += left.pop(_pick([weight for weight, _ in left], numbers.random()))[1]
    return found


def _pick(weights: Sequence[float], number: float) -> int:
    total = math.fsum(weights)
    if not 0 < total < math.inf:
        raise UsageError(
            "the options of a template that are left have no weight above 0; give one of them some"
        )
    up_to = 0.0
    for place, weight in enumerate(weights):
        up_to += weight
        if up_to > number * total:
            return place
    return max(place for place, weight in enumerate(weights) if weight)  # where sums were rounded
