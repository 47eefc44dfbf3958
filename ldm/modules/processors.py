"""Attention processors by diffusers' contract: the plain one, IP-Adapter's, and a UNet's dictionary of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UsageError, shown
from ldm.limits import about_whole, is_whole
from ldm.modules.attention import CrossAttention, attend
from ldm.modules.seams import state_of

Processor = Callable[..., Tensor]
Attending = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, float], Tensor
]  # as ldm.modules.attention.attend
MOST_HEADS = 1 << 20  # of all rows of a batch together


class AttnProcessor(nn.Module):
    """What a CrossAttention does by itself, as a processor. Set on one, it leaves the attention to itself.

    A processor is called as `processor(attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
    temb=None)`: attn is a CrossAttention with diffusers' names beside its own, hidden_states (b, n, d), or a map
    (b, d, h, w), encoder_hidden_states (b, m, context), attention_mask (b, 1 or n, m) is added to the scores. It
    returns what it got, answered. One whose `takes_attending` is true also takes `attending`, which attends to the
    text, or of the tokens to themselves, in the place of ldm.modules.attention.attend: others look in by it.

    Args:
        hidden_size, cross_attention_dim: taken as IP-Adapter's own class takes them; it has no weights.
    """

    is_plain = True
    takes_attending = True

    def __init__(self, hidden_size: int | None = None, cross_attention_dim: int | None = None):
        super().__init__()
        self.hidden_size, self.cross_attention_dim = hidden_size, cross_attention_dim

    def forward(
        self,
        attn: CrossAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        attending: Attending = attend,
    ) -> Tensor:
        """Answer as the attention would, (b, n, d), or a map where a map was given."""
        q, k, v, mask = projected(attn, hidden_states, encoder_hidden_states, attention_mask)
        return answered(attn, attending(q, k, v, mask, attn.scale), hidden_states)

    def state(self) -> Hashable:
        """Say what a captured graph of it depends on: nothing."""
        return ("AttnProcessor",)


class SlicedAttnProcessor:
    """What a CrossAttention does by itself, for some heads of some rows at a time: less memory where scores are held.

    Args:
        slice_size: how many at a time, 1 to any number; of a batch of b rows there are b * heads.

    Raises:
        UsageError: a slice_size that is no whole number from 1 on.
    """

    takes_attending = True

    def __init__(self, slice_size: int):
        if not is_whole(slice_size, 1, MOST_HEADS):
            raise UsageError(f"slice_size must be {about_whole(1, MOST_HEADS)}, got {shown(slice_size)}")
        self.slice_size = int(slice_size)

    def __call__(
        self,
        attn: CrossAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        attending: Attending | None = None,
    ) -> Tensor:
        """Answer as AttnProcessor does, and with `attending` at once; see there."""
        q, k, v, mask = projected(attn, hidden_states, encoder_hidden_states, attention_mask)
        if attending is not None:
            return answered(attn, attending(q, k, v, mask, attn.scale), hidden_states)
        if mask is not None:
            mask = mask.expand(len(q), attn.heads, -1, -1).flatten(0, 1)
        q, k, v = (heads.flatten(0, 1) for heads in (q, k, v))  # (b heads, n, d) each
        out = torch.empty_like(q)
        for i in range(0, len(q), self.slice_size):
            part = slice(i, i + self.slice_size)
            own = None if mask is None else mask[None, part]
            out[part] = attend(q[None, part], k[None, part], v[None, part], own, attn.scale)[0]
        return answered(attn, out.unflatten(0, (-1, attn.heads)), hidden_states)

    def state(self) -> Hashable:
        """Say what a captured graph of it depends on."""
        return ("SlicedAttnProcessor", self.slice_size)


class IPAttnProcessor(nn.Module):
    """IP-Adapter's decoupled attention (arXiv:2308.06721, eq. 5): the text's answer + scale * the image's.

    The last tokens of the context are the image's; `to_k_ip` and `to_v_ip` read them.

    Args:
        hidden_size: features of all heads together.
        cross_attention_dim: features of a token of the context; None means hidden_size.
        scale: of the image's answer.
        num_tokens: how many tokens the image has.
    """

    takes_attending = True

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        scale: float = 1.0,
        num_tokens: int = 4,
    ):
        super().__init__()
        self.hidden_size, self.cross_attention_dim = hidden_size, cross_attention_dim
        self.scale, self.num_tokens = scale, num_tokens
        self.to_k_ip = nn.Linear(cross_attention_dim or hidden_size, hidden_size, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim or hidden_size, hidden_size, bias=False)

    def forward(
        self,
        attn: CrossAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        attending: Attending = attend,
    ) -> Tensor:
        """Answer as AttnProcessor does; see there.

        Raises:
            UsageError: the context has no token beside the image's.
        """
        tokens = tokens_of(hidden_states)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        text = context.shape[1] - self.num_tokens
        if text < 1:
            raise UsageError(
                f"an IPAttnProcessor of num_tokens={self.num_tokens} wants a text and behind it the image's tokens, "
                f"got a context of {context.shape[1]}"
            )
        words, image = context[:, :text], context[:, text:]
        mask = attn.prepare_attention_mask(attention_mask, text, len(tokens), out_dim=4)
        q, k, v, k_image, v_image = (
            attn.head_to_batch_dim(layer(y), out_dim=4)
            for layer, y in (
                (attn.to_q, tokens),
                (attn.to_k, words),
                (attn.to_v, words),
                (self.to_k_ip, image),
                (self.to_v_ip, image),
            )
        )
        out = attending(q, k, v, mask, attn.scale)
        out = out + self.scale * attend(q, k_image, v_image, None, attn.scale)
        return answered(attn, out, hidden_states)

    def state(self) -> Hashable:
        """Say what a captured graph of it depends on."""
        return ("IPAttnProcessor", self.scale, self.num_tokens, *map(state_of, self.parameters()))


def tokens_of(hidden_states: Tensor) -> Tensor:
    """Give tokens (b, n, d), also of a map (b, d, h, w)."""
    return hidden_states.flatten(2).transpose(1, 2) if hidden_states.dim() == 4 else hidden_states


def projected(
    attn: CrossAttention, hidden_states: Tensor, context: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Give query, key and value, (b, heads, n or m, d) each, and the mask for them; without a context of the tokens."""
    tokens = tokens_of(hidden_states)
    context = tokens if context is None else context
    mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(tokens), out_dim=4)
    q, k, v = (
        attn.head_to_batch_dim(layer(y), out_dim=4)
        for layer, y in ((attn.to_q, tokens), (attn.to_k, context), (attn.to_v, context))
    )
    return q, k, v, mask


