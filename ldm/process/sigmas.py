"""Tables of sigmas: the noise levels that a run visits, by the names of k-diffusion, A1111 and ComfyUI.

sigma is noise over signal, sqrt((1 - alpha_bar) / alpha_bar), k-diffusion's unit. A model's own sigmas, ascending, are
`NoiseSchedule.sigma`; level t of the model has the t-th. Everything here is float64. The programs work in float32 and
agree to a few of its last bits.
"""

import inspect
import math
import re
from collections.abc import Callable
from numbers import Real

import numpy as np

from ldm import limits
from ldm.errors import UsageError, nearest, shown
from ldm.process.spacing import CONTINUOUS_METHODS, check_steps, continuous_levels

LEAST = 1e-6  # the lowest sigma above 0: float64 has lost most digits of 1 - alpha_bar, of which there are none at 1e-8

# Align Your Steps, 10 steps for Stable Diffusion v1 (arXiv:2404.14507, with the digits of its how-to page), and the
# last level of A1111, which has no 11th in the published list.
ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)

# GITS for Stable Diffusion v1 (arXiv:2405.14326) at its coefficient 1.20, ComfyUI's default: of runs of 2 to 20 steps
# the levels between the top and the lowest, in hundredths of the range of t. Published are their sigmas.
# fmt: off
GITS: tuple[tuple[int, ...], ...] = (
    (29,),
    (49, 18),
    (61, 33, 11),
    (66, 42, 21, 6),
    (83, 57, 34, 15, 3),
    (83, 62, 42, 23, 8, 1),
    (83, 62, 45, 29, 15, 6, 1),
    (83, 66, 50, 34, 21, 11, 4, 1),
    (83, 66, 51, 38, 27, 17, 9, 4, 1),
    (83, 67, 54, 42, 30, 21, 13, 7, 3, 1),
    (83, 68, 56, 45, 34, 25, 17, 11, 6, 3, 1),
    (86, 71, 61, 49, 38, 29, 21, 15, 10, 6, 3, 1),
    (86, 71, 62, 50, 40, 31, 23, 17, 12, 8, 5, 3, 1),
    (88, 78, 68, 58, 48, 38, 30, 23, 17, 12, 8, 5, 3, 1),
    (88, 78, 68, 58, 48, 38, 30, 23, 17, 13, 9, 6, 4, 2, 1),
    (88, 78, 68, 58, 48, 38, 30, 23, 17, 13, 10, 7, 5, 3, 2, 1),
    (88, 78, 68, 59, 50, 41, 33, 26, 20, 15, 11, 8, 6, 4, 3, 2, 1),
    (88, 78, 68, 59, 50, 42, 34, 27, 21, 16, 12, 9, 7, 5, 4, 3, 2, 1),
    (88, 78, 68, 59, 50, 42, 34, 27, 21, 17, 13, 10, 8, 6, 5, 4, 3, 2, 1),
)
# fmt: on


# --- between sigma and the other ways to name a level ----------------------------------------------


def sigma_of_alpha_bar(alpha_bar: np.ndarray) -> np.ndarray:
    """Noise over signal of levels; infinite without signal."""
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - alpha_bar) / alpha_bar)


def alpha_bar_of_sigma(sigma: np.ndarray) -> np.ndarray:
    """The fraction of signal variance that levels of these sigmas have, 1 at 0."""
    return 1 / (1 + np.square(sigma))


def log_snr_of_sigma(sigma: np.ndarray) -> np.ndarray:
    """log(alpha_bar / (1 - alpha_bar)) = -2 log sigma; infinite at sigma 0."""
    with np.errstate(divide="ignore"):
        return -2 * np.log(sigma)


