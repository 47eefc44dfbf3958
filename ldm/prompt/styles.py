"""Styles: pieces of prompts by name, in a CSV as AUTOMATIC1111's web UI writes it (name, prompt, negative_prompt)."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ldm.errors import AbsentError, FormatError, UsageError, nearest, nearest_file, shown

MAX_BYTES = 10 * 2**20
PLACE = "{prompt}"  # where a style takes the prompt in


@dataclass(frozen=True)
class Style:
    """What a style adds to a prompt and to a negative one."""

    prompt: str
    negative_prompt: str


def read_styles(path: str | os.PathLike) -> dict[str, Style]:
    """Read styles by their names; of two rows of one name the last counts, as in the web UI.

    Raises:
        AbsentError: no such file. FormatError: no text, too large, or without the columns name and prompt.
    """
    name = os.fsdecode(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (FileNotFoundError, NotADirectoryError):
        near = nearest_file(path)
        hint = f"did you mean {near!r}?" if near else "check the path"
        raise AbsentError(f"styles '{name}' are not there; {hint}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise FormatError(
            f"cannot read styles '{name}': {error}; give the web UI's styles.csv, in UTF-8"
        ) from None
    if not rows or not {"name", "prompt"} <= {key for key in rows[0] if key}:
        raise FormatError(f"styles '{name}' hold no rows under name,prompt,negative_prompt; give such a CSV")
    # A short row lacks its last columns.
    return {
        row["name"]: Style(row["prompt"] or "", row.get("negative_prompt") or "")
        for row in rows
        if row["name"]
    }


def with_styles(
    prompt: str, negative_prompt: str, names: Iterable[str], styles: Mapping[str, Style]
) -> tuple[str, str]:
    """Put styles into a prompt and its negative one, in the order of their names.

    A style takes the prompt in where it says {prompt}; otherwise it follows after a comma.

    Raises:
        UsageError: no style goes by a name.
    """
    for name in names:
        if name not in styles:
            near = nearest(name, styles)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(list(styles)[:12]):.200}"
            raise UsageError(f"no style goes by {shown(name)}; {hint}")
        prompt = _merged(styles[name].prompt, prompt)
        negative_prompt = _merged(styles[name].negative_prompt, negative_prompt)
    return prompt, negative_prompt


def _merged(style: str, prompt: str) -> str:
    if PLACE in style:
        return style.replace(PLACE, prompt)
    return ", ".join(part for part in (prompt.strip(), style.strip()) if part)
