"""From CLIP's features of a picture to tokens of its style: T2I-Adapter's style adapter (arXiv:2302.08453)."""

import torch
from torch import Tensor, nn


class _Block(nn.Module):
    """Attention and two layers, each added to what it gets: a block of CLIP's transformers, by CLIP's own names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))  # CLIP's approximation of GELU


class StyleTokens(nn.Module):
    """Learned tokens attend to a picture's, and to themselves, and go into the context of a UNet.

    The names are TencentARC's, with their spelling.

    Args:
        width: of CLIP's hidden states.
        context_dim: of a context's token.
        heads: of the attentions.
        layers, num_tokens: how many.
    """

    def __init__(self, width: int, context_dim: int, heads: int, layers: int, num_tokens: int):
        super().__init__()
        self.width, self.context_dim, self.num_tokens = width, context_dim, num_tokens
        self.transformer_layes = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.style_embedding = nn.Parameter(torch.zeros(1, num_tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, context_dim))

    def forward(self, states: Tensor) -> Tensor:
        """Turn states (n, tokens, width) into (n, num_tokens, context_dim)."""
        x = torch.cat([states, self.style_embedding.expand(len(states), -1, -1)], dim=1)
        x = self.transformer_layes(self.ln_pre(x))
        return self.ln_post(x[:, -self.num_tokens :]) @ self.proj
