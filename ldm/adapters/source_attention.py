"""A batch whose first picture is the source: the others take its content, or its layout, from inside the network.

    sd.txt2img([source, edit], seed=[5, 5], adapters=[MutualSelfAttention()])   # its content, in another pose
    sd.txt2img([source, edit], seed=[5, 5], adapters=[PlugAndPlay()])           # its layout, in another look

`StableDiffusion.edit` gives the first picture the path of an inverted photograph.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.attention_control import AttentionControl, Place, check_batch, places_of
from ldm.errors import UsageError, shown
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.modules.seams import Undo, undo_all, wrap
from ldm.prompt.alignment import ReadsPrompts, check_share
from ldm.values import Range, check_value

PAPERS_LAYER = 10 / 16  # of Stable Diffusion v1's self-attentions, from which on MasaCtrl works


class _FromSource(AttentionControl):
    """What both share: a batch of a source and its edits, which all begin with the same noise."""

    def __init__(self) -> None:
        super().__init__()
        self._images = 0

    def for_batch(self, encoder: ReadsPrompts, prompts: Sequence[str], seeds: Sequence[int]) -> Self:
        """Return one for a batch of pictures, the source's first.

        Raises:
            UsageError: fewer than two, or of different seeds.
        """
        check_batch(type(self).__name__, prompts, seeds)
        mine = copy.copy(self)
        mine._images = len(prompts)
        return mine

    def check(self, unet: nn.Module) -> None:
        super().check(unet)
        if not any(map(self.may_look_at, places_of(unet))):
            raise UsageError(
                f"{type(self).__name__} has no self-attention to look at in this UNet; leave it out"
            )

    def attach(self, network: nn.Module) -> Undo:
        if not self._images:
            raise UsageError(
                f"{type(self).__name__} works in a batch of pictures, which a UNet alone does not know; give it to "
                "adapters= of txt2img, img2img, inpaint or stream, or as editor= of edit"
            )
        return super().attach(network)

    def _is_at(self, share: tuple[float, float]) -> bool:
        begin, end = (int(self._step.total * one) for one in share)
        return begin <= self._step.index < end

    def _of_source(self, x: Tensor) -> Tensor:
        """Give x (b, ...) with the rows of edits replaced by those of their source, with and without the condition."""
        x = x.clone()
        for rows in self.groups(len(x), unconditional=True):
            x[rows] = x[rows.start : rows.start + 1]
        return x


class MutualSelfAttention(_FromSource):
    """Mutual self-attention (MasaCtrl, arXiv:2304.08465): edits look at the source's cells instead of their own.

    From a step and a layer on, self-attention of the edits has the source's keys and values: what is seen is the
    source's, where it is put is the edit's. Nothing of attention is kept, and no maps are made; a mask is laid over
    some of the queries at a time.

    Args:
        start: share of the steps that are taken before; the paper's is 4 of 50.
        start_layer: the first self-attention, counted from 0 in the order of computation; None = as the paper, number
            10 of 16, on the way up.
        mask: (1, 1, h, w), 1 = object: an edit's object looks at the source's object, its ground at the ground; or two,
            the source's and the edits'; None = at everything.

    Raises:
        UsageError: a value out of range; a batch without a source, or of different seeds.
    """

    def __init__(
        self,
        start: float = 0.08,
        start_layer: int | None = None,
        mask: Tensor | tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.start = float(check_value(start, float, "start", Range(0, 1)))
        if start_layer is not None:
            start_layer = int(check_value(start_layer, int, "start_layer", Range(0, 1000)))
        self.start_layer = start_layer
        pair = isinstance(mask, tuple | list) and len(mask) == 2
        self.masks = None if mask is None else tuple(mask) if pair else (mask, mask)
        for one in self.masks or ():
            if not isinstance(one, Tensor) or one.dim() != 4 or one.shape[:2] != (1, 1):
                what = tuple(one.shape) if isinstance(one, Tensor) else shown(one)
                raise UsageError(f"mask should be (1, 1, h, w), 1 = object, or two of them, got {what}")

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        return {"start": self.start, "start_layer": self.start_layer, "masked": self.masks is not None}

    def may_look_at(self, place: Place) -> bool:
        least = PAPERS_LAYER * place.count if self.start_layer is None else self.start_layer
        return not place.is_cross and place.number >= least

    def looks_at(self, place: Place) -> bool:
        return self.may_look_at(place) and self._is_at((self.start, 1.0))

    def tokens(self, place: Place, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Let edits have the source's keys and values."""
        self.expect_whole(place, q.shape[2])
        return q, self._of_source(k), self._of_source(v)

    def wants_bias(self, place: Place) -> bool:
        return self.masks is not None

    def bias(self, place: Place, q: Tensor, k: Tensor, part: slice) -> Tensor:
        """Let objects and grounds look at their own kind; where the source has none of it, at everything."""
        sides = place.cells(self._latents)
        ours, theirs = (F.interpolate(one.float(), size=sides).flatten() > 0.5 for one in self.masks)
        unlike = theirs[part, None] != ours[None]  # (n', m): an edit's cells, the source's
        unlike &= ~unlike.all(dim=1, keepdim=True)
        bias = q.new_zeros(len(q), 1, *unlike.shape)
        for rows in self.groups(len(q), unconditional=True):
            bias[rows.start + 1 : rows.stop].masked_fill_(unlike.to(q.device), torch.finfo(q.dtype).min)
        return bias


