"""Attention that others may look into: what every control of attention maps is attached by.

A control (prompt-to-prompt, maps of words, mutual self-attention) sees queries, keys and values of attentions, and the
maps (softmax of the scores) where it asks for them; any number of them work together, behind whatever else answers in
an attention. Maps are only made where one asks, of as many heads at a time as MOST_MAPS holds, and what a control keeps
of them does not grow with the steps. An attention that none looks into is computed as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ldm.adapters.deepcache import check_unet
from ldm.errors import UsageError, shown
from ldm.modules.attention import CrossAttention, SpatialTransformer, attend
from ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample
from ldm.modules.processors import AttnProcessor, named_attentions
from ldm.modules.seams import Rank, StepInfo, Undo, fill, undo_all, wrap

# Bytes of the maps, or of what is added to scores, that are made at a time in one attention. Those of the words of a
# guided source and edit of 512 pixels have 40 MB.
MOST_MAPS = 64 << 20


@dataclass(frozen=True, eq=False)
class Place:
    """An attention of a UNet.

    Attributes:
        name: diffusers', as "down_blocks.1.attentions.0.transformer_blocks.0.attn2".
        attention: itself.
        is_cross: it looks at the text.
        halvings: how often the latents' sides were halved there.
        number, count: which it is, from 0 in the order of computation, of how many that look at the text, or do not.
    """

    name: str
    attention: CrossAttention
    is_cross: bool
    halvings: int
    number: int
    count: int

    @property
    def part(self) -> str:
        """The way "down", the "mid" or the way "up"."""
        return self.name.partition("_")[0]

    def cells(self, latents: tuple[int, int]) -> tuple[int, int]:
        """Give the rows and columns of its map, of latents' (h, w)."""
        return halved(latents, self.halvings)


