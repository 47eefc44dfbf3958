"""CompVis's PLMSSampler: its constructor, keywords and numbers, on the shared loop of levels.py."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import (
    Callback,
    ImageCallback,
    TableSampler,
    collect,
    only_set,
    times_for,
    warn_of_unused,
)
from ldm.models.diffusion.levels import Level, run_levels
from ldm.models.diffusion.samplers import PLMS, check_mask, warn_of_batch


class PLMSSampler(TableSampler):
    """PLMS with CompVis's signatures; it adds no noise, so eta must be 0. Differences as for DDIMSampler."""

    sampler = PLMS

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callback | None = None,
        normals_sequence: Any = None,
        img_callback: ImageCallback | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
        ddim_discretize: str = "uniform",
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample a batch from noise; arguments and result as DDIMSampler.sample's.

        Raises:
            UsageError: eta other than 0, or a value out of range.
        """
        warn_of_unused(kwargs)
        warn_of_batch(conditioning, batch_size)
        self._make_schedule(S, eta, verbose, ddim_discretize)
        return self.plms_sampling(
            conditioning,
            (batch_size, *shape),
            callback=callback,
            img_callback=img_callback,
            quantize_denoised=quantize_x0,
            mask=mask,
            x0=x0,
            ddim_use_original_steps=False,
            noise_dropout=noise_dropout,
            temperature=temperature,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            x_T=x_T,
            log_every_t=log_every_t,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            **only_set(dynamic_threshold=dynamic_threshold),
        )

    @torch.no_grad()
    def plms_sampling(
        self,
        cond: Any,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callback | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: ImageCallback | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Run the tables of make_schedule, or the model's own levels; arguments as ddim_sampling's."""
        check_mask(mask, x0, shape)
        old_eps: list[Tensor] = []

        def step(x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
            x_prev, pred_x0, eps = self.p_sample_plms(
                x,
                cond,
                times_for(x, here.t),
                index=here.left - 1,
                use_original_steps=ddim_use_original_steps,
                quantize_denoised=quantize_denoised,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
                old_eps=old_eps,
                t_next=times_for(x, to.t),
                **only_set(dynamic_threshold=dynamic_threshold),
            )
            old_eps.append(eps)
            del old_eps[:-3]
            return x_prev, pred_x0

        x = torch.randn(tuple(shape), device=self.model.device) if x_T is None else x_T
        count = self._count(timesteps, ddim_use_original_steps)
        levels = self._plan(count, ddim_use_original_steps, x.device)
        return collect(
            run_levels(levels, x, step, self._blend(mask, x0)), x, callback, img_callback, log_every_t
        )

    @torch.no_grad()
    def p_sample_plms(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        old_eps: list[Tensor] | None = None,
        t_next: Tensor | None = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step: (x_prev, pred_x0, raw eps).

        Args:
            x: (b, c, h, w) at row `index` of the tables.
            t, t_next: (b,) levels passed to the network, here and at the level stepped to.
            old_eps: earlier raw eps, oldest first; empty at the first step, which calls the network twice.
        """
        denoise = self._denoiser(
            c,
            unconditional_conditioning=unconditional_conditioning,
            guidance_scale=unconditional_guidance_scale,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        sampler = PLMS(
            denoise,
            quantize_denoised=quantize_denoised,
            dynamic_threshold=dynamic_threshold,
            temperature=temperature,
            noise_dropout=noise_dropout,
            repeat_noise=repeat_noise,
        )
        sampler.old_eps = list(old_eps or ())
        here, to, _ = self._row(index, t, use_original_steps, x.device)
        if t_next is not None:
            to = replace(to, t=t_next)
        x_prev, pred_x0 = sampler.step(x, here, to)
        return x_prev, pred_x0, sampler.old_eps[-1]
