"""Attention between the cells of a map and the words of a prompt.

Code from elsewhere replaces `CrossAttention.forward` on the class, so every attention of the UNet is an
ordinary call of a CrossAttention.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import MismatchError
from ldm.helpers import default, exists
from ldm.modules.attention_interface import ProcessorInterface
from ldm.modules.diffusionmodules.util import checkpoint, zero_module

# Bytes. As large as those of a UNet's first level for one guided picture of 512 pixels in half precision.
MOST_SCORES = 512 << 20

__all__ = [
    "BasicTransformerBlock",
    "CrossAttention",
    "FeedForward",
    "GEGLU",
    "LinearAttention",
    "MemoryEfficientCrossAttention",
    "Normalize",
    "SpatialSelfAttention",
    "SpatialTransformer",
    "attend",
    "default",
    "exists",
    "init_",
    "max_neg_value",
    "uniq",
    "zero_module",
]


def uniq(arr: list) -> list:
    """Return the distinct values in the order of their first appearance."""
    return list(dict.fromkeys(arr))


def max_neg_value(t: Tensor) -> float:
    """Return the most negative finite number of a tensor's dtype."""
    return -torch.finfo(t.dtype).max


def init_(tensor: Tensor) -> Tensor:
    """Fill a weight in place with uniform values bounded by 1 / sqrt(its last dimension)."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    return tensor.uniform_(-bound, bound)


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute softmax(scale q k^T + mask) v, in portions of queries where the scores would fill the memory.

    torch has kernels that never hold the scores; where none of them serves (other devices than CPU and CUDA, old GPUs,
    some masks), at most MOST_SCORES bytes of scores are held at a time. Each query's answer is its own, so the
    portions change nothing but rounding.

    Args:
        q: (b, heads, n, d).
        k, v: (b, heads, m, d).
        attn_mask: as torch's scaled_dot_product_attention takes it; broadcast over queries, or (..., n, m).
        scale: None means 1 / sqrt(d).
    """
    row = q.shape[0] * q.shape[1] * k.shape[2] * q.element_size()  # bytes of the scores of one query
    rows = max(1, MOST_SCORES // max(1, row))
    if q.shape[2] <= rows or _is_fused(q, k, v, attn_mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
    answers = []
    for i in range(0, q.shape[2], rows):
        mask = attn_mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., i : i + rows, :]
        part = F.scaled_dot_product_attention(q[:, :, i : i + rows], k, v, attn_mask=mask, scale=scale)
        answers.append(part)
    return torch.cat(answers, dim=2)


def _is_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether torch has a kernel for this that does not hold the scores."""
    if q.device.type != "cuda":
        return q.device.type == "cpu"
    backends = torch.backends.cuda
    params = backends.SDPAParams(q, k, v, mask, 0.0, False, False)
    return backends.can_use_flash_attention(params) or backends.can_use_efficient_attention(params)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:  # noqa: N802 (CompVis's name)
    """Make a group norm with the autoencoder's eps of 1e-6 (the UNet's residual blocks have 1e-5).

    Raises:
        MismatchError: the channels do not divide into the groups.
    """
    if in_channels % num_groups:
        raise MismatchError(
            f"{in_channels} channels do not divide into num_groups={num_groups} groups; "
            "change ch, ch_mult or num_groups"
        )
    return nn.GroupNorm(num_groups=num_groups, num_channels=in_channels, eps=1e-6, affine=True)


class GEGLU(nn.Module):
    """A linear layer whose output is gated by the exact GELU of its second half (arXiv:2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """The feed-forward network of a transformer: linear, GELU or GEGLU, linear; (b, n, dim) to (b, n, dim_out)."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        inner = int(dim * mult)
        first = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, default(dim_out, dim)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LinearAttention(nn.Module):
    """Attention whose keys are normalised over the cells, so that its cost grows linearly (arXiv:1812.01243)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        q, k, v = rearrange(self.to_qkv(x), "b (qkv k c) h w -> qkv b k c (h w)", k=self.heads, qkv=3)
        mixed = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (b, k, c, c)
        out = mixed.transpose(-1, -2) @ q  # (b, k, c, h*w)
        return self.to_out(rearrange(out, "b k c (h w) -> b (k c) h w", h=h, w=w))


class SpatialSelfAttention(nn.Module):
    """Self-attention over the cells of a map with one head; the same function as the autoencoder's AttnBlock."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        out = attend(q, k, v)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class CrossAttention(ProcessorInterface, nn.Module):
    """Attention from x to a context, or to x itself where none is given.

    Attributes:
        processor: called in place of the attention, by diffusers' contract (ldm.modules.processors), or None.

    Args:
        query_dim: features of x.
        context_dim: features of the context; None means x's.
        heads, dim_head: how many heads of how many features.
        dropout: on the output.

    forward takes x (b, n, query_dim), context (b, m, context_dim) and mask (b, m), True where a token of the
    context may be seen; it returns (b, n, query_dim).
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = default(context_dim, query_dim)
        self.scale = dim_head**-0.5
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))
        self.processor = None

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.processor is not None:
            hidden = mask if mask is None else rearrange(~mask.bool(), "b ... -> b 1 (...)")
            bias = mask if mask is None else x.new_zeros(hidden.shape).masked_fill_(hidden, max_neg_value(x))
            return self.processor(self, x, encoder_hidden_states=context, attention_mask=bias)
        context = default(context, x)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b n (k d) -> b k n d", k=self.heads) for y in (q, k, v))
        if mask is not None:
            mask = rearrange(mask, "b ... -> b 1 1 (...)").bool()  # the same for every head and query
        out = attend(q, k, v, mask, self.scale)
        return self.to_out(rearrange(out, "b k n d -> b n (k d)"))