def sigma_of_t(t: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Interpolate sigma between whole levels, linear in its logarithm: k-diffusion's t_to_sigma.

    Args:
        t: in levels, fractional; beyond the ends the ends are taken.
        sigmas: (T,) of the model, ascending, positive and finite.
    """
    return np.exp(np.interp(t, np.arange(len(sigmas)), np.log(sigmas)))


def t_of_sigma(sigma: np.ndarray, sigmas: np.ndarray, *, discrete: bool = False) -> np.ndarray:
    """Find the level of a sigma: the inverse of sigma_of_t, k-diffusion's sigma_to_t.

    Args:
        sigma: positive; beyond the model's ends the ends are taken.
        sigmas: (T,) of the model, ascending, positive and finite.
        discrete: the whole level nearest in log sigma (the lower of two as near), int64, instead of a fraction.
    """
    if discrete:
        distances = np.abs(np.log(np.asarray(sigma, dtype=np.float64))[..., None] - np.log(sigmas))
        return distances.argmin(-1)
    return np.interp(np.log(sigma), np.log(sigmas), np.arange(len(sigmas)))


# --- the tables: n (steps), the model's sigmas (T,), the ends of the run, options; descending -------


def _karras(n: int, sigmas: np.ndarray, low: float, high: float, *, rho: float = 7.0) -> np.ndarray:
    """Evenly spaced in sigma^(1 / rho): Eq. 5 of arXiv:2206.00364."""
    return _to_zero(np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho)


def _exponential(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """Evenly spaced in log sigma: k-diffusion's get_sigmas_exponential."""
    return _to_zero(np.exp(np.linspace(math.log(high), math.log(low), n)))


def _polyexponential(n: int, sigmas: np.ndarray, low: float, high: float, *, rho: float = 1.0) -> np.ndarray:
    """A polynomial in log sigma: k-diffusion's get_sigmas_polyexponential."""
    ramp = np.linspace(1, 0, n) ** rho
    return _to_zero(np.exp(ramp * (math.log(high) - math.log(low)) + math.log(low)))


def _vp(
    n: int, sigmas: np.ndarray, low: float, high: float, *, beta_d: float = 19.9, beta_min: float = 0.1
) -> np.ndarray:
    """The continuous VP process, evenly in time from 1 to 0.001: k-diffusion's get_sigmas_vp.

    Its ends are the process's own, about 152 and 0.01, and not the model's.
    """
    t = np.linspace(1, 1e-3, n)
    return _to_zero(np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)))


