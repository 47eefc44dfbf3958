"""Noise augmentation of an upscaler's small picture: noised to a level that conditions the network."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule
from ldm.process import gaussian
from ldm.process.schedule import NoiseSchedule


class AbstractLowScaleModel(nn.Module):
    """Hands the small picture on; with a noise schedule its tables are buffers, as checkpoints have them.

    Args:
        noise_schedule_config: keywords of register_schedule; None makes no tables.
    """

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None):
        super().__init__()
        if noise_schedule_config is not None:
            self.register_schedule(**noise_schedule_config)

    def register_schedule(
        self,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute the tables in float64 and keep them as float32 buffers (timesteps,), real ones on meta too."""
        betas = make_beta_schedule(
            beta_schedule, timesteps, linear_start=linear_start, linear_end=linear_end, cosine_s=cosine_s
        )
        schedule = NoiseSchedule.from_betas(np.asarray(betas, dtype=np.float64))
        self.num_timesteps, self.linear_start, self.linear_end = schedule.num_steps, linear_start, linear_end
        alpha_bar = torch.from_numpy(schedule.alpha_bar)
        tables = {
            "betas": torch.from_numpy(schedule.betas),
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_prev": torch.from_numpy(schedule.alpha_bar_prev),
            "sqrt_alphas_cumprod": alpha_bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
            "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise pictures (b, c, h, w) to levels t (b,) (DDPM Eq. 4); the noise is drawn where none is given."""
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha_bar = extract_into_tensor(self.alphas_cumprod, t, x_start.shape)
        sigma = extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape)
        return gaussian.q_sample(x_start, noise, alpha_bar=alpha_bar, sigma=sigma)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what is joined to the latents, and the level of its noise."""
        return x, None

    def decode(self, x: Tensor) -> Tensor:
        """Return what is joined as a picture again."""
        return x


class SimpleImageConcat(AbstractLowScaleModel):
    """No noise: level 0."""

    def __init__(self) -> None:
        super().__init__(noise_schedule_config=None)
        self.max_noise_level = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(x.shape[0], device=x.device, dtype=torch.long)


class ImageConcatWithNoiseAugmentation(AbstractLowScaleModel):
    """Noise of a level below max_noise_level (arXiv:2106.15282), drawn at random unless it is given.

    Args:
        noise_schedule_config: keywords of register_schedule.
        max_noise_level: levels run from 0 to max_noise_level - 1.
        to_cuda: without effect; the tables are where the model is.

    Raises:
        UsageError: max_noise_level is not from 1 to the schedule's number of levels.
    """

    def __init__(
        self, noise_schedule_config: Mapping[str, Any], max_noise_level: int = 1000, to_cuda: bool = False
    ):
        super().__init__(noise_schedule_config=noise_schedule_config)
        if not 1 <= max_noise_level <= self.num_timesteps:
            raise UsageError(
                f"max_noise_level should be from 1 to {self.num_timesteps}, the schedule's number of levels; "
                f"got {max_noise_level}"
            )
        self.max_noise_level = max_noise_level

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise pictures (b, c, h, w) to noise_level (b,): (pictures, levels)."""
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (x.shape[0],), device=x.device)
        return self.q_sample(x, noise_level), noise_level
