"""From features of a picture or a face to tokens of a context: the projections of IP-Adapter (arXiv:2308.06721)."""

import torch
from torch import Tensor, nn

from ldm.modules.attention import attend

HEAD = 64  # features of a head of the published resamplers


class ImageProjection(nn.Module):
    """The plain adapter's: CLIP's projected embedding becomes a few tokens.

    Args:
        width: of the embedding.
        context_dim: of a token.
        num_tokens: how many.

    Attributes:
        reads: what of CLIP, "embeds" or "states"; None = nothing.
    """

    reads = "embeds"

    def __init__(self, width: int, context_dim: int, num_tokens: int):
        super().__init__()
        self.width, self.context_dim, self.num_tokens = width, context_dim, num_tokens
        self.proj = nn.Linear(width, num_tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, embeds: Tensor) -> Tensor:
        """Turn (n, width) into (n, num_tokens, context_dim)."""
        return self.norm(self.proj(embeds).reshape(len(embeds), self.num_tokens, self.context_dim))


class ImageTokenMLP(nn.Module):
    """The full-face adapter's: each of CLIP's hidden tokens becomes one.

    Args:
        width: of a hidden token.
        hidden: of the layer between.
        context_dim: of a token.
    """

    reads = "states"

    def __init__(self, width: int, hidden: int, context_dim: int):
        super().__init__()
        self.width, self.context_dim = width, context_dim
        self.proj = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, context_dim), nn.LayerNorm(context_dim)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Turn (n, tokens, width) into (n, tokens, context_dim)."""
        return self.proj(states)


class _PerceiverAttention(nn.Module):
    """Latents attend to the picture's tokens and to themselves."""

    def __init__(self, dim: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(latents), k, v))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class _Resampler(nn.Module):
    """Latents read CLIP's hidden tokens by attention (Flamingo's perceiver resampler).

    Args:
        width: of a hidden token.
        dim, inner: of a latent, and of all heads together.
        heads: their number.
        depth: of attentions, each with a feed-forward of `hidden` features behind it.
        context_dim: of a token.
    """

    def __init__(
        self, width: int, dim: int, inner: int, heads: int, depth: int, hidden: int, context_dim: int
    ):
        super().__init__()
        self.width, self.context_dim = width, context_dim
        self.proj_in, self.proj_out = nn.Linear(width, dim), nn.Linear(dim, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _PerceiverAttention(dim, inner, heads),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, hidden, bias=False),
                        nn.GELU(),
                        nn.Linear(hidden, dim, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def read(self, states: Tensor, latents: Tensor) -> Tensor:
        """Turn latents (n, tokens, dim) into (n, tokens, context_dim), by what they read in (n, cells, width)."""
        x = self.proj_in(states)
        for attention, feed_forward in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


class ImageResampler(_Resampler):
    """The plus adapter's: learned latents become the tokens; see _Resampler.

    Args:
        num_tokens: how many.
    """

    reads = "states"

    def __init__(
        self,
        width: int,
        dim: int,
        inner: int,
        heads: int,
        depth: int,
        hidden: int,
        context_dim: int,
        num_tokens: int,
    ):
        super().__init__(width, dim, inner, heads, depth, hidden, context_dim)
        self.num_tokens = num_tokens
        self.latents = nn.Parameter(torch.zeros(1, num_tokens, dim))

    def forward(self, states: Tensor) -> Tensor:
        """Turn (n, tokens, width) into (n, num_tokens, context_dim)."""
        return self.read(states, self.latents.expand(len(states), -1, -1))


class FaceProjection(nn.Module):
    """FaceID's: the embedding of a face recognition becomes a few tokens.

    Args:
        embed_dim: of the embedding; 512 for the published files.
        hidden: of the layer between.
        context_dim: of a token.
        num_tokens: how many.
    """

    reads: str | None = None

    def __init__(self, embed_dim: int, hidden: int, context_dim: int, num_tokens: int):
        super().__init__()
        self.embed_dim, self.context_dim, self.num_tokens = embed_dim, context_dim, num_tokens
        self.proj = nn.Sequential(
            nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, num_tokens * context_dim)
        )
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Turn (n, embed_dim) into (n, num_tokens, context_dim)."""
        return self.norm(self.proj(ids).unflatten(1, (self.num_tokens, -1)))


class FaceResampler(FaceProjection):
    """FaceID-plus's: the tokens of FaceProjection are latents that read CLIP's hidden tokens; see _Resampler."""

    reads = "states"

    def __init__(
        self,
        embed_dim: int,
        mid_channels: int,
        num_tokens: int,
        width: int,
        dim: int,
        inner: int,
        heads: int,
        depth: int,
        hidden: int,
        context_dim: int,
    ):
        super().__init__(embed_dim, mid_channels, dim, num_tokens)
        self.width, self.context_dim = width, context_dim
        self.perceiver_resampler = _Resampler(width, dim, inner, heads, depth, hidden, context_dim)

    def forward(self, ids: Tensor, states: Tensor, shortcut: float = 0.0) -> Tensor:
        """Turn (n, embed_dim) and (n, tokens, width) into (n, num_tokens, context_dim).

        Args:
            shortcut: 0 = the answer of the latents, as the first version was trained; else the face's tokens +
                shortcut * that answer, as plusv2 was trained with 1.
        """
        latents = super().forward(ids)
        answer = self.perceiver_resampler.read(states, latents)
        return latents + shortcut * answer if shortcut else answer
