"""A grid of pictures with labels: above its columns, left of its rows, and a title above each grid of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GROUND, INK, PALE = "white", "black", (153, 153, 153)
LEAST_FONT = 10  # pixels
MOST_LINES = 12  # above a column


@dataclass(frozen=True)
class Label:
    """A text beside a row or column; one that is not active is struck through, as in A1111's prompt matrix."""

    text: str
    active: bool = True


Labels = Sequence[Sequence[Label]]  # of each column or row: none, one, or several below one another


def plain(texts: Sequence[str]) -> Labels:
    """Give one label for each text; an empty one takes no room."""
    return [[Label(text)] if text else [] for text in texts]


def labelled(
    pictures: Sequence[Image.Image | None], columns: Labels, rows: Labels, left: int | None = None
) -> Image.Image:
    """Lay pictures out row by row, with labels; None is left blank.

    A cell is as large as the largest picture, its font and the room for the rows' labels as A1111 has them.

    Args:
        pictures: len(rows) times len(columns), one at least that is not None.
        left: room for the rows' labels in pixels; None is three quarters of a cell, or nothing where there are none.
    """
    given = [picture for picture in pictures if picture is not None]
    width, height = (max(sides) for sides in zip(*(one.size for one in given), strict=True))
    size = max(LEAST_FONT, (width + height) // 25)
    font = ImageFont.load_default(size)
    if left is None:
        left = width * 3 // 4 if any(rows) else 0
    gap = size // 2
    above = [_wrap(one, font, width, MOST_LINES) for one in columns]
    beside = [_wrap(one, font, left, height // (size + gap)) for one in rows]
    top = max(map(len, above)) * (size + gap) + gap if any(columns) else 0
    sheet = Image.new("RGB", (left + width * len(columns), top + height * len(rows)), GROUND)
    for place, picture in enumerate(pictures):
        if picture is not None:
            row, column = divmod(place, len(columns))
            sheet.paste(picture, (left + width * column, top + height * row))
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(above):
        _write(pen, lines, font, (left + width * column + width / 2, top / 2), size + gap)
    for row, lines in enumerate(beside):
        _write(pen, lines, font, (left / 2, top + height * row + height / 2), size + gap)
    return sheet


def side_by_side(sheets: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Lay several grids out in one row, each with its title."""
    return sheets[0] if titles == [""] else labelled(sheets, plain(titles), [[]])


def _wrap(labels: Sequence[Label], font: ImageFont.FreeTypeFont, width: int, most: int) -> list[Label]:
    """Break labels into lines that fit, at white space where there is some.

    Args:
        most: lines; the last one of a text that has more ends in dots.
    """
    lines: list[Label] = []
    for label in labels:
        line, left = "", label.text.split()
        while left and len(lines) <= most:
            joined = f"{line} {left[0]}".strip()
            if font.getlength(joined) <= width:
                line = joined
                left.pop(0)
                continue
            if not line:  # a word longer than a line
                fits = _fitting(left[0], font, width)
                line, left[0] = left[0][:fits], left[0][fits:]
            lines.append(Label(line, label.active))
            line = ""
        lines += [Label(line, label.active)] if line else []
    if len(lines) > most > 0:
        lines = [*lines[: most - 1], Label(lines[most - 1].text[:-2] + "...", lines[most - 1].active)]
    return lines


def _fitting(word: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    count = 1
    while count < len(word) and font.getlength(word[: count + 1]) <= width:
        count += 1
    return count


def _write(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[Label],
    font: ImageFont.FreeTypeFont,
    middle: tuple[float, float],
    pitch: int,
) -> None:
    x, y = middle[0], middle[1] - pitch * (len(lines) - 1) / 2
    for line in lines:
        pen.text((x, y), line.text, fill=INK if line.active else PALE, font=font, anchor="mm")
        if not line.active:
            half = font.getlength(line.text) / 2
            pen.line((x - half, y, x + half, y), fill=PALE)
        y += pitch
