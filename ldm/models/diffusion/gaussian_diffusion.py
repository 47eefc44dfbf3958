"""OpenAI's diffusion: one object for noising, sampling, losses and likelihoods, whatever a network predicts.

The names, signatures and order of draws are those of Improved DDPM (arXiv:2102.09672) and guided-diffusion
(arXiv:2105.05233); the arithmetic is in ldm.process. `ldm.guided_diffusion.gaussian_bridge` puts models of ours
behind it.
"""

import copy
import enum
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import MismatchError, UsageError
from ldm.helpers import mean_flat, upload
from ldm.improved_calls import in_either_order
from ldm.models.diffusion.levels import Level, make_plan, run_levels
from ldm.modules.diffusionmodules.util import check_label_range, extract_into_tensor
from ldm.process import gaussian, guidance, prediction, schedule
from ldm.process.likelihood import (
    bits_per_dim,
    discretized_gaussian_log_likelihood,
    gaussian_log_likelihood,
    normal_kl,
    prior_bits_per_dim,
)
from ldm.process.steps import ddim_inverse_step, ddim_std, ddim_step

NAMED_SCHEDULES = ("linear", "cosine")

# How likely the last step finds the data, by the name of GaussianDiffusion's decoder_nll.
DECODERS = {
    "discretized": discretized_gaussian_log_likelihood,
    "gaussian": gaussian_log_likelihood,
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Make OpenAI's "linear" or "cosine" betas, (num_diffusion_timesteps,) float64; see process.schedule.

    Raises:
        UsageError: an unknown name, or a "linear" chain so short that its betas leave [0, 1].
    """
    if schedule_name not in NAMED_SCHEDULES:
        raise UsageError(
            f"beta schedule '{schedule_name}' is unknown; choose one of {', '.join(NAMED_SCHEDULES)}"
        )
    return schedule.named_betas(f"openai-{schedule_name}", num_diffusion_timesteps)


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Cut a continuous alpha_bar(t), t in [0, 1], into betas; see process.schedule."""
    return schedule.betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta)


