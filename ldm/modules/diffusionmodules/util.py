"""CompVis's words for schedules, and the small layers that the UNet is built from.

The numbers come from ldm.process; this module keeps the original's names and habits ("linear" means linear in
sqrt(beta); DDIM levels are one higher than a plain division gives).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ldm.config import instantiate_from_config
from ldm.errors import MismatchError, UsageError, shown
from ldm.helpers import mean_flat, upload
from ldm.process.schedule import betas_for_alpha_bar, named_betas
from ldm.process.spacing import compvis_levels

__all__ = [
    "GroupNorm32",
    "HybridConditioner",
    "SiLU",
    "avg_pool_nd",
    "betas_for_alpha_bar",
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "mean_flat",
    "noise_like",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "zero_module",
]


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Return the float64 betas (n_timestep,) of "linear" (in sqrt(beta)), "sqrt_linear", "sqrt" or "cosine"."""
    return named_betas(
        schedule, n_timestep, linear_start=linear_start, linear_end=linear_end, cosine_s=cosine_s
    )


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Return the original's DDIM levels, quirks included: "uniform" may give more than num_ddim_timesteps.

    ldm.process.spacing.exact_levels gives exactly as many.
    """
    return compvis_levels(ddim_discr_method, num_ddim_timesteps, num_ddpm_timesteps)


def make_ddim_sampling_parameters(
    alphacums: Any, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> tuple[Any, Any, np.ndarray]:
    """Select the tables of a DDIM run: (sigmas, alphas, alphas_prev), each (S,).

    sigma is Eq. 16 of DDIM (arXiv:2010.02502). The last step goes to alphacums[0], not to 1.

    Args:
        alphacums: (T,) alpha_bar, as a tensor on the CPU or an array.
        ddim_timesteps: (S,) ascending levels.
        eta: 0 is deterministic, 1 has the variance of DDPM's posterior.
    """
    alphas = alphacums[ddim_timesteps]
    alphas_prev = np.asarray([alphacums[0], *alphacums[ddim_timesteps[:-1]].tolist()])
    # ddim_std's formula, but not its function: a float32 tensor divided by float64 numpy, as the original's is, rounds
    # elsewhere in the last bits, on which the pictures of its seeds depend.
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    return sigmas, alphas, alphas_prev


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Look t (b,), on any device, up in the table a (T,); shaped (b, 1, 1, ...) to multiply a batch of x_shape."""
    return a.gather(-1, upload(t, a.device)).reshape(t.shape[0], *(1 for _ in x_shape[1:]))


def checkpoint(func: Callable[..., Any], inputs: Iterable[Any], params: Iterable[Any], flag: bool) -> Any:
    """Call func(*inputs); with flag, keep no activations and recompute them in the backward pass.

    `params` is the original's argument and is not needed: frozen parameters, inputs that are None and
    parameters that appear later all work.
    """
    if flag and torch.is_grad_enabled():
        return torch_checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def timestep_embedding(
    timesteps: Tensor, dim: int, max_period: int = 10000, repeat_only: bool = False
) -> Tensor:
    """Embed levels as [cos, sin] at geometrically falling frequencies.

    Args:
        timesteps: (b,) levels, fractional ones allowed.
        dim: of the result; an odd one ends in a zero.
        max_period: of the lowest frequency, which it falls just short of.
        repeat_only: repeat the levels instead of embedding them.

    Returns:
        (b, dim) float32 (the levels' dtype with repeat_only).
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * exponents / half)
    angles = timesteps[:, None].float() * frequencies[None]  # (b, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero and return it."""
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters of a module and return it."""
    for parameter in module.parameters():
        parameter.detach().mul_(scale)
    return module


class SiLU(nn.SiLU):
    """x * sigmoid(x), under the name that older code imports."""


class GroupNorm32(nn.GroupNorm):
    """A group norm that computes in float32 whatever its input and weights are, and returns the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and self.weight.dtype == torch.float32:
            return super().forward(x)
        out = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return out.type(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """Make the UNet's norm: 32 groups, eps 1e-5.

    Raises:
        MismatchError: the channels do not divide into the groups.
    """
    if channels < 1 or channels % 32:
        raise MismatchError(
            f"a level of {channels} channels does not divide into 32 groups; change model_channels or channel_mult"
        )
    return GroupNorm32(32, channels)


def _by_dims(dims: int, layers: tuple[type, type, type]) -> type:
    if dims not in (1, 2, 3):
        raise UsageError(f"dims should be 1, 2 or 3, got {dims}")
    return layers[dims - 1]


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Make a 1-, 2- or 3-dimensional convolution."""
    return _by_dims(dims, (nn.Conv1d, nn.Conv2d, nn.Conv3d))(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Make a 1-, 2- or 3-dimensional average pooling."""
    return _by_dims(dims, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """Make a linear layer."""
    return nn.Linear(*args, **kwargs)


class HybridConditioner(nn.Module):
    """Two embedders for a model that is conditioned by concatenation and by attention."""

    def __init__(self, c_concat_config: Any, c_crossattn_config: Any):
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Tensor]]:
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }


def check_label_range(labels: Tensor, num_classes: int) -> None:
    """Raise UsageError unless whole-number labels, of any shape, are from 0 to num_classes - 1.

    Labels on a GPU are copied here once, which waits for all work queued before them.
    """
    values = labels.flatten().tolist()
    if not all(0 <= value < num_classes for value in values):
        raise UsageError(f"labels must be from 0 to {num_classes - 1}, got {shown(values)}")


def noise_like(
    shape: tuple[int, ...] | torch.Size, device: torch.device | str, repeat: bool = False
) -> Tensor:
    """Draw unit normal noise on a device; repeat gives the whole batch the same one."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).repeat(shape[0], *(1 for _ in shape[1:]))
    return torch.randn(shape, device=device)
