"""Ancestral sampling with CompVis's methods and numbers, on the shared loop of levels.py: mixins of ddpm.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UsageError
from ldm.helpers import default
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.levels import Level, Step, alpha_bar_table, make_plan, run_levels
from ldm.modules.diffusionmodules.util import noise_like
from ldm.process import gaussian, prediction


class AncestralSampling:
    """How DDPM samples: level by level, with the posterior's noise (DDPM Algorithm 2)."""

    def _mean_variance(
        self, model_out: Tensor, x: Tensor, t: Tensor, clip_denoised: bool, quantize: Callable | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Turn the network's output into the Gaussian of one step back, and the clean sample behind it."""
        x_recon = prediction.to_x0(self.parameterization, model_out, x, *self._level(t, x))
        if clip_denoised:
            x_recon = x_recon.clamp(-1.0, 1.0)
        if quantize is not None:
            x_recon = quantize(x_recon)[0]
        return (*self.q_posterior(x_recon, x, t), x_recon)

    def p_mean_variance(
        self, x: Tensor, t: Tensor, clip_denoised: bool, return_x0: bool = False
    ) -> tuple[Tensor, ...]:
        """Return mean, variance and log variance of the model's p(x_{t-1} | x_t).

        With return_x0, the predicted clean sample comes fourth.
        """
        *moments, x_recon = self._mean_variance(self.model(x, t), x, t, clip_denoised)
        return (*moments, x_recon) if return_x0 else tuple(moments)

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        repeat_noise: bool = False,
        return_x0: bool = False,
    ) -> Any:
        """Take one ancestral step from level t (DDPM Algorithm 2); repeat_noise shares it over the batch.

        Returns:
            x_{t-1}, with return_x0 and the predicted clean sample.
        """
        mean, _, log_variance, *x0 = self.p_mean_variance(x, t, clip_denoised, return_x0=return_x0)
        x_prev = gaussian.draw_prev(mean, log_variance, noise_like(x.shape, x.device, repeat_noise), t)
        return (x_prev, *x0) if return_x0 else x_prev

    def _loop(
        self,
        sample_prev: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
        x_T: Tensor,
        timesteps: int,
        *,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        log_every_t: int | None = None,
        callback: Callable[[int], Any] | None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
    ) -> tuple[Tensor, list[Step]]:
        """Sample from x_T through all levels below `timesteps`; the other arguments are those of progressive_denoising.

        Args:
            sample_prev: from samples, their level (b,) and the same as a number to (x_{t-1}, predicted clean samples).

        Returns:
            the samples, and the steps whose results are kept: the first, and every log_every_t-th level's.
        """
        if mask is not None and x0 is None:
            raise UsageError("a mask needs x0, the samples to keep where the mask is 1; got none")
        log_every_t = default(log_every_t, self.log_every_t)

        def step(x_t: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
            t = torch.full((len(x_t),), here.t, device=x_t.device, dtype=torch.long)
            x_t, pred_x0 = sample_prev(x_t, t, here.t)
            # After the step, where CompVis's DDIM blends before it; each kept, for its seeds' images.
            return (x_t if mask is None else self.q_sample(x0, t) * mask + (1.0 - mask) * x_t), pred_x0

        plan = make_plan(np.arange(self.num_timesteps), alpha_bar_table(self), 1.0)
        kept = []
        for done in run_levels(plan[-timesteps - 1 :], x_T, step):
            level = int(done.t)
            if done.index == 0 or level % log_every_t == 0:
                kept.append(done)
            if callback is not None:
                callback(level)
            if img_callback is not None:
                img_callback(done.x_t, level)
        return done.x_t, kept

    @torch.no_grad()
    def p_sample_loop(self, shape: Sequence[int], return_intermediates: bool = False) -> Any:
        """Sample from noise through all levels.

        Returns:
            samples of `shape`; with return_intermediates also the list of samples every log_every_t levels,
            the noise first.
        """

        def sample_prev(x_t: Tensor, t: Tensor, level: int) -> tuple[Tensor, Tensor]:
            return self.p_sample(x_t, t, clip_denoised=self.clip_denoised, return_x0=True)

        x_T = torch.randn(tuple(shape), device=self.device)
        samples, kept = self._loop(sample_prev, x_T, self.num_timesteps)
        return (samples, [x_T, *(step.x_t for step in kept)]) if return_intermediates else samples

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Any:
        """Make batch_size pictures; see p_sample_loop."""
        shape = (batch_size, self.channels, self.image_size, self.image_size)
        return self.p_sample_loop(shape, return_intermediates=return_intermediates)


class LatentAncestralSampling:
    """How LatentDiffusion samples: as DDPM, under conditions."""

    def p_mean_variance(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        clip_denoised: bool,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return mean, variance and log variance of the model's p(x_{t-1} | x_t, c).

        Args:
            return_codebook_ids: append the second item of the network's (output, logits).
            quantize_denoised: pass the predicted clean sample through the first stage's codebook.
            return_x0: append the predicted clean sample.
            score_corrector, corrector_kwargs: an object whose modify_score changes predicted noise.

        Raises:
            UsageError: a score_corrector for a network that does not predict noise.
        """
        out = self.apply_model(x, t, c, return_ids=return_codebook_ids)
        logits = None
        if return_codebook_ids:
            out, logits = out
        if score_corrector is not None:
            if self.parameterization != "eps":
                raise UsageError(
                    f"a score_corrector needs a network that predicts eps, not {self.parameterization}"
                )
            out = score_corrector.modify_score(self, out, x, t, c, **(corrector_kwargs or {}))
        quantize = self.first_stage_model.quantize if quantize_denoised else None
        *moments, x_recon = self._mean_variance(out, x, t, clip_denoised, quantize)
        if return_codebook_ids:
            return (*moments, logits)
        return (*moments, x_recon) if return_x0 else tuple(moments)

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take one ancestral step from level t; temperature multiplies the noise, noise_dropout thins it.

        Returns:
            x_{t-1}, with return_codebook_ids and the indices, or with return_x0 and the predicted clean sample.
        """
        mean, _, log_variance, *extra = self.p_mean_variance(
            x,
            c,
            t,
            clip_denoised,
            return_codebook_ids=return_codebook_ids,
            quantize_denoised=quantize_denoised,
            return_x0=return_x0,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        noise = noise_like(x.shape, x.device, repeat_noise) * temperature
        if noise_dropout > 0.0:
            noise = F.dropout(noise, p=noise_dropout)
        x_prev = gaussian.draw_prev(mean, log_variance, noise, t)
        if return_codebook_ids:
            return x_prev, extra[0].argmax(dim=1)
        return (x_prev, extra[0]) if return_x0 else x_prev

    def _make_step(
        self, cond: Any, temperature: float | Sequence[float] = 1.0, **options: Any
    ) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
        """Make the step of `_loop`: p_sample with the arguments that are the same at every level."""

        def sample_prev(x_t: Tensor, t: Tensor, level: int) -> tuple[Tensor, Tensor]:
            # The original noises the condition it noised the step before; each step's own level was meant.
            c = self._noise_condition(cond, t) if self.shorten_cond_schedule else cond
            scale = temperature if isinstance(temperature, int | float) else temperature[level]
            return self.p_sample(
                x_t, c, t, clip_denoised=self.clip_denoised, return_x0=True, temperature=scale, **options
            )

        return sample_prev

    def _count_levels(self, timesteps: int | None, start_T: int | None) -> int:
        timesteps = default(timesteps, self.num_timesteps)
        timesteps = timesteps if start_T is None else min(timesteps, start_T)
        if not 1 <= timesteps <= self.num_timesteps:
            raise UsageError(f"timesteps should lie in 1..{self.num_timesteps}, got {timesteps}")
        return timesteps

    @torch.no_grad()
    def progressive_denoising(
        self,
        cond: Any,
        shape: Sequence[int],
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        quantize_denoised: bool = False,
        img_callback: Callable[[Tensor, int], None] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        x_T: Tensor | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample through all levels and keep the clean samples predicted on the way.

        Args:
            cond: conditions as in apply_model; of more than the batch, the first are taken.
            shape: (b, c, h, w), or (c, h, w) with batch_size.
            verbose: no effect: nothing is printed, a progress bar is the caller's (see callback).
            callback, img_callback: called with the level, and with (samples, level), after each step.
            mask, x0: keep x0 where mask is 1, blended in after each step.
            temperature: multiplies the noise; one for all levels or one each.
            x_T: the noise to begin with; drawn where none is given.
            start_T: begin at this many levels instead of all.
            log_every_t: instead of the model's.

        Returns:
            samples (b, c, h, w), and the predicted clean samples every log_every_t levels.
        """
        timesteps = self._count_levels(None, start_T)
        full = tuple(shape) if batch_size is None else (batch_size, *tuple(shape)[-3:])
        sample_prev = self._make_step(
            first_of(cond, full[0]),
            temperature,
            quantize_denoised=quantize_denoised,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        samples, kept = self._loop(
            sample_prev,
            torch.randn(full, device=self.device) if x_T is None else x_T,
            timesteps,
            mask=mask,
            x0=x0,
            log_every_t=log_every_t,
            callback=callback,
            img_callback=img_callback,
        )
        return samples, [step.pred_x0 for step in kept]

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond: Any,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> Any:
        """Sample through the lowest `timesteps` levels (all by default), ancestrally.

        Arguments as in progressive_denoising; shape is (b, c, h, w).

        Returns:
            samples; with return_intermediates also the samples every log_every_t levels, the noise first.
        """
        timesteps = self._count_levels(timesteps, start_T)
        x_T = torch.randn(tuple(shape), device=self.device) if x_T is None else x_T
        samples, kept = self._loop(
            self._make_step(cond, quantize_denoised=quantize_denoised),
            x_T,
            timesteps,
            mask=mask,
            x0=x0,
            log_every_t=log_every_t,
            callback=callback,
            img_callback=img_callback,
        )
        return (samples, [x_T, *(step.x_t for step in kept)]) if return_intermediates else samples

    @torch.no_grad()
    def sample(
        self,
        cond: Any,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make batch_size latents; of more conditions than that, the first are taken. See p_sample_loop."""
        shape = default(shape, (batch_size, self.channels, self.image_size, self.image_size))
        return self.p_sample_loop(
            first_of(cond, batch_size),
            shape,
            return_intermediates=return_intermediates,
            x_T=x_T,
            verbose=verbose,
            timesteps=timesteps,
            quantize_denoised=quantize_denoised,
            mask=mask,
            x0=x0,
            **kwargs,
        )

    @torch.no_grad()
    def sample_log(
        self, cond: Any, batch_size: int, ddim: bool, ddim_steps: int, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Make latents for the log, with DDIM in ddim_steps or ancestrally; return (samples, intermediates)."""
        if not ddim:
            return self.sample(cond, batch_size=batch_size, return_intermediates=True, **kwargs)
        shape = (self.channels, self.image_size, self.image_size)
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)


def first_of(cond: Any, count: int | None) -> Any:
    """Take the first `count` of a batch of conditions: tensor, list of strings, list of tensors, or dict."""
    if cond is None or count is None:
        return cond
    if isinstance(cond, Mapping):
        return {key: first_of(value, count) for key, value in cond.items()}
    if isinstance(cond, list) and any(isinstance(c, Tensor) for c in cond):
        return [c[:count] for c in cond]
    return cond[:count]