class ModelMeanType(enum.Enum):
    """What a network predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()
    EPSILON = enum.auto()
    VELOCITY = enum.auto()  # v of ldm.process.prediction; not in the original


# The kinds of ldm.process.prediction; PREVIOUS_X is none of them.
KINDS = {ModelMeanType.START_X: "x0", ModelMeanType.EPSILON: "eps", ModelMeanType.VELOCITY: "v"}


class ModelVarType(enum.Enum):
    """Where the variance of a step comes from."""

    LEARNED = enum.auto()  # the network's second half of channels is its logarithm
    FIXED_SMALL = enum.auto()  # the posterior's
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # the second half of channels, in [-1, 1], goes from small to large


LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class LossType(enum.Enum):
    """What training minimises. Learned variances add the bound to both kinds of MSE."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()  # the bound's part times num_timesteps / 1000
    KL = enum.auto()  # the variational bound, one term
    RESCALED_KL = enum.auto()  # the same times num_timesteps: an estimate of the whole bound

    def is_vb(self) -> bool:
        """Tell whether this is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


def _extract_into_tensor(arr: np.ndarray, timesteps: Tensor, broadcast_shape: Sequence[int]) -> Tensor:
    """Look levels (b,) up in a table (T,) and spread the answers over a batch of this shape, in float32."""
    row = torch.from_numpy(arr).float().to(timesteps.device)
    return extract_into_tensor(row, timesteps.long(), broadcast_shape).expand(*broadcast_shape)


class GaussianDiffusion:
    """Diffusion over a chain of betas; level t = 0 is the cleanest.

    A `model` is any callable from ((b, c, ...) samples, (b,) levels, **model_kwargs) to (b, c, ...), or to
    (b, 2c, ...) where the variance is learned. A `cond_fn` has the same arguments and gives the gradient of
    log p(condition | x_t) by x_t. The tables are float64 numpy arrays (num_timesteps,) under the original's
    names; what they multiply is worked out in float32, or in float64 for float64 samples.

    In every method:
        clip_denoised: keep predicted clean samples within [-1, 1]. None, the default, is what the data are:
            True for pixels (decoder_nll "discretized", where the original's default is True), False for latents.
        denoised_fn: applied to predicted clean samples, before they are clipped.
        model_kwargs: further arguments of model and cond_fn.

    Args:
        betas: one row of numbers in (0, 1].
        model_mean_type, model_var_type, loss_type: see there.
        rescale_timesteps: call the network with t * 1000 / num_timesteps instead of t.
        decoder_nll: how the step to level 0 is judged: "discretized" for pixels, multiples of 2 / 255 in [-1, 1]
            (a probability, at least 0 bits), "gaussian" for data without bins, such as latents (a density, whose
            bits may be negative and depend on the data's unit).

    Raises:
        UsageError: betas out of range, an unknown decoder_nll, or a network that predicts eps over a chain
            that ends without signal, where eps says nothing.
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        decoder_nll: Literal["discretized", "gaussian"] = "discretized",
    ):
        if decoder_nll not in DECODERS:
            raise UsageError(f"decoder_nll must be one of {', '.join(DECODERS)}; got {decoder_nll!r}")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.decoder_nll = decoder_nll

        chain = schedule.NoiseSchedule.from_betas(betas, up_to_one=True)
        if chain.alpha_bar[-1] == 0 and model_mean_type == ModelMeanType.EPSILON:
            raise UsageError(
                f"EPSILON needs some signal at every level, but betas leave none at level "
                f"{int(np.argmin(chain.alpha_bar))} of {chain.num_steps}; take VELOCITY or START_X"
            )
        self.num_timesteps = chain.num_steps
        self.betas = chain.betas
        self.alphas_cumprod = chain.alpha_bar
        self.alphas_cumprod_prev = chain.alpha_bar_prev
        self.alphas_cumprod_next = np.append(chain.alpha_bar[1:], 0.0)

        tables = (chain.betas, chain.alpha_bar, chain.alpha_bar_prev)
        beta, alpha_bar, alpha_bar_prev = map(torch.from_numpy, tables)
        self.sqrt_alphas_cumprod = alpha_bar.sqrt().numpy()
        self.sqrt_one_minus_alphas_cumprod = (1 - alpha_bar).sqrt().numpy()
        self.log_one_minus_alphas_cumprod = (1 - alpha_bar).log().numpy()
        self.sqrt_recip_alphas_cumprod = (1 / alpha_bar).sqrt().numpy()
        self.sqrt_recipm1_alphas_cumprod = (1 / alpha_bar - 1).sqrt().numpy()
        q = gaussian.posterior(alpha_bar, alpha_bar_prev, beta=beta)
        self.posterior_variance = q.variance.numpy()
        self.posterior_log_variance_clipped = np.log(self._finite_start(self.posterior_variance))
        self.posterior_mean_coef1 = q.coef_x0.numpy()
        self.posterior_mean_coef2 = q.coef_x_t.numpy()

    # -- random draws --------------------------------------------------------------------------------------------

    def noise_like(self, x: Tensor) -> Tensor:
        """Draw unit normals of x's shape, dtype and device; all that the methods draw comes from here."""
        return torch.randn_like(x)

    def drawing(self, noise_like: Callable[[Tensor], Tensor]) -> Self:
        """Return the same diffusion with another source of noise, such as one generator for each picture."""
        other = copy.copy(self)
        other.noise_like = noise_like
        return other

    def _finite_start(self, variance: np.ndarray) -> np.ndarray:
        tables = (variance, self.betas, self.posterior_variance)
        variance, betas, posterior_variance = map(torch.from_numpy, tables)
        return gaussian.finite_start(variance, betas=betas, posterior_variance=posterior_variance).numpy()

    # -- looking levels up ---------------------------------------------------------------------------------

    def _at(self, table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        """Look levels t (b,) up in a table, shaped like a batch."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        row = upload(torch.from_numpy(table).to(dtype), t.device)
        return extract_into_tensor(row, t.long(), like.shape).expand(like.shape)

    def _alpha_bar(self, table: np.ndarray, t: Tensor) -> Tensor:
        """Look alpha_bar up as the steps of ldm.process take it: (b,), in float64 where the device has it."""
        dtype = torch.float32 if t.device.type == "mps" else torch.float64
        return upload(torch.from_numpy(table).to(dtype), t.device)[t]

    def _level(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Look alpha_bar and sqrt(1 - alpha_bar) up, shaped like a batch."""
        tables = self.alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return tuple(self._at(table, t, like) for table in tables)

    def _check_levels(self, t: Tensor, x: Tensor) -> None:
        """Refuse what is no level of the chain; levels on an accelerator are not read, which would wait for it."""
        last = self.num_timesteps - 1
        wanted = f"t should be {len(x)} whole levels from 0 to {last}, one for each sample"
        if t.shape != x.shape[:1] or t.is_floating_point():
            raise UsageError(f"{wanted}; got {t.dtype} of shape {tuple(t.shape)}")
        if t.device != x.device:
            raise UsageError(
                f"{wanted}, where they are: on {x.device}; got t on {t.device}, give t.to(x.device)"
            )
        if t.device.type == "cpu" and ((t < 0) | (t > last)).any():
            raise UsageError(f"{wanted}; got {t.tolist()}")

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # -- q: noising ----------------------------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_t | x_0) (DDPM Eq. 4), each shaped like x_start."""
        self._check_levels(t, x_start)
        mean = self._at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = self._at(1 - self.alphas_cumprod, t, x_start)
        return mean, variance, self._at(self.log_one_minus_alphas_cumprod, t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise clean samples to levels t (b,); the noise is drawn where none is given."""
        self._check_levels(t, x_start)
        noise = self.noise_like(x_start) if noise is None else noise
        _check_shape("noise", noise, x_start)
        alpha_bar, sigma = self._level(t, x_start)
        return gaussian.q_sample(x_start, noise, alpha_bar=alpha_bar, sigma=sigma)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (DDPM Eq. 6, 7)."""
        self._check_levels(t, x_t)
        _check_shape("x_start", x_start, x_t)
        mean = gaussian.posterior_mean(x_start, x_t, **self._posterior(t, x_t))
        variance = self._at(self.posterior_variance, t, x_t)
        return mean, variance, self._at(self.posterior_log_variance_clipped, t, x_t)

    def _posterior(self, t: Tensor, like: Tensor) -> dict[str, Tensor]:
        coefficients = {"coef_x0": self.posterior_mean_coef1, "coef_x_t": self.posterior_mean_coef2}
        return {name: self._at(table, t, like) for name, table in coefficients.items()}

    # -- p: the network's step back ------------------------------------------------------------------------

    def p_mean_variance(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Run the network for p(x_{t-1} | x_t).

        Returns:
            {"mean", "variance", "log_variance", "pred_xstart"}, each shaped like x.

        Raises:
            UsageError: t out of range, or labels y that the network has not.
            MismatchError: an answer with another number of channels than the types need.
        """
        answer = self._output(model, x, t, model_kwargs)
        output, variance, log_variance = self._variance(answer, x, t)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            pred_xstart = self._predict_xstart_from_xprev(x_t=x, t=t, xprev=output)
        else:
            pred_xstart = prediction.to_x0(KINDS[self.model_mean_type], output, x, *self._level(t, x))
        pred_xstart = pred_xstart if denoised_fn is None else denoised_fn(pred_xstart)
        clip = self.decoder_nll == "discretized" if clip_denoised is None else clip_denoised
        pred_xstart = pred_xstart.clamp(-1, 1) if clip else pred_xstart
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = output
        else:
            mean = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)[0]
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def _output(
        self, model: Callable, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
    ) -> Tensor:
        """Run the network, and check that its output has the channels that the variance's type needs."""
        self._check_levels(t, x)
        kwargs = model_kwargs or {}
        check_labels_of(model, kwargs.get("y"))
        answer = model(x, self._scale_timesteps(t), **kwargs)
        factor = 2 if self.model_var_type in LEARNED else 1
        wanted = (len(x), factor * x.shape[1], *x.shape[2:])
        if tuple(answer.shape) != wanted:
            raise MismatchError(
                f"{self.model_var_type.name} variance takes {wanted[1]} channels from the network, {factor} for "
                f"each of x: {wanted}; got {tuple(answer.shape)}"
            )
        return answer

    def _variance(self, answer: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split a network's output into its prediction, and the variance and log variance of the step."""
        kind = self.model_var_type
        if kind == ModelVarType.FIXED_SMALL:
            variance, log_variance = self.posterior_variance, self.posterior_log_variance_clipped
        elif kind == ModelVarType.FIXED_LARGE:
            variance = self._finite_start(self.betas)
            log_variance = np.log(variance)
        else:
            output, values = answer.chunk(2, dim=1)
            if kind == ModelVarType.LEARNED_RANGE:
                values = gaussian.range_log_variance(
                    values,
                    least=self._at(self.posterior_log_variance_clipped, t, x),
                    most=self._at(np.log(self.betas), t, x),
                )
            return output, values.exp(), values
        return answer, self._at(variance, t, x), self._at(log_variance, t, x)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        _check_shape("eps", eps, x_t)
        return prediction.to_x0("eps", eps, x_t, *self._level(t, x_t))

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        _check_shape("xprev", xprev, x_t)
        return gaussian.x0_from_posterior_mean(xprev, x_t, **self._posterior(t, x_t))

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return prediction.to_eps("x0", pred_xstart, x_t, *self._level(t, x_t))

    # -- a classifier's guidance ---------------------------------------------------------------------------

    def _gradient(
        self, cond_fn: Callable, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
    ) -> Tensor:
        return cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))

    def condition_mean(
        self,
        cond_fn: Callable,
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Move the mean of a step along cond_fn's gradient (arXiv:2105.05233, algorithm 1)."""
        gradient = self._gradient(cond_fn, x, t, model_kwargs)
        return guidance.classifier_mean(p_mean_var["mean"], p_mean_var["variance"], gradient)

    def condition_score(
        self,
        cond_fn: Callable,
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Move the noise behind a step along cond_fn's gradient (arXiv:2105.05233, algorithm 2).

        Returns:
            p_mean_var with another "pred_xstart" and "mean".
        """
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = self._gradient(cond_fn, x, t, model_kwargs)
        eps = guidance.classifier_eps(eps, gradient, self._level(t, x)[1])
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)[0]
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    # -- sampling ------------------------------------------------------------------------------------------

    @in_either_order
    def p_sample(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Draw x_{t-1} (DDPM, algorithm 2).

        Returns:
            {"sample", "pred_xstart"}.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = self.noise_like(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sample = gaussian.draw_prev(mean, out["log_variance"], noise, t)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    @in_either_order
    def p_sample_loop(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Sample `shape` from noise through all levels; arguments as for p_sample_loop_progressive."""
        steps = self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress
        )
        return _last(steps)["sample"]

    @in_either_order
    def p_sample_loop_progressive(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what p_sample gives at each level, from the noisiest on.

        Args:
            shape: (b, c, ...).
            noise: to start from; drawn where none is given.
            device: None = that of the noise, or of the model's parameters, or the CPU.
            progress: show a bar.
        """

        def sample_prev(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        return self._loop(sample_prev, model, shape, noise, device, progress)

    @in_either_order
    def ddim_sample(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """Step to x_{t-1} by DDIM (arXiv:2010.02502, Eq. 12); eta 0 = deterministic, 1 = DDPM's variance.

        The noise behind x_t is worked out anew from the clipped clean sample. Noise is drawn even with eta 0.

        Returns:
            {"sample", "pred_xstart"}.

        Raises:
            UsageError: eta outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise UsageError(f"eta must be from 0 (deterministic) to 1 (DDPM's variance), got {eta}")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        alpha_bar = self._alpha_bar(self.alphas_cumprod, t)
        alpha_bar_prev = self._alpha_bar(self.alphas_cumprod_prev, t)
        # At t = 0 the step goes to the clean end, where the standard deviation is 0.
        sample, pred_xstart = ddim_step(
            x,
            self._predict_eps_from_xstart(x, t, out["pred_xstart"]),
            alpha_bar_t=alpha_bar,
            alpha_bar_prev=alpha_bar_prev,
            std=ddim_std(alpha_bar, alpha_bar_prev, eta),
            noise=self.noise_like(x),
            pred_x0=out["pred_xstart"],
        )
        return {"sample": sample, "pred_xstart": pred_xstart}

    def ddim_reverse_sample(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """Step to x_{t+1} along DDIM's deterministic path; from the noisiest level to pure noise.

        Returns:
            {"sample", "pred_xstart"}.

        Raises:
            UsageError: eta other than 0.
        """
        if eta != 0:
            raise UsageError(f"ddim_reverse_sample follows a deterministic path, so eta must be 0; got {eta}")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        sample = ddim_inverse_step(
            x,
            self._predict_eps_from_xstart(x, t, out["pred_xstart"]),
            alpha_bar_t=self._alpha_bar(self.alphas_cumprod, t),
            alpha_bar_next=self._alpha_bar(self.alphas_cumprod_next, t),
            pred_x0=out["pred_xstart"],
        )
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    @in_either_order
    def ddim_sample_loop(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Sample `shape` from noise by DDIM; arguments as for p_sample_loop_progressive."""
        steps = self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta
        )
        return _last(steps)["sample"]

    @in_either_order
    def ddim_sample_loop_progressive(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what ddim_sample gives at each level; arguments as for p_sample_loop_progressive."""

        def sample_prev(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)

        return self._loop(sample_prev, model, shape, noise, device, progress)

    def _loop(
        self,
        sample_prev: Callable[[Tensor, Tensor], dict[str, Tensor]],
        model: Callable,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        """Sample from noise through the whole chain, one step at each level."""
        if noise is not None and noise.shape != torch.Size(shape):
            raise MismatchError(f"noise should have shape {tuple(shape)}, got {tuple(noise.shape)}")
        device = _device(model, noise) if device is None else device
        x = torch.randn(*shape, device=device) if noise is None else noise

        def step(x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
            out = sample_prev(x, torch.full((len(x),), here.t, device=device))
            return out["sample"], out["pred_xstart"]

        levels = make_plan(np.arange(self.num_timesteps), self.alphas_cumprod, 1.0)
        steps = run_levels(levels, x, step)
        if progress:
            from tqdm.auto import tqdm

            steps = tqdm(steps, total=self.num_timesteps)
        return ({"sample": done.x_t, "pred_xstart": done.pred_x0} for done in steps)

    # -- losses and likelihoods ----------------------------------------------------------------------------

    def _vb_terms_bpd(
        self,
        model: Callable,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Work out one term of the variational bound for each sample, in bits per dimension (DDPM Eq. 5).

        Returns:
            {"output": (b,), the KL divergence at t > 0 and the decoder's negative log likelihood at t = 0,
            "pred_xstart": shaped like x_start}.
        """
        mean, _, log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        kl = normal_kl(mean, log_variance, out["mean"], out["log_variance"])
        likelihood = DECODERS[self.decoder_nll](
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        output = torch.where(t == 0, bits_per_dim(-likelihood), bits_per_dim(kl))
        return {"output": output, "pred_xstart": out["pred_xstart"]}

    def training_losses(
        self,
        model: Callable,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of clean samples x_start (b, c, ...) at levels t (b,).

        The bound trains only the variance where the error trains the mean: its gradient stops there
        (Improved DDPM, Eq. 16).

        Returns:
            {"loss": (b,)}, with "mse" and, for learned variances, "vb" where the loss is an error.
        """
        noise = self.noise_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)
            scale = self.num_timesteps if self.loss_type == LossType.RESCALED_KL else 1
            return {"loss": bound["output"] * scale}

        answer = self._output(model, x_t, t, model_kwargs)
        terms = {}
        if self.model_var_type in LEARNED:
            output, values = answer.chunk(2, dim=1)
            frozen = torch.cat([output.detach(), values], dim=1)
            bound = self._vb_terms_bpd(lambda *_: frozen, x_start, x_t, t, clip_denoised=False)
            scale = self.num_timesteps / 1000 if self.loss_type == LossType.RESCALED_MSE else 1
            terms["vb"] = bound["output"] * scale
            answer = output
        terms["mse"] = mean_flat((self._target(x_start, x_t, t, noise) - answer) ** 2)
        return {"loss": terms["mse"] + terms.get("vb", 0), **terms}

    def _target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The output that the network is trained towards."""
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            return self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        if self.model_mean_type == ModelMeanType.VELOCITY:
            return prediction.velocity(x_start, noise, *self._level(t, x_t))
        return x_start if self.model_mean_type == ModelMeanType.START_X else noise

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """Return the bound's prior term KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, (b,)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return prior_bits_per_dim(mean, log_variance)

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Callable,
        x_start: Tensor,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Work out the whole variational bound of clean samples, with one draw of noise at each level.

        Returns:
            {"total_bpd", "prior_bpd": (b,), "vb", "xstart_mse", "mse": (b, num_timesteps)}, the noisiest level
            first: total = prior + sum of vb, in bits per dimension; the errors are of predicted clean sample and
            predicted noise.
        """
        terms: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for level in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), level, device=x_start.device)
            noise = self.noise_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            terms["vb"].append(out["output"])
            terms["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            terms["mse"].append(mean_flat((eps - noise) ** 2))
        rows = {name: torch.stack(values, dim=1) for name, values in terms.items()}  # (b, num_timesteps)
        prior = self._prior_bpd(x_start)
        return {"total_bpd": rows["vb"].sum(dim=1) + prior, "prior_bpd": prior, **rows}


def check_labels_of(network: Any, labels: Any) -> None:
    """Refuse labels that any network, a UNet or another's, does not have, before it is called.

    Args:
        network: with its number of classes as `num_classes`; anything but a whole number there is not checked.
        labels: numbers of any shape. Those on an accelerator are not checked, which would wait for it, nor is what is
            no tensor.

    Raises:
        UsageError: naming the labels.
    """
    num_classes = getattr(network, "num_classes", None)
    if isinstance(num_classes, int) and isinstance(labels, Tensor) and labels.device.type == "cpu":
        check_label_range(labels, num_classes)


def _check_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise MismatchError(
            f"{name} should have the samples' shape {tuple(like.shape)}, got {tuple(tensor.shape)}"
        )


def _device(model: Callable, noise: Tensor | None) -> torch.device:
    if noise is not None:
        return noise.device
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return getattr(model, "device", torch.device("cpu")) if parameter is None else parameter.device


def _last(steps: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    return deque(steps, maxlen=1).pop()
