"""AUTOMATIC1111's prompt language (stable-diffusion-webui 1.10.1): emphasis, schedules, AND, BREAK, extra networks.

Its prompts pass through in this order: `without_comments` takes comments out, `split_tags` `<lora:name:0.8>`,
`split_and` splits at AND, `schedule` gives each part's text at every step, `parse_emphasis` the weights in that text,
and `chunk` its token numbers.
Nothing here recurses, and all takes time in proportion to the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ldm.errors import UsageError, shown
from ldm.prompt.chunks import CHUNK_LENGTH, END, START, Chunk, Chunks, check_text

Segment = tuple[str, float]

ROUND = 1.1  # what one pair of ( ) multiplies by, and one of [ ] divides by
BREAK: Segment = ("BREAK", -1.0)  # how a chunk's end stands among the segments; its weight makes it one
COMMA_BACKTRACK = 20
_MOST_OPEN = 10_000  # brackets that are open at once
_MOST_SCHEDULED = 64_000_000  # characters of all steps' texts together

_EMPHASIS = re.compile(r"\\[()\[\]\\]|[\\()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\bBREAK\b")


def parse_emphasis(text: str) -> list[Segment]:
    """Split a text into pieces with their weights; neighbours of equal weight are joined, and there is always one.

    `(x)` multiplies by 1.1, `[x]` divides by it, `(x:1.3)` multiplies by 1.3, nested ones together; `\\(` is a
    bracket as text. What is not closed counts to the end of the text, and what was not opened is text. `BREAK` is a
    segment of weight -1, which brackets around it multiply as well: it is then the word BREAK, as in the original.

    Raises:
        UsageError: a weight that is not a number (`(x:1.2.3)`), or more than 10,000 brackets open at once.
    """
    check_text(text)
    pieces: list[str] = []
    weights = np.ones(len(text) + 3)
    round_, square = [], []

    def multiply(start: int, weight: float) -> None:
        weights[start : len(pieces)] *= weight

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for match in _EMPHASIS.finditer(text):
            token, weight = match[0], match[1]
            if token[0] == "\\":
                pieces.append(token[1:])
            elif token == "(":
                round_.append(len(pieces))
                _check_open(len(round_))
            elif token == "[":
                square.append(len(pieces))
                _check_open(len(square))
            elif weight is not None and round_:
                multiply(round_.pop(), _weight(weight, text))
            elif token == ")" and round_:
                multiply(round_.pop(), ROUND)
            elif token == "]" and square:
                multiply(square.pop(), 1 / ROUND)
            else:
                for place, part in enumerate(_split_breaks(token)):
                    if place:
                        weights[len(pieces)] = BREAK[1]
                        pieces.append(BREAK[0])
                    pieces.append(part)
        for start in round_:
            multiply(start, ROUND)
        for start in square:
            multiply(start, 1 / ROUND)
    return _join(pieces, weights[: len(pieces)].tolist()) or [("", 1.0)]


def _check_open(brackets: int) -> None:
    if brackets > _MOST_OPEN:
        raise UsageError(
            f"a prompt may have {_MOST_OPEN} brackets open at once; close some, or write \\( for text"
        )


def _weight(number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise UsageError(
            f"the weight in {shown(f':{number})')} of the prompt should be a number like 1.3; write \\) if it is text"
        ) from None


def _split_breaks(text: str) -> list[str]:
    """Split at the word BREAK and the white space around it."""
    parts = _BREAK.split(text)
    last = len(parts) - 1
    for place, part in enumerate(parts):
        part = part.rstrip() if place < last else part
        parts[place] = part.lstrip() if place else part
    return parts


def _join(pieces: list[str], weights: list[float]) -> list[Segment]:
    joined: list[tuple[list[str], float]] = []
    for piece, weight in zip(pieces, weights, strict=True):
        if joined and joined[-1][1] == weight:
            joined[-1][0].append(piece)
        else:
            joined.append(([piece], weight))
    return [("".join(parts), weight) for parts, weight in joined]


# -- Schedules ---------------------------------------------------------------------------------------------------

_MARK = re.compile(r"\\.|[\\\[\]():|]|[^\\\[\]():|]+")
_WHEN = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*")


@dataclass
class _Choice:
    """A part of a prompt that changes: `[a:b:when]` (options a, b) or `[a|b|...]` (when is None)."""

    options: list[list]
    when: str | None


@dataclass
class _Open:
    """A bracket that has been opened: its items up to now, split at the marks of its own level."""

    bracket: str
    parts: list[list] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def spelt(self) -> list:
        """Give the items as they stand in the text, with the bracket and the marks."""
        items: list = [self.bracket]
        for place, part in enumerate(self.parts):
            items += [self.marks[place - 1]] if place else []
            items += part
        return items

    def close(self, bracket: str) -> list | _Choice | None:
        """Give the whole pair as one item, or None if it is no pair that the grammar has."""
        if (self.bracket, bracket) not in (("(", ")"), ("[", "]")):
            return None
        if not self.marks or (self.bracket == "(" and self.marks == [":"]):
            return [*self.spelt(), bracket]
        if self.bracket == "(":
            return None
        if set(self.marks) == {"|"}:
            return _Choice(self.parts, None)
        *options, when = self.parts
        if len(options) > 2 or "|" in self.marks or not all(isinstance(item, str) for item in when):
            return None
        number = _WHEN.fullmatch("".join(when))
        if number is None:
            return None
        return _Choice([[], *options] if len(options) == 1 else options, number[1])


def _parse_schedule(text: str) -> list | None:
    """Give the text's items (strings, _Choice, lists of items); None where the original's grammar has no reading of it.

    That is a `|` or a single backslash outside of an alternation's brackets. A bracket without its partner, or around
    what no bracket may hold, is text; so are all those around it.
    """
    top: list = []
    stack: list[_Open] = []

    def flatten() -> bool:
        for opened in stack:
            if "|" in opened.marks:
                return False
            top.extend(opened.spelt())
        stack.clear()
        return True

    for match in _MARK.finditer(text):
        token = match[0]
        if token == "\\":
            return None
        if token in "([":
            stack.append(_Open(token))
            _check_open(len(stack))
        elif token in ")]" and stack:
            item = stack[-1].close(token)
            if item is None:
                if not flatten():
                    return None
                top.append(token)
            else:
                stack.pop()
                (stack[-1].parts[-1] if stack else top).append(item)
        elif token == "|" and not (stack and stack[-1].bracket == "["):
            return None
        elif token in ":|" and stack:
            stack[-1].marks.append(token)
            stack[-1].parts.append([])
        else:
            (stack[-1].parts[-1] if stack else top).append(token)
    return top if flatten() else None


@dataclass(frozen=True)
class _Clock:
    """How the web UI reads `when` in `[a:b:when]`: as a share of the steps if it has a point, else as a step.

    Args:
        steps: of this pass.
        whole_offset, share_offset: taken off before: base steps and 1.0 in the second pass of hires fix.
        old: the rule before version 1.6: below 1 it is a share.
    """

    steps: int
    whole_offset: int = 0
    share_offset: float = 0.0
    old: bool = False

    def step(self, when: str) -> int:
        value = float(when)
        if self.old:
            value = value * self.steps if value < 1 else value
        elif "." in when:
            value = (value - self.share_offset) * self.steps
        else:
            value -= self.whole_offset
        return int(min(self.steps, max(value, -1.0)))


def _choices(items: list) -> list[_Choice]:
    found, waiting = [], [items]
    while waiting:
        for item in waiting.pop():
            if isinstance(item, _Choice):
                found.append(item)
                waiting += item.options
            elif isinstance(item, list):
                waiting.append(item)
    return found


def _at(items: list, step: int, clock: _Clock) -> str:
    text, waiting = [], [iter(items)]
    while waiting:
        for item in waiting[-1]:
            if isinstance(item, str):
                text.append(item)
                continue
            if isinstance(item, list):
                chosen = item
            elif item.when is None:
                chosen = item.options[(step - 1) % len(item.options)]
            else:
                chosen = item.options[0] if step <= clock.step(item.when) else item.options[1]
            waiting.append(iter(chosen))
            break
        else:
            waiting.pop()
    return "".join(text)


def check_steps(name: str, value: object) -> None:
    """Refuse what is no number of steps.

    Raises:
        UsageError: no whole number from 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} of a schedule should be a whole number from 1, got {shown(value)}")


