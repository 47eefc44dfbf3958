"""A small DDIM scheduler, for writing the loop by hand.

    scheduler = DDIMScheduler()
    for t in scheduler.get_timesteps(1000, 20):
        eps = unet(zt, t.expand(len(zt)), context)
        zt = scheduler.get_xt_prev(zt, t, eps, scheduler.get_std(t, eta=0.0))

Levels are what the network was trained on, 0 to T - 1. Texts that count levels from one write the 20 steps of
1000 as 1000, 950, ..., 50; those are 999, 949, ..., 49 here, the spacing "trailing". The default "uniform" gives
951, 901, ..., 1, so that the loop above makes DDIMSampler's numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.errors import UsageError
from ldm.models.diffusion.levels import choose_levels, unit_noise
from ldm.process.gaussian import q_sample
from ldm.process.schedule import NoiseSchedule
from ldm.process.steps import ddim_std, ddim_step


class DDIMScheduler:
    """Levels and transfers of DDIM (arXiv:2010.02502) over one noise schedule.

    Args:
        alphas_cumprod: (T,) fraction of signal variance a level, e.g. a model's own; None = Stable Diffusion
            v1's.
        spacing: a name of ldm.process.spacing.exact_levels, or "compvis" for the historic list.
        set_alpha_to_one: whether the last step goes to the clean end instead of level 0 (as CompVis's does).

    Attributes:
        alphas_cumprod: (T,) float32.
        timesteps: (S,) int64, noisiest first; all levels until get_timesteps or set_timesteps chooses.
        init_noise_sigma: standard deviation of the initial noise, 1.
    """

    init_noise_sigma = 1.0

    def __init__(
        self,
        alphas_cumprod: Tensor | Sequence[float] | None = None,
        *,
        spacing: str = "uniform",
        set_alpha_to_one: bool = False,
    ):
        if alphas_cumprod is None:
            schedule = NoiseSchedule.named("linear", 1000, linear_start=0.00085, linear_end=0.012)
            alphas_cumprod = schedule.alpha_bar
        self.alphas_cumprod = torch.as_tensor(alphas_cumprod).detach().cpu().float()
        # A caller that reads a level's alpha_bar gets the float32 table's value, to compute with in float64.
        self._alpha_bar = self.alphas_cumprod.double()
        self._final = self._alpha_bar.new_ones(()) if set_alpha_to_one else self._alpha_bar[0]
        self.spacing = spacing
        self.timesteps = torch.arange(len(self._alpha_bar)).flip(0)

    def __len__(self) -> int:
        return len(self._alpha_bar)

    def get_timesteps(self, T: int, ddim_steps: int) -> Tensor:
        """Choose `ddim_steps` of the schedule's T levels: (ddim_steps,) int64, noisiest first.

        Raises:
            UsageError: T is not the schedule's length, or ddim_steps is outside 1..T.
        """
        if len(self) != T:
            raise UsageError(
                f"this schedule has {len(self)} levels, got T={T}; pass the other's alphas_cumprod"
            )
        self.set_timesteps(ddim_steps)
        return self.timesteps

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the levels of a run, as get_timesteps does, and keep them on a device."""
        levels = choose_levels(self.spacing, num_inference_steps, len(self))
        self.timesteps = torch.from_numpy(levels.copy()).flip(0).to(device or "cpu")

    def get_std(self, t: int | Tensor, eta: float = 0.0) -> Tensor:
        """Tell the standard deviation of the noise that the step from level t adds: 0-d float64 (Eq. 16).

        Raises:
            UsageError: t is not one of the timesteps, or eta is outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise UsageError(f"eta must be from 0 to 1, got {eta}")
        return ddim_std(*self._between(t), eta)

    def get_xt_prev(
        self,
        zt: Tensor,
        t: int | Tensor,
        eps: Tensor,
        std: float | Tensor = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Step zt (b, c, h, w) from level t to the next of the timesteps, given its noise (Eq. 12).

        Args:
            std: from get_std.
            noise: unit normal like zt; drawn from torch's generator where std is not 0 and none is given.

        Raises:
            UsageError: t is not one of the timesteps.
        """
        alpha_bar_t, alpha_bar_prev = self._between(t)
        std = torch.as_tensor(std, dtype=torch.float64)
        if std == 0:
            return ddim_step(zt, eps, alpha_bar_t=alpha_bar_t, alpha_bar_prev=alpha_bar_prev)[0]
        noise = unit_noise(zt) if noise is None else noise
        return ddim_step(
            zt, eps, alpha_bar_t=alpha_bar_t, alpha_bar_prev=alpha_bar_prev, std=std, noise=noise
        )[0]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Noise clean samples (b, ...) to one level, or to one each, (b,)."""
        levels = self._alpha_bar[torch.as_tensor(timesteps).cpu()]
        if levels.dim() == 0:
            return q_sample(original_samples, noise, alpha_bar=levels)
        levels = levels.reshape(-1, *(1 for _ in original_samples.shape[1:]))
        sigma = (1 - levels).sqrt()
        return q_sample(original_samples, noise, alpha_bar=levels.to(noise), sigma=sigma.to(noise))

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the sample as it is: this schedule's networks take it unscaled."""
        return sample

    def _between(self, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """alpha_bar at level t and at the level stepped to, both 0-d float64."""
        t = int(t)
        place = (self.timesteps == t).nonzero()
        if len(place) == 0:
            raise UsageError(
                f"level {t} is not among the {len(self.timesteps)} timesteps; take t from scheduler.timesteps"
            )
        after = int(place[0]) + 1
        prev = self._alpha_bar[int(self.timesteps[after])] if after < len(self.timesteps) else self._final
        return self._alpha_bar[t], prev
