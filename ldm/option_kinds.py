"""Kinds of values that an option of a painting may have: how each is read, checked, written and shown.

A kind knows nothing of any option; ldm.options says which option has which kind. Knows no torch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ldm import limits
from ldm.errors import UsageError, nearest, shown

MAX_WHOLE = 2**64 - 1  # of seeds, the largest whole numbers that anybody writes into a picture


class Kind:
    """What the values of an option are; a text, where a kind does not say otherwise.

    Methods: `parse` reads a word of the command line or of a prompt file and raises argparse.ArgumentTypeError; `check`
    holds a keyword's value against its limits and raises UsageError; `plain` gives a value as JSON has it. `read` and
    `take` read a picture's text and its JSON, which anybody may have written: None is what no such value is. `schema`
    describes values as JSON has them, in JSON Schema's words; what it cannot say only `check` knows.
    """

    parts = 1  # words behind a flag; where they are more, `part` is the kind of each
    is_switch = False  # a flag without a word
    is_repeated = False  # a flag that may be given several times

    def parse(self, text: str) -> Any:
        return text

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, str):
            raise UsageError(f"{name} must be a text, got {shown(value)}")
        return value

    def plain(self, value: Any) -> Any:
        return value

    def write(self, value: Any) -> str | None:
        return str(value)

    def read(self, text: str) -> Any:
        return text

    def take(self, value: Any) -> Any:
        return value if isinstance(value, str) else None

    def schema(self) -> dict[str, Any]:
        return {"type": "string"}


class Prompt(Kind):
    """Any text that can be encoded, of at most limits.MAX_PROMPT characters."""

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "maxLength": limits.MAX_PROMPT}

    def parse(self, text: str) -> str:
        if len(text) > limits.MAX_PROMPT:
            raise argparse.ArgumentTypeError(
                f"wanted at most {limits.MAX_PROMPT} characters, got {len(text)}; shorten it"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise argparse.ArgumentTypeError(
                f"wanted text, got characters that are none (lone surrogates): {shown(text)}"
            ) from None
        return text


class Folder(Kind):
    """The path of a folder."""

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, str | os.PathLike) or not str(value):  # nothing would be the working folder
            raise UsageError(f"{name} must be a path, got {shown(value)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1}


class Words(Kind):
    """A name of ours that A1111 has a word for.

    Args:
        words: ours -> A1111's.
        also: further words of A1111 -> ours; None is nothing.
    """

    def __init__(self, words: Mapping[str, str], also: Mapping[str, str | None] | None = None):
        self.words = words
        self.also = also or {}

    def write(self, value: Any) -> str | None:
        return self.words.get(value, value) if isinstance(value, str) else None

    def read(self, text: str) -> str | None:
        return {**{word: name for name, word in self.words.items()}, **self.also}.get(text, text)

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "examples": list(self.words)}


class Choice(Words):
    """One of a few names of ours, each with A1111's word, beside which other words may stand for one."""

    def parse(self, text: str) -> str:
        found = self.also.get(text.lower(), text.lower())
        if found not in self.words:
            near = nearest(text.lower(), [*self.words, *self.also])
            hint = f"; did you mean {self.also.get(near, near)!r}?" if near else ""
            raise argparse.ArgumentTypeError(
                f"wanted one of {', '.join(self.words)}; got {shown(text)}{hint}"
            )
        return found

    def check(self, name: str, value: Any) -> str:
        return limits.choice(name, value, tuple(self.words))

    def read(self, text: str) -> str:
        try:
            return self.parse(text)
        except argparse.ArgumentTypeError:
            return text  # another program's, kept as it is said

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.words)}


class Upscaler(Choice):
    """An upscaler, in our spelling or A1111's; anything else is a weight file's, which only a request looks for.

    Pictures say a file's name without folder and suffix.
    """

    suffixes = (".pth", ".pt", ".safetensors", ".ckpt", ".bin")

    def __init__(self, words: Mapping[str, str]):
        super().__init__(words, {word.lower(): name for name, word in words.items()})

    def parse(self, text: str) -> str:
        found = self.also.get(text.lower(), text.lower())
        return found if found in self.words else text

    def check(self, name: str, value: Any) -> str:
        if not isinstance(value, str | os.PathLike):
            raise UsageError(
                f"{name} must be one of {', '.join(self.words)} or a weight file, got {shown(value)}"
            )
        return self.parse(os.fspath(value))

    def plain(self, value: Any) -> Any:
        if not isinstance(value, str) or value in self.words:
            return value
        name = os.path.basename(value)
        stem, suffix = os.path.splitext(name)
        return stem if suffix.lower() in self.suffixes else name

    def write(self, value: Any) -> str | None:
        return super().write(self.plain(value))

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "examples": list(self.words)}