class PlugAndPlay(_FromSource):
    """Plug-and-play features (arXiv:2211.12572): edits have the source's layout, and their own look.

    For the first steps the edits' self-attention on the way up has the source's queries and keys, and one residual
    block there answers with the source's features. Nothing of either is kept from one call to the next.

    Args:
        attention_steps: share of the steps with the source's self-attention; the paper's is 0.5. A pair is where it
            begins and ends.
        feature_steps: with its features, likewise; the paper's is 0.8.
        feature_block: number of the output block; None = a third of the way up, as the paper's number 4 of 12.

    Raises:
        UsageError: a value out of range, or no such block; a batch without a source, or of different seeds.
    """

    def __init__(
        self,
        attention_steps: float | Sequence[float] = 0.5,
        feature_steps: float | Sequence[float] = 0.8,
        feature_block: int | None = None,
    ):
        super().__init__()
        self.attention_steps = check_share(attention_steps, "attention_steps")
        self.feature_steps = check_share(feature_steps, "feature_steps")
        if feature_block is not None:
            feature_block = int(check_value(feature_block, int, "feature_block", Range(0, 1000)))
        self.feature_block = feature_block

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        shares = {"attention_steps": list(self.attention_steps), "feature_steps": list(self.feature_steps)}
        return {**shares, "feature_block": self.feature_block}

    def may_look_at(self, place: Place) -> bool:
        return not place.is_cross and place.number >= place.count / 2

    def looks_at(self, place: Place) -> bool:
        return self.may_look_at(place) and self._is_at(self.attention_steps)

    def tokens(self, place: Place, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Let edits have the source's map: that of its queries and keys."""
        self.expect_whole(place, q.shape[2])
        return self._of_source(q), self._of_source(k), v

    def check(self, unet: nn.Module) -> None:
        super().check(unet)
        self._block(unet)

    def _block(self, unet: nn.Module) -> ResBlock:
        blocks = unet.output_blocks
        number = len(blocks) // 3 if self.feature_block is None else self.feature_block
        found = blocks[number][0] if number < len(blocks) else None
        if not isinstance(found, ResBlock) or found.updown:
            raise UsageError(
                f"feature_block should be an output block with a residual block that keeps the size, 0 to "
                f"{len(blocks) - 1}, got {number}"
            )
        return found

    def attach(self, network: nn.Module) -> Undo:
        undo = [super().attach(network)]
        if self._is_at(self.feature_steps):
            undo.append(wrap(self._block(network), _SourceFeatures(self, self._block(network))))
        return undo_all(undo)


class _SourceFeatures:
    """A residual block whose residual is the source's in the rows of its edits."""

    def __init__(self, control: PlugAndPlay, block: ResBlock):
        self._control, self._block = control, block

    def __call__(self, proceed: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        out = proceed(x, *args, **options)
        skip = self._block.skip_connection(x)
        return skip + self._control._of_source(out - skip)

    def state(self) -> None:
        """Say that no captured graph serves: it works at some of the steps."""
