"""The arithmetic of levels: in numbers where one level holds for all images, in tensors where each has its own.

A step works some twenty factors out of its levels. Python numbers cost a tenth of what 0-d tensors do, give float32
latents the same bits, and are not rounded to half precision before they multiply a half-precision latent.
"""

import math

import torch
from torch import Tensor

Scalar = float | Tensor


def scalar(value: Scalar) -> Scalar:
    """Give a 0-d float64 tensor on the CPU as a number, and everything else as it is.

    Left alone are levels (b,), one per image; those of less precision, whose factors are worked out in theirs; those on
    another device, which would be waited for; and 0, by which a number cannot be divided.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float64 and value.is_cpu:
        return value.item() or value
    return value


def tensor(value: Scalar) -> Tensor:
    """Give a number as a 0-d float64 tensor, in the way that costs least, and a tensor as it is."""
    return value if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=torch.float64)


def sqrt(value: Scalar) -> Scalar:
    """Take the root."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def log(value: Scalar) -> Scalar:
    """Take the logarithm; of 0 it is -inf."""
    if isinstance(value, Tensor):
        return value.log()
    return math.log(value) if value != 0 else -math.inf


def expm1(value: Scalar) -> Scalar:
    """Take exp(value) - 1."""
    return value.expm1() if isinstance(value, Tensor) else math.expm1(value)


def above_0(value: Scalar) -> Scalar:
    """Raise what rounding has left below 0 to 0."""
    return value.clamp(min=0) if isinstance(value, Tensor) else max(value, 0.0)
