"""ComfyUI's prompt language (a125cd84, 2025-10-12): weights in round brackets, embeddings by `embedding:name`.

There are no square brackets, no schedules, no AND and no BREAK: they are text. Nothing here recurses, and all takes
time in proportion to the text.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence

from ldm.prompt.chunks import CHUNK_LENGTH, END, START, Chunk, Chunks, check_text

Segment = tuple[str, float]

ROUND = 1.1  # what a pair of brackets without a weight of its own multiplies by
WHOLE_WORD = 8  # a group of fewer tokens than this is not split between chunks
_MARKED = "embedding:"
_BRACKET = re.compile(r"[()]")
_NO_PARTNER = -1  # open to the end of the text
_TEXT = -2  # makes up for a bracket that was closed too often: plain text


def parse_weights(text: str) -> list[Segment]:
    """Split a text into pieces with their weights; neighbours of equal weight stay apart, and there may be none.

    `(x)` multiplies by 1.1; `(x:1.3)` is 1.3 whatever stands around it, and so is anything that Python's float reads:
    `1e2`, `nan`, `1_0`. `\\(` is a bracket as text. What is not closed is text, but for this: if the last character
    closes a bracket inside, that one closes the outer one instead.
    """
    check_text(text)
    # These stand for escaped brackets, as in the original, and may not be in the text themselves for that.
    text = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    partners, places = _partners(text)
    opening = [place for place, partner in partners.items() if partner != _TEXT]
    colons = [match.start() for match in re.finditer(":", text)]
    segments: list[Segment] = []
    ranges = [(0, len(text), 1.0, False)]  # begin, end, weight; whether it is a piece to be given as it is
    while ranges:
        begin, end, weight, is_plain = ranges.pop()
        if is_plain:
            segments.append((text[begin:end], weight))
            continue
        found = []
        place = begin
        while place < end:
            after = bisect.bisect_left(opening, place)
            start = opening[after] if after < len(opening) and opening[after] < end else end
            if start > place:
                found.append((place, start, weight, True))
            if start == end:
                break
            partner = partners[start]
            place = end if partner == _NO_PARTNER or partner >= end else partner + 1
            if place - start >= 2 and text[place - 1] == ")":
                found.append(_inside(text, start + 1, place - 1, weight, colons, places))
            else:
                found.append((start, place, weight, True))
        ranges += reversed(found)
    return [(part.replace("\0\1", ")").replace("\0\2", "("), weight) for part, weight in segments]


def _partners(text: str) -> tuple[dict[int, int], list[int]]:
    """Give, for each opening bracket, where it is closed, and where all brackets are."""
    partners: dict[int, int] = {}
    places, stack, surplus = [], [], 0
    for match in _BRACKET.finditer(text):
        place = match.start()
        places.append(place)
        if match[0] == "(" and surplus:
            surplus -= 1
            partners[place] = _TEXT
        elif match[0] == "(":
            stack.append(place)
            partners[place] = _NO_PARTNER
        elif stack:
            partners[stack.pop()] = place
        else:
            surplus += 1
    return partners, places


def _inside(
    text: str, begin: int, end: int, weight: float, colons: Sequence[int], brackets: Sequence[int]
) -> tuple[int, int, float, bool]:
    """Give the range inside a pair of brackets with its weight, without the weight's own characters."""
    last = bisect.bisect_left(colons, end) - 1
    colon = colons[last] if last >= 0 else -1
    if colon > begin:
        bracket = bisect.bisect_left(brackets, colon)
        if bracket == len(brackets) or brackets[bracket] >= end:  # no number has brackets in it
            try:
                return begin, colon, float(text[colon + 1 : end]), False
            except ValueError:
                pass  # text, as in the original
    return begin, end, weight * ROUND, False


def chunk(
    segments: Sequence[Segment],
    tokenize: Callable[[str], Sequence[int]],
    *,
    embeddings: Callable[[str], Sequence[int] | None] | None = None,
    length: int = CHUNK_LENGTH,
    start: int = START,
    end: int = END,
) -> Chunks:
    """Put the tokens of segments into chunks, of 75 for CLIP, each between a start and an end mark.

    A segment, or an embedding, of fewer than 8 tokens is not split between chunks.

    Args:
        segments: of `parse_weights`.
        tokenize: a text to its token numbers, without marks.
        embeddings: the name in `embedding:name` to the numbers of its vectors, None if there is no such embedding: it
            is then left out, as in the original. None for the whole reads `embedding:name` as text.
        length: tokens of a chunk without its marks.
        start, end: the marks.
    """
    groups: list[tuple[list[int], float]] = []
    for text, weight in segments:
        for word in _words(text):
            if embeddings is not None and word.startswith(_MARKED):
                numbers, word = _embedding(word[len(_MARKED) :], embeddings)
                if numbers:
                    groups.append((list(numbers), weight))
                if not word:
                    continue
            groups.append((list(tokenize(word)), weight))

    chunks: list[Chunk] = []
    ids: list[int] = []
    weights: list[float] = []
    words: list[int] = []

    def close() -> None:
        room = length - len(ids)
        padded = (start, *ids, *[end] * (room + 1))
        around = (1.0, *weights, *[1.0] * (room + 1))
        chunks.append(Chunk(padded, around, len(ids), (0, *words, *[0] * (room + 1))))
        for values in (ids, weights, words):
            values.clear()

    for number, (group, weight) in enumerate(groups, start=1):
        is_large = len(group) >= WHOLE_WORD
        while len(group) + len(ids) > length:
            room = length - len(ids) if is_large else 0
            ids += group[:room]
            weights += [weight] * room
            words += [number] * room
            group = group[room:]
            close()
        ids += group
        weights += [weight] * len(group)
        words += [number] * len(group)
    count = len(chunks) * length + len(ids)
    close()
    return Chunks(tuple(chunks), count)


def absent(segments: Sequence[Segment], embeddings: Callable[[str], Sequence[int] | None]) -> tuple[str, ...]:
    """List the names behind `embedding:` that `chunk` leaves out, as there is no such embedding."""
    marked = (word for text, _ in segments for word in _words(text) if word.startswith(_MARKED))
    names = [(word[len(_MARKED) :].split() or [""])[0] for word in marked]
    return tuple(
        name for name in dict.fromkeys(names) if not (embeddings(name) or embeddings(name.strip(",")))
    )


def _words(text: str) -> list[str]:
    """Split before each `embedding:` that follows a space or a new line."""
    first, *others = re.split(f"[ \n]{_MARKED}", text)
    return [word for word in (first, *(_MARKED + other for other in others)) if word]


def _embedding(
    text: str, embeddings: Callable[[str], Sequence[int] | None]
) -> tuple[Sequence[int] | None, str]:
    """Give the numbers of the embedding that a text begins with, and the text behind its name."""
    name, *others = text.strip("\n").split() or [""]
    rest = " ".join(others)
    numbers = embeddings(name)
    bare = name.strip(",")
    if numbers is None and len(bare) < len(name):
        return embeddings(bare), f"{name[len(bare) :]} {rest}"
    return numbers, rest
