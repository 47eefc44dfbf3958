"""How far the numbers of a request may go, and the checks that hold a value against its limits."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.errors import UsageError, shown

MAX_SEED = 2**64 - 1  # of its bits the generator on the CPU keeps the lowest 32


def whole(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number within low and high, both included, or raise UsageError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
    return int(value)


def real(name: str, value: Any, low: float, high: float) -> float:
    """Return a finite number within low and high, both included, or raise UsageError."""
    sound = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not sound or not low <= value <= high:  # NaN is in no range
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}")
    return float(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    """Return a value that is one of the choices, or raise UsageError with all of them."""
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")
    return value
