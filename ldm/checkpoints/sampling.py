"""What a model's configuration says about painting with it: the section `sampling:` beside `model:`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ldm.errors import MismatchError, nearest, shown

MAX_STEPS = 1000
SIDES = (8, 65_536)  # pixels


@dataclass(frozen=True)
class SamplingDefaults:
    """What the makers of a model advise; None, or nothing, where they say nothing.

    Attributes:
        guidance_scale, steps: where the caller gives none.
        size: (height, width) in pixels, where neither caller nor picture gives one.
        known_sizes: smallest and largest side in pixels that the model paints well.
        known_words: all that a prompt may hold and be understood, in lower case; for models of few words.
        least_steps: sampler, by any of its names -> the fewest steps with which it paints well.
    """

    guidance_scale: float | None = None
    steps: int | None = None
    size: tuple[int, int] | None = None
    known_sizes: tuple[int, int] | None = None
    known_words: frozenset[str] = field(default=frozenset(), repr=False)
    least_steps: Mapping[str, int] = field(default_factory=dict)


def read_sampling(section: Any) -> SamplingDefaults:
    """Check a configuration's section `sampling:` and read it; None is one that says nothing.

    Raises:
        MismatchError: an unknown name, or a value of another kind or out of range; the first of them is named.
    """
    if section is None:
        return SamplingDefaults()
    if not isinstance(section, Mapping):
        raise MismatchError(
            f"the configuration's 'sampling:' should hold names with values, such as 'steps: 20'; got {shown(section)}"
        )
    known = [one.name for one in fields(SamplingDefaults)]
    values = {}
    for name, value in section.items():
        if name not in known:
            near = nearest(name, known)
            raise MismatchError(
                f"the configuration's 'sampling:' has the unknown name {shown(name)}"
                + (f" (did you mean '{near}'?)" if near else "")
                + f"; there are {', '.join(known)}"
            )
        if value is not None:
            values[name] = _READERS[name](f"sampling.{name}", value)
    return SamplingDefaults(**values)


def _wrong(name: str, wanted: str, value: Any) -> MismatchError:
    return MismatchError(f"the configuration's '{name}' should be {wanted}, got {shown(value)}")


def _whole(low: int, high: int, *, multiple: int = 1) -> Callable[[str, Any], int]:
    wanted = f"a {'whole number' if multiple == 1 else f'multiple of {multiple}'} from {low} to {high}"

    def read(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high or value % multiple:
            raise _wrong(name, wanted, value)
        return value

    return read


def _scale(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 100 or math.isnan(value):
        raise _wrong(name, "a number from 0 to 100", value)
    return float(value)


def _size(name: str, value: Any) -> tuple[int, int]:
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2:
        raise _wrong(name, "one side in pixels, or [height, width]", value)
    height, width = (_whole(*SIDES, multiple=8)(name, side) for side in sides)
    return height, width


def _range(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(name, "[smallest, largest] side in pixels", value)
    low, high = (_whole(*SIDES)(name, side) for side in value)
    if low > high:
        raise _wrong(name, "[smallest, largest] side in pixels", value)
    return low, high


def _words(name: str, value: Any) -> frozenset[str]:
    if not isinstance(value, str) or not value.split():
        raise _wrong(name, "one text with the words, parted by spaces", value)
    return frozenset(value.lower().split())


def _steps_by_sampler(name: str, value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping) or not all(isinstance(sampler, str) for sampler in value):
        raise _wrong(name, "samplers with numbers of steps, such as 'plms: 30'", value)
    return {sampler: _whole(1, MAX_STEPS)(f"{name}.{sampler:.40}", steps) for sampler, steps in value.items()}


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "guidance_scale": _scale,
    "steps": _whole(1, MAX_STEPS),
    "size": _size,
    "known_sizes": _range,
    "known_words": _words,
    "least_steps": _steps_by_sampler,
}
