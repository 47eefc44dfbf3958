"""From noise to latents: the samplers' loop over a model with what is attached to its UNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.adapters.deepcache import DeepCache
from ldm.adapters.tome import TokenMerging
from ldm.adapters.use import begun
from ldm.devices import dtype_name
from ldm.errors import NumericError
from ldm.models.diffusion.conditions import context_of
from ldm.models.diffusion.samplers import Step, sample_steps, steps_as_diffusers
from ldm.models.introspect import dtype_of
from ldm.modules.seams import GuidanceTerm, SampleChange, Scope, StepInfo

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


def denoise(
    model: LatentDiffusion,
    x_T: Tensor,
    conditioning: Any,
    *,
    sampler: str,
    steps: int,
    autocast: torch.dtype | None = None,
    adapters: Sequence[Any] = (),
    cache_interval: int = 1,
    cache_depth: int = 1,
    merge_ratio: float = 0.0,
    merge_seed: int | None = None,
    arithmetic: str = "own",
    **options: Any,
) -> Iterator[Step]:
    """Step from noise to clean latents, one Step at a time; latents stay float32 whatever the UNet computes in.

    Args:
        x_T: (b, c, h, w) noise, or noised latents with run_last.
        adapters: what is attached to the UNet at each of its calls (ldm.modules.seams.Attachment), of ldm.adapters.
        cache_interval, cache_depth: see ldm.adapters.deepcache.DeepCache; 1 = everything at every level.
        merge_ratio, merge_seed: see ldm.adapters.tome.TokenMerging; 0 = every token.
        arithmetic: "own", or "diffusers" for steps_as_diffusers of ldm.models.diffusion.samplers.
        options: those of ldm.models.diffusion.samplers.sample_steps.

    Raises:
        NumericError: latents that are not finite; checked at the first and last step, on a CPU at each.
    """
    attachments = [*adapters, DeepCache(cache_interval, cache_depth), TokenMerging(merge_ratio, merge_seed)]
    total = steps if options.get("run_last") is None else options["run_last"]
    unconditional = options.get("unconditional_conditioning")
    seen = WithAttachments(model, autocast, attachments, total, len(x_T), unconditional)
    run = steps_as_diffusers if arithmetic == "diffusers" else sample_steps
    for step in run(sampler, seen, x_T, conditioning, steps=steps, behind=seen.change_samples, **options):
        seen.step = StepInfo(step.index + 1, step.total)
        # On a GPU a check waits for the work that is queued, so only the first and last step are looked at.
        on_show = step.index in (0, step.total - 1) or step.x_t.device.type == "cpu"
        if on_show and not torch.isfinite(step.x_t).all():
            raise NumericError(
                f"the UNet gave values that are not finite at step {step.index + 1} of {step.total}, in "
                f"{dtype_name(dtype_of(model))}; nothing was saved; use float32 or another model file"
            )
        yield step


class WithAttachments:
    """A model as samplers see it: with autocast, and what is attached to its UNet, around every call of that.

    Dtypes are DiffusionWrapper's matter: it casts to those of the UNet's weights, and the answer back to float32.

    Args:
        autocast: dtype of torch.autocast; None = none.
        attachments: attached to the UNet during each call and only then: between two steps the model may be used for
            anything else. Each has a run of its own (`begin`), so that two streams do not see each other.
        total: how many steps the sampler takes.
        batch: how many images there are.
        unconditional: the condition of calls that are without one; None = nothing is guided.

    Attributes:
        step: where the sampler is.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        autocast: torch.dtype | None,
        attachments: Sequence[Any],
        total: int,
        batch: int,
        unconditional: Any,
    ):
        self._model = model
        self._autocast = autocast
        self._attachments = [begun(one) for one in attachments]
        self._terms = [one for one in self._attachments if isinstance(one, GuidanceTerm)]
        self._batch, self._unconditional = batch, unconditional
        self._scopes: dict[tuple[int, ...], Scope] = {}
        self.step = StepInfo(0, total)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply_model(self, x: Tensor, t: Tensor, cond: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Predict as the model does."""
        on = self._autocast is not None
        # A model that keeps a moving average paints with it, as CompVis's scripts do.
        averages = [self._model.model_ema] if self._model.use_ema else []
        for attachment in self._attachments:
            attachment.at(
                replace(self.step, t=t, unconditional=self._rows_without(x, cond), images=self._batch)
            )
        with (
            self._scope(self._model.model, averages),
            self._scope(self._model.model.diffusion_model, self._attachments),
            torch.autocast(x.device.type, dtype=self._autocast, enabled=on),
        ):
            return self._model.apply_model(x, t, cond, *args, **kwargs)

    def _rows_without(self, x: Tensor, cond: Any) -> int:
        """Tell how many rows are without the condition: of a call that joins both, the first images' worth."""
        if self._unconditional is None:
            return 0
        # Of a scheduled condition, what it is at this call, also where an area is cut out.
        if context_of(cond) is context_of(getattr(self._unconditional, "current", self._unconditional)):
            return len(x)
        own = sum(one.rows is not None for one in self._terms)  # of guidance terms, which have the condition
        return self._batch if len(x) == (2 + own) * self._batch else 0

    def guidance_terms(self) -> list[GuidanceTerm]:
        """List what adds to the guidance of the next call."""
        return [one for one in self._terms if one.guides(self.step)]

    def change_samples(self, x: Tensor) -> Tensor:
        """Change samples behind a step, by each attachment that does."""
        for attachment in self._attachments:
            if isinstance(attachment, SampleChange):
                x = attachment.change_samples(x)
        return x

    def _scope(self, network: torch.nn.Module, attachments: Sequence[Any]) -> Scope:
        """Give the scope of the call before, which knows already what becomes of the weights, or a new one."""
        key = tuple(map(id, (network, *attachments)))
        if key not in self._scopes:
            self._scopes[key] = Scope(network, attachments)
        return self._scopes[key]
