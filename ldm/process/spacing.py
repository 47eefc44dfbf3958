"""Which levels a sampler goes through: the historic DDIM lists, and lists of exactly the length wanted."""

import operator
from collections.abc import Sequence

import numpy as np

from ldm.errors import UsageError, shown

COMPVIS_METHODS = ("uniform", "quad")
EXACT_METHODS = ("uniform", "quad", "leading", "trailing", "linspace")
CONTINUOUS_METHODS = ("time_uniform", "time_quadratic", "logSNR")


def check_steps(num_steps: int, num_train: int, *, name: str = "num_steps") -> int:
    """Return num_steps as an int, or raise UsageError unless it is a whole number in 1..num_train."""
    try:
        if isinstance(num_steps, bool):
            raise TypeError
        value = operator.index(num_steps)
    except TypeError:
        value = None
    if value is None or not 1 <= value <= num_train:
        raise UsageError(f"{name} must be a whole number from 1 to {num_train}, got {shown(num_steps)}")
    return value


def _quadratic(num_steps: int, num_train: int) -> np.ndarray:
    return (np.linspace(0, np.sqrt(0.8 * num_train), num_steps) ** 2).astype(np.int64) + 1


def compvis_levels(method: str, num_steps: int, num_train: int) -> np.ndarray:
    """List DDIM levels exactly as CompVis's make_ddim_timesteps did, quirks included.

    "uniform" strides by num_train // num_steps and adds one to every level. Unless num_steps divides
    num_train the list therefore has more entries than num_steps, and its last entry may be num_train
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
            f"the historic DDIM spacing must be one of {', '.join(COMPVIS_METHODS)}; got {shown(method)}"
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
        raise UsageError(f"the spacing must be one of {', '.join(EXACT_METHODS)}; got {shown(method)}")
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


def section_levels(num_train: int, counts: Sequence[int]) -> np.ndarray:
    """Divide the levels into sections of equal length and take so many of each, evenly, both ends included.

    Improved DDPM (arXiv:2102.09672, section 4), as in its code: sections that cannot be equal are longer by one
    from the cleanest on, fractions are rounded half to even, and a section's single level is its cleanest.

    Args:
        num_train: number of levels of the model.
        counts: how many levels of each section, the cleanest section first; each at least 0.

    Returns:
        int64 (sum(counts),), strictly ascending.

    Raises:
        UsageError: a section shorter than its count, a negative count, or no level at all.
    """
    if sum(counts) < 1:
        raise UsageError(f"a chain needs at least 1 level to visit, got section counts {list(counts)}")
    length, longer = divmod(num_train, len(counts))
    levels, start = [], 0
    for i, count in enumerate(counts):
        size = length + (i < longer)
        if not 0 <= count <= size:
            raise UsageError(
                f"section {i + 1} of {len(counts)} has {size} of {num_train} levels, so its count must be from "
                f"0 to {size}; got {count}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        levels += [start + round(j * stride) for j in range(count)]
        start += size
    return np.array(levels, dtype=np.int64)


def stride_levels(num_train: int, num_steps: int) -> np.ndarray:
    """List exactly num_steps levels, a whole stride apart, from level 0 on: DDIM's spacing in OpenAI's code.

    The stride is the smallest that gives this number.

    Returns:
        int64 (num_steps,), ascending.

    Raises:
        UsageError: no whole stride from 1 to num_train - 1 gives so many; the message names the numbers near
            it that one gives.
    """
    possible = {len(range(0, num_train, stride)): stride for stride in range(max(num_train - 1, 1), 0, -1)}
    if num_steps not in possible:
        below = max((n for n in possible if n < num_steps), default=None)
        above = min((n for n in possible if n > num_steps), default=None)
        near = " or ".join(str(n) for n in (below, above) if n is not None) or "none"
        raise UsageError(
            f"{num_train} levels have no whole stride that visits exactly {num_steps} of them; possible near "
            f"it: {near}"
        )
    return np.arange(0, num_train, possible[num_steps], dtype=np.int64)


def continuous_levels(method: str, num_steps: int, alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide the whole range of levels into num_steps steps that may end between two levels.

    The discrete schedule of DPM-Solver (arXiv:2206.00927, appendix D.1): level t of T lies at time (t + 1) / T,
    log alpha_bar is linear in time between levels, and a run goes from time 1 to time 1 / T.

    Args:
        method: what is divided evenly: "time_uniform" time, "time_quadratic" its square root, "logSNR" the
            log-SNR.
        alpha_bar: (T,) float64, falling, in (0, 1).

    Returns:
        (t, alpha_bar): each float64 (num_steps + 1,), cleanest first. t is in levels, fractional, from 0 to
        T - 1: what the network is called with.

    Raises:
        UsageError: an unknown method, or num_steps outside 1..T.
    """
    if method not in CONTINUOUS_METHODS:
        raise UsageError(f"the spacing must be one of {', '.join(CONTINUOUS_METHODS)}; got {shown(method)}")
    train = len(alpha_bar)
    steps = check_steps(num_steps, train)
    levels, logs = np.arange(train, dtype=np.float64), np.log(alpha_bar)
    if method == "logSNR":
        half_log_snr = (logs - np.log1p(-alpha_bar)) / 2
        wanted = -np.logaddexp(0, -2 * np.linspace(half_log_snr[0], half_log_snr[-1], steps + 1))
        return np.interp(wanted, logs[::-1], levels[::-1]), np.exp(wanted)
    if method == "time_quadratic":
        t = train * np.linspace((1 / train) ** 0.5, 1, steps + 1) ** 2 - 1
    else:
        t = np.linspace(0, train - 1, steps + 1)
    return t, np.exp(np.interp(t, levels, logs))