class Whole(Kind):
    """A whole number from low to high, both included.

    Args:
        word: that may stand in place of a number.
    """

    def __init__(self, low: int, high: int, word: str | None = None):
        self.low, self.high, self.word = low, high, word

    def parse(self, text: str) -> int | str:
        if self.word is not None and text == self.word:
            return text
        wanted = f"wanted {limits.about_whole(self.low, self.high)}, got {shown(text)}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(wanted) from None
        if not limits.is_whole(value, self.low, self.high):
            raise argparse.ArgumentTypeError(wanted)
        return value

    def check(self, name: str, value: Any) -> int:
        if self.word is not None and not limits.is_whole(value, self.low, self.high):
            about = limits.about_whole(self.low, self.high)
            raise UsageError(f"{name} must be {about}, or {self.word!r}; got {shown(value)}")
        return limits.whole(name, value, self.low, self.high)

    def read(self, text: str) -> int | None:
        return int(text) if re.fullmatch(r"[0-9]{1,20}", text) and int(text) <= MAX_WHOLE else None

    def take(self, value: Any) -> int | None:
        sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_WHOLE
        return int(value) if sound and value == int(value) else None

    def schema(self) -> dict[str, Any]:
        number = {"type": "integer", "minimum": self.low, "maximum": self.high}
        return number if self.word is None else {"anyOf": [number, {"const": self.word}]}


class Seed(Whole):
    """A seed from 0 to 2^64 - 1; "random", or -1 as A1111 has it, is None."""

    def __init__(self):
        super().__init__(*limits.SEED)

    def parse(self, text: str) -> int | None:
        if text.strip() in ("random", "-1"):
            return None
        try:
            return super().parse(text)
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"wanted a seed from 0 to 2^64-1, or -1 or 'random' to draw one, got {shown(text)}"
            ) from None

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [super().schema(), {"enum": [-1, "random", None]}]}


class Number(Kind):
    """A finite number from low to high, both included."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def parse(self, text: str) -> float:
        wanted = f"wanted {limits.about_real(self.low, self.high)}, got {shown(text)}"
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(wanted) from None
        if not limits.is_real(value, self.low, self.high):
            raise argparse.ArgumentTypeError(wanted)
        return value

    def check(self, name: str, value: Any) -> float:
        return limits.real(name, value, self.low, self.high)

    def read(self, text: str) -> float | None:
        try:
            value = float(text[:40])
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    def take(self, value: Any) -> float | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and abs(value) <= MAX_WHOLE else None

    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.low, "maximum": self.high}


class Levels(Words):
    """The name of a spacing; or, as a keyword and in a picture's JSON, sigmas."""

    def take(self, value: Any) -> Any:
        numbers = [Number(0, math.inf).take(one) for one in value] if isinstance(value, list) else [None]
        return super().take(value) if None in numbers else numbers

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [super().schema(), {"type": "array", "items": {"type": "number"}, "minItems": 2}]}


class Interval(Kind):
    """Two numbers from low to high, the first no greater than the second."""

    parts = 2

    def __init__(self, low: float, high: float):
        self.part = Number(low, high)

    def parse(self, text: str) -> tuple[float, ...]:
        ends = text.replace(",", " ").split()
        if len(ends) != 2:
            raise argparse.ArgumentTypeError(
                f"wanted two numbers from {self.part.low:g} to {self.part.high:g}, got {shown(text)}"
            )
        return tuple(map(self.part.parse, ends))

    def check(self, name: str, value: Any) -> tuple[float, float]:
        low, high = self.part.low, self.part.high
        is_pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
        if not is_pair or not all(limits.is_real(end, low, high) for end in value) or value[0] > value[1]:
            raise UsageError(
                f"{name} must be (low, high) with {low:g} <= low <= high <= {high:g}, got {shown(value)}"
            )
        return float(value[0]), float(value[1])

    def plain(self, value: Any) -> list[float]:
        return list(value)

    def write(self, value: Any) -> str:
        return f"{value[0]} to {value[1]}"

    def read(self, text: str) -> list[float] | None:
        numbers = [self.part.read(part) for part in text.split(" to ")]
        return numbers if len(numbers) == 2 and None not in numbers else None

    def take(self, value: Any) -> list[float] | None:
        numbers = [self.part.take(one) for one in value] if isinstance(value, list) else []
        return numbers if len(numbers) == 2 and None not in numbers else None

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.part.schema(), "minItems": 2, "maxItems": 2}


