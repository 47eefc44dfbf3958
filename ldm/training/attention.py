"""Faster attention for training on a CPU in bfloat16.

torch 2.13's fused kernel takes 6 times as long as two matrix products and a softmax there (backward pass; 256 tokens,
16 features a head), so inside `MatmulAttention` it is replaced, wherever it is called from. Everywhere else
ldm.modules.attention.attend, which calls it, is faster and holds no scores.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MatmulAttention(TorchFunctionMode):
    """Within this context scaled_dot_product_attention of bfloat16 on a CPU is computed step by step."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _can_replace(*args, **kwargs):
            return matmul_attend(*args, **kwargs)
        return func(*args, **kwargs)


def _can_replace(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> bool:
    unusual = args or kwargs.get("dropout_p") or kwargs.get("enable_gqa")
    return not unusual and query.dim() == 4 and query.dtype == torch.bfloat16 and query.device.type == "cpu"


def matmul_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **unused: Any,
) -> Tensor:
    """Compute softmax(scale q k^T + mask) v for (b, k, n, d) queries, with the scores in memory; torch's signature."""
    b, k, n, d = query.shape
    with torch.autocast("cpu", enabled=False):
        query = query * (d**-0.5 if scale is None else scale)
        weights = query.flatten(0, 1) @ key.flatten(0, 1).transpose(1, 2)  # (b*k, n, m)
        if is_causal:
            attn_mask = torch.ones(n, key.shape[2], dtype=torch.bool).tril()
        if attn_mask is not None:
            weights = weights.view(b, k, n, -1)
            if attn_mask.dtype == torch.bool:
                weights = weights.masked_fill(~attn_mask, float("-inf"))
            else:
                weights = weights + attn_mask.to(weights.dtype)
            weights = weights.flatten(0, 1)
        return (weights.softmax(dim=-1) @ value.flatten(0, 1)).view(b, k, n, -1)
