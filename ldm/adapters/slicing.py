"""Attention slicing: a UNet's attentions are computed for a few heads at a time, in less memory.

The numbers are the same up to rounding. It helps where torch holds the scores of all heads: on devices and GPUs without
a fused attention kernel.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ldm.adapters.deepcache import check_unet
from ldm.errors import UsageError, shown
from ldm.limits import about_whole, is_whole
from ldm.modules.processors import MOST_HEADS, SlicedAttnProcessor, named_attentions
from ldm.modules.seams import Rank, StepInfo, Undo, fill, undo_all

SIZES = ("auto", "max")


@dataclass(eq=False)
class AttentionSlicing:
    """Attention for some heads at a time, where no other processor answers.

    Args:
        size: how many heads, of all rows of a batch together, are computed at once: a whole number, "auto" = half of
            one row's, "max" = 1, the least memory.

    Raises:
        UsageError: another size; when attached, another network or a compiled one, or one without transformers.
    """

    size: int | str = "auto"
    rank: ClassVar[Rank] = Rank.ATTENTION

    def __post_init__(self) -> None:
        if not (isinstance(self.size, str) and self.size in SIZES) and not is_whole(self.size, 1, MOST_HEADS):
            raise UsageError(
                f"size must be {about_whole(1, MOST_HEADS)}, 'auto' or 'max', got {shown(self.size)}"
            )
        self._processors: dict[int, SlicedAttnProcessor] = {}

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        return {"size": self.size}

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError if it cannot be attached to a network."""
        check_unet(unet, "attention slicing")
        if not named_attentions(unet):
            raise UsageError(
                "attention slicing is for a UNet with spatial transformers, and this one has none"
            )

    def at(self, step: StepInfo) -> None:
        """Do nothing: attention is sliced at every step."""

    def attach(self, network: nn.Module) -> Undo:
        """Let the attentions answer slice by slice."""
        self.check(network)
        undo = [
            fill(one, "processor", self._processor(one.heads))
            for one in named_attentions(network).values()
            if one.processor is None
        ]
        return undo_all(undo)

    def _processor(self, heads: int) -> SlicedAttnProcessor:
        size = {"auto": max(1, heads // 2), "max": 1}.get(self.size, self.size)
        return self._processors.setdefault(size, SlicedAttnProcessor(size))
