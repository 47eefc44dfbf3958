"""Where a picture looks for each token of its prompt: cross-attention maps, averaged while it is painted.

    maps = WordMaps()
    sd.txt2img("a cat on a mat", adapters=[maps])
    maps.average                                             # (1, 77, 64, 64)

`StableDiffusion.explain` makes pictures of it, a heat map for each word.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ldm.adapters.attention_control import AttentionControl, Place
from ldm.errors import UsageError
from ldm.prompt.alignment import check_share


class _Sum:
    """Maps of a run, added up.

    Attributes:
        maps: (images, tokens, h, w), or None before the first.
        count: how many were added, a part of the heads as that part.
    """

    def __init__(self) -> None:
        self.maps: Tensor | None = None
        self.count = 0.0

    def add(self, maps: Tensor, share: float) -> None:
        if self.maps is not None and self.maps.shape[1] != maps.shape[1]:
            # Somebody's processor in one attention takes the last tokens for a picture's: it has no maps of them.
            most = max(self.maps.shape[1], maps.shape[1])
            self.maps, maps = (F.pad(one, (0, 0, 0, 0, 0, most - one.shape[1])) for one in (self.maps, maps))
        self.maps = maps * share if self.maps is None else self.maps.add_(maps, alpha=share)
        self.count += share


class WordMaps(AttentionControl):
    """Watch where a UNet looks for the tokens of its prompt; nothing of the picture changes but rounding.

    Of each attention to the text the heads are averaged, and their map is enlarged to the latents' cells; of all
    attentions and steps the mean is kept, as in DAAM (arXiv:2210.04885). The memory is one map for each token and
    picture, 4 * tokens * h * w bytes (1.3 MB for a picture of 512 pixels), however many steps there are; it holds those
    of the last run.

    Args:
        span: part of the steps that is watched, (0, 1) = all.

    Raises:
        UsageError: no such part of the steps.
    """

    def __init__(self, span: tuple[float, float] = (0.0, 1.0)):
        super().__init__()
        self.span = check_share(span, "span")
        self._last = [_Sum()]  # of the run that began last; shared with the one that is attached for it

    def begin(self) -> WordMaps:
        mine = super().begin()
        self._last[:] = [_Sum()]
        return mine

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        return {"span": list(self.span)}

    def may_look_at(self, place: Place) -> bool:
        return place.is_cross

    def looks_at(self, place: Place) -> bool:
        begin, end = (int(self._step.total * one) for one in self.span) if self._step else (0, 1)
        return place.is_cross and (self._step is None or begin <= self._step.index < end)

    def wants_maps(self, place: Place) -> bool:
        return place.is_cross

    def maps(self, place: Place, maps: Tensor) -> Tensor:
        """Add the maps of the rows with the condition."""
        share = maps.shape[1] / place.attention.heads
        for rows in self.groups(len(maps))[:1]:
            cells = maps[rows].mean(1).transpose(1, 2).unflatten(2, place.cells(self._latents))
            whole = F.interpolate(cells, size=self._latents, mode="bilinear", align_corners=False)
            self._last[0].add(whole.detach().float(), share)
        return maps

    @property
    def average(self) -> Tensor:
        """(images, tokens, h, w) of the last run: what share of a cell's attention a token has.

        Raises:
            UsageError: nothing was watched yet.
        """
        last = self._last[0]
        if last.maps is None:
            raise UsageError(
                f"WordMaps has watched no step of a run: none lies in its span {self.span}, or none was run; give it "
                "to adapters= of txt2img, img2img, inpaint or stream, and ask afterwards"
            )
        return last.maps / last.count
