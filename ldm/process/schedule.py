"""Noise schedules: how much noise each training level adds, by name, in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ldm.errors import UsageError

SCHEDULES = ("linear", "sqrt_linear", "sqrt", "cosine", "openai-linear", "openai-cosine")

# Tables of a schedule that CompVis's models register as buffers and that its files may hold.
SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)

# What stands for "no signal" where a formula divides by it or takes its logarithm: float16's smallest number, as in
# diffusers. The picture's share of such a level is a 4096th.
LEAST_SIGNAL = 2.0**-24

# Both cosine schedules stop short of replacing all signal in one step (arXiv:2102.09672, section 3.2).
MAX_COSINE_BETA = 0.999


def named_betas(
    name: str,
    num_steps: int,
    *,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Make the variances that a schedule of this name adds, step by step.

    The first four names are CompVis's and mean what they mean there; OpenAI's two carry a prefix, because
    their "linear" is another curve:

    - "linear": linear in sqrt(beta). Stable Diffusion v1, from 0.00085 to 0.012. diffusers: "scaled_linear".
    - "sqrt_linear": linear in beta, the schedule of DDPM (arXiv:2006.11239).
    - "sqrt": the square root of a line.
    - "cosine": alpha_bar follows a squared cosine (Improved DDPM, arXiv:2102.09672, Eq. 17).
    - "openai-linear": as "sqrt_linear" with both ends multiplied by 1000 / num_steps, so that the whole chain
      adds about the same noise for every num_steps.
    - "openai-cosine": Eq. 17 with s = 0.008, through `betas_for_alpha_bar`.

    Args:
        num_steps: length of the chain, at least 1.
        linear_start, linear_end: first and last beta of the lines.
        cosine_s: offset s of "cosine".

    Returns:
        (num_steps,) float64, each in [0, 1].

    Raises:
        UsageError: an unknown name (the known ones are listed), no steps, or betas that leave [0, 1].
    """
    if name not in SCHEDULES:
        raise UsageError(f"beta schedule '{name}' is unknown; choose one of {', '.join(SCHEDULES)}")
    if num_steps < 1:
        raise UsageError(f"a beta schedule needs at least 1 step, got {num_steps}")

    if name == "linear":
        betas = _line(linear_start**0.5, linear_end**0.5, num_steps) ** 2
    elif name == "sqrt_linear":
        betas = _line(linear_start, linear_end, num_steps)
    elif name == "sqrt":
        betas = _line(linear_start, linear_end, num_steps) ** 0.5
    elif name == "cosine":
        progress = np.arange(num_steps + 1, dtype=np.float64) / num_steps
        alpha_bar = np.cos((progress + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
        betas = np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, MAX_COSINE_BETA)
    elif name == "openai-linear":
        scale = 1000 / num_steps
        betas = np.linspace(scale * linear_start, scale * linear_end, num_steps, dtype=np.float64)
    else:
        betas = betas_for_alpha_bar(num_steps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)

    if not (np.all(betas >= 0) and np.all(betas <= 1)):
        raise UsageError(
            f"schedule '{name}' with {num_steps} steps gives betas from {betas.min():g} to {betas.max():g}, "
            "wanted all in [0, 1]; check linear_start, linear_end and the number of steps"
        )
    return betas


def betas_for_alpha_bar(
    num_steps: int, alpha_bar: Callable[[float], float], max_beta: float = MAX_COSINE_BETA
) -> np.ndarray:
    """Cut a continuous alpha_bar(t), t in [0, 1], into num_steps betas, none above max_beta.

    beta_i = 1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), as in guided-diffusion.
    """
    edges = [alpha_bar(i / num_steps) for i in range(num_steps + 1)]
    return np.array(
        [min(1 - after / before, max_beta) for before, after in zip(edges[:-1], edges[1:], strict=True)],
        dtype=np.float64,
    )


def respaced_betas(alpha_bar: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Make the betas of a chain of only some levels, with the same alpha_bar at each.

    beta_i = 1 - alpha_bar[S_i] / alpha_bar[S_{i-1}] (arXiv:2102.09672, Eq. 19).

    Args:
        alpha_bar: (num_steps,) float64, of the whole chain.
        levels: (n,) int, ascending.
    """
    kept = np.asarray(alpha_bar, dtype=np.float64)[levels]
    return 1 - kept / np.append(1.0, kept[:-1])


def zero_terminal_snr(betas: np.ndarray, last: float = 0.0) -> np.ndarray:
    """Rescale a schedule so that its last level has no signal: algorithm 1 of arXiv:2305.08891.

    sqrt(alpha_bar) is shifted and stretched so that its first value stays and its last becomes 0.

    Args:
        betas: (num_steps,), at least two, of a schedule whose signal falls.
        last: alpha_bar of the last level instead of 0, for what divides by the signal; see LEAST_SIGNAL.

    Returns:
        (num_steps,) float64; the last is 1 where `last` is 0.

    Raises:
        UsageError: fewer than two levels, or no level that is noisier than the first.
    """
    signal = np.sqrt(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
    if len(signal) < 2 or not signal[-1] < signal[0]:
        raise UsageError(
            f"a last level without signal needs at least 2 levels and growing noise, got {len(signal)} levels from "
            f"alpha_bar {signal[0] ** 2:g} to {signal[-1] ** 2:g}"
        )
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    alpha_bar = signal**2
    alpha_bar[-1] = last
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


@dataclass(frozen=True)
class NoiseSchedule:
    """A schedule seen four ways, one value a level, float64, level 0 the cleanest.

    All arrays are (num_steps,). alpha_bar is the fraction of signal variance that is left (Eq. 4 of DDPM);
    alpha_bar_prev is the same one level cleaner, 1 before the first level.
    """

    betas: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray

    @classmethod
    def from_betas(
        cls, betas: np.ndarray, *, up_to_one: bool = False, last_is_one: bool = False
    ) -> "NoiseSchedule":
        """Accumulate betas into alpha_bar.

        Args:
            up_to_one: take betas from (0, 1] instead of [0, 1), as OpenAI's diffusion does: every level adds
                noise, and a beta of 1 leaves no signal.
            last_is_one: let the last beta be 1, as `zero_terminal_snr` makes it.

        Raises:
            UsageError: betas are not a non-empty row of numbers in that range.
        """
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise UsageError(f"betas must be one non-empty row of numbers, got shape {betas.shape}")
        inside = (betas > 0) & (betas <= 1) if up_to_one else (betas >= 0) & (betas < 1)
        if last_is_one and betas[-1] == 1:
            inside[-1] = True
        if not inside.all():
            wanted = "(0, 1]" if up_to_one else "[0, 1)"
            raise UsageError(f"betas must lie in {wanted}, got {betas.min():g} to {betas.max():g}")
        alpha_bar = np.cumprod(1 - betas)
        return cls(betas, alpha_bar, np.append(1.0, alpha_bar[:-1]))

    @classmethod
    def named(cls, name: str, num_steps: int, **options: float) -> "NoiseSchedule":
        """Build from a name of `named_betas` and its options."""
        return cls.from_betas(named_betas(name, num_steps, **options))

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @property
    def sigma(self) -> np.ndarray:
        """Noise over signal, sqrt((1 - alpha_bar) / alpha_bar): the level in the units of k-diffusion.

        Infinite without signal.
        """
        with np.errstate(divide="ignore"):
            return np.sqrt((1 - self.alpha_bar) / self.alpha_bar)

    @property
    def log_snr(self) -> np.ndarray:
        """log(alpha_bar / (1 - alpha_bar)), falling from clean to noisy (infinite without noise or signal)."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)


def _line(start: float, end: float, num_steps: int) -> np.ndarray:
    # torch's linspace, not numpy's: they differ in the last bit, and CompVis's tables come from torch.
    return torch.linspace(start, end, num_steps, dtype=torch.float64, device="cpu").numpy()
