"""The transformer over token numbers that latent-diffusion's BERT encoder is: layers, wrapper, and their key names.

CompVis took it from lucidrains' x-transformers. Of that package's many options those are here that change nothing but
sizes, the kind of norm, and what a token may see.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.modules.attention import FeedForward, attend, max_neg_value

DEFAULT_DIM_HEAD = 64


class AbsolutePositionalEmbedding(nn.Module):
    """One learned vector for each place in a sequence."""

    def __init__(self, dim: int, max_seq_len: int):
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Give the vectors of the first n places, (1, n, dim), for x (b, n, ...)."""
        return self.emb.weight[None, : x.shape[1]]


class ScaleNorm(nn.Module):
    """Divide by the root mean square over the features, times one learned number (arXiv:1910.05895)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.scale, self.eps = dim**-0.5, eps
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.scale
        return x / size.clamp(min=self.eps) * self.g


class RMSNorm(ScaleNorm):
    """Divide by the root mean square over the features, times one learned number each (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-8):
        super().__init__(dim, eps)
        self.g = nn.Parameter(torch.ones(dim))


class Residual(nn.Module):
    """Add what a layer was given to what it gave."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


class Attention(nn.Module):
    """Attention from x to a context, or to x itself where none is given.

    Unlike ldm.modules.attention.CrossAttention its inner width, heads * dim_head, is free of dim, and its dropout is on
    the weights.

    forward takes x (b, n, dim), context (b, m, dim), and masks (b, n) and (b, m), True where a token counts; it returns
    (b, n, dim).
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = DEFAULT_DIM_HEAD,
        heads: int = 8,
        causal: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        inner_dim = dim_head * heads
        self.scale, self.heads, self.causal = dim_head**-0.5, heads, causal
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(dim, inner_dim, bias=False)
        self.to_v = nn.Linear(dim, inner_dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(inner_dim, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        seen = x if context is None else context
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, heads, n, dim_head)
            for layer, y in ((self.to_q, x), (self.to_k, seen), (self.to_v, seen))
        )
        shut = self._shut(q, k, mask, mask if context is None else context_mask)
        if self.training and self.dropout.p > 0:
            scores = q @ k.transpose(2, 3) * self.scale
            weights = self.dropout((scores if shut is None else scores + shut).softmax(dim=-1))
            out = weights @ v
        else:
            out = attend(q, k, v, shut, self.scale)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _shut(self, q: Tensor, k: Tensor, mask: Tensor | None, seen_mask: Tensor | None) -> Tensor | None:
        """Say what is added to the scores: half the most negative number where a token may not look, else 0.

        A token that counts for nothing sees all alike, as in the original; its answer is of no use to anyone.
        """
        n, m = q.shape[2], k.shape[2]
        closed = None
        if mask is not None or seen_mask is not None:
            rows = torch.ones(1, n, dtype=torch.bool, device=q.device) if mask is None else mask.bool()
            columns = (
                torch.ones(1, m, dtype=torch.bool, device=q.device) if seen_mask is None else seen_mask.bool()
            )
            closed = ~(rows[:, None, :, None] & columns[:, None, None, :])
        if self.causal:
            later = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
            closed = later[None, None] if closed is None else closed | later
        if closed is None:
            return None
        return torch.zeros(closed.shape, dtype=q.dtype, device=q.device).masked_fill(
            closed, max_neg_value(q) / 2
        )


class AttentionLayers(nn.Module):
    """Layers of attention ("a"), of attention to a context ("c") and of perceptrons ("f"), each normed and added to x.

    Args:
        dim: features.
        depth: how many times the block is repeated; it is "a f", with cross_attend "a c f", with only_cross "c f".
        heads: of each attention.
        causal: a token sees itself and earlier ones.
        use_scalenorm, use_rmsnorm: instead of a layer norm.
        pre_norm: norm before each layer, not after it; the last norm is then the wrapper's.
        kwargs: `attn_dim_head`, `attn_dropout`; `ff_mult`, `ff_glu`, `ff_dropout`.

    Raises:
        UsageError: another option of x-transformers.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        causal: bool = False,
        cross_attend: bool = False,
        only_cross: bool = False,
        use_scalenorm: bool = False,
        use_rmsnorm: bool = False,
        pre_norm: bool = True,
        **kwargs: Any,
    ):
        super().__init__()
        known = ("attn_dim_head", "attn_dropout", "ff_mult", "ff_glu", "ff_dropout")
        if unknown := [name for name in kwargs if name not in known]:
            raise UsageError(
                f"these layers have no option {', '.join(map(repr, unknown))}; beside the named ones they have "
                f"{', '.join(known)}"
            )
        attn, ff = (
            {name.removeprefix(start): value for name, value in kwargs.items() if name.startswith(start)}
            for start in ("attn_", "ff_")
        )
        self.dim, self.depth, self.pre_norm = dim, depth, pre_norm
        block = ("a", "f") if not cross_attend else ("c", "f") if only_cross else ("a", "c", "f")
        self.layer_types = block * depth
        norm = RMSNorm if use_rmsnorm else ScaleNorm if use_scalenorm else nn.LayerNorm

        def layer(kind: str) -> nn.Module:
            if kind == "f":
                return FeedForward(dim, **ff)
            return Attention(dim, heads=heads, causal=causal and kind == "a", **attn)

        self.layers = nn.ModuleList(
            nn.ModuleList([norm(dim), layer(kind), Residual()]) for kind in self.layer_types
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the layers over x (b, n, dim); masks and context as in Attention."""
        for i, (kind, (norm, layer, join)) in enumerate(zip(self.layer_types, self.layers, strict=True)):
            h = norm(x) if self.pre_norm else x
            if kind == "f":
                h = layer(h)
            elif kind == "a":
                h = layer(h, mask=mask)
            else:
                h = layer(h, context=context, mask=mask, context_mask=context_mask)
            x = join(h, x)
            if not self.pre_norm and i != len(self.layers) - 1:
                x = norm(x)
        return x


