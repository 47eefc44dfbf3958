"""Inversions that iterate each step until it is consistent with itself, and those that run a sampler the other way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UsageError
from ldm.limits import real, whole
from ldm.models.diffusion.inversion_base import DDIM, Method, Network, Run, rise, sample_of
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers import SAMPLERS, Sampler, split_options, split_sampler
from ldm.models.diffusion.samplers.run import check_inverts

log = logging.getLogger(__name__)


@dataclass
class FixedPoint(DDIM):
    """Implicit DDIM inversion: the noise is the one predicted where the step arrives, found by iterating.

    Solves x_next = rise(x, eps(x_next)), whose solution DDIM's step down undoes (fixed-point inversion,
    arXiv:2312.12540; AIDI, arXiv:2309.04907). What is remembered of a step is its residual (b,).

    Options:
        tolerance: root mean square of the last change, where a picture is done.
        iterations: at most so many calls a step; the best iterate is kept, and a warning says if it is not good enough.
        history: how many earlier iterates Anderson's acceleration mixes in (Walker and Ni 2011, Eq. 2.2); 0 = none.
    """

    name = "fixed_point"
    own_history: ClassVar[int] = 0

    _: KW_ONLY
    tolerance: float = 1e-5
    iterations: int = 30
    history: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.history = self.own_history if self.history is None else self.history
        real(f"tolerance of {self.name}", self.tolerance, 0, 1)
        whole(f"iterations of {self.name}", self.iterations, 1, 1000)
        whole(f"history of {self.name}", self.history, 0, 10)

    def up(self, run: Run, state: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        return iterate(
            lambda x: rise(state, run.eps(x, to), here, to),
            state,
            self.tolerance,
            self.iterations,
            self.history,
        )

    def finish(self, run: Run, inversion: Any) -> None:
        left = torch.stack(inversion.memory)  # (steps, b)
        if (left > self.tolerance).any():
            log.warning(
                "%s: %d of %d steps were not consistent to %g after %d iterations (worst %.2g); take %smore "
                "steps or a lower guidance_scale",
                self.name,
                int((left > self.tolerance).any(1).sum()),
                len(left),
                self.tolerance,
                self.iterations,
                left.max().item(),
                "" if self.history else "'anderson', ",
            )


@dataclass
class Anderson(FixedPoint):
    """Implicit DDIM inversion, as FixedPoint, accelerated by Anderson's mixing of the last iterates (AIDI)."""

    name = "anderson"
    own_history = 4


def iterate(
    step: Callable[[Tensor], Tensor], x: Tensor, tolerance: float, iterations: int, history: int
) -> tuple[Tensor, Tensor]:
    """Find x = step(x), for each picture of (b, ...) by itself: (the best x, its residual (b,))."""
    shape, ones = x.shape, (1,) * (x.dim() - 1)
    best = x
    least = torch.full(shape[:1], torch.inf, dtype=torch.float64, device=x.device)
    seen: list[tuple[Tensor, Tensor]] = []  # what came of an iterate, and its change (b, d) float64
    for _ in range(iterations):
        new = step(x)
        change = (new - x).double().flatten(1)
        size = change.square().mean(1).sqrt()  # (b,)
        closer = (size < least) & (least > tolerance)  # one that has arrived waits for the others
        best = torch.where(closer.reshape(-1, *ones), new, best)
        least = torch.where(closer, size, least)
        if (least <= tolerance).all():
            break
        seen = [*seen, (new.double().flatten(1), change)][-1 - history :]
        x = mixed(seen).reshape(shape).to(x.dtype)
    return best, least


def mixed(seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mix iterates (b, d), the last one last, so that their changes cancel as far as they can."""
    new, change = seen[-1]
    if len(seen) == 1:
        return new
    d_new = torch.stack([b[0] - a[0] for a, b in zip(seen, seen[1:], strict=False)], dim=1)  # (b, m, d)
    d_change = torch.stack([b[1] - a[1] for a, b in zip(seen, seen[1:], strict=False)], dim=1)
    gram = d_change @ d_change.mT  # (b, m, m)
    # Changes that are nearly parallel say little more than one of them; the ridge keeps their weights small.
    ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(gram.dtype).tiny
    gram = gram + ridge.reshape(-1, 1, 1) * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram, d_change @ change.unsqueeze(2))  # (b, m, 1)
    return new - (weights * d_new).sum(1)


@dataclass
class Sampled(Method):
    """A deterministic sampler of ldm.models.diffusion.samplers, run the other way: what `invert=True` does.

    Over its own levels, mostly down to the clean end. One of higher order errs by less than DDIM in as many calls.

    Options:
        sampler: any spelling of a sampler that inverts.
        options: of the sampler or its spacing.
    """

    from_latents = True

    _: KW_ONLY
    sampler: str = "dpmpp_2m"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name, _ = split_sampler(self.sampler, None)
        super().__post_init__()
        self.own, self.of_spacing = split_options(SAMPLERS[self.name], dict(self.options))
        check_inverts(self._make(None), None, None)

    def plan(self, alpha_bar: np.ndarray, steps: int, spacing: str | Sequence[float] | None) -> list[Level]:
        _, spacing = split_sampler(self.sampler, spacing)
        return SAMPLERS[self.name].plan(alpha_bar, steps, spacing=spacing, **self.of_spacing)

    def begin(self, run: Run, x0: Tensor) -> tuple[Tensor, Sampler]:
        if not isinstance(run.network, Network):
            raise UsageError(f"inverting by the sampler {self.name} needs a Network, got a plain function")
        sampler = self._make(run.network.denoiser(run.context))
        sampler.levels = list(run.levels)
        return x0, sampler

    def up(self, run: Run, state: tuple[Tensor, Sampler], here: Level, to: Level) -> tuple[Any, None]:
        return self._step(run, state, here, to), None

    def resume(self, run: Run, state: Any, above: Any = None) -> tuple[Tensor, Sampler]:
        return self.begin(run, sample_of(state))

    def down(self, run: Run, state: tuple[Tensor, Sampler], here: Level, to: Level, kept: Any) -> Any:
        return self._step(run, state, here, to)

    def _step(
        self, run: Run, state: tuple[Tensor, Sampler], here: Level, to: Level
    ) -> tuple[Tensor, Sampler]:
        x, sampler = state
        run.network.at(max(here, to, key=lambda level: level.left), run.context, len(x))
        return sampler.step(x, here, to)[0], sampler

    def _make(self, denoise: Any) -> Sampler:
        # Noise of weight 0 is drawn by some; it must not move anybody's generator.
        return SAMPLERS[self.name](denoise, torch.zeros_like, eta=0.0, **self.own)