# Stable Diffusion 2 gave the memory-saving path a class of its own; here CrossAttention saves memory itself.
MemoryEfficientCrossAttention = CrossAttention


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each normalised first and added to its input.

    Attributes:
        around: a slot (ldm.modules.seams): given the block's tokens (b, n, dim), it gives two functions that are
            applied before and behind the self-attention, such as merging and unmerging; None = nothing.
    """

    around: Callable[[Tensor], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] | None = None

    ATTENTION_MODES = {"softmax": CrossAttention, "softmax-xformers": MemoryEfficientCrossAttention}

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ):
        super().__init__()
        self.disable_self_attn = disable_self_attn
        heads = {"query_dim": dim, "heads": n_heads, "dim_head": d_head, "dropout": dropout}
        # The order of registration is the order of parameters in saved optimizer states.
        self.attn1 = CrossAttention(context_dim=context_dim if disable_self_attn else None, **heads)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(context_dim=context_dim, **heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        seen = context if self.disable_self_attn else None
        if self.around is None:
            x = self.attn1(self.norm1(x), context=seen) + x
        else:
            before, behind = self.around(x)
            x = behind(self.attn1(before(self.norm1(x)), context=seen)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a map, added to the map.

    Args:
        in_channels: of the map.
        n_heads, d_head: of every attention.
        depth: number of blocks.
        context_dim: features of the context; a list gives one for each block.
        disable_self_attn: the first attention looks at the context, too.
        use_linear: project by linear layers instead of 1x1 convolutions.
        use_checkpoint: recompute the blocks in the backward pass instead of keeping their activations.

    Attributes:
        entering: a slot (ldm.modules.seams): called with the input map, or None.

    forward takes x (b, in_channels, h, w) and context (b, n, context_dim), or a list of one for each block.
    """

    entering: Callable[[Tensor], None] | None = None

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | list[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
    ):
        super().__init__()
        context_dims = (
            [context_dim] * depth if context_dim is None or isinstance(context_dim, int) else [*context_dim]
        )
        if len(context_dims) == 1:
            context_dims = context_dims * depth
        if len(context_dims) != depth:
            raise MismatchError(
                f"context_dim lists {len(context_dims)} widths for transformer_depth={depth} blocks"
            )
        self.in_channels = in_channels
        self.use_linear = use_linear
        inner_dim = n_heads * d_head
        self.norm = Normalize(in_channels)
        self.proj_in = (
            nn.Linear(in_channels, inner_dim) if use_linear else nn.Conv2d(in_channels, inner_dim, 1)
        )
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                n_heads,
                d_head,
                dropout=dropout,
                context_dim=width,
                disable_self_attn=disable_self_attn,
                checkpoint=use_checkpoint,
            )
            for width in context_dims
        )
        # The linear form is declared the wrong way round in Stable Diffusion 2; kept, because it decides the
        # shape in checkpoints wherever the two widths differ.
        proj_out = nn.Linear(in_channels, inner_dim) if use_linear else nn.Conv2d(inner_dim, in_channels, 1)
        self.proj_out = zero_module(proj_out)

    def forward(self, x: Tensor, context: Tensor | list[Tensor] | None = None) -> Tensor:
        if self.entering is not None:
            self.entering(x)
        contexts = context if isinstance(context, list) else [context] * len(self.transformer_blocks)
        contexts = [seen if seen is None else seen.to(x.dtype) for seen in contexts]
        height, width = x.shape[2:]
        tokens = self.norm(x)
        if self.use_linear:
            tokens = self.proj_in(rearrange(tokens, "b c h w -> b (h w) c"))
        else:
            tokens = rearrange(self.proj_in(tokens), "b c h w -> b (h w) c")
        for block, seen in zip(self.transformer_blocks, contexts, strict=True):
            tokens = block(tokens, context=seen)
        if self.use_linear:
            tokens = self.proj_out(tokens)
            return x + rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)
        return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width))
