"""CompVis's DDIMSampler: its constructor, keywords, tables and numbers, on the shared loop of levels.py."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UsageError
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.levels import Level, Step, check_levels, run_levels, unit_noise
from ldm.models.diffusion.samplers import DDIM, Sampler, check_eta, check_mask, warn_of_batch
from ldm.modules.diffusionmodules.util import (
    extract_into_tensor,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
)
from ldm.process.schedule import LEAST_SIGNAL
from ldm.process.spacing import EXACT_METHODS, check_steps, exact_levels
from ldm.process.steps import ddim_inverse_step, ddim_std

logger = logging.getLogger(__name__)

Callback = Callable[[int], Any]
ImageCallback = Callable[[Tensor, int], Any]


class TableSampler:
    """What CompVis's DDIM and PLMS samplers share: the tables of a run, kept as attributes.

    make_schedule sets ddim_timesteps (S,) int64, ddim_alphas, ddim_alphas_prev, ddim_sigmas and
    ddim_sqrt_one_minus_alphas (S,), ddim_sigmas_for_original_num_steps (T,), and the model's own tables under
    their names; steps read them from there, so a changed table changes the run.

    Args:
        model: see denoiser.py.
        schedule, device: kept as attributes, without effect: tables and samples are where the model is.
        separate_passes: run guidance's two passes one after the other, as ControlNet's sampler does.

    Other people's subclasses may override any method by the originals' signatures: each calls the others with the
    originals' arguments, and with later ones (ucg_schedule, dynamic_threshold) only where they are set.
    """

    sampler: type[Sampler]
    separate_passes = False  # for subclasses that do without this constructor

    def __init__(
        self,
        model: Any,
        schedule: str = "linear",
        device: Any = None,
        *,
        separate_passes: bool = False,
        **kwargs: Any,
    ):
        warn_of_unused(kwargs)
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule
        self.device = getattr(model, "device", None) if device is None else device
        self.separate_passes = separate_passes

    def register_buffer(self, name: str, attr: Any) -> None:
        """Keep a table as an attribute, a tensor on the model's device and in no more than float32."""
        if isinstance(attr, Tensor):
            dtype = torch.float32 if attr.dtype == torch.float64 else attr.dtype
            attr = attr.to(device=self.model.device, dtype=dtype)
        setattr(self, name, attr)

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Choose the levels of a run and make its tables.

        Args:
            ddim_num_steps: 1 to the model's number of levels.
            ddim_discretize: "uniform" has exactly ddim_num_steps levels: the original's own wherever their
                number divides the model's, and an even spread where the original gave another count or
                failed. "compvis" has the original's uniform list, "quad" its quadratic one; "trailing", "leading"
                and "linspace" are diffusers'. For a model whose last level has no signal take "trailing".
            ddim_eta: 0 = deterministic, 1 = DDPM's variance.

        Raises:
            UsageError: a number of steps, a name or an eta out of range.
        """
        check_eta(self.sampler, ddim_eta)
        num_train = self.ddpm_num_timesteps
        steps = check_steps(ddim_num_steps, num_train, name="the number of DDIM steps")
        if ddim_discretize in EXACT_METHODS and ddim_discretize != "quad":
            self.ddim_timesteps = exact_levels(ddim_discretize, steps, num_train)
        elif ddim_discretize in ("compvis", "quad"):
            method = "uniform" if ddim_discretize == "compvis" else "quad"
            levels = make_ddim_timesteps(method, steps, num_train, verbose=verbose)
            self.ddim_timesteps = check_levels(levels, num_train)
        else:
            known = ", ".join((*EXACT_METHODS, "compvis"))
            raise UsageError(f"ddim_discretize must be one of {known}; got {ddim_discretize!r}")
        if self.ddim_timesteps[-1] < num_train - 1 and float(self.model.alphas_cumprod[-1]) <= LEAST_SIGNAL:
            logger.warning(
                "the model's last level has no signal and is where pure noise belongs, but '%s' begins at %d; take "
                "ddim_discretize='trailing'",
                ddim_discretize,
                self.ddim_timesteps[-1],
            )

        alpha_bar = self.model.alphas_cumprod.detach().float().cpu()
        alpha_bar_prev = self.model.alphas_cumprod_prev.detach().float().cpu()
        self.register_buffer("betas", self.model.betas.detach().float())
        self.register_buffer("alphas_cumprod", alpha_bar)
        self.register_buffer("alphas_cumprod_prev", alpha_bar_prev)
        self.register_buffer("sqrt_alphas_cumprod", alpha_bar.sqrt())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - alpha_bar).sqrt())
        self.register_buffer("log_one_minus_alphas_cumprod", (1 - alpha_bar).log())
        self.register_buffer("sqrt_recip_alphas_cumprod", (1 / alpha_bar).sqrt())
        self.register_buffer("sqrt_recipm1_alphas_cumprod", (1 / alpha_bar - 1).sqrt())

        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(
            alphacums=alpha_bar, ddim_timesteps=self.ddim_timesteps, eta=ddim_eta, verbose=verbose
        )
        self.register_buffer("ddim_sigmas", torch.as_tensor(sigmas))
        self.register_buffer("ddim_alphas", torch.as_tensor(alphas))
        self.register_buffer("ddim_alphas_prev", alphas_prev)
        self.register_buffer("ddim_sqrt_one_minus_alphas", (1 - torch.as_tensor(alphas)).sqrt())
        std = ddim_std(alpha_bar.double(), alpha_bar_prev.double(), ddim_eta)
        self.register_buffer("ddim_sigmas_for_original_num_steps", std.float())

    def _make_schedule(self, S: int, eta: float, verbose: bool, discretize: str) -> None:
        """Call make_schedule, which may be a subclass's, as the originals call it."""
        later = {} if discretize == "uniform" else {"ddim_discretize": discretize}
        self.make_schedule(ddim_num_steps=S, ddim_eta=eta, verbose=verbose, **later)

    def _row(
        self, index: int, t: int | Tensor, use_original_steps: bool, device: torch.device
    ) -> tuple[Level, Level, Tensor]:
        """Read one row of the tables, without waiting for the device: (level, level stepped to, std of the noise)."""

        def at(table: Any) -> Tensor:
            value = table[index]
            if isinstance(value, Tensor):
                return value.to(device=device, dtype=torch.float32)
            return torch.full((), float(value), dtype=torch.float32, device=device)

        if use_original_steps:
            tables = self.alphas_cumprod, self.alphas_cumprod_prev, self.ddim_sigmas_for_original_num_steps
            times = range(self.ddpm_num_timesteps)
        else:
            tables = self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas
            times = self.ddim_timesteps
        alpha_bar, alpha_bar_prev, std = map(at, tables)
        here = Level(t, alpha_bar, index + 1, len(times))
        return here, Level(int(times[max(index - 1, 0)]), alpha_bar_prev, index, len(times)), std

    def _plan(self, count: int, use_original_steps: bool, device: torch.device) -> list[Level]:
        """The lowest `count` levels of the tables, noisiest first, and the end."""
        times = range(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps.tolist()
        rows = [self._row(i, times[i], use_original_steps, device) for i in reversed(range(count))]
        return [here for here, _, _ in rows] + [to for _, to, _ in rows[-1:]]

    def _count(self, timesteps: int | None, use_original_steps: bool) -> int:
        """Count the levels of a run, which are the lowest ones."""
        available = self.ddpm_num_timesteps if use_original_steps else len(self.ddim_timesteps)
        if timesteps is None:
            return available
        if use_original_steps:
            return min(timesteps, available)
        # The original leaves out the highest of these levels; kept, for its callers' numbers.
        return max(min(timesteps, available) - 1, 0)

    def _denoiser(self, conditioning: Any, **options: Any) -> Denoiser:
        return Denoiser(self.model, conditioning, separate_passes=self.separate_passes, **options)

    def _blend(self, mask: Tensor | None, x0: Tensor | None) -> Callable[[Tensor, Level], Tensor] | None:
        """Keep x0 where mask is 1, noised afresh by the model before every step."""

        def keep_known(x: Tensor, level: Level) -> Tensor:
            return self.model.q_sample(x0, times_for(x, level.t)) * mask + (1 - mask) * x

        return None if mask is None else keep_known


@dataclass
class _TableDDIM(DDIM):
    """DDIM whose noise has the standard deviation of a row of the tables."""

    row_std: Tensor | None = None

    def std(self, here: Level, to: Level) -> Tensor:
        return self.row_std


class DDIMSampler(TableSampler):
    """DDIM with CompVis's signatures.

    Differences: it runs on the model's device, "uniform" gives exactly S steps, the original
    steps and strength 1 work, conditions may be dicts of lists, x0 and v models are understood, nothing is
    printed (a progress bar is the caller's).
    """

    sampler = DDIM

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
        ucg_schedule: Sequence[float] | None = None,
        ddim_discretize: str = "uniform",
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample a batch from noise.

        Args:
            S: number of steps, 1 to the model's number of levels.
            shape: (c, h, w) of one sample.
            conditioning, unconditional_conditioning: tensor, list, or dict of lists.
            callback, img_callback: called after each step with i = 0, 1, ..., the second with (pred_x0, i).
            quantize_x0: snap each predicted clean sample to the first stage's codebook.
            eta: 0 to 1.
            mask, x0: keep x0 (b, c, h, w) where mask is 1.
            temperature, noise_dropout: of the noise of each step.
            x_T: (b, c, h, w) initial noise; drawn on the model's device if not given.
            log_every_t: which steps the intermediates hold, counted from the end; the first always.
            dynamic_threshold: shrink each predicted clean sample to at most this root mean square.
            ucg_schedule: a guidance scale for each step, in place of the one.
            ddim_discretize: see make_schedule.
            normals_sequence, verbose: without effect.

        Returns:
            (samples, {"x_inter": [...], "pred_x0": [...]}).

        Raises:
            UsageError: a value out of range.
        """
        warn_of_unused(kwargs)
        warn_of_batch(conditioning, batch_size)
        self._make_schedule(S, eta, verbose, ddim_discretize)
        return self.ddim_sampling(
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
            **only_set(dynamic_threshold=dynamic_threshold, ucg_schedule=ucg_schedule),
        )

    @torch.no_grad()
    def ddim_sampling(
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
        ucg_schedule: Sequence[float] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Run the tables of make_schedule, or the model's own levels; arguments as in `sample`.

        Args:
            shape: (b, c, h, w).
            ddim_use_original_steps: go through every level of the model.
            timesteps: only the lowest so many levels; of DDIM's own tables one less, as in the original.
        """
        check_mask(mask, x0, shape)
        count = self._count(timesteps, ddim_use_original_steps)
        if ucg_schedule is not None and len(ucg_schedule) != count:
            raise UsageError(
                f"ucg_schedule needs one scale for each of {count} steps, got {len(ucg_schedule)}"
            )

        def step(x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
            scale, index = unconditional_guidance_scale, here.left - 1
            return self.p_sample_ddim(
                x,
                cond,
                times_for(x, here.t),
                index=index,
                use_original_steps=ddim_use_original_steps,
                quantize_denoised=quantize_denoised,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=scale if ucg_schedule is None else ucg_schedule[~index],
                unconditional_conditioning=unconditional_conditioning,
                **only_set(dynamic_threshold=dynamic_threshold),
            )

        x = torch.randn(tuple(shape), device=self.model.device) if x_T is None else x_T
        levels = self._plan(count, ddim_use_original_steps, x.device)
        return collect(
            run_levels(levels, x, step, self._blend(mask, x0)), x, callback, img_callback, log_every_t
        )

    @torch.no_grad()
    def p_sample_ddim(
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
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take one step: (x_prev, pred_x0).

        Args:
            x: (b, c, h, w) at row `index` of the tables.
            t: (b,) levels, passed to the network.
            repeat_noise: the same noise for every image of the batch.
        """
        denoise = self._denoiser(
            c,
            unconditional_conditioning=unconditional_conditioning,
            guidance_scale=unconditional_guidance_scale,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        here, to, std = self._row(index, t, use_original_steps, x.device)
        sampler = _TableDDIM(
            denoise,
            row_std=std,
            quantize_denoised=quantize_denoised,
            dynamic_threshold=dynamic_threshold,
            temperature=temperature,
            noise_dropout=noise_dropout,
            repeat_noise=repeat_noise,
        )
        return sampler.step(x, here, to)

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise x0 (b, c, h, w) to rows t (b,) of the tables, from where `decode` takes t steps.

        The level is the one above decode's first, as in the original. A row past the last
        (strength 1, where the original failed) is pure noise: what a run of all steps starts from.
        """
        alpha_bar = self.alphas_cumprod if use_original_steps else self.ddim_alphas
        noise = unit_noise(x0) if noise is None else noise
        # One more row, whose signal is 0 and noise 1.
        alpha_bar = torch.nn.functional.pad(alpha_bar.to(x0.device), (0, 1))
        t = t.to(x0.device)
        signal = extract_into_tensor(alpha_bar.sqrt(), t, x0.shape)
        sigma = extract_into_tensor((1 - alpha_bar).sqrt(), t, x0.shape)
        return signal * x0 + sigma * noise

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """Take the last t_start steps from x_latent (b, c, h, w): the second half of img2img."""
        count = self._part(t_start, use_original_steps, "t_start")

        def step(x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
            return self.p_sample_ddim(
                x,
                cond,
                times_for(x, here.t),
                index=here.left - 1,
                use_original_steps=use_original_steps,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )

        levels = self._plan(count, use_original_steps, x_latent.device)
        return collect(run_levels(levels, x_latent, step), x_latent, callback)[0]

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Any,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        callback: Callback | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Invert: walk x0 (b, c, h, w) up t_enc levels along DDIM's deterministic path.

        The network is called with the level of the noisier end, as in ControlNet's sampler (the one it came from
        passed the loop's index).

        Args:
            return_intermediates: keep about so many samples on the way, and always the last two.

        Returns:
            (x, {"x_encoded": x, "intermediate_steps": [i, ...]}), with return_intermediates "intermediates" as well.
        """
        count = self._part(t_enc, use_original_steps, "t_enc")
        denoise = self._denoiser(
            c,
            unconditional_conditioning=unconditional_conditioning,
            guidance_scale=unconditional_guidance_scale,
        )

        def step(x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
            eps, pred_x0 = denoise(x, to.t, to.alpha_bar)
            x_next = ddim_inverse_step(x, eps, alpha_bar_t=here.alpha_bar, alpha_bar_next=to.alpha_bar)
            return x_next, pred_x0

        x, kept = x0, {}
        every = max(1, count // return_intermediates) if return_intermediates else 0
        for done in run_levels(self._plan(count, use_original_steps, x0.device)[::-1], x0, step):
            x = done.x_t
            if every and (done.index % every == 0 or done.index >= count - 2):
                kept[done.index] = x
            if callback is not None:
                callback(done.index)
        out: dict[str, Any] = {"x_encoded": x, "intermediate_steps": list(kept)}
        if return_intermediates:
            out["intermediates"] = list(kept.values())
        return x, out

    def _part(self, count: int, use_original_steps: bool, name: str) -> int:
        available = self.ddpm_num_timesteps if use_original_steps else len(self.ddim_timesteps)
        if not 0 <= count <= available:
            raise UsageError(f"{name} must be from 0 to {available}, the number of steps; got {count}")
        return int(count)


def times_for(x: Tensor, t: int | float | Tensor) -> Tensor:
    """Repeat one whole level for every image of a batch x (b, ...): (b,) int64."""
    return torch.full(x.shape[:1], t, device=x.device, dtype=torch.long)


def collect(
    steps: Iterator[Step],
    x: Tensor,
    callback: Callback | None = None,
    img_callback: ImageCallback | None = None,
    log_every_t: int | float = math.inf,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Run a sampler to its end, with CompVis's callbacks and intermediates.

    Returns:
        (x, {"x_inter": [...], "pred_x0": [...]}): x at first, then after the first step, every log_every_t-th
        counted from the end, and the last.
    """
    intermediates = {"x_inter": [x], "pred_x0": [x]}
    for step in steps:
        x = step.x_t
        if callback is not None:
            callback(step.index)
        if img_callback is not None:
            img_callback(step.pred_x0, step.index)
        remaining = step.total - step.index - 1
        if remaining % log_every_t == 0 or step.index == 0:
            intermediates["x_inter"].append(x)
            intermediates["pred_x0"].append(step.pred_x0)
    return x, intermediates


def only_set(**options: Any) -> dict[str, Any]:
    """Keep the options that are not None, so that an override which does not know the others can be called."""
    return {name: value for name, value in options.items() if value is not None}


def warn_of_unused(kwargs: dict[str, Any]) -> None:
    """Warn of arguments that the original swallowed in silence, misspelt ones among them."""
    if kwargs:
        logger.warning("these arguments have no effect on sampling: %s", ", ".join(sorted(kwargs)))
