"""Models of ours behind OpenAI's interface: a DDPM or LatentDiffusion as the network of a GaussianDiffusion."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.errors import MismatchError, UsageError
from ldm.models.diffusion.gaussian_diffusion import (
    KINDS,
    LossType,
    ModelVarType,
    check_labels_of,
)
from ldm.models.diffusion.respace import SpacedDiffusion, space_timesteps
from ldm.models.diffusion.samplers import alpha_bar_table, predict_both
from ldm.process.guidance import first_tensor, guide

# How far a model's alphas_cumprod may be from what its betas add up to: both may have been through half precision.
TABLE_TOLERANCE = 1e-3


class GuidedNetwork:
    """A model with its conditions and guidance, as a network of samples and levels: network(x, t).

    Its answer is the model's own, eps, x0 or v. Channels beyond those of x, which say the variance, are the
    conditional answer's: guidance moves the mean, and extrapolated variances would leave their range.

    Args:
        model: see `as_gaussian_diffusion`.
        conditioning, unconditional_conditioning: as apply_model takes them.
        guidance_scale: at 1 the unconditional answer is not computed.
        separate_passes: compute the two answers one after the other, the conditional first, not in one batch.

    Raises:
        UsageError: a scale that is not finite or lacks its unconditional condition, conditions for a model
            that takes none, or labels that it has not.
    """

    def __init__(
        self,
        model: Any,
        conditioning: Any = None,
        *,
        unconditional_conditioning: Any = None,
        guidance_scale: float = 1.0,
        separate_passes: bool = False,
    ):
        if not math.isfinite(guidance_scale):
            raise UsageError(f"guidance_scale must be a finite number, got {guidance_scale}")
        if guidance_scale != 1 and unconditional_conditioning is None:
            raise UsageError(f"guidance_scale {guidance_scale} needs an unconditional_conditioning, got none")
        conditional = getattr(model, "takes_conditions", hasattr(model, "apply_model"))
        if not conditional and first_tensor([conditioning, unconditional_conditioning]) is not None:
            raise UsageError(f"{type(model).__name__} takes no conditions, got some; leave them out")
        for condition in (conditioning, unconditional_conditioning):
            _check_classes(model, condition)
        self.model = model
        self.conditioning = conditioning
        self.unconditional = unconditional_conditioning
        self.scale = guidance_scale
        self.separate_passes = separate_passes

    @property
    def device(self) -> torch.device:
        """Where samples are made."""
        return self.model.device

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict for samples x (b, c, ...) at levels t (b,)."""
        if self.scale == 1:
            return self._ask(x, t, self.conditioning)
        uncond, cond = predict_both(
            self._ask, x, t, self.unconditional, self.conditioning, self.separate_passes
        )
        c = x.shape[1]
        return torch.cat([guide(uncond[:, :c], cond[:, :c], self.scale), cond[:, c:]], dim=1)

    def _ask(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        if hasattr(self.model, "apply_model"):
            return self.model.apply_model(x, t, condition)
        return self.model.model(x, t)


def as_gaussian_diffusion(
    model: Any,
    conditioning: Any = None,
    *,
    unconditional_conditioning: Any = None,
    guidance_scale: float = 1.0,
    separate_passes: bool = False,
    timestep_respacing: str | Sequence[int] = "",
    model_var_type: ModelVarType = ModelVarType.FIXED_SMALL,
    loss_type: LossType = LossType.MSE,
    decoder_nll: Literal["discretized", "gaussian"] | None = None,
) -> tuple[GuidedNetwork, SpacedDiffusion]:
    """Put a model of ours behind OpenAI's interface: respaced DDPM, DDIM both ways, losses and bounds.

    Samples of a LatentDiffusion are latents in scaled units, as `get_first_stage_encoding` makes them and
    `decode_first_stage` takes them; bounds are then in bits per latent dimension, of a density (see decoder_nll). In
    the first stage's own units they are log2(scale_factor) bits lower.

    Args:
        model: a DDPM or LatentDiffusion, or anything with betas, alphas_cumprod, parameterization, device and
            apply_model.
        conditioning, unconditional_conditioning, guidance_scale, separate_passes: see `GuidedNetwork`.
        timestep_respacing: levels of the chain, as `space_timesteps` takes them; "" = all.
        model_var_type: FIXED_SMALL or FIXED_LARGE, or LEARNED or LEARNED_RANGE for a network with 2c channels
            of output.
        loss_type: of training_losses.
        decoder_nll: how the step to the cleanest level is judged, see GaussianDiffusion. None = "gaussian" for a
            model with a first stage, whose latents have no bins and no bounds, and "discretized" for pixels.

    Returns:
        (network, diffusion), for diffusion.p_sample_loop(network, shape) and its other methods.

    Raises:
        UsageError: an option out of range.
        MismatchError: betas and alphas_cumprod of the model contradict each other.
    """
    if decoder_nll is None:
        decoder_nll = "gaussian" if hasattr(model, "first_stage_model") else "discretized"
    network = GuidedNetwork(
        model,
        conditioning,
        unconditional_conditioning=unconditional_conditioning,
        guidance_scale=guidance_scale,
        separate_passes=separate_passes,
    )
    betas = _betas(model)
    levels = space_timesteps(len(betas), timestep_respacing) if timestep_respacing else range(len(betas))
    mean_types = {kind: mean_type for mean_type, kind in KINDS.items()}
    diffusion = SpacedDiffusion(
        levels,
        betas=betas,
        model_mean_type=mean_types[model.parameterization],
        model_var_type=model_var_type,
        loss_type=loss_type,
        decoder_nll=decoder_nll,
    )
    return network, diffusion


def _betas(model: Any) -> np.ndarray:
    """Read the model's betas, which resolve small steps better than its alphas_cumprod, in float64."""
    betas = model.betas.detach().cpu().double().numpy()
    alpha_bar = alpha_bar_table(model)
    gap = np.abs(np.cumprod(1 - betas) - alpha_bar).max() if betas.shape == alpha_bar.shape else np.inf
    if gap > TABLE_TOLERANCE:
        raise MismatchError(
            f"the model's betas and alphas_cumprod contradict each other: {betas.shape} and {alpha_bar.shape}, "
            f"apart by {gap:.3g}, at most {TABLE_TOLERANCE:g} is rounding; set both with register_schedule"
        )
    return betas


def _check_classes(model: Any, condition: Any) -> None:
    """Refuse class labels that the model's network has not."""
    wrapper = getattr(model, "model", None)
    route = getattr(wrapper, "conditioning_key", None) or ""
    if not route.endswith("adm"):
        return
    labels = first_tensor(condition)
    if route != "adm":
        labels = condition.get("c_adm") if isinstance(condition, Mapping) else None
    check_labels_of(wrapper.diffusion_model, labels)
