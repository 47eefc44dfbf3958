"""A model with its conditions and guidance: from a sample and its level to the predicted noise and clean sample.

Samplers know a model only by apply_model(x, t, conditioning), alphas_cumprod, num_timesteps, parameterization ("eps",
"x0" or "v"), and first_stage_model where they are to quantise. One that has `guidance_terms()` lists there what adds to
the guidance of its next call (ldm.modules.seams.GuidanceTerm).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UsageError
from ldm.limits import SHARE
from ldm.models.diffusion.conditions import (
    Area,
    BatchCondition,
    ScheduledCondition,
    crop,
    feathered,
    of_area,
    tokens_of,
    weighted,
)
from ldm.models.diffusion.levels import LevelTable, alpha_bar_table
from ldm.modules.seams import GuidanceTerm
from ldm.option_kinds import Interval
from ldm.process.guidance import guide, join, rescale
from ldm.process.prediction import to_eps, to_v, to_x0
from ldm.process.scalars import Scalar, scalar, tensor

WHOLE_INTERVAL = (0.0, 1.0)


def predict_both(
    model: Callable[[Tensor, Tensor, Any], Tensor],
    x: Tensor,
    t: Tensor,
    unconditional: Any,
    conditioning: Any,
    separate_passes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a model on samples x (b, ...) at levels t (b,) without and with condition: (uncond, cond) outputs.

    In one batch, the unconditional half first, as CompVis's samplers do; or one after the other, the conditional
    first, as ControlNet's does: see `separate_passes` of Denoiser.
    """
    if separate_passes:
        cond = model(x, t, conditioning)
        return model(x, t, unconditional), cond
    both = join(unconditional, conditioning)
    uncond, cond = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return uncond, cond


@dataclass(frozen=True)
class GuidedCall:
    """What a GuidanceTerm adds to, and what it may ask for.

    Attributes:
        x, t, alpha_bar: the sample (b, ...), its levels (b,) and signal.
        base, base_conditioning: the model's output without the condition, or with it where nothing else guides.
        cond: the model's output with the condition.
        own: the output of the term's own rows; None where it has none.
        kind: what the model predicts, "eps", "x0" or "v".
        predict: the model, called with (x, t, conditioning).
    """

    x: Tensor
    t: Tensor
    alpha_bar: Tensor
    base: Tensor
    base_conditioning: Any
    cond: Tensor
    own: Tensor | None
    kind: str
    predict: Callable[[Tensor, Tensor, Any], Tensor]


