"""Guidance: joining conditions into one batch and mixing the two outputs, and classifier guidance."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UsageError


def join(uncond: Any, cond: Any, *, name: str = "conditioning") -> Any:
    """Join two conditions along the batch, the unconditional one first (CompVis's order).

    Args:
        uncond, cond: of one structure: a tensor (b, ...), or a list or dict of such structures. None joins
            with None.
        name: what the conditions are called in an error; grows by the key or index on the way down.

    Raises:
        UsageError: the structures differ, or two tensors differ in more than their batch.
    """
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        if uncond.shape[1:] != cond.shape[1:]:
            raise UsageError(
                f"{name}: unconditional {tuple(uncond.shape)} and conditional {tuple(cond.shape)} must agree "
                "in all but the batch to run as one batch; pad the shorter, or ask for separate passes"
            )
        return torch.cat([uncond, cond])
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping) and cond.keys() == uncond.keys():
        return {key: join(uncond[key], cond[key], name=f"{name}[{key!r}]") for key in cond}
    if _is_row(cond) and _is_row(uncond) and len(cond) == len(uncond):
        return [join(u, c, name=f"{name}[{i}]") for i, (u, c) in enumerate(zip(uncond, cond, strict=True))]
    if cond is None and uncond is None:
        return None
    raise UsageError(
        f"{name}: unconditional {_describe(uncond)} and conditional {_describe(cond)} must have one "
        "structure to run as one batch; match them, or ask for separate passes"
    )


def first_tensor(condition: Any) -> Tensor | None:
    """Find the first tensor in a condition (tensor, list or dict of them); None if it holds none."""
    if isinstance(condition, Tensor):
        return condition
    parts = condition.values() if isinstance(condition, Mapping) else condition if _is_row(condition) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def guide(uncond: Tensor, cond: Tensor, scale: float, mix: float = 0.0) -> Tensor:
    """Move the network's output along the condition (arXiv:2207.12598, in CompVis's form).

    Args:
        uncond, cond: outputs without and with the condition, one shape.
        scale: 0 = unconditional, 1 = conditional, more = beyond it.
        mix: of `rescale`, the guidance_rescale of samplers; 0 = none.
    """
    guided = uncond + scale * (cond - uncond)
    return rescale(guided, cond, mix) if mix else guided


def rescale(guided: Tensor, cond: Tensor, mix: float) -> Tensor:
    """Give the guided output part of the conditional one's spread (Eq. 15 and 16 of arXiv:2305.08891).

    Args:
        guided, cond: (b, ...), one shape. The spread is taken per image over everything but the batch.
        mix: 0 leaves `guided` alone, 1 gives it the standard deviation of `cond`.
    """
    axes = tuple(range(1, cond.dim()))
    ratio = cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guided * (mix * ratio + (1 - mix))


def classifier_mean(mean: Tensor, variance: Tensor, gradient: Tensor) -> Tensor:
    """Move the mean of p(x_{t-1} | x_t) towards a class: algorithm 1 of arXiv:2105.05233.

    Args:
        mean, variance: of the step, (b, ...).
        gradient: of log p(class | x_t) by x_t, times the scale of guidance, shaped like mean.
    """
    return mean + variance * gradient


def classifier_eps(eps: Tensor, gradient: Tensor, sigma: Tensor) -> Tensor:
    """Move the predicted noise towards a class: algorithm 2 of arXiv:2105.05233, for DDIM.

    Args:
        eps: predicted noise, (b, ...).
        gradient: as for `classifier_mean`.
        sigma: sqrt(1 - alpha_bar), broadcastable to eps.
    """
    return eps - sigma * gradient


def _is_row(condition: Any) -> bool:
    return isinstance(condition, Sequence) and not isinstance(condition, str)


def _describe(condition: Any) -> str:
    if isinstance(condition, Tensor):
        return f"tensor {tuple(condition.shape)}"
    if isinstance(condition, Mapping):
        return f"dict with keys {', '.join(map(str, condition)) or '(none)'}"
    if _is_row(condition):
        return f"list of {len(condition)}"
    return str(condition) if condition is None else type(condition).__name__
