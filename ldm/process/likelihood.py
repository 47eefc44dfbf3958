"""Likelihoods: how well a Gaussian explains another, a pixel or a latent, in nats and in bits.

Source: DDPM (arXiv:2006.11239), section 3.3 and Eq. 13, with the cumulative normal approximated as in OpenAI's code.
"""

import math

import torch
from torch import Tensor

from ldm.errors import MismatchError
from ldm.helpers import mean_flat

# Half a bin of 8-bit pixels scaled to [-1, 1], and where the outermost bins begin.
HALF_BIN = 1 / 255
OUTERMOST = 0.999
# Floor under a probability before its logarithm.
PROBABILITY_FLOOR = 1e-12


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """Measure KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats, element by element.

    Shapes broadcast; plain numbers are fine beside at least one tensor.

    Raises:
        TypeError: four plain numbers.
    """
    like = next((x for x in (mean1, logvar1, mean2, logvar2) if isinstance(x, Tensor)), None)
    if like is None:
        raise TypeError("normal_kl needs at least one tensor, got only numbers")
    # Filled in by the device itself; copying a number there would wait for it.
    logvar1, logvar2 = (
        x.to(like) if isinstance(x, Tensor) else like.new_full((), x) for x in (logvar1, logvar2)
    )
    gap = (mean1 - mean2) ** 2
    return 0.5 * (logvar2 - logvar1 - 1 + (logvar1 - logvar2).exp() + gap * (-logvar2).exp())


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Approximate the cumulative unit normal by a tanh (as in GELU, arXiv:1606.08415); off by 2e-4 at most."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Measure how likely a Gaussian, cut into the 256 bins of 8-bit pixels, finds x: DDPM's Eq. 13.

    The outermost bins reach to infinity, so that all 256 add up to 1.

    Args:
        x: pixels in [-1, 1], multiples of 2 / 255.
        means: shaped like x.
        log_scales: log standard deviations, shaped like x.

    Returns:
        log probabilities in nats, shaped like x, none below log(1e-12).

    Raises:
        MismatchError: shapes that differ.
    """
    _check_shapes(x, means, log_scales)
    centred, precision = x - means, (-log_scales).exp()
    below_upper = approx_standard_normal_cdf(precision * (centred + HALF_BIN))
    below_lower = approx_standard_normal_cdf(precision * (centred - HALF_BIN))
    inside = torch.where(x > OUTERMOST, 1 - below_lower, below_upper - below_lower)
    return torch.where(x < -OUTERMOST, below_upper, inside).clamp(min=PROBABILITY_FLOOR).log()


def gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Measure the log density of a Gaussian at x: what a latent, which has no bins, has for a likelihood.

    Arguments as for `discretized_gaussian_log_likelihood`, but x is unbounded; so is the answer, on both sides.
    """
    _check_shapes(x, means, log_scales)
    return -0.5 * (math.log(2 * math.pi) + ((x - means) * (-log_scales).exp()) ** 2) - log_scales


def bits_per_dim(nats: Tensor) -> Tensor:
    """Average nats (b, ...) over everything but the batch, in bits: (b,)."""
    return mean_flat(nats) / math.log(2.0)


def prior_bits_per_dim(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Measure the bound's prior term, KL(q(x_T | x_0) || N(0, 1)), in bits per dimension: (b,).

    Args:
        mean, log_variance: of q(x_T | x_0), (b, ...).
    """
    return bits_per_dim(normal_kl(mean, log_variance, 0.0, 0.0))


def _check_shapes(x: Tensor, means: Tensor, log_scales: Tensor) -> None:
    if not x.shape == means.shape == log_scales.shape:
        raise MismatchError(
            "a likelihood needs x, means and log_scales of one shape, got "
            f"{tuple(x.shape)}, {tuple(means.shape)} and {tuple(log_scales.shape)}"
        )
