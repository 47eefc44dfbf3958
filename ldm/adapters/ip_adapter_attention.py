"""What several IP-Adapters answer in one attention: the text's answer, and each picture's beside it."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.ip_adapter_images import RegionMask
from ldm.errors import UsageError, shown
from ldm.modules.attention import CrossAttention, attend
from ldm.modules.processors import Attending, IPAttnProcessor, answered, tokens_of
from ldm.modules.seams import state_of
from ldm.values import check_value

# A number for all blocks, or one for some of them in diffusers' words; what is not named has 0.
BlockScale = float | Mapping[str, Any]
Scale = BlockScale | Sequence[BlockScale] | Callable[[float], BlockScale]


# --- scales -----------------------------------------------------------------------------------------


def check_scale(given: Any) -> Scale:
    """Return an IP-Adapter's scale, all its numbers finite.

    Raises:
        UsageError: it is none of the kinds that IPAdapter takes.
    """
    if callable(given):
        return given
    if isinstance(given, list | tuple):
        if not 0 < len(given) <= 1000:
            raise UsageError(
                f"a list of scales should hold 1 to 1000, one for each part of the steps, got {len(given)}"
            )
        return [check_block_scale(one) for one in given]
    return check_block_scale(given)


def check_block_scale(given: Any) -> BlockScale:
    """Return a scale for one step: a number, or {"down": ..., "mid": ..., "up": ...} as diffusers has it."""
    if not isinstance(given, Mapping):
        return float(check_value(given, float, "scale"))
    return {_known(part, ("down", "mid", "up")): _check_part(part, one) for part, one in given.items()}


def _check_part(part: str, given: Any) -> Any:
    if isinstance(given, Mapping) and part != "mid":
        known = tuple(f"block_{i}" for i in range(16))
        return {_known(block, known): _check_numbers(f"{part} {block}", one) for block, one in given.items()}
    return _check_numbers(part, given)


def _check_numbers(place: str, given: Any) -> float | list[float]:
    if isinstance(given, list | tuple):
        return [float(check_value(one, float, f"scale of {place}")) for one in given]
    return float(check_value(given, float, f"scale of {place}"))


def _known(name: Any, names: Sequence[str]) -> str:
    if name not in names:
        raise UsageError(
            "a scale's blocks should be down, mid and up, and within down and up block_0, block_1, ...; got "
            f"{shown(name)}"
        )
    return name


def scale_at(scale: Scale, progress: float) -> BlockScale:
    """Give the scale of a step, which begins at this share of the sampler's way, 0 to below 1."""
    if callable(scale):
        return check_block_scale(scale(progress))
    if isinstance(scale, list):  # 29 / 100 * 100 is a little below 29
        return scale[min(int(progress * len(scale) + 1e-6), len(scale) - 1)]
    return scale


def scales_of(scale: BlockScale, places: Sequence[str]) -> list[float]:
    """Give the scale of each attention.

    Args:
        places: diffusers' names of all of them, "down_blocks.1.attentions.0.transformer_blocks.0.attn2".

    Raises:
        UsageError: a block that the UNet does not have, or a list of another length than there are attentions.
    """
    if not isinstance(scale, Mapping):
        return [scale] * len(places)
    ways = [_way(place) for place in places]
    counts = {way[:2]: 1 + max(n for *block, n in ways if tuple(block) == way[:2]) for way in ways}
    for part, given in scale.items():
        for block in given if isinstance(given, Mapping) else ():
            if (part, block) not in counts:
                raise UsageError(f"scale names {part} {block}, which has no attention in this UNet")
        for (_, block), count in ((key, n) for key, n in counts.items() if key[0] == part):
            numbers = given.get(block, 0.0) if isinstance(given, Mapping) else given
            if isinstance(numbers, list) and len(numbers) not in (1, count):
                raise UsageError(
                    f"scale should have {count} numbers for {part} {block}, one for each attention, got {len(numbers)}"
                )
    return [_of_way(scale, *way) for way in ways]


def _way(place: str) -> tuple[str, str, int]:
    """Take "up_blocks.1.attentions.2..." apart: ("up", "block_1", 2); ("mid", "block_0", 0)."""
    part, *rest = place.split(".")
    if part == "mid_block":
        return "mid", "block_0", int(rest[1])
    return part.removesuffix("_blocks"), f"block_{rest[0]}", int(rest[2])


def _of_way(scale: Mapping[str, Any], part: str, block: str, number: int) -> float:
    given = scale.get(part, 0.0)
    if isinstance(given, Mapping):
        given = given.get(block, 0.0)
    return given[min(number, len(given) - 1)] if isinstance(given, list) else given


# --- in an attention --------------------------------------------------------------------------------


class Painted:
    """How large what is painted is: latents (height, width), known at each call of the UNet."""

    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ImagePart:
    """One IP-Adapter in one attention.

    Attributes:
        layers: read its tokens.
        scale: of its answer.
        num_tokens: of all its pictures together.
        masks: none; one for all its pictures, which answer together; or one for each, which answer one by one.
        painted: what the masks are brought to.
    """

    layers: IPAttnProcessor
    scale: float
    num_tokens: int
    masks: tuple[RegionMask, ...]
    painted: Painted

    def answer(self, attn: CrossAttention, q: Tensor, image: Tensor) -> Tensor:
        """Answer queries (b, heads, n, d) by the tokens of the pictures, (b, num_tokens, context_dim)."""
        answers = []
        for i, one in enumerate(image.chunk(max(1, len(self.masks)), dim=1)):
            k, v = (
                attn.head_to_batch_dim(layer(one), out_dim=4)
                for layer in (self.layers.to_k_ip, self.layers.to_v_ip)
            )
            answer = attend(q, k, v, None, attn.scale)
            answers.append(
                answer * self.masks[i].at(self.painted.size, q.shape[2], q) if self.masks else answer
            )
        return self.scale * (answers[0] if len(answers) == 1 else torch.stack(answers).sum(0))

    def state(self) -> Hashable:
        """Say what a captured graph of it depends on."""
        masks = tuple(mask.hash for mask in self.masks)
        return (self.scale, self.num_tokens, masks, *map(state_of, self.layers.parameters()))


class ImageAttention:
    """A processor (ldm.modules.processors) in which any number of IP-Adapters answer beside the text.

    The context holds the text's tokens, and behind them those of the last part, ..., of the first part.
    """

    takes_attending = True

    def __init__(self, parts: tuple[ImagePart, ...]):
        self.parts = parts

    def __call__(
        self,
        attn: CrossAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        attending: Attending = attend,
    ) -> Tensor:
        """Answer as IPAttnProcessor does; see there."""
        tokens = tokens_of(hidden_states)
        counts = [part.num_tokens for part in reversed(self.parts)]
        text = encoder_hidden_states.shape[1] - sum(counts)
        words, *pictures = encoder_hidden_states.split([text, *counts], dim=1)
        mask = attn.prepare_attention_mask(attention_mask, text, len(tokens), out_dim=4)
        q, k, v = (
            attn.head_to_batch_dim(layer(y), out_dim=4)
            for layer, y in ((attn.to_q, tokens), (attn.to_k, words), (attn.to_v, words))
        )
        out = attending(q, k, v, mask, attn.scale)
        for part, image in zip(self.parts, reversed(pictures), strict=True):
            if part.scale:
                out = out + part.answer(attn, q, image)
        return answered(attn, out, hidden_states)

    def state(self) -> Hashable:
        """Say what a captured graph of it depends on."""
        return ("ImageAttention", *(part.state() for part in self.parts))
