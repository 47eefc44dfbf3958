"""What a network may predict (noise, clean sample or velocity) and how one becomes the other.

With x_t = a x0 + s eps, where a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), and v = a eps - s x0
(progressive distillation, arXiv:2202.00512, appendix D), x_t and any one of the three give the other two:

    | from | x0              | eps              | v                |
    |------|-----------------|------------------|------------------|
    | eps  | (x_t - s eps)/a | eps              | (eps - s x_t)/a  |
    | x0   | x0              | (x_t - a x0)/s   | (a x_t - x0)/s   |
    | v    | a x_t - s v     | a v + s x_t      | v                |

Every function takes `sigma` (= s) beside alpha_bar: a float32 alpha_bar close to 1 has lost the digits of
1 - alpha_bar, so a caller that holds s in a table made in float64 should hand it over.
"""

from typing import Literal

from torch import Tensor

from ldm.errors import UsageError
from ldm.process.scalars import Scalar, sqrt

Prediction = Literal["eps", "x0", "v"]
PREDICTIONS = ("eps", "x0", "v")


def to_x0(kind: str, output: Tensor, x_t: Tensor, alpha_bar: Scalar, sigma: Scalar | None = None) -> Tensor:
    """Turn a network's output into the clean sample.

    Args:
        kind: what the output is: "eps", "x0" or "v".
        output: the network's answer, shaped like x_t.
        x_t: the noisy sample, any shape.
        alpha_bar: fraction of signal variance in (0, 1]: a number, or broadcastable to x_t, e.g. (b, 1, 1, 1).
        sigma: sqrt(1 - alpha_bar), where the caller has it more exactly.

    Raises:
        UsageError: an unknown kind.
    """
    if kind == "x0":
        return output
    signal, sigma = _levels(alpha_bar, sigma)
    if kind == "eps":
        return (x_t - sigma * output) / signal
    if kind == "v":
        return signal * x_t - sigma * output
    raise _unknown(kind)


def to_eps(kind: str, output: Tensor, x_t: Tensor, alpha_bar: Scalar, sigma: Scalar | None = None) -> Tensor:
    """Turn a network's output into the noise in x_t; arguments as in `to_x0`, alpha_bar below 1 for "x0"."""
    if kind == "eps":
        return output
    signal, sigma = _levels(alpha_bar, sigma)
    if kind == "x0":
        return (x_t - signal * output) / sigma
    if kind == "v":
        return signal * output + sigma * x_t
    raise _unknown(kind)


def to_v(kind: str, output: Tensor, x_t: Tensor, alpha_bar: Scalar, sigma: Scalar | None = None) -> Tensor:
    """Turn a network's output into the velocity; arguments as in `to_x0`, alpha_bar below 1 for "x0"."""
    if kind == "v":
        return output
    signal, sigma = _levels(alpha_bar, sigma)
    if kind == "eps":
        return (output - sigma * x_t) / signal
    if kind == "x0":
        return (signal * x_t - output) / sigma
    raise _unknown(kind)


def velocity(x0: Tensor, eps: Tensor, alpha_bar: Scalar, sigma: Scalar | None = None) -> Tensor:
    """Make the velocity that a v-network is trained towards, from its two ends: a eps - s x0."""
    signal, sigma = _levels(alpha_bar, sigma)
    return signal * eps - sigma * x0


def check_prediction(kind: str) -> None:
    """Refuse a kind that is none of the three.

    Raises:
        UsageError: naming the kinds there are.
    """
    if kind not in PREDICTIONS:
        raise _unknown(kind)


def _levels(alpha_bar: Scalar, sigma: Scalar | None) -> tuple[Scalar, Scalar]:
    return sqrt(alpha_bar), sqrt(1 - alpha_bar) if sigma is None else sigma


def _unknown(kind: str) -> UsageError:
    return UsageError(f"prediction '{kind}' is unknown; a network predicts one of {', '.join(PREDICTIONS)}")