def answered(attn: CrossAttention, out: Tensor, given: Tensor) -> Tensor:
    """Give heads (b, heads, n, d) to the output layers; a map where a map was given."""
    out = attn.to_out(out.transpose(1, 2).flatten(2))
    return out.transpose(1, 2).reshape(given.shape) if given.dim() == 4 else out


# --- a UNet's dictionary ----------------------------------------------------------------------------


def named_attentions(unet: nn.Module) -> dict[str, CrossAttention]:
    """List a UNet's attentions by diffusers' names and in its order: the path down, the path up, the middle.

    Returns:
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn1": ..., ...}; 32 for Stable Diffusion v1.
    """
    levels, depths = len(unet.channel_mult), unet.num_res_blocks
    depths = [depths] * levels if isinstance(depths, int) else list(depths)
    # Of each level the residual blocks; on the way down its halving, too, on the way up one block more.
    down = [level for level, depth in enumerate(depths) for _ in range(depth + (level < levels - 1))]
    up = [place for place, depth in enumerate(reversed(depths)) for _ in range(depth + 1)]
    places = [
        *((f"down_blocks.{level}", block) for level, block in zip(down, unet.input_blocks[1:], strict=True)),
        *((f"up_blocks.{place}", block) for place, block in zip(up, unet.output_blocks, strict=True)),
        ("mid_block", unet.middle_block),
    ]
    named: dict[str, CrossAttention] = {}
    seen: dict[str, int] = {}
    for place, block in places:
        for transformer in block:
            if not hasattr(transformer, "transformer_blocks"):
                continue
            number = seen.get(place, 0)
            seen[place] = number + 1
            for i, part in enumerate(transformer.transformer_blocks):
                for name in ("attn1", "attn2"):
                    named[f"{place}.attentions.{number}.transformer_blocks.{i}.{name}"] = getattr(part, name)
    return named


def attn_processors(unet: nn.Module) -> dict[str, Any]:
    """List what answers in each attention; an AttnProcessor where that is the attention itself."""
    return {
        f"{name}.processor": AttnProcessor() if attn.processor is None else attn.processor
        for name, attn in named_attentions(unet).items()
    }


def set_attn_processor(unet: nn.Module, processor: Processor | Mapping[str, Processor]) -> None:
    """Let processors answer in a UNet's attentions: one for all, or one for each by the names of attn_processors.

    Raises:
        UsageError: a dictionary of another length, or with another name; nothing was set.
    """
    attentions = {f"{name}.processor": attn for name, attn in named_attentions(unet).items()}
    if not isinstance(processor, Mapping):
        if not callable(processor):
            raise UsageError(
                f"set_attn_processor takes a processor or a dictionary of them, got {shown(processor)}"
            )
        processor = dict.fromkeys(attentions, processor)
    if len(processor) != len(attentions):
        raise UsageError(
            f"a dictionary of processors should have one for each of {len(attentions)} attentions, got "
            f"{len(processor)}; take the names from attn_processors"
        )
    for name, one in processor.items():
        if name not in attentions:
            raise UsageError(f"there is no attention {shown(name)}; take the names from attn_processors")
        if not callable(one):
            raise UsageError(f"the processor of {shown(name)} should be callable, got {shown(one)}")
    for name, one in processor.items():
        attentions[name].set_processor(one)