class Size(Kind):
    """(width, height) in pixels, each from low to high; "512x384" in words."""

    def __init__(self, low: int, high: int):
        self.side = Whole(low, high)

    def parse(self, text: str) -> tuple[int, int]:
        sides = text.lower().split("x")
        if len(sides) != 2:
            raise argparse.ArgumentTypeError(f"wanted WIDTHxHEIGHT in pixels, as 512x384, got {shown(text)}")
        return self.side.parse(sides[0]), self.side.parse(sides[1])

    def check(self, name: str, value: Any) -> tuple[int, int]:
        low, high = self.side.low, self.side.high
        is_pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
        if not is_pair or not all(limits.is_whole(side, low, high) for side in value):
            raise UsageError(
                f"{name} must be (width, height) in pixels, each from {low} to {high}, got {shown(value)}"
            )
        return int(value[0]), int(value[1])

    def plain(self, value: Any) -> list[int] | None:
        return None if value is None else list(value)

    def write(self, value: Any) -> str:
        return f"{value[0]}x{value[1]}"

    def read(self, text: str) -> list[int] | None:
        sides = [self.side.read(side) for side in text.split("x")]
        return sides if len(sides) == 2 and None not in sides else None

    def take(self, value: Any) -> list[int] | None:
        sides = [self.side.take(side) for side in value] if isinstance(value, list) else []
        return sides if len(sides) == 2 and None not in sides else None

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.side.schema(), "minItems": 2, "maxItems": 2}


class Numbers(Kind):
    """So many numbers from low to high each, both included, in one word: "1.5,1.6,0.9,0.2"."""

    def __init__(self, count: int, low: float, high: float):
        self.count, self.part = count, Number(low, high)

    def parse(self, text: str) -> tuple[float, ...]:
        words = text.replace(",", " ").split()
        if len(words) != self.count:
            raise argparse.ArgumentTypeError(
                f"wanted {self.count} numbers with commas between, got {shown(text)}"
            )
        return tuple(map(self.part.parse, words))

    def check(self, name: str, value: Any) -> tuple[float, ...]:
        low, high = self.part.low, self.part.high
        is_row = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == self.count
        if not is_row or not all(limits.is_real(one, low, high) for one in value):
            raise UsageError(
                f"{name} must be {self.count} numbers from {low:g} to {high:g} each, got {shown(value)}"
            )
        return tuple(map(float, value))

    def plain(self, value: Any) -> list[float] | None:
        return None if value is None else list(value)

    def write(self, value: Any) -> str:
        return ", ".join(map(str, value))

    def read(self, text: str) -> list[float] | None:
        return self.take([self.part.read(part.strip()) for part in text[:200].split(",")])

    def take(self, value: Any) -> list[float] | None:
        numbers = [self.part.take(one) for one in value] if isinstance(value, list) else []
        return numbers if len(numbers) == self.count and None not in numbers else None

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.part.schema(), "minItems": self.count, "maxItems": self.count}


class Region(NamedTuple):
    """A part of a picture with a prompt of its own.

    Attributes:
        prompt: what is painted there.
        box: x, y, width, height as shares of the picture's width and height, from its upper left corner.
        weight: of this prompt's answer beside the whole picture's, which has 1.
    """

    prompt: str
    box: tuple[float, float, float, float]
    weight: float = 1.0


