"""The axes of an X/Y/Z grid: which option each goes along, and its values, in the forms of A1111's script.

An axis goes along any option of ldm.options, by its name, its flag's or A1111's word for it, or along one of SPECIAL.
Texts are read by the option's own kind. Knows no torch: scripts/grid.py answers a wrong axis before that is imported.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm import limits, options
from ldm.errors import UsageError, nearest, shown
from ldm.option_kinds import Folder, Kind, Number, Prompt, Size, Whole, Words

# What is no option of its own -> the word before its values.
SPECIAL = {
    "size": "Size",  # width and height at once
    "prompt_sr": "",  # S/R: search and replace
    "prompt_order": "",
    "lora_strength": "LoRA strength",
}
# Of A1111's axes, those that are called otherwise in its pictures' text.
A1111 = {
    "var_seed": "variation_seed",
    "var_strength": "variation_strength",
    "denoising": "strength",
    "prompt_s_r": "prompt_sr",
    "rng_source": "rng",
    "unipc_order": "order",
}
OBJECTS = ("adapters", "image", "mask")  # keywords of plan() that are no options, and have no text
TEXTS = ("prompt", "negative_prompt")
SEEDS = ("seed", "variation_seed")
NO_AXIS = {
    "num_images": "a cell is one picture; go along the seed",
    "batch_size": "a cell is one picture",
    "output_type": "a grid is made of pictures",
}
NONE = ("none", "None")  # an option that is left out
MAX_VALUES = 10_000
_WHOLE, _REAL = r"[+-]?\s*\d+", r"[+-]?\s*\d+(?:\.\d*)?"
_RANGE = r"\s*({0})\s*-\s*({0})\s*(?:\(\s*([+-]\s*{1})\s*\)|\[\s*(\d+)\s*\])?\s*"
_WHOLES = re.compile(_RANGE.format(_WHOLE, r"\d+"))
_REALS = re.compile(_RANGE.format(_REAL, r"\d+(?:\.\d*)?"))


@dataclass(frozen=True)
class Axis:
    """One axis of a grid.

    Attributes:
        name: of an option of ldm.options, of OBJECTS or of SPECIAL.
        values, labels: at each place, what the option is there and what is written beside it.
        given: the values as a text that reads as the same ones again, for the metadata.
        is_drawn: seeds among them were left to chance.
    """

    name: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]
    given: str
    is_drawn: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def put(self, cell: dict[str, Any], place: int) -> None:
        """Set the options of a cell at this place.

        Raises:
            UsageError: a text to be replaced that is in neither prompt, or words to be put in order that are not in it.
        """
        value = self.values[place]
        if self.name == "size":
            cell["width"], cell["height"] = value
        elif self.name == "prompt_sr":
            self._replace(cell, value)
        elif self.name == "prompt_order":
            cell["prompt"] = in_order(cell["prompt"], value)
        elif self.name == "lora_strength":
            cell["lora_strength"] = value
        elif self.name == "lora":
            cell["adapters"] = (*cell.get("adapters", ()), value)
        else:
            cell[self.name] = value

    def _replace(self, cell: dict[str, Any], value: str) -> None:
        wanted = self.values[0]
        if not any(wanted in cell[name] for name in TEXTS):
            raise UsageError(
                f"the grid replaces {shown(wanted)}, the first value of prompt_sr, and it is in neither prompt nor "
                "negative prompt; begin with words that are"
            )
        for name in TEXTS:
            cell[name] = cell[name].replace(wanted, value)


def in_order(prompt: str, words: Sequence[str]) -> str:
    """Put words of a prompt into another order: the places that they have stay, and take them one after the other.

    Raises:
        UsageError: one that is not in the prompt, or only within a place that another has taken.
    """
    places, left = [], prompt
    for word in sorted(words, key=len, reverse=True):
        at = left.find(word)
        if at < 0 or not word:
            raise UsageError(
                f"prompt_order puts words of the prompt in order, and {shown(word)} is not in {shown(prompt)}; "
                "give words that are"
            )
        places.append((at, at + len(word)))
        left = left[:at] + "\0" * len(word) + left[at + len(word) :]  # so that no two share a place
    parts, end = [], 0
    for (start, stop), word in zip(sorted(places), words, strict=True):
        parts += [prompt[end:start], word]
        end = stop
    return "".join([*parts, prompt[end:]])


def read_axis(where: str, given: Any) -> Axis:
    """Read an axis.

    Args:
        where: "x", "y" or "z", as errors call it.
        given: "steps=10,20"; ("steps", "10,20"); ("steps", [10, 20]), texts among which are read as well; or
            ("steps", {"few": 10, "many": 20}) with labels of one's own.

    Raises:
        UsageError: no such axis, an option that no axis goes along, no values, too many, or one that its option
            does not take.
    """
    if isinstance(given, str):
        name, equals, given_values = given.partition("=")
        if not equals:
            raise UsageError(f"--{where} wants an option and its values, as steps=10,20; got {shown(given)}")
    elif isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], str):
        name, given_values = given
    else:
        raise UsageError(
            f'{where} must be an option and its values, as ("steps", [10, 20]), got {shown(given)}'
        )
    name = find_name(where, name)
    labels: list[str] | None = None
    if isinstance(given_values, Mapping):
        labels, given_values = list(map(str, given_values)), list(given_values.values())
    elif isinstance(given_values, str):
        given_values = split_values(where, given_values)
    try:
        given_values = list(given_values)
    except TypeError:
        raise UsageError(f"{where}: the values of {name} must be a list, got {shown(given_values)}") from None
    if not given_values:
        raise UsageError(f"{where}: {name} has no values; give at least one, as {name}=VALUE,VALUE")
    if labels is None and name not in OBJECTS:
        given_values = [one for value in given_values for one in _expanded(where, name, value)]
    _check_count(where, len(given_values))
    if name == "prompt_order":
        return _orders(where, given_values)
    values = tuple(_value(where, name, value) for value in given_values)
    kind = _kind(name)
    said = (
        given_values if kind is not None and kind.is_repeated else values
    )  # as text they are told as they came
    if name in OBJECTS:
        said = labels = labels or [f"{name} {i + 1}" for i in range(len(values))]
    elif labels is None:
        word = _word(name)
        written = map(str, said) if said is given_values else (_written(name, one) for one in said)
        labels = [f"{word}: {one}" if word else one for one in written]
    # A1111's word may be another program's, too: what reads as the same again is our own.
    own = [one if isinstance(one, str) else _written(name, one) for one in said]
    return Axis(name, values, tuple(labels), _joined(own))


def find_name(where: str, name: str) -> str:
    """Find the option that an axis' name means, also a flag's or A1111's; the nearest name is said of any other."""
    found = [one for one in options.options() if one.keyword or one.name in ("prompt", "lora")]
    known = {_bare(one): one for one in (*SPECIAL, *OBJECTS, *(option.name for option in found))}
    for option in found:  # an option's own name goes before what others are called elsewhere
        for other in (*option.names, option.infotext or option.name):
            known.setdefault(_bare(other), option.name)
    known = {**A1111, **known}
    bare = _bare(name)
    if bare not in known:
        near = nearest(bare, known, 0.7)
        hint = f"did you mean {near}?" if near else "see docs/grids.md"
        raise UsageError(f"{where}: a grid has no axis {shown(name.strip())}; {hint}")
    if known[bare] in NO_AXIS:
        raise UsageError(f"{where}: no axis of a grid goes along {known[bare]}: {NO_AXIS[known[bare]]}")
    return known[bare]


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def split_values(where: str, text: str) -> list[str]:
    """Split values at commas; one that holds a comma stands in double quotes, and "" within them is a quote."""
    try:
        rows = list(csv.reader(io.StringIO(text), skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UsageError(
            f'{where}: cannot read the values {shown(text)} ({error}); write "a, b",c and close quotes'
        ) from None
    return [value.strip() for row in rows for value in row]


def _joined(values: Sequence[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(values)
    return out.getvalue()


def _kind(name: str) -> Kind | None:
    if name == "size":
        return Size(*limits.SIDE)
    if name == "lora_strength":
        return Number(-100, 100)
    if name in SPECIAL:
        return Kind()
    return None if name in OBJECTS else options.option(name).kind


def _expanded(where: str, name: str, value: Any) -> list[Any]:
    """Expand a range of numbers: "1-5", "1-5 (+2)", "1-10 [5]"; anything else is itself."""
    kind = _kind(name)
    pattern = _WHOLES if isinstance(kind, Whole) else _REALS if isinstance(kind, Number) else None
    found = pattern.fullmatch(value) if pattern is not None and isinstance(value, str) else None
    if found is None or (name in SEEDS and value.strip() == "-1"):
        return [value]
    is_whole = pattern is _WHOLES
    number = int if is_whole else float
    try:
        start, end, step = (number((part or "0").replace(" ", "")) for part in found.groups()[:3])
        parts = int(found[4] or 0)
    except ValueError:  # more digits than Python reads
        raise UsageError(f"{where}: {name} has a range of numbers too long: {shown(value)}") from None
    if found[4]:
        _check_count(where, parts)
        if not parts:
            raise UsageError(f"{where}: the range {shown(value)} has no values; write [1] or more")
        gap = (end - start) / max(parts - 1, 1)
        return [start + int(gap * i) if is_whole else round(start + gap * i, 12) for i in range(parts)]
    step = step or (0 if found[3] else number(1))
    if not step or (end - start) * step < 0:
        raise UsageError(
            f"{where}: the range {shown(value)} never comes to its end; write (+N) to go up, (-N) to go down"
        )
    count = int((end - start) / step + 1e-6) + 1 if not is_whole else (end - start) // step + 1
    _check_count(where, count)
    return [start + step * i if is_whole else round(start + step * i, 12) for i in range(count)]


def _check_count(where: str, count: int) -> None:
    if count > MAX_VALUES:
        raise UsageError(f"{where}: an axis has at most {MAX_VALUES} values, got {count}; give fewer")


def _value(where: str, name: str, value: Any) -> Any:
    """Read a text as its option's kind does, and hold a number against its limits; plan() checks all others."""
    kind = _kind(name)
    if kind is None or (name in SEEDS and value == -1):
        return value if kind is None else None
    if name == "lora" and value in ("", *NONE, None):
        return None
    if isinstance(value, str) and value in NONE and _may_be_none(name):
        return None
    if name in (*TEXTS, "prompt_sr") and not isinstance(value, str):
        raise UsageError(f"{where}: a value of {name} must be a text, got {shown(value)}")
    if isinstance(kind, Whole | Number) and isinstance(value, int | float) and not isinstance(value, bool):
        return kind.check(f"{where}: {name}", value)
    try:
        found = kind.parse(value) if isinstance(value, str) else value
        return (found,) if kind.is_repeated and isinstance(value, str) and name != "lora" else found
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{where}: {name}: {error}") from None


def _may_be_none(name: str) -> bool:
    """Tell whether an option may be left out, by a word that is no value of its own."""
    kind = _kind(name)
    if name in SPECIAL or isinstance(kind, Prompt | Folder):
        return False
    return options.option(name).default is None and NONE[0] not in getattr(kind, "words", ())


def _orders(where: str, words: list[Any]) -> Axis:
    if not all(isinstance(word, str) for word in words) or len(words) > 7:
        raise UsageError(f"{where}: prompt_order wants up to 7 texts (5,040 orders), got {len(words)} values")
    values = tuple(itertools.permutations(words))
    return Axis("prompt_order", values, tuple(map(", ".join, values)), _joined(words))


def _word(name: str) -> str:
    """Give what stands before a value; nothing where it says itself what it is, as in A1111."""
    if name in SPECIAL:
        return SPECIAL[name]
    if name in (*TEXTS, *OBJECTS, "sampler", "lora"):
        return ""
    return options.option(name).infotext or name


def _written(name: str, value: Any) -> str:
    kind = _kind(name)
    if value is None:
        return "-1" if name in SEEDS else "none"
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(kind, Words) and isinstance(value, str):
        return kind.write(value)
    if isinstance(value, list | tuple):
        return ("x" if isinstance(kind, Size) else ", ").join(map(str, value))
    return str(value)


def with_seeds(axis: Axis, draw: Any) -> Axis:
    """Draw the seeds of an axis that are left to chance, once for the whole grid."""
    if axis.name not in SEEDS or None not in axis.values:
        return axis
    values = tuple(draw() if one is None else one for one in axis.values)
    word = _word(axis.name)
    labels = tuple(
        f"{word}: {value}" if was is None else label
        for was, value, label in zip(axis.values, values, axis.labels, strict=True)
    )
    return replace(axis, values=values, labels=labels, is_drawn=True)
