"""The Gaussians of diffusion: noising in closed form, the posterior one step back, and drawing from it.

Source: DDPM (arXiv:2006.11239). Levels are given by alpha_bar, the fraction of signal variance that is left.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ldm.process.prediction import check_prediction
from ldm.process.scalars import Scalar, sqrt

# CompVis's floor under a variance before its logarithm: the posterior of the first level has variance 0.
VARIANCE_FLOOR = 1e-20


def q_sample(x0: Tensor, noise: Tensor, *, alpha_bar: Tensor, sigma: Tensor | None = None) -> Tensor:
    """Draw x_t from q(x_t | x_0) with the given unit noise (Eq. 4).

    Args:
        x0: clean sample, any shape.
        noise: unit normal, shaped like x0.
        alpha_bar: broadcastable to x0, e.g. (b, 1, 1, 1), in [0, 1].
        sigma: sqrt(1 - alpha_bar), where the caller has it more exactly.
    """
    sigma = (1 - alpha_bar).sqrt() if sigma is None else sigma
    return alpha_bar.sqrt() * x0 + sigma * noise


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0) at some levels: mean = coef_x0 * x0 + coef_x_t * x_t, and its variance."""

    coef_x0: Scalar
    coef_x_t: Scalar
    variance: Scalar


def posterior(
    alpha_bar: Scalar, alpha_bar_prev: Scalar, *, v_posterior: float = 0.0, beta: Tensor | None = None
) -> Posterior:
    """Work out the posterior between two levels, by Bayes (Eq. 6 and 7).

    The levels need not be neighbours: over a respaced chain the step's beta is 1 - alpha_bar / alpha_bar_prev.

    Args:
        alpha_bar: level of x_t, in (0, 1); a number or any shape. Give float64: 1 - alpha_bar loses digits in float32.
        alpha_bar_prev: level stepped to, not below alpha_bar; same shape.
        v_posterior: 0 = the posterior's variance, 1 = beta (both ends of DDPM section 3.2), or between.
        beta: 1 - alpha_bar / alpha_bar_prev, where the caller has it more exactly: a chain whose signal is
            gone (alpha_bar = alpha_bar_prev = 0) does not show it.
    """
    alpha = alpha_bar / alpha_bar_prev if beta is None else 1 - beta
    beta = 1 - alpha if beta is None else beta
    coef_x0 = beta * sqrt(alpha_bar_prev) / (1 - alpha_bar)
    coef_x_t = (1 - alpha_bar_prev) * sqrt(alpha) / (1 - alpha_bar)
    least = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return Posterior(coef_x0, coef_x_t, (1 - v_posterior) * least + v_posterior * beta)


def posterior_mean(x0: Tensor, x_t: Tensor, *, coef_x0: Scalar, coef_x_t: Scalar) -> Tensor:
    """Mix clean and noisy sample into the mean of q(x_{t-1} | x_t, x_0) (Eq. 7)."""
    return coef_x0 * x0 + coef_x_t * x_t


def x0_from_posterior_mean(mean: Tensor, x_t: Tensor, *, coef_x0: Tensor, coef_x_t: Tensor) -> Tensor:
    """Solve `posterior_mean` for the clean sample: Eq. 7 read backwards."""
    return (mean - coef_x_t * x_t) / coef_x0


def finite_start(variance: Tensor, *, betas: Tensor, posterior_variance: Tensor) -> Tensor:
    """Give the first level a variance above 0: the posterior's of the second level.

    The posterior of the first level has variance 0, which has no logarithm and as a decoder no likelihood; this
    is what Improved DDPM (arXiv:2102.09672) took instead, for both ends of DDPM's section 3.2. A chain of one
    level has but its beta.

    Args:
        variance: (num_steps,) the table to mend: the posterior's variances, or betas.
        betas, posterior_variance: (num_steps,).
    """
    first = posterior_variance[1:2] if len(betas) > 1 else betas
    return torch.cat([first, variance[1:]])


def range_log_variance(values: Tensor, *, least: Tensor, most: Tensor) -> Tensor:
    """Turn a network's values into log variances between two ends (arXiv:2102.09672, Eq. 15).

    Args:
        values: -1 = least, 1 = most; the network is not held to that range.
        least, most: log of the posterior's variance and of beta, broadcastable to values.
    """
    share = (values + 1) / 2
    return share * most + (1 - share) * least


def clipped_log(variance: Tensor) -> Tensor:
    """Take the logarithm of a variance that may be 0, as CompVis does: floored at 1e-20."""
    return variance.clamp(min=VARIANCE_FLOOR).log()


def draw(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Draw from a Gaussian with the given unit noise: mean + sqrt(variance) * noise."""
    return mean + (0.5 * log_variance).exp() * noise


def draw_prev(mean: Tensor, log_variance: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Draw x_{t-1} from the Gaussian of a step back; the step to the clean end adds no noise (Algorithm 2).

    Args:
        mean, log_variance: of p(x_{t-1} | x_t), (b, ...).
        noise: unit normal, shaped like mean.
        t: (b,) levels stepped from; 0 is the cleanest.
    """
    is_noisy = (t != 0).reshape(-1, *(1 for _ in mean.shape[1:])).to(mean.dtype)  # (b, 1, 1, 1)
    return draw(mean, log_variance, is_noisy * noise)


def vlb_weights(kind: str, betas: Tensor, alpha_bar: Tensor, posterior_variance: Tensor) -> Tensor:
    """Weight each level's squared error as the variational bound does (Eq. 12 and its forms for x0 and v).

    Follows CompVis, quirks included: the x0 weights are 0.5 sqrt(alpha_bar) / (2 - alpha_bar), from an operator
    precedence that was surely not meant; v has ones; the first level, where the weight of eps is infinite,
    takes the second level's. The arithmetic keeps the arguments' dtype: CompVis's recorded weights come from
    float32 tables.

    Args:
        kind: "eps", "x0" or "v".
        betas, alpha_bar, posterior_variance: (num_steps,).

    Raises:
        UsageError: an unknown kind.
    """
    check_prediction(kind)
    if kind == "eps":
        weights = betas**2 / (2 * posterior_variance * (1 - betas) * (1 - alpha_bar))
    elif kind == "x0":
        weights = 0.5 * alpha_bar.sqrt() / (2 - alpha_bar)
    else:
        weights = torch.ones_like(betas)
    if len(weights) > 1:
        weights[0] = weights[1]
    return weights
