"""Which levels a sampler visits: the historic DDIM lists, and lists of exactly the length asked for."""

import operator

import numpy as np

from ldm.errors import UsageError

COMPVIS_METHODS = ("uniform", "quad")
EXACT_METHODS = ("uniform", "quad", "leading", "trailing", "linspace")


def check_steps(num_steps: int, num_train: int, *, name: str = "num_steps") -> int:
    """Return num_steps as an int, or raise UsageError unless it is a whole number in 1..num_train."""
    try:
        if isinstance(num_steps, bool):
            raise TypeError
        value = operator.index(num_steps)
    except TypeError:
        value = None
    if value is None or not 1 <= value <= num_train:
        raise UsageError(f"{name} must be a whole number from 1 to {num_train}, got {num_steps!r}")
    return value


def _quadratic(num_steps: int, num_train: int) -> np.ndarray:
    return (np.linspace(0, np.sqrt(0.8 * num_train), num_steps) ** 2).astype(np.int64) + 1


def compvis_levels(method: str, num_steps: int, num_train: int) -> np.ndarray:
    """List DDIM levels exactly as CompVis's make_ddim_timesteps did, quirks included.

    "uniform" strides by num_train // num_steps and adds one to every level. Unless num_steps divides
    num_train the list therefore has more entries than were asked for, and its last entry may be num_train
    itself, which is no level of the model: of the step counts 1..1000 over 1000 levels, 984 give another
    count and 599 reach level 1000. "quad" always has num_steps entries, but the lowest repeat
    (50 steps: 1, 1, 2, 3, 6, ...).

    Returns:
        int64 (n,), ascending.

    Raises:
        UsageError: an unknown method, or num_steps outside 1..num_train.
    """
    if method not in COMPVIS_METHODS:
        raise UsageError(
            f"the historic DDIM spacing must be one of {', '.join(COMPVIS_METHODS)}; got {method!r}"
        )
    num_steps = check_steps(num_steps, num_train)
    if method == "quad":
        return _quadratic(num_steps, num_train)
    return np.arange(0, num_train, num_train // num_steps, dtype=np.int64) + 1


def exact_levels(method: str, num_steps: int, num_train: int) -> np.ndarray:
    """List exactly num_steps distinct levels, all of them within [0, num_train - 1].

    * "uniform": floor(i * T / S) + 1, the one dropped only when S == T. Equal to `compvis_levels` wherever S
      divides T (and S < T).
    * "quad": the historic quadratic list; entries that repeat move up to the next free level.
    * "leading": i * (T // S) + 1, the one dropped only when S == T: diffusers' "leading" with steps_offset 1.
    * "trailing": round(T - i * T / S) - 1, always with the top level: diffusers' "trailing".
    * "linspace": round(linspace(0, T - 1, S)), with both ends; a single step is the top level.

    Returns:
        int64 (num_steps,), strictly ascending.

    Raises:
        UsageError: an unknown method, or num_steps outside 1..num_train.
    """
    if method not in EXACT_METHODS:
        raise UsageError(f"the spacing must be one of {', '.join(EXACT_METHODS)}; got {method!r}")
    steps, train = check_steps(num_steps, num_train), num_train
    index = np.arange(steps, dtype=np.int64)
    offset = 0 if steps == train else 1  # CompVis's +1, as long as the top level stays below num_train
    if method == "uniform":
        return index * train // steps + offset
    if method == "leading":
        return index * (train // steps) + offset
    if method == "trailing":
        return np.round(train - index * train / steps).astype(np.int64)[::-1] - 1
    if method == "linspace":
        return np.round(np.linspace(0, train - 1, steps)).astype(np.int64) if steps > 1 else index + train - 1
    levels = _quadratic(steps, train)
    levels = np.maximum.accumulate(levels - index) + index  # no two equal
    return np.minimum(levels, train - steps + index)  # room for those above