def _normal(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """Evenly in time, both ends: ComfyUI's and A1111's "normal", A1111's "uniform", k-diffusion's get_sigmas."""
    return _to_zero(sigma_of_t(np.linspace(*t_of_sigma(np.array([high, low]), sigmas), n), sigmas))


def _sgm_uniform(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """Evenly in time, without the lower end: of Stability AI's generative-models."""
    return _to_zero(sigma_of_t(np.linspace(*t_of_sigma(np.array([high, low]), sigmas), n + 1)[:-1], sigmas))


def _simple(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whole levels a T / n apart, rounded towards the noise, from the top: ComfyUI's "simple"."""
    stride = len(sigmas) / n
    return _to_zero(sigmas[[-(1 + int(i * stride)) for i in range(n)]])


def _ddim(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whole levels 1, 1 + T // n, ...: "ddim" in A1111, "ddim_uniform" in ComfyUI.

    More than n steps where n does not divide T: 12 for 11 of 1000.
    """
    return _to_zero(sigmas[1 :: max(len(sigmas) // n, 1)][::-1])


def _beta(
    n: int,
    sigmas: np.ndarray,
    low: float,
    high: float,
    *,
    beta_dist_alpha: float = 0.6,
    beta_dist_beta: float = 0.6,
) -> np.ndarray:
    """Whole levels at the quantiles of a beta distribution (arXiv:2407.12173), as ComfyUI has them.

    Levels that repeat are dropped, so that many steps come out fewer.
    """
    share = beta_quantile(1 - np.linspace(0, 1, n, endpoint=False), beta_dist_alpha, beta_dist_beta)
    levels = np.rint(share * (len(sigmas) - 1)).astype(np.int64)
    return _to_zero(sigmas[levels[np.append(True, np.diff(levels) != 0)]])


def _beta_sigma(
    n: int,
    sigmas: np.ndarray,
    low: float,
    high: float,
    *,
    beta_dist_alpha: float = 0.6,
    beta_dist_beta: float = 0.6,
) -> np.ndarray:
    """The same quantiles, of sigma itself: A1111's "beta"."""
    return _to_zero(
        low + beta_quantile(1 - np.linspace(0, 1, n), beta_dist_alpha, beta_dist_beta) * (high - low)
    )


def _kl_optimal(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """Evenly in arctan sigma: theorem 3.1 of Align Your Steps (arXiv:2404.14507), then 0, as ComfyUI has it."""
    return _to_zero(np.tan(np.linspace(math.atan(high), math.atan(low), n)))


def _kl_optimal_open(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """The same with n + 1 values and no 0: A1111's "kl_optimal", which ends at the lowest sigma."""
    return np.tan(np.linspace(math.atan(high), math.atan(low), n + 1))


def _align_your_steps(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """Align Your Steps for Stable Diffusion v1, interpolated in log sigma for other n, as A1111 has it.

    One step is taken from the list's lowest level, there as here.
    """
    if n == len(ALIGN_YOUR_STEPS):
        return _to_zero(np.array(ALIGN_YOUR_STEPS))
    # From the lower end, as there: it shows where n is 1.
    log_sigmas = np.log(ALIGN_YOUR_STEPS[::-1])
    at = np.linspace(0, 1, n)
    return _to_zero(np.exp(np.interp(at, np.linspace(0, 1, len(log_sigmas)), log_sigmas))[::-1])


def _gits(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """GITS for Stable Diffusion v1; of more than 20 steps the list of 20 interpolated in log sigma, as in ComfyUI.

    One step, of which there is no list, is from the top.
    """
    inner = GITS[min(n - 2, len(GITS) - 1)] if n > 1 else ()
    t, logs = np.array([100, *inner, 0]) * (len(sigmas) - 1) / 100, np.log(alpha_bar_of_sigma(sigmas))
    levels = sigma_of_alpha_bar(
        np.exp(np.interp(t, np.arange(len(sigmas)), logs))
    )  # between two as DPM-Solver
    if n >= len(levels):
        at = np.linspace(0, 1, n + 1)
        levels = np.exp(np.interp(at, np.linspace(0, 1, len(levels)), np.log(levels)))
    return _to_zero(levels[:-1])


def _turbo(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """The first n of ten whole levels T / 10 apart from the top, for distilled models: ComfyUI's SDTurboScheduler."""
    if n > 10:
        raise UsageError(f"the sigmas 'turbo' have at most 10 steps, got {n}")
    levels = np.arange(10, 0, -1) * len(sigmas) // 10 - 1
    return _to_zero(sigmas[levels[:n]])


def _lcm(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """n of the 50 whole levels that latent consistency models were distilled on: stable-diffusion.cpp's "lcm"."""
    if n > 50:
        raise UsageError(f"the sigmas 'lcm' have at most 50 steps, got {n}")
    return _to_zero(sigmas[(50 - np.arange(n) * 50 // n) * len(sigmas) // 50 - 1])


def _linear_quadratic(
    n: int, sigmas: np.ndarray, low: float, high: float, *, threshold: float = 0.025
) -> np.ndarray:
    """Half of the steps linear over the noisiest 2.5 percent of sigma, then a parabola: Mochi's, as ComfyUI has it."""
    if n == 1:
        return np.array([high, 0.0])
    linear = n // 2
    excess, rest = linear - threshold * n, n - linear
    square = excess / (linear * rest**2)
    slope = threshold / linear - 2 * excess / rest**2
    i = np.arange(n)
    done = np.where(i < linear, i * threshold / linear, square * i**2 + slope * i + square * linear**2)
    return high * (1 - np.append(done, 1.0))


def _smoothstep(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whole levels along u^2 (3 - 2 u), dense at both ends: stable-diffusion.cpp's "smoothstep"."""
    u = 1 - np.arange(n) / n
    return _to_zero(sigmas[np.floor(u * u * (3 - 2 * u) * (len(sigmas) - 1) + 0.5).astype(np.int64)])


def _bong_tangent(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
    """Two arcs of arctan that meet halfway in sigma: RES4LYF's "bong_tangent", scaled as in stable-diffusion.cpp."""
    steps = n + 2
    pivot, slope = int(steps * 0.6), 0.2 / (steps / 40)

    def arc(count: int, pivot: int, start: float, end: float) -> np.ndarray:
        share = np.arctan(-slope * (np.arange(count) - pivot))
        spread = share[0] - share[-1]
        if count == 1:
            return np.array([start])
        return (share - share[-1]) / spread * (start - end) + end

    middle = (low + high) / 2
    values = np.append(arc(pivot, pivot, high, middle)[:-1], arc(steps - pivot, 0, middle, low))
    return _to_zero(values[:n])


def _continuous(method: str) -> Callable[..., np.ndarray]:
    def table(n: int, sigmas: np.ndarray, low: float, high: float) -> np.ndarray:
        return sigma_of_alpha_bar(continuous_levels(method, n, alpha_bar_of_sigma(sigmas))[1])[::-1]

    table.__doc__ = (
        f"DPM-Solver's {method} (ldm.process.spacing.continuous_levels): n + 1 values, no 0 at the end."
    )
    return table


def _to_zero(sigmas: np.ndarray) -> np.ndarray:
    return np.append(sigmas, 0.0)


# By name, as requests say it. Where A1111 and ComfyUI mean two things by one name, it is ComfyUI's here.
SIGMA_TABLES: dict[str, Callable[..., np.ndarray]] = {
    "karras": _karras,
    "exponential": _exponential,
    "polyexponential": _polyexponential,
    "vp": _vp,
    "normal": _normal,
    "sgm_uniform": _sgm_uniform,
    "simple": _simple,
    "ddim_uniform": _ddim,
    "beta": _beta,
    "beta_sigma": _beta_sigma,
    "kl_optimal": _kl_optimal,
    "kl_optimal_open": _kl_optimal_open,
    "align_your_steps": _align_your_steps,
    "gits": _gits,
    "turbo": _turbo,
    "lcm": _lcm,
    "linear_quadratic": _linear_quadratic,
    "smoothstep": _smoothstep,
    "bong_tangent": _bong_tangent,
    **{method: _continuous(method) for method in CONTINUOUS_METHODS},
}
# Those that no sigma_min or sigma_max changes: of whole levels, or of a list or a process of their own.
WITH_OWN_ENDS = frozenset(
    {"vp", "simple", "ddim_uniform", "beta", "align_your_steps", "gits", "turbo", "lcm", "smoothstep"}
)
_ALIASES = {"ays": "align_your_steps", "discrete": "normal", "ddim": "ddim_uniform"}


def resolve_sigma_table(name: str) -> str | None:
    """Find a table by any common spelling ("SGM Uniform", "sgm-uniform", "AYS"); None if there is none."""
    spellings = _ALIASES | {_reduce(key): key for key in SIGMA_TABLES}
    return spellings.get(_reduce(name)) if isinstance(name, str) else None


def sigma_table(
    name: str,
    num_steps: int,
    sigmas: np.ndarray,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    discard_next_to_last: bool = False,
    **options: float,
) -> np.ndarray:
    """Make the sigmas of a run of num_steps steps, descending, the last one mostly 0 (clean).

    Args:
        name: of SIGMA_TABLES, in any common spelling.
        num_steps: 1 to the model's number of levels. "ddim_uniform" and "beta" may come out otherwise, as they do in
            the programs that they are from.
        sigmas: (T,) of the model, ascending.
        sigma_min, sigma_max: ends of the run instead of the model's; WITH_OWN_ENDS pay no attention to them, in
            A1111 as here.
        discard_next_to_last: make one step more and leave out the last sigma above 0: A1111's option, and what DPM2
            needs there.
        options: of the table: rho of "karras" and "polyexponential", beta_dist_alpha and beta_dist_beta of "beta" and
            "beta_sigma", threshold of "linear_quadratic", beta_d and beta_min of "vp".

    Returns:
        (num_steps + 1,) float64.

    Raises:
        UsageError: an unknown name or option, num_steps out of range, ends in the wrong order, below 1e-6 or above
            1e6, options by which the sigmas do not fall.
    """
    found = resolve_sigma_table(name)
    if found is None:
        near = nearest(_reduce(name), SIGMA_TABLES, 0.7) if isinstance(name, str) else None
        hint = f" (did you mean {near}?)" if near else ""
        raise UsageError(f"the sigmas must be one of {', '.join(SIGMA_TABLES)}; got {shown(name)}{hint}")
    make, sigmas = SIGMA_TABLES[found], np.asarray(sigmas, dtype=np.float64)
    parameters = inspect.signature(make).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(options.keys() - set(known)):
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UsageError(f"the sigmas '{found}' have no option {', '.join(unknown)}; {has}")
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0.01 <= value <= 100:
            raise UsageError(f"{option} of the sigmas '{found}' must be from 0.01 to 100, got {shown(value)}")
    low = float(sigmas[0]) if sigma_min is None else sigma_min
    high = float(sigmas[-1]) if sigma_max is None else sigma_max
    are_real = all(limits.is_real(one, *limits.SIGMA) for one in (low, high))
    if not are_real or (not LEAST <= low < high and len(sigmas) > 1):
        raise UsageError(
            f"sigmas must go from {LEAST:g} or above up to at most {limits.SIGMA[1]}, got {shown(low)} and "
            f"{shown(high)}"
        )
    if not (isinstance(discard_next_to_last, bool | np.bool_ | int) and discard_next_to_last in (0, 1)):
        raise UsageError(f"discard_next_to_last must be True or False, got {shown(discard_next_to_last)}")
    n = check_steps(num_steps, len(sigmas))
    made = make(n + bool(discard_next_to_last), sigmas, float(low), float(high), **options)
    if (np.diff(made) > 0).any() or made[-1] < 0:
        said = ", ".join(f"{name} {value:g}" for name, value in options.items())
        raise UsageError(
            f"the sigmas '{found}' do not fall with {said or f'{num_steps} steps'}; give less of it"
        )
    return np.delete(made, -2) if discard_next_to_last else made


def check_sigmas(values: object, *, may_rise: bool = False) -> np.ndarray:
    """Return an explicit list of sigmas, as float64, or raise UsageError unless it falls from sigma to sigma.

    Two values at least, from 1e-6 to 1e6; the last may be 0.

    Args:
        may_rise: within the list, where each sigma is above 0 and another one than its neighbours.
    """
    try:
        sigmas = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        sigmas = np.zeros(0)
    steps = np.diff(sigmas) if sigmas.ndim == 1 else np.zeros(0)
    falls = len(steps) > 0 and (steps < 0).all() and sigmas[-1] >= 0
    if not falls and may_rise and len(steps) > 0:
        ends_fall = steps[0] < 0 and steps[-1] < 0 and sigmas[-1] >= 0
        falls = ends_fall and (steps != 0).all() and ((sigmas[:-1] > 0) & (sigmas[:-1] < np.inf)).all()
    if not falls:
        also = ", and where it restarts above it" if may_rise else ""
        raise UsageError(
            f"a list of sigmas must hold two at least, each below the last{also}, got {shown(values)}"
        )
    if sigmas.max() > limits.SIGMA[1] or sigmas[sigmas > 0].min() < LEAST:
        raise UsageError(
            f"a list of sigmas must hold none above {limits.SIGMA[1]} and none but 0 below {LEAST:g}, got "
            f"{shown(values)}"
        )
    return sigmas


def beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """Invert the distribution function of the beta distribution, to about 1e-15.

    Bisection over I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) sum_k x^k prod_(j <= k) (a + b + j) / (a + 1 + j) (DLMF
    8.17.8) where I is at most its value at x = 1 / 2; above that, the distribution is mirrored.
    """
    p = np.asarray(p, dtype=np.float64)
    half = _beta_below_half(a, b)(np.array([0.5]))
    lower = (p <= half) & (p < 1)
    mirrored = _bisect(_beta_below_half(b, a), np.where(lower, 0, 1 - p))
    return np.where(lower, _bisect(_beta_below_half(a, b), np.where(lower, p, 0)), 1 - mirrored)


def _beta_below_half(a: float, b: float) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution function of the beta distribution for x (n,) in [0, 1 / 2]."""
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    series = [1.0]
    while series[-1] * 0.5 ** len(series) > 1e-17 or len(series) < b:  # terms grow while k < b - 2
        k = len(series) - 1
        series.append(series[-1] * (a + b + k) / (a + 1 + k))
    powers = np.arange(len(series))
    return lambda x: scale * x**a * (1 - x) ** b * (x[:, None] ** powers @ np.array(series))


def _bisect(rising: Callable[[np.ndarray], np.ndarray], wanted: np.ndarray) -> np.ndarray:
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        under = rising(middle) < wanted
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return (low + high) / 2


def _reduce(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