def schedule(
    text: str, steps: int, *, hires_steps: int | None = None, old: bool = False
) -> list[tuple[int, str]]:
    """Give the text at every step: pairs (last step, counted from 1, at which it holds; text), to the last step.

    `[a:b:0.25]` is a for the first quarter of the steps, then b; `[a:b:12]` for 12 steps; `[b:0.25]` begins with
    nothing, `[a::0.25]` goes on with nothing; `[a|b|c]` takes turns. A share of 1.0 never comes. Inside round
    brackets, square ones and one another all may stand; what fits no rule is text.

    Args:
        steps: of the pass; for samplers that call the network twice a step, twice the steps.
        hires_steps: steps of the second pass of hires fix, whose schedule this is then: whole numbers count on from
            the first pass, and shares run from 1.0 to 2.0.
        old: the rule before version 1.6: a number below 1 is a share whether or not it has a point; in both passes.

    Raises:
        UsageError: no steps, more than 10,000 brackets open at once, or a text with alternations that is too long to
            be written out for every step.
    """
    check_text(text)
    check_steps("steps", steps)
    if hires_steps is not None:
        check_steps("hires_steps", hires_steps)
    clock = _Clock(steps, old=old) if old or hires_steps is None else _Clock(hires_steps, steps, 1.0)
    items = _parse_schedule(text)
    if items is None:
        return [(clock.steps, text)]
    ends = {clock.steps}
    for choice in _choices(items):
        if choice.when is None:
            ends.update(range(1, clock.steps + 1))
        elif (step := clock.step(choice.when)) >= 1:
            ends.add(step)
    if len(ends) > 1 and len(ends) * len(text) > _MOST_SCHEDULED:
        raise UsageError(
            f"a prompt of {len(text)} characters that changes at {len(ends)} steps is too long; shorten it"
        )
    return [(end, _at(items, end, clock)) for end in sorted(ends)]


