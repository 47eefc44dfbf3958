"""What diffusers' attention processors find on the attention that they are called with.

A processor written for diffusers, `processor(attn, hidden_states, encoder_hidden_states, attention_mask, temb)`, reads
these names off `attn`. Those that no attention of Stable Diffusion v1 has (norms of queries, of maps, of the context)
say so as diffusers does, by None or False.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProcessorInterface:
    """The names of diffusers' Attention, over the layers of a CrossAttention."""

    heads: int
    scale: float
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear

    spatial_norm = group_norm = norm_cross = norm_q = norm_k = None
    add_k_proj = add_v_proj = add_q_proj = to_add_out = None
    residual_connection = only_cross_attention = False
    upcast_attention = upcast_softmax = fused_projections = is_causal = False
    rescale_output_factor = 1.0

    @property
    def query_dim(self) -> int:
        """Features of a query's token."""
        return self.to_q.in_features

    @property
    def cross_attention_dim(self) -> int:
        """Features of a token of the context."""
        return self.to_k.in_features

    @property
    def inner_dim(self) -> int:
        """Features of all heads together; likewise of keys and values."""
        return self.to_q.out_features

    inner_kv_dim = inner_dim

    @property
    def is_cross_attention(self) -> bool:
        """Whether the context is as wide as no token of the map, as diffusers tells."""
        return self.cross_attention_dim != self.query_dim

    def set_processor(self, processor: Any) -> None:
        """Let a processor answer from now on; None, or the plain AttnProcessor, the attention itself.

        A processor that is a module becomes a part of this one: it moves with it, and its weights are in its keys.
        """
        self._modules.pop("processor", None)
        vars(self).pop("processor", None)
        self.processor = None if getattr(processor, "is_plain", False) else processor

    def get_processor(self, *_: Any, **__: Any) -> Any:
        """Return what answers; None for the attention itself."""
        return self.processor

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """Lay out (b, n, heads * d) as (b * heads, n, d), or as (b, heads, n, d) where out_dim is 4."""
        if tensor.dim() == 4:  # (b, groups, n, heads * d): the groups' tokens one behind the other
            tensor = tensor.flatten(1, 2)
        b, n, width = tensor.shape
        split = tensor.view(b, n, self.heads, width // self.heads).transpose(1, 2)
        return split.reshape(b * self.heads, n, -1) if out_dim == 3 else split

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """Undo head_to_batch_dim: (b * heads, n, d) to (b, n, heads * d)."""
        rows, n, d = tensor.shape
        return (
            tensor.view(rows // self.heads, self.heads, n, d).transpose(1, 2).reshape(-1, n, self.heads * d)
        )

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor | None:
        """Give every head its mask, (b * heads, 1 or n, m), or (b, heads, 1 or n, m) where out_dim is 4.

        Args:
            attention_mask: (b, 1 or n, m) to be added to the scores; a short one is filled up with zeros, tokens that
                may be seen.
            target_length: m of the keys.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] < target_length:
            attention_mask = F.pad(attention_mask, (0, target_length - attention_mask.shape[-1]))
        if out_dim == 4:
            return attention_mask.unsqueeze(1).expand(-1, self.heads, -1, -1)
        if attention_mask.shape[0] < batch_size * self.heads:
            attention_mask = attention_mask.repeat_interleave(self.heads, dim=0)
        return attention_mask

    def get_attention_scores(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Compute softmax(scale q k^T + mask), (b * heads, n, m), in the query's dtype."""
        scores = torch.bmm(query, key.transpose(1, 2)) * self.scale
        return (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1).to(query.dtype)

    def norm_encoder_hidden_states(self, encoder_hidden_states: Tensor) -> Tensor:
        """Return the context as it is: no attention of Stable Diffusion v1 normalises it."""
        return encoder_hidden_states