class Regions(Kind):
    """Parts of a picture with prompts of their own; a word "0.5,0,0.5,1,0.8:a blue square" is one of them."""

    is_repeated = True
    wanted = (
        "x,y,width,height:prompt or x,y,width,height,weight:prompt with shares of the picture from 0 to 1, such as "
        "0.5,0,0.5,1:a blue square"
    )

    def parse(self, text: str) -> Region:
        numbers, colon, prompt = text.partition(":")
        words = numbers.split(",")
        try:
            values = tuple(map(float, words))
        except ValueError:
            values = ()
        if not colon or len(values) not in (4, 5):
            raise argparse.ArgumentTypeError(f"wanted {self.wanted}, got {shown(text)}")
        fault = self._fault(values)
        if fault:
            raise argparse.ArgumentTypeError(f"{fault}, got {shown(text)}")
        return Region(Prompt().parse(prompt.strip()), values[:4], *values[4:])

    def word(self, region: Region) -> str:
        """Write one as the word that `parse` reads."""
        return f"{','.join(map(str, (*region.box, region.weight)))}:{region.prompt}"

    @staticmethod
    def _fault(values: Sequence[float]) -> str | None:
        """Say what is wrong with x, y, width, height and a weight that may be there; None where nothing is."""
        if not all(limits.is_real(one, *limits.SHARE) for one in values[:4]):
            return "wanted x, y, width and height from 0 to 1, shares of the picture"
        x, y, width, height = values[:4]
        if min(width, height) == 0 or max(x + width, y + height) > 1 + 1e-6:
            return "wanted a width and height above 0 within the picture: x + width and y + height at most 1"
        if not all(limits.is_real(one, *limits.REGION_WEIGHT) for one in values[4:]):
            return f"wanted a weight from {limits.REGION_WEIGHT[0]} to {limits.REGION_WEIGHT[1]}"
        return None

    def check(self, name: str, value: Any) -> tuple[Region, ...]:
        if not isinstance(value, list | tuple):
            raise UsageError(
                f"{name} must be a list of (prompt, (x, y, width, height)) or (prompt, box, weight), got {shown(value)}"
            )
        if len(value) > limits.REGIONS[1]:
            raise UsageError(f"{name}: at most {limits.REGIONS[1]} work together, got {len(value)}")
        return tuple(self._region(f"{name}[{i}]", one) for i, one in enumerate(value))

    def _region(self, name: str, value: Any) -> Region:
        try:
            if isinstance(value, str):
                return self.parse(value)
            is_row = isinstance(value, list | tuple) and len(value) in (2, 3) and isinstance(value[0], str)
            is_row = is_row and isinstance(value[1], list | tuple) and len(value[1]) == 4
            if not is_row:
                raise argparse.ArgumentTypeError(
                    f"wanted (prompt, (x, y, width, height)) or (prompt, box, weight), got {shown(value)}"
                )
            fault = self._fault((*value[1], *value[2:]))
            if fault:
                raise argparse.ArgumentTypeError(f"{fault}, got {shown(value)}")
            return Region(Prompt().parse(value[0]), tuple(map(float, value[1])), *map(float, value[2:]))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{name}: {error}") from None

    def plain(self, value: Any) -> list[Any]:
        return [[one[0], list(one[1]), *one[2:]] for one in value]

    def write(self, value: Any) -> str:
        return json.dumps(self.plain(value), ensure_ascii=False)

    def read(self, text: str) -> list[Any] | None:
        try:
            return self.take(json.loads(text))
        except (ValueError, RecursionError):
            return None

    def take(self, value: Any) -> list[Any] | None:
        try:
            return self.plain(self.check("regions", value))
        except UsageError:
            return None

    def schema(self) -> dict[str, Any]:
        share = Number(*limits.SHARE).schema()
        box = {"type": "array", "items": share, "minItems": 4, "maxItems": 4}
        row = [Prompt().schema(), box, Number(*limits.REGION_WEIGHT).schema()]
        text = {"type": "string", "description": self.wanted}
        one = {"type": "array", "prefixItems": row, "minItems": 2, "maxItems": 3}
        return {"type": "array", "items": {"anyOf": [one, text]}, "maxItems": limits.REGIONS[1]}


class Wholes(Numbers):
    """So many whole numbers from low to high each, both included, in one word: "64,0,64,0"."""

    def __init__(self, count: int, low: int, high: int):
        super().__init__(count, low, high)
        self.part = Whole(low, high)

    def check(self, name: str, value: Any) -> tuple[int, ...]:
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == self.count:
            return tuple(self.part.check(name, one) for one in value)
        low, high = self.part.low, self.part.high
        raise UsageError(
            f"{name} must be {self.count} whole numbers from {low} to {high} each, got {shown(value)}"
        )


class Switch(Kind):
    """On or off.

    Args:
        word: what A1111 has for on, where that is not True.
    """

    is_switch = True

    def __init__(self, word: str = "True"):
        self.word = word

    def parse(self, text: str) -> bool:
        if text.lower() not in ("", "true", "false"):
            raise argparse.ArgumentTypeError(f"wanted nothing, true or false after it, got {shown(text)}")
        return text.lower() != "false"

    def check(self, name: str, value: Any) -> Any:
        # numpy's bool has no common class with Python's.
        if type(value).__name__ not in ("bool", "bool_"):
            raise UsageError(f"{name} must be True or False, got {shown(value)}")
        return value

    def write(self, value: Any) -> str | None:
        return self.word if value else "False"

    def read(self, text: str) -> bool | None:
        return {self.word: True, "False": False}.get(text)

    def take(self, value: Any) -> bool | None:
        return value if isinstance(value, bool) else None

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


class Files(Kind):
    """Files that a flag names, with what is said of each; the flag may be given several times.

    Args:
        reader: (module, function) that reads the flag's text, of ldm.cli, which is above this module.
    """

    is_repeated = True

    def __init__(self, module: str, function: str):
        self.module, self.function = module, function

    def parse(self, text: str) -> Any:
        import importlib

        return getattr(importlib.import_module(self.module), self.function)(text)


class Part(Files):
    """What a flag says of the adapter that the flag before it names: the pair of the option's name and a value.

    All flags of such options (Option.into) fill one list, in the order in which they are given.

    Args:
        name: of the option.
        kind: of the value.
        begins: the flag names an adapter's file, and those that follow are said of it.
    """

    def __init__(self, name: str, kind: Kind, begins: bool = False):
        self.name, self.kind, self.begins = name, kind, begins

    def parse(self, text: str) -> tuple[str, Any]:
        return self.name, self.kind.parse(text)