# -- AND ---------------------------------------------------------------------------------------------------------

_AND = re.compile(r"\bAND\b")
_AND_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?|\d*\.\d+))")


def split_and(text: str) -> list[Segment]:
    """Split a prompt at the word AND: pairs of a text and its weight, 1 where no `:weight` closes it.

    Brackets do not matter: the web UI splits before it looks at them.
    """
    check_text(text)
    parts = []
    for part in _AND.split(text):
        stripped = part.rstrip()
        before, colon, number = stripped.rpartition(":")
        found = _AND_WEIGHT.fullmatch(number) if colon else None
        parts.append((before.rstrip(), float(found[1])) if found else (stripped, 1.0))
    return parts


# -- Extra networks ----------------------------------------------------------------------------------------------

_TAG = re.compile(r"<(\w+):([^>]+)>")


@dataclass(frozen=True)
class Tag:
    """`<lora:name:0.8:0.5>` in a prompt: kind "lora", positional ("name", "0.8", "0.5"), named {}.

    Attributes:
        positional: what stands between the colons, without `key=value`.
        named: the `key=value` among it, such as `te=0.5`.
    """

    kind: str
    positional: tuple[str, ...]
    named: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.positional[0] if self.positional else ""

    def weights(self) -> tuple[float, float]:
        """Give the strengths for the text encoder and for the UNet: 1 where none is given, one for both.

        Raises:
            UsageError: a strength that is not a number.
        """
        te = self.named.get("te", self.positional[1] if len(self.positional) > 1 else "1")
        unet = self.named.get("unet", self.positional[2] if len(self.positional) > 2 else te)
        try:
            return float(te or 1), float(unet or 1)
        except ValueError:
            raise UsageError(
                f"the strength in <{self.kind}:{':'.join(self.positional):.80}> should be a number such as 0.8"
            ) from None