def halved(sides: tuple[int, int], times: int) -> tuple[int, int]:
    """Halve the sides of a map; a convolution that halves odd ones rounds up."""
    h, w = sides
    for _ in range(times):
        h, w = -(-h // 2), -(-w // 2)
    return h, w


def places_of(unet: nn.Module) -> list[Place]:
    """List a UNet's attentions in the order in which they are computed.

    Raises:
        UsageError: it has no spatial transformers.
    """
    names = {id(one): name for name, one in named_attentions(unet).items()}
    found: list[tuple[str, CrossAttention, bool, int]] = []
    halvings = 0
    for block in [*unet.input_blocks, unet.middle_block, *unet.output_blocks]:
        for layer in block:
            if isinstance(layer, SpatialTransformer):
                for part in layer.transformer_blocks:
                    for one, is_cross in ((part.attn1, part.disable_self_attn), (part.attn2, True)):
                        found.append((names[id(one)], one, is_cross, halvings))
            elif isinstance(layer, Downsample | Upsample) or (isinstance(layer, ResBlock) and layer.updown):
                rises = isinstance(layer, Upsample) or getattr(layer, "up", False)
                halvings += -1 if rises else 1
    if not found:
        raise UsageError(
            "control of attention is for a UNet with spatial transformers, and this one has none"
        )
    kinds = [is_cross for _, _, is_cross, _ in found]
    return [Place(*one, kinds[:i].count(one[2]), kinds.count(one[2])) for i, one in enumerate(found)]


class AttentionControl:
    """A control of attention, as an attachment: what all kinds share.

    A kind says by `looks_at` where and when it works, and overrides `tokens`, or `wants_maps` and `maps`, or
    `wants_bias` and `bias`. It works in one run of a sampler, `begin`, which knows what its pictures are by `for_batch`
    (ldm.adapters.use).
    """

    rank: ClassVar[Rank] = Rank.MAPS

    def __init__(self) -> None:
        self._step: StepInfo | None = None
        self._latents: tuple[int, int] = (0, 0)

    def begin(self) -> Self:
        """Return one for one run of a sampler, which stands at a step of its own."""
        return copy.copy(self)

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""
        self._step = step

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError if it cannot be attached to a network."""
        check_unet(unet, type(self).__name__)
        for place in places_of(unet):
            if self.may_look_at(place):
                opened(place.attention.processor, place, self)

    def may_look_at(self, place: Place) -> bool:
        """Tell whether it has anything to do with an attention, at any step."""
        return True

    def looks_at(self, place: Place) -> bool:
        """Tell whether it has anything to do with an attention at this step."""
        return self.may_look_at(place)

    def wants_maps(self, place: Place) -> bool:
        """Tell whether `maps` is to be called for an attention at this step."""
        return False

    def tokens(self, place: Place, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the queries, keys and values (b, heads, n, d) to go on with."""
        return q, k, v

    def wants_bias(self, place: Place) -> bool:
        """Tell whether `bias` is to be called for an attention at this step."""
        return False

    def bias(self, place: Place, q: Tensor, k: Tensor, part: slice) -> Tensor:
        """Give what is added to the scores of a part of the queries q[:, :, part] and all keys, (b, 1, n', m)."""
        raise NotImplementedError

    def maps(self, place: Place, maps: Tensor) -> Tensor:
        """Give the maps (b, h, n, m) of some heads to go on with; each row of one adds up to 1 as it comes.

        It is called for all heads of an attention, one part after the other.
        """
        return maps

    def attach(self, network: nn.Module) -> Undo:
        """Look into the attentions of a UNet that it has to do with at this step."""
        places = [place for place in places_of(network) if self.looks_at(place)]
        undo = [wrap(network, self._called)] if places else []
        undo += [
            fill(place.attention, "processor", opened(place.attention.processor, place, self))
            for place in places
        ]
        return undo_all(undo)

    def _called(self, proceed: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._latents = tuple(x.shape[2:])
        return proceed(x, *args, **kwargs)

    def state(self) -> None:
        """Say that no captured graph serves: what is done differs from step to step."""

    def groups(self, rows: int, *, unconditional: bool = False) -> list[slice]:
        """List the rows of a call with the condition: one slice of all images, or several (of guidance terms).

        Args:
            unconditional: those without it, too.

        Raises:
            UsageError: the control is attached to a UNet alone, without a sampler.
        """
        if self._step is None:
            raise UsageError(
                f"{type(self).__name__} must know which rows are whose; give it to adapters= of txt2img, img2img, "
                "inpaint or stream"
            )
        images = self._step.images or rows
        first = 0 if unconditional else self._step.unconditional
        return [slice(i, i + images) for i in range(first, rows, images)]

    def expect_whole(self, place: Place, tokens: int) -> None:
        """Raise UsageError if the tokens of an attention are not its map's, cell by cell."""
        rows, columns = place.cells(self._latents)
        if rows * columns != tokens:
            raise UsageError(
                f"{type(self).__name__} needs tokens one by one, and got {tokens} of a map of {rows} x {columns} "
                "cells; merge no tokens there"
            )


def check_batch(what: str, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise UsageError unless a batch holds a source and its edits, which begin with the same noise."""
    if len(prompts) < 2:
        raise UsageError(
            f"{what} wants a source and its edits in one batch, got {len(prompts)} picture; give [source, edit] as "
            "prompts, and a batch_size of both"
        )
    if len(set(seeds)) > 1:
        raise UsageError(
            f"{what}'s pictures must begin with the same noise, got the seeds {shown(list(seeds))}; give "
            f"seed={shown([seeds[0]] * len(seeds))}"
        )


class Opened:
    """A processor that computes as another one does, with controls looking into its attention."""

    takes_attending = True

    def __init__(self, before: Any, place: Place, controls: tuple[AttentionControl, ...]):
        self.before, self.place, self.controls = before, place, controls

    def __call__(
        self,
        attn: CrossAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Answer as the processor does; see ldm.modules.processors."""
        return self.before(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            attending=self.attending,
        )

    def attending(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend as `ldm.modules.attention.attend` does, each control in its turn."""
        for one in self.controls:
            q, k, v = one.tokens(self.place, q, k, v)
        b, heads, n, _ = q.shape
        answers = []
        if any(one.wants_maps(self.place) for one in self.controls):
            mask = self._biased(mask, q, k, slice(0, n))
            for part in parts_of(heads, b * n * k.shape[2] * 4):
                own = mask[:, part] if mask is not None and mask.dim() == 4 and mask.shape[1] > 1 else mask
                answers.append(self._by_maps(q[:, part], k[:, part], v[:, part], own, scale))
            return _joined(answers, dim=1)
        if not any(one.wants_bias(self.place) for one in self.controls):
            return attend(q, k, v, mask, scale)
        for part in parts_of(n, b * k.shape[2] * q.element_size()):
            own = mask[..., part, :] if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1 else mask
            answers.append(attend(q[:, :, part], k, v, self._biased(own, q, k, part), scale))
        return _joined(answers, dim=2)

    def _by_maps(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attend by maps that are made, and seen by the controls that want them."""
        maps = _softmax(q, k, mask, scale)
        for one in self.controls:
            if one.wants_maps(self.place):
                maps = one.maps(self.place, maps)
        return maps.to(v.dtype) @ v

    def _biased(self, mask: Tensor | None, q: Tensor, k: Tensor, part: slice) -> Tensor | None:
        """Add to a mask of a part of the queries what controls add to their scores."""
        for one in self.controls:
            if one.wants_bias(self.place):
                bias = one.bias(self.place, q, k, part)
                mask = bias if mask is None else mask + bias
        return mask

    def state(self) -> None:
        """Say that no captured graph serves."""


def parts_of(count: int, bytes_of_one: int) -> Iterator[slice]:
    """Cut a count into parts of at most MOST_MAPS bytes each, or of one."""
    most = max(1, MOST_MAPS // max(1, bytes_of_one))
    return (slice(i, min(i + most, count)) for i in range(0, count, most))


def _joined(answers: list[Tensor], dim: int) -> Tensor:
    return answers[0] if len(answers) == 1 else torch.cat(answers, dim)


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Give the maps (b, heads, n, m) of queries and keys, in float32."""
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if mask is None else scores + mask).softmax(dim=-1)


def _name_of(processor: Any) -> str:
    return getattr(processor, "__qualname__", type(processor).__qualname__)


def opened(before: Any, place: Place, control: AttentionControl) -> Opened:
    """Let a control look into what answers in an attention, behind those that do already.

    Raises:
        UsageError: somebody's processor answers there, and says nothing of its attention.
    """
    if isinstance(before, Opened):
        return Opened(before.before, place, (*before.controls, control))
    before = AttnProcessor() if before is None else before
    if not getattr(before, "takes_attending", False):
        raise UsageError(
            f"{type(control).__name__} looks into attention, and {shown(_name_of(before))} answers in {place.name} by "
            "itself; take one of the two off"
        )
    return Opened(before, place, (control,))
