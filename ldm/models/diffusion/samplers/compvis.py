"""The samplers of CompVis's scripts: DDIM, PLMS and DDPM, over whole levels."""

from dataclasses import KW_ONLY, dataclass, field

import numpy as np
from torch import Tensor

from ldm import limits
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers.base import NoisySampler, VariableEta
from ldm.process.prediction import to_x0
from ldm.process.schedule import LEAST_SIGNAL
from ldm.process.steps import ddim_std, ddim_step, ddpm_step, plms_eps


class DDIM(VariableEta, NoisySampler):
    """DDIM (arXiv:2010.02502), eta from 0 (deterministic) to 1 (DDPM's variance).

    Over whole levels the last step goes to the model's level 0, not to the clean end, as CompVis's does. A model whose
    last level has no signal is begun there ("trailing"), for pure noise is what that level was trained on, and no
    other.
    """

    name = "ddim"
    spacing = "uniform"
    ends_clean = False
    starts_above = True  # as CompVis's img2img; kept, for its seeds' images
    inverts = True

    @classmethod
    def own_spacing(cls, alpha_bar: np.ndarray) -> str:
        return "trailing" if alpha_bar[-1] <= LEAST_SIGNAL else cls.spacing

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        if to.left > here.left:
            return self.rise(x, here, to)
        eps, pred_x0 = self.denoise(x, here.t, here.alpha_bar)
        return self.move(x, eps, self.quantize(pred_x0), here, to)

    def std(self, here: Level, to: Level) -> Tensor:
        """Tell the standard deviation of a step's fresh noise."""
        return ddim_std(here.alpha_bar, to.alpha_bar, self.eta)

    def move(self, x: Tensor, eps: Tensor, pred_x0: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        """Step by a prediction at hand, Eq. 12 of arXiv:2010.02502: (sample at `to`, pred_x0)."""
        return ddim_step(
            x,
            eps,
            alpha_bar_t=here.alpha_bar,
            alpha_bar_prev=to.alpha_bar,
            std=self.std(here, to),
            noise=self.draw(x, here, to),
            pred_x0=pred_x0,
        )


@dataclass
class PLMS(DDIM):
    """Pseudo linear multistep (arXiv:2202.09778) over DDIM's levels and transfer, as CompVis has it.

    The first step averages the noise at both its ends, so a run of S steps calls the network S + 1 times. From a level
    without signal it is DDIM's.

    Attributes:
        old_eps: the last three raw predictions, oldest first; no option.
    """

    name = "plms"
    inverts = False
    etas = "must be 0: PLMS adds no noise"
    idle = frozenset({"temperature", "noise_dropout", "repeat_noise"})  # of the noise that it does not add

    old_eps: list[Tensor] = field(default_factory=list, init=False)

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        return eta == 0

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        eps, pred_x0 = self.denoise(x, here.t, here.alpha_bar)
        if self.old_eps:
            mean = plms_eps(eps, self.old_eps)
        elif here.alpha_bar == 0:  # noise alone gives no clean sample there; the network's own answer does
            self.old_eps = [eps]
            return self.move(x, eps, self.quantize(pred_x0), here, to)
        else:
            guess, _ = self.move(x, eps, self.quantize(pred_x0), here, to)
            # A plan's end is no level to call the network with; the original repeats the lowest.
            there = to if to.left > 0 else here
            mean = (eps + self.denoise(guess, there.t, there.alpha_bar)[0]) / 2
        self.old_eps = [*self.old_eps, eps][-3:]
        return self.move(x, mean, self.quantize(to_x0("eps", mean, x, here.alpha_bar)), here, to)


@dataclass
class DDPM(NoisySampler):
    """Ancestral sampling (arXiv:2006.11239) over all levels or over fewer, evenly spread with both ends.

    Options:
        clip_denoised: keep the predicted clean sample within [-1, 1], as pixel models want.
        v_posterior: 0 = the posterior's variance, 1 = beta.
    """

    name = "ddpm"
    spacing = "linspace"
    etas = "must be 0 (unset) or 1: DDPM's noise is fixed"

    _: KW_ONLY
    clip_denoised: bool = False
    v_posterior: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        limits.real("v_posterior of ddpm", self.v_posterior, *limits.SHARE)

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        return eta in (0, 1)

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        pred_x0 = self.denoise(x, here.t, here.alpha_bar)[1]
        pred_x0 = self.quantize(pred_x0.clamp(-1, 1) if self.clip_denoised else pred_x0)
        x_prev = ddpm_step(
            x,
            pred_x0,
            alpha_bar_t=here.alpha_bar,
            alpha_bar_prev=to.alpha_bar,
            noise=self.draw(x, here, to),
            v_posterior=self.v_posterior,
        )
        return x_prev, pred_x0