_COMMENT = re.compile(r"#[^\n]*")


def without_comments(text: str) -> str:
    """Take out what stands between a # and the end of its line, as the web UI does before all else."""
    return _COMMENT.sub("", text)


def split_tags(text: str) -> tuple[str, list[Tag]]:
    """Take `<kind:name:...>` out of a prompt: the text without them, and the tags in order.

    A tag without a colon or a closing bracket is text, as in the web UI.
    """
    check_text(text)
    tags = []

    def take(match: re.Match) -> str:
        positional, named = [], {}
        for argument in match[2].split(":"):
            key, equals, value = argument.partition("=")
            if equals:
                named[key] = value
            else:
                positional.append(argument)
        tags.append(Tag(match[1], tuple(positional), named))
        return ""

    last = (
        text.rfind(">") + 1
    )  # behind it, "<a:<a:<a:" would be searched to the end of the text again and again
    return _TAG.sub(take, text[:last]) + text[last:], tags


# -- Chunks ------------------------------------------------------------------------------------------------------


def chunk(
    segments: Sequence[Segment],
    tokenize: Callable[[str], Sequence[int]],
    *,
    comma: int | None = 267,
    backtrack: int = COMMA_BACKTRACK,
    vectors: Callable[[int], str | None] | None = None,
    length: int = CHUNK_LENGTH,
    start: int = START,
    end: int = END,
) -> Chunks:
    """Put the tokens of segments into chunks, of 75 for CLIP, each between a start and an end mark.

    A segment BREAK ends a chunk. Where a chunk is full within `backtrack` tokens behind a comma, what stands behind the
    comma moves to the next one.

    Args:
        segments: of `parse_emphasis`.
        tokenize: a text to its token numbers, without marks.
        comma: the token number of "," (of ",</w>" in CLIP's vocabulary), None for none.
        backtrack: 0 never moves anything.
        vectors: a token number to the name of the embedding (textual inversion) that it is a vector of, or None. An
            embedding's vectors stay in one chunk.
        length: tokens of a chunk without its marks.
        start, end: the marks.
    """
    chunks: list[Chunk] = []
    ids: list[int] = []
    weights: list[float] = []
    last_comma = -1
    count = 0

    def close(ids: list[int], weights: list[float]) -> None:
        room = length - len(ids)
        chunks.append(
            Chunk((start, *ids, *[end] * (room + 1)), (1.0, *weights, *[1.0] * (room + 1)), used=len(ids))
        )

    for text, weight in segments:
        if (text, weight) == BREAK:
            close(ids, weights)
            ids, weights, last_comma, count = [], [], -1, count + length
            continue
        for group in _groups(tokenize(text), vectors):
            if group[0] == comma:
                last_comma = len(ids)
            elif backtrack and len(ids) == length and last_comma != -1:
                cut = last_comma + 1
                if len(ids) - last_comma <= backtrack:
                    close(ids[:cut], weights[:cut])
                    ids, weights, last_comma, count = ids[cut:], weights[cut:], -1, count + length
            if ids and len(ids) + len(group) > length:
                close(ids, weights)
                ids, weights, last_comma, count = [], [], -1, count + length
            while len(group) > length:  # an embedding that no chunk can hold
                close(group[:length], [weight] * length)
                group, count = group[length:], count + length
            ids += group
            weights += [weight] * len(group)
    if ids or not chunks:
        close(ids, weights)
        count += len(ids)
    return Chunks(tuple(chunks), count)


def _groups(ids: Sequence[int], vectors: Callable[[int], str | None] | None) -> list[list[int]]:
    """Tokens one by one, and the vectors of an embedding together: numbers of one name that go up by one."""
    groups: list[list[int]] = []
    name = None
    for number in ids:
        named = vectors(number) if vectors else None
        if named is not None and named == name and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
        name = named
    return groups