class Encoder(AttentionLayers):
    """Layers whose tokens see one another."""

    def __init__(self, **kwargs: Any):
        if "causal" in kwargs:
            raise UsageError("an encoder's tokens see one another, so it takes no 'causal'; take Decoder")
        super().__init__(causal=False, **kwargs)


class Decoder(AttentionLayers):
    """Layers whose tokens see themselves and earlier ones."""

    def __init__(self, **kwargs: Any):
        if "causal" in kwargs:
            raise UsageError("a decoder is causal, so it takes no 'causal'; take Encoder for one that is not")
        super().__init__(causal=True, **kwargs)


class TransformerWrapper(nn.Module):
    """Token numbers to features or to logits, through layers.

    Args:
        num_tokens: numbers run from 0 to num_tokens - 1.
        max_seq_len: the most tokens of a sequence.
        attn_layers: an Encoder or Decoder.
        emb_dim: features of a token before the layers; None means the layers'.
        emb_dropout: on the embedded tokens.
        num_memory_tokens: learned tokens before each sequence, which are taken off again.
        tie_embedding: logits by the embedding's own weights.
        use_pos_emb: add a learned vector for each place.

    Raises:
        UsageError: attn_layers are none of ours.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        emb_dim: int | None = None,
        emb_dropout: float = 0.0,
        num_memory_tokens: int | None = None,
        tie_embedding: bool = False,
        use_pos_emb: bool = True,
    ):
        super().__init__()
        if not isinstance(attn_layers, AttentionLayers):
            raise UsageError(
                f"attn_layers should be an Encoder or a Decoder, got {type(attn_layers).__name__}"
            )
        dim = attn_layers.dim
        emb_dim = dim if emb_dim is None else emb_dim
        self.max_seq_len, self.num_tokens = max_seq_len, num_tokens
        self.token_emb = nn.Embedding(num_tokens, emb_dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.pos_emb = AbsolutePositionalEmbedding(emb_dim, max_seq_len) if use_pos_emb else None
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.project_emb = nn.Linear(emb_dim, dim) if emb_dim != dim else nn.Identity()
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = None if tie_embedding else nn.Linear(dim, num_tokens)
        self.num_memory_tokens = num_memory_tokens or 0
        if self.num_memory_tokens:
            self.memory_tokens = nn.Parameter(torch.randn(self.num_memory_tokens, dim))

    def forward(
        self, x: Tensor, return_embeddings: bool = False, mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Read token numbers.

        Args:
            x: (b, n) whole numbers.
            return_embeddings: give features (b, n, dim) instead of logits (b, n, num_tokens).
            mask: (b, n), True where a token counts.
            kwargs: context and context_mask of the layers.

        Raises:
            UsageError: more tokens than max_seq_len.
        """
        if x.shape[1] > self.max_seq_len:
            raise UsageError(f"a sequence has at most {self.max_seq_len} tokens, got {x.shape[1]}")
        h = self.token_emb(x)
        if self.pos_emb is not None:
            h = h + self.pos_emb(h)
        h = self.project_emb(self.emb_dropout(h))
        if self.num_memory_tokens:
            h = torch.cat([self.memory_tokens.expand(len(h), -1, -1), h], dim=1)
            mask = mask if mask is None else nn.functional.pad(mask, (self.num_memory_tokens, 0), value=True)
        h = self.norm(self.attn_layers(h, mask=mask, **kwargs))[:, self.num_memory_tokens :]
        if return_embeddings:
            return h
        return h @ self.token_emb.weight.T if self.to_logits is None else self.to_logits(h)
