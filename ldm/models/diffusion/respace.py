"""A respaced chain: only some of the levels a network was trained on (Improved DDPM, arXiv:2102.09672)."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UsageError
from ldm.helpers import upload
from ldm.models.diffusion.gaussian_diffusion import GaussianDiffusion
from ldm.process.schedule import NoiseSchedule, respaced_betas
from ldm.process.spacing import section_levels, stride_levels


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Choose the levels of a shorter chain.

    Args:
        num_timesteps: levels of the network.
        section_counts: "ddimN" is exactly N levels with one stride; "a,b,c" or [a, b, c] divides the levels
            into equal sections, the cleanest first, and takes so many of each (see process.spacing).

    Raises:
        UsageError: counts that cannot be had, or that are no whole numbers.
    """
    parts, is_ddim = section_counts, False
    if isinstance(parts, str):
        is_ddim = parts.startswith("ddim")
        parts = [parts.removeprefix("ddim")] if is_ddim else parts.split(",")
    try:
        counts = [int(part) if isinstance(part, str) else operator.index(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise UsageError(
            "section counts should be 'ddimN' or whole numbers, such as '10,15,20' or [10, 15, 20]; "
            f"got {section_counts!r}"
        ) from error
    if is_ddim:
        return set(stride_levels(num_timesteps, counts[0]).tolist())
    return set(section_levels(num_timesteps, counts).tolist())


class SpacedDiffusion(GaussianDiffusion):
    """Diffusion over some levels of a longer chain; the network is called with the levels of the long one.

    Attributes:
        timestep_map: the long chain's level for each of this one's.
        original_num_steps: length of the long chain.

    Args:
        use_timesteps: the levels to keep, in any order.
        kwargs: GaussianDiffusion's, with the long chain's betas.

    Raises:
        UsageError: no levels, or one that the long chain has not.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any):
        self.use_timesteps = set(use_timesteps)
        long = NoiseSchedule.from_betas(kwargs["betas"], up_to_one=True)
        self.original_num_steps = long.num_steps
        self.timestep_map = sorted(self.use_timesteps)
        beyond = [t for t in self.timestep_map if not 0 <= t < long.num_steps]
        if beyond or not self.timestep_map:
            raise UsageError(
                f"use_timesteps should be levels from 0 to {long.num_steps - 1}, at least one; "
                f"got {beyond or 'none'}"
            )
        super().__init__(**{**kwargs, "betas": respaced_betas(long.alpha_bar, self.timestep_map)})

    def p_mean_variance(self, model: Callable, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As GaussianDiffusion's, at the network's own levels."""
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Callable, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As GaussianDiffusion's, at the network's own levels."""
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """As GaussianDiffusion's, at cond_fn's own levels."""
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: Callable, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As GaussianDiffusion's, at cond_fn's own levels."""
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model: Callable) -> "_WrappedModel":
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model scales, by the long chain


class _WrappedModel:
    """A network called with levels of the short chain, which it translates to those of the long one."""

    def __init__(
        self,
        model: Callable,
        timestep_map: Sequence[int],
        rescale_timesteps: bool,
        original_num_steps: int,
    ):
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps
        self.num_classes = getattr(model, "num_classes", None)

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        levels = upload(torch.tensor(self.timestep_map, dtype=ts.dtype), ts.device)[ts]
        if self.rescale_timesteps:
            levels = levels.float() * (1000.0 / self.original_num_steps)
        return self.model(x, levels, **kwargs)
