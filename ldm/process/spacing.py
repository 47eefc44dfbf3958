"""Which levels a sampler visits: the historic DDIM lists, and lists of exactly the length asked for."""

import operator

import numpy as np

from ldm.errors import UsageError

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
        T - 1: what the network is told.

    Raises:
        UsageError: an unknown method, or num_steps outside 1..T.
    """
    if method not in CONTINUOUS_METHODS:
        raise UsageError(f"the spacing must be one of {', '.join(CONTINUOUS_METHODS)}; got {method!r}")
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
