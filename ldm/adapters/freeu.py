"""FreeU (arXiv:2309.11497): a UNet's backbone weighs more on the way up, and its skips carry fewer low frequencies.

    sd.txt2img("a house", adapters=[FreeU(1.5, 1.6, 0.9, 0.2)])

The numbers are the paper's for Stable Diffusion 1.4 and 1.5; 1 each is the UNet as it is.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.adapters.controls import check_span, is_within, span_of
from ldm.adapters.deepcache import check_own_forward
from ldm.errors import UsageError
from ldm.limits import FREEU
from ldm.modules.diffusionmodules.openaimodel import ResBlock, Upsample
from ldm.modules.seams import Rank, StepInfo, Undo, fill
from ldm.values import Range, check_value

FACTOR = Range(*FREEU)


def stages_of(unet: nn.Module) -> list[int]:
    """List the stage of each output block: 0 at the lowest resolution, one more after each doubling of the sides."""
    stages, stage = [], 0
    for block in unet.output_blocks:
        stages.append(stage)
        stage += any(isinstance(one, Upsample) or (isinstance(one, ResBlock) and one.up) for one in block)
    return stages


def scale_low_frequencies(x: Tensor, factor: float) -> Tensor:
    """Scale the lowest frequencies of maps (b, c, h, w): the mean, and those of one period less over a side.

    Computed in float32 or better. Of the Fourier transform, its zero in the middle, the square of 2 x 2 that ends
    there is scaled, as the authors' program does.
    """
    wide = torch.fft.fft2(x.to(torch.promote_types(x.dtype, torch.float32)))
    for row in {0, x.shape[2] - 1}:
        for column in {0, x.shape[3] - 1}:
            wide[..., row, column] *= factor
    return torch.fft.ifft2(wide).real.to(x.dtype)


@dataclass(eq=False)
class FreeU:
    """FreeU in a UNet, for some of the steps.

    Args:
        b1, b2: factors of the first half of the backbone's channels, where the output blocks of the lowest resolution
            and those of the next one join it with a skip; 1 = as it is, at most 10.
        s1, s2: factors of the lowest frequencies of these skips, likewise.
        start, end: share of the sampler's way, from noise (0) to picture (1): a step has it that lies wholly within.

    Raises:
        UsageError: a number out of range; when attached, another network or a compiled one, or one that calls its
            blocks itself.
    """

    b1: float
    b2: float
    s1: float
    s2: float
    start: float = 0.0
    end: float = 1.0
    rank: ClassVar[Rank] = Rank.RESIDUALS
    _step: StepInfo | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("b1", "b2", "s1", "s2"):
            setattr(self, name, float(check_value(getattr(self, name), float, name, FACTOR)))
        self.start, self.end = check_span(self.start, self.end)

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        return {"b1": self.b1, "b2": self.b2, "s1": self.s1, "s2": self.s2, **span_of(self)}

    def begin(self) -> "FreeU":
        """Return one for one run of a sampler, which stands at a step of its own."""
        return replace(self)

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError if it cannot be attached to a network."""
        check_own_forward(unet, "FreeU")
        if unet.input_blocks[0][0].weight.dim() != 4:
            raise UsageError("FreeU is for a UNet of pictures, with 2 dimensions of space; leave it off")

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""
        self._step = step

    def attach(self, network: nn.Module) -> Undo:
        """Let a UNet join otherwise; outside of its part of the steps, and where all factors are 1, as it does."""
        self.check(network)
        neutral = self.b1 == self.b2 == self.s1 == self.s2 == 1
        if neutral or not is_within(self._step, self.start, self.end):
            return lambda: None
        return fill(network, "joining", _Joining(self, stages_of(network), network.joining))


class _Joining:
    """What becomes of a skip and of what it is joined to."""

    def __init__(self, freeu: FreeU, stages: list[int], before: Any):
        self._factors = ((freeu.b1, freeu.s1), (freeu.b2, freeu.s2))
        self._stages, self._before = stages, before

    def __call__(self, place: int, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        if self._before is not None:
            h, skip = self._before(place, h, skip)
        if self._stages[place] >= len(self._factors):
            return h, skip
        backbone, low = self._factors[self._stages[place]]
        if backbone != 1:
            first, rest = h.tensor_split([h.shape[1] // 2], dim=1)
            h = torch.cat([first * backbone, rest], dim=1)
        return h, skip if low == 1 else scale_low_frequencies(skip, low)

    def state(self) -> Hashable:
        """Say what a captured graph depends on."""
        return ("FreeU", self._factors, None if self._before is None else self._before.state())
