"""Bounds for predicted clean samples whose values have no known range, as latents have none."""

from torch import Tensor

from ldm.errors import UsageError


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """Give a tensor axes of length 1 at its end until it has target_dims of them.

    Raises:
        UsageError: it has more already.
    """
    if x.dim() > target_dims:
        raise UsageError(f"target_dims is {target_dims}, but x has {x.dim()} dimensions already")
    return x.reshape(*x.shape, *(1,) * (target_dims - x.dim()))


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Shrink each sample (b, ...) whose root mean square is above value to exactly that.

    Raises:
        UsageError: a value that is not above 0.
    """
    if not value > 0:
        raise UsageError(f"a threshold should be above 0, got {value}")
    size = x0.square().flatten(1).mean(dim=1).sqrt()  # (b,)
    return x0 * (value / append_dims(size.clamp(min=value), x0.dim()))


def spatial_norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Shrink each cell of maps (b, c, h, w) whose root mean square over the channels is above value to that."""
    size = x0.square().mean(dim=1, keepdim=True).sqrt()  # (b, 1, h, w)
    return x0 * (value / size.clamp(min=value))