class Denoiser:
    """A model with its conditions and guidance: called with a sample and its level, it predicts (eps, x0).

    Args:
        model: see the module's first lines.
        conditioning: tensor, list, or dict of lists, as apply_model takes it; or a ScheduledCondition.
        unconditional_conditioning: of the same structure; None switches guidance off.
        guidance_scale: weight of the condition; at 1 the unconditional pass is skipped.
        guidance_rescale: 0 to 1, how much of the conditional answer's spread to restore.
        guidance_interval: (low, high), where guidance is worth its cost (arXiv:2404.07724): levels t of T with
            low <= t / T < high are guided, at all others the conditional answer is taken as it is and the
            unconditional one not computed. (0, 1) holds every level; an interval that ends where it begins
            holds none, and two that meet share none.
        separate_passes: run both passes one after the other, the conditional first, as ControlNet's
            sampler does: needed where the two conditions do not join into one batch, and half the memory.
        score_corrector: object with modify_score(model, eps, x, t, conditioning, **corrector_kwargs).
        known: (mask, x0): where the mask is 1 the predicted clean sample is x0.

    Raises:
        UsageError: a guidance_scale, guidance_rescale or guidance_interval out of range, or a score_corrector
            for a model that does not predict eps.
    """

    def __init__(
        self,
        model: Any,
        conditioning: Any,
        *,
        unconditional_conditioning: Any = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] = WHOLE_INTERVAL,
        separate_passes: bool = False,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        known: tuple[Tensor, Tensor] | None = None,
    ):
        if not math.isfinite(guidance_scale):
            raise UsageError(f"guidance_scale must be a finite number, got {guidance_scale}")
        if not 0 <= guidance_rescale <= 1:
            raise UsageError(f"guidance_rescale must be from 0 to 1, got {guidance_rescale}")
        self.model = model
        self.kind = getattr(model, "parameterization", "eps")
        if score_corrector is not None and self.kind != "eps":
            raise UsageError(f"score_corrector corrects predicted noise, but the model predicts {self.kind}")
        self.conditioning = conditioning
        self.unconditional = unconditional_conditioning
        self.scale = guidance_scale
        self.rescale = guidance_rescale
        self.interval = check_interval(guidance_interval)
        self.separate_passes = separate_passes
        self.score_corrector = score_corrector
        self.corrector_kwargs = corrector_kwargs or {}
        self.known = known
        self.calls = 0  # of scheduled conditions

    def __call__(self, x: Tensor, t: float | Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Predict (eps, x0) for a sample (b, ...) at one level."""
        return self._both_of(self._answer(x, t, alpha_bar)[0], x, alpha_bar)

    def both(self, x: Tensor, t: float | Tensor, alpha_bar: Scalar) -> tuple[tuple[Tensor, Tensor], ...]:
        """Predict (eps, x0) guided, and (eps, x0) without the condition; the same twice at levels that are not guided.

        At guidance_scale 1 the unconditional pass is not skipped.
        """
        output, uncond = self._answer(x, t, alpha_bar, both=True)
        guided = self._both_of(output, x, alpha_bar)
        return guided, guided if uncond is None else self._both_of(uncond, x, alpha_bar)

    def _both_of(self, output: Tensor, x: Tensor, alpha_bar: Scalar) -> tuple[Tensor, Tensor]:
        alpha_bar = scalar(alpha_bar)
        return to_eps(self.kind, output, x, alpha_bar), to_x0(self.kind, output, x, alpha_bar)

    def _answer(
        self, x: Tensor, t: float | Tensor, alpha_bar: Scalar, both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Give the model's output, guided and corrected, and the one without the condition where it was made."""
        guided = self.is_guided(t, at_scale_1=both)
        if not isinstance(t, Tensor):
            dtype = torch.long if isinstance(t, int) else torch.float32
            t = torch.full(x.shape[:1], t, device=x.device, dtype=dtype)
        terms = getattr(self.model, "guidance_terms", tuple)()
        alpha_bar = tensor(alpha_bar) if terms else alpha_bar  # they are told a tensor
        if isinstance(self.conditioning, ScheduledCondition):
            output, uncond = self._scheduled(terms, x, t, guided, alpha_bar)
        elif terms:
            output, uncond = self._output_with(terms, x, t, guided, alpha_bar)
        else:
            output, uncond = self._output(x, t, guided)
        if self.score_corrector is not None:
            output = self.score_corrector.modify_score(
                self.model, output, x, t, self.conditioning, **self.corrector_kwargs
            )
        return output if self.known is None else self._with_known(output, x, scalar(alpha_bar)), uncond

    def _with_known(self, output: Tensor, x: Tensor, alpha_bar: Scalar) -> Tensor:
        """Give the output by which the predicted clean sample is x0 where the mask keeps that."""
        mask, x0 = self.known
        pred_x0 = mask * x0 + (1 - mask) * to_x0(self.kind, output, x, alpha_bar)
        back = {"eps": to_eps, "x0": to_x0, "v": to_v}[self.kind]
        return back("x0", pred_x0, x, alpha_bar)

    def at_sigma(self, x: Tensor, sigma: Scalar) -> Tensor:
        """Predict the clean sample from x = x0 + sigma * noise, at any sigma: k-diffusion's CompVisDenoiser.

        Args:
            x: (b, ...) in k-diffusion's units, which are ours over sqrt(alpha_bar).
            sigma: a number or 0-d, above 0; the network is called with the fractional level that has it.
        """
        sigma = float(sigma)
        alpha_bar = 1 / (1 + sigma * sigma)
        scaled = x * math.sqrt(alpha_bar)
        output, _ = self._answer(scaled, self.levels.t_of_sigma(sigma), alpha_bar)
        if self.kind == "eps":
            return x - sigma * output
        return to_x0(self.kind, output, scaled, alpha_bar)

    def both_at_sigma(self, x: Tensor, sigma: Scalar) -> tuple[Tensor, Tensor]:
        """Predict the clean sample as `at_sigma` does, and without the condition as `both` does."""
        sigma = float(sigma)
        alpha_bar = 1 / (1 + sigma * sigma)
        t = self.levels.t_of_sigma(sigma)
        (_, guided), (_, without) = self.both(x * math.sqrt(alpha_bar), t, alpha_bar)
        return guided, without

    @cached_property
    def levels(self) -> LevelTable:
        """The levels of the model."""
        return LevelTable(alpha_bar_table(self.model))

    @property
    def sigmas(self) -> np.ndarray:
        """(T,) of the model, ascending; a level without signal has one with a 2^24th."""
        return self.levels.sigmas

    def is_guided(self, t: float | Tensor, *, at_scale_1: bool = False) -> bool | Tensor:
        """Tell whether level t is guided; for levels (b,) of which only some are, tell which."""
        if self.unconditional is None or (self.scale == 1 and not at_scale_1):
            return False
        if self.interval == WHOLE_INTERVAL:
            return True
        low, high = self.interval
        share = t / self.model.num_timesteps
        within = (share >= low) & (share < high)
        if not isinstance(within, Tensor):
            return bool(within)
        if within.all():
            return True
        return within if within.any() else False

    def _output(self, x: Tensor, t: Tensor, guided: bool | Tensor) -> tuple[Tensor, Tensor | None]:
        """Give the model's guided output, and the one without the condition where it was made."""
        if guided is False:
            return self.model.apply_model(x, t, self.conditioning), None
        uncond, cond = predict_both(
            self.model.apply_model, x, t, self.unconditional, self.conditioning, self.separate_passes
        )
        return self._mixed(guided, uncond, cond, self.rescale)

    def _mixed(
        self, guided: bool | Tensor, uncond: Tensor | None, cond: Tensor, mix: float
    ) -> tuple[Tensor, Tensor | None]:
        if guided is False:
            return cond, None
        answer = guide(uncond, cond, self.scale, mix)
        if guided is True:
            return answer, uncond
        rows = guided.reshape(-1, *(1 for _ in cond.shape[1:]))
        return torch.where(rows, answer, cond), torch.where(rows, uncond, cond)

    def _output_with(
        self, terms: Sequence[GuidanceTerm], x: Tensor, t: Tensor, guided: bool | Tensor, alpha_bar: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Give what `_output` gives, with the terms added to the first; the spread is restored last."""
        joining = [term for term in terms if term.joins_batch]
        uncond, cond, *own = self._predict_with(joining, x, t, guided)
        base, base_conditioning = (
            (cond, self.conditioning) if uncond is None else (uncond, self.unconditional)
        )
        answer, uncond = self._mixed(guided, uncond, cond, 0.0)
        rows = iter(own)
        for term in terms:
            mine = next(rows) if term.joins_batch else None
            call = GuidedCall(
                x, t, alpha_bar, base, base_conditioning, cond, mine, self.kind, self.model.apply_model
            )
            answer = answer + term.term(call)
        return rescale(answer, cond, self.rescale) if self.rescale else answer, uncond

    def _predict_with(
        self, joining: Sequence[GuidanceTerm], x: Tensor, t: Tensor, guided: bool | Tensor
    ) -> list[Tensor | None]:
        """Run the model without the condition (None where not guided), with it, and once more for each term.

        In one batch, the unconditional first, or one after the other, the unconditional last: what a term that only
        watches the network saw in the first rows of the last call is `base`'s.
        """
        b = len(x)
        first = [] if guided is False else [self.unconditional]
        conditions = [*first, *[self.conditioning] * (1 + len(joining))]
        try:
            if not self.separate_passes:
                for i, term in enumerate(joining, len(conditions) - len(joining)):
                    term.rows = slice(i * b, (i + 1) * b)
                several = len(conditions)
                joined = reduce(join, conditions)
                out = self.model.apply_model(torch.cat([x] * several), torch.cat([t] * several), joined)
                out = list(out.chunk(several))
            else:
                own = []
                for term in joining:
                    term.rows = slice(0, b)
                    own.append(self.model.apply_model(x, t, self.conditioning))
                    term.rows = None
                cond = self.model.apply_model(x, t, self.conditioning)
                out = [*(self.model.apply_model(x, t, one) for one in first), cond, *own]
        finally:
            for term in joining:
                term.rows = None
        return out if first else [None, *out]

    def _scheduled(
        self, terms: Sequence[GuidanceTerm], x: Tensor, t: Tensor, guided: bool | Tensor, alpha_bar: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Give what `_output` gives, under the conditions of this call; several of a picture are added up to one."""
        parts = self.conditioning.at(self.calls)
        uncond = None if self.unconditional is None else self.unconditional.at(self.calls)[0].given
        self.calls += 1
        areas = [one for one in parts if one.area is not None]
        first, *further = (one for one in parts if one.area is None)
        # Contexts of unequal length run apart, as the web UI has it; padding would change the numbers.
        separate = self.separate_passes or (
            uncond is not None and tokens_of(uncond) != tokens_of(first.given)
        )
        is_one = not further and all(weight == 1 for weight in first.weights)
        if is_one and not areas:
            now = copy.copy(self)
            now.conditioning, now.unconditional, now.separate_passes = first.given, uncond, separate
            return now._output_with(terms, x, t, guided, alpha_bar) if terms else now._output(x, t, guided)
        if uncond is None and not is_one:
            raise UsageError("several conditions of a picture (AND) need an unconditional one; got none")
        if terms:
            what = type(terms[0]).__name__
            raise UsageError(
                f"several conditions of a picture (AND, regions) do not go together with {what}; leave one out"
            )
        if is_one and guided is False:
            base, total = None, self.model.apply_model(x, t, first.given)
        else:
            base, answer = predict_both(self.model.apply_model, x, t, uncond, first.given, separate)
            total = answer if is_one else base + weighted(first.weights, x) * (answer - base)
        for one in further:
            total = total + weighted(one.weights, x) * (self.model.apply_model(x, t, one.given) - base)
        if areas:
            base, total = self._with_areas(areas, x, t, uncond, base, total, separate)
        return self._mixed(guided, base, total, self.rescale)

    def _with_areas(
        self,
        areas: Sequence[BatchCondition],
        x: Tensor,
        t: Tensor,
        uncond: Any,
        base: Tensor | None,
        total: Tensor,
        separate: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """Average answers without (None where not wanted) and with the whole's condition with those of areas.

        Each area is cut out of the sample and answered by itself, as in ComfyUI: the whole counts once everywhere, an
        area by its weight, which fades out towards its edges. Without conditions an area is asked once, with the weight
        of the first that is about it.
        """
        sums = [None if one is None else one.clone() for one in (base, total)]
        counts = [torch.ones_like(x[:, :1]) for _ in sums]
        asked: set[Area] = set()
        for one in areas:
            part, given = crop(x, one.area), of_area(one.given, one.area)
            answers: list[Tensor | None] = [None, None]
            if base is None or one.area in asked:
                answers[1] = self.model.apply_model(part, t, given)
            else:
                without = of_area(uncond, one.area)
                answers = predict_both(self.model.apply_model, part, t, without, given, separate)
            asked.add(one.area)
            share = weighted(one.weights, x) * feathered(one.area, x)
            for whole, count, answer in zip(sums, counts, answers, strict=True):
                if answer is not None:
                    crop(count, one.area).add_(share)
                    crop(whole, one.area).add_(share * answer)
        return tuple(
            None if whole is None else whole / count for whole, count in zip(sums, counts, strict=True)
        )


def check_interval(interval: Any) -> tuple[float, float]:
    """Return a guidance interval as two floats, or raise UsageError."""
    return Interval(*SHARE).check("guidance_interval", interval)
